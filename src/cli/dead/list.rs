//! `sendoff dead list`: dead letters page by page, the one that died last first.
//! Guarantee: a page begins where the one before ended, whatever was archived meanwhile; a line fits 110 columns.

use std::collections::HashMap;

use anyhow::Context;
use clap::Args;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use uuid::Uuid;

use super::filter::FilterArgs;
use super::{view, words};
use crate::cli::exit::Done;
use crate::cli::{output, story};
use crate::clock::Clock;
use crate::model::letter::{Letter, LetterDeed, LetterId, Place};
use crate::parts;
use crate::settings::Settings;
use crate::store::{Store, StoreError};

/// Letters of a page unless --limit says otherwise.
const PAGE: u32 = 50;
/// Letters asked for at once.
const SLICE: u32 = 1000;
/// Columns of a line.
const WIDTH: usize = 110;
/// Between two columns.
const GAP: usize = 2;
/// Organization and kind are cut to fit, but not below this.
const NARROWEST: usize = 8;

#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  sendoff dead list --org 42 --reason message_refused,too_large --since 7d\n  \
    sendoff dead list --json --limit 1000 | jq -r '.[].id'\n\nThe last line tells how to get the next page. With --json, \
    --after takes DIED_AT_LETTER of the last one: jq -r '.[-1] | .died_at + \"_\" + .letter'"
)]
pub(in crate::cli) struct ListArgs {
    /// Go on behind this letter: what the last line of the page before says
    #[arg(long, value_name = "DIED_AT_LETTER", value_parser = cursor)]
    after: Option<Place>,
    /// Print an array of {"id","organization_id","platform","state","reason","detail","attempts","died_at",...}
    #[arg(long)]
    json: bool,
    // Last, for what follows would stand under its heading.
    #[command(flatten)]
    which: FilterArgs,
}

pub(super) async fn run(args: &ListArgs, settings: &Settings) -> anyhow::Result<Done> {
    let now = Clock::system().now();
    let filter = args.which.filter(now)?;
    let store = parts::store(settings, parts::COMMAND_CONNECTIONS)?;
    let limit = args.which.limit.unwrap_or(PAGE);
    // One more than is shown tells whether there is a next page.
    let wanted = limit as usize + 1;
    let (mut letters, mut after) = (Vec::new(), args.after);
    while letters.len() < wanted {
        let slice = u32::try_from(wanted - letters.len()).map_or(SLICE, |rest| rest.min(SLICE));
        let page = store.letters(&filter, after, slice).await.context("asking the archive")?;
        let is_last = page.len() < slice as usize;
        letters.extend(page);
        after = letters.last().map(Letter::place);
        if is_last {
            break;
        }
    }
    let is_more = letters.len() == wanted;
    letters.truncate(limit as usize);
    if args.json {
        let histories = histories(&store, &letters).await.context("asking the ledger")?;
        let views: Vec<_> =
            letters.iter().zip(&histories).map(|(letter, history)| view::letter(letter, history)).collect();
        output::json(&views)?;
        return Ok(Done::Well);
    }
    for line in table(&letters, now) {
        output::line(&line)?;
    }
    match letters.last() {
        None => output::line(args.which.nothing())?,
        Some(last) if is_more => output::line(&format!(
            "{} shown, there are more. The next page: the same with --after {}",
            letters.len(),
            spelled(last.place())
        ))?,
        Some(_) => {}
    }
    Ok(Done::Well)
}

/// What was done with each, and what came of it.
async fn histories(store: &Store, letters: &[Letter]) -> Result<Vec<Vec<LetterDeed>>, StoreError> {
    let open: Vec<_> = letters
        .iter()
        .filter(|letter| words::is_open(letter))
        .filter_map(|letter| letter.key.as_ref())
        .collect();
    let mut outcomes = HashMap::new();
    for keys in open.chunks(SLICE as usize) {
        let found = store.job_outcomes(keys).await?;
        outcomes.extend(found.into_iter().map(|outcome| (outcome.key.clone(), outcome)));
    }
    let of = |letter: &Letter| letter.key.as_ref().and_then(|key| outcomes.get(key));
    Ok(letters.iter().map(|letter| words::history(letter, of(letter))).collect())
}

