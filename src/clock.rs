//! Time and randomness as parameters: the only place that reads the system's clock or its random source.
//! Guarantee: everything else in the crate takes a [`Clock`], so a test can choose the time.

use std::sync::Arc;

use time::OffsetDateTime;
use uuid::Uuid;

/// Source of the wall-clock time (UTC) and of randomness.
#[derive(Clone)]
pub struct Clock(Source);

#[derive(Clone)]
enum Source {
    System,
    Manual(Arc<std::sync::Mutex<OffsetDateTime>>),
}

impl Clock {
    /// The machine's clock.
    pub fn system() -> Self {
        Self(Source::System)
    }

    /// A clock that stands still until [`Clock::set`] moves it.
    pub fn manual(now: OffsetDateTime) -> Self {
        Self(Source::Manual(Arc::new(std::sync::Mutex::new(now))))
    }

    /// The time now, in UTC.
    #[expect(clippy::disallowed_methods, reason = "this is the one place that reads the system's clock")]
    pub fn now(&self) -> OffsetDateTime {
        match &self.0 {
            Source::System => OffsetDateTime::now_utc(),
            Source::Manual(at) => *at.lock().expect("the clock's lock is never held across a panic"),
        }
    }

    /// Moves a manual clock; the system's clock does not move for anybody.
    pub fn set(&self, now: OffsetDateTime) {
        if let Source::Manual(at) = &self.0 {
            *at.lock().expect("the clock's lock is never held across a panic") = now;
        }
    }

    /// A new random identifier whose order follows the time of its making (RFC 9562 section 5.7).
    #[expect(clippy::disallowed_methods, reason = "this is the one place that draws random identifiers")]
    pub fn new_id(&self) -> Uuid {
        Uuid::now_v7()
    }
}

impl std::fmt::Debug for Clock {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.0 {
            Source::System => f.write_str("Clock(system)"),
            Source::Manual(_) => write!(f, "Clock({})", self.now()),
        }
    }
}
