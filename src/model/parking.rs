//! What becomes of a parked letter: it stays, goes back to its lane, or has died while it waited.
//! Guarantee: pure; a letter goes back only while its organization's configuration is not at fault, and never when it is past
//! its time, outdated or called back. What is recorded already is decided in the same way again.

use std::time::Duration;

use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::cancelling;
use super::failure::Reason;
use super::ledger::{State, Turn};
use super::letter::Letter;
use super::replay::{Booking, LedgerView, Replay};

/// What is to be done with a parked letter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Parked {
    /// Nothing now.
    Stays,
    /// Its copy is to be recorded, unless it is, and published.
    Goes(Replay),
    /// It died: that is to be recorded, then announced.
    Dies {
        /// Why.
        reason: Reason,
        /// In words.
        detail: String,
    },
    /// Its death is recorded and perhaps announced.
    Died,
    /// Its copy was published, for somebody has taken it up.
    TakenUp,
}

/// What holds for every parked letter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ParkingRules {
    /// Every organization may use a server of its own; else it needs the feature flag.
    pub for_all: bool,
    /// How long a job may wait (`retry.parked_for_s`).
    pub parked_for: Duration,
}

/// Decides about one parked letter. `ledger` is `None` where the ledger has no row; `may_go`: its organization's mail flows, and
/// it is its turn.
pub fn decide(
    letter: &Letter,
    ledger: Option<&LedgerView>,
    booking: Booking,
    may_go: bool,
    parked_for: Duration,
    now: OffsetDateTime,
) -> Parked {
    if let Some(ledger) = ledger {
        if !ledger.same_body {
            let detail = "id: the same id was published before with another body".to_owned();
            return Parked::Dies { reason: Reason::IdConflict, detail };
        }
        let released = released(letter);
        match ledger.state {
            // Its copy, where there is one, is given up by whoever takes it up.
            State::Cancelled => return Parked::Died,
            State::Parked => {}
            // The ledger waits for a copy that may not be there, whatever the time: who claims it finds out that it is past.
            State::Deferred if released == Some(ledger.turn) => {
                let pending = ledger.pending.clone();
                return Parked::Goes(Replay { turn: ledger.turn, pending, resumed: true });
            }
            _ if ledger.turn > letter.turn => return Parked::TakenUp,
            State::Dead => return Parked::Died,
            State::Sent if ledger.refused.is_empty() => return Parked::TakenUp,
            State::Sent => return Parked::Died,
            State::Claimed | State::Deferred | State::Unknown => return Parked::Stays,
        }
    }
    if let Some((reason, detail)) = why_dead(letter, ledger, booking, parked_for, now) {
        return Parked::Dies { reason, detail };
    }
    if !may_go {
        return Parked::Stays;
    }
    let (turn, pending) = match ledger {
        Some(ledger) => (ledger.turn, ledger.pending.clone()),
        None => (letter.turn, letter.recipients.clone()),
    };
    Parked::Goes(Replay { turn: turn.next(), pending, resumed: false })
}

/// The turn of a release that is recorded: the letter that the same job brings when it is parked once more is of a later one.
fn released(letter: &Letter) -> Option<Turn> {
    letter.replay_turn.filter(|turn| *turn > letter.turn)
}

fn why_dead(
    letter: &Letter,
    ledger: Option<&LedgerView>,
    booking: Booking,
    parked_for: Duration,
    now: OffsetDateTime,
) -> Option<(Reason, String)> {
    if let Some(at) = letter.expires_at.filter(|at| *at <= now) {
        return Some((Reason::Expired, expired(at)));
    }
    let mine = letter.revision.as_ref().map(|revision| revision.sequence);
    let called_back = ledger.is_some_and(|ledger| ledger.cancel_requested)
        || mine.zip(booking.cancelled).is_some_and(|(mine, cancelled)| mine <= cancelled);
    if called_back {
        let unknowns = ledger.map_or(0, |ledger| ledger.unknowns);
        return Some((Reason::Cancelled, cancelling::detail(unknowns).to_owned()));
    }
    if let Some((mine, newest)) = mine.zip(booking.newest)
        && newest > mine
    {
        return Some((Reason::Superseded, superseded(mine, newest)));
    }
    // Parked again and again, it waits no longer than otherwise.
    (letter.died_at + parked_for.saturating_sub(letter.parked_before) <= now).then(|| {
        let why = letter.detail.as_deref().map(|detail| format!(": {detail}")).unwrap_or_default();
        (letter.reason, format!("parked for more than {} s{why}", parked_for.as_secs()))
    })
}

