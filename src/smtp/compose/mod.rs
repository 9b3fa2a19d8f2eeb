//! A job and its sender as an RFC 5322 message.
//! Guarantee: the same input gives the same bytes; lines end with CRLF and have at most 998 bytes; every byte is 7-bit
//! unless an address itself is not ([`needs_smtputf8`]); no bare CR or LF; no Bcc. Dots are the transport's to stuff.

mod body;
mod header;
#[cfg(test)]
mod tests;

use std::fmt::Write as _;

use sha2::{Digest, Sha256};
use time::format_description::BorrowedFormatItem;
use time::macros::format_description;
use time::{OffsetDateTime, UtcOffset};
use uuid::Uuid;

use crate::model::address::{EmailAddress, Mailbox};
use crate::model::job::{Attachment, Calendar, Job};
use body::Encoding;
use header::Header;

/// RFC 5322 section 3.3, in UTC.
const DATE: &[BorrowedFormatItem<'_>] = format_description!(
    "[weekday repr:short], [day] [month repr:short] [year] [hour]:[minute]:[second] +0000"
);

/// Why there is no message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ComposeError {
    /// Longer than `limits.max_message_bytes`.
    #[error("the message has {size} bytes, at most {limit} are allowed")]
    TooLarge {
        /// The composed message, in bytes.
        size: usize,
        /// What is allowed.
        limit: usize,
    },
}

/// The Message-ID of a job's first attempt, with angle brackets; the ledger keeps it for all later ones.
pub fn message_id(id: Uuid, from: &EmailAddress) -> String {
    format!("<{id}@{}>", from.domain())
}

/// Whether an address in the envelope or in a header is not ASCII, so that the server must offer SMTPUTF8 (RFC 6531).
/// Only then does the message hold bytes over 127, in those addresses (RFC 6532).
pub fn needs_smtputf8(job: &Job, from: &Mailbox) -> bool {
    let shown = job.reply_to.iter().map(|mailbox| &mailbox.email);
    from.email.needs_smtputf8() || job.recipients().chain(shown).any(EmailAddress::needs_smtputf8)
}

/// Composes the message; it ends with CRLF. `message_id` has its angle brackets.
///
/// Everything that is not given stays out: no text is derived from the HTML. An invitation is the last alternative, and
/// a file beside it (contract section 3). Line ends become CRLF, which is the canonical form of mail and of iCalendar.
///
/// # Errors
/// When the message is longer than `max_bytes`.
pub fn compose(
    job: &Job,
    from: &Mailbox,
    message_id: &str,
    date: OffsetDateTime,
    max_bytes: usize,
) -> Result<Vec<u8>, ComposeError> {
    let mut composer =
        Composer { out: Vec::with_capacity(estimate(job)), job, unique: unique(job, message_id) };
    composer.headers(from, message_id, date);
    composer.content();
    if !composer.out.ends_with(b"\r\n") {
        composer.out.extend_from_slice(b"\r\n");
    }
    match composer.out.len() {
        size if size > max_bytes => Err(ComposeError::TooLarge { size, limit: max_bytes }),
        _ => Ok(composer.out),
    }
}

/// Roughly the size to come, rather too much, so that the buffer is allocated once.
fn estimate(job: &Job) -> usize {
    let length = |text: &Option<String>| text.as_ref().map_or(0, |text| text.len() + text.len() / 2);
    let calendar = job.calendar.as_ref().map_or(0, |calendar| calendar.content.len() * 3);
    let files: usize =
        job.attachments.iter().map(|file| file.content.len() / 7 * 10 + file.filename.len() * 6 + 512).sum();
    let addresses = (job.to.len() + job.cc.len() + job.reply_to.len()) * 80;
    let headers: usize = job.headers.iter().map(|(name, value)| name.len() + value.len() + 16).sum();
    3072 + length(&job.text)
        + length(&job.html)
        + calendar
        + files
        + addresses
        + headers
        + job.subject.len() * 2
}

/// What makes the boundaries unique: no text can hold a line with a hash of itself.
fn unique(job: &Job, message_id: &str) -> String {
    let hash = Sha256::new().chain_update(message_id).chain_update(job.body_hash).finalize();
    hash[..12].iter().fold(String::with_capacity(24), |mut hex, byte| {
        let _ = write!(hex, "{byte:02x}");
        hex
    })
}

/// Only HTML can show an image by its content id.
fn is_inline(job: &Job, file: &Attachment) -> bool {
    file.content_id.is_some() && job.html.is_some()
}

/// The multipart levels, each used only when there is something for it.
#[derive(Clone, Copy)]
enum Level {
    Mixed,
    Related,
    Alternative,
}

impl Level {
    fn subtype(self) -> &'static str {
        match self {
            Self::Mixed => "mixed",
            Self::Related => "related",
            Self::Alternative => "alternative",
        }
    }
}

struct Composer<'j> {
    out: Vec<u8>,
    job: &'j Job,
    unique: String,
}

