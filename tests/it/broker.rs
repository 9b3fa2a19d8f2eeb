//! The broker folder against a real RabbitMQ: what survives, what comes back, and what is never carried on.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use lapin::BasicProperties;
use lapin::options::QueueDeclareOptions;
use lapin::types::{AMQPValue, FieldArray, FieldTable};
use sendoff::broker::{
    Access, AmqpUrl, Broker, BrokerError, BrokerSettings, DeadLetter, Delivery, JobHeaders, JobSender,
    PublishError, RpcError, Settled, Standing, call, inspect,
};
use sendoff::clock::Clock;
use sendoff::model::event::{Event, JobFacts, What};
use sendoff::model::failure::Reason;
use sendoff::model::ledger::Turn;
use sendoff::model::letter::Fate;
use sendoff::shutdown::Shutdown;
use time::macros::datetime;
use tokio::sync::Notify;
use uuid::Uuid;

use super::support::broker::{PrivateBroker, SOON, TestBroker, access, amqp_url, eventually};
use super::support::proxy::{Proxy, tls_in_front_of};

const FIRST_AT: time::OffsetDateTime = datetime!(2026-11-22 20:00 UTC);

fn headers(attempt: u32, turn: i32) -> JobHeaders {
    JobHeaders { attempt, first_at: FIRST_AT, turn: Turn(turn), faults: 0 }
}

fn start(broker: &TestBroker) -> Broker {
    Broker::start(broker.settings(), Arc::new(|_: &str| {}))
}

async fn connected(broker: &Broker) {
    let mut state = broker.state();
    let waiting = state.wait_for(sendoff::broker::BrokerState::is_connected);
    tokio::time::timeout(SOON, waiting).await.expect("connects in time").expect("the broker lives");
}

async fn next(deliveries: &mut sendoff::broker::Deliveries) -> Delivery {
    tokio::time::timeout(SOON, deliveries.next())
        .await
        .expect("a delivery in time")
        .expect("consuming goes on")
}

fn hostile_properties(prefix: &str) -> BasicProperties {
    let mut death = FieldTable::default();
    for (name, value) in [
        ("queue", format!("{prefix}.retry.notifications.1")),
        ("reason", "expired".to_owned()),
        ("exchange", String::new()),
    ] {
        death.insert(name.into(), AMQPValue::LongString(value.into()));
    }
    death.insert("count".into(), AMQPValue::LongLongInt(1));
    // A second entry for the lane itself: a cycle, if the broker believed it.
    let mut lane = death.clone();
    lane.insert("queue".into(), AMQPValue::LongString(format!("{prefix}.jobs.notifications").into()));
    let deaths = FieldArray::from(vec![AMQPValue::FieldTable(death), AMQPValue::FieldTable(lane)]);
    let mut headers = FieldTable::default();
    headers.insert("x-death".into(), AMQPValue::FieldArray(deaths));
    headers.insert("x-first-death-queue".into(), AMQPValue::LongString("nowhere".into()));
    headers.insert("sendoff-turn".into(), AMQPValue::LongString("not a number".into()));
    headers.insert("sendoff-note".into(), AMQPValue::LongString("kept".into()));
    headers.insert(
        "traceparent".into(),
        AMQPValue::LongString("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".into()),
    );
    BasicProperties::default()
        .with_headers(headers)
        .with_content_type("application/json".into())
        .with_message_id("m-1".into())
        .with_correlation_id("c-1".into())
        .with_timestamp(1_760_000_000)
        .with_expiration("86400000".into())
        .with_user_id(AmqpUrl::parse(&amqp_url()).map(|_| user()).expect("a URL").into())
        .with_priority(3)
}

/// The user name in the URL under test: the broker refuses any other as `user_id`.
fn user() -> String {
    let url = amqp_url();
    let authority = url.split("://").nth(1).expect("a scheme");
    authority.split([':', '@']).next().expect("a user").to_owned()
}

