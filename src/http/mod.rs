//! Health and metrics over HTTP.
//! Guarantee: answers come from memory; no request touches the broker or the database, and none changes anything.

mod readiness;

use std::net::SocketAddr;
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use tokio::net::TcpListener;

pub use readiness::{Part, Readiness};

use crate::shutdown::Shutdown;
use crate::telemetry::Metrics;

/// How often recorded samples are folded together.
const UPKEEP: Duration = Duration::from_secs(5);
/// How long requests in flight may still take once the program stops.
const LINGER: Duration = Duration::from_secs(1);

/// The address cannot be listened on.
#[derive(Debug, thiserror::Error)]
#[error(
    "http.listen: cannot listen on {address}: {source}; free the address, or set http.listen to another ip:port"
)]
pub struct BindError {
    address: SocketAddr,
    source: std::io::Error,
}

/// A bound server that does not answer yet.
#[derive(Debug)]
pub struct Server {
    listener: TcpListener,
    address: SocketAddr,
}

#[derive(Clone)]
struct Shared {
    readiness: Readiness,
    metrics: Metrics,
}

impl Server {
    /// Takes the address.
    ///
    /// # Errors
    /// When it is in use or not this machine's.
    pub async fn bind(address: SocketAddr) -> Result<Self, BindError> {
        let taken = async {
            let listener = TcpListener::bind(address).await?;
            let address = listener.local_addr()?;
            Ok(Self { listener, address })
        };
        taken.await.map_err(|source| BindError { address, source })
    }

    /// The address as bound: with the port that the system chose where 0 was asked for.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Answers until the program stops working; while it drains, health is still told.
    pub async fn serve(self, readiness: Readiness, metrics: Metrics, shutdown: Shutdown) {
        let shared = Shared { readiness, metrics: metrics.clone() };
        let stop = shutdown.clone();
        let server = axum::serve(self.listener, router(shared))
            .with_graceful_shutdown(async move { stop.stop_now().await });
        let bounded = async {
            shutdown.stop_now().await;
            tokio::time::sleep(LINGER).await;
        };
        tokio::select! {
            result = server => if let Err(error) = result {
                tracing::error!(%error, "the HTTP server ended");
            },
            () = bounded => {}
            () = upkeep(&metrics) => {}
        }
    }
}

async fn upkeep(metrics: &Metrics) {
    let mut ticks = tokio::time::interval(UPKEEP);
    loop {
        ticks.tick().await;
        metrics.upkeep();
    }
}

fn router(shared: Shared) -> Router {
    Router::new()
        .route("/livez", get(async || "ok\n"))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .with_state(shared)
}

async fn readyz(State(shared): State<Shared>) -> Response {
    let (ready, json) = shared.readiness.report();
    let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, [(header::CONTENT_TYPE, "application/json"), (header::CACHE_CONTROL, "no-store")], json)
        .into_response()
}

async fn metrics(State(shared): State<Shared>) -> Response {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], shared.metrics.render())
        .into_response()
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;

    use super::*;

    async fn get(address: SocketAddr, path: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn readiness_names_the_failing_part_until_all_are_up() {
        let server = Server::bind(SocketAddr::from(([127, 0, 0, 1], 0))).await.unwrap();
        let (address, readiness, shutdown) = (server.address(), Readiness::new(), Shutdown::new());
        let serving = tokio::spawn(server.serve(readiness.clone(), Metrics::detached(), shutdown.clone()));

        assert!(get(address, "/livez").await.starts_with("HTTP/1.1 200"));
        assert!(get(address, "/metrics").await.contains("text/plain; version=0.0.4"));
        assert!(get(address, "/console").await.starts_with("HTTP/1.1 404"));
        assert!(get(address, "/readyz").await.starts_with("HTTP/1.1 503"));

        for part in [Part::Broker, Part::Database, Part::Schema, Part::Keys] {
            readiness.up(part);
        }
        readiness.ready().await;
        let answer = get(address, "/readyz").await;
        assert!(
            answer.starts_with("HTTP/1.1 200") && answer.contains(r#"{"ready":true,"parts":{"broker":{"#)
        );

        readiness.down(Part::Database, "no answer in time");
        let answer = get(address, "/readyz").await;
        assert!(answer.starts_with("HTTP/1.1 503"), "{answer}");
        assert!(answer.contains(r#""database":{"ok":false,"detail":"no answer in time"}"#), "{answer}");

        shutdown.drain();
        assert!(get(address, "/livez").await.starts_with("HTTP/1.1 200"), "health is told while draining");
        shutdown.stop();
        serving.await.unwrap();
    }

    #[tokio::test]
    async fn an_address_in_use_is_named_with_what_to_do() {
        let first = Server::bind(SocketAddr::from(([127, 0, 0, 1], 0))).await.unwrap();
        let message = Server::bind(first.address()).await.unwrap_err().to_string();
        assert!(
            message.contains(&first.address().to_string()) && message.contains("http.listen"),
            "{message}"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_never_ends_its_request_does_not_hold_up_the_stop() {
        let server = Server::bind(SocketAddr::from(([127, 0, 0, 1], 0))).await.unwrap();
        let (address, shutdown) = (server.address(), Shutdown::new());
        let serving = tokio::spawn(server.serve(Readiness::new(), Metrics::detached(), shutdown.clone()));
        let mut client = TcpStream::connect(address).await.unwrap();
        client.write_all(b"GET /livez HT").await.unwrap();
        shutdown.stop();
        serving.await.unwrap();
    }
}
