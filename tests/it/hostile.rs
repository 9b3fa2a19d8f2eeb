//! Messages, names and rows that mean harm: nothing they carry is trusted, and nobody else feels them.
//! Guarantee: no connection to a private address, no credential where it does not belong, no job lost.

use std::collections::BTreeMap;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use lapin::BasicProperties;
use lapin::types::{AMQPValue, FieldArray, FieldTable, LongString};
use secrecy::ExposeSecret;
use sendoff::model::ledger::State;
use serde_json::{Value, json};

use crate::support::broker::{Message, amqp_url, eventually};
use crate::support::dns::{Answer, DnsServer};
use crate::support::smtp_server::{Action, Rule, Stage};
use crate::support::world::{KEYS, SOON, World, job, own_address};

fn text(value: &str) -> AMQPValue {
    AMQPValue::LongString(LongString::from(value.as_bytes().to_vec()))
}

/// The user that the tests' connection is: the broker refuses any other.
fn broker_user() -> String {
    let url = amqp_url();
    let user = url.split_once("://").and_then(|(_, rest)| rest.split(':').next());
    user.expect("AMQP_URL names a user").to_owned()
}

/// Everything that a publisher could hope to have carried on, or to confuse the reader with.
fn hostile_properties() -> BasicProperties {
    let mut death = FieldTable::default();
    for (name, value) in [("queue", "x.jobs.notifications"), ("reason", "expired"), ("exchange", "")] {
        death.insert(name.into(), text(value));
    }
    death.insert("count".into(), AMQPValue::LongLongInt(1_000_000));
    let mut deaths = FieldArray::default();
    deaths.push(AMQPValue::FieldTable(death));
    let mut copies = FieldArray::default();
    copies.push(text("notification.copy"));
    let mut headers = FieldTable::default();
    for (name, value) in [
        ("x-death", AMQPValue::FieldArray(deaths)),
        ("x-first-death-reason", text("rejected")),
        ("CC", AMQPValue::FieldArray(copies.clone())),
        ("BCC", AMQPValue::FieldArray(copies)),
        ("sendoff-attempt", AMQPValue::LongLongInt(i64::MAX)),
        ("sendoff-first-at", AMQPValue::FieldTable(FieldTable::default())),
        ("sendoff-turn", text("not a number")),
        ("sendoff-lane", text(&"l".repeat(20_000))),
        ("sendoff-routing-key", AMQPValue::Boolean(true)),
        ("sendoff-reason", text("expired")),
        ("sendoff-huge", text(&"h".repeat(60_000))),
        ("sendoff-table", AMQPValue::FieldTable(FieldTable::default())),
        ("sendoff-note", text("carried on")),
        ("traceparent", text("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")),
    ] {
        headers.insert(name.into(), value);
    }
    BasicProperties::default()
        .with_headers(headers)
        .with_expiration("600000".into())
        .with_user_id(broker_user().as_str().into())
        .with_content_type("application/json".into())
        .with_message_id("the publisher's".into())
        .with_priority(9)
}

/// What a copy made by the worker may bear, whatever the publisher had set.
fn is_clean(copy: &Message, extra: &[&str]) {
    let properties = &copy.properties;
    assert_eq!((properties.expiration(), properties.user_id()), (&None, &None));
    assert_eq!(properties.message_id().as_ref().map(|id| id.as_str()), Some("the publisher's"));
    let mut expected =
        vec!["sendoff-attempt", "sendoff-first-at", "sendoff-lane", "sendoff-note", "sendoff-routing-key"];
    expected.extend(["sendoff-turn", "traceparent"]);
    expected.extend(extra);
    expected.sort_unstable();
    let names: Vec<String> =
        copy.header_names().into_iter().filter(|name| name != "x-delivery-count").collect();
    assert_eq!(names, expected);
    assert_eq!(copy.text("sendoff-lane").as_deref(), Some("notifications"));
    assert_eq!(copy.text("sendoff-routing-key").as_deref(), Some("notification.test"));
    assert_eq!(copy.header("sendoff-attempt"), Some(&AMQPValue::LongLongInt(1)));
}

