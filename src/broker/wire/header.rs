//! Which headers a job may add to its message, and in what form.
//! Guarantee: a header that passes cannot add a recipient, command a provider, or break a line.

use super::Fault;
use super::explain::shown;
use crate::model::text;

/// More headers than this are a mistake.
pub(super) const HEADERS_MAX: usize = 50;
/// Longest field name, in bytes.
pub(super) const NAME_MAX: usize = 76;
/// Longest value, in bytes.
pub(super) const VALUE_MAX: usize = 8192;

pub(super) const EXACT: [&str; 6] =
    ["In-Reply-To", "References", "Auto-Submitted", "Feedback-ID", "Importance", "Precedence"];
pub(super) const PREFIXES: [&str; 2] = ["X-", "List-"];
/// By these a mail provider is told what to do with a message, some add recipients to it: SendGrid, Mailchimp,
/// Mailgun, Amazon SES, SparkPost, Mailjet, Postmark, Brevo.
pub(super) const COMMANDS: [&str; 9] =
    ["X-SMTPAPI", "X-MC-", "X-Mailgun-", "X-SES-", "X-MSYS-", "X-MJ-", "X-PM-", "X-Mailin-", "X-Sib-"];

/// Judges every header and makes each value one line.
pub(super) fn headers(given: Vec<(String, String)>) -> Result<Vec<(String, String)>, Fault> {
    if given.len() > HEADERS_MAX {
        return Err(Fault::malformed(format!(
            "headers: {} are given, at most {HEADERS_MAX} allowed",
            given.len()
        )));
    }
    let mut headers: Vec<(String, String)> = Vec::with_capacity(given.len());
    for (name, value) in given {
        let refuse = |fault: &str| Fault::malformed(format!("headers.{}: {fault}", shown(&name)));
        judge_name(&name).map_err(refuse)?;
        if headers.iter().any(|(other, _)| other.eq_ignore_ascii_case(&name)) {
            return Err(refuse("is given twice (names are compared without regard to case)"));
        }
        let value = text::single_line(&value);
        judge_value(&name, &value).map_err(refuse)?;
        headers.push((name, value));
    }
    Ok(headers)
}

fn has_prefix(name: &str, prefix: &str) -> bool {
    name.get(..prefix.len()).is_some_and(|start| start.eq_ignore_ascii_case(prefix))
}

fn judge_name(name: &str) -> Result<(), &'static str> {
    // RFC 5322 section 3.6.8: printable ASCII without the colon.
    if name.is_empty() || !name.bytes().all(|byte| byte.is_ascii_graphic() && byte != b':') {
        return Err("the name must be of printable ASCII characters without space and colon");
    }
    if name.len() > NAME_MAX {
        return Err("the name is longer than 76 characters");
    }
    if COMMANDS.iter().any(|command| has_prefix(name, command)) {
        return Err("is not allowed: it commands a mail provider");
    }
    let exact = EXACT.iter().any(|allowed| allowed.eq_ignore_ascii_case(name));
    let prefixed = PREFIXES.iter().any(|prefix| name.len() > prefix.len() && has_prefix(name, prefix));
    if exact || prefixed {
        Ok(())
    } else {
        Err("is not allowed; allowed are X-*, List-*, In-Reply-To, References, Auto-Submitted, Feedback-ID, \
             Importance, Precedence")
    }
}

fn judge_value(name: &str, value: &str) -> Result<(), &'static str> {
    if value.is_empty() {
        return Err("must not be empty");
    }
    if value.len() > VALUE_MAX {
        return Err("is longer than 8192 bytes");
    }
    // Encoded words (RFC 2047 section 5) belong into free text and phrases, never into message ids, URLs and keywords.
    if !value.is_ascii() && !has_prefix(name, "X-") && !name.eq_ignore_ascii_case("List-Id") {
        return Err("must be ASCII: encoded text is not allowed in this header");
    }
    if text::unfolded_pieces(value).any(|piece| piece.len() > text::UNFOLDED_MAX) {
        return Err("has more than 900 bytes without a space to fold the line at");
    }
    Ok(())
}
