//! The tests' own publisher and consumer, apart from the code under test.
//! Guarantee: whatever exists under a test's prefix is deleted at its end.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::StreamExt;
use lapin::options::{
    BasicAckOptions, BasicConsumeOptions, BasicGetOptions, BasicPublishOptions, ConfirmSelectOptions,
    ExchangeDeleteOptions, QueueBindOptions, QueueDeclareOptions, QueueDeleteOptions,
};
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::{BasicProperties, Channel, Confirmation, Connection, ConnectionProperties};
use sendoff::broker::{Access, AmqpUrl, BrokerSettings, Topology};
use sendoff::model::lanes::Lane;
use tokio::sync::Notify;
use tokio::time::Instant;

/// Waiting for anything that should happen, on a machine that is busy with other tests. What is awaited may itself take
/// half a minute aside and twenty seconds until a worker counts as dead; no test lets this time pass.
pub const SOON: Duration = Duration::from_secs(90);

/// The broker's URL.
pub fn amqp_url() -> String {
    std::env::var("AMQP_URL").expect("AMQP_URL is set by ./dev test")
}

/// Access to the broker under test.
pub fn access() -> Access {
    Access::new(AmqpUrl::parse(&amqp_url()).expect("AMQP_URL is an AMQP URL"))
}

/// Waits until a condition holds; panics with `what` after [`SOON`].
pub async fn eventually<F: AsyncFnMut() -> bool>(what: &str, holds: F) {
    eventually_within(SOON, what, holds).await;
}

