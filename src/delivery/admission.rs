//! A job on its way to its attempt: read, and admitted by the dispatcher.
//! Guarantee: what waits in line is no more than a body; a great one is decoded only where it is sent, when there is room for it.

use crate::broker::wire::{self, Refusal};
use crate::model::job::Job;
use crate::model::smtp_settings::Destination;

use super::dispatch::{Admitted, Slot};
use super::fairness::Request;
use super::in_hand::InHand;
use super::route::Route;
use super::weights::GREAT_BYTES;
use super::worker::Worker;

/// Most connections at once to each kind of destination.
#[derive(Debug, Clone, Copy)]
pub struct Connections {
    /// `smtp.max_connections_per_organization`.
    pub per_organization: usize,
    /// `platform.max_connections`.
    pub platform: usize,
}

impl Connections {
    fn ceiling(&self, destination: &Destination) -> usize {
        match destination {
            Destination::Organization { .. } => self.per_organization,
            Destination::Platform => self.platform,
        }
    }
}

impl Worker {
    /// The body as a job.
    pub(super) fn read(&self, delivery: &InHand<'_>) -> Result<Job, Refusal> {
        let body = &delivery.received().body;
        heavily(body.len(), || wire::parse_job(body, &self.limits.wire))
    }

    /// The same for a job that may have to wait. Decoded attachments would wait with it: those of a great body are left out.
    pub(super) fn read_to_wait(&self, delivery: &InHand<'_>) -> Result<Job, Refusal> {
        let mut job = self.read(delivery)?;
        if is_great(delivery) {
            job.attachments.clear();
        }
        Ok(job)
    }

    /// Reads again what was left out.
    pub(super) fn read_to_send(&self, delivery: &InHand<'_>, job: &mut Job) -> Result<(), Refusal> {
        if is_great(delivery) {
            job.attachments = self.read(delivery)?.attachments;
        }
        Ok(())
    }

    /// `None` when the worker stops meanwhile.
    pub(super) async fn admit(
        &self,
        delivery: &InHand<'_>,
        job: &Job,
        route: &Route,
        slot: &Slot,
    ) -> Option<Admitted> {
        let request = Request {
            destination: &route.destination,
            organization: job.key.organization.as_ref(),
            bytes: delivery.received().body.len(),
            ceiling: self.limits.connections.ceiling(&route.destination),
        };
        let admitted = async {
            match slot.admit(request).await {
                Admitted::Go(permit) => Admitted::Go(permit.with(self.weights.work(request.bytes).await)),
                aside @ Admitted::PutAside(_) => aside,
            }
        };
        tokio::select! {
            biased;
            () = self.shutdown.stop_taking() => None,
            admitted = admitted => Some(admitted),
        }
    }
}

fn is_great(delivery: &InHand<'_>) -> bool {
    delivery.received().body.len() >= GREAT_BYTES
}

/// Does work that takes its time with so many bytes.
pub(super) fn heavily<T>(bytes: usize, work: impl FnOnce() -> T) -> T {
    if bytes < GREAT_BYTES { work() } else { tokio::task::block_in_place(work) }
}
