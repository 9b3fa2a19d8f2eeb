//! The main road: which server a job takes, in whose name, and what is announced.

use serde_json::json;

use crate::support::world::{PASSWORD, USERNAME, World, job};
use sendoff::model::ledger::State;

#[tokio::test]
async fn a_job_is_delivered_through_its_organizations_server_in_its_name() {
    let world = World::new().await;
    let worker = world.worker().await;
    world.organization("acme").await;

    let id = world.publish(&job(Some("acme"))).await;
    let sent = world.event("email.sent", id).await;
    assert_eq!((&sent["transport"], &sent["organization_id"]), (&json!("organization"), &json!("acme")));
    assert_eq!(sent["message_id"], format!("<{id}@acme.example>"));
    assert_eq!(sent["recipients_refused"], json!([]));

    let message = &world.received(1).await[0];
    assert_eq!(
        (message.from.as_str(), &message.recipients[..]),
        ("hello@acme.example", &["ann@customer.example".to_owned()][..])
    );
    assert_eq!(message.username.as_deref(), Some(USERNAME));
    assert!(message.tls.is_some());
    assert!(message.text().contains("From: Team acme <hello@acme.example>"), "{}", message.text());
    assert_eq!(world.server.sessions()[0].auth_payloads, [format!("\0{USERNAME}\0{PASSWORD}")]);

    let row = world.state(Some("acme"), id, State::Sent).await;
    assert_eq!((row.attempts, row.message_id), (1, Some(format!("<{id}@acme.example>"))));
    worker.stop().await;
    world.end().await;
}
