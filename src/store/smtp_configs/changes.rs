//! Creating, changing and deleting a configuration.
//! Guarantee: a version is never given twice, not even across delete and create; a change, its audit row and its
//! announcement are one transaction, which is over at the time that the caller names.

use secrecy::{ExposeSecret, SecretString};
use tokio::time::Instant;

use super::{ConfigRow, SmtpConfig, SmtpConfigs, note_recovery, shown_columns};
use crate::model::address::EmailAddress;
use crate::model::failure::Reason;
use crate::model::organization::OrganizationId;
use crate::model::provider::Overrides;
use crate::model::smtp_settings::Credentials;
use crate::secrets::{Context, Field};
use crate::store::audit::{self, AuditEntry};
use crate::store::change::{self, ChangeError, Tx};
use crate::store::config_events::{self, Changed};

/// Mail that waited for it goes through the platform's server.
const DELETE: &str = concat!(
    "
WITH deleted AS (
    DELETE FROM smtp_configs WHERE organization_id = $1
    RETURNING organization_id, failing_since, failing_reason, failing_hint,
        CASE WHEN announce_at IS NOT NULL THEN version END AS unannounced
), noted AS (
",
    note_recovery!("deleted"),
    ")
SELECT count(*) FROM deleted"
);

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
    /// What it says of the provider's limits.
    pub overrides: Overrides,
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
    /// Its own limit of connections; `Some(None)` for that of the provider.
    pub max_connections: Option<Option<u32>>,
    /// Its own limit of messages a minute; `Some(None)` for that of the provider.
    pub messages_per_minute: Option<Option<u32>>,
}

impl SmtpConfigPatch {
    /// Whether what is known of the server and its account no longer counts.
    fn starts_anew(&self) -> bool {
        self.touches_connection() || self.from_email.is_some()
    }

    /// Whether what failed may go well now. Credentials are not compared: whoever gives them again wants them to be tried.
    fn may_mend(&self, config: &SmtpConfig) -> bool {
        let Some(failing) = &config.failing else { return false };
        let sender = self.from_email.as_ref().is_some_and(|from| from.as_str() != config.from_email);
        self.username.is_some()
            || self.password.is_some()
            || self.host.as_ref().is_some_and(|host| *host != config.host)
            || self.port.is_some_and(|port| port != config.port)
            || self.secure.is_some_and(|secure| secure != config.secure)
            || sender && failing.reason == Reason::SenderRefused
    }

    fn touches_connection(&self) -> bool {
        self.host.is_some()
            || self.port.is_some()
            || self.secure.is_some()
            || self.username.is_some()
            || self.password.is_some()
    }
}

impl SmtpConfigs {
    /// Stores an organization's configuration.
    ///
    /// # Errors
    /// [`ChangeError::AlreadyExists`] when it has one; of two at once exactly one gets through.
    pub async fn create(
        &self,
        organization: &OrganizationId,
        new: &NewSmtpConfig,
        audit: AuditEntry<'_>,
        by: Instant,
    ) -> Result<SmtpConfig, ChangeError> {
        let username = self.seal(organization, Field::Username, new.credentials.username());
        let password = self.seal(organization, Field::Password, new.credentials.password());
        let prepared = change::prepare(by, async {
            let mut tx = Tx::begin(&self.store).await?;
            let done = create(&mut tx, organization, new, (username, password), audit).await;
            tx.keep(done).await
        });
        let (tx, config) = prepared.await?;
        tx.commit().await?;
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
        by: Instant,
    ) -> Result<SmtpConfig, ChangeError<R>> {
        let prepared = change::prepare(by, async {
            let mut tx = Tx::begin(&self.store).await?;
            let done = self.update_in(&mut tx, organization, if_version, patch, allow, audit).await;
            tx.keep(done).await
        });
        let (tx, config) = prepared.await?;
        tx.commit().await?;
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
        by: Instant,
    ) -> Result<(), ChangeError> {
        let prepared = change::prepare(by, async {
            let mut tx = Tx::begin(&self.store).await?;
            let done = delete(&mut tx, organization, audit).await;
            tx.keep(done).await
        });
        let (tx, ()) = prepared.await?;
        tx.commit().await
    }

    async fn update_in<R>(
        &self,
        tx: &mut Tx,
        organization: &OrganizationId,
        if_version: Option<i64>,
        patch: &SmtpConfigPatch,
        allow: impl FnOnce(&SmtpConfig) -> Result<(), R>,
        audit: AuditEntry<'_>,
    ) -> Result<SmtpConfig, ChangeError<R>> {
        tx.lock(organization).await?;
        let config = current(tx, organization).await?.ok_or(ChangeError::NotFound)?.into_config()?;
        if if_version.is_some_and(|version| version != config.version) {
            return Err(ChangeError::Conflict { current: config.version });
        }
        allow(&config).map_err(ChangeError::Refused)?;
        let may_mend = patch.may_mend(&config);
        let config = self.apply(tx, organization, patch, may_mend).await?.into_config()?;
        let changed = Changed::Updated { version: config.version };
        config_events::insert(tx.connection(), organization, changed).await?;
        audit::insert(tx.connection(), audit).await?;
        Ok(config)
    }

