//! How a command ended, as an exit code (contract section 7).
//! Guarantee: whether a dependency is away is told from the error's type, or a worker's code, never
//! from words.

use std::io::ErrorKind;
use std::process::ExitCode;

use super::org::Refused;
use crate::broker::{BrokerError, PublishError, RpcError};
use crate::store::StoreError;

/// The command line was not understood.
pub(super) const USAGE: u8 = 2;
const FAILED: u8 = 1;
const UNREACHABLE: u8 = 3;

/// A command that ran to its end, and already said what it found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Done {
    /// It did what it was asked.
    Well,
    /// It looked, and the answer is no.
    Badly,
}

/// An argument that was understood but cannot be used; the message names it.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct BadArgument(pub(super) String);

/// Prints the error, if there is one, and chooses the code.
pub(super) fn code(result: &anyhow::Result<Done>) -> ExitCode {
    match result {
        Ok(Done::Well) => ExitCode::SUCCESS,
        Ok(Done::Badly) => ExitCode::from(FAILED),
        Err(error) if is_closed_pipe(error) => ExitCode::SUCCESS,
        Err(error) => {
            use std::io::Write;
            // With standard error gone too, the exit code has to do.
            let _ = writeln!(std::io::stderr(), "error: {error:#}");
            ExitCode::from(if error.downcast_ref::<BadArgument>().is_some() {
                USAGE
            } else if is_away(error) {
                UNREACHABLE
            } else {
                FAILED
            })
        }
    }
}

fn is_closed_pipe(error: &anyhow::Error) -> bool {
    error
        .chain()
        .filter_map(|cause| cause.downcast_ref::<std::io::Error>())
        .any(|io| io.kind() == ErrorKind::BrokenPipe)
}

fn is_away(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        let broker = match cause.downcast_ref::<RpcError>() {
            Some(RpcError::Broker(error)) => error.is_unreachable(),
            Some(RpcError::Publish(PublishError::Lost { .. } | PublishError::Unavailable { .. })) => true,
            Some(_) => false,
            None => cause.downcast_ref::<BrokerError>().is_some_and(BrokerError::is_unreachable),
        };
        let publishing = matches!(
            cause.downcast_ref::<PublishError>(),
            Some(PublishError::Lost { .. } | PublishError::Unavailable { .. })
        );
        let store =
            cause.downcast_ref::<StoreError>().is_some_and(|e| matches!(e, StoreError::Unavailable(_)));
        let workers = cause.downcast_ref::<Refused>().is_some_and(Refused::is_unavailable);
        broker || publishing || store || workers
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(error: anyhow::Error) -> String {
        format!("{:?}", code(&Err(error)))
    }

    #[test]
    fn a_dependency_that_is_away_has_a_code_of_its_own() {
        let away = StoreError::Unavailable("no answer".into());
        let unreachable = format!("{:?}", ExitCode::from(3));
        assert_eq!(shown(anyhow::Error::from(away).context("migrating")), unreachable);
        let lost = || BrokerError::Lost { detail: "closed".into() };
        assert_eq!(shown(lost().into()), unreachable);
        assert_eq!(shown(RpcError::from(lost()).into()), unreachable);
        let failed = format!("{:?}", ExitCode::from(1));
        assert_eq!(shown(StoreError::Internal("no".into()).into()), failed);
        assert_eq!(
            shown(RpcError::from(BrokerError::Missing { object: "the queue x".into() }).into()),
            failed
        );
    }

    #[test]
    fn an_argument_that_cannot_be_used_is_a_usage_error() {
        let error = anyhow::Error::from(BadArgument("--lane x".into())).context("sending");
        assert_eq!(shown(error), format!("{:?}", ExitCode::from(USAGE)));
    }

    #[test]
    fn a_reader_that_went_away_is_no_failure() {
        let closed = std::io::Error::from(ErrorKind::BrokenPipe);
        assert_eq!(shown(anyhow::Error::from(closed).context("writing")), format!("{:?}", ExitCode::SUCCESS));
    }
}
