//! `./dev bench ledger`: what the ledger costs per job when it is small and when it is large.
//! Guarantee: jobs are claimed and settled through the worker's own code; small and large take turns, round by round, so
//! that whatever else the machine does weighs on both. Only databases named `sendoff_bench_*` are touched.
//!
//! Each database is filled once by SQL (ten million rows: about four minutes and 5 GB) and kept for the next run;
//! `--drop` deletes it. A round claims and settles `--jobs` jobs from `--callers` callers, after a checkpoint. Per job:
//!
//! - `us`: wall time at saturation, in microseconds; of this machine, and the least steady of the figures;
//! - `cpu us`: processor time of the database's sessions, where they run on this machine;
//! - `wal B`: bytes of write-ahead log;
//! - `hits`, `reads`: pages of the table and its indexes found in the buffers, and not;
//! - `hot %`: settles that stayed on their page and so touched no index.
//!
//! `--ids random` fills and drives with identifiers in no order (UUIDv4) instead of the order of time (UUIDv7).
//! `--plans` prints instead how the large database carries out a claim, a settle and a sweep (needs a superuser).
//! `--sql FILE` runs SQL on both databases first, say other storage parameters; the table is filled anew for it.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use clap::{Parser, ValueEnum};
use sendoff::clock::Clock;
use sendoff::model::job::JobKey;
use sendoff::model::ledger::{Claim, ClaimAnswer, Settle, SettleAnswer, Settlement, Turn};
use sendoff::model::organization::OrganizationId;
use sendoff::store::{DEAD_AFTER, Incarnations, Ledger, Store, Sweeper};
use sha2::{Digest, Sha256};
use sqlx::{AssertSqlSafe, Connection, PgConnection};
use uuid::Uuid;

/// As the worker has them.
const CONNECTIONS: u32 = 16;
/// Anything that takes longer has failed.
const PATIENCE: Duration = Duration::from_secs(60);

/// Jobs of a hundred days up to now, fifty of each moment, as claims and settles leave them: mostly sent at the first
/// attempt, one in fifty a day later, a few dead, cancelled and never finished. `$1` rows, `$2` whether ids are random.
const FILL: &str = "
INSERT INTO jobs (id, organization_id, body_hash, state, turn, owner, attempts, first_at, updated_at, message_id, reason,
    reply, history)
SELECT
    (substr(CASE WHEN $2 THEN hash ELSE lpad(to_hex((extract(epoch FROM first_at) * 1000)::bigint), 12, '0') END, 1, 12)
        || '7' || substr(hash, 13, 3) || '9' || substr(hash, 16, 15))::uuid,
    (n % 5000)::text, sha256(hash::bytea), state, CASE state WHEN 'sent' THEN 0 ELSE 1 END, 1,
    CASE WHEN slow THEN 2 ELSE 1 END, first_at,
    first_at + CASE WHEN slow THEN interval '1 day' ELSE interval '400 ms' END, '<' || hash || '@mail.example.org>',
    CASE state WHEN 'dead' THEN 'message_refused' WHEN 'deferred' THEN 'server_error' END,
    '250 2.0.0 Ok: queued as ' || upper(substr(hash, 1, 10)),
    CASE WHEN slow THEN jsonb_build_array(jsonb_build_object('at', first_at, 'transport', 'organization', 'address',
        '198.51.100.7:587', 'phase', 'rcpt', 'reason', 'server_error', 'reply',
        '451 4.7.1 Greylisted, please try again later', 'ms', 120)) END
FROM (
    SELECT md5(n::text || $2::text) AS hash, n, n % 50 = 7 AS slow,
        now() - interval '100 days' + (n / 50) * 50 * (interval '100 days' / $1) AS first_at,
        CASE WHEN n % 1000 < 5 THEN 'deferred' WHEN n % 1000 < 15 THEN 'dead' WHEN n % 1000 < 25 THEN 'cancelled'
            ELSE 'sent' END AS state
    FROM generate_series(1, $1) AS n
) AS jobs";

/// How full the schema has the pages of the table.
const FILLED: &str = "
SELECT coalesce(substring(array_to_string(reloptions, ' ') FROM 'fillfactor=(\\d+)'), '100')
FROM pg_class WHERE oid = 'jobs'::regclass";

