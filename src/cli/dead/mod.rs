//! `sendoff dead`: the archive of dead letters, looked at and worked on.
//! Guarantee: no address of a letter is shown unless asked for with --reveal, and no control character of one ever reaches
//! the terminal.

mod discard;
mod filter;
mod governed;
mod list;
mod message;
mod replay;
mod show;
mod stats;
mod view;
pub(super) mod words;

use clap::Subcommand;

use super::exit::Done;
use crate::settings::{Needs, Settings};

#[derive(Debug, Subcommand)]
#[command(
    after_help = "Examples:\n  sendoff dead stats --since 24h\n  sendoff dead list --org 42 --reason message_refused\n  \
    sendoff dead show 0198c0de-0000-7000-8000-000000000001\n  sendoff dead replay --org 42 --reason message_refused --dry-run\n  \
    sendoff dead discard --reason malformed --until 7d"
)]
pub(super) enum DeadCommand {
    /// List dead letters, the one that died last first
    List(Box<list::ListArgs>),
    /// Tell the whole story of a letter, with its message
    Show(show::ShowArgs),
    /// Count dead letters by reason, organization and age
    Stats(Box<stats::StatsArgs>),
    /// Send dead letters again
    Replay(Box<replay::ReplayArgs>),
    /// Give dead letters up
    Discard(Box<discard::DiscardArgs>),
}

impl DeadCommand {
    /// What the settings must have. Only content needs a key, and `show` says so where it lacks one.
    pub(super) fn needs(&self) -> Needs {
        match self {
            Self::List(_) | Self::Show(_) | Self::Stats(_) | Self::Discard(_) => Needs::DATABASE,
            Self::Replay(_) => Needs::ALL,
        }
    }
}

pub(super) async fn run(command: &DeadCommand, settings: &Settings) -> anyhow::Result<Done> {
    match command {
        DeadCommand::List(args) => list::run(args, settings).await,
        DeadCommand::Show(args) => show::run(args, settings).await,
        DeadCommand::Stats(args) => stats::run(args, settings).await,
        DeadCommand::Replay(args) => replay::run(args, settings).await,
        DeadCommand::Discard(args) => discard::run(args, settings).await,
    }
}
