//! Leases: what one worker does for all of them, until it stops renewing.
//! Guarantee: at one moment of the database's clock a lease has one holder. Nothing relies on it for being right: a holder may
//! be slow to notice that it is none any more.

use std::time::Duration;

use uuid::Uuid;

use super::{Store, StoreError};

/// Changes nothing while somebody else holds it.
const TAKE: &str = "
INSERT INTO leases AS l (name, holder, expires_at) VALUES ($1, $2, now() + $3 * interval '1 second')
ON CONFLICT (name) DO UPDATE SET holder = excluded.holder, expires_at = excluded.expires_at
WHERE l.holder = excluded.holder OR l.expires_at <= now()";

const GIVE_BACK: &str = "DELETE FROM leases WHERE name = $1 AND holder = $2";

impl Store {
    /// Takes a lease that is free, or renews the holder's own, for so long from now. Whether the holder has it.
    ///
    /// # Errors
    /// When the database did not answer; it may have been taken.
    pub async fn take_lease(&self, name: &str, holder: Uuid, period: Duration) -> Result<bool, StoreError> {
        let question = sqlx::query(TAKE).bind(name).bind(holder).bind(period.as_secs_f64());
        let taken = self.on_session(async |session| question.execute(session).await).await?;
        Ok(taken.rows_affected() > 0)
    }

    /// Gives a lease back before its time; nothing where it is another's.
    ///
    /// # Errors
    /// When the database did not answer.
    pub async fn give_back_lease(&self, name: &str, holder: Uuid) -> Result<(), StoreError> {
        let question = sqlx::query(GIVE_BACK).bind(name).bind(holder);
        self.on_session(async |session| question.execute(session).await).await.map(drop)
    }
}
