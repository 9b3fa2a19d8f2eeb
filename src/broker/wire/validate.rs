//! From the JSON shape to the model: every rule of contract section 3 that the shape alone cannot express.
//! Guarantee: a job comes out whole or not at all.

use std::collections::HashSet;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use super::body::{AttachmentBody, CalendarBody, JobBody, MailboxBody};
use super::calendar::{self, Method};
use super::header;
use super::{Fault, VERSION, WireLimits};
use crate::model::address::{EmailAddress, InvalidAddress, Mailbox};
use crate::model::failure::Reason;
use crate::model::job::{Attachment, Calendar, Job, JobKey, Revision};
use crate::model::text;

/// Longest subject, in characters. No mail program shows a tenth of it.
const SUBJECT_MAX: usize = 5000;
/// Longest file name, in characters: what file systems take.
const FILENAME_MAX: usize = 255;
/// Longest content type with its parameters, in bytes.
const CONTENT_TYPE_MAX: usize = 200;
/// Longest content id, in bytes.
const CONTENT_ID_MAX: usize = 200;
/// No attachment's own headers and delimiter are shorter than this, in bytes.
const FILE_HEADERS_MIN: usize = 140;

/// Whether a text is a kind: 1 to 64 of `[a-z0-9._-]`.
pub fn is_slug(text: &str) -> bool {
    let allowed =
        |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'.' | b'_' | b'-');
    (1..=64).contains(&text.len()) && text.bytes().all(allowed)
}

/// Judges the values of a body whose shape is right.
pub(super) fn job(body: JobBody, body_hash: [u8; 32], limits: &WireLimits) -> Result<Job, Fault> {
    if body.version != VERSION {
        return Err(Fault::unsupported(body.version));
    }
    if !is_slug(&body.kind) {
        return Err(Fault::malformed("kind: must be 1 to 64 characters of a-z, 0-9, `.`, `_` and `-`"));
    }
    recipient_count(&body, limits.max_recipients)?;
    if body.text.is_none() && body.html.is_none() {
        return Err(Fault::malformed("text, html: at least one of the two must be given"));
    }
    let job = Job {
        key: JobKey { organization: body.organization_id, id: body.id },
        body_hash,
        kind: body.kind,
        to: mailboxes("to", body.to)?,
        cc: mailboxes("cc", body.cc)?,
        bcc: mailboxes("bcc", body.bcc)?,
        reply_to: mailboxes("reply_to", body.reply_to)?,
        subject: subject(&body.subject)?,
        text: body.text.map(without_controls),
        html: body.html.map(without_controls),
        calendar: body.calendar.map(calendar).transpose()?,
        attachments: attachments(body.attachments)?,
        headers: header::headers(body.headers)?,
        expires_at: body.expires_at,
        group: revision(body.group, body.sequence)?,
        on_unknown: body.on_unknown,
    };
    size(&job, limits.max_message_bytes)?;
    Ok(job)
}

fn recipient_count(body: &JobBody, max: usize) -> Result<(), Fault> {
    if body.reply_to.len() > max {
        let count = body.reply_to.len();
        return Err(Fault::malformed(format!(
            "reply_to: {count} mailboxes are given, at most {max} allowed"
        )));
    }
    match body.to.len() + body.cc.len() + body.bcc.len() {
        0 => Err(Fault::malformed("to, cc, bcc: at least one recipient must be given")),
        count if count > max => {
            Err(Fault::malformed(format!("to, cc, bcc: {count} recipients are given, at most {max} allowed")))
        }
        _ => Ok(()),
    }
}

fn mailboxes(field: &str, list: Vec<MailboxBody>) -> Result<Vec<Mailbox>, Fault> {
    let judge = |(index, body)| {
        mailbox(body).map_err(|(part, fault)| Fault::malformed(format!("{field}[{index}]{part}: {fault}")))
    };
    list.into_iter().enumerate().map(judge).collect()
}

fn mailbox(body: MailboxBody) -> Result<Mailbox, (&'static str, InvalidAddress)> {
    match body {
        MailboxBody::Text(text) => Mailbox::parse(&text).map_err(|fault| ("", fault)),
        MailboxBody::Full { email, name } => {
            let email = EmailAddress::parse(email.trim_matches(' ')).map_err(|fault| (".email", fault))?;
            match name {
                Some(name) => Mailbox::named(&name, email).map_err(|fault| (".name", fault)),
                None => Ok(Mailbox::bare(email)),
            }
        }
    }
}

