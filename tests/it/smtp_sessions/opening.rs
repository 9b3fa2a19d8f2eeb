//! Greeting, EHLO and AUTH: every way in which a server can fail there.

use std::net::SocketAddr;

use futures_util::future::join_all;
use sendoff::model::failure::Fault;

use super::*;
use crate::support::certs::{Authority, pem_file};
use crate::support::smtp_server::{Action, Behaviour, Rule, SmtpServer, Stage, Tls};
use crate::support::world::own_address;

/// A server in the clear that demands a login, and a client that may give it.
async fn login_server(configure: impl FnOnce(&mut Behaviour)) -> SmtpServer {
    SmtpServer::start(|b| {
        b.auth_in_clear = true;
        b.login = Some(("user".into(), "pässword".into()));
        configure(b);
    })
    .await
}

fn client(deadlines: Deadlines) -> Client {
    Client { deadlines, allow_plaintext_auth: true, ..Client::default() }
}

async fn failure_of_opening(server: &SmtpServer, deadlines: Deadlines) -> Failure {
    client(deadlines).open(&with_login(account(server))).await.err().expect("a failure")
}

const STAGES: [(Stage, Phase); 3] =
    [(Stage::Banner, Phase::Greeting), (Stage::Ehlo, Phase::Ehlo), (Stage::Auth, Phase::Auth)];

#[tokio::test]
async fn a_server_that_is_gone_before_the_session_is_open_is_a_lost_connection() {
    for (stage, phase) in STAGES {
        let server = login_server(|b| b.rule(Rule::new(stage, Action::Close))).await;
        let failure = failure_of_opening(&server, PATIENT).await;
        assert_eq!((failure.phase, &failure.fault), (phase, &Fault::Lost));
        assert_eq!(failure.address, Some(server.address()));
    }
}

#[tokio::test]
async fn a_server_that_says_nothing_is_a_timeout() {
    join_all(STAGES.map(async |(stage, phase)| {
        let server = login_server(|b| b.rule(Rule::new(stage, Action::Silence))).await;
        timed_out_at(phase, async || failure_of_opening(&server, IMPATIENT).await).await;
    }))
    .await;
}

/// The clock stands still but where all wait.
#[tokio::test(start_paused = true)]
async fn the_longest_opening_is_as_long_as_a_server_may_take_with_every_step_of_one() {
    let authority = Authority::new("Test CA");
    let certificate = authority.issue(&["127.0.0.1"]).server_config();
    let slowly = Action::After(LIMIT - Duration::from_millis(1));
    let server = SmtpServer::start(|b| {
        b.tls = Tls::Starttls(certificate);
        b.login = Some(("user".into(), "pässword".into()));
        for stage in [Stage::Banner, Stage::Ehlo, Stage::Starttls, Stage::Auth] {
            b.rule(Rule::new(stage, slowly.clone()));
        }
    })
    .await;
    let file = pem_file(authority.pem());
    let connector = Client { extra_ca_files: vec![file.path().to_owned()], ..Client::default() }.connector();
    let account = with_login(SmtpAccount { tls: TlsMode::Required, ..account(&server) });
    let begun = tokio::time::Instant::now();
    let destination = organization();
    let opening = connector.open(&destination, &account);
    let opened = tokio::time::timeout(connector.longest_opening(), opening).await;
    assert!(opened.expect("within the longest opening").is_ok());
    assert!(begun.elapsed() > 4 * LIMIT, "it did take its time");
}

#[tokio::test]
async fn a_server_that_drips_its_reply_does_not_stretch_the_deadline() {
    join_all(STAGES.map(async |(stage, phase)| {
        let drip = Action::Drip(b"250 slowly slowly slowly".to_vec(), SHORT / 8);
        let server = login_server(|b| b.rule(Rule::new(stage, drip))).await;
        timed_out_at(phase, async || failure_of_opening(&server, IMPATIENT).await).await;
    }))
    .await;
}

#[tokio::test]
async fn a_reply_without_end_is_cut_off() {
    for action in [Action::HugeLine(64 << 20), Action::EndlessReply] {
        for (stage, phase) in STAGES {
            let server = login_server(|b| b.rule(Rule::new(stage, action.clone()))).await;
            let failure = failure_of_opening(&server, PATIENT).await;
            assert_eq!(failure.phase, phase);
            assert!(matches!(failure.fault, Fault::Protocol { .. }), "{failure}");
        }
    }
}

#[tokio::test]
async fn a_refusal_is_told_with_its_phase_and_its_reply() {
    for (stage, phase) in STAGES {
        for reply in ["421 4.3.2 closing", "451 4.3.0 later", "554 5.7.1 no"] {
            let server = login_server(|b| b.rule(Rule::new(stage, Action::reply(reply)))).await;
            let failure = failure_of_opening(&server, PATIENT).await;
            assert_eq!(failure.phase, phase);
            assert_eq!(failure.reply().expect("a reply").to_string(), reply);
        }
    }
}

