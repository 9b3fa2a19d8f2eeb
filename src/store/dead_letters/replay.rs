//! Letters looked at for a replay, oldest first, and marked once it or a release is through; letters discarded.
//! Guarantee: looking locks and changes nothing; a mark changes only a row that is still as the replay or the discard left
//! or found it.

use std::collections::HashSet;

use sqlx::Row;
use sqlx::postgres::PgRow;
use sqlx::types::Json;
use time::OffsetDateTime;
use uuid::Uuid;

use super::letter_columns;
use super::search::{Question, bind_filter, filtered, place, understood};
use crate::model::event::RefusedRecipient;
use crate::model::failure::Reason;
use crate::model::ledger::{State, Turn};
use crate::model::letter::{HISTORY_MAX, Letter, LetterFilter, LetterId, Place};
use crate::model::replay::{Booking, LedgerView};
use crate::store::incarnation::LOCK_CLASS;
use crate::store::ledger::count;
use crate::store::{Store, StoreError};

/// What the ledger knows, of the row `j`, about the letter `d`; `g` is its booking.
macro_rules! ledger_columns {
    ($lock_class:literal) => {
        concat!(
            "j.state AS job_state, j.turn AS job_turn, j.unknowns AS job_unknowns, j.reason AS job_reason,
    j.pending AS job_pending, j.refused AS job_refused, j.attempts AS job_attempts, j.replayed_at AS job_replayed_at,
    j.detail AS job_detail, j.partly_sent AS job_partly_sent, j.message_id AS job_message_id,
    j.history -> -1 ->> 'transport' AS job_transport,
    (j.body_hash IS NULL OR j.body_hash = d.body_hash) AS same_body, j.cancel_requested AS job_cancel_requested,
    g.sequence AS newest_sequence, g.cancelled AS cancelled_sequence,
    CASE WHEN j.state = 'claimed' THEN EXISTS (
        SELECT FROM pg_locks WHERE locktype = 'advisory' AND granted
            AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
            AND classid = ",
            $lock_class,
            "::int::oid AND objid = j.owner::oid AND objsubid = 2
    ) ELSE false END AS owner_lives"
        )
    };
}

pub(super) use ledger_columns;

/// `$12` and `$13` are the last letter of the page before. What was replayed at `$14` or later and died again stands at the
/// end of the row once more, and is not drawn again.
macro_rules! behind {
    () => {
        " AND ($12::timestamptz IS NULL OR (died_at, letter) > ($12, $13::uuid))
     AND ($14::timestamptz IS NULL OR NOT coalesce(state = 'dead' AND history -> -1 ->> 'what' = 'replay'
        AND (history -> -1 ->> 'at')::timestamptz >= $14, false))"
    };
}

const EXAMINE: &str = concat!(
    "WITH d AS MATERIALIZED (
    SELECT ",
    letter_columns!(),
    " FROM dead_letters WHERE ",
    filtered!(),
    behind!(),
    " ORDER BY died_at, letter LIMIT $15
)
SELECT d.*, ",
    ledger_columns!("$16"),
    "
FROM d
LEFT JOIN jobs AS j ON j.id = d.job_id AND j.organization_id = d.organization_id
LEFT JOIN job_groups AS g ON g.organization_id = d.organization_id AND g.name = d.group_name
ORDER BY d.died_at, d.letter"
);

const COUNT: &str = concat!("SELECT count(*) FROM dead_letters WHERE ", filtered!(), behind!());

const MARK_REPLAYED: &str = "
WITH locked AS MATERIALIZED (
    SELECT d.letter FROM dead_letters AS d JOIN unnest($1::uuid[], $2::int[]) AS a (letter, turn) ON a.letter = d.letter
    WHERE (d.state = 'replaying' OR d.state = 'parked' AND d.replay_turn > d.turn) AND d.replay_turn = a.turn
    ORDER BY d.letter FOR UPDATE OF d
)
UPDATE dead_letters AS d SET state = 'replayed' FROM locked WHERE d.letter = locked.letter";

const DISCARD: &str = "
WITH locked AS MATERIALIZED (
    SELECT d.letter FROM dead_letters AS d WHERE d.letter = ANY ($1) AND d.state = 'dead'
    ORDER BY d.letter FOR UPDATE SKIP LOCKED
)
UPDATE dead_letters AS d SET state = 'discarded', history = CASE
        WHEN jsonb_array_length(d.history) >= $3 THEN (d.history - 0) || deed.entry ELSE d.history || deed.entry END
