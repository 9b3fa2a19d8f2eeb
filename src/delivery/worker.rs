//! One delivery's way: parse, claim, route, admit, send, record, settle.
//! Guarantee: a delivery ends acked only after its outcome is recorded and handed over; a crash between any two steps
//! repeats a step, and the ledger makes the repetition harmless. A panic is no end: `recovery` settles what it left.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use tokio::sync::Notify;

use crate::broker::Delivery;
use crate::broker::wire::WireLimits;
use crate::clock::Clock;
use crate::fault::{self, Place};
use crate::model::cancelling;
use crate::model::failure::Reason;
use crate::model::job::{Job, JobKey};
use crate::model::ledger::{Claim, ClaimAnswer, Claimed, HandOver, State};
use crate::model::parking::{self, superseded};
use crate::model::policy::{self, OrphanDisposition, RetryLimits, Verdict};
use crate::settings::CustomSmtp;
use crate::shutdown::Shutdown;
use crate::smtp::Pool;
use crate::smtp::compose;
use crate::store::{ConfigCache, Incarnations, Ledger, Liveness, StoreError};
use crate::telemetry;

use super::admission::{Connections, Start, Started, heavily};
use super::attempt::{self, Progress, Report, Shut};
use super::blame::{Blames, absolution};
use super::conclude::recipients;
use super::database::DatabaseWatch;
use super::debts::Debt;
use super::dispatch::Slot;
use super::gatekeeping::Gatekeeping;
use super::in_hand::{InHand, ServedLane};
use super::quarantine::{Quarantine, Room, Turn};
use super::rates::{Allowance, Rates};
use super::route::{self, NoServer, PlatformServer, Route};
use super::settle::Desk;
use super::trail::{Stage, Trail};
use super::weights::Weights;

/// A job whose configuration changes at every look is put aside after so many.
const ROUTE_LOOKS: usize = 3;
/// Wait of a copy that another worker is busy with, in seconds: the shortest aside delay.
const HELD_WAIT_S: u32 = 5;
/// For so long a vanished host's lock may look held: its session's keepalives end it after 14 s.
const LOCK_OUTLIVES: Duration = Duration::from_secs(30);
/// Wait of a job that must be alone while others do not come to an end, in seconds.
const CROWDED_WAIT_S: u32 = 120;
/// Wait of a job that the database refused to look at, in seconds.
const REFUSED_WAIT_S: u32 = 30;

/// What is said of a panic.
pub(super) const OWN_FAULT: &str = "the worker had a fault of its own";

/// The settings that a delivery's way depends on.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Bounds of a job.
    pub wire: WireLimits,
    /// When to give up.
    pub retry: RetryLimits,
    /// One attempt as a whole.
    pub attempt_timeout: Duration,
    /// Who may use a server of its own.
    pub custom_smtp: CustomSmtp,
    /// Connections to one server.
    pub connections: Connections,
}

/// Everything a delivery meets on its way.
pub struct Worker {
    /// The ledger.
    pub ledger: Ledger,
    /// This worker's life, and the others'.
    pub incarnations: Incarnations,
    /// The organizations' servers.
    pub configs: ConfigCache,
    /// What is held against them.
    pub blames: Blames,
    /// Room for great jobs.
    pub weights: Weights,
    /// What providers allow.
    pub rates: Rates,
    /// Who may work at the same time.
    pub quarantine: Quarantine,
    /// SMTP sessions.
    pub pool: Pool,
    /// Where outcomes are recorded and handed over.
    pub desk: Desk,
    /// Whether the database can be asked.
    pub database: DatabaseWatch,
    /// Told when a configuration is sealed under a key that the ring lacks: the worker is then not ready.
    pub key_missing: Arc<Notify>,
    /// The platform's own server.
    pub platform: Option<PlatformServer>,
    /// Settings.
    pub limits: Limits,
    /// Time.
    pub clock: Clock,
    /// When to stop.
    pub shutdown: Shutdown,
}

