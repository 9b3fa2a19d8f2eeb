//! The settings: typed and validated, from defaults, a TOML file and the environment, later wins.
//! Guarantee: an unknown key, a bad value or a missing secret is an error that names it; nothing here prints a secret.

mod hello;
mod keys;
mod lanes;
mod layers;
mod reader;
mod sections;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ipnet::IpNet;
use secrecy::SecretString;

pub use layers::Sources;

use crate::model::lanes::Lane;
use crate::model::provider::{Limited, Limits};
use crate::model::schedule::Schedule;
use crate::model::smtp_settings::SmtpAccount;

/// Everything that can be set (contract section 1).
#[derive(Debug, Clone)]
pub struct Settings {
    /// `amqp.*`
    pub amqp: AmqpSettings,
    /// `database.*`
    pub database: DatabaseSettings,
    /// `encryption.*`
    pub encryption: EncryptionSettings,
    /// `delivery.*`
    pub delivery: DeliverySettings,
    /// `smtp.*`
    pub smtp: SmtpSettings,
    /// `egress.*`
    pub egress: EgressSettings,
    /// `platform.*`; none where the platform has no server of its own.
    pub platform: Option<PlatformSettings>,
    /// `retry.*`
    pub retry: RetrySettings,
    /// `limits.*`
    pub limits: LimitSettings,
    /// `control.*`
    pub control: ControlSettings,
    /// `dead_letters.retention_days` and `ledger.retention_days`
    pub retention: RetentionSettings,
    /// `http.*`
    pub http: HttpSettings,
}

/// The message broker.
#[derive(Debug, Clone)]
pub struct AmqpSettings {
    /// `amqp://` or `amqps://`; may hold a password.
    pub url: SecretString,
    /// Prefix of every exchange and queue: 1 to 100 of `[A-Za-z0-9._-]`.
    pub prefix: String,
    /// At least one; no two take the same routing key.
    pub lanes: Vec<Lane>,
}

/// PostgreSQL.
#[derive(Debug, Clone)]
pub struct DatabaseSettings {
    /// Set whenever [`Needs::database`] was asked for; take it with [`Settings::database_url`].
    pub url: Option<SecretString>,
    /// Apply missing migrations at the worker's start.
    pub migrate_on_start: bool,
}

/// The key ring of stored credentials.
#[derive(Debug, Clone)]
pub struct EncryptionSettings {
    /// `id:base64(32 bytes)` items, each id once; the first encrypts. Those of `encryption.keys` come before those of
    /// the file. Not empty whenever [`Needs::keys`] was asked for.
    pub keys: Vec<SecretString>,
}

/// Which organizations may use a server of their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CustomSmtp {
    /// Those that have the feature flag.
    Flagged,
    /// Every one.
    All,
}

/// The worker as a whole.
#[derive(Debug, Clone)]
pub struct DeliverySettings {
    /// Who may use a server of its own.
    pub custom_smtp: CustomSmtp,
    /// SMTP connections open at once.
    pub max_sessions: u32,
}

/// SMTP sessions.
#[derive(Debug, Clone)]
pub struct SmtpSettings {
    /// Ceiling of an organization's window.
    pub max_connections_per_organization: u32,
    /// A connection is closed after so many messages.
    pub max_messages_per_connection: u32,
    /// An unused connection is closed after this time.
    pub idle_timeout: Duration,
    /// Connect, and the TLS handshake.
    pub connect_timeout: Duration,
    /// The banner, and each reply.
    pub command_timeout: Duration,
    /// The body: longest time without progress.
    pub data_timeout: Duration,
    /// One attempt as a whole.
    pub attempt_timeout: Duration,
    /// The reply to the final dot.
    pub final_reply_timeout: Duration,
    /// A domain or an address literal.
    pub hello_name: String,
    /// Readable PEM files: `smtp.extra_ca_files`, then `NODE_EXTRA_CA_CERTS`.
    pub extra_ca_files: Vec<PathBuf>,
}

/// The ports that an organization's server may listen on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AllowedPorts {
    /// `*`
    Any,
    /// These and no other; never empty.
    Only(BTreeSet<u16>),
}

/// Where the worker may connect to.
#[derive(Debug, Clone)]
pub struct EgressSettings {
    /// Exempt from the public-address rule.
    pub allow_networks: Vec<IpNet>,
    /// Never dialled.
    pub deny_networks: Vec<IpNet>,
    /// Ports of organizations' servers.
    pub allowed_ports: AllowedPorts,
    /// Empty: the system's.
    pub nameservers: Vec<SocketAddr>,
    /// Credentials may travel over an unencrypted connection.
    pub allow_plaintext_auth: bool,
}

/// The platform's own server.
#[derive(Debug, Clone)]
pub struct PlatformSettings {
    /// Host, port, TLS, credentials if any, and sender.
    pub account: SmtpAccount,
    /// Ceiling of its window.
    pub max_connections: u32,
    /// What its account is limited to, over all workers.
    pub limited: Option<Limited>,
}

