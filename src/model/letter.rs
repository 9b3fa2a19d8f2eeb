//! A dead letter in the archive: what identifies it, where it stands, what was done with it.
//! Guarantee: everything here may be shown; body and properties are only ever in [`NewLetter`] and in what the archive opens.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use time::OffsetDateTime;
use uuid::Uuid;

use super::failure::Reason;
use super::job::{JobKey, Revision};
use super::ledger::Turn;
use super::organization::OrganizationId;

/// Entries of a letter's history that are kept; the oldest go first.
pub const HISTORY_MAX: usize = 50;

/// Who does what no person has asked for, in a letter's history.
pub const BY_ITSELF: &str = "sendoff";

/// The archive's own name for a message that died: the same for each delivery, copy and further death of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct LetterId(pub Uuid);

impl LetterId {
    /// A message is its job's key and body. One whose body tells no key is its routing key and body, so the same nonsense
    /// published twice is one letter. `body_hash` is SHA-256.
    pub fn of(key: Option<&JobKey>, routing_key: &str, body_hash: &[u8; 32]) -> Self {
        let mut hash = Sha256::new();
        match key {
            Some(JobKey { organization, id }) => {
                let organization = organization.as_ref().map_or("", |organization| organization.as_str());
                hash.update(b"job\0");
                hash.update(id.as_bytes());
                hash.update(organization.as_bytes());
            }
            None => {
                hash.update(b"message\0");
                hash.update(routing_key.as_bytes());
            }
        }
        // Neither an organization nor a routing key of AMQP's ends where the hash, of fixed length, begins.
        hash.update(body_hash);
        let mut bytes = [0; 16];
        bytes.copy_from_slice(&hash.finalize()[..16]);
        // RFC 9562 section 5.8: version 8, of our own making.
        Self(uuid::Builder::from_custom_bytes(bytes).into_uuid())
    }
}

impl std::fmt::Display for LetterId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// A place in the archive's order: when a letter died last, and its name.
pub type Place = (OffsetDateTime, LetterId);

/// Where a letter stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LetterState {
    /// Waits for a person.
    Dead,
    /// Waits for its organization's configuration.
    Parked,
    /// A replay has it recorded, and its copy is not yet confirmed.
    Replaying,
    /// Its copy is on the broker; the ledger tells what becomes of it.
    Replayed,
    /// Given up by a person.
    Discarded,
}

impl LetterState {
    /// Every state, in the order of a letter's life.
    pub const ALL: [Self; 5] = [Self::Dead, Self::Parked, Self::Replaying, Self::Replayed, Self::Discarded];

    /// The name in the database, in filters and in answers.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Dead => "dead",
            Self::Parked => "parked",
            Self::Replaying => "replaying",
            Self::Replayed => "replayed",
            Self::Discarded => "discarded",
        }
    }

    /// The state of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|state| state.as_str() == name)
    }
}

/// What a letter on its way into the archive tells of its message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Fate {
    /// It died.
    #[default]
    Dead,
    /// It waits for its organization's configuration. Only a worker says so.
    Parked,
}

impl Fate {
    /// The letter's state in the archive.
    pub fn state(self) -> LetterState {
        match self {
            Self::Dead => LetterState::Dead,
            Self::Parked => LetterState::Parked,
        }
    }
}

/// Who says that a message is dead.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Killer {
    /// A worker, which has announced it.
    Worker,
    /// The broker: unroutable, or delivered too often. Nobody has announced it, and the ledger may not know.
    Broker,
}

/// Whose a letter is.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Owner {
    /// The platform's.
    Platform,
    /// This organization's.
    Organization(OrganizationId),
    /// The body does not tell whose job it is, or is none.
    Unknown,
}

impl Owner {
    /// Whose it is, where that is an organization.
    pub fn organization(&self) -> Option<&OrganizationId> {
        match self {
            Self::Organization(organization) => Some(organization),
            Self::Platform | Self::Unknown => None,
        }
    }
}

