//! Every setting's key with its built-in default.
//! Guarantee: a key that is not in this table is refused, whether it comes from the file or from the environment.

use toml::Value;

/// What a key means when nobody sets it.
#[derive(Debug, Clone, Copy)]
pub(super) enum Preset {
    /// Nothing: the key is optional, required, or worked out from the machine.
    None,
    Int(i64),
    Flag(bool),
    Text(&'static str),
    Ints(&'static [i64]),
    Texts(&'static [&'static str]),
}

impl Preset {
    /// Whether the key holds a list that has a default.
    pub(super) fn is_list(self) -> bool {
        matches!(self, Self::Ints(_) | Self::Texts(_))
    }

    /// The default as the file would spell it.
    pub(super) fn value(self) -> Option<Value> {
        match self {
            Self::None => None,
            Self::Int(number) => Some(Value::Integer(number)),
            Self::Flag(flag) => Some(Value::Boolean(flag)),
            Self::Text(text) => Some(Value::String(text.to_owned())),
            Self::Ints(items) => Some(Value::Array(items.iter().map(|item| Value::Integer(*item)).collect())),
            Self::Texts(items) => {
                Some(Value::Array(items.iter().map(|item| Value::String((*item).to_owned())).collect()))
            }
        }
    }
}

/// Whether a value may be shown in a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Shown {
    /// It may.
    Yes,
    /// It is, or may hold, a secret.
    Never,
}

/// The lanes are tables of their own, `[[amqp.lanes]]`, and can only stand in the file.
pub(super) const LANES: &str = "amqp.lanes";

/// Every key but [`LANES`]: name, default, whether its value may be shown.
pub(super) const KEYS: &[(&str, Preset, Shown)] = &[
    ("amqp.url", Preset::Text("amqp://guest:guest@127.0.0.1:5672/%2f"), Shown::Never),
    ("amqp.prefix", Preset::Text("sendoff"), Shown::Yes),
    ("database.url", Preset::None, Shown::Never),
    ("database.migrate_on_start", Preset::Flag(true), Shown::Yes),
    ("encryption.keys", Preset::None, Shown::Never),
    ("encryption.keys_file", Preset::None, Shown::Yes),
    ("delivery.custom_smtp", Preset::Text("flagged"), Shown::Yes),
    ("delivery.max_sessions", Preset::Int(256), Shown::Yes),
    ("smtp.max_connections_per_organization", Preset::Int(8), Shown::Yes),
    ("smtp.max_messages_per_connection", Preset::Int(100), Shown::Yes),
    ("smtp.idle_timeout_s", Preset::Int(30), Shown::Yes),
    ("smtp.connect_timeout_s", Preset::Int(10), Shown::Yes),
    ("smtp.command_timeout_s", Preset::Int(30), Shown::Yes),
    ("smtp.data_timeout_s", Preset::Int(120), Shown::Yes),
    ("smtp.attempt_timeout_s", Preset::Int(1200), Shown::Yes),
    ("smtp.final_reply_timeout_s", Preset::Int(600), Shown::Yes),
    ("smtp.hello_name", Preset::None, Shown::Yes),
    ("smtp.extra_ca_files", Preset::Texts(&[]), Shown::Yes),
    ("egress.allow_networks", Preset::Texts(&[]), Shown::Yes),
    ("egress.deny_networks", Preset::Texts(&["168.63.129.16/32"]), Shown::Yes),
    ("egress.allowed_ports", Preset::Ints(&[25, 465, 587, 2465, 2525, 2587]), Shown::Yes),
    ("egress.nameservers", Preset::Texts(&[]), Shown::Yes),
    ("egress.allow_plaintext_auth", Preset::Flag(false), Shown::Yes),
    ("platform.host", Preset::None, Shown::Yes),
    ("platform.port", Preset::None, Shown::Yes),
    ("platform.secure", Preset::None, Shown::Yes),
    ("platform.username", Preset::None, Shown::Never),
    ("platform.password", Preset::None, Shown::Never),
    ("platform.from_email", Preset::None, Shown::Yes),
    ("platform.from_name", Preset::None, Shown::Yes),
    ("platform.max_connections", Preset::Int(32), Shown::Yes),
    ("platform.messages_per_minute", Preset::None, Shown::Yes),
    ("retry.schedule_s", Preset::Ints(&[10, 60, 300, 1800, 7200, 28800]), Shown::Yes),
    ("retry.max_age_s", Preset::Int(172_800), Shown::Yes),
    ("retry.parked_for_s", Preset::Int(86_400), Shown::Yes),
    ("limits.max_message_bytes", Preset::Int(10_485_760), Shown::Yes),
    ("limits.max_recipients", Preset::Int(100), Shown::Yes),
    ("control.allowed_users", Preset::Texts(&[]), Shown::Yes),
    ("control.tests_per_minute", Preset::Int(10), Shown::Yes),
    ("dead_letters.retention_days", Preset::Int(90), Shown::Yes),
    ("ledger.retention_days", Preset::Int(90), Shown::Yes),
    ("http.listen", Preset::Text("127.0.0.1:8080"), Shown::Yes),
    ("http.console_token", Preset::None, Shown::Never),
];

/// The table's entry for a key.
pub(super) fn find(name: &str) -> Option<&'static (&'static str, Preset, Shown)> {
    KEYS.iter().find(|(key, ..)| *key == name)
}

/// The known key that looks most like an unknown one, unless none does.
pub(super) fn nearest(name: &str) -> Option<&'static str> {
    KEYS.iter()
        .map(|(key, ..)| *key)
        .chain([LANES])
        .map(|key| (strsim::jaro_winkler(key, name), key))
        .filter(|(likeness, _)| *likeness > 0.75)
        .max_by(|(a, _), (b, _)| a.total_cmp(b))
        .map(|(_, key)| key)
}
