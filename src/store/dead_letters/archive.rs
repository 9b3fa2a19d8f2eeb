//! Letters on their way into the archive, many in one transaction.
//! Guarantee: a letter that is delivered again changes nothing; a further death of its message changes its row, and nothing
//! older than the row does.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::Duration;

use sqlx::{Acquire, PgConnection, Row};
use time::OffsetDateTime;
use uuid::Uuid;

use super::DeadLetters;
use super::content::SealedContent;
use crate::model::failure::Reason;
use crate::model::job::JobKey;
use crate::model::ledger::Turn;
use crate::model::letter::{Fate, Killer, NewLetter};
use crate::store::ledger::{array_literal, organization_text, stored_count, without_nul};
use crate::store::{StoreError, bound_for};

/// Sealed bytes in one statement, unless a single letter is larger: the driver's message may be of 1 GiB.
const STATEMENT_BYTES: usize = 8 << 20;
/// Longest kind that there is (the contract's); what a body that is no job calls by that name may be of any length, and an
/// index takes no key above 2,700 bytes.
const KIND_MAX: usize = 64;

/// What became of a letter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Archived {
    /// It is the first of its message.
    New,
    /// Its message died, or was parked, once more: its row is `dead` or `parked` again.
    Again,
    /// The archive knows this death, or a later one. Nothing has changed.
    Known,
}

/// Inserts in the order of the arrays, that is of the letters: whoever archives waits for another in that order.
const INSERT: &str = "
INSERT INTO dead_letters (letter, job_id, organization_id, kind, lane, routing_key, state, reason, detail, attempts,
    first_at, died_at, expires_at, group_name, sequence, turn, recipients, body_hash, bytes, properties_sealed,
    body_sealed, deaths)
SELECT letter, job_id, organization_id, kind, lane, routing_key, state, reason, detail, attempts,
    first_at, died_at, expires_at, group_name, sequence, turn, recipients::int[], body_hash, bytes, properties_sealed,
    body_sealed, CASE state WHEN 'parked' THEN 0 ELSE 1 END
FROM unnest($1::uuid[], $2::uuid[], $3::text[], $4::text[], $5::text[], $6::text[], $7::text[], $8::text[], $9::int[],
        $10::timestamptz[], $11::timestamptz[], $12::timestamptz[], $13::text[], $14::bigint[], $15::int[], $16::text[],
        $17::bytea[], $18::int[], $19::bytea[], $20::bytea[], $21::text[])
    AS a (letter, job_id, organization_id, kind, lane, routing_key, reason, detail, attempts, first_at, died_at,
        expires_at, group_name, sequence, turn, recipients, body_hash, bytes, properties_sealed, body_sealed, state)
ON CONFLICT (letter) DO NOTHING
RETURNING letter";

/// The lateral subselect locks the rows one by one in the order of the array.
const LOCK: &str = "
SELECT count(*) FROM unnest($1::uuid[]) AS a (letter)
CROSS JOIN LATERAL (
    SELECT letter FROM dead_letters WHERE dead_letters.letter = a.letter FOR NO KEY UPDATE
) AS d";

/// A statement of its own, behind the locks: one that had waited for them would see the ledger as it was before.
const READ: &str = "
SELECT letter, turn, died_at, recipients IS NULL AS for_all, EXISTS (
    SELECT FROM jobs
    WHERE jobs.id = job_id AND jobs.organization_id = d.organization_id AND jobs.body_hash = d.body_hash
) AS in_ledger
FROM dead_letters AS d WHERE letter = ANY ($1)";

/// `first_reason` and `first_state` are of the death that ended the last replay, the rest of the newest one.
const DIE_AGAIN: &str = "
UPDATE dead_letters AS d SET
    state = a.state,
    reason = a.reason,
    detail = a.detail,
    attempts = a.attempts,
    first_at = coalesce(d.first_at, a.first_at),
    died_at = a.died_at,
    archived_at = now(),
    turn = greatest(d.turn, a.turn),
    recipients = a.recipients::int[],
    lane = a.lane,
    deaths = d.deaths + a.deaths,
    history = CASE
        WHEN d.history -> -1 ->> 'what' IN ('replay', 'release') AND d.history -> -1 -> 'outcome' IS NULL
        THEN jsonb_set(d.history, '{-1,outcome}',
            jsonb_build_object('state', a.first_state, 'reason', a.first_reason, 'at', now()))
        ELSE d.history
    END
