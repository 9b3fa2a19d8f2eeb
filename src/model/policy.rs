//! The one table of decisions: what a failure means, and what becomes of the job.
//! Guarantee: nothing else in the crate compares an SMTP code with a number to decide about a job.
//!
//! Scope comes before class: whose fault it is (account, quota, server, message, recipient) is asked in this order, and
//! the first match wins. Codes are those of RFC 5321 section 4.2, RFC 4954 section 6 and RFC 3463.

mod orphans;

use std::time::Duration;

use time::OffsetDateTime;

use super::event::RefusedRecipient;
use super::failure::{EnhancedCode, Failure, Fault, Phase, Reason, Reply, Transaction, TransactionOutcome};
use super::health::Blamed;
use super::job::OnUnknown;
use super::schedule::{ASIDE_S, Schedule};
pub use orphans::{CRASH_LIMIT, OrphanDisposition, decide_orphan, marks_commit};

/// A used-up quota is renewed by the day; asking sooner than this only prolongs the block.
const QUOTA_WAIT: Duration = Duration::from_secs(3600);
/// So many panics over a job end it.
pub const FAULT_LIMIT: u32 = 3;

/// What a failed attempt means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The configuration's fault, whatever the message was.
    Account(Reason),
    /// May go through later.
    Retry {
        /// Why it did not now.
        reason: Reason,
        /// Not sooner than this, whatever the schedule says.
        at_least: Option<Duration>,
        /// What the destination should make of it.
        feedback: Feedback,
    },
    /// Will never go through.
    Dead(Reason),
    /// The server had closed a kept session: once more on a fresh connection, nothing charged.
    Fresh,
    /// It cannot be known whether the message was accepted.
    Unknown,
}

/// What a failure says about the destination, apart from this one job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Feedback {
    /// Nothing.
    Neutral,
    /// Too fast: fewer at once.
    Narrow,
    /// Nobody there.
    Unreachable,
}

/// What a refused RCPT means for its recipient.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum RecipientVerdict {
    /// The whole attempt's fate, not this recipient's.
    Whole(Verdict),
    /// This address will never work.
    Refused,
    /// This address may work later.
    Later(Reason),
    /// One transaction too full: the next one, at once.
    NextTransaction,
}

/// What one transaction came to, recipient by recipient.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Assessment {
    /// The server has taken responsibility for these.
    pub accepted: Vec<u16>,
    /// Refused for good.
    pub refused: Vec<RefusedRecipient>,
    /// To be sent at once in a further transaction.
    pub next_transaction: Vec<u16>,
    /// To be tried again later.
    pub later: Vec<u16>,
    /// Why, for those in `later`; a [`Verdict`] about the attempt as a whole otherwise.
    pub verdict: Option<Verdict>,
}

/// How far a job has come, as far as the decision needs it.
#[derive(Debug, Clone, Copy)]
pub struct Progress {
    /// Attempts made since the job was published or last replayed, the failed one included.
    pub attempts: u32,
    /// Unknown outcomes before this attempt.
    pub unknowns: u32,
    /// When the job was first seen, or last replayed.
    pub counted_from: OffsetDateTime,
    /// Nothing is sent past this time.
    pub expires_at: Option<OffsetDateTime>,
    /// The publisher's wish.
    pub on_unknown: OnUnknown,
    /// Whether the attempt went through the platform's own server.
    pub platform: bool,
    /// What became of the organization's configuration; `None` where nothing could be held against it.
    pub blamed: Option<Blamed>,
    /// Why the attempt before this one failed, or what the job was parked for since.
    pub last: Option<Reason>,
}

/// `retry.*` of the settings.
#[derive(Debug, Clone)]
pub struct RetryLimits {
    /// The waits.
    pub schedule: Schedule,
    /// No job is retried longer than this after it was first seen, or last replayed.
    pub max_age: Duration,
}

/// What becomes of a job that was not sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Disposition {
    /// Again after this wait.
    Retry {
        /// Why not now.
        reason: Reason,
        /// From now.
        wait: Duration,
    },
    /// The same, and the attempt does not count: it was not the job's fault.
    Spared {
        /// Why not now.
        reason: Reason,
        /// From now.
        wait: Duration,
    },
    /// Waits for its organization's configuration; the attempt does not count.
    Park {
        /// What is wrong with that.
        reason: Reason,
    },
    /// A dead letter.
    Dead {
        /// Its reason.
        reason: Reason,
        /// The last cause, where the reason is that the retries ended.
        cause: Option<Reason>,
    },
}

