//! The name this machine gives itself in EHLO.
//! Guarantee: what comes out is a domain or an address literal (RFC 5321 section 4.1.1.1), whatever the machine is called.

use std::net::{Ipv4Addr, Ipv6Addr};

/// What a machine without a full name calls itself.
const FALLBACK: &str = "[127.0.0.1]";

/// Whether the text may stand in EHLO: a domain, or an address literal (RFC 5321 section 4.1.3).
pub(super) fn is_hello_name(name: &str) -> bool {
    match name.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
        Some(literal) => match literal.strip_prefix("IPv6:") {
            Some(ip) => ip.parse::<Ipv6Addr>().is_ok(),
            None => literal.parse::<Ipv4Addr>().is_ok(),
        },
        None => is_domain(name),
    }
}

/// The machine's fully qualified name, else `[127.0.0.1]`.
pub(super) fn machine_name() -> String {
    let node = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let hosts = std::fs::read_to_string("/etc/hosts").unwrap_or_default();
    full_name(&node, &hosts).unwrap_or_else(|| FALLBACK.to_owned())
}

/// The node's name when it has a dot, else a name with a dot on the line of the hosts file that names the node.
fn full_name(node: &str, hosts: &str) -> Option<String> {
    let is_full = |name: &&str| name.contains('.') && is_domain(name) && !name.starts_with("localhost.");
    if is_full(&node) {
        return Some(node.to_ascii_lowercase());
    }
    let lines = hosts.lines().map(|line| line.split('#').next().unwrap_or_default());
    let names = lines.map(|line| line.split_ascii_whitespace().skip(1).collect::<Vec<_>>());
    let mut of_node = names.filter(|names| names.iter().any(|name| name.eq_ignore_ascii_case(node)));
    of_node.find_map(|names| names.into_iter().find(is_full)).map(str::to_ascii_lowercase)
}

/// Letters, digits and hyphens in labels of 1 to 63, 253 in all, the last one not a number (RFC 1123 section 2.1).
fn is_domain(name: &str) -> bool {
    let is_label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    let last = name.rsplit('.').next().unwrap_or_default();
    name.len() <= 253 && name.split('.').all(is_label) && !last.bytes().all(|byte| byte.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_domain_or_an_address_literal_may_stand_in_ehlo() {
        for good in ["mail.example.org", "worker1", "[127.0.0.1]", "[IPv6:2001:db8::1]"] {
            assert!(is_hello_name(good), "{good}");
        }
        for bad in
            ["", "a b", "-a.b", "a..b", "127.0.0.1", "[2001:db8::1]", "[::1", "a\r\nMAIL", "a_b.example"]
        {
            assert!(!is_hello_name(bad), "{bad}");
        }
    }

    #[test]
    fn the_full_name_is_the_nodes_own_or_the_hosts_files() {
        let hosts = "127.0.0.1 localhost\n172.17.0.2 w1.mail.example.org w1 # us\n";
        assert_eq!(full_name("MX.example.org", "").as_deref(), Some("mx.example.org"));
        assert_eq!(full_name("w1", hosts).as_deref(), Some("w1.mail.example.org"));
        assert_eq!(full_name("w2", hosts), None);
        assert_eq!(full_name("localhost", "127.0.0.1 localhost localhost.localdomain"), None);
    }

    #[test]
    fn the_machines_own_name_may_stand_in_ehlo() {
        assert!(is_hello_name(&machine_name()));
    }
}
