//! What a worker has of an account: no token twice, none after its time, nothing without a lease.

use proptest::prelude::*;

use super::*;
use crate::model::provider::{Counted, Overrides};

fn limits(max_connections: Option<u32>, messages_per_minute: Option<u32>) -> Limits {
    Limits::of("mail.acme.example", Overrides { max_connections, messages_per_minute }).unwrap()
}

fn slice(tokens: u32, left: f64, connections: u32) -> RateSlice {
    RateSlice { tokens, left, connections, workers: 1 }
}

/// An account with a lease and so many tokens.
fn leased(limits: Limits, tokens: u32, left: f64, connections: u32, now: Instant) -> Account {
    let mut account = Account::new(limits, now);
    assert_eq!(account.enter(8, now), Entry::Ask, "nothing is held at first");
    let ask = account.ask(false, 0, now);
    account.slice(ask, slice(tokens, left, connections), now);
    account
}

#[test]
fn a_token_is_handed_out_once_and_within_its_slice() {
    let now = Instant::now();
    let mut account = leased(limits(None, Some(30)), 2, 0.0, 1, now);
    assert_eq!(account.take(1, now), Take::Taken(now + USED_WITHIN));
    account.finish(None, now);
    let late = now + SLICE_LASTS;
    assert!(matches!(account.take(1, late), Take::Ask | Take::Wait(_)), "the other one is over");
}

#[test]
fn an_unused_token_comes_back_unless_its_time_is_over() {
    let now = Instant::now();
    let mut account = leased(limits(None, Some(30)), 1, 0.0, 1, now);
    let Take::Taken(until) = account.take(1, now) else { panic!("one is there") };
    account.finish(Some((1, until)), now);
    assert_eq!(account.take(1, now), Take::Taken(until));
    account.finish(Some((1, until)), now + SLICE_LASTS);
    assert_eq!(account.surrender(now + SLICE_LASTS), 0);
}

#[test]
fn those_for_whom_no_token_is_near_do_not_wait() {
    let now = Instant::now();
    // 30 a minute: one in 2.3 s.
    let mut account = leased(limits(None, Some(30)), 1, 1.0, 1, now);
    let entries: Vec<Entry> = (0..4).map(|_| account.enter(8, now)).collect();
    assert_eq!(entries[..2], [Entry::Pass; 2], "one token here, one in the bucket");
    assert_eq!(entries[2..], [Entry::Full(Cause::Messages); 2]);
    account.leave();
    assert_eq!(account.enter(8, now), Entry::Pass, "a place is free again");
}

#[test]
fn a_message_that_costs_more_than_there_is_goes_and_is_paid_back() {
    let now = Instant::now();
    let mut account =
        leased(Limits { counted: Counted::Recipients, ..limits(None, Some(60)) }, 2, 0.0, 1, now);
    assert!(matches!(account.take(5, now), Take::Taken(_)));
    account.finish(None, now);
    assert!(matches!(account.take(1, now), Take::Wait(wait) if wait > SHORT_WAIT), "three are owed first");
    let ask = account.ask(false, 0, now);
    assert_eq!(ask.debt, 3);
    account.slice(ask, slice(1, -2.0, 1), now);
    assert_eq!(account.surrender(now), 1, "the debt is the database's now");
}

#[test]
fn nothing_is_sent_on_a_lease_that_is_over() {
    let now = Instant::now();
    let mut account = leased(limits(Some(3), None), 0, 0.0, 3, now);
    assert_eq!(account.connections(now), 3);
    let over = now + RATE_LEASE;
    assert_eq!((account.connections(over), account.take(1, over)), (0, Take::Ask));
    assert_eq!(account.enter(8, over), Entry::Ask);
}

#[test]
fn while_others_have_all_connections_the_database_is_asked_once_a_second() {
    let now = Instant::now();
    let mut account = leased(limits(Some(3), None), 0, 0.0, 0, now);
    assert_eq!(account.enter(8, now), Entry::Full(Cause::Connections));
    assert_eq!(account.enter(8, now + CONNECTIONS_PAUSE), Entry::Ask);
}

#[test]
fn attempts_of_several_destinations_share_the_accounts_connections() {
    let now = Instant::now();
    let mut account = leased(limits(Some(1), None), 0, 0.0, 1, now);
    assert!(matches!(account.take(1, now), Take::Taken(_)));
    assert_eq!(account.take(1, now), Take::Busy);
    account.finish(None, now);
    assert!(matches!(account.take(1, now), Take::Taken(_)));
}

#[test]
fn what_is_not_wanted_any_more_is_asked_for_no_more_and_asked_for_again_at_once() {
    let now = Instant::now();
    let mut account = leased(limits(Some(3), None), 0, 0.0, 3, now);
    let later = now + WANTED_FOR;
    assert!(account.is_idle(later));
    let ask = account.ask(true, 1, later);
    assert_eq!((ask.connections, ask.open, ask.tokens), (0, 1, 0));
    account.slice(ask, slice(0, 0.0, 1), later);
    assert_eq!(account.enter(8, later), Entry::Ask);
}

proptest! {
    #[test]
    fn no_more_is_sent_than_was_granted(
        steps in proptest::collection::vec((0u8..6, 0u64..1500, 0u32..5), 1..300),
    ) {
        let mut now = Instant::now();
        let mut account = leased(limits(Some(5), Some(600)), 0, 0.0, 5, now);
        // Granted, charged as debts, given back; sent.
        let (mut granted, mut sent) = (0i64, 0i64);
        let mut open: Vec<Instant> = Vec::new();
        for (step, pause_ms, number) in steps {
            now += Duration::from_millis(pause_ms);
            match step {
                0 | 1 => if let Take::Taken(until) = account.take(1, now) {
                    prop_assert!(now < until && until <= now + USED_WITHIN);
                    open.push(until);
                },
                2 => if open.pop().is_some() {
                    account.finish(None, now);
                    sent += 1;
                },
                3 => if let Some(until) = open.pop() {
                    account.finish(Some((1, until)), now);
                },
                4 => {
                    account.overdraw(1);
                    sent += 1;
                }
                _ => {
                    let ask = account.ask(false, open.len(), now);
                    account.slice(ask, slice(number.min(ask.tokens), 0.0, 5), now);
                    granted += i64::from(ask.debt) + i64::from(number.min(ask.tokens));
                }
            }
            prop_assert!(open.len() <= 5);
            // What is held here, owed or out is never more than was granted.
            prop_assert!(sent + i64::try_from(open.len()).unwrap() + account.tokens <= granted);
        }
        let left = account.surrender(now);
        prop_assert!(sent + i64::try_from(open.len()).unwrap() + left <= granted);
    }
}
