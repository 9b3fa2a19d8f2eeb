//! What version 1 takes and what it refuses, and in which words.

use std::collections::BTreeSet;
use std::sync::LazyLock;

use boon::{Compiler, SchemaIndex, Schemas};
use proptest::prelude::*;
use serde_json::{Value, json};
use time::macros::datetime;

use super::*;
use crate::model::job::{CalendarMethod, OnUnknown};
use crate::model::organization::OrganizationId;

const LIMITS: WireLimits = WireLimits { max_recipients: 5, max_message_bytes: 20_000 };
const ID: &str = "0190c6a1-7b1f-7c8e-9d53-1f2a3b4c5d6e";
const INVITE: &str = "BEGIN:VCALENDAR\r\nVERSION:2.0\r\nMETHOD:REQUEST\r\nEND:VCALENDAR\r\n";

fn minimal() -> Value {
    json!({"version": 1, "id": ID, "kind": "booking.confirmed", "to": ["ann@example.org"], "subject": "Hello",
           "text": "Hi"})
}

fn with(field: &str, value: Value) -> Value {
    let mut body = minimal();
    body[field] = value;
    body
}

fn without(field: &str) -> Value {
    let mut body = minimal();
    body.as_object_mut().unwrap().remove(field);
    body
}

fn file(field: &str, value: Value) -> Value {
    let mut file = json!({"filename": "a.pdf", "content_type": "application/pdf", "content_base64": "aGk="});
    file[field] = value;
    with("attachments", json!([file]))
}

fn calendar(method: &str, content: &str) -> Value {
    with("calendar", json!({"method": method, "content": content}))
}

fn header(name: &str, value: impl Into<Value>) -> Value {
    let mut headers = json!({});
    headers[name] = value.into();
    with("headers", headers)
}

/// The published schema, compiled by a validator that shares no code with the reader.
static SCHEMA: LazyLock<(Schemas, SchemaIndex)> = LazyLock::new(|| {
    let mut schemas = Schemas::new();
    let mut compiler = Compiler::new();
    compiler.enable_format_assertions();
    compiler.add_resource("urn:job", job_schema(&LIMITS)).unwrap();
    let compiled = compiler.compile("urn:job", &mut schemas).unwrap_or_else(|error| panic!("{error:#}"));
    (schemas, compiled)
});

/// What the schema cannot express, in the reader's words.
const BEYOND_THE_SCHEMA: &[&str] = &[
    "recipients are given, at most",
    "the message has at least",
    "is the same as another attachment's",
    "is given twice",
    "has another METHOD",
    "calendar.content: has no METHOD",
    // Empty only once its line break is gone.
    "calendar.filename: must be 1 to 255 characters",
    "headers.X-A: must not be empty",
    "has more than 900 bytes without a space",
    "must be ASCII",
    "is not base64 (its padding)",
    "content_type: has a parameter that is not name=value",
    "content_type: must not have the parameter `name`",
    "is not an email address of the form",
    "has a character before the @",
    "has a domain that is not a host name",
    // In a text with a name, whose own control characters become spaces.
    "to[0]: contains a control character",
    // 1.0 is an integer of JSON Schema's.
    "not a number with a fraction or an exponent",
];

fn by_the_schema(body: &Value) -> Result<(), String> {
    SCHEMA.0.validate(body, SCHEMA.1).map_err(|error| format!("{error:#}"))
}

/// Reads a body, and has the schema judge it too: it takes all that the reader takes, and refuses what can be expressed.
fn parse(body: &Value) -> Result<Job, Refusal> {
    let parsed = parse_job(&serde_json::to_vec(body).unwrap(), &LIMITS);
    match (&parsed, by_the_schema(body)) {
        (Ok(_), verdict) => assert_eq!(verdict, Ok(()), "{body}"),
        (Err(refusal), Ok(())) => {
            let detail = &refusal.detail;
            assert!(
                BEYOND_THE_SCHEMA.iter().any(|words| detail.contains(words)),
                "the schema takes it: {detail}"
            );
        }
        (Err(_), Err(_)) => {}
    }
    parsed
}

fn told(body: &Value) -> Told {
    tell(&serde_json::to_vec(body).unwrap())
}

fn accepted(body: &Value) -> Job {
    let job = parse(body).unwrap_or_else(|refusal| panic!("{body}: {refusal:?}"));
    let (key, kind) = (Some(job.key.clone()), Some(job.kind.clone()));
    let same =
        Told { id: Some(job.key.id), key, kind, expires_at: job.expires_at, revision: job.group.clone() };
    assert_eq!(told(body), same, "{body}");
    job
}

