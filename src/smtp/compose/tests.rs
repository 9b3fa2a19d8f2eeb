//! Composed messages, read back by a parser that shares nothing with their writer.

use mail_parser::{Address, HeaderForm, Message, MessageParser, MessagePart, MimeHeaders, PartType};
use proptest::prelude::*;
use time::macros::datetime;

use super::*;
use crate::model::job::{CalendarMethod, JobKey, OnUnknown};
use crate::model::text::single_line;

const INVITE: &str = "BEGIN:VCALENDAR\r\nVERSION:2.0\r\nMETHOD:REQUEST\r\nBEGIN:VEVENT\r\nSUMMARY:Haarschnitt bei \
    Jörg – eine lange Zeile\\, die schon gefalt\r\n et ist\r\nEND:VEVENT\r\nEND:VCALENDAR\r\n";

fn job() -> Job {
    Job {
        key: JobKey { organization: None, id: Uuid::nil() },
        body_hash: [7; 32],
        kind: "booking.confirmed".into(),
        to: vec![Mailbox::parse("Ann Lee <ann@example.org>").unwrap()],
        cc: vec![],
        bcc: vec![],
        reply_to: vec![],
        subject: "Your booking".into(),
        text: Some("Hello\n".into()),
        html: None,
        calendar: None,
        attachments: vec![],
        headers: vec![],
        expires_at: None,
        group: None,
        on_unknown: OnUnknown::Resend,
    }
}

fn invite() -> Calendar {
    Calendar { method: CalendarMethod::Request, content: INVITE.into(), filename: "invite.ics".into() }
}

fn file(filename: &str, content_id: Option<&str>) -> Attachment {
    Attachment {
        filename: filename.into(),
        content_type: "image/png".into(),
        content: (0..=255).cycle().take(1000).collect(),
        content_id: content_id.map(Into::into),
    }
}

fn sender() -> Mailbox {
    Mailbox::parse("Salon Jörg <salon@example.com>").unwrap()
}

fn composed(job: &Job) -> Vec<u8> {
    let message =
        compose(job, &sender(), "<id@example.com>", datetime!(2026-03-01 8:05:09 +02:00), 1 << 24).unwrap();
    assert_wire_safe(&message);
    message
}

/// What SMTP without 8BITMIME carries unchanged.
fn assert_wire_safe(message: &[u8]) {
    assert!(message.ends_with(b"\r\n"));
    assert!(message.is_ascii() && !message.contains(&0));
    for (index, byte) in message.iter().enumerate() {
        match byte {
            b'\n' => assert_eq!(message[index - 1], b'\r', "bare LF at {index}"),
            b'\r' => assert_eq!(message[index + 1], b'\n', "bare CR at {index}"),
            _ => {}
        }
    }
    let longest =
        message.split(|byte| *byte == b'\n').map(|line| line.strip_suffix(b"\r").unwrap_or(line).len()).max();
    assert!(longest <= Some(998), "{longest:?}");
    assert!(!message.windows(6).any(|bytes| bytes == b"\nFrom "), "an mbox separator");
}

fn parsed(message: &[u8]) -> Message<'_> {
    MessageParser::default().parse(message).expect("a message")
}

fn head(message: &[u8]) -> String {
    let text = String::from_utf8(message.to_vec()).unwrap();
    text.split_once("\r\n\r\n").unwrap().0.to_owned()
}

/// Field names as they stand in the message, by our own reading of its lines.
fn header_names(message: &[u8]) -> Vec<String> {
    let head = head(message);
    let fields = head.split("\r\n").filter(|line| !line.starts_with(' '));
    fields.map(|line| line.split_once(':').expect("a field").0.to_owned()).collect()
}

fn content_type(part: &MessagePart<'_>) -> String {
    let content_type = part.content_type().unwrap();
    format!("{}/{}", content_type.ctype(), content_type.subtype().unwrap())
}

/// The tree of content types, in one line.
fn structure(message: &Message<'_>, id: u32) -> String {
    let part = message.part(id).unwrap();
    match &part.body {
        PartType::Multipart(parts) => {
            let inner: Vec<String> = parts.iter().map(|id| structure(message, *id)).collect();
            format!("{}({})", content_type(part), inner.join(" "))
        }
        _ => content_type(part),
    }
}

fn part<'m>(message: &'m Message<'m>, media_type: &str) -> &'m MessagePart<'m> {
    message.parts.iter().find(|part| content_type(part) == media_type).expect(media_type)
}

