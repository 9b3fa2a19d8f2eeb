//! Every exchange, queue and binding with the reason of each flag (contract section 2): one list, declared and printed.
//! Guarantee: declaring is idempotent and deletes nothing; what exists with other settings is named, not changed.

use std::fmt;
use std::time::Duration;

use lapin::options::{
    ConfirmSelectOptions, ExchangeBindOptions, ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions,
};
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::{Channel, Connection, ExchangeKind};
use serde::Serialize;

use super::connection::{self, Access, BrokerError};
use super::names::Names;
use crate::model::lanes::Lane;

/// A requeue after a crash or a lost connection counts too, and with a prefetch above one the innocent neighbours of a
/// crash are charged with it: low limits kill jobs that nobody touched.
const LANE_DELIVERY_LIMIT: i64 = 100;
/// RabbitMQ 4 would drop a dead letter after 20 deliveries without any limit declared.
const DEAD_DELIVERY_LIMIT: i64 = 1_000_000_000;
/// A command whose sender has stopped waiting is not to be carried out.
pub(super) const COMMAND_TTL_MS: i64 = 60_000;

/// For a declaration from the command line as a whole.
const ONE_OFF_LIMIT: Duration = Duration::from_secs(60);

/// Everything that has to exist on the broker.
#[derive(Debug, Clone, Serialize)]
pub struct Topology {
    /// In the order in which they are declared.
    pub exchanges: Vec<Exchange>,
    /// In the order in which they are declared.
    pub queues: Vec<Queue>,
    /// Made when both ends exist.
    pub bindings: Vec<Binding>,
    #[serde(skip)]
    names: Names,
    #[serde(skip)]
    lanes: Vec<Lane>,
}

/// An exchange, always durable.
#[derive(Debug, Clone, Serialize)]
pub struct Exchange {
    /// Full name.
    pub name: String,
    /// `topic` or `fanout`.
    #[serde(rename = "type")]
    pub kind: Kind,
    /// Beyond durability.
    pub arguments: Vec<Argument>,
    /// What it is there for.
    pub purpose: String,
}

/// How an exchange routes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// By patterns over the routing key.
    Topic,
    /// To everything that is bound.
    Fanout,
}

/// A queue, always durable.
#[derive(Debug, Clone, Serialize)]
pub struct Queue {
    /// Full name.
    pub name: String,
    /// Its type among them.
    pub arguments: Vec<Argument>,
    /// What it is there for.
    pub purpose: String,
}

/// One flag and why it is set.
#[derive(Debug, Clone, Serialize)]
pub struct Argument {
    /// As RabbitMQ spells it.
    pub name: &'static str,
    /// Its value.
    pub value: Value,
    /// Why.
    pub why: &'static str,
}

/// What a flag can hold.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Value {
    /// Words.
    Text(String),
    /// A number; milliseconds where it is a time.
    Number(i64),
}

/// From an exchange to a queue or an exchange.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Binding {
    /// The exchange messages come from.
    pub source: String,
    /// Where they go.
    pub destination: String,
    /// `queue` or `exchange`.
    pub to: Destination,
    /// A pattern, or empty where the exchange does not look at it.
    pub routing_key: String,
}

/// What a binding leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Destination {
    /// A queue.
    Queue,
    /// Another exchange.
    Exchange,
}

impl Topology {
    /// The topology of these lanes, with a delay queue per lane for each of `delays_s` (seconds, 1 to 4,294,967, which
    /// is RabbitMQ's longest TTL).
    pub fn new(prefix: &str, lanes: &[Lane], delays_s: &[u32]) -> Self {
        let names = Names::new(prefix);
        let mut topology = Self {
            exchanges: fixed_exchanges(&names),
            queues: fixed_queues(&names),
            bindings: fixed_bindings(&names),
            names,
            lanes: lanes.to_vec(),
        };
        for lane in lanes {
            topology.add_lane(lane, delays_s);
        }
        topology
    }

    /// The names it is made of.
    pub fn names(&self) -> &Names {
        &self.names
    }

