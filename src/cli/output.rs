//! Answers on standard output.
//! Guarantee: a closed pipe is an error that ends the command, never a panic; JSON holds no control character and no
//! bidirectional override, whatever its values were made of.

use std::io::{IsTerminal, Write};

use serde::Serialize;

use crate::model::text;

/// Writes one line, at once.
pub(super) fn line(text: &str) -> std::io::Result<()> {
    let mut stdout = std::io::stdout().lock();
    writeln!(stdout, "{text}")?;
    stdout.flush()
}

/// Writes a value as JSON on one line.
pub(super) fn json(value: &impl Serialize) -> anyhow::Result<()> {
    Ok(line(&harmless_json(&serde_json::to_string(value)?))?)
}

/// Writes bytes as they are, and nothing else.
pub(super) fn bytes(bytes: &[u8]) -> std::io::Result<()> {
    let mut stdout = std::io::stdout().lock();
    stdout.write_all(bytes)?;
    stdout.flush()
}

/// Whether a person reads along.
pub(super) fn is_terminal() -> bool {
    std::io::stdout().is_terminal()
}

/// Text from outside for a terminal: what moves the cursor, colours or reorders is spelled out, say `\u{1b}`.
pub(super) fn harmless(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        if text::is_harmful(c) {
            shown.extend(c.escape_default());
        } else {
            shown.push(c);
        }
    }
    shown
}

/// The serializer has escaped the controls of ASCII's first half; the others can only stand in strings.
fn harmless_json(json: &str) -> String {
    let mut shown = String::with_capacity(json.len());
    for c in json.chars() {
        if text::is_harmful(c) {
            // All of them are in the basic multilingual plane.
            shown.push_str(&format!("\\u{:04x}", u32::from(c)));
        } else {
            shown.push(c);
        }
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_commands_a_terminal_is_spelled_out() {
        assert_eq!(harmless("a\u{1b}[2J\r\nb\u{9b}x\u{7f}"), "a\\u{1b}[2J\\r\\nb\\u{9b}x\\u{7f}");
        assert_eq!(harmless("fdp\u{202e}.exe\u{2028}"), "fdp\\u{202e}.exe\\u{2028}");
        assert_eq!(harmless("ä \u{200f}…"), "ä \u{200f}…");
    }

    #[test]
    fn json_stays_the_same_value() {
        let value = serde_json::json!({"a": "\u{9b}31m\u{202e}\u{1b}\u{7f}ä\n"});
        let shown = harmless_json(&value.to_string());
        assert!(!shown.chars().any(text::is_harmful), "{shown}");
        assert_eq!(serde_json::from_str::<serde_json::Value>(&shown).unwrap(), value);
    }
}
