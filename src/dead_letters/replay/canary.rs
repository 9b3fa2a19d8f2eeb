//! Some letters first: whether they fare better now.
//! Guarantee: a run goes on only when the ledger says of every canary that all of its recipients have accepted.

use std::time::Duration;

use tokio::time::Instant;
use uuid::Uuid;

use crate::model::failure::Reason;
use crate::model::job::JobKey;
use crate::model::ledger::{JobStatus, State, Turn};
use crate::model::letter::Letter;
use crate::store::ReplayCopy;

use super::{Ended, Replayer};

/// Between two looks at the ledger.
const LOOK: Duration = Duration::from_millis(500);

/// How many first, and for how long their outcomes are waited for.
#[derive(Debug, Clone, Copy)]
pub struct Canary {
    /// Letters.
    pub count: u64,
    /// In all.
    pub wait: Duration,
}

/// A canary that did not come through.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Loss {
    /// Its job.
    pub id: Uuid,
    /// Where it stands: dead, or without an outcome.
    pub state: State,
    /// Why.
    pub reason: Option<Reason>,
    /// Its time was up before it had an outcome.
    pub undecided: bool,
}

/// A canary on its way.
pub(super) struct Sent {
    key: JobKey,
    turn: Turn,
    pending: Option<Vec<u16>>,
}

impl Sent {
    pub(super) fn of(letter: &Letter, copy: &ReplayCopy) -> Option<Self> {
        Some(Self { key: letter.key.clone()?, turn: copy.turn, pending: copy.pending.clone() })
    }

    /// What the ledger's row says of it: nothing yet, all is well, or that it is lost.
    fn fate(&self, status: &JobStatus) -> Option<Result<(), Loss>> {
        let lost =
            |reason| Some(Err(Loss { id: self.key.id, state: status.state, reason, undecided: false }));
        let refused = status
            .refused
            .iter()
            .find(|refused| self.pending.as_ref().is_none_or(|pending| pending.contains(&refused.index)));
        match status.state {
            _ if status.turn < self.turn => None,
            State::Sent => refused.map_or(Some(Ok(())), |refused| lost(Some(refused.reason))),
            State::Dead | State::Cancelled | State::Parked => lost(status.reason),
            State::Claimed | State::Deferred | State::Unknown => None,
        }
    }
}

impl Replayer {
    /// Waits for the canaries' outcomes; those that are lost, or without an outcome when the time is up.
    pub(super) async fn outcomes(&self, canary: Canary, canaries: Vec<Sent>) -> Result<Vec<Loss>, Ended> {
        let deadline = Instant::now() + canary.wait;
        let (mut waiting, mut losses) = (canaries, Vec::new());
        loop {
            let mut undecided = Vec::new();
            let mut still = Vec::new();
            for sent in waiting {
                let status = self.ask(async || self.store.job_status(&sent.key).await).await?;
                match status.as_ref().and_then(|status| sent.fate(status)) {
                    Some(Ok(())) => {}
                    Some(Err(loss)) => losses.push(loss),
                    None => {
                        let (state, reason) = status.map_or((State::Deferred, None), |s| (s.state, s.reason));
                        undecided.push(Loss { id: sent.key.id, state, reason, undecided: true });
                        still.push(sent);
                    }
                }
            }
            if still.is_empty() {
                return Ok(losses);
            }
            if Instant::now() >= deadline {
                losses.extend(undecided);
                return Ok(losses);
            }
            waiting = still;
            tokio::select! {
                biased;
                () = self.shutdown.stop_taking() => return Err(Ended::Interrupted),
                () = tokio::time::sleep(LOOK) => {}
            }
        }
    }
}
