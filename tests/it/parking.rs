//! Organizations whose configuration is at fault: their mail is parked, their servers are left alone, nobody else notices.
//! Guarantee: connections are counted where they arrive, at the scripted server.

use std::time::Duration;

use sendoff::model::failure::Reason;
use sendoff::model::ledger::State;
use sendoff::model::letter::LetterState;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::support::broker::{eventually, eventually_within};
use crate::support::smtp_server::{Action, Rule, SmtpServer, Stage};
use crate::support::world::{SOON, WorkerProcess, World, job, own_address};

/// For many jobs, on a machine that is busy with other tests.
const A_WHILE: Duration = Duration::from_secs(240);
/// What no server of a test takes.
const WRONG: &str = "not the password";

/// An organization whose password is refused.
async fn with_wrong_password(world: &World, id: &str) -> SmtpServer {
    let server = world.another_server(|_| {}).await;
    world.organization_at(id, json!({"port": server.port(), "password": WRONG})).await;
    server
}

/// An organization whose server has taken a message, after which it makes a new connection for each.
async fn that_works(world: &World, id: &str) -> SmtpServer {
    let server = world.with_server(id, |behaviour| behaviour.closes_after_messages = Some(1)).await;
    let first = world.publish(&job(Some(id))).await;
    world.state(Some(id), first, State::Sent).await;
    eventually("it is known to work", async || {
        count(world, &format!("FROM smtp_configs WHERE organization_id = '{id}' AND worked_at IS NOT NULL"))
            .await
            == 1
    })
    .await;
    assert_eq!(server.connections(), 1);
    server
}

fn refuse(server: &SmtpServer) {
    server.rule(Rule::new(Stage::Auth, Action::reply("535 5.7.8 no")));
}

async fn publish(world: &World, organization: &str, jobs: usize) -> Vec<Uuid> {
    let mut ids = Vec::with_capacity(jobs);
    for _ in 0..jobs {
        ids.push(world.publish(&job(Some(organization))).await);
    }
    ids
}

async fn count(world: &World, of: &str) -> i64 {
    world.database.number(format!("SELECT count(*) {of}")).await
}

/// Waits until so many jobs of an organization are parked, each with its letter.
async fn parked(world: &World, organization: &str, jobs: i64) {
    for table in ["jobs", "dead_letters"] {
        let of = format!("FROM {table} WHERE organization_id = '{organization}' AND state = 'parked'");
        eventually_within(A_WHILE, &format!("{jobs} of {organization} are parked in {table}"), async || {
            count(world, &of).await == jobs
        })
        .await;
    }
}

/// The different events of that kind about organizations, each as organization, reason and hint. Events come at least once.
fn failing(world: &World) -> Vec<(String, String, String)> {
    let text = |event: &Value, name: &str| event[name].as_str().unwrap_or_default().to_owned();
    let events = world.events.all();
    let mut different = Vec::new();
    for event in events.iter().filter(|event| event["type"] == "smtp_config.failing") {
        let told = (text(event, "organization_id"), text(event, "reason"), text(event, "hint"));
        if !different.contains(&told) {
            different.push(told);
        }
    }
    different
}

/// That the trouble began once, whoever of these workers met it, although its event may be published again.
async fn began_once(workers: &[&WorkerProcess]) {
    let begun = || {
        let of = |worker: &&WorkerProcess| worker.log().matches("a configuration does not work").count();
        workers.iter().map(of).sum::<usize>()
    };
    eventually("it is logged", async || begun() > 0).await;
    assert_eq!(begun(), 1);
}

async fn announced(world: &World, organization: &str) -> Value {
    let is =
        |event: &Value| event["type"] == "smtp_config.failing" && event["organization_id"] == organization;
    world.events.wait_for(is, SOON).await
}

async fn not_failing(world: &World) {
    assert_eq!(count(world, "FROM smtp_configs WHERE failing_since IS NOT NULL").await, 0);
    assert_eq!(failing(world), []);
}

