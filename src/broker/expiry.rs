//! Whether a command that has waited is still to be carried out.
//! Guarantee: none is once its time to live is over, as far as that can be told: by its timestamp where it bears one, and
//! where it does not by its wait in this worker, which is short.

use std::time::Duration;

use lapin::BasicProperties;
use time::OffsetDateTime;

use super::topology::COMMAND_TTL_MS;

/// The longest wait in this worker. With what a command may take after it, a reply still comes within the contract's 10 s,
/// for control counts the wait in.
const WAIT_MAX: Duration = Duration::from_secs(5);
/// By how much a timestamp may be wrong without harm: it counts whole seconds, and comes from another machine's clock.
const CLOCKS_APART: Duration = Duration::from_secs(3);
/// An age beyond this says something about a clock, or about a timestamp in another unit, and nothing about the command.
const AGE_MAX: Duration = Duration::from_secs(3600);

/// Why a command is not carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Expired {
    /// It waited here for too long.
    Here,
    /// Its timestamp is so old; where that cannot be, two clocks do not agree.
    Aged(Duration),
}

/// Whether a command that has waited here for so long is expired.
pub(super) fn expired(
    properties: &BasicProperties,
    waited: Duration,
    now: OffsetDateTime,
) -> Option<Expired> {
    let longest = time_to_live(properties);
    if waited > longest.min(WAIT_MAX) {
        return Some(Expired::Here);
    }
    age(properties, now).filter(|age| *age > longest + CLOCKS_APART).map(Expired::Aged)
}

/// As long as the queue keeps a command, or as its sender says (milliseconds, as text).
fn time_to_live(properties: &BasicProperties) -> Duration {
    let longest = COMMAND_TTL_MS.unsigned_abs();
    let given = properties.expiration().as_ref().and_then(|text| text.as_str().parse().ok());
    Duration::from_millis(given.map_or(longest, |ms: u64| ms.min(longest)))
}

/// Since it was sent, where that can be told. A timestamp of the future tells nothing.
fn age(properties: &BasicProperties, now: OffsetDateTime) -> Option<Duration> {
    let sent = i64::try_from((*properties.timestamp())?).ok()?;
    let sent = OffsetDateTime::from_unix_timestamp(sent).ok()?;
    Duration::try_from(now - sent).ok().filter(|age| *age <= AGE_MAX)
}

#[cfg(test)]
mod tests {
    use time::macros::datetime;

    use super::*;

    const NOW: OffsetDateTime = datetime!(2026-11-22 20:00 UTC);

    fn sent(seconds_ago: i64) -> BasicProperties {
        let at = u64::try_from(NOW.unix_timestamp() - seconds_ago).unwrap();
        BasicProperties::default().with_timestamp(at)
    }

    fn brief(properties: BasicProperties) -> BasicProperties {
        properties.with_expiration("2000".into())
    }

    #[test]
    fn a_command_waits_here_for_seconds_and_no_longer_than_its_sender() {
        let after = |properties, seconds| expired(&properties, Duration::from_secs(seconds), NOW);
        let none = BasicProperties::default;
        assert_eq!((after(none(), 4), after(none(), 6)), (None, Some(Expired::Here)));
        assert_eq!((after(brief(none()), 1), after(brief(none()), 3)), (None, Some(Expired::Here)));
        let odd = none().with_expiration("soon".into());
        assert_eq!((after(odd.clone(), 4), after(odd, 6)), (None, Some(Expired::Here)));
        assert_eq!(after(sent(0), 6), Some(Expired::Here), "a fresh timestamp lengthens nothing");
    }

    #[test]
    fn its_time_counts_from_its_timestamp_where_that_can_be_believed() {
        let by = |properties| expired(&properties, Duration::ZERO, NOW);
        let aged = |seconds| Some(Expired::Aged(Duration::from_secs(seconds)));
        for (properties, outcome) in [
            (sent(0), None),
            (sent(62), None),
            (sent(64), aged(64)),
            (brief(sent(2)), None),
            (brief(sent(5)), None),
            (brief(sent(6)), aged(6)),
            // A clock that is far off, one that is behind, and milliseconds.
            (brief(sent(7200)), None),
            (brief(sent(-7200)), None),
            (brief(BasicProperties::default().with_timestamp(1_795_377_600_000)), None),
            (brief(BasicProperties::default().with_timestamp(u64::MAX)), None),
            (brief(BasicProperties::default()), None),
        ] {
            assert_eq!(by(properties.clone()), outcome, "{properties:?}");
        }
    }
}
