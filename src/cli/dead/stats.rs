//! `sendoff dead stats`: how many letters died why, whose, and how long ago.
//! Guarantee: the numbers add up to the letters that `list` shows for the same options.

use std::collections::BTreeMap;

use anyhow::Context;
use clap::Args;
use serde_json::{Map, Value, json};

use super::filter::FilterArgs;
use super::list::cut;
use crate::cli::exit::Done;
use crate::cli::output;
use crate::clock::Clock;
use crate::model::failure::Reason;
use crate::model::letter::Owner;
use crate::parts;
use crate::settings::Settings;
use crate::store::{LetterAge, LetterCount};

/// Longest bar, in columns.
const BAR: usize = 16;
/// Widest column of organizations.
const ORGANIZATION: usize = 20;

#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  sendoff dead stats\n  sendoff dead stats --state dead --since 24h --limit 10\n\nThe \
    columns of ages do not overlap: `<1d` counts what died less than a day, but at least an hour ago."
)]
pub(in crate::cli) struct StatsArgs {
    /// Print an array of {"reason","organization_id","platform","total","ages":{"hour","day","week","month","older"}}
    #[arg(long)]
    json: bool,
    // Last, for what follows would stand under its heading.
    #[command(flatten)]
    which: FilterArgs,
}

pub(super) async fn run(args: &StatsArgs, settings: &Settings) -> anyhow::Result<Done> {
    let filter = args.which.filter(Clock::system().now())?;
    let store = parts::store(settings, parts::COMMAND_CONNECTIONS)?;
    let counts = store.letter_stats(&filter).await.context("asking the archive")?;
    let bars = bars(counts);
    let shown = args.which.limit.map_or(bars.len(), |limit| bars.len().min(limit as usize));
    if args.json {
        output::json(&bars[..shown].iter().map(Bar::json).collect::<Vec<_>>())?;
    } else if bars.is_empty() {
        output::line(args.which.nothing())?;
    } else {
        for line in histogram(&bars, shown, output::is_terminal()) {
            output::line(&line)?;
        }
    }
    Ok(Done::Well)
}

/// The letters of one reason and owner.
pub(super) struct Bar {
    reason: Reason,
    owner: Owner,
    /// As [`LetterAge::ALL`] has them.
    ages: [u64; LetterAge::ALL.len()],
}

impl Bar {
    fn total(&self) -> u64 {
        self.ages.iter().sum()
    }

    fn json(&self) -> Value {
        let ages = LetterAge::ALL.iter().zip(self.ages);
        let ages: Map<String, Value> =
            ages.filter_map(|(age, count)| Some((json!(age).as_str()?.to_owned(), json!(count)))).collect();
        let platform = self.owner == Owner::Platform;
        json!({
            "reason": self.reason, "organization_id": self.owner.organization(), "platform": platform,
            "total": self.total(), "ages": ages,
        })
    }
}

/// The longest bar first.
pub(super) fn bars(counts: Vec<LetterCount>) -> Vec<Bar> {
    let mut bars: BTreeMap<_, Bar> = BTreeMap::new();
    for LetterCount { reason, owner, age, count } in counts {
        let bar = bars.entry((reason.as_str(), owner.clone())).or_insert_with(|| Bar {
            reason,
            owner,
            ages: Default::default(),
        });
        let class = LetterAge::ALL.iter().position(|known| *known == age);
        bar.ages[class.unwrap_or(LetterAge::ALL.len() - 1)] += count;
    }
    let mut bars: Vec<Bar> = bars.into_values().collect();
    bars.sort_by_key(|bar| std::cmp::Reverse(bar.total()));
    bars
}

