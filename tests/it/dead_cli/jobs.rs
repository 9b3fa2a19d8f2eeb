//! A job's status and story out of the ledger and the archive.

use std::sync::Arc;

use secrecy::SecretString;
use sendoff::clock::Clock;
use sendoff::control::{CommandMeta, Control, ControlRules};
use sendoff::egress::{AllowedPorts, Egress, EgressPolicy};
use sendoff::model::failure::Reason;
use sendoff::model::ledger::Turn;
use sendoff::model::letter::NewLetter;
use sendoff::secrets::KeyRing;
use sendoff::store::SmtpConfigs;
use serde_json::{Value, json};
use uuid::Uuid;

use super::{DAY, House, KEY, MINUTE, id, ledger_row, of, shows_nobody, with_body};
use crate::support::connector::connector;

#[tokio::test]
async fn a_job_that_only_the_archive_knows_has_a_status() {
    let house = House::new().await;
    let body = format!("{{\"version\": 1, \"id\": \"{}\", \"to\": \"ann@example.org\"}}", id(1));
    let malformed = NewLetter {
        reason: Reason::Malformed,
        detail: Some("to: must be an array".into()),
        attempts: 0,
        first_at: None,
        turn: Turn(0),
        ..with_body(house.letter(1, MINUTE), body.as_bytes())
    };
    let unread = NewLetter { job_id: None, key: None, ..malformed.clone() };
    house.archive(&[malformed.clone(), unread.clone()]).await;

    let id = id(1);
    let expected = json!({
        "id": id, "organization_id": "42", "state": "dead", "reason": "malformed", "attempts": 0,
        "next_attempt_at": null, "message_id": null, "reply": null, "history": [],
        "detail": "to: must be an array", "letter": malformed.id(), "refused": [], "platform": false,
    });
    let answer = house.json(&["job", "status", &id, "--org", "42"]).await;
    for (key, value) in expected.as_object().unwrap() {
        assert_eq!(&answer[key], value, "{key}");
    }
    let story = house.done(&["job", "status", &id]).await;
    shows_nobody(&story);
    for words in
        [&format!("42/{id}: dead\n"), "the body is no job (malformed)", "to: must be an array", "Next: "]
    {
        assert!(story.contains(words), "{words}: {story}");
    }
    let by_letter = house.json(&["job", "status", &unread.id().to_string()]).await;
    assert_eq!((&by_letter["id"], &by_letter["state"]), (&json!(unread.id()), &json!("dead")));
    let other = house.fails(&["job", "status", &id, "--org", "7"], 1).await;
    assert!(other.contains("neither the ledger nor the archive"), "{other}");
    house.fails(&["job", "status", &id, "--platform"], 1).await;

    assert_eq!(job_status(&house, json!("42"), &id).await["result"], answer, "one way to tell it");
    let spelled = &job_status(&house, json!(42), &id).await["result"]["organization_id"];
    assert_eq!(*spelled, 42, "as the command spells it");
    assert_eq!(job_status(&house, json!(7), &id).await["error"]["code"], "not_found");
    let nobodys = job_status(&house, json!(null), &unread.id().to_string()).await;
    assert_eq!(nobodys["error"]["code"], "not_found", "a letter without a job is no job of the platform's");
}

