//! Questions to a database that may be away for a while.
//! Guarantee: one that may have been carried out is only ever asked again, never taken for failed.

use std::time::Duration;

use tokio::time::Instant;

use super::StoreError;

/// Between two tries.
const PAUSE: Duration = Duration::from_millis(500);

/// There is no answer.
#[derive(Debug)]
pub enum Stopped {
    /// The person does not want to wait.
    Asked,
    /// Away until the deadline, or refused.
    Failed(StoreError),
}

/// Asks until there is an answer, the deadline has passed, or `stop` ends a pause.
pub async fn until<T>(
    deadline: Instant,
    stop: impl Future<Output = ()>,
    question: impl AsyncFn() -> Result<T, StoreError>,
) -> Result<T, Stopped> {
    let mut stop = std::pin::pin!(stop);
    loop {
        let error = match question().await {
            Ok(answer) => return Ok(answer),
            Err(error) => error,
        };
        if !matches!(error, StoreError::Unavailable(_)) || Instant::now() >= deadline {
            return Err(Stopped::Failed(error));
        }
        tokio::select! {
            biased;
            () = &mut stop => return Err(Stopped::Asked),
            () = tokio::time::sleep(PAUSE) => {}
        }
    }
}