/// What is to be done with a delivery.
enum TakeUp<'a> {
    /// Send it.
    Work(Box<Claimed>, Route, Started, Room<'a>),
    /// It is claimed, but will not be attempted.
    GiveUp(Box<Claimed>, Reason, String, Room<'a>),
    /// It is claimed, and its organization's configuration fails.
    Park(Box<Claimed>, Reason, Room<'a>),
    /// So many workers died with it: take a turn, and come again.
    Suspect(u32),
    /// Another body came under this id.
    Conflict,
    /// Sent before, or a copy that nobody needs.
    Duplicate,
    /// Later, by way of an aside queue; nothing is charged.
    Aside(u32),
    /// Back to the lane: this worker cannot work now.
    HandBack,
    /// The recorded hand-over may not have happened: once more.
    Repeat(HandOver),
}

impl Worker {
    /// Brings one delivery to its end.
    pub async fn handle(&self, delivery: Delivery, lane: &ServedLane) {
        let slot = lane.queue.take();
        let trail = Trail::default();
        let delivery = InHand::new(delivery, lane, &trail);
        if AssertUnwindSafe(self.deliver(delivery, &slot)).catch_unwind().await.is_err() {
            Box::pin(self.recover(lane, &trail)).await;
        }
    }

    /// The ways that follow each other are boxed: a task is as large as the largest of them, and a prefetch of tasks waits.
    async fn deliver(&self, delivery: InHand<'_>, slot: &Slot) {
        let bytes = delivery.received().body.len();
        let job = {
            let _turn = self.weights.copy(bytes).await;
            let _room = self.quarantine.shared().await;
            fault::strike(Place::Parse, &delivery.received().body);
            match self.read_to_wait(&delivery) {
                Ok(job) => job,
                Err(refusal) => return Box::pin(self.desk.refuse(delivery, refusal)).await,
            }
        };
        delivery.trail().is_job(&job.key);
        let mut taken = self.take_up(&delivery, &job, slot, None).await;
        let turn = match taken {
            Ok(TakeUp::Suspect(crashes)) => self.turn(crashes).await,
            _ => None,
        };
        if turn.is_some() {
            taken = self.take_up(&delivery, &job, slot, turn.as_ref()).await;
        }
        match taken {
            Ok(TakeUp::Work(claimed, route, started, _room)) => {
                let limit = Quarantine::bound(turn.as_ref(), self.limits.attempt_timeout);
                Box::pin(self.work(delivery, job, *claimed, route, started, limit)).await;
            }
            Ok(TakeUp::GiveUp(mut claimed, reason, detail, _room)) => {
                claimed.unknowns = policy::decide_orphan(&claimed, job.on_unknown).unknowns();
                Box::pin(self.desk.give_up(delivery, &job, *claimed, reason, detail)).await;
            }
            Ok(TakeUp::Park(mut claimed, reason, _room)) => {
                claimed.unknowns = policy::decide_orphan(&claimed, job.on_unknown).unknowns();
                Box::pin(self.desk.park(delivery, &job, *claimed, reason)).await;
            }
            Ok(TakeUp::Suspect(_)) => Box::pin(self.desk.put_aside(delivery, HELD_WAIT_S)).await,
            Ok(TakeUp::Conflict) => Box::pin(self.desk.conflict(delivery, &job)).await,
            Ok(TakeUp::Duplicate) => Box::pin(self.desk.duplicate(delivery, &job)).await,
            Ok(TakeUp::Aside(delay_s)) => {
                let _turn = self.weights.copy(bytes).await;
                Box::pin(self.desk.put_aside(delivery, delay_s)).await;
            }
            Ok(TakeUp::HandBack) => Box::pin(self.desk.hand_back(delivery)).await,
            Ok(TakeUp::Repeat(hand_over)) => Box::pin(self.desk.repeat(delivery, &job, hand_over)).await,
            Err(error) => Box::pin(self.without_database(delivery, &job, &error)).await,
        }
    }

    /// `None` also when the worker stops meanwhile.
    async fn turn(&self, crashes: u32) -> Option<Turn<'_>> {
        tokio::select! {
            biased;
            () = self.shutdown.stop_taking() => None,
            turn = self.quarantine.turn(crashes) => turn,
        }
    }

    pub(super) async fn without_database(&self, delivery: InHand<'_>, job: &Job, error: &StoreError) {
        match error {
            StoreError::Unavailable(_) => {
                self.database.lost(error);
                self.desk.back_later(delivery).await;
            }
            StoreError::Internal(_) if self.is_overdue(&delivery) => {
                tracing::error!(job = %job.key, %error, "the database refused to look at a job to the end");
                self.desk.refused_to_the_end(delivery, job).await;
            }
            // Handing it back would bring it again at once, for ever.
            StoreError::Internal(_) => {
                tracing::error!(job = %job.key, %error, "the database refused to look at a job; it is put aside");
                self.desk.put_aside(delivery, REFUSED_WAIT_S).await;
            }
        }
    }

    /// Route, admit, claim; again where the claim's answer shows that the route has changed meanwhile.
    async fn take_up<'a>(
        &'a self,
        delivery: &InHand<'_>,
        job: &Job,
        slot: &Slot,
        turn: Option<&Turn<'_>>,
    ) -> Result<TakeUp<'a>, StoreError> {
        fault::strike(Place::TakeUp, &delivery.received().body);
        for _ in 0..ROUTE_LOOKS {
            let routed = self.route(job).await?;
            let now = self.clock.now();
            let in_time = !self.is_overdue(delivery) && !job.is_expired(now);
            let started = match &routed {
                Err(NoServer::KeyMissing(_)) if in_time => {
                    self.key_missing.notify_one();
                    return Ok(TakeUp::Aside(REFUSED_WAIT_S));
                }
                Ok(route) if in_time => match self.admit(delivery, job, route, slot).await? {
                    Start::Go(started) => Some(started),
                    Start::PutAside(delay_s) => return Ok(TakeUp::Aside(delay_s)),
                    Start::Stopping => return Ok(TakeUp::HandBack),
                },
                _ => None,
            };
            let Some(room) = self.quarantine.room(turn).await else {
                return Ok(TakeUp::Aside(CROWDED_WAIT_S));
            };
            let claimed = match self.claim(delivery, job, &routed, turn.is_some()).await? {
                Ok(claimed) => claimed,
                Err(other) => return Ok(other),
            };
            delivery.trail().reach(Stage::Claimed(claimed.clone()));
            fault::strike(Place::Claimed, &delivery.received().body);
            if let Some((reason, detail)) = self.reason_to_give_up(job, &claimed) {
                return Ok(TakeUp::GiveUp(claimed, reason, detail, room));
            }
            let current = match self.route_as_of(job, &claimed).await {
                Ok(current) => current,
                Err(error) => {
                    // Its claim would otherwise be held for as long as this worker lives.
                    self.desk.release(delivery.trail(), &job.key, &claimed).await;
                    return Err(error);
                }
            };
            // Whatever it was admitted for: its permit goes back.
            if let Err(NoServer::Failing(reason)) = current
                && !self.is_overdue(delivery)
            {
                return Ok(TakeUp::Park(claimed, reason, room));
            }
            if !route::is_same(&current, &routed) {
                self.desk.release(delivery.trail(), &job.key, &claimed).await;
                continue;
            }
            return Ok(match (routed, started) {
                (Ok(route), Some(started)) => TakeUp::Work(claimed, route, started, room),
                (Err(NoServer::Dead(reason)), _) => {
                    TakeUp::GiveUp(claimed, reason, route::NONE.to_owned(), room)
                }
                // Only a job past its age comes as far as this without a permit.
                (Ok(_) | Err(_), _) => {
                    let detail = format!("not sent within {} s", self.limits.retry.max_age.as_secs());
                    TakeUp::GiveUp(claimed, Reason::RetriesExhausted, detail, room)
                }
            });
        }
        Ok(TakeUp::Aside(HELD_WAIT_S))
    }

    /// Whether the job has been on its way for so long that it is not put aside any more.
    fn is_overdue(&self, delivery: &InHand<'_>) -> bool {
        let first_at = delivery.received().first_at;
        // A header says what it likes: only a difference of times is sure to be one.
        first_at.is_some_and(|first_at| self.clock.now() - first_at > self.limits.retry.max_age)
    }

    async fn claim(
        &self,
        delivery: &InHand<'_>,
        job: &Job,
        routed: &Result<Route, NoServer>,
        suspects: bool,
    ) -> Result<Result<Box<Claimed>, TakeUp<'static>>, StoreError> {
        let domain = routed.as_ref().ok().map(|route| route.account.from.email.domain());
        let claim = Claim {
            key: job.key.clone(),
            body_hash: job.body_hash,
            turn: delivery.received().turn,
            revision: job.group.clone(),
            message_id: domain.map(|domain| message_id(job, domain)).unwrap_or_default(),
            suspects,
        };
        Ok(Err(match self.ledger.claim(claim).await? {
            ClaimAnswer::Claimed(claimed) => return Ok(Ok(claimed)),
            ClaimAnswer::AlreadySent => TakeUp::Duplicate,
            ClaimAnswer::IdConflict => TakeUp::Conflict,
            ClaimAnswer::Held { owner } => {
                // Asking starts the second look, so that a dead owner is known as such when the copy returns.
                self.incarnations.is_alive(owner).await?;
                TakeUp::Aside(HELD_WAIT_S)
            }
            ClaimAnswer::Suspect { crashes } => TakeUp::Suspect(crashes),
            ClaimAnswer::NotYet { wait } => TakeUp::Aside(self.limits.retry.schedule.queue_for_s(wait)),
            ClaimAnswer::Closed(hand_over) => TakeUp::Repeat(hand_over),
            ClaimAnswer::Stale(hand_over) => self.judge_stale(delivery, &job.key, hand_over).await?,
        }))
    }

    /// A copy of an earlier turn goes once the current turn's copy is surely there: taken up already, or made by this worker;
    /// for a dead letter it is enough that its recorder's lock has been held for longer than a lock can outlive its worker.
    async fn judge_stale(
        &self,
        delivery: &InHand<'_>,
        key: &JobKey,
        hand_over: HandOver,
    ) -> Result<TakeUp<'static>, StoreError> {
        if hand_over.taken_up {
            return Ok(TakeUp::Duplicate);
        }
        if self.incarnations.current() == Some(hand_over.owner) {
            // What this worker still owes it may yet be stopped from giving: then this copy is the only one.
            return Ok(match self.desk.debts.standing(key, hand_over.turn) {
                Some(Debt::Owed) => TakeUp::Aside(HELD_WAIT_S),
                Some(Debt::Abandoned) => TakeUp::Repeat(hand_over),
                None => TakeUp::Duplicate,
            });
        }
        Ok(match self.incarnations.is_alive(hand_over.owner).await? {
            // It may still owe the current copy, and die of it: this one waits until that one is taken up.
            Liveness::Alive if hand_over.state == State::Deferred => {
                TakeUp::Aside(self.limits.retry.schedule.queue_for_s(hand_over.wait))
            }
            // Perhaps the recorder's own delivery, taken back from it: then nothing else brings the letter should it die owing
            // it. A second letter of one death is harmless.
            Liveness::Alive if delivery.received().redelivered => TakeUp::Repeat(hand_over),
            Liveness::Alive if hand_over.age >= LOCK_OUTLIVES => TakeUp::Duplicate,
            Liveness::Alive | Liveness::Suspect => TakeUp::Aside(HELD_WAIT_S),
            Liveness::Dead => TakeUp::Repeat(hand_over),
        })
    }

    /// Why a claimed job is not to be attempted at all.
    pub(super) fn reason_to_give_up(&self, job: &Job, claimed: &Claimed) -> Option<(Reason, String)> {
        if let OrphanDisposition::Dead { reason, .. } = policy::decide_orphan(claimed, job.on_unknown) {
            let detail = format!("{} workers died with this job in hand", claimed.crashes);
            return Some((reason, detail));
        }
        if claimed.cancelled {
            let (reason, detail) = cancelling::give_up(claimed, job.on_unknown);
            return Some((reason, detail.to_owned()));
        }
        if let (Some(revision), Some(newest)) = (&job.group, claimed.newest_sequence)
            && newest > revision.sequence
        {
            return Some((Reason::Superseded, superseded(revision.sequence, newest)));
        }
        job.is_expired(self.clock.now()).then(|| (Reason::Expired, expired(job)))
    }

    async fn work(
        &self,
        delivery: InHand<'_>,
        mut job: Job,
        mut claimed: Claimed,
        route: Route,
        started: Started,
        limit: Duration,
    ) {
        claimed.unknowns = policy::decide_orphan(&claimed, job.on_unknown).unknowns();
        // The first attempt's From makes it; the attempt of a worker that died may have been that.
        let untried = claimed.attempts == 0 && claimed.crashes == 0 && claimed.replayed_at.is_none();
        if untried || claimed.message_id.is_empty() {
            claimed.message_id = message_id(&job, route.account.from.email.domain());
        }
        let progress = Arc::new(Progress::new(recipients(&job, &claimed)));
        let stage = Stage::Sending(Box::new(claimed.clone()), route.destination.clone(), progress.clone());
        delivery.trail().reach(stage);
        fault::strike(Place::Compose, &delivery.received().body);
        let max_bytes = self.limits.wire.max_message_bytes;
        // A replay is dated when it was asked for: readers and filters take a letter of days ago for old mail.
        let date = claimed.counted_from();
        if let Err(refusal) = self.read_to_send(&delivery, &mut job) {
            drop(started);
            let detail = refusal.detail;
            return Box::pin(self.desk.give_up(delivery, &job, claimed, Reason::Malformed, detail)).await;
        }
        let composing = || compose::compose(&job, &route.account.from, &claimed.message_id, date, max_bytes);
        let bytes = delivery.received().body.len();
        let message = match heavily(bytes, composing) {
            Ok(message) => message,
            Err(error) => {
                drop(started);
                let detail = error.to_string();
                return Box::pin(self.desk.give_up(delivery, &job, claimed, Reason::TooLarge, detail)).await;
            }
        };
        // They are in the message now, and an attempt can take minutes.
        job.attachments.clear();
        let Started { permit, allowance } = started;
        allowance.as_ref().inspect(|allowance| allowance.begin());
        let sending = async {
            fault::strike(Place::Attempt, &delivery.received().body);
            let since = Instant::now();
            let allowance = allowance.as_ref();
            let gate = Gatekeeping { worker: self, job: &job, claimed: &claimed, since, allowance };
            let seats = allowance.map(Allowance::seats);
            let report = attempt::send(&self.pool, &route, &job, &message, &progress, &gate, seats).await;
            fault::strike(Place::Answered, &delivery.received().body);
            report
        };
        let mut report = self.bounded(sending, &progress, limit).await;
        delivery.trail().report(&report);
        drop(message);
        // Before the permit goes to the next in line, which would make another connection.
        let trouble = self.blames.blame(&route, claimed.reason, &mut report).await;
        if report.blamed.is_some() {
            delivery.trail().report(&report);
        }
        drop(allowance);
        permit.finish(report.outcome());
        telemetry::attempt(route.destination.transport(), report.result(), report.reason());
        let absolution = absolution(&route, &report);
        self.desk.settle(delivery, &job, claimed, &route.destination, report).await;
        if let Some(by) = absolution {
            self.blames.absolve(&route.destination, by).await;
        }
        if let Some(trouble) = trouble {
            self.blames.announce(&self.desk, trouble).await;
        }
    }

    /// Runs the attempt within its bounds: its time, and the second stage of a stop.
    async fn bounded(
        &self,
        sending: impl Future<Output = Report>,
        progress: &Progress,
        limit: Duration,
    ) -> Report {
        let (reason, detail, stopped) = tokio::select! {
            report = sending => return report,
            () = tokio::time::sleep(limit) => {
                (Reason::Timeout, "the attempt took too long as a whole", false)
            }
            () = self.shutdown.stop_now() => (Reason::Internal, "the worker was stopped", true),
        };
        let mut report = progress.cut(reason, detail);
        if stopped && report.verdict != Some(Verdict::Unknown) {
            report.shut = Some(Shut::Halted);
        }
        report
    }
}

/// RFC 5322 section 3.6.4: the job's id at the domain of its first attempt's From.
fn message_id(job: &Job, domain: &str) -> String {
    format!("<{}@{domain}>", job.key.id)
}

pub(super) fn expired(job: &Job) -> String {
    job.expires_at.map(parking::expired).unwrap_or_default()
}
