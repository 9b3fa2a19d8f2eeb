//! What one organization's trouble costs the others, and what great jobs cost the worker.
//! Guarantee: nothing here is timed; a server that is to be slow never speaks until the test is done with it.

use std::time::Duration;

use base64::Engine;
use sendoff::model::ledger::State;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::support::broker::eventually;
use crate::support::smtp_server::{Action, Rule, Stage};
use crate::support::world::{World, job};

/// The world's prefetch.
const PREFETCH: usize = 100;

fn id_of(job: &Value) -> Uuid {
    job["id"].as_str().and_then(|id| id.parse().ok()).expect("an id")
}

fn bodies(jobs: &[Value]) -> Vec<Vec<u8>> {
    jobs.iter().map(|job| serde_json::to_vec(job).expect("JSON")).collect()
}

#[tokio::test]
async fn a_flood_for_a_silent_server_lets_anothers_job_past_and_is_not_charged_for_waiting() {
    const FLOOD: usize = 4 * PREFETCH;
    let mut world = World::new().await;
    world.set("SENDOFF__SMTP__COMMAND_TIMEOUT_S", "5");
    let worker = world.worker().await;
    world.organization("slow").await;
    world.server.rule(Rule::new(Stage::Banner, Action::Silence));
    let flood: Vec<Value> = (0..FLOOD).map(|_| job(Some("slow"))).collect();
    world.broker.publish_jobs("notification.test", &bodies(&flood)).await;
    let other = job(None);
    world.publish(&other).await;
    // It is behind all of them in the one lane, which has no room for a quarter of them.
    world.event("email.sent", id_of(&other)).await;
    let requeued =
        worker.metric(r#"sendoff_jobs_settled_total{lane="notifications",outcome="requeued"}"#).await;
    assert!(requeued >= (FLOOD - PREFETCH) as f64, "{requeued} were put aside");
    eventually("its line leaves a quarter of the prefetch free", async || {
        worker.metric("sendoff_dispatch_waiting").await <= (PREFETCH * 3 / 4) as f64
    })
    .await;
    // One of those that are aside: no attempt, and no row in the ledger.
    let copy = world.broker.take(&world.broker.name("retry.notifications.600")).await;
    let spilled = id_of(&serde_json::from_slice(&copy.body).expect("JSON"));
    let attempts = copy.header("sendoff-attempt").and_then(|value| value.as_long_int());
    assert_eq!(attempts.unwrap_or(0), 0);
    assert!(world.status(Some("slow"), spilled).await.is_none_or(|status| status.attempts == 0));
    worker.kill().await;
    world.end().await;
}

/// The largest resident set of a process so far, in bytes (proc(5), `VmHWM`).
fn peak_bytes(pid: u32) -> usize {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("the worker runs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("Linux");
    let kilobytes: usize = line.trim().trim_end_matches(" kB").trim().parse().expect("a number");
    kilobytes << 10
}

#[tokio::test]
#[ignore = "reads and composes hundreds of megabytes, which takes minutes in a build without optimisation"]
async fn great_jobs_that_fill_the_prefetch_are_all_sent_within_bounded_memory() {
    const JOBS: usize = 24;
    const ATTACHMENT: usize = 6 << 20;
    // More than may be in hand at once; not so many that a broker with little memory would stop its publishers.
    const BOUND: usize = 480 << 20;
    let world = World::new().await;
    world.platform.rule(Rule::new(Stage::FinalDot, Action::After(Duration::from_millis(20))));
    let content = base64::engine::general_purpose::STANDARD.encode(vec![7u8; ATTACHMENT]);
    let mut ids = Vec::new();
    for _ in 0..JOBS {
        let mut job = job(None);
        job["attachments"] = json!([{
            "filename": "plan.bin", "content_type": "application/octet-stream", "content_base64": content,
        }]);
        ids.push(world.publish(&job).await);
    }
    let worker = world.worker().await;
    eventually("every job is sent", async || {
        let sent = worker.metric(r#"sendoff_jobs_settled_total{lane="notifications",outcome="sent"}"#).await;
        sent >= JOBS as f64
    })
    .await;
    let whole =
        world.platform.seen(|seen| seen.messages.iter().filter(|one| one.data.len() > ATTACHMENT).count());
    assert_eq!(whole, JOBS, "with their attachments");
    for id in ids {
        let status = world.status(None, id).await.expect("it is in the ledger");
        assert_eq!((status.state, status.attempts), (State::Sent, 1), "{id}");
    }
    let peak = peak_bytes(worker.pid());
    eprintln!("the worker's peak: {} MiB", peak >> 20);
    assert!(peak < BOUND, "{} MiB", peak >> 20);
    worker.stop().await;
    world.end().await;
}
