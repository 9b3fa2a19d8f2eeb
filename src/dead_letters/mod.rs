//! Dead letters, where the broker and the archive meet: in by the archivist, out by a replay, or, where they were parked, by
//! themselves.
//! Guarantee: a letter leaves the broker only after the archive has committed it, and the archive only after the ledger has
//! recorded what is published.

use std::collections::BTreeMap;

use crate::model::failure::Reason;
use crate::model::letter::Owner;
use crate::store::retrying;

mod archivist;
pub mod discard;
mod letter;
mod release;
pub mod replay;

pub use archivist::{Archivist, OnLoss, PREFETCH};
pub use release::Releaser;

/// How many letters, by last death and owner.
pub type Groups = BTreeMap<(Reason, Owner), u64>;
