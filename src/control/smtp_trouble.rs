//! A failure at an organization's server as a command's error: the contract's code, a sentence, and what to do.
//! Guarantee: nothing of a server's bytes but a reply's own text, addresses masked; of a host that is not public nothing at
//! all.

use super::error::{Code, ControlError};
use crate::model::advice::{self, ServerFacts};
use crate::model::failure::{Failure, Fault, Phase, Reason};
use crate::model::policy::{self, Verdict};
use crate::model::smtp_settings::SmtpAccount;

/// The error that tells of a failure. `allowed_ports` in words.
pub(super) fn error(failure: &Failure, account: &SmtpAccount, allowed_ports: &str) -> ControlError {
    let code = code(failure);
    let message = match &failure.fault {
        Fault::PortNotAllowed => format!("port {} is not allowed; allowed: {allowed_ports}", account.port),
        fault => sentence(failure.phase, fault, code),
    };
    let error = ControlError::new(code, message).hint(advice::hint(failure, ServerFacts::of(account)));
    match code {
        Code::HostNotPublic | Code::HostNotFound | Code::DnsFailed => error.field("host"),
        Code::PortNotAllowed => error.field("port"),
        _ => error,
    }
}

fn code(failure: &Failure) -> Code {
    match &failure.fault {
        Fault::HostNotPublic => Code::HostNotPublic,
        Fault::PortNotAllowed => Code::PortNotAllowed,
        Fault::HostNotFound => Code::HostNotFound,
        Fault::DnsFailed { .. } => Code::DnsFailed,
        Fault::Unreachable { .. } | Fault::Lost | Fault::Protocol { .. } => Code::ConnectFailed,
        Fault::Timeout => Code::ConnectTimeout,
        Fault::Tls { .. } => Code::TlsFailed,
        Fault::TlsRequired => Code::TlsRequired,
        Fault::NoAuthMechanism { .. } => Code::AuthFailed,
        Fault::Smtputf8Missing | Fault::SizeExceeded { .. } => Code::Rejected,
        Fault::Reply(_) => match policy::judge(failure) {
            Verdict::Account(Reason::AuthFailed) => Code::AuthFailed,
            Verdict::Account(Reason::TlsRequired) => Code::TlsRequired,
            _ if failure.phase == Phase::Starttls => Code::TlsFailed,
            _ => Code::Rejected,
        },
    }
}

/// What happened, for a person.
fn sentence(phase: Phase, fault: &Fault, code: Code) -> String {
    let told = match fault {
        Fault::HostNotPublic => return "SMTP host must be a public address".to_owned(),
        Fault::Reply(reply) if code == Code::AuthFailed => {
            format!("The server refused the user name or the password: {reply}")
        }
        Fault::Reply(reply) => format!("The server answered {reply}"),
        Fault::Timeout if phase == Phase::Connect => {
            "The server did not answer the connection in time".into()
        }
        Fault::Timeout if phase == Phase::Tls => "The TLS handshake did not come to its end in time".into(),
        Fault::Timeout => "The server did not answer in time".into(),
        Fault::Lost => "The server closed the connection".into(),
        Fault::Protocol { detail } => format!("What answers there does not speak SMTP: {detail}"),
        fault => capitalised(&fault.to_string()),
    };
    if phase == Phase::FinalDot && policy::judge(&Failure::new(phase, fault.clone())) == Verdict::Unknown {
        return format!(
            "{told} after the whole message had been sent: it is not known whether the message was accepted"
        );
    }
    told
}

fn capitalised(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().map_or_else(String::new, |first| first.to_uppercase().chain(chars).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::address::Mailbox;
    use crate::model::failure::Reply;
    use crate::model::smtp_settings::TlsMode;

    fn told(phase: Phase, fault: Fault) -> ControlError {
        let account = SmtpAccount {
            host: "mail.example.org".into(),
            port: 26,
            tls: TlsMode::Required,
            credentials: None,
            from: Mailbox::parse("a@example.org").unwrap(),
        };
        error(&Failure::new(phase, fault), &account, "25, 587")
    }

    fn reply(phase: Phase, code: u16, text: &str) -> ControlError {
        told(phase, Fault::Reply(Reply::new(code, [text])))
    }

    #[test]
    fn each_failure_has_the_contracts_code_and_a_hint() {
        let detail = || "x".to_owned();
        for (phase, fault, code, field) in [
            (Phase::Resolve, Fault::HostNotPublic, Code::HostNotPublic, Some("host")),
            (Phase::Resolve, Fault::PortNotAllowed, Code::PortNotAllowed, Some("port")),
            (Phase::Resolve, Fault::HostNotFound, Code::HostNotFound, Some("host")),
            (Phase::Resolve, Fault::DnsFailed { detail: detail() }, Code::DnsFailed, Some("host")),
            (Phase::Connect, Fault::Unreachable { detail: detail() }, Code::ConnectFailed, None),
            (Phase::Connect, Fault::Timeout, Code::ConnectTimeout, None),
            (Phase::Greeting, Fault::Timeout, Code::ConnectTimeout, None),
            (Phase::Greeting, Fault::Lost, Code::ConnectFailed, None),
            (Phase::Greeting, Fault::Protocol { detail: detail() }, Code::ConnectFailed, None),
            (Phase::Starttls, Fault::TlsRequired, Code::TlsRequired, None),
            (Phase::Auth, Fault::NoAuthMechanism { offered: detail() }, Code::AuthFailed, None),
            (Phase::Auth, Fault::Lost, Code::ConnectFailed, None),
        ] {
            let error = told(phase, fault.clone());
            assert_eq!((error.code, error.field.as_deref()), (code, field), "{fault:?}");
            assert!(error.hint.is_some_and(|hint| !hint.is_empty()), "{fault:?}");
        }
        assert!(
            told(Phase::Resolve, Fault::PortNotAllowed)
                .message
                .contains("26 is not allowed; allowed: 25, 587")
        );
    }

    #[test]
    fn only_a_lasting_refusal_of_the_credentials_is_one() {
        for (phase, code, text, expected) in [
            (Phase::Auth, 535, "5.7.8 no", Code::AuthFailed),
            (Phase::Auth, 550, "no", Code::AuthFailed),
            (Phase::Auth, 454, "4.7.0 Temporary authentication failure", Code::Rejected),
            (Phase::Auth, 421, "4.7.0 Try later", Code::Rejected),
            (Phase::Mail, 530, "5.7.0 Authentication required", Code::AuthFailed),
            (Phase::Greeting, 554, "no service", Code::Rejected),
            (Phase::Starttls, 454, "4.7.0 TLS not available", Code::TlsFailed),
            (Phase::Starttls, 502, "5.5.1 no", Code::TlsRequired),
            (Phase::Rcpt, 550, "5.1.1 <ann@example.org> unknown", Code::Rejected),
        ] {
            let error = reply(phase, code, text);
            assert_eq!(error.code, expected, "{text}");
            assert!(error.message.contains(&code.to_string()), "{}", error.message);
            assert!(!error.message.contains("ann@"), "{}", error.message);
        }
    }

    #[test]
    fn a_loss_behind_the_final_dot_is_said_to_be_unknown() {
        for fault in [Fault::Lost, Fault::Timeout] {
            assert!(told(Phase::FinalDot, fault.clone()).message.contains("it is not known whether"));
            assert!(!told(Phase::Body, fault).message.contains("not known"));
        }
        assert!(!reply(Phase::FinalDot, 550, "5.7.1 spam").message.contains("not known"));
    }
}