    /// Every `(lane, binding)`: what a later declaration needs to know to unbind what is no longer listed.
    pub fn lane_bindings(&self) -> Vec<(String, String)> {
        let pairs = |lane: &Lane| {
            let name = lane.name.clone();
            lane.bindings.clone().into_iter().map(move |binding| (name.clone(), binding))
        };
        self.lanes.iter().flat_map(pairs).collect()
    }

    fn add_lane(&mut self, lane: &Lane, delays_s: &[u32]) {
        let name = self.names.lane(&lane.name);
        self.exchanges.push(Exchange {
            name: name.clone(),
            kind: Kind::Fanout,
            arguments: Vec::new(),
            purpose: format!("the way back into lane {} that no other lane's bindings can copy", lane.name),
        });
        self.queues.push(lane_queue(&self.names, lane));
        for &delay_s in delays_s {
            self.queues.push(retry_queue(&self.names, lane, delay_s));
        }
        self.bindings.push(to_queue(&name, &name, ""));
        for binding in &lane.bindings {
            self.bindings.push(to_queue(&self.names.jobs(), &name, binding));
        }
    }

    /// Declares everything over a connection of its own, and unbinds each `(lane, binding)` of `previous` that is no longer
    /// listed. New bindings come first, so that a moved binding never leaves a gap.
    ///
    /// # Errors
    /// [`BrokerError::Conflict`] names an object that exists with other settings.
    pub async fn declare(&self, access: &Access, previous: &[(String, String)]) -> Result<(), BrokerError> {
        let connection = connection::open(access, "topology").await?;
        let work = async {
            self.declare_on(&connection).await?;
            self.unbind_leftovers(&connection, previous).await
        };
        let declared = connection::within(ONE_OFF_LIMIT, work).await;
        connection::close(&connection).await;
        declared
    }

    pub(super) async fn declare_on(&self, connection: &Connection) -> Result<(), BrokerError> {
        let channel = open_channel(connection).await?;
        for exchange in &self.exchanges {
            exchange.declare(&channel, Passive::No).await?;
        }
        for queue in &self.queues {
            queue.declare(&channel, Passive::No).await?;
        }
        for binding in &self.bindings {
            binding.bind(&channel).await?;
        }
        Ok(())
    }

    async fn unbind_leftovers(
        &self,
        connection: &Connection,
        previous: &[(String, String)],
    ) -> Result<(), BrokerError> {
        let wanted = self.lane_bindings();
        for (lane, binding) in previous.iter().filter(|pair| !wanted.contains(pair)) {
            let queue = self.names.lane(lane);
            let (Some(source), Some(destination), Some(key)) =
                (short(&self.names.jobs()), short(&queue), short(binding))
            else {
                continue;
            };
            // A channel each: where queue or exchange are gone, the broker may close it, and nothing is left to unbind.
            let channel = open_channel(connection).await?;
            match channel.queue_unbind(destination, source, key, FieldTable::default()).await {
                Ok(()) => tracing::info!(lane, binding, "unbound what the settings no longer list"),
                Err(error) => match BrokerError::about(&format!("the queue {queue}"), &error) {
                    BrokerError::Missing { .. } => {}
                    other => return Err(other),
                },
            }
        }
        Ok(())
    }
}

/// Whether an object is only looked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Passive {
    /// Looked for; missing is an error.
    Yes,
    /// Created unless it is there.
    No,
}

impl Exchange {
    pub(super) async fn declare(&self, channel: &Channel, passive: Passive) -> Result<(), BrokerError> {
        let options =
            ExchangeDeclareOptions { passive: passive == Passive::Yes, durable: true, ..Default::default() };
        let kind = match self.kind {
            Kind::Topic => ExchangeKind::Topic,
            Kind::Fanout => ExchangeKind::Fanout,
        };
        let arguments = table(&self.arguments);
        let declared = channel.exchange_declare(name(&self.name)?, kind, options, arguments).await;
        declared.map_err(|error| BrokerError::about(&format!("the exchange {}", self.name), &error))
    }
}

