//! The commands as a JSON Schema: one branch for each, with its parameters.
//! Guarantee: tests hold the parameters against those that the commands know, and the verdicts against those of the reader;
//! bounds are the reader's constants.

mod replies;
#[cfg(test)]
mod tests;

use serde_json::{Map, Value, json};

use super::feature_set;
use super::request::{ACTOR_MAX, BODY_MAX, Command};
use super::smtp_params::{CREDENTIAL_MAX, NAME_MAX};
use crate::model::address::ADDRESS_MAX;
use crate::model::job::Revision;
use crate::model::provider::{CONNECTIONS_RANGE, PER_MINUTE_RANGE};
use crate::model::schema::{DIALECT, NO_CONTROLS, definition, or_null, organization_id, uuid};

/// The document's name.
pub const SCHEMA_ID: &str = "urn:sendoff:schema:command:1";

/// One parameter of a command.
struct Param {
    name: &'static str,
    is_required: bool,
    schema: Value,
}

/// The schema of a command's body, with those of the replies among its definitions.
pub fn command_schema() -> Value {
    let branches: Vec<_> = Command::ALL.iter().map(|command| definition(command.as_str())).collect();
    let mut definitions = Map::from_iter([("OrganizationId".to_owned(), organization_id())]);
    definitions.extend(Command::ALL.iter().map(|command| (command.as_str().to_owned(), body(*command))));
    definitions.extend(replies::definitions());
    json!({
        "$schema": DIALECT,
        "$id": SCHEMA_ID,
        "title": "Sendoff command",
        "description": format!(
            "Published to the default exchange with the control queue's name as the routing key, with reply_to and \
             correlation_id. Carried out at most once; one that has expired is not, counted from its timestamp where it bears \
             one. Unknown and repeated fields are refused, and so are more than {BODY_MAX} bytes. The reply is #/$defs/Reply."
        ),
        "oneOf": branches,
        "$defs": definitions,
    })
}

/// Every command's name.
pub fn command_names() -> Vec<&'static str> {
    Command::ALL.iter().map(|command| command.as_str()).collect()
}

fn body(command: Command) -> Value {
    let params = params(command);
    let needs_params = params.iter().any(|param| param.is_required) || rule(command).is_some();
    let mut required = vec!["command"];
    let organization = definition("OrganizationId");
    let organization = if command.needs_organization() {
        required.push("organization_id");
        organization
    } else {
        let mut organization = or_null(&organization);
        organization["description"] = json!("Whose job it is; without it, the platform's.");
        organization
    };
    if needs_params {
        required.push("params");
    }
    let mut given = json!({
        "type": "object",
        "properties": params.iter().map(|p| (p.name.to_owned(), p.schema.clone())).collect::<Map<_, _>>(),
        "required": params.iter().filter(|p| p.is_required).map(|p| p.name).collect::<Vec<_>>(),
        "additionalProperties": false,
    });
    if let Some(rule) = rule(command) {
        given["anyOf"] = rule;
    }
    json!({
        "title": command.as_str(),
        "description": format!("{} Result: {}.", about(command), replies::result_of(command)),
        "type": "object",
        "properties": {
            "command": {"const": command.as_str()},
            "organization_id": organization,
            "actor": {
                "description": "Who asks, for the audit log, say user:7. Without control characters.",
                "type": ["string", "null"], "maxLength": ACTOR_MAX, "pattern": NO_CONTROLS,
            },
            "params": if needs_params { given } else { or_null(&given) },
        },
        "required": required,
        "additionalProperties": false,
    })
}

fn about(command: Command) -> &'static str {
    match command {
        Command::SmtpConfigCreate => {
            "Stores the organization's one configuration. Errors: feature_disabled, already_exists, host_not_public, \
             port_not_allowed, host_not_found, dns_failed."
        }
        Command::SmtpConfigGet => {
            "The stored configuration, without user name and password. Errors: not_found."
        }
        Command::SmtpConfigUpdate => {
            "Changes the fields that are given, at least one. Another host, or secure turned off, takes the password again \
             (invalid_field, field password). With if_version nothing is changed unless that is the current version; else \
             conflict, whose message names the current one."
        }
        Command::SmtpConfigDelete => {
            "Deletes the configuration: mail goes through the platform's server again. Errors: not_found."
        }
        Command::SmtpConfigTest => {
            "Tests the connection and sends nothing. Without params, the stored configuration; else the given fields laid over \
             the stored ones, all but secure and the limits being needed where nothing is stored. Another host, or secure turned off, takes the \
             password again. A test that was carried out and failed is a result with ok false. Errors: rate_limited."
        }
        Command::SendTestEmail => {
            "Sends one email through the stored configuration, at once. Errors: those of a connection test, rejected, \
             rate_limited."
        }
        Command::FeatureSet => "Switches a feature on or off for the organization.",
        Command::JobStatus => "What became of a job. Errors: not_found.",
        Command::JobCancel => {
            "Calls back a job by its id, or every job of a booking (group) up to and with a sequence. What is not yet taken up \
             will be dead with reason cancelled."
        }
    }
}

