//! PostgreSQL: the ledger, the configurations, the audit log. The only folder that knows sqlx.
//! Guarantee: no type of the driver leaves this folder.

pub mod audit;
mod change;
pub mod config_cache;
pub mod config_changes;
mod features;
pub mod smtp_configs;

pub use change::ChangeError;

use std::str::FromStr;
use std::time::Duration;

use secrecy::{ExposeSecret, SecretString};
use sqlx::migrate::Migrator;
use sqlx::postgres::{PgConnectOptions, PgPool, PgPoolOptions};

static MIGRATIONS: Migrator = sqlx::migrate!();

/// A handle on the database; cheap to clone. It connects when it is first used, and again after a loss.
#[derive(Clone)]
pub struct Store {
    pool: PgPool,
    options: PgConnectOptions,
}

/// Why the database did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// It cannot be reached now; the same call may go through later.
    #[error("the database is not reachable: {0}")]
    Unavailable(String),
    /// It answered with an error, or with something that should not be there.
    #[error("the database refused: {0}")]
    Internal(String),
}

/// Whether the schema is the one this program was built for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SchemaState {
    /// Every migration is applied.
    Current,
    /// So many migrations are missing.
    Behind(usize),
    /// A newer program has migrated it.
    Ahead,
}

impl Store {
    /// Reads the URL; connects nowhere yet.
    ///
    /// # Errors
    /// When the URL is not one of PostgreSQL; the message does not repeat it, for it may hold a password.
    pub fn new(url: &SecretString, max_connections: u32) -> Result<Self, StoreError> {
        let options = PgConnectOptions::from_str(url.expose_secret())
            .map_err(|_| StoreError::Internal("database.url is not a PostgreSQL URL".into()))?
            .application_name("sendoff");
        let pool = PgPoolOptions::new()
            .max_connections(max_connections)
            .acquire_timeout(Duration::from_secs(5))
            .connect_lazy_with(options.clone());
        Ok(Self { pool, options })
    }
}

impl From<sqlx::Error> for StoreError {
    fn from(error: sqlx::Error) -> Self {
        let lost = matches!(
            error,
            sqlx::Error::Io(_)
                | sqlx::Error::PoolTimedOut
                | sqlx::Error::PoolClosed
                | sqlx::Error::WorkerCrashed
                | sqlx::Error::Tls(_)
        );
        // Class 57 is an operator's intervention (57P01 admin shutdown, 57P03 starting up), class 08 a connection's.
        let away = error
            .as_database_error()
            .and_then(|e| e.code())
            .is_some_and(|code| code.starts_with("57P") || code.starts_with("08") || code.starts_with("53"));
        if lost || away { Self::Unavailable(error.to_string()) } else { Self::Internal(error.to_string()) }
    }
}
