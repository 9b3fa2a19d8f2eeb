//! The validated job: what is to be sent, to whom, and what its publisher wants done when things go wrong.
//! Guarantee: a [`Job`] can only hold values that version 1 of the contract allows.

use std::fmt;

use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use uuid::Uuid;

use super::address::{EmailAddress, Mailbox};
use super::organization::OrganizationId;
use super::text::has_forbidden_control;

/// The idempotency key: a job's id within its organization, or within the platform.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct JobKey {
    /// `None`: the platform.
    pub organization: Option<OrganizationId>,
    /// The publisher's id.
    pub id: Uuid,
}

impl fmt::Display for JobKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.organization {
            Some(organization) => write!(f, "{organization}/{}", self.id),
            None => write!(f, "platform/{}", self.id),
        }
    }
}

/// One job of version 1.
#[derive(Clone)]
pub struct Job {
    /// Idempotency key.
    pub key: JobKey,
    /// SHA-256 of the published body: tells a repetition from another job under the same id.
    pub body_hash: [u8; 32],
    /// Slug for filters and events, 1 to 64 of `[a-z0-9._-]`.
    pub kind: String,
    /// Recipients shown in `To`.
    pub to: Vec<Mailbox>,
    /// Recipients shown in `Cc`.
    pub cc: Vec<Mailbox>,
    /// Recipients that no header shows.
    pub bcc: Vec<Mailbox>,
    /// `Reply-To`, empty for none.
    pub reply_to: Vec<Mailbox>,
    /// One line.
    pub subject: String,
    /// Plain text, when given.
    pub text: Option<String>,
    /// HTML, when given; one of the two always is.
    pub html: Option<String>,
    /// Invitation or its cancellation.
    pub calendar: Option<Calendar>,
    /// Files, decoded.
    pub attachments: Vec<Attachment>,
    /// Further headers: name as allowed by the contract, value on one line.
    pub headers: Vec<(String, String)>,
    /// Nothing is sent past this time.
    pub expires_at: Option<OffsetDateTime>,
    /// The booking and its revision, against which a job can be out of date.
    pub group: Option<Revision>,
    /// What to do when it cannot be known whether the message was accepted.
    pub on_unknown: OnUnknown,
}

impl Job {
    /// Every recipient in the order of the contract's `index`: to, then cc, then bcc.
    pub fn recipients(&self) -> impl Iterator<Item = &EmailAddress> {
        self.to.iter().chain(&self.cc).chain(&self.bcc).map(|mailbox| &mailbox.email)
    }

    /// How many recipients there are in all.
    pub fn recipient_count(&self) -> usize {
        self.to.len() + self.cc.len() + self.bcc.len()
    }

    /// Whether the job is past its time.
    pub fn is_expired(&self, now: OffsetDateTime) -> bool {
        self.expires_at.is_some_and(|expires_at| expires_at <= now)
    }
}

/// Shows the key and the kind only: the rest is personal data.
impl fmt::Debug for Job {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Job({}, {})", self.key, self.kind)
    }
}

/// An iCalendar object (RFC 5545) to be carried as an alternative and as a file.
#[derive(Clone)]
pub struct Calendar {
    /// Equal to the content's own METHOD.
    pub method: CalendarMethod,
    /// The iCalendar text as published.
    pub content: String,
    /// One line; `invite.ics` unless given.
    pub filename: String,
}

/// RFC 5546 methods that a booking system sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum CalendarMethod {
    /// An invitation or its update.
    Request,
    /// A cancellation.
    Cancel,
    /// An attendee's answer.
    Reply,
    /// A plain announcement.
    Publish,
}

impl CalendarMethod {
    /// The method as iCalendar and the content type spell it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Request => "REQUEST",
            Self::Cancel => "CANCEL",
            Self::Reply => "REPLY",
            Self::Publish => "PUBLISH",
        }
    }
}

/// A file, or an image that the HTML shows by its content id.
#[derive(Clone)]
pub struct Attachment {
    /// One line, never empty.
    pub filename: String,
    /// `type/subtype`, perhaps with parameters; checked to be one.
    pub content_type: String,
    /// The decoded bytes.
    pub content: Vec<u8>,
    /// Set for an inline part: without angle brackets.
    pub content_id: Option<String>,
}

/// The booking a job speaks about, and its revision (iCalendar's UID and SEQUENCE).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Revision {
    /// 1 to 255 characters.
    pub group: String,
    /// Grows with every change of the booking.
    pub sequence: i64,
}

impl Revision {
    /// Longest group, in characters.
    pub const GROUP_MAX: usize = 255;

    /// Whether a text can name a group: 1 to 255 characters without control characters.
    pub fn is_group(text: &str) -> bool {
        (1..=Self::GROUP_MAX).contains(&text.chars().count()) && !has_forbidden_control(text)
    }
}

/// What the publisher wants when the outcome cannot be known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnUnknown {
    /// Send again, once.
    #[default]
    Resend,
    /// Never twice: a person decides.
    Hold,
}
