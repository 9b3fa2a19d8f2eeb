//! A scripted SMTP server on 127.x: it behaves, until a rule says how it misbehaves.
//! Guarantee: what it took is recorded byte for byte, and every change can be waited for.
#![allow(dead_code, unused_imports, reason = "each program that includes this file uses a part of it")]

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};

// The paths hold for whoever includes this file by its path, too.
#[path = "smtp_server/dialogue.rs"]
mod dialogue;
#[path = "smtp_server/script.rs"]
mod script;
#[path = "smtp_server/seen.rs"]
mod seen;

pub use script::{Action, Behaviour, Moment, Rule, Stage, Tls};
pub use seen::{Received, Seen, Session, TimedOut};

struct Shared {
    behaviour: Mutex<Behaviour>,
    seen: Mutex<Seen>,
    changed: watch::Sender<()>,
    hang_up: watch::Sender<Vec<u8>>,
}

impl Shared {
    fn behaviour(&self) -> MutexGuard<'_, Behaviour> {
        self.behaviour.lock().expect("no panic holds it")
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().expect("no panic holds it")
    }

    fn note(&self, change: impl FnOnce(&mut Seen)) {
        change(&mut self.seen());
        self.changed.send_replace(());
    }
}

/// A running server; dropping it ends it and all of its connections.
pub struct SmtpServer {
    address: SocketAddr,
    shared: Arc<Shared>,
    accepting: JoinHandle<()>,
}

impl Drop for SmtpServer {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

impl SmtpServer {
    /// Starts on 127.0.0.1 and a free port.
    pub async fn start(configure: impl FnOnce(&mut Behaviour)) -> Self {
        Self::start_at(SocketAddr::from(([127, 0, 0, 1], 0)), configure).await
    }

    /// Starts on a chosen address; port 0 takes a free one.
    pub async fn start_at(address: SocketAddr, configure: impl FnOnce(&mut Behaviour)) -> Self {
        let mut behaviour = Behaviour::default();
        configure(&mut behaviour);
        let listener = TcpListener::bind(address).await.expect("a free port");
        let address = listener.local_addr().expect("bound");
        let shared = Arc::new(Shared {
            behaviour: Mutex::new(behaviour),
            seen: Mutex::default(),
            changed: watch::Sender::new(()),
            hang_up: watch::Sender::new(Vec::new()),
        });
        let accepting = tokio::spawn(accept(listener, shared.clone()));
        Self { address, shared, accepting }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The port of [`SmtpServer::address`].
    pub fn port(&self) -> u16 {
        self.address.port()
    }

    /// Changes how it behaves from here on.
    pub fn change(&self, change: impl FnOnce(&mut Behaviour)) {
        change(&mut self.shared.behaviour());
    }

    /// Adds a rule.
    pub fn rule(&self, rule: Rule) {
        self.change(|behaviour| behaviour.rule(rule));
    }

    /// Ends every connection that waits for a command, with these bytes said before.
    pub fn hang_up(&self, last_words: &str) {
        self.shared.hang_up.send_replace(last_words.as_bytes().to_vec());
    }

    /// Looks at what was seen.
    pub fn seen<T>(&self, look: impl FnOnce(&Seen) -> T) -> T {
        look(&self.shared.seen())
    }

    /// The messages taken so far.
    pub fn messages(&self) -> Vec<Received> {
        self.seen(|seen| seen.messages.clone())
    }

    /// The connections so far.
    pub fn sessions(&self) -> Vec<Session> {
        self.seen(|seen| seen.sessions.clone())
    }

    /// How many connections were accepted.
    pub fn connections(&self) -> usize {
        self.seen(|seen| seen.sessions.len())
    }

    /// Waits until the condition holds.
    pub async fn wait_for(&self, limit: Duration, condition: impl Fn(&Seen) -> bool) -> Result<(), TimedOut> {
        let mut changes = self.shared.changed.subscribe();
        let wait = async {
            while !self.seen(&condition) {
                changes.changed().await.expect("the sender lives as long as the server");
            }
        };
        match tokio::time::timeout(limit, wait).await {
            Ok(()) => Ok(()),
            Err(_) => Err(TimedOut(self.seen(|seen| format!("{:?}", seen.sessions)))),
        }
    }

    /// Waits for so many messages and returns all there are.
    pub async fn wait_for_messages(&self, count: usize, limit: Duration) -> Result<Vec<Received>, TimedOut> {
        self.wait_for(limit, |seen| seen.message_count >= count).await?;
        Ok(self.messages())
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let Ok((stream, peer)) = accepted else { continue };
                let number = shared.seen().sessions.len();
                shared.note(|seen| seen.sessions.push(Session {
                    peer,
                    commands: Vec::new(),
                    auth_payloads: Vec::new(),
                    tls: None,
                    sni: None,
                    resumed: false,
                    messages: 0,
                    ahead_of_reply: 0,
                    body_bytes_lost: 0,
                    closed: false,
                }));
                connections.spawn(dialogue::serve(shared.clone(), stream, peer, number));
            }
            Some(_) = connections.join_next() => {}
        }
    }
}
