//! `sendoff org feature`: one organization's switches.
//! Guarantee: what is printed is what the worker says is stored now.

use clap::{Args, ValueEnum};
use serde_json::{Map, json};

use crate::cli::exit::Done;
use crate::cli::output;
use crate::model::organization::OrganizationId;
use crate::settings::Settings;

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  sendoff org feature 42 custom-smtp-for-orgs on")]
pub(in crate::cli) struct FeatureArgs {
    /// The organization
    #[arg(value_parser = OrganizationId::parse)]
    org: OrganizationId,
    /// The feature
    #[arg(value_enum)]
    feature: Feature,
    /// Whether the organization has it
    #[arg(value_enum)]
    state: Switch,
    /// Print {"enabled"}
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Feature {
    CustomSmtpForOrgs,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Switch {
    On,
    Off,
}

pub(super) async fn run(args: &FeatureArgs, settings: &Settings) -> anyhow::Result<Done> {
    let Feature::CustomSmtpForOrgs = args.feature;
    let feature = "custom-smtp-for-orgs";
    let params = Map::from_iter([
        ("feature".to_owned(), json!(feature)),
        ("enabled".to_owned(), json!(args.state == Switch::On)),
    ]);
    let result = super::call(settings, "feature.set", &args.org, params, super::REPLY_WITHIN).await?;
    if args.json {
        output::json(&result)?;
    } else {
        let state = if result["enabled"] == true { "on" } else { "off" };
        output::line(&format!("{feature} is {state} for organization {}.", args.org))?;
    }
    Ok(Done::Well)
}
