//! The rules of the house, read from the source: who may import whom, which folder knows which library, and the form of a file.
//! Guarantee: each violation is named with file, line and rule, and every rule is shown to catch one.

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

/// What each top-level module may import of the crate, beside itself. A module that is not listed here is a violation.
const MAY_IMPORT: &[(&str, &[&str], &str)] = &[
    ("model", &[], "model imports nothing of the crate"),
    ("clock", &[], "clock is a leaf"),
    ("shutdown", &[], "shutdown is a leaf"),
    ("fault", &[], "fault is a leaf"),
    ("settings", &["model"], "settings is a leaf: it knows the model only"),
    ("telemetry", &["model"], "telemetry is a leaf: it knows the model only"),
    ("broker", &["model", "clock", "shutdown", "settings"], ADAPTER),
    ("secrets", &["model", "clock", "shutdown", "settings"], ADAPTER),
    ("egress", &["model", "clock", "shutdown", "settings"], ADAPTER),
    ("store", &["model", "clock", "shutdown", "settings", "secrets"], ADAPTER),
    ("smtp", &["model", "clock", "shutdown", "settings", "egress"], ADAPTER),
    ("delivery", DELIVERY, MEETS),
    ("control", MEETING_PLACE, MEETS),
    ("dead_letters", MEETING_PLACE, MEETS),
    ("rotation", &["shutdown", "store"], "rotation knows the store and the stop"),
    ("parts", MEETING_PLACE, "parts builds the adapters from the settings"),
    ("http", FRONT, "http stands in front of delivery, control and dead_letters"),
    ("cli", FRONT, "cli stands in front of delivery, control and dead_letters"),
    ("app", EVERYTHING_ELSE, "app composes the worker"),
    ("lib", &[], "lib.rs lists the modules"),
    ("main", &["app", "cli"], "main hands over"),
];

const ADAPTER: &str =
    "adapters import the model and the leaves, and each other only as smtp -> egress and store -> secrets";
const MEETS: &str =
    "delivery, control and dead_letters import the model, the leaves and the adapters, not each other";
const MEETING_PLACE: &[&str] =
    &["model", "clock", "shutdown", "settings", "telemetry", "broker", "store", "secrets", "egress", "smtp"];
/// The one place where faults are injected.
const DELIVERY: &[&str] = &[
    "model",
    "clock",
    "shutdown",
    "settings",
    "telemetry",
    "broker",
    "store",
    "secrets",
    "egress",
    "smtp",
    "fault",
];
const FRONT: &[&str] = &[
    "model",
    "clock",
    "shutdown",
    "settings",
    "telemetry",
    "broker",
    "store",
    "secrets",
    "egress",
    "smtp",
    "delivery",
    "control",
    "dead_letters",
    "parts",
    "rotation",
];
const EVERYTHING_ELSE: &[&str] = &[
    "model",
    "clock",
    "shutdown",
    "settings",
    "telemetry",
    "broker",
    "store",
    "secrets",
    "egress",
    "smtp",
    "delivery",
    "control",
    "dead_letters",
    "parts",
    "http",
    "cli",
    "fault",
];

/// Each library that is known in one folder only.
const DRIVERS: &[(&str, &str)] = &[
    ("lapin", "broker"),
    ("sqlx", "store"),
    ("lettre", "smtp"),
    ("hickory_resolver", "egress"),
    ("aes_gcm", "secrets"),
];

/// Longest file, in lines that are not tests.
const LINES_MAX: usize = 500;

#[test]
fn the_source_keeps_the_rules_of_the_house() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut paths = Vec::new();
    collect(&root.join("src"), &mut paths);
    let sources: Vec<Source> = paths.iter().map(|path| Source::read(root, path)).collect();
    assert!(sources.len() > 50, "only {} files were found", sources.len());
    let tests: BTreeSet<PathBuf> = sources.iter().flat_map(Source::test_files).collect();
    let violations: Vec<String> = sources
        .iter()
        .flat_map(|source| source.violations(tests.contains(&source.path)))
        .map(|violation| violation.to_string())
        .collect();
    assert!(violations.is_empty(), "{} violations:\n{}", violations.len(), violations.join("\n"));
}

