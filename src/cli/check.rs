//! `sendoff check`: what a worker would need, looked at one by one.
//! Guarantee: nothing is changed or created, and what depends on a part that failed is not reported as well.

use std::collections::BTreeMap;
use std::sync::Arc;

use clap::Args;
use serde::Serialize;

use super::exit::Done;
use super::output;
use crate::broker::{self, Standing};
use crate::egress::{AllowedPorts, Egress, EgressError, EgressPolicy, ServerHost};
use crate::parts;
use crate::secrets::KeyRing;
use crate::settings::{Settings, SettingsError};
use crate::store::{OLDEST_SERVER, SchemaState, Store, StoreError};

/// Reserved for examples (RFC 2606 section 3); any answer about it will do.
const WELL_KNOWN_NAME: &str = "example.org";

#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  sendoff check && sendoff worker\n\nExit code 1 when something fails; a warning is no \
    failure."
)]
pub(super) struct CheckArgs {
    /// Print an array of {"name","status","detail"}, status one of ok, warning, unseen, failed
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Status {
    Ok,
    Warning,
    Unseen,
    Failed,
}

#[derive(Debug, Serialize)]
struct Line {
    name: String,
    status: Status,
    detail: String,
}

/// The lines so far; in words each is printed as soon as it is known.
struct Report {
    lines: Vec<Line>,
    json: bool,
}

impl Report {
    fn add(&mut self, name: &str, status: Status, detail: impl Into<String>) -> std::io::Result<()> {
        let line = Line { name: name.to_owned(), status, detail: detail.into() };
        if !self.json {
            let mark = match (line.status, output::is_terminal()) {
                (Status::Ok, true) => "✓",
                (Status::Failed, true) => "✗",
                (Status::Warning | Status::Unseen, true) => "!",
                (Status::Ok, false) => "ok     ",
                (Status::Failed, false) => "FAILED ",
                (Status::Warning, false) => "warning",
                (Status::Unseen, false) => "unseen ",
            };
            output::line(&format!("{mark} {:<14} {}", line.name, line.detail))?;
        }
        self.lines.push(line);
        Ok(())
    }

