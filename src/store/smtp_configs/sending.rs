//! What a send needs of an organization: its flag and its server, credentials opened.
//! Guarantee: credentials that were moved or changed in the database are never used.

use std::sync::Arc;

use sqlx::{FromRow, Row};

use super::{SmtpConfigs, has_config, overrides_from, port_from, reason_from};
use crate::model::address::{EmailAddress, Mailbox};
use crate::model::health::Health;
use crate::model::organization::OrganizationId;
use crate::model::provider::Limited;
use crate::model::smtp_settings::{Credentials, SmtpAccount, TlsMode};
use crate::secrets::{Context, Field, OpenError};
use crate::store::{ACQUIRE_BOUND, StoreError};

const SEALED: &str =
    "SELECT custom_smtp, version, from_email, from_name, host, port, secure, username_sealed, password_sealed,
         max_connections, messages_per_minute, worked_at IS NOT NULL AS worked, failing_since IS NOT NULL AS failing, failing_reason,
         unreachable_since IS NOT NULL AS unreached,
         strikes > 0 OR probes > 0 OR long_probes > 0 OR unreachable_since IS NOT NULL
             OR (worked_at IS NOT NULL AND NOT proven) AS blemished
     FROM organizations LEFT JOIN smtp_configs USING (organization_id) WHERE organization_id = $1";

/// What decides an organization's route, credentials opened.
#[derive(Debug, Clone, Default)]
pub struct RouteFacts {
    /// The feature flag.
    pub custom_smtp: bool,
    /// Its server.
    pub account: StoredAccount,
    /// Whether that works, as far as is known.
    pub health: Health,
}

/// An organization's own server, as far as it can be used.
#[derive(Debug, Clone, Default)]
pub enum StoredAccount {
    /// No configuration.
    #[default]
    None,
    /// Ready to send through.
    Ready {
        /// Version of the configuration.
        version: i64,
        /// How to reach and use it.
        account: Arc<SmtpAccount>,
        /// What its account is limited to.
        limited: Option<Limited>,
    },
    /// Stored, but it cannot be used as it is.
    Unreadable {
        /// Version of the configuration.
        version: i64,
        /// Whose fault it is.
        cause: Unreadable,
    },
}

/// Why a stored configuration cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unreadable {
    /// A key is missing from this worker's ring: the worker's fault, which a restart with the key mends.
    #[error("the configuration is sealed under the key `{id}`, which is not in encryption.keys")]
    UnknownKey {
        /// The key's id.
        id: String,
    },
    /// The row was changed by something else than this program, or sealed under another key of the same id.
    #[error("the stored configuration is damaged: {0}")]
    Damaged(String),
}

impl RouteFacts {
    /// Version of the configuration, readable or not.
    pub fn config_version(&self) -> Option<i64> {
        match &self.account {
            StoredAccount::None => None,
            StoredAccount::Ready { version, .. } | StoredAccount::Unreadable { version, .. } => {
                Some(*version)
            }
        }
    }
}

#[derive(FromRow)]
struct SealedRow {
    version: i64,
    from_email: String,
    from_name: String,
    host: String,
    port: i32,
    secure: bool,
    username_sealed: Vec<u8>,
    password_sealed: Vec<u8>,
    max_connections: Option<i32>,
    messages_per_minute: Option<i32>,
}

impl SmtpConfigs {
    /// Everything a send needs, in one query. An unreadable configuration is an answer, not an error.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn load_for_sending(&self, organization: &OrganizationId) -> Result<RouteFacts, StoreError> {
        let row = self.row(SEALED, organization, ACQUIRE_BOUND).await?;
        let Some(row) = row else { return Ok(RouteFacts::default()) };
        let custom_smtp = row.try_get("custom_smtp")?;
        if !has_config(&row)? {
            return Ok(RouteFacts { custom_smtp, ..RouteFacts::default() });
        }
        let failing: bool = row.try_get("failing")?;
        let health = Health {
            worked: row.try_get("worked")?,
            blemished: row.try_get("blemished")?,
            unreached: row.try_get("unreached")?,
            failing: failing.then_some(reason_from(row.try_get("failing_reason")?)),
        };
        let stored = SealedRow::from_row(&row)?;
        let version = stored.version;
        let overrides = overrides_from(stored.max_connections, stored.messages_per_minute);
        let account = match self.open(organization, stored) {
            Ok(account) => {
                let username = account.credentials.as_ref().map(Credentials::username);
                let limited = Limited::of(&account.host, username, overrides);
                StoredAccount::Ready { version, account: Arc::new(account), limited }
            }
            Err(cause) => StoredAccount::Unreadable { version, cause },
        };
        Ok(RouteFacts { custom_smtp, account, health })
    }

    fn open(&self, organization: &OrganizationId, stored: SealedRow) -> Result<SmtpAccount, Unreadable> {
        let open = |field, sealed: &[u8]| match self
            .keys
            .open(Context::Credential { organization, field }, sealed)
        {
            Ok(secret) => Ok(secret),
            Err(OpenError::UnknownKey { id }) => Err(Unreadable::UnknownKey { id }),
            Err(error) => Err(Unreadable::Damaged(error.to_string())),
        };
        let username = open(Field::Username, &stored.username_sealed)?;
        let password = open(Field::Password, &stored.password_sealed)?;
        let from = EmailAddress::parse(&stored.from_email)
            .and_then(|email| Mailbox::named(&stored.from_name, email))
            .map_err(|error| Unreadable::Damaged(format!("the sender {error}")))?;
        let port = port_from(stored.port).map_err(|error| Unreadable::Damaged(error.to_string()))?;
        Ok(SmtpAccount {
            host: stored.host,
            port,
            tls: TlsMode::new(port, stored.secure),
            credentials: Some(Credentials::new(username, password)),
            from,
        })
    }
}