/// Said of a job past its time.
pub fn expired(at: OffsetDateTime) -> String {
    format!("expired at {}", at.format(&Rfc3339).unwrap_or_default())
}

/// Said of a job whose booking has a newer revision.
pub fn superseded(mine: i64, newest: i64) -> String {
    format!("sequence {mine} of its group is older than {newest}")
}

#[cfg(test)]
mod tests {
    use time::macros::datetime;
    use uuid::Uuid;

    use super::*;
    use crate::model::event::RefusedRecipient;
    use crate::model::job::Revision;
    use crate::model::letter::{LetterId, LetterState};

    const NOW: OffsetDateTime = datetime!(2026-11-22 20:00 UTC);
    const DAY: Duration = Duration::from_secs(86_400);

    fn letter(change: impl FnOnce(&mut Letter)) -> Letter {
        let mut letter = Letter {
            letter: LetterId(Uuid::nil()),
            job_id: Some(Uuid::nil()),
            key: None,
            kind: None,
            lane: None,
            routing_key: String::new(),
            state: LetterState::Parked,
            reason: Reason::AuthFailed,
            detail: Some("the server answered 535".into()),
            attempts: 1,
            first_at: None,
            died_at: NOW - Duration::from_secs(3600),
            archived_at: NOW,
            expires_at: None,
            revision: None,
            turn: Turn(4),
            recipients: None,
            deaths: 0,
            replays: 0,
            replay_turn: None,
            parked_before: Duration::ZERO,
            history: Vec::new(),
            body_hash: [0; 32],
            bytes: 0,
        };
        change(&mut letter);
        letter
    }

    fn ledger(state: State, turn: i32) -> LedgerView {
        LedgerView {
            state,
            turn: Turn(turn),
            owner_lives: false,
            unknowns: 0,
            reason: None,
            pending: Some(vec![1]),
            refused: Vec::new(),
            same_body: true,
            cancel_requested: false,
        }
    }

    fn decided(letter: &Letter, ledger: Option<&LedgerView>, may_go: bool) -> Parked {
        decide(letter, ledger, Booking { newest: Some(7), cancelled: Some(3) }, may_go, DAY, NOW)
    }

    fn goes(turn: i32, pending: Option<Vec<u16>>, resumed: bool) -> Parked {
        Parked::Goes(Replay { turn: Turn(turn), pending, resumed })
    }

    #[test]
    fn a_letter_goes_one_turn_later_to_whom_it_is_still_pending_once_it_may() {
        let waits = ledger(State::Parked, 4);
        assert_eq!(decided(&letter(|_| {}), Some(&waits), false), Parked::Stays);
        assert_eq!(decided(&letter(|_| {}), Some(&waits), true), goes(5, Some(vec![1]), false));
        assert_eq!(decided(&letter(|_| {}), None, true), goes(5, None, false));
        // It was parked again, and the letter of that is on its way into the archive.
        let later = ledger(State::Parked, 6);
        let again = letter(|letter| letter.replay_turn = Some(Turn(5)));
        assert_eq!(decided(&again, Some(&later), true), goes(7, Some(vec![1]), false));
    }

