//! The commands' schema against what the commands themselves know and judge.

use std::sync::LazyLock;

use boon::{Compiler, SchemaIndex, Schemas};
use serde_json::{Value, json};
use time::macros::datetime;

use super::*;
use crate::control::error::{Code, ControlError, Response};
use crate::control::params_of;
use crate::control::request::Request;
use crate::control::smtp_config_get::view;
use crate::control::smtp_params::SmtpParams;
use crate::model::organization::OrganizationId;
use crate::model::provider::Overrides;
use crate::store::{LastTest, SmtpConfig};

const ID: &str = "0198c0de-0000-7000-8000-000000000001";

/// The whole document, and its reply.
static SCHEMA: LazyLock<(Schemas, SchemaIndex, SchemaIndex)> = LazyLock::new(|| {
    let mut schemas = Schemas::new();
    let mut compiler = Compiler::new();
    compiler.enable_format_assertions();
    compiler.add_resource(SCHEMA_ID, command_schema()).unwrap();
    let mut compile = |place: &str| {
        compiler.compile(place, &mut schemas).unwrap_or_else(|error| panic!("{place}: {error:#}"))
    };
    let (command, reply) = (compile(SCHEMA_ID), compile(&format!("{SCHEMA_ID}#/$defs/Reply")));
    (schemas, command, reply)
});

fn by_the_schema(body: &Value) -> Result<(), String> {
    SCHEMA.0.validate(body, SCHEMA.1).map_err(|error| format!("{error:#}"))
}

/// What the reader says, before anything is looked up.
fn by_the_reader(body: &Value) -> Result<(), ControlError> {
    let request = Request::read(body.to_string().as_bytes());
    if let Some(fault) = request.fault {
        return Err(fault);
    }
    let command = request.command.unwrap();
    request.params.check_known(params_of(command))?;
    SmtpParams::read(&request.params)?;
    Ok(())
}

#[test]
fn every_command_is_described_with_its_parameters_and_no_others() {
    for command in Command::ALL {
        let described: Vec<_> = params(command).iter().map(|param| param.name).collect();
        assert_eq!(described, params_of(command), "{}", command.as_str());
    }
}

#[test]
fn a_command_that_is_understood_fits_the_schema() {
    let whole = json!({
        "from_email": "a@example.org", "from_name": "A", "host": "smtp.example.org", "port": 587, "username": "u",
        "password": "p ä", "secure": false, "max_connections": 3, "messages_per_minute": null,
    });
    let mut versioned = whole.clone();
    versioned["if_version"] = json!(7);
    for (command, params) in [
        ("smtp_config.create", whole.clone()),
        ("smtp_config.get", json!({})),
        ("smtp_config.get", json!(null)),
        ("smtp_config.update", json!({"port": 465})),
        ("smtp_config.update", versioned),
        ("smtp_config.delete", json!(null)),
        ("feature.set", json!({"feature": "custom-smtp-for-orgs", "enabled": true})),
        ("smtp_config.test", json!(null)),
        ("smtp_config.test", json!({"port": 465})),
        ("smtp_config.test", whole),
        ("smtp_config.send_test_email", json!({"to": "ann@example.org"})),
        ("job.status", json!({"id": ID})),
        ("job.cancel", json!({"id": ID})),
        ("job.cancel", json!({"group": "booking-1", "sequence": 3})),
    ] {
        for organization in [json!(42), json!("acme")] {
            for actor in [json!("user:7"), json!(null)] {
                let body = json!({"command": command, "organization_id": organization, "actor": actor, "params": params});
                assert_eq!(by_the_reader(&body), Ok(()), "{body}");
                assert_eq!(by_the_schema(&body), Ok(()), "{body}");
            }
        }
    }
    let platforms = json!({"command": "job.status", "params": {"id": ID}});
    assert_eq!(by_the_schema(&platforms), Ok(()));
    let bare = json!({"command": "smtp_config.get", "organization_id": 42});
    assert_eq!(by_the_schema(&bare), Ok(()));
}

