//! From the state that is to the state that is wanted, as a list of steps.
//!
//! The order is part of the contract, make before break. First what makes the rest safe: `throw` routes, so that no
//! tunnel is fed its own packets, and the nft table. Then links, still down, the maps and the programs, without which a
//! peer could reach anything; then links up, peers with the prefixes they gain (the kernel moves a prefix in one step),
//! rules and routes; only then is anything taken away, in the opposite order. So a prefix that keeps its route never
//! lacks a peer in between, a prefix that a peer holds is known to the programs, and a forwarded packet that loses its
//! route meets the `unreachable` twin, never the cluster's own default route.

use std::collections::{BTreeMap, BTreeSet};

use ipnetwork::IpNetwork;

use crate::{
    keys::PublicKey,
    names::{Device, HOP, Interface, Table},
    state::{Entry, Hop, Key, Maps, Nft, Op, Peer, Remote, Route, State},
};

/// The steps from `actual` to `desired`; empty when nothing has to change. Sorted by [`Op::is_break`].
pub fn diff(desired: &State, actual: &State) -> Vec<Op> {
    let renewed = renewed_hop(desired, actual);
    let (hop, actual) = renewed.as_ref().map_or((None, actual), |(hop, left)| (Some(*hop), left));
    let mut ops = Vec::new();
    make_routes(desired, actual, |route| *route == Route::Throw, &mut ops);
    let grown = union(desired.nft.as_ref(), actual.nft.as_ref());
    if let (Some(grown), true) = (&grown, grown != actual.nft && desired.nft.is_some()) {
        ops.push(Op::GrowNft(grown.clone()));
    }
    ops.extend(hop.cloned().map(Op::SetHop));
    make_devices(desired, actual, &mut ops);
    make_entries(desired, actual, &mut ops);
    ops.extend(desired.programs.difference(&actual.programs).cloned().map(Op::Attach));
    raise_links(desired, actual, &mut ops);
    make_peers(desired, actual, &mut ops);
    ops.extend(desired.overlay.difference(&actual.overlay).copied().map(Op::AddOverlay));
    let rules = desired.rules.iter().filter(|(rule, lookups)| actual.rules.get(rule) != Some(lookups));
    ops.extend(rules.map(|(rule, lookups)| Op::SetRule(*rule, lookups.clone())));
    make_routes(desired, actual, |route| *route != Route::Throw, &mut ops);

    break_routes(desired, actual, &mut ops);
    ops.extend(actual.rules.keys().filter(|rule| !desired.rules.contains_key(rule)).map(|rule| Op::DelRule(*rule)));
    ops.extend(actual.overlay.difference(&desired.overlay).copied().map(Op::DelOverlay));
    if desired.nft.is_some() && grown != desired.nft {
        ops.push(Op::ShrinkNft(desired.nft.clone()));
    }
    break_peers(desired, actual, &mut ops);
    break_links(desired, actual, &mut ops);
    break_entries(desired, actual, &mut ops);
    if desired.nft.is_none() && actual.nft.is_some() {
        ops.push(Op::ShrinkNft(None));
    }
    if desired.maps.is_none() && actual.maps.is_some() {
        ops.push(Op::UnloadMaps);
    }
    ops
}

/// The hop that has to be made anew, and what is left of `actual` then: with the old device go its routes and programs,
/// and what the programs know of it is out of date.
fn renewed_hop<'a>(desired: &'a State, actual: &State) -> Option<(&'a Hop, State)> {
    let hop = desired.hop.as_ref().filter(|hop| actual.hop.as_ref() != Some(hop))?;
    let mut left = actual.clone();
    left.hop = None;
    left.links.remove(&Interface::Hop);
    left.routes.retain(|_, route| !matches!(route, Route::Hop { .. }));
    left.programs.retain(|attachment| attachment.link != HOP);
    left.maps.iter_mut().for_each(|maps| maps.config = None);
    Some((hop, left))
}

/// Down, if they are new: programs are attached to them before they carry anything.
fn make_devices(desired: &State, actual: &State, ops: &mut Vec<Op>) {
    for (device, wireguard) in &desired.wireguard {
        if actual.wireguard.get(device) != Some(wireguard) {
            ops.push(Op::SetDevice { device: *device, wireguard: wireguard.clone() });
        }
    }
}