/// The same with another limit.
pub async fn eventually_within<F: AsyncFnMut() -> bool>(limit: Duration, what: &str, mut holds: F) {
    let deadline = Instant::now() + limit;
    while !holds().await {
        assert!(Instant::now() < deadline, "in vain: {what}");
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
}

/// A prefix of the test's own on the shared broker, with a connection beside the code under test.
pub struct TestBroker {
    /// `amqp.prefix`.
    pub prefix: String,
    topology: Topology,
    settings: BrokerSettings,
    connection: Connection,
    channel: Channel,
}

/// A message as it lies in a queue.
#[derive(Debug)]
pub struct Message {
    /// The body.
    pub body: Vec<u8>,
    /// The exchange it was published to.
    pub exchange: String,
    /// Its routing key.
    pub routing_key: String,
    /// Everything else.
    pub properties: BasicProperties,
}

impl Message {
    /// A header's value.
    pub fn header(&self, name: &str) -> Option<&AMQPValue> {
        self.properties.headers().as_ref()?.inner().get(name)
    }

    /// A header's value where it is text.
    pub fn text(&self, name: &str) -> Option<String> {
        self.header(name)?.as_long_string().map(ToString::to_string)
    }

    /// Every header's name, sorted.
    pub fn header_names(&self) -> Vec<String> {
        let headers = self.properties.headers().as_ref();
        headers.map(|table| table.inner().keys().map(ToString::to_string).collect()).unwrap_or_default()
    }
}

/// The lanes of the default settings, with a prefetch that tests can fill.
pub fn lanes() -> Vec<Lane> {
    let lane = |name, binding: &str| Lane::new(name, vec![binding.to_owned()], 50).expect("a usable lane");
    vec![lane("notifications", "notification.#"), lane("reminders", "reminder.#")]
}

impl TestBroker {
    /// A fresh prefix on the shared broker, nothing declared yet.
    pub async fn new(name: &str, delays_s: &[u32]) -> Self {
        Self::with_lanes(&amqp_url(), name, lanes(), delays_s).await
    }

    /// A fresh prefix with the notifications' lane only: fewer queues to declare.
    pub async fn with_lane(name: &str, delays_s: &[u32]) -> Self {
        Self::with_lanes(&amqp_url(), name, lanes().into_iter().take(1).collect(), delays_s).await
    }

    /// A fresh prefix on some broker, nothing declared yet.
    pub async fn on(url: &str, name: &str, delays_s: &[u32]) -> Self {
        Self::with_lanes(url, name, lanes(), delays_s).await
    }

    async fn with_lanes(url: &str, name: &str, lanes: Vec<Lane>, delays_s: &[u32]) -> Self {
        let prefix =
            format!("t{}.{name}", uuid::Uuid::from_u64_pair(std::process::id().into(), unique()).simple());
        let access = Access::new(AmqpUrl::parse(url).expect("an AMQP URL"));
        let settings = BrokerSettings { access, prefix: prefix.clone(), lanes, delays_s: delays_s.to_vec() };
        let connection = Connection::connect(url, ConnectionProperties::default()).await.expect("RabbitMQ");
        let channel = confirming(&connection).await;
        Self { prefix, topology: settings.topology(), settings, connection, channel }
    }

    /// Settings of a worker under this prefix.
    pub fn settings(&self) -> BrokerSettings {
        self.settings.clone()
    }

    /// What the worker declares.
    pub fn topology(&self) -> &Topology {
        &self.topology
    }

    /// Declares the topology as a worker would.
    pub async fn declare(&self) {
        self.topology.declare(&self.settings.access, &[]).await.expect("a fresh prefix can be declared");
    }

    /// Declares the tap: a queue of the test's own with a copy of each dead letter from now on. A worker that runs empties
    /// `P.dead` into the archive, so a test that wants to see a letter takes it from here.
    pub async fn declare_tap(&self) {
        let (tap, dead) = (self.tap(), self.name("dead"));
        let options = QueueDeclareOptions { durable: true, ..Default::default() };
        let declared = self.channel.queue_declare(tap.as_str().into(), options, FieldTable::default()).await;
        declared.expect("a queue");
        let (options, arguments) = (QueueBindOptions::default(), FieldTable::default());
        let bound = self.channel.queue_bind(tap.into(), dead.into(), "".into(), options, arguments).await;
        bound.expect("the exchange of the dead letters exists");
    }

    /// The tap's name.
    pub fn tap(&self) -> String {
        self.name("tap")
    }

    /// A full name under the prefix, say `jobs.reminders`.
    pub fn name(&self, rest: &str) -> String {
        format!("{}.{rest}", self.prefix)
    }

    /// Publishes raw bytes to `P.jobs` with any properties, confirmed.
    pub async fn publish_job(&self, routing_key: &str, body: &[u8], properties: BasicProperties) {
        self.publish(&self.name("jobs"), routing_key, body, properties).await;
    }

    /// Publishes anywhere, confirmed and routed.
    pub async fn publish(&self, exchange: &str, routing_key: &str, body: &[u8], properties: BasicProperties) {
        let options = BasicPublishOptions { mandatory: true, immediate: false };
        let sent =
            self.channel.basic_publish(exchange.into(), routing_key.into(), options, body, properties).await;
        let confirm = sent.expect("published").await.expect("confirmed");
        assert_eq!(confirm, Confirmation::Ack(None), "{exchange} {routing_key}");
    }

    /// Publishes many messages to `P.jobs`, then waits for every confirm.
    pub async fn publish_jobs(&self, routing_key: &str, bodies: &[Vec<u8>]) {
        publish_all(&self.channel, &self.name("jobs"), routing_key, bodies).await;
    }

    /// Messages ready in a queue, without those in a worker's hands; `None` when there is no such queue.
    pub async fn count(&self, queue: &str) -> Option<u32> {
        let channel = self.connection.create_channel().await.expect("a channel");
        let options = QueueDeclareOptions { passive: true, ..Default::default() };
        let declared = channel.queue_declare(queue.into(), options, FieldTable::default()).await;
        declared.ok().map(|queue| queue.message_count())
    }

    /// Waits until so many consumers are on a queue.
    pub async fn wait_consumers(&self, queue: &str, consumers: u32) {
        eventually(&format!("{consumers} consumers of {queue}"), async || {
            let channel = self.connection.create_channel().await.expect("a channel");
            let options = QueueDeclareOptions { passive: true, ..Default::default() };
            let declared = channel.queue_declare(queue.into(), options, FieldTable::default()).await;
            declared.is_ok_and(|queue| queue.consumer_count() == consumers)
        })
        .await;
    }

    /// Waits until a queue has so many ready messages.
    pub async fn wait_count(&self, queue: &str, count: u32) {
        eventually(&format!("{count} messages in {queue}"), async || self.count(queue).await == Some(count))
            .await;
    }

    /// Takes the next message off a queue, waiting for it.
    pub async fn take(&self, queue: &str) -> Message {
        let mut taken = None;
        eventually(&format!("a message in {queue}"), async || {
            taken = self.get(queue).await;
            taken.is_some()
        })
        .await;
        taken.expect("just seen")
    }

    /// Takes the next message off a queue, if there is one now.
    pub async fn get(&self, queue: &str) -> Option<Message> {
        let got = self
            .channel
            .basic_get(queue.into(), BasicGetOptions::default())
            .await
            .expect("the queue exists")?;
        got.acker.ack(BasicAckOptions::default()).await.expect("acknowledged");
        Some(Message {
            exchange: got.exchange.to_string(),
            routing_key: got.routing_key.to_string(),
            properties: got.properties.clone(),
            body: got.delivery.data,
        })
    }

    /// Takes every message off a queue.
    pub async fn drain(&self, queue: &str) -> Vec<Message> {
        let mut messages = Vec::new();
        while let Some(message) = self.get(queue).await {
            messages.push(message);
        }
        messages
    }

    /// Collects every event from now on.
    pub async fn events(&self) -> Events {
        Events::start(&self.connection, &self.name("events")).await
    }

    /// A channel beside the code under test, for what is not covered here.
    pub async fn channel(&self) -> Channel {
        confirming(&self.connection).await
    }

    /// Deletes everything under the prefix.
    pub async fn clean_up(self) {
        for queue in &self.topology.queues {
            let options = QueueDeleteOptions::default();
            let _gone = self.channel.queue_delete(queue.name.as_str().into(), options).await;
        }
        let _gone = self.channel.queue_delete(self.tap().into(), QueueDeleteOptions::default()).await;
        for exchange in &self.topology.exchanges {
            let options = ExchangeDeleteOptions::default();
            let _gone = self.channel.exchange_delete(exchange.name.as_str().into(), options).await;
        }
        let _closed = self.connection.close(200, ShortString::from("done")).await;
    }
}

/// Publishes persistent messages over a channel in confirm mode, and waits for every confirm behind the last one.
pub async fn publish_all(channel: &Channel, exchange: &str, routing_key: &str, bodies: &[Vec<u8>]) {
    let options = BasicPublishOptions { mandatory: true, immediate: false };
    let mut confirms = Vec::new();
    for body in bodies {
        let properties = BasicProperties::default().with_delivery_mode(2);
        let sent = channel.basic_publish(exchange.into(), routing_key.into(), options, body, properties);
        confirms.push(sent.await.expect("published"));
    }
    for confirm in confirms {
        assert_eq!(confirm.await.expect("confirmed"), Confirmation::Ack(None), "{exchange} {routing_key}");
    }
}

fn unique() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    std::collections::hash_map::RandomState::new().build_hasher().finish()
}

