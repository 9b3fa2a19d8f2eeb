//! TLS: what is trusted, what is not and with which words, and that nothing falls back to plaintext.

use sendoff::model::advice::{self, ServerFacts};
use sendoff::model::failure::{Fault, TlsFault};

use super::*;
use crate::support::certs::{Authority, ServerCertificate, pem_file};
use crate::support::smtp_server::{Action, Rule, SmtpServer, Stage, Tls};

async fn starttls_server(certificate: &ServerCertificate) -> SmtpServer {
    SmtpServer::start(|b| {
        b.tls = Tls::Starttls(certificate.server_config());
        b.login = Some(("user".into(), "pässword".into()));
    })
    .await
}

fn required(server: &SmtpServer) -> SmtpAccount {
    SmtpAccount { tls: TlsMode::Required, ..with_login(account(server)) }
}

/// Opens a session with a server that has this certificate, trusting what is in the PEM text.
async fn open_trusting(certificate: &ServerCertificate, host: &str, pem: &str) -> Result<Session, Failure> {
    let server = starttls_server(certificate).await;
    let file = pem_file(pem);
    let client = Client { extra_ca_files: vec![file.path().to_owned()], ..Client::default() };
    let opened = client.open(&SmtpAccount { host: host.to_owned(), ..required(&server) }).await;
    if opened.is_err() {
        assert_eq!(
            server.seen(|seen| seen.auth_attempts),
            0,
            "credentials went to a server that is not trusted"
        );
    }
    opened
}

#[track_caller]
fn tls_fault(opened: Result<Session, Failure>) -> (TlsFault, String) {
    match opened.err() {
        Some(Failure { phase: Phase::Tls, fault: Fault::Tls { kind, detail }, .. }) => (kind, detail),
        Some(other) => panic!("another failure: {other}"),
        None => panic!("the certificate was accepted"),
    }
}

#[tokio::test]
async fn a_message_goes_over_starttls_when_the_authority_is_listed() {
    let authority = Authority::new("Test CA");
    let server = starttls_server(&authority.issue(&["127.0.0.1"])).await;
    let file = pem_file(authority.pem());
    let client = Client { extra_ca_files: vec![file.path().to_owned()], ..Client::default() };
    for tls in [TlsMode::Required, TlsMode::Opportunistic] {
        let account = SmtpAccount { tls, ..required(&server) };
        let mut session = client.open(&account).await.expect("a session");
        assert_accepted(&send(&mut session, 1).await);
        let facts = session.facts().tls.clone().expect("TLS");
        assert_eq!((facts.version, facts.issuer.as_str()), ("TLS 1.3", "CN=Test CA"));
        assert_eq!(facts.expires_at.year(), 4096);
    }
    let seen = server.messages();
    assert!(seen.iter().all(|message| message.tls.as_deref() == Some("TLSv1_3")));
    assert!(seen.iter().all(|message| message.username.as_deref() == Some("user")));
}

#[tokio::test]
async fn a_message_goes_over_implicit_tls_to_a_host_name() {
    let authority = Authority::new("Test CA");
    let certificate = authority.issue(&["localhost"]);
    let server = SmtpServer::start(|b| b.tls = Tls::Implicit(certificate.server_config())).await;
    let file = pem_file(authority.pem());
    let client = Client { extra_ca_files: vec![file.path().to_owned()], ..Client::default() };
    let account =
        SmtpAccount { host: "localhost".into(), tls: TlsMode::Implicit, ..with_login(account(&server)) };
    let mut session = client.open(&account).await.expect("a session");
    assert_accepted(&send(&mut session, 1).await);
    assert_eq!(server.sessions()[0].sni.as_deref(), Some("localhost"));
    assert_eq!(server.sessions()[0].commands[0], "EHLO client.test");
}

