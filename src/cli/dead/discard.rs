//! `sendoff dead discard`: dead letters given up.
//! Guarantee: only dead letters are given up; their rows and their content stay until their retention ends.

use anyhow::Context;
use clap::Args;
use serde_json::{Value, json};

use super::governed::{self, GovernedArgs, PATIENCE, say};
use crate::cli::exit::{BadArgument, Done};
use crate::cli::output;
use crate::dead_letters::discard::{Discarded, Halt, Waste, discard};
use crate::model::letter::LetterState;
use crate::parts;
use crate::settings::Settings;

#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  sendoff dead discard --reason malformed --until 7d --dry-run\n  sendoff dead discard --id \
    0198c0de-0000-7000-8000-000000000001 --as ann\n\nA letter that was given up stays in the archive until its retention \
    ends, and is replayed only with --state discarded. Exit code 1 when the run was ended before its end."
)]
pub(in crate::cli) struct DiscardArgs {
    #[command(flatten)]
    governed: GovernedArgs,
}

pub(in crate::cli) async fn run(args: &DiscardArgs, settings: &Settings) -> anyhow::Result<Done> {
    let args = &args.governed;
    let filter = args.filter()?;
    if filter.states.iter().any(|state| *state != LetterState::Dead) {
        return Err(BadArgument("--state: only `dead` letters can be discarded".to_owned()).into());
    }
    let store = parts::store(settings, parts::COMMAND_CONNECTIONS)?;
    let shutdown = governed::interruptible()?;
    let actor = Some(args.actor()).filter(|_| !args.dry_run);
    let waste = Waste { filter, limit: args.limit(), actor };
    let record = match &waste.actor {
        None => None,
        Some(actor) => {
            let options = json!({ "limit": waste.limit });
            Some(governed::begin(&store, "dead.discard", actor, &waste.filter, options).await?)
        }
    };
    let (tally, ended) = discard(&store, &shutdown, PATIENCE, &waste).await;
    let outcome = match ended {
        Ok(()) => "ok",
        Err(Halt::Interrupted) => "interrupted",
        Err(Halt::Database(_)) => "unavailable",
    };
    let result = result(&tally, outcome, args.dry_run);
    if let Some(record) = record {
        record.finish(outcome, &result).await;
    }
    if args.json {
        output::json(&result)?;
    } else if tally.selected == 0 && ended.is_ok() {
        output::line("No dead letter matches.")?;
    } else {
        governed::print(&words(&tally, args.dry_run))?;
    }
    match ended {
        Ok(()) => Ok(Done::Well),
        Err(Halt::Interrupted) => {
            say("Ended before its end; the same command goes on from here.");
            Ok(Done::Badly)
        }
        Err(Halt::Database(error)) => Err(error).context("ended before its end"),
    }
}

fn result(tally: &Discarded, ended: &str, dry_run: bool) -> Value {
    json!({
        "dry_run": dry_run, "ended": ended, "selected": tally.selected, "discarded": tally.discarded,
        "changed_meanwhile": tally.changed, "groups": governed::groups_json(&tally.groups),
    })
}

fn words(tally: &Discarded, dry_run: bool) -> Vec<String> {
    let count = |number: u64, name: &str| format!("{number:>11}  {name}");
    let discarded = if dry_run { "would be discarded:" } else { "discarded:" };
    let mut lines = vec![count(tally.selected, "selected"), count(tally.discarded, discarded)];
    lines.extend(governed::histogram(&tally.groups).iter().map(|line| format!("  {line}")));
    if tally.changed > 0 {
        lines.push(count(tally.changed, "left out: taken up by somebody else meanwhile"));
    }
    lines
}
