//! Claims, in batches: which copy of which job this worker may work on.
//! Guarantee: the statement that decides also locks and writes the row, so no two claims of one turn are granted.

use std::collections::{BTreeMap, HashMap};

use backon::{ExponentialBuilder, Retryable};
use sqlx::postgres::PgRow;
use sqlx::types::Json;
use sqlx::{Acquire, PgConnection, Row};
use time::OffsetDateTime;
use uuid::Uuid;

use super::super::batch::{Batcher, Work};
use super::super::{Incarnations, Store, StoreError};
use super::grants::Grants;
use super::settle::{SettleRequest, Settles};
use super::{RowKey, count, organization_text, row_key, until, without_nul};
use crate::model::event::RefusedRecipient;
use crate::model::failure::Reason;
use crate::model::job::JobKey;
use crate::model::ledger::{
    Claim, ClaimAnswer, Claimed, HandOver, Incarnation, Orphan, Settle, Settlement, State, Turn,
};

/// Raises each booking's sequence to the greatest that was seen. Its rows are locked before those of `jobs`.
const RAISE: &str = "
INSERT INTO job_groups AS g (organization_id, name, sequence, updated_at)
SELECT organization_id, name, sequence, now()
FROM unnest($1::text[], $2::text[], $3::bigint[]) AS a (organization_id, name, sequence)
ON CONFLICT (organization_id, name) DO UPDATE
SET sequence = excluded.sequence, updated_at = excluded.updated_at
WHERE g.sequence < excluded.sequence";

/// Writes the rows that may be claimed and returns those alone. `$5` is the claiming incarnation, `$6` every incarnation of
/// this process, `$7` the dead ones, `$8` the keys that this process works on, `$9` each claim's booking, `$11` the keys
/// that may have died with another worker, `$12` each revision. A job that was called back before a claim (its reason says so)
/// leaves nothing unknown behind: such a claim sends nothing. Half a second early is on time: the broker's clock is not the database's.
const CLAIM: &str = "
WITH asked AS MATERIALIZED (
    SELECT * FROM unnest($1::text[], $2::uuid[], $3::bytea[], $4::int[], $9::text[], $12::bigint[], $10::text[])
        AS a (organization_id, id, body_hash, turn, group_name, sequence, message_id)
), granted AS (
    INSERT INTO jobs AS j
        (organization_id, id, body_hash, state, turn, owner, first_at, updated_at, message_id, group_name, sequence)
    SELECT organization_id, id, body_hash, 'claimed', turn, $5, now(), now(), message_id, group_name, sequence FROM asked
    ON CONFLICT (id, organization_id) DO UPDATE SET
        state = 'claimed',
        body_hash = excluded.body_hash,
        turn = excluded.turn,
        owner = excluded.owner,
        updated_at = excluded.updated_at,
        message_id = coalesce(nullif(j.message_id, ''), excluded.message_id),
        group_name = coalesce(j.group_name, excluded.group_name),
        sequence = coalesce(j.sequence, excluded.sequence),
        not_before = NULL,
        committing = false,
        crashes = CASE WHEN j.state = 'claimed' AND j.owner <> ALL ($6) THEN j.crashes + 1 ELSE j.crashes END,
        orphan = CASE WHEN j.state = 'claimed' AND j.owner <> ALL ($6) AND j.reason IS DISTINCT FROM 'cancelled'
            THEN coalesce(j.orphan, false) OR j.committing ELSE j.orphan END
    WHERE (j.body_hash IS NULL OR j.body_hash = excluded.body_hash)
        AND CASE j.state
            WHEN 'sent' THEN false
            WHEN 'claimed' THEN excluded.turn >= j.turn
                AND (j.owner = ANY ($6) OR j.owner = ANY ($7))
                AND j.id || '/' || j.organization_id <> ALL ($8)
            WHEN 'deferred' THEN excluded.turn >= j.turn
                AND (j.not_before IS NULL OR j.not_before <= now() + interval '500 milliseconds')
            ELSE excluded.turn > j.turn
        END
        AND ((j.crashes = 0 AND (j.state <> 'claimed' OR j.owner = ANY ($6)))
            OR j.id || '/' || j.organization_id = ANY ($11))
    RETURNING organization_id, id, turn, attempts, spared, first_at, replayed_at,
        coalesce(reason, parked_reason) AS reason, message_id, pending, refused, partly_sent, orphan,
        crashes, unknowns, cancel_requested, group_name, sequence
)
SELECT granted.*, now() AS now, groups.sequence AS newest_sequence,
    granted.cancel_requested OR coalesce(groups.cancelled = granted.sequence, false) AS cancelled,
    coalesce(organizations.custom_smtp, false) AS custom_smtp, smtp_configs.version AS config_version,
    smtp_configs.failing_since IS NOT NULL AS config_failing