#[tokio::test]
async fn times_at_the_end_of_all_times_keep_neither_a_job_nor_a_letter_back() {
    // Where this is the time it is already the year 10000 in UTC, which the database's driver cannot say.
    const LATE_WEST: &str = "9999-12-31T23:59:59-11:00";
    // And here it is still the year before 0.
    const EARLY_EAST: &str = "0000-01-01T00:00:00+14:00";
    let world = World::new().await;
    let worker = world.worker().await;
    let first_at = |at: &str| {
        let mut headers = FieldTable::default();
        headers.insert("sendoff-first-at".into(), text(at));
        BasicProperties::default().with_headers(headers)
    };
    let mut never_expires = job(None);
    never_expires["expires_at"] = json!(LATE_WEST);
    let mut sent = vec![world.publish(&never_expires).await];
    for at in [LATE_WEST, EARLY_EAST, "9999-12-31T23:59:59Z"] {
        sent.push(world.publish_with(&job(None), first_at(at)).await);
    }
    for id in &sent {
        world.state(None, *id, State::Sent).await;
    }
    for (at, year) in [(LATE_WEST, 9999), (EARLY_EAST, 0)] {
        let mut unroutable = job(None);
        unroutable["expires_at"] = json!(at);
        let body = serde_json::to_vec(&unroutable).expect("JSON");
        world.broker.publish_job("newsletter.weekly", &body, first_at(at)).await;
        let id = unroutable["id"].as_str().and_then(|id| id.parse().ok()).expect("an id");
        let letter = world.letter(id).await;
        assert_eq!((letter.expires_at.map(|at| at.year()), letter.first_at), (Some(year), None));
        assert_eq!(world.event("email.dead", id).await["reason"], "unroutable");
    }
    world.broker.wait_count(&world.broker.name("dead"), 0).await;
    assert_eq!(worker.metric("sendoff_panics_total").await, 0.0);
    worker.stop().await;
    world.end().await;
}

#[tokio::test]
async fn a_job_with_hostile_properties_is_retried_and_buried_like_any_other_in_clean_copies() {
    let mut world = World::new().await;
    world.set("SENDOFF__RETRY__SCHEDULE_S", "120");
    let worker = world.worker().await;
    let greylisted = Rule::new(Stage::Rcpt, Action::reply("451 4.7.1 greylisted"));
    world.platform.rule(greylisted.of("later@customer.example").once());
    world
        .platform
        .rule(Rule::new(Stage::Rcpt, Action::reply("550 5.1.1 nobody")).of("never@customer.example"));
    let (mut later, mut never) = (job(None), job(None));
    later["to"] = json!(["later@customer.example"]);
    never["to"] = json!(["never@customer.example"]);

    let id = world.publish_with(&later, hostile_properties()).await;
    let queue = world.broker.name("retry.notifications.120");
    let copy = world.broker.take(&queue).await;
    is_clean(&copy, &[]);
    assert_eq!(copy.body, serde_json::to_vec(&later).expect("JSON"));
    world.broker.publish("", &queue, &copy.body, copy.properties.clone()).await;
    world.retry_now(120, id).await;
    world.event("email.sent", id).await;
    assert_eq!(world.state(None, id, State::Sent).await.attempts, 2);

    let id = world.publish_with(&never, hostile_properties()).await;
    assert_eq!(world.event("email.dead", id).await["reason"], "recipients_refused");
    let letter = world.broker.take(&world.broker.tap()).await;
    is_clean(&letter, &["sendoff-detail", "sendoff-died-at", "sendoff-reason"]);
    assert_eq!(letter.text("sendoff-reason").as_deref(), Some("recipients_refused"));
    assert_eq!(letter.body, serde_json::to_vec(&never).expect("JSON"));
    worker.stop().await;
    assert_eq!(world.platform.seen(|seen| seen.final_dots), 1);
    world.end().await;
}

/// A job with some fields replaced; null removes one.
fn with(fields: Value) -> Vec<u8> {
    let mut job = job(Some("acme"));
    job["subject"] = json!("CANARY subject");
    let all = job.as_object_mut().expect("a job is an object");
    for (name, value) in fields.as_object().expect("fields are an object") {
        if value.is_null() {
            all.remove(name);
        } else {
            all.insert(name.clone(), value.clone());
        }
    }
    serde_json::to_vec(&job).expect("JSON")
}

