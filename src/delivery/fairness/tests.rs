//! What the state machine promises, under whatever order of events.
//! Guarantee: the model keeps its own account of every ticket; the machine's must agree after each step.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::destinations::{LINE_BYTES, SHORT_LINE};
use super::*;
use crate::model::policy::Feedback;

fn organization(number: usize) -> OrganizationId {
    OrganizationId::parse(&format!("o{number}")).unwrap()
}

fn destination(number: usize) -> Destination {
    match number {
        0 => Destination::Platform,
        _ => Destination::Organization { id: organization(number), version: 1 },
    }
}

#[derive(Debug, Clone, Copy)]
enum Step {
    Take { lane: usize },
    Enter { which: usize, to: usize, of: usize, bytes: usize, ceiling: usize },
    Finish { which: usize, outcome: Outcome },
    Withdraw { which: usize },
    Release { which: usize },
    LookAtAll,
    Pass { ms: u64 },
}

fn outcome() -> impl Strategy<Value = Outcome> {
    prop_oneof![
        6 => Just(Outcome::Worked),
        1 => Just(Outcome::Nothing),
        1 => Just(Outcome::Refused),
        1 => Just(Outcome::Failed(Feedback::Neutral)),
        1 => Just(Outcome::Failed(Feedback::Narrow)),
        3 => Just(Outcome::Failed(Feedback::Unreachable)),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let which = 0..1000usize;
    prop_oneof![
        6 => (0..2usize).prop_map(|lane| Step::Take { lane }),
        8 => (which.clone(), 0..5usize, 0..4usize, 0..3usize, 1..6usize).prop_map(
            |(which, to, of, size, ceiling)| Step::Enter {
                which, to, of, bytes: [1000, 1 << 20, 20 << 20][size], ceiling,
            }
        ),
        4 => (which.clone(), outcome()).prop_map(|(which, outcome)| Step::Finish { which, outcome }),
        1 => which.clone().prop_map(|which| Step::Withdraw { which }),
        2 => which.prop_map(|which| Step::Release { which }),
        1 => Just(Step::LookAtAll),
        2 => (0..40_000u64).prop_map(|ms| Step::Pass { ms }),
    ]
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mine {
    Idle,
    Waiting(usize),
    Running(usize),
    Leaving,
}

const SESSIONS: usize = 6;
const PREFETCH: usize = 20;

struct Model {
    fairness: Fairness,
    tickets: BTreeMap<Ticket, (LaneId, Mine)>,
    now: Instant,
    /// Put aside by the machine's own decision in the last step.
    spilled: Vec<usize>,
}

impl Model {
    fn new() -> Self {
        let mut fairness = Fairness::new(SESSIONS);
        fairness.lane(PREFETCH);
        fairness.lane(PREFETCH);
        Self { fairness, tickets: BTreeMap::new(), now: Instant::now(), spilled: Vec::new() }
    }

    fn pick(&self, which: usize, wanted: impl Fn(&Mine) -> bool) -> Option<Ticket> {
        let tickets: Vec<_> = self.tickets.iter().filter(|(_, (_, mine))| wanted(mine)).collect();
        tickets.get(which % tickets.len().max(1)).map(|(ticket, _)| **ticket)
    }

    fn count(&self, wanted: impl Fn(LaneId, Mine) -> bool) -> usize {
        self.tickets.values().filter(|(lane, mine)| wanted(*lane, *mine)).count()
    }

    fn set(&mut self, ticket: Ticket, mine: Mine) {
        self.tickets.get_mut(&ticket).expect("a ticket of the model's").1 = mine;
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Take { lane } if self.count(|of, _| of == lane) < PREFETCH => {
                let ticket = self.fairness.take(lane, self.now);
                self.tickets.insert(ticket, (lane, Mine::Idle));
            }
            Step::Take { .. } => {}
            Step::Enter { which, to, of, bytes, ceiling } => {
                let Some(ticket) = self.pick(which, |mine| *mine == Mine::Idle) else { return };
                let (to_whom, of) = (destination(to), organization(of));
                let request = Request { destination: &to_whom, organization: Some(&of), bytes, ceiling };
                let mine = match self.fairness.enter(ticket, request, self.now) {
                    Entered::Granted => {
                        let running = self.count(|_, mine| mine == Mine::Running(to));
                        assert!(running < ceiling, "{running} run already");
                        Mine::Running(to)
                    }
                    Entered::Waiting => Mine::Waiting(to),
                    Entered::Aside(_) => Mine::Leaving,
                };
                self.set(ticket, mine);
            }
            Step::Finish { which, outcome } => {
                let Some(ticket) = self.pick(which, |mine| matches!(mine, Mine::Running(_))) else { return };
                self.fairness.finish(ticket, outcome, self.now);
                self.set(ticket, Mine::Idle);
            }
            Step::Withdraw { which } => {
                let Some(ticket) = self.pick(which, |_| true) else { return };
                self.fairness.withdraw(ticket, self.now);
                if self.tickets[&ticket].1 != Mine::Leaving {
                    self.set(ticket, Mine::Idle);
                }
            }
            Step::Release { which } => {
                let Some(ticket) = self.pick(which, |_| true) else { return };
                self.fairness.release(ticket, self.now);
                self.tickets.remove(&ticket);
            }
            Step::LookAtAll => self.look_at_all(),
            Step::Pass { ms } => self.now += Duration::from_millis(ms),
        }
    }

    fn look_at_all(&mut self) {
        let all: Vec<_> = self.tickets.keys().copied().collect();
        all.into_iter().for_each(|ticket| self.fairness.look(ticket, self.now));
    }

    /// Books what the machine decided about others. Each that is told of was waiting.
    fn hear(&mut self) {
        self.spilled.clear();
        for event in self.fairness.events() {
            let (Event::Granted(ticket) | Event::Aside(ticket, _)) = event;
            let Mine::Waiting(to) = self.tickets[&ticket].1 else {
                panic!("{event:?} of {:?}", self.tickets[&ticket])
            };
            match event {
                Event::Granted(_) => self.set(ticket, Mine::Running(to)),
                Event::Aside(..) => {
                    self.spilled.push(to);
                    self.set(ticket, Mine::Leaving);
                }
            }
        }
    }

    fn check(&mut self) {
        let running = self.count(|_, mine| matches!(mine, Mine::Running(_)));
        let waiting = self.count(|_, mine| matches!(mine, Mine::Waiting(_)));
        assert_eq!(self.fairness.counts(), (waiting, running));
        assert!(running <= SESSIONS);
        assert!(self.fairness.stalled_in_flight <= SESSIONS / 2);
        for (lane, known) in self.fairness.lanes.iter().zip(0..) {
            let held = self.tickets.values().filter(|(of, mine)| *of == known && *mine != Mine::Leaving);
            assert_eq!(lane.held, held.count());
        }
        let in_windows: usize = self.fairness.destinations.all().map(|entry| entry.window.in_flight()).sum();
        assert_eq!(in_windows, running, "no permit is lost or made");
        for number in 0..5 {
            let Some(entry) = self.fairness.destinations.of(&destination(number)) else { continue };
            let mine = self.tickets.values().filter(|(_, mine)| *mine == Mine::Waiting(number));
            assert_eq!(entry.lines.waiting(), mine.count());
        }
    }

    /// Nobody waits for something that is there.
    fn check_that_nobody_waits_in_vain(&self) {
        for number in 0..5 {
            let Some(entry) = self.fairness.destinations.of(&destination(number)) else { continue };
            let share_is_taken = entry.window.is_stalled(self.now)
                && self.fairness.stalled_in_flight >= self.fairness.stalled_share();
            assert!(
                entry.lines.waiting() == 0
                    || self.fairness.in_flight >= SESSIONS
                    || share_is_taken
                    || !entry.window.has_room(self.now),
                "{number} could start"
            );
            let line = entry.lines.waiting();
            assert!(line <= entry.longest(self.now), "{number} has {line} in line");
            let is_heavy = entry.lines.bytes() > LINE_BYTES;
            assert!(
                !is_heavy || line <= entry.worth_its_bytes(self.now),
                "{number} has too many bytes in line"
            );
            assert!(line == 0 || entry.window.open_for(self.now).is_none(), "{number} is shut");
        }
        for lane in &self.fairness.lanes {
            assert!(!lane.is_pressed() || lane.slow.is_empty(), "a slow line fills the lane");
        }
    }

    /// What a lane without room put aside when one more arrived: no more than for a quarter, and only what was not needed.
    fn check_spill(&self, lane: LaneId) {
        if self.spilled.is_empty() {
            return;
        }
        let lane = &self.fairness.lanes[lane];
        assert!(PREFETCH - lane.held <= PREFETCH / 4, "it spilled more than it needed to");
        for number in &self.spilled {
            let entry = self.fairness.destinations.of(&destination(*number)).expect("known");
            let (line, needed) = (entry.lines.waiting(), entry.needed(self.now));
            assert!(line >= needed, "{line} left of the {needed} that it needs");
            assert!(needed >= entry.window.size() || entry.window.is_stalled(self.now));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]
    #[test]
    fn permits_lines_and_lanes_are_kept_account_of_whatever_happens(
        steps in proptest::collection::vec(step(), 0..250),
    ) {
        let mut model = Model::new();
        for step in steps {
            model.step(step);
            model.hear();
            model.check();
            if let Step::Take { lane } = step {
                model.check_spill(lane);
            }
            if matches!(step, Step::LookAtAll) {
                model.check_that_nobody_waits_in_vain();
            }
        }
        let all: Vec<_> = model.tickets.keys().copied().collect();
        for ticket in all {
            model.fairness.release(ticket, model.now);
            model.tickets.remove(&ticket);
            model.hear();
        }
        model.check();
        prop_assert_eq!(model.fairness.counts(), (0, 0));
        prop_assert!(model.fairness.lanes.iter().all(|lane| lane.held == 0 && lane.slow.is_empty()));
        // And whatever became of a destination, it is asked again in the end.
        model.now += Duration::from_secs(600);
        for to in 0..5 {
            model.step(Step::Take { lane: 0 });
            model.step(Step::Enter { which: 0, to, of: 0, bytes: 0, ceiling: 1 });
            prop_assert_eq!(model.count(|_, mine| mine == Mine::Running(to)), 1);
            model.step(Step::Finish { which: 0, outcome: Outcome::Worked });
            model.step(Step::Release { which: 0 });
        }
    }

    #[test]
    fn no_destination_is_passed_over_more_often_than_there_are_others(
        sessions in 1..4usize,
        lines in proptest::collection::vec((1..30usize, 1..4usize), 2..8),
        ends in proptest::collection::vec(0..100usize, 300),
    ) {
        let now = Instant::now();
        let mut fairness = Fairness::new(sessions);
        let lane = fairness.lane(10_000);
        let mut running = Vec::new();
        let mut to = BTreeMap::new();
        for (number, (jobs, ceiling)) in lines.iter().enumerate() {
            for _ in 0..*jobs {
                let ticket = fairness.take(lane, now);
                to.insert(ticket, number);
                let request = Request {
                    destination: &destination(number), organization: None, bytes: 0, ceiling: *ceiling,
                };
                if fairness.enter(ticket, request, now) == Entered::Granted {
                    running.push(ticket);
                }
            }
        }
        let mut passed_over = vec![0; lines.len()];
        for end in ends {
            if running.is_empty() {
                break;
            }
            fairness.finish(running.remove(end % running.len()), Outcome::Worked, now);
            for event in fairness.events() {
                let Event::Granted(ticket) = event else { panic!("{event:?}") };
                running.push(ticket);
                for (number, passed_over) in passed_over.iter_mut().enumerate() {
                    let entry = fairness.destinations.of(&destination(number)).expect("known");
                    let waits = entry.lines.waiting() > 0 && entry.window.has_room(now);
                    *passed_over = if waits && to[&ticket] != number { *passed_over + 1 } else { 0 };
                    prop_assert!(*passed_over < lines.len());
                }
            }
        }
        prop_assert_eq!(fairness.waiting, 0, "all have been served");
    }

    #[test]
    fn the_lines_of_one_destination_are_served_in_turn_however_long_they_are(
        jobs in proptest::collection::vec(0..5usize, 1..60),
    ) {
        let now = Instant::now();
        let mut fairness = Fairness::new(1);
        let lanes = [fairness.lane(1000), fairness.lane(1000)];
        let enter = |fairness: &mut Fairness, of: usize| {
            let ticket = fairness.take(lanes[of % 2], now);
            let of = organization(of);
            let to = Destination::Platform;
            fairness.enter(ticket, Request { destination: &to, organization: Some(&of), bytes: 0, ceiling: 1 }, now);
            ticket
        };
        let mut running = enter(&mut fairness, 9);
        let whose: BTreeMap<Ticket, usize> = jobs.iter().map(|of| (enter(&mut fairness, *of), *of)).collect();
        let mut left = [0; 5];
        jobs.iter().for_each(|of| left[*of] += 1);
        let mut turn = Vec::new();
        for _ in &jobs {
            fairness.finish(running, Outcome::Worked, now);
            let events = fairness.events();
            let [Event::Granted(ticket)] = events[..] else { panic!("{events:?}") };
            let of = whose[&ticket];
            left[of] -= 1;
            if turn.contains(&of) {
                // A new round begins when everyone with a job had one.
                for (other, left) in left.iter().enumerate() {
                    prop_assert!(*left == 0 || turn.contains(&other), "{other} was passed over");
                }
                turn.clear();
            }
            turn.push(of);
            running = ticket;
        }
    }
}

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
