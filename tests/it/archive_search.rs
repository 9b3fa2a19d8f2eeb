//! Dead letters found by filter and counted, against a real PostgreSQL: among a few, and among a hundred thousand.

use std::collections::{BTreeMap, BTreeSet};

use sendoff::model::failure::Reason;
use sendoff::model::letter::{Letter, LetterFilter, LetterState, Owner};
use sendoff::model::organization::OrganizationId;
use sendoff::store::LetterAge;
use sqlx::Row;
use time::OffsetDateTime;
use uuid::Uuid;

use crate::support::database::TestDatabase;

/// Letters made by SQL, without content. `$1`-like places: how many, and when letter `g` died.
async fn fill(database: &TestDatabase, letters: u32, died_at: &str) {
    database
        .run(format!(
            "INSERT INTO dead_letters (letter, job_id, organization_id, kind, lane, routing_key, state, reason, attempts,
                 died_at, turn, body_hash, bytes, properties_sealed, body_sealed)
             SELECT md5('letter' || g)::uuid, CASE WHEN g % 9 > 0 THEN md5('job' || g / 2)::uuid END,
                 CASE WHEN g % 9 = 0 OR g % 17 = 0 THEN NULL WHEN g % 20 > 0 THEN (g % 20)::text ELSE '' END,
                 CASE WHEN g % 13 > 0 THEN 'kind-' || g % 13 END, 'notifications', 'notification.a',
                 (ARRAY['dead', 'dead', 'dead', 'replayed', 'discarded', 'parked'])[1 + g % 6],
                 (ARRAY['message_refused', 'recipients_refused', 'expired', 'unroutable', 'malformed'])[1 + g % 5],
                 1, {died_at}, 1, sha256(g::text::bytea), 10, '\\x00', '\\x00'
             FROM generate_series(1, {letters}) AS g;"
        ))
        .await;
    database.run("VACUUM ANALYZE dead_letters").await;
}

/// A row as the test sees it.
struct Seen {
    letter: Uuid,
    job: Option<Uuid>,
    /// None: it is not known whose it is.
    organization: Option<String>,
    kind: Option<String>,
    state: String,
    reason: String,
    died_at: OffsetDateTime,
}

/// Every row, newest first, put in order here.
async fn everything(database: &TestDatabase) -> Vec<Seen> {
    let rows =
        sqlx::query("SELECT letter, job_id, organization_id, kind, state, reason, died_at FROM dead_letters")
            .fetch_all(&mut database.connect().await)
            .await
            .expect("the rows are read");
    let mut seen: Vec<Seen> = rows
        .iter()
        .map(|row| Seen {
            letter: row.get(0),
            job: row.get(1),
            organization: row.get(2),
            kind: row.get(3),
            state: row.get(4),
            reason: row.get(5),
            died_at: row.get(6),
        })
        .collect();
    seen.sort_unstable_by_key(|seen| std::cmp::Reverse((seen.died_at, seen.letter)));
    seen
}

impl Seen {
    fn is_meant(&self, filter: &LetterFilter) -> bool {
        fn any<T>(wanted: &[T], is: impl FnMut(&T) -> bool) -> bool {
            wanted.is_empty() || wanted.iter().any(is)
        }
        any(&filter.organizations, |wanted| Some(wanted) == self.organization.as_ref())
            && any(&filter.reasons, |wanted| wanted.as_str() == self.reason)
            && any(&filter.kinds, |wanted| Some(wanted) == self.kind.as_ref())
            && any(&filter.states, |wanted| wanted.as_str() == self.state)
            && any(&filter.ids, |wanted| *wanted == self.letter || Some(*wanted) == self.job)
            && filter.since.is_none_or(|since| self.died_at >= since)
            && filter.until.is_none_or(|until| self.died_at < until)
    }
}

impl Seen {
    fn owner(&self) -> Owner {
        match self.organization.as_deref() {
            None => Owner::Unknown,
            Some("") => Owner::Platform,
            Some(text) => Owner::Organization(OrganizationId::parse(text).expect("an organization")),
        }
    }
}

fn names(letters: &[Letter]) -> Vec<Uuid> {
    letters.iter().map(|letter| letter.letter.0).collect()
}

