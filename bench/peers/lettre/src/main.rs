//! The email worker that one would write in Rust in an afternoon: jobs from a quorum queue through lapin, a task each, sent
//! through lettre's pooled transport, acknowledged once the server has accepted them.
//! Guarantee: a job is acknowledged only after its message was accepted; one that failed goes back to the queue.

use std::env;
use std::sync::Arc;

use anyhow::Context;
use futures_util::StreamExt;
use lapin::message::Delivery;
use lapin::options::{
    BasicAckOptions, BasicConsumeOptions, BasicNackOptions, BasicQosOptions, QueueDeclareOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Connection, ConnectionProperties};
use lettre::message::header::ContentType;
use lettre::message::{Attachment, Mailbox, MultiPart, SinglePart};
use lettre::transport::smtp::PoolConfig;
use lettre::transport::smtp::authentication::Credentials;
use lettre::{AsyncSmtpTransport, AsyncTransport, Message, Tokio1Executor};
use serde::Deserialize;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Semaphore;

const FROM: &str = "Acme Bookings <bookings@acme.example>";

type Transport = AsyncSmtpTransport<Tokio1Executor>;

#[derive(Deserialize)]
struct Job {
    to: Vec<String>,
    subject: String,
    text: String,
    html: String,
    calendar: Option<Calendar>,
}

#[derive(Deserialize)]
struct Calendar {
    method: String,
    content: String,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let connections: u32 = variable("CONNECTIONS")?.parse()?;
    let transport = Transport::builder_dangerous(variable("SMTP_HOST")?)
        .port(variable("SMTP_PORT")?.parse()?)
        .credentials(Credentials::new(variable("SMTP_USERNAME")?, variable("SMTP_PASSWORD")?))
        .pool_config(PoolConfig::new().max_size(connections))
        .build();

    let connection = Connection::connect(&variable("AMQP_URL")?, ConnectionProperties::default()).await?;
    let channel = connection.create_channel().await?;
    let queue = variable("QUEUE")?;
    let mut arguments = FieldTable::default();
    arguments.insert("x-queue-type".into(), AMQPValue::LongString("quorum".into()));
    let durable = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
    channel.queue_declare(queue.as_str().into(), durable, arguments).await?;
    channel.basic_qos(variable("PREFETCH")?.parse()?, BasicQosOptions::default()).await?;
    let mut deliveries = channel
        .basic_consume(
            queue.as_str().into(),
            "worker".into(),
            BasicConsumeOptions::default(),
            FieldTable::default(),
        )
        .await?;

    // The pool bounds how many idle connections it keeps, not how many are open.
    let room = Arc::new(Semaphore::new(usize::try_from(connections)?));
    let mut terminate = signal(SignalKind::terminate())?;
    loop {
        let delivery = tokio::select! {
            delivery = deliveries.next() => delivery.context("the broker has ended the consumer")??,
            _ = terminate.recv() => break,
        };
        let (transport, permit) = (transport.clone(), room.clone().acquire_owned().await?);
        tokio::spawn(async move {
            if let Err(error) = handle(&transport, &delivery).await {
                eprintln!("{error:#}");
                // The broker takes back what is not settled anyway.
                let _ =
                    delivery.nack(BasicNackOptions { requeue: true, ..BasicNackOptions::default() }).await;
            }
            drop(permit);
        });
    }
    connection.close(200, "done".into()).await?;
    Ok(())
}

async fn handle(transport: &Transport, delivery: &Delivery) -> anyhow::Result<()> {
    let job: Job = serde_json::from_slice(&delivery.data).context("reading the job")?;
    transport.send(message_of(job)?).await.context("sending")?;
    delivery.ack(BasicAckOptions::default()).await.context("acknowledging")?;
    Ok(())
}

fn message_of(job: Job) -> anyhow::Result<Message> {
    let mut builder = Message::builder().from(FROM.parse()?).subject(job.subject);
    for recipient in &job.to {
        builder = builder.to(recipient.parse::<Mailbox>()?);
    }
    let mut alternatives = MultiPart::alternative_plain_html(job.text, job.html);
    let Some(calendar) = job.calendar else { return Ok(builder.multipart(alternatives)?) };
    let kind = ContentType::parse(&format!("text/calendar; charset=utf-8; method={}", calendar.method))?;
    alternatives = alternatives.singlepart(SinglePart::builder().header(kind).body(calendar.content.clone()));
    let invite =
        Attachment::new("invite.ics".into()).body(calendar.content, ContentType::parse("application/ics")?);
    Ok(builder.multipart(MultiPart::mixed().multipart(alternatives).singlepart(invite))?)
}

fn variable(name: &str) -> anyhow::Result<String> {
    env::var(name).with_context(|| format!("{name} is not set"))
}
