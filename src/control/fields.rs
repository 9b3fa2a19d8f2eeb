//! The fields of a JSON object, one by one.
//! Guarantee: no field is given twice, none is unknown, none is dropped; a value is held as a secret until it is read,
//! and no error repeats one.

use std::fmt;

use secrecy::{ExposeSecret, SecretString};
use serde::de::{DeserializeOwned, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;

use super::error::ControlError;
use crate::model::text;

/// Longest name of a field that is repeated in an error, in bytes.
const NAME_SHOWN_MAX: usize = 64;
/// How alike two names must be (Jaro-Winkler, 0 to 1) for one to be suggested for the other.
const ALIKE: f64 = 0.8;

/// The fields of one object in the order given: names, and values as JSON text.
#[derive(Debug, Default)]
pub(super) struct Fields(Vec<(String, SecretString)>);

impl Fields {
    /// Reads an object; `None` when the text is not one.
    pub(super) fn read(json: &[u8]) -> Option<Self> {
        serde_json::from_slice(json).ok()
    }

    /// Refuses a repeated field, and one that is not in `known`.
    pub(super) fn check_known(&self, known: &[&'static str]) -> Result<(), ControlError> {
        for (position, (name, _)) in self.0.iter().enumerate() {
            let shown = text::bounded(&text::single_line(name), NAME_SHOWN_MAX);
            if self.0[..position].iter().any(|(earlier, _)| earlier == name) {
                return Err(ControlError::invalid_request(&shown, format!("{shown} is given twice")));
            }
            if !known.contains(&name.as_str()) {
                let error = ControlError::invalid_request(&shown, format!("Unknown field `{shown}`"));
                return Err(error.hint(suggestion(name, known)));
            }
        }
        Ok(())
    }

    /// Which of these are given.
    pub(super) fn given(&self, known: &[&'static str]) -> Vec<&'static str> {
        known.iter().copied().filter(|name| self.raw(name).is_some()).collect()
    }

    /// A string.
    pub(super) fn text(&self, name: &str) -> Result<Option<String>, ControlError> {
        self.value(name, "must be a string")
    }

    /// A string that is held as a secret.
    pub(super) fn secret(&self, name: &str) -> Result<Option<SecretString>, ControlError> {
        Ok(self.text(name)?.map(SecretString::from))
    }

    /// A value of any type; `rule` is what the error says of it: "must be …". `null` is no value of any.
    pub(super) fn value<T: DeserializeOwned>(
        &self,
        name: &str,
        rule: &str,
    ) -> Result<Option<T>, ControlError> {
        let Some(raw) = self.raw(name) else { return Ok(None) };
        match serde_json::from_str(raw) {
            Ok(value) => Ok(Some(value)),
            Err(_) => Err(ControlError::invalid_field(name, rule)),
        }
    }

    /// Takes `null` for "not given": for what is optional everywhere.
    pub(super) fn without_nulls(mut self, names: &[&str]) -> Self {
        self.0.retain(|(name, value)| !(names.contains(&name.as_str()) && value.expose_secret() == "null"));
        self
    }

    fn raw(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(given, _)| given == name).map(|(_, value)| value.expose_secret())
    }

    /// An object within; an empty one when it is not given.
    pub(super) fn object(&self, name: &str) -> Result<Self, ControlError> {
        match self.raw(name) {
            None => Ok(Self::default()),
            Some(raw) => Self::read(raw.as_bytes())
                .ok_or_else(|| ControlError::invalid_request(name, format!("{name} must be an object"))),
        }
    }
}

impl<'de> Deserialize<'de> for Fields {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Pairs;
        impl<'de> Visitor<'de> for Pairs {
            type Value = Fields;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Fields, A::Error> {
                let mut fields = Vec::new();
                while let Some((name, value)) = map.next_entry::<String, Box<RawValue>>()? {
                    fields.push((name, SecretString::from(Box::<str>::from(value))));
                }
                Ok(Fields(fields))
            }
        }
        deserializer.deserialize_map(Pairs)
    }
}

/// What a command cannot do without.
pub(super) fn required<T>(name: &str, value: Option<T>) -> Result<T, ControlError> {
    value.ok_or_else(|| ControlError::invalid_request(name, format!("{name} is missing")))
}

/// The known name nearest to an unknown one, and all of them.
pub(super) fn suggestion(unknown: &str, known: &[&str]) -> String {
    let all = if known.is_empty() {
        "There is none here.".to_owned()
    } else {
        format!("Known: {}.", known.join(", "))
    };
    let unknown: String = unknown.chars().take(NAME_SHOWN_MAX).collect();
    let likeness = |name: &str| strsim::jaro_winkler(&unknown, name);
    let nearest = known.iter().max_by(|a, b| likeness(a).total_cmp(&likeness(b)));
    match nearest.filter(|name| likeness(name) >= ALIKE) {
        Some(name) => format!("Did you mean `{name}`? {all}"),
        None => all,
    }
}

#[cfg(test)]
mod tests {
    use super::super::error::Code;
    use super::*;

    fn fields(json: &str) -> Fields {
        Fields::read(json.as_bytes()).unwrap()
    }

    #[test]
    fn what_is_no_object_has_no_fields() {
        for text in ["", "[]", "\"x\"", "{", "{\"a\":1} x", "{a:1}", "null"] {
            assert!(Fields::read(text.as_bytes()).is_none(), "{text}");
        }
        assert!(Fields::read(b"{\"a\":\"\xff\"}").is_none());
    }

    #[test]
    fn a_repeated_field_and_an_unknown_one_are_named() {
        let error = fields(r#"{"host":1,"host":2}"#).check_known(&["host"]).unwrap_err();
        assert_eq!((error.code, error.field.as_deref()), (Code::InvalidRequest, Some("host")));
        let error = fields(r#"{"pasword":1}"#).check_known(&["host", "password"]).unwrap_err();
        assert_eq!((error.code, error.field.as_deref()), (Code::InvalidRequest, Some("pasword")));
        assert!(error.hint.unwrap().starts_with("Did you mean `password`?"));
    }

    #[test]
    fn a_value_of_another_type_is_refused_without_being_repeated() {
        let fields = fields(r#"{"password":81549300,"port":"81549300","secure":null}"#);
        let errors = [
            fields.secret("password").unwrap_err(),
            fields.value::<u16>("port", "must be an integer").unwrap_err(),
            fields.value::<bool>("secure", "must be true or false").unwrap_err(),
        ];
        for error in errors {
            assert_eq!(error.code, Code::InvalidField);
            assert!(!format!("{error:?}").contains("81549300"));
        }
        assert!(!format!("{fields:?}").contains("81549300"));
    }

    #[test]
    fn a_secret_is_changed_by_nothing() {
        let fields = fields(r#"{"password":" \"\\ä\u00e4\ud83d\udd11\t "}"#);
        assert_eq!(fields.secret("password").unwrap().unwrap().expose_secret(), " \"\\ää\u{1f511}\t ");
    }
}