    #[test]
    fn a_release_that_was_cut_off_is_published_again_whatever_has_come_meanwhile() {
        let cut = letter(|letter| {
            letter.replay_turn = Some(Turn(5));
            letter.expires_at = Some(NOW);
        });
        assert_eq!(decided(&cut, Some(&ledger(State::Deferred, 5)), false), goes(5, Some(vec![1]), true));
        for (state, turn) in [
            (State::Claimed, 5),
            (State::Sent, 5),
            (State::Deferred, 6),
            (State::Dead, 6),
            (State::Claimed, 7),
        ] {
            assert_eq!(decided(&cut, Some(&ledger(state, turn)), true), Parked::TakenUp, "{state:?} {turn}");
        }
        // That release is of before the letter.
        let old = letter(|letter| letter.replay_turn = Some(Turn(3)));
        assert_eq!(decided(&old, Some(&ledger(State::Parked, 4)), false), Parked::Stays);
    }

    #[test]
    fn what_is_past_its_time_dies_whether_it_may_go_or_not() {
        let waits = ledger(State::Parked, 4);
        let cases = [
            (letter(|letter| letter.expires_at = Some(NOW)), Reason::Expired),
            (
                letter(|letter| letter.revision = Some(Revision { group: "b".into(), sequence: 6 })),
                Reason::Superseded,
            ),
            (letter(|letter| letter.died_at = NOW - DAY), Reason::AuthFailed),
            (
                letter(|letter| letter.revision = Some(Revision { group: "b".into(), sequence: 3 })),
                Reason::Cancelled,
            ),
        ];
        for (letter, expected) in cases {
            for (ledger, may_go) in [(Some(&waits), true), (Some(&waits), false), (None, true)] {
                let Parked::Dies { reason, .. } = decided(&letter, ledger, may_go) else {
                    panic!("{letter:?}")
                };
                assert_eq!(reason, expected);
            }
        }
        // Called back where some recipients have it: the ledger's row waits.
        let called_back = LedgerView { cancel_requested: true, ..ledger(State::Parked, 4) };
        let dies = decided(&letter(|_| {}), Some(&called_back), true);
        assert!(matches!(dies, Parked::Dies { reason: Reason::Cancelled, .. }), "{dies:?}");
        let newest = letter(|letter| letter.revision = Some(Revision { group: "b".into(), sequence: 7 }));
        assert_eq!(decided(&newest, Some(&waits), false), Parked::Stays);
        let too_long = letter(|letter| letter.died_at = NOW - DAY);
        let detail = "parked for more than 86400 s: the server answered 535".to_owned();
        let dies = Parked::Dies { reason: Reason::AuthFailed, detail };
        assert_eq!(decided(&too_long, Some(&waits), true), dies);
        // An hour now, and the rest of a day before it was released and parked again.
        let again = letter(|letter| letter.parked_before = DAY - Duration::from_secs(3600));
        assert_eq!(decided(&again, Some(&waits), false), dies);
        let shorter = letter(|letter| letter.parked_before = DAY - Duration::from_secs(3601));
        assert_eq!(decided(&shorter, Some(&waits), false), Parked::Stays);
    }

    #[test]
    fn a_death_that_is_recorded_is_not_decided_again() {
        let refused = RefusedRecipient { index: 1, code: 0, reason: Reason::Expired };
        let partly = LedgerView { refused: vec![refused], pending: None, ..ledger(State::Sent, 4) };
        for recorded in [ledger(State::Dead, 4), ledger(State::Cancelled, 4), partly] {
            assert_eq!(decided(&letter(|_| {}), Some(&recorded), true), Parked::Died, "{recorded:?}");
        }
        let cut = letter(|letter| letter.replay_turn = Some(Turn(5)));
        assert_eq!(decided(&cut, Some(&ledger(State::Cancelled, 5)), true), Parked::Died);
        let other = LedgerView { same_body: false, ..ledger(State::Parked, 4) };
        assert!(matches!(
            decided(&letter(|_| {}), Some(&other), true),
            Parked::Dies { reason: Reason::IdConflict, .. }
        ));
    }
}
