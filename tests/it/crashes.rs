//! Workers that die, or lose their lock, at each point of a job's way; and the copies of jobs that remain of them.
//! Guarantee: none of it costs a job, and a job is sent twice only where its outcome is unknown and it says `resend`.

use std::sync::Arc;

use lapin::BasicProperties;
use lapin::types::{AMQPValue, FieldTable};
use sendoff::model::ledger::State;
use serde_json::{Value, json};
use tokio::sync::Notify;
use uuid::Uuid;

use crate::support::broker::{amqp_url, eventually};
use crate::support::proxy::Proxy;
use crate::support::smtp_server::{Action, Rule, SmtpServer, Stage};
use crate::support::world::{SOON, World, job};

/// A job that is not to be repeated when it cannot be known what became of it.
fn held_job(organization: Option<&str>) -> Value {
    let mut job = job(organization);
    job["on_unknown"] = json!("hold");
    job
}

/// How often a server came to the end of this job's message.
fn copies(server: &SmtpServer, id: Uuid) -> usize {
    let id = id.to_string();
    server.messages().iter().filter(|message| message.text().contains(&id)).count()
}

/// How many unknown outcomes the ledger has counted.
async fn unknown_outcomes(world: &World, id: Uuid) -> i64 {
    world.database.number(format!("SELECT unknowns::bigint FROM jobs WHERE id = '{id}'")).await
}

#[tokio::test]
async fn a_job_whose_worker_was_killed_before_data_is_sent_once_by_another() {
    let mut world = World::new().await;
    world.set("SENDOFF__SMTP__COMMAND_TIMEOUT_S", "120");
    let worker = world.worker().await;
    world.organization("acme").await;
    for server in [&world.platform, &world.server] {
        server.rule(Rule::new(Stage::Ehlo, Action::Silence));
    }
    let resend = world.publish(&job(None)).await;
    let hold = world.publish(&held_job(Some("acme"))).await;
    world.state(None, resend, State::Claimed).await;
    world.state(Some("acme"), hold, State::Claimed).await;

    worker.kill().await;
    for server in [&world.platform, &world.server] {
        server.change(|behaviour| behaviour.clear_rules());
    }
    let next = world.worker().await;
    for (organization, id, server) in [(None, resend, &world.platform), (Some("acme"), hold, &world.server)] {
        world.event("email.sent", id).await;
        assert_eq!(world.state(organization, id, State::Sent).await.attempts, 1);
        assert_eq!((server.seen(|seen| seen.final_dots), copies(server, id)), (1, 1));
    }
    next.logs("a worker has died").await;
    next.stop().await;
    world.end().await;
}

#[tokio::test]
async fn after_a_kill_behind_the_final_dot_one_job_is_sent_again_and_the_other_is_held_for_a_person() {
    let world = World::new().await;
    let worker = world.worker().await;
    world.organization("acme").await;
    world.organization("beta").await;
    world.server.rule(Rule::new(Stage::FinalDot, Action::Silence));
    let resend = world.publish(&job(Some("acme"))).await;
    let hold = world.publish(&held_job(Some("beta"))).await;
    world.server.wait_for(SOON, |seen| seen.final_dots == 2).await.expect("two messages");

    worker.kill().await;
    world.server.change(|behaviour| behaviour.clear_rules());
    let next = world.worker().await;
    world.event("email.sent", resend).await;
    assert_eq!(world.state(Some("acme"), resend, State::Sent).await.attempts, 1);
    assert_eq!(unknown_outcomes(&world, resend).await, 1);
    let dead = world.event("email.dead", hold).await;
    assert_eq!(dead["reason"], "unknown_outcome");
    let (body, reason, _) = world.dead_letter().await;
    let body: Value = serde_json::from_slice(&body).expect("the job");
    assert_eq!((body["id"].as_str(), reason.as_str()), (Some(&*hold.to_string()), "unknown_outcome"));
    // The held one's copy was the second dot; the third is the repetition of the other.
    assert_eq!(world.server.seen(|seen| seen.final_dots), 3);
    assert_eq!((copies(&world.server, resend), copies(&world.server, hold)), (1, 0));
    next.stop().await;
    world.end().await;
}

#[tokio::test]
async fn a_dead_letter_that_a_living_worker_cannot_hand_over_is_handed_over_by_who_gets_its_delivery() {
    let mut world = World::new().await;
    let (proxy, through) = Proxy::before(&amqp_url()).await;
    world.set("AMQP_URL", &through);
    let recorder = world.worker().await;
    let go_on = Arc::new(Notify::new());
    world.platform.rule(Rule::new(Stage::Banner, Action::Hold(go_on.clone())));
    world.platform.rule(Rule::new(Stage::Mail, Action::reply("550 5.7.1 not you")));
    let id = world.publish(&job(None)).await;
    world.platform.wait_for(SOON, |seen| seen.open_sessions() == 1).await.expect("a connection");

    // It records the death, cannot publish the letter, and loses its delivery, but keeps its lock.
    proxy.stall();
    go_on.notify_one();
    world.state(None, id, State::Dead).await;
    proxy.refuse();
    world.set("AMQP_URL", &amqp_url());
    let next = world.worker().await;
    let (_, reason, _) = world.dead_letter().await;
    assert_eq!(reason, "sender_refused");
    assert_eq!(world.event("email.dead", id).await["reason"], "sender_refused");
    recorder.kill().await;
    next.stop().await;
    for queue in ["jobs.notifications", "tap"] {
        world.broker.wait_count(&world.broker.name(queue), 0).await;
    }
    assert_eq!(world.platform.seen(|seen| seen.count("MAIL")), 1);
    world.end().await;
}

