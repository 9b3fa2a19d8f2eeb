//! From a host name to all of its addresses, over the DNS alone.
//! Guarantee: neither the hosts file nor a search domain has a say, an answer is kept no longer than its TTL,
//! and a look-up ends in time.

use std::future::Future;
use std::net::{IpAddr, SocketAddr};
use std::pin::pin;
use std::time::Duration;

use futures_util::future::{Either, select};
use hickory_resolver::TokioResolver;
use hickory_resolver::config::{NameServerConfig, ResolveHosts, ResolverConfig, ResolverOpts};
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::net::{DnsError, NetError};
use hickory_resolver::proto::rr::{Name, RData, RecordType};

use super::host::{self, HostName};
use crate::model::sender_records::{Answer, MailExchanger};

/// One question to the name servers, and how often it is asked again.
const QUERY_LIMIT: Duration = Duration::from_secs(2);
const QUERY_RETRIES: usize = 1;

/// The addresses of a name, both families together.
const ADDRESSES_LIMIT: Duration = Duration::from_secs(4);

/// What the slower family gets once the other one has brought addresses: name servers that drop AAAA
/// questions exist, and must not slow every connection down.
const OTHER_FAMILY_LIMIT: Duration = Duration::from_secs(1);

/// Following the aliases of a name that has no address to show.
const ALIASES_LIMIT: Duration = Duration::from_secs(1);
const MAX_ALIASES: usize = 8;

/// A name, whatever comes of it.
pub const LOOK_UP_LIMIT: Duration = ADDRESSES_LIMIT.saturating_add(ALIASES_LIMIT);

/// Bounds on how long an answer is kept when its TTL is longer: an admin who has changed a record expects it
/// to count.
const POSITIVE_MAX_TTL: Duration = Duration::from_secs(300);
const NEGATIVE_MAX_TTL: Duration = Duration::from_secs(30);

/// The system's name servers could not be read; none were given either.
#[derive(Debug, thiserror::Error)]
#[error("the system names no name server ({detail}): set egress.nameservers to a list of ip:port")]
pub struct NoNameservers {
    detail: String,
}

/// Asks the name servers, with a cache. The system's configuration is read once, when it is made.
#[derive(Debug)]
pub(super) struct Resolver {
    dns: TokioResolver,
}

/// What the DNS says of a name.
#[derive(Debug)]
pub(super) struct Found {
    /// Every address of both families, without duplicates; never empty.
    pub(super) addresses: Vec<IpAddr>,
    /// Whether an alias (CNAME) on the way has a name for local use.
    pub(super) via_internal_name: bool,
}

/// Why a look-up gave no address.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum LookUpError {
    /// The name does not exist, or has an address of neither family.
    NotFound,
    /// The name is an alias of one for local use: whether that one exists is not told.
    ViaInternalName,
    /// It could not be found out now.
    Failed(String),
}

/// One family's part of a look-up.
enum Family {
    Addresses(Found),
    None,
    Failed(String),
}

impl Resolver {
    /// With the given name servers, or the system's when there are none.
    pub(super) fn new(nameservers: &[SocketAddr]) -> Result<Self, NoNameservers> {
        let unusable = |error: NetError| NoNameservers { detail: error.to_string() };
        let mut builder = if nameservers.is_empty() {
            TokioResolver::builder_tokio().map_err(unusable)?
        } else {
            let servers = nameservers.iter().copied().map(udp_and_tcp).collect();
            let config = ResolverConfig::from_name_servers(servers);
            TokioResolver::builder_with_config(config, TokioRuntimeProvider::default())
        };
        bound(builder.options_mut());
        Ok(Self { dns: builder.build().map_err(unusable)? })
    }

    /// Every address of a name. Where one family fails and the other answers, the answered one counts: an
    /// address that was not seen is not judged, and is not dialled either.
    pub(super) async fn addresses(&self, host: &HostName) -> Result<Found, LookUpError> {
        let name = absolute(host)?;
        let error = match tokio::time::timeout(ADDRESSES_LIMIT, self.both_families(&name)).await {
            Ok(Ok(found)) => return Ok(found),
            Ok(Err(error)) => error,
            Err(_) => LookUpError::Failed(no_answer_within(ADDRESSES_LIMIT)),
        };
        match tokio::time::timeout(ALIASES_LIMIT, self.leads_to_internal_name(name)).await {
            Ok(true) => Err(LookUpError::ViaInternalName),
            Ok(false) | Err(_) => Err(error),
        }
    }

    async fn both_families(&self, name: &Name) -> Result<Found, LookUpError> {
        let v6 = pin!(self.family(name, RecordType::AAAA));
        let v4 = pin!(self.family(name, RecordType::A));
        // Equal types on both sides, so that what follows is the same whichever came first.
        match select(v6, v4).await {
            Either::Left((v6, v4)) => {
                let v4 = rest(&v6, v4).await;
                merge(v6, v4)
            }
            Either::Right((v4, v6)) => {
                let v6 = rest(&v4, v6).await;
                merge(v6, v4)
            }
        }
    }

    async fn family(&self, name: &Name, record_type: RecordType) -> Family {
        let lookup = match self.dns.lookup(name.clone(), record_type).await {
            Ok(lookup) => lookup,
            Err(NetError::Dns(DnsError::NoRecordsFound(_))) => return Family::None,
            Err(error) => return Family::Failed(in_words(&error)),
        };
        let answers = lookup.answers();
        let addresses: Vec<IpAddr> = answers.iter().filter_map(|record| record.data.ip_addr()).collect();
        if addresses.is_empty() {
            return Family::None;
        }
        let via_internal_name = answers.iter().filter_map(|record| alias(&record.data)).any(is_internal);
        Family::Addresses(Found { addresses, via_internal_name })
    }

