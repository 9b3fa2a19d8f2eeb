//! Forgetting letters that died longer ago than the archive remembers.
//! Guarantee: what still waits to be sent is never forgotten; one call deletes a bounded number of rows and waits for nobody.

use std::time::Duration;

use crate::store::{Store, StoreError};

/// Rows deleted in one call.
const SLICE: i64 = 500;

/// A parked letter leaves by itself, and a replaying one may be the only trace of a copy that is still to be published. A
/// locked row is at work, so it is passed over.
const FORGET: &str = "
WITH doomed AS MATERIALIZED (
    SELECT letter FROM dead_letters
    WHERE died_at < now() - $1 * interval '1 second' AND state NOT IN ('parked', 'replaying')
    ORDER BY died_at, letter LIMIT $2
    FOR UPDATE SKIP LOCKED
)
DELETE FROM dead_letters USING doomed WHERE dead_letters.letter = doomed.letter";

/// What one call did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LettersForgotten {
    /// Letters deleted.
    pub forgotten: u64,
    /// Nothing more is past the retention now, but for what others have locked.
    pub complete: bool,
}

impl Store {
    /// Deletes up to 500 letters whose message last died longer than `retention` ago (by the database's clock), the oldest
    /// first, and whatever became of them since.
    ///
    /// # Errors
    /// When the database did not answer.
    pub async fn forget_letters(&self, retention: Duration) -> Result<LettersForgotten, StoreError> {
        let deletion = sqlx::query(FORGET).bind(retention.as_secs_f64()).bind(SLICE);
        let deleted = self.on_session(async |session| deletion.execute(session).await).await?;
        let forgotten = deleted.rows_affected();
        Ok(LettersForgotten { forgotten, complete: forgotten < SLICE.unsigned_abs() })
    }
}
