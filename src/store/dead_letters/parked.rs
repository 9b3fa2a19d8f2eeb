//! Parked letters on their way out: taken for a release, or buried because they died while they waited.
//! Guarantee: what becomes of a letter is recorded in its row and its job's in one transaction that holds both; a copy may be
//! published, or a death announced, once it has committed. It may be repeated until the letter is marked.

use std::collections::{BTreeMap, HashMap, HashSet};

use sqlx::postgres::PgRow;
use sqlx::{Acquire, PgConnection, Row};
use time::OffsetDateTime;
use uuid::Uuid;

use super::letter_columns;
use super::search::understood;
use super::take::{Held, ReplayCopy, enter, json, lock, write};
use crate::model::event::RefusedRecipient;
use crate::model::failure::Reason;
use crate::model::job::JobKey;
use crate::model::ledger::{State, Turn};
use crate::model::letter::{BY_ITSELF, Deed, Letter, LetterDeed, LetterId, LetterState, Place};
use crate::model::organization::OrganizationId;
use crate::model::parking::{self, Parked, ParkingRules};
use crate::model::replay::Replay;
use crate::model::smtp_settings::{ORGANIZATION, PLATFORM};
use crate::store::ledger::{array_literal, organization_text, without_nul};
use crate::store::{Store, StoreError};

/// Organizations in use of a configuration that is failing: `$1` whether none needs the feature flag.
macro_rules! fails_in_use {
    ($organization:literal) => {
        concat!(
            "EXISTS (SELECT FROM smtp_configs JOIN organizations USING (organization_id)
        WHERE organization_id = ",
            $organization,
            " AND failing_since IS NOT NULL AND ($1 OR custom_smtp))"
        )
    };
}

/// Steps from organization to organization along the index, however many letters each has.
const READY: &str = concat!(
    "WITH RECURSIVE o AS (
    SELECT min(organization_id) AS id FROM dead_letters WHERE state = 'parked' AND organization_id > ''
    UNION ALL
    SELECT (SELECT min(organization_id) FROM dead_letters WHERE state = 'parked' AND organization_id > o.id)
    FROM o WHERE o.id IS NOT NULL
)
SELECT o.id FROM o WHERE o.id IS NOT NULL AND NOT ",
    fails_in_use!("o.id")
);

const OLDEST: &str = concat!(
    "SELECT d.* FROM unnest($1::text[], $2::timestamptz[], $3::uuid[], $4::bigint[])
    AS a (organization_id, after_at, after_letter, most)
CROSS JOIN LATERAL (
    SELECT ",
    letter_columns!(),
    " FROM dead_letters
    WHERE state = 'parked' AND organization_id = a.organization_id
        AND (a.after_at IS NULL OR (died_at, letter) > (a.after_at, a.after_letter))
    ORDER BY died_at, letter LIMIT a.most
) AS d"
);

const FAILING: &str = concat!("SELECT id FROM unnest($2::text[]) AS a (id) WHERE ", fails_in_use!("a.id"));

/// Age and retries go on as if the job had not been parked. What it was parked for speaks against the job itself only where its
/// own last attempt met it: others were parked untried. Owner 0 is a program that has gone: whoever meets an older copy
/// repeats the hand-over.
const RELEASE: &str = "
UPDATE jobs SET state = 'deferred', turn = a.turn, owner = 0, not_before = now(),
    replayed_at = coalesce(jobs.replayed_at, jobs.first_at) + (now() - jobs.updated_at),
    parked_reason = CASE WHEN jobs.history -> -1 ->> 'reason' = jobs.reason THEN jobs.reason END, reason = NULL, detail = NULL, updated_at = now()
FROM unnest($1::uuid[], $2::text[], $3::int[]) AS a (id, organization_id, turn)
WHERE jobs.id = a.id AND jobs.organization_id = a.organization_id
RETURNING jobs.id, jobs.organization_id, jobs.replayed_at";

/// The turn stays: no copy is made.
const DIE: &str = "
UPDATE jobs SET state = a.state, owner = 0, reason = a.reason, detail = a.detail, not_before = NULL,
    pending = CASE WHEN a.state = 'sent' THEN NULL ELSE jobs.pending END,
    refused = coalesce(a.refused::jsonb, jobs.refused), updated_at = now()
