//! Parked jobs on their way out, with real workers: probes, releases, burials, and what is announced of them.
//! Guarantee: whatever ends a worker in the middle, each job is sent once or dies once.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use sendoff::clock::Clock;
use sendoff::model::event::RefusedRecipient;
use sendoff::model::failure::Reason;
use sendoff::model::job::JobKey;
use sendoff::model::ledger::State;
use sendoff::model::letter::{Deed, Fate, LetterState, NewLetter};
use sendoff::model::organization::OrganizationId;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::support::broker::{eventually, eventually_within};
use crate::support::database::TestDatabase;
use crate::support::letters::new_letter;
use crate::support::smtp_server::{Action, Behaviour, Rule, SmtpServer, Stage};
use crate::support::world::{PASSWORD, SOON, World, job};

/// For many jobs on a machine that is busy with other tests.
const A_WHILE: Duration = Duration::from_secs(180);

pub(crate) fn id_of(job: &Value) -> Uuid {
    job["id"].as_str().and_then(|id| id.parse().ok()).expect("a job of a test has an id")
}

/// The letter of a job that was parked so many seconds ago, for its organization's password was refused.
pub(crate) fn parked_letter(job: &Value, ago_s: u64) -> NewLetter {
    let body = serde_json::to_vec(job).expect("JSON");
    let organization = job["organization_id"].as_str().map(|id| OrganizationId::parse(id).expect("an id"));
    let died_at = Clock::system().now() - Duration::from_secs(ago_s);
    let expires_at = job["expires_at"].as_str().map(|at| {
        time::OffsetDateTime::parse(at, &time::format_description::well_known::Rfc3339).expect("a time")
    });
    let revision = job["group"].as_str().map(|group| sendoff::model::job::Revision {
        group: group.to_owned(),
        sequence: job["sequence"].as_i64().expect("a sequence"),
    });
    NewLetter {
        fate: Fate::Parked,
        reason: Reason::AuthFailed,
        detail: Some("the server answered 535".into()),
        first_at: Some(died_at),
        expires_at,
        revision,
        ..new_letter(JobKey { organization, id: id_of(job) }, body, died_at)
    }
}

/// Parks jobs as a worker does, the first one the longest ago: in the ledger and in the archive.
pub(crate) async fn park(world: &World, jobs: &[Value]) {
    let count = jobs.len() as u64;
    let letters: Vec<NewLetter> =
        (0..).zip(jobs).map(|(nth, job)| parked_letter(job, 60 + count - nth)).collect();
    for some in letters.chunks(500) {
        world.archive().archive(some).await.expect("archived");
    }
    world.database.run(ENTER_PARKED).await;
}

pub(crate) const ENTER_PARKED: &str = "
INSERT INTO jobs (id, organization_id, body_hash, state, turn, owner, attempts, spared, first_at, updated_at, reason, detail)
SELECT job_id, organization_id, body_hash, 'parked', turn, 0, attempts, attempts, first_at, died_at, reason, detail
FROM dead_letters WHERE state = 'parked' ON CONFLICT DO NOTHING";

pub(crate) fn jobs(organization: &str, count: usize) -> Vec<Value> {
    (0..count).map(|_| job(Some(organization))).collect()
}

/// Makes a configuration fail as its server's refusals would, with its next probe in so many seconds.
pub(crate) async fn fail(world: &World, organization: &str, probe_in_s: i64) {
    world
        .database
        .run(format!(
            "UPDATE smtp_configs SET failing_since = now(), failing_reason = 'auth_failed', failing_hint = 'Ask.', \
             announce_at = NULL, strikes = 2, long_probes = 1, \
             next_probe_at = now() + {probe_in_s} * interval '1 second' WHERE organization_id = '{organization}'"
        ))
        .await;
}

pub(crate) async fn probe_now(world: &World, organization: &str) {
    world
        .database
        .run(format!(
            "UPDATE smtp_configs SET next_probe_at = now() WHERE organization_id = '{organization}'"
        ))
        .await;
}

/// Waits until so many probes were made since the last message was accepted.
async fn probed(world: &World, organization: &str, probes: i64) {
    let sql = format!(
        "SELECT (probes + long_probes)::bigint FROM smtp_configs WHERE organization_id = '{organization}'"
    );
    eventually(&format!("{probes} probes are made"), async || {
        world.database.number(sql.as_str()).await == probes
    })
    .await;
}

async fn is_failing(world: &World, organization: &str) -> bool {
    let sql = format!(
        "SELECT count(*) FROM smtp_configs WHERE organization_id = '{organization}' AND failing_since IS NOT NULL"
    );
    world.database.number(sql).await == 1
}