fn refused(body: &Value) -> Refusal {
    let refusal = parse(body).expect_err(&body.to_string());
    assert!(refusal.detail.len() <= DETAIL_MAX, "{}", refusal.detail);
    assert!(!refusal.detail.contains("does not have the shape"), "unexplained: {body}");
    let Told { id, key, kind, .. } = told(body);
    assert_eq!((&id, &key, &kind), (&refusal.id, &refusal.key, &refusal.kind), "{body}");
    refusal
}

#[test]
fn every_field_reaches_the_job() {
    let job = accepted(&json!({
        "version": 1, "id": ID, "organization_id": 42, "kind": "booking.confirmed",
        "to": ["ann@example.org", "Bob <bob@example.org>"], "cc": [{"email": "c@example.org", "name": "C, D"}],
        "bcc": [{"email": "d@example.org"}], "reply_to": ["r@example.org"], "subject": "Hello\r\nBcc: x@y.z",
        "text": "a\u{0}b\tc\r\n", "html": "<p>ä</p>", "calendar": {"method": "REQUEST", "content": INVITE},
        "attachments": [{"filename": "a\nb.png", "content_type": "image/png; x=\"a;b\"; y=c",
                         "content_base64": "aGVs\r\nbG8=", "content_id": "logo@x"}],
        "headers": {"x-Tenant": "ä\r\nb", "References": "<a@b> <c@d>"}, "expires_at": "2026-01-31T12:00:00+01:00",
        "group": "uid-1", "sequence": 3, "on_unknown": "hold"
    }));
    let shown = |list: &[crate::model::address::Mailbox]| -> Vec<String> {
        list.iter().map(|m| format!("{}|{}", m.name.as_deref().unwrap_or(""), m.email.as_str())).collect()
    };
    assert_eq!(job.key.to_string(), format!("42/{ID}"));
    assert_eq!(shown(&job.to), ["|ann@example.org", "Bob|bob@example.org"]);
    assert_eq!(
        (shown(&job.cc), shown(&job.bcc)),
        (vec!["C, D|c@example.org".into()], vec!["|d@example.org".into()])
    );
    assert_eq!(shown(&job.reply_to), ["|r@example.org"]);
    assert_eq!(job.subject, "Hello Bcc: x@y.z");
    assert_eq!((job.text.as_deref(), job.html.as_deref()), (Some("ab\tc\r\n"), Some("<p>ä</p>")));
    let invite = job.calendar.unwrap();
    assert_eq!((invite.method, invite.filename.as_str()), (CalendarMethod::Request, "invite.ics"));
    assert_eq!(invite.content, INVITE);
    let file = &job.attachments[0];
    assert_eq!((file.filename.as_str(), file.content.as_slice()), ("a b.png", b"hello".as_slice()));
    assert_eq!(file.content_id.as_deref(), Some("logo@x"));
    assert_eq!(job.headers, [("References".into(), "<a@b> <c@d>".into()), ("x-Tenant".into(), "ä b".into())]);
    assert_eq!(job.expires_at, Some(datetime!(2026-01-31 11:00 UTC)));
    assert_eq!(job.group.map(|r| (r.group, r.sequence)), Some(("uid-1".into(), 3)));
    assert_eq!(job.on_unknown, OnUnknown::Hold);
}

#[test]
fn what_may_be_left_out_may_be_null() {
    let mut body = minimal();
    for field in ["organization_id", "cc", "bcc", "reply_to", "html", "calendar", "attachments", "headers"]
        .into_iter()
        .chain(["expires_at", "group", "sequence", "on_unknown"])
    {
        body[field] = Value::Null;
    }
    let job = accepted(&body);
    assert_eq!((job.key.organization, job.on_unknown), (None, OnUnknown::Resend));
    assert!(
        accepted(&with("expires_at", json!("2001-01-01T00:00:00Z")))
            .is_expired(datetime!(2026-01-01 0:00 UTC))
    );
}

#[test]
fn the_hash_is_that_of_the_body_as_published() {
    let body = serde_json::to_vec(&minimal()).unwrap();
    let spaced = [b" ".as_slice(), &body].concat();
    let (one, other) = (parse_job(&body, &LIMITS).unwrap(), parse_job(&spaced, &LIMITS).unwrap());
    assert_eq!(one.body_hash, <[u8; 32]>::from(Sha256::digest(&body)));
    assert_ne!(one.body_hash, other.body_hash);
}

