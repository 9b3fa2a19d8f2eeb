//! How ops looks at dead letters and at a job: the program's own output, against a real archive and ledger.

mod jobs;
mod listing;

use std::process::{Output, Stdio};
use std::sync::Arc;
use std::time::Duration;

use secrecy::{ExposeSecret, SecretString};
use sendoff::clock::Clock;
use sendoff::model::job::JobKey;
use sendoff::model::letter::NewLetter;
use sendoff::model::organization::OrganizationId;
use sendoff::secrets::KeyRing;
use sendoff::store::DeadLetters;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use time::OffsetDateTime;
use tokio::process::Command;
use uuid::Uuid;

use crate::support::database::TestDatabase;
use crate::support::letters::new_letter;

const KEY: &str = "k1:AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=";
const OTHER_KEY: &str = "k2:AgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgI=";
/// What is personal in the body of [`House::letter`].
const PERSONAL: [&str; 4] = ["ann@", "bob@", "carol@", "Ann Lee"];
const MINUTE: Duration = Duration::from_secs(60);
const DAY: Duration = Duration::from_secs(86_400);

/// A database of the test's own, and the program that looks into it.
struct House {
    database: TestDatabase,
    now: OffsetDateTime,
}

impl House {
    async fn new() -> Self {
        Self { database: TestDatabase::migrated().await, now: Clock::system().now() }
    }

    async fn run_with(&self, arguments: &[&str], keys: Option<&str>) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sendoff"));
        command.args(arguments).env_clear().env("DATABASE_URL", self.database.url().expose_secret());
        if let Some(keys) = keys {
            command.env("SENDOFF__ENCRYPTION__KEYS", keys);
        }
        command.stdin(Stdio::null()).kill_on_drop(true).output().await.expect("the program runs")
    }

    async fn run(&self, arguments: &[&str]) -> Output {
        self.run_with(arguments, Some(KEY)).await
    }

    /// Runs a command that is expected to end well, and gives what it printed.
    async fn done(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments).await;
        let words = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!((output.status.code(), words.as_str()), (Some(0), ""), "{arguments:?}");
        String::from_utf8(output.stdout).expect("the output is UTF-8")
    }

    async fn json(&self, arguments: &[&str]) -> Value {
        let printed = self.done(&[arguments, &["--json"]].concat()).await;
        serde_json::from_str(&printed).unwrap_or_else(|_| panic!("not JSON: {printed}"))
    }

    /// What a listing shows, by the numbers of the jobs.
    async fn listed(&self, options: &[&str]) -> Vec<u128> {
        let letters = self.json(&[&["dead", "list"], options].concat()).await;
        letters.as_array().expect("an array").iter().map(number).collect()
    }

    /// Runs a command that is expected to fail, and gives what it complained of.
    async fn fails(&self, arguments: &[&str], code: i32) -> String {
        let output = self.run(arguments).await;
        let words = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {words}");
        assert!(output.stdout.is_empty() && !words.is_empty(), "{arguments:?}");
        words
    }

    async fn archive(&self, letters: &[NewLetter]) {
        let keys = Arc::new(KeyRing::parse(&[SecretString::from(KEY)]).expect("the key is one"));
        let archive = DeadLetters::new(self.database.store(), keys);
        archive.archive(letters).await.expect("the database answers");
    }

    /// A letter that a worker wrote some time ago, when it gave up organization 42's job of that number.
    fn letter(&self, job: u128, ago: Duration) -> NewLetter {
        let body = json!({
            "version": 1, "id": Uuid::from_u128(job), "organization_id": 42, "kind": "booking.confirmed",
            "to": ["Ann Lee <ann@example.org>"], "bcc": ["bob@example.org"], "subject": "Your booking, ann@example.org",
            "text": "Dear customer,\ncarol@example.org expects you.",
            "attachments": [{"filename": "plan.pdf", "content_type": "application/pdf", "content_base64": "YWJj"}],
        });
        let key = JobKey { organization: Some(OrganizationId::from_integer(42)), id: Uuid::from_u128(job) };
        let letter = new_letter(key, body.to_string().into_bytes(), self.now - ago);
        NewLetter { detail: Some("the server answered 550 no".into()), attempts: 3, ..letter }
    }
}

