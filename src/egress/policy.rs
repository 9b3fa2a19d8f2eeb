//! Which IP addresses an organization's server may have: one table of every special-purpose block.
//! Guarantee: pure; an address is public only if it is IPv4 outside every listed block, or IPv6 inside
//! 2000::/3 and outside every listed block; whatever carries an IPv4 address inside is never more public than
//! that address.

use std::collections::BTreeSet;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

/// Whether an address may be dialled on behalf of an organization.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// An ordinary address of the public internet, or one that the operator exempted.
    Public,
    /// Not to be dialled, and why.
    Refused(Refusal),
}

/// Why an address, or a name, is refused: the kind of special-purpose block that it belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Refusal {
    /// `0.0.0.0` and `::` (RFC 1122 section 3.2.1.3, RFC 4291 section 2.5.2): many systems connect to
    /// themselves.
    Unspecified,
    /// The rest of `0.0.0.0/8` (RFC 791 section 3.2).
    ThisNetwork,
    /// `127.0.0.0/8` and `::1` (RFC 1122 section 3.2.1.3, RFC 4291 section 2.5.3).
    Loopback,
    /// The three blocks of RFC 1918.
    Private,
    /// `100.64.0.0/10`: between a carrier and its customers (RFC 6598).
    CarrierGradeNat,
    /// `169.254.0.0/16` and `fe80::/10` (RFC 3927, RFC 4291): here live the metadata services of clouds.
    LinkLocal,
    /// `fec0::/10` (RFC 3879): withdrawn, and still private where it is in use.
    SiteLocal,
    /// `fc00::/7` (RFC 4193).
    UniqueLocal,
    /// `192.0.0.0/24` and `2001::/23`: for protocols, among them anycast addresses of the local network (RFC
    /// 6890).
    ProtocolAssignment,
    /// The blocks that examples are made of (RFC 5737, RFC 3849, RFC 9637).
    Documentation,
    /// `198.18.0.0/15` and `2001:2::/48` (RFC 2544, RFC 5180).
    Benchmarking,
    /// Sinks that a network may run for itself: AS112 (RFC 7534, RFC 7535).
    As112,
    /// `192.52.193.0/24` and `2001:3::/32`: relays for multicast tunnels (RFC 7450).
    MulticastRelay,
    /// `224.0.0.0/4` and `ff00::/8`.
    Multicast,
    /// `255.255.255.255` (RFC 919).
    Broadcast,
    /// `240.0.0.0/4`, and IPv6 space that is not assigned for unicast.
    Reserved,
    /// `100::/64` and `100:0:0:1::/64` (RFC 6666, RFC 9780).
    DiscardOnly,
    /// `5f00::/16` (RFC 9602).
    SegmentRouting,
    /// `::a.b.c.d` (RFC 4291 section 2.5.5.1) and `::ffff:0:a.b.c.d` (RFC 2765): withdrawn ways to carry an
    /// IPv4 address.
    EmbeddedIpv4,
    /// `64:ff9b:1::/48`: leads to whatever IPv4 network the local translator serves (RFC 8215).
    LocalNat64,
    /// `2002::/16` and its relays' `192.88.99.0/24` (RFC 3056, RFC 7526).
    SixToFour,
    /// `2001::/32` (RFC 4380).
    Teredo,
    /// An interface identifier that tunnels to the IPv4 address inside (RFC 5214).
    Isatap,
    /// In one of the operator's `egress.deny_networks`.
    Denied,
    /// A name that only a local network gives a meaning to; refused before any look-up.
    InternalName,
}