/// Body, reason, and what the detail must name.
fn unusable_bodies() -> Vec<(Vec<u8>, &'static str, &'static str)> {
    let calendar = "BEGIN:VCALENDAR\r\nMETHOD:CANCEL\r\nEND:VCALENDAR\r\n";
    let many: Vec<String> = (0..101).map(|index| format!("a{index}@customer.example")).collect();
    let malformed = |fields, names| (with(fields), "malformed", names);
    let attachment =
        |content| json!({"filename": "a.pdf", "content_type": "application/pdf", "content_base64": content});
    vec![
        (b"".to_vec(), "malformed", "line"),
        (b"{\"version\": 1,".to_vec(), "malformed", "line"),
        (b"[]".to_vec(), "malformed", "object"),
        (b"\xff\xfe{}".to_vec(), "malformed", ""),
        (with(json!({"version": 2})), "unsupported_version", "version"),
        malformed(json!({"version": null}), "version"),
        malformed(json!({"version": "1"}), "version"),
        malformed(json!({"id": null}), "id"),
        malformed(json!({"id": "CANARY"}), "id"),
        malformed(json!({"organization_id": "a b"}), "organization_id"),
        malformed(json!({"organization_id": "x".repeat(65)}), "organization_id"),
        malformed(json!({"kind": "Booking Confirmed"}), "kind"),
        malformed(json!({"calender": {}}), "calender"),
        malformed(json!({"to": []}), "to"),
        malformed(json!({"to": "CANARY@customer.example"}), "to"),
        malformed(json!({"to": ["a@b.example", "CANARY"]}), "to[1]"),
        malformed(json!({"cc": [{"email": "a@b.example\r\nBcc: x@y.example"}]}), "cc[0]"),
        malformed(json!({"to": many}), "recipients"),
        malformed(json!({"reply_to": "CANARY@"}), "reply_to"),
        malformed(json!({"subject": null}), "subject"),
        malformed(json!({"text": null}), "text"),
        malformed(json!({"headers": {"Bcc": "x@y.example"}}), "headers.Bcc"),
        malformed(json!({"headers": {"X-SMTPAPI": "{}"}}), "headers.X-SMTPAPI"),
        malformed(json!({"headers": {"X-A\r\nBcc": "x@y.example"}}), "headers"),
        malformed(json!({"attachments": [attachment("CANARY!")]}), "attachments[0].content_base64"),
        malformed(json!({"calendar": {"method": "REQUEST", "content": calendar}}), "calendar"),
        malformed(json!({"calendar": {"method": "GUESS", "content": calendar}}), "calendar.method"),
        malformed(json!({"expires_at": "tomorrow"}), "expires_at"),
        malformed(json!({"group": "booking-1"}), "sequence"),
        malformed(json!({"group": "booking-1", "sequence": -1}), "sequence"),
        malformed(json!({"on_unknown": "maybe"}), "on_unknown"),
        (with(json!({"text": "long ".repeat(10_000)})), "too_large", "the message has"),
        (with(json!({"attachments": [attachment(&"QUFB".repeat(10_000))]})), "too_large", "the message has"),
    ]
}