#[test]
fn what_the_reader_refuses_does_not_fit() {
    let with =
        |command: &str, params: Value| json!({"command": command, "organization_id": 42, "params": params});
    let update = |params: Value| with("smtp_config.update", params);
    for body in [
        json!([]),
        json!({}),
        json!({"command": "smtp_config.grt", "organization_id": 42}),
        json!({"command": "smtp_config.get"}),
        json!({"command": "smtp_config.get", "organization_id": null}),
        json!({"command": "smtp_config.get", "organization_id": "a b"}),
        json!({"command": "smtp_config.get", "organization_id": 1.5}),
        json!({"command": "smtp_config.get", "organization_id": 42, "org": 1}),
        json!({"command": "smtp_config.get", "organization_id": 42, "actor": "a\nb"}),
        json!({"command": "smtp_config.get", "organization_id": 42, "actor": "ä".repeat(129)}),
        with("smtp_config.get", json!([])),
        with("smtp_config.get", json!({"id": 1})),
        update(json!({"from_email": "nobody"})),
        update(json!({"from_email": null})),
        update(json!({"from_name": ["x"]})),
        update(json!({"from_name": "x".repeat(513)})),
        update(json!({"host": ""})),
        update(json!({"host": "mail.example.org\r\nQUIT"})),
        update(json!({"port": 0})),
        update(json!({"port": 65536})),
        update(json!({"port": "587"})),
        update(json!({"username": ""})),
        update(json!({"password": "a\nb"})),
        update(json!({"password": "x".repeat(1025)})),
        update(json!({"secure": 1})),
        update(json!({"max_connections": 0})),
        update(json!({"messages_per_minute": "30"})),
        update(json!({"hots": "smtp.example.org"})),
    ] {
        assert!(by_the_reader(&body).is_err(), "the reader takes {body}");
        assert!(by_the_schema(&body).is_err(), "the schema takes {body}");
    }
    // Judged by each command's own file.
    for body in [
        with("smtp_config.create", json!({"host": "smtp.example.org"})),
        update(json!({})),
        update(json!({"if_version": 3})),
        update(json!({"port": 25, "if_version": "3"})),
        with("feature.set", json!({"feature": "other", "enabled": true})),
        with("feature.set", json!({"feature": "custom-smtp-for-orgs"})),
        with("job.status", json!({"id": "7"})),
        json!({"command": "job.status"}),
        with("smtp_config.send_test_email", json!({"to": "Ann"})),
        with("smtp_config.send_test_email", json!(null)),
        with("job.cancel", json!({})),
        with("job.cancel", json!({"id": ID, "group": "booking-1"})),
        with("job.cancel", json!({"group": "booking-1"})),
        with("job.cancel", json!({"group": "", "sequence": 3})),
        with("job.cancel", json!({"group": "booking-1", "sequence": -1})),
    ] {
        assert!(by_the_schema(&body).is_err(), "the schema takes {body}");
    }
}

#[test]
fn replies_are_of_the_described_form() {
    let at = datetime!(2030-01-07 09:00 UTC);
    let last_test = LastTest { at, ok: false, code: Some("auth_failed".into()) };
    let config = SmtpConfig {
        version: 3,
        from_email: "a@example.org".into(),
        from_name: "A".into(),
        host: "smtp.example.org".into(),
        port: 587,
        secure: true,
        overrides: Overrides { messages_per_minute: Some(30), ..Overrides::default() },
        last_test: Some(last_test),
        failing: None,
        created_at: at,
        updated_at: at,
    };
    let view = view(&OrganizationId::from_integer(42), &config);
    let document = command_schema();
    let described = document["$defs"]["Configuration"]["properties"].as_object().unwrap();
    assert_eq!(
        described.keys().collect::<std::collections::BTreeSet<_>>(),
        view.as_object().unwrap().keys().collect()
    );
    let errors =
        Code::ALL.iter().map(|code| Err(ControlError::new(*code, "No.").field("host").hint("Look.")));
    for outcome in [Ok(view), Ok(json!({})), Ok(json!({"enabled": true}))].into_iter().chain(errors) {
        let reply: Value = serde_json::from_slice(&Response::new("x", outcome).to_json()).unwrap();
        let verdict = SCHEMA.0.validate(&reply, SCHEMA.2).map_err(|error| format!("{error:#}"));
        assert_eq!(verdict, Ok(()), "{reply}");
    }
    for bad in [json!({"ok": true}), json!({"ok": false, "error": {"code": "nonsense", "message": ""}})] {
        assert!(SCHEMA.0.validate(&bad, SCHEMA.2).is_err(), "{bad}");
    }
}
