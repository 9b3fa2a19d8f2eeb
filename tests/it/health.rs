//! What is held against a configuration, when its mail is parked, when it is probed, against a real PostgreSQL.
//! Guarantee: each test has a database of its own; nothing is dialled.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use secrecy::SecretString;
use sendoff::model::address::EmailAddress;
use sendoff::model::failure::Reason;
use sendoff::model::health::{Absolution, Blamed, Health, Pauses, Suspect};
use sendoff::model::organization::OrganizationId;
use sendoff::secrets::KeyRing;
use sendoff::store::{AuditEntry, DueProbe, Failing, SmtpConfig, SmtpConfigPatch, SmtpConfigs, Store};
use tokio::time::Instant;

use crate::support::database::TestDatabase;
use crate::support::world::{KEYS, SOON};

const FAILING: Blamed = Blamed::Failing { just_now: true };
const FAILING_ALREADY: Blamed = Blamed::Failing { just_now: false };
const HINT: &str = "Check the password.";

struct House {
    database: TestDatabase,
    store: Store,
    configs: SmtpConfigs,
}

impl House {
    /// With organizations that have a configuration of version 1 each, and their flag on.
    async fn of(organizations: &[&str]) -> Self {
        let database = TestDatabase::migrated().await;
        for id in organizations {
            database
                .run(format!(
                    "INSERT INTO organizations (organization_id, custom_smtp, smtp_version) VALUES ('{id}', true, 1);
                     INSERT INTO smtp_configs (organization_id, version, from_email, from_name, host, port, secure,
                         username_sealed, password_sealed)
                     VALUES ('{id}', 1, 'a@{id}.example', '{id}', 'smtp.{id}.example', 587, true, '', '')"
                ))
                .await;
        }
        let store = Store::new(&database.url(), 8).expect("the URL is one");
        let keys = Arc::new(KeyRing::parse(&[SecretString::from(KEYS)]).expect("a key"));
        Self { configs: SmtpConfigs::new(store.clone(), keys), store, database }
    }

    async fn blame(&self, version: i64, reason: Reason) -> Blamed {
        self.blame_as(version, reason, Suspect::Account).await
    }

    async fn blame_as(&self, version: i64, reason: Reason, suspect: Suspect) -> Blamed {
        self.configs.blame(&acme(), version, reason, HINT, suspect).await.expect("the database answers")
    }

    /// Holds this against it, which is not enough.
    async fn note(&self, reason: Reason) {
        let blamed = self.blame(1, reason).await;
        assert!(matches!(blamed, Blamed::Noted { .. }), "{reason}: {blamed:?}");
    }

    async fn absolve(&self, version: i64, by: Absolution) {
        self.configs.absolve(&acme(), version, by).await.expect("the database answers");
    }

    async fn recovered(&self, version: i64) -> bool {
        self.configs.recovered(&acme(), version).await.expect("the database answers")
    }

    /// A probe came to nothing.
    async fn probe_failed(&self, probe: &DueProbe, reason: Reason, hint: Option<&str>, pauses: Pauses) {
        let recorded = self.configs.probe_failed(probe, reason, hint, pauses).await;
        recorded.expect("the database answers");
    }

    async fn probes(&self, for_all: bool, limit: u32) -> Vec<DueProbe> {
        let lease = Duration::from_secs(60);
        self.configs.claim_probes(for_all, limit, lease, &[]).await.expect("the database answers")
    }

    async fn config(&self) -> SmtpConfig {
        let settings = self.configs.get(&acme()).await.expect("the database answers");
        settings.config.expect("acme has a configuration")
    }

    async fn health(&self) -> Health {
        self.configs.load_for_sending(&acme()).await.expect("the database answers").health
    }

    async fn failing(&self) -> Option<Failing> {
        self.config().await.failing
    }

    /// Seconds until acme's next probe, as of when that was decided: the shortest pause that is not over yet.
    async fn next_probe_s(&self) -> i64 {
        self.database
            .number(
                "SELECT min(pause) FROM smtp_configs,
                     unnest(ARRAY[0, 60, 300, 600, 1200, 2400, 3600, 14400, 43200]::bigint[]) AS pause
                 WHERE pause >= extract(epoch FROM next_probe_at - now())",
            )
            .await
    }

