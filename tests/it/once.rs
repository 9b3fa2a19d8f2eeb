//! What keeps a job from being sent twice, too late, or in the wrong order.
//! Guarantee: one id is sent once within its organization, however many copies and workers there are.

use std::sync::Arc;
use std::time::{Duration, Instant};

use sendoff::clock::Clock;
use sendoff::model::failure::Reason;
use sendoff::model::ledger::State;
use serde_json::{Value, json};
use time::format_description::well_known::Rfc3339;
use tokio::sync::Notify;

use crate::support::broker::eventually;
use crate::support::smtp_server::{Action, Rule, Stage};
use crate::support::story::Letters;
use crate::support::world::{SOON, WorkerProcess, World, job};

const DUPLICATES: &str = "sendoff_jobs_settled_total{lane=\"notifications\",outcome=\"duplicate\"}";

/// Waits until workers have settled so many copies as duplicates.
async fn settled_as_duplicates(workers: &[&WorkerProcess], count: u32) {
    eventually(&format!("{count} duplicates"), async || {
        let mut sum = 0.0;
        for worker in workers {
            sum += worker.metric(DUPLICATES).await;
        }
        sum >= f64::from(count)
    })
    .await;
}

#[tokio::test]
async fn a_job_published_ten_times_is_sent_once() {
    let world = World::new().await;
    let worker = world.worker().await;
    world.organization("acme").await;
    let job = job(Some("acme"));
    let id = world.publish(&job).await;
    for _ in 1..10 {
        world.publish(&job).await;
    }
    settled_as_duplicates(&[&worker], 9).await;
    assert_eq!(world.story(id).await, "sent");
    world.publish(&job).await;
    settled_as_duplicates(&[&worker], 10).await;
    assert_eq!((world.server.messages().len(), world.event_count("email.sent", id)), (1, 1));
    assert_eq!(world.state(Some("acme"), id, State::Sent).await.attempts, 1);
    worker.stop().await;
    world.end().await;
}

#[tokio::test]
async fn two_workers_that_get_the_same_job_at_once_send_it_once() {
    let world = World::new().await;
    let (first, second) = tokio::join!(world.worker(), world.worker());
    world.organization("acme").await;
    world.server.rule(Rule::new(Stage::FinalDot, Action::After(Duration::from_secs(1))));
    let job = job(Some("acme"));
    let id = world.publish(&job).await;
    for _ in 1..12 {
        world.publish(&job).await;
    }
    settled_as_duplicates(&[&first, &second], 11).await;
    assert_eq!(world.story(id).await, "sent");
    assert_eq!((world.server.messages().len(), world.event_count("email.sent", id)), (1, 1));
    assert_eq!(world.state(Some("acme"), id, State::Sent).await.attempts, 1);
    first.stop().await;
    second.stop().await;
    world.end().await;
}

#[tokio::test]
async fn the_same_id_in_two_organizations_is_two_jobs() {
    let world = World::new().await;
    let worker = world.worker().await;
    world.organization("acme").await;
    world.organization("globex").await;
    let mut job = job(None);
    for organization in [json!("acme"), json!("globex"), json!(null)] {
        job["organization_id"] = organization.clone();
        let id = world.publish(&job).await;
        let of_organization = |event: &Value| {
            event["type"] == "email.sent"
                && event["job_id"] == id.to_string()
                && event["organization_id"] == organization
        };
        world.events.wait_for(of_organization, SOON).await;
    }
    let from: Vec<_> = world.server.messages().into_iter().map(|message| message.from).collect();
    assert_eq!(from, ["hello@acme.example", "hello@globex.example"]);
    assert_eq!(world.platform.messages().len(), 1);
    worker.stop().await;
    world.end().await;
}

#[tokio::test]
async fn another_body_under_a_known_id_is_a_dead_letter_and_the_first_job_stays_as_it_is() {
    let world = World::new().await;
    let worker = world.worker().await;
    world.organization("acme").await;
    let mut job = job(Some("acme"));
    let id = world.publish(&job).await;
    assert_eq!(world.story(id).await, "sent");
    job["subject"] = json!("Your booking is cancelled");
    world.publish(&job).await;
    assert_eq!(world.event("email.dead", id).await["reason"], "id_conflict");
    let (body, reason, detail) = world.dead_letter().await;
    assert_eq!((body, reason.as_str()), (serde_json::to_vec(&job).expect("JSON"), "id_conflict"));
    assert!(detail.contains("another body"), "{detail}");
    assert_eq!(world.server.messages().len(), 1);
    assert_eq!(world.state(Some("acme"), id, State::Sent).await.reason, None);
    worker.stop().await;
    world.end().await;
}

#[tokio::test]
async fn a_job_that_waits_for_its_retry_is_not_tried_early_when_it_is_published_again() {
    let mut world = World::new().await;
    world.set("SENDOFF__RETRY__SCHEDULE_S", "5");
    let worker = world.worker().await;
    world.organization("acme").await;
    world.server.rule(Rule::new(Stage::Mail, Action::reply("451 4.3.0 not now")).once());
    let job = job(Some("acme"));
    let before = Instant::now();
    let id = world.publish(&job).await;
    world.event("email.deferred", id).await;
    for _ in 0..3 {
        world.publish(&job).await;
    }
    settled_as_duplicates(&[&worker], 3).await;
    assert_eq!(world.story(id).await, "deferred server_error, sent");
    let messages = world.server.messages();
    assert_eq!((messages.len(), world.server.seen(|seen| seen.count("MAIL"))), (1, 2));
    let waited = messages[0].at - before;
    assert!(waited >= Duration::from_secs(5), "{waited:?}");
    worker.stop().await;
    world.end().await;
}

