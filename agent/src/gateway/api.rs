//! What is asked of the API server, each in one function: Leases, the slot's Secret, the MeshGateway.
//!
//! Invariants: what is written over has been read before (its resource version goes along), but for the MeshGateway, which
//! is applied. No key is ever in an error.

use std::time::Duration;

use k8s_openapi::{
    ByteString,
    api::{
        coordination::v1::Lease,
        core::v1::{ObjectReference, Secret},
    },
    apimachinery::pkg::apis::meta::v1::MicroTime,
    jiff::Timestamp,
};
use kube::{
    Api, Client, Error,
    api::{DeleteParams, DynamicObject, ListParams, Patch, PatchParams, PostParams, Preconditions},
    runtime::events::{Event, EventType, Recorder, Reporter},
};
use serde_json::json;
use tokio::time::timeout;
use tracing::warn;
use zeroize::Zeroize;

use super::{Answer, Ask};
use crate::{
    api::{MeshGateway, MeshGatewaySpec, MeshGatewayStatus, ObjectStatus},
    causes::with_cause,
    conditions::{News, Saying, Subject},
    keyring,
    keys::PrivateKey,
    names::{NodeName, Ordinal},
    slot,
};

/// Owns, by server-side apply, what this module writes.
const MANAGER: &str = "carrick";
/// The Secret's entry: what a file `gateway-ORDINAL` of the keys' folder holds.
pub(super) const ENTRY: &str = "key";
pub(super) const PATIENCE: Duration = Duration::from_secs(10);

/// Of a slot's Lease and of its Secret.
pub(super) fn name(slot: Ordinal) -> String {
    format!("carrick-gateway-{slot}")
}

pub(super) struct Server {
    me: NodeName,
    leases: Api<Lease>,
    secrets: Api<Secret>,
    gateways: Api<MeshGateway>,
    events: Recorder,
    client: Client,
}

impl Server {
    /// Leases and Secrets are those of the client's own namespace: the pod's, or that of the kubeconfig's context.
    pub(super) fn new(client: Client, me: NodeName) -> Server {
        let reporter = Reporter { controller: MANAGER.to_owned(), instance: Some(me.to_string()) };
        Server {
            me,
            events: Recorder::new(client.clone(), reporter),
            leases: Api::default_namespaced(client.clone()),
            secrets: Api::default_namespaced(client.clone()),
            gateways: Api::all(client.clone()),
            client,
        }
    }