    /// It has worked, so one failure is not enough.
    async fn works(&self) {
        self.absolve(1, Absolution::Worked).await;
        assert!(self.health().await.worked);
    }

    async fn update(&self, patch: SmtpConfigPatch) -> SmtpConfig {
        let allow = |_: &SmtpConfig| Ok::<(), ()>(());
        let updated = self.configs.update(&acme(), None, &patch, allow, entry(), Instant::now() + SOON).await;
        updated.expect("it is changed")
    }

    async fn recoveries(&self) -> i64 {
        self.database.number("SELECT count(*) FROM recoveries").await
    }
}

fn acme() -> OrganizationId {
    OrganizationId::parse("acme").expect("an id")
}

fn entry() -> AuditEntry<'static> {
    AuditEntry { actor: None, user_id: None, organization: None, command: "test", outcome: "ok", fields: &[] }
}

#[tokio::test]
async fn of_many_who_see_a_configuration_fail_at_once_one_is_told_that_it_begins() {
    let house = House::of(&["acme"]).await;
    let told = join_all((0..8).map(|_| house.blame(1, Reason::AuthFailed))).await;
    assert_eq!(told.iter().filter(|blamed| **blamed == FAILING).count(), 1, "{told:?}");
    assert!(told.iter().all(|blamed| matches!(blamed, Blamed::Failing { .. })), "{told:?}");
    let failing = house.failing().await.expect("it fails");
    assert_eq!((failing.reason, failing.hint.as_str()), (Reason::AuthFailed, HINT));
    assert_eq!(house.health().await.failing, Some(Reason::AuthFailed));
    assert_eq!(house.store.failing_count(true).await.expect("the database answers"), 1);
}

#[tokio::test]
async fn a_configuration_that_has_worked_fails_at_the_second_refusal_in_a_row() {
    let house = House::of(&["acme"]).await;
    house.works().await;
    house.note(Reason::AuthFailed).await;
    assert!(house.health().await.blemished);
    house.absolve(1, Absolution::Reached).await;
    assert!(house.health().await.blemished, "to be reached says nothing of the password");
    house.absolve(1, Absolution::Worked).await;
    assert_eq!(
        house.health().await,
        Health { worked: true, blemished: false, unreached: false, failing: None }
    );
    // A success came between.
    house.note(Reason::SenderRefused).await;
    assert_eq!(house.blame(1, Reason::AuthFailed).await, FAILING);
    assert_eq!(house.blame(1, Reason::TlsFailed).await, FAILING_ALREADY);
    assert_eq!(house.failing().await.map(|failing| failing.reason), Some(Reason::AuthFailed));
}

#[tokio::test]
async fn a_message_that_is_refused_again_counts_only_until_others_got_through() {
    let house = House::of(&["acme"]).await;
    let again = async || house.blame_as(1, Reason::SenderRefused, Suspect::Message).await;
    house.works().await;
    for _ in 0..5 {
        assert_eq!(again().await, Blamed::Noted { proven: true });
    }
    assert!(!house.health().await.blemished);
    house.note(Reason::SenderRefused).await;
    assert_eq!(again().await, FAILING, "behind another's it is the second in a row");
    // A test shows the login alone, and an update nothing yet.
    for anew in [false, true] {
        house.absolve(1, Absolution::Worked).await;
        let version = if anew {
            house.update(SmtpConfigPatch { port: Some(465), ..Default::default() }).await.version
        } else {
            1
        };
        assert!(house.recovered(version).await);
        let blame = async || house.blame_as(version, Reason::SenderRefused, Suspect::Message).await;
        assert_eq!(blame().await, Blamed::Noted { proven: false });
        assert_eq!(blame().await, FAILING);
    }
}

