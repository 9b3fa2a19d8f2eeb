//! What a connection test tells: step by step, and where it ends.

use std::net::SocketAddr;
use std::time::Duration;

use serde_json::{Value, json};
use time::macros::datetime;
use tokio::net::TcpListener;

use sendoff::control::ControlRules;
use sendoff::egress::AllowedPorts;

use super::{
    HOST, House, STEPS, ask, assert_nothing_sent, detail, server_with, settings, settings_with, steps,
};
use crate::support::broker::{SOON, eventually};
use crate::support::certs::ServerCertificate;
use crate::support::dns::{Answer, MailAnswer, MailQuestion};
use crate::support::smtp_server::{Action, Behaviour, Rule, SmtpServer, Stage, Tls};
use crate::support::world::{PASSWORD, USERNAME, own_address};

/// Code, the last step, and a part of the message: what a failed test came to.
fn failure(report: &Value) -> (String, String, String) {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    assert_eq!(report["ok"], false, "{report}");
    assert!(!text(&report["error"]["hint"]).is_empty(), "{report}");
    let last = steps(report).pop().expect("a step");
    (text(&report["error"]["code"]), last, text(&report["error"]["message"]))
}

#[tokio::test]
async fn a_test_over_starttls_tells_every_step_and_sends_nothing() {
    let house = House::new().await;
    let server = house.server(|_| {}).await;
    house.store(&server).await;
    let report = house.test(json!({})).await;
    assert_eq!(report["ok"], true, "{report}");
    assert_eq!(steps(&report), STEPS);
    assert_eq!(
        detail(&report, "connect"),
        format!("Connected to 127.0.0.1, port {}, over IPv4.", server.port())
    );
    assert!(detail(&report, "greeting").contains("220 mail.test ESMTP"));
    let tls = detail(&report, "tls");
    for part in ["STARTTLS", "TLS 1.3", "Sendoff test authority", "4096-01-01", "AUTH PLAIN LOGIN"] {
        assert!(tls.contains(part), "{part}: {tls}");
    }
    assert!(detail(&report, "authenticate").contains("AUTH PLAIN"));
    assert_eq!(report.get("error"), None);
    assert_nothing_sent(&server);
    server.wait_for(SOON, |seen| seen.open_sessions() == 0).await.expect("the connection is closed");
    let sessions = server.sessions();
    let verbs: Vec<&str> = sessions[0].commands.iter().filter_map(|line| line.split(' ').next()).collect();
    assert_eq!(verbs, ["EHLO", "STARTTLS", "EHLO", "AUTH", "QUIT"]);
    assert_eq!(sessions.len(), 1);
}

/// A port that means TLS from the first byte.
const IMPLICIT_TLS_PORT: u16 = 2465;

/// A server at that port, under a name of its own.
async fn at_implicit_port(
    house: &House,
    last: u8,
    configure: impl FnOnce(&mut Behaviour),
) -> (SmtpServer, Value) {
    let ip = own_address(last);
    let name = format!("tls{last}.acme.example");
    house.dns.script(&name, Answer::Addresses(vec![ip]), 60);
    let config = house.authority.issue(&[&name]).server_config();
    let server = SmtpServer::start_at(SocketAddr::from((ip, IMPLICIT_TLS_PORT)), |behaviour| {
        behaviour.tls = Tls::Implicit(config);
        behaviour.login = Some((USERNAME.into(), PASSWORD.into()));
        configure(behaviour);
    });
    (server.await, settings_with(IMPLICIT_TLS_PORT, json!({"host": name})))
}

#[tokio::test]
async fn a_test_over_implicit_tls_tells_the_same_steps() {
    let house = House::new().await;
    let (server, params) = at_implicit_port(&house, 11, |_| {}).await;
    let report = house.test(params.clone()).await;
    assert_eq!(report["ok"], true, "{report}");
    assert_eq!(steps(&report), STEPS);
    assert!(detail(&report, "tls").contains("from the first byte: TLS 1.3"), "{report}");
    assert_nothing_sent(&server);
    assert_eq!(server.seen(|seen| (seen.count("STARTTLS"), seen.auth_attempts)), (0, 1));
    // What goes wrong behind the handshake tells of it.
    server.rule(Rule::new(Stage::Banner, Action::reply("554 5.3.2 closed")));
    let report = house.test(params).await;
    assert_eq!(steps(&report), STEPS[..4]);
    let told = detail(&report, "greeting");
    assert!(told.contains("554 5.3.2 closed") && told.contains("TLS 1.3"), "{told}");
}

