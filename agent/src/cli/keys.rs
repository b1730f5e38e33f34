//! `carrick keys` and `kubectl carrick keys`.

use anyhow::{Error, bail};
use serde::Serialize;

use crate::{
    args::{self, Format, OfSlot, SecretKeys},
    gateway::SlotSecret,
    keyring::{self, Keyring, Wanted},
    keys::{PrivateKey, PublicKey},
    names::Ordinal,
};

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Answer {
    ordinal: u8,
    public_keys: Vec<String>,
}

pub(super) fn run(args: args::Keys) -> anyhow::Result<bool> {
    match args {
        args::Keys::Gen { slot, hop: true, add } => {
            let make = if add { keyring::add_hop } else { keyring::generate_hop };
            println!("{}", make(&slot.keys_dir)?);
        }
        args::Keys::Gen { slot, hop: false, add } => {
            let key = if add {
                keyring::add(&slot.keys_dir, slot.ordinal)?
            } else {
                keyring::generate(&slot.keys_dir, slot.ordinal)?
            };
            println!("{key}");
        }
        args::Keys::Show { slot, output } => {
            let (keyring, problems) = Keyring::read(&slot.keys_dir, Wanted { slot: Some(slot.ordinal), hop: false });
            if !problems.is_empty() {
                let problems: Vec<String> = problems.iter().map(ToString::to_string).collect();
                bail!(problems.join("\n"));
            }
            show(slot.ordinal, keyring.private.keys(), output.output)?;
        }
    }
    Ok(true)
}

/// What is in a slot's Secret.
pub(super) async fn run_secret(args: SecretKeys) -> anyhow::Result<bool> {
    let (SecretKeys::Show { slot, .. } | SecretKeys::Add { slot } | SecretKeys::Drop { slot, .. }) = &args;
    let OfSlot { ordinal, namespace, access } = slot;
    let secret = SlotSecret::new(&access.server(), Some(namespace), *ordinal).await.map_err(Error::msg)?;
    match &args {
        SecretKeys::Show { output, .. } => {
            let keys: Vec<_> = secret.read().await.map_err(Error::msg)?.iter().map(PrivateKey::public).collect();
            show(*ordinal, keys.iter(), output.output)?;
        }
        SecretKeys::Add { .. } => println!("{}", secret.add().await.map_err(Error::msg)?),
        SecretKeys::Drop { key, .. } => secret.take(*key).await.map_err(Error::msg)?,
    }
    Ok(true)
}

fn show<'a>(slot: Ordinal, keys: impl Iterator<Item = &'a PublicKey>, format: Format) -> anyhow::Result<()> {
    let answer = Answer { ordinal: slot.get(), public_keys: keys.map(ToString::to_string).collect() };
    super::print(format, &answer, || answer.public_keys.iter().map(|key| format!("{key}\n")).collect())
}
