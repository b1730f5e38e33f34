//! The keys of a slot as its Secret has them, for a person's command, which may replace them.
//!
//! Invariants: what is written over has been read before. No key that is in use is taken away, and none is ever printed.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Secret;
use kube::{Api, Error, api::PostParams};
use tokio::time::timeout;

use super::api::{ENTRY, PATIENCE, failure, keys_of, name, put, wipe};
use crate::{
    api::MeshGateway,
    keyring,
    keys::{PrivateKey, PublicKey},
    names::Ordinal,
    source,
};

/// Keys that a Secret may hold: one, and what replaces it.
const KEYS: usize = 2;

/// Where a slot's keys are.
#[derive(Debug)]
pub struct SlotSecret {
    secrets: Api<Secret>,
    gateways: Api<MeshGateway>,
    slot: Ordinal,
}

impl SlotSecret {
    /// `namespace`: the chart's; `None`: the pod's, or that of the kubeconfig's context. An error, here and below, says what
    /// to do.
    pub async fn new(server: &source::Server, namespace: Option<&str>, slot: Ordinal) -> Result<SlotSecret, String> {
        let client = server.client().await.map_err(|error| error.to_string())?;
        let secrets = match namespace {
            Some(namespace) => Api::namespaced(client.clone(), namespace),
            None => Api::default_namespaced(client.clone()),
        };
        Ok(SlotSecret { secrets, gateways: Api::all(client), slot })
    }

    /// Makes none where there is none.
    pub async fn read(&self) -> Result<BTreeMap<PublicKey, PrivateKey>, String> {
        let (mut secret, keys) = self.get().await?;
        wipe(&mut secret);
        Ok(keys.into_iter().map(|key| (key.public(), key)).collect())
    }

    /// Adds a key below the one that is there. The gateway uses whichever of them the mesh's folder names.
    pub async fn add(&self) -> Result<PublicKey, String> {
        let (secret, mut keys) = self.get().await?;
        if keys.len() >= KEYS {
            return Err(format!(
                "{} holds {} keys already: drop the one that is no longer used",
                self.what(),
                keys.len()
            ));
        }
        let key = keyring::random();
        let public = key.public();
        keys.push(key);
        self.replace(secret, &keys).await.map(|()| public)
    }

    /// Takes the key away, unless the slot's MeshGateway says that it is in use.
    pub async fn take(&self, key: PublicKey) -> Result<(), String> {
        let (secret, mut keys) = self.get().await?;
        let before = keys.len();
        keys.retain(|one| one.public() != key);
        if keys.len() == before {
            return Err(format!("{} does not hold {key}: `keys show` says what it holds", self.what()));
        }
        let gateway =
            asked(self.gateways.get_opt(&self.slot.to_string()), &format!("MeshGateway {}", self.slot)).await?;
        if keys.is_empty() || gateway.is_some_and(|gateway| gateway.spec.public_key == key.to_string()) {
            let advice = "have the mesh's folder name another first, `keys add` makes one";
            return Err(format!("{}: {key} is in use: {advice}", self.what()));
        }
        self.replace(secret, &keys).await
    }

    async fn get(&self) -> Result<(Secret, Vec<PrivateKey>), String> {
        let secret = asked(self.secrets.get(&name(self.slot)), &self.what()).await?;
        match keys_of(&secret) {
            Ok(Some(keys)) => Ok((secret, keys)),
            Ok(None) => Err(format!("{}: there is no key in it yet: the agent makes it", self.what())),
            Err(fault) => Err(format!("{}, entry {ENTRY}: {fault}", self.what())),
        }
    }

    /// It says which version it replaces: of two that change it at once, one is refused.
    async fn replace(&self, mut secret: Secret, keys: &[PrivateKey]) -> Result<(), String> {
        put(&mut secret, keys);
        let (name, params) = (name(self.slot), PostParams::default());
        let replaced = asked(self.secrets.replace(&name, &params, &secret), &self.what()).await;
        wipe(&mut secret);
        wipe(&mut replaced?);
        Ok(())
    }

    fn what(&self) -> String {
        format!("Secret {}", name(self.slot))
    }
}

async fn asked<T>(asked: impl Future<Output = Result<T, Error>>, what: &str) -> Result<T, String> {
    let answer = timeout(PATIENCE, asked).await.map_err(|_| format!("{what}: the API server does not answer"))?;
    answer.map_err(|error| failure(&error, what))
}