#[tokio::test]
async fn sixty_jobs_with_forged_deaths_all_return_from_the_delay_queue() {
    let test = TestBroker::new("hostile", &[1]).await;
    test.declare().await;
    for n in 0..60 {
        let body = n.to_string();
        test.publish_job("notification.x", body.as_bytes(), hostile_properties(&test.prefix)).await;
    }
    let broker = start(&test);
    let mut lane = broker.lane("notifications").expect("a lane of the settings");
    let mut returned = BTreeSet::new();
    while returned.len() < 60 {
        let delivery = next(&mut lane).await;
        if delivery.received().attempt == 0 {
            let handed = delivery.retry(&broker.publisher(), "notifications", 1, headers(1, 1)).await;
            assert_eq!(handed.expect("handed over"), Settled::Done);
        } else {
            assert_eq!(delivery.received().routing_key, "notification.x");
            assert_eq!(delivery.received().turn, Turn(1));
            assert_eq!(delivery.received().first_at, Some(FIRST_AT));
            returned.insert(delivery.received().body.clone());
            assert_eq!(delivery.ack().await, Settled::Done);
        }
    }
    broker.close().await;
    test.wait_count(&test.name("jobs.notifications"), 0).await;
    test.clean_up().await;
}

#[tokio::test]
async fn a_retried_job_carries_on_nothing_but_what_the_contract_names() {
    let test = TestBroker::new("hygiene", &[3600]).await;
    test.declare().await;
    let cc = AMQPValue::FieldArray(FieldArray::from(vec![AMQPValue::LongString("notification.cc".into())]));
    let properties = hostile_properties(&test.prefix);
    let mut with_cc = properties.headers().clone().expect("headers");
    with_cc.insert("CC".into(), cc);
    test.publish_job("notification.x", b"body \x00\xff", properties.with_headers(with_cc)).await;
    let broker = start(&test);
    let mut lane = broker.lane("notifications").expect("a lane");
    let delivery = next(&mut lane).await;
    assert_eq!(delivery.received().published_at().map(|at| at.unix_timestamp()), Some(1_760_000_000));
    let handed = delivery.retry(&broker.publisher(), "notifications", 3600, headers(1, 1)).await;
    assert_eq!(handed.expect("handed over"), Settled::Done);
    let copy = test.take(&test.name("retry.notifications.3600")).await;
    assert_eq!(copy.body, b"body \x00\xff");
    assert_eq!((copy.exchange.as_str(), &copy.routing_key), ("", &test.name("retry.notifications.3600")));
    // The broker's own count of hand-outs is no part of what was published.
    let names: Vec<String> =
        copy.header_names().into_iter().filter(|name| name != "x-delivery-count").collect();
    assert_eq!(
        names,
        [
            "sendoff-attempt",
            "sendoff-first-at",
            "sendoff-lane",
            "sendoff-note",
            "sendoff-routing-key",
            "sendoff-turn",
            "traceparent"
        ]
    );
    assert_eq!(copy.text("sendoff-first-at").as_deref(), Some("2026-11-22T20:00:00Z"));
    assert_eq!(copy.text("sendoff-routing-key").as_deref(), Some("notification.x"));
    let expected = BasicProperties::default()
        .with_headers(copy.properties.headers().clone().expect("headers"))
        .with_content_type("application/json".into())
        .with_message_id("m-1".into())
        .with_correlation_id("c-1".into())
        .with_timestamp(1_760_000_000)
        .with_delivery_mode(2);
    assert_eq!(copy.properties, expected);
    broker.close().await;
    test.clean_up().await;
}

#[tokio::test]
async fn a_job_that_no_lane_takes_is_a_dead_letter_and_says_so() {
    let test = TestBroker::new("unrouted", &[]).await;
    test.declare().await;
    test.publish_job("newsletter.weekly", b"{}", BasicProperties::default()).await;
    let broker = start(&test);
    let mut dead = broker.dead_letters(10);
    let letter = next(&mut dead).await;
    let death = letter.received().death.clone().expect("a dead letter has a death");
    assert_eq!(death.reason, Reason::Unroutable);
    assert_eq!(letter.received().routing_key, "newsletter.weekly");
    assert_eq!(letter.received().lane, None);
    assert_eq!(letter.ack().await, Settled::Done);
    broker.close().await;
    test.clean_up().await;
}

