//! The archive of dead letters against a real PostgreSQL: what comes in, what changes a row, what opens, what is forgotten.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use secrecy::SecretString;
use sendoff::model::failure::Reason;
use sendoff::model::job::{JobKey, Revision};
use sendoff::model::ledger::{State, Turn};
use sendoff::model::letter::{
    Deed, Fate, Killer, Letter, LetterFilter, LetterId, LetterState, NewLetter, Owner,
};
use sendoff::model::organization::OrganizationId;
use sendoff::model::replay::Booking;
use sendoff::secrets::KeyRing;
use sendoff::store::{Archived, DeadLetters, Unopened};
use time::OffsetDateTime;
use time::macros::datetime;
use uuid::Uuid;

use crate::support::database::TestDatabase;
use crate::support::letters::new_letter;

const NOON: OffsetDateTime = datetime!(2026-11-20 12:00:00 UTC);
const KEY: &str = "k1:AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=";
const OTHER_KEY: &str = "k2:AgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgI=";
const PROPERTIES: &[u8] = br#"{"content_type":"application/json"}"#;

fn keys(item: &str) -> Arc<KeyRing> {
    Arc::new(KeyRing::parse(&[SecretString::from(item)]).expect("the key is one"))
}

fn archive(database: &TestDatabase) -> DeadLetters {
    DeadLetters::new(database.store(), keys(KEY))
}

/// A letter that a worker wrote when it gave up the job of that number.
fn letter(number: u128) -> NewLetter {
    with_body(number, format!("{{\"number\":{number}}}").into_bytes())
}

fn with_body(number: u128, body: Vec<u8>) -> NewLetter {
    let key = JobKey { organization: Some(OrganizationId::from_integer(42)), id: Uuid::from_u128(number) };
    new_letter(key, body, NOON)
}

/// A letter that the broker made of a message that no lane takes.
fn unroutable(number: u128) -> NewLetter {
    NewLetter {
        killer: Killer::Broker,
        reason: Reason::Unroutable,
        lane: None,
        attempts: 0,
        first_at: None,
        turn: Turn(0),
        ..letter(number)
    }
}

async fn archived(archive: &DeadLetters, letters: &[NewLetter]) -> Vec<Archived> {
    archive.archive(letters).await.expect("the database answers")
}

async fn only(database: &TestDatabase, letter: &NewLetter) -> Letter {
    let found = database.store().letters_of(letter.id().0, None).await.expect("the database answers");
    let [found]: [Letter; 1] = found.try_into().expect("one letter");
    found
}

/// The ledger's row of a letter's job.
async fn ledger_row(database: &TestDatabase, letter: &NewLetter, state: &str, turn: i32) {
    let key = letter.key.as_ref().expect("the letter has a job");
    let hash: String = letter.body_hash.iter().map(|byte| format!("{byte:02x}")).collect();
    database
        .run(format!(
            "INSERT INTO jobs (id, organization_id, body_hash, state, turn, owner, not_before, first_at, updated_at)
             VALUES ('{}', '42', '\\x{hash}', '{state}', {turn}, 7, now(), now(), now())",
            key.id
        ))
        .await;
}

