//! When the jobs that were put aside for one destination come back, and for how long the next one is put aside.
//! Guarantee: a delay is one of the broker's, and not shorter than a breaker's pause where there is one that long; memory is
//! the same however many jobs are aside.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

use crate::model::schedule::ASIDE_S;

/// Returns are counted by slots of so many seconds.
const SLOT_S: u32 = 1;
const SHORTEST_S: u32 = ASIDE_S[0];
const LONGEST_S: u32 = ASIDE_S[ASIDE_S.len() - 1];
const BEFORE_LONGEST_S: u32 = ASIDE_S[ASIDE_S.len() - 2];
/// Slots of the longest delay, and the one that has begun.
const SLOTS: usize = (LONGEST_S / SLOT_S) as usize + 1;
/// Returns in one slot from which on those for whom it is all the same are spread over two delays:
/// they would come back as the wave that they went as.
const WAVE: usize = 1000;

/// The expected returns of one destination's jobs.
#[derive(Debug)]
pub struct Returns {
    /// The first slot has begun; empty while nothing is aside.
    slots: VecDeque<u32>,
    begun: Instant,
}

/// What the choice of a delay depends on.
#[derive(Debug, Clone, Copy)]
pub struct Outlook {
    /// For so long the breaker refuses; zero when it is closed.
    pub pause: Duration,
    /// From one end of an attempt to the next.
    pub pace: Duration,
    /// Jobs that wait in line.
    pub line: usize,
}

impl Returns {
    /// Nothing is aside.
    pub fn new(now: Instant) -> Self {
        Self { slots: VecDeque::new(), begun: now }
    }

    /// Whether nothing is expected to come back any more.
    pub fn is_empty(&mut self, now: Instant) -> bool {
        self.advance(now);
        self.slots.is_empty()
    }

    /// Puts one job aside; says for how many seconds.
    ///
    /// Behind an open breaker by when it asks again. Else what comes back soon is to keep the destination busy, and everything
    /// beyond is to lie still for as long as it can: the longest delay through which there is work without a gap, or which is the
    /// first to bring some at its end.
    pub fn put_aside(&mut self, outlook: Outlook, now: Instant) -> u32 {
        self.advance(now);
        let delay_s = self.choose(outlook);
        if self.slots.is_empty() {
            self.slots.resize(SLOTS, 0);
        }
        let slot = slot_of(delay_s);
        self.slots[slot] = self.slots[slot].saturating_add(1);
        delay_s
    }

    fn choose(&self, outlook: Outlook) -> u32 {
        if !outlook.pause.is_zero() {
            let ready = |delay_s: &u32| Duration::from_secs((*delay_s).into()) >= outlook.pause;
            return ASIDE_S.into_iter().find(ready).unwrap_or(LONGEST_S);
        }
        let per_slot = f64::from(SLOT_S) / outlook.pace.as_secs_f64();
        let busy_s = self.busy_s(outlook.line, per_slot);
        let delay_s =
            ASIDE_S.windows(2).rev().find(|pair| busy_s >= pair[1]).map_or(SHORTEST_S, |pair| pair[1]);
        let is_wave = delay_s == LONGEST_S && self.at(LONGEST_S) >= WAVE.max(per_slot as usize);
        if is_wave && self.at(BEFORE_LONGEST_S) < self.at(LONGEST_S) {
            return BEFORE_LONGEST_S;
        }
        delay_s
    }

    /// For how long there is work without a gap: in line, and coming back in time. What the slot that has begun holds is taken
    /// for returned: it is in line, or about to be put aside again. A gap before the shortest delay can be filled by nobody.
    fn busy_s(&self, line: usize, per_slot: f64) -> u32 {
        let mut ready = line as f64;
        for slot in 1..SLOTS {
            ready -= per_slot;
            if ready < 0.0 && slot > slot_of(SHORTEST_S) {
                return (slot - 1) as u32 * SLOT_S;
            }
            ready = ready.max(0.0);
            ready += self.slots.get(slot).copied().unwrap_or_default() as f64;
        }
        LONGEST_S
    }

    /// Jobs that come back in the same slot as one with this delay.
    fn at(&self, delay_s: u32) -> usize {
        self.slots.get(slot_of(delay_s)).map_or(0, |count| *count as usize)
    }

    fn advance(&mut self, now: Instant) {
        let slot = Duration::from_secs(SLOT_S.into());
        let passed = (now.saturating_duration_since(self.begun).as_secs() / u64::from(SLOT_S)) as usize;
        if self.slots.is_empty() || passed >= SLOTS {
            self.slots.clear();
            self.begun = now;
            return;
        }
        if passed > 0 {
            self.slots.drain(..passed);
            self.slots.resize(SLOTS, 0);
            self.begun += slot * passed as u32;
            if self.slots.iter().all(|count| *count == 0) {
                self.slots.clear();
            }
        }
    }
}

/// The slot in which a job put aside now comes back, counted from the one that has begun.
fn slot_of(delay_s: u32) -> usize {
    (delay_s / SLOT_S) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outlook(pace_ms: u64) -> Outlook {
        Outlook { pause: Duration::ZERO, pace: Duration::from_millis(pace_ms), line: 0 }
    }

    fn put(returns: &mut Returns, count: usize, outlook: Outlook, now: Instant) -> [usize; 4] {
        let mut counts = [0; 4];
        for _ in 0..count {
            let delay_s = returns.put_aside(outlook, now);
            let index = ASIDE_S.iter().position(|known| *known == delay_s).expect("one of the broker's");
            counts[index] += 1;
        }
        counts
    }

    #[test]
    fn the_first_to_go_come_back_soon_and_a_flood_lies_still_for_as_long_as_it_can() {
        let now = Instant::now();
        let mut returns = Returns::new(now);
        let counts = put(&mut returns, 1_500, outlook(1000), now);
        assert_eq!(counts.iter().sum::<usize>(), 1_500);
        assert!(counts[0] >= 5 && counts[0] <= 30, "{counts:?}");
        assert!(counts[0] + counts[1] <= 120, "{counts:?}");
        assert!(counts[3] >= 1_500 - 600, "{counts:?}");
    }

    #[test]
    fn nobody_comes_back_before_the_breaker_asks_again() {
        let now = Instant::now();
        let mut returns = Returns::new(now);
        let shut = Outlook { pause: Duration::from_secs(20), ..outlook(20) };
        let counts = put(&mut returns, 1000, shut, now);
        assert_eq!(counts[0], 0);
        assert!(counts[1] > 0, "{counts:?}");
        let longer = Outlook { pause: Duration::from_secs(601), ..outlook(20) };
        assert_eq!(returns.put_aside(longer, now), 600);
    }

    #[test]
    fn what_has_come_back_makes_room_for_others() {
        let mut now = Instant::now();
        let mut returns = Returns::new(now);
        assert_eq!(put(&mut returns, 1, outlook(10_000), now), [1, 0, 0, 0]);
        put(&mut returns, 100, outlook(10_000), now);
        now += Duration::from_secs(700);
        assert!(returns.is_empty(now));
        assert_eq!(put(&mut returns, 1, outlook(10_000), now), [1, 0, 0, 0]);
    }

    #[test]
    fn a_great_wave_is_spread_over_two_delays() {
        let now = Instant::now();
        let mut returns = Returns::new(now);
        let counts = put(&mut returns, 30_000, outlook(60_000), now);
        assert!(counts[3] <= 20_000 && counts[2] >= 10_000, "{counts:?}");
    }
}
