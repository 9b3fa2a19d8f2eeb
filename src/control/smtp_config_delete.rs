//! `smtp_config.delete`: the organization's mail leaves through the platform's server again.
//! Guarantee: the version that was reached is remembered, so a later configuration starts above it.

use serde_json::json;

use super::error::ControlError;
use super::{Call, Control, Done};

impl Control {
    /// Works with the flag off too: an organization that may no longer use its server may still take its password away.
    pub(super) async fn smtp_config_delete(&self, call: &Call<'_>) -> Result<Done, ControlError> {
        let organization = call.organization()?;
        self.configs.delete(organization, call.audit("ok"), call.by).await?;
        Ok(Done::changed(json!({})))
    }
}
