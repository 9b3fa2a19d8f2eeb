//! What a worker has of one limited account: the slice of its rate, its connections, who waits for either.
//! Guarantee: pure; no token is handed out that was not granted, nor twice, nor after its time; no connection without a lease.

use std::time::Duration;

use tokio::time::Instant;

use super::aside::Aside;
use crate::model::organization::OrganizationId;
use crate::model::provider::Limits;
use crate::model::rate::{Pace, SLICE_LASTS, USED_WITHIN, refilled};
use crate::store::{RATE_LEASE, RateAsk, RateSlice};

/// A job waits so long for a token at most; with a longer wait ahead it is put aside.
pub const SHORT_WAIT: Duration = Duration::from_secs(2);
/// While others have all connections: the time between two asks for one.
const CONNECTIONS_PAUSE: Duration = Duration::from_secs(1);
/// Pace that is assumed where only connections are limited, to spread what is put aside.
const UNKNOWN_PACE: Duration = Duration::from_millis(100);
/// For so long after it was last wanted an account's connections are kept where no other worker wants them.
const WANTED_FOR: Duration = Duration::from_secs(10);
/// Between two log lines that say that mail waits.
const TELL_AGAIN: Duration = Duration::from_secs(600);

/// Which limit is waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    /// Messages a minute.
    Messages,
    /// Connections at once.
    Connections,
}

/// Whether a job may go on to the dispatcher.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// It may: the caller owes a [`Account::leave`].
    Pass,
    /// Not before the database was asked for a slice.
    Ask,
    /// It is to be put aside.
    Full(Cause),
}

/// Whether a token is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Take {
    /// One was taken, to be used until then. The caller owes a [`Account::finish`].
    Taken(Instant),
    /// The database may have one.
    Ask,
    /// None before this time has passed.
    Wait(Duration),
    /// Others of this worker use all of its connections.
    Busy,
}

/// The state of one account.
#[derive(Debug)]
pub struct Account {
    limits: Limits,
    /// Below zero: used beyond what was granted.
    tokens: i64,
    /// When the slice that the tokens are of was asked for.
    sliced_at: Instant,
    /// What was left in the bucket, and when.
    left: f64,
    asked_at: Option<Instant>,
    /// Workers among which the bucket is shared.
    workers: usize,
    connections: usize,
    in_use: usize,
    /// Jobs that have passed and have no token yet.
    ahead: usize,
    aside: Aside,
    /// Connections that this worker could use at most.
    ceiling: usize,
    wanted_at: Instant,
    /// Whether the last ask was for connections, and not to keep those that were open.
    was_wanted: bool,
    /// When an ask last found the account held by somebody else.
    busy_at: Option<Instant>,
    told_at: Option<Instant>,
}

impl Account {
    /// An account of which nothing is leased yet.
    pub fn new(limits: Limits, now: Instant) -> Self {
        Self {
            limits,
            tokens: 0,
            sliced_at: now,
            left: 0.0,
            asked_at: None,
            workers: 1,
            connections: 0,
            in_use: 0,
            ahead: 0,
            aside: Aside::default(),
            ceiling: 1,
            wanted_at: now,
            was_wanted: false,
            busy_at: None,
            told_at: None,
        }
    }

    /// The limits as of the job at hand: configurations change, and two may name one account.
    pub fn adopt(&mut self, limits: Limits) {
        self.limits = limits;
    }

    /// Whether one more job may go on. `ceiling`: connections that this worker could use for its destination.
    pub fn enter(&mut self, ceiling: usize, now: Instant) -> Entry {
        self.wanted_at = now;
        self.ceiling = ceiling;
        if !self.is_leased(now) || !self.was_wanted {
            return Entry::Ask;
        }
        if self.connections == 0 {
            let again = self.asked_at.is_none_or(|at| now.duration_since(at) >= CONNECTIONS_PAUSE);
            return if again { Entry::Ask } else { Entry::Full(Cause::Connections) };
        }
        if self.wait_behind(self.ahead, now) > SHORT_WAIT {
            return Entry::Full(Cause::Messages);
        }
        self.ahead += 1;
        Entry::Pass
    }

    /// A job that had passed has its token, or has gone.
    pub fn leave(&mut self) {
        self.ahead -= 1;
    }

    /// Takes tokens for a message of that cost; one has to be there, and what the message costs beyond those that are is paid
    /// back by the ones behind it.
    pub fn take(&mut self, cost: u32, now: Instant) -> Take {
        self.expire(now);
        if !self.is_leased(now) {
            return Take::Ask;
        }
        if self.in_use >= self.connections {
            return Take::Busy;
        }
        let Some(token) = self.token(cost, now) else { return self.next_token(now) };
        self.in_use += 1;
        Take::Taken(token)
    }

    /// Tokens for a message that has its connection: until when they are to be used.
    pub fn token(&mut self, cost: u32, now: Instant) -> Option<Instant> {
        self.expire(now);
        if self.limits.messages_per_minute.is_none() {
            return Some(now + USED_WITHIN);
        }
        if self.tokens < 1 {
            return None;
        }
        self.tokens -= i64::from(cost);
        Some(self.sliced_at + USED_WITHIN)
    }

    /// Without a token: what to do for one.
    pub fn next_token(&mut self, now: Instant) -> Take {
        match self.wait_behind(0, now) {
            Duration::ZERO => Take::Ask,
            wait => Take::Wait(wait),
        }
    }

    /// A message went that nothing was taken for.
    pub fn overdraw(&mut self, cost: u32) {
        if self.limits.messages_per_minute.is_some() {
            self.tokens -= i64::from(cost);
        }
    }

