//! Which claims this process works on, so that a claim whose answer was lost can be told from one at work.
//! Guarantee: a key is here from the granted claim until its settle, or its gate's `NotOwner`, was answered.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard};

use crate::model::job::JobKey;

/// One grant of a key; a later grant of the same key is another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Token(u64);

#[derive(Default)]
pub(super) struct Grants(Mutex<Inner>);

#[derive(Default)]
struct Inner {
    next: u64,
    at_work: HashMap<JobKey, Token>,
}

impl Grants {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().expect("nothing panics while it holds this lock")
    }

    pub(super) fn grant(&self, key: &JobKey) {
        let mut inner = self.inner();
        inner.next += 1;
        let token = Token(inner.next);
        inner.at_work.insert(key.clone(), token);
    }

    pub(super) fn token(&self, key: &JobKey) -> Option<Token> {
        self.inner().at_work.get(key).copied()
    }

    /// Ends this grant; a later one of the same key stays.
    pub(super) fn end(&self, key: &JobKey, token: Option<Token>) {
        let mut inner = self.inner();
        if token.is_some() && inner.at_work.get(key).copied() == token {
            inner.at_work.remove(key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_an_earlier_grant_leaves_the_later_one() {
        let grants = Grants::default();
        let key = JobKey { organization: None, id: uuid::Uuid::from_u128(1) };
        grants.grant(&key);
        let first = grants.token(&key);
        grants.grant(&key);
        grants.end(&key, first);
        assert!(grants.token(&key).is_some_and(|token| Some(token) != first));
        grants.end(&key, grants.token(&key));
        assert_eq!(grants.token(&key), None);
        grants.end(&key, None);
    }
}
