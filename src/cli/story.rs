//! What happened to a job or a letter, in sentences.
//! Guarantee: every time says how long ago it was, every reason what it means, and nothing from outside reaches the terminal
//! unescaped.

use time::format_description::well_known::Rfc3339;
use time::{Duration, OffsetDateTime};
use uuid::Uuid;

use super::output::harmless;
use crate::model::address::mask_addresses;
use crate::model::event::RefusedRecipient;
use crate::model::failure::{Phase, Reason};
use crate::model::ledger::{AttemptRecord, JobStatus, State};
use crate::model::organization::OrganizationId;
use crate::store::DEAD_AFTER;

/// Text from outside for a person: harmless, and its addresses masked.
pub(super) fn masked(text: &str) -> String {
    harmless(&mask_addresses(text))
}

/// A time to the second, as RFC 3339.
pub(super) fn rfc3339(at: OffsetDateTime) -> String {
    let second = at.replace_nanosecond(0).unwrap_or(at);
    second.format(&Rfc3339).unwrap_or_else(|_| second.to_string())
}

/// A span in its largest unit, rounded down: `45 s`, `12 min`, `3 h`, `5 d`.
fn span(time: Duration) -> String {
    let seconds = time.whole_seconds().unsigned_abs();
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min", seconds / 60),
        3600..86_400 => format!("{} h", seconds / 3600),
        _ => format!("{} d", seconds / 86_400),
    }
}

/// The same for a column: `45s`, `12m`, `3h`, `5d`; what lies ahead, by a clock that differs, is `0s`.
pub(super) fn age(at: OffsetDateTime, now: OffsetDateTime) -> String {
    let age = (now - at).max(Duration::ZERO);
    span(age).replace(" min", "m").replace(' ', "")
}

/// A time and how far away it is: `2030-01-07T09:00:00Z (3 h ago)`.
pub(super) fn moment(at: OffsetDateTime, now: OffsetDateTime) -> String {
    let distance = span(at - now);
    if at > now {
        format!("{} (in {distance})", rfc3339(at))
    } else {
        format!("{} ({distance} ago)", rfc3339(at))
    }
}

/// `1 attempt`, `2 attempts`.
pub(super) fn counted(number: usize, what: &str) -> String {
    format!("{number} {what}{}", if number == 1 { "" } else { "s" })
}

/// One of the facts below a sentence.
pub(super) fn fact(name: &str, value: &str) -> String {
    format!("  {name:<12} {value}")
}

/// What a reason means, to be read after "because".
pub(super) fn meaning(reason: Reason) -> &'static str {
    match reason {
        Reason::Malformed => "the body is no job",
        Reason::UnsupportedVersion => "the job is of a version that is not supported",
        Reason::IdConflict => "the same id was published before with another body",
        Reason::Expired => "its time had passed",
        Reason::Superseded => "a newer revision of its booking was taken up",
        Reason::Cancelled => "it was called back",
        Reason::Unroutable => "no lane takes its routing key",
        Reason::ConfigMissing => "the organization has no server in use, and the platform has none",
        Reason::ConfigUnreadable => "the organization's stored credentials do not open",
        Reason::HostNotPublic => "the server's host has an address that is not public",
        Reason::PortNotAllowed => "the server's port is not an allowed one",
        Reason::HostNotFound => "the server's host does not exist or has no address",
        Reason::DnsFailed => "the server's host could not be looked up",
        Reason::ConnectFailed => "the server could not be reached",
        Reason::ConnectTimeout => "the server did not answer to the connection",
        Reason::TlsFailed => "TLS with the server failed",
        Reason::TlsRequired => "the server offers no TLS, and credentials would travel in the clear",
        Reason::AuthFailed => "the server refused user name or password",
        Reason::SenderRefused => "the server takes no mail from this sender",
        Reason::RecipientsRefused => "the server refused the recipients",
        Reason::MessageRefused => "the server refused the message",
        Reason::TooLarge => "the message is larger than is allowed",
        Reason::Throttled => "the server asked to slow down",
        Reason::QuotaExceeded => "a limit of the account is used up",
        Reason::ServerError => "the server has a fault of its own",
        Reason::ProtocolError => "what the server said was no SMTP",
        Reason::ConnectionLost => "the connection was lost",
        Reason::Timeout => "the server did not answer in time",
        Reason::UnknownOutcome => "it cannot be known whether the server accepted it",
        Reason::RetriesExhausted => "every attempt that it was allowed has failed",
        Reason::CrashLoop => "worker after worker died with it",
        Reason::Internal => "Sendoff itself has a fault",
    }
}

