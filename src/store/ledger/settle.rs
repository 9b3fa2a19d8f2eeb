//! Settles, in batches: what became of the claimed jobs.
//! Guarantee: only the claim's owner changes the row, and a settle that is repeated after a lost answer is recognised.

use std::collections::HashSet;
use std::sync::Arc;

use sqlx::PgConnection;

use super::super::batch::Work;
use super::super::{Store, StoreError};
use super::grants::{Grants, Token};
use super::{RowKey, organization_text, row_key, stored_count, without_nul};
use crate::model::failure::Reason;
use crate::model::ledger::{AttemptRecord, Settle, SettleAnswer, Settlement, State};

/// The lateral subselect locks the rows one by one in the order of the arrays. A row that is already as the settle would
/// leave it, under the same owner, was written by this very settle: nobody else settles in that owner's name; and a job
/// that was called back since keeps the owner and the turn that this settle left. What a dead owner left behind (`orphan`)
/// outlives a release, in which nothing was tried.
const SETTLE: &str = "
WITH locked AS MATERIALIZED (
    SELECT a.*, j.state AS row_state, j.owner AS row_owner, j.turn AS row_turn
    FROM unnest($1::text[], $2::uuid[], $3::int[], $4::int[], $5::text[], $6::int[], $7::bigint[], $8::text[],
            $9::text[], $10::int[], $11::int[], $12::text[], $13::text[], $14::text[], $15::bool[], $16::text[],
            $17::text[], $18::bool[], $19::int[])
        WITH ORDINALITY AS a (organization_id, id, owner, turn, state, next_turn, wait_ms, reason,
            detail, attempts, unknowns, message_id, pending, refused, partly_sent, reply, attempt, released, spared, position)
    CROSS JOIN LATERAL (
        SELECT state, owner, turn FROM jobs
        WHERE jobs.id = a.id AND jobs.organization_id = a.organization_id
        FOR NO KEY UPDATE
    ) AS j
), changed AS (
    UPDATE jobs SET
        state = s.state,
        turn = s.next_turn,
        not_before = now() + s.wait_ms * interval '1 millisecond',
        reason = CASE WHEN s.released THEN jobs.reason ELSE s.reason END,
        detail = CASE WHEN s.released THEN jobs.detail ELSE s.detail END,
        attempts = s.attempts,
        spared = s.spared,
        unknowns = s.unknowns,
        message_id = s.message_id,
        pending = s.pending::int[],
        refused = s.refused::jsonb,
        partly_sent = jobs.partly_sent OR s.partly_sent,
        reply = coalesce(s.reply, jobs.reply),
        committing = false,
        orphan = CASE WHEN s.released THEN jobs.orphan END,
        updated_at = now(),
        history = CASE
            WHEN s.attempt IS NULL THEN jobs.history
            WHEN jsonb_array_length(jobs.history) >= 20 THEN (jobs.history - 0) || s.attempt::jsonb
            ELSE coalesce(jobs.history, '[]') || s.attempt::jsonb
        END
    FROM locked AS s
    WHERE jobs.id = s.id AND jobs.organization_id = s.organization_id
        AND s.row_state = 'claimed' AND s.row_owner = s.owner AND s.row_turn = s.turn
    RETURNING s.position
)
SELECT position FROM changed
UNION ALL
SELECT position FROM locked
WHERE row_owner = owner AND row_turn = next_turn
    AND (row_state = state OR row_state = 'cancelled' AND state <> 'sent')";

pub(super) struct SettleRequest {
    pub(super) settle: Settle,
    pub(super) token: Option<Token>,
}

pub(super) struct Settles {
    pub(super) store: Store,
    pub(super) grants: Arc<Grants>,
}

impl Work for Settles {
    type Key = RowKey;
    type Request = SettleRequest;
    type Answer = SettleAnswer;
    /// It tells what has happened, whoever still listens.
    const SKIP_ABANDONED: bool = false;

    fn key(request: &SettleRequest) -> RowKey {
        row_key(&request.settle.key)
    }

    async fn run(&self, requests: &[&SettleRequest]) -> Result<Vec<Option<SettleAnswer>>, StoreError> {
        let settles: Vec<&Settle> = requests.iter().map(|request| &request.settle).collect();
        let recorded = self.store.on_session(async |session| settle(session, &settles).await).await?;
        let answers = requests.iter().enumerate().map(|(position, request)| {
            self.grants.end(&request.settle.key, request.token);
            Some(match recorded.contains(&position) {
                true => SettleAnswer::Recorded,
                false => SettleAnswer::NotOwner,
            })
        });
        Ok(answers.collect())
    }

    fn undelivered(&self, _: SettleRequest, _: SettleAnswer) {}
}

/// What a settlement writes, in the table's terms.
struct Outcome<'a> {
    state: State,
    hand_over: bool,
    wait_ms: Option<i64>,
    reason: Option<&'static str>,
    detail: Option<&'a str>,
}

