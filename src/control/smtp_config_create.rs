//! `smtp_config.create`: an organization's one configuration.
//! Guarantee: what is stored was complete, its host public when it was looked up, and there was none before.

use super::error::ControlError;
use super::fields::required;
use super::smtp_config_get::view;
use super::smtp_params::{self, SmtpParams};
use super::{Call, Control, Done};
use crate::egress::ServerHost;
use crate::model::provider::Overrides;
use crate::model::smtp_settings::Credentials;
use crate::store::NewSmtpConfig;

pub(super) const PARAMS: &[&str] = smtp_params::NAMES;
impl Control {
    pub(super) async fn smtp_config_create(&self, call: &Call<'_>) -> Result<Done, ControlError> {
        let (host, new) = complete(SmtpParams::read(&call.request.params)?)?;
        let organization = call.organization()?;
        let settings = self.configs.get(organization).await?;
        self.check_enabled(&settings)?;
        if settings.config.is_some() {
            return Err(ControlError::already_exists());
        }
        self.check_server(&host, new.port).await?;
        let config = self.configs.create(organization, &new, call.audit("ok"), call.by).await?;
        Ok(Done::changed(view(organization, &config)))
    }
}

/// The host, and a configuration with nothing missing.
pub(super) fn complete(params: SmtpParams) -> Result<(ServerHost, NewSmtpConfig), ControlError> {
    let from_email = required("from_email", params.from_email)?;
    let from_name = required("from_name", params.from_name)?;
    let host = required("host", params.host)?;
    let port = required("port", params.port)?;
    let username = required("username", params.username)?;
    let password = required("password", params.password)?;
    let new = NewSmtpConfig {
        from_email,
        from_name,
        host: host.to_string(),
        port,
        secure: params.secure.unwrap_or(true),
        credentials: Credentials::new(username, password),
        overrides: Overrides {
            max_connections: params.max_connections.flatten(),
            messages_per_minute: params.messages_per_minute.flatten(),
        },
    };
    Ok((host, new))
}
