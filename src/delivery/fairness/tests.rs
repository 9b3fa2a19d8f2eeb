//! The rules of lines, spill and sessions, one by one.
//! Guarantee: no time passes; the clock is moved by hand.

use super::destinations::SHORT_LINE;
use super::properties::{destination, organization};
use super::*;
use crate::model::policy::Feedback;

/// A machine with one lane.
struct Bench {
    fairness: Fairness,
    lane: LaneId,
    now: Instant,
}

impl Bench {
    fn new(sessions: usize, prefetch: usize) -> Self {
        let mut fairness = Fairness::new(sessions);
        let lane = fairness.lane(prefetch);
        Self { fairness, lane, now: Instant::now() }
    }

    fn enter(&mut self, to: usize, bytes: usize) -> (Ticket, Entered) {
        let ticket = self.fairness.take(self.lane, self.now);
        let (to, of) = (destination(to), organization(to));
        let request = Request { destination: &to, organization: Some(&of), bytes, ceiling: 8 };
        (ticket, self.fairness.enter(ticket, request, self.now))
    }

    fn line(&self, number: usize) -> usize {
        self.fairness.destinations.of(&destination(number)).map_or(0, |entry| entry.lines.waiting())
    }

    /// An attempt that takes so long and ends like this.
    fn attempt(&mut self, to: usize, took: Duration, outcome: Outcome) {
        let (ticket, entered) = self.enter(to, 0);
        assert_eq!(entered, Entered::Granted);
        self.now += took;
        self.fairness.finish(ticket, outcome, self.now);
        self.fairness.release(ticket, self.now);
    }
}

#[test]
fn a_stalled_server_holds_no_more_than_its_bounded_line_of_the_prefetch() {
    let mut bench = Bench::new(256, 512);
    bench.attempt(1, Duration::from_secs(30), Outcome::Failed(Feedback::Narrow));
    for _ in 0..5000 {
        let (ticket, entered) = bench.enter(1, 0);
        if matches!(entered, Entered::Aside(_)) {
            bench.fairness.release(ticket, bench.now);
        }
    }
    assert_eq!(bench.line(1), SHORT_LINE);
    assert_eq!(bench.fairness.tickets.len(), SHORT_LINE + 1);
}

#[test]
fn a_lane_without_room_puts_the_youngest_of_the_slowest_line_aside_until_a_quarter_is_free() {
    let mut bench = Bench::new(256, 100);
    for number in [1, 2] {
        bench.attempt(number, Duration::from_secs(10), Outcome::Worked);
    }
    // Each has two under way, and in line more than its window.
    let slow: Vec<_> = (0..50).map(|_| bench.enter(1, 0).0).collect();
    let other: Vec<_> = (0..20).map(|_| bench.enter(2, 0).0).collect();
    assert_eq!((bench.line(1), bench.line(2)), (48, 18));
    let idle: Vec<_> = (0..5).map(|_| bench.fairness.take(bench.lane, bench.now)).collect();
    assert_eq!(bench.fairness.events(), [], "a quarter is free");
    bench.fairness.take(bench.lane, bench.now);
    let events = bench.fairness.events();
    assert!(matches!(events[..], [Event::Aside(ticket, _)] if ticket == slow[49]), "{events:?}");
    assert_eq!((bench.line(1), bench.line(2)), (47, 18));
    let before = bench.fairness.counts().0;
    for _ in 0..200 {
        let ticket = bench.fairness.take(bench.lane, bench.now);
        bench.fairness.release(ticket, bench.now);
    }
    assert_eq!(
        bench.fairness.counts().0,
        before - 1,
        "the room that was made is enough for who comes and goes"
    );
    drop((other, idle));
}

#[test]
fn a_lane_full_of_jobs_for_a_quick_server_spills_none() {
    let mut bench = Bench::new(256, 512);
    for _ in 0..20 {
        bench.attempt(1, Duration::from_millis(5), Outcome::Worked);
    }
    for _ in 0..512 {
        assert!(!matches!(bench.enter(1, 0).1, Entered::Aside(_)));
    }
    assert_eq!(bench.fairness.events(), []);
}

