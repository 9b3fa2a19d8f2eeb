//! What replay and discard share: who asks, of which letters, and that it is on record.
//! Guarantee: neither begins without a condition or --all, nor before its entry in the audit log is written.

use clap::Args;
use serde_json::{Value, json};

use super::filter::FilterArgs;
use crate::cli::exit::BadArgument;
use crate::cli::run;
pub(super) use crate::cli::run::{GOES_ON, OnRecord, PATIENCE, Progress, count, interruptible, print, say};
use crate::clock::Clock;
use crate::dead_letters::Groups;
use crate::model::failure::Reason;
use crate::model::letter::{LetterFilter, Owner};
use crate::model::organization::OrganizationId;
use crate::store::{AuditEntry, Store};

/// Heading of the options that are no conditions.
pub(super) const HOW: &str = "How";
/// Which letters, by whom, and whether in earnest.
#[derive(Debug, Args)]
pub(super) struct GovernedArgs {
    #[command(flatten)]
    pub(super) which: FilterArgs,
    /// Every letter, whatever it is; --limit bounds it
    #[arg(long)]
    all: bool,
    /// Print what would happen and change nothing
    #[arg(long, help_heading = HOW)]
    pub(super) dry_run: bool,
    /// Who does it, for the audit log; the operating system's user unless given
    #[arg(long = "as", help_heading = HOW, value_name = "ACTOR", value_parser = run::actor)]
    actor: Option<String>,
    /// Print the result as JSON
    #[arg(long, help_heading = HOW)]
    pub(super) json: bool,
}

impl GovernedArgs {
    /// The letters that are meant.
    ///
    /// # Errors
    /// Without a condition and without --all.
    pub(super) fn filter(&self) -> Result<LetterFilter, BadArgument> {
        if self.which.is_empty() && !self.all {
            return Err(BadArgument(
                "which letters? Give at least one of --org, --platform, --reason, --kind, --state, --since, --until, --id; \
                 or --all"
                    .to_owned(),
            ));
        }
        self.which.filter(Clock::system().now())
    }

    /// Who.
    pub(super) fn actor(&self) -> String {
        run::actor_or_user(self.actor.as_deref())
    }

    pub(super) fn limit(&self) -> Option<u64> {
        self.which.limit.map(u64::from)
    }
}

/// Writes who begins what, with its filter and its other options.
pub(super) async fn begin<'a>(
    store: &'a Store,
    command: &str,
    actor: &str,
    filter: &LetterFilter,
    options: Value,
) -> anyhow::Result<OnRecord<'a>> {
    let only = match filter.organizations.as_slice() {
        [one] => OrganizationId::parse(one).ok(),
        _ => None,
    };
    let entry = AuditEntry {
        actor: Some(actor),
        user_id: None,
        organization: only.as_ref(),
        command,
        outcome: "started",
        fields: &given(filter),
    };
    let summary = json!({ "filter": filter, "options": options });
    run::begin(store, entry, summary).await
}

fn given(filter: &LetterFilter) -> Vec<&'static str> {
    let conditions = [
        ("organizations", filter.organizations.is_empty()),
        ("reasons", filter.reasons.is_empty()),
        ("kinds", filter.kinds.is_empty()),
        ("states", filter.states.is_empty()),
        ("since", filter.since.is_none()),
        ("until", filter.until.is_none()),
        ("ids", filter.ids.is_empty()),
    ];
    conditions.into_iter().filter(|(_, is_absent)| !is_absent).map(|(name, _)| name).collect()
}

/// The groups as lines, the largest first.
pub(super) fn histogram(groups: &Groups) -> Vec<String> {
    let mut groups: Vec<_> = groups.iter().collect();
    groups.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
    let line = |((reason, owner), count): &(&(Reason, Owner), &u64)| {
        format!("  {count:>9}  {:<20} {owner}", reason.as_str())
    };
    groups.iter().map(line).collect()
}

/// The same as JSON.
pub(super) fn groups_json(groups: &Groups) -> Value {
    groups
        .iter()
        .map(|((reason, owner), count)| {
            let platform = *owner == Owner::Platform;
            json!({ "reason": reason, "organization_id": owner.organization(), "platform": platform, "count": count })
        })
        .collect()
}
