//! Black-box tests against real services, in one binary.

mod broker;
mod cli;
mod configs;
mod core;
mod delivery;
mod ledger;
mod smtp_sessions;
mod support;
