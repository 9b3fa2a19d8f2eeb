//! The control commands (contract section 4): bytes in, a reply and events out. Knows nothing of the broker.
//! Guarantee: every command is answered, in time and with one of the contract's codes, and leaves a row in the audit
//! log; neither a reply, nor an event, nor that row holds a credential.

mod error;
mod feature_set;
mod fields;
mod job_cancel;
mod job_status;
mod request;
mod smtp_config_create;
mod smtp_config_delete;
mod smtp_config_get;
mod smtp_config_update;
mod smtp_params;

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use serde_json::Value;
use tokio::time::Instant;

pub use error::{Code, ControlError, Response};
pub use job_status::{letter_view as letter_status_json, view as job_status_json};

use crate::clock::Clock;
use crate::egress::{ApprovedAddr, Egress, EgressError, ServerHost};
use crate::model::event::{Event, What};
use crate::model::organization::OrganizationId;
use crate::store::{AuditEntry, OrganizationSettings, SmtpConfigs, Store};
use crate::telemetry;
use request::{Command, Request};

/// A reply comes within 10 s (contract section 4): by then a change is over, one way or the other.
const CHANGE_LIMIT: Duration = Duration::from_secs(9);
/// The last resort; the steps end before it.
const REPLY_LIMIT: Duration = Duration::from_millis(9800);
/// For the audit log there is always so much time.
const AUDIT_MIN: Duration = Duration::from_millis(600);
/// Looking up a host.
const LOOK_UP_LIMIT: Duration = Duration::from_millis(3500);

/// What the settings say about commands.
#[derive(Debug, Clone, Default)]
pub struct ControlRules {
    /// `delivery.custom_smtp = "all"`: no feature flag is asked for.
    pub custom_smtp_for_all: bool,
    /// `control.allowed_users`; empty allows every user.
    pub allowed_users: Vec<String>,
}

/// What the broker tells about a command beside its body.
#[derive(Debug, Clone, Default)]
pub struct CommandMeta {
    /// The AMQP property, which the broker has verified.
    pub user_id: Option<String>,
}

/// Carries out commands. Cheap to clone.
#[derive(Clone)]
pub struct Control {
    store: Store,
    configs: SmtpConfigs,
    egress: Arc<Egress>,
    clock: Clock,
    rules: Arc<ControlRules>,
}

/// A command that was carried out: its result, and what is to be announced.
struct Done {
    result: Value,
    events: Vec<Event>,
    /// Whether its audit row was written together with the change.
    audited: bool,
}

/// What every command's file is given.
struct Call<'a> {
    request: &'a Request,
    user_id: Option<&'a str>,
    /// Names of the parameters that were given, as far as they are known.
    given: Vec<&'static str>,
    /// When a change has to be over.
    by: Instant,
}

impl Control {
    /// Commands over this database, under these rules.
    pub fn new(
        store: Store,
        configs: SmtpConfigs,
        egress: Arc<Egress>,
        clock: Clock,
        rules: ControlRules,
    ) -> Self {
        Self { store, configs, egress, clock, rules: Arc::new(rules) }
    }

    /// Carries out one command and gives the reply, and the events to be published, which tell of what is committed.
    /// It neither fails nor panics.
    pub async fn handle(&self, body: &[u8], meta: CommandMeta) -> (Response, Vec<Event>) {
        let request = Request::read(body);
        let command = request.command.map_or("unknown", Command::as_str);
        let given =
            request.command.map(|command| request.params.given(params_of(command))).unwrap_or_default();
        let call = Call {
            request: &request,
            user_id: meta.user_id.as_deref(),
            given,
            by: Instant::now() + CHANGE_LIMIT,
        };
        let work = AssertUnwindSafe(tokio::time::timeout(REPLY_LIMIT, self.answer(&call))).catch_unwind();
        let outcome = match work.await {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(_elapsed)) => {
                tracing::error!(command, "a control command took too long");
                Err(ControlError::outcome_unknown())
            }
            // The panic's own message went to the log with its place.
            Err(_panic) => Err(ControlError::internal()),
        };
        match outcome {
            Ok(done) => (Response::new(command, Ok(done.result)), done.events),
            Err(error) => (Response::new(command, Err(error)), Vec::new()),
        }
    }

    async fn answer(&self, call: &Call<'_>) -> Result<Done, ControlError> {
        let outcome = if self.may_command(call.user_id) {
            self.carry_out(call).await
        } else {
            Err(ControlError::not_allowed())
        };
        match &outcome {
            Ok(Done { audited: true, .. }) => {}
            Ok(_) => self.audit(call, "ok").await,
            // Where the database is away there is no log to write to.
            Err(error) if error.code == Code::Unavailable => {}
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
            Command::FeatureSet => self.feature_set(call).await,
            Command::JobStatus => self.job_status(call).await,
            Command::JobCancel => self.job_cancel(call).await,
        }
    }

    /// For what changed nothing. The command's answer does not depend on it.
    async fn audit(&self, call: &Call<'_>, outcome: &str) {
        if call.request.command.is_none() {
            return;
        }
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

    fn event(&self, organization: &OrganizationId, what: What) -> Vec<Event> {
        vec![Event::of_organization(self.clock.now(), organization.clone(), what)]
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
        Self { result, events: Vec::new(), audited: false }
    }

    /// Of a change, with which its audit row was committed.
    fn changed(result: Value, events: Vec<Event>) -> Self {
        Self { result, events, audited: true }
    }
}

fn params_of(command: Command) -> &'static [&'static str] {
    match command {
        Command::SmtpConfigCreate => smtp_config_create::PARAMS,
        Command::SmtpConfigUpdate => smtp_config_update::PARAMS,
        Command::SmtpConfigGet | Command::SmtpConfigDelete => &[],
        Command::FeatureSet => feature_set::PARAMS,
        Command::JobStatus => job_status::PARAMS,
        Command::JobCancel => job_cancel::PARAMS,
    }
}
