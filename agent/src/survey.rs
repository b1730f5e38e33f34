//! What one pass looks at: the folder's meaning for this member, the keys, the node, and the kernel as it is.
//!
//! The agent, `carrick plan` and `carrick status` all see the same thing, because they all come through here.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    time::{Duration, SystemTime},
};

use crate::{
    args,
    dial::{Dialer, Seen, candidates},
    facts::{Facts, Ports},
    intent::{self, Host, Intent, Local, Rejection},
    kernel::{
        Secrets,
        facts::{Condition, Node},
    },
    keyring::{KeyProblem, Keyring, Preshared, Wanted},
    keys::{HopId, HopMark, HopSecret, PresharedKey, PrivateKey, PublicKey},
    names::{Device, MemberName, NodeName, Table},
    overlay::Overlay,
    plan::plan,
    reconcile::Reading,
    resolve::Resolved,
    source::Snapshot,
    state::{Route, State},
};

/// The folder, as this member understands it.
#[derive(Clone, Debug)]
pub struct View {
    pub intent: Intent,
    pub rejected: Vec<Rejection>,
    /// Every file could be read, or its last good objects stand in for it.
    pub complete: bool,
    pub problems: Vec<String>,
}

impl View {
    pub fn new(snapshot: &Snapshot, args: &args::Node) -> View {
        let local = Local { cluster: args.cluster_name.clone(), cidrs: args.local_cidrs.clone(), api_server: None };
        let (mesh, mut rejected) = intent::mesh(&snapshot.objects, &args.mesh_domain);
        let (intent, refused_here) = Intent::new(&mesh, &snapshot.objects, &local);
        rejected.extend(refused_here);
        let problems = snapshot.problems.iter().map(ToString::to_string).collect();
        View { intent, rejected, complete: snapshot.complete, problems }
    }

    /// The names that somebody has to resolve.
    pub fn endpoint_names(&self) -> BTreeSet<String> {
        let gateways = self.intent.members.values().flat_map(|member| member.gateways.values());
        let hosts = gateways.flat_map(|gateway| gateway.endpoints.iter().map(|endpoint| &endpoint.host));
        hosts.filter_map(|host| if let Host::Name(name) = host { Some(name.clone()) } else { None }).collect()
    }
}

/// This node's name: the one that was given, else the host's, as a kubelet has it. A host whose name no node can have
/// gets the nearest one that it can.
pub fn node_name(args: &args::Node) -> NodeName {
    let host = || nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok()).unwrap_or_default();
    args.node_name.clone().unwrap_or_else(|| NodeName::nearest(&host()))
}

/// Where the keys of this node's slot are.
#[derive(Clone, Copy, Debug)]
pub enum SlotKeys<'a> {
    /// Among the others.
    Folder,
    /// In the slot's Secret; `None`: not read yet.
    Secret(Option<&'a BTreeMap<PublicKey, PrivateKey>>),
}

/// What this node holds for its slot and its cluster, as last read.
#[derive(Debug, Default)]
pub struct Keys {
    pub keyring: Keyring,
    wanted: Wanted,
    /// The slot's keys, if it has one, and the names of all preshared ones are known.
    complete: bool,
    /// This node has a slot, whose Secret has not been read yet.
    awaited: bool,
    pub problems: Vec<String>,
}

impl Keys {
    /// Reads the folder again, as far as this node's part in the cluster needs it. What can no longer be read keeps its last
    /// good keys.
    pub fn refresh(&mut self, args: &args::Node, intent: &Intent, slots: SlotKeys<'_>) {
        let others = intent.cluster.as_ref().is_some_and(|cluster| cluster.nodes.len() > 1);
        self.wanted = Wanted { slot: intent.slot_of(&node_name(args)), hop: others };
        let in_folder = matches!(slots, SlotKeys::Folder);
        let of_folder = Wanted { slot: self.wanted.slot.filter(|_| in_folder), ..self.wanted };
        let (mut read, problems) = Keyring::read(&args.keys_dir, of_folder);
        read.keep(std::mem::take(&mut self.keyring), &problems);
        self.keyring = read;
        self.complete = !problems.iter().any(KeyProblem::blocks);
        self.problems = problems.iter().map(ToString::to_string).collect();
        let SlotKeys::Secret(keys) = slots else { return };
        self.keyring.private = keys.cloned().unwrap_or_default();
        self.awaited = keys.is_none() && self.wanted.slot.is_some();
        if let Some(slot) = self.wanted.slot.filter(|_| self.awaited) {
            self.complete = false;
            self.problems
                .push(format!("the key of slot {slot} has not been read from its Secret yet: nothing is taken away"));
        }
    }

    /// Whether every key that this node's part asks for could be read.
    pub fn are_complete(&self) -> bool {
        self.complete
    }

    /// Whether what is known suffices to take something away from these members. A preshared key that cannot be used is
    /// no reason to end a session that was made with it.
    fn suffice(&self, intent: &Intent) -> bool {
        let unusable = |member| {
            self.wanted.slot.is_some() && matches!(self.keyring.preshared.get(member), Some(Preshared::Unusable))
        };
        self.complete && !intent.members.keys().any(unusable)
    }

    pub fn secrets(&self) -> Secrets {
        let preshared = self.keyring.preshared.values().filter_map(Preshared::key).map(|psk| (psk.id(), psk.clone()));
        let hop = self.hop_marks().into_iter().map(|mark| (mark.id(), mark)).collect();
        Secrets { private: self.keyring.private.clone(), preshared: preshared.collect(), hop }
    }

