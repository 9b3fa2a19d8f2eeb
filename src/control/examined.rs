//! The report of a connection test: an examination in the contract's steps, each with a sentence for a person.
//! Guarantee: the steps come in the contract's order and the last one is the one that failed; of a host that is not public
//! the report is always the same, whatever is behind it.

use std::time::Duration;

use serde::Serialize;
use time::OffsetDateTime;

use super::error::{Code, ControlError};
use super::smtp_config_test::TEST_LIMIT;
use super::smtp_trouble;
use crate::model::failure::{Failure, Fault, Phase};
use crate::model::sender_records::Findings;
use crate::model::smtp_settings::{SmtpAccount, TlsMode};
use crate::smtp::{Examination, TlsFacts};

/// A certificate that ends sooner than this is warned of, in days.
const EXPIRY_WARNING_DAYS: i64 = 14;

/// The contract's test report.
#[derive(Debug, Serialize)]
pub(super) struct TestReport {
    /// Whether every step went through.
    pub(super) ok: bool,
    steps: Vec<Step>,
    /// What does not fail the test and hurts delivery; each begins with its topic.
    warnings: Vec<String>,
    /// What was found out beside, and what a test cannot tell.
    notes: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<ControlError>,
}

#[derive(Debug, PartialEq, Eq, Serialize)]
struct Step {
    step: Name,
    ok: bool,
    ms: u64,
    detail: String,
}

/// In the contract's order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
enum Name {
    Resolve,
    /// The rules for addresses and ports; they take no time of their own.
    Address,
    Connect,
    /// The 220 and the first EHLO.
    Greeting,
    /// STARTTLS, the handshake, and the EHLO behind them.
    Tls,
    Authenticate,
}

const NAMES: [Name; 6] =
    [Name::Resolve, Name::Address, Name::Connect, Name::Greeting, Name::Tls, Name::Authenticate];

/// An examination and what it was about.
struct Examined<'a> {
    seen: &'a Examination,
    account: &'a SmtpAccount,
}

impl TestReport {
    /// `allowed_ports` in words.
    pub(super) fn new(
        seen: &Examination,
        account: &SmtpAccount,
        allowed_ports: &str,
        now: OffsetDateTime,
    ) -> Self {
        let error = seen.failure.as_ref().map(|failure| {
            let mut error = smtp_trouble::error(failure, account, allowed_ports);
            if let (Some(hint), true) = (&mut error.hint, seen.overdue && failure.phase != Phase::Resolve) {
                hint.push_str(&slowness_hint());
            }
            error
        });
        let expiry = seen.tls.as_ref().and_then(|tls| expiry_warning(tls, now));
        Self {
            ok: error.is_none(),
            steps: Examined { seen, account }.steps(error.as_ref()),
            warnings: expiry.into_iter().collect(),
            notes: Vec::new(),
            error,
        }
    }

    /// Whether host or port are ones that are not dialled: then nothing beyond that is told.
    pub(super) fn refuses_to_dial(&self) -> bool {
        matches!(self.code(), Some(Code::HostNotPublic | Code::PortNotAllowed))
    }

    /// Adds what is to be told of the sender's domain.
    pub(super) fn add(&mut self, findings: Findings) {
        self.warnings.extend(findings.warnings);
        self.notes.extend(findings.notes);
    }

    /// The error's code.
    pub(super) fn code(&self) -> Option<Code> {
        self.error.as_ref().map(|error| error.code)
    }
}

/// For a server that may only be slow.
fn slowness_hint() -> String {
    let limit = TEST_LIMIT.as_secs();
    format!(" A test gives a server at most {limit} s; a test email gives it more, should it only be slow.")
}

