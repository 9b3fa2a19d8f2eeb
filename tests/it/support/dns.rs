//! A name server whose answers are scripted name by name, on 127.0.0.1, over UDP and TCP.
//! Guarantee: a name without a script does not exist, and every question is counted before it is answered.
#![allow(
    dead_code,
    reason = "shared by the unit tests of `egress` and the integration tests; neither uses all of it"
)]

use std::collections::HashMap;
use std::future::Future;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use hickory_server::Server;
use hickory_server::net::runtime::Time;
use hickory_server::proto::op::{Header, HeaderCounts, Metadata, ResponseCode};
use hickory_server::proto::rr::rdata::{CNAME, MX, TXT};
use hickory_server::proto::rr::{Name, RData, Record, RecordType};
use hickory_server::server::{Request, RequestHandler, ResponseHandler, ResponseInfo};
use hickory_server::zone_handler::MessageResponseBuilder;
use tokio::net::{TcpListener, UdpSocket};

const TCP_IDLE_LIMIT: Duration = Duration::from_secs(10);
const TCP_RESPONSE_BUFFER: usize = 16;
const MAX_ALIASES: usize = 8;
const MAIL_TTL_S: u32 = 60;
const TEXT_STRING_MAX: usize = 100;

/// What the server says to an address question.
#[derive(Debug, Clone)]
pub enum Answer {
    /// These addresses: the IPv4 ones to an A question, the IPv6 ones to an AAAA question. Empty: the name
    /// exists and has no address.
    Addresses(Vec<IpAddr>),
    /// One list after the other, question by question of one type, and again from the first.
    Alternating(Vec<Vec<IpAddr>>),
    /// An alias. Its target's records follow in the same answer, as a recursive server does it.
    Alias(String),
    /// An alias alone: whoever asks has to follow it.
    BareAlias(String),
    /// The name does not exist.
    NoSuchName,
    /// SERVFAIL.
    ServerFailure,
    /// No answer at all.
    Silence,
}

impl Answer {
    /// Addresses, written as text. Panics on a text that is none.
    pub fn addresses(list: &[&str]) -> Self {
        Self::Addresses(parse(list))
    }

    /// Lists of addresses that take turns. Panics on a text that is no address.
    pub fn alternating(lists: &[&[&str]]) -> Self {
        Self::Alternating(lists.iter().map(|list| parse(list)).collect())
    }
}

fn parse(list: &[&str]) -> Vec<IpAddr> {
    list.iter().map(|text| text.parse().unwrap_or_else(|_| panic!("{text} is no address"))).collect()
}

/// What the server says to a question about a domain's mail.
#[derive(Debug, Clone)]
pub enum MailAnswer {
    /// TXT records. A text is given in strings of at most 100 bytes, as long ones have to be cut.
    Texts(Vec<String>),
    /// MX records: preference and host; `.` for none.
    Exchangers(Vec<(u16, String)>),
    /// An alias, with the texts of its target in the same answer.
    AliasWithTexts(String, Vec<String>),
    /// SERVFAIL.
    ServerFailure,
    /// No answer at all.
    Silence,
}

impl MailAnswer {
    /// TXT records.
    pub fn texts(texts: &[&str]) -> Self {
        Self::Texts(texts.iter().map(|text| (*text).to_owned()).collect())
    }

    /// MX records of one preference.
    pub fn exchangers(hosts: &[&str]) -> Self {
        Self::Exchangers(hosts.iter().map(|host| (10, (*host).to_owned())).collect())
    }
}

/// The type of a question about a domain's mail.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum MailQuestion {
    /// TXT.
    Text,
    /// MX.
    Exchanger,
}

/// The type of an address question.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Family {
    /// A.
    V4,
    /// AAAA.
    V6,
}

/// A running name server; dropping it ends it.
pub struct DnsServer {
    address: SocketAddr,
    zone: Zone,
    _server: Server<Zone>,
}

