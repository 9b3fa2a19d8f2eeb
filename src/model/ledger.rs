//! A job's states in the ledger, and what the worker asks of it.
//! Guarantee: `sent` is final; every other state changes only in the ways written here.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use time::OffsetDateTime;

use super::event::RefusedRecipient;
use super::failure::{Phase, Reason};
use super::job::{JobKey, Revision};

/// Where a job stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// A worker has it.
    Claimed,
    /// Accepted by the server.
    Sent,
    /// Waits for its next attempt.
    Deferred,
    /// Waits for its organization's configuration.
    Parked,
    /// Given up, with a reason.
    Dead,
    /// It cannot be known whether it was accepted.
    Unknown,
    /// Called back, and not sent.
    Cancelled,
}

impl State {
    /// Every state, in the contract's order.
    pub const ALL: [Self; 7] =
        [Self::Claimed, Self::Sent, Self::Deferred, Self::Parked, Self::Dead, Self::Unknown, Self::Cancelled];

    /// The name in the database and in answers.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Claimed => "claimed",
            Self::Sent => "sent",
            Self::Deferred => "deferred",
            Self::Parked => "parked",
            Self::Dead => "dead",
            Self::Unknown => "unknown",
            Self::Cancelled => "cancelled",
        }
    }

    /// The state of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|state| state.as_str() == name)
    }
}

/// A worker's life: from taking its advisory lock to losing it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Incarnation(pub i32);

/// Which copy of a job this is: raised at every recorded hand-over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Turn(pub i32);

