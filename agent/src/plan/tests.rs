//! The plan as commands, by example; and what holds for every node of every cluster.

use expect_test::{Expect, expect};
use proptest::{collection, option, prelude::*};

use super::*;
use crate::{
    diff::diff,
    facts::Ports,
    intent::{Cluster, Endpoint, Offer, Route as Claim},
    keys::{HopId, PskId},
    model::key,
    names::NodeName,
    overlay::Overlay,
    state::{Config, Home, Maps, Remote},
};

/// A mesh in short: a line per member, `name id [gwN[@host:port]]... [prefix[>member,...]]...`; the n-th line's gateway o
/// has the key 10 n + o. The first member is this node's, and has the nodes that follow: `node name[=slot]
/// address[,address] [pod range]...`, and `pod address node`.
fn intent(text: &str) -> Intent {
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let tells = |line: &&&str| line.starts_with("node ") || line.starts_with("pod ") || **line == "pools";
    let members: Vec<(MemberName, Member)> =
        (0..).zip(lines.iter().filter(|line| !tells(line))).map(|(n, line)| member(n, line)).collect();
    let nodes: Vec<&str> = lines.iter().filter(tells).copied().collect();
    let cluster = (!nodes.is_empty()).then(|| cluster(&nodes));
    Intent { me: members[0].0.clone(), members: members.into_iter().collect(), cluster }
}

fn cluster(lines: &[&str]) -> Cluster {
    let mut cluster = Cluster::default();
    for line in lines {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            ["node", name, addresses, ref pods @ ..] => {
                let (name, slot) = name.split_once('=').map_or((name, None), |(name, slot)| (name, Some(slot)));
                let name: NodeName = name.parse().expect("a node's name");
                let slot: Option<i64> = slot.map(|slot| slot.parse().expect("a number"));
                cluster.gateways.extend(slot.map(|slot| (Ordinal::new(slot).expect("in range"), name.clone())));
                let hop = addresses.split(',').map(|address| address.parse().expect("an address")).collect();
                let pods = pods.iter().map(|range| range.parse().expect("a range")).collect();
                cluster.nodes.insert(name, Node { hop, pods });
            }
            ["pod", address, node] => {
                cluster.pods.insert(address.parse().expect("an address"), node.parse().expect("a node's name"));
            }
            ["pools"] => cluster.pooled = true,
            _ => panic!("what is {line:?}?"),
        }
    }
    cluster
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
            let offered = to
                .map_or(Offer::All, |to| Offer::To(to.split(',').map(|name| name.parse().expect("a label")).collect()));
            member.routes.insert(prefix.parse().expect("a prefix"), Claim { offered });
        }
    }
    (name, member)
}

