//! PostgreSQL: the ledger, the archive of dead letters, the configurations, the audit log. The only folder that knows sqlx.
//! Guarantee: no type of the driver leaves this folder.

mod audit;
mod batch;
mod bindings;
mod change;
mod config_cache;
mod config_changes;
mod config_events;
mod dead_letters;
mod features;
mod incarnation;
mod leases;
mod ledger;
mod rates;
pub(crate) mod retrying;
mod sealed_keys;
mod smtp_configs;
mod test_times;

use std::collections::BTreeSet;
use std::str::FromStr;
use std::time::Duration;

use secrecy::{ExposeSecret, SecretString};
use sqlx::migrate::{MigrateError, Migrator};
use sqlx::postgres::{PgConnectOptions, PgPool, PgPoolOptions};
use sqlx::{ConnectOptions, Connection, Executor, PgConnection};

pub use audit::{AuditEntry, OpenEntry};
pub use bindings::LaneBinding;
pub use change::ChangeError;
pub use config_cache::{CONFIG_CACHE_CAPACITY, ConfigCache};
pub use config_changes::{ConfigChange, ConfigChanges};
pub use config_events::ConfigEvent;
pub use dead_letters::{
    Archived, Burial, Content, DeadLetters, Examined, LetterAge, LetterCount, LettersForgotten, Page,
    ParkedShare, ParkedTaken, PartlySent, Recovery, ReplayCopy, Taken, Taking, Unopened,
};
pub use incarnation::{DEAD_AFTER, Incarnations, Liveness};
pub use ledger::{Ledger, Sweep, Sweeper};
pub use rates::{RATE_LEASE, RateAsk, RateSlice};
pub use sealed_keys::{
    KeyUsage, Resealed, Resealer, SealedReport, SealedRows, SealedTable, Stale, StalePage, Unsealed,
};
pub use smtp_configs::{
    DueProbe, Failing, LastTest, NewSmtpConfig, OrganizationSettings, RouteFacts, SmtpConfig,
    SmtpConfigPatch, SmtpConfigs, StoredAccount, Trouble, Unreadable,
};
pub use test_times::TestPermit;

use smtp_configs::reason_from;

static MIGRATIONS: Migrator = sqlx::migrate!();

/// The oldest PostgreSQL that this program works with.
pub const OLDEST_SERVER: u32 = 13;

/// Longest time for one statement; a host that vanished would otherwise hold its caller for hours.
const STATEMENT_BOUND: Duration = Duration::from_secs(15);
/// The slowest way to the database that large values may take, in bytes a second.
const SLOWEST: u64 = 1 << 20;
/// Longest wait for a connection.
const ACQUIRE_BOUND: Duration = Duration::from_secs(5);
/// A session that was idle for so long may have been cut off meanwhile.
const ASKED_AFTER: Duration = Duration::from_millis(500);
/// Longest wait for the reason why there was none.
const REASON_BOUND: Duration = Duration::from_secs(1);

/// A handle on the database; cheap to clone. It connects when it is first used, and again after a loss.
#[derive(Clone)]
pub struct Store {
    pool: PgPool,
    options: PgConnectOptions,
}

