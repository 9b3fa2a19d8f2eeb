//! Black-box tests against real services, in one binary.
mod ledger;
mod support;
