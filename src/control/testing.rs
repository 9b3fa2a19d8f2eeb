//! What a connection test and a test email have in common: the stored account, whether one more may be begun, and what
//! becomes of its success.
//! Guarantee: a stored password leaves with the host that it is stored with, and only with the version that the password
//! rule was asked about.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::OwnedSemaphorePermit;

use super::error::ControlError;
use super::{Call, Control};
use crate::model::organization::OrganizationId;
use crate::model::smtp_settings::{Destination, SmtpAccount};
use crate::store::{SmtpConfig, StoredAccount, TestPermit, Unreadable};

/// How often the configuration is read again when others change it meanwhile.
const ROUNDS: usize = 3;

/// A stored configuration, both as it is shown and ready for use.
pub(super) struct Stored {
    pub(super) config: SmtpConfig,
    pub(super) account: Arc<SmtpAccount>,
}

impl Control {
    /// The stored configuration, which `allow` has let pass, with its credentials opened.
    pub(super) async fn stored(
        &self,
        organization: &OrganizationId,
        allow: impl Fn(&SmtpConfig) -> Result<(), ControlError>,
    ) -> Result<Stored, ControlError> {
        let mut seen = 0;
        for _ in 0..ROUNDS {
            let settings = self.configs.get(organization).await?;
            self.check_enabled(&settings)?;
            let config = settings.config.ok_or_else(ControlError::config_not_found)?;
            allow(&config)?;
            seen = config.version;
            match self.configs.load_for_sending(organization).await?.account {
                StoredAccount::Ready { version, account, .. } if version == config.version => {
                    return Ok(Stored { config, account });
                }
                StoredAccount::Unreadable { version, cause } if version == config.version => {
                    tracing::warn!(%organization, %cause, "a configuration cannot be tested");
                    return Err(match cause {
                        Unreadable::UnknownKey { .. } => ControlError::key_missing(),
                        Unreadable::Damaged(_) => ControlError::unreadable(),
                    });
                }
                // Another version by now, or none: what was allowed was not about it.
                _ => {}
            }
        }
        Err(ControlError::busy(seen))
    }

    /// Lets one more test begin, and counts it, unless too many are under way here or were made by the organization.
    pub(super) async fn admit(&self, call: &Call<'_>) -> Result<OwnedSemaphorePermit, ControlError> {
        let slot = self.slow.clone().try_acquire_owned().map_err(|_| ControlError::too_many_tests())?;
        let per_minute = self.rules.tests_per_minute;
        match self.store.permit_test(call.organization()?, per_minute).await? {
            TestPermit::Granted => Ok(slot),
            TestPermit::Refused { again_in } => {
                Err(ControlError::rate_limited(per_minute, again_in.as_secs() + 1))
            }
        }
    }

    /// A stored configuration has worked: if its mail is parked, it may go. The answer does not depend on it.
    pub(super) async fn has_worked(&self, organization: &OrganizationId, version: i64, limit: Duration) {
        let noting = tokio::time::timeout(limit, self.configs.recovered(organization, version));
        match noting.await {
            Ok(Ok(true)) => tracing::info!(%organization, version, "a test went well: parked mail may go"),
            Ok(Ok(false)) => {}
            Ok(Err(error)) => tracing::warn!(%error, "a test went well, which could not be noted"),
            Err(_) => tracing::warn!("a test went well, which could not be noted in time"),
        }
    }
}

/// What is dialled for an organization, in this version of its configuration. An unsaved one is version 0.
pub(super) fn destination(organization: &OrganizationId, version: i64) -> Destination {
    Destination::Organization { id: organization.clone(), version }
}
