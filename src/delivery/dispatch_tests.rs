//! The dispatcher's promises to the tasks that use it.
//! Guarantee: what is dropped, cancelled or panics gives back what it had, and nobody waits for ever.

use std::panic::AssertUnwindSafe;

use futures_util::FutureExt;

use super::*;
use crate::model::organization::OrganizationId;
use crate::model::policy::Feedback;
use crate::model::smtp_settings::Destination;

/// Lines that any destination may have.
const SHORT_LINE: usize = 64;

fn organization(name: &str) -> OrganizationId {
    OrganizationId::parse(name).unwrap()
}

/// A dispatcher with one lane.
fn dispatcher(sessions: usize) -> (Dispatcher, DispatchLane) {
    let dispatcher = Dispatcher::new(sessions);
    let lane = dispatcher.lane(5000);
    (dispatcher, lane)
}

/// Asks for an organization's server, which takes one at a time.
async fn admit(slot: &Slot, name: &str) -> Admitted {
    let id = organization(name);
    let destination = Destination::Organization { id: id.clone(), version: 1 };
    slot.admit(Request { destination: &destination, organization: Some(&id), bytes: 0, ceiling: 1 }).await
}

async fn go(slot: &Slot, name: &str) -> Permit {
    match admit(slot, name).await {
        Admitted::Go(permit) => permit,
        Admitted::PutAside(delay_s) => panic!("put aside for {delay_s} s"),
    }
}

#[tokio::test]
async fn a_permit_comes_back_from_a_task_that_panics() {
    let (dispatcher, lane) = dispatcher(1);
    let slot = lane.take();
    let panics = async {
        let _held = go(&slot, "acme").await;
        panic!("as a test");
    };
    assert!(AssertUnwindSafe(panics).catch_unwind().await.is_err());
    assert_eq!(dispatcher.counts(), (0, 0));
    let task = tokio::spawn(async move {
        let _held = go(&slot, "acme").await;
        panic!("as a test");
    });
    assert!(task.await.is_err());
    let slot = lane.take();
    drop(go(&slot, "acme").await);
    assert_eq!(dispatcher.counts(), (0, 0));
}

#[tokio::test]
async fn a_slot_that_is_given_up_takes_its_permit_along() {
    let (dispatcher, lane) = dispatcher(1);
    let slot = lane.take();
    let permit = go(&slot, "acme").await;
    drop(slot);
    assert_eq!(dispatcher.counts(), (0, 0));
    permit.finish(Outcome::Worked);
    assert_eq!(dispatcher.counts(), (0, 0));
}

#[tokio::test]
async fn a_request_that_is_dropped_leaves_no_waiter_behind() {
    let (dispatcher, lane) = dispatcher(1);
    let [first, second, third] = [(); 3].map(|()| lane.take());
    let held = go(&first, "acme").await;
    let mut dropped = Box::pin(admit(&second, "acme"));
    let mut stays = Box::pin(admit(&third, "acme"));
    assert!(dropped.as_mut().now_or_never().is_none() && stays.as_mut().now_or_never().is_none());
    assert_eq!(dispatcher.counts(), (2, 1));
    drop(dropped);
    assert_eq!(dispatcher.counts(), (1, 1));
    held.finish(Outcome::Worked);
    assert!(matches!(stays.await, Admitted::Go(_)));
    assert_eq!(dispatcher.counts(), (0, 0));
}

#[tokio::test]
async fn a_permit_on_its_way_to_a_request_that_is_dropped_goes_to_the_next() {
    let (dispatcher, lane) = dispatcher(1);
    let [first, second, third] = [(); 3].map(|()| lane.take());
    let held = go(&first, "acme").await;
    let mut dropped = Box::pin(admit(&second, "acme"));
    let mut stays = Box::pin(admit(&third, "acme"));
    assert!(dropped.as_mut().now_or_never().is_none() && stays.as_mut().now_or_never().is_none());
    held.finish(Outcome::Worked);
    assert_eq!(dispatcher.counts(), (1, 1), "the second one has it, and does not know yet");
    drop(dropped);
    assert_eq!(dispatcher.counts(), (0, 1));
    assert!(matches!(stays.await, Admitted::Go(_)));
}

#[tokio::test(start_paused = true)]
async fn the_line_of_a_server_that_does_not_answer_becomes_short_and_others_go_on() {
    let (dispatcher, lane) = dispatcher(10);
    let slot = lane.take();
    let held = go(&slot, "slow").await;
    let (ended, mut aside) = tokio::sync::mpsc::unbounded_channel();
    for _ in 0..300 {
        let (slot, ended) = (lane.take(), ended.clone());
        tokio::spawn(async move { ended.send(admit(&slot, "slow").await).unwrap() });
    }
    while dispatcher.counts().0 < 300 {
        tokio::task::yield_now().await;
    }
    for _ in 0..300 - SHORT_LINE {
        assert!(matches!(aside.recv().await, Some(Admitted::PutAside(_))));
    }
    assert_eq!(dispatcher.counts().0, SHORT_LINE);
    drop(go(&lane.take(), "quick").await);
    held.finish(Outcome::Worked);
    assert!(matches!(aside.recv().await, Some(Admitted::Go(_))));
}

#[tokio::test(start_paused = true)]
async fn a_thousand_jobs_for_a_quick_server_wait_in_its_line() {
    let (dispatcher, lane) = dispatcher(10);
    go(&lane.take(), "quick").await.finish(Outcome::Worked);
    let slot = lane.take();
    let held = go(&slot, "quick").await;
    let waiting = |_| {
        let slot = lane.take();
        let mut waiting = Box::pin(async move { admit(&slot, "quick").await });
        assert!(waiting.as_mut().now_or_never().is_none());
        waiting
    };
    let waiters: Vec<_> = (0..1000).map(waiting).collect();
    assert_eq!(dispatcher.counts(), (1000, 1));
    drop(held);
    for waiter in waiters {
        assert!(matches!(waiter.await, Admitted::Go(_)));
    }
}

#[tokio::test(start_paused = true)]
async fn nobody_waits_longer_than_a_minute() {
    let (dispatcher, lane) = dispatcher(1);
    let slots = [lane.take(), lane.take()];
    let held = go(&slots[0], "a").await;
    let started = Instant::now();
    assert!(matches!(admit(&slots[1], "a").await, Admitted::PutAside(_)));
    assert!(started.elapsed() <= Duration::from_secs(61));
    drop(held);
    assert_eq!(dispatcher.counts(), (0, 0), "the one that left blocks nobody");
    drop(go(&slots[1], "a").await);
}

#[tokio::test]
async fn an_open_breaker_puts_the_whole_line_aside() {
    let (_dispatcher, lane) = dispatcher(10);
    let slot = lane.take();
    for _ in 0..4 {
        go(&slot, "gone").await.finish(Outcome::Failed(Feedback::Unreachable));
    }
    let last = go(&slot, "gone").await;
    let other = lane.take();
    let mut waiter = Box::pin(admit(&other, "gone"));
    assert!(waiter.as_mut().now_or_never().is_none());
    last.finish(Outcome::Failed(Feedback::Unreachable));
    assert!(matches!(waiter.await, Admitted::PutAside(5)));
    assert!(matches!(admit(&slot, "gone").await, Admitted::PutAside(5)));
}
