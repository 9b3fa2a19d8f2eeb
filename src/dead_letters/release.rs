//! Parked letters on their way out: back to their lanes once their organization's mail flows again, or buried.
//! Guarantee: what becomes of a letter is recorded before its copy is published or its death announced, and the letter is
//! marked after that. Whoever is cut off in between, the next one goes on with the same turn, of which the ledger lets one
//! copy through. What is looked for is a state, never an event: nothing that was missed keeps a letter parked.

mod announce;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::join_all;
use tokio::sync::Notify;
use tokio::time::Instant;
use uuid::Uuid;

use super::replay::judge::{self, Ready, Ways};
use super::replay::publish::persist;
use crate::broker::Publisher;
use crate::broker::wire::WireLimits;
use crate::clock::Clock;
use crate::model::lanes::Lane;
use crate::model::ledger::Turn;
use crate::model::letter::{Letter, LetterFilter, LetterId, LetterState, Place};
use crate::model::organization::OrganizationId;
use crate::model::parking::{self, Parked, ParkingRules};
use crate::model::ramp::Ramps;
use crate::shutdown::Shutdown;
use crate::store::{
    Burial, DeadLetters, Examined, ParkedShare, ParkedTaken, ReplayCopy, Store, StoreError, Unopened,
};

/// Who has it releases and buries for all workers.
const LEASE: &str = "parked letters";
/// A worker that has died is followed after so long; one step takes less.
const LEASE_PERIOD: Duration = Duration::from_secs(15);
/// Between two questions for it, the holder's or another's.
const LEASE_PAUSE: Duration = Duration::from_secs(3);
/// A worker that lacks a letter's key leaves the lease for so long to one that may have it, which has asked for it by then.
const SIT_OUT: Duration = Duration::from_secs(10);
/// Where none has taken it, none of them may have the key: the worker goes on with the other letters for so long.
const GO_ON: Duration = Duration::from_secs(60);
/// Between two steps.
const STEP: Duration = Duration::from_millis(500);
/// Between two rounds through everything that is parked.
const ROUND_PAUSE: Duration = Duration::from_secs(2);
/// One step goes on with its round for so long.
const ROUND_SLICE: Duration = Duration::from_millis(100);
/// Letters looked at in one question of a round.
const PAGE: u32 = 500;
/// Bodies in memory, unless one alone is larger.
const STEP_BYTES: u64 = 8 << 20;
/// For what is published within one step; the next one tries again.
const PATIENCE: Duration = Duration::from_secs(5);
/// A body of so many bytes is read where it holds nobody up.
const HEAVY_BYTES: u32 = 256 << 10;
/// Letters that cannot be released and are remembered, so that each is logged once.
const STUCK_MAX: usize = 1000;

/// What a worker releases with.
pub struct Releaser {
    /// Ledger and archive.
    pub store: Store,
    /// The letters' content.
    pub archive: DeadLetters,
    /// The broker.
    pub publisher: Publisher,
    /// The lanes of the settings.
    pub lanes: Vec<Lane>,
    /// Bounds of a job.
    pub limits: WireLimits,
    /// Whose mail is parked, and for how long.
    pub rules: ParkingRules,
    /// Told when a letter is sealed under a key that the ring lacks: the worker is then not ready.
    pub key_missing: Arc<Notify>,
    /// Time.
    pub clock: Clock,
    /// A drain ends it after the step in hand.
    pub shutdown: Shutdown,
}

/// What the holder of the lease remembers from step to step.
struct Progress {
    began: Instant,
    /// When the lease is to be asked for again.
    ask_at: Instant,
    held: bool,
    ramps: Ramps,
    /// Behind letters that cannot be released, so that they stop nobody else's.
    behind: HashMap<OrganizationId, Place>,
    stuck: HashSet<LetterId>,
    /// It has come upon a letter whose key another worker may have.
    keyless: bool,
    /// Until then such a letter does not make it leave the lease.
    goes_on_until: Instant,
    /// Where the round is; none between two of them.
    round: Option<Option<Place>>,
    next_round: Instant,
}

