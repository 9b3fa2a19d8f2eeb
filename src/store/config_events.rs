//! Changes of configurations that are still to be announced.
//! Guarantee: a row is committed with the change that it tells of, and goes only when its event is published; of all who look,
//! one has it at a time. It has no room for anything that was configured.

use std::time::Duration;

use sqlx::postgres::PgRow;
use sqlx::{PgConnection, Row};

use super::{Store, StoreError};
use crate::model::event::{Event, What};
use crate::model::organization::OrganizationId;

const INSERT: &str = "INSERT INTO config_events (type, organization_id, version) VALUES ($1, $2, $3)";

/// `$3` are the types that this program can read: those of a newer one are left to it.
const TAKE: &str = "
WITH due AS MATERIALIZED (
    SELECT id FROM config_events WHERE due_at <= now() AND type = ANY ($3)
    ORDER BY id LIMIT $1 FOR UPDATE SKIP LOCKED
)
UPDATE config_events AS e SET due_at = now() + $2 * interval '1 second'
FROM due WHERE e.id = due.id
RETURNING e.id, e.at, e.type, e.organization_id, e.version";

const CREATED: &str = "smtp_config.created";
const UPDATED: &str = "smtp_config.updated";
const DELETED: &str = "smtp_config.deleted";

/// An event that is to be published, by whoever holds this.
#[derive(Debug, Clone)]
pub struct ConfigEvent {
    id: i64,
    /// What is to be published; `at` is when the change was made.
    pub event: Event,
}

/// What a change of a configuration is announced as.
#[derive(Debug, Clone, Copy)]
pub(super) enum Changed {
    Created { version: i64 },
    Updated { version: i64 },
    Deleted,
}

impl Changed {
    fn parts(self) -> (&'static str, Option<i64>) {
        match self {
            Self::Created { version } => (CREATED, Some(version)),
            Self::Updated { version } => (UPDATED, Some(version)),
            Self::Deleted => (DELETED, None),
        }
    }
}

/// Within the change's own transaction.
pub(super) async fn insert(
    connection: &mut PgConnection,
    organization: &OrganizationId,
    changed: Changed,
) -> Result<(), sqlx::Error> {
    let (kind, version) = changed.parts();
    let question = sqlx::query(INSERT).bind(kind).bind(organization.as_str()).bind(version);
    question.execute(connection).await.map(drop)
}

impl Store {
    /// Changes that are to be announced, at most `limit`, the oldest first: they are the caller's for `lease`, and then
    /// anybody's again.
    ///
    /// # Errors
    /// When the database did not answer.
    pub async fn take_config_events(
        &self,
        limit: u32,
        lease: Duration,
    ) -> Result<Vec<ConfigEvent>, StoreError> {
        let known: &[&str] = &[CREATED, UPDATED, DELETED];
        let question = sqlx::query(TAKE).bind(i64::from(limit)).bind(lease.as_secs_f64()).bind(known);
        let rows = self.on_session(async |session| question.fetch_all(session).await).await?;
        let mut events = rows.iter().map(read).collect::<Result<Vec<_>, _>>()?;
        events.sort_unstable_by_key(|event| event.id);
        Ok(events)
    }

    /// These are published.
    ///
    /// # Errors
    /// When the database did not answer; they may be published again.
    pub async fn forget_config_events(&self, events: &[ConfigEvent]) -> Result<(), StoreError> {
        let ids: Vec<i64> = events.iter().map(|event| event.id).collect();
        let question = sqlx::query("DELETE FROM config_events WHERE id = ANY ($1)").bind(ids);
        self.on_session(async |session| question.execute(session).await).await.map(drop)
    }
}

fn read(row: &PgRow) -> Result<ConfigEvent, StoreError> {
    let odd = |what: &str| StoreError::Internal(format!("`{what}` is stored of a change to be announced"));
    let (kind, organization): (&str, &str) = (row.try_get("type")?, row.try_get("organization_id")?);
    let version = || row.try_get::<i64, _>("version");
    let what = match kind {
        CREATED => What::ConfigCreated { version: version()? },
        UPDATED => What::ConfigUpdated { version: version()? },
        DELETED => What::ConfigDeleted {},
        other => return Err(odd(other)),
    };
    let organization = OrganizationId::stored(organization).map_err(|_| odd(organization))?;
    let event = Event::of_organization(row.try_get("at")?, organization, what);
    Ok(ConfigEvent { id: row.try_get("id")?, event })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_is_stored_under_its_events_type() {
        for (changed, what) in [
            (Changed::Created { version: 1 }, What::ConfigCreated { version: 1 }),
            (Changed::Updated { version: 2 }, What::ConfigUpdated { version: 2 }),
            (Changed::Deleted, What::ConfigDeleted {}),
        ] {
            assert_eq!(changed.parts().0, what.routing_key());
        }
    }
}
