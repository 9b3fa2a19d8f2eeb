//! RabbitMQ and PostgreSQL going away and coming back while jobs are in flight.
//! Guarantee: no job is lost or sent twice, `/readyz` names the part that is away, and the log says so once.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use lapin::options::{BasicPublishOptions, ConfirmSelectOptions, ExchangeDeleteOptions, QueueDeleteOptions};
use lapin::{BasicProperties, Confirmation, Connection, ConnectionProperties};
use secrecy::ExposeSecret;
use sendoff::model::job::JobKey;
use sendoff::model::ledger::State;
use sendoff::store::Store;
use serde_json::Value;
use tokio::process::Command;
use tokio::sync::Notify;
use uuid::Uuid;

use crate::support::broker::{amqp_url, eventually, eventually_within};
use crate::support::proxy::Proxy;
use crate::support::smtp_server::{Action, Rule, Stage};
use crate::support::world::{SOON, WorkerProcess, World, job};

/// For jobs that were put aside on their way, perhaps more than once, and for a worker that pauses longer after each loss.
const MINUTES: Duration = Duration::from_secs(240);

/// A private RabbitMQ or PostgreSQL that a test may crash; removed when dropped.
struct Service {
    kind: &'static str,
    directory: PathBuf,
    _parent: tempfile::TempDir,
}

impl Service {
    /// Starts a fresh one; its URL.
    async fn start(kind: &'static str) -> (Self, String) {
        let parent = tempfile::tempdir().expect("a temporary directory");
        let service = Self { kind, directory: parent.path().join(kind), _parent: parent };
        let url = service.start_again().await;
        (service, url)
    }

    /// Starts it on its old port with its old data; its URL, which stays the same.
    async fn start_again(&self) -> String {
        let output = Command::from(self.command("start")).output().await.expect("./dev runs");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("UTF-8").trim().to_owned()
    }

