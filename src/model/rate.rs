//! How an account's rate and its connections are divided among workers: a bucket of tokens, and shares of the connections.
//! Guarantee: pure; of a limit of so many a minute no more tokens are used in any 60 seconds, however many workers ask, as long
//! as each token is used within [`USED_WITHIN`] of its grant; of the connections no more are granted than there are.

use std::time::Duration;

use uuid::Uuid;

/// A token is used within this time of its grant, or not at all. It widens what a provider may see within a minute, so it is
/// made good by a slower refill.
pub const USED_WITHIN: Duration = Duration::from_secs(5);
/// For so long the tokens of a slice are handed out; the rest of [`USED_WITHIN`] is for the way to DATA.
pub const SLICE_LASTS: Duration = Duration::from_secs(3);

/// One part in so many of a minute's messages may go at once.
const BURST_PART: u32 = 10;

/// A rate as a bucket: how much it holds, how fast it fills.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Pace {
    /// Tokens in a full bucket: what may go at once after a rest.
    pub burst: u32,
    /// Tokens a second.
    pub per_s: f64,
}

impl Pace {
    /// The fastest pace that keeps a limit in every minute: within 60 seconds and the time that tokens may be on their way, a full
    /// bucket and what flows into it are no more than the limit.
    pub fn of(per_minute: u32) -> Self {
        let per_minute = per_minute.max(1);
        let burst = per_minute.div_ceil(BURST_PART);
        let window_s = 60.0 + USED_WITHIN.as_secs_f64();
        Self { burst, per_s: f64::from(per_minute - burst + 1) / window_s }
    }

    /// Time in which one token flows in.
    pub fn per_token(&self) -> Duration {
        Duration::from_secs_f64(1.0 / self.per_s)
    }
}

/// What is in the bucket after so much time. A clock that was set back fills nothing.
pub fn refilled(tokens: f64, since: Duration, pace: Pace) -> f64 {
    (tokens + since.as_secs_f64() * pace.per_s).min(f64::from(pace.burst))
}

/// Tokens for a worker that wants so many, when so many workers share the bucket: whole ones, no more than its part of a full
/// bucket, so that the first one to come does not take all.
pub fn grant(tokens: f64, wanted: u32, workers: usize, pace: Pace) -> u32 {
    let part = pace.burst.div_ceil(u32::try_from(workers.max(1)).unwrap_or(u32::MAX));
    // What is below zero, or less than one, is none; what is above is at most a burst.
    let whole = tokens.floor().clamp(0.0, f64::from(pace.burst)) as u32;
    wanted.min(part).min(whole)
}

/// What a worker has of an account's connections, and how many it could use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Holding {
    /// Which worker.
    pub holder: Uuid,
    /// Connections that it may have open.
    pub connections: u32,
    /// Connections that it could use now.
    pub wanted: u32,
}

/// How many connections a worker may have, of `limit`. `others` are the living ones but it. It gets what it wants of those that
/// are free; where another has less than its fair share and wants it, no more than its own.
pub fn share(limit: u32, me: Uuid, wanted: u32, others: &[Holding]) -> u32 {
    let taken = others.iter().map(|other| other.connections).fold(0, u32::saturating_add);
    let free = limit.saturating_sub(taken);
    let mut askers: Vec<Uuid> = others.iter().filter(|o| o.wanted > 0).map(|o| o.holder).collect();
    if wanted > 0 {
        askers.push(me);
    }
    askers.sort_unstable();
    let bound = if goes_without(limit, &askers, others) { fair_share(limit, &askers, me) } else { limit };
    wanted.min(free).min(bound)
}

/// How many a worker may keep that has so many open and has no use for them now: none, where another goes without.
pub fn keep(limit: u32, open: u32, others: &[Holding]) -> u32 {
    let taken = others.iter().map(|other| other.connections).fold(0, u32::saturating_add);
    let mut askers: Vec<Uuid> = others.iter().filter(|o| o.wanted > 0).map(|o| o.holder).collect();
    askers.sort_unstable();
    if goes_without(limit, &askers, others) { 0 } else { open.min(limit.saturating_sub(taken)) }
}

/// Whether one of the others has less than it wants and than its share.
fn goes_without(limit: u32, askers: &[Uuid], others: &[Holding]) -> bool {
    let short =
        |other: &Holding| other.connections < other.wanted.min(fair_share(limit, askers, other.holder));
    others.iter().any(short)
}