async fn count_of(world: &World, state: &str) -> i64 {
    world.database.number(format!("SELECT count(*) FROM dead_letters WHERE state = '{state}'")).await
}

pub(crate) async fn recovered(world: &World, organization: &str) -> u64 {
    let of =
        |event: &Value| event["type"] == "smtp_config.recovered" && event["organization_id"] == organization;
    world.events.wait_for(of, SOON).await["released"].as_u64().expect("a count")
}

/// Which jobs a server took, in order.
fn taken(server: &SmtpServer) -> Vec<Uuid> {
    let message_id = |text: String| {
        let (_, rest) = text.split_once("Message-ID: <").expect("a Message-ID");
        rest.split_once('@').and_then(|(id, _)| id.parse().ok()).expect("made of the job's id")
    };
    server.messages().iter().map(|message| message_id(message.text())).collect()
}

/// Each of these jobs once, and no other.
pub(crate) fn assert_once(server: &SmtpServer, jobs: &[Value]) {
    let (mut taken, mut expected) = (taken(server), jobs.iter().map(id_of).collect::<Vec<_>>());
    taken.sort_unstable();
    expected.sort_unstable();
    assert_eq!(taken, expected);
}

#[tokio::test]
async fn a_corrected_password_sends_everything_by_itself_oldest_first_and_says_how_many() {
    let world = World::new().await;
    let worker = world.worker().await;
    world.organization_at("acme", json!({"password": "wrong"})).await;
    fail(&world, "acme", 3600).await;
    let parked = jobs("acme", 12);
    park(&world, &parked).await;
    eventually("the gauge counts it", async || worker.metric("sendoff_organizations_parked").await > 0.0)
        .await;
    world.commanded("smtp_config.update", "acme", json!({"password": PASSWORD})).await;
    let mut last = None;
    for job in &parked {
        let id = id_of(job);
        let status = world.state(Some("acme"), id, State::Sent).await;
        assert_eq!(status.attempts, 2, "the one before, which was spared, and this one");
        eventually("it is marked", async || world.letter(id).await.state == LetterState::Replayed).await;
        let letter = world.letter(id).await;
        assert_eq!(letter.replays, 0);
        let [deed] = &letter.history[..] else { panic!("{:?}", letter.history) };
        assert_eq!((deed.what, deed.by.as_str()), (Deed::Release, "sendoff"));
        assert!(last <= Some(deed.at), "the oldest first");
        last = Some(deed.at);
    }
    assert_once(&world.server, &parked);
    assert_eq!(recovered(&world, "acme").await, 12);
    let open = "SELECT count(*) FROM recoveries";
    eventually("it is done with", async || world.database.number(open).await == 0).await;
    eventually("the gauge is down", async || worker.metric("sendoff_organizations_parked").await == 0.0)
        .await;
    // Their age goes on as if they had not been parked.
    let waited =
        "SELECT count(*) FROM jobs WHERE replayed_at - first_at >= interval '60 seconds' AND spared = 1";
    assert_eq!(world.database.number(waited).await, 12);
    worker.stop().await;
    world.end().await;
}

#[tokio::test]
async fn a_thousand_parked_jobs_cost_their_server_one_connection_for_each_probe() {
    let world = World::new().await;
    let (one, other) = (world.worker().await, world.worker().await);
    world.organization_at("acme", json!({"password": "wrong"})).await;
    fail(&world, "acme", 3600).await;
    let parked = jobs("acme", 1000);
    park(&world, &parked).await;
    for probe in 1..=4 {
        probe_now(&world, "acme").await;
        probed(&world, "acme", 1 + probe).await;
        // As often as a job would come meanwhile.
        let id = world.publish(&job(Some("acme"))).await;
        world.event("email.parked", id).await;
        assert_eq!(world.server.connections(), usize::try_from(probe).expect("few"));
    }
    assert_eq!(world.server.seen(|seen| seen.count("MAIL")), 0);
    assert_eq!(world.database.number("SELECT count(*) FROM jobs WHERE state = 'parked'").await, 1004);
    // A refused password: after 1, 4, then every 12 hours.
    let pause = "SELECT round(extract(epoch FROM next_probe_at - now()) / 3600)::bigint FROM smtp_configs";
    assert_eq!(world.database.number(pause).await, 12);
    one.stop().await;
    other.stop().await;
    world.end().await;
}