/// Why the database did not do what was asked.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StoreError {
    /// It cannot be reached now; the same call may go through later. What was asked may have been done all the same.
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
            .application_name("sendoff")
            // A statement can hold personal data; the driver would log slow ones.
            .disable_statement_logging();
        // A plan made while a table was empty reads it from end to end, and would be kept while the table grows.
        let pool = pool(&options, max_connections, "SET plan_cache_mode = force_custom_plan");
        Ok(Self { pool, options })
    }

    /// The same database over sessions of their own that plan each statement once: the ledger's are few, each is run
    /// thousands of times a second, and planning one costs more than running it. Each finds its rows by a key, so the one
    /// plan that is never wrong is forced, whatever the tables' size was when it was made.
    fn planned_once(&self, max_connections: u32) -> Self {
        let settings = "SET plan_cache_mode = force_generic_plan; SET jit = off; SET enable_seqscan = off; \
                        SET enable_bitmapscan = off; SET enable_hashjoin = off; SET enable_mergejoin = off";
        let pool = pool(&self.options, max_connections, settings);
        Self { pool, options: self.options.clone() }
    }

    /// Brings the schema up to date. Several programs may try at once: one does it, the others wait for it.
    ///
    /// # Errors
    /// When the database is away or refuses, or was migrated by a newer program.
    pub async fn migrate(&self) -> Result<(), StoreError> {
        MIGRATIONS.run(&self.pool).await.map_err(|error| match error {
            MigrateError::Execute(error) | MigrateError::ExecuteMigration(error, _) => error.into(),
            MigrateError::VersionMissing(version) => StoreError::Internal(format!(
                "a newer program has applied migration {version}, which this one does not know"
            )),
            other => StoreError::Internal(other.to_string()),
        })
    }

    /// Compares the applied migrations with this program's.
    ///
    /// # Errors
    /// When the database did not answer.
    pub async fn schema_state(&self) -> Result<SchemaState, StoreError> {
        let applied: Vec<i64> = self
            .on_session(async |session| {
                let exists: bool = sqlx::query_scalar("SELECT to_regclass('_sqlx_migrations') IS NOT NULL")
                    .fetch_one(&mut *session)
                    .await?;
                if !exists {
                    return Ok(Vec::new());
                }
                sqlx::query_scalar("SELECT version FROM _sqlx_migrations WHERE success")
                    .fetch_all(session)
                    .await
            })
            .await?;
        let applied: BTreeSet<i64> = applied.into_iter().collect();
        let known: BTreeSet<i64> = MIGRATIONS.iter().map(|migration| migration.version).collect();
        let missing = known.difference(&applied).count();
        Ok(if missing > 0 {
            SchemaState::Behind(missing)
        } else if applied.is_subset(&known) {
            SchemaState::Current
        } else {
            SchemaState::Ahead
        })
    }

    /// Whether the database answers.
    ///
    /// # Errors
    /// When it does not.
    pub async fn ping(&self) -> Result<(), StoreError> {
        self.on_session(async |session| sqlx::query("SELECT 1").execute(session).await).await.map(drop)
    }

    /// The server's major version, to be compared with [`OLDEST_SERVER`].
    ///
    /// # Errors
    /// When the database did not answer.
    pub async fn server_version(&self) -> Result<u32, StoreError> {
        let number: i32 = self
            .on_session(async |session| {
                sqlx::query_scalar("SELECT current_setting('server_version_num')::int")
                    .fetch_one(session)
                    .await
            })
            .await?;
        Ok(number.unsigned_abs() / 10_000)
    }

    /// Whether a pooler stands before the database that gives each transaction another session: an incarnation's lock
    /// would then outlive its worker.
    ///
    /// # Errors
    /// When the database did not answer at all.
    pub async fn behind_transaction_pooler(&self) -> Result<bool, StoreError> {
        let mut session = self.direct_session("sendoff check").await?;
        let before = backend(&mut session).await?;
        // Poolers hand out the session that was used last: a transaction on another connection takes it away.
        let mut other = self.direct_session("sendoff check").await?;
        tokio::time::timeout(ACQUIRE_BOUND, other.execute(sqlx::raw_sql("BEGIN")))
            .await
            .map_err(silence)??;
        let after = tokio::time::timeout(ACQUIRE_BOUND, backend(&mut session)).await;
        // A pooler with a single session has none left to answer with.
        Ok(!matches!(after, Ok(Ok(after)) if after == before))
    }

    /// A session of its own, outside the pool, that either end notices to be dead within 15 seconds.
    async fn direct_session(&self, name: &str) -> Result<PgConnection, StoreError> {
        let connecting = async {
            let mut session = self.options.clone().application_name(name).connect().await?;
            // As statements, for poolers refuse options at the start of a session.
            session
                .execute(sqlx::raw_sql(
                    "SET tcp_keepalives_idle = 5; SET tcp_keepalives_interval = 3; SET tcp_keepalives_count = 3",
                ))
                .await?;
            Ok::<_, StoreError>(session)
        };
        tokio::time::timeout(ACQUIRE_BOUND, connecting).await.map_err(silence)?
    }

    /// The pool tries to connect for as long as it may, and then keeps to itself what stood in the way: one more try, for
    /// the reason.
    async fn why_no_session(&self) -> StoreError {
        let server = format!("{}:{}", self.options.get_host(), self.options.get_port());
        match tokio::time::timeout(REASON_BOUND, self.options.clone().connect()).await {
            Ok(Ok(_)) => StoreError::Unavailable("every connection to it is in use".into()),
            Ok(Err(sqlx::Error::Io(error))) => StoreError::Unavailable(format!("{server}: {error}")),
            Ok(Err(error)) => error.into(),
            Err(_) => StoreError::Unavailable(format!("{server} does not answer")),
        }
    }

    /// Runs statements on a connection of the pool, all of them within [`STATEMENT_BOUND`]. A connection that did not
    /// answer is thrown away: the pool would wait for it.
    async fn on_session<T>(
        &self,
        statements: impl AsyncFnOnce(&mut PgConnection) -> Result<T, sqlx::Error>,
    ) -> Result<T, StoreError> {
        self.on_session_within(STATEMENT_BOUND, statements).await
    }

    /// The same within another limit, the wait for a connection included.
    async fn on_session_within<T>(
        &self,
        limit: Duration,
        statements: impl AsyncFnOnce(&mut PgConnection) -> Result<T, sqlx::Error>,
    ) -> Result<T, StoreError> {
        let deadline = tokio::time::Instant::now() + limit;
        let mut session =
            match tokio::time::timeout_at(deadline, self.pool.acquire()).await.map_err(silence)? {
                Err(sqlx::Error::PoolTimedOut) => return Err(self.why_no_session().await),
                acquired => acquired?,
            };
        match tokio::time::timeout_at(deadline, statements(&mut session)).await {
            Ok(result) => Ok(result?),
            Err(elapsed) => {
                session.close_on_drop();
                Err(silence(elapsed))
            }
        }
    }
}