fn text_of(part: &MessagePart<'_>) -> String {
    match &part.body {
        PartType::Text(text) | PartType::Html(text) => text.to_string(),
        PartType::Binary(bytes) | PartType::InlineBinary(bytes) => String::from_utf8(bytes.to_vec()).unwrap(),
        _ => panic!("not a leaf"),
    }
}

fn free_text(message: &Message<'_>, name: &'static str) -> String {
    message.header_as(name, HeaderForm::Text)[0].as_text().unwrap().to_owned()
}

fn normal(text: &str) -> String {
    text.replace("\r\n", "\n").replace('\r', "\n").replace('\n', "\r\n")
}

fn names_and_addresses(address: Option<&Address<'_>>) -> Vec<(Option<String>, String)> {
    let Some(Address::List(list)) = address else { return vec![] };
    list.iter()
        .map(|a| (a.name.as_ref().map(ToString::to_string), a.address.as_ref().unwrap().to_string()))
        .collect()
}

#[test]
fn a_plain_text_message_is_as_short_as_it_can_be() {
    let message = String::from_utf8(composed(&job())).unwrap();
    assert_eq!(
        message,
        "Date: Sun, 01 Mar 2026 06:05:09 +0000\r\n\
         From: =?utf-8?q?Salon_J=C3=B6rg?= <salon@example.com>\r\n\
         To: Ann Lee <ann@example.org>\r\n\
         Message-ID: <id@example.com>\r\n\
         Subject: Your booking\r\n\
         Auto-Submitted: auto-generated\r\n\
         MIME-Version: 1.0\r\n\
         Content-Type: text/plain; charset=utf-8\r\n\
         Content-Transfer-Encoding: 7bit\r\n\
         \r\n\
         Hello\r\n"
    );
}

#[test]
fn every_attempt_composes_the_same_bytes() {
    let mut job = job();
    job.calendar = Some(invite());
    assert_eq!(composed(&job), composed(&job));
    let one = composed(&job);
    job.body_hash = [8; 32];
    assert_ne!(one, composed(&job), "a boundary follows from the body");
}

#[test]
fn only_the_levels_that_are_needed_are_there() {
    let png = || file("a.png", None);
    let inline = || file("b.png", Some("b"));
    for (html, calendar, files, expected) in [
        (false, false, vec![], "text/plain"),
        (true, false, vec![], "multipart/alternative(text/plain text/html)"),
        (false, false, vec![png()], "multipart/mixed(text/plain image/png)"),
        (false, false, vec![inline()], "multipart/mixed(text/plain image/png)"),
        (
            true,
            false,
            vec![inline()],
            "multipart/related(multipart/alternative(text/plain text/html) image/png)",
        ),
        (
            true,
            true,
            vec![png(), inline()],
            "multipart/mixed(multipart/related(multipart/alternative(text/plain text/html text/calendar) image/png) \
             image/png application/ics)",
        ),
        (
            false,
            true,
            vec![],
            "multipart/mixed(multipart/alternative(text/plain text/calendar) application/ics)",
        ),
    ] {
        let mut job = job();
        job.html = html.then(|| "<p>Hello <img src=\"cid:b\"></p>".into());
        job.calendar = calendar.then(invite);
        job.attachments = files;
        let bytes = composed(&job);
        assert_eq!(structure(&parsed(&bytes), 0), expected);
    }
    let mut html_only = job();
    html_only.text = None;
    html_only.html = Some("<p>".into());
    html_only.attachments = vec![inline()];
    let bytes = composed(&html_only);
    assert_eq!(structure(&parsed(&bytes), 0), "multipart/related(text/html image/png)");
    assert!(head(&bytes).contains("type=\"text/html\""));
}

#[test]
fn an_invitation_shows_accept_and_decline_and_keeps_its_folding() {
    let mut job = job();
    job.html = Some("<p>Hello</p>".into());
    job.calendar = Some(invite());
    let bytes = composed(&job);
    let message = parsed(&bytes);
    let alternative = part(&message, "text/calendar");
    let content_type = alternative.content_type().unwrap();
    assert_eq!(content_type.attribute("method"), Some("REQUEST"));
    assert_eq!(content_type.attribute("charset"), Some("utf-8"));
    assert!(alternative.content_disposition().is_none(), "an alternative is no file");
    assert_eq!(text_of(alternative), INVITE);
    let attached = part(&message, "application/ics");
    assert_eq!(attached.attachment_name(), Some("invite.ics"));
    assert_eq!(attached.content_disposition().unwrap().ctype(), "attachment");
    assert_eq!(text_of(attached), INVITE);
    job.calendar.as_mut().unwrap().content = INVITE.replace("\r\n", "\n");
    assert_eq!(composed(&job), bytes, "iCalendar's lines end with CRLF");
}

