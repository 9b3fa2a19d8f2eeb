//! The core under trouble of its own: claims that could be left behind, deliveries that could go round and round.

use std::time::Duration;

use sendoff::model::ledger::State;

use crate::support::broker::eventually;
use crate::support::smtp_server::{Action, Rule, Stage};
use crate::support::world::{World, job};

#[tokio::test]
async fn a_claim_is_given_back_when_the_configuration_cannot_be_read_after_it() {
    let world = World::new().await;
    let worker = world.worker().await;
    world.organization("acme").await;
    let first = world.publish(&job(Some("acme"))).await;
    world.event("email.sent", first).await;

    // A change that no notification tells of is seen by the claim alone, and what it asks for next cannot be read.
    world.database.run("ALTER TABLE smtp_configs DISABLE TRIGGER USER").await;
    world.database.run("UPDATE smtp_configs SET version = version + 1").await;
    world.database.run("ALTER TABLE smtp_configs RENAME COLUMN host TO hidden").await;
    let second = world.publish(&job(Some("acme"))).await;
    worker.logs("the database refused to look at a job").await;
    world.state(Some("acme"), second, State::Deferred).await;
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
    eventually("some attempts", async || worker.log().matches("no incarnation yet").count() > 4).await;
    let returned = r#"sendoff_jobs_settled_total{lane="notifications",outcome="requeued"}"#;
    let returned = worker.metric(returned).await;
    assert!(returned <= 10.0, "{returned} returns of 5 jobs: {}", worker.log());

    world.database.run("ALTER SEQUENCE hidden RENAME TO worker_incarnations").await;
    let sent = world.platform.wait_for_messages(5, Duration::from_secs(40)).await;
    assert_eq!(sent.expect("all are sent").len(), 5);
    worker.stop().await;
    world.end().await;
}
