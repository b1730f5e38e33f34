//! The whole state that a node should have, from what the folder says and what the node knows.
//!
//! Pure and total: no I/O, no clock, no order of arrival; what cannot be planned is left out and said. Every plan is
//! closed in itself: a route stands on the hop, whose programs know its prefix; a prefix that a peer holds is known to the
//! programs, too; a peer has its device and the nft table; and every range that is offered to this member has its
//! `unreachable` twin. And the nodes of a cluster agree: each computes the same of the others as they of themselves.

mod maps;
mod ways;
mod wireguard;

#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv6Addr},
};

use ipnetwork::IpNetwork;

use crate::{
    facts::Facts,
    intent::{Gateway, Host, Intent, Kind, Member, Node, Reason, Rejection},
    keys::PublicKey,
    names::{Device, HOP, Interface, MemberId, MemberName, Ordinal, Table},
    state::{Attachment, Family, Hop, Link, Lookups, MIN_MTU_V6, Nft, Program, Route, Rule, State},
};

/// What WireGuard adds to a packet over IPv6: 40 IPv6 + 8 UDP + 32 WireGuard, in bytes.
const TUNNEL_OVERHEAD: u32 = 80;

/// What the hop adds over IPv6: 40 IPv6 + 8 UDP + 8 VXLAN + 14 inner Ethernet, in bytes.
const HOP_OVERHEAD: u32 = 70;

/// Bytes: larger devices have not been tried.
const MAX_MTU: u16 = 3_900;

/// Plans this node. One that is none of the cluster's, or that has no gateway to turn to, closes what the others claim.
pub fn plan(intent: &Intent, facts: &Facts) -> (State, Vec<Rejection>) {
    let mut state = State::default();
    let mut rejected = Vec::new();
    let ranges = ranges(intent);
    // A range that is offered to this member never leaves in the clear, whether there is a way to it or not.
    state.routes.extend(ranges.keys().map(|range| ((Table::Closed, *range), Route::Unreachable)));
    let carved = carved(intent, facts, &ranges);
    if let Some(here) = Here::find(intent, facts, &mut rejected) {
        join(&mut state, here, &carved, &mut rejected);
    }
    // In both tables, or a forwarded packet would meet the twin.
    for address in carved.keys() {
        state.routes.extend(Table::ALL.map(|table| ((table, IpNetwork::from(*address)), Route::Throw)));
    }
    if !state.routes.is_empty() {
        state.rules = rules(facts);
    }
    if !facts.ipv6 {
        // The kernel would refuse them at every pass, and a failed make cancels every break.
        state.routes.retain(|(_, to), _| to.is_ipv4());
        state.rules.retain(|rule, _| rule.family == Family::V4);
        state.overlay.clear();
    }
    (state, rejected)
}

/// A lookup for the one native device asks how to leave by it: a CNI that skips the FIB asks so, for the MAC of its next
/// hop, before `steer_native` has its packet. For IPv4 the kernel then passes over routes by other devices; for IPv6 it
/// would answer with ours, and look for the remote pod itself on that device's link. With several native devices no CNI
/// skips the FIB.
fn rules(facts: &Facts) -> BTreeMap<Rule, Lookups> {
    let only_native = facts.native.keys().next().filter(|_| facts.native.len() == 1);
    let lookups = |rule: Rule| match (rule, only_native) {
        (Rule { table: Table::Closed, .. }, _) => Lookups::Forwarded,
        (Rule { family: Family::V6, .. }, Some(device)) => Lookups::NotBoundTo(device.clone()),
        _ => Lookups::All,
    };
    let all = Family::ALL.into_iter().flat_map(|family| Table::ALL.map(|table| Rule { family, table }));
    all.map(|rule| (rule, lookups(rule))).collect()
}

/// What is offered to this member, and by whom.
fn ranges(intent: &Intent) -> BTreeMap<IpNetwork, MemberId> {
    let offered = |member: &Member| member.offered_to(&intent.me).map(|range| (range, member.id)).collect::<Vec<_>>();
    intent.others().flat_map(|(_, member)| offered(member)).collect()
}

