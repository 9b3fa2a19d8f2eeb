//! Black-box tests against real services, in one binary.
mod configs;

mod cli;
mod ledger;
mod support;
