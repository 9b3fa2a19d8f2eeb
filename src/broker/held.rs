//! The bytes of the bodies in hand, over all queues: consumers pause when there are too many.
//! Guarantee: what is counted is counted until it is dropped. The broker knows no prefetch in bytes and the library reads
//! whatever comes, so a consumer that meets great bodies is cancelled, sends back what is on its way, and begins anew with a
//! prefetch that fits; what comes in meanwhile is not kept.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::Notify;

/// Above so many bytes consumers pause, until it is half of that.
const HELD_MAX: usize = 128 << 20;
/// A body counts for so much in the mean of its queue's.
const WEIGHT: f64 = 1.0 / 16.0;

/// The bytes of all bodies in hand; cheap to clone.
#[derive(Clone, Default)]
pub(super) struct Held(Arc<Counter>);

#[derive(Default)]
struct Counter {
    bytes: AtomicUsize,
    freed: Notify,
}

/// One body's share, for as long as it lives.
#[derive(Debug)]
pub(super) struct HeldBytes {
    counter: Arc<Counter>,
    bytes: usize,
}

impl std::fmt::Debug for Counter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Counter({})", self.bytes.load(Ordering::Relaxed))
    }
}

impl Held {
    /// Counts a body.
    pub fn take(&self, bytes: usize) -> HeldBytes {
        self.0.bytes.fetch_add(bytes, Ordering::SeqCst);
        HeldBytes { counter: self.0.clone(), bytes }
    }

    fn is_over(&self) -> bool {
        self.0.bytes.load(Ordering::SeqCst) > HELD_MAX
    }

    /// Returns when there is room for more.
    pub async fn room(&self) {
        loop {
            let freed = self.0.freed.notified();
            let mut freed = std::pin::pin!(freed);
            freed.as_mut().enable();
            if self.0.bytes.load(Ordering::SeqCst) <= HELD_MAX / 2 {
                return;
            }
            freed.await;
        }
    }
}

impl Drop for HeldBytes {
    fn drop(&mut self) {
        let before = self.counter.bytes.fetch_sub(self.bytes, Ordering::SeqCst);
        if before > HELD_MAX / 2 && before - self.bytes <= HELD_MAX / 2 {
            self.counter.freed.notify_waiters();
        }
    }
}

/// The prefetch that the bodies of a queue allow.
pub(super) struct Appetite {
    configured: u16,
    prefetch: u16,
    mean_bytes: f64,
}

impl Appetite {
    /// Nothing is known of the bodies.
    pub fn new(configured: u16) -> Self {
        Self { configured, prefetch: configured, mean_bytes: 0.0 }
    }

    /// The prefetch to consume with.
    pub fn prefetch(&self) -> u16 {
        self.prefetch
    }

    /// Looks at one more body, which is counted already; whether the consumer has to begin anew.
    pub fn is_wrong_after(&mut self, bytes: usize, held: &Held) -> bool {
        self.mean_bytes += (bytes as f64 - self.mean_bytes) * WEIGHT;
        let fits = (HELD_MAX / 2) as f64 / self.mean_bytes.max(1.0);
        let fits = (fits as u16).clamp(1, self.configured);
        let is_wrong = held.is_over() || fits >= self.prefetch.saturating_mul(2).min(self.configured);
        let changes = is_wrong && (held.is_over() || fits != self.prefetch);
        if changes {
            self.prefetch = fits;
        }
        changes
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    const GREAT: usize = 8 << 20;

    #[test]
    fn small_bodies_leave_the_prefetch_as_it_is_configured() {
        let (held, mut appetite) = (Held::default(), Appetite::new(512));
        let bodies: Vec<_> = (0..5000)
            .map(|_| {
                let body = held.take(5000);
                assert!(!appetite.is_wrong_after(5000, &held));
                body
            })
            .collect();
        assert_eq!(appetite.prefetch(), 512);
        drop(bodies);
    }

    #[test]
    fn great_bodies_make_the_prefetch_small_and_small_ones_make_it_great_again() {
        let (held, mut appetite) = (Held::default(), Appetite::new(512));
        let mut bodies = Vec::new();
        while !appetite.is_wrong_after(GREAT, &held) {
            bodies.push(held.take(GREAT));
            assert!(bodies.len() * GREAT <= HELD_MAX + GREAT);
        }
        assert!((8..20).contains(&appetite.prefetch()), "{}", appetite.prefetch());
        assert!(held.room().now_or_never().is_none());
        bodies.truncate(bodies.len() / 2 - 1);
        assert!(held.room().now_or_never().is_some());
        bodies.clear();
        let again = (0..1000).filter(|_| appetite.is_wrong_after(5000, &held)).count();
        assert_eq!(appetite.prefetch(), 512);
        assert!(again <= 6, "{again} times anew");
    }

    #[tokio::test]
    async fn who_waits_for_room_is_woken_by_the_body_that_makes_it() {
        let held = Held::default();
        let (first, second) = (held.take(HELD_MAX / 2), held.take(HELD_MAX / 2 + 1));
        let mut room = Box::pin(held.room());
        assert!(room.as_mut().now_or_never().is_none());
        drop(first);
        assert!(room.as_mut().now_or_never().is_none());
        drop(second);
        room.await;
    }
}
