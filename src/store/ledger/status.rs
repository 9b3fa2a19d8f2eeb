//! The ledger's answer to a question about one job.
//! Guarantee: a job whose worker's lock is free is `unknown`, never `claimed`.

use sqlx::postgres::PgRow;
use sqlx::types::Json;
use sqlx::{FromRow, Row};
use uuid::Uuid;

use super::super::incarnation::LOCK_CLASS;
use super::super::{Store, StoreError};
use super::{count, organization_text};
use crate::model::event::RefusedRecipient;
use crate::model::failure::Reason;
use crate::model::job::JobKey;
use crate::model::ledger::{AttemptRecord, JobOutcome, JobStatus, State, Turn};
use crate::model::organization::OrganizationId;

/// `$2` NULL is every organization. `$3` is the class of the incarnations' locks.
const STATUS: &str = "
SELECT organization_id, id, turn, attempts, nullif(message_id, '') AS message_id, reason, detail, reply, refused, history, first_at, updated_at,
    CASE WHEN state = 'deferred' THEN not_before END AS next_attempt_at,
    CASE WHEN state = 'claimed' AND NOT EXISTS (
        SELECT FROM pg_locks WHERE locktype = 'advisory' AND granted
            AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
            AND classid = $3::int::oid AND objid = jobs.owner::oid AND objsubid = 2
    ) THEN 'unknown' ELSE state END AS state
FROM jobs WHERE id = $1 AND ($2::text IS NULL OR organization_id = $2)
ORDER BY organization_id";

/// The rows of `$1` and `$2`, pair by pair.
const OUTCOMES: &str = "
SELECT j.organization_id, j.id, j.turn, j.state, j.reason, j.updated_at
FROM unnest($1::uuid[], $2::text[]) AS asked (id, organization_id)
JOIN jobs j ON j.id = asked.id AND j.organization_id = asked.organization_id";

impl Store {
    /// What the ledger knows of a job; `None` when it never saw it, or has forgotten it.
    ///
    /// # Errors
    /// When the database did not answer.
    pub async fn job_status(&self, key: &JobKey) -> Result<Option<JobStatus>, StoreError> {
        Ok(self.statuses(key.id, Some(organization_text(key))).await?.pop())
    }

    /// The jobs with this id in whatever organization: for the operator, who may see them all.
    ///
    /// # Errors
    /// When the database did not answer.
    pub async fn job_status_anywhere(&self, id: Uuid) -> Result<Vec<JobStatus>, StoreError> {
        self.statuses(id, None).await
    }

    /// Where these jobs stand; those which the ledger does not know are left out. A job in a dead worker's hands is
    /// `claimed` here.
    ///
    /// # Errors
    /// When the database did not answer.
    pub async fn job_outcomes(&self, keys: &[&JobKey]) -> Result<Vec<JobOutcome>, StoreError> {
        let ids: Vec<Uuid> = keys.iter().map(|key| key.id).collect();
        let organizations: Vec<&str> = keys.iter().map(|key| organization_text(key)).collect();
        let question = sqlx::query_as(OUTCOMES).bind(ids).bind(organizations);
        let rows: Vec<OutcomeRow> =
            self.on_session(async |session| question.fetch_all(session).await).await?;
        Ok(rows.into_iter().map(|OutcomeRow(outcome)| outcome).collect())
    }

    async fn statuses(&self, id: Uuid, organization: Option<&str>) -> Result<Vec<JobStatus>, StoreError> {
        let question = sqlx::query_as(STATUS).bind(id).bind(organization).bind(LOCK_CLASS);
        let rows: Vec<StatusRow> = self.on_session(async |session| question.fetch_all(session).await).await?;
        Ok(rows.into_iter().map(|StatusRow(status)| status).collect())
    }
}

fn unreadable(what: &str) -> sqlx::Error {
    sqlx::Error::Decode(format!("a job's {what} is none").into())
}

fn key(row: &PgRow) -> Result<JobKey, sqlx::Error> {
    let organization = match row.try_get("organization_id")? {
        "" => None,
        text => Some(OrganizationId::parse(text).map_err(|_| unreadable("organization"))?),
    };
    Ok(JobKey { organization, id: row.try_get("id")? })
}

fn state(row: &PgRow) -> Result<State, sqlx::Error> {
    State::from_name(row.try_get("state")?).ok_or_else(|| unreadable("state"))
}

fn reason(row: &PgRow) -> Result<Option<Reason>, sqlx::Error> {
    Ok(row.try_get::<Option<&str>, _>("reason")?.and_then(Reason::from_name))
}

struct OutcomeRow(JobOutcome);

impl FromRow<'_, PgRow> for OutcomeRow {
    fn from_row(row: &PgRow) -> Result<Self, sqlx::Error> {
        Ok(Self(JobOutcome {
            key: key(row)?,
            state: state(row)?,
            reason: reason(row)?,
            turn: Turn(row.try_get("turn")?),
            updated_at: row.try_get("updated_at")?,
        }))
    }
}

struct StatusRow(JobStatus);

impl FromRow<'_, PgRow> for StatusRow {
    fn from_row(row: &PgRow) -> Result<Self, sqlx::Error> {
        let refused: Option<Json<Vec<RefusedRecipient>>> = row.try_get("refused")?;
        let history: Option<Json<Vec<AttemptRecord>>> = row.try_get("history")?;
        Ok(Self(JobStatus {
            key: key(row)?,
            state: state(row)?,
            reason: reason(row)?,
            detail: row.try_get("detail")?,
            attempts: count(row.try_get("attempts")?),
            next_attempt_at: row.try_get("next_attempt_at")?,
            message_id: row.try_get("message_id")?,
            reply: row.try_get("reply")?,
            refused: refused.map(|Json(refused)| refused).unwrap_or_default(),
            first_at: row.try_get("first_at")?,
            updated_at: row.try_get("updated_at")?,
            turn: Turn(row.try_get("turn")?),
            history: history.map(|Json(history)| history).unwrap_or_default(),
        }))
    }
}
