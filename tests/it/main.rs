//! Black-box tests against real services, in one binary.

mod broker;
mod cli;
mod configs;
mod core;
mod crashes;
mod delivery;
mod ledger;
mod losses;
mod once;
mod replies;
mod smtp_sessions;
mod stopping;
mod support;
mod tls;
mod topology;
