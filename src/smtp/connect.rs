//! A new session: look up, judge, dial, greeting, EHLO, STARTTLS, TLS, AUTH.
//! Guarantee: only an address approved for this very connection is dialled, a failed TLS never falls back to plaintext,
//! and after a refused password no second mechanism is tried.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use lettre::transport::smtp::authentication::{Credentials as ClientCredentials, Mechanism};
use lettre::transport::smtp::client::AsyncSmtpConnection;
use lettre::transport::smtp::commands::Auth;
use lettre::transport::smtp::extension::ClientId;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout, timeout_at};
use tokio_rustls::TlsConnector;

use super::conceal::Concealed;
use super::offers::Offers;
use super::reply::{RawReply, dial_fault, egress_fault, protocol};
use super::session::{Session, SessionFacts, drive};
use super::stream::{Channel, Deadlines, Io, SharedChannel};
use super::tls::{TlsFacts, TlsRoots, facts, handshake_fault, no_certificate_possible};
use crate::egress::{ApprovedAddr, Egress, LOOK_UP_LIMIT, OperatorsHost, ServerHost, dial};
use crate::model::failure::{Failure, Fault, Phase, Reply};
use crate::model::policy;
use crate::model::smtp_settings::{Credentials, Destination, SmtpAccount, TlsMode};

/// More destinations than this and the resumption caches are dropped; all that is lost is a shorter handshake.
const CACHED_CONFIGS_MAX: usize = 4096;

/// Replies that an opening may wait for, each for its own deadline: greeting, EHLO, STARTTLS, EHLO again, a refused PLAIN, and
/// the three of LOGIN.
const REPLIES_MAX: u32 = 8;

/// Hears how long each phase took, and what was not dialled. Called from the sending task: it must not block.
pub trait Observer: Send + Sync {
    /// A phase came to its end, good or bad.
    fn phase(&self, phase: Phase, took: Duration);
    /// An address or a name was refused; the label says by which rule.
    fn egress_refused(&self, rule: &'static str);
}

/// Hears nothing.
impl Observer for () {
    fn phase(&self, _: Phase, _: Duration) {}
    fn egress_refused(&self, _: &'static str) {}
}

/// How sessions are opened, whatever the destination.
#[derive(Debug, Clone)]
pub struct SmtpOptions {
    /// How long to wait for what.
    pub deadlines: Deadlines,
    /// Name given in EHLO: a host name, or an address literal in brackets.
    pub hello_name: String,
    /// Whether credentials may travel unencrypted.
    pub allow_plaintext_auth: bool,
}

/// Opens sessions. Cheap to clone; the clones share the TLS resumption caches.
#[derive(Clone)]
pub struct SmtpConnector {
    egress: Arc<Egress>,
    roots: TlsRoots,
    options: Arc<SmtpOptions>,
    observer: Arc<dyn Observer>,
    configs: Arc<Mutex<HashMap<Destination, Arc<ClientConfig>>>>,
}

/// What an opening has come upon so far, whatever becomes of it.
#[derive(Debug, Default)]
pub(super) struct Found {
    /// Each phase that has ended, in order, with what it took.
    pub laps: Vec<(Phase, Duration)>,
    /// How many addresses were approved.
    pub approved: usize,
    /// The address that is dialled first; once connected, the one that answered.
    pub address: Option<SocketAddr>,
    pub greeting: Option<Reply>,
    /// What the latest EHLO reply offers.
    pub offers: Option<Offers>,
    pub tls: Option<TlsFacts>,
    pub mechanism: Option<&'static str>,
    /// Whether the time that it had as a whole ran out.
    pub overdue: bool,
}

/// A connection before the client library takes over.
pub(super) struct Opening<'a> {
    connector: &'a SmtpConnector,
    destination: &'a Destination,
    account: &'a SmtpAccount,
    host: ServerHost,
    concealed: Option<Arc<Concealed>>,
    phase: Phase,
    since: Instant,
    found: Found,
}

impl SmtpConnector {
    /// A connector that reports to the observer; `Arc::new(())` for none.
    pub fn new(
        egress: Arc<Egress>,
        roots: TlsRoots,
        options: SmtpOptions,
        observer: Arc<dyn Observer>,
    ) -> Self {
        Self { egress, roots, options: Arc::new(options), observer, configs: Arc::default() }
    }

