//! A connection test's report in lines for a person: each step, what failed and what to do, what will hurt delivery.
//! Guarantee: everything from the reply is harmless to a terminal, and its addresses are masked.

use serde_json::Value;

use crate::cli::story::masked;

/// Lines are wrapped here, in characters, as the help's are.
const WIDTH: usize = 110;
/// The longest step's name is `authenticate`.
const STEP: usize = 12;
/// Room for `12345 ms`.
const TIME: usize = 8;

/// What stands in front of a line.
#[derive(Debug, Clone, Copy)]
pub(super) struct Marks {
    ok: &'static str,
    failed: &'static str,
    warning: &'static str,
    note: &'static str,
}

impl Marks {
    /// Signs for a terminal, words of one width for a pipe or a file.
    pub(super) fn new(is_terminal: bool) -> Self {
        if is_terminal {
            Self { ok: "✓", failed: "✗", warning: "!", note: "·" }
        } else {
            Self { ok: "ok     ", failed: "FAILED ", warning: "warning", note: "note   " }
        }
    }
}

/// The report; `None` when the value is none.
pub(super) fn lines(report: &Value, marks: Marks) -> Option<Vec<String>> {
    let passed = report["ok"].as_bool()?;
    let items = |name: &str| report[name].as_array().cloned().unwrap_or_default();
    let mut lines: Vec<String> = items("steps").iter().flat_map(|step| step_lines(step, marks)).collect();
    for (name, mark) in [("warnings", marks.warning), ("notes", marks.note)] {
        let sentences = items(name);
        lines.extend(
            sentences
                .iter()
                .filter_map(Value::as_str)
                .flat_map(|sentence| wrapped(&format!("{mark} "), &masked(sentence))),
        );
    }
    if passed {
        let warned = match items("warnings").len() {
            0 => "",
            1 => " The warning does not fail it, but may hurt delivery.",
            _ => " The warnings do not fail it, but may hurt delivery.",
        };
        lines.extend(wrapped("", &format!("The connection test passed; nothing was sent.{warned}")));
    } else {
        let failed = items("steps").into_iter().rev().find(|step| step["ok"] == false).unwrap_or_default();
        lines.extend(failure(&failed, &report["error"]));
    }
    Some(lines)
}

fn step_lines(step: &Value, marks: Marks) -> Vec<String> {
    let text = |name: &str| step[name].as_str().map(masked).unwrap_or_default();
    let mark = if step["ok"] == true { marks.ok } else { marks.failed };
    let head = format!("{mark} {:<STEP$} {:>TIME$}  ", text("step"), time(&step["ms"]));
    wrapped(&head, &text("detail"))
}

/// `12 ms`, and from ten seconds on `12.3 s`.
fn time(ms: &Value) -> String {
    match ms.as_u64() {
        None => "-".to_owned(),
        Some(ms @ ..10_000) => format!("{ms} ms"),
        Some(ms) => format!("{}.{} s", ms / 1000, ms % 1000 / 100),
    }
}

/// What failed, why, and what to do; the cause is not repeated where the step's own line has it already.
fn failure(step: &Value, error: &Value) -> Vec<String> {
    let text = |name: &str| error[name].as_str().map(masked);
    let place = step["step"].as_str().map(|step| format!(" at {}", masked(step))).unwrap_or_default();
    let is_told = |message: &str| {
        step["detail"]
            .as_str()
            .is_some_and(|detail| detail.trim_end_matches('.') == message.trim_end_matches('.'))
    };
    let message = error["message"].as_str().filter(|message| !is_told(message));
    let message = message.map(|message| format!(": {}", masked(message))).unwrap_or_default();
    let field = text("field").map(|field| format!(", field {field}")).unwrap_or_default();
    let code = text("code").map(|code| format!(" ({code}{field})")).unwrap_or_default();
    let mut lines = wrapped("", &format!("The connection test failed{place}{message}{code}"));
    if let Some(hint) = text("hint") {
        lines.extend(wrapped("Next: ", &hint));
    }
    lines
}

