//! Text from outside made harmless.
//! Guarantee: what these functions return holds no control character and no bidirectional embedding, override or isolate.

/// Whether a character can reorder the text around it: Unicode's explicit embeddings, overrides and isolates
/// (UAX #9 section 2). The implicit marks (LRM, RLM, ALM) reorder nothing and stay.
pub fn is_bidi_control(c: char) -> bool {
    matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// A line separator that is not a control character, but breaks a line all the same.
fn is_break(c: char) -> bool {
    c.is_control() || matches!(c, '\u{2028}' | '\u{2029}')
}

/// Whether a character can do harm where text is shown: it ends a line, commands a terminal, or reorders what stands
/// around it.
pub fn is_harmful(c: char) -> bool {
    is_break(c) || is_bidi_control(c)
}

/// Text for a header's value: each run of control characters becomes one space, bidirectional controls are
/// dropped, and both ends are trimmed.
pub fn single_line(text: &str) -> String {
    let mut line = String::with_capacity(text.len());
    let mut in_break = false;
    for c in text.chars().filter(|c| !is_bidi_control(*c)) {
        if is_break(c) {
            if !in_break {
                line.push(' ');
            }
            in_break = true;
        } else {
            line.push(c);
            in_break = false;
        }
    }
    line.trim().to_owned()
}

/// Whether the text holds a character that is never allowed in an address, a host, a user name or a password.
pub fn has_forbidden_control(text: &str) -> bool {
    text.chars().any(is_harmful)
}

/// Cuts a text to at most `max` bytes at a character's boundary, with an ellipsis where something was cut.
pub fn bounded(text: &str, max: usize) -> String {
    if text.len() <= max {
        return text.to_owned();
    }
    let mut end = max.saturating_sub('…'.len_utf8());
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    format!("{}…", &text[..end])
}

/// A header's line is folded between pieces only, and RFC 5322 section 2.1.1 ends it at 998 bytes, the name included.
pub const UNFOLDED_MAX: usize = 900;

/// The pieces of a header's value that folding leaves whole, each with the space in front of it. A run of several spaces
/// is no place to fold: readers make one space of it.
pub fn unfolded_pieces(value: &str) -> impl Iterator<Item = &str> {
    let bytes = value.as_bytes();
    let mut start = 0;
    std::iter::from_fn(move || {
        let is_single_space = |at: &usize| {
            bytes[*at] == b' ' && bytes[at - 1] != b' ' && bytes.get(at + 1).is_some_and(|b| *b != b' ')
        };
        let end = (start + 1..bytes.len()).find(is_single_space).unwrap_or(bytes.len());
        let piece = &value[start..end];
        start = end;
        (!piece.is_empty()).then_some(piece)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_of_control_characters_becomes_one_space() {
        assert_eq!(single_line("Hello\r\n\tBcc: x@example.org\0"), "Hello Bcc: x@example.org");
        assert_eq!(single_line("a\u{2028}b"), "a b");
    }

    #[test]
    fn bidirectional_overrides_are_dropped() {
        assert_eq!(single_line("invoice\u{202e}fdp.exe"), "invoicefdp.exe");
    }

    #[test]
    fn a_cut_text_stays_within_its_bound_and_on_a_boundary() {
        let cut = bounded("ääääääää", 8);
        assert!(cut.len() <= 8 && cut.ends_with('…'), "{cut}");
        assert_eq!(bounded("short", 8), "short");
    }

    #[test]
    fn a_value_is_folded_at_single_spaces_only() {
        for (value, pieces) in [
            ("", vec![]),
            ("abc", vec!["abc"]),
            ("a bcd ä", vec!["a", " bcd", " ä"]),
            ("a  b c", vec!["a  b", " c"]),
            (" a b ", vec![" a", " b "]),
        ] {
            assert_eq!(unfolded_pieces(value).collect::<Vec<_>>(), pieces, "{value:?}");
        }
    }
}
