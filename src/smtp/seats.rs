//! Seats: how many connections an account may have open, idle ones and those that say goodbye included.
//! Guarantee: a seat is taken before its connection is opened and comes back when that is closed, by a panic too.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

/// The seats of one account. How many there are may change at any time; who has one keeps it.
#[derive(Debug, Default)]
pub struct Seats {
    count: Mutex<Count>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct Count {
    allowed: usize,
    taken: usize,
}

/// The right to one open connection.
#[derive(Debug)]
pub(super) struct Seat(Arc<Seats>);

impl Drop for Seat {
    fn drop(&mut self) {
        self.0.count().taken -= 1;
        self.0.changed.notify_waiters();
    }
}

impl Seats {
    /// From here on so many connections may be open.
    pub fn allow(&self, connections: usize) {
        self.count().allowed = connections;
        self.changed.notify_waiters();
    }

    /// Connections that are open.
    pub fn taken(&self) -> usize {
        self.count().taken
    }

    /// Whether more are open than may be.
    pub fn is_crowded(&self) -> bool {
        let count = self.count();
        count.taken > count.allowed
    }

    /// So many more are taken than may be.
    pub(super) fn excess(&self) -> usize {
        let count = self.count();
        count.taken.saturating_sub(count.allowed)
    }

    pub(super) fn take(self: &Arc<Self>) -> Option<Seat> {
        let mut count = self.count();
        if count.taken >= count.allowed {
            return None;
        }
        count.taken += 1;
        Some(Seat(self.clone()))
    }

    /// Ends when a seat has come back, or there are more, since it was made and enabled.
    pub(super) fn changed(&self) -> tokio::sync::futures::Notified<'_> {
        self.changed.notified()
    }

    fn count(&self) -> MutexGuard<'_, Count> {
        self.count.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Seat {
    /// Whether it is one of these.
    pub(super) fn is_of(&self, seats: &Arc<Seats>) -> bool {
        Arc::ptr_eq(&self.0, seats)
    }

    /// Whether its connection is to be closed as soon as it carries no message.
    pub(super) fn is_crowded(&self) -> bool {
        self.0.is_crowded()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_has_a_seat_keeps_it_when_there_are_fewer() {
        let seats = Arc::new(Seats::default());
        assert!(seats.take().is_none(), "none before any is allowed");
        seats.allow(2);
        let held = [seats.take().unwrap(), seats.take().unwrap()];
        assert!(seats.take().is_none() && !held[0].is_crowded());
        seats.allow(1);
        assert!(held[0].is_crowded() && seats.taken() == 2);
        let [one, other] = held;
        drop(one);
        assert!(!other.is_crowded() && seats.take().is_none());
        drop(other);
        assert!(seats.take().is_some());
    }
}
