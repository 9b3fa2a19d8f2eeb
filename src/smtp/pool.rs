//! Sessions kept for the next message, per destination.
//! Guarantee: a session comes back only by [`PooledSession::release`] and only in good order; dropped at any point it is
//! closed, so no answer is ever read by the wrong message. A session that needed a seat has it until it is closed.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::time::Duration;

use futures_util::future::join_all;
use tokio::time::{Instant, timeout};

use super::connect::SmtpConnector;
use super::seats::{Seat, Seats};
use super::session::{Envelope, FinalDot, Session, SessionFacts};
use crate::model::failure::{Failure, Transaction};
use crate::model::smtp_settings::{Destination, SmtpAccount};

/// How often idle sessions are looked at, at the least and at the most.
const SWEEP_MIN: Duration = Duration::from_millis(20);
const SWEEP_MAX: Duration = Duration::from_secs(5);
/// Longest wait for a seat. Who may begin to send has one coming; it waits for a goodbye at most.
const SEAT_WAIT: Duration = Duration::from_secs(10);

/// How long a session is kept.
#[derive(Debug, Clone, Copy)]
pub struct PoolLimits {
    /// Sessions open at once, idle ones included; those in use are bounded by their users.
    pub max_sessions: usize,
    /// Transactions before a session is closed.
    pub max_messages_per_connection: u32,
    /// An idle session is closed after this time.
    pub idle_timeout: Duration,
}

/// The sessions of every destination. Cheap to clone; the clones are one pool.
#[derive(Clone)]
pub struct Pool(Arc<Inner>);

struct Inner {
    connector: SmtpConnector,
    limits: PoolLimits,
    slots: Mutex<HashMap<Destination, Arc<Slot>>>,
    counts: Arc<Counts>,
    closed: AtomicBool,
}

#[derive(Default)]
struct Counts {
    idle: AtomicUsize,
    active: AtomicUsize,
}

/// One destination's idle sessions, the one used last at the end.
#[derive(Default)]
struct Slot {
    idle: Mutex<Vec<Idle>>,
    /// No session comes back here.
    retired: AtomicBool,
}

struct Idle {
    session: Session,
    since: Instant,
    seat: Option<Seat>,
}

impl Idle {
    /// Says goodbye; the seat comes back behind it.
    async fn quit(self) {
        self.session.quit().await;
        drop(self.seat);
    }
}

impl Slot {
    fn idle(&self) -> MutexGuard<'_, Vec<Idle>> {
        self.idle.lock().expect("no panic holds it")
    }
}

/// A session that is in use. Dropped, it is closed.
pub struct PooledSession {
    session: Session,
    slot: Arc<Slot>,
    pool: Pool,
    /// Behind the session: it comes back when that is closed.
    seat: Option<Seat>,
    _active: Active,
}

/// Counts a session in use for as long as it lives.
struct Active(Arc<Counts>);

