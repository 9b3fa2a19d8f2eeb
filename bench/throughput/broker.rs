//! What the harness asks of RabbitMQ: queues with jobs in them, and their lengths.
//! Guarantee: a job counts as queued when the broker has confirmed it.

use std::collections::VecDeque;

use anyhow::{Context, ensure};
use lapin::options::{
    BasicPublishOptions, ConfirmSelectOptions, ExchangeDeleteOptions, QueueDeclareOptions, QueueDeleteOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Confirmation, Connection, ConnectionProperties, PublisherConfirm};
use sendoff::clock::Clock;

use super::jobs::Job;

/// Publishes on their way at once.
const IN_FLIGHT: usize = 500;

/// A connection of the harness' own.
pub struct Broker {
    connection: Connection,
    channel: Channel,
}

/// Where a job is published.
pub enum Route<'a> {
    /// Straight into a queue.
    Queue(&'a str),
    /// To the worker's exchange, under the job's routing key.
    Exchange(&'a str),
}

impl Broker {
    /// Connects; publishes are confirmed.
    pub async fn connect(url: &str) -> anyhow::Result<Self> {
        let connection = Connection::connect(url, ConnectionProperties::default())
            .await
            .context("connecting to RabbitMQ")?;
        let channel = connection.create_channel().await?;
        channel.confirm_select(ConfirmSelectOptions::default()).await?;
        Ok(Self { connection, channel })
    }

    /// A durable quorum queue, as a peer's worker declares it too.
    pub async fn declare(&self, queue: &str) -> anyhow::Result<()> {
        let mut arguments = FieldTable::default();
        arguments.insert("x-queue-type".into(), AMQPValue::LongString("quorum".into()));
        let durable = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
        self.channel.queue_declare(queue.into(), durable, arguments).await?;
        Ok(())
    }

    /// Messages that wait in a queue; those in a consumer's hands are not among them. It must exist.
    pub async fn length(&self, queue: &str) -> anyhow::Result<u32> {
        let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
        let declared = self.channel.queue_declare(queue.into(), passive, FieldTable::default()).await;
        Ok(declared.with_context(|| format!("asking for the length of {queue}"))?.message_count())
    }

    /// Deletes a queue, whatever is in it.
    pub async fn delete_queue(&self, queue: &str) -> anyhow::Result<()> {
        self.channel.queue_delete(queue.into(), QueueDeleteOptions::default()).await?;
        Ok(())
    }

    /// Deletes an exchange.
    pub async fn delete_exchange(&self, exchange: &str) -> anyhow::Result<()> {
        self.channel.exchange_delete(exchange.into(), ExchangeDeleteOptions::default()).await?;
        Ok(())
    }

    /// Publishes jobs as fast as they are confirmed; says for each when it was given to the broker, in microseconds.
    pub async fn publish(
        &self,
        route: &Route<'_>,
        jobs: impl IntoIterator<Item = Job>,
    ) -> anyhow::Result<Vec<i64>> {
        let clock = Clock::system();
        let mut given = Vec::new();
        let mut confirms = VecDeque::new();
        for job in jobs {
            given.push(micros(&clock));
            confirms.push_back(self.give(route, &job).await?);
            if confirms.len() >= IN_FLIGHT
                && let Some(confirm) = confirms.pop_front()
            {
                confirmed(confirm).await?;
            }
        }
        for confirm in confirms {
            confirmed(confirm).await?;
        }
        Ok(given)
    }

    /// Publishes one and does not wait for its confirm.
    pub async fn give(&self, route: &Route<'_>, job: &Job) -> anyhow::Result<PublisherConfirm> {
        let (exchange, key) = match route {
            Route::Queue(queue) => ("", *queue),
            Route::Exchange(exchange) => (*exchange, job.routing_key),
        };
        let properties =
            BasicProperties::default().with_delivery_mode(2).with_content_type("application/json".into());
        let mandatory = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
        let publish =
            self.channel.basic_publish(exchange.into(), key.into(), mandatory, &job.body, properties);
        publish.await.context("publishing a job")
    }

    /// Closes the connection.
    pub async fn close(self) -> anyhow::Result<()> {
        self.connection.close(200, "done".into()).await?;
        Ok(())
    }
}

/// Waits until the broker has the job, on a queue.
pub async fn confirmed(confirm: PublisherConfirm) -> anyhow::Result<()> {
    let answer = confirm.await.context("waiting for a confirm")?;
    ensure!(matches!(answer, Confirmation::Ack(None)), "the broker did not take a job");
    Ok(())
}

/// Microseconds of the system's clock, which the SMTP server's process reads too.
pub fn micros(clock: &Clock) -> i64 {
    i64::try_from(clock.now().unix_timestamp_nanos() / 1000).unwrap_or(i64::MAX)
}
