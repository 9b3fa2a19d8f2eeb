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
/// The answer where it bears an old timestamp. Its sender may wait all the same, if the clocks do not agree.
const TOO_OLD: &[u8] = br#"{"ok":false,"error":{"code":"unavailable","message":"By its timestamp the command is too old to be carried out; nothing was changed","hint":"Send it again. If it was sent just now, the clocks of its sender and of the worker do not agree."}}"#;
/// The answer where the second stage of a stop cut a handler off.
const CUT_OFF: &[u8] = br#"{"ok":false,"error":{"code":"internal","message":"The worker was stopped before the command came to its end: it is not known whether it was carried out","hint":"Look at what is stored before you repeat it."}}"#;
/// For a reply to be confirmed from the second stage of a stop on.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// Called with the error's code for every answer that no handler gave.
pub type RefusalHook = fn(&'static str);

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
    pub on_refusal: RefusalHook,
    pub handler: Arc<H>,
}

/// Where the answer to a command goes.
struct ReplyTo {
    names: Names,
    publisher: Publisher,
    shutdown: Shutdown,
    on_refusal: RefusalHook,
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
            let queue = self.names.control();
            let consuming = tokio::select! {
                () = &mut stop => return,
                consuming = jobs::consume(&live, &queue, CONCURRENCY) => consuming,
            };
            match consuming {
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
                        let accepted = self.accept(live.clone(), channel.clone(), slot, came, command);
                        handlers.spawn(accepted);
                    }
                }
                Err(error) if live.is_up() => {
                    tracing::warn!(%error, "cannot consume commands; declaring the topology again");
                    tokio::select! {
                        () = &mut stop => return,
                        declared = live.declare() => if let Err(error) = declared {
                            tracing::warn!(%error, "cannot declare the topology");
                        }
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

    /// A command's whole way, from its acknowledgement to its answer.
    fn accept(
        &self,
        live: Arc<Live>,
        channel: Channel,
        slot: OwnedSemaphorePermit,
        came: Instant,
        command: Delivery,
    ) -> impl Future<Output = ()> + Send + 'static {
        let reply_to = self.reply_to(&command);
        let (handler, shutdown, clock) = (self.handler.clone(), self.shutdown.clone(), self.clock.clone());
        async move {
            let _slot = slot;
            if live.while_up(acknowledge(&channel, &command)).await != Some(true) {
                // It may come again: carrying it out now could be once too often.
                return;
            }
            drop(channel);
            let waited = came.elapsed();
            match expired(&command.properties, waited, clock.now()) {
                None => {}
                Some(Expired::Here) => {
                    tracing::warn!(?waited, "a command expired in this worker and is not carried out");
                    return reply_to.refuse(TOO_BUSY, "unavailable").await;
                }
                Some(Expired::Aged(age)) => {
                    tracing::warn!(
                        ?age,
                        "a command has expired, by its timestamp, and is not carried out; do its sender's clock and this one agree?"
                    );
                    return reply_to.refuse(TOO_OLD, "unavailable").await;
                }
            }
            let meta = CommandMeta { user_id: text(command.properties.user_id()), waited };
            // A task of its own: a panic ends it, and not the answer.
            let mut handling = tokio::spawn(handler(command.data, meta));
            let handled = tokio::select! {
                biased;
                handled = &mut handling => handled.map_err(|_panic| BROKEN),
                () = shutdown.stop_now() => {
                    handling.abort();
                    Err(CUT_OFF)
                }
            };
            match handled {
                Ok(reply) => reply_to.send(&reply).await,
                Err(answer) => reply_to.refuse(answer, "internal").await,
            }
        }
    }

    fn reply_to(&self, command: &Delivery) -> ReplyTo {
        ReplyTo {
            names: self.names.clone(),
            publisher: self.publisher.clone(),
            shutdown: self.shutdown.clone(),
            on_refusal: self.on_refusal,
            queue: text(command.properties.reply_to()),
            correlation_id: text(command.properties.correlation_id()),
        }
    }
}

fn text(text: &Option<ShortString>) -> Option<String> {
    text.as_ref().map(|text| text.as_str().to_owned())
}

impl ReplyTo {
    /// With an answer of no handler, which nobody else counts.
    async fn refuse(&self, answer: &[u8], code: &'static str) {
        (self.on_refusal)(code);
        self.send(answer).await;
    }

    async fn send(&self, reply: &[u8]) {
        let Some(queue) = self.queue.as_ref().filter(|queue| may_reply_to(&self.names, queue)) else {
            return;
        };
        let late = async {
            self.shutdown.stop_now().await;
            tokio::time::sleep(LAST_WORDS).await;
        };
        tokio::select! {
            sent = self.publisher.reply(queue, self.correlation_id.as_deref(), reply) => {
                if let Err(error) = sent {
                    tracing::debug!(%error, "a reply was not published");
                }
            }
            () = late => tracing::debug!("a reply was not published before the worker stopped"),
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
        let (internal, unavailable) = ("internal", "unavailable");
        for (answer, code) in
            [(BROKEN, internal), (CUT_OFF, internal), (TOO_BUSY, unavailable), (TOO_OLD, unavailable)]
        {
            let reply: serde_json::Value = serde_json::from_slice(answer).unwrap();
            assert_eq!(reply["error"]["code"], code);
        }
    }
}
