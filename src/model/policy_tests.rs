//! The policy's table, read row by row: who says what, in which phase, and what it means.

use time::macros::datetime;

use super::*;
use crate::model::cancelling;
use crate::model::failure::TlsFault;
use crate::model::job::JobKey;
use crate::model::ledger::{Claimed, Incarnation, Orphan, Turn};

const NOW: OffsetDateTime = datetime!(2026-11-22 12:00 UTC);

fn reply(line: &str) -> Reply {
    let (code, text) = line.split_once(' ').unwrap_or((line, ""));
    Reply::new(code.parse().unwrap(), [text])
}

fn said(phase: Phase, line: &str) -> Verdict {
    judge(&Failure::new(phase, Fault::Reply(reply(line))))
}

fn retry_for(reason: Reason) -> Verdict {
    Verdict::Retry { reason, at_least: None, feedback: Feedback::Neutral }
}

fn throttled() -> Verdict {
    Verdict::Retry { reason: Reason::Throttled, at_least: None, feedback: Feedback::Narrow }
}

fn quota() -> Verdict {
    Verdict::Retry { reason: Reason::QuotaExceeded, at_least: Some(QUOTA_WAIT), feedback: Feedback::Narrow }
}

#[test]
fn what_providers_say_means_what_they_mean() {
    use Phase::*;
    let account = Verdict::Account;
    let dead = Verdict::Dead;
    for (who, phase, line, verdict) in [
        (
            "Gmail, wrong password",
            Auth,
            "535 5.7.8 Username and Password not accepted.",
            account(Reason::AuthFailed),
        ),
        (
            "Gmail, app password",
            Auth,
            "534 5.7.9 Application-specific password required.",
            account(Reason::AuthFailed),
        ),
        ("Gmail, no login", Mail, "530 5.7.0 Authentication Required.", account(Reason::AuthFailed)),
        (
            "Gmail, no TLS",
            Mail,
            "530 5.7.0 Must issue a STARTTLS command first.",
            account(Reason::TlsRequired),
        ),
        ("Gmail, day's quota", FinalDot, "550 5.4.5 Daily user sending limit exceeded.", quota()),
        ("Gmail, rate", Mail, "421 4.7.0 Try again later, closing connection.", throttled()),
        (
            "Gmail, size",
            FinalDot,
            "552 5.3.4 Your message exceeded Google's message size limits.",
            dead(Reason::TooLarge),
        ),
        (
            "Gmail, content",
            FinalDot,
            "552 5.7.0 This message was blocked because its content presents a potential risk.",
            dead(Reason::MessageRefused),
        ),
        (
            "Microsoft, basic auth off",
            Auth,
            "535 5.7.139 Authentication unsuccessful, basic authentication is disabled.",
            account(Reason::AuthFailed),
        ),
        (
            "Microsoft, send as",
            FinalDot,
            "554 5.2.252 SendAsDenied; alice not allowed to send as bob",
            account(Reason::SenderRefused),
        ),
        (
            "Exchange, send as",
            FinalDot,
            "550 5.7.60 SMTP; Client does not have permissions to send as this sender",
            account(Reason::SenderRefused),
        ),
        ("Microsoft, connections", Greeting, "432 4.3.2 Concurrent connections limit exceeded.", throttled()),
        (
            "Microsoft, recipients a day",
            FinalDot,
            "554 5.2.0 daily limit for message recipients reached",
            quota(),
        ),
        (
            "SES, unverified sender",
            FinalDot,
            "554 Message rejected: Email address is not verified.",
            account(Reason::SenderRefused),
        ),
        ("SES, rate", FinalDot, "454 Throttling failure: Maximum sending rate exceeded.", throttled()),
        ("SES, day's quota", FinalDot, "454 Throttling failure: Daily message quota exceeded.", quota()),
        ("SES, temporary login trouble", Auth, "454 4.7.0 Temporary authentication failure", throttled()),
        (
            "Postfix, no answer from Dovecot",
            Auth,
            "454 4.7.0 Temporary authentication failure: Connection lost to authentication server",
            throttled(),
        ),
        (
            "Exim, no user database",
            Auth,
            "435 Unable to authenticate at present",
            retry_for(Reason::ServerError),
        ),
        ("any, busy at the login", Auth, "421 4.7.0 closing", throttled()),
        ("any, password transition", Auth, "432 4.7.12 A password transition is needed", throttled()),
        ("any, login for now", Auth, "451 4.3.0 try later", retry_for(Reason::ServerError)),
        (
            "Postfix, foreign sender",
            Mail,
            "553 5.7.1 <a@b.c>: Sender address rejected: not owned by user x",
            account(Reason::SenderRefused),
        ),
        (
            "Postfix, sender's domain",
            Mail,
            "550 5.1.8 <a@b.c>: Sender address rejected: Domain not found",
            account(Reason::SenderRefused),
        ),
        (
            "Postfix, HELO name",
            Mail,
            "504 5.5.2 <pod>: Helo command rejected: need fully-qualified hostname",
            retry_for(Reason::ServerError),
        ),
        ("Postfix, disk full", Mail, "452 4.3.1 Insufficient system storage", retry_for(Reason::ServerError)),
        ("Postfix, content", FinalDot, "550 5.7.1 message content rejected", dead(Reason::MessageRefused)),
        (
            "Exchange, relay",
            Mail,
            "550 5.7.54 SMTP; Unable to relay recipient in non-accepted domain",
            account(Reason::SenderRefused),
        ),
        ("any, busy at the banner", Greeting, "554 no service here", retry_for(Reason::ServerError)),
        ("any, EHLO", Ehlo, "550 go away", retry_for(Reason::ServerError)),
        ("any, MAIL", Mail, "550 no", dead(Reason::SenderRefused)),
        ("any, MAIL for now", Mail, "451 4.3.0 try later", retry_for(Reason::ServerError)),
        ("any, DATA", Data, "554 5.6.0 no", dead(Reason::MessageRefused)),
        ("any, after the dot", FinalDot, "451 4.3.0 scanner away", retry_for(Reason::ServerError)),
        ("any, 421 after the dot: not accepted", FinalDot, "421 4.3.2 shutting down", throttled()),
        ("any, 3xx after the dot", FinalDot, "354 more", Verdict::Unknown),
        ("any, AUTH refused in its own way", Auth, "550 5.7.1 no", account(Reason::AuthFailed)),
        ("any, STARTTLS refused", Starttls, "502 5.5.1 no", account(Reason::TlsRequired)),
        ("any, STARTTLS for now", Starttls, "454 4.7.0 TLS not available", throttled()),
    ] {
        assert_eq!(said(phase, line), verdict, "{who}: {line}");
    }
}

