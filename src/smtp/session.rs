//! One session with a server: any number of transactions, one after the other.
//! Guarantee: every recipient has its own answer, only a 2xx to the final dot counts as accepted, and a failure says
//! whether the final dot may have left. A session is usable again only after a transaction came to a clean end.

use std::fmt::Write as _;
use std::future::poll_fn;
use std::net::SocketAddr;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use lettre::transport::smtp::client::AsyncSmtpConnection;
use lettre::transport::smtp::commands::Quit;
use lettre::transport::smtp::response::Response;
use tokio::time::{Instant, sleep_until, timeout};

use super::connect::Observer;
use super::offers::Offers;
use super::reply::{RawReply, protocol};
use super::stream::{Deadlines, SharedChannel};
use super::tls::TlsFacts;
use crate::model::address::EmailAddress;
use crate::model::failure::{Failure, Fault, Phase, Reply, Transaction, TransactionOutcome};

/// A goodbye is a courtesy: nobody waits longer for its answer.
const QUIT_LIMIT: Duration = Duration::from_secs(2);

/// Who sends to whom.
#[derive(Debug, Clone)]
pub struct Envelope {
    /// The envelope sender.
    pub from: EmailAddress,
    /// Recipients with their positions in the job (to + cc + bcc).
    pub recipients: Vec<(u16, EmailAddress)>,
    /// Whether an address or a header needs SMTPUTF8 (RFC 6531).
    pub smtputf8: bool,
}

/// What is known of a session from its opening.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SessionFacts {
    /// The address that was dialled.
    pub address: SocketAddr,
    /// The server's greeting.
    pub greeting: Reply,
    /// None for a session in the clear.
    pub tls: Option<TlsFacts>,
    /// AUTH mechanism that was accepted; none without credentials.
    pub mechanism: Option<&'static str>,
}

/// Tells of the message under way in a session, whatever has become of the session.
#[derive(Clone)]
pub struct FinalDot(SharedChannel);

impl FinalDot {
    /// Whether a byte of the final dot may have left: from then on the server may have accepted the message.
    pub fn may_have_left(&self) -> bool {
        self.0.lock().dotted()
    }
}

impl std::fmt::Debug for FinalDot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "FinalDot({})", self.may_have_left())
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// MAIL may follow.
    Ready,
    /// A transaction is half open: RSET first.
    HalfOpen,
    /// Nothing may follow: something failed, or is under way, or was abandoned under way.
    Unusable,
}

/// A session that is open and logged in.
pub struct Session {
    connection: AsyncSmtpConnection,
    channel: SharedChannel,
    deadlines: Deadlines,
    facts: SessionFacts,
    offers: Offers,
    observer: Arc<dyn Observer>,
    state: State,
    transactions: u32,
    lap: Instant,
}

/// Why a transaction ended before its outcome, and whether the session can go on.
struct Stop {
    phase: Phase,
    fault: Fault,
    session: AfterStop,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum AfterStop {
    Untouched,
    HalfOpen,
    Unusable,
}

impl Stop {
    fn broken(phase: Phase, fault: Fault) -> Self {
        Self { phase, fault, session: AfterStop::Unusable }
    }

    /// The server refused a command; the session lives unless the server closes it or the reply makes no sense.
    fn refused(phase: Phase, reply: RawReply) -> Self {
        let goes_on = reply.is_refusal() && !reply.closes();
        let session = if goes_on { AfterStop::HalfOpen } else { AfterStop::Unusable };
        Self { phase, fault: reply.into_fault(), session }
    }
}

/// What the envelope came to.
enum Opened {
    /// 354: the message may follow.
    Go,
    NoRecipient,
    Withheld,
}

/// One command of the envelope.
#[derive(Clone, Copy)]
enum Step<'a> {
    Rset,
    Mail,
    Rcpt(u16, &'a EmailAddress),
    Data,
}

impl Step<'_> {
    fn phase(self) -> Phase {
        match self {
            Self::Rset => Phase::Rset,
            Self::Mail => Phase::Mail,
            Self::Rcpt(..) => Phase::Rcpt,
            Self::Data => Phase::Data,
        }
    }
}

/// The answers to the envelope so far.
#[derive(Default)]
struct Answers {
    mail: Option<RawReply>,
    accepted: usize,
    refused: Vec<(u16, Reply)>,
    data: Option<RawReply>,
}