/// In brackets what is no organization's id, for an organization may be called `platform`.
impl std::fmt::Display for Owner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Platform => f.write_str("(platform)"),
            Self::Organization(organization) => organization.fmt(f),
            Self::Unknown => f.write_str("(unknown)"),
        }
    }
}

/// A letter on its way into the archive.
#[derive(Clone)]
pub struct NewLetter {
    /// The job's id, where the body tells; of no known job while `key` is none.
    pub job_id: Option<Uuid>,
    /// The job, where the body tells id and organization.
    pub key: Option<JobKey>,
    /// The publisher's slug, where the body tells.
    pub kind: Option<String>,
    /// The lane it died in; none for an unroutable message.
    pub lane: Option<String>,
    /// As published.
    pub routing_key: String,
    /// What it tells of the message.
    pub fate: Fate,
    /// Who killed it.
    pub killer: Killer,
    /// Why.
    pub reason: Reason,
    /// In words, without addresses.
    pub detail: Option<String>,
    /// Attempts made.
    pub attempts: u32,
    /// When the job was first seen; none where nobody had seen it.
    pub first_at: Option<OffsetDateTime>,
    /// When it died, or was found dead where nobody noted it down.
    pub died_at: OffsetDateTime,
    /// Whether the broker has handed this letter out before.
    pub redelivered: bool,
    /// The job's own, where the body tells.
    pub expires_at: Option<OffsetDateTime>,
    /// The booking's revision, where the body tells.
    pub revision: Option<Revision>,
    /// The letter's turn.
    pub turn: Turn,
    /// Positions that it is for; `None`: every recipient.
    pub recipients: Option<Vec<u16>>,
    /// The publisher's bytes.
    pub body: Vec<u8>,
    /// SHA-256 of them.
    pub body_hash: [u8; 32],
    /// The properties that a republish carries on, as JSON.
    pub properties: Vec<u8>,
}

impl NewLetter {
    /// The archive's name for it.
    pub fn id(&self) -> LetterId {
        LetterId::of(self.key.as_ref(), &self.routing_key, &self.body_hash)
    }
}

/// Shows no content: body and properties are personal data.
impl std::fmt::Debug for NewLetter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NewLetter")
            .field("letter", &self.id())
            .field("reason", &self.reason)
            .field("turn", &self.turn)
            .field("bytes", &self.body.len())
            .finish_non_exhaustive()
    }
}

/// A letter of the archive, all but its content.
#[derive(Debug, Clone)]
pub struct Letter {
    /// The archive's name for it.
    pub letter: LetterId,
    /// The job's id, where the body told; of no known job while `key` is none.
    pub job_id: Option<Uuid>,
    /// The job, where the body told id and organization.
    pub key: Option<JobKey>,
    /// The publisher's slug, where the body told.
    pub kind: Option<String>,
    /// The lane it died in.
    pub lane: Option<String>,
    /// As published.
    pub routing_key: String,
    /// Where it stands.
    pub state: LetterState,
    /// Why it died last.
    pub reason: Reason,
    /// In words.
    pub detail: Option<String>,
    /// Attempts made when it died last.
    pub attempts: u32,
    /// When the job was first seen.
    pub first_at: Option<OffsetDateTime>,
    /// When it died last.
    pub died_at: OffsetDateTime,
    /// When it was archived last.
    pub archived_at: OffsetDateTime,
    /// The job's own.
    pub expires_at: Option<OffsetDateTime>,
    /// The booking's revision.
    pub revision: Option<Revision>,
    /// Of the newest letter archived.
    pub turn: Turn,
    /// Positions that it is for; `None`: every recipient.
    pub recipients: Option<Vec<u16>>,
    /// How often it died.
    pub deaths: u32,
    /// How often it was replayed.
    pub replays: u32,
    /// The turn of the copy that the last replay or release makes.
    pub replay_turn: Option<Turn>,
    /// For how long it was parked before its releases, since it was last replayed.
    pub parked_before: Duration,
    /// What was done with it, oldest first, at most [`HISTORY_MAX`] entries.
    pub history: Vec<LetterDeed>,
    /// SHA-256 of the body.
    pub body_hash: [u8; 32],
    /// The body's length.
    pub bytes: u32,
}

