//! Who may command what, which answer says so, and what is on record of it.

use sendoff::control::{CommandMeta, ControlRules};
use serde_json::{Value, json};

use super::{PASSWORD, PUBLIC, World, bare, code, settings, settings_with, text};
use crate::support::dns::Answer;

#[tokio::test]
async fn every_refused_create_says_which_field_and_why() {
    let world = World::enabled("acme").await;
    world.dns.script("private.example.org", Answer::addresses(&[PUBLIC, "10.0.0.1"]), 60);
    world.dns.script("empty.example.org", Answer::addresses(&[]), 60);
    world.dns.script("broken.example.org", Answer::ServerFailure, 60);
    for (params, expected) in [
        (settings_with(json!({"from_email": "events"})), code("invalid_field", "from_email")),
        (settings_with(json!({"from_name": "\r\n"})), code("invalid_field", "from_name")),
        (settings_with(json!({"host": "mail.example.org:587"})), code("invalid_field", "host")),
        (settings_with(json!({"port": "587"})), code("invalid_field", "port")),
        (settings_with(json!({"port": 26})), code("port_not_allowed", "port")),
        (settings_with(json!({"password": ""})), code("invalid_field", "password")),
        (settings_with(json!({"secure": null})), code("invalid_field", "secure")),
        (settings_with(json!({"tls": true})), code("invalid_request", "tls")),
        (json!({"from_email": "a@example.org"}), code("invalid_request", "from_name")),
        (json!({}), code("invalid_request", "from_email")),
        (settings_with(json!({"host": "localhost"})), code("host_not_public", "host")),
        (settings_with(json!({"host": "mailpit"})), code("host_not_public", "host")),
        (settings_with(json!({"host": "smtp.corp.internal"})), code("host_not_public", "host")),
        (settings_with(json!({"host": "0x7f.1"})), code("host_not_public", "host")),
        (settings_with(json!({"host": "[::1]"})), code("host_not_public", "host")),
        (settings_with(json!({"host": "169.254.169.254"})), code("host_not_public", "host")),
        (settings_with(json!({"host": "private.example.org"})), code("host_not_public", "host")),
        (settings_with(json!({"host": "empty.example.org"})), code("host_not_found", "host")),
        (settings_with(json!({"host": "missing.example.org"})), code("host_not_found", "host")),
        (settings_with(json!({"host": "broken.example.org"})), code("dns_failed", "host")),
    ] {
        let shown = params["host"].clone();
        assert_eq!(world.error("smtp_config.create", "acme", params).await, expected, "{shown}");
    }
    assert_eq!(world.count("SELECT count(*) FROM smtp_configs").await, 0);
    assert_eq!(world.count("SELECT smtp_version FROM organizations").await, 0);
    assert_eq!(world.dns.questions("mailpit") + world.dns.questions("smtp.corp.internal"), 0);
}

#[tokio::test]
async fn the_fixed_messages_are_the_contracts() {
    let world = World::new().await;
    let message = async |command: &str, params: Value| {
        text(&world.ask_on(command, "acme", params).await["error"]["message"])
    };
    let disabled = "Custom SMTP is not enabled for this organization";
    assert_eq!(message("smtp_config.create", settings()).await, disabled);
    assert_eq!(message("smtp_config.update", json!({"port": 25})).await, disabled);
    world.enable("acme").await;
    assert_eq!(message("smtp_config.get", json!({})).await, "SMTP configuration not found");
    assert_eq!(message("smtp_config.update", json!({"port": 25})).await, "SMTP configuration not found");
    let private = settings_with(json!({"host": "10.0.0.1"}));
    assert_eq!(message("smtp_config.create", private).await, "SMTP host must be a public address");
    world.ok("smtp_config.create", "acme", settings()).await;
    assert_eq!(
        message("smtp_config.create", settings()).await,
        "Organization already has an SMTP configuration. Please delete the existing one first."
    );
    assert_eq!(
        message("smtp_config.update", json!({"host": "other.example.org"})).await,
        "Enter the SMTP password again: it is only ever sent to the server it was entered for."
    );
}

#[tokio::test]
async fn a_body_that_is_no_command_is_an_invalid_request() {
    let world = World::new().await;
    for body in [&b"hello"[..], b"", b"[]", b"\xff\xfe", b"{\"command\":\"smtp_config.get\"", &[b'['; 70_000]]
    {
        let response = world.control.handle(body, CommandMeta::default()).await;
        assert_eq!((response.code(), response.command()), ("invalid_request", "unknown"));
    }
    let twice = br#"{"command":"smtp_config.update","organization_id":"a","params":{"port":25,"port":465}}"#;
    let response = world.control.handle(twice, CommandMeta::default()).await;
    assert_eq!(response.outcome().unwrap_err().field.as_deref(), Some("port"));
    assert_eq!(world.error("smtp_config.probe", "a", json!({})).await, code("invalid_request", "command"));
    assert_eq!(world.error("smtp_config.get", "a", json!({"id": 1})).await, code("invalid_request", "id"));
    assert_eq!(world.error("smtp_config.update", "a", json!({})).await, code("invalid_request", "params"));
    assert_eq!(
        world.error("smtp_config.update", "a", json!({"if_version": 1})).await,
        code("invalid_request", "params")
    );
    assert_eq!(
        world.error("feature.set", "a", json!({"feature": "x", "enabled": true})).await,
        code("invalid_field", "feature")
    );
    assert_eq!(
        world.error("feature.set", "a", json!({"feature": "custom-smtp-for-orgs"})).await,
        code("invalid_request", "enabled")
    );
}

