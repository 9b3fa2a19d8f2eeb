//! Probes: whether a configuration that fails works by now, found out by a connection test that sends nothing.
//! Guarantee: each probe is one connection of one worker's; one whose worker died is made later by another, one whose worker
//! stops at once; a slow server holds up another's probe only where many are slow, and trouble that may pass by itself says
//! nothing about the configuration.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::task::{JoinHandle, JoinSet};

use crate::model::advice::{self, ServerFacts};
use crate::model::failure::{Failure, Reason};
use crate::model::health::{self, Pauses};
use crate::model::policy;
use crate::model::smtp_settings::{Destination, SmtpAccount};
use crate::settings::CustomSmtp;
use crate::smtp::SmtpConnector;
use crate::store::{DueProbe, StoreError, StoredAccount, Unreadable};

use super::worker::Worker;

/// Between two looks for probes that are due.
const PAUSE: Duration = Duration::from_secs(1);
/// Probes at once in this worker, beside `delivery.max_sessions`.
const PROBES: usize = 16;
/// For the goodbye behind a verdict.
const GOODBYE_LIMIT: Duration = Duration::from_secs(2);
/// So long after its limit a probe that has brought no verdict is taken by another worker: it takes the goodbye and the record.
const GRACE: Duration = Duration::from_secs(60);
/// For probes under way to end when the worker is to take no new work; and for giving back those that did not.
const LAST_PROBES: Duration = Duration::from_secs(5);
const GIVE_BACK_LIMIT: Duration = Duration::from_secs(1);

/// What a probe found.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Found {
    /// It works.
    Works,
    /// It does not; without a hint the one before stays. Then the next probe.
    Fails(Reason, Option<String>, Pauses),
    /// Nothing that this worker could judge: another has the key.
    Keyless(String),
}

/// Makes probes for as long as the worker runs.
pub struct Prober {
    worker: Arc<Worker>,
    connector: SmtpConnector,
    /// Ids of keys that it has come upon and that the worker's ring lacks: until its end, for a ring does not change.
    lacking: Mutex<BTreeSet<String>>,
}

impl Prober {
    /// `worker` is what it shares with the lanes. The connector opens sessions outside the pool: what is kept there was opened
    /// when all was well.
    pub fn new(worker: Arc<Worker>, connector: SmtpConnector) -> Self {
        Self { worker, connector, lacking: Mutex::default() }
    }

    /// Until the worker takes no new work; probes that do not end soon then are given back.
    pub async fn run(self) {
        let this = Arc::new(self);
        let mut probes = JoinSet::new();
        let mut announcing: Option<JoinHandle<()>> = None;
        while !this.worker.shutdown.is_draining() {
            while probes.try_join_next().is_some() {}
            match this.due(PROBES - probes.len().min(PROBES)).await {
                Ok(due) => due.into_iter().for_each(|probe| {
                    let this = this.clone();
                    probes.spawn(async move { this.probe(probe).await });
                }),
                Err(error) => tracing::debug!(%error, "probes could not be looked for now"),
            }
            if announcing.as_ref().is_none_or(JoinHandle::is_finished) {
                let this = this.clone();
                announcing = Some(tokio::spawn(async move { this.announce_forgotten().await }));
            }
            tokio::select! {
                () = this.worker.shutdown.stop_taking() => {}
                () = tokio::time::sleep(PAUSE) => {}
            }
        }
        while probes.join_next().await.is_some() {}
    }

    /// One probe's opening. Nobody waits for it: a server that a send has the patience for is not given up sooner here.
    fn limit(&self) -> Duration {
        self.connector.longest_opening().min(self.worker.limits.attempt_timeout)
    }

    async fn due(&self, limit: usize) -> Result<Vec<DueProbe>, StoreError> {
        let limit = u32::try_from(limit).unwrap_or(0);
        if limit == 0 {
            return Ok(Vec::new());
        }
        let for_all = self.worker.limits.custom_smtp == CustomSmtp::All;
        let lacking: Vec<String> = self.lacking().iter().cloned().collect();
        self.worker.blames.configs.claim_probes(for_all, limit, self.limit() + GRACE, &lacking).await
    }

    fn lacking(&self) -> MutexGuard<'_, BTreeSet<String>> {
        self.lacking.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where the database does not answer, the probe is made again when its lease has ended.
    async fn probe(&self, probe: DueProbe) {
        let shutdown = &self.worker.shutdown;
        let cut_off = async {
            shutdown.stop_taking().await;
            let _ = tokio::time::timeout(LAST_PROBES, shutdown.stop_now()).await;
        };
        tokio::select! {
            found = self.find_out(&probe) => if let Err(error) = found {
                tracing::debug!(organization = %probe.organization, %error, "a probe's verdict could not be recorded");
            },
            () = cut_off => {
                let giving_back = self.worker.blames.configs.give_back_probe(&probe);
                let _ = tokio::time::timeout(GIVE_BACK_LIMIT, giving_back).await;
            }
        }
    }

