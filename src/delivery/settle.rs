//! Where outcomes are recorded and handed over: ledger first, then the broker, then the ack.
//! Guarantee: what is recorded is handed over while this worker lives, however often the broker or the database go
//! away meanwhile; only the second stage of a stop ends the trying.

use std::sync::Arc;
use std::time::Duration;

use crate::broker::wire::Refusal;
use crate::broker::{DeadLetter, JobHeaders, PublishError, Publisher};
use crate::clock::Clock;
use crate::fault::{self, Place};
use crate::model::event::{Event, JobFacts, RefusedRecipient, What};
use crate::model::failure::{Reason, Reply};
use crate::model::job::{Job, JobKey};
use crate::model::ledger::{Claimed, HandOver, JobStatus, Settle, SettleAnswer, Settlement, State};
use crate::model::letter::Fate;
use crate::model::policy::RetryLimits;
use crate::model::schedule::ASIDE_S;
use crate::model::smtp_settings::{Destination, ORGANIZATION, PLATFORM};
use crate::shutdown::Shutdown;
use crate::store::{Ledger, Store, StoreError};
use crate::telemetry::{self, Outcome};

use super::attempt::{Report, Shut};
use super::conclude::{Conclusion, conclude, conclude_parked, conclude_unattempted, settle_of};
use super::database::DatabaseWatch;
use super::debts::Debts;
use super::in_hand::InHand;
use super::trail::{Concluded, Stage, Trail};

/// Pause between two tries of something that is owed.
const OWED_PAUSE: Duration = Duration::from_millis(500);

/// For what may be tried again very soon.
const SHORTEST_ASIDE_S: u32 = ASIDE_S[0];

/// What is published to may be missing for a moment, during somebody's maintenance; then it is declared again.
const TRIES_BEFORE_DECLARING: u32 = 20;

/// Records and hands over.
pub struct Desk {
    /// The ledger.
    pub ledger: Ledger,
    /// The database, for what a repeated announcement says.
    pub store: Store,
    /// Copies that are recorded and not yet published.
    pub debts: Debts,
    /// The broker, for what is republished and announced.
    pub publisher: Publisher,
    /// Whether the database can be asked.
    pub database: DatabaseWatch,
    /// When to give up.
    pub retry: RetryLimits,
    /// Time.
    pub clock: Clock,
    /// When to stop.
    pub shutdown: Shutdown,
}

/// The worker is stopped before something owed could be done; the broker will bring the delivery again.
pub(super) struct Stopped;

impl Desk {
    /// A body that is no job: a dead letter at once, without a row in the ledger.
    pub async fn refuse(&self, delivery: InHand<'_>, refusal: Refusal) {
        let kind = refusal.kind;
        let facts = refusal.id.map(|job_id| JobFacts { job_id, kind, group: None });
        let organization_id = refusal.key.and_then(|key| key.organization);
        let what = What::Dead { reason: refusal.reason };
        let event = Event { at: self.clock.now(), organization_id, job: facts, what };
        self.bury(delivery, refusal.reason, &refusal.detail, event).await;
    }

    /// Another body came under an id that the ledger knows: the row stays as it is.
    pub async fn conflict(&self, delivery: InHand<'_>, job: &Job) {
        let detail = "id: the same id was published before with another body";
        let event = Event::of_job(self.clock.now(), job, What::Dead { reason: Reason::IdConflict });
        self.bury(delivery, Reason::IdConflict, detail, event).await;
    }

    /// The worker has failed over the body so often that it is given up; the ledger may know nothing of it.
    pub async fn bury_worn(&self, delivery: InHand<'_>, job: Option<&Job>) {
        let what = What::Dead { reason: Reason::Internal };
        let event = match job {
            Some(job) => Event::of_job(self.clock.now(), job, what),
            None => Event { at: self.clock.now(), organization_id: None, job: None, what },
        };
        let detail = worn(&delivery);
        self.bury(delivery, Reason::Internal, &detail, event).await;
    }

    async fn bury(&self, delivery: InHand<'_>, reason: Reason, detail: &str, event: Event) {
        let headers = delivery.headers(self.clock.now());
        let done = async {
            self.bury_for(&delivery, self.letter(reason, detail), headers).await?;
            self.announce(&event).await
        };
        match done.await {
            Ok(()) => delivery.finish(Outcome::Dead).await,
            Err(Stopped) => delivery.hand_back().await,
        }
    }

