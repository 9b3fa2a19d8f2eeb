//! What goes on beside the lanes for as long as the worker runs: gauges, readiness, the cache's news, forgetting.
//! Guarantee: nothing here ends the worker or waits for a service, and everything ends with the second stage of a stop.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use crate::broker::BrokerState;
use crate::delivery::database::{DatabaseState, DatabaseWatch};
use crate::delivery::dispatch::Dispatcher;
use crate::http::{Part, Readiness};
use crate::secrets::KeyRing;
use crate::shutdown::Shutdown;
use crate::smtp::Pool;
use crate::store::{ConfigCache, ConfigChanges, Store, StoreError, Sweeper};
use crate::telemetry::{self, ConnectionState, Metrics};

/// Pause between two looks at the stored configurations while a key is missing.
const KEY_PAUSE: Duration = Duration::from_secs(10);
/// How often gauges are set.
const GAUGE_PAUSE: Duration = Duration::from_secs(1);
/// How often the letters in the archive are counted.
const COUNT_PAUSE: Duration = Duration::from_secs(60);
/// How often the failing organizations are counted: there are few.
const FAILING_PAUSE: Duration = Duration::from_secs(5);
/// How often ledger and archive are looked through for what has become old enough to be forgotten.
const SWEEP_PAUSE: Duration = Duration::from_secs(60);
/// While there is more to forget: the rest after each slice, in times of what the slice took. The database spends a fifth of
/// one session's time on it, and less of its own the more it is asked for.
const SWEEP_REST: u32 = 4;
/// The least rest.
const SWEEP_REST_MIN: Duration = Duration::from_millis(50);

pub(super) async fn follow_configs(cache: ConfigCache, store: Store, shutdown: Shutdown) {
    tokio::select! {
        () = cache.follow(ConfigChanges::new(store)) => {}
        () = shutdown.stop_now() => {}
    }
}

/// Keeps the readiness of the key ring true: looks at the start, when the worker has come upon a key that it lacks, and
/// while one is missing, for what needs it may be sealed anew meanwhile, or gone.
pub(super) async fn watch_keys(
    store: Store,
    keys: Arc<KeyRing>,
    readiness: Readiness,
    missing: Arc<Notify>,
    shutdown: Shutdown,
) {
    loop {
        let whole = match missing_keys(&store, &keys).await {
            Ok(missing) if missing.is_empty() => {
                readiness.up(Part::Keys);
                true
            }
            Ok(missing) => {
                let ids: Vec<String> = missing.iter().map(|id| format!("`{id}`")).collect();
                let problem = format!(
                    "encryption.keys lacks {}, which configurations or parked letters are sealed under",
                    ids.join(", ")
                );
                tracing::error!(%problem, "not ready");
                readiness.down(Part::Keys, problem);
                false
            }
            // The database's own part tells of it.
            Err(_) => false,
        };
        tokio::select! {
            () = shutdown.stop_now() => return,
            () = missing.notified(), if whole => {}
            () = tokio::time::sleep(KEY_PAUSE), if !whole => {}
        }
    }
}

async fn missing_keys(store: &Store, keys: &KeyRing) -> Result<BTreeSet<String>, StoreError> {
    let mut missing = store.try_sealed(keys).await?.missing_keys;
    missing.extend(store.keys_missing_for_parked(keys).await?);
    Ok(missing)
}

/// Keeps `/readyz` and the two gauges true.
pub(super) async fn show_state(
    readiness: Readiness,
    database: DatabaseWatch,
    mut broker: watch::Receiver<BrokerState>,
    shutdown: Shutdown,
) {
    let mut database = database.subscribe();
    loop {
        match &*database.borrow_and_update() {
            DatabaseState::Up => readiness.up(Part::Database),
            DatabaseState::Away(why) => readiness.down(Part::Database, why.clone()),
        }
        let reason = broker.borrow_and_update().reason().map(str::to_owned);
        telemetry::broker_connected(reason.is_none());
        match reason {
            None => readiness.up(Part::Broker),
            Some(why) => readiness.down(Part::Broker, why),
        }
        tokio::select! {
            () = shutdown.stop_now() => return,
            changed = database.changed() => if changed.is_err() { return },
            changed = broker.changed() => if changed.is_err() { return },
        }
    }
}
pub(super) async fn set_gauges(pool: Pool, dispatcher: Dispatcher, metrics: Metrics, shutdown: Shutdown) {
    loop {
        telemetry::connections(ConnectionState::Idle, pool.idle());
        telemetry::connections(ConnectionState::Busy, pool.active());
        let (waiting, in_flight) = dispatcher.counts();
        telemetry::dispatch(waiting, in_flight);
        metrics.upkeep();
        tokio::select! {
            () = shutdown.stop_now() => return,
            () = tokio::time::sleep(GAUGE_PAUSE) => {}
        }
    }
}

/// Keeps the gauge of the dead letters true.
pub(super) async fn count_dead_letters(store: Store, shutdown: Shutdown) {
    loop {
        match store.dead_letter_counts().await {
            Ok(counts) => telemetry::dead_letters(&counts),
            Err(error) => tracing::debug!(%error, "the dead letters could not be counted now"),
        }
        tokio::select! {
            () = shutdown.stop_now() => return,
            () = tokio::time::sleep(COUNT_PAUSE) => {}
        }
    }
}

/// Keeps the gauge of the organizations whose mail is parked true.
pub(super) async fn count_parked_organizations(store: Store, for_all: bool, shutdown: Shutdown) {
    loop {
        match store.failing_count(for_all).await {
            Ok(count) => telemetry::organizations_parked(usize::try_from(count).unwrap_or(usize::MAX)),
            Err(error) => tracing::debug!(%error, "the failing organizations could not be counted now"),
        }
        if !rested(FAILING_PAUSE, &shutdown).await {
            return;
        }
    }
}

/// Deletes what is past `ledger.retention_days`, slice by slice: at once while there is more, else as it becomes due.
pub(super) async fn forget_jobs(store: Store, retention: Duration, shutdown: Shutdown) {
    let mut sweeper = Sweeper::new(store);
    let mut pause = SWEEP_PAUSE;
    while rested(pause, &shutdown).await {
        let begun = Instant::now();
        pause = rest(begun, sweeper.sweep(retention).await.map(|sweep| sweep.complete));
    }
}

/// Deletes what is past `dead_letters.retention_days` in the same way.
pub(super) async fn forget_letters(store: Store, retention: Duration, shutdown: Shutdown) {
    let mut pause = SWEEP_PAUSE;
    while rested(pause, &shutdown).await {
        let begun = Instant::now();
        pause = rest(begun, store.forget_letters(retention).await.map(|letters| letters.complete));
    }
}

/// Whether the pause came to its end before the worker's.
async fn rested(pause: Duration, shutdown: &Shutdown) -> bool {
    tokio::select! {
        () = shutdown.stop_now() => false,
        () = tokio::time::sleep(pause) => true,
    }
}

/// The pause after a slice, which was the last one or not.
fn rest(begun: Instant, slice: Result<bool, StoreError>) -> Duration {
    match slice {
        Ok(false) => (SWEEP_REST * begun.elapsed()).max(SWEEP_REST_MIN),
        Ok(true) => SWEEP_PAUSE,
        Err(error) => {
            tracing::debug!(%error, "what is past its retention could not be looked through now");
            SWEEP_PAUSE
        }
    }
}
