//! What replay and discard share: who asks, of which letters, and that it is on record.
//! Guarantee: neither begins without a condition or --all, nor before its entry in the audit log is written.

use std::io::{IsTerminal, Write};
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use serde_json::{Value, json};

use super::filter::FilterArgs;
use crate::cli::exit::BadArgument;
use crate::cli::{output, user};
use crate::clock::Clock;
use crate::dead_letters::Groups;
use crate::model::failure::Reason;
use crate::model::letter::{LetterFilter, Owner};
use crate::model::organization::OrganizationId;
use crate::shutdown::Shutdown;
use crate::store::{AuditEntry, OpenEntry, Store};

/// For so long the broker or the database may be away before a command ends.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);
/// Longest actor, as in control commands.
const ACTOR_MAX: usize = 128;
/// Heading of the options that are no conditions.
pub(super) const HOW: &str = "How";
/// Columns of the progress bar itself.
const BAR: u64 = 30;

/// Which letters, by whom, and whether in earnest.
#[derive(Debug, Args)]
pub(super) struct GovernedArgs {
    #[command(flatten)]
    pub(super) which: FilterArgs,
    /// Every letter, whatever it is; --limit bounds it
    #[arg(long)]
    all: bool,
    /// Print what would happen and change nothing
    #[arg(long, help_heading = HOW)]
    pub(super) dry_run: bool,
    /// Who does it, for the audit log; the operating system's user unless given
    #[arg(long = "as", help_heading = HOW, value_name = "ACTOR", value_parser = actor)]
    actor: Option<String>,
    /// Print the result as JSON
    #[arg(long, help_heading = HOW)]
    pub(super) json: bool,
}

impl GovernedArgs {
    /// The letters that are meant.
    ///
    /// # Errors
    /// Without a condition and without --all.
    pub(super) fn filter(&self) -> Result<LetterFilter, BadArgument> {
        if self.which.is_empty() && !self.all {
            return Err(BadArgument(
                "which letters? Give at least one of --org, --platform, --reason, --kind, --state, --since, --until, --id; \
                 or --all"
                    .to_owned(),
            ));
        }
        self.which.filter(Clock::system().now())
    }

    /// Who.
    pub(super) fn actor(&self) -> String {
        self.actor.clone().unwrap_or_else(user::name)
    }

    pub(super) fn limit(&self) -> Option<u64> {
        self.which.limit.map(u64::from)
    }
}

fn actor(text: &str) -> Result<String, String> {
    let length = text.chars().count();
    if (1..=ACTOR_MAX).contains(&length) && !text.chars().any(crate::model::text::is_harmful) {
        Ok(text.to_owned())
    } else {
        Err(format!("1 to {ACTOR_MAX} characters, none of which moves the cursor"))
    }
}

/// The entry of a run that has begun.
pub(super) struct OnRecord<'a> {
    store: &'a Store,
    entry: OpenEntry,
}

/// Writes who begins what, with its filter and its other options.
pub(super) async fn begin<'a>(
    store: &'a Store,
    command: &str,
    actor: &str,
    filter: &LetterFilter,
    options: Value,
) -> anyhow::Result<OnRecord<'a>> {
    let only = match filter.organizations.as_slice() {
        [one] => OrganizationId::parse(one).ok(),
        _ => None,
    };
    let entry = AuditEntry {
        actor: Some(actor),
        user_id: None,
        organization: only.as_ref(),
        command,
        outcome: "started",
        fields: &given(filter),
    };
    let summary = json!({ "filter": filter, "options": options });
    let entry = store.begin_audit(entry, summary).await.context("writing the audit log")?;
    Ok(OnRecord { store, entry })
}

fn given(filter: &LetterFilter) -> Vec<&'static str> {
    let conditions = [
        ("organizations", filter.organizations.is_empty()),
        ("reasons", filter.reasons.is_empty()),
        ("kinds", filter.kinds.is_empty()),
        ("states", filter.states.is_empty()),
        ("since", filter.since.is_none()),
        ("until", filter.until.is_none()),
        ("ids", filter.ids.is_empty()),
    ];
    conditions.into_iter().filter(|(_, is_absent)| !is_absent).map(|(name, _)| name).collect()
}

