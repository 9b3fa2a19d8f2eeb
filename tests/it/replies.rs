//! Every class of reply at every phase, and what becomes of the job.
//! Guarantee: each case runs through the whole program; what is expected is told as the job's events in order.

use futures_util::{StreamExt, stream};
use sendoff::clock::Clock;
use sendoff::model::failure::{Phase, Reason};
use sendoff::model::ledger::State;
use serde_json::{Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::support::smtp_server::{Action, Rule, Stage};
use crate::support::story::Letters;
use crate::support::world::{World, job};

/// A phase, a reply given there once, and the job's story.
type Case = (Stage, &'static str, &'static str);

/// How a server gives its replies.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Manner {
    /// And goes on.
    GoesOn,
    /// And closes the connection.
    Closes,
    /// And goes on, one command at a time.
    WithoutPipelining,
}

/// Runs the cases side by side, an organization and a server each. A job that died or was parked was refused once and never
/// tried again, or it would have been sent: the server says its reply once only.
async fn check(cases: &[Case], manner: Manner) {
    let world = World::new().await;
    let worker = world.worker().await;
    let set_up = cases.iter().enumerate().map(async |(index, (stage, reply, _))| {
        let action = match manner {
            Manner::Closes => Action::ReplyThenClose(reply.as_bytes().to_vec()),
            Manner::GoesOn | Manner::WithoutPipelining => Action::reply(reply),
        };
        let organization = format!("case{index}");
        let server = world.with_rules(&organization, [Rule::new(*stage, action).once()]).await;
        server.change(|behaviour| behaviour.pipelining = manner != Manner::WithoutPipelining);
        (world.publish(&job(Some(&organization))).await, organization, server)
    });
    let running: Vec<_> = stream::iter(set_up).buffered(3).collect().await;
    let mut letters = Letters::default();
    let mut wrong = Vec::new();
    for ((stage, reply, expected), (id, organization, server)) in cases.iter().zip(&running) {
        let story = world.story(*id).await;
        if story != *expected {
            wrong.push(format!("{stage:?} {reply}: {story}, not {expected}"));
            continue;
        }
        let (dead, state) = match expected.split_once(' ') {
            Some(("dead", reason)) => (Some(reason), State::Dead),
            Some(("parked", reason)) => (Some(reason), State::Parked),
            _ => (None, State::Sent),
        };
        let row = world.state(Some(organization), *id, state).await;
        let (attempts, messages) = if dead.is_some() { (1, 0) } else { (2, 1) };
        assert_eq!((row.attempts, server.messages().len()), (attempts, messages), "{stage:?} {reply}");
        let ahead: usize = server.sessions().iter().map(|session| session.ahead_of_reply).sum();
        assert_eq!(ahead, 0, "{stage:?} {reply}: commands ahead of a reply that must be awaited");
        assert_eq!(row.reason.map(Reason::as_str), dead, "{stage:?} {reply}");
        if *stage == Stage::Rcpt {
            assert_eq!(row.history[0].phase, Phase::Rcpt, "{reply}");
        }
        if let Some(reason) = dead {
            let letter = letters.of(&world, *id).await;
            assert_eq!(letter.text("sendoff-reason").as_deref(), Some(reason), "{stage:?} {reply}");
            assert_eq!(letter.text("sendoff-state").is_some(), state == State::Parked, "{stage:?} {reply}");
            let detail = letter.text("sendoff-detail").unwrap_or_default();
            assert!(detail.contains(&reply[..3]), "{stage:?} {reply}: {detail}");
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert_eq!(letters.left(&world).await, 0);
    worker.stop().await;
    world.end().await;
}

#[tokio::test]
async fn a_temporary_reply_at_any_phase_is_retried_and_the_job_is_sent_once() {
    let cases: &[Case] = &[
        (Stage::Banner, "450 4.3.2 not now", "deferred server_error, sent"),
        (Stage::Ehlo, "451 4.3.0 not now", "deferred server_error, sent"),
        (Stage::Starttls, "451 4.3.0 not now", "deferred server_error, sent"),
        (Stage::Starttls, "454 4.7.0 TLS not available due to temporary reason", "deferred throttled, sent"),
        (Stage::Auth, "451 4.3.0 not now", "deferred server_error, sent"),
        (Stage::Auth, "454 4.7.0 temporary authentication failure", "deferred throttled, sent"),
        (Stage::Auth, "432 4.7.12 a password transition is needed", "deferred throttled, sent"),
        (Stage::Mail, "451 4.3.0 not now", "deferred server_error, sent"),
        (Stage::Mail, "452 4.3.1 insufficient system storage", "deferred server_error, sent"),
        (Stage::Rcpt, "450 4.2.1 mailbox busy", "deferred recipients_refused, sent"),
        (Stage::Rcpt, "452 4.2.2 mailbox full", "deferred recipients_refused, sent"),
        (Stage::Data, "451 4.3.0 not now", "deferred server_error, sent"),
        (Stage::FinalDot, "451 4.3.0 not now", "deferred server_error, sent"),
        (Stage::FinalDot, "452 4.3.1 insufficient system storage", "deferred server_error, sent"),
    ];
    check(cases, Manner::GoesOn).await;
}

#[tokio::test]
async fn a_final_reply_kills_the_job_or_parks_it_unless_it_is_about_the_server_itself() {
    let cases: &[Case] = &[
        (Stage::Banner, "554 5.3.2 no service", "deferred server_error, sent"),
        (Stage::Ehlo, "550 5.7.1 no", "deferred server_error, sent"),
        (Stage::Ehlo, "504 5.5.2 <worker>: need a name", "deferred server_error, sent"),
        (Stage::Starttls, "502 5.5.1 not here", "parked tls_required"),
        (Stage::Auth, "535 5.7.8 wrong", "parked auth_failed"),
        (Stage::Auth, "534 5.7.9 application password required", "parked auth_failed"),
        (Stage::Auth, "500 5.5.2 what", "parked auth_failed"),
        (Stage::Mail, "550 5.1.7 bad sender", "dead sender_refused"),
        (Stage::Mail, "530 5.7.0 log in first", "parked auth_failed"),
        (Stage::Mail, "552 5.3.4 too big", "dead too_large"),
        (Stage::Rcpt, "550 5.1.1 nobody there", "dead recipients_refused"),
        (Stage::Rcpt, "554 5.7.1 <ann>: Relay access denied", "parked sender_refused"),
        (Stage::Data, "554 5.5.1 no", "dead message_refused"),
        (Stage::FinalDot, "554 5.7.1 spam", "dead message_refused"),
        (Stage::FinalDot, "552 5.3.4 too big", "dead too_large"),
        (Stage::FinalDot, "554 5.2.252 SendAsDenied", "parked sender_refused"),
    ];
    check(cases, Manner::GoesOn).await;
}

#[tokio::test]
async fn a_server_without_pipelining_is_told_one_command_at_a_time_and_its_replies_mean_the_same() {
    let cases: &[Case] = &[
        (Stage::Mail, "451 4.3.0 not now", "deferred server_error, sent"),
        (Stage::Mail, "550 5.1.7 bad sender", "dead sender_refused"),
        (Stage::Rcpt, "450 4.2.1 mailbox busy", "deferred recipients_refused, sent"),
        (Stage::Rcpt, "550 5.1.1 nobody there", "dead recipients_refused"),
        (Stage::Rcpt, "553 5.7.1 Sender address rejected: not owned by user", "parked sender_refused"),
        (Stage::Data, "451 4.3.0 not now", "deferred server_error, sent"),
        (Stage::Data, "554 5.5.1 no", "dead message_refused"),
        (Stage::FinalDot, "451 4.3.0 not now", "deferred server_error, sent"),
        (Stage::FinalDot, "554 5.7.1 spam", "dead message_refused"),
    ];
    check(cases, Manner::WithoutPipelining).await;
}

#[tokio::test]
async fn a_421_closes_the_connection_at_any_phase_and_the_job_is_sent_once_later() {
    let stages = [
        Stage::Banner,
        Stage::Ehlo,
        Stage::Starttls,
        Stage::Auth,
        Stage::Mail,
        Stage::Rcpt,
        Stage::Data,
        Stage::FinalDot,
    ];
    let cases = stages.map(|stage| (stage, "421 4.3.2 closing", "deferred throttled, sent"));
    check(&cases, Manner::Closes).await;
}

#[tokio::test]
async fn limits_of_rate_slow_down_and_limits_of_the_day_wait_an_hour() {
    let world = World::new().await;
    let worker = world.worker().await;
    let throttling = Action::reply("454 Throttling failure: Maximum sending rate exceeded.");
    let microsoft =
        Action::reply("451 4.7.0 Concurrent connections limit exceeded. Visit the documentation.");
    let gmail = Action::reply("550 5.4.5 Daily user sending limit exceeded for a@b.c.");
    let ses = Action::reply("454 Throttling failure: Daily message quota exceeded.");
    let slow = [
        world.with_rules("ses", [Rule::new(Stage::FinalDot, throttling).once()]).await,
        world.with_rules("microsoft", [Rule::new(Stage::Mail, microsoft).once()]).await,
    ];
    let used_up = [
        world.with_rules("gmail", [Rule::new(Stage::FinalDot, gmail.clone()).once()]).await,
        world.with_rules("gmail-rcpt", [Rule::new(Stage::Rcpt, gmail).once()]).await,
        world.with_rules("ses-quota", [Rule::new(Stage::FinalDot, ses).once()]).await,
    ];
    let slow_ids = [world.publish(&job(Some("ses"))).await, world.publish(&job(Some("microsoft"))).await];
    let before = Clock::system().now();
    for organization in ["gmail", "gmail-rcpt", "ses-quota"] {
        let id = world.publish(&job(Some(organization))).await;
        let deferred = world.event("email.deferred", id).await;
        assert_eq!(deferred["reason"], "quota_exceeded", "{organization}");
        let at = OffsetDateTime::parse(deferred["next_attempt_at"].as_str().expect("a time"), &Rfc3339);
        let ahead = at.expect("RFC 3339") - before;
        assert!((3600..3700).contains(&ahead.whole_seconds()), "{organization}: {ahead}");
        let row = world.state(Some(organization), id, State::Deferred).await;
        assert_eq!(row.reason, Some(Reason::QuotaExceeded));
        assert!(row.next_attempt_at.is_some_and(|at| (at - before).whole_seconds() >= 3600));
    }
    for id in slow_ids {
        assert_eq!(world.story(id).await, "deferred throttled, sent");
    }
    assert_eq!(slow.map(|server| server.messages().len()), [1, 1]);
    assert_eq!(used_up.map(|server| server.messages().len()), [0, 0, 0]);
    worker.stop().await;
    world.end().await;
}

#[tokio::test]
async fn a_greylisted_message_is_retried_and_sent_once() {
    let world = World::new().await;
    let worker = world.worker().await;
    world.organization("acme").await;
    let greylisting = "450 4.2.0 <ann@customer.example>: Recipient address rejected: Greylisted, see later";
    world.server.rule(Rule::new(Stage::Rcpt, Action::reply(greylisting)).times(2));
    let id = world.publish(&job(Some("acme"))).await;
    let story = "deferred recipients_refused, deferred recipients_refused, sent";
    assert_eq!(world.story(id).await, story);
    assert_eq!(world.server.messages().len(), 1);
    let row = world.state(Some("acme"), id, State::Sent).await;
    let phases: Vec<_> = row.history.iter().map(|attempt| attempt.phase).collect();
    assert_eq!((row.attempts, phases), (3, vec![Phase::Rcpt, Phase::Rcpt, Phase::FinalDot]));
    worker.stop().await;
    world.end().await;
}

/// A job to several customers.
fn job_to(organization: &str, names: &[&str]) -> Value {
    let mut job = job(Some(organization));
    job["to"] = names.iter().map(|name| format!("{name}@customer.example")).collect();
    job
}

#[tokio::test]
async fn a_refused_recipient_is_reported_while_the_others_get_the_message_once() {
    let world = World::new().await;
    let worker = world.worker().await;
    world.organization("acme").await;
    let refused = Rule::new(Stage::Rcpt, Action::reply("550 5.1.1 nobody there"));
    world.server.rule(refused.of("bob@customer.example"));
    let busy = Rule::new(Stage::Rcpt, Action::reply("450 4.2.1 busy"));
    world.server.rule(busy.of("cem@customer.example").once());

    let job = job_to("acme", &["ann", "bob", "cem", "dan"]);
    let id = world.publish(&job).await;
    let sent = world.event("email.sent", id).await;
    let expected = json!([{"index": 1, "code": 550, "reason": "recipients_refused"}]);
    assert_eq!(sent["recipients_refused"], expected);
    assert_eq!(world.event_count("email.deferred", id), 1);
    assert_eq!(world.event("email.dead", id).await["reason"], "recipients_refused");
    assert_eq!((world.event_count("email.dead", id), world.event_count("email.sent", id)), (1, 1));

    let received: Vec<_> = world.server.messages().into_iter().map(|message| message.recipients).collect();
    let address = |name: &str| format!("{name}@customer.example");
    assert_eq!(received, [vec![address("ann"), address("dan")], vec![address("cem")]]);
    let asked = world.server.seen(|seen| seen.count("RCPT"));
    assert_eq!(asked, 5, "bob is asked once, cem alone is asked again");

    let mut letters = Letters::default();
    let letter = letters.of(&world, id).await;
    assert_eq!(letter.text("sendoff-reason").as_deref(), Some("recipients_refused"));
    assert_eq!(letter.text("sendoff-recipients").as_deref(), Some("1"));
    assert_eq!(letter.body, serde_json::to_vec(&job).expect("JSON"));
    assert_eq!(letters.left(&world).await, 0);
    let row = world.state(Some("acme"), id, State::Sent).await;
    assert_eq!((row.attempts, row.refused.len()), (2, 1));
    assert_eq!(row.history[0].phase, Phase::FinalDot, "the first attempt reached ann and dan");
    worker.stop().await;
    world.end().await;
}

#[tokio::test]
async fn a_recipient_that_is_never_taken_is_reported_when_its_retries_end() {
    let world = World::new().await;
    let worker = world.worker().await;
    world.organization("acme").await;
    let busy = Rule::new(Stage::Rcpt, Action::reply("450 4.2.1 busy"));
    world.server.rule(busy.of("bob@customer.example"));
    let id = world.publish(&job_to("acme", &["ann", "bob"])).await;
    let sent = world.event("email.sent", id).await;
    let expected = json!([{"index": 1, "code": 450, "reason": "retries_exhausted"}]);
    assert_eq!(sent["recipients_refused"], expected);
    assert_eq!(world.event("email.dead", id).await["reason"], "retries_exhausted");
    assert_eq!((world.event_count("email.deferred", id), world.event_count("email.dead", id)), (2, 1));
    let messages = world.server.messages();
    assert_eq!(
        (messages.len(), messages[0].recipients.as_slice()),
        (1, &["ann@customer.example".to_owned()][..])
    );
    let letter = Letters::default().of(&world, id).await;
    assert_eq!(letter.text("sendoff-recipients").as_deref(), Some("1"));
    assert_eq!(letter.text("sendoff-reason").as_deref(), Some("retries_exhausted"));
    assert_eq!(world.state(Some("acme"), id, State::Sent).await.attempts, 3);
    worker.stop().await;
    world.end().await;
}

#[tokio::test]
async fn recipients_beyond_a_servers_limit_get_further_transactions_of_the_same_attempt() {
    let world = World::with(|behaviour| behaviour.max_recipients = Some(2)).await;
    let worker = world.worker().await;
    world.organization("acme").await;
    let id = world.publish(&job_to("acme", &["ann", "bob", "cem", "dan", "eve"])).await;
    assert_eq!(world.story(id).await, "sent");
    let messages = world.server.messages();
    let served: Vec<_> = messages.iter().map(|message| message.recipients.len()).collect();
    assert_eq!(served, [2, 2, 1]);
    let mut everybody: Vec<_> = messages.iter().flat_map(|message| message.recipients.clone()).collect();
    everybody.dedup();
    assert_eq!(everybody.len(), 5);
    assert!(messages.iter().all(|message| message.data == messages[0].data && message.session == 0));
    assert_eq!(world.state(Some("acme"), id, State::Sent).await.attempts, 1);
    worker.stop().await;
    world.end().await;
}

#[tokio::test]
async fn a_sender_that_the_server_refuses_at_rcpt_is_the_accounts_fault() {
    let refusal = "553 5.7.1 <hello@acme.example>: Sender address rejected: not owned by user mailer";
    let world = World::with(|behaviour| behaviour.sender_refused_at_rcpt = Some(refusal.into())).await;
    let worker = world.worker().await;
    world.organization("acme").await;
    let id = world.publish(&job_to("acme", &["ann", "bob"])).await;
    assert_eq!(world.story(id).await, "parked sender_refused");
    let (_, reason, detail) = world.dead_letter().await;
    assert_eq!(reason, "sender_refused");
    assert!(detail.contains("not owned by"), "{detail}");
    assert!(!detail.contains("hello@acme.example"), "addresses are masked: {detail}");
    worker.stop().await;
    world.end().await;
}

#[tokio::test]
async fn credentials_that_are_words_of_a_refusal_do_not_change_what_it_means() {
    let world = World::new().await;
    let worker = world.worker().await;
    let refusal = "554 5.7.1 <ann@customer.example>: Relay access denied";
    let server = world
        .another_server(|behaviour| {
            behaviour.login = Some(("relay".into(), "denied".into()));
            behaviour.rule(Rule::new(Stage::Rcpt, Action::reply(refusal)));
        })
        .await;
    let fields = json!({"port": server.port(), "username": "relay", "password": "denied"});
    world.organization_at("acme", fields).await;
    let id = world.publish(&job(Some("acme"))).await;
    assert_eq!(world.story(id).await, "parked sender_refused");
    let (_, _, detail) = world.dead_letter().await;
    assert!(detail.contains("554 5.7.1 <a…@customer.example>: [redacted] access [redacted]"), "{detail}");
    worker.stop().await;
    world.end().await;
}

#[tokio::test]
async fn a_server_that_awaits_a_message_for_nobody_gets_a_lone_dot_and_the_session_goes_on() {
    let world = World::with(|behaviour| behaviour.data_without_recipients = true).await;
    let worker = world.worker().await;
    world.organization("acme").await;
    world.server.rule(Rule::new(Stage::Rcpt, Action::reply("550 5.1.1 nobody there")).once());
    let refused = world.publish(&job(Some("acme"))).await;
    assert_eq!(world.story(refused).await, "dead recipients_refused");
    let next = world.publish(&job(Some("acme"))).await;
    assert_eq!(world.story(next).await, "sent");
    let messages = world.server.messages();
    assert_eq!((messages.len(), world.server.connections()), (1, 1));
    assert!(messages[0].text().contains(&next.to_string()));
    let commands = world.server.sessions()[0].commands.clone();
    let behind_data = commands.iter().skip_while(|command| *command != "DATA").nth(1);
    assert_eq!(behind_data.map(String::as_str), Some("RSET"), "{commands:?}");
    worker.stop().await;
    world.end().await;
}

#[tokio::test]
async fn a_job_whose_retries_end_is_dead_with_the_last_cause() {
    let world = World::new().await;
    let worker = world.worker().await;
    world.organization("acme").await;
    world.server.rule(Rule::new(Stage::Mail, Action::reply("451 4.3.0 mail.test is tired")));
    let job = job(Some("acme"));
    let id = world.publish(&job).await;
    let story = "deferred server_error, deferred server_error, dead retries_exhausted";
    assert_eq!(world.story(id).await, story);
    let letter = Letters::default().of(&world, id).await;
    assert_eq!(letter.text("sendoff-reason").as_deref(), Some("retries_exhausted"));
    let detail = letter.text("sendoff-detail").unwrap_or_default();
    assert!(detail.contains("server_error") && detail.contains("mail.test is tired"), "{detail}");
    assert_eq!(letter.body, serde_json::to_vec(&job).expect("JSON"));
    let row = world.state(Some("acme"), id, State::Dead).await;
    assert_eq!((row.attempts, row.reason), (3, Some(Reason::RetriesExhausted)));
    assert_eq!(world.server.seen(|seen| seen.count("MAIL")), 3);
    worker.stop().await;
    world.end().await;
}