FROM granted
LEFT JOIN organizations ON organizations.organization_id = granted.organization_id
LEFT JOIN smtp_configs ON smtp_configs.organization_id = granted.organization_id
LEFT JOIN job_groups AS groups
    ON groups.organization_id = granted.organization_id AND groups.name = granted.group_name";

/// Why the rest was not granted.
const LOOK: &str = "
SELECT j.organization_id, j.id, j.body_hash, j.state, j.turn, j.owner, j.attempts, j.first_at, j.replayed_at,
    j.updated_at, j.not_before, j.reason, j.detail, j.pending, j.crashes, now() AS now
FROM unnest($1::text[], $2::uuid[]) AS a (organization_id, id)
JOIN jobs AS j ON j.id = a.id AND j.organization_id = a.organization_id";

pub(super) struct Claims {
    pub(super) store: Store,
    pub(super) incarnations: Incarnations,
    pub(super) grants: std::sync::Arc<Grants>,
    pub(super) settles: Batcher<Settles>,
}

impl Work for Claims {
    type Key = RowKey;
    type Request = Claim;
    type Answer = ClaimAnswer;
    /// Nobody would work on it.
    const SKIP_ABANDONED: bool = true;

    fn key(claim: &Claim) -> RowKey {
        row_key(&claim.key)
    }

    async fn run(&self, claims: &[&Claim]) -> Result<Vec<Option<ClaimAnswer>>, StoreError> {
        let Some(owner) = self.incarnations.current() else {
            return Err(StoreError::Unavailable("this worker has no incarnation".into()));
        };
        let asking = Asking {
            owner,
            mine: self.incarnations.mine(),
            dead: self.incarnations.dead(),
            at_work: names(claims, |claim| self.grants.token(&claim.key).is_some()),
            suspects: names(claims, |claim| claim.suspects),
        };
        let mut rows = self.store.on_session(async |session| asking.answer(session, claims).await).await?;
        let mut answers = Vec::with_capacity(claims.len());
        for claim in claims {
            let answer = match rows.remove(&row_key(&claim.key)) {
                Some(Found::Granted(row)) => Some(ClaimAnswer::Claimed(Box::new(claimed(owner, &row)?))),
                Some(Found::Other(row)) => Standing::read(&row)?.refuse(claim, &asking),
                None => None,
            };
            if matches!(answer, Some(ClaimAnswer::Claimed(_))) {
                self.grants.grant(&claim.key);
            }
            answers.push(answer);
        }
        Ok(answers)
    }

    /// A claim that nobody will work on is given back, or it would be held for as long as this worker lives.
    fn undelivered(&self, claim: Claim, answer: ClaimAnswer) {
        let ClaimAnswer::Claimed(claimed) = answer else { return };
        let token = self.grants.token(&claim.key);
        let settle = Settle {
            key: claim.key,
            owner: claimed.owner,
            turn: claimed.turn,
            outcome: Settlement::Released,
            attempts: claimed.attempts,
            spared: claimed.spared,
            unknowns: claimed.unknowns,
            message_id: claimed.message_id,
            pending: claimed.pending,
            refused: claimed.refused,
            partly_sent: claimed.partly_sent,
            reply: None,
            attempt: None,
        };
        let settles = self.settles.clone();
        tokio::spawn(async move {
            let pauses = ExponentialBuilder::default().with_jitter().without_max_times();
            let release = || settles.ask(SettleRequest { settle: settle.clone(), token });
            let released = release.retry(pauses).when(|error| matches!(error, StoreError::Unavailable(_)));
            if let Err(error) = released.await {
                tracing::error!(%error, "a claim that nobody waits for could not be given back");
            }
        });
    }
}

enum Found {
    Granted(PgRow),
    Other(PgRow),
}

/// What one statement needs besides the claims.
struct Asking {
    owner: Incarnation,
    mine: Vec<i32>,
    dead: Vec<i32>,
    at_work: Vec<String>,
    suspects: Vec<String>,
}

/// The keys of some of the claims, as the statement compares them.
fn names(claims: &[&Claim], which: impl Fn(&Claim) -> bool) -> Vec<String> {
    let chosen = claims.iter().filter(|claim| which(claim));
    chosen.map(|claim| format!("{}/{}", claim.key.id, organization_text(&claim.key))).collect()
}

impl Asking {
    fn is_at_work(&self, key: &JobKey) -> bool {
        self.at_work.contains(&format!("{}/{}", key.id, organization_text(key)))
    }

