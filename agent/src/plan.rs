//! The whole state that a node should have, from what the folder says and what the node knows.
//!
//! Pure and total: no I/O, no clock, no order of arrival; what cannot be planned is left out and said. Every plan is
//! closed in itself: a route has a peer that holds its prefix, a peer has its device and the nft table, and every range
//! that is offered to this member has its `unreachable` twin.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use ipnetwork::IpNetwork;

use crate::{
    facts::Facts,
    intent::{Gateway, Host, Intent, Kind, Member, Reason, Rejection},
    keys::PublicKey,
    names::{Device, Interface, MemberName, Table},
    state::{Family, Link, Nft, Peer, Route, Rule, State, WireGuard},
};

/// Seconds between keepalives where one side has no endpoint and the folder is silent: below every usual NAT time-out.
const NAT_KEEPALIVE: u16 = 25;

/// What WireGuard adds to a packet over IPv6: 40 IPv6 + 8 UDP + 32 WireGuard, in bytes.
const OVERHEAD: u32 = 80;

/// The kernel takes IPv6 from a device below this (RFC 8200 §5), in bytes.
const MIN_MTU: u32 = 1280;

/// Plans this node. A node whose key the folder does not name has no peers; what the others claim is closed all the same.
pub fn plan(intent: &Intent, facts: &Facts) -> (State, Vec<Rejection>) {
    let mut state = State::default();
    let mut rejected = Vec::new();
    close_ranges(&mut state, intent);
    match myself(intent, facts) {
        Ok(me) => join(&mut state, intent, facts, me, &mut rejected),
        Err(rejection) => rejected.push(rejection),
    }
    if !state.routes.is_empty() {
        carve_out_endpoints(&mut state, intent, facts);
        state.rules =
            Family::ALL.into_iter().flat_map(|family| Table::ALL.map(|table| Rule { family, table })).collect();
    }
    if !facts.ipv6 {
        // The kernel would refuse them at every pass, and a failed make cancels every break.
        state.routes.retain(|(_, to), _| to.is_ipv4());
        state.rules.retain(|rule| rule.family == Family::V4);
    }
    (state, rejected)
}

/// A range that is offered to this member never leaves in the clear, whether there is a way to it or not.
fn close_ranges(state: &mut State, intent: &Intent) {
    let ranges = intent.others().flat_map(|(_, member)| member.offered_to(&intent.me));
    state.routes.extend(ranges.map(|range| ((Table::Closed, range), Route::Unreachable)));
}

/// Peers with what they carry, the devices that they need, the ways to them, and what may pass.
fn join(state: &mut State, intent: &Intent, facts: &Facts, me: Myself<'_>, rejected: &mut Vec<Rejection>) {
    let mut left_out = BTreeSet::new();
    for (name, member) in intent.others() {
        if facts.psks.get(name) == Some(&None) {
            rejected.push(unreadable_psk(name));
            left_out.insert(name);
        } else {
            add_peers(state, intent, facts, me, (name, member));
        }
    }
    for device in state.peers.keys().map(|(device, _)| *device).collect::<BTreeSet<_>>() {
        let port = facts.base_port + u16::from(device.0.get());
        state.wireguard.insert(device, WireGuard { key: me.gateway.key, port });
        state.links.insert(Interface::WireGuard(device), Link::ours(device_mtu(facts.underlay_mtu)));
    }
    for (name, member) in intent.others() {
        open_ranges(state, intent, facts, me, (name, member));
    }
    if !state.peers.is_empty() {
        state.nft = Some(packet_rules(intent, me, |member| left_out.contains(member)));
    }
}

/// This cluster's own entry, and the slot of it that this node holds.
#[derive(Clone, Copy)]
struct Myself<'a> {
    member: &'a Member,
    gateway: &'a Gateway,
}

