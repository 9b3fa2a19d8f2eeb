//! From an attempt's report to what is recorded about the job.
//! Guarantee: pure; a recipient that accepted is never pending again, and `sent` is said only when nobody is pending.

use time::OffsetDateTime;

use crate::model::cancelling;
use crate::model::event::RefusedRecipient;
use crate::model::failure::Reason;
use crate::model::job::{Job, JobKey};
use crate::model::ledger::{Claimed, Settle, Settlement};
use crate::model::parking::superseded;
use crate::model::policy::{self, Disposition, Feedback, Progress, RetryLimits, Verdict};

use super::attempt::{Report, Shut};
use super::worker::expired;

/// What is to be recorded and handed over.
#[derive(Debug, Clone)]
pub struct Conclusion {
    /// The new state.
    pub settlement: Settlement,
    /// Attempts made, this one included.
    pub attempts: u32,
    /// Those of them that do not count towards the end of the retries.
    pub spared: u32,
    /// Unknown outcomes so far.
    pub unknowns: u32,
    /// Positions still to be sent to; `None`: every recipient.
    pub pending: Option<Vec<u16>>,
    /// Recipients refused for good so far.
    pub refused: Vec<RefusedRecipient>,
    /// Whether some recipient has accepted, now or before.
    pub partly_sent: bool,
    /// Why the refused ones were refused, in words, for their dead letter.
    pub detail: String,
}

/// Concludes an attempt that was not shut out by another worker.
pub fn conclude(
    job: &Job,
    claimed: &Claimed,
    report: &Report,
    platform: bool,
    limits: &RetryLimits,
    now: OffsetDateTime,
) -> Conclusion {
    let mut refused = claimed.refused.clone();
    refused.extend(report.refused.iter().cloned());
    let mut conclusion = Conclusion {
        settlement: Settlement::Sent,
        attempts: claimed.attempts + 1,
        spared: claimed.spared,
        unknowns: claimed.unknowns + u32::from(report.verdict == Some(Verdict::Unknown)),
        pending: None,
        refused,
        partly_sent: claimed.partly_sent || !report.accepted.is_empty(),
        detail: report.detail.clone().unwrap_or_default(),
    };
    if report.later.is_empty() {
        if !conclusion.partly_sent {
            conclusion.settlement = dead(Reason::RecipientsRefused, &conclusion.detail);
        }
        return conclusion;
    }
    if report.later.len() < job.recipient_count() {
        conclusion.pending = Some(report.later.clone());
    }
    let progress = Progress {
        attempts: conclusion.attempts.saturating_sub(claimed.spared),
        unknowns: claimed.unknowns,
        counted_from: claimed.counted_from(),
        expires_at: job.expires_at,
        on_unknown: job.on_unknown,
        platform,
        blamed: report.blamed,
        last: claimed.reason,
    };
    let (reason, detail) = match report.shut {
        Some(Shut::Expired) => (Reason::Expired, expired(job)),
        Some(Shut::Cancelled) => (Reason::Cancelled, cancelling::detail(claimed.unknowns).to_owned()),
        Some(Shut::Superseded(newest)) => {
            (Reason::Superseded, superseded(job.group.as_ref().map_or(0, |group| group.sequence), newest))
        }
        Some(Shut::Halted | Shut::NotOwner) | None => {
            let interrupted =
                Verdict::Retry { reason: Reason::Internal, at_least: None, feedback: Feedback::Neutral };
            let verdict = report.verdict.unwrap_or(interrupted);
            match policy::decide(verdict, &progress, limits, now) {
                Disposition::Retry { reason, wait } => {
                    conclusion.settlement = Settlement::Deferred { reason, wait };
                    return conclusion;
                }
                Disposition::Spared { reason, wait } => {
                    conclusion.spared += 1;
                    conclusion.settlement = Settlement::Deferred { reason, wait };
                    return conclusion;
                }
                Disposition::Park { reason } => {
                    conclusion.spared += 1;
                    conclusion.settlement = parked(reason, &conclusion.detail);
                    return conclusion;
                }
                Disposition::Dead { reason, cause } => (reason, last_words(cause, &conclusion.detail)),
            }
        }
    };
    let code = report.reply.as_ref().map_or(0, |reply| reply.code);
    conclusion.give_up(&report.later, code, reason, detail);
    conclusion
}

/// Concludes a claimed job that is not attempted.
pub fn conclude_unattempted(job: &Job, claimed: &Claimed, reason: Reason, detail: String) -> Conclusion {
    let mut conclusion = Conclusion::released(claimed);
    conclusion.give_up(&recipients(job, claimed), 0, reason, detail);
    conclusion
}

