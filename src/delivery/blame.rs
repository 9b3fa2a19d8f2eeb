//! What this worker tells of an organization's configuration: failures held against it, and what went well.
//! Guarantee: whether an organization's mail is parked is known before the attempt that failed lets the next one start; where
//! the database does not answer, nothing is parked.

use std::time::Duration;

use crate::model::advice::{self, ServerFacts};
use crate::model::event::{Event, What};
use crate::model::failure::Reason;
use crate::model::health::{self, ANNOUNCED_WITHIN, Absolution, Blamed, Suspect};
use crate::model::organization::OrganizationId;
use crate::model::smtp_settings::Destination;
use crate::store::{ConfigCache, SmtpConfigs, StoreError, Trouble};

use super::attempt::Report;
use super::database::DatabaseWatch;
use super::route::Route;
use super::settle::Desk;

/// For the record that it is announced.
const MARGIN: Duration = Duration::from_secs(10);

/// Where it is told.
pub struct Blames {
    /// The configurations.
    pub configs: SmtpConfigs,
    /// What this worker has in mind of them, which each note makes old.
    pub cache: ConfigCache,
    /// Whether the database can be asked.
    pub database: DatabaseWatch,
}

impl Blames {
    /// Holds an attempt's failure against the configuration that it was made with, where that is at fault, and puts into the
    /// report what became of it. `last` is what the same job failed for before. The trouble that begins by this is returned, to
    /// be announced.
    pub async fn blame(&self, route: &Route, last: Option<Reason>, report: &mut Report) -> Option<Trouble> {
        let Destination::Organization { id, version } = &route.destination else { return None };
        let reason = report.verdict.and_then(health::accusation)?;
        let account = &route.account;
        let hint = match &report.failure {
            Some(failure) => advice::hint(failure, ServerFacts::of(account)),
            None => advice::of_reason(reason).to_owned(),
        };
        let phase = report.failure.as_ref().map(|failure| failure.phase);
        let suspect = Suspect::of(reason, phase, last);
        let (blamed, trouble) = self.note(id, *version, reason, hint, suspect).await.ok()?;
        report.blamed = Some(blamed);
        trouble
    }

    /// Holds a reason against one version of a configuration.
    ///
    /// # Errors
    /// When the database did not answer.
    pub async fn note(
        &self,
        organization: &OrganizationId,
        version: i64,
        reason: Reason,
        hint: String,
        suspect: Suspect,
    ) -> Result<(Blamed, Option<Trouble>), StoreError> {
        let answer = self.configs.blame(organization, version, reason, &hint, suspect).await;
        self.cache.invalidate(organization);
        let blamed = answer.inspect_err(|error| {
            self.database.lost(error);
            tracing::warn!(%organization, %reason, %error, "a failure of a configuration could not be noted");
        })?;
        let trouble = (blamed == Blamed::Failing { just_now: true }).then(|| {
            tracing::warn!(%organization, version, %reason, "a configuration does not work; its mail is parked");
            Trouble { organization: organization.clone(), version, reason, hint }
        });
        Ok((blamed, trouble))
    }

    /// Credentials that do not open are enough, for nothing can be tried with them. Whether they are still those in use.
    ///
    /// # Errors
    /// When the database did not answer.
    pub async fn blame_unreadable(
        &self,
        desk: &Desk,
        organization: &OrganizationId,
        version: i64,
    ) -> Result<bool, StoreError> {
        let reason = Reason::ConfigUnreadable;
        let hint = advice::of_reason(reason).to_owned();
        let (blamed, trouble) = self.note(organization, version, reason, hint, Suspect::Account).await?;
        if let Some(trouble) = trouble {
            self.announce(desk, trouble).await;
        }
        Ok(matches!(blamed, Blamed::Failing { .. }))
    }

    /// Wipes out what is held against a configuration that has just shown that it works.
    pub async fn absolve(&self, destination: &Destination, by: Absolution) {
        let Destination::Organization { id, version } = destination else { return };
        match self.configs.absolve(id, *version, by).await {
            Ok(()) => self.cache.invalidate(id),
            // The next success says it again.
            Err(error) => self.database.lost(&error),
        }
    }

    /// Publishes `smtp_config.failing`. A worker that cannot in time leaves it to whoever looks for what is unannounced: one at
    /// a time.
    pub async fn announce(&self, desk: &Desk, trouble: Trouble) {
        let Trouble { organization, version, reason, hint } = trouble;
        let what = What::ConfigFailing { version, reason, hint };
        let event = Event::of_organization(desk.clock.now(), organization.clone(), what);
        let announced = tokio::time::timeout(ANNOUNCED_WITHIN - MARGIN, desk.announce(&event)).await;
        if !matches!(announced, Ok(Ok(()))) {
            return;
        }
        if let Err(error) = self.configs.announced(&organization, version).await {
            self.database.lost(&error);
        }
    }
}

/// What an attempt wipes out; `None` where there is nothing to wipe out.
pub fn absolution(route: &Route, report: &Report) -> Option<Absolution> {
    let health = route.health;
    if report.accepted.is_empty() {
        let reached = report.blamed.is_none() && report.reached();
        return (reached && health.unreached).then_some(Absolution::Reached);
    }
    (health.blemished || !health.worked).then_some(Absolution::Worked)
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;
    use std::sync::Arc;

    use super::*;
    use crate::model::address::Mailbox;
    use crate::model::failure::Phase;
    use crate::model::health::Health;
    use crate::model::smtp_settings::{SmtpAccount, TlsMode};

    #[test]
    fn only_what_is_there_is_wiped_out() {
        let absolved = |health, accepted: &[u16]| {
            let account = Arc::new(SmtpAccount {
                host: "smtp.example.org".into(),
                port: 587,
                tls: TlsMode::Required,
                credentials: None,
                from: Mailbox::parse("a@example.org").unwrap(),
            });
            let route = Route { destination: Destination::Platform, account, health, limited: None };
            let address = Some(SocketAddr::from(([127, 0, 0, 1], 587)));
            let accepted = accepted.to_vec();
            absolution(&route, &Report { accepted, address, phase: Some(Phase::Rcpt), ..Report::default() })
        };
        let well = Health { worked: true, ..Health::default() };
        let struck = Health { blemished: true, ..well };
        let unreached = Health { unreached: true, ..struck };
        for accepted in [&[][..], &[0]] {
            assert_eq!(absolved(well, accepted), None);
        }
        assert_eq!(absolved(struck, &[]), None, "the server answers, which says nothing of the account");
        assert_eq!(absolved(unreached, &[]), Some(Absolution::Reached));
        for health in [struck, unreached, Health::default()] {
            assert_eq!(absolved(health, &[0]), Some(Absolution::Worked));
        }
    }
}
