//! What mail providers are known to allow one account: connections at once, messages a minute; and what an account may so do.
//! Guarantee: pure; a host that is not in the table has no limit but the one that its own configuration sets.

use sha2::{Digest, Sha256};

/// A configuration's `max_connections` is within this range, as is the ceiling of the window that it is bounded by.
pub const CONNECTIONS_RANGE: std::ops::RangeInclusive<u32> = 1..=1000;
/// A configuration's `messages_per_minute` is within this range.
pub const PER_MINUTE_RANGE: std::ops::RangeInclusive<u32> = 1..=100_000;

/// What a provider counts towards its rate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Counted {
    /// Each message: one DATA.
    Messages,
    /// Each recipient of a message.
    Recipients,
}

/// For whom a provider keeps one count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Scope {
    /// The same account at whichever of its hosts.
    Provider,
    /// Each host for itself.
    Host,
}

/// One row of the table.
struct Provider {
    name: &'static str,
    hosts: &'static [&'static str],
    max_connections: Option<u32>,
    messages_per_minute: u32,
    counted: Counted,
    scope: Scope,
}

/// Submission hosts only: who delivers to a provider's mailboxes is counted otherwise. In a host, a leading label `*` stands for
/// one label. Quotas of a day are in no row: the policy knows them by the server's words (`quota_exceeded`).
const TABLE: &[Provider] = &[
    // "Message storage and concurrent connection throttling for SMTP Authenticated Submission" (Microsoft Learn, Exchange,
    // troubleshoot/send-emails/smtp-submission-improvements): three concurrent connections, 30 messages per minute, for each
    // mailbox. smtp-legacy is the same service for clients with old TLS.
    Provider {
        name: "Microsoft 365",
        hosts: &["smtp.office365.com", "smtp-legacy.office365.com"],
        max_connections: Some(3),
        messages_per_minute: 30,
        counted: Counted::Messages,
        scope: Scope::Provider,
    },
    // Google documents quotas of a day ("Gmail sending limits in Google Workspace", Workspace Admin Help 166852: 2,000 messages)
    // and that the relay has a "peak" limit, but no figure of a minute and none for SMTP connections. What it grants the same
    // user through its API is documented ("Usage limits", Gmail API): 6,000 units a minute for one user, a send costing 100.
    // That pace is taken for SMTP as well; the window finds out by itself how many connections are welcome.
    Provider {
        name: "Gmail",
        hosts: &["smtp.gmail.com", "smtp.googlemail.com", "smtp-relay.gmail.com"],
        max_connections: None,
        messages_per_minute: 60,
        counted: Counted::Messages,
        scope: Scope::Host,
    },
    // "Service quotas in Amazon SES" (SES Developer Guide): one email a second in the sandbox, counted by recipients, for each
    // account and region; outside the sandbox the rate is each account's own and stands in its console. So this is the only figure that
    // holds for all: who has more says so in the configuration. No limit of connections is documented.
    Provider {
        name: "Amazon SES",
        hosts: &["email-smtp.*.amazonaws.com", "email-smtp-fips.*.amazonaws.com"],
        max_connections: None,
        messages_per_minute: 60,
        counted: Counted::Recipients,
        scope: Scope::Host,
    },
];

/// What a configuration says instead of the table.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Overrides {
    /// Connections at once, over all workers.
    pub max_connections: Option<u32>,
    /// Messages a minute, over all workers.
    pub messages_per_minute: Option<u32>,
}

/// What holds for one account.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Connections at once, over all workers.
    pub max_connections: Option<u32>,
    /// Messages a minute, over all workers.
    pub messages_per_minute: Option<u32>,
    /// What is counted as a message.
    pub counted: Counted,
    /// The provider by whose table row it is so; `None`: the configuration says at least one of them.
    pub provider: Option<&'static str>,
}

impl Limits {
    /// The limits of a host under a configuration; `None` where there are none.
    pub fn of(host: &str, overrides: Overrides) -> Option<Self> {
        let provider = provider_of(host);
        if provider.is_none() && overrides == Overrides::default() {
            return None;
        }
        let known = |of: fn(&Provider) -> Option<u32>| provider.and_then(of);
        Some(Self {
            max_connections: overrides.max_connections.or_else(|| known(|row| row.max_connections)),
            messages_per_minute: overrides
                .messages_per_minute
                .or_else(|| known(|row| Some(row.messages_per_minute))),
            counted: provider.map_or(Counted::Messages, |row| row.counted),
            provider: provider.filter(|_| overrides == Overrides::default()).map(|row| row.name),
        })
    }

    /// In a reply, where they come from: the provider's name, or `configuration`.
    pub fn source(&self) -> &'static str {
        self.provider.unwrap_or("configuration")
    }

    /// What a message to so many recipients counts.
    pub fn cost(&self, recipients: usize) -> u32 {
        match self.counted {
            Counted::Messages => 1,
            Counted::Recipients => u32::try_from(recipients).unwrap_or(u32::MAX).max(1),
        }
    }
}

/// The name under which all workers count for one account of a provider's: a hash, so that the database holds no user name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AccountKey(pub [u8; 32]);

