//! Email addresses and mailboxes as people and programs write them.
//! Guarantee: an [`EmailAddress`] can be put into an SMTP command and a header as it is; nothing in it can end a line.

use std::fmt;

use super::text;

/// RFC 5321 section 4.5.3.1.1: octets of a local part.
const LOCAL_PART_MAX: usize = 64;
/// RFC 5321 section 4.5.3.1.3 allows a path of 256 octets, its angle brackets included.
pub const ADDRESS_MAX: usize = 254;
/// Longest display name, in bytes; more is an attack or a mistake.
pub const NAME_MAX: usize = 512;

/// One address, `local@domain`. The domain is held in its ASCII form (IDNA A-labels), lower case.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct EmailAddress {
    text: String,
    at: usize,
}

/// An address with the name shown beside it.
#[derive(Clone, PartialEq, Eq)]
pub struct Mailbox {
    /// Display name: one line, never empty.
    pub name: Option<String>,
    /// The address itself.
    pub email: EmailAddress,
}

/// Why a text is not an address. The message never repeats the text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InvalidAddress {
    /// No `@`, or nothing on one side of it.
    #[error("is not an email address of the form local@domain")]
    Shape,
    /// A control character or a bidirectional override.
    #[error("contains a control character or a bidirectional override")]
    Control,
    /// Longer than RFC 5321 allows.
    #[error("is longer than an email address may be (64 bytes before the @, 254 in all)")]
    TooLong,
    /// It stands in angle brackets, perhaps behind a name.
    #[error("must be an address alone, as in ann@example.org, without a name or angle brackets")]
    Bracketed,
    /// The local part is neither a dot-atom (RFC 5322 section 3.2.3) nor a quoted string.
    #[error("has a character before the @ that is not allowed there")]
    LocalPart,
    /// The domain is no host name.
    #[error("has a domain that is not a host name with at least one dot")]
    Domain,
    /// The display name is longer than 512 bytes.
    #[error("has a display name longer than 512 bytes")]
    Name,
}

impl EmailAddress {
    /// Reads `local@domain`. The local part is a dot-atom, in UTF-8 where RFC 6531 allows it, or a quoted string;
    /// the domain is a host name of two labels or more, or an IDN that becomes one.
    ///
    /// # Errors
    /// [`InvalidAddress`] names the fault.
    pub fn parse(text: &str) -> Result<Self, InvalidAddress> {
        if text::has_forbidden_control(text) {
            return Err(InvalidAddress::Control);
        }
        let (local, domain) = text.rsplit_once('@').ok_or(InvalidAddress::Shape)?;
        if local.is_empty() || domain.is_empty() {
            return Err(InvalidAddress::Shape);
        }
        if domain.ends_with('>') {
            return Err(InvalidAddress::Bracketed);
        }
        if !is_local_part(local) {
            return Err(InvalidAddress::LocalPart);
        }
        let domain = ascii_domain(domain).ok_or(InvalidAddress::Domain)?;
        if local.len() > LOCAL_PART_MAX || local.len() + 1 + domain.len() > ADDRESS_MAX {
            return Err(InvalidAddress::TooLong);
        }
        Ok(Self { text: format!("{local}@{domain}"), at: local.len() })
    }

    /// The whole address.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// The part before the `@`.
    pub fn local_part(&self) -> &str {
        &self.text[..self.at]
    }

    /// The part behind the `@`: ASCII, lower case.
    pub fn domain(&self) -> &str {
        &self.text[self.at + 1..]
    }

    /// Whether a server must offer SMTPUTF8 (RFC 6531) for this address.
    pub fn needs_smtputf8(&self) -> bool {
        !self.text.is_ascii()
    }
}

/// Shows an address as `a…@example.org`, the only form for logs, events and stored replies.
impl fmt::Debug for EmailAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let first = self.text.chars().next().unwrap_or('…');
        write!(f, "{first}…@{}", self.domain())
    }
}

