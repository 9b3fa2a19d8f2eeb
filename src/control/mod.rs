//! The control commands (contract section 4): bytes in, a reply out, and what was changed announced.
//! Guarantee: every command is answered, in time and with one of the contract's codes, and leaves a row in the audit
//! log unless the database is away or the command ran out of its time, which the log tells; neither a reply, nor an
//! event, nor that row holds a credential.

mod announcing;
mod error;
mod examined;
mod feature_set;
mod fields;
mod job_cancel;
mod job_status;
mod request;
mod schema;
mod send_test_email;
mod smtp_config_create;
mod smtp_config_delete;
mod smtp_config_get;
mod smtp_config_test;
mod smtp_config_update;
mod smtp_params;
mod smtp_trouble;
mod testing;

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use serde_json::Value;
use tokio::sync::{Notify, Semaphore};
use tokio::time::Instant;

pub use announcing::Announcer;
pub use error::{Code, ControlError, Response};
pub use job_status::{letter_view as letter_status_json, view as job_status_json};
pub use schema::{SCHEMA_ID, command_names, command_schema};

use crate::broker::Publisher;
use crate::clock::Clock;
use crate::egress::{ApprovedAddr, Egress, EgressError, ServerHost};
use crate::model::organization::OrganizationId;
use crate::shutdown::Shutdown;
use crate::smtp::SmtpConnector;
use crate::store::{AuditEntry, OrganizationSettings, SmtpConfigs, Store};
use crate::telemetry;
use request::{Command, Request};

/// A reply comes within 10 s (contract section 4): by then a change is over, one way or the other.
const CHANGE_LIMIT: Duration = Duration::from_secs(9);
/// The last resorts; the steps end before them. A test is answered within 20 s, a test email within 60 s.
const REPLY_LIMIT: Duration = Duration::from_millis(9800);
const TEST_REPLY_LIMIT: Duration = Duration::from_millis(19_800);
const EMAIL_REPLY_LIMIT: Duration = Duration::from_millis(59_800);
/// Tests and test emails at once: they wait for strangers, and are not to take the place of commands that are quick.
const SLOW_COMMANDS: usize = 32;
/// Host names looked up at once by changes, and how long one may wait for its turn: with name servers that do not answer, they
/// are not to take every place either.
const LOOK_UPS: usize = 32;
const LOOK_UP_WAIT: Duration = Duration::from_secs(1);
/// For the audit log there is always so much time.
const AUDIT_MIN: Duration = Duration::from_millis(600);
/// Looking up a host.
const LOOK_UP_LIMIT: Duration = Duration::from_millis(3500);

/// What the settings say about commands.
#[derive(Debug, Clone)]
pub struct ControlRules {
    /// `delivery.custom_smtp = "all"`: no feature flag is asked for.
    pub custom_smtp_for_all: bool,
    /// `control.allowed_users`; empty allows every user.
    pub allowed_users: Vec<String>,
    /// `control.tests_per_minute`: tests and test emails of one organization.
    pub tests_per_minute: u32,
}

/// The settings' defaults.
impl Default for ControlRules {
    fn default() -> Self {
        Self { custom_smtp_for_all: false, allowed_users: Vec::new(), tests_per_minute: 10 }
    }
}

/// What the broker tells about a command beside its body.
#[derive(Debug, Clone, Default)]
pub struct CommandMeta {
    /// The AMQP property, which the broker has verified.
    pub user_id: Option<String>,
    /// How long it has waited in the worker: its reply is due so much earlier.
    pub waited: Duration,
}

/// Carries out commands. Cheap to clone.
#[derive(Clone)]
pub struct Control {
    store: Store,
    configs: SmtpConfigs,
    egress: Arc<Egress>,
    smtp: SmtpConnector,
    clock: Clock,
    rules: Arc<ControlRules>,
    slow: Arc<Semaphore>,
    look_ups: Arc<Semaphore>,
    changed: Arc<Notify>,
}

/// A command that was carried out.
struct Done {
    result: Value,
    /// Whether it has changed something: then its audit row was written together with the change, and so was what is to be
    /// announced.
    changed: bool,
}

