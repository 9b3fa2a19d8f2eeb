//! What may be replayed, and with which recipients.

use time::macros::datetime;
use uuid::Uuid;

use super::super::job::{JobKey, Revision};
use super::super::letter::LetterId;
use super::*;

const NOW: OffsetDateTime = datetime!(2026-11-22 12:00 UTC);
const RULES: ReplayRules = ReplayRules { max_replays: 3, resend_unknown: false };
const FORCED: ReplayRules = ReplayRules { max_replays: 3, resend_unknown: true };

fn letter(change: impl FnOnce(&mut Letter)) -> Letter {
    let mut letter = Letter {
        letter: LetterId(Uuid::nil()),
        job_id: Some(Uuid::from_u128(1)),
        key: Some(JobKey { organization: None, id: Uuid::from_u128(1) }),
        kind: Some("booking.confirmed".into()),
        lane: Some("notifications".into()),
        routing_key: "notification.test".into(),
        state: LetterState::Dead,
        reason: Reason::AuthFailed,
        detail: None,
        attempts: 1,
        first_at: Some(NOW),
        died_at: NOW,
        archived_at: NOW,
        expires_at: None,
        revision: None,
        turn: Turn(4),
        recipients: None,
        deaths: 1,
        replays: 0,
        replay_turn: None,
        parked_before: std::time::Duration::ZERO,
        history: Vec::new(),
        body_hash: [0; 32],
        bytes: 10,
    };
    change(&mut letter);
    letter
}

fn ledger(state: State, change: impl FnOnce(&mut LedgerView)) -> LedgerView {
    let mut view = LedgerView {
        state,
        turn: Turn(4),
        owner_lives: false,
        unknowns: 0,
        reason: None,
        pending: None,
        refused: Vec::new(),
        same_body: true,
        cancel_requested: false,
    };
    change(&mut view);
    view
}

fn refused(indices: &[u16]) -> Vec<RefusedRecipient> {
    let one = |index: &u16| RefusedRecipient { index: *index, code: 550, reason: Reason::RecipientsRefused };
    indices.iter().map(one).collect()
}

fn fresh(turn: i32, pending: Option<Vec<u16>>) -> Result<Replay, Skip> {
    Ok(Replay { turn: Turn(turn), pending, resumed: false })
}

#[test]
fn a_dead_job_is_replayed_one_turn_later_to_whom_it_is_still_pending() {
    let dead = ledger(State::Dead, |view| view.pending = Some(vec![2]));
    assert_eq!(
        decide(&letter(|_| {}), Some(&dead), Booking::default(), &RULES, NOW),
        fresh(5, Some(vec![2]))
    );
    // The ledger's turn counts, even where a letter of it has not reached the archive.
    let later = ledger(State::Dead, |view| view.turn = Turn(9));
    assert_eq!(decide(&letter(|_| {}), Some(&later), Booking::default(), &RULES, NOW), fresh(10, None));
}

#[test]
fn a_message_that_the_ledger_never_saw_is_replayed_from_its_letter() {
    let refused = letter(|letter| {
        letter.turn = Turn(0);
        letter.recipients = Some(vec![1]);
    });
    assert_eq!(decide(&refused, None, Booking::default(), &RULES, NOW), fresh(1, Some(vec![1])));
    let unknown = letter(|letter| letter.reason = Reason::UnknownOutcome);
    assert_eq!(decide(&unknown, None, Booking::default(), &RULES, NOW), Err(Skip::UnknownOutcome));
}

#[test]
fn what_was_accepted_is_not_replayed_but_refused_recipients_are() {
    let sent = ledger(State::Sent, |view| view.refused = refused(&[1, 3]));
    assert_eq!(
        decide(&letter(|_| {}), Some(&sent), Booking::default(), &FORCED, NOW),
        Err(Skip::AlreadySent)
    );
    let partial = |positions: &[u16]| letter(|letter| letter.recipients = Some(positions.to_vec()));
    assert_eq!(
        decide(&partial(&[1, 3]), Some(&sent), Booking::default(), &RULES, NOW),
        fresh(5, Some(vec![1, 3]))
    );
    // Recipient 2 accepted in an earlier replay.
    assert_eq!(
        decide(&partial(&[2, 3]), Some(&sent), Booking::default(), &RULES, NOW),
        fresh(5, Some(vec![3]))
    );
    assert_eq!(decide(&partial(&[2]), Some(&sent), Booking::default(), &FORCED, NOW), Err(Skip::AlreadySent));
}

#[test]
fn an_unknown_outcome_is_replayed_only_when_that_is_asked_for() {
    let cases = [
        ledger(State::Dead, |view| view.reason = Some(Reason::UnknownOutcome)),
        ledger(State::Dead, |view| view.unknowns = 1),
        ledger(State::Claimed, |_| {}),
        ledger(State::Deferred, |view| view.unknowns = 1),
    ];
    for case in cases {
        assert_eq!(
            decide(&letter(|_| {}), Some(&case), Booking::default(), &RULES, NOW),
            Err(Skip::UnknownOutcome),
            "{case:?}"
        );
        assert_eq!(
            decide(&letter(|_| {}), Some(&case), Booking::default(), &FORCED, NOW),
            fresh(5, None),
            "{case:?}"
        );
    }
}

