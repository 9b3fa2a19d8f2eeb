//! MAIL to the final dot: what each answer, and each missing one, comes to.

use std::sync::atomic::{AtomicBool, Ordering};

use futures_util::future::join_all;
use sendoff::model::failure::Fault;

use super::*;
use crate::support::smtp_server::{Action, Behaviour, Rule, SmtpServer, Stage};

async fn session_with(configure: impl FnOnce(&mut Behaviour)) -> (SmtpServer, Session) {
    session_by(PATIENT, configure).await
}

async fn session_by(deadlines: Deadlines, configure: impl FnOnce(&mut Behaviour)) -> (SmtpServer, Session) {
    let server = SmtpServer::start(configure).await;
    let client = Client { deadlines, ..Client::default() };
    let session = client.open(&account(&server)).await.expect("a session");
    (server, session)
}

/// One message in a session of its own; one that has timed out is of no more use.
async fn sent_by(server: &SmtpServer, deadlines: Deadlines, message: &[u8]) -> Result<(), Failure> {
    let client = Client { deadlines, ..Client::default() };
    let mut session = client.open(&account(server)).await?;
    match session.send(&envelope(1), message, async { true }).await.outcome {
        TransactionOutcome::Accepted(_) => Ok(()),
        TransactionOutcome::Failed(failure) => {
            assert!(failure.fault != Fault::Timeout || !session.is_usable());
            Err(failure)
        }
        other => panic!("neither sent nor failed: {other:?}"),
    }
}

async fn failure_by(server: &SmtpServer, deadlines: Deadlines, message: &[u8]) -> Failure {
    sent_by(server, deadlines, message).await.expect_err("a failure")
}

const STAGES: [(Stage, Phase); 4] = [
    (Stage::Mail, Phase::Mail),
    (Stage::Rcpt, Phase::Rcpt),
    (Stage::Data, Phase::Data),
    (Stage::FinalDot, Phase::FinalDot),
];

/// A message that no socket's buffers hold.
fn huge_message() -> Vec<u8> {
    b"0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcde\r\n".repeat(256 << 10)
}

#[tokio::test]
async fn a_message_arrives_byte_for_byte_with_its_envelope() {
    for pipelining in [true, false] {
        let (server, mut session) = session_with(|b| b.pipelining = pipelining).await;
        let transaction = send(&mut session, 3).await;
        assert_accepted(&transaction);
        assert_eq!(transaction.refused, []);
        let seen = &server.messages()[0];
        assert_eq!(seen.data, MESSAGE);
        assert_eq!(seen.from, "sender@example.org");
        assert_eq!(seen.recipients, ["r0@example.net", "r1@example.net", "r2@example.net"]);
        assert_eq!(seen.mail_parameters, format!("SIZE={}", MESSAGE.len()));
        assert_eq!(server.sessions()[0].ahead_of_reply, 0);
    }
}

#[tokio::test]
async fn a_message_without_its_last_line_end_gets_one() {
    let (server, mut session) = session_with(|_| {}).await;
    let transaction = session.send(&envelope(1), b"Subject: x\r\n\r\nend", async { true }).await;
    assert_accepted(&transaction);
    assert_eq!(server.messages()[0].data, b"Subject: x\r\n\r\nend\r\n");
}

#[tokio::test]
async fn a_message_larger_than_every_buffer_arrives_whole() {
    let (server, mut session) = session_with(|_| {}).await;
    let message = huge_message();
    assert_accepted(&session.send(&envelope(1), &message, async { true }).await);
    assert!(server.messages()[0].data == message);
}

#[tokio::test]
async fn a_message_of_any_size_around_what_leaves_in_one_write_arrives_whole() {
    let (server, mut session) = session_with(|_| {}).await;
    let sizes = [0, 1, (32 << 10) - 1, 32 << 10, (32 << 10) + 1, 64 << 10];
    for size in sizes {
        let mut message = b"0123456789abcde\n".repeat(4 << 10);
        message.iter_mut().skip(14).step_by(16).for_each(|byte| *byte = b'\r');
        message.truncate(size / 16 * 16);
        message.extend(b"x".repeat(size % 16));
        assert_accepted(&session.send(&envelope(1), &message, async { true }).await);
    }
    let seen: Vec<usize> = server.messages().iter().map(|message| message.data.len()).collect();
    // A line end at the end is there once.
    let expected: Vec<usize> =
        sizes.iter().map(|size| if size % 16 == 0 && *size > 0 { *size } else { size + 2 }).collect();
    assert_eq!(seen, expected);
}