#[tokio::test]
async fn a_letter_is_found_as_it_came_in() {
    let database = TestDatabase::migrated().await;
    let archive = archive(&database);
    let sent = NewLetter {
        expires_at: Some(NOON + Duration::from_secs(3600)),
        revision: Some(Revision { group: "uid-1".into(), sequence: 4 }),
        recipients: Some(vec![0, 3]),
        ..letter(1)
    };
    assert_eq!(archived(&archive, std::slice::from_ref(&sent)).await, [Archived::New]);
    let found = only(&database, &sent).await;
    assert_eq!((found.letter, &found.key, found.state), (sent.id(), &sent.key, LetterState::Dead));
    assert_eq!((found.reason, &found.detail, found.attempts), (sent.reason, &sent.detail, 1));
    assert_eq!((&found.kind, &found.lane, &found.routing_key), (&sent.kind, &sent.lane, &sent.routing_key));
    assert_eq!((found.first_at, found.died_at, found.expires_at), (sent.first_at, NOON, sent.expires_at));
    assert_eq!((&found.revision, found.turn, &found.recipients), (&sent.revision, Turn(1), &sent.recipients));
    assert_eq!((found.deaths, found.replays, found.replay_turn), (1, 0, None));
    assert_eq!((found.body_hash, found.bytes as usize), (sent.body_hash, sent.body.len()));
    assert!(found.history.is_empty());
    let opened = archive.open(sent.id()).await.unwrap().expect("it is there").expect("it opens");
    assert_eq!((opened.body, opened.properties), (sent.body, sent.properties));
    assert!(archive.open(LetterId(Uuid::nil())).await.unwrap().is_none());
}

#[tokio::test]
async fn a_letter_that_is_delivered_again_is_the_same_row() {
    let database = TestDatabase::migrated().await;
    let archive = archive(&database);
    archived(&archive, &[letter(1), letter(2)]).await;
    let again = [NewLetter { redelivered: true, ..letter(2) }, letter(3), letter(1)];
    assert_eq!(archived(&archive, &again).await, [Archived::Known, Archived::New, Archived::Known]);
    assert_eq!(database.number("SELECT count(*) FROM dead_letters").await, 3);
    assert_eq!(only(&database, &letter(2)).await.deaths, 1);
    assert!(archived(&archive, &[]).await.is_empty());
}

