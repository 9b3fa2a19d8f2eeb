//! `smtp_config.update`: any field alone, without the others being given again.
//! Guarantee: the stored password is never laid under another host, nor under a server without TLS, whatever other
//! updates run at the same time: the rule is asked again under the lock.

use super::error::ControlError;
use super::smtp_config_get::view;
use super::smtp_params::{self, SmtpParams};
use super::{Call, Control, Done};
use crate::egress::EgressError;
use crate::model::smtp_settings::TlsMode;
use crate::store::{ChangeError, SmtpConfig, SmtpConfigPatch};

pub(super) const PARAMS: &[&str] = &smtp_params::WITH_VERSION;

/// How often an update looks again when others change the host meanwhile.
const ROUNDS: usize = 3;

/// Why an update is not laid over the configuration that is found under the lock.
enum Refusal {
    Rule(ControlError),
    /// Its host was not looked up, for it was no change when the update began. With the version that is current now.
    LookAgain(i64),
}

impl Control {
    pub(super) async fn smtp_config_update(&self, call: &Call<'_>) -> Result<Done, ControlError> {
        let if_version = if_version(call)?;
        if !call.given.iter().any(|name| *name != "if_version") {
            return Err(ControlError::invalid_request(
                "params",
                "params must give at least one field to change",
            ));
        }
        let params = SmtpParams::read(&call.request.params)?;
        let (host, port) = (params.host.clone(), params.port);
        let patch = patch(params);
        let organization = call.organization()?;
        let mut seen = 0;
        for _ in 0..ROUNDS {
            let settings = self.configs.get(organization).await?;
            self.check_enabled(&settings)?;
            let current = settings.config.ok_or_else(ControlError::config_not_found)?;
            if if_version.is_some_and(|version| version != current.version) {
                return Err(ControlError::conflict(current.version));
            }
            password_rule(&current, &patch)?;
            let new_host = host.as_ref().filter(|_| changes_host(&current, &patch));
            match (new_host, port) {
                (Some(host), port) => self.check_server(host, port.unwrap_or(current.port)).await?,
                (None, Some(port)) if port != current.port => self.check_port(port)?,
                (None, _) => {}
            }
            let host_checked = new_host.is_some();
            let allow = |locked: &SmtpConfig| {
                if changes_host(locked, &patch) && !host_checked {
                    return Err(Refusal::LookAgain(locked.version));
                }
                password_rule(locked, &patch).map_err(Refusal::Rule)
            };
            match self
                .configs
                .update(organization, if_version, &patch, allow, call.audit("ok"), call.by)
                .await
            {
                Err(ChangeError::Refused(Refusal::LookAgain(version))) => seen = version,
                Err(error) => {
                    return Err(ControlError::of_change(error, |refusal| match refusal {
                        Refusal::Rule(error) => error,
                        Refusal::LookAgain(version) => ControlError::busy(version),
                    }));
                }
                Ok(config) => return Ok(Done::changed(view(organization, &config))),
            }
        }
        Err(ControlError::busy(seen))
    }

    fn check_port(&self, port: u16) -> Result<(), ControlError> {
        let policy = self.egress.policy();
        if policy.port_allowed(port) {
            return Ok(());
        }
        Err(EgressError::PortNotAllowed { port, allowed: policy.ports().to_string() }.into())
    }
}

fn if_version(call: &Call<'_>) -> Result<Option<i64>, ControlError> {
    call.request.params.value("if_version", "must be an integer")
}

/// What was given, to be laid over what is stored.
pub(super) fn patch(params: SmtpParams) -> SmtpConfigPatch {
    SmtpConfigPatch {
        from_email: params.from_email,
        from_name: params.from_name,
        host: params.host.map(|host| host.to_string()),
        port: params.port,
        secure: params.secure,
        username: params.username,
        password: params.password,
        max_connections: params.max_connections,
        messages_per_minute: params.messages_per_minute,
    }
}

/// Both sides are in their normal form.
fn changes_host(current: &SmtpConfig, patch: &SmtpConfigPatch) -> bool {
    patch.host.as_ref().is_some_and(|host| *host != current.host)
}

/// A stored password is only ever presented to the server it was entered for.
pub(super) fn password_rule(current: &SmtpConfig, patch: &SmtpConfigPatch) -> Result<(), ControlError> {
    let insists = |port, secure| TlsMode::new(port, secure) != TlsMode::Opportunistic;
    let (port, secure) = (patch.port.unwrap_or(current.port), patch.secure.unwrap_or(current.secure));
    // A port can give it up too: that of TLS from the first byte is left, and `secure` was off all along.
    let gives_up_tls =
        (current.secure && !secure) || (insists(current.port, current.secure) && !insists(port, secure));
    if patch.password.is_none() && (changes_host(current, patch) || gives_up_tls) {
        return Err(ControlError::password_needed());
    }
    Ok(())
}
