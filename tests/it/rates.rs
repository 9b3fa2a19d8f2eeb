//! What providers allow: kept by all workers together, from the table or as a configuration says, at no job's expense.
//! Guarantee: real workers against a server that answers 421 and 451 to whatever is beyond its limits.

use std::time::Duration;

use sendoff::model::ledger::State;
use sendoff::model::provider::{Limited, Overrides};
use sendoff::store::RateAsk;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::support::broker::eventually;
use crate::support::database::TestDatabase;
use crate::support::dns::{Answer, DnsServer};
use crate::support::smtp_server::Tls;
use crate::support::world::{SOON, WorkerProcess, World, job};

const MICROSOFT: &str = "smtp.office365.com";

/// An organization whose configuration limits its account so.
async fn limited(world: &World, id: &str, max_connections: Option<u32>, messages_per_minute: Option<u32>) {
    let limits = json!({"max_connections": max_connections, "messages_per_minute": messages_per_minute});
    world.organization_at(id, limits).await;
}

async fn publish(world: &World, organization: Option<&str>, count: usize) -> Vec<Uuid> {
    let mut ids = Vec::new();
    for _ in 0..count {
        ids.push(world.publish(&job(organization)).await);
    }
    ids
}

/// Jobs that a worker has put aside for this limit.
async fn waits(worker: &WorkerProcess, transport: &str, limit: &str) -> f64 {
    let series = format!("sendoff_provider_waits_total{{transport=\"{transport}\",limit=\"{limit}\"}}");
    worker.metric(&series).await
}

async fn sent(worker: &WorkerProcess) -> f64 {
    worker.metric("sendoff_jobs_settled_total{lane=\"notifications\",outcome=\"sent\"}").await
}

fn over_limit(world: &World) -> usize {
    world.server.seen(|seen| seen.over_limit)
}

