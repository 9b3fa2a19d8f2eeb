//! Who asked for what, and what came of it: one row for each control command, and for each replay and discard.
//! Guarantee: an entry has no room for a value that a command carried; it names fields only. What a replay or a discard
//! adds is its filter and its counts.

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

/// The entry of something that takes its time, to be finished later.
#[derive(Debug, Clone, Copy)]
pub struct OpenEntry(i64);

impl Store {
    /// Writes an entry for a command that changed nothing.
    ///
    /// # Errors
    /// When the database did not take it within `limit`.
    pub async fn record_audit(&self, entry: AuditEntry<'_>, limit: Duration) -> Result<(), StoreError> {
        // Half of it for a session of the pool, half for the statement.
        self.on_session_within(limit / 2, async |session| insert(session, entry).await).await
    }

    /// Writes the entry of something that begins, with a summary: filters and counts, no content. Whatever becomes of it,
    /// the entry stays.
    ///
    /// # Errors
    /// When the database did not answer.
    pub async fn begin_audit(
        &self,
        entry: AuditEntry<'_>,
        summary: serde_json::Value,
    ) -> Result<OpenEntry, StoreError> {
        self.on_session(async |session| write(session, entry, Some(summary)).await).await.map(OpenEntry)
    }

    /// Finishes it: `outcome` as in [`AuditEntry`], `summary` laid over what it began with.
    ///
    /// # Errors
    /// When the database did not answer.
    pub async fn finish_audit(
        &self,
        OpenEntry(id): OpenEntry,
        outcome: &str,
        summary: serde_json::Value,
    ) -> Result<(), StoreError> {
        let question = sqlx::query("UPDATE audit SET outcome = $2, summary = summary || $3 WHERE id = $1")
            .bind(id)
            .bind(outcome)
            .bind(summary);
        self.on_session(async |session| question.execute(session).await).await.map(drop)
    }
}

/// Writes an entry within the change's own transaction.
pub(super) async fn insert(connection: &mut PgConnection, entry: AuditEntry<'_>) -> Result<(), sqlx::Error> {
    write(connection, entry, None).await.map(drop)
}

/// The entry's number.
async fn write(
    connection: &mut PgConnection,
    entry: AuditEntry<'_>,
    summary: Option<serde_json::Value>,
) -> Result<i64, sqlx::Error> {
    sqlx::query_scalar(
        "INSERT INTO audit (actor, user_id, organization_id, command, outcome, fields, summary) \
         VALUES ($1, $2, $3, $4, $5, $6, $7) RETURNING id",
    )
    .bind(entry.actor)
    .bind(entry.user_id)
    .bind(entry.organization.map(OrganizationId::as_str))
    .bind(entry.command)
    .bind(entry.outcome)
    .bind(entry.fields)
    .bind(summary)
    .fetch_one(connection)
    .await
}
