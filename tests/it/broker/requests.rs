//! Commands with their replies, and a job that is followed to its outcome.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use lapin::BasicProperties;
use sendoff::broker::{
    Access, AmqpUrl, Broker, BrokerError, BrokerSettings, JobSender, RpcError, Settled, call,
};
use sendoff::clock::Clock;
use sendoff::model::event::What;
use sendoff::model::failure::Reason;
use sendoff::shutdown::Shutdown;
use tokio::sync::Notify;
use uuid::Uuid;

use super::{FIRST_AT, next, smtp_event, start, user};
use crate::support::broker::{SOON, TestBroker, access, amqp_url, eventually};
use crate::support::proxy::Proxy;

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
    assert_eq!(delivery.ack(), Settled::Done);
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
