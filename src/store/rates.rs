//! What the workers have of an account's rate and connections: slices, leased by the database's clock.
//! Guarantee: every ask and give-back of an account is alone under its row's lock, so what is granted to all workers together
//! keeps the limits; a lease of a worker that has died ends by itself.

use std::time::Duration;

use sqlx::{Acquire, PgConnection, Row};
use time::OffsetDateTime;
use uuid::Uuid;

use super::{Store, StoreError};
use crate::model::provider::{AccountKey, Limited};
use crate::model::rate::{self, Holding, Pace};

/// For so long a worker has its connections without renewing them.
pub const RATE_LEASE: Duration = Duration::from_secs(15);

/// A worker that stops waits no longer for it; the lease ends by itself.
const GIVE_BACK_LIMIT: Duration = Duration::from_secs(2);

/// A worker that vanished, or stands still, in the middle of an ask holds up the others of its account alone, and not for long.
const PATIENCE: &str = "SET LOCAL lock_timeout = '2s'; SET LOCAL idle_in_transaction_session_timeout = '5s'";

/// SQLSTATE of a lock that was not had within its time.
const LOCK_NOT_AVAILABLE: &str = "55P03";

const MAKE: &str =
    "INSERT INTO rate_accounts (account, tokens, refilled_at) VALUES ($1, $2, now()) ON CONFLICT DO NOTHING";

const LOCK: &str = "SELECT tokens, refilled_at FROM rate_accounts WHERE account = $1 FOR UPDATE";

/// A statement of its own behind the lock, so that it sees what the lock was waited for.
const OTHERS: &str = "
SELECT holder, connections, wanted, clock_timestamp() AS now
FROM (SELECT 1) AS one LEFT JOIN rate_leases
    ON account = $1 AND holder <> $2 AND expires_at > clock_timestamp()";

const KEEP: &str = "
WITH bucket AS (UPDATE rate_accounts SET tokens = $3, refilled_at = $4 WHERE account = $1)
INSERT INTO rate_leases (account, holder, connections, wanted, expires_at)
VALUES ($1, $2, $5, $6, $4 + $7 * interval '1 second')
ON CONFLICT (account, holder) DO UPDATE
SET connections = excluded.connections, wanted = excluded.wanted, expires_at = excluded.expires_at";

const GIVE_BACK: &str = "
WITH gone AS (DELETE FROM rate_leases WHERE account = $1 AND holder = $2)
UPDATE rate_accounts SET tokens = tokens + $3 WHERE account = $1";

/// By then each of their buckets is full, unless it owes; a bucket without a row is a full one.
const FORGET: &str = "
DELETE FROM rate_accounts AS a
WHERE refilled_at < now() - interval '10 minutes' AND tokens >= 0
    AND NOT EXISTS (SELECT FROM rate_leases AS l WHERE l.account = a.account AND l.expires_at > now())";

/// What a worker asks for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RateAsk {
    /// Tokens that it could use at once.
    pub tokens: u32,
    /// Tokens used beyond those granted.
    pub debt: u32,
    /// Connections that it could use; 0: it has no mail for them.
    pub connections: u32,
    /// Connections that it has open, whatever it may.
    pub open: u32,
}

/// What it is given.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RateSlice {
    /// Tokens, to be used within [`rate::USED_WITHIN`] from before the ask.
    pub tokens: u32,
    /// What is left in the bucket, for all.
    pub left: f64,
    /// Connections that it may have open, for [`RATE_LEASE`] from before the ask.
    pub connections: u32,
    /// Workers that send through the account now, this one included.
    pub workers: usize,
}

impl Store {
    /// Leases a slice of an account, and renews what the worker has of it. `None`: somebody else has held the account's row for
    /// too long.
    ///
    /// # Errors
    /// When the database did not answer; the slice may have been taken, and is then lost.
    pub async fn lease_rate(
        &self,
        limited: &Limited,
        holder: Uuid,
        ask: RateAsk,
    ) -> Result<Option<RateSlice>, StoreError> {
        self.on_session(async |session| {
            let mut transaction = session.begin().await?;
            sqlx::raw_sql(PATIENCE).execute(&mut *transaction).await?;
            match lease(&mut transaction, limited, holder, ask).await {
                Ok(slice) => {
                    transaction.commit().await?;
                    Ok(Some(slice))
                }
                Err(error) if is_busy(&error) => {
                    transaction.rollback().await?;
                    Ok(None)
                }
                Err(error) => Err(error),
            }
        })
        .await
    }

