//! The host of an SMTP server as a person types it, read the way resolvers read it.
//! Guarantee: what any resolver would take for an IP address is one here, and a name is in the one form
//! (lower case, A-labels, no trailing dot) under which it is looked up, verified and compared.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use idna::uts46::{AsciiDenyList, DnsLength, Hyphens, Uts46};

/// Octets of a name (RFC 1035 section 2.3.4), without the trailing dot.
const MAX_NAME_BYTES: usize = 253;
/// Octets of one label (RFC 1035 section 2.3.4).
const MAX_LABEL_BYTES: usize = 63;
/// Longer input is refused before it is worked on; no valid name needs as much, not even in Unicode.
const MAX_INPUT_BYTES: usize = 2048;

/// Suffixes that only a local network gives a meaning to (RFC 6761, RFC 6762, RFC 8375, ICANN's `internal`).
/// `cluster.local` is under `local`.
const INTERNAL_SUFFIXES: &[&str] = &["internal", "local", "localhost", "home.arpa"];

/// A server's host: an address, or a name to look up. Two hosts are equal when they mean the same.
///
/// [`fmt::Display`] gives the normal form, which parses to an equal host; an IPv6 address is without
/// brackets.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum ServerHost {
    /// An IP literal, in any of the forms that resolvers accept. An IPv4-mapped address is the IPv4 address.
    Ip(IpAddr),
    /// A host name.
    Name(HostName),
}

/// A host name: labels of `a-z`, `0-9`, `-` and `_`, at most 253 octets, no trailing dot, not an address in
/// disguise.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct HostName(String);

/// Why a text is no host. The message is for the person who typed it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HostError {
    /// Nothing was given, or only a dot.
    #[error("the host is empty: give a host name such as smtp.example.org, or an IP address")]
    Empty,
    /// A space, a line break or a control character, anywhere.
    #[error("the host contains a space or a control character: give the host name alone")]
    SpaceOrControl,
    /// An address of the kind `smtp://user@host/`.
    #[error("the host contains {0:?}: give the host name alone, without scheme, user name, port or path")]
    NotAlone(char),
    /// `host:port`.
    #[error(
        "the host contains a colon: the port has a field of its own, and an IPv6 address must be complete"
    )]
    Colon,
    /// Brackets around something else than an IPv6 address.
    #[error("brackets are for an IPv6 address, as in [2001:db8::25]")]
    Brackets,
    /// `fe80::1%eth0` (RFC 4007): means something on one machine only.
    #[error("an IPv6 address must be without a zone (the part from % on)")]
    Zone,
    /// Ends in a number but is no IPv4 address in any form.
    #[error("the host ends in a number but is not an IPv4 address")]
    NotIpv4,
    /// Longer than the DNS allows.
    #[error("the host is longer than {MAX_NAME_BYTES} characters")]
    TooLong,
    /// A part between dots is longer than the DNS allows.
    #[error("a part of the host is longer than {MAX_LABEL_BYTES} characters")]
    LabelTooLong,
    /// Two dots in a row, or a dot in front.
    #[error("the host has an empty part: two dots in a row, or a dot in front")]
    EmptyLabel,
    /// A hyphen at the beginning or end of a part.
    #[error("a part of the host begins or ends with a hyphen")]
    Hyphen,
    /// A character that no host name has.
    #[error("the host contains {0:?}: a host name has letters, digits, hyphens and dots")]
    Character(char),
    /// Unicode that is no internationalized name (UTS 46).
    #[error("the host is not a valid internationalized domain name")]
    Internationalized,
}

impl ServerHost {
    /// Reads a host as an admin or the operator typed it. Nothing is trimmed: what surrounds a host by
    /// mistake is an error that says so.
    pub fn parse(text: &str) -> Result<Self, HostError> {
        if text.is_empty() {
            return Err(HostError::Empty);
        }
        if text.len() > MAX_INPUT_BYTES {
            return Err(HostError::TooLong);
        }
        if text.chars().any(|c| c.is_control() || c.is_whitespace()) {
            return Err(HostError::SpaceOrControl);
        }
        if let Some(stray) = text.chars().find(|c| matches!(c, '/' | '@' | '\\' | '?' | '#' | ',' | ';')) {
            return Err(HostError::NotAlone(stray));
        }
        if text.contains(['[', ']', ':', '%']) {
            return parse_ipv6(text).map(|ip| Self::Ip(IpAddr::V6(ip).to_canonical()));
        }
        parse_name_or_ipv4(text)
    }
}

fn parse_ipv6(text: &str) -> Result<Ipv6Addr, HostError> {
    let inner = match text.strip_prefix('[') {
        Some(rest) => rest.strip_suffix(']').ok_or(HostError::Brackets)?,
        None => text,
    };
    if inner.contains('%') {
        return Err(if inner.contains(':') { HostError::Zone } else { HostError::Character('%') });
    }
    let otherwise = if text.contains(['[', ']']) { HostError::Brackets } else { HostError::Colon };
    inner.parse().map_err(|_| otherwise)
}