#[tokio::test]
async fn two_refusals_at_once_are_two_in_a_row() {
    let house = House::of(&["acme"]).await;
    house.works().await;
    let told = join_all((0..2).map(|_| house.blame(1, Reason::AuthFailed))).await;
    assert!(told.contains(&Blamed::Noted { proven: true }) && told.contains(&FAILING), "{told:?}");
}

#[tokio::test]
async fn where_no_connection_can_be_made_one_failure_is_enough() {
    for reason in
        [Reason::HostNotPublic, Reason::PortNotAllowed, Reason::HostNotFound, Reason::ConfigUnreadable]
    {
        let house = House::of(&["acme"]).await;
        house.works().await;
        assert_eq!(house.blame(1, reason).await, FAILING, "{reason}");
    }
}

#[tokio::test]
async fn a_server_out_of_reach_fails_after_ten_minutes_and_being_reached_ends_them() {
    let house = House::of(&["acme"]).await;
    let minutes_ago = |minutes| {
        house.database.run(format!(
            "UPDATE smtp_configs SET unreachable_since = unreachable_since - interval '{minutes} minutes'"
        ))
    };
    house.note(Reason::ConnectFailed).await;
    minutes_ago(9).await;
    house.note(Reason::ConnectTimeout).await;
    minutes_ago(2).await;
    house.absolve(1, Absolution::Reached).await;
    // It begins anew.
    house.note(Reason::ConnectTimeout).await;
    minutes_ago(11).await;
    // A refusal comes from a server that was reached.
    house.database.run("UPDATE smtp_configs SET worked_at = now()").await;
    house.note(Reason::AuthFailed).await;
    house.note(Reason::ConnectFailed).await;
    minutes_ago(11).await;
    assert_eq!(house.blame(1, Reason::ConnectFailed).await, FAILING);
}

#[tokio::test]
async fn a_server_that_took_mail_before_fails_all_the_same_when_it_is_out_of_reach() {
    let house = House::of(&["acme"]).await;
    house.absolve(1, Absolution::Worked).await;
    house.note(Reason::ConnectFailed).await;
    house
        .database
        .run("UPDATE smtp_configs SET unreachable_since = unreachable_since - interval '11 minutes'")
        .await;
    assert_eq!(house.blame(1, Reason::ConnectFailed).await, FAILING);
}

#[tokio::test]
async fn a_server_that_nobody_tried_to_reach_for_an_hour_was_not_out_of_reach_meanwhile() {
    let house = House::of(&["acme"]).await;
    let minutes_ago = |minutes| {
        house.database.run(format!(
            "UPDATE smtp_configs SET unreachable_since = unreachable_since - interval '{minutes} minutes',
             unreachable_at = unreachable_at - interval '{minutes} minutes'"
        ))
    };
    house.note(Reason::ConnectFailed).await;
    minutes_ago(3 * 24 * 60).await;
    // It begins anew.
    house.note(Reason::ConnectTimeout).await;
    minutes_ago(9).await;
    house.note(Reason::ConnectTimeout).await;
    // As far apart as attempts of one job are.
    minutes_ago(30).await;
    assert_eq!(house.blame(1, Reason::ConnectTimeout).await, FAILING);
}

#[tokio::test]
async fn what_is_said_of_an_older_version_changes_nothing() {
    let house = House::of(&["acme"]).await;
    assert_eq!(house.update(SmtpConfigPatch { port: Some(465), ..Default::default() }).await.version, 2);
    assert_eq!(house.blame(1, Reason::AuthFailed).await, Blamed::Outdated);
    house.absolve(1, Absolution::Worked).await;
    assert_eq!(house.health().await, Health::default());
    assert_eq!(house.blame(2, Reason::AuthFailed).await, FAILING);
    assert!(!house.recovered(1).await);
    assert!(house.failing().await.is_some());
    let of_another = DueProbe { organization: acme(), version: 1 };
    house.probe_failed(&of_another, Reason::TlsFailed, Some(""), Pauses::Short).await;
    assert_eq!(house.failing().await.map(|failing| failing.reason), Some(Reason::AuthFailed));
    let nobody = OrganizationId::parse("beta").expect("an id");
    let gone = house.configs.blame(&nobody, 1, Reason::AuthFailed, "", Suspect::Account).await;
    assert_eq!(gone.expect("the database answers"), Blamed::Outdated);
}