/// Concludes a claimed job that is not attempted, for its organization's configuration fails for this reason.
pub fn conclude_parked(
    job: &Job,
    claimed: &Claimed,
    reason: Reason,
    limits: &RetryLimits,
    now: OffsetDateTime,
) -> Conclusion {
    let progress = Progress {
        attempts: claimed.attempts.saturating_sub(claimed.spared),
        unknowns: claimed.unknowns,
        counted_from: claimed.counted_from(),
        expires_at: job.expires_at,
        on_unknown: job.on_unknown,
        platform: false,
        blamed: None,
        last: claimed.reason,
    };
    let detail = format!("the organization's SMTP configuration does not work ({reason}); nothing was tried");
    match policy::park(reason, &progress, limits, now) {
        Disposition::Dead { reason, cause } => {
            conclude_unattempted(job, claimed, reason, last_words(cause, &detail))
        }
        Disposition::Park { .. } | Disposition::Retry { .. } | Disposition::Spared { .. } => {
            Conclusion { settlement: parked(reason, &detail), detail, ..Conclusion::released(claimed) }
        }
    }
}

/// The positions that a claimed job is still to be sent to.
pub fn recipients(job: &Job, claimed: &Claimed) -> Vec<u16> {
    claimed.pending.clone().unwrap_or_else(|| (0..).take(job.recipient_count()).collect())
}

/// What the ledger is told of it, without an attempt's record.
pub fn settle_of(key: &JobKey, claimed: &Claimed, conclusion: &Conclusion) -> Settle {
    Settle {
        key: key.clone(),
        owner: claimed.owner,
        turn: claimed.turn,
        outcome: conclusion.settlement.clone(),
        attempts: conclusion.attempts,
        spared: conclusion.spared,
        unknowns: conclusion.unknowns,
        message_id: message_id(claimed, conclusion),
        pending: conclusion.pending.clone(),
        refused: conclusion.refused.clone(),
        partly_sent: conclusion.partly_sent,
        reply: None,
        attempt: None,
    }
}

/// The first attempt's From makes it, and what is parked without one may be sent from another.
fn message_id(claimed: &Claimed, conclusion: &Conclusion) -> String {
    let parked = matches!(conclusion.settlement, Settlement::Parked { .. });
    let untried = conclusion.attempts == 0 && claimed.crashes == 0;
    if parked && untried { String::new() } else { claimed.message_id.clone() }
}

impl Conclusion {
    /// Nothing was tried: everything stays as it was claimed.
    pub fn released(claimed: &Claimed) -> Self {
        Self {
            settlement: Settlement::Released,
            attempts: claimed.attempts,
            spared: claimed.spared,
            unknowns: claimed.unknowns,
            pending: claimed.pending.clone(),
            refused: claimed.refused.clone(),
            partly_sent: claimed.partly_sent,
            detail: String::new(),
        }
    }

    /// The worker would only panic again, so there is no retry. What nobody can know stays said.
    pub fn condemn(&mut self, left: &[u16], detail: String) {
        let reason = match self.settlement {
            Settlement::Deferred { reason: Reason::UnknownOutcome, .. } => Reason::UnknownOutcome,
            Settlement::Deferred { .. } => Reason::Internal,
            Settlement::Dead { reason: Reason::RetriesExhausted, .. } => Reason::Internal,
            _ => return,
        };
        self.give_up(left, 0, reason, detail);
    }

    /// The recipients that are left get nothing: the job is dead, unless others have the message.
    fn give_up(&mut self, left: &[u16], code: u16, reason: Reason, detail: String) {
        self.detail = detail;
        if self.partly_sent {
            self.refused.extend(left.iter().map(|index| RefusedRecipient { index: *index, code, reason }));
            self.pending = None;
            self.settlement = Settlement::Sent;
        } else {
            self.settlement = dead(reason, &self.detail);
        }
    }
}

fn dead(reason: Reason, detail: &str) -> Settlement {
    Settlement::Dead { reason, detail: detail.to_owned() }
}

fn parked(reason: Reason, detail: &str) -> Settlement {
    Settlement::Parked { reason, detail: detail.to_owned() }
}

fn last_words(cause: Option<Reason>, detail: &str) -> String {
    match cause {
        Some(cause) => format!("last cause {cause}: {detail}"),
        None => detail.to_owned(),
    }
}

#[cfg(test)]
#[path = "conclude_tests.rs"]
mod tests;
