//! Calling jobs back: one by its id, or a booking's up to a revision.
//! Guarantee: what is counted as cancelled is never sent; what a worker has, or may have sent, is counted as too late, and is
//! not tried again. Both hold for every copy, and for jobs that come later.

use sqlx::{PgConnection, Row};
use tokio::time::Instant;
use uuid::Uuid;

use super::super::audit::{self, AuditEntry};
use super::super::change::{self, ChangeError, Tx};
use super::{Store, organization_text, without_nul};
use crate::model::cancelling::{Cancellation, UNSENT, UNSURE};
use crate::model::job::{JobKey, Revision};
use crate::model::organization::OrganizationId;

/// Locks the job's row. A job that nobody has seen gets one of a turn before every copy's: the first copy that comes is
/// claimed, and given up.
const ENTER: &str = "
INSERT INTO jobs AS j (organization_id, id, state, turn, owner, first_at, updated_at, reason, detail, cancel_requested)
VALUES ($1, $2, 'cancelled', -1, 0, now(), now(), 'cancelled', $3, true)
ON CONFLICT (id, organization_id) DO UPDATE SET cancel_requested = true";

/// Locks the booking's row before those of its jobs, as a claim does: what is claimed afterwards finds the revision here.
const RAISE: &str = "
INSERT INTO job_groups AS g (organization_id, name, sequence, cancelled, updated_at) VALUES ($1, $2, $3, $3, now())
ON CONFLICT (organization_id, name) DO UPDATE SET
    sequence = greatest(g.sequence, excluded.sequence),
    cancelled = greatest(g.cancelled, excluded.cancelled),
    updated_at = now()";

/// In the order in which everybody locks jobs.
const LOCK: &str = "
SELECT id FROM jobs WHERE organization_id = $1 AND group_name = $2 AND sequence <= $3 ORDER BY id FOR NO KEY UPDATE";

/// The locked rows. One is idle where nothing of it is under way, nobody has the message, and nobody may have it without its
/// being said: `unknown_outcome` stays said. Owner and turn stay, for they tell where the copy comes from that brings the dead
/// letter. A waiting job that some recipients have is left to its next claim, which gives the others up; its reason tells
/// whoever succeeds that claim that nothing was sent under it.
const CALL_BACK: &str = "
UPDATE jobs AS j SET
    cancel_requested = true,
    state = CASE WHEN was.idle THEN 'cancelled' ELSE j.state END,
    reason = CASE WHEN was.idle OR was.state = 'deferred' AND was.orphan IS NULL THEN 'cancelled' ELSE j.reason END,
    detail = CASE WHEN was.idle THEN CASE WHEN j.unknowns = 0 THEN $3 ELSE $4 END ELSE j.detail END,
    not_before = CASE WHEN was.idle THEN NULL ELSE j.not_before END,
    updated_at = CASE WHEN was.idle OR was.state = 'cancelled' THEN now() ELSE j.updated_at END
FROM (
    SELECT id, state, orphan,
        state IN ('deferred', 'parked') AND NOT partly_sent AND orphan IS NULL
            OR state = 'dead' AND reason IS DISTINCT FROM 'unknown_outcome' AS idle
    FROM jobs WHERE organization_id = $1 AND id = ANY ($2)
) AS was
WHERE j.id = was.id AND j.organization_id = $1
RETURNING j.state = 'cancelled' OR j.state IN ('deferred', 'parked') AND j.orphan IS NULL AS cancelled";

impl Store {
    /// Calls one job back, whether the ledger knows it or not; over at `by`. It may be repeated.
    ///
    /// # Errors
    /// [`ChangeError::Store`] and [`ChangeError::Unknown`].
    pub async fn cancel_job(
        &self,
        key: &JobKey,
        audit: AuditEntry<'_>,
        by: Instant,
    ) -> Result<Cancellation, ChangeError> {
        let organization = organization_text(key);
        let locking = async |session: &mut PgConnection| {
            sqlx::query(ENTER).bind(organization).bind(key.id).bind(UNSENT).execute(session).await?;
            Ok(vec![key.id])
        };
        self.cancel(organization, locking, audit, by).await
    }

    /// Calls back every job of a booking up to this revision, those that come later too; over at `by`. Counted are those
    /// that the ledger knows. It may be repeated.
    ///
    /// # Errors
    /// [`ChangeError::Store`] and [`ChangeError::Unknown`].
    pub async fn cancel_group(
        &self,
        organization: Option<&OrganizationId>,
        revision: &Revision,
        audit: AuditEntry<'_>,
        by: Instant,
    ) -> Result<Cancellation, ChangeError> {
        let organization = organization.map_or("", OrganizationId::as_str);
        let locking = async |session: &mut PgConnection| {
            let group = without_nul(&revision.group);
            let raise = sqlx::query(RAISE).bind(organization).bind(&group).bind(revision.sequence);
            raise.execute(&mut *session).await?;
            let lock = sqlx::query_scalar(LOCK).bind(organization).bind(&group).bind(revision.sequence);
            lock.fetch_all(session).await
        };
        self.cancel(organization, locking, audit, by).await
    }

    async fn cancel(
        &self,
        organization: &str,
        locking: impl AsyncFnOnce(&mut PgConnection) -> Result<Vec<Uuid>, sqlx::Error>,
        audit: AuditEntry<'_>,
        by: Instant,
    ) -> Result<Cancellation, ChangeError> {
        let prepared = change::prepare(by, async {
            let mut tx = Tx::begin(self).await?;
            let done = async {
                let jobs = locking(tx.connection()).await?;
                let cancellation = call_back(tx.connection(), organization, &jobs).await?;
                audit::insert(tx.connection(), audit).await?;
                Ok(cancellation)
            };
            let done = done.await;
            tx.keep(done).await
        });
        let (tx, cancellation) = prepared.await?;
        tx.commit().await?;
        Ok(cancellation)
    }
}

async fn call_back(
    session: &mut PgConnection,
    organization: &str,
    jobs: &[Uuid],
) -> Result<Cancellation, sqlx::Error> {
    let rows = sqlx::query(CALL_BACK)
        .bind(organization)
        .bind(jobs)
        .bind(UNSENT)
        .bind(UNSURE)
        .fetch_all(session)
        .await?;
    let mut cancellation = Cancellation::default();
    for row in &rows {
        match row.try_get("cancelled")? {
            true => cancellation.cancelled += 1,
            false => cancellation.too_late += 1,
        }
    }
    Ok(cancellation)
}
