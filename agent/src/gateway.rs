//! What a gateway does with the API server beyond reading: its slot, the slot's key, its MeshGateway, and status. Only with
//! `--kube`, and a worker asks for nothing.
//!
//! [`Gateway`] decides, as a value: what to ask next, given what was read and what was answered. [`task`] asks, and tells the
//! agent where this node stands ([`Said`]). The key is handed over in memory: it never touches a disk.
//!
//! Invariants: a slot's key is used only while the slot is held. A Secret that holds anything is never overwritten. Until it
//! is known who holds what, this node is what the API server says of it: an API server that is away changes nothing.

mod api;
mod known;
mod secret;
mod statuses;
mod task;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

pub use self::{known::Known, secret::SlotSecret, task::follow};

use self::statuses::Statuses;
use crate::{
    api::{MeshGateway, MeshGatewaySpec, MeshGatewayStatus, Objects},
    conditions::{Saying, Subject},
    keys::{PrivateKey, PublicKey},
    names::{MemberName, NodeName, Ordinal},
    slot::{self, Claims, Lease, Wish},
};

/// How often a gateway without a slot looks for one: as often as a holder renews.
const LOOK: Duration = slot::RENEW;
/// How long a holder must have been silent to be taken for gone: probes of an idle gateway go every 5 s.
const SILENT: Duration = Duration::from_secs(20);
/// How long every other gateway must have been silent until this node takes itself for cut off: sooner than another may
/// take its slot.
const ALONE: Duration = Duration::from_secs(10);
/// What has failed is not asked again before: four times a minute at most.
const RETRY: Duration = Duration::from_secs(15);
/// How often the keys are read again: somebody may have taken one away. Where the folder names one that is not among them,
/// it is after [`RETRY`].
const KEY_AGAIN: Duration = Duration::from_secs(300);
/// An object is written once in so long at most.
const WRITE_AGAIN: Duration = Duration::from_secs(10);

/// Where this node stands.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Standing {
    /// What the API server says of it stands.
    #[default]
    Unknown,
    /// It holds no slot, whatever is still written of it.
    Worker,
    Gateway(Held),
}

/// A slot that this node holds.
#[derive(Clone, Debug)]
pub struct Held {
    pub spec: MeshGatewaySpec,
    pub keys: BTreeMap<PublicKey, PrivateKey>,
}

impl PartialEq for Held {
    fn eq(&self, other: &Held) -> bool {
        self.spec == other.spec && self.keys.keys().eq(other.keys.keys())
    }
}

/// What the agent is told.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Said {
    pub standing: Standing,
    pub problems: BTreeSet<String>,
}

impl Standing {
    /// The objects as they are to this node: of its own slot it knows better than what is written. `None`: as they are.
    pub fn amend(&self, me: &NodeName, objects: &Objects) -> Option<Objects> {
        let ours = |gateway: &MeshGateway| gateway.spec.node == me.as_str();
        let held = match self {
            Standing::Unknown => return None,
            Standing::Worker if !objects.gateways.iter().any(ours) => return None,
            Standing::Worker => None,
            Standing::Gateway(held) => Some(&held.spec),
        };
        let mut amended = objects.clone();
        amended
            .gateways
            .retain(|gateway| !ours(gateway) && held.is_none_or(|held| gateway.spec.ordinal != held.ordinal));
        amended.gateways.extend(held.map(|spec| MeshGateway::new(&spec.ordinal.to_string(), spec.clone())));
        amended.gateways.sort_by(|a, b| a.metadata.name.cmp(&b.metadata.name));
        Some(amended)
    }
}

/// What to ask of the API server.
#[derive(Clone, Debug, PartialEq)]
pub enum Ask {
    Leases,
    Write(slot::Write),
    /// The slot's key, which is made if there is none.
    Key(Ordinal),
    Apply(MeshGatewaySpec),
    /// Deletes what this node has written of a slot before it got another: a node holds one.
    Remove(Ordinal),
    /// Of its MeshGateway: its status.
    Report(Ordinal, MeshGatewayStatus),
    /// Of an object of the mesh: its status, and the events that go with it.
    Say(Subject, Saying),
}

