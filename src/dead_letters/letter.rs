//! A message from the dead letter queue as the archive takes it, and what is announced of one that nobody has announced.
//! Guarantee: any message becomes a letter, whatever its body and its headers are; its bytes stay as they are, and its detail
//! shows no address.

use std::time::Duration;

use sha2::{Digest, Sha256};
use time::macros::datetime;
use time::{OffsetDateTime, UtcOffset};

use crate::broker::Received;
use crate::broker::wire;
use crate::model::address::mask_addresses;
use crate::model::event::{Event, JobFacts, What};
use crate::model::failure::Reason;
use crate::model::letter::{Killer, NewLetter};

/// Clocks differ by less. A death noted down for later is a stranger's: its letter would lead every listing and outlive its
/// retention.
const SKEW: Duration = Duration::from_secs(3600);

/// What goes into the archive; `now` is when it died where nobody noted that down.
pub(super) fn letter_of(received: &Received, now: OffsetDateTime) -> NewLetter {
    let told = wire::tell(&received.body);
    let death = received.death.as_ref();
    let properties = serde_json::to_vec(&received.carried);
    NewLetter {
        job_id: told.id,
        key: told.key,
        kind: told.kind,
        lane: received.lane.clone(),
        routing_key: received.routing_key.clone(),
        fate: death.map(|death| death.fate).unwrap_or_default(),
        killer: death.map_or(Killer::Broker, |death| death.killer),
        reason: death.map_or(Reason::Internal, |death| death.reason),
        // Not every letter is a worker's: a routing key or a stranger's header says what it likes.
        detail: death.and_then(|death| death.detail.as_deref()).map(mask_addresses),
        attempts: received.attempt,
        first_at: received.first_at,
        died_at: death.and_then(|death| death.died_at).filter(|at| *at < now + SKEW).unwrap_or(now),
        redelivered: received.redelivered,
        expires_at: told.expires_at.map(in_utc),
        revision: told.revision,
        turn: received.turn,
        recipients: received.recipients.clone(),
        body: received.body.clone(),
        body_hash: Sha256::digest(&received.body).into(),
        properties: properties.expect("texts, numbers and flags under names that are texts are JSON"),
    }
}

/// The database keeps UTC, in which not every time can be written that an offset allows: in the east the year 0 begins some
/// hours before it does there, and in the west the year 9999 goes on for some.
fn in_utc(at: OffsetDateTime) -> OffsetDateTime {
    let (first, last) = (datetime!(0000-01-01 0:00 UTC), datetime!(9999-12-31 23:59:59 UTC));
    at.checked_to_offset(UtcOffset::UTC).unwrap_or(last).max(first)
}

/// The event of a death by the broker.
pub(super) fn event_of(letter: &NewLetter) -> Event {
    let job = letter.job_id.map(|job_id| JobFacts {
        job_id,
        kind: letter.kind.clone(),
        group: letter.revision.as_ref().map(|revision| revision.group.clone()),
    });
    let organization_id = letter.key.as_ref().and_then(|key| key.organization.clone());
    let reason = letter.reason;
    let what = if reason == Reason::Expired { What::Expired { reason } } else { What::Dead { reason } };
    Event { at: letter.died_at, organization_id, job, what }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::broker::{Carried, Death};
    use crate::model::ledger::Turn;
    use crate::model::letter::Fate;

    const NOW: OffsetDateTime = datetime!(2026-11-22 20:00 UTC);
    const BEFORE: OffsetDateTime = datetime!(2026-11-22 19:00 UTC);

    fn received(body: &[u8], death: Option<Death>) -> Received {
        Received {
            body: body.to_vec(),
            lane: Some("reminders".into()),
            routing_key: "reminder.x".into(),
            redelivered: false,
            attempt: 2,
            first_at: Some(BEFORE),
            turn: Turn(3),
            faults: 0,
            carried: Carried::default(),
            death,
            recipients: Some(vec![1]),
        }
    }

    fn death(reason: Reason, detail: &str) -> Death {
        Death {
            reason,
            detail: Some(detail.into()),
            died_at: Some(BEFORE),
            killer: Killer::Worker,
            fate: Fate::Parked,
        }
    }

    #[test]
    fn a_letter_says_what_its_message_says_and_shows_no_address() {
        let said = death(Reason::MessageRefused, "550 5.7.1 <ann.lee@customer.example> has had enough");
        let body = json!({"id": uuid::Uuid::nil(), "kind": "booking.confirmed"}).to_string();
        let letter = letter_of(&received(body.as_bytes(), Some(said)), NOW);
        assert_eq!(
            (letter.reason, letter.killer, letter.died_at),
            (Reason::MessageRefused, Killer::Worker, BEFORE)
        );
        assert_eq!(letter.fate, Fate::Parked);
        assert_eq!(letter.detail.as_deref(), Some("550 5.7.1 <a…@customer.example> has had enough"));
        assert_eq!((letter.attempts, letter.turn, letter.recipients), (2, Turn(3), Some(vec![1])));
        assert_eq!(letter.key.map(|key| (key.organization, key.id)), Some((None, uuid::Uuid::nil())));
        assert_eq!((letter.kind.as_deref(), letter.body), (Some("booking.confirmed"), body.into_bytes()));
    }

    #[test]
    fn a_message_that_says_nothing_is_a_letter_that_was_found_dead_now() {
        let letter = letter_of(&received(b"\xff", None), NOW);
        assert_eq!(letter.job_id, None);
        assert_eq!((letter.reason, letter.killer, letter.died_at), (Reason::Internal, Killer::Broker, NOW));
        assert_eq!((letter.key, letter.kind, letter.detail), (None, None, None));
        let event = serde_json::to_value(event_of(&letter_of(&received(b"", None), NOW))).unwrap();
        let nobodys = json!({"type": "email.dead", "reason": "internal", "at": "2026-11-22T20:00:00Z", "organization_id": null});
        assert_eq!(event, nobodys);
    }

    #[test]
    fn an_id_without_a_usable_organization_is_told_and_is_nobodys_job() {
        let id = uuid::Uuid::from_u128(7);
        let body = json!({"id": id, "organization_id": "not valid!"}).to_string();
        let letter = letter_of(&received(body.as_bytes(), None), NOW);
        assert_eq!((letter.job_id, &letter.key), (Some(id), &None));
        let event = serde_json::to_value(event_of(&letter)).unwrap();
        assert_eq!((&event["job_id"], &event["organization_id"]), (&json!(id), &json!(null)));
    }

    #[test]
    fn nothing_died_in_the_future() {
        let said = |died_at| Death { died_at: Some(died_at), ..death(Reason::Expired, "too late") };
        let ahead = datetime!(2026-11-22 20:01 UTC);
        assert_eq!(letter_of(&received(b"", Some(said(ahead))), NOW).died_at, ahead);
        let absurd = datetime!(2999-01-01 00:00 UTC);
        assert_eq!(letter_of(&received(b"", Some(said(absurd))), NOW).died_at, NOW);
    }

    #[test]
    fn an_expiration_is_announced_as_one() {
        let letter = letter_of(&received(b"{}", Some(death(Reason::Expired, "too late"))), NOW);
        assert_eq!(event_of(&letter).what.routing_key(), "email.expired");
    }
}
