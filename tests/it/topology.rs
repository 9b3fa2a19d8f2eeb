//! The topology as it changes with the settings.

use lapin::BasicProperties;

use crate::support::world::World;

#[tokio::test]
async fn a_binding_taken_out_of_the_settings_is_unbound_by_the_next_declaration() {
    let mut world = World::new().await;
    let lanes = |bindings: &str| {
        format!("[[amqp.lanes]]\nname = \"notifications\"\nbindings = [{bindings}]\nprefetch = 10\n")
    };
    let before = world.file("before.toml", lanes("\"notification.#\", \"extra.#\"").as_bytes());
    world.set("SENDOFF_CONFIG", before.to_str().unwrap());
    // The worker declares, and remembers what it has bound.
    world.worker().await.stop().await;
    let lane = world.broker.name("jobs.notifications");
    world.broker.publish_job("extra.one", b"{}", BasicProperties::default()).await;
    world.broker.wait_count(&lane, 1).await;

    let after = world.file("after.toml", lanes("\"notification.#\"").as_bytes());
    world.set("SENDOFF_CONFIG", after.to_str().unwrap());
    let (code, said, complaint) = world.run(&["topology", "declare"]).await;
    assert_eq!(code, 0, "{complaint}");
    assert!(said.contains("Unbound extra.# from lane notifications"), "{said}");
    world.broker.publish_job("extra.two", b"{}", BasicProperties::default()).await;
    world.broker.wait_count(&world.broker.tap(), 1).await;
    assert_eq!(world.broker.count(&lane).await, Some(1));
    world.end().await;
}
