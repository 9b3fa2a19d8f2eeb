//! What the last connection test of a stored configuration found.
//! Guarantee: a result is kept with the version that was tested only, and no later result gives way to an earlier one.

use std::time::Duration;

use super::{LastTest, SmtpConfigs};
use crate::model::organization::OrganizationId;
use crate::store::StoreError;

const RECORD: &str = "
UPDATE smtp_configs SET last_test_at = $3, last_test_ok = $4, last_test_code = $5
WHERE organization_id = $1 AND version = $2 AND (last_test_at IS NULL OR last_test_at <= $3)";

impl SmtpConfigs {
    /// Keeps a result, unless the configuration was changed or deleted meanwhile.
    ///
    /// # Errors
    /// When the database did not take it within `limit`.
    pub async fn record_test(
        &self,
        organization: &OrganizationId,
        version: i64,
        test: &LastTest,
        limit: Duration,
    ) -> Result<(), StoreError> {
        let question = sqlx::query(RECORD)
            .bind(organization.as_str())
            .bind(version)
            .bind(test.at)
            .bind(test.ok)
            .bind(test.code.as_deref());
        self.store.on_session_within(limit, async |session| question.execute(session).await).await.map(drop)
    }
}
