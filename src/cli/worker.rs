//! `sendoff worker`: what can be said about how it runs.
//! Guarantee: a drain timeout is bounded, so a stop always ends.

use std::time::Duration;

use clap::Args;

/// A service manager that waits longer than this for a stop is not expected.
const DRAIN_MAX: Duration = Duration::from_secs(3600);

#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  sendoff worker --drain-timeout 30s\n\nSIGTERM or SIGINT drains: no new work is taken, \
    sends in flight finish, the rest goes back to the queue. A second signal stops at once."
)]
pub(super) struct WorkerArgs {
    /// How long sends in flight may take to finish after SIGTERM: say 30s, 2m or 500ms
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = duration)]
    pub(super) drain_timeout: Duration,
}

/// Reads `500ms`, `30s`, `2m`; a bare number means seconds.
pub(super) fn duration(text: &str) -> Result<Duration, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let number: Option<u64> = digits.parse().ok();
    let time = number.and_then(|number| match &text[digits.len()..] {
        "ms" => Some(Duration::from_millis(number)),
        "s" | "" => Some(Duration::from_secs(number)),
        "m" => number.checked_mul(60).map(Duration::from_secs),
        _ => None,
    });
    time.filter(|time| *time <= DRAIN_MAX)
        .ok_or_else(|| "allowed: a time of up to an hour, say 30s, 2m or 500ms".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_has_a_unit_and_a_bound() {
        assert_eq!(duration("30s"), Ok(Duration::from_secs(30)));
        assert_eq!(duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(duration("2m"), Ok(Duration::from_secs(120)));
        assert_eq!(duration("7"), Ok(Duration::from_secs(7)));
        for bad in ["", "s", "-1s", "1.5s", "1h", "61m", "99999999999999999999s", "1ß"] {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }
}
