//! One header field: folding, encoded words (RFC 2047), addresses (RFC 5322), parameters (RFC 2231).
//! Guarantee: a value cannot end its field: what is not printable ASCII is encoded, an address was checked before.

use super::body::{push_base64, push_hex};
use crate::model::address::Mailbox;
use crate::model::text;

/// RFC 5322 section 2.1.1: a line should not be longer.
const LINE_MAX: usize = 78;
/// RFC 2047 section 2: a line that holds an encoded word.
const ENCODED_LINE_MAX: usize = 76;
/// RFC 2047 section 2: an encoded word.
const ENCODED_WORD_MAX: usize = 75;
/// `=?utf-8?q?` and `?=`.
const ENCODED_WORD_FRAME: usize = 12;
/// Any one character fits: four bytes, three characters each.
const ENCODED_ROOM_MIN: usize = 12;
/// A piece that stays as it is; a longer one is encoded, so that it can be split.
const WORD_MAX: usize = 66;
/// A parameter's value that is written plainly.
const PARAMETER_MAX: usize = 60;

/// A field under way; dropping it ends its line.
pub(super) struct Header<'o> {
    out: &'o mut Vec<u8>,
    column: usize,
    is_empty: bool,
}

impl Drop for Header<'_> {
    fn drop(&mut self) {
        self.out.extend_from_slice(b"\r\n");
    }
}

impl<'o> Header<'o> {
    pub(super) fn new(out: &'o mut Vec<u8>, name: &str) -> Self {
        out.extend_from_slice(name.as_bytes());
        out.push(b':');
        Self { out, column: name.len() + 1, is_empty: true }
    }

    /// Adds a piece that stays whole, behind a space or on a new line.
    pub(super) fn put(&mut self, piece: &str) -> &mut Self {
        self.make_room(1 + piece.len());
        self.push(" ");
        self.push(piece);
        self
    }

    fn push(&mut self, piece: &str) {
        self.out.extend_from_slice(piece.as_bytes());
        self.column += piece.len();
        self.is_empty = false;
    }

    /// Folds unless so many bytes have room. The first piece stays on the name's line.
    fn make_room(&mut self, width: usize) {
        if self.column + width > LINE_MAX && !self.is_empty {
            self.fold();
        }
    }

    /// What comes next must begin with a space.
    fn fold(&mut self) {
        self.out.extend_from_slice(b"\r\n");
        self.column = 0;
    }

    /// Free text (RFC 5322 section 3.2.5).
    pub(super) fn text(&mut self, value: &str) {
        if is_plain(value, WORD_MAX) && !value.contains("=?") {
            return self.plain(value);
        }
        match encoded_region(value) {
            Some((start, end)) => {
                self.plain(value[..start].trim_end_matches(' '));
                self.encoded(&value[start..end]);
                self.plain(&value[end..]);
            }
            None => self.plain(value),
        }
    }

    /// A header of the publisher's. Only the free text of `X-*` could be mistaken for encoded words.
    pub(super) fn given(&mut self, name: &str, value: &str) {
        let is_free = name.get(..2).is_some_and(|start| start.eq_ignore_ascii_case("X-"));
        if is_plain(value, text::UNFOLDED_MAX) && !(is_free && value.contains("=?")) {
            self.plain(value);
        } else {
            self.text(value);
        }
    }

    /// Printable ASCII, folded at its single spaces.
    fn plain(&mut self, value: &str) {
        for piece in text::unfolded_pieces(value) {
            if piece.starts_with(' ') {
                self.make_room(piece.len());
                self.push(piece);
            } else {
                self.put(piece);
            }
        }
    }

    /// Encoded words, each of whole characters.
    fn encoded(&mut self, text: &str) {
        let mut rest = text;
        let encoding = WordEncoding::shorter(text);
        while !rest.is_empty() {
            if ENCODED_LINE_MAX < self.column + 1 + ENCODED_WORD_FRAME + ENCODED_ROOM_MIN {
                self.fold();
            }
            self.push(" ");
            rest = self.encoded_word(rest, encoding);
        }
    }

