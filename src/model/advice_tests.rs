//! Advice, read row by row: who says what, and which advice it brings.

use super::*;

const SMTP: ServerFacts<'_> = ServerFacts { host: "smtp.acme.example", port: 587, tls: TlsMode::Required };

fn reply(line: &str) -> Reply {
    let (code, text) = line.split_once(' ').unwrap_or((line, ""));
    Reply::new(code.parse().unwrap(), [text])
}

fn said_by(host: &str, phase: Phase, line: &str) -> String {
    hint(&Failure::new(phase, Fault::Reply(reply(line))), ServerFacts { host, ..SMTP })
}

fn about(phase: Phase, fault: Fault, port: u16) -> String {
    hint(&Failure::new(phase, fault), ServerFacts { port, tls: TlsMode::new(port, true), ..SMTP })
}

fn tls(kind: TlsFault) -> Fault {
    Fault::Tls { kind, detail: "in words".into() }
}

/// That an advice has all of these parts.
#[track_caller]
fn assert_advises(advice: &str, parts: &[&str], what: &str) {
    for part in parts {
        assert!(advice.contains(part), "{what}: {part:?} is missing in: {advice}");
    }
}

#[test]
fn a_refused_login_brings_the_advice_of_the_provider_that_refused_it() {
    for (host, line, advice) in [
        (
            "smtp.gmail.com",
            "535 5.7.8 Username and Password not accepted. For more information, go to",
            &["whole email address", "app password"][..],
        ),
        (
            "smtp.gmail.com",
            "534 5.7.9 Application-specific password required.",
            &["two-step verification", "Create an app password"],
        ),
        (
            "smtp.gmail.com",
            "534 5.7.14 <https://accounts.google.com/signin/continue?sarp=1> Please log in via your web browser",
            &["in a web browser", "app password"],
        ),
        (
            "smtp.office365.com",
            "535 5.7.139 Authentication unsuccessful, basic authentication is disabled.",
            &["basic authentication is switched off", "authenticated SMTP for this mailbox"],
        ),
        (
            "smtp.office365.com",
            "535 5.7.139 Authentication unsuccessful, SmtpClientAuthentication is disabled for the Tenant.",
            &["the whole Microsoft 365 organization"],
        ),
        (
            "smtp.office365.com",
            "535 5.7.139 Authentication unsuccessful, SmtpClientAuthentication is disabled for the Mailbox.",
            &["for this mailbox", "Manage email apps"],
        ),
        (
            "smtp.office365.com",
            "535 5.7.139 Authentication unsuccessful, the user credentials were incorrect.",
            &["refused the user name or the password", "whole address"],
        ),
        (
            "smtp.office365.com",
            "535 5.7.139 Authentication unsuccessful, user is locked by your organization's security defaults policy.",
            &["A policy", "security defaults"],
        ),
        (
            "smtp.office365.com",
            "550 5.7.30 Basic authentication is not supported for Client Submission.",
            &["basic authentication is switched off"],
        ),
        ("smtp.office365.com", "535 5.7.3 Authentication unsuccessful", &["Microsoft 365", "app password"]),
        (
            "mail.acme.example",
            "535 5.7.3 Authentication unsuccessful [AM0PR04CA0001.eurprd04.prod.outlook.com]",
            &["Microsoft 365"],
        ),
        ("mail.acme.example", "535 5.7.3 Authentication unsuccessful", &["Exchange", "DOMAIN\\user"]),
        (
            "email-smtp.eu-west-1.amazonaws.com",
            "535 Authentication Credentials Invalid",
            &["SMTP credentials", "AWS access keys do not work", "one region"],
        ),
        (
            "mail.acme.example",
            "535 5.7.8 Error: authentication failed: (reason unavailable)",
            &["whole email address"],
        ),
        ("smtp.mail.yahoo.com", "535 5.7.0 (#AUTH005) Too many bad auth attempts.", &["locked", "Wait"]),
        ("smtp.mail.yahoo.com", "535 5.7.0 (#MBR1240) Please verify your account", &["Account security"]),
        ("smtp.aol.com", "535 5.7.0 no", &["app password", "Account security"]),
        ("smtp.mail.me.com", "535 5.7.8 Error: authentication failed: authentication failure", &["iCloud"]),
        ("mail.acme.example", "535 no", &["user name", "password", "app password"]),
        ("mail.acme.example", "454 4.7.0 Temporary authentication failure", &["at the moment", "Try again"]),
        ("mail.acme.example", "421 4.7.0 closing", &["at the moment"]),
        ("mail.acme.example", "538 5.7.11 Encryption required", &["never sent unencrypted", "465"]),
    ] {
        assert_advises(&said_by(host, Phase::Auth, line), advice, line);
    }
}