/// `because the server refused the message (message_refused)`.
pub(super) fn because(reason: Reason) -> String {
    format!("because {} ({reason})", meaning(reason))
}

/// What the ledger knows of a job: where it stands, since when and why, what comes next, and each attempt.
pub(super) fn job(status: &JobStatus, now: OffsetDateTime) -> Vec<String> {
    let mut lines = vec![standing(status, now)];
    if let Some(next) = what_next(status) {
        lines.push(next);
    }
    let mut add = |name: &str, value: Option<String>| lines.extend(value.map(|value| fact(name, &value)));
    add("detail", status.detail.as_deref().map(masked));
    add("attempts", Some(status.attempts.to_string()));
    add("reply", status.reply.as_deref().map(masked));
    add("message id", status.message_id.as_deref().map(harmless));
    add("first seen", Some(moment(status.first_at, now)));
    add("updated", Some(moment(status.updated_at, now)));
    lines.extend(status.refused.iter().map(refused));
    lines.extend(attempts(&status.history, status.attempts, now));
    lines
}

fn standing(status: &JobStatus, now: OffsetDateTime) -> String {
    let since = moment(status.updated_at, now);
    let why = status.reason.map(because).map(|why| format!(", {why}")).unwrap_or_default();
    match status.state {
        State::Sent if status.refused.is_empty() => format!("The server accepted it at {since}."),
        State::Sent => format!(
            "The server accepted it at {since}, but refused {}.",
            counted(status.refused.len(), "recipient")
        ),
        State::Claimed => format!("A worker took it up at {since} and has it now."),
        State::Deferred if status.reason.is_none() && status.attempts > 0 => {
            format!("It was replayed or released at {since}, and its first attempt after that is to come.")
        }
        State::Deferred => match status.next_attempt_at {
            Some(at) if at > now => format!("It waits for its next attempt, at {}{why}.", moment(at, now)),
            Some(at) => format!("Its next attempt is due since {}{why}.", moment(at, now)),
            None => format!("It waits for its next attempt since {since}{why}."),
        },
        State::Parked => format!("It waits for its organization's configuration since {since}{why}."),
        State::Dead => format!("It died at {since}{why}."),
        State::Unknown => format!(
            "The worker that took it up at {since} is gone: it cannot be known whether the server accepted it."
        ),
        State::Cancelled => format!("It was called back at {since}."),
    }
}

fn what_next(status: &JobStatus) -> Option<String> {
    let id = status.key.id;
    Some(match status.state {
        State::Sent if !status.refused.is_empty() => format!(
            "Next: nothing by itself; correct what is wrong with those recipients, then `sendoff dead replay --id {id}` sends \
             to them alone."
        ),
        State::Sent | State::Cancelled => return None,
        State::Claimed => "Next: the worker records what came of the attempt.".to_owned(),
        State::Deferred => "Next: its copy comes back to the lane, and a worker tries again.".to_owned(),
        State::Parked => parked_next(status.key.organization.as_ref()),
        State::Dead => {
            let advice = advice(status.reason.unwrap_or(Reason::Internal), id);
            format!("Next: nothing by itself; {advice}.")
        }
        State::Unknown => format!(
            "Next: another worker takes it over once the first has been gone for {} s.",
            DEAD_AFTER.as_secs()
        ),
    })
}

/// What becomes of a parked job or letter.
pub(super) fn parked_next(organization: Option<&OrganizationId>) -> String {
    let next =
        "Next: it goes back to its lane by itself once the organization's configuration works or is deleted";
    match organization {
        Some(organization) => {
            format!("{next}; `sendoff org smtp show {organization}` tells how that stands.")
        }
        None => format!("{next}."),
    }
}

