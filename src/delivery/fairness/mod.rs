//! Fairness between destinations as a state machine: who may start, who waits in which line, who is put aside.
//! Guarantee: pure; time comes in as a parameter, and what is decided about others than the caller comes out as events. Each
//! operation costs O(log n). A permit is always some ticket's, so whatever becomes of a delivery, its release returns it.

mod destinations;
mod lines;
mod returns;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

use tokio::time::Instant;

use self::destinations::{DestinationId, Destinations};
use self::lines::{LineId, LineKey};
use super::destination::{Admission, Outcome};
use crate::model::organization::OrganizationId;
use crate::model::schedule::ASIDE_S;
use crate::model::smtp_settings::Destination;

/// Longest wait in a line; a delivery must not be slept on.
const LONGEST_WAIT: Duration = Duration::from_secs(60);

/// One delivery, from its arrival to its end; later ones have higher numbers.
pub type Ticket = u64;
/// One lane.
pub type LaneId = usize;

/// Who asks to start, and how much of it there may be.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    /// Where it goes.
    pub destination: &'a Destination,
    /// Whose it is.
    pub organization: Option<&'a OrganizationId>,
    /// Its body.
    pub bytes: usize,
    /// Most attempts at once that the destination is to have.
    pub ceiling: usize,
}

/// What became of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entered {
    /// It has started: [`Fairness::finish`] is owed.
    Granted,
    /// An [`Event`] will tell.
    Waiting,
    /// It is to be put aside for so many seconds.
    Aside(u32),
}

/// What became of one that waited.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// It has started: [`Fairness::finish`] is owed.
    Granted(Ticket),
    /// It is to be put aside for so many seconds.
    Aside(Ticket, u32),
}

/// The state of the dispatcher.
#[derive(Debug)]
pub struct Fairness {
    sessions: usize,
    lanes: Vec<Lane>,
    tickets: HashMap<Ticket, Held>,
    destinations: Destinations,
    /// Destinations that wait for a session of the worker, in turn.
    hungry: BTreeMap<u64, DestinationId>,
    /// Those that wait for one of the stalled destinations' sessions.
    stalled: BTreeMap<u64, DestinationId>,
    /// Numbers for tickets and turns.
    next: u64,
    in_flight: usize,
    stalled_in_flight: usize,
    waiting: usize,
    events: Vec<Event>,
}

#[derive(Debug)]
struct Lane {
    prefetch: usize,
    /// Deliveries in hand, without those that are on their way aside.
    held: usize,
    /// Destinations with more jobs of this lane in line than they need, by how many more.
    slow: BTreeSet<(usize, DestinationId)>,
}

impl Lane {
    fn is_pressed(&self) -> bool {
        self.prefetch.saturating_sub(self.held) < (self.prefetch / 4).max(1)
    }
}

#[derive(Debug)]
struct Held {
    lane: LaneId,
    state: State,
}

#[derive(Debug, Clone, Copy)]
enum State {
    /// In hand, and asking for nothing.
    Idle,
    Waiting {
        destination: DestinationId,
        line: LineId,
        since: Instant,
    },
    Running {
        destination: DestinationId,
        started: Instant,
        stalled: bool,
    },
    /// On its way aside: it does not count for its lane any more.
    Leaving,
}

enum Started {
    Granted { stalled: bool },
    Wait,
    NoShare,
    Open,
}

impl Fairness {
    /// Nothing is known yet. `sessions` is at least 1.
    pub fn new(sessions: usize) -> Self {
        Self {
            sessions: sessions.max(1),
            lanes: Vec::new(),
            tickets: HashMap::new(),
            destinations: Destinations::default(),
            hungry: BTreeMap::new(),
            stalled: BTreeMap::new(),
            next: 0,
            in_flight: 0,
            stalled_in_flight: 0,
            waiting: 0,
            events: Vec::new(),
        }
    }

    /// Adds a lane that has so many deliveries in hand at most.
    pub fn lane(&mut self, prefetch: usize) -> LaneId {
        self.lanes.push(Lane { prefetch, held: 0, slow: BTreeSet::new() });
        self.lanes.len() - 1
    }

    /// Jobs in line and attempts under way.
    pub fn counts(&self) -> (usize, usize) {
        (self.waiting, self.in_flight)
    }

