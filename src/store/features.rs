//! The feature flag of an organization: whether it may send through a server of its own.
//! Guarantee: a flag that was answered as set is in the answer of every later claim.

use super::Store;
use super::audit::{self, AuditEntry};
use super::change::{self, ChangeError};
use crate::model::organization::OrganizationId;

impl Store {
    /// Switches `custom-smtp-for-orgs` on or off.
    ///
    /// # Errors
    /// [`ChangeError::Store`] and [`ChangeError::Unknown`].
    pub async fn set_custom_smtp(
        &self,
        organization: &OrganizationId,
        enabled: bool,
        audit: AuditEntry<'_>,
    ) -> Result<(), ChangeError> {
        let tx = change::prepare(async {
            let mut tx = change::begin(self).await?;
            change::lock(&mut tx, organization).await?;
            sqlx::query("UPDATE organizations SET custom_smtp = $2 WHERE organization_id = $1")
                .bind(organization.as_str())
                .bind(enabled)
                .execute(&mut *tx)
                .await?;
            audit::insert(&mut tx, audit).await?;
            Ok(tx)
        });
        change::commit(tx.await?).await
    }
}
