//! What is announced on the events exchange (contract section 5).
//! Guarantee: an event holds no address, no subject, no body and no credential.

use serde::Serialize;
use time::OffsetDateTime;
use uuid::Uuid;

use super::failure::Reason;
use super::job::Job;
use super::organization::OrganizationId;

/// One event. Published with its type as the routing key.
#[derive(Debug, Clone, Serialize)]
pub struct Event {
    /// When it happened.
    #[serde(with = "time::serde::rfc3339")]
    pub at: OffsetDateTime,
    /// Whose it is; `null` for the platform, and of an `email.dead` also where the body does not tell.
    pub organization_id: Option<OrganizationId>,
    /// The job it speaks of.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub job: Option<JobFacts>,
    /// What happened.
    #[serde(flatten)]
    pub what: What,
}

/// The job's facts that every `email.*` event carries.
#[derive(Debug, Clone, Serialize)]
pub struct JobFacts {
    /// The publisher's id.
    pub job_id: Uuid,
    /// The publisher's slug; none where what was given is not one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kind: Option<String>,
    /// The booking, when the job has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
}

/// The types of event with what is particular to each.
#[derive(Debug, Clone, Serialize)]
#[serde(tag = "type")]
pub enum What {
    /// The server took the message.
    #[serde(rename = "email.sent")]
    Sent {
        /// With angle brackets.
        message_id: String,
        /// `organization` or `platform`.
        transport: &'static str,
        /// Recipients that were refused for good.
        recipients_refused: Vec<RefusedRecipient>,
    },
    /// To be tried again.
    #[serde(rename = "email.deferred")]
    Deferred {
        /// Why.
        reason: Reason,
        /// Not before this time.
        #[serde(with = "time::serde::rfc3339")]
        next_attempt_at: OffsetDateTime,
    },
    /// Waits for its organization's configuration.
    #[serde(rename = "email.parked")]
    Parked {
        /// What is wrong with that.
        reason: Reason,
    },
    /// Dead, with its reason.
    #[serde(rename = "email.dead")]
    Dead {
        /// Why.
        reason: Reason,
    },
    /// Past its time.
    #[serde(rename = "email.expired")]
    Expired {
        /// Always `expired`.
        reason: Reason,
    },
    /// A configuration was created.
    #[serde(rename = "smtp_config.created")]
    ConfigCreated {
        /// Its version.
        version: i64,
    },
    /// A configuration was changed.
    #[serde(rename = "smtp_config.updated")]
    ConfigUpdated {
        /// Its new version.
        version: i64,
    },
    /// A configuration was deleted.
    #[serde(rename = "smtp_config.deleted")]
    ConfigDeleted {},
    /// A configuration does not work: from here on its organization's mail is parked.
    #[serde(rename = "smtp_config.failing")]
    ConfigFailing {
        /// Its version.
        version: i64,
        /// What is wrong.
        reason: Reason,
        /// What to do about it.
        hint: String,
    },
    /// An organization's mail flows again.
    #[serde(rename = "smtp_config.recovered")]
    ConfigRecovered {
        /// How many parked jobs went back to their lanes.
        released: u64,
    },
}

/// A recipient that the server refused, named by its position only.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, serde::Deserialize)]
pub struct RefusedRecipient {
    /// Position over to + cc + bcc.
    pub index: u16,
    /// The reply's code.
    pub code: u16,
    /// Why it counts as refused.
    pub reason: Reason,
}

impl What {
    /// The event's type, which is its routing key.
    pub fn routing_key(&self) -> &'static str {
        match self {
            Self::Sent { .. } => "email.sent",
            Self::Deferred { .. } => "email.deferred",
            Self::Parked { .. } => "email.parked",
            Self::Dead { .. } => "email.dead",
            Self::Expired { .. } => "email.expired",
            Self::ConfigCreated { .. } => "smtp_config.created",
            Self::ConfigUpdated { .. } => "smtp_config.updated",
            Self::ConfigDeleted {} => "smtp_config.deleted",
            Self::ConfigFailing { .. } => "smtp_config.failing",
            Self::ConfigRecovered { .. } => "smtp_config.recovered",
        }
    }
}

impl Event {
    /// An event about a job.
    pub fn of_job(at: OffsetDateTime, job: &Job, what: What) -> Self {
        let facts = JobFacts {
            job_id: job.key.id,
            kind: Some(job.kind.clone()),
            group: job.group.as_ref().map(|revision| revision.group.clone()),
        };
        Self { at, organization_id: job.key.organization.clone(), job: Some(facts), what }
    }

    /// An event about an organization's configuration.
    pub fn of_organization(at: OffsetDateTime, organization: OrganizationId, what: What) -> Self {
        Self { at, organization_id: Some(organization), job: None, what }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn an_event_carries_its_type_and_its_routing_key_is_the_same() {
        let at = time::macros::datetime!(2026-11-22 20:00 UTC);
        let organization = OrganizationId::parse("acme").unwrap();
        let event = Event::of_organization(at, organization, What::ConfigUpdated { version: 3 });
        let json = serde_json::to_value(&event).unwrap();
        assert_eq!(
            json,
            serde_json::json!({"type": "smtp_config.updated", "at": "2026-11-22T20:00:00Z", "organization_id": "acme", "version": 3})
        );
        assert_eq!(json["type"], event.what.routing_key());
    }

    #[test]
    fn what_could_not_be_read_is_left_out() {
        let at = time::macros::datetime!(2026-11-22 20:00 UTC);
        let job = Some(JobFacts { job_id: Uuid::nil(), kind: None, group: None });
        let event = Event { at, organization_id: None, job, what: What::Dead { reason: Reason::Malformed } };
        let json = serde_json::to_value(&event).unwrap();
        assert!(json.get("kind").is_none() && json.get("group").is_none(), "{json}");
        assert_eq!((&json["job_id"], &json["organization_id"]), (&json!(Uuid::nil()), &json!(null)));
    }
}
