//! Opened configurations in memory, so that a send asks the database for none.
//! Guarantee: what [`ConfigCache::confirm`] returns was read no earlier than what it was asked to confirm; one load per
//! organization at a time, whose failure is everybody's who waited for it; never more organizations than the capacity.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use super::StoreError;
use super::config_changes::{ConfigChange, ConfigChanges};
use super::smtp_configs::{RouteFacts, SmtpConfigs};
use crate::model::organization::OrganizationId;

/// Organizations held by default; the one loaded first goes first.
pub const CONFIG_CACHE_CAPACITY: usize = 20_000;

/// The cache. Organizations without configuration are held too. Cheap to clone; all clones are one cache.
#[derive(Clone)]
pub struct ConfigCache(Arc<Inner>);

struct Inner {
    configs: SmtpConfigs,
    capacity: usize,
    slots: Mutex<Slots>,
    /// Numbers the loads in the order in which they begin.
    loads: AtomicU64,
}

#[derive(Default)]
struct Slots {
    by_organization: HashMap<OrganizationId, Arc<Slot>>,
    by_age: BTreeMap<u64, OrganizationId>,
    next_age: u64,
}

struct Slot {
    age: u64,
    held: Mutex<Option<Held>>,
    /// Taken during a load; holds the last one's number and error, if it failed.
    loading: tokio::sync::Mutex<Option<(u64, StoreError)>>,
}

#[derive(Clone)]
struct Held {
    facts: Arc<RouteFacts>,
    load: u64,
}

impl ConfigCache {
    /// An empty cache for at most `capacity` organizations.
    pub fn new(configs: SmtpConfigs, capacity: usize) -> Self {
        let slots = Mutex::new(Slots::default());
        Self(Arc::new(Inner { configs, capacity: capacity.max(1), slots, loads: AtomicU64::new(0) }))
    }

    /// The organization's facts, loaded when they are not held.
    ///
    /// # Errors
    /// When the database does not answer; the next call tries again.
    pub async fn get(&self, organization: &OrganizationId) -> Result<Arc<RouteFacts>, StoreError> {
        self.facts(organization, |_, _| true).await
    }

    /// The organization's facts, at least as new as a claim's answer that said `custom_smtp`, `config_version` and whether
    /// that version is failing.
    ///
    /// # Errors
    /// When the database does not answer; the next call tries again.
    pub async fn confirm(
        &self,
        organization: &OrganizationId,
        custom_smtp: bool,
        config_version: Option<i64>,
        failing: bool,
    ) -> Result<Arc<RouteFacts>, StoreError> {
        self.facts(organization, |held, begun| {
            let equal = held.facts.custom_smtp == custom_smtp
                && held.facts.config_version() == config_version
                && held.facts.health.failing.is_some() == failing;
            // Versions never restart, so a higher one was read later.
            let newer = config_version.is_some() && held.facts.config_version() > config_version;
            // A load that began after the answer was there has seen at least what the answer saw.
            equal || newer || held.load > begun
        })
        .await
    }

    /// Forgets one organization.
    pub fn invalidate(&self, organization: &OrganizationId) {
        self.slots().remove(organization);
    }

    /// Forgets everything.
    pub fn clear(&self) {
        let mut slots = self.slots();
        slots.by_organization.clear();
        slots.by_age.clear();
    }

    /// How many organizations are held.
    pub fn len(&self) -> usize {
        self.slots().by_organization.len()
    }

    /// Whether none is held.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Forgets what changes, for ever; to be run beside the work and dropped at its end.
    pub async fn follow(&self, mut changes: ConfigChanges) {
        loop {
            match changes.next().await {
                ConfigChange::Of(organization) => self.invalidate(&organization),
                ConfigChange::Reset => self.clear(),
            }
        }
    }

    /// `good` is told what is held, and the number of the last load that had begun before this call.
    async fn facts(
        &self,
        organization: &OrganizationId,
        good: impl Fn(&Held, u64) -> bool,
    ) -> Result<Arc<RouteFacts>, StoreError> {
        let begun = self.0.loads.load(Ordering::Acquire);
        let slot = self.slots().get_or_insert(organization, self.0.capacity);
        if let Some(held) = slot.held().filter(|held| good(held, begun)) {
            return Ok(held.facts);
        }
        let mut failed = slot.loading.lock().await;
        if let Some(held) = slot.held().filter(|held| good(held, begun)) {
            return Ok(held.facts);
        }
        // Or all who wait would try one after the other, each as long as the database does not answer.
        if let Some((_, error)) = failed.as_ref().filter(|(load, _)| *load > begun) {
            return Err(error.clone());
        }
        let load = self.0.loads.fetch_add(1, Ordering::AcqRel) + 1;
        match self.0.configs.load_for_sending(organization).await {
            Ok(facts) => {
                let facts = Arc::new(facts);
                slot.hold(Held { facts: facts.clone(), load });
                Ok(facts)
            }
            Err(error) => {
                *failed = Some((load, error.clone()));
                Err(error)
            }
        }
    }

    fn slots(&self) -> MutexGuard<'_, Slots> {
        self.0.slots.lock().expect("nothing panics under this lock")
    }
}

impl Slots {
    fn get_or_insert(&mut self, organization: &OrganizationId, capacity: usize) -> Arc<Slot> {
        if let Some(slot) = self.by_organization.get(organization) {
            return slot.clone();
        }
        while self.by_organization.len() >= capacity
            && let Some((_, oldest)) = self.by_age.pop_first()
        {
            self.by_organization.remove(&oldest);
        }
        let age = self.next_age;
        self.next_age += 1;
        let slot = Arc::new(Slot { age, held: Mutex::new(None), loading: tokio::sync::Mutex::new(None) });
        self.by_organization.insert(organization.clone(), slot.clone());
        self.by_age.insert(age, organization.clone());
        slot
    }

    /// A load under way keeps its slot to itself; whoever comes later gets a new one.
    fn remove(&mut self, organization: &OrganizationId) {
        if let Some(slot) = self.by_organization.remove(organization) {
            self.by_age.remove(&slot.age);
        }
    }
}

impl Slot {
    fn held(&self) -> Option<Held> {
        self.held.lock().expect("nothing panics under this lock").clone()
    }

    fn hold(&self, held: Held) {
        *self.held.lock().expect("nothing panics under this lock") = Some(held);
    }
}
