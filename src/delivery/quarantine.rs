//! Room to work, so that a job that kills workers is found out and takes no neighbour with it.
//! Guarantee: of the jobs that were in a dead worker's hands a few are claimed at a time; one that was so twice is worked on
//! while nothing else in this process is. So each death adds a second mark to these few at most, and a third to none but a
//! job that was alone.

use std::time::Duration;

use tokio::sync::{Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard, Semaphore, SemaphorePermit};

use crate::model::policy::CRASH_LIMIT;

/// Suspects at work at once, beside jobs that are none. The more there are, the more of them may have to be alone later.
const TOGETHER: usize = 8;
/// Suspects that wait for their turn in memory; more of them would hold the places of others in the lane's prefetch.
const LINE: usize = 24;
/// Longest wait for a turn, and for the end of everybody else's work.
const WAIT: Duration = Duration::from_secs(60);
/// Longest attempt of a job for which others wait.
const ATTEMPT_LIMIT: Duration = Duration::from_secs(120);

/// Who may work at the same time.
pub struct Quarantine {
    few: Semaphore,
    alone: Mutex<()>,
    line: Semaphore,
    work: RwLock<()>,
}

/// The right to claim a suspect.
pub enum Turn<'a> {
    /// It is claimed only to be given up.
    Condemned,
    /// One of the few suspects at work, among jobs that are none.
    Beside(SemaphorePermit<'a>),
    /// The one job at work.
    Alone(MutexGuard<'a, ()>),
}

/// Held while a job is read, and from its claim until it is settled.
pub enum Room<'a> {
    /// Beside others.
    Shared(RwLockReadGuard<'a, ()>),
    /// Alone.
    Alone(RwLockWriteGuard<'a, ()>),
}

impl Default for Quarantine {
    fn default() -> Self {
        Self {
            few: Semaphore::new(TOGETHER),
            alone: Mutex::default(),
            line: Semaphore::new(LINE),
            work: RwLock::default(),
        }
    }
}

impl Quarantine {
    /// A turn for a job that died with so many workers. `None` when too many wait for theirs.
    pub async fn turn(&self, crashes: u32) -> Option<Turn<'_>> {
        if crashes >= CRASH_LIMIT {
            return Some(Turn::Condemned);
        }
        let is_last_chance = crashes + 1 >= CRASH_LIMIT;
        // What needs not wait needs no place, even where those who must be alone fill the line.
        let now = if is_last_chance {
            self.alone.try_lock().ok().map(Turn::Alone)
        } else {
            self.few.try_acquire().ok().map(Turn::Beside)
        };
        if now.is_some() {
            return now;
        }
        let _place: SemaphorePermit<'_> = self.line.try_acquire().ok()?;
        let waiting = async {
            if is_last_chance {
                Some(Turn::Alone(self.alone.lock().await))
            } else {
                self.few.acquire().await.ok().map(Turn::Beside)
            }
        };
        tokio::time::timeout(WAIT, waiting).await.ok()?
    }

    /// How long an attempt may take: a slow server is not to hold up every suspect.
    pub fn bound(turn: Option<&Turn<'_>>, attempt_timeout: Duration) -> Duration {
        if turn.is_some() { attempt_timeout.min(ATTEMPT_LIMIT) } else { attempt_timeout }
    }

    /// Room beside others.
    pub async fn shared(&self) -> Room<'_> {
        Room::Shared(self.work.read().await)
    }

    /// Room for a job, with its turn if it is a suspect. `None` when the others do not come to an end.
    pub async fn room(&self, turn: Option<&Turn<'_>>) -> Option<Room<'_>> {
        match turn {
            // Whoever comes meanwhile waits behind it, so that those at work become fewer.
            Some(Turn::Alone(_)) => tokio::time::timeout(WAIT, self.work.write()).await.ok().map(Room::Alone),
            Some(Turn::Condemned | Turn::Beside(_)) | None => Some(self.shared().await),
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    /// All the turns that there are for suspects beside others.
    async fn few(quarantine: &Quarantine) -> Vec<Turn<'_>> {
        let mut turns = Vec::new();
        for _ in 0..TOGETHER {
            turns.push(quarantine.turn(1).await.expect("it is free"));
        }
        turns
    }

    #[tokio::test]
    async fn a_few_suspects_are_at_work_beside_jobs_that_are_none() {
        let quarantine = Quarantine::default();
        let others = quarantine.shared().await;
        let mut turns = few(&quarantine).await;
        assert!(turns.iter().all(|turn| quarantine.room(Some(turn)).now_or_never().flatten().is_some()));
        assert!(quarantine.turn(1).now_or_never().is_none(), "the turns are taken");
        assert!(quarantine.turn(3).now_or_never().is_some(), "to be given up needs no turn");
        turns.pop();
        assert!(quarantine.turn(1).now_or_never().flatten().is_some());
        drop(others);
    }

    #[tokio::test]
    async fn the_last_chance_waits_for_everybody_and_everybody_for_it() {
        let quarantine = Quarantine::default();
        let suspect = quarantine.turn(1).await.expect("it is free");
        let others = quarantine.room(Some(&suspect)).await.expect("there is room");
        let turn = quarantine.turn(2).await.expect("nobody has it");
        assert!(quarantine.room(Some(&turn)).now_or_never().is_none(), "somebody is at work");
        assert!(quarantine.turn(2).now_or_never().is_none(), "one at a time");
        drop(others);
        let alone = quarantine.room(Some(&turn)).now_or_never().flatten().expect("nobody is at work");
        assert!(quarantine.room(Some(&suspect)).now_or_never().is_none(), "one is alone at work");
        assert!(quarantine.shared().now_or_never().is_none(), "one is alone at work");
        let usual = Duration::from_secs(1200);
        assert_eq!(Quarantine::bound(Some(&turn), usual), ATTEMPT_LIMIT);
        assert_eq!(Quarantine::bound(None, usual), usual);
        drop(alone);
        assert!(quarantine.shared().now_or_never().is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn a_line_that_is_full_or_slow_sends_suspects_away() {
        let quarantine = Quarantine::default();
        let _turns = few(&quarantine).await;
        let waiting = futures_util::future::join_all((0..LINE).map(|_| quarantine.turn(1)));
        let mut waiting = Box::pin(waiting);
        assert!((&mut waiting).now_or_never().is_none());
        assert!(quarantine.turn(1).await.is_none(), "the line is full");
        assert!(quarantine.turn(2).await.is_some(), "what needs not wait needs no line");
        assert!(waiting.await.iter().all(Option::is_none), "nobody waits for ever");
    }
}