#[tokio::test]
async fn a_thousand_jobs_whose_password_is_refused_cost_the_server_one_connection_and_nobody_else_waits() {
    let world = World::new().await;
    let worker = world.worker().await;
    world.organization("beta").await;
    let server = with_wrong_password(&world, "acme").await;
    let jobs = publish(&world, "acme", 1000).await;
    let neighbours = publish(&world, "beta", 20).await;
    for id in &neighbours {
        world.state(Some("beta"), *id, State::Sent).await;
    }
    parked(&world, "acme", 1000).await;
    assert_eq!(server.connections(), 1);
    assert_eq!(server.seen(|seen| seen.auth_attempts), 1);
    announced(&world, "acme").await;
    let [(organization, reason, hint)] = &failing(&world)[..] else { panic!("one event") };
    assert_eq!((organization.as_str(), reason.as_str()), ("acme", "auth_failed"));
    assert!(hint.contains("password"), "{hint}");
    began_once(&[&worker]).await;
    for id in [jobs[0], jobs[999]] {
        assert_eq!(world.event("email.parked", id).await["reason"], "auth_failed");
    }
    let settled = "sendoff_jobs_settled_total{lane=\"notifications\",outcome=\"parked\"}";
    eventually("they are counted", async || worker.metric(settled).await >= 1000.0).await;
    assert_eq!(
        count(&world, "FROM jobs WHERE attempts <> spared").await,
        20,
        "only what was sent is counted"
    );
    let tried = "FROM jobs WHERE state = 'parked' AND coalesce(message_id, '') <> ''";
    assert_eq!(count(&world, tried).await, 1, "what was never tried has no Message-ID yet");
    let shown = world.commanded("smtp_config.get", "acme", json!({})).await;
    assert_eq!(shown["status"], "failing");
    let said = "FROM smtp_configs WHERE announce_at IS NULL";
    eventually("nothing is left to be announced", async || count(&world, said).await == 2).await;
    worker.stop().await;
    world.end().await;
}

#[tokio::test]
async fn a_configuration_that_has_worked_costs_two_connections_and_no_attempt_is_charged() {
    let world = World::new().await;
    let worker = world.worker().await;
    let server = that_works(&world, "acme").await;
    refuse(&server);
    let jobs = publish(&world, "acme", 30).await;
    parked(&world, "acme", 30).await;
    assert_eq!(server.connections(), 3);
    announced(&world, "acme").await;
    assert_eq!(failing(&world).len(), 1);
    began_once(&[&worker]).await;
    assert_eq!(count(&world, "FROM jobs WHERE state = 'parked' AND attempts <> spared").await, 0);
    let deferred: usize = jobs.iter().map(|id| world.event_count("email.deferred", *id)).sum();
    assert_eq!(deferred, 1, "the first failure alone was put off");
    worker.stop().await;
    world.end().await;
}

#[tokio::test]
async fn a_success_between_two_failures_keeps_the_organizations_mail_going() {
    let world = World::new().await;
    let worker = world.worker().await;
    let server = that_works(&world, "acme").await;
    for _ in 0..2 {
        server.rule(Rule::new(Stage::Auth, Action::reply("535 5.7.8 no")).once());
        let id = world.publish(&job(Some("acme"))).await;
        assert_eq!(world.story(id).await, "deferred auth_failed, sent");
        assert_eq!(world.state(Some("acme"), id, State::Sent).await.attempts, 2);
        let blemished = "FROM smtp_configs WHERE strikes > 0";
        eventually("it is forgotten", async || count(&world, blemished).await == 0).await;
    }
    assert_eq!(count(&world, "FROM jobs WHERE spared = 1").await, 2);
    not_failing(&world).await;
    worker.stop().await;
    world.end().await;
}