#[tokio::test]
async fn each_fault_ends_at_its_step_with_its_code() {
    let house = House::new().await;
    let wrong_password = house.server(|_| {}).await;
    let plain = house.server(|behaviour| {
        behaviour.tls = Tls::None;
        behaviour.auth_in_clear = true;
    });
    let plain = plain.await;
    let self_signed = server_with(&ServerCertificate::self_signed(HOST, &[HOST]), |_| {}).await;
    let wrong_name = server_with(&house.authority.issue(&["mx.elsewhere.example"]), |_| {}).await;
    let expired = server_with(&house.authority.issue_expired(&[HOST]), |_| {}).await;
    let ruled =
        |stage, action: Action| house.server(move |behaviour| behaviour.rule(Rule::new(stage, action)));
    let banner = ruled(Stage::Banner, Action::reply("SSH-2.0-OpenSSH_9.9 sesame")).await;
    let busy = ruled(Stage::Banner, Action::reply("554 5.3.2 no service for <ann@acme.example>")).await;
    let ehlo = ruled(Stage::Ehlo, Action::reply("550 5.5.0 go away")).await;
    let no_tls_now = ruled(Stage::Starttls, Action::reply("454 4.7.0 TLS not available now")).await;
    let tempfail = ruled(Stage::Auth, Action::reply("454 4.7.0 Temporary authentication failure")).await;
    let closing = ruled(Stage::Auth, Action::reply("421 4.7.0 Try again later")).await;
    let lost = ruled(Stage::Auth, Action::Close).await;
    let no_mechanism = house.server(|behaviour| behaviour.mechanisms = vec!["XOAUTH2"]).await;
    let nobody = TcpListener::bind((own_address(13), 0)).await.expect("a port");
    let refused = nobody.local_addr().expect("bound");
    drop(nobody);
    house.dns.script("broken.acme.example", Answer::ServerFailure, 0);

    let of = |server: &SmtpServer| settings(server.port());
    for (params, code, step, words) in [
        (
            settings_with(wrong_password.port(), json!({"password": "wrong"})),
            "auth_failed",
            "authenticate",
            "535",
        ),
        (of(&plain), "tls_required", "tls", "offers no TLS"),
        (settings_with(plain.port(), json!({"secure": false})), "tls_required", "tls", "offers no TLS"),
        (of(&self_signed), "tls_failed", "tls", "certificate"),
        (of(&wrong_name), "tls_failed", "tls", "mx.elsewhere.example"),
        (of(&expired), "tls_failed", "tls", "2020-01-01"),
        (of(&banner), "connect_failed", "greeting", "SMTP"),
        (of(&busy), "rejected", "greeting", "554 5.3.2 no service for <a…@acme.example>"),
        (of(&ehlo), "rejected", "greeting", "550 5.5.0 go away"),
        (of(&no_tls_now), "tls_failed", "tls", "454"),
        (of(&tempfail), "rejected", "authenticate", "454 4.7.0 Temporary"),
        (of(&closing), "rejected", "authenticate", "421"),
        (of(&lost), "connect_failed", "authenticate", "closed the connection"),
        (of(&no_mechanism), "auth_failed", "authenticate", "XOAUTH2"),
        (
            settings_with(refused.port(), json!({"host": refused.ip().to_string()})),
            "connect_failed",
            "connect",
            "refused",
        ),
        (settings_with(25, json!({"host": "nowhere.acme.example"})), "host_not_found", "resolve", "address"),
        (settings_with(25, json!({"host": "broken.acme.example"})), "dns_failed", "resolve", "looked up"),
    ] {
        let report = house.test(params).await;
        let (found, last, message) = failure(&report);
        assert_eq!((found.as_str(), last.as_str()), (code, step), "{report}");
        assert!(message.contains(words), "{words}: {report}");
        assert!(!report.to_string().contains("sesame"), "{report}");
        let reached = STEPS.iter().position(|name| *name == step).expect("a step");
        assert_eq!(steps(&report), STEPS[..=reached], "{report}");
    }
    for server in [&plain, &self_signed, &wrong_name, &expired, &banner, &busy, &no_tls_now] {
        assert_nothing_sent(server);
        assert_eq!(server.seen(|seen| seen.auth_attempts), 0);
    }
    assert_eq!(wrong_password.seen(|seen| seen.auth_attempts), 1, "a refused password is not tried twice");
}

#[tokio::test]
async fn a_server_without_tls_at_a_port_for_tls_is_told_as_such() {
    let house = House::new().await;
    let (plain, params) = at_implicit_port(&house, 12, |behaviour| behaviour.tls = Tls::None).await;
    let report = house.test(params).await;
    let (code, last, message) = failure(&report);
    assert_eq!((code.as_str(), last.as_str()), ("tls_failed", "tls"), "{report}");
    assert_eq!(steps(&report), ["resolve", "address", "connect", "tls"], "the greeting was not reached");
    assert!(message.contains("TLS"), "{message}");
    assert_nothing_sent(&plain);
}

