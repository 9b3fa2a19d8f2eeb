//! What a person can do about a failure: the advice of every error code, more exact where the failure tells more.
//! Guarantee: no advice repeats a credential, an address or bytes of the server's; its words are all written here.

use super::failure::{EnhancedCode, Failure, Fault, Phase, Reason, Reply, TlsFault};
use super::policy::{self, Verdict};
use super::smtp_settings::{SmtpAccount, TlsMode};

mod sayings;

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

impl<'a> ServerFacts<'a> {
    /// Of an account's server.
    pub fn of(account: &'a SmtpAccount) -> Self {
        Self { host: &account.host, port: account.port, tls: account.tls }
    }

    /// Whether the host is the domain, or a name in it.
    fn is_in(&self, domain: &str) -> bool {
        let host = self.host.trim_end_matches('.').to_ascii_lowercase();
        host.strip_suffix(domain).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
    }
}

/// What to do about a failure: one to three sentences for the organization's admin, who may have to pass them on to the
/// server's provider or to the operator of this installation.
pub fn hint(failure: &Failure, server: ServerFacts<'_>) -> String {
    let specific = match &failure.fault {
        Fault::Reply(reply) => sayings::advice(failure.phase, reply, server),
        Fault::Tls { kind, .. } => Some(of_tls(*kind, server)),
        Fault::NoAuthMechanism { offered } => Some(of_mechanisms(offered, server)),
        Fault::TlsRequired => Some(of_missing_tls(server)),
        Fault::Timeout | Fault::Lost | Fault::Protocol { .. } => of_silence(failure, server),
        Fault::Smtputf8Missing => Some(SMTPUTF8_MISSING.to_owned()),
        Fault::Unreachable { .. } => Some(of_connecting(of_reason(Reason::ConnectFailed), server)),
        _ => None,
    };
    specific.unwrap_or_else(|| of_reason(reason_of(failure)).to_owned())
}

const SMTPUTF8_MISSING: &str =
    "Use an address with ASCII letters only in front of the @, or a server that offers SMTPUTF8.";

/// The reason that advice goes by: what the failure is called when it ends a job.
fn reason_of(failure: &Failure) -> Reason {
    match policy::judge(failure) {
        Verdict::Account(reason) | Verdict::Dead(reason) | Verdict::Retry { reason, .. } => reason,
        Verdict::Fresh => Reason::ConnectionLost,
        Verdict::Unknown => Reason::UnknownOutcome,
    }
}

fn of_tls(kind: TlsFault, server: ServerFacts<'_>) -> String {
    match (kind, server.tls) {
        (TlsFault::Name, _) => {
            "Enter one of the names that the certificate has as the host, or have the server's administrator install a \
             certificate for this host name."
        }
        (TlsFault::Expired, _) => {
            "Whoever runs the server has to renew its certificate. Nothing needs to be changed here."
        }
        (TlsFault::NotYetValid, _) => {
            "Whoever runs the server has to install a certificate that is valid already, or to set the server's clock \
             right."
        }
        (TlsFault::UnknownIssuer, _) => {
            "If the server has a self-signed certificate, or one of a private authority, ask the operator of this \
             installation to add it to smtp.extra_ca_files. Otherwise the server's administrator has to install the \
             intermediate certificates of its authority too."
        }
        (TlsFault::NotTls, TlsMode::Implicit) => {
            "Use port 587: on 465 and 2465 TLS begins with the first byte, and this server begins in the clear, as it \
             does where TLS is taken up with STARTTLS."
        }
        (TlsFault::NotTls, TlsMode::Required | TlsMode::Opportunistic) => {
            "The server offers STARTTLS but does not speak TLS behind it. Try port 465, where TLS begins with the first \
             byte; if that fails too, ask the provider which port is for which kind of TLS."
        }
        (TlsFault::Version, _) => {
            "The server's TLS is too old: its administrator has to enable TLS 1.2 or newer."
        }
        (TlsFault::Injection, _) => {
            "Do not go on from here: something between this installation and the server changes what they say, or the \
             server is faulty. Tell its administrator; port 465 is not open to this."
        }
        (TlsFault::Other, _) => return of_other_tls(server),
    }
    .to_owned()
}