fn raise_links(desired: &State, actual: &State, ops: &mut Vec<Op>) {
    for (interface, link) in &desired.links {
        if actual.links.get(interface) != Some(link) {
            ops.push(Op::SetLink { interface: *interface, link: link.clone() });
        }
    }
}

/// A prefix that is offered to fewer members keeps the others until the breaks.
fn make_entries(desired: &State, actual: &State, ops: &mut Vec<Op>) {
    let Some(desired) = &desired.maps else { return };
    let none = Maps::default();
    if actual.maps.is_none() {
        ops.push(Op::LoadMaps);
    }
    let actual = actual.maps.as_ref().unwrap_or(&none);
    ops.extend(news(&desired.homes, &actual.homes).map(|(to, home)| Op::SetEntry(Entry::Home(to, home))));
    ops.extend(news(&desired.nodes, &actual.nodes).map(|(at, node)| Op::SetEntry(Entry::Node(at, node))));
    for (prefix, members) in &desired.own {
        let before = actual.own.get(prefix);
        let grown = before.map_or_else(|| members.clone(), |before| before | members);
        if before != Some(&grown) {
            ops.push(Op::SetEntry(Entry::Own(*prefix, grown)));
        }
    }
    // An endpoint is carved out before the range around it is steered.
    let (carved, ranges): (Vec<_>, Vec<_>) = news(&desired.remote, &actual.remote).partition(|(_, r)| is_carved(r));
    ops.extend(carved.into_iter().chain(ranges).map(|(to, remote)| Op::SetEntry(Entry::Remote(to, remote))));
    if let Some(config) = desired.config.as_ref().filter(|config| actual.config.as_ref() != Some(config)) {
        ops.push(Op::SetEntry(Entry::Config(config.clone())));
    }
}

fn is_carved(remote: &Remote) -> bool {
    matches!(remote, Remote::Carved(_))
}

/// The entries of `desired` that `actual` lacks or has otherwise.
fn news<'a, K: Ord + Copy, V: PartialEq + Copy>(
    desired: &'a BTreeMap<K, V>,
    actual: &'a BTreeMap<K, V>,
) -> impl Iterator<Item = (K, V)> + 'a {
    desired.iter().filter(|(key, value)| actual.get(key) != Some(value)).map(|(key, value)| (*key, *value))
}

/// After the AllowedIPs have shrunk: what a tunnel still delivers is still known.
fn break_entries(desired: &State, actual: &State, ops: &mut Vec<Op>) {
    // Without wanted maps they go as a whole.
    let (Some(desired), Some(actual)) = (&desired.maps, &actual.maps) else { return };
    let gone = |key: Key| Op::DelEntry(key);
    if desired.config.is_none() && actual.config.is_some() {
        ops.push(gone(Key::Config));
    }
    let stale = actual.remote.iter().filter(|(to, _)| !desired.remote.contains_key(to));
    let (carved, ranges): (Vec<_>, Vec<_>) = stale.partition(|(_, remote)| is_carved(remote));
    ops.extend(ranges.into_iter().chain(carved).map(|(to, _)| gone(Key::Remote(*to))));
    for (prefix, before) in &actual.own {
        match desired.own.get(prefix) {
            None => ops.push(gone(Key::Own(*prefix))),
            Some(members) if !before.is_subset(members) => ops.push(Op::NarrowOwn(*prefix, members.clone())),
            Some(_) => {}
        }
    }
    ops.extend(actual.homes.keys().filter(|to| !desired.homes.contains_key(to)).map(|to| gone(Key::Home(*to))));
    ops.extend(actual.nodes.keys().filter(|at| !desired.nodes.contains_key(at)).map(|at| gone(Key::Node(*at))));
}

