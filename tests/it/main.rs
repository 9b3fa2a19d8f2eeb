//! Black-box tests against real services, in one binary.
mod configs;
mod ledger;
mod support;
