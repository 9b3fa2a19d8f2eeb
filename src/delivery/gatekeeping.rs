//! The last look before DATA: whether this claim's message may leave now.
//! Guarantee: nobody passes without a living incarnation that owns the claim; a mark that is due is in the ledger before.

use std::time::{Duration, Instant};

use crate::model::job::Job;
use crate::model::ledger::{Claimed, Gate, GateAnswer};
use crate::model::policy;

use super::attempt::{Gatekeeper, Shut};
use super::rates::Allowance;
use super::worker::Worker;

/// A claim so young is not asked once more whether its job was called back: asking costs each mail a statement, and most mails
/// are through by then. Whoever calls it back meanwhile is told that it is too late.
const YOUNG: Duration = Duration::from_millis(500);

/// The last look before DATA, for one claim.
pub(super) struct Gatekeeping<'a> {
    pub(super) worker: &'a Worker,
    pub(super) job: &'a Job,
    pub(super) claimed: &'a Claimed,
    /// When the attempt began.
    pub(super) since: Instant,
    /// Where the account is limited: what it may send.
    pub(super) allowance: Option<&'a Allowance>,
}

impl Gatekeeper for Gatekeeping<'_> {
    async fn pass(&self) -> Result<(), Shut> {
        let Self { worker, job, claimed, since, allowance } = self;
        // First, for it can take a moment.
        if let Some(allowance) = allowance
            && !allowance.pass().await
        {
            return Err(Shut::Halted);
        }
        if worker.incarnations.current() != Some(claimed.owner) {
            return Err(Shut::Halted);
        }
        if job.is_expired(worker.clock.now()) {
            return Err(Shut::Expired);
        }
        let commit = policy::marks_commit(job.on_unknown, claimed.unknowns);
        if !commit && job.group.is_none() && since.elapsed() < YOUNG {
            return Ok(());
        }
        let gate = Gate {
            key: job.key.clone(),
            owner: claimed.owner,
            turn: claimed.turn,
            commit,
            revision: job.group.clone(),
        };
        match worker.ledger.before_data(gate).await {
            // The answer may have taken longer than a token keeps.
            Ok(GateAnswer::Open) if allowance.is_some_and(Allowance::is_over) => Err(Shut::Halted),
            Ok(GateAnswer::Open) => Ok(()),
            Ok(GateAnswer::NotOwner) => Err(Shut::NotOwner),
            Ok(GateAnswer::Cancelled) => Err(Shut::Cancelled),
            Ok(GateAnswer::Superseded { by }) => Err(Shut::Superseded(by)),
            Err(error) => {
                worker.database.lost(&error);
                Err(Shut::Halted)
            }
        }
    }
}
