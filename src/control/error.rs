//! What a command is answered with.
//! Guarantee: codes and fixed messages are the contract's (section 4); no message repeats a value that was given for a
//! credential.

use std::fmt;

use serde::{Serialize, Serializer};
use serde_json::{Value, json};

use crate::egress::EgressError;
use crate::model::advice;
use crate::model::failure::Reason;
use crate::store::{ChangeError, StoreError};

macro_rules! codes {
    ($($(#[$doc:meta])* $variant:ident = $name:literal,)+) => {
        /// The contract's error codes.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Code { $($(#[$doc])* $variant,)+ }

        impl Code {
            /// Every code, in the contract's order.
            pub const ALL: &[Self] = &[$(Self::$variant,)+];

            /// The contract's name.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $name,)+ }
            }
        }
    };
}

codes! {
    /// Not JSON, unknown command, unknown or missing field.
    InvalidRequest = "invalid_request",
    /// A field's value is unusable.
    InvalidField = "invalid_field",
    /// `user_id` missing or not allowed.
    NotAllowed = "not_allowed",
    /// The flag is off.
    FeatureDisabled = "feature_disabled",
    /// One configuration per organization.
    AlreadyExists = "already_exists",
    /// Nothing there.
    NotFound = "not_found",
    /// Not the current version.
    Conflict = "conflict",
    /// Not an address of the public internet.
    HostNotPublic = "host_not_public",
    /// Not among the allowed ports.
    PortNotAllowed = "port_not_allowed",
    /// The name has no address.
    HostNotFound = "host_not_found",
    /// The name could not be looked up.
    DnsFailed = "dns_failed",
    /// No connection, or one that was lost, or no SMTP at its other end.
    ConnectFailed = "connect_failed",
    /// No answer in time.
    ConnectTimeout = "connect_timeout",
    /// Certificate or protocol.
    TlsFailed = "tls_failed",
    /// No TLS on offer.
    TlsRequired = "tls_required",
    /// User name or password refused.
    AuthFailed = "auth_failed",
    /// The server refused something else.
    Rejected = "rejected",
    /// More tests than `control.tests_per_minute`.
    RateLimited = "rate_limited",
    /// The database is away, or the worker has its hands full; nothing was changed.
    Unavailable = "unavailable",
    /// A fault of Sendoff itself.
    Internal = "internal",
}

impl Serialize for Code {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

/// The error part of a reply.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ControlError {
    /// Which of the contract's codes.
    pub code: Code,
    /// What is wrong and what is allowed, for a person.
    pub message: String,
    /// The field at fault.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub field: Option<String>,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// Set where the database is away, and the audit log with it.
    #[serde(skip)]
    without_log: bool,
}

/// The reply to one command.
pub struct Response {
    command: &'static str,
    outcome: Result<Value, ControlError>,
}

/// Shows the command and the code only: a result holds the sender's address.
impl fmt::Debug for Response {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Response({}: {})", self.command, self.code())
    }
}