FROM locked, (SELECT jsonb_build_object('what', 'discard', 'at',
        to_char(now() AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"'), 'by', $2::text) AS entry) AS deed
WHERE d.letter = locked.letter
RETURNING d.letter";

/// A letter, with what the ledger knows of its job.
#[derive(Debug, Clone)]
pub struct Examined {
    /// The letter.
    pub letter: Letter,
    /// Its job's row; none where there is no such row, or the body told no job.
    pub ledger: Option<LedgerView>,
    /// Its booking.
    pub booking: Booking,
}

/// Letters in a row, oldest death first.
#[derive(Debug, Clone)]
pub struct Page {
    /// The letters.
    pub letters: Vec<Examined>,
    /// Where it ends; `None` when nothing is behind it.
    pub last: Option<Place>,
}

impl Store {
    /// The oldest letters of a filter behind a place, at most `limit`, with what the ledger knows of them; but for those that
    /// were replayed at `began` (the database's time) or later and died again. A row that this program does not understand
    /// is left out and logged.
    ///
    /// # Errors
    /// When the database did not answer.
    pub async fn examine_letters(
        &self,
        filter: &LetterFilter,
        after: Option<Place>,
        began: Option<OffsetDateTime>,
        limit: u32,
    ) -> Result<Page, StoreError> {
        let question =
            behind(sqlx::query(EXAMINE), filter, after, began).bind(i64::from(limit)).bind(LOCK_CLASS);
        let rows = self.on_session(async |session| question.fetch_all(session).await).await?;
        let mut letters = Vec::with_capacity(rows.len());
        for row in &rows {
            if let Some(letter) = understood(row)? {
                let ledger = ledger_of(row)?.map(|job| job.view);
                letters.push(Examined { letter, ledger, booking: booking_of(row)? });
            }
        }
        let last = rows.last().filter(|_| rows.len() == limit as usize).map(place).transpose()?;
        Ok(Page { letters, last })
    }

    /// The database's time, which histories are written in.
    ///
    /// # Errors
    /// When the database did not answer.
    pub async fn database_time(&self) -> Result<OffsetDateTime, StoreError> {
        self.on_session(async |session| sqlx::query_scalar("SELECT now()").fetch_one(session).await).await
    }

    /// How many letters of a filter there are behind a place, counted like those of [`Store::examine_letters`].
    ///
    /// # Errors
    /// When the database did not answer.
    pub async fn count_letters(
        &self,
        filter: &LetterFilter,
        after: Option<Place>,
        began: Option<OffsetDateTime>,
    ) -> Result<u64, StoreError> {
        let question = behind(sqlx::query(COUNT), filter, after, began);
        let row = self.on_session(async |session| question.fetch_one(session).await).await?;
        Ok(row.try_get::<i64, _>(0)?.unsigned_abs())
    }

    /// The copies of these replays and releases are on the broker. A letter that has died, or was parked, again meanwhile
    /// stays as it is.
    ///
    /// # Errors
    /// When the database did not answer; it may be repeated.
    pub async fn mark_replayed(&self, copies: &[(LetterId, Turn)]) -> Result<(), StoreError> {
        let (letters, turns): (Vec<Uuid>, Vec<i32>) =
            copies.iter().map(|(letter, turn)| (letter.0, turn.0)).unzip();
        let question = sqlx::query(MARK_REPLAYED).bind(letters).bind(turns);
        self.on_session(async |session| question.execute(session).await).await.map(drop)
    }

    /// Gives up those of these letters that are dead, and says which these were.
    ///
    /// # Errors
    /// When the database did not answer.
    pub async fn discard_letters(
        &self,
        letters: &[LetterId],
        actor: &str,
    ) -> Result<HashSet<LetterId>, StoreError> {
        let max = i32::try_from(HISTORY_MAX).unwrap_or(i32::MAX);
        let question = sqlx::query_scalar(DISCARD)
            .bind(letters.iter().map(|letter| letter.0).collect::<Vec<_>>())
            .bind(actor)
            .bind(max);
        let discarded: Vec<Uuid> = self.on_session(async |session| question.fetch_all(session).await).await?;
        Ok(discarded.into_iter().map(LetterId).collect())
    }
}

fn behind<'q>(
    question: Question<'q>,
    filter: &LetterFilter,
    after: Option<Place>,
    began: Option<OffsetDateTime>,
) -> Question<'q> {
    bind_filter(question, filter)
        .bind(after.map(|(died_at, _)| died_at))
        .bind(after.map(|(_, LetterId(letter))| letter))
        .bind(began)
}

/// A job's row.
pub(super) struct Job {
    pub(super) view: LedgerView,
    pub(super) attempts: u32,
    pub(super) replayed_at: Option<OffsetDateTime>,
    pub(super) detail: Option<String>,
    pub(super) partly_sent: bool,
    pub(super) message_id: Option<String>,
    /// `organization` or `platform`: of the last attempt on record.
    pub(super) transport: Option<String>,
}

/// A row with [`ledger_columns`]; none where the ledger has none.
pub(super) fn ledger_of(row: &PgRow) -> Result<Option<Job>, sqlx::Error> {
    let Some(state) = row.try_get::<Option<&str>, _>("job_state")? else { return Ok(None) };
    let state = State::from_name(state)
        .ok_or_else(|| sqlx::Error::Decode(format!("a job's state is `{state}`, which none is").into()))?;
    let pending: Option<Vec<i32>> = row.try_get("job_pending")?;
    let refused: Option<Json<Vec<RefusedRecipient>>> = row.try_get("job_refused")?;
    let view = LedgerView {
        state,
        turn: Turn(row.try_get("job_turn")?),
        owner_lives: row.try_get("owner_lives")?,
        unknowns: count(row.try_get("job_unknowns")?),
        reason: row.try_get::<Option<&str>, _>("job_reason")?.and_then(Reason::from_name),
        pending: pending.map(|all| all.into_iter().filter_map(|index| u16::try_from(index).ok()).collect()),
        refused: refused.map(|Json(refused)| refused).unwrap_or_default(),
        same_body: row.try_get("same_body")?,
        cancel_requested: row.try_get("job_cancel_requested")?,
    };
    let attempts = count(row.try_get("job_attempts")?);
    Ok(Some(Job {
        view,
        attempts,
        replayed_at: row.try_get("job_replayed_at")?,
        detail: row.try_get("job_detail")?,
        partly_sent: row.try_get("job_partly_sent")?,
        message_id: row.try_get("job_message_id")?,
        transport: row.try_get("job_transport")?,
    }))
}

/// The same row's booking.
pub(super) fn booking_of(row: &PgRow) -> Result<Booking, sqlx::Error> {
    Ok(Booking { newest: row.try_get("newest_sequence")?, cancelled: row.try_get("cancelled_sequence")? })
}