    fn judge<T>(&mut self, name: &str, result: Result<String, T>) -> std::io::Result<()>
    where
        T: std::fmt::Display,
    {
        match result {
            Ok(detail) => self.add(name, Status::Ok, detail),
            Err(error) => self.add(name, Status::Failed, error.to_string()),
        }
    }
}

pub(super) async fn run(args: &CheckArgs, loaded: Result<Settings, SettingsError>) -> anyhow::Result<Done> {
    let mut report = Report { lines: Vec::new(), json: args.json };
    match loaded {
        Err(error) => {
            for problem in error.problems() {
                report.add("settings", Status::Failed, problem)?;
            }
        }
        Ok(settings) => {
            report.add("settings", Status::Ok, "complete and usable")?;
            for warning in settings.warnings() {
                report.add("settings", Status::Warning, warning)?;
            }
            let keys = keys(&settings, &mut report)?;
            database(&settings, keys.as_deref(), &mut report).await?;
            look_at_broker(&settings, &mut report).await?;
            report.judge("dns", dns(&settings).await)?;
        }
    }
    if args.json {
        output::json(&report.lines)?;
    }
    let has_failed = report.lines.iter().any(|line| line.status == Status::Failed);
    Ok(if has_failed { Done::Badly } else { Done::Well })
}

fn keys(settings: &Settings, report: &mut Report) -> std::io::Result<Option<Arc<KeyRing>>> {
    match KeyRing::parse(&settings.encryption.keys) {
        Ok(ring) => {
            let (count, first) = (ring.ids().count(), ring.sealing_id().to_owned());
            let plural = if count == 1 { "" } else { "s" };
            report.add("keys", Status::Ok, format!("{count} key{plural}, `{first}` encrypts"))?;
            Ok(Some(Arc::new(ring)))
        }
        Err(error) => {
            report.add("keys", Status::Failed, format!("encryption.keys: {error}"))?;
            Ok(None)
        }
    }
}

async fn database(settings: &Settings, keys: Option<&KeyRing>, report: &mut Report) -> anyhow::Result<()> {
    let store = parts::store(settings, parts::COMMAND_CONNECTIONS)?;
    let server = match server(&store).await {
        Ok(server) => server,
        Err(error) => return Ok(report.add("database", Status::Failed, error.to_string())?),
    };
    report.judge("database", server)?;
    let schema = match store.schema_state().await {
        Ok(SchemaState::Current) => Ok("every migration is applied".to_owned()),
        Ok(SchemaState::Behind(missing)) if settings.database.migrate_on_start => {
            let words = format!(
                "{missing} migrations are missing; a worker's start applies them, or `sendoff migrate`"
            );
            return Ok(report.add("schema", Status::Warning, words)?);
        }
        Ok(SchemaState::Behind(missing)) => {
            Err(format!("{missing} migrations are missing; run `sendoff migrate`"))
        }
        Ok(SchemaState::Ahead) => Err("a newer sendoff has migrated it; run that one".to_owned()),
        Err(error) => Err(error.to_string()),
    };
    let is_usable = schema.is_ok();
    report.judge("schema", schema)?;
    if let Some(keys) = keys.filter(|_| is_usable) {
        report.judge("stored keys", stored_keys(&store, keys).await)?;
    }
    Ok(())
}

/// The server's fitness: the outer error is that it does not answer.
async fn server(store: &Store) -> Result<Result<String, String>, StoreError> {
    store.ping().await?;
    let version = store.server_version().await?;
    if version < OLDEST_SERVER {
        return Ok(Err(format!("PostgreSQL {version} is too old; {OLDEST_SERVER} or newer is needed")));
    }
    if store.behind_transaction_pooler().await? {
        return Ok(Err(
            "a transaction pooler stands before the database, and a worker's lock would outlive the worker; \
                       give database.url a direct address, or a pooler in session mode"
                .to_owned(),
        ));
    }
    Ok(Ok(format!("PostgreSQL {version}, direct sessions")))
}

async fn stored_keys(store: &Store, keys: &KeyRing) -> Result<String, String> {
    let found = store.try_sealed(keys).await.map_err(|error| error.to_string())?;
    if found.keyless > 0 {
        let ids: Vec<_> = found.missing_keys.iter().map(String::as_str).collect();
        return Err(format!(
            "{} configurations are sealed under keys that are not in encryption.keys: {}; add them behind the first",
            found.keyless,
            ids.join(", ")
        ));
    }
    if found.damaged > 0 {
        return Err(format!(
            "{} configurations do not open (changed outside, or another key of the same id); their passwords must be \
             entered again",
            found.damaged
        ));
    }
    let usage = store.key_usage(keys).await.map_err(|error| error.to_string())?;
    let keyless: Vec<String> = usage
        .keys
        .iter()
        .filter(|(id, rows)| rows.letters > 0 && !keys.ids().any(|known| known == id.as_str()))
        .map(|(id, rows)| format!("{} under `{id}`", rows.letters))
        .collect();
    if !keyless.is_empty() {
        return Err(format!(
            "dead letters are sealed under keys that are not in encryption.keys: {}; add them behind the first",
            keyless.join(", ")
        ));
    }
    let letters: u64 = usage.keys.values().map(|rows| rows.letters).sum();
    Ok(format!("{} configurations open; the keys of {letters} dead letters are there", found.readable))
}

async fn look_at_broker(settings: &Settings, report: &mut Report) -> anyhow::Result<()> {
    let access = match parts::access(settings) {
        Ok(access) => access,
        Err(error) => return Ok(report.add("broker", Status::Failed, format!("{error:#}"))?),
    };
    match broker::inspect(&access, &parts::topology(settings)).await {
        Err(error) => report.add("broker", Status::Failed, error.to_string())?,
        Ok(findings) => {
            let mut bad: BTreeMap<String, Vec<String>> = BTreeMap::new();
            for finding in findings {
                match finding.standing {
                    Standing::Good(seen) => report.add(&finding.subject, Status::Ok, seen)?,
                    Standing::Unseen(how) => report.add(&finding.subject, Status::Unseen, how)?,
                    Standing::Bad(what) => bad.entry(finding.subject).or_default().push(what),
                }
            }
            // An empty broker lacks everything: one line, not one per queue.
            for (subject, problems) in bad {
                let more = match problems.len() {
                    1 => String::new(),
                    several => format!(" (and {} more like it)", several - 1),
                };
                report.add(&subject, Status::Failed, format!("{}{more}", problems[0]))?;
            }
        }
    }
    Ok(())
}

/// Whether the name servers answer at all: that a name does not exist is an answer.
async fn dns(settings: &Settings) -> Result<String, String> {
    let policy = EgressPolicy::new(Vec::new(), Vec::new(), AllowedPorts::Any);
    let egress = Egress::new(policy, &settings.egress.nameservers).map_err(|error| error.to_string())?;
    let host = ServerHost::parse(WELL_KNOWN_NAME).map_err(|error| error.to_string())?;
    match egress.approve(&host, 25).await {
        Err(EgressError::DnsFailed { detail }) => Err(format!(
            "no name server answers ({detail}); set egress.nameservers, or mend the system's resolver"
        )),
        Ok(_) | Err(_) => Ok("the name servers answer".to_owned()),
    }
}