impl Refusal {
    /// A fixed word for logs and for the `reason` label of a metric.
    pub fn label(self) -> &'static str {
        match self {
            Self::Unspecified => "unspecified",
            Self::ThisNetwork => "this_network",
            Self::Loopback => "loopback",
            Self::Private => "private",
            Self::CarrierGradeNat => "carrier_grade_nat",
            Self::LinkLocal => "link_local",
            Self::SiteLocal => "site_local",
            Self::UniqueLocal => "unique_local",
            Self::ProtocolAssignment => "protocol_assignment",
            Self::Documentation => "documentation",
            Self::Benchmarking => "benchmarking",
            Self::As112 => "as112",
            Self::MulticastRelay => "multicast_relay",
            Self::Multicast => "multicast",
            Self::Broadcast => "broadcast",
            Self::Reserved => "reserved",
            Self::DiscardOnly => "discard_only",
            Self::SegmentRouting => "segment_routing",
            Self::EmbeddedIpv4 => "embedded_ipv4",
            Self::LocalNat64 => "local_nat64",
            Self::SixToFour => "6to4",
            Self::Teredo => "teredo",
            Self::Isatap => "isatap",
            Self::Denied => "denied",
            Self::InternalName => "internal_name",
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.label())
    }
}

const fn v4(a: u8, b: u8, c: u8, d: u8, prefix: u8) -> Ipv4Net {
    Ipv4Net::new_assert(Ipv4Addr::new(a, b, c, d), prefix)
}

const fn v6(segments: [u16; 8], prefix: u8) -> Ipv6Net {
    let [a, b, c, d, e, f, g, h] = segments;
    Ipv6Net::new_assert(Ipv6Addr::new(a, b, c, d, e, f, g, h), prefix)
}

/// IANA's IPv4 special-purpose registry, multicast and class E. Blocks that the registry calls globally
/// reachable are here as well: none of them is a place for a mail server, and some are answered by the
/// nearest network. The first match names the reason.
const IPV4_BLOCKS: &[(Ipv4Net, Refusal)] = &[
    (v4(0, 0, 0, 0, 32), Refusal::Unspecified),
    (v4(0, 0, 0, 0, 8), Refusal::ThisNetwork),
    (v4(10, 0, 0, 0, 8), Refusal::Private),
    (v4(100, 64, 0, 0, 10), Refusal::CarrierGradeNat),
    (v4(127, 0, 0, 0, 8), Refusal::Loopback),
    (v4(169, 254, 0, 0, 16), Refusal::LinkLocal),
    (v4(172, 16, 0, 0, 12), Refusal::Private),
    (v4(192, 0, 0, 0, 24), Refusal::ProtocolAssignment),
    (v4(192, 0, 2, 0, 24), Refusal::Documentation),
    (v4(192, 31, 196, 0, 24), Refusal::As112),
    (v4(192, 52, 193, 0, 24), Refusal::MulticastRelay),
    (v4(192, 88, 99, 0, 24), Refusal::SixToFour),
    (v4(192, 168, 0, 0, 16), Refusal::Private),
    (v4(192, 175, 48, 0, 24), Refusal::As112),
    (v4(198, 18, 0, 0, 15), Refusal::Benchmarking),
    (v4(198, 51, 100, 0, 24), Refusal::Documentation),
    (v4(203, 0, 113, 0, 24), Refusal::Documentation),
    (v4(224, 0, 0, 0, 4), Refusal::Multicast),
    (v4(255, 255, 255, 255, 32), Refusal::Broadcast),
    (v4(240, 0, 0, 0, 4), Refusal::Reserved),
];

/// The IPv6 space that IANA hands out for unicast; everything outside is refused.
const IPV6_UNICAST: Ipv6Net = v6([0x2000, 0, 0, 0, 0, 0, 0, 0], 3);

