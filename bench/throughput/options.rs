//! The command line of `./dev bench`.
//! Guarantee: every number that a scenario depends on is here, with its default, or is a constant named in the scenario.

use clap::{Parser, ValueEnum};

/// What `./dev bench` takes.
#[derive(Parser, Clone)]
#[command(
    name = "./dev bench",
    bin_name = "./dev bench",
    about = "How fast, how lean and how fair the worker is, beside what one would write instead",
    after_help = "Examples:\n  ./dev bench                            all of it; about an hour and 12 GB of disk\n  \
        ./dev bench --quick                    the same in small, to see whether it runs\n  \
        ./dev bench drain --reps 5             one scenario\n  \
        ./dev bench far --contestants sendoff,lettre\n  \
        ./dev bench ledger                     what the ledger costs; ./dev bench ledger --help\n\n\
        bench/README.md says what each scenario measures, and what about it is unfair.\n\
        A run of every scenario, or --write, goes to bench/RESULTS.md; others to target/bench/RESULTS.md."
)]
pub struct Options {
    /// Which; all unless given
    #[arg(value_enum)]
    pub scenarios: Vec<Scenario>,
    /// Jobs of each scenario but `backlog`, instead of its own number
    #[arg(long, value_parser = clap::value_parser!(u64).range(10..=10_000_000))]
    jobs: Option<u64>,
    /// Repetitions, of which the medians are taken
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=100))]
    reps: u64,
    /// A tenth of the jobs (of the backlog a hundredth), once
    #[arg(long)]
    pub quick: bool,
    /// Jobs of the large backlog
    #[arg(long, default_value_t = 1_000_000, value_parser = clap::value_parser!(u64).range(1000..=10_000_000))]
    backlog: u64,
    /// SMTP connections of `drain` (50) and `far` (8), instead of those
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=1000))]
    connections: Option<u16>,
    /// How far away the server of `far` is: time from a command to its answer
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u64).range(1..=1000))]
    pub distance_ms: u64,
    /// Who takes part where there are several
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = Contestant::ALL)]
    pub contestants: Vec<Contestant>,
    /// Write what was found to bench/RESULTS.md, whatever was run
    #[arg(long)]
    write: bool,
    /// Print what has to be installed for it, one a line, and do nothing
    #[arg(long, hide = true)]
    pub list_needs: bool,
    /// What cargo adds
    #[arg(long, hide = true)]
    bench: bool,
}

/// What is measured; bench/README.md has a paragraph for each.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Scenario {
    /// A full queue, sent as fast as possible
    Drain,
    /// The same to a server 20 ms away
    Far,
    /// Healthy mail beside servers that are silent, refuse or defer
    Isolation,
    /// A confirmation behind the flood of a slow organization
    Flood,
    /// Confirmations while 20,000 reminders are due
    Reminders,
    /// Ten thousand organizations
    Tenants,
    /// A million jobs waiting
    Backlog,
    /// One job at a time
    Idle,
}

/// Who is measured beside whom.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Contestant {
    /// The worker
    Sendoff,
    /// amqplib and nodemailer's pool
    Nodemailer,
    /// aio-pika and aiosmtplib
    Aiosmtplib,
    /// lapin and lettre's pool
    Lettre,
    /// Postfix's smtp-source -d: the limit, without any queue
    SmtpSource,
}

impl Contestant {
    /// In the order of the table.
    pub const ALL: [Self; 5] =
        [Self::Sendoff, Self::Nodemailer, Self::Aiosmtplib, Self::Lettre, Self::SmtpSource];
}

impl Options {
    /// What to run, in the order of bench/README.md.
    pub fn chosen(&self) -> Vec<Scenario> {
        let all = Scenario::value_variants();
        let wanted = |scenario: &&Scenario| self.scenarios.is_empty() || self.scenarios.contains(scenario);
        all.iter().filter(wanted).copied().collect()
    }

    /// Whether what is found belongs into bench/RESULTS.md.
    pub fn writes(&self) -> bool {
        let everything = self.scenarios.is_empty()
            && self.jobs.is_none()
            && self.connections.is_none()
            && self.distance_ms == 20
            && !self.quick
            && self.contestants.len() == Contestant::ALL.len();
        self.write || everything
    }

    /// Connections, where a scenario takes so many.
    pub fn connections(&self, usual: usize) -> Option<usize> {
        Some(self.connections.map_or(usual, usize::from))
    }

    /// How often.
    pub fn reps(&self) -> u64 {
        if self.quick { 1 } else { self.reps }
    }

    /// How many jobs, where the scenario's own number is this.
    pub fn jobs(&self, usual: u64) -> usize {
        let usual = if self.quick { (usual / 10).max(10) } else { usual };
        usize::try_from(self.jobs.unwrap_or(usual)).unwrap_or(usize::MAX)
    }

    /// Jobs of the large backlog.
    pub fn backlog(&self) -> usize {
        usize::try_from(if self.quick { self.backlog / 100 } else { self.backlog }).unwrap_or(usize::MAX)
    }

    /// Jobs of the small backlog: a hundredth of the usual large one.
    pub fn small_backlog(&self) -> usize {
        if self.quick { 1_000 } else { 10_000 }
    }

    /// A time that a scenario lasts.
    pub fn seconds(&self, usual: u64) -> u64 {
        if self.quick { (usual / 6).max(5) } else { usual }
    }

    /// What `./dev` has to have ready: `smtp-sink`, or a contestant's name.
    pub fn needs(&self) -> Vec<&'static str> {
        let chosen = self.chosen();
        let with = |scenarios: &[Scenario]| chosen.iter().any(|scenario| scenarios.contains(scenario));
        let takes_part = |contestant| self.contestants.contains(&contestant);
        let mut needs = Vec::new();
        if with(&[Scenario::Drain, Scenario::Far, Scenario::Tenants, Scenario::Backlog]) {
            needs.push("postfix");
        }
        if with(&[Scenario::Drain, Scenario::Far]) {
            let peers = [
                (Contestant::Nodemailer, "nodemailer"),
                (Contestant::Aiosmtplib, "aiosmtplib"),
                (Contestant::Lettre, "lettre"),
            ];
            needs.extend(peers.into_iter().filter(|(peer, _)| takes_part(*peer)).map(|(_, name)| name));
        }
        needs
    }
}
