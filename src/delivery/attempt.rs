//! One attempt: compose, take a session, send in as many transactions as it needs, and sort what came of it.
//! Guarantee: nothing is decided about the job here beyond [`policy::assess`]; a refused gate sends nothing.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use crate::model::event::RefusedRecipient;
use crate::model::failure::{Failure, Fault, Phase, Reason, Reply, Transaction, TransactionOutcome};
use crate::model::health::Blamed;
use crate::model::job::Job;
use crate::model::ledger::{AttemptRecord, Claimed};
use crate::model::policy::{self, Feedback, Verdict};
use crate::model::smtp_settings::Destination;
use crate::smtp::compose::needs_smtputf8;
use crate::smtp::{Envelope, FinalDot, Pool, Seats};

use crate::telemetry::AttemptResult;

use super::destination::Outcome;
use super::route::Route;

/// Why the last look before DATA said no.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shut {
    /// Past its time.
    Expired,
    /// Called back.
    Cancelled,
    /// This newer revision of the booking was taken up, or called back.
    Superseded(i64),
    /// Another worker has the job now.
    NotOwner,
    /// This worker may not start anything: its lock or its database is gone, it is stopping, or what the provider allows is used.
    Halted,
}

/// What one attempt came to.
#[derive(Debug, Clone, Default)]
pub struct Report {
    /// Recipients that the server took responsibility for.
    pub accepted: Vec<u16>,
    /// Recipients refused for good in this attempt.
    pub refused: Vec<RefusedRecipient>,
    /// Recipients still to be sent to.
    pub later: Vec<u16>,
    /// What the failure means, when there was one.
    pub verdict: Option<Verdict>,
    /// What became of the organization's configuration, where that was at fault.
    pub blamed: Option<Blamed>,
    /// The failure that the verdict is about.
    pub failure: Option<Failure>,
    /// Set when the gate was shut: then nothing was sent by this attempt's last transaction.
    pub shut: Option<Shut>,
    /// The server's last reply.
    pub reply: Option<Reply>,
    /// The failure in words, without addresses.
    pub detail: Option<String>,
    /// How far it came.
    pub phase: Option<Phase>,
    /// The address that was dialled.
    pub address: Option<SocketAddr>,
    /// How long it took, in milliseconds.
    pub ms: u64,
}

impl Report {
    /// What the attempt says about its destination.
    pub fn outcome(&self) -> Outcome {
        match self.verdict {
            _ if self.shut.is_some() => Outcome::Nothing,
            None | Some(Verdict::Dead(_)) => Outcome::Worked,
            Some(Verdict::Retry { feedback: Feedback::Neutral, .. }) if !self.accepted.is_empty() => {
                Outcome::Worked
            }
            Some(Verdict::Retry { feedback, .. }) => Outcome::Failed(feedback),
            Some(Verdict::Account(_)) if self.blamed.is_some() => Outcome::Refused,
            Some(Verdict::Account(_) | Verdict::Fresh) => Outcome::Nothing,
            Some(Verdict::Unknown) => Outcome::Failed(Feedback::Narrow),
        }
    }

    /// The reason to store with the attempt.
    pub fn reason(&self) -> Option<Reason> {
        match self.verdict {
            Some(Verdict::Account(reason) | Verdict::Dead(reason) | Verdict::Retry { reason, .. }) => {
                Some(reason)
            }
            Some(Verdict::Fresh) => Some(Reason::ConnectionLost),
            Some(Verdict::Unknown) => Some(Reason::UnknownOutcome),
            None if !self.refused.is_empty() => Some(Reason::RecipientsRefused),
            None => None,
        }
    }

    /// Whether the server answered to the connection.
    pub fn reached(&self) -> bool {
        self.address.is_some() && !matches!(self.phase, Some(Phase::Resolve | Phase::Connect))
    }

    /// How the attempt is counted.
    pub fn result(&self) -> AttemptResult {
        match self.verdict {
            Some(Verdict::Unknown) => AttemptResult::Unknown,
            _ if self.accepted.is_empty() => AttemptResult::Failed,
            _ => AttemptResult::Sent,
        }
    }

    /// The attempt as the job's story keeps it.
    pub fn record(&self, claimed: &Claimed, destination: &Destination) -> AttemptRecord {
        AttemptRecord {
            at: claimed.now,
            transport: destination.transport().to_owned(),
            address: self.address.map(|address| address.to_string()),
            phase: self.phase.unwrap_or(Phase::FinalDot),
            reason: self.reason(),
            reply: self.reply.as_ref().map(Reply::to_string),
            ms: self.ms,
        }
    }

    fn fail(&mut self, failure: &Failure, verdict: Verdict) {
        self.verdict = Some(verdict);
        self.phase = Some(failure.phase);
        self.detail = Some(failure.to_string());
        self.address = failure.address.or(self.address);
        if let Some(reply) = failure.reply() {
            self.reply = Some(reply.clone());
        }
        self.failure = Some(failure.clone());
    }

    fn take(&mut self, transaction: &Transaction, assessment: policy::Assessment) {
        self.accepted.extend(assessment.accepted);
        self.refused.extend(assessment.refused);
        self.later.extend(assessment.later);
        match &transaction.outcome {
            TransactionOutcome::Accepted(reply) => self.reply = Some(reply.clone()),
            TransactionOutcome::Failed(failure) => {
                self.fail(failure, assessment.verdict.unwrap_or(Verdict::Unknown));
                return;
            }
            TransactionOutcome::NoRecipient | TransactionOutcome::Withheld => {}
        }
        if let Some((index, reply)) = transaction.refused.first() {
            self.detail = Some(format!("recipient {index} was refused: {reply}"));
            if self.accepted.is_empty() {
                self.reply = Some(reply.clone());
                self.failure = Some(Failure::new(Phase::Rcpt, Fault::Reply(reply.clone())));
            }
        }
        if assessment.verdict.is_some() {
            self.verdict = assessment.verdict;
        }
        if self.accepted.is_empty() {
            self.phase = Some(Phase::Rcpt);
        }
    }
}

