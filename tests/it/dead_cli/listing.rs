//! Listings of letters: their pages, filters, keys, lines and counts.

use sendoff::model::failure::Reason;
use sendoff::model::letter::NewLetter;
use serde_json::json;

use super::{DAY, House, MINUTE, id, of, shows_nobody};

#[tokio::test]
async fn a_listing_goes_on_where_its_page_ended() {
    let house = House::new().await;
    assert_eq!(house.done(&["dead", "list"]).await, "The archive has no dead letter.\n");
    assert_eq!(house.json(&["dead", "list"]).await, json!([]));
    let letters: Vec<_> =
        (1..=60).map(|job| house.letter(job, MINUTE * u32::try_from(job).unwrap())).collect();
    house.archive(&letters).await;
    assert_eq!(house.listed(&[]).await, (1..=50).collect::<Vec<_>>(), "50 unless said otherwise");

    let mut ids = Vec::new();
    let mut after = None;
    loop {
        let mut arguments = vec!["dead", "list", "--limit", "25"];
        arguments.extend(after.as_deref().into_iter().flat_map(|after| ["--after", after]));
        let printed = house.done(&arguments).await;
        let lines: Vec<&str> = printed.lines().collect();
        let letters = lines[1..].iter().filter(|line| line.contains("message_refused"));
        ids.extend(letters.filter_map(|line| line.split_whitespace().last().map(str::to_owned)));
        match lines.last().unwrap().split_once("--after ") {
            Some((_, next)) => after = Some(next.to_owned()),
            None => break,
        }
        assert!(ids.len() < 60, "a last page names no next one: {printed}");
    }
    assert_eq!(ids, (1..=60).map(id).collect::<Vec<_>>());

    let page = house.json(&["dead", "list", "--limit", "59"]).await;
    let last = &page[58];
    let after = format!("{}_{}", last["died_at"].as_str().unwrap(), last["letter"].as_str().unwrap());
    assert_eq!(house.listed(&["--after", &after]).await, [60]);
}

#[tokio::test]
async fn filters_combine() {
    let house = House::new().await;
    let base = |job, days| house.letter(job, DAY * days + MINUTE);
    let unread = NewLetter { key: None, kind: None, reason: Reason::Malformed, ..base(6, 5) };
    house
        .archive(&[
            base(1, 0),
            NewLetter { reason: Reason::Timeout, ..base(2, 1) },
            NewLetter { kind: Some("reminder".into()), ..base(3, 2) },
            of(base(4, 3), Some("acme")),
            of(base(5, 4), None),
            unread,
        ])
        .await;
    house
        .database
        .run(format!("UPDATE dead_letters SET state = 'discarded' WHERE job_id = '{}'", id(3)))
        .await;
    let (one, five, six) = (id(1), id(5), id(6));
    for (options, jobs) in [
        (vec!["--org", "42"], vec![1, 2, 3]),
        (vec!["--org", "acme,42", "--reason", "message_refused"], vec![1, 3, 4]),
        (vec!["--org", "42", "--kind", "booking.confirmed"], vec![1, 2]),
        (vec!["--reason", "timeout", "--kind", "reminder"], vec![]),
        (vec!["--state", "discarded"], vec![3]),
        (vec!["--state", "dead", "--org", "42"], vec![1, 2]),
        (vec!["--since", "2d"], vec![1, 2]),
        (vec!["--since", "4d", "--until", "36h"], vec![3, 4]),
        (vec!["--id", &one, "--id", &five], vec![1, 5]),
        (vec!["--id", &one, "--org", "acme"], vec![]),
        (vec!["--id", &six], vec![6]),
        (vec!["--id", &six, "--org", "42"], vec![]),
        (vec!["--org", "42", "--limit", "1"], vec![1]),
    ] {
        assert_eq!(house.listed(&options).await, jobs, "{options:?}");
    }
    let platform = house.json(&["dead", "list", "--platform"]).await;
    let ids: Vec<_> =
        platform.as_array().unwrap().iter().map(|letter| letter["id"].as_str().unwrap()).collect();
    assert_eq!(ids, [five.as_str()], "and not what tells no organization");
    assert_eq!(house.listed(&["--org", "platform"]).await, Vec::<u128>::new(), "an id like any other");
    let nothing = house.done(&["dead", "list", "--kind", "unheard.of"]).await;
    assert_eq!(nothing, "No dead letter matches.\n");
}

