//! Whether a dead letter may be replayed, and as what: the only place that decides it.
//! Guarantee: pure; nothing that was accepted, or may have been, is replayed without being asked for, and nothing that is
//! past its time is recorded as a replay at all.

use serde::Serialize;
use time::OffsetDateTime;

use super::event::RefusedRecipient;
use super::failure::Reason;
use super::ledger::{State, Turn};
use super::letter::{Letter, LetterState};

/// What the person who replays has asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReplayRules {
    /// A letter that was replayed so often and died again is left out.
    pub max_replays: u32,
    /// Replay those, too, of which nobody knows whether they were accepted.
    pub resend_unknown: bool,
}

/// What the ledger knows of a letter's job.
#[derive(Debug, Clone)]
pub struct LedgerView {
    /// Where it stands.
    pub state: State,
    /// Its turn.
    pub turn: Turn,
    /// Whether the worker that has it lives. Only asked of a claimed job.
    pub owner_lives: bool,
    /// Outcomes that nobody knows.
    pub unknowns: u32,
    /// Why it stands there.
    pub reason: Option<Reason>,
    /// Positions still to be sent to; `None`: every recipient.
    pub pending: Option<Vec<u16>>,
    /// Recipients that were refused for good.
    pub refused: Vec<RefusedRecipient>,
    /// Whether the letter's body is the ledger's.
    pub same_body: bool,
    /// Whether it was called back, wherever it stands.
    pub cancel_requested: bool,
}

/// What is known of a letter's booking; nothing of most.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Booking {
    /// The highest revision that was taken up or called back.
    pub newest: Option<i64>,
    /// The highest revision that was called back.
    pub cancelled: Option<i64>,
}

/// How a letter is replayed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Replay {
    /// The turn of the copy.
    pub turn: Turn,
    /// Positions that it goes to; `None`: every recipient.
    pub pending: Option<Vec<u16>>,
    /// The copy was recorded before and perhaps published: it is published, not recorded, again.
    pub resumed: bool,
}

/// Why a letter is not replayed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Skip {
    /// Past its time.
    Expired,
    /// A newer revision of its booking was taken up or called back.
    Superseded,
    /// Called back.
    Cancelled,
    /// Every recipient that it is for has the message.
    AlreadySent,
    /// Nobody knows whether it was accepted, and sending it again was not asked for.
    UnknownOutcome,
    /// A worker has it, or a copy of it is on its way.
    InProgress,
    /// Waits for its organization's configuration and leaves by itself.
    Parked,
    /// Its id belongs to another body.
    IdConflict,
    /// It died again after as many replays as are allowed.
    TooManyReplays,
    /// The body is no job, now as before.
    NotAJob,
    /// No lane takes its routing key, now as before.
    Unroutable,
    /// Its content cannot be opened: the key is missing, or it was changed.
    Unreadable,
    /// Given up by a person; only replayed when that state is asked for.
    Discarded,
}

impl Skip {
    /// Every reason to leave a letter out.
    pub const ALL: [Self; 13] = [
        Self::Expired,
        Self::Superseded,
        Self::Cancelled,
        Self::AlreadySent,
        Self::UnknownOutcome,
        Self::InProgress,
        Self::Parked,
        Self::IdConflict,
        Self::TooManyReplays,
        Self::NotAJob,
        Self::Unroutable,
        Self::Unreadable,
        Self::Discarded,
    ];

    /// The name in answers.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Expired => "expired",
            Self::Superseded => "superseded",
            Self::Cancelled => "cancelled",
            Self::AlreadySent => "already_sent",
            Self::UnknownOutcome => "unknown_outcome",
            Self::InProgress => "in_progress",
            Self::Parked => "parked",
            Self::IdConflict => "id_conflict",
            Self::TooManyReplays => "too_many_replays",
            Self::NotAJob => "not_a_job",
            Self::Unroutable => "unroutable",
            Self::Unreadable => "unreadable",
            Self::Discarded => "discarded",
        }
    }
}

