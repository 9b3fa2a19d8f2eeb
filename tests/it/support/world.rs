//! A world of a test's own: database, broker prefix, SMTP servers, and the real program as its worker.
//! Guarantee: nothing is shared with another test, and a worker that outlives its test is killed.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::{Arc, Mutex};

use lapin::BasicProperties;
use secrecy::ExposeSecret;
use sendoff::broker::{Access, AmqpUrl};
use sendoff::clock::Clock;
use sendoff::model::job::JobKey;
use sendoff::model::ledger::{JobStatus, State};
use sendoff::model::organization::OrganizationId;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, Command};
use tokio::task::JoinHandle;
use uuid::Uuid;

use super::broker::{Events, TestBroker, amqp_url, eventually};
use super::certs::Authority;
use super::database::TestDatabase;
use super::smtp_server::{Behaviour, Received, SmtpServer, Tls};

pub use super::broker::SOON;
/// What every server of a test demands.
pub const USERNAME: &str = "mailer@acme.example";
/// What every server of a test demands.
pub const PASSWORD: &str = " pässword with \"quotes\" ";
/// The key that configurations are sealed under.
pub const KEYS: &str = "k1:MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY=";

/// Another one.
pub const NEW_KEY: &str = "k2:ZmVkY2JhOTg3NjU0MzIxMGZlZGNiYTk4NzY1NDMyMTA=";

/// An address of this process's own, one for each `last`. Unlike at 127.0.0.1, where every connection and every other
/// test's server takes one, a port that was free there once stays free.
pub fn own_address(last: u8) -> IpAddr {
    let [.., high, low] = std::process::id().to_be_bytes();
    IpAddr::V4(Ipv4Addr::new(127, 128 | high, low, last))
}

/// Everything one test needs.
pub struct World {
    /// Its database.
    pub database: TestDatabase,
    /// Its prefix on the broker.
    pub broker: TestBroker,
    /// Every event of its worker.
    pub events: Events,
    /// The organizations' server: STARTTLS and a login.
    pub server: SmtpServer,
    /// The platform's server: plaintext, no login.
    pub platform: SmtpServer,
    /// The authority that the worker trusts.
    pub authority: Authority,
    directory: tempfile::TempDir,
    settings: BTreeMap<String, String>,
}

/// The program, running as a worker.
pub struct WorkerProcess {
    child: Child,
    http: SocketAddr,
    log: Arc<Mutex<String>>,
    reading: JoinHandle<()>,
}

impl World {
    /// A world in which everything works, with a short retry schedule.
    pub async fn new() -> Self {
        Self::with(|_| {}).await
    }

    /// A world whose organizations' server behaves differently.
    pub async fn with(configure: impl FnOnce(&mut Behaviour)) -> Self {
        let authority = Authority::new("Sendoff test authority");
        let certificate = authority.issue(&["localhost", "127.0.0.1"]).server_config();
        let server = SmtpServer::start(|behaviour| {
            behaviour.tls = Tls::Starttls(certificate);
            behaviour.login = Some((USERNAME.into(), PASSWORD.into()));
            configure(behaviour);
        });
        let platform = SmtpServer::start(|_| {});
        let broker = TestBroker::with_lane("w", &[1, 2, 5, 30, 120, 600]);
        let (server, platform, broker, database) =
            tokio::join!(server, platform, broker, TestDatabase::migrated());
        broker.declare().await;
        broker.declare_tap().await;
        let directory = tempfile::tempdir().expect("a temporary directory");
        let authority_file = directory.path().join("authority.pem");
        std::fs::write(&authority_file, authority.pem()).expect("written");
        let config = directory.path().join("sendoff.toml");
        let lanes =
            "[[amqp.lanes]]\nname = \"notifications\"\nbindings = [\"notification.#\"]\nprefetch = 100\n";
        std::fs::write(&config, lanes).expect("written");
        let mut world = Self {
            events: broker.events().await,
            database,
            broker,
            server,
            platform,
            authority,
            directory,
            settings: BTreeMap::new(),
        };
        let platform_port = world.platform.port().to_string();
        let database_url = world.database.url().expose_secret().to_owned();
        let prefix = world.broker.prefix.clone();
        for (key, value) in [
            ("SENDOFF_CONFIG", config.to_str().expect("a path in UTF-8")),
            ("DATABASE_URL", &database_url),
            ("AMQP_URL", &amqp_url()),
            ("SENDOFF__AMQP__PREFIX", &prefix),
            ("SENDOFF__ENCRYPTION__KEYS", KEYS),
            ("SENDOFF__EGRESS__ALLOW_NETWORKS", "127.0.0.0/8"),
            ("SENDOFF__EGRESS__ALLOWED_PORTS", "*"),
            ("SENDOFF__SMTP__EXTRA_CA_FILES", authority_file.to_str().expect("a path in UTF-8")),
            ("SENDOFF__SMTP__HELLO_NAME", "worker.sendoff.example"),
            // Nothing here is cut off because the machine is busy; a test of a silent server says how long it waits.
            ("SENDOFF__SMTP__COMMAND_TIMEOUT_S", "60"),
            ("SENDOFF__SMTP__CONNECT_TIMEOUT_S", "60"),
            ("SENDOFF__SMTP__IDLE_TIMEOUT_S", "300"),
            ("SENDOFF__RETRY__SCHEDULE_S", "1,2"),
            ("SENDOFF__HTTP__LISTEN", "127.0.0.1:0"),
            ("SENDOFF__PLATFORM__HOST", "127.0.0.1"),
            ("SENDOFF__PLATFORM__PORT", &platform_port),
            ("SENDOFF__PLATFORM__SECURE", "false"),
            ("SENDOFF__PLATFORM__FROM_EMAIL", "no-reply@platform.example"),
            ("SENDOFF__PLATFORM__FROM_NAME", "The Platform"),
            ("RUST_LOG", "sendoff=debug,info"),
        ] {
            world.set(key, value);
        }
        world
    }

