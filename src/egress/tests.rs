//! Egress as a whole against a scripted name server, hostile answers above all.
//! Guarantee: nothing here dials anything but 127.0.0.0/8; public and private addresses are approved or
//! refused only.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::time::Instant;

use super::dns::{Answer, DnsServer, Family};
use super::*;

/// Addresses of the public internet, which are never dialled here.
const PUBLIC_V4: &str = "93.184.215.14";
const OTHER_PUBLIC_V4: &str = "93.184.215.15";
const PUBLIC_V6: &str = "2606:2800:21f:cb07:6820:80da:af6b:8b2c";

const LIMIT: Duration = Duration::from_secs(5);

fn policy(allow: &[&str]) -> EgressPolicy {
    let nets = |list: &[&str]| list.iter().map(|net| net.parse().expect("a network")).collect();
    EgressPolicy::new(nets(allow), nets(&["168.63.129.16/32"]), AllowedPorts::Any)
}

fn egress(dns: &DnsServer, allow: &[&str]) -> Egress {
    Egress::new(policy(allow), &[dns.address()]).expect("name servers are given")
}

fn host(text: &str) -> ServerHost {
    ServerHost::parse(text).unwrap_or_else(|error| panic!("{text}: {error}"))
}

/// The approved addresses as text, sorted; or the error's code.
async fn approve(egress: &Egress, name: &str) -> Result<Vec<String>, &'static str> {
    match egress.approve(&host(name), 587).await {
        Ok(approved) => {
            let mut texts: Vec<String> = approved.iter().map(|a| a.socket_addr().ip().to_string()).collect();
            texts.sort();
            Ok(texts)
        }
        Err(error) => Err(error.reason_code()),
    }
}

fn only(text: &str) -> Result<Vec<String>, &'static str> {
    Ok(vec![text.to_owned()])
}

async fn listener(ip: &str) -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind((ip, 0)).await.expect("a free port");
    let address = listener.local_addr().expect("bound");
    (listener, address)
}

/// Connections are accepted in the order of their making: if the first one is our own marker, there was none
/// before.
async fn assert_nobody_connected(listener: &TcpListener) {
    let address = listener.local_addr().expect("bound");
    let marker = TcpStream::connect(address).await.expect("it listens");
    let (_stream, first) = listener.accept().await.expect("the marker is there");
    assert_eq!(first, marker.local_addr().expect("connected"), "somebody connected before the marker");
}

#[tokio::test]
async fn a_name_with_public_addresses_is_approved_at_all_of_them() {
    let dns = DnsServer::start().await;
    dns.script(
        "smtp.example.org",
        Answer::addresses(&[PUBLIC_V4, OTHER_PUBLIC_V4, PUBLIC_V6, PUBLIC_V4]),
        60,
    );
    let approved = approve(&egress(&dns, &[]), "SMTP.example.org.").await;
    assert_eq!(approved, Ok([PUBLIC_V6, PUBLIC_V4, OTHER_PUBLIC_V4].map(str::to_owned).to_vec()));
}

#[tokio::test]
async fn one_refused_address_among_many_refuses_the_name() {
    let dns = DnsServer::start().await;
    let egress = egress(&dns, &[]);
    for (name, addresses) in [
        ("private.example", &["10.0.0.5"][..]),
        ("last.example", &[PUBLIC_V4, OTHER_PUBLIC_V4, "192.168.0.1"]),
        ("first.example", &["169.254.169.254", PUBLIC_V4]),
        ("v6.example", &[PUBLIC_V4, "::1"]),
        ("v4.example", &["127.0.0.1", PUBLIC_V6]),
        ("mapped.example", &[PUBLIC_V4, "::ffff:10.0.0.1"]),
        ("nat64.example", &["64:ff9b::10.0.0.1"]),
        ("6to4.example", &[PUBLIC_V4, "2002:7f00:1::1"]),
        ("zero.example", &["0.0.0.0"]),
        ("denied.example", &["168.63.129.16"]),
    ] {
        dns.script(name, Answer::addresses(addresses), 60);
        assert_eq!(approve(&egress, name).await, Err("host_not_public"), "{name}");
    }
}

