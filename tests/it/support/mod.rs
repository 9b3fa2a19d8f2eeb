//! What the tests stand on.

pub mod broker;
pub mod proxy;
