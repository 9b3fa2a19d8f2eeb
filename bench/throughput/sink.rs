//! Whoever takes the mail: Postfix's smtp-sink, or the harness' own SMTP servers (`serve`) where times are wanted.
//! Guarantee: what is counted was accepted after the final dot, and is told by the server, not by who sent it.

use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader, Lines};
use tokio::process::{ChildStdin, ChildStdout, Command};

use super::process::Process;

/// How often counts are looked at: the resolution of every rate.
pub const LOOK_EVERY: Duration = Duration::from_millis(20);
/// Whoever takes mail listens sooner than this.
const PATIENCE: Duration = Duration::from_secs(10);

/// A message that an own server has accepted.
#[derive(Clone)]
pub struct Accepted {
    /// Which of its servers, from 0.
    pub server: usize,
    /// The recipient's local part.
    pub label: String,
    /// When, in microseconds of the system's clock.
    pub at: i64,
    /// Bytes of the message.
    pub bytes: usize,
}

#[derive(Default)]
struct Seen {
    count: u64,
    accepted: Vec<Accepted>,
}

/// A process with SMTP servers.
pub struct Sink {
    process: Process,
    ports: Vec<u16>,
    seen: Arc<Mutex<Seen>>,
    /// An own server ends when this is closed.
    _stdin: Option<ChildStdin>,
}

impl Sink {
    /// smtp-sink on a free port.
    pub async fn postfix() -> anyhow::Result<Self> {
        let port = free_port()?;
        let mut command = Command::new("smtp-sink");
        // As root it insists on another account.
        if is_root() {
            command.args(["-u", "nobody"]);
        }
        command.args(["-c", "-m", "1000", &format!("127.0.0.1:{port}"), "1000"]);
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        let mut process = Process::start(&mut command, "smtp-sink")?;
        let stdout = process.child().stdout.take().context("piped")?;
        let seen = Arc::<Mutex<Seen>>::default();
        tokio::spawn(count_postfix(stdout, seen.clone()));
        let deadline = Instant::now() + PATIENCE;
        while tokio::net::TcpStream::connect(("127.0.0.1", port)).await.is_err() {
            ensure!(Instant::now() < deadline && !process.has_ended(), "smtp-sink does not listen");
            tokio::time::sleep(LOOK_EVERY).await;
        }
        Ok(Self { process, ports: vec![port], seen, _stdin: None })
    }

    /// Own servers, one for each of these manners (`serve`).
    pub async fn own(manners: &[&str]) -> anyhow::Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("serve").args(manners).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = Process::start(&mut command, "the SMTP server")?;
        let stdin = process.child().stdin.take();
        let mut lines = BufReader::new(process.child().stdout.take().context("piped")?).lines();
        let first = tokio::time::timeout(PATIENCE, lines.next_line()).await?;
        let first = first?.context("the SMTP server did not start")?;
        let ports: Result<Vec<u16>, _> = first.split(' ').map(str::parse).collect();
        let seen = Arc::<Mutex<Seen>>::default();
        tokio::spawn(read_own(lines, seen.clone()));
        Ok(Self { process, ports: ports.context("ports")?, seen, _stdin: stdin })
    }

    /// The port of the server of this number.
    pub fn port(&self, server: usize) -> u16 {
        self.ports[server]
    }

    /// Messages accepted so far.
    pub fn count(&self) -> u64 {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).count
    }

    /// What an own server has accepted so far.
    pub fn accepted(&self) -> Vec<Accepted> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).accepted.clone()
    }

    /// How many of what an own server has accepted are such.
    pub fn count_of(&self, wanted: impl Fn(&Accepted) -> bool) -> usize {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.accepted.iter().filter(|accepted| wanted(accepted)).count()
    }

    /// Seconds of processor that it has used.
    pub fn cpu_s(&self) -> f64 {
        self.process.cpu_s().unwrap_or(f64::NAN)
    }
}

/// `sess=1 quit=0 mesg=17`, and a carriage return, whenever something has changed. Read in large pieces, so that counting
/// costs next to nothing.
async fn count_postfix(mut stdout: ChildStdout, seen: Arc<Mutex<Seen>>) {
    let mut rest = Vec::new();
    let mut piece = vec![0; 64 << 10];
    while let Ok(read @ 1..) = stdout.read(&mut piece).await {
        rest.extend_from_slice(&piece[..read]);
        let Some(end) = rest.iter().rposition(|byte| *byte == b'\r') else { continue };
        let last = rest[..end].rsplit(|byte| *byte == b'\r').next().unwrap_or_default();
        let text = String::from_utf8_lossy(last);
        if let Some(count) = text.rsplit_once('=').and_then(|(_, count)| count.trim().parse().ok()) {
            seen.lock().unwrap_or_else(PoisonError::into_inner).count = count;
        }
        rest.drain(..=end);
        tokio::time::sleep(LOOK_EVERY / 4).await;
    }
}

async fn read_own(mut lines: Lines<BufReader<ChildStdout>>, seen: Arc<Mutex<Seen>>) {
    while let Ok(Some(line)) = lines.next_line().await {
        let Some(accepted) = parse(&line) else { continue };
        let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.count += 1;
        seen.accepted.push(accepted);
    }
}

fn parse(line: &str) -> Option<Accepted> {
    let mut fields = line.split(' ');
    Some(Accepted {
        server: fields.next()?.parse().ok()?,
        label: fields.next()?.to_owned(),
        at: fields.next()?.parse().ok()?,
        bytes: fields.next()?.parse().ok()?,
    })
}

/// A port that was free a moment ago.
fn free_port() -> anyhow::Result<u16> {
    Ok(std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

fn is_root() -> bool {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata("/proc/self").is_ok_and(|own| own.uid() == 0)
}