    /// A copy of something that is done or in better hands.
    pub async fn duplicate(&self, delivery: InHand<'_>, job: &Job) {
        // The worker that had it may have died between its record and its announcement.
        if delivery.received().redelivered && self.announce_again(&delivery, job).await.is_err() {
            return delivery.hand_back().await;
        }
        delivery.finish(Outcome::Duplicate).await;
    }

    /// Says again what the recorder of a sent job may not have said any more.
    async fn announce_again(&self, delivery: &InHand<'_>, job: &Job) -> Result<(), Stopped> {
        let Ok(Some(status)) = self.store.job_status(&job.key).await else { return Ok(()) };
        if status.state != State::Sent {
            return Ok(());
        }
        let (attempt, first_at, turn) = (status.attempts, status.first_at, status.turn);
        let headers = JobHeaders { attempt, first_at, turn, faults: delivery.faults() };
        if let Some(first) = status.refused.first() {
            let detail = format!("recipient {} was refused with {}", first.index, first.code);
            self.bury_refused(delivery, &status.refused, &detail, headers).await?;
            self.announce(&Event::of_job(self.clock.now(), job, death(first.reason))).await?;
        }
        let transport = transport_so_far(job, Some(&status));
        let message_id = status.message_id.unwrap_or_default();
        let what = What::Sent { message_id, transport, recipients_refused: status.refused };
        self.announce(&Event::of_job(self.clock.now(), job, what)).await
    }

    /// Back to the lane by way of an aside queue, with the same turn: nothing was attempted.
    pub async fn put_aside(&self, delivery: InHand<'_>, delay_s: u32) {
        let headers = delivery.headers(self.clock.now());
        match self.owe("aside", || self.aside_copy(&delivery, delay_s, headers)).await {
            Ok(()) => delivery.finish(Outcome::Requeued).await,
            Err(Stopped) => delivery.hand_back().await,
        }
    }

    /// Back to the lane at once: this worker stops.
    pub async fn hand_back(&self, delivery: InHand<'_>) {
        delivery.hand_back().await;
    }

    /// Back to the lane: this worker cannot work now. The first time at once; after that by way of an aside queue, for the
    /// broker counts what comes back at once towards the lane's delivery limit, which is there for jobs that kill workers.
    pub async fn back_later(&self, delivery: InHand<'_>) {
        if delivery.received().redelivered && !self.shutdown.is_draining() {
            self.put_aside(delivery, SHORTEST_ASIDE_S).await;
        } else {
            delivery.hand_back().await;
        }
    }

    /// The ledger would not even look at the job, for as long as a job may live.
    pub async fn refused_to_the_end(&self, delivery: InHand<'_>, job: &Job) {
        let detail = "the database refused to look at the job";
        let event = Event::of_job(self.clock.now(), job, What::Dead { reason: Reason::RetriesExhausted });
        self.bury(delivery, Reason::RetriesExhausted, detail, event).await;
    }

    /// Does a recorded hand-over once more: its recorder may have died before it.
    pub async fn repeat(&self, delivery: InHand<'_>, job: &Job, hand_over: HandOver) {
        let (attempt, first_at, turn) = (hand_over.attempts, hand_over.counted_from(), hand_over.turn);
        let headers = JobHeaders { attempt, first_at, turn, faults: delivery.faults() };
        let now = self.clock.now();
        let done = async {
            if hand_over.state == State::Deferred {
                let delay_s = self.retry.schedule.queue_for_s(hand_over.wait);
                self.owe("retry", || self.retry_copy(&delivery, delay_s, headers)).await?;
                // A replay has none: nothing has failed that could be announced.
                let Some(reason) = hand_over.reason else { return Ok(()) };
                let what = What::Deferred { reason, next_attempt_at: now + hand_over.wait };
                self.announce(&Event::of_job(now, job, what)).await
            } else {
                let reason = hand_over.reason.unwrap_or(Reason::Internal);
                let detail = hand_over.detail.as_deref().unwrap_or_default();
                let letter = self.letter(reason, detail);
                if hand_over.state == State::Parked {
                    let recipients = hand_over.pending.as_deref();
                    let letter = DeadLetter { fate: Fate::Parked, recipients, ..letter };
                    self.bury_for(&delivery, letter, headers).await?;
                    return self.announce(&Event::of_job(now, job, What::Parked { reason })).await;
                }
                self.bury_for(&delivery, letter, headers).await?;
                self.announce(&Event::of_job(now, job, death(reason))).await
            }
        };
        // Called back while it waited: this copy is its end.
        let ended = if hand_over.state == State::Cancelled { Outcome::Dead } else { Outcome::Duplicate };
        match done.await {
            Ok(()) => {
                self.debts.pay(&job.key, turn);
                delivery.finish(ended).await;
            }
            Err(Stopped) => delivery.hand_back().await,
        }
    }

