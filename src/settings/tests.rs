//! What the settings take, what they refuse, and that they show no secret.

use std::path::PathBuf;

use secrecy::ExposeSecret;
use toml::{Table, Value};

use super::keys::KEYS;
use super::layers::Layers;
use super::reader::Reader;
use super::*;

const KEY: &str = "k1:AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=";

fn sources(file: &str, environment: &[(&str, &str)]) -> Sources {
    Sources {
        file: (!file.is_empty()).then(|| (PathBuf::from("test.toml"), file.to_owned())),
        environment: environment.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect(),
    }
}

fn read(file: &str, environment: &[(&str, &str)]) -> Result<Settings, SettingsError> {
    Settings::from_sources(&sources(file, environment), Needs::NOTHING)
}

fn refusal(file: &str, environment: &[(&str, &str)]) -> String {
    match read(file, environment) {
        Ok(_) => panic!("taken, but should have been refused: {file} {environment:?}"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn later_layers_win_and_the_specific_variable_wins_over_the_customary_one() {
    let file = "[smtp]\nidle_timeout_s = 7\nconnect_timeout_s = 8\n[database]\nurl = \"postgres://file/x\"";
    let settings =
        read(file, &[("SENDOFF__SMTP__CONNECT_TIMEOUT_S", "9"), ("DATABASE_URL", "postgres://env/x")]);
    let settings = settings.unwrap();
    assert_eq!(settings.smtp.idle_timeout, Duration::from_secs(7));
    assert_eq!(settings.smtp.connect_timeout, Duration::from_secs(9));
    assert_eq!(settings.smtp.command_timeout, Duration::from_secs(30));
    assert_eq!(settings.database_url().unwrap().expose_secret(), "postgres://env/x");

    let both = [("SENDOFF__DATABASE__URL", "postgres://specific/x"), ("DATABASE_URL", "postgres://env/x")];
    for environment in [both, [both[1], both[0]]] {
        let settings = read(file, &environment).unwrap();
        assert_eq!(settings.database_url().unwrap().expose_secret(), "postgres://specific/x");
    }
}

#[test]
fn lists_come_from_arrays_and_from_text_with_commas() {
    let ports = |settings: Settings| settings.egress.allowed_ports;
    let only = |ports: &[u16]| AllowedPorts::Only(ports.iter().copied().collect());
    assert_eq!(ports(read("[egress]\nallowed_ports = [25, 2525]", &[]).unwrap()), only(&[25, 2525]));
    assert_eq!(
        ports(read("", &[("SENDOFF__EGRESS__ALLOWED_PORTS", "25, 2525")]).unwrap()),
        only(&[25, 2525])
    );
    assert_eq!(ports(read("[egress]\nallowed_ports = \"*\"", &[]).unwrap()), AllowedPorts::Any);
    let emptied = read("", &[("SENDOFF__EGRESS__DENY_NETWORKS", "")]).unwrap();
    assert!(emptied.egress.deny_networks.is_empty());
}

#[test]
fn an_empty_variable_leaves_a_single_value_as_it_was() {
    let settings = read("", &[("SENDOFF__AMQP__URL", ""), ("DATABASE_URL", "")]).unwrap();
    assert_eq!(settings.amqp.url.expose_secret(), "amqp://guest:guest@127.0.0.1:5672/%2f");
    assert!(settings.database.url.is_none());
}

#[test]
fn an_unknown_key_is_refused_with_the_nearest_known_one() {
    assert!(refusal("[smtp]\nidle_timeout = 3", &[]).contains("did you mean smtp.idle_timeout_s?"));
    assert!(
        refusal("", &[("SENDOFF__SMPT__IDLE_TIMEOUT_S", "3")]).contains("did you mean smtp.idle_timeout_s?")
    );
    let message = refusal("[database]\nurls = \"postgres://u:canary@h/d\"\n[xyz]\nq = 1", &[]);
    assert!(message.contains("database.urls (test.toml)") && message.contains("xyz"), "{message}");
    assert!(!message.contains("canary"), "{message}");
}

#[test]
fn a_bad_value_is_refused_with_its_key_itself_and_what_is_allowed() {
    for (key, value, allowed) in [
        ("amqp.prefix", "a b", "1 to 100 of"),
        ("delivery.custom_smtp", "some", "flagged or all"),
        ("delivery.max_sessions", "0", "from 1 to 10000"),
        ("smtp.attempt_timeout_s", "1800", "from 1 to 1740"),
        ("smtp.idle_timeout_s", "soon", "a whole number"),
        ("smtp.hello_name", "a b", "a domain name"),
        ("egress.allow_networks", "10.0.0.0/33", "networks such as"),
        ("egress.allowed_ports", "70000", "ports from 1 to 65535"),
        ("egress.allowed_ports", "0", "ports from 1 to 65535"),
        ("egress.nameservers", "127.0.0.1", "ip:port"),
        ("egress.allow_plaintext_auth", "yes", "true or false"),
        ("platform.host", "a b", "a host name"),
        ("platform.port", "0", "from 1 to 65535"),
        ("platform.from_email", "nobody", "an email address"),
        ("retry.schedule_s", "10,604801", "each from 1 to 604800 seconds"),
        ("retry.schedule_s", "0", "each from 1 to 604800 seconds"),
        ("retry.max_age_s", "-1", "a whole number"),
        ("limits.max_recipients", "0", "from 1 to 10000"),
        ("control.tests_per_minute", "0", "from 1 to"),
        ("http.listen", "localhost:8080", "ip:port"),
    ] {
        let variable = format!("SENDOFF__{}", key.to_uppercase().replace('.', "__"));
        let message = refusal("", &[(&variable, value)]);
        let shown = value.rsplit(',').next().unwrap();
        assert!(message.contains(key) && message.contains(&variable), "{message}");
        assert!(message.contains(&format!("`{shown}`")) && message.contains(allowed), "{message}");
    }
    let too_many = vec!["1"; 21].join(",");
    assert!(refusal("", &[("SENDOFF__RETRY__SCHEDULE_S", &too_many)]).contains("1 to 20 waits"));
    assert!(refusal("", &[("SENDOFF__RETRY__SCHEDULE_S", "")]).contains("1 to 20 waits"));
}

#[test]
fn every_problem_is_in_the_one_message() {
    let error = read("[smtp]\nidle_timeout_s = 0", &[("SENDOFF__HTTP__LISTEN", "x"), ("SENDOFF__A__B", "1")]);
    let error = error.unwrap_err();
    assert_eq!(error.problems().len(), 3, "{error}");
}

#[test]
fn a_missing_secret_is_named_with_the_way_to_make_one() {
    let error = Settings::from_sources(&sources("", &[]), Needs::ALL).unwrap_err().to_string();
    assert!(error.contains("database.url") && error.contains("DATABASE_URL"), "{error}");
    assert!(error.contains("encryption.keys") && error.contains("sendoff keys generate"), "{error}");
    assert!(read("", &[]).unwrap().database_url().is_err());
}

#[test]
fn a_bad_secret_is_refused_without_being_shown() {
    for (variable, value) in [
        ("DATABASE_URL", "mysql://u:canary@h/d"),
        ("AMQP_URL", "http://u:canary@h"),
        ("SENDOFF__ENCRYPTION__KEYS", "k1:canary"),
        ("SENDOFF__PLATFORM__PASSWORD", "canary\n"),
    ] {
        let message = refusal("", &[(variable, value)]);
        assert!(message.contains("not shown"), "{message}");
        assert!(!message.contains("canary"), "{message}");
    }
    let message = refusal("[platform]\npassword = \"canary\nhost = 1", &[]);
    assert!(message.contains("test.toml, line ") && !message.contains("canary"), "{message}");
}

#[test]
fn nothing_secret_is_in_the_debug_output() {
    let file = "[platform]\nhost = \"h.example\"\nusername = \"canary-u\"\npassword = \"canary-p\"\nfrom_email = \"a@b.c\"";
    let environment = [
        ("DATABASE_URL", "postgres://u:canary@h/d"),
        ("AMQP_URL", "amqps://u:canary@h/"),
        ("SENDOFF__ENCRYPTION__KEYS", KEY),
        ("SENDOFF__HTTP__CONSOLE_TOKEN", "canary-token"),
    ];
    let settings = Settings::from_sources(&sources(file, &environment), Needs::ALL).unwrap();
    let shown = format!("{settings:?} {settings:#?}");
    assert!(!shown.contains("canary") && !shown.contains("AAECAw"), "{shown}");
}

#[test]
fn keys_of_the_file_follow_those_of_the_setting() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let second = KEY.replace("k1", "k2");
    std::fs::write(file.path(), format!("# old\n{second} # since spring\n\n")).unwrap();
    let path = file.path().to_str().unwrap();
    let url = ("DATABASE_URL", "postgres://h/d");
    let variables = [url, ("SENDOFF__ENCRYPTION__KEYS", KEY), ("SENDOFF__ENCRYPTION__KEYS_FILE", path)];
    let settings = Settings::from_sources(&sources("", &variables), Needs::ALL).unwrap();
    let keys: Vec<_> = settings.encryption.keys.iter().map(ExposeSecret::expose_secret).collect();
    assert_eq!(keys, [KEY, &second]);

    std::fs::write(file.path(), KEY).unwrap();
    let error = Settings::from_sources(&sources("", &variables), Needs::ALL).unwrap_err().to_string();
    assert!(error.contains("two keys have the id `k1`"), "{error}");

    let gone = [url, ("SENDOFF__ENCRYPTION__KEYS_FILE", "/nowhere/keys")];
    let error = Settings::from_sources(&sources("", &gone), Needs::ALL).unwrap_err().to_string();
    assert!(error.contains("encryption.keys_file") && error.contains("/nowhere/keys"), "{error}");
}

#[test]
fn the_platforms_rate_is_its_providers_unless_the_operator_says_another_or_none() {
    let limits = |host: &str, more: &str| {
        let file = format!("[platform]\nhost = \"{host}\"\nfrom_email = \"a@b.c\"\n{more}");
        let settings = read(&file, &[]).unwrap();
        let warned = settings.warnings().iter().any(|warning| warning.starts_with("platform.host: "));
        let limited = settings.platform.unwrap().limited.map(|limited| limited.limits);
        (limited.map(|limits| (limits.max_connections, limits.messages_per_minute)), warned)
    };
    assert_eq!(limits("smtp.office365.com", ""), (Some((Some(3), Some(30))), true));
    let own = "messages_per_minute = 900";
    assert_eq!(limits("smtp.office365.com", own), (Some((Some(3), Some(900))), false));
    assert_eq!(limits("smtp.office365.com", "messages_per_minute = 0"), (Some((Some(3), None)), false));
    assert_eq!(limits("smtp.gmail.com", "messages_per_minute = 0"), (None, false));
    assert_eq!(limits("mail.example.org", ""), (None, false));
    assert_eq!(limits("mail.example.org", own), (Some((None, Some(900))), false));
    assert!(refusal("[platform]\nmessages_per_minute = 5", &[]).contains("platform.host is not"));
}

#[test]
fn a_platform_server_is_whole_or_absent() {
    assert!(read("", &[]).unwrap().platform.is_none());
    let host = "[platform]\nhost = \"Mail.Example.org\"\n";
    assert!(refusal(host, &[]).contains("platform.from_email is missing"));
    let sender = format!("{host}from_email = \"a@b.c\"\nfrom_name = \"Bookings\"\n");
    let platform = read(&sender, &[]).unwrap().platform.unwrap();
    assert_eq!((platform.account.host.as_str(), platform.account.port), ("mail.example.org", 587));
    assert!(platform.account.credentials.is_none() && platform.max_connections == 32);
    assert!(platform.limited.is_none());
    assert!(refusal(&format!("{sender}username = \"u\""), &[]).contains("platform.password is missing"));
    assert!(refusal(&format!("{sender}password = \"u\""), &[]).contains("platform.username is missing"));
    assert!(refusal("[platform]\nfrom_email = \"a@b.c\"", &[]).contains("platform.host is not"));
}

#[test]
fn the_ledger_may_not_forget_before_the_dead_letters_do() {
    let message = refusal("[ledger]\nretention_days = 30", &[]);
    assert!(
        message.contains("ledger.retention_days") && message.contains("dead_letters.retention_days (90)")
    );
    let same = "[ledger]\nretention_days = 30\n[dead_letters]\nretention_days = 30";
    assert_eq!(read(same, &[]).unwrap().retention.ledger, Duration::from_secs(30 * 86_400));
}

#[test]
fn lanes_come_from_the_file_only_and_may_not_overlap() {
    let lane = |name: &str, binding: &str, rest: &str| {
        format!("[[amqp.lanes]]\nname = \"{name}\"\nbindings = [\"{binding}\"]\n{rest}\n")
    };
    let two = lane("a", "x.*", "prefetch = 3") + &lane("b", "y.#", "");
    let lanes = read(&two, &[]).unwrap().amqp.lanes;
    assert_eq!(
        lanes.iter().map(|l| (l.name.as_str(), l.prefetch)).collect::<Vec<_>>(),
        [("a", 3), ("b", 512)]
    );

    assert!(refusal("", &[("SENDOFF__AMQP__LANES", "a")]).contains("in the settings file only"));
    let overlapping = lane("a", "x.*", "") + &lane("b", "#.z", "");
    assert!(refusal(&overlapping, &[]).contains("bindings of `a` and `b` overlap: `x.*` and `#.z`"));
    for (bad, words) in [
        (lane("A b", "x", ""), "`A b`: name must be 1 to"),
        (lane("a", "x..y", ""), "binding `x..y` must be"),
        (lane("a", "x", "prefetch = 0"), "prefetch `0` cannot be used"),
        (lane("a", "x", "prefetch = 65536"), "from 1 to 65535"),
        (lane("a", "x", "limit = 1"), "there is no `limit`"),
        (lane("a", "x", "") + &lane("a", "y", ""), "is there twice"),
        ("[amqp]\nlanes = []".to_owned(), "1 to 64 tables"),
        ("[[amqp.lanes]]\nname = \"a\"".to_owned(), "bindings must name at least one"),
        ("[[amqp.lanes]]\nname = \"a\"\nbindings = \"x\"".to_owned(), "must be a list of texts"),
    ] {
        assert!(refusal(&bad, &[]).contains(words), "{bad}: {}", refusal(&bad, &[]));
    }
}

#[test]
fn certificate_files_must_be_readable_and_hold_certificates() {
    let pem = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(pem.path(), "-----BEGIN CERTIFICATE-----\n").unwrap();
    let empty = tempfile::NamedTempFile::new().unwrap();
    let path = |file: &tempfile::NamedTempFile| file.path().to_str().unwrap().to_owned();
    let settings = read("", &[("NODE_EXTRA_CA_CERTS", &path(&pem)), ("SSL_CERT_FILE", &path(&pem))]).unwrap();
    assert_eq!(settings.smtp.extra_ca_files, [pem.path()]);
    for variable in ["NODE_EXTRA_CA_CERTS", "SSL_CERT_FILE", "SENDOFF__SMTP__EXTRA_CA_FILES"] {
        assert!(refusal("", &[(variable, "/nowhere.pem")]).contains("/nowhere.pem"), "{variable}");
        assert!(refusal("", &[(variable, &path(&empty))]).contains("no certificate"), "{variable}");
    }
}

#[test]
fn risky_settings_are_warned_of() {
    let quiet = read("[smtp]\nhello_name = \"mail.example.org\"", &[]).unwrap();
    assert_eq!(quiet.warnings(), Vec::<String>::new());
    let file = "[smtp]\nhello_name = \"w1\"\n[egress]\nallow_networks = [\"10.0.0.0/8\"]\nallow_plaintext_auth = true";
    assert_eq!(read(file, &[]).unwrap().warnings().len(), 3);
}

#[test]
fn every_key_of_the_table_is_read() {
    let sources = sources(
        "[platform]\nhost = \"h.example\"\nport = 25\nfrom_email = \"a@b.c\"\nmessages_per_minute = 5",
        &[],
    );
    let layers = Layers::new(&sources, &mut Vec::new());
    let mut reader = Reader::new(&layers, Vec::new());
    sections::read_with(&mut reader, &layers, &sources, Needs::ALL);
    assert_eq!(reader.asked, KEYS.iter().map(|(key, ..)| *key).collect());
}

#[test]
fn the_documented_defaults_are_the_built_in_ones() {
    let text = include_str!("../../config/default.toml");
    let documented: Table = text.parse().unwrap();
    let mut seen = std::collections::BTreeSet::new();
    for (section, keys) in &documented {
        for (name, value) in keys.as_table().unwrap() {
            let key = format!("{section}.{name}");
            if key != keys::LANES {
                let (_, preset, _) =
                    keys::find(&key).unwrap_or_else(|| panic!("{key} is documented but unknown"));
                assert_eq!(preset.value().as_ref(), Some(value), "{key}");
                seen.insert(key);
            }
        }
    }
    let file = (PathBuf::from("config/default.toml"), text.to_owned());
    let settings =
        Settings::from_sources(&Sources { file: Some(file), ..Default::default() }, Needs::NOTHING);
    assert_eq!(settings.unwrap().amqp.lanes, lanes::presets());
    assert!(documented["amqp"].get("lanes").is_some_and(Value::is_array));

    let mut section = "";
    for line in text.lines() {
        if let Some(header) = line.strip_prefix('[') {
            section = header.trim_matches(['[', ']']);
        } else if let Some((name, _)) = line.strip_prefix("# ").and_then(|rest| rest.split_once(" = ")) {
            seen.insert(format!("{section}.{name}"));
        }
    }
    let known: std::collections::BTreeSet<_> = KEYS.iter().map(|(key, ..)| (*key).to_owned()).collect();
    assert_eq!(seen, known, "every key is documented, those without a default in a comment");
}
