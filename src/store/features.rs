//! The feature flag of an organization: whether it may send through a server of its own.
//! Guarantee: a flag that was answered as set is in the answer of every later claim.

use tokio::time::Instant;

use super::Store;
use super::audit::{self, AuditEntry};
use super::change::{self, ChangeError, Tx};
use crate::model::organization::OrganizationId;

impl Store {
    /// Switches `custom-smtp-for-orgs` on or off; over at `by`.
    ///
    /// # Errors
    /// [`ChangeError::Store`] and [`ChangeError::Unknown`].
    pub async fn set_custom_smtp(
        &self,
        organization: &OrganizationId,
        enabled: bool,
        audit: AuditEntry<'_>,
        by: Instant,
    ) -> Result<(), ChangeError> {
        let prepared = change::prepare(by, async {
            let mut tx = Tx::begin(self).await?;
            let done = set(&mut tx, organization, enabled, audit).await;
            tx.keep(done).await
        });
        let (tx, ()) = prepared.await?;
        tx.commit().await
    }
}

async fn set(
    tx: &mut Tx,
    organization: &OrganizationId,
    enabled: bool,
    audit: AuditEntry<'_>,
) -> Result<(), ChangeError> {
    tx.lock(organization).await?;
    sqlx::query("UPDATE organizations SET custom_smtp = $2 WHERE organization_id = $1")
        .bind(organization.as_str())
        .bind(enabled)
        .execute(tx.connection())
        .await?;
    Ok(audit::insert(tx.connection(), audit).await?)
}
