//! Organizations that have recovered, until what was parked for them is released and that is announced.
//! Guarantee: a recovery is forgotten only as it was announced; one that has come or grown since is announced anew.

use sqlx::Row;
use time::OffsetDateTime;
use uuid::Uuid;

use crate::model::letter::LetterId;
use crate::model::organization::OrganizationId;
use crate::store::{Store, StoreError, Trouble, reason_from};

/// One of a moment ago may still have letters on their way into the archive. `$1` are letters that cannot be released: nobody
/// waits for them.
const FINISHED: &str = "
SELECT r.organization_id, r.recovered_at, r.released, r.failing_version, r.failing_reason, r.failing_hint
FROM recoveries AS r LEFT JOIN smtp_configs AS c USING (organization_id)
WHERE r.recovered_at <= now() - interval '1 second' AND (c.failing_since IS NOT NULL OR NOT EXISTS (
    SELECT FROM dead_letters AS d
    WHERE d.state = 'parked' AND d.organization_id = r.organization_id AND d.died_at < r.recovered_at
        AND d.letter <> ALL ($1)
))
ORDER BY r.recovered_at LIMIT 100";

const FORGET: &str =
    "DELETE FROM recoveries WHERE organization_id = $1 AND recovered_at = $2 AND released = $3";

/// An organization whose mail flows again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recovery {
    /// Whose.
    pub organization: OrganizationId,
    /// Since when.
    pub at: OffsetDateTime,
    /// Parked jobs that went back to their lanes.
    pub released: u64,
    /// What it had failed for, where nobody has announced that yet.
    pub unannounced: Option<Trouble>,
}

impl Store {
    /// Recoveries of which no letter is left that was parked before, or that have ended in another failure; the oldest
    /// hundred. Letters of `left` are not waited for.
    ///
    /// # Errors
    /// When the database did not answer.
    pub async fn finished_recoveries(&self, left: &[LetterId]) -> Result<Vec<Recovery>, StoreError> {
        let left: Vec<Uuid> = left.iter().map(|letter| letter.0).collect();
        let question = sqlx::query(FINISHED).bind(left);
        let rows = self.on_session(async |session| question.fetch_all(session).await).await?;
        rows.iter()
            .map(|row| {
                let id: &str = row.try_get("organization_id")?;
                let organization = OrganizationId::stored(id)
                    .map_err(|_| StoreError::Internal(format!("`{id}` is stored as an organization")))?;
                let released = row.try_get::<i64, _>("released")?.unsigned_abs();
                let version: Option<i64> = row.try_get("failing_version")?;
                let unannounced = match version {
                    Some(version) => Some(Trouble {
                        organization: organization.clone(),
                        version,
                        reason: reason_from(row.try_get("failing_reason")?),
                        hint: row.try_get::<Option<String>, _>("failing_hint")?.unwrap_or_default(),
                    }),
                    None => None,
                };
                Ok(Recovery { organization, at: row.try_get("recovered_at")?, released, unannounced })
            })
            .collect()
    }

    /// This recovery is announced.
    ///
    /// # Errors
    /// When the database did not answer; it may be repeated.
    pub async fn forget_recovery(&self, recovery: &Recovery) -> Result<(), StoreError> {
        let released = i64::try_from(recovery.released).unwrap_or(i64::MAX);
        let question =
            sqlx::query(FORGET).bind(recovery.organization.as_str()).bind(recovery.at).bind(released);
        self.on_session(async |session| question.execute(session).await).await.map(drop)
    }
}