#[test]
fn each_rule_catches_what_it_forbids_and_nothing_else() {
    // Path, code behind a first line of documentation, and what is found: `line: beginning of the rule`.
    let cases: &[(&str, &str, &[&str])] = &[
        ("src/model/job.rs", "use crate::store::Store;", &["2: model imports nothing"]),
        ("src/model/job.rs", "use crate::model::text;", &[]),
        ("src/model/job.rs", "// crate::store\nconst A: &str = \"crate::store::Store\";", &[]),
        ("src/broker/jobs.rs", "\nfn f() -> crate::store::Store { todo() }", &["3: adapters import"]),
        (
            "src/broker/jobs.rs",
            "use crate::{model::job, smtp::{Pool, Other}, clock};",
            &["2: adapters import"],
        ),
        ("src/store/mod.rs", "use super::broker::Broker;", &["2: adapters import"]),
        ("src/store/ledger/claim.rs", "use super::super::Store;\nuse super::grants::Grants;", &[]),
        ("src/store/ledger/claim.rs", "use super::super::super::smtp::Pool;", &["2: adapters import"]),
        ("src/smtp/pool.rs", "use crate::egress::dial;\nuse crate::model::job::Job;", &[]),
        ("src/smtp/pool.rs", "use crate::secrets::KeyRing;", &["2: adapters import"]),
        ("src/control/mod.rs", "use crate::delivery::worker;", &["2: delivery, control"]),
        ("src/cli/mod.rs", "use crate::app;", &["2: cli stands"]),
        ("src/app.rs", "use crate::{http, cli, delivery::worker};", &[]),
        (
            "src/main.rs",
            "fn main() { sendoff::app::worker(); sendoff::store::x(); }",
            &["2: main hands over"],
        ),
        ("src/novelty.rs", "fn f() {}", &["1: no rule says"]),
        ("src/delivery/mod.rs", "fn f(x: sqlx::PgPool) {}", &["2: sqlx is known in src/store only"]),
        ("src/app.rs", "use lapin as rabbit;", &["2: lapin is known in src/broker only"]),
        ("src/store/mod.rs", "use sqlx::PgPool;", &[]),
        ("src/smtp/mod.rs", "fn f() { let x = y.unwrap(); }", &["2: no `unwrap()`"]),
        ("src/smtp/mod.rs", "fn f<'a>(x: &'a str, c: char) { y(x, c == '\"').unwrap_or(1); }", &[]),
        (
            "src/broker/mod.rs",
            "#[cfg(test)]\nmod tests {\n    use crate::store::Store;\n    fn f() { x.unwrap(); }\n}\nuse crate::smtp::Pool;",
            &["7: adapters import"],
        ),
    ];
    for (path, code, expected) in cases {
        let source = Source::new((*path).into(), format!("//! Something.\n{code}\n"));
        let found: Vec<String> =
            source.violations(false).iter().map(|found| format!("{}: {}", found.line, found.rule)).collect();
        let as_expected = found.len() == expected.len()
            && found.iter().zip(*expected).all(|(found, expected)| found.starts_with(expected));
        assert!(as_expected, "{path}\n{code}\nfound {found:?}\nexpected {expected:?}");
    }
}

#[test]
fn a_file_needs_a_first_line_of_documentation_and_a_bounded_length() {
    let undocumented = Source::new("src/clock.rs".into(), "use std::time;\n".into());
    assert_eq!(undocumented.violations(false).len(), 1);
    let line = "const A: u8 = 1;\n";
    let long = Source::new("src/clock.rs".into(), format!("//! Time.\n{}", line.repeat(LINES_MAX)));
    assert_eq!(long.violations(false).len(), 1);
    assert!(long.violations(true).is_empty(), "files of tests may be longer");
    let tests = format!("//! Time.\n#[cfg(test)]\nmod tests {{\n{}}}\n", line.repeat(LINES_MAX));
    assert!(Source::new("src/clock.rs".into(), tests).violations(false).is_empty());
}

