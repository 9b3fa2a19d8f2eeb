//! A configuration's health: failures noted against it, whether its mail is parked, when it is probed.
//! Guarantee: what is said of one version changes no other; of all who report the same trouble one is told that it begins,
//! and of all who look for probes one gets each.

use std::time::Duration;

use sqlx::Row;

use super::{SmtpConfigs, note_recovery, reason_from};
use crate::model::failure::Reason;
use crate::model::health::{
    ANNOUNCED_WITHIN, Absolution, Blame, Blamed, Pauses, STRIKES, Suspect, UNREACHABLE_FOR, UNREACHABLE_GAP,
};
use crate::model::organization::OrganizationId;
use crate::store::ledger::stored_count;
use crate::store::sealed_keys::key_of;
use crate::store::{Store, StoreError};

/// `$3` a refusal, `$4` at once, `$5` unreachable; `$8` the pauses before the probes, `$11` whether they are the long ones. `$12`
/// is the longest gap in being out of reach. `$13`: a refusal of the message's, where others got through. Who
/// is told that it begins has `$14` seconds to announce it.
/// What is failing keeps the reason it fails for.
const BLAME: &str = "
WITH seen AS MATERIALIZED (
    SELECT *, $3 AND NOT ($13 AND proven) AS counts
    FROM smtp_configs WHERE organization_id = $1 AND version = $2 FOR UPDATE
), old AS (
    SELECT organization_id, failing_since, proven, counts,
        $4 OR (counts AND (worked_at IS NULL OR strikes + 1 >= $9))
            OR ($5 AND coalesce(unreachable_since <= now() - $10 * interval '1 second'
                AND unreachable_at >= now() - $12 * interval '1 second', false)) AS fails
    FROM seen
)
UPDATE smtp_configs AS c SET
    strikes = CASE WHEN old.counts THEN c.strikes + 1 ELSE c.strikes END,
    proven = c.proven AND NOT old.counts AND NOT old.fails,
    unreachable_since = CASE WHEN NOT $5 THEN NULL
        WHEN c.unreachable_at >= now() - $12 * interval '1 second' THEN coalesce(c.unreachable_since, now())
        ELSE now() END,
    unreachable_at = CASE WHEN $5 THEN now() END,
    failing_since = CASE WHEN old.fails THEN coalesce(c.failing_since, now()) ELSE c.failing_since END,
    failing_reason = CASE WHEN old.fails THEN coalesce(c.failing_reason, $6) ELSE c.failing_reason END,
    failing_hint = CASE WHEN old.fails THEN coalesce(c.failing_hint, $7) ELSE c.failing_hint END,
    announce_at = CASE WHEN old.fails AND c.failing_since IS NULL THEN now() + $14 * interval '1 second' ELSE c.announce_at END,
    probes = CASE WHEN old.fails AND c.failing_since IS NULL AND NOT $11 THEN c.probes + 1 ELSE c.probes END,
    long_probes = CASE WHEN old.fails AND c.failing_since IS NULL AND $11 THEN c.long_probes + 1 ELSE c.long_probes END,
    next_probe_at = CASE WHEN old.fails AND c.failing_since IS NULL
        THEN now() + ($8::int[])[least(CASE WHEN $11 THEN c.long_probes ELSE c.probes END + 1, cardinality($8::int[]))]
            * interval '1 second'
        ELSE c.next_probe_at END
FROM old WHERE c.organization_id = old.organization_id
RETURNING c.failing_since IS NOT NULL AS failing, old.fails AND old.failing_since IS NULL AS just_now, old.proven";

/// A message that was accepted while the configuration is failing is a reason to look at once.
const ABSOLVE: &str = "
UPDATE smtp_configs SET
    unreachable_since = NULL,
    unreachable_at = NULL,
    worked_at = CASE WHEN $3 THEN coalesce(worked_at, now()) ELSE worked_at END,
    proven = proven OR $3,
    strikes = CASE WHEN $3 THEN 0 ELSE strikes END,
    probes = CASE WHEN $3 AND failing_since IS NULL THEN 0 ELSE probes END,
    long_probes = CASE WHEN $3 AND failing_since IS NULL THEN 0 ELSE long_probes END,
    next_probe_at = CASE WHEN $3 AND failing_since IS NOT NULL THEN now() ELSE next_probe_at END
