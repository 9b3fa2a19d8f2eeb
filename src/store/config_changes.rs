//! PostgreSQL's notifications of changed configurations.
//! Guarantee: whatever was committed while nobody listened is covered by a [`ConfigChange::Reset`] that comes after
//! listening has begun again.

use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};
use sqlx::postgres::{PgListener, PgPoolOptions};

use super::Store;
use crate::model::organization::OrganizationId;

/// The trigger's channel (migrations/0002_configurations.sql).
const CHANNEL: &str = "sendoff_smtp_config";
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// What a cache has to forget.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ConfigChange {
    /// One organization.
    Of(OrganizationId),
    /// Everything: changes may have been missed.
    Reset,
}

/// Listens on a connection of its own, outside the store's pool.
pub struct ConfigChanges {
    store: Store,
    listener: Option<PgListener>,
    pauses: ExponentialBackoff,
    lost: bool,
}

impl ConfigChanges {
    /// Connects at the first [`ConfigChanges::next`].
    pub fn new(store: Store) -> Self {
        Self { store, listener: None, pauses: pauses(), lost: false }
    }

    /// The next change. Never fails: it connects again for as long as it takes. The first answer is a reset.
    pub async fn next(&mut self) -> ConfigChange {
        loop {
            let Some(listener) = &mut self.listener else {
                match self.connect().await {
                    Ok(()) => return ConfigChange::Reset,
                    Err(error) => self.pause(&error).await,
                }
                continue;
            };
            match listener.try_recv().await {
                Ok(Some(notification)) => match OrganizationId::parse(notification.payload()) {
                    Ok(organization) => return ConfigChange::Of(organization),
                    Err(_) => return ConfigChange::Reset,
                },
                Ok(None) => self.listener = None,
                Err(error) => {
                    self.listener = None;
                    self.pause(&error).await;
                }
            }
        }
    }

    async fn connect(&mut self) -> Result<(), sqlx::Error> {
        let pool = PgPoolOptions::new()
            .max_connections(1)
            .max_lifetime(None)
            .idle_timeout(None)
            .acquire_timeout(LONGEST_PAUSE)
            .connect_lazy_with(self.store.options.clone().application_name("sendoff listener"));
        let mut listener = PgListener::connect_with(&pool).await?;
        // A reconnection is made here, so that it is followed by a reset.
        listener.eager_reconnect(false);
        listener.listen(CHANNEL).await?;
        self.listener = Some(listener);
        self.pauses = pauses();
        if std::mem::take(&mut self.lost) {
            tracing::info!("listening for configuration changes again");
        }
        Ok(())
    }

    async fn pause(&mut self, error: &sqlx::Error) {
        if !std::mem::replace(&mut self.lost, true) {
            tracing::warn!(%error, "not listening for configuration changes until the database is back");
        }
        tokio::time::sleep(self.pauses.next().unwrap_or(LONGEST_PAUSE)).await;
    }
}

fn pauses() -> ExponentialBackoff {
    ExponentialBuilder::default()
        .with_min_delay(FIRST_PAUSE)
        .with_max_delay(LONGEST_PAUSE)
        .with_jitter()
        .without_max_times()
        .build()
}
