//! Key rotation: everything that is sealed, sealed anew under the first key while workers go on.
//! Guarantee: a run that ends anywhere is simply started again; what it has done is done, and nothing is done twice. A value
//! that does not open is left as it is, counted and named, and holds up nothing else.

use std::time::Duration;

use tokio::time::Instant;

use crate::shutdown::Shutdown;
use crate::store::retrying::{self, Stopped};
use crate::store::{
    KeyUsage, Resealed, Resealer, SealedRows, SealedTable, Stale, Store, StoreError, Unsealed,
};

/// Rows sealed anew in one statement.
const BATCH: usize = 100;
/// Their bytes together, unless one alone is larger.
const BATCH_BYTES: u64 = 8 << 20;
/// Values that are named; more are counted.
const NAMED_MAX: usize = 1000;

/// The parts that a rotation works with.
pub struct Rotation {
    /// Where.
    pub store: Store,
    /// Under which keys, and whether in earnest.
    pub resealer: Resealer,
    /// A drain ends a run after the batch in hand, a stop at once.
    pub shutdown: Shutdown,
    /// For so long the database may be away before a run ends.
    pub patience: Duration,
}

/// What became of the rows: those selected are the sum of the others.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Found under another key than the first, or damaged.
    pub selected: u64,
    /// Now under the first, or would be.
    pub resealed: u64,
    /// Changed, deleted or sealed anew by somebody else meanwhile.
    pub changed: u64,
    /// With a value that does not open.
    pub unopened: u64,
}

/// What a run has done.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tally {
    /// Of the organizations.
    pub configurations: Counts,
    /// In the archive.
    pub letters: Counts,
    /// The values that do not open, the first thousand of them.
    pub unsealed: Vec<Unsealed>,
    /// How many more there are.
    pub unnamed: u64,
}

/// Why a run has ended.
#[derive(Debug)]
pub enum Ended {
    /// Every row was looked at.
    Done,
    /// It was told to stop.
    Interrupted,
    /// The database was away for too long, or refused.
    Database(StoreError),
}

impl Tally {
    /// Rows that nothing more is done about.
    pub fn done(&self) -> u64 {
        self.configurations.selected + self.letters.selected
    }

    /// Rows with a value that does not open.
    pub fn unopened(&self) -> u64 {
        self.configurations.unopened + self.letters.unopened
    }

    fn add(&mut self, table: SealedTable, outcome: Resealed) {
        let counts = match table {
            SealedTable::Configurations => &mut self.configurations,
            SealedTable::Letters => &mut self.letters,
        };
        counts.selected += outcome.resealed + outcome.changed + outcome.unopened;
        counts.resealed += outcome.resealed;
        counts.changed += outcome.changed;
        counts.unopened += outcome.unopened;
        for unsealed in outcome.unsealed {
            if self.unsealed.len() < NAMED_MAX {
                self.unsealed.push(unsealed);
            } else {
                self.unnamed += 1;
            }
        }
    }
}

impl From<Stopped> for Ended {
    fn from(stopped: Stopped) -> Self {
        match stopped {
            Stopped::Asked => Self::Interrupted,
            Stopped::Failed(error) => Self::Database(error),
        }
    }
}

impl Rotation {
    /// Seals everything anew that is not under the first key. `on_progress` is told now and then how far it has come.
    pub async fn run(&self, on_progress: impl Fn(&Tally)) -> (Tally, Ended) {
        let mut tally = Tally::default();
        let ended = tokio::select! {
            biased;
            () = self.shutdown.stop_now() => Ended::Interrupted,
            ended = self.through(&mut tally, on_progress) => ended.map_or_else(Ended::from, |()| Ended::Done),
        };
        (tally, ended)
    }

    /// What is under which key now.
    ///
    /// # Errors
    /// When the database did not answer.
    pub async fn usage(&self) -> Result<KeyUsage, StoreError> {
        self.store.key_usage(self.resealer.keys()).await
    }

    async fn through(&self, tally: &mut Tally, on_progress: impl Fn(&Tally)) -> Result<(), Stopped> {
        for table in [SealedTable::Configurations, SealedTable::Letters] {
            let mut after: Option<String> = None;
            loop {
                self.go_on()?;
                let page = self.ask(async || self.resealer.stale(table, after.as_deref()).await).await?;
                for batch in batches(&page.stale) {
                    self.go_on()?;
                    let outcome = self.ask(async || self.resealer.reseal(table, batch).await).await?;
                    tally.add(table, outcome);
                    on_progress(tally);
                }
                if page.next.is_none() {
                    break;
                }
                after = page.next;
            }
        }
        Ok(())
    }

    fn go_on(&self) -> Result<(), Stopped> {
        if self.shutdown.is_draining() { Err(Stopped::Asked) } else { Ok(()) }
    }

    async fn ask<T>(&self, question: impl AsyncFn() -> Result<T, StoreError>) -> Result<T, Stopped> {
        retrying::until(Instant::now() + self.patience, self.shutdown.stop_taking(), question).await
    }
}

/// Bounded by count and by bytes.
fn batches(mut rows: &[Stale]) -> impl Iterator<Item = &[Stale]> {
    std::iter::from_fn(move || {
        let mut bytes = 0;
        let fitting = rows.iter().take(BATCH).take_while(|row| {
            bytes += row.bytes;
            bytes <= BATCH_BYTES
        });
        let count = fitting.count().max(1).min(rows.len());
        let (batch, rest) = rows.split_at(count);
        rows = rest;
        (!batch.is_empty()).then_some(batch)
    })
}

/// What no run can seal anew, for its key is missing or it is damaged, is still there; the rest was sealed meanwhile.
pub fn is_settled(behind: SealedRows, tally: &Tally) -> bool {
    behind.configurations + behind.letters <= tally.unopened()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(bytes: &[u64]) -> Vec<Stale> {
        bytes.iter().map(|bytes| Stale { id: bytes.to_string(), bytes: *bytes }).collect()
    }

    #[test]
    fn a_batch_is_bounded_by_count_and_bytes_but_takes_one_large_row() {
        let sizes = |rows: &[Stale]| batches(rows).map(<[Stale]>::len).collect::<Vec<_>>();
        assert_eq!(sizes(&rows(&[])), [0_usize; 0]);
        assert_eq!(sizes(&rows(&[1; 250])), [100, 100, 50]);
        assert_eq!(sizes(&rows(&[20 << 20, 1, 20 << 20, 20 << 20])), [1, 1, 1, 1]);
        assert_eq!(sizes(&rows(&[4 << 20, 4 << 20, 1])), [2, 1]);
    }
}
