//! A lane, a broker and servers on a simulated clock: what a flood costs others, the broker, and itself.
//! Guarantee: deterministic; no time passes.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, VecDeque};

use super::*;
use crate::model::policy::Feedback;

/// What can happen. At one moment in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Happening {
    Returned(usize),
    Published(Ticket),
    Ended(Ticket),
    Look,
}

/// A job by the number of its organization.
type Job = usize;

struct World {
    fairness: Fairness,
    lane: LaneId,
    prefetch: usize,
    start: Instant,
    now: Duration,
    happenings: BinaryHeap<Reverse<(Duration, u64, Happening)>>,
    next: u64,
    queue: VecDeque<Job>,
    in_hand: HashMap<Ticket, Job>,
    waiting: Vec<Ticket>,
    running: HashMap<Ticket, (Duration, Outcome)>,
    attempt: fn(Job, Duration) -> (Duration, Outcome),
    put_aside: Duration,
    publisher_free: Duration,
    asides: usize,
    sent: HashMap<Job, usize>,
}

impl World {
    fn new(prefetch: usize, attempt: fn(Job, Duration) -> (Duration, Outcome)) -> Self {
        let mut fairness = Fairness::new(256);
        let lane = fairness.lane(prefetch);
        let mut world = Self {
            fairness,
            lane,
            prefetch,
            start: Instant::now(),
            now: Duration::ZERO,
            happenings: BinaryHeap::new(),
            next: 0,
            queue: VecDeque::new(),
            in_hand: HashMap::new(),
            waiting: Vec::new(),
            running: HashMap::new(),
            attempt,
            put_aside: Duration::from_micros(400),
            publisher_free: Duration::ZERO,
            asides: 0,
            sent: HashMap::new(),
        };
        world.happens(Duration::ZERO, Happening::Look);
        world
    }

    fn now(&self) -> Instant {
        self.start + self.now
    }

    fn happens(&mut self, after: Duration, happening: Happening) {
        self.next += 1;
        self.happenings.push(Reverse((self.now + after, self.next, happening)));
    }

    fn aside(&mut self, ticket: Ticket, delay_s: u32) {
        self.asides += 1;
        self.publisher_free = self.publisher_free.max(self.now) + self.put_aside;
        self.happens(self.publisher_free - self.now, Happening::Published(ticket));
        let returns = self.publisher_free - self.now + Duration::from_secs(delay_s.into());
        self.happens(returns, Happening::Returned(self.in_hand[&ticket]));
    }

    fn granted(&mut self, ticket: Ticket) {
        let attempt = (self.attempt)(self.in_hand[&ticket], self.now);
        self.running.insert(ticket, attempt);
        self.happens(attempt.0, Happening::Ended(ticket));
    }

    fn fill(&mut self) {
        loop {
            for event in self.fairness.events() {
                match event {
                    Event::Granted(ticket) => self.granted(ticket),
                    Event::Aside(ticket, delay_s) => self.aside(ticket, delay_s),
                }
            }
            if self.in_hand.len() >= self.prefetch {
                return;
            }
            let Some(job) = self.queue.pop_front() else { return };
            let ticket = self.fairness.take(self.lane, self.now());
            self.in_hand.insert(ticket, job);
            let organization = OrganizationId::parse(&format!("o{job}")).unwrap();
            let destination = Destination::Organization { id: organization.clone(), version: 1 };
            let request = Request {
                destination: &destination,
                organization: Some(&organization),
                bytes: 5000,
                ceiling: 8,
            };
            match self.fairness.enter(ticket, request, self.now()) {
                Entered::Granted => self.granted(ticket),
                Entered::Waiting => self.waiting.push(ticket),
                Entered::Aside(delay_s) => self.aside(ticket, delay_s),
            }
        }
    }

    /// Lets so much time pass.
    fn run(&mut self, seconds: u64) {
        let end = self.now + Duration::from_secs(seconds);
        self.run_until(end, |_| false);
        self.now = end;
    }

    fn run_until(&mut self, end: Duration, mut done: impl FnMut(&Self) -> bool) {
        self.fill();
        while !done(self)
            && let Some(Reverse((at, _, happening))) = self.happenings.pop()
        {
            if at > end {
                self.happenings.push(Reverse((at, 0, happening)));
                return;
            }
            self.now = at;
            let now = self.now();
            match happening {
                Happening::Returned(job) => self.queue.push_back(job),
                Happening::Published(ticket) => {
                    self.in_hand.remove(&ticket);
                    self.fairness.release(ticket, now);
                }
                Happening::Ended(ticket) => {
                    let job = self.in_hand[&ticket];
                    let (_, outcome) = self.running.remove(&ticket).expect("it runs");
                    self.fairness.finish(ticket, outcome, now);
                    self.in_hand.remove(&ticket);
                    self.fairness.release(ticket, now);
                    if outcome == Outcome::Worked {
                        *self.sent.entry(job).or_default() += 1;
                    } else {
                        self.happens(Duration::from_secs(10), Happening::Returned(job));
                    }
                }
                Happening::Look => {
                    self.waiting.retain(|ticket| {
                        let held = self.fairness.tickets.get(ticket);
                        held.is_some_and(|held| matches!(held.state, State::Waiting { .. }))
                    });
                    for ticket in self.waiting.clone() {
                        self.fairness.look(ticket, now);
                    }
                    self.happens(Duration::from_secs(1), Happening::Look);
                }
            }
            self.fill();
        }
    }

    /// Publishes a job of an organization and says how long it takes until it is sent.
    fn send(&mut self, job: Job) -> Duration {
        let (since, before) = (self.now, self.sent(job));
        self.queue.push_back(job);
        self.run_until(since + Duration::from_secs(3600), |world| world.sent(job) > before);
        self.now - since
    }

