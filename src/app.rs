//! The composition root: builds the worker's parts, starts them in order, and stops them in the opposite one.
//! Guarantee: start order of the services does not matter; after the stop nothing that was taken is left unsettled.

mod beside;

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use tokio::sync::Notify;
use tokio::task::{JoinHandle, JoinSet};

use crate::broker::Broker;
use crate::broker::wire::WireLimits;
use crate::clock::Clock;
use crate::control::{self, Announcer, Control, ControlRules};
use crate::dead_letters::{self, Archivist, Releaser};
use crate::delivery::admission::Connections;
use crate::delivery::blame::Blames;
use crate::delivery::database::DatabaseWatch;
use crate::delivery::debts::Debts;
use crate::delivery::dispatch::Dispatcher;
use crate::delivery::in_hand::ServedLane;
use crate::delivery::lanes;
use crate::delivery::probing::Prober;
use crate::delivery::quarantine::Quarantine;
use crate::delivery::rates::Rates;
use crate::delivery::route::PlatformServer;
use crate::delivery::settle::Desk;
use crate::delivery::weights::Weights;
use crate::delivery::worker::{Limits, Worker};
use crate::fault;
use crate::http::{self, Part, Readiness};
use crate::model::failure::Phase;
use crate::model::lanes::Lane;
use crate::model::parking::ParkingRules;
use crate::model::policy::RetryLimits;
use crate::parts;
use crate::secrets::KeyRing;
use crate::settings::{CustomSmtp, Settings};
use crate::shutdown::Shutdown;
use crate::smtp::Deadlines;
use crate::smtp::TlsRoots;
use crate::smtp::{Observer, SmtpConnector, SmtpOptions};
use crate::smtp::{Pool, PoolLimits};
use crate::store::{
    ConfigCache, DEAD_AFTER, DeadLetters, Incarnations, LaneBinding, Ledger, SchemaState, SmtpConfigs, Store,
    StoreError,
};
use crate::telemetry::{self, Metrics};

/// Connections to PostgreSQL, beside the one that holds the worker's lock and the one that listens.
const DATABASE_CONNECTIONS: u32 = 10;
/// Organizations whose configuration is kept in memory.
const CONFIGS_CACHED: usize = 20_000;
/// Pause between two looks at a schema that is not this program's.
const SCHEMA_PAUSE: Duration = Duration::from_secs(1);
/// For idle SMTP sessions to say goodbye.
const GOODBYE_LIMIT: Duration = Duration::from_secs(2);

/// Runs the worker until a signal has stopped it.
///
/// # Errors
/// When it cannot start whatever the services do: a port that is taken, a certificate file that cannot be read.
pub async fn worker(settings: Settings, drain_timeout: Duration) -> anyhow::Result<()> {
    let shutdown = Shutdown::new();
    let signals = shutdown.listen(drain_timeout).context("listening for signals")?;
    for warning in settings.warnings() {
        tracing::warn!("{warning}");
    }
    let metrics = Metrics::install()?;
    telemetry::report_panics();
    if fault::BUILT_IN {
        tracing::warn!("this build lets jobs inject faults: it is for tests alone");
    }
    let readiness = Readiness::new();
    let server = http::Server::bind(settings.http.listen).await?;
    tracing::info!(version = env!("CARGO_PKG_VERSION"), http = %server.address(), "sendoff starts");
    let http = tokio::spawn(server.serve(readiness.clone(), metrics.clone(), shutdown.clone()));

    let store = parts::store(&settings, DATABASE_CONNECTIONS)?;
    let running = Running::build(&settings, store.clone(), &readiness, &shutdown)?;
    let ready = tokio::select! {
        () = shutdown.stop_taking() => false,
        () = database_ready(&store, &settings, &readiness) => true,
    };
    if ready {
        running.run(&settings, metrics).await?;
    }
    shutdown.stop();
    // It has been told to stop, and serves nobody who could wait.
    let _ = http.await;
    signals.abort();
    tracing::info!("sendoff has stopped");
    Ok(())
}

