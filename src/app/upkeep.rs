//! What a worker does beside its work: it forgets what is past its retention, and counts the dead letters.
//! Guarantee: each of these ends with the worker, and a database that is away only makes it wait.

use std::time::Duration;

use tokio::time::Instant;

use crate::shutdown::Shutdown;
use crate::store::{Store, StoreError, Sweeper};
use crate::telemetry;

/// How often the database is looked through for what has become old enough to be forgotten.
const SWEEP_PAUSE: Duration = Duration::from_secs(60);
/// While there is more to forget: the rest after each slice, in times of what the slice took. The database spends a fifth of
/// one session's time on it, and less of its own the more it is asked for.
const SWEEP_REST: u32 = 4;
/// The least rest.
const SWEEP_REST_MIN: Duration = Duration::from_millis(50);
/// How often the letters in the archive are counted.
const COUNT_PAUSE: Duration = Duration::from_secs(60);

/// Deletes what is past `ledger.retention_days`, slice by slice: at once while there is more, else as it becomes due.
pub(super) async fn forget_jobs(store: Store, retention: Duration, shutdown: Shutdown) {
    let mut sweeper = Sweeper::new(store);
    let mut pause = SWEEP_PAUSE;
    while rested(pause, &shutdown).await {
        let begun = Instant::now();
        pause = rest(begun, sweeper.sweep(retention).await.map(|sweep| sweep.complete));
    }
}

/// The same for `dead_letters.retention_days`.
pub(super) async fn forget_letters(store: Store, retention: Duration, shutdown: Shutdown) {
    let mut pause = SWEEP_PAUSE;
    while rested(pause, &shutdown).await {
        let begun = Instant::now();
        pause = rest(begun, store.forget_letters(retention).await.map(|slice| slice.complete));
    }
}

/// Keeps the gauge of the dead letters true.
pub(super) async fn count_dead_letters(store: Store, shutdown: Shutdown) {
    loop {
        match store.dead_letter_counts().await {
            Ok(counts) => telemetry::dead_letters(&counts),
            Err(error) => tracing::debug!(%error, "the dead letters could not be counted now"),
        }
        if !rested(COUNT_PAUSE, &shutdown).await {
            return;
        }
    }
}

/// Waits; whether there is to be more work.
async fn rested(pause: Duration, shutdown: &Shutdown) -> bool {
    tokio::select! {
        () = shutdown.stop_now() => false,
        () = tokio::time::sleep(pause) => true,
    }
}

/// How long to rest after a slice, which says whether it was the last one.
fn rest(begun: Instant, complete: Result<bool, StoreError>) -> Duration {
    match complete {
        Ok(false) => (SWEEP_REST * begun.elapsed()).max(SWEEP_REST_MIN),
        Ok(true) => SWEEP_PAUSE,
        Err(error) => {
            tracing::debug!(%error, "what is past its retention could not be looked for now");
            SWEEP_PAUSE
        }
    }
}