FROM unnest($1::uuid[], $2::text[], $3::text[], $4::int[], $5::timestamptz[], $6::timestamptz[], $7::int[], $8::text[],
        $9::text[], $10::int[], $11::text[], $12::text[], $13::text[])
    AS a (letter, reason, detail, attempts, first_at, died_at, turn, recipients, lane, deaths, first_reason, first_state,
        state)
WHERE d.letter = a.letter";

/// For the broker's kills: nobody has told the ledger that the copy it waits for is dead. The turn stays, for the letter
/// bears it. A publisher's own message that no lane took, of turn 0, is none of the ledger's copies: another one may be in
/// its lane.
const BURY: &str = "
WITH locked AS MATERIALIZED (
    SELECT a.* FROM unnest($1::uuid[], $2::text[], $3::bytea[], $4::int[], $5::text[], $6::text[])
        AS a (id, organization_id, body_hash, turn, reason, detail)
    CROSS JOIN LATERAL (
        SELECT id FROM jobs
        WHERE jobs.id = a.id AND jobs.organization_id = a.organization_id AND jobs.state = 'deferred'
            AND jobs.turn = a.turn AND jobs.body_hash = a.body_hash
        FOR NO KEY UPDATE
    ) AS j
)
UPDATE jobs SET state = 'dead', reason = locked.reason, detail = locked.detail, not_before = NULL, updated_at = now()
FROM locked WHERE jobs.id = locked.id AND jobs.organization_id = locked.organization_id";

impl DeadLetters {
    /// Puts letters into the archive, all of them or, on an error, none; answers in their order. It may be repeated, with
    /// other letters beside them too: what was archived is then `Known`. The caller bounds the batch's bytes, of which
    /// three times as many are in memory.
    ///
    /// # Errors
    /// When the database did not answer; the letters may be archived all the same. `Internal` when it refused one of them.
    pub async fn archive(&self, letters: &[NewLetter]) -> Result<Vec<Archived>, StoreError> {
        let copies = copies(letters);
        let firsts: Vec<&NewLetter> = copies.values().map(|copies| &letters[copies[0]]).collect();
        let sealed = self.seal(firsts.iter().copied()).await?;
        let bytes: usize = sealed.iter().map(size).sum();
        let limit = bound_for(bytes as u64);
        self.store
            .on_session_within(limit, async |session| {
                let mut transaction = session.begin().await?;
                let inserted = insert(&mut transaction, &firsts, &sealed).await?;
                let answers = die_again(&mut transaction, letters, &copies, &inserted).await?;
                bury(&mut transaction, letters).await?;
                transaction.commit().await?;
                Ok(answers)
            })
            .await
    }
}

/// Each letter's positions in the batch, in the order in which rows are locked.
fn copies(letters: &[NewLetter]) -> BTreeMap<Uuid, Vec<usize>> {
    let mut copies: BTreeMap<Uuid, Vec<usize>> = BTreeMap::new();
    for (position, letter) in letters.iter().enumerate() {
        copies.entry(letter.id().0).or_default().push(position);
    }
    copies
}

fn size(sealed: &SealedContent) -> usize {
    sealed.body.len() + sealed.properties.len()
}

/// Inserts the letters that the archive does not have; every one of them before any other row is locked, or two
/// archivists could wait for each other.
async fn insert(
    session: &mut PgConnection,
    letters: &[&NewLetter],
    sealed: &[SealedContent],
) -> Result<HashSet<Uuid>, sqlx::Error> {
    let mut inserted = HashSet::new();
    let mut from = 0;
    while from < letters.len() {
        let mut bytes = size(&sealed[from]);
        let mut to = from + 1;
        while to < letters.len() && bytes + size(&sealed[to]) <= STATEMENT_BYTES {
            bytes += size(&sealed[to]);
            to += 1;
        }
        inserted.extend(insert_slice(session, &letters[from..to], &sealed[from..to]).await?);
        from = to;
    }
    Ok(inserted)
}

