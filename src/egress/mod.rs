//! Which addresses may be dialled, and the only way to dial one.
//! Guarantee: a TCP connection outside leads to an [`ApprovedAddr`], and only [`Egress`] makes one, out of
//! the very answer of the DNS that it judged: between the check and the connection nothing is looked up
//! again.
//!
//! The way of a new connection: [`ServerHost::parse`] once, when the configuration is saved; then
//! [`Egress::approve`] and [`dial()`], every time.

mod approve;
mod dial;
mod host;
mod mail_records;
mod policy;
mod resolver;

#[cfg(test)]
#[path = "../../tests/it/support/dns.rs"]
mod dns;
#[cfg(test)]
mod tests;

pub use approve::{ApprovedAddr, Egress, EgressError, OperatorsHost};
pub use dial::{DialError, dial};
pub use host::{HostError, HostName, ServerHost};
pub use policy::{AllowedPorts, EgressPolicy, Refusal, Verdict, judge};
pub use resolver::{LOOK_UP_LIMIT, NoNameservers};