#[tokio::test]
async fn tls_is_resumed_within_one_configuration_version_only() {
    let authority = Authority::new("Test CA");
    let server = starttls_server(&authority.issue(&["127.0.0.1"])).await;
    let file = pem_file(authority.pem());
    let client = Client { extra_ca_files: vec![file.path().to_owned()], ..Client::default() };
    let connector = client.connector();
    for _ in 0..2 {
        let mut session = connector.open(&organization(), &required(&server)).await.expect("a session");
        assert_accepted(&send(&mut session, 1).await);
        assert_eq!(session.facts().tls.as_ref().expect("TLS").issuer, "CN=Test CA");
    }
    assert_eq!(server.sessions().iter().map(|session| session.resumed).collect::<Vec<_>>(), [false, true]);

    let newer = Destination::Organization { id: OrganizationId::from_integer(42), version: 2 };
    connector.open(&newer, &required(&server)).await.expect("a session");
    assert!(!server.sessions()[2].resumed, "a newer configuration must see the certificate itself");
}

#[tokio::test]
async fn a_listed_self_signed_certificate_is_trusted_by_its_names() {
    for (names, host) in [
        (&["127.0.0.1"][..], "127.0.0.1"),
        (&["localhost"][..], "localhost"),
        (&[][..], "127.0.0.1"),
        (&[][..], "localhost"),
    ] {
        let certificate = ServerCertificate::self_signed(host, names);
        if let Err(failure) = open_trusting(&certificate, host, certificate.pem()).await {
            panic!("{names:?} for {host}: {failure}");
        }
    }
}

#[tokio::test]
async fn a_self_signed_certificate_that_is_not_listed_is_refused() {
    let certificate = ServerCertificate::self_signed("127.0.0.1", &["127.0.0.1"]);
    let other = ServerCertificate::self_signed("127.0.0.1", &["127.0.0.1"]);
    let (kind, words) = tls_fault(open_trusting(&certificate, "127.0.0.1", other.pem()).await);
    assert_eq!(kind, TlsFault::UnknownIssuer);
    assert_eq!(words, "the server's certificate, for 127.0.0.1, is self-signed and not trusted here");
}

#[tokio::test]
async fn a_listed_self_signed_certificate_for_another_name_is_refused() {
    for (common_name, names) in [("mail.example.org", &[][..]), ("127.0.0.1", &["mail.example.org"][..])] {
        let certificate = ServerCertificate::self_signed(common_name, names);
        let (kind, words) = tls_fault(open_trusting(&certificate, "127.0.0.1", certificate.pem()).await);
        assert_eq!(kind, TlsFault::Name);
        assert_eq!(words, "the server's certificate is for mail.example.org, not for 127.0.0.1");
    }
}

#[tokio::test]
async fn a_listed_self_signed_certificate_that_has_run_out_is_refused() {
    let certificate = ServerCertificate::self_signed_expired("127.0.0.1", &[]);
    let (kind, words) = tls_fault(open_trusting(&certificate, "127.0.0.1", certificate.pem()).await);
    assert_eq!(kind, TlsFault::Expired);
    assert_eq!(words, "the server's certificate, for 127.0.0.1, expired on 2020-01-01");
}

#[tokio::test]
async fn a_certificate_of_the_listed_authority_is_refused_with_the_reason_in_words() {
    let authority = Authority::new("Test CA");
    let names = &["127.0.0.1", "mail.example.org"];
    for (certificate, kind, expected) in [
        (
            authority.issue(&["a.example", "b.example"]),
            TlsFault::Name,
            "the server's certificate is for a.example, b.example, not for 127.0.0.1",
        ),
        (authority.issue(&[]), TlsFault::Name, "the server's certificate is for nobody, not for 127.0.0.1"),
        (
            authority.issue_expired(names),
            TlsFault::Expired,
            "the server's certificate, for 127.0.0.1, mail.example.org, expired on 2020-01-01",
        ),
        (
            authority.issue_for_later(names),
            TlsFault::NotYetValid,
            "the server's certificate, for 127.0.0.1, mail.example.org, is not valid before 2999-01-01",
        ),
    ] {
        let opened = open_trusting(&certificate, "127.0.0.1", authority.pem()).await;
        assert_eq!(tls_fault(opened), (kind, expected.to_owned()));
    }
}

