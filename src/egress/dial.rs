//! The only way out: a TCP connection to addresses that were approved.
//! Guarantee: no socket is opened for anything but an [`ApprovedAddr`], and a dial ends within its time
//! limit.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::net::TcpStream;

use super::approve::ApprovedAddr;

/// Time that an attempt has to itself before the next one starts beside it (RFC 8305 section 5).
const STAGGER: Duration = Duration::from_millis(250);

/// A name with more addresses than this is tried at the first ones only: whoever controls the name must not
/// decide how many sockets one dial opens.
const MAX_ATTEMPTS: usize = 8;

/// Why no connection came to be.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// Nobody answered in time.
    #[error("no connection to {address} within {} s", limit.as_secs_f32())]
    Timeout {
        /// The address that was tried first.
        address: SocketAddr,
        /// The time limit of the whole dial.
        limit: Duration,
    },
    /// Every address failed; this is the last failure.
    #[error("no connection to {address}: {}", in_words(source))]
    Failed {
        /// The address whose attempt failed last.
        address: SocketAddr,
        /// What the operating system said.
        source: io::Error,
    },
    /// An empty list was given.
    #[error("there is no address to connect to")]
    NoAddress,
}

impl DialError {
    /// The contract's reason: `connect_timeout` or `connect_failed`.
    pub fn reason_code(&self) -> &'static str {
        match self {
            Self::Timeout { .. } => "connect_timeout",
            Self::Failed { source, .. } if source.kind() == io::ErrorKind::TimedOut => "connect_timeout",
            Self::Failed { .. } | Self::NoAddress => "connect_failed",
        }
    }
}

/// Without the operating system's number, which tells an organization's admin nothing.
fn in_words(error: &io::Error) -> String {
    let words = error.to_string();
    let number = error.raw_os_error().map(|number| format!(" (os error {number})"));
    number.and_then(|number| words.strip_suffix(&number)).unwrap_or(&words).to_owned()
}

/// Connects to one of the addresses: families take turns, beginning with IPv6, a new attempt starts every 250
/// ms or as soon as one fails, and the first connection wins (RFC 8305 sections 4 and 5). At most eight
/// addresses are tried.
///
/// The stream has `TCP_NODELAY` set. `limit` bounds the whole. Dropping the future closes every attempt.
pub async fn dial(addrs: &[ApprovedAddr], limit: Duration) -> Result<(TcpStream, SocketAddr), DialError> {
    let order = dialling_order(addrs);
    let Some(&first) = order.first() else {
        return Err(DialError::NoAddress);
    };
    match tokio::time::timeout(limit, race(order)).await {
        Ok(outcome) => outcome,
        Err(_) => Err(DialError::Timeout { address: first, limit }),
    }
}

fn dialling_order(addrs: &[ApprovedAddr]) -> Vec<SocketAddr> {
    let of_family =
        |v6: bool| addrs.iter().map(|addr| addr.socket_addr()).filter(move |addr| addr.is_ipv6() == v6);
    let (mut v6, mut v4) = (of_family(true), of_family(false));
    let mut order = Vec::new();
    while order.len() < MAX_ATTEMPTS {
        let turn = [v6.next(), v4.next()];
        if turn == [None, None] {
            break;
        }
        order.extend(turn.into_iter().flatten());
    }
    order.truncate(MAX_ATTEMPTS);
    order
}

async fn race(order: Vec<SocketAddr>) -> Result<(TcpStream, SocketAddr), DialError> {
    let mut waiting = order.into_iter();
    let mut attempts = FuturesUnordered::new();
    let mut last_failure = DialError::NoAddress;
    loop {
        match waiting.next() {
            Some(address) => attempts.push(attempt(address)),
            None if attempts.is_empty() => return Err(last_failure),
            None => {}
        }
        let more_waiting = waiting.len() > 0;
        tokio::select! {
            Some(outcome) = attempts.next() => match outcome {
                Ok(connected) => return Ok(connected),
                Err(failure) => last_failure = failure,
            },
            () = tokio::time::sleep(STAGGER), if more_waiting => {}
        }
    }
}

