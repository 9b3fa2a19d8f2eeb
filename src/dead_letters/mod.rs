//! Dead letters, where the broker and the archive meet: in by the archivist.
//! Guarantee: a letter leaves the broker only after the archive has committed it.

mod archivist;
mod letter;

pub use archivist::{Archivist, OnLoss, PREFETCH};
