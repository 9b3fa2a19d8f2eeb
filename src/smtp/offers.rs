//! What a server offers in its EHLO reply (RFC 5321 section 4.1.1.1).
//! Guarantee: keywords count in any case, and of the AUTH mechanisms on offer only names are kept, a bounded number.

use lettre::transport::smtp::authentication::Mechanism;

use super::reply::RawReply;

/// More AUTH mechanisms than these are not kept; IANA's registry has some thirty.
const MECHANISMS_MAX: usize = 32;
/// What can be used, the better one first.
const USABLE: [Mechanism; 2] = [Mechanism::Plain, Mechanism::Login];

/// What the EHLO reply offers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Offers {
    pub starttls: bool,
    pub pipelining: bool,
    pub smtputf8: bool,
    pub eight_bit_mime: bool,
    /// Whether SIZE is known, and the limit in bytes if the server names one (RFC 1870 section 3).
    pub size: Option<Option<u64>>,
    /// AUTH mechanisms, upper case: names as RFC 4422 section 3.1 has them, and no other words.
    pub mechanisms: Vec<String>,
}

impl Offers {
    /// Keywords are compared without regard to case (RFC 5321 section 2.4); `AUTH=` is an old spelling of `AUTH`.
    pub fn read(reply: &RawReply) -> Self {
        let mut offers = Self::default();
        for line in reply.lines.iter().skip(1) {
            let line = line.to_ascii_uppercase().replacen("AUTH=", "AUTH ", 1);
            let mut words = line.split_ascii_whitespace();
            match words.next() {
                Some("STARTTLS") => offers.starttls = true,
                Some("PIPELINING") => offers.pipelining = true,
                Some("SMTPUTF8") => offers.smtputf8 = true,
                Some("8BITMIME") => offers.eight_bit_mime = true,
                Some("SIZE") => {
                    let limit = words.next().and_then(|word| word.parse().ok());
                    offers.size = Some(limit.filter(|limit| *limit > 0));
                }
                Some("AUTH") => {
                    for name in words.filter(|word| is_mechanism(word, reply)) {
                        let is_new = !offers.mechanisms.iter().any(|known| known == name);
                        if is_new && offers.mechanisms.len() < MECHANISMS_MAX {
                            offers.mechanisms.push(name.to_owned());
                        }
                    }
                }
                _ => {}
            }
        }
        offers
    }

    /// The mechanisms that can be used here, the better one first.
    pub fn usable_mechanisms(&self) -> Vec<Mechanism> {
        let offered =
            |mechanism: &Mechanism| self.mechanisms.iter().any(|name| *name == mechanism.to_string());
        USABLE.into_iter().filter(offered).collect()
    }
}

/// One that can be used, or another that can be shown (RFC 4422 section 3.1).
fn is_mechanism(word: &str, reply: &RawReply) -> bool {
    let is_part = |byte: u8| byte.is_ascii_uppercase() || byte.is_ascii_digit() || b"-_".contains(&byte);
    let is_name = (1..=20).contains(&word.len()) && word.bytes().all(is_part);
    USABLE.iter().any(|mechanism| mechanism.to_string() == word) || (is_name && reply.may_show(word))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::model::smtp_settings::Credentials;
    use crate::smtp::conceal::Concealed;

    #[test]
    fn ehlo_keywords_are_read_in_any_case_and_the_first_line_is_no_keyword() {
        let lines = [
            "STARTTLS greets you",
            "pipelining",
            "Size 1000",
            "auth plain XOAUTH2",
            "AUTH=LOGIN plain",
            "smtputf8",
        ];
        let offers = Offers::read(&ehlo_reply(lines));
        assert_eq!(
            offers,
            Offers {
                starttls: false,
                pipelining: true,
                smtputf8: true,
                eight_bit_mime: false,
                size: Some(Some(1000)),
                mechanisms: ["PLAIN", "XOAUTH2", "LOGIN"].map(str::to_owned).to_vec(),
            }
        );
        assert_eq!(offers.usable_mechanisms(), [Mechanism::Plain, Mechanism::Login]);
    }

    #[test]
    fn a_size_of_zero_or_none_is_no_limit() {
        for keyword in ["SIZE 0", "SIZE"] {
            assert_eq!(Offers::read(&ehlo_reply(["mail.test", keyword])).size, Some(None));
        }
    }

    #[test]
    fn only_names_of_mechanisms_are_kept_and_not_without_end() {
        let hostile = "AUTH \u{1b}]0;x\u{7} ann@customer.example PLAIN <b> X-A_1 A234567890123456789012";
        assert_eq!(Offers::read(&ehlo_reply(["mail.test", hostile])).mechanisms, ["PLAIN", "X-A_1"]);
        let many = (0..1000).fold("AUTH".to_owned(), |line, number| format!("{line} M{number}"));
        assert_eq!(Offers::read(&ehlo_reply(["mail.test", &many])).mechanisms.len(), MECHANISMS_MAX);
    }

    #[test]
    fn a_mechanism_that_spells_a_credential_is_not_kept_unless_it_is_used() {
        let credentials = Credentials::new("login".to_owned(), "hunter2".to_owned());
        let concealed = Some(Arc::new(Concealed::new(&credentials)));
        let reply = RawReply { concealed, ..ehlo_reply(["mail.test", "AUTH LOGIN HUNTER2 NTLM"]) };
        assert_eq!(Offers::read(&reply).mechanisms, ["LOGIN", "NTLM"]);
    }

    fn ehlo_reply<const N: usize>(lines: [&str; N]) -> RawReply {
        RawReply { code: 250, lines: lines.map(str::to_owned).to_vec(), concealed: None }
    }
}
