//! Commands in, replies out.
//! Guarantee: a command is carried out at most once: before its handler starts, the broker has read that it is acknowledged.
//! One that has expired meanwhile is not carried out at all. At a stop those under way come to their end and are answered,
//! the second stage of the stop included. A reply never goes to one of our own queues.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use lapin::message::Delivery;
use lapin::options::{BasicAckOptions, BasicCancelOptions, BasicQosOptions};
use lapin::types::ShortString;
use lapin::{Channel, Consumer};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::expiry::{Expired, expired};
use super::jobs::{self, Consuming, Intent};
use super::link::{self, LinkReceiver, Live};
use super::names::Names;
use super::publisher::Publisher;
use crate::clock::Clock;
use crate::shutdown::Shutdown;

/// Commands handled at once, and so many more may wait here. A test email can take a minute; the handler takes on fewer of
/// those than this, so that the quick ones do not wait for it.
const CONCURRENCY: u16 = 128;
/// For the broker to confirm that no more commands come.
const CANCEL_LIMIT: Duration = Duration::from_secs(3);
/// The answer where a handler broke down.
const BROKEN: &[u8] =
    br#"{"ok":false,"error":{"code":"internal","message":"The command failed inside the worker; its log says more."}}"#;

/// The answer where its time was over before a slot was free.
const TOO_BUSY: &[u8] = br#"{"ok":false,"error":{"code":"unavailable","message":"The worker is too busy now; nothing was changed","hint":"Try again in a moment."}}"#;
/// The answer where the second stage of a stop cut a handler off.
const CUT_OFF: &[u8] = br#"{"ok":false,"error":{"code":"internal","message":"The worker was stopped before the command came to its end: it is not known whether it was carried out","hint":"Look at what is stored before you repeat it."}}"#;
/// For a reply to be confirmed while the worker stops working.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// What the broker vouches for about a command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CommandMeta {
    /// The AMQP user that sent it, which the broker has verified; `None` when the sender did not state it.
    pub user_id: Option<String>,
    /// How long it has waited in this worker.
    pub waited: Duration,
}

/// Commands that have come and wait for a slot, unacknowledged: no more than the prefetch.
#[derive(Default)]
struct Waiting(VecDeque<(Instant, Delivery)>);

pub(super) struct Server<H> {
    pub names: Names,
    pub link: LinkReceiver,
    pub intent: watch::Receiver<Intent>,
    pub consuming: Arc<Consuming>,
    pub publisher: Publisher,
    pub clock: Clock,
    pub shutdown: Shutdown,
    pub handler: Arc<H>,
}

/// Where the answer to a command goes.
struct ReplyTo {
    names: Names,
    publisher: Publisher,
    queue: Option<String>,
    correlation_id: Option<String>,
}

impl<H, F> Server<H>
where
    H: Fn(Vec<u8>, CommandMeta) -> F + Send + Sync + 'static,
    F: Future<Output = Vec<u8>> + Send + 'static,
{
    /// Until the first stage of a stop, and until what is under way then is answered.
    pub async fn run(mut self) {
        let mut handlers = JoinSet::new();
        self.serve(&mut handlers).await;
        while handlers.join_next().await.is_some() {}
    }

    async fn serve(&mut self, handlers: &mut JoinSet<()>) {
        let slots = Arc::new(Semaphore::new(usize::from(CONCURRENCY)));
        let mut stopping = self.intent.clone();
        let stop = async move {
            // An error means that nobody is left to serve.
            let _stopped = stopping.wait_for(|intent| *intent == Intent::Stop).await;
        };
        let mut stop = std::pin::pin!(stop);
        let mut pauses = link::pauses();
        loop {
            let live = tokio::select! {
                () = &mut stop => return,
                live = link::up(&mut self.link) => match live { Some(live) => live, None => return },
            };
            let _consuming = self.consuming.enter();
            match jobs::consume(&live, &self.names.control(), CONCURRENCY).await {
                Ok((channel, mut consumer)) => {
                    pauses = link::pauses();
                    let mut waiting = Waiting::default();
                    loop {
                        let next = tokio::select! {
                            () = &mut stop => {
                                let cancel = channel.basic_cancel(consumer.tag(), BasicCancelOptions::default());
                                // What was prefetched goes back when the channel closes, right below.
                                let _cancelled = tokio::time::timeout(CANCEL_LIMIT, cancel).await;
                                return;
                            }
                            next = live.while_up(waiting.next(&slots, &mut consumer)) => next.flatten(),
                        };
                        let Some((slot, came, command)) = next else { break };
                        while handlers.try_join_next().is_some() {}
                        self.accept(&live, &channel, slot, came, command, handlers).await;
                    }
                }
                Err(error) if live.is_up() => {
                    tracing::warn!(%error, "cannot consume commands; declaring the topology again");
                    if let Err(error) = live.declare().await {
                        tracing::warn!(%error, "cannot declare the topology");
                    }
                }
                Err(_) => {}
            }
            tokio::select! {
                () = &mut stop => return,
                () = tokio::time::sleep(pauses.next().unwrap_or(CANCEL_LIMIT)) => {}
            }
        }
    }

    async fn accept(
        &self,
        live: &Live,
        channel: &Channel,
        slot: OwnedSemaphorePermit,
        came: Instant,
        command: Delivery,
        handlers: &mut JoinSet<()>,
    ) {
        if live.while_up(acknowledge(channel, &command)).await != Some(true) {
            // It may come again: carrying it out now could be once too often.
            return;
        }
        let waited = came.elapsed();
        let reply_to = self.reply_to(&command);
        match expired(&command.properties, waited, self.clock.now()) {
            None => {}
            Some(Expired::Here) => {
                tracing::warn!(?waited, "a command expired in this worker and is not carried out");
                handlers.spawn(async move { reply_to.send(TOO_BUSY).await });
                return;
            }
            Some(Expired::Aged(age)) => {
                tracing::warn!(
                    ?age,
                    "a command has expired, by its timestamp, and is not carried out; do its sender's clock and this one agree?"
                );
                return;
            }
        }
        let meta = CommandMeta { user_id: text(command.properties.user_id()), waited };
        let (handler, shutdown) = (self.handler.clone(), self.shutdown.clone());
        handlers.spawn(async move {
            let _slot = slot;
            // A task of its own: a panic ends it, and not the answer.
            let mut handling = tokio::spawn(handler(command.data, meta));
            tokio::select! {
                biased;
                reply = &mut handling => reply_to.send(&reply.unwrap_or_else(|_| BROKEN.to_vec())).await,
                () = shutdown.stop_now() => {
                    handling.abort();
                    let _sent = tokio::time::timeout(LAST_WORDS, reply_to.send(CUT_OFF)).await;
                }
            }
        });
    }

    fn reply_to(&self, command: &Delivery) -> ReplyTo {
        ReplyTo {
            names: self.names.clone(),
            publisher: self.publisher.clone(),
            queue: text(command.properties.reply_to()),
            correlation_id: text(command.properties.correlation_id()),
        }
    }
}

