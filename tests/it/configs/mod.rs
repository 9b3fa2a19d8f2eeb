//! The control commands and the configuration store, against a real PostgreSQL.
//! Guarantee: each test has a database of its own; nothing is dialled, names are answered by a scripted name server.

mod keeping;
mod outages;
mod refusals;
mod updates;

use std::sync::Arc;
use std::time::{Duration, Instant};

use secrecy::{ExposeSecret, SecretString};
use sendoff::clock::Clock;
use sendoff::control::{CommandMeta, Control, ControlRules};
use sendoff::egress::{AllowedPorts, Egress, EgressPolicy};
use sendoff::model::organization::OrganizationId;
use sendoff::model::smtp_settings::{SmtpAccount, TlsMode};
use sendoff::secrets::KeyRing;
use sendoff::store::{RouteFacts, SmtpConfigs, Store, StoredAccount};
use serde_json::{Value, json};
use sqlx::PgPool;
use time::macros::datetime;

use crate::support::connector::connector;
use crate::support::database::TestDatabase;
use crate::support::dns::{Answer, DnsServer};

/// Looked up only, never dialled.
const PUBLIC: &str = "93.184.215.14";
/// Neither may ever be seen in a reply, an event, the audit log or `Debug`.
const USERNAME: &str = " canary-user-7c1f ";
const PASSWORD: &str = " canary-pässword-9e2d\" ";
/// Well above the ten seconds within which every command is answered, for a machine that is busy with other tests.
const DEADLINE: Duration = Duration::from_secs(40);

struct World {
    store: Store,
    pool: PgPool,
    keys: Arc<KeyRing>,
    configs: SmtpConfigs,
    dns: DnsServer,
    control: Control,
    database: TestDatabase,
}

fn key(id: &str) -> SecretString {
    KeyRing::generate(id).unwrap()
}

fn ring(keys: &[SecretString]) -> Arc<KeyRing> {
    Arc::new(KeyRing::parse(keys).unwrap())
}

impl World {
    async fn new() -> Self {
        Self::with_rules(ControlRules::default()).await
    }

    async fn with_rules(rules: ControlRules) -> Self {
        let database = TestDatabase::migrated().await;
        let store = Store::new(&database.url(), 8).unwrap();
        let keys = ring(&[key("k1")]);
        let configs = SmtpConfigs::new(store.clone(), keys.clone());
        let dns = DnsServer::start().await;
        dns.script("mail.example.org", Answer::addresses(&[PUBLIC]), 60);
        dns.script("other.example.org", Answer::addresses(&[PUBLIC]), 60);
        let control = control(&store, &configs, &dns, rules);
        let pool = PgPool::connect(database.url().expose_secret()).await.unwrap();
        Self { store, pool, keys, configs, dns, control, database }
    }

    /// With the flag of the organization on.
    async fn enabled(organization: &str) -> Self {
        let world = Self::new().await;
        world.enable(organization).await;
        world
    }

    async fn enable(&self, organization: &str) {
        let params = json!({"feature": "custom-smtp-for-orgs", "enabled": true});
        self.ok("feature.set", organization, params).await;
    }

    /// The reply, and what is to be announced since this was last asked.
    async fn send_on(&self, command: &Value) -> (Value, Vec<Value>) {
        let reply = self.answered(command).await;
        let due = self.store.take_config_events(100, DEADLINE).await.unwrap();
        self.store.forget_config_events(&due).await.unwrap();
        (reply, due.iter().map(|due| serde_json::to_value(&due.event).unwrap()).collect())
    }

    /// The reply to who meets many others, or a busy server: again where it was not done in time, which says that nothing was
    /// changed.
    async fn answered(&self, command: &Value) -> Value {
        let begun = Instant::now();
        loop {
            let reply = send(&self.control, command).await;
            if reply["error"]["code"] != "unavailable" || begun.elapsed() > DEADLINE {
                return reply;
            }
        }
    }

    async fn ask(&self, command: &str, organization: &str, params: Value) -> Value {
        let command = json!({"command": command, "organization_id": organization, "params": params});
        send(&self.control, &command).await
    }

    async fn ok(&self, command: &str, organization: &str, params: Value) -> Value {
        let reply = self.ask_on(command, organization, params).await;
        assert_eq!(reply["ok"], true, "{command}: {reply}");
        reply["result"].clone()
    }

    async fn ask_on(&self, command: &str, organization: &str, params: Value) -> Value {
        self.answered(&json!({"command": command, "organization_id": organization, "params": params})).await
    }

    /// The error's code and field.
    async fn error(&self, command: &str, organization: &str, params: Value) -> (String, Option<String>) {
        let reply = self.ask_on(command, organization, params).await;
        assert_eq!(reply["ok"], false, "{command}: {reply}");
        (text(&reply["error"]["code"]), reply["error"]["field"].as_str().map(str::to_owned))
    }