    /// What was decided about others since the last call.
    pub fn events(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.events)
    }

    /// A delivery arrived in a lane.
    pub fn take(&mut self, lane: LaneId, now: Instant) -> Ticket {
        let ticket = self.number();
        self.lanes[lane].held += 1;
        self.tickets.insert(ticket, Held { lane, state: State::Idle });
        self.relieve(lane, now);
        ticket
    }

    /// A delivery has come to its end, or to nothing.
    pub fn release(&mut self, ticket: Ticket, now: Instant) {
        self.withdraw(ticket, now);
        if let Some(held) = self.tickets.remove(&ticket)
            && !matches!(held.state, State::Leaving)
        {
            self.lanes[held.lane].held -= 1;
        }
    }

    /// It no longer wants what it asked for, or has got.
    pub fn withdraw(&mut self, ticket: Ticket, now: Instant) {
        let Some(held) = self.tickets.get_mut(&ticket) else { return };
        match held.state {
            State::Idle | State::Leaving => {}
            State::Running { .. } => self.finish(ticket, Outcome::Nothing, now),
            State::Waiting { destination, line, .. } => {
                held.state = State::Idle;
                self.leave_line(destination, line, ticket);
                self.refresh(destination, now);
            }
        }
    }

    /// Asks to start an attempt.
    pub fn enter(&mut self, ticket: Ticket, request: Request<'_>, now: Instant) -> Entered {
        self.withdraw(ticket, now);
        let Some(held) = self.tickets.get_mut(&ticket) else { return Entered::Aside(ASIDE_S[0]) };
        let lane = held.lane;
        if matches!(held.state, State::Leaving) {
            held.state = State::Idle;
            self.lanes[lane].held += 1;
        }
        let id = self.destinations.find(request.destination, request.ceiling, now);
        let entry = self.destinations.get(id);
        entry.window.limit(request.ceiling);
        if entry.lines.waiting() == 0 {
            match self.start(id, now) {
                Started::Granted { stalled } => {
                    self.run(ticket, id, stalled, now);
                    return Entered::Granted;
                }
                Started::Open => return Entered::Aside(self.put_aside(ticket, id, now)),
                Started::Wait | Started::NoShare => {}
            }
        }
        let key = LineKey { organization: request.organization.cloned(), lane };
        let (is_pressed, prefetch) = (self.lanes[lane].is_pressed(), self.lanes[lane].prefetch);
        let entry = self.destinations.get(id);
        let own = entry.lines.length(&key);
        let is_needed = entry.lines.waiting() < entry.needed(now) || entry.may_fill(prefetch, now);
        let is_full = entry.is_over(1, request.bytes, now) || (is_pressed && !is_needed);
        if is_full && !self.make_room(id, own, now) {
            return Entered::Aside(self.put_aside(ticket, id, now));
        }
        let line = self.destinations.get(id).join(key, ticket, request.bytes, now);
        self.waiting += 1;
        self.set(ticket, State::Waiting { destination: id, line, since: now });
        self.want(id, now);
        self.refresh(id, now);
        self.serve(now);
        Entered::Waiting
    }

    /// Ends an attempt with what it says about its destination.
    pub fn finish(&mut self, ticket: Ticket, outcome: Outcome, now: Instant) {
        let Some(held) = self.tickets.get_mut(&ticket) else { return };
        let State::Running { destination, started, stalled } = held.state else { return };
        held.state = State::Idle;
        self.in_flight -= 1;
        self.stalled_in_flight -= usize::from(stalled);
        let window = &mut self.destinations.get(destination).window;
        window.finish(outcome, now.saturating_duration_since(started), now);
        self.look_at(destination, now);
        self.serve(now);
    }

    /// Time has passed for one that waits: it may have waited too long, or its line have become too long.
    pub fn look(&mut self, ticket: Ticket, now: Instant) {
        let Some(Held { state: State::Waiting { destination, line, since }, .. }) = self.tickets.get(&ticket)
        else {
            return;
        };
        let (id, line, since) = (*destination, *line, *since);
        if now.saturating_duration_since(since) >= LONGEST_WAIT {
            self.spill(id, line, ticket, now);
        }
        self.look_at(id, now);
        self.serve(now);
    }

    /// Draws what follows for the line of a destination from its state.
    fn look_at(&mut self, id: DestinationId, now: Instant) {
        let is_shut = self.destinations.get(id).window.open_for(now).is_some();
        while is_shut || self.destinations.get(id).is_over(0, 0, now) {
            let Some((line, ticket)) = self.destinations.get(id).lines.youngest(None) else { break };
            self.spill(id, line, ticket, now);
        }
        self.refresh(id, now);
        for lane in 0..self.lanes.len() {
            self.relieve(lane, now);
        }
        self.want(id, now);
    }

    /// While less than a quarter of a lane's prefetch is free, jobs that wait for nothing that they would get soon go aside:
    /// the youngest of the destination that has most of them.
    fn relieve(&mut self, lane: LaneId, now: Instant) {
        while self.lanes[lane].is_pressed() {
            let Some((excess, id)) = self.lanes[lane].slow.last().copied() else { return };
            self.refresh(id, now);
            if self.lanes[lane].slow.last() != Some(&(excess, id)) {
                continue;
            }
            let Some((line, ticket)) = self.destinations.get(id).lines.youngest(Some(lane)) else { return };
            self.spill(id, line, ticket, now);
            self.refresh(id, now);
        }
    }

    /// Sends the last of the longest line away for the sake of a line that has less; whether there was one to send.
    fn make_room(&mut self, id: DestinationId, own: usize, now: Instant) -> bool {
        let lines = &self.destinations.get(id).lines;
        if lines.longest(None).is_none_or(|(longest, _)| longest <= own + 1) {
            return false;
        }
        let Some((line, ticket)) = lines.youngest(None) else { return false };
        self.spill(id, line, ticket, now);
        true
    }

    /// Puts aside one that waits.
    fn spill(&mut self, id: DestinationId, line: LineId, ticket: Ticket, now: Instant) {
        self.leave_line(id, line, ticket);
        let delay_s = self.put_aside(ticket, id, now);
        self.events.push(Event::Aside(ticket, delay_s));
    }

    fn put_aside(&mut self, ticket: Ticket, id: DestinationId, now: Instant) -> u32 {
        if let Some(held) = self.tickets.get_mut(&ticket) {
            held.state = State::Leaving;
            self.lanes[held.lane].held -= 1;
        }
        self.destinations.get(id).put_aside(now)
    }

    fn leave_line(&mut self, id: DestinationId, line: LineId, ticket: Ticket) {
        self.destinations.get(id).lines.remove(line, ticket);
        self.waiting -= 1;
    }

    /// Notes for each lane how many jobs the destination has in line beyond what it needs.
    fn refresh(&mut self, id: DestinationId, now: Instant) {
        let entry = self.destinations.get(id);
        entry.excess.resize(self.lanes.len(), 0);
        for (lane, known) in self.lanes.iter_mut().zip(0..) {
            let current = entry.excess(known, lane.prefetch, now);
            let noted = std::mem::replace(&mut entry.excess[known], current);
            if noted != current {
                lane.slow.remove(&(noted, id));
                if current > 0 {
                    lane.slow.insert((current, id));
                }
            }
        }
    }

    /// Gives a destination that could start another attempt its place among those that wait for a session.
    fn want(&mut self, id: DestinationId, now: Instant) {
        let turn = self.number();
        let entry = self.destinations.get(id);
        let wants = entry.lines.waiting() > 0 && entry.window.has_room(now);
        let stalled = entry.window.is_stalled(now);
        match entry.turn {
            // Something worked: it is one of the others again.
            Some(turn) if wants && !stalled && self.stalled.remove(&turn).is_some() => {
                self.hungry.insert(turn, id);
            }
            None if wants => {
                entry.turn = Some(turn);
                let turns = if stalled { &mut self.stalled } else { &mut self.hungry };
                turns.insert(turn, id);
            }
            _ => {}
        }
    }

    /// Gives the free sessions to the destinations that wait for one, one to each in turn.
    fn serve(&mut self, now: Instant) {
        while self.in_flight < self.sessions {
            let hungry = self.hungry.first_key_value().map(|(turn, _)| *turn);
            let stalled = self.stalled.first_key_value().map(|(turn, _)| *turn);
            let stalled = stalled.filter(|_| self.stalled_in_flight < self.stalled_share());
            let Some(turn) = hungry.into_iter().chain(stalled).min() else { return };
            let Some(id) = self.hungry.remove(&turn).or_else(|| self.stalled.remove(&turn)) else { return };
            let entry = self.destinations.get(id);
            entry.turn = None;
            if entry.lines.waiting() == 0 {
                continue;
            }
            match self.start(id, now) {
                Started::Granted { stalled } => {
                    if let Some(ticket) = self.destinations.get(id).lines.pop() {
                        self.waiting -= 1;
                        self.run(ticket, id, stalled, now);
                        self.events.push(Event::Granted(ticket));
                    }
                    self.refresh(id, now);
                    self.want(id, now);
                }
                // It keeps its turn among the stalled ones.
                Started::NoShare => {
                    self.destinations.get(id).turn = Some(turn);
                    self.stalled.insert(turn, id);
                }
                Started::Wait => {}
                Started::Open => self.look_at(id, now),
            }
        }
    }

    /// Starts an attempt if the worker, the stalled destinations' share and the destination's window have room.
    fn start(&mut self, id: DestinationId, now: Instant) -> Started {
        let share = self.stalled_share();
        let window = &mut self.destinations.get(id).window;
        if window.open_for(now).is_some() {
            return Started::Open;
        }
        if self.in_flight >= self.sessions {
            return Started::Wait;
        }
        let stalled = window.is_stalled(now);
        if stalled && self.stalled_in_flight >= share {
            return Started::NoShare;
        }
        match window.start(now) {
            Admission::Granted => Started::Granted { stalled },
            Admission::Wait => Started::Wait,
            Admission::Open(_) => Started::Open,
        }
    }

    fn run(&mut self, ticket: Ticket, destination: DestinationId, stalled: bool, now: Instant) {
        self.in_flight += 1;
        self.stalled_in_flight += usize::from(stalled);
        self.set(ticket, State::Running { destination, started: now, stalled });
    }

    fn set(&mut self, ticket: Ticket, state: State) {
        if let Some(held) = self.tickets.get_mut(&ticket) {
            held.state = state;
        }
    }

    /// Sessions that all destinations that have not worked for a while may have together.
    fn stalled_share(&self) -> usize {
        (self.sessions / 2).max(1)
    }

    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }
}

#[cfg(test)]
mod properties;
#[cfg(test)]
mod simulation;
#[cfg(test)]
mod tests;
