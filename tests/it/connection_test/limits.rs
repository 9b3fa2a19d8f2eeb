//! How often, how many at once, and by whom.

use std::time::Duration;

use futures_util::future::join_all;
use sendoff::control::{CommandMeta, ControlRules, command_names};
use sendoff::egress::AllowedPorts;
use serde_json::{Value, json};

use super::{HOST, House, NOW, ask, ask_late, settings};
use crate::support::broker::{SOON, eventually};
use crate::support::dns::Answer;
use crate::support::smtp_server::{Action, Rule, Stage};

fn count(replies: &[Value], code: &str) -> usize {
    replies.iter().filter(|reply| reply["error"]["code"] == code).count()
}

#[tokio::test]
async fn tests_are_counted_per_organization_and_minute_over_all_workers() {
    let rules = || ControlRules { tests_per_minute: 3, ..ControlRules::default() };
    let house = House::with(rules(), NOW).await;
    let other_worker = house.another(rules(), AllowedPorts::Any);
    let server = house.server(|_| {}).await;
    house.store(&server).await;
    // What cannot be carried out is not counted.
    for params in [json!({"host": "elsewhere.example"}), json!({"port": 0}), json!({"prot": 1})] {
        house.refusal("smtp_config.test", "acme", params).await;
    }
    let asking = (0..8).map(|n| {
        let control = if n % 2 == 0 { &house.control } else { &other_worker };
        let (command, params) = match n % 3 {
            0 => ("smtp_config.send_test_email", json!({"to": "ann@customer.example"})),
            1 => ("smtp_config.test", json!({})),
            _ => ("smtp_config.test", settings(server.port())),
        };
        ask(control, command, "acme", params)
    });
    let replies = join_all(asking).await;
    assert_eq!(count(&replies, "rate_limited"), 5, "{replies:?}");
    assert_eq!(replies.iter().filter(|reply| reply["ok"] == true).count(), 3);
    assert_eq!(server.connections(), 3);
    let refused = replies.iter().find(|reply| reply["ok"] == false).expect("one");
    let hint = refused["error"]["hint"].as_str().expect("a hint");
    let seconds: u64 = hint.trim_matches(|c: char| !c.is_ascii_digit()).parse().expect("seconds");
    assert!((1..=61).contains(&seconds), "{hint}");

    house.enable("other").await;
    let other = house.ask("smtp_config.test", "other", settings(server.port())).await;
    assert_eq!(other["ok"], true, "another organization has a minute of its own: {other}");

    // The minute slides: one of the three is over, so there is room for one.
    let age = "UPDATE test_times SET at[1] = at[1] - interval '61 seconds' WHERE organization_id = 'acme'";
    house.database.run(age).await;
    assert_eq!(house.test(json!({})).await["ok"], true);
    assert_eq!(house.refusal("smtp_config.test", "acme", json!({})).await.0, "rate_limited");
}

#[tokio::test]
async fn tests_that_wait_for_their_servers_hold_up_no_other_command() {
    let house = House::new().await;
    let silent = house.server(|behaviour| behaviour.rule(Rule::new(Stage::Banner, Action::Silence))).await;
    let slow = join_all((0..32).map(|_| house.ask("smtp_config.test", "acme", settings(silent.port()))));
    let meanwhile = async {
        silent.wait_for(SOON, |seen| seen.sessions.len() == 32).await.expect("all are under way");
        let one_more = house.ask("smtp_config.test", "acme", settings(silent.port())).await;
        assert_eq!(one_more["error"]["code"], "unavailable", "it is not begun: {one_more}");
        assert!(one_more["error"]["hint"].is_string(), "{one_more}");
        let audited =
            "SELECT count(*) FROM audit WHERE command = 'smtp_config.test' AND outcome = 'unavailable'";
        assert_eq!(house.database.number(audited).await, 1);
        let status = house.refusal("smtp_config.get", "acme", json!({})).await;
        assert_eq!(status.0, "not_found", "it is answered");
        assert_eq!(silent.connections(), 32);
    };
    tokio::select! {
        replies = slow => panic!("the tests did not wait: {replies:?}"),
        () = meanwhile => {}
    }
    // The slots are free again.
    let good = house.server(|_| {}).await;
    assert_eq!(house.test(settings(good.port())).await["ok"], true);
}

