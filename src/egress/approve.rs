//! The decision: may this host and port be dialled now, and at which addresses?
//! Guarantee: one refused address refuses the whole name, and nothing but an address that was judged here, in
//! this call, becomes an [`ApprovedAddr`].

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use super::host::{HostName, ServerHost};
use super::policy::{EgressPolicy, Refusal, Verdict};
use super::resolver::{Found, LookUpError, NoNameservers, Resolver, without_duplicates};

/// The system's own resolver has its own, longer ideas.
const SYSTEM_LOOK_UP_LIMIT: Duration = Duration::from_secs(5);

/// An address and port that may be dialled. Only [`Egress`] makes one. It is meant for the next moment: a
/// later connection asks again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ApprovedAddr(SocketAddr);

impl ApprovedAddr {
    /// The address, for messages and logs.
    pub fn socket_addr(&self) -> SocketAddr {
        self.0
    }

    #[cfg(test)]
    pub(super) fn for_test(address: SocketAddr) -> Self {
        Self(address)
    }
}

/// A host that the operator wrote into the settings, to which the public-address rule does not apply. A type
/// of its own, so that an organization's host cannot take this way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OperatorsHost(ServerHost);

impl OperatorsHost {
    /// Only for a host out of the operator's settings.
    pub fn from_settings(host: ServerHost) -> Self {
        Self(host)
    }

    /// The host, to verify a certificate against.
    pub fn host(&self) -> &ServerHost {
        &self.0
    }
}

/// Why a host may not, or cannot, be dialled. The messages are fit for an organization's admin: they tell
/// nothing of the network inside.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EgressError {
    /// An address of the host, or its name, is not of the public internet.
    #[error("SMTP host must be a public address")]
    HostNotPublic {
        /// Which rule refused it; for the operator's logs and metrics.
        refusal: Refusal,
    },
    /// The port is not among `egress.allowed_ports`.
    #[error("port {port} is not allowed; allowed: {allowed}")]
    PortNotAllowed {
        /// The port asked for.
        port: u16,
        /// The allowed ports in words.
        allowed: String,
    },
    /// The name does not exist or has no address.
    #[error("the host name does not exist or has no address")]
    HostNotFound,
    /// The name could not be looked up now.
    #[error("the host name could not be looked up: {detail}")]
    DnsFailed {
        /// What the name servers or the resolver said.
        detail: String,
    },
}

impl EgressError {
    /// The contract's error code and reason.
    pub fn reason_code(&self) -> &'static str {
        match self {
            Self::HostNotPublic { .. } => "host_not_public",
            Self::PortNotAllowed { .. } => "port_not_allowed",
            Self::HostNotFound => "host_not_found",
            Self::DnsFailed { .. } => "dns_failed",
        }
    }

    /// The rule that refused the connection, a fixed word for a metric's label; none where a look-up failed.
    pub fn rule(&self) -> Option<&'static str> {
        match self {
            Self::HostNotPublic { refusal } => Some(refusal.label()),
            Self::PortNotAllowed { .. } => Some(self.reason_code()),
            Self::HostNotFound | Self::DnsFailed { .. } => None,
        }
    }
}

impl From<LookUpError> for EgressError {
    fn from(error: LookUpError) -> Self {
        match error {
            LookUpError::NotFound => Self::HostNotFound,
            LookUpError::ViaInternalName => Self::HostNotPublic { refusal: Refusal::InternalName },
            LookUpError::Failed(detail) => Self::DnsFailed { detail },
        }
    }
}

/// The gate that every connection to a mail server passes.
#[derive(Debug)]
pub struct Egress {
    policy: EgressPolicy,
    pub(super) resolver: Resolver,
    nameservers_given: bool,
}

impl Egress {
    /// `nameservers`: those to ask instead of the system's; empty for the system's.
    pub fn new(policy: EgressPolicy, nameservers: &[SocketAddr]) -> Result<Self, NoNameservers> {
        let resolver = Resolver::new(nameservers)?;
        Ok(Self { policy, resolver, nameservers_given: !nameservers.is_empty() })
    }

    /// The rule in force.
    pub fn policy(&self) -> &EgressPolicy {
        &self.policy
    }

