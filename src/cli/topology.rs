//! `sendoff topology`: the exchanges, queues and bindings, declared or shown.
//! Guarantee: nothing is deleted but bindings that the settings no longer list; `show` speaks to nobody.

use anyhow::Context;
use clap::{Args, Subcommand};

use super::exit::Done;
use super::output;
use crate::broker::{Argument, Destination, Kind, Topology, Value};
use crate::parts;
use crate::settings::Settings;
use crate::store::{LaneBinding, SchemaState};

#[derive(Debug, Subcommand)]
#[command(after_help = "Examples:\n  sendoff topology show\n  sendoff topology declare")]
pub(super) enum TopologyCommand {
    /// Create what is missing on the broker, and unbind what the settings no longer list
    Declare(DeclareArgs),
    /// Print every exchange, queue and binding with the reason of each flag
    Show(ShowArgs),
}

#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  sendoff topology declare\n\nThe database remembers the bindings, so that one taken out \
    of the settings is unbound the next time."
)]
pub(super) struct DeclareArgs {
    /// Print {"exchanges","queues","bindings","unbound"}
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  sendoff topology show --json | jq '.queues[].name'")]
pub(super) struct ShowArgs {
    /// Print it as JSON
    #[arg(long)]
    json: bool,
}

pub(super) async fn declare(args: &DeclareArgs, settings: &Settings) -> anyhow::Result<Done> {
    let topology = parts::topology(settings);
    let access = parts::access(settings)?;
    let store = parts::store(settings, parts::COMMAND_CONNECTIONS)?;
    let prefix = &settings.amqp.prefix;
    if let SchemaState::Behind(_) = store.schema_state().await.context("looking at the schema")? {
        store.migrate().await.context("migrating")?;
    }
    let previous = store.lane_bindings(prefix).await.context("reading the bindings declared before")?;
    let previous: Vec<_> = previous.into_iter().map(|old| (old.lane, old.binding)).collect();
    topology.declare(&access, &previous).await?;
    let current = topology.lane_bindings();
    let remembered: Vec<_> =
        current.iter().cloned().map(|(lane, binding)| LaneBinding { lane, binding }).collect();
    store.replace_lane_bindings(prefix, &remembered).await.context("remembering the bindings")?;

    let unbound: Vec<_> = previous.iter().filter(|pair| !current.contains(pair)).collect();
    let counts = (topology.exchanges.len(), topology.queues.len(), topology.bindings.len());
    if args.json {
        let unbound: Vec<_> = unbound
            .iter()
            .map(|(lane, binding)| serde_json::json!({ "lane": lane, "binding": binding }))
            .collect();
        output::json(&serde_json::json!({
            "exchanges": counts.0, "queues": counts.1, "bindings": counts.2, "unbound": unbound,
        }))?;
    } else {
        output::line(&format!(
            "Declared {} exchanges, {} queues, {} bindings.",
            counts.0, counts.1, counts.2
        ))?;
        for (lane, binding) in unbound {
            output::line(&format!("Unbound {binding} from lane {lane}."))?;
        }
    }
    Ok(Done::Well)
}

pub(super) fn show(args: &ShowArgs, settings: &Settings) -> anyhow::Result<Done> {
    let topology = parts::topology(settings);
    if args.json {
        output::json(&topology)?
    } else {
        show_words(&topology)?
    }
    Ok(Done::Well)
}

fn show_words(topology: &Topology) -> std::io::Result<()> {
    for exchange in &topology.exchanges {
        let kind = match exchange.kind {
            Kind::Topic => "topic",
            Kind::Fanout => "fanout",
        };
        output::line(&format!("exchange {} ({kind}): {}", exchange.name, exchange.purpose))?;
        show_arguments(&exchange.arguments)?;
    }
    for queue in &topology.queues {
        output::line(&format!("queue {}: {}", queue.name, queue.purpose))?;
        show_arguments(&queue.arguments)?;
    }
    for binding in &topology.bindings {
        let to = match binding.to {
            Destination::Queue => "queue",
            Destination::Exchange => "exchange",
        };
        let key = if binding.routing_key.is_empty() {
            String::new()
        } else {
            format!(" by {}", binding.routing_key)
        };
        output::line(&format!("binding {} -> {to} {}{key}", binding.source, binding.destination))?;
    }
    Ok(())
}

fn show_arguments(arguments: &[Argument]) -> std::io::Result<()> {
    arguments.iter().try_for_each(|argument| {
        let value = match &argument.value {
            Value::Text(text) => text.clone(),
            Value::Number(number) => number.to_string(),
        };
        output::line(&format!("    {} = {value}: {}", argument.name, argument.why))
    })
}
