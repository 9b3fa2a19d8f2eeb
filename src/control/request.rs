//! A command as it is published: name, organization, actor, parameters.
//! Guarantee: what could be read is there for the audit log even when the request as a whole is refused.

use super::error::{Code, ControlError};
use super::fields::{Fields, required, suggestion};
use crate::model::organization::{InvalidOrganizationId, OrganizationId};
use crate::model::text;

/// Larger bodies are refused unread, in bytes: no command has need of more.
const BODY_MAX: usize = 64 * 1024;
/// Longest actor, in characters.
const ACTOR_MAX: usize = 128;
const FIELDS: &[&str] = &["command", "organization_id", "actor", "params"];

/// The commands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Command {
    SmtpConfigCreate,
    SmtpConfigGet,
    SmtpConfigUpdate,
    SmtpConfigDelete,
    FeatureSet,
    JobStatus,
    JobCancel,
}

impl Command {
    const ALL: [Self; 7] = [
        Self::SmtpConfigCreate,
        Self::SmtpConfigGet,
        Self::SmtpConfigUpdate,
        Self::SmtpConfigDelete,
        Self::FeatureSet,
        Self::JobStatus,
        Self::JobCancel,
    ];

    /// The contract's name.
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::SmtpConfigCreate => "smtp_config.create",
            Self::SmtpConfigGet => "smtp_config.get",
            Self::SmtpConfigUpdate => "smtp_config.update",
            Self::SmtpConfigDelete => "smtp_config.delete",
            Self::FeatureSet => "feature.set",
            Self::JobStatus => "job.status",
            Self::JobCancel => "job.cancel",
        }
    }

    fn from_name(name: &str) -> Result<Self, ControlError> {
        Self::ALL.into_iter().find(|command| command.as_str() == name).ok_or_else(|| {
            let shown = text::bounded(&text::single_line(name), ACTOR_MAX);
            ControlError::invalid_request("command", format!("Unknown command `{shown}`"))
                .hint(suggestion(name, &Self::ALL.map(Self::as_str)))
        })
    }

    /// A job may be the platform's; everything else is an organization's.
    fn needs_organization(self) -> bool {
        !matches!(self, Self::JobStatus | Self::JobCancel)
    }
}

/// What could be read of a request, and what is wrong with it.
#[derive(Debug, Default)]
pub(super) struct Request {
    pub(super) command: Option<Command>,
    pub(super) organization: Option<OrganizationId>,
    pub(super) actor: Option<String>,
    pub(super) params: Fields,
    pub(super) fault: Option<ControlError>,
}

impl Request {
    /// Reads a body as far as it makes sense.
    pub(super) fn read(body: &[u8]) -> Self {
        let mut request = Self::default();
        request.fault = request.fill(body).err();
        request
    }

    fn fill(&mut self, body: &[u8]) -> Result<(), ControlError> {
        if body.len() > BODY_MAX {
            let message = format!("The command is larger than {BODY_MAX} bytes");
            return Err(ControlError::new(Code::InvalidRequest, message));
        }
        let fields = Fields::read(body)
            .ok_or_else(|| {
                ControlError::new(Code::InvalidRequest, "The command is not a JSON object in UTF-8")
            })?
            .without_nulls(&["organization_id", "actor", "params"]);
        let command = fields.text("command").map(|name| name.map(|name| Command::from_name(&name)));
        self.command = command.as_ref().ok().and_then(|command| command.as_ref()?.as_ref().ok()).copied();
        let organization = organization(&fields);
        self.organization = organization.as_ref().ok().cloned().flatten();
        let actor = actor(&fields);
        self.actor = actor.as_ref().ok().cloned().flatten();

        let command = required("command", command?)??;
        fields.check_known(FIELDS)?;
        actor?;
        if command.needs_organization() {
            required("organization_id", organization?)?;
        } else {
            organization?;
        }
        self.params = fields.object("params")?;
        Ok(())
    }
}

fn organization(fields: &Fields) -> Result<Option<OrganizationId>, ControlError> {
    fields.value("organization_id", &InvalidOrganizationId.to_string())
}

