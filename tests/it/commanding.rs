//! Commands over the broker, with real workers: two at once, late ones, slow ones, strangers' ones.
//! Guarantee: what one worker does counts for all.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use lapin::BasicProperties;
use sendoff::broker::Broker;
use serde_json::{Value, json};
use tokio::sync::Semaphore;

use crate::support::broker::{SOON, TestBroker, eventually};
use crate::support::smtp_server::{Action, Rule, SmtpServer, Stage};
use crate::support::world::{PASSWORD, USERNAME, World};

/// As many as a worker carries out at once.
const SLOTS: usize = 64;

fn settings(port: u16) -> Value {
    json!({"from_email": "hello@acme.example", "from_name": "Team", "host": "localhost", "port": port,
        "username": USERNAME, "password": PASSWORD})
}

fn command(name: &str, organization: &str, params: Value) -> Value {
    json!({"command": name, "organization_id": organization, "params": params})
}

fn count(replies: &[Value], matches: impl Fn(&Value) -> bool) -> usize {
    replies.iter().filter(|reply| matches(reply)).count()
}

#[tokio::test]
async fn of_two_workers_that_create_for_one_organization_at_once_one_does() {
    let world = World::new().await;
    let workers = tokio::join!(world.worker(), world.worker());
    for organization in ["a", "b", "c", "d"] {
        let flag = json!({"feature": "custom-smtp-for-orgs", "enabled": true});
        world.commanded("feature.set", organization, flag).await;
        let create = command("smtp_config.create", organization, settings(world.server.port()));
        let replies = join_all((0..4).map(|_| world.answered(create.clone()))).await;
        assert_eq!(count(&replies, |reply| reply["ok"] == true), 1, "{replies:?}");
        assert_eq!(count(&replies, |reply| reply["error"]["code"] == "already_exists"), 3, "{replies:?}");
        let stored = format!("SELECT count(*) FROM smtp_configs WHERE organization_id = '{organization}'");
        assert_eq!(world.database.number(stored).await, 1);
    }
    let (one, other) = workers;
    let metric = "sendoff_control_commands_total{command=\"smtp_config.create\",code=";
    let mut shares = Vec::new();
    for worker in [&one, &other] {
        let ok = worker.metric(&format!("{metric}\"ok\"}}")).await;
        shares.push(ok + worker.metric(&format!("{metric}\"already_exists\"}}")).await);
    }
    assert!(shares.iter().all(|share| *share > 0.0), "both workers took part: {shares:?}");
    tokio::join!(one.stop(), other.stop());
    world.end().await;
}

#[tokio::test]
async fn two_workers_share_an_organizations_tests() {
    let mut world = World::new().await;
    world.set("SENDOFF__CONTROL__TESTS_PER_MINUTE", "3");
    let workers = tokio::join!(world.worker(), world.worker());
    world.organization("acme").await;
    let test = command("smtp_config.test", "acme", json!({}));
    let replies = join_all((0..8).map(|_| world.answered(test.clone()))).await;
    assert_eq!(count(&replies, |reply| reply["result"]["ok"] == true), 3, "{replies:?}");
    assert_eq!(count(&replies, |reply| reply["error"]["code"] == "rate_limited"), 5, "{replies:?}");
    assert_eq!(world.server.connections(), 3);
    tokio::join!(workers.0.stop(), workers.1.stop());
    world.end().await;
}

#[tokio::test]
async fn tests_of_silent_servers_do_not_hold_up_a_quick_command() {
    let mut world = World::new().await;
    world.set("SENDOFF__CONTROL__TESTS_PER_MINUTE", "1000");
    let worker = world.worker().await;
    world.organization("acme").await;
    let silent = SmtpServer::start(|behaviour| {
        behaviour.rule(Rule::new(Stage::Banner, Action::Silence));
    })
    .await;
    let test = command("smtp_config.test", "acme", settings(silent.port()));
    let body = test.to_string();
    for _ in 0..SLOTS {
        world
            .broker
            .publish("", &world.broker.name("control"), body.as_bytes(), BasicProperties::default())
            .await;
    }
    silent.wait_for(SOON, |seen| seen.open_sessions() > 16).await.expect("many are under way");
    let reply = world.answered(command("smtp_config.get", "acme", json!({}))).await;
    assert_eq!(reply["ok"], true, "{reply}");
    assert!(silent.seen(|seen| seen.open_sessions()) > 0, "it was answered meanwhile");
    worker.stop().await;
    world.end().await;
}

#[tokio::test]
async fn only_who_the_broker_vouches_for_may_command() {
    let mut world = World::new().await;
    let url = crate::support::broker::amqp_url();
    let user = url.split("://").nth(1).and_then(|rest| rest.split([':', '@']).next()).expect("a user");
    world.set("SENDOFF__CONTROL__ALLOWED_USERS", user);
    let worker = world.worker().await;
    world.organization("acme").await;
    // The same user, who did not say so.
    let body =
        command("smtp_config.send_test_email", "acme", json!({"to": "ann@customer.example"})).to_string();
    world
        .broker
        .publish("", &world.broker.name("control"), body.as_bytes(), BasicProperties::default())
        .await;
    let audited =
        "SELECT count(*) FROM audit WHERE command = 'smtp_config.send_test_email' AND outcome = 'not_allowed'
                   AND user_id IS NULL AND fields = '{to}'";
    eventually("the refusal is audited", async || world.database.number(audited).await == 1).await;
    assert_eq!(world.server.connections(), 0);
    let said = world.answered(serde_json::from_str(&body).expect("JSON")).await;
    assert_eq!(said["ok"], true, "{said}");
    assert_eq!(world.server.messages().len(), 1);
    worker.stop().await;
    world.end().await;
}

#[tokio::test]
async fn a_command_that_expired_while_the_worker_was_busy_is_not_carried_out() {
    let test = TestBroker::new("late", &[]).await;
    test.declare().await;
    let broker = Broker::start(test.settings(), Arc::new(|_: &str| {}));
    let (begun, gate) = (Arc::new(Mutex::new(Vec::new())), Arc::new(Semaphore::new(0)));
    let (log, wait) = (begun.clone(), gate.clone());
    broker.serve_commands(move |body, _| {
        log.lock().expect("no panic holds it").push(String::from_utf8(body).expect("UTF-8"));
        let wait = wait.clone();
        async move {
            drop(wait.acquire().await);
            Vec::new()
        }
    });
    let queue = test.name("control");
    let publish = async |body: &str, properties: BasicProperties| {
        test.publish("", &queue, body.as_bytes(), properties).await;
    };
    let seen = |body: &str| begun.lock().expect("no panic holds it").iter().filter(|b| *b == body).count();
    for _ in 0..SLOTS {
        publish("busy", BasicProperties::default()).await;
    }
    eventually("every slot is taken", async || seen("busy") == SLOTS).await;
    let brief = Duration::from_secs(3);
    let expiring =
        |limit: Duration| BasicProperties::default().with_expiration(limit.as_millis().to_string().into());
    publish("late", expiring(brief)).await;
    publish("patient", BasicProperties::default()).await;
    test.wait_count(&queue, 0).await;
    let came = Instant::now();
    eventually("its time is over", async || came.elapsed() > brief).await;
    gate.add_permits(2 * SLOTS);
    eventually("the one behind it is carried out", async || seen("patient") == 1).await;
    assert_eq!(seen("late"), 0);
    publish("timely", expiring(20 * brief)).await;
    eventually("one in time is carried out", async || seen("timely") == 1).await;
    broker.close().await;
    test.clean_up().await;
}
