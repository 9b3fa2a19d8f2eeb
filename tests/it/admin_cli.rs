//! The organization's admin at the command line: connection tests, test emails, and what a configuration's state means.

use serde_json::{Value, json};

use crate::support::broker::eventually;
use crate::support::world::{PASSWORD, World};

/// Runs a command that a busy name server or database may make fail once, and gives its code and both outputs.
async fn run(world: &World, arguments: &[&str]) -> (i32, String, String) {
    let mut last = (0, String::new(), String::new());
    eventually(&format!("{arguments:?} is answered"), async || {
        last = world.run(arguments).await;
        !["dns_failed", "(unavailable", "rate_limited"]
            .iter()
            .any(|code| last.1.contains(code) || last.2.contains(code))
    })
    .await;
    last
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_test_that_passes_shows_each_step_and_sends_nothing() {
    let world = World::new().await;
    let worker = world.worker().await;
    world.organization("42").await;
    let (code, words, errors) = run(&world, &["org", "smtp", "test", "42"]).await;
    assert_eq!((code, errors.as_str()), (0, ""), "{words}");
    let mut from = 0;
    for step in ["resolve", "address", "connect", "greeting", "tls", "authenticate"] {
        let line = format!("ok      {step:<12} ");
        let at = words[from..].find(&line).unwrap_or_else(|| panic!("{step} in its place: {words}"));
        from += at + line.len();
    }
    assert!(words[from..].contains("The connection test passed; nothing was sent."), "{words}");

    let (code, report, _) = run(&world, &["org", "smtp", "test", "42", "--json"]).await;
    let report: Value = serde_json::from_str(&report).expect("JSON");
    assert_eq!((code, &report["ok"]), (0, &json!(true)), "{report}");
    assert_eq!(report["steps"].as_array().map(Vec::len), Some(6), "{report}");
    assert!(world.server.messages().is_empty(), "a test sends nothing");

    // A busy database may not take a result in time; the answer does not wait for it.
    eventually("the result is kept", async || {
        let (_, shown, _) = run(&world, &["org", "smtp", "show", "42"]).await;
        let kept = shown.contains("\nlast_test        passed at ");
        assert!(shown.contains("\nstatus           ok\n"), "{shown}");
        if !kept {
            assert_eq!(run(&world, &["org", "smtp", "test", "42"]).await.0, 0);
        }
        kept
    })
    .await;
    worker.stop().await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_password_is_exit_code_1_with_the_cause_and_what_to_do() {
    let world = World::new().await;
    let worker = world.worker().await;
    world.organization_at("42", json!({"password": "canary-password"})).await;
    let (code, words, _) = run(&world, &["org", "smtp", "test", "42"]).await;
    assert_eq!(code, 1, "{words}");
    for part in [
        "FAILED  authenticate ",
        "535 5.7.8",
        "\nThe connection test failed at authenticate",
        "(auth_failed",
        "\nNext: ",
    ] {
        assert!(words.contains(part), "{part}: {words}");
    }
    assert!(!words.contains("canary"), "{words}");
    let (code, report, _) = run(&world, &["org", "smtp", "test", "42", "--json"]).await;
    let report: Value = serde_json::from_str(&report).expect("JSON");
    assert_eq!((code, &report["error"]["code"]), (1, &json!("auth_failed")), "{report}");

    let (_, shown, _) = run(&world, &["org", "smtp", "show", "42"]).await;
    let shown = shown.replace("\n                 ", " ");
    assert!(shown.contains("because the server refused user name or password (auth_failed)"), "{shown}");
    worker.stop().await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn fields_are_tested_without_being_stored_and_another_host_takes_the_password() {
    let world = World::new().await;
    let worker = world.worker().await;
    world.organization("42").await;
    let port = world.server.port().to_string();
    let unsaved = ["org", "smtp", "test", "42", "--host", "127.0.0.1", "--port", &port];
    let (code, _, errors) = run(&world, &unsaved).await;
    assert_eq!(code, 1, "{errors}");
    assert!(
        errors.contains("Enter the SMTP password again") && errors.contains("--password-file"),
        "{errors}"
    );

    let file = world.file("password", format!("{PASSWORD}\n").as_bytes());
    let password = ["--password-file", file.to_str().expect("UTF-8")];
    let (code, words, errors) = run(&world, &[&unsaved[..], &password].concat()).await;
    assert_eq!(code, 0, "{words}{errors}");

    let private = ["org", "smtp", "test", "42", "--host", "10.0.0.1", "--port", &port];
    let (code, words, errors) = run(&world, &[&private[..], &password].concat()).await;
    assert_eq!(code, 1, "{words}{errors}");
    assert!(
        words.contains("FAILED  address ") && words.contains("(host_not_public, field host)"),
        "{words}{errors}"
    );
    assert!(words.contains("SMTP host must be a public address"), "{words}");

    let (_, shown, _) = run(&world, &["org", "smtp", "show", "42"]).await;
    assert!(shown.contains("\nhost             localhost\n"), "nothing was stored: {shown}");
    worker.stop().await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_test_email_leaves_at_once_and_its_message_id_is_told() {
    let world = World::new().await;
    let worker = world.worker().await;
    world.organization("42").await;
    let send = ["org", "smtp", "send-test", "42", "--to", "ann@customer.example"];
    let (code, words, errors) = run(&world, &send).await;
    assert_eq!((code, errors.as_str()), (0, ""), "{words}");
    let messages = world.received(1).await;
    assert_eq!(messages.len(), 1);
    assert!(words.starts_with("The server took the test email for ann@customer.example: 250 "), "{words}");
    let message_id =
        words.lines().last().and_then(|line| line.strip_prefix("Its Message-ID is ")).expect("told");
    assert!(String::from_utf8_lossy(&messages[0].data).contains(message_id), "{words}");
    let (code, _, errors) =
        run(&world, &["org", "smtp", "send-test", "7", "--to", "ann@customer.example"]).await;
    assert_eq!(code, 1, "{errors}");
    worker.stop().await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failing_configuration_is_shown_with_what_becomes_of_its_mail() {
    let world = World::new().await;
    let worker = world.worker().await;
    world.organization("42").await;
    world
        .database
        .run(
            "UPDATE smtp_configs SET failing_since = now(), next_probe_at = now() + interval '1 hour'"
                .to_owned(),
        )
        .await;
    let (code, shown, _) = run(&world, &["org", "smtp", "show", "42"]).await;
    assert_eq!(code, 0);
    assert!(
        shown.contains("status           failing: its mail waits (parked) and goes out by itself"),
        "{shown}"
    );
    worker.stop().await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_update_of_nothing_and_port_0_are_usage_errors_that_ask_nobody() {
    let world = World::new().await;
    let (code, _, errors) = world.run(&["org", "smtp", "update", "42"]).await;
    assert_eq!((code, errors.contains("nothing to update")), (2, true), "{errors}");
    for command in [
        &["org", "smtp", "update", "42", "--port", "0"][..],
        &["org", "smtp", "test", "42", "--port", "0"],
        &["org", "smtp", "create", "42", "--port", "0"],
    ] {
        let (code, _, errors) = world.run(command).await;
        assert_eq!((code, errors.contains("0 is not in 1..=65535")), (2, true), "{command:?}: {errors}");
    }
    world.end().await;
}
