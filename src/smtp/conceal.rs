//! Credentials taken out of what a server says: some repeat what they were told.
//! Guarantee: nothing that is shown of a session's replies holds user name or password, be it as they are, as AUTH carries
//! them, in hexadecimal, or escaped for JSON, a URL or a log. What the replies mean is judged by what was said.

use std::borrow::Cow;
use std::fmt::Write as _;

use base64::Engine;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD};
use secrecy::{ExposeSecret, SecretString};

use crate::model::smtp_settings::Credentials;

/// What stands in their place.
const CONCEALED: &str = "[redacted]";
/// A shorter one is a part of many words, and is taken out where it stands alone.
const SHORT: usize = 4;

/// Every form of one pair of credentials in lower case, the longest first.
pub(super) struct Concealed {
    forms: Vec<SecretString>,
}

impl Concealed {
    pub fn new(credentials: &Credentials) -> Self {
        let (username, password) = (credentials.username(), credentials.password());
        // RFC 4616: PLAIN. LOGIN sends each of the two by itself.
        let mut forms = base64(&format!("\0{username}\0{password}")).to_vec();
        for secret in [username, username.trim(), password, password.trim()] {
            let json = serde_json::Value::from(secret).to_string();
            let debug = format!("{secret:?}");
            let inner = |quoted: &str| quoted[1..quoted.len() - 1].to_owned();
            forms.extend(base64(secret));
            forms.extend([
                hexadecimal(secret),
                percent(secret),
                inner(&json),
                inner(&debug),
                secret.to_owned(),
            ]);
        }
        forms.retain(|form| !form.is_empty());
        forms.iter_mut().for_each(|form| form.make_ascii_lowercase());
        forms.sort_by(|a, b| b.len().cmp(&a.len()).then_with(|| a.cmp(b)));
        forms.dedup();
        Self { forms: forms.into_iter().map(SecretString::from).collect() }
    }

    /// The text without them.
    pub fn taken_out_of<'t>(&self, text: &'t str) -> Cow<'t, str> {
        let lower = text.to_ascii_lowercase();
        if !self.forms.iter().any(|form| lower.contains(form.expose_secret())) {
            return text.into();
        }
        self.forms.iter().fold(text.to_owned(), without).into()
    }
}

fn base64(text: &str) -> [String; 2] {
    [STANDARD.encode(text), STANDARD_NO_PAD.encode(text)]
}

fn hexadecimal(text: &str) -> String {
    text.bytes().fold(String::new(), |mut digits, byte| {
        write!(digits, "{byte:02x}").expect("a String takes everything");
        digits
    })
}

/// RFC 3986: everything but unreserved characters.
fn percent(text: &str) -> String {
    text.bytes().fold(String::new(), |mut escaped, byte| {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            escaped.push(char::from(byte));
        } else {
            write!(escaped, "%{byte:02X}").expect("a String takes everything");
        }
        escaped
    })
}

/// Letters count in either case.
fn without(line: String, form: &SecretString) -> String {
    let form = form.expose_secret();
    let lower = line.to_ascii_lowercase();
    let stands_alone = |at: usize| {
        let is_word = |c: char| c.is_alphanumeric();
        let before = lower[..at].chars().next_back().is_some_and(is_word);
        let behind = lower[at + form.len()..].chars().next().is_some_and(is_word);
        form.len() >= SHORT || !(before || behind)
    };
    let mut kept = String::new();
    let mut from = 0;
    for (at, _) in lower.match_indices(form).filter(|(at, _)| stands_alone(*at)) {
        kept.push_str(&line[from..at]);
        kept.push_str(CONCEALED);
        from = at + form.len();
    }
    if from == 0 {
        return line;
    }
    kept.push_str(&line[from..]);
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    fn concealed(username: &str, password: &str, line: &str) -> String {
        let credentials = Credentials::new(username.to_owned(), password.to_owned());
        Concealed::new(&credentials).taken_out_of(line).into_owned()
    }

    #[test]
    fn credentials_are_taken_out_in_every_form() {
        let (username, password) = ("Ann Lee+1", " pä\"ss\\word ");
        for form in [
            username.to_owned(),
            username.to_uppercase(),
            password.trim().to_owned(),
            STANDARD_NO_PAD.encode(username),
            STANDARD.encode(password),
            hexadecimal(username).to_uppercase(),
            hexadecimal(password),
            STANDARD_NO_PAD.encode(format!("\0{username}\0{password}")),
            percent(username),
            percent(password),
            r#"pä\"ss\\word"#.to_owned(),
        ] {
            let line = concealed(username, password, &format!("5.7.8 <{form}>, {form}? no"));
            assert!(!line.contains(&form) && line.starts_with("5.7.8 <") && line.ends_with("? no"), "{line}");
            assert_eq!(line.matches(CONCEALED).count(), 2, "{line}");
        }
    }

    #[test]
    fn a_short_one_is_taken_out_of_no_word_and_other_text_stays_as_it_is() {
        assert_eq!(concealed("me", "x", "me: try some time, x"), "[redacted]: try some time, [redacted]");
        let line = "5.7.8 Benutzer unbekannt \u{fffd}";
        assert_eq!(concealed("ann@example.org", "hunter2", line), line);
    }
}
