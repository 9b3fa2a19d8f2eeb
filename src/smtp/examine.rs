//! A session opened for its own sake: what each step of the opening found, for a person who tests a configuration.
//! Guarantee: it is the very opening that a send makes, with nothing beyond it but QUIT; it ends in time, and leaves nothing
//! behind that another session could use.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::time::{Instant, timeout_at};

use super::connect::{Found, Opening, SmtpConnector};
use super::tls::TlsFacts;
use crate::model::failure::{Failure, Phase, Reply};
use crate::model::smtp_settings::{Destination, SmtpAccount};

/// How far an opening came, and what it found on its way.
#[derive(Debug, Clone)]
pub struct Examination {
    /// Each phase that was entered, in order, with what it took. EHLO is there twice where STARTTLS was used.
    pub laps: Vec<(Phase, Duration)>,
    /// How many addresses of the host were approved.
    pub approved: usize,
    /// The address that is dialled first; once connected, the one that answered.
    pub address: Option<SocketAddr>,
    /// The greeting, where it was a 220.
    pub greeting: Option<Reply>,
    /// AUTH mechanisms by the latest EHLO reply, upper case; none before there was one.
    pub mechanisms: Option<Vec<String>>,
    /// What TLS came to; none without, or before it was up.
    pub tls: Option<TlsFacts>,
    /// The AUTH mechanism that was accepted.
    pub mechanism: Option<&'static str>,
    /// Why it did not come to its end.
    pub failure: Option<Failure>,
    /// Whether that is the time it had as a whole: the server may only be slow.
    pub overdue: bool,
}

impl SmtpConnector {
    /// Opens a session and says goodbye. The host is judged as the destination's kind asks for: an organization's, whether its
    /// configuration is stored or not, is [`Destination::Organization`].
    ///
    /// Running out of time at `by` is a timeout of the phase under way, or a failed look-up.
    pub async fn examine(
        &self,
        destination: &Destination,
        account: &SmtpAccount,
        by: Instant,
    ) -> Examination {
        let connector = self.apart();
        let mut opening = match Opening::new(&connector, destination, account) {
            Ok(opening) => opening,
            Err(failure) => return Examination::new(Found::default(), Some(failure)),
        };
        let outcome = opening.run_until(by).await;
        let (phase, found) = opening.end();
        let fault = match outcome {
            Ok(session) => {
                // Whatever comes of it, the connection is closed next.
                let _ = timeout_at(by, session.quit()).await;
                None
            }
            Err(fault) => Some(fault),
        };
        let address = found.address;
        let failure = fault.map(|fault| Failure { address, ..Failure::new(phase, fault) });
        Examination::new(found, failure)
    }
}

impl Examination {
    fn new(found: Found, failure: Option<Failure>) -> Self {
        Self {
            laps: found.laps,
            approved: found.approved,
            address: found.address,
            greeting: found.greeting,
            mechanisms: found.offers.map(|offers| offers.mechanisms),
            tls: found.tls,
            mechanism: found.mechanism,
            failure,
            overdue: found.overdue,
        }
    }
}
