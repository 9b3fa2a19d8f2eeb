//! One connection's dialogue.
//! Guarantee: replies go out when the client has to read them, so a pipelining client meets a server that pipelines too.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::Shared;
use super::script::{Action, Moment, Stage, Tls};
use super::seen::{Received, Seen};

pub(super) async fn serve(shared: Arc<Shared>, stream: TcpStream, peer: SocketAddr, number: usize) {
    stream.set_nodelay(true).ok();
    let mut hang_up = shared.hang_up.subscribe();
    hang_up.mark_unchanged();
    let mut dialogue = Dialogue {
        hang_up,
        shared: shared.clone(),
        wire: Wire::Plain(stream),
        inbox: Vec::new(),
        read_to: 0,
        outbox: Vec::new(),
        peer,
        number,
        tls: None,
        username: None,
        transaction: Transaction::default(),
        transactions: 0,
        messages: 0,
        passed: [0; STAGES],
    };
    let _ = dialogue.run().await;
    drop(dialogue);
    shared.note(|seen| seen.sessions[number].closed = true);
}

enum Wire {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
    Gone,
}

impl Wire {
    async fn read(&mut self, into: &mut Vec<u8>) -> io::Result<usize> {
        match self {
            Self::Plain(stream) => stream.read_buf(into).await,
            Self::Tls(stream) => stream.read_buf(into).await,
            Self::Gone => Ok(0),
        }
    }

    async fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Plain(stream) => stream.write_all(bytes).await,
            Self::Tls(stream) => {
                stream.write_all(bytes).await?;
                stream.flush().await
            }
            Self::Gone => Err(io::ErrorKind::NotConnected.into()),
        }
    }
}

/// The connection is over.
struct End;

impl From<io::Error> for End {
    fn from(_: io::Error) -> Self {
        Self
    }
}

const STAGES: usize = Stage::Quit as usize + 1;

#[derive(Default)]
struct Transaction {
    from: Option<String>,
    parameters: String,
    recipients: Vec<String>,
    recipients_asked: usize,
}

struct Dialogue {
    shared: Arc<Shared>,
    hang_up: watch::Receiver<Vec<u8>>,
    wire: Wire,
    inbox: Vec<u8>,
    read_to: usize,
    outbox: Vec<u8>,
    peer: SocketAddr,
    number: usize,
    tls: Option<String>,
    username: Option<String>,
    transaction: Transaction,
    transactions: usize,
    messages: usize,
    passed: [usize; STAGES],
}

impl Dialogue {
    async fn run(&mut self) -> Result<(), End> {
        let implicit = match &self.shared.behaviour().tls {
            Tls::Implicit(config) => Some(config.clone()),
            _ => None,
        };
        if let Some(config) = implicit {
            self.take_up_tls(config).await?;
        }
        let (banner, most) = {
            let behaviour = self.shared.behaviour();
            (behaviour.banner, behaviour.most_connections)
        };
        if most.is_some_and(|most| self.shared.seen().staying_sessions() > most) {
            self.shared.note(|seen| seen.over_limit += 1);
            self.reply("421 4.7.0 too many connections")?;
            self.flush().await?;
            return Err(End);
        }
        self.pass(Stage::Banner, "", banner).await?;
        loop {
            let line = self.line().await?;
            self.command(&line).await?;
        }
    }

    async fn command(&mut self, line: &str) -> Result<(), End> {
        let (verb, argument) = line.split_once(' ').unwrap_or((line, ""));
        let verb = verb.to_ascii_uppercase();
        self.log(if verb == "AUTH" { line.split_inclusive(' ').take(2).collect() } else { line.to_owned() });
        match verb.as_str() {
            "EHLO" => self.ehlo(argument).await,
            "HELO" => self.pass(Stage::Ehlo, argument, "250 mail.test").await.map(drop),
            "STARTTLS" => self.starttls().await,
            "AUTH" => self.auth(argument).await,
            "RSET" => {
                self.transaction = Transaction::default();
                self.pass(Stage::Rset, "", "250 2.0.0 forgotten").await.map(drop)
            }
            "MAIL" => self.mail(argument).await,
            "RCPT" => self.rcpt(argument).await,
            "DATA" => self.data().await,
            "NOOP" => self.reply("250 2.0.0 yes"),
            "QUIT" => {
                self.pass(Stage::Quit, "", "221 2.0.0 bye").await?;
                self.flush().await?;
                Err(End)
            }
            _ => self.reply("500 5.5.1 what?"),
        }
    }