impl Active {
    fn new(counts: &Arc<Counts>) -> Self {
        counts.active.fetch_add(1, Ordering::Relaxed);
        Self(counts.clone())
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        self.0.active.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Pool {
    /// An empty pool. Must be called within a tokio runtime: a task closes sessions that are idle for too long, until
    /// the last clone of the pool is dropped.
    pub fn new(connector: SmtpConnector, limits: PoolLimits) -> Self {
        let inner = Arc::new(Inner {
            connector,
            limits,
            slots: Mutex::default(),
            counts: Arc::default(),
            closed: AtomicBool::new(false),
        });
        tokio::spawn(sweep(Arc::downgrade(&inner), limits.idle_timeout));
        Self(inner)
    }

    /// A session for the destination: one that is idle and in good order, or a new one.
    ///
    /// # Errors
    /// The failure of opening a new one.
    pub async fn session(
        &self,
        destination: &Destination,
        account: &SmtpAccount,
    ) -> Result<PooledSession, Failure> {
        let slot = self.0.slot(destination);
        match self.reused(&slot) {
            Some(session) => Ok(session),
            None => self.open(destination, account, slot, None).await,
        }
    }

    /// A session for the destination that has one of these seats, a new one where `fresh` says so. `None` when no seat comes
    /// free in time.
    ///
    /// # Errors
    /// The failure of opening a new one.
    pub async fn seated_session(
        &self,
        destination: &Destination,
        account: &SmtpAccount,
        seats: &Arc<Seats>,
        fresh: bool,
    ) -> Result<Option<PooledSession>, Failure> {
        let slot = self.0.slot(destination);
        if let (false, Some(session)) = (fresh, self.reused(&slot)) {
            return Ok(Some(session));
        }
        match timeout(SEAT_WAIT, self.seat(seats)).await {
            Ok(seat) => self.open(destination, account, slot, Some(seat)).await.map(Some),
            Err(_) => Ok(None),
        }
    }

    /// Closes idle sessions that have one of these seats while there are more of them than there may be. Ends behind their
    /// goodbyes.
    pub async fn trim(&self, seats: &Arc<Seats>) {
        let mut goodbyes = Vec::new();
        for _ in 0..seats.excess() {
            goodbyes.extend(self.0.take_seated(seats).map(Idle::quit));
        }
        join_all(goodbyes).await;
    }

    /// A seat that is free, or that of an idle session, whichever destination it was for.
    async fn seat(&self, seats: &Arc<Seats>) -> Seat {
        loop {
            let mut changed = std::pin::pin!(seats.changed());
            changed.as_mut().enable();
            if let Some(seat) = seats.take() {
                return seat;
            }
            match self.0.take_seated(seats) {
                Some(idle) => idle.quit().await,
                None => changed.await,
            }
        }
    }

    /// An idle session in good order.
    fn reused(&self, slot: &Arc<Slot>) -> Option<PooledSession> {
        while let Some(idle) = self.0.take_idle(slot) {
            if idle.session.is_quiet() {
                return Some(self.in_use(idle, slot.clone()));
            }
        }
        None
    }

    /// A new session, whatever is idle: for a message whose reused session turned out to be gone.
    ///
    /// # Errors
    /// The failure of opening it.
    pub async fn fresh_session(
        &self,
        destination: &Destination,
        account: &SmtpAccount,
    ) -> Result<PooledSession, Failure> {
        let slot = self.0.slot(destination);
        self.open(destination, account, slot, None).await
    }

    /// Closes the idle sessions of a destination that will not come again, say a superseded configuration version;
    /// those in use are closed when they are released.
    pub fn forget(&self, destination: &Destination) {
        self.0.connector.forget(destination);
        let slot = self.0.slots().remove(destination);
        if let Some(slot) = slot {
            for idle in self.0.retire(&slot) {
                tokio::spawn(idle.quit());
            }
        }
    }

    /// Closes every idle session with a QUIT, within the limit; those in use are closed when they are released.
    pub async fn close_all(&self, limit: Duration) {
        self.0.closed.store(true, Ordering::SeqCst);
        let slots: Vec<Arc<Slot>> = self.0.slots().drain().map(|(_, slot)| slot).collect();
        let idle = slots.iter().flat_map(|slot| self.0.retire(slot));
        // Whoever has not answered by then is closed without a goodbye.
        let _ = timeout(limit, join_all(idle.map(Idle::quit))).await;
    }

    /// Closes the session that has been idle for longest, to make room for another destination's; whether there was one.
    pub fn close_longest_idle(&self) -> bool {
        let idle = self.0.longest_idle();
        let found = idle.is_some();
        if let Some(idle) = idle {
            tokio::spawn(idle.quit());
        }
        found
    }

    /// Sessions that wait for a message.
    pub fn idle(&self) -> usize {
        self.0.counts.idle.load(Ordering::Relaxed)
    }

    /// Sessions in use, those being opened included.
    pub fn active(&self) -> usize {
        self.0.counts.active.load(Ordering::Relaxed)
    }

    async fn open(
        &self,
        destination: &Destination,
        account: &SmtpAccount,
        slot: Arc<Slot>,
        seat: Option<Seat>,
    ) -> Result<PooledSession, Failure> {
        // The worker's sessions are those in use, which the dispatcher bounds, and the idle ones, which give way.
        while self.active() + self.idle() >= self.0.limits.max_sessions && self.close_longest_idle() {}
        let active = Active::new(&self.0.counts);
        let session = self.0.connector.open(destination, account).await?;
        Ok(PooledSession { session, slot, pool: self.clone(), seat, _active: active })
    }

    fn in_use(&self, Idle { session, seat, .. }: Idle, slot: Arc<Slot>) -> PooledSession {
        PooledSession { session, slot, pool: self.clone(), seat, _active: Active::new(&self.0.counts) }
    }
}

impl Inner {
    fn slots(&self) -> MutexGuard<'_, HashMap<Destination, Arc<Slot>>> {
        self.slots.lock().expect("no panic holds it")
    }

    fn slot(&self, destination: &Destination) -> Arc<Slot> {
        let mut slots = self.slots();
        match slots.get(destination) {
            Some(slot) => slot.clone(),
            None => slots.entry(destination.clone()).or_default().clone(),
        }
    }

    fn take_idle(&self, slot: &Slot) -> Option<Idle> {
        let idle = slot.idle().pop()?;
        self.counts.idle.fetch_sub(1, Ordering::Relaxed);
        Some(idle)
    }

    fn take_seated(&self, seats: &Arc<Seats>) -> Option<Idle> {
        let slots = self.slots();
        slots.values().find_map(|slot| {
            let mut idle = slot.idle();
            let place =
                idle.iter().position(|idle| idle.seat.as_ref().is_some_and(|seat| seat.is_of(seats)))?;
            self.counts.idle.fetch_sub(1, Ordering::Relaxed);
            Some(idle.remove(place))
        })
    }

    fn longest_idle(&self) -> Option<Idle> {
        let slots = self.slots();
        let oldest = |slot: &Arc<Slot>| slot.idle().first().map(|idle| idle.since);
        let (_, slot) =
            slots.values().filter_map(|slot| Some((oldest(slot)?, slot))).min_by_key(|found| found.0)?;
        let mut idle = slot.idle();
        if idle.is_empty() {
            return None;
        }
        self.counts.idle.fetch_sub(1, Ordering::Relaxed);
        Some(idle.remove(0))
    }

    fn retire(&self, slot: &Slot) -> Vec<Idle> {
        let mut idle = slot.idle();
        slot.retired.store(true, Ordering::SeqCst);
        self.counts.idle.fetch_sub(idle.len(), Ordering::Relaxed);
        idle.drain(..).collect()
    }

    /// Takes a session back unless it is worn, doubtful or no longer wanted; then it is given back to be closed.
    fn put_back(&self, slot: &Slot, used: Idle) -> Option<Idle> {
        let session = &used.session;
        let worn = session.transactions() >= self.limits.max_messages_per_connection;
        let mut idle = slot.idle();
        let crowded = used.seat.as_ref().is_some_and(Seat::is_crowded);
        let unwanted = crowded || slot.retired.load(Ordering::SeqCst) || self.closed.load(Ordering::SeqCst);
        if worn || unwanted || !session.is_usable() {
            return Some(used);
        }
        self.counts.idle.fetch_add(1, Ordering::Relaxed);
        idle.push(used);
        None
    }

    /// Takes out what has been idle for too long, drops what the server has closed, and forgets slots that nobody uses.
    fn expired(&self) -> Vec<Idle> {
        let now = Instant::now();
        let mut expired = Vec::new();
        self.slots().retain(|_, slot| {
            let mut idle = slot.idle();
            let before = idle.len();
            let fresh_from = idle.partition_point(|idle| now - idle.since >= self.limits.idle_timeout);
            expired.extend(idle.drain(..fresh_from));
            idle.retain(|idle| idle.session.is_quiet());
            self.counts.idle.fetch_sub(before - idle.len(), Ordering::Relaxed);
            // Under the lock of the map nobody can get hold of the slot meanwhile.
            !idle.is_empty() || Arc::strong_count(slot) > 1
        });
        expired
    }
}

async fn sweep(pool: Weak<Inner>, idle_timeout: Duration) {
    let every = (idle_timeout / 4).clamp(SWEEP_MIN, SWEEP_MAX);
    loop {
        tokio::time::sleep(every).await;
        let Some(pool) = pool.upgrade() else { return };
        for idle in pool.expired() {
            tokio::spawn(idle.quit());
        }
    }
}

impl PooledSession {
    /// Carries one message: see [`Session::send`].
    pub async fn send(
        &mut self,
        envelope: &Envelope,
        message: &[u8],
        gate: impl Future<Output = bool> + Send,
    ) -> Transaction {
        self.session.send(envelope, message, gate).await
    }

    /// What is known from the session's opening.
    pub fn facts(&self) -> &SessionFacts {
        self.session.facts()
    }

    /// A look at the message under way: see [`Session::final_dot`].
    pub fn final_dot(&self) -> FinalDot {
        self.session.final_dot()
    }

    /// Whether the session has carried a message before.
    pub fn is_reused(&self) -> bool {
        self.session.transactions() > 0
    }

    /// Ends the session in good order, however usable it is.
    pub fn close(self) {
        if self.session.is_usable() {
            tokio::spawn(self.into_idle().0.quit());
        }
    }

    /// Gives the session back for the next message; one that is worn or doubtful is closed instead.
    pub fn release(self) {
        let (pool, slot) = (self.pool.clone(), self.slot.clone());
        if let Some(idle) = pool.0.put_back(&slot, self.into_idle().0)
            && idle.session.is_usable()
        {
            tokio::spawn(idle.quit());
        }
    }

    /// No message is carried any more. Its place among those in use is given up by dropping the other half.
    fn into_idle(self) -> (Idle, Active) {
        (Idle { session: self.session, since: Instant::now(), seat: self.seat }, self._active)
    }
}
