//! A message's properties: what is read from them, and what a republish carries on.
//! Guarantee: nothing a publisher writes into headers can fail the reading, and a republish carries content type, ids,
//! timestamp, `traceparent` and small `sendoff-*` headers only: never `user_id`, `expiration`, `CC`, `BCC` or `x-*`.

use std::collections::BTreeMap;

use lapin::BasicProperties;
use lapin::types::{AMQPValue, FieldTable, ShortString};
use serde::{Deserialize, Serialize};
use time::format_description::well_known::Rfc3339;
use time::{OffsetDateTime, UtcOffset};

use super::names::Names;
use super::topology::short;
use crate::model::failure::Reason;
use crate::model::ledger::Turn;
use crate::model::letter::{Fate, Killer};
use crate::model::text;

const ATTEMPT: &str = "sendoff-attempt";
const FIRST_AT: &str = "sendoff-first-at";
const LANE: &str = "sendoff-lane";
const ROUTING_KEY: &str = "sendoff-routing-key";
const TURN: &str = "sendoff-turn";
const FAULTS: &str = "sendoff-faults";
const REASON: &str = "sendoff-reason";
const DETAIL: &str = "sendoff-detail";
const DIED_AT: &str = "sendoff-died-at";
const RECIPIENTS: &str = "sendoff-recipients";
const STATE: &str = "sendoff-state";
const OURS: [&str; 11] =
    [ATTEMPT, FIRST_AT, LANE, ROUTING_KEY, TURN, FAULTS, REASON, DETAIL, DIED_AT, RECIPIENTS, STATE];
/// The one value of that header; a letter without it is a dead one.
const PARKED: &str = "parked";
const TRACEPARENT: &str = "traceparent";

/// W3C Trace Context: 55 characters in version 00, with room for later ones.
const TRACEPARENT_MAX: usize = 128;
/// A further `sendoff-*` header's value; longer ones are not carried on.
const EXTRA_VALUE_MAX: usize = 256;
/// Further `sendoff-*` headers carried on.
const EXTRA_COUNT_MAX: usize = 16;
/// No job is handed over so often; a publisher that says so would leave no room for the turns to come.
const TURN_MAX: i32 = 1_000_000_000;
/// A dead letter's detail.
const DETAIL_MAX: usize = 500;
/// Positions that a letter can be for: `limits.max_recipients` allows no more.
const RECIPIENTS_MAX: usize = 10_000;

/// A job, a copy of it, or its dead letter, as it came off a queue.
#[derive(Clone)]
pub struct Received {
    /// The publisher's bytes.
    pub body: Vec<u8>,
    /// The lane it belongs to; unknown only for a dead letter that never had one.
    pub lane: Option<String>,
    /// As published, whichever way it came.
    pub routing_key: String,
    /// Whether the broker has handed it out before.
    pub redelivered: bool,
    /// Attempts made so far, as the copy says; the ledger knows better.
    pub attempt: u32,
    /// When the job was first seen, as the copy says.
    pub first_at: Option<OffsetDateTime>,
    /// Which copy this is, as the copy says; 0 where it says nothing usable.
    pub turn: Turn,
    /// How often a worker has panicked over it, as the copy says; absent: 0.
    pub faults: u32,
    /// What a republish carries on.
    pub carried: Carried,
    /// On a message from the dead letter queue: what killed it.
    pub death: Option<Death>,
    /// On a worker's letter that is for some of its job's recipients only: their positions over to + cc + bcc, ascending.
    pub recipients: Option<Vec<u16>>,
}

/// Properties of the publisher's that every republish keeps.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Carried {
    /// MIME type.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content_type: Option<String>,
    /// The publisher's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message_id: Option<String>,
    /// The publisher's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub correlation_id: Option<String>,
    /// When it was published, in seconds since 1970.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timestamp_s: Option<u64>,
    /// W3C Trace Context.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub traceparent: Option<String>,
    /// Further headers named `sendoff-*`, small ones only.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub extra: BTreeMap<String, Scalar>,
}

/// A small header value.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Scalar {
    /// A boolean.
    Flag(bool),
    /// Any of AMQP's integers.
    Integer(i64),
    /// UTF-8 text.
    Text(String),
}

/// What the worker says of a copy that it makes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct JobHeaders {
    /// Attempts made so far.
    pub attempt: u32,
    /// When the job was first seen.
    pub first_at: OffsetDateTime,
    /// The turn that the copy belongs to.
    pub turn: Turn,
    /// How often a worker has panicked over the job since it was published or replayed.
    pub faults: u32,
}

