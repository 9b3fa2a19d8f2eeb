//! The archivist at work: whatever dies, of whatever killer, is in the archive once, and nothing that goes away meanwhile
//! changes that.
//! Guarantee: a test that takes a service away counts every letter afterwards.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures_util::StreamExt;
use lapin::options::{BasicConsumeOptions, BasicNackOptions};
use lapin::types::FieldTable;
use lapin::{BasicProperties, Connection, ConnectionProperties};
use secrecy::{ExposeSecret, SecretString};
use sendoff::broker::{Broker, Carried};
use sendoff::clock::Clock;
use sendoff::dead_letters::{Archivist, PREFETCH};
use sendoff::model::failure::Reason;
use sendoff::model::job::JobKey;
use sendoff::model::ledger::{State, Turn};
use sendoff::model::letter::{Letter, LetterState, Owner};
use sendoff::model::organization::OrganizationId;
use sendoff::secrets::KeyRing;
use sendoff::shutdown::Shutdown;
use sendoff::store::{DeadLetters, Store};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::support::broker::{PrivateBroker, TestBroker, amqp_url, confirming, eventually, publish_all};
use crate::support::database::TestDatabase;
use crate::support::letters::{ArchiveLock, letter, letters};
use crate::support::proxy::Proxy;
use crate::support::smtp_server::{Action, Rule, Stage};
use crate::support::world::{KEYS, World, job};

/// A routing key that no lane takes.
const NOWHERE: &str = "newsletter.weekly";
const TEN_MIB: usize = 10 << 20;

fn bytes(job: &Value) -> Vec<u8> {
    serde_json::to_vec(job).expect("JSON")
}

fn id_of(job: &Value) -> Uuid {
    job["id"].as_str().and_then(|id| id.parse().ok()).expect("a job of a test has an id")
}

fn jobs(count: usize) -> Vec<Value> {
    (0..count).map(|_| job(None)).collect()
}

fn bodies(jobs: &[Value]) -> Vec<Vec<u8>> {
    jobs.iter().map(bytes).collect()
}

/// Each of these jobs is there once, and died once.
fn are_of(letters: &[Letter], jobs: &[Value]) {
    let found: BTreeSet<Uuid> = letters.iter().map(Letter::id).collect();
    let expected: BTreeSet<Uuid> = jobs.iter().map(id_of).collect();
    assert_eq!((letters.len(), &found), (jobs.len(), &expected));
    let odd: Vec<_> = letters.iter().filter(|l| l.deaths != 1 || l.state != LetterState::Dead).collect();
    assert!(odd.is_empty(), "{odd:?}");
}

/// Waits until each of these jobs was announced as dead, for this reason.
async fn all_announced(world: &World, jobs: &[Value], reason: &str) {
    for job in jobs {
        assert_eq!(world.event("email.dead", id_of(job)).await["reason"], reason);
    }
}

#[tokio::test]
async fn what_a_worker_gives_up_is_archived_with_its_story_and_as_it_was_published() {
    let world = World::new().await;
    let worker = world.worker().await;
    world.organization("acme").await;
    world.server.rule(Rule::new(Stage::Rcpt, Action::reply("550 5.1.1 nobody@customer.example is nobody")));
    let mut published = job(Some("acme"));
    published["group"] = json!("booking-7");
    published["sequence"] = json!(3);
    published["expires_at"] = json!("2099-01-01T00:00:00Z");
    let properties = BasicProperties::default().with_message_id("the publisher's".into());
    let id = world.publish_with(&published, properties).await;

    let letter = world.letter(id).await;
    let acme = OrganizationId::parse("acme").expect("an organization");
    assert_eq!(letter.key, Some(JobKey { organization: Some(acme), id }));
    assert_eq!(letter.kind.as_deref(), Some("booking.confirmed"));
    assert_eq!((letter.lane.as_deref(), &*letter.routing_key), (Some("notifications"), "notification.test"));
    assert_eq!((letter.state, letter.reason), (LetterState::Dead, Reason::RecipientsRefused));
    assert!(letter.detail.as_deref().is_some_and(|detail| !detail.contains("nobody@")), "{letter:?}");
    assert_eq!((letter.attempts, letter.turn, letter.deaths, letter.replays), (1, Turn(1), 1, 0));
    assert_eq!(letter.recipients, None);
    let revision = letter.revision.as_ref().expect("a revision");
    assert_eq!((revision.group.as_str(), revision.sequence), ("booking-7", 3));
    assert_eq!(letter.expires_at.map(|at| at.year()), Some(2099));
    assert!(letter.first_at.is_some_and(|first_at| first_at <= letter.died_at), "{letter:?}");
    let content = world.content(&letter).await;
    assert_eq!(content.body, bytes(&published));
    let carried: Carried = serde_json::from_slice(&content.properties).expect("properties are JSON");
    assert_eq!(carried.message_id.as_deref(), Some("the publisher's"));

    world.event("email.dead", id).await;
    worker.stop().await;
    world.broker.wait_count(&world.broker.name("dead"), 0).await;
    assert_eq!(world.event_count("email.dead", id), 1, "the worker has announced it, and nobody else");
    world.end().await;
}