impl Mailbox {
    /// A mailbox without a name.
    pub fn bare(email: EmailAddress) -> Self {
        Self { name: None, email }
    }

    /// A mailbox with a name; control characters in the name become spaces, and an empty name is none.
    ///
    /// # Errors
    /// When the name is longer than 512 bytes.
    pub fn named(name: &str, email: EmailAddress) -> Result<Self, InvalidAddress> {
        let name = text::single_line(name);
        if name.len() > NAME_MAX {
            return Err(InvalidAddress::Name);
        }
        Ok(Self { name: (!name.is_empty()).then_some(name), email })
    }

    /// Reads `a@b.c` or `Name <a@b.c>`; the name may stand in double quotes.
    ///
    /// # Errors
    /// [`InvalidAddress`] names the fault.
    pub fn parse(text: &str) -> Result<Self, InvalidAddress> {
        let text = text.trim_matches(' ');
        let Some(inner) = text.strip_suffix('>') else {
            return EmailAddress::parse(text).map(Self::bare);
        };
        let (name, email) = inner.rsplit_once('<').ok_or(InvalidAddress::Shape)?;
        let email = EmailAddress::parse(email)?;
        // A line break behind an address is no part of a name: somebody tries to add a command or a recipient.
        if name.contains('@') && text::has_forbidden_control(name) {
            return Err(InvalidAddress::Control);
        }
        let name = name.trim();
        match name.strip_prefix('"').and_then(|rest| rest.strip_suffix('"')) {
            Some(quoted) => Self::named(&unescaped(quoted), email),
            None => Self::named(name, email),
        }
    }
}

impl fmt::Debug for Mailbox {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.email, f)
    }
}

/// Replaces everything in a text that looks like an address by its masked form; for servers' replies.
pub fn mask_addresses(text: &str) -> String {
    let is_word = |c: char| {
        !c.is_whitespace() && !matches!(c, '<' | '>' | '(' | ')' | '[' | ']' | ',' | ';' | ':' | '"' | '\'')
    };
    let mut masked = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('@') {
        let before = &rest[..at];
        let start = match before.strip_suffix('"').and_then(|quoted| quoted.rfind('"')) {
            Some(quote) if at - quote <= LOCAL_PART_MAX => Some((quote, '"')),
            _ => before.char_indices().rev().take_while(|(_, c)| is_word(*c)).last(),
        };
        let Some((start, first)) = start else {
            masked.push_str(&rest[..=at]);
            rest = &rest[at + 1..];
            continue;
        };
        masked.push_str(&rest[..start]);
        masked.push(first);
        masked.push_str("…@");
        rest = &rest[at + 1..];
    }
    masked.push_str(rest);
    masked
}

fn unescaped(quoted: &str) -> String {
    let mut name = String::with_capacity(quoted.len());
    let mut chars = quoted.chars();
    while let Some(c) = chars.next() {
        name.push(if c == '\\' { chars.next().unwrap_or('\\') } else { c });
    }
    name
}

fn is_local_part(local: &str) -> bool {
    let is_atext = |c: char| c.is_ascii_alphanumeric() || "!#$%&'*+-/=?^_`{|}~".contains(c) || !c.is_ascii();
    match local.strip_prefix('"').and_then(|rest| rest.strip_suffix('"')) {
        Some(quoted) => is_quoted_content(quoted),
        None => local.split('.').all(|atom| !atom.is_empty() && atom.chars().all(is_atext)),
    }
}

/// RFC 5321 section 4.1.2: printable ASCII, with `"` and `\` behind a backslash.
fn is_quoted_content(quoted: &str) -> bool {
    let mut bytes = quoted.bytes();
    while let Some(byte) = bytes.next() {
        let character = if byte == b'\\' { bytes.next() } else { Some(byte).filter(|b| *b != b'"') };
        if !character.is_some_and(|b| (b' '..=b'~').contains(&b)) {
            return false;
        }
    }
    true
}

