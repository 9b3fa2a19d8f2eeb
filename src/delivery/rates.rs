//! The limited accounts that this worker sends through: tokens and connections, leased in slices from the database.
//! Guarantee: nothing is sent through a limited account without a lease; who may go on owns its place, its token and its
//! connection, and gives them back when dropped, so also by a panic. An account without limits is never looked up here.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::{StreamExt, stream};
use tokio::sync::Notify;
use tokio::time::Instant;
use uuid::Uuid;

use super::rate::{Account, Cause, Entry, SHORT_WAIT, Take};
use crate::model::organization::OrganizationId;
use crate::model::provider::{AccountKey, Counted, Limited};
use crate::shutdown::Shutdown;
use crate::smtp::{Pool, Seats};
use crate::store::{Store, StoreError};
use crate::telemetry;

/// Between two looks at what is held, and so the longest time until another worker that goes without is noticed. A lease outlasts
/// two that fail.
const KEEP_PAUSE: Duration = Duration::from_secs(5);
/// Asks of one job that others' asks may overtake.
const ASKS: usize = 3;
/// Longest wait for one renewal, and for what is given back at the end: a lease outlasts it.
const RENEWAL_LIMIT: Duration = Duration::from_secs(4);
const GIVE_BACK_LIMIT: Duration = Duration::from_secs(2);
/// Renewals at once.
const RENEWALS: usize = 4;
/// Between two looks for accounts that nobody sends through any more.
const FORGET_PAUSE: Duration = Duration::from_secs(300);

/// The limited accounts. Cheap to clone.
#[derive(Clone)]
pub struct Rates(Arc<Inner>);

struct Inner {
    store: Store,
    pool: Pool,
    /// This process towards the database.
    holder: Uuid,
    accounts: Mutex<HashMap<AccountKey, Arc<Held>>>,
}

struct Held {
    limited: Mutex<Limited>,
    account: Mutex<Account>,
    seats: Arc<Seats>,
    /// Told when an attempt has ended.
    freed: Notify,
    /// One question at a time.
    asking: tokio::sync::Mutex<()>,
}

/// What became of a job's wish to go on.
pub enum Entered {
    /// To the dispatcher.
    Pass(Place),
    /// To be put aside.
    Aside(Waits),
}

/// What became of its wish for a token.
pub enum Taken {
    /// It may be sent.
    Go(Allowance),
    /// To be put aside.
    Aside(Waits),
}

/// Why and how long a job is put aside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Waits {
    /// One of the broker's aside delays, in seconds.
    pub delay_s: u32,
    /// Which limit it waits for.
    pub cause: Cause,
    /// Whether the log is to say so.
    pub is_to_be_told: bool,
}

/// A job among those that have no token yet.
pub struct Place {
    rates: Rates,
    held: Arc<Held>,
}

/// The right to send one message through a limited account.
pub struct Allowance {
    rates: Rates,
    held: Arc<Held>,
    cost: u32,
    counted: Counted,
    use_until: Mutex<Instant>,
    /// Its attempt has begun.
    begun: AtomicBool,
    /// A DATA of it has gone.
    passed: AtomicBool,
}

impl Held {
    fn account(&self) -> MutexGuard<'_, Account> {
        self.account.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn limited(&self) -> MutexGuard<'_, Limited> {
        self.limited.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn aside(&self, organization: Option<&OrganizationId>, cause: Cause) -> Waits {
        let now = Instant::now();
        let mut account = self.account();
        let delay_s = account.put_aside(organization, now);
        Waits { delay_s, cause, is_to_be_told: account.is_to_be_told(now) }
    }

    /// Lets the pool know what may be open until then.
    fn seat(&self, until: Instant) {
        self.seats.allow(self.account().connections(until));
    }
}

impl Rates {
    /// Nothing is held yet. `holder` is this process's own, and never another's.
    pub fn new(store: Store, pool: Pool, holder: Uuid) -> Self {
        Self(Arc::new(Inner { store, pool, holder, accounts: Mutex::default() }))
    }

    /// Whether a job may go on to the dispatcher, with up to `ceiling` connections for its destination. It waits for the
    /// database alone.
    ///
    /// # Errors
    /// When the database did not answer: then nothing is sent.
    pub async fn enter(
        &self,
        limited: &Limited,
        organization: Option<&OrganizationId>,
        ceiling: usize,
    ) -> Result<Entered, StoreError> {
        let held = self.held(limited);
        for _ in 0..ASKS {
            let entry = held.account().enter(ceiling, Instant::now());
            match entry {
                Entry::Pass => return Ok(Entered::Pass(Place { rates: self.clone(), held })),
                Entry::Full(cause) => return Ok(Entered::Aside(held.aside(organization, cause))),
                Entry::Ask if self.ask(&held).await? => {}
                Entry::Ask => break,
            }
        }
        Ok(Entered::Aside(held.aside(organization, Cause::Connections)))
    }

