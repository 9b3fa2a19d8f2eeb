//! The commands that speak to the broker and the database, with the test in the worker's place.

use std::process::{Output, Stdio};
use std::sync::Arc;

use lapin::BasicProperties;
use lapin::options::BasicPublishOptions;
use secrecy::{ExposeSecret, SecretString};
use sendoff::clock::Clock;
use sendoff::control::{CommandMeta, Control, ControlRules};
use sendoff::egress::{AllowedPorts, Egress, EgressPolicy};
use sendoff::model::schedule::Schedule;
use sendoff::secrets::KeyRing;
use sendoff::store::{SmtpConfigs, Store};
use serde_json::{Value, json};
use sqlx::Executor;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};

use crate::support::broker::{TestBroker, amqp_url};
use crate::support::connector::connector;
use crate::support::database::TestDatabase;
use crate::support::dns::DnsServer;

const KEY: &str = "k1:AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=";

/// A database, a prefix and a name server of the test's own.
struct House {
    broker: TestBroker,
    database: TestDatabase,
    dns: DnsServer,
}

impl House {
    async fn new(name: &str, database: TestDatabase) -> Self {
        let delays = Schedule::new(vec![10, 60, 300, 1800, 7200, 28_800]).delays_s();
        Self { broker: TestBroker::new(name, &delays).await, database, dns: DnsServer::start().await }
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sendoff"));
        command
            .args(arguments)
            .env_clear()
            .env("AMQP_URL", amqp_url())
            .env("DATABASE_URL", self.database.url().expose_secret())
            .env("SENDOFF__AMQP__PREFIX", &self.broker.prefix)
            .env("SENDOFF__ENCRYPTION__KEYS", KEY)
            .env("SENDOFF__EGRESS__NAMESERVERS", self.dns.address().to_string())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        command
    }

    async fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().await.expect("the program runs")
    }

    /// Runs a command that is expected to end well, and gives what it printed.
    async fn done(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments).await;
        let words = super::stderr(&output);
        assert_eq!(output.status.code(), Some(0), "{arguments:?}: {words} {}", super::stdout(&output));
        assert_eq!(words, "", "{arguments:?}");
        super::stdout(&output)
    }

    /// Answers one command as a worker does, and gives the command.
    async fn answer(&self, control: &Control) -> Value {
        let command = self.broker.take(&self.broker.name("control")).await;
        let response = control.handle(&command.body, CommandMeta::default()).await;
        let reply_to = command.properties.reply_to().as_ref().expect("a reply is wanted").to_string();
        let correlation = command.properties.correlation_id().clone().expect("a correlation id");
        let properties = BasicProperties::default().with_correlation_id(correlation);
        // Not as mandatory: the broker gives such a reply back although it delivers it.
        let (channel, body) = (self.broker.channel().await, response.to_json());
        let options = BasicPublishOptions::default();
        let sent =
            channel.basic_publish("".into(), reply_to.as_str().into(), options, &body, properties).await;
        sent.expect("published").await.expect("confirmed");
        serde_json::from_slice(&command.body).expect("a command is JSON")
    }

    fn control(&self) -> Control {
        self.control_over(self.database.store(), ControlRules::default())
    }

    fn control_over(&self, store: Store, rules: ControlRules) -> Control {
        let keys = Arc::new(KeyRing::parse(&[SecretString::from(KEY)]).expect("a key ring"));
        let configs = SmtpConfigs::new(store.clone(), keys);
        let policy = EgressPolicy::new(Vec::new(), Vec::new(), AllowedPorts::Any);
        let egress = Arc::new(Egress::new(policy, &[self.dns.address()]).expect("a name server"));
        Control::new(store, configs, connector(egress), Clock::system(), rules)
    }
}

fn lines(child: &mut Child) -> Lines<BufReader<ChildStdout>> {
    BufReader::new(child.stdout.take().expect("standard output is piped")).lines()
}

