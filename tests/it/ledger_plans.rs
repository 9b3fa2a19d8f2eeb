//! What the ledger's statements read: their plans are made once, and have to be right for every size of the table.

use std::time::Duration;

use sendoff::model::ledger::{ClaimAnswer, Settlement};
use sendoff::store::{Incarnations, Ledger};

use crate::support::broker::{SOON, eventually};
use crate::support::claims::{copy, key, settle};
use crate::support::database::TestDatabase;

const ROWS: i64 = 50_000;

#[tokio::test]
async fn a_table_that_grew_after_the_plans_were_made_is_not_read_from_end_to_end() {
    let database = TestDatabase::migrated().await;
    let incarnations = Incarnations::start(database.store(), Duration::from_secs(10));
    let ledger = Ledger::new(database.store(), incarnations.clone(), |_| ());
    let mut watch = incarnations.watch();
    tokio::time::timeout(SOON, watch.wait_for(Option::is_some))
        .await
        .expect("soon")
        .expect("the watch lives");
    let work = async |number: u128| {
        let key = key(number);
        let ClaimAnswer::Claimed(claimed) = ledger.claim(copy(&key, 0)).await.expect("an answer") else {
            panic!("{number} is not claimed");
        };
        ledger.settle(settle(&key, &claimed, Settlement::Sent)).await.expect("an answer");
        // Not granted, so that the statement that tells why is run too.
        assert!(matches!(ledger.claim(copy(&key, 0)).await, Ok(ClaimAnswer::AlreadySent)));
    };
    for number in 1..=10 {
        work(number).await;
    }
    database
        .run(format!(
            "INSERT INTO jobs (organization_id, id, state, turn, owner, first_at, updated_at) \
             SELECT '', gen_random_uuid(), 'sent', 0, 0, now(), now() FROM generate_series(1, {ROWS})"
        ))
        .await;
    let used = "SELECT coalesce(sum(idx_scan), 0)::bigint FROM pg_stat_user_tables WHERE relname = 'jobs'";
    let before = database.number(used).await;
    for number in 11..=60 {
        work(number).await;
    }
    // The server counts with a delay.
    eventually("what was read is counted", || async { database.number(used).await >= before + 50 }).await;
    let scans = "SELECT seq_scan FROM pg_stat_user_tables WHERE relname = 'jobs'";
    assert_eq!(database.number(scans).await, 0);
    let read = "SELECT sum(idx_tup_read)::bigint FROM pg_stat_user_indexes WHERE relname = 'jobs'";
    let read = database.number(read).await;
    assert!(read < ROWS / 10, "{read} index entries were read for 180 statements");
}
