//! Acknowledgements of one channel, gathered: many deliveries in one frame.
//! Guarantee: a tag is acknowledged only after it was settled, and no frame covers one that is open or on its way back to
//! the queue.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use futures_util::future::try_join_all;
use lapin::Channel;
use lapin::options::BasicAckOptions;
use tokio::sync::Notify;

use super::jobs::{Consuming, ConsumingGuard};
use super::link::Live;

/// For so long what is settled may wait for others. The broker writes one entry of a quorum queue's log for each frame.
const GATHER: Duration = Duration::from_millis(5);
/// A tag that lower ones hold up is acknowledged alone after so many rounds.
const ROUNDS: u64 = 2;

/// Which tags of a channel are open, and which wait to be acknowledged. AMQP 0-9-1 tags are numbered in the order of the
/// deliveries, and a frame with `multiple` covers every lower one (basic.ack).
#[derive(Debug, Default)]
struct Tags {
    open: BTreeSet<u64>,
    /// With the round in which each was settled.
    settled: BTreeMap<u64, u64>,
    round: u64,
}

/// One basic.ack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Frame {
    tag: u64,
    multiple: bool,
}

impl Tags {
    fn settle(&mut self, tag: u64) {
        if self.open.remove(&tag) {
            self.settled.insert(tag, self.round);
        }
    }

    /// What can be covered by one frame, and of the rest what has waited long enough, or everything.
    fn take(&mut self, everything: bool) -> Vec<Frame> {
        let above = match self.open.first() {
            Some(lowest) => self.settled.split_off(lowest),
            None => BTreeMap::new(),
        };
        let covered = std::mem::replace(&mut self.settled, above);
        let mut frames = Vec::new();
        if let Some((&tag, _)) = covered.last_key_value() {
            frames.push(Frame { tag, multiple: covered.len() > 1 });
        }
        let round = self.round;
        self.settled.retain(|&tag, settled| {
            let waits = !everything && *settled + ROUNDS > round;
            if !waits {
                frames.push(Frame { tag, multiple: false });
            }
            waits
        });
        self.round += 1;
        frames
    }
}

/// The acknowledgements of one channel.
pub(super) struct Acks {
    state: Mutex<State>,
    /// Something was settled, or the channel's last delivery is gone.
    settled: Notify,
    /// No use in waiting for more.
    urgent: Notify,
    /// So many settled tags are acknowledged at once: the broker sends no more until then.
    most: usize,
    unsent: Arc<Consuming>,
}

#[derive(Default)]
struct State {
    tags: Tags,
    /// There while something settled is not yet acknowledged.
    unsent: Option<ConsumingGuard>,
    over: bool,
    /// The sender has ended: what is settled from now on is delivered again.
    lost: bool,
}

impl Acks {
    /// `unsent` is entered while something waits to be acknowledged.
    pub fn new(prefetch: u16, unsent: Arc<Consuming>) -> Arc<Self> {
        let most = usize::from(prefetch / 4).max(1);
        let (settled, urgent) = (Notify::new(), Notify::new());
        Arc::new(Self { state: Mutex::default(), settled, urgent, most, unsent })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nothing panics while the lock is held")
    }

    /// A delivery has come. To be called for each, in their order, before it can be settled.
    pub fn delivered(&self, tag: u64) {
        self.state().tags.open.insert(tag);
    }

    /// The broker has its basic.nack: no frame can take it for acknowledged any more.
    pub fn went_back(&self, tag: u64) {
        self.state().tags.open.remove(&tag);
    }

    /// Nothing is left to be done with a delivery.
    pub fn settle(&self, tag: u64) {
        let mut state = self.state();
        if state.lost {
            return;
        }
        state.tags.settle(tag);
        let first = state.unsent.is_none();
        if first {
            state.unsent = Some(self.unsent.enter());
        }
        let urgent = state.is_urgent(self.most);
        drop(state);
        if first {
            self.settled.notify_one();
        }
        if urgent {
            self.urgent.notify_one();
        }
    }

    /// No delivery is open any more, and none will come.
    pub fn end(&self) {
        self.state().over = true;
        self.settled.notify_one();
        self.urgent.notify_one();
    }

    fn take(&self) -> Vec<Frame> {
        let mut state = self.state();
        let everything = state.is_urgent(self.most);
        state.tags.take(everything)
    }

