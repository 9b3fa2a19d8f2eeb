//! `sendoff dead replay` and `sendoff dead discard` against real services: what is sent again, what is left out and why, and
//! what is on record.
//! Guarantee: whatever ends a run, and however often it is given again, nobody gets a second copy.

use std::collections::HashSet;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use sendoff::broker::wire::WireLimits;
use sendoff::broker::{Access, AmqpUrl, Broker, BrokerSettings};
use sendoff::clock::Clock;
use sendoff::dead_letters::replay::{Ended, Manner, Order, Replayer};
use sendoff::model::failure::Reason;
use sendoff::model::job::{JobKey, Revision};
use sendoff::model::ledger::State;
use sendoff::model::letter::{Deed, Letter, LetterFilter, LetterState, NewLetter};
use sendoff::model::replay::ReplayRules;
use sendoff::shutdown::Shutdown;
use sendoff::store::Store;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio::process::Child;
use tokio::time::Instant;
use uuid::Uuid;

use crate::support::broker::{amqp_url, eventually};
use crate::support::letters::new_letter;
use crate::support::proxy::Proxy;
use crate::support::smtp_server::{Action, Rule, Stage};
use crate::support::world::{SOON, World, job};

/// Without progress for so long, a run on a busy machine is stuck.
const STUCK: Duration = Duration::from_secs(60);

/// A letter of a job of the platform's that a worker gave up a minute ago.
fn letter_of(job: &Value) -> NewLetter {
    let body = serde_json::to_vec(job).expect("JSON");
    let died_at = Clock::system().now() - Duration::from_secs(60);
    let id = job["id"].as_str().and_then(|id| id.parse().ok()).expect("a job of a test has an id");
    new_letter(JobKey { organization: None, id }, body, died_at)
}

fn id_of(letter: &NewLetter) -> Uuid {
    letter.key.as_ref().expect("a letter of a test has a job").id
}

/// Archives letters of small jobs; their ids.
async fn dead_letters(world: &World, count: usize) -> Vec<Uuid> {
    let letters: Vec<NewLetter> = (0..count).map(|_| letter_of(&job(None))).collect();
    keep(world, &letters).await;
    letters.iter().map(id_of).collect()
}

/// Archives letters, and enters their jobs into the ledger as dead.
async fn keep(world: &World, letters: &[NewLetter]) {
    for some in letters.chunks(1000) {
        world.archive().archive(some).await.expect("archived");
    }
    world
        .database
        .run(
            "INSERT INTO jobs (id, organization_id, body_hash, state, turn, owner, attempts, first_at, updated_at, reason) \
             SELECT job_id, organization_id, body_hash, 'dead', turn, 0, attempts, first_at, now(), reason \
             FROM dead_letters WHERE organization_id IS NOT NULL ON CONFLICT DO NOTHING",
        )
        .await;
}

/// Runs a replay to its end; its exit code and its result.
async fn replay(world: &World, options: &[&str]) -> (i32, Value) {
    let (code, out, errors) = world.run(&[&["dead", "replay", "--json"], options].concat()).await;
    let result = serde_json::from_str(&out).unwrap_or_else(|_| panic!("{code}: {out}{errors}"));
    assert_sum(&result);
    (code, result)
}

/// Every selected letter is accounted for.
fn assert_sum(result: &Value) {
    let number = |name: &str| result[name].as_u64().expect("a count");
    let skipped: u64 =
        result["skipped"].as_object().expect("counts").values().filter_map(Value::as_u64).sum();
    let sum = number("replayed") + skipped + number("unconfirmed") + number("not_reached");
    assert_eq!(number("selected"), sum, "{result}");
}

fn start(world: &World, options: &[&str]) -> Child {
    let mut command = world.command(&[&["dead", "replay", "--json"], options].concat());
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it starts")
}

async fn ended_run(child: Child) -> (i32, Value) {
    let output =
        tokio::time::timeout(STUCK, child.wait_with_output()).await.expect("it ends").expect("it ran");
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    let result = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{errors}"));
    assert_sum(&result);
    (output.status.code().unwrap_or(-1), result)
}

