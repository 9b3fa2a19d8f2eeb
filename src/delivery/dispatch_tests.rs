//! The dispatcher's promises: bounded, fair, and nothing leaks.

use futures_util::FutureExt;

use super::*;
use crate::model::policy::Feedback;

fn organization(name: &str) -> Destination {
    Destination::Organization { id: OrganizationId::parse(name).unwrap(), version: 1 }
}

fn line(organization: &str, lane: &str) -> LineKey {
    LineKey { organization: OrganizationId::parse(organization).ok(), lane: lane.into() }
}

/// Every window's ceiling.
const ONE: usize = 1;

fn dispatcher(sessions: usize) -> Dispatcher {
    Dispatcher::new(DispatchLimits { sessions })
}

async fn go(dispatcher: &Dispatcher, destination: &Destination, key: LineKey) -> Permit {
    match dispatcher.admit(destination, key, ONE).await {
        Admitted::Go(permit) => permit,
        Admitted::PutAside(delay_s) => panic!("put aside for {delay_s} s"),
    }
}

#[tokio::test]
async fn a_permit_comes_back_from_a_task_that_panics() {
    let dispatcher = dispatcher(1);
    let to = organization("acme");
    let permit = go(&dispatcher, &to, line("acme", "n")).await;
    let task = tokio::spawn(async move {
        let _held = permit;
        panic!("as a test");
    });
    assert!(task.await.is_err());
    let again = go(&dispatcher, &to, line("acme", "n")).await;
    assert_eq!(dispatcher.counts(), (0, 1));
    drop(again);
    assert_eq!(dispatcher.counts(), (0, 0));
}

type Waiting = std::pin::Pin<Box<dyn Future<Output = Admitted>>>;

fn waiting(dispatcher: &Dispatcher, to: &Destination, count: usize) -> Vec<Waiting> {
    let one = |_| {
        let (dispatcher, to) = (dispatcher.clone(), to.clone());
        let mut waiter: Waiting = Box::pin(async move { dispatcher.admit(&to, line("x", "n"), ONE).await });
        assert!(waiter.as_mut().now_or_never().is_none());
        waiter
    };
    (0..count).map(one).collect()
}

#[tokio::test(start_paused = true)]
async fn the_line_of_a_server_that_does_not_answer_becomes_short_and_others_go_on() {
    let dispatcher = dispatcher(10);
    let slow = organization("slow");
    let held = go(&dispatcher, &slow, line("slow", "n")).await;
    let (ended, mut aside) = tokio::sync::mpsc::unbounded_channel();
    for _ in 0..300 {
        let (dispatcher, slow, ended) = (dispatcher.clone(), slow.clone(), ended.clone());
        tokio::spawn(
            async move { ended.send(dispatcher.admit(&slow, line("slow", "n"), ONE).await).unwrap() },
        );
    }
    while dispatcher.counts().0 < 300 {
        tokio::task::yield_now().await;
    }
    for _ in 0..300 - SHORT_LINE {
        assert!(matches!(aside.recv().await, Some(Admitted::PutAside(_))));
    }
    assert_eq!(dispatcher.counts().0, SHORT_LINE);
    drop(go(&dispatcher, &organization("quick"), line("quick", "n")).await);
    held.finish(Outcome::Worked);
    assert!(matches!(aside.recv().await, Some(Admitted::Go(_))));
}

#[tokio::test]
async fn a_thousand_jobs_for_a_quick_server_wait_in_its_line() {
    let dispatcher = dispatcher(10);
    let quick = organization("quick");
    go(&dispatcher, &quick, line("quick", "n")).await.finish(Outcome::Worked);
    let held = go(&dispatcher, &quick, line("quick", "n")).await;
    let waiters = waiting(&dispatcher, &quick, 1000);
    assert_eq!(dispatcher.counts(), (1000, 1));
    drop(held);
    for waiter in waiters {
        assert!(matches!(waiter.await, Admitted::Go(_)));
    }
}

#[tokio::test]
async fn lines_of_one_destination_are_served_in_turn() {
    let dispatcher = dispatcher(10);
    let held = go(&dispatcher, &Destination::Platform, line("flood", "n")).await;
    let (served, mut order) = tokio::sync::mpsc::unbounded_channel();
    let mut tasks = Vec::new();
    for name in ["flood", "flood", "flood", "small"] {
        let (dispatcher, served) = (dispatcher.clone(), served.clone());
        let mut waiter = Box::pin(async move {
            let permit = go(&dispatcher, &Destination::Platform, line(name, "n")).await;
            served.send(name).unwrap();
            permit.finish(Outcome::Failed(Feedback::Narrow));
        });
        assert!(futures_util::poll!(&mut waiter).is_pending());
        tasks.push(waiter);
    }
    held.finish(Outcome::Nothing);
    futures_util::future::join_all(tasks).await;
    let order: Vec<_> = std::iter::from_fn(|| order.try_recv().ok()).collect();
    assert_eq!(order, ["flood", "small", "flood", "flood"]);
}

