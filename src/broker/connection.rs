//! One connection to RabbitMQ: where to, how it is opened, and what its failures mean.
//! Guarantee: a password is in no error, no log and no `Debug`; opening a connection ends within its time limit and
//! leaves nothing behind when it fails.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use lapin::protocol::{AMQPErrorKind, AMQPHardError, AMQPSoftError};
use lapin::tcp::{AMQPUriTcpExt, AsyncTcpStream, OwnedTLSConfig};
use lapin::types::parsing::parse_field_table;
use lapin::types::{AMQPValue, ShortString};
use lapin::uri::{AMQPScheme, AMQPUri, SASLMechanism};
use lapin::{Connection, ConnectionProperties, ErrorKind};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

use crate::model::text;

/// TCP, TLS and the AMQP handshake together, unless the URL's `connection_timeout` (milliseconds) says otherwise.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Asked for when the URL names none: a broker that vanished is noticed within two of them.
const HEARTBEAT_S: u16 = 10;
/// Waiting for the broker's close-ok.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(3);
/// Longest text of the broker that is passed on.
const DETAIL_MAX: usize = 300;
/// Longest first frame that is read for the broker's version.
const START_FRAME_MAX: usize = 64 * 1024;
/// What a URL may carry behind the `?`.
const QUERY_KEYS: [&str; 5] =
    ["heartbeat", "connection_timeout", "frame_max", "channel_max", "auth_mechanism"];

/// A checked `amqp://` or `amqps://` URL. Shown without its password.
#[derive(Clone, PartialEq, Eq)]
pub struct AmqpUrl(AMQPUri);

/// The URL cannot be used. The message never repeats the URL, which may hold a password.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidAmqpUrl {
    /// Not of the form.
    #[error(
        "must be amqp://user:password@host:port/vhost or amqps://…, special characters percent-encoded ({0})"
    )]
    Form(String),
    /// A query parameter that would be ignored.
    #[error(
        "has the parameter `{0}`, which is not one of heartbeat, connection_timeout, frame_max, channel_max, auth_mechanism"
    )]
    Parameter(String),
}

impl AmqpUrl {
    /// Reads a URL. Without a path the virtual host is `/`; `%2f` spells it too.
    ///
    /// # Errors
    /// [`InvalidAmqpUrl`] says what is allowed.
    pub fn parse(url: &str) -> Result<Self, InvalidAmqpUrl> {
        if let Some((_, query)) = url.split_once('?') {
            let keys = query.split('&').map(|pair| pair.split('=').next().unwrap_or_default());
            if let Some(key) = keys.filter(|key| !key.is_empty()).find(|key| !QUERY_KEYS.contains(key)) {
                return Err(InvalidAmqpUrl::Parameter(text::bounded(&text::single_line(key), 40)));
            }
        }
        let form = |why: &str| InvalidAmqpUrl::Form(why.to_owned());
        if !url.starts_with("amqp://") && !url.starts_with("amqps://") {
            return Err(form("it begins with neither"));
        }
        let mut uri: AMQPUri = url.parse().map_err(|_| form("it cannot be read"))?;
        if let Some(address) = ipv6_literal(url) {
            uri.authority.host = address.map_err(|()| form("what stands in brackets is no IPv6 address"))?;
        }
        if uri.vhost.len() > 255 || uri.authority.userinfo.username.len() > 255 {
            return Err(form("the user name or the virtual host is longer than 255 bytes"));
        }
        uri.query.heartbeat.get_or_insert(HEARTBEAT_S);
        Ok(Self(uri))
    }

    /// The user name, which the broker checks a `user_id` property against; none where the mechanism uses another.
    pub(super) fn user(&self) -> Option<&str> {
        let by_name = matches!(
            self.0.query.auth_mechanism,
            None | Some(SASLMechanism::Plain | SASLMechanism::AMQPlain | SASLMechanism::RabbitCrDemo)
        );
        by_name.then_some(self.0.authority.userinfo.username.as_str())
    }

    /// `host:port`.
    pub fn server(&self) -> String {
        let authority = &self.0.authority;
        if authority.host.contains(':') {
            format!("[{}]:{}", authority.host, authority.port)
        } else {
            format!("{}:{}", authority.host, authority.port)
        }
    }

    fn connect_timeout(&self) -> Duration {
        self.0.query.connection_timeout.map_or(CONNECT_TIMEOUT, Duration::from_millis)
    }
}