impl Letter {
    /// What a person calls it: its job's id, or the archive's name where the body told none.
    pub fn id(&self) -> Uuid {
        self.job_id.unwrap_or(self.letter.0)
    }

    /// Whose it is.
    pub fn owner(&self) -> Owner {
        match &self.key {
            None => Owner::Unknown,
            Some(key) => key.organization.clone().map_or(Owner::Platform, Owner::Organization),
        }
    }

    /// Where it is in the archive's order.
    pub fn place(&self) -> Place {
        (self.died_at, self.letter)
    }
}

/// What was done with a letter.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LetterDeed {
    /// What.
    pub what: Deed,
    /// When.
    #[serde(with = "time::serde::rfc3339")]
    pub at: OffsetDateTime,
    /// Who, as the audit log has it; [`BY_ITSELF`] for what nobody asked for.
    pub by: String,
    /// How a replay or release ended, once the archive knows. One that has ended well is known to the ledger only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outcome: Option<DeedOutcome>,
}

/// The kinds of deed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Deed {
    /// Published again.
    Replay,
    /// Published again by itself, for its organization's mail flows again.
    Release,
    /// Given up.
    Discard,
}

/// How a replay ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeedOutcome {
    /// The ledger's name of the state: `sent`, `dead`, `deferred`, ….
    pub state: String,
    /// Why it died again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<Reason>,
    /// When that was archived.
    #[serde(default, skip_serializing_if = "Option::is_none", with = "time::serde::rfc3339::option")]
    pub at: Option<OffsetDateTime>,
}

/// Which letters are meant; every condition that is set must hold, and an empty list is no condition.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct LetterFilter {
    /// Organizations as the table spells them: `""` is the platform. A letter of an unknown owner is of none of them.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub organizations: Vec<String>,
    /// Reasons of the last death.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub reasons: Vec<Reason>,
    /// Kinds.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub kinds: Vec<String>,
    /// States.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub states: Vec<LetterState>,
    /// Died last at this time or later.
    #[serde(skip_serializing_if = "Option::is_none", with = "time::serde::rfc3339::option")]
    pub since: Option<OffsetDateTime>,
    /// Died last before this time.
    #[serde(skip_serializing_if = "Option::is_none", with = "time::serde::rfc3339::option")]
    pub until: Option<OffsetDateTime>,
    /// Ids of jobs, or the archive's names of letters.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ids: Vec<Uuid>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_has_one_name_whichever_way_it_died() {
        let id = Uuid::from_u128(7);
        let acme = JobKey { organization: Some(OrganizationId::parse("acme").unwrap()), id };
        let platform = JobKey { organization: None, id };
        let name = |key, routing_key, body: u8| LetterId::of(key, routing_key, &[body; 32]);
        assert_eq!(name(Some(&acme), "notification.a", 1), name(Some(&acme), "notification.b", 1));
        let names = [
            name(Some(&acme), "notification.a", 1),
            name(Some(&acme), "notification.a", 2),
            name(Some(&platform), "notification.a", 1),
            name(None, "notification.a", 1),
            name(None, "notification.b", 1),
        ];
        let distinct: std::collections::HashSet<_> = names.iter().collect();
        assert_eq!(distinct.len(), names.len());
        assert_eq!(names[0].0.get_version_num(), 8);
    }

    #[test]
    fn states_have_the_names_of_the_contract() {
        for state in LetterState::ALL {
            assert_eq!(LetterState::from_name(state.as_str()), Some(state));
            assert_eq!(serde_json::to_value(state).unwrap(), state.as_str());
        }
    }
}
