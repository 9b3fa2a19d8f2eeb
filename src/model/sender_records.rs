//! What the DNS says of a sender's domain, and what of it hurts delivery: SPF, DMARC, MX.
//! Guarantee: of what the DNS said nothing is repeated but the domain's own name, numbers and fixed words, and nothing
//! is claimed that a look-up cannot tell.

use super::text;

/// Levels of the tree that are asked for a DMARC record, the domain itself included (the tree walk of
/// draft-ietf-dmarc-dmarcbis, section 4.10).
const DMARC_LEVELS_MAX: usize = 8;

/// Longest shown part of a resolver's words, in bytes.
const WHY_MAX: usize = 120;

/// What one question brought.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer<T> {
    /// Records; at least one.
    Found(Vec<T>),
    /// The name does not exist, or has no such record.
    None,
    /// It could not be found out now, in the resolver's words.
    Failed(String),
}

/// One mail exchanger (RFC 5321 section 5.1).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MailExchanger {
    /// Lower comes first.
    pub preference: u16,
    /// Host name without the trailing dot; empty for the root, with which a domain says that it takes no mail (RFC 7505).
    pub host: String,
}

/// What the DNS says of a sender's domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MailRecords {
    /// Every TXT record of the domain, each with its strings joined (RFC 7208 section 3.3).
    pub texts: Answer<String>,
    /// The domain's MX records.
    pub exchangers: Answer<MailExchanger>,
    /// The TXT records under `_dmarc`, for each of [`dmarc_levels`] in that order.
    pub dmarc: Vec<Answer<String>>,
}

impl MailRecords {
    /// Nothing could be looked up.
    pub fn failed(why: &str) -> Self {
        let why = || why.to_owned();
        Self {
            texts: Answer::Failed(why()),
            exchangers: Answer::Failed(why()),
            dmarc: vec![Answer::Failed(why())],
        }
    }
}

/// What to tell about a sender's domain: each a sentence or two that begin with `SPF: `, `DMARC: `, `MX: ` or `DKIM: `.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Findings {
    /// What hurts delivery, or could not be looked up.
    pub warnings: Vec<String>,
    /// What was found, and what cannot be told from here.
    pub notes: Vec<String>,
}

/// What the owner of a domain asks receivers to do with mail that fails DMARC (RFC 7489 section 6.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Policy {
    None,
    Quarantine,
    Reject,
}

/// The names whose `_dmarc` record can be the domain's: itself, then its parents of two labels or more. Of a domain with
/// more than eight labels, itself and its last seven, and so on up.
pub fn dmarc_levels(domain: &str) -> Vec<&str> {
    let mut levels = vec![domain];
    let mut rest = domain;
    while let Some((_, parent)) = rest.split_once('.').filter(|(_, parent)| parent.contains('.')) {
        rest = parent;
        if rest.split('.').count() < DMARC_LEVELS_MAX {
            levels.push(rest);
        }
    }
    levels
}

/// What of a domain's records is worth telling. `domain` is in A-labels, as it was asked for.
pub fn findings(domain: &str, records: &MailRecords) -> Findings {
    let mut findings = Findings::default();
    spf(domain, &records.texts, &mut findings);
    dmarc(domain, &records.dmarc, &mut findings);
    exchangers(domain, &records.exchangers, &mut findings);
    findings.notes.push(format!(
        "DKIM: whether mail from {domain} is signed cannot be checked here: its record is found only by a selector that \
         the provider chooses. Switch DKIM on for {domain} at the provider."
    ));
    findings
}

