//! Trouble during the login that is nobody's fault, and refusals that are: the words of well-known servers, on the wire.
//! Guarantee: a password is offered once after a refusal, and what passes by itself leaves the configuration alone.

use std::sync::Arc;

use sendoff::egress::{AllowedPorts, Egress, EgressPolicy};
use sendoff::model::address::{EmailAddress, Mailbox};
use sendoff::model::advice::{self, ServerFacts};
use sendoff::model::failure::{Failure, Phase, Reason, TransactionOutcome};
use sendoff::model::organization::OrganizationId;
use sendoff::model::policy::{self, Verdict};
use sendoff::model::smtp_settings::{Credentials, Destination, SmtpAccount, TlsMode};
use sendoff::smtp::{Deadlines, Envelope, Session, SmtpConnector, SmtpOptions, TlsRoots};
use serde_json::json;

use crate::support::certs::{Authority, pem_file};
use crate::support::providers::{self, Provider};
use crate::support::smtp_server::{Action, Behaviour, Rule, SmtpServer, Stage, Tls};
use crate::support::world::{PASSWORD, SOON, USERNAME, World, job};

/// A world's organization whose server has trouble at its first login: what becomes of its job, and of itself.
async fn check_it_passes(world: &World, organization: &str, action: Action, story: &str) {
    assert_eq!(story_of_trouble(world, organization, action).await, story, "{organization}");
}

/// The job's story, whose organization was left alone.
async fn story_of_trouble(world: &World, organization: &str, action: Action) -> String {
    let server = world.with_rules(organization, [Rule::new(Stage::Auth, action).once()]).await;
    let id = world.publish(&job(Some(organization))).await;
    let story = world.story(id).await;
    assert!(story.ends_with("sent"), "{organization}: {story}");
    assert_eq!(server.messages().len(), 1, "{organization}");
    let stored = world.commanded("smtp_config.get", organization, json!({})).await;
    assert_eq!(stored["status"], "ok", "{organization}: {stored}");
    let of_organization = |event: &&serde_json::Value| event["organization_id"] == organization;
    let events = world.events.all();
    let failing =
        events.iter().filter(of_organization).filter(|event| event["type"] == "smtp_config.failing");
    assert_eq!(failing.count(), 0, "{organization}");
    story
}

#[tokio::test]
async fn a_temporary_reply_to_the_login_is_retried_and_leaves_the_configuration_alone() {
    let world = World::new().await;
    let worker = world.worker().await;
    for (organization, reply, story) in [
        ("a454", providers::POSTFIX_AUTH_AWAY, "deferred throttled, sent"),
        ("a432", "432 4.7.12 A password transition is needed", "deferred throttled, sent"),
        ("a435", "435 Unable to authenticate at present", "deferred server_error, sent"),
        ("a450", "450 4.3.0 try later", "deferred server_error, sent"),
        ("a451", "451 4.3.0 no connection to the user database", "deferred server_error, sent"),
    ] {
        check_it_passes(&world, organization, Action::reply(reply), story).await;
    }
    let closing = Action::ReplyThenClose(b"421 4.7.0 too busy for logins".to_vec());
    check_it_passes(&world, "a421", closing, "deferred throttled, sent").await;
    check_it_passes(&world, "lost", Action::Close, "deferred connection_lost, sent").await;
    worker.stop().await;
    world.end().await;
}

#[tokio::test]
async fn a_server_that_falls_silent_at_the_login_is_asked_again_and_leaves_the_configuration_alone() {
    let mut world = World::new().await;
    world.set("SENDOFF__SMTP__COMMAND_TIMEOUT_S", "5");
    world.set("SENDOFF__RETRY__SCHEDULE_S", "1,2,2,2,2");
    let worker = world.worker().await;
    let story = story_of_trouble(&world, "silent", Action::Silence).await;
    // A machine too busy to answer in time is as good as silent.
    let failed = story.strip_suffix(", sent").unwrap_or_else(|| panic!("{story}"));
    assert!(failed.split(", ").all(|event| event == "deferred timeout"), "{story}");
    worker.stop().await;
    world.end().await;
}

