//! How long a job is put aside that waits for its account's rate, by how many are aside already.
//! Guarantee: pure; the shortest delays have no more jobs than go in the time that they cover, so that what comes back finds room
//! and most come back seldom; organizations that share an account each have their part of that.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use tokio::time::Instant;

use crate::model::organization::OrganizationId;
use crate::model::schedule::ASIDE_S;

/// Jobs that come back at about this time, so many.
type Returning = VecDeque<(Instant, usize)>;

/// Jobs that return within so short a time of each other are counted as one entry.
const GRAIN: Duration = Duration::from_millis(250);

/// What this worker has put aside of one account.
#[derive(Debug, Default)]
pub struct Aside {
    by_organization: HashMap<Option<OrganizationId>, [Returning; ASIDE_S.len()]>,
}

impl Aside {
    /// Books one more job, where one goes in each `pace`; says for how long, in seconds. A job that comes back has its place in
    /// front of those that are to come back later.
    pub fn put(&mut self, organization: Option<&OrganizationId>, pace: Duration, now: Instant) -> u32 {
        self.forget(now);
        let organization = organization.cloned();
        let newcomer = usize::from(!self.by_organization.contains_key(&organization));
        let sharers = self.by_organization.len() + newcomer;
        let bands = self.by_organization.entry(organization).or_default();
        let per_job_s = pace.as_secs_f64() * sharers as f64;
        let room = |band: usize| {
            let covered_s = f64::from(ASIDE_S.get(band + 1)? - ASIDE_S[band]);
            Some((covered_s / per_job_s).ceil() as usize)
        };
        let count = |returning: &Returning| returning.iter().map(|(_, count)| *count).sum::<usize>();
        let fits = |band: &usize| room(*band).is_none_or(|room| count(&bands[*band]) < room);
        let band = (0..ASIDE_S.len()).find(fits).unwrap_or(ASIDE_S.len() - 1);
        let at = now + Duration::from_secs(u64::from(ASIDE_S[band]));
        match bands[band].back_mut() {
            Some((last, count)) if at.duration_since(*last) < GRAIN => *count += 1,
            _ => bands[band].push_back((at, 1)),
        }
        ASIDE_S[band]
    }

    /// What has come back by now.
    fn forget(&mut self, now: Instant) {
        for bands in self.by_organization.values_mut() {
            for returning in bands {
                while returning.front().is_some_and(|(at, _)| *at <= now) {
                    returning.pop_front();
                }
            }
        }
        self.by_organization.retain(|_, bands| bands.iter().any(|returning| !returning.is_empty()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn delays(aside: &mut Aside, organization: &str, count: usize, now: Instant) -> [usize; 4] {
        let organization = OrganizationId::parse(organization).ok();
        let mut delays = [0; 4];
        for _ in 0..count {
            let delay_s = aside.put(organization.as_ref(), Duration::from_secs(2), now);
            delays[ASIDE_S.iter().position(|step| *step == delay_s).unwrap()] += 1;
        }
        delays
    }

    #[test]
    fn of_ten_thousand_jobs_few_come_back_soon() {
        let mut aside = Aside::default();
        let now = Instant::now();
        // One goes in two seconds: 13 until the next come back after 30 s, 45 until 120 s, 240 until 600 s.
        assert_eq!(delays(&mut aside, "acme", 10_000, now), [13, 45, 240, 9702]);
        let later = now + Duration::from_secs(5);
        assert_eq!(delays(&mut aside, "acme", 12, later), [12, 0, 0, 0], "what has come back waits next");
        assert_eq!(delays(&mut aside, "acme", 2, later), [1, 0, 0, 1]);
    }

    #[test]
    fn an_organization_that_shares_an_account_is_not_behind_all_of_anothers() {
        let mut aside = Aside::default();
        let now = Instant::now();
        delays(&mut aside, "flood", 10_000, now);
        assert_eq!(delays(&mut aside, "small", 3, now), [3, 0, 0, 0]);
        let later = now + Duration::from_secs(5);
        assert_eq!(delays(&mut aside, "small", 3, later)[0], 3);
        assert_eq!(delays(&mut aside, "flood", 13, later)[0], 7, "half of what it had alone");
    }

    #[test]
    fn what_has_come_back_is_forgotten() {
        let mut aside = Aside::default();
        let now = Instant::now();
        delays(&mut aside, "acme", 500, now);
        aside.forget(now + Duration::from_secs(600));
        assert!(aside.by_organization.is_empty());
    }
}
