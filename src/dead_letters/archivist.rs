//! The archivist: takes dead letters off their queue, puts them into the archive, and only then takes leave of them.
//! Guarantee: a letter is acknowledged after its row is committed and, where the broker was the killer, its death is
//! announced. Whatever fails before that, this worker included, leaves it on its queue.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use time::OffsetDateTime;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::letter::{event_of, letter_of};
use crate::broker::{Deliveries, Delivery, Publisher, Settled};
use crate::clock::Clock;
use crate::model::letter::{Killer, LetterId, NewLetter};
use crate::shutdown::Shutdown;
use crate::store::{Archived, DeadLetters, StoreError};

/// Letters in this worker's hands at once, and in one batch. They can be as large as the broker takes them.
pub const PREFETCH: u16 = 32;
/// A batch that has so many bytes of bodies takes no further letter.
const BATCH_BYTES: usize = 8 << 20;
/// How long a batch waits for further letters: what the library has prefetched comes within it.
const LINGER: Duration = Duration::from_millis(20);
/// After a failure that is not the letters' own.
const PAUSE: Duration = Duration::from_secs(1);
/// How long a letter that the database refuses stays in hand before it goes back to be tried again.
const REFUSED_PAUSE: Duration = Duration::from_secs(60);
/// How long one event may take to be confirmed.
const ANNOUNCING: Duration = Duration::from_secs(10);
/// Letters that are taken one at a time after a panic, so that the guilty one takes no neighbour with it: those that
/// were in hand, and those behind them.
const SINGLY_AFTER_PANIC: usize = 2 * PREFETCH as usize;
/// Refused letters that are remembered, so that each is logged once.
const COMPLAINTS_MAX: usize = 1000;

/// Told of each error of the database.
pub type OnLoss = Box<dyn Fn(&StoreError) + Send + Sync>;

/// What the archivist works with.
pub struct Archivist {
    /// Where the letters go.
    pub archive: DeadLetters,
    /// For what nobody has announced.
    pub publisher: Publisher,
    /// Whom to tell that the database is away.
    pub on_loss: OnLoss,
    /// Time.
    pub clock: Clock,
    /// When to stop.
    pub shutdown: Shutdown,
}

/// Letters in hand, each with its delivery.
struct Batch {
    deliveries: Vec<Delivery>,
    letters: Vec<NewLetter>,
}

/// What a batch left to do.
#[derive(Default)]
struct Left {
    /// Letters that the database refuses, each by itself, and why.
    refused: Vec<(Delivery, LetterId, StoreError)>,
    /// Some went back for a reason that others share: not at once again.
    pause: bool,
}

impl Archivist {
    /// Archives until the deliveries end. What is in hand then is finished, unless the worker is told to stop.
    pub async fn run(self, mut deliveries: Deliveries) {
        let this = Arc::new(self);
        let (mut waiting, mut complaints, mut singly) = (JoinSet::new(), HashSet::new(), 0_usize);
        loop {
            let most = if singly > 0 { 1 } else { PREFETCH.into() };
            let Some(taken) = collect(&mut deliveries, most).await else { break };
            singly = singly.saturating_sub(1);
            let archiving = this.clone();
            // A task of its own: a panic ends it and gives its deliveries back, and nothing else.
            let left = tokio::spawn(async move { archiving.archive_all(taken).await }).await;
            let left = left.unwrap_or_else(|_| {
                tracing::error!("archiving panicked; its letters go back to their queue");
                singly = SINGLY_AFTER_PANIC;
                Left { pause: true, ..Left::default() }
            });
            for (delivery, letter, error) in left.refused {
                complain(&mut complaints, letter, &error);
                waiting.spawn(requeue_later(delivery, this.shutdown.clone()));
            }
            while waiting.try_join_next().is_some() {}
            if left.pause {
                tokio::select! {
                    () = this.shutdown.stop_taking() => {}
                    () = tokio::time::sleep(PAUSE) => {}
                }
            }
        }
        while waiting.join_next().await.is_some() {}
    }

