//! One contestant drains one full queue into one sink, and is measured from outside.
//! Guarantee: all are measured by the same code, from the first message accepted to the last, start-up not counted; and
//! none passes that left a job in its queue.

use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use sendoff::clock::Clock;
use tokio::process::Command;

use super::broker::{Broker, Route};
use super::context::Context;
use super::installation::{ACCOUNT, Installation, Worker};
use super::jobs::{self, Job};
use super::options::Contestant;
use super::process::{Process, Service};
use super::sink::{LOOK_EVERY, Sink};
use super::stats::median;

/// Longest time without a message accepted.
const PATIENCE: Duration = Duration::from_secs(700);
/// What was accepted is acknowledged by now.
const SETTLED_AFTER: Duration = Duration::from_millis(500);
/// From here on memory should not grow.
const SETTLED_IN: u64 = 10_000;
/// Deliveries that a worker may hold: sendoff's own default is 512.
const PREFETCH: &str = "500";

/// What is to be done.
pub struct Race {
    /// Jobs in the queue.
    pub jobs: usize,
    /// Organizations that the worker's jobs belong to, one job each in turn. The peers do not know of organizations: they
    /// have one pool.
    pub organizations: usize,
    /// SMTP connections in all, of which each organization may use an equal share. `None`: the worker's defaults.
    pub connections: Option<usize>,
}

/// What it took. Processor times are microseconds for each job.
#[derive(Clone, Copy)]
pub struct Run {
    /// Jobs a second.
    pub rate: f64,
    /// Of the worker's process.
    pub cpu_us: f64,
    /// Largest resident set.
    pub peak_mib: f64,
    /// Resident set when [`SETTLED_IN`] jobs, or half of all, were sent.
    pub early_mib: f64,
    /// Largest resident set that was seen from then on.
    pub late_mib: f64,
    /// Of RabbitMQ.
    pub broker_us: f64,
    /// Of PostgreSQL.
    pub database_us: f64,
    /// Of the sink.
    pub sink_us: f64,
}

impl Race {
    /// Has the contestant do it, with smtp-sink, or with an own server of this manner.
    pub async fn against(
        &self,
        bench: &Context,
        contestant: Contestant,
        manner: Option<&str>,
    ) -> anyhow::Result<Run> {
        let sink = match manner {
            Some(manner) => Sink::own(&[manner]).await?,
            None => Sink::postfix().await?,
        };
        self.run(bench, contestant, &sink).await
    }

    /// Has the contestant do it.
    async fn run(&self, bench: &Context, contestant: Contestant, sink: &Sink) -> anyhow::Result<Run> {
        match contestant {
            Contestant::Sendoff => self.sendoff(bench, sink).await.context("sendoff"),
            Contestant::SmtpSource => self.smtp_source(bench, sink).await.context("smtp-source"),
            Contestant::Nodemailer => {
                let mut command = Command::new("node");
                command.arg(bench.peer("nodemailer").join("worker.js"));
                self.peer(bench, logging_in(command), sink).await.context("nodemailer")
            }
            // It insists on 235 after AUTH, where smtp-sink says 250: it sends without a login.
            Contestant::Aiosmtplib => {
                let directory = bench.peer("aiosmtplib");
                let mut command = Command::new(directory.join("venv/bin/python"));
                command.arg(directory.join("worker.py"));
                self.peer(bench, command, sink).await.context("aiosmtplib")
            }
            Contestant::Lettre => {
                let command = Command::new(bench.peer("lettre").join("release/bench-peer-lettre"));
                self.peer(bench, logging_in(command), sink).await.context("lettre")
            }
        }
    }

    fn all_jobs(&self) -> impl Iterator<Item = Job> {
        let clock = Clock::system();
        let organizations = self.organizations;
        (0..self.jobs).map(move |number| {
            jobs::confirmation(&clock, &format!("org-{}", number % organizations), &format!("r{number}"))
        })
    }

    async fn sendoff(&self, bench: &Context, sink: &Sink) -> anyhow::Result<Run> {
        let settings = self.connections.map_or_else(Vec::new, |connections| {
            let share = (connections / self.organizations).max(1);
            vec![
                ("SENDOFF__SMTP__MAX_CONNECTIONS_PER_ORGANIZATION", share.to_string()),
                ("SENDOFF__DELIVERY__MAX_SESSIONS", connections.to_string()),
            ]
        });
        let installation = Installation::create(bench, settings).await?;
        let work = async |installation: &Installation| {
            let configs = (0..self.organizations).map(|number| (format!("org-{number}"), sink.port(0)));
            installation.organizations(configs.collect()).await?;
            self.fill(bench, &Route::Exchange(&installation.exchange())).await?;
            let worker = installation.worker().await?;
            let run = self.watch(bench, &worker.process, sink, settled(&worker, self.jobs)).await?;
            worker.process.stop().await?;
            ensure_empty(bench, &installation.lane("notifications")).await?;
            Ok(run)
        };
        installation.during(work).await
    }

    async fn peer(&self, bench: &Context, mut command: Command, sink: &Sink) -> anyhow::Result<Run> {
        let queue = "bench-peer";
        let broker = Broker::connect(&bench.amqp_url).await?;
        // Of a run that was killed.
        broker.delete_queue(queue).await?;
        broker.declare(queue).await?;
        let run = async {
            self.fill(bench, &Route::Queue(queue)).await?;
            command
                .env("AMQP_URL", &bench.amqp_url)
                .env("QUEUE", queue)
                .env("SMTP_HOST", "127.0.0.1")
                .env("SMTP_PORT", sink.port(0).to_string())
                .env("CONNECTIONS", self.connections.unwrap_or(1).to_string())
                .env("PREFETCH", PREFETCH)
                .stdin(Stdio::null());
            let process = Process::start(&mut command, "the peer")?;
            let acknowledged = async {
                tokio::time::sleep(SETTLED_AFTER).await;
                Ok(())
            };
            let run = self.watch(bench, &process, sink, acknowledged).await?;
            process.stop().await?;
            ensure_empty(bench, queue).await?;
            Ok(run)
        };
        let run = run.await;
        broker.delete_queue(queue).await?;
        broker.close().await?;
        run
    }

