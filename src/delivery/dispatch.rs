//! Fairness between destinations: who may start an attempt, who waits, and who is put aside.
//! Guarantee: a permit is given back when it is dropped, so also by a panic; no destination holds more than its line.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::Instant;

use super::destination::{Admission, Outcome, Window};
use crate::model::organization::OrganizationId;
use crate::model::schedule::ASIDE_S;
use crate::model::smtp_settings::Destination;

/// Longest wait in a line; a delivery must not be slept on.
const LONGEST_WAIT: Duration = Duration::from_secs(60);
/// Waiting jobs that any destination may have.
const SHORT_LINE: usize = 64;
/// A line may be longer where its last job would not wait longer than this.
const LINE_WAIT: Duration = Duration::from_secs(2);
/// How often a waiting job looks whether its line has become too long.
const LOOK_PAUSE: Duration = Duration::from_secs(2);
/// Pace that is assumed of a destination of which nothing is known, to spread what is put aside.
const UNKNOWN_PACE: Duration = Duration::from_millis(20);
/// Destinations remembered before idle ones are forgotten.
const DESTINATIONS_KEPT: usize = 4096;

/// Limits of the dispatcher.
#[derive(Debug, Clone, Copy)]
pub struct DispatchLimits {
    /// `delivery.max_sessions`.
    pub sessions: usize,
}

/// Decides who may start; cheap to clone.
#[derive(Clone)]
pub struct Dispatcher {
    shared: Arc<Shared>,
}

struct Shared {
    limits: DispatchLimits,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    destinations: HashMap<Destination, Entry>,
    /// Destinations whose head of line waits for a session of the worker, not for its own window.
    starved: VecDeque<Destination>,
    in_flight: usize,
    stalled_in_flight: usize,
    waiting: usize,
}

struct Entry {
    window: Window,
    /// One line for each organization and lane, served in turn.
    lines: VecDeque<(LineKey, VecDeque<oneshot::Sender<Permit>>)>,
    waiting: usize,
    /// When the work put aside so far would be done at the present pace.
    aside_until: Instant,
    /// When its line was last empty.
    empty_at: Instant,
}

/// Whose line it is within a destination.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LineKey {
    /// The job's organization.
    pub organization: Option<OrganizationId>,
    /// The job's lane.
    pub lane: Arc<str>,
}

/// What became of a request to start.
#[derive(Debug)]
pub enum Admitted {
    /// Start now.
    Go(Permit),
    /// Come back after so many seconds, nothing charged: one of the broker's aside delays.
    PutAside(u32),
}

/// The right to run one attempt. Dropped without a word it says nothing about the destination.
#[must_use]
pub struct Permit {
    shared: Arc<Shared>,
    destination: Destination,
    started: Instant,
    stalled: bool,
    outcome: Outcome,
}

impl Permit {
    /// Ends the attempt with what it says about the destination.
    pub fn finish(mut self, outcome: Outcome) {
        self.outcome = outcome;
    }
}

impl std::fmt::Debug for Permit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Permit({:?})", self.destination)
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let now = Instant::now();
        let mut state = self.shared.lock();
        state.in_flight -= 1;
        if self.stalled {
            state.stalled_in_flight -= 1;
        }
        if let Some(entry) = state.destinations.get_mut(&self.destination) {
            entry.window.finish(self.outcome, now.duration_since(self.started), now);
        }
        let woken = self.shared.grant(&mut state, &self.destination, now);
        drop(state);
        // A waiter that has gone drops its permit here, outside the lock, which serves the next one.
        for (waiter, permit) in woken {
            if let Some(waiter) = waiter {
                drop(waiter.send(permit));
            }
        }
    }
}

impl Dispatcher {
    /// A dispatcher without any destination yet.
    pub fn new(limits: DispatchLimits) -> Self {
        Self { shared: Arc::new(Shared { limits, state: Mutex::default() }) }
    }

    /// Asks to start an attempt; waits in line for at most a minute. `ceiling`: the largest size of the destination's window as
    /// of now.
    pub async fn admit(&self, destination: &Destination, key: LineKey, ceiling: usize) -> Admitted {
        let mut waiter = match self.enter(destination, key, ceiling) {
            Entered::Granted(permit) => return Admitted::Go(permit),
            Entered::Aside(delay_s) => return Admitted::PutAside(delay_s),
            Entered::Waiting(waiter) => waiter,
        };
        let deadline = Instant::now() + LONGEST_WAIT;
        loop {
            match tokio::time::timeout(LOOK_PAUSE, &mut waiter).await {
                Ok(Ok(permit)) => return Admitted::Go(permit),
                Ok(Err(_)) => return Admitted::PutAside(self.aside(destination)),
                Err(_) if Instant::now() >= deadline || self.leaves(destination, &mut waiter) => {
                    // A permit may have been on its way when the receiver was closed.
                    return match waiter.try_recv() {
                        Ok(permit) => Admitted::Go(permit),
                        Err(_) => Admitted::PutAside(self.aside(destination)),
                    };
                }
                Err(_) => {}
            }
        }
    }

