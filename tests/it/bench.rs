//! The benchmark's arithmetic, its report and its options; the harness itself (bench/throughput) needs minutes and is no test.
//! Guarantee: what is tested here is the very file that `./dev bench` runs.

use clap::Parser;

#[allow(dead_code, reason = "the harness uses all of it")]
#[path = "../../bench/throughput/options.rs"]
mod options;
#[allow(dead_code, reason = "the harness uses all of it")]
#[path = "../../bench/throughput/report.rs"]
mod report;
#[allow(dead_code, reason = "the harness uses all of it")]
#[path = "../../bench/throughput/stats.rs"]
mod stats;

use options::Options;
use report::{Section, Target, figure, with_section};
use stats::{largest, median, percentile, spread};

#[test]
fn the_median_is_the_middle_or_the_mean_of_the_two_in_the_middle() {
    assert_eq!(median(&[9.0, 1.0, 5.0]), 5.0);
    assert_eq!(median(&[9.0, 1.0, 5.0, 7.0]), 6.0);
    assert!(median(&[]).is_nan());
}

#[test]
fn a_percentile_is_a_value_that_was_measured() {
    let values: Vec<f64> = (1..=200).rev().map(f64::from).collect();
    assert_eq!(percentile(&values, 50.0), 100.0);
    assert_eq!(percentile(&values, 99.0), 198.0);
    assert_eq!(percentile(&values, 100.0), 200.0);
    assert_eq!(percentile(&[3.0], 99.0), 3.0);
    assert!(percentile(&[], 99.0).is_nan());
}

#[test]
fn the_spread_is_a_share_of_the_median() {
    assert_eq!(spread(&[90.0, 100.0, 110.0]), 0.2);
    assert!(spread(&[]).is_nan());
    assert_eq!(largest(&[1.0, 3.0, 2.0]), 3.0);
}

#[test]
fn a_missed_target_is_shown_as_missed_and_so_is_one_that_was_not_measured() {
    let section = Section {
        title: "1. drain".to_owned(),
        origin: "today".to_owned(),
        prose: "What was done.".to_owned(),
        table: vec![vec!["who".to_owned(), "jobs/s".to_owned()], vec!["we".to_owned(), figure(6543.2)]],
        targets: vec![
            Target::at_least("speed", 13.0, 12.0, "x"),
            Target::at_most("cpu", 130.4, 120.0, " µs"),
            Target::at_least("limit", f64::NAN, 0.5, ""),
        ],
    };
    assert_eq!(
        section.markdown(),
        "## 1. drain\n\ntoday\n\nWhat was done.\n\n| who | jobs/s |\n| --- | ---: |\n| we | 6,543 |\n\n\
         | target | wanted | measured |  |\n| --- | ---: | ---: | ---: |\n| speed | ≥ 12x | 13x | met |\n\
         | cpu | ≤ 120 µs | 130 µs | **missed** |\n| limit | ≥ 0.5 | not measured | **missed** |\n"
    );
}

#[test]
fn a_section_replaces_its_own_earlier_one_and_no_other() {
    let report = "# Results\n\nMachine.\n\n## 1. a\n\nold\n\n## 3. c\n\nkept\n";
    let again = with_section(report, "1. a", "## 1. a\n\nnew\n");
    assert_eq!(again, "# Results\n\nMachine.\n\n## 1. a\n\nnew\n\n## 3. c\n\nkept\n");
    let more = with_section(&again, "2. b", "## 2. b\n\nbetween\n");
    assert_eq!(more, "# Results\n\nMachine.\n\n## 1. a\n\nnew\n\n## 2. b\n\nbetween\n\n## 3. c\n\nkept\n");
}

#[test]
fn figures_have_as_many_digits_as_they_deserve() {
    let shown: Vec<String> =
        [0.0, 0.948, 1.5, 12.04, 99.0, 512.4, 5312.0, 1_000_000.0, -12345.0, f64::NAN].map(figure).to_vec();
    assert_eq!(shown, ["0", "0.95", "1.5", "12", "99", "512", "5,312", "1,000,000", "-12,345", "–"]);
}

#[test]
fn only_a_run_of_everything_replaces_the_results_unless_it_is_asked_to() {
    let writes = |arguments: &str| parsed(arguments).writes();
    assert!(writes(""));
    assert!(writes("--reps 5"));
    assert!(writes("drain --write"));
    for partial in ["drain", "--quick", "--jobs 1000", "--contestants sendoff,lettre"] {
        assert!(!writes(partial), "{partial}");
    }
}

#[test]
fn only_what_a_scenario_needs_is_installed() {
    let needs = |arguments: &str| parsed(arguments).needs();
    assert_eq!(needs("drain"), ["postfix", "nodemailer", "aiosmtplib", "lettre"]);
    assert_eq!(needs("drain --contestants sendoff,lettre"), ["postfix", "lettre"]);
    assert_eq!(needs("tenants backlog"), ["postfix"]);
    assert!(needs("idle flood isolation reminders").is_empty());
}

#[test]
fn quick_is_a_tenth_once_and_jobs_are_as_many_as_were_asked_for() {
    assert_eq!(parsed("").jobs(50_000), 50_000);
    assert_eq!(parsed("--quick").jobs(50_000), 5_000);
    assert_eq!(parsed("--quick --jobs 700").jobs(50_000), 700);
    assert_eq!((parsed("--quick --reps 5").reps(), parsed("--reps 5").reps()), (1, 5));
    assert_eq!((parsed("--quick").backlog(), parsed("--quick").small_backlog()), (10_000, 1_000));
}

#[test]
fn no_lock_of_a_peer_names_where_to_download_from() {
    let lock = include_str!("../../bench/peers/nodemailer/package-lock.json");
    assert!(lock.contains("node_modules/nodemailer"));
    for word in ["resolved", "http:", "https:"] {
        assert!(!lock.contains(word), "the lock has {word}: see npm's omit-lockfile-registry-resolved");
    }
    let requirements = include_str!("../../bench/peers/aiosmtplib/requirements.txt");
    assert!(requirements.lines().all(|line| line.contains("==")), "every version is exact");
}

fn parsed(arguments: &str) -> Options {
    Options::try_parse_from(std::iter::once("bench").chain(arguments.split_whitespace()))
        .expect("they are valid")
}
