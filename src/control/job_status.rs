//! `job.status`: what became of one job of an organization or of the platform, from the ledger or else from the archive.
//! Guarantee: a job is shown to the organization that it belongs to only; no address, subject or body.

use std::time::Duration;

use serde::Serialize;
use serde_json::{Value, json};
use time::OffsetDateTime;
use uuid::Uuid;

use super::error::{Code, ControlError};
use super::fields::required;
use super::{Call, Control, Done};
use crate::model::address::mask_addresses;
use crate::model::event::RefusedRecipient;
use crate::model::failure::Reason;
use crate::model::job::JobKey;
use crate::model::ledger::{AttemptRecord, JobStatus, State};
use crate::model::letter::{Letter, LetterId, LetterState, Owner};
use crate::model::organization::OrganizationId;
use crate::store::StoreError;

pub(super) const PARAMS: &[&str] = &["id"];

const ANSWER_LIMIT: Duration = Duration::from_secs(8);

/// The contract's answer (section 7), and what else is known.
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
    detail: Option<String>,
    refused: &'a [RefusedRecipient],
    #[serde(with = "time::serde::rfc3339::option")]
    first_at: Option<OffsetDateTime>,
    #[serde(with = "time::serde::rfc3339")]
    updated_at: OffsetDateTime,
    /// The archive's name for it, where only the archive knows the job.
    #[serde(skip_serializing_if = "Option::is_none")]
    letter: Option<LetterId>,
    /// There, whether it is the platform's: a letter's body may not tell whose it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    platform: Option<bool>,
}

impl Control {
    pub(super) async fn job_status(&self, call: &Call<'_>) -> Result<Done, ControlError> {
        let id = required("id", call.request.params.value("id", "must be a UUID")?)?;
        let key = JobKey { organization: call.request.organization.clone(), id };
        let asked = tokio::time::timeout(ANSWER_LIMIT, self.ask(&key));
        let answer = asked.await.map_err(|_| ControlError::unavailable())??;
        let unknown =
            || ControlError::new(Code::NotFound, "No such job of this organization is known").field("id");
        answer.map(Done::read).ok_or_else(unknown)
    }

    async fn ask(&self, key: &JobKey) -> Result<Option<Value>, StoreError> {
        if let Some(mut status) = self.store.job_status(key).await? {
            // As the command spells it.
            status.key.organization.clone_from(&key.organization);
            return Ok(Some(view(&status)));
        }
        let organization = key.organization.as_ref().map_or("", OrganizationId::as_str);
        let letters = self.store.letters_of(key.id, Some(organization)).await?;
        // A letter of that name may be somebody else's.
        let own = letters.into_iter().find(|letter| letter.key.as_ref() == Some(key));
        Ok(own.map(|letter| letter_view(&Letter { key: Some(key.clone()), ..letter })))
    }
}

/// A job as the ledger knows it, in the contract's JSON (section 7).
pub fn view(status: &JobStatus) -> Value {
    json!(View {
        id: status.key.id,
        organization_id: status.key.organization.as_ref(),
        state: status.state,
        reason: status.reason,
        attempts: status.attempts,
        next_attempt_at: status.next_attempt_at,
        message_id: status.message_id.as_deref(),
        reply: status.reply.as_deref(),
        history: &status.history,
        detail: status.detail.as_deref().map(mask_addresses),
        refused: &status.refused,
        first_at: Some(status.first_at),
        updated_at: status.updated_at,
        letter: None,
        platform: None,
    })
}

/// A job that the ledger does not know, as its newest dead letter tells of it, in the same JSON.
pub fn letter_view(letter: &Letter) -> Value {
    json!(View {
        id: letter.id(),
        organization_id: letter.key.as_ref().and_then(|key| key.organization.as_ref()),
        state: letter_state(letter.state),
        reason: Some(letter.reason),
        attempts: letter.attempts,
        next_attempt_at: None,
        message_id: None,
        reply: None,
        history: &[],
        detail: letter.detail.as_deref().map(mask_addresses),
        refused: &[],
        first_at: letter.first_at,
        updated_at: letter.died_at,
        letter: Some(letter.letter),
        platform: Some(letter.owner() == Owner::Platform),
    })
}

/// The job's state as a letter without a row in the ledger tells it.
fn letter_state(state: LetterState) -> State {
    match state {
        LetterState::Dead | LetterState::Discarded => State::Dead,
        LetterState::Parked => State::Parked,
        // A replay writes the ledger's row, and that is forgotten.
        LetterState::Replaying | LetterState::Replayed => State::Unknown,
    }
}
