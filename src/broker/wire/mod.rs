//! The published job, JSON of version 1, and its way into the model.
//! Guarantee: what is refused is refused with the field's path, the fault and what is allowed, never with its content.

mod body;
mod calendar;
mod explain;
mod header;
mod schema;
#[cfg(test)]
mod tests;
mod validate;

use sha2::{Digest, Sha256};
use time::OffsetDateTime;
use uuid::Uuid;

use crate::model::failure::Reason;
use crate::model::job::{Job, JobKey, Revision};
use crate::model::text;

pub use body::{AttachmentBody, CalendarBody, JobBody, MailboxBody};
pub use schema::{SCHEMA_ID, job_schema};
pub use validate::is_slug;

/// The version this program reads and writes.
pub const VERSION: i64 = 1;
/// Longest [`Refusal::detail`], in bytes.
const DETAIL_MAX: usize = 300;

/// The operator's limits (`limits.*` in the settings).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WireLimits {
    /// to + cc + bcc.
    pub max_recipients: usize,
    /// Size of the composed message; a job whose content alone exceeds it is refused here.
    pub max_message_bytes: usize,
}

/// Why a body is not a job that can be sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// `malformed`, `unsupported_version` or `too_large`.
    pub reason: Reason,
    /// Field, fault and what is allowed: one line of at most 300 bytes without addresses or content.
    pub detail: String,
    /// The job's id, where it could be read all the same.
    pub id: Option<Uuid>,
    /// The job's key, where id and organization could be read all the same.
    pub key: Option<JobKey>,
    /// The job's kind, where it could be read and is a slug.
    pub kind: Option<String>,
}

/// What a body tells of its job, whether or not it is one that can be sent.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Told {
    /// Where it is usable, whatever the organization is.
    pub id: Option<Uuid>,
    /// Where id and organization are usable.
    pub key: Option<JobKey>,
    /// Where it is a slug.
    pub kind: Option<String>,
    /// Where it is a time.
    pub expires_at: Option<OffsetDateTime>,
    /// Where both halves are usable.
    pub revision: Option<Revision>,
}

/// One fault, before it is known whose job it is in.
struct Fault {
    reason: Reason,
    detail: String,
}

impl Fault {
    fn malformed(detail: impl Into<String>) -> Self {
        Self { reason: Reason::Malformed, detail: detail.into() }
    }

    fn unsupported(version: i64) -> Self {
        let detail = format!("version: {version} is not supported; {VERSION} is");
        Self { reason: Reason::UnsupportedVersion, detail }
    }

    fn into_refusal(self, told: Told) -> Refusal {
        let detail = text::bounded(&text::single_line(&self.detail), DETAIL_MAX);
        let Told { id, key, kind, .. } = told;
        Refusal { reason: self.reason, detail, id, key, kind }
    }
}

/// Reads what a body tells: of a job what [`parse_job`] reads, of any other JSON what is usable, else nothing.
pub fn tell(body: &[u8]) -> Told {
    explain::tell(body)
}

/// Reads a published body. A job that has expired, or whose organization is unknown, is a job all the same.
///
/// `null` stands for an absent value wherever a field may be left out. In `text`, `html` and `calendar.content`,
/// control characters other than TAB, CR and LF are dropped: mail does not carry them.
///
/// # Errors
/// [`Refusal`]; the same body is refused again however often it is tried.
pub fn parse_job(body: &[u8], limits: &WireLimits) -> Result<Job, Refusal> {
    let parsed: JobBody = serde_json::from_slice(body).map_err(|error| explain::explain(body, &error))?;
    let key = JobKey { organization: parsed.organization_id.clone(), id: parsed.id };
    let kind = validate::is_slug(&parsed.kind).then(|| parsed.kind.clone());
    let told = Told { id: Some(key.id), key: Some(key), kind, ..Told::default() };
    let body_hash = Sha256::digest(body).into();
    validate::job(parsed, body_hash, limits).map_err(|fault| fault.into_refusal(told))
}