fn myself<'a>(intent: &'a Intent, facts: &Facts) -> Result<Myself<'a>, Rejection> {
    let refuse = |field: String, message: String| Rejection {
        kind: Kind::MeshCluster,
        name: intent.me.to_string(),
        field,
        reason: Reason::NotInMesh,
        message,
    };
    let member = intent.members.get(&intent.me).ok_or_else(|| {
        refuse(
            "metadata.name".into(),
            format!("no accepted MeshCluster is called {}: add one, or mend --cluster-name", intent.me),
        )
    })?;
    let slot = facts.slot;
    let gateway = member.gateways.get(&slot).ok_or_else(|| {
        let keys: Vec<String> = facts.slot_keys.iter().map(ToString::to_string).collect();
        let message =
            format!("the folder names no gateway with ordinal {slot}: add it with publicKey {}", keys.join(" or "));
        refuse("spec.gateways".into(), message)
    })?;
    if facts.slot_keys.contains(&gateway.key) {
        Ok(Myself { member, gateway })
    } else {
        let message = format!(
            "{} is not the key of this node's slot {slot}: put the public key that `carrick keys show` prints here, or the private key that belongs to this one into the keys folder",
            gateway.key
        );
        Err(refuse(format!("spec.gateways[ordinal={slot}].publicKey"), message))
    }
}

fn unreadable_psk(member: &MemberName) -> Rejection {
    Rejection {
        kind: Kind::MeshCluster,
        name: member.to_string(),
        field: "metadata.name".into(),
        reason: Reason::PresharedKeyUnreadable,
        message: format!(
            "the file psk-{member} cannot be used, and without it the pair would be less safe than you asked for: mend or remove it"
        ),
    }
}

/// A member's gateway j is a peer of device j, and holds all that the member offers us.
fn add_peers(
    state: &mut State,
    intent: &Intent,
    facts: &Facts,
    me: Myself<'_>,
    (name, member): (&MemberName, &Member),
) {
    for (ordinal, gateway) in &member.gateways {
        let device = Device(*ordinal);
        let pair = (device, gateway.key);
        let nat = gateway.endpoints.is_empty() || me.gateway.endpoints.is_empty();
        let peer = Peer {
            endpoint: facts.dial.get(&pair).copied(),
            keepalive: me.member.keepalive.unwrap_or(if nat { NAT_KEEPALIVE } else { 0 }),
            psk: facts.psks.get(name).copied().flatten(),
        };
        state.peers.insert(pair, peer);
        for prefix in member.offered_to(&intent.me) {
            state.allowed_ips.insert((device, prefix), gateway.key);
        }
    }
}

/// Each prefix leaves by the device of the member's lowest ordinal, the only one that a plain route can name.
fn open_ranges(
    state: &mut State,
    intent: &Intent,
    facts: &Facts,
    me: Myself<'_>,
    (name, member): (&MemberName, &Member),
) {
    let sources = Family::ALL.map(|family| (family, own_source(me.member, name, family, &facts.addresses)));
    for prefix in member.offered_to(&intent.me) {
        if Device::all().any(|device| state.allowed_ips.contains_key(&(device, prefix))) {
            let source =
                sources.iter().find(|(family, _)| *family == Family::of(&prefix)).and_then(|(_, source)| *source);
            state.routes.insert((Table::Remote, prefix), Route::Hop { mtu: None, source });
        }
    }
}

/// The address from which this node itself can talk to that member: one inside a range that is offered to it.
fn own_source(me: &Member, to: &MemberName, family: Family, addresses: &BTreeSet<IpAddr>) -> Option<IpAddr> {
    let ranges: Vec<IpNetwork> = me.offered_to(to).filter(|range| Family::of(range) == family).collect();
    addresses.iter().copied().find(|address| ranges.iter().any(|range| range.contains(*address)))
}