    /// The same connector with another observer: a connection test listens for itself.
    pub fn observed_by(&self, observer: Arc<dyn Observer>) -> Self {
        Self { observer, ..self.clone() }
    }

    /// What judges the hosts.
    pub fn egress(&self) -> Arc<Egress> {
        self.egress.clone()
    }

    /// Opens a session: everything up to and including AUTH. The host is looked up and judged for this connection.
    ///
    /// # Errors
    /// A [`Failure`] with the phase that failed.
    pub async fn open(&self, destination: &Destination, account: &SmtpAccount) -> Result<Session, Failure> {
        let mut opening = Opening::new(self, destination, account)?;
        let outcome = opening.run().await;
        opening.conclude(outcome)
    }

    /// The same, given up at `by`: that is a timeout of the phase under way, or a failed look-up.
    ///
    /// # Errors
    /// A [`Failure`] with the phase that failed.
    pub async fn open_by(
        &self,
        destination: &Destination,
        account: &SmtpAccount,
        by: Instant,
    ) -> Result<Session, Failure> {
        let mut opening = Opening::new(self, destination, account)?;
        let outcome = opening.run_until(by).await;
        opening.conclude(outcome)
    }

    /// The longest that [`SmtpConnector::open`] takes: each of its steps as long as it may.
    pub fn longest_opening(&self) -> Duration {
        let Deadlines { connect, command, .. } = self.options.deadlines;
        LOOK_UP_LIMIT + 2 * connect + REPLIES_MAX * command
    }

    /// The same connector with resumption caches of its own: nothing that is opened with it is remembered for, or made
    /// shorter by, what others open.
    pub fn apart(&self) -> Self {
        Self { configs: Arc::default(), ..self.clone() }
    }

    /// Drops what is kept for a destination that will not come again.
    pub(super) fn forget(&self, destination: &Destination) {
        self.configs.lock().expect("no panic holds it").remove(destination);
    }

    fn client_config(&self, destination: &Destination) -> Arc<ClientConfig> {
        let mut configs = self.configs.lock().expect("no panic holds it");
        if configs.len() >= CACHED_CONFIGS_MAX && !configs.contains_key(destination) {
            configs.clear();
        }
        configs.entry(destination.clone()).or_insert_with(|| self.roots.client_config()).clone()
    }
}

impl<'a> Opening<'a> {
    /// An opening that has not begun.
    ///
    /// # Errors
    /// When the account's host is none.
    pub(super) fn new(
        connector: &'a SmtpConnector,
        destination: &'a Destination,
        account: &'a SmtpAccount,
    ) -> Result<Self, Failure> {
        let host = ServerHost::parse(&account.host)
            .map_err(|_| Failure::new(Phase::Resolve, Fault::HostNotFound))?;
        let concealed = account.credentials.as_ref().map(|credentials| Arc::new(Concealed::new(credentials)));
        let (phase, since, found) = (Phase::Resolve, Instant::now(), Found::default());
        Ok(Self { connector, destination, account, host, concealed, phase, since, found })
    }

    /// Everything up to and including AUTH. Dropped on the way, it can still be asked how far it came.
    pub(super) async fn run(&mut self) -> Result<Session, Fault> {
        let deadlines = self.connector.options.deadlines;
        let approved = self.approved().await?;
        self.found.approved = approved.len();
        self.enter(Phase::Connect);
        self.found.address = approved.first().map(ApprovedAddr::socket_addr);
        let (stream, dialled) =
            dial(&approved, deadlines.connect).await.map_err(|error| dial_fault(&error))?;
        self.found.address = Some(dialled);
        let (channel, greeting, offers, tls) = self.greet(stream).await?;
        let facts = SessionFacts { address: dialled, greeting: greeting.to_model(), tls, mechanism: None };
        let observer = self.connector.observer.clone();
        let mut session = self.hand_over(channel, facts, offers, observer).await?;
        if let Some(credentials) = &self.account.credentials {
            self.enter(Phase::Auth);
            let mechanism = authenticate(&mut session, credentials).await?;
            session.facts_mut().mechanism = Some(mechanism);
            self.found.mechanism = Some(mechanism);
        }
        Ok(session)
    }

