//! The records of a sender's domain, asked of a scripted name server.

use super::super::dns::{DnsServer, MailAnswer, MailQuestion};
use super::super::{AllowedPorts, EgressPolicy};
use super::*;
use crate::model::sender_records::{Findings, MailExchanger, findings};

fn egress(dns: &DnsServer, allow: &[&str]) -> Egress {
    let allow = allow.iter().map(|net| net.parse().expect("a network")).collect();
    let policy = EgressPolicy::new(allow, vec![], AllowedPorts::Any);
    Egress::new(policy, &[dns.address()]).expect("name servers are given")
}

fn found(texts: &[&str]) -> Answer<String> {
    Answer::Found(texts.iter().map(|text| (*text).to_owned()).collect())
}

/// The topics of the warnings, in order.
fn warned(findings: &Findings) -> Vec<&str> {
    findings.warnings.iter().filter_map(|warning| warning.split(':').next()).collect()
}

#[tokio::test]
async fn a_domain_in_order_is_found_to_be_so() {
    let dns = DnsServer::start().await;
    dns.script_senders_domain("acme.example");
    let records = egress(&dns, &[]).mail_records("acme.example").await;
    let exchanger = MailExchanger { preference: 10, host: "mx.acme.example".into() };
    assert_eq!(
        records,
        MailRecords {
            texts: found(&["v=spf1 include:_spf.provider.example -all"]),
            exchangers: Answer::Found(vec![exchanger]),
            dmarc: vec![found(&["v=DMARC1; p=quarantine"])],
        }
    );
    assert_eq!(findings("acme.example", &records).warnings, Vec::<String>::new());
}

#[tokio::test]
async fn a_domain_without_records_is_warned_about_each() {
    let dns = DnsServer::start().await;
    let records = egress(&dns, &[]).mail_records("bare.example").await;
    assert_eq!(warned(&findings("bare.example", &records)), ["SPF", "DMARC", "MX"]);
}

#[tokio::test]
async fn a_long_record_is_read_whole_and_in_whatever_order_records_come() {
    let dns = DnsServer::start().await;
    let long = format!("v=spf1 {}-all", "ip4:192.0.2.1 ".repeat(60));
    dns.script_mail("acme.example", MailQuestion::Text, MailAnswer::texts(&["other=1", &long]));
    let records = egress(&dns, &[]).mail_records("acme.example").await;
    let Answer::Found(texts) = records.texts else { panic!("{:?}", records.texts) };
    assert!(texts.contains(&long), "{texts:?}");
}

#[tokio::test]
async fn the_dmarc_record_of_a_parent_domain_is_found() {
    let dns = DnsServer::start().await;
    let record = MailAnswer::texts(&["v=DMARC1; p=reject; sp=quarantine"]);
    dns.script_mail("_dmarc.acme.example", MailQuestion::Text, record);
    let records = egress(&dns, &[]).mail_records("news.acme.example").await;
    let notes = findings("news.acme.example", &records).notes;
    assert!(
        notes.iter().any(|note| note.contains("found at _dmarc.acme.example, is quarantine")),
        "{notes:?}"
    );
    assert_eq!(dns.questions("_dmarc.example"), 0, "a single label is nobody's domain");
}

#[tokio::test]
async fn a_domain_in_unicode_is_asked_for_in_a_labels() {
    let dns = DnsServer::start().await;
    dns.script_senders_domain("xn--bcher-kva.example");
    let records = egress(&dns, &[]).mail_records("BÜCHER.example").await;
    assert_eq!(findings("xn--bcher-kva.example", &records).warnings, Vec::<String>::new());
}

#[tokio::test]
async fn a_domain_that_takes_no_mail_is_seen_to_say_so() {
    let dns = DnsServer::start().await;
    dns.script_mail("acme.example", MailQuestion::Exchanger, MailAnswer::exchangers(&["."]));
    let records = egress(&dns, &[]).mail_records("acme.example").await;
    let null = MailExchanger { preference: 10, host: String::new() };
    assert_eq!(records.exchangers, Answer::Found(vec![null]));
}

#[tokio::test]
async fn a_failing_name_server_is_a_warning_about_what_it_failed_at_and_no_more() {
    let dns = DnsServer::start().await;
    dns.script_senders_domain("acme.example");
    dns.script_mail("acme.example", MailQuestion::Exchanger, MailAnswer::ServerFailure);
    let records = egress(&dns, &[]).mail_records("acme.example").await;
    let findings = findings("acme.example", &records);
    assert_eq!(warned(&findings), ["MX"]);
    assert!(findings.warnings[0].contains("could not be looked up now"), "{findings:?}");
}

#[tokio::test]
async fn a_silent_name_server_costs_three_seconds_whatever_it_is_silent_about() {
    let dns = DnsServer::start().await;
    dns.script_senders_domain("a.b.c.acme.example");
    for name in ["_dmarc.a.b.c.acme.example", "_dmarc.b.c.acme.example", "_dmarc.acme.example"] {
        dns.script_mail(name, MailQuestion::Text, MailAnswer::Silence);
    }
    dns.script_mail("a.b.c.acme.example", MailQuestion::Exchanger, MailAnswer::Silence);
    let begun = Instant::now();
    let records = egress(&dns, &[]).mail_records("a.b.c.acme.example").await;
    assert!(begun.elapsed() < RECORDS_LIMIT + Duration::from_secs(2), "{:?}", begun.elapsed());
    let findings = findings("a.b.c.acme.example", &records);
    assert_eq!(warned(&findings), ["DMARC", "MX"]);
    assert!(findings.notes[0].starts_with("SPF: "), "what was answered is told: {findings:?}");
}

#[tokio::test]
async fn names_for_local_use_are_not_asked_for_and_an_alias_to_one_tells_nothing() {
    let dns = DnsServer::start().await;
    for name in ["acme", "acme.internal", "acme.local", "acme.localhost"] {
        dns.script_senders_domain(name);
        let records = egress(&dns, &[]).mail_records(name).await;
        assert_eq!(warned(&findings(name, &records)), ["SPF", "DMARC", "MX"], "{name}");
        assert_eq!(dns.questions(name) + dns.questions(&format!("_dmarc.{name}")), 0, "{name}");
    }
    let inside = MailAnswer::AliasWithTexts("db.internal".into(), vec!["v=spf1 -all".into()]);
    dns.script_mail("acme.example", MailQuestion::Text, inside);
    assert_eq!(egress(&dns, &[]).mail_records("acme.example").await.texts, Answer::None);

    // A closed installation's own names count.
    let closed = egress(&dns, &["10.0.0.0/8"]);
    assert_eq!(warned(&findings("acme.internal", &closed.mail_records("acme.internal").await)), [""; 0]);
}

#[tokio::test]
async fn what_is_no_domain_is_not_asked_for() {
    let dns = DnsServer::start().await;
    for text in ["192.0.2.1", "", "a b.example", "a..example"] {
        let records = egress(&dns, &[]).mail_records(text).await;
        assert_eq!(records, MailRecords::failed("not a domain name"), "{text:?}");
    }
}
