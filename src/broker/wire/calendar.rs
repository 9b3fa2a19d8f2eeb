//! What an iCalendar object says about itself, as far as mail programs act on it.
//! Guarantee: the METHOD found is the one that a reader of the composed message finds: lines end as composition ends them.

/// The METHOD property of the calendar itself, unfolded (RFC 5545 section 3.1).
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Method {
    /// The text does not begin with BEGIN:VCALENDAR.
    NotACalendar,
    /// No METHOD at the calendar's own level.
    Missing,
    /// More than one.
    Repeated,
    /// Its value.
    Is(String),
}

/// Only the start of a content line matters: no method is as long.
const KEPT_BYTES: usize = 64;
pub(super) const FIRST_LINE: &str = "BEGIN:VCALENDAR";

pub(super) fn method(content: &str) -> Method {
    if !content.get(..FIRST_LINE.len()).is_some_and(|start| start.eq_ignore_ascii_case(FIRST_LINE)) {
        return Method::NotACalendar;
    }
    let mut reader = Reader::default();
    let mut logical = String::with_capacity(KEPT_BYTES);
    for line in physical_lines(content) {
        if let Some(continued) = line.strip_prefix([' ', '\t']) {
            append(&mut logical, continued);
        } else {
            reader.take(&logical);
            logical.clear();
            append(&mut logical, line);
        }
    }
    reader.take(&logical);
    match reader {
        Reader { repeated: true, .. } => Method::Repeated,
        Reader { method, .. } => method.map_or(Method::Missing, Method::Is),
    }
}

/// Lines end with CRLF, LF or CR: composition makes all of them CRLF.
fn physical_lines(content: &str) -> impl Iterator<Item = &str> {
    content.split('\n').flat_map(|line| line.strip_suffix('\r').unwrap_or(line).split('\r'))
}

fn append(logical: &mut String, line: &str) {
    let room = KEPT_BYTES.saturating_sub(logical.len()).min(line.len());
    logical.push_str(&line[..line.floor_char_boundary(room)]);
}

#[derive(Default)]
struct Reader {
    depth: usize,
    method: Option<String>,
    repeated: bool,
}

impl Reader {
    fn take(&mut self, line: &str) {
        let Some(end) = line.find([':', ';']) else {
            return;
        };
        let name = &line[..end];
        let value = line.split_once(':').map_or("", |(_, value)| value).trim();
        if name.eq_ignore_ascii_case("BEGIN") {
            self.depth += 1;
        } else if name.eq_ignore_ascii_case("END") {
            self.depth = self.depth.saturating_sub(1);
        } else if name.eq_ignore_ascii_case("METHOD") && self.depth <= 1 {
            self.repeated |= self.method.is_some();
            self.method = Some(value.to_owned());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_calendars_own_method_is_found_however_it_is_folded() {
        for (content, expected) in [
            ("BEGIN:VCALENDAR\r\nMETHOD:REQUEST\r\nEND:VCALENDAR\r\n", Method::Is("REQUEST".into())),
            (
                "BEGIN:VCALENDAR\nVERSION:2.0\nMETH\n OD:CAN\n\tCEL\nEND:VCALENDAR",
                Method::Is("CANCEL".into()),
            ),
            ("begin:vcalendar\r\nmethod;x-a=b:Publish", Method::Is("Publish".into())),
            ("BEGIN:VCALENDAR\r\nX-NOTE:a\rMETHOD:CANCEL\r\n", Method::Is("CANCEL".into())),
            ("BEGIN:VCALENDAR\nDESCRIPTION:METHOD\\nMETHOD:CANCEL\nEND:VCALENDAR", Method::Missing),
            ("BEGIN:VCALENDAR\nBEGIN:VEVENT\nMETHOD:CANCEL\nEND:VEVENT\nEND:VCALENDAR", Method::Missing),
            ("BEGIN:VCALENDAR\nMETHOD:REQUEST\nMETHOD:CANCEL\nEND:VCALENDAR", Method::Repeated),
            ("METHOD:REQUEST\nBEGIN:VCALENDAR\nEND:VCALENDAR", Method::NotACalendar),
            ("Hello\nBEGIN:VCALENDAR\nMETHOD:REQUEST", Method::NotACalendar),
            (" BEGIN:VCALENDAR\nMETHOD:REQUEST", Method::NotACalendar),
            ("", Method::NotACalendar),
        ] {
            assert_eq!(method(content), expected, "{content:?}");
        }
    }
}