#[tokio::test]
async fn probes_come_after_growing_pauses_which_a_refused_password_makes_long() {
    for (reason, pauses_s) in [
        (Reason::TlsFailed, [300, 600, 1200, 2400, 3600, 3600]),
        (Reason::AuthFailed, [3600, 14_400, 43_200, 43_200, 43_200, 43_200]),
    ] {
        let house = House::of(&["acme"]).await;
        assert_eq!(house.blame(1, reason).await, FAILING);
        let mut seen = vec![house.next_probe_s().await];
        for _ in 1..pauses_s.len() {
            house.blame(1, reason).await;
            house.database.run("UPDATE smtp_configs SET next_probe_at = now()").await;
            let probe = house.probes(false, 10).await.pop().expect("it is due");
            assert_eq!(house.next_probe_s().await, 60, "it is somebody's");
            house.probe_failed(&probe, reason, Some(HINT), Pauses::after(reason)).await;
            seen.push(house.next_probe_s().await);
        }
        assert_eq!(seen, pauses_s, "{reason}");
    }
}

#[tokio::test]
async fn trouble_before_the_login_is_looked_at_again_in_minutes_and_brings_no_later_login_nearer_or_farther()
{
    let house = House::of(&["acme"]).await;
    assert_eq!(house.blame(1, Reason::AuthFailed).await, FAILING);
    let mut seen = vec![house.next_probe_s().await];
    let probe = DueProbe { organization: acme(), version: 1 };
    for pauses in [Pauses::Short, Pauses::Short, Pauses::Long, Pauses::Short, Pauses::Long] {
        house.probe_failed(&probe, Reason::AuthFailed, None, pauses).await;
        seen.push(house.next_probe_s().await);
    }
    assert_eq!(seen, [3600, 300, 600, 14_400, 1200, 43_200]);
    house.recovered(1).await;
    assert!(house.health().await.blemished, "until a message is accepted");
    house.absolve(1, Absolution::Worked).await;
    assert!(!house.health().await.blemished);
    house.blame(1, Reason::AuthFailed).await;
    assert_eq!(house.blame(1, Reason::AuthFailed).await, FAILING);
    assert_eq!(house.next_probe_s().await, 3600, "they begin anew");
}

#[tokio::test]
async fn the_pauses_go_on_after_a_test_went_well_until_a_message_is_accepted() {
    let house = House::of(&["acme"]).await;
    house.blame(1, Reason::TlsFailed).await;
    assert!(house.recovered(1).await);
    assert_eq!(
        house.health().await,
        Health { worked: true, blemished: true, unreached: false, failing: None }
    );
    // The test has shown that it works.
    house.note(Reason::TlsFailed).await;
    assert_eq!(house.blame(1, Reason::TlsFailed).await, FAILING);
    assert_eq!(house.next_probe_s().await, 600);
    assert!(house.recovered(1).await);
    house.absolve(1, Absolution::Worked).await;
    assert!(!house.health().await.blemished);
    assert_eq!(house.blame(1, Reason::HostNotFound).await, FAILING);
    assert_eq!(house.next_probe_s().await, 300);
    house.absolve(1, Absolution::Worked).await;
    assert_eq!(house.next_probe_s().await, 0, "a message was accepted all the same: look at once");
    assert!(house.failing().await.is_some(), "only a test opens the way");
}