WHERE organization_id = $1 AND version = $2
    AND (unreachable_since IS NOT NULL
        OR ($3 AND (NOT proven OR worked_at IS NULL OR strikes > 0 OR probes > 0 OR long_probes > 0)))";

/// The pauses go on from where they were, until a message is accepted: a test may succeed where sending does not. Trouble that
/// is not announced yet is kept for whoever announces the recovery.
const RECOVER: &str = concat!(
    "
WITH old AS MATERIALIZED (
    SELECT organization_id, failing_since, failing_reason, failing_hint,
        CASE WHEN announce_at IS NOT NULL THEN version END AS unannounced
    FROM smtp_configs WHERE organization_id = $1 AND version = $2 FOR UPDATE
), recovered AS (
    UPDATE smtp_configs AS c SET worked_at = coalesce(c.worked_at, now()), strikes = 0, unreachable_since = NULL,
        unreachable_at = NULL, proven = c.proven AND c.failing_since IS NULL, failing_since = NULL,
        failing_reason = NULL, failing_hint = NULL, announce_at = NULL, next_probe_at = NULL
    FROM old WHERE c.organization_id = old.organization_id
), noted AS (
",
    note_recovery!("old"),
    ")
SELECT failing_since IS NOT NULL AS was_failing FROM old"
);

/// The lease is the time until which nobody else takes the probe. One whose server is not in use is left alone, and so is one
/// whose credentials are under a key of `$4`.
const CLAIM_PROBES: &str = concat!(
    "
WITH due AS MATERIALIZED (
    SELECT c.organization_id FROM smtp_configs AS c JOIN organizations AS o USING (organization_id)
    WHERE c.failing_since IS NOT NULL AND c.next_probe_at <= now() AND ($1 OR o.custom_smtp)
        AND (",
    key_of!("c.username_sealed"),
    " <> ALL ($4)) IS NOT FALSE
        AND (",
    key_of!("c.password_sealed"),
    " <> ALL ($4)) IS NOT FALSE
    ORDER BY c.next_probe_at LIMIT $2
    FOR UPDATE OF c SKIP LOCKED
)
UPDATE smtp_configs AS c SET next_probe_at = now() + $3 * interval '1 second'
FROM due WHERE c.organization_id = due.organization_id
RETURNING c.organization_id, c.version"
);

const GIVE_BACK_PROBE: &str = "
UPDATE smtp_configs SET next_probe_at = now()
WHERE organization_id = $1 AND version = $2 AND failing_since IS NOT NULL";

const PROBE_FAILED: &str = "
UPDATE smtp_configs SET failing_reason = $3, failing_hint = coalesce($4, failing_hint),
    probes = CASE WHEN $6 THEN probes ELSE probes + 1 END,
    long_probes = CASE WHEN $6 THEN long_probes + 1 ELSE long_probes END,
    next_probe_at = now() + ($5::int[])[least(CASE WHEN $6 THEN long_probes ELSE probes END + 1, cardinality($5::int[]))]
        * interval '1 second'
WHERE organization_id = $1 AND version = $2 AND failing_since IS NOT NULL";

const FAILING_IN_USE: &str = "
SELECT count(*) FROM smtp_configs JOIN organizations USING (organization_id)
WHERE failing_since IS NOT NULL AND ($1 OR custom_smtp)";

/// One at a time: the next one may be announced before the last one's time is up.
const TAKE_UNANNOUNCED: &str = "
WITH due AS MATERIALIZED (
    SELECT organization_id FROM smtp_configs WHERE failing_since IS NOT NULL AND announce_at <= now()
    ORDER BY announce_at LIMIT 1 FOR UPDATE SKIP LOCKED
)
UPDATE smtp_configs AS c SET announce_at = now() + $1 * interval '1 second'
FROM due WHERE c.organization_id = due.organization_id
RETURNING c.organization_id, c.version, c.failing_reason, c.failing_hint";

/// Rows of `recoveries` come last.
const ANNOUNCED: &str = "
WITH told AS (
    UPDATE smtp_configs SET announce_at = NULL WHERE organization_id = $1 AND version = $2 RETURNING organization_id
)
UPDATE recoveries SET failing_version = NULL
WHERE organization_id = $1 AND failing_version = $2 AND (SELECT count(*) FROM told) >= 0";

/// A configuration that is to be probed, by whoever holds this.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DueProbe {
    /// Whose.
    pub organization: OrganizationId,
    /// Which version: another one is another's business.
    pub version: i64,
}

/// Trouble that begins, to be announced.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trouble {
    /// Whose.
    pub organization: OrganizationId,
    /// Of which version.
    pub version: i64,
    /// What is wrong.
    pub reason: Reason,
    /// What to do about it.
    pub hint: String,
}

impl SmtpConfigs {
    /// Notes a failure against one version of a configuration and says whether its mail is to be parked.
    ///
    /// # Errors
    /// When the database did not answer; it may have been noted.
    pub async fn blame(
        &self,
        organization: &OrganizationId,
        version: i64,
        reason: Reason,
        hint: &str,
        suspect: Suspect,
    ) -> Result<Blamed, StoreError> {
        let (blame, pauses) = (Blame::of(reason), Pauses::after(reason));
        let question = sqlx::query(BLAME)
            .bind(organization.as_str())
            .bind(version)
            .bind(blame == Blame::Refused)
            .bind(blame == Blame::Unconnected)
            .bind(blame == Blame::Unreachable)
            .bind(reason.as_str())
            .bind(hint)
            .bind(pauses.steps_s())
            .bind(stored_count(STRIKES))
            .bind(UNREACHABLE_FOR.as_secs_f64())
            .bind(pauses == Pauses::Long)
            .bind(UNREACHABLE_GAP.as_secs_f64())
            .bind(suspect == Suspect::Message)
            .bind(ANNOUNCED_WITHIN.as_secs_f64());
        let row = self.store.on_session(async |session| question.fetch_optional(session).await).await?;
        let Some(row) = row else { return Ok(Blamed::Outdated) };
        if !row.try_get::<bool, _>("failing")? {
            return Ok(Blamed::Noted { proven: row.try_get("proven")? });
        }
        Ok(Blamed::Failing { just_now: row.try_get::<Option<bool>, _>("just_now")?.unwrap_or(false) })
    }

    /// Wipes out what was noted against one version of a configuration.
    ///
    /// # Errors
    /// When the database did not answer.
    pub async fn absolve(
        &self,
        organization: &OrganizationId,
        version: i64,
        by: Absolution,
    ) -> Result<(), StoreError> {
        let question =
            sqlx::query(ABSOLVE).bind(organization.as_str()).bind(version).bind(by == Absolution::Worked);
        self.store.on_session(async |session| question.execute(session).await).await.map(drop)
    }

    /// A connection test of this version went well: its mail may go. Whether it was failing.
    ///
    /// # Errors
    /// When the database did not answer; it may be repeated.
    pub async fn recovered(&self, organization: &OrganizationId, version: i64) -> Result<bool, StoreError> {
        let question = sqlx::query_scalar(RECOVER).bind(organization.as_str()).bind(version);
        let was: Option<bool> =
            self.store.on_session(async |session| question.fetch_optional(session).await).await?;
        Ok(was.unwrap_or(false))
    }

    /// Probes that are due, at most `limit`, the longest due first: they are the caller's for `lease`. `for_all`: no feature
    /// flag is asked for. `lacking`: ids of keys that the caller has not, whose probes it leaves to others.
    ///
    /// # Errors
    /// When the database did not answer.
    pub async fn claim_probes(
        &self,
        for_all: bool,
        limit: u32,
        lease: Duration,
        lacking: &[String],
    ) -> Result<Vec<DueProbe>, StoreError> {
        let question = sqlx::query(CLAIM_PROBES)
            .bind(for_all)
            .bind(i64::from(limit))
            .bind(lease.as_secs_f64())
            .bind(lacking);
        let rows = self.store.on_session(async |session| question.fetch_all(session).await).await?;
        rows.iter()
            .map(|row| {
                Ok(DueProbe {
                    organization: organization_of(row.try_get("organization_id")?)?,
                    version: row.try_get("version")?,
                })
            })
            .collect()
    }

    /// A probe that its holder cannot make is due again, for whoever can.
    ///
    /// # Errors
    /// When the database did not answer.
    pub async fn give_back_probe(&self, probe: &DueProbe) -> Result<(), StoreError> {
        let question = sqlx::query(GIVE_BACK_PROBE).bind(probe.organization.as_str()).bind(probe.version);
        self.store.on_session(async |session| question.execute(session).await).await.map(drop)
    }

    /// A probe found that it still does not work, and why: the next one comes after a pause of this kind, longer than the last
    /// one of it. Without a hint the one before stays.
    ///
    /// # Errors
    /// When the database did not answer.
    pub async fn probe_failed(
        &self,
        probe: &DueProbe,
        reason: Reason,
        hint: Option<&str>,
        pauses: Pauses,
    ) -> Result<(), StoreError> {
        let question = sqlx::query(PROBE_FAILED)
            .bind(probe.organization.as_str())
            .bind(probe.version)
            .bind(reason.as_str())
            .bind(hint)
            .bind(pauses.steps_s())
            .bind(pauses == Pauses::Long);
        self.store.on_session(async |session| question.execute(session).await).await.map(drop)
    }

    /// Trouble that nobody has announced within [`ANNOUNCED_WITHIN`], for whoever was to may have died: it is the caller's for
    /// as long.
    ///
    /// # Errors
    /// When the database did not answer.
    pub async fn take_unannounced(&self) -> Result<Option<Trouble>, StoreError> {
        let question = sqlx::query(TAKE_UNANNOUNCED).bind(ANNOUNCED_WITHIN.as_secs_f64());
        let row = self.store.on_session(async |session| question.fetch_optional(session).await).await?;
        row.map(|row| {
            Ok(Trouble {
                organization: organization_of(row.try_get("organization_id")?)?,
                version: row.try_get("version")?,
                reason: reason_from(row.try_get("failing_reason")?),
                hint: row.try_get::<Option<String>, _>("failing_hint")?.unwrap_or_default(),
            })
        })
        .transpose()
    }

    /// `smtp_config.failing` is published.
    ///
    /// # Errors
    /// When the database did not answer.
    pub async fn announced(&self, organization: &OrganizationId, version: i64) -> Result<(), StoreError> {
        let question = sqlx::query(ANNOUNCED).bind(organization.as_str()).bind(version);
        self.store.on_session(async |session| question.execute(session).await).await.map(drop)
    }
}

impl Store {
    /// How many organizations have their mail parked because the configuration that they use fails. `for_all`: no feature flag is
    /// asked for.
    ///
    /// # Errors
    /// When the database did not answer.
    pub async fn failing_count(&self, for_all: bool) -> Result<u64, StoreError> {
        let question = sqlx::query_scalar(FAILING_IN_USE).bind(for_all);
        let count: i64 = self.on_session(async |session| question.fetch_one(session).await).await?;
        Ok(count.unsigned_abs())
    }
}

fn organization_of(text: &str) -> Result<OrganizationId, StoreError> {
    OrganizationId::stored(text)
        .map_err(|_| StoreError::Internal(format!("`{text}` is stored as an organization")))
}