/// The number that a letter's job was given.
fn number(letter: &Value) -> u128 {
    letter["id"].as_str().and_then(|id| Uuid::parse_str(id).ok()).expect("an id").as_u128()
}

fn id(number: u128) -> String {
    Uuid::from_u128(number).to_string()
}

fn with_body(letter: NewLetter, body: &[u8]) -> NewLetter {
    NewLetter { body_hash: Sha256::digest(body).into(), body: body.to_vec(), ..letter }
}

fn of(letter: NewLetter, organization: Option<&str>) -> NewLetter {
    let organization = organization.map(|text| OrganizationId::parse(text).unwrap());
    let id = letter.key.as_ref().unwrap().id;
    NewLetter { key: Some(JobKey { organization, id }), ..letter }
}

fn shows_nobody(printed: &str) {
    for personal in PERSONAL {
        assert!(!printed.contains(personal), "{personal}: {printed}");
    }
}

/// The ledger's row of the job of that number, with two attempts kept.
async fn ledger_row(house: &House, job: u128, state: &str, turn: i32) {
    let attempts = json!([
        {"at": "2026-11-20T12:00:00Z", "transport": "organization", "address": "192.0.2.7:587", "phase": "rcpt",
         "reason": "throttled", "reply": "450 4.2.0 later <c…@example.org>", "ms": 120},
        {"at": "2026-11-20T12:05:00Z", "transport": "platform", "phase": "resolve", "reason": "dns_failed", "ms": 5000},
    ]);
    let reason = if state == "sent" { "NULL" } else { "'message_refused'" };
    let sql = format!(
        "INSERT INTO jobs (id, organization_id, state, turn, owner, attempts, first_at, updated_at, reason, message_id,
            reply, history)
         VALUES ('{}', '42', '{state}', {turn}, 1, 3, now() - interval '2 hours', now() - interval '1 hour', {reason},
            '<m@example.org>', '550 no', '{attempts}')",
        id(job)
    );
    house.database.run(sql).await;
}

#[tokio::test]
async fn a_letter_is_shown_with_its_whole_story_and_its_message_without_its_people() {
    let house = House::new().await;
    let letter = house.letter(1, MINUTE * 60);
    house.archive(std::slice::from_ref(&letter)).await;
    ledger_row(&house, 1, "sent", 2).await;
    let deeds = json!([
        {"what": "replay", "at": "2026-11-21T08:00:00Z", "by": "cli:dora",
         "outcome": {"state": "dead", "reason": "timeout", "at": "2026-11-21T08:01:00Z"}},
        {"what": "replay", "at": "2026-11-21T09:00:00Z", "by": "cli:emil"},
    ]);
    house
        .database
        .run(format!(
            "UPDATE dead_letters SET state = 'replayed', replays = 2, replay_turn = 2, history = '{deeds}'"
        ))
        .await;

    let listed = house.json(&["dead", "list"]).await;
    let outcomes: Vec<_> = (0..2).map(|at| &listed[0]["history"][at]["outcome"]["state"]).collect();
    assert_eq!(outcomes, ["dead", "sent"], "{listed}");
    let story = house.done(&["dead", "show", &id(1)]).await;
    shows_nobody(&story);
    for words in [
        &format!("42/{}: replayed\n", id(1)),
        "because the server refused the message (message_refused)",
        "the server answered 550 no",
        "notification.booking",
        "2026-11-20T12:00:00Z",
        "the organization's server at 192.0.2.7:587, ended naming the recipients (phase rcpt) after 120 ms: the server \
         asked to slow down (throttled): 450 4.2.0 later <c…@example.org>",
        "the platform's server, ended looking up the host (phase resolve) after 5000 ms",
        "replayed by cli:dora: it died again (timeout) at 2026-11-21T08:01:00Z",
        "replayed by cli:emil: sent at ",
        "The ledger: sent.",
        "a…@example.org",
        "b…@example.org",
        "Your booking, a…@example.org",
        "plan.pdf, application/pdf, 3 bytes",
        "| Dear customer,\n  | c…@example.org expects you.",
    ] {
        assert!(story.contains(words), "{words}: {story}");
    }
    let revealed = house.done(&["dead", "show", &letter.id().to_string(), "--org", "42", "--reveal"]).await;
    for personal in PERSONAL {
        assert!(revealed.contains(personal), "{personal}: {revealed}");
    }

    let told = house.json(&["dead", "show", &id(1)]).await;
    shows_nobody(&told.to_string());
    assert_eq!(told["id"], json!(id(1)));
    assert_eq!(told["history"][0]["outcome"]["reason"], "timeout");
    assert_eq!(told["history"][1]["outcome"]["state"], "sent", "the ledger knows it first");
    assert_eq!(told["job"]["history"][0]["address"], "192.0.2.7:587");
    assert_eq!(told["message"]["to"], json!(["a…@example.org"]));
    assert_eq!(told["message"]["attachments"][0]["bytes"], 3);
    let revealed = house.json(&["dead", "show", &id(1), "--reveal"]).await;
    assert_eq!(revealed["message"]["to"], json!(["Ann Lee <ann@example.org>"]));
}

