//! The documents against the program: what the runbook must speak of, and that no link leads nowhere.
//! Guarantee: a new reason, metric or readiness part without a word in the runbook fails a test.

use std::fs;
use std::path::{Path, PathBuf};

use sendoff::model::failure::Reason;

fn read(path: &str) -> String {
    let whole = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    fs::read_to_string(&whole).unwrap_or_else(|error| panic!("{path}: {error}"))
}

#[test]
fn the_runbook_has_a_line_for_every_reason() {
    let runbook = read("docs/operations.md");
    let missing: Vec<&str> = Reason::ALL
        .iter()
        .map(|reason| reason.as_str())
        .filter(|reason| !runbook.lines().any(|line| line.starts_with(&format!("| `{reason}` | "))))
        .collect();
    assert!(missing.is_empty(), "docs/operations.md, Reasons, lacks {missing:?}");
}

#[test]
fn the_runbook_names_every_metric() {
    let runbook = read("docs/operations.md");
    let source = read("src/telemetry/metric.rs");
    let constants =
        source.lines().filter(|line| line.starts_with("const ") && line.contains(": &str = \"sendoff_"));
    let names: Vec<&str> =
        constants.filter_map(|line| line.split("\"sendoff_").nth(1)?.split('"').next()).collect();
    assert!(names.len() > 15, "only {names:?} were found");
    let named =
        |name: &str| [format!("`{name}`"), format!("`{name}{{")].iter().any(|form| runbook.contains(form));
    let missing: Vec<&str> = names.into_iter().filter(|name| !named(name)).collect();
    assert!(missing.is_empty(), "docs/operations.md, Metrics, lacks {missing:?}");
}

#[test]
fn the_runbook_explains_every_part_of_readiness() {
    let runbook = read("docs/operations.md");
    for part in ["broker", "database", "schema", "keys"] {
        assert!(runbook.contains(&format!("\n| `{part}` | ")), "docs/operations.md, /readyz, lacks {part}");
    }
}

#[test]
fn every_dependency_has_its_reason_written_down() {
    let reasons = read("docs/decisions/dependencies.md");
    let named: Vec<&str> = reasons
        .lines()
        .filter_map(|line| line.strip_prefix("| ")?.split(" | ").next())
        .flat_map(|crates| crates.split(", "))
        .collect();
    let manifest: toml::Table = toml::from_str(&read("Cargo.toml")).unwrap();
    for section in ["dependencies", "dev-dependencies"] {
        for name in manifest[section].as_table().unwrap().keys() {
            assert!(
                named.contains(&name.as_str()),
                "docs/decisions/dependencies.md lacks {name} ({section})"
            );
        }
    }
}

#[test]
fn every_link_between_the_documents_leads_somewhere() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut documents: Vec<PathBuf> = [
        "README.md",
        "ARCHITECTURE.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        "docs/operations.md",
        "docs/performance.md",
    ]
    .iter()
    .map(|path| root.join(path))
    .collect();
    let decisions = fs::read_dir(root.join("docs/decisions")).unwrap();
    documents.extend(decisions.map(|entry| entry.unwrap().path()));
    for document in documents {
        let text = fs::read_to_string(&document).unwrap();
        for target in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let file = target.split('#').next().unwrap();
            let outside = target.starts_with("https://") || file.is_empty();
            let there = document.parent().unwrap().join(file).exists();
            assert!(outside || there, "{}: {target} leads nowhere", document.display());
        }
    }
}
