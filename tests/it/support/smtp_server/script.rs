//! How the server behaves, and the rules by which it misbehaves.
//! Guarantee: of several rules that fit, the first one counts.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;

/// When the server speaks TLS.
#[derive(Clone)]
pub enum Tls {
    /// Never.
    None,
    /// On STARTTLS.
    Starttls(Arc<rustls::ServerConfig>),
    /// From the first byte.
    Implicit(Arc<rustls::ServerConfig>),
}

/// A point of the dialogue where a rule can step in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Stage {
    /// Before the 220.
    Banner,
    /// EHLO or HELO.
    Ehlo,
    /// STARTTLS.
    Starttls,
    /// AUTH; the argument is the mechanism.
    Auth,
    /// RSET.
    Rset,
    /// MAIL FROM; the argument is the address.
    Mail,
    /// RCPT TO; the argument is the address.
    Rcpt,
    /// DATA.
    Data,
    /// While the message comes in; only [`Action::CloseAfterBytes`], [`Action::Silence`], [`Action::Reply`] (said at
    /// once, out of turn) and [`Action::ReplyThenClose`] mean something here.
    Body,
    /// The final dot has come.
    FinalDot,
    /// QUIT.
    Quit,
}

/// What the server does instead of, or beside, its usual reply.
#[derive(Clone)]
pub enum Action {
    /// These bytes (`\r\n` is added). 2xx and 3xx let the command take effect, others do not.
    Reply(Vec<u8>),
    /// These bytes and the end of the connection.
    ReplyThenClose(Vec<u8>),
    /// The end of the connection.
    Close,
    /// At [`Stage::FinalDot`]: the message is taken, and the connection ends without a reply.
    AcceptThenClose,
    /// At [`Stage::Body`]: the end of the connection once so many bytes have come.
    CloseAfterBytes(usize),
    /// No reply, ever, on an open connection.
    Silence,
    /// The reply, one byte at a time.
    Drip(Vec<u8>, Duration),
    /// One reply line of so many bytes.
    HugeLine(usize),
    /// `250-more` without end.
    EndlessReply,
    /// The usual reply after a while.
    After(Duration),
    /// The usual reply when the test says so.
    Hold(Arc<Notify>),
    /// The usual reply with these bytes right behind it.
    Inject(Vec<u8>),
}

impl Action {
    /// [`Action::Reply`] of a text.
    pub fn reply(text: &str) -> Self {
        Self::Reply(text.as_bytes().to_vec())
    }
}

/// A point that is being passed.
#[derive(Debug, Clone, Copy)]
pub struct Moment<'a> {
    /// Where.
    pub stage: Stage,
    /// The command's argument; the sender's or recipient's address.
    pub argument: &'a str,
    /// How often the stage was reached in this session, this time included; for [`Stage::Rcpt`] in this transaction.
    pub nth: usize,
    /// Number of the session, from 0.
    pub session: usize,
}