    pub(super) async fn answer(&self, ask: &Ask) -> Answer {
        let asked = async {
            match ask {
                Ask::Leases => self.list().await,
                Ask::Write(write) => self.write(write).await,
                Ask::Key(slot) => self.key(*slot).await,
                Ask::Apply(spec) => self.apply(spec).await,
                Ask::Remove(slot) => self.remove(*slot).await,
                Ask::Report(slot, status) => self.report(*slot, status).await,
                Ask::Say(subject, saying) => self.say(subject, saying).await,
            }
        };
        match timeout(PATIENCE, asked).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(error)) => Answer::Failed(failure(&error, &what(ask))),
            Err(_) => Answer::Failed(format!("{}: the API server does not answer: it is asked again", what(ask))),
        }
    }

    async fn list(&self) -> Result<Answer, Error> {
        let leases = self.leases.list(&ListParams::default()).await?;
        Ok(Answer::Leases(leases.items.iter().filter_map(heard).collect()))
    }

    async fn write(&self, write: &slot::Write) -> Result<Answer, Error> {
        let name = name(write.ordinal);
        let lease = leased(write, MicroTime(Timestamp::now()));
        // Another version, or gone; or made meanwhile. Nothing is made where there is no namespace: that is no news to hear.
        let (written, refusals): (_, &[u16]) = match &write.over {
            None => {
                let lease = serde_json::from_value(lease).map_err(Error::SerdeError)?;
                (self.leases.create(&PostParams::default(), &lease).await, &[409])
            }
            Some(_) => (self.leases.patch(&name, &PatchParams::default(), &Patch::Merge(lease)).await, &[404, 409]),
        };
        match written {
            Ok(lease) => Ok(heard(&lease).map_or(Answer::Refused, |(_, lease)| Answer::Written(lease))),
            Err(Error::Api(status)) if refusals.contains(&status.code) => Ok(Answer::Refused),
            Err(error) => Err(error),
        }
    }

    async fn key(&self, slot: Ordinal) -> Result<Answer, Error> {
        let name = name(slot);
        let mut held = Held(self.secrets.get(&name).await?);
        let keys = keys_of(&held.0);
        if !matches!(keys, Ok(None)) {
            return Ok(told(&name, keys));
        }
        put(&mut held.0, &[keyring::random()]);
        // It says which version it replaces: of two that make a key at once, one is refused, and reads the other's.
        let made = match self.secrets.replace(&name, &PostParams::default(), &held.0).await {
            Err(Error::Api(status)) if status.code == 409 => self.secrets.get(&name).await,
            replaced => replaced,
        };
        Ok(told(&name, keys_of(&Held(made?).0)))
    }

    async fn apply(&self, spec: &MeshGatewaySpec) -> Result<Answer, Error> {
        let params = PatchParams::apply(MANAGER).force();
        self.gateways.patch(&spec.ordinal.to_string(), &params, &Patch::Apply(applied(spec))).await?;
        Ok(Answer::Done)
    }

    async fn report(&self, slot: Ordinal, status: &MeshGatewayStatus) -> Result<Answer, Error> {
        let params = PatchParams::apply(MANAGER).force();
        let status = reported(slot, status, Timestamp::now());
        match self.gateways.patch_status(&slot.to_string(), &params, &Patch::Apply(status)).await {
            Ok(_) => Ok(Answer::Done),
            Err(Error::Api(status)) if status.code == 404 => Ok(Answer::Gone),
            Err(error) => Err(error),
        }
    }

    /// What is gone, or was made anew meanwhile, has nothing said of it.
    async fn say(&self, subject: &Subject, saying: &Saying) -> Result<Answer, Error> {
        let Some(status) = saying.due(Timestamp::now()) else { return Ok(Answer::Done) };
        let api: Api<DynamicObject> = Api::all_with(self.client.clone(), &subject.kind.resource());
        let params = PatchParams::apply(MANAGER).force();
        match api.patch_status(&subject.name, &params, &Patch::Apply(said(subject, &status))).await {
            Ok(_) => {}
            Err(Error::Api(status)) if matches!(status.code, 404 | 409) => return Ok(Answer::Done),
            // Its spec is older than a rule of the schema: no status of it is taken, and others' must not wait for that.
            Err(Error::Api(status)) if status.code == 422 => {
                warn!(kind = ?subject.kind, name = subject.name, "cannot write its status: {}", status.message);
                return Ok(Answer::Done);
            }
            Err(error) => return Err(error),
        }
        for news in saying.news() {
            // The status holds it as well.
            if let Err(error) = self.events.publish(&event(news), &reference(subject)).await {
                warn!(kind = ?subject.kind, name = subject.name, "cannot write an event: {error}");
            }
        }
        Ok(Answer::Done)
    }

    /// Unless somebody else's by now.
    async fn remove(&self, slot: Ordinal) -> Result<Answer, Error> {
        let Some(there) = self.gateways.get_opt(&slot.to_string()).await? else { return Ok(Answer::Done) };
        if there.spec.node != self.me.as_str() {
            return Ok(Answer::Done);
        }
        let only = Preconditions { resource_version: there.metadata.resource_version, uid: there.metadata.uid };
        let params = DeleteParams { preconditions: Some(only), ..DeleteParams::default() };
        self.gateways.delete(&slot.to_string(), &params).await?;
        Ok(Answer::Done)
    }
}

/// A Lease of ours: the slot, and what it says.
pub(super) fn heard(lease: &Lease) -> Option<(Ordinal, slot::Lease)> {
    let named = |slot: &Ordinal| lease.metadata.name.as_deref() == Some(&*name(*slot));
    let slot = Ordinal::all().find(named)?;
    let holder =
        lease.spec.as_ref().and_then(|spec| spec.holder_identity.as_deref()).filter(|holder| !holder.is_empty());
    let version = lease.metadata.resource_version.clone().unwrap_or_default();
    // Whoever has written another name there is not this node.
    Some((slot, slot::Lease { holder: holder.map(NodeName::nearest), version }))
}

/// What is to stand in the Lease: all of it, or over the version that goes along. The time is for people: nobody compares
/// it.
pub(super) fn leased(write: &slot::Write, now: MicroTime) -> serde_json::Value {
    let mut metadata = json!({"name": name(write.ordinal)});
    if let Some(version) = &write.over {
        metadata["resourceVersion"] = json!(version);
    }
    json!({
        "apiVersion": "coordination.k8s.io/v1",
        "kind": "Lease",
        "metadata": metadata,
        "spec": {
            "holderIdentity": write.holder.as_ref().map(NodeName::as_str),
            "leaseDurationSeconds": slot::DURATION.as_secs(),
            "renewTime": now,
        },
    })
}

