//! `sendoff job send`: one job, published with confirm, and followed to its outcome if asked.
//! Guarantee: nothing is published that the worker would refuse as malformed; the id is printed only once the broker has
//! the job.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use clap::Args;
use serde_json::{Map, Value, json};
use uuid::Uuid;

use super::super::worker::duration;
use crate::broker::wire::{self, WireLimits};
use crate::broker::{Follower, JobSender};
use crate::cli::exit::{BadArgument, Done};
use crate::cli::output;
use crate::clock::Clock;
use crate::model::job::Job;
use crate::model::lanes::Lane;
use crate::model::organization::OrganizationId;
use crate::parts;
use crate::settings::Settings;

/// The kind of a job that a person sends by hand.
const KIND: &str = "manual";
/// Where it goes unless said otherwise.
const LANE: &str = "notifications";

#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  sendoff job send --org 42 --to ann@example.org --subject Hello --text 'It works' --wait\n  \
    sendoff job send --file job.json --lane reminders\n\nWith --wait the exit code is 0 when the server accepted the \
    message, and 1 when the job died, expired, or had no outcome within --timeout. A job that is put off or parked is \
    waited for."
)]
pub(in crate::cli) struct SendArgs {
    /// A job as JSON (`-`: standard input); the other options are laid over it
    #[arg(long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// The organization; none sends through the platform's server
    #[arg(long, value_name = "ORG", value_parser = OrganizationId::parse)]
    org: Option<OrganizationId>,
    /// Recipient, `a@b.c` or `Name <a@b.c>`; may be repeated
    #[arg(long, value_name = "ADDRESS")]
    to: Vec<String>,
    /// Recipient of a copy; may be repeated
    #[arg(long, value_name = "ADDRESS")]
    cc: Vec<String>,
    /// Recipient that no header shows; may be repeated
    #[arg(long, value_name = "ADDRESS")]
    bcc: Vec<String>,
    /// Where answers go
    #[arg(long, value_name = "ADDRESS")]
    reply_to: Vec<String>,
    /// Subject
    #[arg(long)]
    subject: Option<String>,
    /// Plain text
    #[arg(long)]
    text: Option<String>,
    /// HTML, read from a file
    #[arg(long, value_name = "FILE")]
    html_file: Option<PathBuf>,
    /// Slug for filters and events, and the end of the routing key; `manual` unless given
    #[arg(long, value_name = "SLUG")]
    kind: Option<String>,
    /// The job's id, a UUID; a new one unless given
    #[arg(long, value_name = "UUID")]
    id: Option<Uuid>,
    /// Nothing is sent past this time, RFC 3339
    #[arg(long, value_name = "TIME")]
    expires_at: Option<String>,
    /// Lane to publish to; `notifications`, or the first there is, unless given
    #[arg(long, value_name = "NAME")]
    lane: Option<String>,
    /// Follow the job to its outcome and print each event
    #[arg(long)]
    wait: bool,
    /// How long to follow it: say 30s or 5m
    #[arg(long, value_name = "TIME", default_value = "120s", value_parser = duration, requires = "wait")]
    timeout: Duration,
    /// Print the id and each event as a line of JSON
    #[arg(long)]
    json: bool,
}

pub(in crate::cli) async fn run(args: &SendArgs, settings: &Settings) -> anyhow::Result<Done> {
    let clock = Clock::system();
    let body = body(args, &clock)?;
    let limits = WireLimits {
        max_recipients: settings.limits.max_recipients,
        max_message_bytes: settings.limits.max_message_bytes,
    };
    let job = wire::parse_job(&body, &limits)
        .map_err(|refusal| BadArgument(format!("the job is {}: {}", refusal.reason, refusal.detail)))?;
    let lane = lane(args.lane.as_deref(), &settings.amqp.lanes)?;
    let routing_key = routing_key(lane, &job.kind);

    let access = parts::access(settings)?;
    let sender = JobSender::connect(&access, &settings.amqp.prefix).await?;
    let followed = if args.wait { Some(sender.follow(job.key.id).await?) } else { None };
    sender.publish(&routing_key, job.key.id, clock.now(), &body).await?;
    if args.json {
        output::json(&json!({ "id": job.key.id, "routing_key": routing_key }))?;
    } else {
        output::line(&job.key.id.to_string())?;
    }
    let done = match followed {
        Some(events) => follow(events, &job, args).await?,
        None => Done::Well,
    };
    sender.close().await;
    Ok(done)
}

/// The body to publish: the file's bytes as they are where nothing is laid over them, so that the same file is the same
/// job.
fn body(args: &SendArgs, clock: &Clock) -> anyhow::Result<Vec<u8>> {
    let (bytes, mut job) = match &args.file {
        None => (None, Map::new()),
        Some(path) => {
            let bytes = read(path)?;
            let job = serde_json::from_slice(&bytes)
                .with_context(|| format!("{} is not a JSON object", path.display()))?;
            (Some(bytes), job)
        }
    };
    let before = job.clone();
    overlay(args, &mut job)?;
    for (field, value) in
        [("version", json!(wire::VERSION)), ("id", json!(clock.new_id())), ("kind", json!(KIND))]
    {
        job.entry(field).or_insert(value);
    }
    match bytes {
        Some(bytes) if job == before => Ok(bytes),
        _ => Ok(serde_json::to_vec(&job)?),
    }
}

