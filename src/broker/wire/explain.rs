//! The tolerant look at a body: what it tells of its job whatever else is wrong with it, and which field is wrong.
//! Guarantee: it streams, so a hostile body costs no more memory than its longest string; it repeats names, never values.

use std::fmt;

use serde::Deserializer;
use serde::de::{DeserializeSeed, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use uuid::Uuid;

use super::{Fault, Refusal, Told, VERSION, validate};
use crate::model::address::mask_addresses;
use crate::model::job::{JobKey, Revision};
use crate::model::organization::OrganizationId;
use crate::model::text;

/// Longest part of a publisher's own name (a field, a header) that a detail repeats, in bytes.
const NAME_SHOWN_MAX: usize = 60;

enum Shape {
    Version,
    Id,
    Organization,
    Kind,
    Text,
    Group,
    Sequence,
    Time,
    OneOf(&'static [&'static str]),
    Mailbox,
    Texts,
    List(&'static Shape),
    Object(&'static [Field]),
}

struct Field {
    name: &'static str,
    required: bool,
    shape: Shape,
}

const fn required(name: &'static str, shape: Shape) -> Field {
    Field { name, required: true, shape }
}

const fn optional(name: &'static str, shape: Shape) -> Field {
    Field { name, required: false, shape }
}

static MAILBOX: [Field; 2] = [required("email", Shape::Text), optional("name", Shape::Text)];
static CALENDAR: [Field; 3] = [
    required("method", Shape::OneOf(&["REQUEST", "CANCEL", "REPLY", "PUBLISH"])),
    required("content", Shape::Text),
    optional("filename", Shape::Text),
];
static ATTACHMENT: [Field; 4] = [
    required("filename", Shape::Text),
    required("content_type", Shape::Text),
    required("content_base64", Shape::Text),
    optional("content_id", Shape::Text),
];
static JOB: Shape = Shape::Object(&[
    required("version", Shape::Version),
    required("id", Shape::Id),
    optional("organization_id", Shape::Organization),
    required("kind", Shape::Kind),
    optional("to", Shape::List(&Shape::Mailbox)),
    optional("cc", Shape::List(&Shape::Mailbox)),
    optional("bcc", Shape::List(&Shape::Mailbox)),
    optional("reply_to", Shape::List(&Shape::Mailbox)),
    required("subject", Shape::Text),
    optional("text", Shape::Text),
    optional("html", Shape::Text),
    optional("calendar", Shape::Object(&CALENDAR)),
    optional("attachments", Shape::List(&Shape::Object(&ATTACHMENT))),
    optional("headers", Shape::Texts),
    optional("expires_at", Shape::Time),
    optional("group", Shape::Group),
    optional("sequence", Shape::Sequence),
    optional("on_unknown", Shape::OneOf(&["resend", "hold"])),
]);

impl Shape {
    fn allowed(&self) -> String {
        match self {
            Self::Version => format!("the integer {VERSION}"),
            Self::Id => "a UUID in a string".into(),
            Self::Organization => {
                "an integer, a string of 1 to 64 characters of A-Z, a-z, 0-9, `_` and `-`, or null".into()
            }
            Self::Kind | Self::Text | Self::Group => "a string".into(),
            Self::Sequence => "an integer from 0 to 9223372036854775807".into(),
            Self::Time => "an RFC 3339 time in a string, say 2026-01-31T12:00:00Z".into(),
            Self::OneOf(names) => format!("one of {}", names.join(", ")),
            Self::Mailbox => {
                "a mailbox: \"a@b.c\", \"Name <a@b.c>\" or {\"email\": \"a@b.c\", \"name\": \"Name\"}".into()
            }
            Self::Texts => "an object whose values are strings".into(),
            Self::List(_) => "an array".into(),
            Self::Object(_) => "an object".into(),
        }
    }
}

/// Says what is wrong with a body that did not parse; `error` is what the parser said.
pub(super) fn explain(body: &[u8], error: &serde_json::Error) -> Refusal {
    let watch = match look(body) {
        Ok(watch) => watch,
        Err(fault) => return fault.into_refusal(Told::default()),
    };
    let fault = match (watch.version, &watch.complaint) {
        (Some(version), _) if version != VERSION => Fault::unsupported(version),
        (_, Some(complaint)) => Fault::malformed(complaint),
        (_, None) => Fault::malformed(format!(
            "the body does not have the shape of a version {VERSION} job (line {} column {})",
            error.line(),
            error.column()
        )),
    };
    fault.into_refusal(watch.into_told())
}

/// What a body tells of its job; nothing where it is no JSON.
pub(super) fn tell(body: &[u8]) -> Told {
    look(body).map(Watch::into_told).unwrap_or_default()
}

fn look(body: &[u8]) -> Result<Watch, Fault> {
    if let Err(error) = std::str::from_utf8(body) {
        let at = error.valid_up_to();
        return Err(Fault::malformed(format!("the body is not UTF-8: bad byte at offset {at}")));
    }
    let mut watch = Watch::default();
    let mut deserializer = serde_json::Deserializer::from_slice(body);
    let look = Look { shape: &JOB, may_be_null: false, watch: &mut watch };
    let read = look.deserialize(&mut deserializer).and_then(|()| deserializer.end());
    read.map_err(|error| Fault::malformed(format!("the body is not JSON: {error}")))?;
    Ok(watch)
}

#[derive(Default)]
enum Owner {
    #[default]
    Platform,
    Organization(OrganizationId),
    Unreadable,
}

/// What has been seen on the way: the path so far, the first complaint, and whose job it is.
#[derive(Default)]
struct Watch {
    path: String,
    complaint: Option<String>,
    version: Option<i64>,
    id: Option<Uuid>,
    organization: Owner,
    kind: Option<String>,
    expires_at: Option<OffsetDateTime>,
    group: Option<String>,
    sequence: Option<i64>,
}

impl Watch {
    fn into_told(self) -> Told {
        let key = match (self.id, self.organization) {
            (Some(id), Owner::Platform) => Some(JobKey { organization: None, id }),
            (Some(id), Owner::Organization(organization)) => {
                Some(JobKey { organization: Some(organization), id })
            }
            (None, _) | (_, Owner::Unreadable) => None,
        };
        let revision = self.group.zip(self.sequence).map(|(group, sequence)| Revision { group, sequence });
        Told { id: self.id, key, kind: self.kind, expires_at: self.expires_at, revision }
    }

    fn complain(&mut self, fault: impl fmt::Display) {
        if self.complaint.is_none() {
            let place = if self.path.is_empty() { "the body" } else { &self.path };
            self.complaint = Some(format!("{place}: {fault}"));
        }
    }

    fn inside<T>(&mut self, step: &str, look: impl FnOnce(&mut Self) -> T) -> T {
        let length = self.path.len();
        if length > 0 && !step.starts_with('[') {
            self.path.push('.');
        }
        self.path.push_str(step);
        let result = look(self);
        self.path.truncate(length);
        result
    }
}

/// A publisher's name for something, fit to be repeated.
pub(super) fn shown(name: &str) -> String {
    mask_addresses(&text::bounded(&text::single_line(name), NAME_SHOWN_MAX))
}

struct Look<'w> {
    shape: &'static Shape,
    may_be_null: bool,
    watch: &'w mut Watch,
}

impl Look<'_> {
    fn wrong(self, found: &str) {
        if matches!(self.shape, Shape::Organization) {
            self.watch.organization = Owner::Unreadable;
        }
        self.watch.complain(format_args!("must be {}, not {found}", self.shape.allowed()));
    }

    fn integer(self, number: Option<i64>) {
        match (self.shape, number) {
            (Shape::Version, Some(number)) => {
                self.watch.version = Some(number);
                if number != VERSION {
                    self.watch.complain(format_args!("must be {VERSION}"));
                }
            }
            (Shape::Organization, Some(number)) => {
                self.watch.organization = Owner::Organization(OrganizationId::from_integer(number));
            }
            (Shape::Sequence, Some(number)) => self.watch.sequence = (number >= 0).then_some(number),
            (_, Some(_)) => self.wrong("an integer"),
            (_, None) => self.wrong("an integer out of range"),
        }
    }

    fn text(self, text: &str) {
        let fits = match self.shape {
            Shape::Text | Shape::Mailbox => true,
            Shape::Kind => {
                self.watch.kind = validate::is_slug(text).then(|| text.to_owned());
                true
            }
            Shape::Id => {
                self.watch.id = Uuid::parse_str(text).ok();
                self.watch.id.is_some()
            }
            Shape::Organization => match OrganizationId::parse(text) {
                Ok(organization) => {
                    self.watch.organization = Owner::Organization(organization);
                    true
                }
                Err(_) => false,
            },
            Shape::Group => {
                self.watch.group = Revision::is_group(text).then(|| text.to_owned());
                true
            }
            Shape::Time => {
                self.watch.expires_at = OffsetDateTime::parse(text, &Rfc3339).ok();
                self.watch.expires_at.is_some()
            }
            Shape::OneOf(names) => names.contains(&text),
            _ => return self.wrong("a string"),
        };
        if !fits {
            self.wrong("this string");
        }
    }

    fn object<'de, A: MapAccess<'de>>(self, fields: &'static [Field], mut map: A) -> Result<(), A::Error> {
        let mut seen = vec![false; fields.len()];
        while let Some(name) = map.next_key::<String>()? {
            let Some(index) = fields.iter().position(|field| field.name == name) else {
                self.watch.complain(format_args!(
                    "unknown field `{}`; {}",
                    shown(&name),
                    hint(&name, fields)
                ));
                map.next_value::<IgnoredAny>()?;
                continue;
            };
            let field = &fields[index];
            self.watch.inside(field.name, |watch| {
                if std::mem::replace(&mut seen[index], true) {
                    watch.complain("is given twice");
                }
                map.next_value_seed(Look { shape: &field.shape, may_be_null: !field.required, watch })
            })?;
        }
        for (field, _) in fields.iter().zip(seen).filter(|(field, seen)| field.required && !seen) {
            let allowed = field.shape.allowed();
            self.watch
                .inside(field.name, |watch| watch.complain(format_args!("is missing; it must be {allowed}")));
        }
        Ok(())
    }
}

