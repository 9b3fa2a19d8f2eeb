//! SMTP servers for the scenarios that smtp-sink cannot play: slow, silent or deferring ones, and such as note when they
//! accepted what. In a process of its own, so that its processor time is nobody else's.
//! Guarantee: a command is answered no sooner than its delay after it came; what was sent in one go is answered in one go.
//!
//! Arguments: one for each server, `ok`, `defer` or `silent`, with `:MILLISECONDS` for the delay. The first line it prints
//! are their ports, each further one an accepted message: server, recipient's local part, microseconds of the clock, bytes.

use std::io::Write;
use std::time::Duration;

use anyhow::{Context, bail};
use sendoff::clock::Clock;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;

use super::broker::micros;

/// How long accepted messages are kept before they are told.
const TELL_EVERY: Duration = Duration::from_millis(5);

#[derive(Clone, Copy, PartialEq, Eq)]
enum Manner {
    /// Accepts everything.
    Ok,
    /// Answers each recipient with 451.
    Defer,
    /// Accepts the connection and never speaks.
    Silent,
}

/// Serves until its standard input is closed, that is until the harness has ended.
pub async fn run(arguments: &[String]) -> anyhow::Result<()> {
    let (sender, receiver) = mpsc::unbounded_channel();
    let mut ports = Vec::new();
    for (number, argument) in arguments.iter().enumerate() {
        let (manner, delay) = argument.split_once(':').unwrap_or((argument, "0"));
        let manner = match manner {
            "ok" => Manner::Ok,
            "defer" => Manner::Defer,
            "silent" => Manner::Silent,
            _ => bail!("{argument}: not ok, defer or silent"),
        };
        let delay = Duration::from_millis(delay.parse().context("the delay")?);
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        ports.push(listener.local_addr()?.port().to_string());
        tokio::spawn(accept(listener, number, manner, delay, sender.clone()));
    }
    say(&format!("{}\n", ports.join(" ")))?;
    let harness = tokio::task::spawn_blocking(|| std::io::copy(&mut std::io::stdin(), &mut std::io::sink()));
    tokio::select! {
        told = tell(receiver) => told,
        _ = harness => Ok(()),
    }
}

async fn tell(mut accepted: mpsc::UnboundedReceiver<String>) -> anyhow::Result<()> {
    let mut lines = Vec::new();
    while accepted.recv_many(&mut lines, 10_000).await > 0 {
        say(&lines.concat())?;
        lines.clear();
        tokio::time::sleep(TELL_EVERY).await;
    }
    Ok(())
}

fn say(text: &str) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}

async fn accept(
    listener: TcpListener,
    number: usize,
    manner: Manner,
    delay: Duration,
    told: mpsc::UnboundedSender<String>,
) {
    let mut silent = Vec::new();
    while let Ok((stream, _)) = listener.accept().await {
        if manner == Manner::Silent {
            silent.push(stream);
            continue;
        }
        let session = Session {
            manner,
            delay,
            number,
            told: told.clone(),
            clock: Clock::system(),
            recipient: String::new(),
            state: State::Command,
            body: 0,
        };
        tokio::spawn(async move {
            // A client may go whenever it likes.
            let _ = session.serve(stream).await;
        });
    }
}

enum State {
    Command,
    /// So many further lines of an AUTH exchange.
    Login(u8),
    Data,
}

struct Session {
    manner: Manner,
    delay: Duration,
    number: usize,
    told: mpsc::UnboundedSender<String>,
    clock: Clock,
    recipient: String,
    state: State,
    /// Bytes of the message so far.
    body: usize,
}

impl Session {
    async fn serve(mut self, mut stream: TcpStream) -> std::io::Result<()> {
        stream.set_nodelay(true)?;
        self.pause().await;
        stream.write_all(b"220 sink.example ESMTP\r\n").await?;
        let mut input = Vec::with_capacity(16 << 10);
        loop {
            if stream.read_buf(&mut input).await? == 0 {
                return Ok(());
            }
            let mut replies = String::new();
            let mut accepted = 0_usize;
            let mut quit = false;
            while let Some(taken) = self.take(&input, &mut replies, &mut accepted, &mut quit) {
                input.drain(..taken);
            }
            if replies.is_empty() {
                continue;
            }
            self.pause().await;
            if accepted > 0 {
                let (number, at, bytes) = (self.number, micros(&self.clock), self.body);
                // The harness has gone when nobody listens any more.
                let _ = self.told.send(format!("{number} {} {at} {bytes}\n", self.recipient));
            }
            stream.write_all(replies.as_bytes()).await?;
            if quit {
                return Ok(());
            }
        }
    }

    async fn pause(&self) {
        if !self.delay.is_zero() {
            tokio::time::sleep(self.delay).await;
        }
    }

    /// Takes a command, or what there is of a message, from the front; says how many bytes that were, none when more is needed.
    fn take(
        &mut self,
        input: &[u8],
        replies: &mut String,
        accepted: &mut usize,
        quit: &mut bool,
    ) -> Option<usize> {
        if matches!(self.state, State::Data) {
            let end = find(input, b"\r\n.\r\n")?;
            self.body = end + 2;
            self.state = State::Command;
            *accepted += 1;
            replies.push_str("250 2.0.0 Ok: queued\r\n");
            return Some(end + 5);
        }
        let end = find(input, b"\r\n")?;
        let line = String::from_utf8_lossy(&input[..end]);
        let verb = line.get(..4).unwrap_or_default().to_ascii_uppercase();
        let reply = match (&self.state, verb.as_str()) {
            (State::Login(left), _) => self.login(*left),
            (_, "EHLO") => {
                "250-sink.example\r\n250-PIPELINING\r\n250-8BITMIME\r\n250-ENHANCEDSTATUSCODES\r\n250-SIZE 10485760\r\n\
                 250 AUTH PLAIN LOGIN\r\n"
            }
            (_, "AUTH") => {
                let plain = line.get(5..10).is_some_and(|name| name.eq_ignore_ascii_case("PLAIN"));
                let initial = line.split_whitespace().count() > 2;
                self.login(u8::from(!plain) + u8::from(!initial))
            }
            (_, "MAIL") => "250 2.1.0 Ok\r\n",
            (_, "RCPT") if self.manner == Manner::Defer => {
                self.recipient.clear();
                "451 4.7.1 Try again later\r\n"
            }
            (_, "RCPT") => {
                let address = line.split_once('<').map_or("", |(_, rest)| rest);
                self.recipient = address.split('@').next().unwrap_or_default().to_owned();
                "250 2.1.5 Ok\r\n"
            }
            (_, "DATA") if self.recipient.is_empty() => "503 5.5.1 No recipient\r\n",
            (_, "DATA") => {
                self.state = State::Data;
                "354 Go ahead\r\n"
            }
            (_, "QUIT") => {
                *quit = true;
                "221 2.0.0 Bye\r\n"
            }
            (_, "RSET" | "NOOP" | "HELO") => "250 2.0.0 Ok\r\n",
            _ => "500 5.5.2 What?\r\n",
        };
        replies.push_str(reply);
        Some(end + 2)
    }

    /// The answer of an AUTH exchange in which so many lines are still to come.
    fn login(&mut self, left: u8) -> &'static str {
        if left == 0 {
            self.state = State::Command;
            return "235 2.7.0 Welcome\r\n";
        }
        self.state = State::Login(left - 1);
        "334 VXNlcm5hbWU6\r\n"
    }
}

fn find(input: &[u8], what: &[u8]) -> Option<usize> {
    input.windows(what.len()).position(|window| window == what)
}
