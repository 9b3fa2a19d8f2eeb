//! A replay recorded: in the ledger, and in the letter.
//! Guarantee: a letter is taken in one transaction that holds its row and its job's: what is decided under these locks is
//! what both rows say afterwards, and a copy may be published once it has committed.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::Duration;

use sqlx::{Acquire, PgConnection, Row};
use time::OffsetDateTime;
use uuid::Uuid;

use super::replay::{Job, booking_of, ledger_columns, ledger_of};
use super::{letter_columns, read_letter};
use crate::model::event::RefusedRecipient;
use crate::model::job::JobKey;
use crate::model::ledger::{State, Turn};
use crate::model::letter::{Deed, HISTORY_MAX, Letter, LetterDeed, LetterId, LetterState};
use crate::model::replay::{self, Booking, Replay, ReplayRules, Skip};
use crate::store::incarnation::LOCK_CLASS;
use crate::store::ledger::{array_literal, organization_text, stored_count};
use crate::store::{Store, StoreError};

/// Two who lock the same rows in another order: a worker that claims a job which the ledger does not know yet, and a replay
/// that enters it.
const DEADLOCK_TRIES: usize = 3;

/// Whoever locks letters does so before their jobs, and in this order. One that another run has in hand is left to it.
const LOCK_LETTERS: &str = concat!(
    "SELECT ",
    letter_columns!(),
    " FROM dead_letters AS d WHERE d.letter = ANY ($1) ORDER BY d.letter FOR UPDATE SKIP LOCKED"
);

/// The lateral subselect locks the rows one by one in the order of the arrays.
const LOCK_JOBS: &str = concat!(
    "SELECT d.letter, ",
    ledger_columns!("$6"),
    "
FROM unnest($1::uuid[], $2::uuid[], $3::text[], $4::bytea[], $5::text[])
    AS d (letter, job_id, organization_id, body_hash, group_name)
CROSS JOIN LATERAL (
    SELECT * FROM jobs WHERE jobs.id = d.job_id AND jobs.organization_id = d.organization_id FOR NO KEY UPDATE
) AS j
LEFT JOIN job_groups AS g ON g.organization_id = d.organization_id AND g.name = d.group_name"
);

/// Owner 0 is a program that has gone: whoever meets an older copy repeats the hand-over.
const HAND_OVER: &str = "
UPDATE jobs SET state = 'deferred', turn = a.turn, owner = 0, not_before = now(), replayed_at = now(),
    spared = jobs.attempts, unknowns = 0, crashes = 0, committing = false, orphan = NULL, reason = NULL, detail = NULL,
    parked_reason = NULL,
    pending = a.pending::int[], refused = a.refused::jsonb, updated_at = now()
FROM unnest($1::uuid[], $2::text[], $3::int[], $4::text[], $5::text[])
    AS a (id, organization_id, turn, pending, refused)
WHERE jobs.id = a.id AND jobs.organization_id = a.organization_id";

/// For a job that never came into the ledger, or was forgotten. One that has come meanwhile is not touched.
const ENTER: &str = "
INSERT INTO jobs (id, organization_id, body_hash, state, turn, owner, attempts, spared, partly_sent, not_before, first_at,
    replayed_at, updated_at, pending, group_name, sequence)
SELECT id, organization_id, body_hash, 'deferred', turn, 0, attempts, attempts, pending IS NOT NULL, now(), first_at, now(),
    now(), pending::int[], group_name, sequence
FROM unnest($1::uuid[], $2::text[], $3::bytea[], $4::int[], $5::int[], $6::timestamptz[], $7::text[], $8::text[],
        $9::bigint[])
    AS a (id, organization_id, body_hash, turn, attempts, first_at, pending, group_name, sequence)
ON CONFLICT (id, organization_id) DO NOTHING
RETURNING id, organization_id";

const WRITE_LETTERS: &str = "
UPDATE dead_letters AS d SET state = a.state, turn = a.turn, replays = a.replays, replay_turn = a.replay_turn,
    parked_ms = a.parked_ms, history = a.history::jsonb
FROM unnest($1::uuid[], $2::text[], $3::int[], $4::int[], $5::int[], $6::bigint[], $7::text[])
    AS a (letter, state, turn, replays, replay_turn, parked_ms, history)
WHERE d.letter = a.letter";

/// On whose account letters are taken, and which.
#[derive(Debug, Clone, Copy)]
pub struct Taking<'a> {
    /// What the person has asked for.
    pub rules: ReplayRules,
    /// A letter that has left these states meanwhile is not taken.
    pub states: &'a [LetterState],
    /// Who, for the letter's history.
    pub actor: &'a str,
}

