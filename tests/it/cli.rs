//! The command line as a person or a script meets it: help, usage, settings errors, exit codes.

mod services;

use std::process::{Command, Output, Stdio};

fn sendoff(arguments: &[&str], environment: &[(&str, &str)]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_sendoff"))
        .args(arguments)
        .env_clear()
        .envs(environment.iter().copied())
        .stdin(Stdio::null())
        .output()
        .expect("the program runs")
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// A port where nobody listens: no program is given it that asks for any port.
const CLOSED_PORT: u16 = 1;

#[test]
fn help_names_every_command_and_each_has_an_example() {
    let help = sendoff(&["--help"], &[]);
    assert_eq!(help.status.code(), Some(0));
    for command in ["worker", "check", "migrate", "topology", "job", "dead", "org", "keys", "schema"] {
        assert!(stdout(&help).contains(command), "{command}");
        let own = sendoff(&[command, "--help"], &[]);
        assert_eq!(own.status.code(), Some(0));
        assert!(stdout(&own).contains("Example"), "{command}");
    }
}

#[test]
fn what_is_not_understood_is_a_usage_error() {
    for arguments in [
        &["wrok"][..],
        &[],
        &["worker", "--drain-timeout", "1h"],
        &["job", "status", "not-a-uuid"],
        &["schema", "jobs"],
        &["org", "smtp", "send-test", "42", "--to", "nobody"],
        &["org", "smtp", "send-test", "42"],
        &["org", "smtp", "test", "42", "--port", "x"],
        &["org", "smtp", "test", "42", "--password", "canary"],
    ] {
        let output = sendoff(arguments, &[]);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        assert!(stdout(&output).is_empty() && !stderr(&output).is_empty(), "{arguments:?}");
    }
}

#[test]
fn a_bad_setting_fails_with_one_message_that_names_it() {
    let output =
        sendoff(&["worker"], &[("SENDOFF__SMTP__IDLE_TIMEOUT", "3"), ("DATABASE_URL", "mysql://u:canary@h")]);
    assert_eq!(output.status.code(), Some(1));
    let message = stderr(&output);
    assert!(message.starts_with("error: settings: "), "{message}");
    for words in
        ["did you mean smtp.idle_timeout_s?", "database.url (DATABASE_URL)", "encryption.keys is missing"]
    {
        assert!(message.contains(words), "{words}: {message}");
    }
    assert!(!message.contains("canary"), "{message}");
}

#[test]
fn a_bad_log_filter_is_refused() {
    let output = sendoff(&["topology", "show"], &[("RUST_LOG", "a=b=c")]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("RUST_LOG"), "{}", stderr(&output));
}

#[test]
fn a_settings_file_is_named_by_argument_or_by_variable() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "[amqp]\nprefix = \"booking\"\n").unwrap();
    let path = file.path().to_str().unwrap();
    for output in [
        sendoff(&["topology", "show", "--config", path], &[]),
        sendoff(&["--config", path, "topology", "show"], &[]),
        sendoff(&["topology", "show"], &[("SENDOFF_CONFIG", path)]),
    ] {
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        assert!(stdout(&output).contains("booking.jobs.notifications"));
    }
    let gone = sendoff(&["topology", "show", "--config", "/nowhere.toml"], &[]);
    assert_eq!(gone.status.code(), Some(1));
    assert!(stderr(&gone).contains("/nowhere.toml"));
}

#[test]
fn the_topology_is_shown_without_any_service() {
    let output = sendoff(&["topology", "show", "--json"], &[]);
    let topology: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let queues: Vec<_> =
        topology["queues"].as_array().unwrap().iter().map(|queue| queue["name"].as_str()).collect();
    for queue in
        ["sendoff.jobs.reminders", "sendoff.retry.notifications.28800", "sendoff.dead", "sendoff.control"]
    {
        assert!(queues.contains(&Some(queue)), "{queue}");
    }
}

#[test]
fn a_generated_key_is_one_the_settings_take() {
    let output = sendoff(&["keys", "generate"], &[]);
    assert_eq!(output.status.code(), Some(0));
    let key = stdout(&output).trim().to_owned();
    let taken = sendoff(&["topology", "show"], &[("SENDOFF__ENCRYPTION__KEYS", &key)]);
    assert_eq!(taken.status.code(), Some(0), "{}", stderr(&taken));
    let named = sendoff(&["keys", "generate", "--id", "spring", "--json"], &[]);
    let named: serde_json::Value = serde_json::from_slice(&named.stdout).unwrap();
    assert!(named["id"] == "spring" && named["key"].as_str().unwrap().starts_with("spring:"));
    assert_eq!(sendoff(&["keys", "generate", "--id", "a b"], &[]).status.code(), Some(1));
}

