//! What can go wrong on a job's way: a reason from the contract, the phase, and what the server said.
//! Guarantee: a [`Reply`] shows one bounded line with its addresses masked and no credential, so it can be stored.

use std::fmt;
use std::net::SocketAddr;

use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Serialize};

use super::address::mask_addresses;
use super::text;

/// Longest stored text of a server's reply, in bytes.
const REPLY_TEXT_MAX: usize = 500;

macro_rules! reasons {
    ($($(#[$doc:meta])* $variant:ident = $name:literal,)+) => {
        /// Why a job was not sent, or not yet (contract section 6).
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(rename_all = "snake_case")]
        pub enum Reason { $($(#[$doc])* $variant,)+ }

        impl Reason {
            /// Every reason, in the contract's order.
            pub const ALL: &[Self] = &[$(Self::$variant,)+];

            /// The contract's name.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $name,)+ }
            }

            /// The reason of that name.
            pub fn from_name(name: &str) -> Option<Self> {
                match name { $($name => Some(Self::$variant),)+ _ => None }
            }
        }
    };
}

reasons! {
    /// The body is not a job.
    Malformed = "malformed",
    /// A job of another version than 1.
    UnsupportedVersion = "unsupported_version",
    /// The same id came before with another body.
    IdConflict = "id_conflict",
    /// Past `expires_at`.
    Expired = "expired",
    /// The group has a higher sequence.
    Superseded = "superseded",
    /// Cancelled by command.
    Cancelled = "cancelled",
    /// No lane takes the routing key.
    Unroutable = "unroutable",
    /// Neither a configuration nor a platform server.
    ConfigMissing = "config_missing",
    /// The stored credentials do not open.
    ConfigUnreadable = "config_unreadable",
    /// An address that is not public.
    HostNotPublic = "host_not_public",
    /// A port that the operator does not allow.
    PortNotAllowed = "port_not_allowed",
    /// The name does not exist or has no address.
    HostNotFound = "host_not_found",
    /// The name could not be looked up now.
    DnsFailed = "dns_failed",
    /// Refused or unreachable.
    ConnectFailed = "connect_failed",
    /// No answer to the connection.
    ConnectTimeout = "connect_timeout",
    /// Certificate or protocol.
    TlsFailed = "tls_failed",
    /// No TLS on offer, and credentials would travel in the clear.
    TlsRequired = "tls_required",
    /// User name or password refused.
    AuthFailed = "auth_failed",
    /// The server does not take mail from this sender.
    SenderRefused = "sender_refused",
    /// No recipient was accepted.
    RecipientsRefused = "recipients_refused",
    /// The message was refused.
    MessageRefused = "message_refused",
    /// Larger than the limit, ours or the server's.
    TooLarge = "too_large",
    /// Slow down.
    Throttled = "throttled",
    /// A daily limit is used up.
    QuotaExceeded = "quota_exceeded",
    /// The server has a fault of its own.
    ServerError = "server_error",
    /// What came was no SMTP.
    ProtocolError = "protocol_error",
    /// Closed or reset.
    ConnectionLost = "connection_lost",
    /// A deadline passed.
    Timeout = "timeout",
    /// It cannot be known whether the message was accepted.
    UnknownOutcome = "unknown_outcome",
    /// The schedule or the job's age ended the retries.
    RetriesExhausted = "retries_exhausted",
    /// Workers died of it.
    CrashLoop = "crash_loop",
    /// A fault of Sendoff itself.
    Internal = "internal",
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// How far an attempt had come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Looking up the host and judging its addresses.
    Resolve,
    /// TCP.
    Connect,
    /// The 220.
    Greeting,
    /// EHLO.
    Ehlo,
    /// The answer to STARTTLS.
    Starttls,
    /// The handshake.
    Tls,
    /// AUTH.
    Auth,
    /// RSET on a reused session.
    Rset,
    /// MAIL FROM.
    Mail,
    /// RCPT TO.
    Rcpt,
    /// DATA up to its 354.
    Data,
    /// The message up to the final dot, which was not yet written.
    Body,
    /// The final dot was written or its writing begun: from here on a loss is an unknown outcome.
    FinalDot,
}

impl Phase {
    /// The name used in metrics, stored attempts and messages.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Resolve => "resolve",
            Self::Connect => "connect",
            Self::Greeting => "greeting",
            Self::Ehlo => "ehlo",
            Self::Starttls => "starttls",
            Self::Tls => "tls",
            Self::Auth => "auth",
            Self::Rset => "rset",
            Self::Mail => "mail",
            Self::Rcpt => "rcpt",
            Self::Data => "data",
            Self::Body => "body",
            Self::FinalDot => "final_dot",
        }
    }
}

/// An enhanced status code (RFC 3463), say 5.7.1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct EnhancedCode(pub u8, pub u16, pub u16);

impl EnhancedCode {
    /// Reads the code that opens a reply's text, if there is one.
    pub fn leading(text: &str) -> Option<Self> {
        let word = text.split_ascii_whitespace().next()?;
        let mut parts = word.split('.');
        let code =
            Self(parts.next()?.parse().ok()?, parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
        (parts.next().is_none() && matches!(code.0, 2 | 4 | 5)).then_some(code)
    }
}

/// A server's reply, made fit to store and show. Two are equal when they show the same.
#[derive(Clone)]
pub struct Reply {
    /// The three digits.
    pub code: u16,
    /// RFC 3463 code, where the text opens with one.
    pub enhanced: Option<EnhancedCode>,
    /// The text behind the code: one line, at most 500 bytes, addresses masked.
    pub text: String,
    /// The text before credentials were taken out of it, where that changed it: what was meant is in these words, even
    /// where a user name is one of them.
    as_said: Option<SecretString>,
}

impl PartialEq for Reply {
    fn eq(&self, other: &Self) -> bool {
        (self.code, self.enhanced, &self.text) == (other.code, other.enhanced, &other.text)
    }
}

impl Eq for Reply {}

impl Reply {
    /// Takes the lines of a reply as received, without their codes.
    pub fn new<'a>(code: u16, lines: impl IntoIterator<Item = &'a str>) -> Self {
        let mut lines = lines.into_iter();
        let first = lines.next().unwrap_or_default();
        let enhanced = EnhancedCode::leading(first);
        let repeated =
            enhanced.map(|EnhancedCode(class, subject, detail)| format!("{class}.{subject}.{detail} "));
        let mut joined = first.to_owned();
        for line in lines {
            let line = repeated.as_deref().and_then(|prefix| line.strip_prefix(prefix)).unwrap_or(line);
            joined.push(' ');
            joined.push_str(line);
            if joined.len() > 4 * REPLY_TEXT_MAX {
                break;
            }
        }
        let text = text::bounded(&mask_addresses(&text::single_line(&joined)), REPLY_TEXT_MAX);
        Self { code, enhanced, text, as_said: None }
    }

    /// The same reply showing another's text: its own without what must not be shown.
    pub fn shown_as(self, shown: Self) -> Self {
        let as_said = (self.text != shown.text).then(|| SecretString::from(self.text));
        Self { code: self.code, enhanced: self.enhanced, text: shown.text, as_said }
    }

    /// Whether the server said one of these words, which are lower case; letters count in either case.
    pub(super) fn says(&self, words: &[&str]) -> bool {
        let said = self.as_said.as_ref().map_or(&*self.text, ExposeSecret::expose_secret);
        let said = said.to_ascii_lowercase();
        words.iter().any(|word| said.contains(word))
    }

    /// 2xx.
    pub fn is_success(&self) -> bool {
        (200..300).contains(&self.code)
    }
}

impl fmt::Display for Reply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.text.is_empty() {
            write!(f, "{}", self.code)
        } else {
            write!(f, "{} {}", self.code, self.text)
        }
    }
}