#[tokio::test]
async fn trouble_that_may_pass_says_nothing_about_a_configuration_and_a_verdict_does() {
    let world = World::with(|server| {
        let busy = "454 4.7.0 Temporary authentication failure";
        server.rule(Rule::new(Stage::Auth, Action::reply(busy)).once());
        server.rule(Rule::new(Stage::Auth, Action::Close).once());
        server.rule(Rule::new(Stage::Banner, Action::reply("421 4.3.2 Later")).once());
        server.rule(Rule::new(Stage::Auth, Action::reply("535 5.7.8 No")).once());
    })
    .await;
    let worker = world.worker().await;
    world.organization("acme").await;
    fail(&world, "acme", 3600).await;
    world.database.run("UPDATE smtp_configs SET failing_reason = 'tls_failed'").await;
    let reason = |name: &str| {
        format!("SELECT count(*) FROM smtp_configs WHERE failing_reason = '{name}' AND failing_hint = 'Ask.'")
    };
    for probe in 1..=3 {
        probe_now(&world, "acme").await;
        probed(&world, "acme", 1 + probe).await;
        assert!(is_failing(&world, "acme").await);
        assert_eq!(world.database.number(reason("tls_failed")).await, 1, "after probe {probe}");
    }
    probe_now(&world, "acme").await;
    probed(&world, "acme", 5).await;
    let verdict =
        "SELECT count(*) FROM smtp_configs WHERE failing_reason = 'auth_failed' AND failing_hint <> 'Ask.'";
    assert_eq!(world.database.number(verdict).await, 1);
    probe_now(&world, "acme").await;
    assert_eq!(recovered(&world, "acme").await, 0);
    assert!(!is_failing(&world, "acme").await);
    worker.stop().await;
    world.end().await;
}

#[tokio::test]
async fn a_server_that_turns_a_probe_away_before_the_login_is_tried_again_within_minutes() {
    let world = World::with(|server| {
        server.rule(Rule::new(Stage::Banner, Action::reply("421 4.3.2 Later")).once());
        server.rule(Rule::new(Stage::Banner, Action::Close).once());
        server.rule(Rule::new(Stage::Auth, Action::reply("454 4.7.0 Temporary failure")).once());
    })
    .await;
    let worker = world.worker().await;
    world.organization("acme").await;
    fail(&world, "acme", 3600).await;
    let minutes = "SELECT round(extract(epoch FROM next_probe_at - now()) / 60)::bigint FROM smtp_configs";
    for (probe, pause) in [(1, 5), (2, 10), (3, 240)] {
        probe_now(&world, "acme").await;
        probed(&world, "acme", 1 + probe).await;
        assert_eq!(world.database.number(minutes).await, pause, "after probe {probe}");
    }
    worker.stop().await;
    world.end().await;
}

#[tokio::test]
async fn a_slow_server_holds_up_no_other_probe() {
    let world = World::with(|server| server.rule(Rule::new(Stage::Banner, Action::Silence))).await;
    let worker = world.worker().await;
    world.organization("slow").await;
    let quick = world.with_server("quick", |_| {}).await;
    fail(&world, "slow", 0).await;
    world.server.wait_for(SOON, |seen| seen.sessions.len() == 1).await.expect("its probe begins");
    fail(&world, "quick", 0).await;
    assert_eq!(recovered(&world, "quick").await, 0);
    assert_eq!(quick.connections(), 1);
    assert!(is_failing(&world, "slow").await);
    worker.kill().await;
    world.end().await;
}

#[tokio::test]
async fn a_server_that_a_send_would_wait_for_is_waited_for_by_a_probe() {
    let go_on = std::sync::Arc::new(tokio::sync::Notify::new());
    let world = World::with(|server| {
        server.rule(Rule::new(Stage::Banner, Action::Hold(go_on.clone())).once());
    })
    .await;
    let worker = world.worker().await;
    world.organization("acme").await;
    fail(&world, "acme", 0).await;
    world.server.wait_for(SOON, |seen| seen.sessions.len() == 1).await.expect("its probe begins");
    // A minute for the connection, for TLS and for each reply: so long the probe is this worker's, and nobody else's.
    let held = "SELECT count(*) FROM smtp_configs WHERE next_probe_at > now() + interval '10 minutes'";
    assert_eq!(world.database.number(held).await, 1);
    go_on.notify_one();
    assert_eq!(recovered(&world, "acme").await, 0);
    assert_eq!(world.server.connections(), 1);
    worker.stop().await;
    world.end().await;
}

#[tokio::test]
async fn the_probe_of_a_worker_that_stops_is_given_back() {
    let world = World::with(|server| server.rule(Rule::new(Stage::Banner, Action::Silence).once())).await;
    let worker = world.worker().await;
    world.organization("acme").await;
    fail(&world, "acme", 0).await;
    world.server.wait_for(SOON, |seen| seen.sessions.len() == 1).await.expect("its probe begins");
    worker.stop().await;
    let due = "SELECT count(*) FROM smtp_configs WHERE failing_since IS NOT NULL AND next_probe_at <= now()";
    assert_eq!(world.database.number(due).await, 1);
    world.end().await;
}

