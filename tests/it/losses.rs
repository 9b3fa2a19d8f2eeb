//! Connections that are lost, silent, slow or too loud, before and after the final dot.
//! Guarantee: before the dot the job is sent once all the same; after it, never more often than its publisher allows.

use std::time::{Duration, Instant};

use futures_util::{StreamExt, stream};
use sendoff::model::failure::Reason;
use sendoff::model::ledger::State;
use serde_json::{Value, json};

use crate::support::broker::eventually;
use crate::support::smtp_server::{Action, Rule, SmtpServer, Stage};
use crate::support::story::Letters;
use crate::support::world::{SOON, World, job, own_address};

/// More than the buffers between two programs hold: its sender cannot run ahead of a server that does not read.
const LARGE_BYTES: usize = 8 << 20;

/// A job of which nothing may be unknown.
fn careful_job(organization: &str) -> Value {
    let mut job = job(Some(organization));
    job["on_unknown"] = json!("hold");
    job
}

/// The same with so much text.
fn large_job(organization: &str) -> Value {
    let mut job = careful_job(organization);
    job["text"] = json!("All work and no play makes Jack a dull boy.\n".repeat(LARGE_BYTES / 44));
    job
}

/// How long a silent server is waited for where that is the case: longer than what a healthy one needs for any reply, as
/// a rule, while the machine is busy with other tests.
const PATIENCE_S: &str = "6";