#[test]
fn an_inline_image_is_found_by_its_content_id() {
    let mut job = job();
    job.html = Some("<img src=\"cid:logo@salon\">".into());
    job.attachments = vec![file("logo.png", Some("logo@salon")), file("price list.pdf", None)];
    let bytes = composed(&job);
    let message = parsed(&bytes);
    let files: Vec<_> = message.parts.iter().filter(|part| content_type(part) == "image/png").collect();
    assert_eq!(files[0].content_id(), Some("logo@salon"));
    assert_eq!(files[0].content_disposition().unwrap().ctype(), "inline");
    assert_eq!(files[0].contents(), job.attachments[0].content);
    assert_eq!(files[1].content_id(), None);
    assert_eq!(files[1].content_disposition().unwrap().ctype(), "attachment");
    assert_eq!(files[1].attachment_name(), Some("price list.pdf"));
}

#[test]
fn bcc_is_nowhere_in_the_message() {
    let mut job = job();
    job.bcc = vec![Mailbox::parse("Hidden Person <hidden@example.net>").unwrap()];
    let text = String::from_utf8(composed(&job)).unwrap().to_lowercase();
    assert!(!text.contains("hidden") && !text.contains("bcc"));
    job.to.clear();
    let bytes = composed(&job);
    assert!(head(&bytes).contains("\r\nTo: undisclosed-recipients:;\r\n"));
    job.cc = vec![Mailbox::parse("c@example.org").unwrap()];
    assert!(!header_names(&composed(&job)).contains(&"To".to_owned()));
}

#[test]
fn everything_may_be_written_in_any_script() {
    let mut job = job();
    job.subject = "Ваша запись 予約の確認 🎉 ".repeat(20).trim().to_owned();
    job.to = vec![
        Mailbox::named("李小龍 (Bruce), \"Dragon\"", EmailAddress::parse("lee@例え.jp").unwrap()).unwrap(),
        Mailbox::named(&"Ünïcode ".repeat(40), EmailAddress::parse("b@example.org").unwrap()).unwrap(),
    ];
    job.cc = vec![
        Mailbox::named("O'Neil, Dr. \"X\" \\ Y", EmailAddress::parse("o@example.org").unwrap()).unwrap(),
    ];
    job.text = Some("Здравствуйте, 🎉\n".repeat(30));
    job.html = Some("<p>größer &amp; süß</p>".into());
    job.attachments = vec![file("Предложение и цены на 2026 год — окончательная версия.pdf", None)];
    job.calendar = Some(Calendar { filename: "招待状.ics".into(), ..invite() });
    job.headers = vec![("X-Salon".into(), "Jörgs Salon".into())];
    let bytes = composed(&job);
    let message = parsed(&bytes);
    assert_eq!(message.subject(), Some(job.subject.as_str()));
    let expected = |list: &[Mailbox]| -> Vec<_> {
        list.iter().map(|m| (m.name.clone(), m.email.as_str().to_owned())).collect()
    };
    assert_eq!(names_and_addresses(message.to()), expected(&job.to));
    assert_eq!(names_and_addresses(message.cc()), expected(&job.cc));
    assert_eq!(names_and_addresses(message.from()), expected(&[sender()]));
    assert_eq!(text_of(part(&message, "text/plain")), normal(job.text.as_ref().unwrap()));
    assert_eq!(text_of(part(&message, "text/html")), *job.html.as_ref().unwrap());
    assert_eq!(part(&message, "image/png").attachment_name(), Some(job.attachments[0].filename.as_str()));
    assert_eq!(part(&message, "application/ics").attachment_name(), Some("招待状.ics"));
    let name = part(&message, "application/ics").content_type().unwrap().attribute("name");
    assert_eq!(name, Some("招待状.ics"), "the older Outlooks read this one");
    assert_eq!(free_text(&message, "X-Salon"), "Jörgs Salon");
}

