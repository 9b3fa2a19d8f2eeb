//! Answers on standard output.
//! Guarantee: a closed pipe is an error that ends the command, never a panic.

use std::io::{IsTerminal, Write};

use serde::Serialize;

/// Writes one line, at once.
pub(super) fn line(text: &str) -> std::io::Result<()> {
    let mut stdout = std::io::stdout().lock();
    writeln!(stdout, "{text}")?;
    stdout.flush()
}

/// Writes a value as JSON on one line.
pub(super) fn json(value: &impl Serialize) -> anyhow::Result<()> {
    Ok(line(&serde_json::to_string(value)?)?)
}

/// Whether a person reads along.
pub(super) fn is_terminal() -> bool {
    std::io::stdout().is_terminal()
}
