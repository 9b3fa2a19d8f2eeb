//! What is said of a job that was called back.
//! Guarantee: pure; nothing that a server may have accepted is said to be merely cancelled.

use super::failure::Reason;
use super::job::OnUnknown;
use super::ledger::Claimed;
use super::policy::decide_orphan;

/// Of a job of which no attempt can have been accepted.
pub const UNSENT: &str = "cancelled before it was sent";
/// Of a job one of whose earlier attempts ended without an answer.
pub const UNSURE: &str = "cancelled; an earlier attempt may have been accepted";
const ORPHANED: &str = "cancelled after a worker died with it; that worker may have sent it";

/// What became of a `job.cancel`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Cancellation {
    /// Jobs of which nothing will be sent any more.
    pub cancelled: u64,
    /// Jobs that were sent, may have been, or are being sent. None of them is tried again.
    pub too_late: u64,
}

/// The detail of a dead letter, by the unknown outcomes of its job.
pub fn detail(unknowns: u32) -> &'static str {
    if unknowns == 0 { UNSENT } else { UNSURE }
}

/// Why a claimed job that was called back is given up, and in words. Nobody was told yet that the attempt of a worker that
/// died may have been accepted: then that is the reason.
pub fn give_up(claimed: &Claimed, on_unknown: OnUnknown) -> (Reason, &'static str) {
    if decide_orphan(claimed, on_unknown).unknowns() > claimed.unknowns {
        (Reason::UnknownOutcome, ORPHANED)
    } else {
        (Reason::Cancelled, detail(claimed.unknowns))
    }
}
