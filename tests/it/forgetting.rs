//! Retention of the ledger against a real PostgreSQL: what is forgotten, what never, and at what cost.

use std::time::Duration;

use sendoff::model::ledger::{Claim, ClaimAnswer, Settle, SettleAnswer, Settlement};
use sendoff::store::{DEAD_AFTER, Incarnations, Ledger, Sweep, Sweeper};
use uuid::Uuid;

use crate::support::broker::eventually;
use crate::support::claims::{copy, key, settle};
use crate::support::database::TestDatabase;

const SLICE: u64 = 1000;
const RETENTION: Duration = days(90);

const fn days(days: u64) -> Duration {
    Duration::from_secs(days * 24 * 3600)
}

/// Sent jobs of so many days ago, numbered, a second apart.
async fn sent(database: &TestDatabase, numbers: std::ops::RangeInclusive<u64>, days: u32) {
    let (first, last) = numbers.into_inner();
    database
        .run(format!(
            "INSERT INTO jobs (organization_id, id, state, turn, owner, first_at, updated_at) \
             SELECT '42', lpad(to_hex(n), 32, '0')::uuid, 'sent', 0, 1, at, at + interval '1 second' \
             FROM (SELECT n, now() - interval '{days} days' + n * interval '1 second' AS at \
                 FROM generate_series({first}::bigint, {last}) AS n) AS a"
        ))
        .await;
}

/// A letter in the archive, of which only the job matters here.
async fn archived(database: &TestDatabase, job: Uuid) {
    database
        .run(format!(
            "INSERT INTO dead_letters (letter, job_id, organization_id, routing_key, state, reason, attempts, died_at, \
             turn, body_hash, bytes, properties_sealed, body_sealed) VALUES (gen_random_uuid(), '{job}', \
             '42', 'email', 'replayed', 'message_refused', 1, now(), 1, '', 0, '', '')"
        ))
        .await;
}

/// Sweeps until nothing is left to look at: the sum, and the number of calls.
async fn sweep_all(sweeper: &mut Sweeper, retention: Duration) -> (Sweep, u64) {
    let mut sum = Sweep::default();
    for calls in 1.. {
        let sweep = sweeper.sweep(retention).await.unwrap();
        assert!(sweep.seen <= 2 * SLICE, "{sweep:?}");
        sum.seen += sweep.seen;
        sum.forgotten += sweep.forgotten;
        assert!(calls < 200, "there is no end: {sum:?}");
        if sweep.complete {
            return (sum, calls);
        }
    }
    unreachable!("the loop returns")
}

async fn jobs(database: &TestDatabase) -> i64 {
    database.number("SELECT count(*) FROM jobs").await
}

#[tokio::test]
async fn finished_jobs_are_forgotten_after_their_time_and_unfinished_ones_never() {
    let database = TestDatabase::migrated().await;
    let states = ["claimed", "sent", "deferred", "parked", "dead", "unknown", "cancelled"];
    // First seen so many days ago, finished so many.
    for (number, (seen, finished)) in [(1, 1), (89, 89), (91, 91), (200, 200), (200, 89)].iter().enumerate() {
        for (state_number, state) in states.iter().enumerate() {
            let id = Uuid::from_u128(10 * number as u128 + state_number as u128);
            database
                .run(format!(
                    "INSERT INTO jobs (organization_id, id, state, turn, owner, first_at, updated_at) VALUES \
                     ('42', '{id}', '{state}', 0, 0, now() - interval '{seen} days', now() - interval '{finished} days')"
                ))
                .await;
        }
    }
    let (sum, calls) = sweep_all(&mut Sweeper::new(database.store()), RETENTION).await;
    assert_eq!((sum.seen, sum.forgotten, calls), (21, 6, 1));
    let finished = "SELECT count(*) FROM jobs WHERE state IN ('sent', 'dead', 'cancelled')";
    assert_eq!(database.number(finished).await, 9);
    assert_eq!(jobs(&database).await, 35 - 6);
    let old = "SELECT count(*) FROM jobs WHERE updated_at < now() - interval '90 days'";
    assert_eq!(database.number(old).await, 8);
}

