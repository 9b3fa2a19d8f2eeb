//! Scenario 4: one slow organization's flood, and another's confirmation behind it in the same lane.
//! Guarantee: the first confirmation is published when the flood is being taken, the others when its lane has run empty.

use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use sendoff::clock::Clock;

use super::watching::{times, trickle, until};
use crate::broker::{Broker, Route};
use crate::context::Context;
use crate::installation::Installation;
use crate::jobs;
use crate::process::Service;
use crate::report::{Section, Target, figure};
use crate::sink::{LOOK_EVERY, Sink};
use crate::stats::{largest, median};

/// Confirmations after the flood, a second apart.
const AFTER: usize = 20;
/// A lane that is empty at so many looks in a row is done with.
const QUIET_LOOKS: u32 = 25;
const PATIENCE: Duration = Duration::from_secs(1200);

/// Scenario 4.
pub async fn run(bench: &Context, origin: String) -> anyhow::Result<Section> {
    let jobs = bench.options.jobs(100_000);
    let span = Duration::from_secs(bench.options.seconds(60));
    let sink = Sink::own(&["ok:100", "ok"]).await?;
    let organizations = vec![("flood".to_owned(), sink.port(0)), ("other".to_owned(), sink.port(1))];
    let clock = Clock::system();
    let confirmation = |number: usize| {
        let label = format!("c{number}");
        let job = jobs::confirmation(&clock, "other", &label);
        (label, job)
    };

    let work = async |installation: &Installation| {
        installation.organizations(organizations).await?;
        let broker = Broker::connect(&bench.amqp_url).await?;
        let exchange = installation.exchange();
        let worker = installation.worker().await?;
        let idle = broker_load(bench, span).await;
        worker.process.stop().await?;

        let flood = (0..jobs).map(|number| jobs::confirmation(&clock, "flood", &format!("f{number}")));
        broker.publish(&Route::Exchange(&exchange), flood).await?;
        let worker = installation.worker().await?;
        let begun = Instant::now();
        until("the flood is being sent", PATIENCE, || sink.count() > 0).await?;
        let one = std::iter::once(confirmation(0));
        let given = trickle(&broker, &exchange, Duration::from_secs(1), one, || false).await?;
        let behind = times(&sink, &given, PATIENCE).await?;

        until_empty(&broker, &installation.lane("notifications")).await?;
        let aside_s = begun.elapsed().as_secs_f64();
        let memory = worker.process.peak_mib().context("the worker has ended")?;
        let many = (1..=AFTER).map(confirmation);
        let given = trickle(&broker, &exchange, Duration::from_secs(1), many, || false).await?;
        let after = times(&sink, &given, PATIENCE).await?;
        let load = broker_load(bench, span).await;
        let pace = sink.count_of(|one| one.server == 0) as f64 / begun.elapsed().as_secs_f64();
        broker.close().await?;
        drop(worker);
        Ok((behind[0] / 1000.0, aside_s, after, load - idle, idle, memory, pace))
    };
    let (behind_s, aside_s, after, load, idle, memory, pace) =
        Installation::create(bench, Vec::new()).await?.during(work).await?;

    let after_s = largest(&after) / 1000.0;
    let row = |what: &str, value: f64| vec![what.to_owned(), figure(value)];
    Ok(Section {
        title: "4. flood: a confirmation behind a slow organization's flood".to_owned(),
        origin,
        prose: format!(
            "{jobs} jobs of one organization, whose server answers each command after 100 ms, are queued; the worker starts, \
             and another organization's confirmation is published behind them. When the lane has run empty, {AFTER} further \
             confirmations follow, a second apart. RabbitMQ's load is measured for {} s then, less that of the same time with \
             an idle worker and empty queues. Once.",
            span.as_secs()
        ),
        table: vec![
            ["", "measured"].map(str::to_owned).to_vec(),
            row("confirmation behind the flood, s", behind_s),
            row("the flood is put aside after, s", aside_s),
            row("confirmation after that, median, ms", median(&after)),
            row("confirmation after that, worst, ms", after_s * 1000.0),
            row("RabbitMQ's load for what is aside, cores", load),
            row("RabbitMQ's load when idle, cores", idle),
            row("the flood's own jobs/s in that time", pace),
            row("worker's peak memory, MiB", memory),
        ],
        targets: vec![
            Target::at_most("confirmation behind the flood", behind_s, 40.0, " s"),
            Target::at_most("confirmation once it is aside, worst", after_s, 2.0, " s"),
            Target::at_most("RabbitMQ's load for what is aside", load, 0.1, " cores"),
        ],
    })
}

/// RabbitMQ's processor time over a span, in cores.
async fn broker_load(bench: &Context, span: Duration) -> f64 {
    let used = || bench.rabbitmq.as_ref().map_or(f64::NAN, Service::cpu_s);
    let before = used();
    tokio::time::sleep(span).await;
    (used() - before) / span.as_secs_f64()
}

async fn until_empty(broker: &Broker, lane: &str) -> anyhow::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    let mut quiet = 0;
    while quiet < QUIET_LOOKS {
        quiet = if broker.length(lane).await? == 0 { quiet + 1 } else { 0 };
        ensure!(Instant::now() < deadline, "the flood is not put aside in time");
        tokio::time::sleep(LOOK_EVERY).await;
    }
    Ok(())
}