    /// Sends what is settled, until the end or the loss of the connection.
    pub async fn send(self: Arc<Self>, live: Arc<Live>, channel: Channel) {
        let sending = async {
            loop {
                self.settled.notified().await;
                while self.gathered().await {
                    let send = |Frame { tag, multiple }| channel.basic_ack(tag, BasicAckOptions { multiple });
                    if try_join_all(self.take().into_iter().map(send)).await.is_err() {
                        return;
                    }
                }
                if self.state().over {
                    return;
                }
            }
        };
        let _sent_or_lost = live.while_up(sending).await;
        // Nobody is to wait for what a lost channel left.
        let mut state = self.state();
        state.lost = true;
        state.unsent = None;
    }

    /// Waits for others to be settled; false when nothing is left to be acknowledged.
    async fn gathered(&self) -> bool {
        {
            let mut state = self.state();
            if state.tags.settled.is_empty() {
                state.unsent = None;
                return false;
            }
            if state.is_urgent(self.most) {
                return true;
            }
        }
        let _urgent = tokio::time::timeout(GATHER, self.urgent.notified()).await;
        true
    }
}

impl State {
    fn is_urgent(&self, most: usize) -> bool {
        self.over || self.tags.open.is_empty() || self.tags.settled.len() >= most
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn frame(tag: u64, multiple: bool) -> Frame {
        Frame { tag, multiple }
    }

    fn delivered(tags: impl IntoIterator<Item = u64>) -> Tags {
        Tags { open: tags.into_iter().collect(), ..Tags::default() }
    }

    #[test]
    fn what_is_settled_below_the_lowest_open_tag_goes_in_one_frame() {
        let mut tags = delivered(1..=9);
        [3, 1, 2, 6].into_iter().for_each(|tag| tags.settle(tag));
        assert_eq!(tags.take(false), [frame(3, true)]);
        [4, 5].into_iter().for_each(|tag| tags.settle(tag));
        assert_eq!(tags.take(false), [frame(6, true)]);
        tags.settle(7);
        assert_eq!(tags.take(false), [frame(7, false)]);
    }

    #[test]
    fn a_tag_that_a_lower_one_holds_up_goes_alone_after_two_rounds() {
        let mut tags = delivered(1..=3);
        tags.settle(3);
        assert_eq!(tags.take(false), []);
        assert_eq!(tags.take(false), []);
        assert_eq!(tags.take(false), [frame(3, false)]);
        tags.settle(2);
        assert_eq!(tags.take(true), [frame(2, false)]);
    }

    proptest! {
        #[test]
        fn every_settled_tag_is_acknowledged_once_and_no_other(
            steps in proptest::collection::vec((0_u8..5, 0_usize..40), 0..400),
        ) {
            let mut tags = Tags::default();
            let (mut next, mut open, mut settled) = (1, BTreeSet::new(), BTreeSet::new());
            // What the broker holds unacknowledged.
            let mut held = BTreeSet::new();
            let acknowledge = |held: &mut BTreeSet<u64>, frames: Vec<Frame>| {
                let mut gone = BTreeSet::new();
                for Frame { tag, multiple } in frames {
                    gone.extend(held.iter().copied().filter(|&one| one == tag || multiple && one < tag));
                    held.retain(|one| !gone.contains(one));
                }
                gone
            };
            for (step, which) in steps {
                let chosen = open.iter().copied().nth(which % open.len().max(1));
                match (step, chosen) {
                    (0 | 1, _) => {
                        tags.open.insert(next);
                        open.insert(next);
                        held.insert(next);
                        next += 1;
                    }
                    (2, Some(tag)) => {
                        tags.settle(tag);
                        open.remove(&tag);
                        settled.insert(tag);
                    }
                    // Its basic.nack has been sent.
                    (3, Some(tag)) => {
                        held.remove(&tag);
                        open.remove(&tag);
                        tags.open.remove(&tag);
                    }
                    _ => {
                        let gone = acknowledge(&mut held, tags.take(which % 7 == 0));
                        prop_assert!(gone.is_subset(&settled), "{gone:?} of {settled:?}");
                        settled.retain(|tag| !gone.contains(tag));
                    }
                }
            }
            let gone = acknowledge(&mut held, tags.take(true));
            prop_assert_eq!(gone, settled);
            prop_assert_eq!(held, open);
        }
    }
}