/// What every command's file is given.
struct Call<'a> {
    request: &'a Request,
    user_id: Option<&'a str>,
    /// Names of the parameters that were given, as far as they are known.
    given: Vec<&'static str>,
    /// When it came to the worker.
    began: Instant,
    /// When a change has to be over.
    by: Instant,
}

impl Control {
    /// Commands over this database, under these rules; hosts are judged by the connector's egress.
    pub fn new(
        store: Store,
        configs: SmtpConfigs,
        smtp: SmtpConnector,
        clock: Clock,
        rules: ControlRules,
    ) -> Self {
        let (egress, slow) = (smtp.egress(), Arc::new(Semaphore::new(SLOW_COMMANDS)));
        let look_ups = Arc::new(Semaphore::new(LOOK_UPS));
        let (rules, changed) = (Arc::new(rules), Arc::default());
        Self { store, configs, egress, smtp, clock, rules, slow, look_ups, changed }
    }

    /// What announces the changes, these commands' and what other workers leave. One for each worker.
    pub fn announcer(&self, publisher: Publisher, shutdown: Shutdown) -> Announcer {
        Announcer { store: self.store.clone(), publisher, changed: self.changed.clone(), shutdown }
    }

    /// Carries out one command and gives the reply. It neither fails nor panics.
    pub async fn handle(&self, body: &[u8], meta: CommandMeta) -> Response {
        let request = Request::read(body);
        let command = request.command.map_or("unknown", Command::as_str);
        let given =
            request.command.map(|command| request.params.given(params_of(command))).unwrap_or_default();
        let now = Instant::now();
        let began = now.checked_sub(meta.waited).unwrap_or(now);
        let call = Call {
            request: &request,
            user_id: meta.user_id.as_deref(),
            given,
            began,
            by: began + CHANGE_LIMIT,
        };
        let limit = reply_limit(request.command);
        let work = tokio::time::timeout_at(began + limit, self.answer(&call));
        let outcome = work.await.unwrap_or_else(|_elapsed| {
            tracing::error!(command, "a control command took too long");
            Err(overdue(request.command))
        });
        if matches!(outcome, Ok(Done { changed: true, .. })) {
            self.changed.notify_one();
        }
        Response::new(command, outcome.map(|done| done.result))
    }

    async fn answer(&self, call: &Call<'_>) -> Result<Done, ControlError> {
        let outcome = unless_it_panics(async {
            if self.may_command(call.user_id) {
                self.carry_out(call).await
            } else {
                Err(ControlError::not_allowed())
            }
        })
        .await;
        match &outcome {
            Ok(Done { changed: true, .. }) => {}
            Ok(_) => self.audit(call, "ok").await,
            Err(error) if error.is_without_log() => {}
            // What is no command changes nothing; who may give none is on record all the same.
            Err(error) if call.request.command.is_none() && error.code != Code::NotAllowed => {}
            Err(error) => self.audit(call, error.code.as_str()).await,
        }
        outcome
    }

    fn may_command(&self, user_id: Option<&str>) -> bool {
        let allowed = &self.rules.allowed_users;
        allowed.is_empty() || user_id.is_some_and(|user| allowed.iter().any(|name| name == user))
    }

    async fn carry_out(&self, call: &Call<'_>) -> Result<Done, ControlError> {
        if let Some(fault) = &call.request.fault {
            return Err(fault.clone());
        }
        let command = call.request.command.ok_or_else(ControlError::internal)?;
        call.request.params.check_known(params_of(command))?;
        match command {
            Command::SmtpConfigCreate => self.smtp_config_create(call).await,
            Command::SmtpConfigGet => self.smtp_config_get(call).await,
            Command::SmtpConfigUpdate => self.smtp_config_update(call).await,
            Command::SmtpConfigDelete => self.smtp_config_delete(call).await,
            Command::SmtpConfigTest => self.smtp_config_test(call).await,
            Command::SendTestEmail => self.send_test_email(call).await,
            Command::FeatureSet => self.feature_set(call).await,
            Command::JobStatus => self.job_status(call).await,
            Command::JobCancel => self.job_cancel(call).await,
        }
    }