/// What a person may do about a job or a letter that died, to be read after "next".
pub(super) fn advice(reason: Reason, id: Uuid) -> String {
    match reason {
        Reason::Expired | Reason::Superseded | Reason::Cancelled => {
            "it is out of date and is never sent".to_owned()
        }
        Reason::Malformed | Reason::UnsupportedVersion => {
            "mend the publisher, which publishes it anew; a replay leaves it out while it is no job"
                .to_owned()
        }
        Reason::IdConflict => {
            "the publisher takes a new id for a new mail; a replay leaves it out".to_owned()
        }
        Reason::Unroutable => {
            format!("add a binding for its routing key, then `sendoff dead replay --id {id}`")
        }
        Reason::UnknownOutcome => format!(
            "ask the receiving side for the Message-ID; if it did not arrive, \
             `sendoff dead replay --id {id} --resend-unknown`"
        ),
        _ => format!(
            "treat the cause, then `sendoff dead replay --id {id}`; or `sendoff dead discard --id {id}`"
        ),
    }
}

fn refused(refused: &RefusedRecipient) -> String {
    let RefusedRecipient { index, code, reason } = refused;
    fact("refused", &format!("recipient {index} (over to, cc, bcc, from 0): {code}, {}", meaning(*reason)))
}

/// Each attempt that the ledger keeps, as a sentence; `made` is how many there were.
pub(super) fn attempts(history: &[AttemptRecord], made: u32, now: OffsetDateTime) -> Vec<String> {
    let Some(heading) = heading(history.len(), made) else { return Vec::new() };
    let mut lines = vec![heading];
    lines.extend(
        history.iter().enumerate().map(|(at, record)| format!("  {}. {}", at + 1, attempt(record, now))),
    );
    lines
}

fn heading(kept: usize, made: u32) -> Option<String> {
    match usize::try_from(made).unwrap_or(usize::MAX) {
        _ if kept == 0 => None,
        made if made > kept => Some(format!("Attempts ({kept} of {made} are kept):")),
        _ => Some("Attempts:".to_owned()),
    }
}

fn attempt(record: &AttemptRecord, now: OffsetDateTime) -> String {
    let AttemptRecord { at, transport, address, phase, reason, reply, ms } = record;
    let server = match (transport.as_str(), address) {
        ("platform", None) => "the platform's server".to_owned(),
        ("platform", Some(address)) => format!("the platform's server at {}", harmless(address)),
        (_, None) => "the organization's server".to_owned(),
        (_, Some(address)) => format!("the organization's server at {}", harmless(address)),
    };
    let reply = reply.as_deref().map(|reply| format!(": {}", masked(reply))).unwrap_or_default();
    let at = moment(*at, now);
    match reason {
        None => format!("{at}, {server} took it after {ms} ms{reply}"),
        Some(reason) => {
            format!(
                "{at}, {server}, ended {} after {ms} ms: {} ({reason}){reply}",
                place(*phase),
                meaning(*reason)
            )
        }
    }
}

/// How far an attempt came.
fn place(phase: Phase) -> String {
    let name = phase.as_str();
    let words = match phase {
        Phase::Resolve => "looking up the host",
        Phase::Connect => "connecting",
        Phase::Greeting => "waiting for the greeting",
        Phase::Ehlo => "at EHLO",
        Phase::Starttls => "at STARTTLS",
        Phase::Tls => "in the TLS handshake",
        Phase::Auth => "logging in",
        Phase::Rset => "resetting the session",
        Phase::Mail => "naming the sender",
        Phase::Rcpt => "naming the recipients",
        Phase::Data => "announcing the message",
        Phase::Body => "writing the message",
        Phase::FinalDot => "behind the final dot",
    };
    format!("{words} (phase {name})")
}

#[cfg(test)]
mod tests {
    use time::macros::datetime;

    use super::*;
    use crate::model::job::JobKey;
    use crate::model::ledger::Turn;