/// What is applied: what is not in it is none of ours.
pub(super) fn applied(spec: &MeshGatewaySpec) -> serde_json::Value {
    json!({
        "apiVersion": "carrick.dev/v1alpha1",
        "kind": "MeshGateway",
        "metadata": {"name": spec.ordinal.to_string()},
        "spec": spec,
    })
}

/// The status of a MeshGateway, as it is applied.
pub(super) fn reported(slot: Ordinal, status: &MeshGatewayStatus, now: Timestamp) -> serde_json::Value {
    let status = MeshGatewayStatus { heartbeat: Some(now.strftime("%FT%TZ").to_string()), ..status.clone() };
    json!({
        "apiVersion": "carrick.dev/v1alpha1",
        "kind": "MeshGateway",
        "metadata": {"name": slot.to_string()},
        "status": status,
    })
}

/// The status of an object, as it is applied: of that object only, not of a later one.
pub(super) fn said(subject: &Subject, status: &ObjectStatus) -> serde_json::Value {
    let resource = subject.kind.resource();
    json!({
        "apiVersion": resource.api_version,
        "kind": resource.kind,
        "metadata": {"name": subject.name, "uid": subject.uid},
        "status": status,
    })
}

fn event(news: News) -> Event {
    Event {
        type_: if news.good { EventType::Normal } else { EventType::Warning },
        reason: news.reason,
        note: Some(news.note).filter(|note| !note.is_empty()),
        action: news.about,
        secondary: None,
    }
}

fn reference(subject: &Subject) -> ObjectReference {
    let resource = subject.kind.resource();
    ObjectReference {
        api_version: Some(resource.api_version),
        kind: Some(resource.kind),
        name: Some(subject.name.clone()),
        uid: Some(subject.uid.clone()),
        ..ObjectReference::default()
    }
}

/// A Secret, wiped when dropped.
pub(super) struct Held(pub(super) Secret);

impl Drop for Held {
    fn drop(&mut self) {
        self.0.data.iter_mut().flat_map(|data| data.values_mut()).for_each(|text| text.0.zeroize());
    }
}

/// The keys of a Secret; `None`: there are none yet.
pub(super) fn keys_of(secret: &Secret) -> Result<Option<Vec<PrivateKey>>, keyring::KeyFault> {
    match secret.data.as_ref().and_then(|data| data.get(ENTRY)) {
        None => Ok(None),
        Some(text) => keyring::parse(&text.0).map(Some),
    }
}

/// Puts the keys there in place of what was, a line each.
pub(super) fn put(secret: &mut Secret, keys: &[PrivateKey]) {
    // No larger one is made of it, with a copy left behind.
    let mut text = ByteString(Vec::with_capacity(64 * keys.len()));
    for key in keys {
        text.0.extend_from_slice(key.to_base64().as_bytes());
        text.0.push(b'\n');
    }
    if let Some(mut before) = secret.data.get_or_insert_default().insert(ENTRY.to_owned(), text) {
        before.0.zeroize();
    }
}

fn told(name: &str, keys: Result<Option<Vec<PrivateKey>>, keyring::KeyFault>) -> Answer {
    match keys {
        Ok(Some(keys)) => Answer::Keys(keys),
        Ok(None) => Answer::Failed(format!("Secret {name}: its key was taken away again: it is made anew")),
        Err(fault) => Answer::Failed(format!("Secret {name}, entry {ENTRY}: {fault}")),
    }
}

fn what(ask: &Ask) -> String {
    match ask {
        Ask::Leases => "Leases of slots".to_owned(),
        Ask::Write(write) => format!("Lease {}", name(write.ordinal)),
        Ask::Key(slot) => format!("Secret {}", name(*slot)),
        Ask::Apply(spec) => format!("MeshGateway {}", spec.ordinal),
        Ask::Remove(slot) => format!("MeshGateway {slot}"),
        Ask::Report(slot, _) => format!("status of MeshGateway {slot}"),
        Ask::Say(subject, _) => format!("status of {:?} {}", subject.kind, subject.name),
    }
}

/// What went wrong, and the remedy.
pub(super) fn failure(error: &Error, what: &str) -> String {
    match error {
        Error::Api(status) => match (status.code, status.message.as_str()) {
            (403, message) => format!("{what}: {message} (403): grant it, as the chart's RBAC does"),
            (404, message) => format!("{what}: {message} (404): the chart makes what is missing, one for each slot"),
            (code, message) => format!("{what}: {code} {message}"),
        },
        Error::Service(source) => format!("{what}: the API server does not answer ({})", with_cause(source.as_ref())),
        // What it could not read may be a key.
        Error::SerdeError(_) => format!("{what}: what the API server says of it cannot be read by this version"),
        error => format!("{what}: {error}"),
    }
}
