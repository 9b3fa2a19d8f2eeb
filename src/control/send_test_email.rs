//! `smtp_config.send_test_email`: one real email through the stored configuration, at once, outside the lanes.
//! Guarantee: one recipient and one transaction, never repeated; the answer says when it is not known whether it was
//! accepted.

use std::time::Duration;

use serde_json::json;
use time::OffsetDateTime;
use time::macros::format_description;
use tokio::time::{Instant, timeout_at};

use super::error::ControlError;
use super::fields::required;
use super::smtp_trouble;
use super::testing::{Stored, destination};
use super::{Call, Control, Done};
use crate::model::address::{EmailAddress, Mailbox};
use crate::model::failure::{Failure, Fault, Phase, Reply, TransactionOutcome};
use crate::model::health::Absolution;
use crate::model::job::{Job, JobKey, OnUnknown};
use crate::model::organization::OrganizationId;
use crate::model::smtp_settings::SmtpAccount;
use crate::smtp::compose::{compose, message_id, needs_smtputf8};
use crate::smtp::{Envelope, Session};

pub(super) const PARAMS: &[&str] = &["to"];

/// From the command's arrival to the server's last word: the reply comes within 60 s.
const SEND_LIMIT: Duration = Duration::from_secs(55);
/// For what is noted of a success.
const NOTE_LIMIT: Duration = Duration::from_secs(1);
/// Far more than the few lines have.
const MESSAGE_MAX: usize = 64 * 1024;

impl Control {
    pub(super) async fn send_test_email(&self, call: &Call<'_>) -> Result<Done, ControlError> {
        let to = required("to", call.request.params.text("to")?)?;
        let to = EmailAddress::parse(&to).map_err(|fault| ControlError::invalid_field("to", fault))?;
        let organization = call.organization()?;
        let Stored { config, account } = self.stored(organization, |_| Ok(())).await?;
        let _slot = self.admit(call).await?;
        let now = self.clock.now();
        let key = JobKey { organization: Some(organization.clone()), id: self.clock.new_id() };
        let message_id = message_id(key.id, account.envelope_from());
        let job = email(key, to, organization, &account, now);
        let message = compose(&job, &account.from, &message_id, now, MESSAGE_MAX).map_err(|error| {
            tracing::error!(%error, "a test email could not be composed");
            ControlError::internal()
        })?;
        let sent = self.send_once(organization, config.version, &account, &job, &message, call.began).await;
        let response = sent.map_err(|failure| {
            let allowed_ports = self.egress.policy().ports().to_string();
            smtp_trouble::error(&failure, &account, &allowed_ports)
        })?;
        self.note_accepted(organization, config.version).await;
        Ok(Done::read(json!({ "message_id": message_id, "response": response.to_string() })))
    }

    async fn send_once(
        &self,
        organization: &OrganizationId,
        version: i64,
        account: &SmtpAccount,
        job: &Job,
        message: &[u8],
        began: Instant,
    ) -> Result<Reply, Failure> {
        let by = began + SEND_LIMIT;
        let destination = destination(organization, version);
        let connector = self.smtp.apart();
        let mut session = connector.open_by(&destination, account, by).await?;
        let final_dot = session.final_dot();
        let envelope = Envelope {
            from: account.envelope_from().clone(),
            recipients: (0..).zip(job.recipients().cloned()).collect(),
            smtputf8: needs_smtputf8(job, &account.from),
        };
        let outcome = match timeout_at(by, transaction(&mut session, &envelope, message)).await {
            Ok(outcome) => outcome,
            Err(_) if final_dot.may_have_left() => Err(Failure::new(Phase::FinalDot, Fault::Timeout)),
            Err(_) => Err(Failure::new(Phase::Body, Fault::Timeout)),
        };
        let _ = timeout_at(by, session.quit()).await;
        outcome
    }

    /// A message was accepted, which says more than a connection test. The answer does not depend on it.
    async fn note_accepted(&self, organization: &OrganizationId, version: i64) {
        self.has_worked(organization, version, NOTE_LIMIT).await;
        let noting = self.configs.absolve(organization, version, Absolution::Worked);
        if !matches!(tokio::time::timeout(NOTE_LIMIT, noting).await, Ok(Ok(()))) {
            tracing::warn!("a test email was accepted, which could not be noted");
        }
    }
}

async fn transaction(session: &mut Session, envelope: &Envelope, message: &[u8]) -> Result<Reply, Failure> {
    let transaction = session.send(envelope, message, std::future::ready(true)).await;
    match (transaction.outcome, transaction.refused.into_iter().next()) {
        (TransactionOutcome::Accepted(reply), _) => Ok(reply),
        (TransactionOutcome::Failed(failure), _) => Err(failure),
        (_, Some((_, refusal))) => Err(Failure::new(Phase::Rcpt, Fault::Reply(refusal))),
        (_, None) => {
            let detail = "the server neither took nor refused the recipient".to_owned();
            Err(Failure::new(Phase::Rcpt, Fault::Protocol { detail }))
        }
    }
}

/// The email: which organization, which server, when.
fn email(
    key: JobKey,
    to: EmailAddress,
    organization: &OrganizationId,
    account: &SmtpAccount,
    now: OffsetDateTime,
) -> Job {
    let host = &account.host;
    let host = if host.contains(':') { format!("[{host}]") } else { host.clone() };
    let server = format!("{host}:{}", account.port);
    let when = now.to_offset(time::UtcOffset::UTC).format(format_description!(
        "[day padding:none] [month repr:long] [year] at [hour]:[minute]:[second] UTC"
    ));
    let when = when.expect("every time has these parts");
    let opening = "This is the test email that was asked for in your email settings.";
    let closing = "If you can read this, the settings work. There is nothing to do, and no need to answer.";
    let text = format!(
        "{opening}\n\nOrganization: {organization}\nSMTP server: {server}\nSent: {when}\n\n{closing}\n"
    );
    let [organization, server] = [organization.as_str(), &server].map(escaped);
    let html = format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head><meta charset=\"utf-8\"><title>Test email</title></head>\n<body>\n\
         <p>{opening}</p>\n<p>Organization: <b>{organization}</b><br>\nSMTP server: <b>{server}</b><br>\nSent: {when}</p>\n\
         <p>{closing}</p>\n</body>\n</html>\n"
    );
    Job {
        key,
        // Nothing was published.
        body_hash: [0; 32],
        kind: "smtp_config.test_email".to_owned(),
        to: vec![Mailbox::bare(to)],
        cc: Vec::new(),
        bcc: Vec::new(),
        reply_to: Vec::new(),
        subject: "Test email: your SMTP server works".to_owned(),
        text: Some(text),
        html: Some(html),
        calendar: None,
        attachments: Vec::new(),
        headers: Vec::new(),
        expires_at: None,
        group: None,
        on_unknown: OnUnknown::Hold,
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