/// With a link goes what is attached to it.
fn break_links(desired: &State, actual: &State, ops: &mut Vec<Op>) {
    let ours = actual.links.keys().copied();
    let ours = ours.chain(actual.wireguard.keys().map(|device| Interface::WireGuard(*device)));
    let ours = ours.chain(actual.hop.iter().map(|_| Interface::Hop));
    let stale: BTreeSet<Interface> = ours.filter(|interface| !desired.links.contains_key(interface)).collect();
    let with_link = |link: &str| Interface::from_link(link).is_some_and(|interface| stale.contains(&interface));
    let detached = actual.programs.difference(&desired.programs).filter(|attachment| !with_link(&attachment.link));
    ops.extend(detached.cloned().map(Op::Detach));
    ops.extend(stale.iter().map(|interface| Op::DelLink(*interface)));
}

fn make_peers(desired: &State, actual: &State, ops: &mut Vec<Op>) {
    let mut gained: BTreeMap<(Device, PublicKey), Vec<IpNetwork>> = BTreeMap::new();
    for ((device, prefix), key) in &desired.allowed_ips {
        if actual.allowed_ips.get(&(*device, *prefix)) != Some(key) {
            gained.entry((*device, *key)).or_default().push(*prefix);
        }
    }
    for ((device, key), peer) in &desired.peers {
        let gained = gained.remove(&(*device, *key)).unwrap_or_default();
        let settled = actual.peers.get(&(*device, *key)).is_some_and(|actual| agrees(peer, actual));
        if !settled || !gained.is_empty() {
            ops.push(Op::SetPeer { device: *device, key: *key, peer: peer.clone(), gained });
        }
    }
}

/// Whether the peer is as wanted. Where no endpoint is wanted, any will do: the peer may have roamed.
fn agrees(desired: &Peer, actual: &Peer) -> bool {
    let dialled = desired.endpoint.is_none() || desired.endpoint == actual.endpoint;
    dialled && desired.keepalive == actual.keepalive && desired.psk == actual.psk
}

/// The twins first: no instant has a way to a remote range without them.
fn make_routes(desired: &State, actual: &State, which: impl Fn(&Route) -> bool, ops: &mut Vec<Op>) {
    for table in [Table::Closed, Table::Remote] {
        for ((of, to), route) in desired.routes.iter().filter(|(_, route)| which(route)) {
            if *of == table && actual.routes.get(&(table, *to)) != Some(route) {
                ops.push(Op::SetRoute { table, to: *to, route: route.clone() });
            }
        }
    }
}

/// The twins last.
fn break_routes(desired: &State, actual: &State, ops: &mut Vec<Op>) {
    for table in [Table::Remote, Table::Closed] {
        let stale = actual.routes.keys().filter(|key| key.0 == table && !desired.routes.contains_key(key));
        ops.extend(stale.map(|(table, to)| Op::DelRoute { table: *table, to: *to }));
    }
}

fn break_peers(desired: &State, actual: &State, ops: &mut Vec<Op>) {
    let mut lost: BTreeMap<(Device, PublicKey), Vec<IpNetwork>> = BTreeMap::new();
    for ((device, prefix), key) in &actual.allowed_ips {
        // A prefix that another peer gained has left this one already; one of a stale peer leaves with it.
        let stale = !desired.allowed_ips.contains_key(&(*device, *prefix));
        if stale && desired.peers.contains_key(&(*device, *key)) {
            lost.entry((*device, *key)).or_default().push(*prefix);
        }
    }
    ops.extend(lost.into_iter().map(|((device, key), lost)| Op::DropAllowedIps { device, key, lost }));
    for (device, key) in actual.peers.keys() {
        let stale = !desired.peers.contains_key(&(*device, *key));
        if stale && desired.wireguard.contains_key(device) {
            ops.push(Op::RemovePeer { device: *device, key: *key });
        }
    }
}