    const NOW: OffsetDateTime = datetime!(2030-01-07 09:00 UTC);

    fn status(state: State, reason: Option<Reason>) -> JobStatus {
        JobStatus {
            key: JobKey { organization: None, id: Uuid::from_u128(7) },
            state,
            reason,
            detail: Some("to[0]: \u{1b}[2J ann@example.org".into()),
            attempts: 3,
            next_attempt_at: None,
            message_id: None,
            reply: None,
            refused: Vec::new(),
            first_at: NOW - Duration::days(2),
            updated_at: NOW - Duration::hours(3),
            turn: Turn(1),
            history: Vec::new(),
        }
    }

    #[test]
    fn an_age_is_told_in_its_largest_unit() {
        for (seconds, column, words) in [
            (0, "0s", "0 s"),
            (59, "59s", "59 s"),
            (60, "1m", "1 min"),
            (7199, "1h", "1 h"),
            (864_000, "10d", "10 d"),
        ] {
            let at = NOW - Duration::seconds(seconds);
            assert_eq!(age(at, NOW), column);
            assert_eq!(moment(at, NOW), format!("{} ({words} ago)", rfc3339(at)));
        }
        assert_eq!(age(NOW + Duration::seconds(5), NOW), "0s", "clocks differ");
        assert_eq!(moment(NOW + Duration::minutes(5), NOW), "2030-01-07T09:05:00Z (in 5 min)");
    }

    #[test]
    fn a_story_says_since_when_why_and_what_comes_next() {
        let dead = job(&status(State::Dead, Some(Reason::MessageRefused)), NOW);
        assert_eq!(
            dead[0],
            "It died at 2030-01-07T06:00:00Z (3 h ago), because the server refused the message \
             (message_refused)."
        );
        assert!(
            dead[1].starts_with("Next: nothing by itself;") && dead[1].contains("dead replay --id"),
            "{dead:?}"
        );
        assert!(dead[2].contains("\\u{1b}[2J a…@example.org"), "{dead:?}");
        let mut waits = status(State::Deferred, Some(Reason::Throttled));
        waits.next_attempt_at = Some(NOW + Duration::minutes(5));
        let words = job(&waits, NOW);
        assert!(words[0].contains("2030-01-07T09:05:00Z (in 5 min), because the server asked"), "{words:?}");
        waits.next_attempt_at = Some(NOW - Duration::minutes(5));
        assert!(job(&waits, NOW)[0].starts_with("Its next attempt is due since"));
        let replayed = job(&status(State::Deferred, None), NOW);
        assert!(
            replayed[0].starts_with("It was replayed or released at 2030-01-07T06:00:00Z"),
            "{replayed:?}"
        );
        let mut parked = status(State::Parked, Some(Reason::AuthFailed));
        parked.key.organization = Some(OrganizationId::from_integer(42));
        let words = job(&parked, NOW);
        assert!(words[0].contains("because the server refused user name or password"), "{words:?}");
        assert!(words[1].contains("by itself") && words[1].contains("org smtp show 42"), "{words:?}");
        let held = job(&status(State::Dead, Some(Reason::UnknownOutcome)), NOW);
        assert!(held[1].contains("--resend-unknown"), "{held:?}");
    }

    #[test]
    fn an_attempt_is_one_sentence() {
        let record = AttemptRecord {
            at: NOW,
            transport: "organization".into(),
            address: Some("192.0.2.1:587".into()),
            phase: Phase::Rcpt,
            reason: Some(Reason::Throttled),
            reply: Some("450 <ann@example.org> later".into()),
            ms: 120,
        };
        assert_eq!(
            attempts(&[record], 2, NOW),
            [
                "Attempts (1 of 2 are kept):",
                "  1. 2030-01-07T09:00:00Z (0 s ago), the organization's server at 192.0.2.1:587, ended naming the \
                 recipients (phase rcpt) after 120 ms: the server asked to slow down (throttled): \
                 450 <a…@example.org> later"
            ]
        );
        assert!(attempts(&[], 1, NOW).is_empty());
    }
}