#[tokio::test]
async fn letters_that_were_never_tried_park_again_when_the_account_is_refused_again() {
    let world = World::new().await;
    let worker = world.worker().await;
    world.organization("acme").await;
    fail(&world, "acme", 3600).await;
    park(&world, &jobs("acme", 20)).await;
    for table in ["jobs", "dead_letters"] {
        world.database.run(format!("UPDATE {table} SET reason = 'sender_refused'")).await;
    }
    let taken = Arc::new(AtomicBool::new(false));
    let refused = Rule::new(Stage::Rcpt, Action::reply("554 5.7.1 <ann>: Relay access denied"));
    world.server.rule(refused.when(move |_| taken.swap(true, Ordering::SeqCst)));
    world
        .database
        .run("UPDATE smtp_configs SET failing_since = NULL, failing_reason = NULL, worked_at = now(), strikes = 0")
        .await;
    let again = "SELECT count(*) FROM smtp_configs WHERE failing_reason = 'sender_refused'";
    eventually("it fails again", async || world.database.number(again).await == 1).await;
    eventually("all but one are parked again", async || count_of(&world, "parked").await == 19).await;
    let charged = "SELECT count(*) FROM jobs WHERE attempts <> spared";
    assert_eq!(world.database.number(charged).await, 1, "what was sent, and nothing else");
    worker.stop().await;
    world.end().await;
}

#[tokio::test]
async fn the_probe_of_a_worker_that_died_is_made_by_another() {
    let world = World::with(|server| server.rule(Rule::new(Stage::Banner, Action::Silence).once())).await;
    let first = world.worker().await;
    world.organization("acme").await;
    fail(&world, "acme", 0).await;
    world.server.wait_for(SOON, |seen| seen.sessions.len() == 1).await.expect("its probe begins");
    first.kill().await;
    let second = world.worker().await;
    assert!(is_failing(&world, "acme").await);
    // Its lease ends.
    probe_now(&world, "acme").await;
    recovered(&world, "acme").await;
    second.stop().await;
    world.end().await;
}

#[tokio::test]
async fn trouble_that_a_worker_died_over_is_announced_by_another() {
    let world = World::new().await;
    let worker = world.worker().await;
    world.organization("acme").await;
    fail(&world, "acme", 3600).await;
    world.database.run("UPDATE smtp_configs SET announce_at = now()").await;
    let event = world.events.wait_for(|event| event["type"] == "smtp_config.failing", SOON).await;
    assert_eq!((&event["reason"], &event["hint"]), (&json!("auth_failed"), &json!("Ask.")));
    let said = "SELECT count(*) FROM smtp_configs WHERE announce_at IS NULL";
    eventually("it is announced once", async || world.database.number(said).await == 1).await;
    worker.stop().await;
    world.end().await;
}

#[tokio::test]
async fn trouble_that_ended_before_it_was_announced_is_announced_before_its_end() {
    let world = World::new().await;
    let worker = world.worker().await;
    world.organization("acme").await;
    fail(&world, "acme", 3600).await;
    world.database.run("UPDATE smtp_configs SET announce_at = now() + interval '1 hour'").await;
    probe_now(&world, "acme").await;
    assert_eq!(recovered(&world, "acme").await, 0);
    let events = world.events.all();
    let about: Vec<_> = events
        .iter()
        .filter_map(|event| event["type"].as_str())
        .filter(|kind| ["smtp_config.failing", "smtp_config.recovered"].contains(kind))
        .collect();
    assert_eq!(about, ["smtp_config.failing", "smtp_config.recovered"]);
    worker.stop().await;
    world.end().await;
}

#[tokio::test]
async fn without_its_configuration_or_its_flag_an_organizations_parked_mail_takes_the_platforms_server() {
    let world = World::new().await;
    let worker = world.worker().await;
    for organization in ["gone", "flagged"] {
        world.organization(organization).await;
        fail(&world, organization, 3600).await;
        park(&world, &jobs(organization, 3)).await;
    }
    let stays = job(Some("stays"));
    world.organization("stays").await;
    fail(&world, "stays", 3600).await;
    park(&world, std::slice::from_ref(&stays)).await;
    world.commanded("smtp_config.delete", "gone", json!({})).await;
    world.platform.wait_for_messages(3, SOON).await.expect("sent");
    assert_eq!(recovered(&world, "gone").await, 3);
    let flag = json!({"feature": "custom-smtp-for-orgs", "enabled": false});
    world.commanded("feature.set", "flagged", flag).await;
    let messages = world.platform.wait_for_messages(6, SOON).await.expect("sent");
    assert!(messages.iter().all(|message| message.from == "no-reply@platform.example"));
    assert_eq!(world.letter(id_of(&stays)).await.state, LetterState::Parked);
    assert_eq!(world.server.connections(), 0);
    worker.stop().await;
    world.end().await;
}