impl Progress {
    /// As of the time when the lease is taken.
    fn new() -> Self {
        let now = Instant::now();
        Self {
            began: now,
            ask_at: now,
            held: false,
            ramps: Ramps::default(),
            behind: HashMap::new(),
            stuck: HashSet::new(),
            keyless: false,
            goes_on_until: now,
            round: None,
            next_round: now,
        }
    }
}

/// Letters to be published, each with what was opened of it.
type Outgoing = BTreeMap<LetterId, (Letter, Ready)>;

impl Releaser {
    /// Releases and buries for as long as the worker runs, whenever this is the one of all workers that does.
    pub async fn run(self) {
        let holder = self.clock.new_id();
        let mut progress = Progress::new();
        let mut refusals = 0_u64;
        while !self.shutdown.is_draining() {
            let step = AssertUnwindSafe(self.step(holder, &mut progress)).catch_unwind().await;
            match step {
                Ok(Ok(())) => refusals = 0,
                Ok(Err(error)) => {
                    // One may be a deadlock, which was somebody else's turn.
                    refusals += u64::from(matches!(error, StoreError::Internal(_)));
                    if refusals == 2 {
                        tracing::warn!(%error, "the database refuses what is to be done with parked letters; it is tried again");
                    } else {
                        tracing::debug!(%error, "parked letters could not be looked at now");
                    }
                }
                Err(_) => {
                    tracing::error!("releasing parked letters panicked; it begins anew");
                    progress = Progress::new();
                }
            }
            tokio::select! {
                () = self.shutdown.stop_taking() => {}
                () = tokio::time::sleep(STEP) => {}
            }
        }
        // Without it the next one waits until it ends by itself.
        let _ = self.store.give_back_lease(LEASE, holder).await;
    }

    async fn step(&self, holder: Uuid, progress: &mut Progress) -> Result<(), StoreError> {
        if Instant::now() >= progress.ask_at {
            let held = self.store.take_lease(LEASE, holder, LEASE_PERIOD).await?;
            if !held {
                *progress = Progress { goes_on_until: progress.goes_on_until, ..Progress::new() };
            }
            (progress.held, progress.ask_at) = (held, Instant::now() + LEASE_PAUSE);
        }
        if !progress.held {
            return Ok(());
        }
        // What is refused in one part is no reason to leave out the others.
        let done = [
            go_on(self.release(progress).await)?,
            go_on(self.go_round(progress).await)?,
            go_on(self.announce_recoveries(progress).await)?,
            go_on(self.leave_to_others(holder, progress).await)?,
        ];
        done.into_iter().find_map(|refusal| refusal).map_or(Ok(()), Err)
    }

    /// Gives the lease away where a letter's key is missing here. Whoever takes it meets that letter as well: of several workers
    /// the one that has the key keeps the lease.
    async fn leave_to_others(&self, holder: Uuid, progress: &mut Progress) -> Result<(), StoreError> {
        let now = Instant::now();
        if !progress.keyless || now < progress.goes_on_until {
            return Ok(());
        }
        tracing::debug!("parked letters are left to a worker that has their key");
        self.store.give_back_lease(LEASE, holder).await?;
        let ask_at = now + SIT_OUT;
        *progress = Progress { ask_at, goes_on_until: ask_at + GO_ON, ..Progress::new() };
        Ok(())
    }

