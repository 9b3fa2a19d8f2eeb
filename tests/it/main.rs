//! Black-box tests against real services, in one binary.

mod admin_cli;
mod archive;
mod archive_search;
mod archive_store;
mod auth_trouble;
mod broker;
mod cancelling;
mod cli;
mod configs;
mod connection_test;
mod core;
mod crashes;
mod dead_cli;
mod delivery;
mod documents;
mod forgetting;
mod hostile;
mod key_rotation;
mod ledger;
mod losses;
mod once;
mod outages;
#[cfg(feature = "fault-injection")]
mod poison;
mod replay;
mod replies;
mod rules;
mod smtp_sessions;
mod stopping;
mod support;
mod tls;
mod topology;
