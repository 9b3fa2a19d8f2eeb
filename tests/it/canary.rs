//! The secret canary: credentials that cannot be mistaken, every command, every failure, TRACE logging; then a look everywhere.
//! Guarantee: user name, password and keys are nowhere but in the AUTH exchange under TLS and, sealed, in the database, in
//! whatever form they could be written down.

use std::process::Stdio;
use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD, URL_SAFE_NO_PAD};
use secrecy::{ExposeSecret, SecretString};
use sendoff::model::address::{EmailAddress, Mailbox};
use sendoff::model::ledger::State;
use sendoff::model::smtp_settings::{Credentials, SmtpAccount, TlsMode};
use sendoff::secrets::KeyRing;
use sendoff::settings::{Needs, Settings, Sources};
use sendoff::store::{NewSmtpConfig, RouteFacts, SmtpConfigPatch, StoredAccount};
use serde_json::{Value, json};
use sqlx::Row;

use crate::support::broker::eventually;
use crate::support::certs::Authority;
use crate::support::smtp_server::{Action, Rule, SmtpServer, Stage, Tls};
use crate::support::world::{World, job};

/// Both look different in JSON, in a URL and in `Debug`.
const USERNAME: &str = "Kanari \"Nutzer\"\\+7ü@canary.example";
const PASSWORD: &str = "kAnari/\"Passwört\"%+\\9c1f2e&";
/// Another one, that no server takes.
const WRONG: &str = "fAlsch/\"Kanari\"%+\\b77d03&";
/// The key that the credentials are sealed under, and the one that they are rotated to.
const OLD_KEY: &str = "k1:q83vEjRWeJCrze8SNFZ4kKvN7xI0VniQq83vEjRWeJA=";
const NEW_KEY: &str = "k2:3q2+796tvu/erb7v3q2+796tvu/erb7v3q2+796tvu8=";

// ---- the finder

/// Knows every form in which a secret could stand somewhere.
struct Finder {
    forms: Vec<(String, Vec<u8>)>,
}

impl Finder {
    fn new() -> Self {
        let mut finder = Self { forms: Vec::new() };
        for (name, secret) in [("user name", USERNAME), ("password", PASSWORD), ("wrong password", WRONG)] {
            finder.add(name, secret.as_bytes());
            finder.add(&format!("{name} in JSON"), inner(&json!(secret).to_string()).as_bytes());
            finder.add_text(
                &format!("{name} in JSON of JSON"),
                &inner(&json!(inner(&json!(secret).to_string())).to_string()),
            );
            finder.add_text(&format!("{name} in Debug"), &inner(&format!("{secret:?}")));
            finder.add_text(&format!("{name}, escaped"), &secret.escape_default().to_string());
            for keeps in ["-._~", "-._~+", "-._~@/", "-._~ "] {
                finder.add_text(&format!("{name} in a URL"), &percent(secret, keeps));
            }
        }
        for password in [PASSWORD, WRONG] {
            finder.add("AUTH PLAIN", format!("\0{USERNAME}\0{password}").as_bytes());
        }
        for key in [OLD_KEY, NEW_KEY] {
            let (_, encoded) = key.split_once(':').expect("id and key");
            finder.add("key", &STANDARD.decode(encoded).expect("base64"));
            finder.add_text("key", encoded.trim_end_matches('='));
        }
        finder
    }

    /// Bytes as they are, in hexadecimal, as a list of numbers, and in base64 wherever they begin.
    fn add(&mut self, name: &str, secret: &[u8]) {
        let mut form = |what: &str, bytes: Vec<u8>| self.forms.push((format!("{name} {what}"), bytes));
        form("as it is", secret.to_vec());
        form("in hexadecimal", secret.iter().flat_map(|byte| format!("{byte:02x}").into_bytes()).collect());
        let numbers: Vec<String> = secret.iter().map(u8::to_string).collect();
        form("as numbers", numbers.join(", ").into_bytes());
        form("as numbers", numbers.join(",").into_bytes());
        for shift in 0..3 {
            let shifted = [&vec![0; shift][..], secret].concat();
            // Without the characters that neighbours have a part in.
            let (begin, whole) = ((shift * 8).div_ceil(6), shifted.len() * 8 / 6);
            for alphabet in [STANDARD_NO_PAD, URL_SAFE_NO_PAD] {
                form("in base64", alphabet.encode(&shifted).as_bytes()[begin..whole].to_vec());
            }
        }
    }

