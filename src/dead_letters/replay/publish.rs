//! Copies on their way to the broker, several at once and so many a second.
//! Guarantee: a copy counts as confirmed only when the broker has said so; after a failure no further one is begun.

use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::time::Instant;

use crate::broker::{JobHeaders, PublishError, Publisher};
use crate::model::letter::Letter;
use crate::shutdown::Shutdown;
use crate::store::ReplayCopy;

use super::judge::Ready;
use super::{Ended, Publishing, Replayer};

/// Copies without their confirm yet.
const WINDOW: usize = 64;
/// Between two tries of one copy.
const PAUSE: Duration = Duration::from_millis(500);
/// What was missed while nothing could be published is not made up for, beyond this.
const CATCH_UP: Duration = Duration::from_millis(100);

/// So many a second, evenly.
pub(super) struct Pacer {
    gap: Duration,
    next: Instant,
}

impl Pacer {
    pub(super) fn new(rate: u32) -> Self {
        Self { gap: Duration::from_secs(1) / rate.max(1), next: Instant::now() }
    }

    /// When the next one may begin.
    fn slot(&mut self) -> Instant {
        let now = Instant::now();
        let slot = self.next.max(now.checked_sub(CATCH_UP).unwrap_or(now));
        self.next = slot + self.gap;
        slot
    }
}

impl Publishing {
    /// Publishes copies that are recorded. The positions of those that are confirmed, and why the rest is not.
    pub(super) async fn publish(
        &mut self,
        replayer: &Replayer,
        copies: &[(Letter, Ready, ReplayCopy)],
    ) -> (Vec<usize>, Option<Ended>) {
        let patience = replayer.patience;
        let (publisher, shutdown) = (&self.publisher, &replayer.shutdown);
        let (mut confirmed, mut failure) = (Vec::with_capacity(copies.len()), None);
        let mut flying = FuturesUnordered::new();
        let mut waiting = copies.iter().enumerate().peekable();
        loop {
            let may_begin = failure.is_none() && waiting.peek().is_some() && flying.len() < WINDOW;
            if !may_begin && flying.is_empty() {
                return (confirmed, failure);
            }
            if may_begin {
                let slot = self.pacer.slot();
                let pause = tokio::time::sleep_until(slot);
                let mut pause = std::pin::pin!(pause);
                loop {
                    tokio::select! {
                        biased;
                        Some((position, outcome)) = flying.next() => note(position, outcome, &mut confirmed, &mut failure),
                        () = &mut pause => break,
                    }
                }
                if let (Some((position, copy)), None) = (waiting.next(), &failure) {
                    flying
                        .push(async move { (position, persist(publisher, shutdown, patience, copy).await) });
                }
            } else if let Some((position, outcome)) = flying.next().await {
                note(position, outcome, &mut confirmed, &mut failure);
            }
        }
    }
}

fn note(
    position: usize,
    outcome: Result<(), Ended>,
    confirmed: &mut Vec<usize>,
    failure: &mut Option<Ended>,
) {
    match outcome {
        Ok(()) => confirmed.push(position),
        Err(ended) => drop(failure.get_or_insert(ended)),
    }
}

/// Publishes one copy until it is confirmed: a second one of the same turn harms nobody.
pub(in crate::dead_letters) async fn persist(
    publisher: &Publisher,
    shutdown: &Shutdown,
    patience: Duration,
    (letter, ready, copy): &(Letter, Ready, ReplayCopy),
) -> Result<(), Ended> {
    let headers =
        JobHeaders { attempt: copy.attempts, first_at: copy.replayed_at, turn: copy.turn, faults: 0 };
    let deadline = Instant::now() + patience;
    let mut declared = false;
    loop {
        let publisher = publisher.with_patience(deadline.saturating_duration_since(Instant::now()));
        let error = tokio::select! {
            biased;
            () = shutdown.stop_now() => return Err(Ended::Interrupted),
            outcome = publisher.release(&ready.message, &ready.lane, headers) => match outcome {
                Ok(()) => return Ok(()),
                Err(error) => error,
            },
        };
        if Instant::now() >= deadline {
            return Err(Ended::Broker(error));
        }
        tracing::debug!(letter = %letter.letter, %error, "a copy was not confirmed; it is tried again");
        // The lane's queue was deleted under the run.
        if matches!(error, PublishError::Unroutable { .. }) && !declared {
            declared = true;
            if let Err(error) = publisher.declare().await {
                tracing::warn!(%error, "cannot declare the topology");
            }
        }
        tokio::select! {
            biased;
            () = shutdown.stop_now() => return Err(Ended::Interrupted),
            () = tokio::time::sleep(PAUSE) => {}
        }
    }
}
