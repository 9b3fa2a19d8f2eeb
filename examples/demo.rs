//! `./dev demo`: one booking confirmation on its way from RabbitMQ to an organization's own SMTP server.
//! Guarantee: everything is the real program; only the receiving SMTP server is the tests' own. Whatever is started here
//! is stopped at the end.

#[path = "../tests/it/support/certs.rs"]
mod certs;
#[path = "../tests/it/support/smtp_server.rs"]
mod smtp_server;

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use sendoff::clock::Clock;
use serde_json::{Value, json};
use smtp_server::{Received, SmtpServer, Tls};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, Command};
use tokio::signal::unix::{SignalKind, signal};

/// Anything that takes longer has failed.
const PATIENCE: Duration = Duration::from_secs(60);
/// The demo's account on the demo's server.
const USERNAME: &str = "bookings@acme.example";

/// What the demo's programs run with.
struct Demo {
    program: PathBuf,
    directory: tempfile::TempDir,
    organization: String,
    server: SmtpServer,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let keep = match std::env::args().nth(1).as_deref() {
        None => false,
        Some("--keep") => true,
        Some(other) => bail!("{other}: the only option is --keep"),
    };
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let demo = Demo::prepare().await?;
    let mut worker = demo.start_worker().await?;
    let outcome = tokio::select! {
        outcome = demo.run() => outcome,
        _ = interrupt.recv() => Err(anyhow::anyhow!("interrupted")),
        _ = terminate.recv() => Err(anyhow::anyhow!("terminated")),
    };
    match outcome {
        Ok(()) if keep => {
            demo.explain_keep();
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
        }
        Ok(()) => println!("How a job dies, and how to look at it then: ./dev demo --keep"),
        Err(_) => {}
    }
    stop(&mut worker).await?;
    outcome
}

impl Demo {
    async fn prepare() -> anyhow::Result<Self> {
        let program = std::env::var_os("SENDOFF_BIN").context("SENDOFF_BIN is set by ./dev demo")?;
        let directory = tempfile::tempdir()?;
        let authority = certs::Authority::new("Acme's certification authority");
        std::fs::write(directory.path().join("authority.pem"), authority.pem())?;
        let id = Clock::system().new_id().simple().to_string();
        let password = format!("secret-{}", &id[20..]);
        std::fs::write(directory.path().join("password"), &password)?;
        let certificate = authority.issue(&["localhost"]).server_config();
        let server = SmtpServer::start(|behaviour| {
            behaviour.tls = Tls::Starttls(certificate);
            behaviour.login = Some((USERNAME.to_owned(), password));
        })
        .await;
        Ok(Self { program: program.into(), directory, organization: format!("demo-{}", &id[24..]), server })
    }

    fn path(&self, file: &str) -> String {
        self.directory.path().join(file).to_string_lossy().into_owned()
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command
            .args(arguments)
            .env("SENDOFF_CONFIG", Path::new(env!("CARGO_MANIFEST_DIR")).join("config/development.toml"))
            .env("SENDOFF__AMQP__PREFIX", "sendoff-demo")
            .env("SENDOFF__SMTP__EXTRA_CA_FILES", self.path("authority.pem"))
            .stdin(Stdio::null())
            .kill_on_drop(true);
        command
    }

    async fn start_worker(&self) -> anyhow::Result<Child> {
        heading("The worker starts");
        println!("$ sendoff worker");
        let mut worker = self.command(&["worker"]).stderr(Stdio::piped()).spawn()?;
        let mut lines = BufReader::new(worker.stderr.take().context("piped")?).lines();
        let (sender, address) = tokio::sync::oneshot::channel();
        tokio::spawn(async move {
            let mut sender = Some(sender);
            while let Ok(Some(line)) = lines.next_line().await {
                let http = line.split_once("http=").and_then(|(_, rest)| rest.split(' ').next());
                if let Some(http) = http.map(str::to_owned)
                    && let Some(sender) = sender.take()
                {
                    // Nobody waits for it any more only when the demo has ended.
                    let _ = sender.send(http);
                }
                println!("  {line}");
            }
        });
        let http = tokio::time::timeout(PATIENCE, address).await.context("the worker did not start")??;
        tokio::time::timeout(PATIENCE, until_ready(&http))
            .await
            .context("the worker was not ready in time")?;
        Ok(worker)
    }

