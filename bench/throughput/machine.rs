//! What a result was measured on: the machine, and every version that matters.
//! Guarantee: what cannot be found out is said to be unknown; nothing is named that was not asked.

use std::path::Path;

use tokio::process::Command;

use super::context::Context;

/// The report's head: machine and versions.
pub async fn describe(bench: &Context) -> String {
    let cpu = field("/proc/cpuinfo", "model name").unwrap_or_else(unknown);
    let cores = std::thread::available_parallelism().map_or_else(|_| unknown(), |cores| cores.to_string());
    let memory = field("/proc/meminfo", "MemTotal")
        .and_then(|text| text.split(' ').next()?.parse::<f64>().ok())
        .map_or_else(unknown, |kib| format!("{:.0} GiB", kib / 1024.0 / 1024.0));
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease")
        .map_or_else(|_| unknown(), |text| text.trim().to_owned());
    let broker = bench.services.join("rabbitmq");
    let dev = Path::new(env!("CARGO_MANIFEST_DIR")).join("dev").to_string_lossy().into_owned();
    let rabbitmq = if bench.rabbitmq.is_some() {
        said(&dev, &["service", "ctl", "rabbitmq", &broker.to_string_lossy(), "version"]).await
    } else {
        unknown()
    };
    let node = bench.peer("nodemailer").join("node_modules");
    let pip = bench.peer("aiosmtplib").join("requirements.txt");
    let lock = Path::new(env!("CARGO_MANIFEST_DIR")).join("bench/peers/lettre/Cargo.lock");
    let python = bench.peer("aiosmtplib").join("venv/bin/python").to_string_lossy().into_owned();
    let rows = [
        (
            "processor",
            format!("{cpu}, {cores} cores; everything runs on it: worker, broker, database, sink, harness"),
        ),
        ("memory", memory),
        ("kernel", kernel),
        ("rustc", said("rustc", &["--version"]).await),
        ("RabbitMQ", rabbitmq),
        ("PostgreSQL", postgres(&bench.database_url).await.unwrap_or_else(|_| unknown())),
        ("Postfix", said("postconf", &["-d", "-h", "mail_version"]).await),
        ("node", said("node", &["--version"]).await),
        ("nodemailer", json_version(&node.join("nodemailer/package.json"))),
        ("amqplib", json_version(&node.join("amqplib/package.json"))),
        ("python", said(&python, &["--version"]).await),
        ("aiosmtplib", pinned(&pip, "aiosmtplib")),
        ("aio-pika", pinned(&pip, "aio-pika")),
        ("lettre", locked(&lock, "lettre")),
        ("lapin", locked(&lock, "lapin")),
    ];
    let rows = std::iter::once(vec!["machine of the latest run".to_owned(), String::new()])
        .chain(rows.into_iter().map(|(what, value)| vec![what.to_owned(), value]));
    format!(
        "# Results\n\nWritten by `./dev bench`; [README.md](README.md) says what is measured and how to read it.\n\n{}",
        super::report::table(&rows.collect::<Vec<_>>())
    )
}

fn unknown() -> String {
    "unknown".to_owned()
}

fn field(path: &str, name: &str) -> Option<String> {
    let text = std::fs::read_to_string(path).ok()?;
    let line = text.lines().find(|line| line.starts_with(name))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

async fn said(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().await;
    let text = output.ok().filter(|output| output.status.success()).map(|output| output.stdout);
    let text = text.map(|text| String::from_utf8_lossy(&text).trim().to_owned());
    text.filter(|text| !text.is_empty()).unwrap_or_else(unknown)
}

async fn postgres(url: &str) -> anyhow::Result<String> {
    use sqlx::Connection;
    let mut session = sqlx::PgConnection::connect(url).await?;
    Ok(sqlx::query_scalar("SHOW server_version").fetch_one(&mut session).await?)
}

fn json_version(path: &Path) -> String {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let value: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
    value["version"].as_str().map_or_else(unknown, str::to_owned)
}

fn pinned(path: &Path, name: &str) -> String {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix("=="));
    line.map_or_else(unknown, str::to_owned)
}

fn locked(path: &Path, name: &str) -> String {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let mut lines = text.lines().skip_while(|line| *line != format!("name = \"{name}\""));
    let version = lines.nth(1).and_then(|line| line.strip_prefix("version = "));
    version.map_or_else(unknown, |version| version.trim_matches('"').to_owned())
}
