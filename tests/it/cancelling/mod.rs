//! `job.cancel` against real services: what was called back is not sent, wherever it waits, and ends as one dead letter.

mod bookings;
mod rows;

use std::sync::Arc;

use sendoff::model::cancelling::Cancellation;
use sendoff::model::event::RefusedRecipient;
use sendoff::model::failure::Reason;
use sendoff::model::job::JobKey;
use sendoff::model::ledger::{State, Turn};
use sendoff::model::letter::LetterState;
use sendoff::store::{AuditEntry, Store};
use serde_json::{Value, json};
use tokio::sync::Notify;
use tokio::time::Instant;
use uuid::Uuid;

use crate::support::broker::eventually;
use crate::support::smtp_server::{Action, Rule, Stage};
use crate::support::world::{SOON, World, job, own_address};

const DUPLICATES: &str = "sendoff_jobs_settled_total{lane=\"notifications\",outcome=\"duplicate\"}";
const BOOKING: &str = "booking-17@acme.example";

/// A world in which a retry comes when the test says so.
async fn world() -> World {
    let mut world = World::with(|behaviour| behaviour.pipelining = false).await;
    world.set("SENDOFF__RETRY__SCHEDULE_S", "120,120");
    world
}

async fn cancel(world: &World, organization: Option<&str>, params: Value) -> Value {
    let reply = world
        .answered(json!({"command": "job.cancel", "organization_id": organization, "params": params}))
        .await;
    assert_eq!(reply["ok"], true, "{reply}");
    reply["result"].clone()
}

fn cancelled(cancelled: u64, too_late: u64) -> Value {
    json!({"cancelled": cancelled, "too_late": too_late})
}

/// What `job.status` says: state and reason.
async fn told(world: &World, organization: Option<&str>, id: Uuid) -> (Value, Value) {
    let status = json!({"command": "job.status", "organization_id": organization, "params": {"id": id}});
    let reply = world.answered(status).await;
    (reply["result"]["state"].clone(), reply["result"]["reason"].clone())
}

fn of_booking(organization: Option<&str>, sequence: i64, to: &str) -> Value {
    let mut job = job(organization);
    job["group"] = json!(BOOKING);
    job["sequence"] = json!(sequence);
    job["to"] = json!([to]);
    job
}

/// Publishes a job and waits until it is put off.
async fn put_off(world: &World, job: &Value) -> Uuid {
    let id = world.publish(job).await;
    world.event("email.deferred", id).await;
    id
}

/// Runs `dead replay --all`: what it left out, by reason.
async fn replayed(world: &World) -> (Value, Value) {
    let (code, out, errors) = world.run(&["dead", "replay", "--json", "--all"]).await;
    assert_eq!(code, 0, "{out}{errors}");
    let result: Value = serde_json::from_str(&out).expect("JSON");
    (result["replayed"].clone(), result["skipped"].clone())
}

// Where a job waits

#[tokio::test]
async fn a_job_that_waits_for_its_retry_is_not_sent_and_ends_as_one_dead_letter() {
    let world = world().await;
    let worker = world.worker().await;
    world.organization("acme").await;
    world.organization("globex").await;
    world.server.rule(Rule::new(Stage::Mail, Action::reply("451 4.3.0 not now")).times(2));
    let mine = job(Some("acme"));
    let mut theirs = mine.clone();
    theirs["organization_id"] = json!("globex");
    let id = world.publish(&mine).await;
    world.state(Some("acme"), id, State::Deferred).await;
    // The copies come in the order in which they are put off.
    world.broker.wait_count(&world.broker.name("retry.notifications.120"), 1).await;
    world.publish(&theirs).await;
    world.state(Some("globex"), id, State::Deferred).await;

    for _ in 0..2 {
        assert_eq!(cancel(&world, Some("acme"), json!({"id": id})).await, cancelled(1, 0));
        assert_eq!(told(&world, Some("acme"), id).await, (json!("cancelled"), json!("cancelled")));
    }
    // Published again it is a copy of what is done with.
    let before = worker.metric(DUPLICATES).await;
    world.publish(&mine).await;
    eventually("the copy is settled", async || worker.metric(DUPLICATES).await > before).await;

    world.broker.wait_count(&world.broker.name("retry.notifications.120"), 2).await;
    world.retry_now(120, id).await;
    let dead = |event: &Value| event["type"] == "email.dead" && event["job_id"] == id.to_string();
    let event = world.events.wait_for(dead, SOON).await;
    assert_eq!((&event["reason"], &event["organization_id"]), (&json!("cancelled"), &json!("acme")));
    let letter = world.letter(id).await;
    assert_eq!((letter.reason, letter.state, letter.attempts), (Reason::Cancelled, LetterState::Dead, 1));
    assert_eq!((letter.deaths, letter.turn), (1, Turn(1)));
    assert_eq!(letter.detail.as_deref(), Some("cancelled before it was sent"));
    let dead = "sendoff_jobs_settled_total{lane=\"notifications\",outcome=\"dead\"}";
    eventually("it is counted as dead", async || worker.metric(dead).await >= 1.0).await;
    assert_eq!(told(&world, Some("acme"), id).await, (json!("cancelled"), json!("cancelled")));

    // The other organization's job of that id goes its way.
    world.retry_now(120, id).await;
    world.state(Some("globex"), id, State::Sent).await;
    assert_eq!(world.server.messages().len(), 1);
    assert_eq!(world.event_count("email.dead", id), 1);
    assert_eq!(replayed(&world).await, (json!(0), json!({"cancelled": 1})));
    worker.stop().await;
    world.end().await;
}