    /// A test result speaks of one server and one pair of credentials, so it goes when any of these is given anew. What
    /// is failing stays so until a test has gone well, and is tested at once; where nothing can have been mended, the pauses
    /// behind that test go on from where they were, for it may offer a password that is known to be wrong.
    async fn apply(
        &self,
        tx: &mut Tx,
        organization: &OrganizationId,
        patch: &SmtpConfigPatch,
        may_mend: bool,
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
                 last_test_code = CASE WHEN $10 THEN NULL ELSE last_test_code END,
                 worked_at = CASE WHEN $11 THEN NULL ELSE worked_at END, proven = proven AND NOT $11, strikes = 0,
                 unreachable_since = NULL, unreachable_at = NULL,
                 probes = CASE WHEN $12 OR ($11 AND failing_since IS NULL) THEN 0 ELSE probes END,
                 long_probes = CASE WHEN $12 OR ($11 AND failing_since IS NULL) THEN 0 ELSE long_probes END,
                 next_probe_at = CASE WHEN failing_since IS NOT NULL THEN now() END,
                 max_connections = CASE WHEN $13 THEN $14 ELSE max_connections END,
                 messages_per_minute = CASE WHEN $15 THEN $16 ELSE messages_per_minute END
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
        .bind(patch.starts_anew())
        .bind(may_mend)
        .bind(patch.max_connections.is_some())
        .bind(stored(patch.max_connections.flatten()))
        .bind(patch.messages_per_minute.is_some())
        .bind(stored(patch.messages_per_minute.flatten()))
        .fetch_one(tx.connection())
        .await
    }

    fn seal(&self, organization: &OrganizationId, field: Field, secret: &str) -> Vec<u8> {
        self.keys.seal(Context::Credential { organization, field }, &secret.into())
    }
}

async fn create(
    tx: &mut Tx,
    organization: &OrganizationId,
    new: &NewSmtpConfig,
    (username, password): (Vec<u8>, Vec<u8>),
    audit: AuditEntry<'_>,
) -> Result<SmtpConfig, ChangeError> {
    tx.lock(organization).await?;
    if current(tx, organization).await?.is_some() {
        return Err(ChangeError::AlreadyExists);
    }
    let row: ConfigRow = sqlx::query_as(concat!(
        "INSERT INTO smtp_configs (organization_id, version, from_email, from_name, host, port, secure,
             username_sealed, password_sealed, max_connections, messages_per_minute)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11) RETURNING ",
        shown_columns!()
    ))
    .bind(organization.as_str())
    .bind(next_version(tx, organization).await?)
    .bind(new.from_email.as_str())
    .bind(&new.from_name)
    .bind(&new.host)
    .bind(i32::from(new.port))
    .bind(new.secure)
    .bind(username)
    .bind(password)
    .bind(stored(new.overrides.max_connections))
    .bind(stored(new.overrides.messages_per_minute))
    .fetch_one(tx.connection())
    .await?;
    let config = row.into_config()?;
    let changed = Changed::Created { version: config.version };
    config_events::insert(tx.connection(), organization, changed).await?;
    audit::insert(tx.connection(), audit).await?;
    Ok(config)
}

async fn delete(
    tx: &mut Tx,
    organization: &OrganizationId,
    audit: AuditEntry<'_>,
) -> Result<(), ChangeError> {
    tx.lock(organization).await?;
    let deleted: i64 =
        sqlx::query_scalar(DELETE).bind(organization.as_str()).fetch_one(tx.connection()).await?;
    if deleted == 0 {
        return Err(ChangeError::NotFound);
    }
    config_events::insert(tx.connection(), organization, Changed::Deleted).await?;
    Ok(audit::insert(tx.connection(), audit).await?)
}

async fn current(tx: &mut Tx, organization: &OrganizationId) -> Result<Option<ConfigRow>, sqlx::Error> {
    sqlx::query_as(concat!("SELECT ", shown_columns!(), " FROM smtp_configs WHERE organization_id = $1"))
        .bind(organization.as_str())
        .fetch_optional(tx.connection())
        .await
}

/// What is given has been checked to fit.
fn stored(limit: Option<u32>) -> Option<i32> {
    limit.and_then(|limit| i32::try_from(limit).ok())
}

async fn next_version(tx: &mut Tx, organization: &OrganizationId) -> Result<i64, sqlx::Error> {
    sqlx::query_scalar(
        "UPDATE organizations SET smtp_version = smtp_version + 1 WHERE organization_id = $1 RETURNING smtp_version",
    )
    .bind(organization.as_str())
    .fetch_one(tx.connection())
    .await
}
