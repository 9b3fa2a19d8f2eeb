//! Replay: dead letters recorded anew in the ledger, published to their lanes, and marked, at a pace.
//! Guarantee: a letter's copy is published only after its replay is recorded, and marked only after the copy is confirmed.
//! A run that ends anywhere in between is taken up by the next one with the same turn, of which the ledger lets one copy
//! through. Bodies in memory are bounded, and every letter that was drawn is accounted for.

mod canary;
pub(super) mod judge;
pub(super) mod publish;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use time::OffsetDateTime;
use tokio::time::Instant;
use uuid::Uuid;

pub use canary::{Canary, Loss};

use self::judge::{Ready, Ways};
use self::publish::Pacer;
use crate::broker::Publisher;
use crate::broker::wire::WireLimits;
use crate::clock::Clock;
use crate::model::lanes::Lane;
use crate::model::letter::{Letter, LetterFilter, LetterId, LetterState, Place};
use crate::model::replay::{self, ReplayRules, Skip};
use crate::shutdown::Shutdown;
use crate::store::{DeadLetters, Examined, Store, StoreError, Taking};

use super::Groups;
use super::retrying::{self, Stopped};

/// Letters drawn at once, without their content.
const PAGE: u32 = 500;
/// Letters recorded in one transaction; at most as many as are published in a second, so that a stop is soon.
const BATCH: u32 = 250;
/// Their bodies together, unless one alone is larger.
const BATCH_BYTES: u64 = 8 << 20;
/// What dies after a run has begun is not its business; but the clock that wrote down a death is another one.
const CLOCKS_DIFFER: time::Duration = time::Duration::MINUTE;

/// The parts that a replay works with.
pub struct Replayer {
    /// Ledger and archive.
    pub store: Store,
    /// The letters' content.
    pub archive: DeadLetters,
    /// The lanes of the settings.
    pub lanes: Vec<Lane>,
    /// Bounds of a job.
    pub limits: WireLimits,
    /// Time.
    pub clock: Clock,
    /// A drain ends a run after what it has in hand, a stop at once.
    pub shutdown: Shutdown,
    /// For so long the broker or the database may be away before a run ends.
    pub patience: Duration,
}

/// What is to be replayed.
#[derive(Debug, Clone)]
pub struct Order {
    /// Which letters. Its states name `replaying`: what was recorded and not confirmed is taken up whoever has begun it.
    pub filter: LetterFilter,
    /// So many at most.
    pub limit: Option<u64>,
    /// What the person allows.
    pub rules: ReplayRules,
    /// The lane of letters that no lane takes; must be one of the settings.
    pub lane: Option<String>,
    /// Who, for the letters' histories.
    pub actor: String,
}

/// How fast, and how carefully.
#[derive(Debug, Clone, Copy)]
pub struct Manner {
    /// Letters a second.
    pub rate: u32,
    /// Some first.
    pub canary: Option<Canary>,
}

/// What became of the letters: those that were selected are the sum of all others.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tally {
    /// Drawn, or left to be drawn when the run was ended.
    pub selected: u64,
    /// Published and confirmed.
    pub replayed: u64,
    /// Left out.
    pub skipped: BTreeMap<Skip, u64>,
    /// Recorded, or perhaps recorded, and not confirmed: the next run takes them up.
    pub unconfirmed: u64,
    /// Not come to, for the run was ended.
    pub not_reached: u64,
    /// The ids of those that died again after as many replays as are allowed.
    pub too_often: Vec<Uuid>,
    /// Why letters could not be opened, each reason once: there are as many as keys that are missing, and one.
    pub unopened: BTreeSet<String>,
    /// Of those replayed, or that would be: by last death and owner.
    pub groups: Groups,
}

impl Tally {
    /// Whether every selected letter is in one of the other counts.
    pub fn adds_up(&self) -> bool {
        let skipped: u64 = self.skipped.values().sum();
        self.selected == self.replayed + skipped + self.unconfirmed + self.not_reached
    }