impl Examined<'_> {
    fn steps(&self, error: Option<&ControlError>) -> Vec<Step> {
        let failed = self.seen.failure.as_ref().map(|failure| self.step_of_failure(failure));
        let mut steps = Vec::new();
        for step in NAMES {
            let ms = millis(self.took(step));
            if failed == Some(step) {
                let reason = error.map(|error| error.message.as_str()).unwrap_or_default();
                steps.push(Step { step, ok: false, ms, detail: self.failed_detail(step, reason) });
                break;
            }
            if step == Name::Greeting && self.seen.greeting.is_none() {
                // TLS from the first byte comes before it.
                continue;
            }
            steps.push(Step { step, ok: true, ms, detail: self.detail(step) });
        }
        steps
    }

    fn is_implicit(&self) -> bool {
        self.account.tls == TlsMode::Implicit
    }

    fn step_of_failure(&self, failure: &Failure) -> Name {
        match (failure.phase, &failure.fault) {
            (Phase::Resolve, Fault::HostNotPublic | Fault::PortNotAllowed) => Name::Address,
            (phase, _) => self.step_of(phase, self.seen.tls.is_some()),
        }
    }

    fn step_of(&self, phase: Phase, behind_tls: bool) -> Name {
        match phase {
            Phase::Resolve => Name::Resolve,
            Phase::Connect => Name::Connect,
            Phase::Greeting => Name::Greeting,
            Phase::Ehlo if behind_tls && !self.is_implicit() => Name::Tls,
            Phase::Ehlo => Name::Greeting,
            Phase::Starttls | Phase::Tls => Name::Tls,
            _ => Name::Authenticate,
        }
    }

    fn took(&self, step: Name) -> Duration {
        let mut behind_tls = false;
        let mut sum = Duration::ZERO;
        for (phase, took) in &self.seen.laps {
            if self.step_of(*phase, behind_tls) == step {
                sum += *took;
            }
            behind_tls |= *phase == Phase::Tls;
        }
        sum
    }

    fn failed_detail(&self, step: Name, reason: &str) -> String {
        match &self.seen.tls {
            Some(tls) if step == Name::Greeting => format!("{} Before it: {}", ended(reason), tls_words(tls)),
            _ => ended(reason),
        }
    }

    fn detail(&self, step: Name) -> String {
        let SmtpAccount { host, port, .. } = self.account;
        let several = self.seen.approved > 1;
        match step {
            // Where the rules refuse, nothing is told of a look-up: there may have been none.
            Name::Resolve if self.seen.approved == 0 => {
                "The host is written as a name or an address has to be.".into()
            }
            Name::Resolve if self.is_literal() => {
                format!("{host} is an address: there is nothing to look up.")
            }
            Name::Resolve if several => format!("{host} has {} addresses.", self.seen.approved),
            Name::Resolve => format!("{host} has one address."),
            Name::Address if several => "Every one of them may be dialled, and so may the port.".into(),
            Name::Address => "It may be dialled, and so may the port.".into(),
            Name::Connect => match self.seen.address {
                Some(address) => {
                    let family = if address.is_ipv6() { "IPv6" } else { "IPv4" };
                    format!("Connected to {}, port {port}, over {family}.", address.ip())
                }
                None => format!("Connected to port {port}."),
            },
            Name::Greeting => match &self.seen.greeting {
                Some(greeting) => format!("The server greets with: {greeting}"),
                None => String::new(),
            },
            Name::Tls => format!("{} {}", self.tls_detail(), self.mechanisms()),
            Name::Authenticate => match self.seen.mechanism {
                Some(mechanism) => {
                    format!("The server accepted the user name and the password (AUTH {mechanism}).")
                }
                None => "No user name and password are to be given.".into(),
            },
        }
    }

    fn is_literal(&self) -> bool {
        self.account.host.trim_matches(['[', ']']).parse::<std::net::IpAddr>().is_ok()
    }

    fn tls_detail(&self) -> String {
        match (&self.seen.tls, self.is_implicit()) {
            (Some(tls), true) => format!("Encrypted from the first byte: {}", tls_words(tls)),
            (Some(tls), false) => format!("Encrypted by STARTTLS: {}", tls_words(tls)),
            (None, _) => {
                "Not encrypted: the server offers no TLS, and neither these settings nor the operator ask \
                          for it."
                    .into()
            }
        }
    }

    fn mechanisms(&self) -> String {
        match self.seen.mechanisms.as_deref() {
            None | Some([]) => "The server offers no authentication.".into(),
            Some(names) => format!("The server offers AUTH {}.", names.join(" ")),
        }
    }
}