/// What a failure keeps from being asked for a while.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum About {
    Lease,
    Key,
    Object,
    Status,
}

impl Ask {
    fn about(&self) -> About {
        match self {
            Ask::Leases | Ask::Write(_) => About::Lease,
            Ask::Key(_) => About::Key,
            Ask::Apply(_) | Ask::Remove(_) => About::Object,
            Ask::Report(..) | Ask::Say(..) => About::Status,
        }
    }
}

/// What the API server said.
#[derive(Clone, Debug)]
pub enum Answer {
    Leases(BTreeMap<Ordinal, Lease>),
    Written(Lease),
    /// Somebody else was there first: all Leases are listed, and heard, before another is written.
    Refused,
    Keys(Vec<PrivateKey>),
    Done,
    /// There is no such object.
    Gone,
    /// With what to do.
    Failed(String),
}

#[derive(Debug)]
struct Keys {
    slot: Ordinal,
    /// The first is used where the mesh names none of them.
    keys: Vec<(PublicKey, PrivateKey)>,
    read: Duration,
}

/// A gateway's business with the API server. Every `now` is of one monotonic clock of its own.
#[derive(Debug)]
pub struct Gateway {
    me: NodeName,
    cluster: MemberName,
    /// Slots that have a Secret.
    slots: u8,
    known: Known,
    claims: Claims,
    /// When the Leases were last listed.
    listed: Option<Duration>,
    /// A write was refused: what is known of the Leases is old.
    stale: bool,
    hold: Option<Ordinal>,
    /// Whether it was ever known whether this node holds a slot.
    settled: bool,
    keys: Option<Keys>,
    silent: BTreeMap<Ordinal, Duration>,
    /// MeshGateways, when they were last written.
    written: BTreeMap<Ordinal, Duration>,
    /// The MeshGateway that it holds is not there, whatever is known: what is gone from a list is believed late.
    gone: bool,
    statuses: Statuses,
    /// It would hold a slot, and none is free.
    waits: bool,
    failed: BTreeMap<About, (Duration, String)>,
}

impl Gateway {
    /// `slots`: how many slots have a Secret, from 0 on.
    pub fn new(me: NodeName, cluster: MemberName, slots: u8) -> Gateway {
        Gateway {
            claims: Claims::new(me.clone()),
            me,
            cluster,
            slots,
            known: Known::default(),
            listed: None,
            stale: false,
            hold: None,
            settled: false,
            keys: None,
            silent: BTreeMap::new(),
            written: BTreeMap::new(),
            gone: false,
            statuses: Statuses::default(),
            waits: false,
            failed: BTreeMap::new(),
        }
    }

    pub fn know(&mut self, now: Duration, known: Known) {
        self.silent.retain(|slot, _| known.silent.contains(slot));
        for slot in &known.silent {
            self.silent.entry(*slot).or_insert(now);
        }
        self.known = known;
        self.learn();
    }

    fn learn(&mut self) {
        let own = self.hold.filter(|slot| self.is_written(*slot)).map(|slot| {
            let stands = self.known.reports.get(&slot).cloned().unwrap_or_default();
            (self.known.report.clone(), stands)
        });
        self.statuses.know(own, &self.known.sayings);
    }

    /// Decides what this node holds, and what to ask next.
    pub fn next(&mut self, now: Duration) -> Option<Ask> {
        let claim = self.claim(now);
        if self.keys.as_ref().is_some_and(|keys| Some(keys.slot) != self.hold) {
            self.keys = None;
        }
        let asks = [claim, self.key(now), self.object(now), self.status(now)];
        asks.into_iter().flatten().find(|ask| self.may(now, ask.about()))
    }

    fn may(&self, now: Duration, about: About) -> bool {
        self.failed.get(&about).is_none_or(|(at, _)| now.saturating_sub(*at) >= RETRY)
    }

    fn wish(&self) -> Wish {
        Wish::of(self.known.label.as_deref()).unwrap_or(Wish::Worker)
    }