#[test]
fn a_reader_that_goes_away_is_no_panic() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_sendoff"))
        .args(["topology", "show"])
        .env_clear()
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), stderr(&output).as_str()), (Some(0), ""));
}

#[test]
fn a_dependency_that_is_away_has_its_own_exit_code() {
    let port = CLOSED_PORT;
    let amqp = format!("amqp://guest:canary@127.0.0.1:{port}");
    let database = format!("postgres://u:canary@127.0.0.1:{port}/d");
    let environment = [("AMQP_URL", amqp.as_str()), ("DATABASE_URL", database.as_str())];
    let send = ["job", "send", "--to", "a@example.org", "--subject", "x", "--text", "y"];
    let test = ["org", "smtp", "test", "42"];
    let email = ["org", "smtp", "send-test", "42", "--to", "a@example.org"];
    for arguments in [&["org", "smtp", "show", "42"][..], &test, &email, &["migrate"], &send] {
        let output = sendoff(arguments, &environment);
        assert_eq!(output.status.code(), Some(3), "{arguments:?}: {}", stderr(&output));
        assert!(
            stderr(&output).starts_with("error: ") && !stderr(&output).contains("canary"),
            "{arguments:?}"
        );
    }
}

#[test]
fn a_job_that_the_worker_would_refuse_is_not_published() {
    let send = |more: &[&str]| sendoff(&[&["job", "send", "--subject", "x"][..], more].concat(), &[]);
    let refused = send(&["--to", "not an address", "--text", "y"]);
    assert_eq!(refused.status.code(), Some(2));
    assert!(
        stderr(&refused).contains("malformed") && stderr(&refused).contains("to"),
        "{}",
        stderr(&refused)
    );
    let lane = send(&["--to", "a@example.org", "--text", "y", "--lane", "express"]);
    assert_eq!(lane.status.code(), Some(2));
    assert!(stderr(&lane).contains("notifications, reminders"), "{}", stderr(&lane));
    assert_eq!(send(&["--timeout", "3s"]).status.code(), Some(2));
}

#[test]
fn the_readmes_job_is_one_that_can_be_sent() {
    let readme = include_str!("../../README.md");
    let job = readme.split("```json\n").nth(1).and_then(|rest| rest.split("```").next()).unwrap();
    let limits = sendoff::broker::wire::WireLimits { max_recipients: 100, max_message_bytes: 10_485_760 };
    let job = sendoff::broker::wire::parse_job(job.as_bytes(), &limits).map_err(|refusal| refusal.detail);
    assert_eq!(job.map(|job| job.kind), Ok("booking.confirmed".to_owned()));
}

