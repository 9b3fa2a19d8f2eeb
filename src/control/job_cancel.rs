//! `job.cancel`: calls back one job, or a booking's jobs up to a revision, of an organization or of the platform.
//! Guarantee: it reaches the jobs of the organization that it names only, and it may be repeated.

use serde_json::json;
use uuid::Uuid;

use super::error::ControlError;
use super::fields::{Fields, required};
use super::{Call, Control, Done};
use crate::model::job::{JobKey, Revision};

pub(super) const PARAMS: &[&str] = &["id", "group", "sequence"];

/// What is called back.
#[derive(Debug, PartialEq, Eq)]
enum Aim {
    Job(Uuid),
    Booking(Revision),
}

impl Control {
    pub(super) async fn job_cancel(&self, call: &Call<'_>) -> Result<Done, ControlError> {
        let organization = call.request.organization.as_ref();
        let audit = call.audit("ok");
        let done = match aim(&call.request.params)? {
            Aim::Job(id) => {
                let key = JobKey { organization: organization.cloned(), id };
                self.store.cancel_job(&key, audit, call.by).await?
            }
            Aim::Booking(revision) => {
                self.store.cancel_group(organization, &revision, audit, call.by).await?
            }
        };
        let result = json!({ "cancelled": done.cancelled, "too_late": done.too_late });
        Ok(Done::changed(result))
    }
}

fn aim(params: &Fields) -> Result<Aim, ControlError> {
    let id: Option<Uuid> = params.value("id", "must be a UUID")?;
    let group = params.text("group")?;
    let sequence: Option<i64> = params.value("sequence", SEQUENCE)?;
    let beside = |name| ControlError::invalid_request(name, format!("{name} must not be given beside id"));
    match (id, group, sequence) {
        (Some(id), None, None) => Ok(Aim::Job(id)),
        (Some(_), Some(_), _) => Err(beside("group")),
        (Some(_), None, Some(_)) => Err(beside("sequence")),
        (None, None, None) => {
            Err(ControlError::invalid_request("id", "id is missing").hint("Or give group and sequence."))
        }
        (None, group, sequence) => {
            let group = required("group", group)?;
            let sequence = required("sequence", sequence)?;
            if !Revision::is_group(&group) {
                let max = Revision::GROUP_MAX;
                let rule = format!("must be 1 to {max} characters without control characters");
                return Err(ControlError::invalid_field("group", rule));
            }
            if sequence < 0 {
                return Err(ControlError::invalid_field("sequence", SEQUENCE));
            }
            Ok(Aim::Booking(Revision { group, sequence }))
        }
    }
}

const SEQUENCE: &str = "must be an integer of at least 0";

#[cfg(test)]
mod tests {
    use super::super::error::Code;
    use super::*;

    const ID: &str = "0198c0de-0000-7000-8000-000000000001";

    fn aimed(params: &str) -> Result<Aim, ControlError> {
        aim(&Fields::read(params.as_bytes()).expect("an object"))
    }

    #[test]
    fn a_job_or_a_bookings_revision_is_aimed_at() {
        let job = aimed(&format!(r#"{{"id": "{ID}"}}"#));
        assert_eq!(job, Ok(Aim::Job(ID.parse().expect("a UUID"))));
        for (sequence, group) in [(0, "b".to_owned()), (i64::MAX, "ä".repeat(255))] {
            let booking = aimed(&json!({"group": group, "sequence": sequence}).to_string());
            assert_eq!(booking, Ok(Aim::Booking(Revision { group, sequence })));
        }
    }

    #[test]
    fn anything_else_is_refused_by_its_field() {
        let long = format!(r#"{{"group": "{}", "sequence": 1}}"#, "ä".repeat(256));
        let both = format!(r#"{{"id": "{ID}", "group": "b", "sequence": 1}}"#);
        let half = format!(r#"{{"id": "{ID}", "sequence": 1}}"#);
        for (params, code, field) in [
            ("{}", Code::InvalidRequest, "id"),
            (r#"{"group": "b"}"#, Code::InvalidRequest, "sequence"),
            (r#"{"sequence": 1}"#, Code::InvalidRequest, "group"),
            (&both, Code::InvalidRequest, "group"),
            (&half, Code::InvalidRequest, "sequence"),
            (r#"{"id": "x"}"#, Code::InvalidField, "id"),
            (r#"{"id": null}"#, Code::InvalidField, "id"),
            (r#"{"group": 7, "sequence": 1}"#, Code::InvalidField, "group"),
            (r#"{"group": "", "sequence": 1}"#, Code::InvalidField, "group"),
            (r#"{"group": "a\u0000b", "sequence": 1}"#, Code::InvalidField, "group"),
            (&long, Code::InvalidField, "group"),
            (r#"{"group": "b", "sequence": -1}"#, Code::InvalidField, "sequence"),
            (r#"{"group": "b", "sequence": "1"}"#, Code::InvalidField, "sequence"),
            (r#"{"group": "b", "sequence": 1.5}"#, Code::InvalidField, "sequence"),
            (r#"{"group": "b", "sequence": 9223372036854775808}"#, Code::InvalidField, "sequence"),
        ] {
            let error = aimed(params).expect_err(params);
            assert_eq!((error.code, error.field.as_deref()), (code, Some(field)), "{params}");
        }
    }
}
