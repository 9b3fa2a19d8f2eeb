//! Deliveries: a queue's messages, each settled exactly once, by type.
//! Guarantee: a delivery that is dropped unsettled goes back to its queue and is counted; one that is handed over is
//! acknowledged only after its copy was confirmed.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures_util::StreamExt;
use lapin::options::{BasicCancelOptions, BasicConsumeOptions, BasicNackOptions, BasicQosOptions};
use lapin::types::{FieldTable, ShortString};
use lapin::{Acker, Channel, Consumer};
use tokio::sync::{mpsc, watch};

use super::acks::Acks;
use super::connection::BrokerError;
use super::headers::{DeadLetter, JobHeaders, Received};
use super::held::{Appetite, Held, HeldBytes};
use super::link::{self, LinkReceiver, Live};
use super::names::Names;
use super::publisher::{PublishError, Publisher};
use super::topology;

/// Handing the prefetched messages back when a consumer stops.
const HAND_BACK_LIMIT: Duration = Duration::from_secs(5);
/// The same where they may be a whole prefetch of great bodies that is still on its way.
const GREAT_HAND_BACK_LIMIT: Duration = Duration::from_secs(20);

/// Called with the lane's name (or `dead`) for every delivery that was dropped unsettled.
pub type DropHook = Arc<dyn Fn(&str) + Send + Sync>;

/// Whether consumers are to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Intent {
    Consume,
    Pause,
    Stop,
}

/// Which queue, and how its messages are read.
#[derive(Debug, Clone)]
pub(super) enum Source {
    Lane(String),
    Dead,
}

impl Source {
    fn queue(&self, names: &Names) -> String {
        match self {
            Self::Lane(lane) => names.lane(lane),
            Self::Dead => names.dead(),
        }
    }

    fn label(&self) -> &str {
        match self {
            Self::Lane(lane) => lane,
            Self::Dead => "dead",
        }
    }

    fn read(&self, delivery: &mut lapin::message::Delivery, names: &Names) -> Received {
        match self {
            Self::Lane(lane) => Received::from_lane(delivery, names, lane),
            Self::Dead => Received::from_dead(delivery, names),
        }
    }
}

/// One message in this worker's hands.
#[derive(Debug)]
#[must_use = "dropping a delivery sends it back to its queue"]
pub struct Delivery {
    received: Received,
    unsettled: Option<Unsettled>,
    _held: HeldBytes,
}

struct Unsettled {
    acker: Acker,
    tag: u64,
    session: Arc<Session>,
}

impl std::fmt::Debug for Unsettled {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Unsettled")
    }
}

/// A consumer's channel. It stays open until the last delivery that came over it is settled.
struct Session {
    live: Arc<Live>,
    channel: Channel,
    label: String,
    on_drop: DropHook,
    runtime: tokio::runtime::Handle,
    acks: Arc<Acks>,
}

impl Drop for Session {
    fn drop(&mut self) {
        self.acks.end();
    }
}

/// Whether a settlement reached the broker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Settled {
    /// It was sent, or is about to be: acknowledgements are gathered for a moment.
    Done,
    /// The channel was lost before: the broker has taken the message back and delivers it again.
    ChannelLost,
}

/// A copy could not be published, so the delivery is still open.
#[derive(Debug, thiserror::Error)]
#[error("{error}")]
pub struct NotHandedOver {
    /// To be tried again, or requeued.
    pub delivery: Delivery,
    /// Why.
    #[source]
    pub error: PublishError,
}

impl From<Option<lapin::Result<bool>>> for Settled {
    /// `Ok(false)`: the channel had died before. An error or nothing: it died under the settlement.
    fn from(outcome: Option<lapin::Result<bool>>) -> Self {
        if matches!(outcome, Some(Ok(true))) { Self::Done } else { Self::ChannelLost }
    }
}

impl Delivery {
    /// The message.
    pub fn received(&self) -> &Received {
        &self.received
    }