/// The first `shown` of them as lines of numbers, with bars beside them where a person looks; the last line is the total of
/// all.
pub(super) fn histogram(bars: &[Bar], shown: usize, drawn: bool) -> Vec<String> {
    let longest = bars.iter().map(Bar::total).max().unwrap_or_default();
    let named = |bar: &Bar| bar.owner.to_string().chars().count();
    let width = bars[..shown].iter().map(named).max().unwrap_or_default().clamp(12, ORGANIZATION);
    let row = |reason: &str, organization: &str, total: &str, ages: &[String]| {
        let ages: String = ages.iter().map(|age| format!(" {age:>7}")).collect();
        format!("{reason:<19}  {:<width$}  {total:>7} {ages}", cut(organization, width))
    };
    let heads = LetterAge::ALL.map(|age| age.as_str().to_owned());
    let mut lines = vec![row("REASON", "ORGANIZATION", "TOTAL", &heads)];
    for bar in &bars[..shown] {
        let owner = bar.owner.to_string();
        let numbers = bar.ages.map(|age| age.to_string());
        let line = row(bar.reason.as_str(), &owner, &bar.total().to_string(), &numbers);
        lines.push(if drawn { format!("{line}  {}", drawing(bar.total(), longest)) } else { line });
    }
    let rest: u64 = bars[shown..].iter().map(Bar::total).sum();
    if rest > 0 {
        lines.push(
            row(&format!("({} more)", bars.len() - shown), "", &rest.to_string(), &[]).trim_end().to_owned(),
        );
    }
    let ages: Vec<u64> =
        (0..LetterAge::ALL.len()).map(|class| bars.iter().map(|bar| bar.ages[class]).sum()).collect();
    let numbers: Vec<String> = ages.iter().map(ToString::to_string).collect();
    lines.push(row("total", "", &ages.iter().sum::<u64>().to_string(), &numbers));
    lines
}

/// A bar as long as `count` is of `longest`, to an eighth of a column; what is there is seen.
fn drawing(count: u64, longest: u64) -> String {
    const EIGHTHS: [&str; 8] = ["", "▏", "▎", "▍", "▌", "▋", "▊", "▉"];
    let full = u128::from(longest.max(1));
    let eighths = (u128::from(count) * 8 * BAR as u128).div_ceil(full).min(8 * BAR as u128);
    let eighths = usize::try_from(eighths).unwrap_or(8 * BAR);
    format!("{}{}", "█".repeat(eighths / 8), EIGHTHS[eighths % 8])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::organization::OrganizationId;

    fn count(reason: Reason, organization: &str, age: LetterAge, count: u64) -> LetterCount {
        let owner = match organization {
            "" => Owner::Platform,
            "?" => Owner::Unknown,
            text => Owner::Organization(OrganizationId::parse(text).unwrap()),
        };
        LetterCount { reason, owner, age, count }
    }

    fn some() -> Vec<Bar> {
        bars(vec![
            count(Reason::Timeout, "42", LetterAge::Hour, 1),
            count(Reason::Timeout, "42", LetterAge::Older, 2),
            count(Reason::Timeout, "", LetterAge::Day, 1),
            count(Reason::Timeout, "?", LetterAge::Day, 1),
            count(Reason::AuthFailed, &"x".repeat(64), LetterAge::Week, 96),
        ])
    }

    #[test]
    fn the_numbers_add_up_and_the_most_come_first() {
        assert_eq!(
            histogram(&some(), 4, false),
            [
                "REASON               ORGANIZATION            TOTAL      <1h     <1d     <7d    <30d   older",
                "auth_failed          xxxxxxxxxxxxxxxxxxx…       96        0       0      96       0       0",
                "timeout              42                          3        1       0       0       0       2",
                "timeout              (platform)                  1        0       1       0       0       0",
                "timeout              (unknown)                   1        0       1       0       0       0",
                "total                                          101        1       2      96       0       2",
            ]
        );
        let short = histogram(&some(), 1, false);
        assert_eq!(short[2].split_whitespace().collect::<Vec<_>>(), ["(3", "more)", "5"]);
        assert!(short[3].starts_with("total") && short[3].contains("101"), "{short:?}");
    }

    #[test]
    fn a_line_with_its_bar_fits_the_terminal() {
        let drawn = histogram(&some(), 3, true);
        assert!(drawn.iter().all(|line| line.chars().count() <= 110), "{drawn:?}");
        assert!(drawn[1].ends_with(&"█".repeat(BAR)) && drawn[3].ends_with('▎'), "{drawn:?}");
    }

    #[test]
    fn a_bar_is_as_long_as_its_part_and_never_invisible() {
        assert_eq!(drawing(1, 1), "█".repeat(16));
        assert_eq!(drawing(1, 2), "█".repeat(8));
        assert_eq!(drawing(1, 1_000_000), "▏");
        assert_eq!(drawing(0, 0), "");
        assert_eq!(drawing(u64::MAX, u64::MAX), "█".repeat(16));
    }

    #[test]
    fn a_bar_in_json_names_each_age() {
        let platform = json!({
            "reason": "timeout", "organization_id": null, "platform": true, "total": 1,
            "ages": {"hour": 0, "day": 1, "week": 0, "month": 0, "older": 0},
        });
        assert_eq!(some()[2].json(), platform);
        let unknown = some()[3].json();
        assert_eq!((&unknown["organization_id"], &unknown["platform"]), (&json!(null), &json!(false)));
    }
}