/// Waits for the database and for a schema that is this program's, however long it takes.
async fn database_ready(store: &Store, settings: &Settings, readiness: &Readiness) {
    let mut said = None;
    loop {
        // An outage is one problem, in however many ways it shows.
        let (problem, of_schema) = match prepare_database(store, settings).await {
            Ok(None) => break,
            Ok(Some(problem)) => (problem.clone(), Some(problem)),
            Err(error) => (error.to_string(), None),
        };
        readiness.down(Part::Schema, problem.clone());
        if said.as_ref() != Some(&of_schema) {
            tracing::warn!(%problem, "waiting for the database");
            said = Some(of_schema);
        }
        tokio::time::sleep(SCHEMA_PAUSE).await;
    }
    readiness.up(Part::Schema);
}

/// What still stands in the way, if the database could be asked.
async fn prepare_database(store: &Store, settings: &Settings) -> Result<Option<String>, StoreError> {
    match store.schema_state().await? {
        SchemaState::Current => {}
        SchemaState::Behind(missing) if settings.database.migrate_on_start => {
            tracing::info!(missing, "migrating the database");
            store.migrate().await?;
        }
        SchemaState::Behind(missing) => {
            return Ok(Some(format!("{missing} migrations are missing: run `sendoff migrate`")));
        }
        SchemaState::Ahead => {
            return Ok(Some("the schema is of a newer version of sendoff: upgrade this worker".to_owned()));
        }
    }
    // So that `sendoff topology declare` knows what to unbind when a lane is taken out of the settings.
    let bindings = parts::topology(settings).lane_bindings();
    let bindings: Vec<_> =
        bindings.into_iter().map(|(lane, binding)| LaneBinding { lane, binding }).collect();
    store.add_lane_bindings(&settings.amqp.prefix, &bindings).await?;
    Ok(None)
}

/// The parts of a running worker.
struct Running {
    store: Store,
    readiness: Readiness,
    shutdown: Shutdown,
    clock: Clock,
    connector: SmtpConnector,
    pool: Pool,
    rates: Rates,
    dispatcher: Dispatcher,
    configs: SmtpConfigs,
    keys: Arc<KeyRing>,
    key_missing: Arc<Notify>,
    broker: crate::broker::BrokerSettings,
}

impl Running {
    fn build(
        settings: &Settings,
        store: Store,
        readiness: &Readiness,
        shutdown: &Shutdown,
    ) -> anyhow::Result<Self> {
        let egress = parts::egress(settings)?;
        let roots = TlsRoots::load(&settings.smtp.extra_ca_files)?;
        for warning in roots.warnings() {
            tracing::warn!("{warning}");
        }
        let smtp = &settings.smtp;
        let options = SmtpOptions {
            deadlines: Deadlines {
                connect: smtp.connect_timeout,
                command: smtp.command_timeout,
                data: smtp.data_timeout,
                final_reply: smtp.final_reply_timeout,
            },
            hello_name: smtp.hello_name.clone(),
            allow_plaintext_auth: settings.egress.allow_plaintext_auth,
        };
        let connector = SmtpConnector::new(egress, roots, options, Arc::new(Heard));
        let pool_limits = PoolLimits {
            max_sessions: settings.delivery.max_sessions as usize,
            max_messages_per_connection: smtp.max_messages_per_connection,
            idle_timeout: smtp.idle_timeout,
        };
        let clock = Clock::system();
        let pool = Pool::new(connector.clone(), pool_limits);
        let keys = parts::key_ring(settings)?;
        Ok(Self {
            configs: SmtpConfigs::new(store.clone(), keys.clone()),
            keys,
            key_missing: Arc::default(),
            readiness: readiness.clone(),
            shutdown: shutdown.clone(),
            rates: Rates::new(store.clone(), pool.clone(), clock.new_id()),
            clock,
            pool,
            dispatcher: Dispatcher::new(settings.delivery.max_sessions as usize),
            connector,
            broker: parts::broker(settings)?,
            store,
        })
    }

