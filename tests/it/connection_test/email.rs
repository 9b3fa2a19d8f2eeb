//! The test email: one message, its content, its answer.

use std::time::Duration;

use mail_parser::MessageParser;
use serde_json::{Value, json};

use super::{HOST, House, ask_late};
use crate::support::broker::eventually;
use crate::support::smtp_server::{Action, Rule, Stage};

const TO: &str = "ann@customer.example";

async fn send(house: &House) -> Value {
    house.answer("smtp_config.send_test_email", "acme", json!({"to": TO})).await
}

#[tokio::test]
async fn a_test_email_says_which_organization_and_server_and_when() {
    let house = House::new().await;
    let server = house.server(|_| {}).await;
    house.store(&server).await;
    let reply = send(&house).await;
    assert_eq!(reply["ok"], true, "{reply}");
    let result = &reply["result"];
    assert!(result["response"].as_str().is_some_and(|text| text.starts_with("250 ")), "{reply}");

    let received = server.messages();
    assert_eq!(received.len(), 1);
    let (message, facts) = (&received[0], (received[0].from.as_str(), received[0].recipients.as_slice()));
    assert_eq!(facts, ("hello@acme.example", &[TO.to_owned()][..]));
    assert!(message.tls.is_some());
    let parsed = MessageParser::default().parse(&message.data).expect("a message");
    let id = parsed.message_id().expect("a Message-ID");
    assert_eq!(result["message_id"], format!("<{id}>"));
    let (uuid, domain) = id.split_once('@').expect("an address");
    assert!(uuid.parse::<uuid::Uuid>().is_ok() && domain == "acme.example", "{id}");
    assert_eq!(parsed.header_raw("Auto-Submitted").map(str::trim), Some("auto-generated"));
    let from = parsed.from().and_then(|from| from.first()).expect("a sender");
    assert_eq!((from.name(), from.address()), (Some("Team Acme"), Some("hello@acme.example")));
    assert!(parsed.subject().is_some_and(|subject| subject.starts_with("Test email")));
    for body in [parsed.body_text(0), parsed.body_html(0)] {
        let body = body.expect("plain and HTML");
        let server = format!("{HOST}:{}", server.port());
        for part in ["acme", server.as_str(), "23 November 2026 at 02:30:00 UTC"] {
            assert!(body.contains(part), "{part}: {body}");
        }
    }
    assert_eq!(house.config().await["last_test"], Value::Null, "it is no connection test");
    assert_eq!(house.database.number("SELECT count(*) FROM jobs").await, 0, "the lanes know nothing of it");
}

#[tokio::test]
async fn a_refusal_is_told_in_the_servers_words_and_an_unknown_outcome_as_such() {
    let house = House::new().await;
    let server = house.server(|_| {}).await;
    house.store(&server).await;
    for (stage, action, code, words) in [
        (Stage::Mail, "553 5.7.1 <hello@acme.example>: not owned by user", "rejected", "<h…@acme.example>"),
        (
            Stage::Rcpt,
            "550 5.1.1 <ann@customer.example> unknown",
            "rejected",
            "550 5.1.1 <a…@customer.example>",
        ),
        (Stage::Data, "451 4.3.0 later", "rejected", "451 4.3.0 later"),
        (Stage::FinalDot, "554 5.7.1 spam", "rejected", "554 5.7.1 spam"),
        (Stage::Auth, "535 5.7.8 no", "auth_failed", "535"),
    ] {
        server.rule(Rule::new(stage, Action::reply(action)).once());
        let reply = send(&house).await;
        assert_eq!((&reply["ok"], &reply["error"]["code"]), (&json!(false), &json!(code)), "{reply}");
        let message = reply["error"]["message"].as_str().expect("a message");
        assert!(message.contains(words) && !message.contains("not known"), "{message}");
        assert!(reply["error"]["hint"].as_str().is_some_and(|hint| !hint.is_empty()), "{reply}");
    }
    assert_eq!(server.messages().len(), 0);

    server.rule(Rule::new(Stage::FinalDot, Action::AcceptThenClose).once());
    let reply = send(&house).await;
    assert_eq!(reply["error"]["code"], "connect_failed", "{reply}");
    assert!(reply["error"]["message"].as_str().is_some_and(|text| text.contains("it is not known whether")));
    assert_eq!(server.messages().len(), 1, "it is not sent again");
    let outcomes =
        "SELECT count(*) FROM audit WHERE command = 'smtp_config.send_test_email' AND fields = '{to}'";
    assert_eq!(house.database.number(outcomes).await, 6);
}

#[tokio::test]
async fn the_recipient_is_exactly_one_address() {
    let house = House::new().await;
    let server = house.server(|_| {}).await;
    house.store(&server).await;
    for to in [
        json!("ann@customer.example, bob@customer.example"),
        json!("ann@customer.example>\r\nRCPT TO:<bob@customer.example"),
        json!("ann@customer.example\r\nBcc: bob@customer.example"),
        json!("Ann <ann@customer.example>"),
        json!(["ann@customer.example"]),
        json!(""),
        json!("nobody"),
        json!(null),
    ] {
        let params = json!({"to": to});
        let refusal = house.refusal("smtp_config.send_test_email", "acme", params).await;
        assert_eq!(refusal, ("invalid_field".into(), "to".into()), "{to}");
    }
    let refusal = house.refusal("smtp_config.send_test_email", "acme", json!({})).await;
    assert_eq!(refusal, ("invalid_request".into(), "to".into()));
    assert_eq!(server.connections(), 0);
}

#[tokio::test]
async fn an_accepted_test_email_ends_a_configurations_failing() {
    let house = House::new().await;
    let server = house.server(|_| {}).await;
    house.store(&server).await;
    house
        .database
        .run("UPDATE smtp_configs SET failing_since = now(), failing_reason = 'auth_failed', probes = 3")
        .await;
    server.rule(Rule::new(Stage::Rcpt, Action::reply("550 5.1.1 no")).once());
    assert_eq!(send(&house).await["ok"], false);
    assert_eq!(house.config().await["status"], "failing");
    // A busy database may not take a success in time; the answer does not wait for it.
    eventually("it is noted", async || {
        assert_eq!(send(&house).await["ok"], true);
        house.config().await["status"] == "ok"
    })
    .await;
    assert_eq!(house.database.number("SELECT probes::bigint FROM smtp_configs").await, 0);
}

#[tokio::test]
async fn a_test_email_that_runs_out_of_time_says_what_it_was_waiting_for() {
    let house = House::new().await;
    let server = house.server(|behaviour| behaviour.rule(Rule::new(Stage::Auth, Action::Silence))).await;
    house.store(&server).await;
    // Ten of its seconds are left.
    let late = Duration::from_secs(45);
    let reply =
        ask_late(&house.control, late, "smtp_config.send_test_email", "acme", json!({"to": TO})).await;
    assert_eq!(reply["error"]["code"], "connect_timeout", "{reply}");
    let hint = reply["error"]["hint"].as_str().expect("a hint");
    assert!(hint.contains("during the login") && !hint.contains("greeting"), "{hint}");
    assert_eq!(server.seen(|seen| seen.count("AUTH")), 1);
}