impl ControlError {
    pub(super) fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), field: None, hint: None, without_log: false }
    }

    pub(super) fn field(mut self, field: impl Into<String>) -> Self {
        self.field = Some(field.into());
        self
    }

    pub(super) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    pub(super) fn invalid_request(field: &str, message: impl Into<String>) -> Self {
        Self::new(Code::InvalidRequest, message).field(field)
    }

    /// `rule` follows the field's name: "must be …".
    pub(super) fn invalid_field(field: &str, rule: impl fmt::Display) -> Self {
        Self::new(Code::InvalidField, format!("{field} {rule}")).field(field)
    }

    pub(super) fn not_allowed() -> Self {
        Self::new(Code::NotAllowed, "The AMQP property user_id is missing, or its user may not give commands")
            .hint("Ask the operator of this installation to list the user in control.allowed_users.")
    }

    pub(super) fn feature_disabled() -> Self {
        Self::new(Code::FeatureDisabled, "Custom SMTP is not enabled for this organization")
            .hint("Have it enabled first: the feature is custom-smtp-for-orgs.")
    }

    pub(super) fn already_exists() -> Self {
        let message = "Organization already has an SMTP configuration. Please delete the existing one first.";
        Self::new(Code::AlreadyExists, message)
            .hint("To change some of its fields, send smtp_config.update instead.")
    }

    pub(super) fn config_not_found() -> Self {
        Self::new(Code::NotFound, "SMTP configuration not found").hint("Create one first.")
    }

    pub(super) fn conflict(current: i64) -> Self {
        Self::new(Code::Conflict, format!("The configuration has changed: its current version is {current}"))
            .field("if_version")
            .hint("Read the configuration again, then send the update with its version.")
    }

    pub(super) fn password_needed() -> Self {
        let message = "Enter the SMTP password again: it is only ever sent to the server it was entered for.";
        Self::new(Code::InvalidField, message)
            .field("password")
            .hint("Give the password together with the new host, or with secure turned off.")
    }

    /// Of credentials that are stored and do not open, though their key is there.
    pub(super) fn unreadable() -> Self {
        Self::new(Code::InvalidField, "The stored user name and password cannot be read any more")
            .field("password")
            .hint("Enter the user name and the password again.")
    }

    /// A key is missing from this worker's ring, which is no fault of the configuration's.
    pub(super) fn key_missing() -> Self {
        Self::new(Code::Internal, "This worker lacks the key that the stored credentials are sealed under")
            .hint("Tell the operator: the key has to be listed in encryption.keys.")
    }

    pub(super) fn rate_limited(per_minute: u32, again_in_s: u64) -> Self {
        let message = format!("At most {per_minute} tests and test emails a minute are allowed");
        Self::new(Code::RateLimited, message).hint(format!("Try again in {again_in_s} s."))
    }

    /// As many tests are under way as this worker takes on at once.
    pub(super) fn too_many_tests() -> Self {
        Self::new(Code::Unavailable, "Too many tests are under way now; this one was not begun")
            .hint("Try again in a minute.")
    }

    /// Name servers are slow, and many names wait for them.
    pub(super) fn too_many_look_ups() -> Self {
        Self::new(Code::Unavailable, "Too many host names are being looked up now; nothing was changed")
            .hint("Try again in a moment.")
    }

    pub(super) fn unavailable() -> Self {
        let error = Self::new(Code::Unavailable, "The database cannot be reached now; nothing was changed")
            .hint("Try again in a moment.");
        Self { without_log: true, ..error }
    }

    /// Whether there is no audit log to write to.
    pub(super) fn is_without_log(&self) -> bool {
        self.without_log
    }

    /// Most of a test's time has gone by before it began.
    pub(super) fn too_late_to_test() -> Self {
        Self::new(Code::Unavailable, "The database answers too slowly now; the test was not begun")
            .hint("Try again in a moment.")
    }

    pub(super) fn internal() -> Self {
        Self::new(Code::Internal, "Sendoff could not carry out the command; its log tells why")
            .hint(advice::of_reason(Reason::Internal))
    }

    /// Other commands got in between, again and again.
    pub(super) fn busy(current: i64) -> Self {
        let told = "The configuration is being changed by several commands at once: its current version is";
        Self::new(Code::Conflict, format!("{told} {current}"))
            .hint("Read the configuration again, then send the update once more.")
    }

    /// `refused` tells what the caller's own rule amounts to.
    pub(super) fn of_change<R>(error: ChangeError<R>, refused: impl FnOnce(R) -> Self) -> Self {
        match error {
            ChangeError::AlreadyExists => Self::already_exists(),
            ChangeError::NotFound => Self::config_not_found(),
            ChangeError::Conflict { current } => Self::conflict(current),
            ChangeError::Refused(refusal) => refused(refusal),
            ChangeError::Unknown(detail) => {
                tracing::error!(%detail, "a change was not confirmed by the database");
                Self::outcome_unknown()
            }
            ChangeError::Store(error) => error.into(),
        }
    }

    /// The one case in which it is open whether something was changed.
    pub(super) fn outcome_unknown() -> Self {
        Self::new(
            Code::Internal,
            "The database did not confirm in time: it is not known whether the change was made",
        )
        .hint("Read the current state before trying again.")
    }
}

impl From<StoreError> for ControlError {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Unavailable(_) => Self::unavailable(),
            StoreError::Internal(detail) => {
                tracing::error!(%detail, "a control command failed at the database");
                Self::internal()
            }
        }
    }
}

impl From<ChangeError> for ControlError {
    fn from(error: ChangeError) -> Self {
        Self::of_change(error, |never| match never {})
    }
}

impl From<EgressError> for ControlError {
    fn from(error: EgressError) -> Self {
        let message = error.to_string();
        let (code, field, reason) = match error {
            EgressError::HostNotPublic { .. } => (Code::HostNotPublic, "host", Reason::HostNotPublic),
            EgressError::PortNotAllowed { .. } => (Code::PortNotAllowed, "port", Reason::PortNotAllowed),
            EgressError::HostNotFound => (Code::HostNotFound, "host", Reason::HostNotFound),
            EgressError::DnsFailed { .. } => (Code::DnsFailed, "host", Reason::DnsFailed),
        };
        Self::new(code, message).field(field).hint(advice::of_reason(reason))
    }
}

impl Response {
    pub(super) fn new(command: &'static str, outcome: Result<Value, ControlError>) -> Self {
        Self { command, outcome }
    }

    /// The command's name, or `unknown`: bounded, so it may label a metric.
    pub fn command(&self) -> &'static str {
        self.command
    }

    /// `ok`, or the error's code.
    pub fn code(&self) -> &'static str {
        self.outcome.as_ref().map_or_else(|error| error.code.as_str(), |_| "ok")
    }

    /// What is answered: the result or the error.
    pub fn outcome(&self) -> Result<&Value, &ControlError> {
        self.outcome.as_ref()
    }

    /// The reply's body: UTF-8 JSON.
    pub fn to_json(&self) -> Vec<u8> {
        let reply = match &self.outcome {
            Ok(result) => json!({ "ok": true, "result": result }),
            Err(error) => json!({ "ok": false, "error": error }),
        };
        reply.to_string().into_bytes()
    }
}
