//! Jobs that make the worker panic, and jobs that kill its process, injected where each could happen.
//! Guarantee: such a job ends as a dead letter that says so, and its neighbours are sent once each.

use std::sync::Arc;
use std::time::Duration;

use lapin::types::AMQPValue;
use sendoff::model::ledger::State;
use serde_json::{Value, json};
use tokio::sync::Notify;
use uuid::Uuid;

use crate::support::broker::{Message, eventually, eventually_within};
use crate::support::smtp_server::{Action, Rule, Stage};
use crate::support::story::Letters;
use crate::support::world::{SOON, WorkerProcess, World, job};

/// For jobs that take turns after a worker's death, with pauses in delay queues.
const A_WHILE: Duration = Duration::from_secs(120);

fn faulty(organization: Option<&str>, fault: &str) -> Value {
    let mut job = job(organization);
    job["kind"] = json!(format!("fault.{fault}"));
    job
}

fn to(address: &str, mut job: Value) -> Value {
    job["to"] = json!([address]);
    job
}

async fn publish_all(world: &World, jobs: impl IntoIterator<Item = Value>) -> Vec<Uuid> {
    let mut ids = Vec::new();
    for job in jobs {
        ids.push(world.publish(&job).await);
    }
    ids
}

fn copies(world: &World, id: Uuid) -> usize {
    let id = id.to_string();
    world.platform.messages().iter().filter(|message| message.text().contains(&id)).count()
}

/// [`eventually`] for what takes several rounds through the delay queues.
async fn in_a_while(what: &str, holds: impl AsyncFnMut() -> bool) {
    eventually_within(A_WHILE, what, holds).await;
}

fn faults(letter: &Message) -> Option<i64> {
    match letter.header("sendoff-faults") {
        Some(AMQPValue::LongLongInt(faults)) => Some(*faults),
        _ => None,
    }
}

/// Nothing is left in hand, in line or unsettled, and nothing of a job was logged.
async fn is_at_rest(world: &World, worker: WorkerProcess) {
    eventually("nothing is in hand", async || {
        worker.metric("sendoff_dispatch_in_flight").await == 0.0
            && worker.metric("sendoff_dispatch_waiting").await == 0.0
    })
    .await;
    assert!(worker.metric("sendoff_panics_total").await > 0.0);
    assert_eq!(worker.metric("sendoff_deliveries_dropped_total").await, 0.0);
    let log = worker.log();
    assert!(log.contains("the worker panicked over a job"), "{log}");
    for content in ["customer.example", "Your booking is confirmed", "See you on Monday"] {
        assert!(!log.contains(content), "{content} was logged: {log}");
    }
    worker.stop().await;
    world.broker.wait_count(&world.broker.name("jobs.notifications"), 0).await;
}

#[tokio::test]
async fn a_job_over_which_the_worker_panics_before_anything_was_sent_is_dead_after_three_times() {
    let world = World::new().await;
    let worker = world.worker().await;
    let mut letters = Letters::default();
    let places = ["parse", "take-up", "claimed", "compose", "attempt"];
    let ids = publish_all(&world, places.map(|place| faulty(None, &format!("{place}.panic")))).await;
    let neighbours = publish_all(&world, (0..10).map(|_| job(None))).await;
    for (place, id) in places.iter().zip(&ids) {
        let letter = letters.of(&world, *id).await;
        assert_eq!(letter.text("sendoff-reason").as_deref(), Some("internal"), "{place}");
        let detail = letter.text("sendoff-detail");
        assert_eq!(detail.as_deref(), Some("the worker panicked over it 3 times"), "{place}");
        assert_eq!(faults(&letter), Some(3), "{place}");
        if *place == "parse" {
            assert!(world.status(None, *id).await.is_none(), "the ledger knows only what could be read");
        } else {
            let row = world.state(None, *id, State::Dead).await;
            assert_eq!(row.reason.map(|reason| reason.as_str()), Some("internal"), "{place}");
            assert_eq!(world.event("email.dead", *id).await["reason"], "internal", "{place}");
        }
    }
    for id in &neighbours {
        world.state(None, *id, State::Sent).await;
    }
    assert_eq!(world.platform.seen(|seen| (seen.final_dots, seen.message_count)), (10, 10));
    assert_eq!(letters.left(&world).await, 0);
    is_at_rest(&world, worker).await;
    world.end().await;
}

#[tokio::test]
async fn a_job_over_which_the_worker_panics_once_is_sent_all_the_same() {
    let world = World::new().await;
    let worker = world.worker().await;
    let places = ["parse", "take-up", "claimed", "compose", "attempt", "answered", "record", "hand-over"];
    let jobs = places.map(|place| faulty(None, &format!("{place}.panic-once")));
    let ids = publish_all(&world, jobs).await;
    for (place, id) in places.iter().zip(&ids) {
        world.event("email.sent", *id).await;
        let attempts = world.state(None, *id, State::Sent).await.attempts;
        assert_eq!(attempts, if ["compose", "attempt"].contains(place) { 2 } else { 1 }, "{place}");
        assert_eq!(copies(&world, *id), 1, "{place}");
    }
    assert_eq!(world.platform.seen(|seen| seen.final_dots), places.len());
    is_at_rest(&world, worker).await;
    world.end().await;
}

