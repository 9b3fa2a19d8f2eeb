//! Room for great jobs: reading, composing and sending one takes several times its body.
//! Guarantee: the copies of great bodies are bounded whatever comes; they are served first come, first served, and small jobs,
//! which are most, never wait here.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// A job of so many bytes is great: it is read and composed where it holds nobody up, for the locks and heartbeats of the worker
/// share its threads.
pub const GREAT_BYTES: usize = 256 << 10;
/// Bytes that the great jobs under way may take, in decoded attachments and composed messages.
const WORK_BYTES: usize = 128 << 20;
/// What a job under way takes, in bodies: its attachments decoded, and the message.
const COPIES: usize = 2;
/// Great bodies that are read, or copied for the broker, at once.
const AT_ONCE: usize = 4;

/// What is left of the room; cheap to clone.
#[derive(Clone)]
pub struct Weights {
    work: Arc<Semaphore>,
    copying: Arc<Semaphore>,
}

/// A great job's room, for as long as it is under way; nothing for a small one.
#[must_use]
#[derive(Debug, Default)]
pub struct Weight {
    _permit: Option<OwnedSemaphorePermit>,
}

impl Default for Weights {
    fn default() -> Self {
        let permits = WORK_BYTES / GREAT_BYTES;
        Self { work: Arc::new(Semaphore::new(permits)), copying: Arc::new(Semaphore::new(AT_ONCE)) }
    }
}

impl Weights {
    /// Waits for the room that composing and sending a body of so many bytes takes.
    pub async fn work(&self, bytes: usize) -> Weight {
        if bytes < GREAT_BYTES {
            return Weight::default();
        }
        let permits = (bytes.saturating_mul(COPIES) / GREAT_BYTES).min(WORK_BYTES / GREAT_BYTES);
        take(&self.work, permits).await
    }

    /// Waits for the turn of a body of so many bytes to be read, or copied for the broker.
    pub async fn copy(&self, bytes: usize) -> Weight {
        if bytes < GREAT_BYTES { Weight::default() } else { take(&self.copying, 1).await }
    }
}

async fn take(semaphore: &Arc<Semaphore>, permits: usize) -> Weight {
    // Nobody closes it; without it the work would go on unbounded, but go on.
    Weight { _permit: semaphore.clone().acquire_many_owned(permits as u32).await.ok() }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[tokio::test]
    async fn great_jobs_wait_for_room_in_turn_and_small_ones_do_not() {
        let weights = Weights::default();
        let great = 10 << 20;
        let mut held = Vec::new();
        while let Some(weight) = weights.work(great).now_or_never() {
            held.push(weight);
        }
        assert_eq!(held.len(), WORK_BYTES / (COPIES * great));
        let mut first = Box::pin(weights.work(100 << 20));
        assert!(first.as_mut().now_or_never().is_none());
        let mut second = Box::pin(weights.work(GREAT_BYTES));
        assert!(second.as_mut().now_or_never().is_none(), "it does not overtake");
        assert!(weights.work(GREAT_BYTES - 1).now_or_never().is_some());
        drop(held);
        assert!(first.as_mut().now_or_never().is_some());
        assert!(second.as_mut().now_or_never().is_some());
    }

    #[tokio::test]
    async fn a_job_greater_than_all_the_room_is_worked_on_alone() {
        let weights = Weights::default();
        let weight = weights.work(usize::MAX).await;
        assert!(weights.work(GREAT_BYTES).now_or_never().is_none());
        drop(weight);
        assert!(weights.work(GREAT_BYTES).now_or_never().is_some());
    }
}
