//! Scenario 5: the top of the hour, when all reminders are due while confirmations trickle.
//! Guarantee: runs with and without the reminders take turns, and confirmations are published at the same pace in both.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use sendoff::clock::Clock;

use super::watching::{times, trickle, until};
use crate::broker::{Broker, Route, micros};
use crate::context::Context;
use crate::installation::Installation;
use crate::jobs;
use crate::report::{Section, Target, figure};
use crate::sink::Sink;
use crate::stats::{median, percentile};

const ORGANIZATIONS: usize = 50;
/// Pace of the confirmations.
const PACE: Duration = Duration::from_millis(10);
/// How long they trickle before the hour strikes.
const LEAD: Duration = Duration::from_secs(5);
/// How long they are looked at where there are no reminders.
const SPAN_S: u64 = 15;
const PATIENCE: Duration = Duration::from_secs(600);

struct Run {
    p50_ms: f64,
    p99_ms: f64,
    /// Seconds until the last reminder was accepted.
    took_s: f64,
}

/// Scenario 5.
pub async fn run(bench: &Context, origin: String) -> anyhow::Result<Section> {
    let reminders = bench.options.jobs(20_000);
    let (mut without, mut with) = (Vec::new(), Vec::new());
    for _ in 0..bench.options.reps() {
        without.push(once(bench, 0).await?);
        with.push(once(bench, reminders).await?);
    }
    let middle = |runs: &[Run], value: fn(&Run) -> f64| median(&runs.iter().map(value).collect::<Vec<_>>());
    let row = |what: &str, value: fn(&Run) -> f64| {
        let (without, with) = (middle(&without, value), middle(&with, value));
        vec![what.to_owned(), figure(without), figure(with), figure(with / without)]
    };
    let ratio = middle(&with, |run| run.p99_ms) / middle(&without, |run| run.p99_ms);
    let mut took = row("all reminders sent, s", |run| run.took_s);
    took[1] = figure(f64::NAN);
    took[3] = figure(f64::NAN);
    Ok(Section {
        title: "5. reminders: confirmations at the top of the hour".to_owned(),
        origin,
        prose: format!(
            "Confirmations of {ORGANIZATIONS} organizations arrive 100 times a second. {reminders} reminders of the same \
             organizations are published as fast as the broker takes them, into their own lane. Counted are the confirmations \
             published from the first reminder's publication to the last one's acceptance; without reminders, those of {} s.",
            bench.options.seconds(SPAN_S)
        ),
        table: vec![
            ["confirmations, medians", "without", "with reminders", "ratio"].map(str::to_owned).to_vec(),
            row("p50, ms", |run| run.p50_ms),
            row("p99, ms", |run| run.p99_ms),
            took,
        ],
        targets: vec![Target::at_most("confirmations' p99 against without", ratio, 1.5, "x")],
    })
}

async fn once(bench: &Context, reminders: usize) -> anyhow::Result<Run> {
    let sink = Sink::own(&["ok"]).await?;
    let clock = Clock::system();
    let span = Duration::from_secs(bench.options.seconds(SPAN_S));
    let organization = |number: usize| format!("org-{}", number % ORGANIZATIONS);

    let work = async |installation: &Installation| {
        installation
            .organizations((0..ORGANIZATIONS).map(|number| (organization(number), sink.port(0))).collect())
            .await?;
        let exchange = installation.exchange();
        let worker = installation.worker().await?;
        let steady = Broker::connect(&bench.amqp_url).await?;
        let bulk = Broker::connect(&bench.amqp_url).await?;
        let over = AtomicBool::new(false);
        let endless = (0..).map(|number: usize| {
            let label = format!("c{number}");
            let job = jobs::confirmation(&clock, &organization(number), &label);
            (label, job)
        });
        let trickling = trickle(&steady, &exchange, PACE, endless, || over.load(Ordering::Relaxed));
        let striking = async {
            tokio::time::sleep(LEAD).await;
            let (begun, from) = (Instant::now(), micros(&clock));
            let due = (0..reminders)
                .map(|number| jobs::reminder(&clock, &organization(number), &format!("m{number}")));
            bulk.publish(&Route::Exchange(&exchange), due).await?;
            if reminders == 0 {
                tokio::time::sleep(span).await;
            }
            let all = || sink.count_of(|one| one.label.starts_with('m')) >= reminders;
            until("the reminders are accepted", PATIENCE, all).await?;
            over.store(true, Ordering::Relaxed);
            anyhow::Ok((begun.elapsed().as_secs_f64(), from))
        };
        let (given, (took_s, from)) = tokio::try_join!(trickling, striking)?;
        let given = given.into_iter().filter(|(_, at)| *at >= from).collect();
        let took = times(&sink, &given, PATIENCE).await?;
        steady.close().await?;
        bulk.close().await?;
        worker.process.stop().await?;
        Ok(Run { p50_ms: percentile(&took, 50.0), p99_ms: percentile(&took, 99.0), took_s })
    };
    Installation::create(bench, Vec::new()).await?.during(work).await
}
