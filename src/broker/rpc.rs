//! The command line's side of the broker: one command and its reply, one job and its outcome.
//! Guarantee: nothing is declared here, and every wait has an end.

use std::time::Duration;

use futures_util::StreamExt;
use lapin::options::{BasicConsumeOptions, QueueBindOptions, QueueDeclareOptions};
use lapin::types::{FieldTable, ShortString};
use lapin::{Channel, Connection, Consumer};
use time::OffsetDateTime;
use tokio::time::Instant;
use uuid::Uuid;

use super::connection::{self, Access, BrokerError};
use super::headers;
use super::names::Names;
use super::publisher::{self, Outgoing, PublishError, Unrouted};
use super::topology;

/// RabbitMQ's pseudo-queue: replies reach this channel without a queue being declared.
const DIRECT_REPLY_TO: &str = "amq.rabbitmq.reply-to";
/// AMQP 0-9-1's delivery mode for what need not outlive the broker: a command may carry a password, and is not to be written
/// to the broker's disk for the sake of a caller who waits for seconds.
const TRANSIENT: u8 = 1;
/// Beyond a command's own deadline: opening channels, and the look at who takes commands.
const SLACK: Duration = Duration::from_secs(5);
/// For a job to be confirmed.
const CONFIRM_LIMIT: Duration = Duration::from_secs(30);

