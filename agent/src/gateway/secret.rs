//! The keys of a slot as its Secret has them, for a person's command, which may replace them.
//!
//! Invariants: what is written over has been read before. No key that is in use, or is to be, is taken away. None is ever
//! printed, and what was read is wiped.

use k8s_openapi::api::core::v1::Secret;
use kube::{
    Api, Error,
    api::{ListParams, PostParams},
};
use tokio::time::timeout;

use super::api::{ENTRY, Held, PATIENCE, failure, keys_of, name, put};
use crate::{
    api::{MeshCluster, MeshGateway},
    keyring::{self, KEYS, KeyFault},
    keys::{PrivateKey, PublicKey},
    names::Ordinal,
    source,
};

/// Where a slot's keys are.
#[derive(Debug)]
pub struct SlotSecret {
    secrets: Api<Secret>,
    gateways: Api<MeshGateway>,
    clusters: Api<MeshCluster>,
    slot: Ordinal,
    /// For people: `Secret NAMESPACE/NAME`.
    what: String,
}

impl SlotSecret {
    /// `namespace`: the chart's; `None`: the pod's, or that of the kubeconfig's context. An error, here and below, says what
    /// to do.
    pub async fn new(server: &source::Server, namespace: Option<&str>, slot: Ordinal) -> Result<SlotSecret, String> {
        let client = server.client().await.map_err(|error| error.to_string())?;
        let namespace = namespace.unwrap_or(client.default_namespace()).to_owned();
        let what = format!("Secret {namespace}/{}", name(slot));
        let secrets = Api::namespaced(client.clone(), &namespace);
        Ok(SlotSecret { secrets, gateways: Api::all(client.clone()), clusters: Api::all(client), slot, what })
    }

    /// In the order in which they stand there. Makes none where there is none.
    pub async fn read(&self) -> Result<Vec<PrivateKey>, String> {
        self.get().await.map(|(_, keys)| keys)
    }

    /// Adds a key below the one that is there. The gateway uses whichever of them the mesh's folder names.
    pub async fn add(&self) -> Result<PublicKey, String> {
        let (held, mut keys) = self.get().await?;
        if keys.len() >= KEYS {
            return Err(format!("{} {}", self.what, KeyFault::Full));
        }
        let key = keyring::random();
        let public = key.public();
        keys.push(key);
        self.replace(held, &keys).await.map(|()| public)
    }

    /// Takes the key away: one that no MeshCluster names, and that is not the one that the slot's MeshGateway tells of.
    pub async fn take(&self, key: PublicKey) -> Result<(), String> {
        let (held, mut keys) = self.get().await?;
        let before = keys.len();
        keys.retain(|one| one.public() != key);
        if keys.len() == before {
            return Err(format!("{} does not hold {key}: `keys show` says what it holds", self.what));
        }
        if keys.is_empty() {
            return Err(format!("{} holds no other key than {key}: `keys add` makes one", self.what));
        }
        let clusters = asked(self.clusters.list(&ListParams::default()), "MeshClusters").await?;
        let names_it = |one: &&MeshCluster| one.spec.gateways.iter().any(|named| named.public_key == key.to_string());
        if let Some(cluster) = clusters.items.iter().find(names_it) {
            let name = cluster.metadata.name.as_deref().unwrap_or_default();
            return Err(format!("MeshCluster {name} names {key}: have the mesh's folder name the other first"));
        }
        let what = format!("MeshGateway {}", self.slot);
        let gateway = asked(self.gateways.get(&self.slot.to_string()), &what).await?;
        if gateway.spec.public_key == key.to_string() {
            return Err(format!("{key} is in use, by {what}: have the mesh's folder name the other first"));
        }
        self.replace(held, &keys).await
    }

    async fn get(&self) -> Result<(Held, Vec<PrivateKey>), String> {
        let held = Held(asked(self.secrets.get(&name(self.slot)), &self.what).await?);
        match keys_of(&held.0) {
            Ok(Some(keys)) => Ok((held, keys)),
            Ok(None) => Err(format!("{}: there is no key in it yet: the agent makes it", self.what)),
            Err(fault) => Err(format!("{}, entry {ENTRY}: {fault}", self.what)),
        }
    }

    /// It says which version it replaces: of two that change it at once, one is refused.
    async fn replace(&self, mut held: Held, keys: &[PrivateKey]) -> Result<(), String> {
        put(&mut held.0, keys);
        let (name, params) = (name(self.slot), PostParams::default());
        asked(self.secrets.replace(&name, &params, &held.0), &self.what).await.map(Held).map(drop)
    }
}

async fn asked<T>(asked: impl Future<Output = Result<T, Error>>, what: &str) -> Result<T, String> {
    let answer = timeout(PATIENCE, asked).await.map_err(|_| format!("{what}: the API server does not answer"))?;
    answer.map_err(|error| failure(&error, what))
}