    async fn ehlo(&mut self, argument: &str) -> Result<(), End> {
        self.transaction = Transaction::default();
        let reply = self.ehlo_reply();
        self.pass(Stage::Ehlo, argument, &reply).await.map(drop)
    }

    fn ehlo_reply(&self) -> String {
        let behaviour = self.shared.behaviour();
        let mut keywords: Vec<String> = vec!["8BITMIME".into(), "ENHANCEDSTATUSCODES".into()];
        if behaviour.pipelining {
            keywords.push("PIPELINING".into());
        }
        if let Some(size) = behaviour.size {
            keywords.push(format!("SIZE {size}"));
        }
        if behaviour.smtputf8 {
            keywords.push("SMTPUTF8".into());
        }
        let encrypted = self.tls.is_some();
        if matches!(behaviour.tls, Tls::Starttls(_)) && !encrypted {
            keywords.push("STARTTLS".into());
        }
        if (encrypted || behaviour.auth_in_clear) && !behaviour.mechanisms.is_empty() {
            keywords.push(format!("AUTH {}", behaviour.mechanisms.join(" ")));
        }
        keywords.extend(behaviour.more_keywords.iter().map(|keyword| (*keyword).to_owned()));
        if behaviour.lower_case {
            keywords.iter_mut().for_each(|keyword| keyword.make_ascii_lowercase());
        }
        let mut reply = String::from("250-mail.test");
        for (index, keyword) in keywords.iter().enumerate() {
            let separator = if index + 1 == keywords.len() { ' ' } else { '-' };
            reply.push_str(&format!("\r\n250{separator}{keyword}"));
        }
        reply
    }

    async fn starttls(&mut self) -> Result<(), End> {
        let config = match &self.shared.behaviour().tls {
            Tls::Starttls(config) if self.tls.is_none() => Some(config.clone()),
            _ => None,
        };
        let Some(config) = config else {
            return self.reply("503 5.5.1 no TLS here");
        };
        if self.pass(Stage::Starttls, "", "220 2.0.0 go").await? {
            self.flush().await?;
            self.take_up_tls(config).await?;
        }
        Ok(())
    }

    async fn take_up_tls(&mut self, config: Arc<rustls::ServerConfig>) -> Result<(), End> {
        let Wire::Plain(stream) = std::mem::replace(&mut self.wire, Wire::Gone) else {
            return Err(End);
        };
        self.inbox.clear();
        self.read_to = 0;
        let stream = TlsAcceptor::from(config).accept(stream).await?;
        let connection = stream.get_ref().1;
        self.tls = connection.protocol_version().map(|version| format!("{version:?}"));
        let (tls, sni) = (self.tls.clone(), connection.server_name().map(str::to_owned));
        let resumed = connection.handshake_kind() == Some(rustls::HandshakeKind::Resumed);
        self.wire = Wire::Tls(Box::new(stream));
        let number = self.number;
        self.shared.note(|seen| {
            seen.sessions[number].tls = tls;
            seen.sessions[number].sni = sni;
            seen.sessions[number].resumed = resumed;
        });
        Ok(())
    }

    async fn auth(&mut self, argument: &str) -> Result<(), End> {
        self.shared.note(|seen| seen.auth_attempts += 1);
        let (mechanism, initial) = argument.split_once(' ').unwrap_or((argument, ""));
        let (offered, login, wrong_login) = {
            let behaviour = self.shared.behaviour();
            let clear = self.tls.is_some() || behaviour.auth_in_clear;
            let offered = clear && behaviour.mechanisms.iter().any(|m| m.eq_ignore_ascii_case(mechanism));
            (offered, behaviour.login.clone(), behaviour.wrong_login)
        };
        if !offered {
            return self.reply("504 5.5.4 no such mechanism");
        }
        if !initial.is_empty() {
            self.log_payload(initial);
        }
        if let Some(action) = self.action(Stage::Auth, mechanism) {
            if self.act(Stage::Auth, action, "235 2.7.0 welcome").await? {
                self.username = Some(decoded(initial).split('\0').nth(1).unwrap_or_default().to_owned());
            }
            return Ok(());
        }
        let (username, password) = match mechanism.to_ascii_uppercase().as_str() {
            "PLAIN" => {
                let payload = if initial.is_empty() { self.ask("").await? } else { decoded(initial) };
                let mut parts = payload.split('\0').skip(1).map(str::to_owned);
                (parts.next().unwrap_or_default(), parts.next().unwrap_or_default())
            }
            _ => (self.ask("Username:").await?, self.ask("Password:").await?),
        };
        let right = login.is_none_or(|(user, pass)| user == username && pass == password);
        if !right {
            return self.reply(wrong_login);
        }
        self.username = Some(username);
        self.reply("235 2.7.0 welcome")
    }