fn subject(given: &str) -> Result<String, Fault> {
    let subject = text::single_line(given);
    if subject.chars().count() > SUBJECT_MAX {
        return Err(Fault::malformed(format!("subject: is longer than {SUBJECT_MAX} characters")));
    }
    Ok(subject)
}

/// Drops C0 controls and DEL, except TAB, CR and LF: RFC 5321 section 4.5.2 forbids some, mail programs mangle the rest.
fn without_controls(mut text: String) -> String {
    let is_dropped = |byte: u8| byte.is_ascii_control() && !matches!(byte, b'\t' | b'\r' | b'\n');
    if text.bytes().any(is_dropped) {
        text.retain(|c| !u8::try_from(c).is_ok_and(is_dropped));
    }
    text
}

fn calendar(body: CalendarBody) -> Result<Calendar, Fault> {
    let content = without_controls(body.content);
    let expected = body.method.as_str();
    match calendar::method(&content) {
        Method::NotACalendar => {
            return Err(Fault::malformed("calendar.content: must begin with BEGIN:VCALENDAR"));
        }
        Method::Missing => {
            return Err(Fault::malformed(format!(
                "calendar.content: has no METHOD; it must have METHOD:{expected}"
            )));
        }
        Method::Repeated => return Err(Fault::malformed("calendar.content: has METHOD more than once")),
        Method::Is(method) if !method.eq_ignore_ascii_case(expected) => {
            return Err(Fault::malformed(format!(
                "calendar.method: is {expected}, but the content has another METHOD; both must be the same"
            )));
        }
        Method::Is(_) => {}
    }
    let filename = match body.filename {
        Some(filename) => file_name("calendar.filename", &filename)?,
        None => "invite.ics".to_owned(),
    };
    Ok(Calendar { method: body.method, content, filename })
}

fn file_name(path: &str, given: &str) -> Result<String, Fault> {
    let filename = text::single_line(given);
    if filename.is_empty() || filename.chars().count() > FILENAME_MAX {
        return Err(Fault::malformed(format!("{path}: must be 1 to {FILENAME_MAX} characters")));
    }
    Ok(filename)
}

fn attachments(list: Vec<AttachmentBody>) -> Result<Vec<Attachment>, Fault> {
    let mut attachments: Vec<Attachment> = Vec::with_capacity(list.len());
    for (index, body) in list.into_iter().enumerate() {
        let path = |field: &str| format!("attachments[{index}].{field}");
        let refuse = |field: &str, fault: &str| Fault::malformed(format!("{}: {fault}", path(field)));
        let filename = file_name(&path("filename"), &body.filename)?;
        content_type(&body.content_type).map_err(|fault| refuse("content_type", fault))?;
        if let Some(id) = &body.content_id {
            content_id(id).map_err(|fault| refuse("content_id", fault))?;
        }
        let content = decoded(body.content_base64).map_err(|fault| refuse("content_base64", &fault))?;
        attachments.push(Attachment {
            filename,
            content_type: body.content_type,
            content,
            content_id: body.content_id,
        });
    }
    unique_content_ids(&attachments)?;
    Ok(attachments)
}

fn unique_content_ids(attachments: &[Attachment]) -> Result<(), Fault> {
    let mut seen = HashSet::new();
    for (index, attachment) in attachments.iter().enumerate() {
        if attachment.content_id.as_ref().is_some_and(|id| !seen.insert(id)) {
            let fault = "is the same as another attachment's; each must be unique";
            return Err(Fault::malformed(format!("attachments[{index}].content_id: {fault}")));
        }
    }
    Ok(())
}

fn decoded(mut encoded: String) -> Result<Vec<u8>, String> {
    if encoded.bytes().any(|byte| matches!(byte, b'\r' | b'\n')) {
        encoded.retain(|c| !matches!(c, '\r' | '\n'));
    }
    STANDARD.decode(&encoded).map_err(|error| {
        let at = match error {
            base64::DecodeError::InvalidByte(at, _) | base64::DecodeError::InvalidLastSymbol(at, _) => {
                format!(" (at character {at}, line breaks not counted)")
            }
            base64::DecodeError::InvalidLength(_) => " (its length)".to_owned(),
            base64::DecodeError::InvalidPadding => " (its padding)".to_owned(),
        };
        format!("is not base64{at}; allowed is the standard alphabet with padding, and line breaks")
    })
}

fn is_token(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_graphic() && !b"()<>@,;:\\\"/[]?=".contains(&b))
}