/// Breaks a text between words, the lines after the first indented to where the text begins.
pub(super) fn wrapped(head: &str, text: &str) -> Vec<String> {
    let indent = head.chars().count();
    let room = WIDTH - indent;
    let mut lines = Vec::new();
    let mut line = head.to_owned();
    let mut length = 0;
    for word in text.split(' ').filter(|word| !word.is_empty()) {
        let needed = word.chars().count();
        if length > 0 && length + 1 + needed > room {
            lines.push(std::mem::replace(&mut line, " ".repeat(indent)));
            length = 0;
        }
        if length > 0 {
            line.push(' ');
            length += 1;
        }
        line.push_str(word);
        length += needed;
    }
    lines.push(line.trim_end().to_owned());
    lines
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn shown(report: &Value, is_terminal: bool) -> String {
        lines(report, Marks::new(is_terminal)).unwrap().join("\n")
    }

    fn refused() -> Value {
        json!({
            "ok": false,
            "steps": [
                {"step": "resolve", "ok": true, "ms": 12, "detail": "smtp.example.org has 2 addresses"},
                {"step": "address", "ok": true, "ms": 0, "detail": "198.51.100.7 (IPv4) is public"},
                {"step": "authenticate", "ok": false, "ms": 10_450, "detail": "535 5.7.8 ann@example.org: no"},
            ],
            "warnings": ["SPF: example.org has no record, so that recipients' servers cannot tell this mail from a forgery."],
            "notes": ["DKIM: not checked, for a selector is not known."],
            "error": {"code": "auth_failed", "message": "The server refused the password",
                      "field": "password", "hint": "Use an app password."},
        })
    }

    #[test]
    fn a_failed_test_shows_each_step_the_cause_and_what_to_do() {
        assert_eq!(
            shown(&refused(), false),
            "\
ok      resolve         12 ms  smtp.example.org has 2 addresses
ok      address          0 ms  198.51.100.7 (IPv4) is public
FAILED  authenticate   10.4 s  535 5.7.8 a…@example.org: no
warning SPF: example.org has no record, so that recipients' servers cannot tell this mail from a forgery.
note    DKIM: not checked, for a selector is not known.
The connection test failed at authenticate: The server refused the password (auth_failed, field password)
Next: Use an app password."
        );
        let mut report = refused();
        report["error"]["message"] = json!("535 5.7.8 ann@example.org: no");
        let words = shown(&report, false);
        assert!(
            words.contains("\nThe connection test failed at authenticate (auth_failed, field password)\n"),
            "told already: {words}"
        );
    }

    #[test]
    fn on_a_terminal_the_steps_have_ticks() {
        let words = shown(&refused(), true);
        assert!(words.starts_with("✓ resolve         12 ms  smtp."), "{words}");
        assert!(words.contains("\n✗ authenticate   10.4 s  535") && words.contains("\n! SPF: "), "{words}");
    }

    #[test]
    fn a_passed_test_says_so_and_what_its_warnings_mean() {
        let mut report = json!({"ok": true, "steps": [], "warnings": [], "notes": []});
        assert_eq!(shown(&report, false), "The connection test passed; nothing was sent.");
        report["warnings"] = json!(["MX: none", "SPF: two records"]);
        let words = shown(&report, false);
        assert!(
            words.ends_with(
                "The connection test passed; nothing was sent. The warnings do not fail it, but may hurt delivery."
            ),
            "{words}"
        );
    }

    #[test]
    fn a_server_cannot_command_the_terminal_that_shows_its_words() {
        let step =
            json!({"step": "greeting", "ok": false, "ms": null, "detail": "\u{1b}[2J220 \u{202e}hello"});
        let report = json!({"ok": false, "steps": [step], "error": {"code": "x", "message": "\u{9b}31m"}});
        let words = shown(&report, true);
        assert!(
            !words.chars().any(|c| c != '\n' && crate::model::text::is_harmful(c)),
            "{words:?} shows them spelled out"
        );
        assert!(words.contains("\\u{1b}[2J220"), "{words}");
    }

    #[test]
    fn a_long_text_goes_on_below_where_it_began() {
        let lines = wrapped("FAILED  tls  ", &"word ".repeat(40));
        assert_eq!(lines.len(), 3, "{lines:?}");
        assert!(lines.iter().all(|line| line.len() <= WIDTH), "{lines:?}");
        assert!(lines[1].starts_with("             word") && lines[0].starts_with("FAILED  tls  word"));
        let unbroken = "x".repeat(200);
        assert_eq!(wrapped("  ", &unbroken), [format!("  {unbroken}")], "a word is never broken");
        assert_eq!(wrapped("ok      resolve  ", ""), ["ok      resolve"]);
    }

    #[test]
    fn what_is_no_report_is_not_taken_for_one() {
        for value in [json!(null), json!({}), json!({"ok": "yes"}), json!([1])] {
            assert!(lines(&value, Marks::new(false)).is_none(), "{value}");
        }
    }
}
