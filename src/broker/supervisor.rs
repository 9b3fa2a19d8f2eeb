//! The broker as the worker sees it: two kept connections, the lanes, the publisher, the commands.
//! Guarantee: it starts whether or not RabbitMQ is there, and everything it hands out survives the loss and the return of
//! the connection.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Mutex, watch};
use tokio::task::JoinHandle;

use super::connection::Access;
use super::control::{self, CommandMeta, RefusalHook};
use super::held::Held;
use super::jobs::{Consuming, Deliveries, DropHook, Feed, Intent, Source};
use super::link::{BrokerState, Link, LinkReceiver, Live, Role};
use super::names::Names;
use super::publisher::Publisher;
use super::topology::Topology;
use crate::clock::Clock;
use crate::model::lanes::Lane;
use crate::shutdown::Shutdown;

/// For consumers to stop when told, each handing back what it had prefetched.
const QUIET_LIMIT: Duration = Duration::from_secs(6);
/// For both connections to close.
const CLOSE_LIMIT: Duration = Duration::from_secs(5);

/// What the worker needs to know of the broker.
#[derive(Debug, Clone)]
pub struct BrokerSettings {
    /// Where it is.
    pub access: Access,
    /// `amqp.prefix`.
    pub prefix: String,
    /// The lanes to serve; no two may overlap.
    pub lanes: Vec<Lane>,
    /// Every delay that needs a queue, in seconds.
    pub delays_s: Vec<u32>,
}

impl BrokerSettings {
    /// Everything that these settings need on the broker.
    pub fn topology(&self) -> Topology {
        Topology::new(&self.prefix, &self.lanes, &self.delays_s)
    }
}

/// Kept connections to the broker.
pub struct Broker {
    names: Names,
    lanes: Vec<Lane>,
    link: LinkReceiver,
    publisher: Publisher,
    state: watch::Receiver<BrokerState>,
    intent: watch::Sender<Intent>,
    consuming: Arc<Consuming>,
    unsent: Arc<Consuming>,
    closing: watch::Sender<bool>,
    links: Vec<JoinHandle<()>>,
    on_drop: DropHook,
    held: Held,
}

impl Broker {
    /// Starts to connect, in a runtime of tokio's. `on_drop` is called for every delivery that is dropped unsettled.
    pub fn start(settings: BrokerSettings, on_drop: DropHook) -> Self {
        let topology = Arc::new(settings.topology());
        let names = topology.names().clone();
        let (closing, closing_seen) = watch::channel(false);
        let (state, state_seen) = watch::channel(BrokerState::starting());
        let (state, declaring) = (Arc::new(state), Arc::new(Mutex::new(())));
        let spawn = |role| {
            let (sender, receiver) = watch::channel::<Option<Arc<Live>>>(None);
            let link = Link {
                access: settings.access.clone(),
                role,
                topology: topology.clone(),
                declaring: declaring.clone(),
                state: state.clone(),
                closing: closing_seen.clone(),
            };
            (tokio::spawn(link.run(sender)), receiver)
        };
        let (consuming_task, link) = spawn(Role::Consuming);
        let (publishing_task, publishing) = spawn(Role::Publishing);
        Self {
            publisher: Publisher::new(names.clone(), publishing),
            names,
            lanes: settings.lanes,
            link,
            state: state_seen,
            intent: watch::channel(Intent::Consume).0,
            consuming: Arc::default(),
            unsent: Arc::default(),
            closing,
            links: vec![consuming_task, publishing_task],
            on_drop,
            held: Held::default(),
        }
    }

    /// Publishes over the publishing connection; cheap to clone.
    pub fn publisher(&self) -> Publisher {
        self.publisher.clone()
    }

    /// Whether the broker can be used, and its changes.
    pub fn state(&self) -> watch::Receiver<BrokerState> {
        self.state.clone()
    }

    /// Starts to consume a lane of the settings with its prefetch; `None` when there is no such lane. Each call is a
    /// consumer of its own.
    pub fn lane(&self, name: &str) -> Option<Deliveries> {
        let lane = self.lanes.iter().find(|lane| lane.name == name)?;
        Some(self.feed(Source::Lane(lane.name.clone()), lane.prefetch))
    }

    /// Starts to consume the dead letters; each delivery's `received().death` is set.
    pub fn dead_letters(&self, prefetch: u16) -> Deliveries {
        self.feed(Source::Dead, prefetch)
    }

    /// Starts to serve commands: `handler` takes a command's body and answers with the reply's. Commands go on while lanes
    /// are paused, so that their senders learn what is the matter. What is returned ends when consuming has been stopped and
    /// what was under way then is answered: at the second stage of the stop at the latest.
    pub fn serve_commands<H, F>(
        &self,
        clock: Clock,
        shutdown: Shutdown,
        on_refusal: RefusalHook,
        handler: H,
    ) -> JoinHandle<()>
    where
        H: Fn(Vec<u8>, CommandMeta) -> F + Send + Sync + 'static,
        F: Future<Output = Vec<u8>> + Send + 'static,
    {
        let server = control::Server {
            names: self.names.clone(),
            link: self.link.clone(),
            intent: self.intent.subscribe(),
            consuming: self.consuming.clone(),
            publisher: self.publisher.clone(),
            clock,
            shutdown,
            on_refusal,
            handler: Arc::new(handler),
        };
        tokio::spawn(server.run())
    }

    fn feed(&self, source: Source, prefetch: u16) -> Deliveries {
        let feed = Feed {
            source,
            prefetch,
            names: self.names.clone(),
            link: self.link.clone(),
            intent: self.intent.subscribe(),
            consuming: self.consuming.clone(),
            unsent: self.unsent.clone(),
            on_drop: self.on_drop.clone(),
            held: self.held.clone(),
        };
        feed.spawn()
    }

    /// Cancels the consumers of lanes and dead letters; what they had prefetched and nobody has seen goes back.
    pub fn pause_lanes(&self) {
        self.intend(Intent::Pause);
    }

    /// Consumes again after a pause.
    pub fn resume_lanes(&self) {
        self.intend(Intent::Consume);
    }

    fn intend(&self, wanted: Intent) {
        self.intent.send_if_modified(|intent| {
            let changes = *intent != Intent::Stop && *intent != wanted;
            if changes {
                *intent = wanted;
            }
            changes
        });
    }

    /// Ends every consumer for good, commands included, and waits until each has handed back its prefetched messages, but
    /// not for long. Deliveries that were passed on can still be settled.
    pub async fn stop_consuming(&self) {
        self.intent.send_replace(Intent::Stop);
        if tokio::time::timeout(QUIET_LIMIT, self.consuming.none()).await.is_err() {
            tracing::warn!(
                "a consumer did not stop in time; the broker takes its messages back when the connection closes"
            );
        }
    }

    /// Sends the acknowledgements that wait, and closes both connections. Deliveries that are still open go back to their queues.
    pub async fn close(mut self) {
        self.intent.send_replace(Intent::Stop);
        if tokio::time::timeout(CLOSE_LIMIT, self.unsent.none()).await.is_err() {
            tracing::warn!("RabbitMQ takes no acknowledgements; what they are for is delivered again");
        }
        self.closing.send_replace(true);
        for link in self.links.drain(..) {
            if tokio::time::timeout(CLOSE_LIMIT, link).await.is_err() {
                tracing::warn!("a connection to RabbitMQ did not close in time");
            }
        }
    }
}