#[test]
fn recipients_of_whom_nobody_knows_are_replayed_only_when_that_is_asked_for_although_others_have_accepted() {
    let partial = letter(|letter| letter.recipients = Some(vec![1, 3]));
    let other_than_meant = ledger(State::Sent, |view| {
        view.refused = refused(&[1, 2, 3]);
        view.refused[1].reason = Reason::UnknownOutcome;
    });
    assert_eq!(
        decide(&partial, Some(&other_than_meant), Booking::default(), &RULES, NOW),
        fresh(5, Some(vec![1, 3]))
    );
    let uncertain = ledger(State::Sent, |view| {
        view.refused = refused(&[1, 3]);
        view.refused[1].reason = Reason::UnknownOutcome;
    });
    let earlier = ledger(State::Sent, |view| {
        view.refused = refused(&[1, 3]);
        view.unknowns = 1;
    });
    for case in [uncertain, earlier] {
        assert_eq!(
            decide(&partial, Some(&case), Booking::default(), &RULES, NOW),
            Err(Skip::UnknownOutcome),
            "{case:?}"
        );
        assert_eq!(
            decide(&partial, Some(&case), Booking::default(), &FORCED, NOW),
            fresh(5, Some(vec![1, 3])),
            "{case:?}"
        );
    }
}

#[test]
fn what_is_on_its_way_is_left_alone() {
    let held = ledger(State::Claimed, |view| view.owner_lives = true);
    assert_eq!(decide(&letter(|_| {}), Some(&held), Booking::default(), &FORCED, NOW), Err(Skip::InProgress));
    let elsewhere = ledger(State::Deferred, |view| view.turn = Turn(6));
    assert_eq!(
        decide(&letter(|_| {}), Some(&elsewhere), Booking::default(), &FORCED, NOW),
        Err(Skip::InProgress)
    );
    let parked = letter(|letter| letter.state = LetterState::Parked);
    assert_eq!(decide(&parked, None, Booking::default(), &FORCED, NOW), Err(Skip::Parked));
}

#[test]
fn a_copy_that_the_broker_killed_is_made_anew() {
    let waiting = ledger(State::Deferred, |_| {});
    assert_eq!(decide(&letter(|_| {}), Some(&waiting), Booking::default(), &RULES, NOW), fresh(5, None));
}

#[test]
fn a_replay_that_was_cut_off_is_taken_up_with_the_same_turn() {
    let cut = letter(|letter| {
        letter.state = LetterState::Replaying;
        letter.replays = 3;
        letter.replay_turn = Some(Turn(5));
    });
    let recorded = ledger(State::Deferred, |view| view.turn = Turn(5));
    let again = Ok(Replay { turn: Turn(5), pending: None, resumed: true });
    assert_eq!(decide(&cut, Some(&recorded), Booking::default(), &RULES, NOW), again);
    let sent = ledger(State::Sent, |view| view.turn = Turn(5));
    assert_eq!(decide(&cut, Some(&sent), Booking::default(), &RULES, NOW), Err(Skip::AlreadySent));
    // It died again, and its letter is under way to the archive.
    let died = ledger(State::Dead, |view| view.turn = Turn(6));
    assert_eq!(decide(&cut, Some(&died), Booking::default(), &RULES, NOW), Err(Skip::InProgress));
}

#[test]
fn a_replay_that_was_cut_off_ends_although_its_job_has_expired_meanwhile() {
    let cut = letter(|letter| {
        letter.state = LetterState::Replaying;
        letter.replays = 1;
        letter.replay_turn = Some(Turn(5));
        letter.expires_at = Some(NOW);
    });
    // Left alone, letter and job would wait for each other for ever.
    let recorded = ledger(State::Deferred, |view| view.turn = Turn(5));
    let again = Ok(Replay { turn: Turn(5), pending: None, resumed: true });
    assert_eq!(decide(&cut, Some(&recorded), Booking::default(), &RULES, NOW), again);
    let died = ledger(State::Dead, |view| view.turn = Turn(5));
    assert_eq!(decide(&cut, Some(&died), Booking::default(), &RULES, NOW), Err(Skip::Expired));
}

#[test]
fn a_letter_that_was_replayed_died_again_and_was_given_up_is_replayed_like_one_that_never_was() {
    let given_up = |replays| {
        letter(|letter| {
            letter.state = LetterState::Discarded;
            letter.turn = Turn(6);
            letter.replays = replays;
            letter.replay_turn = Some(Turn(5));
        })
    };
    let dead = ledger(State::Dead, |view| view.turn = Turn(6));
    assert_eq!(decide(&given_up(1), Some(&dead), Booking::default(), &RULES, NOW), fresh(7, None));
    assert_eq!(decide(&given_up(3), Some(&dead), Booking::default(), &RULES, NOW), Err(Skip::TooManyReplays));
}

