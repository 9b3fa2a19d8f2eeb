//! The parameters that make a configuration, checked one by one.
//! Guarantee: a value that passes can go into a header or an SMTP command as it is; user name and password are exactly
//! what was given.

use std::ops::RangeInclusive;

use secrecy::{ExposeSecret, SecretString};

use super::error::{Code, ControlError};
use super::fields::Fields;
use crate::egress::ServerHost;
use crate::model::address::EmailAddress;
use crate::model::provider::{CONNECTIONS_RANGE, PER_MINUTE_RANGE};
use crate::model::text;

/// `update`'s parameters: `create`'s, and the version that the change is meant for.
pub(super) const WITH_VERSION: [&str; 10] = [
    "from_email",
    "from_name",
    "host",
    "port",
    "username",
    "password",
    "secure",
    "max_connections",
    "messages_per_minute",
    "if_version",
];

/// `create`'s parameters; all but `secure` and the limits are required there.
pub(super) const NAMES: &[&str] = WITH_VERSION.split_at(WITH_VERSION.len() - 1).0;

/// Longest sender's name, in bytes: what a mailbox may have.
pub(super) const NAME_MAX: usize = 512;
/// Longest user name and password, in bytes; RFC 4954 section 4 lets a whole AUTH line have 12,288.
pub(super) const CREDENTIAL_MAX: usize = 1024;

/// What was given, each value checked; `None` for what was not.
#[derive(Debug)]
pub(super) struct SmtpParams {
    pub(super) from_email: Option<EmailAddress>,
    pub(super) from_name: Option<String>,
    pub(super) host: Option<ServerHost>,
    pub(super) port: Option<u16>,
    pub(super) username: Option<SecretString>,
    pub(super) password: Option<SecretString>,
    pub(super) secure: Option<bool>,
    /// `Some(None)`: given as `null`, for what is known of the provider.
    pub(super) max_connections: Option<Option<u32>>,
    pub(super) messages_per_minute: Option<Option<u32>>,
}

impl SmtpParams {
    /// Reads them in the order of the form, so that the first wrong field is the one that is named.
    pub(super) fn read(fields: &Fields) -> Result<Self, ControlError> {
        Ok(Self {
            from_email: fields.text("from_email")?.map(|text| email(&text)).transpose()?,
            from_name: fields.text("from_name")?.map(|text| name(&text)).transpose()?,
            host: fields.text("host")?.map(|text| host(&text)).transpose()?,
            port: port(fields)?,
            username: credential(fields, "username")?,
            password: credential(fields, "password")?,
            secure: fields.value("secure", "must be true or false")?,
            max_connections: limit(fields, "max_connections", &CONNECTIONS_RANGE)?,
            messages_per_minute: limit(fields, "messages_per_minute", &PER_MINUTE_RANGE)?,
        })
    }
}

fn email(text: &str) -> Result<EmailAddress, ControlError> {
    EmailAddress::parse(text).map_err(|fault| ControlError::invalid_field("from_email", fault))
}

/// Without a name, mail programs show the bare address: nearly always a forgotten field, so it is an error.
fn name(text: &str) -> Result<String, ControlError> {
    let name = text::single_line(text);
    if name.is_empty() {
        return Err(ControlError::invalid_field("from_name", "must not be empty"));
    }
    if name.len() > NAME_MAX {
        return Err(ControlError::invalid_field(
            "from_name",
            format!("must be at most {NAME_MAX} bytes long"),
        ));
    }
    Ok(name)
}

fn host(text: &str) -> Result<ServerHost, ControlError> {
    ServerHost::parse(text)
        .map_err(|fault| ControlError::new(Code::InvalidField, fault.to_string()).field("host"))
}

fn port(fields: &Fields) -> Result<Option<u16>, ControlError> {
    let rule = "must be an integer from 1 to 65535";
    match fields.value("port", rule)? {
        Some(0) => Err(ControlError::invalid_field("port", rule)),
        port => Ok(port),
    }
}

fn limit(
    fields: &Fields,
    field: &str,
    range: &RangeInclusive<u32>,
) -> Result<Option<Option<u32>>, ControlError> {
    let rule = format!(
        "must be an integer from {} to {}, or null for what is known of the provider",
        range.start(),
        range.end()
    );
    match fields.value::<Option<u32>>(field, &rule)? {
        Some(Some(limit)) if !range.contains(&limit) => Err(ControlError::invalid_field(field, rule)),
        given => Ok(given),
    }
}

