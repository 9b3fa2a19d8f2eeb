//! Which workers live: each holds an advisory lock on a database session of its own, under a number that is never reused.
//! Guarantee: `current` is `None` within three seconds of the lock's loss, and nobody is called dead before its lock was
//! free on two looks as far apart as `dead_after`.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::time::Duration;

use backon::{ExponentialBuilder, Retryable};
use sqlx::{Connection, PgConnection};
use tokio::sync::watch;
use tokio::time::Instant;

use super::{Store, StoreError};
use crate::model::ledger::Incarnation;

/// First half of the advisory locks' key; the second is the incarnation.
pub(super) const LOCK_CLASS: i32 = 0x5e0d;
/// Between two questions whether the lock is still held.
const PING_EVERY: Duration = Duration::from_secs(1);
/// Longest wait for that answer: with [`PING_EVERY`] it makes the three seconds.
const PING_BOUND: Duration = Duration::from_secs(2);
/// Longest wait for a new session and its lock.
const TAKE_BOUND: Duration = Duration::from_secs(10);
/// How long a living worker is taken to live on without another look.
const ALIVE_FOR: Duration = Duration::from_millis(500);
/// Between a worker's first and second look, unless a test chooses less.
pub const DEAD_AFTER: Duration = Duration::from_secs(10);
/// Dead incarnations remembered; one that is forgotten is looked at again.
const DEAD_MAX: usize = 256;
/// Suspected or living ones remembered.
const SEEN_MAX: usize = 4096;

/// What is known of an incarnation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Liveness {
    /// Its lock is held.
    Alive,
    /// Its lock is free, seen so for less than `dead_after`.
    Suspect,
    /// Its lock was free on two looks: it will never settle anything again.
    Dead,
}

/// This worker's incarnation and its knowledge of the others'. Clones share it; when the last one is dropped the lock is
/// released.
#[derive(Clone)]
pub struct Incarnations {
    shared: Arc<Shared>,
    stop: Arc<watch::Sender<bool>>,
    ended: watch::Receiver<bool>,
}

struct Shared {
    store: Store,
    current: watch::Sender<Option<Incarnation>>,
    dead_after: Duration,
    seen: Mutex<Seen>,
    /// One look at a time: who waits for it finds the answer remembered.
    looking: tokio::sync::Mutex<()>,
}

#[derive(Default)]
struct Seen {
    mine: Vec<i32>,
    alive: HashMap<i32, Instant>,
    suspects: HashMap<i32, Instant>,
    dead: VecDeque<i32>,
}

impl Incarnations {
    /// Starts to take an incarnation, and a new one after each loss, for as long as a clone of this lives. Must be called
    /// inside a tokio runtime. `dead_after`: [`DEAD_AFTER`].
    pub fn start(store: Store, dead_after: Duration) -> Self {
        let shared = Arc::new(Shared {
            store,
            current: watch::Sender::new(None),
            dead_after,
            seen: Mutex::default(),
            looking: tokio::sync::Mutex::default(),
        });
        let (stop, stopping) = watch::channel(false);
        let (ending, ended) = watch::channel(false);
        tokio::spawn(keep(Arc::clone(&shared), stopping, ending));
        Self { shared, stop: Arc::new(stop), ended }
    }

    /// This worker's incarnation; `None` while it has no lock, and then it must not begin to send.
    pub fn current(&self) -> Option<Incarnation> {
        *self.shared.current.borrow()
    }

    /// Follows [`Incarnations::current`].
    pub fn watch(&self) -> watch::Receiver<Option<Incarnation>> {
        self.shared.current.subscribe()
    }

    /// Releases the lock and takes no further one. Returns when the session is closed, two seconds later at most.
    pub async fn stop(&self) {
        self.stop.send_replace(true);
        let mut ended = self.ended.clone();
        // An error means that the task has ended already.
        let _ = tokio::time::timeout(PING_BOUND, ended.wait_for(|ended| *ended)).await;
    }

