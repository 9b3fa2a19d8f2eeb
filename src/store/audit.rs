//! Who asked for what, and what came of it: one row for each control command.
//! Guarantee: an entry has no room for a value that a command carried; it names fields only.

use std::time::Duration;

use sqlx::PgConnection;

use super::{Store, StoreError};
use crate::model::organization::OrganizationId;

/// One row of the audit log.
#[derive(Debug, Clone, Copy)]
pub struct AuditEntry<'a> {
    /// As the command says.
    pub actor: Option<&'a str>,
    /// As the broker has verified.
    pub user_id: Option<&'a str>,
    /// Whose settings; `None` where the command did not name an organization properly.
    pub organization: Option<&'a OrganizationId>,
    /// The command's name.
    pub command: &'a str,
    /// `ok`, or the code of the error.
    pub outcome: &'a str,
    /// Names of the parameters that were given.
    pub fields: &'a [&'static str],
}

impl Store {
    /// Writes an entry for a command that changed nothing.
    ///
    /// # Errors
    /// When the database did not take it within `limit`.
    pub async fn record_audit(&self, entry: AuditEntry<'_>, limit: Duration) -> Result<(), StoreError> {
        // Half of it for a session of the pool, half for the statement.
        self.on_session_within(limit / 2, async |session| insert(session, entry).await).await
    }
}

/// Writes an entry within the change's own transaction.
pub(super) async fn insert(connection: &mut PgConnection, entry: AuditEntry<'_>) -> Result<(), sqlx::Error> {
    sqlx::query(
        "INSERT INTO audit (actor, user_id, organization_id, command, outcome, fields) VALUES ($1, $2, $3, $4, $5, $6)",
    )
    .bind(entry.actor)
    .bind(entry.user_id)
    .bind(entry.organization.map(OrganizationId::as_str))
    .bind(entry.command)
    .bind(entry.outcome)
    .bind(entry.fields)
    .execute(connection)
    .await?;
    Ok(())
}
