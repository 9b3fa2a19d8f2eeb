//! Commands over the broker, with real workers: two at once, late ones, slow ones, strangers' ones.
//! Guarantee: what one worker does counts for all.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use lapin::BasicProperties;
use lapin::options::{BasicGetOptions, QueueBindOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable};
use sendoff::broker::{Access, AmqpUrl, Broker, BrokerSettings};
use sendoff::clock::Clock;
use sendoff::shutdown::Shutdown;
use serde_json::{Value, json};
use tokio::sync::Semaphore;

use crate::support::broker::{SOON, TestBroker, amqp_url, eventually};
use crate::support::proxy::Proxy;
use crate::support::smtp_server::{Action, Rule, SmtpServer, Stage};
use crate::support::world::{PASSWORD, USERNAME, World};

/// For longer than this no command waits in a worker.
const WAIT_MAX: Duration = Duration::from_secs(5);
/// As many as a worker carries out at once.
const SLOTS: usize = 128;

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
    worker.kill().await;
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
    static REFUSED: AtomicUsize = AtomicUsize::new(0);
    let test = TestBroker::new("late", &[]).await;
    test.declare().await;
    let broker = Broker::start(test.settings(), Arc::new(|_: &str| {}));
    let (begun, gate) = (Arc::new(Mutex::new(Vec::new())), Arc::new(Semaphore::new(0)));
    let (log, wait) = (begun.clone(), gate.clone());
    broker.serve_commands(
        Clock::system(),
        Shutdown::new(),
        |code| {
            assert_eq!(code, "unavailable");
            REFUSED.fetch_add(1, Ordering::SeqCst);
        },
        move |body, _| {
            log.lock().expect("no panic holds it").push(String::from_utf8(body).expect("UTF-8"));
            let wait = wait.clone();
            async move {
                drop(wait.acquire().await);
                Vec::new()
            }
        },
    );
    let queue = test.name("control");
    let publish = async |body: &str, properties: BasicProperties| {
        test.publish("", &queue, body.as_bytes(), properties).await;
    };
    let seen = |body: &str| begun.lock().expect("no panic holds it").iter().filter(|b| *b == body).count();
    for _ in 0..SLOTS {
        publish("busy", BasicProperties::default()).await;
    }
    eventually("every slot is taken", async || seen("busy") == SLOTS).await;
    let expiring = BasicProperties::default().with_expiration("2000".into());
    publish("late", expiring.clone()).await;
    publish("late without saying so", BasicProperties::default()).await;
    test.wait_count(&queue, 0).await;
    let came = Instant::now();
    eventually("their time is over", async || came.elapsed() > WAIT_MAX).await;
    publish("patient", BasicProperties::default()).await;
    gate.add_permits(2 * SLOTS);
    eventually("the one behind them is carried out", async || seen("patient") == 1).await;
    assert_eq!((seen("late"), seen("late without saying so")), (0, 0));

    // Its time counts from when it was sent, where it says so.
    let sent = |seconds_ago: u64| {
        let now = u64::try_from(Clock::system().now().unix_timestamp()).expect("after 1970");
        BasicProperties::default().with_expiration("60000".into()).with_timestamp(now - seconds_ago)
    };
    let channel = test.channel().await;
    let exclusive = QueueDeclareOptions { exclusive: true, ..Default::default() };
    let replies = channel.queue_declare("".into(), exclusive, FieldTable::default()).await.expect("a queue");
    publish("long on its way", sent(90).with_reply_to(replies.name().clone())).await;
    let mut refused = Value::Null;
    eventually("its sender is told", async || {
        let got = channel.basic_get(replies.name().clone(), BasicGetOptions { no_ack: true }).await;
        let got = got.expect("a queue");
        refused = got.map_or(Value::Null, |got| serde_json::from_slice(&got.data).expect("JSON"));
        !refused.is_null()
    })
    .await;
    assert_eq!(refused["error"]["code"], "unavailable", "{refused}");
    publish("timely", sent(0)).await;
    eventually("one in time is carried out", async || seen("timely") == 1).await;
    assert_eq!(seen("long on its way"), 0);
    assert_eq!(REFUSED.load(Ordering::SeqCst), 3, "each of them is counted");
    broker.close().await;
    test.clean_up().await;
}