    /// Whether settling can still have an effect. A lost delivery is not worth starting work on: it comes again.
    pub fn is_open(&self) -> bool {
        self.unsettled.as_ref().is_some_and(|unsettled| unsettled.acker.usable())
    }

    /// Nothing is left to be done with the message.
    pub fn ack(mut self) -> Settled {
        self.settle_by_ack()
    }

    /// Puts the message back into its queue, at its old place as far as possible.
    pub async fn requeue(mut self) -> Settled {
        match self.unsettled.take() {
            Some(unsettled) => requeue(&unsettled).await,
            None => Settled::ChannelLost,
        }
    }

    /// Hands the job over to its lane's delay queue, then acknowledges it.
    ///
    /// # Errors
    /// [`NotHandedOver`] returns the delivery when the copy was not confirmed.
    pub async fn retry(
        mut self,
        publisher: &Publisher,
        lane: &str,
        delay_s: u32,
        headers: JobHeaders,
    ) -> Result<Settled, Box<NotHandedOver>> {
        match publisher.retry(&self.received, lane, delay_s, headers).await {
            Ok(()) => Ok(self.settle_by_ack()),
            Err(error) => Err(Box::new(NotHandedOver { delivery: self, error })),
        }
    }

    /// Hands the job over to the dead letters, then acknowledges it.
    ///
    /// # Errors
    /// [`NotHandedOver`] returns the delivery when the letter was not confirmed.
    pub async fn dead_letter(
        mut self,
        publisher: &Publisher,
        lane: &str,
        headers: JobHeaders,
        death: DeadLetter<'_>,
    ) -> Result<Settled, Box<NotHandedOver>> {
        match publisher.dead_letter(&self.received, lane, headers, death).await {
            Ok(()) => Ok(self.settle_by_ack()),
            Err(error) => Err(Box::new(NotHandedOver { delivery: self, error })),
        }
    }

    fn settle_by_ack(&mut self) -> Settled {
        match self.unsettled.take() {
            Some(Unsettled { acker, tag, session }) if acker.usable() => {
                session.acks.settle(tag);
                Settled::Done
            }
            _ => Settled::ChannelLost,
        }
    }
}

impl Drop for Delivery {
    fn drop(&mut self) {
        let Some(unsettled) = self.unsettled.take() else { return };
        let session = &unsettled.session;
        (session.on_drop)(&session.label);
        let runtime = session.runtime.clone();
        runtime.spawn(async move {
            let _settled = requeue(&unsettled).await;
        });
    }
}

async fn requeue(Unsettled { acker, tag, session }: &Unsettled) -> Settled {
    let requeued = acker.nack(BasicNackOptions { multiple: false, requeue: true });
    let settled = Settled::from(session.live.while_up(requeued).await);
    if settled == Settled::Done {
        session.acks.went_back(*tag);
    }
    settled
}

/// The deliveries of one queue. Losses of the connection show only as a silence.
pub struct Deliveries {
    receiver: mpsc::Receiver<Delivery>,
}

impl Deliveries {
    /// The next delivery; `None` when consuming was stopped.
    pub async fn next(&mut self) -> Option<Delivery> {
        loop {
            let mut delivery = self.receiver.recv().await?;
            if delivery.is_open() {
                return Some(delivery);
            }
            // Lost while it waited here: nobody has seen it, so nothing is to be counted.
            delivery.unsettled = None;
        }
    }
}

/// Feeds the deliveries of one queue for as long as they are wanted.
pub(super) struct Feed {
    pub source: Source,
    pub prefetch: u16,
    pub names: Names,
    pub link: LinkReceiver,
    pub intent: watch::Receiver<Intent>,
    pub consuming: Arc<Consuming>,
    /// Entered while acknowledgements wait to be sent.
    pub unsent: Arc<Consuming>,
    pub on_drop: DropHook,
    pub held: Held,
}

/// How many consumers run at the moment.
#[derive(Default)]
pub(super) struct Consuming {
    count: AtomicUsize,
    changed: tokio::sync::Notify,
}