    /// Sets an environment variable for the programs started from now on.
    pub fn set(&mut self, key: &str, value: &str) {
        self.settings.insert(key.to_owned(), value.to_owned());
    }

    /// Unsets it.
    pub fn unset(&mut self, key: &str) {
        self.settings.remove(key);
    }

    /// A file of this world's.
    pub fn file(&self, name: &str, content: &[u8]) -> PathBuf {
        let path = self.directory.path().join(name);
        std::fs::write(&path, content).expect("written");
        path
    }

    /// Access to the broker under test.
    pub fn access() -> Access {
        Access::new(AmqpUrl::parse(&amqp_url()).expect("AMQP_URL is an AMQP URL"))
    }

    /// The program with this world's settings and nothing of the test's environment.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sendoff"));
        command.args(arguments).env_clear().envs(&self.settings).kill_on_drop(true);
        if let Some(path) = std::env::var_os("PATH") {
            command.env("PATH", path);
        }
        command
    }

    /// Runs the program to its end: exit code, standard output, standard error.
    pub async fn run(&self, arguments: &[&str]) -> (i32, String, String) {
        let output = self.command(arguments).stdin(Stdio::null()).output().await.expect("the program starts");
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("UTF-8");
        (output.status.code().unwrap_or(-1), text(output.stdout), text(output.stderr))
    }

    /// Starts a worker and waits until it is ready.
    pub async fn worker(&self) -> WorkerProcess {
        let worker = self.worker_starting(&[]).await;
        worker.ready().await;
        worker
    }

    /// Starts a worker and waits only until it serves HTTP.
    pub async fn worker_starting(&self, arguments: &[&str]) -> WorkerProcess {
        WorkerProcess::start(self.command(&[&["worker"], arguments].concat())).await
    }

    /// Sends a control command and returns its reply.
    pub async fn control(&self, command: Value) -> Value {
        let body = serde_json::to_vec(&command).expect("JSON");
        let now = Clock::system().now();
        let reply = sendoff::broker::call(&Self::access(), &self.broker.prefix, &body, now, SOON).await;
        serde_json::from_slice(&reply.expect("a reply")).expect("replies are JSON")
    }

    /// The same; it is given again where a busy database or name server did not answer in time, which says that nothing
    /// was changed.
    pub async fn answered(&self, command: Value) -> Value {
        let mut reply = Value::Null;
        eventually(&format!("{} is answered in time", command["command"]), async || {
            reply = self.control(command.clone()).await;
            !["unavailable", "dns_failed"].contains(&reply["error"]["code"].as_str().unwrap_or_default())
        })
        .await;
        reply
    }

    /// A control command that must succeed; its result. It is given again where it is not known whether it did.
    pub async fn commanded(&self, command: &str, organization: &str, params: Value) -> Value {
        let body = json!({"command": command, "organization_id": organization, "params": params});
        let (mut reply, mut doubts) = (Value::Null, 0);
        eventually(&format!("the outcome of {command} is known"), async || {
            reply = self.answered(body.clone()).await;
            let words = reply["error"]["message"].as_str().unwrap_or_default();
            let known = !words.contains("not known whether the change was made");
            doubts += usize::from(!known);
            known
        })
        .await;
        if doubts > 0 {
            match (command, reply["error"]["code"].as_str()) {
                ("smtp_config.create", Some("already_exists")) => {
                    let get = json!({"command": "smtp_config.get", "organization_id": organization});
                    reply = self.answered(get).await;
                }
                ("smtp_config.delete", Some("not_found")) => return json!({}),
                _ => {}
            }
        }
        assert_eq!(reply["ok"], true, "{command}: {reply}");
        reply["result"].clone()
    }

    /// An organization that uses the organizations' server, with the feature flag on. Needs a worker.
    pub async fn organization(&self, id: &str) {
        self.organization_at(id, json!({})).await;
    }

    /// The same with some of the configuration's fields replaced.
    pub async fn organization_at(&self, id: &str, fields: Value) {
        let flag = json!({"feature": "custom-smtp-for-orgs", "enabled": true});
        self.commanded("feature.set", id, flag).await;
        let mut params = json!({
            "from_email": format!("hello@{id}.example"), "from_name": format!("Team {id}"),
            "host": "localhost", "port": self.server.port(),
            "username": USERNAME, "password": PASSWORD, "secure": true,
        });
        for (key, value) in fields.as_object().expect("fields are an object") {
            params[key] = value.clone();
        }
        self.commanded("smtp_config.create", id, params).await;
    }

    /// Publishes a job to the notifications' lane; its id.
    pub async fn publish(&self, job: &Value) -> Uuid {
        self.publish_with(job, BasicProperties::default()).await
    }

    /// The same with properties of the publisher's choice.
    pub async fn publish_with(&self, job: &Value, properties: BasicProperties) -> Uuid {
        let body = serde_json::to_vec(job).expect("JSON");
        self.broker.publish_job("notification.test", &body, properties).await;
        job["id"].as_str().and_then(|id| id.parse().ok()).expect("a job of a test has an id")
    }

    /// Ends the wait of the one job that is put off for so many seconds: with a long wait and this, a test decides what
    /// comes before the next attempt, and not the machine.
    pub async fn retry_now(&self, delay_s: u32, id: Uuid) {
        let copy = self.broker.take(&self.broker.name(&format!("retry.notifications.{delay_s}"))).await;
        self.database.run(format!("UPDATE jobs SET not_before = now() WHERE id = '{id}'")).await;
        self.broker.publish(&self.broker.name("jobs.notifications"), "", &copy.body, copy.properties).await;
    }

    /// The next event of that type about a job.
    pub async fn event(&self, kind: &str, id: Uuid) -> Value {
        let of_job = |event: &Value| event["type"] == kind && event["job_id"] == id.to_string();
        self.events.wait_for(of_job, SOON).await
    }

    /// How many different events of a type there were about a job so far. Events come at least once: one that is said
    /// again, for a copy that came again, counts once.
    pub fn event_count(&self, kind: &str, id: Uuid) -> usize {
        let mut different: Vec<Value> = Vec::new();
        for mut event in self.all_events(kind, id) {
            event["at"] = Value::Null;
            if !different.contains(&event) {
                different.push(event);
            }
        }
        different.len()
    }

    /// Every event of a type about a job so far, those said again too.
    pub fn all_events(&self, kind: &str, id: Uuid) -> Vec<Value> {
        let of_job = |event: &Value| event["type"] == kind && event["job_id"] == id.to_string();
        self.events.all().into_iter().filter(of_job).collect()
    }

    /// Waits until the organizations' server has so many messages.
    pub async fn received(&self, count: usize) -> Vec<Received> {
        self.server.wait_for_messages(count, SOON).await.unwrap_or_else(|error| panic!("{error:?}"))
    }

    /// The ledger's row of a job.
    pub async fn status(&self, organization: Option<&str>, id: Uuid) -> Option<JobStatus> {
        let organization = organization.map(|id| OrganizationId::parse(id).expect("an organization's id"));
        self.database.store().job_status(&JobKey { organization, id }).await.expect("the database answers")
    }

    /// Waits until the ledger has a job in a state; its row.
    pub async fn state(&self, organization: Option<&str>, id: Uuid, state: State) -> JobStatus {
        let mut found = None;
        eventually(&format!("{id} is {}", state.as_str()), async || {
            found = self.status(organization, id).await.filter(|status| status.state == state);
            found.is_some()
        })
        .await;
        found.expect("just seen")
    }

    /// The next dead letter, taken off the tap: body, reason, detail.
    pub async fn dead_letter(&self) -> (Vec<u8>, String, String) {
        let letter = self.broker.take(&self.broker.tap()).await;
        let header = |name| letter.text(name).unwrap_or_default();
        let (reason, detail) = (header("sendoff-reason"), header("sendoff-detail"));
        (letter.body, reason, detail)
    }

    /// Deletes what is on the broker. Queues of a failed test stay until the broker is stopped.
    pub async fn end(self) {
        self.broker.clean_up().await;
    }
}