    /// The same, given up at `by`: that is a timeout of the phase under way, or a failed look-up.
    pub(super) async fn run_until(&mut self, by: Instant) -> Result<Session, Fault> {
        if let Ok(outcome) = timeout_at(by, self.run()).await {
            return outcome;
        }
        self.found.overdue = true;
        Err(match self.phase {
            Phase::Resolve => {
                Fault::DnsFailed { detail: "the name servers did not answer in time".to_owned() }
            }
            _ => Fault::Timeout,
        })
    }

    fn conclude(self, outcome: Result<Session, Fault>) -> Result<Session, Failure> {
        let (phase, found) = self.end();
        outcome.map_err(|fault| Failure { address: found.address, ..Failure::new(phase, fault) })
    }

    /// The phase it ended in, and what it came upon.
    pub(super) fn end(mut self) -> (Phase, Found) {
        self.ended();
        (self.phase, self.found)
    }

    async fn approved(&self) -> Result<Vec<ApprovedAddr>, Fault> {
        let (egress, port) = (&self.connector.egress, self.account.port);
        let approved = match self.destination {
            Destination::Organization { .. } => egress.approve(&self.host, port).await,
            Destination::Platform => {
                let host = OperatorsHost::from_settings(self.host.clone());
                egress.approve_operators_host(&host, port).await
            }
        };
        approved.map_err(|error| {
            if let Some(rule) = error.rule() {
                self.connector.observer.egress_refused(rule);
            }
            egress_fault(&error)
        })
    }

    /// Greeting, EHLO, and TLS by the account's mode.
    async fn greet(
        &mut self,
        stream: TcpStream,
    ) -> Result<(Channel, RawReply, Offers, Option<TlsFacts>), Fault> {
        if self.account.tls == TlsMode::Implicit {
            let (mut channel, tls) = self.take_up_tls(stream).await?;
            let greeting = self.greeting(&mut channel).await?;
            let offers = self.ehlo(&mut channel).await?;
            return Ok((channel, greeting, offers, tls));
        }
        let mut channel = self.channel(Io::Plain(stream));
        let greeting = self.greeting(&mut channel).await?;
        let offers = self.ehlo(&mut channel).await?;
        if !offers.starttls && self.may_stay_in_clear() {
            return Ok((channel, greeting, offers, None));
        }
        self.enter(Phase::Starttls);
        if !offers.starttls {
            return Err(Fault::TlsRequired);
        }
        let reply = self.command(&mut channel, "STARTTLS\r\n").await?;
        if reply.code != 220 {
            return Err(reply.into_fault());
        }
        let (mut channel, tls) = self.take_up_tls(channel.into_plain()?).await?;
        // What the server said before TLS counts no longer (RFC 3207 section 4.2).
        let offers = self.ehlo(&mut channel).await?;
        Ok((channel, greeting, offers, tls))
    }

    fn channel(&self, io: Io) -> Channel {
        Channel::new(io, self.concealed.clone())
    }

    fn may_stay_in_clear(&self) -> bool {
        let exposes_nothing =
            self.account.credentials.is_none() || self.connector.options.allow_plaintext_auth;
        self.account.tls == TlsMode::Opportunistic && exposes_nothing
    }

    async fn greeting(&mut self, channel: &mut Channel) -> Result<RawReply, Fault> {
        self.enter(Phase::Greeting);
        let limit = self.connector.options.deadlines.command;
        let greeting = timeout(limit, channel.read_reply()).await.map_err(|_| Fault::Timeout)??;
        if greeting.code != 220 {
            return Err(greeting.into_fault());
        }
        self.found.greeting = Some(greeting.to_model());
        Ok(greeting)
    }

    async fn ehlo(&mut self, channel: &mut Channel) -> Result<Offers, Fault> {
        self.enter(Phase::Ehlo);
        let line = format!("EHLO {}\r\n", self.connector.options.hello_name);
        let reply = self.command(channel, &line).await?;
        if !reply.is_success() {
            return Err(reply.into_fault());
        }
        let offers = Offers::read(&reply);
        self.found.offers = Some(offers.clone());
        Ok(offers)
    }