#[tokio::test]
async fn an_organization_that_is_a_number_is_spelled_as_one_by_its_recovery_and_to_who_asks_so() {
    let world = World::new().await;
    let worker = world.worker().await;
    world.organization("4711").await;
    fail(&world, "4711", 3600).await;
    let parked = job(Some("4711"));
    park(&world, std::slice::from_ref(&parked)).await;
    probe_now(&world, "4711").await;
    world.received(1).await;
    let recovered =
        |event: &Value| event["type"] == "smtp_config.recovered" && event["organization_id"] == 4711;
    world.events.wait_for(recovered, SOON).await;
    for spelled in [json!(4711), json!("4711")] {
        let command =
            json!({"command": "job.status", "organization_id": spelled, "params": {"id": parked["id"]}});
        assert_eq!(world.answered(command).await["result"]["organization_id"], spelled);
    }
    worker.stop().await;
    world.end().await;
}

#[tokio::test]
async fn a_letter_that_is_archived_after_the_release_is_not_stuck() {
    let world = World::new().await;
    let worker = world.worker().await;
    world.organization("acme").await;
    fail(&world, "acme", 0).await;
    assert_eq!(recovered(&world, "acme").await, 0);
    let late = jobs("acme", 2);
    park(&world, &late).await;
    world.received(2).await;
    assert_once(&world.server, &late);
    worker.stop().await;
    world.end().await;
}

#[tokio::test]
async fn a_worker_that_is_killed_in_the_middle_of_a_release_loses_nothing_and_sends_nothing_twice() {
    let world = World::with(|server| server.rule(Rule::new(Stage::Banner, Action::Silence))).await;
    let first = world.worker().await;
    world.organization("acme").await;
    let parked = jobs("acme", 30);
    park(&world, &parked).await;
    let (released, sql) = (count_of, "SELECT count(*) FROM jobs WHERE state = 'claimed'");
    eventually("some are released, and none is sent", async || {
        released(&world, "replayed").await >= 3 && world.database.number(sql).await >= 1
    })
    .await;
    first.kill().await;
    // Recorded, and not published or not marked: a release that was cut off.
    let cut_off = "
        UPDATE dead_letters SET state = 'parked' WHERE letter IN (
            SELECT d.letter FROM dead_letters AS d JOIN jobs AS j ON j.id = d.job_id
            WHERE d.state = 'replayed' AND j.state = 'deferred' LIMIT 1)";
    world.database.run(cut_off).await;
    let unpublished = "
        WITH cut AS (
            UPDATE dead_letters SET replay_turn = turn + 1 WHERE letter IN (
                SELECT letter FROM dead_letters WHERE state = 'parked' AND replay_turn IS NULL
                ORDER BY died_at DESC LIMIT 1)
            RETURNING job_id)
        UPDATE jobs SET state = 'deferred', turn = turn + 1, not_before = now(), replayed_at = first_at, reason = NULL
        FROM cut WHERE id = cut.job_id";
    world.database.run(unpublished).await;
    world.server.change(Behaviour::clear_rules);
    let second = world.worker().await;
    let wait = world.server.wait_for(A_WHILE, |seen| seen.message_count >= 30);
    wait.await.expect("each is sent");
    eventually("all are marked", async || count_of(&world, "replayed").await == 30).await;
    for job in &parked {
        world.state(Some("acme"), id_of(job), State::Sent).await;
    }
    assert_once(&world.server, &parked);
    second.stop().await;
    world.end().await;
}

