//! What a panic left behind: a delivery in hand, perhaps a claim, perhaps a message that the server has.
//! Guarantee: the delivery is settled by what is known of it, and nothing is sent again that may have been; a job over which
//! workers panic again and again becomes a dead letter.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use futures_util::FutureExt;

use crate::model::failure::Reason;
use crate::model::job::Job;
use crate::model::ledger::{Claim, ClaimAnswer, Claimed, Settlement};
use crate::model::policy::{self, Verdict};
use crate::model::schedule::ASIDE_S;
use crate::telemetry;

use super::attempt::Report;
use super::conclude::{Conclusion, settle_of};
use super::in_hand::{InHand, ServedLane};
use super::trail::{Stage, Trail};
use super::worker::{OWN_FAULT, Worker};

impl Worker {
    /// Settles a delivery whose handling panicked.
    pub(super) async fn recover(&self, lane: &ServedLane, trail: &Trail) {
        trail.panicked();
        // None: it was settled before.
        let Some(delivery) = trail.salvage() else { return };
        let delivery = InHand::again(delivery, lane, trail);
        tracing::error!(job = job_of(trail), faults = delivery.faults(), "the worker panicked over a job");
        if AssertUnwindSafe(self.settle_after_panic(delivery)).catch_unwind().await.is_ok() {
            return;
        }
        tracing::error!(job = job_of(trail), "settling it panicked too; it goes back to its lane");
        // Once more would be the same once more: a delivery that is still there is requeued by its drop.
        if AssertUnwindSafe(self.record_what_is_known(trail)).catch_unwind().await.is_ok()
            && let Some(delivery) = trail.salvage()
        {
            self.desk.back_later(InHand::again(delivery, lane, trail)).await;
        }
    }

    async fn settle_after_panic(&self, delivery: InHand<'_>) {
        let trail = delivery.trail();
        let stage = trail.stage();
        // What could not be read before is not tried again.
        let job = trail
            .key()
            .and_then(|_| catch_unwind(AssertUnwindSafe(|| self.read(&delivery))).ok().and_then(Result::ok));
        let Some(job) = job else {
            return match stage {
                Stage::Unclaimed if delivery.is_worn() => self.desk.bury_worn(delivery, None).await,
                Stage::Unclaimed => self.later(delivery).await,
                // It could be read before: whoever reads it again finds what to hand over.
                _ => {
                    self.record_what_is_known(trail).await;
                    self.desk.back_later(delivery).await;
                }
            };
        };
        match stage {
            Stage::Unclaimed if delivery.is_worn() => self.end_unclaimed(delivery, &job).await,
            Stage::Unclaimed => self.later(delivery).await,
            Stage::Claimed(claimed) => self.end_untried(delivery, &job, *claimed).await,
            Stage::Sending(claimed, destination, progress) => {
                let report = progress.cut(Reason::Internal, OWN_FAULT);
                telemetry::attempt(destination.transport(), report.result(), report.reason());
                trail.report(&report);
                self.desk.settle(delivery, &job, *claimed, &destination, report).await;
            }
            Stage::Reported(claimed, destination, report) => {
                self.desk.settle(delivery, &job, *claimed, &destination, *report).await;
            }
            Stage::Concluded(concluded) => self.desk.conclude(delivery, &job, concluded).await,
        }
    }

    /// Back by way of a delay queue, as the same copy.
    async fn later(&self, delivery: InHand<'_>) {
        let schedule = &self.limits.retry.schedule;
        let wait_s = schedule.wait_s(delivery.faults()).unwrap_or(ASIDE_S[0]);
        let delay_s = schedule.queue_for_s(Duration::from_secs(u64::from(wait_s)));
        self.desk.put_aside(delivery, delay_s).await;
    }

    async fn end_untried(&self, delivery: InHand<'_>, job: &Job, mut claimed: Claimed) {
        let unknowns = policy::decide_orphan(&claimed, job.on_unknown).unknowns();
        if let Some((reason, detail)) = self.reason_to_give_up(job, &claimed) {
            claimed.unknowns = unknowns;
            self.desk.give_up(delivery, job, claimed, reason, detail).await;
        } else if delivery.is_worn() {
            claimed.unknowns = unknowns;
            self.desk.give_up_worn(delivery, job, claimed).await;
        } else {
            self.desk.release(delivery.trail(), &job.key, &claimed).await;
            self.later(delivery).await;
        }
    }

    /// The ledger is to know that the job is dead, if this copy is the one that decides about it.
    async fn end_unclaimed(&self, delivery: InHand<'_>, job: &Job) {
        let claim = Claim {
            key: job.key.clone(),
            body_hash: job.body_hash,
            turn: delivery.received().turn,
            revision: None,
            message_id: String::new(),
            suspects: true,
        };
        match self.ledger.claim(claim).await {
            Ok(ClaimAnswer::Claimed(claimed)) => {
                delivery.trail().reach(Stage::Claimed(claimed.clone()));
                self.end_untried(delivery, job, *claimed).await;
            }
            Ok(ClaimAnswer::AlreadySent) => self.desk.duplicate(delivery, job).await,
            Ok(ClaimAnswer::Held { .. } | ClaimAnswer::NotYet { .. } | ClaimAnswer::Suspect { .. }) => {
                self.later(delivery).await;
            }
            Ok(ClaimAnswer::IdConflict) => self.desk.conflict(delivery, job).await,
            Ok(ClaimAnswer::Stale(_) | ClaimAnswer::Closed(_)) => {
                self.desk.bury_worn(delivery, Some(job)).await;
            }
            Err(error) => self.without_database(delivery, job, &error).await,
        }
    }

    /// The least that must be done, by the shortest way: no claim stays held, and the delivery that comes again finds what
    /// it has to hand over.
    async fn record_what_is_known(&self, trail: &Trail) {
        let Some(key) = trail.key() else { return };
        let undecided = |claimed: &Claimed, report: Option<&Report>| {
            let mut conclusion = Conclusion::released(claimed);
            let unknown = report.is_some_and(|report| {
                report.verdict == Some(Verdict::Unknown) || !report.accepted.is_empty()
            });
            let reason = if unknown { Reason::UnknownOutcome } else { Reason::Internal };
            conclusion.settlement = Settlement::Dead { reason, detail: OWN_FAULT.to_owned() };
            settle_of(&key, claimed, &conclusion)
        };
        let settle = match trail.stage() {
            Stage::Unclaimed => return,
            Stage::Claimed(claimed) => undecided(&claimed, None),
            Stage::Sending(claimed, _, progress) => {
                undecided(&claimed, Some(&progress.cut(Reason::Internal, OWN_FAULT)))
            }
            Stage::Reported(claimed, _, report) => undecided(&claimed, Some(&report)),
            Stage::Concluded(concluded) => concluded.settle.clone(),
        };
        if settle.outcome.is_hand_over() {
            self.desk.debts.abandon(&key, settle.turn.next());
        }
        // Stopped meanwhile: the claim dies with this worker.
        let _ = self.desk.record(settle).await;
    }
}

/// The job as a log line names it.
fn job_of(trail: &Trail) -> String {
    trail.key().map_or_else(|| "unread".to_owned(), |key| key.to_string())
}
