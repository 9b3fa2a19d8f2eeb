//! The message broker's side: jobs as they are published.
//! Guarantee: what leaves this folder as a job has been validated.

pub mod wire;
