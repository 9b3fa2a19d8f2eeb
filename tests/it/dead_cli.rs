//! How ops looks at dead letters and at a job: the program's own output, against a real archive and ledger.

use std::process::{Output, Stdio};
use std::sync::Arc;
use std::time::Duration;

use secrecy::{ExposeSecret, SecretString};
use sendoff::clock::Clock;
use sendoff::control::{CommandMeta, Control, ControlRules};
use sendoff::egress::{AllowedPorts, Egress, EgressPolicy};
use sendoff::model::failure::Reason;
use sendoff::model::job::JobKey;
use sendoff::model::ledger::Turn;
use sendoff::model::letter::NewLetter;
use sendoff::model::organization::OrganizationId;
use sendoff::secrets::KeyRing;
use sendoff::store::{DeadLetters, SmtpConfigs};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use time::OffsetDateTime;
use tokio::process::Command;
use uuid::Uuid;

use crate::support::connector::connector;
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

#[tokio::test]
async fn a_listing_goes_on_where_its_page_ended() {
    let house = House::new().await;
    assert_eq!(house.done(&["dead", "list"]).await, "The archive has no dead letter.\n");
    assert_eq!(house.json(&["dead", "list"]).await, json!([]));
    let letters: Vec<_> =
        (1..=60).map(|job| house.letter(job, MINUTE * u32::try_from(job).unwrap())).collect();
    house.archive(&letters).await;
    assert_eq!(house.listed(&[]).await, (1..=50).collect::<Vec<_>>(), "50 unless said otherwise");

    let mut ids = Vec::new();
    let mut after = None;
    loop {
        let mut arguments = vec!["dead", "list", "--limit", "25"];
        arguments.extend(after.as_deref().into_iter().flat_map(|after| ["--after", after]));
        let printed = house.done(&arguments).await;
        let lines: Vec<&str> = printed.lines().collect();
        let letters = lines[1..].iter().filter(|line| line.contains("message_refused"));
        ids.extend(letters.filter_map(|line| line.split_whitespace().last().map(str::to_owned)));
        match lines.last().unwrap().split_once("--after ") {
            Some((_, next)) => after = Some(next.to_owned()),
            None => break,
        }
        assert!(ids.len() < 60, "a last page names no next one: {printed}");
    }
    assert_eq!(ids, (1..=60).map(id).collect::<Vec<_>>());

    let page = house.json(&["dead", "list", "--limit", "59"]).await;
    let last = &page[58];
    let after = format!("{}_{}", last["died_at"].as_str().unwrap(), last["letter"].as_str().unwrap());
    assert_eq!(house.listed(&["--after", &after]).await, [60]);
}

#[tokio::test]
async fn filters_combine() {
    let house = House::new().await;
    let base = |job, days| house.letter(job, DAY * days + MINUTE);
    let unread = NewLetter { key: None, kind: None, reason: Reason::Malformed, ..base(6, 5) };
    house
        .archive(&[
            base(1, 0),
            NewLetter { reason: Reason::Timeout, ..base(2, 1) },
            NewLetter { kind: Some("reminder".into()), ..base(3, 2) },
            of(base(4, 3), Some("acme")),
            of(base(5, 4), None),
            unread,
        ])
        .await;
    house
        .database
        .run(format!("UPDATE dead_letters SET state = 'discarded' WHERE job_id = '{}'", id(3)))
        .await;
    let (one, five, six) = (id(1), id(5), id(6));
    for (options, jobs) in [
        (vec!["--org", "42"], vec![1, 2, 3]),
        (vec!["--org", "acme,42", "--reason", "message_refused"], vec![1, 3, 4]),
        (vec!["--org", "42", "--kind", "booking.confirmed"], vec![1, 2]),
        (vec!["--reason", "timeout", "--kind", "reminder"], vec![]),
        (vec!["--state", "discarded"], vec![3]),
        (vec!["--state", "dead", "--org", "42"], vec![1, 2]),
        (vec!["--since", "2d"], vec![1, 2]),
        (vec!["--since", "4d", "--until", "36h"], vec![3, 4]),
        (vec!["--id", &one, "--id", &five], vec![1, 5]),
        (vec!["--id", &one, "--org", "acme"], vec![]),
        (vec!["--id", &six], vec![6]),
        (vec!["--id", &six, "--org", "42"], vec![]),
        (vec!["--org", "42", "--limit", "1"], vec![1]),
    ] {
        assert_eq!(house.listed(&options).await, jobs, "{options:?}");
    }
    let platform = house.json(&["dead", "list", "--platform"]).await;
    let ids: Vec<_> =
        platform.as_array().unwrap().iter().map(|letter| letter["id"].as_str().unwrap()).collect();
    assert_eq!(ids, [five.as_str()], "and not what tells no organization");
    assert_eq!(house.listed(&["--org", "platform"]).await, Vec::<u128>::new(), "an id like any other");
    let nothing = house.done(&["dead", "list", "--kind", "unheard.of"]).await;
    assert_eq!(nothing, "No dead letter matches.\n");
}