    /// Leaves a line that has become too long for its pace.
    fn leaves(&self, destination: &Destination, waiter: &mut oneshot::Receiver<Permit>) -> bool {
        let mut state = self.shared.lock();
        let now = Instant::now();
        let Some(entry) = state.destinations.get_mut(destination) else { return true };
        let mut gone = entry.drop_gone(now);
        let leaves = entry.waiting > entry.longest_line(now);
        if leaves {
            waiter.close();
            gone += entry.drop_gone(now);
        }
        state.waiting -= gone;
        leaves
    }

    /// Jobs in line and attempts under way, for the metrics.
    pub fn counts(&self) -> (usize, usize) {
        let state = self.shared.lock();
        (state.waiting, state.in_flight)
    }

    fn enter(&self, destination: &Destination, key: LineKey, ceiling: usize) -> Entered {
        let now = Instant::now();
        let mut state = self.shared.lock();
        state.forget_idle(now);
        let entry = state.destinations.entry(destination.clone()).or_insert_with(|| Entry::new(ceiling, now));
        entry.window.bound(ceiling);
        let gone = entry.drop_gone(now);
        let nobody_waits = entry.waiting == 0;
        state.waiting -= gone;
        if nobody_waits {
            match self.shared.start(&mut state, destination, now) {
                Started::Granted(permit) => return Entered::Granted(permit),
                Started::Open(pause) => return Entered::Aside(aside_for(pause)),
                Started::NoSession | Started::NoShare if !state.starved.contains(destination) => {
                    state.starved.push_back(destination.clone());
                }
                Started::NoSession | Started::NoShare | Started::Wait => {}
            }
        }
        let entry = state.destinations.entry(destination.clone()).or_insert_with(|| Entry::new(ceiling, now));
        let before = entry.waiting;
        if before >= entry.longest_line(now) && !entry.make_room(&key) {
            return Entered::Aside(entry.put_aside(now));
        }
        let (sender, receiver) = oneshot::channel();
        entry.push(key, sender);
        let after = entry.waiting;
        state.waiting += after - before;
        Entered::Waiting(receiver)
    }

    fn aside(&self, destination: &Destination) -> u32 {
        let mut state = self.shared.lock();
        let now = Instant::now();
        state.destinations.get_mut(destination).map_or(ASIDE_S[0], |entry| entry.put_aside(now))
    }
}

enum Entered {
    Granted(Permit),
    Waiting(oneshot::Receiver<Permit>),
    Aside(u32),
}

enum Started {
    Granted(Permit),
    /// The destination's own window is full.
    Wait,
    /// The worker has no session left.
    NoSession,
    /// The stalled destinations have their share.
    NoShare,
    Open(Duration),
}

enum Served {
    One(Option<oneshot::Sender<Permit>>, Permit),
    NoSession,
    NoShare,
    /// Nobody waits there, or only for the destination itself.
    Done,
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Starts an attempt if the worker, the stalled destinations' share and the destination's window have room.
    fn start(self: &Arc<Self>, state: &mut State, destination: &Destination, now: Instant) -> Started {
        let Some(entry) = state.destinations.get_mut(destination) else { return Started::Wait };
        if let Some(pause) = entry.window.open_for(now) {
            return Started::Open(pause);
        }
        if state.in_flight >= self.limits.sessions {
            return Started::NoSession;
        }
        let stalled = entry.window.is_stalled(now);
        let stalled_share = (self.limits.sessions / 2).max(1);
        if stalled && state.stalled_in_flight >= stalled_share {
            return Started::NoShare;
        }
        match entry.window.start(now) {
            Admission::Wait => return Started::Wait,
            Admission::Open(pause) => return Started::Open(pause),
            Admission::Granted => {}
        }
        state.in_flight += 1;
        state.stalled_in_flight += usize::from(stalled);
        Started::Granted(Permit {
            shared: self.clone(),
            destination: destination.clone(),
            started: now,
            stalled,
            outcome: Outcome::Nothing,
        })
    }

    /// Serves the lines that a returned permit may have made room for, the starved ones first: one of each destination's
    /// waiters in turn, and whoever gets nothing keeps its place.
    fn grant(
        self: &Arc<Self>,
        state: &mut State,
        returned: &Destination,
        now: Instant,
    ) -> Vec<(Option<oneshot::Sender<Permit>>, Permit)> {
        let mut woken = Vec::new();
        let mut passed_over = VecDeque::new();
        let mut turns = std::mem::take(&mut state.starved);
        if !turns.contains(returned) {
            turns.push_back(returned.clone());
        }
        while let Some(destination) = turns.pop_front() {
            match self.serve_one(state, &destination, now) {
                Served::One(waiter, permit) => {
                    woken.push((waiter, permit));
                    turns.push_back(destination);
                }
                Served::NoSession => {
                    turns.push_front(destination);
                    break;
                }
                Served::NoShare => passed_over.push_back(destination),
                Served::Done => {}
            }
        }
        passed_over.append(&mut turns);
        state.starved = passed_over;
        woken
    }

