//! What an update lays over what, also when others change the same configuration at once.

use serde_json::{Value, json};

use super::{World, code, settings, settings_with, text};
use crate::support::dns::Answer;

#[tokio::test]
async fn a_port_that_gives_up_tls_asks_for_the_password_again() {
    let world = World::enabled("acme").await;
    let implicit = settings_with(json!({"port": 465, "secure": false}));
    world.ok("smtp_config.create", "acme", implicit).await;
    let given_up = world.error("smtp_config.update", "acme", json!({"port": 587})).await;
    assert_eq!(given_up, code("invalid_field", "password"));
    world.ok("smtp_config.update", "acme", json!({"port": 587, "secure": true})).await;
    world.ok("smtp_config.update", "acme", json!({"port": 25})).await;
}

#[tokio::test]
async fn of_twenty_creates_at_once_exactly_one_is_left() {
    let world = World::enabled("acme").await;
    let creates = (0..20).map(|n| {
        world.ask_on("smtp_config.create", "acme", settings_with(json!({"from_name": format!("{n}")})))
    });
    let replies = futures_util::future::join_all(creates).await;
    let made: Vec<&Value> = replies.iter().filter(|reply| reply["ok"] == true).collect();
    assert_eq!(made.len(), 1);
    for reply in replies.iter().filter(|reply| reply["ok"] == false) {
        assert_eq!(reply["error"]["code"], "already_exists");
    }
    let stored = world.ok("smtp_config.get", "acme", json!({})).await;
    assert_eq!(stored, made[0]["result"]);
    assert_eq!(stored["version"], 1);
}

#[tokio::test]
async fn a_version_never_comes_again() {
    let world = World::enabled("acme").await;
    let mut versions = Vec::new();
    for _ in 0..2 {
        versions.push(world.ok("smtp_config.create", "acme", settings()).await["version"].clone());
        for _ in 0..2 {
            // The same value once more: an accepted update has a new version all the same.
            let updated = world.ok("smtp_config.update", "acme", json!({"from_name": "Same"})).await;
            versions.push(updated["version"].clone());
        }
        world.ok("smtp_config.delete", "acme", json!({})).await;
    }
    assert_eq!(versions, [1, 2, 3, 4, 5, 6]);
}

#[tokio::test]
async fn updates_at_once_are_all_laid_one_over_the_other() {
    let world = World::enabled("acme").await;
    world.ok("smtp_config.create", "acme", settings()).await;
    let updates =
        (0..10).map(|n| world.ask_on("smtp_config.update", "acme", json!({"from_name": format!("{n}")})));
    let mut versions: Vec<i64> = futures_util::future::join_all(updates)
        .await
        .iter()
        .map(|reply| reply["result"]["version"].as_i64().unwrap_or_else(|| panic!("{reply}")))
        .collect();
    versions.sort_unstable();
    assert_eq!(versions, (2..=11).collect::<Vec<_>>());
}

#[tokio::test]
async fn an_update_of_another_version_is_a_conflict_that_names_the_current_one() {
    let world = World::enabled("acme").await;
    world.ok("smtp_config.create", "acme", settings()).await;
    world.ok("smtp_config.update", "acme", json!({"port": 25, "if_version": 1})).await;
    let reply = world.ask_on("smtp_config.update", "acme", json!({"port": 465, "if_version": 1})).await;
    assert_eq!(reply["error"]["code"], "conflict");
    assert!(text(&reply["error"]["message"]).contains('2'), "{reply}");
    assert_eq!(world.ok("smtp_config.get", "acme", json!({})).await["port"], 25);
}

#[tokio::test]
async fn of_two_updates_of_one_version_at_once_one_is_a_conflict() {
    let world = World::enabled("acme").await;
    world.ok("smtp_config.create", "acme", settings()).await;
    let update =
        |port: u16| world.ask_on("smtp_config.update", "acme", json!({"port": port, "if_version": 1}));
    let (one, two) = tokio::join!(update(25), update(465));
    assert_eq!([&one, &two].iter().filter(|reply| reply["ok"] == true).count(), 1, "{one} {two}");
    assert_eq!([&one, &two].iter().filter(|reply| reply["error"]["code"] == "conflict").count(), 1);
}