/// Every combination of the seven conditions, with one value each and with several.
fn combinations(all: &[Seen]) -> Vec<LetterFilter> {
    let some =
        all[all.len() / 3..].iter().find(|seen| seen.organization.is_some()).expect("one has an owner");
    let ids: Vec<Uuid> =
        all.iter().step_by(all.len() / 9).flat_map(|seen| [Some(seen.letter), seen.job]).flatten().collect();
    let one = LetterFilter {
        organizations: some.organization.iter().cloned().collect(),
        reasons: vec![Reason::from_name(&some.reason).expect("a reason")],
        kinds: vec![some.kind.clone().unwrap_or_else(|| "kind-1".into())],
        states: vec![LetterState::from_name(&some.state).expect("a state")],
        since: Some(all[all.len() * 9 / 10].died_at),
        until: Some(all[all.len() / 10].died_at),
        ids: vec![some.letter],
    };
    let several = LetterFilter {
        organizations: ["", "7", "nobody", "11"].map(str::to_owned).into(),
        reasons: vec![Reason::Expired, Reason::Malformed, Reason::Unroutable],
        kinds: ["kind-3", "kind-7", "none"].map(str::to_owned).into(),
        states: vec![LetterState::Dead, LetterState::Parked],
        since: Some(all[all.len() / 2].died_at),
        until: Some(all[all.len() / 5].died_at),
        ids,
    };
    let choose = |from: &LetterFilter, chosen: usize| {
        let is = |bit: usize| chosen & (1 << bit) != 0;
        fn list<T: Clone>(is: bool, from: &[T]) -> Vec<T> {
            if is { from.to_vec() } else { Vec::new() }
        }
        LetterFilter {
            organizations: list(is(0), &from.organizations),
            reasons: list(is(1), &from.reasons),
            kinds: list(is(2), &from.kinds),
            states: list(is(3), &from.states),
            since: from.since.filter(|_| is(4)),
            until: from.until.filter(|_| is(5)),
            ids: list(is(6), &from.ids),
        }
    };
    [one, several].iter().flat_map(|from| (0..128).map(|chosen| choose(from, chosen))).collect()
}

/// What a plan and the plans under it say about something, its `Node Type` or `Index Name` say.
fn said(plan: &serde_json::Value, about: &str) -> Vec<String> {
    let mine = plan[about].as_str().map(str::to_owned);
    let below = plan["Plans"].as_array().into_iter().flatten().flat_map(|below| said(below, about));
    mine.into_iter().chain(below).collect()
}

#[tokio::test]
async fn a_hundred_thousand_letters_are_listed_from_an_index_by_every_combination_of_filters() {
    let database = TestDatabase::migrated().await;
    fill(&database, 100_000, "timestamptz '2026-11-20 12:00:00Z' - g / 3 * interval '7 seconds'").await;
    let (store, all) = (database.store(), everything(&database).await);
    assert_eq!(all.len(), 100_000);
    for filter in combinations(&all) {
        let mut expected = all.iter().filter(|seen| seen.is_meant(&filter)).map(|seen| seen.letter);
        let mut after = None;
        for page in 1..=2 {
            let explained = store.explain_letters(&filter, after, 50).await.expect("the database answers");
            let plan = said(&explained[0]["Plan"], "Node Type");
            let by_index = plan.iter().any(|node| node.contains("Index"));
            assert!(by_index && !plan.iter().any(|node| node.contains("Seq Scan")), "{filter:?}: {plan:?}");
            let letters = store.letters(&filter, after, 50).await.expect("the database answers");
            let wanted: Vec<Uuid> = expected.by_ref().take(50).collect();
            assert_eq!(names(&letters), wanted, "page {page} of {filter:?}");
            after = letters.last().map(Letter::place).or(after);
        }
    }
}

