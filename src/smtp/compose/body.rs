//! Transfer encodings of a part's content (RFC 2045 section 6), written straight into the message.
//! Guarantee: what is decoded is the content with CRLF for each of its line ends; no line is longer than 78 bytes.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

/// RFC 5322 section 2.1.1: lines should not be longer.
const PLAIN_LINE_MAX: usize = 78;
/// RFC 2045 section 6.7: an encoded line, its soft break included.
const ENCODED_LINE_MAX: usize = 76;
/// Bytes that make an encoded line of 76 characters.
const BASE64_LINE_BYTES: usize = 57;
/// A line that begins so is changed by whoever keeps mail in mbox files (RFC 4155), unless it is encoded.
const MBOX_SEPARATOR: &[u8] = b"From ";
const HEX: &[u8; 16] = b"0123456789ABCDEF";

/// How a part's content travels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Encoding {
    SevenBit,
    QuotedPrintable,
    Base64,
}

impl Encoding {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::SevenBit => "7bit",
            Self::QuotedPrintable => "quoted-printable",
            Self::Base64 => "base64",
        }
    }

    /// As it is where it is ASCII in short lines; otherwise whichever encoding is shorter.
    pub(super) fn of_text(text: &[u8]) -> Self {
        let survey = Survey::of(text);
        if survey.is_plain() { Self::SevenBit } else { survey.shorter() }
    }

    /// Never as it is: servers on the way may re-wrap or trim plain lines, and iCalendar's folding must stay.
    pub(super) fn of_exact(text: &[u8]) -> Self {
        Survey::of(text).shorter()
    }
}

/// What the choice rests on.
#[derive(Default)]
struct Survey {
    bytes: usize,
    breaks: usize,
    longest_line: usize,
    equals: usize,
    unprintable: usize,
    separators: usize,
}

impl Survey {
    fn of(text: &[u8]) -> Self {
        let mut survey = Self { bytes: text.len(), ..Self::default() };
        for line in lines(text) {
            survey.longest_line = survey.longest_line.max(line.len());
            survey.breaks += 1;
            survey.separators += usize::from(line.starts_with(MBOX_SEPARATOR));
            for &byte in line {
                survey.equals += usize::from(byte == b'=');
                survey.unprintable += usize::from(!matches!(byte, b'\t' | b' '..=b'~'));
            }
        }
        survey
    }

    fn is_plain(&self) -> bool {
        self.unprintable + self.separators == 0 && self.longest_line <= PLAIN_LINE_MAX
    }

    fn shorter(&self) -> Encoding {
        let quoted = self.bytes + self.breaks + 2 * (self.equals + self.unprintable);
        let quoted = quoted + quoted / ENCODED_LINE_MAX * 3;
        let base64 = (self.bytes + self.breaks).div_ceil(BASE64_LINE_BYTES) * (ENCODED_LINE_MAX + 2);
        if quoted <= base64 { Encoding::QuotedPrintable } else { Encoding::Base64 }
    }
}

/// The lines of a text without their ends, which are CRLF, LF or CR. A text that ends with one ends with an empty line.
fn lines(text: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut rest = Some(text);
    std::iter::from_fn(move || {
        let current = rest?;
        let Some(end) = current.iter().position(|byte| matches!(byte, b'\r' | b'\n')) else {
            rest = None;
            return Some(current);
        };
        let width = if current[end..].starts_with(b"\r\n") { 2 } else { 1 };
        rest = Some(&current[end + width..]);
        Some(&current[..end])
    })
}

/// Writes a text; a line end at its end is written, none is added.
pub(super) fn write_text(out: &mut Vec<u8>, text: &[u8], encoding: Encoding) {
    if encoding == Encoding::Base64 {
        return write_base64_text(out, text);
    }
    for (index, line) in lines(text).enumerate() {
        if index > 0 {
            out.extend_from_slice(b"\r\n");
        }
        match encoding {
            Encoding::SevenBit => out.extend_from_slice(line),
            _ => write_quoted_printable(out, line),
        }
    }
}

fn write_quoted_printable(out: &mut Vec<u8>, line: &[u8]) {
    let mut column = 0;
    for (index, &byte) in line.iter().enumerate() {
        let is_last = index + 1 == line.len();
        let literal = match byte {
            b'F' if index == 0 => !line.starts_with(MBOX_SEPARATOR),
            b'!'..=b'<' | b'>'..=b'~' => true,
            // White space at a line's end is stripped on the way.
            b' ' | b'\t' => !is_last,
            _ => false,
        };
        let width = if literal { 1 } else { 3 };
        if column + width > ENCODED_LINE_MAX - usize::from(!is_last) {
            out.extend_from_slice(b"=\r\n");
            column = 0;
        }
        column += width;
        if literal {
            out.push(byte);
        } else {
            push_hex(out, b'=', byte);
        }
    }
}

/// Writes a file, in lines of 76 characters.
pub(super) fn write_base64(out: &mut Vec<u8>, content: &[u8]) {
    for (index, chunk) in content.chunks(BASE64_LINE_BYTES).enumerate() {
        if index > 0 {
            out.extend_from_slice(b"\r\n");
        }
        push_base64(out, chunk);
    }
}

fn write_base64_text(out: &mut Vec<u8>, text: &[u8]) {
    let start = out.len();
    let mut pending = [0; BASE64_LINE_BYTES];
    let mut filled = 0;
    let mut feed = |mut bytes: &[u8], out: &mut Vec<u8>| {
        while !bytes.is_empty() {
            if filled == BASE64_LINE_BYTES {
                write_base64_line(out, start, &pending);
                filled = 0;
            }
            let taken = bytes.len().min(BASE64_LINE_BYTES - filled);
            pending[filled..filled + taken].copy_from_slice(&bytes[..taken]);
            filled += taken;
            bytes = &bytes[taken..];
        }
    };
    for (index, line) in lines(text).enumerate() {
        if index > 0 {
            feed(b"\r\n", out);
        }
        feed(line, out);
    }
    if filled > 0 {
        write_base64_line(out, start, &pending[..filled]);
    }
}

fn write_base64_line(out: &mut Vec<u8>, start: usize, bytes: &[u8]) {
    if out.len() > start {
        out.extend_from_slice(b"\r\n");
    }
    push_base64(out, bytes);
}

/// Appends bytes in base64, on one line.
pub(super) fn push_base64(out: &mut Vec<u8>, bytes: &[u8]) {
    let start = out.len();
    out.resize(start + bytes.len().div_ceil(3) * 4, 0);
    let written = STANDARD.encode_slice(bytes, &mut out[start..]).expect("the room was made for it");
    debug_assert_eq!(start + written, out.len());
}

/// Appends one byte as two hexadecimal digits behind a sign.
pub(super) fn push_hex(out: &mut Vec<u8>, sign: u8, byte: u8) {
    out.extend_from_slice(&[sign, HEX[usize::from(byte >> 4)], HEX[usize::from(byte & 15)]]);
}