impl Turn {
    /// The turn of the copy that the next hand-over makes.
    pub fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

/// A worker's request to work on one copy of a job.
#[derive(Debug, Clone)]
pub struct Claim {
    /// The job.
    pub key: JobKey,
    /// SHA-256 of the body.
    pub body_hash: [u8; 32],
    /// The copy's turn.
    pub turn: Turn,
    /// The booking's revision; marks the sequence as taken up.
    pub revision: Option<Revision>,
    /// Message-ID to keep, unless one is kept already.
    pub message_id: String,
    /// The worker has a turn for a job that died with another worker; without it such a job is not granted.
    pub suspects: bool,
}

/// What the ledger answers to a claim.
#[derive(Debug, Clone)]
pub enum ClaimAnswer {
    /// The worker has the job.
    Claimed(Box<Claimed>),
    /// Sent before: nothing is to be done with this copy.
    AlreadySent,
    /// The id belongs to another body.
    IdConflict,
    /// This turn is another worker's, or this worker's own in another copy.
    Held {
        /// The claim's owner.
        owner: Incarnation,
    },
    /// It was in the hands of so many workers that died: the worker is to take a turn for it, and claim again.
    Suspect {
        /// Counting the one whose claim this would take over.
        crashes: u32,
    },
    /// The current copy, before its time.
    NotYet {
        /// How long it must still wait.
        wait: Duration,
    },
    /// A copy of an earlier turn.
    Stale(HandOver),
    /// The current turn is not to be worked on: dead, parked, cancelled, or unknown and held. The copy is the letter itself,
    /// moved back by some tool.
    Closed(HandOver),
}

/// The last recorded hand-over of a job, enough to repeat it.
#[derive(Debug, Clone)]
pub struct HandOver {
    /// Which worker recorded it.
    pub owner: Incarnation,
    /// The turn of the copy that it made.
    pub turn: Turn,
    /// What it was.
    pub state: State,
    /// Why.
    pub reason: Option<Reason>,
    /// What the dead letter's detail was.
    pub detail: Option<String>,
    /// Positions that were still to be sent to; `None`: every recipient.
    pub pending: Option<Vec<u16>>,
    /// How long the new copy has still to wait.
    pub wait: Duration,
    /// Attempts made.
    pub attempts: u32,
    /// When the job was first seen.
    pub first_at: OffsetDateTime,
    /// When it was last replayed; since a release, from when its age counts.
    pub replayed_at: Option<OffsetDateTime>,
    /// How long ago it was recorded. A worker that vanished is noticed only after some seconds, so "its recorder lives"
    /// is no proof of anything while this is short.
    pub age: Duration,
    /// The copy that it made was claimed since: it is on its way, and nothing is left to repeat.
    pub taken_up: bool,
}

/// A granted claim with what the ledger knows of the job.
#[derive(Debug, Clone)]
pub struct Claimed {
    /// Who owns it now.
    pub owner: Incarnation,
    /// Its turn, as the ledger has it.
    pub turn: Turn,
    /// Attempts made before.
    pub attempts: u32,
    /// Those of them that do not count towards the end of the retries: made before the last replay, or lost to a fault of
    /// the configuration.
    pub spared: u32,
    /// When it was first seen.
    pub first_at: OffsetDateTime,
    /// When it was last replayed: its age and its retries count from there. A release moves it on by the time that the job was
    /// parked: both go on as if it had not been.
    pub replayed_at: Option<OffsetDateTime>,
    /// Why it was put off last, or, where its own last attempt was, what it was parked for.
    pub reason: Option<Reason>,
    /// The database's time of the claim.
    pub now: OffsetDateTime,
    /// The Message-ID to use, with angle brackets.
    pub message_id: String,
    /// Positions still to be sent to; `None`: every recipient.
    pub pending: Option<Vec<u16>>,
    /// Recipients refused for good by earlier attempts.
    pub refused: Vec<RefusedRecipient>,
    /// Whether some recipient has accepted before.
    pub partly_sent: bool,
    /// Set when the claim was taken from a worker that died.
    pub orphan: Option<Orphan>,
    /// Claims by workers that died, this one's predecessor included.
    pub crashes: u32,
    /// Unknown outcomes so far.
    pub unknowns: u32,
    /// The highest sequence of its group that was taken up or called back.
    pub newest_sequence: Option<i64>,
    /// It was called back, by its id or by its booking's revision.
    pub cancelled: bool,
    /// The organization's feature flag, as of the claim.
    pub custom_smtp: bool,
    /// The organization's configuration version, as of the claim.
    pub config_version: Option<i64>,
    /// Whether that configuration is failing, as of the claim.
    pub config_failing: bool,
}

impl Claimed {
    /// From when its age counts, and what its message gives as its date.
    pub fn counted_from(&self) -> OffsetDateTime {
        self.replayed_at.unwrap_or(self.first_at)
    }
}

impl HandOver {
    /// From when the age of its copy counts. A dead letter tells of the whole story.
    pub fn counted_from(&self) -> OffsetDateTime {
        self.replayed_at.filter(|_| self.state == State::Deferred).unwrap_or(self.first_at)
    }
}

/// What is known of the claim of a worker that died.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Orphan {
    /// Whether it had written its mark before the final dot (only some jobs do).
    pub committing: bool,
}

/// The last look before DATA.
#[derive(Debug, Clone)]
pub struct Gate {
    /// The job.
    pub key: JobKey,
    /// The claim's owner and turn.
    pub owner: Incarnation,
    /// The claim's turn.
    pub turn: Turn,
    /// Write the mark that the final dot is about to be sent.
    pub commit: bool,
    /// The booking, to see whether a newer revision has come meanwhile.
    pub revision: Option<Revision>,
}

/// What the last look saw.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GateAnswer {
    /// Go on.
    Open,
    /// The claim is no longer the worker's.
    NotOwner,
    /// It was called back.
    Cancelled,
    /// A higher sequence was taken up or called back.
    Superseded {
        /// The highest one.
        by: i64,
    },
}

