//! `feature.set`: whether an organization may send through a server of its own.
//! Guarantee: switching the flag off touches no configuration; switched on again, it is used again.

use serde_json::json;

use super::error::ControlError;
use super::fields::required;
use super::{Call, Control, Done};

pub(super) const PARAMS: &[&str] = &["feature", "enabled"];
pub(super) const CUSTOM_SMTP: &str = "custom-smtp-for-orgs";

impl Control {
    pub(super) async fn feature_set(&self, call: &Call<'_>) -> Result<Done, ControlError> {
        let params = &call.request.params;
        let feature = required("feature", params.text("feature")?)?;
        let enabled: bool = required("enabled", params.value("enabled", "must be true or false")?)?;
        if feature != CUSTOM_SMTP {
            return Err(ControlError::invalid_field("feature", format!("must be `{CUSTOM_SMTP}`")));
        }
        self.store.set_custom_smtp(call.organization()?, enabled, call.audit("ok"), call.by).await?;
        Ok(Done::changed(json!({ "enabled": enabled })))
    }
}
