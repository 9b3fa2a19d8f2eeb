//! From what the network, the resolver and the server said to the model's words for it.
//! Guarantee: bytes that are no SMTP reply appear in no failure.

use std::io;

use crate::egress::{DialError, EgressError};
use crate::model::failure::{Fault, Reply};

/// A complete reply as it came, its bytes made valid UTF-8.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct RawReply {
    /// 200 to 599.
    pub code: u16,
    /// The texts behind the codes, one per line.
    pub lines: Vec<String>,
}

impl RawReply {
    /// The reply in the form that is stored and shown.
    pub fn to_model(&self) -> Reply {
        Reply::new(self.code, self.lines.iter().map(String::as_str))
    }

    /// 2xx.
    pub fn is_success(&self) -> bool {
        (200..300).contains(&self.code)
    }

    /// 4xx or 5xx.
    pub fn is_refusal(&self) -> bool {
        self.code >= 400
    }

    /// The server closes the connection behind this reply (RFC 5321 section 3.8).
    pub fn closes(&self) -> bool {
        self.code == 421
    }

    /// What a reply means where only a refusal makes sense.
    pub fn into_fault(self) -> Fault {
        if self.is_refusal() {
            Fault::Reply(self.to_model())
        } else {
            protocol("the server gave a reply that does not fit the command")
        }
    }
}

/// A violation of SMTP, told in our own words.
pub(super) fn protocol(detail: &str) -> Fault {
    Fault::Protocol { detail: detail.to_owned() }
}

/// Why the host may not, or cannot, be dialled.
pub(super) fn egress_fault(error: &EgressError) -> Fault {
    match error {
        EgressError::HostNotPublic { .. } => Fault::HostNotPublic,
        EgressError::PortNotAllowed { .. } => Fault::PortNotAllowed,
        EgressError::HostNotFound => Fault::HostNotFound,
        EgressError::DnsFailed { detail } => Fault::DnsFailed { detail: detail.clone() },
    }
}

/// Why no connection came to be.
pub(super) fn dial_fault(error: &DialError) -> Fault {
    match error {
        DialError::Timeout { .. } => Fault::Timeout,
        DialError::Failed { source, .. } if source.kind() == io::ErrorKind::TimedOut => Fault::Timeout,
        DialError::Failed { .. } | DialError::NoAddress => Fault::Unreachable { detail: error.to_string() },
    }
}
