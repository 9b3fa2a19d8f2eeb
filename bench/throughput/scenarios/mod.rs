//! The scenarios, a file each.
//! Guarantee: each takes its numbers from the options, runs its repetitions by turns, and hands back one section of the report.

mod drain;

use super::context::Context;
use super::options::Scenario;
use super::report::Section;

/// Runs one.
pub async fn run(scenario: Scenario, bench: &Context, origin: String) -> anyhow::Result<Section> {
    match scenario {
        Scenario::Drain => drain::near(bench, origin).await,
        Scenario::Far => drain::far(bench, origin).await,
        _ => anyhow::bail!("not yet"),
    }
}
