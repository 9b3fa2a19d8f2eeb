//! Log lines on standard error.
//! Guarantee: `RUST_LOG` opens this crate's own lines only as far as it likes; the libraries that carry passwords, bodies
//! or queries never log below ERROR and no other dependency below INFO.

use std::io::IsTerminal;

use tracing::{Level, Metadata};
use tracing_subscriber::filter::{FilterExt, ParseError, filter_fn};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer};

/// What the worker logs unless `RUST_LOG` says otherwise.
pub const WORKER_FILTER: &str = "info";
/// What every other command logs unless `RUST_LOG` says otherwise: its answer is on standard output.
pub const COMMAND_FILTER: &str = "warn";

/// In front of every filter; a later item for the same target takes its place. The broker library's ERROR lines are left
/// out unless they are asked for by name: every loss has a line of our own, and theirs come at an orderly close too.
const QUIET: &str = "lapin=off";

/// Targets that begin so carry credentials, message bodies or queries, and log them: lapin 4.12 prints the whole body of a
/// message that came back, at WARN; sqlx 0.9 prints what it does not know of a URL, at WARN.
const CARRIERS: &[&str] =
    &["lapin", "amq", "sqlx", "hickory", "rustls", "tokio_rustls", "lettre", "hyper", "h2", "axum", "tower"];

/// `RUST_LOG` is not a filter.
#[derive(Debug, thiserror::Error)]
#[error(
    "RUST_LOG: `{value}` cannot be used; allowed: a level (error, warn, info, debug, trace), or target=level items \
         with commas, say info,sendoff=debug"
)]
pub struct InvalidFilter {
    value: String,
}

/// Starts logging to standard error: compact lines, coloured on a terminal unless `NO_COLOR` is set. `filter` counts
/// where `RUST_LOG` is unset or empty. A second call changes nothing.
///
/// # Errors
/// When `RUST_LOG` is not a filter.
pub fn start_logs(filter: &str) -> Result<(), InvalidFilter> {
    let asked = std::env::var_os("RUST_LOG").map(|value| value.to_string_lossy().into_owned());
    let value = asked.filter(|value| !value.is_empty()).unwrap_or_else(|| filter.to_owned());
    let filter = filter_of(&value).map_err(|_| InvalidFilter { value })?;
    let colours = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let lines = tracing_subscriber::fmt::layer()
        .compact()
        .with_ansi(colours)
        .with_writer(std::io::stderr)
        .with_filter(filter.and(filter_fn(may_log)));
    // Fails only when logging has been started before.
    let _ = tracing_subscriber::registry().with(lines).try_init();
    Ok(())
}

fn filter_of(value: &str) -> Result<EnvFilter, ParseError> {
    EnvFilter::try_new(format!("{QUIET},{value}"))
}

/// The cap that no filter lifts.
fn may_log(line: &Metadata<'_>) -> bool {
    *line.level() <= cap(line.target())
}

fn cap(target: &str) -> Level {
    if target == "sendoff" || target.starts_with("sendoff::") {
        Level::TRACE
    } else if CARRIERS.iter().any(|carrier| target.starts_with(carrier)) {
        Level::ERROR
    } else {
        Level::INFO
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    /// What is written of `log`'s lines under a filter.
    fn written(filter: &str, log: impl FnOnce()) -> String {
        let lines = Lines::default();
        let writer = lines.clone();
        let layer = tracing_subscriber::fmt::layer()
            .with_writer(move || writer.clone())
            .with_filter(filter_of(filter).unwrap().and(filter_fn(may_log)));
        tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), log);
        let bytes = lines.0.lock().unwrap().clone();
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn the_widest_filter_opens_our_own_lines_only() {
        let text = written("trace", || {
            tracing::trace!(target: "sendoff::smtp", "own-trace");
            tracing::debug!(target: "lettre::transport", "canary");
            tracing::info!(target: "sqlx::query", "canary");
            tracing::trace!(target: "lapin::channel", "canary");
            tracing::debug!(target: "something_else", "canary");
            tracing::debug!(target: "sendoffish", "canary");
            tracing::warn!(target: "lapin::returned_messages", "canary");
            tracing::error!(target: "sqlx::pool", "their-error");
            tracing::warn!(target: "something_else", "their-warning");
        });
        for line in ["own-trace", "their-error", "their-warning"] {
            assert!(text.contains(line), "{line}: {text}");
        }
        assert!(!text.contains("canary"), "{text}");
    }

    #[test]
    fn the_broker_library_s_errors_are_written_only_where_they_are_asked_for_by_name() {
        let error = || tracing::error!(target: "lapin::channels", "their-error");
        for filter in [WORKER_FILTER, COMMAND_FILTER, "trace", "sendoff=debug,info"] {
            assert_eq!(written(filter, error), "", "{filter}");
        }
        for filter in ["info,lapin=error", "lapin=trace"] {
            assert!(written(filter, error).contains("their-error"), "{filter}");
        }
    }
}
