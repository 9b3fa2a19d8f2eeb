//! `sendoff migrate`: the database's schema, brought up to date.
//! Guarantee: run twice, or by several at once, it does what one run does.

use anyhow::{Context, bail};
use clap::Args;

use super::exit::Done;
use super::output;
use crate::parts;
use crate::settings::Settings;
use crate::store::SchemaState;

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  DATABASE_URL=postgres://sendoff@db/sendoff sendoff migrate")]
pub(super) struct MigrateArgs {
    /// Print {"applied"} with the number of migrations that were missing
    #[arg(long)]
    json: bool,
}

pub(super) async fn run(args: &MigrateArgs, settings: &Settings) -> anyhow::Result<Done> {
    let store = parts::store(settings, parts::COMMAND_CONNECTIONS)?;
    let missing = match store.schema_state().await.context("looking at the schema")? {
        SchemaState::Current => 0,
        SchemaState::Behind(missing) => missing,
        SchemaState::Ahead => bail!(
            "the schema is newer than this program; run the newer `sendoff`, or restore the database as it was before"
        ),
    };
    store.migrate().await.context("migrating")?;
    if args.json {
        output::json(&serde_json::json!({ "applied": missing }))?;
    } else if missing == 0 {
        output::line("The schema is up to date.")?;
    } else {
        output::line(&format!("Applied {missing} migration{}.", if missing == 1 { "" } else { "s" }))?;
    }
    Ok(Done::Well)
}
