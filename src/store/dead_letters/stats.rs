//! Letters counted.
//! Guarantee: the counts of a filter add up to the letters that a listing by it shows.

use serde::Serialize;
use sqlx::Row;
use sqlx::postgres::PgRow;

use super::search::{bind_filter, filtered};
use super::{read_owner, read_reason};
use crate::model::failure::Reason;
use crate::model::letter::{LetterFilter, Owner};
use crate::store::{Store, StoreError};

/// How long ago letters died.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum LetterAge {
    /// Less than an hour.
    Hour,
    /// Less than a day.
    Day,
    /// Less than seven days.
    Week,
    /// Less than thirty days.
    Month,
    /// Longer.
    Older,
}

impl LetterAge {
    /// From the youngest to the oldest.
    pub const ALL: [Self; 5] = [Self::Hour, Self::Day, Self::Week, Self::Month, Self::Older];

    /// What a table is headed by.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Hour => "<1h",
            Self::Day => "<1d",
            Self::Week => "<7d",
            Self::Month => "<30d",
            Self::Older => "older",
        }
    }
}

/// How many letters have all three in common.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LetterCount {
    /// Why they died last.
    pub reason: Reason,
    /// Whose they are.
    pub owner: Owner,
    /// How long ago, by the database's clock.
    pub age: LetterAge,
    /// So many.
    pub count: u64,
}

/// The class is its place in [`LetterAge::ALL`].
const STATS: &str = concat!(
    "SELECT reason, organization_id, count(*) AS count, CASE
         WHEN died_at > now() - interval '1 hour' THEN 0
         WHEN died_at > now() - interval '24 hours' THEN 1
         WHEN died_at > now() - interval '168 hours' THEN 2
         WHEN died_at > now() - interval '720 hours' THEN 3
         ELSE 4
     END AS age
     FROM dead_letters WHERE ",
    filtered!(),
    " GROUP BY reason, organization_id, age ORDER BY reason, organization_id, age"
);

const WAITING: &str =
    "SELECT reason, count(*) AS count FROM dead_letters WHERE state = 'dead' GROUP BY reason ORDER BY reason";

impl Store {
    /// The letters that a filter means, counted by reason, organization and age; only what is there, ordered by all three.
    /// Those that this program does not understand are left out, as they are from a listing.
    ///
    /// # Errors
    /// When the database did not answer.
    pub async fn letter_stats(&self, filter: &LetterFilter) -> Result<Vec<LetterCount>, StoreError> {
        let question = bind_filter(sqlx::query(STATS), filter);
        let rows = self.on_session(async |session| question.fetch_all(session).await).await?;
        let counts = rows.iter().map(read_count).filter_map(understood);
        Ok(counts.collect::<Result<_, _>>()?)
    }

    /// How many letters wait for a person, by reason; a reason without any is not there. Read from an index alone, it is cheap
    /// enough for a metric.
    ///
    /// # Errors
    /// When the database did not answer.
    pub async fn dead_letter_counts(&self) -> Result<Vec<(Reason, u64)>, StoreError> {
        let rows = self.on_session(async |session| sqlx::query(WAITING).fetch_all(session).await).await?;
        let counts = rows.iter().map(|row| Ok((read_reason(row)?, number(row)?))).filter_map(understood);
        Ok(counts.collect::<Result<_, _>>()?)
    }
}

fn read_count(row: &PgRow) -> Result<LetterCount, sqlx::Error> {
    let age: i32 = row.try_get("age")?;
    let age = usize::try_from(age).ok().and_then(|age| LetterAge::ALL.get(age).copied());
    Ok(LetterCount {
        reason: read_reason(row)?,
        owner: read_owner(row.try_get("organization_id")?)?,
        age: age.unwrap_or(LetterAge::Older),
        count: number(row)?,
    })
}

fn number(row: &PgRow) -> Result<u64, sqlx::Error> {
    row.try_get::<i64, _>("count").map(i64::unsigned_abs)
}

fn understood<T>(counted: Result<T, sqlx::Error>) -> Option<Result<T, sqlx::Error>> {
    match counted {
        Err(sqlx::Error::Decode(error)) => {
            tracing::warn!(%error, "dead letters are not counted, for this program does not understand them");
            None
        }
        counted => Some(counted),
    }
}
