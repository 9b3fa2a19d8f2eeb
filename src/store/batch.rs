//! Group commit: many callers, one statement.
//! Guarantee: a batch is sorted by key and holds each key once, no two batches at work share a key, and a request that the
//! database refuses fails alone.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

use super::StoreError;

/// Most requests in one statement.
const BATCH_MAX: usize = 500;
/// Statements of one kind at work at a time: one, and another that need not wait for a row that somebody else has locked.
pub(super) const IN_FLIGHT: usize = 2;
/// A statement that takes longer than this gets another beside it. Until then what comes is collected: on two busy cores two
/// statements of half the size cost the database a quarter more (docs/performance.md).
const BESIDE_AFTER: Duration = Duration::from_millis(25);
/// Requests that wait in the queue before a caller has to wait to get in.
const QUEUE_MAX: usize = 4096;
/// Requests taken out of the queue and not yet at work.
const TAKEN_MAX: usize = 4 * BATCH_MAX;
/// How often a request that got no answer is put to the database again.
const ROUNDS_MAX: u32 = 5;

/// Told the size of every batch, for the metric.
pub(super) type Observer = Arc<dyn Fn(usize) + Send + Sync>;

/// One kind of statement.
pub(super) trait Work: Send + Sync + 'static {
    /// What a batch is sorted by, in the order in which everybody locks rows.
    type Key: Ord + Clone + Send;
    type Request: Send + Sync + 'static;
    type Answer: Send + 'static;

    /// Whether a request whose caller has gone is left out.
    const SKIP_ABANDONED: bool;

    fn key(request: &Self::Request) -> Self::Key;

    /// Runs one statement. The answers are in the order of the requests; `None` where there is none yet, and the request
    /// is to be put again. After an error nothing or everything may have happened.
    fn run(
        &self,
        requests: &[&Self::Request],
    ) -> impl Future<Output = Result<Vec<Option<Self::Answer>>, StoreError>> + Send;

    /// Takes an answer whose caller has gone meanwhile.
    fn undelivered(&self, request: Self::Request, answer: Self::Answer);
}

struct Entry<W: Work> {
    request: W::Request,
    reply: oneshot::Sender<Result<W::Answer, StoreError>>,
}

/// The callers' end.
pub(super) struct Batcher<W: Work> {
    queue: mpsc::Sender<Entry<W>>,
}

impl<W: Work> Clone for Batcher<W> {
    fn clone(&self) -> Self {
        Self { queue: self.queue.clone() }
    }
}

impl<W: Work> Batcher<W> {
    /// Starts the task that collects; it ends when the last `Batcher` is gone and every request is answered.
    pub(super) fn start(work: W, observer: Observer) -> Self {
        let (queue, inbox) = mpsc::channel(QUEUE_MAX);
        tokio::spawn(collect(Arc::new(work), inbox, observer));
        Self { queue }
    }

    /// Has one request answered.
    pub(super) async fn ask(&self, request: W::Request) -> Result<W::Answer, StoreError> {
        let (reply, answer) = oneshot::channel();
        let stopped = || StoreError::Unavailable("the ledger has stopped".into());
        self.queue.send(Entry { request, reply }).await.map_err(|_| stopped())?;
        answer.await.map_err(|_| stopped())?
    }
}