    async fn ask(&mut self, prompt: &str) -> Result<String, End> {
        self.reply(&format!("334 {}", BASE64.encode(prompt)))?;
        let line = self.line().await?;
        if line == "*" {
            return Ok(String::new());
        }
        self.log_payload(&line);
        Ok(decoded(&line))
    }

    async fn mail(&mut self, argument: &str) -> Result<(), End> {
        let Some((address, parameters)) = path(argument, "FROM:") else {
            return self.reply("501 5.5.4 MAIL FROM:<address>");
        };
        let (needs_login, over, limit, smtputf8) = {
            let behaviour = self.shared.behaviour();
            let over = behaviour.messages_per_session.is_some_and(|limit| self.messages >= limit);
            (behaviour.login.is_some() && self.username.is_none(), over, behaviour.size, behaviour.smtputf8)
        };
        if over {
            self.reply("421 4.7.0 enough messages for one connection")?;
            self.flush().await?;
            return Err(End);
        }
        if needs_login {
            return self.reply("530 5.7.0 log in first");
        }
        let size = parameters.split(' ').find_map(|p| p.strip_prefix("SIZE=")?.parse::<usize>().ok());
        if size.zip(limit).is_some_and(|(size, limit)| size > limit) {
            return self.reply("552 5.3.4 too large");
        }
        if parameters.split(' ').any(|p| p == "SMTPUTF8") && !smtputf8 {
            return self.reply("555 5.6.7 no SMTPUTF8 here");
        }
        self.transaction = Transaction::default();
        if self.pass(Stage::Mail, address, "250 2.1.0 sender ok").await? {
            self.transactions += 1;
            self.transaction.from = Some(address.to_owned());
            self.transaction.parameters = parameters.to_owned();
        }
        Ok(())
    }

    async fn rcpt(&mut self, argument: &str) -> Result<(), End> {
        let Some((address, _)) = path(argument, "TO:") else {
            return self.reply("501 5.5.4 RCPT TO:<address>");
        };
        if self.transaction.from.is_none() {
            return self.reply("503 5.5.1 MAIL first");
        }
        self.transaction.recipients_asked += 1;
        let (sender_refused, full) = {
            let behaviour = self.shared.behaviour();
            let full = behaviour.max_recipients.is_some_and(|max| self.transaction.recipients.len() >= max);
            (behaviour.sender_refused_at_rcpt.clone(), full)
        };
        if let Some(refusal) = sender_refused {
            return self.reply(&refusal);
        }
        if full {
            return self.reply("452 4.5.3 too many recipients");
        }
        if self.pass(Stage::Rcpt, address, "250 2.1.5 recipient ok").await? {
            self.transaction.recipients.push(address.to_owned());
        }
        Ok(())
    }

    async fn data(&mut self) -> Result<(), End> {
        let lax = self.shared.behaviour().data_without_recipients;
        if self.transaction.recipients.is_empty() && !lax {
            return self.reply("554 5.5.1 no valid recipients");
        }
        if !self.pass(Stage::Data, "", "354 go on, end with a dot").await? {
            return Ok(());
        }
        let data = self.body().await?;
        let transaction = std::mem::take(&mut self.transaction);
        if transaction.recipients.is_empty() {
            return self.reply("554 5.5.1 no valid recipients");
        }
        self.final_dot(transaction, data).await
    }

    async fn final_dot(&mut self, transaction: Transaction, data: Vec<u8>) -> Result<(), End> {
        let at = Instant::now();
        self.shared.note(|seen| seen.final_dots += 1);
        let most = self.shared.behaviour().most_messages;
        let is_over = |most: (usize, Duration), seen: &Seen| {
            seen.messages.iter().filter(|message| at.duration_since(message.at) < most.1).count() >= most.0
        };
        if most.is_some_and(|most| is_over(most, &self.shared.seen())) {
            self.shared.note(|seen| seen.over_limit += 1);
            return self.reply("451 4.7.0 too many messages in this time");
        }
        let answered = match self.action(Stage::FinalDot, "") {
            Some(Action::AcceptThenClose) => false,
            Some(action) => {
                let accepted = self.act(Stage::FinalDot, action, "250 2.0.0 taken").await?;
                if !accepted {
                    return Ok(());
                }
                true
            }
            None => {
                self.reply("250 2.0.0 taken")?;
                true
            }
        };
        self.messages += 1;
        self.record(transaction, data, at, answered);
        let full = self.shared.behaviour().closes_after_messages.is_some_and(|limit| self.messages >= limit);
        if full {
            self.flush().await?;
        }
        if full || !answered { Err(End) } else { Ok(()) }
    }