#[tokio::test]
async fn a_job_that_comes_after_it_was_called_back_is_dead_at_once_and_said_so_once() {
    let world = world().await;
    let worker = world.worker().await;
    world.organization("acme").await;
    for organization in [Some("acme"), None] {
        let mut job = job(organization);
        let id: Uuid = job["id"].as_str().and_then(|id| id.parse().ok()).expect("an id");
        for _ in 0..2 {
            assert_eq!(cancel(&world, organization, json!({"id": id})).await, cancelled(1, 0));
        }
        assert_eq!(told(&world, organization, id).await, (json!("cancelled"), json!("cancelled")));
        world.publish(&job).await;
        assert_eq!(world.story(id).await, "dead cancelled");
        let before = worker.metric(DUPLICATES).await;
        for _ in 0..3 {
            world.publish(&job).await;
        }
        eventually("the copies are settled", async || worker.metric(DUPLICATES).await >= before + 3.0).await;
        assert_eq!(world.event_count("email.dead", id), 1);
        let letter = world.letter(id).await;
        assert_eq!((letter.reason, letter.deaths, letter.attempts), (Reason::Cancelled, 1, 0));
        let row = world.status(organization, id).await.expect("it is known");
        assert_eq!((row.state, row.reason), (State::Cancelled, Some(Reason::Cancelled)));
        assert_eq!(cancel(&world, organization, json!({"id": id})).await, cancelled(1, 0));
        // The body is known now: another one is a conflict as ever.
        job["subject"] = json!("Another");
        world.publish(&job).await;
        let conflicts = |event: &Value| event["job_id"] == id.to_string() && event["reason"] == "id_conflict";
        world.events.wait_for(conflicts, SOON).await;
    }
    assert_eq!((world.server.messages().len(), world.platform.messages().len()), (0, 0));
    worker.stop().await;
    world.end().await;
}

#[tokio::test]
async fn a_job_that_was_put_aside_without_an_attempt_is_not_sent_when_it_comes_back() {
    let world = world().await;
    let worker = world.worker().await;
    let nobody = own_address(77).to_string();
    world.organization_at("acme", json!({"host": nobody, "port": 2525})).await;
    // So many failures to connect open the breaker; what comes then is put aside, and the ledger does not see it.
    for _ in 0..5 {
        put_off(&world, &job(Some("acme"))).await;
    }
    let aside = [5, 30].map(|delay_s| world.broker.name(&format!("retry.notifications.{delay_s}")));
    let mut found = None;
    eventually("one is put aside", async || {
        let id = world.publish(&job(Some("acme"))).await;
        let mut copy = None;
        // The breaker may have been ready for a probe, and this one was it.
        eventually("it is put aside or put off", async || {
            for queue in &aside {
                copy = copy.take().or(world.broker.get(queue).await);
            }
            copy.is_some() || world.event_count("email.deferred", id) > 0
        })
        .await;
        found = copy.map(|copy| (id, copy));
        found.is_some()
    })
    .await;
    let (id, copy) = found.expect("just seen");
    assert!(world.status(Some("acme"), id).await.is_none());
    assert_eq!(cancel(&world, Some("acme"), json!({"id": id})).await, cancelled(1, 0));
    world.broker.publish(&world.broker.name("jobs.notifications"), "", &copy.body, copy.properties).await;
    assert_eq!(world.story(id).await, "dead cancelled");
    assert_eq!((world.letter(id).await.reason, world.letter(id).await.attempts), (Reason::Cancelled, 0));
    worker.stop().await;
    world.end().await;
}