async fn insert_slice(
    session: &mut PgConnection,
    letters: &[&NewLetter],
    sealed: &[SealedContent],
) -> Result<Vec<Uuid>, sqlx::Error> {
    let each = || letters.iter();
    sqlx::query_scalar(INSERT)
        .bind(each().map(|l| l.id().0).collect::<Vec<_>>())
        .bind(each().map(|l| l.job_id).collect::<Vec<_>>())
        .bind(each().map(|l| l.key.as_ref().map(organization_text)).collect::<Vec<_>>())
        .bind(each().map(|l| kind(l)).collect::<Vec<_>>())
        .bind(each().map(|l| l.lane.as_deref().map(clean)).collect::<Vec<_>>())
        .bind(each().map(|l| clean(&l.routing_key)).collect::<Vec<_>>())
        .bind(each().map(|l| l.reason.as_str()).collect::<Vec<_>>())
        .bind(each().map(|l| l.detail.as_deref().map(clean)).collect::<Vec<_>>())
        .bind(each().map(|l| stored_count(l.attempts)).collect::<Vec<_>>())
        .bind(each().map(|l| l.first_at).collect::<Vec<_>>())
        .bind(each().map(|l| to_micros(l.died_at)).collect::<Vec<_>>())
        .bind(each().map(|l| l.expires_at).collect::<Vec<_>>())
        .bind(each().map(|l| l.revision.as_ref().map(|r| clean(&r.group))).collect::<Vec<_>>())
        .bind(each().map(|l| l.revision.as_ref().map(|r| r.sequence)).collect::<Vec<_>>())
        .bind(each().map(|l| l.turn.0).collect::<Vec<_>>())
        .bind(each().map(|l| l.recipients.as_deref().map(array_literal)).collect::<Vec<_>>())
        .bind(each().map(|l| &l.body_hash[..]).collect::<Vec<_>>())
        .bind(each().map(|l| i32::try_from(l.body.len()).unwrap_or(i32::MAX)).collect::<Vec<_>>())
        .bind(sealed.iter().map(|s| &s.properties[..]).collect::<Vec<_>>())
        .bind(sealed.iter().map(|s| &s.body[..]).collect::<Vec<_>>())
        .bind(each().map(|l| l.fate.state().as_str()).collect::<Vec<_>>())
        .fetch_all(session)
        .await
}

/// What a letter is measured against.
struct Standing {
    turn: Turn,
    died_at: OffsetDateTime,
    /// It is not for some recipients only.
    for_all: bool,
    /// The ledger has a row of this key and body, so the turns tell everything.
    in_ledger: bool,
}

impl Standing {
    /// Whether a letter tells of a death that the archive does not know. Without a turn its time must tell. A worker's
    /// is written in the letter and the same at each delivery; where the broker was the killer it is that of the
    /// delivery, which tells nothing once the letter was handed out before. A letter for some recipients bears the turn of
    /// the copy that the others have accepted, of which another one may have died unseen by the ledger.
    fn is_outlived_by(&self, letter: &NewLetter) -> bool {
        let timed = letter.killer == Killer::Worker || !letter.redelivered;
        let of_the_rest = letter.turn == self.turn && self.for_all && letter.recipients.is_some();
        letter.turn > self.turn
            || of_the_rest
            || (!self.in_ledger && timed && to_micros(letter.died_at) > self.died_at)
    }
}

/// What changes about a row that was there.
struct Change<'a> {
    letter: Uuid,
    /// The death that ended what the row was about.
    first: &'a NewLetter,
    newest: &'a NewLetter,
    deaths: u32,
}

/// Takes the letters that were not inserted one after the other against their rows.
async fn die_again(
    session: &mut PgConnection,
    letters: &[NewLetter],
    copies: &BTreeMap<Uuid, Vec<usize>>,
    inserted: &HashSet<Uuid>,
) -> Result<Vec<Archived>, sqlx::Error> {
    let mut answers = vec![Archived::New; letters.len()];
    let rest: Vec<(Uuid, &[usize])> = copies
        .iter()
        .map(|(id, copies)| (*id, &copies[usize::from(inserted.contains(id))..]))
        .filter(|(_, copies)| !copies.is_empty())
        .collect();
    if rest.is_empty() {
        return Ok(answers);
    }
    let mut standings = lock(session, rest.iter().map(|(id, _)| *id).collect()).await?;
    let mut changes: Vec<Change<'_>> = Vec::new();
    for (id, copies) in rest {
        let standing = standings.get_mut(&id).ok_or(sqlx::Error::RowNotFound)?;
        let mut change: Option<Change<'_>> = None;
        for &position in copies {
            let letter = &letters[position];
            if !standing.is_outlived_by(letter) {
                answers[position] = Archived::Known;
                continue;
            }
            answers[position] = Archived::Again;
            standing.turn = standing.turn.max(letter.turn);
            standing.died_at = to_micros(letter.died_at);
            standing.for_all = letter.recipients.is_none();
            let change =
                change.get_or_insert(Change { letter: id, first: letter, newest: letter, deaths: 0 });
            change.newest = letter;
            change.deaths += u32::from(letter.fate == Fate::Dead);
        }
        changes.extend(change);
    }
    write(session, &changes).await?;
    Ok(answers)
}