#[tokio::test]
async fn a_letter_that_does_not_open_still_has_its_story() {
    let house = House::new().await;
    house.archive(&[house.letter(1, MINUTE)]).await;
    for (keys, why) in [
        (None, "encryption.keys is not set"),
        (Some(OTHER_KEY), "sealed under the key `k1`, which is not in encryption.keys"),
    ] {
        let shown = house.run_with(&["dead", "show", &id(1)], keys).await;
        let story = String::from_utf8(shown.stdout).unwrap();
        assert_eq!(shown.status.code(), Some(0), "{story}");
        assert!(story.contains("message_refused") && story.contains(why), "{story}");
        let raw = house.run_with(&["dead", "show", &id(1), "--raw", "--reveal"], keys).await;
        assert_eq!((raw.status.code(), raw.stdout.as_slice()), (Some(1), &b""[..]));
        assert!(String::from_utf8_lossy(&raw.stderr).contains(why));
        for command in [["dead", "list"], ["dead", "stats"]] {
            assert_eq!(
                house.run_with(&command, keys).await.status.code(),
                Some(0),
                "{command:?} needs no key"
            );
        }
    }
}

#[tokio::test]
async fn a_body_leaves_byte_for_byte_only_when_it_is_to_be_revealed() {
    let house = House::new().await;
    let body = b"\xff\0\x1b[2J ann@example.org \r\n".as_slice();
    house.archive(&[with_body(house.letter(1, MINUTE), body)]).await;
    let id = id(1);
    let raw = house.run(&["dead", "show", &id, "--raw", "--reveal"]).await;
    assert_eq!((raw.status.code(), raw.stdout.as_slice()), (Some(0), body));
    let words = house.fails(&["dead", "show", &id, "--raw"], 2).await;
    assert!(words.contains("--reveal"), "{words}");
    house.fails(&["dead", "show", &id, "--raw", "--reveal", "--json"], 2).await;
}

