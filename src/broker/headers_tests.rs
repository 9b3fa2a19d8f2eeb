//! What is read from properties, whatever a publisher wrote, and what a republish carries on.

use super::*;
use lapin::message::Delivery;
use lapin::types::FieldArray;

fn delivery(exchange: &str, key: &str, headers: &[(&str, AMQPValue)]) -> Delivery {
    let mut table = FieldTable::default();
    for (name, value) in headers {
        table.insert((*name).into(), value.clone());
    }
    let mut delivery = Delivery::mock(1, exchange.into(), key.into(), false, b"{}".to_vec());
    delivery.properties = BasicProperties::default().with_headers(table);
    delivery
}

fn deaths(queue: &str, reason: &str) -> AMQPValue {
    let mut death = FieldTable::default();
    death.insert("queue".into(), long(queue));
    death.insert("reason".into(), long(reason));
    AMQPValue::FieldArray(FieldArray::from(vec![AMQPValue::FieldTable(death)]))
}

#[test]
fn a_copy_from_a_delay_queue_keeps_its_routing_key_and_counters() {
    let mut copy = delivery(
        "p.jobs.reminders",
        "p.retry.reminders.10",
        &[
            (ROUTING_KEY, long("reminder.day_before")),
            (ATTEMPT, AMQPValue::LongLongInt(3)),
            (TURN, AMQPValue::ShortUInt(2)),
            (FIRST_AT, long("2026-11-22T20:00:00Z")),
        ],
    );
    let received = Received::from_lane(&mut copy, &Names::new("p"), "reminders");
    assert_eq!(received.routing_key, "reminder.day_before");
    assert_eq!((received.attempt, received.turn), (3, Turn(2)));
    assert_eq!(received.first_at, Some(time::macros::datetime!(2026-11-22 20:00 UTC)));
}

#[test]
fn headers_of_a_wrong_type_or_a_monstrous_size_are_as_good_as_absent() {
    let huge = "x".repeat(100_000);
    let mut hostile = delivery(
        "p.jobs",
        "notification.x",
        &[
            (ATTEMPT, long("many")),
            (TURN, AMQPValue::LongLongInt(-5)),
            (FIRST_AT, AMQPValue::Boolean(true)),
            (ROUTING_KEY, long("reminder.not_mine")),
            (REASON, long("malformed")),
            (RECIPIENTS, long("0")),
            ("sendoff-note", long("kept")),
            ("sendoff-huge", long(&huge)),
            ("sendoff-table", AMQPValue::FieldTable(FieldTable::default())),
            (TRACEPARENT, long(&huge)),
            ("x-death", long("not an array")),
        ],
    );
    let received = Received::from_lane(&mut hostile, &Names::new("p"), "notifications");
    assert_eq!((received.attempt, received.turn, received.first_at), (0, Turn(0), None));
    assert_eq!((received.routing_key.as_str(), &received.recipients), ("notification.x", &None));
    assert_eq!(received.carried.traceparent, None);
    assert_eq!(
        received.carried.extra,
        BTreeMap::from([("sendoff-note".to_owned(), Scalar::Text("kept".to_owned()))])
    );
}

#[test]
fn who_killed_a_letter_is_told_by_what_a_publisher_cannot_forge() {
    let names = Names::new("p");
    let forged = [(REASON, long("auth_failed")), ("x-death", deaths("p.jobs.lane", "delivery_limit"))];
    let unrouted = Received::from_dead(&mut delivery("p.jobs", "nobody.takes", &forged), &names);
    let death = unrouted.death.unwrap();
    assert_eq!((death.reason, death.killer), (Reason::Unroutable, Killer::Broker));
    assert_eq!(death.detail.as_deref(), Some("no lane takes the routing key `nobody.takes`"));

    let looped = Received::from_dead(&mut delivery("p.dead", "k", &forged), &names);
    let death = looped.death.unwrap();
    assert_eq!((death.reason, death.killer), (Reason::CrashLoop, Killer::Broker));
    assert_eq!(looped.lane.as_deref(), Some("lane"));

    let killed = [
        (REASON, long("auth_failed")),
        (DETAIL, long("a\r\nb")),
        (DIED_AT, long("2026-11-22T20:00:00Z")),
        (LANE, long("reminders")),
        (ROUTING_KEY, long("reminder.x")),
    ];
    let by_worker = Received::from_dead(&mut delivery("p.dead", "reminder.x", &killed), &names);
    let death = by_worker.death.unwrap();
    assert_eq!((death.reason, death.detail.as_deref()), (Reason::AuthFailed, Some("a b")));
    assert_eq!(death.died_at, Some(time::macros::datetime!(2026-11-22 20:00 UTC)));
    assert_eq!((by_worker.lane.as_deref(), death.killer), (Some("reminders"), Killer::Worker));

    let strange = Received::from_dead(&mut delivery("", "p.dead", &[]), &names).death.unwrap();
    assert_eq!((strange.reason, strange.killer), (Reason::Internal, Killer::Broker));
}

