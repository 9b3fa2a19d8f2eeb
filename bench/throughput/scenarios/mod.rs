//! The scenarios.
//! Guarantee: each takes its numbers from the options, runs what is compared by turns, and hands back one section of the report.

mod drain;
mod flood;
mod idle;
mod isolation;
mod reminders;
mod size;
mod watching;

use super::context::Context;
use super::options::Scenario;
use super::report::Section;

/// Runs one.
pub async fn run(scenario: Scenario, bench: &Context, origin: String) -> anyhow::Result<Section> {
    match scenario {
        Scenario::Drain => drain::near(bench, origin).await,
        Scenario::Far => drain::far(bench, origin).await,
        Scenario::Isolation => isolation::run(bench, origin).await,
        Scenario::Flood => flood::run(bench, origin).await,
        Scenario::Reminders => reminders::run(bench, origin).await,
        Scenario::Tenants => size::tenants(bench, origin).await,
        Scenario::Backlog => size::backlog(bench, origin).await,
        Scenario::Idle => idle::run(bench, origin).await,
    }
}