/// A recorded replay, to be published.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReplayCopy {
    /// Its turn.
    pub turn: Turn,
    /// Positions that it goes to; `None`: every recipient.
    pub pending: Option<Vec<u16>>,
    /// Attempts made so far.
    pub attempts: u32,
    /// When it was recorded: its age counts from here.
    pub replayed_at: OffsetDateTime,
}

/// What became of a letter that was to be taken.
pub type Taken = Result<ReplayCopy, Skip>;

impl Store {
    /// Records that these letters are replayed, each that may be, and says what is to be published. A letter that another
    /// run has in hand is in progress. It may be repeated: what was recorded before comes with the same turn.
    ///
    /// # Errors
    /// When the database did not answer; it may have recorded all of them, or none.
    pub async fn take_letters(
        &self,
        letters: &[LetterId],
        taking: &Taking<'_>,
    ) -> Result<BTreeMap<LetterId, Taken>, StoreError> {
        let take = async || {
            let taken = self.on_session(async |session| match take(session, letters, taking).await {
                Err(error) if is_deadlock(&error) => Ok(Err(error)),
                other => other.map(Ok),
            });
            taken.await
        };
        for _ in 1..DEADLOCK_TRIES {
            if let Ok(taken) = take().await? {
                return Ok(taken);
            }
        }
        Ok(take().await??)
    }
}

fn is_deadlock(error: &sqlx::Error) -> bool {
    error.as_database_error().and_then(|error| error.code()).is_some_and(|code| code == "40P01")
}

/// A letter under its lock, with its job's row under its own.
pub(super) struct Held {
    pub(super) letter: Letter,
    pub(super) job: Option<Job>,
    pub(super) booking: Booking,
}

impl Held {
    /// Decides as of now.
    fn decide(&self, taking: &Taking<'_>, now: OffsetDateTime) -> Result<Replay, Skip> {
        match self.letter.state {
            state if taking.states.contains(&state) => {}
            LetterState::Discarded => return Err(Skip::Discarded),
            LetterState::Parked => return Err(Skip::Parked),
            LetterState::Dead | LetterState::Replaying | LetterState::Replayed => {
                return Err(Skip::InProgress);
            }
        }
        if self.letter.key.is_none() {
            return Err(Skip::NotAJob);
        }
        let view = self.job.as_ref().map(|job| &job.view);
        replay::decide(&self.letter, view, self.booking, &taking.rules, now)
    }

    /// Where a letter stands whose replay was cut off and is not resumed: somebody has taken its copy up, so that it had been
    /// published after all; or it was called back, so that a copy, if there is one, only comes to bury it.
    fn cut_off(&self) -> Option<LetterState> {
        let job = self.job.as_ref().filter(|_| self.letter.state == LetterState::Replaying)?;
        if job.view.state == State::Cancelled {
            return Some(LetterState::Dead);
        }
        let waits = matches!(job.view.state, State::Deferred | State::Parked);
        let taken_up = |turn: Turn| turn < job.view.turn || turn == job.view.turn && !waits;
        self.letter.replay_turn.is_some_and(taken_up).then_some(LetterState::Replayed)
    }

    /// As its row is to be after this replay.
    fn replaying(&mut self, replay: &Replay, actor: &str, now: OffsetDateTime) {
        let letter = &mut self.letter;
        letter.state = LetterState::Replaying;
        if replay.resumed {
            return;
        }
        letter.replays += 1;
        letter.parked_before = Duration::ZERO;
        self.handed_over(
            replay.turn,
            LetterDeed { what: Deed::Replay, at: now, by: actor.to_owned(), outcome: None },
        );
    }

    /// A copy of this turn is recorded.
    pub(super) fn handed_over(&mut self, turn: Turn, deed: LetterDeed) {
        self.catch_up();
        let letter = &mut self.letter;
        letter.replay_turn = Some(turn);
        let excess = (letter.history.len() + 1).saturating_sub(HISTORY_MAX);
        letter.history.drain(..excess);
        letter.history.push(deed);
    }

    /// Its time in the archive counts. A job that was parked since, whose letter is on its way, has hardly waited.
    pub(super) fn waited(&mut self, now: OffsetDateTime) {
        let letter = &mut self.letter;
        if self.job.as_ref().is_none_or(|job| job.view.turn <= letter.turn) {
            let waited = Duration::try_from(now - letter.died_at).unwrap_or_default();
            letter.parked_before = letter.parked_before.saturating_add(waited);
        }
    }

    /// What the ledger's row is about is no news to the letter any more.
    pub(super) fn catch_up(&mut self) {
        let turn = self.letter.turn;
        self.letter.turn = self.job.as_ref().map_or(turn, |job| turn.max(job.view.turn));
    }
}

