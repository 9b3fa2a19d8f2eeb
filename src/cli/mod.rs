//! The command line: what can be asked for, and how a command's end becomes an exit code.
//! Guarantee: an error is one message on standard error that says what to do; a reader that closes the pipe ends a command
//! quietly; no password is ever an argument.

mod check;
mod dead;
mod exit;
mod job;
mod keys;
mod migrate;
mod org;
mod output;
mod password;
mod run;
mod schema;
mod story;
mod topology;
mod user;
mod worker;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, Subcommand};
use uuid::Uuid;

use crate::settings::{Needs, Settings};
use crate::telemetry;

/// What `sendoff` was asked to do.
#[derive(Debug, Parser)]
#[command(
    name = "sendoff",
    version,
    about = "A background email worker: jobs from RabbitMQ, sent through each \
    organization's own SMTP server",
    after_help = "Examples:\n  sendoff keys generate\n  sendoff check\n  sendoff worker\n  \
    sendoff job send --org 42 --to ann@example.org --subject Hello --text 'It works' --wait\n  \
    sendoff dead stats --since 24h\n\nExit codes: 0 done, 1 \
    failed, 2 usage, 3 database or broker unreachable",
    max_term_width = 110
)]
struct Cli {
    /// Settings file (TOML); the environment wins over it
    #[arg(long, global = true, value_name = "PATH")]
    config: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Work: job lanes, control commands, health and metrics
    Worker(worker::WorkerArgs),
    /// Verify settings, database, broker, keys and DNS
    Check(check::CheckArgs),
    /// Bring the database's schema up to date
    Migrate(migrate::MigrateArgs),
    /// The exchanges and queues on the broker
    #[command(subcommand)]
    Topology(topology::TopologyCommand),
    /// Send a job, or ask what became of one
    #[command(subcommand)]
    Job(job::JobCommand),
    /// Dead letters: look at them, send them again, give them up
    #[command(subcommand)]
    Dead(dead::DeadCommand),
    /// An organization's SMTP server and features
    #[command(subcommand)]
    Org(org::OrgCommand),
    /// The keys that stored credentials and dead letters are encrypted under
    #[command(subcommand)]
    Keys(keys::KeysCommand),
    /// JSON Schemas of jobs, commands and events, and the AsyncAPI document
    #[command(subcommand)]
    Schema(schema::SchemaCommand),
}

/// Parses the arguments, and does what they say. `worker` is given the settings and the drain timeout, and ends when the
/// worker has stopped.
pub async fn main<W>(worker: W) -> ExitCode
where
    W: AsyncFnOnce(Settings, Duration) -> anyhow::Result<()>,
{
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(answer) => {
            // Help goes to standard output, a usage error to standard error; who closed either does not want it.
            let _ = answer.print();
            return ExitCode::from(u8::try_from(answer.exit_code()).unwrap_or(exit::USAGE));
        }
    };
    exit::code(&run(cli, worker).await)
}

async fn run<W>(cli: Cli, worker: W) -> anyhow::Result<exit::Done>
where
    W: AsyncFnOnce(Settings, Duration) -> anyhow::Result<()>,
{
    let filter = match cli.command {
        Command::Worker(_) => telemetry::WORKER_FILTER,
        _ => telemetry::COMMAND_FILTER,
    };
    telemetry::start_logs(filter)?;
    let config = cli.config.as_deref();
    let load = |needs: Needs| Settings::load(config, needs);
    match cli.command {
        Command::Worker(args) => {
            worker(load(Needs::ALL)?, args.drain_timeout).await?;
            Ok(exit::Done::Well)
        }
        Command::Check(args) => check::run(&args, load(Needs::ALL)).await,
        Command::Migrate(args) => migrate::run(&args, &load(Needs::DATABASE)?).await,
        Command::Topology(topology::TopologyCommand::Declare(args)) => {
            topology::declare(&args, &load(Needs::DATABASE)?).await
        }
        Command::Topology(topology::TopologyCommand::Show(args)) => {
            topology::show(&args, &load(Needs::NOTHING)?)
        }
        Command::Job(job::JobCommand::Send(args)) => job::send::run(&args, &load(Needs::NOTHING)?).await,
        Command::Job(job::JobCommand::Status(args)) => job::status::run(&args, &load(Needs::DATABASE)?).await,
        Command::Dead(command) => dead::run(&command, &load(command.needs())?).await,
        Command::Org(command) => org::run(&command, &load(Needs::NOTHING)?).await,
        Command::Keys(keys::KeysCommand::Generate(args)) => keys::generate(&args),
        Command::Keys(keys::KeysCommand::Status(args)) => keys::status::run(&args, &load(Needs::ALL)?).await,
        Command::Keys(keys::KeysCommand::Rotate(args)) => keys::rotate::run(&args, &load(Needs::ALL)?).await,
        Command::Schema(command) => schema::run(&command, &load(Needs::NOTHING)?),
    }
}

/// An id as an argument.
fn uuid(text: &str) -> Result<Uuid, String> {
    text.parse().map_err(|_| "an id is a UUID, 32 hexadecimal digits in groups of 8-4-4-4-12".to_owned())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn visit(command: &clap::Command, path: &str, commands: &mut Vec<(String, clap::Command)>) {
        let path = format!("{path} {}", command.get_name()).trim().to_owned();
        commands.push((path.clone(), command.clone()));
        command.get_subcommands().filter(|c| c.get_name() != "help").for_each(|c| visit(c, &path, commands));
    }

    #[test]
    fn every_command_has_a_purpose_and_an_example() {
        let mut commands = Vec::new();
        Cli::command().debug_assert();
        visit(&Cli::command(), "", &mut commands);
        for (path, command) in commands {
            assert!(command.get_about().is_some(), "{path}");
            let after = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert!(after.contains("Example") && after.contains(&path), "{path}: {after}");
        }
    }

    #[test]
    fn no_argument_takes_a_password() {
        let mut commands = Vec::new();
        visit(&Cli::command(), "", &mut commands);
        for (path, command) in commands {
            assert!(command.get_arguments().all(|argument| argument.get_id() != "password"), "{path}");
        }
    }
}