#[test]
fn a_login_that_the_server_misses_at_mail_is_advised_on_too() {
    for (line, advice) in [
        ("530 5.7.57 SMTP; Client was not authenticated to send anonymous mail during MAIL FROM", "587"),
        ("530 5.7.57 Client not authenticated to send mail.", "authenticated SMTP"),
        ("530 5.7.0 Authentication Required.", "app password"),
        ("530 5.7.0 Must issue a STARTTLS command first.", "465"),
    ] {
        assert_advises(&said_by("mail.acme.example", Phase::Mail, line), &[advice], line);
    }
}

#[test]
fn a_refused_sender_or_message_brings_the_advice_that_its_words_allow() {
    use Phase::{FinalDot, Greeting, Mail, Rcpt, Starttls};
    for (phase, line, advice) in [
        (FinalDot, "554 5.2.252 SendAsDenied; x not allowed to send as y", &["Send As"][..]),
        (FinalDot, "550 5.7.60 SMTP; Client does not have permissions to send as this sender", &["Send As"]),
        (
            FinalDot,
            "554 Message rejected: Email address is not verified. The following identities failed the check",
            &["Verify the address or its domain", "region", "sandbox"],
        ),
        (FinalDot, "554 Access denied: User is not authorized to perform `ses:SendRawEmail'", &["IAM"]),
        (
            Rcpt,
            "553 5.7.1 <a@b.c>: Sender address rejected: not owned by user x",
            &["its own addresses only"],
        ),
        (Rcpt, "554 5.7.1 <x@y.z>: Relay access denied", &["submission"]),
        (Mail, "550 5.7.54 SMTP; Unable to relay recipient in non-accepted domain", &["submission"]),
        (Mail, "550 5.1.8 <a@b.c>: Sender address rejected: Domain not found", &["spelling", "MX"]),
        (Mail, "504 5.5.2 <pod>: Helo command rejected: need fully-qualified hostname", &["smtp.hello_name"]),
        (FinalDot, "550 5.7.26 This mail is unauthenticated; SPF: fail", &["SPF", "DKIM", "DMARC"]),
        (
            Greeting,
            "554 5.7.1 Service unavailable; Client host blocked using zen.spamhaus.org",
            &["let it in"],
        ),
        (Greeting, "554 no service", &["turns this connection away", "587 or 465"]),
        (Starttls, "454 4.7.0 TLS not available due to temporary reason", &["STARTTLS", "at the moment"]),
        (Starttls, "421 4.7.0 Try again later", &["slower pace"]),
        (Mail, "550 no", &["SPF, DKIM and DMARC", "from address"]),
        (Rcpt, "550 5.1.1 no such user", &["recipient's address"]),
        (FinalDot, "552 5.3.4 too big", &["smaller attachments"]),
        (FinalDot, "550 5.4.5 Daily user sending limit exceeded.", &["renews the quota"]),
        (Mail, "421 4.7.0 Try again later", &["slower pace"]),
        (Mail, "451 4.3.0 try later", &["trouble of its own"]),
    ] {
        assert_advises(&said_by("mail.acme.example", phase, line), advice, line);
    }
}

#[test]
fn a_fault_of_tls_is_advised_on_by_its_kind_and_the_port_that_fits() {
    for (kind, port, advice) in [
        (TlsFault::Name, 587, &["one of the names", "as the host"][..]),
        (TlsFault::Expired, 587, &["renew its certificate"]),
        (TlsFault::NotYetValid, 587, &["clock"]),
        (TlsFault::UnknownIssuer, 587, &["operator", "smtp.extra_ca_files", "intermediate"]),
        (TlsFault::NotTls, 465, &["Use port 587", "STARTTLS"]),
        (TlsFault::NotTls, 2465, &["Use port 587"]),
        (TlsFault::NotTls, 587, &["port 465", "first byte"]),
        (TlsFault::Version, 587, &["TLS 1.2"]),
        (TlsFault::Injection, 587, &["Do not go on"]),
        (TlsFault::Other, 587, &["smtp.extra_ca_files", "465"]),
        (TlsFault::Other, 465, &["smtp.extra_ca_files", "587"]),
    ] {
        assert_advises(&about(Phase::Tls, tls(kind), port), advice, &format!("{kind:?} on {port}"));
    }
}

