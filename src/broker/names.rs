//! What everything on the broker is called (contract section 2).
//! Guarantee: every name begins with `amqp.prefix`; no other file spells one out.

/// Names under one prefix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Names {
    prefix: String,
}

impl Names {
    /// Names under `amqp.prefix`.
    pub fn new(prefix: &str) -> Self {
        Self { prefix: prefix.to_owned() }
    }

    /// The exchange that publishers use.
    pub fn jobs(&self) -> String {
        format!("{}.jobs", self.prefix)
    }

    /// A lane's queue, and the exchange of the same name.
    pub fn lane(&self, lane: &str) -> String {
        format!("{}.jobs.{lane}", self.prefix)
    }

    /// The queue that holds a lane's jobs for so many seconds.
    pub fn retry(&self, lane: &str, delay_s: u32) -> String {
        format!("{}.retry.{lane}.{delay_s}", self.prefix)
    }

    /// Dead letters: exchange and queue.
    pub fn dead(&self) -> String {
        format!("{}.dead", self.prefix)
    }

    /// Jobs that no lane takes.
    pub fn unrouted(&self) -> String {
        format!("{}.unrouted", self.prefix)
    }

    /// Commands.
    pub fn control(&self) -> String {
        format!("{}.control", self.prefix)
    }

    /// Outcomes.
    pub fn events(&self) -> String {
        format!("{}.events", self.prefix)
    }

    /// Whether a queue of that name is, or could be, one of ours.
    pub fn owns(&self, queue: &str) -> bool {
        queue.strip_prefix(self.prefix.as_str()).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
    }

    /// The lane behind a lane queue's name.
    pub(super) fn lane_of(&self, queue: &str) -> Option<String> {
        queue.strip_prefix(&self.lane("")).filter(|lane| !lane.is_empty()).map(str::to_owned)
    }
}
