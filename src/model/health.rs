//! Whether an organization's configuration works, and when it is looked at again.
//! Guarantee: pure; the only place that knows the pauses between probes and what one failure weighs.

use std::time::Duration;

use super::failure::{Phase, Reason};
use super::policy::Verdict;

/// A server that could not be reached at all for so long is the configuration's fault: the wrong port is the commonest
/// mistake.
pub const UNREACHABLE_FOR: Duration = Duration::from_secs(600);

/// Of two failures to reach a server that are further apart, nothing says that it was out of reach in between: longer than a
/// job of an organization that sends now and then waits for its next attempt in the first hour.
pub const UNREACHABLE_GAP: Duration = Duration::from_secs(3600);

/// Whoever has seen trouble begin, or has taken it to announce it, has so long for that; then another may.
pub const ANNOUNCED_WITHIN: Duration = Duration::from_secs(30);

/// Failures in a row, on different connections, that make a configuration fail that has worked before.
pub const STRIKES: u32 = 2;

/// Pauses before a probe, in seconds; the last one repeats.
const PAUSES_S: &[i32] = &[300, 600, 1200, 2400, 3600];
/// A password that is refused again and again locks the account.
const PAUSES_AFTER_REFUSAL_S: &[i32] = &[3600, 4 * 3600, 12 * 3600];

/// Which pause comes before the next probe. Each kind is counted for itself, and grows from one to the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pauses {
    /// Minutes: a probe can do no harm.
    Short,
    /// Hours: it offers a password that was refused.
    Long,
}

impl Pauses {
    /// The kind of pause after a failure of this reason.
    pub fn after(reason: Reason) -> Self {
        if reason == Reason::AuthFailed { Self::Long } else { Self::Short }
    }

    /// The kind of pause after a probe, of a configuration that fails for this reason, that ended in trouble which may pass:
    /// no password was offered before [`Phase::Auth`].
    pub fn after_trouble(failing: Reason, phase: Phase) -> Self {
        if phase < Phase::Auth { Self::Short } else { Self::after(failing) }
    }

    /// The first, second, … pause of this kind, in seconds; the last one repeats.
    pub fn steps_s(self) -> &'static [i32] {
        match self {
            Self::Short => PAUSES_S,
            Self::Long => PAUSES_AFTER_REFUSAL_S,
        }
    }
}

/// What is known of a configuration's health, as it was loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Health {
    /// It has worked before: one failure is not enough.
    pub worked: bool,
    /// Something was noted against it, which a success has to wipe out.
    pub blemished: bool,
    /// Part of that: it could not be reached.
    pub unreached: bool,
    /// Its mail is parked, for this reason.
    pub failing: Option<Reason>,
}

/// What a failure weighs against a configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Blame {
    /// The server was reached and refused: [`STRIKES`] in a row, or one where the configuration never worked.
    Refused,
    /// No connection was made, for there is none to make: at once.
    Unconnected,
    /// The server could not be reached: after [`UNREACHABLE_FOR`].
    Unreachable,
}

/// Whom a refusal speaks against.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Suspect {
    /// The account.
    Account,
    /// The message, where the account is proven: it was refused for the same before.
    Message,
}

impl Suspect {
    /// `last` is what the same job's attempt before failed for, across a release from where it was parked for it. Up to the login the
    /// server knows nothing of the message.
    pub fn of(reason: Reason, phase: Option<Phase>, last: Option<Reason>) -> Self {
        let of_message = phase.is_some_and(|phase| phase >= Phase::Mail);
        if of_message && last == Some(reason) { Self::Message } else { Self::Account }
    }
}

/// What became of the configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Blamed {
    /// It is failing: mail is parked.
    Failing {
        /// By this very failure: the event is to be published.
        just_now: bool,
    },
    /// It was noted; the next one may be too many.
    Noted {
        /// A message had been accepted since anything was held against it.
        proven: bool,
    },
    /// It was changed or deleted meanwhile: the failure says nothing of what is there now.
    Outdated,
}

