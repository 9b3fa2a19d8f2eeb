//! Publishes what the commands have changed: `smtp_config.created`, `updated` and `deleted`.
//! Guarantee: what is looked for is a row that was committed with its change and goes when its event is confirmed, so an event
//! comes at least once, whoever dies and whatever is away meanwhile. No reply waits for it.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::join_all;
use tokio::sync::Notify;

use crate::broker::{PublishError, Publisher};
use crate::shutdown::Shutdown;
use crate::store::{ConfigEvent, Store, StoreError};

/// Between two looks for what another worker left, or this one could not publish.
const PAUSE: Duration = Duration::from_secs(1);
/// Taken together, and published at once.
const BATCH: u32 = 16;
/// For the broker to confirm; the next look tries again.
const PATIENCE: Duration = Duration::from_secs(5);
/// What was taken and is still there after so long is taken again: longer than publishing and forgetting take.
const LEASE: Duration = Duration::from_secs(10);

/// What a worker announces changes with.
pub struct Announcer {
    pub(super) store: Store,
    pub(super) publisher: Publisher,
    /// Told by each command that has changed something.
    pub(super) changed: Arc<Notify>,
    pub(super) shutdown: Shutdown,
}

impl Announcer {
    /// Until the second stage of a stop: commands end before it.
    pub async fn run(self) {
        loop {
            let more = tokio::select! {
                biased;
                () = self.shutdown.stop_now() => return,
                announced = AssertUnwindSafe(self.announce()).catch_unwind() => match announced {
                    Ok(Ok(more)) => more,
                    Ok(Err(error)) => {
                        tracing::debug!(%error, "changes to be announced could not be looked for now");
                        false
                    }
                    Err(_panic) => {
                        tracing::error!("announcing changes panicked; it begins anew");
                        false
                    }
                },
            };
            if more {
                continue;
            }
            tokio::select! {
                () = self.shutdown.stop_now() => return,
                () = self.changed.notified() => {}
                () = tokio::time::sleep(PAUSE) => {}
            }
        }
    }

    /// The next few; whether there may be more.
    async fn announce(&self) -> Result<bool, StoreError> {
        let due = self.store.take_config_events(BATCH, LEASE).await?;
        if due.is_empty() {
            return Ok(false);
        }
        let full = due.len() == usize::try_from(BATCH).unwrap_or(usize::MAX);
        let confirmed = join_all(due.into_iter().map(|due| self.publish(due))).await;
        let confirmed: Vec<ConfigEvent> = confirmed.into_iter().flatten().collect();
        self.store.forget_config_events(&confirmed).await?;
        Ok(full)
    }

    /// The event, where the broker has it.
    async fn publish(&self, due: ConfigEvent) -> Option<ConfigEvent> {
        let publisher = self.publisher.with_patience(PATIENCE);
        let Err(error) = publisher.event(&due.event).await else { return Some(due) };
        let event = due.event.what.routing_key();
        tracing::debug!(event, %error, "an event was not confirmed; it is tried again");
        // The exchange was deleted under the worker.
        if matches!(error, PublishError::Unroutable { .. })
            && let Err(error) = publisher.declare().await
        {
            tracing::warn!(%error, "cannot declare the topology");
        }
        None
    }
}
