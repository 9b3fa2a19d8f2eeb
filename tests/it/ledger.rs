//! The ledger against a real PostgreSQL, with two workers.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use secrecy::ExposeSecret;
use sendoff::model::event::RefusedRecipient;
use sendoff::model::failure::{Phase, Reason};
use sendoff::model::job::{JobKey, Revision};
use sendoff::model::ledger::{
    AttemptRecord, Claim, ClaimAnswer, Claimed, Gate, GateAnswer, HandOver, Incarnation, Orphan, Settle,
    SettleAnswer, Settlement, State, Turn,
};
use sendoff::model::organization::OrganizationId;
use sendoff::store::{
    AuditEntry, Incarnations, LaneBinding, Ledger, Liveness, OLDEST_SERVER, SchemaState, Store, StoreError,
};
use time::OffsetDateTime;
use uuid::Uuid;

use crate::support::broker::{SOON, eventually};
use crate::support::claims::{copy, key, settle};
use crate::support::database::TestDatabase;

/// Between the two looks at a worker's lock, for these tests.
const DEAD_AFTER: Duration = Duration::from_millis(300);

struct Worker {
    incarnations: Incarnations,
    ledger: Ledger,
    me: Incarnation,
}

async fn worker(database: &TestDatabase) -> Worker {
    let store = database.store();
    let incarnations = Incarnations::start(store.clone(), DEAD_AFTER);
    let ledger = Ledger::new(store, incarnations.clone(), |_| ());
    let mut watch = incarnations.watch();
    let me = tokio::time::timeout(SOON, watch.wait_for(Option::is_some))
        .await
        .expect("an incarnation is taken soon")
        .expect("the watch lives")
        .expect("waited for");
    Worker { incarnations, ledger, me }
}

async fn two_workers() -> (TestDatabase, Worker, Worker) {
    let database = TestDatabase::migrated().await;
    let (a, b) = tokio::join!(worker(&database), worker(&database));
    (database, a, b)
}

fn deferred(wait: Duration) -> Settlement {
    Settlement::Deferred { reason: Reason::Throttled, wait }
}

fn dead() -> Settlement {
    Settlement::Dead { reason: Reason::MessageRefused, detail: "the server answered 550".into() }
}

impl Worker {
    async fn claim(&self, claim: Claim) -> ClaimAnswer {
        self.ledger.claim(claim).await.expect("the database answers")
    }

    async fn granted(&self, claim: Claim) -> Box<Claimed> {
        match self.claim(claim).await {
            ClaimAnswer::Claimed(claimed) => claimed,
            other => panic!("not granted: {other:?}"),
        }
    }

    async fn settled(&self, settle: Settle) -> SettleAnswer {
        self.ledger.settle(settle).await.expect("the database answers")
    }

    /// Claims and settles in one go.
    async fn done(&self, claim: Claim, outcome: Settlement) {
        let key = claim.key.clone();
        let claimed = self.granted(claim).await;
        assert_eq!(self.settled(settle(&key, &claimed, outcome)).await, SettleAnswer::Recorded);
    }

    /// This worker vanishes, and `other` has noticed.
    async fn die(self, other: &Worker) {
        let me = self.me;
        self.incarnations.stop().await;
        eventually("the death is noticed", || async {
            other.incarnations.is_alive(me).await.expect("answers") == Liveness::Dead
        })
        .await;
    }
}

fn stale(answer: ClaimAnswer) -> HandOver {
    match answer {
        ClaimAnswer::Stale(hand_over) => hand_over,
        other => panic!("not stale: {other:?}"),
    }
}

fn closed(answer: ClaimAnswer) -> HandOver {
    match answer {
        ClaimAnswer::Closed(hand_over) => hand_over,
        other => panic!("not closed: {other:?}"),
    }
}

// Claims

#[tokio::test]
async fn a_job_that_was_sent_is_sent_once() {
    let (database, a, b) = two_workers().await;
    let key = key(1);
    let claimed = a.granted(copy(&key, 0)).await;
    assert_eq!((claimed.owner, claimed.turn, claimed.attempts), (a.me, Turn(0), 0));
    assert_eq!((claimed.orphan, claimed.crashes, claimed.unknowns), (None, 0, 0));
    assert!((claimed.now - claimed.first_at).is_zero());
    a.settled(settle(&key, &claimed, Settlement::Sent)).await;
    for turn in [0, 1] {
        assert!(matches!(b.claim(copy(&key, turn)).await, ClaimAnswer::AlreadySent));
    }
    let status = database.store().job_status(&key).await.unwrap().expect("it is known");
    assert_eq!((status.state, status.attempts, status.turn), (State::Sent, 1, Turn(0)));
}

#[tokio::test]
async fn the_same_id_with_another_body_is_a_conflict_in_every_state() {
    let (_database, a, b) = two_workers().await;
    let key = key(1);
    let other = |turn| Claim { body_hash: [8; 32], ..copy(&key, turn) };
    let claimed = a.granted(copy(&key, 0)).await;
    assert!(matches!(b.claim(other(0)).await, ClaimAnswer::IdConflict));
    a.settled(settle(&key, &claimed, deferred(Duration::ZERO))).await;
    assert!(matches!(b.claim(other(1)).await, ClaimAnswer::IdConflict));
    a.done(copy(&key, 1), Settlement::Sent).await;
    assert!(matches!(b.claim(other(0)).await, ClaimAnswer::IdConflict));
}

