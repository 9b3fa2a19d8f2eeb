//! The guarded stream under the SMTP client: it reads whole replies within bounds and knows what was written.
//! Guarantee: a reply takes bounded memory whatever the server sends, its code survives bytes that are not UTF-8, and
//! it is always known whether the first byte of the final dot may have left.

use std::fmt;
use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use lettre::transport::smtp::client::AsyncTokioStream;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::Instant;
use tokio_rustls::client::TlsStream;

use super::conceal::Concealed;
use super::reply::{Inbox, RawReply, plain_form, protocol};
use crate::model::failure::{Fault, TlsFault};

/// Replies that may wait while we still write: enough for a thousand recipients in one pipelined envelope.
const INBOX_MAX: usize = 512 << 10;
const READ_CHUNK: usize = 4 << 10;
/// A message up to this size leaves in one write with its final dot: it fits into what the system buffers, so that its dot
/// would follow within microseconds anyway, and the server is woken once.
const HELD_MAX: usize = 32 << 10;

/// How long to wait for what.
#[derive(Debug, Clone, Copy)]
pub struct Deadlines {
    /// The connection, and the TLS handshake.
    pub connect: Duration,
    /// The banner and each reply, from its awaiting to its last byte.
    pub command: Duration,
    /// The message: longest time without progress.
    pub data: Duration,
    /// The reply to the final dot.
    pub final_reply: Duration,
}

/// The bytes' way.
pub(super) enum Io {
    /// In the clear.
    Plain(TcpStream),
    /// Encrypted.
    Tls(Box<TlsStream<TcpStream>>),
}

/// How far a message has left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Body {
    /// No message is under way.
    Off,
    /// Its bytes are being written.
    Sending,
    /// Every byte has been handed to the system, or is held; the final dot has not.
    Flushed,
    /// The final dot may have been handed to the system.
    Dotted,
}

/// One connection's guarded end.
pub(super) struct Channel {
    io: Io,
    /// What came and was not taken yet.
    inbox: Inbox,
    /// What the SMTP client has yet to read.
    handed: Vec<u8>,
    /// The client's own EHLO goes nowhere: it was sent before.
    swallows_ehlo: bool,
    /// The last complete reply, until it is taken.
    reply: Option<RawReply>,
    /// A write failed: what the server said before is read, then the channel is broken.
    is_dying: bool,
    /// Why nothing more can be done here.
    broken: Option<Fault>,
    body: Body,
    /// A small message that waits for its final dot.
    held: Vec<u8>,
    /// Whether what is written of the message may be held: nothing of it has left.
    holds: bool,
    /// Since when the reply is awaited, or the message makes no progress.
    since: Instant,
    /// What nothing that is shown of a reply may repeat.
    concealed: Option<Arc<Concealed>>,
}

impl Channel {
    /// An end whose replies show nothing of what is concealed.
    pub fn new(io: Io, concealed: Option<Arc<Concealed>>) -> Self {
        Self {
            io,
            inbox: Inbox::default(),
            handed: Vec::new(),
            swallows_ehlo: false,
            reply: None,
            is_dying: false,
            broken: None,
            body: Body::Off,
            held: Vec::new(),
            holds: false,
            since: Instant::now(),
            concealed,
        }
    }

    /// Gives the plain socket back, for TLS to be taken up on it.
    ///
    /// # Errors
    /// When bytes came behind the reply: they would be taken for encrypted ones (response injection).
    pub fn into_plain(self) -> Result<TcpStream, Fault> {
        match self.io {
            Io::Plain(stream) if self.inbox.is_empty() => Ok(stream),
            Io::Plain(_) => {
                let detail = "the server sent plaintext behind its answer to STARTTLS (response injection): someone \
                              may be tampering with the connection";
                Err(Fault::Tls { kind: TlsFault::Injection, detail: detail.to_owned() })
            }
            Io::Tls(_) => Err(protocol("TLS is already in use")),
        }
    }

    /// Sends a command line and reads its reply.
    pub async fn command(&mut self, line: &str) -> Result<RawReply, Fault> {
        if !self.inbox.is_empty() {
            return Err(protocol("the server spoke before it was asked"));
        }
        match self.write(line.as_bytes()).await {
            Ok(()) => self.read_reply().await,
            Err(_) => Err(poll_fn(|cx| self.poll_loss(cx)).await),
        }
    }

