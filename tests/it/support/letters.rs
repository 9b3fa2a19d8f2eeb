//! The archive as a test sees it, and a way to make its writers wait.
//! Guarantee: a letter is looked for until it is there.

use std::sync::Arc;
use std::time::Duration;

use secrecy::SecretString;
use sendoff::model::failure::Reason;
use sendoff::model::job::JobKey;
use sendoff::model::ledger::Turn;
use sendoff::model::letter::{Fate, Killer, Letter, LetterFilter, NewLetter};
use sendoff::secrets::KeyRing;
use sendoff::store::{Content, DeadLetters};
use sha2::{Digest, Sha256};
use sqlx::{Connection, PgConnection};
use time::OffsetDateTime;
use uuid::Uuid;

use super::broker::eventually_within;
use super::database::TestDatabase;
use super::world::{KEYS, World};

/// For many letters, on a machine that is busy with other tests.
const A_WHILE: Duration = Duration::from_secs(120);

impl World {
    /// The archive under this world's keys.
    pub fn archive(&self) -> DeadLetters {
        archive(&self.database)
    }

    /// The archive's letter of a job, once it is there.
    pub async fn letter(&self, id: Uuid) -> Letter {
        letter(&self.database, id).await
    }

    /// Waits until the archive has so many letters; all of them, newest first.
    pub async fn letters(&self, count: usize) -> Vec<Letter> {
        letters(&self.database, count).await
    }

    /// What the archive opens of a letter.
    pub async fn content(&self, letter: &Letter) -> Content {
        let opened = self.archive().open(letter.letter).await.expect("the database answers");
        opened.expect("a letter of that name").expect("it opens")
    }
}

/// A letter that a worker wrote when it gave up a job because the server had refused the message.
pub fn new_letter(key: JobKey, body: Vec<u8>, died_at: OffsetDateTime) -> NewLetter {
    NewLetter {
        job_id: Some(key.id),
        key: Some(key),
        kind: Some("booking.confirmed".into()),
        lane: Some("notifications".into()),
        routing_key: "notification.booking".into(),
        fate: Fate::Dead,
        killer: Killer::Worker,
        reason: Reason::MessageRefused,
        detail: Some("the server answered 550".into()),
        attempts: 1,
        first_at: Some(died_at - Duration::from_secs(60)),
        died_at,
        redelivered: false,
        expires_at: None,
        revision: None,
        turn: Turn(1),
        recipients: None,
        body_hash: Sha256::digest(&body).into(),
        body,
        properties: br#"{"content_type":"application/json"}"#.to_vec(),
    }
}

/// The archive in a test's database, under the keys of every world.
pub fn archive(database: &TestDatabase) -> DeadLetters {
    let keys = KeyRing::parse(&[SecretString::from(KEYS)]).expect("a key");
    DeadLetters::new(database.store(), Arc::new(keys))
}

/// The letter of a job, once it is there.
pub async fn letter(database: &TestDatabase, id: Uuid) -> Letter {
    let store = database.store();
    let mut found = None;
    eventually_within(A_WHILE, &format!("a letter of {id} is in the archive"), async || {
        found = store.letters_of(id, None).await.expect("the database answers").into_iter().next();
        found.is_some()
    })
    .await;
    found.expect("just seen")
}

/// Waits until there are so many letters; all of them, newest first.
pub async fn letters(database: &TestDatabase, count: usize) -> Vec<Letter> {
    let store = database.store();
    let mut found = Vec::new();
    eventually_within(A_WHILE, &format!("{count} letters are in the archive"), async || {
        found = store.letters(&LetterFilter::default(), None, 10_000).await.expect("the database answers");
        assert!(found.len() <= count, "{} letters instead of {count}", found.len());
        found.len() == count
    })
    .await;
    found
}

/// Keeps every archivist from writing, for as long as it lives.
pub struct ArchiveLock(PgConnection);

impl ArchiveLock {
    /// Readers go on.
    pub async fn take(database: &TestDatabase) -> Self {
        let mut session = database.connect().await;
        for sql in ["BEGIN", "LOCK TABLE dead_letters IN SHARE MODE"] {
            sqlx::query(sql).execute(&mut session).await.expect("locked");
        }
        Self(session)
    }

    /// Waits until somebody waits for it.
    pub async fn holds_somebody(&mut self) {
        const WAITING: &str =
            "SELECT count(*) FROM pg_locks WHERE relation = 'dead_letters'::regclass AND NOT granted";
        eventually_within(A_WHILE, "somebody writes into the archive", async || {
            let waiting: i64 = sqlx::query_scalar(WAITING).fetch_one(&mut self.0).await.expect("counted");
            waiting > 0
        })
        .await;
    }

    /// Lets them go on.
    pub async fn release(self) {
        self.0.close().await.expect("closed");
    }
}