#[tokio::test]
async fn a_dead_letter_bears_its_reason_and_comes_back_when_released() {
    let test = TestBroker::new("dead", &[]).await;
    test.declare().await;
    test.publish_job("reminder.x", b"job", BasicProperties::default()).await;
    let broker = start(&test);
    let publisher = broker.publisher();
    let (mut lane, mut dead) = (broker.lane("reminders").expect("a lane"), broker.dead_letters(10));
    let recipients = Some(&[0, 2][..]);
    let death = DeadLetter {
        reason: Reason::AuthFailed,
        detail: "535\r\nno",
        died_at: FIRST_AT,
        recipients,
        fate: Fate::Parked,
    };
    let delivery = next(&mut lane).await;
    let handed = delivery.dead_letter(&publisher, "reminders", headers(2, 1), death).await;
    assert_eq!(handed.expect("handed over"), Settled::Done);

    let letter = next(&mut dead).await;
    let received = letter.received().clone();
    let died = received.death.clone().expect("a death");
    assert_eq!(
        (died.reason, died.detail.as_deref(), died.died_at, died.fate),
        (Reason::AuthFailed, Some("535 no"), Some(FIRST_AT), Fate::Parked)
    );
    assert_eq!((received.lane.as_deref(), received.routing_key.as_str()), (Some("reminders"), "reminder.x"));
    assert_eq!(received.recipients, Some(vec![0, 2]));
    publisher.release(&received, "reminders", headers(2, 2)).await.expect("released");
    assert_eq!(letter.ack().await, Settled::Done);

    let again = next(&mut lane).await;
    assert_eq!((again.received().body.as_slice(), again.received().turn), (&b"job"[..], Turn(2)));
    assert_eq!(again.received().routing_key, "reminder.x");
    assert_eq!(again.ack().await, Settled::Done);
    broker.close().await;
    test.clean_up().await;
}

#[tokio::test]
async fn a_delivery_is_settled_once_and_a_dropped_one_goes_back_and_is_counted() {
    let test = TestBroker::new("settle", &[]).await;
    test.declare().await;
    test.publish_job("notification.x", b"job", BasicProperties::default()).await;
    let dropped = Arc::new(AtomicUsize::new(0));
    let counter = dropped.clone();
    let broker = Broker::start(
        test.settings(),
        Arc::new(move |lane: &str| {
            assert_eq!(lane, "notifications");
            counter.fetch_add(1, Ordering::SeqCst);
        }),
    );
    let mut lane = broker.lane("notifications").expect("a lane");
    drop(next(&mut lane).await);
    assert_eq!(dropped.load(Ordering::SeqCst), 1);
    let again = next(&mut lane).await;
    assert!(again.received().redelivered);
    assert_eq!(again.requeue().await, Settled::Done);
    let third = next(&mut lane).await;
    assert_eq!(third.ack().await, Settled::Done);
    broker.close().await;
    assert_eq!(dropped.load(Ordering::SeqCst), 1);
    assert_eq!(test.count(&test.name("jobs.notifications")).await, Some(0));
    test.clean_up().await;
}

/// A worker's settings over a proxy.
async fn over_proxy(test: &TestBroker) -> (Proxy, sendoff::broker::BrokerSettings) {
    let url = AmqpUrl::parse(&amqp_url()).expect("a URL");
    let proxy = Proxy::start(url.server().parse().expect("an address")).await;
    let through = amqp_url().replace(&url.server(), &proxy.address().to_string());
    let mut settings = test.settings();
    settings.access = Access::new(AmqpUrl::parse(&through).expect("a URL"));
    (proxy, settings)
}

#[tokio::test]
async fn nothing_is_lost_when_the_connection_is_cut_again_and_again() {
    const JOBS: usize = 300;
    let test = TestBroker::new("cut", &[1]).await;
    test.declare().await;
    let (proxy, settings) = over_proxy(&test).await;
    let broker = Broker::start(settings, Arc::new(|_: &str| {}));
    let publisher = broker.publisher();
    let mut lane = broker.lane("notifications").expect("a lane");
    for n in 0..JOBS {
        test.publish_job("notification.x", n.to_string().as_bytes(), BasicProperties::default()).await;
    }
    let (mut done, mut handled) = (BTreeSet::new(), 0);
    while done.len() < JOBS {
        let delivery = next(&mut lane).await;
        handled += 1;
        if handled % 100 == 50 && handled < 400 {
            proxy.cut();
        }
        let body = delivery.received().body.clone();
        if delivery.received().attempt == 0 {
            // A lost confirm leaves the delivery open or lost with its channel: it comes again either way.
            if let Err(failed) = delivery.retry(&publisher, "notifications", 1, headers(1, 1)).await {
                let _settled = failed.delivery.requeue().await;
            }
        } else {
            done.insert(body);
            let _settled = delivery.ack().await;
        }
    }
    assert!(proxy.accepted() >= 4, "{} connections", proxy.accepted());
    broker.close().await;
    test.clean_up().await;
}

