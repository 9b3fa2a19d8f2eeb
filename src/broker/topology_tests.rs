//! The list of exchanges and queues, flag by flag.

use super::*;

fn topology() -> Topology {
    let lanes = [
        Lane::new("notifications", vec!["notification.#".into()], 512).unwrap(),
        Lane::new("reminders", vec!["reminder.#".into()], 512).unwrap(),
    ];
    Topology::new("p", &lanes, &[5, 10])
}

fn argument<'a>(queue: &'a Queue, name: &str) -> Option<&'a Value> {
    queue.arguments.iter().find(|argument| argument.name == name).map(|argument| &argument.value)
}

#[test]
fn every_queue_that_holds_a_job_dead_letters_at_least_once_into_its_place() {
    for queue in
        topology().queues.iter().filter(|queue| queue.name.contains("lane") || queue.name.contains("retry"))
    {
        assert_eq!(argument(queue, "x-queue-type"), Some(&Value::Text("quorum".into())));
        assert_eq!(argument(queue, "x-dead-letter-strategy"), Some(&Value::Text("at-least-once".into())));
        assert_eq!(argument(queue, "x-overflow"), Some(&Value::Text("reject-publish".into())));
    }
    let topology = topology();
    let queue = |name: &str| topology.queues.iter().find(|queue| queue.name == name).unwrap();
    let retry = queue("p.retry.reminders.10");
    assert_eq!(argument(retry, "x-message-ttl"), Some(&Value::Number(10_000)));
    assert_eq!(argument(retry, "x-dead-letter-exchange"), Some(&Value::Text("p.jobs.reminders".into())));
    let lane = queue("p.jobs.notifications");
    assert_eq!(argument(lane, "x-dead-letter-exchange"), Some(&Value::Text("p.dead".into())));
    assert_eq!(argument(lane, "x-delivery-limit"), Some(&Value::Number(100)));
    assert_eq!(argument(queue("p.dead"), "x-delivery-limit"), Some(&Value::Number(1_000_000_000)));
}

#[test]
fn both_ends_of_every_binding_are_in_the_list() {
    let topology = topology();
    let exchange = |name: &String| topology.exchanges.iter().any(|exchange| exchange.name == *name);
    for binding in &topology.bindings {
        assert!(exchange(&binding.source), "{binding:?}");
        let found = match binding.to {
            Destination::Queue => topology.queues.iter().any(|queue| queue.name == binding.destination),
            Destination::Exchange => exchange(&binding.destination),
        };
        assert!(found, "{binding:?}");
    }
}

#[test]
fn the_printed_form_names_every_flag_with_its_reason() {
    let shown = topology().to_string();
    assert!(
        shown.contains("queue p.retry.notifications.5 (durable): jobs of lane notifications that wait 5 s\n"),
        "{shown}"
    );
    assert!(shown.contains("  x-overflow = reject-publish: without it"), "{shown}");
    assert!(shown.contains("binding p.jobs -> queue p.jobs.reminders by reminder.#\n"), "{shown}");
    let json = serde_json::to_value(topology()).unwrap();
    assert_eq!(json["exchanges"][2]["type"], "topic");
    assert_eq!(json["queues"][1]["arguments"][1]["value"], 60_000);
}

#[test]
fn names_of_our_own_queues_are_recognised() {
    let names = Names::new("p");
    for own in ["p", "p.control", "p.jobs.x", "p.anything"] {
        assert!(names.owns(own), "{own}");
    }
    for other in ["pq", "amq.gen-x", "x.p.control", ""] {
        assert!(!names.owns(other), "{other}");
    }
    assert_eq!(names.lane_of("p.jobs.reminders").as_deref(), Some("reminders"));
    assert_eq!(names.lane_of("p.jobs."), None);
}