/// Sessions that begin with these settings. They are statements, for poolers refuse options at the start of a session.
fn pool(options: &PgConnectOptions, max_connections: u32, settings: &'static str) -> PgPool {
    PgPoolOptions::new()
        .max_connections(max_connections)
        .acquire_timeout(ACQUIRE_BOUND)
        // Asking each time whether a session is alive costs as much as many a statement.
        .test_before_acquire(false)
        .before_acquire(|session, meta| {
            Box::pin(async move { Ok(meta.idle_for < ASKED_AFTER || session.ping().await.is_ok()) })
        })
        .after_connect(move |session, _| {
            Box::pin(async move {
                session.execute(sqlx::raw_sql(settings)).await?;
                Ok(())
            })
        })
        .connect_lazy_with(options.clone())
}

/// Longest time for a statement that carries so many bytes of letters.
fn bound_for(bytes: u64) -> Duration {
    STATEMENT_BOUND + Duration::from_secs(bytes / SLOWEST)
}

fn silence(_: tokio::time::error::Elapsed) -> StoreError {
    StoreError::Unavailable("no answer in time".into())
}

/// The server process behind a session.
async fn backend(session: &mut PgConnection) -> Result<i32, StoreError> {
    use sqlx::Row;
    // Without a prepared statement, which would not outlive a change of process.
    let row = session.fetch_one(sqlx::raw_sql("SELECT pg_backend_pid()")).await?;
    Ok(row.try_get(0)?)
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
                // Something accepted the connection and ended it, say a proxy without a server behind it.
                | sqlx::Error::Protocol(_)
        );
        let code = error.as_database_error().and_then(|e| e.code());
        if lost || code.as_ref().is_some_and(|code| is_away(code)) {
            return Self::Unavailable(error.to_string());
        }
        // Undefined table or column.
        let foreign = matches!(code.as_deref(), Some("42P01" | "42703"));
        let advice = if foreign { "; is its schema this program's? See `sendoff migrate`" } else { "" };
        Self::Internal(format!("{error}{advice}"))
    }
}