#[test]
fn what_happens_to_the_connection_is_advised_on_by_its_phase_and_the_port() {
    use Phase::{Auth, Connect, Ehlo, Greeting, Mail, Resolve, Starttls, Tls};
    let unreachable = || Fault::Unreachable { detail: "refused".into() };
    let no_smtp = || Fault::Protocol { detail: "no reply".into() };
    let offers = |offered: &str| Fault::NoAuthMechanism { offered: offered.into() };
    for (phase, fault, port, advice) in [
        (Resolve, Fault::HostNotFound, 587, &["spelling"][..]),
        (Resolve, Fault::HostNotPublic, 587, &["from the internet"]),
        (Resolve, Fault::PortNotAllowed, 26, &["587", "465", "operator"]),
        (Resolve, Fault::DnsFailed { detail: "x".into() }, 587, &["name servers"]),
        (Connect, Fault::Timeout, 587, &["reachable from the internet", "firewall", "465"]),
        (Connect, Fault::Timeout, 25, &["block outgoing port 25", "587"]),
        (Connect, unreachable(), 465, &["reachable from the internet", "587"]),
        (Connect, unreachable(), 2526, &["587 (STARTTLS) or 465 (TLS)"]),
        (Greeting, Fault::Timeout, 587, &["TLS from the first byte, use port 465"]),
        (Greeting, Fault::Lost, 587, &["TLS from the first byte, use port 465"]),
        (Greeting, Fault::Timeout, 465, &["took too long"]),
        (Greeting, no_smtp(), 587, &["no mail server"]),
        (Ehlo, no_smtp(), 587, &["mail server"]),
        (Starttls, Fault::TlsRequired, 587, &["never sent unencrypted", "465"]),
        (Starttls, Fault::TlsRequired, 25, &["never sent unencrypted", "587"]),
        (Tls, Fault::Lost, 587, &["465"]),
        (Tls, Fault::Timeout, 465, &["587"]),
        (Mail, Fault::Smtputf8Missing, 587, &["ASCII", "SMTPUTF8"]),
        (Auth, Fault::Lost, 587, &["open whether the password is right"]),
        (Auth, Fault::Timeout, 587, &["open whether the password is right"]),
        (Auth, offers(""), 25, &["takes no logins", "587"]),
        (Auth, offers(""), 587, &["takes no logins", "465"]),
        (Auth, offers("XOAUTH2 OAUTHBEARER"), 587, &["OAuth"]),
        (Auth, offers("NTLM GSSAPI"), 587, &["Exchange", "receive connector"]),
        (Auth, offers("CRAM-MD5"), 587, &["PLAIN or LOGIN"]),
        (Auth, offers("PLAIN LOGIN"), 587, &["PLAIN or LOGIN"]),
    ] {
        let what = format!("{phase:?} {fault} on {port}");
        assert_advises(&about(phase, fault, port), advice, &what);
    }
}

#[test]
fn every_reason_has_an_advice_of_one_short_line() {
    for reason in Reason::ALL {
        let advice = of_reason(*reason);
        assert!(
            advice.ends_with('.') && !advice.contains('\n') && !advice.contains("  "),
            "{reason}: {advice}"
        );
        assert!((20..=220).contains(&advice.len()), "{reason}: {advice}");
    }
}

#[test]
fn nothing_of_the_servers_words_or_of_the_addresses_in_them_is_repeated() {
    let host = ServerFacts { host: "secret-host.example", ..SMTP };
    for line in [
        "535 5.7.8 Error: authentication failed: hunter2 ann@acme.example",
        "553 5.7.1 <ann@acme.example>: Sender address rejected: not owned by user ann@acme.example hunter2",
        "535 hunter2 is not ann@acme.example's password",
    ] {
        for phase in [Phase::Auth, Phase::Mail] {
            let advice = hint(&Failure::new(phase, Fault::Reply(reply(line))), host);
            for word in ["hunter2", "acme", "ann@", "secret-host"] {
                assert!(!advice.contains(word), "{line}: {advice}");
            }
        }
    }
}

#[test]
fn a_providers_domain_is_matched_by_whole_labels() {
    let facts = |host| ServerFacts { host, ..SMTP };
    for host in ["gmail.com", "smtp.gmail.com", "SMTP.GMAIL.COM."] {
        assert!(facts(host).is_in("gmail.com"), "{host}");
    }
    for host in ["notgmail.com", "gmail.com.evil.example", ""] {
        assert!(!facts(host).is_in("gmail.com"), "{host}");
    }
}