#[tokio::test]
async fn the_same_id_in_two_organizations_is_two_jobs() {
    let (database, a, b) = two_workers().await;
    let platform = JobKey { organization: None, id: key(1).id };
    a.done(copy(&key(1), 0), Settlement::Sent).await;
    let claimed = b.granted(copy(&platform, 0)).await;
    b.settled(settle(&platform, &claimed, dead())).await;
    let store = database.store();
    let states: Vec<_> =
        store.job_status_anywhere(key(1).id).await.unwrap().into_iter().map(|s| (s.key, s.state)).collect();
    assert_eq!(states, [(platform, State::Dead), (key(1), State::Sent)]);
    assert!(store.job_status(&key(2)).await.unwrap().is_none());
}

#[tokio::test]
async fn of_two_workers_at_once_exactly_one_gets_the_job() {
    let (_database, a, b) = two_workers().await;
    for number in 0..50 {
        let key = key(number);
        let (one, other) = tokio::join!(a.claim(copy(&key, 0)), b.claim(copy(&key, 0)));
        match (one, other) {
            (ClaimAnswer::Claimed(claimed), ClaimAnswer::Held { owner })
            | (ClaimAnswer::Held { owner }, ClaimAnswer::Claimed(claimed)) => {
                assert_eq!(claimed.owner, owner)
            }
            both => panic!("{both:?}"),
        }
    }
}

#[tokio::test]
async fn of_ten_claims_by_one_worker_one_is_granted() {
    let (_database, a, _b) = two_workers().await;
    let key = key(1);
    let answers = futures_util::future::join_all((0..10).map(|_| a.claim(copy(&key, 0)))).await;
    let granted = answers.iter().filter(|answer| matches!(answer, ClaimAnswer::Claimed(_))).count();
    let held =
        answers.iter().filter(|answer| matches!(answer, ClaimAnswer::Held { owner } if *owner == a.me));
    assert_eq!((granted, held.count()), (1, 9));
}

#[tokio::test]
async fn a_deferred_job_waits_for_its_time_and_then_only_the_current_copy_goes_on() {
    let (database, a, b) = two_workers().await;
    let key = key(1);
    let pause = Duration::from_secs(600);
    a.done(copy(&key, 0), deferred(pause)).await;
    let ClaimAnswer::NotYet { wait } = b.claim(copy(&key, 1)).await else { panic!("not too early") };
    assert!(wait > pause - SOON && wait <= pause, "{wait:?}");
    let hand_over = stale(b.claim(copy(&key, 0)).await);
    assert_eq!((hand_over.owner, hand_over.turn, hand_over.state), (a.me, Turn(1), State::Deferred));
    assert_eq!((hand_over.reason, hand_over.attempts), (Some(Reason::Throttled), 1));
    assert!(!hand_over.taken_up && hand_over.age < SOON && hand_over.wait > pause - SOON);

    database.run("UPDATE jobs SET not_before = now() + interval '300 ms'").await;
    let claimed = b.granted(copy(&key, 1)).await;
    assert_eq!((claimed.turn, claimed.attempts, claimed.orphan), (Turn(1), 1, None));
    let hand_over = stale(a.claim(copy(&key, 0)).await);
    assert!(hand_over.taken_up);
    assert_eq!((hand_over.owner, hand_over.turn, hand_over.state), (b.me, Turn(1), State::Deferred));
    assert!(matches!(a.claim(copy(&key, 1)).await, ClaimAnswer::Held { owner } if owner == b.me));
    b.settled(settle(&key, &claimed, Settlement::Sent)).await;
    assert!(matches!(a.claim(copy(&key, 0)).await, ClaimAnswer::AlreadySent));
}

#[tokio::test]
async fn a_dead_job_is_closed_until_a_later_turn_replays_it() {
    let (_database, a, b) = two_workers().await;
    let key = key(1);
    a.done(copy(&key, 0), dead()).await;
    let hand_over = stale(b.claim(copy(&key, 0)).await);
    assert_eq!((hand_over.state, hand_over.reason), (State::Dead, Some(Reason::MessageRefused)));
    assert_eq!(hand_over.detail.as_deref(), Some("the server answered 550"));
    assert_eq!(closed(b.claim(copy(&key, 1)).await).turn, Turn(1));
    assert_eq!(b.granted(copy(&key, 2)).await.turn, Turn(2));
}

#[tokio::test]
async fn parked_cancelled_and_unknown_jobs_are_closed_to_their_own_turn() {
    let (database, a, _b) = two_workers().await;
    for state in ["parked", "cancelled", "unknown"] {
        let key =
            JobKey { organization: Some(OrganizationId::parse(state).unwrap()), id: Uuid::from_u128(1) };
        a.done(copy(&key, 0), deferred(Duration::ZERO)).await;
        database.run(format!("UPDATE jobs SET state = '{state}' WHERE organization_id = '{state}'")).await;
        assert_eq!(stale(a.claim(copy(&key, 0)).await).state.as_str(), state);
        assert_eq!(closed(a.claim(copy(&key, 1)).await).state.as_str(), state);
        a.granted(copy(&key, 2)).await;
    }
}