impl AccountKey {
    /// The account that a user name is at a host; an empty one where the server asks for none. Providers take user names
    /// in either case.
    pub fn of(host: &str, username: &str) -> Self {
        let place = match provider_of(host) {
            Some(Provider { scope: Scope::Provider, name, .. }) => (*name).to_owned(),
            _ => normal(host),
        };
        let hash = Sha256::new()
            .chain_update(b"sendoff account\0")
            // No host and no provider's name has a zero in it.
            .chain_update(place.as_bytes())
            .chain_update(b"\0")
            .chain_update(username.to_lowercase().as_bytes());
        Self(hash.finalize().into())
    }
}

/// An account whose sending is limited over all workers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limited {
    /// What is counted together.
    pub key: AccountKey,
    /// Up to where.
    pub limits: Limits,
}

impl Limited {
    /// A user name at a host under a configuration; `None` where nothing is limited.
    pub fn of(host: &str, username: Option<&str>, overrides: Overrides) -> Option<Self> {
        let limits = Limits::of(host, overrides)?;
        Some(Self { key: AccountKey::of(host, username.unwrap_or_default()), limits })
    }
}

fn provider_of(host: &str) -> Option<&'static Provider> {
    let host = normal(host);
    TABLE.iter().find(|row| row.hosts.iter().any(|pattern| fits(pattern, &host)))
}

fn normal(host: &str) -> String {
    host.trim_end_matches('.').to_ascii_lowercase()
}

fn fits(pattern: &str, host: &str) -> bool {
    let (mut patterns, mut labels) = (pattern.split('.'), host.split('.'));
    loop {
        match (patterns.next(), labels.next()) {
            (None, None) => return true,
            (Some("*"), Some(label)) if !label.is_empty() => {}
            (Some(pattern), Some(label)) if pattern == label => {}
            _ => return false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(host: &str) -> Option<(&'static str, Option<u32>, Option<u32>)> {
        let limits = Limits::of(host, Overrides::default())?;
        Some((limits.source(), limits.max_connections, limits.messages_per_minute))
    }

    #[test]
    fn a_provider_is_known_by_its_submission_hosts_alone() {
        let microsoft = Some(("Microsoft 365", Some(3), Some(30)));
        let gmail = Some(("Gmail", None, Some(60)));
        let ses = Some(("Amazon SES", None, Some(60)));
        for (host, expected) in [
            ("smtp.office365.com", microsoft),
            ("SMTP.Office365.com.", microsoft),
            ("smtp-legacy.office365.com", microsoft),
            ("smtp.gmail.com", gmail),
            ("smtp-relay.gmail.com", gmail),
            ("email-smtp.eu-central-1.amazonaws.com", ses),
            ("email-smtp-fips.us-east-1.amazonaws.com", ses),
            ("email-smtp..amazonaws.com", None),
            ("email-smtp.amazonaws.com", None),
            ("email-smtp.eu.central.amazonaws.com", None),
            ("office365.com", None),
            ("acme-example.mail.protection.outlook.com", None),
            ("smtp.office365.com.acme.example", None),
            ("evil-smtp.gmail.com", None),
            ("gmail-smtp-in.l.google.com", None),
            ("mail.acme.example", None),
            ("192.0.2.1", None),
        ] {
            assert_eq!(row(host), expected, "{host}");
        }
    }

    #[test]
    fn an_override_goes_above_or_below_the_table_and_leaves_the_other_figure() {
        let with = |max_connections, messages_per_minute| {
            let overrides = Overrides { max_connections, messages_per_minute };
            let limits = Limits::of("smtp.office365.com", overrides).unwrap();
            (limits.source(), limits.max_connections, limits.messages_per_minute)
        };
        assert_eq!(with(Some(10), None), ("configuration", Some(10), Some(30)));
        assert_eq!(with(None, Some(5)), ("configuration", Some(3), Some(5)));
        let own = Overrides { messages_per_minute: Some(7), ..Overrides::default() };
        let limits = Limits::of("mail.acme.example", own).unwrap();
        assert_eq!((limits.source(), limits.max_connections), ("configuration", None));
        assert_eq!(limits.messages_per_minute, Some(7));
    }

    #[test]
    fn an_account_is_what_the_provider_counts() {
        let account = AccountKey::of;
        let ann = account("smtp.office365.com", "ann@acme.example");
        assert_eq!(ann, account("SMTP-legacy.office365.com", "Ann@Acme.example"), "one mailbox");
        assert_ne!(ann, account("smtp.office365.com", "bob@acme.example"));
        let ses = |region: &str| account(&format!("email-smtp.{region}.amazonaws.com"), "AKIA1");
        assert_ne!(ses("eu-west-1"), ses("us-east-1"), "a quota is a region's");
        assert_ne!(account("a.example", "b"), account("a.exampleb", ""));
    }

    #[test]
    fn where_recipients_are_counted_a_message_costs_as_many() {
        let limits = |host| Limits::of(host, Overrides::default()).unwrap();
        let ses = limits("email-smtp.eu-west-1.amazonaws.com");
        assert_eq!([0, 1, 7].map(|recipients| ses.cost(recipients)), [1, 1, 7]);
        assert_eq!(limits("smtp.office365.com").cost(7), 1);
    }
}
