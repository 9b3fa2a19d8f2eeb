//! Discard: dead letters given up by a person.
//! Guarantee: only what is dead is given up, a batch in one statement; nothing is deleted before its retention ends.

use std::time::Duration;

use tokio::time::Instant;

use crate::model::letter::{Letter, LetterFilter, LetterState};
use crate::shutdown::Shutdown;
use crate::store::{Store, StoreError};

use super::Groups;
use super::retrying::{self, Stopped};

/// Letters given up in one statement.
const BATCH: u32 = 500;

/// What became of the letters: those that were selected are the sum of the others.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Discarded {
    /// Drawn.
    pub selected: u64,
    /// Given up, or that would be.
    pub discarded: u64,
    /// Taken up by somebody else meanwhile.
    pub changed: u64,
    /// Of those given up: by last death and owner.
    pub groups: Groups,
}

/// Why it has ended before its end.
#[derive(Debug)]
pub enum Halt {
    /// It was told to stop.
    Interrupted,
    /// The database was away for too long, or refused.
    Database(StoreError),
}

/// What is to be given up.
#[derive(Debug, Clone)]
pub struct Waste {
    /// Which letters, of those that are dead.
    pub filter: LetterFilter,
    /// So many at most.
    pub limit: Option<u64>,
    /// Who; none only looks.
    pub actor: Option<String>,
}

/// Gives letters up, oldest first, until none is left.
pub async fn discard(
    store: &Store,
    shutdown: &Shutdown,
    patience: Duration,
    waste: &Waste,
) -> (Discarded, Result<(), Halt>) {
    let mut tally = Discarded::default();
    let ended = pages(store, shutdown, patience, waste, &mut tally).await;
    let ended = ended.map_err(|stopped| match stopped {
        Stopped::Asked => Halt::Interrupted,
        Stopped::Failed(error) => Halt::Database(error),
    });
    (tally, ended)
}

async fn pages(
    store: &Store,
    shutdown: &Shutdown,
    patience: Duration,
    waste: &Waste,
    tally: &mut Discarded,
) -> Result<(), Stopped> {
    let filter = LetterFilter { states: vec![LetterState::Dead], ..waste.filter.clone() };
    let mut after = None;
    loop {
        if shutdown.is_draining() {
            return Err(Stopped::Asked);
        }
        let wanted = waste.limit.map_or(u64::from(BATCH), |limit| limit - tally.selected);
        let wanted = u32::try_from(wanted).unwrap_or(BATCH).min(BATCH);
        if wanted == 0 {
            return Ok(());
        }
        let deadline = Instant::now() + patience;
        let draw = async || store.examine_letters(&filter, after, None, wanted).await;
        let page = retrying::until(deadline, shutdown.stop_taking(), draw).await?;
        let letters: Vec<Letter> = page.letters.into_iter().map(|examined| examined.letter).collect();
        let ids: Vec<_> = letters.iter().map(|letter| letter.letter).collect();
        let given_up = match &waste.actor {
            None => ids.iter().copied().collect(),
            Some(actor) => {
                let give_up = async || store.discard_letters(&ids, actor).await;
                retrying::until(deadline, shutdown.stop_taking(), give_up).await?
            }
        };
        tally.selected += letters.len() as u64;
        for letter in letters {
            if !given_up.contains(&letter.letter) {
                tally.changed += 1;
                continue;
            }
            tally.discarded += 1;
            *tally.groups.entry((letter.reason, letter.owner())).or_default() += 1;
        }
        match page.last {
            Some(last) => after = Some(last),
            None => return Ok(()),
        }
    }
}
