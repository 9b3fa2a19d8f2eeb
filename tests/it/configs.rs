//! The control commands and the configuration store, against a real PostgreSQL.
//! Guarantee: each test has a database of its own; nothing is dialled, names are answered by a scripted name server.

use std::sync::Arc;
use std::time::{Duration, Instant};

use secrecy::{ExposeSecret, SecretString};
use sendoff::clock::Clock;
use sendoff::control::{CommandMeta, Control, ControlRules};
use sendoff::egress::{AllowedPorts, Egress, EgressPolicy};
use sendoff::model::organization::OrganizationId;
use sendoff::model::smtp_settings::{SmtpAccount, TlsMode};
use sendoff::secrets::KeyRing;
use sendoff::store::{
    ConfigCache, ConfigChange, ConfigChanges, RouteFacts, SmtpConfigs, Store, StoreError, StoredAccount,
    Unreadable,
};
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
async fn silent_name_servers_do_not_keep_the_answer_back() {
    let world = World::enabled("acme").await;
    world.dns.script("silent.example.org", Answer::Silence, 0);
    let begun = Instant::now();
    let silent = settings_with(json!({"host": "silent.example.org"}));
    assert_eq!(world.error("smtp_config.create", "acme", silent).await, code("dns_failed", "host"));
    assert!(begun.elapsed() < DEADLINE, "{:?}", begun.elapsed());
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
async fn a_port_that_gives_up_tls_asks_for_the_password_again() {
    let world = World::enabled("acme").await;
    let implicit = settings_with(json!({"port": 465, "secure": false}));
    world.ok("smtp_config.create", "acme", implicit).await;
    let given_up = world.error("smtp_config.update", "acme", json!({"port": 587})).await;
    assert_eq!(given_up, code("invalid_field", "password"));
    world.ok("smtp_config.update", "acme", json!({"port": 587, "secure": true})).await;
    world.ok("smtp_config.update", "acme", json!({"port": 25})).await;
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
async fn of_twenty_creates_at_once_exactly_one_is_left() {
    let world = World::enabled("acme").await;
    let creates = (0..20).map(|n| {
        world.ask_on("smtp_config.create", "acme", settings_with(json!({"from_name": format!("{n}")})))
    });
    let replies = futures_util::future::join_all(creates).await;
    let made: Vec<&Value> = replies.iter().filter(|reply| reply["ok"] == true).collect();
    assert_eq!(made.len(), 1);
    for reply in replies.iter().filter(|reply| reply["ok"] == false) {
        assert_eq!(reply["error"]["code"], "already_exists");
    }
    let stored = world.ok("smtp_config.get", "acme", json!({})).await;
    assert_eq!(stored, made[0]["result"]);
    assert_eq!(stored["version"], 1);
}

#[tokio::test]
async fn a_version_never_comes_again() {
    let world = World::enabled("acme").await;
    let mut versions = Vec::new();
    for _ in 0..2 {
        versions.push(world.ok("smtp_config.create", "acme", settings()).await["version"].clone());
        for _ in 0..2 {
            // The same value once more: an accepted update has a new version all the same.
            let updated = world.ok("smtp_config.update", "acme", json!({"from_name": "Same"})).await;
            versions.push(updated["version"].clone());
        }
        world.ok("smtp_config.delete", "acme", json!({})).await;
    }
    assert_eq!(versions, [1, 2, 3, 4, 5, 6]);
}

#[tokio::test]
async fn updates_at_once_are_all_laid_one_over_the_other() {
    let world = World::enabled("acme").await;
    world.ok("smtp_config.create", "acme", settings()).await;
    let updates =
        (0..10).map(|n| world.ask_on("smtp_config.update", "acme", json!({"from_name": format!("{n}")})));
    let mut versions: Vec<i64> = futures_util::future::join_all(updates)
        .await
        .iter()
        .map(|reply| reply["result"]["version"].as_i64().unwrap_or_else(|| panic!("{reply}")))
        .collect();
    versions.sort_unstable();
    assert_eq!(versions, (2..=11).collect::<Vec<_>>());
}

#[tokio::test]
async fn an_update_of_another_version_is_a_conflict_that_names_the_current_one() {
    let world = World::enabled("acme").await;
    world.ok("smtp_config.create", "acme", settings()).await;
    world.ok("smtp_config.update", "acme", json!({"port": 25, "if_version": 1})).await;
    let reply = world.ask_on("smtp_config.update", "acme", json!({"port": 465, "if_version": 1})).await;
    assert_eq!(reply["error"]["code"], "conflict");
    assert!(text(&reply["error"]["message"]).contains('2'), "{reply}");
    assert_eq!(world.ok("smtp_config.get", "acme", json!({})).await["port"], 25);
}

#[tokio::test]
async fn of_two_updates_of_one_version_at_once_one_is_a_conflict() {
    let world = World::enabled("acme").await;
    world.ok("smtp_config.create", "acme", settings()).await;
    let update =
        |port: u16| world.ask_on("smtp_config.update", "acme", json!({"port": port, "if_version": 1}));
    let (one, two) = tokio::join!(update(25), update(465));
    assert_eq!([&one, &two].iter().filter(|reply| reply["ok"] == true).count(), 1, "{one} {two}");
    assert_eq!([&one, &two].iter().filter(|reply| reply["error"]["code"] == "conflict").count(), 1);
}

#[tokio::test]
async fn an_update_that_others_forestall_again_and_again_is_a_conflict_that_names_the_current_version() {
    let world = World::enabled("acme").await;
    world.ok("smtp_config.create", "acme", settings()).await;
    // Under each update's lock another host is found than the one that was looked up before.
    let forestall = "CREATE FUNCTION forestall() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN UPDATE smtp_configs SET host = 'other.example.org', version = version + 6; RETURN NEW; END $$";
    world.sql(forestall).await;
    let trigger =
        "CREATE TRIGGER forestall BEFORE INSERT ON organizations FOR EACH ROW EXECUTE FUNCTION forestall()";
    world.sql(trigger).await;
    let reply =
        world.ask("smtp_config.update", "acme", json!({"host": "mail.example.org", "password": "p"})).await;
    assert_eq!(reply["error"]["code"], "conflict", "{reply}");
    assert!(text(&reply["error"]["message"]).ends_with("its current version is 7"), "{reply}");
    assert_eq!(reply["error"]["field"], Value::Null, "no version was asked for");
}

#[tokio::test]
async fn the_stored_password_goes_to_no_other_server() {
    let world = World::enabled("acme").await;
    world.ok("smtp_config.create", "acme", settings()).await;
    let needed = code("invalid_field", "password");
    for params in [
        json!({"host": "other.example.org"}),
        json!({"host": "other.example.org", "username": "new"}),
        json!({"secure": false}),
        json!({"secure": false, "port": 25}),
    ] {
        assert_eq!(world.error("smtp_config.update", "acme", params).await, needed);
    }
    // The same host in another spelling is no change, and neither is TLS that stays.
    for params in [json!({"host": "MAIL.example.org"}), json!({"secure": true}), json!({"port": 25})] {
        world.ok("smtp_config.update", "acme", params).await;
    }
    let moved = json!({"host": "other.example.org", "secure": false, "password": "new"});
    world.ok("smtp_config.update", "acme", moved).await;
    world.ok("smtp_config.update", "acme", json!({"secure": true})).await;
    let account = world.account("acme").await;
    assert_eq!(account.host, "other.example.org");
    assert_eq!(account.credentials.as_ref().unwrap().password(), "new");
}

#[tokio::test]
async fn no_race_of_updates_lays_a_password_under_another_host() {
    let world = World::enabled("acme").await;
    world.ok("smtp_config.create", "acme", settings_with(json!({"password": "mail"}))).await;
    let update = |params: Value| world.ask("smtp_config.update", "acme", params);
    for _ in 0..15 {
        // The second one changes no host when it looks first, and would take the other's password over when it does not.
        tokio::join!(
            update(json!({"host": "other.example.org", "password": "other"})),
            update(json!({"host": "mail.example.org", "from_name": "Back"})),
        );
        let account = world.account("acme").await;
        let password = account.credentials.as_ref().unwrap().password();
        assert_eq!(account.host, format!("{password}.example.org"));
        world.ok("smtp_config.update", "acme", json!({"host": "mail.example.org", "password": "mail"})).await;
    }
}

#[tokio::test]
async fn a_new_host_or_port_is_judged_and_an_old_one_is_left_alone() {
    let world = World::enabled("acme").await;
    world.ok("smtp_config.create", "acme", settings()).await;
    let private = json!({"host": "10.0.0.1", "password": "p"});
    assert_eq!(world.error("smtp_config.update", "acme", private).await, code("host_not_public", "host"));
    let port = json!({"port": 8080});
    assert_eq!(world.error("smtp_config.update", "acme", port).await, code("port_not_allowed", "port"));
    // The name has gone; whoever changes something else is not kept from it.
    world.dns.script("mail.example.org", Answer::ServerFailure, 0);
    let form = json!({"host": "mail.example.org", "port": 587, "from_name": "New"});
    assert_eq!(world.ok("smtp_config.update", "acme", form).await["from_name"], "New");
}

#[tokio::test]
async fn a_test_result_goes_with_the_server_it_was_made_for() {
    let world = World::enabled("acme").await;
    world.ok("smtp_config.create", "acme", settings()).await;
    world
        .sql("UPDATE smtp_configs SET last_test_at = '2026-11-22T20:00:00Z', last_test_ok = false, last_test_code = 'auth_failed'")
        .await;
    let kept = world.ok("smtp_config.update", "acme", json!({"from_name": "New"})).await;
    assert_eq!(kept["last_test"], json!({"at": "2026-11-22T20:00:00Z", "ok": false, "code": "auth_failed"}));
    let cleared = world.ok("smtp_config.update", "acme", json!({"password": "new"})).await;
    assert_eq!(cleared["last_test"], Value::Null);
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
async fn credentials_moved_between_rows_or_columns_do_not_open() {
    let world = World::enabled("acme").await;
    world.enable("evil").await;
    world.ok("smtp_config.create", "acme", settings()).await;
    world.ok("smtp_config.create", "evil", settings_with(json!({"host": "other.example.org"}))).await;
    let damaged = async |organization: &str| match world.facts(organization).await.account {
        StoredAccount::Unreadable { cause: Unreadable::Damaged(_), version: 1 } => {}
        other => panic!("{organization}: {other:?}"),
    };
    world
        .sql(
            "UPDATE smtp_configs SET password_sealed = acme.password_sealed FROM smtp_configs acme
              WHERE acme.organization_id = 'acme' AND smtp_configs.organization_id = 'evil'",
        )
        .await;
    damaged("evil").await;
    world
        .sql("UPDATE smtp_configs SET username_sealed = password_sealed WHERE organization_id = 'acme'")
        .await;
    damaged("acme").await;
    world.sql("UPDATE smtp_configs SET username_sealed = 'plaintext' WHERE organization_id = 'acme'").await;
    damaged("acme").await;
    // Entered anew, it works again.
    world.ok("smtp_config.update", "acme", json!({"username": USERNAME, "password": PASSWORD})).await;
    assert_eq!(world.account("acme").await.credentials.as_ref().unwrap().username(), USERNAME);
}

#[tokio::test]
async fn a_missing_key_is_told_apart_from_a_wrong_one_and_an_older_one_still_opens() {
    let world = World::new().await;
    let (old, new) = (key("old"), key("new"));
    let under = |keys: &[SecretString]| SmtpConfigs::new(world.store.clone(), ring(keys));
    let rules = ControlRules { custom_smtp_for_all: true, ..ControlRules::default() };
    let control = control(&world.store, &under(std::slice::from_ref(&old)), &world.dns, rules);
    let create = json!({"command": "smtp_config.create", "organization_id": "acme", "params": settings()});
    assert_eq!(send(&control, &create).await["ok"], true);

    let load = async |keys: &[SecretString]| under(keys).load_for_sending(&id("acme")).await.unwrap();
    let rotated = load(&[new.clone(), old]).await;
    assert_eq!(account(&rotated).credentials.as_ref().unwrap().password(), PASSWORD);
    let cause = |facts: RouteFacts| match facts.account {
        StoredAccount::Unreadable { cause, .. } => cause,
        other => panic!("{other:?}"),
    };
    assert_eq!(cause(load(&[new]).await), Unreadable::UnknownKey { id: "old".into() });
    assert!(matches!(cause(load(&[key("old")]).await), Unreadable::Damaged(_)));
}

/// The next change that is not about starting to listen.
async fn next(changes: &mut ConfigChanges) -> ConfigChange {
    tokio::time::timeout(DEADLINE, changes.next()).await.expect("a change in time")
}

#[tokio::test]
async fn every_change_is_notified() {
    let world = World::new().await;
    let mut changes = ConfigChanges::new(world.store.clone());
    assert_eq!(next(&mut changes).await, ConfigChange::Reset);
    let of_acme = ConfigChange::Of(id("acme"));
    world.enable("acme").await;
    assert_eq!(next(&mut changes).await, of_acme);
    world.ok("smtp_config.create", "acme", settings()).await;
    assert_eq!(next(&mut changes).await, of_acme);
    world.ok("smtp_config.update", "acme", json!({"port": 25})).await;
    assert_eq!(next(&mut changes).await, of_acme);
    world.ok("smtp_config.delete", "acme", json!({})).await;
    assert_eq!(next(&mut changes).await, of_acme);
    // What changes nothing is not: the next one heard of is the one after it.
    world.enable("acme").await;
    world.enable("last").await;
    assert_eq!(next(&mut changes).await, ConfigChange::Of(id("last")));
}

#[tokio::test]
async fn a_lost_listener_comes_back_with_a_reset() {
    let world = World::new().await;
    let mut changes = ConfigChanges::new(world.store.clone());
    assert_eq!(next(&mut changes).await, ConfigChange::Reset);
    assert_eq!(world.database.terminate("sendoff listener").await, 1);
    assert_eq!(next(&mut changes).await, ConfigChange::Reset);
    world.enable("acme").await;
    assert_eq!(next(&mut changes).await, ConfigChange::Of(id("acme")));
}

#[tokio::test]
async fn the_cache_answers_from_memory_until_a_claim_says_otherwise() {
    let world = World::enabled("acme").await;
    let cache = ConfigCache::new(world.configs.clone(), 10);
    let acme = id("acme");
    assert_eq!(cache.get(&acme).await.unwrap().config_version(), None);
    world.ok("smtp_config.create", "acme", settings()).await;
    assert_eq!(cache.get(&acme).await.unwrap().config_version(), None, "held in memory");

    let confirmed = cache.confirm(&acme, true, Some(1), false).await.unwrap();
    assert_eq!(confirmed.config_version(), Some(1));
    assert!(
        Arc::ptr_eq(&confirmed, &cache.confirm(&acme, true, Some(1), false).await.unwrap()),
        "not loaded again"
    );

    world.ok("smtp_config.update", "acme", json!({"port": 25})).await;
    assert_eq!(cache.confirm(&acme, true, Some(2), false).await.unwrap().config_version(), Some(2));
    // A claim that was answered before the update does not bring the older one back.
    assert_eq!(cache.confirm(&acme, true, Some(1), false).await.unwrap().config_version(), Some(2));

    world.ok("smtp_config.delete", "acme", json!({})).await;
    assert_eq!(cache.confirm(&acme, true, None, false).await.unwrap().config_version(), None);
    world.ok("feature.set", "acme", json!({"feature": "custom-smtp-for-orgs", "enabled": false})).await;
    assert!(!cache.confirm(&acme, false, None, false).await.unwrap().custom_smtp);
}

#[tokio::test]
async fn the_cache_forgets_what_changes_and_holds_no_more_than_it_may() {
    let world = World::enabled("acme").await;
    let cache = ConfigCache::new(world.configs.clone(), 3);
    let following = tokio::spawn({
        let (cache, changes) = (cache.clone(), ConfigChanges::new(world.store.clone()));
        async move { cache.follow(changes).await }
    });
    cache.get(&id("acme")).await.unwrap();
    world.ok("smtp_config.create", "acme", settings()).await;
    let begun = Instant::now();
    while cache.get(&id("acme")).await.unwrap().config_version() != Some(1) {
        assert!(begun.elapsed() < DEADLINE, "the cache never heard of the change");
        tokio::task::yield_now().await;
    }
    following.abort();
    for n in 0..10 {
        cache.get(&id(&format!("org-{n}"))).await.unwrap();
        assert!(cache.len() <= 3);
    }
    cache.clear();
    assert!(cache.is_empty());
}

#[tokio::test]
async fn many_who_ask_for_one_organization_load_it_once() {
    let world = World::enabled("acme").await;
    world.ok("smtp_config.create", "acme", settings()).await;
    let cache = ConfigCache::new(world.configs.clone(), 10);
    let mut blocker = world.pool.begin().await.unwrap();
    sqlx::query("LOCK TABLE smtp_configs").execute(&mut *blocker).await.unwrap();
    let waiting: Vec<_> = (0..50)
        .map(|_| {
            let cache = cache.clone();
            tokio::spawn(async move { cache.get(&id("acme")).await.unwrap() })
        })
        .collect();
    let loads = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'";
    let begun = Instant::now();
    while world.count(loads).await == 0 {
        assert!(begun.elapsed() < DEADLINE, "nobody loads");
    }
    assert_eq!(world.count(loads).await, 1);
    blocker.commit().await.unwrap();
    let facts = futures_util::future::join_all(waiting).await;
    let first = facts[0].as_ref().unwrap();
    assert!(facts.iter().all(|facts| Arc::ptr_eq(facts.as_ref().unwrap(), first)));
}

#[tokio::test]
async fn with_the_database_away_all_who_wait_for_the_cache_fail_together() {
    let away = Store::new(&"postgres://nobody@127.0.0.1:1/none".into(), 2).unwrap();
    let cache = ConfigCache::new(SmtpConfigs::new(away, ring(&[key("k")])), 10);
    let acme = id("acme");
    let all = futures_util::future::join_all((0..50).map(|_| cache.get(&acme)));
    let answers = tokio::time::timeout(DEADLINE, all).await.expect("not one after the other");
    assert!(answers.iter().all(|answer| matches!(answer, Err(StoreError::Unavailable(_)))));
}

#[tokio::test]
async fn with_the_database_away_nothing_is_changed_and_the_answer_comes_in_time() {
    let world = World::new().await;
    let away = Store::new(&"postgres://nobody:secret@127.0.0.1:1/none".into(), 2).unwrap();
    let configs = SmtpConfigs::new(away.clone(), world.keys.clone());
    let control = control(&away, &configs, &world.dns, ControlRules::default());
    let begun = Instant::now();
    for (command, params) in [
        ("smtp_config.get", json!({})),
        ("smtp_config.create", settings()),
        ("feature.set", json!({"feature": "custom-smtp-for-orgs", "enabled": true})),
        ("job.status", json!({"id": "01936a5e-0000-7000-8000-000000000000"})),
    ] {
        let command = json!({"command": command, "organization_id": "acme", "params": params});
        let reply = send(&control, &command).await;
        assert_eq!(reply["error"]["code"], "unavailable", "{command}: {reply}");
        assert!(!reply.to_string().contains("secret"));
    }
    assert!(begun.elapsed() < DEADLINE, "{:?}", begun.elapsed());
}

#[tokio::test]
async fn a_row_that_somebody_else_holds_is_not_waited_for_too_long() {
    let world = World::enabled("acme").await;
    world.ok("smtp_config.create", "acme", settings()).await;
    let mut blocker = world.pool.begin().await.unwrap();
    sqlx::query("SELECT 1 FROM organizations FOR UPDATE").execute(&mut *blocker).await.unwrap();
    let begun = Instant::now();
    let reply = world.ask("smtp_config.update", "acme", json!({"port": 25})).await;
    assert_eq!(reply["error"]["code"], "unavailable");
    assert!(begun.elapsed() < DEADLINE);
    blocker.rollback().await.unwrap();
    assert_eq!(world.ok("smtp_config.update", "acme", json!({"port": 25})).await["version"], 2);
}

#[tokio::test]
async fn a_commit_that_is_not_confirmed_is_not_called_unchanged() {
    let world = World::enabled("acme").await;
    world.ok("smtp_config.create", "acme", settings()).await;
    // The commit waits for a lock, without the limit that the change has set for its own.
    world
        .sql(
            "CREATE FUNCTION dawdle() RETURNS trigger LANGUAGE plpgsql SET lock_timeout = 0
              AS 'BEGIN PERFORM pg_advisory_xact_lock(1); RETURN NULL; END';
              CREATE CONSTRAINT TRIGGER slow AFTER UPDATE ON smtp_configs DEFERRABLE INITIALLY DEFERRED
              FOR EACH ROW EXECUTE FUNCTION dawdle()",
        )
        .await;
    let mut holder = world.pool.begin().await.unwrap();
    sqlx::query("SELECT pg_advisory_xact_lock(1)").execute(&mut *holder).await.unwrap();
    let reply = world.ask_on("smtp_config.update", "acme", json!({"port": 25})).await;
    assert_eq!(reply["error"]["code"], "internal", "{reply}");
    assert!(text(&reply["error"]["message"]).contains("not known whether the change was made"), "{reply}");
    assert_eq!(world.configs.get(&id("acme")).await.unwrap().config.unwrap().version, 1);
    holder.rollback().await.unwrap();
    let begun = Instant::now();
    while world.configs.get(&id("acme")).await.unwrap().config.unwrap().version != 2 {
        assert!(begun.elapsed() < DEADLINE, "here it was made after all");
    }
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

#[tokio::test]
async fn a_refusal_is_audited_although_the_database_is_slow_to_take_it() {
    let world = World::new().await;
    let mut holder = world.pool.begin().await.unwrap();
    sqlx::query("LOCK TABLE audit IN EXCLUSIVE MODE").execute(&mut *holder).await.unwrap();
    let waiting = "SELECT count(*) FROM pg_locks WHERE relation = 'audit'::regclass AND NOT granted";
    let held = async {
        tokio::time::timeout(DEADLINE, async { while world.count(waiting).await == 0 {} }).await.unwrap();
        sqlx::query("SELECT pg_sleep(0.8)").execute(&mut *holder).await.unwrap();
        holder.commit().await.unwrap();
    };
    let ((), (code, _)) = tokio::join!(held, world.error("smtp_config.get", "acme", json!({})));
    assert_eq!(code, "not_found");
    assert_eq!(world.count("SELECT count(*) FROM audit WHERE outcome = 'not_found'").await, 1);
}