/// A job that every version of the tests can send.
pub fn job(organization: Option<&str>) -> Value {
    json!({
        "version": 1, "id": Clock::system().new_id(), "organization_id": organization, "kind": "booking.confirmed",
        "to": ["Ann Lee <ann@customer.example>"], "subject": "Your booking is confirmed",
        "text": "See you on Monday.",
    })
}

impl Drop for WorkerProcess {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the worker's log:\n{}", self.log());
        }
    }
}

impl WorkerProcess {
    /// Starts the program and reads from its log where it serves HTTP.
    pub async fn start(mut command: Command) -> Self {
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the program starts");
        let log = Arc::new(Mutex::new(String::new()));
        let mut lines = BufReader::new(child.stderr.take().expect("piped")).lines();
        let (found, address) = tokio::sync::oneshot::channel();
        let (to, mut found) = (log.clone(), Some(found));
        let reading = tokio::spawn(async move {
            while let Ok(Some(line)) = lines.next_line().await {
                let address =
                    line.split_once("http=").and_then(|(_, rest)| rest.split(' ').next()?.parse().ok());
                if let (Some(address), Some(found)) = (address, found.take_if(|_| address.is_some())) {
                    let _ = found.send(address);
                }
                let mut log = to.lock().expect("no panic under the lock");
                log.push_str(&line);
                log.push('\n');
            }
        });
        let http = tokio::time::timeout(SOON, address).await.ok().and_then(Result::ok);
        let http =
            http.unwrap_or_else(|| panic!("the worker did not start: {}", log.lock().expect("no panic")));
        Self { child, http, log, reading }
    }

