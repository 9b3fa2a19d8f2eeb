//! `sendoff keys`: the keys of stored credentials and dead letters.
//! Guarantee: a new key is printed once and kept nowhere; of the others no more is shown than their ids.

pub(super) mod rotate;
pub(super) mod status;

use clap::{Args, Subcommand};
use secrecy::ExposeSecret;

use super::exit::Done;
use super::output;
use crate::clock::Clock;
use crate::secrets::KeyRing;

#[derive(Debug, Subcommand)]
#[command(
    after_help = "Examples:\n  sendoff keys generate\n  sendoff keys status\n  sendoff keys rotate\n\nTo change keys: \
    generate one, put it before the others in encryption.keys, restart every worker, rotate, and take an older key out \
    when status calls it removable."
)]
pub(super) enum KeysCommand {
    /// Print a new random key as an item for encryption.keys
    Generate(GenerateArgs),
    /// Tell what needs which key, and which key can be taken out
    Status(status::StatusArgs),
    /// Seal every stored credential and dead letter anew under the first key
    Rotate(rotate::RotateArgs),
}

#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  export SENDOFF__ENCRYPTION__KEYS=\"$(sendoff keys generate)\"\n\nPut a new key before \
    the older ones: the first encrypts, all decrypt. Whoever loses every key loses the stored passwords and \
    the content of dead letters."
)]
pub(super) struct GenerateArgs {
    /// The key's name, 1 to 32 of A-Z, a-z, 0-9, `.`, `_` and `-`; today's date unless given
    #[arg(long, value_name = "ID")]
    id: Option<String>,
    /// Print {"id","key"} instead, where key is the whole item
    #[arg(long)]
    json: bool,
}

pub(super) fn generate(args: &GenerateArgs) -> anyhow::Result<Done> {
    let id = args.id.clone().unwrap_or_else(|| Clock::system().now().date().to_string());
    let item = KeyRing::generate(&id).map_err(|_| {
        anyhow::anyhow!("--id `{id}` cannot be used; allowed: 1 to 32 of A-Z, a-z, 0-9, `.`, `_` and `-`")
    })?;
    if args.json {
        output::json(&serde_json::json!({ "id": id, "key": item.expose_secret() }))?;
    } else {
        output::line(item.expose_secret())?;
    }
    Ok(Done::Well)
}
