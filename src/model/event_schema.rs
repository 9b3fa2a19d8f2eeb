//! The events as a JSON Schema: what a consumer of the events exchange can rely on.
//! Guarantee: a test serialises every kind of event and finds it described, field by field. Unknown fields are allowed, because
//! an event may gain some.

use serde_json::{Map, Value, json};

use super::schema::{DIALECT, definition, or_null, organization_id, reason, time, uuid};

/// The document's name.
pub const ID: &str = "urn:sendoff:schema:event:1";

/// What an event speaks of.
#[derive(Clone, Copy, PartialEq, Eq)]
enum About {
    Job,
    Configuration,
}

/// One kind of event: its type, what it means, its own fields with what each is.
struct Kind {
    name: &'static str,
    about: About,
    meaning: &'static str,
    fields: Vec<(&'static str, Value)>,
}

/// The schema of an event's body: one branch for each type.
pub fn schema() -> Value {
    let kinds = kinds();
    let branches: Vec<_> = kinds.iter().map(|kind| definition(kind.name)).collect();
    let mut definitions =
        Map::from_iter([("OrganizationId".to_owned(), organization_id()), ("Reason".to_owned(), reason())]);
    definitions.extend(kinds.iter().map(|kind| (kind.name.to_owned(), kind.schema())));
    json!({
        "$schema": DIALECT,
        "$id": ID,
        "title": "Sendoff event",
        "description": "Published to the events exchange at least once and in no order; its type is the routing key. Fields may be \
            added to it.",
        "oneOf": branches,
        "$defs": definitions,
    })
}

/// Every type of event, which is its routing key.
pub fn types() -> Vec<&'static str> {
    kinds().iter().map(|kind| kind.name).collect()
}

impl Kind {
    fn schema(&self) -> Value {
        let mut properties = Map::from_iter([
            ("type".to_owned(), json!({"const": self.name})),
            ("at".to_owned(), described("When it happened.", time())),
        ]);
        let mut required = vec!["type", "at", "organization_id"];
        if self.about == About::Job {
            let organization = or_null(&definition("OrganizationId"));
            properties.insert(
                "organization_id".to_owned(),
                described(
                    "Whose mail it is; null for the platform's, and where a body that is no job does not tell.",
                    organization,
                ),
            );
            properties.insert(
                "job_id".to_owned(),
                described("The publisher's id; absent where a body that is no job has none.", uuid()),
            );
            properties
                .insert("kind".to_owned(), json!({"description": "The publisher's kind.", "type": "string"}));
            properties
                .insert("group".to_owned(), json!({"description": "The job's booking.", "type": "string"}));
        } else {
            properties.insert("organization_id".to_owned(), definition("OrganizationId"));
        }
        for (name, field) in &self.fields {
            properties.insert((*name).to_owned(), field.clone());
            required.push(name);
        }
        json!({
            "title": self.name, "description": self.meaning, "type": "object",
            "properties": properties, "required": required,
        })
    }
}

fn kinds() -> Vec<Kind> {
    let why = || ("reason", definition("Reason"));
    let version = || ("version", json!({"description": "The configuration's version.", "type": "integer"}));
    let kind = |name, about, meaning, fields| Kind { name, about, meaning, fields };
    vec![
        kind(
            "email.sent",
            About::Job,
            "The server accepted the message, once no recipient was pending. Later bounces go to the From address.",
            vec![
                ("message_id", json!({"description": "With angle brackets.", "type": "string"})),
                ("transport", json!({"enum": ["organization", "platform"]})),
                ("recipients_refused", refused_recipients()),
            ],
        ),
        kind(
            "email.deferred",
            About::Job,
            "The job is tried again.",
            vec![why(), ("next_attempt_at", described("Not before this time.", time()))],
        ),
        kind(
            "email.parked",
            About::Job,
            "The job waits for its organization's configuration to work.",
            vec![why()],
        ),
        kind(
            "email.dead",
            About::Job,
            "The job, or the recipients that were refused, became a dead letter.",
            vec![why()],
        ),
        kind("email.expired", About::Job, "The job's time had passed; nothing was sent.", vec![why()]),
        kind("smtp_config.created", About::Configuration, "A configuration was stored.", vec![version()]),
        kind("smtp_config.updated", About::Configuration, "A configuration was changed.", vec![version()]),
        kind("smtp_config.deleted", About::Configuration, "A configuration was deleted.", vec![]),
        kind(
            "smtp_config.failing",
            About::Configuration,
            "The configuration does not work: from here on the organization's mail is parked.",
            vec![
                version(),
                why(),
                ("hint", json!({"description": "What to do about it.", "type": "string"})),
            ],
        ),
        kind(
            "smtp_config.recovered",
            About::Configuration,
            "The organization's mail flows again.",
            vec![(
                "released",
                json!({"description": "How many parked jobs went back to their lanes.", "type": "integer",
                    "minimum": 0}),
            )],
        ),
    ]
}