fn spf(domain: &str, texts: &Answer<String>, findings: &mut Findings) {
    let found = match texts {
        Answer::Failed(why) => return findings.not_looked_up("SPF", why),
        Answer::None => 0,
        Answer::Found(texts) => texts.iter().filter(|text| is_spf(text)).count(),
    };
    match found {
        0 => findings.warnings.push(format!(
            "SPF: {domain} has no SPF record. Publish a TXT record that begins with v=spf1 and covers the server as its \
             provider says, or mail may be taken for spam."
        )),
        1 => findings.notes.push(format!(
            "SPF: {domain} has one SPF record. Whether it covers this server cannot be told from here: mail reaches its \
             recipients from other addresses than the one that takes it in."
        )),
        count => findings.warnings.push(format!(
            "SPF: {domain} has {count} SPF records, which receivers treat as an error (permerror), so that none counts. \
             Merge them into one."
        )),
    }
}

/// RFC 7208 section 4.5: the version is followed by a space or the end.
fn is_spf(text: &str) -> bool {
    let version = text.split(' ').next().unwrap_or_default();
    version.eq_ignore_ascii_case("v=spf1")
}

fn dmarc(domain: &str, levels: &[Answer<String>], findings: &mut Findings) {
    let mut too_many = false;
    for (name, answer) in dmarc_levels(domain).into_iter().zip(levels) {
        let records: Vec<&String> = match answer {
            Answer::Failed(why) => return findings.not_looked_up("DMARC", why),
            Answer::None => continue,
            Answer::Found(texts) => texts.iter().filter(|text| is_dmarc(text)).collect(),
        };
        match records.as_slice() {
            [] => {}
            [record] => return findings.dmarc_record(domain, name, record),
            several => {
                too_many = true;
                findings.warnings.push(format!(
                    "DMARC: _dmarc.{name} has {} DMARC records, so that receivers take none of them. Keep one.",
                    several.len()
                ));
            }
        }
    }
    if too_many {
        return;
    }
    let where_not = if domain.matches('.').count() > 1 { "and its parent domains have" } else { "has" };
    findings.warnings.push(format!(
        "DMARC: {domain} {where_not} no usable DMARC record. Publish a TXT record at _dmarc.{domain}, to begin with: \
         v=DMARC1; p=none"
    ));
}

/// RFC 7489 section 6.3: the version comes first and is compared exactly.
fn is_dmarc(text: &str) -> bool {
    let first = text.split(';').next().unwrap_or_default();
    first
        .split_once('=')
        .is_some_and(|(tag, value)| tag.trim().eq_ignore_ascii_case("v") && value.trim() == "DMARC1")
}

/// A tag's value. Of a tag that is given twice, the first counts.
fn tag<'a>(record: &'a str, name: &str) -> Option<&'a str> {
    record.split(';').find_map(|part| {
        let (tag, value) = part.split_once('=')?;
        tag.trim().eq_ignore_ascii_case(name).then(|| value.trim())
    })
}

impl Policy {
    fn read(value: &str) -> Option<Self> {
        [(Self::None, "none"), (Self::Quarantine, "quarantine"), (Self::Reject, "reject")]
            .into_iter()
            .find_map(|(policy, name)| value.eq_ignore_ascii_case(name).then_some(policy))
    }

    fn in_words(self) -> &'static str {
        match self {
            Self::None => "none (receivers do nothing special with mail that fails)",
            Self::Quarantine => "quarantine (mail that fails is treated as spam)",
            Self::Reject => "reject (mail that fails is refused)",
        }
    }
}

impl Findings {
    fn not_looked_up(&mut self, topic: &str, why: &str) {
        let why = text::bounded(&text::single_line(why), WHY_MAX);
        self.warnings.push(format!("{topic}: could not be looked up now ({why}). Test again in a minute."));
    }

