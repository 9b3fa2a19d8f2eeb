//! Scenario 3: a tenth of the jobs belong to organizations whose servers are silent, refuse or defer.
//! Guarantee: runs with and without them take turns; the healthy jobs are the same in both.

use std::time::Duration;

use sendoff::clock::Clock;

use super::watching::{times, trickle, until};
use crate::broker::{Broker, Route};
use crate::context::Context;
use crate::installation::Installation;
use crate::jobs::{self, Job};
use crate::report::{Section, Target, figure};
use crate::sink::Sink;
use crate::stats::{median, percentile};

const HEALTHY: usize = 50;
/// Five of each kind.
const SICK: usize = 15;
/// One job in so many belongs to a sick organization.
const SICK_EVERY: usize = 10;
/// Pace of the second half: far below what the worker can do, so that a wait is somebody's fault.
const PACE: Duration = Duration::from_millis(2);
const PATIENCE: Duration = Duration::from_secs(900);

struct Run {
    rate: f64,
    p50_ms: f64,
    p99_ms: f64,
}

/// Scenario 3.
pub async fn run(bench: &Context, origin: String) -> anyhow::Result<Section> {
    let jobs = bench.options.jobs(30_000);
    let paced = bench.options.jobs(15_000);
    let (mut without, mut with) = (Vec::new(), Vec::new());
    for _ in 0..bench.options.reps() {
        without.push(once(bench, jobs, paced, false).await?);
        with.push(once(bench, jobs, paced, true).await?);
    }
    let middle = |runs: &[Run], value: fn(&Run) -> f64| median(&runs.iter().map(value).collect::<Vec<_>>());
    let row = |what: &str, value: fn(&Run) -> f64| {
        let (without, with) = (middle(&without, value), middle(&with, value));
        vec![what.to_owned(), figure(without), figure(with), figure(with / without)]
    };
    let ratio = |value: fn(&Run) -> f64| middle(&with, value) / middle(&without, value);
    Ok(Section {
        title: "3. isolation: healthy mail beside sick servers".to_owned(),
        origin,
        prose: format!(
            "Of {jobs} jobs queued beforehand every tenth belongs to one of {SICK} organizations whose servers accept the \
             connection and never speak, refuse it, or answer each recipient with 451; the rest to {HEALTHY} healthy ones. \
             Then {paced} more arrive, 500 a second, in the same mixture. Only healthy jobs are counted; without the sick \
             ones there are as many of them."
        ),
        table: vec![
            ["healthy jobs, medians", "without", "with", "ratio"].map(str::to_owned).to_vec(),
            row("full queue: jobs/s", |run| run.rate),
            row("500 a second: p50, ms", |run| run.p50_ms),
            row("500 a second: p99, ms", |run| run.p99_ms),
        ],
        targets: vec![
            Target::at_least("healthy jobs/s against without", ratio(|run| run.rate), 0.95, "x"),
            Target::at_most("healthy p99 against without", ratio(|run| run.p99_ms), 2.0, "x"),
        ],
    })
}

async fn once(bench: &Context, jobs: usize, paced: usize, sick: bool) -> anyhow::Result<Run> {
    let sink = Sink::own(&["ok", "silent", "defer"]).await?;
    // Bound and not listening: a connection is refused, and nobody else gets the port.
    let refusing = tokio::net::TcpSocket::new_v4()?;
    refusing.bind(([127, 0, 0, 1], 0).into())?;
    let refused = refusing.local_addr()?.port();
    let healthy = (0..HEALTHY).map(|number| (format!("org-{number}"), sink.port(0)));
    let ports = [sink.port(1), refused, sink.port(2)];
    let ill = (0..SICK).map(|number| (format!("sick-{number}"), ports[number % ports.len()]));
    let organizations = healthy.chain(ill).collect();

    let work = async |installation: &Installation| {
        installation.organizations(organizations).await?;
        let exchange = installation.exchange();
        let broker = Broker::connect(&bench.amqp_url).await?;
        let queued = mixture("q", jobs, sick).map(|(_, job)| job);
        broker.publish(&Route::Exchange(&exchange), queued).await?;
        let worker = installation.worker().await?;
        let expected = healthy_of(jobs);
        let all = || sink.count_of(|one| one.label.starts_with("q")) >= expected;
        until("the healthy jobs are accepted", PATIENCE, all).await?;
        let rate = rate(&sink, expected);

        let given = trickle(&broker, &exchange, PACE, mixture("p", paced, sick), || false).await?;
        let given = given.into_iter().filter(|(label, _)| !label.contains("sick")).collect();
        let took = times(&sink, &given, PATIENCE).await?;
        broker.close().await?;
        // Not stopped in order: what it has in hand of the silent servers would hold it for half a minute.
        drop(worker);
        Ok(Run { rate, p50_ms: percentile(&took, 50.0), p99_ms: percentile(&took, 99.0) })
    };
    Installation::create(bench, Vec::new()).await?.during(work).await
}

/// Jobs a second from the first healthy one accepted to the last.
fn rate(sink: &Sink, jobs: usize) -> f64 {
    let at: Vec<i64> = sink.accepted().iter().map(|one| one.at).collect();
    let (first, last) = (at.iter().min().copied().unwrap_or(0), at.iter().max().copied().unwrap_or(0));
    jobs as f64 / ((last - first) as f64 / 1e6)
}

fn healthy_of(jobs: usize) -> usize {
    (0..jobs).filter(|number| number % SICK_EVERY != SICK_EVERY - 1).count()
}

/// With their recipients; without the sick ones there is nothing in their place.
fn mixture(label: &str, jobs: usize, sick: bool) -> impl Iterator<Item = (String, Job)> {
    let clock = Clock::system();
    (0..jobs).filter_map(move |number| {
        let ill = number % SICK_EVERY == SICK_EVERY - 1;
        if ill && !sick {
            return None;
        }
        let (organization, label) = if ill {
            (format!("sick-{}", number / SICK_EVERY % SICK), format!("sick-{label}{number}"))
        } else {
            (format!("org-{}", number % HEALTHY), format!("{label}{number}"))
        };
        let job = jobs::confirmation(&clock, &organization, &label);
        Some((label, job))
    })
}