fn of_other_tls(server: ServerFacts<'_>) -> String {
    let other = match server.tls {
        TlsMode::Implicit => "587 (STARTTLS)",
        TlsMode::Required | TlsMode::Opportunistic => "465 (TLS from the first byte)",
    };
    format!("{} Port {other} may be the right one for this server.", of_reason(Reason::TlsFailed))
}

fn of_missing_tls(server: ServerFacts<'_>) -> String {
    let port = match server.port {
        25 => "Use port 587 (STARTTLS) or 465 (TLS): port 25 is for mail between servers.",
        _ => "Try port 465 (TLS from the first byte), or 587 if another one is set.",
    };
    format!("{} {port}", of_reason(Reason::TlsRequired))
}

fn of_mechanisms(offered: &str, server: ServerFacts<'_>) -> String {
    let has =
        |names: &[&str]| offered.split(' ').any(|word| names.iter().any(|n| word.eq_ignore_ascii_case(n)));
    if offered.is_empty() {
        let port = if server.port == 587 { "465" } else { "587" };
        return format!(
            "The server takes no logins here. Try port {port}, or have its administrator enable user name and password \
             (AUTH PLAIN or LOGIN) behind TLS."
        );
    }
    if has(&["PLAIN", "LOGIN"]) {
        return "The server offers a login with user name and password and then does not take it: its administrator \
                has to enable AUTH PLAIN or LOGIN for this account."
            .to_owned();
    }
    if has(&["XOAUTH2", "OAUTHBEARER"]) {
        return "The server takes OAuth sign-in only, which is not supported. Have its administrator allow a user name \
                and password (an app password, or SMTP AUTH) for this account, or use a server that does."
            .to_owned();
    }
    if has(&["NTLM", "GSSAPI"]) {
        return "The server takes Windows sign-in only. On an Exchange server the administrator has to allow basic \
                authentication behind TLS on the receive connector of this port."
            .to_owned();
    }
    "The server takes logins only in ways that are not supported. Have its administrator enable AUTH PLAIN or LOGIN \
     behind TLS."
        .to_owned()
}

/// Where the connection came to be and then no dialogue did.
fn of_silence(failure: &Failure, server: ServerFacts<'_>) -> Option<String> {
    let starts_in_clear = server.tls != TlsMode::Implicit;
    let advice = match (failure.phase, &failure.fault) {
        (Phase::Connect, Fault::Timeout) => {
            return Some(of_connecting(of_reason(Reason::ConnectTimeout), server));
        }
        (Phase::Greeting, Fault::Timeout | Fault::Lost) if starts_in_clear => {
            "The server was reached and gave no greeting. If it expects TLS from the first byte, use port 465; \
             otherwise check the port, and whether the server's firewall lets this installation in."
        }
        (Phase::Greeting, Fault::Protocol { .. }) => {
            "What answers at this host and port is no mail server. Check both: most servers take mail on 587 \
             (STARTTLS) or 465 (TLS)."
        }
        (Phase::Starttls | Phase::Tls, Fault::Timeout | Fault::Lost) if starts_in_clear => {
            "The connection ended while TLS was taken up. Try again; if it stays, use port 465 (TLS from the first \
             byte) or ask the server's administrator to look into its log."
        }
        (Phase::Tls, Fault::Timeout | Fault::Lost) => {
            "The connection ended while TLS was taken up. Try again; if it stays, use port 587 (STARTTLS) or ask the \
             server's administrator to look into its log."
        }
        (Phase::Auth, Fault::Timeout | Fault::Lost) => {
            "The connection ended during the login, so it is open whether the password is right. Try again later; if it \
             stays, ask the server's administrator to look into its log."
        }
        _ => return None,
    };
    Some(advice.to_owned())
}

fn of_connecting(advice: &str, server: ServerFacts<'_>) -> String {
    let port = match server.port {
        25 => " Many networks block outgoing port 25: use 587 (STARTTLS) or 465 (TLS).",
        587 | 2587 => " If the provider names 465, use that.",
        465 | 2465 => " If the provider names 587, use that.",
        _ => " Most servers take mail on 587 (STARTTLS) or 465 (TLS).",
    };
    format!("{advice}{port}")
}