#[tokio::test]
async fn a_server_that_says_nothing_is_given_up_in_time_for_the_reply() {
    let house = House::new().await;
    // It waits for the handshake that the other port's mode would begin with.
    let certificate = house.authority.issue(&[HOST]).server_config();
    let other_mode = SmtpServer::start(|behaviour| behaviour.tls = Tls::Implicit(certificate)).await;
    let silent = house.server(|behaviour| behaviour.rule(Rule::new(Stage::Auth, Action::Silence))).await;
    let ask = |port| house.ask("smtp_config.test", "acme", settings(port));
    // Within 17 s by its own clock, which a machine that stands still in between does not stop.
    let in_time = |reply: &Value| {
        let steps = reply["result"]["steps"].as_array().map(Vec::as_slice).unwrap_or_default();
        !steps.is_empty() && steps.iter().filter_map(|step| step["ms"].as_u64()).sum::<u64>() < 19_000
    };
    let mut replies = Vec::new();
    for _ in 0..3 {
        let (greeting, login) = tokio::join!(ask(other_mode.port()), ask(silent.port()));
        replies = vec![greeting, login];
        if replies.iter().all(in_time) {
            break;
        }
    }
    assert!(replies.iter().all(in_time), "{replies:?}");
    for (reply, step) in replies.iter().zip(["greeting", "authenticate"]) {
        let report = &reply["result"];
        let (code, last, message) = failure(report);
        assert_eq!((code.as_str(), last.as_str()), ("connect_timeout", step), "{report}");
        assert!(message.contains("in time"), "{message}");
        let hint = report["error"]["hint"].as_str().expect("a hint");
        assert!(hint.ends_with("a test email gives it more, should it only be slow."), "{hint}");
        let waited = report["steps"].as_array().and_then(|steps| steps.last()?["ms"].as_u64());
        assert!(waited.is_some_and(|ms| ms > 5000), "{report}");
    }
}

#[tokio::test]
async fn of_a_host_that_is_not_public_nothing_is_told_and_nothing_is_dialled() {
    let house = House::new().await;
    let listener = TcpListener::bind("127.0.0.2:0").await.expect("a port");
    let open = listener.local_addr().expect("bound").port();
    let closed = TcpListener::bind("127.0.0.2:0").await.expect("a port");
    let shut = closed.local_addr().expect("bound").port();
    drop(closed);
    house.dns.script("inside.acme.example", Answer::addresses(&["127.0.0.2"]), 60);
    house.dns.script("half.acme.example", Answer::addresses(&["127.0.0.1", "127.0.0.2"]), 60);
    house.dns.script("ten.acme.example", Answer::addresses(&["10.1.2.3"]), 60);
    let mut reports = Vec::new();
    for (host, port) in [
        ("127.0.0.2", open),
        ("127.0.0.2", shut),
        ("inside.acme.example", open),
        ("inside.acme.example", shut),
        ("half.acme.example", open),
        ("ten.acme.example", 587),
        ("169.254.169.254", 80),
        ("::1", 587),
    ] {
        let mut report = house.test(settings_with(port, json!({"host": host}))).await;
        let (code, last, message) = failure(&report);
        assert_eq!((code.as_str(), last.as_str()), ("host_not_public", "address"), "{host}: {report}");
        assert_eq!(message, "SMTP host must be a public address");
        assert_eq!(report["error"]["field"], "host");
        for step in report["steps"].as_array_mut().expect("steps") {
            assert!(step["ms"].as_u64().is_some_and(|ms| ms < 10_000));
            step["ms"] = Value::Null;
        }
        reports.push((host, report));
    }
    let (none, first) = (json!([]), &reports[0].1);
    assert_eq!((&first["warnings"], &first["notes"]), (&none, &none));
    assert_eq!(house.dns.questions("acme.example") + house.dns.questions("_dmarc.acme.example"), 0);
    for (host, report) in &reports {
        assert_eq!(*report, reports[0].1, "{host} is told from {}", reports[0].0);
    }
    // Names for local use, where nothing is exempt.
    let strict = super::control(
        &house.database,
        &house.dns,
        &[],
        ControlRules { tests_per_minute: 100, ..ControlRules::default() },
        AllowedPorts::Any,
        super::NOW,
    );
    for host in ["ten.acme.example", "169.254.169.254"] {
        let reply = ask(&strict, "smtp_config.test", "acme", settings_with(587, json!({"host": host}))).await;
        assert_eq!(reply["result"]["error"]["code"], "host_not_public", "{reply}");
    }
    let dialled = tokio::time::timeout(Duration::ZERO, listener.accept()).await;
    assert!(dialled.is_err(), "somebody was dialled: {dialled:?}");
}