#[tokio::test]
async fn an_organization_whose_mail_goes_through_costs_its_configuration_no_write() {
    let world = World::new().await;
    world
        .database
        .run(
            "CREATE TABLE writes (at timestamptz);
             CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS
                 'BEGIN INSERT INTO writes VALUES (now()); RETURN NULL; END';
             CREATE TRIGGER note AFTER UPDATE ON smtp_configs FOR EACH ROW EXECUTE FUNCTION note()",
        )
        .await;
    let worker = world.worker().await;
    let _server = that_works(&world, "acme").await;
    let writes = async || count(&world, "FROM writes").await;
    let noted = writes().await;
    for id in publish(&world, "acme", 200).await {
        world.state(Some("acme"), id, State::Sent).await;
    }
    assert_eq!(writes().await, noted, "nothing but that it works");
    worker.stop().await;
    world.end().await;
}

#[tokio::test]
async fn a_sender_that_is_refused_twice_is_refused_on_two_connections() {
    let world = World::new().await;
    let worker = world.worker().await;
    world.organization("acme").await;
    let first = world.publish(&job(Some("acme"))).await;
    world.state(Some("acme"), first, State::Sent).await;
    eventually("it is known to work", async || {
        count(&world, "FROM smtp_configs WHERE worked_at IS NOT NULL").await == 1
    })
    .await;
    world.server.rule(Rule::new(Stage::Mail, Action::reply("553 5.7.1 not owned by user")));
    let id = publish(&world, "acme", 1).await[0];
    parked(&world, "acme", 1).await;
    assert_eq!(world.event_count("email.deferred", id), 1);
    assert_eq!(world.server.connections(), 2, "the session of before is not used again");
    assert_eq!(world.server.seen(|seen| seen.count("MAIL")), 3);
    assert_eq!(announced(&world, "acme").await["reason"], "sender_refused");
    worker.stop().await;
    world.end().await;
}

/// What a probe finds is that the login works.
async fn released_by_a_probe(world: &World, organization: &str) {
    let sql =
        format!("UPDATE smtp_configs SET next_probe_at = now() WHERE organization_id = '{organization}'");
    world.database.run(sql).await;
    let is =
        |event: &Value| event["type"] == "smtp_config.recovered" && event["organization_id"] == organization;
    world.events.wait_for(is, SOON).await;
}

#[tokio::test]
async fn a_message_that_alone_is_refused_parks_its_organization_once_and_then_dies_by_its_own_retries() {
    let mut world = World::new().await;
    world.set("SENDOFF__RETRY__SCHEDULE_S", "600,600,600");
    let worker = world.worker().await;
    let server = that_works(&world, "acme").await;
    server.rule(Rule::new(Stage::Rcpt, Action::reply("554 5.7.1 Relay access denied")).of("eve@far.example"));
    let mut refused = job(Some("acme"));
    refused["to"] = json!(["eve@far.example"]);
    let id = world.publish(&refused).await;
    let tried = async |attempts: u32| {
        eventually(&format!("attempt {attempts} has failed"), async || {
            let row = world.status(Some("acme"), id).await;
            row.is_some_and(|row| {
                row.attempts == attempts && matches!(row.state, State::Deferred | State::Dead)
            })
        })
        .await;
    };
    tried(1).await;
    world.retry_now(600, id).await;
    parked(&world, "acme", 1).await;
    released_by_a_probe(&world, "acme").await;
    tried(3).await;
    // Others get through.
    let other = world.publish(&job(Some("acme"))).await;
    world.state(Some("acme"), other, State::Sent).await;
    eventually("it is proven", async || count(&world, "FROM smtp_configs WHERE proven").await == 1).await;
    for attempts in 4..=7 {
        world.retry_now(600, id).await;
        tried(attempts).await;
        assert_eq!(count(&world, "FROM smtp_configs WHERE failing_since IS NOT NULL").await, 0);
    }
    let row = world.state(Some("acme"), id, State::Dead).await;
    assert_eq!(row.reason, Some(Reason::RetriesExhausted));
    assert_eq!((failing(&world).len(), world.event_count("email.parked", id)), (1, 1));
    worker.stop().await;
    world.end().await;
}