FROM unnest($1::uuid[], $2::text[], $3::text[], $4::text[], $5::text[], $6::text[])
    AS a (id, organization_id, state, reason, detail, refused)
WHERE jobs.id = a.id AND jobs.organization_id = a.organization_id";

/// Rows of `recoveries` come last, behind letters and jobs.
const COUNT_RELEASED: &str = "
WITH counted AS (
    SELECT organization_id, count(*) AS released FROM unnest($1::text[]) AS a (organization_id)
    GROUP BY organization_id ORDER BY organization_id
)
UPDATE recoveries AS r SET released = r.released + counted.released
FROM counted WHERE r.organization_id = counted.organization_id";

const MARK_BURIED: &str = "
WITH locked AS MATERIALIZED (
    SELECT d.letter, a.reason, a.detail, a.recipients
    FROM dead_letters AS d
    JOIN unnest($1::uuid[], $2::int[], $3::text[], $4::text[], $5::text[]) AS a (letter, turn, reason, detail, recipients)
        ON a.letter = d.letter
    WHERE d.state = 'parked' AND d.turn = a.turn ORDER BY d.letter FOR UPDATE OF d
)
UPDATE dead_letters AS d SET state = 'dead', reason = locked.reason, detail = locked.detail, died_at = now(),
    recipients = coalesce(locked.recipients::int[], d.recipients), deaths = d.deaths + 1
FROM locked WHERE d.letter = locked.letter";

/// How many of an organization's letters are looked at.
#[derive(Debug, Clone)]
pub struct ParkedShare {
    /// Whose.
    pub organization: OrganizationId,
    /// Behind this place; `None`: from the oldest on.
    pub after: Option<Place>,
    /// At most.
    pub most: u32,
}

/// What is recorded of a parked letter.
#[derive(Debug, Clone)]
pub enum ParkedTaken {
    /// Its release: the copy is to be published.
    Copy(ReplayCopy),
    /// Its death: to be announced.
    Buried(Box<Burial>),
}

/// A message that died while it was parked.
#[derive(Debug, Clone)]
pub struct Burial {
    /// Its letter, as it was parked.
    pub letter: Letter,
    /// The turn that it died in.
    pub turn: Turn,
    /// Why.
    pub reason: Reason,
    /// In words.
    pub detail: String,
    /// What others of its recipients had got before.
    pub partly_sent: Option<PartlySent>,
}

/// A message that some recipients have, and that the others do not get.
#[derive(Debug, Clone)]
pub struct PartlySent {
    /// With angle brackets.
    pub message_id: String,
    /// `organization` or `platform`.
    pub transport: &'static str,
    /// Everybody who did not get it.
    pub refused: Vec<RefusedRecipient>,
}

impl Burial {
    /// Positions that the dead letter is for, ascending; `None`: as the parked one says.
    fn recipients(&self) -> Option<Vec<u16>> {
        let partly = self.partly_sent.as_ref()?;
        let mut positions: Vec<u16> = partly.refused.iter().map(|refused| refused.index).collect();
        positions.sort_unstable();
        positions.dedup();
        Some(positions)
    }
}

impl Store {
    /// Organizations that have parked letters and no failing configuration in use: `for_all`, no feature flag is needed for
    /// that.
    ///
    /// # Errors
    /// When the database did not answer.
    pub async fn organizations_to_release(&self, for_all: bool) -> Result<Vec<OrganizationId>, StoreError> {
        let question = sqlx::query_scalar(READY).bind(for_all);
        let ids: Vec<String> = self.on_session(async |session| question.fetch_all(session).await).await?;
        Ok(ids.iter().filter_map(|id| OrganizationId::parse(id).ok()).collect())
    }

