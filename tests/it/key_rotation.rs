//! `sendoff keys status` and `sendoff keys rotate` against real services: what is sealed anew, what stays, and who goes on
//! meanwhile.
//! Guarantee: whatever ends a rotation, and whatever changes beside it, no value is lost and none is sealed twice.

use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use secrecy::SecretString;
use sendoff::clock::Clock;
use sendoff::model::job::JobKey;
use sendoff::model::ledger::State;
use sendoff::model::letter::{LetterId, NewLetter};
use sendoff::model::organization::OrganizationId;
use sendoff::secrets::{Context, Field, KeyRing};
use sendoff::store::{DeadLetters, SmtpConfigs, StoredAccount};
use serde_json::{Value, json};
use sqlx::PgConnection;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::Child;

use crate::support::broker::eventually;
use crate::support::letters::{archive, new_letter};
use crate::support::world::{KEYS, NEW_KEY, PASSWORD, SOON, USERNAME, World, job};

/// The key that everything is sealed anew under.
const NEW: &str = NEW_KEY;
/// The id of the key that a sealed value names.
const KEY_OF_PASSWORD: &str = "encode(substr(password_sealed, 3, get_byte(password_sealed, 1)), 'escape')";
/// Everything of a configuration but its sealed values, of all of them.
const UNSEALED: &str = "SELECT hashtextextended(string_agg(concat_ws(',', organization_id, version, from_email, from_name, \
    host, port, secure, created_at, updated_at, last_test_at), ';' ORDER BY organization_id), 0) FROM smtp_configs";

fn both() -> String {
    format!("{NEW},{KEYS}")
}

fn ring(items: &str) -> Arc<KeyRing> {
    let items: Vec<SecretString> = items.split(',').map(SecretString::from).collect();
    Arc::new(KeyRing::parse(&items).expect("keys"))
}

fn organization(text: &str) -> OrganizationId {
    OrganizationId::parse(text).expect("an organization")
}

/// A name that sorts as its number does.
fn name(number: usize) -> String {
    format!("o{number:05}")
}

/// So many organizations that use the world's server, sealed under the old key, with the flag on.
async fn organizations(world: &World, count: usize) {
    let ring = ring(KEYS);
    let seal = |organization: &OrganizationId, field, secret: &str| {
        ring.seal(Context::Credential { organization, field }, &secret.into())
    };
    let ids: Vec<String> = (0..count).map(name).collect();
    let sealed = |field, secret: &str| -> Vec<Vec<u8>> {
        ids.iter().map(|id| seal(&organization(id), field, secret)).collect()
    };
    let mut session = world.database.connect().await;
    sqlx::query(
        "WITH o AS (INSERT INTO organizations (organization_id, custom_smtp, smtp_version)
             SELECT id, true, 7 FROM unnest($1::text[]) AS a (id))
         INSERT INTO smtp_configs (organization_id, version, from_email, from_name, host, port, secure,
             username_sealed, password_sealed, created_at, updated_at)
         SELECT id, 7, 'hello@' || id || '.example', 'Team', 'localhost', $4, true, u, p, now() - interval '1 day',
             now() - interval '1 hour'
         FROM unnest($1::text[], $2::bytea[], $3::bytea[]) AS a (id, u, p)",
    )
    .bind(&ids)
    .bind(sealed(Field::Username, USERNAME))
    .bind(sealed(Field::Password, PASSWORD))
    .bind(i32::from(world.server.port()))
    .execute(&mut session)
    .await
    .expect("inserted");
}

/// Archives letters under the old key, of so many bytes each.
async fn letters(world: &World, sizes: &[usize]) -> Vec<LetterId> {
    let died_at = Clock::system().now() - Duration::from_secs(60);
    let letters: Vec<NewLetter> = sizes
        .iter()
        .map(|size| {
            let id = Clock::system().new_id();
            let body = id.to_string().into_bytes().into_iter().cycle().take(*size).collect();
            new_letter(JobKey { organization: None, id }, body, died_at)
        })
        .collect();
    for letter in &letters {
        archive(&world.database).archive(std::slice::from_ref(letter)).await.expect("archived");
    }
    letters.iter().map(NewLetter::id).collect()
}