#[tokio::test]
async fn a_worker_starts_before_the_broker_and_resumes_after_it_was_away() {
    let test = TestBroker::new("away", &[]).await;
    let (proxy, settings) = over_proxy(&test).await;
    proxy.refuse();
    let broker = Broker::start(settings, Arc::new(|_: &str| {}));
    let mut lane = broker.lane("notifications").expect("a lane");
    let mut state = broker.state();
    let refused = state.wait_for(|state| state.reason().is_some_and(|why| why.contains("cannot be reached")));
    tokio::time::timeout(SOON, refused).await.expect("in time").expect("the broker lives");

    proxy.forward();
    connected(&broker).await;
    test.publish_job("notification.1", b"1", BasicProperties::default()).await;
    let held = next(&mut lane).await;
    proxy.refuse();
    let mut state = broker.state();
    let lost = state.wait_for(|state| state.consuming.is_some() && state.publishing.is_some());
    tokio::time::timeout(SOON, lost).await.expect("noticed in time").expect("the broker lives");
    // What was held is the broker's again, and settling it says so.
    eventually("the delivery is known to be lost", async || !held.is_open()).await;
    assert_eq!(held.ack().await, Settled::ChannelLost);
    let unavailable = broker.publisher().with_patience(Duration::from_millis(200));
    let event = smtp_event();
    let error = unavailable.event(&event).await.expect_err("nobody to publish to");
    assert!(matches!(error, PublishError::Unavailable { .. }) && error.is_certain(), "{error}");

    // A patient publish waits for the connection's return.
    let patient = broker.publisher().with_patience(SOON);
    let waiting = tokio::spawn(async move { patient.event(&smtp_event()).await });
    proxy.forward();
    waiting.await.expect("no panic").expect("published after the return");
    let again = next(&mut lane).await;
    assert!(again.received().redelivered);
    assert_eq!(again.ack().await, Settled::Done);
    broker.close().await;
    test.clean_up().await;
}

fn smtp_event() -> Event {
    Event {
        at: FIRST_AT,
        organization_id: None,
        job: Some(JobFacts { job_id: Uuid::from_u128(7), kind: Some("k".to_owned()), group: None }),
        what: What::Dead { reason: Reason::Malformed },
    }
}

#[tokio::test]
async fn a_broker_that_falls_silent_is_given_up_and_found_again() {
    let test = TestBroker::new("silent", &[]).await;
    test.declare().await;
    let (proxy, mut settings) = over_proxy(&test).await;
    let through = amqp_url()
        .replace(&AmqpUrl::parse(&amqp_url()).expect("a URL").server(), &proxy.address().to_string());
    let impatient = format!("{through}?heartbeat=1&connection_timeout=2000");
    settings.access = Access::new(AmqpUrl::parse(&impatient).expect("a URL"));
    let broker = Broker::start(settings, Arc::new(|_: &str| {}));
    connected(&broker).await;
    proxy.stall();
    let mut state = broker.state();
    let noticed = state.wait_for(|state| !state.is_connected());
    tokio::time::timeout(SOON, noticed).await.expect("noticed in time").expect("the broker lives");
    // New connections find the silence too, and are given up within their limit.
    let timed_out =
        state.wait_for(|state| state.reason().is_some_and(|why| why.contains("no answer within 2000 ms")));
    tokio::time::timeout(SOON, timed_out).await.expect("in time").expect("the broker lives");
    proxy.forward();
    connected(&broker).await;
    broker.close().await;
    test.clean_up().await;
}

#[tokio::test]
async fn paused_lanes_hand_their_jobs_back_and_resume() {
    let test = TestBroker::new("pause", &[]).await;
    test.declare().await;
    let queue = test.name("jobs.notifications");
    for n in 0..40 {
        test.publish_job("notification.x", n.to_string().as_bytes(), BasicProperties::default()).await;
    }
    let broker = start(&test);
    let mut lane = broker.lane("notifications").expect("a lane");
    let held = next(&mut lane).await;
    test.wait_count(&queue, 0).await;
    broker.pause_lanes();
    // One is held here and one may wait in the stream: these stay ours, and can be settled while the lane is paused.
    eventually("the others are back", async || matches!(test.count(&queue).await, Some(38 | 39))).await;
    assert_eq!(held.ack().await, Settled::Done);
    broker.resume_lanes();
    let mut seen = BTreeSet::new();
    while seen.len() < 39 {
        let delivery = next(&mut lane).await;
        seen.insert(delivery.received().body.clone());
        assert_eq!(delivery.ack().await, Settled::Done);
    }
    test.publish_job("notification.x", b"late", BasicProperties::default()).await;
    let late = next(&mut lane).await;
    broker.stop_consuming().await;
    assert_eq!(late.ack().await, Settled::Done);
    assert!(lane.next().await.is_none(), "the stream ends");
    broker.close().await;
    assert_eq!(test.count(&queue).await, Some(0));
    test.clean_up().await;
}

