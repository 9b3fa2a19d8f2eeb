//! A dead letter's message, for a person.
//! Guarantee: addresses are masked and names left out unless revealed; what is shown is bounded, and what would command the
//! terminal is spelled out, be the body a job, other JSON, other text or no text at all.

use serde_json::{Value, json};

use crate::broker::wire::{self, WireLimits};
use crate::cli::output::harmless;
use crate::cli::story::{counted, fact, masked};
use crate::model::address::{Mailbox, mask_addresses};
use crate::model::job::Job;
use crate::model::text::bounded;

/// Longest text shown, in bytes.
const TEXT_MAX: usize = 16_000;
/// Longest text of a body that is no job, in bytes: one is enough to see what it is.
const STRANGE_MAX: usize = 4_000;
/// Longest string in such a body: an attachment would fill the screen.
const STRING_MAX: usize = 200;

/// A body as far as it could be read.
pub(super) enum Message {
    Job(Box<Job>),
    /// No job, and why.
    Strange {
        why: String,
        text: String,
        bytes: usize,
    },
}

/// Whether addresses are shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Addresses {
    Masked,
    Revealed,
}

impl Message {
    /// Reads a body; the operator's limits may have changed since, so none apply.
    pub(super) fn read(body: &[u8]) -> Self {
        let limits = WireLimits { max_recipients: usize::MAX, max_message_bytes: usize::MAX };
        match wire::parse_job(body, &limits) {
            Ok(job) => Self::Job(Box::new(job)),
            Err(refusal) => Self::Strange {
                why: format!("{}: {}", refusal.reason, refusal.detail),
                text: strange(body),
                bytes: body.len(),
            },
        }
    }

    /// Lines for a terminal.
    pub(super) fn words(&self, addresses: Addresses) -> Vec<String> {
        match self {
            Self::Job(job) => job_words(job, addresses),
            Self::Strange { why, text, bytes } => {
                let mut lines = vec![fact("no job", &masked(why)), String::new()];
                lines.extend(text_lines(text, STRANGE_MAX, addresses));
                if text.len() > STRANGE_MAX {
                    lines.push(format!("({} in all; --raw --reveal writes them)", counted(*bytes, "byte")));
                }
                lines
            }
        }
    }

    /// The same as JSON.
    pub(super) fn json(&self, addresses: Addresses) -> Value {
        match self {
            Self::Job(job) => job_json(job, addresses),
            Self::Strange { why, text, bytes } => json!({
                "fault": mask_addresses(why),
                "body": addresses.text(&bounded(text, STRANGE_MAX)),
                "bytes": bytes,
            }),
        }
    }
}

impl Addresses {
    fn text(self, text: &str) -> String {
        if self == Self::Revealed { text.to_owned() } else { mask_addresses(text) }
    }

    fn mailboxes(self, mailboxes: &[Mailbox]) -> Vec<String> {
        mailboxes.iter().map(|mailbox| self.mailbox(mailbox)).collect()
    }

    fn mailbox(self, mailbox: &Mailbox) -> String {
        match (self, &mailbox.name) {
            (Self::Masked, _) => format!("{mailbox:?}"),
            (Self::Revealed, None) => mailbox.email.as_str().to_owned(),
            (Self::Revealed, Some(name)) => format!("{name} <{}>", mailbox.email.as_str()),
        }
    }
}

/// A body that is no job, as text: JSON without its escapes, or an address could hide in them.
fn strange(body: &[u8]) -> String {
    match (serde_json::from_slice::<Value>(body), str::from_utf8(body)) {
        (Ok(mut value), _) => {
            shorten(&mut value);
            format!("{value:#}")
        }
        (Err(_), Ok(text)) => text.replace("\\u0040", "@"),
        (Err(_), Err(_)) => body.escape_ascii().to_string().replace("\\\\u0040", "@"),
    }
}

fn shorten(value: &mut Value) {
    match value {
        Value::String(text) if text.len() > STRING_MAX => *text = bounded(text, STRING_MAX),
        Value::Array(items) => items.iter_mut().for_each(shorten),
        Value::Object(fields) => fields.values_mut().for_each(shorten),
        _ => {}
    }
}

fn text_lines(text: &str, max: usize, addresses: Addresses) -> Vec<String> {
    // Masked before it is cut: half an address is not recognised as one.
    let shown = bounded(&addresses.text(text), max);
    shown.lines().map(|line| format!("  | {}", harmless(line))).collect()
}