fn parse_name_or_ipv4(text: &str) -> Result<ServerHost, HostError> {
    // No deny list here: what the mapping makes of a character (a full-width slash, say) is checked behind
    // it.
    let ascii = Uts46::new()
        .to_ascii(text.as_bytes(), AsciiDenyList::EMPTY, Hyphens::Allow, DnsLength::Ignore)
        .map_err(|_| HostError::Internationalized)?;
    let name = ascii.strip_suffix('.').unwrap_or(&ascii);
    if name.is_empty() {
        return Err(if ascii.is_empty() { HostError::Internationalized } else { HostError::Empty });
    }
    if name.len() > MAX_NAME_BYTES {
        return Err(HostError::TooLong);
    }
    name.split('.').try_for_each(check_label)?;
    match Numeric::of(name) {
        Numeric::Ipv4(ip) => Ok(ServerHost::Ip(IpAddr::V4(ip))),
        Numeric::Broken => Err(HostError::NotIpv4),
        Numeric::No => Ok(ServerHost::Name(HostName(name.to_owned()))),
    }
}

/// Letters, digits and hyphens (RFC 1123 section 2.1); the underscore too, which container names have.
fn check_label(label: &str) -> Result<(), HostError> {
    if label.is_empty() {
        return Err(HostError::EmptyLabel);
    }
    if label.len() > MAX_LABEL_BYTES {
        return Err(HostError::LabelTooLong);
    }
    let allowed = |c: &char| matches!(c, 'a'..='z' | '0'..='9' | '-' | '_');
    if let Some(other) = label.chars().find(|c| !allowed(c)) {
        return Err(HostError::Character(other));
    }
    if label.starts_with('-') || label.ends_with('-') {
        return Err(HostError::Hyphen);
    }
    Ok(())
}

/// What `inet_aton` and, after it, the resolvers of the world make of a name whose last label is a number.
enum Numeric {
    No,
    Ipv4(Ipv4Addr),
    Broken,
}

impl Numeric {
    fn of(name: &str) -> Self {
        let last = name.rsplit('.').next().unwrap_or(name);
        let decimal_or_octal = last.bytes().all(|b| b.is_ascii_digit());
        let hexadecimal =
            last.strip_prefix("0x").is_some_and(|digits| digits.bytes().all(|b| b.is_ascii_hexdigit()));
        if !decimal_or_octal && !hexadecimal {
            return Self::No;
        }
        inet_aton(name).map_or(Self::Broken, Self::Ipv4)
    }
}

/// One to four numbers, decimal, octal (`0…`) or hexadecimal (`0x…`); the last one fills the octets that are
/// left.
fn inet_aton(text: &str) -> Option<Ipv4Addr> {
    let numbers = text.split('.').map(c_number).collect::<Option<Vec<u32>>>()?;
    let (&last, leading) = numbers.split_last()?;
    if leading.len() > 3 || leading.iter().any(|&number| number > 0xff) {
        return None;
    }
    let octets_left = 4 - leading.len();
    let low_bits = 8 * octets_left;
    if u64::from(last) >= 1_u64 << low_bits {
        return None;
    }
    let high = leading.iter().fold(0_u64, |bits, &number| bits << 8 | u64::from(number)) << low_bits;
    u32::try_from(high).ok().map(|high| Ipv4Addr::from_bits(high | last))
}

fn c_number(text: &str) -> Option<u32> {
    match text.strip_prefix("0x") {
        Some(digits) => parse_digits(digits, 16),
        None if text.len() > 1 && text.starts_with('0') => parse_digits(text, 8),
        None => parse_digits(text, 10),
    }
}

fn parse_digits(digits: &str, radix: u32) -> Option<u32> {
    let only_digits = !digits.is_empty() && digits.chars().all(|c| c.is_digit(radix));
    only_digits.then(|| u32::from_str_radix(digits, radix).ok()).flatten()
}

impl HostName {
    /// The name in its normal form, as TLS verifies it.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether the public DNS gives this name no meaning: a single label, or one of the suffixes for local
    /// use.
    pub fn is_internal_name(&self) -> bool {
        is_internal(&self.0)
    }

    /// Whether the name is `localhost` or under it, which resolvers answer themselves (RFC 6761 section 6.3).
    pub fn is_localhost(&self) -> bool {
        is_under(&self.0, "localhost")
    }
}

/// [`HostName::is_internal_name`] for a name out of the DNS, in lower case and without the trailing dot.
pub(super) fn is_internal(name: &str) -> bool {
    !name.contains('.') || INTERNAL_SUFFIXES.iter().any(|suffix| is_under(name, suffix))
}