    async fn smtp_source(&self, bench: &Context, sink: &Sink) -> anyhow::Result<Run> {
        let mut command = Command::new("smtp-source");
        let (sessions, jobs) = (self.connections.unwrap_or(1).to_string(), self.jobs.to_string());
        command.args(["-d", "-s", &sessions, "-m", &jobs, "-l", "4500"]);
        command.arg(format!("127.0.0.1:{}", sink.port(0))).stdin(Stdio::null());
        let process = Process::start(&mut command, "smtp-source")?;
        let ended = async {
            while !process.has_ended() {
                tokio::time::sleep(LOOK_EVERY).await;
            }
            Ok(())
        };
        let run = self.watch(bench, &process, sink, ended).await?;
        process.wait().await?;
        Ok(run)
    }

    async fn fill(&self, bench: &Context, route: &Route<'_>) -> anyhow::Result<()> {
        let broker = Broker::connect(&bench.amqp_url).await?;
        broker.publish(route, self.all_jobs()).await?;
        broker.close().await
    }

    /// Measures from the first message accepted to the last; `settled` ends when the processor time is to be read.
    async fn watch(
        &self,
        bench: &Context,
        process: &Process,
        sink: &Sink,
        settled: impl Future<Output = anyhow::Result<()>>,
    ) -> anyhow::Result<Run> {
        let jobs = self.jobs as u64;
        let mut peak_mib = f64::NAN;
        let (mut early_mib, mut late_mib) = (None, f64::NAN);
        let mut first = None;
        let (mut last, mut progress) = (0, Instant::now());
        loop {
            let count = sink.count();
            let now = Instant::now();
            if count > 0 && first.is_none() {
                first = Some((now, count, Used::now(bench, process, sink)?));
            }
            peak_mib = process.peak_mib().unwrap_or(peak_mib);
            if count >= SETTLED_IN.min(jobs / 2)
                && let Some(resident) = process.resident_mib()
            {
                early_mib.get_or_insert(resident);
                late_mib = resident.max(late_mib);
            }
            if count >= jobs {
                break;
            }
            if count > last {
                (last, progress) = (count, now);
            }
            if process.has_ended() && now - progress > SETTLED_AFTER {
                bail!("it ended after {count} of {jobs} messages");
            }
            ensure!(now - progress < PATIENCE, "{count} of {jobs} messages, and no further one for too long");
            tokio::time::sleep(LOOK_EVERY).await;
        }
        let ended = Instant::now();
        settled.await?;
        let (started, counted, before) = first.context("nothing was accepted")?;
        let after = Used::now(bench, process, sink)?;
        let drained = jobs.saturating_sub(counted) as f64;
        let each = |before: f64, after: f64| (after - before) * 1e6 / drained;
        Ok(Run {
            rate: drained / (ended - started).as_secs_f64(),
            cpu_us: each(before.worker, after.worker),
            peak_mib: process.peak_mib().unwrap_or(peak_mib),
            early_mib: early_mib.unwrap_or(f64::NAN),
            late_mib,
            broker_us: each(before.broker, after.broker),
            database_us: each(before.database, after.database),
            sink_us: each(before.sink, after.sink),
        })
    }
}

fn logging_in(mut command: Command) -> Command {
    command.env("SMTP_USERNAME", ACCOUNT.0).env("SMTP_PASSWORD", ACCOUNT.1);
    command
}

/// Waits until the worker has recorded and acknowledged so many jobs as sent.
async fn settled(worker: &Worker, jobs: usize) -> anyhow::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let sent = worker.metric("sendoff_jobs_settled_total", &["outcome=\"sent\""]).await?;
        if sent >= jobs as f64 {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "{sent} of {jobs} jobs were settled");
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// What a worker that has ended did not acknowledge is back in its queue.
async fn ensure_empty(bench: &Context, queue: &str) -> anyhow::Result<()> {
    let broker = Broker::connect(&bench.amqp_url).await?;
    let length = broker.length(queue).await?;
    broker.close().await?;
    ensure!(length == 0, "{length} jobs were not acknowledged");
    Ok(())
}

impl Run {
    /// The median of each figure.
    pub fn median(runs: &[Self]) -> Self {
        let middle = |value: fn(&Self) -> f64| median(&runs.iter().map(value).collect::<Vec<f64>>());
        Self {
            rate: middle(|run| run.rate),
            cpu_us: middle(|run| run.cpu_us),
            peak_mib: middle(|run| run.peak_mib),
            early_mib: middle(|run| run.early_mib),
            late_mib: middle(|run| run.late_mib),
            broker_us: middle(|run| run.broker_us),
            database_us: middle(|run| run.database_us),
            sink_us: middle(|run| run.sink_us),
        }
    }
}

/// Seconds of processor used so far.
struct Used {
    worker: f64,
    broker: f64,
    database: f64,
    sink: f64,
}

impl Used {
    fn now(bench: &Context, process: &Process, sink: &Sink) -> anyhow::Result<Self> {
        let of = |service: &Option<Service>| service.as_ref().map_or(f64::NAN, Service::cpu_s);
        Ok(Self {
            worker: process.cpu_s()?,
            broker: of(&bench.rabbitmq),
            database: of(&bench.postgres),
            sink: sink.cpu_s(),
        })
    }
}