    async fn answer(
        &self,
        session: &mut PgConnection,
        claims: &[&Claim],
    ) -> Result<HashMap<RowKey, Found>, sqlx::Error> {
        let raised = raised(claims);
        let granted = if raised.is_empty() {
            self.claim(session, claims).await?
        } else {
            let mut transaction = session.begin().await?;
            raise(&mut transaction, &raised).await?;
            let granted = self.claim(&mut transaction, claims).await?;
            transaction.commit().await?;
            granted
        };
        let mut found: HashMap<RowKey, Found> = HashMap::with_capacity(claims.len());
        for row in granted {
            found.insert(key_of(&row)?, Found::Granted(row));
        }
        let rest: Vec<&Claim> =
            claims.iter().filter(|claim| !found.contains_key(&row_key(&claim.key))).copied().collect();
        if !rest.is_empty() {
            for row in look(session, &rest).await? {
                found.insert(key_of(&row)?, Found::Other(row));
            }
        }
        Ok(found)
    }

    async fn claim(&self, session: &mut PgConnection, claims: &[&Claim]) -> Result<Vec<PgRow>, sqlx::Error> {
        let each = |text: fn(&Claim) -> &str| claims.iter().map(|claim| text(claim)).collect::<Vec<_>>();
        let groups: Vec<Option<String>> = claims
            .iter()
            .map(|claim| claim.revision.as_ref().map(|revision| without_nul(&revision.group).into_owned()))
            .collect();
        sqlx::query(CLAIM)
            .bind(each(|claim| organization_text(&claim.key)))
            .bind(claims.iter().map(|claim| claim.key.id).collect::<Vec<_>>())
            .bind(claims.iter().map(|claim| &claim.body_hash[..]).collect::<Vec<_>>())
            .bind(claims.iter().map(|claim| claim.turn.0).collect::<Vec<_>>())
            .bind(self.owner.0)
            .bind(&self.mine)
            .bind(&self.dead)
            .bind(&self.at_work)
            .bind(groups)
            .bind(claims.iter().map(|claim| without_nul(&claim.message_id)).collect::<Vec<_>>())
            .bind(&self.suspects)
            .bind(
                claims
                    .iter()
                    .map(|claim| claim.revision.as_ref().map(|own| own.sequence))
                    .collect::<Vec<_>>(),
            )
            .fetch_all(session)
            .await
    }
}

/// Each booking's greatest sequence in the batch, in the order in which the rows are locked.
fn raised(claims: &[&Claim]) -> BTreeMap<(String, String), i64> {
    let mut raised = BTreeMap::new();
    for claim in claims {
        if let Some(revision) = &claim.revision {
            let key = (organization_text(&claim.key).to_owned(), without_nul(&revision.group).into_owned());
            let greatest = raised.entry(key).or_insert(revision.sequence);
            *greatest = revision.sequence.max(*greatest);
        }
    }
    raised
}

async fn raise(
    session: &mut PgConnection,
    raised: &BTreeMap<(String, String), i64>,
) -> Result<(), sqlx::Error> {
    let (organizations, names): (Vec<&str>, Vec<&str>) =
        raised.keys().map(|(organization, name)| (organization.as_str(), name.as_str())).unzip();
    let sequences: Vec<i64> = raised.values().copied().collect();
    sqlx::query(RAISE).bind(organizations).bind(names).bind(sequences).execute(session).await.map(drop)
}

async fn look(session: &mut PgConnection, claims: &[&Claim]) -> Result<Vec<PgRow>, sqlx::Error> {
    sqlx::query(LOOK)
        .bind(claims.iter().map(|claim| organization_text(&claim.key)).collect::<Vec<_>>())
        .bind(claims.iter().map(|claim| claim.key.id).collect::<Vec<_>>())
        .fetch_all(session)
        .await
}

fn key_of(row: &PgRow) -> Result<RowKey, sqlx::Error> {
    Ok((row.try_get::<Uuid, _>("id")?, row.try_get("organization_id")?))
}

