//! One attempt: compose, take a session, send in as many transactions as it needs, and sort what came of it.
//! Guarantee: nothing is decided about the job here beyond [`policy::assess`]; a refused gate sends nothing.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Instant;

use crate::model::event::RefusedRecipient;
use crate::model::failure::{Failure, Phase, Reason, Reply, Transaction, TransactionOutcome};
use crate::model::job::Job;
use crate::model::ledger::{AttemptRecord, Claimed};
use crate::model::policy::{self, Feedback, Verdict};
use crate::model::smtp_settings::Destination;
use crate::smtp::Envelope;
use crate::smtp::Pool;
use crate::smtp::compose::needs_smtputf8;

use crate::telemetry::AttemptResult;

use super::destination::Outcome;
use super::route::Route;

/// Why the last look before DATA said no.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shut {
    /// Past its time.
    Expired,
    /// This newer revision of the booking was taken up.
    Superseded(i64),
    /// Another worker has the job now.
    NotOwner,
    /// This worker may not start anything: its lock or its database is gone, or it is stopping.
    Halted,
}

/// What one attempt came to.
#[derive(Debug, Default)]
pub struct Report {
    /// Recipients that the server took responsibility for.
    pub accepted: Vec<u16>,
    /// Recipients refused for good in this attempt.
    pub refused: Vec<RefusedRecipient>,
    /// Recipients still to be sent to.
    pub later: Vec<u16>,
    /// What the failure means, when there was one.
    pub verdict: Option<Verdict>,
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

    /// The report of an attempt that was cut off from outside before it could make its own.
    pub fn cut(later: Vec<u16>, committed: bool, reason: Reason, detail: &str) -> Self {
        let verdict = if committed {
            Verdict::Unknown
        } else {
            Verdict::Retry { reason, at_least: None, feedback: Feedback::Neutral }
        };
        let phase = Some(if committed { Phase::FinalDot } else { Phase::Connect });
        Self { later, verdict: Some(verdict), phase, detail: Some(detail.to_owned()), ..Self::default() }
    }

    fn fail(&mut self, failure: &Failure, verdict: Verdict) {
        self.verdict = Some(verdict);
        self.phase = Some(failure.phase);
        self.detail = Some(failure.to_string());
        self.address = failure.address.or(self.address);
        if let Some(reply) = failure.reply() {
            self.reply = Some(reply.clone());
        }
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
            }
        }
        if assessment.verdict.is_some() {
            self.verdict = assessment.verdict;
            self.phase = Some(Phase::Rcpt);
        }
    }
}

/// How far an attempt that is cut off from outside had come.
#[derive(Debug, Default)]
pub struct Progress(AtomicU8);

impl Progress {
    /// The gate was passed: from here on a cut leaves an unknown outcome.
    fn commit(&self) {
        self.0.store(1, Ordering::Release);
    }

    /// Whether a message may have been accepted.
    pub fn is_committed(&self) -> bool {
        self.0.load(Ordering::Acquire) != 0
    }
}

/// The last look before DATA.
pub trait Gatekeeper: Sync {
    /// Whether a message may leave now.
    fn pass(&self) -> impl Future<Output = Result<(), Shut>> + Send;
}

/// Sends a composed message to the recipients at `recipients`. The gate is asked right before each DATA.
pub async fn send(
    pool: &Pool,
    route: &Route,
    job: &Job,
    message: &[u8],
    recipients: Vec<u16>,
    progress: &Progress,
    gate: &impl Gatekeeper,
) -> Report {
    let started = Instant::now();
    let mut report = Report::default();
    let mut todo = recipients;
    let mut kept = None;
    let mut fresh = false;
    loop {
        let session = match kept.take() {
            Some(session) => Ok(session),
            None if fresh => pool.fresh_session(&route.destination, &route.account).await,
            None => pool.session(&route.destination, &route.account).await,
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
        let envelope = envelope(route, job, &todo);
        let mut shut = None;
        let transaction = session
            .send(&envelope, message, async {
                match gate.pass().await {
                    Ok(()) => {
                        progress.commit();
                        true
                    }
                    Err(why) => {
                        shut = Some(why);
                        false
                    }
                }
            })
            .await;
        let mut assessment = policy::assess(&transaction, &todo);
        if assessment.verdict == Some(Verdict::Fresh) && !fresh {
            // The other kept sessions of this destination are likely as old: none of them is tried.
            fresh = true;
            continue;
        }
        todo = std::mem::take(&mut assessment.next_transaction);
        report.shut = shut;
        report.take(&transaction, assessment);
        if todo.is_empty() {
            session.release();
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
