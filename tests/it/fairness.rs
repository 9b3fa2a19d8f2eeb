//! What one organization's trouble costs the others, and that great jobs are sent whole.
//! Guarantee: nothing here is timed; a server that is to be slow never speaks until the test is done with it.

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

#[tokio::test]
async fn a_great_job_is_sent_whole_though_its_attachment_was_left_out_while_it_waited() {
    let world = World::new().await;
    let attachment: Vec<u8> = (0..600_000u32).map(|byte| byte as u8).collect();
    let content = base64::engine::general_purpose::STANDARD.encode(&attachment);
    let mut ids = Vec::new();
    for _ in 0..3 {
        let mut job = job(None);
        job["attachments"] = json!([{
            "filename": "plan.bin", "content_type": "application/octet-stream", "content_base64": content,
        }]);
        ids.push(world.publish(&job).await);
    }
    let worker = world.worker().await;
    for id in ids {
        let sent = world.state(None, id, State::Sent).await;
        assert_eq!(sent.attempts, 1);
    }
    let messages = world.platform.messages();
    assert_eq!(messages.len(), 3);
    for message in &messages {
        let parsed = mail_parser::MessageParser::default().parse(&message.data).expect("a message");
        let file = mail_parser::MimeHeaders::attachment_name(parsed.attachment(0).expect("an attachment"));
        assert_eq!(file, Some("plan.bin"));
        assert!(parsed.attachment(0).expect("an attachment").contents() == attachment);
    }
    worker.stop().await;
    world.end().await;
}
