//! Connection tests and test emails by command, against scripted servers.
//! Guarantee: each test has a database, a name server and SMTP servers of its own; loopback only is dialled.

mod email;
mod limits;
mod steps;
mod stored;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use sendoff::clock::Clock;
use sendoff::control::{CommandMeta, Control, ControlRules};
use sendoff::egress::{AllowedPorts, Egress, EgressPolicy};
use sendoff::secrets::KeyRing;
use sendoff::store::SmtpConfigs;
use serde_json::{Value, json};
use time::OffsetDateTime;
use time::macros::datetime;

use crate::support::broker::eventually;
use crate::support::certs::{Authority, ServerCertificate, pem_file};
use crate::support::connector::connector_trusting;
use crate::support::database::TestDatabase;
use crate::support::dns::{Answer, DnsServer};
use crate::support::smtp_server::{Behaviour, SmtpServer, Tls};
use crate::support::world::{PASSWORD, USERNAME};

const NOW: OffsetDateTime = datetime!(2026-11-23 02:30 UTC);
/// The name under which the name server knows 127.0.0.1.
const HOST: &str = "mail.acme.example";
const STEPS: [&str; 6] = ["resolve", "address", "connect", "greeting", "tls", "authenticate"];

/// What the commands need, and an organization `acme` with the flag on.
struct House {
    database: TestDatabase,
    dns: DnsServer,
    authority: Authority,
    ca_file: tempfile::NamedTempFile,
    control: Control,
}

impl House {
    async fn new() -> Self {
        Self::with(ControlRules { tests_per_minute: 1000, ..ControlRules::default() }, NOW).await
    }

    async fn with(rules: ControlRules, now: OffsetDateTime) -> Self {
        let authority = Authority::new("Sendoff test authority");
        let ca_file = pem_file(authority.pem());
        let (database, dns) = tokio::join!(TestDatabase::migrated(), DnsServer::start());
        dns.script(HOST, Answer::addresses(&["127.0.0.1"]), 60);
        let control = control(&database, &dns, &[ca_file.path().to_owned()], rules, AllowedPorts::Any, now);
        let house = Self { database, dns, authority, ca_file, control };
        house.enable("acme").await;
        house
    }

    /// Another worker's commands over the same database.
    fn another(&self, rules: ControlRules, ports: AllowedPorts) -> Control {
        control(&self.database, &self.dns, &[self.ca_file.path().to_owned()], rules, ports, NOW)
    }

    /// Those of a worker whose clock says this.
    fn at(&self, now: OffsetDateTime) -> Control {
        let rules = ControlRules { tests_per_minute: 1000, ..ControlRules::default() };
        control(&self.database, &self.dns, &[self.ca_file.path().to_owned()], rules, AllowedPorts::Any, now)
    }

    async fn enable(&self, organization: &str) {
        let params = json!({"feature": "custom-smtp-for-orgs", "enabled": true});
        self.result("feature.set", organization, params).await;
    }

    async fn ask(&self, command: &str, organization: &str, params: Value) -> Value {
        ask(&self.control, command, organization, params).await
    }

    /// The same; it is asked again where a busy database did not answer in time, which says that nothing was changed.
    async fn answer(&self, command: &str, organization: &str, params: Value) -> Value {
        let mut reply = Value::Null;
        eventually(&format!("{command} is answered in time"), async || {
            reply = self.ask(command, organization, params.clone()).await;
            reply["error"]["code"] != "unavailable"
        })
        .await;
        reply
    }

    async fn result(&self, command: &str, organization: &str, params: Value) -> Value {
        let reply = self.answer(command, organization, params).await;
        assert_eq!(reply["ok"], true, "{command}: {reply}");
        reply["result"].clone()
    }

    /// The error's code and field.
    async fn refusal(&self, command: &str, organization: &str, params: Value) -> (String, String) {
        let reply = self.answer(command, organization, params).await;
        assert_eq!(reply["ok"], false, "{command}: {reply}");
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        (text(&reply["error"]["code"]), text(&reply["error"]["field"]))
    }

    /// The report of a test.
    async fn test(&self, params: Value) -> Value {
        self.result("smtp_config.test", "acme", params).await
    }

    /// A server with STARTTLS and the login, changed as given.
    async fn server(&self, configure: impl FnOnce(&mut Behaviour)) -> SmtpServer {
        server_with(&self.authority.issue(&[HOST]), configure).await
    }

