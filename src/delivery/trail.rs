//! What is known of a delivery in hand, kept where a panic does not reach it.
//! Guarantee: a delivery whose handling panics is found here unsettled, with its claim and how far it had come.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::broker::Delivery;
use crate::model::job::JobKey;
use crate::model::ledger::{Claimed, Settle};
use crate::model::smtp_settings::Destination;

use super::attempt::{Progress, Report};
use super::conclude::Conclusion;

/// How far a delivery has come with its claim.
#[derive(Clone, Default)]
pub enum Stage {
    /// This worker has no claim for it.
    #[default]
    Unclaimed,
    /// Claimed, nothing tried.
    Claimed(Box<Claimed>),
    /// Being composed or sent.
    Sending(Box<Claimed>, Destination, Arc<Progress>),
    /// The attempt has ended.
    Reported(Box<Claimed>, Destination, Box<Report>),
    /// Decided, and perhaps recorded: nothing else may be decided any more.
    Concluded(Arc<Concluded>),
}

/// A decision, and what carries it out.
pub struct Concluded {
    /// The claim that it ends.
    pub claimed: Claimed,
    /// `organization` or `platform`, as events call it.
    pub transport: &'static str,
    /// What is recorded.
    pub settle: Settle,
    /// What is handed over.
    pub conclusion: Conclusion,
}

/// The way of one delivery so far.
#[derive(Default)]
pub struct Trail(Mutex<Known>);

#[derive(Default)]
struct Known {
    dropped: Option<Delivery>,
    key: Option<JobKey>,
    stage: Stage,
    panics: u32,
}

impl Trail {
    fn known(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a delivery that was dropped unsettled.
    pub fn keep(&self, delivery: Delivery) {
        self.known().dropped = Some(delivery);
    }

    /// Gives it out again.
    pub fn salvage(&self) -> Option<Delivery> {
        self.known().dropped.take()
    }

    /// The body is this job.
    pub fn is_job(&self, key: &JobKey) {
        self.known().key = Some(key.clone());
    }

    /// Which job it is, where the body could be read.
    pub fn key(&self) -> Option<JobKey> {
        self.known().key.clone()
    }

    /// It has come as far as this.
    pub fn reach(&self, stage: Stage) {
        self.known().stage = stage;
    }

    /// The attempt under way has ended with this; said again, where more is known.
    pub fn report(&self, report: &Report) {
        let mut known = self.known();
        known.stage = match std::mem::take(&mut known.stage) {
            Stage::Sending(claimed, destination, _) | Stage::Reported(claimed, destination, _) => {
                Stage::Reported(claimed, destination, Box::new(report.clone()))
            }
            stage => stage,
        };
    }

    /// How far it has come.
    pub fn stage(&self) -> Stage {
        self.known().stage.clone()
    }

    /// Its handling panicked.
    pub fn panicked(&self) {
        self.known().panics += 1;
    }

    /// How often its handling panicked.
    pub fn panics(&self) -> u32 {
        self.known().panics
    }
}