impl OnRecord<'_> {
    /// Adds how it ended. The beginning is on record whether or not this can be written.
    pub(super) async fn finish(self, outcome: &str, counts: &Value) {
        let summary = json!({ "result": counts });
        if let Err(error) = self.store.finish_audit(self.entry, outcome, summary).await {
            tracing::warn!(%error, "the audit log has the beginning of this run, but not its end");
        }
    }
}

/// Listens for Ctrl-C: the first ends the run after what it has in hand, a second one at once.
pub(super) fn interruptible() -> anyhow::Result<Shutdown> {
    let shutdown = Shutdown::new();
    shutdown.listen(PATIENCE).context("listening for signals")?;
    let asked = shutdown.clone();
    tokio::spawn(async move {
        asked.stop_taking().await;
        say("Stopping after what is in hand. Once more: at once.");
    });
    Ok(shutdown)
}

/// A line on standard error, if anybody is there to read it.
pub(super) fn say(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// How far a run has come, on a terminal.
pub(super) struct Progress {
    total: Option<u64>,
}

impl Progress {
    /// Shows nothing where standard error is no terminal, or how much there is to do is not known.
    pub(super) fn of(total: u64) -> Self {
        Self { total: Some(total).filter(|total| *total > 0 && std::io::stderr().is_terminal()) }
    }

    /// Draws it over what was drawn before.
    pub(super) fn show(&self, done: u64) {
        if let Some(total) = self.total {
            let _ = write!(std::io::stderr(), "\r{}", bar(done, total));
        }
    }

    /// Leaves the line.
    pub(super) fn end(&self) {
        if self.total.is_some() {
            say("");
        }
    }
}

fn bar(done: u64, total: u64) -> String {
    let done = done.min(total);
    let full = usize::try_from(done * BAR / total).unwrap_or_default();
    let rest = BAR as usize - full;
    format!("[{}{}] {done} of {total}", "#".repeat(full), ".".repeat(rest))
}

/// What is said of a run that was ended, and can be given again.
pub(super) const GOES_ON: &str = "ended before its end; the same command goes on from here";

/// A line of the reconciliation.
pub(super) fn count(number: u64, name: &str) -> String {
    format!("{number:>11}  {name}")
}

/// The groups as lines, the largest first.
pub(super) fn histogram(groups: &Groups) -> Vec<String> {
    let mut groups: Vec<_> = groups.iter().collect();
    groups.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
    let line = |((reason, owner), count): &(&(Reason, Owner), &u64)| {
        format!("  {count:>9}  {:<20} {owner}", reason.as_str())
    };
    groups.iter().map(line).collect()
}

/// The same as JSON.
pub(super) fn groups_json(groups: &Groups) -> Value {
    groups
        .iter()
        .map(|((reason, owner), count)| {
            let platform = *owner == Owner::Platform;
            json!({ "reason": reason, "organization_id": owner.organization(), "platform": platform, "count": count })
        })
        .collect()
}

/// Prints lines.
pub(super) fn print(lines: &[String]) -> std::io::Result<()> {
    lines.iter().try_for_each(|line| output::line(line))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bar_is_full_at_the_end_and_never_beyond() {
        assert_eq!(bar(0, 3), format!("[{}] 0 of 3", ".".repeat(30)));
        assert_eq!(bar(1, 3), format!("[{}{}] 1 of 3", "#".repeat(10), ".".repeat(20)));
        assert_eq!(bar(5, 3), format!("[{}] 3 of 3", "#".repeat(30)));
    }

    #[test]
    fn an_actor_is_a_name_that_a_terminal_can_show() {
        assert_eq!(actor("user:7"), Ok("user:7".to_owned()));
        for bad in ["", "a\u{1b}[2J", &"x".repeat(129)] {
            assert!(actor(bad).is_err(), "{bad:?}");
        }
    }
}
