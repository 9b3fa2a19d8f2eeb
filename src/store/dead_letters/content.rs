//! A letter's content, sealed on its way in and opened on its way out.
//! Guarantee: content opens only as the same column of the same letter, and no async thread waits for the cipher.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use sqlx::Row;
use uuid::Uuid;

use super::DeadLetters;
use crate::model::letter::{LetterId, NewLetter};
use crate::secrets::{Context, KeyRing, LetterField, OpenError};
use crate::store::StoreError;

const SEALED: &str =
    "SELECT letter, properties_sealed, body_sealed FROM dead_letters WHERE letter = ANY ($1)";

/// What a publisher has published.
#[derive(Clone, PartialEq, Eq)]
pub struct Content {
    /// The body, byte for byte.
    pub body: Vec<u8>,
    /// The properties that a republish carries on, as the JSON that was archived.
    pub properties: Vec<u8>,
}

/// Shows lengths alone: the rest is personal data.
impl fmt::Debug for Content {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Content({} + {} bytes)", self.body.len(), self.properties.len())
    }
}

/// Why a letter's content cannot be had.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unopened {
    /// Its key is not in this program's ring: its settings are at fault, not the letter.
    #[error("the letter is sealed under the key `{id}`, which is not in encryption.keys")]
    UnknownKey {
        /// The key's id.
        id: String,
    },
    /// Changed or moved by something else than this program, or sealed under another key of the same id.
    #[error("the letter's content is damaged: {0}")]
    Damaged(String),
}

impl From<OpenError> for Unopened {
    fn from(error: OpenError) -> Self {
        match error {
            OpenError::UnknownKey { id } => Self::UnknownKey { id },
            OpenError::Tampered | OpenError::Format => Self::Damaged(error.to_string()),
        }
    }
}

/// Content as it is stored.
pub(super) struct SealedContent {
    pub(super) body: Vec<u8>,
    pub(super) properties: Vec<u8>,
}

impl DeadLetters {
    /// A letter's content; `None` when there is no such letter. Content that does not open is an answer, not an error.
    ///
    /// # Errors
    /// When the database did not answer.
    pub async fn open(&self, id: LetterId) -> Result<Option<Result<Content, Unopened>>, StoreError> {
        Ok(self.open_all(&[id]).await?.remove(&id))
    }

    /// The same of several letters; no entry where there is no such letter. The caller bounds their bytes, of which twice as
    /// many are in memory.
    ///
    /// # Errors
    /// When the database did not answer.
    pub async fn open_all(
        &self,
        ids: &[LetterId],
    ) -> Result<HashMap<LetterId, Result<Content, Unopened>>, StoreError> {
        let question = sqlx::query(SEALED).bind(ids.iter().map(|id| id.0).collect::<Vec<_>>());
        let rows = self.store.on_session(async |session| question.fetch_all(session).await).await?;
        let mut sealed = Vec::with_capacity(rows.len());
        for row in &rows {
            let content = SealedContent {
                body: row.try_get("body_sealed")?,
                properties: row.try_get("properties_sealed")?,
            };
            sealed.push((row.try_get::<Uuid, _>("letter")?, content));
        }
        drop(rows);
        let keys = Arc::clone(&self.keys);
        let opening =
            move || sealed.into_iter().map(|(id, sealed)| (LetterId(id), open(&keys, id, &sealed))).collect();
        tokio::task::spawn_blocking(opening)
            .await
            .map_err(|_| StoreError::Internal("a letter could not be opened".into()))
    }

    /// Seals the content of these letters, in their order.
    pub(super) async fn seal(
        &self,
        letters: impl Iterator<Item = &NewLetter>,
    ) -> Result<Vec<SealedContent>, StoreError> {
        let keys = Arc::clone(&self.keys);
        let plain: Vec<(Uuid, Content)> = letters
            .map(|letter| {
                let content = Content { body: letter.body.clone(), properties: letter.properties.clone() };
                (letter.id().0, content)
            })
            .collect();
        let sealing = move || plain.into_iter().map(|(letter, plain)| seal(&keys, letter, &plain)).collect();
        tokio::task::spawn_blocking(sealing)
            .await
            .map_err(|_| StoreError::Internal("a letter could not be sealed".into()))
    }
}

fn seal(keys: &KeyRing, letter: Uuid, plain: &Content) -> SealedContent {
    let seal = |field, bytes: &[u8]| keys.seal_bytes(Context::Letter { letter, field }, bytes);
    SealedContent {
        body: seal(LetterField::Body, &plain.body),
        properties: seal(LetterField::Properties, &plain.properties),
    }
}

fn open(keys: &KeyRing, letter: Uuid, sealed: &SealedContent) -> Result<Content, Unopened> {
    let open = |field, bytes: &[u8]| keys.open_bytes(Context::Letter { letter, field }, bytes);
    Ok(Content {
        body: open(LetterField::Body, &sealed.body)?,
        properties: open(LetterField::Properties, &sealed.properties)?,
    })
}
