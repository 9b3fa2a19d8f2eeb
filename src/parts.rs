//! From settings to the parts that a command or the worker is made of.
//! Guarantee: nothing here connects yet, and no error repeats a secret.

use std::sync::Arc;

use anyhow::Context;
use secrecy::ExposeSecret;

use crate::broker::{Access, AmqpUrl, BrokerSettings, Topology};
use crate::egress::{AllowedPorts, Egress, EgressPolicy};
use crate::secrets::KeyRing;
use crate::settings::{self, Settings};
use crate::store::Store;

/// Connections to the database of a command, which asks one thing after the other.
pub const COMMAND_CONNECTIONS: u32 = 2;

/// The database, with so many connections at most.
///
/// # Errors
/// When `database.url` is missing or is none of PostgreSQL's.
pub fn store(settings: &Settings, connections: u32) -> anyhow::Result<Store> {
    Ok(Store::new(settings.database_url()?, connections)?)
}

/// The way to the broker.
///
/// # Errors
/// When `amqp.url` or an extra CA file cannot be used.
pub fn access(settings: &Settings) -> anyhow::Result<Access> {
    let url = AmqpUrl::parse(settings.amqp.url.expose_secret()).context("amqp.url")?;
    let mut access = Access::new(url);
    for file in &settings.smtp.extra_ca_files {
        let pem =
            std::fs::read_to_string(file).with_context(|| format!("{} cannot be read", file.display()))?;
        access = access.trust(&pem).with_context(|| file.display().to_string())?;
    }
    Ok(access)
}

/// What the worker needs to know of the broker.
///
/// # Errors
/// Those of [`access`].
pub fn broker(settings: &Settings) -> anyhow::Result<BrokerSettings> {
    Ok(BrokerSettings {
        access: access(settings)?,
        prefix: settings.amqp.prefix.clone(),
        lanes: settings.amqp.lanes.clone(),
        delays_s: settings.retry.schedule.delays_s(),
    })
}

/// What has to exist on the broker.
pub fn topology(settings: &Settings) -> Topology {
    Topology::new(&settings.amqp.prefix, &settings.amqp.lanes, &settings.retry.schedule.delays_s())
}

/// The only way out to SMTP servers.
///
/// # Errors
/// When the system names no name server and the settings neither.
pub fn egress(settings: &Settings) -> anyhow::Result<Arc<Egress>> {
    let egress = &settings.egress;
    let ports = match &egress.allowed_ports {
        settings::AllowedPorts::Any => AllowedPorts::Any,
        settings::AllowedPorts::Only(ports) => AllowedPorts::Only(ports.clone()),
    };
    let policy = EgressPolicy::new(egress.allow_networks.clone(), egress.deny_networks.clone(), ports);
    Ok(Arc::new(Egress::new(policy, &egress.nameservers)?))
}

/// The keys that credentials are sealed under.
///
/// # Errors
/// When an item is no key; the message names it by position and id.
pub fn key_ring(settings: &Settings) -> anyhow::Result<Arc<KeyRing>> {
    Ok(Arc::new(KeyRing::parse(&settings.encryption.keys)?))
}