    /// Letters that nothing more is done about.
    pub fn done(&self) -> u64 {
        self.replayed + self.skipped.values().sum::<u64>()
    }

    fn skip(&mut self, letter: &Letter, skip: Skip) {
        *self.skipped.entry(skip).or_default() += 1;
        if skip == Skip::TooManyReplays {
            self.too_often.push(letter.id());
        }
    }

    fn replay(&mut self, letter: &Letter) {
        self.replayed += 1;
        *self.groups.entry((letter.reason, letter.owner())).or_default() += 1;
    }
}

/// Why a run has ended.
#[derive(Debug)]
pub enum Ended {
    /// Nothing is left.
    Done,
    /// It was told to stop.
    Interrupted,
    /// Canaries died again, or had no outcome in time.
    Canary(Vec<Loss>),
    /// The database was away for too long, or refused.
    Database(StoreError),
    /// The broker was.
    Broker(crate::broker::PublishError),
}

impl From<Stopped> for Ended {
    fn from(stopped: Stopped) -> Self {
        match stopped {
            Stopped::Asked => Self::Interrupted,
            Stopped::Failed(error) => Self::Database(error),
        }
    }
}

impl Replayer {
    /// What a run would do now, as far as that can be known before: reads, and changes nothing.
    pub async fn preview(&self, order: &Order, on_progress: impl Fn(&Tally)) -> (Tally, Ended) {
        let mut run = Run::new(self, order, None);
        let ended = run.through(on_progress).await;
        (run.tally, ended)
    }

    /// Replays. `on_progress` is told now and then how far it has come.
    pub async fn run(
        &self,
        order: &Order,
        manner: Manner,
        publisher: &Publisher,
        on_progress: impl Fn(&Tally),
    ) -> (Tally, Ended) {
        let publishing = Publishing {
            publisher: publisher.clone(),
            pacer: Pacer::new(manner.rate),
            batch: u64::from(manner.rate.clamp(1, BATCH)),
            canary: manner.canary,
            canaries: Vec::new(),
        };
        let mut run = Run::new(self, order, Some(publishing));
        let ended = run.through(on_progress).await;
        (run.tally, ended)
    }
}

/// What a run that is no preview has beside.
struct Publishing {
    publisher: Publisher,
    pacer: Pacer,
    batch: u64,
    canary: Option<Canary>,
    canaries: Vec<canary::Sent>,
}

struct Run<'a> {
    replayer: &'a Replayer,
    order: &'a Order,
    publishing: Option<Publishing>,
    tally: Tally,
}

impl<'a> Run<'a> {
    fn new(replayer: &'a Replayer, order: &'a Order, publishing: Option<Publishing>) -> Self {
        Self { replayer, order, publishing, tally: Tally::default() }
    }

    async fn through(&mut self, on_progress: impl Fn(&Tally)) -> Ended {
        match self.pages(on_progress).await {
            Ok(()) => Ended::Done,
            Err(ended) => ended,
        }
    }

    async fn pages(&mut self, on_progress: impl Fn(&Tally)) -> Result<(), Ended> {
        let store = &self.replayer.store;
        let began = self.replayer.ask(async || store.database_time().await).await?;
        let bound = began + CLOCKS_DIFFER;
        let mut filter = self.order.filter.clone();
        filter.until = Some(filter.until.map_or(bound, |until| until.min(bound)));
        let mut after = None;
        loop {
            let wanted = self.order.limit.map_or(u64::from(PAGE), |limit| limit - self.tally.selected);
            let wanted = u32::try_from(wanted).unwrap_or(PAGE).min(PAGE);
            if wanted == 0 {
                break;
            }
            let draw = async || store.examine_letters(&filter, after, Some(began), wanted).await;
            let page = self.replayer.ask(draw).await?;
            let letters = page.letters;
            self.tally.selected += letters.len() as u64;
            let end = letters.last().map(|examined| examined.letter.place());
            if let Err(ended) = self.page(letters, &on_progress).await {
                self.count_rest(&filter, end.or(after), began).await;
                return Err(ended);
            }
            match page.last {
                Some(last) => after = Some(last),
                None => break,
            }
        }
        self.await_canaries().await
    }