#[tokio::test]
async fn a_destination_that_waits_for_a_session_of_the_worker_gets_the_next_free_one() {
    let dispatcher = dispatcher(1);
    let held = go(&dispatcher, &organization("a"), line("a", "n")).await;
    let other = organization("b");
    let mut waiter = Box::pin(dispatcher.admit(&other, line("b", "n"), ONE));
    assert!(futures_util::poll!(&mut waiter).is_pending());
    drop(held);
    assert!(matches!(waiter.await, Admitted::Go(_)));
}

#[tokio::test]
async fn destinations_that_wait_for_a_session_of_the_worker_take_turns() {
    let dispatcher = dispatcher(1);
    let held = go(&dispatcher, &organization("flood"), line("flood", "n")).await;
    let (served, mut order) = tokio::sync::mpsc::unbounded_channel();
    let mut tasks = Vec::new();
    for name in ["flood", "flood", "flood", "b", "c", "b"] {
        let (dispatcher, served) = (dispatcher.clone(), served.clone());
        let mut waiter = Box::pin(async move {
            let permit = go(&dispatcher, &organization(name), line(name, "n")).await;
            served.send(name).unwrap();
            permit.finish(Outcome::Worked);
        });
        assert!(futures_util::poll!(&mut waiter).is_pending());
        tasks.push(waiter);
    }
    held.finish(Outcome::Worked);
    futures_util::future::join_all(tasks).await;
    let order: Vec<_> = std::iter::from_fn(|| order.try_recv().ok()).collect();
    assert_eq!(order, ["flood", "b", "c", "flood", "b", "flood"]);
    assert_eq!(dispatcher.counts(), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn a_full_line_makes_room_for_who_has_less_in_it() {
    let dispatcher = dispatcher(10);
    let held = go(&dispatcher, &Destination::Platform, line("flood", "n")).await;
    let wait = |name: &'static str, lane: &'static str| {
        let dispatcher = dispatcher.clone();
        Box::pin(async move { dispatcher.admit(&Destination::Platform, line(name, lane), ONE).await })
    };
    let mut flood: Vec<_> = (0..SHORT_LINE).map(|_| wait("flood", "n")).collect();
    for waiter in &mut flood {
        assert!(futures_util::poll!(waiter).is_pending());
    }
    tokio::time::advance(LINE_WAIT + LOOK_PAUSE).await;
    let mut small = wait("small", "n");
    assert!(futures_util::poll!(&mut small).is_pending(), "the other organization waits in line");
    let last = flood.pop().unwrap();
    assert!(matches!(last.await, Admitted::PutAside(_)), "the last of the flood went for it");
    assert!(matches!(wait("flood", "n").await, Admitted::PutAside(_)), "a flood makes no room for itself");
    assert_eq!(dispatcher.counts(), (SHORT_LINE, 1));
    held.finish(Outcome::Worked);
    drop((flood, small));
}

#[tokio::test(start_paused = true)]
async fn nobody_waits_longer_than_a_minute() {
    let dispatcher = dispatcher(1);
    let to = organization("a");
    let held = go(&dispatcher, &to, line("a", "n")).await;
    assert!(matches!(dispatcher.admit(&to, line("a", "n"), ONE).await, Admitted::PutAside(_)));
    drop(held);
    assert!(
        matches!(dispatcher.admit(&to, line("a", "n"), ONE).await, Admitted::Go(_)),
        "the one that left blocks nobody"
    );
}

#[tokio::test]
async fn an_open_breaker_puts_the_whole_line_aside() {
    let dispatcher = dispatcher(10);
    let to = organization("gone");
    for _ in 0..4 {
        go(&dispatcher, &to, line("gone", "n")).await.finish(Outcome::Failed(Feedback::Unreachable));
    }
    let last = go(&dispatcher, &to, line("gone", "n")).await;
    let mut waiter = Box::pin(dispatcher.admit(&to, line("gone", "n"), ONE));
    assert!(futures_util::poll!(&mut waiter).is_pending());
    last.finish(Outcome::Failed(Feedback::Unreachable));
    assert!(matches!(waiter.await, Admitted::PutAside(5)));
    assert!(matches!(dispatcher.admit(&to, line("gone", "n"), ONE).await, Admitted::PutAside(5)));
}