    async fn command(&self, channel: &mut Channel, line: &str) -> Result<RawReply, Fault> {
        let limit = self.connector.options.deadlines.command;
        timeout(limit, channel.command(line)).await.map_err(|_| Fault::Timeout)?
    }

    async fn take_up_tls(&mut self, stream: TcpStream) -> Result<(Channel, Option<TlsFacts>), Fault> {
        self.enter(Phase::Tls);
        let name = match &self.host {
            ServerHost::Ip(ip) => ServerName::from(*ip),
            ServerHost::Name(name) => {
                ServerName::try_from(name.as_str().to_owned()).map_err(|_| no_certificate_possible())?
            }
        };
        let connector = TlsConnector::from(self.connector.client_config(self.destination));
        let limit = self.connector.options.deadlines.connect;
        let stream = timeout(limit, connector.connect(name, stream))
            .await
            .map_err(|_| Fault::Timeout)?
            .map_err(|error| handshake_fault(&error, &self.account.host))?;
        let facts = facts(stream.get_ref().1);
        self.found.tls.clone_from(&facts);
        Ok((self.channel(Io::Tls(Box::new(stream))), facts))
    }

    /// From here on the client library speaks; it gets the opening replayed.
    async fn hand_over(
        &self,
        mut channel: Channel,
        facts: SessionFacts,
        offers: Offers,
        observer: Arc<dyn Observer>,
    ) -> Result<Session, Fault> {
        channel.replay_opening();
        let channel = SharedChannel::new(channel);
        let client_side = Box::new(channel.client_side(facts.address));
        let hello = ClientId::Domain(self.connector.options.hello_name.clone());
        let connection = AsyncSmtpConnection::connect_with_transport(client_side, &hello)
            .await
            .map_err(|_| protocol("the session could not be taken up"))?;
        Ok(Session::new(connection, channel, self.connector.options.deadlines, facts, offers, observer))
    }

    fn enter(&mut self, phase: Phase) {
        self.ended();
        self.phase = phase;
        self.since = Instant::now();
    }

    fn ended(&mut self) {
        let took = self.since.elapsed();
        self.found.laps.push((self.phase, took));
        self.connector.observer.phase(self.phase, took);
    }
}

/// Logs in; returns the mechanism that was accepted.
async fn authenticate(session: &mut Session, credentials: &Credentials) -> Result<&'static str, Fault> {
    let client_credentials =
        ClientCredentials::new(credentials.username().to_owned(), credentials.password().to_owned());
    for mechanism in session.offers().usable_mechanisms() {
        let reply = try_mechanism(session, mechanism, &client_credentials).await?;
        if reply.is_success() {
            return Ok(match mechanism {
                Mechanism::Login => "LOGIN",
                _ => "PLAIN",
            });
        }
        if !reply.is_refusal() || reply.closes() || !policy::auth_may_try_next(&reply.to_model()) {
            return Err(reply.into_fault());
        }
    }
    Err(Fault::NoAuthMechanism { offered: session.offers().mechanisms.join(" ") })
}

/// One AUTH exchange. LOGIN's prompts are not read: the first asks for the user name, the second for the password,
/// in whatever words.
async fn try_mechanism(
    session: &mut Session,
    mechanism: Mechanism,
    credentials: &ClientCredentials,
) -> Result<RawReply, Fault> {
    let prompts: &[&str] = if mechanism == Mechanism::Login { &["Username:", "Password:"] } else { &[] };
    let unusable = |_| protocol("the credentials cannot be encoded");
    let mut command = Auth::new(mechanism, credentials.clone(), None).map_err(unusable)?;
    let mut prompts = prompts.iter();
    loop {
        let (connection, channel, deadlines) = session.parts();
        channel.lock().begin_command();
        let reply = drive(&channel, &deadlines, connection.command(command)).await?;
        let Some(prompt) = prompts.next().filter(|_| reply.code == 334) else {
            return Ok(reply);
        };
        command = Auth::new(mechanism, credentials.clone(), Some((*prompt).to_owned())).map_err(unusable)?;
    }
}