    /// Looks an organization's host up and judges every address of it; cheap while the DNS's TTL lasts. Never
    /// empty.
    ///
    /// Names for local use are refused before any look-up, unless the operator exempts networks; then their
    /// addresses decide, and one without any is refused alike. `localhost` and names under it are the two loopback addresses, never asked of a name
    /// server (RFC 6761 section 6.3); those of the two that are exempt are approved.
    pub async fn approve(&self, host: &ServerHost, port: u16) -> Result<Vec<ApprovedAddr>, EgressError> {
        if !self.policy.port_allowed(port) {
            let allowed = self.policy.ports().to_string();
            return Err(EgressError::PortNotAllowed { port, allowed });
        }
        let addresses = match host {
            ServerHost::Ip(ip) => vec![*ip],
            ServerHost::Name(name) => self.organizations_addresses(name).await?,
        };
        for ip in &addresses {
            if let Verdict::Refused(refusal) = self.policy.judge(*ip) {
                return Err(EgressError::HostNotPublic { refusal });
            }
        }
        Ok(approved(addresses, port))
    }

    /// Looks the platform's own server up: the operator chose it, so neither the public-address rule nor the
    /// list of ports applies. Never empty.
    ///
    /// With the system's name servers the look-up is the system's own, hosts file and search domains
    /// included, so that a container's service name works; the system does not tell an unknown name from a
    /// failing name server, and both are `DnsFailed`.
    pub async fn approve_operators_host(
        &self,
        host: &OperatorsHost,
        port: u16,
    ) -> Result<Vec<ApprovedAddr>, EgressError> {
        let addresses = match host.host() {
            ServerHost::Ip(ip) => vec![*ip],
            ServerHost::Name(name) if !self.nameservers_given => system_look_up(name).await?,
            ServerHost::Name(name) if name.is_localhost() => LOOPBACK.to_vec(),
            ServerHost::Name(name) => self.resolver.addresses(name).await?.addresses,
        };
        Ok(approved(addresses, port))
    }

    async fn organizations_addresses(&self, name: &HostName) -> Result<Vec<IpAddr>, EgressError> {
        let local_names_count = self.policy.exempts_networks();
        let not_public = Err(EgressError::HostNotPublic { refusal: Refusal::InternalName });
        if name.is_internal_name() && !local_names_count {
            return not_public;
        }
        if name.is_localhost() {
            return Ok(self.loopback_addresses());
        }
        match self.resolver.addresses(name).await {
            // Whether the name exists is the local network's own affair.
            Err(LookUpError::NotFound) if name.is_internal_name() => not_public,
            Ok(Found { via_internal_name: true, .. }) if !local_names_count => not_public,
            Err(LookUpError::ViaInternalName) if local_names_count => Err(EgressError::HostNotFound),
            Ok(found) => Ok(found.addresses),
            Err(error) => Err(error.into()),
        }
    }

    /// Both loopback addresses, or the exempt one where only one is: here no stranger chose the addresses.
    fn loopback_addresses(&self) -> Vec<IpAddr> {
        let exempt: Vec<IpAddr> =
            LOOPBACK.into_iter().filter(|ip| self.policy.judge(*ip) == Verdict::Public).collect();
        if exempt.is_empty() { LOOPBACK.to_vec() } else { exempt }
    }
}

const LOOPBACK: [IpAddr; 2] = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];

fn approved(addresses: Vec<IpAddr>, port: u16) -> Vec<ApprovedAddr> {
    addresses.into_iter().map(|ip| ApprovedAddr(SocketAddr::new(ip, port))).collect()
}

async fn system_look_up(name: &HostName) -> Result<Vec<IpAddr>, EgressError> {
    let look_up = tokio::net::lookup_host((name.as_str(), 0));
    let found = match tokio::time::timeout(SYSTEM_LOOK_UP_LIMIT, look_up).await {
        Ok(Ok(found)) => without_duplicates(found.map(|address| address.ip())),
        Ok(Err(error)) => return Err(EgressError::DnsFailed { detail: error.to_string() }),
        Err(_) => {
            let detail = format!("no answer within {} s", SYSTEM_LOOK_UP_LIMIT.as_secs());
            return Err(EgressError::DnsFailed { detail });
        }
    };
    if found.is_empty() { Err(EgressError::HostNotFound) } else { Ok(found) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_systems_own_look_up_knows_the_names_of_this_machine() {
        let ServerHost::Name(localhost) = ServerHost::parse("localhost").expect("a name") else {
            panic!("localhost is a name");
        };
        let found = system_look_up(&localhost).await.expect("every system knows localhost");
        assert!(found.iter().all(IpAddr::is_loopback) && !found.is_empty(), "{found:?}");
    }
}