#[tokio::test]
async fn what_dies_while_it_is_parked_is_buried_although_its_organization_still_fails() {
    let mut world = World::new().await;
    world.set("SENDOFF__RETRY__PARKED_FOR_S", "3600");
    let worker = world.worker().await;
    world.organization("acme").await;
    fail(&world, "acme", 3600).await;
    let later = Clock::system().now() + Duration::from_secs(3600);
    let later = later.format(&time::format_description::well_known::Rfc3339).expect("a time");
    let with = |fields: Value| {
        let mut job = job(Some("acme"));
        for (key, value) in fields.as_object().expect("fields") {
            job[key] = value.clone();
        }
        job
    };
    let expiring = with(json!({"expires_at": later}));
    let older = with(json!({"group": "booking-1", "sequence": 1}));
    let (called_back, too_long, stays) = (with(json!({})), with(json!({})), with(json!({})));
    let partly = with(json!({"to": ["a@x.example", "b@x.example"], "expires_at": later}));
    let began = world.database.store().database_time().await.expect("the database answers");
    let all = [&expiring, &older, &called_back, &too_long, &stays, &partly].map(Clone::clone);
    park(&world, &all).await;
    let run = async |sql: String| world.database.run(sql).await;
    run(format!(
        "UPDATE jobs SET partly_sent = true, pending = '{{1}}', message_id = '<m@acme.example>' WHERE id = '{}'",
        id_of(&partly)
    ))
    .await;
    run("INSERT INTO job_groups (organization_id, name, sequence, updated_at) VALUES ('acme', 'booking-1', 2, now())".into()).await;
    run(format!(
        "UPDATE jobs SET state = 'cancelled', reason = 'cancelled' WHERE id = '{}'",
        id_of(&called_back)
    ))
    .await;
    run(format!(
        "UPDATE dead_letters SET died_at = now() - interval '3601 seconds' WHERE job_id = '{}'",
        id_of(&too_long)
    ))
    .await;
    run("UPDATE dead_letters SET expires_at = now() WHERE expires_at IS NOT NULL".into()).await;
    let cases = [
        (&expiring, "email.expired", Reason::Expired, State::Dead),
        (&older, "email.dead", Reason::Superseded, State::Dead),
        (&called_back, "email.dead", Reason::Cancelled, State::Cancelled),
        (&too_long, "email.dead", Reason::AuthFailed, State::Dead),
        (&partly, "email.expired", Reason::Expired, State::Sent),
    ];
    for (job, event, reason, state) in cases {
        let id = id_of(job);
        assert_eq!(world.event(event, id).await["reason"], reason.as_str());
        let status = world.state(Some("acme"), id, state).await;
        assert!(state != State::Dead || status.reason == Some(reason), "{status:?}");
        eventually("it is marked", async || world.letter(id).await.state == LetterState::Dead).await;
        let letter = world.letter(id).await;
        assert_eq!((letter.reason, letter.deaths), (reason, 1));
        assert!(letter.died_at >= began, "it died now");
        assert_eq!(world.event_count(event, id), 1);
    }
    let sent = world.event("email.sent", id_of(&partly)).await;
    let refused = RefusedRecipient { index: 1, code: 0, reason: Reason::Expired };
    assert_eq!(sent["recipients_refused"], json!([refused]));
    assert_eq!(sent["message_id"], "<m@acme.example>");
    assert_eq!(world.letter(id_of(&partly)).await.recipients, Some(vec![1]));
    let detail = world.letter(id_of(&too_long)).await.detail;
    assert_eq!(detail.as_deref(), Some("parked for more than 3600 s: the server answered 535"));
    assert_eq!(world.letter(id_of(&stays)).await.state, LetterState::Parked);
    let (_, listed, _) = world.run(&["dead", "list", "--state", "dead", "--json"]).await;
    let listed: Value = serde_json::from_str(&listed).expect("JSON");
    assert_eq!(listed.as_array().expect("an array").len(), 5);
    // None of them goes out when the organization's mail flows again.
    probe_now(&world, "acme").await;
    assert_eq!(recovered(&world, "acme").await, 1);
    world.received(1).await;
    assert_once(&world.server, std::slice::from_ref(&stays));
    worker.stop().await;
    world.end().await;
}

#[tokio::test]
async fn a_job_that_is_parked_again_and_again_waits_no_longer_than_one_that_is_parked_once() {
    let mut world = World::new().await;
    world.set("SENDOFF__RETRY__PARKED_FOR_S", "3600");
    let worker = world.worker().await;
    world.organization_at("acme", json!({"password": "wrong"})).await;
    fail(&world, "acme", 3600).await;
    let again = job(Some("acme"));
    park(&world, std::slice::from_ref(&again)).await;
    let since = async |seconds: u32| {
        let sql = format!("UPDATE dead_letters SET died_at = now() - {seconds} * interval '1 second'");
        world.database.run(sql).await;
    };
    since(2000).await;
    let turn = world.letter(id_of(&again)).await.turn;
    world.database.run("UPDATE smtp_configs SET failing_since = NULL, failing_reason = NULL").await;
    eventually("it is released, refused and parked again", async || {
        let letter = world.letter(id_of(&again)).await;
        letter.state == LetterState::Parked && letter.turn > turn && letter.replay_turn < Some(letter.turn)
    })
    .await;
    since(1700).await;
    assert_eq!(world.event("email.dead", id_of(&again)).await["reason"], "auth_failed");
    eventually("it is marked", async || world.letter(id_of(&again)).await.state == LetterState::Dead).await;
    worker.stop().await;
    world.end().await;
}

