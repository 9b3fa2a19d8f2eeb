//! A way out to SMTP servers for the control commands.
//! Guarantee: it trusts the given authorities beside the system's, and waits long enough for a busy machine.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use sendoff::egress::Egress;
use sendoff::smtp::{Deadlines, SmtpConnector, SmtpOptions, TlsRoots};

const LIMIT: Duration = Duration::from_secs(30);

/// Under this rule for addresses, with no authority added.
pub fn connector(egress: Arc<Egress>) -> SmtpConnector {
    connector_trusting(egress, &[])
}

/// The same, with PEM files of authorities.
pub fn connector_trusting(egress: Arc<Egress>, authorities: &[PathBuf]) -> SmtpConnector {
    let roots = TlsRoots::load(authorities).expect("usable files");
    let deadlines = Deadlines { connect: LIMIT, command: LIMIT, data: LIMIT, final_reply: LIMIT };
    let options =
        SmtpOptions { deadlines, hello_name: "client.test".to_owned(), allow_plaintext_auth: false };
    SmtpConnector::new(egress, roots, options, Arc::new(()))
}
