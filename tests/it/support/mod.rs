//! What the tests stand on.

pub mod broker;
pub mod database;
pub mod dns;
pub mod proxy;