/// Decides about one letter. `ledger` is `None` where the ledger has no row. Whether the body is a job and a lane takes it
/// is not asked here.
///
/// # Errors
/// Why it is left out.
pub fn decide(
    letter: &Letter,
    ledger: Option<&LedgerView>,
    booking: Booking,
    rules: &ReplayRules,
    now: OffsetDateTime,
) -> Result<Replay, Skip> {
    if letter.state == LetterState::Parked {
        return Err(Skip::Parked);
    }
    let conflicts = ledger.is_some_and(|ledger| !ledger.same_body);
    if letter.reason == Reason::IdConflict || conflicts {
        return Err(Skip::IdConflict);
    }
    if let Some(settled) = ledger.and_then(|ledger| settled(letter, ledger)) {
        return Err(settled);
    }
    let in_replay = matches!(letter.state, LetterState::Replaying | LetterState::Replayed);
    let resumed = ledger
        .filter(|ledger| in_replay && ledger.state == State::Deferred)
        .filter(|ledger| letter.replay_turn == Some(ledger.turn))
        .map(|ledger| Replay { turn: ledger.turn, pending: ledger.pending.clone(), resumed: true });
    // The ledger waits for a copy that may not be there, whatever the time: who claims it finds out that it is past, and
    // makes it dead.
    if resumed.is_none() || letter.state == LetterState::Replayed {
        out_of_date(letter, ledger, booking, now)?;
    }
    if let Some(resumed) = resumed {
        return Ok(resumed);
    }
    if !in_replay && letter.replays >= rules.max_replays {
        return Err(Skip::TooManyReplays);
    }
    let fresh = |after: Turn, pending| Ok(Replay { turn: after.next(), pending, resumed: false });
    let unknown = |is: bool| if is && !rules.resend_unknown { Err(Skip::UnknownOutcome) } else { Ok(()) };
    let Some(ledger) = ledger else {
        unknown(letter.reason == Reason::UnknownOutcome)?;
        return fresh(letter.turn, letter.recipients.clone());
    };
    match ledger.state {
        State::Sent => {
            let positions = refused_of(letter, ledger);
            let uncertain = |refused: &RefusedRecipient| {
                refused.reason == Reason::UnknownOutcome && positions.contains(&refused.index)
            };
            unknown(ledger.unknowns > 0 || ledger.refused.iter().any(uncertain))?;
            fresh(ledger.turn, Some(positions))
        }
        State::Claimed if ledger.owner_lives => Err(Skip::InProgress),
        State::Claimed | State::Unknown => {
            unknown(true)?;
            fresh(ledger.turn, ledger.pending.clone())
        }
        // The broker killed the very copy that is waited for.
        State::Deferred if letter.turn == ledger.turn => {
            unknown(ledger.unknowns > 0)?;
            fresh(ledger.turn, ledger.pending.clone())
        }
        State::Deferred => Err(Skip::InProgress),
        State::Parked => Err(Skip::Parked),
        State::Cancelled => Err(Skip::Cancelled),
        // The replay's copy died; the letter of that death is on its way.
        State::Dead if in_replay && letter.replay_turn.is_some_and(|turn| turn < ledger.turn) => {
            Err(Skip::InProgress)
        }
        State::Dead => {
            unknown(ledger.unknowns > 0 || ledger.reason == Some(Reason::UnknownOutcome))?;
            fresh(ledger.turn, ledger.pending.clone())
        }
    }
}

/// What the ledger has finished with, whatever else is true of the letter.
fn settled(letter: &Letter, ledger: &LedgerView) -> Option<Skip> {
    match ledger.state {
        State::Sent if refused_of(letter, ledger).is_empty() => Some(Skip::AlreadySent),
        State::Cancelled => Some(Skip::Cancelled),
        _ => None,
    }
}

/// The letter's recipients that have not accepted, of a job that others have.
fn refused_of(letter: &Letter, ledger: &LedgerView) -> Vec<u16> {
    let meant = letter.recipients.as_deref().unwrap_or_default();
    meant
        .iter()
        .copied()
        .filter(|index| ledger.refused.iter().any(|refused| refused.index == *index))
        .collect()
}

fn out_of_date(
    letter: &Letter,
    ledger: Option<&LedgerView>,
    booking: Booking,
    now: OffsetDateTime,
) -> Result<(), Skip> {
    let past = letter.expires_at.is_some_and(|expires_at| expires_at <= now);
    // Killed by the broker for its own `expiration`: a publisher that set one meant it.
    if past || letter.reason == Reason::Expired {
        return Err(Skip::Expired);
    }
    let mine = letter.revision.as_ref().map(|revision| revision.sequence);
    let called_back = ledger.is_some_and(|ledger| ledger.cancel_requested)
        || mine.zip(booking.cancelled).is_some_and(|(mine, cancelled)| mine <= cancelled);
    if called_back || letter.reason == Reason::Cancelled {
        return Err(Skip::Cancelled);
    }
    let older = mine.zip(booking.newest).is_some_and(|(mine, newest)| mine < newest);
    if older || letter.reason == Reason::Superseded {
        return Err(Skip::Superseded);
    }
    Ok(())
}

#[cfg(test)]
#[path = "replay_tests.rs"]
mod tests;