#[tokio::test]
async fn a_refusal_of_some_recipients_is_one_letter_that_names_them() {
    let world = World::new().await;
    let worker = world.worker().await;
    let refused = Rule::new(Stage::Rcpt, Action::reply("550 5.1.1 nobody there"));
    world.platform.rule(refused.of("bob@customer.example"));
    let mut published = job(None);
    published["to"] = json!(["ann@customer.example", "bob@customer.example"]);
    let id = world.publish(&published).await;
    let letter = world.letter(id).await;
    assert_eq!(letter.recipients, Some(vec![1]));
    assert_eq!((letter.state, letter.reason), (LetterState::Dead, Reason::RecipientsRefused));
    assert_eq!(world.content(&letter).await.body, bytes(&published));
    assert_eq!(world.state(None, id, State::Sent).await.refused.len(), 1);
    worker.stop().await;
    are_of(&world.letters(1).await, &[published]);
    world.end().await;
}

#[tokio::test]
async fn a_body_that_is_no_job_is_archived_byte_for_byte_whatever_it_is() {
    let world = World::new().await;
    let worker = world.worker().await;
    let mut large = job(None);
    large["text"] = json!("x".repeat(TEN_MIB));
    let mut unknown = job(Some("acme"));
    unknown["calender"] = json!({});
    let mut nobodys = job(None);
    nobodys["organization_id"] = json!("not valid!");
    let told = |job: &Value| Some(id_of(job));
    let cases = [
        (bytes(&nobodys), Reason::Malformed, told(&nobodys)),
        (Vec::new(), Reason::Malformed, None),
        (b"not JSON".to_vec(), Reason::Malformed, None),
        (b"\xff\xfe\0\xc3\x28".to_vec(), Reason::Malformed, None),
        ((0..TEN_MIB).map(|at| at.to_le_bytes()[0]).collect(), Reason::Malformed, None),
        (bytes(&unknown), Reason::Malformed, told(&unknown)),
        (bytes(&large), Reason::TooLarge, told(&large)),
    ];
    for (body, ..) in &cases {
        world.broker.publish_job("notification.test", body, BasicProperties::default()).await;
    }
    let letters = world.letters(cases.len()).await;
    for letter in &letters {
        let content = world.content(letter).await;
        let case = cases.iter().find(|(body, ..)| *body == content.body);
        let (body, reason, id) = case.expect("a body as it was published");
        assert_eq!((letter.reason, letter.job_id), (*reason, *id));
        assert_eq!((letter.bytes as usize, letter.routing_key.as_str()), (body.len(), "notification.test"));
        assert!(letter.detail.is_some(), "{letter:?}");
    }
    assert_eq!(letters.iter().map(|letter| letter.letter).collect::<BTreeSet<_>>().len(), cases.len());
    let letter = world.letter(id_of(&nobodys)).await;
    assert_eq!((letter.key.as_ref(), letter.owner()), (None, Owner::Unknown));
    let event = world.event("email.dead", id_of(&nobodys)).await;
    assert_eq!((&event["reason"], &event["organization_id"]), (&json!("malformed"), &json!(null)));
    worker.stop().await;
    world.end().await;
}