    fn record(&self, transaction: Transaction, data: Vec<u8>, at: Instant, answered: bool) {
        let records = self.shared.behaviour().records;
        let received = Received {
            from: transaction.from.unwrap_or_default(),
            mail_parameters: transaction.parameters,
            recipients: transaction.recipients,
            data,
            session: self.number,
            transaction: self.transactions,
            tls: self.tls.clone(),
            peer: self.peer,
            username: self.username.clone(),
            at,
            answered,
        };
        self.shared.note(|seen| {
            seen.message_count += 1;
            seen.sessions[self.number].messages += 1;
            if records {
                seen.messages.push(received);
            }
        });
    }

    /// Reads up to the final dot; returns the message without dot stuffing.
    async fn body(&mut self) -> Result<Vec<u8>, End> {
        let action = self.action(Stage::Body, "");
        self.flush().await?;
        if let Some(Action::Reply(reply)) = &action {
            self.wire.write(&[reply, &b"\r\n"[..]].concat()).await?;
        }
        let start = self.read_to;
        let mut searched = start;
        let end = loop {
            if let Some(end) = end_of_body(&self.inbox, start, searched) {
                break end;
            }
            searched = self.inbox.len().saturating_sub(4).max(start);
            let came = self.inbox.len() - start;
            let number = self.number;
            self.shared.note(|seen| seen.sessions[number].body_bytes_lost = came);
            match &action {
                Some(Action::CloseAfterBytes(bytes)) if came >= *bytes => return Err(End),
                Some(Action::Silence) => std::future::pending().await,
                Some(Action::ReplyThenClose(reply)) => {
                    self.wire.write(reply).await?;
                    self.wire.write(b"\r\n").await?;
                    return Err(End);
                }
                _ => {}
            }
            if self.wire.read(&mut self.inbox).await? == 0 {
                return Err(End);
            }
        };
        let data = without_dot_stuffing(&self.inbox[start..end]);
        self.inbox.drain(..end + 3);
        self.read_to = 0;
        let number = self.number;
        self.shared.seen().sessions[number].body_bytes_lost = 0;
        Ok(data)
    }

    /// Gives the stage's reply, or what a rule makes of it; whether the command takes effect.
    async fn pass(&mut self, stage: Stage, argument: &str, usual: &str) -> Result<bool, End> {
        match self.action(stage, argument) {
            Some(action) => self.act(stage, action, usual).await,
            None => self.reply(usual).map(|()| true),
        }
    }

    fn action(&mut self, stage: Stage, argument: &str) -> Option<Action> {
        self.passed[stage as usize] += 1;
        let nth = match stage {
            Stage::Rcpt => self.transaction.recipients_asked,
            _ => self.passed[stage as usize],
        };
        let moment = Moment { stage, argument, nth, session: self.number };
        self.shared.behaviour().action_at(&moment)
    }

    async fn act(&mut self, stage: Stage, action: Action, usual: &str) -> Result<bool, End> {
        match action {
            Action::Reply(bytes) => {
                self.outbox.extend_from_slice(&bytes);
                self.outbox.extend_from_slice(b"\r\n");
                return Ok(matches!(bytes.first(), Some(b'2' | b'3')));
            }
            Action::ReplyThenClose(bytes) => {
                self.outbox.extend_from_slice(&bytes);
                self.outbox.extend_from_slice(b"\r\n");
                self.flush().await?;
                return Err(End);
            }
            Action::Close | Action::AcceptThenClose | Action::CloseAfterBytes(_) => {
                self.flush().await?;
                return Err(End);
            }
            Action::Silence => return self.say_nothing().await,
            Action::Drip(bytes, interval) => {
                self.flush().await?;
                for byte in bytes.iter().chain(b"\r\n") {
                    self.wire.write(&[*byte]).await?;
                    tokio::time::sleep(interval).await;
                }
                return Ok(matches!(bytes.first(), Some(b'2' | b'3')));
            }
            Action::HugeLine(length) => return self.huge_line(stage, length).await,
            Action::EndlessReply => {
                self.flush().await?;
                loop {
                    self.wire.write(b"250-more\r\n".repeat(100).as_slice()).await?;
                }
            }
            Action::After(while_) => {
                self.flush().await?;
                tokio::time::sleep(while_).await;
                self.reply(usual)?;
            }
            Action::Hold(until) => {
                self.flush().await?;
                until.notified().await;
                self.reply(usual)?;
            }
            Action::Inject(bytes) => {
                self.reply(usual)?;
                self.outbox.extend_from_slice(&bytes);
            }
        }
        Ok(true)
    }