impl Consuming {
    pub fn enter(self: &Arc<Self>) -> ConsumingGuard {
        self.count.fetch_add(1, Ordering::SeqCst);
        ConsumingGuard(self.clone())
    }

    /// Returns when no consumer runs.
    pub async fn none(&self) {
        loop {
            let changed = self.changed.notified();
            let mut changed = std::pin::pin!(changed);
            changed.as_mut().enable();
            if self.count.load(Ordering::SeqCst) == 0 {
                return;
            }
            changed.await;
        }
    }
}

pub(super) struct ConsumingGuard(Arc<Consuming>);

impl Drop for ConsumingGuard {
    fn drop(&mut self) {
        self.0.count.fetch_sub(1, Ordering::SeqCst);
        self.0.changed.notify_waiters();
    }
}

/// How a consumer has ended.
enum Ended {
    /// By itself, or because consuming pauses.
    Lost,
    /// It is to go on with another prefetch.
    ToBeginAnew,
    /// Nobody takes its deliveries any more.
    Unwanted,
}

impl Feed {
    /// Starts the feed.
    pub fn spawn(self) -> Deliveries {
        // Room for one: the rest waits with the library, from where it can be handed back.
        let (sender, receiver) = mpsc::channel(1);
        tokio::spawn(self.run(sender));
        Deliveries { receiver }
    }

    async fn run(mut self, out: mpsc::Sender<Delivery>) {
        let mut pauses = link::pauses();
        let mut appetite = Appetite::new(self.prefetch);
        loop {
            if !wait_for_consume(&mut self.intent).await {
                return;
            }
            let mut intent = self.intent.clone();
            let live = tokio::select! {
                _ = intent.wait_for(|intent| *intent != Intent::Consume) => continue,
                live = async { self.held.room().await; link::up(&mut self.link).await } => {
                    match live { Some(live) => live, None => return }
                }
            };
            let _consuming = self.consuming.enter();
            match self.start(live.clone(), appetite.prefetch()).await {
                Ok((session, consumer)) => {
                    pauses = link::pauses();
                    match self.pump(session, consumer, &out, &mut appetite).await {
                        Ended::Lost => {}
                        Ended::ToBeginAnew => continue,
                        Ended::Unwanted => return,
                    }
                }
                Err(error) => self.complain(&live, &error).await,
            }
            if *self.intent.borrow() == Intent::Consume {
                let pause = pauses.next().unwrap_or(HAND_BACK_LIMIT);
                // Woken early by whoever pauses or stops: the loop looks again either way.
                let _woken = tokio::time::timeout(pause, self.intent.changed()).await;
            }
        }
    }

    async fn start(&self, live: Arc<Live>, prefetch: u16) -> Result<(Arc<Session>, Consumer), BrokerError> {
        let queue = self.source.queue(&self.names);
        let (channel, consumer) = consume(&live, &queue, prefetch).await?;
        let acks = Acks::new(prefetch, self.unsent.clone());
        tokio::spawn(acks.clone().send(live.clone(), channel.clone()));
        let session = Session {
            live,
            channel,
            label: self.source.label().to_owned(),
            on_drop: self.on_drop.clone(),
            runtime: tokio::runtime::Handle::current(),
            acks,
        };
        Ok((Arc::new(session), consumer))
    }

    /// A queue that somebody deleted under a running worker is declared again.
    async fn complain(&self, live: &Live, error: &BrokerError) {
        if !live.is_up() {
            return;
        }
        tracing::warn!(lane = self.source.label(), %error, "cannot consume; declaring the topology again");
        if let Err(error) = live.declare().await {
            tracing::warn!(%error, "cannot declare the topology");
        }
    }

