//! Black-box tests against real services, in one binary.

mod cli;
mod ledger;
mod support;