/// The address in brackets, if the host is one: the URL reader of the AMQP library would take it for `localhost`.
fn ipv6_literal(url: &str) -> Option<Result<String, ()>> {
    let authority = url.split_once("://")?.1.split(['/', '?', '#']).next()?;
    let host = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
    let inner = host.strip_prefix('[')?.split(']').next()?;
    Some(inner.parse::<std::net::Ipv6Addr>().map(|address| address.to_string()).map_err(|_| ()))
}

impl fmt::Display for AmqpUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}://{}@{}/{}",
            self.0.scheme,
            self.0.authority.userinfo.username,
            self.server(),
            self.0.vhost.replace('/', "%2f")
        )
    }
}

impl fmt::Debug for AmqpUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A certificate file that cannot be used as further roots.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("holds no readable PEM certificate: {0}")]
pub struct InvalidRoots(String);

/// How to reach the broker: the URL and the roots that TLS trusts beside the system's.
#[derive(Clone)]
pub struct Access {
    url: AmqpUrl,
    extra_roots_pem: Option<String>,
}

impl Access {
    /// Access with the system's roots (`SSL_CERT_FILE` replaces them).
    pub fn new(url: AmqpUrl) -> Self {
        Self { url, extra_roots_pem: None }
    }

    /// Trusts the certificates of a PEM text as well.
    ///
    /// # Errors
    /// When the text holds no certificate, or one that cannot be read.
    pub fn trust(mut self, pem: &str) -> Result<Self, InvalidRoots> {
        let certificates: Vec<_> = CertificateDer::pem_slice_iter(pem.as_bytes())
            .collect::<Result<_, _>>()
            .map_err(|error| InvalidRoots(error.to_string()))?;
        if certificates.is_empty() {
            return Err(InvalidRoots("there is none in it".to_owned()));
        }
        let roots = self.extra_roots_pem.get_or_insert_default();
        roots.push_str(pem);
        roots.push('\n');
        Ok(self)
    }

    /// The URL, shown without its password.
    pub fn url(&self) -> &AmqpUrl {
        &self.url
    }
}

impl fmt::Debug for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Access").field("url", &self.url).finish_non_exhaustive()
    }
}

/// What went wrong between us and the broker, so far as a person or a caller has to tell the cases apart.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BrokerError {
    /// No connection, or none that speaks AMQP.
    #[error("RabbitMQ at {server} cannot be reached: {detail}")]
    Unreachable {
        /// `host:port`.
        server: String,
        /// The system's words.
        detail: String,
    },
    /// The certificate or the handshake.
    #[error(
        "TLS with RabbitMQ at {server} failed: {detail}; is its authority among the system's roots or the extra CA files?"
    )]
    Tls {
        /// `host:port`.
        server: String,
        /// What is wrong.
        detail: String,
    },
    /// User name or password.
    #[error(
        "RabbitMQ at {server} refused the user name or the password of `{user}` (the default user guest may log in from the broker's own machine only)"
    )]
    CredentialsRefused {
        /// `host:port`.
        server: String,
        /// The user name.
        user: String,
    },
    /// The virtual host is not there, or not for this user.
    #[error("RabbitMQ at {server} does not give `{user}` the virtual host `{vhost}`: {detail}")]
    VirtualHost {
        /// `host:port`.
        server: String,
        /// The user name.
        user: String,
        /// As in the URL, decoded.
        vhost: String,
        /// The broker's words.
        detail: String,
    },
    /// Declared before with other arguments.
    #[error(
        "{object} exists with other settings than Sendoff's ({detail}); when it is empty, delete it and run `sendoff topology declare`; else move its messages first (a shovel does), or choose another amqp.prefix"
    )]
    Conflict {
        /// Kind and name.
        object: String,
        /// The broker's words.
        detail: String,
    },
    /// Not there.
    #[error("{object} does not exist; run `sendoff topology declare`")]
    Missing {
        /// Kind and name.
        object: String,
    },
    /// The user lacks a permission on it.
    #[error("{object}: the broker refused: {detail}")]
    Refused {
        /// Kind and name.
        object: String,
        /// The broker's words.
        detail: String,
    },
    /// The connection or the channel ended under the operation.
    #[error("the connection to RabbitMQ was lost: {detail}")]
    Lost {
        /// What is known of it.
        detail: String,
    },
}

impl BrokerError {
    /// Whether the broker cannot be used at all for now, as opposed to having answered with a refusal.
    pub fn is_unreachable(&self) -> bool {
        matches!(self, Self::Unreachable { .. } | Self::Tls { .. } | Self::Lost { .. })
    }

