//! Where a value comes from: the defaults, the file, the environment; later wins.
//! Guarantee: every key that reaches a [`super::reader::Reader`] is a known one, and the parser's message about a broken
//! file never quotes the file, for the line may hold a password.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use toml::{Table, Value};

use super::SettingsError;
use super::keys::{self, KEYS, LANES};

/// What the settings are read from.
#[derive(Default)]
pub struct Sources {
    /// The file's path, for messages, and its text.
    pub file: Option<(PathBuf, String)>,
    /// The environment; names that mean nothing here are passed over.
    pub environment: Vec<(String, String)>,
}

impl Sources {
    /// This process's environment, and the file named by `config` or else by `SENDOFF_CONFIG`.
    ///
    /// # Errors
    /// When the file cannot be read, or a variable of ours is not UTF-8.
    pub fn of_process(config: Option<&Path>) -> Result<Self, SettingsError> {
        let mut environment = Vec::new();
        let mut problems = Vec::new();
        for (name, value) in std::env::vars_os() {
            let Ok(name) = name.into_string() else { continue };
            match value.into_string() {
                Ok(value) => environment.push((name, value)),
                Err(_) if is_ours(&name) => {
                    problems.push(format!("{name}: the value is not UTF-8; write it in UTF-8"));
                }
                Err(_) => {}
            }
        }
        let named = environment.iter().find(|(name, value)| name == "SENDOFF_CONFIG" && !value.is_empty());
        let path = config.map(Path::to_owned).or_else(|| named.map(|(_, value)| PathBuf::from(value)));
        let file = match path.map(|path| (std::fs::read_to_string(&path), path)) {
            None => None,
            Some((Ok(text), path)) => Some((path, text)),
            Some((Err(error), path)) => {
                problems.push(format!(
                    "{}: the settings file cannot be read: {error}; name a readable file with --config or \
                     SENDOFF_CONFIG",
                    path.display()
                ));
                None
            }
        };
        SettingsError::unless_empty(problems)?;
        Ok(Self { file, environment })
    }

    /// A variable's value; an empty one counts as unset.
    pub(super) fn variable(&self, name: &str) -> Option<&str> {
        self.environment.iter().find(|(n, v)| n == name && !v.is_empty()).map(|(_, value)| value.as_str())
    }
}

fn is_ours(name: &str) -> bool {
    name.starts_with(PREFIX) || name == "SENDOFF_CONFIG" || CONVENTIONAL.iter().any(|(n, _)| *n == name)
}

const PREFIX: &str = "SENDOFF__";

/// Names that other programs have made customary, and the key each of them sets.
const CONVENTIONAL: &[(&str, &str)] = &[("DATABASE_URL", "database.url"), ("AMQP_URL", "amqp.url")];

/// One value and where it stood.
pub(super) struct Entry {
    pub(super) value: Value,
    /// For messages: the variable's name or the file's path; none for a default.
    pub(super) origin: Option<String>,
}

/// All values by their keys, the later layers laid over the earlier.
pub(super) struct Layers {
    pub(super) entries: BTreeMap<&'static str, Entry>,
    /// The file's `[[amqp.lanes]]`, when it has any.
    pub(super) lanes: Option<Value>,
}

impl Layers {
    /// Lays the file over the defaults and the environment over the file; what is wrong goes to `problems`.
    pub(super) fn new(sources: &Sources, problems: &mut Vec<String>) -> Self {
        let mut layers = Self { entries: BTreeMap::new(), lanes: None };
        for (name, preset, _) in KEYS {
            if let Some(value) = preset.value() {
                layers.entries.insert(name, Entry { value, origin: None });
            }
        }
        if let Some((path, text)) = &sources.file {
            match parse(path, text) {
                Ok(table) => layers.lay_table(&table, "", &path.display().to_string(), problems),
                Err(problem) => problems.push(problem),
            }
        }
        for (variable, key) in CONVENTIONAL {
            if let Some(value) = sources.variable(variable) {
                layers.lay(key, Value::String(value.to_owned()), variable, problems);
            }
        }
        for (variable, value) in &sources.environment {
            if let Some(rest) = variable.strip_prefix(PREFIX) {
                let key = rest.to_ascii_lowercase().replace("__", ".");
                // An empty variable is the customary way to leave one out, except that a list can be emptied.
                if value.is_empty() && keys::find(&key).is_some_and(|(_, preset, _)| !preset.is_list()) {
                    continue;
                }
                layers.lay(&key, Value::String(value.clone()), variable, problems);
            }
        }
        layers
    }

    fn lay_table(&mut self, table: &Table, prefix: &str, origin: &str, problems: &mut Vec<String>) {
        for (name, value) in table {
            let key = if prefix.is_empty() { name.clone() } else { format!("{prefix}.{name}") };
            match value {
                _ if key == LANES => self.lanes = Some(value.clone()),
                Value::Table(inner) if is_section(&key) => self.lay_table(inner, &key, origin, problems),
                _ => self.lay(&key, value.clone(), origin, problems),
            }
        }
    }

    fn lay(&mut self, key: &str, value: Value, origin: &str, problems: &mut Vec<String>) {
        if key == LANES {
            problems.push(format!(
                "{origin}: lanes are set in the settings file only, as [[amqp.lanes]] tables with name, bindings and \
                 prefetch; unset this variable"
            ));
        } else if let Some((name, ..)) = keys::find(key) {
            self.entries.insert(name, Entry { value, origin: Some(origin.to_owned()) });
        } else {
            let hint = match keys::nearest(key) {
                Some(near) => format!("did you mean {near}?"),
                None => "config/default.toml lists every key".to_owned(),
            };
            problems.push(format!("{key} ({origin}): there is no such setting; {hint}"));
        }
    }
}

fn is_section(key: &str) -> bool {
    KEYS.iter().any(|(name, ..)| name.split_once('.').is_some_and(|(section, _)| section == key))
}

fn parse(path: &Path, text: &str) -> Result<Table, String> {
    text.parse::<Table>().map_err(|error| {
        let line =
            error.span().map_or(1, |span| text[..span.start.min(text.len())].matches('\n').count() + 1);
        format!("{}, line {line}: not TOML: {}", path.display(), error.message())
    })
}