#[test]
fn a_module_that_is_compiled_for_tests_only_is_found() {
    let code =
        "//! A.\n#[cfg(test)]\nmod tests;\n#[cfg(test)]\n#[path = \"x_tests.rs\"]\nmod other;\nmod not;\n";
    let of = |path: &str| -> Vec<PathBuf> { Source::new(path.into(), code.into()).test_files() };
    assert_eq!(
        of("src/egress/mod.rs"),
        [Path::new("src/egress/tests.rs"), Path::new("src/egress/x_tests.rs")]
    );
    assert_eq!(
        of("src/egress/policy.rs"),
        [Path::new("src/egress/policy/tests.rs"), Path::new("src/egress/x_tests.rs")]
    );
}

/// One breach of one rule.
struct Violation {
    path: PathBuf,
    line: usize,
    rule: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.path.display(), self.line, self.rule)
    }
}

/// A file: its text, and its code with the bytes of comments and literals blanked, so that positions stay.
struct Source {
    path: PathBuf,
    text: String,
    code: Vec<u8>,
    /// Items under `#[cfg(test)]`.
    tests: Vec<std::ops::Range<usize>>,
}

impl Source {
    fn read(root: &Path, path: &Path) -> Self {
        let text = fs::read_to_string(path).unwrap();
        Self::new(path.strip_prefix(root).unwrap().to_owned(), text)
    }

    fn new(path: PathBuf, text: String) -> Self {
        let code = blanked(text.as_bytes());
        let tests = test_items(&code);
        Self { path, text, code, tests }
    }

    /// The path of modules below `src/`: `["store", "ledger"]` for `src/store/ledger/mod.rs`.
    fn modules(&self) -> Vec<&str> {
        let inside = self.path.strip_prefix("src").unwrap();
        let names = inside.iter().map(|name| name.to_str().unwrap().trim_end_matches(".rs"));
        names.filter(|name| *name != "mod").collect()
    }

    fn violations(&self, is_test: bool) -> Vec<Violation> {
        let mut found = Vec::new();
        if !self.text.starts_with("//! ") {
            found.push(self.violation(0, "the first line is `//!` and says what the file is for"));
        }
        if is_test {
            return found;
        }
        self.check_length(&mut found);
        self.check_imports(&mut found);
        self.check_words(&mut found);
        found
    }

    fn check_length(&self, found: &mut Vec<Violation>) {
        let lines = |part: &[u8]| part.iter().filter(|byte| **byte == b'\n').count();
        let tests: usize = self.tests.iter().map(|range| lines(&self.code[range.clone()])).sum();
        let length = lines(&self.code) - tests;
        if length > LINES_MAX {
            let rule =
                format!("{length} lines without its tests; {LINES_MAX} at most: which second idea moved in?");
            found.push(self.violation(0, rule));
        }
    }

    fn check_imports(&self, found: &mut Vec<Violation>) {
        let modules = self.modules();
        let Some((own, allowed, rule)) = MAY_IMPORT.iter().find(|(name, ..)| *name == modules[0]) else {
            found.push(self.violation(0, format!("no rule says what `{}` may import", modules[0])));
            return;
        };
        for (position, name) in self.imports(modules.len()) {
            if name != *own && !allowed.contains(&name.as_str()) && is_module(&name) {
                found.push(self.violation(position, format!("{rule}: `{own}` imports `{name}`")));
            }
        }
    }

    /// Every mention of a top-level module, as `crate::x`, in a group, or over `super`.
    fn imports(&self, depth: usize) -> Vec<(usize, String)> {
        let mut found = Vec::new();
        for (position, word) in self.words() {
            let mut rest = &self.code[position + word.len()..];
            match word {
                "crate" | "sendoff" => {}
                // Reaches the crate's root when there are as many of them as the file is deep.
                "super" => {
                    let mut climbed = 1;
                    while let Some(further) = rest.strip_prefix(b"::super") {
                        (climbed, rest) = (climbed + 1, further);
                    }
                    if climbed != depth || self.code[..position].ends_with(b"super::") {
                        continue;
                    }
                }
                _ => continue,
            }
            if let Some(path) = rest.strip_prefix(b"::") {
                found.extend(heads(path).into_iter().map(|name| (position, name)));
            }
        }
        found
    }

