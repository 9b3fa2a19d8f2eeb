//! A delivery in the worker's hands, together with the lane it came from.
//! Guarantee: each way of ending it is counted under its lane; one that a panic drops is kept for who comes after.

use std::sync::Arc;

use time::OffsetDateTime;

use crate::broker::{Delivery, Settled};
use crate::broker::{JobHeaders, Received};
use crate::model::policy::FAULT_LIMIT;
use crate::telemetry::{self, LaneMetrics, Outcome};

use super::dispatch::DispatchLane;
use super::trail::Trail;

/// A lane as the worker serves it.
pub struct ServedLane {
    /// Its name.
    pub name: Arc<str>,
    /// Its counters.
    pub metrics: LaneMetrics,
    /// Its deliveries' slots at the dispatcher.
    pub queue: DispatchLane,
}

impl ServedLane {
    /// The lane of that name.
    pub fn new(name: &str, queue: DispatchLane) -> Self {
        Self { name: name.into(), metrics: telemetry::lane(name), queue }
    }
}

/// A delivery and its lane.
pub struct InHand<'a> {
    /// Until it is settled.
    delivery: Option<Delivery>,
    lane: &'a ServedLane,
    trail: &'a Trail,
}

impl<'a> InHand<'a> {
    /// Takes a delivery up and counts it.
    pub fn new(delivery: Delivery, lane: &'a ServedLane, trail: &'a Trail) -> Self {
        lane.metrics.job_received();
        Self::again(delivery, lane, trail)
    }

    /// Takes up one that a panic had dropped.
    pub fn again(delivery: Delivery, lane: &'a ServedLane, trail: &'a Trail) -> Self {
        Self { delivery: Some(delivery), lane, trail }
    }

    /// The message.
    pub fn received(&self) -> &Received {
        self.delivery().received()
    }

    /// Whether the broker still waits for its end. A lost delivery comes again by itself.
    pub fn is_open(&self) -> bool {
        self.delivery().is_open()
    }

    fn delivery(&self) -> &Delivery {
        self.delivery.as_ref().expect("only what consumes this takes the delivery out")
    }

    /// What is known of it, for when it must be settled after a panic.
    pub fn trail(&self) -> &'a Trail {
        self.trail
    }

    /// How often its handling has panicked, in whichever worker's hands.
    pub fn faults(&self) -> u32 {
        self.received().faults.saturating_add(self.trail.panics())
    }

    /// Whether it has just panicked for the last time that is allowed.
    pub fn is_worn(&self) -> bool {
        self.trail.panics() > 0 && self.faults() >= FAULT_LIMIT
    }

    /// Its lane.
    pub fn lane(&self) -> &'a ServedLane {
        self.lane
    }

    /// What a republish says about an unchanged copy.
    pub fn headers(&self, now: OffsetDateTime) -> JobHeaders {
        let received = self.received();
        JobHeaders {
            attempt: received.attempt,
            first_at: received.first_at.unwrap_or(now),
            turn: received.turn,
            faults: self.faults(),
        }
    }

    /// Nothing is left to be done with it. A lost channel brings it again, and the ledger knows what became of it.
    pub async fn finish(mut self, outcome: Outcome) {
        self.lane.metrics.job_settled(outcome);
        let Some(delivery) = self.delivery.take() else { return };
        if delivery.ack() == Settled::ChannelLost {
            tracing::debug!(lane = %self.lane.name, "an acknowledgement was lost with its channel");
        }
    }

    /// Back to the lane at once.
    pub async fn hand_back(mut self) {
        self.lane.metrics.job_settled(Outcome::Requeued);
        let Some(delivery) = self.delivery.take() else { return };
        if delivery.requeue().await == Settled::ChannelLost {
            tracing::debug!(lane = %self.lane.name, "the broker had taken a delivery back already");
        }
    }
}

impl Drop for InHand<'_> {
    fn drop(&mut self) {
        if let Some(delivery) = self.delivery.take() {
            self.trail.keep(delivery);
        }
    }
}