    async fn account(&self, organization: &str) -> Arc<SmtpAccount> {
        account(&self.facts(organization).await)
    }

    async fn facts(&self, organization: &str) -> RouteFacts {
        self.configs.load_for_sending(&id(organization)).await.unwrap()
    }

    async fn sql(&self, statement: &'static str) {
        sqlx::raw_sql(statement).execute(&self.pool).await.unwrap();
    }

    async fn count(&self, query: &'static str) -> i64 {
        sqlx::query_scalar(query).fetch_one(&self.pool).await.unwrap()
    }
}

fn control(store: &Store, configs: &SmtpConfigs, dns: &DnsServer, rules: ControlRules) -> Control {
    let ports = AllowedPorts::Only([25, 465, 587].into());
    let policy = EgressPolicy::new(Vec::new(), Vec::new(), ports);
    let egress = Egress::new(policy, &[dns.address()]).unwrap();
    let clock = Clock::manual(datetime!(2026-11-22 20:00 UTC));
    Control::new(store.clone(), configs.clone(), connector(Arc::new(egress)), clock, rules)
}

async fn send(control: &Control, command: &Value) -> Value {
    let response = control.handle(command.to_string().as_bytes(), CommandMeta::default()).await;
    serde_json::from_slice(&response.to_json()).unwrap()
}

fn account(facts: &RouteFacts) -> Arc<SmtpAccount> {
    match &facts.account {
        StoredAccount::Ready { account, .. } => account.clone(),
        other => panic!("not ready: {other:?}"),
    }
}

fn id(organization: &str) -> OrganizationId {
    OrganizationId::parse(organization).unwrap()
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_else(|| panic!("{value} is no string")).to_owned()
}

fn settings() -> Value {
    json!({"from_email": "Events@Example.org", "from_name": "Example Events", "host": "Mail.Example.ORG.",
        "port": 587, "username": USERNAME, "password": PASSWORD})
}

/// `create`'s parameters with some of them replaced.
fn settings_with(changes: Value) -> Value {
    let mut params = settings();
    for (name, value) in changes.as_object().unwrap() {
        params[name] = value.clone();
    }
    params
}

fn code(code: &str, field: &str) -> (String, Option<String>) {
    (code.to_owned(), Some(field.to_owned()))
}

fn bare(code: &str) -> (String, Option<String>) {
    (code.to_owned(), None)
}

#[tokio::test]
async fn a_configuration_is_created_shown_changed_and_deleted() {
    let world = World::enabled("42").await;
    let (reply, events) = world
        .send_on(&json!({"command": "smtp_config.create", "organization_id": 42, "params": settings()}))
        .await;
    assert_eq!(reply["ok"], true, "{reply}");
    let created = &reply["result"];
    let names: Vec<&str> = created.as_object().unwrap().keys().map(String::as_str).collect();
    let mut expected = [
        "organization_id",
        "version",
        "from_email",
        "from_name",
        "host",
        "port",
        "secure",
        "last_test",
        "status",
        "created_at",
        "updated_at",
    ];
    expected.sort_unstable();
    assert_eq!(names, expected);
    assert_eq!(created["organization_id"], 42);
    assert_eq!((&created["version"], &created["secure"]), (&json!(1), &json!(true)));
    assert_eq!(
        (&created["from_email"], &created["host"]),
        (&json!("Events@example.org"), &json!("mail.example.org"))
    );
    assert_eq!((&created["last_test"], &created["status"]), (&Value::Null, &json!("ok")));
    let at = &events[0]["at"];
    assert_eq!(at, &created["created_at"], "the change's time is the event's");
    let event = json!({"type": "smtp_config.created", "at": at, "organization_id": 42, "version": 1});
    assert_eq!(events, [event]);

    let shown = world.ok("smtp_config.get", "42", json!({})).await;
    assert_eq!(shown["organization_id"], "42");
    assert_eq!(shown["created_at"], created["created_at"]);

    let (reply, events) = world
        .send_on(&json!({"command": "smtp_config.update", "organization_id": "42", "params": {"from_name": "Box office"}}))
        .await;
    assert_eq!(
        (&reply["result"]["version"], &reply["result"]["from_name"]),
        (&json!(2), &json!("Box office"))
    );
    assert_eq!(reply["result"]["host"], "mail.example.org");
    assert_eq!((&events[0]["type"], &events[0]["version"]), (&json!("smtp_config.updated"), &json!(2)));

    let (reply, events) =
        world.send_on(&json!({"command": "smtp_config.delete", "organization_id": "42"})).await;
    assert_eq!(reply, json!({"ok": true, "result": {}}));
    assert_eq!(events[0]["type"], "smtp_config.deleted");
    assert_eq!(world.error("smtp_config.get", "42", json!({})).await, bare("not_found"));
    assert_eq!(world.error("smtp_config.delete", "42", json!({})).await, bare("not_found"));
}