fn text(text: &Option<ShortString>) -> Option<String> {
    text.as_ref().map(|text| text.as_str().to_owned())
}

impl ReplyTo {
    async fn send(&self, reply: &[u8]) {
        let Some(queue) = self.queue.as_ref().filter(|queue| may_reply_to(&self.names, queue)) else {
            return;
        };
        if let Err(error) = self.publisher.reply(queue, self.correlation_id.as_deref(), reply).await {
            tracing::debug!(%error, "a reply was not published");
        }
    }
}

impl Waiting {
    /// The command that has waited longest, with the slot it is to be handled in and the time it came; `None` when the
    /// consumer has ended. Dropped on the way, it has lost nothing.
    async fn next(
        &mut self,
        slots: &Arc<Semaphore>,
        consumer: &mut Consumer,
    ) -> Option<(OwnedSemaphorePermit, Instant, Delivery)> {
        loop {
            tokio::select! {
                slot = slots.clone().acquire_owned(), if !self.0.is_empty() => {
                    let (came, command) = self.0.pop_front()?;
                    return Some((slot.ok()?, came, command));
                }
                command = consumer.next() => self.0.push_back((Instant::now(), command?.ok()?)),
            }
        }
    }
}

/// Whether the broker has read that a command is acknowledged. The library is done with an acknowledgement when the frame is
/// written, and a connection that breaks then brings the command again. RabbitMQ works off a channel's methods in order, so an
/// answer to anything behind it will do; the prefetch stays what it is.
async fn acknowledge(channel: &Channel, command: &Delivery) -> bool {
    matches!(command.acker.ack(BasicAckOptions::default()).await, Ok(true))
        && channel.basic_qos(CONCURRENCY, BasicQosOptions::default()).await.is_ok()
}

/// Whether a reply may go to a queue: not to ours, where it would be taken for a job or a command, and under the broker's
/// own prefix only to what clients use for replies.
fn may_reply_to(names: &Names, queue: &str) -> bool {
    let reserved = queue.starts_with("amq.")
        && !queue.starts_with("amq.rabbitmq.reply-to")
        && !queue.starts_with("amq.gen-");
    !queue.is_empty() && !names.owns(queue) && !reserved
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reply_goes_to_a_clients_queue_and_never_to_ours() {
        let names = Names::new("sendoff");
        for queue in ["amq.rabbitmq.reply-to.g1h2", "amq.gen-abc", "backoffice.replies", "sendofficial"] {
            assert!(may_reply_to(&names, queue), "{queue}");
        }
        for queue in ["", "sendoff", "sendoff.control", "sendoff.jobs.notifications", "amq.topic"] {
            assert!(!may_reply_to(&names, queue), "{queue}");
        }
    }

    #[test]
    fn the_answers_of_no_handler_are_json() {
        for (answer, code) in [(BROKEN, "internal"), (CUT_OFF, "internal"), (TOO_BUSY, "unavailable")] {
            let reply: serde_json::Value = serde_json::from_slice(answer).unwrap();
            assert_eq!(reply["error"]["code"], code);
        }
    }
}