#[tokio::test]
async fn a_letter_in_the_archive_keeps_the_row_of_its_job() {
    let database = TestDatabase::migrated().await;
    sent(&database, 1..=3, 100).await;
    archived(&database, Uuid::from_u128(1)).await;
    let (sum, _) = sweep_all(&mut Sweeper::new(database.store()), RETENTION).await;
    assert_eq!((sum.seen, sum.forgotten), (3, 2));
    let kept = format!("SELECT count(*) FROM jobs WHERE id = '{}'", Uuid::from_u128(1));
    assert_eq!(database.number(kept).await, 1);
    database.run("DELETE FROM dead_letters").await;
    let (sum, _) = sweep_all(&mut Sweeper::new(database.store()), RETENTION).await;
    assert_eq!((sum.forgotten, jobs(&database).await), (1, 0));
}

#[tokio::test]
async fn a_backlog_is_forgotten_in_one_go_and_what_stays_is_walked_once() {
    let database = TestDatabase::migrated().await;
    sent(&database, 1..=20_000, 100).await;
    database.run("UPDATE jobs SET state = 'deferred' WHERE get_byte(uuid_send(id), 15) < 25").await;
    let stays = database.number("SELECT count(*) FROM jobs WHERE state = 'deferred'").await;
    sent(&database, 30_001..=31_000, 80).await;
    let mut sweeper = Sweeper::new(database.store());
    let (sum, calls) = sweep_all(&mut sweeper, RETENTION).await;
    assert_eq!(sum.forgotten, 20_000 - stays.unsigned_abs());
    assert!(calls <= 23, "{calls} calls");
    assert_eq!(jobs(&database).await, stays + 1000);
    // What became due since is found, and nothing else is looked at.
    assert_eq!(sweep_all(&mut sweeper, RETENTION).await.0, Sweep::default());
    let (sum, _) = sweep_all(&mut sweeper, days(79)).await;
    assert_eq!((sum.seen, sum.forgotten), (1000, 1000));
    assert_eq!(jobs(&database).await, stays);
}

#[tokio::test]
async fn more_jobs_of_one_moment_than_a_slice_holds_do_not_stop_the_sweep() {
    let database = TestDatabase::migrated().await;
    sent(&database, 1..=2500, 100).await;
    sent(&database, 3001..=5500, 99).await;
    sent(&database, 6001..=6100, 98).await;
    database
        .run(
            "UPDATE jobs SET state = 'deferred', first_at = '2000-01-01' WHERE first_at < now() - interval '99 days'; \
             UPDATE jobs SET first_at = '2000-01-02' \
             WHERE first_at BETWEEN now() - interval '99 days' AND now() - interval '98 days'",
        )
        .await;
    let (sum, _) = sweep_all(&mut Sweeper::new(database.store()), RETENTION).await;
    assert_eq!(sum.forgotten, 2500 + 100);
    assert_eq!(jobs(&database).await, 2500);
}

#[tokio::test]
async fn many_sweep_at_once_and_wait_for_no_row_that_is_at_work() {
    let database = TestDatabase::migrated().await;
    sent(&database, 1..=5000, 100).await;
    let mut worker = database.connect().await;
    let at_work = format!(
        "BEGIN; UPDATE jobs SET state = 'claimed' WHERE id = '{}'; SELECT FROM jobs WHERE id = '{}' FOR UPDATE",
        Uuid::from_u128(1),
        Uuid::from_u128(2)
    );
    sqlx::raw_sql(sqlx::AssertSqlSafe(at_work)).execute(&mut worker).await.unwrap();
    let sweepers: Vec<_> = (0..4)
        .map(|_| {
            let mut sweeper = Sweeper::new(database.store());
            tokio::spawn(async move { sweep_all(&mut sweeper, RETENTION).await.0.forgotten })
        })
        .collect();
    let mut forgotten = 0;
    for sweeper in sweepers {
        forgotten += sweeper.await.unwrap();
    }
    assert_eq!((forgotten, jobs(&database).await), (4998, 2));
    sqlx::raw_sql("COMMIT").execute(&mut worker).await.unwrap();
    let (sum, _) = sweep_all(&mut Sweeper::new(database.store()), RETENTION).await;
    assert_eq!((sum.forgotten, jobs(&database).await), (1, 1));
}

