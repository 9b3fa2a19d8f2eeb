//! Sealing of credentials and dead letters under a ring of AES-256-GCM keys; the only folder that knows the cipher.
//! Guarantee: a sealed value opens only as the same field of the same organization or letter, under the key that sealed it,
//! and unchanged to the last bit. Neither keys nor plaintexts show in `Debug`, in errors or in messages.

mod key_ring;
mod sealed;

pub use key_ring::{KeyError, KeyRing};
pub use sealed::{Context, Field, LetterField, OpenError, ResealError};
