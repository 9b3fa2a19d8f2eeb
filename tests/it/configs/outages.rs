//! Commands while the database or the name servers are away, slow or held by others.

use std::time::Instant;

use sendoff::control::ControlRules;
use sendoff::store::{SmtpConfigs, Store};
use serde_json::json;

use super::{DEADLINE, World, code, control, id, send, settings, settings_with, text};
use crate::support::broker::eventually;
use crate::support::dns::Answer;

#[tokio::test]
async fn silent_name_servers_do_not_keep_the_answer_back() {
    let world = World::enabled("acme").await;
    world.dns.script("silent.example.org", Answer::Silence, 0);
    let begun = Instant::now();
    let silent = settings_with(json!({"host": "silent.example.org"}));
    assert_eq!(world.error("smtp_config.create", "acme", silent).await, code("dns_failed", "host"));
    assert!(begun.elapsed() < DEADLINE, "{:?}", begun.elapsed());
}

#[tokio::test]
async fn with_the_database_away_nothing_is_changed_and_the_answer_comes_in_time() {
    let world = World::new().await;
    let away = Store::new(&"postgres://nobody:secret@127.0.0.1:1/none".into(), 2).unwrap();
    let configs = SmtpConfigs::new(away.clone(), world.keys.clone());
    let control = control(&away, &configs, &world.dns, ControlRules::default());
    let begun = Instant::now();
    for (command, params) in [
        ("smtp_config.get", json!({})),
        ("smtp_config.create", settings()),
        ("feature.set", json!({"feature": "custom-smtp-for-orgs", "enabled": true})),
        ("job.status", json!({"id": "01936a5e-0000-7000-8000-000000000000"})),
    ] {
        let command = json!({"command": command, "organization_id": "acme", "params": params});
        let reply = send(&control, &command).await;
        assert_eq!(reply["error"]["code"], "unavailable", "{command}: {reply}");
        assert!(!reply.to_string().contains("secret"));
    }
    assert!(begun.elapsed() < DEADLINE, "{:?}", begun.elapsed());
}

#[tokio::test]
async fn a_row_that_somebody_else_holds_is_not_waited_for_too_long() {
    let world = World::enabled("acme").await;
    world.ok("smtp_config.create", "acme", settings()).await;
    let mut blocker = world.pool.begin().await.unwrap();
    sqlx::query("SELECT 1 FROM organizations FOR UPDATE").execute(&mut *blocker).await.unwrap();
    let begun = Instant::now();
    let reply = world.ask("smtp_config.update", "acme", json!({"port": 25})).await;
    assert_eq!(reply["error"]["code"], "unavailable");
    assert!(begun.elapsed() < DEADLINE);
    blocker.rollback().await.unwrap();
    assert_eq!(world.ok("smtp_config.update", "acme", json!({"port": 25})).await["version"], 2);
}

#[tokio::test]
async fn a_commit_that_is_not_confirmed_is_not_called_unchanged() {
    let world = World::enabled("acme").await;
    world.ok("smtp_config.create", "acme", settings()).await;
    // The commit waits for a lock, without the limit that the change has set for its own.
    world
        .sql(
            "CREATE FUNCTION dawdle() RETURNS trigger LANGUAGE plpgsql SET lock_timeout = 0
              AS 'BEGIN PERFORM pg_advisory_xact_lock(1); RETURN NULL; END';
              CREATE CONSTRAINT TRIGGER slow AFTER UPDATE ON smtp_configs DEFERRABLE INITIALLY DEFERRED
              FOR EACH ROW EXECUTE FUNCTION dawdle()",
        )
        .await;
    let mut holder = world.pool.begin().await.unwrap();
    sqlx::query("SELECT pg_advisory_xact_lock(1)").execute(&mut *holder).await.unwrap();
    let reply = world.ask_on("smtp_config.update", "acme", json!({"port": 25})).await;
    assert_eq!(reply["error"]["code"], "internal", "{reply}");
    assert!(text(&reply["error"]["message"]).contains("not known whether the change was made"), "{reply}");
    assert_eq!(world.configs.get(&id("acme")).await.unwrap().config.unwrap().version, 1);
    holder.rollback().await.unwrap();
    let begun = Instant::now();
    while world.configs.get(&id("acme")).await.unwrap().config.unwrap().version != 2 {
        assert!(begun.elapsed() < DEADLINE, "here it was made after all");
    }
}

#[tokio::test]
async fn a_refusal_is_audited_although_the_database_is_slow_to_take_it() {
    let world = World::new().await;
    let mut holder = world.pool.begin().await.unwrap();
    sqlx::query("LOCK TABLE audit IN EXCLUSIVE MODE").execute(&mut *holder).await.unwrap();
    // Longer than the least that a row of the audit log is waited for.
    let waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()
        AND wait_event_type = 'Lock' AND query_start < now() - interval '800 milliseconds'";
    let held = async {
        eventually("the refusal waits for the lock", async || world.count(waiting).await > 0).await;
        holder.commit().await.unwrap();
    };
    let ((), (code, _)) = tokio::join!(held, world.error("smtp_config.get", "acme", json!({})));
    assert_eq!(code, "not_found");
    assert_eq!(world.count("SELECT count(*) FROM audit WHERE outcome = 'not_found'").await, 1);
}
