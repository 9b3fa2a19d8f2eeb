//! Confirmed publishes: retries, dead letters, events, replies.
//! Guarantee: `Ok` means that the broker has taken the message and, where it is mandatory, that a queue has it.
//! [`PublishError::is_certain`] tells when a message is surely nowhere.

use std::future::poll_fn;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use lapin::options::BasicPublishOptions;
use lapin::protocol::{AMQPErrorKind, AMQPSoftError};
use lapin::{BasicProperties, Channel, Confirmation, ErrorKind};
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::Instant;

use super::connection::BrokerError;
use super::headers::{self, DeadLetter, JobHeaders, Received};
use super::link::{self, LinkReceiver, Live};
use super::names::Names;
use super::topology;
use crate::model::event::Event;
use crate::model::text;

/// Mandatory publishes at once, each on a channel of its own. A returned message comes with no sign of which publish it
/// belongs to: only a channel with a single message on its way tells for certain.
const CHANNELS: usize = 64;
/// Events on their way at once, over one channel: none of them can be returned, and confirms name the publish.
const EVENTS_IN_FLIGHT: usize = 1024;
/// Unless the caller asks for another: how long a publish waits for the connection and for its confirm.
const PATIENCE: Duration = Duration::from_secs(30);
/// How often a connection that the broker has blocked is looked at.
const BLOCKED_LOOK: Duration = Duration::from_millis(50);

/// Publishes over a connection that comes and goes; cheap to clone.
#[derive(Clone)]
pub struct Publisher {
    shared: Arc<Shared>,
    patience: Duration,
}

struct Shared {
    names: Names,
    link: LinkReceiver,
    permits: Semaphore,
    event_permits: Semaphore,
    /// The events' channel.
    pipeline: tokio::sync::Mutex<Option<Pipeline>>,
    idle: Mutex<Idle>,
}

/// A channel for many publishes at once.
#[derive(Clone)]
struct Pipeline {
    live: Arc<Live>,
    channel: Channel,
    /// The library numbers a publish and queues its frames in two steps, which must not mix with another's.
    queueing: Arc<Mutex<()>>,
}

impl Pipeline {
    fn is_open(&self) -> bool {
        self.channel.status().connected() && self.live.is_up()
    }

    async fn send(&self, message: &Outgoing<'_>) -> Result<(), PublishError> {
        let mut sending = std::pin::pin!(send(&self.channel, message));
        poll_fn(|cx| {
            let _alone = self.queueing.lock().expect("nothing panics while the lock is held");
            sending.as_mut().poll(cx)
        })
        .await
    }
}

/// Channels with nothing on their way, all of one connection.
#[derive(Default)]
struct Idle {
    of: Option<Arc<Live>>,
    channels: Vec<Channel>,
}

/// Why a message may not be on the broker.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PublishError {
    /// No queue takes it, or the exchange does not exist.
    #[error("no queue takes what is published to {target}: {detail}")]
    Unroutable {
        /// Exchange, or queue where the default exchange is used.
        target: String,
        /// The broker's words.
        detail: String,
    },
    /// The broker will not have it.
    #[error("the broker refused a message to {target}: {detail}")]
    Refused {
        /// Exchange, or queue where the default exchange is used.
        target: String,
        /// The broker's words.
        detail: String,
    },
    /// There was no connection for as long as the caller wanted to wait; nothing was sent.
    #[error("no connection to RabbitMQ to publish over within {waited_ms} ms")]
    Unavailable {
        /// How long it waited.
        waited_ms: u64,
    },
    /// It was sent, or may have been, and no confirm came: it may or may not be there.
    #[error("no confirm of a message to {target}: {detail}")]
    Lost {
        /// Exchange, or queue where the default exchange is used.
        target: String,
        /// What is known.
        detail: String,
    },
}

impl PublishError {
    /// Whether the message is surely on no queue.
    pub fn is_certain(&self) -> bool {
        !matches!(self, Self::Lost { .. })
    }
}

/// What to do when no queue takes a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unrouted {
    /// It is an error.
    Fails,
    /// It is fine: nobody listens.
    IsFine,
}