#[test]
fn a_letter_is_for_the_recipients_that_a_worker_names_in_ascending_order_or_for_all() {
    let names = Names::new("p");
    let read = |value: AMQPValue| {
        let mut letter = delivery("p.dead", "reminder.x", &[(RECIPIENTS, value)]);
        Received::from_dead(&mut letter, &names).recipients
    };
    assert_eq!(read(long("0")), Some(vec![0]));
    assert_eq!(read(long("1,3,65535")), Some(vec![1, 3, 65_535]));
    let all: Vec<String> = (0..RECIPIENTS_MAX).map(|position| position.to_string()).collect();
    assert_eq!(read(long(&all.join(","))).unwrap().len(), RECIPIENTS_MAX);
    let unusable = ["", ",", "1,", "3,1", "1,1", "-1", "+1", " 1", "1, 3", "1;3", "65536", "all"];
    for value in unusable {
        assert_eq!(read(long(value)), None, "{value:?}");
    }
    assert_eq!(read(long(&format!("{},{RECIPIENTS_MAX}", all.join(",")))), None);
    assert_eq!(read(AMQPValue::LongLongInt(1)), None);

    // What the broker kills has only its publisher's headers.
    let forged = (RECIPIENTS, long("0"));
    let mut unrouted = delivery("p.jobs", "nobody.takes", std::slice::from_ref(&forged));
    assert_eq!(Received::from_dead(&mut unrouted, &names).recipients, None);
    let mut looped = delivery("p.dead", "k", &[forged, ("x-death", deaths("p.jobs.lane", "delivery_limit"))]);
    assert_eq!(Received::from_dead(&mut looped, &names).recipients, None);
}

#[test]
fn what_a_worker_says_of_a_death_is_read_back() {
    let at = time::macros::datetime!(2026-11-22 20:00 UTC);
    let said = DeadLetter {
        reason: Reason::RecipientsRefused,
        detail: "recipient 1 was refused",
        died_at: at,
        recipients: Some(&[1, 30]),
        fate: Fate::Parked,
    };
    let mut letter = delivery("p.dead", "reminder.x", &death_headers(&said));
    let read = Received::from_dead(&mut letter, &Names::new("p"));
    assert_eq!(read.recipients, Some(vec![1, 30]));
    let detail = Some(said.detail.to_owned());
    let (killer, fate) = (Killer::Worker, Fate::Parked);
    assert_eq!(read.death, Some(Death { reason: said.reason, detail, died_at: Some(at), killer, fate }));
}

#[test]
fn nobody_but_a_worker_parks_a_letter() {
    let names = Names::new("p");
    let at = time::macros::datetime!(2026-11-22 20:00 UTC);
    let fate = |headers: &[(&'static str, AMQPValue)]| {
        let mut letter = delivery("p.dead", "reminder.x", headers);
        Received::from_dead(&mut letter, &names).death.map(|death| death.fate)
    };
    let parked = || (STATE, long("parked"));
    assert_eq!(fate(&[parked(), (DIED_AT, time_value(at))]), Some(Fate::Parked));
    assert_eq!(fate(&[(STATE, long("sent")), (DIED_AT, time_value(at))]), Some(Fate::Dead));
    assert_eq!(fate(&[parked()]), Some(Fate::Dead));
    assert_eq!(fate(&[parked(), ("x-death", deaths("p.jobs.lane", "delivery_limit"))]), Some(Fate::Dead));
}

#[test]
fn a_republish_carries_on_only_what_the_contract_names() {
    let mut hostile = delivery(
        "p.jobs",
        "k",
        &[
            ("x-death", deaths("p.retry.l.5", "expired")),
            ("CC", long("p.dead")),
            ("BCC", long("p.dead")),
            ("x-anything", long("y")),
            ("sendoff-note", long("kept")),
            (REASON, long("stale")),
            (RECIPIENTS, long("0")),
            (STATE, long("parked")),
            (TRACEPARENT, long("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01")),
        ],
    );
    hostile.properties = hostile
        .properties
        .clone()
        .with_content_type("application/json".into())
        .with_message_id("m".into())
        .with_correlation_id("c".into())
        .with_timestamp(1_700_000_000)
        .with_expiration("1".into())
        .with_user_id("guest".into())
        .with_reply_to("p.control".into())
        .with_app_id("a".into())
        .with_priority(9);
    let received = Received::from_lane(&mut hostile, &Names::new("p"), "l");
    let headers = JobHeaders { attempt: 1, first_at: OffsetDateTime::UNIX_EPOCH, turn: Turn(1), faults: 0 };
    let properties = received.carried.to_properties(job_headers("l", "k", &headers));
    let kept: Vec<&str> =
        properties.headers().as_ref().unwrap().inner().keys().map(ShortString::as_str).collect();
    assert_eq!(kept, [ATTEMPT, FIRST_AT, LANE, "sendoff-note", ROUTING_KEY, TURN, TRACEPARENT]);
    let bare = BasicProperties::default()
        .with_content_type("application/json".into())
        .with_message_id("m".into())
        .with_correlation_id("c".into())
        .with_timestamp(1_700_000_000)
        .with_delivery_mode(2);
    assert_eq!(
        properties.clone().with_headers(FieldTable::default()),
        bare.with_headers(FieldTable::default())
    );
}

#[test]
fn a_turn_that_leaves_no_room_for_others_is_none() {
    for (said, read) in [(7_i64, 7), (-1, 0), (1_000_000_000, 1_000_000_000), (i64::from(i32::MAX), 0)] {
        let mut copy = delivery("p.jobs", "k", &[(TURN, AMQPValue::LongLongInt(said))]);
        assert_eq!(Received::from_lane(&mut copy, &Names::new("p"), "l").turn, Turn(read), "{said}");
    }
}
