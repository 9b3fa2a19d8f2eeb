//! The replies to the commands as JSON Schemas.
//! Guarantee: every error code is listed; results may gain fields, so unknown ones are allowed in them.

use serde_json::{Value, json};

use crate::control::error::Code;
use crate::control::request::Command;
use crate::model::ledger::State;
use crate::model::schema::{definition, or_null, reason, time, uuid};

/// What a command's result is: the name of a definition.
pub(super) fn result_of(command: Command) -> &'static str {
    match command {
        Command::SmtpConfigCreate | Command::SmtpConfigGet | Command::SmtpConfigUpdate => "Configuration",
        Command::SmtpConfigDelete => "Nothing",
        Command::SmtpConfigTest => "TestReport",
        Command::SendTestEmail => "TestEmail",
        Command::FeatureSet => "Feature",
        Command::JobStatus => "JobStatus",
        Command::JobCancel => "Cancellation",
    }
}

pub(super) fn definitions() -> Vec<(String, Value)> {
    let mut results: Vec<_> = Command::ALL.iter().map(|command| result_of(*command)).collect();
    results.sort_unstable();
    results.dedup();
    let results: Vec<_> = results.into_iter().map(definition).collect();
    let named = [
        ("Reply", reply(&results)),
        ("Error", error()),
        ("Reason", reason()),
        ("Configuration", configuration()),
        ("Nothing", json!({"description": "An empty object.", "type": "object", "maxProperties": 0})),
        ("TestReport", test_report()),
        ("TestEmail", test_email()),
        ("Feature", object("Whether the organization has it.", json!({"enabled": {"type": "boolean"}}), &[])),
        ("JobStatus", job_status()),
        ("Cancellation", cancellation()),
    ];
    named.into_iter().map(|(name, schema)| (name.to_owned(), schema)).collect()
}

fn reply(results: &[Value]) -> Value {
    json!({
        "title": "Sendoff reply",
        "description": "With the command's correlation_id. Within 10 s; for a test within 20 s, for a test email within 60 s.",
        "oneOf": [
            {
                "type": "object",
                "properties": {
                    "ok": {"const": true},
                    "result": {"description": "Of the kind that the command's description names.", "anyOf": results},
                },
                "required": ["ok", "result"],
                "additionalProperties": false,
            },
            {
                "type": "object",
                "properties": {"ok": {"const": false}, "error": definition("Error")},
                "required": ["ok", "error"],
                "additionalProperties": false,
            },
        ],
    })
}

fn error() -> Value {
    let properties = json!({
        "code": code(),
        "message": {"description": "What is wrong and what is allowed, for a person.", "type": "string"},
        "field": {"description": "The field at fault.", "type": "string"},
        "hint": {"description": "What to do about it.", "type": "string"},
    });
    object("Why a command was not carried out, or a test failed.", properties, &["field", "hint"])
}

fn code() -> Value {
    let codes: Vec<_> = Code::ALL.iter().map(|code| code.as_str()).collect();
    json!({"type": "string", "enum": codes})
}

fn configuration() -> Value {
    let last_test = json!({
        "at": time(),
        "ok": {"type": "boolean"},
        "code": {"description": "Of the error, when it failed.", "anyOf": [code(), {"type": "null"}]},
    });
    let properties = json!({
        "organization_id": definition("OrganizationId"),
        "version": {"description": "Grows with every change and never restarts.", "type": "integer", "minimum": 1},
        "from_email": {"type": "string"},
        "from_name": {"type": "string"},
        "host": {"type": "string"},
        "port": {"type": "integer", "minimum": 1, "maximum": u16::MAX},
        "secure": {"type": "boolean"},
        "limits": limits(),
        "last_test": or_null(&object("The last connection test of this host and these credentials.", last_test, &[])),
        "status": {
            "description": "failing: its mail waits (parked) until a connection test succeeds.", "enum": ["ok", "failing"],
        },
        "created_at": time(),
        "updated_at": time(),
    });
    object("A configuration, without user name and password.", properties, &["limits"])
}

fn limits() -> Value {
    let limit =
        |description: &str| json!({"description": description, "type": ["integer", "null"], "minimum": 1});
    let properties = json!({
        "max_connections": limit("Connections at once; null: not limited."),
        "messages_per_minute": limit("Messages a minute; null: not limited."),
        "source": {"description": "The provider by whose known limits it is so, or configuration.", "type": "string"},
    });
    object("What the account is limited to, over all workers; left out where it is not.", properties, &[])
}

fn test_report() -> Value {
    let sentences =
        |description: &str| json!({"description": description, "type": "array", "items": {"type": "string"}});
    let step = json!({
        "step": {"enum": ["resolve", "address", "connect", "greeting", "tls", "authenticate"]},
        "ok": {"type": "boolean"},
        "ms": {"description": "How long it took, in milliseconds.", "type": "integer", "minimum": 0},
        "detail": {"description": "What was found, for a person.", "type": "string"},
    });
    let properties = json!({
        "ok": {"description": "Whether every step went through.", "type": "boolean"},
        "steps": {
            "description": "In order; the last one is the one that failed.",
            "type": "array", "items": object("A step.", step, &[]),
        },
        "warnings": sentences("What does not fail the test but may hurt delivery."),
        "notes": sentences("What was found beside, and what a test cannot tell."),
        "error": definition("Error"),
    });
    object("What a connection test found.", properties, &["error"])
}

fn test_email() -> Value {
    let properties = json!({
        "message_id": {"description": "With angle brackets.", "type": "string"},
        "response": {"description": "The server's reply, its addresses masked.", "type": "string"},
    });
    object("A test email that the server accepted.", properties, &[])
}

fn job_status() -> Value {
    let states: Vec<_> = State::ALL.iter().map(|state| state.as_str()).collect();
    let text = |description: &str| json!({"description": description, "type": ["string", "null"]});
    let properties = json!({
        "id": uuid(),
        "organization_id": or_null(&definition("OrganizationId")),
        "state": {"enum": states},
        "reason": or_null(&definition("Reason")),
        "attempts": {"type": "integer", "minimum": 0},
        "next_attempt_at": or_null(&time()),
        "message_id": text("With angle brackets."),
        "reply": text("The server's last reply, its addresses masked."),
        "history": {"description": "The attempts that are kept.", "type": "array", "items": {"type": "object"}},
        "detail": text("More about the reason."),
        "refused": {"description": "Recipients that were refused for good.", "type": "array", "items": {"type": "object"}},
        "first_at": or_null(&time()),
        "updated_at": time(),
        "letter": {"description": "The archive's name for it, where only the archive knows the job.", "type": "string"},
        "platform": {"description": "Given together with letter: whether it is the platform's.", "type": "boolean"},
    });
    object("What is known of a job.", properties, &["letter", "platform"])
}

fn cancellation() -> Value {
    let properties = json!({
        "cancelled": {"description": "Jobs that are not sent any more.", "type": "integer", "minimum": 0},
        "too_late": {"description": "Jobs that were sent, or may have been.", "type": "integer", "minimum": 0},
    });
    object("What became of the jobs that were called back.", properties, &[])
}

/// An object whose properties are all there, but for those named.
fn object(description: &str, properties: Value, optional: &[&str]) -> Value {
    let names = properties.as_object().into_iter().flat_map(|properties| properties.keys());
    let required: Vec<_> = names.filter(|name| !optional.contains(&name.as_str())).cloned().collect();
    json!({"description": description, "type": "object", "properties": properties, "required": required})
}
