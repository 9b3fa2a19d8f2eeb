//! `smtp_config.get`, and how a configuration is shown.
//! Guarantee: exactly the contract's fields, and no form of a credential.

use serde::Serialize;
use serde_json::{Value, json};
use time::OffsetDateTime;

use super::error::ControlError;
use super::{Call, Control, Done};
use crate::model::organization::OrganizationId;
use crate::model::provider::Limits;
use crate::store::SmtpConfig;

impl Control {
    /// Works with the flag off too: an admin must see what is left to delete.
    pub(super) async fn smtp_config_get(&self, call: &Call<'_>) -> Result<Done, ControlError> {
        let organization = call.organization()?;
        let settings = self.configs.get(organization).await?;
        let config = settings.config.ok_or_else(ControlError::config_not_found)?;
        Ok(Done::read(view(organization, &config)))
    }
}

#[derive(Serialize)]
struct View<'a> {
    organization_id: &'a OrganizationId,
    version: i64,
    from_email: &'a str,
    from_name: &'a str,
    host: &'a str,
    port: u16,
    secure: bool,
    /// Left out where nothing is limited.
    #[serde(skip_serializing_if = "Option::is_none")]
    limits: Option<LimitsView>,
    last_test: Option<LastTestView<'a>>,
    status: &'static str,
    #[serde(with = "time::serde::rfc3339")]
    created_at: OffsetDateTime,
    #[serde(with = "time::serde::rfc3339")]
    updated_at: OffsetDateTime,
}

/// What holds for the account over all workers; `null` where that is not limited.
#[derive(Serialize)]
struct LimitsView {
    max_connections: Option<u32>,
    messages_per_minute: Option<u32>,
    source: &'static str,
}

#[derive(Serialize)]
struct LastTestView<'a> {
    #[serde(with = "time::serde::rfc3339")]
    at: OffsetDateTime,
    ok: bool,
    code: Option<&'a str>,
}

/// The configuration as returned; the organization is spelled as in the command.
pub(super) fn view(organization: &OrganizationId, config: &SmtpConfig) -> Value {
    let last_test = config.last_test.as_ref();
    json!(View {
        organization_id: organization,
        version: config.version,
        from_email: &config.from_email,
        from_name: &config.from_name,
        host: &config.host,
        port: config.port,
        secure: config.secure,
        limits: Limits::of(&config.host, config.overrides).map(|limits| LimitsView {
            max_connections: limits.max_connections,
            messages_per_minute: limits.messages_per_minute,
            source: limits.source(),
        }),
        last_test: last_test.map(|test| LastTestView {
            at: test.at,
            ok: test.ok,
            code: test.code.as_deref()
        }),
        status: if config.failing.is_some() { "failing" } else { "ok" },
        created_at: config.created_at,
        updated_at: config.updated_at,
    })
}