#[tokio::test]
async fn a_further_death_changes_the_row_and_ends_the_replay() {
    let database = TestDatabase::migrated().await;
    let archive = archive(&database);
    archived(&archive, &[letter(1)]).await;
    database
        .run(
            "UPDATE dead_letters SET state = 'replayed', replays = 1, replay_turn = 2, turn = 1, history =
             '[{\"what\":\"replay\",\"at\":\"2026-11-20T13:00:00Z\",\"by\":\"user:7\"},
               {\"what\":\"replay\",\"at\":\"2026-11-20T14:00:00Z\",\"by\":\"user:8\"}]'",
        )
        .await;
    let later = NewLetter {
        reason: Reason::RetriesExhausted,
        detail: Some("throttled".into()),
        attempts: 8,
        died_at: NOON + Duration::from_secs(9000),
        turn: Turn(3),
        recipients: Some(vec![1]),
        lane: Some("reminders".into()),
        ..letter(1)
    };
    assert_eq!(archived(&archive, std::slice::from_ref(&later)).await, [Archived::Again]);
    let found = only(&database, &later).await;
    assert_eq!((found.state, found.reason, found.attempts), (LetterState::Dead, later.reason, 8));
    assert_eq!((&found.detail, &found.lane), (&later.detail, &later.lane));
    assert_eq!((found.died_at, found.turn, found.deaths), (later.died_at, Turn(3), 2));
    assert_eq!((found.recipients, found.replays, found.replay_turn), (Some(vec![1]), 1, Some(Turn(2))));
    assert_eq!(found.first_at, letter(1).first_at);
    let [first, last] = &found.history[..] else { panic!("two deeds") };
    assert_eq!((first.what, &first.outcome), (Deed::Replay, &None));
    let outcome = last.outcome.as_ref().expect("the last replay has ended");
    assert_eq!((outcome.state.as_str(), outcome.reason), (State::Dead.as_str(), Some(later.reason)));
    assert!(outcome.at.is_some() && last.by == "user:8");
    assert_eq!(archived(&archive, &[later]).await, [Archived::Known]);
    assert!(archive.open(letter(1).id()).await.unwrap().expect("it is there").is_ok());
}

#[tokio::test]
async fn a_letter_of_an_older_turn_changes_nothing() {
    let database = TestDatabase::migrated().await;
    let archive = archive(&database);
    ledger_row(&database, &letter(1), "deferred", 6).await;
    archived(&archive, &[NewLetter { turn: Turn(5), ..letter(1) }]).await;
    database.run("UPDATE dead_letters SET state = 'replaying'").await;
    for turn in [4, 5] {
        let late = NewLetter { turn: Turn(turn), died_at: NOON + Duration::from_secs(60), ..letter(1) };
        assert_eq!(archived(&archive, &[late]).await, [Archived::Known], "turn {turn}");
    }
    let found = only(&database, &letter(1)).await;
    assert_eq!((found.state, found.died_at, found.deaths), (LetterState::Replaying, NOON, 1));
}

#[tokio::test]
async fn without_a_ledger_row_a_later_death_is_another_one_and_a_redelivery_is_not() {
    let database = TestDatabase::migrated().await;
    let archive = archive(&database);
    // What the clock says beyond the database's resolution does not make a redelivery later.
    let first = NewLetter { died_at: NOON + Duration::from_nanos(1_999), ..unroutable(1) };
    let later = |seconds| NewLetter { died_at: NOON + Duration::from_secs(seconds), ..unroutable(1) };
    archived(&archive, std::slice::from_ref(&first)).await;
    database.run("UPDATE dead_letters SET state = 'discarded'").await;
    let redelivered = NewLetter { redelivered: true, ..later(5) };
    for known in [first.clone(), redelivered.clone()] {
        assert_eq!(archived(&archive, &[known]).await, [Archived::Known]);
    }
    assert_eq!(only(&database, &first).await.state, LetterState::Discarded);
    assert_eq!(archived(&archive, &[later(10)]).await, [Archived::Again]);
    let found = only(&database, &first).await;
    assert_eq!((found.state, found.deaths), (LetterState::Dead, 2));
    // A worker wrote the time of death into the letter, so it is no redelivery's.
    let buried = NewLetter { killer: Killer::Worker, reason: Reason::Malformed, ..later(20) };
    let buried = NewLetter { redelivered: true, ..buried };
    assert_eq!(archived(&archive, &[buried.clone(), buried]).await, [Archived::Again, Archived::Known]);
    // Once the ledger has the message, its turns decide.
    ledger_row(&database, &first, "deferred", 1).await;
    assert_eq!(archived(&archive, &[later(30)]).await, [Archived::Known]);
}

#[tokio::test]
async fn copies_of_one_letter_in_a_batch_are_taken_in_their_order() {
    let database = TestDatabase::migrated().await;
    let archive = archive(&database);
    let of_turn =
        |number, turn| NewLetter { turn: Turn(turn), attempts: turn.unsigned_abs(), ..letter(number) };
    let batch = [of_turn(2, 1), of_turn(1, 3), of_turn(2, 1), of_turn(2, 4), of_turn(1, 2), of_turn(2, 6)];
    assert_eq!(
        archived(&archive, &batch).await,
        [Archived::New, Archived::New, Archived::Known, Archived::Again, Archived::Known, Archived::Again]
    );
    let (one, two) = (only(&database, &letter(1)).await, only(&database, &letter(2)).await);
    assert_eq!((one.turn, one.attempts, one.deaths), (Turn(3), 3, 1));
    assert_eq!((two.turn, two.attempts, two.deaths), (Turn(6), 6, 3));
}

#[tokio::test]
async fn archivists_with_the_same_letters_neither_deadlock_nor_make_a_second_row() {
    const LETTERS: u128 = 60;
    let database = TestDatabase::migrated().await;
    for number in 0..LETTERS {
        ledger_row(&database, &letter(number), "deferred", 4).await;
    }
    let killed = |number, turn| NewLetter {
        killer: Killer::Broker,
        reason: Reason::CrashLoop,
        turn: Turn(turn),
        ..letter(number)
    };
    let archives: Vec<DeadLetters> = (0..4).map(|_| archive(&database)).collect();
    for turn in 1..=4 {
        let batches = archives.iter().enumerate().map(|(at, archive)| {
            let mut batch: Vec<NewLetter> = (0..LETTERS).map(|number| killed(number, turn)).collect();
            batch.rotate_left(at * 13);
            if at % 2 == 1 {
                batch.reverse();
            }
            async move { archive.archive(&batch).await.expect("no deadlock") }
        });
        let answers = futures_util::future::join_all(batches).await.concat();
        let news = answers.iter().filter(|answer| **answer != Archived::Known).count();
        assert_eq!(news as u128, LETTERS, "each death of turn {turn} is archived once");
    }
    assert_eq!(database.number("SELECT count(*) FROM dead_letters WHERE deaths = 4").await, 60);
    assert_eq!(database.number("SELECT count(*) FROM dead_letters").await, 60);
    assert_eq!(database.number("SELECT count(*) FROM jobs WHERE state = 'dead'").await, 60);
}

#[tokio::test]
async fn the_ledger_learns_of_a_copy_that_the_broker_killed() {
    let database = TestDatabase::migrated().await;
    let archive = archive(&database);
    let killed = |number| NewLetter {
        killer: Killer::Broker,
        reason: Reason::CrashLoop,
        detail: Some("delivered 100 times".into()),
        turn: Turn(3),
        ..letter(number)
    };
    let other_body = with_body(5, b"other".to_vec());
    let rows = [
        (letter(1), "deferred", 3),
        (letter(2), "deferred", 4),
        (letter(3), "claimed", 3),
        (letter(4), "deferred", 3),
    ];
    for (letter, state, turn) in &rows {
        ledger_row(&database, letter, state, *turn).await;
    }
    ledger_row(&database, &other_body, "deferred", 3).await;
    let worker_killed = NewLetter { killer: Killer::Worker, ..killed(4) };
    archived(&archive, &[killed(2), killed(1), killed(3), worker_killed, killed(5), killed(6)]).await;
    let dead = "SELECT count(*) FROM jobs WHERE state = 'dead'";
    assert_eq!(database.number(dead).await, 1);
    let buried = database.store().job_status(letter(1).key.as_ref().unwrap()).await.unwrap().unwrap();
    assert_eq!((buried.state, buried.turn), (State::Dead, Turn(3)));
    assert_eq!((buried.reason, buried.detail), (Some(Reason::CrashLoop), Some("delivered 100 times".into())));
    // A death that came in before the ledger's row was at its turn is told when it is delivered again.
    database.run("UPDATE jobs SET turn = 3 WHERE turn = 4").await;
    assert_eq!(archived(&archive, &[killed(2)]).await, [Archived::Known]);
    assert_eq!(database.number(dead).await, 2);
}

#[tokio::test]
async fn a_message_that_no_lane_took_ends_no_job_whose_other_copy_is_in_a_lane() {
    let database = TestDatabase::migrated().await;
    let archive = archive(&database);
    ledger_row(&database, &letter(1), "deferred", 0).await;
    ledger_row(&database, &letter(2), "deferred", 2).await;
    let moved = NewLetter { turn: Turn(2), ..unroutable(2) };
    archived(&archive, &[unroutable(1), moved]).await;
    let dead = "SELECT count(*) FROM jobs WHERE state = 'dead' AND turn = 2";
    assert_eq!(database.number(dead).await, 1, "a copy of the ledger's was moved to where no lane takes it");
    assert_eq!(database.number("SELECT count(*) FROM jobs WHERE state = 'deferred'").await, 1);
}

#[tokio::test]
async fn a_letter_for_refused_recipients_is_a_death_beside_the_broker_s_of_the_same_turn() {
    let database = TestDatabase::migrated().await;
    let archive = archive(&database);
    // Published where no lane takes it, and then as it should be: the others have accepted.
    archived(&archive, &[unroutable(1)]).await;
    ledger_row(&database, &letter(1), "sent", 0).await;
    let refused = NewLetter { turn: Turn(0), recipients: Some(vec![1]), ..letter(1) };
    assert_eq!(
        archived(&archive, &[refused.clone(), refused.clone()]).await,
        [Archived::Again, Archived::Known]
    );
    let found = only(&database, &refused).await;
    assert_eq!((found.recipients, found.reason, found.deaths), (Some(vec![1]), refused.reason, 2));
    database.run("UPDATE dead_letters SET state = 'discarded'").await;
    let redelivered = NewLetter { redelivered: true, ..refused.clone() };
    assert_eq!(archived(&archive, &[redelivered, unroutable(1)]).await, [Archived::Known; 2]);
    assert_eq!(only(&database, &refused).await.state, LetterState::Discarded);
}

#[tokio::test]
async fn a_letter_of_an_unknown_owner_is_found_by_its_jobs_id_and_is_never_the_platforms_job() {
    let database = TestDatabase::migrated().await;
    let (archive, store) = (archive(&database), database.store());
    let killed =
        |letter| NewLetter { killer: Killer::Broker, reason: Reason::CrashLoop, turn: Turn(3), ..letter };
    let revision = Some(Revision { group: "uid-1".into(), sequence: 4 });
    let unknown = NewLetter { key: None, revision, ..killed(letter(1)) };
    let id = Uuid::from_u128(1);
    let platforms = JobKey { organization: None, id };
    ledger_row(&database, &letter(1), "deferred", 3).await;
    database
        .run(
            "UPDATE jobs SET organization_id = '';
             INSERT INTO job_groups (organization_id, name, sequence, updated_at) VALUES ('', 'uid-1', 9, now())",
        )
        .await;
    assert_eq!(archived(&archive, std::slice::from_ref(&unknown)).await, [Archived::New]);
    let waits = store.job_status(&platforms).await.unwrap().expect("the ledger has it");
    assert_eq!(waits.state, State::Deferred, "the platform's job of that id has not died");

    let found = store.letters_of(id, None).await.unwrap();
    let [found] = &found[..] else { panic!("one letter, not {found:?}") };
    assert_eq!((found.letter, found.id(), &found.key), (unknown.id(), id, &None));
    assert_eq!((found.owner(), found.reason), (Owner::Unknown, Reason::CrashLoop));
    let nothing = store.letters_of(id, Some("")).await.unwrap();
    assert!(nothing.is_empty(), "the platform's are others: {nothing:?}");
    let page = store.examine_letters(&LetterFilter::default(), None, None, 10).await.unwrap();
    let [examined] = &page.letters[..] else { panic!("one letter, not {page:?}") };
    assert!(examined.ledger.is_none() && examined.booking == Booking::default(), "{examined:?}");

    let later = NewLetter { died_at: NOON + Duration::from_secs(60), ..unknown };
    assert_eq!(archived(&archive, &[later]).await, [Archived::Again], "no turn of the ledger's is its");
}

#[tokio::test]
async fn a_body_of_any_bytes_and_length_comes_out_as_it_went_in() {
    let database = TestDatabase::migrated().await;
    let archive = archive(&database);
    let large: Vec<u8> = (0..10 * 1024 * 1024 + 7).map(|at: u32| (at % 251) as u8).collect();
    let bodies: [&[u8]; 5] = [b"", b"\0", b"\xff\xfe not UTF-8 \xc0", b"{\"a\":\"\\u0000\"}\0\0", &large];
    let letters: Vec<NewLetter> = bodies
        .iter()
        .enumerate()
        .map(|(at, body)| NewLetter { job_id: None, key: None, ..with_body(at as u128, body.to_vec()) })
        .collect();
    assert_eq!(archived(&archive, &letters).await, [Archived::New; 5]);
    for letter in &letters {
        let opened = archive.open(letter.id()).await.unwrap().expect("it is there").expect("it opens");
        assert!(opened.body == letter.body, "{} bytes", letter.body.len());
        assert_eq!(opened.properties, PROPERTIES);
        let found = only(&database, letter).await;
        assert_eq!((found.bytes as usize, found.id()), (letter.body.len(), letter.id().0));
    }
}

#[tokio::test]
async fn texts_that_the_database_cannot_hold_do_not_keep_a_letter_out() {
    let database = TestDatabase::migrated().await;
    let awkward = NewLetter {
        kind: Some("x".repeat(10_000)),
        lane: Some("no\0tifications".into()),
        routing_key: "notification.\0".into(),
        detail: Some("a\0b".into()),
        revision: Some(Revision { group: "uid\0".into(), sequence: i64::MAX }),
        attempts: u32::MAX,
        ..letter(1)
    };
    assert_eq!(archived(&archive(&database), std::slice::from_ref(&awkward)).await, [Archived::New]);
    let found = only(&database, &awkward).await;
    assert_eq!((found.letter, found.kind), (awkward.id(), None));
    assert_eq!(found.detail.as_deref(), Some("a\u{fffd}b"));
    assert_eq!(found.revision, Some(Revision { group: "uid\u{fffd}".into(), sequence: i64::MAX }));
}

#[tokio::test]
async fn content_that_was_moved_changed_or_sealed_under_another_key_does_not_open() {
    let database = TestDatabase::migrated().await;
    let archive = archive(&database);
    let ids = [1, 2, 3, 4].map(|number| letter(number).id());
    archived(&archive, &[1, 2, 3, 4].map(letter)).await;
    let [swapped, moved, changed, whole] = ids;
    database
        .run(format!(
            "UPDATE dead_letters SET body_sealed = properties_sealed, properties_sealed = body_sealed
                 WHERE letter = '{swapped}';
             UPDATE dead_letters SET body_sealed = (SELECT body_sealed FROM dead_letters WHERE letter = '{whole}')
                 WHERE letter = '{moved}';
             UPDATE dead_letters SET body_sealed = set_byte(body_sealed, 30, get_byte(body_sealed, 30) # 1)
                 WHERE letter = '{changed}'"
        ))
        .await;
    let damaged = Err(Unopened::Damaged(
        "does not open: changed, moved from elsewhere, or sealed under another key of this id".into(),
    ));
    for id in [swapped, moved, changed] {
        assert_eq!(archive.open(id).await.unwrap().expect("it is there"), damaged);
    }
    assert!(archive.open(whole).await.unwrap().expect("it is there").is_ok());
    let keyless = DeadLetters::new(database.store(), keys(OTHER_KEY)).open(whole).await.unwrap();
    assert_eq!(keyless.expect("it is there"), Err(Unopened::UnknownKey { id: "k1".into() }));
    let newer = letter(5);
    archived(&DeadLetters::new(database.store(), keys(OTHER_KEY)), &[newer]).await;
    let emptied = format!("UPDATE dead_letters SET properties_sealed = '' WHERE letter = '{moved}'");
    database.run(emptied).await;
    let known = database.store().letter_keys().await.expect("the database answers");
    assert_eq!(known, [("k1".to_owned(), 3), ("k2".to_owned(), 1)].into());
}

#[tokio::test]
async fn nothing_of_the_content_is_stored_in_the_clear() {
    let database = TestDatabase::migrated().await;
    let body = br#"{"to":["ada@example.org"],"subject":"Your booking"}"#.to_vec();
    let properties = br#"{"correlation_id":"ada@example.org"}"#.to_vec();
    archived(&archive(&database), &[NewLetter { properties, ..with_body(1, body) }]).await;
    let clear = "SELECT count(*) FROM dead_letters AS d
        WHERE d::text LIKE '%ada@example.org%' OR d::text LIKE '%' || encode('ada@example.org', 'hex') || '%'";
    assert_eq!(database.number(clear).await, 0);
    assert_eq!(database.number("SELECT count(*) FROM dead_letters").await, 1);
}

#[tokio::test]
async fn letters_past_their_retention_are_forgotten_but_for_those_still_to_be_sent() {
    let database = TestDatabase::migrated().await;
    let letters: Vec<NewLetter> = (0..1210).map(letter).collect();
    archived(&archive(&database), &letters).await;
    let states = ["dead", "replayed", "discarded", "parked", "replaying"];
    database.run("UPDATE dead_letters SET died_at = now() - interval '91 days'").await;
    for (number, state) in states.iter().enumerate() {
        let id = Uuid::from_u128(number as u128);
        database.run(format!("UPDATE dead_letters SET state = '{state}' WHERE job_id = '{id}'")).await;
    }
    let young = Uuid::from_u128(5);
    database
        .run(format!("UPDATE dead_letters SET died_at = now() - interval '89 days' WHERE job_id = '{young}'"))
        .await;
    let mut other = database.connect().await;
    let held = Uuid::from_u128(6);
    let held =
        sqlx::AssertSqlSafe(format!("BEGIN; SELECT 1 FROM dead_letters WHERE job_id = '{held}' FOR UPDATE"));
    sqlx::raw_sql(held).execute(&mut other).await.expect("the row is locked");
    let store = database.store();
    let retention = Duration::from_secs(90 * 86_400);
    for (forgotten, complete) in [(500, false), (500, false), (206, true), (0, true)] {
        let sweep = store.forget_letters(retention).await.expect("nobody is waited for");
        assert_eq!((sweep.forgotten, sweep.complete), (forgotten, complete));
    }
    let left = store.letters(&LetterFilter::default(), None, 10).await.unwrap();
    let left: BTreeSet<u128> = left.iter().map(|letter| letter.id().as_u128()).collect();
    assert_eq!(left, BTreeSet::from([3, 4, 5, 6]));
}

#[tokio::test]
async fn a_parked_letter_is_one_row_however_often_its_job_is_parked_released_and_dies() {
    let database = TestDatabase::migrated().await;
    let archive = archive(&database);
    let parked = |turn, seconds| NewLetter {
        fate: Fate::Parked,
        reason: Reason::AuthFailed,
        turn: Turn(turn),
        died_at: NOON + Duration::from_secs(seconds),
        recipients: Some(vec![1]),
        ..letter(1)
    };
    assert_eq!(archived(&archive, &[parked(1, 0), letter(2)]).await, [Archived::New, Archived::New]);
    let found = only(&database, &parked(1, 0)).await;
    assert_eq!((found.state, found.reason, found.deaths), (LetterState::Parked, Reason::AuthFailed, 0));
    assert_eq!(found.recipients, Some(vec![1]));
    ledger_row(&database, &letter(1), "parked", 1).await;
    let again = NewLetter { redelivered: true, ..parked(1, 0) };
    assert_eq!(archived(&archive, &[again, parked(1, 60)]).await, [Archived::Known, Archived::Known]);
    // As the release of a parked letter leaves it.
    database
        .run(
            "UPDATE dead_letters SET state = 'replayed', replays = 1, replay_turn = 2, history =
             '[{\"what\":\"replay\",\"at\":\"2026-11-20T13:00:00Z\",\"by\":\"worker\"}]' WHERE state = 'parked'",
        )
        .await;
    assert_eq!(archived(&archive, &[parked(3, 90)]).await, [Archived::Again]);
    let found = only(&database, &letter(1)).await;
    assert_eq!((found.state, found.turn, found.deaths), (LetterState::Parked, Turn(3), 0));
    assert_eq!(found.history[0].outcome.as_ref().map(|outcome| outcome.state.as_str()), Some("parked"));
    let dead = NewLetter { fate: Fate::Dead, turn: Turn(5), ..parked(5, 120) };
    assert_eq!(archived(&archive, &[dead]).await, [Archived::Again]);
    let found = only(&database, &letter(1)).await;
    assert_eq!((found.state, found.deaths), (LetterState::Dead, 1));
}