fn actor(fields: &Fields) -> Result<Option<String>, ControlError> {
    let Some(actor) = fields.text("actor")? else { return Ok(None) };
    if actor.chars().count() > ACTOR_MAX {
        return Err(ControlError::invalid_field(
            "actor",
            format!("must be at most {ACTOR_MAX} characters long"),
        ));
    }
    if text::has_forbidden_control(&actor) {
        return Err(ControlError::invalid_field("actor", "must not contain a control character"));
    }
    Ok(Some(actor))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn fault(json: &str) -> (Code, Option<String>) {
        let fault = Request::read(json.as_bytes()).fault.unwrap_or_else(|| panic!("{json} is accepted"));
        (fault.code, fault.field)
    }

    #[test]
    fn a_request_is_read_as_a_whole() {
        let request = Request::read(
            br#"{"command":"smtp_config.get","organization_id":42,"actor":"user:7","params":{}}"#,
        );
        assert_eq!(request.fault, None);
        assert_eq!(request.command, Some(Command::SmtpConfigGet));
        assert_eq!(request.organization.unwrap().as_str(), "42");
        assert_eq!(request.actor.as_deref(), Some("user:7"));
    }

    #[test]
    fn what_is_wrong_is_named() {
        let long =
            format!(r#"{{"command":"smtp_config.get","organization_id":1,"actor":"{}"}}"#, "ä".repeat(129));
        for (json, code, field) in [
            ("hello", Code::InvalidRequest, None),
            ("[]", Code::InvalidRequest, None),
            ("{}", Code::InvalidRequest, Some("command")),
            (r#"{"command":7}"#, Code::InvalidField, Some("command")),
            (r#"{"command":"smtp_config.grt","organization_id":1}"#, Code::InvalidRequest, Some("command")),
            (r#"{"command":"smtp_config.test","organization_id":1}"#, Code::InvalidRequest, Some("command")),
            (r#"{"command":"smtp_config.get"}"#, Code::InvalidRequest, Some("organization_id")),
            (
                r#"{"command":"smtp_config.get","organization_id":null}"#,
                Code::InvalidRequest,
                Some("organization_id"),
            ),
            (
                r#"{"command":"smtp_config.get","organization_id":"a b"}"#,
                Code::InvalidField,
                Some("organization_id"),
            ),
            (
                r#"{"command":"smtp_config.get","organization_id":1.5}"#,
                Code::InvalidField,
                Some("organization_id"),
            ),
            (r#"{"command":"smtp_config.get","organization":1}"#, Code::InvalidRequest, Some("organization")),
            (
                r#"{"command":"smtp_config.get","organization_id":1,"organization_id":2}"#,
                Code::InvalidRequest,
                Some("organization_id"),
            ),
            (
                r#"{"command":"smtp_config.get","organization_id":1,"params":[]}"#,
                Code::InvalidRequest,
                Some("params"),
            ),
            (
                r#"{"command":"smtp_config.get","organization_id":1,"actor":"a\nb"}"#,
                Code::InvalidField,
                Some("actor"),
            ),
            (&long, Code::InvalidField, Some("actor")),
        ] {
            assert_eq!(fault(json), (code, field.map(str::to_owned)), "{json}");
        }
    }

    #[test]
    fn the_nearest_known_command_is_suggested() {
        let request = Request::read(br#"{"command":"smtp_config.craete","organization_id":1}"#);
        let hint = request.fault.and_then(|fault| fault.hint).unwrap();
        assert!(hint.starts_with("Did you mean `smtp_config.create`? Known: "), "{hint}");
    }

    #[test]
    fn what_could_be_read_of_a_refused_request_is_kept_for_the_audit_log() {
        let request =
            Request::read(br#"{"command":"feature.set","organization_id":"acme","actor":"a","x":1}"#);
        assert!(request.fault.is_some());
        assert_eq!(request.command, Some(Command::FeatureSet));
        assert_eq!((request.organization.unwrap().as_str(), request.actor.as_deref()), ("acme", Some("a")));
    }

    #[test]
    fn a_job_may_be_the_platforms() {
        for command in ["job.status", "job.cancel"] {
            let json = format!(r#"{{"command":"{command}","organization_id":null,"params":{{"id":"x"}}}}"#);
            let request = Request::read(json.as_bytes());
            assert_eq!((request.fault, request.organization), (None, None));
        }
    }

    proptest! {
        #[test]
        fn nothing_that_is_published_makes_it_panic(
            bytes in proptest::collection::vec(any::<u8>(), 0..200), name in "\\PC{0,40}", value in "\\PC{0,40}"
        ) {
            let _ = Request::read(&bytes);
            let json = serde_json::json!(
                { "command": name, "organization_id": value, "actor": value, name.clone(): 1 }
            );
            prop_assert!(Request::read(json.to_string().as_bytes()).fault.is_some());
        }
    }
}