async fn take(
    session: &mut PgConnection,
    letters: &[LetterId],
    taking: &Taking<'_>,
) -> Result<BTreeMap<LetterId, Taken>, sqlx::Error> {
    let mut transaction = session.begin().await?;
    let mut taken: BTreeMap<_, Taken> =
        letters.iter().map(|letter| (*letter, Err(Skip::InProgress))).collect();
    let (held, now) = lock(&mut transaction, letters).await?;
    let (mut decided, mut settled, mut keys) = (Vec::new(), Vec::new(), HashSet::new());
    for mut held in held {
        match held.decide(taking, now) {
            // Of two bodies under one id, of which the ledger knows neither, one is enough.
            Ok(_) if !keys.insert(held.letter.key.clone()) => {}
            Ok(replay) => {
                held.replaying(&replay, taking.actor, now);
                decided.push((held, replay));
            }
            Err(skip) => {
                taken.insert(held.letter.letter, Err(skip));
                if let Some(state) = held.cut_off() {
                    held.letter.state = state;
                    settled.push(held);
                }
            }
        }
    }
    let late = record(&mut transaction, &decided).await?;
    decided.retain(|(held, _)| !held.letter.key.as_ref().is_some_and(|key| late.contains(key)));
    write(&mut transaction, decided.iter().map(|(held, _)| held).chain(&settled)).await?;
    transaction.commit().await?;
    for (held, replay) in decided {
        let attempts = held.job.as_ref().map_or(held.letter.attempts, |job| job.attempts);
        let recorded_at = held.job.and_then(|job| job.replayed_at).filter(|_| replay.resumed);
        let (turn, pending) = (replay.turn, replay.pending);
        let copy = ReplayCopy { turn, pending, attempts, replayed_at: recorded_at.unwrap_or(now) };
        taken.insert(held.letter.letter, Ok(copy));
    }
    Ok(taken)
}

/// The letters' rows and, behind all of them, their jobs' rows; with the time of the transaction, which is the one that is
/// written.
pub(super) async fn lock(
    session: &mut PgConnection,
    letters: &[LetterId],
) -> Result<(Vec<Held>, OffsetDateTime), sqlx::Error> {
    let now = sqlx::query_scalar("SELECT now()").fetch_one(&mut *session).await?;
    let ids: Vec<Uuid> = letters.iter().map(|letter| letter.0).collect();
    let rows = sqlx::query(LOCK_LETTERS).bind(ids).fetch_all(&mut *session).await?;
    let mut letters: Vec<Letter> = rows.iter().map(read_letter).collect::<Result<_, _>>()?;
    letters.sort_by_cached_key(|letter| letter.key.as_ref().map(row_key));
    let keyed: Vec<(&Letter, &JobKey)> =
        letters.iter().filter_map(|letter| Some((letter, letter.key.as_ref()?))).collect();
    let group = |letter: &Letter| letter.revision.as_ref().map(|revision| revision.group.clone());
    let rows = sqlx::query(LOCK_JOBS)
        .bind(keyed.iter().map(|(letter, _)| letter.letter.0).collect::<Vec<_>>())
        .bind(keyed.iter().map(|(_, key)| key.id).collect::<Vec<_>>())
        .bind(keyed.iter().map(|(_, key)| organization_text(key)).collect::<Vec<_>>())
        .bind(keyed.iter().map(|(letter, _)| &letter.body_hash[..]).collect::<Vec<_>>())
        .bind(keyed.iter().map(|(letter, _)| group(letter)).collect::<Vec<_>>())
        .bind(LOCK_CLASS)
        .fetch_all(session)
        .await?;
    let mut jobs = HashMap::new();
    for row in &rows {
        let letter = LetterId(row.try_get("letter")?);
        jobs.insert(letter, (ledger_of(row)?, booking_of(row)?));
    }
    let held = letters.into_iter().map(|letter| {
        let (job, booking) = jobs.remove(&letter.letter).unwrap_or_default();
        Held { letter, job, booking }
    });
    Ok((held.collect(), now))
}

/// Writes the replays into the ledger; the jobs that have come into it meanwhile, which are left alone.
async fn record(
    session: &mut PgConnection,
    decided: &[(Held, Replay)],
) -> Result<HashSet<JobKey>, sqlx::Error> {
    let fresh = decided
        .iter()
        .filter(|(_, replay)| !replay.resumed)
        .filter_map(|(held, replay)| Some((held, held.letter.key.as_ref()?, replay)));
    let (known, new): (Vec<_>, Vec<_>) = fresh.partition(|(held, _, _)| held.job.is_some());
    if !known.is_empty() {
        let refused = known.iter().map(|(held, _, replay)| still_refused(held, replay));
        sqlx::query(HAND_OVER)
            .bind(known.iter().map(|(_, key, _)| key.id).collect::<Vec<_>>())
            .bind(known.iter().map(|(_, key, _)| organization_text(key)).collect::<Vec<_>>())
            .bind(known.iter().map(|(_, _, replay)| replay.turn.0).collect::<Vec<_>>())
            .bind(known.iter().map(|(_, _, replay)| pending(replay)).collect::<Vec<_>>())
            .bind(refused.collect::<Result<Vec<_>, _>>()?)
            .execute(&mut *session)
            .await?;
    }
    enter(session, &new).await
}