#[tokio::test]
async fn a_job_that_no_lane_takes_is_archived_announced_and_counted() {
    let world = World::new().await;
    let worker = world.worker().await;
    let mut published = job(Some("acme"));
    published["group"] = json!("booking-7");
    published["sequence"] = json!(1);
    world.broker.publish_job(NOWHERE, &bytes(&published), BasicProperties::default()).await;
    let id = id_of(&published);
    let event = world.event("email.dead", id).await;
    let facts = ["reason", "organization_id", "kind", "group"].map(|name| event[name].as_str());
    assert_eq!(facts, [Some("unroutable"), Some("acme"), Some("booking.confirmed"), Some("booking-7")]);

    let letter = world.letter(id).await;
    assert_eq!((letter.reason, letter.lane.as_deref()), (Reason::Unroutable, None));
    assert_eq!(letter.routing_key, NOWHERE);
    assert_eq!((letter.attempts, letter.turn, letter.first_at), (0, Turn(0), None));
    assert!(letter.detail.as_deref().is_some_and(|detail| detail.contains(NOWHERE)), "{letter:?}");
    assert_eq!(world.status(Some("acme"), id).await.map(|status| status.state), None);
    worker.stop().await;
    assert_eq!(world.event_count("email.dead", id), 1);

    let next = world.worker().await;
    eventually("it is counted", async || {
        next.metric("sendoff_dead_letters{reason=\"unroutable\"}").await == 1.0
    })
    .await;
    assert_eq!(next.metric("sendoff_dead_letters{reason=\"malformed\"}").await, 0.0);
    next.stop().await;
    world.end().await;
}

/// Takes what comes off a queue and gives it back, as a worker that dies of it would, until it is no more.
async fn give_back_until_gone(world: &World, queue: &str, gone: impl AsyncFn() -> bool) {
    let channel = world.broker.channel().await;
    let (tag, options) = ("", BasicConsumeOptions::default());
    let consumer = channel.basic_consume(queue.into(), tag.into(), options, FieldTable::default()).await;
    let mut consumer = consumer.expect("a consumer");
    tokio::spawn(async move {
        while let Some(Ok(delivery)) = consumer.next().await {
            let back = BasicNackOptions { requeue: true, multiple: false };
            let _lost = delivery.acker.nack(back).await;
        }
    });
    eventually("the broker gives up", gone).await;
    channel.close(200, "done".into()).await.expect("closed");
}

#[tokio::test]
async fn what_the_broker_kills_is_archived_with_its_reason_and_announced() {
    let world = World::new().await;
    let lane = world.broker.name("jobs.notifications");
    let (looping, expiring) = (job(None), job(None));
    world.publish(&looping).await;
    let tap = world.broker.tap();
    give_back_until_gone(&world, &lane, async || world.broker.count(&tap).await == Some(1)).await;
    world.publish_with(&expiring, BasicProperties::default().with_expiration("1".into())).await;
    world.broker.wait_count(&tap, 2).await;

    let worker = world.worker().await;
    let event = world.event("email.dead", id_of(&looping)).await;
    assert_eq!(
        (event["reason"].as_str(), event["kind"].as_str()),
        (Some("crash_loop"), Some("booking.confirmed"))
    );
    assert_eq!(world.event("email.expired", id_of(&expiring)).await["reason"], "expired");
    for (job, reason) in [(&looping, Reason::CrashLoop), (&expiring, Reason::Expired)] {
        let letter = world.letter(id_of(job)).await;
        assert_eq!((letter.reason, letter.lane.as_deref()), (reason, Some("notifications")));
        assert_eq!((letter.routing_key.as_str(), letter.deaths), ("notification.test", 1));
        assert_eq!(world.content(&letter).await.body, bytes(job));
    }
    worker.stop().await;
    assert_eq!(world.platform.connections(), 0);
    world.end().await;
}

#[tokio::test]
async fn a_letter_whose_archivist_died_between_commit_and_acknowledgement_is_one_row_and_announced() {
    let mut world = World::new().await;
    let (proxy, through) = Proxy::before(&amqp_url()).await;
    world.set("AMQP_URL", &through);
    let worker = world.worker().await;
    let mut lock = ArchiveLock::take(&world.database).await;
    let published = job(None);
    world.broker.publish_job(NOWHERE, &bytes(&published), BasicProperties::default()).await;
    lock.holds_somebody().await;
    proxy.stall();
    lock.release().await;
    world.letter(id_of(&published)).await;
    worker.kill().await;
    proxy.refuse();
    assert_eq!(world.event_count("email.dead", id_of(&published)), 0);

    world.set("AMQP_URL", &amqp_url());
    let next = world.worker().await;
    assert_eq!(world.event("email.dead", id_of(&published)).await["reason"], "unroutable");
    next.stop().await;
    world.broker.wait_count(&world.broker.name("dead"), 0).await;
    are_of(&world.letters(1).await, &[published]);
    world.end().await;
}