/// What permits all that either permits.
fn union(wanted: Option<&Nft>, b: Option<&Nft>) -> Option<Nft> {
    match (wanted, b) {
        (Some(wanted), Some(b)) => Some(Nft {
            keep_source: &wanted.keep_source | &b.keep_source,
            nodes: &wanted.nodes | &b.nodes,
            native: &wanted.native | &b.native,
            ..wanted.clone()
        }),
        (one, other) => one.or(other).cloned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        model::{any_desired, any_state, apply},
        state::{Attachment, Program},
    };
    use proptest::prelude::*;

    /// Every state from `actual` on, one after each operation.
    fn steps(ops: &[Op], actual: &State) -> Vec<State> {
        let mut states = vec![actual.clone()];
        for op in ops {
            let mut next = states[states.len() - 1].clone();
            apply(&mut next, op).unwrap_or_else(|| panic!("{op}: the kernel refuses"));
            states.push(next);
        }
        states
    }

    /// What is wanted, with the endpoints that a plan leaves alone taken from what is.
    fn with_endpoints(desired: &State, actual: &State) -> State {
        let mut desired = desired.clone();
        for (pair, peer) in &mut desired.peers {
            peer.endpoint = peer.endpoint.or(actual.peers.get(pair).and_then(|peer| peer.endpoint));
        }
        desired
    }

    /// Whether the link has all of these programs.
    fn attached(state: &State, link: Interface, programs: &[Program]) -> bool {
        let at = |program: &Program| Attachment { program: *program, link: link.to_string() };
        programs.iter().all(|program| state.programs.contains(&at(program)))
    }

    fn is_up(state: &State, interface: Interface) -> bool {
        state.links.get(&interface).is_some_and(|link| link.up)
    }

    /// Nothing comes or goes through the device that its programs do not see.
    fn guarded(state: &State, device: Device) -> bool {
        let link = Interface::WireGuard(device);
        let open = is_up(state, link) || state.peers.keys().any(|(of, _)| *of == device);
        !open || attached(state, link, &[Program::FromPeer, Program::ToPeer])
    }

    /// The same of the hop.
    fn hop_guarded(state: &State) -> bool {
        !is_up(state, Interface::Hop) || attached(state, Interface::Hop, &[Program::FromHop])
    }

    /// Whether what is routed to the hop is steered.
    fn steered(state: &State) -> bool {
        let routed = state.routes.values().any(|route| matches!(route, Route::Hop { .. }));
        let programs = [Program::Steer, Program::FromHop];
        !routed || (is_up(state, Interface::Hop) && attached(state, Interface::Hop, &programs))
    }

    /// Whether the programs know the prefix, if any peer holds it.
    fn known(state: &State, prefix: &IpNetwork) -> bool {
        let held = state.allowed_ips.keys().any(|(_, held)| held == prefix);
        !held || state.maps.as_ref().is_some_and(|maps| maps.remote.contains_key(prefix))
    }

    fn maps(state: &State) -> Maps {
        state.maps.clone().unwrap_or_default()
    }

    /// Whether `all` has every entry of `some`, of an own prefix at least the members.
    fn covers(all: &Maps, some: &Maps) -> bool {
        let members = |prefix: &IpNetwork| all.own.get(prefix).cloned();
        some.remote.keys().all(|key| all.remote.contains_key(key))
            && some.homes.keys().all(|key| all.homes.contains_key(key))
            && some.nodes.keys().all(|key| all.nodes.contains_key(key))
            && some.own.iter().all(|(prefix, some)| members(prefix).is_some_and(|all| some.is_subset(&all)))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2_000))]

        #[test]
        fn converges(desired in any_desired(), actual in any_state()) {
            let after = steps(&diff(&desired, &actual), &actual).pop().expect("at least the first state");
            prop_assert_eq!(&after, &with_endpoints(&desired, &actual));
            prop_assert_eq!(diff(&desired, &after), vec![]);
        }

        #[test]
        fn makes_before_it_breaks(desired in any_desired(), actual in any_state()) {
            prop_assert!(diff(&desired, &actual).is_sorted_by_key(Op::is_break));
        }

        #[test]
        fn a_kept_route_never_loses_its_peer(desired in any_desired(), actual in any_state()) {
            let kept_hop = desired.hop == actual.hop;
            for state in steps(&diff(&desired, &actual), &actual) {
                for place in actual.routes.keys().filter(|place| desired.routes.contains_key(place)) {
                    // What somebody has made of the hop goes with its routes; they come back before anything is broken.
                    let lost = !kept_hop && matches!(actual.routes[place], Route::Hop { .. });
                    prop_assert!(lost || state.routes.contains_key(place), "{place:?} in {state:#?}");
                }
                for held in actual.allowed_ips.keys().filter(|held| desired.allowed_ips.contains_key(held)) {
                    prop_assert!(state.allowed_ips.contains_key(held), "{held:?} has no peer in {state:#?}");
                }
            }
        }

        #[test]
        fn a_route_has_its_twin_for_as_long_as_both_states_have(desired in any_desired(), actual in any_state()) {
            let closed = |state: &State, to: &IpNetwork| {
                state.routes.get(&(Table::Closed, *to)).is_some_and(|twin| !matches!(twin, Route::Hop { .. }))
            };
            let open = |state: &State, to: &IpNetwork| {
                matches!(state.routes.get(&(Table::Remote, *to)), Some(Route::Hop { .. } | Route::Other))
            };
            let law = |state: &State, to: &IpNetwork| !open(state, to) || closed(state, to);
            for state in steps(&diff(&desired, &actual), &actual) {
                for (_, to) in desired.routes.keys().chain(actual.routes.keys()) {
                    if law(&actual, to) && law(&desired, to) {
                        prop_assert!(law(&state, to), "{to} is open in {state:#?}");
                    }
                }
            }
        }

        #[test]
        fn no_peer_ever_stands_without_its_programs(desired in any_desired(), actual in any_state()) {
            for state in steps(&diff(&desired, &actual), &actual) {
                for device in Device::all() {
                    if guarded(&actual, device) && guarded(&desired, device) {
                        prop_assert!(guarded(&state, device), "{device} in {state:#?}");
                    }
                }
                prop_assert!(!hop_guarded(&actual) || !hop_guarded(&desired) || hop_guarded(&state), "{state:#?}");
            }
        }

        #[test]
        fn nothing_is_routed_to_a_hop_that_does_not_steer(desired in any_desired(), actual in any_state()) {
            for state in steps(&diff(&desired, &actual), &actual) {
                prop_assert!(!steered(&actual) || !steered(&desired) || steered(&state), "{state:#?}");
            }
        }

        #[test]
        fn a_prefix_that_a_peer_holds_is_known_to_the_programs(desired in any_desired(), actual in any_state()) {
            for state in steps(&diff(&desired, &actual), &actual) {
                for (_, prefix) in desired.allowed_ips.keys().chain(actual.allowed_ips.keys()) {
                    if known(&actual, prefix) && known(&desired, prefix) {
                        prop_assert!(known(&state, prefix), "{prefix} in {state:#?}");
                    }
                }
            }
        }

        #[test]
        fn whoever_is_let_in_finds_the_maps_filled(desired in any_desired(), actual in any_state()) {
            let ops = diff(&desired, &actual);
            let states = steps(&ops, &actual);
            for (op, state) in ops.iter().zip(&states[1..]) {
                let lets_in = matches!(op, Op::SetPeer { .. } | Op::Attach(_) | Op::SetLink { .. })
                    || matches!(op, Op::SetRoute { route: Route::Hop { .. }, .. });
                if lets_in {
                    let (there, wanted) = (maps(state), maps(&desired));
                    prop_assert!(covers(&there, &wanted), "after {op}: {state:#?}");
                    prop_assert!(wanted.remote.iter().all(|(to, remote)| there.remote[to] == *remote), "after {op}");
                    prop_assert!(wanted.homes.iter().all(|(to, home)| there.homes[to] == *home), "after {op}");
                    prop_assert!(wanted.nodes.iter().all(|(at, node)| there.nodes[at] == *node), "after {op}");
                    prop_assert!(wanted.config.is_none() || there.config == wanted.config, "after {op}");
                }
            }
        }

        #[test]
        fn what_both_states_have_in_the_maps_stays_there(desired in any_desired(), actual in any_state()) {
            let (desired_maps, mut kept) = (maps(&desired), maps(&actual));
            kept.remote.retain(|key, _| desired_maps.remote.contains_key(key));
            kept.homes.retain(|key, _| desired_maps.homes.contains_key(key));
            kept.nodes.retain(|key, _| desired_maps.nodes.contains_key(key));
            kept.own.retain(|key, _| desired_maps.own.contains_key(key));
            kept.own.iter_mut().for_each(|(key, members)| members.retain(|one| desired_maps.own[key].contains(one)));
            for state in steps(&diff(&desired, &actual), &actual) {
                prop_assert!(covers(&maps(&state), &kept), "{state:#?}");
            }
        }

        #[test]
        fn a_program_stays_where_both_states_have_it(desired in any_desired(), actual in any_state()) {
            let kept_hop = desired.hop == actual.hop;
            for state in steps(&diff(&desired, &actual), &actual) {
                for at in actual.programs.intersection(&desired.programs).filter(|at| kept_hop || at.link != HOP) {
                    prop_assert!(state.programs.contains(at), "{at} in {state:#?}");
                }
            }
        }

        #[test]
        fn no_range_is_routed_before_what_is_carved_out_of_it(desired in any_desired(), actual in any_state()) {
            let ops = diff(&desired, &actual);
            let is_throw = |op: &Op| matches!(op, Op::SetRoute { route: Route::Throw, .. });
            prop_assert!(ops.is_sorted_by_key(|op| !is_throw(op)));
        }

        #[test]
        fn no_range_is_steered_without_what_is_carved_out_of_it(desired in any_desired(), actual in any_state()) {
            let carved = |state: &State, to: &IpNetwork| maps(state).remote.get(to).is_some_and(is_carved);
            let both = |to: &IpNetwork| carved(&desired, to) && carved(&actual, to);
            let ops = diff(&desired, &actual);
            let set = ops.iter().filter_map(|op| if let Op::SetEntry(Entry::Remote(_, r)) = op { Some(r) } else { None });
            prop_assert!(set.is_sorted_by_key(|remote| !is_carved(remote)));
            let gone = ops.iter().filter_map(|op| if let Op::DelEntry(Key::Remote(to)) = op { Some(to) } else { None });
            prop_assert!(gone.is_sorted_by_key(|to| carved(&actual, to)));
            let before = maps(&actual).remote;
            for state in steps(&ops, &actual) {
                prop_assert!(before.keys().filter(|to| both(to)).all(|to| carved(&state, to)));
            }
        }

        #[test]
        fn makes_alone_take_nothing_away(desired in any_desired(), actual in any_state()) {
            let makes: Vec<Op> = diff(&desired, &actual).into_iter().filter(|op| !op.is_break()).collect();
            let after = steps(&makes, &actual).pop().expect("at least the first state");
            prop_assert!(actual.peers.keys().all(|pair| after.peers.contains_key(pair)));
            prop_assert!(actual.allowed_ips.keys().all(|prefix| after.allowed_ips.contains_key(prefix)));
            prop_assert!(actual.links.keys().all(|link| after.links.contains_key(link)));
            prop_assert!(actual.rules.keys().all(|rule| after.rules.contains_key(rule)));
            prop_assert!(actual.overlay.is_subset(&after.overlay));
            prop_assert!(covers(&maps(&after), &maps(&actual)));
            let nft = |state: &State| state.nft.clone().unwrap_or_default();
            prop_assert!(nft(&actual).nodes.is_subset(&nft(&after).nodes));
            prop_assert!(nft(&actual).native.is_subset(&nft(&after).native));
            prop_assert!(nft(&actual).keep_source.is_subset(&nft(&after).keep_source));
            let left = renewed_hop(&desired, &actual).map_or(actual, |(_, left)| left);
            prop_assert!(left.routes.keys().all(|route| after.routes.contains_key(route)));
            prop_assert!(left.programs.is_subset(&after.programs));
            prop_assert!(left.maps.and_then(|maps| maps.config).is_none() || maps(&after).config.is_some());
        }

        #[test]
        fn the_empty_state_is_reached_from_anywhere(actual in any_state()) {
            let nothing = State::default();
            let ops = diff(&nothing, &actual);
            prop_assert!(ops.iter().all(Op::is_break));
            prop_assert_eq!(steps(&ops, &actual).pop(), Some(nothing));
        }
    }
}