/// Bytes of log, updates, those within their page, pages found and read.
const COUNTERS: &str = "
SELECT (pg_current_wal_lsn() - '0/0'::pg_lsn)::bigint, n_tup_upd, n_tup_hot_upd,
    heap_blks_hit + idx_blks_hit, heap_blks_read + idx_blks_read
FROM pg_stat_user_tables AS tables JOIN pg_statio_user_tables USING (relid) WHERE tables.relname = 'jobs'";

/// Jobs before a round begins to be timed: they open the sessions and have the catalogues read.
const WARM_UP: u64 = 1000;

#[derive(Parser)]
#[command(name = "./dev bench ledger", about = "What the ledger costs per job, small and large")]
struct Options {
    /// Rows of the small ledger
    #[arg(long, default_value_t = 10_000)]
    small: i64,
    /// Rows of the large ledger
    #[arg(long, default_value_t = 10_000_000)]
    large: i64,
    /// Rounds with each
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Jobs in a round
    #[arg(long, default_value_t = 20_000)]
    jobs: u64,
    /// Callers at once
    #[arg(long, default_value_t = 200)]
    callers: usize,
    /// Order of the identifiers
    #[arg(long, value_enum, default_value_t = Ids::Ordered)]
    ids: Ids,
    /// SQL to run on both databases, which are filled anew
    #[arg(long)]
    sql: Option<PathBuf>,
    /// Print plans instead of figures
    #[arg(long)]
    plans: bool,
    /// Delete the databases
    #[arg(long)]
    drop: bool,
    /// What cargo adds
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Ids {
    Ordered,
    Random,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    let server = std::env::var("DATABASE_URL").context("DATABASE_URL names a PostgreSQL server")?;
    let mut small = Book::new(&server, options.small, options.ids);
    let mut large = Book::new(&server, options.large, options.ids);
    if options.drop {
        small.delete().await?;
        return large.delete().await;
    }
    let sql = options.sql.as_deref().map(std::fs::read_to_string).transpose().context("reading --sql")?;
    for book in [&small, &large] {
        book.prepare(sql.as_deref()).await?;
    }
    if options.plans {
        return print_plans(&large).await;
    }
    println!("{:>10}{}", "rows", Round::NAMES.map(|name| format!("{name:>10}")).concat());
    for _ in 0..options.rounds {
        for book in [&mut small, &mut large] {
            let round = book.round(&options).await?;
            println!("{:>10}{}", book.rows, round.line());
            book.rounds.push(round);
        }
    }
    let (small, large) = (small.median(), large.median());
    println!("medians\n{:>10}{}\n{:>10}{}", options.small, small.line(), options.large, large.line());
    println!("{:>10}{}", "ratio", large.ratio(&small));
    Ok(())
}

/// One database with its ledger.
struct Book {
    server: String,
    name: String,
    rows: i64,
    ids: Ids,
    rounds: Vec<Round>,
}

impl Book {
    fn new(server: &str, rows: i64, ids: Ids) -> Self {
        let order = if ids == Ids::Random { "random" } else { "ordered" };
        let name = format!("sendoff_bench_{order}_{rows}");
        Self { server: server.to_owned(), name, rows, ids, rounds: Vec::new() }
    }

    fn url(&self) -> String {
        let (base, query) = self.server.split_once('?').unwrap_or((&self.server, ""));
        let authority = base.find("://").map_or(0, |at| at + 3);
        let path = base[authority..].find('/').map_or(base.len(), |at| authority + at);
        let query = if query.is_empty() { String::new() } else { format!("?{query}") };
        format!("{}/{}{query}", &base[..path], self.name)
    }

    fn store(&self) -> anyhow::Result<Store> {
        Ok(Store::new(&self.url().into(), CONNECTIONS)?)
    }

    async fn connect(&self) -> anyhow::Result<PgConnection> {
        PgConnection::connect(&self.url()).await.with_context(|| format!("connecting to {}", self.name))
    }

    async fn admin(&self) -> anyhow::Result<PgConnection> {
        PgConnection::connect(&self.server).await.context("connecting to DATABASE_URL")
    }

