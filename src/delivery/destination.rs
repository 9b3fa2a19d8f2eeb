//! One destination's window and breaker: how many attempts may run at once, and whether any may.
//! Guarantee: a pure state machine; time comes in as a parameter and nothing waits here.

use std::time::Duration;

use tokio::time::Instant;

use crate::model::policy::Feedback;

/// Consecutive connection failures that open the breaker.
const BREAKER_THRESHOLD: u32 = 5;
/// First pause of an open breaker; it doubles with each failed probe.
const BREAKER_FIRST_PAUSE: Duration = Duration::from_secs(5);
/// Longest pause of an open breaker.
const BREAKER_LONGEST_PAUSE: Duration = Duration::from_secs(600);
/// Without a success for so long a destination counts as stalled.
const STALLED_AFTER: Duration = Duration::from_secs(30);

/// The state of one destination.
#[derive(Debug)]
pub struct Window {
    /// Attempts allowed at once; 1 until the destination has proven that it works.
    size: usize,
    ceiling: usize,
    in_flight: usize,
    /// Successes since the window last grew.
    successes: usize,
    /// Since when it has been tried without a success; `None` while there is nothing to doubt.
    tried_since: Option<Instant>,
    /// Whether something has failed since the last success.
    has_failed: bool,
    /// Whether it is on its way to its ceiling for the first time, and nothing spoke against that.
    grows: bool,
    /// When it was last used.
    used: Instant,
    /// Since when nothing has ended although something is under way.
    silent_since: Option<Instant>,
    failures_in_a_row: u32,
    breaker: Breaker,
    /// Smoothed seconds that an attempt takes; unknown until the first one has ended.
    attempt_s: Option<f64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Breaker {
    Closed,
    Open { until: Instant, pause: Duration },
    Probing { pause: Duration },
}

/// Whether an attempt may start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admission {
    /// It has started: the caller owes a [`Window::finish`].
    Granted,
    /// The window is full.
    Wait,
    /// The breaker is open for so long.
    Open(Duration),
}

impl Window {
    /// A destination that has not been tried. `ceiling` is at least 1.
    pub fn new(ceiling: usize, now: Instant) -> Self {
        Self {
            size: 1,
            ceiling: ceiling.max(1),
            in_flight: 0,
            successes: 0,
            tried_since: None,
            has_failed: false,
            grows: true,
            used: now,
            silent_since: None,
            failures_in_a_row: 0,
            breaker: Breaker::Closed,
            attempt_s: None,
        }
    }

    /// Starts an attempt if one may start.
    pub fn start(&mut self, now: Instant) -> Admission {
        if let Some(pause) = self.open_for(now) {
            return Admission::Open(pause);
        }
        match self.breaker {
            Breaker::Open { pause, .. } => self.breaker = Breaker::Probing { pause },
            Breaker::Probing { .. } if self.in_flight > 0 => return Admission::Wait,
            Breaker::Probing { .. } | Breaker::Closed => {}
        }
        if self.in_flight >= self.size {
            return Admission::Wait;
        }
        self.in_flight += 1;
        self.used = now;
        self.tried_since.get_or_insert(now);
        self.silent_since.get_or_insert(now);
        Admission::Granted
    }

    /// Whether [`Window::start`] would start an attempt.
    pub fn has_room(&self, now: Instant) -> bool {
        let asked_already = matches!(self.breaker, Breaker::Probing { .. }) && self.in_flight > 0;
        self.open_for(now).is_none() && !asked_already && self.in_flight < self.size
    }

    /// A ceiling that is lower than the last one narrows the window at once; a higher one lets it grow. At least 1.
    pub fn limit(&mut self, ceiling: usize) {
        self.ceiling = ceiling.max(1);
        self.size = self.size.min(self.ceiling);
    }

    /// For how long the breaker will still refuse; `None` when it does not.
    pub fn open_for(&self, now: Instant) -> Option<Duration> {
        match self.breaker {
            Breaker::Open { until, .. } if now < until => Some(until - now),
            _ => None,
        }
    }

    /// Ends an attempt with what it says about the destination.
    pub fn finish(&mut self, result: Outcome, took: Duration, now: Instant) {
        self.in_flight = self.in_flight.saturating_sub(1);
        self.used = now;
        self.silent_since = (self.in_flight > 0).then_some(now);
        self.learn_pace(result, took.as_secs_f64());
        match result {
            Outcome::Worked | Outcome::Nothing => {}
            Outcome::Refused | Outcome::Failed(_) => self.has_failed = true,
        }
        if self.in_flight == 0 && !self.has_failed {
            self.tried_since = None;
        }
        match result {
            Outcome::Worked => self.succeed(now),
            Outcome::Nothing | Outcome::Failed(Feedback::Neutral) => {}
            Outcome::Refused => {
                self.grows = false;
                self.size = 1;
                self.successes = 0;
            }
            Outcome::Failed(Feedback::Narrow) => {
                self.grows = false;
                self.size = (self.size / 2).max(1);
                self.successes = 0;
                self.reopen(now);
            }
            Outcome::Failed(Feedback::Unreachable) => self.fail_to_connect(now),
        }
        // A probe that said nothing leaves the question open: the next job asks it again.
        let says_nothing =
            matches!(result, Outcome::Nothing | Outcome::Refused | Outcome::Failed(Feedback::Neutral));
        if let (Breaker::Probing { pause }, true) = (self.breaker, says_nothing) {
            self.breaker = Breaker::Open { until: now, pause };
        }
    }

