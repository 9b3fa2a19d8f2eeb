//! `sendoff job`: send one, or ask what became of one.
//! Guarantee: what is sent has passed the worker's own validation first.

use clap::Subcommand;

pub(super) mod send;
pub(super) mod status;

#[derive(Debug, Subcommand)]
#[command(
    after_help = "Examples:\n  sendoff job send --org 42 --to ann@example.org --subject Hello --text 'It works' --wait\n  \
    sendoff job status 0198c0de-0000-7000-8000-000000000001 --org 42"
)]
pub(super) enum JobCommand {
    /// Publish a job
    Send(Box<send::SendArgs>),
    /// Tell what became of a job
    Status(status::StatusArgs),
}