/// One message on its way out.
pub(super) struct Outgoing<'a> {
    pub exchange: &'a str,
    pub routing_key: &'a str,
    pub body: &'a [u8],
    pub properties: BasicProperties,
    pub unrouted: Unrouted,
}

impl Outgoing<'_> {
    fn target(&self) -> String {
        let target = if self.exchange.is_empty() { self.routing_key } else { self.exchange };
        text::bounded(&text::single_line(target), 255)
    }
}

impl Publisher {
    pub(super) fn new(names: Names, link: LinkReceiver) -> Self {
        let shared = Shared {
            names,
            link,
            permits: Semaphore::new(CHANNELS),
            event_permits: Semaphore::new(EVENTS_IN_FLIGHT),
            pipeline: tokio::sync::Mutex::default(),
            idle: Mutex::default(),
        };
        Self { shared: Arc::new(shared), patience: PATIENCE }
    }

    /// The same publisher with another patience: how long a publish may take in all, outages included.
    #[must_use]
    pub fn with_patience(&self, patience: Duration) -> Self {
        Self { shared: self.shared.clone(), patience }
    }

    /// Puts a copy of a job into its lane's delay queue of `delay_s` seconds, which must be one of the topology's.
    ///
    /// # Errors
    /// [`PublishError`]; the job's delivery is not to be acknowledged then.
    pub async fn retry(
        &self,
        job: &Received,
        lane: &str,
        delay_s: u32,
        headers: JobHeaders,
    ) -> Result<(), PublishError> {
        let queue = self.shared.names.retry(lane, delay_s);
        self.copy("", &queue, job, headers::job_headers(lane, &job.routing_key, &headers)).await
    }

    /// Puts a copy of a job into its lane at once.
    ///
    /// # Errors
    /// [`PublishError`]
    pub async fn release(&self, job: &Received, lane: &str, headers: JobHeaders) -> Result<(), PublishError> {
        let exchange = self.shared.names.lane(lane);
        let ours = headers::job_headers(lane, &job.routing_key, &headers);
        self.copy(&exchange, &job.routing_key, job, ours).await
    }

    /// Makes a dead letter of a job. `detail` becomes one line of at most 500 bytes.
    ///
    /// # Errors
    /// [`PublishError`]; the job's delivery is not to be acknowledged then.
    pub async fn dead_letter(
        &self,
        job: &Received,
        lane: &str,
        headers: JobHeaders,
        death: DeadLetter<'_>,
    ) -> Result<(), PublishError> {
        let mut ours = headers::job_headers(lane, &job.routing_key, &headers);
        ours.extend(headers::death_headers(&death));
        self.copy(&self.shared.names.dead(), &job.routing_key, job, ours).await
    }

    /// Declares the topology again: for what somebody deleted under a running worker.
    ///
    /// # Errors
    /// When it cannot be declared; nothing is tried while there is no connection.
    pub async fn declare(&self) -> Result<(), BrokerError> {
        let live = self.shared.link.borrow().clone();
        match live {
            Some(live) => live.declare().await,
            None => Ok(()),
        }
    }

    /// Announces an event under its type. Nobody has to listen.
    ///
    /// # Errors
    /// [`PublishError`]
    pub async fn event(&self, event: &Event) -> Result<(), PublishError> {
        let target = self.shared.names.events();
        let body = serde_json::to_vec(event)
            .map_err(|error| PublishError::Refused { target: target.clone(), detail: error.to_string() })?;
        let deadline = Instant::now() + self.patience;
        let _share = permit(&self.shared.event_permits, deadline, self.patience).await?;
        let message = Outgoing {
            exchange: &target,
            routing_key: event.what.routing_key(),
            body: &body,
            properties: headers::persistent().with_content_type("application/json".into()),
            unrouted: Unrouted::IsFine,
        };
        let pipeline = self.pipeline(deadline).await?;
        let confirmed = pipeline.live.confirmed(deadline, &message, pipeline.send(&message)).await;
        if let Err(error) = confirmed {
            // What was on it may have been taken all the same: it is announced again.
            self.shared.replace(&pipeline);
            return Err(error);
        }
        Ok(())
    }

