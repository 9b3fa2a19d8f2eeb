//! One table of decisions.

use super::failure::{EnhancedCode, Reply};

/// Whether a refused AUTH speaks of the mechanism (504, 5.7.4) and not of the credentials, so that the next mechanism
/// may be tried. After any other refusal a second try could lock the account.
pub fn auth_may_try_next(reply: &Reply) -> bool {
    reply.code == 504 || reply.enhanced == Some(EnhancedCode(5, 7, 4))
}
