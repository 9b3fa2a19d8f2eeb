//! Replies out of bytes, and what the network, the resolver and the server said in the model's words.
//! Guarantee: a reply takes bounded memory, its code survives bytes that are not UTF-8, and bytes that are no SMTP reply
//! appear in no failure.

use std::borrow::Cow;
use std::fmt;
use std::io;
use std::sync::Arc;

use super::conceal::Concealed;
use crate::egress::{DialError, EgressError};
use crate::model::failure::{Fault, Reply};

/// Longest reply line, in bytes. RFC 5321 section 4.5.3.1.5 says 512; servers that explain themselves write more.
const LINE_MAX: usize = 8 << 10;
/// Longest reply in all, in bytes.
const REPLY_MAX: usize = 64 << 10;

/// A complete reply as it came, its bytes made valid UTF-8.
#[derive(Clone)]
pub(super) struct RawReply {
    /// 200 to 599.
    pub code: u16,
    /// The texts behind the codes, one per line.
    pub lines: Vec<String>,
    /// What is taken out of what is shown of it.
    pub concealed: Option<Arc<Concealed>>,
}

impl fmt::Debug for RawReply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.to_model(), f)
    }
}

impl RawReply {
    /// The reply in the form that is stored and shown.
    pub fn to_model(&self) -> Reply {
        let said = Reply::new(self.code, self.lines.iter().map(String::as_str));
        let Some(concealed) = &self.concealed else { return said };
        let shown: Vec<Cow<'_, str>> = self.lines.iter().map(|line| concealed.taken_out_of(line)).collect();
        if shown.iter().all(|line| matches!(line, Cow::Borrowed(_))) {
            return said;
        }
        said.shown_as(Reply::new(self.code, shown.iter().map(Cow::as_ref)))
    }

    /// Whether a word of this reply holds nothing that is concealed.
    pub fn may_show(&self, word: &str) -> bool {
        self.concealed.as_ref().is_none_or(|concealed| concealed.taken_out_of(word) == word)
    }

    /// 2xx.
    pub fn is_success(&self) -> bool {
        (200..300).contains(&self.code)
    }

    /// 4xx or 5xx.
    pub fn is_refusal(&self) -> bool {
        self.code >= 400
    }

    /// The server closes the connection behind this reply (RFC 5321 section 3.8).
    pub fn closes(&self) -> bool {
        self.code == 421
    }

    /// What a reply means where only a refusal makes sense.
    pub fn into_fault(self) -> Fault {
        if self.is_refusal() {
            Fault::Reply(self.to_model())
        } else {
            protocol("the server gave a reply that does not fit the command")
        }
    }
}

/// What a server has sent and nobody has taken yet.
#[derive(Default)]
pub(super) struct Inbox {
    /// Without the lines that were read already.
    bytes: Vec<u8>,
    /// Lines of the reply that is coming in.
    lines: Vec<String>,
    reply_bytes: usize,
}

impl Inbox {
    /// Takes in what came.
    pub fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// Nothing is here, not even a part of a reply.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty() && self.lines.is_empty()
    }

    /// Bytes that wait.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Takes the next reply out if it is complete. Its code is its last line's.
    ///
    /// # Errors
    /// [`Fault::Protocol`] for what is no reply, or one too long. Nothing more can be read then.
    pub fn next_reply(&mut self) -> Result<Option<RawReply>, Fault> {
        while let Some(end) = self.bytes.iter().take(LINE_MAX).position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.bytes.drain(..=end).collect();
            self.reply_bytes += line.len();
            if self.reply_bytes > REPLY_MAX {
                return Err(protocol("the server's reply has no end"));
            }
            let line = line.strip_suffix(b"\n").unwrap_or(&line);
            let line = line.strip_suffix(b"\r").unwrap_or(line);
            let Some((code, last, text)) = reply_line(line) else {
                return Err(protocol("the server sent a line that is not an SMTP reply"));
            };
            self.lines.push(String::from_utf8_lossy(text).into_owned());
            if last {
                self.reply_bytes = 0;
                return Ok(Some(RawReply { code, lines: std::mem::take(&mut self.lines), concealed: None }));
            }
        }
        if self.bytes.len() >= LINE_MAX {
            return Err(protocol("a line of the server's reply has no end"));
        }
        Ok(None)
    }
}

/// `250-text`, `250 text` or `250`: code, whether it is the last line, text.
fn reply_line(line: &[u8]) -> Option<(u16, bool, &[u8])> {
    let (digits, rest) = line.split_at_checked(3)?;
    if !matches!(digits[0], b'2'..=b'5') || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let code = digits.iter().fold(0, |code, digit| code * 10 + u16::from(digit - b'0'));
    match rest.split_first() {
        None => Some((code, true, rest)),
        Some((b' ', text)) => Some((code, true, text)),
        Some((b'-', text)) => Some((code, false, text)),
        Some(_) => None,
    }
}

