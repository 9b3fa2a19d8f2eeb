//! Black-box tests against real services, in one binary.

mod broker;
mod cli;
mod configs;
mod crashes;
mod delivery;
mod ledger;
mod stopping;
mod support;
