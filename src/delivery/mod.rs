//! The core: one delivery's way from the lane to its outcome.

pub mod destination;
pub mod dispatch;