#[tokio::test]
async fn a_copy_from_after_the_ledgers_backup_is_the_current_one() {
    let (_database, a, b) = two_workers().await;
    a.done(copy(&key(1), 0), deferred(Duration::ZERO)).await;
    assert_eq!(b.granted(copy(&key(1), 5)).await.turn, Turn(5));
    a.granted(copy(&key(2), 0)).await;
    assert!(matches!(b.claim(copy(&key(2), 5)).await, ClaimAnswer::Held { .. }));
}

#[tokio::test]
async fn a_job_cancelled_before_it_came_has_no_body_to_conflict_with() {
    let (database, a, _b) = two_workers().await;
    database
        .run(format!(
            "INSERT INTO jobs (organization_id, id, state, turn, owner, first_at, updated_at, reason) \
             VALUES ('42', '{}', 'cancelled', 0, 0, now(), now(), 'cancelled')",
            key(1).id
        ))
        .await;
    let hand_over = closed(a.claim(copy(&key(1), 0)).await);
    assert_eq!((hand_over.state, hand_over.reason), (State::Cancelled, Some(Reason::Cancelled)));
}

#[tokio::test]
async fn the_first_message_id_is_kept_and_what_an_attempt_left_comes_back() {
    let (database, a, b) = two_workers().await;
    let key = key(1);
    let claimed = a.granted(copy(&key, 0)).await;
    let refused = RefusedRecipient { index: 2, code: 550, reason: Reason::RecipientsRefused };
    let attempt = AttemptRecord {
        at: OffsetDateTime::UNIX_EPOCH,
        transport: "platform".into(),
        address: Some("192.0.2.1:25".into()),
        phase: Phase::Rcpt,
        reason: Some(Reason::Throttled),
        reply: Some("451 later\0".into()),
        ms: 12,
    };
    let recorded = Settle {
        pending: Some(vec![0, 3]),
        refused: vec![refused.clone()],
        partly_sent: true,
        reply: Some("451 la\0ter".into()),
        attempt: Some(attempt.clone()),
        unknowns: 1,
        ..settle(&key, &claimed, deferred(Duration::ZERO))
    };
    a.settled(recorded).await;
    let again = b.granted(Claim { message_id: "<second@example.org>".into(), ..copy(&key, 1) }).await;
    assert_eq!(again.message_id, "<first@example.org>");
    assert_eq!((again.pending.clone(), again.refused.clone()), (Some(vec![0, 3]), vec![refused]));
    assert_eq!((again.attempts, again.unknowns, again.partly_sent), (1, 1, true));
    let status = database.store().job_status(&key).await.unwrap().unwrap();
    assert_eq!(status.reply.as_deref(), Some("451 la\u{fffd}ter"));
    assert_eq!(status.history, [AttemptRecord { reply: Some("451 later\u{fffd}".into()), ..attempt }]);
}

#[tokio::test]
async fn the_story_keeps_the_last_twenty_attempts() {
    let (database, a, _b) = two_workers().await;
    let key = key(1);
    for turn in 0..22 {
        let claimed = a.granted(copy(&key, turn)).await;
        let attempt = AttemptRecord {
            at: OffsetDateTime::UNIX_EPOCH,
            transport: "organization".into(),
            address: None,
            phase: Phase::Connect,
            reason: Some(Reason::ConnectFailed),
            reply: None,
            ms: u64::try_from(turn).unwrap(),
        };
        let recorded = Settle { attempt: Some(attempt), ..settle(&key, &claimed, deferred(Duration::ZERO)) };
        a.settled(recorded).await;
    }
    let history = database.store().job_status(&key).await.unwrap().unwrap().history;
    assert_eq!((history.len(), history[0].ms, history[19].ms), (20, 2, 21));
}

#[tokio::test]
async fn the_answer_tells_the_organizations_flag_and_current_version() {
    let (database, a, _b) = two_workers().await;
    let before = a.granted(copy(&key(1), 0)).await;
    assert_eq!((before.custom_smtp, before.config_version), (false, None));
    database
        .run(
            "INSERT INTO organizations VALUES ('42', true, 3); \
             INSERT INTO smtp_configs (organization_id, version, from_email, from_name, host, port, secure, \
             username_sealed, password_sealed) VALUES ('42', 3, 'a@b.c', 'A', 'h.example', 587, true, '', '')",
        )
        .await;
    let after = a.granted(copy(&key(2), 0)).await;
    assert_eq!((after.custom_smtp, after.config_version), (true, Some(3)));
}

// Bookings

fn revised(key: &JobKey, sequence: i64) -> Claim {
    Claim { revision: Some(Revision { group: "uid\0-1".into(), sequence }), ..copy(key, 0) }
}