async fn attempt(address: SocketAddr) -> Result<(TcpStream, SocketAddr), DialError> {
    let failed = |source| DialError::Failed { address, source };
    let stream = TcpStream::connect(address).await.map_err(failed)?;
    stream.set_nodelay(true).map_err(failed)?;
    Ok((stream, address))
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr};

    use tokio::net::{TcpListener, TcpSocket};

    use super::*;

    const LIMIT: Duration = Duration::from_secs(5);

    fn approved(addrs: &[SocketAddr]) -> Vec<ApprovedAddr> {
        addrs.iter().map(|addr| ApprovedAddr::for_test(*addr)).collect()
    }

    fn addr(text: &str) -> SocketAddr {
        text.parse().expect("an address")
    }

    /// A port of 127.0.0.1 that refuses: bound, so that nobody else takes it, and not listening.
    fn refusing() -> (TcpSocket, SocketAddr) {
        let socket = TcpSocket::new_v4().expect("a socket");
        socket.bind(addr("127.0.0.1:0")).expect("a port");
        let address = socket.local_addr().expect("bound");
        (socket, address)
    }

    /// An address that answers nothing: its queue of half-open connections is full.
    async fn silent() -> (TcpListener, Vec<TcpStream>, SocketAddr) {
        let socket = TcpSocket::new_v4().expect("a socket");
        socket.bind(addr("127.0.0.1:0")).expect("a port");
        let listener = socket.listen(1).expect("listening");
        let address = listener.local_addr().expect("bound");
        let mut fillers = Vec::new();
        let brief = Duration::from_millis(200);
        while let Ok(Ok(filler)) = tokio::time::timeout(brief, TcpStream::connect(address)).await {
            fillers.push(filler);
            assert!(fillers.len() < 100, "the system accepts without limit");
        }
        (listener, fillers, address)
    }

    #[tokio::test]
    async fn a_listening_address_is_connected_without_delay_of_small_writes() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("bound");
        let (stream, connected) = dial(&approved(&[address]), LIMIT).await.expect("a connection");
        assert_eq!((connected, stream.peer_addr().expect("a peer")), (address, address));
        assert!(stream.nodelay().expect("readable"));
    }

    #[tokio::test]
    async fn an_address_that_refuses_is_passed_over_at_once() {
        let (_held, refusing) = refusing();
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let listening = listener.local_addr().expect("bound");
        let many: Vec<SocketAddr> = std::iter::repeat_n(refusing, 7).chain([listening]).collect();
        let started = tokio::time::Instant::now();
        let (_stream, connected) = dial(&approved(&many), LIMIT).await.expect("a connection");
        assert_eq!(connected, listening);
        // Seven times the stagger, had it been waited for each time.
        assert!(started.elapsed() < STAGGER * 6, "{:?}", started.elapsed());
    }

    #[tokio::test]
    async fn an_address_that_is_silent_holds_the_next_one_up_for_the_stagger_only() {
        let (_listener, _fillers, silent) = silent().await;
        let listener = TcpListener::bind("127.0.0.2:0").await.expect("a port");
        let listening = listener.local_addr().expect("bound");
        let started = tokio::time::Instant::now();
        let (_stream, connected) = dial(&approved(&[silent, listening]), LIMIT).await.expect("a connection");
        assert_eq!(connected, listening);
        assert!(started.elapsed() >= STAGGER, "{:?}", started.elapsed());
    }

    #[tokio::test]
    async fn a_dial_to_silence_ends_at_its_limit() {
        let (_listener, _fillers, silent) = silent().await;
        let (_held, refusing) = refusing();
        let limit = Duration::from_millis(400);
        let error = dial(&approved(&[silent, refusing]), limit).await.expect_err("nobody answers");
        assert!(matches!(&error, DialError::Timeout { address, .. } if *address == silent), "{error}");
        assert_eq!(error.reason_code(), "connect_timeout");
    }

    #[tokio::test]
    async fn when_every_address_fails_the_last_failure_is_told() {
        let (_held, refusing) = refusing();
        let error = dial(&approved(&[refusing]), LIMIT).await.expect_err("nobody listens");
        assert_eq!(error.reason_code(), "connect_failed");
        assert_eq!(error.to_string(), format!("no connection to {refusing}: Connection refused"));
        let DialError::Failed { address, source } = error else { panic!("{error}") };
        assert_eq!((address, source.kind()), (refusing, io::ErrorKind::ConnectionRefused));
        assert!(matches!(dial(&[], LIMIT).await, Err(DialError::NoAddress)));
    }

    #[test]
    fn families_take_turns_and_the_number_of_attempts_is_bounded() {
        let v6 = |n: u16| SocketAddr::new(IpAddr::V6([0x2a00, 0, 0, 0, 0, 0, 0, n].into()), 25);
        let v4 = |n: u8| SocketAddr::new(IpAddr::V4(Ipv4Addr::new(1, 1, 1, n)), 25);
        let order = dialling_order(&approved(&[v4(1), v4(2), v4(3), v6(1)]));
        assert_eq!(order, [v6(1), v4(1), v4(2), v4(3)]);
        let crowd: Vec<SocketAddr> = (1..=100).map(v4).chain((1..=100).map(v6)).collect();
        let order = dialling_order(&approved(&crowd));
        assert_eq!(order.len(), MAX_ATTEMPTS);
        assert_eq!(order.iter().filter(|addr| addr.is_ipv6()).count(), MAX_ATTEMPTS / 2);
    }
}
