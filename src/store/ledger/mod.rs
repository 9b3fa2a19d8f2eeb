//! The ledger: who has which job, and what became of it.
//! Guarantee: of all claims on one turn of a job one is granted, and only its owner can settle it.

mod cancel;
mod claim;
mod gate;
mod grants;
mod retention;
mod settle;
mod status;

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

use time::OffsetDateTime;
use uuid::Uuid;

pub use retention::{Sweep, Sweeper};
pub(super) use settle::array_literal;

use self::claim::Claims;
use self::gate::{GateRequest, Gates};
use self::grants::Grants;
use self::settle::{SettleRequest, Settles};
use super::batch::Batcher;
use super::{Incarnations, Store, StoreError};
use crate::model::job::JobKey;
use crate::model::ledger::{Claim, ClaimAnswer, Gate, GateAnswer, Settle, SettleAnswer};

/// For every statement of the three kinds that may be under way at once.
const SESSIONS: u32 = 3 * super::batch::IN_FLIGHT as u32;

/// One worker's access to the ledger; clones share its batches.
#[derive(Clone)]
pub struct Ledger {
    incarnations: Incarnations,
    grants: Arc<Grants>,
    claims: Batcher<Claims>,
    gates: Batcher<Gates>,
    settles: Batcher<Settles>,
}

impl Ledger {
    /// Starts the tasks that collect batches; must be called inside a tokio runtime. `on_batch` is told the size of every
    /// batch.
    pub fn new(
        store: Store,
        incarnations: Incarnations,
        on_batch: impl Fn(usize) + Send + Sync + 'static,
    ) -> Self {
        let observer: super::batch::Observer = Arc::new(on_batch);
        let store = store.planned_once(SESSIONS);
        let grants = Arc::new(Grants::default());
        let settles = Batcher::start(
            Settles { store: store.clone(), grants: Arc::clone(&grants) },
            Arc::clone(&observer),
        );
        let gates = Batcher::start(
            Gates { store: store.clone(), grants: Arc::clone(&grants) },
            Arc::clone(&observer),
        );
        let claims = Claims {
            store,
            incarnations: incarnations.clone(),
            grants: Arc::clone(&grants),
            settles: settles.clone(),
        };
        let claims = Batcher::start(claims, observer);
        Self { incarnations, grants, claims, gates, settles }
    }

    /// Asks to work on one copy of a job. Every granted claim is to be settled, `Released` where nothing was tried: until
    /// then the job is held, by this worker's other tasks too. When the caller goes away before the answer, the claim is
    /// given back by itself; a claim whose answer was lost on its way from the database is granted again to this worker.
    ///
    /// # Errors
    /// `Unavailable` also while this worker has no incarnation; nothing is to be sent then.
    pub async fn claim(&self, claim: Claim) -> Result<ClaimAnswer, StoreError> {
        self.claims.ask(claim).await
    }

    /// The last look before DATA: whether the claim is still the worker's, the job not called back, and the booking's revision
    /// still the newest.
    ///
    /// # Errors
    /// When the database did not answer; the mark may be written all the same.
    pub async fn before_data(&self, gate: Gate) -> Result<GateAnswer, StoreError> {
        let token = self.grants.token(&gate.key);
        let owner = gate.owner;
        let alive = || self.incarnations.current() == Some(owner);
        if !alive() {
            return Ok(GateAnswer::NotOwner);
        }
        let answer = self.gates.ask(GateRequest { gate, token }).await?;
        Ok(if alive() { answer } else { GateAnswer::NotOwner })
    }

    /// Records what became of a claimed job. It may be repeated until it is answered: one that took effect the first time
    /// is `Recorded` the second time too. It takes effect even when its caller goes away.
    ///
    /// # Errors
    /// When the database did not answer.
    pub async fn settle(&self, settle: Settle) -> Result<SettleAnswer, StoreError> {
        let token = self.grants.token(&settle.key);
        self.settles.ask(SettleRequest { settle, token }).await
    }
}

/// The order in which everybody locks rows of `jobs`.
type RowKey = (Uuid, String);

fn row_key(key: &JobKey) -> RowKey {
    (key.id, organization_text(key).to_owned())
}

/// How the table spells a job's organization: the platform is the empty text, which no organization is.
pub(super) fn organization_text(key: &JobKey) -> &str {
    key.organization.as_ref().map_or("", |organization| organization.as_str())
}

/// PostgreSQL stores no NUL; one would fail the whole batch.
pub(super) fn without_nul(text: &str) -> Cow<'_, str> {
    if text.contains('\0') { text.replace('\0', "\u{fffd}").into() } else { text.into() }
}

pub(super) fn count(number: i32) -> u32 {
    u32::try_from(number).unwrap_or(0)
}

pub(super) fn stored_count(number: u32) -> i32 {
    i32::try_from(number).unwrap_or(i32::MAX)
}

/// From one time to a later one; nothing when it is not later.
fn until(from: OffsetDateTime, to: OffsetDateTime) -> Duration {
    Duration::try_from(to - from).unwrap_or_default()
}
