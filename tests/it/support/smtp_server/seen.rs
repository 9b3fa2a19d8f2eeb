//! What the server has seen: messages, connections, commands.
//! Guarantee: messages are kept byte for byte, passwords apart from the commands.

use std::fmt;
use std::net::SocketAddr;
use std::time::Instant;

/// A message that the server took.
#[derive(Debug, Clone)]
pub struct Received {
    /// Envelope sender.
    pub from: String,
    /// What followed the sender in MAIL, say `SIZE=100 SMTPUTF8`.
    pub mail_parameters: String,
    /// Envelope recipients that were accepted, in order.
    pub recipients: Vec<String>,
    /// The message without its dot stuffing, with the CRLF before the final dot.
    pub data: Vec<u8>,
    /// Number of the session, from 0.
    pub session: usize,
    /// Which transaction of its session it was, from 1.
    pub transaction: usize,
    /// Version of TLS, say `TLSv1_3`; none for plaintext.
    pub tls: Option<String>,
    /// Where the client came from.
    pub peer: SocketAddr,
    /// Who logged in.
    pub username: Option<String>,
    /// When the final dot came.
    pub at: Instant,
    /// Whether a reply was given to the final dot.
    pub answered: bool,
}

impl Received {
    /// The message as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.data).into_owned()
    }
}

/// What happened in one connection.
#[derive(Debug, Clone)]
pub struct Session {
    /// Where the client came from.
    pub peer: SocketAddr,
    /// Every command line as it came, AUTH without its payload.
    pub commands: Vec<String>,
    /// What the client sent in AUTH, decoded: `\0user\0password` for PLAIN, one item per line for LOGIN.
    pub auth_payloads: Vec<String>,
    /// Version of TLS.
    pub tls: Option<String>,
    /// Name asked for in the handshake.
    pub sni: Option<String>,
    /// The handshake resumed an earlier session.
    pub resumed: bool,
    /// Messages taken.
    pub messages: usize,
    /// Commands that came ahead of a reply although PIPELINING was not offered.
    pub ahead_of_reply: usize,
    /// Bytes of unfinished messages.
    pub body_bytes_lost: usize,
    /// The connection has ended.
    pub closed: bool,
}

/// Everything that was seen so far.
#[derive(Debug, Default)]
pub struct Seen {
    /// Messages taken, in order.
    pub messages: Vec<Received>,
    /// Connections, in order of acceptance.
    pub sessions: Vec<Session>,
    /// Messages taken, also counted without `records`.
    pub message_count: usize,
    /// Messages whose final dot came, taken or not.
    pub final_dots: usize,
    /// AUTH commands.
    pub auth_attempts: usize,
    /// Connections and messages beyond what may be.
    pub over_limit: usize,
}

impl Seen {
    /// Connections that are open.
    pub fn open_sessions(&self) -> usize {
        self.sessions.iter().filter(|session| !session.closed).count()
    }

    /// Connections that are open and have not said goodbye.
    pub fn staying_sessions(&self) -> usize {
        let stays = |session: &&Session| {
            !session.closed
                && !session.commands.last().is_some_and(|command| command.eq_ignore_ascii_case("QUIT"))
        };
        self.sessions.iter().filter(stays).count()
    }

    /// How often a command came, by its verb, in all sessions.
    pub fn count(&self, verb: &str) -> usize {
        let is_verb = |command: &&String| {
            command.split([' ', ':']).next().is_some_and(|v| v.eq_ignore_ascii_case(verb))
        };
        self.sessions.iter().flat_map(|session| &session.commands).filter(is_verb).count()
    }
}

/// The condition did not come true in time; shows what was seen instead.
pub struct TimedOut(pub(super) String);

impl fmt::Debug for TimedOut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the SMTP server waited in vain; it saw {}", self.0)
    }
}
