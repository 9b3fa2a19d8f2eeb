//! The configuration's fields as arguments that may each be left out, for `update` and `test`.
//! Guarantee: only what was given is sent, and the password comes from where no other process can see it.

use std::io::IsTerminal;
use std::ops::RangeInclusive;

use clap::Args;
use secrecy::{ExposeSecret, SecretString};
use serde_json::{Map, Value, json};

use crate::cli::org::Refused;
use crate::cli::password::{self, PasswordArgs};
use crate::model::provider::{CONNECTIONS_RANGE, PER_MINUTE_RANGE};

#[derive(Debug, Args)]
pub(super) struct FieldArgs {
    /// The server's name
    #[arg(long)]
    host: Option<String>,
    /// The server's port
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..))]
    port: Option<u16>,
    /// The account's user name
    #[arg(long)]
    username: Option<String>,
    #[command(flatten)]
    password: PasswordArgs,
    /// Ask the terminal for the password
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
}

/// Limits of the account, for `create` and `update`; a test has no use for them.
#[derive(Debug, Args)]
pub(super) struct LimitArgs {
    /// Connections at once over all workers, 1 to 1000; `provider` for what is known of the server's
    #[arg(long, value_name = "COUNT", value_parser = |text: &str| limit(text, &CONNECTIONS_RANGE))]
    max_connections: Option<Limit>,
    /// Messages a minute over all workers, 1 to 100000; `provider` for what is known of the server's
    #[arg(long, value_name = "COUNT", value_parser = |text: &str| limit(text, &PER_MINUTE_RANGE))]
    messages_per_minute: Option<Limit>,
}

/// A limit as it is given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Limit {
    Provider,
    Count(u32),
}

fn limit(text: &str, range: &RangeInclusive<u32>) -> Result<Limit, String> {
    if text == "provider" {
        return Ok(Limit::Provider);
    }
    let count = text.parse().ok().filter(|count| range.contains(count));
    count.map(Limit::Count).ok_or_else(|| {
        format!("a whole number from {} to {}, or `provider`, is allowed", range.start(), range.end())
    })
}

impl LimitArgs {
    /// The limits that were given, by their names in the command's parameters.
    pub(super) fn given(&self) -> Map<String, Value> {
        let value = |limit: Limit| match limit {
            Limit::Provider => Value::Null,
            Limit::Count(count) => json!(count),
        };
        given([
            ("max_connections", self.max_connections.map(value)),
            ("messages_per_minute", self.messages_per_minute.map(value)),
        ])
    }
}

impl FieldArgs {
    /// The fields that were given, by their names in the command's parameters.
    ///
    /// # Errors
    /// When the password cannot be read.
    pub(super) fn given(&self) -> anyhow::Result<Map<String, Value>> {
        let password = self.password()?;
        Ok(given([
            ("host", self.host.as_ref().map(|host| json!(host))),
            ("port", self.port.map(|port| json!(port))),
            ("username", self.username.as_ref().map(|name| json!(name))),
            ("password", password.map(|password| json!(password.expose_secret()))),
            ("from_email", self.from_email.as_ref().map(|email| json!(email))),
            ("from_name", self.from_name.as_ref().map(|name| json!(name))),
            ("secure", self.secure.map(|secure| json!(secure))),
        ]))
    }

    /// The password, where one is given, asked for, or needed and a person can be asked.
    fn password(&self) -> anyhow::Result<Option<SecretString>> {
        let needed = self.host.is_some() || self.secure == Some(false);
        match self.password.given()? {
            None if self.ask_password || (needed && std::io::stdin().is_terminal()) => {
                password::ask().map(Some)
            }
            given => Ok(given),
        }
    }
}

/// Leaves out what has no value.
pub(super) fn given<const N: usize>(fields: [(&str, Option<Value>); N]) -> Map<String, Value> {
    fields.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?))).collect()
}

/// Where the worker wants the password, how to give it.
pub(super) fn say_how(error: anyhow::Error) -> anyhow::Error {
    match error.downcast::<Refused>() {
        Ok(refused) if refused.field.as_deref() == Some("password") => {
            let hint = "Give it with --password-file FILE or --password-stdin; --ask-password has the terminal asked.";
            Refused { hint: Some(hint.to_owned()), ..refused }.into()
        }
        Ok(refused) => refused.into(),
        Err(error) => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_is_a_count_or_the_providers() {
        let read = |text| limit(text, &CONNECTIONS_RANGE);
        assert_eq!([read("3"), read("provider")], [Ok(Limit::Count(3)), Ok(Limit::Provider)]);
        for bad in ["0", "1001", "-1", "none", ""] {
            assert!(read(bad).unwrap_err().contains("from 1 to 1000"), "{bad}");
        }
        let args = LimitArgs { max_connections: Some(Limit::Provider), messages_per_minute: None };
        assert_eq!(Value::Object(args.given()), json!({"max_connections": null}));
    }

    #[test]
    fn who_is_to_give_the_password_is_told_how() {
        let refused = |field: &str| Refused {
            code: "invalid_field".into(),
            message: "Enter the SMTP password again.".into(),
            field: Some(field.into()),
            hint: Some("As it was.".into()),
        };
        let words = say_how(refused("password").into()).to_string();
        assert!(
            words.starts_with("Enter the SMTP password again (invalid_field, field password). Give it with"),
            "{words}"
        );
        for way in ["--password-file FILE", "--password-stdin", "--ask-password"] {
            assert!(words.contains(way), "{words}");
        }
        assert!(say_how(refused("host").into()).to_string().ends_with("As it was."));
        assert_eq!(say_how(anyhow::anyhow!("no reply")).to_string(), "no reply");
    }
}
