//! What a cancellation does to the ledger's rows, under claims, gates and settles at the same time.

use std::time::Duration;

use sendoff::model::cancelling::Cancellation;
use sendoff::model::failure::Reason;
use sendoff::model::job::{JobKey, Revision};
use sendoff::model::ledger::{
    Claim, ClaimAnswer, Claimed, Gate, GateAnswer, Settle, SettleAnswer, Settlement, State, Turn,
};
use sendoff::model::organization::OrganizationId;
use sendoff::store::{DEAD_AFTER, Incarnations, Ledger, Store, Sweeper};

use super::{BOOKING, call_back, entry, in_time};
use crate::support::claims::{copy, key, settle};
use crate::support::database::TestDatabase;
use crate::support::world::SOON;

async fn call_back_booking(store: &Store, sequence: i64) -> Cancellation {
    let revision = Revision { group: BOOKING.into(), sequence };
    let organization = OrganizationId::from_integer(42);
    let done = store.cancel_group(Some(&organization), &revision, entry(), in_time()).await;
    done.expect("the database answers")
}

const TOO_LATE: Cancellation = Cancellation { cancelled: 0, too_late: 1 };
const CALLED_BACK: Cancellation = Cancellation { cancelled: 1, too_late: 0 };

fn of_revision(key: &JobKey, sequence: i64) -> Claim {
    let revision = Some(Revision { group: BOOKING.into(), sequence });
    Claim { revision, ..copy(key, 0) }
}

fn deferred() -> Settlement {
    Settlement::Deferred { reason: Reason::Throttled, wait: Duration::from_secs(600) }
}

async fn ledger(database: &TestDatabase) -> Ledger {
    let store = database.store();
    let incarnations = Incarnations::start(store.clone(), DEAD_AFTER);
    let ledger = Ledger::new(store, incarnations.clone(), |_| ());
    let mut watch = incarnations.watch();
    let taken = tokio::time::timeout(SOON, watch.wait_for(Option::is_some)).await;
    assert!(taken.is_ok_and(|taken| taken.is_ok()), "an incarnation is taken soon");
    ledger
}

async fn granted(ledger: &Ledger, claim: Claim) -> Box<Claimed> {
    match ledger.claim(claim).await.expect("the database answers") {
        ClaimAnswer::Claimed(claimed) => claimed,
        other => panic!("not granted: {other:?}"),
    }
}

#[tokio::test]
async fn whatever_a_row_says_it_is_called_back_or_too_late_and_marked() {
    let database = TestDatabase::migrated().await;
    let store = database.store();
    let row = |state: &str, columns: &str, values: &str| {
        format!(
            "TRUNCATE jobs; INSERT INTO jobs (id, organization_id, state, turn, owner, first_at, updated_at{columns}) \
             VALUES ('{}', '42', '{state}', 3, 9, now(), now(){values})",
            key(1).id
        )
    };
    for (state, columns, values, expected, state_then, reason_then) in [
        ("deferred", "", "", CALLED_BACK, "cancelled", "cancelled"),
        ("parked", ", reason", ", 'auth_failed'", CALLED_BACK, "cancelled", "cancelled"),
        ("dead", ", reason", ", 'message_refused'", CALLED_BACK, "cancelled", "cancelled"),
        ("dead", ", reason", ", 'unknown_outcome'", TOO_LATE, "dead", "unknown_outcome"),
        ("cancelled", ", reason", ", 'cancelled'", CALLED_BACK, "cancelled", "cancelled"),
        // Its claim's owner died, and may have sent it.
        ("deferred", ", orphan, reason", ", false, 'throttled'", TOO_LATE, "deferred", "throttled"),
        ("claimed", ", reason", ", 'throttled'", TOO_LATE, "claimed", "throttled"),
        ("deferred", ", partly_sent", ", true", CALLED_BACK, "deferred", "cancelled"),
        ("parked", ", partly_sent, reason", ", true, 'auth_failed'", CALLED_BACK, "parked", "auth_failed"),
        ("sent", ", reason", ", ''", TOO_LATE, "sent", ""),
    ] {
        database.run(row(state, columns, values)).await;
        for _ in 0..2 {
            assert_eq!(call_back(&store, &key(1)).await, expected, "{state}{values}");
        }
        let as_it_is = format!(
            "SELECT count(*) FROM jobs WHERE cancel_requested AND state = '{state_then}' AND reason = '{reason_then}' \
             AND turn = 3 AND owner = 9"
        );
        assert_eq!(database.number(as_it_is).await, 1, "{state}{values}");
    }
    database.run(row("deferred", ", unknowns", ", 1")).await;
    assert_eq!(call_back(&store, &key(1)).await, CALLED_BACK);
    let status = store.job_status(&key(1)).await.unwrap().expect("a row");
    assert_eq!(status.detail.as_deref(), Some("cancelled; an earlier attempt may have been accepted"));
}