async fn keys(world: &World, arguments: &[&str]) -> (i32, Value) {
    let (code, out, errors) = world.run(&[&["keys"], arguments, &["--json"]].concat()).await;
    (code, serde_json::from_str(&out).unwrap_or_else(|_| panic!("{code}: {out}{errors}")))
}

async fn rotate(world: &World) -> (i32, Value) {
    keys(world, &["rotate", "--as", "ann"]).await
}

fn start(world: &World, arguments: &[&str]) -> Child {
    let mut command = world.command(&[&["keys", "rotate"], arguments].concat());
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it starts")
}

async fn ended(child: Child) -> (i32, String, String) {
    let output =
        tokio::time::timeout(SOON, child.wait_with_output()).await.expect("it ends").expect("it ran");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code().unwrap_or(-1), text(&output.stdout), text(&output.stderr))
}

async fn under(world: &World, key: &str) -> i64 {
    let counting = format!("SELECT count(*) FROM smtp_configs WHERE {KEY_OF_PASSWORD} = '{key}'");
    world.database.number(counting).await
}

/// What the configuration opens to under these keys: version, user name, password.
async fn opened(world: &World, keys: &str, id: &str) -> (i64, String, String) {
    let configs = SmtpConfigs::new(world.database.store(), ring(keys));
    let facts = configs.load_for_sending(&organization(id)).await.expect("the database answers");
    let StoredAccount::Ready { version, account, .. } = facts.account else { panic!("{id}: {facts:?}") };
    let credentials = account.credentials.as_ref().expect("credentials");
    (version, credentials.username().to_owned(), credentials.password().to_owned())
}

/// Holds a row as a change under way would.
async fn hold(world: &World, sql: String) -> PgConnection {
    let mut session = world.database.connect().await;
    sqlx::raw_sql(sqlx::AssertSqlSafe(format!("BEGIN; {sql}"))).execute(&mut session).await.expect("held");
    session
}

async fn somebody_waits(world: &World) {
    eventually("a rotation waits for the row", async || {
        let waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() \
            AND wait_event_type = 'Lock' AND application_name = 'sendoff'";
        world.database.number(waiting).await > 0
    })
    .await;
}