/// A channel in confirm mode.
pub async fn confirming(connection: &Connection) -> Channel {
    let channel = connection.create_channel().await.expect("a channel");
    channel.confirm_select(ConfirmSelectOptions::default()).await.expect("confirm mode");
    channel
}

/// Events as they were published.
pub struct Events {
    seen: Arc<Mutex<Vec<serde_json::Value>>>,
    arrived: Arc<Notify>,
    _channel: Channel,
}

impl Events {
    async fn start(connection: &Connection, exchange: &str) -> Self {
        let channel = connection.create_channel().await.expect("a channel");
        let options = QueueDeclareOptions { exclusive: true, auto_delete: true, ..Default::default() };
        let queue = channel.queue_declare("".into(), options, FieldTable::default()).await.expect("a queue");
        let (name, all) = (queue.name().clone(), "#".into());
        channel
            .queue_bind(
                name.clone(),
                exchange.into(),
                all,
                QueueBindOptions::default(),
                FieldTable::default(),
            )
            .await
            .expect("the events exchange exists");
        let options = BasicConsumeOptions { no_ack: true, ..Default::default() };
        let mut consumer =
            channel.basic_consume(name, "".into(), options, FieldTable::default()).await.expect("a consumer");
        let (seen, arrived) = (Arc::new(Mutex::new(Vec::new())), Arc::new(Notify::new()));
        let (to, wake) = (seen.clone(), arrived.clone());
        tokio::spawn(async move {
            while let Some(Ok(delivery)) = consumer.next().await {
                let event: serde_json::Value =
                    serde_json::from_slice(&delivery.data).expect("events are JSON");
                assert_eq!(event["type"], delivery.routing_key.as_str(), "the type is the routing key");
                to.lock().expect("no panic under the lock").push(event);
                wake.notify_waiters();
            }
        });
        Self { seen, arrived, _channel: channel }
    }

