//! What is said of a panic: where it was, and never what it said, which may quote somebody's mail.
//! Guarantee: every panic of the process is counted and logged once.

use std::panic::PanicHookInfo;

/// Has every panic counted and logged from now on.
pub fn report_panics() {
    std::panic::set_hook(Box::new(report));
}

fn report(panic: &PanicHookInfo<'_>) {
    super::metric::panicked();
    let at = panic.location().map(ToString::to_string).unwrap_or_default();
    // A literal was written by a programmer; what was put together may hold anything.
    let said = panic.payload().downcast_ref::<&'static str>().copied().unwrap_or("not shown");
    tracing::error!(at, said, "a panic: a defect of this program");
}