fn credential(fields: &Fields, field: &str) -> Result<Option<SecretString>, ControlError> {
    let Some(secret) = fields.secret(field)? else { return Ok(None) };
    let text = secret.expose_secret();
    if text.is_empty() {
        return Err(ControlError::invalid_field(field, "must not be empty"));
    }
    if text.len() > CREDENTIAL_MAX {
        return Err(ControlError::invalid_field(
            field,
            format!("must be at most {CREDENTIAL_MAX} bytes long"),
        ));
    }
    if text::has_forbidden_control(text) {
        let rule = "must not contain a line break, another control character or a bidirectional override";
        return Err(ControlError::invalid_field(field, rule));
    }
    Ok(Some(secret))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &str) -> Result<SmtpParams, ControlError> {
        SmtpParams::read(&Fields::read(json.as_bytes()).unwrap())
    }

    #[test]
    fn values_are_read_in_their_normal_form_and_credentials_as_they_are() {
        let params = read(
            r#"{"from_email":"Events@EXAMPLE.org","from_name":"Evil\r\nBcc: x","host":"SMTP.Example.org.",
                "port":587,"username":" user ","password":" p\u00e4ss ","secure":false}"#,
        )
        .unwrap();
        assert_eq!(params.from_email.unwrap().as_str(), "Events@example.org");
        assert_eq!(params.from_name.as_deref(), Some("Evil Bcc: x"));
        assert_eq!(params.host.unwrap().to_string(), "smtp.example.org");
        assert_eq!((params.port, params.secure), (Some(587), Some(false)));
        assert_eq!(params.username.unwrap().expose_secret(), " user ");
        assert_eq!(params.password.unwrap().expose_secret(), " päss ");
    }

    #[test]
    fn a_limit_is_a_number_or_null_for_the_providers_own() {
        let params = read(r#"{"max_connections":3,"messages_per_minute":null}"#).unwrap();
        assert_eq!((params.max_connections, params.messages_per_minute), (Some(Some(3)), Some(None)));
        let params = read("{}").unwrap();
        assert_eq!((params.max_connections, params.messages_per_minute), (None, None));
        let error = read(r#"{"messages_per_minute":0}"#).unwrap_err();
        assert!(error.message.contains("from 1 to 100000, or null"), "{error:?}");
    }

    #[test]
    fn each_unusable_value_is_refused_by_the_name_of_its_field() {
        let long = format!(r#"{{"password":"{}"}}"#, "x".repeat(1025));
        let long_name = format!(r#"{{"from_name":"{}"}}"#, "x".repeat(513));
        for (field, json) in [
            ("from_email", r#"{"from_email":"nobody"}"#),
            ("from_email", r#"{"from_email":"a@b.example\r\nRCPT TO:<x@y.example>"}"#),
            ("from_email", r#"{"from_email":null}"#),
            ("from_name", r#"{"from_name":" \r\n "}"#),
            ("from_name", r#"{"from_name":["x"]}"#),
            ("from_name", &long_name),
            ("host", r#"{"host":""}"#),
            ("host", r#"{"host":"smtp://mail.example.org"}"#),
            ("host", r#"{"host":"mail.example.org\r\nQUIT"}"#),
            ("port", r#"{"port":0}"#),
            ("port", r#"{"port":65536}"#),
            ("port", r#"{"port":-1}"#),
            ("port", r#"{"port":587.0}"#),
            ("port", r#"{"port":"587"}"#),
            ("username", r#"{"username":""}"#),
            ("username", r#"{"username":"a\u0000b"}"#),
            ("password", r#"{"password":"a\nb"}"#),
            ("password", r#"{"password":"a\u202eb"}"#),
            ("password", r#"{"password":null}"#),
            ("password", &long),
            ("secure", r#"{"secure":"yes"}"#),
            ("secure", r#"{"secure":1}"#),
            ("max_connections", r#"{"max_connections":0}"#),
            ("max_connections", r#"{"max_connections":1001}"#),
            ("max_connections", r#"{"max_connections":"3"}"#),
            ("messages_per_minute", r#"{"messages_per_minute":0}"#),
            ("messages_per_minute", r#"{"messages_per_minute":-1}"#),
            ("messages_per_minute", r#"{"messages_per_minute":100001}"#),
            ("messages_per_minute", r#"{"messages_per_minute":1.5}"#),
        ] {
            let error = read(json).unwrap_err();
            assert_eq!((error.code, error.field.as_deref()), (Code::InvalidField, Some(field)), "{json}");
        }
    }
}