    fn claim(&mut self, now: Duration) -> Option<Ask> {
        let by_lease = match self.wish() {
            Wish::Any => true,
            Wish::Worker => self.settle(None),
            Wish::Pinned(slot) => self.settle(Some(slot).filter(|slot| self.known.pinned.get(slot) == Some(&self.me))),
        };
        let Some(listed) = self.listed else { return by_lease.then_some(Ask::Leases) };
        let others = &self.known.others;
        let silent_for = |slot: &Ordinal| self.silent.get(slot).map(|since| now.saturating_sub(*since));
        let answers = |slot: &&Ordinal| silent_for(slot).is_none_or(|silent| silent < SILENT);
        let answering: BTreeSet<Ordinal> = others.iter().filter(answers).copied().collect();
        let is_away = |slot: &Ordinal| silent_for(slot).is_some_and(|silent| silent >= ALONE);
        let isolated = !others.is_empty() && others.iter().all(is_away);
        let free =
            Ordinal::all().take(self.slots.into()).filter(|slot| by_lease && !self.known.pinned.contains_key(slot));
        let free = free.collect();
        let decision = self.claims.decide(now, &slot::View { free: &free, answering: &answering, isolated });
        // Whoever was refused hears what stands before it writes again. Until then it decides on what it knows: it may be
        // cut off from all.
        let ask = if self.stale { Some(Ask::Leases) } else { decision.write.clone().map(Ask::Write) };
        if !by_lease {
            return ask;
        }
        self.hold = decision.hold;
        self.settled = true;
        self.waits = decision == slot::Decision::default();
        let looks = decision.hold.is_none() && now.saturating_sub(listed) >= LOOK;
        ask.or(looks.then_some(Ask::Leases))
    }

    /// Holds the slot without a Lease. Returns that it is not by Lease.
    fn settle(&mut self, hold: Option<Ordinal>) -> bool {
        self.hold = hold;
        self.settled = true;
        self.waits = false;
        false
    }

    fn key(&self, now: Duration) -> Option<Ask> {
        let due = |keys: &Keys| {
            let named = self.known.named.as_ref().and_then(|named| named.get(&keys.slot));
            let added = named.is_some_and(|named| keys.keys.iter().all(|(key, _)| key != named));
            now.saturating_sub(keys.read) >= if added { RETRY } else { KEY_AGAIN }
        };
        self.keys.as_ref().is_none_or(due).then_some(Ask::Key(self.hold?))
    }

    fn object(&self, now: Duration) -> Option<Ask> {
        let spec = self.spec()?;
        let hold = self.hold?;
        let is_due =
            |slot: &Ordinal| self.written.get(slot).is_none_or(|written| now.saturating_sub(*written) >= WRITE_AGAIN);
        let mut others = self.known.gateways.keys().filter(|slot| **slot != hold && self.is_written(**slot));
        if let Some(old) = others.find(|slot| is_due(slot)) {
            return Some(Ask::Remove(*old));
        }
        let stands = !self.gone && self.known.gateways.get(&hold) == Some(&spec);
        (is_due(&hold) && !stands).then_some(Ask::Apply(spec))
    }

    fn status(&self, now: Duration) -> Option<Ask> {
        let hold = self.hold?;
        // Of the gateways that answer, the one with the lowest slot speaks for all.
        let speaks = self.known.others.iter().all(|slot| *slot > hold || self.known.silent.contains(slot));
        self.statuses.next(now, hold, speaks)
    }

    /// The MeshGateway of this node; `None` while it holds none, or its key or addresses are not known.
    fn spec(&self) -> Option<MeshGatewaySpec> {
        let slot = self.hold?;
        let keys = self.keys.as_ref().filter(|keys| keys.slot == slot && !self.known.hop.is_empty())?;
        let named = self.known.named.as_ref().and_then(|named| named.get(&slot));
        Some(MeshGatewaySpec {
            ordinal: slot.get().into(),
            node: self.me.to_string(),
            hop_addresses: self.known.hop.iter().map(ToString::to_string).collect(),
            public_key: told(&keys.keys, named)?.to_string(),
        })
    }