#[tokio::test]
async fn a_queue_with_other_settings_is_named_with_what_to_do() {
    let test = TestBroker::new("conflict", &[5]).await;
    let queue = test.name("retry.reminders.5");
    let channel = test.channel().await;
    let options = QueueDeclareOptions { durable: true, ..Default::default() };
    channel.queue_declare(queue.as_str().into(), options, FieldTable::default()).await.expect("declared");
    let error = test.topology().declare(&access(), &[]).await.expect_err("a conflict");
    assert!(matches!(&error, BrokerError::Conflict { object, .. } if object.contains(&queue)), "{error}");
    assert!(error.to_string().contains("delete it and run `sendoff topology declare`"), "{error}");
    let findings = inspect(&access(), test.topology()).await.expect("reachable");
    let named = |finding: &sendoff::broker::Finding| matches!(&finding.standing, Standing::Bad(why) if why.contains(&queue));
    assert!(findings.iter().any(named), "{findings:?}");
    test.clean_up().await;
}

#[tokio::test]
async fn the_check_names_what_is_missing_and_creates_nothing() {
    let test = TestBroker::new("check", &[5]).await;
    let findings = inspect(&access(), test.topology()).await.expect("reachable");
    let bad = findings.iter().filter(|finding| matches!(finding.standing, Standing::Bad(_))).count();
    assert_eq!(bad, test.topology().queues.len() + test.topology().exchanges.len(), "{findings:?}");
    assert_eq!(test.count(&test.name("dead")).await, None);
    test.declare().await;
    let findings = inspect(&access(), test.topology()).await.expect("reachable");
    assert!(!findings.iter().any(|finding| matches!(finding.standing, Standing::Bad(_))), "{findings:?}");
    assert!(
        matches!(&findings[0].standing, Standing::Good(seen) if seen.contains("is RabbitMQ 3.")),
        "{findings:?}"
    );
    test.clean_up().await;
}

#[tokio::test]
async fn a_binding_that_is_no_longer_listed_is_unbound() {
    let test = TestBroker::new("unbind", &[]).await;
    test.declare().await;
    let mut settings = test.settings();
    let previous = settings.topology().lane_bindings();
    settings.lanes[0].bindings = vec!["notification.urgent.#".to_owned()];
    settings.topology().declare(&access(), &previous).await.expect("declared");
    test.publish_job("notification.slow", b"{}", BasicProperties::default()).await;
    test.publish_job("notification.urgent.x", b"{}", BasicProperties::default()).await;
    test.wait_count(&test.name("dead"), 1).await;
    test.wait_count(&test.name("jobs.notifications"), 1).await;
    let gone = [("never-there".to_owned(), "x.#".to_owned())];
    settings.topology().declare(&access(), &gone).await.expect("a lane that is gone needs no unbinding");
    test.clean_up().await;
}

#[tokio::test]
async fn refusals_of_the_broker_are_told_apart_and_never_show_the_password() {
    let server = AmqpUrl::parse(&amqp_url()).expect("a URL").server();
    let test = TestBroker::new("refusals", &[]).await;
    let try_url = async |url: String| {
        let access = Access::new(AmqpUrl::parse(&url).expect("a URL"));
        test.topology().declare(&access, &[]).await.expect_err("refused")
    };
    let credentials = try_url(format!("amqp://nobody:s3cret@{server}/%2f")).await;
    assert!(matches!(credentials, BrokerError::CredentialsRefused { .. }), "{credentials}");
    let (scheme, rest) =
        amqp_url().split_once("://").map(|(s, r)| (s.to_owned(), r.to_owned())).expect("a URL");
    let user = rest.split('@').next().expect("a user").to_owned();
    let vhost = try_url(format!("{scheme}://{user}@{server}/not-there")).await;
    assert!(matches!(vhost, BrokerError::VirtualHost { .. }), "{vhost}");
    // No program is given this port that asks for any port.
    let nobody = try_url("amqp://u:s3cret@127.0.0.1:1/%2f".to_owned()).await;
    assert!(matches!(nobody, BrokerError::Unreachable { .. }) && nobody.is_unreachable(), "{nobody}");
    for error in [credentials, vhost, nobody] {
        assert!(!format!("{error} {error:?}").contains("s3cret"), "{error:?}");
    }
    test.clean_up().await;
}