#[tokio::test]
async fn a_worker_killed_in_the_middle_of_archiving_leaves_each_letter_to_the_next_one() {
    const LETTERS: usize = 300;
    let world = World::new().await;
    let worker = world.worker().await;
    let jobs = jobs(LETTERS);
    let (before, after) = jobs.split_at(LETTERS / 2);
    world.broker.publish_jobs(NOWHERE, &bodies(before)).await;
    eventually("some are archived", async || {
        world.database.number("SELECT count(*) FROM dead_letters").await > 0
    })
    .await;
    let mut lock = ArchiveLock::take(&world.database).await;
    world.broker.publish_jobs(NOWHERE, &bodies(after)).await;
    lock.holds_somebody().await;
    worker.kill().await;
    lock.release().await;

    let next = world.worker().await;
    are_of(&world.letters(LETTERS).await, &jobs);
    all_announced(&world, &jobs, "unroutable").await;
    next.stop().await;
    world.broker.wait_count(&world.broker.name("dead"), 0).await;
    world.end().await;
}

#[tokio::test]
async fn letters_in_hand_at_a_stop_go_back_to_their_queue() {
    let world = World::new().await;
    let worker = world.worker_starting(&["--drain-timeout", "1s"]).await;
    worker.ready().await;
    let mut lock = ArchiveLock::take(&world.database).await;
    let jobs = jobs(10);
    world.broker.publish_jobs(NOWHERE, &bodies(&jobs)).await;
    lock.holds_somebody().await;
    worker.stop().await;
    world.broker.wait_count(&world.broker.name("dead"), 10).await;
    lock.release().await;
    assert_eq!(world.database.number("SELECT count(*) FROM dead_letters").await, 0);

    let next = world.worker().await;
    are_of(&world.letters(10).await, &jobs);
    next.stop().await;
    world.end().await;
}

#[tokio::test]
async fn after_a_storm_of_letters_without_a_database_none_is_missing() {
    const LETTERS: usize = 2_000;
    let mut world = World::new().await;
    let (proxy, through) = Proxy::before(world.database.url().expose_secret()).await;
    world.set("DATABASE_URL", &through);
    let worker = world.worker().await;
    proxy.refuse();
    let jobs = jobs(LETTERS);
    world.broker.publish_jobs(NOWHERE, &bodies(&jobs)).await;
    // A copy of each: the storm is over before the database is back.
    world.broker.wait_count(&world.broker.tap(), 2_000).await;
    worker.logs("the database is away").await;
    assert_eq!(world.database.number("SELECT count(*) FROM dead_letters").await, 0);

    proxy.forward();
    are_of(&world.letters(LETTERS).await, &jobs);
    all_announced(&world, &jobs, "unroutable").await;
    worker.stop().await;
    world.broker.wait_count(&world.broker.name("dead"), 0).await;
    assert_eq!(world.database.number("SELECT count(*) FROM dead_letters").await, 2_000);
    world.end().await;
}

#[tokio::test]
async fn letters_in_hand_when_the_broker_crashes_are_archived_once() {
    const LETTERS: usize = 50;
    let mut world = World::new().await;
    let broker = PrivateBroker::start().await;
    world.set("AMQP_URL", broker.url());
    let worker = world.worker().await;
    let mut lock = ArchiveLock::take(&world.database).await;
    let jobs = jobs(LETTERS);
    let connection =
        Connection::connect(broker.url(), ConnectionProperties::default()).await.expect("RabbitMQ answers");
    let channel = confirming(&connection).await;
    publish_all(&channel, &world.broker.name("jobs"), NOWHERE, &bodies(&jobs)).await;
    lock.holds_somebody().await;
    broker.kill().await;
    lock.release().await;
    broker.start_again().await;
    worker.ready().await;
    let letters = world.letters(LETTERS).await;
    let found: BTreeSet<Uuid> = letters.iter().map(Letter::id).collect();
    assert_eq!(found, jobs.iter().map(id_of).collect());
    worker.stop().await;
    world.letters(LETTERS).await;
    world.end().await;
}