#[test]
fn a_value_of_the_wrong_shape_is_named_by_its_path() {
    for (body, detail) in [
        (json!([]), "the body: must be an object, not an array"),
        (without("version"), "version: is missing; it must be the integer 1"),
        (with("version", json!("1")), "version: must be the integer 1, not a string"),
        (with("version", json!(1.0)), "version: must be the integer 1, not a number with a fraction"),
        (with("version", json!(null)), "version: must be the integer 1, not null"),
        (without("id"), "id: is missing; it must be a UUID"),
        (with("id", json!("7")), "id: must be a UUID in a string, not this string"),
        (without("kind"), "kind: is missing"),
        (without("subject"), "subject: is missing"),
        (with("organization_id", json!("a b")), "organization_id: must be an integer, a string of 1 to 64"),
        (with("organization_id", json!(1.5)), "organization_id: must be an integer"),
        (with("to", json!("ann@example.org")), "to: must be an array, not a string"),
        (with("to", json!(["a@b.c", 7])), "to[1]: must be a mailbox"),
        (with("to", json!([{"name": "Ann"}])), "to[0].email: is missing"),
        (
            with("to", json!([{"email": "a@b.c", "nmae": "Ann"}])),
            "to[0]: unknown field `nmae`; did you mean `name`?",
        ),
        (with("recipients", json!([])), "the body: unknown field `recipients`; known are version, id,"),
        (with("Subject", json!("x")), "unknown field `Subject`; did you mean `subject`?"),
        (with("attachment", json!([])), "unknown field `attachment`; did you mean `attachments`?"),
        (with("text", json!(["x"])), "text: must be a string, not an array"),
        (
            with("calendar", json!({"method": "request", "content": ""})),
            "calendar.method: must be one of REQUEST, ",
        ),
        (with("calendar", json!({"method": "REQUEST"})), "calendar.content: is missing"),
        (file("content_base64", json!(null)), "attachments[0].content_base64: must be a string, not null"),
        (file("size", json!(1)), "attachments[0]: unknown field `size`"),
        (header("X-A", 7), "headers.X-A: must be a string, not an integer"),
        (with("headers", json!([])), "headers: must be an object whose values are strings, not an array"),
        (with("expires_at", json!("tomorrow")), "expires_at: must be an RFC 3339 time"),
        (with("expires_at", json!("2026-01-31 12:00")), "expires_at: must be an RFC 3339 time"),
        (with("sequence", json!(1.0)), "sequence: must be an integer from 0"),
        (with("sequence", json!(18_446_744_073_709_551_615_u64)), "not an integer out of range"),
        (with("on_unknown", json!("Hold")), "on_unknown: must be one of resend, hold"),
    ] {
        let refusal = refused(&body);
        assert!(refusal.detail.contains(detail), "{body}\n{}\n{detail}", refusal.detail);
        assert_eq!(refusal.reason, Reason::Malformed, "{body}");
    }
}

