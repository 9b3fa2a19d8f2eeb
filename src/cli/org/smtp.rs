//! `sendoff org smtp`: an organization's own server.
//! Guarantee: what is shown is the worker's answer, which holds neither user name nor password.

use std::io::IsTerminal;

use clap::{Args, Subcommand};
use secrecy::{ExposeSecret, SecretString};
use serde_json::{Map, Value, json};

use crate::cli::exit::Done;
use crate::cli::output;
use crate::cli::password::{self, PasswordArgs};
use crate::model::organization::OrganizationId;
use crate::settings::Settings;

#[derive(Debug, Subcommand)]
#[command(
    after_help = "Examples:\n  sendoff org smtp show 42\n  sendoff org smtp create 42 --host smtp.example.org --port 587 \
    --username mailer --from-email bookings@example.org --from-name Bookings --password-file secret.txt"
)]
pub(in crate::cli) enum SmtpCommand {
    /// Print the configuration, without user name and password
    Show(OneArgs),
    /// Store a configuration
    Create(CreateArgs),
    /// Change parts of the configuration
    Update(UpdateArgs),
    /// Delete the configuration; mail goes through the platform's server again
    Delete(DeleteArgs),
}

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  sendoff org smtp show 42 --json")]
pub(in crate::cli) struct OneArgs {
    /// The organization
    #[arg(value_parser = OrganizationId::parse)]
    org: OrganizationId,
    /// Print it as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  sendoff org smtp delete 42")]
pub(in crate::cli) struct DeleteArgs {
    #[command(flatten)]
    one: OneArgs,
}

#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  sendoff org smtp create 42 --host smtp.example.org --port 587 --username mailer \
    --from-email bookings@example.org --from-name Bookings\n\nThe password comes from --password-file or from \
    standard input; a terminal is asked for it."
)]
pub(in crate::cli) struct CreateArgs {
    #[command(flatten)]
    one: OneArgs,
    /// The server's name
    #[arg(long)]
    host: String,
    /// The server's port
    #[arg(long)]
    port: u16,
    /// The account's user name
    #[arg(long)]
    username: String,
    #[command(flatten)]
    password: PasswordArgs,
    /// The sender's address
    #[arg(long, value_name = "ADDRESS")]
    from_email: String,
    /// The sender's name
    #[arg(long, value_name = "NAME")]
    from_name: String,
    /// Whether the server must offer TLS
    #[arg(long, value_name = "BOOL", default_value_t = true, action = clap::ArgAction::Set)]
    secure: bool,
}

#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  sendoff org smtp update 42 --from-name 'Bookings & more'\n\nChanging the host, or turning \
    --secure off, takes the password again: on a terminal it is asked for."
)]
pub(in crate::cli) struct UpdateArgs {
    #[command(flatten)]
    one: OneArgs,
    /// The server's name
    #[arg(long)]
    host: Option<String>,
    /// The server's port
    #[arg(long)]
    port: Option<u16>,
    /// The account's user name
    #[arg(long)]
    username: Option<String>,
    #[command(flatten)]
    password: PasswordArgs,
    /// Ask the terminal for a new password
    #[arg(long, conflicts_with_all = ["password_file", "password_stdin"])]
    ask_password: bool,
    /// The sender's address
    #[arg(long, value_name = "ADDRESS")]
    from_email: Option<String>,
    /// The sender's name
    #[arg(long, value_name = "NAME")]
    from_name: Option<String>,
    /// Whether the server must offer TLS
    #[arg(long, value_name = "BOOL", action = clap::ArgAction::Set)]
    secure: Option<bool>,
    /// Change nothing unless this is the current version
    #[arg(long, value_name = "VERSION")]
    if_version: Option<i64>,
}

pub(super) async fn run(command: &SmtpCommand, settings: &Settings) -> anyhow::Result<Done> {
    let (one, name, params) = match command {
        SmtpCommand::Show(one) => (one, "smtp_config.get", Map::new()),
        SmtpCommand::Create(args) => (&args.one, "smtp_config.create", create_params(args)?),
        SmtpCommand::Update(args) => (&args.one, "smtp_config.update", update_params(args)?),
        SmtpCommand::Delete(args) => (&args.one, "smtp_config.delete", Map::new()),
    };
    let result = super::call(settings, name, &one.org, params).await?;
    if one.json {
        output::json(&result)?;
    } else if let SmtpCommand::Delete(_) = command {
        output::line(&format!("Deleted the SMTP configuration of organization {}.", one.org))?;
    } else {
        words(&result).iter().try_for_each(|line| output::line(line))?;
    }
    Ok(Done::Well)
}

fn create_params(args: &CreateArgs) -> anyhow::Result<Map<String, Value>> {
    let password = args.password.required()?;
    Ok(given([
        ("host", Some(json!(args.host))),
        ("port", Some(json!(args.port))),
        ("username", Some(json!(args.username))),
        ("password", Some(json!(password.expose_secret()))),
        ("from_email", Some(json!(args.from_email))),
        ("from_name", Some(json!(args.from_name))),
        ("secure", Some(json!(args.secure))),
    ]))
}

fn update_params(args: &UpdateArgs) -> anyhow::Result<Map<String, Value>> {
    let password = updated_password(args)?;
    Ok(given([
        ("host", args.host.as_ref().map(|host| json!(host))),
        ("port", args.port.map(|port| json!(port))),
        ("username", args.username.as_ref().map(|name| json!(name))),
        ("password", password.map(|password| json!(password.expose_secret()))),
        ("from_email", args.from_email.as_ref().map(|email| json!(email))),
        ("from_name", args.from_name.as_ref().map(|name| json!(name))),
        ("secure", args.secure.map(|secure| json!(secure))),
        ("if_version", args.if_version.map(|version| json!(version))),
    ]))
}

/// The password, where one is given, asked for, or needed and a person can be asked.
fn updated_password(args: &UpdateArgs) -> anyhow::Result<Option<SecretString>> {
    let needed = args.host.is_some() || args.secure == Some(false);
    match args.password.given()? {
        None if args.ask_password || (needed && std::io::stdin().is_terminal()) => password::ask().map(Some),
        given => Ok(given),
    }
}

fn given<const N: usize>(fields: [(&str, Option<Value>); N]) -> Map<String, Value> {
    fields.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?))).collect()
}

fn words(config: &Value) -> Vec<String> {
    let shown = |value: &Value| match value {
        Value::Null => "-".to_owned(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    let fields = [
        "organization_id",
        "version",
        "from_email",
        "from_name",
        "host",
        "port",
        "secure",
        "status",
        "created_at",
        "updated_at",
    ];
    let mut lines: Vec<_> = fields
        .into_iter()
        .filter_map(|name| Some(format!("{name:<16} {}", shown(config.get(name)?))))
        .collect();
    let test = &config["last_test"];
    let outcome = match test["ok"].as_bool() {
        None => "never".to_owned(),
        Some(true) => format!("passed at {}", shown(&test["at"])),
        Some(false) => format!("failed at {} ({})", shown(&test["at"]), shown(&test["code"])),
    };
    lines.push(format!("{:<16} {outcome}", "last_test"));
    lines
}
