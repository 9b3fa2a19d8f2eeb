//! Stopping a worker: in two stages, under load, with an attempt that hangs, and before it could start.
//! Guarantee: it always ends in time, with code 0, and what it gave back is sent once by the next.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use secrecy::ExposeSecret;
use sendoff::clock::Clock;
use sendoff::model::ledger::State;
use serde_json::{Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::sync::Notify;

use crate::support::broker::amqp_url;
use crate::support::smtp_server::{Action, Rule, Stage};
use crate::support::world::{SOON, World, job};

/// Longer than a stop at once takes on a busy machine, much shorter than what it would otherwise wait for here.
const AT_ONCE: Duration = Duration::from_secs(60);
/// What these tests let the worker wait for, where it is not to wait.
const LONG_S: &str = "300";

#[tokio::test]
async fn a_stop_under_load_loses_nothing_and_sends_nothing_twice() {
    const JOBS: usize = 120;
    let world = World::new().await;
    let servers = [&world.server, &world.platform];
    for server in servers {
        server.rule(Rule::new(Stage::FinalDot, Action::After(Duration::from_millis(100))));
    }
    let worker = world.worker().await;
    let organizations = [Some("acme"), Some("beta"), Some("gamma"), None];
    for organization in organizations.into_iter().flatten() {
        world.organization(organization).await;
    }
    let mut ids = Vec::new();
    let publishing = async {
        for index in 0..JOBS {
            let organization = organizations[index % organizations.len()];
            ids.push((organization, world.publish(&job(organization)).await));
        }
    };
    // From then on everything under way waits, so that the stop comes under load however slow this test is.
    let go_on = Arc::new(Notify::new());
    let holding = async {
        world.server.wait_for(SOON, |seen| seen.message_count >= 20).await.expect("the load has begun");
        for server in servers {
            server.change(|behaviour| {
                behaviour.clear_rules();
                behaviour.rule(Rule::new(Stage::FinalDot, Action::Hold(go_on.clone())));
            });
        }
    };
    tokio::join!(publishing, holding);

    worker.signal("TERM").await;
    worker.logs("draining").await;
    for server in servers {
        server.change(|behaviour| behaviour.clear_rules());
    }
    let releasing = async {
        loop {
            go_on.notify_waiters();
            tokio::time::sleep(Duration::from_millis(25)).await;
        }
    };
    let (code, log) = tokio::select! {
        ended = worker.ended() => ended,
        () = releasing => unreachable!("it never ends"),
    };
    assert_eq!(code, 0, "{log}");
    let dots = || world.server.seen(|seen| seen.final_dots) + world.platform.seen(|seen| seen.final_dots);
    assert!(dots() < JOBS, "the stop came under load");
    assert_eq!(world.database.number("SELECT count(*) FROM jobs WHERE state = 'claimed'").await, 0);
    assert_eq!(
        world.database.number("SELECT count(*) FROM jobs WHERE state = 'sent'").await,
        i64::try_from(dots()).expect("a small number")
    );

    let next = world.worker().await;
    for (organization, id) in &ids {
        world.state(*organization, *id, State::Sent).await;
    }
    next.stop().await;
    let messages = [world.server.messages(), world.platform.messages()].concat();
    let texts: HashSet<String> = messages.iter().map(|message| message_id(&message.text())).collect();
    assert_eq!((messages.len(), texts.len(), dots()), (JOBS, JOBS, JOBS));
    world.broker.wait_count(&world.broker.name("jobs.notifications"), 0).await;
    world.end().await;
}

/// When the line with these words was logged.
fn logged_at(log: &str, words: &str) -> OffsetDateTime {
    let line = log.lines().find(|line| line.contains(words)).unwrap_or_else(|| panic!("no {words:?}: {log}"));
    let at = line.split(' ').next().and_then(|at| OffsetDateTime::parse(at, &Rfc3339).ok());
    at.expect("a line begins with its time")
}

fn message_id(text: &str) -> String {
    let line = text.lines().find(|line| line.to_ascii_lowercase().starts_with("message-id:"));
    line.expect("every message has a Message-ID").to_owned()
}

#[tokio::test]
async fn an_attempt_that_outlasts_the_drain_timeout_is_given_up_and_its_job_sent_once_later() {
    let mut world = World::new().await;
    world.set("SENDOFF__SMTP__COMMAND_TIMEOUT_S", LONG_S);
    let worker = world.worker_starting(&["--drain-timeout", "1s"]).await;
    worker.ready().await;
    world.platform.rule(Rule::new(Stage::Mail, Action::Silence));
    let id = world.publish(&job(None)).await;
    world.platform.wait_for(SOON, |seen| seen.count("MAIL") == 1).await.expect("an attempt");

    let asked = Instant::now();
    worker.signal("TERM").await;
    let (code, log) = worker.ended().await;
    assert_eq!(code, 0, "{log}");
    let drained_for = logged_at(&log, "the drain timeout has passed") - logged_at(&log, "draining");
    assert!(
        drained_for < time::Duration::seconds(20),
        "longer than asked, towards the usual 30 s: {drained_for}"
    );
    assert!(asked.elapsed() < AT_ONCE, "{:?}", asked.elapsed());

    world.platform.change(|behaviour| behaviour.clear_rules());
    let next = world.worker().await;
    world.event("email.sent", id).await;
    world.state(None, id, State::Sent).await;
    next.stop().await;
    assert_eq!(world.platform.seen(|seen| (seen.final_dots, seen.message_count)), (1, 1));
    world.end().await;
}

#[tokio::test]
async fn a_second_signal_stops_at_once_and_only_a_final_dot_under_way_is_repeated() {
    let mut world = World::new().await;
    world.set("SENDOFF__SMTP__COMMAND_TIMEOUT_S", LONG_S);
    let worker = world.worker_starting(&["--drain-timeout", LONG_S]).await;
    worker.ready().await;
    world.organization("acme").await;
    world.server.rule(Rule::new(Stage::Ehlo, Action::Silence));
    world.platform.rule(Rule::new(Stage::FinalDot, Action::Silence));
    let opening = world.publish(&job(Some("acme"))).await;
    let committed = world.publish(&job(None)).await;
    world.server.wait_for(SOON, |seen| seen.count("EHLO") == 1).await.expect("a session");
    world.platform.wait_for(SOON, |seen| seen.final_dots == 1).await.expect("a final dot");

    worker.signal("INT").await;
    worker.logs("draining").await;
    let asked = Instant::now();
    worker.signal("TERM").await;
    let (code, log) = worker.ended().await;
    assert_eq!(code, 0, "{log}");
    assert!(asked.elapsed() < AT_ONCE, "{:?}", asked.elapsed());

    for server in [&world.server, &world.platform] {
        server.change(|behaviour| behaviour.clear_rules());
    }
    let next = world.worker().await;
    world.event("email.sent", opening).await;
    world.event("email.sent", committed).await;
    next.stop().await;
    assert_eq!(world.server.seen(|seen| seen.final_dots), 1);
    assert_eq!(world.platform.seen(|seen| seen.final_dots), 2);
    world.end().await;
}

#[tokio::test]
async fn a_worker_that_waits_for_its_services_stops_when_asked() {
    let mut world = World::new().await;
    let broker = amqp_url();
    let database = world.database.url().expose_secret().to_owned();
    let (no_broker, no_database) =
        ("amqp://guest:guest@127.0.0.1:1/%2f", "postgres://nobody@127.0.0.1:1/none");
    for (broker, database) in [(no_broker, no_database), (no_broker, &database), (&broker, no_database)] {
        world.set("AMQP_URL", broker);
        world.set("DATABASE_URL", database);
        let worker = world.worker_starting(&[]).await;
        assert_eq!(worker.get("/livez").await.0, 200);
        assert_eq!(worker.get("/readyz").await.0, 503);
        worker.stop().await;
    }
    world.end().await;
}

/// A test email that waits for the reply to its final dot, and that reply's moment.
async fn test_email_under_way(world: &World) -> (impl Future<Output = Value>, Arc<Notify>) {
    let go_on = Arc::new(Notify::new());
    world.server.rule(Rule::new(Stage::FinalDot, Action::Hold(go_on.clone())));
    let (access, prefix) = (World::access(), world.broker.prefix.clone());
    let command = json!({"command": "smtp_config.send_test_email", "organization_id": "acme",
        "params": {"to": "ann@customer.example"}});
    let asking = tokio::spawn(async move {
        let now = Clock::system().now();
        let reply = sendoff::broker::call(&access, &prefix, command.to_string().as_bytes(), now, SOON).await;
        serde_json::from_slice(&reply.expect("a reply")).expect("replies are JSON")
    });
    world.server.wait_for(SOON, |seen| seen.final_dots == 1).await.expect("the whole message is there");
    (async { asking.await.expect("no panic") }, go_on)
}

#[tokio::test]
async fn a_command_under_way_at_a_stop_comes_to_its_end_and_is_answered() {
    let world = World::new().await;
    let worker = world.worker_starting(&["--drain-timeout", LONG_S]).await;
    worker.ready().await;
    world.organization("acme").await;
    let (reply, go_on) = test_email_under_way(&world).await;
    worker.signal("TERM").await;
    // Whatever does not wait for it has ended by then.
    world.broker.wait_consumers(&world.broker.name("control"), 0).await;
    worker.logs("stopping: no new work is taken").await;
    go_on.notify_one();
    let reply = reply.await;
    assert_eq!(reply["ok"], true, "{reply}");
    let (code, log) = worker.ended().await;
    assert_eq!(code, 0, "{log}");
    let audited =
        "SELECT count(*) FROM audit WHERE command = 'smtp_config.send_test_email' AND outcome = 'ok'";
    assert_eq!(world.database.number(audited).await, 1);
    world.end().await;
}

#[tokio::test]
async fn a_command_that_a_second_signal_cuts_off_is_answered_as_one_of_unknown_outcome() {
    let world = World::new().await;
    let worker = world.worker_starting(&["--drain-timeout", LONG_S]).await;
    worker.ready().await;
    world.organization("acme").await;
    let (reply, _never) = test_email_under_way(&world).await;
    worker.signal("TERM").await;
    worker.logs("draining").await;
    worker.signal("TERM").await;
    let reply = reply.await;
    assert_eq!(reply["error"]["code"], "internal", "{reply}");
    assert!(reply["error"]["message"].as_str().is_some_and(|told| told.contains("not known")), "{reply}");
    let (code, log) = worker.ended().await;
    assert_eq!(code, 0, "{log}");
    world.end().await;
}