    /// RFC 7489 section 6.6.3: a subdomain without a record goes by its parent's `sp`, or else its `p`; a record without a
    /// usable policy counts as `none` where it says where reports go, and not at all otherwise.
    fn dmarc_record(&mut self, domain: &str, name: &str, record: &str) {
        let inherited = (domain != name).then(|| tag(record, "sp")).flatten();
        let policy = Policy::read(inherited.or_else(|| tag(record, "p")).unwrap_or_default());
        let policy = policy.or_else(|| tag(record, "rua").is_some().then_some(Policy::None));
        match policy {
            Some(policy) => self.notes.push(format!(
                "DMARC: the policy for {domain}, found at _dmarc.{name}, is {}.",
                policy.in_words()
            )),
            None => self.warnings.push(format!(
                "DMARC: the record at _dmarc.{name} has no policy that receivers understand. Its p must be none, \
                 quarantine or reject."
            )),
        }
    }
}

fn exchangers(domain: &str, exchangers: &Answer<MailExchanger>, findings: &mut Findings) {
    match exchangers {
        Answer::Failed(why) => findings.not_looked_up("MX", why),
        Answer::None => findings.warnings.push(format!(
            "MX: {domain} has no MX record, so that replies and bounces may not arrive, and some receivers refuse its mail."
        )),
        Answer::Found(found) if found.iter().all(|exchanger| exchanger.host.is_empty()) => {
            findings.warnings.push(format!(
                "MX: {domain} says that it takes no mail (a null MX): replies and bounces cannot arrive, and some receivers \
                 refuse its mail."
            ));
        }
        Answer::Found(_) => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(texts: &[&str]) -> Answer<String> {
        Answer::Found(texts.iter().map(|text| (*text).to_owned()).collect())
    }

    fn exchanger(host: &str) -> MailExchanger {
        MailExchanger { preference: 10, host: host.to_owned() }
    }

    /// A domain with nothing to complain about.
    fn good() -> MailRecords {
        MailRecords {
            texts: found(&["v=spf1 include:_spf.example.net -all", "google-site-verification=x"]),
            exchangers: Answer::Found(vec![exchanger("mx.example.org")]),
            dmarc: vec![found(&["v=DMARC1; p=reject"])],
        }
    }

    /// The warnings and notes on one topic of `a.example.org`, one after the other.
    fn told(topic: &str, records: &MailRecords) -> (usize, String) {
        let findings = findings("a.example.org", records);
        let of_topic = |lines: Vec<String>| -> Vec<String> {
            lines.into_iter().filter(|line| line.starts_with(&format!("{topic}: "))).collect()
        };
        let (warnings, notes) = (of_topic(findings.warnings), of_topic(findings.notes));
        (warnings.len(), [warnings, notes].concat().join("\n"))
    }

    #[test]
    fn a_good_domain_has_no_warning_and_three_notes() {
        let findings = findings("example.org", &good());
        assert_eq!(findings.warnings, Vec::<String>::new());
        let topics: Vec<_> = findings.notes.iter().filter_map(|note| note.split(':').next()).collect();
        assert_eq!(topics, ["SPF", "DMARC", "DKIM"]);
    }

    #[test]
    fn spf_is_one_record_with_the_version_as_its_first_word() {
        let failed = || Answer::Failed("no answer within 3 s".into());
        for (texts, warnings, words) in [
            (Answer::None, 1, "no SPF record"),
            (found(&["v=spf10 -all", "spf1", " v=spf1", "v=spf1;-all", "v=spf2.0/pra"]), 1, "no SPF record"),
            (found(&["v=spf1"]), 0, "cannot be told from here"),
            (found(&["V=SPF1 mx -all", "else"]), 0, "one SPF record"),
            (found(&["v=spf1 -all", "v=spf1 mx -all"]), 1, "2 SPF records"),
            (failed(), 1, "could not be looked up now (no answer within 3 s)"),
        ] {
            let what = format!("{texts:?}");
            let (count, told) = told("SPF", &MailRecords { texts, ..good() });
            assert_eq!(count, warnings, "{what}: {told}");
            assert!(told.contains(words), "{what}: {told}");
        }
    }

    #[test]
    fn dmarc_is_looked_for_up_the_tree_and_told_with_its_policy_and_place() {
        let failed = || Answer::Failed("the name server answered: Server Failure".into());
        let none = || Answer::None;
        for (dmarc, warnings, words) in [
            (vec![found(&["v=DMARC1; p=none"]), none()], 0, "found at _dmarc.a.example.org, is none"),
            (vec![found(&["V = DMARC1 ;P= Reject "]), none()], 0, "is reject"),
            (
                vec![none(), found(&["v=DMARC1; p=quarantine"])],
                0,
                "found at _dmarc.example.org, is quarantine",
            ),
            (
                vec![none(), found(&["v=DMARC1; p=reject; sp=none"])],
                0,
                "found at _dmarc.example.org, is none",
            ),
            (vec![found(&["v=DMARC1; p=reject; sp=none"]), none()], 0, "is reject"),
            (vec![none(), none()], 1, "no usable DMARC record"),
            (vec![found(&["v=dmarc1; p=none", "p=none; v=DMARC1", "v=DMARC12"]), none()], 1, "no usable"),
            (vec![found(&["v=DMARC1; p=none", "v=DMARC1; p=reject"]), none()], 1, "has 2 DMARC records"),
            (
                vec![found(&["v=DMARC1; p=none", "v=DMARC1"]), found(&["v=DMARC1; p=reject"])],
                1,
                "found at _dmarc.example.org, is reject",
            ),
            (vec![found(&["v=DMARC1; p=<script>"]), none()], 1, "has no policy that receivers understand"),
            (vec![found(&["v=DMARC1"]), none()], 1, "has no policy"),
            (vec![found(&["v=DMARC1; p=x; rua=mailto:d@example.org"]), none()], 0, "is none"),
            (vec![none(), failed()], 1, "could not be looked up now"),
            (vec![failed(), found(&["v=DMARC1; p=reject"])], 1, "could not be looked up now"),
            (vec![found(&["v=DMARC1; p=reject"]), failed()], 0, "is reject"),
        ] {
            let what = format!("{dmarc:?}");
            let (count, told) = told("DMARC", &MailRecords { dmarc, ..good() });
            assert_eq!(count, warnings, "{what}: {told}");
            assert!(told.contains(words), "{what}: {told}");
            assert!(!told.contains("script") && !told.contains("mailto"), "{told}");
        }
    }

    #[test]
    fn a_domain_that_takes_no_mail_is_warned_about() {
        for (exchangers, warnings, words) in [
            (Answer::Found(vec![exchanger("mx.example.org")]), 0, ""),
            (Answer::Found(vec![exchanger("mx.example.org"), exchanger("")]), 0, ""),
            (Answer::Found(vec![exchanger("")]), 1, "null MX"),
            (Answer::None, 1, "no MX record"),
            (Answer::Failed("no answer within 3 s".into()), 1, "could not be looked up now"),
        ] {
            let what = format!("{exchangers:?}");
            let (count, told) = told("MX", &MailRecords { exchangers, ..good() });
            assert_eq!(count, warnings, "{what}: {told}");
            assert!(told.contains(words), "{what}: {told}");
        }
    }

    #[test]
    fn the_tree_is_walked_to_two_labels_and_over_eight_levels_at_most() {
        for (domain, levels) in [
            ("example.org", &["example.org"][..]),
            ("a.example.org", &["a.example.org", "example.org"]),
            ("a.b.example.org", &["a.b.example.org", "b.example.org", "example.org"]),
            ("org", &["org"]),
        ] {
            assert_eq!(dmarc_levels(domain), levels, "{domain}");
        }
        let deep = dmarc_levels("a.b.c.d.e.f.g.h.i.j.example.org");
        assert_eq!(
            (deep.len(), deep[0], deep[1]),
            (7, "a.b.c.d.e.f.g.h.i.j.example.org", "f.g.h.i.j.example.org")
        );
        assert_eq!(dmarc_levels("a.b.c.d.e.f.example.org").len(), 7, "all levels of eight labels");
    }
}
