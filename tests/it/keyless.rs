//! A rolling change of keys, as parked mail sees it: workers whose ring lacks a key beside one that has it.
//! Guarantee: what one worker cannot open is left to the others, and keeps it from being ready.

use std::sync::Arc;

use secrecy::SecretString;
use sendoff::model::letter::LetterState;
use sendoff::secrets::KeyRing;
use sendoff::store::DeadLetters;
use serde_json::{Value, json};

use crate::releasing::{
    ENTER_PARKED, assert_once, fail, id_of, jobs, park, parked_letter, probe_now, recovered,
};
use crate::support::broker::eventually;
use crate::support::world::{KEYS, NEW_KEY, PASSWORD, WorkerProcess, World, job};

fn both() -> String {
    format!("{NEW_KEY},{KEYS}")
}

async fn says_that_it_lacks_a_key(worker: &WorkerProcess) {
    eventually("the worker says which key it lacks", async || {
        let (status, body) = worker.get("/readyz").await;
        status == 503 && body.contains("encryption.keys lacks `k1`")
    })
    .await;
}

async fn holds_the_lease(world: &World) {
    let held = "SELECT count(*) FROM leases WHERE name = 'parked letters' AND expires_at > now()";
    eventually("the worker releases", async || world.database.number(held).await == 1).await;
}

/// Archives a parked letter under the new key.
async fn park_under_the_new_key(world: &World, parked: &Value) {
    let ring = KeyRing::parse(&[SecretString::from(NEW_KEY)]).expect("a key");
    let archive = DeadLetters::new(world.database.store(), Arc::new(ring));
    archive.archive(&[parked_letter(parked, 30)]).await.expect("archived");
    world.database.run(ENTER_PARKED).await;
}

#[tokio::test]
async fn letters_whose_key_the_releasing_worker_lacks_are_released_by_another_and_counted() {
    let mut world = World::new().await;
    world.set("SENDOFF__ENCRYPTION__KEYS", NEW_KEY);
    let without = world.worker().await;
    world.organization("acme").await;
    holds_the_lease(&world).await;
    world.set("SENDOFF__ENCRYPTION__KEYS", &both());
    let with = world.worker().await;
    fail(&world, "acme", 3600).await;
    let parked = jobs("acme", 3);
    park(&world, &parked).await;
    probe_now(&world, "acme").await;
    assert_eq!(recovered(&world, "acme").await, 3);
    world.received(3).await;
    assert_once(&world.server, &parked);
    without.logs("parked letters are left to a worker that has their key").await;
    without.ready().await;
    without.stop().await;
    with.stop().await;
    world.end().await;
}

#[tokio::test]
async fn a_letter_whose_key_nobody_has_is_waited_for_and_holds_up_no_other() {
    let mut world = World::new().await;
    world.set("SENDOFF__ENCRYPTION__KEYS", NEW_KEY);
    let worker = world.worker().await;
    world.organization("acme").await;
    fail(&world, "acme", 3600).await;
    let (keyless, opens) = (job(Some("acme")), job(Some("acme")));
    park(&world, std::slice::from_ref(&keyless)).await;
    park_under_the_new_key(&world, &opens).await;
    probe_now(&world, "acme").await;
    says_that_it_lacks_a_key(&worker).await;
    world.received(1).await;
    assert_once(&world.server, std::slice::from_ref(&opens));
    assert_eq!(world.letter(id_of(&keyless)).await.state, LetterState::Parked);
    assert!(!worker.log().contains("a parked letter cannot be released"));
    // It is no recovery without that letter.
    assert_eq!(world.database.number("SELECT count(*) FROM recoveries").await, 1);
    worker.kill().await;
    world.set("SENDOFF__ENCRYPTION__KEYS", &both());
    let worker = world.worker().await;
    assert_eq!(recovered(&world, "acme").await, 2);
    world.received(2).await;
    worker.stop().await;
    world.end().await;
}

#[tokio::test]
async fn a_probe_whose_key_a_worker_lacks_is_made_by_another() {
    let mut world = World::new().await;
    let first = world.worker().await;
    world.organization_at("acme", json!({"password": PASSWORD})).await;
    first.stop().await;
    world.set("SENDOFF__ENCRYPTION__KEYS", NEW_KEY);
    let without = world.worker_starting(&[]).await;
    says_that_it_lacks_a_key(&without).await;
    fail(&world, "acme", 0).await;
    let left = "a probe is left to a worker that has its key";
    without.logs(left).await;
    world.set("SENDOFF__ENCRYPTION__KEYS", &both());
    let with = world.worker().await;
    assert_eq!(recovered(&world, "acme").await, 0);
    assert_eq!(without.log().matches(left).count(), 1, "it does not take it again and again");
    assert_eq!(world.server.connections(), 1);
    without.stop().await;
    with.stop().await;
    world.end().await;
}
