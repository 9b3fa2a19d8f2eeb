//! What is recorded of an attempt, recipient by recipient.

use std::time::Duration;

use time::macros::datetime;

use super::*;
use crate::broker::wire::{WireLimits, parse_job};
use crate::model::health::Blamed;
use crate::model::ledger::{Incarnation, Turn};
use crate::model::schedule::Schedule;

const NOW: OffsetDateTime = datetime!(2026-11-22 12:00 UTC);

fn job() -> Job {
    let body = br#"{"version": 1, "id": "0198c0de-0000-7000-8000-000000000001", "kind": "k", "subject": "s", "text": "t",
        "to": ["a@x.example", "b@x.example", "c@x.example"]}"#;
    let limits = WireLimits { max_recipients: 10, max_message_bytes: 10_000 };
    parse_job(body, &limits).unwrap_or_else(|refusal| panic!("{}", refusal.detail))
}

fn claimed() -> Claimed {
    Claimed {
        owner: Incarnation(1),
        turn: Turn(0),
        attempts: 0,
        spared: 0,
        first_at: NOW,
        replayed_at: None,
        reason: None,
        now: NOW,
        message_id: "<1@x.example>".into(),
        pending: None,
        refused: vec![],
        partly_sent: false,
        orphan: None,
        crashes: 0,
        unknowns: 0,
        newest_sequence: None,
        cancelled: false,
        custom_smtp: false,
        config_version: None,
        config_failing: false,
    }
}

fn concluded(claimed: &Claimed, report: &Report) -> Conclusion {
    let limits = RetryLimits { schedule: Schedule::new(vec![10]), max_age: Duration::from_secs(3600) };
    conclude(&job(), claimed, report, false, &limits, NOW)
}

fn refused(index: u16) -> RefusedRecipient {
    RefusedRecipient { index, code: 550, reason: Reason::RecipientsRefused }
}

fn retry() -> Option<Verdict> {
    Some(Verdict::Retry { reason: Reason::RecipientsRefused, at_least: None, feedback: Feedback::Neutral })
}

#[test]
fn a_job_whose_recipients_all_accepted_is_sent() {
    let conclusion = concluded(&claimed(), &Report { accepted: vec![0, 1, 2], ..Report::default() });
    assert!(matches!(conclusion.settlement, Settlement::Sent));
    assert_eq!((conclusion.attempts, conclusion.pending, conclusion.partly_sent), (1, None, true));
}

#[test]
fn recipients_that_are_left_are_tried_alone() {
    let report = Report {
        accepted: vec![0],
        refused: vec![refused(1)],
        later: vec![2],
        verdict: retry(),
        ..Report::default()
    };
    let conclusion = concluded(&claimed(), &report);
    let wait = Duration::from_secs(10);
    assert!(matches!(conclusion.settlement, Settlement::Deferred { wait: w, .. } if w == wait));
    assert_eq!((conclusion.pending, conclusion.refused), (Some(vec![2]), vec![refused(1)]));
}

#[test]
fn a_recipient_whose_retries_end_is_refused_where_others_have_the_message() {
    let before = Claimed { attempts: 1, pending: Some(vec![2]), partly_sent: true, ..claimed() };
    let conclusion = concluded(&before, &Report { later: vec![2], verdict: retry(), ..Report::default() });
    assert!(matches!(conclusion.settlement, Settlement::Sent));
    let given_up = RefusedRecipient { index: 2, code: 0, reason: Reason::RetriesExhausted };
    assert_eq!((conclusion.refused, conclusion.pending), (vec![given_up], None));
    assert!(conclusion.detail.contains("last cause recipients_refused"), "{}", conclusion.detail);
}

#[test]
fn a_job_that_nobody_accepted_is_dead() {
    let report = Report { refused: vec![refused(0), refused(1), refused(2)], ..Report::default() };
    let dead = concluded(&claimed(), &report);
    assert!(matches!(dead.settlement, Settlement::Dead { reason: Reason::RecipientsRefused, .. }));
    assert_eq!(dead.refused.len(), 3);
}

#[test]
fn a_gate_that_was_shut_for_good_ends_the_job_with_its_reason() {
    for (shut, reason) in [
        (Shut::Expired, Reason::Expired),
        (Shut::Superseded(7), Reason::Superseded),
        (Shut::Cancelled, Reason::Cancelled),
    ] {
        let report = Report { later: vec![0, 1, 2], shut: Some(shut), ..Report::default() };
        let conclusion = concluded(&claimed(), &report);
        assert!(
            matches!(conclusion.settlement, Settlement::Dead { reason: r, .. } if r == reason),
            "{shut:?}"
        );
    }
}

#[test]
fn a_job_that_is_called_back_between_two_transactions_is_sent_to_those_who_have_it() {
    let report =
        Report { accepted: vec![0], later: vec![1, 2], shut: Some(Shut::Cancelled), ..Report::default() };
    let conclusion = concluded(&claimed(), &report);
    assert!(matches!(conclusion.settlement, Settlement::Sent));
    let given_up: Vec<(u16, Reason)> =
        conclusion.refused.iter().map(|refused| (refused.index, refused.reason)).collect();
    assert_eq!(given_up, [(1, Reason::Cancelled), (2, Reason::Cancelled)]);
}

