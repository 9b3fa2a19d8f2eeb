//! The organizations' SMTP configurations: one each, versioned, with sealed credentials.
//! Guarantee: a version is never given twice, not even across delete and create; every function is about the one
//! organization it is given; a change and its audit row are one transaction.

use std::sync::Arc;

use secrecy::{ExposeSecret, SecretString};
use sqlx::postgres::PgRow;
use sqlx::{FromRow, Row};
use time::OffsetDateTime;

use super::audit::{self, AuditEntry};
use super::change::{self, ChangeError, Tx};
use super::{Store, StoreError};
use crate::model::address::{EmailAddress, Mailbox};
use crate::model::organization::OrganizationId;
use crate::model::smtp_settings::{Credentials, SmtpAccount, TlsMode};
use crate::secrets::{Context, Field, KeyRing, OpenError};

/// Named one by one: the plan of a `*` breaks in a running worker when a newer program adds a column.
macro_rules! shown_columns {
    () => {
        "version, from_email, from_name, host, port, secure, last_test_at, last_test_ok, last_test_code, created_at, \
         updated_at"
    };
}

/// The configurations, with the keys that their credentials are sealed under. Cheap to clone.
#[derive(Clone)]
pub struct SmtpConfigs {
    store: Store,
    keys: Arc<KeyRing>,
}

/// A configuration as it may be shown: without credentials.
#[derive(Debug, Clone)]
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
    /// The last connection test of this host and these credentials.
    pub last_test: Option<LastTest>,
    /// When it was created.
    pub created_at: OffsetDateTime,
    /// When it last changed.
    pub updated_at: OffsetDateTime,
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

/// An organization as the control commands see it.
#[derive(Debug, Clone, Default)]
pub struct OrganizationSettings {
    /// The feature flag; off for an organization that was never heard of.
    pub custom_smtp: bool,
    /// Its configuration.
    pub config: Option<SmtpConfig>,
}

/// A configuration to be stored. The host is in its normal form; all values are checked.
#[derive(Debug)]
pub struct NewSmtpConfig {
    /// Sender's address.
    pub from_email: EmailAddress,
    /// Sender's name, one line.
    pub from_name: String,
    /// Host in its normal form.
    pub host: String,
    /// TCP port.
    pub port: u16,
    /// Whether TLS must be on offer.
    pub secure: bool,
    /// SMTP user name and password.
    pub credentials: Credentials,
}

/// What an update changes; `None` keeps what is stored. All values are checked.
#[derive(Debug, Default)]
pub struct SmtpConfigPatch {
    /// Sender's address.
    pub from_email: Option<EmailAddress>,
    /// Sender's name, one line.
    pub from_name: Option<String>,
    /// Host in its normal form.
    pub host: Option<String>,
    /// TCP port.
    pub port: Option<u16>,
    /// Whether TLS must be on offer.
    pub secure: Option<bool>,
    /// SMTP user name.
    pub username: Option<SecretString>,
    /// SMTP password.
    pub password: Option<SecretString>,
}