/// IANA's IPv6 special-purpose registry. Blocks outside [`IPV6_UNICAST`] would be refused without a row;
/// theirs name the reason. The first match counts.
const IPV6_BLOCKS: &[(Ipv6Net, Refusal)] = &[
    (v6([0, 0, 0, 0, 0, 0, 0, 0], 128), Refusal::Unspecified),
    (v6([0, 0, 0, 0, 0, 0, 0, 1], 128), Refusal::Loopback),
    (IPV4_COMPATIBLE, Refusal::EmbeddedIpv4),
    (IPV4_TRANSLATED, Refusal::EmbeddedIpv4),
    (v6([0x64, 0xff9b, 1, 0, 0, 0, 0, 0], 48), Refusal::LocalNat64),
    (v6([0x100, 0, 0, 0, 0, 0, 0, 0], 64), Refusal::DiscardOnly),
    (v6([0x100, 0, 0, 1, 0, 0, 0, 0], 64), Refusal::DiscardOnly),
    (TEREDO, Refusal::Teredo),
    (v6([0x2001, 2, 0, 0, 0, 0, 0, 0], 48), Refusal::Benchmarking),
    (v6([0x2001, 3, 0, 0, 0, 0, 0, 0], 32), Refusal::MulticastRelay),
    (v6([0x2001, 4, 0x112, 0, 0, 0, 0, 0], 48), Refusal::As112),
    (v6([0x2001, 0, 0, 0, 0, 0, 0, 0], 23), Refusal::ProtocolAssignment),
    (v6([0x2001, 0xdb8, 0, 0, 0, 0, 0, 0], 32), Refusal::Documentation),
    (SIX_TO_FOUR, Refusal::SixToFour),
    (v6([0x2620, 0x4f, 0x8000, 0, 0, 0, 0, 0], 48), Refusal::As112),
    (v6([0x3fff, 0, 0, 0, 0, 0, 0, 0], 20), Refusal::Documentation),
    (v6([0x5f00, 0, 0, 0, 0, 0, 0, 0], 16), Refusal::SegmentRouting),
    (v6([0xfc00, 0, 0, 0, 0, 0, 0, 0], 7), Refusal::UniqueLocal),
    (v6([0xfe80, 0, 0, 0, 0, 0, 0, 0], 10), Refusal::LinkLocal),
    (v6([0xfec0, 0, 0, 0, 0, 0, 0, 0], 10), Refusal::SiteLocal),
    (v6([0xff00, 0, 0, 0, 0, 0, 0, 0], 8), Refusal::Multicast),
];

const IPV4_COMPATIBLE: Ipv6Net = v6([0, 0, 0, 0, 0, 0, 0, 0], 96);
const IPV4_TRANSLATED: Ipv6Net = v6([0, 0, 0, 0, 0xffff, 0, 0, 0], 96);
const IPV4_MAPPED: Ipv6Net = v6([0, 0, 0, 0, 0, 0xffff, 0, 0], 96);
/// Leads to the IPv4 address inside (RFC 6052 section 2.1). A translator's own prefix cannot be told from an
/// ordinary address: an operator with one lists it in `egress.deny_networks`.
const NAT64: Ipv6Net = v6([0x64, 0xff9b, 0, 0, 0, 0, 0, 0], 96);
const SIX_TO_FOUR: Ipv6Net = v6([0x2002, 0, 0, 0, 0, 0, 0, 0], 16);
const TEREDO: Ipv6Net = v6([0x2001, 0, 0, 0, 0, 0, 0, 0], 32);

/// What the registries say of an address, without any operator's list.
pub fn judge(ip: IpAddr) -> Verdict {
    match ip.to_canonical() {
        IpAddr::V4(ip) => judge_v4(ip),
        IpAddr::V6(ip) => judge_v6(ip),
    }
}

fn judge_v4(ip: Ipv4Addr) -> Verdict {
    match IPV4_BLOCKS.iter().find(|(block, _)| block.contains(&ip)) {
        Some(&(_, why)) => Verdict::Refused(why),
        None => Verdict::Public,
    }
}

fn judge_v6(ip: Ipv6Addr) -> Verdict {
    if NAT64.contains(&ip) {
        return judge_v4(low_32_bits(ip));
    }
    if let Some(&(_, why)) = IPV6_BLOCKS.iter().find(|(block, _)| block.contains(&ip)) {
        return Verdict::Refused(why);
    }
    if !IPV6_UNICAST.contains(&ip) {
        return Verdict::Refused(Refusal::Reserved);
    }
    if is_isatap(ip) {
        return Verdict::Refused(Refusal::Isatap);
    }
    Verdict::Public
}

/// RFC 5214 section 6.1: the interface identifier is `0:5efe` or `200:5efe` (the universal bit set) and an
/// IPv4 address.
fn is_isatap(ip: Ipv6Addr) -> bool {
    let segments = ip.segments();
    matches!(segments[4], 0 | 0x200) && segments[5] == 0x5efe
}