    /// Whether the worker of that incarnation lives. The first question about one whose lock is free says `Suspect`; the
    /// second look is taken by itself after `dead_after`, so that a later question says `Dead`.
    ///
    /// # Errors
    /// When the database did not answer.
    pub async fn is_alive(&self, owner: Incarnation) -> Result<Liveness, StoreError> {
        Shared::is_alive(&self.shared, owner.0).await
    }

    /// The incarnations known to be dead.
    pub(super) fn dead(&self) -> Vec<i32> {
        self.shared.seen().dead.iter().copied().collect()
    }

    /// Every incarnation that this process has had.
    pub(super) fn mine(&self) -> Vec<i32> {
        self.shared.seen().mine.clone()
    }
}

impl Shared {
    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().expect("nothing panics while it holds this lock")
    }

    async fn is_alive(self: &Arc<Self>, owner: i32) -> Result<Liveness, StoreError> {
        // The sequence starts at 1: 0 is a program that recorded something and has gone.
        if owner <= 0 {
            return Ok(Liveness::Dead);
        }
        if let Some(known) = self.remembered(owner) {
            return Ok(known);
        }
        let _turn = self.looking.lock().await;
        if let Some(known) = self.remembered(owner) {
            return Ok(known);
        }
        let held = self.store.is_locked(owner).await?;
        Ok(self.note(owner, held))
    }

    /// The answer that needs no look.
    fn remembered(&self, owner: i32) -> Option<Liveness> {
        let seen = self.seen();
        if seen.dead.contains(&owner) {
            return Some(Liveness::Dead);
        }
        if self.current.borrow().is_some_and(|current| current.0 == owner) {
            return Some(Liveness::Alive);
        }
        if let Some(since) = seen.suspects.get(&owner) {
            return (since.elapsed() < self.dead_after).then_some(Liveness::Suspect);
        }
        seen.alive.get(&owner).filter(|at| at.elapsed() < ALIVE_FOR).map(|_| Liveness::Alive)
    }

    fn note(self: &Arc<Self>, owner: i32, held: bool) -> Liveness {
        let now = Instant::now();
        let mut seen = self.seen();
        if held {
            seen.suspects.remove(&owner);
            if seen.alive.len() >= SEEN_MAX {
                seen.alive.clear();
            }
            seen.alive.insert(owner, now);
            return Liveness::Alive;
        }
        seen.alive.remove(&owner);
        match seen.suspects.get(&owner).copied() {
            Some(since) if now.duration_since(since) >= self.dead_after => {
                seen.suspects.remove(&owner);
                if seen.dead.len() >= DEAD_MAX {
                    seen.dead.pop_front();
                }
                seen.dead.push_back(owner);
                tracing::warn!(incarnation = owner, "a worker has died");
                Liveness::Dead
            }
            Some(_) => Liveness::Suspect,
            None => {
                if seen.suspects.len() < SEEN_MAX {
                    seen.suspects.insert(owner, now);
                    tokio::spawn(look_again(Arc::downgrade(self), owner, self.dead_after));
                }
                Liveness::Suspect
            }
        }
    }
}

/// Takes the second look, as often as it needs to be answered.
async fn look_again(shared: Weak<Shared>, owner: i32, dead_after: Duration) {
    tokio::time::sleep(dead_after).await;
    loop {
        let Some(strong) = shared.upgrade() else { return };
        match strong.is_alive(owner).await {
            Ok(Liveness::Alive | Liveness::Dead) => return,
            Ok(Liveness::Suspect) | Err(_) => {}
        }
        drop(strong);
        tokio::time::sleep(dead_after.min(PING_EVERY)).await;
    }
}

