//! What `sendoff check` can find out about the broker without changing anything on it.
//! Guarantee: nothing is created; what cannot be seen over AMQP is said to be unseen, not passed.

use std::time::Duration;

use super::connection::{self, Access, BrokerError, Version};
use super::topology::{self, Passive, Topology};

/// Quorum queues dead-letter at-least-once from here on.
const OLDEST: (u32, u32) = (3, 10);
/// From here on a broker does not start without the feature flag `stream_queue`.
const FLAG_REQUIRED_SINCE: (u32, u32) = (3, 12);

/// For everything to be looked at.
const LIMIT: Duration = Duration::from_secs(60);

/// One line of the check.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// What was looked at.
    pub subject: String,
    /// How it stands.
    pub standing: Standing,
}

/// How something stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Standing {
    /// As it should be; with what was seen.
    Good(String),
    /// Cannot be seen from here; with what a person can do to make sure.
    Unseen(String),
    /// Wrong; with what to do.
    Bad(String),
}

/// Looks at the broker and at everything that should be on it.
///
/// # Errors
/// [`BrokerError`] when no connection can be made at all.
pub async fn inspect(access: &Access, topology: &Topology) -> Result<Vec<Finding>, BrokerError> {
    let connection = connection::open(access, "check").await?;
    let version = connection::version(access).await;
    let mut findings = vec![broker(access, version.as_ref()), dead_lettering(version.as_ref())];
    let looked = connection::within(LIMIT, look(&connection, topology, &mut findings)).await;
    connection::close(&connection).await;
    looked.map(|()| findings)
}

async fn look(
    connection: &lapin::Connection,
    topology: &Topology,
    findings: &mut Vec<Finding>,
) -> Result<(), BrokerError> {
    let before = findings.len();
    for exchange in &topology.exchanges {
        for passive in [Passive::Yes, Passive::No] {
            // A channel each: a failure closes it. Declaring what was just seen to exist compares the settings only.
            let channel = topology::open_channel(connection).await?;
            if let Err(error) = exchange.declare(&channel, passive).await {
                findings.push(complaint(&error)?);
                break;
            }
        }
    }
    for queue in &topology.queues {
        for passive in [Passive::Yes, Passive::No] {
            let channel = topology::open_channel(connection).await?;
            if let Err(error) = queue.declare(&channel, passive).await {
                findings.push(complaint(&error)?);
                break;
            }
        }
    }
    if findings.len() == before {
        let (exchanges, queues) = (topology.exchanges.len(), topology.queues.len());
        let seen = format!("{exchanges} exchanges and {queues} queues, with the right settings");
        findings.push(finding("topology", Standing::Good(seen)));
    }
    let bindings =
        "AMQP has no way to list bindings; `sendoff topology declare` makes every one that is missing";
    findings.push(finding("bindings", Standing::Unseen(bindings.to_owned())));
    Ok(())
}

fn broker(access: &Access, version: Option<&Version>) -> Finding {
    let url = access.url();
    finding(
        "broker",
        match version {
            Some(version) if version.number < OLDEST => {
                Standing::Bad(format!("{url} is RabbitMQ {}; Sendoff needs 3.10 or newer", version.text))
            }
            Some(version) => Standing::Good(format!("{url} is RabbitMQ {}", version.text)),
            None => Standing::Unseen(format!(
                "{url} answers, but does not say that it is RabbitMQ; 3.10 or newer is needed"
            )),
        },
    )
}

fn dead_lettering(version: Option<&Version>) -> Finding {
    let standing = match version {
        Some(version) if version.number >= FLAG_REQUIRED_SINCE => {
            Standing::Good(format!("at-least-once is always on in RabbitMQ {}", version.text))
        }
        _ => Standing::Unseen(
            "AMQP does not show feature flags; on a broker upgraded from one older than 3.9 run \
             `rabbitmqctl enable_feature_flag stream_queue` (harmless when it is on), or at-least-once is silently \
             at-most-once"
                .to_owned(),
        ),
    };
    finding("dead-lettering", standing)
}

fn complaint(error: &BrokerError) -> Result<Finding, BrokerError> {
    if error.is_unreachable() {
        return Err(error.clone());
    }
    Ok(finding("topology", Standing::Bad(error.to_string())))
}

fn finding(subject: &str, standing: Standing) -> Finding {
    Finding { subject: subject.to_owned(), standing }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::broker::AmqpUrl;

    #[test]
    fn the_version_decides_what_is_known_about_dead_lettering() {
        let access = Access::new(AmqpUrl::parse("amqp://u:hidden@h/%2f").unwrap());
        let version = |text: &str| Version::parse(text).unwrap();
        assert!(matches!(broker(&access, Some(&version("3.9.29"))).standing, Standing::Bad(_)));
        assert!(matches!(broker(&access, Some(&version("3.10.8"))).standing, Standing::Good(_)));
        assert!(matches!(broker(&access, None).standing, Standing::Unseen(_)));
        assert!(matches!(dead_lettering(Some(&version("3.11.0"))).standing, Standing::Unseen(_)));
        assert!(matches!(dead_lettering(Some(&version("4.2.0-rc.1"))).standing, Standing::Good(_)));
        assert!(!format!("{:?}", broker(&access, None)).contains("hidden"));
    }
}
