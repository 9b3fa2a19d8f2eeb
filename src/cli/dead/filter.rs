//! Which dead letters a command is about: the options that list, stats, replay and discard share.
//! Guarantee: options combine (each must hold, one of its values at least), and a value that could never match is an error
//! that says what is allowed.

use clap::Args;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use time::format_description::well_known::Rfc3339;
use time::{Duration, OffsetDateTime};
use uuid::Uuid;

use crate::broker::wire;
use crate::cli::exit::BadArgument;
use crate::model::failure::Reason;
use crate::model::letter::{LetterFilter, LetterState};
use crate::model::organization::OrganizationId;

/// The options. Those that are lists may be repeated, and take several values with commas.
#[derive(Debug, Args)]
#[command(next_help_heading = "Which letters (each option given must hold; lists: repeat, or use commas)")]
pub(in crate::cli) struct FilterArgs {
    /// Of these organizations. `platform` is an organization's id like any other here: see --platform
    #[arg(long, value_name = "ORG", value_delimiter = ',', value_parser = OrganizationId::parse)]
    org: Vec<OrganizationId>,
    /// Of the platform itself; a letter whose body does not tell its owner is of nobody. Adds to --org
    #[arg(long)]
    platform: bool,
    /// Died last for one of these reasons
    #[arg(long, value_name = "REASON", value_delimiter = ',', value_parser = reasons())]
    reason: Vec<Reason>,
    /// Of these kinds
    #[arg(long, value_name = "KIND", value_delimiter = ',', value_parser = kind)]
    kind: Vec<String>,
    /// In one of these states
    #[arg(long, value_name = "STATE", value_delimiter = ',', value_parser = states())]
    state: Vec<LetterState>,
    /// Died last at this time (RFC 3339) or later; or so long ago at most: 90s, 30m, 24h, 7d
    #[arg(long, value_name = "TIME", value_parser = moment)]
    since: Option<Moment>,
    /// Died last before this time (RFC 3339); or longer ago than this: 90s, 30m, 24h, 7d
    #[arg(long, value_name = "TIME", value_parser = moment)]
    until: Option<Moment>,
    /// With these ids: of the job, or the letter's own
    #[arg(long, value_name = "UUID", value_delimiter = ',', value_parser = crate::cli::uuid)]
    id: Vec<Uuid>,
    /// So many at most: letters, or lines of `stats`
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub(in crate::cli) limit: Option<u32>,
}

/// A time, or how long ago it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Moment {
    At(OffsetDateTime),
    Ago(Duration),
}

impl FilterArgs {
    /// Whether no condition is set: every letter is meant. `--limit` is a bound, and no condition.
    pub(in crate::cli) fn is_empty(&self) -> bool {
        self.org.is_empty()
            && !self.platform
            && self.reason.is_empty()
            && self.kind.is_empty()
            && self.state.is_empty()
            && self.since.is_none()
            && self.until.is_none()
            && self.id.is_empty()
    }

    /// What is said when there is no such letter.
    pub(in crate::cli) fn nothing(&self) -> &'static str {
        if self.is_empty() { "The archive has no dead letter." } else { "No dead letter matches." }
    }

    /// The conditions, with ages counted from `now`.
    ///
    /// # Errors
    /// When nothing could lie between --since and --until.
    pub(in crate::cli) fn filter(&self, now: OffsetDateTime) -> Result<LetterFilter, BadArgument> {
        let time = |moment: Option<Moment>, option| moment.map(|moment| moment.at(now, option)).transpose();
        let (since, until) = (time(self.since, "--since")?, time(self.until, "--until")?);
        if let (Some(since), Some(until)) = (since, until)
            && since >= until
        {
            let words = |time: OffsetDateTime| time.format(&Rfc3339).unwrap_or_else(|_| time.to_string());
            return Err(BadArgument(format!(
                "--since {} is not before --until {}: no letter could lie between",
                words(since),
                words(until)
            )));
        }
        let platform = self.platform.then(String::new);
        Ok(LetterFilter {
            organizations: self.org.iter().map(|org| org.as_str().to_owned()).chain(platform).collect(),
            reasons: self.reason.clone(),
            kinds: self.kind.clone(),
            states: self.state.clone(),
            since,
            until,
            ids: self.id.clone(),
        })
    }
}

impl Moment {
    fn at(self, now: OffsetDateTime, option: &str) -> Result<OffsetDateTime, BadArgument> {
        match self {
            Self::At(time) => Ok(time),
            Self::Ago(age) => {
                now.checked_sub(age).ok_or_else(|| BadArgument(format!("{option} is too long ago")))
            }
        }
    }
}

fn reasons() -> impl TypedValueParser<Value = Reason> {
    let names = PossibleValuesParser::new(Reason::ALL.iter().map(|reason| reason.as_str()));
    names.try_map(|name| Reason::from_name(&name).ok_or("is no reason"))
}

fn states() -> impl TypedValueParser<Value = LetterState> {
    let names = PossibleValuesParser::new(LetterState::ALL.map(LetterState::as_str));
    names.try_map(|name| LetterState::from_name(&name).ok_or("is no state"))
}