impl Queue {
    pub(super) async fn declare(&self, channel: &Channel, passive: Passive) -> Result<(), BrokerError> {
        let options =
            QueueDeclareOptions { passive: passive == Passive::Yes, durable: true, ..Default::default() };
        let declared =
            channel.queue_declare(self.name.as_str().into(), options, table(&self.arguments)).await;
        declared.map(drop).map_err(|error| BrokerError::about(&format!("the queue {}", self.name), &error))
    }
}

impl Binding {
    async fn bind(&self, channel: &Channel) -> Result<(), BrokerError> {
        let (source, destination, key) =
            (name(&self.source)?, name(&self.destination)?, name(&self.routing_key)?);
        let bound = match self.to {
            Destination::Queue => {
                let options = QueueBindOptions::default();
                channel.queue_bind(destination, source, key, options, FieldTable::default()).await
            }
            Destination::Exchange => {
                let options = ExchangeBindOptions::default();
                channel.exchange_bind(destination, source, key, options, FieldTable::default()).await
            }
        };
        bound.map_err(|error| {
            BrokerError::about(&format!("the binding of {} to {}", self.destination, self.source), &error)
        })
    }
}

pub(super) async fn open_channel(connection: &Connection) -> Result<Channel, BrokerError> {
    connection.create_channel().await.map_err(|error| BrokerError::about("a channel", &error))
}

pub(super) async fn open_confirming_channel(connection: &Connection) -> lapin::Result<Channel> {
    let channel = connection.create_channel().await?;
    channel.confirm_select(ConfirmSelectOptions::default()).await?;
    Ok(channel)
}

/// AMQP's short strings hold 255 bytes at most.
pub(super) fn short(text: &str) -> Option<ShortString> {
    ShortString::try_new(text).ok()
}

/// The same, for a name that cannot be done without.
pub(super) fn name(text: &str) -> Result<ShortString, BrokerError> {
    short(text).ok_or_else(|| BrokerError::Refused {
        object: crate::model::text::bounded(text, 80),
        detail: "the name is longer than 255 bytes; choose a shorter amqp.prefix".to_owned(),
    })
}

fn table(arguments: &[Argument]) -> FieldTable {
    let mut table = FieldTable::default();
    for argument in arguments {
        let value = match &argument.value {
            Value::Text(text) => AMQPValue::LongString(text.as_str().into()),
            Value::Number(number) => AMQPValue::LongLongInt(*number),
        };
        table.insert(argument.name.into(), value);
    }
    table
}

fn text(name: &'static str, value: &str, why: &'static str) -> Argument {
    Argument { name, value: Value::Text(value.to_owned()), why }
}

fn number(name: &'static str, value: i64, why: &'static str) -> Argument {
    Argument { name, value: Value::Number(value), why }
}

fn to_queue(source: &str, queue: &str, routing_key: &str) -> Binding {
    Binding {
        source: source.to_owned(),
        destination: queue.to_owned(),
        to: Destination::Queue,
        routing_key: routing_key.to_owned(),
    }
}

fn fixed_exchanges(names: &Names) -> Vec<Exchange> {
    let exchange = |name, kind, arguments, purpose: &str| Exchange {
        name,
        kind,
        arguments,
        purpose: purpose.to_owned(),
    };
    let alternate = text(
        "alternate-exchange",
        &names.unrouted(),
        "a job whose routing key no lane takes becomes a dead letter instead of vanishing",
    );
    vec![
        exchange(names.dead(), Kind::Fanout, vec![], "dead letters, whoever kills them"),
        exchange(names.unrouted(), Kind::Fanout, vec![], "jobs whose routing key no lane takes"),
        exchange(names.jobs(), Kind::Topic, vec![alternate], "publishers publish here"),
        exchange(names.events(), Kind::Topic, vec![], "outcomes, routed by their type"),
    ]
}

fn quorum() -> Argument {
    text("x-queue-type", "quorum", "a job survives the loss of a node, and deliveries are counted")
}