/// How far an attempt has come, for when it is cut off from outside.
#[derive(Debug, Default)]
pub struct Progress(Mutex<SoFar>);

#[derive(Debug, Default)]
struct SoFar {
    accepted: Vec<u16>,
    refused: Vec<RefusedRecipient>,
    later: Vec<u16>,
    /// The recipients of the transaction under way.
    todo: Vec<u16>,
    address: Option<SocketAddr>,
    message: Option<FinalDot>,
    /// A transaction ended with nobody knowing whether the server has the message.
    unknown: bool,
}

impl Progress {
    /// Progress of an attempt that is to send to these recipients.
    pub fn new(recipients: Vec<u16>) -> Self {
        Self(Mutex::new(SoFar { todo: recipients, ..SoFar::default() }))
    }

    fn note(&self, change: impl FnOnce(&mut SoFar)) {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// The report of an attempt that was cut off: unknown once the final dot may have left, to be tried again before.
    pub fn cut(&self, reason: Reason, detail: &str) -> Report {
        let so_far = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let unknown =
            so_far.unknown || so_far.message.as_ref().is_some_and(|message| message.may_have_left());
        let verdict = if unknown {
            Verdict::Unknown
        } else {
            Verdict::Retry { reason, at_least: None, feedback: Feedback::Neutral }
        };
        Report {
            accepted: so_far.accepted.clone(),
            refused: so_far.refused.clone(),
            later: [&so_far.later[..], &so_far.todo].concat(),
            verdict: Some(verdict),
            phase: Some(if unknown { Phase::FinalDot } else { Phase::Body }),
            detail: Some(detail.to_owned()),
            address: so_far.address,
            ..Report::default()
        }
    }
}

/// The last look before DATA.
pub trait Gatekeeper: Sync {
    /// Whether a message may leave now.
    fn pass(&self) -> impl Future<Output = Result<(), Shut>> + Send;
}

/// Sends a composed message to the recipients that `progress` was made for. The gate is asked right before each DATA. Where its
/// account's connections are limited, the session has one of the `seats`; without one nothing is sent.
pub async fn send(
    pool: &Pool,
    route: &Route,
    job: &Job,
    message: &[u8],
    progress: &Progress,
    gate: &impl Gatekeeper,
    seats: Option<&Arc<Seats>>,
) -> Report {
    let started = Instant::now();
    let mut report = Report::default();
    let mut todo = Vec::new();
    progress.note(|so_far| todo.clone_from(&so_far.todo));
    let mut kept = None;
    let mut fresh = false;
    loop {
        let (destination, account) = (&route.destination, &route.account);
        let session = match (kept.take(), seats) {
            (Some(session), _) => Ok(session),
            (None, None) if fresh => pool.fresh_session(destination, account).await,
            (None, None) => pool.session(destination, account).await,
            (None, Some(seats)) => match pool.seated_session(destination, account, seats, fresh).await {
                Ok(Some(session)) => Ok(session),
                Ok(None) => {
                    report.shut = Some(Shut::Halted);
                    report.later.extend(todo);
                    break;
                }
                Err(failure) => Err(failure),
            },
        };
        let mut session = match session {
            Ok(session) => session,
            Err(failure) => {
                report.fail(&failure, policy::judge(&failure));
                report.later.extend(todo);
                break;
            }
        };
        report.address = Some(session.facts().address);
        progress.note(|so_far| {
            so_far.address = report.address;
            so_far.message = Some(session.final_dot());
        });
        let envelope = envelope(route, job, &todo);
        let mut shut = None;
        let open = async {
            let passed = gate.pass().await;
            shut = passed.err();
            passed.is_ok()
        };
        let transaction = session.send(&envelope, message, open).await;
        let mut assessment = policy::assess(&transaction, &todo);
        if assessment.verdict == Some(Verdict::Fresh) && !fresh {
            // The other kept sessions of this destination are likely as old: none of them is tried.
            fresh = true;
            continue;
        }
        todo = std::mem::take(&mut assessment.next_transaction);
        if matches!(transaction.outcome, TransactionOutcome::Failed(_)) {
            // Its failure decides the attempt: a further transaction's outcome would hide it, an unknown one too.
            assessment.later.append(&mut todo);
        }
        report.shut = shut;
        report.take(&transaction, assessment);
        progress.note(|so_far| {
            so_far.accepted.clone_from(&report.accepted);
            so_far.refused.clone_from(&report.refused);
            so_far.later.clone_from(&report.later);
            so_far.todo.clone_from(&todo);
            so_far.message = None;
            so_far.unknown = report.verdict == Some(Verdict::Unknown);
        });
        if todo.is_empty() {
            // What the account is refused on this connection it may be granted on another.
            if matches!(report.verdict, Some(Verdict::Account(_))) {
                session.close()
            } else {
                session.release()
            }
            break;
        }
        kept = Some(session);
    }
    report.ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
    report
}

fn envelope(route: &Route, job: &Job, todo: &[u16]) -> Envelope {
    let all: Vec<_> = job.recipients().collect();
    let recipients =
        todo.iter().filter_map(|index| Some((*index, (*all.get(usize::from(*index))?).clone()))).collect();
    Envelope {
        from: route.account.envelope_from().clone(),
        recipients,
        smtputf8: needs_smtputf8(job, &route.account.from),
    }
}
