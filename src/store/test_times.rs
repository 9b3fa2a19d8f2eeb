//! How often an organization has tested its server within the last minute, all workers together.
//! Guarantee: never more than the limit in any sixty seconds, however many ask at once.

use std::time::Duration;

use sqlx::Row;

use super::{Store, StoreError};
use crate::model::organization::OrganizationId;

/// Whoever comes second waits for the row's lock and sees the first one's time. Times older than a minute are forgotten
/// with the next test.
const TAKE: &str = "
INSERT INTO test_times AS t (organization_id, at) VALUES ($1, ARRAY[clock_timestamp()])
ON CONFLICT (organization_id) DO UPDATE SET at =
    array(SELECT x FROM unnest(t.at) AS x WHERE x > clock_timestamp() - interval '1 minute') || clock_timestamp()
WHERE $2 > (SELECT count(*) FROM unnest(t.at) AS x WHERE x > clock_timestamp() - interval '1 minute')
RETURNING 1";

/// When the oldest of the newest `$2` is a minute old.
const NEXT: &str = "
SELECT extract(epoch FROM x + interval '1 minute' - clock_timestamp())::float8 AS wait_s
FROM test_times AS t, unnest(t.at) AS x WHERE organization_id = $1 ORDER BY x DESC OFFSET $2 - 1 LIMIT 1";

/// For a person who waits for an answer.
const LIMIT: Duration = Duration::from_secs(4);

/// Whether a test may be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TestPermit {
    /// It may, and is counted.
    Granted,
    /// Not before this time has passed.
    Refused {
        /// From now.
        again_in: Duration,
    },
}

impl Store {
    /// Counts a test of an organization's if it has made fewer than `per_minute` in the last sixty seconds.
    ///
    /// # Errors
    /// When the database did not answer; the test may have been counted.
    pub async fn permit_test(
        &self,
        organization: &OrganizationId,
        per_minute: u32,
    ) -> Result<TestPermit, StoreError> {
        let take = sqlx::query(TAKE).bind(organization.as_str()).bind(i64::from(per_minute));
        let next = sqlx::query(NEXT).bind(organization.as_str()).bind(i64::from(per_minute));
        let refused = self
            .on_session_within(LIMIT, async |session| {
                if take.fetch_optional(&mut *session).await?.is_some() {
                    return Ok(None);
                }
                Ok(Some(next.fetch_optional(session).await?))
            })
            .await?;
        let Some(next) = refused else { return Ok(TestPermit::Granted) };
        let wait_s: f64 = next.map_or(Ok(0.0), |row| row.try_get("wait_s"))?;
        Ok(TestPermit::Refused { again_in: Duration::from_secs_f64(wait_s.clamp(0.0, 60.0)) })
    }
}