/// Why a message is in the dead letter queue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Death {
    /// A worker's reason; or `unroutable`, `crash_loop` or `expired` where the broker killed it.
    pub reason: Reason,
    /// In words.
    pub detail: Option<String>,
    /// When; unknown for an unroutable job.
    pub died_at: Option<OffsetDateTime>,
    /// Who.
    pub killer: Killer,
    /// Whether it is dead, or waits.
    pub fate: Fate,
}

impl Received {
    /// When the publisher says that it published the job.
    pub fn published_at(&self) -> Option<OffsetDateTime> {
        let seconds = i64::try_from(self.carried.timestamp_s?).ok()?;
        OffsetDateTime::from_unix_timestamp(seconds).ok()
    }

    /// A message that lay in the archive, to be published again: what is said of its copy comes with the publish.
    pub fn of_archive(body: Vec<u8>, routing_key: String, carried: Carried) -> Self {
        Self {
            body,
            lane: None,
            routing_key,
            redelivered: false,
            attempt: 0,
            first_at: None,
            turn: Turn::default(),
            carried,
            faults: 0,
            death: None,
            recipients: None,
        }
    }

    /// Reads a message from a lane's queue.
    pub(super) fn from_lane(delivery: &mut lapin::message::Delivery, names: &Names, lane: &str) -> Self {
        let came_by_topic = delivery.exchange.as_str() == names.jobs();
        Self::read(delivery, came_by_topic, Some(lane.to_owned()), None)
    }

    /// Reads a message from the dead letter queue.
    pub(super) fn from_dead(delivery: &mut lapin::message::Delivery, names: &Names) -> Self {
        // Through the alternate exchange a message keeps the name of the exchange it was published to.
        let unrouted = delivery.exchange.as_str() == names.jobs();
        let headers = delivery.properties.headers().clone().unwrap_or_default();
        let killer = BrokerDeath::first(&headers);
        let (lane, death, recipients) = match killer {
            _ if unrouted => (None, Death::unroutable(delivery.routing_key.as_str()), None),
            Some(killer) => (names.lane_of(&killer.queue), killer.into_death(), None),
            None => (text_of(&headers, LANE, 64), Death::by_worker(&headers), recipients_of(&headers)),
        };
        Self { recipients, ..Self::read(delivery, unrouted, lane, Some(death)) }
    }

    fn read(
        delivery: &mut lapin::message::Delivery,
        key_is_original: bool,
        lane: Option<String>,
        death: Option<Death>,
    ) -> Self {
        let none = FieldTable::default();
        let headers = delivery.properties.headers().as_ref().unwrap_or(&none);
        let original = if key_is_original { None } else { text_of(headers, ROUTING_KEY, 255) };
        Self {
            lane,
            routing_key: original.unwrap_or_else(|| delivery.routing_key.as_str().to_owned()),
            redelivered: delivery.redelivered,
            attempt: integer_of(headers, ATTEMPT).and_then(|n| u32::try_from(n).ok()).unwrap_or(0),
            first_at: time_of(headers, FIRST_AT),
            turn: Turn(
                integer_of(headers, TURN)
                    .and_then(|n| i32::try_from(n).ok())
                    .filter(|n| (0..=TURN_MAX).contains(n))
                    .unwrap_or(0),
            ),
            faults: integer_of(headers, FAULTS).and_then(|n| u32::try_from(n).ok()).unwrap_or(0),
            carried: Carried::read(&delivery.properties),
            death,
            recipients: None,
            body: std::mem::take(&mut delivery.data),
        }
    }
}

/// Shows sizes and counters: the body is personal data.
impl std::fmt::Debug for Received {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Received")
            .field("lane", &self.lane)
            .field("bytes", &self.body.len())
            .field("attempt", &self.attempt)
            .field("turn", &self.turn)
            .field("death", &self.death.as_ref().map(|death| death.reason))
            .finish_non_exhaustive()
    }
}

impl Carried {
    fn read(properties: &BasicProperties) -> Self {
        let owned = |text: &Option<ShortString>| text.as_ref().map(|text| text.as_str().to_owned());
        let none = FieldTable::default();
        let headers = properties.headers().as_ref().unwrap_or(&none);
        let extra = headers
            .into_iter()
            .filter(|(name, _)| name.as_str().starts_with("sendoff-") && !OURS.contains(&name.as_str()))
            .filter_map(|(name, value)| Some((name.as_str().to_owned(), Scalar::read(value)?)))
            .take(EXTRA_COUNT_MAX);
        Self {
            content_type: owned(properties.content_type()),
            message_id: owned(properties.message_id()),
            correlation_id: owned(properties.correlation_id()),
            timestamp_s: *properties.timestamp(),
            traceparent: text_of(headers, TRACEPARENT, TRACEPARENT_MAX).filter(|value| value.is_ascii()),
            extra: extra.collect(),
        }
    }