#[tokio::test]
async fn a_letter_that_tells_an_id_and_no_usable_organization_is_found_by_that_id_and_is_nobodys_job() {
    let house = House::new().await;
    let body = json!({"version": 1, "id": Uuid::from_u128(1), "organization_id": "not valid!", "kind": "k"});
    let unknown = NewLetter {
        key: None,
        reason: Reason::Malformed,
        detail: Some("organization_id: must be an integer".into()),
        ..with_body(house.letter(1, MINUTE), body.to_string().as_bytes())
    };
    house.archive(std::slice::from_ref(&unknown)).await;
    let (id, letter) = (id(1), unknown.id().to_string());
    assert_eq!(house.listed(&["--id", &id]).await, [1]);
    assert_eq!(house.listed(&["--id", &id, "--platform"]).await, Vec::<u128>::new());
    let headline = format!("(unknown)/{id}: dead\n");
    for command in [["dead", "show"], ["job", "status"]] {
        for name in [&id, &letter] {
            let story = house.done(&[&command[..], &[name]].concat()).await;
            assert!(story.starts_with(&headline) && story.contains("organization_id: must be"), "{story}");
            let told = house.json(&[&command[..], &[name]].concat()).await;
            let facts = ["id", "organization_id", "platform", "letter", "reason"].map(|name| &told[name]);
            let expected = json!([id, null, false, letter, "malformed"]);
            assert_eq!(json!(facts), expected);
        }
        house.fails(&[&command[..], &[&id, "--platform"]].concat(), 1).await;
    }
    assert_eq!(house.json(&["dead", "stats"]).await[0]["platform"], false);
    let discarded = house.json(&["dead", "discard", "--id", &id, "--dry-run"]).await;
    assert_eq!((&discarded["selected"], &discarded["groups"][0]["platform"]), (&json!(1), &json!(false)));
    for organization in [json!(null), json!(42)] {
        for name in [&id, &letter] {
            let answer = job_status(&house, organization.clone(), name).await;
            assert_eq!(answer["error"]["code"], "not_found", "it is not known to be theirs");
        }
    }

    // An older letter of somebody's job comes before one of nobody's.
    house.archive(&[house.letter(1, DAY)]).await;
    for command in [["dead", "show"], ["job", "status"]] {
        let story = house.done(&[&command[..], &[&id]].concat()).await;
        assert!(story.starts_with(&format!("42/{id}: dead\n")), "{story}");
        let story = house.done(&[&command[..], &[&letter]].concat()).await;
        assert!(story.starts_with(&headline), "{story}");
    }
}

/// What the control command answers.
async fn job_status(house: &House, organization: Value, id: &str) -> Value {
    let keys = Arc::new(KeyRing::parse(&[SecretString::from(KEY)]).expect("a key ring"));
    let configs = SmtpConfigs::new(house.database.store(), keys);
    let policy = EgressPolicy::new(Vec::new(), Vec::new(), AllowedPorts::Any);
    let egress = Arc::new(Egress::new(policy, &["127.0.0.1:9".parse().unwrap()]).expect("a name server"));
    let (store, smtp) = (house.database.store(), connector(egress));
    let control = Control::new(store, configs, smtp, Clock::system(), ControlRules::default());
    let command = json!({"command": "job.status", "organization_id": organization, "params": {"id": id}});
    let response = control.handle(command.to_string().as_bytes(), CommandMeta::default()).await;
    serde_json::from_slice(&response.to_json()).expect("a reply is JSON")
}

#[tokio::test]
async fn a_jobs_story_is_told_in_words_with_each_attempt() {
    let house = House::new().await;
    house.archive(&[house.letter(1, MINUTE)]).await;
    let deed = json!([{"what": "discard", "at": "2026-11-21T09:00:00Z", "by": "cli:emil"}]);
    house.database.run(format!("UPDATE dead_letters SET state = 'discarded', history = '{deed}'")).await;
    ledger_row(&house, 1, "dead", 1).await;
    let story = house.done(&["job", "status", &id(1)]).await;
    shows_nobody(&story);
    for words in [
        &format!("42/{}: dead\nIt died at ", id(1)),
        "(1 h ago), because the server refused the message (message_refused).\nNext: nothing by itself; treat the cause, then `sendoff dead replay",
        "Attempts (2 of 3 are kept):\n  1. 2026-11-20T12:00:00Z",
        "  2. 2026-11-20T12:05:00Z",
        "550 no",
        "<m@example.org>",
        "discarded by cli:emil",
    ] {
        assert!(story.contains(words), "{words}: {story}");
    }
}

#[tokio::test]
async fn one_id_of_two_organizations_needs_a_choice_and_two_bodies_of_one_job_do_not() {
    let house = House::new().await;
    let newer = with_body(house.letter(1, MINUTE), b"another");
    house.archive(&[house.letter(1, DAY), NewLetter { reason: Reason::IdConflict, ..newer }]).await;
    let story = house.done(&["dead", "show", &id(1)]).await;
    assert!(story.contains("id_conflict") && story.contains("1 letter more"), "{story}");

    house.archive(&[of(house.letter(1, DAY), Some("acme")), of(house.letter(1, DAY), None)]).await;
    for command in [["dead", "show"], ["job", "status"]] {
        let words = house.fails(&[&command[..], &[&id(1)]].concat(), 1).await;
        assert!(words.contains("acme") && words.contains("--org or --platform"), "{words}");
        for (choice, name) in [(vec!["--org", "acme"], "acme/"), (vec!["--platform"], "platform/")] {
            let story = house.done(&[&command[..], &[&id(1)], &choice].concat()).await;
            assert!(story.starts_with(name), "{story}");
        }
    }
}