fn refused_recipients() -> Value {
    json!({
        "description": "Recipients that were refused for good.",
        "type": "array",
        "items": {
            "type": "object",
            "properties": {
                "index": {"description": "Position over to + cc + bcc, from 0.", "type": "integer", "minimum": 0},
                "code": {"description": "The code of the server's reply.", "type": "integer"},
                "reason": definition("Reason"),
            },
            "required": ["index", "code", "reason"],
        },
    })
}

fn described(description: &str, mut schema: Value) -> Value {
    schema["description"] = json!(description);
    schema
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use ::time::macros::datetime;
    use boon::{Compiler, Schemas};
    use uuid::Uuid;

    use super::*;
    use crate::model::event::{Event, JobFacts, RefusedRecipient, What};
    use crate::model::failure::Reason;
    use crate::model::organization::OrganizationId;

    /// One of each. A new kind of event does not compile without a place here.
    fn every_kind() -> Vec<What> {
        let (reason, version) = (Reason::AuthFailed, 3);
        let refused = RefusedRecipient { index: 1, code: 550, reason: Reason::RecipientsRefused };
        let next_attempt_at = datetime!(2030-01-07 09:00 UTC);
        let all = vec![
            What::Sent {
                message_id: "<a@b.example>".into(),
                transport: "platform",
                recipients_refused: vec![refused],
            },
            What::Deferred { reason, next_attempt_at },
            What::Parked { reason },
            What::Dead { reason },
            What::Expired { reason: Reason::Expired },
            What::ConfigCreated { version },
            What::ConfigUpdated { version },
            What::ConfigDeleted {},
            What::ConfigFailing { version, reason, hint: "Use an app password.".into() },
            What::ConfigRecovered { released: 1000 },
        ];
        for what in &all {
            match what {
                What::Sent { .. }
                | What::Deferred { .. }
                | What::Parked { .. }
                | What::Dead { .. }
                | What::Expired { .. }
                | What::ConfigCreated { .. }
                | What::ConfigUpdated { .. }
                | What::ConfigDeleted {}
                | What::ConfigFailing { .. }
                | What::ConfigRecovered { .. } => {}
            }
        }
        all
    }

    fn event(what: What, organization: Option<&str>, kind: Option<&str>) -> Value {
        let job = what.routing_key().starts_with("email.").then(|| JobFacts {
            job_id: Uuid::from_u128(7),
            kind: kind.map(str::to_owned),
            group: kind.map(|_| "booking-1".to_owned()),
        });
        let organization_id = organization.map(|id| OrganizationId::parse(id).unwrap());
        let at = datetime!(2030-01-07 09:00:00.5 UTC);
        serde_json::to_value(Event { at, organization_id, job, what }).unwrap()
    }

    #[test]
    fn every_event_is_described_field_by_field() {
        let document = schema();
        let mut schemas = Schemas::new();
        let mut compiler = Compiler::new();
        compiler.enable_format_assertions();
        compiler.add_resource("urn:event", document.clone()).unwrap();
        let compiled =
            compiler.compile("urn:event", &mut schemas).unwrap_or_else(|error| panic!("{error:#}"));
        let mut seen = BTreeSet::new();
        for what in every_kind() {
            let name = what.routing_key();
            seen.insert(name);
            let whole = event(what.clone(), Some("acme"), Some("booking.confirmed"));
            let described = document["$defs"][name]["properties"].as_object().unwrap();
            for field in whole.as_object().unwrap().keys() {
                assert!(described.contains_key(field), "{name} lacks {field}");
            }
            assert_eq!(
                described.len(),
                whole.as_object().unwrap().len(),
                "{name} describes what is not there"
            );
            let mut bodies = vec![whole];
            if name.starts_with("email.") {
                bodies.push(event(what, None, None));
            }
            for body in bodies {
                let verdict = schemas.validate(&body, compiled).map_err(|error| format!("{error:#}"));
                assert_eq!(verdict, Ok(()), "{body}");
                let mut less = body.clone();
                less.as_object_mut().unwrap().remove("at");
                assert!(schemas.validate(&less, compiled).is_err(), "{less}");
            }
        }
        assert_eq!(seen, types().into_iter().collect());
    }
}
