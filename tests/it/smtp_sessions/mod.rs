//! Sessions against a scripted server: what each misbehaviour comes to.

mod opening;
mod pooled;
mod tls;
mod transactions;

use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use sendoff::egress::{AllowedPorts, Egress, EgressPolicy};
use sendoff::model::address::{EmailAddress, Mailbox};
use sendoff::model::failure::{Failure, Fault, Phase, Transaction, TransactionOutcome};
use sendoff::model::organization::OrganizationId;
use sendoff::model::smtp_settings::{Credentials, Destination, SmtpAccount, TlsMode};
use sendoff::smtp::{Deadlines, Envelope, Observer, Session, SmtpConnector, SmtpOptions, TlsRoots};

use crate::support::smtp_server::SmtpServer;

/// For what is expected to come.
const LIMIT: Duration = Duration::from_secs(30);
/// For what is expected not to come: long enough for a busy machine to do the steps before. Cases that wait so long do it
/// side by side.
const SHORT: Duration = Duration::from_secs(4);

const PATIENT: Deadlines = Deadlines { connect: LIMIT, command: LIMIT, data: LIMIT, final_reply: LIMIT };
const IMPATIENT: Deadlines = Deadlines { connect: LIMIT, command: SHORT, data: SHORT, final_reply: SHORT };

const MESSAGE: &[u8] = b"Subject: hello\r\n\r\n.a line with a dot\r\n..two\r\nend\r\n";

/// How a test's connector differs from the usual one.
struct Client {
    deadlines: Deadlines,
    allow_plaintext_auth: bool,
    extra_ca_files: Vec<PathBuf>,
    allow_networks: &'static str,
}

impl Default for Client {
    fn default() -> Self {
        Self {
            deadlines: PATIENT,
            allow_plaintext_auth: false,
            extra_ca_files: Vec::new(),
            allow_networks: "127.0.0.0/8",
        }
    }
}

impl Client {
    fn connector(&self) -> SmtpConnector {
        let allow = vec![self.allow_networks.parse().expect("a network")];
        let policy = EgressPolicy::new(allow, Vec::new(), AllowedPorts::Any);
        let egress = Arc::new(Egress::new(policy, &[]).expect("name servers"));
        let roots = TlsRoots::load(&self.extra_ca_files).expect("usable files");
        let options = SmtpOptions {
            deadlines: self.deadlines,
            hello_name: "client.test".to_owned(),
            allow_plaintext_auth: self.allow_plaintext_auth,
        };
        SmtpConnector::new(egress, roots, options, Arc::new(()))
    }

    async fn open(&self, account: &SmtpAccount) -> Result<Session, Failure> {
        self.connector().open(&organization(), account).await
    }
}

/// An observer that remembers.
#[derive(Default)]
struct Heard {
    phases: Mutex<Vec<Phase>>,
    refused: Mutex<Vec<&'static str>>,
}

impl Observer for Heard {
    fn phase(&self, phase: Phase, _: Duration) {
        self.phases.lock().expect("no panic holds it").push(phase);
    }

    fn egress_refused(&self, rule: &'static str) {
        self.refused.lock().expect("no panic holds it").push(rule);
    }
}

fn organization() -> Destination {
    Destination::Organization { id: OrganizationId::from_integer(42), version: 1 }
}

/// An account without credentials that takes STARTTLS when it is offered.
fn account(server: &SmtpServer) -> SmtpAccount {
    SmtpAccount {
        host: server.address().ip().to_string(),
        port: server.port(),
        tls: TlsMode::Opportunistic,
        credentials: None,
        from: Mailbox::bare(address("sender@example.org")),
    }
}

fn with_login(account: SmtpAccount) -> SmtpAccount {
    SmtpAccount { credentials: Some(Credentials::new("user", "pässword")), ..account }
}

fn address(text: &str) -> EmailAddress {
    EmailAddress::parse(text).expect("an address")
}

/// An envelope to `r0@example.net`, `r1@example.net` and so on.
fn envelope(recipients: u16) -> Envelope {
    let recipients =
        (0..recipients).map(|index| (index, address(&format!("r{index}@example.net")))).collect();
    Envelope { from: address("sender@example.org"), recipients, smtputf8: false }
}

async fn send(session: &mut Session, recipients: u16) -> Transaction {
    session.send(&envelope(recipients), MESSAGE, async { true }).await
}

/// A case whose server is silent at one phase. A busy machine may be as good as silent before it: then once more.
async fn timed_out_at(phase: Phase, mut case: impl AsyncFnMut() -> Failure) {
    let mut failure = case().await;
    for _ in 0..4 {
        if failure.fault != Fault::Timeout || failure.phase >= phase {
            break;
        }
        failure = case().await;
    }
    assert_eq!((failure.phase, failure.fault), (phase, Fault::Timeout));
}

#[track_caller]
fn failure(transaction: Transaction) -> Failure {
    match transaction.outcome {
        TransactionOutcome::Failed(failure) => failure,
        other => panic!("not a failure: {other:?}"),
    }
}

#[track_caller]
fn assert_accepted(transaction: &Transaction) {
    assert!(matches!(transaction.outcome, TransactionOutcome::Accepted(_)), "{transaction:?}");
}