impl DnsServer {
    /// Starts on a free port of 127.0.0.1, the same one for UDP and TCP.
    pub async fn start() -> Self {
        let zone = Zone::default();
        let (udp, tcp, address) = bind().await;
        let mut server = Server::new(zone.clone());
        server.register_socket(udp);
        server.register_listener(tcp, TCP_IDLE_LIMIT, TCP_RESPONSE_BUFFER);
        Self { address, zone, _server: server }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Sets, or replaces, what is said of a name, to both types of address question.
    pub fn script(&self, name: &str, answer: Answer, ttl_s: u32) {
        for family in [Family::V4, Family::V6] {
            self.script_family(name, family, answer.clone(), ttl_s);
        }
    }

    /// The same for one type of address question; the other one keeps its script.
    pub fn script_family(&self, name: &str, family: Family, answer: Answer, ttl_s: u32) {
        self.zone.lock().scripts.insert((normal(name), family), Script { answer, ttl_s, given: 0 });
    }

    /// Sets, or replaces, what is said to one type of question about a name's mail. Without, there is no such record.
    pub fn script_mail(&self, name: &str, question: MailQuestion, answer: MailAnswer) {
        self.zone.lock().mail.insert((normal(name), mail_record_type(question)), answer);
    }

    /// A sender's domain with nothing to complain about: one SPF record, a DMARC record, an MX record.
    pub fn script_senders_domain(&self, domain: &str) {
        let texts = MailAnswer::texts(&["v=spf1 include:_spf.provider.example -all"]);
        self.script_mail(domain, MailQuestion::Text, texts);
        let dmarc = MailAnswer::texts(&["v=DMARC1; p=quarantine"]);
        self.script_mail(&format!("_dmarc.{domain}"), MailQuestion::Text, dmarc);
        let exchangers = MailAnswer::exchangers(&[&format!("mx.{domain}")]);
        self.script_mail(domain, MailQuestion::Exchanger, exchangers);
    }

    /// How many questions there were about a name, of any type.
    pub fn questions(&self, name: &str) -> usize {
        self.zone
            .lock()
            .questions
            .iter()
            .filter(|((asked, _), _)| *asked == normal(name))
            .map(|(_, n)| n)
            .sum()
    }

    /// How many address questions of one type there were about a name.
    pub fn questions_of(&self, name: &str, family: Family) -> usize {
        let key = (normal(name), record_type(family));
        self.zone.lock().questions.get(&key).copied().unwrap_or(0)
    }
}

async fn bind() -> (UdpSocket, TcpListener, SocketAddr) {
    for _ in 0..100 {
        let tcp = TcpListener::bind("127.0.0.1:0").await.expect("a free TCP port");
        let address = tcp.local_addr().expect("bound");
        if let Ok(udp) = UdpSocket::bind(address).await {
            return (udp, tcp, address);
        }
    }
    panic!("no port of 127.0.0.1 is free for both UDP and TCP");
}

/// Lower case, no trailing dot.
fn normal(name: &str) -> String {
    name.trim_end_matches('.').to_ascii_lowercase()
}

fn record_type(family: Family) -> RecordType {
    match family {
        Family::V4 => RecordType::A,
        Family::V6 => RecordType::AAAA,
    }
}

fn mail_record_type(question: MailQuestion) -> RecordType {
    match question {
        MailQuestion::Text => RecordType::TXT,
        MailQuestion::Exchanger => RecordType::MX,
    }
}

#[derive(Clone, Default)]
struct Zone(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    scripts: HashMap<(String, Family), Script>,
    mail: HashMap<(String, RecordType), MailAnswer>,
    questions: HashMap<(String, RecordType), usize>,
}

struct Script {
    answer: Answer,
    ttl_s: u32,
    /// How often a list of an alternating answer was given.
    given: usize,
}

enum Reply {
    Records(ResponseCode, Vec<Record>),
    Silence,
}

impl Zone {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().expect("no holder of the lock panics")
    }
}

impl State {
    fn reply(&mut self, asked: &Name, record_type: RecordType) -> Reply {
        let name = normal(&asked.to_ascii());
        *self.questions.entry((name.clone(), record_type)).or_default() += 1;
        match record_type {
            RecordType::A => self.reply_with_addresses(name, Family::V4),
            RecordType::AAAA => self.reply_with_addresses(name, Family::V6),
            RecordType::CNAME => self.reply_with_alias(&name),
            _ => self.reply_about_mail(&name, record_type),
        }
    }

    fn reply_about_mail(&self, name: &str, record_type: RecordType) -> Reply {
        let records = match self.mail.get(&(name.to_owned(), record_type)) {
            None => vec![],
            Some(MailAnswer::Texts(texts)) => text_records(name, texts),
            Some(MailAnswer::Exchangers(list)) => list
                .iter()
                .map(|(preference, host)| {
                    let mx = MX::new(*preference, absolute(host.trim_end_matches('.')));
                    Record::from_rdata(absolute(name), MAIL_TTL_S, RData::MX(mx))
                })
                .collect(),
            Some(MailAnswer::AliasWithTexts(target, texts)) => {
                let alias = alias_record(name, target, MAIL_TTL_S);
                [vec![alias], text_records(&normal(target), texts)].concat()
            }
            Some(MailAnswer::ServerFailure) => return Reply::Records(ResponseCode::ServFail, vec![]),
            Some(MailAnswer::Silence) => return Reply::Silence,
        };
        Reply::Records(ResponseCode::NoError, records)
    }