#[tokio::test]
async fn a_change_to_be_announced_is_one_workers_until_its_time_is_over_and_goes_with_no_refused_change() {
    let world = World::enabled("acme").await;
    world.ok("smtp_config.create", "acme", settings()).await;
    world.error("smtp_config.create", "acme", settings()).await;
    world.error("smtp_config.update", "acme", json!({"port": 25, "if_version": 9})).await;
    let take = async || world.store.take_config_events(10, DEADLINE).await.unwrap();
    let (one, other) = tokio::join!(take(), take());
    assert_eq!(one.len() + other.len(), 1, "{one:?} {other:?}");
    assert_eq!(take().await.len(), 0, "somebody has it");
    world.sql("UPDATE config_events SET due_at = now()").await;
    let again = take().await;
    assert_eq!(again.len(), 1, "whoever had it has not published it");
    world
        .sql("INSERT INTO config_events (type, organization_id) VALUES ('smtp_config.of_tomorrow', 'acme')")
        .await;
    world.store.forget_config_events(&again).await.unwrap();
    assert_eq!(take().await.len(), 0, "a newer program's is left to it");
    assert_eq!(world.count("SELECT count(*) FROM config_events").await, 1);
}

#[tokio::test]
async fn what_was_entered_is_what_a_send_gets() {
    let world = World::enabled("acme").await;
    world.ok("smtp_config.create", "acme", settings()).await;
    let facts = world.facts("acme").await;
    assert_eq!((facts.custom_smtp, facts.config_version()), (true, Some(1)));
    let account = account(&facts);
    assert_eq!(
        (account.host.as_str(), account.port, account.tls),
        ("mail.example.org", 587, TlsMode::Required)
    );
    assert_eq!(account.from.name.as_deref(), Some("Example Events"));
    let credentials = account.credentials.as_ref().unwrap();
    assert_eq!((credentials.username(), credentials.password()), (USERNAME, PASSWORD));

    world.ok("smtp_config.update", "acme", json!({"username": "other", "port": 465})).await;
    let account = world.account("acme").await;
    let credentials = account.credentials.as_ref().unwrap();
    assert_eq!((credentials.username(), credentials.password()), ("other", PASSWORD));
    assert_eq!(account.tls, TlsMode::Implicit);
}

#[tokio::test]
async fn no_reply_event_audit_row_or_debug_holds_a_credential() {
    let world = World::enabled("acme").await;
    let organization = "acme";
    let mut seen = Vec::new();
    for (command, params) in [
        ("smtp_config.create", settings_with(json!({"port": 26}))),
        ("smtp_config.create", settings_with(json!({"passwort": PASSWORD}))),
        ("smtp_config.create", settings_with(json!({"host": "127.0.0.1"}))),
        ("smtp_config.create", settings_with(json!({"password": [PASSWORD]}))),
        ("smtp_config.create", settings_with(json!({"password": format!("{PASSWORD}\n")}))),
        ("smtp_config.create", settings_with(json!({"username": {"name": USERNAME}}))),
        ("smtp_config.create", settings()),
        ("smtp_config.create", settings()),
        ("smtp_config.get", json!({})),
        ("smtp_config.get", json!({"password": PASSWORD})),
        ("smtp_config.update", json!({"password": PASSWORD, "if_version": 9})),
        ("smtp_config.update", json!({"username": USERNAME, "password": PASSWORD})),
        ("smtp_config.delete", json!({})),
        ("smtp_config.update", json!({"username": USERNAME})),
    ] {
        let command = json!({"command": command, "organization_id": organization, "params": params});
        let response = world.control.handle(command.to_string().as_bytes(), CommandMeta::default()).await;
        seen.push(format!("{response:?} {}", String::from_utf8(response.to_json()).unwrap()));
        seen.push(format!("{:?}", world.facts(organization).await));
        seen.push(format!("{:?}", world.configs.get(&id(organization)).await.unwrap()));
        for table in [
            "SELECT coalesce(string_agg(audit::text, ' '), '') FROM audit",
            "SELECT coalesce(string_agg(smtp_configs::text, ' '), '') FROM smtp_configs",
            "SELECT coalesce(string_agg(config_events::text, ' '), '') FROM config_events",
        ] {
            seen.push(sqlx::query_scalar(table).fetch_one(&world.pool).await.unwrap());
        }
    }
    let in_hex = |secret: &str| secret.trim().bytes().map(|byte| format!("{byte:02x}")).collect::<String>();
    for text in &seen {
        assert!(!text.contains("canary"), "{text}");
        assert!(!text.contains(&in_hex("canary")), "{text}");
    }
    assert!(seen.iter().any(|text| text.contains("smtp_config.update")), "the audit log was looked at");
}