#[tokio::test]
async fn what_the_server_answered_is_recorded_although_the_worker_panics_over_it_each_time() {
    let world = World::new().await;
    let worker = world.worker().await;
    for address in ["grey-record@customer.example", "grey-over@customer.example"] {
        world.platform.rule(Rule::new(Stage::Rcpt, Action::reply("451 4.7.1 greylisted")).of(address).once());
    }
    for address in ["refused-record@customer.example", "refused-over@customer.example"] {
        world.platform.rule(Rule::new(Stage::Rcpt, Action::reply("550 5.1.1 nobody here")).of(address));
    }
    let sent = publish_all(
        &world,
        [
            faulty(None, "answered.panic"),
            faulty(None, "record.panic"),
            faulty(None, "hand-over.panic"),
            to("grey-record@customer.example", faulty(None, "record.panic")),
            to("grey-over@customer.example", faulty(None, "hand-over.panic")),
        ],
    )
    .await;
    let refused = publish_all(
        &world,
        [
            to("refused-record@customer.example", faulty(None, "record.panic")),
            to("refused-over@customer.example", faulty(None, "hand-over.panic")),
        ],
    )
    .await;
    for id in &sent {
        world.event("email.sent", *id).await;
        world.state(None, *id, State::Sent).await;
        assert_eq!(copies(&world, *id), 1);
    }
    let mut letters = Letters::default();
    for id in &refused {
        let letter = letters.of(&world, *id).await;
        assert_eq!(letter.text("sendoff-reason").as_deref(), Some("recipients_refused"));
        assert_eq!(world.state(None, *id, State::Dead).await.attempts, 1);
    }
    assert_eq!(world.platform.seen(|seen| (seen.final_dots, seen.message_count)), (5, 5));
    is_at_rest(&world, worker).await;
    world.end().await;
}

/// Jobs that the newest worker has claimed.
const CLAIMED: &str =
    "SELECT count(*) FROM jobs WHERE state = 'claimed' AND owner = (SELECT max(owner) FROM jobs)";
/// A worker that is no more: no lock is held under its number, nor ever will be.
const GONE: i32 = 1_000_000_000;
const SENT: &str = "SELECT count(*) FROM jobs WHERE state = 'sent'";