#[tokio::test]
async fn a_port_that_is_not_allowed_is_told_with_those_that_are() {
    let house = House::new().await;
    let ports = AllowedPorts::Only([465, 587].into());
    let control = house.another(ControlRules::default(), ports);
    for host in [HOST, "nowhere.acme.example", "127.0.0.2"] {
        let reply =
            ask(&control, "smtp_config.test", "acme", settings_with(2500, json!({"host": host}))).await;
        let (code, last, message) = failure(&reply["result"]);
        assert_eq!((code.as_str(), last.as_str()), ("port_not_allowed", "address"), "{reply}");
        assert!(message.contains("465") && message.contains("587"), "{message}");
        assert_eq!(reply["result"]["error"]["field"], "port");
    }
    assert_eq!(house.dns.questions("nowhere.acme.example"), 0);
}

#[tokio::test]
async fn a_certificate_that_ends_soon_is_a_warning_and_no_failure() {
    let rules = ControlRules { tests_per_minute: 100, ..ControlRules::default() };
    let house = House::with(rules, datetime!(4095-12-25 00:00 UTC)).await;
    let server = house.server(|_| {}).await;
    let report = house.test(settings(server.port())).await;
    assert_eq!(report["ok"], true, "{report}");
    let warnings: Vec<&str> =
        report["warnings"].as_array().expect("warnings").iter().filter_map(Value::as_str).collect();
    let of_certificate: Vec<_> = warnings.iter().filter(|text| text.starts_with("Certificate: ")).collect();
    assert!(of_certificate.len() == 1 && of_certificate[0].contains("4096-01-01, in 7 days"), "{warnings:?}");
}

#[tokio::test]
async fn what_the_senders_domain_lacks_is_a_warning_and_leaves_the_outcome_as_it_is() {
    let house = House::new().await;
    let server = house.server(|_| {}).await;
    let topics = |list: &Value| -> Vec<String> {
        let list = list.as_array().expect("a list").iter().filter_map(Value::as_str);
        list.filter_map(|text| Some(text.split_once(": ")?.0.to_owned())).collect()
    };
    // Whatever a busy name server did not answer in time is asked for again.
    let test = async |params: Value| {
        let mut report = Value::Null;
        eventually("everything is looked up", async || {
            report = house.test(params.clone()).await;
            !report["warnings"].to_string().contains("could not be looked up now")
        })
        .await;
        report
    };
    let bare = test(settings(server.port())).await;
    assert_eq!(
        (&bare["ok"], topics(&bare["warnings"])),
        (&json!(true), ["SPF", "DMARC", "MX"].map(str::to_owned).to_vec())
    );
    house.dns.script_senders_domain("good.example");
    let params = settings_with(server.port(), json!({"from_email": "hello@good.example"}));
    let good = test(params).await;
    assert_eq!((&good["ok"], &good["warnings"]), (&json!(true), &json!([])), "{good}");
    for topic in ["SPF", "DMARC", "DKIM"] {
        assert!(topics(&good["notes"]).contains(&topic.to_owned()), "{good}");
    }
    // A refused login leaves the sender's domain as it is.
    let params = settings_with(server.port(), json!({"password": "wrong"}));
    let refused = test(params).await;
    assert_eq!((&refused["ok"], topics(&refused["warnings"]).len()), (&json!(false), 3), "{refused}");
}

#[tokio::test]
async fn name_servers_that_fail_over_the_senders_domain_are_a_warning_and_no_failed_test() {
    let house = House::new().await;
    let server = house.server(|_| {}).await;
    house.dns.script_senders_domain("good.example");
    house.dns.script_mail("good.example", MailQuestion::Exchanger, MailAnswer::ServerFailure);
    let params = settings_with(server.port(), json!({"from_email": "hello@good.example"}));
    let report = house.test(params).await;
    assert_eq!(report["ok"], true, "{report}");
    let warnings = report["warnings"].as_array().expect("warnings").iter().filter_map(Value::as_str);
    let of_exchangers: Vec<_> = warnings.filter(|text| text.starts_with("MX: ")).collect();
    assert!(
        of_exchangers.len() == 1 && of_exchangers[0].contains("could not be looked up now"),
        "{of_exchangers:?} in {report}"
    );
}

#[tokio::test]
async fn a_test_neither_takes_up_nor_leaves_a_tls_session_of_another() {
    let house = House::new().await;
    let server = house.server(|_| {}).await;
    house.store(&server).await;
    for params in [json!({}), json!({}), settings(server.port())] {
        assert_eq!(house.test(params).await["ok"], true);
    }
    eventually("three sessions", async || server.connections() == 3).await;
    assert!(server.sessions().iter().all(|session| !session.resumed));
    let payload = format!("\0{USERNAME}\0{PASSWORD}");
    assert!(server.sessions().iter().all(|session| session.auth_payloads == [payload.clone()]));
}
