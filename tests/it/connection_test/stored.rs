//! The stored configuration: what of it a test may use, and what a test leaves on it.

use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Value, json};
use tokio::sync::Notify;

use super::{House, NOW, ask, settings};
use crate::support::broker::{SOON, eventually};
use crate::support::dns::Answer;
use crate::support::smtp_server::{Action, Rule, Stage};
use crate::support::world::{PASSWORD, USERNAME};

const PASSWORD_NEEDED: &str =
    "Enter the SMTP password again: it is only ever sent to the server it was entered for.";

#[tokio::test]
async fn without_the_flag_or_a_configuration_there_is_nothing_to_test() {
    let house = House::new().await;
    let refusal = async |organization: &str, params: Value| {
        house.refusal("smtp_config.test", organization, params).await
    };
    assert_eq!(refusal("other", json!({})).await.0, "feature_disabled");
    assert_eq!(refusal("other", settings(25)).await.0, "feature_disabled");
    assert_eq!(refusal("acme", json!({})).await.0, "not_found");
    let mut incomplete = settings(25);
    incomplete.as_object_mut().expect("an object").remove("username");
    assert_eq!(refusal("acme", incomplete).await, ("invalid_request".into(), "username".into()));
    assert_eq!(refusal("acme", json!({"host": "x y"})).await, ("invalid_field".into(), "host".into()));
    assert_eq!(
        refusal("acme", json!({"if_version": 1})).await,
        ("invalid_request".into(), "if_version".into())
    );
}

#[tokio::test]
async fn a_stored_password_is_presented_to_its_own_host_only() {
    let house = House::new().await;
    house.dns.script("other.acme.example", Answer::addresses(&["127.0.0.1"]), 60);
    let (own, other) = (house.server(|_| {}).await, house.server(|_| {}).await);
    house.store(&own).await;
    for params in [
        json!({"host": "other.acme.example", "port": other.port()}),
        json!({"host": "other.acme.example", "username": "somebody"}),
        json!({"secure": false}),
        json!({"secure": false, "port": other.port()}),
    ] {
        let reply = house.answer("smtp_config.test", "acme", params.clone()).await;
        assert_eq!(reply["error"]["code"], "invalid_field", "{params}: {reply}");
        assert_eq!(reply["error"]["field"], "password");
        assert_eq!(reply["error"]["message"], PASSWORD_NEEDED);
    }
    assert_eq!((own.connections(), other.connections()), (0, 0), "nothing was dialled");

    // A field alone is laid over what is stored.
    assert_eq!(house.test(json!({"port": other.port()})).await["ok"], true);
    let payload = format!("\0{USERNAME}\0{PASSWORD}");
    assert_eq!(other.sessions()[0].auth_payloads, [payload]);
    // A new password goes to the new host, the stored one does not.
    let params = json!({"host": "other.acme.example", "port": other.port(), "password": "another"});
    assert_eq!(
        house.test(params).await["error"]["code"],
        "tls_failed",
        "the certificate is for another name"
    );
    let report = house.test(json!({"password": "another", "secure": false})).await;
    assert_eq!(report["error"]["code"], "auth_failed", "{report}");
    assert_eq!(own.sessions()[0].auth_payloads, [format!("\0{USERNAME}\0another")]);
    assert_eq!(house.config().await["last_test"], Value::Null, "none of these was the stored configuration");
    assert_eq!(house.config().await["version"], 1);
}

#[tokio::test]
async fn credentials_that_a_server_repeats_are_not_told() {
    let house = House::new().await;
    let plain = BASE64.encode(format!("\0{USERNAME}\0{PASSWORD}"));
    let words = format!("535 5.7.8 no {USERNAME}, no {PASSWORD}, not {plain} either");
    let server =
        house.server(|behaviour| behaviour.rule(Rule::new(Stage::Auth, Action::reply(&words)))).await;
    house.store(&server).await;
    for (command, params) in [
        ("smtp_config.test", json!({})),
        ("smtp_config.send_test_email", json!({"to": "ann@customer.example"})),
    ] {
        let reply = house.answer(command, "acme", params).await.to_string();
        assert!(reply.contains("535 5.7.8 no [redacted], no ") && reply.contains("either"), "{reply}");
        assert!(!reply.contains(&plain), "{reply}");
    }
}

#[tokio::test]
async fn credentials_that_a_server_knows_before_the_login_are_not_told_either() {
    let house = House::new().await;
    let server = house.server(|_| {}).await;
    house.store(&server).await;
    server.rule(Rule::new(Stage::Banner, Action::reply(&format!("220 hello {USERNAME}"))).once());
    let report = house.test(json!({})).await;
    let greeting = &report["steps"][3];
    assert_eq!((&greeting["step"], &greeting["ok"]), (&json!("greeting"), &json!(true)), "{report}");
    assert!(greeting["detail"].as_str().is_some_and(|told| told.contains("hello [redacted]")), "{report}");
    server.rule(Rule::new(Stage::Ehlo, Action::reply(&format!("550 5.7.1 not {PASSWORD}"))).once());
    let report = house.test(json!({})).await;
    assert!(report["error"]["message"].as_str().is_some_and(|told| told.contains("[redacted]")), "{report}");
}