#[tokio::test]
async fn what_is_released_into_an_account_that_still_refuses_is_parked_again_and_nobody_is_charged() {
    let world = World::new().await;
    let worker = world.worker().await;
    let server = that_works(&world, "acme").await;
    server.rule(Rule::new(Stage::Mail, Action::reply("553 5.7.1 not owned by user")));
    publish(&world, "acme", 5).await;
    parked(&world, "acme", 5).await;
    for failures in 2..=3 {
        released_by_a_probe(&world, "acme").await;
        let again = format!("FROM smtp_configs WHERE failing_since IS NOT NULL AND probes = {failures}");
        eventually("it fails again", async || count(&world, &again).await == 1).await;
        parked(&world, "acme", 5).await;
    }
    assert_eq!(count(&world, "FROM jobs WHERE state = 'parked' AND attempts = spared").await, 5);
    worker.stop().await;
    world.end().await;
}

#[tokio::test]
async fn a_failure_of_an_older_version_does_not_set_failing() {
    let world = World::new().await;
    let worker = world.worker().await;
    let server = with_wrong_password(&world, "acme").await;
    let go_on = std::sync::Arc::new(tokio::sync::Notify::new());
    server.rule(Rule::new(Stage::Banner, Action::Hold(go_on.clone())).once());
    let id = world.publish(&job(Some("acme"))).await;
    server.wait_for(SOON, |seen| seen.open_sessions() == 1).await.expect("a connection");
    let password = json!({"password": crate::support::world::PASSWORD});
    world.commanded("smtp_config.update", "acme", password).await;
    go_on.notify_one();
    assert_eq!(world.story(id).await, "deferred auth_failed, sent");
    assert_eq!(server.connections(), 2);
    assert_eq!(count(&world, "FROM jobs WHERE attempts = 2 AND spared = 1").await, 1);
    not_failing(&world).await;
    worker.stop().await;
    world.end().await;
}

#[tokio::test]
async fn where_no_connection_may_be_made_all_is_parked_at_once_and_none_is_made() {
    let mut world = World::new().await;
    let ports = format!("{},{}", world.server.port(), world.platform.port());
    world.set("SENDOFF__EGRESS__ALLOWED_PORTS", &ports);
    let worker = world.worker().await;
    for (id, now) in
        [("private", "host = '10.0.0.1'"), ("closed", "port = 7"), ("damaged", "password_sealed = ''")]
    {
        world.organization(id).await;
        // What was judged when it was saved is judged again; it has worked before.
        let sql = format!("UPDATE smtp_configs SET worked_at = now(), {now} WHERE organization_id = '{id}'");
        world.database.run(sql).await;
    }
    world.organization("fine").await;
    for (id, reason) in
        [("private", "host_not_public"), ("closed", "port_not_allowed"), ("damaged", "config_unreadable")]
    {
        let jobs = publish(&world, id, 3).await;
        parked(&world, id, 3).await;
        assert_eq!(announced(&world, id).await["reason"], reason);
        for job in jobs {
            assert_eq!(world.event("email.parked", job).await["reason"], reason);
        }
    }
    assert_eq!((failing(&world).len(), world.server.connections()), (3, 0));
    let id = world.publish(&job(Some("fine"))).await;
    world.state(Some("fine"), id, State::Sent).await;
    worker.ready().await;
    worker.stop().await;
    world.end().await;
}

#[tokio::test]
async fn two_workers_park_one_organizations_mail_and_say_so_once() {
    let world = World::new().await;
    let (one, other) = tokio::join!(world.worker(), world.worker());
    let server = with_wrong_password(&world, "acme").await;
    publish(&world, "acme", 200).await;
    parked(&world, "acme", 200).await;
    assert!(server.connections() <= 2, "one at most of each worker: {}", server.connections());
    announced(&world, "acme").await;
    let later = publish(&world, "acme", 20).await;
    parked(&world, "acme", 220).await;
    assert!(server.connections() <= 2);
    assert_eq!(failing(&world).len(), 1);
    began_once(&[&one, &other]).await;
    assert_eq!(world.status(Some("acme"), later[0]).await.map(|row| row.attempts), Some(0));
    one.stop().await;
    other.stop().await;
    world.end().await;
}