    /// Passes deliveries on until the consumer ends, is no longer wanted, or has another prefetch than their bodies allow.
    async fn pump(
        &mut self,
        session: Arc<Session>,
        mut consumer: Consumer,
        out: &mpsc::Sender<Delivery>,
        appetite: &mut Appetite,
    ) -> Ended {
        loop {
            let room = tokio::select! {
                biased;
                () = unwanted(&mut self.intent) => {
                    hand_back(&session, consumer, HAND_BACK_LIMIT).await;
                    return Ended::Lost;
                }
                room = out.reserve() => room,
            };
            let Ok(room) = room else {
                hand_back(&session, consumer, HAND_BACK_LIMIT).await;
                return Ended::Unwanted;
            };
            let next = tokio::select! {
                biased;
                () = unwanted(&mut self.intent) => {
                    hand_back(&session, consumer, HAND_BACK_LIMIT).await;
                    return Ended::Lost;
                }
                () = out.closed() => {
                    hand_back(&session, consumer, HAND_BACK_LIMIT).await;
                    return Ended::Unwanted;
                }
                next = session.live.while_up(consumer.next()) => next.flatten(),
            };
            match next {
                Some(Ok(mut delivery)) if delivery.acker.usable() => {
                    let received = self.source.read(&mut delivery, &self.names);
                    let (acker, tag) = (delivery.acker, delivery.delivery_tag);
                    session.acks.delivered(tag);
                    let unsettled = Unsettled { acker, tag, session: session.clone() };
                    let held = self.held.take(received.body.len());
                    let is_to_begin_anew = appetite.is_wrong_after(received.body.len(), &self.held);
                    room.send(Delivery { received, unsettled: Some(unsettled), _held: held });
                    if is_to_begin_anew {
                        // What else is on its way goes back as soon as it is read.
                        hand_back(&session, consumer, GREAT_HAND_BACK_LIMIT).await;
                        return Ended::ToBeginAnew;
                    }
                }
                Some(Ok(_lost)) => {}
                Some(Err(_)) | None => return Ended::Lost,
            }
        }
    }
}

/// Consumes a queue over a channel of its own, every message to be acknowledged.
pub(super) async fn consume(
    live: &Live,
    queue: &str,
    prefetch: u16,
) -> Result<(Channel, Consumer), BrokerError> {
    let name = topology::name(queue)?;
    let work = async {
        let channel = live.connection.create_channel().await?;
        channel.basic_qos(prefetch, BasicQosOptions::default()).await?;
        let options = BasicConsumeOptions::default();
        let (tag, arguments) = (ShortString::default(), FieldTable::default());
        let consumer = channel.basic_consume(name, tag, options, arguments).await?;
        Ok((channel, consumer))
    };
    match live.while_up(work).await {
        Some(consuming) => {
            consuming.map_err(|error| BrokerError::about(&format!("the queue {queue}"), &error))
        }
        None => Err(BrokerError::Lost { detail: "before consuming began".to_owned() }),
    }
}

/// False when consuming has been stopped for good.
pub(super) async fn wait_for_consume(intent: &mut watch::Receiver<Intent>) -> bool {
    let known = intent.wait_for(|intent| *intent != Intent::Pause).await;
    known.is_ok_and(|intent| *intent == Intent::Consume)
}

/// Returns when consuming is to pause or to stop.
pub(super) async fn unwanted(intent: &mut watch::Receiver<Intent>) {
    // An error means that nobody is left to want anything.
    let _changed = intent.wait_for(|intent| *intent != Intent::Consume).await;
}

/// Cancels a consumer and sends back what it had prefetched and nobody has seen.
async fn hand_back(session: &Session, mut consumer: Consumer, limit: Duration) {
    let work = async {
        let tag = consumer.tag();
        if session.channel.basic_cancel(tag, BasicCancelOptions::default()).await.is_err() {
            return;
        }
        // After the broker's cancel-ok nothing more comes in, and the stream ends behind what is there. Every tag here is higher
        // than those that were passed on, so no frame with `multiple` covers it.
        let options = BasicNackOptions { multiple: false, requeue: true };
        while let Some(Ok(delivery)) = consumer.next().await {
            let _requeued = session.live.while_up(delivery.acker.nack(options)).await;
        }
    };
    if tokio::time::timeout(limit, work).await.is_err() {
        tracing::warn!(lane = session.label, "prefetched messages go back only when their channel closes");
    }
}
