//! TLS to the organization's server: its modes, its certificates, and what an attacker on the way can do.
//! Guarantee: where TLS fails or is taken away, neither a credential nor a message leaves.

use std::net::SocketAddr;

use sendoff::model::ledger::State;
use serde_json::{Value, json};

use crate::support::certs::ServerCertificate;
use crate::support::smtp_server::{Action, Behaviour, Rule, SmtpServer, Stage, Tls};
use crate::support::story::Letters;
use crate::support::world::{PASSWORD, USERNAME, World, job, own_address};

/// A port that means TLS from the first byte, and needs no privilege to listen at.
const IMPLICIT_TLS_PORT: u16 = 2465;

/// A server with STARTTLS that presents the certificate.
async fn starttls_server(certificate: &ServerCertificate) -> SmtpServer {
    let config = certificate.server_config();
    SmtpServer::start(|behaviour| demands_login(behaviour, Tls::Starttls(config))).await
}

fn demands_login(behaviour: &mut Behaviour, tls: Tls) {
    behaviour.tls = tls;
    behaviour.login = Some((USERNAME.into(), PASSWORD.into()));
}

/// Adds a server's own certificate to what the worker trusts.
fn trust(world: &mut World, certificates: &[&ServerCertificate]) {
    let mut pem = world.authority.pem().to_owned();
    certificates.iter().for_each(|certificate| pem.push_str(certificate.pem()));
    let file = world.file("trusted.pem", pem.as_bytes());
    world.set("SENDOFF__SMTP__EXTRA_CA_FILES", file.to_str().expect("a path in UTF-8"));
}

async fn story_through(world: &World, organization: &str, fields: Value) -> String {
    world.organization_at(organization, fields).await;
    let id = world.publish(&job(Some(organization))).await;
    world.story(id).await
}

/// That a server took nothing and saw no credentials.
fn assert_untouched(server: &SmtpServer, what: &str) {
    server.seen(|seen| {
        assert_eq!((seen.message_count, seen.auth_attempts), (0, 0), "{what}");
        for session in &seen.sessions {
            assert!(session.auth_payloads.is_empty(), "{what}");
            assert!(!session.commands.iter().any(|command| command.starts_with("MAIL")), "{what}");
        }
    });
}

#[tokio::test]
async fn starttls_and_implicit_tls_under_an_extra_authority_carry_the_message() {
    let world = World::new().await;
    let worker = world.worker().await;
    assert_eq!(story_through(&world, "starttls", json!({})).await, "sent");
    let session = &world.server.sessions()[0];
    assert_eq!(session.sni.as_deref(), Some("localhost"));
    let verbs: Vec<_> = session.commands.iter().filter_map(|command| command.split(' ').next()).collect();
    assert_eq!(verbs[..4], ["EHLO", "STARTTLS", "EHLO", "AUTH"]);

    // Implicit TLS goes by the port, whatever `secure` says; an address is matched by its IP SAN.
    for (organization, secure, last) in [("implicit", true, 1), ("implicit-anyway", false, 2)] {
        let ip = own_address(last);
        let config = world.authority.issue(&[&ip.to_string()]).server_config();
        let address = SocketAddr::from((ip, IMPLICIT_TLS_PORT));
        let server =
            SmtpServer::start_at(address, |behaviour| demands_login(behaviour, Tls::Implicit(config))).await;
        let fields = json!({"host": ip.to_string(), "port": IMPLICIT_TLS_PORT, "secure": secure});
        assert_eq!(story_through(&world, organization, fields).await, "sent");
        let message = &server.messages()[0];
        assert_eq!((message.tls.as_deref(), message.username.as_deref()), (Some("TLSv1_3"), Some(USERNAME)));
        assert_eq!(server.seen(|seen| seen.count("STARTTLS")), 0);
    }
    worker.stop().await;
    world.end().await;
}

#[tokio::test]
async fn a_self_signed_certificate_as_openssl_makes_it_is_trusted_once_it_is_among_the_extra_authorities() {
    let mut world = World::new().await;
    let given = [
        ("common-name", ServerCertificate::self_signed("localhost", &[])),
        ("alternative-name", ServerCertificate::self_signed("a mail server", &["localhost"])),
    ];
    let others = [
        ("unknown", ServerCertificate::self_signed("localhost", &["localhost"])),
        ("other-name", ServerCertificate::self_signed("mail.elsewhere.example", &[])),
        ("run-out", ServerCertificate::self_signed_expired("localhost", &["localhost"])),
    ];
    trust(&mut world, &[&given[0].1, &given[1].1, &others[1].1, &others[2].1]);
    let worker = world.worker().await;
    for (organization, certificate) in &given {
        let server = starttls_server(certificate).await;
        let story = story_through(&world, organization, json!({"port": server.port()})).await;
        assert_eq!(story, "sent", "{organization}");
        assert!(server.messages()[0].tls.is_some());
    }
    for (organization, certificate) in &others {
        let server = starttls_server(certificate).await;
        let story = story_through(&world, organization, json!({"port": server.port()})).await;
        assert_eq!(story, "parked tls_failed", "{organization}");
        assert_untouched(&server, organization);
    }
    worker.stop().await;
    world.end().await;
}