impl Session {
    pub(super) fn new(
        connection: AsyncSmtpConnection,
        channel: SharedChannel,
        deadlines: Deadlines,
        facts: SessionFacts,
        offers: Offers,
        observer: Arc<dyn Observer>,
    ) -> Self {
        Self {
            connection,
            channel,
            deadlines,
            facts,
            offers,
            observer,
            state: State::Ready,
            transactions: 0,
            lap: Instant::now(),
        }
    }

    /// What is known from the opening.
    pub fn facts(&self) -> &SessionFacts {
        &self.facts
    }

    pub(super) fn facts_mut(&mut self) -> &mut SessionFacts {
        &mut self.facts
    }

    pub(super) fn offers(&self) -> &Offers {
        &self.offers
    }

    pub(super) fn parts(&mut self) -> (&mut AsyncSmtpConnection, SharedChannel, Deadlines) {
        (&mut self.connection, self.channel.clone(), self.deadlines)
    }

    /// Transactions so far, the failed ones included.
    pub fn transactions(&self) -> u32 {
        self.transactions
    }

    /// A look at the message under way that outlives this session's use: for an attempt that is cut off.
    pub fn final_dot(&self) -> FinalDot {
        FinalDot(self.channel.clone())
    }

    /// Whether another transaction may be tried. False after a loss, a timeout, 421, a violation of the protocol, and
    /// after a [`Session::send`] that was dropped before its end.
    pub fn is_usable(&self) -> bool {
        self.state != State::Unusable
    }

    /// Whether it is usable and the server has neither spoken nor hung up since.
    pub(super) fn is_quiet(&self) -> bool {
        self.is_usable() && self.channel.lock().is_quiet()
    }

    /// Carries one message. Its lines end in CRLF and hold no other CR or LF; its last CRLF may be missing.
    ///
    /// The gate is awaited right before the write that contains DATA; when it says no, nothing is sent
    /// ([`TransactionOutcome::Withheld`]) and the session can go on. With PIPELINING (RFC 2920) the whole envelope is
    /// that write.
    pub async fn send(
        &mut self,
        envelope: &Envelope,
        message: &[u8],
        gate: impl Future<Output = bool> + Send,
    ) -> Transaction {
        let before = std::mem::replace(&mut self.state, State::Unusable);
        let reused = self.transactions > 0;
        // The last message's dot is not this one's, and the gate is awaited before the next command.
        self.channel.lock().end_body();
        let mut answers = Answers::default();
        let outcome = match before {
            State::Unusable => Err(Stop::broken(Phase::Mail, Fault::Lost)),
            _ => self.transaction(before, envelope, message, gate, &mut answers).await,
        };
        let outcome = outcome.unwrap_or_else(|stop| {
            self.state = match stop.session {
                AfterStop::Untouched => before,
                AfterStop::HalfOpen => State::HalfOpen,
                AfterStop::Unusable => State::Unusable,
            };
            let address = Some(self.facts.address);
            TransactionOutcome::Failed(Failure { phase: stop.phase, fault: stop.fault, reused, address })
        });
        Transaction { refused: answers.refused, outcome }
    }

    /// Says goodbye, for at most two seconds.
    pub async fn quit(mut self) {
        if self.is_usable() {
            self.channel.lock().begin_command();
            let limit = QUIT_LIMIT.min(self.deadlines.command);
            // Whatever comes of it, the connection is closed next.
            let _ = timeout(limit, self.connection.command(Quit)).await;
        }
    }

    async fn transaction(
        &mut self,
        before: State,
        envelope: &Envelope,
        message: &[u8],
        gate: impl Future<Output = bool> + Send,
        answers: &mut Answers,
    ) -> Result<TransactionOutcome, Stop> {
        let mail = self.mail_command(envelope, message)?;
        self.lap = Instant::now();
        let opened = if self.offers.pipelining {
            self.pipelined(before, &mail, envelope, gate, answers).await?
        } else {
            self.step_by_step(before, &mail, envelope, gate, answers).await?
        };
        match opened {
            Opened::Go => {
                let reply = self.message(message).await?;
                self.state = State::Ready;
                Ok(TransactionOutcome::Accepted(reply.to_model()))
            }
            Opened::NoRecipient => Ok(TransactionOutcome::NoRecipient),
            Opened::Withheld => Ok(TransactionOutcome::Withheld),
        }
    }

