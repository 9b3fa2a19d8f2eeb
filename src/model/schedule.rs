//! How long a job waits before its next attempt, and which delay queue holds it meanwhile.
//! Guarantee: every wait is one of the delays that the broker has a queue for.

use std::time::Duration;

/// Delays for work that is put aside without an attempt being charged (contract section 2), in seconds.
pub const ASIDE_S: [u32; 4] = [5, 30, 120, 600];

/// `retry.schedule_s`: the wait before attempt 2, 3, …
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Schedule {
    steps_s: Vec<u32>,
}

impl Schedule {
    /// Takes the configured steps, in seconds; the settings have checked that each is positive.
    pub fn new(steps_s: Vec<u32>) -> Self {
        Self { steps_s }
    }

    /// Every delay that needs a queue, ascending, each once.
    pub fn delays_s(&self) -> Vec<u32> {
        let mut delays: Vec<u32> = self.steps_s.iter().copied().chain(ASIDE_S).collect();
        delays.sort_unstable();
        delays.dedup();
        delays
    }

    /// The wait after so many attempts, in seconds; `None` when the schedule has ended.
    pub fn wait_s(&self, attempts: u32) -> Option<u32> {
        let index = usize::try_from(attempts).ok()?.checked_sub(1)?;
        self.steps_s.get(index).copied()
    }

    /// The delay queue for a wait: the longest that does not overshoot it, or the shortest there is. A job that comes
    /// back before its time is put aside again.
    pub fn queue_for_s(&self, wait: Duration) -> u32 {
        let delays = self.delays_s();
        let within = delays.iter().rev().find(|delay| Duration::from_secs(u64::from(**delay)) <= wait);
        within.or(delays.first()).copied().unwrap_or(ASIDE_S[0])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_schedule_ends_after_its_last_step() {
        let schedule = Schedule::new(vec![10, 60]);
        assert_eq!([0, 1, 2, 3].map(|n| schedule.wait_s(n)), [None, Some(10), Some(60), None]);
        assert_eq!(schedule.delays_s(), [5, 10, 30, 60, 120, 600]);
    }

    #[test]
    fn a_wait_takes_the_longest_queue_that_does_not_overshoot() {
        let schedule = Schedule::new(vec![10, 7200]);
        let queue = |s| schedule.queue_for_s(Duration::from_secs(s));
        assert_eq!([0, 5, 9, 10, 3600, 9000].map(queue), [5, 5, 5, 10, 600, 7200]);
    }
}