/// An endpoint inside a remote range must not be sent into the tunnel that it carries. In both tables, or a forwarded
/// packet would meet the twin. Where a peer has roamed to is not carved out: it must not choose what goes in the clear.
fn carve_out_endpoints(state: &mut State, intent: &Intent, facts: &Facts) {
    let gateways = intent.members.values().flat_map(|member| member.gateways.values());
    let hosts = gateways.flat_map(|gateway| gateway.endpoints.iter().map(|endpoint| &endpoint.host));
    let named: BTreeSet<IpAddr> = hosts.flat_map(|host| addresses_of(host, &facts.resolved)).collect();
    let ranges: BTreeSet<IpNetwork> = state.routes.keys().map(|(_, range)| *range).collect();
    let lengths: BTreeSet<u8> = ranges.iter().map(IpNetwork::prefix).collect();
    let inside = |address: &IpAddr| {
        let around = lengths.iter().filter_map(|length| IpNetwork::new(*address, *length).ok());
        around
            .filter_map(|range| IpNetwork::new(range.network(), range.prefix()).ok())
            .any(|range| ranges.contains(&range))
    };
    for address in named.union(&facts.carved).filter(|address| inside(address)) {
        for table in Table::ALL {
            state.routes.insert((table, IpNetwork::from(*address)), Route::Throw);
        }
    }
}

/// What an endpoint's host stands for: itself, or what its name has resolved to.
pub fn addresses_of(host: &Host, resolved: &BTreeMap<String, Vec<IpAddr>>) -> Vec<IpAddr> {
    match host {
        Host::Ip(address) => vec![*address],
        Host::Name(name) => resolved.get(name).into_iter().flatten().copied().collect(),
    }
}

