//! `sendoff org smtp test` and `send-test`: does the server work, and does a mail leave through it?
//! Guarantee: a test that failed is exit code 1, in words and in JSON alike.

use std::time::Duration;

use anyhow::anyhow;
use clap::Args;
use serde_json::json;

use super::OneArgs;
use super::fields::{self, FieldArgs};
use super::report::{self, Marks};
use crate::cli::exit::Done;
use crate::cli::story::masked;
use crate::cli::{org, output};
use crate::model::address::EmailAddress;
use crate::settings::Settings;

/// A test's reply comes within 20 s (contract section 4); the rest is the way there and back.
const TEST_REPLY_WITHIN: Duration = Duration::from_secs(30);
/// A test email's reply comes within 60 s.
const EMAIL_REPLY_WITHIN: Duration = Duration::from_secs(70);

#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  sendoff org smtp test 42\n  sendoff org smtp test 42 --port 465\n\nWithout fields the stored \
    configuration is tested. Fields are laid over the stored ones and are not stored; where nothing is stored, all of \
    them are needed, but for --secure. Another host, or --secure false, takes the password again: on a terminal it is \
    asked for. Exit code 1 when the test fails."
)]
pub(in crate::cli) struct TestArgs {
    #[command(flatten)]
    one: OneArgs,
    #[command(flatten)]
    fields: FieldArgs,
}

#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  sendoff org smtp send-test 42 --to ann@example.org\n\nThe mail leaves at once through the stored \
    configuration. Exit code 1 when the server did not take it."
)]
pub(in crate::cli) struct SendTestArgs {
    #[command(flatten)]
    one: OneArgs,
    /// The recipient
    #[arg(long, value_name = "ADDRESS", value_parser = EmailAddress::parse)]
    to: EmailAddress,
}

/// Asks for a connection test, and prints its report.
pub(super) async fn test(args: &TestArgs, settings: &Settings) -> anyhow::Result<Done> {
    let params = args.fields.given()?;
    let asked = org::call(settings, "smtp_config.test", &args.one.org, params, TEST_REPLY_WITHIN);
    let result = asked.await.map_err(fields::say_how)?;
    let lines = report::lines(&result, Marks::new(output::is_terminal()))
        .ok_or_else(|| anyhow!("the worker's reply is no report of a test"))?;
    if args.one.json {
        output::json(&result)?;
    } else {
        lines.iter().try_for_each(|line| output::line(line))?;
    }
    Ok(if result["ok"] == true { Done::Well } else { Done::Badly })
}

/// Asks for a test email, and prints what the server said to it.
pub(super) async fn send(args: &SendTestArgs, settings: &Settings) -> anyhow::Result<Done> {
    let params = fields::given([("to", Some(json!(args.to.as_str())))]);
    let command = "smtp_config.send_test_email";
    let result = org::call(settings, command, &args.one.org, params, EMAIL_REPLY_WITHIN).await?;
    if args.one.json {
        output::json(&result)?;
        return Ok(Done::Well);
    }
    let text = |name: &str| result[name].as_str().map(masked).unwrap_or_default();
    let taken = format!("The server took the test email for {}: {}", args.to.as_str(), text("response"));
    report::wrapped("", &taken).iter().try_for_each(|line| output::line(line))?;
    // Whole, for it is what the receiving side is asked about.
    let message_id = result["message_id"].as_str().map(output::harmless).unwrap_or_default();
    output::line(&format!("Its Message-ID is {message_id}"))?;
    Ok(Done::Well)
}
