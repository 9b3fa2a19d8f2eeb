//! Work lanes: which routing keys each takes, and whether two lanes would take the same key.
//! Guarantee: where [`overlap`] finds nothing between any two lanes, every job lands in one lane at most.

use std::fmt;

/// RabbitMQ's names are short strings; what is left beside the prefix and a delay's digits is plenty.
const NAME_MAX: usize = 64;
/// AMQP 0-9-1 short string: octets of a binding.
const BINDING_MAX: usize = 255;

/// A work queue of its own, so that a flood in one never delays another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lane {
    /// Part of the queue's name, 1 to 64 of `[a-z0-9_-]`.
    pub name: String,
    /// Topic patterns over the job's routing key: `*` stands for one word, `#` for any number of words.
    pub bindings: Vec<String>,
    /// Jobs that one worker holds at once.
    pub prefetch: u16,
}

/// Why a lane cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidLane {
    /// Part of queue names, so it may not hold a dot.
    #[error("name must be 1 to 64 characters of a-z, 0-9, `_` and `-`")]
    Name,
    /// A lane that takes nothing.
    #[error("bindings must name at least one routing key or pattern")]
    NoBinding,
    /// RabbitMQ would take `#` or `*` inside a word for plain characters.
    #[error(
        "binding `{0}` must be words joined by dots, at most 255 bytes; `*` and `#` stand alone between dots"
    )]
    Binding(String),
    /// Zero means unlimited to the broker.
    #[error("prefetch must be 1 to 65535")]
    Prefetch,
}

impl Lane {
    /// Takes a lane whose name, bindings and prefetch are usable.
    ///
    /// # Errors
    /// [`InvalidLane`] names the field and what is allowed.
    pub fn new(name: &str, bindings: Vec<String>, prefetch: u16) -> Result<Self, InvalidLane> {
        let in_name = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"_-".contains(&byte);
        if !(1..=NAME_MAX).contains(&name.len()) || !name.bytes().all(in_name) {
            return Err(InvalidLane::Name);
        }
        if bindings.is_empty() {
            return Err(InvalidLane::NoBinding);
        }
        if let Some(bad) = bindings.iter().find(|binding| !is_pattern(binding)) {
            return Err(InvalidLane::Binding(super::text::bounded(&super::text::single_line(bad), 80)));
        }
        if prefetch == 0 {
            return Err(InvalidLane::Prefetch);
        }
        Ok(Self { name: name.to_owned(), bindings, prefetch })
    }
}

/// Two bindings that a single routing key can match.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Overlap<'a> {
    /// The first lane's binding.
    pub left: &'a str,
    /// The second lane's binding.
    pub right: &'a str,
}

impl fmt::Display for Overlap<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}` and `{}` can match the same routing key", self.left, self.right)
    }
}

/// The first pair of bindings of two lanes that can match the same routing key: such a job would be delivered twice.
pub fn overlap<'a>(a: &'a Lane, b: &'a Lane) -> Option<Overlap<'a>> {
    let pairs = a.bindings.iter().flat_map(|left| b.bindings.iter().map(move |right| (left, right)));
    pairs
        .into_iter()
        .find(|(left, right)| patterns_meet(left, right))
        .map(|(left, right)| Overlap { left, right })
}

/// Whether some routing key matches both topic patterns.
pub fn patterns_meet(left: &str, right: &str) -> bool {
    let (left, right) = (words(left), words(right));
    // reach[j]: the words of `left` seen so far and the first j words of `right` can stand for the same words.
    let mut reach = vec![false; right.len() + 1];
    reach[0] = true;
    extend_over_hashes(&mut reach, &right);
    for word in left {
        let mut next = vec![false; right.len() + 1];
        let mut any_before = false;
        for j in 0..=right.len() {
            any_before |= reach[j];
            next[j] = if word == "#" {
                any_before
            } else {
                let stays_in_hash = j > 0 && right[j - 1] == "#" && reach[j];
                let both_step = j > 0 && reach[j - 1] && single_words_meet(word, right[j - 1]);
                stays_in_hash || both_step
            };
        }
        extend_over_hashes(&mut next, &right);
        reach = next;
    }
    reach[right.len()]
}

/// `#` may stand for no word at all.
fn extend_over_hashes(reach: &mut [bool], words: &[&str]) {
    for (j, word) in words.iter().enumerate() {
        reach[j + 1] |= reach[j] && *word == "#";
    }
}