#[test]
fn what_happens_to_the_connection_means_what_its_phase_says() {
    let judged = |phase, fault, reused| judge(&Failure { reused, ..Failure::new(phase, fault) });
    let retry = |reason, feedback| Verdict::Retry { reason, at_least: None, feedback };
    for phase in
        [Phase::Greeting, Phase::Ehlo, Phase::Tls, Phase::Auth, Phase::Mail, Phase::Data, Phase::Body]
    {
        assert_eq!(judged(phase, Fault::Lost, false), retry_for(Reason::ConnectionLost), "{phase:?}");
        assert_eq!(
            judged(phase, Fault::Timeout, false),
            retry(Reason::Timeout, Feedback::Narrow),
            "{phase:?}"
        );
    }
    assert_eq!(
        judged(Phase::Connect, Fault::Timeout, false),
        retry(Reason::ConnectTimeout, Feedback::Unreachable)
    );
    for fault in [Fault::Lost, Fault::Timeout, Fault::Protocol { detail: "x".into() }] {
        assert_eq!(judged(Phase::FinalDot, fault, true), Verdict::Unknown);
    }
    for phase in [Phase::Rset, Phase::Mail] {
        assert_eq!(judged(phase, Fault::Lost, true), Verdict::Fresh);
        assert_eq!(judged(phase, Fault::Reply(reply("421 4.4.2 timeout")), true), Verdict::Fresh);
    }
    assert_eq!(judged(Phase::Rcpt, Fault::Lost, true), retry_for(Reason::ConnectionLost));
}

#[test]
fn a_configurations_own_faults_are_the_accounts() {
    for (fault, reason) in [
        (Fault::HostNotPublic, Reason::HostNotPublic),
        (Fault::PortNotAllowed, Reason::PortNotAllowed),
        (Fault::HostNotFound, Reason::HostNotFound),
        (Fault::Tls { kind: TlsFault::Expired, detail: "expired".into() }, Reason::TlsFailed),
        (Fault::TlsRequired, Reason::TlsRequired),
        (Fault::NoAuthMechanism { offered: "XOAUTH2".into() }, Reason::AuthFailed),
    ] {
        assert_eq!(judge(&Failure::new(Phase::Resolve, fault)), Verdict::Account(reason));
    }
}

