//! Each section of the settings, read and judged; then what must fit together.
//! Guarantee: a [`Settings`] that leaves here can be used as it is, and every problem has been looked for.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use base64::Engine;
use ipnet::IpNet;
use secrecy::SecretString;

use super::layers::{Layers, Sources};
use super::reader::Reader;
use super::{
    AllowedPorts, AmqpSettings, ControlSettings, CustomSmtp, DatabaseSettings, DeliverySettings,
    EgressSettings, EncryptionSettings, HttpSettings, LimitSettings, Needs, PlatformSettings,
    RetentionSettings, RetrySettings, Settings, SettingsError, SmtpSettings, hello, lanes,
};
use crate::model::address::{EmailAddress, Mailbox};
use crate::model::provider::{Limited, Overrides};
use crate::model::schedule::Schedule;
use crate::model::smtp_settings::{Credentials, SmtpAccount, TlsMode};
use crate::model::text;

pub(super) const NO_DATABASE: &str = "database.url is missing: set DATABASE_URL (or SENDOFF__DATABASE__URL) to \
                                      postgres://user:password@host/database";
const NO_KEYS: &str = "encryption.keys is missing: make a key with `sendoff keys generate`, and set \
                       SENDOFF__ENCRYPTION__KEYS to it or encryption.keys_file to a file that holds it";

const DAY_S: u32 = 86_400;
/// The broker takes a delivery back after 1800 seconds; the way to the attempt takes up to a minute.
const ATTEMPT_MAX_S: u32 = 1740;
const SCHEDULE_STEPS_MAX: usize = 20;
const SCHEDULE_STEP_MAX_S: u32 = 7 * DAY_S;
const RETENTION_MAX_DAYS: u32 = 3650;
/// Submission with STARTTLS (RFC 6409).
const PLATFORM_PORT: u16 = 587;

/// Reads everything.
pub(super) fn read(sources: &Sources, needs: Needs) -> Result<Settings, SettingsError> {
    let mut problems = Vec::new();
    let layers = Layers::new(sources, &mut problems);
    let mut reader = Reader::new(&layers, problems);
    let settings = read_with(&mut reader, &layers, sources, needs);
    SettingsError::unless_empty(reader.problems)?;
    Ok(settings)
}

/// Reads everything; what comes out may be used only if the reader found no problem.
pub(super) fn read_with(
    reader: &mut Reader<'_>,
    layers: &Layers,
    sources: &Sources,
    needs: Needs,
) -> Settings {
    Settings {
        amqp: amqp(reader, layers),
        database: database(reader, needs),
        encryption: encryption(reader, needs),
        delivery: delivery(reader),
        smtp: smtp(reader, sources),
        egress: egress(reader),
        platform: platform(reader),
        retry: retry(reader),
        limits: limits(reader),
        control: control(reader),
        retention: retention(reader),
        http: http(reader),
    }
}

fn amqp(reader: &mut Reader<'_>, layers: &Layers) -> AmqpSettings {
    let url = reader.parsed("amqp.url", "amqp:// or amqps:// with a host", |text| {
        has_scheme_and_host(text, &["amqp", "amqps"]).then(|| SecretString::from(text))
    });
    let prefix = reader.text("amqp.prefix").unwrap_or_default();
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
    if !(1..=100).contains(&prefix.len()) || !prefix.bytes().all(is_plain) || prefix.starts_with("amq.") {
        reader.refuse(
            "amqp.prefix",
            &prefix,
            "1 to 100 of A-Z, a-z, 0-9, `.`, `_` and `-`, not beginning with `amq.`",
        );
    }
    AmqpSettings { url: url.unwrap_or_default(), prefix, lanes: lanes::read(layers.lanes.as_ref(), reader) }
}

fn database(reader: &mut Reader<'_>, needs: Needs) -> DatabaseSettings {
    let before = reader.problems.len();
    let url = reader.parsed("database.url", "postgres:// or postgresql:// with a host", |text| {
        has_scheme_and_host(text, &["postgres", "postgresql"]).then(|| SecretString::from(text))
    });
    if url.is_none() && needs.database && reader.problems.len() == before {
        reader.problem(NO_DATABASE.to_owned());
    }
    DatabaseSettings { url, migrate_on_start: reader.flag("database.migrate_on_start", true) }
}

/// A URL of one of the schemes with something where its host stands; a database's host may also be a socket's
/// directory in its query.
fn has_scheme_and_host(url: &str, schemes: &[&str]) -> bool {
    let Some((scheme, rest)) = url.split_once("://") else { return false };
    let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
    let host = authority.rsplit('@').next().unwrap_or_default();
    let has_host = !host.is_empty() && !host.starts_with(':');
    schemes.contains(&scheme)
        && (has_host || (rest.contains("host=") && scheme.starts_with("postgres")))
        && !text::has_forbidden_control(url)
        && !url.contains(' ')
}