/// A document as the program prints it, and a judge of JSON by it that shares no code with the program.
fn schema(name: &str) -> (serde_json::Value, impl Fn(&serde_json::Value) -> bool) {
    let output = sendoff(&["schema", name], &[("SENDOFF__AMQP__PREFIX", "booking")]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let document: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let mut schemas = boon::Schemas::new();
    let mut compiler = boon::Compiler::new();
    compiler.add_resource("urn:document", document.clone()).unwrap();
    let compiled =
        compiler.compile("urn:document", &mut schemas).unwrap_or_else(|error| panic!("{name}: {error:#}"));
    (document, move |value| schemas.validate(value, compiled).is_ok())
}

#[test]
fn each_schema_is_one_and_judges_as_the_worker_does() {
    let (_, is_job) = schema("job");
    let readme = include_str!("../../README.md");
    let job = readme.split("```json\n").nth(1).and_then(|rest| rest.split("```").next()).unwrap();
    let mut job: serde_json::Value = serde_json::from_str(job).unwrap();
    assert!(is_job(&job), "the README's job");
    job["too"] = serde_json::json!(["ann@example.org"]);
    assert!(!is_job(&job), "with a field that is unknown");

    let (commands, is_command) = schema("command");
    let update = |params: serde_json::Value| {
        is_command(
            &serde_json::json!({"command": "smtp_config.update", "organization_id": 42, "params": params}),
        )
    };
    assert!(update(serde_json::json!({"port": 587, "if_version": 3})));
    assert!(!update(serde_json::json!({"port": 587, "if_version": "3"})));
    let documented = commands["$defs"]["smtp_config.update"].to_string();
    assert!(documented.contains("if_version") && documented.contains("conflict"), "{documented}");

    let (_, is_event) = schema("event");
    let event = serde_json::json!({
        "type": "smtp_config.recovered", "at": "2030-01-07T09:00:00Z", "organization_id": 42, "released": 1000,
    });
    assert!(is_event(&event) && !is_event(&serde_json::json!({"type": "smtp_config.recovered"})));
}

/// Every `$ref` within a value.
fn references(value: &serde_json::Value, found: &mut Vec<String>) {
    match value {
        serde_json::Value::Object(fields) => {
            found.extend(fields.get("$ref").and_then(|target| target.as_str()).map(str::to_owned));
            fields.values().for_each(|field| references(field, found));
        }
        serde_json::Value::Array(items) => items.iter().for_each(|item| references(item, found)),
        _ => {}
    }
}

#[test]
fn the_asyncapi_document_names_what_is_on_the_broker_and_each_reference_leads_somewhere() {
    let output = sendoff(&["schema", "asyncapi"], &[("SENDOFF__AMQP__PREFIX", "booking")]);
    let document: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(document["asyncapi"], "3.0.0");
    let mut found = Vec::new();
    references(&document, &mut found);
    assert!(found.len() > 40, "{found:?}");
    for target in found {
        let place = target.strip_prefix('#').unwrap_or_else(|| panic!("{target}"));
        assert!(document.pointer(place).is_some(), "{target} leads nowhere");
    }
    let channels = &document["channels"];
    assert_eq!(channels["jobs"]["bindings"]["amqp"]["exchange"]["name"], "booking.jobs");
    assert_eq!(channels["control"]["bindings"]["amqp"]["queue"]["name"], "booking.control");
    assert_eq!(channels["events"]["bindings"]["amqp"]["exchange"]["name"], "booking.events");
    let topology = sendoff(&["topology", "show", "--json"], &[("SENDOFF__AMQP__PREFIX", "booking")]);
    let topology = stdout(&topology);
    for name in ["booking.jobs", "booking.control", "booking.events"] {
        assert!(topology.contains(&format!("\"{name}\"")), "{name}");
    }
    for (name, operation) in document["operations"].as_object().unwrap() {
        assert!(["send", "receive"].contains(&operation["action"].as_str().unwrap()), "{name}");
        assert!(operation["channel"]["$ref"].as_str().unwrap().starts_with("#/channels/"), "{name}");
    }
}

#[test]
fn a_password_is_never_an_argument() {
    let create =
        ["org", "smtp", "create", "42", "--host", "h.example.org", "--port", "587", "--username", "u"];
    let rest = ["--from-email", "a@example.org", "--from-name", "A"];
    let output = sendoff(&[&create[..], &rest, &["--password", "canary"]].concat(), &[]);
    assert_eq!(output.status.code(), Some(2));
    let output = sendoff(&[&create[..], &rest].concat(), &[]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("--password-file"), "{}", stderr(&output));
}

#[test]
fn check_tells_of_every_part_and_fails_when_one_does() {
    let output = sendoff(&["check", "--json"], &[]);
    assert_eq!(output.status.code(), Some(1));
    let lines: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(
        lines.as_array().unwrap().iter().all(|line| line["name"] == "settings" && line["status"] == "failed")
    );

    let port = CLOSED_PORT;
    let key = stdout(&sendoff(&["keys", "generate"], &[]));
    let output = sendoff(
        &["check"],
        &[
            ("AMQP_URL", &format!("amqp://127.0.0.1:{port}")),
            ("DATABASE_URL", &format!("postgres://127.0.0.1:{port}/d")),
            ("SENDOFF__ENCRYPTION__KEYS", key.trim()),
            ("SENDOFF__EGRESS__NAMESERVERS", &format!("127.0.0.1:{port}")),
        ],
    );
    assert_eq!(output.status.code(), Some(1));
    let text = stdout(&output);
    for part in ["ok      settings", "ok      keys", "FAILED  database", "FAILED  broker", "FAILED  dns"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let database = text.lines().find(|line| line.contains("database")).unwrap();
    assert!(database.contains(&format!("127.0.0.1:{port}")) && database.contains("refused"), "{database}");
}
