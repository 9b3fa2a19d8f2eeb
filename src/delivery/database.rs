//! Whether the database can be asked, and who wants to know.
//! Guarantee: its loss and its return are each logged once; while it is away nothing is claimed, so nothing is sent.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use crate::shutdown::Shutdown;
use crate::store::{Incarnations, Store, StoreError};
use crate::telemetry;

/// First pause before a database that was lost is looked at again.
const LOOK_WHILE_AWAY: Duration = Duration::from_millis(500);
/// Longest such pause. Each return of the lanes hands out jobs that go back when the database is lost again, and the broker
/// counts how often.
const LONGEST_LOOK_WHILE_AWAY: Duration = Duration::from_secs(30);
/// A database that stayed for so long is trusted again.
const STEADY_AFTER: Duration = Duration::from_secs(30);
/// Pause between looks while it is there: for `/readyz` of a worker without jobs.
const LOOK_WHILE_UP: Duration = Duration::from_secs(5);

/// The database as the worker sees it; cheap to clone.
#[derive(Clone)]
pub struct DatabaseWatch {
    state: Arc<watch::Sender<DatabaseState>>,
}

/// Up, or away and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DatabaseState {
    /// It answers.
    Up,
    /// It does not, in the driver's words.
    Away(String),
}

impl DatabaseWatch {
    /// Starts in the state "away": nothing is claimed before the database has answered once.
    pub fn new() -> Self {
        let (state, _) = watch::channel(DatabaseState::Away("not asked yet".into()));
        Self { state: Arc::new(state) }
    }

    /// To be told of changes.
    pub fn subscribe(&self) -> watch::Receiver<DatabaseState> {
        self.state.subscribe()
    }

    /// Takes note of an error that some statement met; only a loss of the database counts.
    pub fn lost(&self, error: &StoreError) {
        if matches!(error, StoreError::Unavailable(_)) {
            self.set(DatabaseState::Away(error.to_string()));
        }
    }

    fn set(&self, new: DatabaseState) {
        let up = new == DatabaseState::Up;
        let mut turned = false;
        self.state.send_if_modified(|state| {
            let changed = *state != new;
            turned = (*state == DatabaseState::Up) != up;
            state.clone_from(&new);
            changed
        });
        if !turned {
            return;
        }
        telemetry::database_up(up);
        match new {
            DatabaseState::Up => tracing::info!("the database answers; lanes go on"),
            DatabaseState::Away(why) => {
                tracing::warn!(%why, "the database is away; lanes pause until it is back")
            }
        }
    }

    /// Asks the database now and then, more often while it is away, until the worker stops. A worker without an
    /// incarnation can claim nothing, so to it the database is as good as away.
    pub async fn run(self, store: Store, incarnations: Incarnations, shutdown: Shutdown) {
        let mut state = self.subscribe();
        let mut up_since = None;
        let mut pause = LOOK_WHILE_AWAY;
        loop {
            self.set(match store.ping().await {
                Ok(()) if incarnations.current().is_none() => {
                    DatabaseState::Away("this worker has no lock on an incarnation".into())
                }
                Ok(()) => DatabaseState::Up,
                Err(error) => DatabaseState::Away(error.to_string()),
            });
            if *state.borrow_and_update() == DatabaseState::Up {
                up_since.get_or_insert_with(Instant::now);
                tokio::select! {
                    () = shutdown.stop_now() => return,
                    () = tokio::time::sleep(LOOK_WHILE_UP) => continue,
                    // A loss that a statement met shortens the pause.
                    changed = state.changed() => if changed.is_err() { return },
                }
            }
            if let Some(since) = up_since.take() {
                pause = pause_after_loss(pause, since.elapsed());
            }
            tokio::select! {
                () = shutdown.stop_now() => return,
                () = tokio::time::sleep(pause) => {}
            }
        }
    }
}

/// The pause before the next look at a database that was lost after it had been up for so long.
fn pause_after_loss(last: Duration, up_for: Duration) -> Duration {
    if up_for >= STEADY_AFTER { LOOK_WHILE_AWAY } else { (last * 2).min(LONGEST_LOOK_WHILE_AWAY) }
}

impl Default for DatabaseWatch {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_database_that_is_lost_again_and_again_is_asked_less_and_less_often() {
        let moment = Duration::from_millis(20);
        let pauses =
            std::iter::successors(Some(LOOK_WHILE_AWAY), |pause| Some(pause_after_loss(*pause, moment)));
        assert!(
            pauses.take(100).sum::<Duration>() > Duration::from_secs(2400),
            "a hundred losses are a lane's limit"
        );
        assert_eq!(pause_after_loss(LONGEST_LOOK_WHILE_AWAY, STEADY_AFTER), LOOK_WHILE_AWAY);
    }

    #[test]
    fn the_reason_shown_is_the_last_one() {
        let watch = DatabaseWatch::new();
        watch.set(DatabaseState::Away("no lock".into()));
        assert_eq!(*watch.subscribe().borrow(), DatabaseState::Away("no lock".into()));
    }
}
