//! A dead letter in words: what died, why and when, what comes next, and what people did with it.
//! Guarantee: nothing of its content, and no address.

use time::OffsetDateTime;
use uuid::Uuid;

use crate::cli::output::harmless;
use crate::cli::story::{advice, because, counted, fact, masked, moment, parked_next};
use crate::model::failure::Reason;
use crate::model::ledger::{JobOutcome, JobStatus, State};
use crate::model::letter::{Deed, DeedOutcome, Letter, LetterDeed, LetterState};

/// The one of the letters found by an id, newest first, that is meant: the letter of that name, or the newest of a known job,
/// or else the newest.
pub(in crate::cli) fn meant(letters: &[Letter], id: Uuid) -> Option<&Letter> {
    let named = letters.iter().find(|letter| letter.letter.0 == id);
    named.or_else(|| letters.iter().find(|letter| letter.key.is_some())).or(letters.first())
}

/// A letter's name in a headline: its job's, as far as the body tells, or else its own.
pub(in crate::cli) fn name(letter: &Letter) -> String {
    match (&letter.key, letter.job_id) {
        (Some(key), _) => key.to_string(),
        (None, Some(id)) => format!("{}/{id}", letter.owner()),
        (None, None) => letter.letter.to_string(),
    }
}

/// The letter's own story; `ledger` is what became of its job, where the ledger knows.
pub(in crate::cli) fn letter(
    letter: &Letter,
    ledger: Option<&JobStatus>,
    now: OffsetDateTime,
) -> Vec<String> {
    let ended = if letter.state == LetterState::Parked { "was parked" } else { "died" };
    let mut lines = vec![
        format!("It {ended} at {}, {}.", moment(letter.died_at, now), because(letter.reason)),
        what_next(letter, ledger),
    ];
    let mut add = |name: &str, value: Option<String>| lines.extend(value.map(|value| fact(name, &value)));
    add("detail", letter.detail.as_deref().map(masked));
    add("letter", Some(letter.letter.to_string()));
    add("kind", letter.kind.as_deref().map(masked));
    add("lane", letter.lane.as_deref().map(masked));
    add("routing key", Some(masked(&letter.routing_key)));
    add("attempts", Some(letter.attempts.to_string()));
    add("first seen", letter.first_at.map(|at| moment(at, now)));
    add("archived", Some(moment(letter.archived_at, now)));
    add("expires", letter.expires_at.map(|at| moment(at, now)));
    let revision = letter.revision.as_ref();
    add("booking", revision.map(|r| format!("{}, sequence {}", masked(&r.group), r.sequence)));
    add("only for", letter.recipients.as_deref().map(positions));
    add("body", Some(counted(letter.bytes as usize, "byte")));
    add("deaths", (letter.deaths > 1).then(|| letter.deaths.to_string()));
    lines.extend(deeds(letter, ledger, now));
    lines
}

/// What people did with a letter, and what came of each replay.
pub(in crate::cli) fn deeds(letter: &Letter, ledger: Option<&JobStatus>, now: OffsetDateTime) -> Vec<String> {
    let outcome = ledger.map(JobStatus::outcome);
    let history = history(letter, outcome.as_ref());
    if history.is_empty() {
        return Vec::new();
    }
    let mut lines = vec!["Replays, releases and discards:".to_owned()];
    lines.extend(
        history.iter().enumerate().map(|(at, deed)| format!("  {}. {}", at + 1, told(deed, letter, now))),
    );
    lines
}

/// The letter's history, with the outcome of its last replay or release from the ledger where the archive has none yet.
pub(super) fn history(letter: &Letter, ledger: Option<&JobOutcome>) -> Vec<LetterDeed> {
    let mut history = letter.history.clone();
    if let (true, Some(last), Some(status)) = (is_open(letter), history.last_mut(), ledger)
        // A row of before the replay tells of something else.
        && letter.replay_turn.is_some_and(|turn| status.turn >= turn)
    {
        last.outcome = Some(DeedOutcome {
            state: status.state.as_str().to_owned(),
            reason: status.reason,
            at: Some(status.updated_at),
        });
    }
    history
}