    fn add_text(&mut self, name: &str, text: &str) {
        self.forms.push((name.to_owned(), text.as_bytes().to_vec()));
    }

    /// The forms that stand in these bytes, or in what the hexadecimal in them is of.
    fn find(&self, place: &str, bytes: &[u8]) -> Vec<String> {
        let lower = bytes.to_ascii_lowercase();
        let decoded = unhex(&lower);
        let stands = |form: &[u8]| {
            contains(bytes, form)
                || contains(&lower, &form.to_ascii_lowercase())
                || decoded.iter().any(|part| contains(part, form))
        };
        let found = self.forms.iter().filter(|(_, form)| stands(form));
        found.map(|(name, _)| format!("{name}: {place}")).collect()
    }
}

fn contains(bytes: &[u8], form: &[u8]) -> bool {
    bytes.windows(form.len()).any(|part| part == form)
}

/// What every run of hexadecimal digits behind `\x` stands for.
fn unhex(text: &[u8]) -> Vec<Vec<u8>> {
    let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    let starts = text.windows(2).enumerate().filter(|(_, pair)| *pair == b"\\x").map(|(at, _)| at + 2);
    starts
        .map(|at| {
            let digits: Vec<u8> = text[at..].iter().map_while(|byte| digit(*byte)).collect();
            digits.chunks_exact(2).map(|pair| pair[0] << 4 | pair[1]).collect()
        })
        .collect()
}

fn inner(quoted: &str) -> String {
    quoted[1..quoted.len() - 1].to_owned()
}

fn percent(text: &str, keeps: &str) -> String {
    let escape = |byte: u8| {
        let c = char::from(byte);
        if c.is_ascii_alphanumeric() || keeps.contains(c) { c.to_string() } else { format!("%{byte:02X}") }
    };
    text.bytes().map(escape).collect()
}

#[test]
fn the_finder_finds_what_is_planted_in_any_form() {
    let finder = Finder::new();
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02X}")).collect::<String>();
    let planted = [
        format!("log line with {PASSWORD} in it"),
        USERNAME.to_lowercase(),
        json!({ "nested": json!({ "username": USERNAME }).to_string() }).to_string(),
        format!("{:?}", Some(WRONG)),
        format!("{:?}", PASSWORD.as_bytes()),
        STANDARD.encode(PASSWORD),
        STANDARD.encode(format!("\0{USERNAME}\0{PASSWORD}")),
        STANDARD.encode(format!("ab{{\"password\":{}}}", json!(PASSWORD))),
        percent(PASSWORD, "-._~"),
        hex(PASSWORD.as_bytes()),
        format!("\\x{}", hex(STANDARD.encode(PASSWORD).as_bytes())),
        format!("keys = [\"{OLD_KEY}\"]"),
        hex(&STANDARD.decode(&NEW_KEY[3..]).expect("base64")),
    ];
    for text in planted {
        assert!(!finder.find("here", text.as_bytes()).is_empty(), "not found in {text}");
    }
    for harmless in ["", "nothing", "[redacted]", "kAnari", "\\x6b41"] {
        assert_eq!(finder.find("here", harmless.as_bytes()), [""; 0]);
    }
}

// ---- the commands and the failures