type Condition = Arc<dyn Fn(&Moment<'_>) -> bool + Send + Sync>;

/// One way to misbehave, at one stage.
#[derive(Clone)]
pub struct Rule {
    stage: Stage,
    action: Action,
    condition: Option<Condition>,
    times_left: Option<usize>,
}

impl Rule {
    /// Every time the stage is reached.
    pub fn new(stage: Stage, action: Action) -> Self {
        Self { stage, action, condition: None, times_left: None }
    }

    /// Only the next so many times.
    pub fn times(mut self, times: usize) -> Self {
        self.times_left = Some(times);
        self
    }

    /// Only the next time.
    pub fn once(self) -> Self {
        self.times(1)
    }

    /// Only for this address (MAIL and RCPT) or mechanism (AUTH).
    pub fn of(self, argument: &str) -> Self {
        let argument = argument.to_owned();
        self.when(move |moment| moment.argument.eq_ignore_ascii_case(&argument))
    }

    /// Only the nth time in a session (RCPT: in a transaction), from 1.
    pub fn nth(self, nth: usize) -> Self {
        self.when(move |moment| moment.nth == nth)
    }

    /// Only where this holds, and what was asked before.
    pub fn when(mut self, condition: impl Fn(&Moment<'_>) -> bool + Send + Sync + 'static) -> Self {
        let before = self.condition.take();
        self.condition =
            Some(Arc::new(move |moment| before.as_ref().is_none_or(|c| c(moment)) && condition(moment)));
        self
    }
}

/// How the server is: changeable while it runs, for what comes then.
#[derive(Clone)]
pub struct Behaviour {
    /// When it speaks TLS.
    pub tls: Tls,
    /// Its greeting, code included.
    pub banner: &'static str,
    /// User name and password that it demands; none means mail from anybody.
    pub login: Option<(String, String)>,
    /// What it says to any other user name or password, code included.
    pub wrong_login: &'static str,
    /// AUTH mechanisms on offer.
    pub mechanisms: Vec<&'static str>,
    /// Offers AUTH without TLS.
    pub auth_in_clear: bool,
    /// Offers PIPELINING.
    pub pipelining: bool,
    /// SIZE announced and enforced, in bytes.
    pub size: Option<usize>,
    /// Offers SMTPUTF8.
    pub smtputf8: bool,
    /// Writes its EHLO keywords in lower case.
    pub lower_case: bool,
    /// Further lines of the EHLO reply.
    pub more_keywords: Vec<&'static str>,
    /// 421 to the MAIL behind so many messages in a session.
    pub messages_per_session: Option<usize>,
    /// The connection is closed right after the reply to so many messages.
    pub closes_after_messages: Option<usize>,
    /// 421 to who connects while so many connections are open; counted in [`super::Seen::over_limit`].
    pub most_connections: Option<usize>,
    /// 451 to each message beyond so many within a time; counted in [`super::Seen::over_limit`].
    pub most_messages: Option<(usize, Duration)>,
    /// 452 4.5.3 to the recipients beyond so many.
    pub max_recipients: Option<usize>,
    /// 354 to a DATA without recipients (RFC 2920 section 3.1).
    pub data_without_recipients: bool,
    /// As Postfix does with `reject_sender_login_mismatch`: MAIL is answered 250, every RCPT with this.
    pub sender_refused_at_rcpt: Option<String>,
    /// Keeps the messages and the transcripts; without, only counts.
    pub records: bool,
    rules: Vec<Rule>,
}

impl Default for Behaviour {
    fn default() -> Self {
        Self {
            tls: Tls::None,
            banner: "220 mail.test ESMTP ready",
            login: None,
            wrong_login: "535 5.7.8 user name or password is wrong",
            mechanisms: vec!["PLAIN", "LOGIN"],
            auth_in_clear: false,
            pipelining: true,
            size: Some(50 << 20),
            smtputf8: true,
            lower_case: false,
            more_keywords: Vec::new(),
            messages_per_session: None,
            closes_after_messages: None,
            most_connections: None,
            most_messages: None,
            max_recipients: None,
            data_without_recipients: false,
            sender_refused_at_rcpt: None,
            records: true,
            rules: Vec::new(),
        }
    }
}

impl Behaviour {
    /// Adds a rule; of several that fit, the first one counts.
    pub fn rule(&mut self, rule: Rule) {
        self.rules.push(rule);
    }

    /// Ends all misbehaviour by rule.
    pub fn clear_rules(&mut self) {
        self.rules.clear();
    }

    pub(super) fn action_at(&mut self, moment: &Moment<'_>) -> Option<Action> {
        let fits = |rule: &&mut Rule| {
            rule.stage == moment.stage
                && rule.times_left != Some(0)
                && rule.condition.as_ref().is_none_or(|condition| condition(moment))
        };
        let rule = self.rules.iter_mut().find(fits)?;
        rule.times_left = rule.times_left.map(|left| left - 1);
        Some(rule.action.clone())
    }
}