    async fn pipeline(&self, deadline: Instant) -> Result<Pipeline, PublishError> {
        let locking = tokio::time::timeout_at(deadline, self.shared.pipeline.lock());
        let mut pipeline = locking.await.map_err(|_| self.unavailable())?;
        if let Some(open) = pipeline.as_ref().filter(|pipeline| pipeline.is_open()) {
            let unblocked = tokio::time::timeout_at(deadline, open.live.unblocked());
            return unblocked.await.map(|()| open.clone()).map_err(|_| self.unavailable());
        }
        let (live, channel) = self.channel(deadline).await?;
        let opened = Pipeline { live, channel, queueing: Arc::default() };
        *pipeline = Some(opened.clone());
        Ok(opened)
    }

    /// Answers a command. Not persistent: a reply is worth nothing to a sender that is gone. Not mandatory: to the broker
    /// a direct reply-to is no queue, and it would return a reply that it has delivered.
    pub(super) async fn reply(
        &self,
        reply_to: &str,
        correlation_id: Option<&str>,
        body: &[u8],
    ) -> Result<(), PublishError> {
        let mut properties = BasicProperties::default().with_content_type("application/json".into());
        if let Some(id) = correlation_id.and_then(topology::short) {
            properties = properties.with_correlation_id(id);
        }
        let unrouted = Unrouted::IsFine;
        self.publish(Outgoing { exchange: "", routing_key: reply_to, body, properties, unrouted }).await
    }

    async fn copy(
        &self,
        exchange: &str,
        routing_key: &str,
        job: &Received,
        ours: Vec<(&'static str, lapin::types::AMQPValue)>,
    ) -> Result<(), PublishError> {
        let properties = job.carried.to_properties(ours);
        let unrouted = Unrouted::Fails;
        self.publish(Outgoing { exchange, routing_key, body: &job.body, properties, unrouted }).await
    }

    pub(super) async fn publish(&self, message: Outgoing<'_>) -> Result<(), PublishError> {
        let deadline = Instant::now() + self.patience;
        let _permit = permit(&self.shared.permits, deadline, self.patience).await?;
        let (live, channel) = self.channel(deadline).await?;
        let outcome = live.confirmed(deadline, &message, send(&channel, &message)).await;
        // A channel is used again only when nothing of it is on its way: dropped, it closes itself.
        if matches!(outcome, Ok(()) | Err(PublishError::Unroutable { .. })) && channel.status().connected() {
            self.shared.keep(&live, channel);
        }
        outcome
    }

    async fn channel(&self, deadline: Instant) -> Result<(Arc<Live>, Channel), PublishError> {
        let unavailable = |_| self.unavailable();
        let mut link = self.shared.link.clone();
        let mut pauses = link::pauses();
        loop {
            let live = tokio::time::timeout_at(deadline, link::up(&mut link)).await.map_err(unavailable)?;
            let live = live.ok_or_else(|| self.unavailable())?;
            tokio::time::timeout_at(deadline, live.unblocked()).await.map_err(unavailable)?;
            if let Some(channel) = self.shared.reuse(&live) {
                return Ok((live, channel));
            }
            let opening = live.while_up(topology::open_confirming_channel(&live.connection));
            match tokio::time::timeout_at(deadline, opening).await.map_err(unavailable)? {
                Some(Ok(channel)) => return Ok((live, channel)),
                // The connection is on its way out, or has no channel left: nothing was sent, so it may be tried again.
                Some(Err(_)) | None => {
                    let pause = pauses.next().unwrap_or(PATIENCE);
                    tokio::time::timeout_at(deadline, tokio::time::sleep(pause))
                        .await
                        .map_err(unavailable)?;
                }
            }
        }
    }

    fn unavailable(&self) -> PublishError {
        PublishError::Unavailable { waited_ms: u64::try_from(self.patience.as_millis()).unwrap_or(u64::MAX) }
    }
}

impl Live {
    /// Returns when the broker takes publishes, or the connection is lost.
    async fn unblocked(&self) {
        while self.connection.status().blocked() && self.is_up() {
            tokio::time::sleep(BLOCKED_LOOK).await;
        }
    }