#[tokio::test]
async fn a_claim_tells_the_newest_revision_and_the_gate_sees_one_that_came_meanwhile() {
    let (_database, a, b) = two_workers().await;
    let older = a.granted(revised(&key(1), 4)).await;
    assert_eq!(older.newest_sequence, Some(4));
    let gate = Gate {
        key: key(1),
        owner: a.me,
        turn: Turn(0),
        commit: true,
        revision: revised(&key(1), 4).revision,
    };
    assert_eq!(a.ledger.before_data(gate.clone()).await.unwrap(), GateAnswer::Open);
    assert_eq!(b.granted(revised(&key(2), 6)).await.newest_sequence, Some(6));
    assert_eq!(b.granted(revised(&key(3), 5)).await.newest_sequence, Some(6));
    assert_eq!(a.ledger.before_data(gate).await.unwrap(), GateAnswer::Superseded { by: 6 });
    let elsewhere = JobKey { organization: None, id: key(1).id };
    assert_eq!(a.granted(revised(&elsewhere, 1)).await.newest_sequence, Some(1));
}

// The gate

#[tokio::test]
async fn the_gate_opens_to_the_owner_alone() {
    let (database, a, b) = two_workers().await;
    let key = key(1);
    let claimed = a.granted(copy(&key, 0)).await;
    let gate =
        |owner, turn, commit| Gate { key: key.clone(), owner, turn: Turn(turn), commit, revision: None };
    assert_eq!(a.ledger.before_data(gate(a.me, 0, false)).await.unwrap(), GateAnswer::Open);
    assert_eq!(database.number("SELECT count(*) FROM jobs WHERE committing").await, 0);
    assert_eq!(a.ledger.before_data(gate(a.me, 0, true)).await.unwrap(), GateAnswer::Open);
    assert_eq!(database.number("SELECT count(*) FROM jobs WHERE committing").await, 1);
    assert_eq!(a.ledger.before_data(gate(a.me, 1, true)).await.unwrap(), GateAnswer::NotOwner);
    assert_eq!(b.ledger.before_data(gate(b.me, 0, true)).await.unwrap(), GateAnswer::NotOwner);
    assert_eq!(b.ledger.before_data(gate(a.me, 0, true)).await.unwrap(), GateAnswer::NotOwner);
    a.settled(settle(&key, &claimed, deferred(Duration::ZERO))).await;
    assert_eq!(a.ledger.before_data(gate(a.me, 0, true)).await.unwrap(), GateAnswer::NotOwner);
    assert_eq!(database.number("SELECT count(*) FROM jobs WHERE committing").await, 0);
}

// Settles

#[tokio::test]
async fn a_settle_by_another_owner_or_turn_changes_nothing() {
    let (database, a, b) = two_workers().await;
    let key = key(1);
    let claimed = a.granted(copy(&key, 0)).await;
    let right = settle(&key, &claimed, Settlement::Sent);
    let wrong_owner = Settle { owner: b.me, ..right.clone() };
    let wrong_turn = Settle { turn: Turn(1), ..right.clone() };
    let no_row = Settle { key: self::key(2), ..right.clone() };
    for wrong in [wrong_owner, wrong_turn, no_row] {
        assert_eq!(b.settled(wrong).await, SettleAnswer::NotOwner);
    }
    assert_eq!(database.store().job_status(&key).await.unwrap().unwrap().state, State::Claimed);
    assert_eq!(a.settled(right).await, SettleAnswer::Recorded);
}

#[tokio::test]
async fn a_settle_repeated_after_a_lost_answer_is_recorded_once() {
    let (database, a, b) = two_workers().await;
    let outcomes = [Settlement::Sent, deferred(Duration::from_secs(60)), dead(), Settlement::Released];
    for (number, outcome) in outcomes.into_iter().enumerate() {
        let key = key(number as u128);
        let claimed = a.granted(copy(&key, 0)).await;
        let settle = settle(&key, &claimed, outcome);
        assert_eq!(a.settled(settle.clone()).await, SettleAnswer::Recorded);
        let turn = database.store().job_status(&key).await.unwrap().unwrap().turn;
        assert_eq!(a.settled(settle.clone()).await, SettleAnswer::Recorded);
        assert_eq!(database.store().job_status(&key).await.unwrap().unwrap().turn, turn);
        assert_eq!(b.settled(Settle { owner: b.me, ..settle }).await, SettleAnswer::NotOwner);
    }
}

#[tokio::test]
async fn a_released_job_may_be_claimed_at_once_by_the_same_copy() {
    let (_database, a, b) = two_workers().await;
    let key = key(1);
    let claimed = a.granted(copy(&key, 0)).await;
    let released = Settle { attempts: 0, ..settle(&key, &claimed, Settlement::Released) };
    assert_eq!(a.settled(released).await, SettleAnswer::Recorded);
    let again = b.granted(copy(&key, 0)).await;
    assert_eq!((again.owner, again.turn, again.attempts, again.orphan), (b.me, Turn(0), 0, None));
}

// The dead