    async fn say_nothing(&mut self) -> Result<bool, End> {
        self.flush().await?;
        loop {
            self.inbox.clear();
            self.read_to = 0;
            if self.wire.read(&mut self.inbox).await? == 0 {
                return Err(End);
            }
        }
    }

    async fn huge_line(&mut self, stage: Stage, length: usize) -> Result<bool, End> {
        self.flush().await?;
        let chunk = vec![b'x'; 64 << 10];
        self.wire.write(if stage == Stage::Banner { b"220 " } else { b"250 " }).await?;
        let mut left = length;
        while left > 0 {
            let part = left.min(chunk.len());
            self.wire.write(&chunk[..part]).await?;
            left -= part;
        }
        self.wire.write(b"\r\n").await?;
        Ok(true)
    }

    fn reply(&mut self, text: &str) -> Result<(), End> {
        self.outbox.extend_from_slice(text.as_bytes());
        self.outbox.extend_from_slice(b"\r\n");
        Ok(())
    }

    async fn flush(&mut self) -> Result<(), End> {
        if !self.outbox.is_empty() {
            self.wire.write(&self.outbox).await?;
            self.outbox.clear();
        }
        Ok(())
    }

    /// The next command line, without its end. Replies go out when the client has to read them: when nothing more of
    /// its commands is here.
    async fn line(&mut self) -> Result<String, End> {
        loop {
            let rest = &self.inbox[self.read_to..];
            if let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
                let line = String::from_utf8_lossy(&rest[..end]).trim_end_matches('\r').to_owned();
                self.read_to += end + 1;
                if self.read_to == self.inbox.len() {
                    self.inbox.clear();
                    self.read_to = 0;
                } else if !self.shared.behaviour().pipelining {
                    let number = self.number;
                    self.shared.note(|seen| seen.sessions[number].ahead_of_reply += 1);
                }
                return Ok(line);
            }
            self.flush().await?;
            tokio::select! {
                read = self.wire.read(&mut self.inbox) => {
                    if read? == 0 {
                        return Err(End);
                    }
                }
                changed = self.hang_up.changed() => {
                    let last_words = self.hang_up.borrow_and_update().clone();
                    if changed.is_ok() && !last_words.is_empty() {
                        self.wire.write(&last_words).await?;
                    }
                    return Err(End);
                }
            }
        }
    }

    fn log(&self, command: String) {
        if self.shared.behaviour().records {
            self.shared.note(|seen| seen.sessions[self.number].commands.push(command));
        }
    }

    fn log_payload(&self, base64: &str) {
        let payload = decoded(base64);
        self.shared.note(|seen| seen.sessions[self.number].auth_payloads.push(payload));
    }
}

fn decoded(base64: &str) -> String {
    BASE64.decode(base64).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
}

/// The address and what follows it, of `FROM:<a@b.c> SIZE=1`.
fn path<'a>(argument: &'a str, prefix: &str) -> Option<(&'a str, &'a str)> {
    let rest =
        argument.get(prefix.len()..).filter(|_| argument[..prefix.len()].eq_ignore_ascii_case(prefix))?;
    let (address, parameters) = rest.trim_start().strip_prefix('<')?.rsplit_once('>')?;
    Some((address, parameters.trim_start()))
}

/// Where the line of the lone dot begins.
fn end_of_body(inbox: &[u8], start: usize, searched: usize) -> Option<usize> {
    if inbox[start..].starts_with(b".\r\n") {
        return Some(start);
    }
    let from = searched.max(start);
    inbox[from..].windows(5).position(|window| window == b"\r\n.\r\n").map(|at| from + at + 2)
}

fn without_dot_stuffing(body: &[u8]) -> Vec<u8> {
    let mut data = Vec::with_capacity(body.len());
    for line in body.split_inclusive(|byte| *byte == b'\n') {
        data.extend_from_slice(line.strip_prefix(b".").unwrap_or(line));
    }
    data
}