/// Locks rows, in this order, and reads them.
async fn lock(
    session: &mut PgConnection,
    letters: Vec<Uuid>,
) -> Result<HashMap<Uuid, Standing>, sqlx::Error> {
    let locked: i64 = sqlx::query_scalar(LOCK).bind(&letters).fetch_one(&mut *session).await?;
    if usize::try_from(locked) != Ok(letters.len()) {
        // Past its retention, and deleted between the insert, which met it, and the lock. The next try makes it anew.
        return Err(sqlx::Error::Protocol("a letter was deleted while it was archived".into()));
    }
    let rows = sqlx::query(READ).bind(&letters).fetch_all(session).await?;
    rows.iter()
        .map(|row| {
            let standing = Standing {
                turn: Turn(row.try_get("turn")?),
                died_at: row.try_get("died_at")?,
                for_all: row.try_get("for_all")?,
                in_ledger: row.try_get("in_ledger")?,
            };
            Ok((row.try_get("letter")?, standing))
        })
        .collect()
}

async fn write(session: &mut PgConnection, changes: &[Change<'_>]) -> Result<(), sqlx::Error> {
    if changes.is_empty() {
        return Ok(());
    }
    let each = || changes.iter().map(|change| change.newest);
    sqlx::query(DIE_AGAIN)
        .bind(changes.iter().map(|change| change.letter).collect::<Vec<_>>())
        .bind(each().map(|l| l.reason.as_str()).collect::<Vec<_>>())
        .bind(each().map(|l| l.detail.as_deref().map(clean)).collect::<Vec<_>>())
        .bind(each().map(|l| stored_count(l.attempts)).collect::<Vec<_>>())
        .bind(each().map(|l| l.first_at).collect::<Vec<_>>())
        .bind(each().map(|l| to_micros(l.died_at)).collect::<Vec<_>>())
        .bind(each().map(|l| l.turn.0).collect::<Vec<_>>())
        .bind(each().map(|l| l.recipients.as_deref().map(array_literal)).collect::<Vec<_>>())
        .bind(each().map(|l| l.lane.as_deref().map(clean)).collect::<Vec<_>>())
        .bind(changes.iter().map(|change| stored_count(change.deaths)).collect::<Vec<_>>())
        .bind(changes.iter().map(|change| change.first.reason.as_str()).collect::<Vec<_>>())
        .bind(changes.iter().map(|change| change.first.fate.state().as_str()).collect::<Vec<_>>())
        .bind(each().map(|l| l.fate.state().as_str()).collect::<Vec<_>>())
        .execute(session)
        .await
        .map(drop)
}

/// Tells the ledger of the broker's kills. The ledger's rows come last, as in every transaction that has rows of both.
async fn bury(session: &mut PgConnection, letters: &[NewLetter]) -> Result<(), sqlx::Error> {
    let killed: BTreeMap<(Uuid, &str, Turn), (&JobKey, &NewLetter)> = letters
        .iter()
        .filter(|letter| letter.killer == Killer::Broker)
        .filter(|letter| letter.reason != Reason::Unroutable || letter.turn > Turn(0))
        .filter_map(|letter| letter.key.as_ref().map(|key| (key, letter)))
        .map(|(key, letter)| ((key.id, organization_text(key), letter.turn), (key, letter)))
        .collect();
    if killed.is_empty() {
        return Ok(());
    }
    let each = || killed.values();
    sqlx::query(BURY)
        .bind(each().map(|(key, _)| key.id).collect::<Vec<_>>())
        .bind(each().map(|(key, _)| organization_text(key)).collect::<Vec<_>>())
        .bind(each().map(|(_, l)| &l.body_hash[..]).collect::<Vec<_>>())
        .bind(each().map(|(_, l)| l.turn.0).collect::<Vec<_>>())
        .bind(each().map(|(_, l)| l.reason.as_str()).collect::<Vec<_>>())
        .bind(each().map(|(_, l)| l.detail.as_deref().map(clean)).collect::<Vec<_>>())
        .execute(session)
        .await
        .map(drop)
}

/// The database's resolution.
fn to_micros(at: OffsetDateTime) -> OffsetDateTime {
    let odd = at.nanosecond() % 1000;
    at - Duration::from_nanos(odd.into())
}

fn kind(letter: &NewLetter) -> Option<String> {
    letter.kind.as_deref().filter(|kind| kind.len() <= KIND_MAX).map(clean)
}

fn clean(text: &str) -> String {
    without_nul(text).into_owned()
}
