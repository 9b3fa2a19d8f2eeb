//! Which rows need which key, counted.
//! Guarantee: nothing is opened, and of a letter's body no more is read than its header; a key of the ring that any row needs
//! is never missing from the answer, whatever else is in the tables.

use std::collections::BTreeMap;
use std::time::Duration;

use sqlx::Row;
use sqlx::postgres::PgRow;
use uuid::Uuid;

use super::key_of;
use crate::secrets::KeyRing;
use crate::store::{Store, StoreError};

/// Letters counted in one statement.
const PAGE: i64 = 20_000;
/// Longest count of one page, or of every configuration.
const LOOK_BOUND: Duration = Duration::from_secs(60);
/// Ids beside those of the ring. Of damaged rows any number may seem to be there.
const STRANGERS_MAX: usize = 1000;

const CONFIGURATIONS: &str = concat!(
    "SELECT one, two, count(*) AS count FROM (SELECT ",
    key_of!("username_sealed"),
    " AS one, ",
    key_of!("password_sealed"),
    " AS two FROM smtp_configs) AS heads GROUP BY one, two"
);

/// The last letter of the page that begins behind `$1`; none when fewer are left.
const PAGE_END: &str = "SELECT letter FROM dead_letters WHERE ($1::uuid IS NULL OR letter > $1) ORDER BY letter OFFSET $2 LIMIT 1";

const LETTERS: &str = concat!(
    "SELECT one, two, count(*) AS count FROM (SELECT ",
    key_of!("properties_sealed"),
    " AS one, ",
    key_of!("body_sealed"),
    " AS two FROM dead_letters WHERE ($1::uuid IS NULL OR letter > $1) AND ($2::uuid IS NULL OR letter <= $2)
    ) AS heads GROUP BY one, two"
);

/// Rows, and the sealed values in them: two to a row, of which one alone may be under a key.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SealedRows {
    /// Configurations: user name and password.
    pub configurations: u64,
    /// Dead letters in the archive: body and properties.
    pub letters: u64,
    /// Sealed values in all of them.
    pub values: u64,
}

impl SealedRows {
    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// What needs which key.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct KeyUsage {
    /// By the key's id, whether it is in the ring or not.
    pub keys: BTreeMap<String, SealedRows>,
    /// What is no sealed value of a known format; no key would open it.
    pub damaged: SealedRows,
    /// Rows that are not wholly under the first key, and their values that are not; the damaged ones too.
    pub behind: SealedRows,
}

#[derive(Clone, Copy)]
enum Table {
    Configurations,
    Letters,
}

impl Store {
    /// Counts what is sealed under which key. Every row is looked at, so it is for a check and for a rotation, not for a
    /// worker; what changes meanwhile may be counted as before or as after.
    ///
    /// # Errors
    /// When the database did not answer within a minute for each 20,000 letters.
    pub async fn key_usage(&self, ring: &KeyRing) -> Result<KeyUsage, StoreError> {
        let mut usage = KeyUsage::default();
        let counting = sqlx::query(CONFIGURATIONS);
        let rows =
            self.on_session_within(LOOK_BOUND, async |session| counting.fetch_all(session).await).await?;
        usage.add(Table::Configurations, ring, &rows)?;
        let mut after: Option<Uuid> = None;
        loop {
            let end = sqlx::query_scalar(PAGE_END).bind(after).bind(PAGE - 1);
            let end: Option<Uuid> =
                self.on_session_within(LOOK_BOUND, async |session| end.fetch_optional(session).await).await?;
            let counting = sqlx::query(LETTERS).bind(after).bind(end);
            let rows =
                self.on_session_within(LOOK_BOUND, async |session| counting.fetch_all(session).await).await?;
            usage.add(Table::Letters, ring, &rows)?;
            if end.is_none() {
                return Ok(usage);
            }
            after = end;
        }
    }
}

impl KeyUsage {
    fn add(&mut self, table: Table, ring: &KeyRing, rows: &[PgRow]) -> Result<(), sqlx::Error> {
        for row in rows {
            let keys: [Option<&str>; 2] = [row.try_get("one")?, row.try_get("two")?];
            let count = row.try_get::<i64, _>("count")?.unsigned_abs();
            self.count(table, ring, keys, count);
        }
        Ok(())
    }

    /// Counts rows whose two values are sealed under these keys.
    fn count(&mut self, table: Table, ring: &KeyRing, keys: [Option<&str>; 2], count: u64) {
        let [one, two] = keys;
        if one == two {
            self.rows_under(ring, one).add(table, count, 2);
        } else {
            self.rows_under(ring, one).add(table, count, 1);
            self.rows_under(ring, two).add(table, count, 1);
        }
        let behind = keys.iter().filter(|key| **key != Some(ring.sealing_id())).count();
        if behind > 0 {
            self.behind.add(table, count, behind as u64);
        }
    }

    fn rows_under(&mut self, ring: &KeyRing, key: Option<&str>) -> &mut SealedRows {
        let Some(key) = key else { return &mut self.damaged };
        let is_known = self.keys.contains_key(key) || ring.ids().any(|id| id == key);
        if !is_known && self.keys.len() >= STRANGERS_MAX {
            return &mut self.damaged;
        }
        self.keys.entry(key.to_owned()).or_default()
    }
}

impl SealedRows {
    fn add(&mut self, table: Table, count: u64, values: u64) {
        match table {
            Table::Configurations => self.configurations += count,
            Table::Letters => self.letters += count,
        }
        self.values += count * values;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_under_two_keys_needs_both_and_strangers_never_hide_a_key_of_the_ring() {
        let items = ["new", "old"].map(|id| KeyRing::generate(id).unwrap());
        let ring = KeyRing::parse(&items).unwrap();
        let mut usage = KeyUsage::default();
        for number in 0..2 * STRANGERS_MAX {
            usage.count(Table::Letters, &ring, [Some(&format!("x{number}")), None], 1);
        }
        usage.count(Table::Configurations, &ring, [Some("old"), Some("new")], 3);
        usage.count(Table::Configurations, &ring, [Some("new"), Some("new")], 4);
        assert_eq!(usage.keys["old"], SealedRows { configurations: 3, letters: 0, values: 3 });
        assert_eq!(usage.keys["new"], SealedRows { configurations: 7, letters: 0, values: 11 });
        assert_eq!(usage.keys.len(), STRANGERS_MAX + 2);
        assert_eq!((usage.behind.configurations, usage.behind.letters), (3, 2000));
        assert_eq!(usage.behind.values, 4003);
    }
}