/// Whether the next AUTH mechanism may be tried after this reply. A refused password (535) must not be tried twice:
/// it would count twice towards the account's lock.
pub fn auth_may_try_next(reply: &Reply) -> bool {
    reply.code == 504 || reply.enhanced == Some(EnhancedCode(5, 7, 4))
}

/// What a failure of a whole attempt means.
pub fn judge(failure: &Failure) -> Verdict {
    let retry = |reason, feedback| Verdict::Retry { reason, at_least: None, feedback };
    let after_dot = failure.phase == Phase::FinalDot;
    let closed_meanwhile = failure.reused && matches!(failure.phase, Phase::Rset | Phase::Mail);
    match &failure.fault {
        Fault::Reply(reply) if closed_meanwhile && reply.code == 421 => Verdict::Fresh,
        Fault::Reply(reply) => judge_reply(failure.phase, reply),
        Fault::Lost if closed_meanwhile => Verdict::Fresh,
        Fault::Timeout | Fault::Lost | Fault::Protocol { .. } if after_dot => Verdict::Unknown,
        Fault::Timeout if failure.phase == Phase::Connect => {
            retry(Reason::ConnectTimeout, Feedback::Unreachable)
        }
        Fault::Timeout => retry(Reason::Timeout, Feedback::Narrow),
        Fault::Lost => retry(Reason::ConnectionLost, Feedback::Neutral),
        Fault::Protocol { .. } => retry(Reason::ProtocolError, Feedback::Neutral),
        Fault::Unreachable { .. } => retry(Reason::ConnectFailed, Feedback::Unreachable),
        Fault::DnsFailed { .. } => retry(Reason::DnsFailed, Feedback::Neutral),
        Fault::HostNotPublic => Verdict::Account(Reason::HostNotPublic),
        Fault::PortNotAllowed => Verdict::Account(Reason::PortNotAllowed),
        Fault::HostNotFound => Verdict::Account(Reason::HostNotFound),
        Fault::Tls { .. } => Verdict::Account(Reason::TlsFailed),
        Fault::TlsRequired => Verdict::Account(Reason::TlsRequired),
        Fault::NoAuthMechanism { .. } => Verdict::Account(Reason::AuthFailed),
        Fault::Smtputf8Missing => Verdict::Dead(Reason::MessageRefused),
        Fault::SizeExceeded { .. } => Verdict::Dead(Reason::TooLarge),
    }
}

fn judge_reply(phase: Phase, reply: &Reply) -> Verdict {
    let temporary = |reason| Verdict::Retry { reason, at_least: None, feedback: Feedback::Neutral };
    if let Some(reason) = account_fault(phase, reply) {
        return Verdict::Account(reason);
    }
    if let Some(verdict) = quota_or_rate(reply) {
        return verdict;
    }
    if matches!(phase, Phase::Greeting | Phase::Ehlo | Phase::Rset) || is_servers_fault(reply) {
        return temporary(Reason::ServerError);
    }
    match reply.code / 100 {
        4 => temporary(Reason::ServerError),
        5 if is_too_large(reply) => Verdict::Dead(Reason::TooLarge),
        5 if phase == Phase::Mail => Verdict::Dead(Reason::SenderRefused),
        5 if phase == Phase::Rcpt => Verdict::Dead(Reason::RecipientsRefused),
        5 => Verdict::Dead(Reason::MessageRefused),
        // A positive answer where it cannot be one: 250 for 354, 354 after the final dot.
        _ if phase == Phase::FinalDot => Verdict::Unknown,
        _ => temporary(Reason::ProtocolError),
    }
}

/// The account's fault, in any phase, even after the final dot.
fn account_fault(phase: Phase, reply: &Reply) -> Option<Reason> {
    match reply.code {
        530 if reply.says(&["starttls", "tls first", "encryption"]) => return Some(Reason::TlsRequired),
        538 => return Some(Reason::TlsRequired),
        530 | 534 | 535 => return Some(Reason::AuthFailed),
        500..=599 => {}
        _ => return None,
    }
    if phase == Phase::Auth {
        return Some(Reason::AuthFailed);
    }
    if phase == Phase::Starttls {
        return Some(Reason::TlsRequired);
    }
    let sender_codes = [EnhancedCode(5, 7, 60), EnhancedCode(5, 1, 8), EnhancedCode(5, 2, 252)];
    let names_sender = reply.enhanced.is_some_and(|code| sender_codes.contains(&code))
        || reply.says(&[
            "sendasdenied",
            "send as this sender",
            "not owned by",
            "not verified",
            "sender address rejected",
            "relay access denied",
            "relaying denied",
            "relay denied",
            "unable to relay",
            "relay not permitted",
            "not permitted to relay",
        ]);
    // Postfix names our HELO name and the recipient in like words; those are other scopes.
    (names_sender && !reply.says(&["recipient address rejected"])).then_some(Reason::SenderRefused)
}

