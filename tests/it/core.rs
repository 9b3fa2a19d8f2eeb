//! The core under trouble of its own: claims that could be left behind, deliveries that could go round and round.

use lapin::options::{BasicGetOptions, BasicNackOptions, ExchangeDeleteOptions, QueueDeleteOptions};
use sendoff::model::ledger::State;
use serde_json::json;

use crate::support::broker::eventually;
use crate::support::smtp_server::{Action, Rule, Stage};
use crate::support::world::{SOON, World, job};

#[tokio::test]
async fn a_claim_is_given_back_when_the_configuration_cannot_be_read_after_it() {
    let world = World::new().await;
    let worker = world.worker().await;
    world.organization("acme").await;
    let first = world.publish(&job(Some("acme"))).await;
    world.event("email.sent", first).await;

    world.database.run("ALTER TABLE smtp_configs DISABLE TRIGGER USER").await;
    // A worker that has just begun to listen for changes forgets what it read before: then the row is missed before
    // the claim already, and the case is set up anew.
    let mut claimed_first = false;
    for _ in 0..10 {
        // A change that no notification tells of is seen by the claim alone, and what it asks for next cannot be read.
        world.database.run("UPDATE smtp_configs SET version = version + 1").await;
        world.database.run("ALTER TABLE smtp_configs RENAME COLUMN host TO hidden").await;
        let second = world.publish(&job(Some("acme"))).await;
        worker.logs(&format!("put aside job=acme/{second}")).await;
        let status = world.status(Some("acme"), second).await;
        claimed_first = status.as_ref().is_some_and(|status| status.state == State::Deferred);
        if claimed_first {
            break;
        }
        assert!(status.is_none(), "{status:?}");
        world.database.run("ALTER TABLE smtp_configs RENAME COLUMN hidden TO host").await;
        let warming = world.publish(&job(Some("acme"))).await;
        world.event("email.sent", warming).await;
    }
    assert!(claimed_first, "{}", worker.log());
    worker.stop().await;
    world.end().await;
}

#[tokio::test]
async fn a_worker_that_gets_no_incarnation_takes_no_job_from_its_lane() {
    let world = World::new().await;
    let worker = world.worker().await;
    world.database.run("ALTER SEQUENCE worker_incarnations RENAME TO hidden").await;
    world.database.terminate("sendoff incarnation").await;
    worker.logs("lost the incarnation's lock").await;

    let jobs: Vec<_> = (0..5).map(|_| job(None)).collect();
    for job in &jobs {
        world.publish(job).await;
    }
    eventually("the worker says that it is not ready", async || worker.get("/readyz").await.0 == 503).await;
    // The worker's own attempts to get on, of which a lane that went on meanwhile would have seen many rounds.
    eventually("some attempts", async || worker.log().matches("still no incarnation").count() > 4).await;
    let returned = r#"sendoff_jobs_settled_total{lane="notifications",outcome="requeued"}"#;
    let returned = worker.metric(returned).await;
    assert!(returned <= 10.0, "{returned} returns of 5 jobs: {}", worker.log());

    world.database.run("ALTER SEQUENCE hidden RENAME TO worker_incarnations").await;
    let sent = world.platform.wait_for_messages(5, SOON).await;
    assert_eq!(sent.expect("all are sent").len(), 5);
    worker.stop().await;
    world.end().await;
}

#[tokio::test]
async fn an_unknown_outcome_is_not_hidden_by_a_further_transaction() {
    let world = World::with(|b| {
        b.rule(Rule::new(Stage::Rcpt, Action::reply("452 4.5.3 too many recipients")).nth(2).once());
        b.rule(Rule::new(Stage::FinalDot, Action::AcceptThenClose).once());
        b.rule(Rule::new(Stage::Mail, Action::reply("451 4.3.0 later")).when(|at| at.session > 0).once());
    })
    .await;
    let worker = world.worker().await;
    world.organization("acme").await;
    let mut job = job(Some("acme"));
    job["to"] = json!(["ann@customer.example", "bob@customer.example"]);
    job["on_unknown"] = json!("hold");
    let id = world.publish(&job).await;
    assert_eq!(world.event("email.dead", id).await["reason"], "unknown_outcome");
    assert_eq!(world.received(1).await.len(), 1);
    world.state(Some("acme"), id, State::Dead).await;
    worker.stop().await;
    world.end().await;
}

#[tokio::test]
async fn what_a_worker_died_before_saying_of_refused_recipients_is_said_by_the_next_one() {
    let world = World::new().await;
    world.platform.rule(Rule::new(Stage::Rcpt, Action::reply("550 5.1.1 no such user")).nth(2));
    let worker = world.worker().await;
    let mut job = job(None);
    job["to"] = json!(["ann@customer.example", "bob@customer.example"]);
    let id = world.publish(&job).await;
    world.event("email.sent", id).await;
    assert_eq!(world.dead_letter().await.1, "recipients_refused");
    worker.stop().await;

    // As after a death between record and hand-over: the broker brings the delivery a second time.
    world.publish(&job).await;
    let channel = world.broker.channel().await;
    let lane = world.broker.name("jobs.notifications");
    eventually("the delivery is returned", async || {
        let got =
            channel.basic_get(lane.as_str().into(), BasicGetOptions::default()).await.expect("answered");
        let Some(got) = got else { return false };
        let returned = got.delivery.acker.nack(BasicNackOptions { requeue: true, multiple: false }).await;
        returned.expect("returned")
    })
    .await;
    let worker = world.worker().await;
    let (_, reason, detail) = world.dead_letter().await;
    assert_eq!(
        (reason.as_str(), detail.as_str()),
        ("recipients_refused", "recipient 1 was refused with 550")
    );
    eventually("both events again", async || {
        world.all_events("email.sent", id).len() >= 2 && world.all_events("email.dead", id).len() >= 2
    })
    .await;
    assert_eq!(world.platform.messages().len(), 1);
    worker.stop().await;
    world.end().await;
}

