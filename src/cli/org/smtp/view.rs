//! A stored configuration in lines for a person.
//! Guarantee: who reads that it fails reads what happens to its mail meanwhile, and what to do.

use serde_json::Value;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::report::wrapped;
use crate::cli::output::harmless;
use crate::cli::story::{meaning, moment};
use crate::model::advice;
use crate::model::failure::Reason;

/// The fields in the order of the form, then how it is doing.
pub(super) fn lines(config: &Value, now: OffsetDateTime) -> Vec<String> {
    let mut lines = Vec::new();
    let mut add = |name: &str, value: &str| lines.extend(wrapped(&format!("{name:<16} "), value));
    for name in ["organization_id", "version", "from_email", "from_name", "host", "port", "secure"] {
        if let Some(value) = config.get(name) {
            add(name, &shown(value));
        }
    }
    if let Some(limits) = config.get("limits") {
        add("limits", &limited(limits));
    }
    add("status", &status(config));
    for name in ["created_at", "updated_at"] {
        if let Some(value) = config.get(name) {
            add(name, &at(value, now));
        }
    }
    add("last_test", &last_test(&config["last_test"], now));
    lines
}

/// Each limit that there is, and where it comes from.
fn limited(limits: &Value) -> String {
    let counts = [("max_connections", "connections at once"), ("messages_per_minute", "messages a minute")];
    let told: Vec<_> = counts
        .iter()
        .filter(|(name, _)| !limits[*name].is_null())
        .map(|(name, what)| format!("{} {what}", shown(&limits[*name])))
        .collect();
    format!("{}, over all workers (by {})", told.join(", "), shown(&limits["source"]))
}

fn status(config: &Value) -> String {
    if config["status"] != "failing" {
        return shown(&config["status"]);
    }
    let org = shown(&config["organization_id"]);
    format!(
        "failing: its mail waits (parked) and goes out by itself once a connection test succeeds. \
         `sendoff org smtp test {org}` tells what is wrong. Correct the configuration with `sendoff org smtp update {org}`, \
         which is tested at once, or delete it."
    )
}

fn last_test(test: &Value, now: OffsetDateTime) -> String {
    let when = at(&test["at"], now);
    match test["ok"].as_bool() {
        None => "never".to_owned(),
        Some(true) => format!("passed at {when}"),
        Some(false) => {
            let code = shown(&test["code"]);
            match Reason::from_name(&code) {
                Some(reason) => format!(
                    "failed at {when}, because {} ({code}). {}",
                    meaning(reason),
                    advice::of_reason(reason)
                ),
                None => format!("failed at {when} ({code})"),
            }
        }
    }
}

fn shown(value: &Value) -> String {
    match value {
        Value::Null => "-".to_owned(),
        Value::String(text) => harmless(text),
        other => other.to_string(),
    }
}

fn at(value: &Value, now: OffsetDateTime) -> String {
    let time = value.as_str().and_then(|text| OffsetDateTime::parse(text, &Rfc3339).ok());
    time.map_or_else(|| shown(value), |time| moment(time, now))
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use time::macros::datetime;

    use super::*;

    const NOW: OffsetDateTime = datetime!(2030-01-07 09:00 UTC);

    fn config() -> Value {
        json!({
            "organization_id": 42, "version": 3, "from_email": "a@example.org", "from_name": "A", "host": "smtp.example.org",
            "port": 587, "secure": true, "last_test": null, "status": "ok", "created_at": "2030-01-06T09:00:00Z",
            "updated_at": "2030-01-07T08:00:00.123Z",
        })
    }

    fn words(config: &Value) -> String {
        lines(config, NOW).join("\n")
    }

    #[test]
    fn a_configuration_is_shown_field_by_field() {
        assert_eq!(
            words(&config()),
            "\
organization_id  42
version          3
from_email       a@example.org
from_name        A
host             smtp.example.org
port             587
secure           true
status           ok
created_at       2030-01-06T09:00:00Z (1 d ago)
updated_at       2030-01-07T08:00:00Z (59 min ago)
last_test        never"
        );
    }

    #[test]
    fn limits_are_told_with_where_they_come_from() {
        let mut config = config();
        config["limits"] =
            json!({"max_connections": 3, "messages_per_minute": 30, "source": "Microsoft 365"});
        let line = "limits           3 connections at once, 30 messages a minute, over all workers (by Microsoft 365)";
        assert!(words(&config).contains(line), "{}", words(&config));
        config["limits"] =
            json!({"max_connections": null, "messages_per_minute": 7, "source": "configuration"});
        assert!(words(&config).contains("  7 messages a minute, over all workers (by configuration)"));
    }

    #[test]
    fn a_failing_one_says_what_happens_to_its_mail_and_what_to_do() {
        let mut config = config();
        config["status"] = json!("failing");
        config["last_test"] = json!({"at": "2030-01-07T08:50:00Z", "ok": false, "code": "auth_failed"});
        let words = words(&config).replace("\n                 ", " ");
        for part in [
            "status           failing: its mail waits (parked) and goes out by itself once",
            "`sendoff org smtp update 42`",
            "`sendoff org smtp test 42`",
            "last_test        failed at 2030-01-07T08:50:00Z (10 min ago), because the server refused user name or password \
             (auth_failed). ",
            advice::of_reason(Reason::AuthFailed),
        ] {
            assert!(words.contains(part), "{part}\n{words}");
        }
    }

    #[test]
    fn a_test_is_told_with_its_time_and_an_unknown_code_as_it_is() {
        let mut config = config();
        config["last_test"] = json!({"at": "2030-01-07T08:50:00Z", "ok": true, "code": null});
        assert!(words(&config).ends_with("last_test        passed at 2030-01-07T08:50:00Z (10 min ago)"));
        config["last_test"] = json!({"at": "2030-01-07T08:50:00Z", "ok": false, "code": "rejected"});
        assert!(words(&config).ends_with("failed at 2030-01-07T08:50:00Z (10 min ago) (rejected)"));
    }
}