#[tokio::test]
async fn each_probe_is_one_workers_and_what_is_not_in_use_is_not_probed() {
    let names: Vec<String> = (0..9).map(|number| format!("org{number}")).collect();
    let house = House::of(&names.iter().map(String::as_str).collect::<Vec<_>>()).await;
    house.database.run("UPDATE smtp_configs SET failing_since = now(), failing_reason = 'tls_failed'").await;
    assert!(house.probes(true, 10).await.is_empty(), "none is due");
    house.database.run("UPDATE smtp_configs SET next_probe_at = now() - interval '1 second'").await;
    house.database.run("UPDATE organizations SET custom_smtp = false WHERE organization_id = 'org8'").await;
    let taken = join_all((0..4).map(|_| house.probes(false, 3))).await;
    assert!(taken.iter().all(|probes| probes.len() <= 3), "{taken:?}");
    let mut all: Vec<String> =
        taken.into_iter().flatten().map(|probe| probe.organization.to_string()).collect();
    // Who found a row locked left it to the next look.
    all.extend(house.probes(false, 10).await.into_iter().map(|probe| probe.organization.to_string()));
    all.sort();
    assert_eq!(all, names[..8]);
    let last = house.probes(true, 10).await;
    assert_eq!(last.iter().map(|probe| probe.organization.as_str()).collect::<Vec<_>>(), ["org8"]);
}

#[tokio::test]
async fn a_test_that_went_well_opens_the_way_once_and_notes_the_recovery() {
    let house = House::of(&["acme"]).await;
    assert!(!house.recovered(1).await, "it was not failing");
    assert_eq!(house.recoveries().await, 0);
    // The test has shown that it works, so it takes two.
    house.note(Reason::AuthFailed).await;
    assert_eq!(house.blame(1, Reason::TlsFailed).await, FAILING);
    let told = join_all((0..4).map(|_| house.recovered(1))).await;
    assert_eq!(told.iter().filter(|was| **was).count(), 1, "{told:?}");
    assert_eq!((house.failing().await, house.recoveries().await), (None, 1));
    assert!(house.probes(true, 10).await.is_empty());
}

#[tokio::test]
async fn an_update_that_may_mend_a_failing_configuration_keeps_it_failing_and_has_it_probed_at_once() {
    let house = House::of(&["acme"]).await;
    house.blame(1, Reason::AuthFailed).await;
    let updated = house.update(SmtpConfigPatch { password: Some("x".into()), ..Default::default() }).await;
    assert_eq!(updated.failing.map(|failing| failing.reason), Some(Reason::AuthFailed));
    let due = [DueProbe { organization: acme(), version: 2 }];
    assert_eq!(house.probes(false, 10).await, due);
    house.probe_failed(&due[0], Reason::TlsFailed, Some("other"), Pauses::Short).await;
    assert_eq!(house.next_probe_s().await, 300, "the pauses begin anew");
    let failing = house.failing().await.expect("it fails");
    assert_eq!((failing.reason, failing.hint.as_str()), (Reason::TlsFailed, "other"));
}

#[tokio::test]
async fn after_an_update_that_cannot_mend_what_fails_the_pauses_go_on_from_where_they_were() {
    let from = || EmailAddress::parse("other@acme.example").ok();
    let name = || Some("Other".to_owned());
    let unchanged = || SmtpConfigPatch {
        host: Some("smtp.acme.example".into()),
        port: Some(587),
        secure: Some(true),
        from_email: EmailAddress::parse("a@acme.example").ok(),
        from_name: name(),
        ..Default::default()
    };
    let (auth, sender) = (Reason::AuthFailed, Reason::SenderRefused);
    for (reason, patch, anew) in [
        (auth, SmtpConfigPatch { from_name: name(), ..Default::default() }, false),
        (auth, SmtpConfigPatch { from_email: from(), ..Default::default() }, false),
        (auth, unchanged(), false),
        (auth, SmtpConfigPatch { port: Some(465), ..Default::default() }, true),
        (auth, SmtpConfigPatch { username: Some("x".into()), ..Default::default() }, true),
        (sender, SmtpConfigPatch { from_email: from(), ..Default::default() }, true),
        (sender, SmtpConfigPatch { from_name: name(), ..Default::default() }, false),
    ] {
        let house = House::of(&["acme"]).await;
        house.blame(1, reason).await;
        let told = format!("{reason} {patch:?}");
        let pause = house.next_probe_s().await;
        let updated = house.update(patch).await;
        assert_eq!((updated.version, updated.failing.is_some()), (2, true), "{told}");
        assert_eq!(house.next_probe_s().await, 0, "{told}");
        let probe = DueProbe { organization: acme(), version: 2 };
        house.probe_failed(&probe, reason, None, Pauses::after(reason)).await;
        let grows = house.next_probe_s().await > pause;
        assert_eq!(grows, !anew, "the pauses go on, or begin anew: {told}");
    }
}

