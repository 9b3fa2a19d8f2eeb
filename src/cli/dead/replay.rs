//! `sendoff dead replay`: dead letters back to their lanes, as a governed operation.
//! Guarantee: it can be ended at any point, by Ctrl-C, a crash or a lost service, and given again: nobody gets a second copy.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use clap::Args;
use serde_json::{Map, Value, json};

use super::governed::{self, GOES_ON, GovernedArgs, HOW, PATIENCE, Progress, count, say};
use crate::broker::wire::WireLimits;
use crate::broker::{Broker, PublishError};
use crate::cli::exit::{BadArgument, Done};
use crate::cli::output;
use crate::cli::worker::duration;
use crate::clock::Clock;
use crate::dead_letters::replay::{Canary, Ended, Loss, Manner, Order, Replayer, Tally};
use crate::model::letter::LetterState;
use crate::model::replay::ReplayRules;
use crate::parts;
use crate::settings::Settings;
use crate::store::{DeadLetters, Store};

/// For the broker to be there at the start.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);

#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  sendoff dead replay --org 42 --reason message_refused --dry-run\n  sendoff dead replay --org 42 \
    --reason message_refused --canary 5\n  sendoff dead replay --id 0198c0de-0000-7000-8000-000000000001 --resend-unknown\n\n\
    Without --state, dead letters are meant; those that a run has left in the middle (replaying) always. Left out are letters that are expired, \
    superseded, cancelled or already sent, whose outcome is unknown, or that died again after --max-replays replays. A \
    run that was ended goes on when it is given again.\n\nExit code 0 when every letter was replayed or left out, 1 when \
    the run was ended before or a canary died again, 3 when the database or the broker was away for 60 s."
)]
pub(in crate::cli) struct ReplayArgs {
    #[command(flatten)]
    governed: GovernedArgs,
    /// Letters a second
    #[arg(long, help_heading = HOW, value_name = "N", default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    rate: u32,
    /// Replay N first, wait for their outcomes, and go on only if every one was sent
    #[arg(long, help_heading = HOW, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=1000))]
    canary: Option<u64>,
    /// How long to wait for the canaries' outcomes: say 90s or 10m
    #[arg(long, help_heading = HOW, value_name = "TIME", default_value = "600s", value_parser = duration, requires = "canary")]
    canary_wait: Duration,
    /// Leave out letters that died again after so many replays
    #[arg(long, help_heading = HOW, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    max_replays: u32,
    /// Replay letters whose outcome is unknown, too: their recipients may get a second copy
    #[arg(long, help_heading = HOW)]
    resend_unknown: bool,
    /// Lane for letters whose routing key no lane takes; they are left out unless given
    #[arg(long, help_heading = HOW, value_name = "NAME")]
    lane: Option<String>,
}

pub(in crate::cli) async fn run(args: &ReplayArgs, settings: &Settings) -> anyhow::Result<Done> {
    let order = order(args, settings)?;
    let store = parts::store(settings, parts::COMMAND_CONNECTIONS)?;
    let shutdown = governed::interruptible()?;
    let replayer = Replayer {
        archive: DeadLetters::new(store.clone(), parts::key_ring(settings)?),
        store: store.clone(),
        lanes: settings.amqp.lanes.clone(),
        limits: WireLimits {
            max_recipients: settings.limits.max_recipients,
            max_message_bytes: settings.limits.max_message_bytes,
        },
        clock: Clock::system(),
        shutdown,
        patience: PATIENCE,
    };
    someone_works(&store, &settings.amqp.prefix).await?;
    let total = store.count_letters(&order.filter, None, None).await.context("asking the archive")?;
    let progress = Progress::of(order.limit.map_or(total, |limit| total.min(limit)));
    let show = |tally: &Tally| progress.show(tally.done());
    if args.governed.dry_run {
        let (tally, ended) = replayer.preview(&order, show).await;
        progress.end();
        return tell(args, &tally, ended);
    }
    let broker = Broker::start(parts::broker(settings)?, Arc::new(|_| {}));
    reach(&broker).await?;
    let canary = args.canary.map(|count| Canary { count, wait: args.canary_wait });
    let options = json!({
        "limit": order.limit, "rate": args.rate, "canary": args.canary, "max_replays": args.max_replays,
        "resend_unknown": args.resend_unknown, "lane": args.lane,
    });
    let record = governed::begin(&store, "dead.replay", &order.actor, &order.filter, options).await?;
    let manner = Manner { rate: args.rate, canary };
    let (tally, ended) = replayer.run(&order, manner, &broker.publisher(), show).await;
    progress.end();
    record.finish(outcome(&ended), &result(&tally, &ended, false)).await;
    broker.close().await;
    tell(args, &tally, ended)
}

fn order(args: &ReplayArgs, settings: &Settings) -> anyhow::Result<Order> {
    let mut filter = args.governed.filter()?;
    if filter.states.is_empty() {
        filter.states.push(LetterState::Dead);
    }
    if !filter.states.contains(&LetterState::Replaying) {
        filter.states.push(LetterState::Replaying);
    }
    if let Some(lane) = &args.lane
        && !settings.amqp.lanes.iter().any(|known| known.name == *lane)
    {
        let known: Vec<_> = settings.amqp.lanes.iter().map(|lane| lane.name.as_str()).collect();
        let known = known.join(", ");
        return Err(BadArgument(format!("--lane `{lane}` is not one of the settings' lanes: {known}")).into());
    }
    let rules = ReplayRules { max_replays: args.max_replays, resend_unknown: args.resend_unknown };
    let (limit, actor) = (args.governed.limit(), args.governed.actor());
    Ok(Order { filter, limit, rules, lane: args.lane.clone(), actor })
}