/// Retries.
#[derive(Debug, Clone)]
pub struct RetrySettings {
    /// Waits between attempts.
    pub schedule: Schedule,
    /// No job is tried or put aside for longer.
    pub max_age: Duration,
    /// No job waits longer for its organization's configuration.
    pub parked_for: Duration,
}

/// Bounds of a job.
#[derive(Debug, Clone)]
pub struct LimitSettings {
    /// The composed message.
    pub max_message_bytes: usize,
    /// to + cc + bcc.
    pub max_recipients: usize,
}

/// Commands over the broker.
#[derive(Debug, Clone)]
pub struct ControlSettings {
    /// Broker users that may command; empty: any.
    pub allowed_users: Vec<String>,
    /// Connection tests and test emails, per organization.
    pub tests_per_minute: u32,
}

/// How long the past is remembered; the ledger never forgets before the dead letters do.
#[derive(Debug, Clone)]
pub struct RetentionSettings {
    /// `dead_letters.retention_days`
    pub dead_letters: Duration,
    /// `ledger.retention_days`
    pub ledger: Duration,
}

/// Health, metrics and console.
#[derive(Debug, Clone)]
pub struct HttpSettings {
    /// Where to listen.
    pub listen: SocketAddr,
    /// None: the console is off.
    pub console_token: Option<SecretString>,
}

/// Which secrets a command cannot do without.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Needs {
    /// `database.url`
    pub database: bool,
    /// `encryption.keys` or `encryption.keys_file`
    pub keys: bool,
}

impl Needs {
    /// For commands that speak to the broker only, or to nobody.
    pub const NOTHING: Self = Self { database: false, keys: false };
    /// For commands that look into the database.
    pub const DATABASE: Self = Self { database: true, keys: false };
    /// For the worker.
    pub const ALL: Self = Self { database: true, keys: true };
}

/// What is wrong with the settings, each problem in words that name the key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct SettingsError {
    /// At least one.
    problems: Vec<String>,
}

impl SettingsError {
    fn unless_empty(problems: Vec<String>) -> Result<(), Self> {
        if problems.is_empty() { Ok(()) } else { Err(Self { problems }) }
    }

    /// Each problem, one line each.
    pub fn problems(&self) -> &[String] {
        &self.problems
    }
}

impl fmt::Display for SettingsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.problems.as_slice() {
            [only] => write!(f, "settings: {only}"),
            several => {
                write!(f, "settings: {} problems", several.len())?;
                several.iter().try_for_each(|problem| write!(f, "\n  {problem}"))
            }
        }
    }
}

impl Settings {
    /// Reads this process's settings: the defaults, the file named by `config` or `SENDOFF_CONFIG`, the environment.
    ///
    /// # Errors
    /// Every problem at once; a missing secret is one only where `needs` asks for it.
    pub fn load(config: Option<&Path>, needs: Needs) -> Result<Self, SettingsError> {
        Self::from_sources(&Sources::of_process(config)?, needs)
    }

    /// Reads the settings from sources given by hand.
    ///
    /// # Errors
    /// As [`Settings::load`].
    pub fn from_sources(sources: &Sources, needs: Needs) -> Result<Self, SettingsError> {
        sections::read(sources, needs)
    }

    /// The database's URL.
    ///
    /// # Errors
    /// When it is not set.
    pub fn database_url(&self) -> Result<&SecretString, SettingsError> {
        let missing = || SettingsError { problems: vec![sections::NO_DATABASE.to_owned()] };
        self.database.url.as_ref().ok_or_else(missing)
    }

    /// What the operator should know about settings that are allowed but risky; one line each.
    pub fn warnings(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        if !self.egress.allow_networks.is_empty() {
            let networks: Vec<_> = self.egress.allow_networks.iter().map(ToString::to_string).collect();
            warnings.push(format!(
                "egress.allow_networks: {} can be reached by every organization's SMTP settings; only right for \
                 development and closed installations",
                networks.join(", ")
            ));
        }
        if self.egress.allow_plaintext_auth {
            warnings.push(
                "egress.allow_plaintext_auth: SMTP passwords may travel over unencrypted connections"
                    .to_owned(),
            );
        }
        let limits =
            self.platform.as_ref().and_then(|platform| platform.limited).map(|limited| limited.limits);
        if let Some(Limits { provider: Some(provider), messages_per_minute: Some(count), .. }) = limits {
            warnings.push(format!(
                "platform.host: {provider} allows {count} messages a minute as far as is known, over all workers; where it \
                 allows more, set platform.messages_per_minute"
            ));
        }
        let name = &self.smtp.hello_name;
        if !name.contains('.') || name.starts_with("[127.") {
            warnings.push(format!(
                "smtp.hello_name: many servers refuse {name}; set a fully qualified name of this machine"
            ));
        }
        warnings
    }
}
