//! `sendoff org`: the control commands about one organization, over the broker.
//! Guarantee: the worker decides and answers; nothing here reads the database, and nothing shows a credential.

mod feature;
mod smtp;

use std::fmt;
use std::time::Duration;

use anyhow::{Context, anyhow};
use clap::Subcommand;
use serde_json::{Map, Value, json};

use super::exit::Done;
use super::output::harmless;
use super::user;
use crate::broker;
use crate::clock::Clock;
use crate::model::organization::OrganizationId;
use crate::parts;
use crate::settings::Settings;

/// Replies come within 10 s (contract section 4); the rest is the way there and back.
const REPLY_WITHIN: Duration = Duration::from_secs(15);

#[derive(Debug, Subcommand)]
#[command(
    after_help = "Examples:\n  sendoff org feature 42 custom-smtp-for-orgs on\n  sendoff org smtp show 42\n  \
    sendoff org smtp test 42"
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

/// A command that the worker answered with an error.
#[derive(Debug, thiserror::Error)]
pub(super) struct Refused {
    code: String,
    message: String,
    field: Option<String>,
    hint: Option<String>,
}

impl Refused {
    /// Whether the worker could not reach what it needs; what is asked for too often has another code.
    pub(super) fn is_unavailable(&self) -> bool {
        self.code == "unavailable"
    }
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({}", self.message.trim_end_matches('.'), self.code)?;
        if let Some(field) = &self.field {
            write!(f, ", field {field}")?;
        }
        f.write_str(")")?;
        self.hint.as_ref().map_or(Ok(()), |hint| write!(f, ". {hint}"))
    }
}

/// Sends one command and gives its result; the reply is waited for as long as `within`.
///
/// # Errors
/// When there is no reply, or the reply is an error: then [`Refused`].
async fn call(
    settings: &Settings,
    command: &str,
    org: &OrganizationId,
    params: Map<String, Value>,
    within: Duration,
) -> anyhow::Result<Value> {
    let access = parts::access(settings)?;
    let request = json!({
        "command": command, "organization_id": org, "actor": actor(), "params": params,
    });
    let request = serde_json::to_vec(&request)?;
    let reply = broker::call(&access, &settings.amqp.prefix, &request, Clock::system().now(), within).await?;
    let mut reply: Value = serde_json::from_slice(&reply).context("the worker's reply is not JSON")?;
    if reply["ok"] == true {
        return Ok(reply["result"].take());
    }
    let text = |name: &str| reply["error"][name].as_str().map(harmless);
    let code = text("code").ok_or_else(|| anyhow!("the worker's reply is no answer to a command"))?;
    let (message, field, hint) = (text("message").unwrap_or_default(), text("field"), text("hint"));
    Err(Refused { code, message, field, hint }.into())
}

/// Who asks, for the audit log: the account that runs the program.
fn actor() -> String {
    format!("cli:{}", user::name())
}
