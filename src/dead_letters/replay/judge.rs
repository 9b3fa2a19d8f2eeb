//! Whether what is in a letter can be sent at all, and by which lane.
//! Guarantee: what a worker would bury at once, for its body is no job, is not published.

use crate::broker::wire;
use crate::broker::{Carried, Received};
use crate::model::lanes::{Lane, patterns_meet};
use crate::model::letter::Letter;
use crate::model::replay::Skip;

use super::{Ended, Replayer};

/// A letter's copy, but for what the ledger says of it.
pub(super) struct Ready {
    pub(super) message: Received,
    pub(super) lane: String,
}

impl Replayer {
    /// Opens a letter and reads its body.
    pub(super) async fn ready(
        &self,
        letter: &Letter,
        otherwise: Option<&str>,
    ) -> Result<Result<Ready, Skip>, Ended> {
        let Some(lane) = lane(letter, &self.lanes, otherwise) else { return Ok(Err(Skip::Unroutable)) };
        let opened = match self.ask(async || self.archive.open(letter.letter).await).await? {
            Some(Ok(content)) => content,
            Some(Err(error)) => {
                tracing::warn!(letter = %letter.letter, %error, "a dead letter cannot be opened");
                return Ok(Err(Skip::Unreadable));
            }
            // Past its retention, and forgotten since it was drawn.
            None => return Ok(Err(Skip::Unreadable)),
        };
        if wire::parse_job(&opened.body, &self.limits).is_err() {
            return Ok(Err(Skip::NotAJob));
        }
        let Ok(carried) = serde_json::from_slice::<Carried>(&opened.properties) else {
            return Ok(Err(Skip::Unreadable));
        };
        let message = Received::of_archive(opened.body, letter.routing_key.clone(), carried);
        Ok(Ok(Ready { message, lane }))
    }
}

/// The lane that the letter died in, unless the settings have it no more; else the one that takes its routing key.
fn lane(letter: &Letter, lanes: &[Lane], otherwise: Option<&str>) -> Option<String> {
    let is_its = |lane: &&Lane| letter.lane.as_ref() == Some(&lane.name);
    let takes_it =
        |lane: &&Lane| lane.bindings.iter().any(|binding| patterns_meet(binding, &letter.routing_key));
    let found = lanes.iter().find(is_its).or_else(|| lanes.iter().find(takes_it));
    found.map(|lane| lane.name.as_str()).or(otherwise).map(str::to_owned)
}
