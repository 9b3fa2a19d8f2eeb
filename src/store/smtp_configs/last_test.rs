//! What the last connection test of a stored configuration found.
//! Guarantee: a result is kept with the version that was tested only, with the time by the database's clock; of two results
//! the one that came later stays.

use std::time::Duration;

use super::SmtpConfigs;
use crate::model::organization::OrganizationId;
use crate::store::StoreError;

const RECORD: &str = "
UPDATE smtp_configs SET last_test_at = now(), last_test_ok = $3 IS NULL, last_test_code = $3
WHERE organization_id = $1 AND version = $2";

impl SmtpConfigs {
    /// Keeps a result, the error's code or `None` of a test that went through, unless the configuration was changed or deleted
    /// meanwhile.
    ///
    /// # Errors
    /// When the database did not take it within `limit`.
    pub async fn record_test(
        &self,
        organization: &OrganizationId,
        version: i64,
        code: Option<&str>,
        limit: Duration,
    ) -> Result<(), StoreError> {
        let question = sqlx::query(RECORD).bind(organization.as_str()).bind(version).bind(code);
        self.store.on_session_within(limit, async |session| question.execute(session).await).await.map(drop)
    }
}