    /// Gives a claim back without an attempt.
    pub async fn release(&self, trail: &Trail, key: &JobKey, claimed: &Claimed) {
        let settle = settle_of(key, claimed, &Conclusion::released(claimed));
        // Stopped meanwhile: the claim dies with this worker.
        let _ = self.record(settle).await;
        trail.reach(Stage::Unclaimed);
    }

    /// A claimed job that is not attempted: dead.
    pub async fn give_up(
        &self,
        delivery: InHand<'_>,
        job: &Job,
        claimed: Claimed,
        reason: Reason,
        detail: String,
    ) {
        let conclusion = conclude_unattempted(job, &claimed, reason, detail);
        self.untried(delivery, job, claimed, conclusion).await;
    }

    /// A claimed job whose organization's configuration fails: parked, unless its time is over.
    pub async fn park(&self, delivery: InHand<'_>, job: &Job, claimed: Claimed, reason: Reason) {
        let conclusion = conclude_parked(job, &claimed, reason, &self.retry, self.clock.now());
        self.untried(delivery, job, claimed, conclusion).await;
    }

    async fn untried(&self, delivery: InHand<'_>, job: &Job, claimed: Claimed, conclusion: Conclusion) {
        let settle = settle_of(&job.key, &claimed, &conclusion);
        // Only a job that some recipients have is announced with the server that it went through.
        let status = match claimed.partly_sent {
            true => self.store.job_status(&job.key).await.ok().flatten(),
            false => None,
        };
        let transport = transport_so_far(job, status.as_ref());
        let concluded = Concluded { claimed, transport, settle, conclusion };
        self.conclude(delivery, job, Arc::new(concluded)).await;
    }

    /// A claimed job over which the worker panicked to the last.
    pub async fn give_up_worn(&self, delivery: InHand<'_>, job: &Job, claimed: Claimed) {
        let detail = worn(&delivery);
        self.give_up(delivery, job, claimed, Reason::Internal, detail).await;
    }

    /// An attempted job: records what came of it and hands it over.
    pub async fn settle(
        &self,
        delivery: InHand<'_>,
        job: &Job,
        claimed: Claimed,
        destination: &Destination,
        report: Report,
    ) {
        let untouched = report.accepted.is_empty() && report.refused.is_empty();
        match report.shut {
            // Also where the claim seems to be another's: a release that finds it so changes nothing, and one that does not
            // would leave the job held for as long as this worker lives.
            Some(Shut::NotOwner | Shut::Halted) if untouched => {
                self.release(delivery.trail(), &job.key, &claimed).await;
                return self.back_later(delivery).await;
            }
            _ => {}
        }
        let platform = *destination == Destination::Platform;
        let mut conclusion = conclude(job, &claimed, &report, platform, &self.retry, self.clock.now());
        if delivery.is_worn() {
            conclusion.condemn(&report.later, worn(&delivery));
        }
        let first_time_right = matches!(conclusion.settlement, Settlement::Sent)
            && claimed.attempts == 0
            && report.reason().is_none();
        let settle = Settle {
            reply: report.reply.as_ref().map(Reply::to_string),
            attempt: (!first_time_right).then(|| report.record(&claimed, destination)),
            ..settle_of(&job.key, &claimed, &conclusion)
        };
        let concluded = Concluded { claimed, transport: destination.transport(), settle, conclusion };
        self.conclude(delivery, job, Arc::new(concluded)).await;
    }