    /// Writes one word with as much of the text as the line has room for, and returns what is left.
    fn encoded_word<'t>(&mut self, text: &'t str, encoding: WordEncoding) -> &'t str {
        let width = ENCODED_WORD_MAX.min(ENCODED_LINE_MAX.saturating_sub(self.column));
        let room = width.saturating_sub(ENCODED_WORD_FRAME).max(ENCODED_ROOM_MIN);
        let (word, rest) = text.split_at(encoding.fitting(text, room));
        let start = self.out.len();
        self.out.extend_from_slice(encoding.opening());
        encoding.write(self.out, word);
        self.out.extend_from_slice(b"?=");
        self.column += self.out.len() - start;
        self.is_empty = false;
        rest
    }

    /// A list of mailboxes.
    pub(super) fn mailboxes(&mut self, list: &[Mailbox]) {
        for (index, mailbox) in list.iter().enumerate() {
            let comma = if index + 1 < list.len() { "," } else { "" };
            let email = mailbox.email.as_str();
            match &mailbox.name {
                Some(name) => {
                    self.phrase(name);
                    self.put_parts(&["<", email, ">", comma]);
                }
                None => self.put_parts(&[email, comma]),
            }
        }
    }

    fn put_parts(&mut self, parts: &[&str]) {
        self.make_room(1 + parts.iter().map(|part| part.len()).sum::<usize>());
        self.push(" ");
        for part in parts {
            self.push(part);
        }
    }

    /// A display name: atoms, a quoted string or encoded words (RFC 5322 section 3.2.5, RFC 2047 section 5 (3)).
    fn phrase(&mut self, name: &str) {
        let is_atom = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-/=?^_`{|}~".contains(&byte);
        if !is_plain(name, WORD_MAX) || name.contains("=?") {
            self.encoded(name);
        } else if name.split(' ').all(|word| !word.is_empty() && word.bytes().all(is_atom)) {
            self.plain(name);
        } else if name.len() <= PARAMETER_MAX {
            self.put(&quoted(name));
        } else {
            self.encoded(name);
        }
    }

    /// `; name=value`, in quotes where the value is no token.
    pub(super) fn parameter(&mut self, name: &str, value: &str) -> &mut Self {
        let is_token = value.bytes().all(|b| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`{|}~".contains(&b));
        self.push(";");
        if is_token && !value.is_empty() {
            self.put_parts(&[name, "=", value]);
        } else {
            self.put_parts(&[name, "=", &quoted(value)]);
        }
        self
    }

    /// The file's name on its content type. RFC 2231 does not reach the older Outlooks, which read encoded words here,
    /// although RFC 2047 section 5 (3) does not provide for them; the right form is on the disposition.
    pub(super) fn name(&mut self, filename: &str) {
        if is_simple(filename) {
            self.parameter("name", filename);
            return;
        }
        self.push(";");
        self.fold();
        self.push(" name=\"");
        let encoding = WordEncoding::shorter(filename);
        let rest = self.encoded_word(filename, encoding);
        if !rest.is_empty() {
            self.fold();
            self.encoded(rest);
        }
        self.push("\"");
    }

    /// The file's name on its disposition: as it is, or in the extended form of RFC 2231, continued where it is long.
    pub(super) fn filename(&mut self, filename: &str) {
        if is_simple(filename) {
            self.parameter("filename", filename);
            return;
        }
        let mut rest = filename;
        let mut section = 0_usize;
        while !rest.is_empty() {
            let charset = if section == 0 { "utf-8''" } else { "" };
            let (part, left) = rest.split_at(percent_fitting(rest, PARAMETER_MAX - charset.len()));
            self.push(";");
            self.fold();
            if section == 0 && left.is_empty() {
                self.push(" filename*=");
            } else {
                self.push(&format!(" filename*{section}*="));
            }
            self.push(charset);
            let start = self.out.len();
            for byte in part.bytes() {
                if is_attribute_char(byte) { self.out.push(byte) } else { push_hex(self.out, b'%', byte) }
            }
            self.column += self.out.len() - start;
            rest = left;
            section += 1;
        }
    }
}

