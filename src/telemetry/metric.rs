//! Every metric: its name, labels, help and buckets (contract section 8), and the only functions that record them.
//! Guarantee: label values come from enums, lanes and reasons, so the number of series is bounded.

use std::sync::OnceLock;
use std::time::Duration;

use metrics::{Counter, Gauge, Histogram, counter, gauge, histogram};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};

use crate::model::failure::{Phase, Reason};

const JOBS_RECEIVED: &str = "sendoff_jobs_received_total";
const JOBS_SETTLED: &str = "sendoff_jobs_settled_total";
const ATTEMPTS: &str = "sendoff_attempts_total";
const JOB_SECONDS: &str = "sendoff_job_seconds";
const PHASE_SECONDS: &str = "sendoff_smtp_phase_seconds";
const CONNECTIONS: &str = "sendoff_smtp_connections";
const DISPATCH_WAITING: &str = "sendoff_dispatch_waiting";
const DISPATCH_IN_FLIGHT: &str = "sendoff_dispatch_in_flight";
const ORGANIZATIONS_PARKED: &str = "sendoff_organizations_parked";
const DEAD_LETTERS: &str = "sendoff_dead_letters";
const EGRESS_REFUSED: &str = "sendoff_egress_refused_total";
const CONTROL_COMMANDS: &str = "sendoff_control_commands_total";
const LEDGER_BATCH: &str = "sendoff_ledger_batch_size";
const BROKER_CONNECTED: &str = "sendoff_broker_connected";
const DATABASE_UP: &str = "sendoff_database_up";
const PROVIDER_WAITS: &str = "sendoff_provider_waits_total";
const SETTLES_MISSED: &str = "sendoff_settles_missed_total";
const DELIVERIES_DROPPED: &str = "sendoff_deliveries_dropped_total";
const PANICS: &str = "sendoff_panics_total";
const BUILD_INFO: &str = "sendoff_build_info";

/// From published to sent, in seconds: a retry schedule reaches into hours.
const JOB_BUCKETS: &[f64] =
    &[0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0, 7200.0, 28_800.0];
/// One phase of a session, in seconds: up to the longest wait for a final reply.
const PHASE_BUCKETS: &[f64] =
    &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0, 600.0];
const BATCH_BUCKETS: &[f64] = &[1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0];

const PHASES: [Phase; 13] = [
    Phase::Resolve,
    Phase::Connect,
    Phase::Greeting,
    Phase::Ehlo,
    Phase::Starttls,
    Phase::Tls,
    Phase::Auth,
    Phase::Rset,
    Phase::Mail,
    Phase::Rcpt,
    Phase::Data,
    Phase::Body,
    Phase::FinalDot,
];

/// The recorder is already there: a process has one.
#[derive(Debug, thiserror::Error)]
#[error("metrics are already being recorded in this process")]
pub struct MetricsTaken;

/// The recorded metrics.
#[derive(Clone)]
pub struct Metrics {
    handle: PrometheusHandle,
}

/// Handles for what is recorded several times per message.
struct Hot {
    phases: [Histogram; PHASES.len()],
    batch: Histogram,
    waiting: Gauge,
    in_flight: Gauge,
}

static HOT: OnceLock<Hot> = OnceLock::new();

impl Metrics {
    /// Starts recording; before this, every function here does nothing.
    ///
    /// # Errors
    /// When recording has been started before.
    pub fn install() -> Result<Self, MetricsTaken> {
        let handle =
            [(JOB_SECONDS, JOB_BUCKETS), (PHASE_SECONDS, PHASE_BUCKETS), (LEDGER_BATCH, BATCH_BUCKETS)]
                .into_iter()
                .try_fold(PrometheusBuilder::new(), |builder, (name, buckets)| {
                    builder.set_buckets_for_metric(Matcher::Full(name.to_owned()), buckets)
                })
                .and_then(PrometheusBuilder::install_recorder)
                .map_err(|_| MetricsTaken)?;
        describe();
        HOT.get_or_init(|| Hot {
            phases: PHASES.map(|phase| histogram!(PHASE_SECONDS, "phase" => phase.as_str())),
            batch: histogram!(LEDGER_BATCH),
            waiting: gauge!(DISPATCH_WAITING),
            in_flight: gauge!(DISPATCH_IN_FLIGHT),
        });
        gauge!(BUILD_INFO, "version" => env!("CARGO_PKG_VERSION")).set(1);
        broker_connected(false);
        database_up(false);
        Ok(Self { handle })
    }