    /// What came of it. `sent`: when it was asked.
    pub fn answered(&mut self, sent: Duration, now: Duration, ask: &Ask, answer: Answer) {
        self.failed.remove(&ask.about());
        match (ask, answer) {
            (Ask::Leases, Answer::Leases(mut leases)) => {
                for slot in Ordinal::all() {
                    self.claims.hear(now, slot, leases.remove(&slot));
                }
                self.claims.synced();
                (self.listed, self.stale) = (Some(now), false);
            }
            (Ask::Write(write), Answer::Written(lease)) => self.claims.wrote(sent, write.ordinal, lease),
            (Ask::Write(_), Answer::Refused) => self.stale = true,
            (Ask::Key(slot), Answer::Keys(keys)) => {
                let keys = keys.into_iter().map(|key| (key.public(), key)).collect();
                self.keys = Some(Keys { slot: *slot, keys, read: now });
            }
            (Ask::Apply(spec), Answer::Done) => {
                self.gone = false;
                self.written.extend(Ordinal::new(spec.ordinal).map(|slot| (slot, now)));
            }
            (Ask::Remove(slot), Answer::Done) => {
                self.written.insert(*slot, now);
            }
            (Ask::Report(..), Answer::Done) => self.statuses.reported(now),
            (Ask::Report(..), Answer::Gone) => {
                self.statuses.reported(now);
                self.gone = true;
            }
            (Ask::Say(subject, _), Answer::Done) => self.statuses.said(now, subject),
            (ask, Answer::Failed(why)) => {
                // It may have been taken all the same.
                self.stale |= matches!(ask, Ask::Write(_));
                self.failed.insert(ask.about(), (now, why));
            }
            (ask, _) => {
                let why = "somebody else has written at the same time: it is tried again".to_owned();
                self.failed.insert(ask.about(), (now, why));
            }
        }
    }

    pub fn said(&self) -> Said {
        let standing = match (self.settled, self.hold, self.spec().zip(self.keys.as_ref())) {
            (false, ..) => Standing::Unknown,
            (true, Some(_), Some((spec, keys))) => {
                Standing::Gateway(Held { spec, keys: keys.keys.iter().cloned().collect() })
            }
            // Its key may be in use already, from before the agent began: nothing is taken away until it is known.
            (true, Some(slot), None) if self.is_written(slot) => Standing::Unknown,
            (true, ..) => Standing::Worker,
        };
        Said { standing, problems: self.problems() }
    }

    fn is_written(&self, slot: Ordinal) -> bool {
        self.known.gateways.get(&slot).is_some_and(|gateway| gateway.node == self.me.as_str())
    }

    fn problems(&self) -> BTreeSet<String> {
        let mut problems: BTreeSet<String> = self.failed.values().map(|(_, why)| why.clone()).collect();
        match Wish::of(self.known.label.as_deref()) {
            Err(bad) => problems.extend([bad.to_string()]),
            Ok(Wish::Pinned(slot)) if self.hold.is_none() => {
                let holder = self.known.pinned.get(&slot).map_or("another", NodeName::as_str);
                problems.extend([format!(
                    "slot {slot} is held by node {holder}, which has the same label {}: this node stays a worker until \
                     one of the two labels is changed",
                    slot::LABEL
                )]);
            }
            Ok(Wish::Any) if self.waits => {
                problems.extend([
                    "every slot is held: this node stays a worker until one is free; install with more slots, or take \
                     the label from a node"
                        .to_owned(),
                ]);
            }
            Ok(_) => {}
        }
        // Where there is a MeshCluster, the plan refuses what it lacks.
        if let (Some(spec), None) = (self.spec(), &self.known.named) {
            problems.extend([format!(
                "NotInMesh: there is no MeshCluster {}: add it to the mesh's folder, with gateways: [{{ordinal: {}, \
                 publicKey: {}}}]",
                self.cluster, spec.ordinal, spec.public_key
            )]);
        }
        problems
    }
}

/// The key to show to others: the one that the mesh names, else the first.
fn told(keys: &[(PublicKey, PrivateKey)], named: Option<&PublicKey>) -> Option<PublicKey> {
    let mut public = keys.iter().map(|(public, _)| public);
    public.clone().find(|key| Some(*key) == named).or(public.next()).copied()
}
