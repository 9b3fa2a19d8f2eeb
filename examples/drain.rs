//! A first throughput figure: how fast one worker drains a lane to an SMTP sink.
//! Guarantee: every job is queued before the clock starts; the ledger and the events are on.
//!
//! ```text
//! smtp-sink -c 127.0.0.1:2526 1000 &            # of Postfix
//! eval "$(./dev up)"
//! cargo build --release --bin sendoff --example drain
//! SENDOFF_BIN=target/release/sendoff target/release/examples/drain 20000 127.0.0.1:2526
//! ```

use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use lapin::{BasicProperties, Connection, ConnectionProperties};
use sendoff::clock::Clock;
use serde_json::json;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::process::Command;

/// Publishes on their way at once.
const IN_FLIGHT: usize = 500;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let usage = "usage: drain JOBS SINK_HOST:PORT [CONNECTIONS]";
    let jobs: usize = arguments.next().context(usage)?.parse().context(usage)?;
    let sink = arguments.next().context(usage)?;
    let connections = arguments.next().unwrap_or_else(|| "50".to_owned());
    let (host, port) = sink.rsplit_once(':').context(usage)?;
    let prefix = format!("drain-{}", Clock::system().new_id().simple());
    let program = std::env::var("SENDOFF_BIN").context("SENDOFF_BIN names the program")?;
    let command = |arguments: &[&str]| {
        let mut command = Command::new(&program);
        command
            .args(arguments)
            .env("SENDOFF__AMQP__PREFIX", &prefix)
            .env("SENDOFF__ENCRYPTION__KEYS", "drain:Zm9yIGRldmVsb3BtZW50IG9ubHksIG5ldmVyIGxpdmU=")
            .env("SENDOFF__PLATFORM__HOST", host)
            .env("SENDOFF__PLATFORM__PORT", port)
            .env("SENDOFF__PLATFORM__SECURE", "false")
            .env("SENDOFF__PLATFORM__FROM_EMAIL", "bookings@platform.example")
            .env("SENDOFF__PLATFORM__MAX_CONNECTIONS", &connections)
            .env("SENDOFF__HTTP__LISTEN", "127.0.0.1:0")
            .env("RUST_LOG", "info")
            .stdin(Stdio::null())
            .kill_on_drop(true);
        command
    };
    let declared = command(&["topology", "declare"]).output().await?;
    ensure!(declared.status.success(), "{}", String::from_utf8_lossy(&declared.stderr));
    publish(&prefix, jobs).await?;

    let mut worker = command(&["worker"]).stderr(Stdio::piped()).spawn()?;
    let pid = worker.id().context("the worker runs")?;
    let mut log = BufReader::new(worker.stderr.take().context("piped")?).lines();
    let http = loop {
        let line = log.next_line().await?.context("the worker ended")?;
        if let Some((_, rest)) = line.split_once("http=") {
            break rest.split(' ').next().unwrap_or_default().to_owned();
        }
    };
    tokio::spawn(async move { while let Ok(Some(_)) = log.next_line().await {} });
    let wanted = r#"sendoff_jobs_settled_total{lane="notifications",outcome="sent"} "#;
    let mut started = None;
    let mut first = 0;
    loop {
        let sent = metric(&http, wanted).await?;
        if sent > 0 && started.is_none() {
            started = Some(Instant::now());
            first = sent;
        }
        if sent >= jobs {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let took = started.context("nothing was sent")?.elapsed().as_secs_f64();
    let (cpu_s, peak) = usage_of(pid)?;
    let drained = (jobs - first) as f64;
    println!(
        "{jobs} jobs: {:.0} jobs/s, {:.0} µs of worker CPU per job, peak memory {} MiB, {connections} connections",
        drained / took,
        cpu_s * 1e6 / jobs as f64,
        peak / 1024
    );
    worker.kill().await?;
    Ok(())
}

/// Queues the jobs of about 4.5 KB once composed: text, HTML and an invitation.
async fn publish(prefix: &str, jobs: usize) -> anyhow::Result<()> {
    let url = std::env::var("AMQP_URL").context("AMQP_URL")?;
    let connection = Connection::connect(&url, ConnectionProperties::default()).await?;
    let channel = connection.create_channel().await?;
    channel.confirm_select(ConfirmSelectOptions::default()).await?;
    let exchange = format!("{prefix}.jobs");
    let text = "Your booking is confirmed. We look forward to seeing you on Monday at ten.\n".repeat(12);
    let html = format!("<html><body><p>{}</p></body></html>", text.replace('\n', "<br>"));
    let mut confirms = std::collections::VecDeque::new();
    for _ in 0..jobs {
        let id = Clock::system().new_id();
        let calendar = format!(
            "BEGIN:VCALENDAR\r\nVERSION:2.0\r\nPRODID:-//Sendoff//EN\r\nMETHOD:REQUEST\r\nBEGIN:VEVENT\r\nUID:{id}\r\n\
             DTSTAMP:20261122T120000Z\r\nDTSTART:20261130T090000Z\r\nSUMMARY:Talk\r\nEND:VEVENT\r\nEND:VCALENDAR\r\n"
        );
        let job = json!({
            "version": 1, "id": id, "kind": "booking.confirmed", "to": ["Ann Lee <ann@customer.example>"],
            "subject": "Your booking is confirmed", "text": text, "html": html,
            "calendar": {"method": "REQUEST", "content": calendar},
        });
        let body = serde_json::to_vec(&job)?;
        let properties = BasicProperties::default().with_delivery_mode(2);
        let options = BasicPublishOptions::default();
        let key = "notification.booking_confirmed".into();
        confirms.push_back(
            channel.basic_publish(exchange.as_str().into(), key, options, &body, properties).await?,
        );
        if confirms.len() >= IN_FLIGHT
            && let Some(confirm) = confirms.pop_front()
        {
            confirm.await?;
        }
    }
    for confirm in confirms {
        confirm.await?;
    }
    connection.close(200, "done".into()).await?;
    Ok(())
}

async fn metric(http: &str, series: &str) -> anyhow::Result<usize> {
    let mut stream = tokio::net::TcpStream::connect(http).await?;
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    let value = answer.lines().find_map(|line| line.strip_prefix(series));
    Ok(value.and_then(|value| value.parse().ok()).unwrap_or(0))
}

/// Seconds of CPU so far and the largest resident set in KiB (proc(5)).
fn usage_of(pid: u32) -> anyhow::Result<(f64, u64)> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let fields: Vec<&str> = stat.rsplit_once(')').context("proc")?.1.split_whitespace().collect();
    let ticks: f64 = fields[11].parse::<f64>()? + fields[12].parse::<f64>()?;
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let peak = peak.and_then(|line| line.trim().split(' ').next()).unwrap_or("0");
    Ok((ticks / 100.0, peak.parse()?))
}
