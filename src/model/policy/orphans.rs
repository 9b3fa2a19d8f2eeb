//! What becomes of a job whose worker died with it in hand.
//! Guarantee: an outcome that nobody knows is counted as unknown, and a mark is asked for wherever one more must not happen.

use crate::model::failure::Reason;
use crate::model::job::OnUnknown;
use crate::model::ledger::Claimed;

/// So many claims by workers that died make a job suspect of killing them.
pub const CRASH_LIMIT: u32 = 3;

/// What becomes of a job whose last worker died.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OrphanDisposition {
    /// Go on, with so many unknown outcomes counted.
    Continue {
        /// Including the dead worker's.
        unknowns: u32,
    },
    /// A dead letter.
    Dead {
        /// Its reason.
        reason: Reason,
        /// Including the dead worker's.
        unknowns: u32,
    },
}

impl OrphanDisposition {
    /// Unknown outcomes of the job, the dead worker's included where it was one.
    pub fn unknowns(self) -> u32 {
        match self {
            Self::Continue { unknowns } | Self::Dead { unknowns, .. } => unknowns,
        }
    }
}

/// Whether an attempt must leave a mark in the ledger before its final dot, so that a crash before it is known to have
/// been harmless: where a second message would be wrong, and where it is the last one allowed.
pub fn marks_commit(on_unknown: OnUnknown, unknowns: u32) -> bool {
    on_unknown == OnUnknown::Hold || unknowns > 0
}

/// Decides about a job whose claim belonged to a worker that died.
pub fn decide_orphan(claimed: &Claimed, on_unknown: OnUnknown) -> OrphanDisposition {
    let Some(orphan) = claimed.orphan else {
        return OrphanDisposition::Continue { unknowns: claimed.unknowns };
    };
    // Who wrote the mark had to: the unknown outcome before it, a dead worker's, may never have been recorded.
    if orphan.committing {
        let unknowns = claimed.unknowns + 1;
        return OrphanDisposition::Dead { reason: Reason::UnknownOutcome, unknowns };
    }
    let marked = marks_commit(on_unknown, claimed.unknowns);
    // Without the duty to mark it, nobody knows whether the final dot had left.
    let unknowns = if marked { claimed.unknowns } else { claimed.unknowns + 1 };
    if claimed.crashes >= CRASH_LIMIT {
        return OrphanDisposition::Dead { reason: Reason::CrashLoop, unknowns };
    }
    OrphanDisposition::Continue { unknowns }
}