fn ascii_domain(domain: &str) -> Option<String> {
    let ascii = idna::domain_to_ascii(domain).ok()?;
    let is_label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    let last_is_numeric =
        |name: &str| name.rsplit('.').next().is_some_and(|l| l.bytes().all(|b| b.is_ascii_digit()));
    (ascii.contains('.') && ascii.len() <= 253 && ascii.split('.').all(is_label) && !last_is_numeric(&ascii))
        .then_some(ascii)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_usual_spelling_of_a_mailbox_is_understood() {
        for (text, name, email) in [
            ("a@b.c", None, "a@b.c"),
            ("Ann Lee <ann@Example.ORG>", Some("Ann Lee"), "ann@example.org"),
            ("\"Lee, \\\"Ann\\\"\" <ann@example.org>", Some("Lee, \"Ann\""), "ann@example.org"),
            ("<ann@example.org>", None, "ann@example.org"),
            ("ann@bücher.example", None, "ann@xn--bcher-kva.example"),
            ("\"a b\"@example.org", None, "\"a b\"@example.org"),
            ("üser@example.org", None, "üser@example.org"),
        ] {
            let mailbox = Mailbox::parse(text).unwrap_or_else(|e| panic!("{text}: {e}"));
            assert_eq!((mailbox.name.as_deref(), mailbox.email.as_str()), (name, email), "{text}");
        }
    }

    #[test]
    fn what_could_inject_a_command_or_a_recipient_is_refused() {
        for (text, fault) in [
            ("a@b.c\r\nRCPT TO:<x@y.z>", InvalidAddress::Control),
            ("a@b.c\0", InvalidAddress::Control),
            ("a b@c.d", InvalidAddress::LocalPart),
            ("a,b@c.d", InvalidAddress::LocalPart),
            ("a@b.c> <x@y.z", InvalidAddress::LocalPart),
            ("Ann <a@b.c>", InvalidAddress::Bracketed),
            ("a..b@c.d", InvalidAddress::LocalPart),
            ("a@localhost", InvalidAddress::Domain),
            ("a@127.0.0.1", InvalidAddress::Domain),
            ("a@[127.0.0.1]", InvalidAddress::Domain),
            ("a@-b.c", InvalidAddress::Domain),
            ("@b.c", InvalidAddress::Shape),
            ("nobody", InvalidAddress::Shape),
            ("\"a\\\"@b.c", InvalidAddress::LocalPart),
        ] {
            assert_eq!(EmailAddress::parse(text).unwrap_err(), fault, "{text}");
        }
        assert_eq!(
            EmailAddress::parse(&format!("{}@b.c", "a".repeat(65))).unwrap_err(),
            InvalidAddress::TooLong
        );
    }

    #[test]
    fn an_address_with_a_second_one_behind_a_line_break_is_no_name() {
        let injected = "a@b.c\r\nRCPT TO:<x@y.z>";
        assert_eq!(Mailbox::parse(injected).unwrap_err(), InvalidAddress::Control);
        assert_eq!(Mailbox::parse("Ann\r\nLee <a@b.c>").unwrap().name.as_deref(), Some("Ann Lee"));
        assert_eq!(Mailbox::parse("ann@home <a@b.c>").unwrap().name.as_deref(), Some("ann@home"));
    }

    #[test]
    fn an_address_is_shown_masked() {
        assert_eq!(format!("{:?}", Mailbox::parse("Ann <ann@example.org>").unwrap()), "a…@example.org");
        assert_eq!(
            mask_addresses("550 <ann@example.org>: no such user (bob@x.y), @ alone"),
            "550 <a…@example.org>: no such user (b…@x.y), @ alone"
        );
        assert_eq!(mask_addresses("to \"ann lee\"@example.org or \"@ann"), "to \"…@example.org or \"@ann");
    }
}