    /// Awaits a publish's confirm.
    async fn confirmed(
        &self,
        deadline: Instant,
        message: &Outgoing<'_>,
        publish: impl Future<Output = Result<(), PublishError>>,
    ) -> Result<(), PublishError> {
        let lost = |detail: &str| PublishError::Lost { target: message.target(), detail: detail.to_owned() };
        match tokio::time::timeout_at(deadline, self.while_up(publish)).await {
            Ok(Some(outcome)) => outcome,
            Ok(None) => Err(lost("the connection was lost")),
            Err(_) => Err(lost("none came in time")),
        }
    }
}

impl Shared {
    /// Has the next event open a channel of its own, unless another has done so.
    fn replace(&self, failed: &Pipeline) {
        // Whoever holds the lock is about to look at the channel.
        if let Ok(mut pipeline) = self.pipeline.try_lock()
            && pipeline.as_ref().is_some_and(|now| Arc::ptr_eq(&now.queueing, &failed.queueing))
        {
            *pipeline = None;
        }
    }

    fn reuse(&self, live: &Arc<Live>) -> Option<Channel> {
        let mut idle = self.idle.lock().expect("nothing panics while the lock is held");
        if !idle.of.as_ref().is_some_and(|of| Arc::ptr_eq(of, live)) {
            *idle = Idle { of: Some(live.clone()), channels: Vec::new() };
        }
        while let Some(channel) = idle.channels.pop() {
            if channel.status().connected() {
                return Some(channel);
            }
        }
        None
    }

    fn keep(&self, live: &Arc<Live>, channel: Channel) {
        let mut idle = self.idle.lock().expect("nothing panics while the lock is held");
        if idle.of.as_ref().is_some_and(|of| Arc::ptr_eq(of, live)) {
            idle.channels.push(channel);
        }
    }
}

async fn permit(
    permits: &Semaphore,
    deadline: Instant,
    patience: Duration,
) -> Result<SemaphorePermit<'_>, PublishError> {
    let waited_ms = u64::try_from(patience.as_millis()).unwrap_or(u64::MAX);
    match tokio::time::timeout_at(deadline, permits.acquire()).await {
        Ok(Ok(permit)) => Ok(permit),
        Ok(Err(_)) | Err(_) => Err(PublishError::Unavailable { waited_ms }),
    }
}

/// Publishes on a channel in confirm mode that has nothing else on its way.
pub(super) async fn send(channel: &Channel, message: &Outgoing<'_>) -> Result<(), PublishError> {
    let target = message.target();
    let (Some(exchange), Some(routing_key)) =
        (topology::short(message.exchange), topology::short(message.routing_key))
    else {
        let detail = "a name is longer than 255 bytes".to_owned();
        return Err(PublishError::Refused { target, detail });
    };
    let mandatory = message.unrouted == Unrouted::Fails;
    let options = BasicPublishOptions { mandatory, immediate: false };
    let properties = message.properties.clone();
    let published = channel.basic_publish(exchange, routing_key, options, message.body, properties).await;
    let confirmation = match published {
        Ok(confirm) => confirm.await,
        Err(error) => Err(error),
    };
    match confirmation {
        Ok(Confirmation::Ack(None)) => Ok(()),
        Ok(Confirmation::Ack(Some(returned))) => {
            let detail =
                format!("{} {}", returned.reply_code, text::single_line(returned.reply_text.as_str()));
            Err(PublishError::Unroutable { target, detail })
        }
        Ok(Confirmation::Nack(_)) => {
            let detail = "a queue could not take it (full, or without a majority of its nodes)".to_owned();
            Err(PublishError::Refused { target, detail })
        }
        Ok(Confirmation::NotRequested) => {
            Err(PublishError::Lost { target, detail: "the channel does not confirm".to_owned() })
        }
        Err(error) => Err(of_channel(target, &error)),
    }
}

/// What the end of a channel says about the one message on it.
fn of_channel(target: String, error: &lapin::Error) -> PublishError {
    let detail = text::bounded(&text::single_line(&error.to_string()), 300);
    match error.kind() {
        ErrorKind::ProtocolError(protocol) => match protocol.kind() {
            AMQPErrorKind::Soft(AMQPSoftError::NOTFOUND) => PublishError::Unroutable { target, detail },
            AMQPErrorKind::Soft(_) => PublishError::Refused { target, detail },
            AMQPErrorKind::Hard(_) => PublishError::Lost { target, detail },
        },
        _ => PublishError::Lost { target, detail },
    }
}