    /// What the failure of an operation on `object` means.
    pub(super) fn about(object: &str, error: &lapin::Error) -> Self {
        let object = object.to_owned();
        let detail = one_line(&error.to_string());
        let ErrorKind::ProtocolError(protocol) = error.kind() else {
            return Self::Lost { detail };
        };
        let detail = one_line(protocol.get_message().as_str());
        match protocol.kind() {
            AMQPErrorKind::Soft(AMQPSoftError::PRECONDITIONFAILED) => Self::Conflict { object, detail },
            AMQPErrorKind::Soft(AMQPSoftError::NOTFOUND) => Self::Missing { object },
            AMQPErrorKind::Soft(_) => Self::Refused { object, detail },
            AMQPErrorKind::Hard(AMQPHardError::CONNECTIONFORCED) => Self::Lost { detail },
            AMQPErrorKind::Hard(_) => Self::Refused { object, detail },
        }
    }

    fn of_opening(access: &Access, error: &lapin::Error) -> Self {
        let server = access.url.server();
        let user = access.url.0.authority.userinfo.username.clone();
        match error.kind() {
            ErrorKind::ProtocolError(protocol) => {
                let detail = one_line(protocol.get_message().as_str());
                match protocol.kind() {
                    AMQPErrorKind::Soft(AMQPSoftError::ACCESSREFUSED) => {
                        Self::CredentialsRefused { server, user }
                    }
                    AMQPErrorKind::Hard(AMQPHardError::NOTALLOWED) => {
                        Self::VirtualHost { server, user, vhost: access.url.0.vhost.clone(), detail }
                    }
                    _ => Self::Unreachable { server, detail },
                }
            }
            ErrorKind::IOError(io) => {
                let detail = one_line(&io.to_string());
                if io.get_ref().is_some_and(|inner| inner.is::<rustls::Error>()) {
                    Self::Tls { server, detail }
                } else {
                    Self::Unreachable { server, detail }
                }
            }
            _ => Self::Unreachable { server, detail: one_line(&error.to_string()) },
        }
    }
}

fn one_line(words: &str) -> String {
    text::bounded(&text::single_line(words), DETAIL_MAX)
}

/// Opens a connection that shows up in the broker's listings as `sendoff <purpose>`.
pub(super) async fn open(access: &Access, purpose: &str) -> Result<Connection, BrokerError> {
    let socket = Socket::default();
    // Whichever way this ends, by its limit or because the caller stops waiting.
    let _abandoned = Abandoned(socket.clone());
    let limit = access.url.connect_timeout();
    match tokio::time::timeout(limit, dial(access, purpose, socket.clone())).await {
        Ok(Ok(connection)) => {
            socket.release();
            Ok(connection)
        }
        Ok(Err(error)) => Err(BrokerError::of_opening(access, &error)),
        Err(_) => {
            let detail = format!("no answer within {} ms", limit.as_millis());
            Err(BrokerError::Unreachable { server: access.url.server(), detail })
        }
    }
}

async fn dial(access: &Access, purpose: &str, socket: Socket) -> lapin::Result<Connection> {
    let properties = ConnectionProperties::default()
        .with_connection_name(format!("sendoff {purpose}").into())
        .with_client_property("product".into(), "sendoff".into())
        .with_client_property("version".into(), env!("CARGO_PKG_VERSION").into());
    let tls = OwnedTLSConfig { identity: None, cert_chain: access.extra_roots_pem.clone() };
    let limit = access.url.connect_timeout();
    let runtime = lapin::runtime::default_runtime()?;
    let connect = Connection::connector(
        access.url.0.clone(),
        runtime,
        async move |uri, runtime| {
            let target = runtime.to_socket_addrs((uri.authority.host.clone(), uri.authority.port));
            let dialled = tokio::time::timeout(limit, AsyncTcpStream::connect(&runtime, target)).await;
            let stream = dialled.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))?;
            if let AsyncTcpStream::Plain(plain) = &stream {
                socket.keep(TcpStream::from(plain.get_ref().as_fd().try_clone_to_owned()?))?;
            }
            match uri.scheme {
                AMQPScheme::AMQP => Ok(stream),
                AMQPScheme::AMQPS => Ok(stream.into_tls(&uri.authority.host, tls.as_ref()).await?),
            }
        },
        properties,
    );
    connect.await
}

