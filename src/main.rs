//! The `sendoff` program.

use std::process::ExitCode;

#[tokio::main]
async fn main() -> ExitCode {
    sendoff::cli::main(async |_, _| anyhow::bail!("this build has no worker")).await
}