fn single_words_meet(left: &str, right: &str) -> bool {
    left == right || left == "*" || right == "*" || right == "#"
}

/// RabbitMQ takes the empty key for no word at all.
fn words(pattern: &str) -> Vec<&str> {
    if pattern.is_empty() { Vec::new() } else { pattern.split('.').collect() }
}

fn is_pattern(binding: &str) -> bool {
    let is_word =
        |word: &str| matches!(word, "*" | "#") || !word.is_empty() && !word.contains(['*', '#', ' ']);
    (1..=BINDING_MAX).contains(&binding.len())
        && !binding.contains(char::is_control)
        && binding.split('.').all(is_word)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn lane(bindings: &[&str]) -> Lane {
        Lane::new("lane", bindings.iter().map(|&b| b.to_owned()).collect(), 1).unwrap()
    }

    #[test]
    fn bindings_that_share_a_routing_key_are_found() {
        for (left, right, meet) in [
            ("notification.#", "reminder.#", false),
            ("notification.#", "notification.*", true),
            ("#", "reminder.x", true),
            ("*", "a.b", false),
            ("*.b", "a.*", true),
            ("a.*", "a", false),
            ("a.#", "a", true),
            ("#.z", "a.#", true),
            ("#.z", "a.b", false),
            ("a.#.b", "a.b", true),
            ("a.#.b", "#.c", false),
            ("a.*.c", "*.b.*", true),
            ("#.b.#", "a.*.c", true),
            ("a.b", "a.b", true),
            ("a.b", "a.c", false),
            ("#.#", "a", true),
        ] {
            assert_eq!(patterns_meet(left, right), meet, "{left} {right}");
            assert_eq!(patterns_meet(right, left), meet, "{right} {left}");
        }
    }

    #[test]
    fn an_overlap_names_both_bindings() {
        let (a, b) = (lane(&["x.y", "notification.#"]), lane(&["reminder.#", "notification.urgent"]));
        let found = overlap(&a, &b).unwrap();
        assert_eq!((found.left, found.right), ("notification.#", "notification.urgent"));
        assert_eq!(overlap(&a, &lane(&["reminder.#"])), None);
    }

    #[test]
    fn what_the_broker_would_misread_is_refused() {
        let new = |name: &str, binding: &str, prefetch| Lane::new(name, vec![binding.to_owned()], prefetch);
        assert_eq!(new("a.5", "x", 1), Err(InvalidLane::Name));
        assert_eq!(new("", "x", 1), Err(InvalidLane::Name));
        assert_eq!(new("a", "x", 0), Err(InvalidLane::Prefetch));
        for bad in ["", "a..b", "noti*", "a.b#", ".a", "a b", "a\n"] {
            assert!(matches!(new("a", bad, 1), Err(InvalidLane::Binding(_))), "{bad:?}");
        }
        assert_eq!(Lane::new("a", Vec::new(), 1), Err(InvalidLane::NoBinding));
        assert!(new("notifications", "notification.#", 512).is_ok());
    }

    /// The broker's own rule, word by word.
    fn matches(pattern: &[&str], key: &[&str]) -> bool {
        match (pattern.split_first(), key.split_first()) {
            (None, None) => true,
            (Some((&"#", rest)), None) => matches(rest, key),
            (Some((&"#", rest)), Some((_, key_rest))) => matches(rest, key) || matches(pattern, key_rest),
            (Some((word, rest)), Some((first, key_rest))) => {
                (*word == "*" || word == first) && matches(rest, key_rest)
            }
            _ => false,
        }
    }

    fn every_key(length: usize) -> Vec<Vec<&'static str>> {
        let mut keys = vec![vec![]];
        let mut last = keys.clone();
        for _ in 0..length {
            last = last
                .iter()
                .flat_map(|key: &Vec<&str>| ["a", "b", "c"].map(|word| [key.as_slice(), &[word]].concat()))
                .collect();
            keys.extend(last.iter().cloned());
        }
        keys
    }

    proptest! {
        #[test]
        fn patterns_meet_exactly_when_some_key_matches_both(
            left in prop::collection::vec(prop::sample::select(vec!["a", "b", "*", "#"]), 1..4),
            right in prop::collection::vec(prop::sample::select(vec!["a", "b", "*", "#"]), 1..4),
        ) {
            let shared = every_key(6).iter().any(|key| matches(&left, key) && matches(&right, key));
            prop_assert_eq!(patterns_meet(&left.join("."), &right.join(".")), shared);
        }
    }
}
