//! `sendoff job status`: the ledger's answer about one job.
//! Guarantee: the JSON is the same that the control command `job.status` gives.

use anyhow::{Context, bail};
use clap::Args;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use uuid::Uuid;

use crate::cli::exit::Done;
use crate::cli::output;
use crate::control::job_status_json;
use crate::model::job::JobKey;
use crate::model::ledger::JobStatus;
use crate::model::organization::OrganizationId;
use crate::parts;
use crate::settings::Settings;

#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  sendoff job status 0198c0de-0000-7000-8000-000000000001 --org 42\n\nThe states: claimed, \
    sent, deferred, parked, dead, unknown, cancelled. Exit code 1 when the ledger knows no such job."
)]
pub(in crate::cli) struct StatusArgs {
    /// The job's id
    id: Uuid,
    /// The job's organization; unless given, every organization's jobs and the platform's are looked through
    #[arg(long, value_name = "ORG", value_parser = OrganizationId::parse)]
    org: Option<OrganizationId>,
    /// Print it as JSON
    #[arg(long)]
    json: bool,
}

pub(in crate::cli) async fn run(args: &StatusArgs, settings: &Settings) -> anyhow::Result<Done> {
    let store = parts::store(settings, parts::COMMAND_CONNECTIONS)?;
    let found = match &args.org {
        Some(org) => {
            let key = JobKey { organization: Some(org.clone()), id: args.id };
            store.job_status(&key).await.map(|status| status.into_iter().collect())
        }
        None => store.job_status_anywhere(args.id).await,
    };
    let found: Vec<JobStatus> = found.context("asking the ledger")?;
    match found.as_slice() {
        [] => bail!(
            "the ledger knows no job {}{}; it was never published, is still queued, or is forgotten by now",
            args.id,
            args.org.as_ref().map(|org| format!(" of organization {org}")).unwrap_or_default()
        ),
        [status] if args.json => output::json(&job_status_json(&status.key, status))?,
        [status] => words(status).iter().try_for_each(|line| output::line(line))?,
        several => {
            let keys: Vec<_> = several.iter().map(|status| status.key.to_string()).collect();
            bail!("{} jobs have this id: {}; choose one with --org", several.len(), keys.join(", "));
        }
    }
    Ok(Done::Well)
}

fn words(status: &JobStatus) -> Vec<String> {
    let mut lines = vec![format!("{}: {}", status.key, status.state.as_str())];
    let mut fact = |name: &str, value: Option<String>| {
        if let Some(value) = value {
            lines.push(format!("  {name:<12} {value}"));
        }
    };
    fact("reason", status.reason.map(|reason| reason.to_string()));
    fact("detail", status.detail.clone());
    fact("attempts", Some(status.attempts.to_string()));
    fact("next attempt", status.next_attempt_at.map(rfc3339));
    fact("message id", status.message_id.clone());
    fact("reply", status.reply.clone());
    fact("first seen", Some(rfc3339(status.first_at)));
    fact("updated", Some(rfc3339(status.updated_at)));
    for refused in &status.refused {
        fact("refused", Some(format!("recipient {}: {} {}", refused.index, refused.code, refused.reason)));
    }
    for attempt in &status.history {
        let outcome = match (attempt.reason, &attempt.reply) {
            (None, reply) => reply.clone().unwrap_or_else(|| "accepted".to_owned()),
            (Some(reason), Some(reply)) => format!("{reason}: {reply}"),
            (Some(reason), None) => reason.to_string(),
        };
        let place = attempt.address.as_deref().map(|address| format!(" ({address})")).unwrap_or_default();
        fact(
            "attempt",
            Some(format!(
                "{} by {}{place} to {}, {} ms: {outcome}",
                rfc3339(attempt.at),
                attempt.transport,
                attempt.phase.as_str(),
                attempt.ms
            )),
        );
    }
    lines
}

fn rfc3339(at: OffsetDateTime) -> String {
    at.format(&Rfc3339).unwrap_or_else(|_| at.to_string())
}
