//! The mail server's side: what is sent and how.
//! Guarantee: nothing of this folder decides whether to retry; it says what happened.

pub mod compose;