    /// A connection that is refused takes no time, and tells nothing of the time that a message takes.
    fn learn_pace(&mut self, result: Outcome, took_s: f64) {
        self.attempt_s = match (result, self.attempt_s) {
            (Outcome::Nothing, known) => known,
            (_, None) => Some(took_s),
            (Outcome::Failed(Feedback::Unreachable), Some(known)) => Some(known.max(took_s)),
            (_, Some(known)) => Some(0.8 * known + 0.2 * took_s),
        };
    }

    fn succeed(&mut self, now: Instant) {
        self.has_failed = false;
        self.tried_since = (self.in_flight > 0).then_some(now);
        self.failures_in_a_row = 0;
        self.breaker = Breaker::Closed;
        self.successes += 1;
        if self.size == 1 || self.successes >= self.size {
            self.size = (self.size + 1).min(self.ceiling);
            self.successes = 0;
        }
    }

    fn fail_to_connect(&mut self, now: Instant) {
        self.failures_in_a_row += 1;
        self.grows = false;
        self.reopen(now);
        if self.failures_in_a_row == BREAKER_THRESHOLD && self.breaker == Breaker::Closed {
            self.size = 1;
            self.breaker = Breaker::Open { until: now + BREAKER_FIRST_PAUSE, pause: BREAKER_FIRST_PAUSE };
        }
    }

    /// A failed probe closes the way again, for longer.
    fn reopen(&mut self, now: Instant) {
        if let Breaker::Probing { pause } = self.breaker {
            let pause = (pause * 2).min(BREAKER_LONGEST_PAUSE);
            self.breaker = Breaker::Open { until: now + pause, pause };
        }
    }

    /// Attempts under way.
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Attempts allowed at once.
    pub fn size(&self) -> usize {
        self.size
    }

    /// Whether it has been tried for a while and nothing has worked. One that nobody used meanwhile is not.
    pub fn is_stalled(&self, now: Instant) -> bool {
        self.tried_since.is_some_and(|since| now.duration_since(since) > STALLED_AFTER)
    }

    /// Time from one end of an attempt to the next while jobs are waiting; `None` before the first has ended. Attempts that take
    /// longer than those before them count for as long as they have taken: a server that falls silent is slow at once.
    pub fn pace(&self, now: Instant) -> Option<Duration> {
        self.attempt_s.map(|attempt_s| self.pace_of(attempt_s.max(self.silence_s(now))))
    }

    /// The same; where nothing is known it is `assumed`, or as slow as the first attempts have shown.
    pub fn pace_or(&self, assumed: Duration, now: Instant) -> Duration {
        self.pace(now).unwrap_or_else(|| assumed.max(self.pace_of(self.silence_s(now))))
    }

    /// The same of the window as it is now, however large it may become.
    pub fn present_pace_or(&self, assumed: Duration, now: Instant) -> Duration {
        let Some(known) = self.attempt_s else { return self.pace_or(assumed, now) };
        spread(known.max(self.silence_s(now)), self.size)
    }

    fn silence_s(&self, now: Instant) -> f64 {
        self.silent_since.map_or(0.0, |since| now.saturating_duration_since(since).as_secs_f64())
    }

    /// A window that grows is taken for as large as it will be soon: what it is too small for now would come back long after it
    /// has grown.
    fn pace_of(&self, attempt_s: f64) -> Duration {
        let size = if self.grows && !self.is_silent(attempt_s) { self.ceiling } else { self.size };
        spread(attempt_s, size)
    }

    /// Whether the attempts under way have taken much longer than those before them.
    fn is_silent(&self, attempt_s: f64) -> bool {
        self.attempt_s.is_none_or(|known| attempt_s > 2.0 * known + 0.1)
    }

    /// Whether nothing would be lost by forgetting this destination.
    pub fn is_idle(&self, now: Instant) -> bool {
        let unused = now.duration_since(self.used);
        let long = if self.has_failed { BREAKER_LONGEST_PAUSE } else { STALLED_AFTER };
        self.in_flight == 0 && self.open_for(now).is_none() && unused > long
    }
}

/// Time from one end of an attempt to the next where so many run at once.
fn spread(attempt_s: f64, size: usize) -> Duration {
    Duration::from_secs_f64((attempt_s / size as f64).clamp(0.000_1, 60.0))
}

