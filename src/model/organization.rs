//! Which organization something belongs to.
//! Guarantee: an [`OrganizationId`] is 1 to 64 characters of `[A-Za-z0-9_-]`; `42` and `"42"` are equal.

use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Longest identifier, in characters.
pub const ID_MAX: usize = 64;

/// An organization's identifier, compared by its text. It remembers whether it was spelled as a JSON integer,
/// and answers spell it the same way.
#[derive(Clone)]
pub struct OrganizationId {
    text: Arc<str>,
    integer: bool,
}

/// The text is not an organization's identifier.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("must be an integer or 1 to 64 characters of A-Z, a-z, 0-9, `_` and `-`")]
pub struct InvalidOrganizationId;

impl OrganizationId {
    /// Reads an identifier spelled as text.
    ///
    /// # Errors
    /// When it is empty, longer than 64 characters, or holds a character outside `[A-Za-z0-9_-]`.
    pub fn parse(text: &str) -> Result<Self, InvalidOrganizationId> {
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-';
        if (1..=ID_MAX).contains(&text.len()) && text.bytes().all(allowed) {
            Ok(Self { text: text.into(), integer: false })
        } else {
            Err(InvalidOrganizationId)
        }
    }

    /// An identifier spelled as an integer.
    pub fn from_integer(number: i64) -> Self {
        Self { text: number.to_string().into(), integer: true }
    }

    /// Reads an identifier out of the database, which does not keep the spelling: what is an integer's text is spelled as
    /// the integer, as events are in which the job tells the spelling.
    ///
    /// # Errors
    /// As for [`OrganizationId::parse`].
    pub fn stored(text: &str) -> Result<Self, InvalidOrganizationId> {
        let integer = text.parse::<i64>().is_ok_and(|number| number.to_string() == text);
        Ok(Self { integer, ..Self::parse(text)? })
    }

    /// The identifier's text, the form in which it is stored and compared.
    pub fn as_str(&self) -> &str {
        &self.text
    }
}

impl PartialEq for OrganizationId {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

impl Eq for OrganizationId {}

impl PartialOrd for OrganizationId {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for OrganizationId {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.text.cmp(&other.text)
    }
}

impl Hash for OrganizationId {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.text.hash(state);
    }
}

impl fmt::Display for OrganizationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl fmt::Debug for OrganizationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for OrganizationId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.text.parse::<i64>() {
            Ok(number) if self.integer => serializer.serialize_i64(number),
            _ => serializer.serialize_str(&self.text),
        }
    }
}

impl<'de> Deserialize<'de> for OrganizationId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl serde::de::Visitor<'_> for Visitor {
            type Value = OrganizationId;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an integer or 1 to 64 characters of A-Z, a-z, 0-9, `_` and `-`")
            }

            fn visit_i64<E: serde::de::Error>(self, number: i64) -> Result<Self::Value, E> {
                Ok(OrganizationId::from_integer(number))
            }

            fn visit_u64<E: serde::de::Error>(self, number: u64) -> Result<Self::Value, E> {
                i64::try_from(number)
                    .map(OrganizationId::from_integer)
                    .map_err(|_| E::invalid_value(serde::de::Unexpected::Unsigned(number), &self))
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Self::Value, E> {
                OrganizationId::parse(text).map_err(E::custom)
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_integer_and_its_text_are_the_same_organization() {
        let number: OrganizationId = serde_json::from_str("42").unwrap();
        let text: OrganizationId = serde_json::from_str("\"42\"").unwrap();
        assert_eq!(number, text);
        assert_eq!(serde_json::to_string(&number).unwrap(), "42");
        assert_eq!(serde_json::to_string(&text).unwrap(), "\"42\"");
    }

    #[test]
    fn a_stored_integer_is_spelled_as_one_and_nothing_else_is() {
        for (text, json) in [
            ("42", "42"),
            ("-7", "-7"),
            ("0", "0"),
            ("042", "\"042\""),
            ("-0", "\"-0\""),
            ("acme", "\"acme\""),
        ] {
            let stored = OrganizationId::stored(text).unwrap();
            assert_eq!((serde_json::to_string(&stored).unwrap().as_str(), stored.as_str()), (json, text));
        }
        assert!(OrganizationId::stored("a b").is_err());
    }

    #[test]
    fn what_is_not_an_identifier_is_refused() {
        for bad in ["\"\"", "\"a b\"", "\"ä\"", "1.5", "true", "[]", "18446744073709551615"] {
            assert!(serde_json::from_str::<OrganizationId>(bad).is_err(), "{bad}");
        }
        assert!(OrganizationId::parse(&"x".repeat(64)).is_ok());
        assert!(OrganizationId::parse(&"x".repeat(65)).is_err());
    }
}