    /// MAIL with its parameters, or why this server cannot take the message.
    fn mail_command(&self, envelope: &Envelope, message: &[u8]) -> Result<String, Stop> {
        let unfit = |fault| Stop { phase: Phase::Mail, fault, session: AfterStop::Untouched };
        if envelope.smtputf8 && !self.offers.smtputf8 {
            return Err(unfit(Fault::Smtputf8Missing));
        }
        let size = message.len() as u64;
        let mut command = format!("MAIL FROM:<{}>", envelope.from.as_str());
        if let Some(limit) = self.offers.size {
            if let Some(limit) = limit.filter(|limit| size > *limit) {
                return Err(unfit(Fault::SizeExceeded { size, limit }));
            }
            write!(command, " SIZE={size}").expect("a String takes everything");
        }
        if envelope.smtputf8 {
            command.push_str(" SMTPUTF8");
            if self.offers.eight_bit_mime && !message.is_ascii() {
                command.push_str(" BODY=8BITMIME");
            }
        }
        command.push_str("\r\n");
        Ok(command)
    }

    /// RSET if need be, MAIL, every RCPT and DATA in one write, then their replies one by one.
    async fn pipelined(
        &mut self,
        before: State,
        mail: &str,
        envelope: &Envelope,
        gate: impl Future<Output = bool> + Send,
        answers: &mut Answers,
    ) -> Result<Opened, Stop> {
        if !gate.await {
            self.state = before;
            return Ok(Opened::Withheld);
        }
        let steps = steps(before, envelope);
        let mut text = String::with_capacity(128 + 64 * steps.len());
        steps.iter().for_each(|step| push_command(&mut text, *step, mail));
        self.transactions += 1;
        let mut unsent = Some(text);
        for step in steps {
            let reply = match unsent.take() {
                Some(text) => self.command(&text).await,
                None => self.next_reply().await,
            };
            let noted = reply.map_err(|fault| Stop::broken(step.phase(), fault));
            let noted = noted.and_then(|reply| answers.note(step, reply));
            self.lap_ended(step.phase());
            if let Err(stop) = noted {
                // A refused MAIL decides; what follows it is noise, even a loss.
                return Err(match answers.mail.take() {
                    Some(refusal) => Stop::broken(Phase::Mail, refusal.into_fault()),
                    None => stop,
                });
            }
        }
        self.envelope_result(answers).await
    }

    async fn envelope_result(&mut self, answers: &mut Answers) -> Result<Opened, Stop> {
        let go = answers.data.as_ref().is_some_and(|reply| reply.code == 354);
        if go && answers.mail.is_none() && answers.accepted > 0 {
            return Ok(Opened::Go);
        }
        // The server awaits a message that has nobody to go to (RFC 2920 section 3.1).
        let in_order = !go || self.command(".\r\n").await.is_ok_and(|reply| !reply.closes());
        if let Some(refusal) = answers.mail.take() {
            let stop = Stop::refused(Phase::Mail, refusal);
            return Err(if in_order { stop } else { Stop::broken(stop.phase, stop.fault) });
        }
        if answers.accepted == 0 {
            self.state = if in_order { State::HalfOpen } else { State::Unusable };
            return Ok(Opened::NoRecipient);
        }
        match answers.data.take() {
            Some(reply) => Err(Stop::refused(Phase::Data, reply)),
            None => Err(Stop::broken(Phase::Data, protocol("DATA got no reply"))),
        }
    }

    /// The same for a server that takes one command at a time.
    async fn step_by_step(
        &mut self,
        before: State,
        mail: &str,
        envelope: &Envelope,
        gate: impl Future<Output = bool> + Send,
        answers: &mut Answers,
    ) -> Result<Opened, Stop> {
        self.transactions += 1;
        let mut gate = Some(gate);
        for step in steps(before, envelope) {
            if matches!(step, Step::Data) {
                if answers.accepted == 0 {
                    self.state = State::HalfOpen;
                    return Ok(Opened::NoRecipient);
                }
                if let Some(gate) = gate.take()
                    && !gate.await
                {
                    self.state = State::HalfOpen;
                    return Ok(Opened::Withheld);
                }
                self.lap = Instant::now();
            }
            let mut text = String::new();
            push_command(&mut text, step, mail);
            let reply = self.command(&text).await.map_err(|fault| Stop::broken(step.phase(), fault));
            self.lap_ended(step.phase());
            answers.note(step, reply?)?;
            if let Some(refusal) = answers.mail.take() {
                return Err(Stop::refused(Phase::Mail, refusal));
            }
        }
        self.envelope_result(answers).await
    }