#[test]
fn what_is_past_its_time_is_not_replayed_whatever_is_asked_for() {
    let at = |time| letter(|letter| letter.expires_at = Some(time));
    let dead = ledger(State::Dead, |_| {});
    assert_eq!(decide(&at(NOW), Some(&dead), Booking::default(), &FORCED, NOW), Err(Skip::Expired));
    assert!(
        decide(&at(datetime!(2026-11-22 12:00:01 UTC)), Some(&dead), Booking::default(), &RULES, NOW).is_ok()
    );
    let booked = letter(|letter| letter.revision = Some(Revision { group: "b".into(), sequence: 2 }));
    let newest = |newest| Booking { newest: Some(newest), cancelled: None };
    assert_eq!(decide(&booked, Some(&dead), newest(3), &FORCED, NOW), Err(Skip::Superseded));
    assert!(decide(&booked, Some(&dead), newest(2), &RULES, NOW).is_ok());
    for (reason, skip) in [
        (Reason::Expired, Skip::Expired),
        (Reason::Superseded, Skip::Superseded),
        (Reason::Cancelled, Skip::Cancelled),
        (Reason::IdConflict, Skip::IdConflict),
    ] {
        let letter = letter(|letter| letter.reason = reason);
        assert_eq!(decide(&letter, None, Booking::default(), &FORCED, NOW), Err(skip));
    }
    let cancelled = ledger(State::Cancelled, |_| {});
    assert_eq!(
        decide(&letter(|_| {}), Some(&cancelled), Booking::default(), &FORCED, NOW),
        Err(Skip::Cancelled)
    );
    let other = ledger(State::Dead, |view| view.same_body = false);
    assert_eq!(
        decide(&letter(|_| {}), Some(&other), Booking::default(), &FORCED, NOW),
        Err(Skip::IdConflict)
    );
}

#[test]
fn what_was_called_back_is_not_replayed_wherever_its_job_stands() {
    let called_back = |state| ledger(state, |view| view.cancel_requested = true);
    let whole = letter(|_| {});
    for state in [State::Dead, State::Claimed, State::Unknown, State::Deferred, State::Cancelled] {
        let answer = decide(&whole, Some(&called_back(state)), Booking::default(), &FORCED, NOW);
        assert_eq!(answer, Err(Skip::Cancelled), "{state:?}");
    }
    // The server has it: there is nothing to be called back, but for those whom it refused.
    let mut sent = called_back(State::Sent);
    let answer =
        |sent: &LedgerView, letter: &Letter| decide(letter, Some(sent), Booking::default(), &FORCED, NOW);
    assert_eq!(answer(&sent, &whole), Err(Skip::AlreadySent));
    sent.refused = refused(&[1]);
    let rest = letter(|letter| letter.recipients = Some(vec![1]));
    assert_eq!(answer(&sent, &rest), Err(Skip::Cancelled));
}

#[test]
fn a_booking_that_was_called_back_is_not_replayed_up_to_that_revision() {
    let of = |sequence| letter(|letter| letter.revision = Some(Revision { group: "b".into(), sequence }));
    let booking = Booking { newest: Some(3), cancelled: Some(2) };
    let dead = ledger(State::Dead, |_| {});
    for ledger in [None, Some(&dead)] {
        for sequence in [1, 2] {
            assert_eq!(decide(&of(sequence), ledger, booking, &FORCED, NOW), Err(Skip::Cancelled));
        }
        assert!(decide(&of(3), ledger, booking, &RULES, NOW).is_ok());
        assert!(decide(&letter(|_| {}), ledger, booking, &RULES, NOW).is_ok(), "of no booking");
    }
}

#[test]
fn a_replay_that_was_cut_off_and_called_back_since_is_published_for_who_claims_it_to_end_it() {
    let cut = |state| {
        letter(|letter| {
            letter.state = state;
            letter.replay_turn = Some(Turn(5));
        })
    };
    let waits = ledger(State::Deferred, |view| {
        view.turn = Turn(5);
        view.cancel_requested = true;
    });
    let decided = |state| decide(&cut(state), Some(&waits), Booking::default(), &RULES, NOW);
    let again = Replay { turn: Turn(5), pending: None, resumed: true };
    assert_eq!(decided(LetterState::Replaying), Ok(again));
    assert_eq!(decided(LetterState::Replayed), Err(Skip::Cancelled));
}

#[test]
fn a_letter_that_keeps_dying_is_left_out() {
    let replayed = |times| letter(|letter| letter.replays = times);
    let dead = ledger(State::Dead, |_| {});
    assert!(decide(&replayed(2), Some(&dead), Booking::default(), &RULES, NOW).is_ok());
    assert_eq!(
        decide(&replayed(3), Some(&dead), Booking::default(), &FORCED, NOW),
        Err(Skip::TooManyReplays)
    );
}

#[test]
fn names_are_those_that_are_serialized() {
    for skip in Skip::ALL {
        assert_eq!(serde_json::to_value(skip).unwrap(), skip.as_str());
    }
}
