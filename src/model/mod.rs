//! The pure core: what a job is, what can go wrong, and what is decided about it.
//! Guarantee: no IO, no async, no clock of its own, and nothing imported from the rest of the crate.

pub mod address;
pub mod advice;
pub mod cancelling;
pub mod event;
pub mod event_schema;
pub mod failure;
pub mod health;
pub mod job;
pub mod lanes;
pub mod ledger;
pub mod letter;
pub mod organization;
pub mod parking;
pub mod policy;
pub mod provider;
pub mod ramp;
pub mod rate;
pub mod replay;
pub mod schedule;
pub mod schema;
pub mod sender_records;
pub mod smtp_settings;
pub mod text;
