//! Which IP addresses an organization's server may have: one table of every special-purpose block.
//! Guarantee: pure; an address is public only if it is IPv4 outside every listed block, or IPv6 inside 2000::/3 and
//! outside every listed block; whatever carries an IPv4 address inside is never more public than that address.

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
    /// `0.0.0.0` and `::` (RFC 1122 section 3.2.1.3, RFC 4291 section 2.5.2): many systems connect to themselves.
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
    /// `192.0.0.0/24` and `2001::/23`: for protocols, among them anycast addresses of the local network (RFC 6890).
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
    /// `::a.b.c.d` (RFC 4291 section 2.5.5.1) and `::ffff:0:a.b.c.d` (RFC 2765): withdrawn ways to carry an IPv4
    /// address.
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

/// IANA's IPv4 special-purpose registry, multicast and class E. Blocks that the registry calls globally reachable are
/// here as well: none of them is a place for a mail server, and some are answered by the nearest network. The first
/// match names the reason.
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

/// IANA's IPv6 special-purpose registry. Blocks outside [`IPV6_UNICAST`] would be refused without a row; theirs name
/// the reason. The first match counts.
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
/// Leads to the IPv4 address inside (RFC 6052 section 2.1). A translator's own prefix cannot be told from an ordinary
/// address: an operator with one lists it in `egress.deny_networks`.
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

/// RFC 5214 section 6.1: the interface identifier is `0:5efe` or `200:5efe` (the universal bit set) and an IPv4
/// address.
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
    let in_low_bits = [IPV4_MAPPED, IPV4_COMPATIBLE, IPV4_TRANSLATED, NAT64].iter().any(|net| net.contains(&ip));
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
    /// `allow`: networks exempt from the public-address rule. `deny`: networks that are never dialled, whatever
    /// `allow` says. A network written in IPv4-mapped form means the IPv4 network.
    pub fn new(allow: Vec<IpNet>, deny: Vec<IpNet>, ports: AllowedPorts) -> Self {
        let unmapped = |nets: Vec<IpNet>| nets.into_iter().map(unmap).collect();
        Self { allow: unmapped(allow), deny: unmapped(deny), ports }
    }

    /// Judges one address: the deny list first, then the allow list, then the registries. The deny list also looks at
    /// an IPv4 address inside an IPv6 one.
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

    /// Whether the operator exempts any network: then a name of the local network can be right, and its addresses
    /// decide.
    pub fn exempts_networks(&self) -> bool {
        !self.allow.is_empty()
    }
}