/// Holds one incarnation after the other.
async fn keep(shared: Arc<Shared>, mut stopping: watch::Receiver<bool>, ending: watch::Sender<bool>) {
    loop {
        let taken = tokio::select! {
            // An error means that nobody is left to work for.
            _ = stopping.wait_for(|stop| *stop) => break,
            taken = take(&shared.store) => taken,
        };
        let Ok((mut session, incarnation)) = taken else { continue };
        tracing::info!(incarnation, "took an incarnation");
        shared.seen().mine.push(incarnation);
        shared.current.send_replace(Some(Incarnation(incarnation)));
        let lost = tokio::select! {
            _ = stopping.wait_for(|stop| *stop) => None,
            lost = until_lost(&mut session, incarnation) => Some(lost),
        };
        shared.current.send_replace(None);
        match lost {
            Some(reason) => tracing::warn!(incarnation, reason, "lost the incarnation's lock"),
            None => {
                // Closing the session releases the lock; so does the server, later, when this fails.
                let _ = tokio::time::timeout(PING_BOUND, session.close()).await;
                break;
            }
        }
    }
    ending.send_replace(true);
}

/// A session and its lock, however long it takes.
async fn take(store: &Store) -> Result<(PgConnection, i32), StoreError> {
    let mut said = false;
    let pauses = ExponentialBuilder::default()
        .with_min_delay(Duration::from_millis(100))
        .with_max_delay(Duration::from_secs(2))
        .with_jitter()
        .without_max_times();
    (|| async {
        tokio::time::timeout(TAKE_BOUND, try_take(store))
            .await
            .unwrap_or_else(|_| Err(StoreError::Unavailable("no answer in time".into())))
    })
    .retry(pauses)
    .notify(|error, _| {
        if std::mem::replace(&mut said, true) {
            tracing::debug!(%error, "still no incarnation");
        } else {
            tracing::warn!(%error, "no incarnation yet; trying on");
        }
    })
    .await
}

async fn try_take(store: &Store) -> Result<(PgConnection, i32), StoreError> {
    let mut session = store.direct_session("sendoff incarnation").await?;
    let incarnation: i32 =
        sqlx::query_scalar("SELECT nextval('worker_incarnations')::int").fetch_one(&mut session).await?;
    let locked: bool = sqlx::query_scalar("SELECT pg_try_advisory_lock($1, $2)")
        .bind(LOCK_CLASS)
        .bind(incarnation)
        .fetch_one(&mut session)
        .await?;
    if locked {
        Ok((session, incarnation))
    } else {
        Err(StoreError::Internal(format!("incarnation {incarnation} is taken: its sequence was set back")))
    }
}

/// Ends when the session is gone, does not answer, or no longer holds the lock; says which.
async fn until_lost(session: &mut PgConnection, incarnation: i32) -> &'static str {
    loop {
        tokio::time::sleep(PING_EVERY).await;
        let held = sqlx::query_scalar::<_, bool>(
            "SELECT EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid() \
             AND classid = $1::int::oid AND objid = $2::int::oid AND objsubid = 2 AND granted)",
        )
        .bind(LOCK_CLASS)
        .bind(incarnation)
        .fetch_one(&mut *session);
        match tokio::time::timeout(PING_BOUND, held).await {
            Ok(Ok(true)) => {}
            Ok(Ok(false)) => return "the session is not the one that took the lock",
            Ok(Err(_)) => return "the session has ended",
            Err(_) => return "the session does not answer",
        }
    }
}

impl Store {
    /// Whether some session of this database holds the incarnation's lock.
    async fn is_locked(&self, incarnation: i32) -> Result<bool, StoreError> {
        self.on_session(async |session| {
            sqlx::query_scalar(
                "SELECT EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND granted \
                 AND database = (SELECT oid FROM pg_database WHERE datname = current_database()) \
                 AND classid = $1::int::oid AND objid = $2::int::oid AND objsubid = 2)",
            )
            .bind(LOCK_CLASS)
            .bind(incarnation)
            .fetch_one(session)
            .await
        })
        .await
    }
}