    async fn find_out(&self, probe: &DueProbe) -> Result<(), StoreError> {
        let configs = &self.worker.blames.configs;
        let facts = configs.load_for_sending(&probe.organization).await?;
        let (Some(failing), true) = (facts.health.failing, facts.config_version() == Some(probe.version))
        else {
            return Ok(());
        };
        let found = match &facts.account {
            StoredAccount::Ready { account, .. } => return self.connect(probe, account, failing).await,
            StoredAccount::Unreadable { cause: Unreadable::UnknownKey { id }, .. } => {
                Found::Keyless(id.clone())
            }
            StoredAccount::Unreadable { .. } => {
                let reason = Reason::ConfigUnreadable;
                Found::Fails(reason, Some(advice::of_reason(reason).to_owned()), Pauses::after(reason))
            }
            StoredAccount::None => return Ok(()),
        };
        self.record(probe, found).await
    }

    async fn connect(
        &self,
        probe: &DueProbe,
        account: &SmtpAccount,
        failing: Reason,
    ) -> Result<(), StoreError> {
        let destination =
            Destination::Organization { id: probe.organization.clone(), version: probe.version };
        let opening = tokio::time::timeout(self.limit(), self.connector.open(&destination, account));
        let (session, found) = match opening.await {
            Ok(Ok(session)) => (Some(session), Found::Works),
            Ok(Err(failure)) => (None, judge(&failure, account, failing)),
            // A password may have been offered.
            Err(_) => (None, Found::Fails(failing, None, Pauses::after(failing))),
        };
        let recorded = self.record(probe, found).await;
        if let Some(session) = session {
            let _ = tokio::time::timeout(GOODBYE_LIMIT, session.quit()).await;
        }
        recorded
    }

    async fn record(&self, probe: &DueProbe, found: Found) -> Result<(), StoreError> {
        let DueProbe { organization, version } = probe;
        let configs = &self.worker.blames.configs;
        match found {
            Found::Keyless(id) => {
                tracing::debug!(%organization, key = id, "a probe is left to a worker that has its key");
                self.worker.key_missing.notify_one();
                self.lacking().insert(id);
                return configs.give_back_probe(probe).await;
            }
            Found::Works => {
                if configs.recovered(organization, *version).await? {
                    tracing::info!(%organization, version, "a configuration works again");
                }
            }
            Found::Fails(reason, hint, pauses) => {
                configs.probe_failed(probe, reason, hint.as_deref(), pauses).await?;
                tracing::info!(%organization, version, %reason, "a configuration still does not work");
            }
        }
        self.worker.blames.cache.invalidate(organization);
        Ok(())
    }

    async fn announce_forgotten(&self) {
        let Worker { blames, desk, .. } = &*self.worker;
        while !self.worker.shutdown.is_draining() {
            match blames.configs.take_unannounced().await {
                Ok(Some(trouble)) => blames.announce(desk, trouble).await,
                Ok(None) => return,
                Err(error) => {
                    return tracing::debug!(%error, "unannounced failures could not be looked for now");
                }
            }
        }
    }
}

/// What is no fault of the configuration leaves it failing for the reason that it failed for.
fn judge(failure: &Failure, account: &SmtpAccount, failing: Reason) -> Found {
    match health::accusation(policy::judge(failure)) {
        Some(reason) => {
            let hint = advice::hint(failure, ServerFacts::of(account));
            Found::Fails(reason, Some(hint), Pauses::after(reason))
        }
        None => Found::Fails(failing, None, Pauses::after_trouble(failing, failure.phase)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::address::Mailbox;
    use crate::model::failure::{Fault, Phase, Reply, TlsFault};
    use crate::model::smtp_settings::TlsMode;

    #[test]
    fn trouble_that_may_pass_leaves_the_reason_as_it_was() {
        let account = SmtpAccount {
            host: "smtp.example.org".into(),
            port: 587,
            tls: TlsMode::Required,
            credentials: None,
            from: Mailbox::parse("a@example.org").unwrap(),
        };
        let judged = |phase, fault| judge(&Failure::new(phase, fault), &account, Reason::AuthFailed);
        let reply = |code, text| Fault::Reply(Reply::new(code, [text]));
        for fault in [
            reply(454, "4.7.0 Temporary authentication failure"),
            reply(421, "4.7.0 Try again later"),
            Fault::Lost,
            Fault::Timeout,
        ] {
            let found = |pauses| Found::Fails(Reason::AuthFailed, None, pauses);
            assert_eq!(judged(Phase::Auth, fault.clone()), found(Pauses::Long));
            assert_eq!(judged(Phase::Greeting, fault), found(Pauses::Short));
        }
        let lookup = Fault::DnsFailed { detail: "no answer".into() };
        let passing = Found::Fails(Reason::AuthFailed, None, Pauses::Short);
        assert_eq!(judged(Phase::Resolve, lookup), passing);
        let Found::Fails(reason, Some(_), _) =
            judged(Phase::Tls, Fault::Tls { kind: TlsFault::Expired, detail: "expired".into() })
        else {
            panic!("a verdict")
        };
        assert_eq!(reason, Reason::TlsFailed);
        let Found::Fails(reason, Some(_), _) = judged(Phase::Connect, Fault::Timeout) else {
            panic!("a verdict")
        };
        assert_eq!(reason, Reason::ConnectTimeout);
    }
}