#[tokio::test]
async fn a_letter_in_a_listing_has_the_contracts_keys_and_no_address() {
    let house = House::new().await;
    let letter = NewLetter {
        detail: Some("550 <ann@example.org> is unknown".into()),
        routing_key: "notification.bob@example.org".into(),
        recipients: Some(vec![1]),
        ..house.letter(1, DAY + MINUTE)
    };
    let unread = NewLetter { job_id: None, key: None, kind: None, lane: None, ..house.letter(2, DAY * 5) };
    house.archive(&[letter.clone(), unread, of(house.letter(3, DAY * 6), None)]).await;

    let listed = house.json(&["dead", "list"]).await;
    shows_nobody(&listed.to_string());
    for (key, value) in [
        ("id", json!(id(1))),
        ("organization_id", json!("42")),
        ("platform", json!(false)),
        ("state", json!("dead")),
        ("reason", json!("message_refused")),
        ("detail", json!("550 <a…@example.org> is unknown")),
        ("attempts", json!(3)),
        ("letter", json!(letter.id())),
        ("kind", json!("booking.confirmed")),
        ("lane", json!("notifications")),
        ("deaths", json!(1)),
        ("replays", json!(0)),
        ("recipients", json!([1])),
        ("bytes", json!(letter.body.len())),
        ("history", json!([])),
        ("expires_at", json!(null)),
    ] {
        assert_eq!(listed[0][key], value, "{key}");
    }
    for time in ["died_at", "first_at", "archived_at"] {
        assert!(listed[0][time].as_str().is_some_and(|time| time.ends_with('Z')), "{time}");
    }
    assert_eq!(listed[1]["id"], listed[1]["letter"]);
    for (at, platform) in [(1, false), (2, true)] {
        let owner = (&listed[at]["organization_id"], &listed[at]["platform"]);
        assert_eq!(owner, (&json!(null), &json!(platform)), "{at}");
    }

    let table = house.done(&["dead", "list"]).await;
    shows_nobody(&table);
    let lines: Vec<Vec<&str>> = table.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(lines[0], ["AGE", "ORG", "KIND", "REASON", "ATTEMPTS", "STATE", "ID"]);
    assert_eq!(lines[1], ["1d", "42", "booking.confirmed", "message_refused", "3", "dead", &id(1)]);
    assert_eq!(lines[2][..3], ["5d", "(unknown)", "-"]);
    assert_eq!(lines[3][..2], ["6d", "(platform)"]);
}

#[tokio::test]
async fn a_line_of_a_listing_fits_the_terminal_and_keeps_its_id() {
    let house = House::new().await;
    let wide = NewLetter {
        kind: Some("k".repeat(64)),
        reason: Reason::UnsupportedVersion,
        ..of(house.letter(1, DAY), Some(&"o".repeat(64)))
    };
    house.archive(&[wide, house.letter(2, MINUTE)]).await;
    house.database.run("UPDATE dead_letters SET state = 'discarded'").await;
    let table = house.done(&["dead", "list"]).await;
    let lines: Vec<&str> = table.lines().collect();
    assert!(lines.iter().all(|line| line.chars().count() <= 110), "{table}");
    let start = |line: &str| line.chars().count() - 36;
    assert!(lines[1].ends_with(&id(2)) && lines[2].ends_with(&id(1)), "{table}");
    assert_eq!(start(lines[1]), start(lines[2]), "aligned");
    assert!(lines[2].contains("ooo…  kkk"), "{table}");
}

#[tokio::test]
async fn letters_are_counted_by_reason_organization_and_age() {
    let house = House::new().await;
    assert_eq!(house.done(&["dead", "stats"]).await, "The archive has no dead letter.\n");
    let mut letters: Vec<_> = [MINUTE, MINUTE * 300, DAY * 3, DAY * 10, DAY * 60]
        .into_iter()
        .zip(1..)
        .map(|(ago, job)| house.letter(job, ago))
        .collect();
    letters.push(NewLetter { reason: Reason::Timeout, ..of(house.letter(6, DAY * 3), None) });
    house.archive(&letters).await;

    let stats = house.json(&["dead", "stats"]).await;
    let expected = json!([
        {"reason": "message_refused", "organization_id": "42", "platform": false, "total": 5,
         "ages": {"hour": 1, "day": 1, "week": 1, "month": 1, "older": 1}},
        {"reason": "timeout", "organization_id": null, "platform": true, "total": 1,
         "ages": {"hour": 0, "day": 0, "week": 1, "month": 0, "older": 0}},
    ]);
    assert_eq!(stats, expected);
    let printed = house.done(&["dead", "stats"]).await;
    let lines: Vec<Vec<&str>> = printed.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(lines[0], ["REASON", "ORGANIZATION", "TOTAL", "<1h", "<1d", "<7d", "<30d", "older"]);
    assert_eq!(lines[1], ["message_refused", "42", "5", "1", "1", "1", "1", "1"], "and no bar in a pipe");
    assert_eq!(lines[2], ["timeout", "(platform)", "1", "0", "0", "1", "0", "0"]);
    assert_eq!(lines[3], ["total", "6", "1", "1", "2", "1", "1"]);
    let some = house.json(&["dead", "stats", "--since", "7d", "--org", "42"]).await;
    assert_eq!((some.as_array().unwrap().len(), &some[0]["total"]), (1, &json!(3)));
    assert_eq!(house.json(&["dead", "stats", "--limit", "1"]).await.as_array().unwrap().len(), 1);
}
