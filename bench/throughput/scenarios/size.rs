//! Scenarios 6 and 7: ten thousand organizations, and a million jobs waiting.
//! Guarantee: the worker runs with its defaults; the small backlog is drained before and after the large one.

use std::path::Path;

use anyhow::{Context as _, ensure};
use tokio::process::Command;

use crate::contestants::{Race, Run};
use crate::context::Context;
use crate::options::Contestant;
use crate::report::{Section, Target, figure};

/// Megabytes of a mebibyte.
const MB: f64 = 1.048_576;
/// Jobs of each of the many organizations.
const HANDFUL: usize = 5;
/// Disk that a waiting job may take, in RabbitMQ (twice, for a time) and in PostgreSQL.
const BYTES_PER_JOB: u64 = 12_000;

/// Scenario 6.
pub async fn tenants(bench: &Context, origin: String) -> anyhow::Result<Section> {
    let organizations = bench.options.jobs(10_000);
    let race = Race { jobs: organizations * HANDFUL, organizations, connections: None };
    let mut runs = Vec::new();
    for _ in 0..bench.options.reps() {
        runs.push(race.against(bench, Contestant::Sendoff, None).await?);
    }
    let run = Run::median(&runs);
    let peak_mb = run.peak_mib * MB;
    let row = |what: &str, value: f64| vec![what.to_owned(), figure(value)];
    Ok(Section {
        title: "6. tenants: many organizations with a handful of jobs".to_owned(),
        origin,
        prose: format!(
            "{organizations} organizations, each with its own configuration and {HANDFUL} jobs, which are queued in turns: \
             every job is another organization's than the one before. One smtp-sink behind all of them. Default settings."
        ),
        table: vec![
            ["medians", "measured"].map(str::to_owned).to_vec(),
            row("jobs/s", run.rate),
            row("worker's processor time per job, µs", run.cpu_us),
            row("worker's peak memory, MB", peak_mb),
            row("PostgreSQL's processor time per job, µs", run.database_us),
        ],
        targets: vec![Target::at_most("worker's peak memory", peak_mb, 200.0, " MB")],
    })
}

/// Scenario 7.
pub async fn backlog(bench: &Context, origin: String) -> anyhow::Result<Section> {
    let (small, large) = (bench.options.small_backlog(), bench.options.backlog());
    ensure_room(bench, large).await?;
    let race = |jobs| Race { jobs, organizations: 50, connections: None };
    let mut runs = Vec::new();
    for _ in 0..bench.options.reps() {
        runs.push(race(small).against(bench, Contestant::Sendoff, None).await?);
    }
    let big = race(large).against(bench, Contestant::Sendoff, None).await?;
    for _ in 0..bench.options.reps() {
        runs.push(race(small).against(bench, Contestant::Sendoff, None).await?);
    }
    let little = Run::median(&runs);
    let row = |what: &str, value: fn(&Run) -> f64| {
        vec![
            what.to_owned(),
            figure(value(&little)),
            figure(value(&big)),
            figure(value(&big) / value(&little)),
        ]
    };
    let growth = big.late_mib / big.early_mib;
    Ok(Section {
        title: "7. backlog: many jobs waiting".to_owned(),
        origin,
        prose: format!(
            "{small} jobs (medians of the runs before and after the large one) and {large} jobs (once, drained to the last) of \
             50 organizations, queued beforehand. Default settings."
        ),
        table: vec![
            vec![String::new(), figure(small as f64), figure(large as f64), "ratio".to_owned()],
            row("jobs/s", |run| run.rate),
            row("worker's processor time per job, µs", |run| run.cpu_us),
            row("worker's peak memory, MiB", |run| run.peak_mib),
            row("worker's memory after 10,000 jobs (or half), MiB", |run| run.early_mib),
            row("worker's largest memory after that, MiB", |run| run.late_mib),
            row("RabbitMQ's processor time per job, µs", |run| run.broker_us),
            row("PostgreSQL's", |run| run.database_us),
        ],
        targets: vec![
            Target::at_least("jobs/s against the small backlog", big.rate / little.rate, 0.95, "x"),
            Target::at_most(
                "peak memory against the small backlog",
                big.peak_mib / little.peak_mib,
                1.1,
                "x",
            ),
            Target::at_most("largest memory against that after 10,000 jobs", growth, 1.1, "x"),
        ],
    })
}

/// A disk that runs full in the middle would take both services down.
async fn ensure_room(bench: &Context, jobs: usize) -> anyhow::Result<()> {
    let needed = BYTES_PER_JOB * jobs as u64;
    for path in [bench.services.join("rabbitmq/data"), bench.services.join("postgres/data")] {
        if path.exists() {
            let free = free_bytes(&path).await?;
            ensure!(
                free > needed,
                "{} has {} GB free, and a backlog of {jobs} jobs may take {} GB: make room, or give --backlog",
                path.display(),
                free / 1_000_000_000,
                needed / 1_000_000_000
            );
        }
    }
    Ok(())
}

async fn free_bytes(path: &Path) -> anyhow::Result<u64> {
    let output = Command::new("df").args(["--output=avail", "-B1"]).arg(path).output().await?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let last = text.lines().last().context("df says nothing")?;
    last.trim().parse().with_context(|| format!("df says {last}"))
}