/// Every command of the contract, for an organization whose server takes the credentials.
fn commands(port: u16) -> Vec<(&'static str, Value)> {
    let credentials = json!({"host": "localhost", "port": port, "username": USERNAME, "password": PASSWORD});
    let whole = |mut fields: Value| {
        fields["from_email"] = json!("hello@acme.example");
        fields["from_name"] = json!("Team");
        fields
    };
    vec![
        ("feature.set", json!({"feature": "custom-smtp-for-orgs", "enabled": true})),
        ("smtp_config.create", whole(credentials.clone())),
        ("smtp_config.create", whole(credentials.clone())),
        ("smtp_config.get", json!({})),
        ("smtp_config.update", json!({"password": PASSWORD, "username": USERNAME, "if_version": 1})),
        ("smtp_config.update", json!({"password": PASSWORD, "if_version": 1})),
        ("smtp_config.update", json!({"host": "127.0.0.1"})),
        ("smtp_config.test", json!({})),
        ("smtp_config.test", whole(credentials)),
        ("smtp_config.test", json!({"password": WRONG})),
        ("smtp_config.test", json!({"host": "10.0.0.1", "password": WRONG})),
        ("smtp_config.send_test_email", json!({"to": "ann@customer.example"})),
        ("job.status", json!({"id": "0198c0de-0000-7000-8000-000000000001"})),
        ("job.cancel", json!({"id": "0198c0de-0000-7000-8000-000000000001"})),
        ("job.cancel", json!({"group": "g", "sequence": 1})),
        ("smtp_config.delete", json!({})),
        ("smtp_config.delete", json!({})),
    ]
}

/// Commands that hold a secret where it does not belong, or in a way that is refused.
fn refused_commands() -> Vec<(&'static str, Value)> {
    let with = |field: &str, value: Value| {
        let mut fields = json!({"host": "localhost", "port": 587, "username": USERNAME, "password": PASSWORD,
            "from_email": "hello@acme.example", "from_name": "Team", "secure": true});
        fields[field] = value;
        ("smtp_config.create", fields)
    };
    let line = format!("{PASSWORD}\r\nQUIT");
    let long = PASSWORD.repeat(200);
    vec![
        with("host", json!(PASSWORD)),
        with("host", json!(format!("smtp.{PASSWORD}.example"))),
        with("port", json!(PASSWORD)),
        with("secure", json!(PASSWORD)),
        with("from_email", json!(PASSWORD)),
        with("from_email", json!(USERNAME)),
        with("username", json!(line)),
        with("password", json!(line)),
        with("username", json!(long)),
        with("password", json!(long)),
        with("password", json!([PASSWORD])),
        with("username", json!({ "name": USERNAME })),
        with("unknown", json!(PASSWORD)),
        ("feature.set", json!({"feature": PASSWORD, "enabled": PASSWORD})),
        ("job.status", json!({"id": PASSWORD})),
        ("smtp_config.test", json!({"port": PASSWORD, "password": PASSWORD})),
        ("smtp_config.send_test_email", json!({"to": PASSWORD})),
    ]
}

/// What a server says that repeats all it was told.
fn echo(code: &str, password: &str) -> Action {
    let (plain, [user, pass]) = (
        STANDARD.encode(format!("\0{USERNAME}\0{password}")),
        [USERNAME, password].map(|text| STANDARD.encode(text)),
    );
    let said = format!(
        "{code}-{code} user={USERNAME} pass={password}\r\n{code}-AUTH PLAIN {plain} {user} {pass}\r\n\
         {code} url={} json={} debug={password:?}",
        percent(password, "-._~"),
        json!(USERNAME),
    );
    Action::Reply(said.into_bytes())
}

/// What was said by whom, to be looked through at the end.
#[derive(Default)]
struct Collected(Vec<(String, Vec<u8>)>);

impl Collected {
    fn add(&mut self, place: impl Into<String>, bytes: impl AsRef<[u8]>) {
        self.0.push((place.into(), bytes.as_ref().to_vec()));
    }