    async fn delete(&self) -> anyhow::Result<()> {
        run(&mut self.admin().await?, format!("DROP DATABASE IF EXISTS {} WITH (FORCE)", self.name)).await
    }

    /// The database, migrated and filled, unless it is there already.
    async fn prepare(&self, sql: Option<&str>) -> anyhow::Result<()> {
        let mut admin = self.admin().await?;
        let exists: bool = sqlx::query_scalar("SELECT EXISTS (SELECT FROM pg_database WHERE datname = $1)")
            .bind(&self.name)
            .fetch_one(&mut admin)
            .await?;
        if !exists {
            run(&mut admin, format!("CREATE DATABASE {} TEMPLATE template0", self.name)).await?;
        }
        self.store()?.migrate().await?;
        if let Some(sql) = sql {
            let mut session = self.connect().await?;
            run(&mut session, "TRUNCATE jobs".to_owned()).await?;
            run(&mut session, sql.to_owned()).await?;
        }
        let full = "SELECT EXISTS (SELECT FROM jobs OFFSET $1 - 1 LIMIT 1)";
        let full: bool =
            sqlx::query_scalar(full).bind(self.rows).fetch_one(&mut self.connect().await?).await?;
        if !full {
            eprintln!("filling {}", self.name);
            self.fill().await?;
        }
        Ok(())
    }

    async fn fill(&self) -> anyhow::Result<()> {
        let mut session = self.connect().await?;
        let filled: String = sqlx::query_scalar(FILLED).fetch_one(&mut session).await?;
        // As full as settles leave the pages: gaps that a claim fits in would be filled first.
        run(&mut session, "TRUNCATE jobs; ALTER TABLE jobs SET (fillfactor = 60)".to_owned()).await?;
        sqlx::query(FILL).bind(self.rows).bind(self.ids == Ids::Random).execute(&mut session).await?;
        run(&mut session, format!("ALTER TABLE jobs SET (fillfactor = {filled})")).await?;
        run(&mut session, "VACUUM ANALYZE jobs".to_owned()).await
    }

    /// Claims and settles jobs, each once. A small ledger is filled anew, or its rounds would not be alike.
    async fn round(&self, options: &Options) -> anyhow::Result<Round> {
        if self.rows < 100 * i64::try_from(options.jobs)? {
            self.fill().await?;
        }
        let mut session = self.connect().await?;
        run(&mut session, "CHECKPOINT".to_owned()).await?;
        let before = counters(&mut session).await?;
        let (took, cpu) = self.drive(options).await?;
        self.alone(&mut session).await?;
        let after = counters(&mut session).await?;
        Ok(Round::of(options.jobs, took, cpu, &before, &after))
    }

    /// The wall time, and the processor time of this database's sessions.
    async fn drive(&self, options: &Options) -> anyhow::Result<(Duration, Option<Duration>)> {
        let worker = Worker::start(self.store()?).await?;
        let makers = Arc::new(Makers { clock: Clock::system(), ids: self.ids, made: AtomicU64::new(0) });
        drive(&worker.ledger, &makers, options.callers, WARM_UP).await?;
        let mut session = self.connect().await?;
        let cpu = processor_time(&mut session).await?;
        let begun = Instant::now();
        drive(&worker.ledger, &makers, options.callers, options.jobs).await?;
        let took = begun.elapsed();
        let cpu = processor_time(&mut session).await?.zip(cpu).map(|(after, before)| after - before);
        worker.incarnations.stop().await;
        Ok((took, cpu))
    }