#[tokio::test]
async fn a_hundred_recipients_each_get_their_answer() {
    let (server, mut session) = session_with(|b| {
        b.rule(Rule::new(Stage::Rcpt, Action::reply("550 5.1.1 unknown")).of("r7@example.net"));
        b.rule(Rule::new(Stage::Rcpt, Action::reply("450 4.2.1 later")).of("r98@example.net"));
    })
    .await;
    let transaction = send(&mut session, 100).await;
    assert_accepted(&transaction);
    let refused: Vec<_> = transaction.refused.iter().map(|(index, reply)| (*index, reply.code)).collect();
    assert_eq!(refused, [(7, 550), (98, 450)]);
    assert_eq!(server.messages()[0].recipients.len(), 98);
}

#[tokio::test]
async fn an_envelope_larger_than_every_buffer_does_not_stall() {
    let long_reply = format!("250-{}\r\n250 ok", "x".repeat(300));
    let (server, mut session) =
        session_with(|b| b.rule(Rule::new(Stage::Rcpt, Action::reply(&long_reply)))).await;
    assert_accepted(&send(&mut session, 1000).await);
    assert_eq!(server.messages()[0].recipients.len(), 1000);
}

#[tokio::test]
async fn a_server_that_is_gone_is_told_by_how_far_the_message_had_come() {
    for pipelining in [true, false] {
        for (stage, phase) in STAGES {
            let (server, mut session) = session_with(|b| {
                b.pipelining = pipelining;
                b.rule(Rule::new(stage, Action::Close));
            })
            .await;
            let failure = failure(send(&mut session, 2).await);
            assert_eq!((failure.phase, &failure.fault), (phase, &Fault::Lost));
            assert_eq!((failure.reused, failure.address), (false, Some(server.address())));
            assert!(!session.is_usable());
        }
    }
}

#[tokio::test]
async fn a_server_that_is_gone_in_the_middle_of_the_message_has_not_accepted_it() {
    let (server, mut session) =
        session_with(|b| b.rule(Rule::new(Stage::Body, Action::CloseAfterBytes(1 << 20)))).await;
    let failure = failure(session.send(&envelope(1), &huge_message(), async { true }).await);
    assert_eq!((failure.phase, failure.fault), (Phase::Body, Fault::Lost));
    assert_eq!(server.messages().len(), 0);
}

#[tokio::test]
async fn a_server_that_accepts_and_is_gone_leaves_the_outcome_at_the_final_dot() {
    let (server, mut session) =
        session_with(|b| b.rule(Rule::new(Stage::FinalDot, Action::AcceptThenClose))).await;
    let failure = failure(send(&mut session, 1).await);
    assert_eq!((failure.phase, failure.fault), (Phase::FinalDot, Fault::Lost));
    assert_eq!(server.messages().len(), 1);
}

#[tokio::test]
async fn silence_is_a_timeout_at_its_phase() {
    join_all(STAGES.map(async |(stage, phase)| {
        let server = SmtpServer::start(|b| b.rule(Rule::new(stage, Action::Silence))).await;
        timed_out_at(phase, async || failure_by(&server, IMPATIENT, MESSAGE).await).await;
    }))
    .await;
}

#[tokio::test]
async fn a_server_that_stops_reading_the_message_is_a_timeout() {
    let deadlines = Deadlines { data: SHORT, ..PATIENT };
    let server = SmtpServer::start(|b| b.rule(Rule::new(Stage::Body, Action::Silence))).await;
    let message = huge_message();
    timed_out_at(Phase::Body, async || failure_by(&server, deadlines, &message).await).await;
}

#[tokio::test]
async fn a_dripped_reply_does_not_stretch_its_deadline() {
    join_all(STAGES.map(async |(stage, phase)| {
        let drip = Action::Drip(b"250 slowly slowly slowly".to_vec(), SHORT / 8);
        let server = SmtpServer::start(|b| b.rule(Rule::new(stage, drip))).await;
        timed_out_at(phase, async || failure_by(&server, IMPATIENT, MESSAGE).await).await;
    }))
    .await;
}

#[tokio::test]
async fn a_final_reply_may_take_longer_than_a_commands() {
    let deadlines = Deadlines { final_reply: LIMIT, ..IMPATIENT };
    let server = SmtpServer::start(|b| b.rule(Rule::new(Stage::FinalDot, Action::After(SHORT * 2)))).await;
    let mut sent = sent_by(&server, deadlines, MESSAGE).await;
    for _ in 0..4 {
        // A busy machine may be as good as silent at a command.
        let before = |failure: &Failure| failure.fault == Fault::Timeout && failure.phase < Phase::FinalDot;
        if !sent.as_ref().is_err_and(before) {
            break;
        }
        sent = sent_by(&server, deadlines, MESSAGE).await;
    }
    assert!(sent.is_ok(), "{sent:?}");
}