/// Everything that a node of the mesh has.
fn join(state: &mut State, here: Here<'_>, carved: &BTreeMap<IpAddr, MemberId>, rejected: &mut Vec<Rejection>) {
    let facts = here.facts;
    if let Some((slot, gateway)) = here.slot {
        wireguard::add(state, here, (slot, gateway), rejected);
    }
    state.hop = Some(Hop { port: facts.ports.hop, sources: facts.ports.hop_sources });
    // The loose filter refuses every source that is reached by another device, if the device itself has no address
    // (net/ipv4/fib_frontend.c `__fib_validate_source`): a gateway could not tell a pod that a packet's TTL has run out.
    // `from_hop` checks sources.
    //
    // What comes over the hop was merged by the native device already, or before it was sent: to try again costs up to a
    // tenth of a stream.
    let link = Link { rp_filter: 0, gro: false, ..Link::ours(here.hop_mtu().into()) };
    state.links.insert(Interface::Hop, link);
    state.overlay.insert(here.overlay());
    if here.other_nodes().next().is_some() && facts.hop_ids.is_empty() {
        rejected.push(hop_secret_missing(here));
    }
    let maps = maps::maps(here, state.wireguard.keys().copied().collect(), carved, rejected);
    ways::add(state, here, &maps);
    state.maps = Some(maps);
    state.programs = programs(state, facts);
    state.nft = Some(nft(here));
}

fn programs(state: &State, facts: &Facts) -> BTreeSet<Attachment> {
    let at = |program, link: &str| Attachment { program, link: link.to_owned() };
    let mut programs: BTreeSet<Attachment> = [Program::Steer, Program::FromHop].map(|one| at(one, HOP)).into();
    for device in state.wireguard.keys() {
        programs.extend([Program::ToPeer, Program::FromPeer].map(|one| at(one, &device.to_string())));
    }
    programs.extend(facts.native.keys().map(|link| at(Program::SteerNative, link)));
    programs
}

/// This node, in its cluster, in the mesh.
#[derive(Clone, Copy)]
struct Here<'a> {
    intent: &'a Intent,
    facts: &'a Facts,
    member: &'a Member,
    /// The slot that this node holds and that it can use; `None`: it is a worker.
    slot: Option<(Ordinal, &'a Gateway)>,
    /// Its Node; `None`: no document tells of any.
    node: Option<&'a Node>,
}