    fn serve_one(self: &Arc<Self>, state: &mut State, destination: &Destination, now: Instant) -> Served {
        let Some(entry) = state.destinations.get_mut(destination) else { return Served::Done };
        let gone = entry.drop_gone(now);
        let nobody_waits = entry.waiting == 0;
        state.waiting -= gone;
        if nobody_waits {
            return Served::Done;
        }
        let started = self.start(state, destination, now);
        let Some(entry) = state.destinations.get_mut(destination) else { return Served::Done };
        match started {
            Started::Granted(permit) => {
                let waiter = entry.pop();
                state.waiting -= usize::from(waiter.is_some());
                Served::One(waiter, permit)
            }
            Started::Wait => Served::Done,
            Started::NoSession => Served::NoSession,
            Started::NoShare => Served::NoShare,
            // Their senders are dropped, which tells the waiters to put themselves aside.
            Started::Open(_) => {
                state.waiting -= entry.waiting;
                entry.lines.clear();
                entry.waiting = 0;
                Served::Done
            }
        }
    }
}

impl State {
    fn forget_idle(&mut self, now: Instant) {
        if self.destinations.len() > DESTINATIONS_KEPT {
            self.destinations.retain(|_, entry| entry.waiting > 0 || !entry.window.is_idle(now));
        }
    }
}

impl Entry {
    fn new(ceiling: usize, now: Instant) -> Self {
        Self {
            window: Window::new(ceiling, now),
            lines: VecDeque::new(),
            waiting: 0,
            aside_until: now,
            empty_at: now,
        }
    }

    /// How many jobs may wait now. A destination of which nothing is known yet has the benefit of the doubt for a moment:
    /// a thousand jobs for a quick server are gone before they could be put aside.
    fn longest_line(&self, now: Instant) -> usize {
        let quick = match self.window.pace() {
            Some(pace) => (LINE_WAIT.as_secs_f64() / pace.as_secs_f64()) as usize,
            None if now.duration_since(self.empty_at) <= LINE_WAIT => usize::MAX,
            None => 0,
        };
        quick.max(SHORT_LINE)
    }

    fn push(&mut self, key: LineKey, waiter: oneshot::Sender<Permit>) {
        self.waiting += 1;
        match self.lines.iter_mut().find(|(line, _)| *line == key) {
            Some((_, line)) => line.push_back(waiter),
            None => self.lines.push_back((key, VecDeque::from([waiter]))),
        }
    }

    /// Sends the last waiter of the longest line away for the sake of a shorter one; whether there was one to send.
    fn make_room(&mut self, key: &LineKey) -> bool {
        let own = self.lines.iter().find(|(line, _)| line == key).map_or(0, |(_, line)| line.len());
        let Some((_, longest)) = self.lines.iter_mut().max_by_key(|(_, line)| line.len()) else {
            return false;
        };
        if longest.len() <= own + 1 {
            return false;
        }
        // Its sender is dropped, which tells the waiter to put itself aside.
        longest.pop_back();
        self.waiting -= 1;
        true
    }

    /// The next waiter, one from each line in turn.
    fn pop(&mut self) -> Option<oneshot::Sender<Permit>> {
        let (key, mut line) = self.lines.pop_front()?;
        let waiter = line.pop_front();
        if !line.is_empty() {
            self.lines.push_back((key, line));
        }
        self.waiting -= usize::from(waiter.is_some());
        waiter
    }

    /// Removes waiters that have given up; says how many.
    fn drop_gone(&mut self, now: Instant) -> usize {
        let before = self.waiting;
        for (_, line) in &mut self.lines {
            line.retain(|waiter| !waiter.is_closed());
        }
        self.lines.retain(|(_, line)| !line.is_empty());
        self.waiting = self.lines.iter().map(|(_, line)| line.len()).sum();
        if self.waiting == 0 {
            self.empty_at = now;
        }
        before - self.waiting
    }

    /// Books one more job put aside and says for how long, by the pace at which the destination takes them.
    fn put_aside(&mut self, now: Instant) -> u32 {
        if let Some(pause) = self.window.open_for(now) {
            return aside_for(pause);
        }
        self.aside_until = self.aside_until.max(now) + self.window.pace().unwrap_or(UNKNOWN_PACE);
        aside_for(self.aside_until - now)
    }
}

/// The shortest aside delay that is not shorter than a wait, or the longest there is.
fn aside_for(wait: Duration) -> u32 {
    let long_enough = ASIDE_S.iter().find(|delay| Duration::from_secs(u64::from(**delay)) >= wait);
    *long_enough.unwrap_or(&ASIDE_S[ASIDE_S.len() - 1])
}

#[cfg(test)]
#[path = "dispatch_tests.rs"]
mod tests;
