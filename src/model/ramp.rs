//! How fast parked letters go back to their lanes.
//! Guarantee: pure; no organization goes faster than its ramp allows, all together not faster than the total, and none waits
//! for another's letters to be through.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::organization::OrganizationId;

/// Letters of one organization in the first second; twice as many in each further one.
pub const FIRST_RATE: u64 = 1;
/// The most of one organization in a second: what a small server takes without throttling.
pub const ORGANIZATION_RATE: u64 = 50;
/// The most of all organizations in a second: little beside what a lane carries.
pub const TOTAL_RATE: u64 = 200;
/// What was missed in a longer pause than this is not made up for.
const LONGEST_STEP: Duration = Duration::from_secs(1);

/// The organizations whose letters are going back now.
#[derive(Debug, Default)]
pub struct Ramps {
    /// How long each has been going.
    since: BTreeMap<OrganizationId, Duration>,
    last: Option<Duration>,
    /// Who was served last: the next one begins.
    served: Option<OrganizationId>,
}

impl Ramps {
    /// How many letters each of the `ready` organizations may release now. `now` is any clock that goes forward only. An
    /// organization that is not among the ready ones has stopped, and begins anew.
    pub fn shares(
        &mut self,
        ready: &BTreeSet<OrganizationId>,
        now: Duration,
    ) -> BTreeMap<OrganizationId, u32> {
        let step = self.last.map_or(LONGEST_STEP, |last| now.saturating_sub(last).min(LONGEST_STEP));
        self.last = Some(now);
        self.since.retain(|organization, _| ready.contains(organization));
        let mut wanted: BTreeMap<OrganizationId, u64> = BTreeMap::new();
        for organization in ready {
            let want = match self.since.get_mut(organization) {
                Some(since) => {
                    let before = allowed(*since);
                    *since += step;
                    allowed(*since) - before
                }
                None => {
                    self.since.insert(organization.clone(), Duration::ZERO);
                    allowed(Duration::ZERO)
                }
            };
            wanted.insert(organization.clone(), want);
        }
        self.deal(wanted, TOTAL_RATE * millis(step) / 1000)
    }

    /// One each in turn, until nobody wants more or nothing is left.
    fn deal(
        &mut self,
        mut wanted: BTreeMap<OrganizationId, u64>,
        mut left: u64,
    ) -> BTreeMap<OrganizationId, u32> {
        let mut shares: BTreeMap<OrganizationId, u32> = BTreeMap::new();
        wanted.retain(|_, want| *want > 0);
        let behind = |served: &OrganizationId| {
            let mut behind: Vec<_> = wanted.keys().filter(|next| *next > served).cloned().collect();
            behind.extend(wanted.keys().filter(|next| *next <= served).cloned());
            behind
        };
        let order = self.served.as_ref().map_or_else(|| wanted.keys().cloned().collect(), behind);
        while left > 0 && !wanted.is_empty() {
            for organization in &order {
                let Some(want) = wanted.get_mut(organization) else { continue };
                if left == 0 {
                    break;
                }
                left -= 1;
                *want -= 1;
                *shares.entry(organization.clone()).or_default() += 1;
                self.served = Some(organization.clone());
                if *want == 0 {
                    wanted.remove(organization);
                }
            }
        }
        shares
    }
}

/// Letters since the beginning: one at once, then as many a second as that second's rate.
fn allowed(since: Duration) -> u64 {
    let rate = |second: u64| {
        let doubled = u32::try_from(second).ok().and_then(|second| FIRST_RATE.checked_shl(second));
        doubled.filter(|rate| *rate > 0).map_or(ORGANIZATION_RATE, |rate| rate.min(ORGANIZATION_RATE))
    };
    // From here on the rate is the cap.
    let steep = u64::from(ORGANIZATION_RATE.ilog2()) + 1;
    let seconds = since.as_secs();
    let whole: u64 = (0..seconds.min(steep)).map(rate).sum();
    let rest = seconds.saturating_sub(steep) * ORGANIZATION_RATE;
    1 + whole + rest + rate(seconds) * u64::from(since.subsec_millis()) / 1000
}

fn millis(step: Duration) -> u64 {
    u64::try_from(step.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn organization(id: &str) -> OrganizationId {
        OrganizationId::parse(id).unwrap()
    }

    fn ready(ids: &[&str]) -> BTreeSet<OrganizationId> {
        ids.iter().map(|id| organization(id)).collect()
    }

    /// What one organization gets in each of the first seconds, at half a second's steps.
    fn by_second(ramps: &mut Ramps, from: u64, seconds: u64) -> Vec<u32> {
        let ready = ready(&["acme"]);
        let mut share = |at: u64| {
            let shares = ramps.shares(&ready, Duration::from_millis(at));
            shares.values().sum::<u32>()
        };
        (from..from + seconds).map(|second| share(1000 * second) + share(1000 * second + 500)).collect()
    }

    #[test]
    fn a_release_begins_slowly_and_doubles_up_to_a_cap() {
        let mut ramps = Ramps::default();
        assert_eq!(by_second(&mut ramps, 0, 9), [1, 2, 3, 6, 12, 24, 41, 50, 50]);
    }

    #[test]
    fn who_stops_begins_anew() {
        let mut ramps = Ramps::default();
        assert_eq!(*by_second(&mut ramps, 0, 9).last().unwrap(), 50);
        assert!(ramps.shares(&BTreeSet::new(), Duration::from_secs(9)).is_empty());
        assert_eq!(by_second(&mut ramps, 10, 2), [1, 2]);
    }

    #[test]
    fn a_pause_is_not_made_up_for() {
        let mut ramps = Ramps::default();
        by_second(&mut ramps, 0, 10);
        let shares = ramps.shares(&ready(&["acme"]), Duration::from_secs(3600));
        assert_eq!(shares.values().sum::<u32>(), 50);
    }

    #[test]
    fn all_together_stay_below_the_total_and_take_turns() {
        let ids: Vec<String> = (0..500).map(|id| format!("o{id:03}")).collect();
        let all = ready(&ids.iter().map(String::as_str).collect::<Vec<_>>());
        let mut ramps = Ramps::default();
        let mut given: BTreeMap<OrganizationId, u32> = BTreeMap::new();
        for second in 0..5 {
            let shares = ramps.shares(&all, Duration::from_secs(second));
            assert!(u64::from(shares.values().sum::<u32>()) <= TOTAL_RATE);
            shares.into_iter().for_each(|(organization, share)| {
                *given.entry(organization).or_default() += share;
            });
        }
        assert_eq!(given.len(), 500, "nobody is left out");
        assert!(given.values().all(|share| *share == 2), "{given:?}");
    }

    #[test]
    fn one_with_many_letters_leaves_room_for_another() {
        let mut ramps = Ramps::default();
        by_second(&mut ramps, 0, 9);
        let shares = ramps.shares(&ready(&["acme", "beta"]), Duration::from_secs(9));
        assert_eq!(shares[&organization("beta")], 1);
    }
}