#[tokio::test]
async fn with_the_flag_off_a_configuration_can_be_seen_and_deleted_only() {
    let world = World::enabled("acme").await;
    world.ok("smtp_config.create", "acme", settings()).await;
    let off = json!({"feature": "custom-smtp-for-orgs", "enabled": false});
    assert_eq!(world.ok("feature.set", "acme", off).await, json!({"enabled": false}));
    assert!(!world.facts("acme").await.custom_smtp);
    world.ok("smtp_config.get", "acme", json!({})).await;
    let refused = world.error("smtp_config.update", "acme", json!({"port": 25})).await;
    assert_eq!(refused, bare("feature_disabled"));
    world.ok("smtp_config.delete", "acme", json!({})).await;
}

#[tokio::test]
async fn no_flag_is_asked_for_where_every_organization_may() {
    let world =
        World::with_rules(ControlRules { custom_smtp_for_all: true, ..ControlRules::default() }).await;
    world.ok("smtp_config.create", "acme", settings()).await;
}

#[tokio::test]
async fn only_the_allowed_users_may_command() {
    let rules = ControlRules {
        custom_smtp_for_all: true,
        allowed_users: vec!["booking".into()],
        ..ControlRules::default()
    };
    let world = World::with_rules(rules).await;
    let command = json!({"command": "smtp_config.create", "organization_id": "acme", "params": settings()});
    for user_id in [None, Some("guest"), Some(""), Some("booking2")] {
        let meta = CommandMeta { user_id: user_id.map(str::to_owned), ..CommandMeta::default() };
        let response = world.control.handle(command.to_string().as_bytes(), meta).await;
        assert_eq!(response.code(), "not_allowed");
    }
    assert_eq!(world.count("SELECT count(*) FROM smtp_configs").await, 0);
    let refused = "SELECT count(*) FROM audit WHERE outcome = 'not_allowed' AND organization_id = 'acme'";
    assert_eq!(world.count(refused).await, 4);
    let meta = CommandMeta { user_id: Some("booking".into()), ..CommandMeta::default() };
    let response = world.control.handle(command.to_string().as_bytes(), meta).await;
    assert_eq!(response.code(), "ok");
    assert_eq!(
        world.count("SELECT count(*) FROM audit WHERE user_id = 'booking' AND outcome = 'ok'").await,
        1
    );
}

#[tokio::test]
async fn every_command_leaves_a_row_that_names_who_what_and_the_outcome() {
    let world = World::enabled("acme").await;
    let command = |command: &str, params: Value| json!({"command": command, "organization_id": "acme", "actor": "user:7", "params": params});
    for (name, params) in [
        ("smtp_config.create", settings_with(json!({"port": 26}))),
        ("smtp_config.create", settings()),
        ("smtp_config.create", settings()),
        ("smtp_config.update", json!({"port": 25, "password": PASSWORD})),
        ("smtp_config.get", json!({})),
        ("smtp_config.get", json!({"nonsense": 1})),
        ("smtp_config.delete", json!({})),
    ] {
        world.send_on(&command(name, params)).await;
    }
    type Row = (Option<String>, String, String, String, Vec<String>);
    let rows: Vec<Row> =
        sqlx::query_as("SELECT actor, organization_id, command, outcome, fields FROM audit ORDER BY id")
            .fetch_all(&world.pool)
            .await
            .unwrap();
    let outcomes: Vec<(&str, &str)> = rows.iter().map(|row| (row.2.as_str(), row.3.as_str())).collect();
    assert_eq!(
        outcomes,
        [
            ("feature.set", "ok"),
            ("smtp_config.create", "port_not_allowed"),
            ("smtp_config.create", "ok"),
            ("smtp_config.create", "already_exists"),
            ("smtp_config.update", "ok"),
            ("smtp_config.get", "ok"),
            ("smtp_config.get", "invalid_request"),
            ("smtp_config.delete", "ok"),
        ]
    );
    assert!(rows[1..].iter().all(|row| row.0.as_deref() == Some("user:7") && row.1 == "acme"));
    assert_eq!(rows[4].4, ["port", "password"]);
}

#[tokio::test]
async fn a_job_is_shown_to_its_own_organization_only() {
    let world = World::new().await;
    world
        .sql("INSERT INTO jobs (id, organization_id, state, turn, owner, attempts, first_at, updated_at, reason, reply)
              VALUES ('01936a5e-0000-7000-8000-000000000001', 'acme', 'dead', 1, 0, 3, now(), now(), 'message_refused', '550 no'),
                     ('01936a5e-0000-7000-8000-000000000002', '', 'sent', 0, 0, 1, now(), now(), NULL, NULL)")
        .await;
    let (first, second) = (
        json!({"id": "01936a5e-0000-7000-8000-000000000001"}),
        json!({"id": "01936a5e-0000-7000-8000-000000000002"}),
    );
    let shown = world.ok("job.status", "acme", first.clone()).await;
    let contract = json!({"id": first["id"], "organization_id": "acme", "state": "dead", "reason": "message_refused",
        "attempts": 3, "next_attempt_at": null, "message_id": null, "reply": "550 no", "history": []});
    for (key, value) in contract.as_object().expect("an object") {
        assert_eq!(shown.get(key), Some(value), "{key}: {shown}");
    }
    assert_eq!(world.error("job.status", "evil", first).await, code("not_found", "id"));
    assert_eq!(world.error("job.status", "acme", second.clone()).await, code("not_found", "id"));
    assert_eq!(world.error("job.status", "acme", json!({"id": "x"})).await, code("invalid_field", "id"));
    let platforms = world.send_on(&json!({"command": "job.status", "params": second})).await.0;
    assert_eq!(
        (&platforms["result"]["state"], &platforms["result"]["organization_id"]),
        (&json!("sent"), &Value::Null)
    );
}