    /// The TXT records of a name, each with its strings joined; what is not UTF-8 in them is replaced.
    pub(super) async fn texts(&self, name: &str) -> Answer<String> {
        self.records(name, RecordType::TXT, |data| match data {
            RData::TXT(text) => Some(String::from_utf8_lossy(&text.txt_data.concat()).into_owned()),
            _ => None,
        })
        .await
    }

    /// The MX records of a name.
    pub(super) async fn exchangers(&self, name: &str) -> Answer<MailExchanger> {
        self.records(name, RecordType::MX, |data| match data {
            RData::MX(mx) => {
                let host = mx.exchange.to_lowercase().to_ascii().trim_end_matches('.').to_owned();
                Some(MailExchanger { preference: mx.preference, host })
            }
            _ => None,
        })
        .await
    }

    /// Records of one type. What an alias leads to under a name for local use counts as not there.
    async fn records<T>(
        &self,
        name: &str,
        record_type: RecordType,
        read: impl Fn(&RData) -> Option<T>,
    ) -> Answer<T> {
        let Ok(name) = Name::from_ascii(format!("{name}.")) else {
            return Answer::Failed("not a domain name".to_owned());
        };
        let lookup = match self.dns.lookup(name, record_type).await {
            Ok(lookup) => lookup,
            Err(NetError::Dns(DnsError::NoRecordsFound(_))) => return Answer::None,
            Err(error) => return Answer::Failed(in_words(&error)),
        };
        let answers = lookup.answers();
        if answers.iter().filter_map(|record| alias(&record.data)).any(is_internal) {
            return Answer::None;
        }
        let found: Vec<T> = answers.iter().filter_map(|record| read(&record.data)).collect();
        if found.is_empty() { Answer::None } else { Answer::Found(found) }
    }

    /// Whether an alias leads to a name for local use. Asked only when there is no address, for otherwise
    /// "not found" and "not public" would tell which internal names exist.
    async fn leads_to_internal_name(&self, mut name: Name) -> bool {
        for _ in 0..MAX_ALIASES {
            let Ok(lookup) = self.dns.lookup(name, RecordType::CNAME).await else {
                return false;
            };
            match lookup.answers().iter().find_map(|record| alias(&record.data)) {
                Some(target) if is_internal(target) => return true,
                Some(target) => name = target.clone(),
                None => return false,
            }
        }
        false
    }
}

fn udp_and_tcp(address: SocketAddr) -> NameServerConfig {
    let mut server = NameServerConfig::udp_and_tcp(address.ip());
    for connection in &mut server.connections {
        connection.port = address.port();
    }
    server
}

fn bound(options: &mut ResolverOpts) {
    options.use_hosts_file = ResolveHosts::Never;
    options.timeout = QUERY_LIMIT;
    options.attempts = QUERY_RETRIES;
    options.positive_max_ttl = Some(POSITIVE_MAX_TTL);
    options.negative_max_ttl = Some(NEGATIVE_MAX_TTL);
    // The aliases of an answer are looked at.
    options.preserve_intermediates = true;
}

/// The trailing dot keeps search domains out.
fn absolute(host: &HostName) -> Result<Name, LookUpError> {
    Name::from_ascii(format!("{host}.")).map_err(|error| LookUpError::Failed(error.to_string()))
}

/// The second family's answer, awaited for long only when the first has nothing to go on with.
async fn rest(first: &Family, second: impl Future<Output = Family>) -> Family {
    if !matches!(first, Family::Addresses(_)) {
        return second.await;
    }
    match tokio::time::timeout(OTHER_FAMILY_LIMIT, second).await {
        Ok(family) => family,
        Err(_) => Family::Failed(no_answer_within(OTHER_FAMILY_LIMIT)),
    }
}

fn merge(v6: Family, v4: Family) -> Result<Found, LookUpError> {
    match (v6, v4) {
        (Family::Addresses(v6), Family::Addresses(v4)) => Ok(Found {
            addresses: without_duplicates(v6.addresses.into_iter().chain(v4.addresses)),
            via_internal_name: v6.via_internal_name || v4.via_internal_name,
        }),
        (Family::Addresses(found), _) | (_, Family::Addresses(found)) => {
            Ok(Found { addresses: without_duplicates(found.addresses), ..found })
        }
        (Family::None, Family::None) => Err(LookUpError::NotFound),
        (Family::Failed(detail), _) | (_, Family::Failed(detail)) => Err(LookUpError::Failed(detail)),
    }
}

/// In the order of the first appearance; an IPv4-mapped address is the IPv4 address.
pub(super) fn without_duplicates(addresses: impl IntoIterator<Item = IpAddr>) -> Vec<IpAddr> {
    let mut seen = std::collections::HashSet::new();
    addresses.into_iter().map(|ip| ip.to_canonical()).filter(|ip| seen.insert(*ip)).collect()
}

fn alias(data: &RData) -> Option<&Name> {
    match data {
        RData::CNAME(target) => Some(&target.0),
        _ => None,
    }
}

fn is_internal(name: &Name) -> bool {
    host::is_internal(name.to_lowercase().to_ascii().trim_end_matches('.'))
}

pub(super) fn no_answer_within(limit: Duration) -> String {
    format!("no answer within {} s", limit.as_secs())
}

fn in_words(error: &NetError) -> String {
    match error {
        NetError::Dns(DnsError::ResponseCode(code)) => format!("the name server answered: {code}"),
        NetError::Timeout => no_answer_within(QUERY_LIMIT),
        other => other.to_string(),
    }
}