#[tokio::test]
async fn tls_needs_an_authority_that_is_trusted() {
    let test = TestBroker::new("tls", &[]).await;
    let server = AmqpUrl::parse(&amqp_url()).expect("a URL").server();
    let (address, authority) = tls_in_front_of(server.parse().expect("an address")).await;
    let through =
        amqp_url().replace("amqp://", "amqps://").replace(&server, &format!("localhost:{}", address.port()));
    let access = Access::new(AmqpUrl::parse(&through).expect("a URL"));
    let error = test.topology().declare(&access, &[]).await.expect_err("an unknown authority");
    assert!(matches!(error, BrokerError::Tls { .. }), "{error}");
    let trusting = access.trust(&authority).expect("a certificate");
    test.topology().declare(&trusting, &[]).await.expect("trusted");
    let findings = inspect(&trusting, test.topology()).await.expect("reachable");
    assert!(
        matches!(&findings[0].standing, Standing::Good(seen) if seen.contains("is RabbitMQ")),
        "{findings:?}"
    );
    test.clean_up().await;
}

#[tokio::test]
async fn what_the_broker_itself_kills_is_a_dead_letter_with_the_brokers_reason() {
    let test = TestBroker::new("killed", &[]).await;
    test.declare().await;
    let broker = start(&test);
    let mut dead = broker.dead_letters(10);
    let mut properties = hostile_properties(&test.prefix);
    properties = properties.with_expiration("1".into());
    let mut forged = properties.headers().clone().expect("headers");
    forged.insert("sendoff-reason".into(), AMQPValue::LongString("auth_failed".into()));
    test.publish_job("reminder.x", b"expires", properties.with_headers(forged)).await;
    let expired = next(&mut dead).await;
    assert_eq!(expired.received().death.as_ref().map(|death| death.reason), Some(Reason::Expired));
    assert_eq!(expired.received().lane.as_deref(), Some("reminders"));
    assert_eq!(expired.ack().await, Settled::Done);

    let mut lane = broker.lane("notifications").expect("a lane");
    test.publish_job("notification.x", b"loops", BasicProperties::default()).await;
    let requeues = async {
        loop {
            let _settled = next(&mut lane).await.requeue().await;
        }
    };
    let looped = tokio::select! {
        letter = next(&mut dead) => letter,
        () = requeues => unreachable!("it never ends"),
    };
    let death = looped.received().death.clone().expect("a death");
    assert_eq!(death.reason, Reason::CrashLoop);
    assert!(death.died_at.is_some());
    assert_eq!(looped.received().lane.as_deref(), Some("notifications"));
    assert_eq!(looped.received().routing_key, "notification.x");
    assert_eq!(looped.ack().await, Settled::Done);
    broker.close().await;
    test.clean_up().await;
}

#[tokio::test]
async fn a_command_gets_its_reply_and_one_without_reply_address_is_carried_out() {
    let test = TestBroker::new("rpc", &[]).await;
    test.declare().await;
    let broker = start(&test);
    let carried_out = Arc::new(AtomicUsize::new(0));
    let counter = carried_out.clone();
    broker.serve_commands(
        Clock::system(),
        Shutdown::new(),
        |_| {},
        move |body, meta| {
            let counter = counter.clone();
            async move {
                counter.fetch_add(1, Ordering::SeqCst);
                assert!(body != b"panic", "as asked");
                let user = meta.user_id.unwrap_or_default();
                serde_json::to_vec(
                    &serde_json::json!({"ok": true, "result": [String::from_utf8_lossy(&body), user]}),
                )
                .expect("JSON")
            }
        },
    );
    let now = Clock::system().now();
    let ask = async |body: &[u8]| call(&access(), &test.prefix, body, now, SOON).await.expect("a reply");
    let reply: serde_json::Value = serde_json::from_slice(&ask(b"ping").await).expect("JSON");
    assert_eq!(reply, serde_json::json!({"ok": true, "result": ["ping", user()]}));
    let broken: serde_json::Value = serde_json::from_slice(&ask(b"panic").await).expect("JSON");
    assert_eq!(broken["error"]["code"], "internal");

    let control = test.name("control");
    test.publish("", &control, b"quiet", BasicProperties::default()).await;
    let ours = BasicProperties::default().with_reply_to(control.as_str().into());
    test.publish("", &control, b"looping", ours).await;
    let garbage = BasicProperties::default().with_reply_to("amq.rabbitmq.reply-to.garbage".into());
    test.publish("", &control, b"garbage", garbage).await;
    eventually("all are carried out", async || carried_out.load(Ordering::SeqCst) == 5).await;
    let reply: serde_json::Value = serde_json::from_slice(&ask(b"still there").await).expect("JSON");
    assert_eq!(reply["ok"], true);
    assert_eq!(carried_out.load(Ordering::SeqCst), 6, "no reply came back as a command");
    broker.close().await;

    test.wait_consumers(&control, 0).await;
    let (to, prefix) = (access(), test.prefix.clone());
    let waiting = tokio::spawn(async move { call(&to, &prefix, b"secret", FIRST_AT, SOON).await });
    let command = test.take(&control).await;
    assert_eq!(command.properties.delivery_mode(), &Some(1), "it is not for the broker's disk");
    assert_eq!(command.properties.timestamp(), &u64::try_from(FIRST_AT.unix_timestamp()).ok());
    waiting.abort();
    // On a busy machine even the connection may take longer.
    eventually("nobody is there who could reply", async || {
        let nobody = call(&access(), &test.prefix, b"ping", now, Duration::from_millis(300)).await;
        matches!(nobody.expect_err("nobody"), RpcError::Timeout { consumers: 0, .. })
    })
    .await;
    let missing = call(&access(), "no-such-prefix", b"ping", now, SOON).await.expect_err("no queue");
    assert!(matches!(missing, RpcError::Broker(BrokerError::Missing { .. })), "{missing}");
    test.clean_up().await;
}