fn facts() -> Facts {
    Facts {
        node: "n1".parse().expect("a node's name"),
        slot_keys: Some([key(0)].into()),
        hop_ids: vec![HopId::from_bytes([0x11; 8])],
        psks: BTreeMap::new(),
        resolved: [("gw.example.com".into(), vec!["10.44.9.9".parse().expect("an address")])].into(),
        dial: BTreeMap::new(),
        carved: BTreeSet::new(),
        underlay_mtu: 1500,
        native: [("eth0".to_owned(), 1500)].into(),
        mtus: BTreeMap::new(),
        ipv6: true,
        addresses: ["10.42.0.1".parse().expect("an address"), "192.0.2.1".parse().expect("an address")].into(),
        overlay: Overlay::new("mesh.internal"),
        ports: Ports { wireguard: 27473, hop: 27472, hop_sources: (27456, 27471), probe: 27455 },
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
        ip route replace throw fd77:8bad:2517:1::1/128 table 7474
        ip route replace throw fd77:8bad:2517:1::1/128 table 7473
        nft replace table inet carrick keep_source { 10.42.0.0/16 . 10.44.0.0/16, 10.44.0.0/16 . 10.42.0.0/16 } hop 27472 nodes {  } native { eth0 }
        ip link add carrick-hop arp off type vxlan external dstport 27472 srcport 27456 27471 nolearning udp6zerocsumrx
        wg set carrick-wg0 listen-port 27473 private-key <of K0>
        bpf maps load
        bpf map set home 10.42.0.0/16 here
        bpf map set home fd77:8bad:2517:1::1/128 here
        bpf map set own 10.42.0.0/16 offered to { 2 }
        bpf map set remote 10.44.0.0/16 member 2
        bpf map set remote fd77:8bad:2517:1::/64 overlay of member 1
        bpf map set remote fd77:8bad:2517:2::/64 overlay of member 2
        bpf map set config member 1 slot 0 overlay fd77:8bad:2517:1::1 hop {  } gateways { } devices { carrick-wg0 } secrets { 1111111111111111 } mtu 1420 hop-mtu 1430 ports 27473 27472 27455
        bpf attach carrick-hop egress program steer
        bpf attach eth0 egress program steer_native
        bpf attach carrick-hop ingress program from_hop
        bpf attach carrick-wg0 egress program to_peer
        bpf attach carrick-wg0 ingress program from_peer
        ip link set carrick-hop mtu 1430 addrgenmode none up
        ip link set carrick-wg0 mtu 1420 addrgenmode none up
        wg set carrick-wg0 peer K10 persistent-keepalive 25 allowed-ips +10.44.0.0/16,+fd77:8bad:2517:2::/64
        ip address add fd77:8bad:2517:1::1/128 dev lo preferred_lft 0
        ip -4 rule add priority 11 lookup 7473
        ip -4 rule add priority 12 not iif lo lookup 7474
        ip -6 rule add priority 11 not oif eth0 lookup 7473
        ip -6 rule add priority 12 not iif lo lookup 7474
        ip route replace unreachable 10.44.0.0/16 table 7474
        ip route replace unreachable fd77:8bad:2517:1::/64 table 7474
        ip route replace unreachable fd77:8bad:2517:2::/64 table 7474
        ip route replace 10.44.0.0/16 dev carrick-hop mtu 1420 src 10.42.0.1 table 7473
        ip route replace fd77:8bad:2517:1::/64 dev carrick-hop mtu 1420 src fd77:8bad:2517:1::1 table 7473
        ip route replace fd77:8bad:2517:2::/64 dev carrick-hop mtu 1420 src fd77:8bad:2517:1::1 table 7473
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
        ip route replace throw fd77:8bad:2517:1::1/128 table 7474
        ip route replace throw fd77:8bad:2517:1::1/128 table 7473
        nft replace table inet carrick keep_source { 10.42.0.0/16 . 10.44.0.0/16, 10.42.0.0/16 . 10.45.0.0/16, 10.44.0.0/16 . 10.42.0.0/16, 10.45.0.0/16 . 10.42.0.0/16, fd00:42::/48 . fd00:44::/48, fd00:44::/48 . fd00:42::/48 } hop 27472 nodes {  } native { eth0 }
        ip link add carrick-hop arp off type vxlan external dstport 27472 srcport 27456 27471 nolearning udp6zerocsumrx
        wg set carrick-wg0 listen-port 27473 private-key <of K0>
        wg set carrick-wg1 listen-port 27474 private-key <of K0>
        bpf maps load
        bpf map set home 10.42.0.0/16 here
        bpf map set home fd00:42::/48 here
        bpf map set home fd77:8bad:2517:1::1/128 here
        bpf map set own 10.42.0.0/16 offered to { 2, 3 }
        bpf map set own fd00:42::/48 offered to { 2, 3 }
        bpf map set remote 10.44.0.0/16 member 2
        bpf map set remote 10.45.0.0/16 member 3
        bpf map set remote fd00:44::/48 member 2
        bpf map set remote fd77:8bad:2517:1::/64 overlay of member 1
        bpf map set remote fd77:8bad:2517:2::/64 overlay of member 2
        bpf map set remote fd77:8bad:2517:3::/64 overlay of member 3
        bpf map set config member 1 slot 0 overlay fd77:8bad:2517:1::1 hop {  } gateways { } devices { carrick-wg0, carrick-wg1 } secrets { 1111111111111111 } mtu 1420 hop-mtu 1430 ports 27473 27472 27455
        bpf attach carrick-hop egress program steer
        bpf attach eth0 egress program steer_native
        bpf attach carrick-hop ingress program from_hop
        bpf attach carrick-wg0 egress program to_peer
        bpf attach carrick-wg1 egress program to_peer
        bpf attach carrick-wg0 ingress program from_peer
        bpf attach carrick-wg1 ingress program from_peer
        ip link set carrick-hop mtu 1430 addrgenmode none up
        ip link set carrick-wg0 mtu 1420 addrgenmode none up
        ip link set carrick-wg1 mtu 1420 addrgenmode none up
        wg set carrick-wg0 peer K10 allowed-ips +10.44.0.0/16,+fd00:44::/48,+fd77:8bad:2517:2::/64
        wg set carrick-wg1 peer K21 allowed-ips +10.45.0.0/16,+fd77:8bad:2517:3::/64
        wg set carrick-wg1 peer K11 allowed-ips +10.44.0.0/16,+fd00:44::/48,+fd77:8bad:2517:2::/64
        ip address add fd77:8bad:2517:1::1/128 dev lo preferred_lft 0
        ip -4 rule add priority 11 lookup 7473
        ip -4 rule add priority 12 not iif lo lookup 7474
        ip -6 rule add priority 11 not oif eth0 lookup 7473
        ip -6 rule add priority 12 not iif lo lookup 7474
        ip route replace unreachable 10.44.0.0/16 table 7474
        ip route replace unreachable 10.45.0.0/16 table 7474
        ip route replace unreachable fd00:44::/48 table 7474
        ip route replace unreachable fd77:8bad:2517:1::/64 table 7474
        ip route replace unreachable fd77:8bad:2517:2::/64 table 7474
        ip route replace unreachable fd77:8bad:2517:3::/64 table 7474
        ip route replace 10.44.0.0/16 dev carrick-hop mtu 1420 src 10.42.0.1 table 7473
        ip route replace 10.45.0.0/16 dev carrick-hop mtu 1420 src 10.42.0.1 table 7473
        ip route replace fd00:44::/48 dev carrick-hop mtu 1420 table 7473
        ip route replace fd77:8bad:2517:1::/64 dev carrick-hop mtu 1420 src fd77:8bad:2517:1::1 table 7473
        ip route replace fd77:8bad:2517:2::/64 dev carrick-hop mtu 1420 src fd77:8bad:2517:1::1 table 7473
        ip route replace fd77:8bad:2517:3::/64 dev carrick-hop mtu 1420 src fd77:8bad:2517:1::1 table 7473
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
        ip route replace throw fd77:8bad:2517:1::1/128 table 7474
        ip route replace throw fd77:8bad:2517:1::1/128 table 7473
        nft replace table inet carrick keep_source { 10.42.0.0/16 . 10.46.0.0/16, 10.43.0.0/16 . 10.45.0.0/16, 10.43.0.0/16 . 10.46.0.0/16, 10.45.0.0/16 . 10.43.0.0/16, 10.46.0.0/16 . 10.42.0.0/16, 10.46.0.0/16 . 10.43.0.0/16 } hop 27472 nodes {  } native { eth0 }
        ip link add carrick-hop arp off type vxlan external dstport 27472 srcport 27456 27471 nolearning udp6zerocsumrx
        wg set carrick-wg0 listen-port 27473 private-key <of K0>
        bpf maps load
        bpf map set home 10.42.0.0/16 here
        bpf map set home 10.43.0.0/16 here
        bpf map set home fd77:8bad:2517:1::1/128 here
        bpf map set own 10.42.0.0/16 offered to { 2 }
        bpf map set own 10.43.0.0/16 offered to { 2, 3 }
        bpf map set remote 10.45.0.0/16 member 3
        bpf map set remote 10.46.0.0/16 member 2
        bpf map set remote fd77:8bad:2517:1::/64 overlay of member 1
        bpf map set remote fd77:8bad:2517:2::/64 overlay of member 2
        bpf map set remote fd77:8bad:2517:3::/64 overlay of member 3
        bpf map set config member 1 slot 0 overlay fd77:8bad:2517:1::1 hop {  } gateways { } devices { carrick-wg0 } secrets { 1111111111111111 } mtu 1420 hop-mtu 1430 ports 27473 27472 27455
        bpf attach carrick-hop egress program steer
        bpf attach eth0 egress program steer_native
        bpf attach carrick-hop ingress program from_hop
        bpf attach carrick-wg0 egress program to_peer
        bpf attach carrick-wg0 ingress program from_peer
        ip link set carrick-hop mtu 1430 addrgenmode none up
        ip link set carrick-wg0 mtu 1420 addrgenmode none up
        wg set carrick-wg0 peer K10 allowed-ips +10.46.0.0/16,+fd77:8bad:2517:2::/64
        wg set carrick-wg0 peer K20 allowed-ips +10.45.0.0/16,+fd77:8bad:2517:3::/64
        ip address add fd77:8bad:2517:1::1/128 dev lo preferred_lft 0
        ip -4 rule add priority 11 lookup 7473
        ip -4 rule add priority 12 not iif lo lookup 7474
        ip -6 rule add priority 11 not oif eth0 lookup 7473
        ip -6 rule add priority 12 not iif lo lookup 7474
        ip route replace unreachable 10.45.0.0/16 table 7474
        ip route replace unreachable 10.46.0.0/16 table 7474
        ip route replace unreachable fd77:8bad:2517:1::/64 table 7474
        ip route replace unreachable fd77:8bad:2517:2::/64 table 7474
        ip route replace unreachable fd77:8bad:2517:3::/64 table 7474
        ip route replace 10.45.0.0/16 dev carrick-hop mtu 1420 table 7473
        ip route replace 10.46.0.0/16 dev carrick-hop mtu 1420 src 10.42.0.1 table 7473
        ip route replace fd77:8bad:2517:1::/64 dev carrick-hop mtu 1420 src fd77:8bad:2517:1::1 table 7473
        ip route replace fd77:8bad:2517:2::/64 dev carrick-hop mtu 1420 src fd77:8bad:2517:1::1 table 7473
        ip route replace fd77:8bad:2517:3::/64 dev carrick-hop mtu 1420 src fd77:8bad:2517:1::1 table 7473
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
        ip -4 rule add priority 11 lookup 7473
        ip -4 rule add priority 12 not iif lo lookup 7474
        ip route replace unreachable 10.44.0.0/16 table 7474
        MeshCluster/mn spec.gateways[ordinal=0]: IPv6Disabled: IPv6 is off on this node, which holds slot 0, and probes need it: turn it on (net.ipv6.conf.all.disable_ipv6=0), or let another node hold the slot
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
        ip route replace throw fd77:8bad:2517:1::1/128 table 7474
        ip route replace throw fd77:8bad:2517:1::1/128 table 7473
        nft replace table inet carrick keep_source { 10.42.0.0/16 . 10.44.0.0/16, 10.44.0.0/16 . 10.42.0.0/16 } hop 27472 nodes {  } native { eth0 }
        ip link add carrick-hop arp off type vxlan external dstport 27472 srcport 27456 27471 nolearning udp6zerocsumrx
        wg set carrick-wg0 listen-port 27473 private-key <of K0>
        bpf maps load
        bpf map set home 10.42.0.0/16 here
        bpf map set home 10.42.8.0/24 here
        bpf map set home fd77:8bad:2517:1::1/128 here
        bpf map set own 10.42.0.0/16 offered to { 2 }
        bpf map set own 10.42.8.0/24 offered to { 2 }
        bpf map set remote 10.44.0.0/16 member 2
        bpf map set remote 10.44.0.0/24 member 2
        bpf map set remote 10.44.8.0/24 member 2
        bpf map set remote fd77:8bad:2517:1::/64 overlay of member 1
        bpf map set remote fd77:8bad:2517:2::/64 overlay of member 2
        bpf map set config member 1 slot 0 overlay fd77:8bad:2517:1::1 hop {  } gateways { } devices { carrick-wg0 } secrets { 1111111111111111 } mtu 1420 hop-mtu 1430 ports 27473 27472 27455
        bpf attach carrick-hop egress program steer
        bpf attach eth0 egress program steer_native
        bpf attach carrick-hop ingress program from_hop
        bpf attach carrick-wg0 egress program to_peer
        bpf attach carrick-wg0 ingress program from_peer
        ip link set carrick-hop mtu 1430 addrgenmode none up
        ip link set carrick-wg0 mtu 1420 addrgenmode none up
        wg set carrick-wg0 peer K10 allowed-ips +10.44.0.0/16,+10.44.0.0/24,+10.44.8.0/24,+fd77:8bad:2517:2::/64
        ip address add fd77:8bad:2517:1::1/128 dev lo preferred_lft 0
        ip -4 rule add priority 11 lookup 7473
        ip -4 rule add priority 12 not iif lo lookup 7474
        ip -6 rule add priority 11 not oif eth0 lookup 7473
        ip -6 rule add priority 12 not iif lo lookup 7474
        ip route replace unreachable 10.44.0.0/16 table 7474
        ip route replace unreachable 10.44.0.0/24 table 7474
        ip route replace unreachable 10.44.8.0/24 table 7474
        ip route replace unreachable fd77:8bad:2517:1::/64 table 7474
        ip route replace unreachable fd77:8bad:2517:2::/64 table 7474
        ip route replace 10.44.0.0/16 dev carrick-hop mtu 1420 src 10.42.0.1 table 7473
        ip route replace 10.44.0.0/24 dev carrick-hop mtu 1420 src 10.42.0.1 table 7473
        ip route replace 10.44.8.0/24 dev carrick-hop mtu 1420 src 10.42.0.1 table 7473
        ip route replace fd77:8bad:2517:1::/64 dev carrick-hop mtu 1420 src fd77:8bad:2517:1::1 table 7473
        ip route replace fd77:8bad:2517:2::/64 dev carrick-hop mtu 1420 src fd77:8bad:2517:1::1 table 7473
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
        ip route replace throw fd77:8bad:2517:1::1/128 table 7474
        ip route replace throw 10.44.7.7/32 table 7473
        ip route replace throw 10.44.9.9/32 table 7473
        ip route replace throw fd77:8bad:2517:1::1/128 table 7473
        nft replace table inet carrick keep_source { 10.42.0.0/16 . 10.44.0.0/16, 10.42.0.0/16 . 10.45.0.0/16, 10.44.0.0/16 . 10.42.0.0/16, 10.45.0.0/16 . 10.42.0.0/16 } hop 27472 nodes {  } native { eth0 }
        ip link add carrick-hop arp off type vxlan external dstport 27472 srcport 27456 27471 nolearning udp6zerocsumrx
        wg set carrick-wg0 listen-port 27473 private-key <of K0>
        bpf maps load
        bpf map set home 10.42.0.0/16 here
        bpf map set home fd77:8bad:2517:1::1/128 here
        bpf map set own 10.42.0.0/16 offered to { 2, 3 }
        bpf map set remote 10.44.7.7/32 carved out of member 2
        bpf map set remote 10.44.9.9/32 carved out of member 2
        bpf map set remote 10.44.0.0/16 member 2
        bpf map set remote 10.45.0.0/16 member 3
        bpf map set remote fd77:8bad:2517:1::/64 overlay of member 1
        bpf map set remote fd77:8bad:2517:2::/64 overlay of member 2
        bpf map set remote fd77:8bad:2517:3::/64 overlay of member 3
        bpf map set config member 1 slot 0 overlay fd77:8bad:2517:1::1 hop {  } gateways { } devices { carrick-wg0 } secrets { 1111111111111111 } mtu 1420 hop-mtu 1430 ports 27473 27472 27455
        bpf attach carrick-hop egress program steer
        bpf attach eth0 egress program steer_native
        bpf attach carrick-hop ingress program from_hop
        bpf attach carrick-wg0 egress program to_peer
        bpf attach carrick-wg0 ingress program from_peer
        ip link set carrick-hop mtu 1430 addrgenmode none up
        ip link set carrick-wg0 mtu 1420 addrgenmode none up
        wg set carrick-wg0 peer K10 persistent-keepalive 25 allowed-ips +10.44.0.0/16,+fd77:8bad:2517:2::/64
        wg set carrick-wg0 peer K20 persistent-keepalive 25 allowed-ips +10.45.0.0/16,+fd77:8bad:2517:3::/64
        ip address add fd77:8bad:2517:1::1/128 dev lo preferred_lft 0
        ip -4 rule add priority 11 lookup 7473
        ip -4 rule add priority 12 not iif lo lookup 7474
        ip -6 rule add priority 11 not oif eth0 lookup 7473
        ip -6 rule add priority 12 not iif lo lookup 7474
        ip route replace unreachable 10.44.0.0/16 table 7474
        ip route replace unreachable 10.45.0.0/16 table 7474
        ip route replace unreachable fd77:8bad:2517:1::/64 table 7474
        ip route replace unreachable fd77:8bad:2517:2::/64 table 7474
        ip route replace unreachable fd77:8bad:2517:3::/64 table 7474
        ip route replace 10.44.0.0/16 dev carrick-hop mtu 1420 src 10.42.0.1 table 7473
        ip route replace 10.45.0.0/16 dev carrick-hop mtu 1420 src 10.42.0.1 table 7473
        ip route replace fd77:8bad:2517:1::/64 dev carrick-hop mtu 1420 src fd77:8bad:2517:1::1 table 7473
        ip route replace fd77:8bad:2517:2::/64 dev carrick-hop mtu 1420 src fd77:8bad:2517:1::1 table 7473
        ip route replace fd77:8bad:2517:3::/64 dev carrick-hop mtu 1420 src fd77:8bad:2517:1::1 table 7473
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
        ip route replace throw fd77:8bad:2517:1::1/128 table 7474
        ip route replace throw fd77:8bad:2517:1::1/128 table 7473
        nft replace table inet carrick keep_source { 10.42.0.0/16 . 10.44.0.0/16, 10.42.0.0/16 . 10.45.0.0/16, 10.44.0.0/16 . 10.42.0.0/16, 10.45.0.0/16 . 10.42.0.0/16 } hop 27472 nodes {  } native { eth0 }
        ip link add carrick-hop arp off type vxlan external dstport 27472 srcport 27456 27471 nolearning udp6zerocsumrx
        wg set carrick-wg0 listen-port 27473 private-key <of K0>
        bpf maps load
        bpf map set home 10.42.0.0/16 here
        bpf map set home fd77:8bad:2517:1::1/128 here
        bpf map set own 10.42.0.0/16 offered to { 2, 3 }
        bpf map set remote 10.44.0.0/16 member 2
        bpf map set remote 10.45.0.0/16 member 3
        bpf map set remote fd77:8bad:2517:1::/64 overlay of member 1
        bpf map set remote fd77:8bad:2517:2::/64 overlay of member 2
        bpf map set remote fd77:8bad:2517:3::/64 overlay of member 3
        bpf map set config member 1 slot 0 overlay fd77:8bad:2517:1::1 hop {  } gateways { } devices { carrick-wg0 } secrets { 1111111111111111 } mtu 1420 hop-mtu 1430 ports 27473 27472 27455
        bpf attach carrick-hop egress program steer
        bpf attach eth0 egress program steer_native
        bpf attach carrick-hop ingress program from_hop
        bpf attach carrick-wg0 egress program to_peer
        bpf attach carrick-wg0 ingress program from_peer
        ip link set carrick-hop mtu 1430 addrgenmode none up
        ip link set carrick-wg0 mtu 1420 addrgenmode none up
        wg set carrick-wg0 peer K20 preshared-key <0707070707070707> allowed-ips +10.45.0.0/16,+fd77:8bad:2517:3::/64
        ip address add fd77:8bad:2517:1::1/128 dev lo preferred_lft 0
        ip -4 rule add priority 11 lookup 7473
        ip -4 rule add priority 12 not iif lo lookup 7474
        ip -6 rule add priority 11 not oif eth0 lookup 7473
        ip -6 rule add priority 12 not iif lo lookup 7474
        ip route replace unreachable 10.44.0.0/16 table 7474
        ip route replace unreachable 10.45.0.0/16 table 7474
        ip route replace unreachable fd77:8bad:2517:1::/64 table 7474
        ip route replace unreachable fd77:8bad:2517:2::/64 table 7474
        ip route replace unreachable fd77:8bad:2517:3::/64 table 7474
        ip route replace 10.45.0.0/16 dev carrick-hop mtu 1420 src 10.42.0.1 table 7473
        ip route replace fd77:8bad:2517:1::/64 dev carrick-hop mtu 1420 src fd77:8bad:2517:1::1 table 7473
        ip route replace fd77:8bad:2517:2::/64 dev carrick-hop mtu 1420 src fd77:8bad:2517:1::1 table 7473
        ip route replace fd77:8bad:2517:3::/64 dev carrick-hop mtu 1420 src fd77:8bad:2517:1::1 table 7473
        MeshCluster/va metadata.name: PresharedKeyUnreadable: the file psk-va cannot be used, and without it the pair would be less safe than you asked for: mend or remove it
    "#]],
    );
}

