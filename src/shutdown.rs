//! Stopping in two stages: first take no new work, then stop working.
//! Guarantee: a stage once entered is never left, and whoever asks later learns of it at once.

use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

/// How far the stop has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    Running,
    Draining,
    Stopping,
}

/// The stop as the parts of the program see it; cheap to clone.
#[derive(Debug, Clone)]
pub struct Shutdown {
    stage: watch::Receiver<Stage>,
    raise: watch::Sender<Stage>,
}

impl Default for Shutdown {
    fn default() -> Self {
        Self::new()
    }
}

impl Shutdown {
    /// A program that runs until a stage is entered.
    pub fn new() -> Self {
        let (raise, stage) = watch::channel(Stage::Running);
        Self { stage, raise }
    }

    /// Enters stage one: take no new work, finish what is in flight.
    pub fn drain(&self) {
        self.enter(Stage::Draining);
    }

    /// Enters stage two: stop working, give the rest back.
    pub fn stop(&self) {
        self.enter(Stage::Stopping);
    }

    /// Ends when no new work is to be taken: at stage one or two.
    pub async fn stop_taking(&self) {
        self.reached(Stage::Draining).await;
    }

    /// Ends when working is to stop: at stage two.
    pub async fn stop_now(&self) {
        self.reached(Stage::Stopping).await;
    }

    /// Whether no new work is to be taken.
    pub fn is_draining(&self) -> bool {
        *self.stage.borrow() >= Stage::Draining
    }

    /// Whether working is to stop.
    pub fn is_stopping(&self) -> bool {
        *self.stage.borrow() >= Stage::Stopping
    }

    /// Listens for SIGTERM and SIGINT: the first one drains, the second one stops. Draining ends in stopping after
    /// `drain_timeout`, however it began. The returned task ends with stage two.
    ///
    /// # Errors
    /// When the system refuses the signal handlers.
    pub fn listen(&self, drain_timeout: Duration) -> std::io::Result<tokio::task::JoinHandle<()>> {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let shutdown = self.clone();
        Ok(tokio::spawn(async move {
            let mut asked = async || {
                tokio::select! {
                    _ = terminate.recv() => "SIGTERM",
                    _ = interrupt.recv() => "SIGINT",
                }
            };
            tokio::select! {
                name = asked() => {
                    tracing::info!(signal = name, "draining: no new work, sends in flight finish");
                    shutdown.drain();
                }
                () = shutdown.stop_taking() => {}
            }
            tokio::select! {
                name = asked() => tracing::warn!(signal = name, "stopping at once"),
                () = tokio::time::sleep(drain_timeout) => tracing::warn!("the drain timeout has passed, stopping"),
                () = shutdown.stop_now() => {}
            }
            shutdown.stop();
        }))
    }

    fn enter(&self, stage: Stage) {
        self.raise.send_if_modified(|current| {
            let raised = *current < stage;
            *current = stage.max(*current);
            raised
        });
    }

    async fn reached(&self, stage: Stage) {
        let mut current = self.stage.clone();
        // Fails only when every sender is gone, and `self` holds one.
        let _ = current.wait_for(|current| *current >= stage).await;
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[tokio::test]
    async fn the_first_stage_ends_the_taking_and_the_second_the_working() {
        let shutdown = Shutdown::new();
        let other = shutdown.clone();
        assert!(other.stop_taking().now_or_never().is_none() && !other.is_draining());
        shutdown.drain();
        other.stop_taking().await;
        assert!(other.is_draining() && !other.is_stopping());
        assert!(other.stop_now().now_or_never().is_none());
        shutdown.stop();
        other.stop_now().await;
        assert!(other.is_stopping());
    }

    #[tokio::test]
    async fn a_stop_cannot_be_taken_back() {
        let shutdown = Shutdown::new();
        shutdown.stop();
        shutdown.drain();
        shutdown.stop_taking().await;
        shutdown.stop_now().await;
    }

    #[tokio::test]
    async fn somebody_who_waits_already_is_told() {
        let shutdown = Shutdown::new();
        let waiter = tokio::spawn({
            let shutdown = shutdown.clone();
            async move { shutdown.stop_now().await }
        });
        tokio::task::yield_now().await;
        shutdown.stop();
        waiter.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_drain_ends_in_a_stop_when_its_time_is_up() {
        let shutdown = Shutdown::new();
        let listener = shutdown.listen(Duration::from_secs(30)).unwrap();
        let began = tokio::time::Instant::now();
        shutdown.drain();
        listener.await.unwrap();
        assert!(shutdown.is_stopping());
        assert!(began.elapsed() >= Duration::from_secs(30));
    }
}
