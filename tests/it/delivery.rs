//! The main road: which server a job takes, in whose name, and what is announced.

use sendoff::model::failure::Reason;
use sendoff::model::ledger::State;
use serde_json::json;

use crate::support::smtp_server::{Action, Rule, Stage};
use crate::support::story::Letters;
use crate::support::world::{PASSWORD, SOON, USERNAME, World, job};

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

#[tokio::test]
async fn without_a_flag_a_configuration_or_an_organization_mail_takes_the_platforms_server() {
    let world = World::new().await;
    let worker = world.worker().await;
    world.organization("acme").await;
    world.organization("flagless").await;
    let off = json!({"feature": "custom-smtp-for-orgs", "enabled": false});
    world.commanded("feature.set", "flagless", off).await;
    let flag = json!({"feature": "custom-smtp-for-orgs", "enabled": true});
    world.commanded("feature.set", "unconfigured", flag).await;

    let own = world.publish(&job(Some("acme"))).await;
    assert_eq!(world.event("email.sent", own).await["transport"], "organization");
    world.commanded("smtp_config.delete", "acme", json!({})).await;

    let organizations = [None, Some("unknown"), Some("unconfigured"), Some("flagless"), Some("acme")];
    for (index, organization) in organizations.into_iter().enumerate() {
        let id = world.publish(&job(organization)).await;
        let sent = world.event("email.sent", id).await;
        assert_eq!(
            (&sent["transport"], &sent["organization_id"]),
            (&json!("platform"), &json!(organization))
        );
        assert_eq!(sent["message_id"], format!("<{id}@platform.example>"));
        let message = &world.platform.wait_for_messages(index + 1, SOON).await.expect("a message")[index];
        assert_eq!(message.from, "no-reply@platform.example");
        assert!(message.text().contains("From: The Platform <no-reply@platform.example>"));
        world.state(organization, id, State::Sent).await;
    }
    assert_eq!(world.server.messages().len(), 1);
    worker.stop().await;
    world.end().await;
}

#[tokio::test]
async fn a_changed_configuration_is_used_for_the_very_next_job() {
    let world = World::new().await;
    let worker = world.worker().await;
    world.organization("acme").await;
    let other = world.another_server(|_| {}).await;
    for round in 0..3 {
        for server in [&world.server, &other] {
            let name = format!("Round {round} at {}", server.port());
            let change = json!({"port": server.port(), "from_name": name});
            world.commanded("smtp_config.update", "acme", change).await;
            let id = world.publish(&job(Some("acme"))).await;
            assert_eq!(world.story(id).await, "sent");
            let messages = server.messages();
            assert_eq!(messages.len(), round + 1);
            assert!(messages[round].text().contains(&format!("From: {name} <hello@acme.example>")));
        }
    }
    worker.stop().await;
    world.end().await;
}

#[tokio::test]
async fn a_session_of_an_older_configuration_carries_nothing_for_the_newer_one() {
    let mut world = World::new().await;
    world.set("SENDOFF__SMTP__IDLE_TIMEOUT_S", "2");
    let worker = world.worker().await;
    world.organization("acme").await;
    let first = world.publish(&job(Some("acme"))).await;
    assert_eq!(world.story(first).await, "sent");

    let (username, password) = ("newcomer", "another secret");
    world.server.change(|behaviour| behaviour.login = Some((username.into(), password.into())));
    let change = json!({"username": username, "password": password});
    world.commanded("smtp_config.update", "acme", change).await;
    let second = world.publish(&job(Some("acme"))).await;
    assert_eq!(world.story(second).await, "sent");
    let messages = world.server.messages();
    assert_eq!([messages[0].session, messages[1].session], [0, 1]);
    assert_eq!(
        [&messages[0].username, &messages[1].username],
        [&Some(USERNAME.into()), &Some(username.into())]
    );
    let closed = world.server.wait_for(SOON, |seen| seen.sessions[0].closed).await;
    closed.expect("the older configuration's session is closed");
    worker.stop().await;
    world.end().await;
}

#[tokio::test]
async fn the_sender_is_the_organizations_while_reply_to_stays_and_bcc_is_seen_by_nobody() {
    let world = World::new().await;
    let worker = world.worker().await;
    world.organization("acme").await;
    let mut job = job(Some("acme"));
    job["cc"] = json!(["Bob <bob@customer.example>"]);
    job["bcc"] = json!(["archive@secret.example", "Auditor <auditor@secret.example>"]);
    job["reply_to"] = json!(["The Desk <desk@hotel.example>"]);
    let id = world.publish(&job).await;
    assert_eq!(world.story(id).await, "sent");
    let message = &world.server.messages()[0];
    let everybody =
        ["ann@customer.example", "bob@customer.example", "archive@secret.example", "auditor@secret.example"];
    assert_eq!(
        (message.from.as_str(), &message.recipients[..]),
        ("hello@acme.example", &everybody.map(str::to_owned)[..])
    );
    let text = message.text();
    assert!(text.contains("Reply-To: The Desk <desk@hotel.example>\r\n"), "{text}");
    assert!(text.contains("From: Team acme <hello@acme.example>\r\n"), "{text}");
    assert!(text.contains("Cc: Bob <bob@customer.example>\r\n"), "{text}");
    let lower = text.to_ascii_lowercase();
    assert!(!lower.contains("secret.example") && !lower.contains("bcc:"), "{text}");
    worker.stop().await;
    world.end().await;
}