#[tokio::test]
async fn sending_goes_on_while_everything_is_sealed_anew_and_the_new_key_alone_opens_it() {
    let mut world = World::new().await;
    organizations(&world, 2000).await;
    let archived = letters(&world, &[100, 200, 70_000]).await;
    world.set("SENDOFF__ENCRYPTION__KEYS", &both());
    let before = world.database.number(UNSEALED).await;
    let worker = world.worker().await;
    let ids: Vec<String> = (0..8).map(|number| name(number * 250)).collect();
    for id in &ids {
        world.publish(&job(Some(id))).await;
    }
    world.received(8).await;
    let rotation = start(&world, &["--json"]);
    let mut sent = 8;
    let (code, out, errors) = {
        let rotation = ended(rotation);
        tokio::pin!(rotation);
        loop {
            for id in &ids {
                world.publish(&job(Some(id))).await;
                sent += 1;
            }
            tokio::select! {
                outcome = &mut rotation => break outcome,
                _ = world.received(sent) => {}
            }
        }
    };
    world.received(sent).await;
    assert_eq!((code, errors.as_str()), (0, ""), "{out}");
    let result: Value = serde_json::from_str(&out).expect("JSON");
    assert_eq!(
        (&result["configurations"]["resealed"], &result["letters"]["resealed"], &result["left"]),
        (&json!(2000), &json!(3), &json!([]))
    );
    assert_eq!(world.database.number(UNSEALED).await, before, "nothing but sealed values has changed");
    let dead = "SELECT count(*) FROM jobs WHERE state <> 'sent'";
    eventually("every job is sent", async || world.database.number(dead).await == 0).await;
    let (code, status) = keys(&world, &["status"]).await;
    assert_eq!(
        (code, &status["keys"][1]["id"], &status["keys"][1]["removable"]),
        (0, &json!("k1"), &json!(true))
    );
    assert_eq!(status["keys"][0]["removable"], false, "{status}");
    worker.stop().await;

    world.set("SENDOFF__ENCRYPTION__KEYS", NEW);
    let worker = world.worker().await;
    for id in &ids {
        let id = world.publish(&job(Some(id))).await;
        world.event("email.sent", id).await;
    }
    let archive = DeadLetters::new(world.database.store(), ring(NEW));
    for (letter, size) in archived.into_iter().zip([100, 200, 70_000]) {
        let content = archive.open(letter).await.expect("it answers").expect("a letter").expect("it opens");
        assert_eq!(content.body.len(), size);
    }
    assert_eq!(opened(&world, NEW, &ids[0]).await, (7, USERNAME.to_owned(), PASSWORD.to_owned()));
    worker.stop().await;
    let entries = "SELECT count(*) FROM audit WHERE command = 'keys.rotate' AND outcome = 'ok' \
        AND summary #>> '{result,configurations,resealed}' = '2000'";
    assert_eq!(world.database.number(entries).await, 1);
    world.end().await;
}

#[tokio::test]
async fn a_rotation_that_is_killed_goes_on_where_it_was_and_does_nothing_twice() {
    let mut world = World::new().await;
    organizations(&world, 1000).await;
    world.set("SENDOFF__ENCRYPTION__KEYS", &both());
    let held = format!("SELECT 1 FROM smtp_configs WHERE organization_id = '{}' FOR UPDATE", name(500));
    let mut blocker = hold(&world, held).await;
    let mut rotation = start(&world, &["--as", "ann"]);
    somebody_waits(&world).await;
    rotation.kill().await.expect("killed");
    sqlx::raw_sql("ROLLBACK").execute(&mut blocker).await.expect("released");
    eventually("the killed statement is gone", async || {
        let busy = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() \
            AND application_name = 'sendoff'";
        world.database.number(busy).await == 0
    })
    .await;
    let done = under(&world, "k2").await;
    assert!((1..1000).contains(&done), "{done}");
    let bytes = format!(
        "SELECT hashtextextended(string_agg(username_sealed::text || password_sealed::text, ';' ORDER BY organization_id), 0) \
         FROM smtp_configs WHERE organization_id < '{}'",
        name(usize::try_from(done).expect("small"))
    );
    let before = world.database.number(bytes.clone()).await;
    let (code, result) = rotate(&world).await;
    assert_eq!((code, &result["configurations"]["resealed"]), (0, &json!(1000 - done)));
    assert_eq!(world.database.number(bytes).await, before, "what was sealed anew is not sealed twice");
    assert_eq!(under(&world, "k2").await, 1000);
    let (code, again) = rotate(&world).await;
    assert_eq!((code, &again["configurations"]["selected"]), (0, &json!(0)));
    let outcomes =
        "SELECT count(*) FROM audit WHERE command = 'keys.rotate' AND actor = 'ann' AND outcome = 'started'";
    assert_eq!(world.database.number(outcomes).await, 1, "the killed run is on record");
    world.end().await;
}