fn encryption(reader: &mut Reader<'_>, needs: Needs) -> EncryptionSettings {
    let mut items = reader.items("encryption.keys");
    if let Some(path) = reader.text("encryption.keys_file").filter(|_| needs.keys) {
        match std::fs::read_to_string(&path) {
            Ok(text) => {
                let lines = text.lines().map(|line| line.split('#').next().unwrap_or_default().trim());
                items.extend(lines.filter(|line| !line.is_empty()).map(str::to_owned));
            }
            Err(error) => {
                reader.refuse(
                    "encryption.keys_file",
                    &path,
                    &format!("a readable file of keys, one a line ({error})"),
                );
                return EncryptionSettings { keys: Vec::new() };
            }
        }
    }
    let mut ids = BTreeSet::new();
    for item in &items {
        match key_id(item) {
            Some(id) if ids.insert(id) => {}
            Some(id) => {
                reader.problem(format!("encryption.keys: two keys have the id `{id}`; each needs its own"))
            }
            None => {
                let allowed = "`id:base64` with an id of 1 to 32 of A-Z, a-z, 0-9, `.`, `_` and `-`, and 32 bytes in \
                               base64; `sendoff keys generate` makes one";
                reader.refuse("encryption.keys", "", allowed);
            }
        }
    }
    if items.is_empty() && needs.keys {
        reader.problem(NO_KEYS.to_owned());
    }
    EncryptionSettings { keys: items.into_iter().map(SecretString::from).collect() }
}

/// The id of an `id:base64(32 bytes)` item, padded or not, if it is one.
fn key_id(item: &str) -> Option<&str> {
    let (id, key) = item.split_once(':')?;
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
    let bytes = base64::engine::general_purpose::STANDARD_NO_PAD.decode(key.trim_end_matches('=')).ok()?;
    ((1..=32).contains(&id.len()) && id.bytes().all(is_plain) && bytes.len() == 32).then_some(id)
}

fn delivery(reader: &mut Reader<'_>) -> DeliverySettings {
    let custom_smtp = reader.parsed("delivery.custom_smtp", "flagged or all", |text| match text {
        "flagged" => Some(CustomSmtp::Flagged),
        "all" => Some(CustomSmtp::All),
        _ => None,
    });
    DeliverySettings {
        custom_smtp: custom_smtp.unwrap_or(CustomSmtp::Flagged),
        max_sessions: reader.int("delivery.max_sessions", 1..=10_000),
    }
}

fn smtp(reader: &mut Reader<'_>, sources: &Sources) -> SmtpSettings {
    let allowed = "a domain name, or an address literal such as [192.0.2.1] or [IPv6:2001:db8::1]";
    let hello_name =
        reader.parsed("smtp.hello_name", allowed, |text| hello::is_hello_name(text).then(|| text.to_owned()));
    SmtpSettings {
        max_connections_per_organization: reader.int("smtp.max_connections_per_organization", 1..=1000),
        max_messages_per_connection: reader.int("smtp.max_messages_per_connection", 1..=1_000_000),
        idle_timeout: reader.seconds("smtp.idle_timeout_s", 1..=3600),
        connect_timeout: reader.seconds("smtp.connect_timeout_s", 1..=300),
        command_timeout: reader.seconds("smtp.command_timeout_s", 1..=600),
        data_timeout: reader.seconds("smtp.data_timeout_s", 1..=ATTEMPT_MAX_S),
        attempt_timeout: reader.seconds("smtp.attempt_timeout_s", 1..=ATTEMPT_MAX_S),
        final_reply_timeout: reader.seconds("smtp.final_reply_timeout_s", 1..=ATTEMPT_MAX_S),
        hello_name: hello_name.unwrap_or_else(hello::machine_name),
        extra_ca_files: extra_ca_files(reader, sources),
    }
}

fn extra_ca_files(reader: &mut Reader<'_>, sources: &Sources) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for file in reader.items("smtp.extra_ca_files") {
        match pem_problem(Path::new(&file)) {
            None => files.push(PathBuf::from(file)),
            Some(problem) => {
                reader.refuse("smtp.extra_ca_files", &file, &format!("{PEM_ALLOWED} ({problem})"))
            }
        }
    }
    for variable in ["NODE_EXTRA_CA_CERTS", "SSL_CERT_FILE"] {
        let Some(file) = sources.variable(variable) else { continue };
        match pem_problem(Path::new(file)) {
            None if variable == "NODE_EXTRA_CA_CERTS" => files.push(PathBuf::from(file)),
            // The system's roots are loaded elsewhere, by a library that reads this variable itself.
            None => {}
            Some(problem) => reader.problem(format!(
                "{variable}: `{}` cannot be used; allowed: {PEM_ALLOWED} ({problem})",
                text::bounded(&text::single_line(file), 200)
            )),
        }
    }
    files
}