#[tokio::test]
async fn of_the_mechanisms_on_offer_only_names_are_told() {
    let house = House::new().await;
    let server = house
        .server(|behaviour| {
            behaviour.mechanisms.clear();
            behaviour.more_keywords =
                vec!["AUTH \u{1b}]0;owned\u{7} bob@customer.example NTLM <b>GSSAPI</b>"];
        })
        .await;
    house.store(&server).await;
    let report = house.test(json!({})).await;
    assert_eq!(report["error"]["code"], "auth_failed", "{report}");
    let told = report.to_string();
    assert!(told.contains("(it offers NTLM)"), "{report}");
    for said in ["owned", "bob", "GSSAPI", "\\u001b"] {
        assert!(!told.to_ascii_lowercase().contains(&said.to_ascii_lowercase()), "{said}: {report}");
    }
}

#[tokio::test]
async fn the_last_test_of_the_stored_configuration_is_kept() {
    let house = House::new().await;
    let server = house.server(|_| {}).await;
    house.store(&server).await;
    let kept = async || {
        let kept = house.config().await["last_test"].clone();
        (kept["ok"].clone(), kept["code"].clone())
    };
    let (good, bad) = ((json!(true), Value::Null), (json!(false), json!("auth_failed")));
    // A busy database may not take a result in time; the answer does not wait for it.
    eventually("a success is kept", async || {
        assert_eq!(house.test(json!({})).await["ok"], true);
        kept().await == good
    })
    .await;
    server.rule(Rule::new(Stage::Auth, Action::reply("535 5.7.8 no")));
    assert_eq!(house.test(settings(server.port())).await["ok"], false);
    assert_eq!(kept().await, good, "an unsaved test says nothing of the stored one");
    eventually("a failure is kept", async || {
        assert_eq!(house.test(json!({})).await["ok"], false);
        kept().await == bad
    })
    .await;
    assert_eq!(house.config().await["version"], 1, "a test is no change");
    house.result("smtp_config.update", "acme", json!({"username": "another"})).await;
    assert_eq!(house.config().await["last_test"], Value::Null);
}

#[tokio::test]
async fn the_later_of_two_results_is_kept_whatever_the_workers_clocks_say() {
    let house = House::new().await;
    let server = house.server(|_| {}).await;
    house.store(&server).await;
    let ahead = house.at(NOW + time::Duration::DAY);
    server.rule(Rule::new(Stage::Auth, Action::reply("535 5.7.8 no")).once());
    let failed = ask(&ahead, "smtp_config.test", "acme", json!({})).await;
    assert_eq!(failed["result"]["ok"], false, "{failed}");
    assert_eq!(house.test(json!({})).await["ok"], true);
    assert_eq!(house.config().await["last_test"]["ok"], true);
    let timely = "SELECT count(*) FROM smtp_configs WHERE now() - last_test_at BETWEEN '0s' AND '1 hour'";
    assert_eq!(house.database.number(timely).await, 1);
}

#[tokio::test]
async fn a_result_is_not_kept_for_a_version_that_was_not_tested() {
    let house = House::new().await;
    let held = Arc::new(Notify::new());
    let server =
        house.server(|behaviour| behaviour.rule(Rule::new(Stage::Auth, Action::Hold(held.clone())))).await;
    house.store(&server).await;
    let test = house.test(json!({}));
    let change = async {
        server.wait_for(SOON, |seen| seen.count("AUTH") == 1).await.expect("the login is under way");
        house.result("smtp_config.update", "acme", json!({"password": "new"})).await;
        held.notify_one();
    };
    let (report, ()) = tokio::join!(test, change);
    assert_eq!(report["ok"], true);
    assert_eq!(house.config().await["last_test"], Value::Null);
    assert_eq!(house.config().await["version"], 2);
}

#[tokio::test]
async fn only_a_success_of_the_stored_configuration_ends_its_failing() {
    let house = House::new().await;
    let server = house.server(|_| {}).await;
    house.store(&server).await;
    let fail =
        "UPDATE smtp_configs SET failing_since = now(), failing_reason = 'auth_failed', failing_hint = 'x',
                next_probe_at = now() + interval '1 hour'";
    house.database.run(fail).await;
    assert_eq!(house.config().await["status"], "failing");
    assert_eq!(house.test(settings(server.port())).await["ok"], true);
    assert_eq!(house.config().await["status"], "failing", "an unsaved test opens nothing");
    server.rule(Rule::new(Stage::Auth, Action::reply("535 5.7.8 no")).once());
    assert_eq!(house.test(json!({})).await["ok"], false);
    assert_eq!(house.config().await["status"], "failing");
    eventually("a success is noted", async || {
        assert_eq!(house.test(json!({})).await["ok"], true);
        house.config().await["status"] == "ok"
    })
    .await;
    assert_eq!(house.database.number("SELECT count(*) FROM recoveries").await, 1);
}

#[tokio::test]
async fn stored_credentials_that_do_not_open_ask_for_new_ones() {
    let house = House::new().await;
    let server = house.server(|_| {}).await;
    house.store(&server).await;
    house.database.run("UPDATE smtp_configs SET password_sealed = username_sealed").await;
    for (command, params) in [
        ("smtp_config.test", json!({})),
        ("smtp_config.test", json!({"port": server.port()})),
        ("smtp_config.send_test_email", json!({"to": "ann@customer.example"})),
    ] {
        let reply = house.answer(command, "acme", params).await;
        assert_eq!(reply["error"]["code"], "invalid_field", "{reply}");
        assert_eq!(reply["error"]["field"], "password");
        assert!(reply["error"]["hint"].as_str().is_some_and(|hint| hint.contains("again")), "{reply}");
    }
    assert_eq!(server.connections(), 0);
    let both = json!({"username": USERNAME, "password": PASSWORD});
    assert_eq!(house.test(both).await["ok"], true);
}