#[test]
fn lines_of_headers_stay_short() {
    let mut job = job();
    job.to =
        (0..50).map(|n| Mailbox::parse(&format!("Person {n} <person{n}@example.org>")).unwrap()).collect();
    job.subject = "word ".repeat(100).trim().to_owned();
    job.headers = vec![(
        "References".into(),
        "<0190c6a1-7b1f-7c8e-9d53-1f2a3b4c5d6e@example.org> ".repeat(40).trim().into(),
    )];
    job.attachments = vec![file(&"ö".repeat(200), None), file(&"o".repeat(200), None)];
    let bytes = composed(&job);
    let text = String::from_utf8(bytes.clone()).unwrap();
    assert!(text.lines().all(|line| line.len() <= 78), "{text}");
    let message = parsed(&bytes);
    assert_eq!(message.subject(), Some(job.subject.as_str()));
    assert_eq!(message.to().unwrap().iter().count(), 50);
    assert_eq!(message.references().as_text_list().unwrap().len(), 40);
}

#[test]
fn a_long_subject_without_spaces_is_split_and_comes_back_whole() {
    for unit in ["x", "ü", "🎉", "=", "?", "\""] {
        let mut job = job();
        job.subject = unit.repeat(2000);
        let bytes = composed(&job);
        assert!(head(&bytes).split("\r\n").all(|line| line.len() <= 78));
        assert_eq!(parsed(&bytes).subject(), Some(job.subject.as_str()), "{unit}");
    }
}

#[test]
fn what_looks_encoded_is_shown_as_it_was_written() {
    let mut job = job();
    job.subject = "Use =?utf-8?q?Bcc?= to encode".into();
    job.to = vec![Mailbox::named("=?utf-8?q?x?=", EmailAddress::parse("a@example.org").unwrap()).unwrap()];
    job.headers = vec![
        ("List-Unsubscribe".into(), "<https://example.org/u?a=?b?=c>".into()),
        ("X-Note".into(), "=?utf-8?q?x?=".into()),
    ];
    let bytes = composed(&job);
    let message = parsed(&bytes);
    assert_eq!(message.subject(), Some(job.subject.as_str()));
    assert_eq!(names_and_addresses(message.to())[0].0.as_deref(), Some("=?utf-8?q?x?="));
    assert_eq!(free_text(&message, "X-Note"), "=?utf-8?q?x?=");
    assert!(head(&bytes).contains("List-Unsubscribe: <https://example.org/u?a=?b?=c>\r\n"));
}

#[test]
fn dots_long_lines_and_odd_line_ends_survive() {
    for (text, decoded) in [
        (".\r\n..\r\n.x\r\n".to_owned(), ".\r\n..\r\n.x\r\n".to_owned()),
        ("a\nb\rc\r\n\r\rd\n\n".to_owned(), "a\r\nb\r\nc\r\n\r\n\r\nd\r\n\r\n".to_owned()),
        (format!("{}\n", "x".repeat(10_000)), format!("{}\r\n", "x".repeat(10_000))),
        (format!("{} \n", "ä".repeat(10_000)), format!("{} \r\n", "ä".repeat(10_000))),
        ("From us\nFrom here\n".to_owned(), "From us\r\nFrom here\r\n".to_owned()),
        ("trailing \t\nspace ".to_owned(), "trailing \t\r\nspace ".to_owned()),
        (String::new(), String::new()),
    ] {
        let mut job = job();
        job.text = Some(text);
        job.html = Some("<p>".into());
        let bytes = composed(&job);
        assert_eq!(text_of(part(&parsed(&bytes), "text/plain")), decoded);
    }
}

#[test]
fn the_shorter_encoding_is_chosen() {
    for (text, encoding) in [
        ("short and plain\n".repeat(50), Encoding::SevenBit),
        ("From here on\n".to_owned(), Encoding::QuotedPrintable),
        ("x".repeat(79), Encoding::QuotedPrintable),
        ("Grüße aus Köln\n".to_owned(), Encoding::QuotedPrintable),
        ("予約の確認\n".repeat(20), Encoding::Base64),
    ] {
        assert_eq!(Encoding::of_text(text.as_bytes()), encoding, "{text}");
    }
    assert_eq!(Encoding::of_exact(b"plain"), Encoding::QuotedPrintable);
}

#[test]
fn auto_submitted_is_the_publishers_when_given() {
    let mut job = job();
    job.headers = vec![("auto-submitted".into(), "no".into())];
    let names = header_names(&composed(&job));
    assert_eq!(names.iter().filter(|name| name.eq_ignore_ascii_case("Auto-Submitted")).count(), 1);
}