    /// The next letters of each organization whose mail flows.
    async fn release(&self, progress: &mut Progress) -> Result<(), StoreError> {
        let ready = self.store.organizations_to_release(self.rules.for_all).await?;
        let ready: BTreeSet<OrganizationId> = ready.into_iter().collect();
        progress.behind.retain(|organization, _| ready.contains(organization));
        let shares = progress.ramps.shares(&ready, progress.began.elapsed());
        if shares.is_empty() {
            return Ok(());
        }
        let place = |organization: &OrganizationId| progress.behind.get(organization).copied();
        let asked: Vec<ParkedShare> = shares
            .into_iter()
            .map(|(organization, most)| ParkedShare { after: place(&organization), organization, most })
            .collect();
        let mut letters = self.store.oldest_parked(&asked).await?;
        let mut found: HashMap<OrganizationId, u32> = HashMap::new();
        for organization in letters.iter().filter_map(organization_of) {
            *found.entry(organization.clone()).or_default() += 1;
        }
        let fit = how_many_fit(&letters);
        letters.truncate(fit);
        // Whose last letter was seen begins again with its oldest.
        for share in asked.iter().filter(|share| found.get(&share.organization) < Some(&share.most)) {
            progress.behind.remove(&share.organization);
        }
        let (outgoing, stuck) = self.open(letters, progress).await?;
        for letter in &stuck {
            if let Some(organization) = organization_of(letter) {
                progress.behind.insert(organization.clone(), letter.place());
            }
        }
        let ids: Vec<LetterId> = outgoing.keys().copied().collect();
        self.carry_out(&ids, outgoing, true).await
    }

    /// Goes on with the round through all that is parked: what has died meanwhile, whether its organization's mail flows or not,
    /// and what somebody has left in the middle.
    async fn go_round(&self, progress: &mut Progress) -> Result<(), StoreError> {
        if progress.round.is_none() && Instant::now() < progress.next_round {
            return Ok(());
        }
        let filter = LetterFilter { states: vec![LetterState::Parked], ..LetterFilter::default() };
        let until = Instant::now() + ROUND_SLICE;
        while Instant::now() < until && !self.shutdown.is_draining() {
            let after = progress.round.flatten();
            let page = self.store.examine_letters(&filter, after, None, PAGE).await?;
            progress.round = page.last.map(Some);
            self.settle(page.letters, progress).await?;
            if progress.round.is_none() {
                progress.next_round = Instant::now() + ROUND_PAUSE;
                break;
            }
        }
        Ok(())
    }

    async fn settle(&self, letters: Vec<Examined>, progress: &mut Progress) -> Result<(), StoreError> {
        if letters.is_empty() {
            return Ok(());
        }
        let now = self.store.database_time().await?;
        let (mut ids, mut cut_off) = (Vec::new(), Vec::new());
        for Examined { letter, ledger, booking } in letters {
            let parked_for = self.rules.parked_for;
            match parking::decide(&letter, ledger.as_ref(), booking, false, parked_for, now) {
                Parked::Stays => {}
                Parked::Goes(_) => cut_off.push(letter),
                Parked::Dies { .. } | Parked::Died | Parked::TakenUp => ids.push(letter.letter),
            }
        }
        let fit = how_many_fit(&cut_off);
        cut_off.truncate(fit);
        if ids.is_empty() && cut_off.is_empty() {
            return Ok(());
        }
        let (outgoing, _) = self.open(cut_off, progress).await?;
        ids.extend(outgoing.keys());
        self.carry_out(&ids, outgoing, false).await
    }

    /// Opens letters; those that cannot be released are told apart. Of these, each that nobody can open is logged once, and
    /// `smtp_config.recovered` does not wait for it.
    async fn open(
        &self,
        letters: Vec<Letter>,
        progress: &mut Progress,
    ) -> Result<(Outgoing, Vec<Letter>), StoreError> {
        let ids: Vec<LetterId> = letters.iter().map(|letter| letter.letter).collect();
        let mut opened = self.archive.open_all(&ids).await?;
        let ways = Ways { lanes: &self.lanes, limits: &self.limits };
        let (mut outgoing, mut stuck) = (Outgoing::new(), Vec::new());
        for letter in letters {
            let content = opened.remove(&letter.letter);
            let problem = match &content {
                Some(Err(error)) => error.to_string(),
                _ => "its body is no job, or no lane takes it".to_owned(),
            };
            let keyless = matches!(content, Some(Err(Unopened::UnknownKey { .. })));
            let read = || judge::ready(&letter, content, &ways, None);
            let ready = if letter.bytes < HEAVY_BYTES { read() } else { tokio::task::block_in_place(read) };
            match ready {
                Ok(ready) => drop(outgoing.insert(letter.letter, (letter, ready))),
                Err(_) if keyless => {
                    progress.keyless = true;
                    self.key_missing.notify_one();
                    stuck.push(letter);
                }
                Err(_) => {
                    if progress.stuck.len() >= STUCK_MAX {
                        progress.stuck.clear();
                    }
                    if progress.stuck.insert(letter.letter) {
                        tracing::error!(letter = %letter.letter, problem, "a parked letter cannot be released; it stays");
                    }
                    stuck.push(letter);
                }
            }
        }
        Ok((outgoing, stuck))
    }