    /// Waits until no other session is left: when it ends, a session tells the counters what it did.
    async fn alone(&self, session: &mut PgConnection) -> anyhow::Result<()> {
        let others = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() \
                      AND pid <> pg_backend_pid() AND backend_type = 'client backend'";
        let deadline = Instant::now() + PATIENCE;
        while sqlx::query_scalar::<_, i64>(others).fetch_one(&mut *session).await? > 0 {
            ensure!(Instant::now() < deadline, "sessions on {} do not end", self.name);
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Ok(())
    }

    fn median(&self) -> Round {
        let middle = |index: usize| {
            let mut all: Vec<f64> = self.rounds.iter().map(|round| round.0[index]).collect();
            all.sort_by(f64::total_cmp);
            all.get(all.len() / 2).copied().unwrap_or(f64::NAN)
        };
        Round(std::array::from_fn(middle))
    }
}

/// The parts of a worker that use the ledger.
struct Worker {
    incarnations: Incarnations,
    ledger: Ledger,
}

impl Worker {
    async fn start(store: Store) -> anyhow::Result<Self> {
        let incarnations = Incarnations::start(store.clone(), DEAD_AFTER);
        let ledger = Ledger::new(store, incarnations.clone(), |_| ());
        let mut watch = incarnations.watch();
        tokio::time::timeout(PATIENCE, watch.wait_for(Option::is_some)).await.context("no incarnation")??;
        Ok(Self { incarnations, ledger })
    }
}

/// Makes jobs.
struct Makers {
    clock: Clock,
    ids: Ids,
    made: AtomicU64,
}

impl Makers {
    fn claim(&self) -> Claim {
        let number = self.made.fetch_add(1, Ordering::Relaxed);
        let ordered = self.clock.new_id();
        let body_hash: [u8; 32] = Sha256::digest(ordered.as_bytes()).into();
        let id = match self.ids {
            Ids::Ordered => ordered,
            Ids::Random => Uuid::from_bytes(std::array::from_fn(|at| body_hash[at])),
        };
        let organization = OrganizationId::from_integer(i64::try_from(number % 5000).unwrap_or_default());
        Claim {
            key: JobKey { organization: Some(organization), id },
            body_hash,
            turn: Turn(0),
            revision: None,
            message_id: format!("<{}@mail.example.org>", id.simple()),
            suspects: false,
        }
    }
}

async fn drive(ledger: &Ledger, makers: &Arc<Makers>, callers: usize, jobs: u64) -> anyhow::Result<()> {
    let left = Arc::new(AtomicU64::new(jobs));
    let caller = || {
        let (ledger, makers, left) = (ledger.clone(), makers.clone(), left.clone());
        tokio::spawn(async move {
            let take = |left: u64| left.checked_sub(1);
            while left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_ok() {
                one(&ledger, makers.claim()).await?;
            }
            anyhow::Ok(())
        })
    };
    for task in (0..callers).map(|_| caller()).collect::<Vec<_>>() {
        task.await??;
    }
    Ok(())
}

/// A job that is sent at its first attempt.
async fn one(ledger: &Ledger, claim: Claim) -> anyhow::Result<()> {
    let key = claim.key.clone();
    let ClaimAnswer::Claimed(claimed) = ledger.claim(claim).await? else {
        anyhow::bail!("a new job was not granted")
    };
    let settle = Settle {
        key,
        owner: claimed.owner,
        turn: claimed.turn,
        outcome: Settlement::Sent,
        attempts: 1,
        spared: 0,
        unknowns: 0,
        message_id: claimed.message_id,
        pending: None,
        refused: Vec::new(),
        partly_sent: true,
        reply: Some("250 2.0.0 Ok: queued as 4F1C20A7B3".to_owned()),
        attempt: None,
    };
    ensure!(ledger.settle(settle).await? == SettleAnswer::Recorded, "a settle was not recorded");
    Ok(())
}

/// What the server has counted so far, in the order of [`COUNTERS`].
async fn counters(session: &mut PgConnection) -> anyhow::Result<[f64; 5]> {
    let (wal, updates, hot, hits, reads): (i64, i64, i64, i64, i64) =
        sqlx::query_as(COUNTERS).fetch_one(session).await.context("reading the counters")?;
    Ok([wal, updates, hot, hits, reads].map(|count| count as f64))
}

/// Of all sessions of the database; `None` where they are not processes of this machine.
async fn processor_time(session: &mut PgConnection) -> anyhow::Result<Option<Duration>> {
    let pids: Vec<i32> =
        sqlx::query_scalar("SELECT pid FROM pg_stat_activity WHERE datname = current_database()")
            .fetch_all(session)
            .await?;
    Ok(pids.into_iter().map(processor_time_of).sum())
}

/// From proc(5): user and system time, the 14th and 15th field, in hundredths of a second.
fn processor_time_of(pid: i32) -> Option<Duration> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (name, fields) = stat.rsplit_once(") ")?;
    let fields: Vec<&str> = fields.split(' ').collect();
    let ticks: u64 = fields.get(11)?.parse::<u64>().ok()? + fields.get(12)?.parse::<u64>().ok()?;
    name.contains("(postgres").then(|| Duration::from_millis(10 * ticks))
}

/// A round's figures, each per job.
#[derive(Clone, Copy)]
struct Round([f64; 6]);

impl Round {
    const NAMES: [&str; 6] = ["us", "cpu us", "wal B", "hits", "reads", "hot %"];