#[tokio::test]
async fn a_dead_workers_job_is_taken_over_once_with_its_mark_and_counted() {
    let (_database, a, b) = two_workers().await;
    let (key, other) = (key(1), key(2));
    let claimed = a.granted(copy(&key, 0)).await;
    a.granted(copy(&other, 0)).await;
    let gate = Gate { key: key.clone(), owner: a.me, turn: claimed.turn, commit: true, revision: None };
    assert_eq!(a.ledger.before_data(gate).await.unwrap(), GateAnswer::Open);
    assert!(matches!(b.claim(copy(&key, 0)).await, ClaimAnswer::Held { owner } if owner == a.me));
    a.die(&b).await;
    let taken = b.granted(copy(&key, 0)).await;
    assert_eq!((taken.orphan, taken.crashes), (Some(Orphan { committing: true }), 1));
    let taken_other = b.granted(copy(&other, 0)).await;
    assert_eq!((taken_other.orphan, taken_other.crashes), (Some(Orphan { committing: false }), 1));
    assert!(matches!(b.claim(copy(&key, 0)).await, ClaimAnswer::Held { owner } if owner == b.me));
    assert_eq!(b.settled(settle(&key, &claimed, Settlement::Sent)).await, SettleAnswer::NotOwner);
    b.settled(settle(&key, &taken, deferred(Duration::ZERO))).await;
    let later = b.granted(copy(&key, 1)).await;
    assert_eq!((later.orphan, later.crashes), (None, 1));
}

#[tokio::test]
async fn what_a_dead_worker_left_behind_outlives_a_release_and_a_second_death() {
    let (database, a, b) = two_workers().await;
    let key = key(1);
    a.granted(copy(&key, 0)).await;
    let gate = Gate { key: key.clone(), owner: a.me, turn: Turn(0), commit: true, revision: None };
    a.ledger.before_data(gate).await.unwrap();
    a.die(&b).await;
    let taken = b.granted(copy(&key, 0)).await;
    b.settled(Settle { attempts: 0, ..settle(&key, &taken, Settlement::Released) }).await;
    let again = b.granted(copy(&key, 0)).await;
    assert_eq!((again.orphan, again.crashes), (Some(Orphan { committing: true }), 1));
    let c = worker(&database).await;
    b.die(&c).await;
    let third = c.granted(copy(&key, 0)).await;
    assert_eq!((third.orphan, third.crashes), (Some(Orphan { committing: true }), 2));
}

#[tokio::test]
async fn a_job_that_died_with_a_worker_is_granted_only_in_a_turn_of_its_own() {
    let (database, a, b) = two_workers().await;
    let key = key(1);
    let plain = |turn| Claim { suspects: false, ..copy(&key, turn) };
    let crashes = |answer| match answer {
        ClaimAnswer::Suspect { crashes } => crashes,
        other => panic!("{other:?}"),
    };
    a.granted(plain(0)).await;
    a.die(&b).await;
    assert_eq!(crashes(b.claim(plain(0)).await), 1);
    let taken = b.granted(copy(&key, 0)).await;
    assert!(matches!(b.claim(plain(0)).await, ClaimAnswer::Held { owner } if owner == b.me));
    b.settled(settle(&key, &taken, deferred(Duration::ZERO))).await;
    // The refusals did not count, and the next death does.
    assert_eq!(crashes(b.claim(plain(1)).await), 1);
    let again = b.granted(copy(&key, 1)).await;
    assert_eq!((again.orphan, again.crashes), (None, 1));
    let c = worker(&database).await;
    b.die(&c).await;
    assert_eq!(crashes(c.claim(plain(1)).await), 2);
}

#[tokio::test]
async fn a_stale_copy_of_a_dead_workers_claim_stays_stale() {
    let (_database, a, b) = two_workers().await;
    let key = key(1);
    a.done(copy(&key, 0), deferred(Duration::ZERO)).await;
    a.granted(copy(&key, 1)).await;
    a.die(&b).await;
    assert!(stale(b.claim(copy(&key, 0)).await).taken_up);
    assert!(b.granted(copy(&key, 1)).await.orphan.is_some());
}

#[tokio::test]
async fn a_worker_is_dead_only_after_two_looks_apart() {
    let (database, a, b) = two_workers().await;
    assert_eq!(b.incarnations.is_alive(a.me).await.unwrap(), Liveness::Alive);
    assert_eq!(b.incarnations.is_alive(b.me).await.unwrap(), Liveness::Alive);
    assert_eq!(b.incarnations.is_alive(Incarnation(0)).await.unwrap(), Liveness::Dead);
    // Numbers far from any lock: one question, and the second look is taken unasked.
    let gone = Incarnation(1_000_000);
    let asked = tokio::time::Instant::now();
    assert_eq!(b.incarnations.is_alive(gone).await.unwrap(), Liveness::Suspect);
    let key = key(1);
    database
        .run(format!(
            "INSERT INTO jobs (organization_id, id, body_hash, state, turn, owner, first_at, updated_at) \
             VALUES ('42', '{}', decode(repeat('07', 32), 'hex'), 'claimed', 0, {}, now(), now())",
            key.id, gone.0
        ))
        .await;
    eventually("the job is taken over", || async {
        matches!(b.claim(copy(&key, 0)).await, ClaimAnswer::Claimed(_))
    })
    .await;
    assert!(asked.elapsed() >= DEAD_AFTER);
    assert_eq!(b.incarnations.is_alive(gone).await.unwrap(), Liveness::Dead);
}