#[tokio::test]
async fn bytes_that_are_no_smtp_reply_are_never_shown() {
    for banner in ["HTTP/1.1 400 Bad Request", "SSH-2.0-OpenSSH_9.2", "* OK IMAP4rev1 ready", "22"] {
        let server = login_server(|b| b.rule(Rule::new(Stage::Banner, Action::reply(banner)))).await;
        let failure = failure_of_opening(&server, PATIENT).await;
        assert_eq!(
            failure.to_string(),
            "at greeting: not SMTP: the server sent a line that is not an SMTP reply"
        );
    }
}

#[tokio::test]
async fn a_reply_that_is_not_utf8_keeps_its_code() {
    let reply = Action::Reply(b"535-5.7.8 mot de passe refus\xe9\r\n535 5.7.8 \xff\xfe".to_vec());
    let server = login_server(|b| b.rule(Rule::new(Stage::Auth, reply))).await;
    let failure = failure_of_opening(&server, PATIENT).await;
    assert_eq!(failure.reply().expect("a reply").code, 535);
}

#[tokio::test]
async fn ehlo_keywords_count_in_lower_case_too() {
    let server = login_server(|b| b.lower_case = true).await;
    let mut session = client(PATIENT).open(&with_login(account(&server))).await.expect("a session");
    assert_accepted(&send(&mut session, 2).await);
    assert_eq!(session.facts().mechanism, Some("PLAIN"));
}

#[tokio::test]
async fn credentials_arrive_as_they_were_given() {
    let server = login_server(|_| {}).await;
    client(PATIENT).open(&with_login(account(&server))).await.expect("a session");
    assert_eq!(server.sessions()[0].auth_payloads, ["\0user\0pässword"]);
}

#[tokio::test]
async fn a_server_with_login_only_is_served_by_it() {
    let server = login_server(|b| b.mechanisms = vec!["XOAUTH2", "LOGIN"]).await;
    let session = client(PATIENT).open(&with_login(account(&server))).await.expect("a session");
    assert_eq!(session.facts().mechanism, Some("LOGIN"));
    assert_eq!(server.sessions()[0].auth_payloads, ["user", "pässword"]);
}

#[tokio::test]
async fn a_refused_mechanism_is_followed_by_the_next_one() {
    for refusal in ["504 5.5.4 not this one", "538 5.7.4 security features not supported"] {
        let server =
            login_server(|b| b.rule(Rule::new(Stage::Auth, Action::reply(refusal)).of("PLAIN"))).await;
        let session = client(PATIENT).open(&with_login(account(&server))).await.expect("a session");
        assert_eq!(session.facts().mechanism, Some("LOGIN"));
    }
}

#[tokio::test]
async fn a_refused_password_is_tried_once() {
    let server = login_server(|b| b.login = Some(("user".into(), "another".into()))).await;
    let failure = failure_of_opening(&server, PATIENT).await;
    assert_eq!(failure.phase, Phase::Auth);
    assert_eq!(failure.reply().expect("a reply").code, 535);
    assert_eq!((server.connections(), server.seen(|seen| seen.auth_attempts)), (1, 1));
}

#[tokio::test]
async fn a_server_without_a_usable_mechanism_is_told_by_what_it_offers() {
    for (mechanisms, offered) in [(vec!["XOAUTH2", "GSSAPI"], "XOAUTH2 GSSAPI"), (vec![], "")] {
        let server = login_server(|b| b.mechanisms = mechanisms).await;
        let failure = failure_of_opening(&server, PATIENT).await;
        assert_eq!(failure.fault, Fault::NoAuthMechanism { offered: offered.into() });
        assert_eq!(server.seen(|seen| seen.auth_attempts), 0);
    }
    let server = login_server(|b| b.rule(Rule::new(Stage::Auth, Action::reply("504 5.5.4 no")))).await;
    let failure = failure_of_opening(&server, PATIENT).await;
    assert_eq!(failure.fault, Fault::NoAuthMechanism { offered: "PLAIN LOGIN".into() });
}

#[tokio::test]
async fn a_port_where_nobody_listens_is_unreachable() {
    let server = SmtpServer::start_at(SocketAddr::from((own_address(4), 0)), |_| {}).await;
    let account = account(&server);
    let closed = server.address();
    drop(server);
    // The port is free once the server's task has ended.
    let deadline = std::time::Instant::now() + LIMIT;
    while tokio::net::TcpStream::connect(closed).await.is_ok() {
        assert!(std::time::Instant::now() < deadline, "the server goes on");
        tokio::task::yield_now().await;
    }
    let failure = Client::default().open(&account).await.err().expect("a failure");
    assert_eq!(failure.phase, Phase::Connect);
    assert!(matches!(failure.fault, Fault::Unreachable { .. }), "{failure}");
}
