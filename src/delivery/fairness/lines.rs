//! The jobs that wait for one destination: a line for each organization and lane, served in turn.
//! Guarantee: joining, leaving from anywhere, being served and finding the longest line cost O(log n); a line that is empty
//! takes no memory.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::{LaneId, Ticket};
use crate::model::organization::OrganizationId;

/// Whose line it is within a destination.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct LineKey {
    /// The job's organization.
    pub organization: Option<OrganizationId>,
    /// The job's lane.
    pub lane: LaneId,
}

/// A line of one destination.
pub type LineId = u64;

/// The lines of one destination.
#[derive(Debug, Default)]
pub struct Lines {
    by_key: HashMap<LineKey, LineId>,
    lines: HashMap<LineId, Line>,
    /// The lines in the order in which they are served.
    turns: BTreeMap<u64, LineId>,
    /// For each lane its lines by their length.
    lanes: Vec<LaneLines>,
    next: u64,
    waiting: usize,
    bytes: usize,
}

#[derive(Debug)]
struct Line {
    key: LineKey,
    turn: u64,
    /// In the order in which the broker delivered them, with the bytes of each.
    waiters: BTreeMap<Ticket, usize>,
}

#[derive(Debug, Default)]
struct LaneLines {
    waiting: usize,
    by_length: BTreeSet<(usize, LineId)>,
}

impl Lines {
    /// Jobs in all lines.
    pub fn waiting(&self) -> usize {
        self.waiting
    }

    /// Jobs of one lane.
    pub fn waiting_in(&self, lane: LaneId) -> usize {
        self.lanes.get(lane).map_or(0, |lane| lane.waiting)
    }

    /// Their bodies' bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Jobs in the line of a key.
    pub fn length(&self, key: &LineKey) -> usize {
        let line = self.by_key.get(key).and_then(|id| self.lines.get(id));
        line.map_or(0, |line| line.waiters.len())
    }

    /// Adds a job to the line of its key.
    pub fn push(&mut self, key: LineKey, ticket: Ticket, bytes: usize) -> LineId {
        if self.lanes.len() <= key.lane {
            self.lanes.resize_with(key.lane + 1, LaneLines::default);
        }
        let id = match self.by_key.get(&key) {
            Some(id) => *id,
            None => {
                self.next += 1;
                let (id, turn) = (self.next, self.next);
                self.turns.insert(turn, id);
                self.by_key.insert(key.clone(), id);
                self.lines.insert(id, Line { key, turn, waiters: BTreeMap::new() });
                id
            }
        };
        if let Some(line) = self.lines.get_mut(&id) {
            let lane = &mut self.lanes[line.key.lane];
            lane.by_length.remove(&(line.waiters.len(), id));
            line.waiters.insert(ticket, bytes);
            lane.by_length.insert((line.waiters.len(), id));
            lane.waiting += 1;
            self.waiting += 1;
            self.bytes += bytes;
        }
        id
    }

    /// Takes a job out of its line.
    pub fn remove(&mut self, id: LineId, ticket: Ticket) {
        let Some(line) = self.lines.get_mut(&id) else { return };
        let before = line.waiters.len();
        let Some(bytes) = line.waiters.remove(&ticket) else { return };
        self.bytes -= bytes;
        let lane = &mut self.lanes[line.key.lane];
        lane.by_length.remove(&(before, id));
        lane.waiting -= 1;
        self.waiting -= 1;
        if before > 1 {
            lane.by_length.insert((before - 1, id));
            return;
        }
        self.turns.remove(&line.turn);
        self.by_key.remove(&line.key);
        self.lines.remove(&id);
    }

    /// The next job: the first of the line whose turn it is, which then goes behind the others.
    pub fn pop(&mut self) -> Option<Ticket> {
        let (_, id) = self.turns.pop_first()?;
        self.next += 1;
        let line = self.lines.get_mut(&id)?;
        line.turn = self.next;
        self.turns.insert(line.turn, id);
        let ticket = *line.waiters.first_key_value()?.0;
        self.remove(id, ticket);
        Some(ticket)
    }

    /// The last job of the longest line: of a lane, or of all.
    pub fn youngest(&self, lane: Option<LaneId>) -> Option<(LineId, Ticket)> {
        let (_, id) = self.longest(lane)?;
        let (ticket, _) = self.lines.get(&id)?.waiters.last_key_value()?;
        Some((id, *ticket))
    }

    /// The longest line, of a lane or of all, and its length.
    pub fn longest(&self, lane: Option<LaneId>) -> Option<(usize, LineId)> {
        let of = |lane: &LaneLines| lane.by_length.last().copied();
        match lane {
            Some(lane) => self.lanes.get(lane).and_then(of),
            None => self.lanes.iter().filter_map(of).max(),
        }
    }
}