#[tokio::test]
async fn a_server_out_of_reach_is_retried_for_ten_minutes_and_then_its_mail_is_parked() {
    let mut world = World::new().await;
    world.set("SENDOFF__RETRY__SCHEDULE_S", "600,600,600");
    let worker = world.worker().await;
    let ip = own_address(6);
    let vacant = std::net::TcpListener::bind((ip, 0)).expect("a free port");
    let port = vacant.local_addr().expect("bound").port();
    drop(vacant);
    world.organization_at("acme", json!({"host": ip.to_string(), "port": port})).await;
    // It has taken mail before.
    world.database.run("UPDATE smtp_configs SET worked_at = now(), proven = true").await;
    let id = world.publish(&job(Some("acme"))).await;
    let row = world.state(Some("acme"), id, State::Deferred).await;
    assert_eq!((row.reason, row.attempts), (Some(Reason::ConnectFailed), 1));
    assert_eq!(count(&world, "FROM jobs WHERE spared = 0").await, 1, "it is charged");
    assert_eq!(count(&world, "FROM smtp_configs WHERE unreachable_since IS NOT NULL").await, 1);
    world.retry_now(600, id).await;
    eventually("it was tried again", async || {
        world
            .status(Some("acme"), id)
            .await
            .is_some_and(|row| row.attempts == 2 && row.state == State::Deferred)
    })
    .await;
    not_failing(&world).await;
    world.database.run("UPDATE smtp_configs SET unreachable_since = now() - interval '11 minutes'").await;
    world.retry_now(600, id).await;
    parked(&world, "acme", 1).await;
    assert_eq!(announced(&world, "acme").await["reason"], "connect_failed");
    worker.stop().await;
    world.end().await;
}

#[tokio::test]
async fn a_server_that_is_reached_in_between_is_not_out_of_reach() {
    let world = World::new().await;
    let worker = world.worker().await;
    world.organization("acme").await;
    world.database.run("UPDATE smtp_configs SET unreachable_since = now() - interval '11 minutes'").await;
    world.server.rule(Rule::new(Stage::Rcpt, Action::reply("550 5.1.1 nobody there")));
    let id = world.publish(&job(Some("acme"))).await;
    world.state(Some("acme"), id, State::Dead).await;
    eventually("it is forgotten", async || {
        count(&world, "FROM smtp_configs WHERE unreachable_since IS NULL").await == 1
    })
    .await;
    not_failing(&world).await;
    worker.stop().await;
    world.end().await;
}

#[tokio::test]
async fn with_the_feature_off_a_failing_configuration_is_not_in_the_way() {
    let world = World::new().await;
    let worker = world.worker().await;
    let server = with_wrong_password(&world, "acme").await;
    publish(&world, "acme", 1).await;
    parked(&world, "acme", 1).await;
    let off = json!({"feature": "custom-smtp-for-orgs", "enabled": false});
    world.commanded("feature.set", "acme", off).await;
    let id = world.publish(&job(Some("acme"))).await;
    assert_eq!(world.event("email.sent", id).await["transport"], "platform");
    assert_eq!(server.connections(), 1);
    worker.stop().await;
    world.end().await;
}

#[tokio::test]
async fn the_platforms_account_is_retried_and_its_attempts_are_charged() {
    let world = World::new().await;
    let worker = world.worker().await;
    world.platform.rule(Rule::new(Stage::Mail, Action::reply("530 5.7.0 log in first")).once());
    let id = world.publish(&job(None)).await;
    assert_eq!(world.story(id).await, "deferred auth_failed, sent");
    assert_eq!(count(&world, "FROM jobs WHERE attempts = 2 AND spared = 0").await, 1);
    worker.stop().await;
    world.end().await;
}