#[test]
fn a_value_that_version_1_does_not_allow_is_named_by_its_path() {
    let subject = "x".repeat(5001);
    for (body, detail) in [
        (with("kind", json!("Booking")), "kind: must be 1 to 64 characters"),
        (with("kind", json!("")), "kind: "),
        (without("to"), "to, cc, bcc: at least one recipient"),
        (
            with("cc", json!(["a@b.c", "b@b.c", "c@b.c", "d@b.c", "e@b.c"])),
            "6 recipients are given, at most 5",
        ),
        (without("text"), "text, html: at least one"),
        (with("to", json!(["a@b.c", "nobody"])), "to[1]: is not an email address"),
        (with("cc", json!([{"email": "a@b.c\r\nBcc: x@y.z"}])), "cc[0].email: contains a control character"),
        (
            with("bcc", json!([{"email": "a@b.c", "name": "x".repeat(513)}])),
            "bcc[0].name: has a display name",
        ),
        (with("reply_to", json!(["a@localhost"])), "reply_to[0]: has a domain"),
        (
            with("reply_to", json!(["a@b.c", "a@b.c", "a@b.c", "a@b.c", "a@b.c", "a@b.c"])),
            "reply_to: 6 mailboxes",
        ),
        (with("subject", json!(subject)), "subject: is longer than 5000 characters"),
        (calendar("CANCEL", INVITE), "calendar.method: is CANCEL, but the content has another METHOD"),
        (calendar("REQUEST", "METHOD:REQUEST"), "calendar.content: must begin with BEGIN:VCALENDAR"),
        (calendar("REQUEST", "BEGIN:VCALENDAR\nEND:VCALENDAR"), "calendar.content: has no METHOD"),
        (
            with("calendar", json!({"method": "REQUEST", "content": INVITE, "filename": "\n"})),
            "calendar.filename: ",
        ),
        (file("filename", json!("")), "attachments[0].filename: must be 1 to 255 characters"),
        (
            file("content_base64", json!("a-_=")),
            "attachments[0].content_base64: is not base64 (at character 1,",
        ),
        (file("content_base64", json!("aGk")), "attachments[0].content_base64: is not base64 (its padding)"),
        (file("content_base64", json!("aG k=")), "attachments[0].content_base64: is not base64"),
        (file("content_type", json!("pdf")), "attachments[0].content_type: must be a type/subtype"),
        (file("content_type", json!("a/b\r\nX: y")), "attachments[0].content_type: must be a type/subtype"),
        (file("content_type", json!("a/b; c")), "attachments[0].content_type: has a parameter"),
        (file("content_type", json!("a/b; c=\"d")), "attachments[0].content_type: has a parameter"),
        (file("content_type", json!("a/b;")), "attachments[0].content_type: has a parameter"),
        (file("content_type", json!("a/b; c=\"d\"e=f")), "attachments[0].content_type: has a parameter"),
        (
            file("content_type", json!("a/b; name=x")),
            "attachments[0].content_type: must not have the parameter `name`",
        ),
        (
            file("content_type", json!("Multipart/mixed")),
            "attachments[0].content_type: must not be multipart/*",
        ),
        (file("content_type", json!("message/rfc822")), "attachments[0].content_type: must not be message/*"),
        (
            file("content_id", json!("<logo>")),
            "attachments[0].content_id: must be given without angle brackets",
        ),
        (file("content_id", json!("a b")), "attachments[0].content_id: must be 1 to 200 characters"),
        (file("content_id", json!("")), "attachments[0].content_id: must be 1 to 200 characters"),
        (header("Bcc", "x@y.z"), "headers.Bcc: is not allowed; allowed are X-*, List-*"),
        (header("Subject", "x"), "headers.Subject: is not allowed"),
        (header("X-", "x"), "headers.X-: is not allowed"),
        (header("List-", "x"), "headers.List-: is not allowed"),
        (header("X-A:b", "x"), "headers.X-A:b: the name must be of printable ASCII"),
        (header("X-A\r\nBcc", "x"), "headers.X-A Bcc: the name must be of printable ASCII"),
        (header("X-Ä", "x"), "the name must be of printable ASCII"),
        (header(&format!("X-{}", "a".repeat(75)), "x"), "the name is longer than 76 characters"),
        (header("x-smtpapi", "{}"), "headers.x-smtpapi: is not allowed: it commands a mail provider"),
        (header("X-MC-BccAddress", "x@y.z"), "it commands a mail provider"),
        (header("X-Mailgun-Rewrite-Sender-Header", "x"), "it commands a mail provider"),
        (header("X-SES-Source-Arn", "x"), "it commands a mail provider"),
        (header("X-MSYS-API", "x"), "it commands a mail provider"),
        (header("X-A", "\r\n"), "headers.X-A: must not be empty"),
        (header("X-A", "a".repeat(901)), "headers.X-A: has more than 900 bytes without a space"),
        (header("X-A", "a ".repeat(5000)), "headers.X-A: is longer than 8192 bytes"),
        (header("References", "<ä@b.c>"), "headers.References: must be ASCII"),
        (with("headers", json!({"X-A": "1", "x-a": "2"})), "headers.x-a: is given twice"),
        (with("group", json!("g")), "sequence: must be given together with group"),
        (with("sequence", json!(1)), "group: must be given together with sequence"),
    ] {
        let refusal = refused(&body);
        assert!(refusal.detail.contains(detail), "{body}\n{}\n{detail}", refusal.detail);
        assert_eq!(refusal.reason, Reason::Malformed, "{body}");
    }
    let mut body = with("sequence", json!(-1));
    body["group"] = json!("g");
    assert!(refused(&body).detail.starts_with("sequence: must be an integer of at least 0"));
    for group in ["", "a\nb", &"x".repeat(256)] {
        let mut body = with("sequence", json!(1));
        body["group"] = json!(group);
        assert!(refused(&body).detail.starts_with("group: must be 1 to 255 characters"), "{group}");
    }
    let file = json!({"filename": "a", "content_type": "image/png", "content_base64": "", "content_id": "a"});
    let refusal = refused(&with("attachments", json!([file, file])));
    assert!(refusal.detail.starts_with("attachments[1].content_id: is the same"), "{}", refusal.detail);
    let many: serde_json::Map<String, Value> = (0..51).map(|n| (format!("X-{n}"), json!("v"))).collect();
    assert!(refused(&with("headers", Value::Object(many))).detail.starts_with("headers: 51 are given"));
}

