//! What the tests are run against: servers of their own, scripted where they must misbehave.

pub mod broker;
pub mod certs;
pub mod claims;
pub mod connector;
pub mod database;
pub mod dns;
pub mod letters;
pub mod providers;
pub mod proxy;
pub mod smtp_server;
pub mod story;
pub mod world;