    /// The oldest parked letters of several organizations: the first one of each, then the second one of each, and so on. A
    /// row that this program does not understand is left out and logged.
    ///
    /// # Errors
    /// When the database did not answer.
    pub async fn oldest_parked(&self, shares: &[ParkedShare]) -> Result<Vec<Letter>, StoreError> {
        let question = sqlx::query(OLDEST)
            .bind(shares.iter().map(|share| share.organization.as_str()).collect::<Vec<_>>())
            .bind(shares.iter().map(|share| share.after.map(|(at, _)| at)).collect::<Vec<_>>())
            .bind(shares.iter().map(|share| share.after.map(|(_, letter)| letter.0)).collect::<Vec<_>>())
            .bind(shares.iter().map(|share| i64::from(share.most)).collect::<Vec<_>>());
        let rows = self.on_session(async |session| question.fetch_all(session).await).await?;
        let mut by_organization: BTreeMap<_, Vec<Letter>> = BTreeMap::new();
        for row in &rows {
            if let Some(letter) = understood(row)? {
                by_organization.entry(letter.owner()).or_default().push(letter);
            }
        }
        let ranked = by_organization.into_values().flat_map(|mut letters| {
            letters.sort_by_key(Letter::place);
            letters.into_iter().enumerate()
        });
        let mut ranked: Vec<(usize, Letter)> = ranked.collect();
        ranked.sort_by_key(|(rank, _)| *rank);
        Ok(ranked.into_iter().map(|(_, letter)| letter).collect())
    }

    /// Records what becomes of parked letters, and says what is to be published or announced; nothing of one that stays, that
    /// another has in hand, or whose copy was taken up. None is released anew unless `release`. It may be repeated.
    ///
    /// # Errors
    /// When the database did not answer, or ended a deadlock with this; it may have recorded all of them, or none.
    pub async fn take_parked(
        &self,
        letters: &[LetterId],
        rules: ParkingRules,
        release: bool,
    ) -> Result<BTreeMap<LetterId, ParkedTaken>, StoreError> {
        self.on_session(async |session| take(session, letters, rules, release).await).await
    }

    /// These deaths are announced. A letter that is no longer as it was buried stays as it is.
    ///
    /// # Errors
    /// When the database did not answer; it may be repeated.
    pub async fn mark_buried(&self, burials: &[Burial]) -> Result<(), StoreError> {
        let recipients = burials.iter().map(|burial| burial.recipients().as_deref().map(array_literal));
        let question = sqlx::query(MARK_BURIED)
            .bind(burials.iter().map(|burial| burial.letter.letter.0).collect::<Vec<_>>())
            .bind(burials.iter().map(|burial| burial.turn.0).collect::<Vec<_>>())
            .bind(burials.iter().map(|burial| burial.reason.as_str()).collect::<Vec<_>>())
            .bind(burials.iter().map(|burial| without_nul(&burial.detail).into_owned()).collect::<Vec<_>>())
            .bind(recipients.collect::<Vec<_>>());
        self.on_session(async |session| question.execute(session).await).await.map(drop)
    }
}