    /// Works until the first stage of a stop, then drains.
    async fn run(self, settings: &Settings, metrics: Metrics) -> anyhow::Result<()> {
        let database = DatabaseWatch::new();
        let incarnations = Incarnations::start(self.store.clone(), DEAD_AFTER);
        let ledger = Ledger::new(self.store.clone(), incarnations.clone(), telemetry::ledger_batch);
        let cache = ConfigCache::new(self.configs.clone(), CONFIGS_CACHED);
        let broker = Arc::new(Broker::start(self.broker.clone(), Arc::new(dropped)));
        let mut tasks = JoinSet::new();
        tasks.spawn(database.clone().run(self.store.clone(), incarnations.clone(), self.shutdown.clone()));
        tasks.spawn(beside::follow_configs(cache.clone(), self.store.clone(), self.shutdown.clone()));
        tasks.spawn(beside::show_state(
            self.readiness.clone(),
            database.clone(),
            broker.state(),
            self.shutdown.clone(),
        ));
        tasks.spawn(beside::watch_keys(
            self.store.clone(),
            self.keys.clone(),
            self.readiness.clone(),
            self.key_missing.clone(),
            self.shutdown.clone(),
        ));
        tasks.spawn(beside::set_gauges(
            self.pool.clone(),
            self.dispatcher.clone(),
            metrics,
            self.shutdown.clone(),
        ));
        let retention = &settings.retention;
        tasks.spawn(beside::forget_jobs(self.store.clone(), retention.ledger, self.shutdown.clone()));
        tasks.spawn(beside::forget_letters(
            self.store.clone(),
            retention.dead_letters,
            self.shutdown.clone(),
        ));
        tasks.spawn(beside::count_dead_letters(self.store.clone(), self.shutdown.clone()));
        tasks.spawn(beside::count_parked_organizations(
            self.store.clone(),
            for_all(settings),
            self.shutdown.clone(),
        ));
        let pausing = tokio::spawn(lanes::pause_without_database(
            broker.clone(),
            database.clone(),
            self.shutdown.clone(),
        ));

        let archivist = self.archivist(&database, &broker);
        let archiving = tokio::spawn(archivist.run(broker.dead_letters(dead_letters::PREFETCH)));
        let worker =
            Arc::new(self.worker(settings, ledger.clone(), incarnations.clone(), cache, database, &broker));
        let (commands, announcer) = self.serve_commands(settings, &broker);
        tasks.spawn(announcer.run());
        tasks.spawn(Prober::new(worker.clone(), self.connector.clone()).run());
        tasks.spawn(self.releaser(settings, &broker).run());
        tasks.spawn(self.rates.clone().keep(self.shutdown.clone()));
        let lanes = serve_lanes(settings, &worker, &self.dispatcher, &broker)?;

        self.shutdown.stop_taking().await;
        tracing::info!("stopping: no new work is taken, sends in flight may finish");
        pausing.await.context("the task that pauses lanes")?;
        broker.stop_consuming().await;
        for lane in lanes {
            lane.await.context("a lane's task")?;
        }
        archiving.await.context("the archivist's task")?;
        commands.await.context("the commands' task")?;
        self.shutdown.stop();
        while tasks.join_next().await.is_some() {}
        self.pool.close_all(GOODBYE_LIMIT).await;
        self.rates.give_all_back().await;
        incarnations.stop().await;
        match Arc::into_inner(broker) {
            Some(broker) => broker.close().await,
            None => tracing::warn!("the broker's connections are closed by the end of the process"),
        }
        Ok(())
    }

    fn worker(
        &self,
        settings: &Settings,
        ledger: Ledger,
        incarnations: Incarnations,
        configs: ConfigCache,
        database: DatabaseWatch,
        broker: &Broker,
    ) -> Worker {
        let retry =
            RetryLimits { schedule: settings.retry.schedule.clone(), max_age: settings.retry.max_age };
        let blames =
            Blames { configs: self.configs.clone(), cache: configs.clone(), database: database.clone() };
        Worker {
            blames,
            desk: Desk {
                ledger: ledger.clone(),
                store: self.store.clone(),
                debts: Debts::default(),
                publisher: broker.publisher(),
                database: database.clone(),
                retry: retry.clone(),
                clock: self.clock.clone(),
                shutdown: self.shutdown.clone(),
            },
            ledger,
            incarnations,
            configs,
            weights: Weights::default(),
            quarantine: Quarantine::default(),
            pool: self.pool.clone(),
            database,
            key_missing: self.key_missing.clone(),
            platform: settings.platform.as_ref().map(|platform| PlatformServer {
                account: Arc::new(platform.account.clone()),
                limited: platform.limited,
            }),
            rates: self.rates.clone(),
            limits: Limits {
                wire: wire_limits(settings),
                retry,
                attempt_timeout: settings.smtp.attempt_timeout,
                custom_smtp: settings.delivery.custom_smtp,
                connections: connections(settings),
            },
            clock: self.clock.clone(),
            shutdown: self.shutdown.clone(),
        }
    }

