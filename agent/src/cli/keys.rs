//! `carrick keys`.

use anyhow::bail;
use serde::Serialize;

use crate::{
    args,
    keyring::{self, Keyring, Wanted},
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
            let public_keys: Vec<String> = keyring.private.keys().map(ToString::to_string).collect();
            let answer = Answer { ordinal: slot.ordinal.get(), public_keys };
            super::print(output.output, &answer, || answer.public_keys.iter().map(|key| format!("{key}\n")).collect())?;
        }
    }
    Ok(true)
}
