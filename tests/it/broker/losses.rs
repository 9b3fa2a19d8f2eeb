//! Connections that are cut, fall silent or are held up, and queues that are taken away.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use lapin::BasicProperties;
use sendoff::broker::{Access, AmqpUrl, Broker, PublishError, Settled};

use super::{connected, headers, next, smtp_event, start};
use crate::support::broker::{PrivateBroker, SOON, TestBroker, amqp_url, eventually};
use crate::support::proxy::Proxy;

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
            let _settled = delivery.ack();
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
    assert_eq!(held.ack(), Settled::ChannelLost);
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
    assert_eq!(again.ack(), Settled::Done);
    broker.close().await;
    test.clean_up().await;
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
    assert_eq!(held.ack(), Settled::Done);
    broker.resume_lanes();
    let mut seen = BTreeSet::new();
    while seen.len() < 39 {
        let delivery = next(&mut lane).await;
        seen.insert(delivery.received().body.clone());
        assert_eq!(delivery.ack(), Settled::Done);
    }
    test.publish_job("notification.x", b"late", BasicProperties::default()).await;
    let late = next(&mut lane).await;
    broker.stop_consuming().await;
    assert_eq!(late.ack(), Settled::Done);
    assert!(lane.next().await.is_none(), "the stream ends");
    broker.close().await;
    assert_eq!(test.count(&queue).await, Some(0));
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
    assert_eq!(next(&mut lane).await.ack(), Settled::Done);
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
        assert_eq!(delivery.ack(), Settled::Done);
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
    assert_eq!(kept.ack(), Settled::Done);
    broker.close().await;
    drop(private);
}