    /// Records, publishes or announces, marks.
    async fn carry_out(
        &self,
        ids: &[LetterId],
        mut outgoing: Outgoing,
        release: bool,
    ) -> Result<(), StoreError> {
        if ids.is_empty() {
            return Ok(());
        }
        let taken = self.store.take_parked(ids, self.rules, release).await?;
        let mut copies: BTreeMap<Option<OrganizationId>, Vec<(Letter, Ready, ReplayCopy)>> = BTreeMap::new();
        let mut burials = Vec::new();
        for (id, taken) in taken {
            match taken {
                ParkedTaken::Buried(burial) => burials.push(*burial),
                ParkedTaken::Copy(copy) => {
                    if let Some((letter, ready)) = outgoing.remove(&id) {
                        copies
                            .entry(organization_of(&letter).cloned())
                            .or_default()
                            .push((letter, ready, copy));
                    }
                }
            }
        }
        let mut publishing = Vec::with_capacity(copies.len());
        for copies in copies.into_values() {
            publishing.push(self.publish(copies));
        }
        let published: Vec<(LetterId, Turn)> = join_all(publishing).await.into_iter().flatten().collect();
        if !published.is_empty() {
            self.store.mark_replayed(&published).await?;
        }
        let mut announcing = Vec::with_capacity(burials.len());
        for burial in &burials {
            announcing.push(self.announce_death(burial));
        }
        let announced = join_all(announcing).await;
        let buried: Vec<Burial> =
            burials.into_iter().zip(announced).filter_map(|(burial, said)| said.then_some(burial)).collect();
        if !buried.is_empty() {
            self.store.mark_buried(&buried).await?;
        }
        Ok(())
    }

    /// Publishes one organization's copies, oldest first, until one fails; those that are confirmed.
    async fn publish(&self, mut copies: Vec<(Letter, Ready, ReplayCopy)>) -> Vec<(LetterId, Turn)> {
        copies.sort_by_key(|(letter, ..)| letter.place());
        let mut confirmed = Vec::with_capacity(copies.len());
        for copy in &copies {
            if persist(&self.publisher, &self.shutdown, PATIENCE, copy).await.is_err() {
                tracing::debug!(letter = %copy.0.letter, "a released letter's copy was not confirmed; it is tried again");
                break;
            }
            confirmed.push((copy.0.letter, copy.2.turn));
        }
        confirmed
    }
}

/// A refusal, to be told later; a database that is away ends the step.
fn go_on(part: Result<(), StoreError>) -> Result<Option<StoreError>, StoreError> {
    match part {
        Err(error @ StoreError::Internal(_)) => Ok(Some(error)),
        Err(error) => Err(error),
        Ok(()) => Ok(None),
    }
}

/// How many of these, from the first on, may be opened together.
fn how_many_fit(letters: &[Letter]) -> usize {
    let mut bytes = 0;
    let fit = letters.iter().take_while(|letter| {
        bytes += u64::from(letter.bytes);
        bytes <= STEP_BYTES
    });
    fit.count().max(1)
}

fn organization_of(letter: &Letter) -> Option<&OrganizationId> {
    letter.key.as_ref()?.organization.as_ref()
}