fn kind(text: &str) -> Result<String, String> {
    if wire::is_slug(text) {
        Ok(text.to_owned())
    } else {
        Err("a kind is 1 to 64 of a-z, 0-9, `.`, `_` and `-`".to_owned())
    }
}

fn moment(text: &str) -> Result<Moment, String> {
    if let Ok(time) = OffsetDateTime::parse(text, &Rfc3339) {
        return Ok(Moment::At(time));
    }
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let seconds = match &text[digits.len()..] {
        "s" => Some(1),
        "m" => Some(60),
        "h" => Some(3600),
        "d" => Some(86_400),
        _ => None,
    };
    let number = digits.parse::<u32>().ok().filter(|_| !digits.starts_with('+'));
    number
        .zip(seconds)
        .map(|(number, unit)| Moment::Ago(Duration::seconds(i64::from(number) * unit)))
        .ok_or_else(|| {
            "allowed: a time as RFC 3339, say 2030-01-07T09:00:00Z, or an age, say 90s, 30m, 24h or 7d"
                .to_owned()
        })
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use time::macros::datetime;

    use super::*;

    const NOW: OffsetDateTime = datetime!(2030-01-07 09:00 UTC);

    #[derive(Debug, Parser)]
    struct Command {
        #[command(flatten)]
        which: FilterArgs,
    }

    fn parsed(arguments: &[&str]) -> Result<FilterArgs, String> {
        let all = [&["x"], arguments].concat();
        Command::try_parse_from(all).map(|command| command.which).map_err(|error| error.to_string())
    }

    fn filter(arguments: &[&str]) -> LetterFilter {
        parsed(arguments).unwrap().filter(NOW).unwrap()
    }

    #[test]
    fn options_are_repeated_or_given_with_commas() {
        let id = Uuid::from_u128(7);
        let which = filter(&[
            "--org",
            "42,acme",
            "--org",
            "7",
            "--platform",
            "--reason",
            "timeout,internal",
            "--kind",
            "a.b",
            "--state",
            "dead",
            "--state",
            "parked",
            "--id",
            &id.to_string(),
        ]);
        assert_eq!(which.organizations, ["42", "acme", "7", ""]);
        assert_eq!(which.reasons, [Reason::Timeout, Reason::Internal]);
        assert_eq!(which.kinds, ["a.b"]);
        assert_eq!(which.states, [LetterState::Dead, LetterState::Parked]);
        assert_eq!(which.ids, [id]);
        assert_eq!(filter(&["--org", "platform"]).organizations, ["platform"], "an id like any other");
    }

    #[test]
    fn a_time_is_a_moment_or_an_age() {
        let which = filter(&["--since", "24h", "--until", "2030-01-07T10:00:00+02:00"]);
        assert_eq!(which.since, Some(datetime!(2030-01-06 09:00 UTC)));
        assert_eq!(which.until, Some(datetime!(2030-01-07 08:00 UTC)));
        for (age, seconds) in [("90s", 90), ("30m", 1800), ("7d", 604_800)] {
            assert_eq!(filter(&["--since", age]).since, Some(NOW - Duration::seconds(seconds)), "{age}");
        }
        for bad in
            ["", "7", "d", "-7d", "+7d", "1.5h", "7w", "7 d", "yesterday", "2030-01-07", "1ß", "5000000000s"]
        {
            let words = parsed(&[&format!("--since={bad}")]).map(drop).unwrap_err();
            assert!(words.contains("--since") && words.contains("an age"), "{bad}: {words}");
        }
        assert!(parsed(&["--since", "4294967295d"]).unwrap().filter(NOW).is_err());
    }

    #[test]
    fn a_span_that_holds_nothing_is_refused() {
        let words = parsed(&["--since", "1h", "--until", "2h"]).unwrap().filter(NOW).unwrap_err().to_string();
        assert!(words.contains("--since 2030-01-07T08:00:00Z") && words.contains("--until"), "{words}");
    }

    #[test]
    fn a_value_that_could_never_match_is_an_error_that_says_what_is_allowed() {
        for (option, bad, allowed) in [
            ("--reason", "time_out", "similar value exists: 'timeout'"),
            ("--reason", "x", "crash_loop"),
            ("--state", "deed", "similar value exists: 'dead'"),
            ("--state", "x", "dead, parked, replaying, replayed, discarded"),
            ("--kind", "Booking", "a-z, 0-9"),
            ("--org", "a b", "1 to 64 characters"),
            ("--id", "7", "UUID"),
            ("--limit", "0", "1..=1000000"),
        ] {
            let words = parsed(&[option, bad]).map(drop).unwrap_err();
            assert!(words.contains(option) && words.contains(allowed), "{option} {bad}: {words}");
        }
    }

    #[test]
    fn a_limit_is_no_condition() {
        assert!(parsed(&[]).unwrap().is_empty());
        let bounded = parsed(&["--limit", "5"]).unwrap();
        assert!(bounded.is_empty() && bounded.limit == Some(5));
        assert_eq!(bounded.filter(NOW).unwrap(), LetterFilter::default());
        for one in [["--org", "1"], ["--reason", "timeout"], ["--until", "1d"], ["--state", "dead"]] {
            assert!(!parsed(&one).unwrap().is_empty(), "{one:?}");
        }
        assert!(!parsed(&["--platform"]).unwrap().is_empty());
    }
}