#[tokio::test]
async fn a_change_made_during_a_rotation_is_kept_and_sealed_anew() {
    let mut world = World::new().await;
    organizations(&world, 3).await;
    world.set("SENDOFF__ENCRYPTION__KEYS", &both());
    let (id, password) = (name(1), "another password");
    let context = Context::Credential { organization: &organization(&id), field: Field::Password };
    let sealed: String =
        ring(KEYS).seal(context, &password.into()).iter().map(|byte| format!("{byte:02x}")).collect();
    let change = format!(
        "UPDATE smtp_configs SET password_sealed = '\\x{sealed}', version = 8, host = 'other.example' \
         WHERE organization_id = '{id}'"
    );
    let mut changing = hold(&world, change).await;
    let rotation = start(&world, &["--json"]);
    somebody_waits(&world).await;
    sqlx::raw_sql("COMMIT").execute(&mut changing).await.expect("changed");
    let (code, out, errors) = ended(rotation).await;
    assert_eq!(code, 0, "{out}{errors}");
    assert_eq!(opened(&world, NEW, &id).await, (8, USERNAME.to_owned(), password.to_owned()));
    let host = "SELECT count(*) FROM smtp_configs WHERE host = 'other.example'";
    assert_eq!(world.database.number(host).await, 1);
    let result: Value = serde_json::from_str(&out).expect("JSON");
    assert_eq!(
        result["configurations"],
        json!({"selected": 3, "resealed": 3, "changed_meanwhile": 0, "unopened": 0})
    );
    world.end().await;
}

#[tokio::test]
async fn what_a_letter_becomes_during_a_rotation_is_kept() {
    let mut world = World::new().await;
    let archived = letters(&world, &[500]).await;
    world.set("SENDOFF__ENCRYPTION__KEYS", &both());
    let mut changing = hold(&world, "UPDATE dead_letters SET state = 'discarded', deaths = 5".into()).await;
    let rotation = start(&world, &["--json"]);
    somebody_waits(&world).await;
    sqlx::raw_sql("COMMIT").execute(&mut changing).await.expect("changed");
    let (code, out, errors) = ended(rotation).await;
    assert_eq!(code, 0, "{out}{errors}");
    let kept = "SELECT count(*) FROM dead_letters WHERE state = 'discarded' AND deaths = 5";
    assert_eq!(world.database.number(kept).await, 1);
    let archive = DeadLetters::new(world.database.store(), ring(NEW));
    archive.open(archived[0]).await.expect("it answers").expect("a letter").expect("it opens");
    world.end().await;
}

#[tokio::test]
async fn a_letter_of_ten_mebibytes_is_the_same_after_a_rotation() {
    let mut world = World::new().await;
    let archived = letters(&world, &[10 << 20, 3, 10 << 20]).await;
    world.set("SENDOFF__ENCRYPTION__KEYS", &both());
    let mut bodies = Vec::new();
    for letter in &archived {
        bodies.push(
            world.archive().open(*letter).await.expect("it answers").expect("a letter").expect("it opens"),
        );
    }
    let (code, result) = rotate(&world).await;
    assert_eq!((code, &result["letters"]["resealed"]), (0, &json!(3)));
    let archive = DeadLetters::new(world.database.store(), ring(NEW));
    for (letter, body) in archived.iter().zip(bodies) {
        let now = archive.open(*letter).await.expect("it answers").expect("a letter").expect("it opens");
        assert!(now == body, "the content has changed");
    }
    world.end().await;
}

