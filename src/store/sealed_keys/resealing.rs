//! Values sealed anew under the first key of the ring, some rows at a time.
//! Guarantee: a row is changed only where it is still what was read, and in nothing but its sealed values; no lock is held while
//! they are sealed. Each one was opened again, and is the same, before it is written. What does not open stays as it is.

use std::sync::Arc;

use sha2::{Digest, Sha256};
use sqlx::Row;
use sqlx::postgres::PgRow;
use uuid::Uuid;

use super::key_of;
use crate::model::organization::OrganizationId;
use crate::secrets::{Context, Field, KeyRing, LetterField, OpenError, ResealError};
use crate::store::{Store, StoreError, bound_for};

/// Rows whose headers are read at once.
const PAGE: i64 = 2000;
/// How often a row that was changed meanwhile is read again.
const TRIES: usize = 3;

/// What holds sealed values, two in each row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum SealedTable {
    /// User name and password of an organization's configuration; a row is named by its organization.
    Configurations,
    /// Body and properties of a dead letter; a row is named by the archive's name of the letter.
    Letters,
}

/// A row that is not wholly under the first key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stale {
    /// Its name.
    pub id: String,
    /// Of both values as they are stored.
    pub bytes: u64,
}

/// Some of the rows that are to be sealed anew, in the order of their names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StalePage {
    /// The rows; there may be none although more follow.
    pub stale: Vec<Stale>,
    /// Where to go on; `None` behind the last row.
    pub next: Option<String>,
}

/// A value that was left as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unsealed {
    /// Where.
    pub table: SealedTable,
    /// The row's name.
    pub id: String,
    /// Which of the row's values.
    pub field: &'static str,
    /// Why.
    pub why: ResealError,
}

/// What became of some rows: those asked for are the sum of the counts.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Resealed {
    /// Now wholly under the first key.
    pub resealed: u64,
    /// With at least one value that does not open; the other one was sealed anew where it could be.
    pub unopened: u64,
    /// Changed, deleted or sealed anew by somebody else meanwhile.
    pub changed: u64,
    /// Names the values that do not open.
    pub unsealed: Vec<Unsealed>,
}

struct Statements {
    /// Behind `$1`, at most `$2`.
    page: &'static str,
    read: &'static str,
    write: &'static str,
}

/// `$id` is the key's column, `$type` its type; `$one` and `$two` are the sealed columns.
macro_rules! statements {
    ($table:literal, $id:literal, $type:literal, $one:literal, $two:literal) => {
        Statements {
            page: concat!(
                "SELECT ",
                $id,
                "::text AS id, octet_length(",
                $one,
                ")::bigint + octet_length(",
                $two,
                ") AS bytes, ",
                key_of!($one),
                " AS one, ",
                key_of!($two),
                " AS two
FROM ",
                $table,
                " WHERE ($1::text IS NULL OR ",
                $id,
                " > $1::",
                $type,
                ") ORDER BY ",
                $id,
                " LIMIT $2"
            ),
            read: concat!(
                "SELECT ",
                $id,
                "::text AS id, ",
                $one,
                " AS one, ",
                $two,
                " AS two FROM ",
                $table,
                "
WHERE ",
                $id,
                " = ANY ($1::text[]::",
                $type,
                "[])"
            ),
            // Sent back is what the old values hash to: a letter's may be of 10 MiB.
            write: concat!(
                "WITH a AS MATERIALIZED (
    SELECT * FROM unnest($1::text[]::",
                $type,
                "[], $2::bytea[], $3::bytea[], $4::bytea[], $5::bytea[])
        AS a (id, was_one, was_two, one, two)
), locked AS MATERIALIZED (
    SELECT a.* FROM ",
                $table,
                " AS t JOIN a ON t.",
                $id,
                " = a.id
    WHERE sha256(t.",
                $one,
                ") = a.was_one AND sha256(t.",
                $two,
                ") = a.was_two
    ORDER BY t.",
                $id,
                " FOR NO KEY UPDATE OF t
)
UPDATE ",
                $table,
                " AS t SET ",
                $one,
                " = locked.one, ",
                $two,
                " = locked.two
FROM locked WHERE t.",
                $id,
                " = locked.id RETURNING t.",
                $id,
                "::text AS id"
            ),
        }
    };
}

const CONFIGURATIONS: Statements =
    statements!("smtp_configs", "organization_id", "text", "username_sealed", "password_sealed");
const LETTERS: Statements = statements!("dead_letters", "letter", "uuid", "properties_sealed", "body_sealed");

impl SealedTable {
    fn statements(self) -> &'static Statements {
        match self {
            Self::Configurations => &CONFIGURATIONS,
            Self::Letters => &LETTERS,
        }
    }

    fn fields(self) -> [&'static str; 2] {
        match self {
            Self::Configurations => ["username", "password"],
            Self::Letters => ["properties", "body"],
        }
    }
}

