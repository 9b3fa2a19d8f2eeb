//! Black-box tests against real services, in one binary.

mod archive;
mod archive_search;
mod archive_store;
mod broker;
mod cancelling;
mod cli;
mod configs;
mod core;
mod crashes;
mod dead_cli;
mod delivery;
mod documents;
mod forgetting;
mod health;
mod hostile;
mod ledger;
mod losses;
mod once;
mod outages;
mod parking;
#[cfg(feature = "fault-injection")]
mod poison;
mod releasing;
mod replay;
mod replies;
mod rules;
mod smtp_sessions;
mod stopping;
mod support;
mod tls;
mod topology;
