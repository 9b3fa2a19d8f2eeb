//! `sendoff schema`: what publishers, consumers and settings pages can check their messages against.
//! Guarantee: each document is made from the code that reads or writes the messages, under this installation's settings, and
//! nothing is asked over the network.

mod asyncapi;

use clap::{Args, Subcommand};
use serde_json::Value;

use super::exit::Done;
use super::output;
use crate::broker::wire::{WireLimits, job_schema};
use crate::control::command_schema;
use crate::model::event_schema;
use crate::settings::Settings;

#[derive(Debug, Subcommand)]
#[command(
    after_help = "Examples:\n  sendoff schema job >job.schema.json\n  sendoff schema asyncapi >asyncapi.json\n\nJSON Schema's \
    dialect is 2020-12. Bounds and names are those of this installation's settings."
)]
pub(super) enum SchemaCommand {
    /// A job, as publishers publish it
    Job(JobArgs),
    /// The control commands and their replies
    Command(CommandArgs),
    /// The events
    Event(EventArgs),
    /// Channels, operations and messages as one AsyncAPI 3 document
    Asyncapi(AsyncapiArgs),
}

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  sendoff schema job >job.schema.json")]
pub(super) struct JobArgs {}

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  sendoff schema command | jq '.\"$defs\".\"smtp_config.update\"'")]
pub(super) struct CommandArgs {}

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  sendoff schema event >event.schema.json")]
pub(super) struct EventArgs {}

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  sendoff schema asyncapi >asyncapi.json")]
pub(super) struct AsyncapiArgs {}

/// Prints one document, indented.
pub(super) fn run(command: &SchemaCommand, settings: &Settings) -> anyhow::Result<Done> {
    let document = match command {
        SchemaCommand::Job(JobArgs {}) => job(settings),
        SchemaCommand::Command(CommandArgs {}) => command_schema(),
        SchemaCommand::Event(EventArgs {}) => event_schema::schema(),
        SchemaCommand::Asyncapi(AsyncapiArgs {}) => asyncapi::document(settings),
    };
    output::line(&serde_json::to_string_pretty(&document)?)?;
    Ok(Done::Well)
}

fn job(settings: &Settings) -> Value {
    job_schema(&WireLimits {
        max_recipients: settings.limits.max_recipients,
        max_message_bytes: settings.limits.max_message_bytes,
    })
}