#[tokio::test]
async fn a_job_past_its_time_dies_even_where_the_worker_lacks_the_key() {
    let mut world = World::new().await;
    let worker = world.worker().await;
    world.organization("acme").await;
    worker.stop().await;
    world.set("SENDOFF__ENCRYPTION__KEYS", "k2:OTg3NjU0MzIxMGZlZGNiYTk4NzY1NDMyMTBmZWRjYmE=");
    let worker = world.worker_starting(&[]).await;
    let mut job = job(Some("acme"));
    job["expires_at"] = json!("2020-01-01T00:00:00Z");
    let id = world.publish(&job).await;
    world.event("email.expired", id).await;
    assert_eq!(world.dead_letter().await.1, "expired");
    worker.stop().await;
    world.end().await;
}

#[tokio::test]
async fn a_copy_is_kept_for_as_long_as_the_worker_still_owes_the_one_after_it() {
    let world = World::new().await;
    world.platform.rule(Rule::new(Stage::Mail, Action::reply("451 4.3.0 later")).once());
    let worker = world.worker().await;
    let channel = world.broker.channel().await;
    let queue = world.broker.name("retry.notifications.1");
    channel.queue_delete(queue.as_str().into(), QueueDeleteOptions::default()).await.expect("deleted");
    let job = job(None);
    let id = world.publish(&job).await;
    worker.logs("a publish was not confirmed").await;

    world.publish(&job).await;
    let settled = async |outcome: &str| {
        let series = format!(r#"sendoff_jobs_settled_total{{lane="notifications",outcome="{outcome}"}}"#);
        worker.metric(&series).await
    };
    eventually("the second copy is put aside", async || settled("requeued").await >= 1.0).await;
    assert_eq!(settled("duplicate").await, 0.0);

    world.broker.declare().await;
    world.event("email.sent", id).await;
    eventually("the second copy goes", async || settled("duplicate").await >= 1.0).await;
    assert_eq!(world.platform.messages().len(), 1);
    worker.stop().await;
    world.end().await;
}

#[tokio::test]
async fn a_copy_that_meets_another_workers_retry_waits_as_long_as_the_retry_does() {
    let mut world = World::new().await;
    world.set("SENDOFF__RETRY__SCHEDULE_S", "120");
    world.platform.rule(Rule::new(Stage::Mail, Action::reply("451 4.3.0 later")));
    let recorder = world.worker().await;
    let job = job(None);
    let id = world.publish(&job).await;
    world.event("email.deferred", id).await;

    // Its lock stays held, so it counts as alive, and it may still owe the copy for all that anybody can know.
    let other = world.worker().await;
    recorder.signal("STOP").await;
    for _ in 0..4 {
        world.publish(&job).await;
    }
    let waiting = world.broker.name("retry.notifications.30");
    eventually("a copy waits", async || world.broker.count(&waiting).await.unwrap_or_default() >= 1).await;
    let sent =
        other.metric(r#"sendoff_attempts_total{transport="platform",result="sent",reason="none"}"#).await;
    assert_eq!(sent, 0.0);
    other.stop().await;
    recorder.kill().await;
    world.end().await;
}

#[tokio::test]
async fn an_events_exchange_that_somebody_deletes_is_declared_again_and_holds_nothing_up_for_long() {
    let world = World::new().await;
    let worker = world.worker().await;
    let channel = world.broker.channel().await;
    let exchange = world.broker.name("events");
    channel
        .exchange_delete(exchange.as_str().into(), ExchangeDeleteOptions::default())
        .await
        .expect("deleted");
    let id = world.publish(&job(None)).await;
    world.state(None, id, State::Sent).await;
    let settled = r#"sendoff_jobs_settled_total{lane="notifications",outcome="sent"}"#;
    eventually("the job is settled", async || worker.metric(settled).await >= 1.0).await;
    worker.logs("declaring the topology again").await;
    worker.stop().await;
    world.end().await;
}

#[tokio::test]
async fn a_job_that_some_have_and_whose_booking_has_changed_is_announced_with_its_server() {
    let mut world = World::new().await;
    world.set("SENDOFF__RETRY__SCHEDULE_S", "120");
    world.server.rule(Rule::new(Stage::Rcpt, Action::reply("451 4.2.0 greylisted")).nth(2).once());
    let worker = world.worker().await;
    world.organization("acme").await;
    let of = |sequence: i64, to: serde_json::Value| {
        let mut job = job(Some("acme"));
        (job["group"], job["sequence"], job["to"]) = (json!("booking-1"), json!(sequence), to);
        job
    };
    let old = world.publish(&of(1, json!(["ann@customer.example", "bob@customer.example"]))).await;
    world.event("email.deferred", old).await;
    let new = world.publish(&of(2, json!(["ann@customer.example"]))).await;
    world.event("email.sent", new).await;

    world.retry_now(120, old).await;
    let sent = world.event("email.sent", old).await;
    assert_eq!(sent["transport"], "organization");
    assert_eq!(sent["recipients_refused"], json!([{"index": 1, "code": 0, "reason": "superseded"}]));
    let envelopes: Vec<_> = world.server.messages().into_iter().map(|message| message.recipients).collect();
    assert_eq!(envelopes, [["ann@customer.example"], ["ann@customer.example"]]);
    worker.stop().await;
    world.end().await;
}