/// A command's parameters, in the order of its own list.
fn params(command: Command) -> Vec<Param> {
    let required = |name, schema| Param { name, is_required: true, schema };
    let optional = |name, schema| Param { name, is_required: false, schema };
    match command {
        Command::SmtpConfigCreate => fields(true),
        Command::SmtpConfigUpdate => {
            let if_version = json!({
                "description": "The version that the change is meant for; conflict when it is not the current one.",
                "type": "integer", "minimum": i64::MIN, "maximum": i64::MAX,
            });
            fields(false).into_iter().chain([optional("if_version", if_version)]).collect()
        }
        Command::SmtpConfigTest => fields(false),
        Command::SmtpConfigGet | Command::SmtpConfigDelete => Vec::new(),
        Command::SendTestEmail => vec![required("to", address("The recipient."))],
        Command::FeatureSet => vec![
            required("feature", json!({"const": feature_set::CUSTOM_SMTP})),
            required("enabled", json!({"type": "boolean"})),
        ],
        Command::JobStatus => vec![required("id", uuid())],
        Command::JobCancel => {
            let group = json!({
                "description": "The booking's UID. Without control characters.",
                "type": "string", "minLength": 1, "maxLength": Revision::GROUP_MAX, "pattern": NO_CONTROLS,
            });
            let sequence = json!({
                "description": "The revision that is called back, and all below.",
                "type": "integer", "minimum": 0, "maximum": i64::MAX,
            });
            vec![optional("id", uuid()), optional("group", group), optional("sequence", sequence)]
        }
    }
}

/// What the parameters have to be together, as alternatives.
fn rule(command: Command) -> Option<Value> {
    match command {
        Command::SmtpConfigUpdate => {
            Some(fields(false).iter().map(|field| json!({"required": [field.name]})).collect())
        }
        Command::JobCancel => Some(json!([
            {"required": ["id"], "not": {"anyOf": [{"required": ["group"]}, {"required": ["sequence"]}]}},
            {"required": ["group", "sequence"], "not": {"required": ["id"]}},
        ])),
        _ => None,
    }
}

/// What makes a configuration.
fn fields(is_required: bool) -> Vec<Param> {
    let optional = ["secure", "max_connections", "messages_per_minute"];
    let field = |name, schema| Param { name, is_required: is_required && !optional.contains(&name), schema };
    let limit = |description: &str, range: &std::ops::RangeInclusive<u32>| {
        json!({
            "description": format!("{description} null: what is known of the provider."),
            "type": ["integer", "null"], "minimum": range.start(), "maximum": range.end(),
        })
    };
    let credential = |description: &str| {
        json!({
            "description": format!("{description} At most {CREDENTIAL_MAX} bytes, without control characters. No answer holds it."),
            "type": "string", "minLength": 1, "maxLength": CREDENTIAL_MAX, "pattern": NO_CONTROLS, "writeOnly": true,
        })
    };
    vec![
        field("from_email", address("The sender's address.")),
        field(
            "from_name",
            json!({
                "description": format!("The sender's name, at most {NAME_MAX} bytes. Control characters become a space."),
                "type": "string", "minLength": 1, "maxLength": NAME_MAX,
            }),
        ),
        field(
            "host",
            json!({
                "description": "The server's name or address. Every address of it must be public.",
                "type": "string", "minLength": 1, "pattern": NO_CONTROLS, "examples": ["smtp.example.org"],
            }),
        ),
        field(
            "port",
            json!({
                "description": "465 and 2465 are TLS from the first byte whatever secure says.",
                "type": "integer", "minimum": 1, "maximum": u16::MAX, "examples": [587],
            }),
        ),
        field("username", credential("The account's user name.")),
        field("password", credential("The account's password.")),
        field(
            "secure",
            json!({
                "description": "Whether the server must offer TLS.", "type": "boolean", "default": true,
            }),
        ),
        field(
            "max_connections",
            limit("Connections that the account may have at once, over all workers.", &CONNECTIONS_RANGE),
        ),
        field(
            "messages_per_minute",
            limit("Messages that the account may send in a minute, over all workers.", &PER_MINUTE_RANGE),
        ),
    ]
}

fn address(description: &str) -> Value {
    json!({
        "description": format!("{description} The address alone; its domain is a host name with at least one dot."),
        "type": "string", "maxLength": ADDRESS_MAX, "pattern": r"^[^\x00-\x1f\x7f]+@[^\x00-\x1f\x7f@]+$",
        "examples": ["ann@example.org"],
    })
}