/// What becomes of a claimed job.
#[derive(Debug, Clone)]
pub struct Settle {
    /// The job.
    pub key: JobKey,
    /// The claim's owner.
    pub owner: Incarnation,
    /// The claim's turn.
    pub turn: Turn,
    /// What is recorded.
    pub outcome: Settlement,
    /// Attempts made, this one included.
    pub attempts: u32,
    /// Those of them that do not count towards the end of the retries.
    pub spared: u32,
    /// Unknown outcomes so far, this one included.
    pub unknowns: u32,
    /// The Message-ID that was used.
    pub message_id: String,
    /// Positions still to be sent to; `None`: every recipient.
    pub pending: Option<Vec<u16>>,
    /// Every recipient refused for good so far.
    pub refused: Vec<RefusedRecipient>,
    /// Whether some recipient has accepted, in this attempt or before.
    pub partly_sent: bool,
    /// The server's last reply.
    pub reply: Option<String>,
    /// The attempt's record; none for a first attempt that succeeded, or where nothing was attempted.
    pub attempt: Option<AttemptRecord>,
}

/// The states that a claim can be settled into.
#[derive(Debug, Clone)]
pub enum Settlement {
    /// Accepted; nobody is pending. The turn stays.
    Sent,
    /// To be tried again: a hand-over, so the turn is raised.
    Deferred {
        /// Why.
        reason: Reason,
        /// How long to wait, from the database's now.
        wait: Duration,
    },
    /// Given up: a hand-over to the dead letters, so the turn is raised.
    Dead {
        /// Why.
        reason: Reason,
        /// In words, without addresses.
        detail: String,
    },
    /// Waits for its organization's configuration: a hand-over to the archive, so the turn is raised.
    Parked {
        /// Why the configuration fails.
        reason: Reason,
        /// In words, without addresses.
        detail: String,
    },
    /// Nothing was tried: the claim is given back, the turn stays, and the same copy may be claimed at once.
    Released,
}

impl Settlement {
    /// Whether a copy of a higher turn is owed for it.
    pub fn is_hand_over(&self) -> bool {
        matches!(self, Self::Deferred { .. } | Self::Dead { .. } | Self::Parked { .. })
    }
}

/// Whether a settle took effect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SettleAnswer {
    /// Recorded.
    Recorded,
    /// The row has another owner or turn: somebody took the job over.
    NotOwner,
}

/// One attempt as the job's story keeps it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AttemptRecord {
    /// When it began.
    #[serde(with = "time::serde::rfc3339")]
    pub at: OffsetDateTime,
    /// `organization` or `platform`.
    pub transport: String,
    /// The address that was dialled, `ip:port`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub address: Option<String>,
    /// How far it came.
    pub phase: Phase,
    /// Why it ended there; none when it succeeded.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<Reason>,
    /// The server's reply.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reply: Option<String>,
    /// How long it took.
    pub ms: u64,
}

/// Where a job stands, in short.
#[derive(Debug, Clone)]
pub struct JobOutcome {
    /// The job.
    pub key: JobKey,
    /// Where it stands.
    pub state: State,
    /// Why, unless it is well.
    pub reason: Option<Reason>,
    /// Its turn.
    pub turn: Turn,
    /// When the row last changed.
    pub updated_at: OffsetDateTime,
}

/// The ledger's answer to a person's or a program's question.
#[derive(Debug, Clone)]
pub struct JobStatus {
    /// The job.
    pub key: JobKey,
    /// Where it stands.
    pub state: State,
    /// Why, unless it is well.
    pub reason: Option<Reason>,
    /// In words.
    pub detail: Option<String>,
    /// Attempts made.
    pub attempts: u32,
    /// Not before this time, when it waits.
    pub next_attempt_at: Option<OffsetDateTime>,
    /// With angle brackets.
    pub message_id: Option<String>,
    /// The server's last reply.
    pub reply: Option<String>,
    /// Recipients refused for good.
    pub refused: Vec<RefusedRecipient>,
    /// When the job was first seen.
    pub first_at: OffsetDateTime,
    /// When the row last changed.
    pub updated_at: OffsetDateTime,
    /// Its turn.
    pub turn: Turn,
    /// Attempts that did not end the job at once.
    pub history: Vec<AttemptRecord>,
}

impl JobStatus {
    /// The same in short.
    pub fn outcome(&self) -> JobOutcome {
        JobOutcome {
            key: self.key.clone(),
            state: self.state,
            reason: self.reason,
            turn: self.turn,
            updated_at: self.updated_at,
        }
    }
}