fn hint(name: &str, fields: &[Field]) -> String {
    let lower = text::bounded(name, NAME_SHOWN_MAX).to_lowercase();
    let distance = |field: &&Field| strsim::damerau_levenshtein(&lower, field.name);
    match fields.iter().min_by_key(distance).filter(|field| distance(field) <= 1 + field.name.len() / 3) {
        Some(nearest) => format!("did you mean `{}`?", nearest.name),
        None => {
            let names: Vec<&str> = fields.iter().map(|field| field.name).collect();
            format!("known are {}", names.join(", "))
        }
    }
}

impl<'de> DeserializeSeed<'de> for Look<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Look<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_bool<E: Error>(self, _: bool) -> Result<(), E> {
        self.wrong("a boolean");
        Ok(())
    }

    fn visit_i64<E: Error>(self, number: i64) -> Result<(), E> {
        self.integer(Some(number));
        Ok(())
    }

    fn visit_u64<E: Error>(self, number: u64) -> Result<(), E> {
        self.integer(i64::try_from(number).ok());
        Ok(())
    }

    fn visit_f64<E: Error>(self, _: f64) -> Result<(), E> {
        self.wrong("a number with a fraction or an exponent, or out of range");
        Ok(())
    }

    fn visit_unit<E: Error>(self) -> Result<(), E> {
        if !self.may_be_null {
            self.wrong("null");
        }
        Ok(())
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<(), E> {
        self.text(text);
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        let Shape::List(shape) = self.shape else {
            self.wrong("an array");
            while seq.next_element::<IgnoredAny>()?.is_some() {}
            return Ok(());
        };
        for index in 0_usize.. {
            let step = format!("[{index}]");
            let next = self
                .watch
                .inside(&step, |watch| seq.next_element_seed(Look { shape, may_be_null: false, watch }))?;
            if next.is_none() {
                break;
            }
        }
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        match self.shape {
            Shape::Object(fields) => self.object(fields, map),
            Shape::Mailbox => self.object(&MAILBOX, map),
            Shape::Texts => {
                while let Some(name) = map.next_key::<String>()? {
                    self.watch.inside(&shown(&name), |watch| {
                        map.next_value_seed(Look { shape: &Shape::Text, may_be_null: false, watch })
                    })?;
                }
                Ok(())
            }
            _ => {
                self.wrong("an object");
                while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
                Ok(())
            }
        }
    }
}