#[test]
fn an_unknown_outcome_is_counted() {
    let report = Report { later: vec![0, 1, 2], verdict: Some(Verdict::Unknown), ..Report::default() };
    let conclusion = concluded(&claimed(), &report);
    assert!(matches!(conclusion.settlement, Settlement::Deferred { reason: Reason::UnknownOutcome, .. }));
    assert_eq!((conclusion.unknowns, conclusion.pending), (1, None));
}

#[test]
fn a_job_that_the_worker_cannot_handle_is_dead_for_that_unless_nobody_knows_whether_it_was_sent() {
    let worn = |verdict, claimed: &Claimed| {
        let report = Report { later: vec![0, 1, 2], verdict: Some(verdict), ..Report::default() };
        let mut conclusion = concluded(claimed, &report);
        conclusion.condemn(&report.later, "worn".to_owned());
        match conclusion.settlement {
            Settlement::Dead { reason, .. } => reason,
            other => panic!("{other:?}"),
        }
    };
    let internal = Verdict::Retry { reason: Reason::Internal, at_least: None, feedback: Feedback::Neutral };
    assert_eq!(worn(internal, &claimed()), Reason::Internal);
    assert_eq!(worn(internal, &Claimed { attempts: 9, ..claimed() }), Reason::Internal, "retries had ended");
    assert_eq!(worn(Verdict::Unknown, &claimed()), Reason::UnknownOutcome);
    assert_eq!(worn(Verdict::Dead(Reason::SenderRefused), &claimed()), Reason::SenderRefused);
}

#[test]
fn a_replayed_job_has_its_retries_and_its_age_anew_and_keeps_the_count_of_its_attempts() {
    let days_ago = NOW - Duration::from_secs(7 * 24 * 3600);
    let exhausted = Claimed { attempts: 2, first_at: days_ago, ..claimed() };
    let report = || Report { later: vec![0, 1, 2], verdict: retry(), ..Report::default() };
    assert!(matches!(concluded(&exhausted, &report()).settlement, Settlement::Dead { .. }));

    let replayed = Claimed { spared: 2, replayed_at: Some(NOW), ..exhausted };
    let conclusion = concluded(&replayed, &report());
    assert!(matches!(conclusion.settlement, Settlement::Deferred { .. }));
    assert_eq!(conclusion.attempts, 3);
}

#[test]
fn a_job_parked_by_its_attempt_keeps_its_retries_and_its_message_id() {
    let failing = Some(Blamed::Failing { just_now: true });
    let before = Claimed { attempts: 1, pending: Some(vec![1, 2]), partly_sent: true, ..claimed() };
    let report = Report {
        later: vec![1, 2],
        verdict: Some(Verdict::Account(Reason::AuthFailed)),
        blamed: failing,
        detail: Some("at auth: no".into()),
        ..Report::default()
    };
    let conclusion = concluded(&before, &report);
    let Settlement::Parked { reason, detail } = &conclusion.settlement else { panic!("{conclusion:?}") };
    assert_eq!((*reason, detail.as_str()), (Reason::AuthFailed, "at auth: no"));
    assert_eq!((conclusion.attempts, conclusion.spared, &conclusion.pending), (2, 1, &Some(vec![1, 2])));
    assert_eq!(settle_of(&job().key, &before, &conclusion).message_id, "<1@x.example>");

    let noted = concluded(&before, &Report { blamed: Some(Blamed::Noted { proven: true }), ..report });
    assert!(matches!(noted.settlement, Settlement::Deferred { .. }));
    assert_eq!((noted.attempts, noted.spared), (2, 1));
}

#[test]
fn a_job_parked_before_its_first_attempt_has_no_message_id_and_one_past_its_age_is_dead() {
    let limits = RetryLimits { schedule: Schedule::new(vec![10]), max_age: Duration::from_secs(3600) };
    let parked = |claimed: &Claimed, now| conclude_parked(&job(), claimed, Reason::TlsFailed, &limits, now);
    let message_id = |claimed: &Claimed| settle_of(&job().key, claimed, &parked(claimed, NOW)).message_id;
    let untried = parked(&claimed(), NOW);
    assert!(matches!(untried.settlement, Settlement::Parked { reason: Reason::TlsFailed, .. }));
    assert_eq!((untried.attempts, untried.spared), (0, 0));
    assert_eq!(message_id(&claimed()), "");
    assert_eq!(message_id(&Claimed { attempts: 1, ..claimed() }), "<1@x.example>");
    assert_eq!(message_id(&Claimed { crashes: 1, ..claimed() }), "<1@x.example>", "it may have been sent");
    let late = parked(&claimed(), NOW + Duration::from_secs(3601));
    assert!(matches!(late.settlement, Settlement::Dead { reason: Reason::RetriesExhausted, .. }));
    assert!(late.detail.contains("last cause tls_failed"), "{}", late.detail);
}