    /// Records a decision and hands it over. From here on it stands: after a panic the same one is carried out again.
    pub async fn conclude(&self, delivery: InHand<'_>, job: &Job, concluded: Arc<Concluded>) {
        delivery.trail().reach(Stage::Concluded(concluded.clone()));
        fault::strike(Place::Record, &delivery.received().body);
        let Concluded { claimed, settle, .. } = &*concluded;
        let accepted = matches!(settle.outcome, Settlement::Sent);
        let owed = claimed.turn.next();
        if !accepted {
            self.debts.incur(&job.key, owed);
        }
        match self.record(settle.clone()).await {
            Ok(SettleAnswer::Recorded) => {}
            Ok(SettleAnswer::NotOwner) => {
                self.debts.pay(&job.key, owed);
                tracing::warn!(job = %job.key, "another worker took this job over; its record stands");
                telemetry::settle_missed();
                return delivery.hand_back().await;
            }
            // The server has the message: a redelivery could only send it twice. The row says `claimed` by a worker that
            // is gone, which is how the ledger spells an unknown outcome.
            Err(Stopped) if accepted => return delivery.finish(Outcome::Sent).await,
            Err(Stopped) => return delivery.hand_back().await,
        }
        fault::strike(Place::HandOver, &delivery.received().body);
        match self.hand_over(&delivery, job, &concluded).await {
            Ok(settled) => {
                self.debts.pay(&job.key, owed);
                if settled == Outcome::Sent {
                    let published = delivery.received().published_at().unwrap_or(claimed.first_at);
                    let since = claimed.replayed_at.unwrap_or(published);
                    let took = Duration::try_from(self.clock.now() - since).unwrap_or_default();
                    delivery.lane().metrics.job_took(took);
                }
                delivery.finish(settled).await;
            }
            Err(Stopped) => delivery.hand_back().await,
        }
    }

    async fn hand_over(
        &self,
        delivery: &InHand<'_>,
        job: &Job,
        Concluded { claimed, transport, conclusion, .. }: &Concluded,
    ) -> Result<Outcome, Stopped> {
        let now = self.clock.now();
        let (attempt, first_at, faults) = (conclusion.attempts, claimed.first_at, delivery.faults());
        let next = |turn| JobHeaders { attempt, first_at, turn, faults };
        let announce = async |what| self.announce(&Event::of_job(now, job, what)).await;
        match &conclusion.settlement {
            Settlement::Sent => {
                if let Some(first) = conclusion.refused.first() {
                    self.bury_refused(delivery, &conclusion.refused, &conclusion.detail, next(claimed.turn))
                        .await?;
                    announce(death(first.reason)).await?;
                }
                let recipients_refused = conclusion.refused.clone();
                let message_id = claimed.message_id.clone();
                announce(What::Sent { message_id, transport, recipients_refused }).await?;
                Ok(Outcome::Sent)
            }
            Settlement::Deferred { reason, wait } => {
                let delay_s = self.retry.schedule.queue_for_s(*wait);
                let headers = JobHeaders { first_at: claimed.counted_from(), ..next(claimed.turn.next()) };
                self.owe("retry", || self.retry_copy(delivery, delay_s, headers)).await?;
                announce(What::Deferred { reason: *reason, next_attempt_at: now + *wait }).await?;
                Ok(Outcome::Deferred)
            }
            Settlement::Dead { reason, detail } => {
                let headers = next(claimed.turn.next());
                self.bury_for(delivery, self.letter(*reason, detail), headers).await?;
                announce(death(*reason)).await?;
                Ok(Outcome::Dead)
            }
            Settlement::Parked { reason, detail } => {
                let headers = next(claimed.turn.next());
                let recipients = conclusion.pending.as_deref();
                let letter = DeadLetter { fate: Fate::Parked, recipients, ..self.letter(*reason, detail) };
                self.bury_for(delivery, letter, headers).await?;
                announce(What::Parked { reason: *reason }).await?;
                Ok(Outcome::Parked)
            }
            Settlement::Released => Ok(Outcome::Requeued),
        }
    }

    /// One dead letter for the recipients that were refused although others were accepted.
    async fn bury_refused(
        &self,
        delivery: &InHand<'_>,
        refused: &[RefusedRecipient],
        detail: &str,
        headers: JobHeaders,
    ) -> Result<(), Stopped> {
        let mut positions: Vec<u16> = refused.iter().map(|refused| refused.index).collect();
        positions.sort_unstable();
        positions.dedup();
        let reason = refused.first().map_or(Reason::RecipientsRefused, |refused| refused.reason);
        let recipients = Some(positions.as_slice());
        self.bury_for(delivery, DeadLetter { recipients, ..self.letter(reason, detail) }, headers).await
    }

