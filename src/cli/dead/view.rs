//! A dead letter as JSON.
//! Guarantee: the contract's keys (section 7) are always there, and no address is.

use serde::Serialize;
use time::OffsetDateTime;
use uuid::Uuid;

use crate::model::address::mask_addresses;
use crate::model::failure::Reason;
use crate::model::letter::{Letter, LetterDeed, LetterId, LetterState, Owner};
use crate::model::organization::OrganizationId;

#[derive(Serialize)]
pub(super) struct LetterView<'a> {
    /// The job's id, or the letter's where the body told none.
    id: Uuid,
    /// `null`: the platform's, or where the body does not tell whose it is.
    organization_id: Option<&'a OrganizationId>,
    /// Tells these two apart.
    platform: bool,
    state: LetterState,
    reason: Reason,
    detail: Option<String>,
    attempts: u32,
    #[serde(with = "time::serde::rfc3339")]
    died_at: OffsetDateTime,
    letter: LetterId,
    kind: Option<String>,
    lane: Option<String>,
    routing_key: String,
    #[serde(with = "time::serde::rfc3339::option")]
    first_at: Option<OffsetDateTime>,
    #[serde(with = "time::serde::rfc3339")]
    archived_at: OffsetDateTime,
    #[serde(with = "time::serde::rfc3339::option")]
    expires_at: Option<OffsetDateTime>,
    deaths: u32,
    replays: u32,
    /// Positions that it is for; `null`: every recipient.
    recipients: Option<&'a [u16]>,
    /// Of the body.
    bytes: u32,
    history: &'a [LetterDeed],
}

/// `history`: the letter's own, or one that tells more.
pub(super) fn letter<'a>(letter: &'a Letter, history: &'a [LetterDeed]) -> LetterView<'a> {
    LetterView {
        id: letter.id(),
        organization_id: letter.key.as_ref().and_then(|key| key.organization.as_ref()),
        platform: letter.owner() == Owner::Platform,
        state: letter.state,
        reason: letter.reason,
        detail: letter.detail.as_deref().map(mask_addresses),
        attempts: letter.attempts,
        died_at: letter.died_at,
        letter: letter.letter,
        kind: letter.kind.as_deref().map(mask_addresses),
        lane: letter.lane.as_deref().map(mask_addresses),
        routing_key: mask_addresses(&letter.routing_key),
        first_at: letter.first_at,
        archived_at: letter.archived_at,
        expires_at: letter.expires_at,
        deaths: letter.deaths,
        replays: letter.replays,
        recipients: letter.recipients.as_deref(),
        bytes: letter.bytes,
        history,
    }
}
