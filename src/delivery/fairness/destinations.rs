//! What is kept of each destination: its window, its lines, and when what is aside comes back.
//! Guarantee: idle destinations are forgotten, so that memory follows those in use; the sweep costs each request O(1).

use std::collections::HashMap;
use std::time::Duration;

use tokio::time::Instant;

use super::super::destination::Window;
use super::lines::{LineId, LineKey, Lines};
use super::returns::{Outlook, Returns};
use super::{LaneId, Ticket};
use crate::model::schedule::ASIDE_S;
use crate::model::smtp_settings::Destination;

/// Waiting jobs that any destination may have while its lane has room.
pub const SHORT_LINE: usize = 64;
/// A line may be longer where its last job would not wait longer than this. Longer than the shortest delay, so that what comes
/// back in one go lasts until the next do.
pub const LINE_WAIT: Duration = Duration::from_secs(6);
/// The same where the lane has no room; and for so long a destination of which nothing is known has the benefit of the doubt:
/// a thousand jobs for a quick server are gone before they could be put aside.
pub const NEEDED_WAIT: Duration = Duration::from_secs(2);
/// A destination that would take what a lane holds of it until the shortest delay is over may fill the lane for so long: aside its
/// jobs would lie still for longer than they need, and others wait for it no longer than this. After that it is a flood.
const BRISK_PATIENCE: Duration = Duration::from_secs(20);
const SHORTEST_ASIDE: Duration = Duration::from_secs(ASIDE_S[0] as u64);
/// Pace that is assumed of a destination of which nothing is known, to spread what is put aside.
const UNKNOWN_PACE: Duration = Duration::from_millis(20);
/// Destinations remembered before idle ones are forgotten.
const DESTINATIONS_KEPT: usize = 4096;
/// The bodies in the lines of one destination take no more bytes than this, but for those that it takes within
/// [`GREAT_WAIT`]: great bodies wait at the broker. Not sooner, for there each costs its bytes anew.
pub const LINE_BYTES: usize = 32 << 20;
const GREAT_WAIT: Duration = Duration::from_secs(30);

/// One destination.
pub type DestinationId = u64;

/// One destination's state.
#[derive(Debug)]
pub struct Entry {
    /// How many attempts at once.
    pub window: Window,
    /// Who waits.
    pub lines: Lines,
    /// Its turn among those that wait for a session of the worker.
    pub turn: Option<u64>,
    /// For each lane, as noted there: how many of its jobs wait beyond what is needed.
    pub excess: Vec<usize>,
    returns: Returns,
    /// When its first waiter came after it had none.
    waited_since: Instant,
    /// Since when more wait than it needs.
    over_since: Option<Instant>,
}

/// All destinations.
#[derive(Debug)]
pub struct Destinations {
    ids: HashMap<Destination, DestinationId>,
    entries: HashMap<DestinationId, Entry>,
    next: DestinationId,
    /// When there are so many, idle ones are looked for.
    sweep_at: usize,
}

impl Default for Destinations {
    fn default() -> Self {
        Self { ids: HashMap::new(), entries: HashMap::new(), next: 0, sweep_at: DESTINATIONS_KEPT }
    }
}

impl Destinations {
    /// The destination, known or new.
    pub fn find(&mut self, destination: &Destination, ceiling: usize, now: Instant) -> DestinationId {
        if let Some(id) = self.ids.get(destination) {
            return *id;
        }
        self.forget_idle(now);
        self.next += 1;
        self.ids.insert(destination.clone(), self.next);
        self.entries.insert(self.next, Entry::new(ceiling, now));
        self.next
    }

    /// One that is known: it has tickets, or was just found.
    pub fn get(&mut self, id: DestinationId) -> &mut Entry {
        self.entries.get_mut(&id).expect("a destination is kept while it has tickets")
    }

    fn forget_idle(&mut self, now: Instant) {
        if self.ids.len() < self.sweep_at {
            return;
        }
        self.entries.retain(|_, entry| !entry.is_idle(now));
        self.ids.retain(|_, id| self.entries.contains_key(id));
        // What is left has to double before it is gone through again.
        self.sweep_at = DESTINATIONS_KEPT.max(self.ids.len() * 2);
    }

