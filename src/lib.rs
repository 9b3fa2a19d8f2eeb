//! Sendoff: a background email worker. Jobs come from RabbitMQ and leave through each organization's own SMTP server.

pub mod broker;
pub mod cli;
pub mod clock;
pub mod control;
pub mod egress;
pub mod http;
pub mod model;
pub mod secrets;
pub mod settings;
pub mod shutdown;
pub mod smtp;
pub mod store;
pub mod telemetry;