/// Seals values anew. Cheap to clone.
#[derive(Clone)]
pub struct Resealer {
    store: Store,
    keys: Arc<KeyRing>,
    writes: bool,
}

struct Sealed {
    id: String,
    values: [Vec<u8>; 2],
}

/// A row on its way back.
struct Anew {
    id: String,
    was: [[u8; 32]; 2],
    values: [Vec<u8>; 2],
    /// Whether any value was sealed anew.
    differs: bool,
    unsealed: Vec<Unsealed>,
}

impl Resealer {
    /// For the values in this database, under these keys.
    pub fn new(store: Store, keys: Arc<KeyRing>) -> Self {
        Self { store, keys, writes: true }
    }

    /// One that does everything but write.
    pub fn dry(self) -> Self {
        Self { writes: false, ..self }
    }

    /// The keys.
    pub fn keys(&self) -> &KeyRing {
        &self.keys
    }

    /// The rows behind `after` that are not wholly under the first key, of the next 2,000 rows; only headers are read.
    ///
    /// # Errors
    /// When the database did not answer.
    pub async fn stale(&self, table: SealedTable, after: Option<&str>) -> Result<StalePage, StoreError> {
        let question = sqlx::query(table.statements().page).bind(after).bind(PAGE);
        let rows = self.store.on_session(async |session| question.fetch_all(session).await).await?;
        let next = rows.last().filter(|_| rows.len() as i64 == PAGE);
        let next = next.map(|row| row.try_get("id")).transpose()?;
        let first = Some(self.keys.sealing_id());
        let mut stale = Vec::new();
        for row in &rows {
            let (one, two): (Option<&str>, Option<&str>) = (row.try_get("one")?, row.try_get("two")?);
            if one != first || two != first {
                let bytes = row.try_get::<i64, _>("bytes")?.unsigned_abs();
                stale.push(Stale { id: row.try_get("id")?, bytes });
            }
        }
        Ok(StalePage { stale, next })
    }

    /// Seals rows anew. It may be repeated after any error: what was written is then `changed`. The caller bounds their
    /// bytes, of which four times as many are in memory.
    ///
    /// # Errors
    /// When the database did not answer; the rows may have been written all the same.
    pub async fn reseal(&self, table: SealedTable, rows: &[Stale]) -> Result<Resealed, StoreError> {
        let mut outcome = Resealed::default();
        let limit = bound_for(rows.iter().map(|row| row.bytes).sum());
        let mut left: Vec<String> = rows.iter().map(|row| row.id.clone()).collect();
        for _ in 0..TRIES {
            if left.is_empty() {
                break;
            }
            let reading = sqlx::query(table.statements().read).bind(&left);
            let read =
                self.store.on_session_within(limit, async |session| reading.fetch_all(session).await).await?;
            let sealed = read.iter().map(Sealed::read).collect::<Result<Vec<_>, _>>()?;
            drop(read);
            let asked = left.len();
            let anew = self.seal(table, sealed).await?;
            let (rest, mut done): (Vec<Anew>, Vec<Anew>) = anew.into_iter().partition(|row| row.differs);
            // Not there any more, or under the first key by now.
            let untouched = done.iter().filter(|row| !row.unsealed.is_empty()).count();
            outcome.changed += (asked - rest.len() - untouched) as u64;
            let written = self.write(table, &rest, limit).await?;
            let (rewritten, lost): (Vec<Anew>, Vec<Anew>) =
                rest.into_iter().partition(|row| written.contains(&row.id));
            done.extend(rewritten);
            for row in done {
                if !row.unsealed.is_empty() {
                    outcome.unopened += 1;
                    outcome.unsealed.extend(row.unsealed);
                } else if row.differs {
                    outcome.resealed += 1;
                }
            }
            left = lost.into_iter().map(|row| row.id).collect();
        }
        outcome.changed += left.len() as u64;
        Ok(outcome)
    }