    /// Metrics that nothing records into, for tests of what serves them: a process has one recorder.
    #[cfg(test)]
    pub(crate) fn detached() -> Self {
        Self { handle: PrometheusBuilder::new().build_recorder().handle() }
    }

    /// Everything recorded, in Prometheus' text format.
    pub fn render(&self) -> String {
        self.handle.render()
    }

    /// Folds recorded samples together. Without it, or a reader of [`Metrics::render`], histograms grow without bound:
    /// call it every few seconds.
    pub fn upkeep(&self) {
        self.handle.run_upkeep();
    }
}

fn describe() {
    use metrics::{describe_counter, describe_gauge, describe_histogram};
    describe_counter!(JOBS_RECEIVED, "Deliveries taken from a lane");
    describe_counter!(JOBS_SETTLED, "Deliveries settled, by outcome");
    describe_counter!(ATTEMPTS, "Attempts at sending, by transport, result and reason");
    describe_histogram!(
        JOB_SECONDS,
        "Seconds from a job's publication, or else its receipt, until it was sent"
    );
    describe_histogram!(PHASE_SECONDS, "Seconds that a phase of an SMTP session took");
    describe_gauge!(CONNECTIONS, "Open SMTP connections, by state");
    describe_gauge!(DISPATCH_WAITING, "Jobs waiting in line for their destination");
    describe_gauge!(DISPATCH_IN_FLIGHT, "Jobs being sent");
    describe_gauge!(
        ORGANIZATIONS_PARKED,
        "Organizations whose jobs wait for their configuration to be fixed"
    );
    describe_gauge!(DEAD_LETTERS, "Dead letters in the archive, by reason");
    describe_counter!(EGRESS_REFUSED, "Connections refused before they were made, by reason");
    describe_counter!(CONTROL_COMMANDS, "Control commands answered, by command and code");
    describe_histogram!(LEDGER_BATCH, "Rows in one statement of the ledger");
    describe_gauge!(BROKER_CONNECTED, "1 while connected to RabbitMQ");
    describe_gauge!(DATABASE_UP, "1 while PostgreSQL answers");
    describe_counter!(PROVIDER_WAITS, "Jobs put aside until their provider's limit allows them, by limit");
    describe_counter!(SETTLES_MISSED, "Outcomes not recorded because another worker had taken the job over");
    describe_counter!(DELIVERIES_DROPPED, "Deliveries dropped unsettled, which went back to their queue");
    describe_counter!(PANICS, "Panics, each a defect; what it happened over was settled all the same");
    describe_gauge!(BUILD_INFO, "1, with the running version");
}

/// How a delivery was settled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Accepted by the server.
    Sent,
    /// To be tried again.
    Deferred,
    /// Waits for its organization's configuration.
    Parked,
    /// Given up.
    Dead,
    /// Sent before.
    Duplicate,
    /// Given back to the broker.
    Requeued,
}

impl Outcome {
    const ALL: [Self; 6] =
        [Self::Sent, Self::Deferred, Self::Parked, Self::Dead, Self::Duplicate, Self::Requeued];

    fn label(self) -> &'static str {
        match self {
            Self::Sent => "sent",
            Self::Deferred => "deferred",
            Self::Parked => "parked",
            Self::Dead => "dead",
            Self::Duplicate => "duplicate",
            Self::Requeued => "requeued",
        }
    }
}

/// How one attempt at sending ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AttemptResult {
    /// Accepted by the server.
    Sent,
    /// Certainly not accepted.
    Failed,
    /// It cannot be known.
    Unknown,
}