/// RFC 2045 section 5.1: `type/subtype` and parameters.
fn content_type(text: &str) -> Result<(), &'static str> {
    if text.len() > CONTENT_TYPE_MAX {
        return Err("is longer than 200 bytes");
    }
    let (essence, mut parameters) = match text.split_once(';') {
        Some((essence, parameters)) => (essence.trim_end_matches(' '), Some(parameters)),
        None => (text, None),
    };
    let (main, sub) = essence.split_once('/').unwrap_or((essence, ""));
    if !is_token(main) || !is_token(sub) {
        return Err("must be a type/subtype, say application/pdf");
    }
    if main.eq_ignore_ascii_case("multipart") {
        return Err("must not be multipart/*: give each file as an attachment of its own");
    }
    // RFC 2046 section 5.2: such a part may not be base64, which is what carries an attachment.
    if main.eq_ignore_ascii_case("message") {
        return Err("must not be message/*: attach a message as application/octet-stream");
    }
    while let Some(rest) = parameters {
        parameters = parameter(rest)?;
    }
    Ok(())
}

/// Judges one `name=value` and returns what follows its semicolon.
fn parameter(text: &str) -> Result<Option<&str>, &'static str> {
    const FORM: &str = "has a parameter that is not name=value or name=\"value\" in ASCII";
    let (name, rest) = text.split_once('=').ok_or(FORM)?;
    let name = name.trim_matches(' ');
    if !is_token(name) {
        return Err(FORM);
    }
    if name.to_ascii_lowercase().starts_with("name") {
        return Err("must not have the parameter `name`: that is what `filename` is for");
    }
    let (value_is_fine, rest) = match rest.strip_prefix('"') {
        Some(quoted) => {
            let (value, rest) = quoted.split_once('"').ok_or(FORM)?;
            (value.bytes().all(|b| matches!(b, b' '..=b'~') && b != b'\\'), rest)
        }
        None => {
            let end = rest.find([';', ' ']).unwrap_or(rest.len());
            (is_token(&rest[..end]), &rest[end..])
        }
    };
    match rest.trim_start_matches(' ') {
        _ if !value_is_fine => Err(FORM),
        "" => Ok(None),
        rest => rest.strip_prefix(';').map(Some).ok_or(FORM),
    }
}

/// The characters of an atom, and `.` and `@`: what every reader of a `cid:` URL (RFC 2392) takes as it is.
fn content_id(id: &str) -> Result<(), &'static str> {
    let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-/=?^_`{|}~.@".contains(&byte);
    if id.starts_with('<') || id.ends_with('>') {
        Err("must be given without angle brackets")
    } else if !(1..=CONTENT_ID_MAX).contains(&id.len()) || !id.bytes().all(is_allowed) {
        Err("must be 1 to 200 characters of A-Z, a-z, 0-9 and !#$%&'*+-/=?^_`{|}~.@")
    } else {
        Ok(())
    }
}

fn revision(group: Option<String>, sequence: Option<i64>) -> Result<Option<Revision>, Fault> {
    let (group, sequence) = match (group, sequence) {
        (Some(group), Some(sequence)) => (group, sequence),
        (None, None) => return Ok(None),
        (Some(_), None) => return Err(Fault::malformed("sequence: must be given together with group")),
        (None, Some(_)) => return Err(Fault::malformed("group: must be given together with sequence")),
    };
    if !Revision::is_group(&group) {
        return Err(Fault::malformed(format!(
            "group: must be 1 to {} characters without control characters",
            Revision::GROUP_MAX
        )));
    }
    if sequence < 0 {
        return Err(Fault::malformed("sequence: must be an integer of at least 0"));
    }
    Ok(Some(Revision { group, sequence }))
}

/// Refuses what no composition can bring under the limit: the calendar is carried twice, and files grow by a third and
/// have headers of their own.
fn size(job: &Job, max: usize) -> Result<(), Fault> {
    let length = |text: &Option<String>| text.as_ref().map_or(0, String::len);
    let calendar = job.calendar.as_ref().map_or(0, |calendar| calendar.content.len() * 2);
    let files: usize =
        job.attachments.iter().map(|file| FILE_HEADERS_MIN + file.content.len().div_ceil(3) * 4).sum();
    let least = length(&job.text) + length(&job.html) + calendar + files;
    if least > max {
        return Err(Fault {
            reason: Reason::TooLarge,
            detail: format!("the message has at least {least} bytes, at most {max} are allowed"),
        });
    }
    Ok(())
}
