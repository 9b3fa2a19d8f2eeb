//! What is read from a URL, what a refusal is called, and that no password shows.

use super::*;

#[test]
fn a_url_is_shown_without_its_password() {
    let url = AmqpUrl::parse("amqps://user:s3cret@broker.example/%2f").unwrap();
    assert_eq!(url.to_string(), "amqps://user@broker.example:5671/%2f");
    let access = Access::new(url);
    assert!(!format!("{access:?} {:?}", access.url()).contains("s3cret"));
    assert_eq!(AmqpUrl::parse("amqp://h").unwrap().to_string(), "amqp://guest@h:5672/%2f");
}

#[test]
fn an_ipv6_address_is_not_taken_for_the_local_machine() {
    assert_eq!(AmqpUrl::parse("amqp://u:p@[2001:db8::1]:5673/v").unwrap().server(), "[2001:db8::1]:5673");
    assert_eq!(AmqpUrl::parse("amqp://[::1]").unwrap().server(), "[::1]:5672");
    assert!(AmqpUrl::parse("amqp://[nonsense]").is_err());
}

#[test]
fn a_bad_url_is_refused_without_repeating_it() {
    for bad in [
        "",
        "http://u:s3cret@h",
        "amqp:u:s3cret@h",
        "amqp://u:s3cret@h:port",
        "amqp://u:s3cret@h/%2f?verify=none",
    ] {
        let error = AmqpUrl::parse(bad).unwrap_err();
        assert!(!error.to_string().contains("s3cret"), "{error}");
    }
    let error = AmqpUrl::parse("amqp://h/%2f?verify=none").unwrap_err();
    assert!(error.to_string().contains("`verify`, which is not one of heartbeat"), "{error}");
}

#[test]
fn a_heartbeat_is_asked_for_unless_the_url_names_one() {
    let heartbeat = |url: &str| AmqpUrl::parse(url).unwrap().0.query.heartbeat;
    assert_eq!(heartbeat("amqp://h"), Some(HEARTBEAT_S));
    assert_eq!(heartbeat("amqp://h?heartbeat=0"), Some(0));
}

#[test]
fn a_file_without_a_certificate_is_no_root() {
    let access = Access::new(AmqpUrl::parse("amqps://h").unwrap());
    assert!(access.clone().trust("no certificate here").is_err());
    let pem = rcgen::generate_simple_self_signed(["h".to_owned()]).unwrap().cert.pem();
    assert!(access.trust(&pem).is_ok());
}
