//! How configurations are kept: sealed, notified and cached.

use std::sync::Arc;
use std::time::Instant;

use secrecy::SecretString;
use sendoff::control::ControlRules;
use sendoff::store::{
    ConfigCache, ConfigChange, ConfigChanges, RouteFacts, SmtpConfigs, Store, StoreError, StoredAccount,
    Unreadable,
};
use serde_json::json;

use super::{
    DEADLINE, PASSWORD, USERNAME, World, account, control, id, key, ring, send, settings, settings_with,
};

#[tokio::test]
async fn credentials_moved_between_rows_or_columns_do_not_open() {
    let world = World::enabled("acme").await;
    world.enable("evil").await;
    world.ok("smtp_config.create", "acme", settings()).await;
    world.ok("smtp_config.create", "evil", settings_with(json!({"host": "other.example.org"}))).await;
    let damaged = async |organization: &str| match world.facts(organization).await.account {
        StoredAccount::Unreadable { cause: Unreadable::Damaged(_), version: 1 } => {}
        other => panic!("{organization}: {other:?}"),
    };
    world
        .sql(
            "UPDATE smtp_configs SET password_sealed = acme.password_sealed FROM smtp_configs acme
              WHERE acme.organization_id = 'acme' AND smtp_configs.organization_id = 'evil'",
        )
        .await;
    damaged("evil").await;
    world
        .sql("UPDATE smtp_configs SET username_sealed = password_sealed WHERE organization_id = 'acme'")
        .await;
    damaged("acme").await;
    world.sql("UPDATE smtp_configs SET username_sealed = 'plaintext' WHERE organization_id = 'acme'").await;
    damaged("acme").await;
    // Entered anew, it works again.
    world.ok("smtp_config.update", "acme", json!({"username": USERNAME, "password": PASSWORD})).await;
    assert_eq!(world.account("acme").await.credentials.as_ref().unwrap().username(), USERNAME);
}

#[tokio::test]
async fn a_missing_key_is_told_apart_from_a_wrong_one_and_an_older_one_still_opens() {
    let world = World::new().await;
    let (old, new) = (key("old"), key("new"));
    let under = |keys: &[SecretString]| SmtpConfigs::new(world.store.clone(), ring(keys));
    let rules = ControlRules { custom_smtp_for_all: true, ..ControlRules::default() };
    let control = control(&world.store, &under(std::slice::from_ref(&old)), &world.dns, rules);
    let create = json!({"command": "smtp_config.create", "organization_id": "acme", "params": settings()});
    assert_eq!(send(&control, &create).await["ok"], true);

    let load = async |keys: &[SecretString]| under(keys).load_for_sending(&id("acme")).await.unwrap();
    let rotated = load(&[new.clone(), old]).await;
    assert_eq!(account(&rotated).credentials.as_ref().unwrap().password(), PASSWORD);
    let cause = |facts: RouteFacts| match facts.account {
        StoredAccount::Unreadable { cause, .. } => cause,
        other => panic!("{other:?}"),
    };
    assert_eq!(cause(load(&[new]).await), Unreadable::UnknownKey { id: "old".into() });
    assert!(matches!(cause(load(&[key("old")]).await), Unreadable::Damaged(_)));
}

/// The next change that is not about starting to listen.
async fn next(changes: &mut ConfigChanges) -> ConfigChange {
    tokio::time::timeout(DEADLINE, changes.next()).await.expect("a change in time")
}

#[tokio::test]
async fn every_change_is_notified() {
    let world = World::new().await;
    let mut changes = ConfigChanges::new(world.store.clone());
    assert_eq!(next(&mut changes).await, ConfigChange::Reset);
    let of_acme = ConfigChange::Of(id("acme"));
    world.enable("acme").await;
    assert_eq!(next(&mut changes).await, of_acme);
    world.ok("smtp_config.create", "acme", settings()).await;
    assert_eq!(next(&mut changes).await, of_acme);
    world.ok("smtp_config.update", "acme", json!({"port": 25})).await;
    assert_eq!(next(&mut changes).await, of_acme);
    world.ok("smtp_config.delete", "acme", json!({})).await;
    assert_eq!(next(&mut changes).await, of_acme);
    // What changes nothing is not: the next one heard of is the one after it.
    world.enable("acme").await;
    world.enable("last").await;
    assert_eq!(next(&mut changes).await, ConfigChange::Of(id("last")));
}