/// Runs jobs side by side, each on an organization with a server that misbehaves once in the given way, and expects
/// that each is sent once, at the next attempt, after that reason. Where silence has a limit, a machine too busy to answer
/// within it is as good as silent: there may then be attempts between that timed out.
async fn check_retried(cases: Vec<(&str, Rule, &str)>) {
    let mut world = World::new().await;
    let limited = cases.iter().any(|(_, _, reason)| *reason == "timeout");
    if limited {
        world.set("SENDOFF__RETRY__SCHEDULE_S", "1,2,2,2,2");
        world.set("SENDOFF__SMTP__COMMAND_TIMEOUT_S", PATIENCE_S);
        world.set("SENDOFF__SMTP__DATA_TIMEOUT_S", PATIENCE_S);
    }
    let worker = world.worker().await;
    let set_up = cases.iter().map(async |(name, rule, _)| {
        let server = world.with_rules(name, [rule.clone().once()]).await;
        let job = if name.starts_with("large") { large_job(name) } else { careful_job(name) };
        (world.publish(&job).await, server)
    });
    let running: Vec<_> = stream::iter(set_up).buffered(3).collect().await;
    let mut wrong = Vec::new();
    for ((name, _, reason), (id, server)) in cases.iter().zip(&running) {
        let story = world.story(*id).await;
        let expected = format!("deferred {reason}");
        let mut events: Vec<&str> = story.split(", ").collect();
        let sent = events.pop() == Some("sent");
        let failed = events.len();
        let (as_expected, others): (Vec<&str>, Vec<&str>) =
            events.into_iter().partition(|event| *event == expected);
        let right = match limited {
            true => !as_expected.is_empty() && others.iter().all(|event| *event == "deferred timeout"),
            false => as_expected.len() == 1 && others.is_empty(),
        };
        if !(sent && right) {
            wrong.push(format!("{name}: {story}, not {expected}, sent"));
            continue;
        }
        assert_eq!(server.messages().len(), 1, "{name}");
        let row = world.state(Some(name), *id, State::Sent).await;
        assert_eq!((row.attempts as usize, row.history.len()), (failed + 1, failed + 1), "{name}");
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    worker.stop().await;
    world.end().await;
}

#[tokio::test]
async fn a_job_whose_server_goes_away_before_the_final_dot_is_sent_once_later() {
    let gone = |stage| Rule::new(stage, Action::Close);
    check_retried(vec![
        ("banner", gone(Stage::Banner), "connection_lost"),
        ("ehlo", gone(Stage::Ehlo), "connection_lost"),
        ("starttls", gone(Stage::Starttls), "connection_lost"),
        ("auth", gone(Stage::Auth), "connection_lost"),
        ("mail", gone(Stage::Mail), "connection_lost"),
        ("rcpt", gone(Stage::Rcpt), "connection_lost"),
        ("data", gone(Stage::Data), "connection_lost"),
        ("large", Rule::new(Stage::Body, Action::CloseAfterBytes(1000)), "connection_lost"),
    ])
    .await;
}

#[tokio::test]
async fn a_job_whose_server_says_nothing_is_given_up_in_time_and_sent_once_later() {
    let silent = |stage| Rule::new(stage, Action::Silence);
    check_retried(vec![
        ("banner", silent(Stage::Banner), "timeout"),
        ("ehlo", silent(Stage::Ehlo), "timeout"),
        ("auth", silent(Stage::Auth), "timeout"),
        ("mail", silent(Stage::Mail), "timeout"),
        ("rcpt", silent(Stage::Rcpt), "timeout"),
        ("data", silent(Stage::Data), "timeout"),
        ("large", silent(Stage::Body), "timeout"),
    ])
    .await;
}

#[tokio::test]
async fn what_is_not_smtp_is_not_taken_for_a_reply_and_a_reply_in_another_charset_is_one() {
    let says = |stage, bytes: &[u8]| Rule::new(stage, Action::Reply(bytes.to_vec()));
    check_retried(vec![
        ("another-protocol", says(Stage::Banner, b"HTTP/1.1 400 Bad Request"), "protocol_error"),
        ("no-code", says(Stage::Ehlo, b"hello"), "protocol_error"),
        ("half-a-code", says(Stage::Mail, b"25 ok"), "protocol_error"),
        (
            "success-for-data",
            Rule::new(Stage::Data, Action::ReplyThenClose(b"250 ok".into())),
            "protocol_error",
        ),
        ("latin-1", says(Stage::Mail, b"451 4.3.0 sp\xe4ter"), "server_error"),
        ("latin-1-banner", says(Stage::Banner, b"450 4.3.2 sp\xe4ter"), "server_error"),
    ])
    .await;
}

#[tokio::test]
async fn a_reply_that_drips_is_cut_off_and_the_job_is_sent_once_later() {
    let dripping = |reply: &[u8]| Action::Drip(reply.to_vec(), Duration::from_secs(1));
    check_retried(vec![
        ("dripping-banner", Rule::new(Stage::Banner, dripping(b"220 mail.test ESMTP")), "timeout"),
        ("dripping-mail", Rule::new(Stage::Mail, dripping(b"250 2.1.0 sender ok")), "timeout"),
    ])
    .await;
}

#[tokio::test]
async fn a_reply_that_never_ends_is_cut_off_and_the_job_is_sent_once_later() {
    check_retried(vec![
        ("huge-banner", Rule::new(Stage::Banner, Action::HugeLine(64 << 20)), "protocol_error"),
        ("huge-ehlo", Rule::new(Stage::Ehlo, Action::HugeLine(64 << 20)), "protocol_error"),
        ("huge-mail", Rule::new(Stage::Mail, Action::HugeLine(64 << 20)), "protocol_error"),
        ("endless-ehlo", Rule::new(Stage::Ehlo, Action::EndlessReply), "protocol_error"),
        ("endless-rcpt", Rule::new(Stage::Rcpt, Action::EndlessReply), "protocol_error"),
    ])
    .await;
}

/// How often the server has taken that message.
fn copies(server: &SmtpServer, id: uuid::Uuid) -> usize {
    server.messages().iter().filter(|message| message.text().contains(&id.to_string())).count()
}

#[tokio::test]
async fn an_unknown_outcome_is_sent_again_once_or_held_as_the_publisher_wishes() {
    let taken = || Rule::new(Stage::FinalDot, Action::AcceptThenClose);
    let lost = || Rule::new(Stage::FinalDot, Action::Close);
    let go_ahead = || Rule::new(Stage::FinalDot, Action::reply("354 go on"));
    check_unknown(
        World::new().await,
        &[
            ("once", "resend", taken().once(), "deferred unknown_outcome, sent", 2),
            ("not-taken", "resend", lost().once(), "deferred unknown_outcome, sent", 1),
            ("go-ahead", "resend", go_ahead().once(), "deferred unknown_outcome, sent", 2),
            ("twice", "resend", taken().times(2), "deferred unknown_outcome, dead unknown_outcome", 2),
            ("hold", "hold", taken(), "dead unknown_outcome", 1),
        ],
    )
    .await;
}

#[tokio::test]
async fn a_final_reply_that_does_not_come_in_time_leaves_the_outcome_unknown() {
    let mut world = World::new().await;
    world.set("SENDOFF__SMTP__FINAL_REPLY_TIMEOUT_S", "15");
    let silent = || Rule::new(Stage::FinalDot, Action::Silence);
    check_unknown(
        world,
        &[
            ("silent", "resend", silent().once(), "deferred unknown_outcome, sent", 1),
            ("hold-silent", "hold", silent(), "dead unknown_outcome", 0),
        ],
    )
    .await;
}

/// Organizations whose servers leave it open whether they have taken a message: name, the publisher's wish, the rule, the
/// job's story, and how often the server took it.
async fn check_unknown(world: World, cases: &[(&str, &str, Rule, &str, usize)]) {
    let worker = world.worker().await;
    let set_up = cases.iter().map(async |(name, on_unknown, rule, ..)| {
        let server = world.with_rules(name, [rule.clone()]).await;
        let mut job = job(Some(name));
        job["on_unknown"] = json!(on_unknown);
        (world.publish(&job).await, server)
    });
    let running: Vec<_> = stream::iter(set_up).buffered(3).collect().await;
    let mut letters = Letters::default();
    for ((name, _, _, story, times), (id, server)) in cases.iter().zip(&running) {
        assert_eq!(world.story(*id).await, *story, "{name}");
        assert_eq!(copies(server, *id), *times, "{name}");
        let dead = story.ends_with("dead unknown_outcome");
        if dead {
            let letter = letters.of(&world, *id).await;
            assert_eq!(letter.text("sendoff-reason").as_deref(), Some("unknown_outcome"), "{name}");
        }
        let state = if dead { State::Dead } else { State::Sent };
        let row = world.state(Some(name), *id, state).await;
        assert_eq!(row.reason, dead.then_some(Reason::UnknownOutcome), "{name}");
    }
    assert_eq!(letters.left(&world).await, 0);
    worker.stop().await;
    world.end().await;
}

#[tokio::test]
async fn a_final_reply_that_takes_longer_than_any_other_may_is_still_a_success() {
    let mut world = World::new().await;
    world.set("SENDOFF__SMTP__COMMAND_TIMEOUT_S", "15");
    let worker = world.worker().await;
    world.organization("acme").await;
    world.server.rule(Rule::new(Stage::FinalDot, Action::After(Duration::from_secs(17))));
    let published = Instant::now();
    let id = world.publish(&job(Some("acme"))).await;
    assert_eq!(world.story(id).await, "sent");
    assert!(published.elapsed() >= Duration::from_secs(17));
    assert_eq!(world.server.messages().len(), 1);
    assert_eq!(world.state(Some("acme"), id, State::Sent).await.attempts, 1);
    worker.stop().await;
    world.end().await;
}

#[tokio::test]
async fn a_kept_connection_that_the_server_has_closed_meanwhile_costs_no_attempt() {
    let world = World::new().await;
    let worker = world.worker().await;
    let second_mail = |action| Rule::new(Stage::Mail, action).nth(2);
    // After a refused recipient the transaction is half open: the next one begins with RSET.
    let refusal = || Rule::new(Stage::Rcpt, Action::reply("550 5.1.1 nobody there")).once();
    let at_rset = |action| [refusal(), Rule::new(Stage::Rset, action)];
    let closing = Action::ReplyThenClose(b"421 4.4.2 idle for too long".into());
    let servers = [
        ("closes", world.with_server("closes", |server| server.closes_after_messages = Some(1)).await),
        ("says-421", world.with_server("says-421", |server| server.messages_per_session = Some(1)).await),
        ("lost-at-mail", world.with_rules("lost-at-mail", [second_mail(Action::Close)]).await),
        ("hangs-up", world.with_server("hangs-up", |_| {}).await),
        ("lost-at-rset", world.with_rules("lost-at-rset", at_rset(Action::Close)).await),
        ("421-at-rset", world.with_rules("421-at-rset", at_rset(closing)).await),
    ];
    for (name, server) in &servers {
        let first = world.publish(&job(Some(name))).await;
        let expected = if name.ends_with("rset") { "dead recipients_refused" } else { "sent" };
        assert_eq!(world.story(first).await, expected, "{name}");
        if *name == "hangs-up" {
            server.hang_up("421 4.4.2 idle for too long\r\n");
            let closed = server.wait_for(SOON, |seen| seen.open_sessions() == 0).await;
            closed.expect("the session is closed");
        }
        let second = world.publish(&job(Some(name))).await;
        assert_eq!(world.story(second).await, "sent", "{name}");
        let row = world.state(Some(name), second, State::Sent).await;
        assert_eq!((row.attempts, server.connections(), copies(server, second)), (1, 2, 1), "{name}");
    }
    worker.stop().await;
    world.end().await;
}

#[tokio::test]
async fn a_server_that_nobody_answers_at_is_tried_again_and_found_when_it_is_back() {
    let mut world = World::new().await;
    world.set("SENDOFF__RETRY__SCHEDULE_S", "120");
    let worker = world.worker().await;
    let ip = own_address(3);
    let vacant = std::net::TcpListener::bind((ip, 0)).expect("a free port");
    let address = vacant.local_addr().expect("bound");
    drop(vacant);
    world.organization_at("acme", json!({"host": ip.to_string(), "port": address.port()})).await;
    let id = world.publish(&job(Some("acme"))).await;
    let deferred = world.event("email.deferred", id).await;
    assert_eq!(deferred["reason"], "connect_failed");
    let certificate = world.authority.issue(&[&ip.to_string()]).server_config();
    let server = SmtpServer::start_at(address, |behaviour| {
        behaviour.tls = crate::support::smtp_server::Tls::Starttls(certificate);
    })
    .await;
    world.retry_now(120, id).await;
    eventually("the job arrives", async || !server.messages().is_empty()).await;
    world.state(Some("acme"), id, State::Sent).await;
    worker.stop().await;
    world.end().await;
}