/// What an open SMTP connection is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConnectionState {
    /// Carries a message, or is being set up.
    Busy,
    /// Waits in the pool.
    Idle,
}

/// One lane's metrics; made once per lane, then cheap.
#[derive(Clone)]
pub struct LaneMetrics {
    received: Counter,
    settled: [Counter; Outcome::ALL.len()],
    seconds: Histogram,
}

/// The metrics of a lane. Take them after [`Metrics::install`].
pub fn lane(name: &str) -> LaneMetrics {
    let lane = name.to_owned();
    LaneMetrics {
        received: counter!(JOBS_RECEIVED, "lane" => lane.clone()),
        settled: Outcome::ALL
            .map(|outcome| counter!(JOBS_SETTLED, "lane" => lane.clone(), "outcome" => outcome.label())),
        seconds: histogram!(JOB_SECONDS, "lane" => lane),
    }
}

impl LaneMetrics {
    /// A delivery was taken from the lane.
    pub fn job_received(&self) {
        self.received.increment(1);
    }

    /// A delivery was settled.
    pub fn job_settled(&self, outcome: Outcome) {
        self.settled[outcome as usize].increment(1);
    }

    /// A job was sent so long after it was published, or received where its publisher gave no time.
    pub fn job_took(&self, time: Duration) {
        self.seconds.record(time);
    }
}

/// An attempt ended. `transport` is [`crate::model::smtp_settings::Destination::transport`].
pub fn attempt(transport: &'static str, result: AttemptResult, reason: Option<Reason>) {
    let result = match result {
        AttemptResult::Sent => "sent",
        AttemptResult::Failed => "failed",
        AttemptResult::Unknown => "unknown",
    };
    let reason = reason.map_or("none", Reason::as_str);
    counter!(ATTEMPTS, "transport" => transport, "result" => result, "reason" => reason).increment(1);
}

/// A phase of a session took so long.
pub fn phase(phase: Phase, time: Duration) {
    if let Some(hot) = HOT.get() {
        hot.phases[phase as usize].record(time);
    }
}

/// So many connections are in this state now.
pub fn connections(state: ConnectionState, count: usize) {
    let state = match state {
        ConnectionState::Busy => "busy",
        ConnectionState::Idle => "idle",
    };
    gauge!(CONNECTIONS, "state" => state).set(lossy(count));
}

/// So many jobs wait in line, and so many are being sent.
pub fn dispatch(waiting: usize, in_flight: usize) {
    if let Some(hot) = HOT.get() {
        hot.waiting.set(lossy(waiting));
        hot.in_flight.set(lossy(in_flight));
    }
}

/// So many organizations have their jobs parked.
pub fn organizations_parked(count: usize) {
    gauge!(ORGANIZATIONS_PARKED).set(lossy(count));
}

/// So many letters of each reason are in the archive; a reason that is left out has none.
pub fn dead_letters(counts: &[(Reason, u64)]) {
    for reason in Reason::ALL {
        let count = counts.iter().filter(|(of, _)| of == reason).map(|(_, count)| *count).sum::<u64>();
        gauge!(DEAD_LETTERS, "reason" => reason.as_str())
            .set(lossy(usize::try_from(count).unwrap_or(usize::MAX)));
    }
}

/// A host or port was refused, when it was to be saved or dialled; `reason` is the egress policy's label.
pub fn egress_refused(reason: &'static str) {
    counter!(EGRESS_REFUSED, "reason" => reason).increment(1);
}

/// A command was answered. `command` is a known command's name, or `unknown`; `code` is `ok` or the error's code.
pub fn control_command(command: &'static str, code: &'static str) {
    counter!(CONTROL_COMMANDS, "command" => command, "code" => code).increment(1);
}

/// A statement of the ledger carried so many rows.
pub fn ledger_batch(rows: usize) {
    if let Some(hot) = HOT.get() {
        hot.batch.record(lossy(rows));
    }
}

