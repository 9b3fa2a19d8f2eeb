//! The broker folder against a real RabbitMQ: what survives, what comes back, and what is never carried on.

mod gathering;
mod losses;
mod refusals;
mod requests;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use lapin::BasicProperties;
use lapin::types::{AMQPValue, FieldArray, FieldTable};
use sendoff::broker::{AmqpUrl, Broker, DeadLetter, Delivery, JobHeaders, Settled};
use sendoff::model::event::{Event, JobFacts, What};
use sendoff::model::failure::Reason;
use sendoff::model::ledger::Turn;
use sendoff::model::letter::Fate;
use time::macros::datetime;
use uuid::Uuid;

use crate::support::broker::{SOON, TestBroker, amqp_url};

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
            assert_eq!(delivery.ack(), Settled::Done);
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
    assert_eq!(letter.ack(), Settled::Done);
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
    assert_eq!(letter.ack(), Settled::Done);

    let again = next(&mut lane).await;
    assert_eq!((again.received().body.as_slice(), again.received().turn), (&b"job"[..], Turn(2)));
    assert_eq!(again.received().routing_key, "reminder.x");
    assert_eq!(again.ack(), Settled::Done);
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
    assert_eq!(third.ack(), Settled::Done);
    broker.close().await;
    assert_eq!(dropped.load(Ordering::SeqCst), 1);
    assert_eq!(test.count(&test.name("jobs.notifications")).await, Some(0));
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
    assert_eq!(expired.ack(), Settled::Done);

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
    assert_eq!(looped.ack(), Settled::Done);
    broker.close().await;
    test.clean_up().await;
}
