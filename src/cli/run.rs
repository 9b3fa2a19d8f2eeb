//! What every long run of a command shares: who asks, that it is on record, how far it has come, and that it can be ended.
//! Guarantee: a run does not begin before its entry in the audit log is written.

use std::io::{IsTerminal, Write};
use std::time::Duration;

use anyhow::Context;
use serde_json::{Value, json};

use super::{output, user};
use crate::shutdown::Shutdown;
use crate::store::{AuditEntry, OpenEntry, Store};

/// For so long the broker or the database may be away before a command ends.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);
/// Longest actor, as in control commands.
const ACTOR_MAX: usize = 128;
/// Columns of the progress bar itself.
const BAR: u64 = 30;

/// An actor as an argument.
pub(super) fn actor(text: &str) -> Result<String, String> {
    let length = text.chars().count();
    if (1..=ACTOR_MAX).contains(&length) && !text.chars().any(crate::model::text::is_harmful) {
        Ok(text.to_owned())
    } else {
        Err(format!("1 to {ACTOR_MAX} characters, none of which moves the cursor"))
    }
}

/// Who was named, or else the operating system's user.
pub(super) fn actor_or_user(actor: Option<&str>) -> String {
    actor.map_or_else(user::name, str::to_owned)
}

/// The entry of a run that has begun.
pub(super) struct OnRecord<'a> {
    store: &'a Store,
    entry: OpenEntry,
}

/// Writes who begins what; `summary` are its options.
pub(super) async fn begin<'a>(
    store: &'a Store,
    entry: AuditEntry<'_>,
    summary: Value,
) -> anyhow::Result<OnRecord<'a>> {
    let entry = store.begin_audit(entry, summary).await.context("writing the audit log")?;
    Ok(OnRecord { store, entry })
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