#[test]
fn a_node_that_the_folder_does_not_name_closes_what_the_others_claim() {
    check(
        TWO,
        &Facts { slot_keys: Some([key(77)].into()), ..facts() },
        expect![[r#"
            ip -4 rule add priority 11 lookup 7473
            ip -4 rule add priority 12 not iif lo lookup 7474
            ip -6 rule add priority 11 not oif eth0 lookup 7473
            ip -6 rule add priority 12 not iif lo lookup 7474
            ip route replace unreachable 10.44.0.0/16 table 7474
            MeshCluster/mn spec.gateways[ordinal=0].publicKey: NotInMesh: K0 is not the key of this node's slot 0: name one that `carrick keys show` prints (on Kubernetes `kubectl carrick keys show`), or put the private key that belongs to this one where those are
        "#]],
    );
    check(
        &TWO.replace("gw0@203", "gw3@203"),
        &facts(),
        expect![[r#"
        ip -4 rule add priority 11 lookup 7473
        ip -4 rule add priority 12 not iif lo lookup 7474
        ip -6 rule add priority 11 not oif eth0 lookup 7473
        ip -6 rule add priority 12 not iif lo lookup 7474
        ip route replace unreachable 10.44.0.0/16 table 7474
        MeshCluster/mn spec.gateways: NotInMesh: the folder names no gateway with ordinal 0: add it with publicKey K0
    "#]],
    );
    let mut nobody = intent(TWO);
    nobody.me = "xx".parse().expect("a label");
    let (state, rejected) = plan(&nobody, &facts());
    assert_eq!(state.peers, BTreeMap::new());
    assert!(state.routes.values().all(|route| *route == Route::Unreachable) && state.routes.len() == 2);
    expect![
        "MeshCluster/xx metadata.name: NotInMesh: no accepted MeshCluster is called xx: add one, or mend --cluster-name"
    ]
    .assert_eq(&rejected[0].to_string());
}

#[test]
fn a_slot_whose_key_is_not_known_yet_is_not_used_and_not_refused() {
    check(
        TWO,
        &Facts { slot_keys: None, ..facts() },
        expect![[r#"
            ip -4 rule add priority 11 lookup 7473
            ip -4 rule add priority 12 not iif lo lookup 7474
            ip -6 rule add priority 11 not oif eth0 lookup 7473
            ip -6 rule add priority 12 not iif lo lookup 7474
            ip route replace unreachable 10.44.0.0/16 table 7474
        "#]],
    );
}

/// Three nodes, two of them gateways; a pod outside its node's range, and nodes whose own addresses are offered.
const MANY: &str = "
    mn 1 gw0@203.0.113.1:27473 gw1@203.0.113.2:27473 10.42.0.0/16 192.0.2.0/24
    va 2 gw0 gw1 10.44.0.0/16
    node n1=0 192.0.2.1,2001:db8::1 10.42.1.0/24
    node n2=1 192.0.2.2 10.42.2.0/24
    node n3 192.0.2.3 10.42.3.0/24
    pod 10.42.9.9 n3
";

fn at(node: &str, slot_keys: &[u8]) -> Facts {
    let addresses = ["192.0.2.3", "10.42.3.1", "10.42.77.1"].map(|address| address.parse().expect("an address"));
    let slot_keys = Some(slot_keys.iter().map(|n| key(*n)).collect());
    Facts { node: node.parse().expect("a node's name"), slot_keys, addresses: addresses.into(), ..facts() }
}

#[test]
fn a_gateway_among_other_nodes() {
    check(
        MANY,
        &at("n2", &[1]),
        expect![[r#"
        ip route replace throw fd77:8bad:2517:1::2/128 table 7474
        ip route replace throw fd77:8bad:2517:1::2/128 table 7473
        nft replace table inet carrick keep_source { 10.42.0.0/16 . 10.44.0.0/16, 10.44.0.0/16 . 10.42.0.0/16, 10.44.0.0/16 . 192.0.2.0/24, 192.0.2.0/24 . 10.44.0.0/16 } hop 27472 nodes { 192.0.2.1, 192.0.2.3, 2001:db8::1 } native { eth0 }
        ip link add carrick-hop arp off type vxlan external dstport 27472 srcport 27456 27471 nolearning udp6zerocsumrx
        wg set carrick-wg0 listen-port 27473 private-key <of K1>
        wg set carrick-wg1 listen-port 27474 private-key <of K1>
        bpf maps load
        bpf map set home 10.42.1.0/24 on 192.0.2.1
        bpf map set home 10.42.2.0/24 here
        bpf map set home 10.42.3.0/24 on 192.0.2.3
        bpf map set home 10.42.9.9/32 on 192.0.2.3
        bpf map set home 192.0.2.1/32 on 192.0.2.1
        bpf map set home 192.0.2.2/32 here
        bpf map set home 192.0.2.3/32 on 192.0.2.3
        bpf map set home fd77:8bad:2517:1::1/128 on 192.0.2.1
        bpf map set home fd77:8bad:2517:1::2/128 here
        bpf map set home fd77:8bad:2517:1:c13c:4eb5:6293:7b88/128 here
        bpf map set home fd77:8bad:2517:1:dbc1:168d:28e1:6aaf/128 on 192.0.2.3
        bpf map set home fd77:8bad:2517:1:e160:f6b8:fd86:7db9/128 on 192.0.2.1
        bpf map set node 192.0.2.1 slot 0
        bpf map set node 192.0.2.3 worker
        bpf map set node 2001:db8::1 slot 0
        bpf map set own 10.42.0.0/16 offered to { 2 }
        bpf map set own 192.0.2.0/24 offered to { 2 }
        bpf map set remote 10.44.0.0/16 member 2
        bpf map set remote fd77:8bad:2517:1::/64 overlay of member 1
        bpf map set remote fd77:8bad:2517:2::/64 overlay of member 2
        bpf map set config member 1 slot 1 overlay fd77:8bad:2517:1::2 hop { 192.0.2.2 } gateways { 0: 192.0.2.1, 2001:db8::1 } devices { carrick-wg0, carrick-wg1 } secrets { 1111111111111111 } mtu 1420 hop-mtu 1430 ports 27473 27472 27455
        bpf attach carrick-hop egress program steer
        bpf attach eth0 egress program steer_native
        bpf attach carrick-hop ingress program from_hop
        bpf attach carrick-wg0 egress program to_peer
        bpf attach carrick-wg1 egress program to_peer
        bpf attach carrick-wg0 ingress program from_peer
        bpf attach carrick-wg1 ingress program from_peer
        ip link set carrick-hop mtu 1430 addrgenmode none up
        ip link set carrick-wg0 mtu 1420 addrgenmode none up
        ip link set carrick-wg1 mtu 1420 addrgenmode none up
        wg set carrick-wg0 peer K10 persistent-keepalive 25 allowed-ips +10.44.0.0/16,+fd77:8bad:2517:2::/64
        wg set carrick-wg1 peer K11 persistent-keepalive 25 allowed-ips +10.44.0.0/16,+fd77:8bad:2517:2::/64
        ip address add fd77:8bad:2517:1::2/128 dev lo preferred_lft 0
        ip -4 rule add priority 11 lookup 7473
        ip -4 rule add priority 12 not iif lo lookup 7474
        ip -6 rule add priority 11 not oif eth0 lookup 7473
        ip -6 rule add priority 12 not iif lo lookup 7474
        ip route replace unreachable 10.44.0.0/16 table 7474
        ip route replace unreachable fd77:8bad:2517:1::/64 table 7474
        ip route replace unreachable fd77:8bad:2517:2::/64 table 7474
        ip route replace 10.44.0.0/16 dev carrick-hop mtu 1420 table 7473
        ip route replace fd77:8bad:2517:1::/64 dev carrick-hop mtu 1420 src fd77:8bad:2517:1::2 table 7473
        ip route replace fd77:8bad:2517:2::/64 dev carrick-hop mtu 1420 src fd77:8bad:2517:1::2 table 7473
    "#]],
    );
}

/// Of a CNI's pools a gateway is told who has which block; a worker takes from it what the cluster offers.
#[test]
fn pods_in_pools() {
    let homes = |world: &str, node: &str| {
        let keys: &[u8] = if node == "n1" { &[0] } else { &[] };
        let (state, _) = plan(&intent(world), &at(node, keys));
        let homes = state.maps.expect("a node of the mesh").homes;
        let v4 = homes.into_iter().filter(|(prefix, _)| prefix.is_ipv4());
        v4.map(|(prefix, home)| format!("{node}: {prefix} {home:?}\n")).collect::<String>()
    };
    let world = "
        mn 1 gw0 10.42.0.0/16 10.43.0.0/24
        va 2 gw0@192.0.2.9:27473 10.44.0.0/16
        node n1=0 192.0.2.1 10.42.1.0/26
        node n2 192.0.2.2
        node n3 192.0.2.3 10.43.0.0/24
        pools
    ";
    expect![[r#"
        n1: 10.42.1.0/26 Here
        n1: 10.43.0.0/24 Node(192.0.2.3)
        n2: 10.42.0.0/16 Here
        n2: 10.42.1.0/26 Node(192.0.2.1)
        n2: 10.43.0.0/24 Node(192.0.2.3)
    "#]]
    .assert_eq(&(homes(world, "n1") + &homes(world, "n2")));
    let known = world.replace("pools", "");
    assert_eq!(homes(&known, "n1"), homes(world, "n1"));
}

/// Its source is an address that lives on it, in a range that is offered.
#[test]
fn a_worker() {
    let mtus = [("va".parse().expect("a label"), 1380)].into();
    check(
        MANY,
        &Facts { mtus, ..at("n3", &[]) },
        expect![[r#"
        ip route replace throw fd77:8bad:2517:1:dbc1:168d:28e1:6aaf/128 table 7474
        ip route replace throw fd77:8bad:2517:1:dbc1:168d:28e1:6aaf/128 table 7473
        nft replace table inet carrick keep_source { 10.42.0.0/16 . 10.44.0.0/16, 10.44.0.0/16 . 10.42.0.0/16, 10.44.0.0/16 . 192.0.2.0/24, 192.0.2.0/24 . 10.44.0.0/16 } hop 27472 nodes { 192.0.2.1, 192.0.2.2, 2001:db8::1 } native { eth0 }
        ip link add carrick-hop arp off type vxlan external dstport 27472 srcport 27456 27471 nolearning udp6zerocsumrx
        bpf maps load
        bpf map set home 10.42.1.0/24 on 192.0.2.1
        bpf map set home 10.42.2.0/24 on 192.0.2.2
        bpf map set home 10.42.3.0/24 here
        bpf map set home 10.42.9.9/32 here
        bpf map set home 192.0.2.1/32 on 192.0.2.1
        bpf map set home 192.0.2.2/32 on 192.0.2.2
        bpf map set home 192.0.2.3/32 here
        bpf map set home fd77:8bad:2517:1::1/128 on 192.0.2.1
        bpf map set home fd77:8bad:2517:1::2/128 on 192.0.2.2
        bpf map set home fd77:8bad:2517:1:c13c:4eb5:6293:7b88/128 on 192.0.2.2
        bpf map set home fd77:8bad:2517:1:dbc1:168d:28e1:6aaf/128 here
        bpf map set home fd77:8bad:2517:1:e160:f6b8:fd86:7db9/128 on 192.0.2.1
        bpf map set node 192.0.2.1 slot 0
        bpf map set node 192.0.2.2 slot 1
        bpf map set node 2001:db8::1 slot 0
        bpf map set own 10.42.0.0/16 offered to { 2 }
        bpf map set own 192.0.2.0/24 offered to { 2 }
        bpf map set remote 10.44.0.0/16 member 2
        bpf map set remote fd77:8bad:2517:1::/64 overlay of member 1
        bpf map set remote fd77:8bad:2517:2::/64 overlay of member 2
        bpf map set config member 1 worker overlay fd77:8bad:2517:1:dbc1:168d:28e1:6aaf hop { 192.0.2.3 } gateways { 0: 192.0.2.1, 2001:db8::1 1: 192.0.2.2 } devices {  } secrets { 1111111111111111 } mtu 1420 hop-mtu 1430 ports 27473 27472 27455
        bpf attach carrick-hop egress program steer
        bpf attach eth0 egress program steer_native
        bpf attach carrick-hop ingress program from_hop
        ip link set carrick-hop mtu 1430 addrgenmode none up
        ip address add fd77:8bad:2517:1:dbc1:168d:28e1:6aaf/128 dev lo preferred_lft 0
        ip -4 rule add priority 11 lookup 7473
        ip -4 rule add priority 12 not iif lo lookup 7474
        ip -6 rule add priority 11 not oif eth0 lookup 7473
        ip -6 rule add priority 12 not iif lo lookup 7474
        ip route replace unreachable 10.44.0.0/16 table 7474
        ip route replace unreachable fd77:8bad:2517:1::/64 table 7474
        ip route replace unreachable fd77:8bad:2517:2::/64 table 7474
        ip route replace 10.44.0.0/16 dev carrick-hop mtu 1380 src 10.42.3.1 table 7473
        ip route replace fd77:8bad:2517:1::/64 dev carrick-hop mtu 1420 src fd77:8bad:2517:1:dbc1:168d:28e1:6aaf table 7473
        ip route replace fd77:8bad:2517:2::/64 dev carrick-hop mtu 1420 src fd77:8bad:2517:1:dbc1:168d:28e1:6aaf table 7473
    "#]],
    );
}

#[test]
fn a_worker_without_ipv6_has_no_overlay_address() {
    check(
        MANY,
        &Facts { ipv6: false, ..at("n3", &[]) },
        expect![[r#"
        nft replace table inet carrick keep_source { 10.42.0.0/16 . 10.44.0.0/16, 10.44.0.0/16 . 10.42.0.0/16, 10.44.0.0/16 . 192.0.2.0/24, 192.0.2.0/24 . 10.44.0.0/16 } hop 27472 nodes { 192.0.2.1, 192.0.2.2, 2001:db8::1 } native { eth0 }
        ip link add carrick-hop arp off type vxlan external dstport 27472 srcport 27456 27471 nolearning udp6zerocsumrx
        bpf maps load
        bpf map set home 10.42.1.0/24 on 192.0.2.1
        bpf map set home 10.42.2.0/24 on 192.0.2.2
        bpf map set home 10.42.3.0/24 here
        bpf map set home 10.42.9.9/32 here
        bpf map set home 192.0.2.1/32 on 192.0.2.1
        bpf map set home 192.0.2.2/32 on 192.0.2.2
        bpf map set home 192.0.2.3/32 here
        bpf map set home fd77:8bad:2517:1::1/128 on 192.0.2.1
        bpf map set home fd77:8bad:2517:1::2/128 on 192.0.2.2
        bpf map set home fd77:8bad:2517:1:c13c:4eb5:6293:7b88/128 on 192.0.2.2
        bpf map set home fd77:8bad:2517:1:dbc1:168d:28e1:6aaf/128 here
        bpf map set home fd77:8bad:2517:1:e160:f6b8:fd86:7db9/128 on 192.0.2.1
        bpf map set node 192.0.2.1 slot 0
        bpf map set node 192.0.2.2 slot 1
        bpf map set node 2001:db8::1 slot 0
        bpf map set own 10.42.0.0/16 offered to { 2 }
        bpf map set own 192.0.2.0/24 offered to { 2 }
        bpf map set remote 10.44.0.0/16 member 2
        bpf map set remote fd77:8bad:2517:1::/64 overlay of member 1
        bpf map set remote fd77:8bad:2517:2::/64 overlay of member 2
        bpf map set config member 1 worker overlay fd77:8bad:2517:1:dbc1:168d:28e1:6aaf hop { 192.0.2.3 } gateways { 0: 192.0.2.1, 2001:db8::1 1: 192.0.2.2 } devices {  } secrets { 1111111111111111 } mtu 1420 hop-mtu 1430 ports 27473 27472 27455
        bpf attach carrick-hop egress program steer
        bpf attach eth0 egress program steer_native
        bpf attach carrick-hop ingress program from_hop
        ip link set carrick-hop mtu 1430 addrgenmode none up
        ip -4 rule add priority 11 lookup 7473
        ip -4 rule add priority 12 not iif lo lookup 7474
        ip route replace unreachable 10.44.0.0/16 table 7474
        ip route replace 10.44.0.0/16 dev carrick-hop mtu 1420 src 10.42.3.1 table 7473
    "#]],
    );
}

#[test]
fn a_gateway_without_ipv6_works_as_a_worker() {
    check(
        MANY,
        &Facts { ipv6: false, ..at("n1", &[0]) },
        expect![[r#"
        nft replace table inet carrick keep_source { 10.42.0.0/16 . 10.44.0.0/16, 10.44.0.0/16 . 10.42.0.0/16, 10.44.0.0/16 . 192.0.2.0/24, 192.0.2.0/24 . 10.44.0.0/16 } hop 27472 nodes { 192.0.2.2, 192.0.2.3 } native { eth0 }
        ip link add carrick-hop arp off type vxlan external dstport 27472 srcport 27456 27471 nolearning udp6zerocsumrx
        bpf maps load
        bpf map set home 10.42.1.0/24 here
        bpf map set home 10.42.2.0/24 on 192.0.2.2
        bpf map set home 10.42.3.0/24 on 192.0.2.3
        bpf map set home 10.42.9.9/32 on 192.0.2.3
        bpf map set home 192.0.2.1/32 here
        bpf map set home 192.0.2.2/32 on 192.0.2.2
        bpf map set home 192.0.2.3/32 on 192.0.2.3
        bpf map set home fd77:8bad:2517:1::1/128 here
        bpf map set home fd77:8bad:2517:1::2/128 on 192.0.2.2
        bpf map set home fd77:8bad:2517:1:c13c:4eb5:6293:7b88/128 on 192.0.2.2
        bpf map set home fd77:8bad:2517:1:dbc1:168d:28e1:6aaf/128 on 192.0.2.3
        bpf map set home fd77:8bad:2517:1:e160:f6b8:fd86:7db9/128 here
        bpf map set node 192.0.2.2 slot 1
        bpf map set node 192.0.2.3 worker
        bpf map set own 10.42.0.0/16 offered to { 2 }
        bpf map set own 192.0.2.0/24 offered to { 2 }
        bpf map set remote 10.44.0.0/16 member 2
        bpf map set remote fd77:8bad:2517:1::/64 overlay of member 1
        bpf map set remote fd77:8bad:2517:2::/64 overlay of member 2
        bpf map set config member 1 worker overlay fd77:8bad:2517:1:e160:f6b8:fd86:7db9 hop { 192.0.2.1 } gateways { 1: 192.0.2.2 } devices {  } secrets { 1111111111111111 } mtu 1420 hop-mtu 1430 ports 27473 27472 27455
        bpf attach carrick-hop egress program steer
        bpf attach eth0 egress program steer_native
        bpf attach carrick-hop ingress program from_hop
        ip link set carrick-hop mtu 1430 addrgenmode none up
        ip -4 rule add priority 11 lookup 7473
        ip -4 rule add priority 12 not iif lo lookup 7474
        ip route replace unreachable 10.44.0.0/16 table 7474
        ip route replace 10.44.0.0/16 dev carrick-hop mtu 1420 table 7473
        MeshCluster/mn spec.gateways[ordinal=0]: IPv6Disabled: IPv6 is off on this node, which holds slot 0, and probes need it: turn it on (net.ipv6.conf.all.disable_ipv6=0), or let another node hold the slot
    "#]],
    );
}

#[test]
fn a_gateway_whose_key_the_folder_does_not_name_works_as_a_worker() {
    check(
        MANY,
        &at("n1", &[77]),
        expect![[r#"
        ip route replace throw fd77:8bad:2517:1:e160:f6b8:fd86:7db9/128 table 7474
        ip route replace throw fd77:8bad:2517:1:e160:f6b8:fd86:7db9/128 table 7473
        nft replace table inet carrick keep_source { 10.42.0.0/16 . 10.44.0.0/16, 10.44.0.0/16 . 10.42.0.0/16, 10.44.0.0/16 . 192.0.2.0/24, 192.0.2.0/24 . 10.44.0.0/16 } hop 27472 nodes { 192.0.2.2, 192.0.2.3 } native { eth0 }
        ip link add carrick-hop arp off type vxlan external dstport 27472 srcport 27456 27471 nolearning udp6zerocsumrx
        bpf maps load
        bpf map set home 10.42.1.0/24 here
        bpf map set home 10.42.2.0/24 on 192.0.2.2
        bpf map set home 10.42.3.0/24 on 192.0.2.3
        bpf map set home 10.42.9.9/32 on 192.0.2.3
        bpf map set home 192.0.2.1/32 here
        bpf map set home 192.0.2.2/32 on 192.0.2.2
        bpf map set home 192.0.2.3/32 on 192.0.2.3
        bpf map set home fd77:8bad:2517:1::1/128 here
        bpf map set home fd77:8bad:2517:1::2/128 on 192.0.2.2
        bpf map set home fd77:8bad:2517:1:c13c:4eb5:6293:7b88/128 on 192.0.2.2
        bpf map set home fd77:8bad:2517:1:dbc1:168d:28e1:6aaf/128 on 192.0.2.3
        bpf map set home fd77:8bad:2517:1:e160:f6b8:fd86:7db9/128 here
        bpf map set node 192.0.2.2 slot 1
        bpf map set node 192.0.2.3 worker
        bpf map set own 10.42.0.0/16 offered to { 2 }
        bpf map set own 192.0.2.0/24 offered to { 2 }
        bpf map set remote 10.44.0.0/16 member 2
        bpf map set remote fd77:8bad:2517:1::/64 overlay of member 1
        bpf map set remote fd77:8bad:2517:2::/64 overlay of member 2
        bpf map set config member 1 worker overlay fd77:8bad:2517:1:e160:f6b8:fd86:7db9 hop { 192.0.2.1, 2001:db8::1 } gateways { 1: 192.0.2.2 } devices {  } secrets { 1111111111111111 } mtu 1420 hop-mtu 1430 ports 27473 27472 27455
        bpf attach carrick-hop egress program steer
        bpf attach eth0 egress program steer_native
        bpf attach carrick-hop ingress program from_hop
        ip link set carrick-hop mtu 1430 addrgenmode none up
        ip address add fd77:8bad:2517:1:e160:f6b8:fd86:7db9/128 dev lo preferred_lft 0
        ip -4 rule add priority 11 lookup 7473
        ip -4 rule add priority 12 not iif lo lookup 7474
        ip -6 rule add priority 11 not oif eth0 lookup 7473
        ip -6 rule add priority 12 not iif lo lookup 7474
        ip route replace unreachable 10.44.0.0/16 table 7474
        ip route replace unreachable fd77:8bad:2517:1::/64 table 7474
        ip route replace unreachable fd77:8bad:2517:2::/64 table 7474
        ip route replace 10.44.0.0/16 dev carrick-hop mtu 1420 table 7473
        ip route replace fd77:8bad:2517:1::/64 dev carrick-hop mtu 1420 src fd77:8bad:2517:1:e160:f6b8:fd86:7db9 table 7473
        ip route replace fd77:8bad:2517:2::/64 dev carrick-hop mtu 1420 src fd77:8bad:2517:1:e160:f6b8:fd86:7db9 table 7473
        MeshCluster/mn spec.gateways[ordinal=0].publicKey: NotInMesh: K0 is not the key of this node's slot 0: name one that `carrick keys show` prints (on Kubernetes `kubectl carrick keys show`), or put the private key that belongs to this one where those are
    "#]],
    );
}

#[test]
fn several_nodes_without_a_hop_secret() {
    check(
        MANY,
        &Facts { hop_ids: vec![], ..at("n3", &[]) },
        expect![[r#"
        ip route replace throw fd77:8bad:2517:1:dbc1:168d:28e1:6aaf/128 table 7474
        ip route replace throw fd77:8bad:2517:1:dbc1:168d:28e1:6aaf/128 table 7473
        nft replace table inet carrick keep_source { 10.42.0.0/16 . 10.44.0.0/16, 10.44.0.0/16 . 10.42.0.0/16, 10.44.0.0/16 . 192.0.2.0/24, 192.0.2.0/24 . 10.44.0.0/16 } hop 27472 nodes { 192.0.2.1, 192.0.2.2, 2001:db8::1 } native { eth0 }
        ip link add carrick-hop arp off type vxlan external dstport 27472 srcport 27456 27471 nolearning udp6zerocsumrx
        bpf maps load
        bpf map set home 10.42.1.0/24 on 192.0.2.1
        bpf map set home 10.42.2.0/24 on 192.0.2.2
        bpf map set home 10.42.3.0/24 here
        bpf map set home 10.42.9.9/32 here
        bpf map set home 192.0.2.1/32 on 192.0.2.1
        bpf map set home 192.0.2.2/32 on 192.0.2.2
        bpf map set home 192.0.2.3/32 here
        bpf map set home fd77:8bad:2517:1::1/128 on 192.0.2.1
        bpf map set home fd77:8bad:2517:1::2/128 on 192.0.2.2
        bpf map set home fd77:8bad:2517:1:c13c:4eb5:6293:7b88/128 on 192.0.2.2
        bpf map set home fd77:8bad:2517:1:dbc1:168d:28e1:6aaf/128 here
        bpf map set home fd77:8bad:2517:1:e160:f6b8:fd86:7db9/128 on 192.0.2.1
        bpf map set node 192.0.2.1 slot 0
        bpf map set node 192.0.2.2 slot 1
        bpf map set node 2001:db8::1 slot 0
        bpf map set own 10.42.0.0/16 offered to { 2 }
        bpf map set own 192.0.2.0/24 offered to { 2 }
        bpf map set remote 10.44.0.0/16 member 2
        bpf map set remote fd77:8bad:2517:1::/64 overlay of member 1
        bpf map set remote fd77:8bad:2517:2::/64 overlay of member 2
        bpf map set config member 1 worker overlay fd77:8bad:2517:1:dbc1:168d:28e1:6aaf hop { 192.0.2.3 } gateways { 0: 192.0.2.1, 2001:db8::1 1: 192.0.2.2 } devices {  } secrets {  } mtu 1420 hop-mtu 1430 ports 27473 27472 27455
        bpf attach carrick-hop egress program steer
        bpf attach eth0 egress program steer_native
        bpf attach carrick-hop ingress program from_hop
        ip link set carrick-hop mtu 1430 addrgenmode none up
        ip address add fd77:8bad:2517:1:dbc1:168d:28e1:6aaf/128 dev lo preferred_lft 0
        ip -4 rule add priority 11 lookup 7473
        ip -4 rule add priority 12 not iif lo lookup 7474
        ip -6 rule add priority 11 not oif eth0 lookup 7473
        ip -6 rule add priority 12 not iif lo lookup 7474
        ip route replace unreachable 10.44.0.0/16 table 7474
        ip route replace unreachable fd77:8bad:2517:1::/64 table 7474
        ip route replace unreachable fd77:8bad:2517:2::/64 table 7474
        ip route replace 10.44.0.0/16 dev carrick-hop mtu 1420 src 10.42.3.1 table 7473
        ip route replace fd77:8bad:2517:1::/64 dev carrick-hop mtu 1420 src fd77:8bad:2517:1:dbc1:168d:28e1:6aaf table 7473
        ip route replace fd77:8bad:2517:2::/64 dev carrick-hop mtu 1420 src fd77:8bad:2517:1:dbc1:168d:28e1:6aaf table 7473
        Node/n3 metadata.name: HopSecretMissing: the cluster has other nodes, but the keys folder has no file hop, by which they know each other's packets: make it with `carrick keys gen --hop` on one node, and copy it to all
    "#]],
    );
}

#[test]
fn a_node_that_no_document_names() {
    check(
        MANY,
        &at("n4", &[]),
        expect![[r#"
        ip -4 rule add priority 11 lookup 7473
        ip -4 rule add priority 12 not iif lo lookup 7474
        ip -6 rule add priority 11 not oif eth0 lookup 7473
        ip -6 rule add priority 12 not iif lo lookup 7474
        ip route replace unreachable 10.44.0.0/16 table 7474
        Node/n4 metadata.name: NotInMesh: no accepted Node is called n4: add it, or mend --node-name
    "#]],
    );
}

#[test]
fn a_cluster_without_gateways() {
    check(
        "
        mn 1 gw0 10.42.0.0/16
        va 2 gw0 10.44.0.0/16
        node n1 192.0.2.1 10.42.1.0/24
        node n2 192.0.2.2 10.42.2.0/24
        ",
        &facts(),
        expect![[r#"
            ip -4 rule add priority 11 lookup 7473
            ip -4 rule add priority 12 not iif lo lookup 7474
            ip -6 rule add priority 11 not oif eth0 lookup 7473
            ip -6 rule add priority 12 not iif lo lookup 7474
            ip route replace unreachable 10.44.0.0/16 table 7474
            MeshCluster/mn spec.gateways: NoGateway: no node of this cluster holds a slot: add a MeshGateway that names the node
        "#]],
    );
}

/// Of nested prefixes the programs find the longest only.
#[test]
fn a_nested_prefix_carries_the_offers_around_it() {
    let (state, _) = plan(
        &intent(
            "
        mn 1 gw0 10.42.0.0/16>va 10.42.8.0/24>ge 10.42.9.0/24>xx 10.43.0.0/16>xx
        va 2 gw0 10.44.0.0/16
        ge 3 gw0 10.45.0.0/16
    ",
        ),
        &facts(),
    );
    let own = state.maps.expect("planned").own;
    let told: Vec<String> = own.iter().map(|(range, members)| format!("{range} {members:?}")).collect();
    expect![[r#"
        10.42.0.0/16 {MemberId(2)}
        10.42.8.0/24 {MemberId(2), MemberId(3)}
        10.42.9.0/24 {MemberId(2)}"#]]
    .assert_eq(&told.join("\n"));
}

#[test]
fn more_own_ranges_than_a_map_holds() {
    let ranges: Vec<String> = (0..300).map(|n| format!("10.{}.{}.0/24", n / 256, n % 256)).collect();
    let (state, rejected) = plan(&intent(&format!("mn 1 gw0 {}\nva 2 gw0 10.44.0.0/16", ranges.join(" "))), &facts());
    assert_eq!(state.maps.expect("planned").own.len(), 256);
    expect!["MeshCluster/mn metadata.name: TooMany: offers 300 ranges to others, and a node can serve 256: those from 10.1.0.0/24 on are not, join some of them"].assert_eq(&rejected.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"));
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

/// The nodes of the first member, as [`intent`] reads them: some hold slots, some have an address that the member offers.
fn any_nodes() -> impl Strategy<Value = String> {
    let node = (any::<bool>(), any::<bool>(), any::<bool>(), option::of(0..4u8));
    collection::vec(node, 0..5).prop_map(|nodes| {
        let mut slots = BTreeSet::new();
        let lines = nodes.iter().enumerate().map(|(i, (v6, offered, pods, slot))| {
            let slot = slot.filter(|slot| slots.insert(*slot)).map_or(String::new(), |slot| format!("={slot}"));
            let v4 = if *offered { format!("10.102.255.{i}") } else { format!("192.0.2.{i}") };
            let v6 = if *v6 { format!(",2001:db8::{i}") } else { String::new() };
            let pods = if *pods { format!("10.100.{i}.0/24 fd00:{i}::/32") } else { String::new() };
            let single = format!("pod 10.102.{i}.1 n{i}");
            format!("node n{i}{slot} {v4}{v6} {pods}\n{single}\n")
        });
        lines.collect()
    })
}

/// A mesh, and for each node of the first member the facts that it has, whose slot's key may be missing.
fn any_world() -> impl Strategy<Value = (Intent, Vec<Facts>)> {
    (any_mesh(), any_nodes(), collection::vec((any::<bool>(), 0..8u8), 6)).prop_map(|(mesh, nodes, vary)| {
        let intent = intent(&format!("{mesh}\n{nodes}"));
        let alone = vec!["n0".parse().expect("a node's name")];
        let names: Vec<NodeName> =
            intent.cluster.as_ref().map_or(alone, |cluster| cluster.nodes.keys().cloned().collect());
        let facts = names.into_iter().zip(vary).enumerate().map(|(i, (node, (has_key, luck)))| {
            let own = intent.slot_of(&node).filter(|_| has_key || luck > 0).map(|slot| key(slot.get()));
            let addresses =
                [format!("10.100.{i}.1"), format!("10.102.255.{i}"), format!("fd00:{i}::1"), "10.102.7.7".into()];
            let addresses = addresses.iter().map(|address| address.parse().expect("an address")).collect();
            Facts { node, slot_keys: Some(own.into_iter().collect()), addresses, ipv6: luck != 1, ..facts() }
        });
        let facts = facts.collect();
        (intent, facts)
    })
}

/// Where an address lives, by the node's own first address.
fn absolute(home: Home, config: &Config) -> Option<IpAddr> {
    match home {
        Home::Here => config.hop.first().copied(),
        Home::Node(address) => Some(address),
    }
}

fn config(maps: &Maps) -> &Config {
    maps.config.as_ref().expect("a plan with maps has a config")
}

proptest! {
    #[test]
    fn every_plan_is_closed_in_itself((intent, nodes) in any_world()) {
        for facts in &nodes {
            let (state, _) = plan(&intent, facts);
            let maps = state.maps.clone().unwrap_or_default();
            for ((table, to), route) in &state.routes {
                match (table, route) {
                    (Table::Remote, Route::Hop { source, .. }) => {
                        prop_assert!(matches!(maps.remote.get(to), Some(Remote::Range(_) | Remote::Overlay(_))), "{to}");
                        prop_assert_eq!(state.routes.get(&(Table::Closed, *to)), Some(&Route::Unreachable));
                        let home = source.map(|source| Longest::new(&maps.homes).get(source).copied());
                        prop_assert!(matches!(home, None | Some(Some(Home::Here))), "{to} from {source:?}");
                    }
                    (Table::Closed, Route::Unreachable) => {}
                    (_, Route::Throw) => {
                        prop_assert!(Table::ALL.iter().all(|table| state.routes[&(*table, *to)] == Route::Throw));
                    }
                    wrong => prop_assert!(false, "{to}: {wrong:?}"),
                }
            }
            for ((device, prefix), key) in &state.allowed_ips {
                prop_assert!(state.peers.contains_key(&(*device, *key)));
                prop_assert!(maps.remote.contains_key(prefix), "{prefix} is not known");
            }
            prop_assert!(state.peers.keys().all(|(device, _)| state.wireguard.contains_key(device)));
            let devices = state.wireguard.keys().map(|device| Interface::WireGuard(*device));
            let links: BTreeSet<Interface> = devices.chain(state.hop.iter().map(|_| Interface::Hop)).collect();
            prop_assert!(state.links.keys().copied().eq(links.iter().copied()));
            let attached = |program, link: String| state.programs.contains(&Attachment { program, link });
            for link in links {
                let (egress, ingress) = match link {
                    Interface::Hop => (Program::Steer, Program::FromHop),
                    Interface::WireGuard(_) => (Program::ToPeer, Program::FromPeer),
                };
                prop_assert!(attached(egress, link.to_string()) && attached(ingress, link.to_string()), "{link}");
            }
            let joined = state.hop.is_some();
            prop_assert_eq!(attached(Program::SteerNative, "eth0".to_owned()), joined);
            prop_assert_eq!(state.maps.is_some(), joined);
            prop_assert_eq!(state.nft.is_some(), joined);
            prop_assert!(joined || state.peers.is_empty() && state.overlay.is_empty());
            let known: BTreeSet<IpAddr> = maps.nodes.values().map(|node| node.home).collect();
            for (prefix, home) in &maps.homes {
                prop_assert!(matches!(home, Home::Here) || matches!(home, Home::Node(a) if known.contains(a)), "{prefix}");
            }
            if joined {
                let config = config(&maps);
                prop_assert!(config.wireguard.iter().eq(state.wireguard.keys()));
                prop_assert!(config.slot.is_some() || state.wireguard.is_empty());
                prop_assert!(config.slot.is_none_or(|slot| !config.gateways.contains_key(&slot)));
                prop_assert_eq!(state.overlay.iter().collect::<Vec<_>>(), if facts.ipv6 { vec![&config.overlay] } else { vec![] });
                prop_assert_eq!(maps.homes.get(&IpNetwork::from(IpAddr::from(config.overlay))), Some(&Home::Here));
            }
        }
    }

    /// A pair's AllowedIPs are what `from_peer` admits from that member, no more and no less.
    #[test]
    fn a_peer_holds_what_the_programs_admit_from_its_member((intent, nodes) in any_world()) {
        for facts in &nodes {
            let (state, _) = plan(&intent, facts);
            let Some(maps) = &state.maps else { continue };
            for (device, key) in state.peers.keys() {
                let name = member_of(&intent, *device, key).expect("a member's");
                let id = intent.members[name].id;
                let of = |remote: &Remote| matches!(remote, Remote::Range(m) | Remote::Overlay(m) if *m == id);
                let admitted: BTreeSet<IpNetwork> =
                    maps.remote.iter().filter(|(_, remote)| of(remote)).map(|(prefix, _)| *prefix).collect();
                let held: BTreeSet<IpNetwork> =
                    state.allowed_ips.iter().filter(|(_, k)| *k == key).map(|((_, prefix), _)| *prefix).collect();
                prop_assert_eq!(admitted, held);
            }
        }
    }

    /// What one node says of another is what that one says of itself, and they know the same of the mesh.
    #[test]
    fn the_nodes_of_a_cluster_agree((intent, nodes) in any_world()) {
        let plans: Vec<(&Facts, Maps)> =
            nodes.iter().filter_map(|facts| plan(&intent, facts).0.maps.map(|maps| (facts, maps))).collect();
        for (one, maps) in &plans {
            for (other, others) in plans.iter().filter(|(other, _)| other.node != one.node) {
                prop_assert_eq!(&maps.own, &others.own);
                prop_assert_eq!(&maps.remote, &others.remote);
                let (config, theirs) = (config(maps), config(others));
                let cluster = intent.cluster.as_ref().expect("several nodes");
                let home = cluster.nodes[&other.node].hop.first().expect("never empty");
                if let Some(slot) = theirs.slot.filter(|_| other.ipv6) {
                    prop_assert_eq!(config.gateways.get(&slot), Some(&theirs.hop));
                    prop_assert!(theirs.hop.iter().all(|address| maps.nodes[address].slot == Some(slot)));
                }
                prop_assert!(theirs.hop.iter().all(|address| maps.nodes[address].home == *home));
                let overlay = IpNetwork::from(IpAddr::from(theirs.overlay));
                prop_assert_eq!(maps.homes.get(&overlay), Some(&Home::Node(*home)));
                let seen = |maps: &Maps, config: &Config| -> BTreeMap<IpNetwork, Option<IpAddr>> {
                    maps.homes.iter().map(|(prefix, home)| (*prefix, absolute(*home, config))).collect()
                };
                // A node without IPv6 does not send from its IPv6 address.
                if one.ipv6 && other.ipv6 {
                    prop_assert_eq!(seen(maps, config), seen(others, theirs));
                }
            }
        }
    }

    /// What comes over the hop is merged already; what comes out of a tunnel is not.
    #[test]
    fn all_links_but_the_hop_merge((intent, nodes) in any_world()) {
        for facts in &nodes {
            for (interface, link) in plan(&intent, facts).0.links {
                prop_assert_eq!(link.gro, interface != Interface::Hop);
            }
        }
    }

    /// What a member routes to another is what that one lets in, and nothing else.
    #[test]
    fn members_agree_on_what_passes_between_them(mesh in any_mesh()) {
        let mut intent = intent(&mesh);
        let mut plans: BTreeMap<MemberId, Maps> = BTreeMap::new();
        for (name, member) in intent.members.clone() {
            intent.me = name;
            let slot_keys = Some(member.gateways.values().map(|gateway| gateway.key).collect());
            let (state, _) = plan(&intent, &Facts { slot_keys, ..facts() });
            plans.extend(state.maps.map(|maps| (member.id, maps)));
        }
        for (me, maps) in &plans {
            for (other, theirs) in plans.iter().filter(|(other, _)| *other != me) {
                let offered = Longest::new(&theirs.own);
                for (prefix, _) in maps.remote.iter().filter(|(_, remote)| **remote == Remote::Range(*other)) {
                    prop_assert!(offered.get(prefix.network()).is_some_and(|members| members.contains(me)), "{prefix}");
                }
                let remote = Longest::new(&maps.remote);
                for (prefix, _) in theirs.own.iter().filter(|(_, members)| members.contains(me)) {
                    let found = remote.get(prefix.network());
                    prop_assert!(matches!(found, Some(Remote::Range(m) | Remote::Carved(m)) if m == other), "{prefix}");
                }
            }
        }
    }

    /// Down to what each family asks of every link, and never more than the devices carry.
    #[test]
    fn a_route_is_as_wide_as_the_way(found in 0..4000u16) {
        let mesh = "mn 1 gw0@203.0.113.1:27473 10.42.0.0/16 fd00:42::/48\nva 2 gw0 10.44.0.0/16 fd00:44::/48";
        let mtus = [("va".parse().expect("a label"), found)].into();
        let (state, _) = plan(&intent(mesh), &Facts { mtus, ..facts() });
        for (range, least) in [("10.44.0.0/16", 576), ("fd00:44::/48", 1280)] {
            let route = &state.routes[&(Table::Remote, range.parse().expect("a range"))];
            let is = matches!(route, Route::Hop { mtu: Some(mtu), .. } if *mtu == u32::from(found.clamp(least, 1420)));
            prop_assert!(is, "{range}: {route:?}");
        }
    }

    #[test]
    fn sources_are_kept_only_where_both_sides_offer(mesh in any_mesh()) {
        let intent = intent(&mesh);
        let (state, _) = plan(&intent, &facts());
        let owner = |range: &IpNetwork| {
            intent.members.iter().find(|(_, m)| m.routes.contains_key(range)).expect("a member's")
        };
        for (from, to) in state.nft.iter().flat_map(|nft| &nft.keep_source) {
            let ((a, one), (b, other)) = (owner(from), owner(to));
            prop_assert!(one.routes[from].offered.includes(b) && other.routes[to].offered.includes(a));
            prop_assert!((a == &intent.me) != (b == &intent.me));
        }
    }
}
