//! A booking that is called back, up to a revision.

use sendoff::model::ledger::State;
use serde_json::json;

use super::{BOOKING, cancel, cancelled, of_booking, put_off, world};
use crate::support::smtp_server::{Action, Rule, Stage};
use crate::support::world::job;

// Bookings

#[tokio::test]
async fn a_booking_is_called_back_up_to_a_revision_and_what_is_newer_goes_on() {
    let world = world().await;
    let worker = world.worker().await;
    world.organization("acme").await;
    world.organization("globex").await;
    world.server.rule(Rule::new(Stage::Mail, Action::reply("451 4.3.0 not now")).times(4));
    let to = "ann@customer.example";
    let first = put_off(&world, &of_booking(Some("acme"), 1, to)).await;
    let second = put_off(&world, &of_booking(Some("acme"), 2, to)).await;
    let newer = put_off(&world, &of_booking(Some("acme"), 4, to)).await;
    let theirs = put_off(&world, &of_booking(Some("globex"), 2, to)).await;
    let sent = world.publish(&job(Some("acme"))).await;
    assert_eq!(world.story(sent).await, "sent");

    for _ in 0..2 {
        let booking = json!({"group": BOOKING, "sequence": 2});
        assert_eq!(cancel(&world, Some("acme"), booking).await, cancelled(2, 0));
    }
    // The copies come in the order in which they were put off.
    for id in [first, second, newer, theirs] {
        world.retry_now(120, id).await;
    }
    for id in [first, second] {
        assert_eq!(world.story(id).await, "deferred server_error, dead cancelled");
    }
    for (id, organization) in [(newer, "acme"), (theirs, "globex")] {
        world.state(Some(organization), id, State::Sent).await;
    }
    // Another mail of the revision that was called back, one of an older, and the next revision.
    for (sequence, story) in [(2, "dead cancelled"), (1, "dead superseded"), (4, "sent"), (5, "sent")] {
        let id = world.publish(&of_booking(Some("acme"), sequence, to)).await;
        assert_eq!(world.story(id).await, story, "{sequence}");
    }
    // A revision that is sent is too late.
    let booking = json!({"group": BOOKING, "sequence": 5});
    let result = cancel(&world, Some("acme"), booking).await;
    assert_eq!(result["too_late"], json!(3));
    worker.stop().await;
    world.end().await;
}

#[tokio::test]
async fn a_booking_that_nobody_has_seen_is_called_back_before_it_comes() {
    let world = world().await;
    let worker = world.worker().await;
    let booking = json!({"group": BOOKING, "sequence": 2});
    assert_eq!(cancel(&world, None, booking).await, cancelled(0, 0));
    let to = "ann@customer.example";
    for (sequence, story) in [(2, "dead cancelled"), (1, "dead superseded"), (3, "sent")] {
        let id = world.publish(&of_booking(None, sequence, to)).await;
        assert_eq!(world.story(id).await, story, "{sequence}");
    }
    assert_eq!(world.platform.messages().len(), 1);
    worker.stop().await;
    world.end().await;
}
