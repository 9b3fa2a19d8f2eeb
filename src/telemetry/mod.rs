//! What the program tells its operator: log lines on standard error, and metrics for Prometheus.
//! Guarantee: no log filter makes a dependency log what it was given to carry, and no metric bears an organization or an
//! address.

mod logs;
mod metric;
mod panics;

pub use logs::{COMMAND_FILTER, InvalidFilter, WORKER_FILTER, start_logs};
pub use metric::{
    AttemptResult, ConnectionState, LaneMetrics, Metrics, MetricsTaken, Outcome, attempt, broker_connected,
    connections, control_command, database_up, dead_letters, delivery_dropped, dispatch, egress_refused,
    lane, ledger_batch, organizations_parked, phase, settle_missed, waits_for_provider,
};
pub use panics::report_panics;