/// Takes what is queued whenever a statement may start: the next one begins when the last has ended, so that whatever comes
/// meanwhile shares it, or beside it when it takes its time.
async fn collect<W: Work>(work: Arc<W>, mut inbox: mpsc::Receiver<Entry<W>>, observer: Observer) {
    let mut waiting: VecDeque<Entry<W>> = VecDeque::new();
    let mut busy: BTreeSet<W::Key> = BTreeSet::new();
    let mut running: JoinSet<()> = JoinSet::new();
    let mut keys_of: HashMap<tokio::task::Id, Vec<W::Key>> = HashMap::new();
    let mut open = true;
    let mut last_began = Instant::now();
    loop {
        while open && waiting.len() < TAKEN_MAX {
            match inbox.try_recv() {
                Ok(entry) => waiting.push_back(entry),
                Err(mpsc::error::TryRecvError::Empty) => break,
                Err(mpsc::error::TryRecvError::Disconnected) => open = false,
            }
        }
        let beside = last_began + BESIDE_AFTER;
        let late = Instant::now() >= beside;
        if running.is_empty() || running.len() < IN_FLIGHT && late {
            let batch = take::<W>(&mut waiting, &busy);
            if !batch.is_empty() {
                observer(batch.len());
                let keys: Vec<W::Key> = batch.iter().map(|entry| W::key(&entry.request)).collect();
                busy.extend(keys.iter().cloned());
                let task = running.spawn(answer_all(Arc::clone(&work), batch));
                keys_of.insert(task.id(), keys);
                last_began = Instant::now();
                continue;
            }
        }
        if !open && waiting.is_empty() && running.is_empty() {
            return;
        }
        tokio::select! {
            entry = inbox.recv(), if open && waiting.len() < TAKEN_MAX => match entry {
                Some(entry) => waiting.push_back(entry),
                None => open = false,
            },
            Some(ended) = running.join_next_with_id() => {
                let id = ended.map_or_else(|panic| panic.id(), |(id, ())| id);
                for key in keys_of.remove(&id).unwrap_or_default() {
                    busy.remove(&key);
                }
            }
            () = sleep_until(beside), if !waiting.is_empty() && !late => {}
        }
    }
}

/// The next batch: sorted, each key once, none that is at work.
fn take<W: Work>(waiting: &mut VecDeque<Entry<W>>, busy: &BTreeSet<W::Key>) -> Vec<Entry<W>> {
    let mut chosen: BTreeSet<W::Key> = BTreeSet::new();
    let mut batch = Vec::new();
    let mut left = VecDeque::new();
    while let Some(entry) = waiting.pop_front() {
        if W::SKIP_ABANDONED && entry.reply.is_closed() {
            continue;
        }
        if batch.len() == BATCH_MAX {
            left.push_back(entry);
            break;
        }
        let key = W::key(&entry.request);
        if busy.contains(&key) || !chosen.insert(key) {
            left.push_back(entry);
        } else {
            batch.push(entry);
        }
    }
    left.append(waiting);
    *waiting = left;
    batch.sort_by_cached_key(|entry| W::key(&entry.request));
    batch
}

/// Runs a batch, and halves of it where the database refuses, down to the requests that it refuses alone.
async fn answer_all<W: Work>(work: Arc<W>, batch: Vec<Entry<W>>) {
    let mut parts = vec![(batch, 1)];
    while let Some((mut part, round)) = parts.pop() {
        let requests: Vec<&W::Request> = part.iter().map(|entry| &entry.request).collect();
        match work.run(&requests).await {
            Ok(answers) => {
                let again = deliver(&*work, part, answers);
                if round == ROUNDS_MAX {
                    refuse(again, &StoreError::Internal("a row kept changing under the statement".into()));
                } else if !again.is_empty() {
                    parts.push((again, round + 1));
                }
            }
            Err(error @ StoreError::Unavailable(_)) => {
                refuse(part, &error);
                for (part, _) in parts.drain(..) {
                    refuse(part, &error);
                }
            }
            Err(error) if part.len() == 1 => refuse(part, &error),
            Err(_) => {
                let second = part.split_off(part.len() / 2);
                parts.push((second, round));
                parts.push((part, round));
            }
        }
    }
}

/// Hands the answers out and returns the requests that have none.
fn deliver<W: Work>(work: &W, part: Vec<Entry<W>>, answers: Vec<Option<W::Answer>>) -> Vec<Entry<W>> {
    let mut again = Vec::new();
    let mut answers = answers.into_iter();
    for entry in part {
        match answers.next().flatten() {
            None => again.push(entry),
            Some(answer) => {
                if let Err(Ok(answer)) = entry.reply.send(Ok(answer)) {
                    work.undelivered(entry.request, answer);
                }
            }
        }
    }
    again
}

