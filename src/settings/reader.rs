//! Values out of the layers, each judged as it is read.
//! Guarantee: a problem names the key, where it stood, the value (never a secret) and what is allowed; all problems are
//! kept, so that one start shows them all.

use std::fmt::Display;
use std::ops::RangeInclusive;
use std::time::Duration;

use secrecy::SecretString;
use toml::Value;

use super::keys::{self, Preset, Shown};
use super::layers::{Entry, Layers};
use crate::model::text;

/// Longest piece of a bad value that a message repeats, in bytes.
const SHOWN_MAX: usize = 80;

/// Reads typed values and gathers what is wrong with them. After a problem the value handed out is a stand-in, never
/// used, for the start ends.
pub(super) struct Reader<'a> {
    layers: &'a Layers,
    pub(super) problems: Vec<String>,
    #[cfg(test)]
    pub(super) asked: std::collections::BTreeSet<&'static str>,
}

impl<'a> Reader<'a> {
    pub(super) fn new(layers: &'a Layers, problems: Vec<String>) -> Self {
        Self {
            layers,
            problems,
            #[cfg(test)]
            asked: Default::default(),
        }
    }

    fn entry(&mut self, key: &'static str) -> Option<&'a Entry> {
        debug_assert!(keys::find(key).is_some(), "{key} is not in the table of keys");
        #[cfg(test)]
        self.asked.insert(key);
        self.layers.entries.get(key)
    }

    /// Whether somebody has set the key.
    pub(super) fn is_set(&self, key: &str) -> bool {
        self.layers.entries.get(key).is_some_and(|entry| entry.origin.is_some())
    }

    /// A problem of no single value.
    pub(super) fn problem(&mut self, problem: String) {
        self.problems.push(problem);
    }

    /// Refuses a key's value; `value` is repeated unless the key holds secrets.
    pub(super) fn refuse(&mut self, key: &'static str, value: impl Display, allowed: &str) {
        let origin = self.layers.entries.get(key).and_then(|entry| entry.origin.as_deref());
        let place = origin.map(|origin| format!(" ({origin})")).unwrap_or_default();
        let shown = match keys::find(key) {
            Some((_, _, Shown::Yes)) => {
                format!("`{}`", text::bounded(&text::single_line(&value.to_string()), SHOWN_MAX))
            }
            _ => "the value (not shown, it may hold a secret)".to_owned(),
        };
        self.problems.push(format!("{key}{place}: {shown} cannot be used; allowed: {allowed}"));
    }

    /// A whole number within the range.
    pub(super) fn int(&mut self, key: &'static str, range: RangeInclusive<u32>) -> u32 {
        let number = match self.entry(key).map(|entry| &entry.value) {
            Some(Value::Integer(number)) => u32::try_from(*number).ok(),
            Some(Value::String(text)) => text.trim().parse().ok(),
            _ => None,
        };
        match number.filter(|number| range.contains(number)) {
            Some(number) => number,
            None => {
                let shown = self.shown(key);
                self.refuse(key, shown, &format!("a whole number from {} to {}", range.start(), range.end()));
                *range.start()
            }
        }
    }

    /// A whole number of seconds within the range.
    pub(super) fn seconds(&mut self, key: &'static str, range: RangeInclusive<u32>) -> Duration {
        Duration::from_secs(u64::from(self.int(key, range)))
    }

    /// A switch; `unset` where nothing says otherwise.
    pub(super) fn flag(&mut self, key: &'static str, unset: bool) -> bool {
        let flag = match self.entry(key).map(|entry| &entry.value) {
            None => Some(unset),
            Some(Value::Boolean(flag)) => Some(*flag),
            Some(Value::String(text)) => text.trim().parse().ok(),
            Some(_) => None,
        };
        flag.unwrap_or_else(|| {
            let shown = self.shown(key);
            self.refuse(key, shown, "true or false");
            unset
        })
    }

    /// A text; an empty one counts as unset.
    pub(super) fn text(&mut self, key: &'static str) -> Option<String> {
        match self.entry(key).map(|entry| &entry.value) {
            None => None,
            Some(Value::String(text)) => Some(text.clone()).filter(|text| !text.is_empty()),
            Some(_) => {
                let shown = self.shown(key);
                self.refuse(key, shown, "a text in quotes");
                None
            }
        }
    }

    /// A text that nothing shows.
    pub(super) fn secret(&mut self, key: &'static str) -> Option<SecretString> {
        self.text(key).map(SecretString::from)
    }

    /// A text that `parse` understands; none only where nothing is set and nothing preset.
    pub(super) fn parsed<T>(
        &mut self,
        key: &'static str,
        allowed: &str,
        parse: impl FnOnce(&str) -> Option<T>,
    ) -> Option<T> {
        let has_preset = !matches!(keys::find(key), None | Some((_, Preset::None, _)));
        let text = match self.text(key) {
            Some(text) => text,
            None if has_preset => String::new(),
            None => return None,
        };
        let value = parse(&text);
        if value.is_none() {
            self.refuse(key, &text, allowed);
        }
        value
    }

    /// A list's items as texts: an array in the file, or one text with commas.
    pub(super) fn items(&mut self, key: &'static str) -> Vec<String> {
        let items = match self.entry(key).map(|entry| &entry.value) {
            None => Some(Vec::new()),
            Some(Value::String(text)) => {
                Some(text.split(',').map(|item| item.trim().to_owned()).filter(|i| !i.is_empty()).collect())
            }
            Some(Value::Array(items)) => items.iter().map(item_text).collect(),
            Some(_) => None,
        };
        items.unwrap_or_else(|| {
            let shown = self.shown(key);
            self.refuse(key, shown, "a list");
            Vec::new()
        })
    }

    /// A list whose every item `parse` understands.
    pub(super) fn list<T>(
        &mut self,
        key: &'static str,
        allowed: &str,
        parse: impl Fn(&str) -> Option<T>,
    ) -> Vec<T> {
        let mut values = Vec::new();
        for item in self.items(key) {
            match parse(&item) {
                Some(value) => values.push(value),
                None => self.refuse(key, item, allowed),
            }
        }
        values
    }

    fn shown(&self, key: &str) -> String {
        match self.layers.entries.get(key).map(|entry| &entry.value) {
            None => "nothing".to_owned(),
            Some(Value::String(text)) => text.clone(),
            Some(value) => value.to_string(),
        }
    }
}

fn item_text(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Integer(number) => Some(number.to_string()),
        _ => None,
    }
}