impl Composer<'_> {
    fn headers(&mut self, from: &Mailbox, message_id: &str, date: OffsetDateTime) {
        let job = self.job;
        let date = date.to_offset(UtcOffset::UTC).format(DATE).expect("every date has these parts");
        self.header("Date").put(&date);
        self.header("From").mailboxes(std::slice::from_ref(from));
        if !job.reply_to.is_empty() {
            self.header("Reply-To").mailboxes(&job.reply_to);
        }
        if !job.to.is_empty() {
            self.header("To").mailboxes(&job.to);
        } else if job.cc.is_empty() {
            self.header("To").put("undisclosed-recipients:;");
        }
        if !job.cc.is_empty() {
            self.header("Cc").mailboxes(&job.cc);
        }
        self.header("Message-ID").put(message_id);
        self.header("Subject").text(&job.subject);
        if !job.headers.iter().any(|(name, _)| name.eq_ignore_ascii_case("Auto-Submitted")) {
            self.header("Auto-Submitted").put("auto-generated");
        }
        for (name, value) in &job.headers {
            self.header(name).given(name, value);
        }
        self.header("MIME-Version").put("1.0");
    }

    fn header(&mut self, name: &str) -> Header<'_> {
        Header::new(&mut self.out, name)
    }

    /// multipart/mixed( related, files, the invitation as a file ).
    fn content(&mut self) {
        let job = self.job;
        let mut files = job.attachments.iter().filter(|file| !is_inline(job, file)).peekable();
        if files.peek().is_none() && job.calendar.is_none() {
            return self.related();
        }
        self.open(Level::Mixed, None);
        self.delimit(Level::Mixed);
        self.related();
        for file in files {
            self.delimit(Level::Mixed);
            self.file(file);
        }
        if let Some(calendar) = &job.calendar {
            self.delimit(Level::Mixed);
            self.invitation_file(calendar);
        }
        self.close(Level::Mixed);
    }

    /// multipart/related( alternatives, inline images ): RFC 2387.
    fn related(&mut self) {
        let job = self.job;
        if !job.attachments.iter().any(|file| is_inline(job, file)) {
            return self.alternatives();
        }
        let root = if self.has_alternatives() { "multipart/alternative" } else { "text/html" };
        self.open(Level::Related, Some(root));
        self.delimit(Level::Related);
        self.alternatives();
        for file in job.attachments.iter().filter(|file| file.content_id.is_some()) {
            self.delimit(Level::Related);
            self.file(file);
        }
        self.close(Level::Related);
    }

    fn has_alternatives(&self) -> bool {
        (self.job.text.is_some() && self.job.html.is_some()) || self.job.calendar.is_some()
    }

    /// multipart/alternative( text, HTML, invitation ), the best last: RFC 2046 section 5.1.4.
    fn alternatives(&mut self) {
        let job = self.job;
        let several = self.has_alternatives();
        if several {
            self.open(Level::Alternative, None);
        }
        for (text, media_type) in [(&job.text, "text/plain"), (&job.html, "text/html")] {
            let Some(text) = text else { continue };
            if several {
                self.delimit(Level::Alternative);
            }
            self.header("Content-Type").put(media_type).parameter("charset", "utf-8");
            self.text(text, Encoding::of_text(text.as_bytes()));
        }
        if let Some(calendar) = &job.calendar {
            self.delimit(Level::Alternative);
            self.header("Content-Type")
                .put("text/calendar")
                .parameter("charset", "utf-8")
                .parameter("method", calendar.method.as_str());
            self.text(&calendar.content, Encoding::of_exact(calendar.content.as_bytes()));
        }
        if several {
            self.close(Level::Alternative);
        }
    }

    fn text(&mut self, text: &str, encoding: Encoding) {
        self.header("Content-Transfer-Encoding").put(encoding.name());
        self.out.extend_from_slice(b"\r\n");
        body::write_text(&mut self.out, text.as_bytes(), encoding);
    }

    fn file(&mut self, file: &Attachment) {
        self.header("Content-Type").put(&file.content_type).name(&file.filename);
        self.header("Content-Transfer-Encoding").put(Encoding::Base64.name());
        let disposition = if file.content_id.is_some() { "inline" } else { "attachment" };
        self.header("Content-Disposition").put(disposition).filename(&file.filename);
        if let Some(id) = &file.content_id {
            self.header("Content-ID").put(&format!("<{id}>"));
        }
        self.out.extend_from_slice(b"\r\n");
        body::write_base64(&mut self.out, &file.content);
    }

    /// `application/ics`, for a second `text/calendar` would be processed twice.
    fn invitation_file(&mut self, calendar: &Calendar) {
        self.header("Content-Type").put("application/ics").name(&calendar.filename);
        self.header("Content-Transfer-Encoding").put(Encoding::Base64.name());
        self.header("Content-Disposition").put("attachment").filename(&calendar.filename);
        self.out.extend_from_slice(b"\r\n");
        body::write_text(&mut self.out, calendar.content.as_bytes(), Encoding::Base64);
    }

    /// The field of a multipart entity; the empty line behind it is the first delimiter's CRLF.
    fn open(&mut self, level: Level, root: Option<&str>) {
        let media_type = format!("multipart/{}", level.subtype());
        let boundary = self.boundary(level);
        let mut field = self.header("Content-Type");
        field.put(&media_type);
        if let Some(root) = root {
            field.parameter("type", root);
        }
        field.parameter("boundary", &boundary);
    }

    /// `=_` occurs neither in quoted-printable nor in base64 (RFC 2045 section 6.7).
    fn boundary(&self, level: Level) -> String {
        format!("=_{}_{}", level.subtype(), self.unique)
    }

    /// The CRLF in front belongs to the delimiter, so that a part's own end is exact: RFC 2046 section 5.1.1.
    fn delimit(&mut self, level: Level) {
        for piece in ["\r\n--=_", level.subtype(), "_", &self.unique, "\r\n"] {
            self.out.extend_from_slice(piece.as_bytes());
        }
    }

    fn close(&mut self, level: Level) {
        for piece in ["\r\n--=_", level.subtype(), "_", &self.unique, "--\r\n"] {
            self.out.extend_from_slice(piece.as_bytes());
        }
    }
}