    fn assert_harmless(&self) {
        let finder = Finder::new();
        let found: Vec<String> = self.0.iter().flat_map(|(place, bytes)| finder.find(place, bytes)).collect();
        assert!(found.is_empty(), "{} secrets:\n{}", found.len(), found.join("\n"));
    }
}

async fn tell(
    world: &World,
    collected: &mut Collected,
    command: &str,
    organization: &str,
    params: &Value,
) -> Value {
    let body =
        json!({"command": command, "organization_id": organization, "actor": "user:7", "params": params});
    let reply = world.control(body).await;
    collected.add(format!("the reply to {command} {organization}"), reply.to_string());
    reply
}

async fn run(world: &World, collected: &mut Collected, arguments: &[&str], input: &str) {
    use tokio::io::AsyncWriteExt;
    let mut command = world.command(arguments);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("the program starts");
    let mut stdin = child.stdin.take().expect("piped");
    // It may end without reading.
    let _ = stdin.write_all(input.as_bytes()).await;
    drop(stdin);
    let output = child.wait_with_output().await.expect("it ends");
    assert_ne!(output.status.code(), Some(2), "it has something to say: {output:?}");
    collected.add(format!("standard output of {arguments:?}"), output.stdout);
    collected.add(format!("standard error of {arguments:?}"), output.stderr);
}

async fn configure(world: &World, id: &str, port: u16, password: &str) {
    world.commanded("feature.set", id, json!({"feature": "custom-smtp-for-orgs", "enabled": true})).await;
    let params = json!({"from_email": format!("hello@{id}.example"), "from_name": "Team", "host": "localhost",
        "port": port, "username": USERNAME, "password": password, "secure": true});
    world.commanded("smtp_config.create", id, params).await;
}

/// Every table as text.
async fn dump(world: &World, collected: &mut Collected) {
    let mut session = world.database.connect().await;
    let tables: Vec<String> = sqlx::query_scalar(
        "SELECT table_name::text FROM information_schema.tables WHERE table_schema = 'public'",
    )
    .fetch_all(&mut session)
    .await
    .expect("listed");
    assert!(tables.len() >= 6, "{tables:?}");
    for table in tables {
        let sql = format!("SELECT t::text AS row FROM \"{table}\" AS t");
        let rows = sqlx::query(sqlx::AssertSqlSafe(sql)).fetch_all(&mut session).await.expect("dumped");
        for row in rows {
            collected.add(format!("the table {table}"), row.get::<String, _>("row"));
        }
    }
}

