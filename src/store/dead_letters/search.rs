//! Letters found again: by filter, newest first, page by page.
//! Guarantee: each condition has an index in the order of the listing, and a page begins where the one before it ended, whatever
//! was archived meanwhile.

use sqlx::postgres::{PgArguments, PgRow};
use sqlx::query::Query;
use sqlx::{Postgres, Row};
use time::OffsetDateTime;
use uuid::Uuid;

use super::{letter_columns, read_letter};
use crate::model::letter::{Letter, LetterFilter, LetterId};
use crate::store::{Store, StoreError};

/// Letters of one id: one per organization and body that was ever published under it.
const OF_ONE_ID: u32 = 100;

/// The conditions of a filter, `$1` to `$11` ([`bind_filter`]). Plans are made for the values at hand, so a condition that is
/// not set is folded away. A single value has a parameter of its own: only an equality keeps an index's order.
macro_rules! filtered {
    () => {
        "($1::text IS NULL OR organization_id = $1) AND ($2::text[] IS NULL OR organization_id = ANY ($2))
     AND ($3::text IS NULL OR reason = $3) AND ($4::text[] IS NULL OR reason = ANY ($4))
     AND ($5::text IS NULL OR kind = $5) AND ($6::text[] IS NULL OR kind = ANY ($6))
     AND ($7::text IS NULL OR state = $7) AND ($8::text[] IS NULL OR state = ANY ($8))
     AND ($9::timestamptz IS NULL OR died_at >= $9) AND ($10::timestamptz IS NULL OR died_at < $10)
     AND ($11::uuid[] IS NULL OR job_id = ANY ($11) OR letter = ANY ($11))"
    };
}

pub(super) use filtered;

/// `$12` and `$13` are the last letter of the page before.
macro_rules! listing {
    () => {
        concat!(
            "SELECT ",
            letter_columns!(),
            " FROM dead_letters WHERE ",
            filtered!(),
            " AND ($12::timestamptz IS NULL OR (died_at, letter) < ($12, $13::uuid))
             ORDER BY died_at DESC, letter DESC LIMIT $14"
        )
    };
}

const LIST: &str = listing!();
const EXPLAIN: &str = concat!("EXPLAIN (FORMAT JSON) ", listing!());

impl Store {
    /// The letters that a filter means, the one that died last first, at most `limit`; `after` is `died_at` and name of the
    /// last letter of the page before. Fewer than `limit` are the last ones.
    ///
    /// A row that this program does not understand (a newer one's reason, say) is left out and logged.
    ///
    /// # Errors
    /// When the database did not answer.
    pub async fn letters(
        &self,
        filter: &LetterFilter,
        after: Option<(OffsetDateTime, LetterId)>,
        limit: u32,
    ) -> Result<Vec<Letter>, StoreError> {
        let (mut after, mut letters) = (after, Vec::new());
        loop {
            let wanted = usize::try_from(limit).unwrap_or(usize::MAX) - letters.len();
            let question = page(sqlx::query(LIST), filter, after, wanted);
            let rows = self.on_session(async |session| question.fetch_all(session).await).await?;
            for row in &rows {
                letters.extend(understood(row)?);
            }
            match rows.last() {
                // What was left out is made up for, or the page would seem to be the last one.
                Some(last) if rows.len() == wanted && letters.len() < limit as usize => {
                    after = Some((last.try_get("died_at")?, LetterId(last.try_get("letter")?)));
                }
                _ => return Ok(letters),
            }
        }
    }

    /// The letters of a job, or the letter of that name: newest first, at most 100, of every organization or of one (as the
    /// table spells it).
    ///
    /// # Errors
    /// When the database did not answer.
    pub async fn letters_of(&self, id: Uuid, organization: Option<&str>) -> Result<Vec<Letter>, StoreError> {
        let organizations = organization.map(str::to_owned).into_iter().collect();
        self.letters(
            &LetterFilter { ids: vec![id], organizations, ..LetterFilter::default() },
            None,
            OF_ONE_ID,
        )
        .await
    }

    /// How the database would answer [`Store::letters`]: its EXPLAIN, as JSON.
    ///
    /// # Errors
    /// When the database did not answer.
    pub async fn explain_letters(
        &self,
        filter: &LetterFilter,
        after: Option<(OffsetDateTime, LetterId)>,
        limit: u32,
    ) -> Result<serde_json::Value, StoreError> {
        let question =
            page(sqlx::query(EXPLAIN), filter, after, usize::try_from(limit).unwrap_or(usize::MAX));
        let row = self.on_session(async |session| question.fetch_one(session).await).await?;
        Ok(row.try_get(0)?)
    }
}

pub(super) type Question<'q> = Query<'q, Postgres, PgArguments>;

fn page<'q>(
    question: Question<'q>,
    filter: &LetterFilter,
    after: Option<(OffsetDateTime, LetterId)>,
    limit: usize,
) -> Question<'q> {
    bind_filter(question, filter)
        .bind(after.map(|(died_at, _)| died_at))
        .bind(after.map(|(_, LetterId(letter))| letter))
        .bind(i64::try_from(limit).unwrap_or(i64::MAX))
}

/// Binds the parameters of [`filtered`].
pub(super) fn bind_filter<'q>(question: Question<'q>, filter: &LetterFilter) -> Question<'q> {
    let names = |names: Vec<&str>| -> (Option<String>, Option<Vec<String>>) {
        let mut names: Vec<String> = names.into_iter().map(str::to_owned).collect();
        match names.len() {
            0 => (None, None),
            1 => (names.pop(), None),
            _ => (None, Some(names)),
        }
    };
    let (organization, organizations) = names(filter.organizations.iter().map(String::as_str).collect());
    let (reason, reasons) = names(filter.reasons.iter().map(|reason| reason.as_str()).collect());
    let (kind, kinds) = names(filter.kinds.iter().map(String::as_str).collect());
    let (state, states) = names(filter.states.iter().map(|state| state.as_str()).collect());
    question
        .bind(organization)
        .bind(organizations)
        .bind(reason)
        .bind(reasons)
        .bind(kind)
        .bind(kinds)
        .bind(state)
        .bind(states)
        .bind(filter.since)
        .bind(filter.until)
        .bind((!filter.ids.is_empty()).then(|| filter.ids.clone()))
}

/// A row's letter; none, and a line in the log, where this program does not understand it.
pub(super) fn understood(row: &PgRow) -> Result<Option<Letter>, sqlx::Error> {
    match read_letter(row) {
        Ok(letter) => Ok(Some(letter)),
        Err(sqlx::Error::Decode(error)) => {
            let letter: Uuid = row.try_get("letter")?;
            tracing::warn!(%letter, %error, "a dead letter is left out, for this program does not understand it");
            Ok(None)
        }
        Err(error) => Err(error),
    }
}
