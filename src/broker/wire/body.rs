//! The JSON shape of a job, for reading and for writing.
//! Guarantee: an unknown or repeated field does not pass; what is written can be read back.

use std::fmt;

use serde::de::value::MapAccessDeserializer;
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use time::OffsetDateTime;
use uuid::Uuid;

use crate::model::job::{CalendarMethod, OnUnknown};
use crate::model::organization::OrganizationId;

/// A job as it is published (contract section 3); its values are not judged yet.
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JobBody {
    /// 1.
    pub version: i64,
    /// Idempotency key within the organization.
    pub id: Uuid,
    /// `None`: the platform.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub organization_id: Option<OrganizationId>,
    /// Slug, say `booking.confirmed`.
    pub kind: String,
    /// Recipients in `To`.
    #[serde(default, deserialize_with = "null_is_default", skip_serializing_if = "Vec::is_empty")]
    pub to: Vec<MailboxBody>,
    /// Recipients in `Cc`.
    #[serde(default, deserialize_with = "null_is_default", skip_serializing_if = "Vec::is_empty")]
    pub cc: Vec<MailboxBody>,
    /// Recipients that no header shows.
    #[serde(default, deserialize_with = "null_is_default", skip_serializing_if = "Vec::is_empty")]
    pub bcc: Vec<MailboxBody>,
    /// `Reply-To`.
    #[serde(default, deserialize_with = "null_is_default", skip_serializing_if = "Vec::is_empty")]
    pub reply_to: Vec<MailboxBody>,
    /// Subject.
    pub subject: String,
    /// Plain text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    /// HTML.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub html: Option<String>,
    /// Invitation or cancellation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub calendar: Option<CalendarBody>,
    /// Files and inline images.
    #[serde(default, deserialize_with = "null_is_default", skip_serializing_if = "Vec::is_empty")]
    pub attachments: Vec<AttachmentBody>,
    /// Further headers, in the order given.
    #[serde(default, with = "header_map", skip_serializing_if = "Vec::is_empty")]
    pub headers: Vec<(String, String)>,
    /// Nothing is sent past this time.
    #[serde(default, with = "time::serde::rfc3339::option", skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<OffsetDateTime>,
    /// The booking's UID.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
    /// The booking's revision.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sequence: Option<i64>,
    /// What to do when the outcome cannot be known.
    #[serde(default, deserialize_with = "null_is_default")]
    pub on_unknown: OnUnknown,
}

impl JobBody {
    /// A job of version 1 with nothing but its subject, for the platform; the caller adds recipients and content.
    pub fn new(id: Uuid, kind: impl Into<String>, subject: impl Into<String>) -> Self {
        Self {
            version: super::VERSION,
            id,
            organization_id: None,
            kind: kind.into(),
            to: Vec::new(),
            cc: Vec::new(),
            bcc: Vec::new(),
            reply_to: Vec::new(),
            subject: subject.into(),
            text: None,
            html: None,
            calendar: None,
            attachments: Vec::new(),
            headers: Vec::new(),
            expires_at: None,
            group: None,
            sequence: None,
            on_unknown: OnUnknown::default(),
        }
    }

    /// The body to publish.
    ///
    /// # Errors
    /// When `expires_at` lies outside the years 0 to 9999, which RFC 3339 cannot spell.
    pub fn to_json(&self) -> Result<Vec<u8>, serde_json::Error> {
        serde_json::to_vec(self)
    }
}

/// A mailbox in one of its three spellings.
#[derive(Clone, Serialize)]
#[serde(untagged)]
pub enum MailboxBody {
    /// `a@b.c` or `Name <a@b.c>`.
    Text(String),
    /// Address and name apart.
    Full {
        /// The address alone.
        email: String,
        /// Display name.
        #[serde(skip_serializing_if = "Option::is_none")]
        name: Option<String>,
    },
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FullMailbox {
    email: String,
    #[serde(default)]
    name: Option<String>,
}

impl<'de> Deserialize<'de> for MailboxBody {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Spelling;
        impl<'de> Visitor<'de> for Spelling {
            type Value = MailboxBody;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a mailbox")
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<MailboxBody, E> {
                Ok(MailboxBody::Text(text.to_owned()))
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<MailboxBody, A::Error> {
                let FullMailbox { email, name } = FullMailbox::deserialize(MapAccessDeserializer::new(map))?;
                Ok(MailboxBody::Full { email, name })
            }
        }
        deserializer.deserialize_any(Spelling)
    }
}

/// An iCalendar object.
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CalendarBody {
    /// Equal to the content's METHOD.
    pub method: CalendarMethod,
    /// The iCalendar text.
    pub content: String,
    /// `invite.ics` unless given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub filename: Option<String>,
}

/// A file, or with a content id an image that the HTML shows.
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AttachmentBody {
    /// Name shown to the recipient.
    pub filename: String,
    /// `type/subtype`, perhaps with parameters.
    pub content_type: String,
    /// RFC 4648 section 4, padded; line breaks are allowed.
    pub content_base64: String,
    /// Without angle brackets.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content_id: Option<String>,
}

fn null_is_default<'de, D: Deserializer<'de>, T: Default + Deserialize<'de>>(
    deserializer: D,
) -> Result<T, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

/// A JSON object as a list of pairs, so that a repeated name is seen and the order is kept.
mod header_map {
    use std::fmt;

    use serde::de::{MapAccess, Visitor};
    use serde::{Deserializer, Serializer};

    pub fn serialize<S: Serializer>(headers: &[(String, String)], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(headers.iter().map(|(name, value)| (name, value)))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Vec<(String, String)>, D::Error> {
        struct Pairs;
        impl<'de> Visitor<'de> for Pairs {
            type Value = Vec<(String, String)>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of strings")
            }

            fn visit_unit<E: serde::de::Error>(self) -> Result<Self::Value, E> {
                Ok(Vec::new())
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut pairs = Vec::new();
                while let Some(pair) = map.next_entry()? {
                    pairs.push(pair);
                }
                Ok(pairs)
            }
        }
        deserializer.deserialize_any(Pairs)
    }
}
