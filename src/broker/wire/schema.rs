//! The job as a JSON Schema, for publishers.
//! Guarantee: no job that the reader takes is refused by the schema, lengths aside, which it counts before control characters
//! are dropped; what it cannot express stands in a description.

use serde_json::{Value, json};

use super::validate::{CONTENT_ID_MAX, CONTENT_TYPE_MAX, FILENAME_MAX, KIND_MAX, SUBJECT_MAX};
use super::{VERSION, WireLimits, calendar, header};
use crate::model::address::{ADDRESS_MAX, NAME_MAX};
use crate::model::job::{CalendarMethod, OnUnknown, Revision};
use crate::model::schema::{
    DIALECT, NO_CONTROLS, any_case, definition, or_null, organization_id, time, uuid,
};

/// The document's name.
pub const SCHEMA_ID: &str = "urn:sendoff:schema:job:1";

/// RFC 2045 section 5.1: the characters of a token.
const TOKEN: &str = r"[!#$%&'*+.^_`{|}~0-9A-Za-z-]+";

/// The schema of a published body under these limits.
pub fn job_schema(limits: &WireLimits) -> Value {
    json!({
        "$schema": DIALECT,
        "$id": SCHEMA_ID,
        "title": "Sendoff job, version 1",
        "description": format!(
            "Published to the jobs exchange under a routing key that a lane takes, say notification.booking_confirmed. Unknown \
             and repeated fields are refused; null stands for an absent value wherever a field may be left out. Not \
             expressed here: at most {} recipients in all, at most {} bytes for the composed message, a calendar's method \
             equal to its content's METHOD, a content_id used once.",
            limits.max_recipients, limits.max_message_bytes
        ),
        "type": "object",
        "properties": properties(limits),
        "required": ["version", "id", "kind", "subject"],
        "additionalProperties": false,
        "allOf": [
            {"description": "At least one recipient.", "anyOf": [has_some("to"), has_some("cc"), has_some("bcc")]},
            {"description": "Text, HTML, or both.", "anyOf": [is_text("text"), is_text("html")]},
            {"description": "group and sequence: both or neither.", "anyOf": [
                {"required": ["group", "sequence"],
                 "properties": {"group": {"type": "string"}, "sequence": {"type": "integer"}}},
                {"properties": {"group": {"type": "null"}, "sequence": {"type": "null"}}},
            ]},
        ],
        "$defs": {
            "OrganizationId": organization_id(),
            "Mailbox": mailbox(),
            "Calendar": calendar_object(),
            "Attachment": attachment(),
        },
        "examples": [{
            "version": VERSION,
            "id": "0198c0de-0000-7000-8000-000000000001",
            "organization_id": 42,
            "kind": "booking.confirmed",
            "to": ["Ann Lee <ann@example.org>"],
            "subject": "Your booking is confirmed",
            "text": "See you on Monday.",
            "expires_at": "2030-01-07T09:00:00Z",
            "group": "booking-1729@example.org",
            "sequence": 0,
        }],
    })
}

fn properties(limits: &WireLimits) -> Value {
    json!({
        "version": {"description": "The version of this schema.", "type": "integer", "const": VERSION},
        "id": described(
            "The idempotency key within the organization: the same id is sent once, however often it is published. Version 7 \
             recommended.",
            uuid(),
        ),
        "organization_id": described(
            "Through whose server it leaves; without it, through the platform's.",
            or_null(&definition("OrganizationId")),
        ),
        "kind": {
            "description": "What kind of mail it is, for filters and events.",
            "type": "string", "pattern": format!("^[a-z0-9._-]{{1,{KIND_MAX}}}$"), "examples": ["booking.confirmed"],
        },
        "to": mailboxes("Recipients in To.", limits),
        "cc": mailboxes("Recipients in Cc.", limits),
        "bcc": mailboxes("Recipients that the message does not show.", limits),
        "reply_to": mailboxes("Where answers go.", limits),
        "subject": {
            "description": "Control characters become a space.", "type": "string", "maxLength": SUBJECT_MAX,
        },
        "text": {"description": "The plain text.", "type": ["string", "null"]},
        "html": {"description": "The HTML.", "type": ["string", "null"]},
        "calendar": described("An invitation, a cancellation or an answer.", or_null(&definition("Calendar"))),
        "attachments": {
            "description": "Files, and images that the HTML shows.",
            "type": ["array", "null"], "items": definition("Attachment"),
        },
        "headers": headers(),
        "expires_at": described(
            "RFC 3339. Past it nothing is sent, not on a retry and not on a replay.",
            or_null(&time()),
        ),
        "group": {
            "description": "The booking's UID. Without control characters.",
            "type": ["string", "null"], "pattern": NO_CONTROLS, "minLength": 1, "maxLength": Revision::GROUP_MAX,
        },
        "sequence": {
            "description": "The booking's revision: a job whose group has a higher one already is not sent.",
            "type": ["integer", "null"], "minimum": 0, "maximum": i64::MAX,
        },
        "on_unknown": {
            "description": "When it cannot be known whether the message was accepted: send it again, once, or hold it for a person \
                to decide.",
            "enum": [OnUnknown::Resend, OnUnknown::Hold, null], "default": OnUnknown::default(),
        },
    })
}