    fn of(jobs: u64, took: Duration, cpu: Option<Duration>, before: &[f64; 5], after: &[f64; 5]) -> Self {
        let timed = |time: Duration| time.as_secs_f64() * 1e6 / jobs as f64;
        let [wal, updates, hot, hits, reads] = std::array::from_fn(|index| after[index] - before[index]);
        let counted = (jobs + WARM_UP) as f64;
        Self([
            timed(took),
            cpu.map_or(f64::NAN, timed),
            wal / counted,
            hits / counted,
            reads / counted,
            100.0 * hot / updates,
        ])
    }

    fn line(&self) -> String {
        self.0.map(|figure| format!("{figure:>10.2}")).concat()
    }

    fn ratio(&self, other: &Self) -> String {
        Self(std::array::from_fn(|index| self.0[index] / other.0[index])).line()
    }
}

/// What the server tells its sessions meanwhile.
#[derive(Clone, Default)]
struct Notices(Arc<Mutex<Vec<u8>>>);

impl std::io::Write for Notices {
    fn write(&mut self, text: &[u8]) -> std::io::Result<usize> {
        self.0.lock().expect("nothing panics while it holds this lock").extend_from_slice(text);
        Ok(text.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Notices {
    /// The last plan of a statement that contains this text.
    fn plan(&self, of: &str) -> Option<String> {
        let text = String::from_utf8_lossy(&self.0.lock().expect("as above")).into_owned();
        let plans = text.split("\nduration: ").filter(|notice| notice.contains(of));
        plans.last().map(|plan| format!("duration: {plan}"))
    }
}

/// The plans of the worker's own statements, as the server's `auto_explain` reports them.
async fn print_plans(book: &Book) -> anyhow::Result<()> {
    let notices = Notices::default();
    let writer = notices.clone();
    tracing_subscriber::fmt()
        .with_env_filter("sqlx::postgres::notice=trace")
        .with_writer(move || writer.clone())
        .without_time()
        .with_level(false)
        .with_target(false)
        .with_ansi(false)
        .init();
    let mut admin = book.admin().await?;
    for setting in [
        "session_preload_libraries = 'auto_explain'",
        "auto_explain.log_min_duration = 0",
        "auto_explain.log_analyze = on",
        "auto_explain.log_buffers = on",
        "auto_explain.log_level = notice",
    ] {
        run(&mut admin, format!("ALTER DATABASE {} SET {setting}", book.name)).await?;
    }
    let worker = Worker::start(book.store()?).await?;
    let makers = Arc::new(Makers { clock: Clock::system(), ids: book.ids, made: AtomicU64::new(0) });
    drive(&worker.ledger, &makers, 100, WARM_UP).await?;
    run(&mut admin, format!("ALTER DATABASE {} RESET ALL", book.name)).await?;
    for statement in ["INSERT INTO jobs AS j", "UPDATE jobs SET"] {
        println!("{}\n", notices.plan(statement).context("no plan was reported")?);
    }
    let sweeper = Sweeper::new(book.store()?);
    println!("{}", sweeper.plan(Duration::from_secs(90 * 24 * 3600)).await?.join("\n"));
    worker.incarnations.stop().await;
    Ok(())
}

async fn run(session: &mut PgConnection, sql: String) -> anyhow::Result<()> {
    sqlx::raw_sql(AssertSqlSafe(sql)).execute(session).await?;
    Ok(())
}
