//! Which bindings the topology was last declared with, so that one taken out of the settings can be unbound.
//! Guarantee: what is read is one whole declaration, never a mixture of two.

use sqlx::{Acquire, PgConnection};

use super::{Store, StoreError};

/// One routing key pattern of one lane.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct LaneBinding {
    /// The lane's name.
    pub lane: String,
    /// The pattern, as a topic exchange takes it.
    pub binding: String,
}

impl Store {
    /// What the topology under this prefix was last declared with, sorted.
    ///
    /// # Errors
    /// When the database did not answer.
    pub async fn lane_bindings(&self, prefix: &str) -> Result<Vec<LaneBinding>, StoreError> {
        let rows: Vec<(String, String)> = self
            .on_session(async |session| {
                sqlx::query_as(
                    "SELECT lane, binding FROM lane_bindings WHERE prefix = $1 ORDER BY lane, binding",
                )
                .bind(prefix)
                .fetch_all(session)
                .await
            })
            .await?;
        Ok(rows.into_iter().map(|(lane, binding)| LaneBinding { lane, binding }).collect())
    }

    /// The prefixes under which a topology was declared for this database, sorted.
    ///
    /// # Errors
    /// When the database did not answer.
    pub async fn prefixes(&self) -> Result<Vec<String>, StoreError> {
        self.on_session(async |session| {
            sqlx::query_scalar("SELECT DISTINCT prefix FROM lane_bindings ORDER BY prefix")
                .fetch_all(session)
                .await
        })
        .await
    }

    /// Remembers bindings beside those remembered before: a worker declares and takes nothing away.
    ///
    /// # Errors
    /// When the database did not answer; then nothing has changed.
    pub async fn add_lane_bindings(&self, prefix: &str, bindings: &[LaneBinding]) -> Result<(), StoreError> {
        self.on_session(async |session| insert(session, prefix, bindings).await).await
    }

    /// Remembers what the topology under this prefix is declared with now, and nothing else.
    ///
    /// # Errors
    /// When the database did not answer; then nothing has changed.
    pub async fn replace_lane_bindings(
        &self,
        prefix: &str,
        bindings: &[LaneBinding],
    ) -> Result<(), StoreError> {
        self.on_session(async |session| {
            let mut transaction = session.begin().await?;
            // Two declarations at once would each delete what they saw and keep the other's rows.
            sqlx::query("LOCK TABLE lane_bindings IN EXCLUSIVE MODE").execute(&mut *transaction).await?;
            sqlx::query("DELETE FROM lane_bindings WHERE prefix = $1")
                .bind(prefix)
                .execute(&mut *transaction)
                .await?;
            insert(&mut transaction, prefix, bindings).await?;
            transaction.commit().await
        })
        .await
    }
}

async fn insert(
    session: &mut PgConnection,
    prefix: &str,
    bindings: &[LaneBinding],
) -> Result<(), sqlx::Error> {
    let lanes: Vec<&str> = bindings.iter().map(|binding| binding.lane.as_str()).collect();
    let patterns: Vec<&str> = bindings.iter().map(|binding| binding.binding.as_str()).collect();
    sqlx::query(
        "INSERT INTO lane_bindings (prefix, lane, binding) \
         SELECT $1, lane, binding FROM unnest($2::text[], $3::text[]) AS b (lane, binding) \
         ON CONFLICT DO NOTHING",
    )
    .bind(prefix)
    .bind(lanes)
    .bind(patterns)
    .execute(session)
    .await?;
    Ok(())
}