#[tokio::test]
async fn a_reply_without_end_is_cut_off_at_every_phase() {
    for action in [Action::HugeLine(64 << 20), Action::EndlessReply] {
        for (stage, phase) in STAGES {
            let (_server, mut session) = session_with(|b| b.rule(Rule::new(stage, action.clone()))).await;
            let failure = failure(send(&mut session, 1).await);
            assert_eq!(failure.phase, phase);
            assert!(matches!(failure.fault, Fault::Protocol { .. }), "{failure}");
            assert!(!session.is_usable());
        }
    }
}

#[tokio::test]
async fn a_refusal_of_the_whole_is_told_and_the_session_goes_on() {
    for pipelining in [true, false] {
        for (stage, phase) in
            [(Stage::Mail, Phase::Mail), (Stage::Data, Phase::Data), (Stage::FinalDot, Phase::FinalDot)]
        {
            for reply in ["451 4.3.0 later", "554 5.7.1 no", "571 blocked"] {
                let (server, mut session) = session_with(|b| {
                    b.pipelining = pipelining;
                    b.rule(Rule::new(stage, Action::reply(reply)).once());
                })
                .await;
                let failure = failure(send(&mut session, 2).await);
                assert_eq!(failure.phase, phase);
                assert_eq!(failure.reply().expect("a reply").to_string(), reply);
                assert_accepted(&send(&mut session, 1).await);
                assert_eq!((server.connections(), server.messages().len()), (1, 1));
            }
        }
    }
}

#[tokio::test]
async fn the_servers_421_ends_the_session_and_is_not_acceptance() {
    for pipelining in [true, false] {
        for (stage, phase) in STAGES {
            let (server, mut session) = session_with(|b| {
                b.pipelining = pipelining;
                b.rule(Rule::new(stage, Action::ReplyThenClose(b"421 4.7.0 too busy".to_vec())));
            })
            .await;
            let failure = failure(send(&mut session, 1).await);
            assert_eq!(failure.phase, phase);
            assert_eq!(failure.reply().expect("a reply").code, 421);
            assert!(!session.is_usable());
            assert_eq!(server.messages().len(), 0);
        }
    }
}

#[tokio::test]
async fn a_refused_sender_decides_over_the_noise_behind_it() {
    let (server, mut session) = session_with(|b| {
        b.rule(Rule::new(Stage::Mail, Action::reply("550 5.7.60 SendAsDenied")).once());
    })
    .await;
    let transaction = send(&mut session, 3).await;
    assert_eq!(transaction.refused, []);
    let failure = failure(transaction);
    assert_eq!((failure.phase, failure.reply().expect("a reply").code), (Phase::Mail, 550));
    assert_accepted(&send(&mut session, 1).await);
    assert_eq!(server.seen(|seen| seen.count("RSET")), 1);
}

#[tokio::test]
async fn a_sender_refused_at_rcpt_is_every_recipients_answer() {
    let refusal = "553 5.7.1 <sender@example.org>: Sender address rejected: not owned by user";
    let (_server, mut session) = session_with(|b| b.sender_refused_at_rcpt = Some(refusal.to_owned())).await;
    let transaction = send(&mut session, 2).await;
    assert_eq!(transaction.outcome, TransactionOutcome::NoRecipient);
    assert_eq!(
        transaction.refused.iter().map(|(index, reply)| (*index, reply.code)).collect::<Vec<_>>(),
        [(0, 553), (1, 553)]
    );
    assert!(transaction.refused[0].1.text.contains("not owned by user"));
}

#[tokio::test]
async fn recipients_beyond_the_servers_limit_are_told_apart() {
    let (server, mut session) = session_with(|b| b.max_recipients = Some(2)).await;
    let transaction = send(&mut session, 4).await;
    assert_accepted(&transaction);
    assert_eq!(transaction.refused.iter().map(|(index, _)| *index).collect::<Vec<_>>(), [2, 3]);
    assert_eq!(server.messages()[0].recipients.len(), 2);
}

#[tokio::test]
async fn a_go_without_recipients_is_answered_with_a_lone_dot() {
    let (server, mut session) = session_with(|b| {
        b.data_without_recipients = true;
        b.rule(Rule::new(Stage::Rcpt, Action::reply("550 5.1.1 unknown")).times(2));
    })
    .await;
    let transaction = send(&mut session, 2).await;
    assert_eq!(transaction.outcome, TransactionOutcome::NoRecipient);
    assert_eq!(transaction.refused.len(), 2);
    assert_accepted(&send(&mut session, 1).await);
    let seen = server.messages();
    assert_eq!((seen.len(), seen[0].session), (1, 0));
    assert_eq!(server.seen(|seen| seen.count("RSET")), 1);
}

