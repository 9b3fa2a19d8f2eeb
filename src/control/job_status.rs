//! `job.status`: the ledger's answer about one job of an organization, or of the platform.
//! Guarantee: a job is shown to the organization that it belongs to only; no address, subject or body.

use std::time::Duration;

use serde::Serialize;
use serde_json::json;
use time::OffsetDateTime;
use uuid::Uuid;

use super::error::{Code, ControlError};
use super::fields::required;
use super::{Call, Control, Done};
use crate::model::failure::Reason;
use crate::model::job::JobKey;
use crate::model::ledger::{AttemptRecord, JobStatus, State};
use crate::model::organization::OrganizationId;

pub(super) const PARAMS: &[&str] = &["id"];

const ANSWER_LIMIT: Duration = Duration::from_secs(8);

/// The contract's answer (section 7).
#[derive(Serialize)]
struct View<'a> {
    id: Uuid,
    organization_id: Option<&'a OrganizationId>,
    state: State,
    reason: Option<Reason>,
    attempts: u32,
    #[serde(with = "time::serde::rfc3339::option")]
    next_attempt_at: Option<OffsetDateTime>,
    message_id: Option<&'a str>,
    reply: Option<&'a str>,
    history: &'a [AttemptRecord],
}

impl Control {
    pub(super) async fn job_status(&self, call: &Call<'_>) -> Result<Done, ControlError> {
        let id = required("id", call.request.params.value("id", "must be a UUID")?)?;
        let key = JobKey { organization: call.request.organization.clone(), id };
        let asked = tokio::time::timeout(ANSWER_LIMIT, self.store.job_status(&key));
        let status = asked.await.map_err(|_| ControlError::unavailable())??;
        let unknown = || {
            ControlError::new(Code::NotFound, "The ledger knows no such job of this organization").field("id")
        };
        Ok(Done::read(view(&key, &status.ok_or_else(unknown)?)))
    }
}

/// A job as the contract's JSON (section 7) tells it.
pub fn view(key: &JobKey, status: &JobStatus) -> serde_json::Value {
    json!(View {
        id: key.id,
        organization_id: key.organization.as_ref(),
        state: status.state,
        reason: status.reason,
        attempts: status.attempts,
        next_attempt_at: status.next_attempt_at,
        message_id: status.message_id.as_deref(),
        reply: status.reply.as_deref(),
        history: &status.history,
    })
}