    async fn seal(&self, table: SealedTable, rows: Vec<Sealed>) -> Result<Vec<Anew>, StoreError> {
        let keys = Arc::clone(&self.keys);
        tokio::task::spawn_blocking(move || rows.into_iter().map(|row| anew(&keys, table, row)).collect())
            .await
            .map_err(|_| StoreError::Internal("a value could not be sealed anew".into()))
    }

    /// The names of the rows that were written.
    async fn write(
        &self,
        table: SealedTable,
        rows: &[Anew],
        limit: std::time::Duration,
    ) -> Result<Vec<String>, StoreError> {
        if rows.is_empty() || !self.writes {
            return Ok(rows.iter().map(|row| row.id.clone()).collect());
        }
        let writing = sqlx::query_scalar(table.statements().write)
            .bind(rows.iter().map(|row| row.id.as_str()).collect::<Vec<_>>())
            .bind(rows.iter().map(|row| &row.was[0][..]).collect::<Vec<_>>())
            .bind(rows.iter().map(|row| &row.was[1][..]).collect::<Vec<_>>())
            .bind(rows.iter().map(|row| &row.values[0][..]).collect::<Vec<_>>())
            .bind(rows.iter().map(|row| &row.values[1][..]).collect::<Vec<_>>());
        self.store.on_session_within(limit, async |session| writing.fetch_all(session).await).await
    }
}

impl Sealed {
    fn read(row: &PgRow) -> Result<Self, sqlx::Error> {
        Ok(Self { id: row.try_get("id")?, values: [row.try_get("one")?, row.try_get("two")?] })
    }
}

fn anew(keys: &KeyRing, table: SealedTable, row: Sealed) -> Anew {
    let Sealed { id, mut values } = row;
    let was = [0, 1].map(|at| Sha256::digest(&values[at]).into());
    let (mut differs, mut unsealed) = (false, Vec::new());
    for (at, field) in table.fields().into_iter().enumerate() {
        match reseal(keys, table, &id, at, &values[at]) {
            Ok(None) => {}
            Ok(Some(value)) => {
                values[at] = value;
                differs = true;
            }
            Err(why) => unsealed.push(Unsealed { table, id: id.clone(), field, why }),
        }
    }
    Anew { id, was, values, differs, unsealed }
}

fn reseal(
    keys: &KeyRing,
    table: SealedTable,
    id: &str,
    at: usize,
    sealed: &[u8],
) -> Result<Option<Vec<u8>>, ResealError> {
    match table {
        SealedTable::Configurations => {
            let organization = &OrganizationId::parse(id).map_err(|_| OpenError::Format)?;
            let field = [Field::Username, Field::Password][at];
            keys.reseal(Context::Credential { organization, field }, sealed)
        }
        SealedTable::Letters => {
            let letter = Uuid::parse_str(id).map_err(|_| OpenError::Format)?;
            let field = [LetterField::Properties, LetterField::Body][at];
            keys.reseal(Context::Letter { letter, field }, sealed)
        }
    }
}