/// A job was put aside for its provider's limit: `messages` or `connections`. `transport` is as in [`attempt`].
pub fn waits_for_provider(transport: &'static str, limit: &'static str) {
    counter!(PROVIDER_WAITS, "transport" => transport, "limit" => limit).increment(1);
}

/// An outcome was not recorded because another worker had taken the job over.
pub fn settle_missed() {
    counter!(SETTLES_MISSED).increment(1);
}

/// A delivery was dropped unsettled, by a panic say, and went back to its queue.
pub fn delivery_dropped() {
    counter!(DELIVERIES_DROPPED).increment(1);
}

/// Something panicked.
pub(super) fn panicked() {
    counter!(PANICS).increment(1);
}

/// Whether RabbitMQ is connected.
pub fn broker_connected(yes: bool) {
    gauge!(BROKER_CONNECTED).set(f64::from(u8::from(yes)));
}

/// Whether PostgreSQL answers.
pub fn database_up(yes: bool) {
    gauge!(DATABASE_UP).set(f64::from(u8::from(yes)));
}

/// Counts far beyond what a gauge shows exactly (2^53) do not occur.
#[expect(clippy::cast_precision_loss, reason = "gauges are floating-point numbers")]
fn lossy(count: usize) -> f64 {
    count as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_metric_of_the_contract_is_rendered_with_its_labels() {
        let metrics = Metrics::install().unwrap();
        assert!(Metrics::install().is_err());
        let notifications = lane("test-lane");
        notifications.job_received();
        Outcome::ALL.into_iter().for_each(|outcome| notifications.job_settled(outcome));
        notifications.job_took(Duration::from_millis(40));
        attempt("platform", AttemptResult::Failed, Some(Reason::Throttled));
        PHASES.into_iter().for_each(|p| phase(p, Duration::from_millis(2)));
        connections(ConnectionState::Busy, 3);
        dispatch(5, 4);
        organizations_parked(1);
        dead_letters(&[(Reason::Malformed, 2)]);
        egress_refused("loopback");
        control_command("smtp_config.get", "ok");
        ledger_batch(12);
        waits_for_provider("organization", "messages");
        broker_connected(true);
        metrics.upkeep();
        let text = metrics.render();
        // Other tests of this process record too, so only this lane's values are compared.
        for line in [
            "sendoff_jobs_received_total{lane=\"test-lane\"} 1",
            "sendoff_jobs_settled_total{lane=\"test-lane\",outcome=\"duplicate\"} 1",
            "sendoff_jobs_settled_total{lane=\"test-lane\",outcome=\"requeued\"} 1",
            "sendoff_attempts_total{transport=\"platform\",result=\"failed\",reason=\"throttled\"} ",
            "sendoff_job_seconds_bucket{lane=\"test-lane\",le=\"0.05\"} 1",
            "sendoff_smtp_phase_seconds_count{phase=\"final_dot\"} ",
            "sendoff_smtp_connections{state=\"busy\"} ",
            "sendoff_dispatch_waiting ",
            "sendoff_dispatch_in_flight ",
            "sendoff_organizations_parked ",
            "sendoff_dead_letters{reason=\"malformed\"} ",
            "sendoff_dead_letters{reason=\"internal\"} ",
            "sendoff_egress_refused_total{reason=\"loopback\"} ",
            "sendoff_control_commands_total{command=\"smtp_config.get\",code=\"ok\"} ",
            "sendoff_ledger_batch_size_count ",
            "sendoff_provider_waits_total{transport=\"organization\",limit=\"messages\"} ",
            "sendoff_broker_connected ",
            "sendoff_database_up ",
            "sendoff_build_info{version=",
        ] {
            assert!(text.contains(line), "{line} is missing in\n{text}");
        }
        assert!(text.contains("# HELP sendoff_job_seconds "), "{text}");
    }

    #[test]
    fn tables_are_in_the_order_of_their_enums() {
        assert!(PHASES.iter().enumerate().all(|(index, phase)| *phase as usize == index));
        assert!(Outcome::ALL.iter().enumerate().all(|(index, outcome)| *outcome as usize == index));
    }
}
