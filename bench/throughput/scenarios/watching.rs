//! What the scenarios about time share: jobs that are published at a pace, and how long each took to be accepted.
//! Guarantee: a job's time begins right before it is given to the broker and ends when the server answers the final dot.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use anyhow::ensure;
use tokio::time::MissedTickBehavior;

use crate::broker::{Broker, Route, confirmed, micros};
use crate::jobs::Job;
use crate::sink::{LOOK_EVERY, Sink};
use sendoff::clock::Clock;

/// Jobs that were given to the broker: recipient, and when in microseconds.
pub type Given = Vec<(String, i64)>;

/// Publishes a job each `every`, until the iterator ends or `enough` says so.
pub async fn trickle(
    broker: &Broker,
    exchange: &str,
    every: Duration,
    jobs: impl Iterator<Item = (String, Job)>,
    mut enough: impl FnMut() -> bool,
) -> anyhow::Result<Given> {
    let clock = Clock::system();
    let mut pace = tokio::time::interval(every);
    pace.set_missed_tick_behavior(MissedTickBehavior::Burst);
    let (mut given, mut confirms) = (Vec::new(), Vec::new());
    for (label, job) in jobs {
        pace.tick().await;
        if enough() {
            break;
        }
        given.push((label, micros(&clock)));
        confirms.push(broker.give(&Route::Exchange(exchange), &job).await?);
    }
    for confirm in confirms {
        confirmed(confirm).await?;
    }
    Ok(given)
}

/// Waits until a condition holds; `what` is what it is, for the error.
pub async fn until(what: &str, patience: Duration, mut holds: impl FnMut() -> bool) -> anyhow::Result<()> {
    let deadline = Instant::now() + patience;
    while !holds() {
        ensure!(Instant::now() < deadline, "{what}: not within {} s", patience.as_secs());
        tokio::time::sleep(LOOK_EVERY).await;
    }
    Ok(())
}

/// Waits until all of these were accepted, and returns how many milliseconds each took.
pub async fn times(sink: &Sink, given: &Given, patience: Duration) -> anyhow::Result<Vec<f64>> {
    let deadline = Instant::now() + patience;
    loop {
        let accepted = sink.accepted();
        let at: HashMap<&str, i64> = accepted.iter().map(|one| (one.label.as_str(), one.at)).collect();
        let took =
            given.iter().filter_map(|(label, begun)| Some((at.get(label.as_str())? - begun) as f64 / 1000.0));
        let took: Vec<f64> = took.collect();
        if took.len() == given.len() {
            return Ok(took);
        }
        ensure!(Instant::now() < deadline, "{} of {} jobs were accepted in time", took.len(), given.len());
        tokio::time::sleep(LOOK_EVERY * 5).await;
    }
}