fn spelled((died_at, letter): Place) -> String {
    let died_at = died_at.format(&Rfc3339).unwrap_or_else(|_| died_at.to_string());
    format!("{died_at}_{letter}")
}

fn cursor(text: &str) -> Result<Place, String> {
    let read = || {
        let (died_at, letter) = text.rsplit_once('_')?;
        let died_at = OffsetDateTime::parse(died_at, &Rfc3339).ok()?;
        Some((died_at, LetterId(Uuid::parse_str(letter).ok()?)))
    };
    read().ok_or_else(|| {
        "allowed: a time as RFC 3339, `_` and a letter's id, as the last line of a page gives them".to_owned()
    })
}

fn table(letters: &[Letter], now: OffsetDateTime) -> Vec<String> {
    if letters.is_empty() {
        return Vec::new();
    }
    let heads = ["AGE", "ORG", "KIND", "REASON", "ATTEMPTS", "STATE", "ID"].map(str::to_owned);
    let mut rows = vec![heads];
    rows.extend(letters.iter().map(|letter| {
        [
            story::age(letter.died_at, now),
            letter.owner().to_string(),
            letter.kind.as_deref().map_or_else(|| "-".to_owned(), story::masked),
            letter.reason.to_string(),
            letter.attempts.to_string(),
            letter.state.as_str().to_owned(),
            letter.id().to_string(),
        ]
    }));
    let mut widths = [0_usize; 7];
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let others = widths.iter().sum::<usize>() - widths[1] - widths[2] + 6 * GAP;
    (widths[1], widths[2]) = share(widths[1], widths[2], WIDTH.saturating_sub(others));
    rows.iter().map(|row| line(row, &widths)).collect()
}

/// What two columns get of the room there is: what they need, or else what the other leaves, or half.
fn share(first: usize, second: usize, room: usize) -> (usize, usize) {
    if first + second <= room {
        return (first, second);
    }
    let room = room.max(2 * NARROWEST);
    let first = first.min((room / 2).max(room.saturating_sub(second)));
    (first, second.min(room - first))
}

fn line(row: &[String; 7], widths: &[usize; 7]) -> String {
    let mut line = String::with_capacity(WIDTH);
    for (at, (cell, width)) in row.iter().zip(widths).enumerate() {
        let cell = cut(cell, *width);
        let pad = " ".repeat(width - cell.chars().count());
        // Numbers are compared from the right.
        match at {
            0 | 4 => line.extend([&pad, &*cell, "  "]),
            6 => line.push_str(&cell),
            _ => line.extend([&*cell, &pad, "  "]),
        }
    }
    line
}

/// A cell of at most `width` characters.
pub(super) fn cut(cell: &str, width: usize) -> String {
    if cell.chars().count() <= width {
        return cell.to_owned();
    }
    cell.chars().take(width.saturating_sub(1)).chain(['…']).collect()
}

#[cfg(test)]
mod tests {
    use time::macros::datetime;

    use super::*;

    #[test]
    fn a_place_in_the_listing_is_read_back_as_it_was_told() {
        let place = (datetime!(2030-01-07 09:00:00.123456 UTC), LetterId(Uuid::from_u128(7)));
        assert_eq!(cursor(&spelled(place)), Ok(place));
        for bad in [
            "",
            "_",
            "2030-01-07T09:00:00Z",
            "2030-01-07T09:00:00Z_7",
            "7_00000000-0000-0000-0000-000000000007",
        ] {
            assert!(cursor(bad).unwrap_err().contains("RFC 3339"), "{bad}");
        }
    }

    #[test]
    fn two_columns_share_the_room() {
        for ((first, second, room), shared) in [
            ((5, 5, 20), (5, 5)),
            ((64, 64, 24), (12, 12)),
            ((64, 5, 24), (19, 5)),
            ((5, 64, 24), (5, 19)),
            ((64, 64, 0), (8, 8)),
        ] {
            assert_eq!(share(first, second, room), shared, "{first} {second} {room}");
        }
        assert_eq!(cut("abcdef", 4), "abc…");
        assert_eq!(cut("abcd", 4), "abcd");
    }
}
