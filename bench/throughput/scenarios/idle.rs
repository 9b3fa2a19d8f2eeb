//! Scenario 8: how long one job takes when there is nothing else to do.
//! Guarantee: the bare SMTP transaction is made in the same run, to the same server, with a message of the same size.

use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use sendoff::clock::Clock;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;

use super::watching::{times, trickle};
use crate::broker::Broker;
use crate::context::Context;
use crate::installation::Installation;
use crate::jobs;
use crate::report::{Section, Target, figure};
use crate::sink::Sink;
use crate::stats::{median, percentile};

/// A job each so often.
const PACE: Duration = Duration::from_millis(50);
const PATIENCE: Duration = Duration::from_secs(60);

/// Scenario 8.
pub async fn run(bench: &Context, origin: String) -> anyhow::Result<Section> {
    let jobs = bench.options.jobs(500);
    let mut figures: [Vec<f64>; 4] = Default::default();
    for _ in 0..bench.options.reps() {
        let (worker, bare) = once(bench, jobs).await?;
        let found = [&worker, &bare].map(|took| [percentile(took, 50.0), percentile(took, 99.0)]);
        for (all, one) in figures.iter_mut().zip(found.concat()) {
            all.push(one);
        }
    }
    let [p50, p99, bare_p50, bare_p99] = figures.map(|all| median(&all));
    let row = |what: &str, values: [f64; 3]| {
        std::iter::once(what.to_owned()).chain(values.map(figure)).collect::<Vec<_>>()
    };
    Ok(Section {
        title: "8. idle: one job at a time".to_owned(),
        origin,
        prose: format!(
            "{jobs} jobs of one organization, 50 ms apart, from right before the publication to the server's answer to the final \
             dot. The bare transaction: MAIL, RCPT, DATA and the message on an open connection to the same server, each \
             answered before the next. The first job opens the connection and reads the configuration."
        ),
        table: vec![
            ["ms, medians", "publication to acceptance", "bare transaction", "beyond it"]
                .map(str::to_owned)
                .to_vec(),
            row("p50", [p50, bare_p50, p50 - bare_p50]),
            row("p99", [p99, bare_p99, p99 - bare_p99]),
        ],
        targets: vec![Target::at_most(
            "p99 beyond the bare transaction's median",
            p99 - bare_p50,
            25.0,
            " ms",
        )],
    })
}

/// Milliseconds of each job, and of each bare transaction.
async fn once(bench: &Context, jobs: usize) -> anyhow::Result<(Vec<f64>, Vec<f64>)> {
    let sink = Sink::own(&["ok"]).await?;
    let clock = Clock::system();
    let work = async |installation: &Installation| {
        installation.organizations(vec![("one".to_owned(), sink.port(0))]).await?;
        let worker = installation.worker().await?;
        let broker = Broker::connect(&bench.amqp_url).await?;
        let sequence = (0..jobs).map(|number| {
            let label = format!("c{number}");
            let job = jobs::confirmation(&clock, "one", &label);
            (label, job)
        });
        let given = trickle(&broker, &installation.exchange(), PACE, sequence, || false).await?;
        let took = times(&sink, &given, PATIENCE).await?;
        let bytes = sink.accepted().first().context("nothing was accepted")?.bytes;
        let bare = bare(sink.port(0), jobs, bytes).await?;
        broker.close().await?;
        worker.process.stop().await?;
        Ok((took, bare))
    };
    Installation::create(bench, Vec::new()).await?.during(work).await
}

/// Transactions on one connection, each step waited for, at the same pace.
async fn bare(port: u16, transactions: usize, bytes: usize) -> anyhow::Result<Vec<f64>> {
    let stream = TcpStream::connect(("127.0.0.1", port)).await?;
    stream.set_nodelay(true)?;
    let mut stream = BufReader::new(stream);
    reply(&mut stream).await?;
    stream.write_all(b"EHLO bench.example\r\n").await?;
    reply(&mut stream).await?;
    let line = format!("{}\r\n", "x".repeat(70));
    let message = format!("{}.\r\n", line.repeat(bytes / line.len()));
    let mut took = Vec::new();
    let mut pace = tokio::time::interval(PACE);
    for _ in 0..transactions {
        pace.tick().await;
        let begun = Instant::now();
        for said in
            ["MAIL FROM:<bench@one.example>\r\n", "RCPT TO:<bare@customer.example>\r\n", "DATA\r\n", &message]
        {
            stream.write_all(said.as_bytes()).await?;
            reply(&mut stream).await?;
        }
        took.push(begun.elapsed().as_secs_f64() * 1000.0);
    }
    Ok(took)
}

async fn reply(stream: &mut BufReader<TcpStream>) -> anyhow::Result<()> {
    loop {
        let mut line = String::new();
        ensure!(stream.read_line(&mut line).await? > 0, "the server has closed the connection");
        ensure!(line.starts_with(['2', '3']), "the server said {line}");
        if line.as_bytes().get(3) == Some(&b' ') {
            return Ok(());
        }
    }
}