#[tokio::test]
async fn a_certificate_of_an_unknown_authority_is_refused_with_its_issuer_and_its_names() {
    let known = Authority::new("Known CA");
    let certificate = Authority::new("Unknown CA").issue(&["127.0.0.1", "mail.example.org"]);
    let (kind, words) = tls_fault(open_trusting(&certificate, "127.0.0.1", known.pem()).await);
    assert_eq!(kind, TlsFault::UnknownIssuer);
    assert_eq!(
        words,
        "the server's certificate, for 127.0.0.1, mail.example.org, does not come from an authority that is trusted \
         here, but from CN=Unknown CA"
    );
}

#[tokio::test]
async fn what_a_certificate_says_of_itself_is_shown_bounded_and_on_one_line() {
    let name = "x".repeat(60);
    let names: Vec<String> = (0..100).map(|index| format!("{name}{index}.example")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let known = Authority::new("Known CA");
    let certificate = Authority::new("ann@acme.example\r\n250 ok\u{202e}").issue(&names);
    let (_, words) = tls_fault(open_trusting(&certificate, "127.0.0.1", known.pem()).await);
    assert!(words.len() < 600 && !words.contains(char::is_control), "{words}");
    assert!(!words.contains("ann@") && !words.contains('\u{202e}'), "{words}");
}

#[tokio::test]
async fn stripped_starttls_never_gets_the_credentials() {
    let server = SmtpServer::start(|b| b.auth_in_clear = true).await;
    for tls in [TlsMode::Required, TlsMode::Opportunistic] {
        let account = SmtpAccount { tls, ..with_login(account(&server)) };
        let failure = Client::default().open(&account).await.err().expect("a failure");
        assert_eq!((failure.phase, failure.fault), (Phase::Starttls, Fault::TlsRequired));
    }
    let anonymous = SmtpAccount { tls: TlsMode::Required, ..account(&server) };
    let failure = Client::default().open(&anonymous).await.err().expect("a failure");
    assert_eq!(failure.fault, Fault::TlsRequired);
    assert_eq!(server.seen(|seen| seen.auth_attempts), 0);
}

#[tokio::test]
async fn credentials_travel_in_the_clear_only_when_the_operator_allows_it() {
    let server = SmtpServer::start(|b| {
        b.auth_in_clear = true;
        b.login = Some(("user".into(), "pässword".into()));
    })
    .await;
    let client = Client { allow_plaintext_auth: true, ..Client::default() };
    let mut session = client.open(&with_login(account(&server))).await.expect("a session");
    assert_accepted(&send(&mut session, 1).await);
    assert_eq!(session.facts().tls, None);
}

#[tokio::test]
async fn a_failed_handshake_never_falls_back_to_plaintext() {
    let server = starttls_server(&ServerCertificate::self_signed("127.0.0.1", &[])).await;
    let client = Client { allow_plaintext_auth: true, ..Client::default() };
    let (kind, _) = tls_fault(client.open(&with_login(account(&server))).await);
    assert_eq!(kind, TlsFault::UnknownIssuer);
    assert_eq!((server.connections(), server.seen(|seen| seen.auth_attempts)), (1, 0));
}

#[tokio::test]
async fn plaintext_behind_the_answer_to_starttls_ends_the_session() {
    let authority = Authority::new("Test CA");
    let server = starttls_server(&authority.issue(&["127.0.0.1"])).await;
    server.rule(Rule::new(Stage::Starttls, Action::Inject(b"250-evil.test\r\n250 AUTH PLAIN\r\n".to_vec())));
    let file = pem_file(authority.pem());
    let client = Client { extra_ca_files: vec![file.path().to_owned()], ..Client::default() };
    let failure = client.open(&required(&server)).await.err().expect("a failure");
    let Fault::Tls { kind, detail } = failure.fault else { panic!("another failure: {failure}") };
    assert_eq!(kind, TlsFault::Injection);
    assert!(detail.contains("response injection"), "{detail}");
    assert_eq!(server.seen(|seen| seen.auth_attempts), 0);
}

#[tokio::test]
async fn a_server_that_speaks_plaintext_where_tls_is_expected_is_told_so() {
    let server = SmtpServer::start(|_| {}).await;
    let account = SmtpAccount { tls: TlsMode::Implicit, ..account(&server) };
    let (kind, words) = tls_fault(Client::default().open(&account).await);
    assert_eq!(kind, TlsFault::NotTls);
    assert_eq!(words, "the server did not answer in TLS: is this the port for another TLS mode?");
}

#[tokio::test]
async fn a_server_whose_tls_has_nothing_in_common_with_ours_is_told_so() {
    let server = SmtpServer::start(|_| {}).await;
    // A fatal alert protocol_version (RFC 8446 section 6), as a server of TLS 1.0 sends it.
    server.rule(Rule::new(Stage::Banner, Action::Reply(vec![21, 3, 1, 0, 2, 2, 70])));
    let account = SmtpAccount { tls: TlsMode::Implicit, ..account(&server) };
    let (kind, words) = tls_fault(Client::default().open(&account).await);
    assert_eq!(kind, TlsFault::Version);
    assert!(words.contains("TLS 1.2 or newer is needed"), "{words}");
}

#[tokio::test]
async fn a_connection_that_ends_during_the_handshake_is_lost_and_no_fault_of_tls() {
    let server = starttls_server(&ServerCertificate::self_signed("127.0.0.1", &[])).await;
    server.rule(Rule::new(Stage::Starttls, Action::ReplyThenClose(b"220 2.0.0 go".to_vec())));
    let failure = Client::default().open(&required(&server)).await.err().expect("a failure");
    assert_eq!((failure.phase, failure.fault), (Phase::Tls, Fault::Lost));
}

#[tokio::test]
async fn a_server_that_waits_for_tls_where_we_wait_for_its_greeting_is_advised_on_with_the_right_port() {
    let certificate = ServerCertificate::self_signed("127.0.0.1", &[]);
    let server = SmtpServer::start(|b| b.tls = Tls::Implicit(certificate.server_config())).await;
    let client = Client { deadlines: IMPATIENT, ..Client::default() };
    let failure = client.open(&required(&server)).await.err().expect("a failure");
    assert_eq!((failure.phase, &failure.fault), (Phase::Greeting, &Fault::Timeout));
    let facts = ServerFacts { host: "127.0.0.1", port: 587, tls: TlsMode::Required };
    let hint = advice::hint(&failure, facts);
    assert!(hint.contains("use port 465"), "{hint}");
}

#[tokio::test]
async fn a_refused_starttls_is_the_servers_reply() {
    let server = starttls_server(&ServerCertificate::self_signed("127.0.0.1", &[])).await;
    server.rule(Rule::new(Stage::Starttls, Action::reply("454 4.7.0 not now")));
    let failure = Client::default().open(&required(&server)).await.err().expect("a failure");
    assert_eq!(failure.to_string(), "at starttls: the server answered 454 4.7.0 not now");
}

#[tokio::test]
async fn a_host_that_is_not_public_gets_no_connection() {
    let server = SmtpServer::start(|_| {}).await;
    let heard = Arc::new(Heard::default());
    let client = Client { allow_networks: "192.0.2.0/24", ..Client::default() };
    let connector = client.connector().observed_by(heard.clone());
    let failure = connector.open(&organization(), &account(&server)).await.err().expect("a failure");
    assert_eq!((failure.phase, failure.fault, failure.address), (Phase::Resolve, Fault::HostNotPublic, None));
    assert_eq!(*heard.refused.lock().expect("no panic holds it"), ["loopback"]);
    assert_eq!(server.connections(), 0);

    // The platform's own host is the operator's choice.
    assert!(connector.open(&Destination::Platform, &account(&server)).await.is_ok());
}

#[test]
fn a_file_of_extra_certificates_that_cannot_be_used_is_an_error_that_names_it() {
    let no_pem = pem_file("not a certificate");
    let no_certificate = pem_file("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n");
    let missing = PathBuf::from("/nonexistent/ca.pem");
    for path in [no_pem.path().to_owned(), no_certificate.path().to_owned(), missing] {
        let error = TlsRoots::load(std::slice::from_ref(&path)).expect_err("unusable").to_string();
        assert!(error.contains(&*path.to_string_lossy()), "{error}");
    }
}
