//! `sendoff job status`: one job's story, from the ledger, or from the archive where the ledger never had the job.
//! Guarantee: the JSON is the same that the control command `job.status` gives.

use anyhow::{Context, bail};
use clap::Args;
use uuid::Uuid;

use crate::cli::dead::words;
use crate::cli::exit::Done;
use crate::cli::{output, story};
use crate::clock::Clock;
use crate::control::{job_status_json, letter_status_json};
use crate::model::job::JobKey;
use crate::model::ledger::JobStatus;
use crate::model::letter::Letter;
use crate::model::organization::OrganizationId;
use crate::parts;
use crate::settings::Settings;
use crate::store::Store;

#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  sendoff job status 0198c0de-0000-7000-8000-000000000001 --org 42\n\nThe states: claimed, \
    sent, deferred, parked, dead, unknown, cancelled. Exit code 1 when neither the ledger nor the archive of dead letters \
    knows such a job."
)]
pub(in crate::cli) struct StatusArgs {
    /// The job's id
    #[arg(value_parser = crate::cli::uuid)]
    id: Uuid,
    /// The job's organization; unless given, every organization's jobs and the platform's are looked through
    #[arg(long, value_name = "ORG", value_parser = OrganizationId::parse)]
    org: Option<OrganizationId>,
    /// The platform's job of this id
    #[arg(long, conflicts_with = "org")]
    platform: bool,
    /// Print it as JSON
    #[arg(long)]
    json: bool,
}

pub(in crate::cli) async fn run(args: &StatusArgs, settings: &Settings) -> anyhow::Result<Done> {
    let store = parts::store(settings, parts::COMMAND_CONNECTIONS)?;
    let known = ledger(args, &store).await.context("asking the ledger")?;
    let organization = if args.platform { Some("") } else { args.org.as_ref().map(OrganizationId::as_str) };
    let letters = store.letters_of(args.id, organization).await.context("asking the archive")?;
    if known.is_empty() {
        return from_archive(args, &letters);
    }
    let keys: Vec<_> = known.iter().map(|status| status.key.clone()).collect();
    only(&keys)?;
    let status = &known[0];
    if args.json {
        output::json(&job_status_json(status))?;
        return Ok(Done::Well);
    }
    let now = Clock::system().now();
    output::line(&format!("{}: {}", status.key, status.state.as_str()))?;
    story::job(status, now).iter().try_for_each(|line| output::line(line))?;
    for letter in letters.iter().filter(|letter| letter.key.as_ref() == Some(&status.key)) {
        words::deeds(letter, Some(status), now).iter().try_for_each(|line| output::line(line))?;
    }
    Ok(Done::Well)
}

async fn ledger(args: &StatusArgs, store: &Store) -> Result<Vec<JobStatus>, crate::store::StoreError> {
    if args.org.is_none() && !args.platform {
        return store.job_status_anywhere(args.id).await;
    }
    let key = JobKey { organization: args.org.clone(), id: args.id };
    Ok(store.job_status(&key).await?.into_iter().collect())
}

/// A job that no worker could take up has no row in the ledger, but a letter; so has one of which nobody can say whose it is.
fn from_archive(args: &StatusArgs, letters: &[Letter]) -> anyhow::Result<Done> {
    let Some(meant) = words::meant(letters, args.id) else {
        let whose = match &args.org {
            Some(org) => format!(" of organization {org}"),
            None if args.platform => " of the platform".to_owned(),
            None => String::new(),
        };
        bail!(
            "neither the ledger nor the archive knows a job {}{whose}; it was never published, is still queued, or is \
             forgotten by now",
            args.id
        );
    };
    if meant.letter.0 != args.id {
        only(&letters.iter().filter_map(|letter| letter.key.clone()).collect::<Vec<_>>())?;
    }
    let view = letter_status_json(meant);
    if args.json {
        output::json(&view)?;
        return Ok(Done::Well);
    }
    output::line(&format!("{}: {}", words::name(meant), view["state"].as_str().unwrap_or_default()))?;
    output::line("The ledger does not know it; the archive of dead letters does.")?;
    words::letter(meant, None, Clock::system().now()).iter().try_for_each(|line| output::line(line))?;
    Ok(Done::Well)
}

/// Refuses to choose between jobs of different organizations.
fn only(keys: &[JobKey]) -> anyhow::Result<()> {
    if keys.iter().all(|key| *key == keys[0]) {
        return Ok(());
    }
    let mut names: Vec<_> = keys.iter().map(ToString::to_string).collect();
    names.sort();
    names.dedup();
    bail!("{} jobs have this id: {}; choose one with --org or --platform", names.len(), names.join(", "));
}