fn transaction(outcome: TransactionOutcome, refused: &[(u16, &str)]) -> Transaction {
    Transaction { refused: refused.iter().map(|(index, line)| (*index, reply(line))).collect(), outcome }
}

fn accepted() -> TransactionOutcome {
    TransactionOutcome::Accepted(reply("250 2.0.0 queued"))
}

#[test]
fn one_bad_address_among_three_costs_one_address() {
    let assessed = assess(&transaction(accepted(), &[(1, "550 5.1.1 unknown user")]), &[0, 1, 2]);
    assert_eq!(assessed.accepted, [0, 2]);
    assert_eq!(
        assessed.refused,
        [RefusedRecipient { index: 1, code: 550, reason: Reason::RecipientsRefused }]
    );
    assert_eq!((assessed.later, assessed.verdict), (vec![], None));
}

#[test]
fn a_greylisted_recipient_is_retried_alone() {
    let assessed = assess(&transaction(accepted(), &[(1, "450 4.2.0 greylisted")]), &[0, 1]);
    assert_eq!((assessed.accepted, assessed.later), (vec![0], vec![1]));
    assert_eq!(assessed.verdict, Some(retry_for(Reason::RecipientsRefused)));
}

#[test]
fn too_many_recipients_go_into_a_further_transaction() {
    for line in ["452 4.5.3 too many recipients", "452 too many recipients", "552 too many recipients"] {
        let assessed = assess(&transaction(accepted(), &[(1, line)]), &[0, 1]);
        assert_eq!(assessed.next_transaction, [1], "{line}");
    }
    let full = assess(&transaction(accepted(), &[(1, "552 5.2.2 mailbox full")]), &[0, 1]);
    assert_eq!((full.next_transaction.len(), full.refused.len()), (0, 1));
    let alone = assess(&transaction(TransactionOutcome::NoRecipient, &[(0, "452 4.5.3 too many")]), &[0]);
    assert_eq!((alone.next_transaction.len(), alone.later), (0, vec![0]), "no progress, so no loop");
}

#[test]
fn a_sender_refused_at_rcpt_is_the_accounts_fault_only_when_nobody_was_accepted() {
    let line = "553 5.7.1 <a@b.c>: Sender address rejected: not owned by user x";
    let nobody = assess(&transaction(TransactionOutcome::NoRecipient, &[(0, line), (1, line)]), &[0, 1]);
    assert_eq!(nobody.verdict, Some(Verdict::Account(Reason::SenderRefused)));
    let relay = assess(
        &transaction(TransactionOutcome::NoRecipient, &[(0, "554 5.7.1 <x@y.z>: Relay access denied")]),
        &[0],
    );
    assert_eq!(relay.verdict, Some(Verdict::Account(Reason::SenderRefused)));
    let some = assess(&transaction(accepted(), &[(1, line)]), &[0, 1]);
    assert_eq!((some.verdict, some.refused.len()), (None, 1));
}

#[test]
fn a_message_that_fails_as_a_whole_still_remembers_its_refused_recipients() {
    let failed = TransactionOutcome::Failed(Failure::new(Phase::FinalDot, Fault::Reply(reply("451 later"))));
    let assessed = assess(&transaction(failed, &[(0, "550 5.1.1 unknown")]), &[0, 1]);
    assert_eq!((assessed.refused.len(), assessed.later), (1, vec![1]));
}

fn limits() -> RetryLimits {
    RetryLimits { schedule: Schedule::new(vec![10, 60]), max_age: Duration::from_secs(3600 * 48) }
}

fn progress(attempts: u32) -> Progress {
    Progress {
        attempts,
        unknowns: 0,
        counted_from: NOW,
        expires_at: None,
        on_unknown: OnUnknown::Resend,
        platform: false,
        blamed: None,
        last: None,
    }
}

#[test]
fn retries_follow_the_schedule_and_end_with_their_last_cause() {
    let verdict = retry_for(Reason::ServerError);
    let decided = |attempts| decide(verdict, &progress(attempts), &limits(), NOW);
    let wait = |s| Disposition::Retry { reason: Reason::ServerError, wait: Duration::from_secs(s) };
    assert_eq!([decided(1), decided(2)], [wait(10), wait(60)]);
    let exhausted = Disposition::Dead { reason: Reason::RetriesExhausted, cause: Some(Reason::ServerError) };
    assert_eq!(decided(3), exhausted);
    let late = NOW + Duration::from_secs(3600 * 48 - 5);
    assert_eq!(decide(verdict, &progress(1), &limits(), late), exhausted);
}