#[tokio::test]
async fn what_does_not_open_stays_as_it_is_and_is_named_and_holds_up_nothing() {
    let mut world = World::new().await;
    organizations(&world, 5).await;
    let archived = letters(&world, &[10, 20, 30]).await;
    let [damaged, mixed, formless] = [1, 2, 3].map(name);
    let letter = archived[1];
    // One whose tag is wrong, one half of whose row is under a key that nobody has, one that is no sealed value.
    world
        .database
        .run(format!(
            "UPDATE smtp_configs SET password_sealed = set_byte(password_sealed, 20, get_byte(password_sealed, 20) # 1)
                 WHERE organization_id = '{damaged}';
             UPDATE smtp_configs SET username_sealed = '\\x01026b39' || substr(username_sealed, 5)
                 WHERE organization_id = '{mixed}';
             UPDATE smtp_configs SET password_sealed = 'plaintext' WHERE organization_id = '{formless}';
             UPDATE dead_letters SET body_sealed = '\\x' WHERE letter = '{letter}'"
        ))
        .await;
    world.set("SENDOFF__ENCRYPTION__KEYS", &both());
    let (code, status) = keys(&world, &["status"]).await;
    assert_eq!(code, 1, "a key is missing: {status}");
    assert_eq!(
        status["keys"][2],
        json!({"id": "k9", "role": "missing", "configurations": 1, "letters": 0, "values": 1, "removable": false,
               "why": "1 configuration under it; add it behind the first"})
    );
    assert_eq!(status["damaged"], json!({"configurations": 1, "letters": 1, "values": 2}));

    let (code, result) = rotate(&world).await;
    assert_eq!(code, 1);
    assert_eq!(
        result["configurations"],
        json!({"selected": 5, "resealed": 2, "changed_meanwhile": 0, "unopened": 3})
    );
    assert_eq!(
        result["letters"],
        json!({"selected": 3, "resealed": 2, "changed_meanwhile": 0, "unopened": 1})
    );
    let named: Vec<(&str, &str)> = result["unopened"]
        .as_array()
        .expect("a list")
        .iter()
        .map(|value| {
            let owner = value["organization_id"].as_str().or(value["letter"].as_str()).expect("a name");
            (owner, value["field"].as_str().expect("a field"))
        })
        .collect();
    let letter_name = letter.to_string();
    assert_eq!(
        named,
        [
            (damaged.as_str(), "password"),
            (mixed.as_str(), "username"),
            (formless.as_str(), "password"),
            (letter_name.as_str(), "body"),
        ]
    );
    let whole = "SELECT count(*) FROM smtp_configs WHERE password_sealed = 'plaintext' \
        OR username_sealed::text LIKE '\\\\x01026b39%'";
    assert_eq!(world.database.number(whole).await, 2, "what does not open is as it was");

    // While one value needs the old key it cannot go.
    let (code, status) = keys(&world, &["status"]).await;
    assert_eq!(code, 1);
    let old = &status["keys"][1];
    assert_eq!((&old["id"], &old["removable"], &old["values"]), (&json!("k1"), &json!(false), &json!(1)));
    assert_eq!(old["why"], "1 configuration under it; `sendoff keys rotate`");
    let (code, out, _) = world.run(&["keys", "rotate"]).await;
    assert_eq!(code, 1, "{out}");
    assert!(out.contains(&format!("organization {damaged}, password: does not open")), "{out}");
    assert!(out.contains("Still under `k1`: 1 configurations, 0 letters"), "{out}");
    world.end().await;
}

#[tokio::test]
async fn a_dry_run_opens_everything_and_changes_nothing() {
    let mut world = World::new().await;
    organizations(&world, 3).await;
    letters(&world, &[10]).await;
    world.set("SENDOFF__ENCRYPTION__KEYS", &both());
    let rows = "SELECT hashtextextended((SELECT string_agg(c::text, ';' ORDER BY c.organization_id) FROM smtp_configs AS c) \
        || (SELECT string_agg(d::text, ';') FROM dead_letters AS d), 0)";
    let before = world.database.number(rows).await;
    let (code, result) = keys(&world, &["rotate", "--dry-run"]).await;
    assert_eq!((code, &result["dry_run"]), (0, &json!(true)));
    assert_eq!(
        (&result["configurations"]["resealed"], &result["letters"]["resealed"]),
        (&json!(3), &json!(1))
    );
    assert_eq!(world.database.number(rows).await, before);
    assert_eq!(world.database.number("SELECT count(*) FROM audit").await, 0);
    world.end().await;
}