#[tokio::test]
async fn a_job_that_kills_three_workers_is_a_crash_loop_and_each_of_its_neighbours_is_sent_once() {
    const WARM_UP: usize = 40;
    const FIRST: usize = 45;
    const SECOND: usize = 5;
    const LATE: usize = 3;
    let mut world = World::new().await;
    world.set("SENDOFF__SMTP__COMMAND_TIMEOUT_S", "300");
    let worker = world.worker().await;
    world.organization("acme").await;
    let kill = Arc::new(Notify::new());
    // It dies before a message could have left, or its outcome would be unknown.
    world.server.rule(Rule::new(Stage::Banner, Action::Hold(kill.clone())));
    world.server.rule(Rule::new(Stage::Ehlo, Action::Close));
    let dies = async |worker: WorkerProcess| {
        kill.notify_one();
        let (code, log) = worker.ended().await;
        assert_eq!(code, -1, "it was not killed by a signal: {log}");
    };
    let poison_arrives = async |life: usize| {
        let arrived = world.server.wait_for(A_WHILE, |seen| seen.sessions.len() == life).await;
        arrived.expect("the poison is being sent");
    };
    let held = || Rule::new(Stage::Rcpt, Action::Hold(Arc::new(Notify::new())));
    let slow = || Rule::new(Stage::Rcpt, Action::After(Duration::from_millis(100)));
    let change = |rule: Rule| {
        world.platform.change(|behaviour| {
            behaviour.clear_rules();
            behaviour.rule(rule);
        });
    };
    let in_flight = async |count: usize| {
        world.platform.wait_for(SOON, |seen| seen.count("RCPT") >= count).await.expect("several in flight");
    };

    // The platform's window opens, so that the first death meets several neighbours in flight.
    publish_all(&world, (0..WARM_UP).map(|_| job(None))).await;
    let warm = i64::try_from(WARM_UP).expect("a few");
    in_a_while("all are recorded", async || world.database.number(SENT).await == warm).await;
    change(held());
    publish_all(&world, (0..FIRST).map(|_| job(None))).await;
    in_flight(WARM_UP + 3).await;
    let poison = world.publish(&faulty(Some("acme"), "answered.abort")).await;
    poison_arrives(1).await;
    dies(worker).await;

    // It is tried again beside the other suspects, which come through, and while fresh jobs are in flight.
    change(slow());
    let worker = world.worker().await;
    poison_arrives(2).await;
    let others = i64::try_from(WARM_UP + FIRST).expect("a few");
    in_a_while("the other suspects are sent", async || world.database.number(SENT).await == others).await;
    change(held());
    let before = world.platform.seen(|seen| seen.count("RCPT"));
    publish_all(&world, (0..SECOND).map(|_| job(None))).await;
    in_flight(before + 2).await;
    dies(worker).await;

    // The last time it is alone: what comes meanwhile is not begun.
    change(slow());
    let worker = world.worker().await;
    poison_arrives(3).await;
    let late = publish_all(&world, (0..LATE).map(|_| job(None))).await;
    assert_eq!(world.database.number(CLAIMED).await, 1);
    dies(worker).await;
    assert_eq!(world.database.number(CLAIMED).await, 1);

    let worker = world.worker().await;
    let letter = Letters::default().of(&world, poison).await;
    assert_eq!(letter.text("sendoff-reason").as_deref(), Some("crash_loop"));
    assert_eq!(letter.text("sendoff-detail").as_deref(), Some("3 workers died with this job in hand"));
    assert_eq!(world.event("email.dead", poison).await["reason"], "crash_loop");
    assert_eq!(world.state(Some("acme"), poison, State::Dead).await.attempts, 0);
    let all = WARM_UP + FIRST + SECOND + LATE;
    world.platform.wait_for(A_WHILE, |seen| seen.message_count >= all).await.expect("all are sent");
    let expected = i64::try_from(all).expect("a few");
    eventually("all are recorded", async || world.database.number(SENT).await == expected).await;
    assert_eq!(world.platform.seen(|seen| (seen.final_dots, seen.message_count)), (all, all));
    for id in late {
        assert_eq!(copies(&world, id), 1);
    }
    let innocent = format!("SELECT max(crashes)::bigint FROM jobs WHERE id <> '{poison}'");
    assert_eq!(world.database.number(innocent).await, 1, "no neighbour was in flight twice");
    assert_eq!(world.server.seen(|seen| seen.final_dots), 0);
    worker.stop().await;
    world.broker.wait_count(&world.broker.name("jobs.notifications"), 0).await;
    world.end().await;
}

#[tokio::test]
async fn the_many_jobs_of_one_dead_worker_are_sent_soon_a_few_at_a_time() {
    const MANY: usize = 256;
    let world = World::new().await;
    let jobs: Vec<Value> = (0..MANY).map(|_| job(None)).collect();
    let rows: Vec<String> = jobs
        .iter()
        .map(|job| job["id"].as_str().expect("an id"))
        .map(|id| format!("('{id}', '', 'claimed', 0, {GONE}, now(), now(), '')"))
        .collect();
    let columns = "id, organization_id, state, turn, owner, first_at, updated_at, message_id";
    world.database.run(format!("INSERT INTO jobs ({columns}) VALUES {}", rows.join(", "))).await;
    let ids = publish_all(&world, jobs).await;
    let worker = world.worker().await;
    world.platform.wait_for(A_WHILE, |seen| seen.message_count > 0).await.expect("the first is sent");
    let first = tokio::time::Instant::now();
    // They are suspects all, so that no more than these few may be claimed at any time.
    let at_work = format!("SELECT count(*) FROM jobs WHERE state = 'claimed' AND owner <> {GONE}");
    let mut most = 0;
    let sent = i64::try_from(MANY).expect("a few");
    in_a_while("all are sent", async || {
        most = most.max(world.database.number(&at_work).await);
        world.database.number(SENT).await == sent
    })
    .await;
    println!("{MANY} suspects went out within {:?} of the first, {most} at a time", first.elapsed());
    assert!(most <= 8, "{most} suspects at work");
    assert!(ids.iter().all(|id| copies(&world, *id) == 1));
    let marks = "SELECT max(crashes)::bigint FROM jobs";
    assert_eq!(world.database.number(marks).await, 1);
    worker.stop().await;
    world.broker.wait_count(&world.broker.name("jobs.notifications"), 0).await;
    world.end().await;
}

#[test]
fn no_build_but_the_tests_can_be_asked_for_faults() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let read = |path: &str| std::fs::read_to_string(root.join(path)).expect(path);
    let manifest: toml::Table = toml::from_str(&read("Cargo.toml")).expect("TOML");
    let features = manifest["features"].as_table().expect("a table");
    assert_eq!(features.keys().collect::<Vec<_>>(), ["fault-injection"], "none is on by default");
    assert!(!read("Dockerfile").contains("features"));
    let script = read("dev");
    let demo =
        script.split_once("\ndemo() {").and_then(|(_, rest)| rest.split_once("\n}\n")).expect("a demo");
    assert!(!demo.0.contains("features") && !demo.0.contains("faults"));
}