#[test]
fn a_used_up_quota_waits_an_hour_at_least() {
    let decided = decide(quota(), &progress(1), &limits(), NOW);
    assert_eq!(decided, Disposition::Retry { reason: Reason::QuotaExceeded, wait: QUOTA_WAIT });
}

#[test]
fn a_job_that_would_expire_before_its_retry_is_expired_now() {
    let soon = Progress { expires_at: Some(NOW + Duration::from_secs(5)), ..progress(1) };
    let decided = decide(retry_for(Reason::Timeout), &soon, &limits(), NOW);
    assert_eq!(decided, Disposition::Dead { reason: Reason::Expired, cause: Some(Reason::Timeout) });
}

#[test]
fn an_unknown_outcome_is_sent_again_once_or_never() {
    let dead = Disposition::Dead { reason: Reason::UnknownOutcome, cause: None };
    let hold = Progress { on_unknown: OnUnknown::Hold, ..progress(1) };
    let second = Progress { unknowns: 1, ..progress(2) };
    assert_eq!(decide(Verdict::Unknown, &hold, &limits(), NOW), dead);
    assert_eq!(decide(Verdict::Unknown, &second, &limits(), NOW), dead);
    let first = decide(Verdict::Unknown, &progress(1), &limits(), NOW);
    assert_eq!(first, Disposition::Retry { reason: Reason::UnknownOutcome, wait: Duration::from_secs(10) });
    assert_eq!(decide(Verdict::Unknown, &progress(3), &limits(), NOW), dead, "the schedule has ended");
}

#[test]
fn a_fault_of_the_platforms_account_waits_for_the_operator() {
    let platform = Progress { platform: true, ..progress(1) };
    let verdict = Verdict::Account(Reason::AuthFailed);
    assert!(matches!(decide(verdict, &platform, &limits(), NOW), Disposition::Retry { .. }));
}

#[test]
fn a_fault_of_an_organizations_account_costs_its_job_no_attempt() {
    use Disposition::{Dead, Park, Retry, Spared};
    let reason = Reason::AuthFailed;
    let wait = Duration::from_secs;
    let failing = Some(Blamed::Failing { just_now: false });
    let (noted, unproven) = (Some(Blamed::Noted { proven: true }), Some(Blamed::Noted { proven: false }));
    let outdated = Some(Blamed::Outdated);
    let soon = |s| Some(NOW + Duration::from_secs(s));
    let cause = Some(reason);
    for (what, blamed, last, expires_at, decided) in [
        ("it fails for good", failing, None, None, Park { reason }),
        ("whatever it failed for before", failing, Some(reason), None, Park { reason }),
        ("for the first time", noted, None, None, Spared { reason, wait: wait(10) }),
        ("the database did not answer", None, None, None, Spared { reason, wait: wait(10) }),
        ("after another failure", noted, Some(Reason::Timeout), None, Spared { reason, wait: wait(10) }),
        ("others got through meanwhile", noted, Some(reason), None, Retry { reason, wait: wait(60) }),
        (
            "released, and nobody got through since",
            unproven,
            Some(reason),
            None,
            Spared { reason, wait: wait(10) },
        ),
        ("it was changed meanwhile", outdated, Some(reason), None, Spared { reason, wait: wait(5) }),
        ("past its time", failing, None, soon(0), Dead { reason: Reason::Expired, cause }),
        ("past its time by then", noted, None, soon(10), Dead { reason: Reason::Expired, cause }),
        ("it waits as long as it may", failing, None, soon(1), Park { reason }),
    ] {
        let progress = Progress { blamed, last, expires_at, ..progress(2) };
        assert_eq!(decide(Verdict::Account(reason), &progress, &limits(), NOW), decided, "{what}");
    }
    let old = Progress { blamed: failing, ..progress(1) };
    let late = NOW + Duration::from_secs(3600 * 48 + 1);
    let exhausted = Dead { reason: Reason::RetriesExhausted, cause };
    assert_eq!(decide(Verdict::Account(reason), &old, &limits(), late), exhausted);
}

