//! A database of its own for each test, copied from a migrated template.
//! Guarantee: it is dropped when the test ends, connections or not.

use std::sync::atomic::{AtomicU32, Ordering};

use secrecy::SecretString;
use sendoff::store::Store;
use sha2::{Digest, Sha256};
use sqlx::postgres::PgConnectOptions;
use sqlx::{AssertSqlSafe, Connection, PgConnection};

use super::broker::SOON;

/// Only one program at a time makes the template.
const TEMPLATE_LOCK: i64 = 0x5e0d_7e57;

/// One test's database.
pub struct TestDatabase {
    name: String,
    url: String,
    server: String,
}

impl TestDatabase {
    /// A migrated database.
    pub async fn migrated() -> Self {
        let template = template().await;
        Self::create(Some(&template)).await
    }

    /// A database without any table.
    pub async fn empty() -> Self {
        Self::create(None).await
    }

    async fn create(template: Option<&str>) -> Self {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        let server = server();
        let name = format!("sendoff_test_{}_{}", std::process::id(), COUNTER.fetch_add(1, Ordering::Relaxed));
        let mut admin = connect(&server).await;
        // A process that died under the same number may have left one.
        run(&mut admin, format!("DROP DATABASE IF EXISTS {name} WITH (FORCE)")).await;
        let template = template.unwrap_or("template0");
        run(&mut admin, format!("CREATE DATABASE {name} TEMPLATE {template}")).await;
        Self { url: url_of(&server, &name), name, server }
    }

    /// Its name: no other test's on this server.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its URL.
    pub fn url(&self) -> SecretString {
        self.url.clone().into()
    }

    /// A store on it with a few connections.
    pub fn store(&self) -> Store {
        Store::new(&self.url(), 4).expect("the URL is one")
    }

    /// A plain connection to it.
    pub async fn connect(&self) -> PgConnection {
        connect(&self.url).await
    }

    /// Runs SQL, trusted because a test wrote it.
    pub async fn run(&self, sql: impl Into<String>) {
        run(&mut self.connect().await, sql.into()).await;
    }

    /// One number.
    pub async fn number(&self, sql: impl Into<String>) -> i64 {
        sqlx::query_scalar(AssertSqlSafe(sql.into()))
            .fetch_one(&mut self.connect().await)
            .await
            .expect("the query answers a bigint")
    }

    /// Ends every session of that application name on this database; says how many there were.
    pub async fn terminate(&self, application: &str) -> i64 {
        self.number(format!(
            "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity \
             WHERE datname = current_database() AND application_name = '{application}'"
        ))
        .await
    }
}

impl Drop for TestDatabase {
    fn drop(&mut self) {
        let (server, name) = (self.server.clone(), self.name.clone());
        let dropping = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.expect("a runtime starts").block_on(async {
                let mut admin = connect(&server).await;
                run(&mut admin, format!("DROP DATABASE IF EXISTS {name} WITH (FORCE)")).await;
            });
        });
        // A failure to tidy up must not hide the test's own.
        let _ = dropping.join();
    }
}

fn server() -> String {
    std::env::var("DATABASE_URL").expect("DATABASE_URL names a PostgreSQL server; `./dev test` sets it")
}

fn url_of(server: &str, name: &str) -> String {
    let (base, query) = server.split_once('?').map_or((server, ""), |(base, query)| (base, query));
    let authority = base.find("://").map_or(0, |at| at + 3);
    let path = base[authority..].find('/').map_or(base.len(), |at| authority + at);
    let query = if query.is_empty() { String::new() } else { format!("?{query}") };
    format!("{}/{name}{query}", &base[..path])
}

async fn connect(url: &str) -> PgConnection {
    let options: PgConnectOptions = url.parse().expect("DATABASE_URL is a PostgreSQL URL");
    PgConnection::connect_with(&options.application_name("sendoff test")).await.expect("PostgreSQL answers")
}

async fn run(session: &mut PgConnection, sql: String) {
    sqlx::raw_sql(AssertSqlSafe(sql)).execute(session).await.expect("the statement runs");
}

/// The template's name: it is made once for each set of migrations, and kept.
async fn template() -> String {
    let server = server();
    let name = format!("sendoff_template_{}", fingerprint());
    let mut admin = connect(&server).await;
    run(&mut admin, format!("SELECT pg_advisory_lock({TEMPLATE_LOCK})")).await;
    let exists: bool = sqlx::query_scalar("SELECT EXISTS (SELECT FROM pg_database WHERE datname = $1)")
        .bind(&name)
        .fetch_one(&mut admin)
        .await
        .expect("the query runs");
    if !exists {
        make_template(&server, &mut admin, &name).await;
    }
    admin.close().await.expect("the session closes and its lock is free");
    name
}

/// Made under another name, so that one that is only half made is never used.
async fn make_template(server: &str, admin: &mut PgConnection, name: &str) {
    let unfinished = format!("{name}_unfinished");
    run(admin, format!("DROP DATABASE IF EXISTS {unfinished} WITH (FORCE)")).await;
    run(admin, format!("CREATE DATABASE {unfinished} TEMPLATE template0")).await;
    let store = Store::new(&url_of(server, &unfinished).into(), 1).expect("the URL is one");
    store.migrate().await.expect("the migrations run");
    drop(store);
    let renaming = async {
        let rename = format!("ALTER DATABASE {unfinished} RENAME TO {name}");
        while sqlx::raw_sql(AssertSqlSafe(rename.clone())).execute(&mut *admin).await.is_err() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(SOON, renaming).await.expect("the migrating session has ended");
}

/// Of the migrations' texts, in order.
fn fingerprint() -> String {
    let mut files: Vec<_> = std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/migrations"))
        .expect("the migrations are there")
        .map(|entry| entry.expect("the folder can be read").path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "sql"))
        .collect();
    files.sort();
    let mut hash = Sha256::new();
    for file in files {
        hash.update(file.file_name().expect("a file has a name").as_encoded_bytes());
        hash.update(std::fs::read(&file).expect("a migration can be read"));
    }
    hash.finalize().iter().take(6).map(|byte| format!("{byte:02x}")).collect()
}