fn refuse<W: Work>(entries: Vec<Entry<W>>, error: &StoreError) {
    for entry in entries {
        // A caller that has gone needs no error.
        let _ = entry.reply.send(Err(error.clone()));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use futures_util::future::join_all;
    use tokio::sync::Semaphore;

    use super::*;

    /// Refused together with whatever is in its batch.
    const POISON: u32 = 13;
    /// Makes the database go away.
    const OUTAGE: u32 = 99;
    /// Gets no answer the first time.
    const LATE: u32 = 7;
    /// Never gets an answer.
    const NEVER: u32 = 77;

    /// Doubles numbers, one batch for each permit.
    #[derive(Clone)]
    struct Doubler {
        batches: Arc<Mutex<Vec<Vec<u32>>>>,
        undelivered: Arc<Mutex<Vec<u32>>>,
        permits: Arc<Semaphore>,
    }

    impl Work for Doubler {
        type Key = u32;
        type Request = u32;
        type Answer = u32;
        const SKIP_ABANDONED: bool = true;

        fn key(request: &u32) -> u32 {
            *request
        }

        async fn run(&self, requests: &[&u32]) -> Result<Vec<Option<u32>>, StoreError> {
            let asked: Vec<u32> = requests.iter().map(|number| **number).collect();
            let late = !self.batches().iter().flatten().any(|number| *number == LATE);
            self.batches.lock().unwrap().push(asked.clone());
            self.permits.acquire().await.expect("never closed").forget();
            if asked.contains(&OUTAGE) {
                return Err(StoreError::Unavailable("away".into()));
            }
            if asked.contains(&POISON) {
                return Err(StoreError::Internal("thirteen".into()));
            }
            let answered = |number: u32| number != NEVER && (number != LATE || !late);
            Ok(asked.iter().map(|number| answered(*number).then_some(number * 2)).collect())
        }

        fn undelivered(&self, request: u32, _: u32) {
            self.undelivered.lock().unwrap().push(request);
        }
    }

    impl Doubler {
        fn start(permits: usize) -> (Self, Batcher<Self>) {
            let work = Self {
                batches: Arc::default(),
                undelivered: Arc::default(),
                permits: Arc::new(Semaphore::new(permits)),
            };
            (work.clone(), Batcher::start(work, Arc::new(|_| ())))
        }

        fn batches(&self) -> Vec<Vec<u32>> {
            self.batches.lock().unwrap().clone()
        }

        /// Lets the other tasks run until so many batches are at work or done.
        async fn begun(&self, batches: usize) {
            while self.batches().len() < batches {
                tokio::task::yield_now().await;
            }
        }
    }

    type Asking = tokio::task::JoinHandle<Result<u32, StoreError>>;

    /// Puts a request into the queue.
    fn ask(batcher: &Batcher<Doubler>, number: u32) -> Asking {
        let batcher = batcher.clone();
        tokio::spawn(async move { batcher.ask(number).await })
    }

    async fn answers(asking: impl IntoIterator<Item = Asking>) -> Vec<Result<u32, StoreError>> {
        join_all(asking).await.into_iter().map(Result::unwrap).collect()
    }

    #[tokio::test]
    async fn a_lone_request_goes_at_once_and_what_queues_meanwhile_goes_together_sorted() {
        let (work, batcher) = Doubler::start(0);
        let first = ask(&batcher, 50);
        work.begun(1).await;
        let second = ask(&batcher, 40);
        work.begun(2).await;
        let rest: Vec<_> = [5, 3, 9, 50, 3, 1].map(|number| ask(&batcher, number)).into();
        tokio::task::yield_now().await;
        work.permits.add_permits(100);
        answers([first, second]).await;
        let doubled: Vec<u32> = answers(rest).await.into_iter().map(Result::unwrap).collect();
        assert_eq!(doubled, [10, 6, 18, 100, 6, 2]);
        let batches = work.batches();
        assert_eq!(batches[..2], [vec![50], vec![40]]);
        assert!(batches[2].starts_with(&[1, 3, 5, 9]), "{batches:?}");
        assert_eq!(batches.iter().map(Vec::len).sum::<usize>(), 8);
    }

    #[tokio::test]
    async fn a_key_at_work_is_not_put_into_another_batch() {
        let (work, batcher) = Doubler::start(0);
        let asking: Vec<_> = (0..4).map(|_| ask(&batcher, 1)).collect();
        work.begun(1).await;
        // A second slot is free, and the next one is used for another key.
        let other = ask(&batcher, 2);
        work.begun(2).await;
        assert_eq!(work.batches(), [[1], [2]]);
        work.permits.add_permits(100);
        assert!(answers(asking).await.into_iter().all(|answer| answer.is_ok_and(|answer| answer == 2)));
        other.await.unwrap().unwrap();
        assert_eq!(work.batches(), [[1], [2], [1], [1], [1]]);
    }

    #[tokio::test]
    async fn a_poisoned_request_fails_alone() {
        let (work, batcher) = Doubler::start(0);
        let held: Vec<_> = [100, 101].map(|number| ask(&batcher, number)).into();
        work.begun(1).await;
        let asking: Vec<_> = (10..20).map(|number| ask(&batcher, number)).collect();
        tokio::task::yield_now().await;
        work.permits.add_permits(100);
        answers(held).await;
        for (number, answer) in (10..20).zip(answers(asking).await) {
            match number {
                POISON => assert!(matches!(answer, Err(StoreError::Internal(_)))),
                _ => assert_eq!(answer.unwrap(), number * 2),
            }
        }
    }

    #[tokio::test]
    async fn a_missing_answer_is_looked_for_again_but_not_for_ever() {
        let (work, batcher) = Doubler::start(100);
        assert_eq!(batcher.ask(LATE).await.unwrap(), 2 * LATE);
        assert_eq!(work.batches().len(), 2);
        assert!(matches!(batcher.ask(NEVER).await, Err(StoreError::Internal(_))));
    }

    #[tokio::test]
    async fn a_database_that_is_away_is_not_asked_row_by_row() {
        let (work, batcher) = Doubler::start(0);
        let held = [ask(&batcher, 1), ask(&batcher, 2)];
        work.begun(1).await;
        let asking: Vec<_> = [OUTAGE, POISON, 10, 11].map(|number| ask(&batcher, number)).into();
        tokio::task::yield_now().await;
        work.permits.add_permits(100);
        answers(held).await;
        let answers = answers(asking).await;
        assert!(
            answers.iter().all(|answer| matches!(answer, Err(StoreError::Unavailable(_)))),
            "{answers:?}"
        );
        assert!(work.batches().len() <= 4);
    }

    #[tokio::test]
    async fn a_caller_that_went_away_is_left_out_or_its_answer_is_given_back() {
        let (work, batcher) = Doubler::start(0);
        let (at_work, other) = (ask(&batcher, 1), ask(&batcher, 2));
        work.begun(1).await;
        at_work.abort();
        assert!(at_work.await.is_err());
        // One that has to wait for the same key, and is gone before its turn comes.
        let waiting = ask(&batcher, 1);
        tokio::task::yield_now().await;
        waiting.abort();
        assert!(waiting.await.is_err());
        work.permits.add_permits(100);
        other.await.unwrap().unwrap();
        batcher.ask(3).await.unwrap();
        assert_eq!(*work.undelivered.lock().unwrap(), [1]);
        assert_eq!(work.batches().iter().flatten().filter(|number| **number == 1).count(), 1);
    }

    #[tokio::test]
    async fn no_batch_is_larger_than_the_bound() {
        let (work, batcher) = Doubler::start(0);
        let held = ask(&batcher, 10_000);
        work.begun(1).await;
        let numbers = (100..100 + 3 * u32::try_from(BATCH_MAX).unwrap()).filter(|number| *number != NEVER);
        let asking: Vec<_> = numbers.map(|number| ask(&batcher, number)).collect();
        tokio::task::yield_now().await;
        work.permits.add_permits(100);
        held.await.unwrap().unwrap();
        assert!(answers(asking).await.iter().all(Result::is_ok));
        assert!(work.batches().iter().all(|batch| batch.len() <= BATCH_MAX));
        assert!(work.batches().iter().any(|batch| batch.len() == BATCH_MAX));
    }
}