#[tokio::test]
async fn an_ipv4_address_in_an_aaaa_record_is_approved_as_the_ipv4_address() {
    let dns = DnsServer::start().await;
    let mapped = format!("::ffff:{PUBLIC_V4}");
    dns.script("mapped.example", Answer::addresses(&[&mapped, PUBLIC_V4]), 60);
    assert_eq!(approve(&egress(&dns, &[]), "mapped.example").await, only(PUBLIC_V4));
}

#[tokio::test]
async fn a_name_that_turns_private_after_it_was_saved_is_refused_and_nobody_is_dialled() {
    let dns = DnsServer::start().await;
    let (inside, inside_address) = listener("127.0.0.1").await;
    let egress = egress(&dns, &[]);
    let name = host("rebind.example");
    dns.script("rebind.example", Answer::addresses(&[PUBLIC_V4]), 0);
    egress.approve(&name, inside_address.port()).await.expect("public when it is saved");
    dns.script("rebind.example", Answer::addresses(&["127.0.0.1"]), 0);
    let refused = egress.approve(&name, inside_address.port()).await;
    assert_eq!(refused, Err(EgressError::HostNotPublic { refusal: Refusal::Loopback }));
    assert_nobody_connected(&inside).await;
}

#[tokio::test]
async fn answers_that_alternate_at_ttl_zero_never_lead_inside() {
    let dns = DnsServer::start().await;
    let (inside, inside_address) = listener("127.0.0.1").await;
    let egress = egress(&dns, &[]);
    dns.script_family("flip.example", Family::V4, Answer::alternating(&[&[PUBLIC_V4], &["127.0.0.1"]]), 0);
    dns.script_family("flip.example", Family::V6, Answer::addresses(&[]), 0);
    for round in 0..10 {
        let outcome = egress.approve(&host("flip.example"), inside_address.port()).await;
        if round % 2 == 0 {
            let approved = outcome.expect("the public answer's turn");
            let expected = SocketAddr::new(PUBLIC_V4.parse().expect("an address"), inside_address.port());
            assert!(approved.iter().all(|addr| addr.socket_addr() == expected), "{approved:?}");
        } else {
            assert_eq!(outcome, Err(EgressError::HostNotPublic { refusal: Refusal::Loopback }));
        }
    }
    assert_eq!(dns.questions_of("flip.example", Family::V4), 10);
    assert_nobody_connected(&inside).await;
}

#[tokio::test]
async fn what_is_dialled_is_what_was_judged_though_the_answer_has_changed_since() {
    let dns = DnsServer::start().await;
    let (judged, judged_address) = listener("127.0.0.2").await;
    let inside =
        TcpListener::bind(("127.0.0.3", judged_address.port())).await.expect("the port is free there");
    let egress = egress(&dns, &["127.0.0.2/32"]);
    dns.script("flip.example", Answer::alternating(&[&["127.0.0.2"], &["127.0.0.3"]]), 0);
    dns.script_family("flip.example", Family::V6, Answer::addresses(&[]), 0);

    let approved = egress.approve(&host("flip.example"), judged_address.port()).await.expect("exempt");
    let asked = dns.questions("flip.example");
    let (stream, connected) = dial(&approved, LIMIT).await.expect("it listens");
    assert_eq!((connected, stream.peer_addr().expect("connected")), (judged_address, judged_address));
    assert_eq!(dns.questions("flip.example"), asked, "a dial asks nobody");
    let (_accepted, peer) = judged.accept().await.expect("the dial arrived");
    assert_eq!(peer, stream.local_addr().expect("connected"));

    let second = egress.approve(&host("flip.example"), judged_address.port()).await;
    assert_eq!(second, Err(EgressError::HostNotPublic { refusal: Refusal::Loopback }));
    assert_nobody_connected(&inside).await;
}