/// Whether only the ledger knows what came of the letter's last replay or release.
pub(super) fn is_open(letter: &Letter) -> bool {
    let waits = |last: &LetterDeed| last.what != Deed::Discard && last.outcome.is_none();
    matches!(letter.state, LetterState::Replayed | LetterState::Dead)
        && letter.history.last().is_some_and(waits)
}

fn told(deed: &LetterDeed, letter: &Letter, now: OffsetDateTime) -> String {
    let (at, by) = (moment(deed.at, now), harmless(&deed.by));
    if deed.what == Deed::Discard {
        return format!("{at}, discarded by {by}");
    }
    let outcome = match &deed.outcome {
        None if matches!(letter.state, LetterState::Replaying | LetterState::Parked) => {
            "its copy is not confirmed yet".to_owned()
        }
        None => "its outcome is not known".to_owned(),
        Some(DeedOutcome { state, reason, at }) => {
            let words = match State::from_name(state) {
                Some(State::Sent) => "sent".to_owned(),
                Some(State::Dead) => "it died again".to_owned(),
                Some(State::Parked) => "it was parked".to_owned(),
                Some(State::Deferred) => "it waits for its next attempt".to_owned(),
                Some(State::Claimed) => "a worker has it".to_owned(),
                _ => harmless(state),
            };
            let why = reason.map(|reason| format!(" ({reason})")).unwrap_or_default();
            let at = at.map(|at| format!(" at {}", moment(at, now))).unwrap_or_default();
            format!("{words}{why}{at}")
        }
    };
    match deed.what {
        Deed::Release => format!("{at}, released when its organization's mail flowed again: {outcome}"),
        Deed::Replay | Deed::Discard => format!("{at}, replayed by {by}: {outcome}"),
    }
}

fn what_next(letter: &Letter, ledger: Option<&JobStatus>) -> String {
    let id = letter.id();
    match letter.state {
        LetterState::Parked => parked_next(letter.owner().organization()),
        LetterState::Replaying => {
            format!(
                "Next: it is being replayed. If that was broken off, `sendoff dead replay --id {id}` ends it."
            )
        }
        LetterState::Replayed => match ledger {
            None => format!("Next: it was {}; the ledger has forgotten what came of it.", gone(letter)),
            Some(status) => {
                format!("Next: it was {}; the job is {} now.", gone(letter), status.state.as_str())
            }
        },
        LetterState::Discarded => {
            format!(
                "Next: nothing, it was discarded. `sendoff dead replay --state discarded --id {id}` sends it still."
            )
        }
        LetterState::Dead if ledger.is_some_and(|status| status.reason == Some(Reason::UnknownOutcome)) => {
            format!("Next: {}.", advice(Reason::UnknownOutcome, id))
        }
        LetterState::Dead => format!("Next: {}.", advice(letter.reason, id)),
    }
}

/// In which way its last copy went out.
fn gone(letter: &Letter) -> &'static str {
    match letter.history.last().map(|last| last.what) {
        Some(Deed::Release) => "released",
        Some(Deed::Replay | Deed::Discard) | None => "replayed",
    }
}

fn positions(recipients: &[u16]) -> String {
    let all: Vec<_> = recipients.iter().map(ToString::to_string).collect();
    format!("recipient {} (over to, cc, bcc, from 0)", all.join(", "))
}

#[cfg(test)]
mod tests {
    use time::Duration;
    use time::macros::datetime;

    use super::*;
    use crate::model::job::JobKey;
    use crate::model::ledger::Turn;
    use crate::model::letter::LetterId;

    const NOW: OffsetDateTime = datetime!(2030-01-07 09:00 UTC);