const PEM_ALLOWED: &str = "a readable file with PEM certificates";

fn pem_problem(path: &Path) -> Option<String> {
    match std::fs::read(path) {
        Err(error) => Some(error.to_string()),
        Ok(bytes) if String::from_utf8_lossy(&bytes).contains("-----BEGIN") => None,
        Ok(_) => Some("there is no certificate in it".to_owned()),
    }
}

fn egress(reader: &mut Reader<'_>) -> EgressSettings {
    let networks = "networks such as 10.0.0.0/8 or 2001:db8::/32, or single addresses";
    let network =
        |text: &str| text.parse::<IpNet>().ok().or_else(|| text.parse::<IpAddr>().ok().map(IpNet::from));
    EgressSettings {
        allow_networks: reader.list("egress.allow_networks", networks, network),
        deny_networks: reader.list("egress.deny_networks", networks, network),
        allowed_ports: allowed_ports(reader),
        nameservers: reader.list("egress.nameservers", "ip:port, say 127.0.0.1:53", |text| {
            text.parse::<SocketAddr>().ok().filter(|address| address.port() != 0)
        }),
        allow_plaintext_auth: reader.flag("egress.allow_plaintext_auth", false),
    }
}

fn allowed_ports(reader: &mut Reader<'_>) -> AllowedPorts {
    const KEY: &str = "egress.allowed_ports";
    let allowed = "ports from 1 to 65535, or `*` alone for every port";
    if reader.items(KEY) == ["*"] {
        return AllowedPorts::Any;
    }
    let before = reader.problems.len();
    let ports: BTreeSet<u16> = reader.list(KEY, allowed, port).into_iter().collect();
    if ports.is_empty() && reader.problems.len() == before {
        reader.refuse(KEY, "an empty list", allowed);
    }
    AllowedPorts::Only(ports)
}

fn port(text: &str) -> Option<u16> {
    text.parse().ok().filter(|port| *port != 0)
}

fn platform(reader: &mut Reader<'_>) -> Option<PlatformSettings> {
    let host = reader.parsed("platform.host", "a host name or an IP address", platform_host);
    let port = match reader.is_set("platform.port") {
        true => u16::try_from(reader.int("platform.port", 1..=65_535)).unwrap_or(PLATFORM_PORT),
        false => PLATFORM_PORT,
    };
    let secure = reader.flag("platform.secure", true);
    let username = reader.text("platform.username");
    let password = reader.text("platform.password");
    for (key, value) in [("platform.username", &username), ("platform.password", &password)] {
        if value.as_deref().is_some_and(text::has_forbidden_control) {
            reader.refuse(key, "", "a text without control characters");
        }
    }
    let email =
        reader.parsed("platform.from_email", "an email address", |text| EmailAddress::parse(text).ok());
    let name = reader.text("platform.from_name");
    let max_connections = reader.int("platform.max_connections", 1..=10_000);
    let per_minute = match reader.is_set("platform.messages_per_minute") {
        true => Some(reader.int("platform.messages_per_minute", 0..=1_000_000)),
        false => None,
    };

    if !reader.is_set("platform.host") || reader.text("platform.host").is_none() {
        let others =
            ["port", "secure", "username", "password", "from_email", "from_name", "messages_per_minute"];
        for key in others.map(|name| format!("platform.{name}")) {
            if reader.is_set(&key) {
                reader.problem(format!(
                    "{key} is set, but platform.host is not; set platform.host, or unset {key}"
                ));
                break;
            }
        }
        return None;
    }
    let credentials = match (username, password) {
        (Some(username), Some(password)) => Some(Credentials::new(username, password)),
        (None, None) => None,
        (username, _) => {
            let missing = if username.is_some() { "password" } else { "username" };
            reader.problem(format!(
                "platform.{missing} is missing: set both platform.username and platform.password, or neither where \
                 the server asks for none"
            ));
            None
        }
    };
    if email.is_none() && !reader.is_set("platform.from_email") {
        reader.problem(
            "platform.from_email is missing: platform.host is set, and its mail needs a sender".to_owned(),
        );
    }
    let from = platform_sender(reader, name, email?)?;
    let account = SmtpAccount { host: host?, port, tls: TlsMode::new(port, secure), credentials, from };
    let limited = platform_limited(&account, per_minute);
    Some(PlatformSettings { account, max_connections, limited })
}