/// What decides an organization's route, credentials opened.
#[derive(Debug, Clone, Default)]
pub struct RouteFacts {
    /// The feature flag.
    pub custom_smtp: bool,
    /// Its server.
    pub account: StoredAccount,
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
        let row = sqlx::query(concat!(
            "SELECT custom_smtp, ",
            shown_columns!(),
            " FROM organizations LEFT JOIN smtp_configs USING (organization_id) WHERE organization_id = $1"
        ))
        .bind(organization.as_str())
        .fetch_optional(&self.store.pool)
        .await?;
        let Some(row) = row else { return Ok(OrganizationSettings::default()) };
        let config = has_config(&row)?.then(|| ConfigRow::from_row(&row)).transpose()?;
        Ok(OrganizationSettings {
            custom_smtp: row.try_get("custom_smtp")?,
            config: config.map(ConfigRow::into_config).transpose()?,
        })
    }

    /// Everything a send needs, in one query. An unreadable configuration is an answer, not an error.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn load_for_sending(&self, organization: &OrganizationId) -> Result<RouteFacts, StoreError> {
        let row = sqlx::query(
            "SELECT custom_smtp, version, from_email, from_name, host, port, secure, username_sealed, password_sealed
             FROM organizations LEFT JOIN smtp_configs USING (organization_id) WHERE organization_id = $1",
        )
        .bind(organization.as_str())
        .fetch_optional(&self.store.pool)
        .await?;
        let Some(row) = row else { return Ok(RouteFacts::default()) };
        let custom_smtp = row.try_get("custom_smtp")?;
        if !has_config(&row)? {
            return Ok(RouteFacts { custom_smtp, account: StoredAccount::None });
        }
        let stored = SealedRow::from_row(&row)?;
        let version = stored.version;
        let account = match self.open(organization, stored) {
            Ok(account) => StoredAccount::Ready { version, account: Arc::new(account) },
            Err(cause) => StoredAccount::Unreadable { version, cause },
        };
        Ok(RouteFacts { custom_smtp, account })
    }

    /// Stores an organization's configuration.
    ///
    /// # Errors
    /// [`ChangeError::AlreadyExists`] when it has one; of two at once exactly one gets through.
    pub async fn create(
        &self,
        organization: &OrganizationId,
        new: &NewSmtpConfig,
        audit: AuditEntry<'_>,
    ) -> Result<SmtpConfig, ChangeError> {
        let username = self.seal(organization, Field::Username, new.credentials.username());
        let password = self.seal(organization, Field::Password, new.credentials.password());
        let prepared = change::prepare(async {
            let mut tx = change::begin(&self.store).await?;
            change::lock(&mut tx, organization).await?;
            if current(&mut tx, organization).await?.is_some() {
                return Err(ChangeError::AlreadyExists);
            }
            let row: ConfigRow = sqlx::query_as(concat!(
                "INSERT INTO smtp_configs (organization_id, version, from_email, from_name, host, port, secure,
                     username_sealed, password_sealed)
                 VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9) RETURNING ",
                shown_columns!()
            ))
            .bind(organization.as_str())
            .bind(next_version(&mut tx, organization).await?)
            .bind(new.from_email.as_str())
            .bind(&new.from_name)
            .bind(&new.host)
            .bind(i32::from(new.port))
            .bind(new.secure)
            .bind(username)
            .bind(password)
            .fetch_one(&mut *tx)
            .await?;
            audit::insert(&mut tx, audit).await?;
            Ok((tx, row.into_config()?))
        });
        let (tx, config) = prepared.await?;
        change::commit(tx).await?;
        Ok(config)
    }

    /// Changes a configuration, whatever the values: an accepted update always has a new version. `allow` is asked
    /// under the lock, with the configuration that the patch would be laid over.
    ///
    /// # Errors
    /// [`ChangeError::NotFound`]; [`ChangeError::Conflict`] when `if_version` is given and not the current one;
    /// [`ChangeError::Refused`] with what `allow` said.
    pub async fn update<R: Send>(
        &self,
        organization: &OrganizationId,
        if_version: Option<i64>,
        patch: &SmtpConfigPatch,
        allow: impl FnOnce(&SmtpConfig) -> Result<(), R> + Send,
        audit: AuditEntry<'_>,
    ) -> Result<SmtpConfig, ChangeError<R>> {
        let prepared = change::prepare(async {
            let mut tx = change::begin(&self.store).await?;
            change::lock(&mut tx, organization).await?;
            let config = current(&mut tx, organization).await?.ok_or(ChangeError::NotFound)?.into_config()?;
            if if_version.is_some_and(|version| version != config.version) {
                return Err(ChangeError::Conflict { current: config.version });
            }
            allow(&config).map_err(ChangeError::Refused)?;
            let row = self.apply(&mut tx, organization, patch).await?;
            audit::insert(&mut tx, audit).await?;
            Ok((tx, row.into_config()?))
        });
        let (tx, config) = prepared.await?;
        change::commit(tx).await?;
        Ok(config)
    }

    /// Deletes a configuration; its version is remembered.
    ///
    /// # Errors
    /// [`ChangeError::NotFound`].
    pub async fn delete(
        &self,
        organization: &OrganizationId,
        audit: AuditEntry<'_>,
    ) -> Result<(), ChangeError> {
        let prepared = change::prepare(async {
            let mut tx = change::begin(&self.store).await?;
            change::lock(&mut tx, organization).await?;
            let deleted = sqlx::query("DELETE FROM smtp_configs WHERE organization_id = $1")
                .bind(organization.as_str())
                .execute(&mut *tx)
                .await?;
            if deleted.rows_affected() == 0 {
                return Err(ChangeError::NotFound);
            }
            audit::insert(&mut tx, audit).await?;
            Ok(tx)
        });
        change::commit(prepared.await?).await
    }

    /// A test result speaks of one server and one pair of credentials, so it goes when any of these is given anew.
    async fn apply(
        &self,
        tx: &mut Tx,
        organization: &OrganizationId,
        patch: &SmtpConfigPatch,
    ) -> Result<ConfigRow, sqlx::Error> {
        let seal = |field, secret: &Option<SecretString>| {
            secret.as_ref().map(|secret| self.seal(organization, field, secret.expose_secret()))
        };
        sqlx::query_as(concat!(
            "UPDATE smtp_configs SET version = $2, updated_at = now(),
                 from_email = COALESCE($3, from_email), from_name = COALESCE($4, from_name),
                 host = COALESCE($5, host), port = COALESCE($6, port), secure = COALESCE($7, secure),
                 username_sealed = COALESCE($8, username_sealed), password_sealed = COALESCE($9, password_sealed),
                 last_test_at = CASE WHEN $10 THEN NULL ELSE last_test_at END,
                 last_test_ok = CASE WHEN $10 THEN NULL ELSE last_test_ok END,
                 last_test_code = CASE WHEN $10 THEN NULL ELSE last_test_code END
             WHERE organization_id = $1 RETURNING ",
            shown_columns!()
        ))
        .bind(organization.as_str())
        .bind(next_version(tx, organization).await?)
        .bind(patch.from_email.as_ref().map(EmailAddress::as_str))
        .bind(patch.from_name.as_deref())
        .bind(patch.host.as_deref())
        .bind(patch.port.map(i32::from))
        .bind(patch.secure)
        .bind(seal(Field::Username, &patch.username))
        .bind(seal(Field::Password, &patch.password))
        .bind(patch.touches_connection())
        .fetch_one(&mut **tx)
        .await
    }

    fn seal(&self, organization: &OrganizationId, field: Field, secret: &str) -> Vec<u8> {
        self.keys.seal(Context { organization, field }, &secret.into())
    }

    fn open(&self, organization: &OrganizationId, stored: SealedRow) -> Result<SmtpAccount, Unreadable> {
        let open = |field, sealed: &[u8]| match self.keys.open(Context { organization, field }, sealed) {
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

impl SmtpConfigPatch {
    fn touches_connection(&self) -> bool {
        self.host.is_some()
            || self.port.is_some()
            || self.secure.is_some()
            || self.username.is_some()
            || self.password.is_some()
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
            last_test: last_test.map(|(at, ok)| LastTest { at, ok, code: self.last_test_code }),
            created_at: self.created_at,
            updated_at: self.updated_at,
        })
    }
}

fn port_from(stored: i32) -> Result<u16, StoreError> {
    u16::try_from(stored).map_err(|_| StoreError::Internal(format!("{stored} is stored as a port")))
}

/// Whether a row of the outer join has a configuration in it.
fn has_config(row: &PgRow) -> Result<bool, sqlx::Error> {
    Ok(row.try_get::<Option<i64>, _>("version")?.is_some())
}

async fn current(tx: &mut Tx, organization: &OrganizationId) -> Result<Option<ConfigRow>, sqlx::Error> {
    sqlx::query_as(concat!("SELECT ", shown_columns!(), " FROM smtp_configs WHERE organization_id = $1"))
        .bind(organization.as_str())
        .fetch_optional(&mut **tx)
        .await
}

async fn next_version(tx: &mut Tx, organization: &OrganizationId) -> Result<i64, sqlx::Error> {
    sqlx::query_scalar(
        "UPDATE organizations SET smtp_version = smtp_version + 1 WHERE organization_id = $1 RETURNING smtp_version",
    )
    .bind(organization.as_str())
    .fetch_one(&mut **tx)
    .await
}