    fn check_words(&self, found: &mut Vec<Violation>) {
        let folder = self.modules()[0].to_owned();
        for (position, word) in self.words() {
            let (before, after) = (&self.code[..position], &self.code[position + word.len()..]);
            let driver = DRIVERS.iter().find(|(driver, home)| *driver == word && *home != folder);
            if let Some((driver, home)) = driver
                && (after.starts_with(b"::")
                    || before.ends_with(b"use ")
                    || before.ends_with(b"extern crate "))
            {
                found.push(self.violation(position, format!("{driver} is known in src/{home} only")));
            }
            if word == "unwrap" && after.starts_with(b"()") {
                found.push(self.violation(
                    position,
                    "no `unwrap()` outside tests: an error, or `expect(\"why impossible\")`",
                ));
            }
        }
    }

    /// Identifiers and keywords outside tests, with their positions.
    fn words(&self) -> Vec<(usize, &str)> {
        let mut words = Vec::new();
        let mut start = None;
        for (position, byte) in self.code.iter().chain(b" ").enumerate() {
            let inside = byte.is_ascii_alphanumeric() || *byte == b'_';
            match start {
                None if inside => start = Some(position),
                Some(begin) if !inside => {
                    start = None;
                    if !self.tests.iter().any(|range| range.contains(&begin)) {
                        words.push((begin, std::str::from_utf8(&self.code[begin..position]).unwrap()));
                    }
                }
                _ => {}
            }
        }
        words
    }

    /// Files that `#[cfg(test)] mod name;` brings in, with or without `#[path]`.
    fn test_files(&self) -> Vec<PathBuf> {
        let folder = self.path.parent().unwrap();
        let is_folder = matches!(
            self.path.file_name().and_then(|name| name.to_str()),
            Some("mod.rs" | "lib.rs" | "main.rs")
        );
        let below = if is_folder { folder.to_owned() } else { self.path.with_extension("") };
        let items = self.tests.iter().map(|range| self.text[range.clone()].trim());
        items
            .filter_map(|item| {
                if let Some((_, path)) = item.split_once("#[path = \"") {
                    return Some(folder.join(path.split('"').next()?));
                }
                let name = item.strip_suffix(';')?.rsplit_once("mod ")?.1;
                Some(below.join(format!("{name}.rs")))
            })
            .collect()
    }

    fn violation(&self, position: usize, rule: impl Into<String>) -> Violation {
        let line = 1 + self.code[..position].iter().filter(|byte| **byte == b'\n').count();
        Violation { path: self.path.clone(), line, rule: rule.into() }
    }
}

/// A name in the crate's root that is a module, and no item re-exported there.
fn is_module(name: &str) -> bool {
    name.starts_with(|first: char| first.is_ascii_lowercase())
}

/// The first names of a path: one, or one for each member of a group.
fn heads(path: &[u8]) -> Vec<String> {
    let name = |bytes: &[u8]| -> String {
        let bytes = bytes.trim_ascii_start().iter();
        bytes
            .take_while(|byte| byte.is_ascii_alphanumeric() || **byte == b'_')
            .map(|byte| char::from(*byte))
            .collect()
    };
    let Some(group) = path.strip_prefix(b"{") else { return vec![name(path)] };
    let mut heads = vec![name(group)];
    let mut depth = 0;
    for (position, byte) in group.iter().enumerate() {
        match byte {
            b'{' => depth += 1,
            b'}' if depth == 0 => break,
            b'}' => depth -= 1,
            b',' if depth == 0 => heads.push(name(&group[position + 1..])),
            _ => {}
        }
    }
    heads.retain(|head| !head.is_empty());
    heads
}