/// Whether a SQLSTATE (PostgreSQL's documentation, appendix A) tells of the server's condition, not of the statement.
fn is_away(code: &str) -> bool {
    // 08 connection, 53 resources (53300 too many connections), 57 an operator (57P01 shutdown, 57P03 starting up, 57014
    // cancelled), 58 the system under it; 25006 is a standby that is not yet, or no longer, the primary.
    ["08", "53", "57", "58"].iter().any(|class| code.starts_with(class)) || code == "25006"
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::letter::{LetterFilter, LetterId};

    #[test]
    fn the_servers_condition_is_told_from_a_refused_statement() {
        for away in ["57P01", "57P02", "57P03", "57014", "08006", "53300", "53100", "58030", "25006"] {
            assert!(is_away(away), "{away}");
        }
        for refused in ["23505", "23514", "22021", "40P01", "40001", "42P01", "28P01", "3D000"] {
            assert!(!is_away(refused), "{refused}");
        }
    }

    #[test]
    fn a_loss_of_the_connection_is_unavailable_and_a_wrong_url_keeps_its_password() {
        let reset = std::io::Error::from(std::io::ErrorKind::ConnectionReset);
        for error in [
            sqlx::Error::Io(reset),
            sqlx::Error::PoolTimedOut,
            sqlx::Error::WorkerCrashed,
            sqlx::Error::Protocol(String::new()),
        ] {
            assert!(matches!(StoreError::from(error), StoreError::Unavailable(_)));
        }
        assert!(matches!(StoreError::from(sqlx::Error::RowNotFound), StoreError::Internal(_)));
        let error =
            Store::new(&"mysql//root:hunter2@h".to_owned().into(), 1).err().expect("no URL of PostgreSQL");
        assert!(!error.to_string().contains("hunter2"));
    }

    #[test]
    fn every_question_can_be_asked_from_a_spawned_task() {
        fn spawned<T: Send>(_: impl Fn(Store) -> T) {}
        spawned(|store| async move { store.migrate().await });
        spawned(|store| async move { store.schema_state().await });
        spawned(|store| async move { store.ping().await });
        spawned(|store| async move { store.server_version().await });
        spawned(|store| async move { store.behind_transaction_pooler().await });
        spawned(|store| async move { store.lane_bindings("p").await });
        spawned(|store| async move { store.replace_lane_bindings("p", &[]).await });
        spawned(|store| async move { store.job_status_anywhere(uuid::Uuid::nil()).await });
        spawned(|store| async move { store.letters(&LetterFilter::default(), None, 1).await });
        spawned(|store| async move { store.letters_of(uuid::Uuid::nil(), None).await });
        spawned(|store| async move { store.letter_stats(&LetterFilter::default()).await });
        spawned(|store| async move { store.dead_letter_counts().await });
        spawned(|store| async move { store.forget_letters(STATEMENT_BOUND).await });
        let archive = |store| {
            let keys = crate::secrets::KeyRing::generate("a").expect("an id");
            DeadLetters::new(store, crate::secrets::KeyRing::parse(&[keys]).expect("a key").into())
        };
        let ring =
            || crate::secrets::KeyRing::parse(&[crate::secrets::KeyRing::generate("a").expect("an id")]);
        spawned(move |store| async move { store.key_usage(&ring().expect("a key")).await });
        let resealer = move |store| Resealer::new(store, ring().expect("a key").into());
        spawned(move |store| async move { resealer(store).stale(SealedTable::Letters, None).await });
        spawned(move |store| async move { resealer(store).reseal(SealedTable::Letters, &[]).await });
        spawned(move |store| async move { archive(store).archive(&[]).await });
        spawned(move |store| async move { archive(store).open(LetterId(uuid::Uuid::nil())).await });
        spawned(|store| async move { Sweeper::new(store).sweep(STATEMENT_BOUND).await });
    }
}