/// A second handle on the connection's socket. A peer that takes the connection and then stays silent would
/// otherwise keep the library's thread and the socket for good: no heartbeat runs before the handshake is over.
#[derive(Clone, Default)]
struct Socket(Arc<Mutex<SocketState>>);

#[derive(Default)]
struct SocketState {
    stream: Option<TcpStream>,
    abandoned: bool,
}

impl Socket {
    fn keep(&self, stream: TcpStream) -> io::Result<()> {
        let mut state = self.0.lock().expect("nothing panics while the lock is held");
        if state.abandoned {
            return Err(io::ErrorKind::TimedOut.into());
        }
        state.stream = Some(stream);
        Ok(())
    }

    /// The connection stands: its socket closes with its only other handle.
    fn release(&self) {
        self.0.lock().expect("nothing panics while the lock is held").stream = None;
    }

    fn abandon(&self) {
        let mut state = self.0.lock().expect("nothing panics while the lock is held");
        state.abandoned = true;
        if let Some(stream) = state.stream.take() {
            // It may be gone already, which is as good.
            let _gone = stream.shutdown(Shutdown::Both);
        }
    }
}

/// A RabbitMQ version as the broker states it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Version {
    pub text: String,
    /// Major and minor.
    pub number: (u32, u32),
}

impl Version {
    pub(super) fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split('.');
        let number = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
        Some(Self { text: one_line(text), number })
    }
}

/// The broker's version, from the first frame of a handshake that goes no further; `None` where it does not say.
pub(super) async fn version(access: &Access) -> Option<Version> {
    let (limit, access) = (access.url.connect_timeout(), access.clone());
    let reading = tokio::task::spawn_blocking(move || read_version(&access));
    tokio::time::timeout(limit, reading).await.ok()?.ok()?.ok()?
}

/// Reads Connection.Start (AMQP 0-9-1 sections 1.4.2.1 and 2.3.5): a frame header of 7 octets, class, method and protocol
/// version in 6, then the table of server properties.
fn read_version(access: &Access) -> io::Result<Option<Version>> {
    let mut uri = access.url.0.clone();
    let limit = access.url.connect_timeout();
    uri.query.connection_timeout = u64::try_from(limit.as_millis()).ok();
    let tls = OwnedTLSConfig { identity: None, cert_chain: access.extra_roots_pem.clone() };
    let mut stream = AMQPUriTcpExt::connect_with_config(&uri, tls.as_ref()).map_err(io::Error::other)?;
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(limit))?;
    stream.write_all(b"AMQP\x00\x00\x09\x01")?;
    let mut header = [0; 7];
    stream.read_exact(&mut header)?;
    let [1, 0, 0, size @ ..] = header else { return Ok(None) };
    let size = usize::try_from(u32::from_be_bytes(size)).unwrap_or(usize::MAX);
    if !(6..=START_FRAME_MAX).contains(&size) {
        return Ok(None);
    }
    let mut payload = vec![0; size];
    stream.read_exact(&mut payload)?;
    let Ok((_, properties)) = parse_field_table(&payload[6..]) else { return Ok(None) };
    let text = |name: &str| {
        properties.inner().get(name).and_then(AMQPValue::as_long_string).map(ToString::to_string)
    };
    Ok(text("version")
        .filter(|_| text("product").as_deref() == Some("RabbitMQ"))
        .and_then(|v| Version::parse(&v)))
}

/// Shuts the socket of a connection that was not finished.
struct Abandoned(Socket);

impl Drop for Abandoned {
    fn drop(&mut self) {
        self.0.abandon();
    }
}

/// Awaits a one-off operation on a connection, but not for longer than `limit`: the library can leave one unanswered for
/// good when the connection breaks under it.
pub(super) async fn within<T, E: From<BrokerError>>(
    limit: Duration,
    operation: impl Future<Output = Result<T, E>>,
) -> Result<T, E> {
    tokio::time::timeout(limit, operation).await.unwrap_or_else(|_| {
        let detail = format!("no answer within {} s", limit.as_secs());
        Err(BrokerError::Lost { detail }.into())
    })
}

/// Closes a connection politely, but not for long.
pub(super) async fn close(connection: &Connection) {
    // Whatever the answer, nothing is left to be done: the broker takes unsettled deliveries back either way.
    let _closed = tokio::time::timeout(CLOSE_TIMEOUT, connection.close(200, ShortString::from("OK"))).await;
}

#[cfg(test)]
#[path = "connection_tests.rs"]
mod tests;
