//! `sendoff dead show`: the whole story of a dead letter, with its message.
//! Guarantee: what cannot be opened does not keep the rest from being told; the body as it is leaves only with --reveal, and
//! never to a terminal.

use std::collections::BTreeSet;

use anyhow::{Context, anyhow, bail};
use clap::Args;
use serde_json::{Value, json};
use time::OffsetDateTime;
use uuid::Uuid;

use super::message::{Addresses, Message};
use super::{view, words};
use crate::cli::exit::{BadArgument, Done};
use crate::cli::{output, story};
use crate::clock::Clock;
use crate::control::job_status_json;
use crate::model::failure::Reason;
use crate::model::ledger::JobStatus;
use crate::model::letter::Letter;
use crate::model::organization::OrganizationId;
use crate::parts;
use crate::settings::Settings;
use crate::store::{Content, DeadLetters, Store};

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  sendoff dead show 0198c0de-0000-7000-8000-000000000001 --org 42\n  \
    sendoff dead show 0198c0de-0000-7000-8000-000000000001 --raw --reveal > body.json\n\nWithout --reveal names are left \
    out and addresses masked, in the text too. The message can only be opened with the key it was sealed under.")]
pub(in crate::cli) struct ShowArgs {
    /// The job's id, or the letter's own
    #[arg(value_parser = crate::cli::uuid)]
    id: Uuid,
    /// The job's organization, where several have a job of this id
    #[arg(long, value_name = "ORG", value_parser = OrganizationId::parse)]
    org: Option<OrganizationId>,
    /// The platform's job of this id, where organizations have one too
    #[arg(long, conflicts_with = "org")]
    platform: bool,
    /// Show names and addresses
    #[arg(long)]
    reveal: bool,
    /// Write the body's bytes and nothing else
    #[arg(long, requires = "reveal", conflicts_with = "json")]
    raw: bool,
    /// Print it as JSON: what `dead list --json` has, and {"job","message"}
    #[arg(long)]
    json: bool,
}

pub(super) async fn run(args: &ShowArgs, settings: &Settings) -> anyhow::Result<Done> {
    if args.raw && output::is_terminal() {
        return Err(BadArgument(
            "--raw: a body may command the terminal; send it to a file or a pipe".into(),
        )
        .into());
    }
    let store = parts::store(settings, parts::COMMAND_CONNECTIONS)?;
    let organization = if args.platform { Some("") } else { args.org.as_ref().map(OrganizationId::as_str) };
    let letters = store.letters_of(args.id, organization).await.context("asking the archive")?;
    let (letter, others) = choose(&letters, args.id)?;
    let content = open(&store, settings, letter).await?;
    if args.raw {
        let content = content.map_err(|why| anyhow!("the body cannot be shown: {why}"))?;
        output::bytes(&content.body)?;
        return Ok(Done::Well);
    }
    let ledger = match &letter.key {
        // The ledger's job of this id is the other one.
        Some(key) if letter.reason != Reason::IdConflict => {
            store.job_status(key).await.context("asking the ledger")?
        }
        _ => None,
    };
    let addresses = if args.reveal { Addresses::Revealed } else { Addresses::Masked };
    let message = content.map(|content| Message::read(&content.body));
    let told = Told { letter, others, ledger: ledger.as_ref(), message, addresses };
    if args.json {
        output::json(&told.json()?)?;
    } else {
        told.words(Clock::system().now()).iter().try_for_each(|line| output::line(line))?;
    }
    Ok(Done::Well)
}

/// The letter that is meant, and how many others have the id.
fn choose(letters: &[Letter], id: Uuid) -> anyhow::Result<(&Letter, usize)> {
    let Some(meant) = words::meant(letters, id) else {
        bail!(
            "the archive has no letter {id}; the job did not die, its letter is on the way, or it is forgotten"
        );
    };
    let owners: BTreeSet<_> =
        letters.iter().filter_map(|letter| letter.key.as_ref().map(|_| letter.owner().to_string())).collect();
    if meant.letter.0 != id && owners.len() > 1 {
        let owners: Vec<_> = owners.into_iter().collect();
        bail!("letters of {} have this id; choose with --org or --platform", owners.join(", "));
    }
    Ok((meant, letters.len() - 1))
}

/// The content, or why there is none to be shown.
async fn open(
    store: &Store,
    settings: &Settings,
    letter: &Letter,
) -> anyhow::Result<Result<Content, String>> {
    if settings.encryption.keys.is_empty() {
        return Ok(Err("it is sealed, and encryption.keys is not set".to_owned()));
    }
    let archive = DeadLetters::new(store.clone(), parts::key_ring(settings)?);
    let opened = archive.open(letter.letter).await.context("asking the archive")?;
    Ok(opened.ok_or_else(|| anyhow!("the letter was forgotten just now"))?.map_err(|why| why.to_string()))
}

struct Told<'a> {
    letter: &'a Letter,
    others: usize,
    ledger: Option<&'a JobStatus>,
    message: Result<Message, String>,
    addresses: Addresses,
}

impl Told<'_> {
    fn words(&self, now: OffsetDateTime) -> Vec<String> {
        let letter = self.letter;
        let mut lines = vec![format!("{}: {}", words::name(letter), letter.state.as_str())];
        lines.extend(words::letter(letter, self.ledger, now));
        if let Some(status) = self.ledger {
            let ledger = story::job(status, now);
            lines.push(format!("The ledger: {}.", status.state.as_str()));
            lines.extend(ledger.into_iter().filter(|line| !line.starts_with("Next: ")));
        } else if letter.reason == Reason::IdConflict {
            lines.push(
                "The ledger's job of this id is another one: `sendoff job status` tells of it.".to_owned(),
            );
        } else if letter.key.is_some() {
            lines.push("The ledger does not know the job.".to_owned());
        }
        if self.others > 0 {
            lines.push(format!(
                "The id has {} more: `sendoff dead list --id {}`.",
                story::counted(self.others, "letter"),
                letter.id()
            ));
        }
        match &self.message {
            Ok(message) => {
                lines.push("The message:".to_owned());
                lines.extend(message.words(self.addresses));
            }
            Err(why) => lines.push(format!("The message cannot be shown: {why}.")),
        }
        lines
    }

    fn json(&self) -> anyhow::Result<Value> {
        let outcome = self.ledger.map(JobStatus::outcome);
        let history = words::history(self.letter, outcome.as_ref());
        let mut told = serde_json::to_value(view::letter(self.letter, &history))?;
        told["job"] = json!(self.ledger.map(job_status_json));
        told["message"] = json!(self.message.as_ref().ok().map(|message| message.json(self.addresses)));
        if let Err(why) = &self.message {
            told["message_error"] = json!(why);
        }
        Ok(told)
    }
}