#[tokio::test]
async fn an_interrupted_rotation_ends_after_its_batch_and_says_that_it_goes_on() {
    let mut world = World::new().await;
    organizations(&world, 400).await;
    world.set("SENDOFF__ENCRYPTION__KEYS", &both());
    let held = format!("SELECT 1 FROM smtp_configs WHERE organization_id = '{}' FOR UPDATE", name(150));
    let mut blocker = hold(&world, held).await;
    let mut rotation = start(&world, &[]);
    somebody_waits(&world).await;
    let pid = rotation.id().expect("it runs").to_string();
    let status = tokio::process::Command::new("kill").args(["-s", "INT", &pid]).status().await.expect("kill");
    assert!(status.success());
    // The signal is taken before the batch can end.
    let mut said = BufReader::new(rotation.stderr.take().expect("piped")).lines();
    let mut until = async |words: &str| {
        loop {
            let line = tokio::time::timeout(SOON, said.next_line()).await.expect("it says so").expect("text");
            if line.expect("it goes on").contains(words) {
                break;
            }
        }
    };
    until("Stopping after what is in hand. Once more: at once.").await;
    sqlx::raw_sql("ROLLBACK").execute(&mut blocker).await.expect("released");
    until("It ended before its end; the same command goes on from here.").await;
    let (code, out, _) = ended(rotation).await;
    assert_eq!(code, 1, "{out}");
    let done = under(&world, "k2").await;
    assert_eq!(done, 200, "the batch in hand is finished, and no other begun");
    let outcomes = "SELECT count(*) FROM audit WHERE command = 'keys.rotate' AND outcome = 'interrupted'";
    assert_eq!(world.database.number(outcomes).await, 1);
    let (code, result) = rotate(&world).await;
    assert_eq!((code, &result["configurations"]["resealed"]), (0, &json!(400 - done)));
    world.end().await;
}

#[tokio::test]
async fn a_worker_that_lacks_a_key_is_not_ready_and_buries_nobody_until_a_rotation_has_mended_it() {
    let mut world = World::new().await;
    organizations(&world, 2).await;
    world.set("SENDOFF__ENCRYPTION__KEYS", NEW);
    let worker = world.worker_starting(&[]).await;
    eventually("the worker says which key it lacks", async || {
        let (status, body) = worker.get("/readyz").await;
        status == 503 && body.contains("encryption.keys lacks `k1`")
    })
    .await;
    let id = world.publish(&job(Some(&name(0)))).await;
    let put_aside = world.broker.name("retry.notifications.30");
    let copy = world.broker.take(&put_aside).await;
    let status = world.status(Some(&name(0)), id).await;
    assert!(status.is_none_or(|status| status.state == State::Deferred && status.attempts == 0));
    assert_eq!(world.events.all().iter().filter(|event| event["job_id"] == id.to_string()).count(), 0);
    assert_eq!(world.database.number("SELECT count(*) FROM dead_letters").await, 0);

    world.set("SENDOFF__ENCRYPTION__KEYS", &both());
    assert_eq!(rotate(&world).await.0, 0);
    worker.ready().await;
    // Its time has come sooner than in half a minute.
    world.database.run("UPDATE jobs SET not_before = now()").await;
    world.broker.publish(&world.broker.name("jobs.notifications"), "", &copy.body, copy.properties).await;
    world.event("email.sent", id).await;
    worker.stop().await;
    world.end().await;
}

#[tokio::test]
async fn a_rotation_without_the_first_key_anywhere_says_so_and_one_without_a_database_is_unreachable() {
    let mut world = World::new().await;
    let (code, out, _) = world.run(&["keys", "rotate"]).await;
    assert_eq!((code, out.as_str()), (0, "Everything is under `k1` already.\n"));
    world.set("DATABASE_URL", "postgres://nobody@127.0.0.1:1/none");
    for command in [["keys", "rotate"], ["keys", "status"]] {
        let (code, _, errors) = world.run(&command).await;
        assert_eq!(code, 3, "{errors}");
    }
    world.end().await;
}
