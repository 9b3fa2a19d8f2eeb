//! One installation of Sendoff for one repetition: a database and a prefix of its own, organizations, and the worker.
//! Guarantee: nothing of it is left behind when it is ended; what a killed run has left is cleared by the next one.

use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use sendoff::clock::Clock;
use sendoff::model::address::EmailAddress;
use sendoff::model::organization::OrganizationId;
use sendoff::model::provider::Overrides;
use sendoff::model::smtp_settings::Credentials;
use sendoff::secrets::KeyRing;
use sendoff::store::{AuditEntry, NewSmtpConfig, SmtpConfigs, Store};
use serde_json::Value;
use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::process::Command;

use super::context::Context as Bench;
use super::process::Process;

/// Anything that takes longer has failed.
const PATIENCE: Duration = Duration::from_secs(60);
/// Seals the credentials of made-up accounts on this machine.
const KEY: &str = "bench:Zm9yIGRldmVsb3BtZW50IG9ubHksIG5ldmVyIGxpdmU=";
/// Organizations written at once.
const WRITERS: u32 = 8;

/// Name and password that every SMTP server here takes.
pub const ACCOUNT: (&str, &str) = ("bookings@acme.example", "not-a-secret");

/// A database, a prefix, and settings.
pub struct Installation {
    prefix: String,
    database: String,
    server: String,
    program: std::path::PathBuf,
    settings: Vec<(&'static str, String)>,
    leftover: std::path::PathBuf,
    amqp_url: String,
}

impl Installation {
    /// Creates the database and declares the topology. `settings` are the worker's, beside what the loopback asks for.
    pub async fn create(bench: &Bench, settings: Vec<(&'static str, String)>) -> anyhow::Result<Self> {
        let id = Clock::system().new_id().simple().to_string();
        let made = Self::named(bench, &id[20..], settings);
        std::fs::create_dir_all(bench.leftovers())?;
        std::fs::write(&made.leftover, "")?;
        made.admin(format!("CREATE DATABASE {} TEMPLATE template0", made.database)).await?;
        made.run(&["migrate"]).await?;
        made.run(&["topology", "declare"]).await?;
        Ok(made)
    }

    fn named(bench: &Bench, name: &str, settings: Vec<(&'static str, String)>) -> Self {
        Self {
            prefix: format!("bench-{name}"),
            database: format!("sendoff_bench_run_{name}"),
            server: bench.database_url.clone(),
            program: bench.program.clone(),
            settings,
            leftover: bench.leftovers().join(name),
            amqp_url: bench.amqp_url.clone(),
        }
    }

    /// Ends what earlier runs that were killed have left.
    pub async fn clear_leftovers(bench: &Bench) -> anyhow::Result<()> {
        let Ok(names) = std::fs::read_dir(bench.leftovers()) else { return Ok(()) };
        for name in names {
            Self::named(bench, &name?.file_name().to_string_lossy(), Vec::new()).end().await?;
        }
        Ok(())
    }

    /// The exchange that jobs go to.
    pub fn exchange(&self) -> String {
        format!("{}.jobs", self.prefix)
    }

    /// The queue of a lane.
    pub fn lane(&self, lane: &str) -> String {
        format!("{}.jobs.{lane}", self.prefix)
    }

    /// Stores a configuration for each organization, all with their server on this machine, at these ports.
    pub async fn organizations(&self, organizations: Vec<(String, u16)>) -> anyhow::Result<()> {
        let ring = KeyRing::parse(&[KEY.to_owned().into()])?;
        let store = Store::new(&self.url().into(), WRITERS)?;
        let configs = Arc::new(SmtpConfigs::new(store, Arc::new(ring)));
        let left = Arc::new(std::sync::Mutex::new(organizations.into_iter()));
        let mut writers = tokio::task::JoinSet::new();
        for _ in 0..WRITERS {
            let (configs, left) = (configs.clone(), left.clone());
            writers.spawn(async move {
                loop {
                    let next = left.lock().unwrap_or_else(std::sync::PoisonError::into_inner).next();
                    let Some((name, port)) = next else { return anyhow::Ok(()) };
                    write(&configs, &name, port).await?;
                }
            });
        }
        while let Some(written) = writers.join_next().await {
            written??;
        }
        // Their announcements would be part of what is measured.
        PgConnection::connect(&self.url()).await?.execute("TRUNCATE config_events").await?;
        Ok(())
    }

    /// Starts the worker, and waits until it is ready.
    pub async fn worker(&self) -> anyhow::Result<Worker> {
        let mut process = Process::start(self.command(&["worker"]).stderr(Stdio::piped()), "sendoff worker")?;
        let mut log = BufReader::new(process.child().stderr.take().context("piped")?).lines();
        let started = async {
            let mut said = Vec::new();
            while let Some(line) = log.next_line().await? {
                if let Some((_, rest)) = line.split_once("http=") {
                    return Ok(rest.split(' ').next().unwrap_or_default().to_owned());
                }
                said.push(line);
            }
            anyhow::bail!("the worker ended: {}", said.join("\n"))
        };
        let http = tokio::time::timeout(PATIENCE, started).await.context("the worker did not start")??;
        tokio::spawn(async move { while let Ok(Some(_)) = log.next_line().await {} });
        let worker = Worker { process, http };
        let deadline = Instant::now() + PATIENCE;
        while !worker.get("/readyz").await.is_ok_and(|answer| answer.starts_with("HTTP/1.1 200")) {
            ensure!(Instant::now() < deadline, "the worker is not ready in time");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(worker)
    }

    /// Does something with it and ends it, whatever became of that.
    pub async fn during<T>(self, work: impl AsyncFnOnce(&Self) -> anyhow::Result<T>) -> anyhow::Result<T> {
        let done = work(&self).await;
        self.end().await?;
        done
    }

    /// Deletes queues, exchanges and the database.
    async fn end(self) -> anyhow::Result<()> {
        let shown = self.run(&["topology", "show", "--json"]).await?;
        let shown: Value = serde_json::from_slice(&shown).context("reading the topology")?;
        let broker = super::broker::Broker::connect(&self.amqp_url).await?;
        for name in names(&shown["queues"]) {
            broker.delete_queue(name).await?;
        }
        for name in names(&shown["exchanges"]) {
            broker.delete_exchange(name).await?;
        }
        broker.close().await?;
        self.admin(format!("DROP DATABASE IF EXISTS {} WITH (FORCE)", self.database)).await?;
        std::fs::remove_file(&self.leftover)?;
        Ok(())
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command
            .args(arguments)
            .env("AMQP_URL", &self.amqp_url)
            .env("DATABASE_URL", self.url())
            .env("SENDOFF__AMQP__PREFIX", &self.prefix)
            .env("SENDOFF__ENCRYPTION__KEYS", KEY)
            .env("SENDOFF__DELIVERY__CUSTOM_SMTP", "all")
            // The servers are on this machine, and speak no TLS: the same for everybody.
            .env("SENDOFF__EGRESS__ALLOW_NETWORKS", "127.0.0.0/8")
            .env("SENDOFF__EGRESS__ALLOWED_PORTS", "*")
            .env("SENDOFF__EGRESS__ALLOW_PLAINTEXT_AUTH", "true")
            .env("SENDOFF__SMTP__HELLO_NAME", "worker.example")
            .env("SENDOFF__HTTP__LISTEN", "127.0.0.1:0")
            .env("RUST_LOG", "info")
            .envs(self.settings.iter().map(|(key, value)| (key, value)))
            .stdin(Stdio::null())
            .kill_on_drop(true);
        command
    }

    async fn run(&self, arguments: &[&str]) -> anyhow::Result<Vec<u8>> {
        let output = tokio::time::timeout(PATIENCE, self.command(arguments).output()).await??;
        let complaint = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "sendoff {} failed: {complaint}", arguments.join(" "));
        Ok(output.stdout)
    }

    fn url(&self) -> String {
        let (base, query) = self.server.split_once('?').unwrap_or((&self.server, ""));
        let authority = base.find("://").map_or(0, |at| at + 3);
        let path = base[authority..].find('/').map_or(base.len(), |at| authority + at);
        let query = if query.is_empty() { String::new() } else { format!("?{query}") };
        format!("{}/{}{query}", &base[..path], self.database)
    }

    async fn admin(&self, statement: String) -> anyhow::Result<()> {
        let mut session = PgConnection::connect(&self.server).await.context("connecting to DATABASE_URL")?;
        session.execute(AssertSqlSafe(statement)).await?;
        Ok(())
    }
}

fn names(listed: &Value) -> impl Iterator<Item = &str> {
    listed.as_array().into_iter().flatten().filter_map(|one| one["name"].as_str())
}

async fn write(configs: &SmtpConfigs, name: &str, port: u16) -> anyhow::Result<()> {
    let organization = OrganizationId::parse(name).context("an organization's name")?;
    let new = NewSmtpConfig {
        from_email: EmailAddress::parse(&format!("bookings@{name}.example")).context("a sender")?,
        from_name: "Acme Bookings".to_owned(),
        host: "127.0.0.1".to_owned(),
        port,
        secure: false,
        credentials: Credentials::new(ACCOUNT.0.to_owned(), ACCOUNT.1.to_owned()),
        overrides: Overrides::default(),
    };
    let entry = AuditEntry {
        actor: Some("bench"),
        user_id: None,
        organization: Some(&organization),
        command: "smtp_config.create",
        outcome: "ok",
        fields: &[],
    };
    let by = tokio::time::Instant::now() + PATIENCE;
    configs.create(&organization, &new, entry, by).await.context("storing a configuration")?;
    Ok(())
}

/// A worker that runs.
pub struct Worker {
    /// Its process.
    pub process: Process,
    http: String,
}

impl Worker {
    /// The sum of every series of a counter that carries all of these labels.
    pub async fn metric(&self, name: &str, labels: &[&str]) -> anyhow::Result<f64> {
        let text = self.get("/metrics").await?;
        let series = text.lines().filter(|line| {
            line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' ']))
                && labels.iter().all(|label| line.contains(label))
        });
        Ok(series.filter_map(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok()).sum())
    }

    async fn get(&self, path: &str) -> anyhow::Result<String> {
        let mut stream = tokio::net::TcpStream::connect(&self.http).await?;
        let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        Ok(answer)
    }
}