fn outcome(settlement: &Settlement) -> Outcome<'_> {
    let plain = Outcome { state: State::Sent, hand_over: false, wait_ms: None, reason: None, detail: None };
    match settlement {
        Settlement::Sent => plain,
        Settlement::Deferred { reason, wait } => Outcome {
            state: State::Deferred,
            hand_over: true,
            wait_ms: Some(i64::try_from(wait.as_millis()).unwrap_or(i64::MAX)),
            reason: Some(reason.as_str()),
            ..plain
        },
        Settlement::Dead { reason, detail } => Outcome {
            state: if *reason == Reason::Cancelled { State::Cancelled } else { State::Dead },
            hand_over: true,
            reason: Some(reason.as_str()),
            detail: Some(detail),
            ..plain
        },
        Settlement::Parked { reason, detail } => Outcome {
            state: State::Parked,
            hand_over: true,
            reason: Some(reason.as_str()),
            detail: Some(detail),
            ..plain
        },
        Settlement::Released => Outcome { state: State::Deferred, wait_ms: Some(0), ..plain },
    }
}

/// The positions of the settles that are recorded.
async fn settle(session: &mut PgConnection, settles: &[&Settle]) -> Result<HashSet<usize>, sqlx::Error> {
    let outcomes: Vec<Outcome<'_>> = settles.iter().map(|settle| outcome(&settle.outcome)).collect();
    let next_turn =
        settles.iter().zip(&outcomes).map(|(s, o)| if o.hand_over { s.turn.next().0 } else { s.turn.0 });
    let positions: Vec<i64> = sqlx::query_scalar(SETTLE)
        .bind(settles.iter().map(|s| organization_text(&s.key)).collect::<Vec<_>>())
        .bind(settles.iter().map(|s| s.key.id).collect::<Vec<_>>())
        .bind(settles.iter().map(|s| s.owner.0).collect::<Vec<_>>())
        .bind(settles.iter().map(|s| s.turn.0).collect::<Vec<_>>())
        .bind(outcomes.iter().map(|o| o.state.as_str()).collect::<Vec<_>>())
        .bind(next_turn.collect::<Vec<_>>())
        .bind(outcomes.iter().map(|o| o.wait_ms).collect::<Vec<_>>())
        .bind(outcomes.iter().map(|o| o.reason).collect::<Vec<_>>())
        .bind(outcomes.iter().map(|o| o.detail.map(clean)).collect::<Vec<_>>())
        .bind(settles.iter().map(|s| stored_count(s.attempts)).collect::<Vec<_>>())
        .bind(settles.iter().map(|s| stored_count(s.unknowns)).collect::<Vec<_>>())
        .bind(settles.iter().map(|s| without_nul(&s.message_id)).collect::<Vec<_>>())
        .bind(settles.iter().map(|s| s.pending.as_deref().map(array_literal)).collect::<Vec<_>>())
        .bind(settles.iter().map(|s| refused_json(s)).collect::<Result<Vec<_>, _>>()?)
        .bind(settles.iter().map(|s| s.partly_sent).collect::<Vec<_>>())
        .bind(settles.iter().map(|s| s.reply.as_deref().map(clean)).collect::<Vec<_>>())
        .bind(settles.iter().map(|s| attempt_json(s)).collect::<Result<Vec<_>, _>>()?)
        .bind(settles.iter().map(|s| matches!(s.outcome, Settlement::Released)).collect::<Vec<_>>())
        .bind(settles.iter().map(|s| stored_count(s.spared)).collect::<Vec<_>>())
        .fetch_all(session)
        .await?;
    positions.into_iter().map(position_in).collect()
}

/// Ordinality counts from one.
fn position_in(ordinal: i64) -> Result<usize, sqlx::Error> {
    usize::try_from(ordinal - 1).map_err(|error| sqlx::Error::Decode(error.into()))
}

fn clean(text: &str) -> String {
    without_nul(text).into_owned()
}

/// As PostgreSQL spells an array: arrays of arrays cannot be unnested one level deep.
pub(in crate::store) fn array_literal(positions: &[u16]) -> String {
    let positions: Vec<String> = positions.iter().map(u16::to_string).collect();
    format!("{{{}}}", positions.join(","))
}

fn refused_json(settle: &Settle) -> Result<Option<String>, sqlx::Error> {
    if settle.refused.is_empty() { Ok(None) } else { json(&settle.refused).map(Some) }
}

fn attempt_json(settle: &Settle) -> Result<Option<String>, sqlx::Error> {
    let Some(attempt) = &settle.attempt else { return Ok(None) };
    let attempt = AttemptRecord {
        transport: clean(&attempt.transport),
        address: attempt.address.as_deref().map(clean),
        reply: attempt.reply.as_deref().map(clean),
        ..attempt.clone()
    };
    json(&attempt).map(Some)
}

fn json(value: &impl serde::Serialize) -> Result<String, sqlx::Error> {
    serde_json::to_string(value).map_err(|error| sqlx::Error::Encode(error.into()))
}
