//! `sendoff keys status`: what is sealed under which key.
//! Guarantee: a key is called removable only when no row needs it and it seals nothing new; nothing is opened or changed.

use anyhow::Context;
use clap::Args;
use serde::Serialize;
use serde_json::json;

use crate::cli::exit::Done;
use crate::cli::output;
use crate::parts;
use crate::secrets::KeyRing;
use crate::settings::Settings;
use crate::store::{KeyUsage, SealedRows};

#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  sendoff keys status\n\nExit code 1 when rows need a key that encryption.keys lacks. A removable key \
    can be taken out once every running worker has another one first; what an older worker seals meanwhile is shown by the \
    next status."
)]
pub(in crate::cli) struct StatusArgs {
    /// Print {"keys":[{"id","role","configurations","letters","values","removable","why"}],"damaged"} instead
    #[arg(long)]
    json: bool,
}

/// What a key is to this ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Role {
    /// First: what is new is sealed under it.
    Seals,
    /// It opens what is older.
    Opens,
    /// Rows need it, and the ring lacks it.
    Missing,
}

#[derive(Debug, PartialEq, Eq, Serialize)]
struct KeyLine {
    id: String,
    role: Role,
    configurations: u64,
    letters: u64,
    values: u64,
    removable: bool,
    /// Why it is not removable.
    why: Option<String>,
}

pub(in crate::cli) async fn run(args: &StatusArgs, settings: &Settings) -> anyhow::Result<Done> {
    let ring = parts::key_ring(settings)?;
    let store = parts::store(settings, parts::COMMAND_CONNECTIONS)?;
    let usage = store.key_usage(&ring).await.context("counting what is sealed")?;
    let lines = lines(&ring, &usage);
    if args.json {
        output::json(&json!({ "keys": lines, "damaged": rows_json(usage.damaged) }))?;
    } else {
        for line in words(&lines, usage.damaged) {
            output::line(&line)?;
        }
    }
    let is_missing = lines.iter().any(|line| line.role == Role::Missing);
    Ok(if is_missing { Done::Badly } else { Done::Well })
}

/// The ring's keys in its order, then those that are missing.
fn lines(ring: &KeyRing, usage: &KeyUsage) -> Vec<KeyLine> {
    let of_ring = ring.ids().map(|id| {
        let role = if id == ring.sealing_id() { Role::Seals } else { Role::Opens };
        (id, role)
    });
    let missing = usage.keys.keys().map(String::as_str).filter(|id| !ring.ids().any(|known| known == *id));
    of_ring
        .chain(missing.map(|id| (id, Role::Missing)))
        .map(|(id, role)| {
            let rows = usage.keys.get(id).copied().unwrap_or_default();
            let why = match role {
                Role::Seals => Some("it is the first: what is new is sealed under it".to_owned()),
                Role::Opens if rows.is_empty() => None,
                Role::Opens => Some(format!("{} under it; `sendoff keys rotate`", plural(rows))),
                Role::Missing => Some(format!("{} under it; add it behind the first", plural(rows))),
            };
            let SealedRows { configurations, letters, values } = rows;
            let id = id.to_owned();
            KeyLine { id, role, configurations, letters, values, removable: why.is_none(), why }
        })
        .collect()
}

/// `2 configurations and 1 letter`.
fn plural(rows: SealedRows) -> String {
    let one = |number: u64, name: &str| match number {
        0 => None,
        1 => Some(format!("1 {name}")),
        more => Some(format!("{more} {name}s")),
    };
    let parts = [one(rows.configurations, "configuration"), one(rows.letters, "letter")];
    parts.into_iter().flatten().collect::<Vec<_>>().join(" and ")
}

/// The counts as JSON.
pub(super) fn rows_json(rows: SealedRows) -> serde_json::Value {
    json!({ "configurations": rows.configurations, "letters": rows.letters, "values": rows.values })
}

fn words(keys: &[KeyLine], damaged: SealedRows) -> Vec<String> {
    let width = keys.iter().map(|key| key.id.len()).max().unwrap_or_default().max(3);
    let mut lines = vec![format!(
        "{:<width$}  {:<7}  {:>14}  {:>9}  REMOVABLE",
        "KEY", "ROLE", "CONFIGURATIONS", "LETTERS"
    )];
    for key in keys {
        let role = match key.role {
            Role::Seals => "seals",
            Role::Opens => "opens",
            Role::Missing => "MISSING",
        };
        let removable = key.why.as_ref().map_or_else(|| "yes".to_owned(), |why| format!("no: {why}"));
        let (configurations, letters) = (key.configurations, key.letters);
        lines.push(format!("{:<width$}  {role:<7}  {configurations:>14}  {letters:>9}  {removable}", key.id));
    }
    if !damaged.is_empty() {
        lines.push(format!(
            "Damaged: {} with {} values of no known format, which no key opens",
            plural(damaged),
            damaged.values
        ));
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_key_that_nothing_needs_and_that_is_not_the_first_is_removable() {
        let items = ["new", "old", "idle"].map(|id| KeyRing::generate(id).unwrap());
        let ring = KeyRing::parse(&items).unwrap();
        let rows = |configurations, letters| SealedRows {
            configurations,
            letters,
            values: configurations + letters,
        };
        let mut usage = KeyUsage::default();
        usage.keys.insert("old".into(), rows(0, 1));
        usage.keys.insert("gone".into(), rows(2, 3));
        let lines = lines(&ring, &usage);
        let seen: Vec<_> = lines.iter().map(|line| (line.id.as_str(), line.role, line.removable)).collect();
        assert_eq!(
            seen,
            [
                ("new", Role::Seals, false),
                ("old", Role::Opens, false),
                ("idle", Role::Opens, true),
                ("gone", Role::Missing, false),
            ]
        );
        let shown = words(&lines, SealedRows::default()).join("\n");
        assert!(shown.contains("no: 1 letter under it; `sendoff keys rotate`"), "{shown}");
        assert!(shown.contains("no: 2 configurations and 3 letters under it; add it"), "{shown}");
    }
}
