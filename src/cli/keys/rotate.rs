//! `sendoff keys rotate`: everything sealed anew under the first key.
//! Guarantee: it can be ended at any point, by Ctrl-C, a crash or a lost database, and given again; workers go on meanwhile.

use anyhow::Context;
use clap::Args;
use serde_json::{Value, json};

use super::status::rows_json;
use crate::cli::exit::Done;
use crate::cli::output;
use crate::cli::run::{self, GOES_ON, PATIENCE, Progress, count, say};
use crate::parts;
use crate::rotation::{self, Counts, Ended, Rotation, Tally};
use crate::settings::Settings;
use crate::store::{AuditEntry, KeyUsage, Resealer, SealedTable, StoreError, Unsealed};

#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  sendoff keys rotate --dry-run\n  sendoff keys rotate\n\nSeals user names, passwords and the content of dead \
    letters, so far as they are under another key, anew under the first key of encryption.keys. Workers go on; each of \
    them must have that key already. Nothing else of a configuration changes, its version neither. A run that was ended \
    goes on when it is given again.\n\nExit code 1 when it was ended before its end, a value does not open, or something \
    is still under another key; 3 when the database was away for 60 s."
)]
pub(in crate::cli) struct RotateArgs {
    /// Open and seal everything, and change nothing
    #[arg(long)]
    dry_run: bool,
    /// Who does it, for the audit log; the operating system's user unless given
    #[arg(long = "as", value_name = "ACTOR", value_parser = run::actor)]
    actor: Option<String>,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

pub(in crate::cli) async fn run(args: &RotateArgs, settings: &Settings) -> anyhow::Result<Done> {
    let ring = parts::key_ring(settings)?;
    let key = ring.sealing_id().to_owned();
    let store = parts::store(settings, parts::COMMAND_CONNECTIONS)?;
    let shutdown = run::interruptible()?;
    let resealer = Resealer::new(store.clone(), ring);
    let resealer = if args.dry_run { resealer.dry() } else { resealer };
    let rotation = Rotation { store: store.clone(), resealer, shutdown, patience: PATIENCE };
    let before = rotation.usage().await.context("counting what is sealed")?;
    let progress = Progress::of(before.behind.configurations + before.behind.letters);
    let record = if args.dry_run {
        None
    } else {
        let actor = run::actor_or_user(args.actor.as_deref());
        let entry = AuditEntry {
            actor: Some(&actor),
            user_id: None,
            organization: None,
            command: "keys.rotate",
            outcome: "started",
            fields: &[],
        };
        Some(run::begin(&store, entry, json!({ "options": { "key": key } })).await?)
    };
    let (tally, ended) = rotation.run(|tally| progress.show(tally.done())).await;
    progress.end();
    // Workers with older settings may have sealed something under an older key meanwhile.
    let after = match ended {
        Ended::Done if !args.dry_run => Some(rotation.usage().await),
        _ => None,
    };
    let (ended, after) = match after {
        Some(Err(error)) => (Ended::Database(error), None),
        Some(Ok(after)) => (ended, Some(after)),
        None => (ended, None),
    };
    let result = Outcome { key: &key, tally: &tally, after: after.as_ref(), dry_run: args.dry_run };
    if let Some(record) = record {
        record.finish(name(&ended), &result.counts(&ended)).await;
    }
    result.tell(args.json, ended)
}

fn name(ended: &Ended) -> &'static str {
    match ended {
        Ended::Done => "ok",
        Ended::Interrupted => "interrupted",
        Ended::Database(StoreError::Unavailable(_)) => "unavailable",
        Ended::Database(StoreError::Internal(_)) => "internal",
    }
}

/// What there is to be told of a run.
struct Outcome<'a> {
    key: &'a str,
    tally: &'a Tally,
    after: Option<&'a KeyUsage>,
    dry_run: bool,
}

impl Outcome<'_> {
    /// Without names: an audit log keeps counts.
    fn counts(&self, ended: &Ended) -> Value {
        let left: Vec<Value> = self
            .left()
            .map(|(id, rows)| {
                let mut left = rows_json(rows);
                left["key"] = json!(id);
                left
            })
            .collect();
        json!({
            "dry_run": self.dry_run, "ended": name(ended), "key": self.key,
            "configurations": counts_json(self.tally.configurations), "letters": counts_json(self.tally.letters),
            "left": left,
        })
    }

    /// What a look after the run has found under other keys, by key.
    fn left(&self) -> impl Iterator<Item = (&str, crate::store::SealedRows)> {
        let keys = self.after.into_iter().flat_map(|usage| usage.keys.iter());
        keys.filter(|(id, _)| *id != self.key).map(|(id, rows)| (id.as_str(), *rows))
    }

    fn tell(&self, as_json: bool, ended: Ended) -> anyhow::Result<Done> {
        if as_json {
            let mut result = self.counts(&ended);
            result["unopened"] = self.tally.unsealed.iter().map(unsealed_json).collect();
            result["unopened_unnamed"] = json!(self.tally.unnamed);
            output::json(&result)?;
        } else if self.tally.done() == 0 && matches!(ended, Ended::Done) {
            output::line(&format!("Everything is under `{}` already.", self.key))?;
        } else {
            run::print(&self.words())?;
        }
        match ended {
            Ended::Interrupted => {
                say(&format!("It {GOES_ON}."));
                return Ok(Done::Badly);
            }
            Ended::Database(error) => return Err(anyhow::Error::from(error).context(GOES_ON)),
            Ended::Done => {}
        }
        let is_settled = self.after.is_none_or(|after| rotation::is_settled(after.behind, self.tally));
        if !is_settled {
            say(&format!(
                "Some were sealed under another key meanwhile: restart the workers that do not have `{}` first, then give \
                 the same command again.",
                self.key
            ));
        }
        Ok(if is_settled && self.tally.unopened() == 0 { Done::Well } else { Done::Badly })
    }

    fn words(&self) -> Vec<String> {
        let mut lines = Vec::new();
        let both = [(self.tally.configurations, "configurations"), (self.tally.letters, "letters")];
        for (counts, name) in both {
            lines.push(count(counts.selected, &format!("{name} not under `{}`:", self.key)));
            let resealed = if self.dry_run { "would be sealed anew" } else { "sealed anew" };
            lines.push(format!("  {}", count(counts.resealed, resealed)));
            if counts.changed > 0 {
                lines.push(format!("  {}", count(counts.changed, "changed by somebody else meanwhile")));
            }
            if counts.unopened > 0 {
                lines.push(format!("  {}", count(counts.unopened, "do not open, and stay as they are")));
            }
        }
        for value in &self.tally.unsealed {
            let owner = match value.table {
                SealedTable::Configurations => "organization",
                SealedTable::Letters => "letter",
            };
            lines.push(format!("    {owner} {}, {}: {}", value.id, value.field, value.why));
        }
        if self.tally.unnamed > 0 {
            lines.push(format!("    and {} more values", self.tally.unnamed));
        }
        for (id, rows) in self.left() {
            let (configurations, letters) = (rows.configurations, rows.letters);
            lines.push(format!("Still under `{id}`: {configurations} configurations, {letters} letters"));
        }
        lines
    }
}

fn counts_json(counts: Counts) -> Value {
    json!({
        "selected": counts.selected, "resealed": counts.resealed, "changed_meanwhile": counts.changed,
        "unopened": counts.unopened,
    })
}

fn unsealed_json(value: &Unsealed) -> Value {
    let owner = match value.table {
        SealedTable::Configurations => "organization_id",
        SealedTable::Letters => "letter",
    };
    json!({ owner: value.id, "field": value.field, "why": value.why.to_string() })
}
