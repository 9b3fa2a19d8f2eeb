//! `sendoff org smtp`: an organization's own server.
//! Guarantee: what is shown is the worker's answer, which holds neither user name nor password.

mod fields;
mod report;
mod test;
mod view;

use clap::{Args, Subcommand};
use secrecy::ExposeSecret;
use serde_json::{Map, Value, json};

use super::REPLY_WITHIN;
use crate::cli::exit::{BadArgument, Done};
use crate::cli::output;
use crate::cli::password::PasswordArgs;
use crate::clock::Clock;
use crate::model::organization::OrganizationId;
use crate::settings::Settings;
use fields::{FieldArgs, LimitArgs, given};

#[derive(Debug, Subcommand)]
#[command(
    after_help = "Examples:\n  sendoff org smtp show 42\n  sendoff org smtp create 42 --host smtp.example.org --port 587 \
    --username mailer \\\n      --from-email bookings@example.org --from-name Bookings --password-file secret.txt\n  \
    sendoff org smtp test 42\n  \
    sendoff org smtp send-test 42 --to ann@example.org"
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
    /// Test the connection: address, TLS and password; nothing is sent
    Test(test::TestArgs),
    /// Send one email through the stored configuration
    SendTest(test::SendTestArgs),
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
    after_help = "Example:\n  sendoff org smtp create 42 --host smtp.example.org --port 587 --username mailer \\\n      \
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
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..))]
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
    #[command(flatten)]
    limits: LimitArgs,
}

#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  sendoff org smtp update 42 --from-name 'Bookings & more'\n\nChanging the host, or turning \
    --secure off, takes the password again: on a terminal it is asked for. With --if-version, nothing is changed when \
    somebody else was faster; `sendoff org smtp show` tells the version. Limits that are known of a provider hold by themselves; \
    --max-connections and --messages-per-minute say otherwise, until they are set to `provider`."
)]
pub(in crate::cli) struct UpdateArgs {
    #[command(flatten)]
    one: OneArgs,
    #[command(flatten)]
    fields: FieldArgs,
    #[command(flatten)]
    limits: LimitArgs,
    /// Change nothing unless this is the current version
    #[arg(long, value_name = "VERSION")]
    if_version: Option<i64>,
}

pub(super) async fn run(command: &SmtpCommand, settings: &Settings) -> anyhow::Result<Done> {
    let (one, name, params) = match command {
        SmtpCommand::Test(args) => return test::test(args, settings).await,
        SmtpCommand::SendTest(args) => return test::send(args, settings).await,
        SmtpCommand::Show(one) => (one, "smtp_config.get", Map::new()),
        SmtpCommand::Create(args) => (&args.one, "smtp_config.create", create_params(args)?),
        SmtpCommand::Update(args) => (&args.one, "smtp_config.update", update_params(args)?),
        SmtpCommand::Delete(args) => (&args.one, "smtp_config.delete", Map::new()),
    };
    let asked = super::call(settings, name, &one.org, params, REPLY_WITHIN).await;
    let result = match command {
        SmtpCommand::Update(_) => asked.map_err(fields::say_how)?,
        _ => asked?,
    };
    if one.json {
        output::json(&result)?;
    } else if let SmtpCommand::Delete(_) = command {
        output::line(&format!("Deleted the SMTP configuration of organization {}.", one.org))?;
    } else {
        view::lines(&result, Clock::system().now()).iter().try_for_each(|line| output::line(line))?;
    }
    Ok(Done::Well)
}

fn create_params(args: &CreateArgs) -> anyhow::Result<Map<String, Value>> {
    let password = args.password.required()?;
    let mut params = given([
        ("host", Some(json!(args.host))),
        ("port", Some(json!(args.port))),
        ("username", Some(json!(args.username))),
        ("password", Some(json!(password.expose_secret()))),
        ("from_email", Some(json!(args.from_email))),
        ("from_name", Some(json!(args.from_name))),
        ("secure", Some(json!(args.secure))),
    ]);
    params.extend(args.limits.given());
    Ok(params)
}

fn update_params(args: &UpdateArgs) -> anyhow::Result<Map<String, Value>> {
    let mut params = args.fields.given()?;
    params.extend(args.limits.given());
    if params.is_empty() {
        return Err(
            BadArgument("nothing to update: give the fields to change, say --port 465".to_owned()).into()
        );
    }
    params.extend(given([("if_version", args.if_version.map(|version| json!(version)))]));
    Ok(params)
}
