//! Everything that goes over the broker as one AsyncAPI 3.0 document.
//! Guarantee: exchanges and queues are named as the topology names them, the messages' schemas are those that `sendoff schema`
//! prints by themselves, and every reference leads somewhere.

use serde_json::{Map, Value, json};

use crate::broker::Names;
use crate::control::{command_names, command_schema};
use crate::model::event_schema;
use crate::settings::Settings;

/// The version of the AMQP bindings' form.
const BINDING: &str = "0.3.0";

/// The document for this installation's prefix, lanes and limits.
pub(super) fn document(settings: &Settings) -> Value {
    let names = Names::new(&settings.amqp.prefix);
    let mut schemas = Map::new();
    let mut payload = |name: &str, schema: Value| {
        hoist(name, schema, &mut schemas);
        json!({"$ref": format!("#/components/schemas/{name}")})
    };
    let job = payload("Job", super::job(settings));
    let command = payload("Command", command_schema());
    let event = payload("Event", event_schema::schema());
    let reply = json!({"$ref": "#/components/schemas/Reply"});
    json!({
        "asyncapi": "3.0.0",
        "info": {
            "title": "Sendoff",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "Jobs in, events out, commands and their replies. Operations are written from Sendoff's side: what it \
                receives, others send. Nobody but Sendoff declares the exchanges and queues.",
        },
        "defaultContentType": "application/json",
        "channels": channels(settings, &names),
        "operations": operations(),
        "components": {
            "messages": {
                "job": message("A job", job, &json!({
                    "summary": "One email to be sent once. Persistent; no `expiration`: `expires_at` is for that.",
                })),
                "command": message("A command", command, &json!({
                    "correlationId": {"$ref": "#/components/correlationIds/correlation"},
                    "summary": format!("One of {}.", command_names().join(", ")),
                })),
                "reply": message("A reply", reply, &json!({
                    "correlationId": {"$ref": "#/components/correlationIds/correlation"},
                    "summary": "The result, or the error with its code.",
                })),
                "event": message("An event", event, &json!({
                    "summary": format!("One of {}.", event_schema::types().join(", ")),
                })),
            },
            "correlationIds": {
                "correlation": {
                    "description": "The AMQP property correlation_id, given back as it came.",
                    "location": "$message.header#/correlation_id",
                },
            },
            "schemas": schemas,
        },
    })
}

fn message(title: &str, payload: Value, more: &Value) -> Value {
    let mut message = json!({"title": title, "contentType": "application/json", "payload": payload});
    for (name, value) in more.as_object().into_iter().flatten() {
        message[name] = value.clone();
    }
    message
}

fn channels(settings: &Settings, names: &Names) -> Value {
    let lanes: Vec<_> = settings
        .amqp
        .lanes
        .iter()
        .map(|lane| format!("{} takes {}", lane.name, lane.bindings.join(", ")))
        .collect();
    json!({
        "jobs": {
            "address": "{routing_key}",
            "title": names.jobs(),
            "description": format!(
                "The topic exchange for jobs. Lanes: {}. A job that no lane takes is a dead letter, unroutable.",
                lanes.join("; ")
            ),
            "parameters": {"routing_key": {
                "description": "Chooses the lane.", "examples": ["notification.booking_confirmed"],
            }},
            "messages": one_message("job"),
            "bindings": exchange(&names.jobs()),
        },
        "control": {
            "address": names.control(),
            "title": names.control(),
            "description": "The queue of commands, published to over the default exchange.",
            "messages": one_message("command"),
            "bindings": {"amqp": {
                "is": "queue",
                "queue": {"name": names.control(), "durable": true, "exclusive": false, "autoDelete": false},
                "bindingVersion": BINDING,
            }},
        },
        "reply": {
            "address": null,
            "title": "The queue named by the command's reply_to",
            "description": "RabbitMQ's direct reply-to (amq.rabbitmq.reply-to) works.",
            "messages": one_message("reply"),
        },
        "events": {
            "address": "{type}",
            "title": names.events(),
            "description": "The topic exchange for what happens: bind a queue of your own, say by email.# or smtp_config.failing.",
            "parameters": {"type": {
                "description": "The event's type.", "enum": event_schema::types(),
            }},
            "messages": one_message("event"),
            "bindings": exchange(&names.events()),
        },
    })
}

fn exchange(name: &str) -> Value {
    json!({"amqp": {
        "is": "routingKey",
        "exchange": {"name": name, "type": "topic", "durable": true, "autoDelete": false},
        "bindingVersion": BINDING,
    }})
}

fn one_message(name: &str) -> Value {
    json!({name: {"$ref": format!("#/components/messages/{name}")}})
}

fn operations() -> Value {
    let at = |channel: &str, message: &str| {
        json!({
            "channel": {"$ref": format!("#/channels/{channel}")},
            "messages": [{"$ref": format!("#/channels/{channel}/messages/{message}")}],
        })
    };
    let operation = |action: &str, channel: &str, message: &str, summary: &str| {
        let mut operation = at(channel, message);
        operation["action"] = json!(action);
        operation["summary"] = json!(summary);
        operation
    };
    let mut commands =
        operation("receive", "control", "command", "Carries out a command, at most once, and replies.");
    commands["reply"] = at("reply", "reply");
    commands["reply"]["address"] =
        json!({"description": "The AMQP property reply_to.", "location": "$message.header#/reply_to"});
    let mut jobs = operation("receive", "jobs", "job", "Takes a job and sends its mail once.");
    // 2: persistent.
    jobs["bindings"] = json!({"amqp": {"deliveryMode": 2, "ack": true, "bindingVersion": BINDING}});
    json!({
        "receiveJob": jobs,
        "receiveCommand": commands,
        "sendEvent": operation("send", "events", "event", "Tells what happened, at least once and in no order."),
    })
}

/// Lays a schema and its definitions side by side, as AsyncAPI's components are, with the references rewritten. Two schemas
/// that define the same name define the same thing.
fn hoist(name: &str, mut schema: Value, schemas: &mut Map<String, Value>) {
    let mut definitions = Map::new();
    if let Some(schema) = schema.as_object_mut() {
        schema.remove("$schema");
        schema.remove("$id");
        if let Some(Value::Object(found)) = schema.remove("$defs") {
            definitions = found;
        }
    }
    definitions.insert(name.to_owned(), schema);
    for (name, mut definition) in definitions {
        rewrite(&mut definition);
        schemas.insert(name, definition);
    }
}

fn rewrite(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            for (name, field) in fields {
                match field {
                    Value::String(target) if name == "$ref" => {
                        *target = target.replacen("#/$defs/", "#/components/schemas/", 1);
                    }
                    field => rewrite(field),
                }
            }
        }
        Value::Array(items) => items.iter_mut().for_each(rewrite),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::broker::wire::{WireLimits, job_schema};

    #[test]
    fn definitions_of_one_name_are_the_same_in_every_document() {
        let limits = WireLimits { max_recipients: 100, max_message_bytes: 1000 };
        let mut seen: Map<String, Value> = Map::new();
        for document in [job_schema(&limits), command_schema(), event_schema::schema()] {
            for (name, definition) in document["$defs"].as_object().unwrap() {
                assert!(!["Job", "Command", "Event"].contains(&name.as_str()), "{name} would be overwritten");
                let other = seen.insert(name.clone(), definition.clone());
                assert!(other.is_none_or(|other| other == *definition), "{name}");
            }
        }
        assert!(seen.contains_key("Reply") && seen.contains_key("Mailbox"));
    }
}