#[tokio::test(flavor = "multi_thread")]
async fn two_workers_together_keep_within_what_a_provider_allows() {
    // 60 a minute is 6 at once and 0.86 a second: in ten seconds and those that a token lasts, 18. Each for itself, two workers
    // would send 28.
    let world = World::with(|server| {
        server.most_connections = Some(2);
        server.most_messages = Some((18, Duration::from_secs(10)));
    })
    .await;
    let workers = [world.worker().await, world.worker().await];
    limited(&world, "acme", Some(2), Some(60)).await;
    let ids = publish(&world, Some("acme"), 24).await;
    world.received(24).await;
    for id in ids {
        let status = world.state(Some("acme"), id, State::Sent).await;
        assert_eq!((status.attempts, status.reason), (1, None), "{id}: waiting costs no attempt");
    }
    assert_eq!(over_limit(&world), 0, "the server never had to refuse anything");
    for worker in &workers {
        assert!(sent(worker).await > 0.0, "each worker has its share");
    }
    assert!(waits(&workers[0], "organization", "messages").await > 0.0);
    for worker in workers {
        let told = worker.log().matches("mail waits for what its provider allows").count();
        assert!(told <= 1, "once, and not for each job");
        worker.stop().await;
    }
    let kept = "SELECT count(*) FROM rate_leases";
    assert_eq!(world.database.number(kept).await, 0, "a worker that stops gives everything back");
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn mail_that_waits_for_its_rate_holds_up_nobody_else_in_a_small_prefetch() {
    let mut world = World::new().await;
    let config = world.file(
        "small.toml",
        b"[[amqp.lanes]]\nname = \"notifications\"\nbindings = [\"notification.#\"]\nprefetch = 4\n",
    );
    world.set("SENDOFF_CONFIG", config.to_str().unwrap());
    let worker = world.worker().await;
    limited(&world, "slow", None, Some(1)).await;
    world.organization("quick").await;
    publish(&world, Some("slow"), 40).await;
    // The rate lets one go in a minute: were the others held, none behind them would come up.
    let quick = publish(&world, Some("quick"), 3).await;
    for id in quick {
        world.state(Some("quick"), id, State::Sent).await;
    }
    eventually("the others are aside", async || waits(&worker, "organization", "messages").await >= 39.0)
        .await;
    let aside = async |seconds: u32| {
        world.broker.count(&world.broker.name(&format!("retry.notifications.{seconds}"))).await.unwrap_or(0)
    };
    // One in 65 s: the 5 s until others come back are one's time, so are the 30 s; then eight, and the rest.
    assert!(aside(600).await >= 25, "most do not come back every five seconds");
    assert!(worker.log().contains("mail waits for what its provider allows"));
    worker.stop().await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_known_provider_is_kept_to_its_limits_until_the_configuration_says_otherwise() {
    let dns = DnsServer::start().await;
    dns.script(MICROSOFT, Answer::addresses(&["127.0.0.1"]), 60);
    let mut world = World::with(|server| server.most_connections = Some(3)).await;
    let certificate = world.authority.issue(&[MICROSOFT]).server_config();
    world.server.change(|server| server.tls = Tls::Starttls(certificate));
    world.set("SENDOFF__EGRESS__NAMESERVERS", &dns.address().to_string());
    let worker = world.worker().await;
    world.organization_at("acme", json!({"host": MICROSOFT})).await;
    let get = async || world.commanded("smtp_config.get", "acme", json!({})).await;
    let of_the_table = json!({"max_connections": 3, "messages_per_minute": 30, "source": "Microsoft 365"});
    assert_eq!(get().await["limits"], of_the_table);

    publish(&world, Some("acme"), 9).await;
    eventually("some wait", async || waits(&worker, "organization", "messages").await >= 4.0).await;
    assert!(world.server.messages().len() < 9, "30 a minute are 3 at once");
    let update = async |params: Value| world.commanded("smtp_config.update", "acme", params).await;
    let updated = update(json!({"messages_per_minute": 6000})).await;
    let own = json!({"max_connections": 3, "messages_per_minute": 6000, "source": "configuration"});
    assert_eq!(updated["limits"], own, "the other limit stays the provider's");
    world.received(9).await;
    publish(&world, Some("acme"), 60).await;
    world.received(69).await;
    assert_eq!(over_limit(&world), 0);

    let arguments = ["org", "smtp", "update", "acme", "--messages-per-minute", "provider"];
    let (code, shown, errors) = world.run(&arguments).await;
    assert_eq!(code, 0, "{errors}");
    assert!(shown.contains("30 messages a minute, over all workers (by Microsoft 365)"), "{shown}");
    assert_eq!(get().await["limits"], of_the_table, "null returns to the table");
    let (code, _, errors) = world.run(&["org", "smtp", "update", "acme", "--max-connections", "0"]).await;
    assert!(code == 2 && errors.contains("from 1 to 1000"), "{code} {errors}");
    let unlimited = world.commanded("smtp_config.update", "acme", json!({"port": world.server.port()})).await;
    assert_eq!(unlimited["limits"], of_the_table);
    worker.stop().await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_configuration_of_an_unknown_host_shows_no_limits() {
    let world = World::new().await;
    let worker = world.worker().await;
    world.organization("acme").await;
    let config = world.commanded("smtp_config.get", "acme", json!({})).await;
    assert!(config.get("limits").is_none(), "{config}");
    let reply = world
        .answered(json!({"command": "smtp_config.update", "organization_id": "acme", "params": {"max_connections": 0}}))
        .await;
    assert_eq!(
        (&reply["error"]["code"], &reply["error"]["field"]),
        (&json!("invalid_field"), &json!("max_connections"))
    );
    worker.stop().await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_workers_connections_come_free_by_themselves() {
    let world = World::with(|server| server.most_connections = Some(1)).await;
    let first = world.worker().await;
    limited(&world, "acme", Some(1), None).await;
    publish(&world, Some("acme"), 1).await;
    world.received(1).await;
    assert_eq!(world.server.seen(|seen| seen.staying_sessions()), 1, "kept for the next message");
    first.kill().await;
    let second = world.worker().await;
    let ids = publish(&world, Some("acme"), 1).await;
    eventually("the dead worker's lease is respected", async || {
        waits(&second, "organization", "connections").await >= 1.0
    })
    .await;
    let status = world.state(Some("acme"), ids[0], State::Sent).await;
    assert_eq!((status.attempts, over_limit(&world)), (1, 0));
    second.stop().await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_stops_leaves_its_connection_to_the_next() {
    let world = World::with(|server| server.most_connections = Some(1)).await;
    let first = world.worker().await;
    limited(&world, "acme", Some(1), None).await;
    publish(&world, Some("acme"), 1).await;
    world.received(1).await;
    first.stop().await;
    assert_eq!(world.database.number("SELECT count(*) FROM rate_leases").await, 0);
    let second = world.worker().await;
    publish(&world, Some("acme"), 5).await;
    world.received(6).await;
    assert_eq!(over_limit(&world), 0);
    assert_eq!(waits(&second, "organization", "connections").await, 0.0, "it was free at once");
    second.stop().await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_without_mail_closes_its_connection_for_one_that_goes_without() {
    let mut world = World::with(|server| server.most_connections = Some(1)).await;
    let first = world.worker().await;
    limited(&world, "acme", Some(1), None).await;
    publish(&world, Some("acme"), 1).await;
    world.received(1).await;
    let config =
        world.file("other.toml", b"[[amqp.lanes]]\nname = \"reminders\"\nbindings = [\"reminder.#\"]\n");
    world.set("SENDOFF_CONFIG", config.to_str().unwrap());
    let second = world.worker().await;
    let body = serde_json::to_vec(&job(Some("acme"))).unwrap();
    world.broker.publish_job("reminder.test", &body, lapin::BasicProperties::default()).await;
    world.received(2).await;
    assert_eq!(over_limit(&world), 0, "closed by the one before it is opened by the other");
    assert!(waits(&second, "organization", "connections").await >= 1.0);
    first.stop().await;
    second.stop().await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_account_that_somebody_keeps_locked_holds_up_no_other_mail() {
    let world = World::new().await;
    let worker = world.worker().await;
    limited(&world, "held", None, Some(60)).await;
    world.organization("free").await;
    let mut stranger = world.database.connect().await;
    let hold = "BEGIN; LOCK TABLE rate_accounts IN ACCESS EXCLUSIVE MODE";
    sqlx::raw_sql(hold).execute(&mut stranger).await.unwrap();
    let held = publish(&world, Some("held"), 3).await;
    eventually("they are put aside", async || waits(&worker, "organization", "connections").await >= 3.0)
        .await;
    let free = publish(&world, Some("free"), 1).await;
    world.state(Some("free"), free[0], State::Sent).await;
    assert!(!worker.log().contains("the database is away"), "nor is the database taken for lost");
    sqlx::raw_sql("ROLLBACK").execute(&mut stranger).await.unwrap();
    for id in held {
        assert_eq!(world.state(Some("held"), id, State::Sent).await.attempts, 1);
    }
    worker.stop().await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_organizations_on_one_account_have_its_connections_together() {
    let world = World::with(|server| server.most_connections = Some(1)).await;
    let worker = world.worker().await;
    for organization in ["acme", "other"] {
        limited(&world, organization, Some(1), None).await;
    }
    let mut ids = Vec::new();
    for _ in 0..4 {
        for organization in ["acme", "other"] {
            ids.push((organization, world.publish(&job(Some(organization))).await));
        }
    }
    for (organization, id) in ids {
        let status = world.state(Some(organization), id, State::Sent).await;
        assert_eq!(status.attempts, 1);
    }
    assert_eq!(over_limit(&world), 0, "the idle session of one is closed for the other's");
    worker.stop().await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_platforms_own_server_is_limited_by_its_setting() {
    let mut world = World::new().await;
    world.set("SENDOFF__PLATFORM__MESSAGES_PER_MINUTE", "1");
    let worker = world.worker().await;
    publish(&world, None, 3).await;
    eventually("two wait", async || waits(&worker, "platform", "messages").await >= 2.0).await;
    world.platform.wait_for_messages(1, SOON).await.unwrap();
    assert_eq!(world.platform.messages().len(), 1);
    worker.stop().await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn mail_that_waits_for_its_rate_past_its_age_is_given_up() {
    let mut world = World::new().await;
    world.set("SENDOFF__RETRY__MAX_AGE_S", "7");
    let worker = world.worker().await;
    limited(&world, "acme", None, Some(1)).await;
    let sent = publish(&world, Some("acme"), 1).await;
    world.state(Some("acme"), sent[0], State::Sent).await;
    let late = publish(&world, Some("acme"), 1).await;
    let status = world.state(Some("acme"), late[0], State::Dead).await;
    assert_eq!((status.attempts, status.reason.map(|r| r.as_str())), (0, Some("retries_exhausted")));
    worker.stop().await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn slices_that_are_leased_at_once_are_no_more_than_there_is() {
    let database = TestDatabase::migrated().await;
    let store = database.store();
    let overrides = Overrides { max_connections: Some(3), messages_per_minute: Some(100) };
    let limited = Limited::of("mail.acme.example", Some("ann"), overrides).unwrap();
    let ask = RateAsk { tokens: 8, connections: 8, ..RateAsk::default() };
    let holder = |number: u128| Uuid::from_u128(number);
    let leases = (1..=6).map(|number| store.lease_rate(&limited, holder(number), ask));
    let slices = futures_util::future::try_join_all(leases).await.unwrap();
    let slices: Vec<_> = slices.into_iter().flatten().collect();
    let total = |of: fn(&sendoff::store::RateSlice) -> u32| slices.iter().map(of).sum::<u32>();
    assert_eq!(total(|slice| slice.connections), 3);
    let tokens = total(|slice| slice.tokens);
    assert!((8..=10).contains(&tokens), "a full bucket is 10: {tokens}");

    database.run("UPDATE rate_leases SET expires_at = now()").await;
    let alone = store.lease_rate(&limited, holder(7), ask).await.unwrap().unwrap();
    assert_eq!((alone.connections, alone.workers), (3, 1), "what has expired is free");
    store.give_back_rate(limited.key, holder(7), 0).await.unwrap();
    let debt = RateAsk { debt: 50, connections: 1, tokens: 1, ..RateAsk::default() };
    let slice = store.lease_rate(&limited, holder(8), debt).await.unwrap().unwrap();
    assert!(slice.tokens == 0 && slice.left < -30.0, "{slice:?}");
    store.forget_rates().await.unwrap();
    assert_eq!(
        database.number("SELECT count(*) FROM rate_accounts").await,
        1,
        "it still owes, and is leased"
    );
    database
        .run("UPDATE rate_accounts SET tokens = 0, refilled_at = now() - interval '1 hour'; UPDATE rate_leases SET expires_at = now()")
        .await;
    store.forget_rates().await.unwrap();
    assert_eq!(database.number("SELECT count(*) FROM rate_accounts").await, 0);
}
