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
    facts::Facts,
    intent::{self, Host, Intent, Local, Rejection},
    kernel::{
        Secrets,
        facts::{Condition, Node},
    },
    keyring::{KeyProblem, Keyring, Preshared},
    keys::{PresharedKey, PublicKey},
    names::{Device, Ordinal, Table},
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

/// What this node holds for its slot, as last read.
#[derive(Debug, Default)]
pub struct Keys {
    pub keyring: Keyring,
    /// The slot's keys and the names of all preshared ones are known.
    complete: bool,
    pub problems: Vec<String>,
}

/// This node's slot: with a folder and no Node documents a member is one node.
pub const SLOT: Ordinal = Ordinal::ZERO;

impl Keys {
    /// Reads the folder again. What can no longer be read keeps its last good keys.
    pub fn refresh(&mut self, args: &args::Node) {
        let (mut read, problems) = Keyring::read(&args.keys_dir, SLOT);
        read.keep(std::mem::take(&mut self.keyring), &problems);
        self.keyring = read;
        self.complete = !problems.iter().any(KeyProblem::blocks);
        self.problems = problems.iter().map(ToString::to_string).collect();
    }

    /// Whether what is known suffices to take something away from these members. A preshared key that cannot be used is
    /// no reason to end a session that was made with it.
    fn suffice(&self, intent: &Intent) -> bool {
        let unusable = |member| matches!(self.keyring.preshared.get(member), Some(Preshared::Unusable));
        self.complete && !intent.members.keys().any(unusable)
    }

    pub fn secrets(&self) -> Secrets {
        let preshared = self.keyring.preshared.values().filter_map(Preshared::key).map(|psk| (psk.id(), psk.clone()));
        Secrets { private: self.keyring.private.clone(), preshared: preshared.collect(), hop: BTreeMap::new() }
    }
}

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

/// Puts together what a pass is planned from. `now` is the dialer's clock.
pub fn survey(
    view: &View,
    keys: &Keys,
    node: &Node,
    resolved: &Resolved,
    reading: &Reading,
    args: &args::Node,
    (dialer, now): (&mut Dialer, Duration),
) -> Survey {
    let mut facts = Facts {
        slot: SLOT,
        slot_keys: keys.keyring.private.keys().copied().collect(),
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
        base_port: args.backend.wireguard_port,
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
