//! Acknowledgements in multiples, and events that share a channel: nothing is lost in the crowd.

use std::collections::BTreeSet;

use futures_util::future::join_all;
use lapin::BasicProperties;
use sendoff::broker::Settled;
use sendoff::model::event::Event;
use uuid::Uuid;

use super::{next, smtp_event, start};
use crate::support::broker::{SOON, TestBroker};

const JOBS: u32 = 36;

async fn filled(name: &str) -> TestBroker {
    let test = TestBroker::new(name, &[]).await;
    test.declare().await;
    for n in 0..JOBS {
        test.publish_job("notification.x", &n.to_be_bytes(), BasicProperties::default()).await;
    }
    test
}

#[tokio::test]
async fn a_job_that_goes_back_is_not_taken_for_acknowledged_with_those_behind_it() {
    let test = filled("returning").await;
    let broker = start(&test);
    let mut lane = broker.lane("notifications").expect("a lane");
    let mut held = Vec::new();
    for _ in 0..JOBS {
        held.push(next(&mut lane).await);
    }
    // Every third goes back, among and below what is acknowledged: one by its drop.
    let back: Vec<_> =
        held.extract_if(.., |delivery| delivery.received().body[3].is_multiple_of(3)).collect();
    let mut expected: BTreeSet<_> = back.iter().map(|delivery| delivery.received().body.clone()).collect();
    let mut back = back.into_iter();
    drop(back.next());
    let requeues = join_all(back.map(sendoff::broker::Delivery::requeue));
    for delivery in held {
        assert_eq!(delivery.ack(), Settled::Done);
    }
    assert!(requeues.await.into_iter().all(|settled| settled == Settled::Done));
    while !expected.is_empty() {
        let again = next(&mut lane).await;
        assert!(again.received().redelivered);
        assert!(expected.remove(&again.received().body), "{:?} was acknowledged", again.received().body);
        assert_eq!(again.ack(), Settled::Done);
    }
    broker.close().await;
    assert_eq!(test.count(&test.name("jobs.notifications")).await, Some(0));
    test.clean_up().await;
}

#[tokio::test]
async fn what_is_acknowledged_right_before_the_close_is_not_delivered_again() {
    let test = filled("closing").await;
    let broker = start(&test);
    let mut lane = broker.lane("notifications").expect("a lane");
    let mut held = Vec::new();
    for _ in 0..JOBS {
        held.push(next(&mut lane).await);
    }
    for delivery in held.into_iter().rev() {
        assert_eq!(delivery.ack(), Settled::Done);
    }
    broker.close().await;
    let after = start(&test);
    let mut lane = after.lane("notifications").expect("a lane");
    test.publish_job("notification.x", b"the next", BasicProperties::default()).await;
    let first = next(&mut lane).await;
    assert_eq!(first.received().body, b"the next");
    assert_eq!(first.ack(), Settled::Done);
    after.close().await;
    test.clean_up().await;
}

#[tokio::test]
async fn events_announced_at_once_all_arrive() {
    let test = TestBroker::new("events", &[]).await;
    test.declare().await;
    let events = test.events().await;
    let broker = start(&test);
    let publisher = broker.publisher();
    let numbered = |n: u32| {
        let mut event: Event = smtp_event();
        event.job.as_mut().expect("facts").job_id = Uuid::from_u128(u128::from(n));
        event
    };
    let all: Vec<Event> = (0..2000).map(numbered).collect();
    let announced = join_all(all.iter().map(|event| publisher.event(event))).await;
    assert!(announced.iter().all(Result::is_ok));
    for n in [0, 999, 1999] {
        let id = Uuid::from_u128(n).to_string();
        events.wait_for(|event| event["job_id"] == id.as_str(), SOON).await;
    }
    broker.close().await;
    test.clean_up().await;
}