async fn take(
    session: &mut PgConnection,
    letters: &[LetterId],
    rules: ParkingRules,
    release: bool,
) -> Result<BTreeMap<LetterId, ParkedTaken>, sqlx::Error> {
    let mut transaction = session.begin().await?;
    let (held, now) = lock(&mut transaction, letters).await?;
    let failing = failing(&mut transaction, &held, rules).await?;
    let (mut released, mut resumed) = (Vec::new(), Vec::new());
    let (mut dying, mut dead, mut settled) = (Vec::new(), Vec::new(), Vec::new());
    let mut keys = HashSet::new();
    for mut held in held {
        let Some(key) = held.letter.key.clone().filter(|_| held.letter.state == LetterState::Parked) else {
            continue;
        };
        let may_go = release && !failing.contains(organization_text(&key));
        let view = held.job.as_ref().map(|job| &job.view);
        match parking::decide(&held.letter, view, held.booking, may_go, rules.parked_for, now) {
            Parked::Stays => {}
            // Of two bodies under one id, of which the ledger knows neither, one is enough.
            Parked::Goes(replay) if !replay.resumed && !keys.insert(key) => {}
            Parked::Goes(replay) if replay.resumed => resumed.push((held, replay)),
            Parked::Goes(replay) => {
                let by = BY_ITSELF.to_owned();
                held.waited(now);
                held.handed_over(replay.turn, LetterDeed { what: Deed::Release, at: now, by, outcome: None });
                released.push((held, replay));
            }
            Parked::Dies { reason, detail } => {
                let burial = dies(&mut held, reason, detail);
                dying.push((held, burial));
            }
            Parked::Died => {
                if let Some(burial) = died(&mut held) {
                    dead.push((held, burial));
                }
            }
            Parked::TakenUp => {
                held.letter.state = LetterState::Replayed;
                settled.push(held);
            }
        }
    }
    let ages = record_releases(&mut transaction, &mut released, now).await?;
    record_deaths(&mut transaction, &dying).await?;
    let buried = || dying.iter().chain(&dead).map(|(held, _)| held);
    let changed = released.iter().map(|(held, _)| held).chain(buried()).chain(&settled);
    write(&mut transaction, changed).await?;
    count_released(&mut transaction, &released).await?;
    transaction.commit().await?;
    let mut taken = BTreeMap::new();
    for (held, replay) in released.into_iter().chain(resumed) {
        let recorded = held.job.as_ref().and_then(|job| job.replayed_at);
        let age = held.letter.key.as_ref().and_then(|key| ages.get(key)).copied();
        let replayed_at = age.or(recorded).unwrap_or(now);
        let attempts = held.job.as_ref().map_or(held.letter.attempts, |job| job.attempts);
        let copy = ReplayCopy { turn: replay.turn, pending: replay.pending, attempts, replayed_at };
        taken.insert(held.letter.letter, ParkedTaken::Copy(copy));
    }
    for (held, burial) in dying.into_iter().chain(dead) {
        taken.insert(held.letter.letter, ParkedTaken::Buried(Box::new(burial)));
    }
    Ok(taken)
}

/// Those of the letters' organizations whose configuration is failing and in use.
async fn failing(
    session: &mut PgConnection,
    held: &[Held],
    rules: ParkingRules,
) -> Result<HashSet<String>, sqlx::Error> {
    let keys = held.iter().filter_map(|held| held.letter.key.as_ref());
    let organizations: HashSet<&str> = keys.map(organization_text).collect();
    let rows = sqlx::query(FAILING)
        .bind(rules.for_all)
        .bind(organizations.into_iter().collect::<Vec<_>>())
        .fetch_all(session)
        .await?;
    rows.iter().map(|row: &PgRow| row.try_get("id")).collect()
}

/// A death that is to be recorded. A job that some recipients have ends as sent, for the others do not get it.
fn dies(held: &mut Held, reason: Reason, detail: String) -> Burial {
    held.catch_up();
    let letter = held.letter.clone();
    let job = held.job.as_ref().filter(|job| job.view.same_body && job.partly_sent);
    let partly_sent = job.zip(job.and_then(|job| job.view.pending.as_ref())).map(|(job, pending)| {
        let rest = pending.iter().map(|index| RefusedRecipient { index: *index, code: 0, reason });
        let refused = job.view.refused.iter().cloned().chain(rest).collect();
        partly_sent(held, refused)
    });
    Burial { turn: letter.turn, letter, reason, detail, partly_sent }
}

/// A death that the ledger has on record.
fn died(held: &mut Held) -> Option<Burial> {
    held.catch_up();
    let letter = held.letter.clone();
    let job = held.job.as_ref()?;
    let (reason, detail, partly_sent) = match job.view.state {
        State::Sent => {
            let first = job.view.refused.first()?;
            let detail = format!("recipient {} was refused with {}", first.index, first.code);
            (first.reason, detail, Some(partly_sent(held, job.view.refused.clone())))
        }
        State::Cancelled => (Reason::Cancelled, job.detail.clone().unwrap_or_default(), None),
        _ => (job.view.reason.unwrap_or(letter.reason), job.detail.clone().unwrap_or_default(), None),
    };
    Some(Burial { turn: letter.turn, letter, reason, detail, partly_sent })
}

fn partly_sent(held: &Held, refused: Vec<RefusedRecipient>) -> PartlySent {
    let job = held.job.as_ref();
    let on_platform = job.is_some_and(|job| job.transport.as_deref() == Some(PLATFORM));
    let message_id = job.and_then(|job| job.message_id.clone()).unwrap_or_default();
    PartlySent { message_id, transport: if on_platform { PLATFORM } else { ORGANIZATION }, refused }
}