/// What is wiped out by something that went well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Absolution {
    /// The server was reached.
    Reached,
    /// A message was accepted.
    Worked,
}

impl Blame {
    /// How a fault of the configuration, or a server that cannot be reached, is weighed.
    pub fn of(reason: Reason) -> Self {
        match reason {
            Reason::HostNotPublic
            | Reason::PortNotAllowed
            | Reason::HostNotFound
            | Reason::ConfigUnreadable => Self::Unconnected,
            Reason::ConnectFailed | Reason::ConnectTimeout => Self::Unreachable,
            _ => Self::Refused,
        }
    }
}

/// What a failed attempt holds against the configuration of the organization's own server; `None`: nothing.
pub fn accusation(verdict: Verdict) -> Option<Reason> {
    match verdict {
        Verdict::Account(reason)
        | Verdict::Retry { reason: reason @ (Reason::ConnectFailed | Reason::ConnectTimeout), .. } => {
            Some(reason)
        }
        Verdict::Retry { .. } | Verdict::Dead(_) | Verdict::Fresh | Verdict::Unknown => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::policy::Feedback;

    #[test]
    fn only_the_account_and_a_server_out_of_reach_accuse_a_configuration() {
        let retry = |reason| Verdict::Retry { reason, at_least: None, feedback: Feedback::Neutral };
        for reason in [Reason::ConnectFailed, Reason::ConnectTimeout] {
            assert_eq!(accusation(retry(reason)), Some(reason));
            assert_eq!(Blame::of(reason), Blame::Unreachable);
        }
        for reason in [Reason::Throttled, Reason::ConnectionLost, Reason::DnsFailed, Reason::Timeout] {
            assert_eq!(accusation(retry(reason)), None);
        }
        assert_eq!(accusation(Verdict::Account(Reason::SenderRefused)), Some(Reason::SenderRefused));
        assert_eq!(accusation(Verdict::Dead(Reason::MessageRefused)), None);
    }

    #[test]
    fn a_message_is_suspected_when_it_is_refused_for_the_same_as_before_and_never_for_the_login() {
        let (reason, other) = (Reason::SenderRefused, Reason::Timeout);
        for (phase, last, suspect) in [
            (Some(Phase::Mail), Some(reason), Suspect::Message),
            (Some(Phase::FinalDot), Some(reason), Suspect::Message),
            (Some(Phase::Auth), Some(reason), Suspect::Account),
            (Some(Phase::Mail), Some(other), Suspect::Account),
            (Some(Phase::Mail), None, Suspect::Account),
            (None, Some(reason), Suspect::Account),
        ] {
            assert_eq!(Suspect::of(reason, phase, last), suspect, "{phase:?} {last:?}");
        }
    }

    #[test]
    fn probes_become_rarer_and_a_refused_password_is_tried_least() {
        for reason in Reason::ALL {
            let pauses = Pauses::after(*reason).steps_s();
            assert!(pauses.is_sorted() && pauses[0] >= 300, "{reason}");
        }
        assert_eq!(Pauses::after(Reason::AuthFailed).steps_s(), [3600, 14_400, 43_200]);
        assert_eq!(Pauses::after(Reason::TlsFailed).steps_s().last(), Some(&3600));
    }

    #[test]
    fn trouble_before_a_password_was_offered_does_not_prolong_the_wait() {
        let after = |phase| Pauses::after_trouble(Reason::AuthFailed, phase);
        for phase in
            [Phase::Resolve, Phase::Connect, Phase::Greeting, Phase::Ehlo, Phase::Starttls, Phase::Tls]
        {
            assert_eq!(after(phase), Pauses::Short, "{phase:?}");
        }
        assert_eq!(after(Phase::Auth), Pauses::Long);
        assert_eq!(Pauses::after_trouble(Reason::TlsFailed, Phase::Auth), Pauses::Short);
    }
}