#[tokio::test]
async fn another_worker_buries_what_was_called_back_after_its_own_was_killed() {
    let world = world().await;
    let first = world.worker().await;
    world.organization("acme").await;
    world.server.rule(Rule::new(Stage::Mail, Action::reply("451 4.3.0 not now")).once());
    let id = put_off(&world, &job(Some("acme"))).await;
    first.kill().await;
    let (second, third) = tokio::join!(world.worker(), world.worker());
    assert_eq!(cancel(&world, Some("acme"), json!({"id": id})).await, cancelled(1, 0));
    world.broker.wait_count(&world.broker.name("retry.notifications.120"), 1).await;
    world.retry_now(120, id).await;
    assert_eq!(world.story(id).await, "deferred server_error, dead cancelled");
    assert_eq!(world.letter(id).await.deaths, 1);
    assert_eq!(world.server.seen(|seen| seen.count("MAIL")), 1);
    second.stop().await;
    third.stop().await;
    world.end().await;
}

// In a worker's hands

#[tokio::test]
async fn a_job_under_way_is_too_late_and_still_stopped_right_before_its_message() {
    let world = world().await;
    let worker = world.worker().await;
    world.organization("acme").await;
    let go_on = Arc::new(Notify::new());
    world.server.rule(Rule::new(Stage::Rcpt, Action::Hold(go_on.clone())).once());
    let id = world.publish(&job(Some("acme"))).await;
    world.server.wait_for(SOON, |seen| seen.count("RCPT") == 1).await.expect("it is under way");
    for _ in 0..2 {
        assert_eq!(cancel(&world, Some("acme"), json!({"id": id})).await, cancelled(0, 1));
    }
    let old = "SELECT count(*) FROM jobs WHERE first_at < now() - interval '1 second'";
    eventually("the claim is a second old", async || world.database.number(old).await == 1).await;
    go_on.notify_one();
    assert_eq!(world.story(id).await, "dead cancelled");
    assert_eq!(world.letter(id).await.reason, Reason::Cancelled);
    assert_eq!((world.server.messages().len(), world.server.seen(|seen| seen.count("DATA"))), (0, 0));
    assert_eq!(told(&world, Some("acme"), id).await, (json!("cancelled"), json!("cancelled")));
    worker.stop().await;
    world.end().await;
}

#[tokio::test]
async fn a_message_that_is_leaving_is_too_late_and_sent() {
    let world = world().await;
    let worker = world.worker().await;
    world.organization("acme").await;
    let go_on = Arc::new(Notify::new());
    world.server.rule(Rule::new(Stage::FinalDot, Action::Hold(go_on.clone())).once());
    let id = world.publish(&job(Some("acme"))).await;
    world.server.wait_for(SOON, |seen| seen.count("DATA") == 1).await.expect("it is under way");
    assert_eq!(cancel(&world, Some("acme"), json!({"id": id})).await, cancelled(0, 1));
    go_on.notify_one();
    assert_eq!(world.story(id).await, "sent");
    assert_eq!(cancel(&world, Some("acme"), json!({"id": id})).await, cancelled(0, 1));
    assert_eq!(told(&world, Some("acme"), id).await, (json!("sent"), Value::Null));
    worker.stop().await;
    world.end().await;
}

#[tokio::test]
async fn a_job_under_way_that_fails_after_it_was_called_back_is_not_tried_again() {
    let world = world().await;
    let worker = world.worker().await;
    world.organization("acme").await;
    let go_on = Arc::new(Notify::new());
    world.server.rule(Rule::new(Stage::Mail, Action::Hold(go_on.clone())).once());
    world.server.rule(Rule::new(Stage::Rcpt, Action::reply("450 4.2.0 Greylisted")));
    let id = world.publish(&job(Some("acme"))).await;
    world.server.wait_for(SOON, |seen| seen.count("MAIL") == 1).await.expect("it is under way");
    assert_eq!(cancel(&world, Some("acme"), json!({"id": id})).await, cancelled(0, 1));
    go_on.notify_one();
    world.event("email.deferred", id).await;
    world.retry_now(120, id).await;
    assert_eq!(world.story(id).await, "deferred recipients_refused, dead cancelled");
    assert_eq!(world.letter(id).await.reason, Reason::Cancelled);
    assert_eq!(world.server.seen(|seen| seen.count("MAIL")), 1);
    worker.stop().await;
    world.end().await;
}