/// What to do where only the reason is known.
pub fn of_reason(reason: Reason) -> &'static str {
    match reason {
        Reason::Malformed => "Correct the job as the detail says, and publish it again under a new id.",
        Reason::UnsupportedVersion => "Publish the job with version 1.",
        Reason::IdConflict => "Give each job an id of its own.",
        Reason::Expired => {
            "Nothing can be done any more: the job came too late, or could not be sent in time."
        }
        Reason::Superseded => "Nothing needs to be done: a newer job of the same group took its place.",
        Reason::Cancelled => "Nothing needs to be done: the job was cancelled.",
        Reason::Unroutable => {
            "Publish with a routing key that a lane takes; sendoff topology show lists them."
        }
        Reason::ConfigMissing => {
            "Enable custom SMTP for the organization and give it a configuration, or set up the platform's server."
        }
        Reason::ConfigUnreadable => "Enter the user name and the password again.",
        Reason::HostNotPublic => {
            "Give the name or address under which the server is reached from the internet: private and local addresses \
             are never connected to."
        }
        Reason::PortNotAllowed => {
            "Use 587 (STARTTLS) or 465 (TLS). Any other port has to be allowed by the operator of this installation."
        }
        Reason::HostNotFound => {
            "Check the spelling of the host name. If it is new, its DNS record may take a while."
        }
        Reason::DnsFailed => "Try again in a minute; if it stays, check the domain's name servers.",
        Reason::ConnectFailed => {
            "Check the host and the port. The server has to be reachable from the internet, and its firewall has to let \
             the port through."
        }
        Reason::ConnectTimeout => {
            "Nothing answers at this host and port. Check both: the server has to be reachable from the internet, and \
             its firewall has to let the port through."
        }
        Reason::TlsFailed => {
            "Check the server's certificate and the port. A private authority, or a self-signed certificate, has to be \
             added to smtp.extra_ca_files by the operator of this installation."
        }
        Reason::TlsRequired => {
            "The server offers no TLS on this port, and a password is never sent unencrypted."
        }
        Reason::AuthFailed => {
            "Check the user name, which often is the whole email address, and the password. Many providers want an app \
             password here."
        }
        Reason::SenderRefused => {
            "Use a from address that this account may send as, or have the provider allow it. The address's domain \
             needs SPF, DKIM and DMARC records that cover this server."
        }
        Reason::RecipientsRefused => {
            "Check the recipient's address. The server's reply says why it was refused."
        }
        Reason::MessageRefused => {
            "The server's reply says why. Where it speaks of spam or policy, check the SPF, DKIM and DMARC records of \
             the from address's domain, then ask the provider."
        }
        Reason::TooLarge => "Send less: smaller attachments, or links to them.",
        Reason::Throttled => {
            "Nothing needs to be changed: the server asks for a slower pace. Try again later."
        }
        Reason::QuotaExceeded => {
            "Wait until the provider renews the quota, usually a day, or ask it for a larger one."
        }
        Reason::ServerError => {
            "The server has trouble of its own. Try again later; if it stays, ask the provider."
        }
        Reason::ProtocolError => {
            "Check that the host and the port belong to a mail server; then ask its administrator."
        }
        Reason::ConnectionLost => {
            "Try again later. If it stays, ask the server's administrator to look into its log."
        }
        Reason::Timeout => {
            "The server took too long to answer. Try again later; if it stays, ask the provider."
        }
        Reason::UnknownOutcome => {
            "Look in the recipient's mailbox or the server's log before sending again: the mail may have arrived."
        }
        Reason::RetriesExhausted => "Mend the last cause, then replay the dead letter.",
        Reason::CrashLoop => {
            "Tell the operator of this installation: workers ended while they handled this job."
        }
        Reason::Internal => {
            "Tell the operator of this installation: the fault is Sendoff's own, and its log says more."
        }
    }
}

#[cfg(test)]
#[path = "advice_tests.rs"]
mod tests;
