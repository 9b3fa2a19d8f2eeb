//! What the state machine promises, under whatever order of events.
//! Guarantee: the model keeps its own account of every ticket; the machine's must agree after each step.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::destinations::LINE_BYTES;
use super::*;
use crate::model::policy::Feedback;

pub(super) fn organization(number: usize) -> OrganizationId {
    OrganizationId::parse(&format!("o{number}")).unwrap()
}

pub(super) fn destination(number: usize) -> Destination {
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