    /// All at once where the database takes them so, else each by itself.
    async fn archive_all(&self, deliveries: Vec<Delivery>) -> Left {
        let mut left = Left::default();
        let mut batches = vec![Batch::read(deliveries, self.clock.now())];
        while let Some(batch) = batches.pop() {
            let archived = tokio::select! {
                biased;
                () = self.shutdown.stop_now() => None,
                archived = self.archive.archive(&batch.letters) => Some(archived),
            };
            match archived {
                Some(Ok(answers)) => left.pause |= !self.finish(batch, &answers).await,
                Some(Err(StoreError::Internal(_))) if batch.letters.len() > 1 => {
                    batches.extend(batch.singles());
                }
                Some(Err(error @ StoreError::Internal(_))) => left.refused.extend(batch.refused(&error)),
                not_now => {
                    if let Some(Err(error)) = not_now {
                        (self.on_loss)(&error);
                    }
                    batches.push(batch);
                    requeue(batches.drain(..).flat_map(|batch| batch.deliveries)).await;
                    left.pause = true;
                }
            }
        }
        left
    }

    /// Announces what nobody has announced and takes leave of what is committed; whether all went.
    async fn finish(&self, batch: Batch, answers: &[Archived]) -> bool {
        let each = batch.deliveries.into_iter().zip(&batch.letters).zip(answers);
        let finished = join_all(each.map(async |((delivery, letter), answer)| {
            // The archivist that committed it may have died before it said so.
            let untold = *answer != Archived::Known || letter.redelivered;
            if letter.killer == Killer::Broker && untold && !self.announce(letter).await {
                requeue([delivery]).await;
                return false;
            }
            if delivery.ack() == Settled::ChannelLost {
                tracing::debug!(
                    "a letter's acknowledgement was lost with its channel; the archive will know it"
                );
            }
            true
        }));
        finished.await.into_iter().all(|went| went)
    }

    async fn announce(&self, letter: &NewLetter) -> bool {
        let publisher = self.publisher.with_patience(ANNOUNCING);
        let event = event_of(letter);
        let announced = tokio::select! {
            biased;
            () = self.shutdown.stop_now() => return false,
            announced = publisher.event(&event) => announced,
        };
        if let Err(error) = &announced {
            tracing::warn!(letter = %letter.id(), %error, "a death could not be announced; its letter goes back");
        }
        announced.is_ok()
    }
}

impl Batch {
    fn read(deliveries: Vec<Delivery>, now: OffsetDateTime) -> Self {
        let letters = deliveries.iter().map(|delivery| letter_of(delivery.received(), now)).collect();
        Self { deliveries, letters }
    }

    fn singles(self) -> impl Iterator<Item = Self> {
        let each = self.deliveries.into_iter().zip(self.letters);
        each.map(|(delivery, letter)| Self { deliveries: vec![delivery], letters: vec![letter] })
    }

    fn refused(self, error: &StoreError) -> impl Iterator<Item = (Delivery, LetterId, StoreError)> {
        let each = self.deliveries.into_iter().zip(self.letters);
        each.map(|(delivery, letter)| (delivery, letter.id(), error.clone()))
    }
}

/// Waits for a letter, then takes what else is there; `None` when there will be no more.
async fn collect(deliveries: &mut Deliveries, most: usize) -> Option<Vec<Delivery>> {
    let first = deliveries.next().await?;
    let deadline = Instant::now() + LINGER;
    let mut bytes = first.received().body.len();
    let mut taken = vec![first];
    while taken.len() < most && bytes < BATCH_BYTES {
        let Ok(Some(next)) = tokio::time::timeout_at(deadline, deliveries.next()).await else { break };
        bytes += next.received().body.len();
        taken.push(next);
    }
    Some(taken)
}

/// Where the channel was lost, the broker has taken them back already.
async fn requeue(deliveries: impl IntoIterator<Item = Delivery>) {
    for delivery in deliveries {
        let _settled = delivery.requeue().await;
    }
}

async fn requeue_later(delivery: Delivery, shutdown: Shutdown) {
    tokio::select! {
        () = shutdown.stop_taking() => {}
        () = tokio::time::sleep(REFUSED_PAUSE) => {}
    }
    requeue([delivery]).await;
}

fn complain(complaints: &mut HashSet<LetterId>, letter: LetterId, error: &StoreError) {
    if complaints.len() >= COMPLAINTS_MAX {
        complaints.clear();
    }
    if complaints.insert(letter) {
        tracing::error!(%letter, %error, "the database refuses a letter; it stays on its queue and is tried again");
    }
}