    async fn write(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let written = poll_fn(|cx| self.poll_io_write(cx, bytes)).await?;
            bytes = &bytes[written..];
        }
        poll_fn(|cx| self.poll_io_flush(cx)).await
    }

    /// Reads one reply.
    pub async fn read_reply(&mut self) -> Result<RawReply, Fault> {
        poll_fn(|cx| self.poll_reply(cx)).await
    }

    /// Puts a greeting and an EHLO reply before the client, which believes that it said EHLO itself.
    pub fn replay_opening(&mut self) {
        self.handed = b"220 replayed\r\n250 replayed\r\n".to_vec();
        self.swallows_ehlo = true;
    }

    /// A command is about to be written. What the server said unasked would be taken for its reply.
    pub fn begin_command(&mut self) {
        self.begin_reply();
        self.body = Body::Off;
        if !self.inbox.is_empty() {
            self.broken = Some(protocol("the server spoke before it was asked"));
        }
    }

    /// The next reply of a pipelined group is awaited.
    pub fn begin_reply(&mut self) {
        self.reply = None;
        self.since = Instant::now();
    }

    /// The message is about to be written. What the server has said behind its 354 ends the matter.
    pub fn begin_body(&mut self) {
        self.begin_reply();
        self.body = Body::Sending;
        self.held.clear();
        self.holds = true;
        self.is_dying = !self.inbox.is_empty();
    }

    /// The message that was under way has had its answer, or never will.
    pub fn end_body(&mut self) {
        self.body = Body::Off;
    }

    /// Whether a byte of the final dot may have left.
    pub fn dotted(&self) -> bool {
        self.body == Body::Dotted
    }

    /// When to give up on what is under way; moves while a message makes progress.
    pub fn deadline(&self, limits: &Deadlines) -> Instant {
        self.since
            + match self.body {
                Body::Off => limits.command,
                Body::Sending | Body::Flushed => limits.data,
                Body::Dotted => limits.final_reply,
            }
    }

    /// The reply that came, or what came instead.
    pub fn take_outcome(&mut self) -> Result<RawReply, Fault> {
        match (&self.broken, self.reply.take()) {
            (Some(fault), _) => Err(fault.clone()),
            (None, Some(reply)) => Ok(reply),
            (None, None) => Err(protocol("the reply could not be read")),
        }
    }

    /// Whether the server has neither said anything nor closed the connection since the last reply.
    pub fn is_quiet(&mut self) -> bool {
        let mut cx = Context::from_waker(Waker::noop());
        self.broken.is_none()
            && !self.is_dying
            && self.inbox.is_empty()
            && self.poll_fill(&mut cx).is_pending()
    }

    fn poll_reply(&mut self, cx: &mut Context<'_>) -> Poll<Result<RawReply, Fault>> {
        loop {
            if let Some(reply) = self.inbox.next_reply()? {
                return Poll::Ready(Ok(RawReply { concealed: self.concealed.clone(), ..reply }));
            }
            match ready!(self.poll_fill(cx)) {
                Ok(0) | Err(_) => return Poll::Ready(Err(Fault::Lost)),
                Ok(_) => {}
            }
        }
    }

    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let mut chunk = [0; READ_CHUNK];
        let mut buffer = ReadBuf::new(&mut chunk);
        ready!(match &mut self.io {
            Io::Plain(stream) => Pin::new(stream).poll_read(cx, &mut buffer),
            Io::Tls(stream) => Pin::new(stream).poll_read(cx, &mut buffer),
        })?;
        self.inbox.push(buffer.filled());
        Poll::Ready(Ok(buffer.filled().len()))
    }

    fn poll_io_write(&mut self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = match &mut self.io {
            Io::Plain(stream) => Pin::new(stream).poll_write(cx, bytes),
            Io::Tls(stream) => Pin::new(stream).poll_write(cx, bytes),
        };
        self.or_read_meanwhile(cx, written)
    }

    fn poll_io_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = match &mut self.io {
            Io::Plain(stream) => Pin::new(stream).poll_flush(cx),
            Io::Tls(stream) => Pin::new(stream).poll_flush(cx),
        };
        self.or_read_meanwhile(cx, flushed)
    }

    /// While a write cannot go on, replies are taken in: a server that waits for room for its replies reads no further
    /// command (RFC 2920 section 3.1).
    fn or_read_meanwhile<T>(
        &mut self,
        cx: &mut Context<'_>,
        write: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if write.is_ready() {
            return write;
        }
        while let Poll::Ready(read) = self.poll_fill(cx) {
            if read? == 0 {
                return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into()));
            }
            if self.inbox.len() > INBOX_MAX {
                return Poll::Ready(Err(io::ErrorKind::InvalidData.into()));
            }
        }
        Poll::Pending
    }

    /// What a failed write means: the server may have said why before it went.
    fn poll_loss(&mut self, cx: &mut Context<'_>) -> Poll<Fault> {
        self.is_dying = true;
        match ready!(self.poll_reply(cx)) {
            Ok(reply) => Poll::Ready(reply.into_fault()),
            Err(fault) => Poll::Ready(fault),
        }
    }

    fn poll_break<T>(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<T>> {
        let fault = ready!(self.poll_loss(cx));
        Poll::Ready(Err(self.break_with(fault)))
    }

    fn break_with(&mut self, fault: Fault) -> io::Error {
        self.broken.get_or_insert(fault);
        io::Error::other("the SMTP connection is unusable")
    }

    fn poll_client_read(&mut self, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.handed.is_empty() {
            if let Some(fault) = self.broken.clone() {
                return Poll::Ready(Err(self.break_with(fault)));
            }
            match ready!(self.poll_reply(cx)) {
                Ok(reply) => {
                    self.handed = plain_form(reply.code);
                    self.reply = Some(reply);
                }
                Err(fault) => return Poll::Ready(Err(self.break_with(fault))),
            }
        }
        let part = self.handed.len().min(buffer.remaining());
        buffer.put_slice(&self.handed[..part]);
        self.handed.drain(..part);
        Poll::Ready(Ok(()))
    }

    fn poll_client_write(&mut self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if self.swallows_ehlo {
            self.swallows_ehlo = !bytes.ends_with(b"\n");
            return Poll::Ready(Ok(bytes.len()));
        }
        if let Some(fault) = self.broken.clone() {
            return Poll::Ready(Err(self.break_with(fault)));
        }
        if self.is_dying {
            return self.poll_break(cx);
        }
        match self.body {
            Body::Sending if self.holds && self.held.len() + bytes.len() <= HELD_MAX => {
                self.held.extend_from_slice(bytes);
                return Poll::Ready(Ok(bytes.len()));
            }
            Body::Sending => {
                self.holds = false;
                ready!(self.poll_held(cx))?;
            }
            Body::Flushed => {
                // A reply that is here before the dot would be taken for the reply to the dot.
                if !self.is_quiet() {
                    return self.poll_break(cx);
                }
                self.body = Body::Dotted;
                self.since = Instant::now();
                if !self.held.is_empty() {
                    return self.poll_held_with(cx, bytes);
                }
            }
            Body::Off | Body::Dotted => {}
        }
        match ready!(self.poll_io_write(cx, bytes)) {
            Ok(written) => {
                if self.body == Body::Sending {
                    self.since = Instant::now();
                }
                Poll::Ready(Ok(written))
            }
            Err(_) => self.poll_break(cx),
        }
    }

    /// Begins to write what is held with the dot behind it; what the system does not take of it at once is left to the flush.
    fn poll_held_with(&mut self, cx: &mut Context<'_>, dot: &[u8]) -> Poll<io::Result<usize>> {
        let mut held = std::mem::take(&mut self.held);
        let message = held.len();
        held.extend_from_slice(dot);
        let written = self.poll_io_write(cx, &held);
        self.held = held;
        if let Poll::Ready(Ok(written)) = written {
            self.held.drain(..written);
            return Poll::Ready(Ok(dot.len()));
        }
        // Nothing has left.
        self.body = Body::Flushed;
        self.held.truncate(message);
        if written.is_pending() { Poll::Pending } else { self.poll_break(cx) }
    }

    /// Writes what is held.
    fn poll_held(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.held.is_empty() {
            let held = std::mem::take(&mut self.held);
            let written = self.poll_io_write(cx, &held);
            self.held = held;
            match ready!(written) {
                Ok(written) => {
                    self.held.drain(..written);
                    self.since = Instant::now();
                }
                Err(_) => return self.poll_break(cx),
            }
        }
        Poll::Ready(Ok(()))
    }

    fn poll_client_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.is_dying {
            return self.poll_break(cx);
        }
        if self.body == Body::Sending && !self.held.is_empty() {
            self.body = Body::Flushed;
            return Poll::Ready(Ok(()));
        }
        ready!(self.poll_held(cx))?;
        match ready!(self.poll_io_flush(cx)) {
            Ok(()) => {
                if self.body == Body::Sending {
                    self.body = Body::Flushed;
                }
                Poll::Ready(Ok(()))
            }
            Err(_) => self.poll_break(cx),
        }
    }

    fn poll_client_shutdown(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.io {
            Io::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
            Io::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}

/// A channel with two holders: the session, and the client library under it.
#[derive(Clone)]
pub(super) struct SharedChannel(Arc<Mutex<Channel>>);

impl SharedChannel {
    pub fn new(channel: Channel) -> Self {
        Self(Arc::new(Mutex::new(channel)))
    }

    /// Held for one step that does not wait.
    pub fn lock(&self) -> MutexGuard<'_, Channel> {
        self.0.lock().expect("no panic holds it")
    }

    /// The stream for the client library.
    pub fn client_side(&self, peer: SocketAddr) -> ClientSide {
        ClientSide { channel: self.clone(), peer }
    }
}

/// What the client library reads from and writes to.
pub(super) struct ClientSide {
    channel: SharedChannel,
    peer: SocketAddr,
}

impl fmt::Debug for ClientSide {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ClientSide({})", self.peer)
    }
}

impl AsyncTokioStream for ClientSide {
    fn peer_addr(&self) -> io::Result<SocketAddr> {
        Ok(self.peer)
    }
}

impl AsyncRead for ClientSide {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.channel.lock().poll_client_read(cx, buffer)
    }
}

impl AsyncWrite for ClientSide {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.channel.lock().poll_client_write(cx, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.channel.lock().poll_client_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.channel.lock().poll_client_shutdown(cx)
    }
}