impl<'a> Here<'a> {
    /// `None` where there is nothing to join, or no way to do it.
    fn find(intent: &'a Intent, facts: &'a Facts, rejected: &mut Vec<Rejection>) -> Option<Here<'a>> {
        let Some(member) = intent.members.get(&intent.me) else {
            let message = format!("no accepted MeshCluster is called {}: add one, or mend --cluster-name", intent.me);
            rejected.push(about_member(intent, "metadata.name", Reason::NotInMesh, message));
            return None;
        };
        let node = intent.cluster.as_ref().map(|cluster| cluster.nodes.get(&facts.node));
        if node == Some(None) {
            let message = format!("no accepted Node is called {}: add it, or mend --node-name", facts.node);
            let (kind, name, field) = (Kind::Node, facts.node.to_string(), "metadata.name".to_owned());
            rejected.push(Rejection { kind, name, field, reason: Reason::NotInMesh, message });
            return None;
        }
        // A slot whose key is not known yet cannot be used, but there is nothing wrong with it.
        let held = intent.slot_of(&facts.node).zip(facts.slot_keys.as_ref());
        let slot = held.and_then(|held| match gateway(intent, facts, member, held) {
            Ok(gateway) => Some((held.0, gateway)),
            Err(rejection) => {
                rejected.push(rejection);
                None
            }
        });
        let here = Here { intent, facts, member, slot, node: node.flatten() };
        if intent.cluster.as_ref().is_some_and(|cluster| cluster.gateways.is_empty()) {
            let message = "no node of this cluster holds a slot: add a MeshGateway that names the node".to_owned();
            rejected.push(about_member(intent, "spec.gateways", Reason::NoGateway, message));
        }
        let has_way = slot.is_some() || here.other_slots().next().is_some();
        (has_way && intent.others().next().is_some()).then_some(here)
    }

    /// The members whose overlay addresses somebody may have: the own one, and those with gateways.
    fn overlays(self) -> impl Iterator<Item = MemberId> {
        let others = self.intent.others().filter(|(_, member)| !member.gateways.is_empty());
        std::iter::once(self.member.id).chain(others.map(|(_, member)| member.id))
    }

    /// The own overlay address: the slot's on a gateway, the node's on a worker.
    fn overlay(self) -> Ipv6Addr {
        match self.slot {
            Some((slot, _)) => self.facts.overlay.slot(self.member.id, slot),
            None => self.facts.overlay.node(self.member.id, &self.facts.node),
        }
    }

    fn other_nodes(self) -> impl Iterator<Item = (Option<Ordinal>, &'a Node)> {
        let cluster = self.intent.cluster.as_ref();
        cluster.into_iter().flat_map(move |cluster| {
            let others = cluster.nodes.iter().filter(move |(name, _)| **name != self.facts.node);
            others.map(|(name, node)| (cluster.slot_of(name), node))
        })
    }

    fn other_slots(self) -> impl Iterator<Item = (Ordinal, &'a Node)> {
        self.other_nodes().filter_map(|(slot, node)| slot.map(|slot| (slot, node)))
    }

    /// Bytes of an inner packet on the hop.
    fn hop_mtu(self) -> u16 {
        device_mtu(self.facts.underlay_mtu, HOP_OVERHEAD)
    }

    /// Bytes of an inner packet in a tunnel.
    fn tunnel_mtu(self) -> u16 {
        device_mtu(self.facts.underlay_mtu, TUNNEL_OVERHEAD)
    }

    /// Bytes of an inner packet towards a member of which no more is known.
    fn mtu(self) -> u16 {
        self.hop_mtu().min(self.tunnel_mtu())
    }
}

/// Bytes: what the underlay carries less the overhead, within what a device can have.
fn device_mtu(underlay: u32, overhead: u32) -> u16 {
    let bytes = underlay.saturating_sub(overhead).clamp(MIN_MTU_V6.into(), MAX_MTU.into());
    u16::try_from(bytes).unwrap_or(MAX_MTU)
}

/// The folder's entry for the slot that this node holds, if it is this node's and it can be used.
fn gateway<'a>(
    intent: &Intent,
    facts: &Facts,
    member: &'a Member,
    (slot, keys): (Ordinal, &BTreeSet<PublicKey>),
) -> Result<&'a Gateway, Rejection> {
    let Some(gateway) = member.gateways.get(&slot) else {
        let keys: Vec<String> = keys.iter().map(ToString::to_string).collect();
        let message =
            format!("the folder names no gateway with ordinal {slot}: add it with publicKey {}", keys.join(" or "));
        return Err(about_member(intent, "spec.gateways", Reason::NotInMesh, message));
    };
    if !keys.contains(&gateway.key) {
        let message = format!(
            "{} is not the key of this node's slot {slot}: name one that `carrick keys show` prints (on Kubernetes `kubectl carrick keys show`), or put the private key that belongs to this one where those are",
            gateway.key
        );
        let field = format!("spec.gateways[ordinal={slot}].publicKey");
        return Err(about_member(intent, &field, Reason::NotInMesh, message));
    }
    if !facts.ipv6 {
        let message = format!(
            "IPv6 is off on this node, which holds slot {slot}, and probes need it: turn it on (net.ipv6.conf.all.disable_ipv6=0), or let another node hold the slot"
        );
        return Err(about_member(intent, &format!("spec.gateways[ordinal={slot}]"), Reason::IPv6Disabled, message));
    }
    Ok(gateway)
}

fn about_member(intent: &Intent, field: &str, reason: Reason, message: String) -> Rejection {
    Rejection { kind: Kind::MeshCluster, name: intent.me.to_string(), field: field.to_owned(), reason, message }
}