    /// Properties of a republish, persistent, with these headers beside the carried ones.
    pub(super) fn to_properties(&self, ours: Vec<(&'static str, AMQPValue)>) -> BasicProperties {
        let mut headers = FieldTable::default();
        for (name, value) in &self.extra {
            if let Some(name) = short(name) {
                headers.insert(name, value.to_amqp());
            }
        }
        if let Some(traceparent) = &self.traceparent {
            headers.insert(TRACEPARENT.into(), long(traceparent));
        }
        for (name, value) in ours {
            headers.insert(name.into(), value);
        }
        let mut properties = persistent().with_headers(headers);
        if let Some(content_type) = self.content_type.as_deref().and_then(short) {
            properties = properties.with_content_type(content_type);
        }
        if let Some(message_id) = self.message_id.as_deref().and_then(short) {
            properties = properties.with_message_id(message_id);
        }
        if let Some(correlation_id) = self.correlation_id.as_deref().and_then(short) {
            properties = properties.with_correlation_id(correlation_id);
        }
        if let Some(timestamp) = self.timestamp_s {
            properties = properties.with_timestamp(timestamp);
        }
        properties
    }
}

impl Scalar {
    fn read(value: &AMQPValue) -> Option<Self> {
        match value {
            AMQPValue::Boolean(flag) => Some(Self::Flag(*flag)),
            AMQPValue::LongString(_) | AMQPValue::ShortString(_) => {
                text_in(value, EXTRA_VALUE_MAX).map(Self::Text)
            }
            other => integer_in(other).map(Self::Integer),
        }
    }

    fn to_amqp(&self) -> AMQPValue {
        match self {
            Self::Flag(flag) => AMQPValue::Boolean(*flag),
            Self::Integer(number) => AMQPValue::LongLongInt(*number),
            Self::Text(text) => long(text),
        }
    }
}

impl Death {
    fn unroutable(routing_key: &str) -> Self {
        let key = text::single_line(routing_key);
        let detail = Some(format!("no lane takes the routing key `{key}`"));
        Self { reason: Reason::Unroutable, detail, died_at: None, killer: Killer::Broker, fate: Fate::Dead }
    }

    fn by_worker(headers: &FieldTable) -> Self {
        let reason = text_of(headers, REASON, 64).and_then(|name| Reason::from_name(&name));
        let detail = text_of(headers, DETAIL, 4 * DETAIL_MAX);
        let died_at = time_of(headers, DIED_AT);
        // A worker always says when; what somebody else has put into the queue, no worker has announced.
        let killer = if died_at.is_some() { Killer::Worker } else { Killer::Broker };
        let says_parked = text_of(headers, STATE, 16).is_some_and(|state| state == PARKED);
        let fate = if says_parked && killer == Killer::Worker { Fate::Parked } else { Fate::Dead };
        Self {
            reason: reason.unwrap_or(Reason::Internal),
            detail: detail.map(|detail| text::bounded(&text::single_line(&detail), DETAIL_MAX)),
            died_at,
            killer,
            fate,
        }
    }
}

/// The newest entry of `x-death`. A republish by a worker carries none, so on a letter that did not come by the alternate
/// exchange the first entry is the broker's own, whatever a publisher had put there.
struct BrokerDeath {
    queue: String,
    reason: String,
    at: Option<OffsetDateTime>,
}

impl BrokerDeath {
    fn first(headers: &FieldTable) -> Option<Self> {
        let AMQPValue::FieldArray(deaths) = headers.inner().get("x-death")? else { return None };
        let AMQPValue::FieldTable(newest) = deaths.as_slice().first()? else { return None };
        let at = match newest.inner().get("time") {
            Some(AMQPValue::Timestamp(seconds)) => {
                i64::try_from(*seconds).ok().and_then(|s| OffsetDateTime::from_unix_timestamp(s).ok())
            }
            _ => None,
        };
        Some(Self { queue: text_of(newest, "queue", 255)?, reason: text_of(newest, "reason", 64)?, at })
    }