#[tokio::test]
async fn hostile_content_never_commands_the_terminal() {
    let house = House::new().await;
    let hostile =
        "\u{1b}]0;owned\u{7}\u{1b}[2J\r\n\u{9b}31m\u{202e}gpj\u{2066}\u{2028}\u{7f} ann@example.org";
    let job = |job, body: &[u8]| NewLetter {
        kind: Some(hostile.into()),
        lane: Some(hostile.into()),
        routing_key: hostile.into(),
        detail: Some(hostile.into()),
        ..with_body(house.letter(job, MINUTE), body)
    };
    let escaped = json!({"subject": hostile, "x\u{1b}[2J": [hostile]}).to_string();
    let real = json!({
        "version": 1, "id": Uuid::from_u128(3), "organization_id": 42, "kind": "k", "to": ["ann@example.org"],
        "subject": hostile, "text": hostile, "headers": {"X-A": hostile},
        "attachments": [{"filename": hostile, "content_type": "a/b", "content_base64": "YQ=="}],
    });
    let real = real.to_string();
    house
        .archive(&[
            job(1, hostile.as_bytes()),
            job(2, escaped.as_bytes()),
            job(3, real.as_bytes()),
            job(4, b"\xff\x1b[2J"),
        ])
        .await;
    let deed = json!([{"what": "discard", "at": "2026-11-21T09:00:00Z", "by": hostile.replace('@', "")}]);
    house.database.run(format!("UPDATE dead_letters SET history = '{deed}'")).await;

    let mut commands: Vec<Vec<String>> =
        vec![vec!["dead".into(), "list".into()], vec!["dead".into(), "stats".into()]];
    for number in 1..=4 {
        commands.push(vec!["dead".into(), "show".into(), id(number)]);
        commands.push(vec!["dead".into(), "show".into(), id(number), "--reveal".into()]);
        commands.push(vec!["job".into(), "status".into(), id(number)]);
    }
    for command in commands {
        let arguments: Vec<&str> = command.iter().map(String::as_str).collect();
        for more in [&[][..], &["--json"]] {
            let arguments = [&arguments[..], more].concat();
            let printed = house.done(&arguments).await;
            let harmful = printed.chars().find(|c| *c != '\n' && sendoff::model::text::is_harmful(*c));
            assert_eq!(harmful, None, "{arguments:?}: {printed}");
            assert!(arguments.contains(&"--reveal") || !printed.contains("ann@"), "{arguments:?}: {printed}");
        }
    }
}

#[tokio::test]
async fn what_cannot_be_meant_is_a_usage_error_that_says_what_is_allowed() {
    let house = House::new().await;
    for (arguments, allowed) in [
        (&["dead"][..], "list"),
        (&["dead", "list", "--reason", "time_out"], "'timeout'"),
        (&["dead", "list", "--reason", "nonsense"], "quota_exceeded"),
        (&["dead", "stats", "--state", "deed"], "'dead'"),
        (&["dead", "list", "--since", "yesterday"], "RFC 3339"),
        (&["dead", "list", "--since", "1h", "--until", "2h"], "--until"),
        (&["dead", "list", "--limit", "0"], "--limit"),
        (&["dead", "list", "--org", "a b"], "A-Z"),
        (&["dead", "list", "--after", "7"], "RFC 3339"),
        (&["dead", "show"], "ID"),
        (&["dead", "show", "seven"], "'seven' for '<ID>'"),
        (&["dead", "show", "00000000-0000-0000-0000-000000000007", "--org", "1", "--platform"], "--platform"),
    ] {
        let words = house.fails(arguments, 2).await;
        assert!(words.contains(allowed), "{arguments:?}: {words}");
    }
    let words = house.fails(&["dead", "show", &id(7)], 1).await;
    assert!(words.contains(&id(7)), "{words}");
}

#[tokio::test]
async fn a_database_without_the_schema_is_told_what_to_run() {
    let house = House::new().await;
    house.database.run("DROP TABLE dead_letters").await;
    let error = house.fails(&["dead", "list"], 1).await;
    assert!(error.contains("sendoff migrate"), "{error}");
}

#[tokio::test]
async fn a_database_that_is_away_has_its_own_exit_code() {
    let (url, id) = ("postgres://u:canary@127.0.0.1:1/d", id(1));
    for arguments in
        [&["dead", "list"][..], &["dead", "stats", "--json"], &["dead", "show", &id], &["job", "status", &id]]
    {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sendoff"));
        let output = command.args(arguments).env_clear().env("DATABASE_URL", url).output().await.unwrap();
        let words = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(3), "{arguments:?}: {words}");
        assert!(
            output.stdout.is_empty() && words.starts_with("error: ") && !words.contains("canary"),
            "{words}"
        );
    }
    let mut command = Command::new(env!("CARGO_BIN_EXE_sendoff"));
    let output = command.args(["dead", "list"]).env_clear().output().await.unwrap();
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(1) && words.contains("database.url"), "{words}");
}
