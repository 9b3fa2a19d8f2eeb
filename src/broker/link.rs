//! One connection that is kept: opened, watched, and opened again for as long as the process wants it.
//! Guarantee: a loss is noticed and logged once, its end once; meanwhile attempts go on without end, with growing,
//! jittered pauses.

use std::sync::Arc;
use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBuilder};
use futures_util::StreamExt;
use lapin::{Connection, Event};
use tokio::sync::{Mutex, watch};
use tokio::time::Instant;

use super::connection::{self, Access, BrokerError};
use super::topology::Topology;

/// First pause between two attempts; jitter can double any of them.
const PAUSE_MIN: Duration = Duration::from_millis(500);
/// Longest pause, before jitter.
const PAUSE_MAX: Duration = Duration::from_secs(8);
/// A connection that stood for so long starts the pauses anew.
const STABLE_AFTER: Duration = Duration::from_secs(30);
/// For the whole topology to be declared: some thirty answers, each of which may wait for a queue's replicas.
const DECLARE_LIMIT: Duration = Duration::from_secs(60);
/// How often the connection's state is looked at beside the library's events.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// Publishing and consuming go over two connections: a broker short of memory or disk stops reading from one that
/// publishes, and acknowledgements would be stuck behind the publishes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    Consuming,
    Publishing,
}

impl Role {
    fn as_str(self) -> &'static str {
        match self {
            Self::Consuming => "consuming",
            Self::Publishing => "publishing",
        }
    }
}

/// Whether the broker can be used, and why not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BrokerState {
    /// Why jobs cannot be taken; `None` when they can.
    pub consuming: Option<Arc<str>>,
    /// Why nothing can be published; `None` when it can.
    pub publishing: Option<Arc<str>>,
}

impl BrokerState {
    pub(super) fn starting() -> Self {
        let reason: Arc<str> = "not connected yet".into();
        Self { consuming: Some(reason.clone()), publishing: Some(reason) }
    }

    /// Whether both ways are open.
    pub fn is_connected(&self) -> bool {
        self.reason().is_none()
    }

    /// Why the broker cannot be used now.
    pub fn reason(&self) -> Option<&str> {
        self.consuming.as_deref().or(self.publishing.as_deref())
    }

    fn set(&mut self, role: Role, reason: Option<Arc<str>>) -> bool {
        let field = match role {
            Role::Consuming => &mut self.consuming,
            Role::Publishing => &mut self.publishing,
        };
        let changed = *field != reason;
        *field = reason;
        changed
    }
}

/// A connection that stands, with everything declared over it.
pub(super) struct Live {
    pub connection: Connection,
    topology: Arc<Topology>,
    declaring: Arc<Mutex<()>>,
    lost: watch::Sender<bool>,
}

impl Live {
    /// Declares everything, one declarer at a time in this process.
    pub async fn declare(&self) -> Result<(), BrokerError> {
        let work = async {
            let _turn = self.declaring.lock().await;
            self.topology.declare_on(&self.connection).await
        };
        let detail = || "declaring the topology got no answer".to_owned();
        match tokio::time::timeout(DECLARE_LIMIT, self.while_up(work)).await {
            Ok(Some(declared)) => declared,
            Ok(None) | Err(_) => Err(BrokerError::Lost { detail: detail() }),
        }
    }

    /// Awaits an operation on this connection; `None` when the connection is lost first. The library can leave an operation
    /// unanswered for good that was asked for just as the connection broke, so nothing may wait for one without this.
    pub async fn while_up<T>(&self, operation: impl Future<Output = T>) -> Option<T> {
        let mut lost = self.lost.subscribe();
        tokio::select! {
            biased;
            outcome = operation => Some(outcome),
            _ = lost.wait_for(|lost| *lost) => None,
        }
    }

    pub fn is_up(&self) -> bool {
        self.connection.status().connected()
    }
}

/// The connection as its users see it.
pub(super) type LinkReceiver = watch::Receiver<Option<Arc<Live>>>;

/// Waits until the link has a connection; `None` when it never will again.
pub(super) async fn up(link: &mut LinkReceiver) -> Option<Arc<Live>> {
    link.wait_for(Option::is_some).await.ok()?.clone()
}

/// What a link is made of.
pub(super) struct Link {
    pub access: Access,
    pub role: Role,
    pub topology: Arc<Topology>,
    pub declaring: Arc<Mutex<()>>,
    pub state: Arc<watch::Sender<BrokerState>>,
    /// Set when the connection is to be closed.
    pub closing: watch::Receiver<bool>,
}

