//! What the DNS says of a sender's domain: SPF, DMARC and MX, for a connection test's warnings.
//! Guarantee: the name servers alone are asked, nothing is dialled, the whole ends in time, and names for local use are
//! not asked for.

use std::time::Duration;

use futures_util::future::join_all;
use tokio::time::{Instant, timeout_at};

use super::approve::Egress;
use super::host::ServerHost;
use super::resolver::no_answer_within;
use crate::model::sender_records::{Answer, MailRecords, dmarc_levels};

/// All look-ups together.
const RECORDS_LIMIT: Duration = Duration::from_secs(3);

impl Egress {
    /// Looks up what a sender's domain says about its mail, all at once and within three seconds; what did not come by
    /// then has failed. A domain in Unicode is asked for in A-labels.
    ///
    /// Nobody learns from this which internal names exist: where [`Egress::approve`] refuses a name for local use before
    /// any look-up, this does not look it up either, nor does it follow an alias to one.
    pub async fn mail_records(&self, domain: &str) -> MailRecords {
        let Ok(ServerHost::Name(name)) = ServerHost::parse(domain) else {
            return MailRecords::failed("not a domain name");
        };
        if name.is_internal_name() && !self.policy().exempts_networks() {
            return MailRecords::failed("a name for local use");
        }
        let deadline = Instant::now() + RECORDS_LIMIT;
        let texts = async |name: String| bounded(deadline, self.resolver.texts(&name)).await;
        let dmarc = dmarc_levels(name.as_str()).into_iter().map(|level| texts(format!("_dmarc.{level}")));
        let (texts, exchangers, dmarc) = tokio::join!(
            texts(name.as_str().to_owned()),
            bounded(deadline, self.resolver.exchangers(name.as_str())),
            join_all(dmarc),
        );
        MailRecords { texts, exchangers, dmarc }
    }
}

async fn bounded<T>(deadline: Instant, answer: impl Future<Output = Answer<T>>) -> Answer<T> {
    let answer = timeout_at(deadline, answer).await;
    answer.unwrap_or_else(|_| Answer::Failed(no_answer_within(RECORDS_LIMIT)))
}

#[cfg(test)]
#[path = "mail_records_tests.rs"]
mod tests;