#[tokio::test]
async fn credentials_and_keys_are_nowhere_but_under_tls_and_sealed() {
    let mut world = World::with(|behaviour| behaviour.login = Some((USERNAME.into(), PASSWORD.into()))).await;
    world.set("RUST_LOG", "trace");
    world.set("SENDOFF__ENCRYPTION__KEYS", OLD_KEY);
    world.set("SENDOFF__PLATFORM__USERNAME", USERNAME);
    world.set("SENDOFF__PLATFORM__PASSWORD", PASSWORD);
    world.set("SENDOFF__EGRESS__ALLOW_PLAINTEXT_AUTH", "false");
    world.set("SENDOFF__CONTROL__TESTS_PER_MINUTE", "1000");
    let mut collected = Collected::default();
    let worker = world.worker().await;
    let untrusted = Authority::new("an authority that nobody trusts").issue(&["localhost"]).server_config();
    let untrusted = SmtpServer::start(|behaviour| {
        behaviour.tls = Tls::Starttls(untrusted);
        behaviour.login = Some((USERNAME.into(), PASSWORD.into()));
    })
    .await;
    let trusted = world.authority.issue(&["localhost"]).server_config();
    let echoing = SmtpServer::start(|behaviour| {
        behaviour.tls = Tls::Starttls(trusted.clone());
        behaviour.login = Some((USERNAME.into(), PASSWORD.into()));
    })
    .await;
    echoing.rule(Rule::new(Stage::Auth, echo("535", PASSWORD)));
    let refusing = SmtpServer::start(|behaviour| behaviour.tls = Tls::Starttls(trusted.clone())).await;
    refusing.rule(Rule::new(Stage::Auth, echo("535", WRONG)));
    let talkative = SmtpServer::start(|behaviour| {
        behaviour.tls = Tls::Starttls(trusted);
        behaviour.login = Some((USERNAME.into(), PASSWORD.into()));
        behaviour.mechanisms = vec!["LOGIN"];
    })
    .await;
    talkative.rule(Rule::new(Stage::Rcpt, echo("550", PASSWORD)).of("refused@customer.example"));
    talkative.rule(Rule::new(Stage::FinalDot, echo("250", PASSWORD)));

    for (command, params) in commands(world.server.port()) {
        tell(&world, &mut collected, command, "acme", &params).await;
    }
    for (command, params) in refused_commands() {
        tell(&world, &mut collected, command, "acme", &params).await;
    }
    for port in [echoing.port(), talkative.port(), untrusted.port(), 1] {
        let fields = json!({"host": "localhost", "port": port, "username": USERNAME, "password": PASSWORD,
            "from_email": "hello@acme.example", "from_name": "Team", "secure": true});
        tell(&world, &mut collected, "smtp_config.test", "acme", &fields).await;
    }
    // A database that refuses, and tells of the row.
    world.database.run("ALTER TABLE smtp_configs ADD CONSTRAINT refuses CHECK (port <> 26)").await;
    let refused = json!({"host": "localhost", "port": 26, "username": USERNAME, "password": PASSWORD,
        "from_email": "hello@acme.example", "from_name": "Team", "secure": true});
    let reply = tell(&world, &mut collected, "smtp_config.create", "acme", &refused).await;
    assert_eq!(reply["ok"], false, "{reply}");

    // Every organization's mail goes its way: sent, refused, unreachable.
    let ways = [
        ("right", world.server.port(), PASSWORD),
        ("wrong", world.server.port(), WRONG),
        ("echoing", echoing.port(), PASSWORD),
        ("refusing", refusing.port(), WRONG),
        ("talkative", talkative.port(), PASSWORD),
        ("untrusted", untrusted.port(), PASSWORD),
        ("closed", 1, PASSWORD),
    ];
    for (id, port, password) in ways {
        configure(&world, id, port, password).await;
    }
    let mut jobs = Vec::new();
    for (id, ..) in ways {
        let mut job = job(Some(id));
        job["to"] = json!(["ann@customer.example", "refused@customer.example"]);
        jobs.push((Some(id), world.publish(&job).await));
    }
    jobs.push((None, world.publish(&job(None)).await));
    if cfg!(feature = "fault-injection") {
        for place in ["compose", "attempt", "answered", "record"] {
            let mut job = job(Some("right"));
            job["kind"] = json!(format!("fault.{place}.panic-once"));
            jobs.push((Some("right"), world.publish(&job).await));
        }
        worker.logs("a panic").await;
    }
    // Whatever became of it, each has been tried.
    for (organization, id) in &jobs {
        eventually(&format!("{organization:?} {id} was tried"), async || {
            let status = world.status(*organization, *id).await;
            // What was put aside without an attempt has yet to be.
            status.is_some_and(|status| match status.state {
                State::Claimed => false,
                State::Deferred => status.attempts > 0,
                _ => true,
            })
        })
        .await;
    }
    world.event("email.sent", jobs[0].1).await;
    assert!(
        echoing.seen(|seen| seen.auth_attempts) > 0 && talkative.seen(|seen| seen.final_dots) > 0,
        "the servers have echoed"
    );

    // The key is changed, the program says all that it can say.
    world.set("SENDOFF__ENCRYPTION__KEYS", &format!("{NEW_KEY},{OLD_KEY}"));
    let secret_file = world.file("password", PASSWORD.as_bytes());
    let (file, port) = (secret_file.to_str().expect("UTF-8").to_owned(), world.server.port().to_string());
    let create = [
        "org",
        "smtp",
        "create",
        "byhand",
        "--host",
        "localhost",
        "--port",
        &port,
        "--username",
        USERNAME,
        "--from-email",
        "hello@acme.example",
        "--from-name",
        "Team",
        "--password-file",
        &file,
    ];
    let id = jobs[2].1.to_string();
    let inputs: [(&[&str], &str); 19] = [
        (&["org", "feature", "byhand", "custom-smtp-for-orgs", "on"], ""),
        (&create, ""),
        (&create, ""),
        (&["org", "smtp", "update", "byhand", "--password-stdin"], PASSWORD),
        (&["org", "smtp", "show", "byhand", "--json"], ""),
        (&["org", "smtp", "test", "byhand"], ""),
        (&["org", "smtp", "send-test", "byhand", "--to", "ann@customer.example"], ""),
        (&["org", "smtp", "delete", "byhand"], ""),
        (&["check", "--json"], ""),
        (&["keys", "status"], ""),
        (&["keys", "rotate"], ""),
        (&["topology", "show"], ""),
        (&["dead", "list", "--json"], ""),
        (&["dead", "show", &id, "--reveal"], ""),
        (&["dead", "stats"], ""),
        (&["dead", "replay", "--all", "--dry-run"], ""),
        (&["dead", "discard", "--org", "nobody"], ""),
        (
            &[
                "job",
                "send",
                "--org",
                "echoing",
                "--to",
                "ann@customer.example",
                "--subject",
                "s",
                "--text",
                "t",
            ],
            "",
        ),
        (&["job", "status", &id, "--org", "echoing"], ""),
    ];
    for (arguments, input) in inputs {
        run(&world, &mut collected, arguments, input).await;
    }
    for (key, value) in [
        ("SENDOFF__ENCRYPTION__KEYS", format!("k1:{PASSWORD}")),
        ("SENDOFF__ENCRYPTION__KEYS", format!("{OLD_KEY},{OLD_KEY}")),
        (
            "DATABASE_URL",
            format!("postgres://{}:{}@127.0.0.1:1/x", percent(USERNAME, ""), percent(PASSWORD, "")),
        ),
        ("AMQP_URL", format!("amqp://{}:{}@127.0.0.1:1/x", percent(USERNAME, ""), percent(PASSWORD, ""))),
        ("SENDOFF__PLATFORM__PASSWORD", format!("{PASSWORD}\n")),
    ] {
        let mut command = world.command(&["check"]);
        let output = command.env(key, value).stdin(Stdio::null()).output().await.expect("it runs");
        collected.add(format!("check with a bad {key}"), [output.stdout, output.stderr].concat());
    }

    collected.add("/metrics", worker.get("/metrics").await.1);
    collected.add("/readyz", worker.get("/readyz").await.1);
    collected.add("events", Value::from(world.events.all()).to_string());
    for letter in world.broker.drain(&world.broker.tap()).await {
        collected.add("a dead letter's headers", format!("{:?}", letter.properties));
        collected.add("a dead letter's body", letter.body);
    }
    dump(&world, &mut collected).await;
    worker.signal("TERM").await;
    let (code, log) = worker.ended().await;
    assert_eq!(code, 0, "{log}");
    collected.add("the worker's log", log);
    // The canaries have sung: they were where they belong.
    let payloads: String = [&world.server, &echoing, &talkative]
        .iter()
        .flat_map(|server| server.sessions())
        .inspect(|session| assert!(session.auth_payloads.is_empty() || session.tls.is_some(), "{session:?}"))
        .flat_map(|session| session.auth_payloads)
        .collect();
    assert!(payloads.contains(USERNAME) && payloads.contains(PASSWORD) && payloads.contains(WRONG));
    collected.assert_harmless();
    world.end().await;
}