    async fn run(&self) -> anyhow::Result<()> {
        heading("The organization brings its own SMTP server");
        let (organization, port) = (self.organization.as_str(), self.server.port().to_string());
        self.sendoff(&["org", "feature", organization, "custom-smtp-for-orgs", "on"]).await?;
        let password = self.path("password");
        self.sendoff(&[
            "org",
            "smtp",
            "create",
            organization,
            "--host",
            "localhost",
            "--port",
            &port,
            "--username",
            USERNAME,
            "--password-file",
            &password,
            "--from-email",
            USERNAME,
            "--from-name",
            "Acme Consulting",
        ])
        .await?;

        heading("Does it work? The connection test sends nothing");
        self.sendoff(&["org", "smtp", "test", organization]).await?;
        println!("(Never mind the warnings: the demo's domain is made up.)");

        heading("The booking system publishes a job to RabbitMQ");
        let job = self.job()?;
        let file = self.path("job.json");
        std::fs::write(&file, serde_json::to_vec_pretty(&job)?)?;
        println!("{}", outline(&job));
        self.sendoff(&["job", "send", "--file", &file, "--wait", "--timeout", "60s"]).await?;

        let received = self.server.wait_for_messages(1, PATIENCE).await;
        let received = received.map_err(|error| anyhow::anyhow!("the server got nothing: {error:?}"))?;
        self.account_for(&received[0]);

        heading("The ledger's row");
        let id = job["id"].as_str().unwrap_or_default();
        let row = self.sendoff(&["job", "status", id, "--org", organization, "--json"]).await?;
        let row: Value = serde_json::from_str(&row).context("the row is JSON")?;
        ensure!(row["state"] == "sent", "the ledger does not say `sent`");
        heading("Done: one job in, one email out");
        Ok(())
    }

    fn job(&self) -> anyhow::Result<Value> {
        let id = Clock::system().new_id();
        Ok(json!({
            "version": 1,
            "id": id,
            "organization_id": self.organization,
            "kind": "booking.confirmed",
            "to": [{"email": "ann.lee@customer.example", "name": "Ann Lee"}],
            "subject": "Confirmed: Strategy talk on Monday, 10:00 – Grüße von Acme",
            "text": "Hello Ann,\n\nyour booking is confirmed. See you on Monday at 10:00.\n\nAcme Consulting\n",
            "html": "<p>Hello Ann,</p><p>your booking is <b>confirmed</b>. See you on Monday at 10:00.</p>",
            "calendar": {"method": "REQUEST", "content": format!(
                "BEGIN:VCALENDAR\r\nVERSION:2.0\r\nPRODID:-//Sendoff//Demo//EN\r\nMETHOD:REQUEST\r\nBEGIN:VEVENT\r\nUID:{id}\r\n\
                 SEQUENCE:0\r\nDTSTAMP:20261122T120000Z\r\nDTSTART:20261130T090000Z\r\nDTEND:20261130T100000Z\r\n\
                 SUMMARY:Strategy talk\r\nORGANIZER:mailto:{USERNAME}\r\nATTENDEE:mailto:ann.lee@customer.example\r\n\
                 END:VEVENT\r\nEND:VCALENDAR\r\n")},
            "group": format!("booking-{id}"),
            "sequence": 0,
        }))
    }