/// Packets pass between two prefixes only if each side offers its own to the other. The pairs never overlap: members
/// hold disjoint prefixes, and of a member's nested ones the widest stands for all.
fn packet_rules(intent: &Intent, me: Myself<'_>, left_out: impl Fn(&MemberName) -> bool) -> Nft {
    let mut nft = Nft::default();
    for (name, member) in intent.others().filter(|(name, _)| !left_out(name)) {
        let own = widest(me.member.offered_to(name));
        for remote in widest(member.offered_to(&intent.me)) {
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

/// Bytes: what the underlay carries less WireGuard's overhead, within what a device can have.
fn device_mtu(underlay: u32) -> u32 {
    underlay.saturating_sub(OVERHEAD).clamp(MIN_MTU, MAX_MTU)
}

/// Bytes: larger devices have not been tried.
const MAX_MTU: u32 = 3_900;

/// Which member's gateway a pair is.
pub fn member_of<'a>(intent: &'a Intent, device: Device, key: &PublicKey) -> Option<&'a MemberName> {
    let holds = |member: &Member| member.gateways.get(&device.0).is_some_and(|gateway| gateway.key == *key);
    intent.members.iter().find(|(_, member)| holds(member)).map(|(name, _)| name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        diff::diff,
        intent::{Endpoint, Offer, Route as Claim},
        keys::PskId,
        model::key,
        names::{MemberId, Ordinal},
    };
    use expect_test::{Expect, expect};
    use proptest::{collection, prelude::*};

    /// A mesh in short: a line per member, `name id [gwN[@host:port]]... [prefix[>member,...]]...`; the n-th line's
    /// gateway o has the key 10 n + o. The first member is this node's.
    fn intent(text: &str) -> Intent {
        let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
        let members: Vec<(MemberName, Member)> =
            lines.enumerate().map(|(n, line)| member(u8::try_from(n).expect("few"), line)).collect();
        Intent { me: members[0].0.clone(), members: members.into_iter().collect() }
    }

    fn member(n: u8, line: &str) -> (MemberName, Member) {
        let mut words = line.split_whitespace();
        let mut next = || words.next().expect("a member has a name and an id");
        let (name, id) = (next().parse().expect("a label"), next().parse().expect("a number"));
        let mut member = Member {
            id: MemberId::new(id).expect("in range"),
            gateways: BTreeMap::new(),
            keepalive: None,
            routes: BTreeMap::new(),
        };
        for word in words {
            if let Some(gateway) = word.strip_prefix("gw") {
                let (ordinal, endpoint) = gateway.split_once('@').unwrap_or((gateway, ""));
                let ordinal: u8 = ordinal.parse().expect("an ordinal");
                let endpoints = endpoint.split_once(':').map(|(host, port)| Endpoint {
                    host: host.parse().map_or_else(|_| Host::Name(host.into()), Host::Ip),
                    port: port.parse().expect("a port"),
                });
                let gateway = Gateway { key: key(10 * n + ordinal), endpoints: endpoints.into_iter().collect() };
                member.gateways.insert(Ordinal::new(ordinal.into()).expect("in range"), gateway);
            } else {
                let (prefix, to) = word.split_once('>').map_or((word, None), |(prefix, to)| (prefix, Some(to)));
                let offered = to.map_or(Offer::All, |to| {
                    Offer::To(to.split(',').map(|name| name.parse().expect("a label")).collect())
                });
                member.routes.insert(prefix.parse().expect("a prefix"), Claim { offered });
            }
        }
        (name, member)
    }

    fn facts() -> Facts {
        Facts {
            slot: Ordinal::ZERO,
            slot_keys: [key(0)].into(),
            psks: BTreeMap::new(),
            resolved: [("gw.example.com".into(), vec!["10.44.9.9".parse().expect("an address")])].into(),
            dial: BTreeMap::new(),
            carved: BTreeSet::new(),
            underlay_mtu: 1500,
            ipv6: true,
            addresses: ["10.42.0.1".parse().expect("an address"), "192.0.2.1".parse().expect("an address")].into(),
            base_port: 27473,
        }
    }

    /// The whole plan as the commands that would make it from nothing, keys by their number.
    fn check(mesh: &str, facts: &Facts, expected: Expect) {
        let (state, rejected) = plan(&intent(mesh), facts);
        let mut told: String = diff(&state, &State::default()).iter().map(|op| format!("{op}\n")).collect();
        told.extend(rejected.iter().map(|rejection| format!("{rejection}\n")));
        for n in 0..100 {
            told = told.replace(&key(n).to_string(), &format!("K{n}"));
        }
        expected.assert_eq(&told);
    }

    const TWO: &str = "
        mn 1 gw0@203.0.113.1:27473 10.42.0.0/16
        va 2 gw0 10.44.0.0/16
    ";

    #[test]
    fn two_members() {
        check(
            TWO,
            &facts(),
            expect![[r#"
                nft replace table inet carrick keep_source { 10.42.0.0/16 . 10.44.0.0/16, 10.44.0.0/16 . 10.42.0.0/16 } admit { 10.44.0.0/16 . 10.42.0.0/16 }
                wg set carrick-wg0 listen-port 27473 private-key <of K0>
                ip link set carrick-wg0 mtu 1420 addrgenmode none up
                wg set carrick-wg0 peer K10 persistent-keepalive 25 allowed-ips +10.44.0.0/16
                ip -4 rule add priority 11 lookup 7473
                ip -4 rule add priority 12 not iif lo lookup 7474
                ip -6 rule add priority 11 lookup 7473
                ip -6 rule add priority 12 not iif lo lookup 7474
                ip route replace unreachable 10.44.0.0/16 table 7474
                ip route replace 10.44.0.0/16 dev carrick-wg0 src 10.42.0.1 table 7473
            "#]],
        );
    }

    #[test]
    fn a_device_for_each_remote_ordinal_and_both_families() {
        let mesh = "
            mn 1 gw0@203.0.113.1:27473 10.42.0.0/16 fd00:42::/48
            va 2 gw0@198.51.100.1:27473 gw1@198.51.100.2:27473 10.44.0.0/16 fd00:44::/48
            ge 3 gw1@198.51.100.3:27473 10.45.0.0/16
        ";
        check(
            mesh,
            &facts(),
            expect![[r#"
                nft replace table inet carrick keep_source { 10.42.0.0/16 . 10.44.0.0/16, 10.42.0.0/16 . 10.45.0.0/16, 10.44.0.0/16 . 10.42.0.0/16, 10.45.0.0/16 . 10.42.0.0/16, fd00:42::/48 . fd00:44::/48, fd00:44::/48 . fd00:42::/48 } admit { 10.44.0.0/16 . 10.42.0.0/16, 10.45.0.0/16 . 10.42.0.0/16, fd00:44::/48 . fd00:42::/48 }
                wg set carrick-wg0 listen-port 27473 private-key <of K0>
                wg set carrick-wg1 listen-port 27474 private-key <of K0>
                ip link set carrick-wg0 mtu 1420 addrgenmode none up
                ip link set carrick-wg1 mtu 1420 addrgenmode none up
                wg set carrick-wg0 peer K10 allowed-ips +10.44.0.0/16,+fd00:44::/48
                wg set carrick-wg1 peer K21 allowed-ips +10.45.0.0/16
                wg set carrick-wg1 peer K11 allowed-ips +10.44.0.0/16,+fd00:44::/48
                ip -4 rule add priority 11 lookup 7473
                ip -4 rule add priority 12 not iif lo lookup 7474
                ip -6 rule add priority 11 lookup 7473
                ip -6 rule add priority 12 not iif lo lookup 7474
                ip route replace unreachable 10.44.0.0/16 table 7474
                ip route replace unreachable 10.45.0.0/16 table 7474
                ip route replace unreachable fd00:44::/48 table 7474
                ip route replace 10.44.0.0/16 dev carrick-wg0 src 10.42.0.1 table 7473
                ip route replace 10.45.0.0/16 dev carrick-wg1 src 10.42.0.1 table 7473
                ip route replace fd00:44::/48 dev carrick-wg0 table 7473
            "#]],
        );
    }

    #[test]
    fn only_what_is_offered_here_is_routed_and_only_what_is_offered_there_is_admitted() {
        let mesh = "
            mn 1 gw0@203.0.113.1:27473 10.42.0.0/16>va 10.43.0.0/16
            va 2 gw0@198.51.100.1:27473 10.44.0.0/16>ge 10.46.0.0/16>mn
            ge 3 gw0@198.51.100.3:27473 10.45.0.0/16
        ";
        check(
            mesh,
            &facts(),
            expect![[r#"
                nft replace table inet carrick keep_source { 10.42.0.0/16 . 10.46.0.0/16, 10.43.0.0/16 . 10.45.0.0/16, 10.43.0.0/16 . 10.46.0.0/16, 10.45.0.0/16 . 10.43.0.0/16, 10.46.0.0/16 . 10.42.0.0/16, 10.46.0.0/16 . 10.43.0.0/16 } admit { 10.45.0.0/16 . 10.43.0.0/16, 10.46.0.0/16 . 10.42.0.0/16, 10.46.0.0/16 . 10.43.0.0/16 }
                wg set carrick-wg0 listen-port 27473 private-key <of K0>
                ip link set carrick-wg0 mtu 1420 addrgenmode none up
                wg set carrick-wg0 peer K10 allowed-ips +10.46.0.0/16
                wg set carrick-wg0 peer K20 allowed-ips +10.45.0.0/16
                ip -4 rule add priority 11 lookup 7473
                ip -4 rule add priority 12 not iif lo lookup 7474
                ip -6 rule add priority 11 lookup 7473
                ip -6 rule add priority 12 not iif lo lookup 7474
                ip route replace unreachable 10.45.0.0/16 table 7474
                ip route replace unreachable 10.46.0.0/16 table 7474
                ip route replace 10.45.0.0/16 dev carrick-wg0 table 7473
                ip route replace 10.46.0.0/16 dev carrick-wg0 src 10.42.0.1 table 7473
            "#]],
        );
    }

    #[test]
    fn a_node_without_ipv6_has_no_ipv6_routes() {
        let mesh = "
            mn 1 gw0@203.0.113.1:27473 10.42.0.0/16 fd00:42::/48
            va 2 gw0@198.51.100.1:27473 10.44.0.0/16 fd00:44::/48
        ";
        check(
            mesh,
            &Facts { ipv6: false, ..facts() },
            expect![[r#"
                nft replace table inet carrick keep_source { 10.42.0.0/16 . 10.44.0.0/16, 10.44.0.0/16 . 10.42.0.0/16, fd00:42::/48 . fd00:44::/48, fd00:44::/48 . fd00:42::/48 } admit { 10.44.0.0/16 . 10.42.0.0/16, fd00:44::/48 . fd00:42::/48 }
                wg set carrick-wg0 listen-port 27473 private-key <of K0>
                ip link set carrick-wg0 mtu 1420 addrgenmode none up
                wg set carrick-wg0 peer K10 allowed-ips +10.44.0.0/16,+fd00:44::/48
                ip -4 rule add priority 11 lookup 7473
                ip -4 rule add priority 12 not iif lo lookup 7474
                ip route replace unreachable 10.44.0.0/16 table 7474
                ip route replace 10.44.0.0/16 dev carrick-wg0 src 10.42.0.1 table 7473
            "#]],
        );
    }

    #[test]
    fn nested_prefixes_of_a_member_are_routed_each_and_permitted_once() {
        let mesh = "
            mn 1 gw0@203.0.113.1:27473 10.42.0.0/16 10.42.8.0/24
            va 2 gw0@198.51.100.1:27473 10.44.0.0/16 10.44.0.0/24 10.44.8.0/24
        ";
        check(
            mesh,
            &facts(),
            expect![[r#"
                nft replace table inet carrick keep_source { 10.42.0.0/16 . 10.44.0.0/16, 10.44.0.0/16 . 10.42.0.0/16 } admit { 10.44.0.0/16 . 10.42.0.0/16 }
                wg set carrick-wg0 listen-port 27473 private-key <of K0>
                ip link set carrick-wg0 mtu 1420 addrgenmode none up
                wg set carrick-wg0 peer K10 allowed-ips +10.44.0.0/16,+10.44.0.0/24,+10.44.8.0/24
                ip -4 rule add priority 11 lookup 7473
                ip -4 rule add priority 12 not iif lo lookup 7474
                ip -6 rule add priority 11 lookup 7473
                ip -6 rule add priority 12 not iif lo lookup 7474
                ip route replace unreachable 10.44.0.0/16 table 7474
                ip route replace unreachable 10.44.0.0/24 table 7474
                ip route replace unreachable 10.44.8.0/24 table 7474
                ip route replace 10.44.0.0/16 dev carrick-wg0 src 10.42.0.1 table 7473
                ip route replace 10.44.0.0/24 dev carrick-wg0 src 10.42.0.1 table 7473
                ip route replace 10.44.8.0/24 dev carrick-wg0 src 10.42.0.1 table 7473
            "#]],
        );
    }

    #[test]
    fn an_endpoint_inside_a_remote_range_is_carved_out() {
        let mesh = "
            mn 1 gw0 10.42.0.0/16
            va 2 gw0@gw.example.com:27473 10.44.0.0/16
            ge 3 gw0@10.44.7.7:27473 10.45.0.0/16
        ";
        check(
            mesh,
            &facts(),
            expect![[r#"
                ip route replace throw 10.44.7.7/32 table 7474
                ip route replace throw 10.44.9.9/32 table 7474
                ip route replace throw 10.44.7.7/32 table 7473
                ip route replace throw 10.44.9.9/32 table 7473
                nft replace table inet carrick keep_source { 10.42.0.0/16 . 10.44.0.0/16, 10.42.0.0/16 . 10.45.0.0/16, 10.44.0.0/16 . 10.42.0.0/16, 10.45.0.0/16 . 10.42.0.0/16 } admit { 10.44.0.0/16 . 10.42.0.0/16, 10.45.0.0/16 . 10.42.0.0/16 }
                wg set carrick-wg0 listen-port 27473 private-key <of K0>
                ip link set carrick-wg0 mtu 1420 addrgenmode none up
                wg set carrick-wg0 peer K10 persistent-keepalive 25 allowed-ips +10.44.0.0/16
                wg set carrick-wg0 peer K20 persistent-keepalive 25 allowed-ips +10.45.0.0/16
                ip -4 rule add priority 11 lookup 7473
                ip -4 rule add priority 12 not iif lo lookup 7474
                ip -6 rule add priority 11 lookup 7473
                ip -6 rule add priority 12 not iif lo lookup 7474
                ip route replace unreachable 10.44.0.0/16 table 7474
                ip route replace unreachable 10.45.0.0/16 table 7474
                ip route replace 10.44.0.0/16 dev carrick-wg0 src 10.42.0.1 table 7473
                ip route replace 10.45.0.0/16 dev carrick-wg0 src 10.42.0.1 table 7473
            "#]],
        );
    }

    #[test]
    fn a_preshared_key_that_cannot_be_used_leaves_its_member_out() {
        let psks = [("va", None), ("ge", Some(PskId::from_bytes([7; 8])))];
        let psks = psks.map(|(name, psk)| (name.parse().expect("a label"), psk));
        let mesh = "
            mn 1 gw0@203.0.113.1:27473 10.42.0.0/16
            va 2 gw0@198.51.100.1:27473 10.44.0.0/16
            ge 3 gw0@198.51.100.3:27473 10.45.0.0/16
        ";
        check(
            mesh,
            &Facts { psks: psks.into(), ..facts() },
            expect![[r#"
                nft replace table inet carrick keep_source { 10.42.0.0/16 . 10.45.0.0/16, 10.45.0.0/16 . 10.42.0.0/16 } admit { 10.45.0.0/16 . 10.42.0.0/16 }
                wg set carrick-wg0 listen-port 27473 private-key <of K0>
                ip link set carrick-wg0 mtu 1420 addrgenmode none up
                wg set carrick-wg0 peer K20 preshared-key <0707070707070707> allowed-ips +10.45.0.0/16
                ip -4 rule add priority 11 lookup 7473
                ip -4 rule add priority 12 not iif lo lookup 7474
                ip -6 rule add priority 11 lookup 7473
                ip -6 rule add priority 12 not iif lo lookup 7474
                ip route replace unreachable 10.44.0.0/16 table 7474
                ip route replace unreachable 10.45.0.0/16 table 7474
                ip route replace 10.45.0.0/16 dev carrick-wg0 src 10.42.0.1 table 7473
                MeshCluster/va metadata.name: PresharedKeyUnreadable: the file psk-va cannot be used, and without it the pair would be less safe than you asked for: mend or remove it
            "#]],
        );
    }

    #[test]
    fn a_node_that_the_folder_does_not_name_closes_what_the_others_claim() {
        check(
            TWO,
            &Facts { slot_keys: [key(77)].into(), ..facts() },
            expect![[r#"
                ip -4 rule add priority 11 lookup 7473
                ip -4 rule add priority 12 not iif lo lookup 7474
                ip -6 rule add priority 11 lookup 7473
                ip -6 rule add priority 12 not iif lo lookup 7474
                ip route replace unreachable 10.44.0.0/16 table 7474
                MeshCluster/mn spec.gateways[ordinal=0].publicKey: NotInMesh: K0 is not the key of this node's slot 0: put the public key that `carrick keys show` prints here, or the private key that belongs to this one into the keys folder
            "#]],
        );
        check(
            TWO,
            &Facts { slot: Ordinal::new(3).expect("in range"), ..facts() },
            expect![[r#"
                ip -4 rule add priority 11 lookup 7473
                ip -4 rule add priority 12 not iif lo lookup 7474
                ip -6 rule add priority 11 lookup 7473
                ip -6 rule add priority 12 not iif lo lookup 7474
                ip route replace unreachable 10.44.0.0/16 table 7474
                MeshCluster/mn spec.gateways: NotInMesh: the folder names no gateway with ordinal 3: add it with publicKey K0
            "#]],
        );
        let mut nobody = intent(TWO);
        nobody.me = "xx".parse().expect("a label");
        let (state, rejected) = plan(&nobody, &facts());
        assert_eq!(state.peers, BTreeMap::new());
        assert!(state.routes.values().all(|route| *route == Route::Unreachable) && state.routes.len() == 2);
        expect!["MeshCluster/xx metadata.name: NotInMesh: no accepted MeshCluster is called xx: add one, or mend --cluster-name"].assert_eq(&rejected[0].to_string());
    }

    prop_compose! {
        /// Up to six members, each with a few gateways and prefixes of its own, offered to some.
        fn any_mesh()(
            members in collection::vec(
                (collection::btree_set(0..4u8, 0..3), collection::btree_map(0..4u8, collection::vec(0..6usize, 0..3), 0..4)),
                1..6,
            )
        ) -> String {
            let lines = members.iter().enumerate().map(|(n, (gateways, routes))| {
                let gateways = gateways.iter().map(|o| format!("gw{o}@198.51.100.{n}:27473")).collect::<Vec<_>>().join(" ");
                let routes = routes.iter().map(|(r, to)| {
                    let to = to.iter().map(|m| format!("m{m}")).collect::<Vec<_>>().join(",");
                    let to = if to.is_empty() { to } else { format!(">{to}") };
                    if r % 2 == 0 { format!("10.1{n}{r}.0.0/16{to}") } else { format!("fd{n}{r}::/16{to}") }
                }).collect::<Vec<_>>().join(" ");
                format!("m{n} {} {gateways} {routes}", n + 1)
            });
            lines.collect::<Vec<_>>().join("\n")
        }
    }

    proptest! {
        #[test]
        fn every_plan_is_closed_in_itself(mesh in any_mesh()) {
            let intent = intent(&mesh);
            let (state, _) = plan(&intent, &facts());
            for ((table, to), route) in &state.routes {
                match (table, route) {
                    (Table::Remote, Route::Dev { device, .. }) => {
                        prop_assert!(state.allowed_ips.contains_key(&(*device, *to)), "{to} has no peer");
                        prop_assert_eq!(state.routes.get(&(Table::Closed, *to)), Some(&Route::Unreachable));
                    }
                    (Table::Closed, Route::Unreachable) => {
                        let open = matches!(state.routes.get(&(Table::Remote, *to)), Some(Route::Dev { .. }));
                        prop_assert_eq!(open, state.allowed_ips.keys().any(|(_, prefix)| prefix == to));
                    }
                    (_, Route::Throw) => {
                        prop_assert!(Table::ALL.iter().all(|table| state.routes[&(*table, *to)] == Route::Throw));
                    }
                    wrong => prop_assert!(false, "{to}: {wrong:?}"),
                }
            }
            prop_assert!(state.allowed_ips.iter().all(|((device, _), key)| state.peers.contains_key(&(*device, *key))));
            prop_assert!(state.peers.keys().all(|(device, _)| state.wireguard.contains_key(device)));
            prop_assert!(state.links.keys().eq(state.wireguard.keys()));
            prop_assert_eq!(state.nft.is_some(), !state.peers.is_empty());
        }

        #[test]
        fn nothing_is_carried_that_was_not_offered_by_both_sides(mesh in any_mesh()) {
            let intent = intent(&mesh);
            let (state, _) = plan(&intent, &facts());
            let member = |key: &PublicKey| {
                intent.members.iter().find(|(_, m)| m.gateways.values().any(|g| g.key == *key)).expect("a member's")
            };
            for ((_, prefix), key) in &state.allowed_ips {
                prop_assert!(member(key).1.routes[prefix].offered.includes(&intent.me));
            }
            for (remote, own) in state.nft.iter().flat_map(|nft| &nft.admit) {
                let owner = intent.members.iter().find(|(_, m)| m.routes.contains_key(remote)).expect("a member's");
                prop_assert!(owner.1.routes[remote].offered.includes(&intent.me));
                prop_assert!(intent.members[&intent.me].routes[own].offered.includes(owner.0));
            }
        }
    }
}