#[tokio::test]
async fn a_letter_that_a_shovel_moved_back_is_neither_sent_nor_a_second_row() {
    let world = World::new().await;
    let worker = world.worker().await;
    world.platform.rule(Rule::new(Stage::Rcpt, Action::reply("550 5.1.1 nobody here")).once());
    let dead = job(None);
    world.publish(&dead).await;
    let malformed = b"{\"version\": 1}".to_vec();
    world.broker.publish_job("notification.test", &malformed, BasicProperties::default()).await;
    let before = world.letters(2).await;

    let tap = world.broker.tap();
    for _ in 0..2 {
        let letter = world.broker.take(&tap).await;
        let key = letter.text("sendoff-routing-key").expect("a letter keeps its routing key");
        world.broker.publish_job(&key, &letter.body, letter.properties.clone()).await;
    }
    world.broker.wait_count(&tap, 2).await;
    // A letter that the archive knows leaves no trace there; one that comes behind it does.
    let behind = job(None);
    world.broker.publish_job(NOWHERE, &bytes(&behind), BasicProperties::default()).await;
    let behind = world.letter(id_of(&behind)).await.letter;
    let after = world.letters(3).await;
    worker.stop().await;
    world.broker.wait_count(&world.broker.name("dead"), 0).await;
    let names = |letters: &[Letter]| letters.iter().map(|letter| letter.letter).collect::<BTreeSet<_>>();
    assert_eq!(&names(&before) | &BTreeSet::from([behind]), names(&after));
    assert_eq!(
        letter(&world.database, id_of(&dead)).await.deaths,
        1,
        "the turn tells that it is the same death"
    );
    assert_eq!(world.platform.seen(|seen| (seen.count("RCPT"), seen.final_dots)), (1, 0));
    world.end().await;
}

#[tokio::test]
async fn a_letter_that_the_database_refuses_stays_on_its_queue_and_holds_up_nobody() {
    const NOT_THIS: &str = "ALTER TABLE dead_letters ADD CONSTRAINT not_this CHECK (kind <> 'refused.kind')";
    let world = World::new().await;
    world.database.run(NOT_THIS).await;
    let worker = world.worker().await;
    let mut refused = job(None);
    refused["kind"] = json!("refused.kind");
    let mut jobs = jobs(20);
    jobs.insert(7, refused.clone());
    world.broker.publish_jobs(NOWHERE, &bodies(&jobs)).await;
    jobs.remove(7);
    are_of(&world.letters(20).await, &jobs);
    worker.logs("the database refuses a letter").await;
    worker.stop().await;
    world.broker.wait_count(&world.broker.name("dead"), 1).await;

    world.database.run("ALTER TABLE dead_letters DROP CONSTRAINT not_this").await;
    let next = world.worker().await;
    world.letter(id_of(&refused)).await;
    next.stop().await;
    world.broker.wait_count(&world.broker.name("dead"), 0).await;
    world.end().await;
}

#[tokio::test]
async fn a_panic_gives_the_letters_back_and_the_archivist_goes_on() {
    let (test, database) = (TestBroker::with_lane("panic", &[]).await, TestDatabase::migrated().await);
    test.declare().await;
    let (proxy, through) = Proxy::before(database.url().expose_secret()).await;
    proxy.refuse();
    let dropped = Arc::new(AtomicUsize::new(0));
    let counter = dropped.clone();
    let on_drop = move |_: &str| {
        counter.fetch_add(1, Ordering::SeqCst);
    };
    let broker = Broker::start(test.settings(), Arc::new(on_drop));
    let keys = KeyRing::parse(&[SecretString::from(KEYS)]).expect("a key");
    let losses = Arc::new(AtomicUsize::new(0));
    let lost = losses.clone();
    let archivist = Archivist {
        archive: DeadLetters::new(Store::new(&through.into(), 2).expect("a URL"), Arc::new(keys)),
        publisher: broker.publisher(),
        on_loss: Box::new(move |_| assert!(lost.fetch_add(1, Ordering::SeqCst) > 0, "as the test wants it")),
        clock: Clock::system(),
        shutdown: Shutdown::new(),
    };
    let archiving = tokio::spawn(archivist.run(broker.dead_letters(PREFETCH)));
    let jobs = jobs(40);
    test.publish_jobs(NOWHERE, &bodies(&jobs)).await;
    eventually("it panics, and goes on", async || losses.load(Ordering::SeqCst) > 1).await;
    assert!(dropped.load(Ordering::SeqCst) > 0);
    proxy.forward();
    are_of(&letters(&database, 40).await, &jobs);
    tokio::time::timeout(Duration::from_secs(40), broker.stop_consuming()).await.expect("it stops");
    archiving.await.expect("no panic reaches it");
    broker.close().await;
    test.clean_up().await;
}