/// What an attempt says about its destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The server took a message, or refused it in good order.
    Worked,
    /// The attempt never got there.
    Nothing,
    /// The account was refused: one at a time, until it is known whether for good.
    Refused,
    /// It failed in this way.
    Failed(Feedback),
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const TOOK: Duration = Duration::from_millis(10);

    fn worked(window: &mut Window, now: Instant) {
        assert_eq!(window.start(now), Admission::Granted);
        window.finish(Outcome::Worked, TOOK, now);
    }

    #[test]
    fn a_refused_account_is_tried_one_at_a_time() {
        let now = Instant::now();
        let mut window = Window::new(8, now);
        worked(&mut window, now);
        worked(&mut window, now);
        assert_eq!([window.start(now), window.start(now)], [Admission::Granted; 2]);
        window.finish(Outcome::Refused, TOOK, now);
        assert_eq!(window.start(now), Admission::Wait, "the other one is still under way");
        window.finish(Outcome::Worked, TOOK, now);
        assert_eq!([window.start(now), window.start(now)], [Admission::Granted; 2]);
    }

    #[test]
    fn an_untried_destination_gets_one_attempt_alone_and_then_grows_to_its_ceiling() {
        let now = Instant::now();
        let mut window = Window::new(4, now);
        assert_eq!(window.start(now), Admission::Granted);
        assert_eq!(window.start(now), Admission::Wait);
        window.finish(Outcome::Worked, TOOK, now);
        assert_eq!(window.size, 2);
        (0..20).for_each(|_| worked(&mut window, now));
        assert_eq!(window.size, 4);
    }

    #[test]
    fn a_permit_that_was_not_used_raises_no_doubt() {
        let mut now = Instant::now();
        let mut window = Window::new(4, now);
        assert_eq!(window.start(now), Admission::Granted);
        window.finish(Outcome::Nothing, TOOK, now);
        now += STALLED_AFTER * 2;
        assert!(!window.is_stalled(now));
        assert_eq!(window.start(now), Admission::Granted);
        window.finish(Outcome::Failed(Feedback::Narrow), TOOK, now);
        assert!(window.is_stalled(now + STALLED_AFTER * 2));
    }

    #[test]
    fn a_server_that_falls_silent_is_slow_at_once() {
        let now = Instant::now();
        let mut window = Window::new(1, now);
        worked(&mut window, now);
        assert_eq!(window.pace(now), Some(TOOK));
        assert_eq!(window.start(now), Admission::Granted);
        assert_eq!(window.pace(now + Duration::from_secs(9)), Some(Duration::from_secs(9)));
    }

    #[test]
    fn throttling_halves_the_window() {
        let now = Instant::now();
        let mut window = Window::new(8, now);
        (0..60).for_each(|_| worked(&mut window, now));
        assert_eq!(window.size, 8);
        window.start(now);
        window.finish(Outcome::Failed(Feedback::Narrow), TOOK, now);
        assert_eq!(window.size, 4);
    }

    #[test]
    fn an_unreachable_server_is_asked_by_one_probe_after_growing_pauses() {
        let now = Instant::now();
        let mut window = Window::new(8, now);
        for _ in 0..BREAKER_THRESHOLD {
            assert_eq!(window.start(now), Admission::Granted);
            window.finish(Outcome::Failed(Feedback::Unreachable), TOOK, now);
        }
        assert_eq!(window.start(now), Admission::Open(BREAKER_FIRST_PAUSE));
        let later = now + BREAKER_FIRST_PAUSE;
        assert_eq!(window.start(later), Admission::Granted);
        assert_eq!(window.start(later), Admission::Wait, "one probe alone");
        window.finish(Outcome::Failed(Feedback::Unreachable), TOOK, later);
        assert_eq!(window.start(later), Admission::Open(BREAKER_FIRST_PAUSE * 2));
        let probe = later + BREAKER_FIRST_PAUSE * 2;
        worked(&mut window, probe);
        assert_eq!(window.breaker, Breaker::Closed);
    }

    proptest! {
        #[test]
        fn permits_are_conserved_and_never_exceed_the_ceiling(
            steps in proptest::collection::vec((0u8..5, 0u64..20), 0..300),
            ceiling in 1usize..10,
        ) {
            let mut now = Instant::now();
            let mut window = Window::new(ceiling, now);
            let mut running = 0usize;
            for (step, seconds) in steps {
                now += Duration::from_secs(seconds);
                let outcome = match step {
                    0 | 1 => {
                        if window.start(now) == Admission::Granted { running += 1; }
                        prop_assert!(running <= ceiling);
                        prop_assert_eq!(running, window.in_flight());
                        continue;
                    }
                    2 => Outcome::Worked,
                    3 => Outcome::Failed(Feedback::Narrow),
                    _ => Outcome::Failed(Feedback::Unreachable),
                };
                if running > 0 {
                    running -= 1;
                    window.finish(outcome, TOOK, now);
                }
                prop_assert_eq!(running, window.in_flight());
            }
            // However it went, a destination that nobody uses is asked again in the end.
            while running > 0 { window.finish(Outcome::Nothing, TOOK, now); running -= 1; }
            prop_assert_eq!(window.start(now + BREAKER_LONGEST_PAUSE), Admission::Granted);
        }
    }
}
