//! Faults on purpose: where a job may ask for a panic or for the process's death, so that tests see what becomes of it.
//! Guarantee: without the feature `fault-injection`, which no shipped build has, every hook is empty and no job can ask.
//!
//! A job asks with its kind: `fault.<place>.panic` each time it comes by, `fault.<place>.panic-once` the first time in
//! this process, `fault.<place>.abort` for the end of the process.

/// Whether this build can be asked for faults.
pub const BUILT_IN: bool = cfg!(feature = "fault-injection");

/// Where on a delivery's way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// Before the body is read.
    Parse,
    /// Before the claim.
    TakeUp,
    /// Claimed, nothing tried yet.
    Claimed,
    /// Before the message is composed.
    Compose,
    /// Before a session is asked for.
    Attempt,
    /// The server has answered; nobody knows it yet but the attempt.
    Answered,
    /// The outcome is known, and about to be recorded.
    Record,
    /// Recorded, and about to be handed over.
    HandOver,
}

/// Does what the job asks for at this place.
#[cfg(not(feature = "fault-injection"))]
#[inline(always)]
pub fn strike(_: Place, _: &[u8]) {}

/// Does what the job asks for at this place.
#[cfg(feature = "fault-injection")]
pub fn strike(place: Place, body: &[u8]) {
    use std::collections::HashSet;
    use std::sync::{Mutex, PoisonError};

    static STRUCK: Mutex<Option<HashSet<Vec<u8>>>> = Mutex::new(None);
    let asks = |fault: &str| {
        let kind = format!("\"fault.{}.{fault}\"", place.name());
        body.windows(kind.len()).any(|part| part == kind.as_bytes())
    };
    if asks("abort") {
        std::process::abort();
    }
    let first_time = || {
        let mut struck = STRUCK.lock().unwrap_or_else(PoisonError::into_inner);
        struck.get_or_insert_default().insert(body.to_vec())
    };
    if asks("panic") || (asks("panic-once") && first_time()) {
        // Long enough not to be a literal, as a message with something of the job in it would not be.
        panic!("{}", String::from_utf8_lossy(body));
    }
}

#[cfg(feature = "fault-injection")]
impl Place {
    fn name(self) -> &'static str {
        match self {
            Self::Parse => "parse",
            Self::TakeUp => "take-up",
            Self::Claimed => "claimed",
            Self::Compose => "compose",
            Self::Attempt => "attempt",
            Self::Answered => "answered",
            Self::Record => "record",
            Self::HandOver => "hand-over",
        }
    }
}