fn tls_words(tls: &TlsFacts) -> String {
    format!(
        "{}, with a certificate from {} that is valid until {}.",
        tls.version,
        tls.issuer,
        tls.expires_at.date()
    )
}

fn expiry_warning(tls: &TlsFacts, now: OffsetDateTime) -> Option<String> {
    let left = tls.expires_at - now;
    if left > time::Duration::days(EXPIRY_WARNING_DAYS) {
        return None;
    }
    let on = tls.expires_at.date();
    Some(match left.whole_days() {
        0 => format!("Certificate: the server's certificate expires on {on}, within a day."),
        1 => format!("Certificate: the server's certificate expires on {on}, in 1 day."),
        days => format!("Certificate: the server's certificate expires on {on}, in {days} days."),
    })
}

/// A sentence with its end; a server's own words may have one already.
fn ended(sentence: &str) -> String {
    if sentence.ends_with(['.', '?', '!']) { sentence.to_owned() } else { format!("{sentence}.") }
}

fn millis(took: Duration) -> u64 {
    u64::try_from(took.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::address::Mailbox;
    use crate::model::failure::Reply;
    use time::macros::datetime;

    const NOW: OffsetDateTime = datetime!(2026-11-23 02:00 UTC);

    fn account(port: u16, tls: TlsMode) -> SmtpAccount {
        let from = Mailbox::parse("a@example.org").unwrap();
        SmtpAccount { host: "mail.example.org".into(), port, tls, credentials: None, from }
    }

    fn tls() -> TlsFacts {
        let expires_at = datetime!(2026-12-01 00:00 UTC);
        TlsFacts { version: "TLS 1.3", issuer: "CN=Example CA".into(), expires_at }
    }

    /// As far as this phase, which took as many milliseconds as its place in the list.
    fn seen(phases: &[Phase], fault: Option<Fault>) -> Examination {
        let passed = |phase| phases.iter().rev().skip(usize::from(fault.is_some())).any(|p| *p == phase);
        let last = *phases.last().unwrap();
        Examination {
            laps: phases.iter().copied().zip((1..).map(Duration::from_millis)).collect(),
            approved: usize::from(passed(Phase::Resolve)),
            address: passed(Phase::Connect).then(|| "93.184.215.14:587".parse().unwrap()),
            greeting: passed(Phase::Greeting).then(|| Reply::new(220, ["mail.example.org ESMTP"])),
            mechanisms: passed(Phase::Ehlo).then(|| vec!["PLAIN".into(), "LOGIN".into()]),
            tls: passed(Phase::Tls).then(tls),
            mechanism: passed(Phase::Auth).then_some("PLAIN"),
            failure: fault.map(|fault| Failure::new(last, fault)),
            overdue: false,
        }
    }

    fn report(phases: &[Phase], fault: Option<Fault>, account: &SmtpAccount) -> TestReport {
        TestReport::new(&seen(phases, fault), account, "587", NOW)
    }

    fn shape(report: &TestReport) -> Vec<(Name, bool, u64)> {
        report.steps.iter().map(|step| (step.step, step.ok, step.ms)).collect()
    }

    const STARTTLS: [Phase; 8] = [
        Phase::Resolve,
        Phase::Connect,
        Phase::Greeting,
        Phase::Ehlo,
        Phase::Starttls,
        Phase::Tls,
        Phase::Ehlo,
        Phase::Auth,
    ];
    const IMPLICIT: [Phase; 6] =
        [Phase::Resolve, Phase::Connect, Phase::Tls, Phase::Greeting, Phase::Ehlo, Phase::Auth];

    #[test]
    fn every_phase_counts_towards_its_step() {
        let starttls = report(&STARTTLS, None, &account(587, TlsMode::Required));
        assert!(starttls.ok);
        let passed =
            |ms: [u64; 6]| NAMES.iter().zip(ms).map(|(name, ms)| (*name, true, ms)).collect::<Vec<_>>();
        assert_eq!(shape(&starttls), passed([1, 0, 2, 3 + 4, 5 + 6 + 7, 8]));
        let implicit = report(&IMPLICIT, None, &account(465, TlsMode::Implicit));
        assert_eq!(shape(&implicit), passed([1, 0, 2, 4 + 5, 3, 6]));
        let details: Vec<&str> = starttls.steps.iter().map(|step| step.detail.as_str()).collect();
        assert_eq!(details[2], "Connected to 93.184.215.14, port 587, over IPv4.");
        assert_eq!(details[3], "The server greets with: 220 mail.example.org ESMTP");
        assert!(details[4].contains("TLS 1.3, with a certificate from CN=Example CA"), "{}", details[4]);
        assert!(details[4].contains("AUTH PLAIN LOGIN"), "{}", details[4]);
    }

    #[test]
    fn the_address_that_was_chosen_is_told_with_its_family() {
        let mut seen = seen(&STARTTLS, None);
        seen.address = Some("[2600:1f18::25]:587".parse().unwrap());
        let report = TestReport::new(&seen, &account(587, TlsMode::Required), "587", NOW);
        assert_eq!(report.steps[2].detail, "Connected to 2600:1f18::25, port 587, over IPv6.");
    }

    #[test]
    fn the_last_step_is_the_one_that_failed() {
        let lost = || Some(Fault::Lost);
        let (starttls, implicit) = (account(587, TlsMode::Required), account(465, TlsMode::Implicit));
        let reached = |phases: &[Phase], account: &SmtpAccount, fault: Option<Fault>| {
            let report = report(phases, fault, account);
            let (last, before) = report.steps.split_last().unwrap();
            assert!(!report.ok && !last.ok && before.iter().all(|step| step.ok), "{report:?}");
            assert_eq!(last.detail.trim_end_matches('.'), report.error.as_ref().unwrap().message);
            report.steps.iter().map(|step| step.step).collect::<Vec<_>>()
        };
        for (upto, steps) in [(1, 1), (2, 3), (3, 4), (4, 4), (5, 5), (6, 5), (7, 5), (8, 6)] {
            assert_eq!(reached(&STARTTLS[..upto], &starttls, lost()), NAMES[..steps], "{upto}");
        }
        let without_greeting = [Name::Resolve, Name::Address, Name::Connect, Name::Tls];
        assert_eq!(reached(&IMPLICIT[..3], &implicit, lost()), without_greeting);
        for refusal in [Fault::HostNotPublic, Fault::PortNotAllowed] {
            assert_eq!(reached(&[Phase::Resolve], &starttls, Some(refusal)), NAMES[..2]);
        }
    }

    #[test]
    fn a_detail_ends_once() {
        for (text, end) in
            [("no", "535 no."), ("Go away.", "535 Go away."), ("Who are you?", "535 Who are you?")]
        {
            let fault = Fault::Reply(Reply::new(535, [text]));
            let report = report(&STARTTLS, Some(fault), &account(587, TlsMode::Required));
            assert!(report.steps.last().unwrap().detail.ends_with(end), "{report:?}");
        }
    }

    #[test]
    fn a_greeting_that_fails_under_tls_tells_of_the_tls_before_it() {
        for upto in [4, 5] {
            let report = report(&IMPLICIT[..upto], Some(Fault::Timeout), &account(465, TlsMode::Implicit));
            let last = report.steps.last().unwrap();
            assert_eq!((last.step, report.steps.len()), (Name::Greeting, 4));
            assert!(last.detail.contains("TLS 1.3"), "{}", last.detail);
        }
    }

    #[test]
    fn a_certificate_that_ends_within_a_fortnight_is_warned_of() {
        let warning = |expires_at| expiry_warning(&TlsFacts { expires_at, ..tls() }, NOW);
        assert_eq!(warning(datetime!(2026-12-07 02:01 UTC)), None);
        assert!(warning(datetime!(2026-12-07 02:00 UTC)).unwrap().contains("2026-12-07, in 14 days"));
        assert!(warning(datetime!(2026-11-24 01:00 UTC)).unwrap().contains("within a day"));
        let report = report(&STARTTLS, Some(Fault::Lost), &account(587, TlsMode::Required));
        assert_eq!(report.warnings.len(), 1, "a refused login does not make the certificate newer");
    }
}