#[tokio::test]
async fn of_a_job_that_some_recipients_have_the_others_are_given_up() {
    let world = world().await;
    let worker = world.worker().await;
    world.organization("acme").await;
    let later = Rule::new(Stage::Rcpt, Action::reply("450 4.2.0 Greylisted"));
    world.server.rule(later.of("bob@customer.example"));
    let mut job = job(Some("acme"));
    job["to"] = json!(["ann@customer.example", "bob@customer.example"]);
    let id = put_off(&world, &job).await;
    assert_eq!(cancel(&world, Some("acme"), json!({"id": id})).await, cancelled(1, 0));
    world.retry_now(120, id).await;
    let sent = world.event("email.sent", id).await;
    assert_eq!(sent["recipients_refused"], json!([{"index": 1, "code": 0, "reason": "cancelled"}]));
    assert_eq!(world.event("email.dead", id).await["reason"], "cancelled");
    let letter = world.letter(id).await;
    assert_eq!((letter.reason, letter.recipients), (Reason::Cancelled, Some(vec![1])));
    let row = world.state(Some("acme"), id, State::Sent).await;
    let refused = RefusedRecipient { index: 1, code: 0, reason: Reason::Cancelled };
    assert_eq!(row.refused, [refused]);
    assert_eq!((world.server.messages().len(), world.server.seen(|seen| seen.count("MAIL"))), (1, 1));
    assert_eq!(replayed(&world).await, (json!(0), json!({"cancelled": 1})));
    worker.stop().await;
    world.end().await;
}

#[tokio::test]
async fn a_job_that_was_called_back_under_way_and_whose_worker_died_is_not_sent_again() {
    let world = world().await;
    let worker = world.worker().await;
    world.organization("acme").await;
    world.server.rule(Rule::new(Stage::FinalDot, Action::Silence).once());
    let id = world.publish(&job(Some("acme"))).await;
    world.server.wait_for(SOON, |seen| seen.count("DATA") == 1).await.expect("it is under way");
    assert_eq!(cancel(&world, Some("acme"), json!({"id": id})).await, cancelled(0, 1));
    worker.kill().await;
    let worker = world.worker().await;
    // It may have been accepted: that stays said.
    assert_eq!(world.story(id).await, "dead unknown_outcome");
    let row = world.state(Some("acme"), id, State::Dead).await;
    assert_eq!((row.reason, row.attempts), (Some(Reason::UnknownOutcome), 0));
    assert_eq!(world.letter(id).await.reason, Reason::UnknownOutcome);
    assert_eq!(world.server.seen(|seen| seen.count("MAIL")), 1);
    assert_eq!(cancel(&world, Some("acme"), json!({"id": id})).await, cancelled(0, 1));
    assert_eq!(replayed(&world).await, (json!(0), json!({"cancelled": 1})));
    worker.stop().await;
    world.end().await;
}

// Replays

#[tokio::test]
async fn a_dead_job_that_is_called_back_is_never_replayed() {
    let world = world().await;
    let worker = world.worker().await;
    world.organization("acme").await;
    world.server.rule(Rule::new(Stage::Data, Action::reply("550 5.7.1 no")).times(2));
    let single = world.publish(&job(Some("acme"))).await;
    let booked = world.publish(&of_booking(Some("acme"), 3, "ann@customer.example")).await;
    for id in [single, booked] {
        assert_eq!(world.story(id).await, "dead message_refused");
    }
    world.letters(2).await;
    assert_eq!(cancel(&world, Some("acme"), json!({"id": single})).await, cancelled(1, 0));
    let booking = json!({"group": BOOKING, "sequence": 3});
    assert_eq!(cancel(&world, Some("acme"), booking).await, cancelled(1, 0));
    assert_eq!(replayed(&world).await, (json!(0), json!({"cancelled": 2})));
    // The archive still tells why they died.
    for letter in world.letters(2).await {
        assert_eq!((letter.state, letter.reason), (LetterState::Dead, Reason::MessageRefused));
    }
    // Of a booking the revision tells, where the ledger has forgotten the job.
    world.database.run("DELETE FROM jobs").await;
    let (_, skipped) = replayed(&world).await;
    assert_eq!(skipped, json!({"cancelled": 1}));
    worker.stop().await;
    world.end().await;
}