fn is_under(name: &str, suffix: &str) -> bool {
    name.strip_suffix(suffix).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

impl FromStr for ServerHost {
    type Err = HostError;

    fn from_str(text: &str) -> Result<Self, HostError> {
        Self::parse(text)
    }
}

impl fmt::Display for ServerHost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ip(ip) => ip.fmt(f),
            Self::Name(name) => name.fmt(f),
        }
    }
}

impl fmt::Display for HostName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn name(text: &str) -> HostName {
        match ServerHost::parse(text) {
            Ok(ServerHost::Name(name)) => name,
            other => panic!("{text:?} gave {other:?}"),
        }
    }

    #[test]
    fn every_form_that_a_resolver_takes_for_an_address_is_an_address() {
        for (text, address) in [
            ("127.0.0.1", "127.0.0.1"),
            ("127.0.0.1.", "127.0.0.1"),
            ("127.1", "127.0.0.1"),
            ("127.0.1", "127.0.0.1"),
            ("127.0.257", "127.0.1.1"),
            ("10.65537", "10.1.0.1"),
            ("2130706433", "127.0.0.1"),
            ("2130706433.", "127.0.0.1"),
            ("0", "0.0.0.0"),
            ("4294967295", "255.255.255.255"),
            ("0x7f000001", "127.0.0.1"),
            ("0X7F000001", "127.0.0.1"),
            ("0x7f.1", "127.0.0.1"),
            ("0x7f.0x0.0x0.0x1", "127.0.0.1"),
            ("0177.0.0.1", "127.0.0.1"),
            ("017700000001", "127.0.0.1"),
            ("0177.0x0.1", "127.0.0.1"),
            ("00000000000000000177.1", "127.0.0.1"),
            ("169.254.43518", "169.254.169.254"),
            ("１２７.0.0.1", "127.0.0.1"),
            ("①②⑦.⓪.⓪.①", "127.0.0.1"),
            ("127。0。0。1", "127.0.0.1"),
            ("１２７．０．０．１。", "127.0.0.1"),
            ("２１３０７０６４３３", "127.0.0.1"),
            ("0\u{ad}x7f.1", "127.0.0.1"),
            ("::1", "::1"),
            ("[::1]", "::1"),
            ("0:0:0:0:0:0:0:1", "::1"),
            ("2A00:1450:0::25", "2a00:1450::25"),
            ("[::ffff:127.0.0.1]", "127.0.0.1"),
            ("::ffff:7f00:1", "127.0.0.1"),
        ] {
            let expected = address.parse().map(ServerHost::Ip).expect("an address");
            assert_eq!(ServerHost::parse(text), Ok(expected), "{text}");
        }
    }

    #[test]
    fn a_name_is_kept_in_its_normal_form() {
        for (text, normal) in [
            ("smtp.example.org", "smtp.example.org"),
            ("SMTP.Example.ORG.", "smtp.example.org"),
            ("post.bücher.example", "post.xn--bcher-kva.example"),
            ("post.BÜCHER.example", "post.xn--bcher-kva.example"),
            ("post.xn--bcher-kva.example", "post.xn--bcher-kva.example"),
            ("smtp。example．org", "smtp.example.org"),
            ("ｓｍｔｐ.example.org", "smtp.example.org"),
            ("smtp.exam\u{ad}ple.org", "smtp.example.org"),
            ("straße.example", "xn--strae-oqa.example"),
            ("mail_server", "mail_server"),
            ("r3---sn.example.org", "r3---sn.example.org"),
            ("1.2.3.4x", "1.2.3.4x"),
            ("0x7f.org", "0x7f.org"),
            ("localhost.", "localhost"),
        ] {
            assert_eq!(name(text).as_str(), normal, "{text}");
        }
    }

    #[test]
    fn what_is_no_host_alone_is_refused_with_the_reason() {
        let label = "a".repeat(64);
        let long = format!("{}.org", ["a".repeat(60).as_str(); 5].join("."));
        for (text, error) in [
            ("", HostError::Empty),
            (".", HostError::Empty),
            ("。", HostError::Empty),
            ("\u{ad}", HostError::Internationalized),
            (" smtp.example.org", HostError::SpaceOrControl),
            ("smtp.example.org\n", HostError::SpaceOrControl),
            ("smtp.example.org\r\nRSET", HostError::SpaceOrControl),
            ("smtp\0.example.org", HostError::SpaceOrControl),
            ("smtp\u{a0}.example.org", HostError::SpaceOrControl),
            ("smtp://example.org", HostError::NotAlone('/')),
            ("user@example.org", HostError::NotAlone('@')),
            ("example.org/path", HostError::NotAlone('/')),
            ("a.example,b.example", HostError::NotAlone(',')),
            ("example.org:587", HostError::Colon),
            ("127.0.0.1:587", HostError::Colon),
            (":::1", HostError::Colon),
            ("[::1", HostError::Brackets),
            ("::1]", HostError::Brackets),
            ("[::1]:587", HostError::Brackets),
            ("[example.org]", HostError::Brackets),
            ("[127.0.0.1]", HostError::Brackets),
            ("fe80::1%eth0", HostError::Zone),
            ("[fe80::1%25eth0]", HostError::Zone),
            ("ex%61mple.org", HostError::Character('%')),
            ("1.2.3.256", HostError::NotIpv4),
            ("1.2.3.4.5", HostError::NotIpv4),
            ("256.1", HostError::NotIpv4),
            ("1.16777216", HostError::NotIpv4),
            ("4294967296", HostError::NotIpv4),
            ("99999999999999999999", HostError::NotIpv4),
            ("08.0.0.1", HostError::NotIpv4),
            ("example.1", HostError::NotIpv4),
            ("example.0xff", HostError::NotIpv4),
            ("0x", HostError::NotIpv4),
            ("a..example.org", HostError::EmptyLabel),
            (".example.org", HostError::EmptyLabel),
            ("example.org..", HostError::EmptyLabel),
            ("-a.example.org", HostError::Hyphen),
            ("a-.example.org", HostError::Hyphen),
            ("a*.example.org", HostError::Character('*')),
            ("a'b.example.org", HostError::Character('\'')),
            ("ａ＠b.example", HostError::Character('@')),
            ("a／b.example", HostError::Character('/')),
            ("a：25.example", HostError::Character(':')),
            ("xn--a.example", HostError::Internationalized),
            ("a\u{202e}b.example", HostError::Internationalized),
            (&label, HostError::LabelTooLong),
            (&long, HostError::TooLong),
            (&"a".repeat(5000), HostError::TooLong),
        ] {
            assert_eq!(ServerHost::parse(text), Err(error), "{text:?}");
        }
    }

    #[test]
    fn the_longest_name_and_label_are_accepted() {
        let label = "a".repeat(63);
        let longest = format!("{label}.{label}.{label}.{}", "a".repeat(61));
        assert_eq!(longest.len(), MAX_NAME_BYTES);
        assert_eq!(name(&longest).as_str(), longest);
        assert_eq!(name(&format!("{longest}.")).as_str(), longest);
        assert_eq!(ServerHost::parse(&format!("{longest}a")), Err(HostError::TooLong));
    }

    #[test]
    fn names_of_local_networks_are_known_without_a_look_up() {
        for text in [
            "localhost",
            "localhost.",
            "LOCALHOST",
            "ｌｏｃａｌｈｏｓｔ",
            "a.localhost",
            "mailpit",
            "internal",
            "metadata.google.internal",
            "printer.local",
            "smtp.default.svc.cluster.local",
            "router.home.arpa",
            "home.arpa",
        ] {
            assert!(name(text).is_internal_name(), "{text}");
        }
        for text in
            ["smtp.example.org", "local.example.org", "notlocal.org", "a.notinternal", "x.mylocalhost"]
        {
            assert!(!name(text).is_internal_name(), "{text}");
        }
        assert!(name("a.localhost").is_localhost() && name("localhost").is_localhost());
        assert!(!name("localhost.example.org").is_localhost() && !name("alocalhost.org").is_localhost());
    }

    proptest! {
        #[test]
        fn the_normal_form_means_the_same_host_and_has_no_odd_character(text in "\\PC{0,40}") {
            if let Ok(host) = ServerHost::parse(&text) {
                prop_assert_eq!(ServerHost::parse(&host.to_string()), Ok(host.clone()));
                if let ServerHost::Name(name) = host {
                    let odd = |c: char| !matches!(c, 'a'..='z' | '0'..='9' | '-' | '_' | '.');
                    prop_assert!(!name.as_str().contains(odd) && name.as_str().len() <= MAX_NAME_BYTES);
                }
            }
        }

        #[test]
        fn every_spelling_of_an_ipv4_address_is_that_address(bits: u32) {
            let ip = Ipv4Addr::from_bits(bits);
            let [a, b, c, d] = ip.octets();
            let low_16 = bits & 0xffff;
            let low_24 = bits & 0xff_ffff;
            for text in [
                ip.to_string(),
                format!("{bits}"),
                format!("{bits:#x}"),
                format!("0{bits:o}"),
                format!("{a}.{low_24}"),
                format!("{a:#x}.{b}.{low_16}"),
                format!("0{a:o}.0x{b:X}.{c}.{d}."),
                format!("::ffff:{ip}"),
            ] {
                prop_assert_eq!(ServerHost::parse(&text), Ok(ServerHost::Ip(IpAddr::V4(ip))), "{}", text);
            }
        }
    }
}