/// Writes releases into the ledger; from when each job's age counts. Drops those whose jobs have come into it meanwhile.
async fn record_releases(
    session: &mut PgConnection,
    released: &mut Vec<(Held, Replay)>,
    now: OffsetDateTime,
) -> Result<HashMap<JobKey, OffsetDateTime>, sqlx::Error> {
    let mut ages = HashMap::new();
    let late = {
        let all =
            released.iter().filter_map(|(held, replay)| Some((held, held.letter.key.as_ref()?, replay)));
        let (known, new): (Vec<_>, Vec<_>) = all.partition(|(held, _, _)| held.job.is_some());
        if !known.is_empty() {
            let rows = sqlx::query(RELEASE)
                .bind(known.iter().map(|(_, key, _)| key.id).collect::<Vec<_>>())
                .bind(known.iter().map(|(_, key, _)| organization_text(key)).collect::<Vec<_>>())
                .bind(known.iter().map(|(_, _, replay)| replay.turn.0).collect::<Vec<_>>())
                .fetch_all(&mut *session)
                .await?;
            let by_row: HashMap<(Uuid, &str), &JobKey> =
                known.iter().map(|(_, key, _)| ((key.id, organization_text(key)), *key)).collect();
            for row in &rows {
                let key = by_row.get(&(row.try_get("id")?, row.try_get("organization_id")?));
                ages.extend(
                    key.map(|key| Ok::<_, sqlx::Error>(((*key).clone(), row.try_get("replayed_at")?)))
                        .transpose()?,
                );
            }
        }
        ages.extend(new.iter().map(|(_, key, _)| ((*key).clone(), now)));
        enter(session, &new).await?
    };
    released.retain(|(held, _)| !held.letter.key.as_ref().is_some_and(|key| late.contains(key)));
    Ok(ages)
}

async fn record_deaths(session: &mut PgConnection, dying: &[(Held, Burial)]) -> Result<(), sqlx::Error> {
    let its_own = |held: &Held| held.job.as_ref().is_some_and(|job| job.view.same_body);
    let known: Vec<(&JobKey, &Burial)> = dying
        .iter()
        .filter(|(held, _)| its_own(held))
        .filter_map(|(held, burial)| Some((held.letter.key.as_ref()?, burial)))
        .collect();
    if known.is_empty() {
        return Ok(());
    }
    let dead = |burial: &Burial| burial.partly_sent.is_none();
    let state = |burial: &Burial| match burial.reason {
        _ if !dead(burial) => State::Sent,
        Reason::Cancelled => State::Cancelled,
        _ => State::Dead,
    };
    let refused = known
        .iter()
        .map(|(_, burial)| burial.partly_sent.as_ref().map(|partly| json(&partly.refused)).transpose());
    sqlx::query(DIE)
        .bind(known.iter().map(|(key, _)| key.id).collect::<Vec<_>>())
        .bind(known.iter().map(|(key, _)| organization_text(key)).collect::<Vec<_>>())
        .bind(known.iter().map(|(_, b)| state(b).as_str()).collect::<Vec<_>>())
        .bind(known.iter().map(|(_, b)| dead(b).then(|| b.reason.as_str())).collect::<Vec<_>>())
        .bind(
            known
                .iter()
                .map(|(_, b)| dead(b).then(|| without_nul(&b.detail).into_owned()))
                .collect::<Vec<_>>(),
        )
        .bind(refused.collect::<Result<Vec<_>, _>>()?)
        .execute(session)
        .await
        .map(drop)
}

async fn count_released(session: &mut PgConnection, released: &[(Held, Replay)]) -> Result<(), sqlx::Error> {
    let keys = released.iter().filter_map(|(held, _)| held.letter.key.as_ref());
    let organizations: Vec<&str> = keys.map(organization_text).collect();
    if organizations.is_empty() {
        return Ok(());
    }
    sqlx::query(COUNT_RELEASED).bind(organizations).execute(session).await.map(drop)
}
