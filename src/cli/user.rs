//! Who runs this program, for the audit log.
//! Guarantee: a name that a terminal can show, of at most 64 characters, and never an empty one.

use std::os::unix::fs::MetadataExt;

use crate::model::text::is_harmful;

/// Longest name; longer ones are cut.
const NAME_MAX: usize = 64;
/// The superuser, who may be somebody else by leave.
const ROOT: &str = "0";

/// The name of the account that runs this process, or that became root by `sudo`; its number where the system's list has no
/// name for it.
pub(super) fn name() -> String {
    let own = |variable| std::env::var(variable).ok().and_then(|name| shown(&name));
    let Ok(process) = std::fs::metadata("/proc/self") else {
        return own("USER").unwrap_or_else(|| "unknown".to_owned());
    };
    let uid = process.uid().to_string();
    if uid == ROOT
        && let Some(name) = own("SUDO_USER")
    {
        return name;
    }
    let users = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
    listed(&users, &uid).unwrap_or_else(|| format!("uid {uid}"))
}

/// passwd(5): name, password, uid.
fn listed(users: &str, uid: &str) -> Option<String> {
    let name = users.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)? == uid).then_some(name)
    });
    shown(name?)
}

fn shown(name: &str) -> Option<String> {
    let name: String = name.chars().filter(|c| !c.is_control() && !is_harmful(*c)).take(NAME_MAX).collect();
    (!name.is_empty()).then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_account_has_the_name_that_the_system_lists() {
        let users = "root:x:0:0:root:/root:/bin/bash\nann:x:1000:1000::/home/ann:/bin/sh\nbroken\n";
        assert_eq!(listed(users, "1000").as_deref(), Some("ann"));
        assert_eq!(listed(users, "7"), None);
    }

    #[test]
    fn a_name_does_not_command_the_terminal_that_shows_it() {
        assert_eq!(shown("a\u{1b}[2Jnn").as_deref(), Some("a[2Jnn"));
        assert_eq!(shown("\u{7}"), None);
        assert_eq!(shown(&"x".repeat(100)).map(|name| name.len()), Some(NAME_MAX));
        assert!(!name().is_empty());
    }
}