#[tokio::test]
async fn an_alias_of_an_internal_name_is_refused_whether_or_not_that_name_exists() {
    let dns = DnsServer::start().await;
    let egress = egress(&dns, &[]);
    dns.script("there.internal", Answer::addresses(&["10.0.0.7"]), 60);
    dns.script("public.internal", Answer::addresses(&[PUBLIC_V4]), 60);
    dns.script("empty.internal", Answer::addresses(&[]), 60);
    dns.script("broken.internal", Answer::ServerFailure, 60);
    dns.script("hop.example", Answer::Alias("missing.internal".to_owned()), 60);
    for target in [
        "there.internal",
        "public.internal",
        "empty.internal",
        "broken.internal",
        "missing.internal",
        "missing.cluster.local",
        "localhost",
        "single",
        "hop.example",
    ] {
        for (name, answer) in [
            (format!("full-{target}.example"), Answer::Alias(target.to_owned())),
            (format!("bare-{target}.example"), Answer::BareAlias(target.to_owned())),
        ] {
            dns.script(&name, answer, 0);
            assert_eq!(approve(&egress, &name).await, Err("host_not_public"), "{name}");
        }
    }
}

#[tokio::test]
async fn an_alias_is_followed_and_its_addresses_are_judged() {
    let dns = DnsServer::start().await;
    let egress = egress(&dns, &[]);
    dns.script("public.example", Answer::addresses(&[PUBLIC_V4]), 60);
    dns.script("private.example", Answer::addresses(&["10.0.0.7"]), 60);
    for (name, answer, expected) in [
        ("a.example", Answer::Alias("public.example".to_owned()), only(PUBLIC_V4)),
        ("b.example", Answer::BareAlias("public.example".to_owned()), only(PUBLIC_V4)),
        ("c.example", Answer::Alias("private.example".to_owned()), Err("host_not_public")),
        ("d.example", Answer::BareAlias("private.example".to_owned()), Err("host_not_public")),
        ("e.example", Answer::Alias("missing.example".to_owned()), Err("host_not_found")),
        ("f.example", Answer::BareAlias("missing.example".to_owned()), Err("host_not_found")),
        ("g.example", Answer::Alias("g.example".to_owned()), Err("dns_failed")),
    ] {
        dns.script(name, answer, 60);
        assert_eq!(approve(&egress, name).await, expected, "{name}");
    }
}

#[tokio::test]
async fn a_missing_name_and_a_failing_name_server_are_told_apart() {
    let dns = DnsServer::start().await;
    let egress = egress(&dns, &[]);
    dns.script("empty.example", Answer::addresses(&[]), 60);
    dns.script("broken.example", Answer::ServerFailure, 60);
    dns.script_family("half.example", Family::V4, Answer::addresses(&[]), 60);
    dns.script_family("half.example", Family::V6, Answer::ServerFailure, 60);
    assert_eq!(approve(&egress, "missing.example").await, Err("host_not_found"));
    assert_eq!(approve(&egress, "empty.example").await, Err("host_not_found"));
    assert_eq!(approve(&egress, "broken.example").await, Err("dns_failed"));
    assert_eq!(approve(&egress, "half.example").await, Err("dns_failed"));
    assert_eq!(approve(&egress, "name.invalid").await, Err("host_not_found"));
}

#[tokio::test]
async fn a_silent_name_server_is_given_up_in_time() {
    let dns = DnsServer::start().await;
    dns.script("silent.example", Answer::Silence, 60);
    let started = Instant::now();
    let error = egress(&dns, &[]).approve(&host("silent.example"), 587).await.expect_err("nobody answers");
    assert_eq!(error.reason_code(), "dns_failed");
    assert!(started.elapsed() < Duration::from_secs(7), "{:?}", started.elapsed());
}

#[tokio::test]
async fn the_family_that_answers_is_used_when_the_other_one_fails_or_is_silent() {
    let dns = DnsServer::start().await;
    let egress = egress(&dns, &[]);
    for (name, failing, answering, address) in [
        ("no-v6.example", Family::V6, Family::V4, PUBLIC_V4),
        ("no-v4.example", Family::V4, Family::V6, PUBLIC_V6),
    ] {
        dns.script_family(name, answering, Answer::addresses(&[address]), 60);
        for failure in [Answer::ServerFailure, Answer::Silence, Answer::NoSuchName] {
            dns.script_family(name, failing, failure, 60);
            let started = Instant::now();
            assert_eq!(approve(&egress, name).await, only(address), "{name}");
            assert!(started.elapsed() < Duration::from_secs(3), "{name} took {:?}", started.elapsed());
        }
    }
}

