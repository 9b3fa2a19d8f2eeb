//! Hand-overs that are recorded and not yet carried out.
//! Guarantee: a debt stands from before its record until its copy is confirmed; one that nobody works on any more is known
//! as such, so that the delivery which comes again pays it.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::model::job::JobKey;
use crate::model::ledger::Turn;

/// How a debt stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Debt {
    /// A delivery in hand is about to pay it.
    Owed,
    /// Who was about to pay it could not.
    Abandoned,
}

/// What this worker owes.
#[derive(Debug, Default)]
pub struct Debts(Mutex<HashMap<(JobKey, Turn), Debt>>);

impl Debts {
    /// A copy of this turn is going to be owed.
    pub fn incur(&self, key: &JobKey, turn: Turn) {
        self.all().insert((key.clone(), turn), Debt::Owed);
    }

    /// The copy is there, or was never owed.
    pub fn pay(&self, key: &JobKey, turn: Turn) {
        self.all().remove(&(key.clone(), turn));
    }

    /// Nobody is left who would make the copy.
    pub fn abandon(&self, key: &JobKey, turn: Turn) {
        self.all().insert((key.clone(), turn), Debt::Abandoned);
    }

    /// Whether the copy of this turn is still owed.
    pub fn standing(&self, key: &JobKey, turn: Turn) -> Option<Debt> {
        self.all().get(&(key.clone(), turn)).copied()
    }

    fn all(&self) -> MutexGuard<'_, HashMap<(JobKey, Turn), Debt>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