/// Why a command got no reply, or a job was not published.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RpcError {
    /// The connection, or something on the broker.
    #[error(transparent)]
    Broker(#[from] BrokerError),
    /// The message is not on the broker, or not for certain.
    #[error(transparent)]
    Publish(#[from] PublishError),
    /// Nobody has answered.
    #[error("no reply within {seconds} s: is a worker running? ({consumers} of them take commands now)")]
    Timeout {
        /// How long it waited.
        seconds: u64,
        /// Workers that consume commands.
        consumers: u32,
    },
}

/// Sends a command, the JSON of contract section 4, and returns the reply's JSON. The command is transient, and
/// expires with the wait, counted from `now`.
///
/// # Errors
/// [`RpcError`]; after a `Timeout` the command may have been carried out all the same.
pub async fn call(
    access: &Access,
    prefix: &str,
    command: &[u8],
    now: OffsetDateTime,
    timeout: Duration,
) -> Result<Vec<u8>, RpcError> {
    let connection = connection::open(access, "command").await?;
    let queue = Names::new(prefix).control();
    let calling = call_on(&connection, access, &queue, (command, now), timeout);
    let reply = connection::within(timeout + SLACK, calling).await;
    connection::close(&connection).await;
    reply
}

async fn call_on(
    connection: &Connection,
    access: &Access,
    queue: &str,
    (command, now): (&[u8], OffsetDateTime),
    timeout: Duration,
) -> Result<Vec<u8>, RpcError> {
    let deadline = Instant::now() + timeout;
    let channel = confirming_channel(connection).await?;
    let options = BasicConsumeOptions { no_ack: true, ..Default::default() };
    let consuming =
        channel.basic_consume(DIRECT_REPLY_TO.into(), ShortString::default(), options, FieldTable::default());
    let mut replies = consuming.await.map_err(|error| BrokerError::about("the queue for replies", &error))?;

    let mut properties = lapin::BasicProperties::default()
        .with_content_type("application/json".into())
        .with_delivery_mode(TRANSIENT)
        .with_reply_to(DIRECT_REPLY_TO.into())
        .with_correlation_id("1".into())
        .with_timestamp(u64::try_from(now.unix_timestamp()).unwrap_or(0))
        .with_expiration(timeout.as_millis().to_string().into());
    // Stated, so that the broker vouches for it to workers with `control.allowed_users`.
    if let Some(user) = access.url().user().and_then(topology::short) {
        properties = properties.with_user_id(user);
    }
    let message =
        Outgoing { exchange: "", routing_key: queue, body: command, properties, unrouted: Unrouted::Fails };
    match tokio::time::timeout_at(deadline, publisher::send(&channel, &message)).await {
        Ok(Err(PublishError::Unroutable { .. })) => {
            return Err(BrokerError::Missing { object: format!("the queue {queue}") }.into());
        }
        Ok(sent) => sent?,
        Err(_) => return Err(timed_out(connection, queue, timeout).await),
    }
    match tokio::time::timeout_at(deadline, replies.next()).await {
        Ok(Some(Ok(reply))) => Ok(reply.data),
        Ok(Some(Err(error))) => Err(BrokerError::about("the queue for replies", &error).into()),
        Ok(None) => Err(BrokerError::Lost { detail: "the connection was closed".to_owned() }.into()),
        Err(_) => Err(timed_out(connection, queue, timeout).await),
    }
}

async fn timed_out(connection: &Connection, queue: &str, timeout: Duration) -> RpcError {
    let name = topology::short(queue).unwrap_or_default();
    let look = async {
        let channel = connection.create_channel().await?;
        let options = QueueDeclareOptions { passive: true, ..Default::default() };
        channel.queue_declare(name, options, FieldTable::default()).await
    };
    let found = tokio::time::timeout(Duration::from_secs(2), look).await;
    let consumers = found.ok().and_then(Result::ok).map_or(0, |queue| queue.consumer_count());
    RpcError::Timeout { seconds: timeout.as_secs(), consumers }
}

async fn confirming_channel(connection: &Connection) -> Result<Channel, BrokerError> {
    topology::open_confirming_channel(connection)
        .await
        .map_err(|error| BrokerError::about("a channel", &error))
}

/// Publishes jobs as any publisher would, and follows them.
pub struct JobSender {
    connection: Connection,
    names: Names,
}

impl JobSender {
    /// Connects.
    ///
    /// # Errors
    /// [`BrokerError`]
    pub async fn connect(access: &Access, prefix: &str) -> Result<Self, BrokerError> {
        let connection = connection::open(access, "job send").await?;
        Ok(Self { connection, names: Names::new(prefix) })
    }

    /// Publishes a job's JSON under a routing key, say `notification.manual`, and returns when the broker has it.
    /// A key that no lane takes makes a dead letter, not an error: publishers cannot tell.
    ///
    /// # Errors
    /// [`RpcError`]
    pub async fn publish(
        &self,
        routing_key: &str,
        id: Uuid,
        now: OffsetDateTime,
        body: &[u8],
    ) -> Result<(), RpcError> {
        let exchange = self.names.jobs();
        let properties = headers::persistent()
            .with_content_type("application/json".into())
            .with_message_id(id.to_string().into())
            .with_timestamp(u64::try_from(now.unix_timestamp()).unwrap_or(0));
        let channel = connection::within(SLACK, confirming_channel(&self.connection)).await?;
        let unrouted = Unrouted::Fails;
        let message = Outgoing { exchange: &exchange, routing_key, body, properties, unrouted };
        match tokio::time::timeout(CONFIRM_LIMIT, publisher::send(&channel, &message)).await {
            Ok(Err(PublishError::Unroutable { .. })) => {
                Err(BrokerError::Missing { object: format!("the exchange {exchange}") }.into())
            }
            Ok(sent) => Ok(sent?),
            Err(_) => {
                let detail = format!("none came within {} s", CONFIRM_LIMIT.as_secs());
                Err(PublishError::Lost { target: exchange, detail }.into())
            }
        }
    }

    /// Listens for what becomes of a job; to be called before it is published, or its outcome may go by.
    ///
    /// # Errors
    /// [`BrokerError`]
    pub async fn follow(&self, id: Uuid) -> Result<Follower, BrokerError> {
        connection::within(SLACK, self.listen(id)).await
    }

    async fn listen(&self, id: Uuid) -> Result<Follower, BrokerError> {
        let exchange = self.names.events();
        let source = topology::name(&exchange)?;
        let on = |error: lapin::Error| BrokerError::about(&format!("the exchange {exchange}"), &error);
        let channel = self.connection.create_channel().await.map_err(on)?;
        // Named by the broker, for this connection alone, and gone with it.
        let options = QueueDeclareOptions { exclusive: true, auto_delete: true, ..Default::default() };
        let queue = channel
            .queue_declare(ShortString::default(), options, FieldTable::default())
            .await
            .map_err(on)?;
        channel
            .queue_bind(
                queue.name().clone(),
                source,
                "email.#".into(),
                QueueBindOptions::default(),
                FieldTable::default(),
            )
            .await
            .map_err(on)?;
        let options = BasicConsumeOptions { no_ack: true, exclusive: true, ..Default::default() };
        let consuming = channel.basic_consume(
            queue.name().clone(),
            ShortString::default(),
            options,
            FieldTable::default(),
        );
        Ok(Follower { consumer: consuming.await.map_err(on)?, _channel: channel, id: id.to_string() })
    }

    /// Closes the connection.
    pub async fn close(self) {
        connection::close(&self.connection).await;
    }
}

/// The events of one job.
pub struct Follower {
    consumer: Consumer,
    _channel: Channel,
    id: String,
}

/// One event of a followed job.
#[derive(Debug, Clone, PartialEq)]
pub struct Followed {
    /// The event's JSON (contract section 5).
    pub event: serde_json::Value,
    /// Whether it ends the job's story, as far as events go: sent, dead or expired.
    pub is_outcome: bool,
}

impl Follower {
    /// The job's next event.
    ///
    /// # Errors
    /// [`BrokerError`] when the connection was lost.
    pub async fn next(&mut self) -> Result<Followed, BrokerError> {
        loop {
            let delivery = match self.consumer.next().await {
                Some(Ok(delivery)) => delivery,
                Some(Err(error)) => return Err(BrokerError::about("the queue for events", &error)),
                None => {
                    return Err(BrokerError::Lost { detail: "the connection was closed".to_owned() });
                }
            };
            // What is no JSON was not published by a worker.
            let Ok(event) = serde_json::from_slice::<serde_json::Value>(&delivery.data) else { continue };
            if event["job_id"].as_str() == Some(&self.id) {
                let is_outcome =
                    matches!(event["type"].as_str(), Some("email.sent" | "email.dead" | "email.expired"));
                return Ok(Followed { event, is_outcome });
            }
        }
    }
}