fn mailboxes(description: &str, limits: &WireLimits) -> Value {
    json!({
        "description": description,
        "type": ["array", "null"], "items": definition("Mailbox"), "maxItems": limits.max_recipients,
    })
}

fn mailbox() -> Value {
    json!({
        "description": "An address with or without a name. The domain is a host name with at least one dot.",
        "anyOf": [
            {
                "type": "string", "pattern": "@", "minLength": 3,
                "examples": ["ann@example.org", "Ann Lee <ann@example.org>"],
            },
            {
                "type": "object",
                "properties": {
                    "email": {
                        "type": "string", "maxLength": ADDRESS_MAX,
                        "pattern": r"^[^\x00-\x1f\x7f]+@[^\x00-\x1f\x7f@]+$",
                    },
                    "name": {"type": ["string", "null"], "maxLength": NAME_MAX},
                },
                "required": ["email"],
                "additionalProperties": false,
            },
        ],
    })
}

fn calendar_object() -> Value {
    use CalendarMethod::{Cancel, Publish, Reply, Request};
    json!({
        "description": "An iCalendar object (RFC 5545), carried so that mail programs show accept and decline.",
        "type": "object",
        "properties": {
            "method": {"description": "Equal to the content's own METHOD.", "enum": [Request, Cancel, Reply, Publish]},
            "content": {"type": "string", "pattern": format!("^{}", any_case(calendar::FIRST_LINE))},
            "filename": {
                "description": "invite.ics unless given.",
                "type": ["string", "null"], "minLength": 1, "maxLength": FILENAME_MAX,
            },
        },
        "required": ["method", "content"],
        "additionalProperties": false,
    })
}

fn attachment() -> Value {
    let carrier = format!("^({}|{})/", any_case("multipart"), any_case("message"));
    json!({
        "description": "A file; with a content_id, an image that the HTML shows as cid:….",
        "type": "object",
        "properties": {
            "filename": {"type": "string", "minLength": 1, "maxLength": FILENAME_MAX},
            "content_type": {
                "description": "type/subtype, perhaps with parameters other than name; not multipart/* or message/*.",
                "type": "string", "maxLength": CONTENT_TYPE_MAX,
                "pattern": format!("^{TOKEN}/{TOKEN}( *;[ -~]+)?$"), "not": {"pattern": carrier},
                "examples": ["application/pdf"],
            },
            "content_base64": {
                "description": "RFC 4648 section 4, padded; line breaks are allowed.",
                "type": "string", "contentEncoding": "base64", "pattern": r"^[A-Za-z0-9+/\r\n]*={0,2}[\r\n]*$",
            },
            "content_id": {
                "description": "Without angle brackets.",
                "type": ["string", "null"],
                "pattern": format!("^[A-Za-z0-9!#$%&'*+/=?^_`{{|}}~.@-]{{1,{CONTENT_ID_MAX}}}$"),
            },
        },
        "required": ["filename", "content_type", "content_base64"],
        "additionalProperties": false,
    })
}

fn headers() -> Value {
    let alternatives = |names: &[&str], rest: &str| {
        let names: Vec<_> = names.iter().map(|name| any_case(name)).collect();
        format!("({}){rest}", names.join("|"))
    };
    let allowed =
        format!("^({}|{})$", alternatives(&header::PREFIXES, "[!-9;-~]+"), alternatives(&header::EXACT, ""));
    json!({
        "description": "Further headers of the message, none twice. Headers that command a mail provider are refused.",
        "type": ["object", "null"],
        "maxProperties": header::HEADERS_MAX,
        "propertyNames": {
            "pattern": allowed,
            "maxLength": header::NAME_MAX,
            "not": {"pattern": format!("^{}", alternatives(&header::COMMANDS, ""))},
        },
        "additionalProperties": {"type": "string", "minLength": 1, "maxLength": header::VALUE_MAX},
    })
}

fn has_some(field: &str) -> Value {
    json!({"required": [field], "properties": {field: {"type": "array", "minItems": 1}}})
}

fn is_text(field: &str) -> Value {
    json!({"required": [field], "properties": {field: {"type": "string"}}})
}

fn described(description: &str, mut schema: Value) -> Value {
    schema["description"] = json!(description);
    schema
}
