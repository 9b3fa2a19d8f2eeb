//! Scenarios 1 and 2: a full queue is sent as fast as possible, to a server next door and to one 20 ms away.
//! Guarantee: contestants take turns, repetition by repetition, each with a sink of its own.

use clap::ValueEnum;

use crate::contestants::{Race, Run};
use crate::context::Context;
use crate::options::Contestant;
use crate::report::{Section, Target, figure};
use crate::stats::spread;

/// Who is slow gets a fifth of the jobs, or a run would take an hour; its rate does not depend on the number.
const SLOW_SHARE: usize = 5;

/// Scenario 1.
pub async fn near(bench: &Context, origin: String) -> anyhow::Result<Section> {
    let jobs = bench.options.jobs(50_000);
    let connections = bench.options.connections(50);
    let race = |contestant| {
        let slow = matches!(contestant, Contestant::Nodemailer | Contestant::Aiosmtplib);
        let jobs = if slow { (jobs / SLOW_SHARE).max(10) } else { jobs };
        Race { jobs, organizations: 50, connections }
    };
    let results = compete(bench, race, None).await?;
    let sendoff = results.of(Contestant::Sendoff);
    let targets = vec![
        Target::at_least(
            "jobs/s against nodemailer",
            sendoff.rate / results.of(Contestant::Nodemailer).rate,
            12.0,
            "x",
        ),
        Target::at_least(
            "jobs/s against smtp-source -d",
            sendoff.rate / results.of(Contestant::SmtpSource).rate,
            0.5,
            "x",
        ),
        Target::at_most("worker's processor time per job", sendoff.cpu_us, 120.0, " µs"),
    ];
    Ok(Section {
        title: "1. drain: a full queue, a server next door".to_owned(),
        origin,
        prose: format!(
            "{jobs} jobs of 50 organizations queued beforehand, {} connections in all (an equal share for each \
             organization; the peers have one pool), one smtp-sink. Sendoff keeps its ledger and announces every \
             outcome; the peers do neither. nodemailer and aiosmtplib get a fifth of the jobs.",
            connections.unwrap_or_default()
        ),
        table: results.table(),
        targets,
    })
}

/// Scenario 2.
pub async fn far(bench: &Context, origin: String) -> anyhow::Result<Section> {
    let jobs = bench.options.jobs(4_000);
    let (connections, distance_ms) = (bench.options.connections(8), bench.options.distance_ms);
    let manner = format!("ok:{distance_ms}");
    let results = compete(bench, |_| Race { jobs, organizations: 1, connections }, Some(&manner)).await?;
    let ratio = results.of(Contestant::Sendoff).rate / results.of(Contestant::Lettre).rate;
    Ok(Section {
        title: "2. far: the same to a server that is far away".to_owned(),
        origin,
        prose: format!(
            "{jobs} jobs of one organization queued beforehand, {} connections, a server that answers what it is sent in \
             one go {distance_ms} ms later in one go. The others get a fifth of the jobs.",
            connections.unwrap_or_default()
        ),
        table: results.table(),
        targets: vec![Target::at_least("jobs/s against lettre's pool", ratio, 1.8, "x")],
    })
}

/// One of a run's figures.
type Figure = fn(&Run) -> f64;

struct Results(Vec<Entry>);

struct Entry {
    contestant: Contestant,
    runs: Vec<Run>,
}

/// Runs everybody by turns; into smtp-sink, or into an own server of this manner.
async fn compete(
    bench: &Context,
    race: impl Fn(Contestant) -> Race,
    manner: Option<&str>,
) -> anyhow::Result<Results> {
    let chosen = Contestant::ALL.into_iter().filter(|one| bench.options.contestants.contains(one));
    let mut results = Results(chosen.map(|contestant| Entry { contestant, runs: Vec::new() }).collect());
    for repetition in 1..=bench.options.reps() {
        for Entry { contestant, runs } in &mut results.0 {
            let run = race(*contestant).against(bench, *contestant, manner).await?;
            eprintln!(
                "bench: {repetition}. {:<12} {:>8} jobs/s {:>6} µs",
                name(*contestant),
                figure(run.rate),
                figure(run.cpu_us)
            );
            runs.push(run);
        }
    }
    Ok(results)
}

fn name(contestant: Contestant) -> String {
    contestant.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
}

impl Results {
    /// The medians; `NaN` of who did not take part.
    fn of(&self, contestant: Contestant) -> Run {
        Run::median(self.runs(contestant))
    }

    fn runs(&self, contestant: Contestant) -> &[Run] {
        self.0.iter().find(|entry| entry.contestant == contestant).map_or(&[], |entry| &entry.runs)
    }

    /// A column for each contestant.
    fn table(&self) -> Vec<Vec<String>> {
        let row = |what: &str, value: &dyn Fn(Contestant) -> f64| {
            let mut row = vec![what.to_owned()];
            row.extend(self.0.iter().map(|entry| figure(value(entry.contestant))));
            row
        };
        let mut head = vec!["medians".to_owned()];
        head.extend(self.0.iter().map(|entry| name(entry.contestant)));
        let mut rows = vec![head];
        let measures: [(&str, Figure); 3] = [
            ("jobs/s", |run| run.rate),
            ("worker's processor time per job, µs", |run| run.cpu_us),
            ("worker's peak memory, MiB", |run| run.peak_mib),
        ];
        for (what, value) in measures {
            rows.push(row(what, &|contestant| value(&self.of(contestant))));
            for (peer, against) in [
                (Contestant::Nodemailer, "… against nodemailer"),
                (Contestant::SmtpSource, "… against smtp-source -d"),
            ] {
                rows.push(row(against, &|contestant| value(&self.of(contestant)) / value(&self.of(peer))));
            }
        }
        rows.push(row("spread of jobs/s, share of the median", &|contestant| {
            spread(&self.runs(contestant).iter().map(|run| run.rate).collect::<Vec<f64>>())
        }));
        rows.push(row("RabbitMQ's processor time per job, µs", &|contestant| self.of(contestant).broker_us));
        rows.push(row("PostgreSQL's", &|contestant| self.of(contestant).database_us));
        rows.push(row("the sink's", &|contestant| self.of(contestant).sink_us));
        rows
    }
}
