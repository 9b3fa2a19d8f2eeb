//! The archive of dead letters: what came in, what is found again, what is forgotten.
//! Guarantee: a message that died is one row however often it is delivered, and its content is in the database sealed
//! only.

mod archive;
mod content;
mod parked;
mod recoveries;
mod replay;
mod retention;
mod search;
mod stats;
mod take;

use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use sqlx::Row;
use sqlx::postgres::PgRow;
use sqlx::types::Json;
use uuid::Uuid;

pub use archive::Archived;
pub use content::{Content, Unopened};
pub use parked::{Burial, ParkedShare, ParkedTaken, PartlySent};
pub use recoveries::Recovery;
pub use replay::{Examined, Page};
pub use retention::LettersForgotten;
pub use stats::{LetterAge, LetterCount};
pub use take::{ReplayCopy, Taken, Taking};

use super::Store;
use super::ledger::count;
use crate::model::failure::Reason;
use crate::model::job::{JobKey, Revision};
use crate::model::ledger::Turn;
use crate::model::letter::{Letter, LetterId, LetterState, Owner};
use crate::model::organization::OrganizationId;
use crate::secrets::KeyRing;

/// The archive with the keys that its content is sealed under. Cheap to clone. What needs no key is asked of the
/// [`Store`].
#[derive(Clone)]
pub struct DeadLetters {
    store: Store,
    keys: Arc<KeyRing>,
}

impl DeadLetters {
    /// The archive in this database, under these keys.
    pub fn new(store: Store, keys: Arc<KeyRing>) -> Self {
        Self { store, keys }
    }
}

/// Everything that [`read_letter`] reads, named one by one: the plan of a `*` breaks in a running worker when a newer
/// program adds a column.
macro_rules! letter_columns {
    () => {
        "letter, job_id, organization_id, kind, lane, routing_key, state, reason, detail, attempts, first_at, died_at, \
         archived_at, expires_at, group_name, sequence, turn, recipients, deaths, replays, replay_turn, parked_ms, \
         history, body_hash, bytes"
    };
}

use letter_columns;

/// A row of [`letter_columns`].
///
/// # Errors
/// `Decode` for a row that this program does not understand, written by a newer one or by hand: say a reason that it has no
/// name for. Entries of the history that it does not understand are left out.
fn read_letter(row: &PgRow) -> Result<Letter, sqlx::Error> {
    let unreadable = |what: &str| sqlx::Error::Decode(format!("a letter's {what} is none").into());
    let job_id: Option<Uuid> = row.try_get("job_id")?;
    let key = match (job_id, read_owner(row.try_get("organization_id")?)?) {
        (Some(id), Owner::Platform) => Some(JobKey { organization: None, id }),
        (Some(id), Owner::Organization(organization)) => {
            Some(JobKey { organization: Some(organization), id })
        }
        (None, _) | (_, Owner::Unknown) => None,
    };
    let state = LetterState::from_name(row.try_get("state")?).ok_or_else(|| unreadable("state"))?;
    let body_hash: &[u8] = row.try_get("body_hash")?;
    let group: Option<String> = row.try_get("group_name")?;
    let recipients: Option<Vec<i32>> = row.try_get("recipients")?;
    let Json(history): Json<Vec<Value>> = row.try_get("history")?;
    Ok(Letter {
        letter: LetterId(row.try_get("letter")?),
        job_id,
        key,
        kind: row.try_get("kind")?,
        lane: row.try_get("lane")?,
        routing_key: row.try_get("routing_key")?,
        state,
        reason: read_reason(row)?,
        detail: row.try_get("detail")?,
        attempts: count(row.try_get("attempts")?),
        first_at: row.try_get("first_at")?,
        died_at: row.try_get("died_at")?,
        archived_at: row.try_get("archived_at")?,
        expires_at: row.try_get("expires_at")?,
        revision: Option::zip(group, row.try_get("sequence")?)
            .map(|(group, sequence)| Revision { group, sequence }),
        turn: Turn(row.try_get("turn")?),
        recipients: recipients.map(|all| all.into_iter().filter_map(|at| u16::try_from(at).ok()).collect()),
        deaths: count(row.try_get("deaths")?),
        replays: count(row.try_get("replays")?),
        replay_turn: row.try_get::<Option<i32>, _>("replay_turn")?.map(Turn),
        parked_before: Duration::from_millis(row.try_get::<i64, _>("parked_ms")?.unsigned_abs()),
        history: history.into_iter().filter_map(|deed| serde_json::from_value(deed).ok()).collect(),
        body_hash: body_hash.try_into().map_err(|_| unreadable("hash"))?,
        bytes: count(row.try_get("bytes")?),
    })
}

fn read_reason(row: &PgRow) -> Result<Reason, sqlx::Error> {
    let name: &str = row.try_get("reason")?;
    Reason::from_name(name)
        .ok_or_else(|| sqlx::Error::Decode(format!("a letter's reason `{name}` is none").into()))
}

fn read_owner(organization: Option<&str>) -> Result<Owner, sqlx::Error> {
    match organization {
        None => Ok(Owner::Unknown),
        Some("") => Ok(Owner::Platform),
        Some(text) => OrganizationId::parse(text)
            .map(Owner::Organization)
            .map_err(|_| sqlx::Error::Decode("a letter's organization is none".into())),
    }
}
