//! A delivery in the worker's hands, together with the lane it came from.
//! Guarantee: each way of ending it is counted under its lane.

use std::sync::Arc;

use time::OffsetDateTime;

use crate::broker::{Delivery, Settled};
use crate::broker::{JobHeaders, Received};
use crate::telemetry::{self, LaneMetrics, Outcome};

/// A lane as the worker serves it.
pub struct ServedLane {
    /// Its name.
    pub name: Arc<str>,
    /// Its counters.
    pub metrics: LaneMetrics,
}

impl ServedLane {
    /// The lane of that name.
    pub fn new(name: &str) -> Self {
        Self { name: name.into(), metrics: telemetry::lane(name) }
    }
}

/// A delivery and its lane.
pub struct InHand<'a> {
    delivery: Delivery,
    lane: &'a ServedLane,
}

impl<'a> InHand<'a> {
    /// Takes a delivery up and counts it.
    pub fn new(delivery: Delivery, lane: &'a ServedLane) -> Self {
        lane.metrics.job_received();
        Self { delivery, lane }
    }

    /// The message.
    pub fn received(&self) -> &Received {
        self.delivery.received()
    }

    /// Whether the broker still waits for its end. A lost delivery comes again by itself.
    pub fn is_open(&self) -> bool {
        self.delivery.is_open()
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
        }
    }

    /// Nothing is left to be done with it. A lost channel brings it again, and the ledger knows what became of it.
    pub async fn finish(self, outcome: Outcome) {
        self.lane.metrics.job_settled(outcome);
        if self.delivery.ack().await == Settled::ChannelLost {
            tracing::debug!(lane = %self.lane.name, "an acknowledgement was lost with its channel");
        }
    }

    /// Back to the lane at once.
    pub async fn hand_back(self) {
        self.lane.metrics.job_settled(Outcome::Requeued);
        if self.delivery.requeue().await == Settled::ChannelLost {
            tracing::debug!(lane = %self.lane.name, "the broker had taken a delivery back already");
        }
    }
}
