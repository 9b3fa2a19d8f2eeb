//! Claims and settles of jobs that the ledger is asked about directly.
//! Guarantee: two jobs of different numbers differ in their id alone.

use sendoff::model::job::JobKey;
use sendoff::model::ledger::{Claim, Claimed, Settle, Settlement, Turn};
use sendoff::model::organization::OrganizationId;
use uuid::Uuid;

/// A job of organization 42.
pub fn key(number: u128) -> JobKey {
    JobKey { organization: Some(OrganizationId::from_integer(42)), id: Uuid::from_u128(number) }
}

/// A copy of it that is to be claimed; it belongs to no booking.
pub fn copy(key: &JobKey, turn: i32) -> Claim {
    Claim {
        key: key.clone(),
        body_hash: [7; 32],
        turn: Turn(turn),
        revision: None,
        message_id: "<first@example.org>".into(),
        suspects: true,
    }
}

/// What one attempt of a granted claim came to.
pub fn settle(key: &JobKey, claimed: &Claimed, outcome: Settlement) -> Settle {
    Settle {
        key: key.clone(),
        owner: claimed.owner,
        turn: claimed.turn,
        outcome,
        attempts: claimed.attempts + 1,
        spared: claimed.spared,
        unknowns: claimed.unknowns,
        message_id: claimed.message_id.clone(),
        pending: None,
        refused: Vec::new(),
        partly_sent: false,
        reply: None,
        attempt: None,
    }
}
