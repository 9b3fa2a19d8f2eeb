//! A job on its way to its attempt: read, routed, and admitted by the dispatcher and by what its provider allows.
//! Guarantee: what waits in line is no more than a body, and a great one is decoded only where it is sent, when there is room for it.
//! Who waits for a provider's limit is put aside at the broker, nothing charged, and in the end given up by its age; a job whose
//! account has no limits is asked nothing of them.

use std::time::Duration;

use tokio::time::timeout;

use super::dispatch::{Admitted, Permit, Slot};
use super::fairness::Request;
use super::in_hand::InHand;
use super::rates::{Allowance, Entered, Taken, Waits};
use super::route::{self, NoServer, Route};
use super::weights::GREAT_BYTES;
use super::worker::Worker;
use crate::broker::wire::{self, Refusal};
use crate::model::failure::Reason;
use crate::model::job::Job;
use crate::model::ledger::Claimed;
use crate::model::provider::Limited;
use crate::model::schedule::ASIDE_S;
use crate::model::smtp_settings::Destination;
use crate::store::StoreError;

/// Longest wait of a great job for its room among the others.
const ROOM_WAIT: Duration = Duration::from_secs(10);
/// Wait of one that got none, in seconds.
const NO_ROOM_WAIT_S: u32 = 30;

/// Most connections at once to each kind of destination.
#[derive(Debug, Clone, Copy)]
pub struct Connections {
    /// `smtp.max_connections_per_organization`.
    pub per_organization: usize,
    /// `platform.max_connections`.
    pub platform: usize,
}

impl Connections {
    fn ceiling(&self, destination: &Destination) -> usize {
        match destination {
            Destination::Organization { .. } => self.per_organization,
            Destination::Platform => self.platform,
        }
    }
}

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
    /// The body as a job.
    pub(super) fn read(&self, delivery: &InHand<'_>) -> Result<Job, Refusal> {
        let body = &delivery.received().body;
        heavily(body.len(), || wire::parse_job(body, &self.limits.wire))
    }

    /// The same for a job that may have to wait. Decoded attachments would wait with it: those of a great body are left out.
    pub(super) fn read_to_wait(&self, delivery: &InHand<'_>) -> Result<Job, Refusal> {
        let mut job = self.read(delivery)?;
        if is_great(delivery) {
            job.attachments.clear();
        }
        Ok(job)
    }

    /// Reads again what was left out.
    pub(super) fn read_to_send(&self, delivery: &InHand<'_>, job: &mut Job) -> Result<(), Refusal> {
        if is_great(delivery) {
            job.attachments = self.read(delivery)?.attachments;
        }
        Ok(())
    }

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
        slot: &Slot,
    ) -> Result<Start, StoreError> {
        let start = tokio::select! {
            biased;
            () = self.shutdown.stop_taking() => return Ok(Start::Stopping),
            start = self.start(delivery, job, route, slot) => start?,
        };
        Ok(match start {
            Start::PutAside(delay_s) => Start::PutAside(delay_s.min(self.longest_aside(delivery))),
            other => other,
        })
    }

    /// The shortest delay behind which the job's time is over: none is put aside far past its greatest age.
    fn longest_aside(&self, delivery: &InHand<'_>) -> u32 {
        let age = delivery.received().first_at.map(|first_at| self.clock.now() - first_at);
        let age = age.and_then(|age| Duration::try_from(age).ok()).unwrap_or_default();
        soonest_after(self.limits.retry.max_age.saturating_sub(age))
    }

    async fn start(
        &self,
        delivery: &InHand<'_>,
        job: &Job,
        route: &Route,
        slot: &Slot,
    ) -> Result<Start, StoreError> {
        let request = Request {
            destination: &route.destination,
            organization: job.key.organization.as_ref(),
            bytes: delivery.received().body.len(),
            ceiling: self.limits.connections.ceiling(&route.destination),
        };
        if let Some(limited) = &route.limited {
            // Boxed: a task is as large as its largest way, and most accounts have no limits.
            return Box::pin(self.start_limited(job, route, limited, slot, request)).await;
        }
        Ok(match self.line_up(slot, request).await {
            Admitted::Go(permit) => Start::Go(Started { allowance: None, permit }),
            Admitted::PutAside(delay_s) => Start::PutAside(delay_s),
        })
    }

    async fn start_limited(
        &self,
        job: &Job,
        route: &Route,
        limited: &Limited,
        slot: &Slot,
        request: Request<'_>,
    ) -> Result<Start, StoreError> {
        // Before it stands in line, which holds a place of the lane's prefetch.
        let place = match self.rates.enter(limited, request.organization, request.ceiling).await? {
            Entered::Pass(place) => place,
            Entered::Aside(waits) => return Ok(waiting(job, route, &waits)),
        };
        let request = Request { ceiling: request.ceiling.min(place.connections()), ..request };
        let permit = match self.line_up(slot, request).await {
            Admitted::Go(permit) => permit,
            Admitted::PutAside(delay_s) => return Ok(Start::PutAside(delay_s)),
        };
        Ok(match place.take(job.recipients().count(), request.organization).await? {
            Taken::Go(allowance) => Start::Go(Started { allowance: Some(allowance), permit }),
            Taken::Aside(waits) => waiting(job, route, &waits),
        })
    }

    /// A great job's room comes last, and not for long: meanwhile its permit keeps others from their destination.
    async fn line_up(&self, slot: &Slot, request: Request<'_>) -> Admitted {
        match slot.admit(request).await {
            Admitted::Go(permit) => match timeout(ROOM_WAIT, self.weights.work(request.bytes)).await {
                Ok(weight) => Admitted::Go(permit.with(weight)),
                Err(_) => Admitted::PutAside(NO_ROOM_WAIT_S),
            },
            aside @ Admitted::PutAside(_) => aside,
        }
    }
}

fn waiting(job: &Job, route: &Route, waits: &Waits) -> Start {
    waits.tell(route.destination.transport(), job.key.organization.as_ref());
    Start::PutAside(waits.delay_s)
}

/// The shortest aside delay behind which a time is over, or the longest there is.
fn soonest_after(left: Duration) -> u32 {
    let over = ASIDE_S.iter().find(|delay| Duration::from_secs(u64::from(**delay)) >= left);
    *over.unwrap_or(&ASIDE_S[ASIDE_S.len() - 1])
}

fn is_great(delivery: &InHand<'_>) -> bool {
    delivery.received().body.len() >= GREAT_BYTES
}

/// Does work that takes its time with so many bytes.
pub(super) fn heavily<T>(bytes: usize, work: impl FnOnce() -> T) -> T {
    if bytes < GREAT_BYTES { work() } else { tokio::task::block_in_place(work) }
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
