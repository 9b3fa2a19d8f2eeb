//! Kept sessions: reused while they are good, never when there is a doubt.

use sendoff::model::failure::Fault;
use sendoff::smtp::{Pool, PoolLimits, PooledSession};
use tokio::sync::Notify;

use super::*;
use crate::support::smtp_server::{Action, Behaviour, Rule, SmtpServer, Stage};

const LIMITS: PoolLimits =
    PoolLimits { max_sessions: 256, max_messages_per_connection: 100, idle_timeout: LIMIT };

struct Rig {
    server: SmtpServer,
    pool: Pool,
}

impl Rig {
    async fn new(limits: PoolLimits, configure: impl FnOnce(&mut Behaviour)) -> Self {
        let server = SmtpServer::start(configure).await;
        Self { server, pool: Pool::new(Client::default().connector(), limits) }
    }

    async fn session(&self) -> PooledSession {
        self.pool.session(&organization(), &account(&self.server)).await.expect("a session")
    }

    async fn send(&self, session: &mut PooledSession) -> Transaction {
        session.send(&envelope(1), MESSAGE, async { true }).await
    }

    async fn send_and_release(&self) {
        let mut session = self.session().await;
        assert_accepted(&self.send(&mut session).await);
        session.release();
    }

    async fn all_closed(&self) {
        self.server.wait_for(LIMIT, |seen| seen.open_sessions() == 0).await.expect("every connection closed");
    }
}

#[tokio::test]
async fn a_session_carries_one_message_after_the_other() {
    let rig = Rig::new(LIMITS, |_| {}).await;
    for _ in 0..3 {
        rig.send_and_release().await;
    }
    assert_eq!((rig.pool.idle(), rig.pool.active()), (1, 0));
    let places: Vec<_> = rig.server.messages().iter().map(|m| (m.session, m.transaction)).collect();
    assert_eq!(places, [(0, 1), (0, 2), (0, 3)]);
}

