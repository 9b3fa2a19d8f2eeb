//! From settings to the parts that a command uses.
//! Guarantee: nothing here connects yet.

use anyhow::Context;
use secrecy::ExposeSecret;

use crate::broker::{Access, AmqpUrl, Topology};
use crate::settings::Settings;
use crate::store::Store;

/// A command asks one thing after the other.
const CONNECTIONS: u32 = 2;

/// The database.
pub(super) fn store(settings: &Settings) -> anyhow::Result<Store> {
    Ok(Store::new(settings.database_url()?, CONNECTIONS)?)
}

/// The broker.
pub(super) fn broker(settings: &Settings) -> anyhow::Result<Access> {
    let url = AmqpUrl::parse(settings.amqp.url.expose_secret()).context("amqp.url")?;
    let mut access = Access::new(url);
    for file in &settings.smtp.extra_ca_files {
        let pem =
            std::fs::read_to_string(file).with_context(|| format!("{} cannot be read", file.display()))?;
        access = access.trust(&pem).with_context(|| file.display().to_string())?;
    }
    Ok(access)
}

/// What has to exist on the broker.
pub(super) fn topology(settings: &Settings) -> Topology {
    Topology::new(&settings.amqp.prefix, &settings.amqp.lanes, &settings.retry.schedule.delays_s())
}
