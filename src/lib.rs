//! Sendoff: a background email worker. Jobs come from RabbitMQ and leave through each organization's own SMTP server.

pub mod clock;
pub mod egress;
pub mod model;
pub mod smtp;
pub mod store;