fn low_32_bits(ip: Ipv6Addr) -> Ipv4Addr {
    let [.., a, b, c, d] = ip.octets();
    Ipv4Addr::new(a, b, c, d)
}

/// The IPv4 address that an IPv6 address carries, in any known form.
fn embedded_ipv4(ip: Ipv6Addr) -> Option<Ipv4Addr> {
    let in_low_bits =
        [IPV4_MAPPED, IPV4_COMPATIBLE, IPV4_TRANSLATED, NAT64].iter().any(|net| net.contains(&ip));
    if in_low_bits || is_isatap(ip) {
        return Some(low_32_bits(ip));
    }
    let octets = ip.octets();
    if SIX_TO_FOUR.contains(&ip) {
        return Some(Ipv4Addr::new(octets[2], octets[3], octets[4], octets[5]));
    }
    // RFC 4380 section 4: the client's address has every bit inverted.
    TEREDO.contains(&ip).then(|| Ipv4Addr::from_bits(!low_32_bits(ip).to_bits()))
}

/// The ports that an organization's server may listen on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AllowedPorts {
    /// Every port but 0.
    Any,
    /// These and no other.
    Only(BTreeSet<u16>),
}

impl AllowedPorts {
    fn contains(&self, port: u16) -> bool {
        match self {
            Self::Any => port != 0,
            Self::Only(ports) => port != 0 && ports.contains(&port),
        }
    }
}

/// The ports in ascending order, separated by commas.
impl fmt::Display for AllowedPorts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Any => f.write_str("1-65535"),
            Self::Only(ports) => {
                for (index, port) in ports.iter().enumerate() {
                    let separator = if index == 0 { "" } else { ", " };
                    write!(f, "{separator}{port}")?;
                }
                Ok(())
            }
        }
    }
}

/// The public-address rule together with what the operator exempts and forbids (`egress.*` of the settings).
#[derive(Debug, Clone)]
pub struct EgressPolicy {
    allow: Vec<IpNet>,
    deny: Vec<IpNet>,
    ports: AllowedPorts,
}

impl EgressPolicy {
    /// `allow`: networks exempt from the public-address rule. `deny`: networks that are never dialled,
    /// whatever `allow` says. A network written in IPv4-mapped form means the IPv4 network.
    pub fn new(allow: Vec<IpNet>, deny: Vec<IpNet>, ports: AllowedPorts) -> Self {
        let unmapped = |nets: Vec<IpNet>| nets.into_iter().map(unmap).collect();
        Self { allow: unmapped(allow), deny: unmapped(deny), ports }
    }

    /// Judges one address: the deny list first, then the allow list, then the registries. The deny list also
    /// looks at an IPv4 address inside an IPv6 one.
    pub fn judge(&self, ip: IpAddr) -> Verdict {
        let ip = ip.to_canonical();
        let inner = match ip {
            IpAddr::V4(_) => None,
            IpAddr::V6(ip) => embedded_ipv4(ip).map(IpAddr::V4),
        };
        let within = |nets: &[IpNet], ip: IpAddr| nets.iter().any(|net| net.contains(&ip));
        if within(&self.deny, ip) || inner.is_some_and(|inner| within(&self.deny, inner)) {
            return Verdict::Refused(Refusal::Denied);
        }
        if within(&self.allow, ip) {
            return Verdict::Public;
        }
        judge(ip)
    }

    /// Whether an organization's server may be dialled at this port.
    pub fn port_allowed(&self, port: u16) -> bool {
        self.ports.contains(port)
    }

    /// The allowed ports, for messages.
    pub fn ports(&self) -> &AllowedPorts {
        &self.ports
    }

    /// Whether the operator exempts any network: then a name of the local network can be right, and its
    /// addresses decide.
    pub fn exempts_networks(&self) -> bool {
        !self.allow.is_empty()
    }
}

fn unmap(net: IpNet) -> IpNet {
    match net {
        IpNet::V6(net) if IPV4_MAPPED.contains(&net) => {
            let inner =
                Ipv4Net::new_assert(low_32_bits(net.addr()), net.prefix_len() - IPV4_MAPPED.prefix_len());
            IpNet::V4(inner)
        }
        other => other,
    }
}

#[cfg(test)]
mod tests;
