//! Processes that are measured: what they have used of processor and memory, read from outside (proc(5)).
//! Guarantee: whatever was started here is killed when it is dropped.

use std::collections::HashMap;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, ensure};
use tokio::process::{Child, Command};

/// What proc(5) counts in: USER_HZ is 100 on every Linux.
const TICKS_PER_S: f64 = 100.0;
/// Anything that takes longer to end has failed.
const PATIENCE: Duration = Duration::from_secs(60);

/// A child that is measured.
pub struct Process {
    child: Child,
    pid: u32,
    what: String,
}

impl Process {
    /// Starts it; `what` is its name in errors.
    pub fn start(command: &mut Command, what: &str) -> anyhow::Result<Self> {
        let child = command.kill_on_drop(true).spawn().with_context(|| format!("starting {what}"))?;
        let pid = child.id().with_context(|| format!("{what} has ended"))?;
        Ok(Self { child, pid, what: what.to_owned() })
    }

    /// The child, for its pipes.
    pub fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    /// Seconds of processor, user and system, so far. Also of one that has ended and that nobody has waited for.
    pub fn cpu_s(&self) -> anyhow::Result<f64> {
        cpu_s(self.pid).with_context(|| format!("{} has ended", self.what))
    }

    /// The largest resident set so far, in MiB; none of one that has ended.
    pub fn peak_mib(&self) -> Option<f64> {
        status_mib(self.pid, "VmHWM:")
    }

    /// The resident set now, in MiB.
    pub fn resident_mib(&self) -> Option<f64> {
        status_mib(self.pid, "VmRSS:")
    }

    /// Whether it has ended, without waiting for it.
    pub fn has_ended(&self) -> bool {
        state(self.pid).is_none_or(|state| state == 'Z')
    }

    /// Asks it to end, and waits until it has. Every worker here ends in order at a SIGTERM.
    pub async fn stop(mut self) -> anyhow::Result<()> {
        signal(self.pid, "TERM").await?;
        let ended = tokio::time::timeout(PATIENCE, self.child.wait()).await;
        let status = ended.with_context(|| format!("{} does not end", self.what))??;
        ensure!(status.success(), "{} ended with {status}", self.what);
        Ok(())
    }

    /// Waits until it ends by itself.
    pub async fn wait(mut self) -> anyhow::Result<()> {
        let status = self.child.wait().await?;
        ensure!(status.success(), "{} ended with {status}", self.what);
        Ok(())
    }
}

async fn signal(pid: u32, name: &str) -> anyhow::Result<()> {
    let status = Command::new("kill").args(["-s", name, &pid.to_string()]).status().await?;
    ensure!(status.success(), "process {pid} cannot be signalled");
    Ok(())
}

/// A service that was started elsewhere, with all its processes.
pub struct Service {
    root: u32,
}

impl Service {
    /// The service that notes its id in this file; none where there is no such file, say because the service is the
    /// caller's own.
    pub fn of_file(path: &Path) -> Option<Self> {
        let text = std::fs::read_to_string(path).ok()?;
        let root = text.split_whitespace().next()?.parse().ok()?;
        state(root).map(|_| Self { root })
    }

    /// Seconds of processor of the process, its descendants and those of them that have ended; `NaN` when it is gone.
    pub fn cpu_s(&self) -> f64 {
        let Ok(processes) = std::fs::read_dir("/proc") else { return f64::NAN };
        let pids = processes.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok());
        let parents: HashMap<u32, u32> =
            pids.filter_map(|pid| Some((pid, stat(pid).ok()?.get(1)?.parse().ok()?))).collect();
        let belongs = |mut pid: u32| {
            while pid != self.root {
                match parents.get(&pid) {
                    Some(parent) if *parent > 1 => pid = *parent,
                    _ => return false,
                }
            }
            true
        };
        if !parents.contains_key(&self.root) {
            return f64::NAN;
        }
        let own = |pid: &u32| {
            // Those that it has waited for count where they were waited for.
            let fields = stat(*pid).ok()?;
            let ticks: f64 = fields.get(11..15)?.iter().filter_map(|field| field.parse::<f64>().ok()).sum();
            Some(ticks / TICKS_PER_S)
        };
        parents.keys().filter(|pid| belongs(**pid)).filter_map(own).sum()
    }
}

fn cpu_s(pid: u32) -> anyhow::Result<f64> {
    let fields = stat(pid)?;
    let ticks: f64 = fields
        .get(11..13)
        .context("proc(5) has changed")?
        .iter()
        .filter_map(|field| field.parse::<f64>().ok())
        .sum();
    Ok(ticks / TICKS_PER_S)
}

fn state(pid: u32) -> Option<char> {
    stat(pid).ok()?.first()?.chars().next()
}

/// The fields behind the name, state first.
fn stat(pid: u32) -> anyhow::Result<Vec<String>> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let (_, fields) = stat.rsplit_once(')').context("proc(5) has changed")?;
    Ok(fields.split_whitespace().map(str::to_owned).collect())
}

fn status_mib(pid: u32, field: &str) -> Option<f64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let value = status.lines().find_map(|line| line.strip_prefix(field))?;
    Some(value.trim().split(' ').next()?.parse::<f64>().ok()? / 1024.0)
}
