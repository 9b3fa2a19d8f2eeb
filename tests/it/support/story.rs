//! Organizations with a server each, and what became of a job in one line.
//! Guarantee: many cases fit into one world, for nothing that one organization's server does reaches another's.

use serde_json::{Value, json};
use uuid::Uuid;

use super::broker::{Message, eventually};
use super::smtp_server::{Behaviour, Rule, SmtpServer, Tls};
use super::world::{PASSWORD, SOON, USERNAME, World};

impl World {
    /// An organization with a server of its own that speaks STARTTLS and demands the login, changed as given. Needs a
    /// worker.
    pub async fn with_server(&self, id: &str, configure: impl FnOnce(&mut Behaviour)) -> SmtpServer {
        let server = self.another_server(configure).await;
        self.organization_at(id, json!({"port": server.port()})).await;
        server
    }

    /// The same, misbehaving by rules.
    pub async fn with_rules(&self, id: &str, rules: impl IntoIterator<Item = Rule>) -> SmtpServer {
        self.with_server(id, |behaviour| {
            for rule in rules {
                behaviour.rule(rule);
            }
        })
        .await
    }

    /// A server like the organizations' own, that no organization uses yet.
    pub async fn another_server(&self, configure: impl FnOnce(&mut Behaviour)) -> SmtpServer {
        let certificate = self.authority.issue(&["localhost", "127.0.0.1"]).server_config();
        SmtpServer::start(|behaviour| {
            behaviour.tls = Tls::Starttls(certificate);
            behaviour.login = Some((USERNAME.into(), PASSWORD.into()));
            configure(behaviour);
        })
        .await
    }

    /// Waits until a job is sent, parked, dead or expired, and tells its events in order: `deferred timeout, sent`. An end that is
    /// said again, for a copy that came again, is told once: events come at least once.
    pub async fn story(&self, id: Uuid) -> String {
        let of_job = |event: &Value| event["job_id"] == id.to_string();
        let ends = |event: &Value| {
            let kind = event["type"].as_str().unwrap_or_default();
            of_job(event) && ["email.sent", "email.parked", "email.dead", "email.expired"].contains(&kind)
        };
        self.events.wait_for(ends, SOON).await;
        let events = self.events.all();
        let mut told: Vec<String> = Vec::new();
        for event in events.iter().filter(|event| of_job(event)) {
            let kind = event["type"].as_str().unwrap_or_default().trim_start_matches("email.");
            let reason = event["reason"].as_str().unwrap_or_default();
            let words = format!("{kind} {reason}").trim_end().to_owned();
            if !ends(event) || !told.contains(&words) {
                told.push(words);
            }
        }
        told.join(", ")
    }
}

/// Dead letters by job, in whatever order they died.
#[derive(Default)]
pub struct Letters(Vec<Message>);

impl Letters {
    /// The letter of a job, taken off the tap.
    pub async fn of(&mut self, world: &World, id: Uuid) -> Message {
        let queue = world.broker.tap();
        let mut position = None;
        eventually(&format!("a dead letter of {id}"), async || {
            self.0.extend(world.broker.drain(&queue).await);
            position = self.0.iter().position(|letter| job_of(letter) == Some(id));
            position.is_some()
        })
        .await;
        self.0.swap_remove(position.expect("just seen"))
    }

    /// How many letters are left over once the tap is drained.
    pub async fn left(&mut self, world: &World) -> usize {
        self.0.extend(world.broker.drain(&world.broker.tap()).await);
        self.0.len()
    }
}

fn job_of(letter: &Message) -> Option<Uuid> {
    let job: Value = serde_json::from_slice(&letter.body).ok()?;
    job["id"].as_str()?.parse().ok()
}
