//! Group commit: many callers, one statement.
//! Guarantee: a batch is sorted by key and holds each key once, no two batches at work share a key, and a request that the
//! database refuses fails alone.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::future::Future;
use std::sync::Arc;

use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;

use super::StoreError;

/// Most requests in one statement.
const BATCH_MAX: usize = 500;
/// Statements of one kind at work at a time: while one waits for the disk the next is under way.
const IN_FLIGHT: usize = 2;
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

/// Takes what is queued whenever a statement may start; nothing is delayed to fill a batch.
async fn collect<W: Work>(work: Arc<W>, mut inbox: mpsc::Receiver<Entry<W>>, observer: Observer) {
    let mut waiting: VecDeque<Entry<W>> = VecDeque::new();
    let mut busy: BTreeSet<W::Key> = BTreeSet::new();
    let mut running: JoinSet<()> = JoinSet::new();
    let mut keys_of: HashMap<tokio::task::Id, Vec<W::Key>> = HashMap::new();
    let mut open = true;
    loop {
        while open && waiting.len() < TAKEN_MAX {
            match inbox.try_recv() {
                Ok(entry) => waiting.push_back(entry),
                Err(mpsc::error::TryRecvError::Empty) => break,
                Err(mpsc::error::TryRecvError::Disconnected) => open = false,
            }
        }
        if running.len() < IN_FLIGHT {
            let batch = take::<W>(&mut waiting, &busy);
            if !batch.is_empty() {
                observer(batch.len());
                let keys: Vec<W::Key> = batch.iter().map(|entry| W::key(&entry.request)).collect();
                busy.extend(keys.iter().cloned());
                let task = running.spawn(answer_all(Arc::clone(&work), batch));
                keys_of.insert(task.id(), keys);
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
                if again.is_empty() {
                } else if round < ROUNDS_MAX {
                    parts.push((again, round + 1));
                } else {
                    refuse(again, &StoreError::Internal("a row kept changing under the statement".into()));
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

    use tokio::sync::Semaphore;

    use super::*;

    /// Doubles numbers; refuses batches that hold 13; leaves 7 unanswered the first time; runs when it is let.
    struct Doubler {
        batches: Arc<Mutex<Vec<Vec<u32>>>>,
        undelivered: Arc<Mutex<Vec<u32>>>,
        turnstile: Arc<Semaphore>,
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
            self.turnstile.acquire().await.expect("never closed").forget();
            let asked: Vec<u32> = requests.iter().map(|number| **number).collect();
            let seen_before = self.batches.lock().unwrap().iter().flatten().any(|number| *number == 7);
            self.batches.lock().unwrap().push(asked.clone());
            if asked.contains(&13) {
                return Err(StoreError::Internal("thirteen".into()));
            }
            if asked.contains(&99) {
                return Err(StoreError::Unavailable("away".into()));
            }
            Ok(asked.iter().map(|number| (*number != 7 || seen_before).then_some(number * 2)).collect())
        }

        fn undelivered(&self, request: u32, _: u32) {
            self.undelivered.lock().unwrap().push(request);
        }
    }

    type Log = Arc<Mutex<Vec<Vec<u32>>>>;

    fn doubler(permits: usize) -> (Batcher<Doubler>, Log, Arc<Mutex<Vec<u32>>>, Arc<Semaphore>) {
        let batches = Log::default();
        let undelivered = Arc::default();
        let turnstile = Arc::new(Semaphore::new(permits));
        let work = Doubler {
            batches: Arc::clone(&batches),
            undelivered: Arc::clone(&undelivered),
            turnstile: Arc::clone(&turnstile),
        };
        (Batcher::start(work, Arc::new(|_| ())), batches, undelivered, turnstile)
    }

    async fn ask_all(batcher: &Batcher<Doubler>, numbers: &[u32]) -> Vec<Result<u32, StoreError>> {
        futures_util::future::join_all(numbers.iter().map(|number| batcher.ask(*number))).await
    }

    #[tokio::test]
    async fn a_lone_request_is_answered_at_once_and_what_queues_meanwhile_goes_together_sorted() {
        let (batcher, batches, _, turnstile) = doubler(0);
        let numbers = [5, 3, 9, 1, 3];
        let asked = ask_all(&batcher, &numbers);
        let run = async {
            tokio::task::yield_now().await;
            turnstile.add_permits(100);
        };
        let (answers, ()) = tokio::join!(asked, run);
        assert_eq!(answers.into_iter().map(Result::unwrap).collect::<Vec<_>>(), [10, 6, 18, 2, 6]);
        let batches = batches.lock().unwrap();
        assert!(batches.iter().all(|batch| batch.windows(2).all(|pair| pair[0] < pair[1])), "{batches:?}");
        assert_eq!(batches.iter().map(Vec::len).sum::<usize>(), 5);
        assert!(batches.len() < 5, "{batches:?}");
    }

    #[tokio::test]
    async fn a_poisoned_request_fails_alone() {
        let (batcher, ..) = doubler(100);
        let numbers: Vec<u32> = (10..20).collect();
        for (number, answer) in numbers.iter().zip(ask_all(&batcher, &numbers).await) {
            match number {
                13 => assert!(matches!(answer, Err(StoreError::Internal(_)))),
                _ => assert_eq!(answer.unwrap(), number * 2),
            }
        }
    }

    #[tokio::test]
    async fn a_missing_answer_is_looked_for_again() {
        let (batcher, ..) = doubler(100);
        assert_eq!(batcher.ask(7).await.unwrap(), 14);
    }

    #[tokio::test]
    async fn a_database_that_is_away_is_not_asked_row_by_row() {
        let (batcher, batches, ..) = doubler(100);
        assert!(
            ask_all(&batcher, &[97, 98, 99])
                .await
                .iter()
                .any(|answer| matches!(answer, Err(StoreError::Unavailable(_))))
        );
        assert!(batches.lock().unwrap().len() <= 3);
    }

    #[tokio::test]
    async fn an_answer_whose_caller_has_gone_is_given_back() {
        let (batcher, batches, undelivered, turnstile) = doubler(0);
        let asking = tokio::spawn({
            let batcher = batcher.clone();
            async move { batcher.ask(4).await }
        });
        // Both slots are taken by 4 and 5, so 6 waits in the queue until its caller goes.
        let second = tokio::spawn({
            let batcher = batcher.clone();
            async move { batcher.ask(5).await }
        });
        while turnstile.available_permits() == 0 && batches.lock().unwrap().is_empty() {
            tokio::task::yield_now().await;
            if asking.is_finished() {
                break;
            }
            asking.abort();
        }
        turnstile.add_permits(100);
        assert_eq!(second.await.unwrap().unwrap(), 10);
        assert_eq!(batcher.ask(6).await.unwrap(), 12);
        let taken = batches.lock().unwrap().iter().flatten().any(|number| *number == 4);
        assert_eq!(undelivered.lock().unwrap().contains(&4), taken);
    }

    #[tokio::test]
    async fn a_key_at_work_is_not_put_into_a_second_batch() {
        let (batcher, batches, _, turnstile) = doubler(1);
        let (first, rest) = tokio::join!(batcher.ask(1), async {
            let asked = ask_all(&batcher, &[1, 1, 1]);
            turnstile.add_permits(100);
            asked.await
        });
        assert_eq!(first.unwrap(), 2);
        assert_eq!(rest.into_iter().map(Result::unwrap).collect::<Vec<_>>(), [2, 2, 2]);
        assert_eq!(*batches.lock().unwrap(), vec![vec![1]; 4]);
    }
}