#[tokio::test]
async fn a_certificate_for_another_name_or_another_time_fails_and_plaintext_is_never_the_way_out() {
    let world = World::new().await;
    let worker = world.worker().await;
    let certificates = [
        ("other-name", world.authority.issue(&["mail.elsewhere.example"])),
        ("expired", world.authority.issue_expired(&["localhost"])),
        ("too-early", world.authority.issue_for_later(&["localhost"])),
    ];
    let mut letters = Letters::default();
    for (name, certificate) in &certificates {
        for secure in [true, false] {
            let server = starttls_server(certificate).await;
            server.change(|behaviour| behaviour.auth_in_clear = true);
            let organization = format!("{name}-{secure}");
            let fields = json!({"port": server.port(), "secure": secure});
            world.organization_at(&organization, fields).await;
            let id = world.publish(&job(Some(&organization))).await;
            assert_eq!(world.story(id).await, "parked tls_failed", "{organization}");
            assert_untouched(&server, &organization);
            let detail = letters.of(&world, id).await.text("sendoff-detail").unwrap_or_default();
            assert!(detail.contains("certificate"), "{organization}: {detail}");
        }
    }
    worker.stop().await;
    world.end().await;
}

#[tokio::test]
async fn a_server_that_offers_no_tls_gets_no_credentials_whatever_the_mode() {
    let world = World::new().await;
    let worker = world.worker().await;
    for (organization, secure) in [("required", true), ("opportunistic", false)] {
        let stripped = SmtpServer::start(|behaviour| {
            demands_login(behaviour, Tls::None);
            behaviour.auth_in_clear = true;
        })
        .await;
        let fields = json!({"port": stripped.port(), "secure": secure});
        let story = story_through(&world, organization, fields).await;
        assert_eq!(story, "parked tls_required", "{organization}");
        assert_eq!(stripped.connections(), 1);
        assert_untouched(&stripped, organization);
    }
    // Opportunistic does not mean optional: what is offered is used.
    let fields = json!({"secure": false});
    assert_eq!(story_through(&world, "offered", fields).await, "sent");
    assert!(world.server.messages()[0].tls.is_some());
    worker.stop().await;
    world.end().await;
}

#[tokio::test]
async fn credentials_travel_in_the_clear_only_where_the_operator_allows_it() {
    let mut world = World::new().await;
    world.set("SENDOFF__EGRESS__ALLOW_PLAINTEXT_AUTH", "true");
    let worker = world.worker().await;
    let plain = || async {
        SmtpServer::start(|behaviour| {
            demands_login(behaviour, Tls::None);
            behaviour.auth_in_clear = true;
        })
        .await
    };
    let (opportunistic, required) = (plain().await, plain().await);
    let fields = json!({"port": opportunistic.port(), "secure": false});
    assert_eq!(story_through(&world, "opportunistic", fields).await, "sent");
    assert_eq!(opportunistic.messages()[0].tls, None);
    let fields = json!({"port": required.port(), "secure": true});
    assert_eq!(story_through(&world, "required", fields).await, "parked tls_required");
    assert_untouched(&required, "required");
    worker.stop().await;
    world.end().await;
}

#[tokio::test]
async fn replies_injected_behind_the_answer_to_starttls_are_not_taken() {
    let world = World::new().await;
    let worker = world.worker().await;
    let injected: [(&str, &[u8]); 3] = [
        ("ehlo-reply", b"250-mail.test\r\n250 AUTH PLAIN\r\n"),
        ("whole-dialogue", b"250 mail.test\r\n235 welcome\r\n250 ok\r\n250 ok\r\n354 go\r\n250 taken\r\n"),
        ("half-a-line", b"250-mail"),
    ];
    for (organization, bytes) in injected {
        let action = Action::Inject(bytes.to_vec());
        let server = world.with_rules(organization, [Rule::new(Stage::Starttls, action)]).await;
        let id = world.publish(&job(Some(organization))).await;
        assert_eq!(world.story(id).await, "parked tls_failed", "{organization}");
        assert_untouched(&server, organization);
        world.state(Some(organization), id, State::Parked).await;
        let (_, _, detail) = world.dead_letter().await;
        assert!(detail.contains("injection"), "{detail}");
    }
    worker.stop().await;
    world.end().await;
}
