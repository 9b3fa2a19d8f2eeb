//! A TCP proxy on 127.0.0.1 that forwards, and on command cuts, stalls or refuses.
//! Guarantee: a cut resets every connection at once; a stall keeps them open and moves no byte; what is held back
//! on its way to the server is there no more after a cut.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// What the proxy does with its connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Forward,
    Stall,
    HoldBack,
    Refuse,
}

/// A running proxy; it ends when this is dropped.
pub struct Proxy {
    address: SocketAddr,
    mode: watch::Sender<Mode>,
    /// Counts the cuts: every connection of an earlier count is closed.
    cuts: watch::Sender<usize>,
    accepted: Arc<AtomicUsize>,
    held: Arc<AtomicUsize>,
}

impl Proxy {
    /// Forwards to `target` from a port of its own.
    pub async fn start(target: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("a bound address");
        let (mode, mode_seen) = watch::channel(Mode::Forward);
        let (cuts, cuts_seen) = watch::channel(0);
        let accepted = Arc::new(AtomicUsize::new(0));
        let held = Arc::new(AtomicUsize::new(0));
        let (counter, holding) = (accepted.clone(), held.clone());
        tokio::spawn(async move {
            let mut ended = cuts_seen.clone();
            loop {
                tokio::select! {
                    incoming = listener.accept() => {
                        let Ok((client, _)) = incoming else { return };
                        counter.fetch_add(1, Ordering::SeqCst);
                        let (mode, cuts) = (mode_seen.clone(), cuts_seen.clone());
                        tokio::spawn(serve(client, target, mode, cuts, holding.clone()));
                    }
                    changed = ended.changed() => if changed.is_err() { return },
                }
            }
        });
        Self { address, mode, cuts, accepted, held }
    }

    /// A proxy before the server that a URL names by address and port, and the URL that leads through it.
    pub async fn before(url: &str) -> (Self, String) {
        let authority = url.split_once("://").and_then(|(_, rest)| rest.split('/').next()).expect("a URL");
        let host = authority.rsplit('@').next().expect("an authority has a host");
        let target = tokio::net::lookup_host(host).await.expect("a host and a port").next();
        let proxy = Self::start(target.expect("the host has an address")).await;
        let through = authority.replace(host, &proxy.address().to_string());
        (proxy, url.replacen(authority, &through, 1))
    }

    /// Where to connect to.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Connections accepted so far.
    pub fn accepted(&self) -> usize {
        self.accepted.load(Ordering::SeqCst)
    }

    /// Closes every connection; new ones are forwarded again.
    pub fn cut(&self) {
        self.cuts.send_modify(|cuts| *cuts += 1);
    }

    /// Closes every connection, and each new one at once.
    pub fn refuse(&self) {
        self.mode.send_replace(Mode::Refuse);
        self.cut();
    }

    /// Keeps every connection, new ones included, and moves nothing.
    pub fn stall(&self) {
        self.mode.send_replace(Mode::Stall);
    }

    /// Moves nothing to the server any more; what the server says comes through.
    pub fn hold_back(&self) {
        self.mode.send_replace(Mode::HoldBack);
    }

    /// How often something was held back so far.
    pub fn held(&self) -> usize {
        self.held.load(Ordering::SeqCst)
    }

    /// Forwards again.
    pub fn forward(&self) {
        self.mode.send_replace(Mode::Forward);
    }
}

async fn serve(
    client: TcpStream,
    target: SocketAddr,
    mode: watch::Receiver<Mode>,
    mut cuts: watch::Receiver<usize>,
    held: Arc<AtomicUsize>,
) {
    cuts.mark_unchanged();
    if *mode.borrow() == Mode::Refuse {
        return;
    }
    let Ok(server) = TcpStream::connect(target).await else { return };
    // No lingering: a cut is a reset, as when a machine vanishes and its address answers again.
    let _unsupported = client.set_zero_linger();
    let (client_read, client_write) = client.into_split();
    let (server_read, server_write) = server.into_split();
    tokio::select! {
        () = pump(client_read, server_write, mode.clone(), Some(held)) => {}
        () = pump(server_read, client_write, mode, None) => {}
        _ = cuts.changed() => {}
    }
}

/// `held`: counts what is held back, on the way to the server.
async fn pump(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    mut mode: watch::Receiver<Mode>,
    held: Option<Arc<AtomicUsize>>,
) {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        if mode.wait_for(|mode| *mode != Mode::Stall).await.is_err() {
            return;
        }
        let count = match from.read(&mut buffer).await {
            Ok(0) | Err(_) => return,
            Ok(count) => count,
        };
        if let (Some(held), Mode::HoldBack) = (&held, *mode.borrow()) {
            held.fetch_add(1, Ordering::SeqCst);
        }
        let stays = |mode: &Mode| *mode == Mode::Stall || (*mode == Mode::HoldBack && held.is_some());
        if mode.wait_for(|mode| !stays(mode)).await.is_err() {
            return;
        }
        if to.write_all(&buffer[..count]).await.is_err() {
            return;
        }
    }
}

/// A TLS server on 127.0.0.1 that forwards what it decrypts; it ends when the runtime does. Returns its address and
/// the PEM of its certificate's authority; the certificate is for `localhost`.
pub async fn tls_in_front_of(target: SocketAddr) -> (SocketAddr, String) {
    let authority_key = rcgen::KeyPair::generate().expect("a key");
    let mut authority = rcgen::CertificateParams::new(Vec::new()).expect("parameters");
    authority.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let pem = authority.self_signed(&authority_key).expect("self-signed").pem();
    let issuer = rcgen::Issuer::new(authority, authority_key);
    let key = rcgen::KeyPair::generate().expect("a key");
    let server = rcgen::CertificateParams::new(vec!["localhost".to_owned()]).expect("parameters");
    let certificate = server.signed_by(&key, &issuer).expect("signed").der().clone();
    let key = rustls::pki_types::PrivatePkcs8KeyDer::from(key.serialize_der());
    let config = rustls::ServerConfig::builder()
        .with_no_client_auth()
        .with_single_cert(vec![certificate], key.into())
        .expect("a usable certificate");
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("a bound address");
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                let Ok(mut client) = acceptor.accept(client).await else { return };
                let Ok(mut server) = TcpStream::connect(target).await else { return };
                let _ended = tokio::io::copy_bidirectional(&mut client, &mut server).await;
            });
        }
    });
    (address, pem)
}