    fn into_death(self) -> Death {
        let (reason, detail) = match self.reason.as_str() {
            "delivery_limit" => {
                (Reason::CrashLoop, "the broker delivered it up to its limit without an answer".to_owned())
            }
            "expired" => (Reason::Expired, "its expiration passed while it waited in its lane".to_owned()),
            other => {
                (Reason::Internal, format!("the broker took it from its lane: {}", text::single_line(other)))
            }
        };
        Death { reason, detail: Some(detail), died_at: self.at, killer: Killer::Broker, fate: Fate::Dead }
    }
}

/// The headers of every copy that a worker makes.
pub(super) fn job_headers(
    lane: &str,
    routing_key: &str,
    headers: &JobHeaders,
) -> Vec<(&'static str, AMQPValue)> {
    let mut ours = vec![
        (ATTEMPT, AMQPValue::LongLongInt(i64::from(headers.attempt))),
        (FIRST_AT, time_value(headers.first_at)),
        (LANE, long(lane)),
        (ROUTING_KEY, long(routing_key)),
        (TURN, AMQPValue::LongLongInt(i64::from(headers.turn.0))),
    ];
    if headers.faults > 0 {
        ours.push((FAULTS, AMQPValue::LongLongInt(i64::from(headers.faults))));
    }
    ours
}

/// What a dead letter bears beside them.
pub(super) fn death_headers(death: &DeadLetter<'_>) -> Vec<(&'static str, AMQPValue)> {
    let mut headers = vec![
        (REASON, long(death.reason.as_str())),
        (DETAIL, long(&text::bounded(&text::single_line(death.detail), DETAIL_MAX))),
        (DIED_AT, time_value(death.died_at)),
    ];
    if let Some(recipients) = death.recipients {
        let positions: Vec<String> = recipients.iter().map(u16::to_string).collect();
        headers.push((RECIPIENTS, long(&positions.join(","))));
    }
    if death.fate == Fate::Parked {
        headers.push((STATE, long(PARKED)));
    }
    headers
}

/// What is said of a dead letter.
#[derive(Debug, Clone, Copy)]
pub struct DeadLetter<'a> {
    /// From the contract.
    pub reason: Reason,
    /// In words, without addresses.
    pub detail: &'a str,
    /// When it was given up.
    pub died_at: OffsetDateTime,
    /// Positions over to + cc + bcc that it is for, ascending; `None`: every recipient.
    pub recipients: Option<&'a [u16]>,
    /// Whether it is dead, or waits for its organization's configuration.
    pub fate: Fate,
}

/// Delivery mode 2 (AMQP 0-9-1 section 1.8.1): written to disk before it is confirmed.
pub(super) fn persistent() -> BasicProperties {
    BasicProperties::default().with_delivery_mode(2)
}

fn long(text: &str) -> AMQPValue {
    AMQPValue::LongString(text.into())
}

fn time_value(at: OffsetDateTime) -> AMQPValue {
    let text = at.format(&Rfc3339);
    long(&text.expect("a time of the ledger's or the clock's has a year of four digits"))
}

fn text_of(headers: &FieldTable, name: &str, max: usize) -> Option<String> {
    text_in(headers.inner().get(name)?, max)
}

fn text_in(value: &AMQPValue, max: usize) -> Option<String> {
    let bytes = match value {
        AMQPValue::LongString(text) => text.as_bytes(),
        AMQPValue::ShortString(text) => text.as_str().as_bytes(),
        _ => return None,
    };
    (!bytes.is_empty() && bytes.len() <= max).then(|| std::str::from_utf8(bytes).ok().map(str::to_owned))?
}

fn integer_of(headers: &FieldTable, name: &str) -> Option<i64> {
    integer_in(headers.inner().get(name)?)
}

fn integer_in(value: &AMQPValue) -> Option<i64> {
    match value {
        AMQPValue::ShortShortInt(n) => Some(i64::from(*n)),
        AMQPValue::ShortShortUInt(n) => Some(i64::from(*n)),
        AMQPValue::ShortInt(n) => Some(i64::from(*n)),
        AMQPValue::ShortUInt(n) => Some(i64::from(*n)),
        AMQPValue::LongInt(n) => Some(i64::from(*n)),
        AMQPValue::LongUInt(n) => Some(i64::from(*n)),
        AMQPValue::LongLongInt(n) => Some(*n),
        _ => None,
    }
}

/// Positions in ascending order, separated by commas; anything else is as good as absent.
fn recipients_of(headers: &FieldTable) -> Option<Vec<u16>> {
    // Five digits and a comma each.
    let text = text_of(headers, RECIPIENTS, 6 * RECIPIENTS_MAX)?;
    let digits = |item: &&str| item.bytes().all(|byte| byte.is_ascii_digit());
    let positions: Vec<u16> =
        text.split(',').map(|item| Some(item).filter(digits)?.parse().ok()).collect::<Option<_>>()?;
    let ascend = positions.windows(2).all(|two| two[0] < two[1]);
    (ascend && positions.len() <= RECIPIENTS_MAX).then_some(positions)
}

/// In UTC, where it can still be written: not the first hours of the year 0 in the east, nor the last of 9999 in the west.
fn time_of(headers: &FieldTable, name: &str) -> Option<OffsetDateTime> {
    let at = OffsetDateTime::parse(&text_of(headers, name, 64)?, &Rfc3339).ok()?;
    at.checked_to_offset(UtcOffset::UTC).filter(|at| at.year() >= 0)
}

#[cfg(test)]
#[path = "headers_tests.rs"]
mod tests;
