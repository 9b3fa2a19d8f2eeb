//! The table of special-purpose blocks, tried at every edge of every block.
//! Guarantee: a block whose edges are in neither table fails a test.

use proptest::prelude::*;

use super::*;

/// Every refused range: first and last address, and the reason; both neighbours outside are in the next table
/// or belong to another row.
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
        for bits in [first.checked_sub(1), Some(first), Some(last), last.checked_add(1)].into_iter().flatten()
        {
            let edge = IpAddr::V4(Ipv4Addr::from_bits(bits));
            assert!(tried.contains(&edge) || public.contains(&edge), "{edge}");
        }
    }
    for (block, _) in IPV6_BLOCKS.iter().chain(&[(IPV6_UNICAST, Refusal::Reserved)]) {
        let (first, last) = (block.network().to_bits(), block.broadcast().to_bits());
        for bits in [first.checked_sub(1), Some(first), Some(last), last.checked_add(1)].into_iter().flatten()
        {
            let edge = IpAddr::V6(Ipv6Addr::from_bits(bits)).to_canonical();
            let known = tried.contains(&edge) || public.contains(&edge);
            assert!(known || edge.is_ipv4(), "{edge}");
        }
    }
}

#[test]
fn an_exempted_network_is_public_and_its_neighbours_are_not() {
    let policy = policy(&["127.0.0.0/8", "10.1.0.0/16", "fd00:1::/32"], &[]);
    for text in ["127.0.0.1", "127.255.255.255", "10.1.0.0", "10.1.255.255", "fd00:1::1", "::ffff:127.0.0.1"]
    {
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
