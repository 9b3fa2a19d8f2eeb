//! The dispatcher: `fairness` for tasks that wait. Who may start an attempt, who waits, and who is put aside.
//! Guarantee: a permit is given back when it is dropped, so also by a panic; a request that is dropped leaves no waiter behind.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::Instant;

use super::destination::Outcome;
use super::fairness::{Entered, Event, Fairness, LaneId, Request, Ticket};
use super::weights::Weight;

/// How often a waiting job looks whether its line has become too long.
const LOOK_PAUSE: Duration = Duration::from_secs(1);

/// Decides who may start; cheap to clone.
#[derive(Clone)]
pub struct Dispatcher {
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
}

struct State {
    fairness: Fairness,
    waiters: HashMap<Ticket, oneshot::Sender<Decision>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Decision {
    Go,
    Aside(u32),
}

/// A lane's share of the dispatcher's attention.
pub struct DispatchLane {
    shared: Arc<Shared>,
    id: LaneId,
}

/// A delivery's slot of its lane's prefetch, from its arrival to its end.
#[must_use]
pub struct Slot {
    shared: Arc<Shared>,
    ticket: Ticket,
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
    ticket: Ticket,
    outcome: Outcome,
    weight: Weight,
}

impl Dispatcher {
    /// A dispatcher of so many sessions (`delivery.max_sessions`), without any lane or destination yet.
    pub fn new(sessions: usize) -> Self {
        let state = State { fairness: Fairness::new(sessions), waiters: HashMap::new() };
        Self { shared: Arc::new(Shared { state: Mutex::new(state) }) }
    }

    /// Adds a lane with this prefetch.
    pub fn lane(&self, prefetch: usize) -> DispatchLane {
        DispatchLane { shared: self.shared.clone(), id: self.shared.change(|state, _| state.lane(prefetch)) }
    }

    /// Jobs in line and attempts under way, for the metrics.
    pub fn counts(&self) -> (usize, usize) {
        self.shared.lock().fairness.counts()
    }
}

impl DispatchLane {
    /// Gives a slot to a delivery that has just arrived.
    pub fn take(&self) -> Slot {
        let ticket = self.shared.change(|state, now| state.take(self.id, now));
        Slot { shared: self.shared.clone(), ticket }
    }
}

impl Slot {
    /// Asks to start an attempt; waits in line for at most a minute.
    pub async fn admit(&self, request: Request<'_>) -> Admitted {
        let (sender, mut decision) = oneshot::channel();
        let entered = self.shared.change_with(|state, now| {
            let entered = state.fairness.enter(self.ticket, request, now);
            if entered == Entered::Waiting {
                state.waiters.insert(self.ticket, sender);
            }
            entered
        });
        match entered {
            Entered::Granted => return Admitted::Go(self.permit()),
            Entered::Aside(delay_s) => return Admitted::PutAside(delay_s),
            Entered::Waiting => {}
        }
        let waiter = Waiter { slot: self };
        loop {
            match tokio::time::timeout(LOOK_PAUSE, &mut decision).await {
                Ok(Ok(Decision::Go)) => {
                    std::mem::forget(waiter);
                    return Admitted::Go(self.permit());
                }
                Ok(Ok(Decision::Aside(delay_s))) => return Admitted::PutAside(delay_s),
                // Its sender is dropped only with a decision, or with the waiter.
                Ok(Err(_)) => unreachable!("a waiter is told what became of it"),
                Err(_) => self.shared.change(|state, now| state.look(self.ticket, now)),
            }
        }
    }

    fn permit(&self) -> Permit {
        Permit {
            shared: self.shared.clone(),
            ticket: self.ticket,
            outcome: Outcome::Nothing,
            weight: Weight::default(),
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.shared.change(|state, now| state.release(self.ticket, now));
    }
}

/// One that waits. Dropped, it is out of its line, and gives back what was on its way to it.
struct Waiter<'a> {
    slot: &'a Slot,
}

impl Drop for Waiter<'_> {
    fn drop(&mut self) {
        self.slot.shared.change_with(|state, now| {
            state.waiters.remove(&self.slot.ticket);
            state.fairness.withdraw(self.slot.ticket, now);
        });
    }
}

impl Permit {
    /// Lets the permit hold the room that its job takes.
    pub fn with(self, weight: Weight) -> Self {
        let mut permit = self;
        permit.weight = weight;
        permit
    }

    /// Ends the attempt with what it says about the destination.
    pub fn finish(mut self, outcome: Outcome) {
        self.outcome = outcome;
    }
}

impl std::fmt::Debug for Permit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Permit({})", self.ticket)
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.shared.change(|state, now| state.finish(self.ticket, self.outcome, now));
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change<T>(&self, change: impl FnOnce(&mut Fairness, Instant) -> T) -> T {
        self.change_with(|state, now| change(&mut state.fairness, now))
    }

    /// Changes the state, and tells those whose fate it decided.
    fn change_with<T>(&self, change: impl FnOnce(&mut State, Instant) -> T) -> T {
        let now = Instant::now();
        let mut state = self.lock();
        let result = change(&mut state, now);
        let mut told = Vec::new();
        for event in state.fairness.events() {
            let (ticket, decision) = match event {
                Event::Granted(ticket) => (ticket, Decision::Go),
                Event::Aside(ticket, delay_s) => (ticket, Decision::Aside(delay_s)),
            };
            told.extend(state.waiters.remove(&ticket).map(|waiter| (waiter, decision)));
        }
        drop(state);
        for (waiter, decision) in told {
            // One that has gone withdraws, or has done so.
            let _ = waiter.send(decision);
        }
        result
    }
}

#[cfg(test)]
#[path = "dispatch_tests.rs"]
mod tests;