#[tokio::test]
async fn every_command_that_the_canary_was_shown_is_one() {
    let world = World::with(|behaviour| behaviour.login = Some((USERNAME.into(), PASSWORD.into()))).await;
    let worker = world.worker().await;
    let mut collected = Collected::default();
    let mut unknown = Vec::new();
    for (command, params) in commands(world.server.port()) {
        let reply = tell(&world, &mut collected, command, "acme", &params).await;
        if reply["error"]["field"] == "command" {
            unknown.push(command);
        }
    }
    collected.assert_harmless();
    worker.stop().await;
    world.end().await;
    assert_eq!(unknown, [""; 0], "these commands are not carried out");
}

#[test]
fn no_public_type_shows_what_it_holds() {
    let text = |secret: &str| SecretString::from(secret);
    let credentials = || Credentials::new(USERNAME, PASSWORD);
    let from = || EmailAddress::parse("hello@acme.example").expect("an address");
    let account = SmtpAccount {
        host: "localhost".into(),
        port: 587,
        tls: TlsMode::Required,
        credentials: Some(credentials()),
        from: Mailbox::named("Team", from()).expect("a mailbox"),
    };
    let new = NewSmtpConfig {
        from_email: from(),
        from_name: "Team".into(),
        host: "localhost".into(),
        port: 587,
        secure: true,
        credentials: credentials(),
        overrides: sendoff::model::provider::Overrides::default(),
    };
    let patch = SmtpConfigPatch {
        username: Some(text(USERNAME)),
        password: Some(text(PASSWORD)),
        ..SmtpConfigPatch::default()
    };
    let ring = KeyRing::parse(&[text(NEW_KEY), text(OLD_KEY)]).expect("keys");
    let refused = KeyRing::parse(&[text(&format!("k1:{PASSWORD}"))]).map(drop);
    let sources = Sources {
        file: None,
        environment: [
            ("SENDOFF__ENCRYPTION__KEYS", OLD_KEY.to_owned()),
            ("DATABASE_URL", format!("postgres://x:{}@127.0.0.1/x", percent(PASSWORD, ""))),
            ("AMQP_URL", format!("amqp://x:{}@127.0.0.1/x", percent(PASSWORD, ""))),
            ("SENDOFF__PLATFORM__HOST", "mail.example".to_owned()),
            ("SENDOFF__PLATFORM__PORT", "587".to_owned()),
            ("SENDOFF__PLATFORM__FROM_EMAIL", "hello@acme.example".to_owned()),
            ("SENDOFF__PLATFORM__USERNAME", USERNAME.to_owned()),
            ("SENDOFF__PLATFORM__PASSWORD", PASSWORD.to_owned()),
            ("SENDOFF__HTTP__CONSOLE_TOKEN", PASSWORD.to_owned()),
        ]
        .map(|(name, value)| (name.to_owned(), value))
        .into_iter()
        .collect(),
    };
    let settings = Settings::from_sources(&sources, Needs::ALL);
    let account = Arc::new(account);
    let stored = StoredAccount::Ready { version: 1, account: account.clone(), limited: None };
    let facts = RouteFacts { health: Default::default(), custom_smtp: true, account: stored.clone() };
    let mut collected = Collected::default();
    collected.add("Credentials", format!("{:?} {:#?}", credentials(), credentials()));
    collected.add("SmtpAccount", format!("{account:?} {account:#?}"));
    collected.add("StoredAccount", format!("{stored:?} {stored:#?}"));
    collected.add("RouteFacts", format!("{facts:?} {facts:#?}"));
    collected.add("NewSmtpConfig", format!("{new:?} {new:#?}"));
    collected.add("SmtpConfigPatch", format!("{patch:?} {patch:#?}"));
    collected.add("KeyRing", format!("{ring:?} {ring:#?} {refused:?}"));
    collected.add("Settings", format!("{settings:?} {settings:#?}"));
    let parsed = settings.expect("they are usable");
    assert_eq!(parsed.encryption.keys[0].expose_secret(), OLD_KEY, "the settings do hold it");
    collected.assert_harmless();
}