#[test]
fn a_server_that_cannot_be_reached_is_retried_until_its_configuration_fails() {
    let reason = Reason::ConnectFailed;
    let verdict = Verdict::Retry { reason, at_least: None, feedback: Feedback::Unreachable };
    let decided = |blamed| decide(verdict, &Progress { blamed, ..progress(1) }, &limits(), NOW);
    let retry = Disposition::Retry { reason, wait: Duration::from_secs(10) };
    let noted = Some(Blamed::Noted { proven: true });
    assert_eq!([decided(None), decided(noted), decided(Some(Blamed::Outdated))], [retry; 3]);
    assert_eq!(decided(Some(Blamed::Failing { just_now: true })), Disposition::Park { reason });
}

fn orphan(crashes: u32, unknowns: u32, committing: bool) -> Claimed {
    Claimed {
        owner: Incarnation(2),
        turn: Turn(0),
        attempts: 0,
        spared: 0,
        first_at: NOW,
        replayed_at: None,
        reason: None,
        now: NOW,
        message_id: format!("<{}@b.c>", JobKey { organization: None, id: uuid::Uuid::nil() }.id),
        pending: None,
        refused: vec![],
        partly_sent: false,
        orphan: Some(Orphan { committing }),
        crashes,
        unknowns,
        newest_sequence: None,
        cancelled: false,
        custom_smtp: false,
        config_version: None,
        config_failing: false,
    }
}

#[test]
fn a_dead_workers_claim_is_unknown_unless_its_mark_says_otherwise() {
    use OrphanDisposition::{Continue, Dead};
    let decided = |crashes, unknowns, committing, on_unknown| {
        decide_orphan(&orphan(crashes, unknowns, committing), on_unknown)
    };
    assert_eq!(decided(1, 0, false, OnUnknown::Resend), Continue { unknowns: 1 });
    let dead = |reason, unknowns| Dead { reason, unknowns };
    let unknown = |unknowns| dead(Reason::UnknownOutcome, unknowns);
    assert_eq!(decided(2, 1, true, OnUnknown::Resend), unknown(2), "a second unknown outcome");
    assert_eq!(
        decided(2, 1, false, OnUnknown::Resend),
        Continue { unknowns: 1 },
        "died before its final dot"
    );
    assert_eq!(
        decided(2, 0, true, OnUnknown::Resend),
        unknown(1),
        "the worker that marked it had counted its predecessor's unknown outcome, and died before recording it"
    );
    assert_eq!(decided(3, 1, false, OnUnknown::Resend), dead(Reason::CrashLoop, 1));
    assert_eq!(
        decided(3, 0, false, OnUnknown::Resend),
        dead(Reason::CrashLoop, 1),
        "the first of them left no mark, and may have come to its final dot"
    );
    assert_eq!(decided(1, 0, true, OnUnknown::Hold), unknown(1));
    assert_eq!(decided(1, 0, false, OnUnknown::Hold), Continue { unknowns: 0 });
    assert_eq!(decided(3, 0, false, OnUnknown::Hold), dead(Reason::CrashLoop, 0));
    let living = Claimed { orphan: None, ..orphan(0, 0, false) };
    assert_eq!(decide_orphan(&living, OnUnknown::Hold), Continue { unknowns: 0 });
}

#[test]
fn only_a_refused_mechanism_lets_the_next_one_be_tried() {
    assert!(auth_may_try_next(&reply("504 5.5.4 unrecognized authentication type")));
    assert!(auth_may_try_next(&reply("535 5.7.4 mechanism not supported")));
    assert!(!auth_may_try_next(&reply("535 5.7.8 bad credentials")));
}

#[test]
fn what_was_called_back_is_said_to_be_unsent_only_where_that_is_known() {
    let ended = |claimed: &Claimed, on_unknown| cancelling::give_up(claimed, on_unknown);
    let living = |unknowns| Claimed { orphan: None, ..orphan(0, unknowns, false) };
    assert_eq!(ended(&living(0), OnUnknown::Resend), (Reason::Cancelled, cancelling::UNSENT));
    assert_eq!(ended(&living(1), OnUnknown::Resend), (Reason::Cancelled, cancelling::UNSURE));
    // The last worker died: without the duty to mark it, it may have sent the final dot.
    assert_eq!(ended(&orphan(1, 0, false), OnUnknown::Resend).0, Reason::UnknownOutcome);
    assert_eq!(ended(&orphan(1, 0, false), OnUnknown::Hold), (Reason::Cancelled, cancelling::UNSENT));
    assert_eq!(ended(&orphan(2, 1, false), OnUnknown::Resend), (Reason::Cancelled, cancelling::UNSURE));
}
