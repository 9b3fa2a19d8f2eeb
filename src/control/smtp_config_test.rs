//! `smtp_config.test`: can a message be handed to this server, with these credentials? Nothing is sent.
//! Guarantee: an unsaved configuration is judged as a stored one is, and leaves no trace; a result is kept for the stored
//! one alone, and only if it was tested as it is.

use std::time::Duration;

use secrecy::SecretString;
use serde_json::json;
use tokio::time::{Instant, timeout_at};

use super::error::{Code, ControlError};
use super::examined::TestReport;
use super::smtp_config_create::complete;
use super::smtp_config_update::{password_rule, patch};
use super::smtp_params::{self, SmtpParams};
use super::testing::{Stored, destination};
use super::{Call, Control, Done};
use crate::egress::{EgressError, ServerHost};
use crate::model::address::{EmailAddress, Mailbox};
use crate::model::organization::OrganizationId;
use crate::model::sender_records::{self, Findings, MailRecords};
use crate::model::smtp_settings::{Credentials, SmtpAccount, TlsMode};
use crate::store::{NewSmtpConfig, SmtpConfig, SmtpConfigPatch};

pub(super) const PARAMS: &[&str] = smtp_params::NAMES;

/// From the command's arrival to the end of the test, whatever the server does: the reply comes within 20 s.
pub(super) const TEST_LIMIT: Duration = Duration::from_secs(17);
/// With less of it left a test would say of the server what is the fault of our own database.
const TEST_LEAST: Duration = Duration::from_secs(8);
/// For what is noted of a result.
const NOTE_LIMIT: Duration = Duration::from_secs(1);

/// What is to be tested.
struct Subject {
    account: SmtpAccount,
    /// The version that it is, where it is the stored one as it is.
    stored: Option<i64>,
}

impl Control {
    pub(super) async fn smtp_config_test(&self, call: &Call<'_>) -> Result<Done, ControlError> {
        let params = SmtpParams::read(&call.request.params)?;
        let organization = call.organization()?;
        let subject = if call.given.is_empty() {
            let Stored { config, account } = self.stored(organization, |_| Ok(())).await?;
            Subject { account: (*account).clone(), stored: Some(config.version) }
        } else {
            Subject { account: self.unsaved(organization, params).await?, stored: None }
        };
        let _slot = self.admit(call).await?;
        let by = call.began + TEST_LIMIT;
        if by.saturating_duration_since(Instant::now()) < TEST_LEAST {
            return Err(ControlError::too_late_to_test());
        }
        let report = self.examine(organization, &subject, by).await;
        if let Some(version) = subject.stored {
            self.note(organization, version, &report).await;
        }
        Ok(Done::read(json!(report)))
    }

    /// The given fields, complete or laid over the stored ones. Where both credentials are given, those that are stored are
    /// not even opened.
    async fn unsaved(
        &self,
        organization: &OrganizationId,
        params: SmtpParams,
    ) -> Result<SmtpAccount, ControlError> {
        let settings = self.configs.get(organization).await?;
        self.check_enabled(&settings)?;
        let Some(config) = settings.config else {
            let (_, new) = complete(params)?;
            return account(new);
        };
        let patch = patch(params);
        if patch.username.is_some() && patch.password.is_some() {
            return account(laid_over(&config, None, patch)?);
        }
        let stored = self.stored(organization, |config| password_rule(config, &patch)).await?;
        account(laid_over(&stored.config, stored.account.credentials.as_ref(), patch)?)
    }

    async fn examine(&self, organization: &OrganizationId, subject: &Subject, by: Instant) -> TestReport {
        let destination = destination(organization, subject.stored.unwrap_or(0));
        let (seen, findings) = tokio::join!(
            self.smtp.examine(&destination, &subject.account, by),
            self.senders_domain(&subject.account, by),
        );
        let allowed_ports = self.egress.policy().ports().to_string();
        let mut report = TestReport::new(&seen, &subject.account, &allowed_ports, self.clock.now());
        if !report.refuses_to_dial() {
            report.add(findings);
        }
        report
    }

    /// What is to be told of the sender's domain. Where the host or the port may not be dialled, nothing is looked up.
    async fn senders_domain(&self, account: &SmtpAccount, by: Instant) -> Findings {
        let Ok(host) = ServerHost::parse(&account.host) else { return Findings::default() };
        let domain = account.from.email.domain();
        let looking = async {
            match self.egress.approve(&host, account.port).await {
                Err(EgressError::HostNotPublic { .. } | EgressError::PortNotAllowed { .. }) => None,
                _ => Some(self.egress.mail_records(domain).await),
            }
        };
        match timeout_at(by, looking).await {
            Ok(None) => Findings::default(),
            Ok(Some(records)) => sender_records::findings(domain, &records),
            Err(_) => sender_records::findings(domain, &MailRecords::failed("no answer in time")),
        }
    }

    /// What the result means for the stored configuration. The answer does not depend on it.
    async fn note(&self, organization: &OrganizationId, version: i64, report: &TestReport) {
        if report.ok {
            self.has_worked(organization, version, NOTE_LIMIT).await;
        }
        let code = report.code().map(Code::as_str);
        if let Err(error) = self.configs.record_test(organization, version, code, NOTE_LIMIT).await {
            tracing::warn!(%error, "the result of a connection test could not be kept");
        }
    }
}

/// The patch laid over what is stored. The password rule has been asked: a stored password stays with its host.
fn laid_over(
    stored: &SmtpConfig,
    known: Option<&Credentials>,
    patch: SmtpConfigPatch,
) -> Result<NewSmtpConfig, ControlError> {
    let known = |field: fn(&Credentials) -> &str| known.map(|known| SecretString::from(field(known)));
    let username = patch.username.or_else(|| known(Credentials::username));
    let password = patch.password.or_else(|| known(Credentials::password));
    let (Some(username), Some(password)) = (username, password) else {
        return Err(ControlError::internal());
    };
    let from_email = match patch.from_email {
        Some(email) => email,
        None => EmailAddress::parse(&stored.from_email)
            .map_err(|fault| ControlError::invalid_field("from_email", fault))?,
    };
    Ok(NewSmtpConfig {
        from_email,
        from_name: patch.from_name.unwrap_or_else(|| stored.from_name.clone()),
        host: patch.host.unwrap_or_else(|| stored.host.clone()),
        port: patch.port.unwrap_or(stored.port),
        secure: patch.secure.unwrap_or(stored.secure),
        credentials: Credentials::new(username, password),
        overrides: stored.overrides,
    })
}

fn account(new: NewSmtpConfig) -> Result<SmtpAccount, ControlError> {
    let from = Mailbox::named(&new.from_name, new.from_email)
        .map_err(|fault| ControlError::invalid_field("from_name", fault))?;
    Ok(SmtpAccount {
        host: new.host,
        port: new.port,
        tls: TlsMode::new(new.port, new.secure),
        credentials: Some(new.credentials),
        from,
    })
}