#[tokio::test]
async fn an_answer_is_asked_for_once_while_its_ttl_lasts_and_then_again() {
    let dns = DnsServer::start().await;
    let egress = egress(&dns, &[]);
    dns.script("lasting.example", Answer::addresses(&[PUBLIC_V4, PUBLIC_V6]), 3600);
    dns.script("brief.example", Answer::addresses(&[PUBLIC_V4, PUBLIC_V6]), 1);
    dns.script("never.example", Answer::addresses(&[PUBLIC_V4, PUBLIC_V6]), 0);
    for _ in 0..50 {
        for name in ["lasting.example", "brief.example", "never.example"] {
            approve(&egress, name).await.expect("public");
        }
    }
    assert_eq!(dns.questions("lasting.example"), 2);
    assert_eq!(dns.questions("never.example"), 100);

    let deadline = Instant::now() + LIMIT;
    dns.script("brief.example", Answer::addresses(&["10.0.0.1"]), 1);
    while approve(&egress, "brief.example").await != Err("host_not_public") {
        assert!(Instant::now() < deadline, "the first answer is still in use");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn connections_at_the_same_time_share_one_look_up() {
    let dns = DnsServer::start().await;
    let egress = egress(&dns, &[]);
    dns.script("busy.example", Answer::addresses(&[PUBLIC_V4]), 0);
    let all = futures_util::future::join_all((0..300).map(|_| approve(&egress, "busy.example"))).await;
    assert!(all.iter().all(|outcome| *outcome == only(PUBLIC_V4)));
    assert!(dns.questions("busy.example") < 300, "{}", dns.questions("busy.example"));
}

#[tokio::test]
async fn an_answer_too_large_for_udp_is_judged_to_its_last_address() {
    let dns = DnsServer::start().await;
    let egress = egress(&dns, &[]);
    let mut many: Vec<std::net::IpAddr> = (0..200).map(|n| [93, 184, 1, n].into()).collect();
    dns.script("many.example", Answer::Addresses(many.clone()), 60);
    assert_eq!(approve(&egress, "many.example").await.expect("public").len(), 200);
    many.push([10, 0, 0, 1].into());
    dns.script("trap.example", Answer::Addresses(many), 60);
    assert_eq!(approve(&egress, "trap.example").await, Err("host_not_public"));
}

#[tokio::test]
async fn an_address_given_as_host_is_judged_in_every_spelling_without_a_question() {
    let dns = DnsServer::start().await;
    let egress = egress(&dns, &[]);
    for text in [
        "127.0.0.1",
        "127.1",
        "0x7f.1",
        "2130706433",
        "0177.0.0.1",
        "１２７.0.0.1",
        "[::1]",
        "::ffff:10.0.0.1",
        "0",
        "10.0.0.1.",
        "64:ff9b::7f00:1",
        "fe80::1",
        "168.63.129.16",
    ] {
        assert_eq!(approve(&egress, text).await, Err("host_not_public"), "{text}");
    }
    assert_eq!(approve(&egress, PUBLIC_V4).await, only(PUBLIC_V4));
    assert_eq!(approve(&egress, PUBLIC_V6).await, only(PUBLIC_V6));
}

#[tokio::test]
async fn internal_names_are_refused_without_a_question() {
    let dns = DnsServer::start().await;
    let egress = egress(&dns, &[]);
    for name in
        ["localhost", "localhost.", "x.localhost", "mailpit", "db.internal", "x.cluster.local", "x.home.arpa"]
    {
        dns.script(name, Answer::addresses(&[PUBLIC_V4]), 60);
        let refused = egress.approve(&host(name), 587).await;
        assert_eq!(refused, Err(EgressError::HostNotPublic { refusal: Refusal::InternalName }), "{name}");
        assert_eq!(dns.questions(name), 0, "{name}");
    }
}

#[tokio::test]
async fn where_the_operator_exempts_networks_the_addresses_of_an_internal_name_decide() {
    let dns = DnsServer::start().await;
    let egress = egress(&dns, &["127.0.0.0/8"]);
    dns.script("mailpit", Answer::addresses(&["127.0.0.9"]), 60);
    dns.script("db.internal", Answer::addresses(&["10.0.0.1"]), 60);
    dns.script("alias.example", Answer::Alias("mailpit".to_owned()), 60);
    dns.script("lost.example", Answer::Alias("lost.internal".to_owned()), 60);
    assert_eq!(approve(&egress, "mailpit").await, only("127.0.0.9"));
    assert_eq!(approve(&egress, "alias.example").await, only("127.0.0.9"));
    assert_eq!(approve(&egress, "db.internal").await, Err("host_not_public"));
    assert_eq!(approve(&egress, "missing.internal").await, Err("host_not_public"));
    assert_eq!(approve(&egress, "missing").await, Err("host_not_public"));
    assert_eq!(approve(&egress, "lost.example").await, Err("host_not_found"));
    assert_eq!(approve(&egress, "localhost").await, only("127.0.0.1"));
    assert_eq!(approve(&egress, "a.localhost").await, only("127.0.0.1"));
    assert_eq!(dns.questions("localhost"), 0);
}

#[tokio::test]
async fn a_port_outside_the_list_is_refused_before_any_look_up() {
    let dns = DnsServer::start().await;
    let policy = EgressPolicy::new(vec![], vec![], AllowedPorts::Only([25, 587].into()));
    let egress = Egress::new(policy, &[dns.address()]).expect("name servers are given");
    dns.script("smtp.example", Answer::addresses(&[PUBLIC_V4]), 60);
    let refused = egress.approve(&host("smtp.example"), 22).await.expect_err("22 is not listed");
    assert_eq!(refused.reason_code(), "port_not_allowed");
    assert_eq!(refused.to_string(), "port 22 is not allowed; allowed: 25, 587");
    assert_eq!(dns.questions("smtp.example"), 0);
    egress.approve(&host("smtp.example"), 587).await.expect("listed");
}

#[tokio::test]
async fn what_an_admin_is_told_of_a_private_host_names_no_address() {
    let dns = DnsServer::start().await;
    dns.script("private.example", Answer::addresses(&["10.0.0.5"]), 60);
    let refused = egress(&dns, &[]).approve(&host("private.example"), 587).await.expect_err("private");
    assert_eq!(refused.to_string(), "SMTP host must be a public address");
}

#[tokio::test]
async fn an_internationalized_name_is_asked_for_in_its_ascii_form() {
    let dns = DnsServer::start().await;
    dns.script("post.xn--bcher-kva.example", Answer::addresses(&[PUBLIC_V4]), 60);
    assert_eq!(approve(&egress(&dns, &[]), "post.BÜCHER.example").await, only(PUBLIC_V4));
}

#[tokio::test]
async fn the_operators_own_host_may_be_anywhere_and_at_any_port() {
    let dns = DnsServer::start().await;
    let policy = EgressPolicy::new(vec![], vec![], AllowedPorts::Only([25].into()));
    let egress = Egress::new(policy, &[dns.address()]).expect("name servers are given");
    dns.script("mailpit", Answer::addresses(&["10.0.0.5"]), 60);
    for (text, address) in [("mailpit", "10.0.0.5:1025"), ("127.1", "127.0.0.1:1025"), ("::1", "[::1]:1025")]
    {
        let platform = OperatorsHost::from_settings(host(text));
        let approved = egress.approve_operators_host(&platform, 1025).await.expect("the operator's choice");
        let addresses: Vec<String> = approved.iter().map(|a| a.socket_addr().to_string()).collect();
        assert_eq!(addresses, [address], "{text}");
    }
    let (listener, address) = listener("127.0.0.1").await;
    let localhost = OperatorsHost::from_settings(host("localhost"));
    let approved = egress.approve_operators_host(&localhost, address.port()).await.expect("loopback");
    dial(&approved, LIMIT).await.expect("one of the two loopback addresses listens");
    listener.accept().await.expect("the dial arrived");
    let missing = OperatorsHost::from_settings(host("missing.example"));
    assert_eq!(egress.approve_operators_host(&missing, 25).await, Err(EgressError::HostNotFound));
}

#[tokio::test]
async fn without_name_servers_of_its_own_it_asks_the_systems_or_says_which_setting_is_missing() {
    match Egress::new(policy(&[]), &[]) {
        Ok(egress) => assert_eq!(approve(&egress, PUBLIC_V4).await, only(PUBLIC_V4)),
        Err(error) => assert!(error.to_string().contains("egress.nameservers"), "{error}"),
    }
}