    fn held(&self, limited: &Limited) -> Arc<Held> {
        let held = self
            .accounts()
            .entry(limited.key)
            .or_insert_with(|| {
                Arc::new(Held {
                    limited: Mutex::new(*limited),
                    account: Mutex::new(Account::new(limited.limits, Instant::now())),
                    seats: Arc::default(),
                    freed: Notify::new(),
                    asking: tokio::sync::Mutex::default(),
                })
            })
            .clone();
        let mut last = held.limited();
        if *last != *limited {
            *last = *limited;
            held.account().adopt(limited.limits);
        }
        drop(last);
        held
    }

    fn accounts(&self) -> MutexGuard<'_, HashMap<AccountKey, Arc<Held>>> {
        self.0.accounts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks the database for a slice, unless somebody has asked meanwhile; whether it could be had. In a task of its own: what was granted counts even
    /// where who asked for it has gone.
    async fn ask(&self, held: &Arc<Held>) -> Result<bool, StoreError> {
        let (this, held, since) = (self.clone(), held.clone(), Instant::now());
        let asking = tokio::spawn(async move {
            let _turn = held.asking.lock().await;
            let (asked, busy) = {
                let account = held.account();
                (account.asked_since(since), account.busy_since(since))
            };
            if asked || busy { Ok(asked) } else { this.lease(&held, false).await }
        });
        asking.await.unwrap_or_else(|error| Err(StoreError::Internal(error.to_string())))
    }

    /// Under the account's turn to ask. Not where somebody else has held it for too long.
    async fn lease(&self, held: &Held, renewal: bool) -> Result<bool, StoreError> {
        let asked_at = Instant::now();
        let limited = *held.limited();
        let ask = held.account().ask(renewal, held.seats.taken(), asked_at);
        let Some(slice) = self.0.store.lease_rate(&limited, self.0.holder, ask).await? else {
            held.account().busy(Instant::now());
            return Ok(false);
        };
        held.account().slice(ask, slice, asked_at);
        held.seat(asked_at);
        Ok(true)
    }

    /// Renews what is used, closes connections that are another worker's now, and gives back what nobody wants. Until the
    /// second stage of a stop, which gives everything back.
    pub async fn keep(self, shutdown: Shutdown) {
        let mut forgotten_at = Instant::now();
        loop {
            tokio::select! {
                () = shutdown.stop_now() => break,
                () = tokio::time::sleep(KEEP_PAUSE) => {}
            }
            let held: Vec<_> = self.accounts().values().cloned().collect();
            tokio::select! {
                () = shutdown.stop_now() => break,
                () = stream::iter(held).for_each_concurrent(RENEWALS, |held| self.look_after(held)) => {}
            }
            if forgotten_at.elapsed() >= FORGET_PAUSE {
                forgotten_at = Instant::now();
                if let Err(error) = self.0.store.forget_rates().await {
                    tracing::debug!(%error, "accounts that nobody sends through could not be forgotten now");
                }
            }
        }
    }

    async fn look_after(&self, held: Arc<Held>) {
        let turn = held.asking.lock().await;
        let now = Instant::now();
        let unused = held.account().is_idle(now) && held.seats.taken() == 0;
        let done = if unused {
            self.give_back(&held).await.map(|()| true)
        } else if held.account().is_to_be_renewed() {
            // The others' renewals are behind this one.
            let renewal = tokio::time::timeout(RENEWAL_LIMIT, self.lease(&held, true)).await;
            renewal.unwrap_or(Ok(false))
        } else {
            Ok(true)
        };
        if !matches!(done, Ok(true)) {
            tracing::debug!(?done, "what is held of a limited account could not be renewed now");
            // What is not renewed by the next look may be another's by then.
            held.seat(now + KEEP_PAUSE);
        }
        drop(turn);
        let open = held.seats.taken();
        self.0.pool.trim(&held.seats).await;
        if held.seats.taken() < open {
            let _turn = held.asking.lock().await;
            if let Err(error) = self.lease(&held, true).await {
                tracing::debug!(%error, "closed connections are given back later");
            }
        }
        if unused {
            let key = held.limited().key;
            drop(held);
            let mut accounts = self.accounts();
            // Whoever has got hold of it meanwhile keeps it.
            if accounts.get(&key).is_some_and(|held| Arc::strong_count(held) == 1) {
                accounts.remove(&key);
            }
        }
    }

    /// Gives everything back, when the last connection is closed; not for long, for it ends by itself too.
    pub async fn give_all_back(&self) {
        let held: Vec<_> = self.accounts().drain().map(|(_, held)| held).collect();
        let giving = stream::iter(held).for_each_concurrent(RENEWALS, |held| async move {
            let _turn = held.asking.lock().await;
            if let Err(error) = self.give_back(&held).await {
                tracing::debug!(%error, "what was held of a limited account ends by itself");
            }
        });
        let _given = tokio::time::timeout(GIVE_BACK_LIMIT, giving).await;
    }