fn hop_secret_missing(here: Here<'_>) -> Rejection {
    let message = "the cluster has other nodes, but the keys folder has no file hop, by which they know each other's \
                   packets: make it with `carrick keys gen --hop` on one node, and copy it to all";
    Rejection {
        kind: Kind::Node,
        name: here.facts.node.to_string(),
        field: "metadata.name".to_owned(),
        reason: Reason::HopSecretMissing,
        message: message.to_owned(),
    }
}

/// The endpoints inside a range, and whose range it is: what carries a tunnel must not enter it. Where a peer has roamed
/// to is not carved out: it must not choose what goes in the clear.
fn carved(intent: &Intent, facts: &Facts, ranges: &BTreeMap<IpNetwork, MemberId>) -> BTreeMap<IpAddr, MemberId> {
    let gateways = intent.members.values().flat_map(|member| member.gateways.values());
    let hosts = gateways.flat_map(|gateway| gateway.endpoints.iter().map(|endpoint| &endpoint.host));
    let named: BTreeSet<IpAddr> = hosts.flat_map(|host| addresses_of(host, &facts.resolved)).collect();
    let ranges = Longest::new(ranges);
    named.union(&facts.carved).filter_map(|address| ranges.get(*address).map(|member| (*address, *member))).collect()
}

/// What an endpoint's host stands for: itself, or what its name has resolved to.
pub fn addresses_of(host: &Host, resolved: &BTreeMap<String, Vec<IpAddr>>) -> Vec<IpAddr> {
    match host {
        Host::Ip(address) => vec![*address],
        Host::Name(name) => resolved.get(name).into_iter().flatten().copied().collect(),
    }
}

/// Finds the longest prefix that holds an address.
struct Longest<'a, V> {
    map: &'a BTreeMap<IpNetwork, V>,
    lengths: BTreeSet<u8>,
}

impl<'a, V> Longest<'a, V> {
    fn new(map: &'a BTreeMap<IpNetwork, V>) -> Longest<'a, V> {
        Longest { map, lengths: map.keys().map(IpNetwork::prefix).collect() }
    }

    fn get(&self, address: IpAddr) -> Option<&'a V> {
        self.lengths.iter().rev().find_map(|length| {
            let around = IpNetwork::new(address, *length).ok()?;
            self.map.get(&IpNetwork::new(around.network(), *length).ok()?)
        })
    }
}

/// Sources are kept between two prefixes if each side offers its own to the other. The pairs never overlap: members hold
/// disjoint prefixes, and of a member's nested ones the widest stands for all.
fn nft(here: Here<'_>) -> Nft {
    let ports = here.facts.ports;
    let nodes = here.other_nodes().flat_map(|(_, node)| &node.hop).copied().collect();
    let mut nft = Nft {
        keep_source: BTreeSet::new(),
        nodes,
        hop_port: ports.hop,
        hop_sources: ports.hop_sources,
        native: here.facts.native.keys().cloned().collect(),
    };
    for (name, member) in here.intent.others() {
        let own = widest(here.member.offered_to(name));
        for remote in widest(member.offered_to(&here.intent.me)) {
            for own in own.iter().copied().filter(|own| own.is_ipv4() == remote.is_ipv4()) {
                nft.keep_source.extend([(own, remote), (remote, own)]);
            }
        }
    }
    nft
}

/// The prefixes that lie in no other of them. Their order puts a prefix right before what it contains.
fn widest(prefixes: impl Iterator<Item = IpNetwork>) -> Vec<IpNetwork> {
    let mut widest: Vec<IpNetwork> = Vec::new();
    for prefix in prefixes.collect::<BTreeSet<_>>() {
        if !widest.last().is_some_and(|last| last.contains(prefix.network())) {
            widest.push(prefix);
        }
    }
    widest
}

/// Which member's gateway a pair is.
pub fn member_of<'a>(intent: &'a Intent, device: Device, key: &PublicKey) -> Option<&'a MemberName> {
    let holds = |member: &Member| member.gateways.get(&device.0).is_some_and(|gateway| gateway.key == *key);
    intent.members.iter().find(|(_, member)| holds(member)).map(|(name, _)| name)
}
