//! `sendoff org`: the control commands about one organization, over the broker.
//! Guarantee: the worker decides and answers; nothing here reads the database, and nothing shows a credential.

mod feature;
mod smtp;

use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use clap::Subcommand;
use serde_json::{Map, Value, json};

use super::exit::Done;
use super::user;
use crate::broker;
use crate::model::organization::OrganizationId;
use crate::parts;
use crate::settings::Settings;

/// Replies come within 10 s (contract section 4); the rest is the way there and back.
const REPLY_WITHIN: Duration = Duration::from_secs(15);

#[derive(Debug, Subcommand)]
#[command(
    after_help = "Examples:\n  sendoff org feature 42 custom-smtp-for-orgs on\n  sendoff org smtp show 42"
)]
pub(super) enum OrgCommand {
    /// An organization's own SMTP server
    #[command(subcommand)]
    Smtp(smtp::SmtpCommand),
    /// Switch a feature on or off for an organization
    Feature(feature::FeatureArgs),
}

pub(super) async fn run(command: &OrgCommand, settings: &Settings) -> anyhow::Result<Done> {
    match command {
        OrgCommand::Smtp(command) => smtp::run(command, settings).await,
        OrgCommand::Feature(args) => feature::run(args, settings).await,
    }
}

/// Sends one command and gives its result.
///
/// # Errors
/// When there is no reply, or the reply is an error: its message, the field at fault, and the hint.
async fn call(
    settings: &Settings,
    command: &str,
    org: &OrganizationId,
    params: Map<String, Value>,
) -> anyhow::Result<Value> {
    let access = parts::access(settings)?;
    let request = json!({
        "command": command, "organization_id": org, "actor": actor(), "params": params,
    });
    let request = serde_json::to_vec(&request)?;
    let reply = broker::call(&access, &settings.amqp.prefix, &request, REPLY_WITHIN).await?;
    let mut reply: Value = serde_json::from_slice(&reply).context("the worker's reply is not JSON")?;
    if reply["ok"] == true {
        return Ok(reply["result"].take());
    }
    let error = &reply["error"];
    let code =
        error["code"].as_str().ok_or_else(|| anyhow!("the worker's reply is no answer to a command"))?;
    let message = error["message"].as_str().unwrap_or_default();
    let field = error["field"].as_str().map(|field| format!(", field {field}")).unwrap_or_default();
    let hint = error["hint"].as_str().map(|hint| format!(" {hint}")).unwrap_or_default();
    bail!("{message} ({code}{field}){hint}")
}

/// Who asks, for the audit log: the account that runs the program.
fn actor() -> String {
    format!("cli:{}", user::name())
}