/// A job of a revision of a booking.
fn revision(organization: &str, sequence: u32, to: &str) -> Value {
    let mut job = job(Some(organization));
    job["group"] = json!("booking-17@acme.example");
    job["sequence"] = json!(sequence);
    job["to"] = json!([to]);
    job
}

#[tokio::test]
async fn an_older_revision_is_not_sent_after_a_newer_one() {
    let mut world = World::new().await;
    world.set("SENDOFF__RETRY__SCHEDULE_S", "120");
    let worker = world.worker().await;
    world.organization("acme").await;
    world.organization("globex").await;
    let greylisting = Rule::new(Stage::Rcpt, Action::reply("450 4.2.0 Greylisted"));
    world.server.rule(greylisting.of("waiting@customer.example"));

    let waiting = world.publish(&revision("acme", 1, "waiting@customer.example")).await;
    world.event("email.deferred", waiting).await;
    let newer = world.publish(&revision("acme", 2, "ann@customer.example")).await;
    assert_eq!(world.story(newer).await, "sent");
    world.retry_now(120, waiting).await;
    let late = world.publish(&revision("acme", 1, "ann@customer.example")).await;
    let mut letters = Letters::default();
    for (id, story) in [(late, "dead superseded"), (waiting, "deferred recipients_refused, dead superseded")]
    {
        assert_eq!(world.story(id).await, story);
        let letter = letters.of(&world, id).await;
        assert_eq!(letter.text("sendoff-reason").as_deref(), Some("superseded"));
        let row = world.state(Some("acme"), id, State::Dead).await;
        assert_eq!(row.reason, Some(Reason::Superseded));
    }
    // The same revision goes to others too, and another organization's group is its own.
    let same = world.publish(&revision("acme", 2, "bob@customer.example")).await;
    let others = world.publish(&revision("globex", 0, "ann@customer.example")).await;
    assert_eq!([world.story(same).await, world.story(others).await], ["sent", "sent"]);
    assert_eq!(world.server.messages().len(), 3);
    worker.stop().await;
    world.end().await;
}

#[tokio::test]
async fn an_older_revision_on_its_way_is_stopped_right_before_its_message() {
    let mut world = World::with(|behaviour| behaviour.pipelining = false).await;
    world.set("SENDOFF__SMTP__COMMAND_TIMEOUT_S", "120");
    let worker = world.worker().await;
    world.organization("acme").await;
    // A configuration that has proven itself gets a second connection.
    let first = world.publish(&job(Some("acme"))).await;
    assert_eq!(world.story(first).await, "sent");

    let go_on = Arc::new(Notify::new());
    let hold = Rule::new(Stage::Rcpt, Action::Hold(go_on.clone()));
    world.server.rule(hold.of("old@customer.example"));
    let old = world.publish(&revision("acme", 1, "old@customer.example")).await;
    let asked = world.server.wait_for(SOON, |seen| seen.count("RCPT") == 2).await;
    asked.expect("the older revision is under way");
    let new = world.publish(&revision("acme", 2, "new@customer.example")).await;
    assert_eq!(world.story(new).await, "sent");
    go_on.notify_one();
    assert_eq!(world.story(old).await, "dead superseded");
    assert_eq!(world.dead_letter().await.1, "superseded");
    let messages = world.server.messages();
    assert_eq!(messages.len(), 2);
    assert!(messages.iter().all(|message| message.recipients != ["old@customer.example"]));
    worker.stop().await;
    world.end().await;
}

#[tokio::test]
async fn an_expired_job_is_not_sent_neither_at_first_nor_at_its_retry() {
    let mut world = World::new().await;
    world.set("SENDOFF__RETRY__SCHEDULE_S", "120");
    let worker = world.worker().await;
    world.organization("acme").await;
    world.server.rule(Rule::new(Stage::Mail, Action::reply("451 4.3.0 not now")));
    let until = |from_now| {
        let at = Clock::system().now() + time::Duration::seconds(from_now);
        let mut job = job(Some("acme"));
        job["expires_at"] = json!(at.format(&Rfc3339).expect("formattable"));
        job
    };
    let mut letters = Letters::default();
    // The second is tried, and would expire before its next attempt.
    for (from_now, mails) in [(-1, 0), (100, 1)] {
        let job = until(from_now);
        let id = world.publish(&job).await;
        assert_eq!(world.story(id).await, "expired expired");
        assert_eq!(world.event_count("email.dead", id), 0);
        let letter = letters.of(&world, id).await;
        assert_eq!(letter.text("sendoff-reason").as_deref(), Some("expired"));
        assert_eq!(letter.body, serde_json::to_vec(&job).expect("JSON"));
        let row = world.state(Some("acme"), id, State::Dead).await;
        assert_eq!(row.reason, Some(Reason::Expired));
        assert_eq!(world.server.seen(|seen| seen.count("MAIL")), mails);
    }
    assert!(world.server.messages().is_empty());
    worker.stop().await;
    world.end().await;
}