/// The reply in the form that the client library reads: it knows no second digit above 5.
pub(super) fn plain_form(code: u16) -> Vec<u8> {
    let (class, category, detail) = (code / 100, code / 10 % 10, code % 10);
    format!("{class}{}{detail} reply\r\n", category.min(5)).into_bytes()
}

/// A violation of SMTP, told in our own words.
pub(super) fn protocol(detail: &str) -> Fault {
    Fault::Protocol { detail: detail.to_owned() }
}

/// Why the host may not, or cannot, be dialled.
pub(super) fn egress_fault(error: &EgressError) -> Fault {
    match error {
        EgressError::HostNotPublic { .. } => Fault::HostNotPublic,
        EgressError::PortNotAllowed { .. } => Fault::PortNotAllowed,
        EgressError::HostNotFound => Fault::HostNotFound,
        EgressError::DnsFailed { detail } => Fault::DnsFailed { detail: detail.clone() },
    }
}

/// Why no connection came to be.
pub(super) fn dial_fault(error: &DialError) -> Fault {
    match error {
        DialError::Timeout { .. } => Fault::Timeout,
        DialError::Failed { source, .. } if source.kind() == io::ErrorKind::TimedOut => Fault::Timeout,
        DialError::Failed { .. } | DialError::NoAddress => Fault::Unreachable { detail: error.to_string() },
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read_all(bytes: &[u8], chunk: usize) -> (Vec<(u16, Vec<String>)>, Option<Fault>) {
        let (mut inbox, mut replies) = (Inbox::default(), Vec::new());
        for part in bytes.chunks(chunk) {
            inbox.push(part);
            loop {
                match inbox.next_reply() {
                    Ok(Some(reply)) => replies.push((reply.code, reply.lines)),
                    Ok(None) => break,
                    Err(fault) => return (replies, Some(fault)),
                }
            }
        }
        (replies, None)
    }

    #[test]
    fn the_client_library_reads_every_code_as_its_own_class() {
        for code in 200..600 {
            let text = String::from_utf8(plain_form(code)).unwrap();
            let response: lettre::transport::smtp::response::Response = text.parse().unwrap();
            assert_eq!(u16::from(response.code()) / 100, code / 100);
        }
    }

    #[test]
    fn only_a_reply_line_is_taken_for_one() {
        assert_eq!(reply_line(b"250-a"), Some((250, false, &b"a"[..])));
        assert_eq!(reply_line(b"571 no"), Some((571, true, &b"no"[..])));
        assert_eq!(reply_line(b"250"), Some((250, true, &b""[..])));
        for line in [
            &b"HTTP/1.1 400 Bad Request"[..],
            b"SSH-2.0-x",
            b"25",
            b"",
            b"2500",
            b"150 a",
            b"600 a",
            b"25a b",
        ] {
            assert_eq!(reply_line(line), None, "{}", String::from_utf8_lossy(line));
        }
    }

    #[test]
    fn a_reply_of_several_lines_is_one_reply_with_its_last_code() {
        let (replies, fault) = read_all(b"250-one\r\n250-\xff\n550 three\r\n221\r\n", 1000);
        let lines = |lines: &[&str]| lines.iter().map(|line| (*line).to_owned()).collect();
        let expected = [(550, lines(&["one", "\u{fffd}", "three"])), (221, lines(&[""]))];
        assert_eq!((replies.as_slice(), fault), (&expected[..], None));
    }

    #[test]
    fn a_line_or_a_reply_without_end_is_an_error_before_it_fills_the_memory() {
        let mut inbox = Inbox::default();
        inbox.push(&[b'2'; LINE_MAX - 1]);
        assert!(matches!(inbox.next_reply(), Ok(None)));
        inbox.push(b"2");
        assert!(inbox.next_reply().is_err());
        let (replies, fault) = read_all(&b"250-more\r\n".repeat(REPLY_MAX / 10 + 1), 4096);
        assert!(replies.is_empty() && fault.is_some());
    }

    proptest! {
        #[test]
        fn how_the_bytes_are_cut_makes_no_difference(
            text in proptest::collection::vec("(2|5)[0-9]{2}(-| |)[a-z\u{e9}]{0,5}(\r\n|\n)|[ -~]{0,6}\r\n", 0..12),
            chunk in 1_usize..40,
        ) {
            let bytes = text.concat().into_bytes();
            prop_assert_eq!(read_all(&bytes, chunk), read_all(&bytes, bytes.len().max(1)));
        }
    }
}