/// Enters jobs that the ledger does not have, as replayed now; those that have come into it meanwhile.
pub(super) async fn enter(
    session: &mut PgConnection,
    new: &[(&Held, &JobKey, &Replay)],
) -> Result<HashSet<JobKey>, sqlx::Error> {
    if new.is_empty() {
        return Ok(HashSet::new());
    }
    let first_at = |letter: &Letter| letter.first_at.unwrap_or(letter.died_at);
    let revisions = || new.iter().map(|(held, _, _)| held.letter.revision.as_ref());
    let rows = sqlx::query(ENTER)
        .bind(new.iter().map(|(_, key, _)| key.id).collect::<Vec<_>>())
        .bind(new.iter().map(|(_, key, _)| organization_text(key)).collect::<Vec<_>>())
        .bind(new.iter().map(|(held, _, _)| &held.letter.body_hash[..]).collect::<Vec<_>>())
        .bind(new.iter().map(|(_, _, replay)| replay.turn.0).collect::<Vec<_>>())
        .bind(new.iter().map(|(held, _, _)| stored_count(held.letter.attempts)).collect::<Vec<_>>())
        .bind(new.iter().map(|(held, _, _)| first_at(&held.letter)).collect::<Vec<_>>())
        .bind(new.iter().map(|(_, _, replay)| pending(replay)).collect::<Vec<_>>())
        .bind(revisions().map(|own| own.map(|own| own.group.clone())).collect::<Vec<_>>())
        .bind(revisions().map(|own| own.map(|own| own.sequence)).collect::<Vec<_>>())
        .fetch_all(session)
        .await?;
    let mut late: HashMap<(Uuid, &str), &JobKey> =
        new.iter().map(|(_, key, _)| ((key.id, organization_text(key)), *key)).collect();
    for row in &rows {
        late.remove(&(row.try_get("id")?, row.try_get("organization_id")?));
    }
    Ok(late.into_values().cloned().collect())
}

pub(super) async fn write<'a>(
    session: &mut PgConnection,
    held: impl Iterator<Item = &'a Held>,
) -> Result<(), sqlx::Error> {
    let letters: Vec<&Letter> = held.map(|held| &held.letter).collect();
    let history = letters.iter().map(|letter| json(&letter.history)).collect::<Result<Vec<_>, _>>()?;
    let parked_ms = |letter: &Letter| i64::try_from(letter.parked_before.as_millis()).unwrap_or(i64::MAX);
    sqlx::query(WRITE_LETTERS)
        .bind(letters.iter().map(|letter| letter.letter.0).collect::<Vec<_>>())
        .bind(letters.iter().map(|letter| letter.state.as_str()).collect::<Vec<_>>())
        .bind(letters.iter().map(|letter| letter.turn.0).collect::<Vec<_>>())
        .bind(letters.iter().map(|letter| stored_count(letter.replays)).collect::<Vec<_>>())
        .bind(letters.iter().map(|letter| letter.replay_turn.map(|turn| turn.0)).collect::<Vec<_>>())
        .bind(letters.iter().map(|letter| parked_ms(letter)).collect::<Vec<_>>())
        .bind(history)
        .execute(session)
        .await
        .map(drop)
}

fn pending(replay: &Replay) -> Option<String> {
    replay.pending.as_deref().map(array_literal)
}

/// Those of the job's refused recipients that this replay does not go to.
fn still_refused(held: &Held, replay: &Replay) -> Result<Option<String>, sqlx::Error> {
    let Some(pending) = &replay.pending else { return Ok(None) };
    let refused = held.job.iter().flat_map(|job| &job.view.refused);
    let rest: Vec<&RefusedRecipient> = refused.filter(|refused| !pending.contains(&refused.index)).collect();
    if rest.is_empty() { Ok(None) } else { json(&rest).map(Some) }
}

pub(super) fn json(value: &impl serde::Serialize) -> Result<String, sqlx::Error> {
    serde_json::to_string(value).map_err(|error| sqlx::Error::Encode(error.into()))
}

fn row_key(key: &JobKey) -> (Uuid, String) {
    (key.id, organization_text(key).to_owned())
}
