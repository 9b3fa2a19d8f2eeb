//! Black box, against real services: one binary, so that it links once.

mod broker;
mod cli;
mod ledger;
mod support;
