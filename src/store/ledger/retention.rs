//! Forgetting: what was finished longer ago than the ledger remembers.
//! Guarantee: an unfinished job is never forgotten; one call looks at a bounded number of rows and waits for nobody.

use std::time::Duration;

use sqlx::Row;
use uuid::Uuid;

use super::super::{Store, StoreError};

/// Rows looked at in one call.
const SLICE: i64 = 1000;

/// The archived letter of a dead job is a little younger than its row; a day more, and it is always forgotten first.
const LETTER_GRACE: Duration = Duration::from_secs(24 * 3600);

/// Walks along the key, for there is no index on any time. A locked row is at work, so it is passed over.
const SWEEP_JOBS: &str = "
WITH slice AS MATERIALIZED (
    SELECT id, organization_id, state, updated_at FROM jobs
    WHERE $1::uuid IS NULL OR (id, organization_id) > ($1, $2)
    ORDER BY id, organization_id LIMIT $3
), doomed AS MATERIALIZED (
    SELECT jobs.id, jobs.organization_id FROM slice
    CROSS JOIN LATERAL (
        SELECT id, organization_id, state, updated_at FROM jobs
        WHERE jobs.id = slice.id AND jobs.organization_id = slice.organization_id
            AND ((jobs.state IN ('sent', 'cancelled') AND jobs.updated_at < now() - $4 * interval '1 second')
                OR (jobs.state = 'dead' AND jobs.updated_at < now() - $5 * interval '1 second'))
        FOR UPDATE SKIP LOCKED
    ) AS jobs
), gone AS (
    DELETE FROM jobs USING doomed
    WHERE jobs.id = doomed.id AND jobs.organization_id = doomed.organization_id RETURNING 1
)
SELECT (SELECT count(*) FROM slice) AS seen, (SELECT count(*) FROM gone) AS forgotten, last.id, last.organization_id
FROM (SELECT 1) AS one
LEFT JOIN LATERAL (SELECT id, organization_id FROM slice ORDER BY id DESC, organization_id DESC LIMIT 1) AS last ON true";

const SWEEP_GROUPS: &str = "
WITH slice AS MATERIALIZED (
    SELECT organization_id, name, updated_at FROM job_groups
    WHERE $1::text IS NULL OR (organization_id, name) > ($1, $2)
    ORDER BY organization_id, name LIMIT $3
), doomed AS MATERIALIZED (
    SELECT g.organization_id, g.name FROM slice
    CROSS JOIN LATERAL (
        SELECT organization_id, name FROM job_groups
        WHERE job_groups.organization_id = slice.organization_id AND job_groups.name = slice.name
            AND job_groups.updated_at < now() - $4 * interval '1 second'
        FOR UPDATE SKIP LOCKED
    ) AS g
), gone AS (
    DELETE FROM job_groups AS g USING doomed
    WHERE g.organization_id = doomed.organization_id AND g.name = doomed.name RETURNING 1
)
SELECT (SELECT count(*) FROM slice) AS seen, (SELECT count(*) FROM gone) AS forgotten,
    last.organization_id, last.name
FROM (SELECT 1) AS one
LEFT JOIN LATERAL (
    SELECT organization_id, name FROM slice ORDER BY organization_id DESC, name DESC LIMIT 1
) AS last ON true";

/// What one call did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Sweep {
    /// Rows looked at, jobs and bookings.
    pub seen: u64,
    /// Rows deleted, jobs and bookings.
    pub forgotten: u64,
    /// Both tables were at their end: the next call begins anew.
    pub complete: bool,
}

/// A place in the ledger from which the next slice is looked at.
pub struct Sweeper {
    store: Store,
    job: Option<(Uuid, String)>,
    group: Option<(String, String)>,
}

impl Sweeper {
    /// Begins at the beginning.
    pub fn new(store: Store) -> Self {
        Self { store, job: None, group: None }
    }

    /// Looks at the next thousand jobs and bookings and deletes the jobs that were finished, and the bookings whose revision
    /// last rose, longer than `retention` ago (by the database's clock).
    ///
    /// # Errors
    /// When the database did not answer; the same slice is looked at again.
    pub async fn sweep(&mut self, retention: Duration) -> Result<Sweep, StoreError> {
        let jobs = self.sweep_jobs(retention).await?;
        let groups = self.sweep_groups(retention).await?;
        Ok(Sweep {
            seen: jobs.seen + groups.seen,
            forgotten: jobs.forgotten + groups.forgotten,
            complete: jobs.complete && groups.complete,
        })
    }

    async fn sweep_jobs(&mut self, retention: Duration) -> Result<Sweep, StoreError> {
        let (id, organization) = self.job.clone().unzip();
        let question = sqlx::query(SWEEP_JOBS)
            .bind(id)
            .bind(organization)
            .bind(SLICE)
            .bind(retention.as_secs_f64())
            .bind((retention + LETTER_GRACE).as_secs_f64());
        let row = self.store.on_session(async |session| question.fetch_one(session).await).await?;
        let sweep = read(&row)?;
        let last = Option::zip(row.try_get("id")?, row.try_get("organization_id")?);
        self.job = last.filter(|_| !sweep.complete);
        Ok(sweep)
    }

    async fn sweep_groups(&mut self, retention: Duration) -> Result<Sweep, StoreError> {
        let (organization, name) = self.group.clone().unzip();
        let question =
            sqlx::query(SWEEP_GROUPS).bind(organization).bind(name).bind(SLICE).bind(retention.as_secs_f64());
        let row = self.store.on_session(async |session| question.fetch_one(session).await).await?;
        let sweep = read(&row)?;
        let last = Option::zip(row.try_get("organization_id")?, row.try_get("name")?);
        self.group = last.filter(|_| !sweep.complete);
        Ok(sweep)
    }
}

fn read(row: &sqlx::postgres::PgRow) -> Result<Sweep, sqlx::Error> {
    let seen: i64 = row.try_get("seen")?;
    let forgotten: i64 = row.try_get("forgotten")?;
    Ok(Sweep { seen: seen.unsigned_abs(), forgotten: forgotten.unsigned_abs(), complete: seen < SLICE })
}