#[tokio::test]
async fn a_job_that_is_being_replayed_is_not_sent_and_dies_in_the_archive() {
    let world = world().await;
    let worker = world.worker().await;
    world.platform.rule(Rule::new(Stage::Data, Action::reply("550 5.7.1 no")).times(2));
    let [published, cut_off] = [world.publish(&job(None)).await, world.publish(&job(None)).await];
    world.letters(2).await;
    worker.stop().await;
    let (replays, _) = replayed(&world).await;
    assert_eq!(replays, json!(2));
    world.broker.wait_count(&world.broker.name("jobs.notifications"), 2).await;
    let store = world.database.store();
    for id in [published, cut_off] {
        let key = JobKey { organization: None, id };
        assert_eq!(call_back(&store, &key).await, Cancellation { cancelled: 1, too_late: 0 });
    }
    // One run was killed before it had published its copy.
    let copies = world.broker.drain(&world.broker.name("jobs.notifications")).await;
    let of = |id: Uuid| {
        let copies = copies.iter().map(|copy| (copy, serde_json::from_slice::<Value>(&copy.body)));
        let mut its = copies.filter(|(_, job)| job.as_ref().is_ok_and(|job| job["id"] == id.to_string()));
        its.next().expect("its copy").0
    };
    world
        .database
        .run(format!("UPDATE dead_letters SET state = 'replaying' WHERE job_id = '{cut_off}'"))
        .await;
    let (replays, skipped) = replayed(&world).await;
    assert_eq!((replays, skipped["cancelled"].as_u64()), (json!(0), Some(1)));
    assert_eq!(world.letter(cut_off).await.state, LetterState::Dead);

    let worker = world.worker().await;
    for id in [published, cut_off] {
        let copy = of(id);
        let lane = world.broker.name("jobs.notifications");
        world.broker.publish(&lane, "", &copy.body, copy.properties.clone()).await;
    }
    for id in [published, cut_off] {
        eventually("it is dead in the archive", async || {
            let letter = world.letter(id).await;
            letter.state == LetterState::Dead && letter.reason == Reason::Cancelled && letter.deaths == 2
        })
        .await;
        assert_eq!(world.status(None, id).await.expect("a row").state, State::Cancelled);
    }
    assert!(world.platform.messages().is_empty());
    worker.stop().await;
    world.end().await;
}

// The command

#[tokio::test]
async fn a_request_that_names_neither_or_both_is_refused_by_its_field_and_every_one_is_on_record() {
    let world = world().await;
    let worker = world.worker().await;
    let id = Uuid::from_u128(7);
    for (params, code, field) in [
        (json!({}), "invalid_request", "id"),
        (json!({"group": "b"}), "invalid_request", "sequence"),
        (json!({"sequence": 1}), "invalid_request", "group"),
        (json!({"id": id, "group": "b", "sequence": 1}), "invalid_request", "group"),
        (json!({"id": "7"}), "invalid_field", "id"),
        (json!({"group": "b", "sequence": -1}), "invalid_field", "sequence"),
        (json!({"id": id, "ids": []}), "invalid_request", "ids"),
    ] {
        let command = json!({"command": "job.cancel", "organization_id": "acme", "params": params});
        let reply = world.answered(command).await;
        assert_eq!((&reply["ok"], &reply["error"]["code"]), (&json!(false), &json!(code)), "{reply}");
        assert_eq!(reply["error"]["field"], field, "{reply}");
    }
    assert_eq!(world.database.number("SELECT count(*) FROM jobs").await, 0);
    cancel(&world, Some("acme"), json!({"id": id})).await;
    let entries = "SELECT count(*) FROM audit WHERE command = 'job.cancel' AND organization_id = 'acme'";
    assert_eq!(world.database.number(format!("{entries} AND outcome <> 'ok'")).await, 7);
    assert_eq!(world.database.number(format!("{entries} AND outcome = 'ok' AND fields = '{{id}}'")).await, 1);
    let counted = |code| format!("sendoff_control_commands_total{{command=\"job.cancel\",code=\"{code}\"}}");
    eventually("they are counted", async || {
        (worker.metric(&counted("ok")).await, worker.metric(&counted("invalid_field")).await) == (1.0, 2.0)
    })
    .await;
    worker.stop().await;
    world.end().await;
}

// The ledger

fn entry() -> AuditEntry<'static> {
    let (actor, user_id, organization) = (None, None, None);
    AuditEntry { actor, user_id, organization, command: "job.cancel", outcome: "ok", fields: &["id"] }
}

fn in_time() -> Instant {
    Instant::now() + SOON
}

async fn call_back(store: &Store, key: &JobKey) -> Cancellation {
    store.cancel_job(key, entry(), in_time()).await.expect("the database answers")
}