    /// A message's connection is free; what was taken for one that never went comes back, unless its time is over.
    pub fn finish(&mut self, unused: Option<(u32, Instant)>, now: Instant) {
        self.in_use -= 1;
        self.expire(now);
        if let Some((cost, until)) = unused
            && until == self.sliced_at + USED_WITHIN
            && now < self.sliced_at + SLICE_LASTS
            && self.limits.messages_per_minute.is_some()
        {
            self.tokens += i64::from(cost);
        }
    }

    /// What to ask the database for, with so many connections open. `renewal`: no tokens.
    pub fn ask(&mut self, renewal: bool, open: usize, now: Instant) -> RateAsk {
        self.expire(now);
        let wanted = self.in_use > 0 || now.duration_since(self.wanted_at) < WANTED_FOR;
        let connections = if wanted { self.ceiling } else { 0 };
        self.was_wanted = wanted;
        let waiting = if renewal || self.tokens > 0 { 0 } else { self.ahead.max(1) };
        RateAsk {
            tokens: count(waiting),
            debt: u32::try_from(-self.tokens.min(0)).unwrap_or(u32::MAX),
            connections: count(connections),
            open: count(open),
        }
    }

    /// What the database gave for an ask that was made at `asked_at`.
    pub fn slice(&mut self, ask: RateAsk, slice: RateSlice, asked_at: Instant) {
        self.tokens += i64::from(ask.debt);
        if slice.tokens > 0 {
            // One that came back meanwhile is of an older slice, and would outlive it.
            self.tokens = self.tokens.min(0) + i64::from(slice.tokens);
            self.sliced_at = asked_at;
        }
        self.left = slice.left;
        self.asked_at = Some(asked_at);
        self.workers = slice.workers.max(1);
        // Where only the rate is limited, the windows bound the connections.
        self.connections = match self.limits.max_connections {
            Some(_) => usize::try_from(slice.connections).unwrap_or(usize::MAX),
            None => usize::MAX,
        };
    }

    /// An ask found the account held by somebody else, for longer than jobs should wait.
    pub fn busy(&mut self, now: Instant) {
        self.busy_at = Some(now);
    }

    /// Whether an ask found it so since then.
    pub fn busy_since(&self, then: Instant) -> bool {
        self.busy_at.is_some_and(|at| at >= then)
    }

    /// Whether it was asked for since then.
    pub fn asked_since(&self, then: Instant) -> bool {
        self.asked_at.is_some_and(|at| at >= then)
    }

    /// Connections that this worker may have open now.
    pub fn connections(&self, now: Instant) -> usize {
        if self.is_leased(now) { self.connections } else { 0 }
    }

    /// Whether it is worth a renewal: without a limit of connections the next token's ask renews as well.
    pub fn is_to_be_renewed(&self) -> bool {
        self.limits.max_connections.is_some()
    }

    /// Whether nothing of it is used or wanted.
    pub fn is_idle(&self, now: Instant) -> bool {
        self.in_use == 0 && self.ahead == 0 && now.duration_since(self.wanted_at) >= WANTED_FOR
    }

    /// Gives everything up: the tokens to be given back, or owed.
    pub fn surrender(&mut self, now: Instant) -> i64 {
        self.expire(now);
        self.asked_at = None;
        self.connections = 0;
        std::mem::take(&mut self.tokens)
    }

    /// Books a job that is put aside; for how long, in seconds.
    pub fn put_aside(&mut self, organization: Option<&OrganizationId>, now: Instant) -> u32 {
        let pace = self.pace().map_or(UNKNOWN_PACE, |pace| pace.per_token() * self.sharers());
        self.aside.put(organization, pace, now)
    }

    /// Whether the log is to say that mail waits.
    pub fn is_to_be_told(&mut self, now: Instant) -> bool {
        let due = self.told_at.is_none_or(|at| now.duration_since(at) >= TELL_AGAIN);
        if due {
            self.told_at = Some(now);
        }
        due
    }

    fn pace(&self) -> Option<Pace> {
        self.limits.messages_per_minute.map(Pace::of)
    }

    fn sharers(&self) -> u32 {
        u32::try_from(self.workers).unwrap_or(u32::MAX)
    }

    fn is_leased(&self, now: Instant) -> bool {
        self.asked_at.is_some_and(|at| now.duration_since(at) < RATE_LEASE)
    }

    /// Tokens do not outlive their slice; debts do.
    fn expire(&mut self, now: Instant) {
        if now >= self.sliced_at + SLICE_LASTS {
            self.tokens = self.tokens.min(0);
        }
    }

    /// How long a job would wait for its token behind so many others, as far as can be told from here.
    fn wait_behind(&mut self, others: usize, now: Instant) -> Duration {
        let Some(pace) = self.pace() else { return Duration::ZERO };
        self.expire(now);
        let since = self.asked_at.map_or(Duration::ZERO, |at| now.duration_since(at));
        let bucket = refilled(self.left, since, pace);
        #[expect(clippy::cast_precision_loss, reason = "tokens and jobs are few")]
        let missing = (others + 1) as f64 - self.tokens as f64 - bucket;
        if missing <= 0.0 {
            return Duration::ZERO;
        }
        // The first one flows in for whoever asks first; those behind it are shared.
        let shared = (missing - 1.0).max(0.0) * f64::from(self.sharers());
        Duration::from_secs_f64((missing.min(1.0) + shared) / pace.per_s)
    }
}

fn count(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

#[cfg(test)]
#[path = "rate_tests.rs"]
mod tests;