    async fn page(&mut self, letters: Vec<Examined>, on_progress: &impl Fn(&Tally)) -> Result<(), Ended> {
        let mut letters = letters.into_iter().peekable();
        while letters.peek().is_some() {
            let mut step = if self.replayer.shutdown.is_draining() {
                Err(Ended::Interrupted)
            } else {
                let batch = self.next_batch(&mut letters);
                self.batch(batch).await
            };
            on_progress(&self.tally);
            let is_flown = |publishing: &Publishing| {
                publishing.canary.is_some_and(|canary| canary.count <= publishing.canaries.len() as u64)
            };
            if step.is_ok() && self.publishing.as_ref().is_some_and(is_flown) {
                step = self.await_canaries().await;
            }
            if let Err(ended) = step {
                self.tally.not_reached += letters.count() as u64;
                return Err(ended);
            }
        }
        Ok(())
    }

    /// As many letters as one transaction may hold.
    fn next_batch(&self, letters: &mut std::iter::Peekable<std::vec::IntoIter<Examined>>) -> Vec<Examined> {
        let most = match &self.publishing {
            None => u64::from(BATCH),
            Some(publishing) => {
                let canaries =
                    publishing.canary.map(|canary| canary.count - publishing.canaries.len() as u64);
                canaries.unwrap_or(u64::MAX).min(publishing.batch)
            }
        };
        let (mut batch, mut bytes) = (Vec::new(), 0);
        while let Some(next) = letters.next_if(|next| {
            let fits = bytes + u64::from(next.letter.bytes) <= BATCH_BYTES;
            batch.is_empty() || fits && (batch.len() as u64) < most
        }) {
            bytes += u64::from(next.letter.bytes);
            batch.push(next);
        }
        batch
    }

    /// Brings each letter of a batch to its count, whatever happens.
    async fn batch(&mut self, batch: Vec<Examined>) -> Result<(), Ended> {
        let mut decided: BTreeMap<LetterId, (Letter, Option<Skip>)> = BTreeMap::new();
        for examined in batch {
            match self.weigh(&examined) {
                Ok(skip) => drop(decided.insert(examined.letter.letter, (examined.letter, skip))),
                Err(skip) => self.tally.skip(&examined.letter, skip),
            }
        }
        let ids: Vec<LetterId> = decided.keys().copied().collect();
        let archive = &self.replayer.archive;
        let opened = self.replayer.ask(async || archive.open_all(&ids).await).await;
        let mut opened = opened.inspect_err(|_| self.tally.not_reached += ids.len() as u64)?;
        let ways = Ways { lanes: &self.replayer.lanes, limits: &self.replayer.limits };
        let mut ready = BTreeMap::new();
        for (id, (letter, skip)) in decided {
            let content = opened.remove(&id);
            if let Some(Err(error)) = &content {
                self.tally.unopened.insert(error.to_string());
            }
            match judge::ready(&letter, content, &ways, self.order.lane.as_deref()) {
                Ok(copy) => drop(ready.insert(id, (letter, copy))),
                Err(fault) => self.tally.skip(&letter, skip.unwrap_or(fault)),
            }
        }
        match &mut self.publishing {
            None => {
                ready.values().for_each(|(letter, _)| self.tally.replay(letter));
                Ok(())
            }
            Some(publishing) => publishing.replay(self.replayer, self.order, &mut self.tally, ready).await,
        }
    }