#[tokio::test]
async fn whatever_meets_a_release_each_job_is_sent_once_or_called_back() {
    let mut world = World::new().await;
    world.set("SENDOFF__RETRY__SCHEDULE_S", "1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1");
    let (mut first, second) = (world.worker().await, world.worker().await);
    world.organization("acme").await;
    fail(&world, "acme", 3600).await;
    let parked = jobs("acme", 120);
    park(&world, &parked).await;
    let recover =
        "UPDATE smtp_configs SET failing_since = NULL, failing_reason = NULL, worked_at = now(), strikes = 0";
    let deeds = "SELECT sum(jsonb_array_length(history)) FROM dead_letters";
    let open = "SELECT count(*) FROM jobs WHERE state NOT IN ('sent', 'cancelled')";
    let mut called_back = Vec::new();
    for round in 0..12_usize {
        let done = world.database.number(deeds).await;
        let refused = Rule::new(Stage::Auth, Action::reply("535 5.7.8 No")).times(2);
        world.server.change(|server| server.rule(refused));
        // Whoever released may have died, and another failure may come before the next one does.
        eventually("something is released, unless all have ended", async || {
            world.database.run(recover).await;
            world.database.number(deeds).await > done || world.database.number(open).await == 0
        })
        .await;
        // The publisher is not sure, and says it once more.
        for job in parked.iter().skip(round).step_by(12) {
            world.publish(job).await;
        }
        let id = id_of(&parked[119 - 3 * round]);
        let params = json!({"command": "job.cancel", "organization_id": "acme", "params": {"id": id}});
        if world.control(params).await["result"]["cancelled"] == 1 {
            called_back.push(id);
        }
        world.run(&["dead", "replay", "--json", "--all"]).await;
        if round == 6 {
            first.kill().await;
            first = world.worker().await;
        }
    }
    world.server.change(Behaviour::clear_rules);
    let ended = async || {
        world.database.run(recover).await;
        world.run(&["dead", "replay", "--json", "--all"]).await;
        world.database.number(open).await == 0
    };
    eventually_within(A_WHILE, "each job has ended", ended).await;
    let mut expected = Vec::new();
    for job in parked {
        let status = world.status(Some("acme"), id_of(&job)).await.expect("a row");
        // What it was too late for may still have been stopped.
        if status.state == State::Sent {
            expected.push(job);
        }
    }
    assert!(!called_back.is_empty());
    assert!(
        expected.iter().all(|job| !called_back.contains(&id_of(job))),
        "what was called back is not sent"
    );
    assert_once(&world.server, &expected);
    eventually("no letter waits", async || count_of(&world, "parked").await == 0).await;
    first.stop().await;
    second.stop().await;
    world.end().await;
}

#[tokio::test]
async fn a_death_that_is_recorded_and_not_announced_is_announced_by_whoever_comes_next() {
    let world = World::new().await;
    let dead = job(Some("acme"));
    park(&world, std::slice::from_ref(&dead)).await;
    world.database.run("UPDATE jobs SET state = 'dead', reason = 'expired', detail = 'too late'").await;
    let worker = world.worker().await;
    assert_eq!(world.event("email.expired", id_of(&dead)).await["reason"], "expired");
    eventually("it is marked", async || world.letter(id_of(&dead)).await.state == LetterState::Dead).await;
    let letter = world.letter(id_of(&dead)).await;
    assert_eq!((letter.reason, letter.detail.as_deref()), (Reason::Expired, Some("too late")));
    worker.stop().await;
    world.end().await;
}

#[tokio::test]
async fn another_failure_ends_a_release_and_the_rest_goes_with_the_next_recovery() {
    let world = World::new().await;
    let worker = world.worker().await;
    world.organization("acme").await;
    fail(&world, "acme", 3600).await;
    let parked = jobs("acme", 300);
    park(&world, &parked).await;
    probe_now(&world, "acme").await;
    world.received(5).await;
    fail(&world, "acme", 3600).await;
    let first = recovered(&world, "acme").await;
    assert!((5..300).contains(&first), "{first}");
    let stopped = count_of(&world, "parked").await;
    // A round goes by.
    let other = job(Some("other"));
    park(&world, std::slice::from_ref(&other)).await;
    world.state(Some("other"), id_of(&other), State::Sent).await;
    assert!(count_of(&world, "parked").await >= stopped, "nothing was released meanwhile");
    probe_now(&world, "acme").await;
    let wait = world.server.wait_for(A_WHILE, |seen| seen.message_count >= 300);
    wait.await.expect("each is sent");
    assert_once(&world.server, &parked);
    worker.stop().await;
    world.end().await;
}

