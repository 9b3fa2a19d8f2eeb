//! The job that everybody sends: a booking's confirmation of about 4.5 KB once composed, with text, HTML and an invitation.
//! Guarantee: jobs differ in identifier, recipient and organization only; the recipient tells the SMTP server which job it is.

use std::sync::LazyLock;

use sendoff::clock::Clock;
use serde_json::json;

/// Routing key of a confirmation.
pub const CONFIRMATION: &str = "notification.booking_confirmed";
/// Routing key of a reminder.
pub const REMINDER: &str = "reminder.day_before";

/// A job, ready to be published.
pub struct Job {
    /// Its JSON.
    pub body: Vec<u8>,
    /// Which lane takes it.
    pub routing_key: &'static str,
}

static TEXT: LazyLock<String> = LazyLock::new(|| {
    "Your booking is confirmed. We look forward to seeing you on Monday at ten.\n".repeat(15)
});
static HTML: LazyLock<String> =
    LazyLock::new(|| format!("<html><body><p>{}</p></body></html>\n", TEXT.replace('\n', "<br>\n")));

/// A confirmation to the recipient `label`.
pub fn confirmation(clock: &Clock, organization: &str, label: &str) -> Job {
    job(clock, organization, label, CONFIRMATION)
}

/// A reminder to the recipient `label`.
pub fn reminder(clock: &Clock, organization: &str, label: &str) -> Job {
    job(clock, organization, label, REMINDER)
}

fn job(clock: &Clock, organization: &str, label: &str, routing_key: &'static str) -> Job {
    let id = clock.new_id();
    let calendar = format!(
        "BEGIN:VCALENDAR\r\nVERSION:2.0\r\nPRODID:-//Sendoff//Bench//EN\r\nMETHOD:REQUEST\r\nBEGIN:VEVENT\r\nUID:{id}\r\n\
         SEQUENCE:0\r\nDTSTAMP:20261122T120000Z\r\nDTSTART:20261130T090000Z\r\nDTEND:20261130T100000Z\r\n\
         SUMMARY:Strategy talk\r\nORGANIZER:mailto:bookings@acme.example\r\n\
         ATTENDEE;RSVP=TRUE:mailto:{label}@customer.example\r\nEND:VEVENT\r\nEND:VCALENDAR\r\n"
    );
    let body = json!({
        "version": 1, "id": id, "organization_id": organization, "kind": "booking.confirmed",
        "to": [format!("Ann Lee <{label}@customer.example>")],
        "subject": "Your booking on Monday is confirmed", "text": *TEXT, "html": *HTML,
        "calendar": {"method": "REQUEST", "content": calendar},
    });
    Job { body: body.to_string().into_bytes(), routing_key }
}
