//! The organizations' SMTP configurations: one each, versioned, with sealed credentials.
//! Guarantee: every function is about the one organization it is given, and what can be shown holds no credential.

mod changes;
mod health;
mod last_test;
mod sending;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use sqlx::postgres::PgRow;
use sqlx::{FromRow, Row};
use time::OffsetDateTime;

pub use changes::{NewSmtpConfig, SmtpConfigPatch};
pub use health::{DueProbe, Trouble};
pub use sending::{RouteFacts, StoredAccount, Unreadable};

use super::{Store, StoreError};
use crate::model::failure::Reason;
use crate::model::organization::OrganizationId;
use crate::model::provider::Overrides;
use crate::secrets::KeyRing;

/// Named one by one: the plan of a `*` breaks in a running worker when a newer program adds a column.
macro_rules! shown_columns {
    () => {
        "version, from_email, from_name, host, port, secure, last_test_at, last_test_ok, last_test_code, created_at, \
         updated_at, failing_since, failing_reason, failing_hint, max_connections, messages_per_minute"
    };
}

/// Of rows that were failing: their mail may go, which is to be announced, behind what they failed for where nobody has
/// announced that yet.
macro_rules! note_recovery {
    ($from:literal) => {
        concat!(
            "INSERT INTO recoveries AS r (organization_id, recovered_at, failing_version, failing_reason, failing_hint)
             SELECT organization_id, now(), unannounced, failing_reason, failing_hint FROM ",
            $from,
            " WHERE failing_since IS NOT NULL
             ON CONFLICT (organization_id) DO UPDATE SET recovered_at = excluded.recovered_at,
                 failing_version = coalesce(excluded.failing_version, r.failing_version),
                 failing_reason =
                     CASE WHEN excluded.failing_version IS NULL THEN r.failing_reason ELSE excluded.failing_reason END,
                 failing_hint =
                     CASE WHEN excluded.failing_version IS NULL THEN r.failing_hint ELSE excluded.failing_hint END"
        )
    };
}

use {note_recovery, shown_columns};

const SHOWN: &str = concat!(
    "SELECT custom_smtp, ",
    shown_columns!(),
    " FROM organizations LEFT JOIN smtp_configs USING (organization_id) WHERE organization_id = $1"
);
/// For a person who waits for an answer.
const READ_LIMIT: Duration = Duration::from_secs(4);

/// The configurations, with the keys that their credentials are sealed under. Cheap to clone.
#[derive(Clone)]
pub struct SmtpConfigs {
    store: Store,
    keys: Arc<KeyRing>,
}

/// A configuration as it may be shown: without credentials.
#[derive(Clone)]
pub struct SmtpConfig {
    /// Raised with every change.
    pub version: i64,
    /// Sender's address.
    pub from_email: String,
    /// Sender's name, one line.
    pub from_name: String,
    /// Host in its normal form.
    pub host: String,
    /// TCP port.
    pub port: u16,
    /// Whether TLS must be on offer.
    pub secure: bool,
    /// What it says of the provider's limits.
    pub overrides: Overrides,
    /// The last connection test of this host and these credentials.
    pub last_test: Option<LastTest>,
    /// What is wrong with it, while its mail is parked.
    pub failing: Option<Failing>,
    /// When it was created.
    pub created_at: OffsetDateTime,
    /// When it last changed.
    pub updated_at: OffsetDateTime,
}

/// Shows version and server only: the sender is personal data.
impl fmt::Debug for SmtpConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SmtpConfig(version {}, {}:{})", self.version, self.host, self.port)
    }
}

/// What a connection test found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LastTest {
    /// When it was made.
    pub at: OffsetDateTime,
    /// Whether it went through.
    pub ok: bool,
    /// The error's code, when it did not.
    pub code: Option<String>,
}

/// Why an organization's mail is parked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failing {
    /// Since when.
    pub since: OffsetDateTime,
    /// What is wrong.
    pub reason: Reason,
    /// What to do about it.
    pub hint: String,
}

/// An organization as the control commands see it.
#[derive(Debug, Clone, Default)]
pub struct OrganizationSettings {
    /// The feature flag; off for an organization that was never heard of.
    pub custom_smtp: bool,
    /// Its configuration.
    pub config: Option<SmtpConfig>,
}

impl SmtpConfigs {
    /// The configurations in this database, under these keys.
    pub fn new(store: Store, keys: Arc<KeyRing>) -> Self {
        Self { store, keys }
    }

    /// The flag and the configuration, without credentials.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn get(&self, organization: &OrganizationId) -> Result<OrganizationSettings, StoreError> {
        let row = self.row(SHOWN, organization, READ_LIMIT).await?;
        let Some(row) = row else { return Ok(OrganizationSettings::default()) };
        let config = has_config(&row)?.then(|| ConfigRow::from_row(&row)).transpose()?;
        Ok(OrganizationSettings {
            custom_smtp: row.try_get("custom_smtp")?,
            config: config.map(ConfigRow::into_config).transpose()?,
        })
    }

    async fn row(
        &self,
        query: &'static str,
        organization: &OrganizationId,
        limit: Duration,
    ) -> Result<Option<PgRow>, StoreError> {
        let one = sqlx::query(query).bind(organization.as_str());
        self.store.on_session_within(limit, async |session| one.fetch_optional(session).await).await
    }
}

#[derive(FromRow)]
struct ConfigRow {
    version: i64,
    from_email: String,
    from_name: String,
    host: String,
    port: i32,
    secure: bool,
    last_test_at: Option<OffsetDateTime>,
    last_test_ok: Option<bool>,
    last_test_code: Option<String>,
    created_at: OffsetDateTime,
    updated_at: OffsetDateTime,
    failing_since: Option<OffsetDateTime>,
    failing_reason: Option<String>,
    failing_hint: Option<String>,
    max_connections: Option<i32>,
    messages_per_minute: Option<i32>,
}

impl ConfigRow {
    fn into_config(self) -> Result<SmtpConfig, StoreError> {
        let last_test = self.last_test_at.zip(self.last_test_ok);
        Ok(SmtpConfig {
            version: self.version,
            from_email: self.from_email,
            from_name: self.from_name,
            host: self.host,
            port: port_from(self.port)?,
            secure: self.secure,
            overrides: overrides_from(self.max_connections, self.messages_per_minute),
            last_test: last_test.map(|(at, ok)| LastTest { at, ok, code: self.last_test_code }),
            failing: self.failing_since.map(|since| Failing {
                since,
                reason: reason_from(self.failing_reason.as_deref()),
                hint: self.failing_hint.unwrap_or_default(),
            }),
            created_at: self.created_at,
            updated_at: self.updated_at,
        })
    }
}

/// A newer program may have written one that this one has no name for.
pub(super) fn reason_from(stored: Option<&str>) -> Reason {
    stored.and_then(Reason::from_name).unwrap_or(Reason::Internal)
}

fn port_from(stored: i32) -> Result<u16, StoreError> {
    u16::try_from(stored).map_err(|_| StoreError::Internal(format!("{stored} is stored as a port")))
}

fn overrides_from(max_connections: Option<i32>, messages_per_minute: Option<i32>) -> Overrides {
    let count = |stored: Option<i32>| stored.map(i32::unsigned_abs);
    Overrides { max_connections: count(max_connections), messages_per_minute: count(messages_per_minute) }
}

/// Whether a row of the outer join has a configuration in it.
fn has_config(row: &PgRow) -> Result<bool, sqlx::Error> {
    Ok(row.try_get::<Option<i64>, _>("version")?.is_some())
}