#[tokio::test]
async fn a_letter_in_a_listing_has_the_contracts_keys_and_no_address() {
    let house = House::new().await;
    let letter = NewLetter {
        detail: Some("550 <ann@example.org> is unknown".into()),
        routing_key: "notification.bob@example.org".into(),
        recipients: Some(vec![1]),
        ..house.letter(1, DAY + MINUTE)
    };
    let unread = NewLetter { job_id: None, key: None, kind: None, lane: None, ..house.letter(2, DAY * 5) };
    house.archive(&[letter.clone(), unread, of(house.letter(3, DAY * 6), None)]).await;

    let listed = house.json(&["dead", "list"]).await;
    shows_nobody(&listed.to_string());
    for (key, value) in [
        ("id", json!(id(1))),
        ("organization_id", json!("42")),
        ("platform", json!(false)),
        ("state", json!("dead")),
        ("reason", json!("message_refused")),
        ("detail", json!("550 <a…@example.org> is unknown")),
        ("attempts", json!(3)),
        ("letter", json!(letter.id())),
        ("kind", json!("booking.confirmed")),
        ("lane", json!("notifications")),
        ("deaths", json!(1)),
        ("replays", json!(0)),
        ("recipients", json!([1])),
        ("bytes", json!(letter.body.len())),
        ("history", json!([])),
        ("expires_at", json!(null)),
    ] {
        assert_eq!(listed[0][key], value, "{key}");
    }
    for time in ["died_at", "first_at", "archived_at"] {
        assert!(listed[0][time].as_str().is_some_and(|time| time.ends_with('Z')), "{time}");
    }
    assert_eq!(listed[1]["id"], listed[1]["letter"]);
    for (at, platform) in [(1, false), (2, true)] {
        let owner = (&listed[at]["organization_id"], &listed[at]["platform"]);
        assert_eq!(owner, (&json!(null), &json!(platform)), "{at}");
    }

    let table = house.done(&["dead", "list"]).await;
    shows_nobody(&table);
    let lines: Vec<Vec<&str>> = table.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(lines[0], ["AGE", "ORG", "KIND", "REASON", "ATTEMPTS", "STATE", "ID"]);
    assert_eq!(lines[1], ["1d", "42", "booking.confirmed", "message_refused", "3", "dead", &id(1)]);
    assert_eq!(lines[2][..3], ["5d", "(unknown)", "-"]);
    assert_eq!(lines[3][..2], ["6d", "(platform)"]);
}