fn overlay(args: &SendArgs, job: &mut Map<String, Value>) -> anyhow::Result<()> {
    let mut set = |field: &str, value: Option<Value>| {
        if let Some(value) = value {
            job.insert(field.to_owned(), value);
        }
    };
    set("organization_id", args.org.as_ref().map(|org| json!(org)));
    for (field, list) in
        [("to", &args.to), ("cc", &args.cc), ("bcc", &args.bcc), ("reply_to", &args.reply_to)]
    {
        set(field, (!list.is_empty()).then(|| json!(list)));
    }
    set("subject", args.subject.as_ref().map(|subject| json!(subject)));
    set("text", args.text.as_ref().map(|text| json!(text)));
    if let Some(path) = &args.html_file {
        let html =
            String::from_utf8(read(path)?).with_context(|| format!("{} is not UTF-8", path.display()))?;
        set("html", Some(json!(html)));
    }
    set("kind", args.kind.as_ref().map(|kind| json!(kind)));
    set("id", args.id.map(|id| json!(id)));
    set("expires_at", args.expires_at.as_ref().map(|at| json!(at)));
    Ok(())
}

fn read(path: &Path) -> anyhow::Result<Vec<u8>> {
    if path == Path::new("-") {
        let mut bytes = Vec::new();
        std::io::stdin().read_to_end(&mut bytes).context("standard input cannot be read")?;
        return Ok(bytes);
    }
    std::fs::read(path).with_context(|| format!("{} cannot be read", path.display()))
}

fn lane<'a>(name: Option<&str>, lanes: &'a [Lane]) -> anyhow::Result<&'a Lane> {
    let named = |name: &str| lanes.iter().find(|lane| lane.name == name);
    match name {
        Some(name) => named(name).ok_or_else(|| {
            let known: Vec<_> = lanes.iter().map(|lane| lane.name.as_str()).collect();
            let known = known.join(", ");
            BadArgument(format!("--lane `{name}` is not one of the settings' lanes: {known}")).into()
        }),
        None => named(LANE).or(lanes.first()).ok_or_else(|| anyhow!("the settings list no lane")),
    }
}

/// A routing key that the lane's first binding takes: its first wildcard becomes the kind as one word, further `#`
/// nothing, further `*` the same word.
fn routing_key(lane: &Lane, kind: &str) -> String {
    let word = kind.replace('.', "_");
    let binding = lane.bindings.first().map_or("", String::as_str);
    let mut is_used = false;
    let words = binding.split('.').filter_map(|part| match part {
        "#" if is_used => None,
        "#" | "*" => {
            is_used = true;
            Some(word.as_str())
        }
        plain => Some(plain),
    });
    words.collect::<Vec<_>>().join(".")
}

async fn follow(mut events: Follower, job: &Job, args: &SendArgs) -> anyhow::Result<Done> {
    let deadline = tokio::time::Instant::now() + args.timeout;
    loop {
        let Ok(next) = tokio::time::timeout_at(deadline, events.next()).await else {
            bail!(
                "no outcome within {} s; the job goes on, ask `sendoff job status {}` later",
                args.timeout.as_secs(),
                job.key.id
            );
        };
        let followed = next.context("following the job")?;
        // The same id may be another organization's job.
        if !is_about(&followed.event, job) {
            continue;
        }
        if args.json {
            output::json(&followed.event)?
        } else {
            output::line(&words(&followed.event))?
        }
        if followed.is_outcome {
            let is_sent = followed.event["type"] == "email.sent";
            return Ok(if is_sent { Done::Well } else { Done::Badly });
        }
    }
}

fn is_about(event: &Value, job: &Job) -> bool {
    let organization = match &event["organization_id"] {
        Value::Null => None,
        Value::String(text) => Some(text.clone()),
        other => Some(other.to_string()),
    };
    organization.as_deref() == job.key.organization.as_ref().map(OrganizationId::as_str)
}

/// One event in words, say `email.deferred: throttled, next attempt at …`.
fn words(event: &Value) -> String {
    let text = |field: &str| event[field].as_str();
    let mut facts = Vec::new();
    facts.extend(text("reason").map(str::to_owned));
    facts.extend(text("next_attempt_at").map(|at| format!("next attempt at {at}")));
    facts.extend(text("transport").map(|transport| format!("by the {transport}'s server")));
    facts.extend(text("message_id").map(str::to_owned));
    let refused = event["recipients_refused"].as_array().map_or(0, Vec::len);
    if refused > 0 {
        facts.push(format!("{refused} of the recipients refused"));
    }
    let kind = text("type").unwrap_or("event");
    if kind == "email.parked" {
        facts.push("waits for its organization's configuration to be mended".to_owned());
    }
    if facts.is_empty() { kind.to_owned() } else { format!("{kind}: {}", facts.join(", ")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lane_of(binding: &str) -> Lane {
        Lane::new("a", vec![binding.to_owned()], 1).unwrap()
    }

    #[test]
    fn the_routing_key_is_one_that_the_lane_takes() {
        for (binding, key) in [
            ("notification.#", "notification.booking_confirmed"),
            ("notification.*", "notification.booking_confirmed"),
            ("#", "booking_confirmed"),
            ("*.x.*.#", "booking_confirmed.x.booking_confirmed"),
            ("exact.key", "exact.key"),
        ] {
            assert_eq!(routing_key(&lane_of(binding), "booking.confirmed"), key, "{binding}");
            assert!(crate::model::lanes::patterns_meet(binding, key), "{binding}");
        }
    }

    #[test]
    fn an_event_is_told_in_one_line() {
        let sent = json!({"type": "email.sent", "transport": "platform", "message_id": "<1@x>", "recipients_refused": []});
        assert_eq!(words(&sent), "email.sent: by the platform's server, <1@x>");
        let dead = json!({"type": "email.dead", "reason": "malformed"});
        assert_eq!(words(&dead), "email.dead: malformed");
        let parked = json!({"type": "email.parked", "reason": "auth_failed"});
        let waits = "waits for its organization's configuration to be mended";
        assert_eq!(words(&parked), format!("email.parked: auth_failed, {waits}"));
    }
}