    /// The message, the final dot and its reply.
    async fn message(&mut self, message: &[u8]) -> Result<RawReply, Stop> {
        // The client library ends the last line itself.
        let message = message.strip_suffix(b"\r\n").unwrap_or(message);
        self.channel.lock().begin_body();
        let outcome = drive(&self.channel, &self.deadlines, self.connection.message(message)).await;
        let phase = if self.channel.lock().dotted() { Phase::FinalDot } else { Phase::Body };
        self.lap_ended(phase);
        let reply = outcome.map_err(|fault| Stop::broken(phase, fault))?;
        if reply.is_success() {
            return Ok(reply);
        }
        Err(Stop::refused(Phase::FinalDot, reply))
    }

    async fn command(&mut self, text: &str) -> Result<RawReply, Fault> {
        self.channel.lock().begin_command();
        drive(&self.channel, &self.deadlines, self.connection.command(text)).await
    }

    async fn next_reply(&mut self) -> Result<RawReply, Fault> {
        self.channel.lock().begin_reply();
        drive(&self.channel, &self.deadlines, self.connection.read_response()).await
    }

    fn lap_ended(&mut self, phase: Phase) {
        let now = Instant::now();
        self.observer.phase(phase, now - self.lap);
        self.lap = now;
    }
}

impl Answers {
    /// Takes a reply up; what ends the transaction at once is an error.
    fn note(&mut self, step: Step<'_>, reply: RawReply) -> Result<(), Stop> {
        if reply.closes() {
            return Err(Stop::broken(step.phase(), reply.into_fault()));
        }
        match step {
            Step::Rset if !reply.is_success() => return Err(Stop::broken(Phase::Rset, reply.into_fault())),
            Step::Rset => {}
            Step::Mail if reply.is_refusal() => self.mail = Some(reply),
            Step::Rcpt(..) if self.mail.is_some() => {}
            Step::Rcpt(index, _) if reply.is_refusal() => self.refused.push((index, reply.to_model())),
            Step::Mail | Step::Rcpt(..) if !reply.is_success() => {
                return Err(Stop::broken(step.phase(), reply.into_fault()));
            }
            Step::Mail => {}
            Step::Rcpt(..) => self.accepted += 1,
            Step::Data => self.data = Some(reply),
        }
        Ok(())
    }
}

fn steps(before: State, envelope: &Envelope) -> Vec<Step<'_>> {
    let rset = (before == State::HalfOpen).then_some(Step::Rset);
    let recipients = envelope.recipients.iter().map(|(index, address)| Step::Rcpt(*index, address));
    rset.into_iter().chain([Step::Mail]).chain(recipients).chain([Step::Data]).collect()
}

fn push_command(text: &mut String, step: Step<'_>, mail: &str) {
    match step {
        Step::Rset => text.push_str("RSET\r\n"),
        Step::Mail => text.push_str(mail),
        Step::Rcpt(_, address) => {
            write!(text, "RCPT TO:<{}>\r\n", address.as_str()).expect("a String takes everything");
        }
        Step::Data => text.push_str("DATA\r\n"),
    }
}

/// Lets the client library work until the channel's deadline, which moves while a message makes progress. The reply
/// is the channel's, complete as it came.
pub(super) async fn drive(
    channel: &SharedChannel,
    deadlines: &Deadlines,
    work: impl Future<Output = Result<Response, lettre::transport::smtp::Error>>,
) -> Result<RawReply, Fault> {
    let mut work = std::pin::pin!(work);
    let mut limit = std::pin::pin!(sleep_until(channel.lock().deadline(deadlines)));
    poll_fn(|cx| {
        if work.as_mut().poll(cx).is_ready() {
            return Poll::Ready(channel.lock().take_outcome());
        }
        // The work just done may have moved the deadline, either way.
        let deadline = channel.lock().deadline(deadlines);
        if deadline != limit.deadline() {
            limit.as_mut().reset(deadline);
        }
        limit.as_mut().poll(cx).map(|()| Err(Fault::Timeout))
    })
    .await
}