fn unmap(net: IpNet) -> IpNet {
    match net {
        IpNet::V6(net) if IPV4_MAPPED.contains(&net) => {
            let inner = Ipv4Net::new_assert(low_32_bits(net.addr()), net.prefix_len() - IPV4_MAPPED.prefix_len());
            IpNet::V4(inner)
        }
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Every refused range: first and last address, and the reason; both neighbours outside are in the next table or
    /// belong to another row.
    const REFUSED: &[(&str, &str, Refusal)] = &[
        ("0.0.0.0", "0.0.0.0", Refusal::Unspecified),
        ("0.0.0.1", "0.255.255.255", Refusal::ThisNetwork),
        ("10.0.0.0", "10.255.255.255", Refusal::Private),
        ("100.64.0.0", "100.127.255.255", Refusal::CarrierGradeNat),
        ("127.0.0.0", "127.255.255.255", Refusal::Loopback),
        ("169.254.0.0", "169.254.255.255", Refusal::LinkLocal),
        ("172.16.0.0", "172.31.255.255", Refusal::Private),
        ("192.0.0.0", "192.0.0.255", Refusal::ProtocolAssignment),
        ("192.0.2.0", "192.0.2.255", Refusal::Documentation),
        ("192.31.196.0", "192.31.196.255", Refusal::As112),
        ("192.52.193.0", "192.52.193.255", Refusal::MulticastRelay),
        ("192.88.99.0", "192.88.99.255", Refusal::SixToFour),
        ("192.168.0.0", "192.168.255.255", Refusal::Private),
        ("192.175.48.0", "192.175.48.255", Refusal::As112),
        ("198.18.0.0", "198.19.255.255", Refusal::Benchmarking),
        ("198.51.100.0", "198.51.100.255", Refusal::Documentation),
        ("203.0.113.0", "203.0.113.255", Refusal::Documentation),
        ("224.0.0.0", "239.255.255.255", Refusal::Multicast),
        ("240.0.0.0", "255.255.255.254", Refusal::Reserved),
        ("255.255.255.255", "255.255.255.255", Refusal::Broadcast),
        ("::", "::", Refusal::Unspecified),
        ("::1", "::1", Refusal::Loopback),
        ("::2", "::ffff:ffff", Refusal::EmbeddedIpv4),
        ("::1:0:0", "::fffe:ffff:ffff", Refusal::Reserved),
        ("::1:0:0:0", "::fffe:ffff:ffff:ffff", Refusal::Reserved),
        ("::ffff:0:0:0", "::ffff:0:ffff:ffff", Refusal::EmbeddedIpv4),
        ("::ffff:1:0:0", "64:ff9a:ffff:ffff:ffff:ffff:ffff:ffff", Refusal::Reserved),
        ("64:ff9b::1:0:0", "64:ff9b:0:ffff:ffff:ffff:ffff:ffff", Refusal::Reserved),
        ("64:ff9b:1::", "64:ff9b:1:ffff:ffff:ffff:ffff:ffff", Refusal::LocalNat64),
        ("64:ff9b:2::", "ff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", Refusal::Reserved),
        ("100::", "100::ffff:ffff:ffff:ffff", Refusal::DiscardOnly),
        ("100:0:0:1::", "100:0:0:1:ffff:ffff:ffff:ffff", Refusal::DiscardOnly),
        ("100:0:0:2::", "1fff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", Refusal::Reserved),
        ("2001::", "2001:0:ffff:ffff:ffff:ffff:ffff:ffff", Refusal::Teredo),
        ("2001:1::", "2001:1:ffff:ffff:ffff:ffff:ffff:ffff", Refusal::ProtocolAssignment),
        ("2001:2::", "2001:2:0:ffff:ffff:ffff:ffff:ffff", Refusal::Benchmarking),
        ("2001:2:1::", "2001:2:ffff:ffff:ffff:ffff:ffff:ffff", Refusal::ProtocolAssignment),
        ("2001:3::", "2001:3:ffff:ffff:ffff:ffff:ffff:ffff", Refusal::MulticastRelay),
        ("2001:4::", "2001:4:111:ffff:ffff:ffff:ffff:ffff", Refusal::ProtocolAssignment),
        ("2001:4:112::", "2001:4:112:ffff:ffff:ffff:ffff:ffff", Refusal::As112),
        ("2001:4:113::", "2001:1ff:ffff:ffff:ffff:ffff:ffff:ffff", Refusal::ProtocolAssignment),
        ("2001:db8::", "2001:db8:ffff:ffff:ffff:ffff:ffff:ffff", Refusal::Documentation),
        ("2002::", "2002:ffff:ffff:ffff:ffff:ffff:ffff:ffff", Refusal::SixToFour),
        ("2620:4f:8000::", "2620:4f:8000:ffff:ffff:ffff:ffff:ffff", Refusal::As112),
        ("2a00:1450::5efe:0:0", "2a00:1450::5efe:ffff:ffff", Refusal::Isatap),
        ("2a00:1450::200:5efe:0:0", "2a00:1450::200:5efe:ffff:ffff", Refusal::Isatap),
        ("3fff::", "3fff:fff:ffff:ffff:ffff:ffff:ffff:ffff", Refusal::Documentation),
        ("4000::", "5eff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", Refusal::Reserved),
        ("5f00::", "5f00:ffff:ffff:ffff:ffff:ffff:ffff:ffff", Refusal::SegmentRouting),
        ("5f01::", "fbff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", Refusal::Reserved),
        ("fc00::", "fdff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", Refusal::UniqueLocal),
        ("fe00::", "fe7f:ffff:ffff:ffff:ffff:ffff:ffff:ffff", Refusal::Reserved),
        ("fe80::", "febf:ffff:ffff:ffff:ffff:ffff:ffff:ffff", Refusal::LinkLocal),
        ("fec0::", "feff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", Refusal::SiteLocal),
        ("ff00::", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", Refusal::Multicast),
        // A translator leads to the IPv4 address inside.
        ("64:ff9b::7f00:0", "64:ff9b::7fff:ffff", Refusal::Loopback),
        ("64:ff9b::a9fe:a9fe", "64:ff9b::a9fe:a9fe", Refusal::LinkLocal),
        ("64:ff9b::", "64:ff9b::", Refusal::Unspecified),
        ("::ffff:127.0.0.1", "::ffff:127.0.0.1", Refusal::Loopback),
        ("::ffff:10.0.0.0", "::ffff:10.255.255.255", Refusal::Private),
    ];

    /// The neighbours outside, and some ordinary addresses.
    const PUBLIC: &[&str] = &[
        "1.0.0.0",
        "9.255.255.255",
        "11.0.0.0",
        "100.63.255.255",
        "100.128.0.0",
        "126.255.255.255",
        "128.0.0.0",
        "169.253.255.255",
        "169.255.0.0",
        "172.15.255.255",
        "172.32.0.0",
        "191.255.255.255",
        "192.0.1.0",
        "192.0.1.255",
        "192.0.3.0",
        "192.31.195.255",
        "192.31.197.0",
        "192.52.192.255",
        "192.52.194.0",
        "192.88.98.255",
        "192.88.100.0",
        "192.167.255.255",
        "192.169.0.0",
        "192.175.47.255",
        "192.175.49.0",
        "198.17.255.255",
        "198.20.0.0",
        "198.51.99.255",
        "198.51.101.0",
        "203.0.112.255",
        "203.0.114.0",
        "223.255.255.255",
        "2000::",
        "2000:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
        "2001:200::",
        "2001:db7:ffff:ffff:ffff:ffff:ffff:ffff",
        "2001:db9::",
        "2001:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
        "2003::",
        "2620:4f:7fff:ffff:ffff:ffff:ffff:ffff",
        "2620:4f:8001::",
        "2a00:1450::5efd:ffff:ffff",
        "2a00:1450::5eff:0:0",
        "2a00:1450::201:5efe:0:0",
        "2a00:1450:4001:82f::2001",
        "3ffe:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
        "3fff:1000::",
        "3fff:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
        "::ffff:1.0.0.0",
        "64:ff9b::808:808",
    ];

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap_or_else(|_| panic!("{text} is no address"))
    }

    fn nets(list: &[&str]) -> Vec<IpNet> {
        list.iter().map(|net| net.parse().expect("a network")).collect()
    }

    fn policy(allow: &[&str], deny: &[&str]) -> EgressPolicy {
        EgressPolicy::new(nets(allow), nets(deny), AllowedPorts::Any)
    }

    #[test]
    fn every_special_purpose_range_is_refused_with_its_reason_from_first_to_last_address() {
        for (first, last, why) in REFUSED {
            for text in [first, last] {
                assert_eq!(judge(ip(text)), Verdict::Refused(*why), "{text}");
            }
        }
    }

    #[test]
    fn the_neighbours_of_every_special_purpose_range_are_public() {
        for text in PUBLIC {
            assert_eq!(judge(ip(text)), Verdict::Public, "{text}");
        }
    }

    #[test]
    fn the_two_tables_leave_no_address_at_the_edge_of_a_block_untried() {
        let tried: Vec<IpAddr> = REFUSED.iter().flat_map(|(first, last, _)| [ip(first), ip(last)]).collect();
        let public: Vec<IpAddr> = PUBLIC.iter().map(|text| ip(text)).collect();
        for (block, _) in IPV4_BLOCKS {
            let (first, last) = (block.network().to_bits(), block.broadcast().to_bits());
            for bits in [first.checked_sub(1), Some(first), Some(last), last.checked_add(1)].into_iter().flatten() {
                let edge = IpAddr::V4(Ipv4Addr::from_bits(bits));
                assert!(tried.contains(&edge) || public.contains(&edge), "{edge}");
            }
        }
        for (block, _) in IPV6_BLOCKS.iter().chain(&[(IPV6_UNICAST, Refusal::Reserved)]) {
            let (first, last) = (block.network().to_bits(), block.broadcast().to_bits());
            for bits in [first.checked_sub(1), Some(first), Some(last), last.checked_add(1)].into_iter().flatten() {
                let edge = IpAddr::V6(Ipv6Addr::from_bits(bits)).to_canonical();
                let known = tried.contains(&edge) || public.contains(&edge);
                assert!(known || edge.is_ipv4(), "{edge}");
            }
        }
    }

    #[test]
    fn an_exempted_network_is_public_and_its_neighbours_are_not() {
        let policy = policy(&["127.0.0.0/8", "10.1.0.0/16", "fd00:1::/32"], &[]);
        for text in ["127.0.0.1", "127.255.255.255", "10.1.0.0", "10.1.255.255", "fd00:1::1", "::ffff:127.0.0.1"] {
            assert_eq!(policy.judge(ip(text)), Verdict::Public, "{text}");
        }
        for text in ["10.0.255.255", "10.2.0.0", "::1", "fd00:2::1", "::127.0.0.1", "64:ff9b::7f00:1"] {
            assert!(matches!(policy.judge(ip(text)), Verdict::Refused(_)), "{text}");
        }
    }

    #[test]
    fn a_denied_network_is_refused_even_where_it_is_exempted() {
        let policy = policy(&["0.0.0.0/0", "::/0"], &["168.63.129.16/32", "2a00:1450::/32"]);
        assert_eq!(policy.judge(ip("168.63.129.15")), Verdict::Public);
        assert_eq!(policy.judge(ip("10.0.0.1")), Verdict::Public);
        for text in [
            "168.63.129.16",
            "::ffff:168.63.129.16",
            "::168.63.129.16",
            "::ffff:0:168.63.129.16",
            "64:ff9b::168.63.129.16",
            "2002:a83f:8110::1",
            "2001::57c0:7eef",
            "2a01::5efe:168.63.129.16",
            "2a00:1450:4001::1",
        ] {
            assert_eq!(policy.judge(ip(text)), Verdict::Refused(Refusal::Denied), "{text}");
        }
    }

    #[test]
    fn a_network_written_in_mapped_form_means_the_ipv4_network() {
        let policy = policy(&["::ffff:10.0.0.0/104"], &["::ffff:10.9.0.0/112"]);
        assert_eq!(policy.judge(ip("10.200.0.1")), Verdict::Public);
        assert_eq!(policy.judge(ip("10.9.0.1")), Verdict::Refused(Refusal::Denied));
        assert_eq!(policy.judge(ip("11.0.0.1")), Verdict::Public);
        assert_eq!(policy.judge(ip("127.0.0.1")), Verdict::Refused(Refusal::Loopback));
    }

    #[test]
    fn only_listed_ports_are_allowed_and_port_zero_never() {
        let listed = EgressPolicy::new(vec![], vec![], AllowedPorts::Only([0, 587, 25].into()));
        assert!(listed.port_allowed(25) && listed.port_allowed(587));
        assert!(!listed.port_allowed(26) && !listed.port_allowed(0));
        let any = EgressPolicy::new(vec![], vec![], AllowedPorts::Any);
        assert!(any.port_allowed(1) && any.port_allowed(u16::MAX) && !any.port_allowed(0));
        assert_eq!(AllowedPorts::Only([587, 25, 465].into()).to_string(), "25, 465, 587");
        assert_eq!(any.ports().to_string(), "1-65535");
    }

    proptest! {
        #[test]
        fn every_form_that_leads_to_an_ipv4_address_gets_that_addresss_verdict(bits: u32) {
            let inner = Ipv4Addr::from_bits(bits);
            let verdict = judge(IpAddr::V4(inner));
            prop_assert_eq!(judge(IpAddr::V6(inner.to_ipv6_mapped())), verdict);
            let nat64 = Ipv6Addr::from_bits(NAT64.addr().to_bits() | u128::from(bits));
            prop_assert_eq!(judge(IpAddr::V6(nat64)), verdict);
        }

        #[test]
        fn every_other_form_that_carries_an_ipv4_address_is_refused(bits: u32, low: u64) {
            let bits = u128::from(bits);
            for carrier in [
                IPV4_COMPATIBLE.addr().to_bits() | bits,
                IPV4_TRANSLATED.addr().to_bits() | bits,
                SIX_TO_FOUR.addr().to_bits() | bits << 80 | u128::from(low),
                TEREDO.addr().to_bits() | u128::from(low),
            ] {
                let refused = matches!(judge(IpAddr::V6(Ipv6Addr::from_bits(carrier))), Verdict::Refused(_));
                prop_assert!(refused, "{}", Ipv6Addr::from_bits(carrier));
            }
        }

        #[test]
        fn an_ipv6_address_outside_the_unicast_space_is_never_public(bits: u128) {
            let ip = Ipv6Addr::from_bits(bits);
            let leads_to_ipv4 = NAT64.contains(&ip) || IPV4_MAPPED.contains(&ip);
            if !IPV6_UNICAST.contains(&ip) && !leads_to_ipv4 {
                prop_assert!(matches!(judge(IpAddr::V6(ip)), Verdict::Refused(_)));
            }
        }
    }
}