#[tokio::test]
async fn a_reply_that_the_broker_does_not_take_holds_up_no_stop() {
    let test = TestBroker::new("mute", &[]).await;
    test.declare().await;
    let (proxy, url) = Proxy::before(&amqp_url()).await;
    let access = Access::new(AmqpUrl::parse(&url).expect("an AMQP URL"));
    let broker = Broker::start(BrokerSettings { access, ..test.settings() }, Arc::new(|_: &str| {}));
    let (shutdown, begun, go_on) = (Shutdown::new(), Arc::new(Notify::new()), Arc::new(Notify::new()));
    let (told, wait) = (begun.clone(), go_on.clone());
    let serving = broker.serve_commands(
        Clock::system(),
        shutdown.clone(),
        |_| {},
        move |_, _| {
            let (told, wait) = (told.clone(), wait.clone());
            async move {
                told.notify_one();
                wait.notified().await;
                b"{}".to_vec()
            }
        },
    );
    let replied = BasicProperties::default().with_reply_to("somebody.waits".into());
    test.publish("", &test.name("control"), b"ping", replied).await;
    begun.notified().await;
    proxy.stall();
    go_on.notify_one();
    shutdown.stop();
    let stopped = Instant::now();
    broker.stop_consuming().await;
    serving.await.expect("no panic");
    // The publisher itself would wait for half a minute.
    assert!(stopped.elapsed() < Duration::from_secs(20), "{:?}", stopped.elapsed());
    test.clean_up().await;
}

#[tokio::test]
async fn a_published_job_can_be_followed_to_its_outcome() {
    let test = TestBroker::new("follow", &[]).await;
    let early = JobSender::connect(&access(), &test.prefix).await.expect("connected");
    let undeclared = early
        .publish("notification.x", Uuid::from_u128(7), FIRST_AT, b"{}")
        .await
        .expect_err("nothing there");
    assert!(matches!(undeclared, RpcError::Broker(BrokerError::Missing { .. })), "{undeclared}");
    early.close().await;

    test.declare().await;
    let events = test.events().await;
    let broker = start(&test);
    let mut lane = broker.lane("notifications").expect("a lane");
    let sender = JobSender::connect(&access(), &test.prefix).await.expect("connected");
    let mut follower = sender.follow(Uuid::from_u128(7)).await.expect("listening");
    sender.publish("notification.x", Uuid::from_u128(7), FIRST_AT, b"{}").await.expect("published");
    let delivery = next(&mut lane).await;
    assert_eq!(delivery.received().published_at(), Some(FIRST_AT));
    assert_eq!(delivery.ack().await, Settled::Done);
    let mut deferred = smtp_event();
    deferred.what = What::Deferred { reason: Reason::Throttled, next_attempt_at: FIRST_AT };
    let mut other = smtp_event();
    other.job.as_mut().expect("facts").job_id = Uuid::from_u128(8);
    for event in [&other, &deferred, &smtp_event()] {
        broker.publisher().event(event).await.expect("announced");
    }
    let first = follower.next().await.expect("an event");
    assert_eq!((first.event["type"].as_str(), first.is_outcome), (Some("email.deferred"), false));
    let second = follower.next().await.expect("an event");
    assert_eq!((second.event["type"].as_str(), second.is_outcome), (Some("email.dead"), true));
    let seen = events.wait_for(|event| event["type"] == "email.dead", SOON).await;
    assert_eq!(seen["reason"], "malformed");
    sender.close().await;
    broker.close().await;
    test.clean_up().await;
}

