//! `job.cancel` against real services: what was called back is not sent, wherever it waits, and ends as one dead letter.

use std::sync::Arc;
use std::time::Duration;

use sendoff::model::cancelling::Cancellation;
use sendoff::model::event::RefusedRecipient;
use sendoff::model::failure::Reason;
use sendoff::model::job::{JobKey, Revision};
use sendoff::model::ledger::{
    Claim, ClaimAnswer, Claimed, Gate, GateAnswer, Settle, SettleAnswer, Settlement, State, Turn,
};
use sendoff::model::letter::LetterState;
use sendoff::model::organization::OrganizationId;
use sendoff::store::{AuditEntry, DEAD_AFTER, Incarnations, Ledger, Store, Sweeper};
use serde_json::{Value, json};
use tokio::sync::Notify;
use tokio::time::Instant;
use uuid::Uuid;

use crate::support::broker::eventually;
use crate::support::claims::{copy, key, settle};
use crate::support::database::TestDatabase;
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

// Bookings

#[tokio::test]
async fn a_booking_is_called_back_up_to_a_revision_and_what_is_newer_goes_on() {
    let world = world().await;
    let worker = world.worker().await;
    world.organization("acme").await;
    world.organization("globex").await;
    world.server.rule(Rule::new(Stage::Mail, Action::reply("451 4.3.0 not now")).times(4));
    let to = "ann@customer.example";
    let first = put_off(&world, &of_booking(Some("acme"), 1, to)).await;
    let second = put_off(&world, &of_booking(Some("acme"), 2, to)).await;
    let newer = put_off(&world, &of_booking(Some("acme"), 4, to)).await;
    let theirs = put_off(&world, &of_booking(Some("globex"), 2, to)).await;
    let sent = world.publish(&job(Some("acme"))).await;
    assert_eq!(world.story(sent).await, "sent");

    for _ in 0..2 {
        let booking = json!({"group": BOOKING, "sequence": 2});
        assert_eq!(cancel(&world, Some("acme"), booking).await, cancelled(2, 0));
    }
    // The copies come in the order in which they were put off.
    for id in [first, second, newer, theirs] {
        world.retry_now(120, id).await;
    }
    for id in [first, second] {
        assert_eq!(world.story(id).await, "deferred server_error, dead cancelled");
    }
    for (id, organization) in [(newer, "acme"), (theirs, "globex")] {
        world.state(Some(organization), id, State::Sent).await;
    }
    // Another mail of the revision that was called back, one of an older, and the next revision.
    for (sequence, story) in [(2, "dead cancelled"), (1, "dead superseded"), (4, "sent"), (5, "sent")] {
        let id = world.publish(&of_booking(Some("acme"), sequence, to)).await;
        assert_eq!(world.story(id).await, story, "{sequence}");
    }
    // A revision that is sent is too late.
    let booking = json!({"group": BOOKING, "sequence": 5});
    let result = cancel(&world, Some("acme"), booking).await;
    assert_eq!(result["too_late"], json!(3));
    worker.stop().await;
    world.end().await;
}