/// A limit of the provider's: the day's, or the moment's.
fn quota_or_rate(reply: &Reply) -> Option<Verdict> {
    if !(400..600).contains(&reply.code) || is_too_many_recipients(reply) {
        return None;
    }
    let daily = reply.enhanced == Some(EnhancedCode(5, 4, 5))
        || reply.says(&[
            "daily user sending",
            "daily sending",
            "daily message quota",
            "daily limit",
            "daily quota",
        ]);
    if daily {
        return Some(Verdict::Retry {
            reason: Reason::QuotaExceeded,
            at_least: Some(QUOTA_WAIT),
            feedback: Feedback::Narrow,
        });
    }
    let rate = matches!(reply.code, 421 | 432 | 454)
        || reply.says(&[
            "rate limit",
            "sending rate",
            "rate exceeded",
            "throttl",
            "too many messages",
            "too many connections",
            "concurrent connections limit",
            "too fast",
        ]);
    rate.then_some(Verdict::Retry { reason: Reason::Throttled, at_least: None, feedback: Feedback::Narrow })
}

/// The server's or our own HELO name's fault, whatever the command was.
fn is_servers_fault(reply: &Reply) -> bool {
    let storage = reply.code == 452 && reply.enhanced == Some(EnhancedCode(4, 3, 1));
    let helo = (500..600).contains(&reply.code) && reply.says(&["helo command rejected"]);
    storage || helo || reply.code == 504
}

/// 552 speaks of size unless the code behind it speaks of a full mailbox or of policy (Gmail's 552 5.7.0).
fn is_too_large(reply: &Reply) -> bool {
    let of_other = |code: EnhancedCode| code == EnhancedCode(5, 2, 2) || code.1 == 7;
    reply.enhanced == Some(EnhancedCode(5, 3, 4))
        || (reply.code == 552 && !reply.enhanced.is_some_and(of_other))
}

/// RFC 5321 section 4.5.3.1.10: 452, and 552 from older servers, unless the code behind it says mailbox full or storage.
fn is_too_many_recipients(reply: &Reply) -> bool {
    match (reply.code, reply.enhanced) {
        (452 | 451, Some(code)) => code == EnhancedCode(4, 5, 3),
        (452, None) => true,
        (552, code) => code.is_none_or(|code| code == EnhancedCode(5, 5, 3)),
        _ => false,
    }
}

fn judge_recipient(reply: &Reply, any_accepted: bool) -> RecipientVerdict {
    if !any_accepted && let Some(reason) = account_fault(Phase::Rcpt, reply) {
        return RecipientVerdict::Whole(Verdict::Account(reason));
    }
    if is_too_many_recipients(reply) && any_accepted {
        return RecipientVerdict::NextTransaction;
    }
    match quota_or_rate(reply) {
        Some(verdict) if !any_accepted => return RecipientVerdict::Whole(verdict),
        Some(Verdict::Retry { reason, .. }) => return RecipientVerdict::Later(reason),
        _ => {}
    }
    if is_servers_fault(reply) {
        return RecipientVerdict::Later(Reason::ServerError);
    }
    if reply.code / 100 == 5 && !is_too_many_recipients(reply) {
        RecipientVerdict::Refused
    } else {
        RecipientVerdict::Later(Reason::RecipientsRefused)
    }
}

/// Sorts the recipients of one transaction by what is to be done about each. `recipients` are the positions that it
/// was for.
pub fn assess(transaction: &Transaction, recipients: &[u16]) -> Assessment {
    let mut assessment = Assessment::default();
    let refused = |index: &u16| transaction.refused.iter().any(|(position, _)| position == index);
    let rest: Vec<u16> = recipients.iter().copied().filter(|index| !refused(index)).collect();
    match &transaction.outcome {
        TransactionOutcome::Accepted(_) => assessment.accepted = rest,
        TransactionOutcome::NoRecipient => {}
        TransactionOutcome::Withheld => {
            assessment.later = recipients.to_vec();
            return assessment;
        }
        TransactionOutcome::Failed(failure) => {
            assessment.verdict = Some(judge(failure));
            assessment.later = rest;
        }
    }
    let any_accepted = !matches!(transaction.outcome, TransactionOutcome::NoRecipient);
    for (index, reply) in &transaction.refused {
        match judge_recipient(reply, any_accepted) {
            RecipientVerdict::Whole(verdict) => {
                assessment.verdict.get_or_insert(verdict);
                assessment.later.push(*index);
            }
            RecipientVerdict::Refused => {
                let reason = Reason::RecipientsRefused;
                assessment.refused.push(RefusedRecipient { index: *index, code: reply.code, reason });
            }
            RecipientVerdict::Later(reason) => {
                let verdict = Verdict::Retry { reason, at_least: None, feedback: Feedback::Neutral };
                assessment.verdict.get_or_insert(verdict);
                assessment.later.push(*index);
            }
            RecipientVerdict::NextTransaction => assessment.next_transaction.push(*index),
        }
    }
    assessment
}