    /// Whether a letter is to be taken. One that a run has left in the middle is looked at again under its lock, where its
    /// row is put right, whatever seems to be true of it now.
    fn weigh(&self, examined: &Examined) -> Result<Option<Skip>, Skip> {
        let Examined { letter, ledger, booking } = examined;
        let now = self.replayer.clock.now();
        let decided = replay::decide(letter, ledger.as_ref(), *booking, &self.order.rules, now);
        match decided {
            Ok(_) => Ok(None),
            Err(skip) if letter.state == LetterState::Replaying && self.publishing.is_some() => {
                Ok(Some(skip))
            }
            Err(skip) => Err(skip),
        }
    }

    async fn await_canaries(&mut self) -> Result<(), Ended> {
        let Some(publishing) = &mut self.publishing else { return Ok(()) };
        let Some(canary) = publishing.canary.take() else { return Ok(()) };
        let canaries = std::mem::take(&mut publishing.canaries);
        match self.replayer.outcomes(canary, canaries).await? {
            losses if losses.is_empty() => Ok(()),
            losses => Err(Ended::Canary(losses)),
        }
    }

    /// What is behind the last letter drawn, as far as the database can say.
    async fn count_rest(&mut self, filter: &LetterFilter, after: Option<Place>, began: OffsetDateTime) {
        let rest = self.replayer.store.count_letters(filter, after, Some(began)).await;
        let Ok(rest) = rest else { return };
        let room = self.order.limit.map_or(u64::MAX, |limit| limit - self.tally.selected);
        self.tally.selected += rest.min(room);
        self.tally.not_reached += rest.min(room);
    }
}

impl Publishing {
    /// Records, publishes, marks.
    async fn replay(
        &mut self,
        replayer: &Replayer,
        order: &Order,
        tally: &mut Tally,
        mut ready: BTreeMap<LetterId, (Letter, Ready)>,
    ) -> Result<(), Ended> {
        if ready.is_empty() {
            return Ok(());
        }
        let letters: Vec<LetterId> = ready.keys().copied().collect();
        let taking = Taking { rules: order.rules, states: &order.filter.states, actor: &order.actor };
        let taken = replayer.ask(async || replayer.store.take_letters(&letters, &taking).await).await;
        let taken = taken.inspect_err(|_| tally.unconfirmed += letters.len() as u64)?;
        let mut outgoing = Vec::new();
        for (id, taken) in taken {
            let Some((letter, copy)) = ready.remove(&id) else { continue };
            match taken {
                Ok(recorded) => outgoing.push((letter, copy, recorded)),
                Err(skip) => tally.skip(&letter, skip),
            }
        }
        let (confirmed, failure) = self.publish(replayer, &outgoing).await;
        tally.unconfirmed += (outgoing.len() - confirmed.len()) as u64;
        let mut marks = Vec::with_capacity(confirmed.len());
        for position in confirmed {
            let (letter, _, recorded) = &outgoing[position];
            tally.replay(letter);
            marks.push((letter.letter, recorded.turn));
            if self.canary.is_some() {
                self.canaries.extend(canary::Sent::of(letter, recorded));
            }
        }
        let marked = replayer.ask_to_the_end(async || replayer.store.mark_replayed(&marks).await).await;
        match failure {
            Some(error) => Err(error),
            None => Ok(marked?),
        }
    }
}

impl Replayer {
    /// Asks the database until it answers, unless it is away for too long or the run is to stop.
    async fn ask<T>(&self, question: impl AsyncFn() -> Result<T, StoreError>) -> Result<T, Stopped> {
        let deadline = Instant::now() + self.patience;
        retrying::until(deadline, self.shutdown.stop_taking(), question).await
    }

    /// The same for what finishes something begun: only the second stage of a stop ends it.
    async fn ask_to_the_end<T>(
        &self,
        question: impl AsyncFn() -> Result<T, StoreError>,
    ) -> Result<T, Stopped> {
        let deadline = Instant::now() + self.patience;
        retrying::until(deadline, self.shutdown.stop_now(), question).await
    }
}