#[tokio::test]
async fn a_suspect_that_holds_its_lock_at_the_second_look_lives() {
    let (database, _a, b) = two_workers().await;
    let mut session = database.connect().await;
    // On a busy machine the lock may be taken too late, and then the suspect is rightly dead.
    let in_time = async |number: i32, session: &mut sqlx::PgConnection| {
        let returning = Incarnation(number);
        let looked = tokio::time::Instant::now();
        assert_eq!(b.incarnations.is_alive(returning).await.unwrap(), Liveness::Suspect);
        let lock = sqlx::query("SELECT pg_advisory_lock(24077, $1)").bind(number);
        lock.execute(session).await.unwrap();
        let locked_after = looked.elapsed();
        let mut seen = Liveness::Suspect;
        eventually("the second look", async || {
            seen = b.incarnations.is_alive(returning).await.unwrap();
            seen != Liveness::Suspect
        })
        .await;
        assert!(seen == Liveness::Alive || locked_after >= DEAD_AFTER, "{locked_after:?}");
        seen == Liveness::Alive
    };
    let mut number = 2_000_000;
    eventually("one that was in time", async || {
        number += 1;
        in_time(number, &mut session).await
    })
    .await;
}

#[tokio::test]
async fn a_claim_of_what_was_called_back_before_leaves_nothing_unknown_when_its_worker_dies() {
    let (database, a, b) = two_workers().await;
    let store = database.store();
    let (actor, user_id, organization) = (None, None, None);
    let audit =
        AuditEntry { actor, user_id, organization, command: "job.cancel", outcome: "ok", fields: &[] };
    let by = || tokio::time::Instant::now() + SOON;
    a.granted(copy(&key(1), 0)).await;
    let too_late = store.cancel_job(&key(1), audit, by()).await.unwrap();
    assert_eq!((too_late.cancelled, too_late.too_late), (0, 1));
    let called_back = store.cancel_job(&key(2), audit, by()).await.unwrap();
    assert_eq!((called_back.cancelled, called_back.too_late), (1, 0));
    assert!(a.granted(copy(&key(2), 0)).await.cancelled);
    a.die(&b).await;
    let under_way = b.granted(copy(&key(1), 0)).await;
    assert_eq!((under_way.cancelled, under_way.orphan), (true, Some(Orphan { committing: false })));
    let before = b.granted(copy(&key(2), 0)).await;
    assert_eq!((before.cancelled, before.orphan, before.crashes), (true, None, 1));
}

#[tokio::test]
async fn a_claimed_job_of_a_free_lock_is_reported_as_unknown() {
    let (database, a, b) = two_workers().await;
    a.granted(copy(&key(1), 0)).await;
    let store = database.store();
    assert_eq!(store.job_status(&key(1)).await.unwrap().unwrap().state, State::Claimed);
    a.die(&b).await;
    assert_eq!(store.job_status(&key(1)).await.unwrap().unwrap().state, State::Unknown);
}

