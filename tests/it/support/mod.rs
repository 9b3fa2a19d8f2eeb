//! What the tests are run against.
pub mod database;
pub mod dns;