fn job_words(job: &Job, addresses: Addresses) -> Vec<String> {
    let mut lines = Vec::new();
    let mut add = |name: &str, value: String| lines.push(fact(name, &harmless(&value)));
    let lists = [("to", &job.to), ("cc", &job.cc), ("bcc", &job.bcc), ("reply to", &job.reply_to)];
    for (name, list) in lists.into_iter().filter(|(_, list)| !list.is_empty()) {
        add(name, addresses.mailboxes(list).join(", "));
    }
    add("subject", addresses.text(&job.subject));
    for (name, value) in &job.headers {
        add("header", format!("{name}: {}", addresses.text(value)));
    }
    if let Some(calendar) = &job.calendar {
        let size = counted(calendar.content.len(), "byte");
        add(
            "calendar",
            format!("{} {}, {size}", calendar.method.as_str(), addresses.text(&calendar.filename)),
        );
    }
    for file in &job.attachments {
        let (name, size) = (addresses.text(&file.filename), counted(file.content.len(), "byte"));
        add("attachment", format!("{name}, {}, {size}", addresses.text(&file.content_type)));
    }
    if let Some(html) = &job.html {
        add("html", counted(html.len(), "byte"));
    }
    if let Some(text) = job.text.as_ref().or(job.html.as_ref()) {
        lines.push(String::new());
        lines.extend(text_lines(text, TEXT_MAX, addresses));
    }
    lines
}

fn job_json(job: &Job, addresses: Addresses) -> Value {
    let headers: Vec<_> =
        job.headers.iter().map(|(name, value)| json!([name, addresses.text(value)])).collect();
    let attachments: Vec<_> = job
        .attachments
        .iter()
        .map(|file| {
            json!({
                "filename": addresses.text(&file.filename),
                "content_type": addresses.text(&file.content_type),
                "bytes": file.content.len(),
            })
        })
        .collect();
    let calendar = job.calendar.as_ref().map(|calendar| {
        json!({
            "method": calendar.method.as_str(),
            "filename": addresses.text(&calendar.filename),
            "bytes": calendar.content.len(),
        })
    });
    let text = |text: &Option<String>| text.as_ref().map(|text| bounded(&addresses.text(text), TEXT_MAX));
    json!({
        "to": addresses.mailboxes(&job.to),
        "cc": addresses.mailboxes(&job.cc),
        "bcc": addresses.mailboxes(&job.bcc),
        "reply_to": addresses.mailboxes(&job.reply_to),
        "subject": addresses.text(&job.subject),
        "text": text(&job.text),
        "html": text(&job.html),
        "headers": headers,
        "calendar": calendar,
        "attachments": attachments,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::text::is_harmful;

    fn shown(body: &[u8], addresses: Addresses) -> String {
        let message = Message::read(body);
        let lines = message.words(addresses);
        assert!(lines.iter().all(|line| !line.contains(is_harmful)), "{lines:?}");
        lines.join("\n")
    }

    #[test]
    fn a_job_is_told_with_its_addresses_masked() {
        let job = json!({
            "version": 1, "id": "0198c0de-0000-7000-8000-000000000001", "kind": "k",
            "to": ["Ann Lee <ann@example.org>"], "bcc": ["bob@example.org"], "subject": "For ann@example.org",
            "text": "Dear ann@example.org,\n\u{202e}see you", "html": "<p>x</p>",
            "headers": {"X-For": "ann@example.org"},
            "attachments": [{"filename": "a.pdf", "content_type": "application/pdf", "content_base64": "YWJj"}],
        });
        let body = serde_json::to_vec(&job).unwrap();
        let masked = shown(&body, Addresses::Masked);
        for hidden in ["ann@", "bob@", "Ann Lee"] {
            assert!(!masked.contains(hidden), "{hidden}: {masked}");
            assert!(!Message::read(&body).json(Addresses::Masked).to_string().contains(hidden), "{hidden}");
        }
        for seen in
            ["a…@example.org", "b…@example.org", "a.pdf, application/pdf, 3 bytes", "\\u{202e}see you"]
        {
            assert!(masked.contains(seen), "{seen}: {masked}");
        }
        let revealed = shown(&body, Addresses::Revealed);
        assert!(
            revealed.contains("Ann Lee <ann@example.org>") && revealed.contains("bob@example.org"),
            "{revealed}"
        );
    }

    #[test]
    fn a_body_that_is_no_job_is_shown_escaped_and_bounded() {
        for body in [
            &b"{\"to\": \"ann\\u0040example.org\", \"x\": \"\\u001b[2J\"}"[..],
            b"to: ann@example.org \x1b[2J",
            b"{\"to\": \"ann\\u0040example.org\" \x1b[2J",
            b"\xff\xfe ann@example.org \x1b[2J",
            b"\xff {\"to\": \"ann\\u0040example.org\"} \x1b[2J",
            b"",
        ] {
            let masked = shown(body, Addresses::Masked);
            assert!(!masked.contains("ann") && masked.contains("malformed"), "{masked}");
            assert!(body.is_empty() || masked.contains("…@example.org"), "{masked}");
            let revealed = shown(body, Addresses::Revealed);
            assert!(body.is_empty() || revealed.contains("ann@example.org"), "{revealed}");
        }
        let large = [&b"{\"a\": \""[..], &b"x".repeat(1 << 20), b"\"}"].concat();
        assert!(shown(&large, Addresses::Revealed).len() < 1000);
        let noise = vec![0xff; 1 << 20];
        let shown = shown(&noise, Addresses::Masked);
        assert!(shown.len() < 2 * STRANGE_MAX && shown.contains("1048576 bytes in all"), "{}", shown.len());
    }
}