    /// Stores the configuration of `acme` with this server.
    async fn store(&self, server: &SmtpServer) {
        self.result("smtp_config.create", "acme", settings(server.port())).await;
    }

    async fn config(&self) -> Value {
        self.result("smtp_config.get", "acme", json!({})).await
    }
}

fn control(
    database: &TestDatabase,
    dns: &DnsServer,
    authorities: &[PathBuf],
    rules: ControlRules,
    ports: AllowedPorts,
    now: OffsetDateTime,
) -> Control {
    let keys = Arc::new(KeyRing::parse(&[crate::support::world::KEYS.into()]).expect("a key"));
    let configs = SmtpConfigs::new(database.store(), keys);
    // 127.0.0.2 is not exempt; the addresses of a process's own are.
    let exempt = ["127.0.0.1/32", "127.128.0.0/9"].map(|network| network.parse().expect("a network"));
    let policy = EgressPolicy::new(exempt.to_vec(), Vec::new(), ports);
    let egress = Arc::new(Egress::new(policy, &[dns.address()]).expect("a name server"));
    let smtp = connector_trusting(egress, authorities);
    Control::new(database.store(), configs, smtp, Clock::manual(now), rules)
}

async fn ask(control: &Control, command: &str, organization: &str, params: Value) -> Value {
    ask_late(control, Duration::ZERO, command, organization, params).await
}

/// The same by a command that has waited in the worker.
async fn ask_late(
    control: &Control,
    waited: Duration,
    command: &str,
    organization: &str,
    params: Value,
) -> Value {
    let command =
        json!({"command": command, "organization_id": organization, "actor": "user:7", "params": params});
    let meta = CommandMeta { waited, ..CommandMeta::default() };
    let response = control.handle(command.to_string().as_bytes(), meta).await;
    let reply = String::from_utf8(response.to_json()).expect("UTF-8");
    for secret in [USERNAME, PASSWORD] {
        assert!(!reply.contains(secret), "{reply}");
        assert!(!format!("{response:?}").contains(secret));
    }
    serde_json::from_str(&reply).expect("JSON")
}

async fn server_with(certificate: &ServerCertificate, configure: impl FnOnce(&mut Behaviour)) -> SmtpServer {
    let config = certificate.server_config();
    SmtpServer::start(|behaviour| {
        behaviour.tls = Tls::Starttls(config);
        behaviour.login = Some((USERNAME.into(), PASSWORD.into()));
        configure(behaviour);
    })
    .await
}

/// All of create's fields.
fn settings(port: u16) -> Value {
    json!({"from_email": "hello@acme.example", "from_name": "Team Acme", "host": HOST, "port": port,
        "username": USERNAME, "password": PASSWORD, "secure": true})
}

/// The same, some of them replaced.
fn settings_with(port: u16, changes: Value) -> Value {
    let mut params = settings(port);
    for (name, value) in changes.as_object().expect("an object") {
        params[name] = value.clone();
    }
    params
}

/// The steps of a report, checked for their form: all but perhaps the last one went well.
fn steps(report: &Value) -> Vec<String> {
    let steps = report["steps"].as_array().expect("steps");
    for (position, step) in steps.iter().enumerate() {
        let is_last = position + 1 == steps.len();
        assert_eq!(step["ok"], report["ok"] == true || !is_last, "{report}");
        assert!(
            step["ms"].is_u64() && step["detail"].as_str().is_some_and(|text| !text.is_empty()),
            "{report}"
        );
    }
    steps.iter().map(|step| step["step"].as_str().expect("a name").to_owned()).collect()
}

/// The detail of a step.
fn detail(report: &Value, step: &str) -> String {
    let steps = report["steps"].as_array().expect("steps");
    let found = steps.iter().find(|found| found["step"] == step);
    found.unwrap_or_else(|| panic!("{step}: {report}"))["detail"].as_str().expect("text").to_owned()
}

/// That a server was not asked to take a message.
fn assert_nothing_sent(server: &SmtpServer) {
    server.seen(|seen| {
        for verb in ["MAIL", "RCPT", "DATA", "RSET", "VRFY"] {
            assert_eq!(seen.count(verb), 0, "{verb}");
        }
        assert_eq!(seen.message_count, 0);
    });
}