    fn sent(&self, job: Job) -> usize {
        self.sent.get(&job).copied().unwrap_or_default()
    }
}

const FLOOD: Job = 0;
const OTHER: Job = 1;

const fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// A hundred milliseconds for each of five commands, for the flood's server.
fn slow_flood(job: Job, _: Duration) -> (Duration, Outcome) {
    (if job == FLOOD { ms(500) } else { ms(5) }, Outcome::Worked)
}

#[test]
fn a_hundred_thousand_jobs_of_one_slow_server_let_others_past_and_cost_little() {
    let mut world = World::new(512, slow_flood);
    world.queue.extend(std::iter::repeat_n(FLOOD, 100_000));
    let all_aside = world.put_aside * 100_000;
    let behind = world.send(OTHER);
    assert!(behind <= all_aside + ms(1000), "{behind:?}");
    // Two rounds of the longest delay; in the first one the wave is spread.
    for asides_a_second in [250, 200] {
        let (asides, sent, from) = (world.asides, world.sent(FLOOD), world.now);
        while world.now < from + Duration::from_secs(600) {
            world.run(1);
            let other = world.send(OTHER);
            assert!(other <= ms(2000), "{other:?} at {:?}", world.now);
        }
        let seconds = (world.now - from).as_secs() as usize;
        let (asides, sent) = (world.asides - asides, world.sent(FLOOD) - sent);
        assert!(sent >= seconds * 16 * 95 / 100, "its server is kept busy: {sent} in {seconds} s");
        assert!(asides <= seconds * asides_a_second, "{asides} put aside in {seconds} s");
    }
}

/// Two round trips to a server 20 ms away, for the flood's.
fn far_flood(job: Job, _: Duration) -> (Duration, Outcome) {
    (if job == FLOOD { ms(45) } else { ms(5) }, Outcome::Worked)
}

#[test]
fn a_server_that_keeps_its_lane_moving_works_off_its_backlog_without_a_pause() {
    let mut world = World::new(512, far_flood);
    world.queue.extend(std::iter::repeat_n(FLOOD, 3000));
    world.run_until(Duration::from_secs(3600), |world| world.sent(FLOOD) == 3000);
    let alone = ms(45) * 3000 / 8;
    assert!(world.now <= alone * 105 / 100, "{:?} instead of {alone:?}", world.now);
    assert_eq!(world.asides, 0);
}

#[test]
fn the_flood_of_a_server_that_keeps_its_lane_moving_holds_others_up_for_a_while_only() {
    let mut world = World::new(512, far_flood);
    world.queue.extend(std::iter::repeat_n(FLOOD, 100_000));
    let all_aside = world.put_aside * 100_000;
    let behind = world.send(OTHER);
    assert!(behind <= all_aside + Duration::from_secs(21), "{behind:?}");
    let (sent, from) = (world.sent(FLOOD), world.now);
    while world.now < from + Duration::from_secs(120) {
        world.run(1);
        let other = world.send(OTHER);
        assert!(other <= Duration::from_secs(21), "{other:?} at {:?}", world.now);
    }
    let (sent, seconds) = (world.sent(FLOOD) - sent, (world.now - from).as_secs() as usize);
    assert!(sent >= seconds * 177 * 95 / 100, "its server is kept busy: {sent} in {seconds} s");
}

/// Works at first, then accepts connections and never speaks.
fn falls_silent(job: Job, at: Duration) -> (Duration, Outcome) {
    if job == FLOOD && at >= Duration::from_secs(1) {
        return (Duration::from_secs(30), Outcome::Failed(Feedback::Narrow));
    }
    (ms(5), Outcome::Worked)
}

#[test]
fn a_quick_server_that_falls_silent_holds_up_nobody_for_long() {
    let mut world = World::new(512, falls_silent);
    world.queue.extend(std::iter::repeat_n(FLOOD, 20_000));
    world.run(1);
    assert!(world.sent(FLOOD) > 1000 && world.queue.len() > 10_000);
    let behind = world.send(OTHER);
    assert!(behind <= Duration::from_secs(12), "{behind:?}");
    world.run(60);
    for _ in 0..100 {
        world.run(1);
        let other = world.send(OTHER);
        assert!(other <= ms(500), "{other:?}");
    }
}

/// Of ten organizations one has a server that never speaks.
fn one_in_ten_is_dead(job: Job, _: Duration) -> (Duration, Outcome) {
    if job.is_multiple_of(10) {
        return (Duration::from_secs(30), Outcome::Failed(Feedback::Narrow));
    }
    (ms(50), Outcome::Worked)
}

#[test]
fn healthy_organizations_lose_little_to_dead_ones_in_their_lane() {
    let took = |organizations: &[Job]| {
        let mut world = World::new(512, one_in_ten_is_dead);
        // So that the dead ones are known as such.
        world.queue.extend(organizations.iter().cycle().take(2000));
        world.run(120);
        let healthy = |world: &World| -> usize {
            let healthy = world.sent.iter().filter(|(job, _)| !job.is_multiple_of(10));
            healthy.map(|(_, sent)| sent).sum()
        };
        let (since, before) = (world.now, healthy(&world));
        world.queue.extend(organizations.iter().cycle().take(organizations.len() * 300));
        let due = organizations.iter().filter(|job| !job.is_multiple_of(10)).count() * 300;
        world.run_until(Duration::from_secs(3600), |world| healthy(world) >= before + due);
        world.now - since
    };
    let all: Vec<Job> = (0..100).collect();
    let healthy: Vec<Job> = all.iter().copied().filter(|job| !job.is_multiple_of(10)).collect();
    let (with, without) = (took(&all), took(&healthy));
    assert!(with <= without * 100 / 95 + ms(100), "{with:?} instead of {without:?}");
}