#[tokio::test]
async fn what_is_rare_is_found_by_an_index_of_its_own() {
    let database = TestDatabase::migrated().await;
    fill(&database, 20_000, "timestamptz '2026-11-20 12:00:00Z' - g * interval '7 seconds'").await;
    database
        .run(
            "UPDATE dead_letters SET organization_id = 'rare', kind = 'rare', reason = 'crash_loop', state = 'replaying'
             WHERE letter IN (SELECT letter FROM dead_letters ORDER BY letter LIMIT 4)",
        )
        .await;
    database.run("VACUUM ANALYZE dead_letters").await;
    let (store, all) = (database.store(), everything(&database).await);
    let any = LetterFilter::default();
    let id = all[100].letter;
    let cases = [
        (LetterFilter { organizations: vec!["rare".into()], ..any.clone() }, "dead_letters_by_organization"),
        (LetterFilter { kinds: vec!["rare".into()], ..any.clone() }, "dead_letters_by_kind"),
        (LetterFilter { reasons: vec![Reason::CrashLoop], ..any.clone() }, "dead_letters_by_reason"),
        (LetterFilter { states: vec![LetterState::Replaying], ..any.clone() }, "dead_letters_by_state"),
        (LetterFilter { until: Some(all[19_990].died_at), ..any.clone() }, "dead_letters_by_time"),
        (LetterFilter { ids: vec![id], ..any.clone() }, "dead_letters_by_job"),
        (LetterFilter { ids: vec![id], ..any }, "dead_letters_pkey"),
    ];
    for (filter, index) in cases {
        let explained = store.explain_letters(&filter, None, 50).await.expect("the database answers");
        let used = said(&explained[0]["Plan"], "Index Name");
        assert!(used.iter().any(|used| used == index), "{filter:?}: {explained}");
        let letters = store.letters(&filter, None, 50).await.expect("the database answers");
        let wanted: Vec<Uuid> =
            all.iter().filter(|seen| seen.is_meant(&filter)).map(|seen| seen.letter).collect();
        assert_eq!(names(&letters), wanted, "{filter:?}");
    }
}

#[tokio::test]
async fn pages_follow_each_other_without_gap_or_repetition_while_letters_come_in() {
    let database = TestDatabase::migrated().await;
    fill(&database, 1000, "now() - g / 5 * interval '1 minute'").await;
    let (store, all) = (database.store(), everything(&database).await);
    let filter =
        LetterFilter { states: vec![LetterState::Dead, LetterState::Parked], ..LetterFilter::default() };
    let expected: Vec<Uuid> =
        all.iter().filter(|seen| seen.is_meant(&filter)).map(|seen| seen.letter).collect();
    let (mut found, mut after) = (Vec::new(), None);
    for page in 0.. {
        let letters = store.letters(&filter, after, 37).await.expect("the database answers");
        found.extend(names(&letters));
        after = letters.last().map(Letter::place).or(after);
        if letters.len() < 37 {
            break;
        }
        let new = format!(
            "INSERT INTO dead_letters (letter, organization_id, routing_key, state, reason, attempts, died_at, turn,
                 body_hash, bytes, properties_sealed, body_sealed)
             VALUES (md5('new{page}')::uuid, '1', 'a', 'dead', 'expired', 1, now(), 1, sha256(''), 0, '', '')"
        );
        database.run(new).await;
    }
    assert_eq!(found, expected);
    assert!(store.letters(&filter, None, 0).await.expect("the database answers").is_empty());
}

#[tokio::test]
async fn counts_add_up_to_what_is_listed() {
    let database = TestDatabase::migrated().await;
    let ages =
        "now() - (ARRAY['50 minutes', '61 minutes', '23 hours', '25 hours', '6.9 days', '8 days', '29 days',
        '31 days', '300 days'])[1 + g % 9]::interval";
    fill(&database, 3000, ages).await;
    let (store, all) = (database.store(), everything(&database).await);
    let now = all[0].died_at + time::Duration::minutes(50);
    let class = |died_at: OffsetDateTime| {
        let hours = (now - died_at).whole_hours();
        let class = [1, 24, 168, 720].iter().position(|limit| hours < *limit);
        class.map_or(LetterAge::Older, |class| LetterAge::ALL[class])
    };
    for filter in combinations(&all) {
        let mut expected: BTreeMap<(String, Owner, LetterAge), u64> = BTreeMap::new();
        for seen in all.iter().filter(|seen| seen.is_meant(&filter)) {
            let key = (seen.reason.clone(), seen.owner(), class(seen.died_at));
            *expected.entry(key).or_default() += 1;
        }
        let counts = store.letter_stats(&filter).await.expect("the database answers");
        let keyed = counts
            .iter()
            .map(|count| ((count.reason.as_str().to_owned(), count.owner.clone(), count.age), count.count));
        let keyed: Vec<_> = keyed.collect();
        assert!(keyed.iter().cloned().eq(expected), "{filter:?}: {keyed:?}");
    }
    let waiting = store.dead_letter_counts().await.expect("the database answers");
    for (reason, count) in &waiting {
        let dead = all.iter().filter(|seen| seen.state == "dead" && seen.reason == reason.as_str());
        assert_eq!(*count, dead.count() as u64, "{reason}");
    }
    assert_eq!(waiting.len(), 5);
}

