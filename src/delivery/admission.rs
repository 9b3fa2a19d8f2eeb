//! Where a job goes, and whether its attempt may start now: a place with its destination, and what its provider allows.
//! Guarantee: who waits for a provider's limit is put aside at the broker, nothing charged, and in the end given up by its age; a job
//! whose account has no limits is asked nothing of them.

use std::time::Duration;

use super::dispatch::{Admitted, LineKey, Permit};
use super::in_hand::InHand;
use super::rates::{Allowance, Entered, Taken, Waits};
use super::route::{self, NoServer, Route};
use super::worker::Worker;
use crate::model::failure::Reason;
use crate::model::job::Job;
use crate::model::ledger::Claimed;
use crate::model::provider::Limited;
use crate::model::schedule::ASIDE_S;
use crate::model::smtp_settings::Destination;
use crate::store::StoreError;

/// What became of a job that is to be attempted.
pub(super) enum Start {
    /// It may.
    Go(Started),
    /// Later, in so many seconds.
    PutAside(u32),
    /// The worker stops.
    Stopping,
}

/// The right to attempt it.
pub(super) struct Started {
    /// Of its provider, where that has limits. Dropped first: the permit's next owner needs its connection.
    pub(super) allowance: Option<Allowance>,
    /// Of its destination.
    pub(super) permit: Permit,
}

impl Worker {
    pub(super) async fn route(&self, job: &Job) -> Result<Result<Route, NoServer>, StoreError> {
        let facts = match &job.key.organization {
            Some(organization) => Some(self.configs.get(organization).await?),
            None => None,
        };
        let own = job.key.organization.as_ref().zip(facts.as_deref());
        Ok(route::route(own, self.limits.custom_smtp, self.platform.as_ref()))
    }

    /// The route by the configuration as of the claim, or a newer one. Credentials that do not open are held against it.
    pub(super) async fn route_as_of(
        &self,
        job: &Job,
        claimed: &Claimed,
    ) -> Result<Result<Route, NoServer>, StoreError> {
        let Some(organization) = &job.key.organization else { return self.route(job).await };
        let Claimed { custom_smtp, config_version, config_failing, .. } = *claimed;
        let facts = self.configs.confirm(organization, custom_smtp, config_version, config_failing).await?;
        let own = Some((organization, &*facts));
        let now = route::route(own, self.limits.custom_smtp, self.platform.as_ref());
        let Err(NoServer::Unreadable { version }) = now else { return Ok(now) };
        if self.blames.blame_unreadable(&self.desk, organization, version).await? {
            return Ok(Err(NoServer::Failing(Reason::ConfigUnreadable)));
        }
        self.route(job).await
    }

    pub(super) async fn admit(
        &self,
        delivery: &InHand<'_>,
        job: &Job,
        route: &Route,
    ) -> Result<Start, StoreError> {
        tokio::select! {
            biased;
            () = self.shutdown.stop_taking() => Ok(Start::Stopping),
            start = self.start(delivery, job, route) => start,
        }
    }

    async fn start(&self, delivery: &InHand<'_>, job: &Job, route: &Route) -> Result<Start, StoreError> {
        let organization = job.key.organization.as_ref();
        let key = LineKey { organization: organization.cloned(), lane: delivery.lane().name.clone() };
        let ceiling = match route.destination {
            Destination::Organization { .. } => self.limits.organization_connections,
            Destination::Platform => self.limits.platform_connections,
        };
        if let Some(limited) = &route.limited {
            // Boxed: a task is as large as its largest way, and most accounts have no limits.
            return Box::pin(self.start_limited(delivery, job, route, limited, key, ceiling)).await;
        }
        Ok(match self.dispatcher.admit(&route.destination, key, ceiling).await {
            Admitted::Go(permit) => Start::Go(Started { allowance: None, permit }),
            Admitted::PutAside(delay_s) => Start::PutAside(delay_s),
        })
    }

    async fn start_limited(
        &self,
        delivery: &InHand<'_>,
        job: &Job,
        route: &Route,
        limited: &Limited,
        key: LineKey,
        ceiling: usize,
    ) -> Result<Start, StoreError> {
        let organization = job.key.organization.as_ref();
        // Before it stands in line, which holds a place of the lane's prefetch.
        let place = match self.rates.enter(limited, organization, ceiling).await? {
            Entered::Pass(place) => place,
            Entered::Aside(waits) => return Ok(self.waits(delivery, job, route, waits)),
        };
        let ceiling = ceiling.min(place.connections());
        let permit = match self.dispatcher.admit(&route.destination, key, ceiling).await {
            Admitted::Go(permit) => permit,
            Admitted::PutAside(delay_s) => return Ok(Start::PutAside(delay_s)),
        };
        Ok(match place.take(job.recipients().count(), organization).await? {
            Taken::Go(allowance) => Start::Go(Started { allowance: Some(allowance), permit }),
            Taken::Aside(waits) => self.waits(delivery, job, route, waits),
        })
    }

    fn waits(&self, delivery: &InHand<'_>, job: &Job, route: &Route, waits: Waits) -> Start {
        waits.tell(route.destination.transport(), job.key.organization.as_ref());
        let age = delivery.received().first_at.map(|first_at| self.clock.now() - first_at);
        let age = age.and_then(|age| Duration::try_from(age).ok()).unwrap_or_default();
        let left = self.limits.retry.max_age.saturating_sub(age);
        Start::PutAside(waits.delay_s.min(soonest_after(left)))
    }
}

/// The shortest aside delay behind which a time is over, or the longest there is.
fn soonest_after(left: Duration) -> u32 {
    let over = ASIDE_S.iter().find(|delay| Duration::from_secs(u64::from(**delay)) >= left);
    *over.unwrap_or(&ASIDE_S[ASIDE_S.len() - 1])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_near_its_greatest_age_is_not_put_aside_far_past_it() {
        let after = |seconds| soonest_after(Duration::from_secs(seconds));
        assert_eq!([0, 5, 6, 100, 121, 100_000].map(after), [5, 5, 30, 120, 600, 600]);
    }
}
