//! Which server a job goes to: its organization's own, or the platform's.
//! Guarantee: without a flag (where one is needed) or a configuration, an organization's mail takes the platform's
//! server; it never takes another organization's.

use std::sync::Arc;

use crate::model::failure::Reason;
use crate::model::health::Health;
use crate::model::organization::OrganizationId;
use crate::model::provider::Limited;
use crate::model::smtp_settings::{Destination, SmtpAccount};
use crate::settings::CustomSmtp;
use crate::store::{RouteFacts, StoredAccount, Unreadable};

/// Where a job goes.
#[derive(Debug, Clone)]
pub struct Route {
    /// One configuration version, or the platform.
    pub destination: Destination,
    /// How to reach it and in whose name.
    pub account: Arc<SmtpAccount>,
    /// What is known of the organization's configuration; nothing of the platform's.
    pub health: Health,
    /// What its account is limited to, over all workers.
    pub limited: Option<Limited>,
}

/// The platform's own server.
#[derive(Debug, Clone)]
pub struct PlatformServer {
    /// How to reach it and in whose name.
    pub account: Arc<SmtpAccount>,
    /// What its account is limited to, over all workers.
    pub limited: Option<Limited>,
}

/// Why there is no server for a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NoServer {
    /// It never will be sent as things stand: the reason of its dead letter.
    Dead(Reason),
    /// The worker's key ring lacks the key with this id: the worker's fault, so the job waits.
    KeyMissing(String),
    /// The organization's configuration fails for this reason: its mail is parked.
    Failing(Reason),
    /// The credentials of this version of the configuration do not open.
    Unreadable {
        /// The version.
        version: i64,
    },
}

/// Said of a job for which there is no server at all.
pub const NONE: &str = "the organization has no SMTP configuration in use and the platform has no server";

/// Whether two routes lead to the same server, or to none for the same reason that still holds.
pub fn is_same(one: &Result<Route, NoServer>, other: &Result<Route, NoServer>) -> bool {
    match (one, other) {
        (Ok(one), Ok(other)) => one.destination == other.destination,
        // Held against the configuration, it becomes another reason.
        (Err(NoServer::Unreadable { .. }), _) => false,
        (Err(one), Err(other)) => one == other,
        (Ok(_), Err(_)) | (Err(_), Ok(_)) => false,
    }
}

/// Picks the server for a job. `own` is an organization with what is stored about it; `None`: a job of the platform.
///
/// # Errors
/// [`NoServer`] says why there is none.
pub fn route(
    own: Option<(&OrganizationId, &RouteFacts)>,
    mode: CustomSmtp,
    platform: Option<&PlatformServer>,
) -> Result<Route, NoServer> {
    if let Some((id, facts)) = own
        && (facts.custom_smtp || mode == CustomSmtp::All)
    {
        match (&facts.account, facts.health.failing) {
            (StoredAccount::Unreadable { cause: Unreadable::UnknownKey { id }, .. }, _) => {
                return Err(NoServer::KeyMissing(id.clone()));
            }
            (StoredAccount::None, _) => {}
            (_, Some(reason)) => return Err(NoServer::Failing(reason)),
            (StoredAccount::Ready { version, account, limited }, None) => {
                let destination = Destination::Organization { id: id.clone(), version: *version };
                let (account, limited) = (account.clone(), *limited);
                return Ok(Route { destination, account, health: facts.health, limited });
            }
            (StoredAccount::Unreadable { version, .. }, None) => {
                return Err(NoServer::Unreadable { version: *version });
            }
        }
    }
    let PlatformServer { account, limited } = platform.ok_or(NoServer::Dead(Reason::ConfigMissing))?.clone();
    Ok(Route { destination: Destination::Platform, account, health: Health::default(), limited })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::address::Mailbox;
    use crate::model::smtp_settings::TlsMode;

    fn account(from: &str) -> Arc<SmtpAccount> {
        Arc::new(SmtpAccount {
            host: "smtp.example.org".into(),
            port: 587,
            tls: TlsMode::Required,
            credentials: None,
            from: Mailbox::parse(from).unwrap(),
        })
    }

    fn taken(flag: bool, own: StoredAccount, mode: CustomSmtp, platform: bool) -> Result<String, NoServer> {
        routed(flag, own, Health::default(), mode, platform)
    }

    fn routed(
        flag: bool,
        own: StoredAccount,
        health: Health,
        mode: CustomSmtp,
        platform: bool,
    ) -> Result<String, NoServer> {
        let id = OrganizationId::parse("acme").unwrap();
        let platform =
            platform.then(|| PlatformServer { account: account("platform@example.com"), limited: None });
        let facts = RouteFacts { custom_smtp: flag, account: own, health };
        route(Some((&id, &facts)), mode, platform.as_ref()).map(|r| r.account.from.email.domain().to_owned())
    }

    #[test]
    fn the_flag_and_a_configuration_together_lead_to_the_organizations_server() {
        let own = || StoredAccount::Ready { version: 3, account: account("a@acme.example"), limited: None };
        let dead = |reason| Err(NoServer::Dead(reason));
        assert_eq!(taken(true, own(), CustomSmtp::Flagged, true).unwrap(), "acme.example");
        assert_eq!(taken(false, own(), CustomSmtp::Flagged, true).unwrap(), "example.com");
        assert_eq!(taken(false, own(), CustomSmtp::All, true).unwrap(), "acme.example");
        assert_eq!(taken(true, StoredAccount::None, CustomSmtp::Flagged, true).unwrap(), "example.com");
        assert_eq!(taken(true, StoredAccount::None, CustomSmtp::Flagged, false), dead(Reason::ConfigMissing));
    }

    #[test]
    fn credentials_that_do_not_open_stop_their_organization_only_when_its_own_server_is_in_use() {
        let unreadable = || StoredAccount::Unreadable { version: 1, cause: Unreadable::Damaged("x".into()) };
        let key_missing =
            || StoredAccount::Unreadable { version: 1, cause: Unreadable::UnknownKey { id: "k2".into() } };
        let stopped = Err(NoServer::Unreadable { version: 1 });
        assert_eq!(taken(true, unreadable(), CustomSmtp::Flagged, true), stopped);
        assert_eq!(taken(false, unreadable(), CustomSmtp::Flagged, true).unwrap(), "example.com");
        assert_eq!(
            taken(true, key_missing(), CustomSmtp::Flagged, true),
            Err(NoServer::KeyMissing("k2".into()))
        );
    }

    #[test]
    fn a_failing_configuration_stops_its_organization_only_when_its_own_server_is_in_use() {
        let reason = Reason::AuthFailed;
        let health = Health { failing: Some(reason), ..Health::default() };
        let ready = || StoredAccount::Ready { version: 3, account: account("a@acme.example"), limited: None };
        let cause = || Unreadable::UnknownKey { id: "k2".into() };
        let failing = |flag, own| routed(flag, own, health, CustomSmtp::Flagged, true);
        assert_eq!(failing(true, ready()), Err(NoServer::Failing(reason)));
        assert_eq!(failing(false, ready()).unwrap(), "example.com");
        assert_eq!(routed(false, ready(), health, CustomSmtp::All, true), Err(NoServer::Failing(reason)));
        let damaged = StoredAccount::Unreadable { version: 1, cause: Unreadable::Damaged("x".into()) };
        assert_eq!(failing(true, damaged), Err(NoServer::Failing(reason)));
        // Whoever has the key may find that all is well.
        let key_missing = StoredAccount::Unreadable { version: 1, cause: cause() };
        assert_eq!(failing(true, key_missing), Err(NoServer::KeyMissing("k2".into())));
    }
}