#[tokio::test]
async fn a_closed_gate_sends_nothing_and_the_session_goes_on() {
    for pipelining in [true, false] {
        let (server, mut session) = session_with(|b| b.pipelining = pipelining).await;
        let withheld = session.send(&envelope(1), MESSAGE, async { false }).await;
        assert_eq!(withheld.outcome, TransactionOutcome::Withheld);
        assert_eq!(server.seen(|seen| seen.count("DATA")), 0);
        assert_accepted(&send(&mut session, 1).await);
        assert_eq!(server.messages().len(), 1);
    }
}

#[tokio::test]
async fn the_gate_is_asked_right_before_data() {
    let (server, mut session) = session_with(|b| b.pipelining = false).await;
    let asked = AtomicBool::new(false);
    let gate = async {
        asked.store(true, Ordering::SeqCst);
        assert_eq!(server.seen(|seen| (seen.count("RCPT"), seen.count("DATA"))), (1, 0));
        true
    };
    assert_accepted(&session.send(&envelope(1), MESSAGE, gate).await);
    assert!(asked.load(Ordering::SeqCst));
}

#[tokio::test]
async fn a_message_above_the_servers_size_is_not_begun() {
    let (server, mut session) = session_with(|b| b.size = Some(40)).await;
    let failure = failure(send(&mut session, 1).await);
    assert_eq!(failure.fault, Fault::SizeExceeded { size: MESSAGE.len() as u64, limit: 40 });
    assert_eq!(server.seen(|seen| seen.count("MAIL")), 0);
    assert!(session.is_usable());
}

#[tokio::test]
async fn a_server_without_size_gets_no_size() {
    let (server, mut session) = session_with(|b| b.size = None).await;
    assert_accepted(&send(&mut session, 1).await);
    assert_eq!(server.messages()[0].mail_parameters, "");
}

#[tokio::test]
async fn an_internationalized_address_needs_a_server_that_offers_smtputf8() {
    let envelope =
        Envelope { recipients: vec![(0, address("jörg@example.net"))], smtputf8: true, ..envelope(0) };
    let (server, mut session) = session_with(|_| {}).await;
    assert_accepted(&session.send(&envelope, "X: ö\r\n\r\nö\r\n".as_bytes(), async { true }).await);
    assert_eq!(server.messages()[0].recipients, ["jörg@example.net"]);
    assert!(server.messages()[0].mail_parameters.ends_with("SMTPUTF8 BODY=8BITMIME"));

    let (server, mut session) = session_with(|b| b.smtputf8 = false).await;
    let failure = failure(session.send(&envelope, MESSAGE, async { true }).await);
    assert_eq!(failure.fault, Fault::Smtputf8Missing);
    assert_eq!(server.seen(|seen| seen.count("MAIL")), 0);
}

#[tokio::test]
async fn a_refusal_in_the_middle_of_the_message_is_told() {
    let refusal = Action::ReplyThenClose(b"552 5.3.4 too much".to_vec());
    let (_server, mut session) = session_with(|b| b.rule(Rule::new(Stage::Body, refusal))).await;
    let failure = failure(session.send(&envelope(1), &huge_message(), async { true }).await);
    assert_eq!(failure.phase, Phase::Body);
    assert_eq!(failure.reply().expect("a reply").to_string(), "552 5.3.4 too much");
}

#[tokio::test]
async fn a_success_before_the_final_dot_is_not_acceptance() {
    let early = Action::reply("250 2.0.0 already taken");
    let (server, mut session) = session_with(|b| b.rule(Rule::new(Stage::Body, early))).await;
    let failure = failure(session.send(&envelope(1), &huge_message(), async { true }).await);
    assert_eq!(failure.phase, Phase::Body);
    assert!(matches!(failure.fault, Fault::Protocol { .. }), "{failure}");
    assert_eq!(server.messages().len(), 0);
}

#[tokio::test]
async fn a_3xx_to_the_final_dot_is_not_acceptance() {
    let (_server, mut session) =
        session_with(|b| b.rule(Rule::new(Stage::FinalDot, Action::reply("354 more")))).await;
    let failure = failure(send(&mut session, 1).await);
    assert_eq!(failure.phase, Phase::FinalDot);
    assert!(matches!(failure.fault, Fault::Protocol { .. }), "{failure}");
}

#[tokio::test]
async fn every_phase_is_reported_to_the_observer() {
    let server = SmtpServer::start(|_| {}).await;
    let heard = Arc::new(Heard::default());
    let connector = Client::default().connector().observed_by(heard.clone());
    let mut session = connector.open(&organization(), &account(&server)).await.expect("a session");
    assert_accepted(&send(&mut session, 1).await);
    let phases = heard.phases.lock().expect("no panic holds it").clone();
    assert_eq!(
        phases,
        [
            Phase::Resolve,
            Phase::Connect,
            Phase::Greeting,
            Phase::Ehlo,
            Phase::Mail,
            Phase::Rcpt,
            Phase::Data,
            Phase::FinalDot
        ]
    );
}