    fn archivist(&self, database: &DatabaseWatch, broker: &Broker) -> Archivist {
        let database = database.clone();
        Archivist {
            archive: DeadLetters::new(self.store.clone(), self.keys.clone()),
            publisher: broker.publisher(),
            on_loss: Box::new(move |error| database.lost(error)),
            clock: self.clock.clone(),
            shutdown: self.shutdown.clone(),
        }
    }

    fn releaser(&self, settings: &Settings, broker: &Broker) -> Releaser {
        Releaser {
            store: self.store.clone(),
            archive: DeadLetters::new(self.store.clone(), self.keys.clone()),
            publisher: broker.publisher(),
            lanes: settings.amqp.lanes.clone(),
            limits: wire_limits(settings),
            rules: ParkingRules { for_all: for_all(settings), parked_for: settings.retry.parked_for },
            key_missing: self.key_missing.clone(),
            clock: self.clock.clone(),
            shutdown: self.shutdown.clone(),
        }
    }

    /// Starts to take commands: the task ends when the last one is answered, and what they change is announced by the other.
    fn serve_commands(&self, settings: &Settings, broker: &Broker) -> (JoinHandle<()>, Announcer) {
        let rules = ControlRules {
            custom_smtp_for_all: for_all(settings),
            allowed_users: settings.control.allowed_users.clone(),
            tests_per_minute: settings.control.tests_per_minute,
        };
        let control = Control::new(
            self.store.clone(),
            self.configs.clone(),
            self.connector.clone(),
            self.clock.clone(),
            rules,
        );
        let announcer = control.announcer(broker.publisher(), self.shutdown.clone());
        let commands = broker.serve_commands(
            self.clock.clone(),
            self.shutdown.clone(),
            not_carried_out,
            move |body, meta| {
                let control = control.clone();
                async move {
                    let meta = control::CommandMeta { user_id: meta.user_id, waited: meta.waited };
                    let response = control.handle(&body, meta).await;
                    telemetry::control_command(response.command(), response.code());
                    response.to_json()
                }
            },
        );
        (commands, announcer)
    }
}

/// Whether every organization may use a server of its own, with or without the feature flag.
fn for_all(settings: &Settings) -> bool {
    settings.delivery.custom_smtp == CustomSmtp::All
}

fn connections(settings: &Settings) -> Connections {
    Connections {
        per_organization: settings.smtp.max_connections_per_organization as usize,
        platform: settings.platform.as_ref().map_or(1, |platform| platform.max_connections as usize),
    }
}

fn wire_limits(settings: &Settings) -> WireLimits {
    WireLimits {
        max_recipients: settings.limits.max_recipients,
        max_message_bytes: settings.limits.max_message_bytes,
    }
}

/// Starts a task for each lane.
fn serve_lanes(
    settings: &Settings,
    worker: &Arc<Worker>,
    dispatcher: &Dispatcher,
    broker: &Broker,
) -> anyhow::Result<Vec<JoinHandle<()>>> {
    let serve = |lane: &Lane| {
        let deliveries = broker.lane(&lane.name).context("a lane of the settings is one of the broker's")?;
        let served = ServedLane::new(&lane.name, dispatcher.lane(lane.prefetch.into()));
        Ok(tokio::spawn(lanes::serve(worker.clone(), served, deliveries)))
    };
    settings.amqp.lanes.iter().map(serve).collect()
}

fn not_carried_out(code: &'static str) {
    telemetry::control_command("unknown", code);
}

fn dropped(lane: &str) {
    telemetry::delivery_dropped();
    tracing::error!(lane, "a delivery was dropped unsettled; it goes back to its queue");
}

/// Hands what the SMTP sessions tell to the metrics.
struct Heard;

impl Observer for Heard {
    fn phase(&self, phase: Phase, took: Duration) {
        telemetry::phase(phase, took);
    }

    fn egress_refused(&self, rule: &'static str) {
        telemetry::egress_refused(rule);
    }
}