    fn replayed(state: LetterState) -> Letter {
        Letter {
            letter: LetterId(Uuid::from_u128(8)),
            job_id: Some(Uuid::from_u128(7)),
            key: Some(JobKey { organization: None, id: Uuid::from_u128(7) }),
            kind: None,
            lane: None,
            routing_key: "notification.ann@example.org".into(),
            state,
            reason: Reason::Timeout,
            detail: None,
            attempts: 1,
            first_at: None,
            died_at: NOW - Duration::hours(3),
            archived_at: NOW - Duration::hours(3),
            expires_at: None,
            revision: None,
            turn: Turn(1),
            recipients: Some(vec![1, 3]),
            deaths: 2,
            replays: 1,
            replay_turn: Some(Turn(2)),
            parked_before: std::time::Duration::ZERO,
            history: vec![LetterDeed {
                what: Deed::Replay,
                at: NOW,
                by: "cli:\u{1b}[2Jann".into(),
                outcome: None,
            }],
            body_hash: [0; 32],
            bytes: 7,
        }
    }

    fn ledger(state: State, turn: i32) -> JobStatus {
        JobStatus {
            key: JobKey { organization: None, id: Uuid::from_u128(7) },
            state,
            reason: None,
            detail: None,
            attempts: 2,
            next_attempt_at: None,
            message_id: None,
            reply: None,
            refused: Vec::new(),
            first_at: NOW,
            updated_at: NOW,
            turn: Turn(turn),
            history: Vec::new(),
        }
    }

    #[test]
    fn the_last_replays_outcome_is_the_ledgers() {
        let letter = replayed(LetterState::Replayed);
        let sent = deeds(&letter, Some(&ledger(State::Sent, 2)), NOW);
        assert_eq!(
            sent[1],
            "  1. 2030-01-07T09:00:00Z (0 s ago), replayed by cli:\\u{1b}[2Jann: sent at 2030-01-07T09:00:00Z (0 s ago)"
        );
        for stale in [None, Some(&ledger(State::Dead, 1))] {
            assert!(deeds(&letter, stale, NOW)[1].ends_with("its outcome is not known"));
        }
        let replaying = deeds(&replayed(LetterState::Replaying), Some(&ledger(State::Deferred, 2)), NOW);
        assert!(replaying[1].ends_with("its copy is not confirmed yet"), "{replaying:?}");
    }

    #[test]
    fn a_release_is_told_as_one() {
        let mut letter = replayed(LetterState::Replayed);
        letter.history[0].what = Deed::Release;
        let sent = ledger(State::Sent, 2);
        let told = deeds(&letter, Some(&sent), NOW);
        assert!(told[1].contains("released when its organization's mail flowed again: sent"), "{told:?}");
        assert!(
            super::letter(&letter, Some(&sent), NOW)[1].starts_with("Next: it was released; the job is sent")
        );
        letter.state = LetterState::Parked;
        assert!(deeds(&letter, None, NOW)[1].ends_with("its copy is not confirmed yet"));
    }

    #[test]
    fn a_letter_says_what_can_be_done_with_it() {
        let dead = super::letter(&replayed(LetterState::Dead), None, NOW).join("\n");
        for words in [
            "It died at 2030-01-07T06:00:00Z (3 h ago), because the server did not answer in time (timeout).",
            "sendoff dead replay --id 00000000-0000-0000-0000-000000000007",
            "recipient 1, 3 (over to, cc, bcc, from 0)",
            "n…@example.org",
            "7 bytes",
        ] {
            assert!(dead.contains(words), "{words}: {dead}");
        }
        let mut held = replayed(LetterState::Dead);
        held.reason = Reason::UnknownOutcome;
        assert!(super::letter(&held, None, NOW)[1].contains("--resend-unknown"));
        held.reason = Reason::Expired;
        assert!(super::letter(&held, None, NOW)[1].contains("never sent"));
        let parked = super::letter(&replayed(LetterState::Parked), None, NOW);
        assert!(parked[0].starts_with("It was parked at") && parked[1].contains("by itself"), "{parked:?}");
        let discarded = super::letter(&replayed(LetterState::Discarded), None, NOW);
        assert!(discarded[1].contains("--state discarded"), "{discarded:?}");
    }
}