#[tokio::test]
async fn an_update_of_a_working_configuration_forgets_what_the_old_server_has_shown() {
    let house = House::of(&["acme"]).await;
    house.works().await;
    house.blame(1, Reason::AuthFailed).await;
    let name = SmtpConfigPatch { from_name: Some("Other".into()), ..Default::default() };
    house.update(name).await;
    assert!(house.health().await.worked);
    // What was held against the version before counts no longer.
    let blamed = house.blame(2, Reason::AuthFailed).await;
    assert!(matches!(blamed, Blamed::Noted { .. }), "{blamed:?}");
    house.update(SmtpConfigPatch { password: Some("x".into()), ..Default::default() }).await;
    assert_eq!(house.health().await, Health::default());
    assert!(house.probes(true, 10).await.is_empty());
}

#[tokio::test]
async fn the_end_of_a_failing_configuration_is_a_recovery_and_of_a_working_one_is_none() {
    for failing in [true, false] {
        let house = House::of(&["acme"]).await;
        if failing {
            house.blame(1, Reason::AuthFailed).await;
        }
        house.configs.delete(&acme(), entry(), Instant::now() + SOON).await.expect("it is deleted");
        assert_eq!(house.recoveries().await, i64::from(failing));
        assert_eq!(house.blame(1, Reason::AuthFailed).await, Blamed::Outdated);
    }
}

#[tokio::test]
async fn trouble_that_nobody_has_announced_in_time_is_taken_by_one_at_a_time_until_it_is() {
    let house = House::of(&["acme"]).await;
    let take = async || house.configs.take_unannounced().await.expect("the database answers");
    let time_is_up = || house.database.run("UPDATE smtp_configs SET announce_at = now()");
    assert_eq!(take().await, None);
    house.blame(1, Reason::AuthFailed).await;
    assert_eq!(take().await, None, "whoever has seen it begin is given time");
    for _ in 0..2 {
        time_is_up().await;
        let taken = join_all((0..8).map(|_| take())).await;
        let taken: Vec<_> = taken.into_iter().flatten().collect();
        let [trouble] = &taken[..] else { panic!("{taken:?}") };
        assert_eq!((&trouble.organization, trouble.version), (&acme(), 1));
        assert_eq!((trouble.reason, trouble.hint.as_str()), (Reason::AuthFailed, HINT));
        assert_eq!(take().await, None, "it is somebody's");
    }
    house.configs.announced(&acme(), 1).await.expect("the database answers");
    house.blame(1, Reason::AuthFailed).await;
    let open = "SELECT count(*) FROM smtp_configs WHERE announce_at IS NOT NULL";
    assert_eq!(house.database.number(open).await, 0);
}

#[tokio::test]
async fn trouble_that_ends_before_it_is_announced_is_announced_with_its_end() {
    let until = Instant::now() + SOON;
    for deleted in [false, true] {
        for announced in [false, true] {
            let house = House::of(&["acme"]).await;
            house.blame(1, Reason::AuthFailed).await;
            if deleted {
                house.configs.delete(&acme(), entry(), until).await.expect("it is deleted");
            } else {
                assert!(house.recovered(1).await);
            }
            if announced {
                house.configs.announced(&acme(), 1).await.expect("the database answers");
            }
            house.database.run("UPDATE recoveries SET recovered_at = now() - interval '2 seconds'").await;
            let finished = house.store.finished_recoveries(&[]).await.expect("the database answers");
            let [recovery] = &finished[..] else { panic!("{finished:?}") };
            let told = recovery.unannounced.as_ref().map(|trouble| (trouble.version, trouble.reason));
            assert_eq!(told, (!announced).then_some((1, Reason::AuthFailed)), "{deleted} {announced}");
        }
    }
}