#[tokio::test]
async fn every_attempt_carries_the_same_message_id_even_under_another_sender() {
    let mut world = World::new().await;
    world.set("SENDOFF__RETRY__SCHEDULE_S", "120");
    let worker = world.worker().await;
    world.organization("acme").await;
    world.server.rule(Rule::new(Stage::FinalDot, Action::AcceptThenClose).once());
    let id = world.publish(&job(Some("acme"))).await;
    assert_eq!(world.event("email.deferred", id).await["reason"], "unknown_outcome");
    let change = json!({"from_email": "hello@acme-hotels.example"});
    world.commanded("smtp_config.update", "acme", change).await;
    world.retry_now(120, id).await;
    let sent = world.event("email.sent", id).await;
    assert_eq!(sent["message_id"], format!("<{id}@acme.example>"));
    let messages = world.server.messages();
    assert_eq!([&messages[0].from, &messages[1].from], ["hello@acme.example", "hello@acme-hotels.example"]);
    for message in &messages {
        assert!(
            message.text().contains(&format!("Message-ID: <{id}@acme.example>\r\n")),
            "{}",
            message.text()
        );
    }
    worker.stop().await;
    world.end().await;
}

#[tokio::test]
async fn an_internationalized_address_is_sent_where_the_server_can_and_refused_clearly_where_not() {
    let world = World::new().await;
    let worker = world.worker().await;
    let able = world.with_server("able", |_| {}).await;
    let unable = world.with_server("unable", |behaviour| behaviour.smtputf8 = false).await;
    let to_joerg = |organization| {
        let mut job = job(Some(organization));
        job["to"] = json!(["Jörg <jörg@customer.example>"]);
        job
    };
    let sent = world.publish(&to_joerg("able")).await;
    assert_eq!(world.story(sent).await, "sent");
    let message = &able.messages()[0];
    assert_eq!(message.recipients, ["jörg@customer.example"]);
    assert!(message.mail_parameters.contains("SMTPUTF8"), "{}", message.mail_parameters);

    let refused = world.publish(&to_joerg("unable")).await;
    assert_eq!(world.story(refused).await, "dead message_refused");
    let (_, reason, detail) = world.dead_letter().await;
    assert_eq!(reason, "message_refused");
    assert!(detail.contains("SMTPUTF8"), "{detail}");
    assert_eq!(unable.seen(|seen| seen.count("MAIL")), 0);
    // Names and subjects need no such server.
    let mut named = job(Some("unable"));
    named["to"] = json!(["Jörg <joerg@customer.example>"]);
    named["subject"] = json!("Ihre Buchung ist bestätigt");
    let named = world.publish(&named).await;
    assert_eq!(world.story(named).await, "sent");
    worker.stop().await;
    world.end().await;
}

#[tokio::test]
async fn a_message_too_large_for_the_server_or_for_us_is_dead_at_once() {
    let mut world = World::new().await;
    world.set("SENDOFF__LIMITS__MAX_MESSAGE_BYTES", "100000");
    let worker = world.worker().await;
    let small = world.with_server("small", |behaviour| behaviour.size = Some(10_000)).await;
    world.organization("acme").await;
    let of_size = |organization, bytes: usize| {
        let mut job = job(Some(organization));
        job["text"] = json!("0123456789 ".repeat(bytes / 11));
        job
    };
    let mut letters = Letters::default();
    for (organization, bytes) in [("small", 20_000), ("acme", 200_000)] {
        let job = of_size(organization, bytes);
        let id = world.publish(&job).await;
        assert_eq!(world.story(id).await, "dead too_large", "{organization}");
        let letter = letters.of(&world, id).await;
        assert_eq!(letter.text("sendoff-reason").as_deref(), Some("too_large"));
        assert_eq!(letter.body, serde_json::to_vec(&job).expect("JSON"));
    }
    assert_eq!(small.seen(|seen| seen.count("MAIL")), 0, "SIZE is looked at before anything is sent");
    assert_eq!(world.server.connections(), 0);
    let fits = world.publish(&of_size("acme", 50_000)).await;
    assert_eq!(world.story(fits).await, "sent");
    worker.stop().await;
    world.end().await;
}

#[tokio::test]
async fn a_job_without_any_server_for_it_is_dead() {
    let mut world = World::new().await;
    for key in ["HOST", "PORT", "SECURE", "FROM_EMAIL", "FROM_NAME"] {
        world.unset(&format!("SENDOFF__PLATFORM__{key}"));
    }
    let worker = world.worker().await;
    let id = world.publish(&job(Some("nobody"))).await;
    assert_eq!(world.story(id).await, "dead config_missing");
    assert_eq!(world.dead_letter().await.1, "config_missing");
    let row = world.state(Some("nobody"), id, State::Dead).await;
    assert_eq!(row.reason, Some(Reason::ConfigMissing));
    worker.stop().await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_refusal_of_a_host_or_port_is_counted_under_its_rule() {
    let mut world = World::new().await;
    world.set("SENDOFF__EGRESS__ALLOWED_PORTS", "587");
    world.set("SENDOFF__EGRESS__ALLOW_NETWORKS", "");
    let worker = world.worker().await;
    world.commanded("feature.set", "7", json!({"feature": "custom-smtp-for-orgs", "enabled": true})).await;
    for (host, port, code) in [("0x7f.1", 587, "host_not_public"), ("8.8.8.8", 22, "port_not_allowed")] {
        let params = json!({"from_email": "a@acme.example", "from_name": "A", "host": host, "port": port,
                            "username": "u", "password": "p"});
        let command = json!({"command": "smtp_config.create", "organization_id": 7, "params": params});
        let reply = world.answered(command).await;
        assert_eq!(reply["error"]["code"], code, "{reply}");
    }
    for rule in ["loopback", "port_not_allowed"] {
        let series = format!("sendoff_egress_refused_total{{reason=\"{rule}\"}}");
        assert_eq!(worker.metric(&series).await, 1.0, "{rule}");
    }
    worker.stop().await;
    world.end().await;
}