#[tokio::test]
async fn a_worker_whose_lock_is_lost_stops_within_three_seconds_and_comes_back_as_another() {
    let (database, a, b) = two_workers().await;
    let claimed = a.granted(copy(&key(1), 0)).await;
    let mut watch = a.incarnations.watch();
    watch.borrow_and_update();
    assert_eq!(database.terminate("sendoff incarnation").await, 2);
    // Only from the end of its session on can a worker know, and a busy server takes its time to end one.
    let lock = format!(
        "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND classid = 24077 AND objid = {} \
         AND database = (SELECT oid FROM pg_database WHERE datname = current_database())",
        a.me.0
    );
    eventually("the lock is free", async || database.number(lock.clone()).await == 0).await;
    // A machine that wakes this test late wakes the worker, on the same thread, late too: three seconds of its own.
    let mut rounds = 0;
    while !watch.has_changed().unwrap() {
        rounds += 1;
        assert!(rounds < 300, "the loss is not noticed");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let gate = Gate { key: key(1), owner: a.me, turn: Turn(0), commit: false, revision: None };
    assert_eq!(a.ledger.before_data(gate).await.unwrap(), GateAnswer::NotOwner);
    let next = *tokio::time::timeout(SOON, watch.wait_for(|now| now.is_some_and(|now| now != a.me)))
        .await
        .expect("a new incarnation is taken")
        .unwrap();
    assert!(next > Some(a.me));
    // Its own task may still be at work on the job, so it is not granted again; the old settle still counts.
    assert!(matches!(a.claim(copy(&key(1), 0)).await, ClaimAnswer::Held { owner } if owner == a.me));
    assert_eq!(a.settled(settle(&key(1), &claimed, Settlement::Sent)).await, SettleAnswer::Recorded);
    drop(b);
}

#[tokio::test]
async fn without_an_incarnation_nothing_is_claimed() {
    let (database, a, _b) = two_workers().await;
    a.incarnations.stop().await;
    assert_eq!(a.incarnations.current(), None);
    assert!(matches!(a.ledger.claim(copy(&key(1), 0)).await, Err(StoreError::Unavailable(_))));
    let held = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND classid = 24077 \
                AND database = (SELECT oid FROM pg_database WHERE datname = current_database())";
    // The server frees a lock when it finds the session closed.
    eventually("one lock is held", || async { database.number(held).await == 1 }).await;
}

// Losses

#[tokio::test]
async fn a_claim_whose_answer_was_lost_is_granted_again_to_the_same_worker_alone() {
    let (database, a, b) = two_workers().await;
    let key = key(1);
    // As if the row had been committed and the answer lost: claimed in a's name, and a knows nothing of it.
    database
        .run(format!(
            "INSERT INTO jobs (organization_id, id, body_hash, state, turn, owner, first_at, updated_at) \
             VALUES ('42', '{}', decode(repeat('07', 32), 'hex'), 'claimed', 0, {}, now(), now())",
            key.id, a.me.0
        ))
        .await;
    assert!(matches!(b.claim(copy(&key, 0)).await, ClaimAnswer::Held { .. }));
    let claimed = a.granted(Claim { message_id: "<kept@example.org>".into(), ..copy(&key, 0) }).await;
    assert_eq!((claimed.orphan, claimed.crashes), (None, 0));
    assert!(matches!(a.claim(copy(&key, 0)).await, ClaimAnswer::Held { .. }));
}

#[tokio::test]
async fn a_claim_whose_caller_went_away_is_given_back() {
    let (database, a, b) = two_workers().await;
    let key = key(1);
    // The row is locked, so that the claim is at work when its caller goes.
    let mut session = database.connect().await;
    let mut transaction = sqlx::Connection::begin(&mut session).await.unwrap();
    sqlx::query("LOCK TABLE jobs IN ACCESS EXCLUSIVE MODE").execute(&mut *transaction).await.unwrap();
    let ledger = a.ledger.clone();
    let asking = tokio::spawn({
        let copy = copy(&key, 0);
        async move { ledger.claim(copy).await }
    });
    let waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted \
                   AND database = (SELECT oid FROM pg_database WHERE datname = current_database())";
    eventually("the claim waits for the lock", || async { database.number(waiting).await == 1 }).await;
    asking.abort();
    assert!(asking.await.unwrap_err().is_cancelled());
    transaction.commit().await.unwrap();
    eventually("the job can be claimed", || async {
        matches!(b.claim(copy(&key, 0)).await, ClaimAnswer::Claimed(_))
    })
    .await;
}

#[tokio::test]
async fn terminated_connections_are_unavailable_and_then_work_again() {
    let (database, a, _b) = two_workers().await;
    a.granted(copy(&key(1), 0)).await;
    let mut session = database.connect().await;
    let mut transaction = sqlx::Connection::begin(&mut session).await.unwrap();
    sqlx::query("LOCK TABLE jobs IN ACCESS EXCLUSIVE MODE").execute(&mut *transaction).await.unwrap();
    let ledger = a.ledger.clone();
    let asking = tokio::spawn(async move { ledger.claim(copy(&key(2), 0)).await });
    let terminated = "SELECT count(pg_terminate_backend(pid)) FROM pg_locks WHERE NOT granted \
                      AND database = (SELECT oid FROM pg_database WHERE datname = current_database())";
    eventually("the statement is cut", || async { database.number(terminated).await == 1 }).await;
    let answer = asking.await.unwrap();
    assert!(matches!(answer, Err(StoreError::Unavailable(_))), "{answer:?}");
    transaction.rollback().await.unwrap();
    a.granted(copy(&key(2), 0)).await;
    assert!(database.terminate("sendoff").await > 0);
    eventually("the pool has recovered", || async { a.ledger.claim(copy(&key(3), 0)).await.is_ok() }).await;
}

#[tokio::test]
async fn a_server_that_is_away_is_unavailable() {
    // No program is given this port that asks for any port.
    let store = Store::new(&"postgres://u:secret@127.0.0.1:1/x".into(), 1).unwrap();
    let error = store.ping().await.unwrap_err();
    assert!(matches!(error, StoreError::Unavailable(_)), "{error}");
    assert!(!error.to_string().contains("secret"));
    assert!(matches!(store.behind_transaction_pooler().await, Err(StoreError::Unavailable(_))));
}

#[tokio::test]
async fn a_database_that_takes_no_more_connections_is_unavailable() {
    let database = TestDatabase::migrated().await;
    let (name, role) = (database.name(), format!("{}_nobody", database.name()));
    database
        .run(format!("ALTER DATABASE {name} CONNECTION LIMIT 0; CREATE ROLE {role} LOGIN PASSWORD 'x'"))
        .await;
    let url = database.url().expose_secret().to_owned();
    let host = url.find('@').expect("the URL names a user");
    let limited = Store::new(&format!("postgres://{role}:x{}", &url[host..]).into(), 1).unwrap();
    let answer = limited.ping().await;
    database.run(format!("DROP ROLE {role}")).await;
    assert!(matches!(answer, Err(StoreError::Unavailable(_))), "{answer:?}");
}

#[tokio::test]
async fn one_poisoned_row_does_not_fail_its_neighbours() {
    let (database, a, _b) = two_workers().await;
    // Refuses one row, whatever else is in the statement.
    database.run(format!("ALTER TABLE jobs ADD CONSTRAINT poison CHECK (id <> '{}')", key(13).id)).await;
    let answers = futures_util::future::join_all((0..40).map(|n| {
        let ledger = a.ledger.clone();
        async move { ledger.claim(copy(&key(n), 0)).await }
    }))
    .await;
    for (number, answer) in answers.into_iter().enumerate() {
        match number {
            13 => assert!(matches!(answer, Err(StoreError::Internal(_))), "{answer:?}"),
            _ => assert!(matches!(answer, Ok(ClaimAnswer::Claimed(_))), "{number}: {answer:?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn overlapping_unsorted_batches_of_two_workers_never_deadlock() {
    let (database, a, b) = two_workers().await;
    let granted = Arc::new(AtomicUsize::new(0));
    for round in 0..30_u128 {
        let one = |worker: &Worker, number: u128| {
            let (ledger, granted) = (worker.ledger.clone(), Arc::clone(&granted));
            // Each worker goes through the keys and the bookings in another order. A round without bookings, for their
            // locks would keep the batches apart.
            let revision = (round % 2 == 0)
                .then(|| Revision { group: format!("booking-{}", number % 50), sequence: round as i64 });
            let claim = Claim { revision, ..copy(&key(round * 1000 + number), 0) };
            tokio::spawn(async move {
                let key = claim.key.clone();
                let Ok(ClaimAnswer::Claimed(claimed)) =
                    ledger.claim(claim).await.inspect_err(|e| panic!("{e}"))
                else {
                    return;
                };
                granted.fetch_add(1, Ordering::Relaxed);
                let gate = Gate {
                    key: key.clone(),
                    owner: claimed.owner,
                    turn: claimed.turn,
                    commit: true,
                    revision: None,
                };
                assert_eq!(ledger.before_data(gate).await.unwrap(), GateAnswer::Open);
                let answer = ledger.settle(settle(&key, &claimed, Settlement::Sent)).await.unwrap();
                assert_eq!(answer, SettleAnswer::Recorded);
            })
        };
        let forwards: Vec<_> = (0..100).map(|number| one(&a, number)).collect();
        let backwards: Vec<_> = (0..100).rev().map(|number| one(&b, number)).collect();
        for task in forwards.into_iter().chain(backwards) {
            task.await.unwrap();
        }
    }
    assert_eq!(granted.load(Ordering::Relaxed), 30 * 100);
    // A deadlock would have been survived, for its statement is tried again in halves. Sessions count it when they end.
    database.terminate("sendoff").await;
    let sessions = "SELECT count(*) FROM pg_stat_activity \
                    WHERE datname = current_database() AND application_name = 'sendoff'";
    eventually("the sessions end", || async { database.number(sessions).await == 0 }).await;
    let deadlocks = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()";
    assert_eq!(database.number(deadlocks).await, 0);
}

// The schema, the server, the bindings

#[tokio::test]
async fn several_programs_migrate_at_once_and_the_schema_tells_where_it_stands() {
    let database = TestDatabase::empty().await;
    let (one, other) = (database.store(), database.store());
    assert!(matches!(one.schema_state().await.unwrap(), SchemaState::Behind(missing) if missing >= 2));
    let (first, second) = tokio::join!(one.migrate(), other.migrate());
    first.unwrap();
    second.unwrap();
    assert_eq!(one.schema_state().await.unwrap(), SchemaState::Current);
    database
        .run("INSERT INTO _sqlx_migrations SELECT 9999, 'later', now(), true, checksum, 0 FROM _sqlx_migrations LIMIT 1")
        .await;
    assert_eq!(one.schema_state().await.unwrap(), SchemaState::Ahead);
    assert!(one.migrate().await.unwrap_err().to_string().contains("9999"));
}

#[tokio::test]
async fn the_server_is_new_enough_and_no_pooler_stands_before_it() {
    let database = TestDatabase::empty().await;
    let store = database.store();
    store.ping().await.unwrap();
    assert!(store.server_version().await.unwrap() >= OLDEST_SERVER);
    assert!(!store.behind_transaction_pooler().await.unwrap());
}

#[tokio::test]
async fn the_declared_bindings_are_those_of_the_last_declaration() {
    let database = TestDatabase::migrated().await;
    let store = database.store();
    let binding = |lane: &str, binding: &str| LaneBinding { lane: lane.into(), binding: binding.into() };
    let before = [binding("a", "x.#"), binding("b", "y.#")];
    let after = [binding("a", "x.*"), binding("a", "z.#")];
    store.replace_lane_bindings("p", &before).await.unwrap();
    store.replace_lane_bindings("q", &before).await.unwrap();
    store.replace_lane_bindings("p", &after).await.unwrap();
    assert_eq!(store.lane_bindings("p").await.unwrap(), after);
    assert_eq!(store.lane_bindings("q").await.unwrap(), before);
    assert_eq!(store.lane_bindings("r").await.unwrap(), []);
}