/// Whether a value can stand unencoded: printable ASCII without spaces at its ends, whose every piece can be folded.
fn is_plain(value: &str, piece_max: usize) -> bool {
    value.bytes().all(|byte| matches!(byte, b' '..=b'~'))
        && !value.starts_with(' ')
        && !value.ends_with(' ')
        && (value.len() <= piece_max || text::unfolded_pieces(value).all(|piece| piece.len() <= piece_max))
}

fn is_simple(filename: &str) -> bool {
    filename.len() <= PARAMETER_MAX
        && filename.bytes().all(|byte| matches!(byte, b' '..=b'~'))
        && !filename.contains("=?")
}

fn quoted(value: &str) -> String {
    let mut quoted = String::with_capacity(value.len() + 2);
    quoted.push('"');
    for c in value.chars() {
        if matches!(c, '"' | '\\') {
            quoted.push('\\');
        }
        quoted.push(c);
    }
    quoted.push('"');
    quoted
}

/// From the first to the last word that has to be encoded. Words beside a run of spaces are among them: readers shorten
/// such runs around encoded words.
fn encoded_region(value: &str) -> Option<(usize, usize)> {
    let must_encode = |word: &str| {
        word.len() >= WORD_MAX || word.contains("=?") || !word.bytes().all(|byte| byte.is_ascii_graphic())
    };
    let mut region = None;
    let (mut at, mut previous, mut after_gap) = (0, 0, false);
    for word in value.split(' ') {
        if word.is_empty() || after_gap || must_encode(word) {
            let (start, _) = region.unwrap_or((if word.is_empty() { previous } else { at }, 0));
            region = Some((start, at + word.len()));
        }
        after_gap = word.is_empty();
        previous = at;
        at += word.len() + 1;
    }
    region
}

#[derive(Clone, Copy)]
enum WordEncoding {
    Q,
    B,
}

impl WordEncoding {
    fn shorter(text: &str) -> Self {
        let q: usize = text.bytes().map(q_width).sum();
        if q <= text.len().div_ceil(3) * 4 { Self::Q } else { Self::B }
    }

    fn opening(self) -> &'static [u8] {
        match self {
            Self::Q => b"=?utf-8?q?",
            Self::B => b"=?utf-8?b?",
        }
    }

    /// Bytes of the whole characters that fit into so many encoded ones; at least one character.
    fn fitting(self, text: &str, room: usize) -> usize {
        match self {
            Self::Q => fitting(text, room, q_width),
            Self::B => fitting(text, room / 4 * 3, |_| 1),
        }
    }

    fn write(self, out: &mut Vec<u8>, text: &str) {
        match self {
            Self::B => push_base64(out, text.as_bytes()),
            Self::Q => {
                for byte in text.bytes() {
                    match byte {
                        b' ' => out.push(b'_'),
                        byte if q_width(byte) == 1 => out.push(byte),
                        byte => push_hex(out, b'=', byte),
                    }
                }
            }
        }
    }
}

/// RFC 2047 section 5 (3): what may stand for itself even in a phrase.
fn q_width(byte: u8) -> usize {
    if byte.is_ascii_alphanumeric() || b" !*+-/".contains(&byte) { 1 } else { 3 }
}

/// RFC 2231 section 7, `attribute-char`, less what some readers stumble over.
fn is_attribute_char(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$&+-.^_`{|}~".contains(&byte)
}

fn percent_fitting(text: &str, room: usize) -> usize {
    fitting(text, room, |byte| if is_attribute_char(byte) { 1 } else { 3 })
}

fn fitting(text: &str, room: usize, width: impl Fn(u8) -> usize) -> usize {
    let mut used = 0;
    for (at, c) in text.char_indices() {
        let mut bytes = [0; 4];
        used += c.encode_utf8(&mut bytes).bytes().map(&width).sum::<usize>();
        if used > room && at > 0 {
            return at;
        }
    }
    text.len()
}