#[tokio::test]
async fn a_lost_listener_comes_back_with_a_reset() {
    let world = World::new().await;
    let mut changes = ConfigChanges::new(world.store.clone());
    assert_eq!(next(&mut changes).await, ConfigChange::Reset);
    assert_eq!(world.database.terminate("sendoff listener").await, 1);
    assert_eq!(next(&mut changes).await, ConfigChange::Reset);
    world.enable("acme").await;
    assert_eq!(next(&mut changes).await, ConfigChange::Of(id("acme")));
}

#[tokio::test]
async fn the_cache_answers_from_memory_until_a_claim_says_otherwise() {
    let world = World::enabled("acme").await;
    let cache = ConfigCache::new(world.configs.clone(), 10);
    let acme = id("acme");
    assert_eq!(cache.get(&acme).await.unwrap().config_version(), None);
    world.ok("smtp_config.create", "acme", settings()).await;
    assert_eq!(cache.get(&acme).await.unwrap().config_version(), None, "held in memory");

    let confirmed = cache.confirm(&acme, true, Some(1), false).await.unwrap();
    assert_eq!(confirmed.config_version(), Some(1));
    assert!(
        Arc::ptr_eq(&confirmed, &cache.confirm(&acme, true, Some(1), false).await.unwrap()),
        "not loaded again"
    );

    world.ok("smtp_config.update", "acme", json!({"port": 25})).await;
    assert_eq!(cache.confirm(&acme, true, Some(2), false).await.unwrap().config_version(), Some(2));
    // A claim that was answered before the update does not bring the older one back.
    assert_eq!(cache.confirm(&acme, true, Some(1), false).await.unwrap().config_version(), Some(2));

    world.ok("smtp_config.delete", "acme", json!({})).await;
    assert_eq!(cache.confirm(&acme, true, None, false).await.unwrap().config_version(), None);
    world.ok("feature.set", "acme", json!({"feature": "custom-smtp-for-orgs", "enabled": false})).await;
    assert!(!cache.confirm(&acme, false, None, false).await.unwrap().custom_smtp);
}

#[tokio::test]
async fn the_cache_forgets_what_changes_and_holds_no_more_than_it_may() {
    let world = World::enabled("acme").await;
    let cache = ConfigCache::new(world.configs.clone(), 3);
    let following = tokio::spawn({
        let (cache, changes) = (cache.clone(), ConfigChanges::new(world.store.clone()));
        async move { cache.follow(changes).await }
    });
    cache.get(&id("acme")).await.unwrap();
    world.ok("smtp_config.create", "acme", settings()).await;
    let begun = Instant::now();
    while cache.get(&id("acme")).await.unwrap().config_version() != Some(1) {
        assert!(begun.elapsed() < DEADLINE, "the cache never heard of the change");
        tokio::task::yield_now().await;
    }
    following.abort();
    for n in 0..10 {
        cache.get(&id(&format!("org-{n}"))).await.unwrap();
        assert!(cache.len() <= 3);
    }
    cache.clear();
    assert!(cache.is_empty());
}

#[tokio::test]
async fn many_who_ask_for_one_organization_load_it_once() {
    let world = World::enabled("acme").await;
    world.ok("smtp_config.create", "acme", settings()).await;
    let cache = ConfigCache::new(world.configs.clone(), 10);
    let mut blocker = world.pool.begin().await.unwrap();
    sqlx::query("LOCK TABLE smtp_configs").execute(&mut *blocker).await.unwrap();
    let waiting: Vec<_> = (0..50)
        .map(|_| {
            let cache = cache.clone();
            tokio::spawn(async move { cache.get(&id("acme")).await.unwrap() })
        })
        .collect();
    let loads = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'";
    let begun = Instant::now();
    while world.count(loads).await == 0 {
        assert!(begun.elapsed() < DEADLINE, "nobody loads");
    }
    assert_eq!(world.count(loads).await, 1);
    blocker.commit().await.unwrap();
    let facts = futures_util::future::join_all(waiting).await;
    let first = facts[0].as_ref().unwrap();
    assert!(facts.iter().all(|facts| Arc::ptr_eq(facts.as_ref().unwrap(), first)));
}

#[tokio::test]
async fn with_the_database_away_all_who_wait_for_the_cache_fail_together() {
    let away = Store::new(&"postgres://nobody@127.0.0.1:1/none".into(), 2).unwrap();
    let cache = ConfigCache::new(SmtpConfigs::new(away, ring(&[key("k")])), 10);
    let acme = id("acme");
    let all = futures_util::future::join_all((0..50).map(|_| cache.get(&acme)));
    let answers = tokio::time::timeout(DEADLINE, all).await.expect("not one after the other");
    assert!(answers.iter().all(|answer| matches!(answer, Err(StoreError::Unavailable(_)))));
}