/// What is known of the host's provider, but for the rate where the operator says another, or 0: none.
fn platform_limited(account: &SmtpAccount, per_minute: Option<u32>) -> Option<Limited> {
    let username = account.credentials.as_ref().map(Credentials::username);
    let overrides = Overrides { messages_per_minute: per_minute, ..Overrides::default() };
    let mut limited = Limited::of(&account.host, username, overrides)?;
    if per_minute == Some(0) {
        limited.limits.messages_per_minute = None;
        limited.limits.max_connections?;
    }
    Some(limited)
}

fn platform_sender(reader: &mut Reader<'_>, name: Option<String>, email: EmailAddress) -> Option<Mailbox> {
    let Some(name) = name else { return Some(Mailbox::bare(email)) };
    let mailbox = Mailbox::named(&name, email).ok();
    if mailbox.is_none() {
        reader.refuse("platform.from_name", &name, "a name of at most 512 bytes");
    }
    mailbox
}

/// The operator's own host: any name the resolver can look up, in its ASCII form, or an address.
fn platform_host(text: &str) -> Option<String> {
    if let Ok(ip) = text.parse::<IpAddr>() {
        return Some(ip.to_string());
    }
    let ascii = idna::domain_to_ascii(text).ok()?;
    let is_host = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_');
    let labels_fit = ascii.trim_end_matches('.').split('.').all(|label| (1..=63).contains(&label.len()));
    (ascii.len() <= 253 && labels_fit && ascii.bytes().all(is_host)).then_some(ascii)
}

fn retry(reader: &mut Reader<'_>) -> RetrySettings {
    const KEY: &str = "retry.schedule_s";
    let allowed = format!("1 to {SCHEDULE_STEPS_MAX} waits, each from 1 to {SCHEDULE_STEP_MAX_S} seconds");
    let before = reader.problems.len();
    let steps = reader.list(KEY, &allowed, |text| {
        text.parse::<u32>().ok().filter(|step| (1..=SCHEDULE_STEP_MAX_S).contains(step))
    });
    if !(1..=SCHEDULE_STEPS_MAX).contains(&steps.len()) && reader.problems.len() == before {
        reader.refuse(KEY, format!("a list of {}", steps.len()), &allowed);
    }
    RetrySettings {
        schedule: Schedule::new(steps),
        max_age: reader.seconds("retry.max_age_s", 1..=30 * DAY_S),
        parked_for: reader.seconds("retry.parked_for_s", 1..=30 * DAY_S),
    }
}

fn limits(reader: &mut Reader<'_>) -> LimitSettings {
    let mut size = |key, range| usize::try_from(reader.int(key, range)).unwrap_or(usize::MAX);
    LimitSettings {
        max_message_bytes: size("limits.max_message_bytes", 1024..=134_217_728),
        max_recipients: size("limits.max_recipients", 1..=10_000),
    }
}

fn control(reader: &mut Reader<'_>) -> ControlSettings {
    // AMQP carries a user's name as a short string.
    let allowed = "names of broker users, each up to 255 bytes without control characters";
    let user = |name: &str| {
        let fits = (1..=255).contains(&name.len()) && !text::has_forbidden_control(name);
        fits.then(|| name.to_owned())
    };
    ControlSettings {
        allowed_users: reader.list("control.allowed_users", allowed, user),
        tests_per_minute: reader.int("control.tests_per_minute", 1..=10_000),
    }
}

fn retention(reader: &mut Reader<'_>) -> RetentionSettings {
    let dead_letters = reader.int("dead_letters.retention_days", 1..=RETENTION_MAX_DAYS);
    let ledger = reader.int("ledger.retention_days", 1..=RETENTION_MAX_DAYS);
    if ledger < dead_letters {
        reader.refuse(
            "ledger.retention_days",
            ledger,
            &format!("at least dead_letters.retention_days ({dead_letters}), or a replay could send twice"),
        );
    }
    let days = |days: u32| Duration::from_secs(u64::from(days) * u64::from(DAY_S));
    RetentionSettings { dead_letters: days(dead_letters), ledger: days(ledger) }
}

fn http(reader: &mut Reader<'_>) -> HttpSettings {
    let listen = reader.parsed("http.listen", "ip:port, say 127.0.0.1:8080", |text| text.parse().ok());
    let listen = listen.unwrap_or(SocketAddr::from(([127, 0, 0, 1], 8080)));
    HttpSettings { listen, console_token: reader.secret("http.console_token") }
}