#[tokio::test]
async fn a_line_of_a_listing_fits_the_terminal_and_keeps_its_id() {
    let house = House::new().await;
    let wide = NewLetter {
        kind: Some("k".repeat(64)),
        reason: Reason::UnsupportedVersion,
        ..of(house.letter(1, DAY), Some(&"o".repeat(64)))
    };
    house.archive(&[wide, house.letter(2, MINUTE)]).await;
    house.database.run("UPDATE dead_letters SET state = 'discarded'").await;
    let table = house.done(&["dead", "list"]).await;
    let lines: Vec<&str> = table.lines().collect();
    assert!(lines.iter().all(|line| line.chars().count() <= 110), "{table}");
    let start = |line: &str| line.chars().count() - 36;
    assert!(lines[1].ends_with(&id(2)) && lines[2].ends_with(&id(1)), "{table}");
    assert_eq!(start(lines[1]), start(lines[2]), "aligned");
    assert!(lines[2].contains("ooo…  kkk"), "{table}");
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
async fn letters_are_counted_by_reason_organization_and_age() {
    let house = House::new().await;
    assert_eq!(house.done(&["dead", "stats"]).await, "The archive has no dead letter.\n");
    let mut letters: Vec<_> = [MINUTE, MINUTE * 300, DAY * 3, DAY * 10, DAY * 60]
        .into_iter()
        .zip(1..)
        .map(|(ago, job)| house.letter(job, ago))
        .collect();
    letters.push(NewLetter { reason: Reason::Timeout, ..of(house.letter(6, DAY * 3), None) });
    house.archive(&letters).await;

    let stats = house.json(&["dead", "stats"]).await;
    let expected = json!([
        {"reason": "message_refused", "organization_id": "42", "platform": false, "total": 5,
         "ages": {"hour": 1, "day": 1, "week": 1, "month": 1, "older": 1}},
        {"reason": "timeout", "organization_id": null, "platform": true, "total": 1,
         "ages": {"hour": 0, "day": 0, "week": 1, "month": 0, "older": 0}},
    ]);
    assert_eq!(stats, expected);
    let printed = house.done(&["dead", "stats"]).await;
    let lines: Vec<Vec<&str>> = printed.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(lines[0], ["REASON", "ORGANIZATION", "TOTAL", "<1h", "<1d", "<7d", "<30d", "older"]);
    assert_eq!(lines[1], ["message_refused", "42", "5", "1", "1", "1", "1", "1"], "and no bar in a pipe");
    assert_eq!(lines[2], ["timeout", "(platform)", "1", "0", "0", "1", "0", "0"]);
    assert_eq!(lines[3], ["total", "6", "1", "1", "2", "1", "1"]);
    let some = house.json(&["dead", "stats", "--since", "7d", "--org", "42"]).await;
    assert_eq!((some.as_array().unwrap().len(), &some[0]["total"]), (1, &json!(3)));
    assert_eq!(house.json(&["dead", "stats", "--limit", "1"]).await.as_array().unwrap().len(), 1);
}

#[tokio::test]
async fn a_job_that_only_the_archive_knows_has_a_status() {
    let house = House::new().await;
    let body = format!("{{\"version\": 1, \"id\": \"{}\", \"to\": \"ann@example.org\"}}", id(1));
    let malformed = NewLetter {
        reason: Reason::Malformed,
        detail: Some("to: must be an array".into()),
        attempts: 0,
        first_at: None,
        turn: Turn(0),
        ..with_body(house.letter(1, MINUTE), body.as_bytes())
    };
    let unread = NewLetter { job_id: None, key: None, ..malformed.clone() };
    house.archive(&[malformed.clone(), unread.clone()]).await;

    let id = id(1);
    let expected = json!({
        "id": id, "organization_id": "42", "state": "dead", "reason": "malformed", "attempts": 0,
        "next_attempt_at": null, "message_id": null, "reply": null, "history": [],
        "detail": "to: must be an array", "letter": malformed.id(), "refused": [], "platform": false,
    });
    let answer = house.json(&["job", "status", &id, "--org", "42"]).await;
    for (key, value) in expected.as_object().unwrap() {
        assert_eq!(&answer[key], value, "{key}");
    }
    let story = house.done(&["job", "status", &id]).await;
    shows_nobody(&story);
    for words in
        [&format!("42/{id}: dead\n"), "the body is no job (malformed)", "to: must be an array", "Next: "]
    {
        assert!(story.contains(words), "{words}: {story}");
    }
    let by_letter = house.json(&["job", "status", &unread.id().to_string()]).await;
    assert_eq!((&by_letter["id"], &by_letter["state"]), (&json!(unread.id()), &json!("dead")));
    let other = house.fails(&["job", "status", &id, "--org", "7"], 1).await;
    assert!(other.contains("neither the ledger nor the archive"), "{other}");
    house.fails(&["job", "status", &id, "--platform"], 1).await;

    assert_eq!(job_status(&house, json!("42"), &id).await["result"], answer, "one way to tell it");
    let spelled = &job_status(&house, json!(42), &id).await["result"]["organization_id"];
    assert_eq!(*spelled, 42, "as the command spells it");
    assert_eq!(job_status(&house, json!(7), &id).await["error"]["code"], "not_found");
    let nobodys = job_status(&house, json!(null), &unread.id().to_string()).await;
    assert_eq!(nobodys["error"]["code"], "not_found", "a letter without a job is no job of the platform's");
}

#[tokio::test]
async fn a_letter_that_tells_an_id_and_no_usable_organization_is_found_by_that_id_and_is_nobodys_job() {
    let house = House::new().await;
    let body = json!({"version": 1, "id": Uuid::from_u128(1), "organization_id": "not valid!", "kind": "k"});
    let unknown = NewLetter {
        key: None,
        reason: Reason::Malformed,
        detail: Some("organization_id: must be an integer".into()),
        ..with_body(house.letter(1, MINUTE), body.to_string().as_bytes())
    };
    house.archive(std::slice::from_ref(&unknown)).await;
    let (id, letter) = (id(1), unknown.id().to_string());
    assert_eq!(house.listed(&["--id", &id]).await, [1]);
    assert_eq!(house.listed(&["--id", &id, "--platform"]).await, Vec::<u128>::new());
    let headline = format!("(unknown)/{id}: dead\n");
    for command in [["dead", "show"], ["job", "status"]] {
        for name in [&id, &letter] {
            let story = house.done(&[&command[..], &[name]].concat()).await;
            assert!(story.starts_with(&headline) && story.contains("organization_id: must be"), "{story}");
            let told = house.json(&[&command[..], &[name]].concat()).await;
            let facts = ["id", "organization_id", "platform", "letter", "reason"].map(|name| &told[name]);
            let expected = json!([id, null, false, letter, "malformed"]);
            assert_eq!(json!(facts), expected);
        }
        house.fails(&[&command[..], &[&id, "--platform"]].concat(), 1).await;
    }
    assert_eq!(house.json(&["dead", "stats"]).await[0]["platform"], false);
    let discarded = house.json(&["dead", "discard", "--id", &id, "--dry-run"]).await;
    assert_eq!((&discarded["selected"], &discarded["groups"][0]["platform"]), (&json!(1), &json!(false)));
    for organization in [json!(null), json!(42)] {
        for name in [&id, &letter] {
            let answer = job_status(&house, organization.clone(), name).await;
            assert_eq!(answer["error"]["code"], "not_found", "it is not known to be theirs");
        }
    }

    // An older letter of somebody's job comes before one of nobody's.
    house.archive(&[house.letter(1, DAY)]).await;
    for command in [["dead", "show"], ["job", "status"]] {
        let story = house.done(&[&command[..], &[&id]].concat()).await;
        assert!(story.starts_with(&format!("42/{id}: dead\n")), "{story}");
        let story = house.done(&[&command[..], &[&letter]].concat()).await;
        assert!(story.starts_with(&headline), "{story}");
    }
}

/// What the control command answers.
async fn job_status(house: &House, organization: Value, id: &str) -> Value {
    let keys = Arc::new(KeyRing::parse(&[SecretString::from(KEY)]).expect("a key ring"));
    let configs = SmtpConfigs::new(house.database.store(), keys);
    let policy = EgressPolicy::new(Vec::new(), Vec::new(), AllowedPorts::Any);
    let egress = Arc::new(Egress::new(policy, &["127.0.0.1:9".parse().unwrap()]).expect("a name server"));
    let (store, smtp) = (house.database.store(), connector(egress));
    let control = Control::new(store, configs, smtp, Clock::system(), ControlRules::default());
    let command = json!({"command": "job.status", "organization_id": organization, "params": {"id": id}});
    let response = control.handle(command.to_string().as_bytes(), CommandMeta::default()).await;
    serde_json::from_slice(&response.to_json()).expect("a reply is JSON")
}

#[tokio::test]
async fn a_jobs_story_is_told_in_words_with_each_attempt() {
    let house = House::new().await;
    house.archive(&[house.letter(1, MINUTE)]).await;
    let deed = json!([{"what": "discard", "at": "2026-11-21T09:00:00Z", "by": "cli:emil"}]);
    house.database.run(format!("UPDATE dead_letters SET state = 'discarded', history = '{deed}'")).await;
    ledger_row(&house, 1, "dead", 1).await;
    let story = house.done(&["job", "status", &id(1)]).await;
    shows_nobody(&story);
    for words in [
        &format!("42/{}: dead\nIt died at ", id(1)),
        "(1 h ago), because the server refused the message (message_refused).\nNext: nothing by itself; treat the cause, then `sendoff dead replay",
        "Attempts (2 of 3 are kept):\n  1. 2026-11-20T12:00:00Z",
        "  2. 2026-11-20T12:05:00Z",
        "550 no",
        "<m@example.org>",
        "discarded by cli:emil",
    ] {
        assert!(story.contains(words), "{words}: {story}");
    }
}

#[tokio::test]
async fn one_id_of_two_organizations_needs_a_choice_and_two_bodies_of_one_job_do_not() {
    let house = House::new().await;
    let newer = with_body(house.letter(1, MINUTE), b"another");
    house.archive(&[house.letter(1, DAY), NewLetter { reason: Reason::IdConflict, ..newer }]).await;
    let story = house.done(&["dead", "show", &id(1)]).await;
    assert!(story.contains("id_conflict") && story.contains("1 letter more"), "{story}");

    house.archive(&[of(house.letter(1, DAY), Some("acme")), of(house.letter(1, DAY), None)]).await;
    for command in [["dead", "show"], ["job", "status"]] {
        let words = house.fails(&[&command[..], &[&id(1)]].concat(), 1).await;
        assert!(words.contains("acme") && words.contains("--org or --platform"), "{words}");
        for (choice, name) in [(vec!["--org", "acme"], "acme/"), (vec!["--platform"], "platform/")] {
            let story = house.done(&[&command[..], &[&id(1)], &choice].concat()).await;
            assert!(story.starts_with(name), "{story}");
        }
    }
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