    /// None of a delivery that was lost meanwhile: it comes again by itself.
    async fn aside_copy(
        &self,
        delivery: &InHand<'_>,
        delay_s: u32,
        headers: JobHeaders,
    ) -> Result<(), PublishError> {
        if delivery.is_open() { self.retry_copy(delivery, delay_s, headers).await } else { Ok(()) }
    }

    async fn retry_copy(
        &self,
        delivery: &InHand<'_>,
        delay_s: u32,
        headers: JobHeaders,
    ) -> Result<(), PublishError> {
        self.publisher.retry(delivery.received(), &delivery.lane().name, delay_s, headers).await
    }

    pub(super) async fn announce(&self, event: &Event) -> Result<(), Stopped> {
        self.owe("event", || self.publisher.event(event)).await
    }

    /// For every recipient, and dead.
    fn letter<'a>(&self, reason: Reason, detail: &'a str) -> DeadLetter<'a> {
        DeadLetter { reason, detail, died_at: self.clock.now(), recipients: None, fate: Fate::Dead }
    }

    async fn bury_for(
        &self,
        delivery: &InHand<'_>,
        death: DeadLetter<'_>,
        headers: JobHeaders,
    ) -> Result<(), Stopped> {
        let (letter, lane) = (delivery.received(), &delivery.lane().name);
        self.owe("dead letter", || self.publisher.dead_letter(letter, lane, headers, death)).await
    }

    /// Publishes until it is confirmed.
    async fn owe<F>(&self, what: &str, publish: impl Fn() -> F) -> Result<(), Stopped>
    where
        F: Future<Output = Result<(), PublishError>>,
    {
        for tries in 1_u32.. {
            let error = tokio::select! {
                biased;
                () = self.shutdown.stop_now() => return Err(Stopped),
                result = publish() => match result {
                    Ok(()) => return Ok(()),
                    Err(error) => error,
                },
            };
            if tries == 1 {
                tracing::warn!(what, %error, "a publish was not confirmed; it is tried until it is");
            }
            if tries.is_multiple_of(TRIES_BEFORE_DECLARING)
                && matches!(error, PublishError::Unroutable { .. })
            {
                self.declare_again().await;
            }
            self.pause().await?;
        }
        Err(Stopped)
    }

    /// What it publishes to is not there: somebody deleted it under the running worker.
    async fn declare_again(&self) {
        tracing::warn!("a queue or an exchange is missing; declaring the topology again");
        if let Err(error) = self.publisher.declare().await {
            tracing::warn!(%error, "cannot declare the topology");
        }
    }

    /// Records until the database has taken it.
    pub(super) async fn record(&self, settle: Settle) -> Result<SettleAnswer, Stopped> {
        let mut complained = false;
        loop {
            // A statement that was sent may have been carried out: it is never cut off, only not begun again.
            let error = match self.ledger.settle(settle.clone()).await {
                Ok(answer) => return Ok(answer),
                Err(error) => error,
            };
            self.database.lost(&error);
            if !complained && matches!(error, StoreError::Internal(_)) {
                tracing::error!(job = %settle.key, %error, "an outcome could not be recorded; it is tried until it is");
                complained = true;
            }
            self.pause().await?;
        }
    }

    async fn pause(&self) -> Result<(), Stopped> {
        tokio::select! {
            biased;
            () = self.shutdown.stop_now() => Err(Stopped),
            () = tokio::time::sleep(OWED_PAUSE) => Ok(()),
        }
    }
}

/// The contract's `transport` of the attempts so far; a first attempt that succeeded leaves no record of it.
fn transport_so_far(job: &Job, status: Option<&JobStatus>) -> &'static str {
    let last = status.and_then(|status| status.history.last()).map(|attempt| attempt.transport.as_str());
    if last == Some(PLATFORM) || job.key.organization.is_none() { PLATFORM } else { ORGANIZATION }
}

/// Said of a job that the worker failed over to the last.
fn worn(delivery: &InHand<'_>) -> String {
    format!("the worker panicked over it {} times", delivery.faults())
}

fn death(reason: Reason) -> What {
    if reason == Reason::Expired { What::Expired { reason } } else { What::Dead { reason } }
}
