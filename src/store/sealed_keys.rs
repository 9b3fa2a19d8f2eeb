//! What is sealed under which key: whether it opens under those at hand, which rows need which, and the change to another.
//! Guarantee: values are opened a few at a time and dropped at once; only counts, key ids and names of rows come out.

mod resealing;
mod usage;

use std::collections::BTreeSet;

use sqlx::Row;

pub use resealing::{Resealed, Resealer, SealedTable, Stale, StalePage, Unsealed};
pub use usage::{KeyUsage, SealedRows};

use super::{Store, StoreError};
use crate::model::organization::OrganizationId;
use crate::secrets::{Context, Field, KeyRing, OpenError};

/// Keys of parked letters beside those of a ring. Of damaged rows any number may seem to be there.
const OF_PARKED: &str = concat!(
    "SELECT DISTINCT key FROM (
    SELECT ",
    key_of!("body_sealed"),
    " AS key FROM dead_letters WHERE state = 'parked'
    UNION ALL
    SELECT ",
    key_of!("properties_sealed"),
    " FROM dead_letters WHERE state = 'parked'
) AS heads WHERE key <> ALL ($1) ORDER BY key LIMIT 100"
);

/// Configurations read at once.
const PAGE: i64 = 500;

/// The id of the key that a column's value is sealed under, NULL where its header is none: format, length of the id, id,
/// then at least nonce and tag (src/secrets/sealed.rs). Only the first bytes are read of what is stored out of line.
macro_rules! key_of {
    ($column:literal) => {
        concat!(
            "CASE WHEN get_byte(substr(",
            $column,
            ", 1, 2) || '\\x0000', 0) = 1
        AND octet_length(",
            $column,
            ") >= 30 + get_byte(substr(",
            $column,
            ", 1, 2) || '\\x0000', 1)
        AND encode(substr(",
            $column,
            ", 3, get_byte(substr(",
            $column,
            ", 1, 2) || '\\x0000', 1)), 'escape')
            ~ '^[A-Za-z0-9._-]{1,32}$'
    THEN encode(substr(",
            $column,
            ", 3, get_byte(substr(",
            $column,
            ", 1, 2) || '\\x0000', 1)), 'escape') END"
        )
    };
}

pub(in crate::store) use key_of;

/// What a look at every stored configuration found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SealedReport {
    /// Configurations whose credentials open.
    pub readable: u64,
    /// Configurations that were changed outside, or sealed under another key of the same id.
    pub damaged: u64,
    /// Configurations sealed under a key that is not at hand.
    pub keyless: u64,
    /// The ids of those keys.
    pub missing_keys: BTreeSet<String>,
}

impl Store {
    /// The ids of keys that parked letters need and that are not at hand.
    ///
    /// # Errors
    /// When the database did not answer.
    pub async fn keys_missing_for_parked(&self, keys: &KeyRing) -> Result<BTreeSet<String>, StoreError> {
        let question = sqlx::query_scalar(OF_PARKED).bind(keys.ids().collect::<Vec<_>>());
        let ids: Vec<String> = self.on_session(async |session| question.fetch_all(session).await).await?;
        Ok(ids.into_iter().collect())
    }

    /// Tries to open every stored configuration.
    ///
    /// # Errors
    /// When the database did not answer.
    pub async fn try_sealed(&self, keys: &KeyRing) -> Result<SealedReport, StoreError> {
        let mut report = SealedReport::default();
        let mut after = String::new();
        loop {
            let page = sqlx::query(
                "SELECT organization_id, username_sealed, password_sealed FROM smtp_configs \
                 WHERE organization_id > $1 ORDER BY organization_id LIMIT $2",
            )
            .bind(&after)
            .bind(PAGE);
            let rows = self.on_session(async |session| page.fetch_all(session).await).await?;
            let Some(last) = rows.last() else { return Ok(report) };
            after = last.try_get("organization_id")?;
            for row in &rows {
                report.count(opens(
                    keys,
                    row.try_get("organization_id")?,
                    row.try_get("username_sealed")?,
                    row.try_get("password_sealed")?,
                ));
            }
        }
    }
}

impl SealedReport {
    fn count(&mut self, outcome: Result<(), OpenError>) {
        match outcome {
            Ok(()) => self.readable += 1,
            Err(OpenError::UnknownKey { id }) => {
                self.keyless += 1;
                self.missing_keys.insert(id);
            }
            Err(OpenError::Tampered | OpenError::Format) => self.damaged += 1,
        }
    }
}

fn opens(keys: &KeyRing, organization: &str, username: &[u8], password: &[u8]) -> Result<(), OpenError> {
    let organization = &OrganizationId::parse(organization).map_err(|_| OpenError::Format)?;
    for (field, sealed) in [(Field::Username, username), (Field::Password, password)] {
        drop(keys.open(Context::Credential { organization, field }, sealed)?);
    }
    Ok(())
}
