//! What values of the model look like in JSON Schema, for the documents of jobs, commands and events.
//! Guarantee: bounds and names are those of the code that reads or writes the values; every keyword used means the same in
//! drafts 7 and 2020-12, because AsyncAPI's own schemas are a superset of the former.

use serde_json::{Value, json};

use super::failure::Reason;
use super::organization;

/// What a document on its own names as its dialect.
pub const DIALECT: &str = "https://json-schema.org/draft/2020-12/schema";

/// A string whose control characters are an error.
pub const NO_CONTROLS: &str = r"^[^\x00-\x1f\x7f]*$";

/// An organization's identifier in either spelling.
pub fn organization_id() -> Value {
    json!({
        "description": "An organization. 42 and \"42\" are the same one.",
        "anyOf": [
            {"type": "integer", "minimum": i64::MIN, "maximum": i64::MAX},
            {"type": "string", "pattern": format!("^[A-Za-z0-9_-]{{1,{}}}$", organization::ID_MAX)},
        ],
    })
}

/// A UUID as it is read: hyphenated, and also in the rarer spellings.
pub fn uuid() -> Value {
    let hyphenated = "[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}";
    json!({
        "type": "string",
        "pattern": format!(r"^((urn:uuid:)?{hyphenated}|\{{{hyphenated}\}}|[0-9A-Fa-f]{{32}})$"),
        "examples": ["0198c0de-0000-7000-8000-000000000001"],
    })
}

/// A time.
pub fn time() -> Value {
    json!({"type": "string", "format": "date-time", "examples": ["2030-01-07T09:00:00Z"]})
}

/// Why a job was not sent, or not yet.
pub fn reason() -> Value {
    let names: Vec<_> = Reason::ALL.iter().map(|reason| reason.as_str()).collect();
    json!({"description": "Why a job was not sent, or not yet.", "type": "string", "enum": names})
}

/// The same value, or `null`, which stands for an absent one.
pub fn or_null(schema: &Value) -> Value {
    json!({"anyOf": [schema, {"type": "null"}]})
}

/// A reference to one of the document's own definitions.
pub fn definition(name: &str) -> Value {
    json!({"$ref": format!("#/$defs/{name}")})
}

/// A pattern for an ASCII text in any mixture of upper and lower case.
pub fn any_case(text: &str) -> String {
    text.chars()
        .map(|c| match (c.to_ascii_uppercase(), c.to_ascii_lowercase()) {
            (upper, lower) if upper != lower => format!("[{upper}{lower}]"),
            _ if c == '-' => "-".to_owned(),
            _ => format!("[{c}]"),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn letters_are_matched_in_either_case() {
        assert_eq!(any_case("X-a:"), "[Xx]-[Aa][:]");
    }

    #[test]
    fn every_reason_is_named() {
        let names = reason();
        assert!(names["enum"].as_array().unwrap().contains(&json!("auth_failed")));
        assert_eq!(names["enum"].as_array().unwrap().len(), Reason::ALL.len());
    }
}