#[test]
fn what_is_not_json_is_named_by_line_and_column() {
    for (body, detail) in [
        (b"".as_slice(), "the body is not JSON: EOF while parsing a value at line 1 column 0"),
        (b"{\n  \"version\": 1,\n}", "line 3 column 1"),
        (b"{\"version\": 1} x", "trailing characters at line 1 column 16"),
        (b"{\"subject\": \"\xff\"}", "the body is not UTF-8: bad byte at offset 13"),
        (b"{\"subject\": \"\\ud800\"}", "line 1 column 20"),
        (b"{\"subject\": \"a\nb\"}", "control character"),
        ("[".repeat(100_000).as_bytes(), "EOF while parsing a list at line 1"),
    ] {
        let refusal = parse_job(body, &LIMITS).unwrap_err();
        assert!(refusal.detail.contains(detail), "{}", refusal.detail);
        assert_eq!((refusal.reason, refusal.key), (Reason::Malformed, None));
    }
}

#[test]
fn a_repeated_field_is_refused() {
    for (field, place) in [("\"kind\": \"b\"", "kind: is given twice"), ("\"to\": []", "to: is given twice")]
    {
        let text = minimal().to_string();
        let body = format!("{}, {field}}}", &text[..text.len() - 1]);
        assert_eq!(parse_job(body.as_bytes(), &LIMITS).unwrap_err().detail, place);
    }
    let body = minimal()
        .to_string()
        .replace("[\"ann@example.org\"]", "[{\"email\": \"a@b.c\", \"email\": \"d@e.f\"}]");
    assert_eq!(parse_job(body.as_bytes(), &LIMITS).unwrap_err().detail, "to[0].email: is given twice");
}

#[test]
fn another_version_is_told_apart_even_with_fields_of_its_own() {
    let mut body = with("version", json!(2));
    assert_eq!(refused(&body).reason, Reason::UnsupportedVersion);
    body["priority"] = json!({"new": true});
    body["subject"] = json!(["new"]);
    let refusal = refused(&body);
    assert_eq!(
        (refusal.reason, refusal.detail.as_str()),
        (Reason::UnsupportedVersion, "version: 2 is not supported; 1 is")
    );
    assert_eq!(refusal.key.unwrap().to_string(), format!("platform/{ID}"));
}

#[test]
fn a_refusal_says_whose_job_it_is_where_that_can_be_read() {
    let mut body = with("organization_id", json!("42"));
    body["subject"] = json!(7);
    let refusal = refused(&body);
    assert_eq!(refusal.key.unwrap().to_string(), format!("42/{ID}"));
    assert_eq!(refusal.kind.as_deref(), Some("booking.confirmed"));
    body["organization_id"] = json!("a b");
    body["kind"] = json!("No Slug");
    let refusal = refused(&body);
    assert_eq!((refusal.id, refusal.key, refusal.kind), (ID.parse().ok(), None, None));
    let refusal = refused(&with("to", json!(["nobody"])));
    assert_eq!(refusal.key.unwrap().to_string(), format!("platform/{ID}"));
}

#[test]
fn content_that_cannot_fit_is_too_large_at_once() {
    for body in [
        with("text", json!("x".repeat(20_001))),
        file("content_base64", json!("AAAA".repeat(5_001))),
        calendar("REQUEST", &format!("{INVITE}{}", "X".repeat(10_000))),
    ] {
        let refusal = refused(&body);
        assert_eq!(refusal.reason, Reason::TooLarge);
        assert!(refusal.detail.ends_with("at most 20000 are allowed"), "{}", refusal.detail);
    }
    accepted(&with("text", json!("x".repeat(20_000))));
}

