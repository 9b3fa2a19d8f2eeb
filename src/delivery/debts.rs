//! Hand-overs that are recorded and not yet carried out.
//! Guarantee: a debt stands from before its record until its copy is confirmed; one that was never paid, say because its
//! task died, stands for as long as the worker lives.

use std::collections::HashSet;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::model::job::JobKey;
use crate::model::ledger::Turn;

/// What this worker owes.
#[derive(Debug, Default)]
pub struct Debts(Mutex<HashSet<(JobKey, Turn)>>);

impl Debts {
    /// A copy of this turn is going to be owed.
    pub fn incur(&self, key: &JobKey, turn: Turn) {
        self.all().insert((key.clone(), turn));
    }

    /// The copy is there, or was never owed.
    pub fn pay(&self, key: &JobKey, turn: Turn) {
        self.all().remove(&(key.clone(), turn));
    }

    /// Whether the copy of this turn is still owed.
    pub fn stands(&self, key: &JobKey, turn: Turn) -> bool {
        self.all().contains(&(key.clone(), turn))
    }

    fn all(&self) -> MutexGuard<'_, HashSet<(JobKey, Turn)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