    /// For what changed nothing. The command's answer does not depend on it.
    async fn audit(&self, call: &Call<'_>, outcome: &str) {
        // Many commands at once wait for the same sessions, and a refusal is not to be missing for that.
        let limit = call.by.saturating_duration_since(Instant::now()).max(AUDIT_MIN);
        if let Err(error) = self.store.record_audit(call.audit(outcome), limit).await {
            tracing::warn!(%error, outcome, "a control command is missing in the audit log");
        }
    }

    fn check_enabled(&self, settings: &OrganizationSettings) -> Result<(), ControlError> {
        if settings.custom_smtp || self.rules.custom_smtp_for_all {
            Ok(())
        } else {
            Err(ControlError::feature_disabled())
        }
    }

    /// Judges port, host and every address of it, as each later connection will again.
    async fn check_server(&self, host: &ServerHost, port: u16) -> Result<(), ControlError> {
        let Ok(Ok(_turn)) = tokio::time::timeout(LOOK_UP_WAIT, self.look_ups.acquire()).await else {
            return Err(ControlError::too_many_look_ups());
        };
        let approved: Result<Vec<ApprovedAddr>, EgressError> =
            match tokio::time::timeout(LOOK_UP_LIMIT, self.egress.approve(host, port)).await {
                Ok(approved) => approved,
                Err(_) => {
                    let detail = format!("no answer within {LOOK_UP_LIMIT:?}");
                    Err(EgressError::DnsFailed { detail })
                }
            };
        approved.map(|_| ()).map_err(|error| {
            if let Some(rule) = error.rule() {
                telemetry::egress_refused(rule);
            }
            ControlError::from(error)
        })
    }
}

impl Call<'_> {
    /// The organization; the request has been checked to name one where the command needs it.
    fn organization(&self) -> Result<&OrganizationId, ControlError> {
        fields::required("organization_id", self.request.organization.as_ref())
    }

    fn audit<'b>(&'b self, outcome: &'b str) -> AuditEntry<'b> {
        AuditEntry {
            actor: self.request.actor.as_deref(),
            user_id: self.user_id,
            organization: self.request.organization.as_ref(),
            command: self.request.command.map_or("unknown", Command::as_str),
            outcome,
            fields: &self.given,
        }
    }
}

impl Done {
    /// Of a command that changed nothing.
    fn read(result: Value) -> Self {
        Self { result, changed: false }
    }

    /// Of a change, with which its audit row was committed.
    fn changed(result: Value) -> Self {
        Self { result, changed: true }
    }
}

fn params_of(command: Command) -> &'static [&'static str] {
    match command {
        Command::SmtpConfigCreate => smtp_config_create::PARAMS,
        Command::SmtpConfigUpdate => smtp_config_update::PARAMS,
        Command::SmtpConfigTest => smtp_config_test::PARAMS,
        Command::SendTestEmail => send_test_email::PARAMS,
        Command::SmtpConfigGet | Command::SmtpConfigDelete => &[],
        Command::FeatureSet => feature_set::PARAMS,
        Command::JobStatus => job_status::PARAMS,
        Command::JobCancel => job_cancel::PARAMS,
    }
}

fn reply_limit(command: Option<Command>) -> Duration {
    match command {
        Some(Command::SmtpConfigTest) => TEST_REPLY_LIMIT,
        Some(Command::SendTestEmail) => EMAIL_REPLY_LIMIT,
        _ => REPLY_LIMIT,
    }
}

/// A panic's own message goes to the log with its place, and to nobody else.
async fn unless_it_panics(
    work: impl Future<Output = Result<Done, ControlError>>,
) -> Result<Done, ControlError> {
    AssertUnwindSafe(work).catch_unwind().await.unwrap_or_else(|_panic| Err(ControlError::internal()))
}

/// The answer to a command that ran out of its time.
fn overdue(command: Option<Command>) -> ControlError {
    let message = match command {
        Some(Command::SmtpConfigTest) => "The test did not end in time",
        Some(Command::SendTestEmail) => "It is not known whether the test email was sent: this took too long",
        _ => return ControlError::outcome_unknown(),
    };
    ControlError::new(Code::Internal, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_panic_is_an_internal_error_that_says_nothing_of_it() {
        let outcome = unless_it_panics(async { panic!("with a password") }).await;
        let error = outcome.err().expect("an error");
        assert_eq!(error.code, Code::Internal);
        assert!(!format!("{error:?}").contains("password"), "{error:?}");
    }
}