    fn reply_with_alias(&self, name: &str) -> Reply {
        let script = [Family::V4, Family::V6].iter().find_map(|f| self.scripts.get(&(name.to_owned(), *f)));
        match script.map(|script| (&script.answer, script.ttl_s)) {
            None | Some((Answer::NoSuchName, _)) => Reply::Records(ResponseCode::NXDomain, vec![]),
            Some((Answer::Alias(target) | Answer::BareAlias(target), ttl_s)) => {
                Reply::Records(ResponseCode::NoError, vec![alias_record(name, target, ttl_s)])
            }
            Some((Answer::ServerFailure, _)) => Reply::Records(ResponseCode::ServFail, vec![]),
            Some((Answer::Silence, _)) => Reply::Silence,
            Some((Answer::Addresses(_) | Answer::Alternating(_), _)) => {
                Reply::Records(ResponseCode::NoError, vec![])
            }
        }
    }

    fn reply_with_addresses(&mut self, mut name: String, family: Family) -> Reply {
        let mut records = vec![];
        for _ in 0..MAX_ALIASES {
            let Some(script) = self.scripts.get_mut(&(name.clone(), family)) else {
                return Reply::Records(ResponseCode::NXDomain, records);
            };
            let ttl_s = script.ttl_s;
            match &script.answer {
                Answer::Addresses(list) => {
                    records.extend(address_records(&name, list, family, ttl_s));
                    return Reply::Records(ResponseCode::NoError, records);
                }
                Answer::Alternating(lists) => {
                    records.extend(address_records(&name, &lists[script.given % lists.len()], family, ttl_s));
                    script.given += 1;
                    return Reply::Records(ResponseCode::NoError, records);
                }
                Answer::BareAlias(target) => {
                    records.push(alias_record(&name, target, ttl_s));
                    return Reply::Records(ResponseCode::NoError, records);
                }
                Answer::Alias(target) => {
                    records.push(alias_record(&name, target, ttl_s));
                    name = normal(target);
                }
                Answer::NoSuchName => return Reply::Records(ResponseCode::NXDomain, records),
                Answer::ServerFailure => return Reply::Records(ResponseCode::ServFail, vec![]),
                Answer::Silence => return Reply::Silence,
            }
        }
        Reply::Records(ResponseCode::ServFail, vec![])
    }
}

fn absolute(name: &str) -> Name {
    Name::from_ascii(format!("{name}.")).unwrap_or_else(|error| panic!("{name} is no DNS name: {error}"))
}

fn alias_record(name: &str, target: &str, ttl_s: u32) -> Record {
    Record::from_rdata(absolute(name), ttl_s, RData::CNAME(CNAME(absolute(&normal(target)))))
}

fn text_records(name: &str, texts: &[String]) -> Vec<Record> {
    let record = |text: &String| {
        let strings = text.as_bytes().chunks(TEXT_STRING_MAX).collect();
        Record::from_rdata(absolute(name), MAIL_TTL_S, RData::TXT(TXT::from_bytes(strings)))
    };
    texts.iter().map(record).collect()
}

fn address_records(name: &str, list: &[IpAddr], family: Family, ttl_s: u32) -> Vec<Record> {
    let of_family = list.iter().filter(|ip| ip.is_ipv4() == (family == Family::V4));
    of_family.map(|ip| Record::from_rdata(absolute(name), ttl_s, RData::from(*ip))).collect()
}

/// The server's trait is declared with boxed futures; this is the same declaration, written out.
impl RequestHandler for Zone {
    fn handle_request<'zone, 'request, 'future, R, T>(
        &'zone self,
        request: &'request Request,
        mut responder: R,
    ) -> Pin<Box<dyn Future<Output = ResponseInfo> + Send + 'future>>
    where
        R: 'future + ResponseHandler,
        T: 'future + Time,
        'zone: 'future,
        'request: 'future,
        Self: 'future,
    {
        Box::pin(async move {
            let mut metadata = Metadata::response_from_request(&request.metadata);
            metadata.recursion_available = true;
            let reply = match request.request_info() {
                Ok(info) => {
                    let question = info.query.original();
                    self.lock().reply(question.name(), question.query_type())
                }
                Err(_) => Reply::Records(ResponseCode::FormErr, vec![]),
            };
            let Reply::Records(code, records) = reply else {
                return ResponseInfo::from(Header { metadata, counts: HeaderCounts::default() });
            };
            metadata.response_code = code;
            let response =
                MessageResponseBuilder::from_message_request(request).build(metadata, &records, [], [], []);
            match responder.send_response(response).await {
                Ok(info) => info,
                // Whoever asked has gone away.
                Err(_) => ResponseInfo::from(Header { metadata, counts: HeaderCounts::default() }),
            }
        })
    }
}