/// The part of one of those who ask; the remainder goes to the first ones.
fn fair_share(limit: u32, askers: &[Uuid], who: Uuid) -> u32 {
    let count = u32::try_from(askers.len()).unwrap_or(u32::MAX).max(1);
    let rank = askers.iter().position(|asker| *asker == who);
    let rank = rank.and_then(|rank| u32::try_from(rank).ok()).unwrap_or(u32::MAX);
    limit / count + u32::from(rank < limit % count)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn worker(number: u128) -> Uuid {
        Uuid::from_u128(number)
    }

    fn holding(number: u128, connections: u32, wanted: u32) -> Holding {
        Holding { holder: worker(number), connections, wanted }
    }

    #[test]
    fn a_small_limit_is_a_token_at_a_time_and_a_large_one_a_tenth_at_once() {
        let pace = |per_minute| (Pace::of(per_minute).burst, (Pace::of(per_minute).per_s * 65.0).round());
        assert_eq!(pace(1), (1, 1.0));
        assert_eq!(pace(10), (1, 10.0));
        assert_eq!(pace(30), (3, 28.0));
        assert_eq!(pace(600), (60, 541.0));
    }

    #[test]
    fn the_first_worker_leaves_the_others_their_part() {
        let pace = Pace::of(600);
        assert_eq!(grant(60.0, 100, 1, pace), 60);
        assert_eq!(grant(60.0, 100, 2, pace), 30);
        assert_eq!(grant(2.9, 100, 2, pace), 2);
        assert_eq!([0.99, -7.0].map(|tokens| grant(tokens, 5, 1, pace)), [0, 0]);
        assert_eq!(grant(1.0, 5, 9, Pace::of(1)), 1, "even where there are more workers than tokens");
    }

    #[test]
    fn connections_go_to_who_wants_them_and_are_shared_when_another_goes_without() {
        assert_eq!(share(3, worker(1), 8, &[]), 3);
        assert_eq!(share(3, worker(2), 8, &[holding(1, 3, 8)]), 0, "none is free yet");
        assert_eq!(share(3, worker(1), 8, &[holding(2, 0, 8)]), 2, "so the other one gives one back");
        assert_eq!(share(3, worker(2), 8, &[holding(1, 2, 8)]), 1);
        assert_eq!(share(3, worker(1), 8, &[holding(2, 1, 8)]), 2, "and it stays so");
        assert_eq!(share(3, worker(1), 8, &[holding(2, 1, 1)]), 2);
        assert_eq!(
            share(3, worker(1), 8, &[holding(2, 1, 0)]),
            2,
            "one that the other only holds is not free"
        );
        assert_eq!(share(1, worker(2), 8, &[holding(1, 0, 8)]), 0, "one for two: the first one's");
        assert_eq!(share(1, worker(1), 8, &[holding(2, 1, 8)]), 0);
    }

    #[test]
    fn a_worker_without_mail_keeps_its_open_connections_until_another_wants_them() {
        assert_eq!(keep(3, 2, &[]), 2);
        assert_eq!(keep(3, 2, &[holding(1, 1, 1)]), 2);
        assert_eq!(keep(3, 2, &[holding(1, 1, 8)]), 0);
        assert_eq!(keep(3, 2, &[holding(1, 3, 8)]), 0, "they are gone already");
    }

    proptest! {
        #[test]
        fn no_sixty_seconds_see_more_than_the_limit(
            per_minute in 1u32..400,
            workers in 1usize..5,
            asks in proptest::collection::vec((0u64..3_000, 0u32..80, 0u64..=5_000), 1..400),
        ) {
            let pace = Pace::of(per_minute);
            let (mut tokens, mut now_ms, mut at_ms) = (f64::from(pace.burst), 0u64, 0u64);
            let mut used: Vec<u64> = Vec::new();
            for (pause_ms, wanted, later_ms) in asks {
                now_ms += pause_ms;
                tokens = refilled(tokens, Duration::from_millis(now_ms - at_ms), pace);
                at_ms = now_ms;
                let granted = grant(tokens, wanted, workers, pace);
                tokens -= f64::from(granted);
                used.extend((0..granted).map(|_| now_ms + later_ms));
            }
            used.sort_unstable();
            for (first, from) in used.iter().enumerate() {
                let within = used[first..].iter().take_while(|at| **at < from + 60_000).count();
                prop_assert!(within <= per_minute as usize, "{within} from {from} ms");
            }
        }

        #[test]
        fn no_more_connections_are_granted_than_there_are(
            limit in 1u32..20,
            asks in proptest::collection::vec((1u128..6, 0u32..12), 1..200),
        ) {
            let mut holdings: Vec<Holding> = Vec::new();
            for (number, wanted) in asks {
                let me = worker(number);
                holdings.retain(|held| held.holder != me);
                let connections = share(limit, me, wanted, &holdings);
                holdings.push(Holding { holder: me, connections, wanted });
                prop_assert!(holdings.iter().map(|held| held.connections).sum::<u32>() <= limit);
            }
            // Asking on in turns ends with everybody's share: nobody who wants one is short of it for ever.
            for _ in 0..3 {
                for index in 0..holdings.len() {
                    let Holding { holder, wanted, .. } = holdings[index];
                    let others: Vec<Holding> =
                        holdings.iter().filter(|held| held.holder != holder).copied().collect();
                    holdings[index].connections = share(limit, holder, wanted, &others);
                }
            }
            let askers = holdings.iter().filter(|held| held.wanted > 0).count() as u32;
            for held in &holdings {
                let least = limit.checked_div(askers).unwrap_or(0).min(held.wanted);
                prop_assert!(held.connections >= least, "{holdings:?}");
            }
        }
    }
}