#[tokio::test]
async fn two_messages_at_once_take_two_sessions() {
    let rig = Rig::new(LIMITS, |_| {}).await;
    let (first, second) = (rig.session().await, rig.session().await);
    assert_eq!((rig.pool.idle(), rig.pool.active()), (0, 2));
    first.release();
    second.release();
    assert_eq!((rig.pool.idle(), rig.pool.active(), rig.server.connections()), (2, 0, 2));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_tasks_share_a_pool() {
    let rig = Arc::new(Rig::new(LIMITS, |_| {}).await);
    let tasks: Vec<_> = (0..20)
        .map(|_| {
            let rig = rig.clone();
            tokio::spawn(async move {
                for _ in 0..10 {
                    rig.send_and_release().await;
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.expect("no panic");
    }
    assert_eq!(rig.server.messages().len(), 200);
    assert_eq!((rig.pool.idle(), rig.pool.active()), (rig.server.connections(), 0));
}

#[tokio::test]
async fn the_session_that_is_idle_for_longest_makes_room() {
    let rig = Rig::new(LIMITS, |_| {}).await;
    assert!(!rig.pool.close_longest_idle());
    let (first, second) = (rig.session().await, rig.session().await);
    first.release();
    second.release();
    assert!(rig.pool.close_longest_idle());
    rig.server.wait_for(LIMIT, |seen| seen.sessions[0].closed).await.expect("the first one closed");
    assert_eq!((rig.pool.idle(), rig.server.seen(|seen| seen.open_sessions())), (1, 1));
}

#[tokio::test]
async fn destinations_share_no_session() {
    let rig = Rig::new(LIMITS, |_| {}).await;
    rig.send_and_release().await;
    let newer = Destination::Organization { id: OrganizationId::from_integer(42), version: 2 };
    rig.pool.session(&newer, &account(&rig.server)).await.expect("a session").release();
    assert_eq!((rig.pool.idle(), rig.server.connections()), (2, 2));
}

#[tokio::test]
async fn a_kept_session_that_the_server_closed_is_replaced_unnoticed() {
    for last_words in ["", "421 4.4.2 idle for too long\r\n"] {
        let rig = Rig::new(LIMITS, |_| {}).await;
        rig.send_and_release().await;
        rig.server.hang_up(last_words);
        rig.all_closed().await;
        rig.send_and_release().await;
        assert_eq!((rig.server.connections(), rig.server.messages().len()), (2, 2));
    }
}

#[tokio::test]
async fn a_loss_at_the_first_command_of_a_reused_session_is_marked_as_such() {
    for action in [Action::Close, Action::ReplyThenClose(b"421 4.4.2 idle".to_vec())] {
        let rig = Rig::new(LIMITS, |b| b.rule(Rule::new(Stage::Mail, action).nth(2))).await;
        rig.send_and_release().await;
        let mut session = rig.session().await;
        assert!(session.is_reused());
        let failure = failure(rig.send(&mut session).await);
        assert_eq!((failure.phase, failure.reused), (Phase::Mail, true));
        session.release();
        assert_eq!(rig.pool.idle(), 0);

        let fresh = rig.pool.fresh_session(&organization(), &account(&rig.server)).await;
        let mut fresh = fresh.expect("a session");
        assert!(!fresh.is_reused());
        assert_accepted(&rig.send(&mut fresh).await);
    }
}

#[tokio::test]
async fn a_loss_in_answer_to_rset_is_told_as_such() {
    let rig = Rig::new(LIMITS, |b| {
        b.rule(Rule::new(Stage::Rcpt, Action::reply("550 5.1.1 unknown")).once());
        b.rule(Rule::new(Stage::Rset, Action::Close));
    })
    .await;
    let mut session = rig.session().await;
    assert_eq!(rig.send(&mut session).await.outcome, TransactionOutcome::NoRecipient);
    session.release();
    assert_eq!(rig.pool.idle(), 1);
    let mut session = rig.session().await;
    let failure = failure(rig.send(&mut session).await);
    assert_eq!((failure.phase, failure.fault, failure.reused), (Phase::Rset, Fault::Lost, true));
}

#[tokio::test]
async fn the_final_dot_of_the_last_message_is_not_the_next_ones() {
    let rig = Rig::new(LIMITS, |_| {}).await;
    let mut session = rig.session().await;
    assert_accepted(&rig.send(&mut session).await);
    let dot = session.final_dot();
    let envelope = envelope(1);
    let gate = std::future::pending();
    let mut waiting = Box::pin(session.send(&envelope, b"Subject: two\r\n\r\n", gate));
    assert!(futures_util::poll!(&mut waiting).is_pending());
    assert!(!dot.may_have_left(), "nothing of the second message has left");
}

#[tokio::test]
async fn a_send_that_is_dropped_under_way_never_gives_its_session_back() {
    let held = Arc::new(Notify::new());
    let rig = Rig::new(LIMITS, |b| {
        b.rule(Rule::new(Stage::FinalDot, Action::Hold(held.clone())).once());
        b.rule(Rule::new(Stage::FinalDot, Action::reply("554 5.7.1 refused")).once());
    })
    .await;
    let mut session = rig.session().await;
    tokio::select! {
        outcome = rig.send(&mut session) => panic!("ended before it was dropped: {outcome:?}"),
        reached = rig.server.wait_for(LIMIT, |seen| seen.final_dots == 1) => reached.expect("the final dot"),
    }
    session.release();
    assert_eq!((rig.pool.idle(), rig.pool.active()), (0, 0));
    held.notify_one();

    let mut session = rig.session().await;
    let failure = failure(rig.send(&mut session).await);
    assert_eq!(failure.reply().expect("its own reply").code, 554);
    assert_eq!(rig.server.connections(), 2);
}

#[tokio::test]
async fn a_session_that_is_dropped_is_closed() {
    let rig = Rig::new(LIMITS, |_| {}).await;
    let mut session = rig.session().await;
    assert_accepted(&rig.send(&mut session).await);
    drop(session);
    assert_eq!((rig.pool.idle(), rig.pool.active()), (0, 0));
    rig.all_closed().await;
}

#[tokio::test]
async fn a_session_is_closed_politely_after_so_many_messages() {
    let rig =
        Rig::new(PoolLimits { max_sessions: 256, max_messages_per_connection: 2, ..LIMITS }, |_| {}).await;
    for _ in 0..3 {
        rig.send_and_release().await;
    }
    assert_eq!(rig.server.messages().iter().map(|m| m.session).collect::<Vec<_>>(), [0, 0, 1]);
    rig.server
        .wait_for(LIMIT, |seen| seen.count("QUIT") == 1 && seen.open_sessions() == 1)
        .await
        .expect("QUIT");
}

#[tokio::test]
async fn an_idle_session_is_closed_politely_after_its_time() {
    let rig = Rig::new(PoolLimits { max_sessions: 256, idle_timeout: SHORT, ..LIMITS }, |_| {}).await;
    rig.send_and_release().await;
    rig.server.wait_for(LIMIT, |seen| seen.count("QUIT") == 1).await.expect("QUIT");
    rig.all_closed().await;
    assert_eq!(rig.pool.idle(), 0);
}

#[tokio::test]
async fn a_forgotten_destination_keeps_no_session() {
    let rig = Rig::new(LIMITS, |_| {}).await;
    let in_use = rig.session().await;
    rig.send_and_release().await;
    rig.pool.forget(&organization());
    assert_eq!((rig.pool.idle(), rig.pool.active()), (0, 1));
    in_use.release();
    assert_eq!((rig.pool.idle(), rig.pool.active()), (0, 0));
    rig.server.wait_for(LIMIT, |seen| seen.count("QUIT") == 2).await.expect("QUIT");
    rig.all_closed().await;
}

#[tokio::test]
async fn closing_the_pool_says_goodbye_within_its_limit() {
    let rig = Rig::new(LIMITS, |_| {}).await;
    let in_use = rig.session().await;
    rig.send_and_release().await;
    rig.pool.close_all(LIMIT).await;
    assert_eq!(rig.server.seen(|seen| seen.count("QUIT")), 1);
    in_use.release();
    rig.all_closed().await;

    let rig = Rig::new(LIMITS, |b| b.rule(Rule::new(Stage::Quit, Action::Silence))).await;
    rig.send_and_release().await;
    let limit = Duration::from_millis(50);
    tokio::time::timeout(LIMIT, rig.pool.close_all(limit)).await.expect("an end");
    rig.all_closed().await;
}

#[tokio::test]
async fn a_server_that_takes_few_messages_per_session_gets_them_all() {
    let rig = Rig::new(LIMITS, |b| b.closes_after_messages = Some(1)).await;
    for sent in 1..=3 {
        rig.send_and_release().await;
        rig.server.wait_for(LIMIT, |seen| seen.open_sessions() == 0).await.expect("closed");
        assert_eq!(rig.server.messages().len(), sent);
    }
    let rig = Rig::new(LIMITS, |b| b.messages_per_session = Some(1)).await;
    rig.send_and_release().await;
    let mut session = rig.session().await;
    let failure = failure(rig.send(&mut session).await);
    assert_eq!((failure.phase, failure.reused), (Phase::Mail, true));
    assert_eq!(failure.reply().expect("a reply").code, 421);
}
