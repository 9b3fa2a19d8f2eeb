//! What every scenario runs with: options, services, programs.
//! Guarantee: it is read from the environment once, and what is missing is named with what to do.

use std::path::{Path, PathBuf};

use anyhow::Context as _;

use super::options::Options;
use super::process::Service;

/// Given to every scenario.
pub struct Context {
    /// The command line.
    pub options: Options,
    /// RabbitMQ.
    pub amqp_url: String,
    /// PostgreSQL, any database on it.
    pub database_url: String,
    /// The worker's program.
    pub program: PathBuf,
    /// RabbitMQ's process, where it is this checkout's own.
    pub rabbitmq: Option<Service>,
    /// PostgreSQL's.
    pub postgres: Option<Service>,
    /// The private services' directory.
    pub services: PathBuf,
    /// Where peers are installed and notes are kept.
    directory: PathBuf,
}

impl Context {
    /// Of the environment that `./dev bench` makes.
    pub fn of_environment(options: Options) -> anyhow::Result<Self> {
        let variable =
            |name: &str| std::env::var(name).with_context(|| format!("{name} is not set: use ./dev bench"));
        let services = PathBuf::from(variable("SENDOFF_DEV_DIR")?);
        Ok(Self {
            options,
            amqp_url: variable("AMQP_URL")?,
            database_url: variable("DATABASE_URL")?,
            program: variable("SENDOFF_BIN")?.into(),
            rabbitmq: Service::of_file(&services.join("rabbitmq/rabbitmq.pid")),
            postgres: Service::of_file(&services.join("postgres/data/cluster/postmaster.pid")),
            services,
            directory: variable("SENDOFF_BENCH_DIR")?.into(),
        })
    }

    /// Where the peer of this name is installed.
    pub fn peer(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// Notes of what would be left behind if this run were killed.
    pub fn leftovers(&self) -> PathBuf {
        self.directory.join("leftovers")
    }

    /// Where what was found is written.
    pub fn results(&self) -> PathBuf {
        if self.options.writes() {
            Path::new(env!("CARGO_MANIFEST_DIR")).join("bench/RESULTS.md")
        } else {
            self.directory.join("RESULTS.md")
        }
    }
}