impl fmt::Debug for Reply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// What is wrong with a server's TLS. A connection that ended during the handshake is [`Fault::Lost`], not this.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TlsFault {
    /// The certificate is for other names than the host's.
    Name,
    /// The certificate has run out.
    Expired,
    /// The certificate's time has not come.
    NotYetValid,
    /// Nobody who is trusted here vouches for the certificate.
    UnknownIssuer,
    /// What answered was no TLS.
    NotTls,
    /// No version or cipher in common.
    Version,
    /// Plaintext behind the answer to STARTTLS, which would be taken for encrypted replies.
    Injection,
    /// Anything else.
    Other,
}

/// What happened, apart from where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// The server said so.
    Reply(Reply),
    /// A deadline passed without progress.
    Timeout,
    /// The connection was closed or reset.
    Lost,
    /// Refused or unreachable.
    Unreachable {
        /// The system's words.
        detail: String,
    },
    /// The host is or has an address that is not public.
    HostNotPublic,
    /// The port is not among the allowed ones.
    PortNotAllowed,
    /// The name does not exist or has no address.
    HostNotFound,
    /// The look-up failed for now.
    DnsFailed {
        /// The resolver's words.
        detail: String,
    },
    /// The certificate or the handshake.
    Tls {
        /// What is wrong.
        kind: TlsFault,
        /// The same in words for the admin: one bounded line, with the names that the certificate has.
        detail: String,
    },
    /// No TLS on offer although credentials or the settings ask for it.
    TlsRequired,
    /// The server offers no AUTH mechanism that can be used.
    NoAuthMechanism {
        /// What it offers, one line.
        offered: String,
    },
    /// What came is no SMTP, or too much of it.
    Protocol {
        /// What was wrong; never the bytes themselves.
        detail: String,
    },
    /// An address needs SMTPUTF8 (RFC 6531) and the server lacks it.
    Smtputf8Missing,
    /// The message is larger than the server's SIZE (RFC 1870).
    SizeExceeded {
        /// The message, in bytes.
        size: u64,
        /// The server's limit, in bytes.
        limit: u64,
    },
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Reply(reply) => write!(f, "the server answered {reply}"),
            Self::Timeout => f.write_str("no answer in time"),
            Self::Lost => f.write_str("the connection was lost"),
            Self::Unreachable { detail } => write!(f, "could not connect: {detail}"),
            Self::HostNotPublic => f.write_str("the host is not a public address"),
            Self::PortNotAllowed => f.write_str("the port is not allowed"),
            Self::HostNotFound => f.write_str("the host does not exist or has no address"),
            Self::DnsFailed { detail } => write!(f, "the host could not be looked up: {detail}"),
            Self::Tls { detail, .. } => write!(f, "TLS failed: {detail}"),
            Self::TlsRequired => {
                f.write_str("the server offers no TLS and credentials would travel in the clear")
            }
            Self::NoAuthMechanism { offered } if offered.is_empty() => {
                f.write_str("the server offers no authentication")
            }
            Self::NoAuthMechanism { offered } => {
                write!(f, "the server offers no usable authentication (it offers {offered})")
            }
            Self::Protocol { detail } => write!(f, "not SMTP: {detail}"),
            Self::Smtputf8Missing => {
                f.write_str("an address needs SMTPUTF8 and the server does not offer it")
            }
            Self::SizeExceeded { size, limit } => {
                write!(f, "the message has {size} bytes and the server takes {limit}")
            }
        }
    }
}