#[tokio::test]
async fn a_booking_that_nobody_has_seen_is_called_back_before_it_comes() {
    let world = world().await;
    let worker = world.worker().await;
    let booking = json!({"group": BOOKING, "sequence": 2});
    assert_eq!(cancel(&world, None, booking).await, cancelled(0, 0));
    let to = "ann@customer.example";
    for (sequence, story) in [(2, "dead cancelled"), (1, "dead superseded"), (3, "sent")] {
        let id = world.publish(&of_booking(None, sequence, to)).await;
        assert_eq!(world.story(id).await, story, "{sequence}");
    }
    assert_eq!(world.platform.messages().len(), 1);
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

async fn call_back_booking(store: &Store, sequence: i64) -> Cancellation {
    let revision = Revision { group: BOOKING.into(), sequence };
    let organization = OrganizationId::from_integer(42);
    let done = store.cancel_group(Some(&organization), &revision, entry(), in_time()).await;
    done.expect("the database answers")
}

const TOO_LATE: Cancellation = Cancellation { cancelled: 0, too_late: 1 };
const CALLED_BACK: Cancellation = Cancellation { cancelled: 1, too_late: 0 };

fn of_revision(key: &JobKey, sequence: i64) -> Claim {
    let revision = Some(Revision { group: BOOKING.into(), sequence });
    Claim { revision, ..copy(key, 0) }
}

fn deferred() -> Settlement {
    Settlement::Deferred { reason: Reason::Throttled, wait: Duration::from_secs(600) }
}

async fn ledger(database: &TestDatabase) -> Ledger {
    let store = database.store();
    let incarnations = Incarnations::start(store.clone(), DEAD_AFTER);
    let ledger = Ledger::new(store, incarnations.clone(), |_| ());
    let mut watch = incarnations.watch();
    let taken = tokio::time::timeout(SOON, watch.wait_for(Option::is_some)).await;
    assert!(taken.is_ok_and(|taken| taken.is_ok()), "an incarnation is taken soon");
    ledger
}

async fn granted(ledger: &Ledger, claim: Claim) -> Box<Claimed> {
    match ledger.claim(claim).await.expect("the database answers") {
        ClaimAnswer::Claimed(claimed) => claimed,
        other => panic!("not granted: {other:?}"),
    }
}

#[tokio::test]
async fn whatever_a_row_says_it_is_called_back_or_too_late_and_marked() {
    let database = TestDatabase::migrated().await;
    let store = database.store();
    let row = |state: &str, columns: &str, values: &str| {
        format!(
            "TRUNCATE jobs; INSERT INTO jobs (id, organization_id, state, turn, owner, first_at, updated_at{columns}) \
             VALUES ('{}', '42', '{state}', 3, 9, now(), now(){values})",
            key(1).id
        )
    };
    for (state, columns, values, expected, state_then, reason_then) in [
        ("deferred", "", "", CALLED_BACK, "cancelled", "cancelled"),
        ("parked", ", reason", ", 'auth_failed'", CALLED_BACK, "cancelled", "cancelled"),
        ("dead", ", reason", ", 'message_refused'", CALLED_BACK, "cancelled", "cancelled"),
        ("dead", ", reason", ", 'unknown_outcome'", TOO_LATE, "dead", "unknown_outcome"),
        ("cancelled", ", reason", ", 'cancelled'", CALLED_BACK, "cancelled", "cancelled"),
        // Its claim's owner died, and may have sent it.
        ("deferred", ", orphan, reason", ", false, 'throttled'", TOO_LATE, "deferred", "throttled"),
        ("claimed", ", reason", ", 'throttled'", TOO_LATE, "claimed", "throttled"),
        ("deferred", ", partly_sent", ", true", CALLED_BACK, "deferred", "cancelled"),
        ("parked", ", partly_sent, reason", ", true, 'auth_failed'", CALLED_BACK, "parked", "auth_failed"),
        ("sent", ", reason", ", ''", TOO_LATE, "sent", ""),
    ] {
        database.run(row(state, columns, values)).await;
        for _ in 0..2 {
            assert_eq!(call_back(&store, &key(1)).await, expected, "{state}{values}");
        }
        let as_it_is = format!(
            "SELECT count(*) FROM jobs WHERE cancel_requested AND state = '{state_then}' AND reason = '{reason_then}' \
             AND turn = 3 AND owner = 9"
        );
        assert_eq!(database.number(as_it_is).await, 1, "{state}{values}");
    }
    database.run(row("deferred", ", unknowns", ", 1")).await;
    assert_eq!(call_back(&store, &key(1)).await, CALLED_BACK);
    let status = store.job_status(&key(1)).await.unwrap().expect("a row");
    assert_eq!(status.detail.as_deref(), Some("cancelled; an earlier attempt may have been accepted"));
}

#[tokio::test]
async fn a_claim_and_a_gate_tell_that_the_job_was_called_back() {
    let database = TestDatabase::migrated().await;
    let (ledger, store) = (ledger(&database).await, database.store());
    let of = |number| of_revision(&key(number), 2);
    let gate = |number, claimed: &Claimed| Gate {
        key: key(number),
        owner: claimed.owner,
        turn: claimed.turn,
        commit: false,
        revision: of(number).revision,
    };
    let [one, other] = [granted(&ledger, of(1)).await, granted(&ledger, of(2)).await];
    assert!(!one.cancelled && !other.cancelled);
    assert_eq!(ledger.before_data(gate(1, &one)).await.unwrap(), GateAnswer::Open);
    assert_eq!(call_back(&store, &key(1)).await, TOO_LATE);
    assert_eq!(ledger.before_data(gate(1, &one)).await.unwrap(), GateAnswer::Cancelled);
    assert_eq!(ledger.before_data(gate(2, &other)).await.unwrap(), GateAnswer::Open);
    let done = call_back_booking(&store, 2).await;
    assert_eq!(done, Cancellation { cancelled: 0, too_late: 2 });
    assert_eq!(ledger.before_data(gate(2, &other)).await.unwrap(), GateAnswer::Cancelled);
    // What comes behind.
    assert!(granted(&ledger, of(3)).await.cancelled);
    let older = granted(&ledger, of_revision(&key(4), 1)).await;
    assert_eq!((older.cancelled, older.newest_sequence), (false, Some(2)));
    assert!(!granted(&ledger, of_revision(&key(5), 3)).await.cancelled);
    assert!(!granted(&ledger, copy(&key(6), 0)).await.cancelled);
    // Given up, it is `cancelled`, and stays the sender's to settle again should the answer be lost.
    let reason = Reason::Cancelled;
    let dead = settle(&key(1), &one, Settlement::Dead { reason, detail: "cancelled".into() });
    for _ in 0..2 {
        assert_eq!(ledger.settle(dead.clone()).await.unwrap(), SettleAnswer::Recorded);
    }
    let status = store.job_status(&key(1)).await.unwrap().expect("a row");
    assert_eq!((status.state, status.turn), (State::Cancelled, Turn(1)));
}

#[tokio::test]
async fn an_outcome_that_is_recorded_again_after_its_job_was_called_back_is_known() {
    let database = TestDatabase::migrated().await;
    let (ledger, store) = (ledger(&database).await, database.store());
    let claimed = granted(&ledger, copy(&key(1), 0)).await;
    let recorded = settle(&key(1), &claimed, deferred());
    assert_eq!(ledger.settle(recorded.clone()).await.unwrap(), SettleAnswer::Recorded);
    assert_eq!(call_back(&store, &key(1)).await, CALLED_BACK);
    // The answer was lost: the copy that it owes is still to be made.
    assert_eq!(ledger.settle(recorded.clone()).await.unwrap(), SettleAnswer::Recorded);
    let sent = Settle { outcome: Settlement::Sent, ..recorded };
    assert_eq!(ledger.settle(sent).await.unwrap(), SettleAnswer::NotOwner);
    let answer = ledger.claim(copy(&key(1), 1)).await.unwrap();
    assert!(matches!(&answer, ClaimAnswer::Closed(end) if end.state == State::Cancelled), "{answer:?}");
}

#[tokio::test]
async fn of_claims_and_cancellations_at_once_each_job_is_counted_or_finds_out() {
    let database = TestDatabase::migrated().await;
    let (ledger, store) = (ledger(&database).await, database.store());
    for round in 0..20_u128 {
        database.run("TRUNCATE jobs, job_groups").await;
        let keys: Vec<JobKey> = (0..8).map(|number| key(100 * round + number)).collect();
        let claims = keys.iter().map(|key| ledger.claim(of_revision(key, 2)));
        let (claims, done) =
            tokio::join!(futures_util::future::join_all(claims), call_back_booking(&store, 2));
        let unaware = claims.into_iter().filter(|claim| match claim.as_ref().expect("no deadlock") {
            ClaimAnswer::Claimed(claimed) => !claimed.cancelled,
            other => panic!("{other:?}"),
        });
        let unaware = unaware.count() as u64;
        assert_eq!(done, Cancellation { cancelled: 0, too_late: unaware }, "round {round}");
    }
}

#[tokio::test]
async fn a_cancellation_is_remembered_as_long_as_the_ledger_remembers() {
    let database = TestDatabase::migrated().await;
    let store = database.store();
    call_back(&store, &key(1)).await;
    call_back_booking(&store, 2).await;
    let rows = "SELECT (SELECT count(*) FROM jobs) + (SELECT count(*) FROM job_groups)";
    let retention = Duration::from_secs(24 * 3600);
    for (age, left) in [("20 hours", 2), ("10 hours", 0)] {
        let back = format!("updated_at = updated_at - interval '{age}'");
        database
            .run(format!(
                "UPDATE jobs SET first_at = first_at - interval '{age}', {back}; UPDATE job_groups SET {back}"
            ))
            .await;
        Sweeper::new(store.clone()).sweep(retention).await.unwrap();
        assert_eq!(database.number(rows).await, left, "{age}");
    }
}
