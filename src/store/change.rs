//! A change of an organization's settings: one transaction, bounded in time.
//! Guarantee: every error but [`ChangeError::Unknown`] means that nothing was changed.

use std::convert::Infallible;
use std::future::Future;
use std::time::Duration;

use sqlx::pool::PoolConnection;
use sqlx::{PgConnection, Postgres};
use tokio::time::Instant;

use super::{Store, StoreError, silence};
use crate::model::organization::OrganizationId;

/// How much of a change's time is kept for its commit.
const COMMIT_LIMIT: Duration = Duration::from_secs(2);
const ROLLBACK_LIMIT: Duration = Duration::from_secs(1);
/// A lock held by somebody else ends the wait in the database, so that the connection can be used further.
const BEGIN: &str = "BEGIN; SET LOCAL lock_timeout = '3s'";

/// An open transaction. Dropped without an end, it closes its connection: one that did not answer is of no more use.
pub(super) struct Tx {
    connection: PoolConnection<Postgres>,
    open: bool,
}

/// Why a change was not made. `R`: what the caller's own rule, asked under the lock, refuses with.
#[derive(Debug, thiserror::Error)]
pub enum ChangeError<R = Infallible> {
    /// The organization has a configuration.
    #[error("the organization already has an SMTP configuration")]
    AlreadyExists,
    /// It has none.
    #[error("the organization has no SMTP configuration")]
    NotFound,
    /// Another version than the caller's is current.
    #[error("the current version is {current}")]
    Conflict {
        /// The current version.
        current: i64,
    },
    /// The caller's rule does not allow it.
    #[error("refused")]
    Refused(R),
    /// The connection was lost at the commit: the change may have been made.
    #[error("it is not known whether the change was made: {0}")]
    Unknown(String),
    /// The database did not do it.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl<R> From<sqlx::Error> for ChangeError<R> {
    fn from(error: sqlx::Error) -> Self {
        // 55P03: somebody else holds the row, and the wait for it is over.
        let busy = error.as_database_error().and_then(|e| e.code()).is_some_and(|code| code == "55P03");
        Self::Store(if busy { StoreError::Unavailable(error.to_string()) } else { error.into() })
    }
}

impl Tx {
    pub(super) async fn begin(store: &Store) -> Result<Self, sqlx::Error> {
        let mut tx = Self { connection: store.pool.acquire().await?, open: true };
        sqlx::raw_sql(BEGIN).execute(tx.connection()).await?;
        Ok(tx)
    }

    pub(super) fn connection(&mut self) -> &mut PgConnection {
        &mut self.connection
    }

    /// Takes the organization's row for update, making it when there is none. Every change of an organization takes
    /// this lock first, so two changes neither overlap nor deadlock.
    pub(super) async fn lock(&mut self, organization: &OrganizationId) -> Result<(), sqlx::Error> {
        sqlx::query("INSERT INTO organizations (organization_id) VALUES ($1) ON CONFLICT DO NOTHING")
            .bind(organization.as_str())
            .execute(self.connection())
            .await?;
        sqlx::query("SELECT 1 FROM organizations WHERE organization_id = $1 FOR UPDATE")
            .bind(organization.as_str())
            .execute(self.connection())
            .await?;
        Ok(())
    }

    /// Keeps the transaction for its commit when the work in it went well; takes everything back when it did not.
    pub(super) async fn keep<T, R>(
        mut self,
        done: Result<T, ChangeError<R>>,
    ) -> Result<(Self, T), ChangeError<R>> {
        match done {
            Ok(value) => Ok((self, value)),
            Err(error) => {
                let rollback = sqlx::raw_sql("ROLLBACK").execute(self.connection());
                let ended = tokio::time::timeout(ROLLBACK_LIMIT, rollback).await;
                self.open = !matches!(ended, Ok(Ok(_)));
                Err(error)
            }
        }
    }

    /// Commits. A failure here leaves it open what has become of the change.
    pub(super) async fn commit<R>(mut self) -> Result<(), ChangeError<R>> {
        let commit = sqlx::raw_sql("COMMIT").execute(self.connection());
        match tokio::time::timeout(COMMIT_LIMIT, commit).await {
            Ok(Ok(_)) => {
                self.open = false;
                Ok(())
            }
            Ok(Err(error)) => Err(ChangeError::Unknown(error.to_string())),
            Err(_) => Err(ChangeError::Unknown(format!("no answer within {} s", COMMIT_LIMIT.as_secs()))),
        }
    }
}

impl Drop for Tx {
    fn drop(&mut self) {
        if self.open {
            self.connection.close_on_drop();
        }
    }
}

/// Runs what precedes the commit, so that a change is over at `by`.
pub(super) async fn prepare<T, R>(
    by: Instant,
    work: impl Future<Output = Result<T, ChangeError<R>>>,
) -> Result<T, ChangeError<R>> {
    match tokio::time::timeout_at(by - COMMIT_LIMIT, work).await {
        Ok(done) => done,
        Err(elapsed) => Err(ChangeError::Store(silence(elapsed))),
    }
}
