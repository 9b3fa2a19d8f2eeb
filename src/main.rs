//! The `sendoff` program: hands the arguments to the command line, and the worker to the composition root.

use std::process::ExitCode;

#[tokio::main]
async fn main() -> ExitCode {
    sendoff::cli::main(sendoff::app::worker).await
}