async fn letters_in(world: &World, state: LetterState) -> i64 {
    let state = state.as_str();
    world.database.number(format!("SELECT count(*) FROM dead_letters WHERE state = '{state}'")).await
}

async fn sent(world: &World) -> i64 {
    world.database.number("SELECT count(*) FROM jobs WHERE state = 'sent'").await
}

/// Waits until the ledger has so many sent jobs, for as long as there is progress.
async fn all_sent(world: &World, count: i64) {
    progress("sent", count, async || sent(world).await).await;
}

/// Waits until a number has come so far, for as long as it grows.
async fn progress(what: &str, far: i64, mut number: impl AsyncFnMut() -> i64) {
    let (mut last, mut since) = (number().await, Instant::now());
    while last < far {
        tokio::time::sleep(Duration::from_millis(50)).await;
        let now = number().await;
        if now > last {
            (last, since) = (now, Instant::now());
        }
        assert!(since.elapsed() < STUCK, "{last} of {far} are {what}");
    }
}

/// The jobs that a server has messages of, and how many messages there are.
fn delivered(messages: &[crate::support::smtp_server::Received]) -> (HashSet<String>, usize) {
    let id = |text: String| {
        let (_, rest) = text.split_once("Message-ID: <").expect("a Message-ID");
        rest.split('@').next().unwrap_or_default().to_owned()
    };
    (messages.iter().map(|message| id(message.text())).collect(), messages.len())
}

async fn the_letter(store: &Store, id: Uuid) -> Letter {
    let letters = store.letters_of(id, None).await.expect("the database answers");
    assert_eq!(letters.len(), 1, "{letters:?}");
    letters.into_iter().next().expect("just counted")
}

/// Waits until the archive has a letter of a job, dead so often.
async fn died(world: &World, id: Uuid, deaths: u32) -> Letter {
    let store = world.database.store();
    let mut found = None;
    eventually(&format!("{id} is archived, {deaths} deaths"), async || {
        let letters = store.letters_of(id, None).await.expect("the database answers");
        found =
            letters.into_iter().find(|letter| letter.deaths == deaths && letter.state == LetterState::Dead);
        found.is_some()
    })
    .await;
    found.expect("just seen")
}