    /// Runs the program, shows what was typed and what it said, and returns that.
    async fn sendoff(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let shown: Vec<String> = arguments.iter().map(|argument| quoted(argument)).collect();
        println!("$ sendoff {}", shown.join(" "));
        let output = tokio::time::timeout(PATIENCE, self.command(arguments).output()).await??;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        said.lines().for_each(|line| println!("  {line}"));
        let complaint = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "sendoff {} failed: {complaint}", shown.join(" "));
        Ok(said)
    }

    fn account_for(&self, received: &Received) {
        heading("What the organization's server received");
        println!("  server      localhost, dialled as {}", self.server.address());
        println!("  TLS         STARTTLS, {}", received.tls.as_deref().unwrap_or("none"));
        println!("  logged in   {}", received.username.as_deref().unwrap_or("nobody"));
        println!("  envelope    from <{}> to <{}>", received.from, received.recipients.join(">, <"));
        println!();
        let text = received.text();
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
        head.lines().for_each(|line| println!("  | {line}"));
        println!("  |");
        let shown = 24;
        body.lines().take(shown).for_each(|line| println!("  | {line}"));
        let hidden = body.lines().count().saturating_sub(shown);
        if hidden > 0 {
            println!("  | … {hidden} more lines");
        }
    }

    fn explain_keep(&self) {
        println!("The worker and the SMTP server stay up until Ctrl-C. In another terminal:");
        println!();
        println!("  eval \"$(./dev up)\"");
        println!("  export SENDOFF_CONFIG=config/development.toml SENDOFF__AMQP__PREFIX=sendoff-demo");
        println!("  sendoff() {{ {} \"$@\"; }}", self.program.display());
        let message = "--to you@example.org --subject Hello --text 'It works'";
        println!("  sendoff job send --org {} {message} --wait", self.organization);
        println!();
        println!("This one dies, for the organization has no server, and there is none of the platform:");
        println!();
        println!("  sendoff job send --org nobody {message} --wait");
        println!("  sendoff dead list");
        println!("  sendoff dead show ID");
        println!();
        println!(
            "This one waits (parked) while the password is wrong, and goes out by itself once it is right again:"
        );
        println!();
        let organization = &self.organization;
        println!("  echo not-it | sendoff org smtp update {organization} --password-stdin");
        println!("  sendoff job send --org {organization} {message}");
        println!("  sendoff org smtp test {organization}");
        println!("  sendoff dead list --state parked");
        println!("  sendoff org smtp update {organization} --password-file {}", self.path("password"));
        println!("  sendoff job status ID");
        println!();
        println!("`./dev down` stops what `./dev up` keeps running.");
    }
}

async fn until_ready(http: &str) {
    loop {
        if let Ok(mut stream) = tokio::net::TcpStream::connect(http).await {
            let request = b"GET /readyz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
            let mut answer = String::new();
            let asked = stream.write_all(request).await.is_ok();
            if asked && stream.read_to_string(&mut answer).await.is_ok() && answer.starts_with("HTTP/1.1 200")
            {
                return;
            }
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

async fn stop(worker: &mut Child) -> anyhow::Result<()> {
    if let Some(pid) = worker.id() {
        // A worker that has ended by itself has nobody left to be told.
        let _ = Command::new("kill").args(["-s", "TERM", &pid.to_string()]).status().await;
        let status =
            tokio::time::timeout(PATIENCE, worker.wait()).await.context("the worker did not stop")??;
        ensure!(status.success(), "the worker ended with {status}");
    }
    Ok(())
}

/// The job's first lines of meaning; the calendar's text would fill the screen.
fn outline(job: &Value) -> String {
    let mut job = job.clone();
    job["calendar"]["content"] = json!("BEGIN:VCALENDAR …");
    let text = serde_json::to_string_pretty(&job).unwrap_or_default();
    text.lines().map(|line| format!("  {line}")).collect::<Vec<_>>().join("\n")
}

fn quoted(argument: &str) -> String {
    if argument.contains(' ') { format!("'{argument}'") } else { argument.to_owned() }
}

fn heading(text: &str) {
    println!("\n== {text}\n");
}