fn collect(folder: &Path, paths: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect(&path, paths);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            paths.push(path);
        }
    }
    paths.sort();
}

/// The ranges of items under `#[cfg(test)]`, attributes included.
fn test_items(code: &[u8]) -> Vec<std::ops::Range<usize>> {
    const MARK: &[u8] = b"#[cfg(test)]";
    let mut items: Vec<std::ops::Range<usize>> = Vec::new();
    let mut from = 0;
    while let Some(start) = code[from..].windows(MARK.len()).position(|window| window == MARK) {
        let start = from + start;
        let end = item_end(code, start + MARK.len());
        items.push(start..end);
        from = end;
    }
    items
}

/// Where the item that begins at `from` ends: behind its `;` or its closing brace.
fn item_end(code: &[u8], from: usize) -> usize {
    let (mut braces, mut others) = (0_usize, 0_usize);
    for (position, byte) in code.iter().enumerate().skip(from) {
        match byte {
            // Inside braces only they count: `<` is a comparison there.
            b'(' | b'[' | b'<' if braces == 0 => others += 1,
            b'>' if matches!(code[position - 1], b'-' | b'=') => {}
            b')' | b']' | b'>' if braces == 0 => others -= 1,
            // A field or a variant.
            b',' if braces == 0 && others == 0 => return position + 1,
            b'{' => braces += 1,
            // The last field or variant of what it stands in.
            b'}' if braces == 0 => return position,
            b'}' => {
                braces -= 1;
                if braces == 0 && others == 0 {
                    return position + 1;
                }
            }
            b';' if braces == 0 && others == 0 => return position + 1,
            _ => {}
        }
    }
    code.len()
}

/// The text with everything in comments, strings and characters turned into spaces; line ends stay.
fn blanked(text: &[u8]) -> Vec<u8> {
    let mut code = text.to_vec();
    let mut position = 0;
    while position < text.len() {
        let length = literal(text, position);
        if length == 0 {
            position += 1;
            continue;
        }
        for byte in &mut code[position..position + length] {
            if *byte != b'\n' {
                *byte = b' ';
            }
        }
        position += length;
    }
    code
}

/// The length of the comment, string or character that begins here; 0 when none does.
fn literal(text: &[u8], position: usize) -> usize {
    let rest = &text[position..];
    let until = |end: &[u8], from: usize| {
        let found = rest[from..].windows(end.len()).position(|window| window == end);
        found.map_or(rest.len(), |found| from + found + end.len())
    };
    let in_word = position > 0 && (text[position - 1].is_ascii_alphanumeric() || text[position - 1] == b'_');
    match rest {
        [b'/', b'/', ..] => until(b"\n", 0) - usize::from(rest.contains(&b'\n')),
        [b'/', b'*', ..] => until(b"*/", 2),
        [b'"', ..] => quoted(rest, b'"'),
        [b'\'', b'\\', ..] => quoted(rest, b'\''),
        [b'\'', first, ..] => {
            let end = 1 + utf8_length(*first);
            if rest.get(end) == Some(&b'\'') { end + 1 } else { 0 }
        }
        [b'r', b'"' | b'#', ..] if !in_word || text[position - 1] == b'b' => {
            let hashes = rest[1..].iter().take_while(|byte| **byte == b'#').count();
            if rest.get(1 + hashes) != Some(&b'"') {
                return 0;
            }
            until(&[b"\"", &rest[1..=hashes]].concat(), hashes + 2)
        }
        _ => 0,
    }
}

/// The length of a literal with escapes, quotes included.
fn quoted(rest: &[u8], quote: u8) -> usize {
    let mut position = 1;
    while position < rest.len() && rest[position] != quote {
        position += if rest[position] == b'\\' { 2 } else { 1 };
    }
    position + 1
}

fn utf8_length(first: u8) -> usize {
    match first {
        0x00..0x80 => 1,
        0x80..0xe0 => 2,
        0xe0..0xf0 => 3,
        0xf0.. => 4,
    }
}