/// The newest entry of the audit log: actor, command, outcome, summary.
async fn audit(world: &World) -> (String, String, String, Value) {
    sqlx::query_as::<_, (String, String, String, sqlx::types::Json<Value>)>(
        "SELECT actor, command, outcome, summary FROM audit WHERE summary IS NOT NULL ORDER BY id DESC LIMIT 1",
    )
    .fetch_one(&mut world.database.connect().await)
    .await
    .map(|(actor, command, outcome, summary)| (actor, command, outcome, summary.0))
    .expect("an entry")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_letters_are_sent_once_each_although_the_replay_is_killed_in_the_middle() {
    const ALL: usize = 10_000;
    let world = World::new().await;
    let ids = dead_letters(&world, ALL).await;
    let worker = world.worker().await;
    // It comes as far as this job, whose row somebody else holds.
    let mut holder = world.database.connect().await;
    let held = format!("BEGIN; SELECT 1 FROM jobs WHERE id = '{}' FOR UPDATE", ids[ALL / 3]);
    sqlx::raw_sql(sqlx::AssertSqlSafe(held)).execute(&mut holder).await.expect("held");
    let me: i32 =
        sqlx::query_scalar("SELECT pg_backend_pid()").fetch_one(&mut holder).await.expect("a number");
    let mut killed = start(&world, &["--all", "--rate", "10000"]);
    let blocked = format!(
        "SELECT coalesce(max(pid), 0)::bigint FROM pg_stat_activity WHERE {me} = ANY (pg_blocking_pids(pid))"
    );
    let mut waits = 0;
    progress("there", 1, async || {
        waits = world.database.number(blocked.clone()).await;
        waits.min(1)
    })
    .await;
    killed.kill().await.expect("killed");
    sqlx::raw_sql("ROLLBACK").execute(&mut holder).await.expect("released");
    let session = format!("SELECT count(*) FROM pg_stat_activity WHERE pid = {waits}");
    eventually("its session is gone", async || world.database.number(session.clone()).await == 0).await;
    let rest = letters_in(&world, LetterState::Dead).await + letters_in(&world, LetterState::Replaying).await;
    assert!(rest > 0, "it was killed too late");

    let (code, result) = replay(&world, &["--all", "--rate", "10000"]).await;
    assert_eq!((code, &result["ended"]), (0, &json!("ok")));
    // What the killed run had asked of the database last may have been done only after it was looked at.
    assert!(
        result["selected"].as_i64().is_some_and(|selected| selected <= rest),
        "{rest} were left: {result}"
    );
    all_sent(&world, ALL as i64).await;
    worker.stop().await;
    let (jobs, messages) = delivered(&world.platform.messages());
    assert_eq!((jobs.len(), messages), (ALL, ALL));
    assert_eq!(jobs, ids.iter().map(Uuid::to_string).collect());
    assert_eq!(letters_in(&world, LetterState::Replayed).await, ALL as i64);
    // The killed run is on record too, as begun.
    let entries = "SELECT count(*) FROM audit WHERE command = 'dead.replay' AND outcome =";
    assert_eq!(world.database.number(format!("{entries} 'started'")).await, 1);
    assert_eq!(world.database.number(format!("{entries} 'ok'")).await, 1);
    world.broker.wait_count(&world.broker.name("jobs.notifications"), 0).await;
    world.end().await;
}

#[tokio::test]
async fn ctrl_c_ends_a_replay_after_what_is_in_hand_and_the_same_command_goes_on() {
    let world = World::new().await;
    let ids = dead_letters(&world, 150).await;
    let options = ["--reason", "message_refused", "--rate", "10", "--as", "user:7"];
    let interrupted = start(&world, &options);
    eventually("some are replayed", async || letters_in(&world, LetterState::Replayed).await > 0).await;
    let pid = interrupted.id().expect("it runs").to_string();
    let status = tokio::process::Command::new("kill").args(["-s", "INT", &pid]).status().await.expect("kill");
    assert!(status.success());
    let (code, result) = ended_run(interrupted).await;
    assert_eq!((code, &result["ended"]), (1, &json!("interrupted")));
    assert_eq!((&result["selected"], &result["unconfirmed"]), (&json!(150), &json!(0)));
    let replayed = result["replayed"].as_i64().expect("a count");
    assert!(replayed < 150, "{result}");
    assert_eq!(letters_in(&world, LetterState::Replayed).await, replayed);
    assert_eq!(letters_in(&world, LetterState::Replaying).await, 0);
    let (actor, command, outcome, summary) = audit(&world).await;
    assert_eq!((&*actor, &*command, &*outcome), ("user:7", "dead.replay", "interrupted"));
    assert_eq!(summary["result"]["replayed"], json!(replayed));
    assert_eq!(summary["filter"]["reasons"], json!(["message_refused"]));

    let (code, result) = replay(&world, &["--reason", "message_refused", "--rate", "1000"]).await;
    assert_eq!((code, &result["selected"]), (0, &json!(150 - replayed)));
    // Nobody works: each waits in its lane once.
    world.broker.wait_count(&world.broker.name("jobs.notifications"), 150).await;
    let worker = world.worker().await;
    all_sent(&world, 150).await;
    worker.stop().await;
    let (jobs, messages) = delivered(&world.platform.messages());
    assert_eq!((jobs, messages), (ids.iter().map(Uuid::to_string).collect(), 150));
    world.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_replays_of_the_same_letters_at_once_send_each_once() {
    let world = World::new().await;
    let ids = dead_letters(&world, 300).await;
    let worker = world.worker().await;
    let both = [start(&world, &["--all", "--rate", "500"]), start(&world, &["--all", "--rate", "500"])];
    for child in both {
        let (code, result) = ended_run(child).await;
        assert_eq!((code, &result["ended"]), (0, &json!("ok")));
    }
    // What each left to the other is replayed by now, or waits for a run to look at it.
    let (code, _) = replay(&world, &["--all"]).await;
    assert_eq!((code, letters_in(&world, LetterState::Replayed).await), (0, 300));
    all_sent(&world, 300).await;
    world.broker.wait_count(&world.broker.name("jobs.notifications"), 0).await;
    worker.stop().await;
    let (jobs, messages) = delivered(&world.platform.messages());
    assert_eq!((jobs, messages), (ids.iter().map(Uuid::to_string).collect(), 300));
    world.end().await;
}

#[tokio::test]
async fn what_may_not_be_sent_again_is_left_out_with_the_reason_and_a_dry_run_changes_nothing() {
    let world = World::new().await;
    let one = |change: &dyn Fn(&mut NewLetter)| {
        let mut letter = letter_of(&job(None));
        change(&mut letter);
        letter
    };
    let past = Clock::system().now() - Duration::from_secs(5);
    let revision = Revision { group: "booking".into(), sequence: 1 };
    let letters = [
        one(&|_| {}),
        one(&|letter| letter.expires_at = Some(past)),
        one(&|letter| letter.revision = Some(revision.clone())),
        one(&|letter| letter.reason = Reason::Cancelled),
        one(&|_| {}),
        one(&|letter| letter.reason = Reason::UnknownOutcome),
        one(&|letter| letter.reason = Reason::CrashLoop),
        one(&|_| {}),
        one(&|letter| (letter.lane, letter.routing_key) = (None, "nobody.takes.it".into())),
        one(&|letter| {
            letter.key = None;
            letter.body = b"no job".to_vec();
            letter.body_hash = Sha256::digest(&letter.body).into();
        }),
        one(&|_| {}),
    ];
    keep(&world, &letters).await;
    let id = |at: usize| id_of(&letters[at]);
    world
        .database
        .run(format!(
            "INSERT INTO job_groups VALUES ('', 'booking', 2, now());
             UPDATE jobs SET state = 'sent' WHERE id = '{}';
             UPDATE jobs SET unknowns = 1 WHERE id = '{}';
             UPDATE dead_letters SET replays = 3, deaths = 4 WHERE job_id = '{}';
             UPDATE jobs SET state = 'claimed', owner = 77 WHERE id = '{}'",
            id(4),
            id(6),
            id(7),
            id(10)
        ))
        .await;
    // The lock that a living worker of that number would hold.
    let mut living = world.database.connect().await;
    sqlx::raw_sql("SELECT pg_advisory_lock(24077, 77)").execute(&mut living).await.expect("locked");
    let expected = json!({
        "expired": 1, "superseded": 1, "cancelled": 1, "already_sent": 1, "unknown_outcome": 2, "too_many_replays": 1,
        "unroutable": 1, "not_a_job": 1, "in_progress": 1,
    });
    let everything = "SELECT (SELECT sum(hashtext(d::text)::bigint) FROM dead_letters AS d)::bigint \
        + (SELECT sum(hashtext(j::text)::bigint) FROM jobs AS j)::bigint + (SELECT count(*) FROM audit)";
    let before = world.database.number(everything).await;

    let (code, preview) = replay(&world, &["--all", "--dry-run"]).await;
    assert_eq!((code, &preview["selected"], &preview["replayed"]), (0, &json!(11), &json!(1)));
    assert_eq!(preview["skipped"], expected);
    assert_eq!(
        preview["groups"],
        json!([{"reason": "message_refused", "organization_id": null, "platform": true, "count": 1}])
    );
    let (_, words, _) = world.run(&["dead", "replay", "--all", "--dry-run"]).await;
    for line in
        ["11  selected", "1  would be replayed", "10  would be left out", "1  expired", "1  already_sent"]
    {
        assert!(words.contains(line), "{line}: {words}");
    }
    assert_eq!(world.database.number(everything).await, before, "a dry run has written something");
    world.broker.wait_count(&world.broker.name("jobs.notifications"), 0).await;

    let (code, result) = replay(&world, &["--all"]).await;
    assert_eq!((code, &result["replayed"], &result["skipped"]), (0, &json!(1), &expected));
    assert_eq!(result["too_many_replays"], json!([id(7)]));
    assert_eq!(letters_in(&world, LetterState::Replayed).await, 1);
    assert_eq!(letters_in(&world, LetterState::Dead).await, 10);

    let (_, result) = replay(&world, &["--id", &id(7).to_string(), "--max-replays", "4"]).await;
    assert_eq!(result["replayed"], json!(1));
    let (_, result) = replay(&world, &["--all", "--resend-unknown"]).await;
    assert_eq!(result["replayed"], json!(2), "{result}");
    assert_eq!(result["skipped"]["in_progress"], json!(1), "{result}");
    drop(living);
    eventually("the worker is dead", async || {
        let (_, result) = replay(&world, &["--id", &id(10).to_string(), "--dry-run"]).await;
        result["skipped"] == json!({"unknown_outcome": 1})
    })
    .await;
    world.broker.wait_count(&world.broker.name("jobs.notifications"), 4).await;
    world.end().await;
}

#[tokio::test]
async fn an_old_letter_is_really_sent_again_under_its_first_message_id() {
    let world = World::new().await;
    let worker = world.worker().await;
    world.organization("acme").await;
    world.server.rule(Rule::new(Stage::Mail, Action::reply("550 5.7.1 not you")));
    let id = world.publish(&job(Some("acme"))).await;
    died(&world, id, 1).await;
    let first = world.status(Some("acme"), id).await.and_then(|status| status.message_id).expect("kept");

    // Older than any job is retried, with its retries used up, and its sender's domain is another one by now.
    world
        .database
        .run(format!("UPDATE jobs SET first_at = now() - interval '9 days', attempts = 3 WHERE id = '{id}'"))
        .await;
    let moved = json!({"from_email": "hello@moved.example"});
    world.commanded("smtp_config.update", "acme", moved).await;
    world.server.change(|behaviour| behaviour.clear_rules());
    // What is tried again after a failure still counts from the replay.
    world.server.rule(Rule::new(Stage::Rcpt, Action::reply("451 4.7.1 greylisted")).once());
    let (code, result) = replay(&world, &["--org", "acme"]).await;
    assert_eq!((code, &result["replayed"]), (0, &json!(1)));
    world.event("email.sent", id).await;
    let row = world.state(Some("acme"), id, State::Sent).await;
    assert_eq!((row.attempts, row.message_id.as_deref()), (5, Some(&*first)));
    let message = &world.received(1).await[0];
    assert!(message.text().contains(&format!("Message-ID: {first}")), "{}", message.text());
    assert_eq!(message.from, "hello@moved.example");
    let letter = the_letter(&world.database.store(), id).await;
    assert_eq!((letter.state, letter.replays, letter.deaths), (LetterState::Replayed, 1, 1));
    worker.stop().await;
    world.end().await;
}

#[tokio::test]
async fn a_letter_of_refused_recipients_goes_to_them_alone() {
    let world = World::new().await;
    let worker = world.worker().await;
    world
        .platform
        .rule(Rule::new(Stage::Rcpt, Action::reply("550 5.1.1 no such user")).of("ben@customer.example"));
    let mut published = job(None);
    published["to"] = json!(["ann@customer.example", "ben@customer.example", "cid@customer.example"]);
    let id = world.publish(&published).await;
    let letter = died(&world, id, 1).await;
    assert_eq!(letter.recipients, Some(vec![1]));
    world.event("email.sent", id).await;

    world.platform.change(|behaviour| behaviour.clear_rules());
    let (code, result) = replay(&world, &["--id", &id.to_string()]).await;
    assert_eq!((code, &result["replayed"]), (0, &json!(1)));
    world.platform.wait_for_messages(2, SOON).await.expect("a second message");
    let row = world.state(None, id, State::Sent).await;
    assert_eq!((row.attempts, row.refused.len()), (2, 0));
    let messages = world.platform.messages();
    assert_eq!(messages[0].recipients, ["ann@customer.example", "cid@customer.example"]);
    assert_eq!(messages[1].recipients, ["ben@customer.example"]);
    let (_, result) = replay(&world, &["--id", &id.to_string(), "--state", "replayed"]).await;
    assert_eq!(result["skipped"], json!({"already_sent": 1}));
    worker.stop().await;
    assert_eq!(world.platform.seen(|seen| seen.final_dots), 2);
    world.end().await;
}

#[tokio::test]
async fn letters_that_die_again_stop_their_canary_and_are_dead_again_with_the_history() {
    let world = World::new().await;
    let worker = world.worker().await;
    world.platform.rule(Rule::new(Stage::Mail, Action::reply("550 5.7.1 not you")));
    let mut ids = Vec::new();
    for _ in 0..4 {
        ids.push(world.publish(&job(None)).await);
    }
    for id in &ids {
        died(&world, *id, 1).await;
    }
    let (code, result) = replay(&world, &["--all", "--canary", "2", "--canary-wait", "40s"]).await;
    assert_eq!((code, &result["ended"]), (1, &json!("canary_died")));
    assert_eq!((&result["replayed"], &result["not_reached"]), (&json!(2), &json!(2)));
    let lost: Vec<Uuid> = result["canaries_lost"]
        .as_array()
        .expect("a list")
        .iter()
        .map(|loss| loss["id"].as_str().and_then(|id| id.parse().ok()).expect("an id"))
        .collect();
    assert_eq!(lost.len(), 2, "{result}");
    for id in &lost {
        let letter = died(&world, *id, 2).await;
        assert_eq!((letter.replays, letter.history.len(), letter.reason), (1, 1, Reason::SenderRefused));
        let deed = &letter.history[0];
        assert_eq!(deed.what, Deed::Replay);
        let outcome = deed.outcome.as_ref().expect("it is known how it ended");
        assert_eq!((outcome.state.as_str(), outcome.reason), ("dead", Some(Reason::SenderRefused)));
    }
    assert_eq!(world.platform.seen(|seen| seen.count("MAIL")), 6);

    // The others come through now, so the canaries let the rest follow.
    let (code, result) = replay(&world, &["--all", "--max-replays", "1"]).await;
    assert_eq!((code, &result["skipped"]), (0, &json!({"too_many_replays": 2})));
    for id in ids.iter().filter(|id| !lost.contains(id)) {
        died(&world, *id, 2).await;
    }
    world.platform.change(|behaviour| behaviour.clear_rules());
    let (code, result) = replay(&world, &["--all", "--canary", "1", "--canary-wait", "40s"]).await;
    assert_eq!((code, &result["replayed"]), (0, &json!(4)));
    all_sent(&world, 4).await;
    worker.stop().await;
    assert_eq!(delivered(&world.platform.messages()).1, 4);
    world.end().await;
}

#[tokio::test]
async fn an_unroutable_letter_is_replayed_once_a_lane_takes_it() {
    let mut world = World::new().await;
    let worker = world.worker().await;
    let published = job(None);
    let body = serde_json::to_vec(&published).expect("JSON");
    world.broker.publish_job("report.monthly", &body, lapin::BasicProperties::default()).await;
    let id = published["id"].as_str().and_then(|id| id.parse().ok()).expect("an id");
    assert_eq!(died(&world, id, 1).await.reason, Reason::Unroutable);
    let (code, result) = replay(&world, &["--reason", "unroutable"]).await;
    assert_eq!((code, &result["skipped"]), (0, &json!({"unroutable": 1})));
    worker.stop().await;

    let lanes = "[[amqp.lanes]]\nname = \"notifications\"\nbindings = [\"notification.#\", \"report.#\"]\nprefetch = 100\n";
    let config = world.file("lanes.toml", lanes.as_bytes());
    world.set("SENDOFF_CONFIG", config.to_str().expect("a path in UTF-8"));
    let (code, result) = replay(&world, &["--reason", "unroutable"]).await;
    assert_eq!((code, &result["replayed"]), (0, &json!(1)));
    let worker = world.worker().await;
    world.event("email.sent", id).await;
    assert_eq!(world.state(None, id, State::Sent).await.attempts, 1);
    worker.stop().await;
    assert_eq!(world.platform.seen(|seen| seen.final_dots), 1);
    world.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replay_outlasts_an_outage_and_one_that_does_not_is_taken_up_by_the_next() {
    let mut world = World::new().await;
    let ids = dead_letters(&world, 150).await;
    let (proxy, through) = Proxy::before(&amqp_url()).await;
    let access = Access::new(AmqpUrl::parse(&through).expect("an AMQP URL"));
    let settings = BrokerSettings { access, ..world.broker.settings() };
    let lanes = settings.lanes.clone();
    let broker = Broker::start(settings, Arc::new(|_| {}));
    let replayer = Replayer {
        store: world.database.store(),
        archive: world.archive(),
        lanes,
        limits: WireLimits { max_recipients: 100, max_message_bytes: 1 << 20 },
        clock: Clock::system(),
        shutdown: Shutdown::new(),
        patience: Duration::from_secs(3),
    };
    let order = Order {
        filter: LetterFilter {
            states: vec![LetterState::Dead, LetterState::Replaying],
            ..LetterFilter::default()
        },
        limit: None,
        rules: ReplayRules { max_replays: 3, resend_unknown: false },
        lane: None,
        actor: "ann".into(),
    };
    let (publisher, manner) = (broker.publisher(), Manner { rate: 10, canary: None });
    let (tally, ended) = tokio::join!(replayer.run(&order, manner, &publisher, |_| {}), async {
        eventually("some are replayed", async || letters_in(&world, LetterState::Replayed).await > 0).await;
        proxy.refuse();
    })
    .0;
    assert!(matches!(ended, Ended::Broker(_)), "{ended:?}");
    assert!(tally.adds_up() && tally.unconfirmed > 0 && tally.not_reached > 0, "{tally:?}");
    assert_eq!(letters_in(&world, LetterState::Replaying).await, tally.unconfirmed as i64);
    broker.close().await;

    proxy.forward();
    world.set("AMQP_URL", &through);
    let before = letters_in(&world, LetterState::Replayed).await;
    let next = start(&world, &["--all", "--rate", "10"]);
    eventually("it goes on", async || letters_in(&world, LetterState::Replayed).await > before).await;
    proxy.refuse();
    assert!(world.database.terminate("sendoff").await > 0);
    proxy.forward();
    let (code, result) = ended_run(next).await;
    assert_eq!((code, &result["ended"]), (0, &json!("ok")));
    assert_eq!(letters_in(&world, LetterState::Replayed).await, 150);
    world.set("AMQP_URL", &amqp_url());
    let worker = world.worker().await;
    all_sent(&world, 150).await;
    world.broker.wait_count(&world.broker.name("jobs.notifications"), 0).await;
    worker.stop().await;
    let (jobs, messages) = delivered(&world.platform.messages());
    assert_eq!((jobs, messages), (ids.iter().map(Uuid::to_string).collect(), 150));
    world.end().await;
}

#[tokio::test]
async fn neither_command_begins_without_a_filter_and_a_broker_that_is_away_has_its_exit_code() {
    let mut world = World::new().await;
    dead_letters(&world, 1).await;
    for command in ["replay", "discard"] {
        let (code, out, errors) = world.run(&["dead", command]).await;
        assert_eq!((code, out.as_str()), (2, ""), "{errors}");
        assert!(errors.contains("--reason") && errors.contains("--all"), "{errors}");
    }
    world.set("AMQP_URL", "amqp://guest:guest@127.0.0.1:1/%2f");
    let (code, _, errors) = world.run(&["dead", "replay", "--all"]).await;
    assert_eq!(code, 3, "{errors}");
    assert_eq!(letters_in(&world, LetterState::Dead).await, 1);
    assert_eq!(world.database.number("SELECT count(*) FROM audit").await, 0);
    world.set("DATABASE_URL", "postgres://nobody@127.0.0.1:1/none");
    let (code, _, errors) = world.run(&["dead", "discard", "--all"]).await;
    assert_eq!(code, 3, "{errors}");
    world.end().await;
}

#[tokio::test]
async fn a_replay_under_a_prefix_that_no_worker_of_the_database_has_used_is_refused() {
    let world = World::new().await;
    dead_letters(&world, 1).await;
    world
        .database
        .run("INSERT INTO lane_bindings VALUES ('another', 'notifications', 'notification.#')")
        .await;
    let (code, out, errors) = world.run(&["dead", "replay", "--all"]).await;
    assert_eq!((code, out.as_str()), (1, ""), "{errors}");
    let prefix = &world.broker.prefix;
    assert!(errors.contains(prefix) && errors.contains("another") && errors.contains("declare"), "{errors}");
    assert_eq!(letters_in(&world, LetterState::Dead).await, 1);
    let (code, _, errors) = world.run(&["topology", "declare"]).await;
    assert_eq!(code, 0, "{errors}");
    let (code, result) = replay(&world, &["--all"]).await;
    assert_eq!((code, &result["replayed"]), (0, &json!(1)));
    world.end().await;
}

#[tokio::test]
async fn a_discarded_letter_stays_with_its_history_and_is_replayed_only_when_that_is_asked_for() {
    let world = World::new().await;
    let ids = dead_letters(&world, 3).await;
    let one = ids[0].to_string();
    let (code, out, _) = world.run(&["dead", "discard", "--id", &one, "--dry-run", "--json"]).await;
    let result: Value = serde_json::from_str(&out).expect("JSON");
    assert_eq!((code, &result["discarded"], letters_in(&world, LetterState::Dead).await), (0, &json!(1), 3));

    let (code, out, errors) = world.run(&["dead", "discard", "--id", &one, "--as", "ann"]).await;
    assert_eq!(code, 0, "{errors}");
    assert!(out.contains("1  discarded"), "{out}");
    let store = world.database.store();
    let letter = the_letter(&store, ids[0]).await;
    assert_eq!(letter.state, LetterState::Discarded);
    assert_eq!((letter.history[0].what, letter.history[0].by.as_str()), (Deed::Discard, "ann"));
    let (actor, command, outcome, summary) = audit(&world).await;
    assert_eq!((&*actor, &*command, &*outcome), ("ann", "dead.discard", "ok"));
    assert_eq!(summary["result"]["discarded"], json!(1));

    let (_, result) = replay(&world, &["--all"]).await;
    assert_eq!(result["selected"], json!(2));
    let (code, result) = replay(&world, &["--id", &one, "--state", "discarded"]).await;
    assert_eq!((code, &result["replayed"]), (0, &json!(1)));
    let all = LetterFilter { states: vec![LetterState::Replayed], ..LetterFilter::default() };
    assert_eq!(store.count_letters(&all, None, None).await.expect("the database answers"), 3);
    let (code, _, errors) = world.run(&["dead", "discard", "--state", "replayed"]).await;
    assert_eq!(code, 2, "{errors}");
    world.end().await;
}

#[tokio::test]
async fn letters_that_do_not_open_are_left_out_and_each_cause_is_told_once() {
    let mut world = World::new().await;
    dead_letters(&world, 3).await;
    world.set("SENDOFF__ENCRYPTION__KEYS", "k2:YWJjZGVmZ2hpamtsbW5vcHFyc3R1dnd4eXowMTIzNDU=");
    let (code, out, errors) = world.run(&["dead", "replay", "--all"]).await;
    assert_eq!(code, 1, "{out}{errors}");
    assert_eq!(
        errors.lines().filter(|line| line.starts_with("  the letter is sealed under the key `k1`")).count(),
        1
    );
    assert_eq!(replay(&world, &["--all"]).await.1["skipped"]["unreadable"], 3);
    assert_eq!(letters_in(&world, LetterState::Dead).await, 3);
    world.end().await;
}

#[tokio::test]
async fn a_canary_without_a_worker_is_said_to_have_no_outcome_yet() {
    let world = World::new().await;
    let letters = dead_letters(&world, 2).await;
    let (code, out, errors) =
        world.run(&["dead", "replay", "--all", "--canary", "1", "--canary-wait", "1s"]).await;
    assert_eq!(code, 1, "{out}{errors}");
    assert!(errors.contains(&format!("{} is deferred after 1 s (--canary-wait)", letters[0])), "{errors}");
    let shown = world.run(&["job", "status", &letters[0].to_string()]).await.1;
    assert!(shown.contains("It was replayed or released at"), "{shown}");
    world.end().await;
}