fn claimed(owner: Incarnation, row: &PgRow) -> Result<Claimed, sqlx::Error> {
    let refused: Option<Json<Vec<RefusedRecipient>>> = row.try_get("refused")?;
    Ok(Claimed {
        owner,
        turn: Turn(row.try_get("turn")?),
        attempts: count(row.try_get("attempts")?),
        spared: count(row.try_get("spared")?),
        first_at: row.try_get("first_at")?,
        replayed_at: row.try_get("replayed_at")?,
        reason: reason(row)?,
        now: row.try_get("now")?,
        message_id: row.try_get("message_id")?,
        pending: positions(row)?,
        refused: refused.map(|Json(refused)| refused).unwrap_or_default(),
        partly_sent: row.try_get("partly_sent")?,
        orphan: row.try_get::<Option<bool>, _>("orphan")?.map(|committing| Orphan { committing }),
        crashes: count(row.try_get("crashes")?),
        unknowns: count(row.try_get("unknowns")?),
        newest_sequence: row.try_get("newest_sequence")?,
        cancelled: row.try_get("cancelled")?,
        custom_smtp: row.try_get("custom_smtp")?,
        config_version: row.try_get("config_version")?,
        config_failing: row.try_get("config_failing")?,
    })
}

fn reason(row: &PgRow) -> Result<Option<Reason>, sqlx::Error> {
    Ok(row.try_get::<Option<&str>, _>("reason")?.and_then(Reason::from_name))
}

/// Those that are still to be sent to.
fn positions(row: &PgRow) -> Result<Option<Vec<u16>>, sqlx::Error> {
    let pending: Option<Vec<i32>> = row.try_get("pending")?;
    Ok(pending.map(|all| all.into_iter().filter_map(|index| u16::try_from(index).ok()).collect()))
}

/// A row that was not granted.
struct Standing {
    body_hash: Option<Vec<u8>>,
    state: State,
    turn: Turn,
    owner: Incarnation,
    not_before: Option<OffsetDateTime>,
    crashes: u32,
    now: OffsetDateTime,
    hand_over: HandOver,
}

impl Standing {
    fn read(row: &PgRow) -> Result<Self, StoreError> {
        let name: &str = row.try_get("state")?;
        let state = State::from_name(name)
            .ok_or_else(|| StoreError::Internal(format!("a job's state is `{name}`, which none is")))?;
        let owner = Incarnation(row.try_get("owner")?);
        let turn = Turn(row.try_get("turn")?);
        let now: OffsetDateTime = row.try_get("now")?;
        let not_before: Option<OffsetDateTime> = row.try_get("not_before")?;
        let taken_up = state == State::Claimed;
        let hand_over = HandOver {
            owner,
            turn,
            // What was claimed had been put aside for its lane: only such a copy bears the current turn there.
            state: if taken_up { State::Deferred } else { state },
            reason: reason(row)?,
            detail: row.try_get("detail")?,
            pending: positions(row)?,
            wait: not_before.map(|not_before| until(now, not_before)).unwrap_or_default(),
            attempts: count(row.try_get("attempts")?),
            first_at: row.try_get("first_at")?,
            replayed_at: row.try_get("replayed_at")?,
            age: until(row.try_get("updated_at")?, now),
            taken_up,
        };
        let body_hash = row.try_get("body_hash")?;
        let crashes = count(row.try_get("crashes")?);
        Ok(Self { body_hash, state, turn, owner, not_before, crashes, now, hand_over })
    }

    /// Why the claim is not granted; `None` when it might be, were it asked once more.
    fn refuse(self, claim: &Claim, asking: &Asking) -> Option<ClaimAnswer> {
        if self.body_hash.is_some_and(|hash| hash != claim.body_hash) {
            return Some(ClaimAnswer::IdConflict);
        }
        match self.state {
            State::Sent => Some(ClaimAnswer::AlreadySent),
            _ if claim.turn < self.turn => Some(ClaimAnswer::Stale(self.hand_over)),
            State::Claimed => {
                let died = asking.dead.contains(&self.owner.0);
                let crashes = self.crashes + u32::from(died);
                let is_free = died || (asking.mine.contains(&self.owner.0) && !asking.is_at_work(&claim.key));
                let suspect = is_free && crashes > 0 && !claim.suspects;
                Some(if suspect {
                    ClaimAnswer::Suspect { crashes }
                } else {
                    ClaimAnswer::Held { owner: self.owner }
                })
            }
            State::Deferred => {
                let early = self.not_before.filter(|not_before| *not_before > self.now);
                match early {
                    Some(not_before) => Some(ClaimAnswer::NotYet { wait: until(self.now, not_before) }),
                    None if self.crashes > 0 && !claim.suspects => {
                        Some(ClaimAnswer::Suspect { crashes: self.crashes })
                    }
                    None => None,
                }
            }
            _ if claim.turn > self.turn && self.crashes > 0 && !claim.suspects => {
                Some(ClaimAnswer::Suspect { crashes: self.crashes })
            }
            State::Parked | State::Dead | State::Unknown | State::Cancelled => {
                (claim.turn == self.turn).then_some(ClaimAnswer::Closed(self.hand_over))
            }
        }
    }
}