#[tokio::test]
async fn each_unusable_body_is_a_dead_letter_at_once_unchanged_that_names_the_field_and_not_its_content() {
    let mut world = World::new().await;
    world.set("SENDOFF__LIMITS__MAX_MESSAGE_BYTES", "20000");
    let worker = world.worker().await;
    let cases = unusable_bodies();
    for (body, _, _) in &cases {
        world.broker.publish_job("notification.test", body, BasicProperties::default()).await;
    }
    let dead = world.broker.tap();
    let mut letters = BTreeMap::new();
    for _ in &cases {
        let letter = world.broker.take(&dead).await;
        letters.insert(letter.body.clone(), letter);
    }
    let mut wrong = Vec::new();
    for (body, reason, names) in &cases {
        let shown = String::from_utf8_lossy(&body[..body.len().min(300)]);
        let letter = letters.get(body).unwrap_or_else(|| panic!("no letter has this body: {shown}"));
        let said = letter.text("sendoff-reason").unwrap_or_default();
        let detail = letter.text("sendoff-detail").unwrap_or_default();
        if said != *reason || !detail.contains(names) || detail.contains("CANARY") || detail.is_empty() {
            wrong.push(format!("{shown}\n  is {said}: {detail}\n  not {reason}: … {names} …"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert_eq!(world.database.number("SELECT count(*) FROM jobs").await, 0);
    let id = world.publish(&job(None)).await;
    world.event("email.sent", id).await;
    worker.stop().await;
    assert_eq!(world.platform.seen(|seen| seen.final_dots), 1);
    world.end().await;
}

#[tokio::test]
async fn a_job_that_no_lane_takes_waits_among_the_dead_letters_as_it_was_published() {
    let world = World::new().await;
    let worker = world.worker().await;
    let body = serde_json::to_vec(&job(None)).expect("JSON");
    world.broker.publish_job("newsletter.weekly", &body, BasicProperties::default()).await;
    let letter = world.broker.take(&world.broker.tap()).await;
    assert_eq!(letter.body, body);
    assert_eq!(
        (letter.exchange, letter.routing_key.as_str()),
        (world.broker.name("jobs"), "newsletter.weekly")
    );
    worker.stop().await;
    assert_eq!(world.platform.connections(), 0);
    world.end().await;
}

#[tokio::test]
async fn a_name_that_turned_private_since_it_was_saved_is_never_dialled() {
    let mut world = World::new().await;
    let dns = DnsServer::start().await;
    // Public for this worker, and nobody's: whatever came before its time, nothing but this machine would be dialled.
    let public = own_address(5).to_string();
    world.set("SENDOFF__EGRESS__ALLOW_NETWORKS", &format!("{public}/32"));
    world.set("SENDOFF__EGRESS__NAMESERVERS", &dns.address().to_string());
    let worker = world.worker().await;
    let later = [
        ("loopback", Answer::addresses(&["127.0.0.1"])),
        ("loopback6", Answer::addresses(&["::1"])),
        ("mapped", Answer::addresses(&["::ffff:127.0.0.1"])),
        ("mixed", Answer::addresses(&[public.as_str(), "127.0.0.1"])),
        ("metadata", Answer::addresses(&["169.254.169.254"])),
        ("alias", Answer::Alias("db.prod.example".into())),
        ("followed", Answer::BareAlias("db.prod.example".into())),
        ("alternating", Answer::alternating(&[&["127.0.0.1"], &["10.0.0.1"]])),
    ];
    dns.script("db.prod.example", Answer::addresses(&["127.0.0.1"]), 0);
    let mut jobs = Vec::new();
    for (name, answer) in later {
        let host = format!("smtp.{name}.example");
        dns.script(&host, Answer::addresses(&[&public]), 0);
        world.organization_at(name, json!({"host": host})).await;
        dns.script(&host, answer, 0);
        jobs.push((name, world.publish(&job(Some(name))).await));
    }
    for (name, id) in jobs {
        let event = world.event("email.parked", id).await;
        assert_eq!(event["reason"], "host_not_public", "{name}: {event}");
    }
    assert_eq!(world.server.connections(), 0);
    worker.stop().await;
    world.end().await;
}

#[tokio::test]
async fn swapped_ciphertexts_stop_their_two_organizations_and_nobody_else() {
    let world = World::new().await;
    let worker = world.worker().await;
    for organization in ["acme", "beta", "gamma"] {
        world.organization(organization).await;
    }
    worker.stop().await;
    world
        .database
        .run(
            "UPDATE smtp_configs AS mine SET password_sealed = other.password_sealed FROM smtp_configs AS other \
             WHERE (mine.organization_id, other.organization_id) IN (('acme', 'beta'), ('beta', 'acme'))",
        )
        .await;
    let worker = world.worker().await;
    for organization in ["acme", "beta"] {
        let id = world.publish(&job(Some(organization))).await;
        assert_eq!(world.event("email.parked", id).await["reason"], "config_unreadable");
        assert_eq!(world.dead_letter().await.1, "config_unreadable");
    }
    for organization in ["acme", "beta"] {
        let failing = |event: &Value| {
            event["type"] == "smtp_config.failing" && event["organization_id"] == organization
        };
        assert_eq!(world.events.wait_for(failing, SOON).await["reason"], "config_unreadable");
    }
    assert_eq!(world.server.connections(), 0);
    let id = world.publish(&job(Some("gamma"))).await;
    assert_eq!(world.event("email.sent", id).await["transport"], "organization");
    worker.ready().await;
    worker.stop().await;
    world.end().await;
}

#[tokio::test]
async fn a_worker_without_the_key_is_not_ready_and_the_job_waits_for_one_that_has_it() {
    const OTHER: &str = "k2:QUJDREVGR0hJSktMTU5PUFFSU1RVVldYWVowMTIzNDU=";
    let mut world = World::new().await;
    let worker = world.worker().await;
    world.organization("acme").await;
    worker.stop().await;

    world.set("SENDOFF__ENCRYPTION__KEYS", OTHER);
    let keyless = world.worker_starting(&[]).await;
    let id = world.publish(&job(Some("acme"))).await;
    let waiting = world.broker.name("retry.notifications.30");
    let copy = world.broker.take(&waiting).await;
    eventually("it is not ready for want of a key", async || {
        let (code, body) = keyless.get("/readyz").await;
        let report: Value = serde_json::from_str(&body).expect("JSON");
        code == 503
            && report["parts"]["keys"]["detail"].as_str().is_some_and(|detail| detail.contains("`k1`"))
    })
    .await;
    keyless.stop().await;
    assert_eq!((world.event_count("email.dead", id), world.server.connections()), (0, 0));
    assert_eq!(world.event_count("email.parked", id), 0, "the worker's fault parks nobody");
    assert_eq!(world.database.store().failing_count(true).await.expect("the database answers"), 0);

    world.set("SENDOFF__ENCRYPTION__KEYS", &format!("{OTHER},{KEYS}"));
    let worker = world.worker().await;
    // Its time has come sooner than in half a minute.
    world.broker.publish(&world.broker.name("jobs.notifications"), "", &copy.body, copy.properties).await;
    assert_eq!(world.event("email.sent", id).await["transport"], "organization");
    assert_eq!(world.state(Some("acme"), id, State::Sent).await.attempts, 1);
    worker.stop().await;
    world.end().await;
}

#[tokio::test]
async fn no_credential_shows_in_log_event_letter_ledger_or_metric_even_when_everything_is_traced() {
    const CANARY_USER: &str = "canary-user@acme.example";
    const CANARY_PASSWORD: &str = "canary-Passw0rd-4711";
    let mut world =
        World::with(|server| server.login = Some((CANARY_USER.into(), CANARY_PASSWORD.into()))).await;
    world.set("RUST_LOG", "trace");
    let worker = world.worker().await;
    let login = json!({"username": CANARY_USER, "password": CANARY_PASSWORD});
    world.organization_at("acme", login.clone()).await;
    let shown = world.commanded("smtp_config.get", "acme", json!({})).await;
    let id = world.publish(&job(Some("acme"))).await;
    world.event("email.sent", id).await;
    world.server.change(|server| server.login = Some(("other".into(), "other".into())));
    world.organization_at("beta", login).await;
    let refused = world.publish(&job(Some("beta"))).await;
    world.event("email.parked", refused).await;
    let letter = world.dead_letter().await;

    let (_, metrics) = worker.get("/metrics").await;
    let mut told =
        vec![format!("{shown}"), metrics, format!("{:?}", world.events.all()), format!("{letter:?}")];
    for (organization, id) in [("acme", id), ("beta", refused)] {
        told.push(format!("{:?}", world.status(Some(organization), id).await));
    }
    worker.signal("TERM").await;
    let (code, log) = worker.ended().await;
    assert_eq!(code, 0);
    assert!(log.contains("connected to RabbitMQ"), "{log}");
    told.push(log);
    let secret_of = |url: &str| {
        let password =
            url.split_once('@').and_then(|(before, _)| before.rsplit_once(':')).map(|(_, p)| p.to_owned());
        password.expect("the tests' services ask for a password")
    };
    let database_url = world.database.url();
    for secret in [
        CANARY_USER.to_owned(),
        CANARY_PASSWORD.to_owned(),
        BASE64.encode(CANARY_PASSWORD),
        BASE64.encode(format!("\0{CANARY_USER}\0{CANARY_PASSWORD}")),
        KEYS.split_once(':').expect("an id and a key").1.to_owned(),
        secret_of(&amqp_url()),
        secret_of(database_url.expose_secret()),
    ] {
        for text in &told {
            let line = text.lines().find(|line| line.contains(&secret));
            assert_eq!(line, None, "a secret shows");
        }
    }
    world.end().await;
}
