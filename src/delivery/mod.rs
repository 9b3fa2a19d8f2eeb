//! The core: one delivery's way from the lane to its outcome.
//! Guarantee: this is the only place where the broker, the ledger and SMTP meet over a job.

pub mod admission;
mod aside;
pub mod attempt;
pub mod blame;
mod conclude;
pub mod database;
pub mod debts;
pub mod destination;
pub mod dispatch;
pub mod fairness;
mod gatekeeping;
pub mod in_hand;
pub mod lanes;
pub mod probing;
pub mod quarantine;
mod rate;
pub mod rates;
mod recovery;
pub mod route;
pub mod settle;
pub mod trail;
pub mod weights;
pub mod worker;