#[tokio::test]
async fn an_update_that_others_forestall_again_and_again_is_a_conflict_that_names_the_current_version() {
    let world = World::enabled("acme").await;
    world.ok("smtp_config.create", "acme", settings()).await;
    // Under each update's lock another host is found than the one that was looked up before.
    let forestall = "CREATE FUNCTION forestall() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN UPDATE smtp_configs SET host = 'other.example.org', version = version + 6; RETURN NEW; END $$";
    world.sql(forestall).await;
    let trigger =
        "CREATE TRIGGER forestall BEFORE INSERT ON organizations FOR EACH ROW EXECUTE FUNCTION forestall()";
    world.sql(trigger).await;
    let reply =
        world.ask("smtp_config.update", "acme", json!({"host": "mail.example.org", "password": "p"})).await;
    assert_eq!(reply["error"]["code"], "conflict", "{reply}");
    assert!(text(&reply["error"]["message"]).ends_with("its current version is 7"), "{reply}");
    assert_eq!(reply["error"]["field"], Value::Null, "no version was asked for");
}

#[tokio::test]
async fn the_stored_password_goes_to_no_other_server() {
    let world = World::enabled("acme").await;
    world.ok("smtp_config.create", "acme", settings()).await;
    let needed = code("invalid_field", "password");
    for params in [
        json!({"host": "other.example.org"}),
        json!({"host": "other.example.org", "username": "new"}),
        json!({"secure": false}),
        json!({"secure": false, "port": 25}),
    ] {
        assert_eq!(world.error("smtp_config.update", "acme", params).await, needed);
    }
    // The same host in another spelling is no change, and neither is TLS that stays.
    for params in [json!({"host": "MAIL.example.org"}), json!({"secure": true}), json!({"port": 25})] {
        world.ok("smtp_config.update", "acme", params).await;
    }
    let moved = json!({"host": "other.example.org", "secure": false, "password": "new"});
    world.ok("smtp_config.update", "acme", moved).await;
    world.ok("smtp_config.update", "acme", json!({"secure": true})).await;
    let account = world.account("acme").await;
    assert_eq!(account.host, "other.example.org");
    assert_eq!(account.credentials.as_ref().unwrap().password(), "new");
}

#[tokio::test]
async fn no_race_of_updates_lays_a_password_under_another_host() {
    let world = World::enabled("acme").await;
    world.ok("smtp_config.create", "acme", settings_with(json!({"password": "mail"}))).await;
    let update = |params: Value| world.ask("smtp_config.update", "acme", params);
    for _ in 0..15 {
        // The second one changes no host when it looks first, and would take the other's password over when it does not.
        tokio::join!(
            update(json!({"host": "other.example.org", "password": "other"})),
            update(json!({"host": "mail.example.org", "from_name": "Back"})),
        );
        let account = world.account("acme").await;
        let password = account.credentials.as_ref().unwrap().password();
        assert_eq!(account.host, format!("{password}.example.org"));
        world.ok("smtp_config.update", "acme", json!({"host": "mail.example.org", "password": "mail"})).await;
    }
}

#[tokio::test]
async fn a_new_host_or_port_is_judged_and_an_old_one_is_left_alone() {
    let world = World::enabled("acme").await;
    world.ok("smtp_config.create", "acme", settings()).await;
    let private = json!({"host": "10.0.0.1", "password": "p"});
    assert_eq!(world.error("smtp_config.update", "acme", private).await, code("host_not_public", "host"));
    let port = json!({"port": 8080});
    assert_eq!(world.error("smtp_config.update", "acme", port).await, code("port_not_allowed", "port"));
    // The name has gone; whoever changes something else is not kept from it.
    world.dns.script("mail.example.org", Answer::ServerFailure, 0);
    let form = json!({"host": "mail.example.org", "port": 587, "from_name": "New"});
    assert_eq!(world.ok("smtp_config.update", "acme", form).await["from_name"], "New");
}

#[tokio::test]
async fn a_test_result_goes_with_the_server_it_was_made_for() {
    let world = World::enabled("acme").await;
    world.ok("smtp_config.create", "acme", settings()).await;
    world
        .sql("UPDATE smtp_configs SET last_test_at = '2026-11-22T20:00:00Z', last_test_ok = false, last_test_code = 'auth_failed'")
        .await;
    let kept = world.ok("smtp_config.update", "acme", json!({"from_name": "New"})).await;
    assert_eq!(kept["last_test"], json!({"at": "2026-11-22T20:00:00Z", "ok": false, "code": "auth_failed"}));
    let cleared = world.ok("smtp_config.update", "acme", json!({"password": "new"})).await;
    assert_eq!(cleared["last_test"], Value::Null);
}