/// What becomes of a job after an attempt that left recipients to send to.
pub fn decide(
    verdict: Verdict,
    progress: &Progress,
    limits: &RetryLimits,
    now: OffsetDateTime,
) -> Disposition {
    let dead = |reason| Disposition::Dead { reason, cause: None };
    match verdict {
        // The platform's account is the operator's to mend, and every organization's mail waits for it.
        Verdict::Account(reason) if progress.platform => retry(reason, None, progress, limits, now),
        Verdict::Account(reason) | Verdict::Retry { reason, .. }
            if matches!(progress.blamed, Some(Blamed::Failing { .. })) =>
        {
            park(reason, progress, limits, now)
        }
        Verdict::Account(reason) => excuse(reason, progress, limits, now),
        Verdict::Dead(reason) => dead(reason),
        Verdict::Retry { reason, at_least, .. } => retry(reason, at_least, progress, limits, now),
        // A second loss on a fresh connection is a loss like any other.
        Verdict::Fresh => retry(Reason::ConnectionLost, None, progress, limits, now),
        Verdict::Unknown if marks_commit(progress.on_unknown, progress.unknowns) => {
            dead(Reason::UnknownOutcome)
        }
        Verdict::Unknown => match retry(Reason::UnknownOutcome, None, progress, limits, now) {
            // Nobody may say of it that nothing was sent.
            Disposition::Dead { .. } => dead(Reason::UnknownOutcome),
            disposition => disposition,
        },
    }
}

fn retry(
    reason: Reason,
    at_least: Option<Duration>,
    progress: &Progress,
    limits: &RetryLimits,
    now: OffsetDateTime,
) -> Disposition {
    let Some(wait_s) = limits.schedule.wait_s(progress.attempts) else {
        return Disposition::Dead { reason: Reason::RetriesExhausted, cause: Some(reason) };
    };
    let wait = seconds(wait_s).max(at_least.unwrap_or_default());
    too_late(reason, wait, progress, limits, now).unwrap_or(Disposition::Retry { reason, wait })
}

/// A fault of the account that is not yet held to last. The same job's next one is counted where others got through meanwhile:
/// it may be the message's after all.
fn excuse(reason: Reason, progress: &Progress, limits: &RetryLimits, now: OffsetDateTime) -> Disposition {
    let changed = progress.blamed == Some(Blamed::Outdated);
    let unproven = progress.blamed == Some(Blamed::Noted { proven: false });
    if progress.last == Some(reason) && !changed && !unproven {
        return retry(reason, None, progress, limits, now);
    }
    let step = if changed { None } else { limits.schedule.wait_s(1) };
    let wait = seconds(step.unwrap_or(ASIDE_S[0]));
    too_late(reason, wait, progress, limits, now).unwrap_or(Disposition::Spared { reason, wait })
}

/// What becomes of a job whose organization's configuration fails for this reason.
pub fn park(reason: Reason, progress: &Progress, limits: &RetryLimits, now: OffsetDateTime) -> Disposition {
    too_late(reason, Duration::ZERO, progress, limits, now).unwrap_or(Disposition::Park { reason })
}

/// The end of a job that could not go on after this wait.
fn too_late(
    reason: Reason,
    wait: Duration,
    progress: &Progress,
    limits: &RetryLimits,
    now: OffsetDateTime,
) -> Option<Disposition> {
    let dead = |why| Some(Disposition::Dead { reason: why, cause: Some(reason) });
    if now + wait > progress.counted_from + limits.max_age {
        return dead(Reason::RetriesExhausted);
    }
    if progress.expires_at.is_some_and(|expires_at| expires_at <= now + wait) {
        return dead(Reason::Expired);
    }
    None
}

fn seconds(number: u32) -> Duration {
    Duration::from_secs(u64::from(number))
}

#[cfg(test)]
#[path = "policy_tests.rs"]
mod tests;