    /// Kills it as a power cut would.
    async fn crash(&self) {
        let output = Command::from(self.command("kill")).output().await.expect("./dev runs");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    fn command(&self, action: &str) -> std::process::Command {
        let mut command = std::process::Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/dev"));
        command.args(["service", action, self.kind]).arg(&self.directory);
        command
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        // A failure to tidy up must not hide the test's own.
        let _removed = self.command("remove").output();
    }
}

/// Publishes to a broker that is not the tests' shared one, confirmed.
async fn publish_at(url: &str, exchange: &str, jobs: &[Value]) {
    let connection =
        Connection::connect(url, ConnectionProperties::default()).await.expect("RabbitMQ answers");
    let channel = connection.create_channel().await.expect("a channel");
    channel.confirm_select(ConfirmSelectOptions::default()).await.expect("confirm mode");
    let options = BasicPublishOptions { mandatory: true, immediate: false };
    for job in jobs {
        let body = serde_json::to_vec(job).expect("JSON");
        let properties = BasicProperties::default().with_delivery_mode(2);
        let sent = channel
            .basic_publish(exchange.into(), "notification.test".into(), options, &body, properties)
            .await
            .expect("published");
        assert_eq!(sent.await.expect("confirmed"), Confirmation::Ack(None));
    }
    connection.close(200, "done".into()).await.expect("closed");
}

fn ids(jobs: &[Value]) -> Vec<Uuid> {
    jobs.iter().map(|job| job["id"].as_str().expect("an id").parse().expect("a UUID")).collect()
}

async fn all_sent(store: &Store, jobs: &[Value]) {
    for id in ids(jobs) {
        let key = JobKey { organization: None, id };
        let what = format!("{id} is sent");
        eventually(&what, async || {
            store.job_status(&key).await.ok().flatten().is_some_and(|status| status.state == State::Sent)
        })
        .await;
    }
}

/// Waits until `/readyz` says that this part, and no other, is away.
async fn away(worker: &WorkerProcess, part: &str) {
    eventually(&format!("only {part} is away"), async || {
        let (code, body) = worker.get("/readyz").await;
        let report: Value = serde_json::from_str(&body).expect("JSON");
        let parts = report["parts"].as_object().expect("parts");
        code == 503 && parts.iter().all(|(name, state)| (state["ok"] == true) != (name == part))
    })
    .await;
}

fn platform_jobs(count: usize) -> Vec<Value> {
    (0..count).map(|_| job(None)).collect()
}

#[tokio::test]
async fn a_crash_of_the_broker_with_jobs_in_flight_loses_none_and_sends_none_twice() {
    let mut world = World::new().await;
    let (broker, url) = Service::start("rabbitmq").await;
    world.set("AMQP_URL", &url);
    let worker = world.worker().await;
    let go_on = Arc::new(Notify::new());
    world.platform.rule(Rule::new(Stage::FinalDot, Action::Hold(go_on.clone())).once());
    let jobs = platform_jobs(40);
    publish_at(&url, &world.broker.name("jobs"), &jobs).await;
    world.platform.wait_for(SOON, |seen| seen.final_dots >= 1).await.expect("a message");

    broker.crash().await;
    away(&worker, "broker").await;
    go_on.notify_one();
    world.platform.wait_for(SOON, |seen| seen.message_count >= 1).await.expect("the message is taken");
    assert_eq!(broker.start_again().await, url);
    worker.ready().await;
    all_sent(&world.database.store(), &jobs).await;
    assert_eq!(world.platform.seen(|seen| (seen.final_dots, seen.message_count)), (40, 40));
    let log = worker.log();
    for role in ["consuming", "publishing"] {
        let lost = format!("lost the connection to RabbitMQ role=\"{role}\"");
        assert_eq!(log.matches(&lost).count(), 1, "{log}");
    }
    worker.stop().await;
    world.end().await;
}

#[tokio::test]
async fn a_crash_of_the_database_with_jobs_in_flight_pauses_the_lanes_and_sends_none_twice() {
    let mut world = World::new().await;
    let (database, url) = Service::start("postgres").await;
    world.set("DATABASE_URL", &url);
    let worker = world.worker().await;
    let go_on = Arc::new(Notify::new());
    world.platform.rule(Rule::new(Stage::FinalDot, Action::Hold(go_on.clone())).once());
    let mut jobs = platform_jobs(20);
    for job in &jobs {
        world.publish(job).await;
    }
    world.platform.wait_for(SOON, |seen| seen.final_dots == 1).await.expect("a message");

    database.crash().await;
    away(&worker, "database").await;
    let lane = world.broker.name("jobs.notifications");
    let late = platform_jobs(5);
    for job in &late {
        world.publish(job).await;
    }
    world.broker.wait_count(&lane, 5).await;
    go_on.notify_one();
    world.platform.wait_for(SOON, |seen| seen.message_count == 1).await.expect("the message is taken");
    // The one whose outcome could not be recorded stays in hand; those in line behind it were given back.
    world.broker.wait_count(&lane, 24).await;
    assert_eq!(world.platform.seen(|seen| seen.count("DATA")), 1, "nothing is begun without the ledger");

    assert_eq!(database.start_again().await, url);
    worker.ready().await;
    jobs.extend(late);
    all_sent(&Store::new(&url.into(), 2).expect("a URL"), &jobs).await;
    for id in ids(&jobs) {
        world.event("email.sent", id).await;
    }
    assert_eq!(world.platform.seen(|seen| (seen.final_dots, seen.message_count)), (25, 25));
    let log = worker.log();
    // A database that a busy machine keeps from answering is away too: each time is said once.
    let said: Vec<bool> = log
        .lines()
        .filter(|line| line.contains("the database is away") || line.contains("the database answers"))
        .map(|line| line.contains("the database answers"))
        .collect();
    assert!(said.len() >= 3 && said[0] && said.windows(2).all(|two| two[0] != two[1]), "{log}");
    worker.stop().await;
    world.end().await;
}

#[tokio::test]
async fn connections_that_are_cut_again_and_again_cost_no_job_and_no_duplicate() {
    const JOBS: usize = 80;
    let mut world = World::new().await;
    let (broker, amqp) = Proxy::before(&amqp_url()).await;
    let (database, postgres) = Proxy::before(world.database.url().expose_secret()).await;
    world.set("AMQP_URL", &amqp);
    world.set("DATABASE_URL", &postgres);
    let worker = world.worker().await;
    world.platform.rule(Rule::new(Stage::FinalDot, Action::After(Duration::from_millis(50))));
    let jobs = platform_jobs(JOBS);
    for job in &jobs {
        world.publish(job).await;
    }
    for (proxy, reached) in [(&broker, 3), (&database, 10), (&broker, 17), (&database, 24), (&broker, 31)] {
        let messages = world.platform.wait_for(MINUTES, |seen| seen.message_count >= reached).await;
        messages.expect("the messages go on");
        proxy.cut();
    }
    // Copies that found their line full wait aside for half a minute.
    let all = world.platform.wait_for(MINUTES, |seen| seen.message_count >= JOBS).await;
    all.expect("every job is sent");
    all_sent(&world.database.store(), &jobs).await;
    assert_eq!(world.platform.seen(|seen| (seen.final_dots, seen.message_count)), (JOBS, JOBS));
    // Deliveries whose acknowledgement was cut off come once more, perhaps from aside, and go without a further message.
    let lane = world.broker.name("jobs.notifications");
    let aside = [1, 2, 5, 30, 120, 600].map(|delay_s| format!("retry.notifications.{delay_s}"));
    eventually_within(MINUTES, "every delivery is settled", async || {
        for queue in &aside {
            if world.broker.count(&world.broker.name(queue)).await != Some(0) {
                return false;
            }
        }
        let of =
            |outcome| format!(r#"sendoff_jobs_settled_total{{lane="notifications",outcome="{outcome}"}}"#);
        let received = worker.metric(r#"sendoff_jobs_received_total{lane="notifications"}"#).await;
        let mut settled = 0.0;
        for outcome in ["sent", "duplicate", "requeued", "deferred", "dead"] {
            settled += worker.metric(&of(outcome)).await;
        }
        world.broker.count(&lane).await == Some(0) && received == settled
    })
    .await;
    worker.stop().await;
    world.broker.wait_count(&lane, 0).await;
    assert_eq!(world.platform.seen(|seen| (seen.final_dots, seen.message_count)), (JOBS, JOBS));
    world.end().await;
}

#[tokio::test]
async fn a_worker_started_before_its_services_waits_for_them_and_then_works() {
    let mut world = World::new().await;
    let (broker, amqp) = Proxy::before(&amqp_url()).await;
    let (database, postgres) = Proxy::before(world.database.url().expose_secret()).await;
    broker.refuse();
    database.refuse();
    world.set("AMQP_URL", &amqp);
    world.set("DATABASE_URL", &postgres);
    let id = world.publish(&job(None)).await;
    let worker = world.worker_starting(&[]).await;
    worker.logs("waiting for the database").await;
    let tries = database.accepted();
    eventually("it tries on", async || database.accepted() > tries + 1).await;
    assert_eq!((worker.get("/livez").await.0, worker.get("/readyz").await.0), (200, 503));

    database.forward();
    away(&worker, "broker").await;
    for role in ["consuming", "publishing"] {
        worker.logs(&format!("no connection to RabbitMQ; trying on role=\"{role}\"")).await;
    }
    broker.forward();
    worker.ready().await;
    world.event("email.sent", id).await;
    let log = worker.log();
    assert_eq!(log.matches("waiting for the database").count(), 1, "{log}");
    for role in ["consuming", "publishing"] {
        let said = format!("no connection to RabbitMQ; trying on role=\"{role}\"");
        let reasons: Vec<&str> =
            log.lines().filter_map(|line| Some(line.split_once(said.as_str())?.1)).collect();
        assert!(!reasons.is_empty() && reasons.windows(2).all(|two| two[0] != two[1]), "said again: {log}");
    }
    worker.stop().await;
    world.end().await;
}

#[tokio::test]
async fn a_topology_that_was_deleted_is_declared_again_at_the_next_connection() {
    let mut world = World::new().await;
    let (broker, amqp) = Proxy::before(&amqp_url()).await;
    world.set("AMQP_URL", &amqp);
    let worker = world.worker().await;
    let queues = ["dead", "control", "retry.notifications.1", "jobs.notifications"];
    let channel = world.broker.channel().await;
    broker.refuse();
    away(&worker, "broker").await;
    for queue in queues {
        let name = world.broker.name(queue);
        channel.queue_delete(name.as_str().into(), QueueDeleteOptions::default()).await.expect("deleted");
    }
    for exchange in ["jobs", "unrouted", "jobs.notifications"] {
        let name = world.broker.name(exchange);
        let options = ExchangeDeleteOptions::default();
        channel.exchange_delete(name.as_str().into(), options).await.expect("deleted");
    }

    broker.forward();
    worker.ready().await;
    for queue in queues {
        assert_eq!(world.broker.count(&world.broker.name(queue)).await, Some(0), "{queue}");
    }
    world.platform.rule(Rule::new(Stage::Rcpt, Action::reply("451 4.7.1 greylisted")).once());
    let id = world.publish(&job(None)).await;
    world.event("email.sent", id).await;
    assert_eq!(world.state(None, id, State::Sent).await.attempts, 2);
    let nobody = serde_json::to_vec(&job(None)).expect("JSON");
    world.broker.publish_job("elsewhere", &nobody, BasicProperties::default()).await;
    assert_eq!(world.dead_letter().await.0, nobody);
    worker.stop().await;
    world.end().await;
}