/// A queue that takes events of one type and is full: the broker refuses each of them, though other queues have it.
async fn full_queue(world: &World, kind: &str) -> String {
    let (queue, channel) = (world.broker.name("full"), world.broker.channel().await);
    let mut arguments = FieldTable::default();
    arguments.insert("x-max-length".into(), AMQPValue::LongInt(1));
    arguments.insert("x-overflow".into(), AMQPValue::LongString("reject-publish".into()));
    let options = QueueDeclareOptions { exclusive: true, ..Default::default() };
    let declared = channel.queue_declare(queue.as_str().into(), options, arguments);
    declared.await.expect("a queue");
    world.broker.publish("", &queue, b"in the way", BasicProperties::default()).await;
    let (events, options) = (world.broker.name("events"), QueueBindOptions::default());
    let bound = channel.queue_bind(
        queue.as_str().into(),
        events.as_str().into(),
        kind.into(),
        options,
        FieldTable::default(),
    );
    bound.await.expect("the exchange of the events exists");
    queue
}

#[tokio::test]
async fn a_change_is_announced_even_if_the_worker_dies_before_the_broker_has_taken_the_event() {
    let world = World::new().await;
    let worker = world.worker().await;
    world.organization("acme").await;
    let queue = full_queue(&world, "smtp_config.updated").await;
    world.commanded("smtp_config.update", "acme", json!({"from_name": "Box office"})).await;
    // The other queue tells that it was tried.
    let tried = world.events.wait_for(|event| event["type"] == "smtp_config.updated", SOON).await;
    worker.kill().await;
    assert_eq!(world.broker.take(&queue).await.body, b"in the way");

    let worker = world.worker().await;
    let event: Value = serde_json::from_slice(&world.broker.take(&queue).await.body).expect("JSON");
    assert_eq!(event, tried, "the same event, with the time of the change");
    assert_eq!((&event["organization_id"], &event["version"]), (&json!("acme"), &json!(2)));
    let left = "SELECT count(*) FROM config_events";
    eventually("nothing is left to announce", async || world.database.number(left).await == 0).await;
    worker.stop().await;
    world.end().await;
}

#[tokio::test]
async fn a_change_is_answered_before_it_is_announced_and_announced_once_that_can_be() {
    let world = World::new().await;
    let worker = world.worker().await;
    world.organization("acme").await;
    // Announcing begins with the row's update.
    let hold = "CREATE FUNCTION hold() RETURNS trigger LANGUAGE plpgsql AS
                $$ BEGIN PERFORM pg_advisory_xact_lock(7); RETURN NEW; END $$;
                CREATE TRIGGER hold BEFORE UPDATE ON config_events FOR EACH ROW EXECUTE FUNCTION hold()";
    world.database.run(hold).await;
    let mut holder = world.database.connect().await;
    sqlx::query("SELECT pg_advisory_lock(7)").execute(&mut holder).await.expect("the lock");
    world.commanded("smtp_config.delete", "acme", json!({})).await;
    let is_it = |event: &Value| event["type"] == "smtp_config.deleted";
    assert!(!world.events.all().iter().any(is_it), "it waits, and the answer did not");
    drop(holder);
    world.events.wait_for(is_it, SOON).await;
    worker.stop().await;
    world.end().await;
}

#[tokio::test]
async fn a_command_whose_acknowledgement_never_reached_the_broker_is_carried_out_once() {
    let test = TestBroker::new("acks", &[]).await;
    test.declare().await;
    let (proxy, url) = Proxy::before(&amqp_url()).await;
    // Without heartbeats nothing but the acknowledgement is on its way to the broker.
    let url = format!("{url}{}heartbeat=0", if url.contains('?') { '&' } else { '?' });
    let access = Access::new(AmqpUrl::parse(&url).expect("an AMQP URL"));
    let broker = Broker::start(BrokerSettings { access, ..test.settings() }, Arc::new(|_: &str| {}));
    let begun = Arc::new(Mutex::new(Vec::new()));
    let log = begun.clone();
    broker.serve_commands(
        Clock::system(),
        Shutdown::new(),
        |_| {},
        move |body, _| {
            log.lock().expect("no panic holds it").push(String::from_utf8(body).expect("UTF-8"));
            std::future::ready(Vec::new())
        },
    );
    let queue = test.name("control");
    let seen = |body: &str| begun.lock().expect("no panic holds it").iter().filter(|b| *b == body).count();
    test.wait_consumers(&queue, 1).await;
    proxy.hold_back();
    test.publish("", &queue, b"once", BasicProperties::default()).await;
    eventually("the acknowledgement is held back", async || proxy.held() > 0).await;
    proxy.cut();
    test.wait_consumers(&queue, 0).await;
    proxy.forward();
    test.wait_consumers(&queue, 1).await;
    test.publish("", &queue, b"behind", BasicProperties::default()).await;
    eventually("the one behind it is carried out", async || seen("behind") == 1).await;
    assert_eq!(seen("once"), 1);
    broker.close().await;
    test.clean_up().await;
}