    /// Gives back an account's connections, and tokens that were not used.
    ///
    /// # Errors
    /// When the database did not answer; then the lease ends by itself.
    pub async fn give_back_rate(
        &self,
        account: AccountKey,
        holder: Uuid,
        tokens: i64,
    ) -> Result<(), StoreError> {
        #[expect(clippy::cast_precision_loss, reason = "tokens are few")]
        let question = sqlx::query(GIVE_BACK).bind(account.0).bind(holder).bind(tokens as f64);
        self.on_session_within(GIVE_BACK_LIMIT, async |session| question.execute(session).await)
            .await
            .map(drop)
    }

    /// Forgets the accounts that nobody has sent through for a while.
    ///
    /// # Errors
    /// When the database did not answer.
    pub async fn forget_rates(&self) -> Result<(), StoreError> {
        self.on_session(async |session| sqlx::query(FORGET).execute(session).await).await.map(drop)
    }
}

async fn lease(
    session: &mut PgConnection,
    limited: &Limited,
    holder: Uuid,
    ask: RateAsk,
) -> Result<RateSlice, sqlx::Error> {
    let key = limited.key.0;
    let pace = limited.limits.messages_per_minute.map(Pace::of);
    let (tokens, refilled_at) = bucket(session, key, pace).await?;
    let rows = sqlx::query(OTHERS).bind(key).bind(holder).fetch_all(&mut *session).await?;
    let (mut others, mut now) = (Vec::new(), refilled_at);
    for row in &rows {
        now = row.try_get("now")?;
        if let Some(holder) = row.try_get("holder")? {
            let (connections, wanted): (i32, i32) = (row.try_get("connections")?, row.try_get("wanted")?);
            let count = |stored: i32| stored.unsigned_abs();
            others.push(Holding { holder, connections: count(connections), wanted: count(wanted) });
        }
    }
    // A worker without a connection sends nothing.
    let sends = |other: &&Holding| other.wanted > 0 && other.connections > 0;
    let workers = 1 + others.iter().filter(sends).count();
    let (granted, left) = match pace {
        Some(pace) => {
            let since = Duration::try_from(now - refilled_at).unwrap_or_default();
            let tokens = rate::refilled(tokens, since, pace) - f64::from(ask.debt);
            let granted = rate::grant(tokens, ask.tokens, workers, pace);
            (granted, tokens - f64::from(granted))
        }
        None => (ask.tokens, tokens),
    };
    let connections = match limited.limits.max_connections {
        Some(limit) if ask.connections == 0 => rate::keep(limit, ask.open, &others),
        Some(limit) => rate::share(limit, holder, ask.connections, &others),
        None => ask.connections,
    };
    sqlx::query(KEEP)
        .bind(key)
        .bind(holder)
        .bind(left)
        // Never back: what has flowed in since is not to flow in again.
        .bind(now.max(refilled_at))
        .bind(stored(connections.max(ask.open)))
        .bind(stored(ask.connections))
        .bind(RATE_LEASE.as_secs_f64())
        .execute(session)
        .await?;
    Ok(RateSlice { tokens: granted, left, connections, workers })
}

/// Locks the account's row; makes it, with a full bucket, where there is none.
async fn bucket(
    session: &mut PgConnection,
    key: [u8; 32],
    pace: Option<Pace>,
) -> Result<(f64, OffsetDateTime), sqlx::Error> {
    loop {
        let row: Option<(f64, OffsetDateTime)> =
            sqlx::query_as(LOCK).bind(key).fetch_optional(&mut *session).await?;
        if let Some(row) = row {
            return Ok(row);
        }
        let full = pace.map_or(0.0, |pace| f64::from(pace.burst));
        sqlx::query(MAKE).bind(key).bind(full).execute(&mut *session).await?;
    }
}

fn is_busy(error: &sqlx::Error) -> bool {
    error.as_database_error().and_then(|error| error.code()).is_some_and(|code| code == LOCK_NOT_AVAILABLE)
}

fn stored(count: u32) -> i32 {
    i32::try_from(count).unwrap_or(i32::MAX)
}