#[tokio::test]
async fn letters_that_a_newer_program_wrote_are_left_out_and_hide_no_other() {
    let database = TestDatabase::migrated().await;
    fill(&database, 200, "now() - g * interval '1 minute'").await;
    database
        .run(
            "UPDATE dead_letters SET reason = 'from_the_future' WHERE reason IN ('expired', 'unroutable');
             UPDATE dead_letters SET history = '[{\"what\":\"embalm\",\"at\":\"2026-11-20T13:00:00Z\",\"by\":\"x\"},
                 {\"what\":\"discard\",\"at\":\"2026-11-20T13:00:00Z\",\"by\":\"user:7\"}]'",
        )
        .await;
    let (store, all) = (database.store(), everything(&database).await);
    let readable: Vec<Uuid> =
        all.iter().filter(|seen| seen.reason != "from_the_future").map(|seen| seen.letter).collect();
    let letters = store.letters(&LetterFilter::default(), None, 50).await.expect("the database answers");
    assert_eq!(names(&letters), readable[..50]);
    assert!(letters.iter().all(|letter| letter.history.len() == 1 && letter.history[0].by == "user:7"));
    let rest =
        store.letters(&LetterFilter::default(), letters.last().map(Letter::place), 1000).await.unwrap();
    assert_eq!(names(&rest), readable[50..]);
    let counted: u64 =
        store.letter_stats(&LetterFilter::default()).await.unwrap().iter().map(|count| count.count).sum();
    assert_eq!(counted, readable.len() as u64);
}

#[tokio::test]
async fn the_letters_of_a_job_are_found_by_its_id_or_by_their_names() {
    let database = TestDatabase::migrated().await;
    fill(&database, 50, "now() - g * interval '1 minute'").await;
    let (store, all) = (database.store(), everything(&database).await);
    let job = all[10].job.expect("this one has a job");
    let of_job: BTreeSet<Uuid> =
        all.iter().filter(|seen| seen.job == Some(job)).map(|seen| seen.letter).collect();
    assert_eq!(of_job.len(), 2);
    let found = store.letters_of(job, None).await.expect("the database answers");
    assert_eq!(names(&found).into_iter().collect::<BTreeSet<_>>(), of_job);
    let organization = all[10].organization.as_deref().expect("this one has an owner");
    let mine = store.letters_of(job, Some(organization)).await.expect("the database answers");
    assert_eq!(names(&mine), [all[10].letter]);
    let nobodys =
        all.iter().find(|seen| seen.job.is_some() && seen.organization.is_none()).expect("one is nobody's");
    let found = store.letters_of(nobodys.job.unwrap(), None).await.expect("the database answers");
    let found = found.iter().find(|found| found.letter.0 == nobodys.letter).expect("by the job's id");
    assert_eq!((Some(found.id()), found.owner()), (nobodys.job, Owner::Unknown));
    let nameless = all.iter().find(|seen| seen.job.is_none()).expect("one has no job");
    let found = store.letters_of(nameless.letter, None).await.expect("the database answers");
    assert_eq!((names(&found), found[0].id()), (vec![nameless.letter], nameless.letter));
    assert!(store.letters_of(Uuid::nil(), None).await.expect("the database answers").is_empty());
}