/// A failure of one attempt as a whole; a refused recipient alone is none.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// How far the attempt had come.
    pub phase: Phase,
    /// What happened.
    pub fault: Fault,
    /// Whether the session had carried a message before: then a loss at its first command means that the server had
    /// closed it meanwhile.
    pub reused: bool,
    /// The dialled address, once there is one.
    pub address: Option<SocketAddr>,
}

impl Failure {
    /// A failure on a connection that is new, or not there yet.
    pub fn new(phase: Phase, fault: Fault) -> Self {
        Self { phase, fault, reused: false, address: None }
    }

    /// The server's reply, where there was one.
    pub fn reply(&self) -> Option<&Reply> {
        match &self.fault {
            Fault::Reply(reply) => Some(reply),
            _ => None,
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "at {}: {}", self.phase.as_str(), self.fault)
    }
}

/// What one transaction (MAIL to the final dot) came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Transaction {
    /// Recipients that the server refused at RCPT: position in the job (to + cc + bcc), and its answer.
    pub refused: Vec<(u16, Reply)>,
    /// The rest's fate.
    pub outcome: TransactionOutcome,
}

/// The fate of the recipients that were not refused one by one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TransactionOutcome {
    /// 2xx to the final dot: the server has taken responsibility.
    Accepted(Reply),
    /// No recipient was accepted, so no message was sent.
    NoRecipient,
    /// The gate before DATA was shut; nothing was sent, and the session can go on.
    Withheld,
    /// Failed as a whole.
    Failed(Failure),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reply_is_one_bounded_masked_line() {
        let reply = Reply::new(550, ["5.1.1 <ann@example.org>: unknown", "5.1.1 try\r\nlater"]);
        assert_eq!(reply.to_string(), "550 5.1.1 <a…@example.org>: unknown try later");
        assert_eq!(reply.enhanced, Some(EnhancedCode(5, 1, 1)));
        assert!(Reply::new(550, ["x".repeat(5000).as_str()]).text.len() <= REPLY_TEXT_MAX);
    }

    #[test]
    fn a_concealed_reply_keeps_its_words_to_itself() {
        let said = Reply::new(554, ["5.7.1 Relay access denied"]);
        let reply = said.shown_as(Reply::new(554, ["[redacted] access denied"]));
        assert_eq!(reply.enhanced, Some(EnhancedCode(5, 7, 1)));
        assert!(reply.says(&["other", "relay access denied"]) && !reply.says(&["redacted"]));
        assert_eq!(format!("{reply} {reply:?}"), "554 [redacted] access denied 554 [redacted] access denied");
    }

    #[test]
    fn every_reason_has_its_name_and_back() {
        for reason in Reason::ALL {
            assert_eq!(Reason::from_name(reason.as_str()), Some(*reason));
            assert_eq!(serde_json::to_value(reason).unwrap(), reason.as_str());
        }
    }
}