#[tokio::test]
async fn a_job_whose_worker_was_killed_before_its_acknowledgement_is_announced_and_not_sent_again() {
    let mut world = World::new().await;
    let (proxy, through) = Proxy::before(&amqp_url()).await;
    world.set("AMQP_URL", &through);
    let worker = world.worker().await;
    let go_on = Arc::new(Notify::new());
    world.platform.rule(Rule::new(Stage::FinalDot, Action::Hold(go_on.clone())));
    let id = world.publish(&job(None)).await;
    world.platform.wait_for(SOON, |seen| seen.final_dots == 1).await.expect("the message");

    proxy.stall();
    go_on.notify_one();
    world.state(None, id, State::Sent).await;
    assert_eq!(world.event_count("email.sent", id), 0);
    worker.kill().await;
    proxy.refuse();
    world.platform.change(|behaviour| behaviour.clear_rules());
    world.set("AMQP_URL", &amqp_url());
    let next = world.worker().await;
    world.event("email.sent", id).await;
    let duplicates = "sendoff_jobs_settled_total{lane=\"notifications\",outcome=\"duplicate\"}";
    eventually("the copy is settled", async || next.metric(duplicates).await >= 1.0).await;
    assert_eq!(world.platform.seen(|seen| (seen.final_dots, seen.message_count)), (1, 1));
    next.stop().await;
    world.broker.wait_count(&world.broker.name("jobs.notifications"), 0).await;
    world.end().await;
}

#[tokio::test]
async fn a_living_worker_that_lost_its_lock_takes_a_new_incarnation_and_sends_each_job_once() {
    let mut world = World::new().await;
    world.set("SENDOFF__SMTP__COMMAND_TIMEOUT_S", "120");
    let worker = world.worker().await;
    let go_on = Arc::new(Notify::new());
    world.platform.rule(Rule::new(Stage::Ehlo, Action::Hold(go_on.clone())).once());
    let mut ids = Vec::new();
    for index in 0..12 {
        let published = if index % 2 == 0 { job(None) } else { held_job(None) };
        ids.push(world.publish(&published).await);
    }
    world.platform.wait_for(SOON, |seen| seen.count("EHLO") == 1).await.expect("a session");

    assert_eq!(world.database.terminate("sendoff incarnation").await, 1);
    worker.logs("lost the incarnation's lock").await;
    eventually("a second incarnation", async || worker.log().matches("took an incarnation").count() >= 2)
        .await;
    go_on.notify_one();
    for id in &ids {
        world.event("email.sent", *id).await;
        let row = world.state(None, *id, State::Sent).await;
        assert_eq!((row.attempts, unknown_outcomes(&world, *id).await), (1, 0));
        assert_eq!(copies(&world.platform, *id), 1);
    }
    // The session that was opening when the lock was lost took no DATA for the claim of the old incarnation.
    assert_eq!(world.platform.seen(|seen| (seen.count("DATA"), seen.final_dots)), (12, 12));
    worker.stop().await;
    world.end().await;
}

#[tokio::test]
async fn copies_of_an_earlier_turn_are_acknowledged_and_not_sent() {
    let mut world = World::new().await;
    world.set("SENDOFF__RETRY__SCHEDULE_S", "5");
    let worker = world.worker().await;
    world.platform.rule(Rule::new(Stage::Rcpt, Action::reply("451 4.7.1 greylisted")).once());
    let published = job(None);
    let id = world.publish(&published).await;
    world.event("email.deferred", id).await;

    for _ in 0..3 {
        let mut headers = FieldTable::default();
        headers.insert("sendoff-turn".into(), AMQPValue::LongLongInt(0));
        world.publish_with(&published, BasicProperties::default().with_headers(headers)).await;
    }
    let duplicates = "sendoff_jobs_settled_total{lane=\"notifications\",outcome=\"duplicate\"}";
    eventually("three copies are settled", async || worker.metric(duplicates).await >= 3.0).await;
    world.event("email.sent", id).await;
    assert_eq!(world.state(None, id, State::Sent).await.attempts, 2);
    worker.stop().await;
    assert_eq!(world.platform.seen(|seen| (seen.count("RCPT"), seen.final_dots)), (2, 1));
    world.broker.wait_count(&world.broker.name("jobs.notifications"), 0).await;
    world.end().await;
}

#[tokio::test]
async fn a_dead_letter_that_a_shovel_moved_back_is_not_sent_and_not_lost() {
    let world = World::new().await;
    let worker = world.worker().await;
    world.platform.rule(Rule::new(Stage::Rcpt, Action::reply("550 5.1.1 nobody here")).once());
    let id = world.publish(&job(None)).await;
    assert_eq!(world.event("email.dead", id).await["reason"], "recipients_refused");

    let dead = world.broker.tap();
    let letter = world.broker.take(&dead).await;
    let key = letter.text("sendoff-routing-key").expect("the letter keeps its routing key");
    world.broker.publish_job(&key, &letter.body, letter.properties.clone()).await;
    let again = world.broker.take(&dead).await;
    assert_eq!(again.body, letter.body);
    for header in ["sendoff-reason", "sendoff-detail", "sendoff-routing-key", "sendoff-lane"] {
        assert_eq!(again.text(header), letter.text(header), "{header}");
    }
    assert_eq!(again.header("sendoff-turn"), letter.header("sendoff-turn"));
    assert_eq!(world.state(None, id, State::Dead).await.attempts, 1);
    assert_eq!(world.platform.seen(|seen| (seen.count("RCPT"), seen.final_dots)), (1, 0));
    worker.stop().await;
    world.end().await;
}
