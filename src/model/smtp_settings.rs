//! How to reach an SMTP server and in whose name: an organization's own, or the platform's.
//! Guarantee: credentials print nothing, not even their length.

use std::fmt;

use secrecy::{ExposeSecret, SecretString};

use super::address::{EmailAddress, Mailbox};
use super::organization::OrganizationId;

/// When TLS is taken up (contract section 4).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TlsMode {
    /// TLS from the first byte: ports 465 and 2465 whatever `secure` says.
    Implicit,
    /// STARTTLS or nothing.
    Required,
    /// STARTTLS when offered.
    Opportunistic,
}

impl TlsMode {
    /// The mode that a port and the `secure` switch ask for.
    pub fn new(port: u16, secure: bool) -> Self {
        match (port, secure) {
            (465 | 2465, _) => Self::Implicit,
            (_, true) => Self::Required,
            (_, false) => Self::Opportunistic,
        }
    }
}

/// User name and password of an SMTP account.
#[derive(Clone)]
pub struct Credentials {
    username: SecretString,
    password: SecretString,
}

impl Credentials {
    /// Takes both as they are: trimmed of nothing and changed by nothing.
    pub fn new(username: impl Into<SecretString>, password: impl Into<SecretString>) -> Self {
        Self { username: username.into(), password: password.into() }
    }

    /// The user name, for the AUTH exchange and for sealing only.
    pub fn username(&self) -> &str {
        self.username.expose_secret()
    }

    /// The password, for the AUTH exchange and for sealing only.
    pub fn password(&self) -> &str {
        self.password.expose_secret()
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Credentials(redacted)")
    }
}

/// Everything that is needed to send through one server.
#[derive(Debug, Clone)]
pub struct SmtpAccount {
    /// Host name or address as configured, already normalised.
    pub host: String,
    /// TCP port.
    pub port: u16,
    /// When TLS is taken up.
    pub tls: TlsMode,
    /// None only for a platform server that asks for none.
    pub credentials: Option<Credentials>,
    /// Sender shown in From; its address is the envelope sender too.
    pub from: Mailbox,
}

impl SmtpAccount {
    /// The envelope sender.
    pub fn envelope_from(&self) -> &EmailAddress {
        &self.from.email
    }
}

/// The contract's `transport` of an organization's own server.
pub const ORGANIZATION: &str = "organization";
/// The contract's `transport` of the platform's server.
pub const PLATFORM: &str = "platform";

/// Which server a job goes to. One configuration version is one destination: an update starts a new one.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Destination {
    /// An organization's own server, in one version of its configuration.
    Organization {
        /// Whose.
        id: OrganizationId,
        /// Version of the configuration.
        version: i64,
    },
    /// The platform's server.
    Platform,
}

impl Destination {
    /// The contract's `transport`: `organization` or `platform`.
    pub fn transport(&self) -> &'static str {
        match self {
            Self::Organization { .. } => ORGANIZATION,
            Self::Platform => PLATFORM,
        }
    }
}