#[test]
fn a_refusal_repeats_neither_addresses_nor_content() {
    let secret = "secret-person@example.org";
    for body in [
        with("to", json!([format!("{secret}\0")])),
        with("to", json!([[secret]])),
        with("id", json!(secret)),
        with("sequence", json!(secret)),
        with("on_unknown", json!(secret)),
        with(secret, json!(1)),
        header(secret, "x"),
        header("References", format!("ä {secret}")),
    ] {
        let detail = refused(&body).detail;
        assert!(!detail.contains("secret-person"), "{detail}");
    }
}

#[test]
fn what_is_written_is_read_back() {
    let mut body = JobBody::new(ID.parse().unwrap(), "booking.confirmed", "Hello");
    body.to = vec![
        MailboxBody::Text("Ann <ann@example.org>".into()),
        MailboxBody::Full { email: "bob@example.org".into(), name: None },
    ];
    body.html = Some("<p>Hi</p>".into());
    body.headers = vec![("X-B".into(), "2".into()), ("X-A".into(), "1".into())];
    body.expires_at = Some(datetime!(2030-01-01 0:00 UTC));
    body.calendar =
        Some(CalendarBody { method: CalendarMethod::Request, content: INVITE.into(), filename: None });
    let job = parse_job(&body.to_json().unwrap(), &LIMITS).unwrap();
    assert_eq!(job.recipient_count(), 2);
    assert_eq!(job.headers, body.headers);
    assert_eq!(job.expires_at, body.expires_at);
}

/// JSON values of every kind, small.
fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        "[a-z@. <>]{0,12}".prop_map(Value::from),
    ];
    leaf.prop_recursive(2, 8, 3, |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..3).prop_map(Value::from),
            proptest::collection::hash_map("email|name|method|content|x", inner, 0..3)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..Default::default() })]

    #[test]
    fn whatever_is_refused_is_explained(
        field in "version|id|organization_id|kind|to|cc|subject|text|calendar|attachments|headers|expires_at|group|sequence|on_unknown|other",
        value in any_json(),
    ) {
        if let Err(refusal) = parse(&with(&field, value)) {
            prop_assert!(refusal.detail.len() <= DETAIL_MAX);
            prop_assert!(!refusal.detail.contains("does not have the shape"), "{}", refusal.detail);
            prop_assert!(
                refusal.detail.contains(&field) || ["group", "sequence"].contains(&field.as_str()),
                "{}", refusal.detail
            );
        }
    }

    #[test]
    fn no_bytes_make_the_reader_panic(body in proptest::collection::vec(any::<u8>(), 0..200)) {
        prop_assert!(parse_job(&body, &LIMITS).is_err());
    }
}

#[test]
fn what_is_no_job_still_tells_what_is_usable_of_it() {
    let broken = json!({
        "id": ID, "organization_id": 7, "kind": "Not A Slug", "to": 5, "expires_at": "2026-11-22T20:00:00Z",
        "group": "booking-1", "sequence": 3, "unknown": {"id": "x", "expires_at": "x"},
    });
    let key = JobKey { organization: Some(OrganizationId::parse("7").unwrap()), id: ID.parse().unwrap() };
    let revision = Some(Revision { group: "booking-1".into(), sequence: 3 });
    let expires_at = Some(datetime!(2026-11-22 20:00 UTC));
    let id = Some(key.id);
    assert_eq!(told(&broken), Told { id, key: Some(key), kind: None, expires_at, revision });
    let useless = json!({
        "id": ID, "organization_id": "no organization", "kind": 1, "expires_at": "soon", "group": "a\u{0}b",
        "sequence": -1,
    });
    assert_eq!(told(&useless), Told { id, ..Told::default() }, "and nobody's job of that id");
    for body in [&b""[..], b"\xff", b"{\"id\":", b"[]", b"7", b"null", br#"{"id": 5}"#] {
        assert_eq!(tell(body), Told::default());
    }
    let trailing = [&serde_json::to_vec(&minimal()).unwrap()[..], b" {}"].concat();
    assert_eq!(tell(&trailing), Told::default());
}

#[test]
fn the_schemas_example_is_a_job() {
    let schema = job_schema(&LIMITS);
    for example in schema["examples"].as_array().unwrap() {
        accepted(example);
    }
    let properties = schema["properties"].as_object().unwrap();
    let known: Vec<_> = properties.keys().map(String::as_str).collect();
    let unknown = refused(&with("nonsense", json!(1))).detail;
    let told: BTreeSet<_> = unknown.rsplit("known are ").next().unwrap().split(", ").collect();
    assert_eq!(known.into_iter().collect::<BTreeSet<_>>(), told, "the schema has the reader's fields");
}