#[tokio::test]
async fn temporary_trouble_while_logging_in_is_nobodys_fault() {
    let world = World::new().await;
    let worker = world.worker().await;
    let last_words = |words: &str| Action::ReplyThenClose(words.as_bytes().to_vec());
    for (id, action) in [
        ("later", Action::reply("454 4.7.0 temporary authentication failure")),
        ("closing", last_words("421 4.7.0 try again later")),
        ("lost", Action::Close),
    ] {
        let _server = world.with_rules(id, [Rule::new(Stage::Auth, action).once()]).await;
        let job = world.publish(&job(Some(id))).await;
        let story = world.story(job).await;
        assert!(story.starts_with("deferred ") && story.ends_with(", sent"), "{id}: {story}");
    }
    assert_eq!(count(&world, "FROM smtp_configs WHERE strikes > 0").await, 0);
    not_failing(&world).await;
    worker.stop().await;
    world.end().await;
}

#[tokio::test]
async fn what_would_not_be_sent_anyway_is_not_parked() {
    let world = World::new().await;
    let worker = world.worker().await;
    let server = with_wrong_password(&world, "acme").await;
    let booking = |sequence: i64| {
        let mut job = job(Some("acme"));
        (job["group"], job["sequence"]) = (json!("uid-1"), json!(sequence));
        job
    };
    let newer = booking(2);
    let id = world.publish(&newer).await;
    parked(&world, "acme", 1).await;
    let mut late = job(Some("acme"));
    late["expires_at"] = json!("2026-01-01T00:00:00Z");
    let (late, older) = (world.publish(&late).await, world.publish(&booking(1)).await);
    assert_eq!(world.state(Some("acme"), late, State::Dead).await.reason, Some(Reason::Expired));
    assert_eq!(world.state(Some("acme"), older, State::Dead).await.reason, Some(Reason::Superseded));
    let mut old = job(Some("acme"));
    old["kind"] = json!("booking.old");
    let first_at = "2026-01-01T00:00:00Z".as_bytes().into();
    let mut headers = lapin::types::FieldTable::default();
    headers.insert("sendoff-first-at".into(), lapin::types::AMQPValue::LongString(first_at));
    let properties = lapin::BasicProperties::default().with_headers(headers);
    let old = world.publish_with(&old, properties).await;
    assert_eq!(world.state(Some("acme"), old, State::Dead).await.reason, Some(Reason::RetriesExhausted));

    let again = world.publish(&newer).await;
    assert_eq!(again, id);
    let duplicates = "sendoff_jobs_settled_total{lane=\"notifications\",outcome=\"duplicate\"}";
    eventually("the second copy is known", async || worker.metric(duplicates).await >= 1.0).await;
    parked(&world, "acme", 1).await;
    assert_eq!((world.event_count("email.parked", id), server.connections()), (1, 1));
    worker.stop().await;
    world.end().await;
}

#[tokio::test]
async fn a_job_that_some_have_is_parked_for_the_others() {
    let world = World::new().await;
    let worker = world.worker().await;
    let refuse_later = |moment: &crate::support::smtp_server::Moment<'_>| moment.session > 0;
    let rules = [
        Rule::new(Stage::Rcpt, Action::reply("451 4.7.1 greylisted")).of("bob@customer.example").once(),
        Rule::new(Stage::Auth, Action::reply("535 5.7.8 no")).when(refuse_later),
    ];
    let server = world.with_rules("acme", rules).await;
    server.change(|behaviour| behaviour.closes_after_messages = Some(1));
    let mut two = job(Some("acme"));
    two["to"] = json!(["ann@customer.example", "bob@customer.example"]);
    let id = world.publish(&two).await;
    parked(&world, "acme", 1).await;
    let row = world.state(Some("acme"), id, State::Parked).await;
    assert!(row.message_id.is_some_and(|message_id| message_id.ends_with("@acme.example>")));
    assert_eq!((server.connections(), server.messages().len()), (3, 1));
    let letter = world.letter(id).await;
    assert_eq!((letter.state, letter.recipients), (LetterState::Parked, Some(vec![1])));
    assert_eq!(world.event_count("email.sent", id), 0);
    worker.stop().await;
    world.end().await;
}