async fn json_line(lines: &mut Lines<BufReader<ChildStdout>>) -> Value {
    let line = lines.next_line().await.expect("readable").expect("one more line");
    serde_json::from_str(&line).unwrap_or_else(|_| panic!("not JSON: {line}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fresh_installation_is_made_usable_step_by_step() {
    let house = House::new("fresh", TestDatabase::empty().await).await;
    let check = house.run(&["check"]).await;
    assert_eq!(check.status.code(), Some(1));
    let found = super::stdout(&check);
    for line in
        ["ok      database", "warning schema", "FAILED  topology", "sendoff topology declare", "ok      dns"]
    {
        assert!(found.contains(line), "{line}: {found}");
    }
    assert_eq!(found.matches("FAILED").count(), 1, "{found}");

    assert!(house.done(&["migrate"]).await.starts_with("Applied "));
    assert_eq!(house.done(&["migrate"]).await, "The schema is up to date.\n");
    assert!(house.done(&["topology", "declare"]).await.starts_with("Declared "));
    let found = house.done(&["check"]).await;
    for line in ["ok      schema", "ok      stored keys", "ok      topology"] {
        assert!(found.contains(line), "{line}: {found}");
    }
    house.broker.clean_up().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_binding_taken_out_of_the_settings_is_unbound_by_the_next_declaration() {
    let house = House::new("unbound", TestDatabase::migrated().await).await;
    house.done(&["topology", "declare"]).await;
    let file = tempfile::NamedTempFile::new().unwrap();
    let lane = "[[amqp.lanes]]\nname = \"notifications\"\nbindings = [\"notification.#\"]\n";
    std::fs::write(file.path(), lane).unwrap();
    let declare = ["topology", "declare", "--json", "--config", file.path().to_str().unwrap()];
    let answer: Value = serde_json::from_str(&house.done(&declare).await).unwrap();
    assert_eq!(answer["unbound"], json!([{"lane": "reminders", "binding": "reminder.#"}]));
    house.broker.publish_job("reminder.x", b"{}", BasicProperties::default()).await;
    house.broker.wait_count(&house.broker.name("dead"), 1).await;
    house.broker.clean_up().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_is_published_to_its_lane_and_followed_to_its_outcome() {
    let house = House::new("send", TestDatabase::migrated().await).await;
    house.broker.declare().await;
    let arguments =
        ["job", "send", "--org", "42", "--to", "Ann <ann@example.org>", "--subject", "Hi", "--text", "x"];
    let more = ["--kind", "booking.confirmed", "--lane", "reminders", "--wait", "--json"];
    for (event, code) in [("email.sent", 0), ("email.dead", 1), ("email.expired", 1)] {
        let mut child = house.command(&[&arguments[..], &more].concat()).spawn().unwrap();
        let mut printed = lines(&mut child);
        let published = json_line(&mut printed).await;
        assert_eq!(published["routing_key"], "reminder.booking_confirmed");

        let message = house.broker.take(&house.broker.name("jobs.reminders")).await;
        let job: Value = serde_json::from_slice(&message.body).unwrap();
        assert_eq!((&job["id"], &job["kind"]), (&published["id"], &json!("booking.confirmed")));
        assert_eq!(message.properties.delivery_mode(), &Some(2));

        let body = |kind: &str, org: &str| {
            json!({"type": kind, "at": "2026-11-22T20:00:00Z", "organization_id": org, "job_id": job["id"]})
                .to_string()
        };
        let exchange = house.broker.name("events");
        for (kind, org) in [("email.sent", "7"), ("email.deferred", "42"), (event, "42")] {
            house
                .broker
                .publish(&exchange, kind, body(kind, org).as_bytes(), BasicProperties::default())
                .await;
        }
        assert_eq!(json_line(&mut printed).await["type"], "email.deferred");
        assert_eq!(json_line(&mut printed).await["type"], event);
        assert_eq!(child.wait().await.unwrap().code(), Some(code), "{event}");
    }
    house.broker.clean_up().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_file_is_published_byte_for_byte() {
    let house = House::new("file", TestDatabase::migrated().await).await;
    house.broker.declare().await;
    let file = tempfile::NamedTempFile::new().unwrap();
    let body = "{ \"version\": 1, \"id\": \"0198c0de-0000-7000-8000-000000000001\", \"kind\": \"k\",\n \
                \"to\": [\"a@example.org\"], \"subject\": \"s\", \"text\": \"t\" }\n";
    std::fs::write(file.path(), body).unwrap();
    let id = house.done(&["job", "send", "--file", file.path().to_str().unwrap()]).await;
    assert_eq!(id, "0198c0de-0000-7000-8000-000000000001\n");
    let message = house.broker.take(&house.broker.name("jobs.notifications")).await;
    assert_eq!(String::from_utf8(message.body).unwrap(), body);
    assert_eq!(message.routing_key, "notification.k");
    house.broker.clean_up().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_without_a_topology_is_an_error_that_names_the_exchange() {
    let house = House::new("none", TestDatabase::migrated().await).await;
    let output = house.run(&["job", "send", "--to", "a@example.org", "--subject", "s", "--text", "t"]).await;
    assert_eq!(output.status.code(), Some(1));
    let words = super::stderr(&output);
    assert!(words.contains(&house.broker.name("jobs")) && words.contains("topology declare"), "{words}");
    house.broker.clean_up().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_ledgers_answer_has_the_contracts_shape() {
    let house = House::new("status", TestDatabase::migrated().await).await;
    let (id, twice) = ("0198c0de-0000-7000-8000-000000000001", "0198c0de-0000-7000-8000-000000000002");
    let rows = format!(
        "INSERT INTO jobs (id, organization_id, state, turn, owner, attempts, first_at, updated_at, reason, message_id, \
         reply) VALUES ('{id}', '42', 'dead', 1, 1, 3, now(), now(), 'message_refused', '<m@example.org>', '550 no'), \
         ('{twice}', '42', 'sent', 1, 1, 1, now(), now(), NULL, NULL, NULL), \
         ('{twice}', '', 'sent', 1, 1, 1, now(), now(), NULL, NULL, NULL)"
    );
    house.database.connect().await.execute(sqlx::AssertSqlSafe(rows)).await.unwrap();
    let answer: Value =
        serde_json::from_str(&house.done(&["job", "status", id, "--org", "42", "--json"]).await).unwrap();
    let expected = json!({
        "id": id, "organization_id": "42", "state": "dead", "reason": "message_refused", "attempts": 3,
        "next_attempt_at": null, "message_id": "<m@example.org>", "reply": "550 no", "history": [],
    });
    for (key, value) in expected.as_object().unwrap() {
        assert_eq!(&answer[key], value, "{key}");
    }
    let words = house.done(&["job", "status", id]).await;
    assert!(words.starts_with(&format!("42/{id}: dead\n")) && words.contains("550 no"), "{words}");

    let unknown = house.run(&["job", "status", id, "--org", "7"]).await;
    assert_eq!(unknown.status.code(), Some(1));
    let ambiguous = house.run(&["job", "status", twice]).await;
    assert_eq!(ambiguous.status.code(), Some(1));
    assert!(super::stderr(&ambiguous).contains("--org"), "{}", super::stderr(&ambiguous));
    house.broker.clean_up().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_organizations_server_is_managed_without_its_password_being_shown() {
    let house = House::new("org", TestDatabase::migrated().await).await;
    house.broker.declare().await;
    let control = house.control();

    let (switched, _) = tokio::join!(
        house.done(&["org", "feature", "42", "custom-smtp-for-orgs", "on"]),
        house.answer(&control)
    );
    assert_eq!(switched, "custom-smtp-for-orgs is on for organization 42.\n");

    let create =
        ["org", "smtp", "create", "42", "--host", "8.8.8.8", "--port", "587", "--username", "canary-user"];
    let rest = ["--from-email", "a@example.org", "--from-name", "A", "--password-stdin"];
    let mut child = house.command(&[&create[..], &rest].concat()).stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"canary-password\n").await.unwrap();
    let (output, command) = tokio::join!(child.wait_with_output(), house.answer(&control));
    assert_eq!(command["params"]["password"], "canary-password", "a line's end is no part of it");
    assert_eq!(output.unwrap().status.code(), Some(0));
    let unflagged = &rest[..4];
    let mut child = house.command(&[&create[..], unflagged].concat()).stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"canary-password").await.unwrap();
    let (output, command) = tokio::join!(child.wait_with_output(), house.answer(&control));
    assert_eq!(
        command["params"]["password"], "canary-password",
        "what is no terminal is read without being asked to"
    );
    assert_eq!(output.unwrap().status.code(), Some(1), "there is one already");

    let (shown, _) =
        tokio::join!(house.done(&["org", "smtp", "show", "42", "--json"]), house.answer(&control));
    assert!(!shown.contains("canary"), "{shown}");
    let shown: Value = serde_json::from_str(&shown).unwrap();
    assert_eq!((&shown["host"], &shown["version"]), (&json!("8.8.8.8"), &json!(1)));

    let moved = ["org", "smtp", "update", "42", "--host", "9.9.9.9"];
    let (refused, _) = tokio::join!(house.run(&moved), house.answer(&control));
    assert_eq!(refused.status.code(), Some(1));
    let words = super::stderr(&refused);
    assert!(words.contains("Enter the SMTP password again") && words.contains("field password"), "{words}");

    let renamed = ["org", "smtp", "update", "42", "--from-name", "B", "--if-version", "1"];
    let (words, _) = tokio::join!(house.done(&renamed), house.answer(&control));
    assert!(words.contains("version          2\n") && words.contains("from_name        B\n"), "{words}");

    let check = house.run(&["check", "--json"]).await;
    assert!(super::stdout(&check).contains("1 configurations open"), "{}", super::stdout(&check));

    let (deleted, _) = tokio::join!(house.done(&["org", "smtp", "delete", "42"]), house.answer(&control));
    assert!(deleted.starts_with("Deleted "), "{deleted}");
    house.broker.clean_up().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_whose_database_is_away_is_exit_code_3_and_one_that_is_asked_too_often_is_1() {
    let house = House::new("away", TestDatabase::migrated().await).await;
    house.done(&["topology", "declare"]).await;
    let nowhere = Store::new(&"postgres://nobody@127.0.0.1:1/none".into(), 1).expect("a URL");
    let away = house.control_over(nowhere, ControlRules::default());
    let asking = house.run(&["org", "smtp", "show", "42"]);
    let (output, _) = tokio::join!(asking, house.answer(&away));
    let words = super::stderr(&output);
    assert_eq!((output.status.code(), words.contains("(unavailable)")), (Some(3), true), "{words}");

    house.database.run("INSERT INTO test_times VALUES ('42', ARRAY[now()])").await;
    let one = ControlRules { custom_smtp_for_all: true, tests_per_minute: 1, ..ControlRules::default() };
    let busy = house.control_over(house.database.store(), one);
    let password = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(password.path(), "secret\n").expect("written");
    let file = password.path().to_str().expect("UTF-8");
    let server =
        ["org", "smtp", "test", "42", "--host", "mail.example.org", "--port", "587", "--username", "u"];
    let rest = ["--password-file", file, "--from-email", "a@example.org", "--from-name", "A"];
    let arguments = [&server[..], &rest].concat();
    let (output, _) = tokio::join!(house.run(&arguments), house.answer(&busy));
    let words = super::stderr(&output);
    assert_eq!((output.status.code(), words.contains("(rate_limited)")), (Some(1), true), "{words}");
    house.broker.clean_up().await;
}
