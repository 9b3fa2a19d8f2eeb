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

/// The contract's error codes, as far as these commands give them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Code {
    /// Not JSON, unknown command, unknown or missing field.
    InvalidRequest,
    /// A field's value is unusable.
    InvalidField,
    /// `user_id` missing or not allowed.
    NotAllowed,
    /// The flag is off.
    FeatureDisabled,
    /// One configuration per organization.
    AlreadyExists,
    /// Nothing there.
    NotFound,
    /// Not the current version.
    Conflict,
    /// Not an address of the public internet.
    HostNotPublic,
    /// Not among the allowed ports.
    PortNotAllowed,
    /// The name has no address.
    HostNotFound,
    /// The name could not be looked up.
    DnsFailed,
    /// The database is away; nothing was changed.
    Unavailable,
    /// A fault of Sendoff itself.
    Internal,
}

impl Code {
    /// The contract's name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::InvalidRequest => "invalid_request",
            Self::InvalidField => "invalid_field",
            Self::NotAllowed => "not_allowed",
            Self::FeatureDisabled => "feature_disabled",
            Self::AlreadyExists => "already_exists",
            Self::NotFound => "not_found",
            Self::Conflict => "conflict",
            Self::HostNotPublic => "host_not_public",
            Self::PortNotAllowed => "port_not_allowed",
            Self::HostNotFound => "host_not_found",
            Self::DnsFailed => "dns_failed",
            Self::Unavailable => "unavailable",
            Self::Internal => "internal",
        }
    }
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
        Self { code, message: message.into(), field: None, hint: None }
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
        Self::new(Code::InvalidField, message).field("password")
    }

    pub(super) fn unavailable() -> Self {
        Self::new(Code::Unavailable, "The database cannot be reached now; nothing was changed")
            .hint("Try again in a moment.")
    }

    pub(super) fn internal() -> Self {
        Self::new(Code::Internal, "Sendoff could not carry out the command; its log tells why")
            .hint(advice::of_reason(Reason::Internal))
    }

    /// Other commands got in between, again and again.
    pub(super) fn busy() -> Self {
        Self::new(Code::Conflict, "The configuration is being changed by several commands at once")
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