    #[cfg(test)]
    pub fn of(&self, destination: &Destination) -> Option<&Entry> {
        self.ids.get(destination).and_then(|id| self.entries.get(id))
    }

    #[cfg(test)]
    pub fn all(&self) -> impl Iterator<Item = &Entry> {
        self.entries.values()
    }
}

impl Entry {
    fn new(ceiling: usize, now: Instant) -> Self {
        Self {
            window: Window::new(ceiling, now),
            lines: Lines::default(),
            turn: None,
            excess: Vec::new(),
            returns: Returns::new(now),
            waited_since: now,
            over_since: None,
        }
    }

    /// How many jobs may wait while their lane has room.
    pub fn longest(&self, now: Instant) -> usize {
        self.worth(LINE_WAIT, now).max(SHORT_LINE).max(self.window.size())
    }

    /// How many jobs may wait while their lane has none: what the destination takes soon, and enough for it never to be idle
    /// for want of a job. One that has stalled needs nobody to wait.
    pub fn needed(&self, now: Instant) -> usize {
        if self.window.is_stalled(now) { 0 } else { self.worth(NEEDED_WAIT, now).max(self.window.size()) }
    }

    /// How many jobs of a lane wait beyond what it needs, or may fill it for a moment.
    pub fn excess(&mut self, lane: LaneId, prefetch: usize, now: Instant) -> usize {
        let excess = self.lines.waiting().saturating_sub(self.needed(now));
        if excess == 0 {
            self.over_since = None;
            return 0;
        }
        self.over_since.get_or_insert(now);
        if self.may_fill(prefetch, now) { 0 } else { excess.min(self.lines.waiting_in(lane)) }
    }

    /// Whether it takes so many jobs soon enough to fill a lane with them for a while.
    pub fn may_fill(&self, prefetch: usize, now: Instant) -> bool {
        let since = self.over_since.unwrap_or(now);
        !self.window.is_stalled(now)
            && now.saturating_duration_since(since) < BRISK_PATIENCE
            && self.worth(SHORTEST_ASIDE, now) >= prefetch - prefetch / 4
    }

    /// Whether there are more jobs or bytes in line than may wait, or would be with these.
    pub fn is_over(&self, jobs: usize, bytes: usize, now: Instant) -> bool {
        let waiting = self.lines.waiting() + jobs;
        let is_heavy = || self.lines.bytes().saturating_add(bytes) > LINE_BYTES;
        waiting > self.longest(now) || (is_heavy() && waiting > self.worth_its_bytes(now))
    }

    /// How many jobs may wait however great they are.
    pub fn worth_its_bytes(&self, now: Instant) -> usize {
        let pace = self.window.present_pace_or(UNKNOWN_PACE, now);
        ((GREAT_WAIT.as_secs_f64() / pace.as_secs_f64()) as usize).max(1)
    }

    /// How many jobs the destination takes within a time.
    fn worth(&self, wait: Duration, now: Instant) -> usize {
        match self.window.pace(now) {
            Some(pace) => (wait.as_secs_f64() / pace.as_secs_f64()) as usize,
            None if now.saturating_duration_since(self.waited_since) <= NEEDED_WAIT => usize::MAX,
            None => 0,
        }
    }

    /// Adds a job to its line.
    pub fn join(&mut self, key: LineKey, ticket: Ticket, bytes: usize, now: Instant) -> LineId {
        if self.lines.waiting() == 0 {
            self.waited_since = now;
        }
        self.lines.push(key, ticket, bytes)
    }

    /// Books one more job put aside and says for how long.
    pub fn put_aside(&mut self, now: Instant) -> u32 {
        let outlook = Outlook {
            pause: self.window.open_for(now).unwrap_or_default(),
            pace: self.window.pace_or(UNKNOWN_PACE, now),
            line: self.lines.waiting(),
        };
        self.returns.put_aside(outlook, now)
    }

    fn is_idle(&mut self, now: Instant) -> bool {
        self.turn.is_none()
            && self.lines.waiting() == 0
            && self.window.is_idle(now)
            && self.returns.is_empty(now)
    }
}