#[test]
fn a_message_over_the_limit_is_refused_with_both_figures() {
    let mut job = job();
    job.text = Some("x\n".repeat(1000));
    let date = datetime!(2026-01-01 0:00 UTC);
    let size = compose(&job, &sender(), "<i@d>", date, usize::MAX).unwrap().len();
    assert_eq!(compose(&job, &sender(), "<i@d>", date, size).unwrap().len(), size);
    let refused = compose(&job, &sender(), "<i@d>", date, size - 1);
    assert_eq!(refused, Err(ComposeError::TooLarge { size, limit: size - 1 }));
}

#[test]
fn only_a_non_ascii_local_part_needs_smtputf8() {
    let mut job = job();
    job.to = vec![Mailbox::parse("Jörg <j@bücher.example>").unwrap()];
    assert!(!needs_smtputf8(&job, &sender()));
    for field in 0..3 {
        let mut job = job.clone();
        let list = [&mut job.to, &mut job.bcc, &mut job.reply_to].into_iter().nth(field).unwrap();
        list.push(Mailbox::parse("jörg@example.org").unwrap());
        assert!(needs_smtputf8(&job, &sender()));
        let message = compose(&job, &sender(), "<i@d>", datetime!(2026-01-01 0:00 UTC), 10_000).unwrap();
        assert_eq!(message.is_ascii(), field == 1, "only a shown address is written");
    }
    assert!(needs_smtputf8(&job, &Mailbox::parse("jörg@example.org").unwrap()));
}

#[test]
fn the_message_id_is_made_of_the_job_and_the_sender() {
    let from = EmailAddress::parse("a@Example.ORG").unwrap();
    assert_eq!(message_id(Uuid::nil(), &from), "<00000000-0000-0000-0000-000000000000@example.org>");
}

/// Text as people and attackers write it.
fn any_text() -> impl Strategy<Value = String> {
    prop_oneof![
        any::<String>(),
        "[ -~]{0,200}",
        "([a-z]{1,90} {1,3}){0,10}",
        "[a-zäöü予約🎉 .,\"\\\\<>@;:()=?_]{0,200}",
        "(\r\n|\r|\n|\\.|Bcc: x@y.z|--=_|a b|=\\?utf-8\\?q\\?x\\?=|é| ){0,20}",
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, failure_persistence: None, ..Default::default() })]

    #[test]
    fn any_job_comes_back_as_it_was(
        subject in any_text(), name in any_text(), text in any_text(), html in any_text(),
        filename in any_text(), header in any_text(),
    ) {
        let mut job = job();
        job.subject = single_line(&subject);
        let email = EmailAddress::parse("ann@example.org").unwrap();
        job.to = vec![Mailbox::named(&name, email.clone()).unwrap_or_else(|_| Mailbox::bare(email))];
        job.text = Some(text.clone());
        job.html = Some(html.clone());
        let filename = Some(single_line(&filename)).filter(|name| !name.is_empty()).unwrap_or("a".into());
        job.attachments = vec![file(&filename, None)];
        let header = Some(single_line(&header)).filter(|value| !value.is_empty()).unwrap_or("a".into());
        job.headers = vec![("X-Any".into(), header.clone())];
        job.calendar = Some(invite());

        let bytes = composed(&job);
        let names = header_names(&bytes);
        prop_assert_eq!(names, ["Date", "From", "To", "Message-ID", "Subject", "Auto-Submitted", "X-Any",
            "MIME-Version", "Content-Type"]);
        let message = parsed(&bytes);
        prop_assert_eq!(message.headers().len(), 9);
        prop_assert_eq!(message.subject().unwrap_or_default(), job.subject.as_str());
        prop_assert_eq!(names_and_addresses(message.to()),
            [(job.to[0].name.clone(), "ann@example.org".to_owned())]);
        prop_assert_eq!(structure(&message, 0), "multipart/mixed(multipart/alternative(text/plain text/html \
            text/calendar) image/png application/ics)");
        prop_assert_eq!(text_of(part(&message, "text/plain")), normal(&text));
        prop_assert_eq!(text_of(part(&message, "text/html")), normal(&html));
        prop_assert_eq!(text_of(part(&message, "text/calendar")), INVITE);
        let attached = part(&message, "image/png");
        prop_assert_eq!(attached.attachment_name(), Some(filename.as_str()));
        prop_assert_eq!(attached.contents(), job.attachments[0].content.as_slice());
        prop_assert_eq!(free_text(&message, "X-Any"), header);
    }
}
