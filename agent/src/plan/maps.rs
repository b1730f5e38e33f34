//! What the BPF programs look up.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use ipnetwork::IpNetwork;

use super::{Here, about_member};
use crate::{
    intent::{Node, Reason, Rejection},
    names::{Device, MemberId, NodeName},
    state::{self, Config, Home, Maps, Remote},
};

pub(super) fn maps(
    here: Here<'_>,
    wireguard: BTreeSet<Device>,
    carved: &BTreeMap<IpAddr, MemberId>,
    rejected: &mut Vec<Rejection>,
) -> Maps {
    Maps {
        config: Some(config(here, wireguard)),
        remote: remote(here, carved),
        own: own(here, rejected),
        homes: homes(here),
        nodes: nodes(here),
    }
}

fn config(here: Here<'_>, wireguard: BTreeSet<Device>) -> Config {
    let facts = here.facts;
    let usable = |address: &&IpAddr| address.is_ipv4() || facts.ipv6;
    Config {
        member: here.member.id,
        slot: here.slot.map(|(slot, _)| slot),
        overlay: here.overlay(),
        hop: here.node.iter().flat_map(|node| &node.hop).filter(usable).copied().collect(),
        gateways: here.other_slots().map(|(slot, node)| (slot, node.hop.clone())).collect(),
        wireguard,
        secrets: facts.hop_ids.iter().copied().take(ebpf::HOP_SECRETS).collect(),
        mtu: here.mtu(),
        hop_mtu: here.hop_mtu(),
        wireguard_port: facts.ports.wireguard,
        hop_port: facts.ports.hop,
        probe_port: facts.ports.probe,
    }
}

/// Everything that is offered here, reachable or not: what is not to leave in the clear must be known.
fn remote(here: Here<'_>, carved: &BTreeMap<IpAddr, MemberId>) -> BTreeMap<IpNetwork, Remote> {
    let mut remote = BTreeMap::new();
    for (_, member) in here.intent.others() {
        remote.extend(member.offered_to(&here.intent.me).map(|range| (range, Remote::Range(member.id))));
    }
    let overlay = |id| (here.facts.overlay.prefix(id), Remote::Overlay(id));
    remote.extend(here.overlays().map(overlay));
    remote.extend(carved.iter().map(|(address, member)| (IpNetwork::from(*address), Remote::Carved(*member))));
    remote
}

/// Of nested prefixes the longest is found, so it carries the offers of those around it, too.
fn own(here: Here<'_>, rejected: &mut Vec<Rejection>) -> BTreeMap<IpNetwork, BTreeSet<MemberId>> {
    let routes = &here.member.routes;
    let others: Vec<_> = here.intent.others().map(|(name, member)| (name, member.id)).collect();
    let around = |inner: &IpNetwork| {
        let inner = *inner;
        routes.iter().filter(move |(outer, _)| outer.prefix() <= inner.prefix() && outer.contains(inner.network()))
    };
    let offered = |range: &IpNetwork| -> BTreeSet<MemberId> {
        let offers: Vec<_> = around(range).map(|(_, route)| &route.offered).collect();
        let included = others.iter().filter(|(name, _)| offers.iter().any(|offer| offer.includes(name)));
        included.map(|(_, id)| *id).collect()
    };
    let mut own: BTreeMap<_, _> = routes.keys().map(|range| (*range, offered(range))).collect();
    own.retain(|_, members| !members.is_empty());
    let limit = usize::try_from(ebpf::capacity::OWN).unwrap_or(usize::MAX);
    if let Some(first) = own.keys().nth(limit).copied() {
        let message = format!(
            "offers {} ranges to others, and a node can serve {limit}: those from {first} on are not, join some of them",
            own.len()
        );
        rejected.push(about_member(here.intent, "metadata.name", Reason::TooMany, message));
        own.split_off(&first);
    }
    own
}

/// Where this cluster's pods, its nodes' offered addresses and their overlay addresses live.
fn homes(here: Here<'_>) -> BTreeMap<IpNetwork, Home> {
    let (id, overlay) = (here.member.id, here.facts.overlay);
    let single = |address: IpAddr, home| (IpNetwork::from(address), home);
    let Some(cluster) = &here.intent.cluster else {
        let ranges = here.member.routes.keys().map(|range| (*range, Home::Here));
        return ranges.chain([single(here.overlay().into(), Home::Here)]).collect();
    };
    let home = |name: &NodeName, node: &Node| match node.hop.first() {
        Some(address) if *name != here.facts.node => Home::Node(*address),
        _ => Home::Here,
    };
    let offered = |address: &&IpAddr| here.member.routes.keys().any(|range| range.contains(**address));
    let mut homes = BTreeMap::new();
    for (name, node) in &cluster.nodes {
        let home = home(name, node);
        homes.extend(node.pods.iter().map(|range| (*range, home)));
        homes.extend(node.hop.iter().filter(offered).map(|address| single(*address, home)));
        homes.extend([single(overlay.node(id, name).into(), home)]);
        homes.extend(cluster.slot_of(name).map(|slot| single(overlay.slot(id, slot).into(), home)));
    }
    let pods = cluster
        .pods
        .iter()
        .filter_map(|(address, name)| cluster.nodes.get(name).map(|node| single(*address, home(name, node))));
    homes.extend(pods);
    // A worker is not told which blocks of a pool are its own. Its gateways are, and it takes packets from nobody else.
    if cluster.pooled && here.slot.is_none() {
        for range in here.member.routes.keys() {
            homes.entry(*range).or_insert(Home::Here);
        }
    }
    homes
}

fn nodes(here: Here<'_>) -> BTreeMap<IpAddr, state::Node> {
    let mut nodes = BTreeMap::new();
    for (slot, node) in here.other_nodes() {
        let Some(home) = node.hop.first() else { continue };
        nodes.extend(node.hop.iter().map(|address| (*address, state::Node { slot, home: *home })));
    }
    nodes
}