    /// What the hop secrets are to packets; the first sends.
    pub fn hop_marks(&self) -> Vec<HopMark> {
        self.keyring.hop.iter().map(HopSecret::mark).collect()
    }

    /// The slot's keys to use. Before its Secret has been read, those that are in use stay: a restart changes nothing.
    /// `None`: nothing is known of any.
    fn slot_keys(&self, reading: &Reading) -> Option<BTreeSet<PublicKey>> {
        if !self.awaited {
            return Some(self.keyring.private.keys().copied().collect());
        }
        let in_use: BTreeSet<_> = reading.state.wireguard.values().map(|device| device.key).collect();
        Some(in_use).filter(|keys| !keys.is_empty())
    }

    /// The hop secrets to use. Where none could ever be read, those that are in use stay.
    fn hop_ids(&self, reading: &Reading) -> Vec<HopId> {
        if !self.keyring.hop.is_empty() {
            return self.hop_marks().iter().map(HopMark::id).collect();
        }
        let config = reading.state.maps.as_ref().and_then(|maps| maps.config.as_ref());
        config.filter(|_| self.wanted.hop).map(|config| config.secrets.clone()).unwrap_or_default()
    }
}

/// UDP source ports of the hop: few, and outside the ephemeral range.
const HOP_SOURCES: (u16, u16) = (27456, 27471);

/// The state that this node should have, and what was left out of it.
#[derive(Clone, Debug)]
pub struct Survey {
    pub desired: State,
    pub rejected: Vec<Rejection>,
    /// Whether it may break as well as make.
    pub complete: bool,
    /// When a silent peer's next address is due, on the dialer's clock.
    pub again: Option<Duration>,
}

/// What was found out around the folder and the keys.
#[derive(Debug)]
pub struct Found<'a> {
    pub node: &'a Node,
    pub resolved: &'a Resolved,
    pub reading: &'a Reading,
    /// Path MTUs, as probes have found.
    pub mtus: BTreeMap<MemberName, u16>,
}

/// Puts together what a pass is planned from. `now` is the dialer's clock.
pub fn survey(
    view: &View,
    keys: &Keys,
    found: Found<'_>,
    args: &args::Node,
    (dialer, now): (&mut Dialer, Duration),
) -> Survey {
    let Found { node, resolved, reading, mtus } = found;
    let ports = Ports {
        wireguard: args.backend.wireguard_port,
        hop: args.backend.hop_port,
        hop_sources: HOP_SOURCES,
        probe: args.backend.probe_port,
    };
    let mut facts = Facts {
        node: node_name(args),
        hop_ids: keys.hop_ids(reading),
        slot_keys: keys.slot_keys(reading),
        psks: keys
            .keyring
            .preshared
            .iter()
            .map(|(member, psk)| (member.clone(), psk.key().map(PresharedKey::id)))
            .collect(),
        resolved: resolved.addresses.clone(),
        dial: BTreeMap::new(),
        carved: carved(reading),
        underlay_mtu: node.underlay_mtu,
        ipv6: !node.conditions.contains(&Condition::Ipv6Off),
        addresses: node.addresses.clone(),
        native: node.native.iter().map(|(name, native)| (name.clone(), native.mtu)).collect(),
        mtus,
        overlay: Overlay::new(&args.mesh_domain),
        ports,
    };
    let dial = dialer.decide(now, &candidates(&view.intent, &facts), &seen(reading, SystemTime::now()));
    facts.dial = dial.now;
    let (desired, rejected) = plan(&view.intent, &facts);
    Survey { desired, rejected, complete: view.complete && keys.suffice(&view.intent), again: dial.again }
}

/// What the reading shows of each pair. A handshake from the future (the clock was set back) counts as now.
fn seen(reading: &Reading, now: SystemTime) -> BTreeMap<(Device, PublicKey), Seen> {
    let peers = reading.state.peers.iter();
    peers
        .map(|(pair, peer)| {
            let stats = reading.pairs.get(pair).cloned().unwrap_or_default();
            let handshake = stats.last_handshake.map(|at| now.duration_since(at).unwrap_or_default());
            (*pair, Seen { endpoint: peer.endpoint, handshake, tx_bytes: stats.tx_bytes })
        })
        .collect()
}

/// The endpoints in use that have their `throw` route.
fn carved(reading: &Reading) -> BTreeSet<IpAddr> {
    let in_use = reading.state.peers.values().filter_map(|peer| peer.endpoint.map(|endpoint| endpoint.ip()));
    in_use.filter(|ip| reading.state.routes.get(&(Table::Remote, (*ip).into())) == Some(&Route::Throw)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{names::Ordinal, state::WireGuard};

    /// As a gateway that restarts finds itself: its Secret is read after the first pass.
    #[test]
    fn before_a_slot_s_secret_is_read_the_keys_in_use_stay() {
        let key = |n: u8| PrivateKey::new([n; 32]);
        let device = |n: u8| WireGuard { key: key(n).public(), port: 27473 };
        let mut reading = Reading::default();
        let mut keys = Keys { awaited: true, ..Keys::default() };
        assert_eq!(keys.slot_keys(&reading), None);
        reading.state.wireguard = Ordinal::all().map(Device).map(|slot| (slot, device(1))).collect();
        assert_eq!(keys.slot_keys(&reading), Some([key(1).public()].into()));
        keys.keyring.private = [(key(2).public(), key(2))].into();
        keys.awaited = false;
        assert_eq!(keys.slot_keys(&reading), Some([key(2).public()].into()));
    }
}