fn dead_letters_to(exchange: &str, why: &'static str) -> [Argument; 3] {
    [
        text("x-dead-letter-exchange", exchange, why),
        text(
            "x-dead-letter-strategy",
            "at-least-once",
            "the queue keeps a message until its next queue has confirmed it",
        ),
        text("x-overflow", "reject-publish", "without it at-least-once silently falls back to at-most-once"),
    ]
}

fn lane_queue(names: &Names, lane: &Lane) -> Queue {
    let mut arguments = vec![quorum()];
    arguments.extend(dead_letters_to(&names.dead(), "what the delivery limit kills is archived, not lost"));
    arguments.push(number(
        "x-delivery-limit",
        LANE_DELIVERY_LIMIT,
        "ends crash loops; high, because a crash charges every job that was in its worker's hands",
    ));
    Queue { name: names.lane(&lane.name), arguments, purpose: format!("work of lane {}", lane.name) }
}

fn retry_queue(names: &Names, lane: &Lane, delay_s: u32) -> Queue {
    let ttl = "one delay per queue: RabbitMQ expires messages at the head of a queue only";
    let mut arguments = vec![quorum(), number("x-message-ttl", i64::from(delay_s) * 1000, ttl)];
    let back = "straight into its lane: the topic exchange could copy it, or find no lane for it";
    arguments.extend(dead_letters_to(&names.lane(&lane.name), back));
    let purpose = format!("jobs of lane {} that wait {delay_s} s", lane.name);
    Queue { name: names.retry(&lane.name, delay_s), arguments, purpose }
}

fn fixed_queues(names: &Names) -> Vec<Queue> {
    let limit = number(
        "x-delivery-limit",
        DEAD_DELIVERY_LIMIT,
        "a dead letter has nowhere further to go, so it must never be dropped; RabbitMQ 4's own default is 20",
    );
    let classic = text(
        "x-queue-type",
        "classic",
        "short-lived and answered once; said aloud because a host can default to quorum",
    );
    let ttl =
        number("x-message-ttl", COMMAND_TTL_MS, "a command whose sender no longer waits is not carried out");
    vec![
        Queue {
            name: names.dead(),
            arguments: vec![quorum(), limit],
            purpose: "dead letters on their way to the archive".to_owned(),
        },
        Queue { name: names.control(), arguments: vec![classic, ttl], purpose: "commands".to_owned() },
    ]
}

fn fixed_bindings(names: &Names) -> Vec<Binding> {
    let unrouted = Binding {
        source: names.unrouted(),
        destination: names.dead(),
        to: Destination::Exchange,
        routing_key: String::new(),
    };
    vec![to_queue(&names.dead(), &names.dead(), ""), unrouted]
}

/// The printed form of `sendoff topology show`.
impl fmt::Display for Topology {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for exchange in &self.exchanges {
            let kind = if exchange.kind == Kind::Topic { "topic" } else { "fanout" };
            writeln!(f, "exchange {} ({kind}, durable): {}", exchange.name, exchange.purpose)?;
            write_arguments(f, &exchange.arguments)?;
        }
        for queue in &self.queues {
            writeln!(f, "queue {} (durable): {}", queue.name, queue.purpose)?;
            write_arguments(f, &queue.arguments)?;
        }
        for binding in &self.bindings {
            let to = if binding.to == Destination::Queue { "queue" } else { "exchange" };
            write!(f, "binding {} -> {to} {}", binding.source, binding.destination)?;
            if !binding.routing_key.is_empty() {
                write!(f, " by {}", binding.routing_key)?;
            }
            writeln!(f)?;
        }
        Ok(())
    }
}

fn write_arguments(f: &mut fmt::Formatter<'_>, arguments: &[Argument]) -> fmt::Result {
    for argument in arguments {
        match &argument.value {
            Value::Text(text) => write!(f, "  {} = {text}", argument.name)?,
            Value::Number(number) => write!(f, "  {} = {number}", argument.name)?,
        }
        writeln!(f, ": {}", argument.why)?;
    }
    Ok(())
}

#[cfg(test)]
#[path = "topology_tests.rs"]
mod tests;