    /// Waits until `/readyz` says yes.
    pub async fn ready(&self) {
        eventually(&format!("the worker is ready: {}", self.log()), async || {
            self.get("/readyz").await.0 == 200
        })
        .await;
    }

    /// An HTTP GET: status and body.
    pub async fn get(&self, path: &str) -> (u16, String) {
        let mut stream = tokio::net::TcpStream::connect(self.http).await.expect("the worker serves HTTP");
        let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.expect("written");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.expect("an answer");
        let status = answer.split(' ').nth(1).and_then(|code| code.parse().ok()).expect("a status line");
        let body = answer.split_once("\r\n\r\n").map(|(_, body)| body.to_owned()).unwrap_or_default();
        (status, body)
    }

    /// A counter or gauge as `/metrics` shows it: the whole name with its labels. 0 when it is not there.
    pub async fn metric(&self, series: &str) -> f64 {
        let (_, text) = self.get("/metrics").await;
        let line = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        line.and_then(|value| value.parse().ok()).unwrap_or(0.0)
    }

    /// Everything logged so far.
    pub fn log(&self) -> String {
        self.log.lock().expect("no panic under the lock").clone()
    }

    /// Waits until the log holds a text.
    pub async fn logs(&self, text: &str) {
        eventually(&format!("the log says {text:?}"), async || self.log().contains(text)).await;
    }

    /// Sends a signal: `TERM`, `INT`, `STOP`, `CONT`.
    pub async fn signal(&self, name: &str) {
        let pid = self.child.id().expect("the worker runs").to_string();
        let status = Command::new("kill").args(["-s", name, &pid]).status().await.expect("kill");
        assert!(status.success(), "kill -s {name}");
    }

    /// SIGKILL: no chance to tidy up.
    pub async fn kill(mut self) {
        self.child.kill().await.expect("killed");
    }

    /// Waits for the end; the exit code and the whole log.
    pub async fn ended(mut self) -> (i32, String) {
        let status = tokio::time::timeout(SOON, self.child.wait()).await;
        let status = status.unwrap_or_else(|_| panic!("the worker does not end: {}", self.log()));
        let read = tokio::time::timeout(SOON, &mut self.reading).await;
        read.expect("its log ends with it").expect("no panic over its log");
        (status.expect("its status").code().unwrap_or(-1), self.log())
    }

    /// SIGTERM, then its end; it must be a clean one.
    pub async fn stop(self) {
        self.signal("TERM").await;
        let (code, log) = self.ended().await;
        assert_eq!(code, 0, "{log}");
    }
}
