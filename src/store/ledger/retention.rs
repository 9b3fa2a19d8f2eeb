//! Forgetting: what was finished longer ago than the ledger remembers.
//! Guarantee: an unfinished job is never forgotten, nor one with a letter in the archive; one call looks at a bounded
//! number of rows and waits for no row that somebody else has locked.

use std::time::Duration;

use sqlx::postgres::PgRow;
use sqlx::{AssertSqlSafe, Connection, PgConnection, Row};
use time::OffsetDateTime;
use tokio::time::Instant;

use super::super::{Store, StoreError};

/// Rows of each table looked at in one call.
const SLICE: i64 = 1000;

/// How long what had to stay is left alone before it is looked at once more.
const ANEW: Duration = Duration::from_secs(24 * 3600);

/// Along the index on `first_at`, which never changes, up to an hour before the retention: nearly every job is finished
/// within an hour of its first sight, so that one look is enough for it. What may go is decided on the locked row as it is
/// then. Letters are looked for by the id alone: given the organization too, a planner without statistics reads all of an
/// organization's letters for each job.
const JOBS: &str = "
WITH slice AS MATERIALIZED (
    SELECT ctid, first_at FROM jobs
    WHERE first_at >= coalesce($1, '-infinity') AND first_at < now() - $2 * interval '1 second' - interval '1 hour'
    ORDER BY first_at LIMIT $3
), doomed AS MATERIALIZED (
    SELECT locked.ctid FROM slice
    CROSS JOIN LATERAL (
        SELECT jobs.ctid FROM jobs
        WHERE jobs.ctid = slice.ctid
            AND jobs.state IN ('sent', 'cancelled', 'dead')
            AND jobs.updated_at < now() - $2 * interval '1 second'
            AND NOT EXISTS (SELECT FROM dead_letters AS letters WHERE letters.job_id = jobs.id)
        FOR UPDATE OF jobs SKIP LOCKED
    ) AS locked
), gone AS (
    DELETE FROM jobs WHERE ctid = ANY (ARRAY(SELECT ctid FROM doomed)) RETURNING 1
)
SELECT (SELECT count(*) FROM slice) AS seen, (SELECT count(*) FROM gone) AS forgotten,
    (SELECT max(first_at) FROM slice) AS last";

/// Along the key: an index on `updated_at` would be written whenever a booking's sequence rises.
const GROUPS: &str = "
WITH slice AS MATERIALIZED (
    SELECT ctid, organization_id, name, updated_at FROM job_groups
    WHERE $1::text IS NULL OR (organization_id, name) > ($1, $2)
    ORDER BY organization_id, name LIMIT $4
), doomed AS MATERIALIZED (
    SELECT locked.ctid FROM slice
    CROSS JOIN LATERAL (
        SELECT job_groups.ctid FROM job_groups
        WHERE job_groups.ctid = slice.ctid AND job_groups.updated_at < now() - $3 * interval '1 second'
        FOR UPDATE SKIP LOCKED
    ) AS locked
    WHERE slice.updated_at < now() - $3 * interval '1 second'
), gone AS (
    DELETE FROM job_groups WHERE ctid = ANY (ARRAY(SELECT ctid FROM doomed)) RETURNING 1
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
    /// Nothing is left to look at for now.
    pub complete: bool,
}

/// A place in the ledger from which the next slice is looked at. Any number of sweepers may be at work.
pub struct Sweeper {
    store: Store,
    jobs: Pass<OffsetDateTime>,
    groups: Pass<(String, String)>,
}

/// One way through a table, from its beginning.
struct Pass<Place> {
    /// None of its rows was looked at while this is `None`.
    at: Option<Place>,
    begun: Instant,
    complete: bool,
}

impl<Place> Pass<Place> {
    fn new() -> Self {
        Self { at: None, begun: Instant::now(), complete: false }
    }

    fn is_old(&self) -> bool {
        self.complete && self.begun.elapsed() >= ANEW
    }
}

impl Pass<OffsetDateTime> {
    /// Goes on behind a slice. Jobs of one batch have the same `first_at`, so what follows begins at the last one seen; a
    /// whole slice of one moment, of which nothing could go, is left behind.
    fn advance(&mut self, last: Option<OffsetDateTime>, sweep: &Sweep) {
        self.complete = sweep.complete;
        if let Some(last) = last {
            let stuck = self.at == Some(last) && sweep.forgotten == 0;
            let leave = stuck || sweep.complete;
            self.at = Some(if leave { last + time::Duration::MICROSECOND } else { last });
        }
    }
}

impl Sweeper {
    /// Begins at the beginning.
    pub fn new(store: Store) -> Self {
        Self { store, jobs: Pass::new(), groups: Pass::new() }
    }

    /// Looks at the next thousand jobs and bookings and deletes the jobs that were finished, and the bookings whose revision
    /// last rose, longer than `retention` ago (by the database's clock). What has to stay is passed over, and looked at
    /// again a day later.
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

    /// How the database carries out the next look at the jobs: `EXPLAIN (ANALYZE, BUFFERS)`, line by line. Nothing is
    /// deleted, and the sweeper stays where it is.
    ///
    /// # Errors
    /// When the database did not answer.
    pub async fn plan(&self, retention: Duration) -> Result<Vec<String>, StoreError> {
        let explain = async |session: &mut PgConnection| {
            let mut transaction = session.begin().await?;
            let plan = sqlx::query_scalar(AssertSqlSafe(format!("EXPLAIN (ANALYZE, BUFFERS) {JOBS}")))
                .bind(self.jobs.at)
                .bind(retention.as_secs_f64())
                .bind(SLICE)
                .fetch_all(&mut *transaction)
                .await?;
            transaction.rollback().await?;
            Ok(plan)
        };
        self.store.on_session(explain).await
    }

    async fn sweep_jobs(&mut self, retention: Duration) -> Result<Sweep, StoreError> {
        if self.jobs.is_old() {
            self.jobs = Pass::new();
        }
        let question = sqlx::query(JOBS).bind(self.jobs.at).bind(retention.as_secs_f64()).bind(SLICE);
        let row = self.store.on_session(async |session| question.fetch_one(session).await).await?;
        let sweep = read(&row)?;
        self.jobs.advance(row.try_get("last")?, &sweep);
        Ok(sweep)
    }

    async fn sweep_groups(&mut self, retention: Duration) -> Result<Sweep, StoreError> {
        if self.groups.is_old() {
            self.groups = Pass::new();
        }
        if self.groups.complete {
            return Ok(Sweep { complete: true, ..Sweep::default() });
        }
        let (organization, name) = self.groups.at.clone().unzip();
        let question =
            sqlx::query(GROUPS).bind(organization).bind(name).bind(retention.as_secs_f64()).bind(SLICE);
        let row = self.store.on_session(async |session| question.fetch_one(session).await).await?;
        let sweep = read(&row)?;
        self.groups.complete = sweep.complete;
        self.groups.at =
            Option::zip(row.try_get("organization_id")?, row.try_get("name")?).or(self.groups.at.take());
        Ok(sweep)
    }
}

fn read(row: &PgRow) -> Result<Sweep, sqlx::Error> {
    let seen: i64 = row.try_get("seen")?;
    let forgotten: i64 = row.try_get("forgotten")?;
    Ok(Sweep { seen: seen.unsigned_abs(), forgotten: forgotten.unsigned_abs(), complete: seen < SLICE })
}