#[tokio::test]
async fn a_refused_password_is_offered_once_and_a_refused_mechanism_leads_to_the_next_one() {
    let world = World::new().await;
    let worker = world.worker().await;
    for (organization, reply) in
        [("a504", "504 5.5.4 Unrecognized authentication type"), ("a574", "534 5.7.4 no")]
    {
        let rule = Rule::new(Stage::Auth, Action::reply(reply)).of("PLAIN");
        let server = world.with_rules(organization, [rule]).await;
        let id = world.publish(&job(Some(organization))).await;
        assert_eq!(world.story(id).await, "sent", "{organization}");
        let commands = server.sessions()[0].commands.clone();
        let logins: Vec<_> = commands.iter().filter(|command| command.starts_with("AUTH")).collect();
        assert_eq!(logins.len(), 2, "{organization}: {commands:?}");
    }
    let refused = providers::postfix();
    let server = world
        .with_server("refused", |behaviour| {
            refused.speaks()(behaviour);
            behaviour.login = Some((USERNAME.into(), "another".into()));
        })
        .await;
    world.publish(&job(Some("refused"))).await;
    let ended = server.wait_for(SOON, |seen| seen.sessions.first().is_some_and(|session| session.closed));
    ended.await.expect("the session ends");
    let commands = server.sessions()[0].commands.clone();
    let logins = commands.iter().filter(|command| command.starts_with("AUTH")).count();
    assert_eq!(logins, 1, "{commands:?}");
    worker.stop().await;
    world.end().await;
}

/// A server that speaks like a provider, and a connector that trusts its certificate.
struct Talk {
    server: SmtpServer,
    connector: SmtpConnector,
    host: &'static str,
}

impl Talk {
    async fn with(host: &'static str, configure: impl FnOnce(&mut Behaviour)) -> Self {
        let authority = Authority::new("Test CA");
        let certificate = authority.issue(&["127.0.0.1"]).server_config();
        let server = SmtpServer::start(|behaviour| {
            behaviour.tls = Tls::Starttls(certificate);
            behaviour.login = Some((USERNAME.into(), PASSWORD.into()));
            configure(behaviour);
        })
        .await;
        let file = pem_file(authority.pem());
        let roots = TlsRoots::load(&[file.path().to_owned()]).expect("a certificate");
        let allow = vec!["127.0.0.0/8".parse().expect("a network")];
        let policy = EgressPolicy::new(allow, Vec::new(), AllowedPorts::Any);
        let egress = Arc::new(Egress::new(policy, &[]).expect("name servers"));
        let deadlines = Deadlines { connect: SOON, command: SOON, data: SOON, final_reply: SOON };
        let options =
            SmtpOptions { deadlines, hello_name: "client.test".into(), allow_plaintext_auth: false };
        Self { server, connector: SmtpConnector::new(egress, roots, options, Arc::new(())), host }
    }

    async fn open(&self, password: &str) -> Result<Session, Failure> {
        let destination = Destination::Organization { id: OrganizationId::from_integer(42), version: 1 };
        let account = SmtpAccount {
            host: "127.0.0.1".into(),
            port: self.server.port(),
            tls: TlsMode::Required,
            credentials: Some(Credentials::new(USERNAME, password)),
            from: Mailbox::bare(address("hello@acme.example")),
        };
        self.connector.open(&destination, &account).await
    }

    /// What the failure of a login or a transaction means, and what is advised.
    fn judged(&self, failure: &Failure) -> (Verdict, String) {
        let facts = ServerFacts { host: self.host, port: 587, tls: TlsMode::Required };
        (policy::judge(failure), advice::hint(failure, facts))
    }
}

fn address(text: &str) -> EmailAddress {
    EmailAddress::parse(text).expect("an address")
}