#[test]
fn great_bodies_wait_at_the_broker_and_not_in_line() {
    let mut bench = Bench::new(256, 512);
    bench.attempt(1, Duration::from_secs(40), Outcome::Worked);
    let asides = (0..20).filter(|_| matches!(bench.enter(1, 10 << 20).1, Entered::Aside(_))).count();
    assert_eq!((bench.line(1), asides), (3, 15), "two run");
    assert_eq!(bench.enter(1, 1000).1, Entered::Waiting, "a small one still finds room");
    assert_eq!(bench.enter(2, 10 << 20).1, Entered::Granted);
}

#[test]
fn a_destination_that_nobody_used_for_an_hour_is_not_stalled() {
    let mut bench = Bench::new(2, 100);
    bench.attempt(2, Duration::from_secs(31), Outcome::Failed(Feedback::Narrow));
    assert_eq!(bench.enter(2, 0).1, Entered::Granted);
    bench.attempt(1, Duration::from_millis(5), Outcome::Worked);
    bench.now += Duration::from_secs(3600);
    assert_eq!(bench.enter(1, 0).1, Entered::Granted, "although the stalled ones have their share");
}

#[test]
fn a_full_line_makes_room_for_who_has_less_in_it() {
    let mut bench = Bench::new(256, 1000);
    let enter = |bench: &mut Bench, of: usize| {
        let ticket = bench.fairness.take(bench.lane, bench.now);
        let of = organization(of);
        let request =
            Request { destination: &Destination::Platform, organization: Some(&of), bytes: 0, ceiling: 1 };
        (ticket, bench.fairness.enter(ticket, request, bench.now))
    };
    let (first, _) = enter(&mut bench, 1);
    bench.now += Duration::from_secs(10);
    bench.fairness.finish(first, Outcome::Worked, bench.now);
    enter(&mut bench, 1);
    let flood: Vec<_> = (0..SHORT_LINE).map(|_| enter(&mut bench, 1).0).collect();
    assert_eq!(enter(&mut bench, 2).1, Entered::Waiting);
    let events = bench.fairness.events();
    assert!(matches!(events[..], [Event::Aside(ticket, _)] if Some(&ticket) == flood.last()), "{events:?}");
    assert!(matches!(enter(&mut bench, 1).1, Entered::Aside(_)), "a flood makes no room for itself");
    assert_eq!(bench.fairness.counts(), (SHORT_LINE, 1));
}

#[test]
fn destinations_without_a_success_share_half_of_the_sessions() {
    let mut bench = Bench::new(4, 100);
    for number in 1..=3 {
        bench.attempt(number, Duration::from_secs(31), Outcome::Failed(Feedback::Narrow));
    }
    let (first, entered) = bench.enter(1, 0);
    assert_eq!(entered, Entered::Granted);
    assert_eq!(bench.enter(2, 0).1, Entered::Granted);
    let (waiting, entered) = bench.enter(3, 0);
    assert_eq!(entered, Entered::Waiting);
    assert_eq!(bench.enter(4, 0).1, Entered::Granted, "others have the rest");
    bench.fairness.finish(first, Outcome::Failed(Feedback::Narrow), bench.now);
    assert_eq!(bench.fairness.events(), [Event::Granted(waiting)]);
}

#[test]
fn a_lower_ceiling_than_before_holds_from_the_next_attempt_on() {
    let mut bench = Bench::new(100, 100);
    for _ in 0..100 {
        bench.attempt(1, Duration::from_millis(5), Outcome::Worked);
    }
    let (to, of) = (destination(1), organization(1));
    let mut enter = |ceiling| {
        let ticket = bench.fairness.take(bench.lane, bench.now);
        let request = Request { destination: &to, organization: Some(&of), bytes: 0, ceiling };
        (ticket, bench.fairness.enter(ticket, request, bench.now))
    };
    let running: Vec<_> = (0..4).map(|_| enter(8)).collect();
    assert!(running.iter().all(|(_, entered)| *entered == Entered::Granted));
    assert_eq!(enter(2).1, Entered::Waiting);
    for (ticket, _) in &running[..2] {
        bench.fairness.finish(*ticket, Outcome::Worked, bench.now);
        assert_eq!(bench.fairness.events(), []);
    }
    bench.fairness.finish(running[2].0, Outcome::Worked, bench.now);
    assert_eq!(bench.fairness.events().len(), 1);
}

#[test]
fn idle_destinations_are_forgotten() {
    let mut bench = Bench::new(100, 100);
    for number in 1..20_000 {
        bench.attempt(number, Duration::from_millis(50), Outcome::Worked);
    }
    let known = bench.fairness.destinations.all().count();
    assert!(known < 5000, "{known} are known");
}
