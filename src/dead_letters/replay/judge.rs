//! Whether what is in a letter can be sent at all, and by which lane.
//! Guarantee: what a worker would bury at once, for its body is no job, is not published.

use crate::broker::wire::{self, WireLimits};
use crate::broker::{Carried, Received};
use crate::model::lanes::{Lane, patterns_meet};
use crate::model::letter::Letter;
use crate::model::replay::Skip;
use crate::store::{Content, Unopened};

/// A letter's copy, but for what the ledger says of it.
pub(in crate::dead_letters) struct Ready {
    pub(in crate::dead_letters) message: Received,
    pub(in crate::dead_letters) lane: String,
}

/// The lanes of the settings, and the bounds of a job.
pub(in crate::dead_letters) struct Ways<'a> {
    pub(in crate::dead_letters) lanes: &'a [Lane],
    pub(in crate::dead_letters) limits: &'a WireLimits,
}

/// Reads what was opened of a letter; `None` where it was forgotten since it was drawn.
pub(in crate::dead_letters) fn ready(
    letter: &Letter,
    opened: Option<Result<Content, Unopened>>,
    ways: &Ways<'_>,
    otherwise: Option<&str>,
) -> Result<Ready, Skip> {
    let content = match opened {
        Some(Ok(content)) => content,
        Some(Err(error)) => {
            tracing::debug!(letter = %letter.letter, %error, "a dead letter cannot be opened");
            return Err(Skip::Unreadable);
        }
        None => return Err(Skip::Unreadable),
    };
    if wire::parse_job(&content.body, ways.limits).is_err() {
        return Err(Skip::NotAJob);
    }
    let lane = lane(letter, ways.lanes, otherwise).ok_or(Skip::Unroutable)?;
    let carried = serde_json::from_slice::<Carried>(&content.properties).map_err(|_| Skip::Unreadable)?;
    let message = Received::of_archive(content.body, letter.routing_key.clone(), carried);
    Ok(Ready { message, lane })
}

/// The lane that the letter died in, unless the settings have it no more; else the one that takes its routing key.
fn lane(letter: &Letter, lanes: &[Lane], otherwise: Option<&str>) -> Option<String> {
    let is_its = |lane: &&Lane| letter.lane.as_ref() == Some(&lane.name);
    let takes_it =
        |lane: &&Lane| lane.bindings.iter().any(|binding| patterns_meet(binding, &letter.routing_key));
    let found = lanes.iter().find(is_its).or_else(|| lanes.iter().find(takes_it));
    found.map(|lane| lane.name.as_str()).or(otherwise).map(str::to_owned)
}
