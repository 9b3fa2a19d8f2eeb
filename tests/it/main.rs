//! Black-box tests against real services, in one binary.

mod archive;
mod archive_search;
mod archive_store;
mod broker;
mod canary;
mod cli;
mod configs;
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
