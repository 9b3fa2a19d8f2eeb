//! What a run found, as Markdown: a section for each scenario, with its table and whether its targets were met.
//! Guarantee: pure; a target that was missed, or could not be measured, is shown as such. Writing one scenario's section
//! leaves those of the others as they are.

/// One scenario's outcome.
pub struct Section {
    /// Its heading, which is also how an earlier section of the same scenario is found.
    pub title: String,
    /// When, with what command.
    pub origin: String,
    /// What was done, in sentences.
    pub prose: String,
    /// The first row is the head.
    pub table: Vec<Vec<String>>,
    /// What was promised.
    pub targets: Vec<Target>,
}

/// A promise, and what was measured.
pub struct Target {
    what: String,
    wanted: String,
    measured: String,
    met: bool,
}

impl Target {
    /// Met by this much or more.
    pub fn at_least(what: &str, measured: f64, bound: f64, unit: &str) -> Self {
        Self::new(what, "≥", measured, bound, unit, measured >= bound)
    }

    /// Met by this much or less.
    pub fn at_most(what: &str, measured: f64, bound: f64, unit: &str) -> Self {
        Self::new(what, "≤", measured, bound, unit, measured <= bound)
    }

    fn new(what: &str, sign: &str, measured: f64, bound: f64, unit: &str, met: bool) -> Self {
        let wanted = format!("{sign} {}{unit}", figure(bound));
        let measured =
            if measured.is_nan() { "not measured".to_owned() } else { format!("{}{unit}", figure(measured)) };
        Self { what: what.to_owned(), wanted, measured, met }
    }

    fn verdict(&self) -> &'static str {
        if self.met { "met" } else { "**missed**" }
    }
}

impl Section {
    /// The section's text, heading included.
    pub fn markdown(&self) -> String {
        let mut text = format!("## {}\n\n{}\n\n{}\n\n", self.title, self.origin, self.prose);
        text.push_str(&table(&self.table));
        if !self.targets.is_empty() {
            let head = ["target", "wanted", "measured", ""].map(str::to_owned).to_vec();
            let rows = self.targets.iter().map(|target| {
                vec![
                    target.what.clone(),
                    target.wanted.clone(),
                    target.measured.clone(),
                    target.verdict().to_owned(),
                ]
            });
            text.push('\n');
            text.push_str(&table(&std::iter::once(head).chain(rows).collect::<Vec<_>>()));
        }
        text
    }
}

/// The report with this section in the place of an earlier one of the same title, in the order of the titles.
pub fn with_section(report: &str, title: &str, section: &str) -> String {
    let mut parts = split(report);
    let text = format!("{}\n", section.trim_end());
    match parts.iter_mut().find(|(name, _)| name == title) {
        Some((_, old)) => *old = text,
        None => parts.push((title.to_owned(), text)),
    }
    parts[1..].sort_by(|(a, _), (b, _)| a.cmp(b));
    let parts: Vec<String> = parts.into_iter().map(|(_, text)| text.trim_end().to_owned()).collect();
    format!("{}\n", parts.join("\n\n").trim_start())
}

/// What stands before the first section, then each section under its title.
fn split(report: &str) -> Vec<(String, String)> {
    let mut parts = vec![(String::new(), String::new())];
    for line in report.lines() {
        if let Some(title) = line.strip_prefix("## ") {
            parts.push((title.to_owned(), String::new()));
        }
        if let Some((_, text)) = parts.last_mut() {
            text.push_str(line);
            text.push('\n');
        }
    }
    parts
}

/// A Markdown table; the first row is the head.
pub fn table(rows: &[Vec<String>]) -> String {
    let mut text = String::new();
    for (number, row) in rows.iter().enumerate() {
        text.push_str(&format!("| {} |\n", row.join(" | ")));
        if number == 0 {
            let rule: Vec<&str> =
                row.iter().enumerate().map(|(column, _)| if column == 0 { "---" } else { "---:" }).collect();
            text.push_str(&format!("| {} |\n", rule.join(" | ")));
        }
    }
    text
}

/// A number to be read: three significant digits where it is small, thousands apart where it is large.
pub fn figure(value: f64) -> String {
    let magnitude = value.abs();
    if value.is_nan() {
        return "–".to_owned();
    }
    if magnitude < 10.0 {
        let text = format!("{value:.2}");
        return text.trim_end_matches('0').trim_end_matches('.').to_owned();
    }
    if magnitude < 100.0 {
        return format!("{value:.1}").trim_end_matches(".0").to_owned();
    }
    let digits = format!("{magnitude:.0}");
    let mut text = String::from(if value < 0.0 { "-" } else { "" });
    for (position, digit) in digits.chars().enumerate() {
        if position > 0 && (digits.len() - position) % 3 == 0 {
            text.push(',');
        }
        text.push(digit);
    }
    text
}