#[tokio::test]
async fn bookings_are_forgotten_by_their_last_revision() {
    let database = TestDatabase::migrated().await;
    database
        .run(
            "INSERT INTO job_groups SELECT '42', 'b' || n, n, now() - interval '100 days' \
             FROM generate_series(1, 2500) AS n; \
             INSERT INTO job_groups VALUES ('', 'young', 1, now()), ('42', 'young', 1, now() - interval '89 days')",
        )
        .await;
    let (sum, calls) = sweep_all(&mut Sweeper::new(database.store()), RETENTION).await;
    assert_eq!((sum.seen, sum.forgotten, calls), (2502, 2500, 3));
    assert_eq!(database.number("SELECT count(*) FROM job_groups WHERE name = 'young'").await, 2);
}

#[tokio::test]
async fn a_sweep_of_a_large_ledger_reads_by_index_only() {
    let database = TestDatabase::migrated().await;
    sent(&database, 1..=50_000, 90).await;
    database
        .run(
            "INSERT INTO dead_letters (letter, job_id, organization_id, routing_key, state, reason, attempts, died_at, \
             turn, body_hash, bytes, properties_sealed, body_sealed) SELECT gen_random_uuid(), id, '42', 'email', 'dead', \
             'message_refused', 1, now(), 1, '', 0, '', '' FROM jobs LIMIT 5000; \
             ANALYZE jobs; ANALYZE dead_letters",
        )
        .await;
    // From a few seconds' jobs to all of them.
    for retention in [days(90), days(90) - Duration::from_secs(7200), days(89), days(1)] {
        let plan = Sweeper::new(database.store()).plan(retention).await.unwrap().join("\n");
        assert!(plan.contains("Index Scan using jobs_by_first_at on jobs"), "{plan}");
        assert!(plan.contains("dead_letters_by_job"), "{plan}");
        assert!(!plan.contains("Seq Scan"), "{plan}");
    }
    assert_eq!(jobs(&database).await, 50_000);
}

#[tokio::test]
async fn a_settle_changes_no_index() {
    let database = TestDatabase::migrated().await;
    let incarnations = Incarnations::start(database.store(), DEAD_AFTER);
    let ledger = Ledger::new(database.store(), incarnations.clone(), |_| ());
    incarnations.watch().wait_for(Option::is_some).await.unwrap();
    for number in 0..200 {
        let key = key(number);
        let message_id = format!("<{number}@example.org>");
        let claim = Claim { message_id, suspects: false, ..copy(&key, 0) };
        let ClaimAnswer::Claimed(claimed) = ledger.claim(claim).await.unwrap() else {
            panic!("a new job is granted");
        };
        let settle = Settle {
            partly_sent: true,
            reply: Some("250 2.0.0 Ok: queued as 4F1C20A7B3".into()),
            ..settle(&key, &claimed, Settlement::Sent)
        };
        assert_eq!(ledger.settle(settle).await.unwrap(), SettleAnswer::Recorded);
    }
    // A session tells what it did when it ends.
    incarnations.stop().await;
    database.terminate("sendoff").await;
    let updates = "SELECT n_tup_upd FROM pg_stat_user_tables WHERE relname = 'jobs'";
    eventually("the updates are counted", || async { database.number(updates).await == 200 }).await;
    let within = "SELECT n_tup_hot_upd FROM pg_stat_user_tables WHERE relname = 'jobs'";
    let within = database.number(within).await;
    assert!(within >= 190, "{within} of 200 stayed on their page");
}
