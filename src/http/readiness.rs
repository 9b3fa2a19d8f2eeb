//! Which parts of the program are usable now.
//! Guarantee: a part is not ready until it has said so.

use serde::Serialize;
use tokio::sync::watch;

/// What readiness depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// Connected to RabbitMQ and the topology declared.
    Broker,
    /// PostgreSQL answers.
    Database,
    /// The schema is this program's.
    Schema,
    /// Every stored credential's key is in the ring.
    Keys,
}

/// The parts' states; cheap to clone, every clone sees the same.
#[derive(Debug, Clone)]
pub struct Readiness {
    parts: watch::Sender<Parts>,
}

/// What `/readyz` tells of the parts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Parts {
    broker: State,
    database: State,
    schema: State,
    keys: State,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct State {
    ok: bool,
    /// What is wrong; `null` when nothing is.
    detail: Option<String>,
}

impl State {
    fn starting() -> Self {
        Self { ok: false, detail: Some("starting".to_owned()) }
    }
}

#[derive(Serialize)]
struct Report<'a> {
    ready: bool,
    parts: &'a Parts,
}

impl Default for Readiness {
    fn default() -> Self {
        Self::new()
    }
}

impl Readiness {
    /// Every part is starting.
    pub fn new() -> Self {
        let [broker, database, schema, keys] = std::array::from_fn(|_| State::starting());
        Self { parts: watch::Sender::new(Parts { broker, database, schema, keys }) }
    }

    /// The part can be used.
    pub fn up(&self, part: Part) {
        self.set(part, State { ok: true, detail: None });
    }

    /// The part cannot be used; `detail` says why, without any secret.
    pub fn down(&self, part: Part, detail: impl Into<String>) {
        self.set(part, State { ok: false, detail: Some(detail.into()) });
    }

    /// Whether every part can be used.
    pub fn is_ready(&self) -> bool {
        self.parts.borrow().all_ok()
    }

    /// Ends when every part can be used.
    pub async fn ready(&self) {
        // Fails only when the sender is gone, and `self` holds it.
        let _ = self.parts.subscribe().wait_for(Parts::all_ok).await;
    }

    /// Whether all is ready, and the JSON that tells it.
    pub(super) fn report(&self) -> (bool, String) {
        let parts = self.parts.borrow().clone();
        let ready = parts.all_ok();
        let json = serde_json::to_string(&Report { ready, parts: &parts });
        (ready, json.expect("flags and texts are always JSON"))
    }

    fn set(&self, part: Part, state: State) {
        self.parts.send_if_modified(|parts| {
            let current = match part {
                Part::Broker => &mut parts.broker,
                Part::Database => &mut parts.database,
                Part::Schema => &mut parts.schema,
                Part::Keys => &mut parts.keys,
            };
            let changed = *current != state;
            *current = state;
            changed
        });
    }
}

impl Parts {
    fn all_ok(&self) -> bool {
        [&self.broker, &self.database, &self.schema, &self.keys].iter().all(|state| state.ok)
    }
}