impl Link {
    /// Keeps the connection until it is told to close.
    pub async fn run(mut self, link: watch::Sender<Option<Arc<Live>>>) {
        let mut closing = self.closing.clone();
        tokio::select! {
            () = self.keep(&link) => {}
            // An error means that nobody is left who could ask.
            _ = closing.wait_for(|closing| *closing) => {}
        }
        if let Some(live) = link.send_replace(None) {
            connection::close(&live.connection).await;
            live.lost.send_replace(true);
        }
        self.report(Some("closed".into()));
    }

    async fn keep(&mut self, link: &watch::Sender<Option<Arc<Live>>>) {
        let mut pauses = pauses();
        let mut outage: Option<(Instant, Arc<str>)> = None;
        loop {
            match self.establish().await {
                Ok(live) => {
                    self.log_return(outage.take());
                    let since = Instant::now();
                    // Listens before anybody can use the connection, so that no event goes by.
                    let events = live.connection.events_listener();
                    link.send_replace(Some(live.clone()));
                    self.report(None);
                    let reason: Arc<str> = self.watch(&live, events).await.into();
                    link.send_replace(None);
                    live.lost.send_replace(true);
                    tracing::warn!(role = self.role.as_str(), %reason, "lost the connection to RabbitMQ");
                    self.report(Some(reason.clone()));
                    outage = Some((Instant::now(), reason));
                    if since.elapsed() > STABLE_AFTER {
                        pauses = self::pauses();
                    }
                }
                Err(error) => {
                    let reason: Arc<str> = error.to_string().into();
                    if outage.as_ref().is_none_or(|(_, known)| *known != reason) {
                        tracing::warn!(role = self.role.as_str(), %reason, "no connection to RabbitMQ; trying on");
                    }
                    self.report(Some(reason.clone()));
                    let began = outage.map_or_else(Instant::now, |(began, _)| began);
                    outage = Some((began, reason));
                }
            }
            tokio::time::sleep(pauses.next().unwrap_or(PAUSE_MAX)).await;
        }
    }

    async fn establish(&self) -> Result<Arc<Live>, BrokerError> {
        let connection = connection::open(&self.access, self.role.as_str()).await?;
        let topology = self.topology.clone();
        let live = Arc::new(Live {
            connection,
            topology,
            declaring: self.declaring.clone(),
            lost: watch::channel(false).0,
        });
        match live.declare().await {
            Ok(()) => Ok(live),
            Err(error) => {
                connection::close(&live.connection).await;
                Err(error)
            }
        }
    }

    /// Returns when the connection is lost, with the reason.
    async fn watch(&self, live: &Live, events: impl futures_util::Stream<Item = Event> + Send) -> String {
        let mut events = std::pin::pin!(events);
        let mut reason = None;
        while live.is_up() {
            // The look at the state catches an end that came without an event.
            let Ok(event) = tokio::time::timeout(LOOK_EVERY, events.next()).await else { continue };
            match event {
                // A channel's error is reported here too, and is its user's affair.
                Some(Event::Error(error)) => reason = Some(error.to_string()),
                Some(Event::ConnectionBlocked(why)) => {
                    tracing::warn!(
                        role = self.role.as_str(),
                        why,
                        "RabbitMQ takes no messages for now: a resource alarm"
                    );
                }
                Some(Event::ConnectionUnblocked) => {
                    tracing::info!(role = self.role.as_str(), "RabbitMQ takes messages again");
                }
                Some(_) => {}
                None => break,
            }
        }
        reason.unwrap_or_else(|| "closed by the broker".to_owned())
    }

    fn log_return(&self, outage: Option<(Instant, Arc<str>)>) {
        let server = self.access.url().server();
        match outage {
            Some((began, _)) => {
                let seconds = began.elapsed().as_secs();
                tracing::info!(role = self.role.as_str(), server, seconds, "connected to RabbitMQ again");
            }
            None => tracing::info!(role = self.role.as_str(), server, "connected to RabbitMQ"),
        }
    }

    fn report(&self, reason: Option<Arc<str>>) {
        self.state.send_if_modified(|state| state.set(self.role, reason));
    }
}

/// Pauses without end.
pub(super) fn pauses() -> impl Iterator<Item = Duration> + Send {
    ExponentialBuilder::default()
        .with_min_delay(PAUSE_MIN)
        .with_max_delay(PAUSE_MAX)
        .with_jitter()
        .without_max_times()
        .build()
}