#[tokio::test]
async fn of_many_publishes_at_once_exactly_those_without_a_queue_fail() {
    let test = TestBroker::new("mandatory", &[600]).await;
    test.declare().await;
    test.publish_job("notification.x", b"job", BasicProperties::default()).await;
    let broker = start(&test);
    let mut lane = broker.lane("notifications").expect("a lane");
    let delivery = next(&mut lane).await;
    let (job, publisher) = (delivery.received().clone(), broker.publisher());
    let publishes = (0..400).map(|n| {
        let (job, publisher) = (&job, &publisher);
        // Every seventh goes to a delay that has no queue.
        let delay_s = if n % 7 == 0 { 601 } else { 600 };
        async move { (delay_s, publisher.retry(job, "notifications", delay_s, headers(1, 1)).await) }
    });
    for (delay_s, outcome) in futures_util::future::join_all(publishes).await {
        match outcome {
            Ok(()) => assert_eq!(delay_s, 600),
            Err(error) => {
                assert_eq!(delay_s, 601);
                assert!(matches!(error, PublishError::Unroutable { .. }) && error.is_certain(), "{error}");
            }
        }
    }
    test.wait_count(&test.name("retry.notifications.600"), 342).await;
    let copies = test.drain(&test.name("retry.notifications.600")).await;
    assert!(copies.iter().all(|copy| copy.body == b"job"));
    assert_eq!(delivery.ack().await, Settled::Done);
    broker.close().await;
    test.clean_up().await;
}

#[tokio::test]
async fn a_lane_whose_queue_was_deleted_is_declared_again() {
    let test = TestBroker::new("deleted", &[]).await;
    test.declare().await;
    let broker = start(&test);
    let mut lane = broker.lane("notifications").expect("a lane");
    let channel = test.channel().await;
    let queue = test.name("jobs.notifications");
    test.wait_consumers(&queue, 1).await;
    // Or the other connection, still declaring, makes the queue anew and binds it after it is consumed again.
    connected(&broker).await;
    channel.queue_delete(queue.as_str().into(), Default::default()).await.expect("deleted");
    test.wait_consumers(&queue, 1).await;
    test.publish_job("notification.x", b"job", BasicProperties::default()).await;
    assert_eq!(next(&mut lane).await.ack().await, Settled::Done);
    broker.close().await;
    test.clean_up().await;
}

#[tokio::test]
async fn a_resource_alarm_stops_publishes_but_no_acknowledgement_and_a_killed_broker_loses_nothing() {
    let private = PrivateBroker::start().await;
    let test = TestBroker::on(private.url(), "alarm", &[]).await;
    test.declare().await;
    for _ in 0..20 {
        test.publish_job("notification.x", b"job", BasicProperties::default()).await;
    }
    test.publish_job("reminder.x", b"kept", BasicProperties::default().with_delivery_mode(2)).await;
    let broker = start(&test);
    let (mut lane, mut held) = (broker.lane("notifications").expect("a lane"), Vec::new());
    for _ in 0..20 {
        held.push(next(&mut lane).await);
    }
    private.ctl("set_vm_memory_high_watermark 0.000001").await;
    let impatient = broker.publisher().with_patience(Duration::from_millis(300));
    eventually("publishes are held up", async || {
        // The broker blocks a connection at its first publish: that one is lost, those behind it are not even sent.
        matches!(impatient.event(&smtp_event()).await, Err(PublishError::Unavailable { .. }))
    })
    .await;
    for delivery in held {
        assert_eq!(delivery.ack().await, Settled::Done);
    }
    private.ctl("set_vm_memory_high_watermark 0.4").await;
    broker.publisher().event(&smtp_event()).await.expect("published again");

    private.kill().await;
    let lost = broker.state().wait_for(|state| !state.is_connected()).await.map(|state| state.clone());
    assert!(lost.expect("the broker lives").reason().is_some());
    private.start_again().await;
    let mut reminders = broker.lane("reminders").expect("a lane");
    let kept = next(&mut reminders).await;
    assert_eq!(kept.received().body, b"kept");
    assert_eq!(kept.ack().await, Settled::Done);
    broker.close().await;
    drop(private);
}