#[tokio::test]
async fn other_organizations_mail_flows_while_thousands_of_letters_are_released() {
    let world = World::new().await;
    let worker = world.worker().await;
    world.organization("many").await;
    let few = world.with_server("few", |_| {}).await;
    let others = world.with_server("others", |_| {}).await;
    park(&world, &jobs("many", 2000)).await;
    world.received(10).await;
    // Parked later, and not behind all of them.
    park(&world, &jobs("few", 5)).await;
    for _ in 0..10 {
        let id = world.publish(&job(Some("others"))).await;
        world.event("email.sent", id).await;
    }
    few.wait_for_messages(5, SOON).await.expect("sent");
    assert_eq!(others.messages().len(), 10);
    let waiting = "SELECT count(*) FROM dead_letters WHERE state = 'parked' AND organization_id = 'many'";
    assert!(world.database.number(waiting).await > 0, "the release of the many goes on");
    worker.kill().await;
    world.end().await;
}

#[tokio::test]
async fn a_letter_that_cannot_be_opened_stays_and_stops_nobody_else() {
    let world = World::new().await;
    let worker = world.worker().await;
    world.organization("acme").await;
    fail(&world, "acme", 3600).await;
    let parked = jobs("acme", 4);
    park(&world, &parked).await;
    let damaged = id_of(&parked[0]);
    world
        .database
        .run(format!("UPDATE dead_letters SET body_sealed = '\\x00' WHERE job_id = '{damaged}'"))
        .await;
    probe_now(&world, "acme").await;
    world.received(3).await;
    assert_eq!(recovered(&world, "acme").await, 3);
    assert_once(&world.server, &parked[1..]);
    assert_eq!(world.letter(damaged).await.state, LetterState::Parked);
    let complaint = "a parked letter cannot be released";
    worker.logs(complaint).await;
    assert_eq!(worker.log().matches(complaint).count(), 1);
    worker.stop().await;
    world.end().await;
}

#[tokio::test]
async fn a_release_that_the_database_refuses_is_told_once_and_keeps_no_burial_and_no_recovery_back() {
    let world = World::new().await;
    let worker = world.worker().await;
    for organization in ["acme", "other", "fails"] {
        world.organization(organization).await;
        fail(&world, organization, 3600).await;
    }
    let (stays, mut dies) = (job(Some("acme")), job(Some("fails")));
    dies["expires_at"] = json!("2026-01-01T00:00:00Z");
    park(&world, std::slice::from_ref(&stays)).await;
    world
        .database
        .run(
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE EXCEPTION ''no''; END';
             CREATE TRIGGER refuse BEFORE UPDATE ON dead_letters FOR EACH ROW
                 WHEN (NEW.replay_turn IS DISTINCT FROM OLD.replay_turn) EXECUTE FUNCTION refuse()",
        )
        .await;
    probe_now(&world, "acme").await;
    let complaint = "the database refuses what is to be done with parked letters";
    worker.logs(complaint).await;
    park(&world, std::slice::from_ref(&dies)).await;
    world.event("email.expired", id_of(&dies)).await;
    probe_now(&world, "other").await;
    assert_eq!(recovered(&world, "other").await, 0);
    assert_eq!(worker.log().matches(complaint).count(), 1);
    assert_eq!(world.letter(id_of(&stays)).await.state, LetterState::Parked);
    world.database.run("DROP TRIGGER refuse ON dead_letters").await;
    world.received(1).await;
    worker.stop().await;
    world.end().await;
}

#[tokio::test]
async fn a_lease_has_one_holder_until_it_ends_or_is_given_back() {
    let database = TestDatabase::migrated().await;
    let (store, period) = (database.store(), Duration::from_secs(60));
    let [one, other] = [1, 2].map(Uuid::from_u128);
    let take = async |holder| store.take_lease("x", holder, period).await.expect("the database answers");
    assert!(take(one).await && take(one).await, "taken, and renewed");
    assert!(!take(other).await);
    store.give_back_lease("x", other).await.expect("the database answers");
    assert!(!take(other).await, "it was not the other's to give back");
    database.run("UPDATE leases SET expires_at = now()").await;
    assert!(take(other).await && !take(one).await);
    store.give_back_lease("x", other).await.expect("the database answers");
    assert!(take(one).await);
}

#[tokio::test]
async fn a_parked_letter_that_the_ledger_does_not_know_is_entered_and_sent() {
    let world = World::new().await;
    let worker = world.worker().await;
    world.organization("acme").await;
    let unknown = job(Some("acme"));
    world.archive().archive(&[parked_letter(&unknown, 60)]).await.expect("archived");
    world.received(1).await;
    world.state(Some("acme"), id_of(&unknown), State::Sent).await;
    eventually_within(SOON, "it is marked", async || count_of(&world, "replayed").await == 1).await;
    worker.stop().await;
    world.end().await;
}