/// Every provider, and the host under which its customers know it.
fn all_providers() -> [(&'static str, Provider); 5] {
    [
        ("smtp.gmail.com", providers::gmail()),
        ("smtp.office365.com", providers::microsoft_365()),
        ("email-smtp.eu-west-1.amazonaws.com", providers::ses()),
        ("mail.acme.example", providers::postfix()),
        ("ex01.acme.example", providers::exchange()),
    ]
}

#[tokio::test]
async fn every_providers_way_to_refuse_a_login_is_the_configurations_fault_with_that_providers_advice() {
    for (host, provider) in all_providers() {
        let talk = Talk::with(host, provider.speaks()).await;
        assert!(talk.open(PASSWORD).await.is_ok(), "{host}: the right password works");
    }
    let [gmail, microsoft, ses, postfix, exchange] = all_providers();
    for ((host, provider), reply, part) in [
        (gmail, gmail.1.wrong_login, "app password"),
        (gmail, providers::GMAIL_APP_PASSWORD, "Create an app password"),
        (gmail, providers::GMAIL_WEB_LOGIN, "in a web browser"),
        (microsoft, microsoft.1.wrong_login, "Microsoft 365 refused"),
        (microsoft, providers::MICROSOFT_BASIC_AUTH_OFF, "basic authentication is switched off"),
        (microsoft, providers::MICROSOFT_SMTP_OFF_FOR_TENANT, "whole Microsoft 365 organization"),
        (microsoft, providers::MICROSOFT_SMTP_OFF_FOR_MAILBOX, "switched off for this mailbox"),
        (ses, ses.1.wrong_login, "AWS access keys do not work here"),
        (postfix, postfix.1.wrong_login, "whole email address"),
        (exchange, exchange.1.wrong_login, "DOMAIN\\user"),
    ] {
        let talk = Talk::with(host, provider.refuses_login(reply)).await;
        let failure = talk.open(PASSWORD).await.err().expect("a refusal");
        let (verdict, hint) = talk.judged(&failure);
        assert_eq!((failure.phase, verdict), (Phase::Auth, Verdict::Account(Reason::AuthFailed)), "{reply}");
        assert!(hint.contains(part), "{reply}: {hint}");
        for secret in [USERNAME, PASSWORD.trim(), "acme.example", "BadCredentials", "08DE2A1B2C3D4E5F"] {
            assert!(!hint.contains(secret), "{reply}: {hint}");
        }
        assert_eq!(talk.server.seen(|seen| seen.auth_attempts), 1, "{reply}: offered once");
    }
}

#[tokio::test]
async fn a_refused_sender_is_the_configurations_fault_with_advice_by_the_providers_words() {
    let [_, microsoft, ses, postfix, exchange] = all_providers();
    for ((host, provider), stage, reply, reason, part) in [
        (microsoft, Stage::FinalDot, providers::MICROSOFT_SEND_AS, Reason::SenderRefused, "Send As"),
        (
            microsoft,
            Stage::Mail,
            providers::EXCHANGE_NOT_AUTHENTICATED,
            Reason::AuthFailed,
            "authenticated SMTP",
        ),
        (
            ses,
            Stage::FinalDot,
            providers::SES_UNVERIFIED,
            Reason::SenderRefused,
            "Verify the address or its domain",
        ),
        (postfix, Stage::Mail, providers::POSTFIX_NOT_OWNED, Reason::SenderRefused, "its own addresses only"),
        (exchange, Stage::FinalDot, providers::EXCHANGE_SEND_AS, Reason::SenderRefused, "Send As"),
    ] {
        let talk = Talk::with(host, provider.says(stage, reply)).await;
        let mut session = talk.open(PASSWORD).await.unwrap_or_else(|failure| panic!("{reply}: {failure}"));
        let recipients = vec![(0, address("ann@customer.example"))];
        let envelope = Envelope { from: address("hello@acme.example"), recipients, smtputf8: false };
        let sent = session.send(&envelope, b"Subject: hello\r\n\r\nhello\r\n", async { true }).await;
        let TransactionOutcome::Failed(failure) = sent.outcome else { panic!("{reply}: {sent:?}") };
        let (verdict, hint) = talk.judged(&failure);
        assert_eq!(verdict, Verdict::Account(reason), "{reply}");
        assert!(hint.contains(part) && !hint.contains("acme"), "{reply}: {hint}");
    }
}
