//! `[[amqp.lanes]]`: the work queues and what each of them takes.
//! Guarantee: no two lanes take the same routing key, so no job is in two queues at once.

use toml::{Table, Value};

use super::keys::LANES;
use super::reader::Reader;
use crate::model::lanes::{Lane, overlap};

const PREFETCH_DEFAULT: u16 = 512;
const MANY_LANES: usize = 64;

/// The lanes of an installation that lists none.
pub(super) fn presets() -> Vec<Lane> {
    [("notifications", "notification.#"), ("reminders", "reminder.#")]
        .map(|(name, binding)| Lane {
            name: name.to_owned(),
            bindings: vec![binding.to_owned()],
            prefetch: PREFETCH_DEFAULT,
        })
        .into()
}

/// Reads the file's lanes, or takes the default ones.
pub(super) fn read(given: Option<&Value>, reader: &mut Reader<'_>) -> Vec<Lane> {
    let Some(given) = given else { return presets() };
    let tables = given.as_array().filter(|lanes| (1..=MANY_LANES).contains(&lanes.len()));
    let Some(tables) = tables else {
        reader.problem(format!("{LANES}: allowed: 1 to {MANY_LANES} tables [[amqp.lanes]]"));
        return Vec::new();
    };
    let mut lanes: Vec<Lane> = Vec::new();
    for (index, table) in tables.iter().enumerate() {
        match read_one(table) {
            Err(problem) => reader.problem(format!("{LANES}, number {}: {problem}", index + 1)),
            Ok(lane) if lanes.iter().any(|other| other.name == lane.name) => {
                reader.problem(format!(
                    "{LANES}: `{}` is there twice; each lane needs a name of its own",
                    lane.name
                ));
            }
            Ok(lane) => lanes.push(lane),
        }
    }
    for (index, lane) in lanes.iter().enumerate() {
        for other in &lanes[index + 1..] {
            if let Some(found) = overlap(lane, other) {
                reader.problem(format!(
                    "{LANES}: bindings of `{}` and `{}` overlap: {found}, and that job would go to both; allowed: \
                     bindings without a common routing key",
                    lane.name, other.name
                ));
            }
        }
    }
    lanes
}

fn read_one(value: &Value) -> Result<Lane, String> {
    let table = value.as_table().ok_or("must be a table with name, bindings and prefetch")?;
    if let Some(key) = table.keys().find(|key| !["name", "bindings", "prefetch"].contains(&key.as_str())) {
        return Err(format!("there is no `{key}`; allowed: name, bindings, prefetch"));
    }
    let name = table.get("name").and_then(Value::as_str).unwrap_or_default();
    Lane::new(name, bindings(table)?, prefetch(table)?).map_err(|error| format!("`{name}`: {error}"))
}

fn bindings(table: &Table) -> Result<Vec<String>, String> {
    let items = table.get("bindings").map_or(Some(&[][..]), |value| value.as_array().map(Vec::as_slice));
    let texts =
        items.map(|items| items.iter().map(|item| item.as_str().map(str::to_owned)).collect::<Option<_>>());
    texts.flatten().ok_or_else(|| "bindings must be a list of texts, say [\"notification.#\"]".to_owned())
}

/// A prefetch is 16 bits wide (AMQP 0-9-1, basic.qos).
fn prefetch(table: &Table) -> Result<u16, String> {
    let Some(value) = table.get("prefetch") else { return Ok(PREFETCH_DEFAULT) };
    let number =
        value.as_integer().and_then(|number| u16::try_from(number).ok()).filter(|number| *number > 0);
    number
        .ok_or_else(|| format!("prefetch `{value}` cannot be used; allowed: a whole number from 1 to 65535"))
}
