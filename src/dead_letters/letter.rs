//! A message from the dead letter queue as the archive takes it, and what is announced of one that nobody has announced.
//! Guarantee: any message becomes a letter, whatever its body and its headers are; its bytes stay as they are.

use sha2::{Digest, Sha256};
use time::OffsetDateTime;

use crate::broker::Received;
use crate::broker::wire;
use crate::model::event::{Event, JobFacts, What};
use crate::model::failure::Reason;
use crate::model::letter::{Killer, NewLetter};

/// What goes into the archive; `now` is when it died where nobody noted that down.
pub(super) fn letter_of(received: &Received, now: OffsetDateTime) -> NewLetter {
    let told = wire::tell(&received.body);
    let death = received.death.as_ref();
    let properties = serde_json::to_vec(&received.carried);
    NewLetter {
        key: told.key,
        kind: told.kind,
        lane: received.lane.clone(),
        routing_key: received.routing_key.clone(),
        killer: death.map_or(Killer::Broker, |death| death.killer),
        reason: death.map_or(Reason::Internal, |death| death.reason),
        detail: death.and_then(|death| death.detail.clone()),
        attempts: received.attempt,
        first_at: received.first_at,
        died_at: death.and_then(|death| death.died_at).unwrap_or(now),
        redelivered: received.redelivered,
        expires_at: told.expires_at,
        revision: told.revision,
        turn: received.turn,
        recipients: received.recipients.clone(),
        body: received.body.clone(),
        body_hash: Sha256::digest(&received.body).into(),
        properties: properties.expect("texts, numbers and flags under names that are texts are JSON"),
    }
}

/// The event of a death by the broker.
pub(super) fn event_of(letter: &NewLetter) -> Event {
    let job = letter.key.as_ref().map(|key| JobFacts {
        job_id: key.id,
        kind: letter.kind.clone(),
        group: letter.revision.as_ref().map(|revision| revision.group.clone()),
    });
    let organization_id = letter.key.as_ref().and_then(|key| key.organization.clone());
    let reason = letter.reason;
    let what = if reason == Reason::Expired { What::Expired { reason } } else { What::Dead { reason } };
    Event { at: letter.died_at, organization_id, job, what }
}