#[tokio::test]
async fn look_ups_that_nobody_answers_hold_up_no_other_command() {
    const AT_ONCE: usize = 32;
    let house = House::new().await;
    house.dns.script(HOST, Answer::Silence, 0);
    eventually("those beyond a limit are refused soon", async || {
        let create = || house.ask("smtp_config.create", "acme", settings(25));
        let replies = join_all((0..AT_ONCE + 8).map(|_| create())).await;
        let (failed, refused) = (count(&replies, "dns_failed"), count(&replies, "unavailable"));
        assert_eq!(failed + refused, AT_ONCE + 8, "{replies:?}");
        (failed, refused) == (AT_ONCE, 8)
    })
    .await;
    assert_eq!(house.refusal("smtp_config.get", "acme", json!({})).await.0, "not_found");
}

#[tokio::test]
async fn every_command_needs_an_allowed_user_and_its_refusal_is_audited() {
    let rules = ControlRules { allowed_users: vec!["booking".into()], ..ControlRules::default() };
    let house = House::new().await;
    let control = house.another(rules, AllowedPorts::Any);
    for command in command_names() {
        for user in [None, Some("guest"), Some("")] {
            let body =
                json!({"command": command, "organization_id": "acme", "params": settings(25)}).to_string();
            let meta = CommandMeta { user_id: user.map(str::to_owned), ..CommandMeta::default() };
            let response = control.handle(body.as_bytes(), meta).await;
            assert_eq!(response.code(), "not_allowed", "{command} {user:?}");
        }
        let audited = "SELECT count(*) FROM audit WHERE outcome = 'not_allowed' AND command = ";
        assert_eq!(house.database.number(format!("{audited}'{command}'")).await, 3, "{command}");
    }
    for body in ["no command", r#"{"command": "rm -rf"}"#] {
        assert_eq!(control.handle(body.as_bytes(), CommandMeta::default()).await.code(), "not_allowed");
    }
    let unknown = "SELECT count(*) FROM audit WHERE outcome = 'not_allowed' AND command = 'unknown'";
    assert_eq!(house.database.number(unknown).await, 2);
    let booking = CommandMeta { user_id: Some("booking".into()), ..CommandMeta::default() };
    let body = json!({"command": "smtp_config.test", "organization_id": "acme"}).to_string();
    assert_eq!(control.handle(body.as_bytes(), booking).await.code(), "not_found");
}

#[tokio::test]
async fn a_test_is_audited_with_the_names_of_its_fields() {
    let house = House::new().await;
    let server = house.server(|_| {}).await;
    assert_eq!(house.test(settings(server.port())).await["ok"], true);
    let audited = "SELECT count(*) FROM audit WHERE command = 'smtp_config.test' AND actor = 'user:7' AND outcome = 'ok' \
                   AND fields = '{from_email,from_name,host,port,username,password,secure}'";
    assert_eq!(house.database.number(audited).await, 1);
    let row = "SELECT count(*) FROM audit AS a WHERE a::text LIKE '%mail.acme.example%'";
    assert_eq!(house.database.number(row).await, 0);
}

#[tokio::test]
async fn a_test_for_which_too_little_time_is_left_is_not_begun_and_says_nothing_of_the_server() {
    let house = House::new().await;
    let server = house.server(|_| {}).await;
    house.store(&server).await;
    let late = Duration::from_secs(12);
    for params in [json!({}), settings(server.port())] {
        let reply = ask_late(&house.control, late, "smtp_config.test", "acme", params).await;
        assert_eq!(reply["error"]["code"], "unavailable", "{reply}");
    }
    assert_eq!(server.connections(), 0);
    assert_eq!(house.config().await["last_test"], Value::Null);
}