#[tokio::test]
async fn a_claim_and_a_gate_tell_that_the_job_was_called_back() {
    let database = TestDatabase::migrated().await;
    let (ledger, store) = (ledger(&database).await, database.store());
    let of = |number| of_revision(&key(number), 2);
    let gate = |number, claimed: &Claimed| Gate {
        key: key(number),
        owner: claimed.owner,
        turn: claimed.turn,
        commit: false,
        revision: of(number).revision,
    };
    let [one, other] = [granted(&ledger, of(1)).await, granted(&ledger, of(2)).await];
    assert!(!one.cancelled && !other.cancelled);
    assert_eq!(ledger.before_data(gate(1, &one)).await.unwrap(), GateAnswer::Open);
    assert_eq!(call_back(&store, &key(1)).await, TOO_LATE);
    assert_eq!(ledger.before_data(gate(1, &one)).await.unwrap(), GateAnswer::Cancelled);
    assert_eq!(ledger.before_data(gate(2, &other)).await.unwrap(), GateAnswer::Open);
    let done = call_back_booking(&store, 2).await;
    assert_eq!(done, Cancellation { cancelled: 0, too_late: 2 });
    assert_eq!(ledger.before_data(gate(2, &other)).await.unwrap(), GateAnswer::Cancelled);
    // What comes behind.
    assert!(granted(&ledger, of(3)).await.cancelled);
    let older = granted(&ledger, of_revision(&key(4), 1)).await;
    assert_eq!((older.cancelled, older.newest_sequence), (false, Some(2)));
    assert!(!granted(&ledger, of_revision(&key(5), 3)).await.cancelled);
    assert!(!granted(&ledger, copy(&key(6), 0)).await.cancelled);
    // Given up, it is `cancelled`, and stays the sender's to settle again should the answer be lost.
    let reason = Reason::Cancelled;
    let dead = settle(&key(1), &one, Settlement::Dead { reason, detail: "cancelled".into() });
    for _ in 0..2 {
        assert_eq!(ledger.settle(dead.clone()).await.unwrap(), SettleAnswer::Recorded);
    }
    let status = store.job_status(&key(1)).await.unwrap().expect("a row");
    assert_eq!((status.state, status.turn), (State::Cancelled, Turn(1)));
}

#[tokio::test]
async fn an_outcome_that_is_recorded_again_after_its_job_was_called_back_is_known() {
    let database = TestDatabase::migrated().await;
    let (ledger, store) = (ledger(&database).await, database.store());
    let claimed = granted(&ledger, copy(&key(1), 0)).await;
    let recorded = settle(&key(1), &claimed, deferred());
    assert_eq!(ledger.settle(recorded.clone()).await.unwrap(), SettleAnswer::Recorded);
    assert_eq!(call_back(&store, &key(1)).await, CALLED_BACK);
    // The answer was lost: the copy that it owes is still to be made.
    assert_eq!(ledger.settle(recorded.clone()).await.unwrap(), SettleAnswer::Recorded);
    let sent = Settle { outcome: Settlement::Sent, ..recorded };
    assert_eq!(ledger.settle(sent).await.unwrap(), SettleAnswer::NotOwner);
    let answer = ledger.claim(copy(&key(1), 1)).await.unwrap();
    assert!(matches!(&answer, ClaimAnswer::Closed(end) if end.state == State::Cancelled), "{answer:?}");
}

#[tokio::test]
async fn of_claims_and_cancellations_at_once_each_job_is_counted_or_finds_out() {
    let database = TestDatabase::migrated().await;
    let (ledger, store) = (ledger(&database).await, database.store());
    for round in 0..20_u128 {
        database.run("TRUNCATE jobs, job_groups").await;
        let keys: Vec<JobKey> = (0..8).map(|number| key(100 * round + number)).collect();
        let claims = keys.iter().map(|key| ledger.claim(of_revision(key, 2)));
        let (claims, done) =
            tokio::join!(futures_util::future::join_all(claims), call_back_booking(&store, 2));
        let unaware = claims.into_iter().filter(|claim| match claim.as_ref().expect("no deadlock") {
            ClaimAnswer::Claimed(claimed) => !claimed.cancelled,
            other => panic!("{other:?}"),
        });
        let unaware = unaware.count() as u64;
        assert_eq!(done, Cancellation { cancelled: 0, too_late: unaware }, "round {round}");
    }
}

#[tokio::test]
async fn a_cancellation_is_remembered_as_long_as_the_ledger_remembers() {
    let database = TestDatabase::migrated().await;
    let store = database.store();
    call_back(&store, &key(1)).await;
    call_back_booking(&store, 2).await;
    let rows = "SELECT (SELECT count(*) FROM jobs) + (SELECT count(*) FROM job_groups)";
    let retention = Duration::from_secs(24 * 3600);
    for (age, left) in [("20 hours", 2), ("10 hours", 0)] {
        let back = format!("updated_at = updated_at - interval '{age}'");
        database
            .run(format!(
                "UPDATE jobs SET first_at = first_at - interval '{age}', {back}; UPDATE job_groups SET {back}"
            ))
            .await;
        Sweeper::new(store.clone()).sweep(retention).await.unwrap();
        assert_eq!(database.number(rows).await, left, "{age}");
    }
}