#[tokio::test]
async fn a_person_is_told_why_a_job_is_parked_and_what_comes_next() {
    let world = World::new().await;
    let worker = world.worker().await;
    let _server = with_wrong_password(&world, "acme").await;
    let id = publish(&world, "acme", 1).await[0];
    parked(&world, "acme", 1).await;
    let id = id.to_string();
    let (code, status, _) = world.run(&["job", "status", &id, "--org", "acme"]).await;
    let (shown_code, shown, _) = world.run(&["dead", "show", &id, "--org", "acme"]).await;
    assert_eq!((code, shown_code), (0, 0), "{status}{shown}");
    assert!(status.contains("It waits for its organization's configuration since"), "{status}");
    assert!(shown.contains("It was parked at"), "{shown}");
    for told in [&status, &shown] {
        for words in
            ["because the server refused user name or password (auth_failed)", "sendoff org smtp show acme"]
        {
            assert!(told.contains(words), "{words}: {told}");
        }
        assert!(!told.contains("It died"), "{told}");
    }
    let (_, listed, _) = world.run(&["dead", "list", "--state", "parked", "--json"]).await;
    let listed: Value = serde_json::from_str(&listed).expect("JSON");
    assert_eq!((&listed[0]["id"], &listed[0]["state"]), (&json!(id), &json!("parked")));
    let status: Value = world.commanded("job.status", "acme", json!({"id": id})).await;
    assert_eq!((&status["state"], &status["reason"]), (&json!("parked"), &json!("auth_failed")));
    worker.stop().await;
    world.end().await;
}

#[cfg(feature = "fault-injection")]
mod faults {
    use super::*;

    fn faulty(fault: &str) -> Value {
        let mut job = job(Some("acme"));
        job["kind"] = json!(format!("fault.{fault}"));
        job
    }

    #[tokio::test]
    async fn a_worker_that_is_killed_before_it_hands_a_parked_job_over_leaves_that_to_the_next_one() {
        let world = World::new().await;
        let worker = world.worker().await;
        let server = with_wrong_password(&world, "acme").await;
        let id = world.publish(&faulty("hand-over.abort")).await;
        worker.ended().await;
        world.state(Some("acme"), id, State::Parked).await;
        assert_eq!(count(&world, "FROM dead_letters").await, 0);
        let next = world.worker().await;
        parked(&world, "acme", 1).await;
        assert_eq!(world.event("email.parked", id).await["reason"], "auth_failed");
        assert_eq!((world.event_count("email.dead", id), server.connections()), (0, 1));
        next.stop().await;
        world.broker.wait_count(&world.broker.name("jobs.notifications"), 0).await;
        world.end().await;
    }

    #[tokio::test]
    async fn a_panic_over_a_job_that_is_being_parked_keeps_it_parked() {
        let world = World::new().await;
        let worker = world.worker().await;
        let server = with_wrong_password(&world, "acme").await;
        // The first one is tried, the others arrive while the configuration is known to fail.
        let faults = [
            "record.panic-once",
            "claimed.panic-once",
            "record.panic",
            "hand-over.panic-once",
            "hand-over.panic",
        ];
        for (index, fault) in faults.into_iter().enumerate() {
            let id = world.publish(&faulty(fault)).await;
            parked(&world, "acme", index as i64 + 1).await;
            assert_eq!(world.event("email.parked", id).await["reason"], "auth_failed", "{fault}");
            assert_eq!(world.event_count("email.dead", id), 0, "{fault}");
        }
        assert_eq!(server.connections(), 1);
        assert!(worker.metric("sendoff_panics_total").await > 0.0);
        worker.stop().await;
        world.end().await;
    }
}