    /// The first event, past or to come, that satisfies the predicate; panics at the deadline with all that were seen.
    pub async fn wait_for(
        &self,
        predicate: impl Fn(&serde_json::Value) -> bool,
        deadline: Duration,
    ) -> serde_json::Value {
        let deadline = Instant::now() + deadline;
        loop {
            let arrived = self.arrived.notified();
            let mut arrived = std::pin::pin!(arrived);
            arrived.as_mut().enable();
            if let Some(event) = self.all().into_iter().find(&predicate) {
                return event;
            }
            let woken = tokio::time::timeout_at(deadline, arrived).await;
            assert!(woken.is_ok(), "no such event among {:?}", self.all());
        }
    }

    /// Every event so far.
    pub fn all(&self) -> Vec<serde_json::Value> {
        self.seen.lock().expect("no panic under the lock").clone()
    }
}

/// A RabbitMQ of the test's own, which it may hurt. `./dev service` runs it.
pub struct PrivateBroker {
    directory: tempfile::TempDir,
    url: String,
}

impl PrivateBroker {
    /// Starts one.
    pub async fn start() -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        // It runs as a user of its own.
        let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(directory.path(), open).expect("permissions");
        let url = dev("start", &directory, "").await;
        Self { directory, url }
    }

    /// Its URL, the same after a restart.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Runs `rabbitmqctl`.
    pub async fn ctl(&self, arguments: &str) {
        dev("ctl", &self.directory, arguments).await;
    }

    /// Kills it without warning.
    pub async fn kill(&self) {
        dev("kill", &self.directory, "").await;
    }

    /// Starts it again with its data.
    pub async fn start_again(&self) {
        assert_eq!(dev("start", &self.directory, "").await, self.url);
    }
}

/// Ends it, also when the test has failed.
impl Drop for PrivateBroker {
    fn drop(&mut self) {
        let mut command = std::process::Command::new(DEV);
        command.args(["service", "remove", "rabbitmq"]).arg(self.directory.path().join("rabbitmq"));
        let _left = command.output();
    }
}

const DEV: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/dev");

async fn dev(verb: &str, directory: &tempfile::TempDir, arguments: &str) -> String {
    let output = tokio::process::Command::new(DEV)
        .args(["service", verb, "rabbitmq"])
        .arg(directory.path().join("rabbitmq"))
        .args(arguments.split_whitespace())
        .output()
        .await
        .expect("./dev can be run");
    assert!(output.status.success(), "./dev service {verb}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).lines().last().unwrap_or_default().to_owned()
}
