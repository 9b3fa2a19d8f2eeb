//! What is said of parked letters: deaths and recoveries.
//! Guarantee: whether it was said is known; what was not is said again by the next step.

use super::{PATIENCE, Progress, Releaser, organization_of};
use crate::model::event::{Event, JobFacts, What};
use crate::model::failure::Reason;
use crate::model::letter::LetterId;
use crate::model::organization::OrganizationId;
use crate::store::{Burial, StoreError, Trouble};

impl Releaser {
    /// Says what a worker says of a job that it gives up. Whether all was said.
    pub(super) async fn announce_death(&self, burial: &Burial) -> bool {
        let Burial { letter, reason, partly_sent, .. } = burial;
        let event = |what| Event {
            at: self.clock.now(),
            organization_id: organization_of(letter).and_then(|id| OrganizationId::stored(id.as_str()).ok()),
            job: letter.job_id.map(|job_id| JobFacts {
                job_id,
                kind: letter.kind.clone(),
                group: letter.revision.as_ref().map(|revision| revision.group.clone()),
            }),
            what,
        };
        let first = partly_sent.as_ref().and_then(|partly| partly.refused.first());
        let reason = first.map_or(*reason, |refused| refused.reason);
        let death = if reason == Reason::Expired { What::Expired { reason } } else { What::Dead { reason } };
        let sent = partly_sent.as_ref().map(|partly| What::Sent {
            message_id: partly.message_id.clone(),
            transport: partly.transport,
            recipients_refused: partly.refused.clone(),
        });
        for what in std::iter::once(death).chain(sent) {
            if !self.announce(&event(what)).await {
                return false;
            }
        }
        true
    }

    async fn announce(&self, event: &Event) -> bool {
        let publisher = self.publisher.with_patience(PATIENCE);
        let announced = tokio::select! {
            biased;
            () = self.shutdown.stop_now() => return false,
            announced = publisher.event(event) => announced,
        };
        if let Err(error) = &announced {
            tracing::debug!(event = event.what.routing_key(), %error, "an event was not confirmed; it is tried again");
        }
        announced.is_ok()
    }

    /// What is released, and what had failed without anybody having said so.
    pub(super) async fn announce_recoveries(&self, progress: &Progress) -> Result<(), StoreError> {
        let stuck: Vec<LetterId> = progress.stuck.iter().copied().collect();
        for recovery in self.store.finished_recoveries(&stuck).await? {
            if let Some(Trouble { organization, version, reason, hint }) = &recovery.unannounced {
                let what = What::ConfigFailing { version: *version, reason: *reason, hint: hint.clone() };
                if !self.announce(&Event::of_organization(self.clock.now(), organization.clone(), what)).await
                {
                    break;
                }
            }
            let what = What::ConfigRecovered { released: recovery.released };
            let event = Event::of_organization(self.clock.now(), recovery.organization.clone(), what);
            if !self.announce(&event).await {
                break;
            }
            tracing::info!(
                organization = %recovery.organization,
                released = recovery.released,
                "an organization's mail flows again"
            );
            self.store.forget_recovery(&recovery).await?;
        }
        Ok(())
    }
}
