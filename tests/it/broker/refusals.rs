//! What the broker or its topology refuses, and how it is told.

use lapin::BasicProperties;
use lapin::options::QueueDeclareOptions;
use lapin::types::FieldTable;
use sendoff::broker::{Access, AmqpUrl, BrokerError, PublishError, Settled, Standing, inspect};

use super::{headers, next, start};
use crate::support::broker::{TestBroker, access, amqp_url};
use crate::support::proxy::tls_in_front_of;

#[tokio::test]
async fn a_queue_with_other_settings_is_named_with_what_to_do() {
    let test = TestBroker::new("conflict", &[5]).await;
    let queue = test.name("retry.reminders.5");
    let channel = test.channel().await;
    let options = QueueDeclareOptions { durable: true, ..Default::default() };
    channel.queue_declare(queue.as_str().into(), options, FieldTable::default()).await.expect("declared");
    let error = test.topology().declare(&access(), &[]).await.expect_err("a conflict");
    assert!(matches!(&error, BrokerError::Conflict { object, .. } if object.contains(&queue)), "{error}");
    assert!(error.to_string().contains("delete it and run `sendoff topology declare`"), "{error}");
    let findings = inspect(&access(), test.topology()).await.expect("reachable");
    let named = |finding: &sendoff::broker::Finding| matches!(&finding.standing, Standing::Bad(why) if why.contains(&queue));
    assert!(findings.iter().any(named), "{findings:?}");
    test.clean_up().await;
}

#[tokio::test]
async fn the_check_names_what_is_missing_and_creates_nothing() {
    let test = TestBroker::new("check", &[5]).await;
    let findings = inspect(&access(), test.topology()).await.expect("reachable");
    let bad = findings.iter().filter(|finding| matches!(finding.standing, Standing::Bad(_))).count();
    assert_eq!(bad, test.topology().queues.len() + test.topology().exchanges.len(), "{findings:?}");
    assert_eq!(test.count(&test.name("dead")).await, None);
    test.declare().await;
    let findings = inspect(&access(), test.topology()).await.expect("reachable");
    assert!(!findings.iter().any(|finding| matches!(finding.standing, Standing::Bad(_))), "{findings:?}");
    assert!(
        matches!(&findings[0].standing, Standing::Good(seen) if seen.contains("is RabbitMQ 3.")),
        "{findings:?}"
    );
    test.clean_up().await;
}

#[tokio::test]
async fn a_binding_that_is_no_longer_listed_is_unbound() {
    let test = TestBroker::new("unbind", &[]).await;
    test.declare().await;
    let mut settings = test.settings();
    let previous = settings.topology().lane_bindings();
    settings.lanes[0].bindings = vec!["notification.urgent.#".to_owned()];
    settings.topology().declare(&access(), &previous).await.expect("declared");
    test.publish_job("notification.slow", b"{}", BasicProperties::default()).await;
    test.publish_job("notification.urgent.x", b"{}", BasicProperties::default()).await;
    test.wait_count(&test.name("dead"), 1).await;
    test.wait_count(&test.name("jobs.notifications"), 1).await;
    let gone = [("never-there".to_owned(), "x.#".to_owned())];
    settings.topology().declare(&access(), &gone).await.expect("a lane that is gone needs no unbinding");
    test.clean_up().await;
}

#[tokio::test]
async fn refusals_of_the_broker_are_told_apart_and_never_show_the_password() {
    let server = AmqpUrl::parse(&amqp_url()).expect("a URL").server();
    let test = TestBroker::new("refusals", &[]).await;
    let try_url = async |url: String| {
        let access = Access::new(AmqpUrl::parse(&url).expect("a URL"));
        test.topology().declare(&access, &[]).await.expect_err("refused")
    };
    let credentials = try_url(format!("amqp://nobody:s3cret@{server}/%2f")).await;
    assert!(matches!(credentials, BrokerError::CredentialsRefused { .. }), "{credentials}");
    let (scheme, rest) =
        amqp_url().split_once("://").map(|(s, r)| (s.to_owned(), r.to_owned())).expect("a URL");
    let user = rest.split('@').next().expect("a user").to_owned();
    let vhost = try_url(format!("{scheme}://{user}@{server}/not-there")).await;
    assert!(matches!(vhost, BrokerError::VirtualHost { .. }), "{vhost}");
    // No program is given this port that asks for any port.
    let nobody = try_url("amqp://u:s3cret@127.0.0.1:1/%2f".to_owned()).await;
    assert!(matches!(nobody, BrokerError::Unreachable { .. }) && nobody.is_unreachable(), "{nobody}");
    for error in [credentials, vhost, nobody] {
        assert!(!format!("{error} {error:?}").contains("s3cret"), "{error:?}");
    }
    test.clean_up().await;
}

#[tokio::test]
async fn tls_needs_an_authority_that_is_trusted() {
    let test = TestBroker::new("tls", &[]).await;
    let server = AmqpUrl::parse(&amqp_url()).expect("a URL").server();
    let (address, authority) = tls_in_front_of(server.parse().expect("an address")).await;
    let through =
        amqp_url().replace("amqp://", "amqps://").replace(&server, &format!("localhost:{}", address.port()));
    let access = Access::new(AmqpUrl::parse(&through).expect("a URL"));
    let error = test.topology().declare(&access, &[]).await.expect_err("an unknown authority");
    assert!(matches!(error, BrokerError::Tls { .. }), "{error}");
    let trusting = access.trust(&authority).expect("a certificate");
    test.topology().declare(&trusting, &[]).await.expect("trusted");
    let findings = inspect(&trusting, test.topology()).await.expect("reachable");
    assert!(
        matches!(&findings[0].standing, Standing::Good(seen) if seen.contains("is RabbitMQ")),
        "{findings:?}"
    );
    test.clean_up().await;
}

#[tokio::test]
async fn of_many_publishes_at_once_exactly_those_without_a_queue_fail() {
    let test = TestBroker::new("mandatory", &[600]).await;
    test.declare().await;
    test.publish_job("notification.x", b"job", BasicProperties::default()).await;
    let broker = start(&test);
    let mut lane = broker.lane("notifications").expect("a lane");
    let delivery = next(&mut lane).await;
    let (job, publisher) = (delivery.received().clone(), broker.publisher());
    let publishes = (0..400).map(|n| {
        let (job, publisher) = (&job, &publisher);
        // Every seventh goes to a delay that has no queue.
        let delay_s = if n % 7 == 0 { 601 } else { 600 };
        async move { (delay_s, publisher.retry(job, "notifications", delay_s, headers(1, 1)).await) }
    });
    for (delay_s, outcome) in futures_util::future::join_all(publishes).await {
        match outcome {
            Ok(()) => assert_eq!(delay_s, 600),
            Err(error) => {
                assert_eq!(delay_s, 601);
                assert!(matches!(error, PublishError::Unroutable { .. }) && error.is_certain(), "{error}");
            }
        }
    }
    test.wait_count(&test.name("retry.notifications.600"), 342).await;
    let copies = test.drain(&test.name("retry.notifications.600")).await;
    assert!(copies.iter().all(|copy| copy.body == b"job"));
    assert_eq!(delivery.ack(), Settled::Done);
    broker.close().await;
    test.clean_up().await;
}
