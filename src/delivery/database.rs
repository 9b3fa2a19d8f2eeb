//! Whether the database can be asked, and who wants to know.
//! Guarantee: its loss and its return are each logged once; while it is away nothing is claimed, so nothing is sent.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use crate::shutdown::Shutdown;
use crate::store::{Store, StoreError};
use crate::telemetry;

/// Pause between looks while the database is away.
const LOOK_WHILE_AWAY: Duration = Duration::from_millis(500);
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
        let changed = self.state.send_if_modified(|state| {
            let changed = (*state == DatabaseState::Up) != up;
            if changed {
                *state = new.clone();
            }
            changed
        });
        if !changed {
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

    /// Asks the database now and then, more often while it is away, until the worker stops.
    pub async fn run(self, store: Store, shutdown: Shutdown) {
        let mut state = self.subscribe();
        loop {
            match store.ping().await {
                Ok(()) => self.set(DatabaseState::Up),
                Err(error) => self.set(DatabaseState::Away(error.to_string())),
            }
            let up = *state.borrow_and_update() == DatabaseState::Up;
            let pause = if up { LOOK_WHILE_UP } else { LOOK_WHILE_AWAY };
            tokio::select! {
                () = shutdown.stop_now() => return,
                () = tokio::time::sleep(pause) => {}
                // A loss that a statement met shortens the pause.
                changed = state.changed(), if up => if changed.is_err() { return },
            }
        }
    }
}

impl Default for DatabaseWatch {
    fn default() -> Self {
        Self::new()
    }
}
