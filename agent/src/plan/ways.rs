//! The routes: what is the others' goes to the hop, whose programs find the gateway; nothing of it leaves in the clear.

use std::{collections::BTreeSet, net::IpAddr};

use ipnetwork::IpNetwork;

use super::{Here, Longest};
use crate::{
    intent::Member,
    names::{Device, MemberName, Table},
    state::{Family, Home, MIN_MTU_V4, MIN_MTU_V6, Maps, Route, State},
};

/// Adds the ways: to each member that this node or another gateway of the cluster has a tunnel to, and to every overlay
/// address, with a twin. `maps` says what lives here.
pub(super) fn add(state: &mut State, here: Here<'_>, maps: &Maps) {
    let homes = Longest::new(&maps.homes);
    let addresses = here.facts.addresses.iter().copied();
    let local: BTreeSet<IpAddr> = addresses.filter(|address| homes.get(*address) == Some(&Home::Here)).collect();
    let elsewhere = here.other_slots().next().is_some();
    for (name, member) in here.intent.others() {
        if member.gateways.is_empty() || !(elsewhere || has_peer(state, member)) {
            continue;
        }
        let mtu = here.facts.mtus.get(name).map_or(here.mtu(), |mtu| (*mtu).min(here.mtu()));
        let sources = Family::ALL.map(|family| source(here, name, family, &local));
        for prefix in member.offered_to(&here.intent.me) {
            let [v4, v6] = sources;
            let (least, source) = if prefix.is_ipv4() { (MIN_MTU_V4, v4) } else { (MIN_MTU_V6, v6) };
            let route = Route::Hop { mtu: Some(mtu.max(least).into()), source };
            state.routes.insert((Table::Remote, prefix), route);
        }
    }
    for member in here.overlays() {
        let prefix = here.facts.overlay.prefix(member);
        let route = Route::Hop { mtu: Some(here.mtu().into()), source: Some(here.overlay().into()) };
        state.routes.insert((Table::Remote, prefix), route);
        state.routes.insert((Table::Closed, prefix), Route::Unreachable);
    }
    let own = IpNetwork::from(IpAddr::from(here.overlay()));
    // Where a CNI has moved the local table behind our rules, it must still be found.
    state.routes.extend(Table::ALL.map(|table| ((table, own), Route::Throw)));
}

fn has_peer(state: &State, member: &Member) -> bool {
    let mut pairs = member.gateways.iter().map(|(ordinal, gateway)| (Device(*ordinal), gateway.key));
    pairs.any(|pair| state.peers.contains_key(&pair))
}

/// The address from which this node itself can talk to that member: one that lives here, in a range that is offered to it.
/// The node's own address comes last: a pod range's is the more usual one to be let in.
fn source(here: Here<'_>, to: &MemberName, family: Family, local: &BTreeSet<IpAddr>) -> Option<IpAddr> {
    let ranges: Vec<IpNetwork> = here.member.offered_to(to).filter(|range| Family::of(range) == family).collect();
    let offered = |address: &&IpAddr| ranges.iter().any(|range| range.contains(**address));
    let is_node = |address: &&IpAddr| here.node.is_some_and(|node| node.hop.contains(*address));
    local.iter().filter(offered).min_by_key(|address| (is_node(address), **address)).copied()
}