    async fn give_back(&self, held: &Held) -> Result<(), StoreError> {
        let now = Instant::now();
        let tokens = held.account().surrender(now);
        held.seat(now);
        let key = held.limited().key;
        let given = self.0.store.give_back_rate(key, self.0.holder, tokens).await;
        if given.is_err() {
            // Tokens may be lost; what is owed may not.
            held.account().overdraw(u32::try_from(-tokens).unwrap_or_default());
        }
        given
    }
}

impl Place {
    /// Connections that its account may have here.
    pub fn connections(&self) -> usize {
        self.held.account().connections(Instant::now())
    }

    /// Takes what a message to so many recipients costs; waits for a token that is near.
    ///
    /// # Errors
    /// When the database did not answer: then nothing is sent.
    pub async fn take(
        self,
        recipients: usize,
        organization: Option<&OrganizationId>,
    ) -> Result<Taken, StoreError> {
        let held = &self.held;
        let limits = held.limited().limits;
        let cost = limits.cost(recipients);
        let deadline = Instant::now() + SHORT_WAIT;
        loop {
            let mut freed = std::pin::pin!(held.freed.notified());
            freed.as_mut().enable();
            let now = Instant::now();
            let take = held.account().take(cost, now);
            match take {
                Take::Taken(use_until) => {
                    return Ok(Taken::Go(Allowance {
                        rates: self.rates.clone(),
                        held: held.clone(),
                        cost,
                        counted: limits.counted,
                        use_until: Mutex::new(use_until),
                        begun: AtomicBool::new(false),
                        passed: AtomicBool::new(false),
                    }));
                }
                Take::Ask if now <= deadline && self.rates.ask(held).await? => {}
                Take::Wait(wait) if now + wait <= deadline => tokio::time::sleep(wait).await,
                // An attempt of another destination with this account.
                Take::Busy => {
                    if tokio::time::timeout_at(deadline, freed).await.is_err() {
                        return Ok(Taken::Aside(held.aside(organization, Cause::Connections)));
                    }
                }
                Take::Ask | Take::Wait(_) => {
                    return Ok(Taken::Aside(held.aside(organization, Cause::Messages)));
                }
            }
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.held.account().leave();
    }
}

impl Allowance {
    /// The seats that its connection needs one of.
    pub fn seats(&self) -> &Arc<Seats> {
        &self.held.seats
    }

    /// Its attempt begins: from here on it is used, whatever comes of it.
    pub fn begin(&self) {
        self.begun.store(true, Ordering::Relaxed);
    }

    /// The look before a DATA: whether it may go. A token that has become old on the way is exchanged for another one; each further
    /// message of an attempt is charged without being waited for.
    pub async fn pass(&self) -> bool {
        if self.passed.load(Ordering::Relaxed) {
            if self.counted == Counted::Messages {
                self.held.account().overdraw(1);
            }
            return true;
        }
        let may = Instant::now() <= *self.use_until() || self.exchange().await;
        self.passed.store(may, Ordering::Relaxed);
        may
    }

    /// Whether it can no longer be used.
    pub fn is_over(&self) -> bool {
        Instant::now() > *self.use_until()
    }

    async fn exchange(&self) -> bool {
        let deadline = Instant::now() + SHORT_WAIT;
        loop {
            let now = Instant::now();
            let next = {
                let mut account = self.held.account();
                match account.token(self.cost, now) {
                    Some(until) => Take::Taken(until),
                    None => account.next_token(now),
                }
            };
            match next {
                Take::Taken(until) => {
                    *self.use_until() = until;
                    return true;
                }
                Take::Ask if now <= deadline => {
                    if !matches!(self.rates.ask(&self.held).await, Ok(true)) {
                        return false;
                    }
                }
                Take::Wait(wait) if now + wait <= deadline => tokio::time::sleep(wait).await,
                _ => return false,
            }
        }
    }

    fn use_until(&self) -> MutexGuard<'_, Instant> {
        self.use_until.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Allowance {
    fn drop(&mut self) {
        let unused = !self.begun.load(Ordering::Relaxed);
        let unused = unused.then(|| (self.cost, *self.use_until()));
        self.held.account().finish(unused, Instant::now());
        self.held.freed.notify_waiters();
    }
}

impl Waits {
    /// Counts it, and has the log say once in a while that mail waits.
    pub fn tell(&self, transport: &'static str, organization: Option<&OrganizationId>) {
        telemetry::waits_for_provider(transport, self.cause.as_str());
        if self.is_to_be_told {
            let organization = organization.map_or("-", OrganizationId::as_str);
            tracing::info!(
                transport,
                organization,
                limit = self.cause.as_str(),
                "mail waits for what its provider allows"
            );
        }
    }
}

impl Cause {
    fn as_str(self) -> &'static str {
        match self {
            Self::Messages => "messages",
            Self::Connections => "connections",
        }
    }
}