/// A prefix that this database never saw, while it knows others, is a slip: the copies would go where nobody works.
async fn someone_works(store: &Store, prefix: &str) -> anyhow::Result<()> {
    let known = store.prefixes().await.context("asking the database")?;
    if known.is_empty() || known.iter().any(|other| other == prefix) {
        return Ok(());
    }
    bail!(
        "amqp.prefix is `{prefix}`, and no worker of this database has used it; known: {}. If it is right, run \
         `sendoff topology declare` first",
        known.join(", ")
    );
}

/// Waits until something can be published.
async fn reach(broker: &Broker) -> anyhow::Result<()> {
    let mut state = broker.state();
    let connected = state.wait_for(|state| state.publishing.is_none());
    match tokio::time::timeout(CONNECT_LIMIT, connected).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(_)) | Err(_) => {
            let reason = broker.state().borrow().publishing.clone();
            let waited_ms = u64::try_from(CONNECT_LIMIT.as_millis()).unwrap_or(u64::MAX);
            let error = anyhow::Error::from(PublishError::Unavailable { waited_ms });
            Err(error.context(reason.map_or_else(|| "the broker".to_owned(), |reason| reason.to_string())))
        }
    }
}

/// As the audit log has it.
fn outcome(ended: &Ended) -> &'static str {
    match ended {
        Ended::Done => "ok",
        Ended::Interrupted => "interrupted",
        Ended::Canary(_) => "canary_died",
        Ended::Database(_) | Ended::Broker(_) => "unavailable",
    }
}

fn result(tally: &Tally, ended: &Ended, dry_run: bool) -> Value {
    let skipped: Map<String, Value> =
        tally.skipped.iter().map(|(skip, count)| (skip.as_str().to_owned(), json!(count))).collect();
    let lost = |loss: &Loss| json!({ "id": loss.id, "state": loss.state, "reason": loss.reason, "undecided": loss.undecided });
    let canaries: Vec<Value> = match ended {
        Ended::Canary(losses) => losses.iter().map(lost).collect(),
        _ => Vec::new(),
    };
    json!({
        "dry_run": dry_run, "ended": outcome(ended), "selected": tally.selected, "replayed": tally.replayed,
        "skipped": skipped, "unconfirmed": tally.unconfirmed, "not_reached": tally.not_reached,
        "too_many_replays": tally.too_often, "canaries_lost": canaries,
        "groups": governed::groups_json(&tally.groups),
    })
}

/// The reconciliation, and how it ended.
fn tell(args: &ReplayArgs, tally: &Tally, ended: Ended) -> anyhow::Result<Done> {
    if args.governed.json {
        output::json(&result(tally, &ended, args.governed.dry_run))?;
    } else if tally.selected == 0 && matches!(ended, Ended::Done) {
        output::line("No letter matches. Without --state, only dead ones are looked at.")?;
    } else {
        governed::print(&words(tally, args.governed.dry_run))?;
    }
    if !tally.adds_up() {
        return Err(anyhow!("the counts do not add up: this is a defect, report it with the output above"));
    }
    match ended {
        Ended::Done if tally.unopened.is_empty() => Ok(Done::Well),
        Ended::Done => {
            say("Some could not be opened:");
            tally.unopened.iter().for_each(|why| say(&format!("  {why}")));
            Ok(Done::Badly)
        }
        Ended::Interrupted => {
            say(&format!("It {GOES_ON}."));
            Ok(Done::Badly)
        }
        Ended::Canary(losses) => {
            say("A canary did not come through, so nothing else was replayed:");
            for Loss { id, state, reason, undecided } in losses {
                let reason = reason.map(|reason| format!(", {reason}")).unwrap_or_default();
                let waited_s = args.canary_wait.as_secs();
                let late =
                    if undecided { format!(" after {waited_s} s (--canary-wait)") } else { String::new() };
                say(&format!("  {id} is {}{reason}{late}", state.as_str()));
            }
            Ok(Done::Badly)
        }
        Ended::Database(error) => Err(anyhow::Error::from(error).context(GOES_ON)),
        Ended::Broker(error) => Err(anyhow::Error::from(error).context(GOES_ON)),
    }
}

fn words(tally: &Tally, dry_run: bool) -> Vec<String> {
    let replayed = if dry_run { "would be replayed:" } else { "replayed:" };
    let mut lines = vec![count(tally.selected, "selected"), count(tally.replayed, replayed)];
    lines.extend(governed::histogram(&tally.groups).iter().map(|line| format!("  {line}")));
    let skipped: u64 = tally.skipped.values().sum();
    let leaves = if dry_run { "would be left out" } else { "left out" };
    lines.push(count(skipped, &if skipped == 0 { leaves.to_owned() } else { format!("{leaves}:") }));
    lines.extend(tally.skipped.iter().map(|(skip, number)| format!("  {}", count(*number, skip.as_str()))));
    if tally.unconfirmed > 0 {
        lines.push(count(tally.unconfirmed, "recorded and not confirmed: the next run takes them up"));
    }
    if tally.not_reached > 0 {
        lines.push(count(tally.not_reached, "not reached"));
    }
    if !tally.too_often.is_empty() {
        lines.push("Died again after as many replays as --max-replays allows:".to_owned());
        lines.extend(tally.too_often.iter().map(|id| format!("  {id}")));
    }
    lines
}
