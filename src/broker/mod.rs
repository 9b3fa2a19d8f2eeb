//! RabbitMQ: jobs in, retries and dead letters out, commands, events. The only folder that knows lapin.
//! Guarantee: no type of the driver leaves this folder, and no message is acknowledged before what follows from it is safe.

mod acks;
mod check;
mod connection;
mod control;
mod expiry;
mod headers;
mod held;
mod jobs;
mod link;
mod names;
mod publisher;
mod rpc;
mod supervisor;
mod topology;
pub mod wire;

pub use check::{Finding, Standing, inspect};
pub use connection::{Access, AmqpUrl, BrokerError, InvalidAmqpUrl, InvalidRoots};
pub use control::CommandMeta;
pub use headers::{Carried, DeadLetter, Death, JobHeaders, Received, Scalar};
pub use jobs::{Deliveries, Delivery, DropHook, NotHandedOver, Settled};
pub use link::BrokerState;
pub use names::Names;
pub use publisher::{PublishError, Publisher};
pub use rpc::{Followed, Follower, JobSender, RpcError, call};
pub use supervisor::{Broker, BrokerSettings};
pub use topology::{Argument, Binding, Destination, Exchange, Kind, Queue, Topology, Value};
