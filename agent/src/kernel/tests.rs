//! The laws of the kernel layer, tried on the real kernel: each test in a network namespace of its own. They need root.

#![allow(clippy::unwrap_used)]

use std::{
    collections::{BTreeMap, BTreeSet},
    future::Future,
    io::{self, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use ipnetwork::IpNetwork;
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use nix::sched::{CloneFlags, unshare};
use proptest::prelude::*;
use rtnetlink::MulticastGroup;

use super::{Linux, Secrets, WgDevice, WireGuard, bpf::Bpf, events::Watch, has_net_admin, prefix::around, sweep};
use crate::{
    diff::diff,
    keys::{PresharedKey, PrivateKey, PublicKey},
    names::{Device, Interface, Ordinal, Table},
    reconcile::Kernel,
    state::{self, Family, Hop, Link, Lookups, Nft, Op, Peer, Route, Rule, State},
};

/// Runs `work` on a thread with a network namespace and a runtime of its own; both end with it.
pub(crate) fn in_netns<T: Send, F: Future<Output = T>>(work: impl FnOnce() -> F + Send) -> T {
    let inside = || {
        unshare(CloneFlags::CLONE_NEWNET).expect("the tests of the kernel layer need root");
        sh("ip link set lo up");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(work())
    };
    let ended = std::thread::scope(|scope| scope.spawn(inside).join());
    ended.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// Runs a script in the namespace of this thread; fails the test if any command of it fails. Returns its output.
pub(crate) fn sh(script: &str) -> String {
    let mut shell = Command::new("sh")
        .arg("-e")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    shell.stdin.take().unwrap().write_all(script.as_bytes()).unwrap();
    let ran = shell.wait_with_output().unwrap();
    assert!(ran.status.success(), "{script:.2000}\n{}", String::from_utf8_lossy(&ran.stderr));
    String::from_utf8(ran.stdout).unwrap()
}

/// A backend whose devices are persistent TUNs with nothing behind them.
#[derive(Debug, Default)]
struct Husks(BTreeMap<Device, WgDevice>);

impl WireGuard for Husks {
    async fn read(&mut self) -> io::Result<BTreeMap<Device, WgDevice>> {
        self.0.retain(|device, _| nix::net::if_::if_nametoindex(device.to_string().as_str()).is_ok());
        Ok(self.0.clone())
    }

    async fn set_device(&mut self, device: Device, port: u16, key: &PrivateKey) -> io::Result<()> {
        sh(&format!("ip link show {device} >/dev/null 2>&1 || ip tuntap add {device} mode tun"));
        self.0.insert(device, WgDevice { key: key.public(), port, peers: BTreeMap::new() });
        Ok(())
    }

    async fn set_peer(
        &mut self,
        device: Device,
        _: &PublicKey,
        _: &Peer,
        _: Option<&PresharedKey>,
        _: &[IpNetwork],
    ) -> io::Result<()> {
        Err(io::Error::other(format!("{device}: nothing here has peers")))
    }

    async fn drop_allowed_ips(&mut self, device: Device, _: &PublicKey, _: &[IpNetwork]) -> io::Result<()> {
        Err(io::Error::other(format!("{device}: nothing here has peers")))
    }

    async fn remove_peer(&mut self, device: Device, _: &PublicKey) -> io::Result<()> {
        Err(io::Error::other(format!("{device}: nothing here has peers")))
    }

    async fn del_device(&mut self, device: Device) -> io::Result<()> {
        self.0.remove(&device).map(|_| ()).ok_or_else(|| io::Error::other("no such device"))
    }
}

fn private(device: Device) -> PrivateKey {
    PrivateKey::new([device.0.get() + 1; 32])
}

/// Without a bpffs: maps and programs have tests of their own.
fn linux() -> Linux<Husks> {
    let private = Device::all().map(private).map(|key| (key.public(), key)).collect();
    let bpf = Bpf::new(Path::new("/nonexistent/bpf"), Path::new("/nonexistent/run")).unwrap();
    Linux::new(Husks::default(), Secrets { private, ..Secrets::default() }, bpf).unwrap()
}

/// A reading without failures.
async fn read(kernel: &mut Linux<Husks>) -> State {
    let reading = kernel.read().await;
    assert!(reading.failed.is_empty(), "{:?}", reading.failed);
    reading.state
}

/// For the eye: what differs between two states.
fn lines(state: &State) -> String {
    let State { links, hop, wireguard, routes, rules, nft, overlay, .. } = state;
    let routes = routes.iter().map(|((table, to), route)| format!("{to} table {table}: {route:?}\n"));
    format!("{links:?}\n{hop:?}\n{wireguard:?}\n{}{rules:?}\n{nft:?}\n{overlay:?}", routes.collect::<String>())
}

async fn reach(kernel: &mut Linux<Husks>, wanted: &State) {
    let actual = read(kernel).await;
    for op in diff(wanted, &actual) {
        kernel.apply(&op).await.unwrap_or_else(|error| panic!("{op:?}: {error}"));
    }
    let reached = read(kernel).await;
    assert_eq!(lines(&reached), lines(wanted));
    assert_eq!(&reached, wanted);
    assert_eq!(diff(wanted, &reached), vec![]);
}

const OWN: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(10, 42, 0, 1)), IpAddr::V6(Ipv6Addr::new(0xfd42, 0, 0, 0, 0, 0, 0, 1))];

/// A node with a native device, and with what others have put close to what is ours.
fn foreign() {
    sh("ip link add eth0 type veth peer name carrick-wg; ip link set carrick-wg addrgenmode none up
        ip link add carrick-wg8 type veth peer name carrick-wg00; ip link set eth0 addrgenmode none up
        ip link property add dev eth0 altname carrick-wg7
        ip link add carrick-hop0 type vxlan external dstport 8472; ip link set carrick-hop0 addrgenmode none; ip link set carrick-hop0 up
        ip addr add 192.168.7.2/24 dev eth0; ip addr add 2001:db8:7::2/64 dev eth0 nodad
        ip addr add 10.42.0.1/32 dev lo; ip addr add fd42::1/128 dev lo nodad
        ip addr add fd63:9::1/128 dev lo preferred_lft 0 nodad; ip addr add fd63::9/128 dev eth0 preferred_lft 0 nodad
        ip route add default via 192.168.7.1; ip route add default via 2001:db8:7::1
        ip route add 10.44.0.0/16 via 192.168.7.1 table 7472; ip route add unreachable 10.44.0.0/16 table 7475
        ip route add fd44::/48 dev eth0 table 7472; ip route add 10.44.0.0/16 via 192.168.7.3
        ip rule add pref 11 table 7472; ip rule add pref 12 iif lo table 7473; ip rule add pref 13 table 7474
        ip -6 rule add pref 11 table 7474; ip -6 rule add pref 12 table 7473 proto kernel");
    sh("nft add table ip carrick; nft add table inet carrick2; nft add table ip6 nat
        nft 'add chain ip carrick keep_source { type nat hook postrouting priority 100; }'
        nft add rule ip carrick keep_source oifname eth0 masquerade
        nft 'add chain ip6 nat postrouting { type nat hook postrouting priority 100; }'
        nft add rule ip6 nat postrouting oifname eth0 masquerade
        nft 'add set inet carrick2 keep4 { type ipv4_addr; elements = { 10.0.0.1 }; }'");
}

/// Everything that is not ours, as the tools print it. What we put on `lo` is in fd63::/64.
fn others() -> String {
    sh("for family in -4 -6; do
            ip -oneline -details $family route show table all \\
                | grep -Ev 'carrick-(wg[0-7]|hop) |table 747[34]|fd63::. dev lo' || true
        done
        ip -details rule | grep -Ev '^11:.*lookup 7473|^12:.*lookup 7474' || true
        ip -details -6 rule | grep -Ev '^11:.*lookup 7473|^12:.*lookup 7474' || true
        for link in eth0 carrick-wg8 carrick-wg00 carrick-wg carrick-hop0; do ip -details addr show dev $link; done
        ip -details link show dev lo; ip -oneline addr show dev lo | grep -v 'fd63::[^9]'
        nft list table ip carrick; nft list table inet carrick2; nft list table ip6 nat
        nft list tables | grep -v 'inet carrick$'")
}

pub(crate) fn any_prefix(ipv4: bool) -> BoxedStrategy<IpNetwork> {
    // Few values of few bits, so that prefixes enclose one another often.
    let v4 = (0_u8..4, 0_u8..4, prop_oneof![Just(8_u8), Just(16), Just(17), Just(24), Just(31), Just(32)])
        .prop_map(|(a, b, length)| around(Ipv4Addr::new(10, a * 80, b, b).into(), length));
    let v6 = (0_u16..4, 0_u16..4, prop_oneof![Just(32_u8), Just(48), Just(49), Just(64), Just(127), Just(128)])
        .prop_map(|(a, b, length)| around(Ipv6Addr::new(0xfd44, 0x80 * a, b, 0, 0, 0, 0, a).into(), length));
    let some = if ipv4 { v4.boxed() } else { v6.boxed() };
    some.prop_filter_map("a length of its family", |prefix| prefix).boxed()
}

fn either_family() -> BoxedStrategy<IpNetwork> {
    prop_oneof![any_prefix(true), any_prefix(false)].boxed()
}

fn any_hop() -> impl Strategy<Value = Hop> {
    (27000_u16..27500, 1024_u16..30000, 0_u16..16)
        .prop_map(|(port, first, more)| Hop { port, sources: (first, first + more) })
}

pub(crate) fn any_nft() -> impl Strategy<Value = Nft> {
    let pair = || prop_oneof![(any_prefix(true), any_prefix(true)), (any_prefix(false), any_prefix(false))];
    let pairs = proptest::collection::btree_set(pair(), 0..12);
    let nodes = proptest::collection::btree_set(either_family().prop_map(|prefix| prefix.ip()), 0..6);
    let native = proptest::collection::btree_set("[a-z][a-z0-9.@_-]{0,14}", 0..4);
    (pairs, nodes, native, any_hop(), any::<bool>()).prop_map(|(keep_source, nodes, native, hop, none)| {
        let (hop_port, hop_sources) = if none { (0, (0, 0)) } else { (hop.port, hop.sources) };
        Nft { keep_source, nodes, hop_port, hop_sources, native }
    })
}

fn any_link() -> impl Strategy<Value = Link> {
    (1280_u32..9000, any::<[bool; 2]>(), 0_u8..3).prop_map(|(mtu, [forwarding, gro], rp_filter)| Link {
        forwarding,
        rp_filter,
        gro,
        ..Link::ours(mtu)
    })
}

/// A route of that prefix; through the hop if there is one.
fn any_route(to: IpNetwork, hop: bool) -> BoxedStrategy<Route> {
    let source = OWN.into_iter().find(|own| own.is_ipv4() == to.is_ipv4());
    let source = prop_oneof![Just(None), Just(source)];
    let mtu = proptest::option::of(1280_u32..9000);
    let through = (mtu, source).prop_map(|(mtu, source)| Route::Hop { mtu, source });
    if !hop {
        return prop_oneof![Just(Route::Throw), Just(Route::Unreachable)].boxed();
    }
    prop_oneof![4 => through, 1 => Just(Route::Throw), 1 => Just(Route::Unreachable)].boxed()
}

fn any_routes(hop: bool) -> impl Strategy<Value = BTreeMap<(Table, IpNetwork), Route>> {
    let table = prop_oneof![Just(Table::Remote), Just(Table::Closed)];
    let place = (table, either_family());
    let route = place.prop_flat_map(move |place| any_route(place.1, hop).prop_map(move |route| (place, route)));
    proptest::collection::vec(route, 0..30).prop_map(BTreeMap::from_iter)
}

prop_compose! {
    fn any_state()(hop in proptest::option::weighted(0.8, any_hop()))(
        routes in any_routes(hop.is_some()),
        hop in Just(hop),
        hop_link in any_link(),
        devices in proptest::collection::vec(any_link(), 0..3),
        rules in proptest::collection::btree_map(any_rule(), any_lookups(), 0..=4),
        nft in proptest::option::of(any_nft()),
        overlay in proptest::sample::subsequence(vec![OVERLAY, Ipv6Addr::new(0xfd63, 0, 0, 0, 0, 0, 0, 2)], 0..=2),
    ) -> State {
        let devices: BTreeMap<Device, Link> = Device::all().zip(devices).collect();
        let port = |device: Device| 27473 + u16::from(device.0.get());
        let key = |device| (device, state::WireGuard { key: private(device).public(), port: port(device) });
        let links = devices.iter().map(|(device, link)| (Interface::WireGuard(*device), link.clone()));
        State {
            wireguard: devices.keys().copied().map(key).collect(),
            links: links.chain(hop.iter().map(|_| (Interface::Hop, hop_link.clone()))).collect(),
            hop,
            routes,
            rules,
            nft,
            overlay: overlay.into_iter().collect(),
            ..State::default()
        }
    }
}

fn any_rule() -> impl Strategy<Value = Rule> {
    let all = Family::ALL.into_iter().flat_map(|family| Table::ALL.map(|table| Rule { family, table }));
    proptest::sample::select(all.collect::<Vec<_>>())
}

fn any_lookups() -> impl Strategy<Value = Lookups> {
    // One device that is there, and one that is not.
    let devices = ["eth0", "gone0"].map(|device| Lookups::NotBoundTo(device.to_owned()));
    proptest::sample::select([vec![Lookups::All, Lookups::Forwarded], devices.to_vec()].concat())
}

const OVERLAY: Ipv6Addr = Ipv6Addr::new(0xfd63, 0, 0, 0, 0, 0, 0, 1);

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]

    #[test]
    fn what_is_applied_is_what_is_read_and_nothing_else_changes(first in any_state(), second in any_state()) {
        in_netns(|| async {
            foreign();
            let before = others();
            let mut kernel = linux();
            reach(&mut kernel, &first).await;
            reach(&mut kernel, &second).await;
            // Another process, which remembers nothing.
            let mut restarted = linux();
            restarted.wireguard = Husks(kernel.wireguard.0.clone());
            assert_eq!(read(&mut restarted).await, second);
            reach(&mut restarted, &State::default()).await;
            assert_eq!(others(), before);
        });
    }
}

fn net(text: &str) -> IpNetwork {
    text.parse().unwrap()
}

/// A hop, a device, and a route of each kind in both families.
fn typical() -> State {
    let device = Device(Ordinal::ZERO);
    let through = |source| Route::Hop { mtu: Some(1350), source: Some(source) };
    State {
        hop: Some(Hop { port: 27472, sources: (27456, 27471) }),
        wireguard: BTreeMap::from([(device, state::WireGuard { key: private(device).public(), port: 27473 })]),
        links: BTreeMap::from([(Interface::Hop, Link::ours(1450)), (Interface::WireGuard(device), Link::ours(1420))]),
        routes: BTreeMap::from([
            ((Table::Remote, net("10.44.0.0/16")), through(OWN[0])),
            ((Table::Remote, net("fd44::/48")), through(OWN[1])),
            ((Table::Remote, net("10.44.9.9/32")), Route::Throw),
            ((Table::Closed, net("10.44.0.0/16")), Route::Unreachable),
            ((Table::Closed, net("fd44::/48")), Route::Unreachable),
            ((Table::Closed, net("10.44.9.9/32")), Route::Throw),
        ]),
        rules: BTreeMap::from([
            (Rule { family: Family::V4, table: Table::Remote }, Lookups::All),
            (Rule { family: Family::V4, table: Table::Closed }, Lookups::Forwarded),
            (Rule { family: Family::V6, table: Table::Remote }, Lookups::NotBoundTo("eth0".to_owned())),
            (Rule { family: Family::V6, table: Table::Closed }, Lookups::Forwarded),
        ]),
        nft: Some(typical_nft()),
        overlay: BTreeSet::from([OVERLAY]),
        ..State::default()
    }
}

fn typical_nft() -> Nft {
    Nft {
        keep_source: BTreeSet::from([
            (net("10.42.0.0/16"), net("10.44.0.0/16")),
            (net("10.42.7.0/24"), net("10.44.0.0/15")),
            (net("fd42::/48"), net("fd44::/48")),
        ]),
        nodes: ["192.168.7.3", "2001:db8:7::3"].map(|node| node.parse().unwrap()).into(),
        hop_port: 27472,
        hop_sources: (27456, 27471),
        native: BTreeSet::from(["eth0".to_owned()]),
    }
}

/// Waits for an event: each makes a pass. (An overlay address that has lost its mark is not known to be ours.)
async fn heard(watch: &mut Watch) {
    tokio::time::timeout(Duration::from_secs(20), watch.next()).await.expect("an event");
}

/// Until the kernel is silent: what the test itself did is not what it waits for.
async fn drain(watch: &mut Watch) {
    while tokio::time::timeout(Duration::from_millis(50), watch.next()).await.is_ok() {}
}

/// Each of these is noticed by an event, seen in the reading, and undone, with nothing foreign touched.
fn check_repair(damage: &[&str]) {
    for damage in damage {
        in_netns(|| async {
            foreign();
            let mut kernel = linux();
            reach(&mut kernel, &typical()).await;
            let mut watch = Watch::new().unwrap();
            drain(&mut watch).await;
            sh(damage);
            let before = others();
            heard(&mut watch).await;
            assert_ne!(read(&mut kernel).await, typical(), "not seen: {damage}");
            reach(&mut kernel, &typical()).await;
            assert_eq!(others(), before, "{damage}");
        });
    }
}

#[test]
fn damaged_routes_are_repaired() {
    check_repair(&[
        "ip route flush table 7473",
        "ip -6 route flush table 7473",
        "ip route flush table 7474; ip -6 route flush table 7474",
        "ip route del 10.44.0.0/16 table 7473",
        "ip route add 10.44.0.0/16 dev carrick-hop metric 5 table 7473",
        "ip route add 10.44.0.0/16 via 192.168.7.9 metric 0 tos 0x10 table 7473",
        "ip route append 10.44.0.0/16 via 192.168.7.9 table 7473",
        "ip route prepend 10.44.0.0/16 via 192.168.7.9 table 7473",
        "ip route prepend throw 10.44.0.0/16 table 7474",
        "ip route replace 10.44.0.0/16 via 192.168.7.9 table 7473",
        "ip route replace 10.44.0.0/16 dev carrick-hop src 10.42.0.1 mtu 1300 proto kernel table 7473",
        "ip route replace 10.44.0.0/16 dev carrick-hop src 10.42.0.1 mtu lock 1350 proto kernel table 7473",
        "ip route replace 10.44.0.0/16 dev carrick-hop src 10.42.0.1 proto kernel table 7473",
        "ip route replace 10.44.0.0/16 dev carrick-wg0 src 10.42.0.1 mtu 1350 proto kernel table 7473",
        "ip route replace 10.44.0.0/16 dev carrick-hop src 10.42.0.1 mtu 1350 proto static table 7473",
        "ip route replace 10.44.0.0/16 dev carrick-hop mtu 1350 proto kernel table 7473",
        "ip route replace 10.44.0.0/16 table 7473 nexthop via 192.168.7.8 nexthop via 192.168.7.9",
        "ip route replace blackhole 10.44.0.0/16 table 7474",
        "ip route replace 10.44.9.9/32 via 192.168.7.9 table 7473",
        "ip route add default via 192.168.7.9 table 7473",
        "ip route add 198.51.100.0/24 via 192.168.7.9 table 7474",
        "ip route add 198.51.100.0/24 dev carrick-hop proto kernel table 7473",
        "ip route del fd44::/48 table 7473",
        "ip route add fd44::/48 dev carrick-hop metric 5 table 7473",
        "ip route append fd44::/48 dev eth0 metric 1024 table 7473",
        "ip route add fd44::/48 via 2001:db8:7::9 metric 2000 table 7473; ip route add fd44::/48 dev lo metric 7 table 7473",
        "ip route replace fd44::/48 via 2001:db8:7::9 table 7473",
        "ip route replace fd44::/48 table 7473 nexthop via 2001:db8:7::8 nexthop via 2001:db8:7::9",
        "ip route replace fd44::/48 dev carrick-hop src fd42::1 mtu 1300 proto kernel table 7473",
        "ip route del fd44::/48 table 7474; ip route add blackhole fd44::/48 table 7474",
        "ip route add default via 2001:db8:7::9 table 7474",
    ]);
}

#[test]
fn damaged_rules_are_repaired() {
    check_repair(&[
        "ip rule flush; ip rule add pref 32766 table main; ip rule add pref 32767 table default",
        "ip -6 rule flush; ip -6 rule add pref 32766 table main",
        "ip rule del pref 11 table 7473",
        "ip -6 rule del pref 12 table 7474",
        "ip rule add pref 11 table 7473 from 10.0.0.0/8",
        "ip rule add pref 12 table 7474",
        "ip rule del pref 12 table 7474; ip rule add pref 12 table 7474",
        "ip rule del pref 12 table 7474; ip rule add pref 12 iif lo table 7474",
        "ip rule del pref 12 table 7474; ip rule add pref 12 not iif lo table 7474 proto static",
        "ip rule del pref 12 table 7474; ip rule add pref 12 not iif lo table 7474 fwmark 7 proto kernel",
        "ip -6 rule del pref 11 table 7473; ip -6 rule add pref 11 table 7473 proto kernel",
        "ip -6 rule del pref 11 table 7473; ip -6 rule add pref 11 oif eth0 table 7473 proto kernel",
        "ip -6 rule del pref 11 table 7473; ip -6 rule add pref 11 not oif eth0 iif lo table 7473 proto kernel",
        "ip -6 rule add pref 11 table 7473 suppress_prefixlength 0; ip -6 rule add pref 11 table 7473 tos 8",
    ]);
}

#[test]
fn damaged_links_are_repaired() {
    check_repair(&[
        "ip link del carrick-wg0",
        "ip link set carrick-wg0 down",
        "ip link set carrick-wg0 mtu 1300",
        "ip link set carrick-wg0 addrgenmode eui64",
        "ip link set carrick-wg0 down; ip link set carrick-wg0 addrgenmode eui64 up",
        "ip addr add 10.9.9.9/32 dev carrick-wg0",
        "ip addr add fd99::1/128 dev carrick-wg0",
        "echo 0 > /proc/sys/net/ipv4/conf/carrick-wg0/forwarding",
        "echo 1 > /proc/sys/net/ipv4/conf/carrick-wg0/rp_filter",
        "echo 1 > /proc/sys/net/ipv4/conf/all/forwarding; echo 0 > /proc/sys/net/ipv4/conf/all/forwarding",
    ]);
}

#[test]
fn a_damaged_hop_is_repaired() {
    let renewed = |options: &str| format!("ip link del carrick-hop; ip link add carrick-hop arp off type {options}");
    let vxlan = |options: &str| renewed(&format!("vxlan {options}"));
    let others = [
        vxlan("external dstport 4789 srcport 27456 27471 nolearning udp6zerocsumrx"),
        vxlan("external dstport 27472 srcport 27456 27470 nolearning udp6zerocsumrx"),
        vxlan("external dstport 27472 srcport 27456 27471 learning udp6zerocsumrx"),
        vxlan("external dstport 27472 srcport 27456 27471 nolearning noudp6zerocsumrx"),
        vxlan("external dstport 27472 srcport 27456 27471 nolearning udp6zerocsumrx gbp"),
        vxlan("external dstport 27472 srcport 27456 27471 nolearning udp6zerocsumrx vnifilter"),
        vxlan("external dstport 27472 srcport 27456 27471 nolearning udp6zerocsumrx proxy"),
        vxlan("id 5 dstport 27472 srcport 27456 27471 nolearning udp6zerocsumrx"),
        renewed("bridge"),
    ];
    check_repair(&others.each_ref().map(String::as_str));
    check_repair(&[
        "ip link del carrick-hop",
        "ip link set carrick-hop down",
        "ip link set carrick-hop arp on",
        "ip link set carrick-hop mtu 1300",
        "ip link set carrick-hop down; ip link set carrick-hop addrgenmode eui64 up",
        "ip addr add 10.9.9.9/32 dev carrick-hop",
        "ip addr add fd99::1/128 dev carrick-hop",
        "echo 0 > /proc/sys/net/ipv4/conf/carrick-hop/forwarding",
        "echo 1 > /proc/sys/net/ipv4/conf/carrick-hop/rp_filter",
        "ethtool -K carrick-hop gro off",
    ]);
}

#[test]
fn damaged_overlay_addresses_are_repaired() {
    check_repair(&[
        "ip addr del fd63::1/128 dev lo",
        "ip -6 addr flush dev lo scope global to fd63::/64",
        "ip addr change fd63::1/128 dev lo preferred_lft forever",
        "ip addr change fd63::1/128 dev lo valid_lft 9999 preferred_lft 0",
        "ip addr del fd63::1/128 dev lo; ip addr add fd63::1/128 dev lo preferred_lft 0 nodad noprefixroute",
        "ip addr del fd63::1/128 dev lo; ip addr add fd63::1/64 dev lo preferred_lft 0 nodad noprefixroute",
    ]);
}

#[test]
fn a_damaged_nft_table_is_replaced() {
    check_repair(&[
        "nft delete table inet carrick",
        "nft flush table inet carrick",
        "nft flush chain inet carrick hop_in",
        "nft flush chain inet carrick hop_out",
        "nft flush chain inet carrick hop_guard",
        "nft flush chain inet carrick hop_untracked",
        "nft flush set inet carrick keep4",
        "nft flush set inet carrick keep4_wanted",
        "nft flush set inet carrick nodes4",
        "nft flush set inet carrick nodes6",
        "nft flush set inet carrick native",
        "nft flush set inet carrick hop_wanted",
        "nft add element inet carrick hop_wanted '{ 1 . 2 . 3 }'",
        "nft flush set inet carrick hop_wanted; nft add element inet carrick hop_wanted '{ 27472 . 27456 . 27470 }'",
        "nft add element inet carrick native '{ \"cni0\" }'",
        "nft add element inet carrick nodes4 '{ 192.168.7.9 }'",
        "nft add element inet carrick nodes6 '{ 2001:db8:7::9 }'",
        "nft add element inet carrick keep4 '{ 10.0.0.0/16 . 10.44.0.0/16 }'",
        "nft delete element inet carrick keep4 '{ 10.42.0.0/16 . 10.44.0.0/16 }'",
        "nft add element inet carrick keep6_wanted '{ fd42:: . 64 . fd44:: . 48 }'",
        "nft add rule inet carrick hop_in accept",
        "nft add rule inet carrick hop_guard accept",
        "nft insert rule inet carrick hop_in accept comment '\"the hop\"'",
        "nft insert rule inet carrick keep_source masquerade",
        "nft delete rule inet carrick hop_guard handle $(nft -a list table inet carrick | sed -n 's/.*local.*handle //p')",
        "nft add chain inet carrick hop_in '{ policy drop; }'",
        "nft add chain inet carrick more",
        "nft add set inet carrick more '{ type ipv4_addr; }'",
        "nft add table inet carrick '{ flags dormant; }'",
    ]);
    // Our priority is not our chain's to lose: the same rules at another hook priority are damage too.
    in_netns(|| async {
        let mut kernel = linux();
        let nft = typical().nft.unwrap();
        kernel.apply(&Op::GrowNft(nft.clone())).await.unwrap();
        for (ours, other) in [("priority 99", "priority 101"), ("-300", "-299"), ("27471 ip", "27470 ip")] {
            let text = super::nft::render(&nft).replace(ours, other);
            sh(&format!("nft -f - <<'E'\n{text}\nE"));
            assert_eq!(read(&mut kernel).await.nft, None);
        }
    });
}

#[test]
fn a_flushed_ruleset_is_noticed() {
    in_netns(|| async {
        let mut kernel = linux();
        foreign();
        reach(&mut kernel, &typical()).await;
        let mut watch = Watch::new().unwrap();
        drain(&mut watch).await;
        sh("nft flush ruleset");
        heard(&mut watch).await;
        assert_eq!(read(&mut kernel).await.nft, None);
        reach(&mut kernel, &typical()).await;
    });
}

#[test]
fn nothing_is_left_after_a_sweep_of_altered_things() {
    in_netns(|| async {
        foreign();
        let before = others();
        let mut kernel = linux();
        reach(&mut kernel, &typical()).await;
        sh("nft add chain inet carrick more; ip rule add pref 12 table 7474; ip -6 rule add pref 11 table 7473 tos 8");
        for op in diff(&State::default(), &read(&mut kernel).await).iter().chain(&sweep()).chain(&sweep()) {
            kernel.apply(op).await.unwrap_or_else(|error| panic!("{op:?}: {error}"));
        }
        assert_eq!(others(), before);
        let ours = "ip route show table 7473; ip route show table 7474; ip -6 route show table 7473
            ip -6 route show table 7474; ip rule | grep -E '^11:.*lookup 7473|^12:.*lookup 7474'; ip -o link | grep -E 'carrick-(wg0|hop):'
            ip addr show dev lo | grep fd63::1; nft list tables | grep 'inet carrick$'";
        assert_eq!(sh(&format!("( {ours} ) 2>/dev/null || true")), "");
    });
}

#[test]
fn deleting_what_is_not_there_succeeds_and_setting_without_a_device_says_so() {
    in_netns(|| async {
        let mut kernel = linux();
        let (table, to) = (Table::Remote, net("10.44.0.0/16"));
        kernel.apply(&Op::DelRoute { table, to }).await.unwrap();
        kernel.apply(&Op::DelRoute { table, to: net("fd44::/48") }).await.unwrap();
        kernel.apply(&Op::DelOverlay(OVERLAY)).await.unwrap();
        kernel.apply(&Op::DelLink(Interface::Hop)).await.unwrap();
        let device = Device(Ordinal::ZERO);
        for (interface, message) in [
            (Interface::WireGuard(device), "carrick-wg0 does not exist: is the tunnel running?"),
            (Interface::Hop, "carrick-hop does not exist"),
        ] {
            let error = kernel.apply(&Op::SetLink { interface, link: Link::ours(1420) }).await.unwrap_err();
            assert_eq!(error.to_string(), message);
        }
        let route = Route::Hop { mtu: None, source: None };
        let error = kernel.apply(&Op::SetRoute { table, to, route }).await.unwrap_err();
        assert_eq!(error.to_string(), "carrick-hop does not exist");
        assert_eq!(
            kernel.apply(&Op::SetRoute { table, to, route: Route::Other }).await.unwrap_err().kind(),
            io::ErrorKind::InvalidInput
        );
        let stranger = state::WireGuard { key: PrivateKey::new([99; 32]).public(), port: 1 };
        let error = kernel.apply(&Op::SetDevice { device, wireguard: stranger.clone() }).await.unwrap_err();
        assert_eq!(error.to_string(), format!("this node does not have the private key of {}", stranger.key));
    });
}

#[test]
fn a_link_is_deleted_even_if_its_tunnel_does_not_answer() {
    in_netns(|| async {
        let mut kernel = linux();
        sh("ip tuntap add carrick-wg0 mode tun");
        let error = kernel.apply(&Op::DelLink(Interface::WireGuard(Device(Ordinal::ZERO)))).await.unwrap_err();
        assert_eq!(error.to_string(), "carrick-wg0 is deleted, but not let go of: no such device");
        assert_eq!(read(&mut kernel).await, State::default());
    });
}

#[test]
fn privileges_are_read_from_the_effective_set() {
    assert!(has_net_admin("Name:\tx\nCapPrm:\t0\nCapEff:\t0000000000001000\nCapBnd:\t0\n").unwrap());
    assert!(!has_net_admin("CapPrm:\t000001ffffffffff\nCapEff:\t000001ffffffefff\n").unwrap());
    assert!(has_net_admin("Name:\tx\n").is_err());
    super::check_privileges().unwrap();
}

/// The kinds of the rtnetlink messages that tell of `work`, in their order.
async fn told(groups: &[MulticastGroup], work: impl Future<Output = io::Result<()>>) -> Vec<u16> {
    let mut socket = Socket::new(NETLINK_ROUTE).unwrap();
    socket.bind(&SocketAddr::new(0, 0)).unwrap();
    groups.iter().for_each(|group| socket.add_membership(*group as u32).unwrap());
    socket.set_non_blocking(true).unwrap();
    work.await.unwrap();
    let datagrams = std::iter::from_fn(|| socket.recv_from_full().ok());
    datagrams.map(|(datagram, _)| u16::from_ne_bytes([datagram[4], datagram[5]])).collect()
}

#[test]
fn repairs_leave_no_gap() {
    let (new_route, new_rule, del_rule) = (24, 32, 33);
    in_netns(|| async {
        foreign();
        let mut kernel = linux();
        reach(&mut kernel, &typical()).await;
        let rules = [MulticastGroup::Ipv4Rule, MulticastGroup::Ipv6Rule];
        for family in Family::ALL {
            let rule = Rule { family, table: Table::Closed };
            let flag = if family == Family::V4 { "-4" } else { "-6" };
            sh(&format!("ip {flag} rule del pref 12 table 7474; ip {flag} rule add pref 12 iif lo table 7474"));
            assert_eq!(told(&rules, kernel.apply(&Op::SetRule(rule, Lookups::Forwarded))).await, [new_rule, del_rule]);
        }
        let routes = [MulticastGroup::Ipv4Route, MulticastGroup::Ipv6Route];
        for to in ["10.44.0.0/16", "fd44::/48"] {
            for route in [Route::Throw, Route::Unreachable, Route::Hop { mtu: None, source: None }] {
                let set = Op::SetRoute { table: Table::Remote, to: net(to), route };
                assert_eq!(told(&routes, kernel.apply(&set)).await, [new_route], "{set:?}");
            }
        }
    });
}

/// A TUN that this test holds, in place of a tunnel or of a pod's link.
struct Tun(tun_rs::AsyncDevice);

impl Tun {
    fn new(name: &str) -> Tun {
        Tun(tun_rs::DeviceBuilder::new().name(name).build_async().unwrap())
    }

    async fn send(&self, packet: &[u8]) {
        self.0.send(packet).await.unwrap();
    }

    /// Source, destination and protocol of the next packet but those of IPv6's own housekeeping.
    async fn next(&self) -> (IpAddr, IpAddr, u8) {
        let mut packet = [0; 2000];
        loop {
            let received = tokio::time::timeout(Duration::from_secs(20), self.0.recv(&mut packet)).await;
            received.expect("a packet").unwrap();
            let v6 = |at: usize| IpAddr::from(<[u8; 16]>::try_from(&packet[at..at + 16]).unwrap());
            let v4 = |at: usize| IpAddr::from(<[u8; 4]>::try_from(&packet[at..at + 4]).unwrap());
            match packet[0] >> 4 {
                4 => return (v4(12), v4(16), packet[9]),
                _ if v6(24).is_multicast() => {}
                _ => return (v6(8), v6(24), packet[6]),
            }
        }
    }
}

const UDP: u8 = 17;

/// A UDP packet from and to port 4444, without payload.
fn udp(from: &str, to: &str) -> Vec<u8> {
    udp_between((from, 4444), (to, 4444))
}

fn udp_between((from, from_port): (&str, u16), (to, to_port): (&str, u16)) -> Vec<u8> {
    let ports = [from_port.to_be_bytes(), to_port.to_be_bytes()].concat();
    let datagram = |checksum: u16| [&ports, [0, 8].as_slice(), &checksum.to_be_bytes()].concat();
    match (from.parse().unwrap(), to.parse().unwrap()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let header = |checksum: u16| {
                let start = [0x45, 0, 0, 28, 0, 0, 0, 0, 64, UDP];
                [&start, checksum.to_be_bytes().as_slice(), &from.octets(), &to.octets()].concat()
            };
            [header(checksum(&header(0))), datagram(0)].concat()
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let pseudo = [&from.octets(), to.octets().as_slice(), &[0, 0, 0, 8, 0, 0, 0, UDP], &datagram(0)].concat();
            let start = [0x60, 0, 0, 0, 0, 8, UDP, 64];
            [&start, from.octets().as_slice(), &to.octets(), &datagram(checksum(&pseudo))].concat()
        }
        _ => panic!("one family"),
    }
}

/// RFC 1071, of an even number of bytes.
fn checksum(bytes: &[u8]) -> u16 {
    let sum: u32 = bytes.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    !u16::try_from((folded & 0xffff) + (folded >> 16)).unwrap()
}

#[test]
fn what_goes_to_a_remote_range_keeps_its_source() {
    in_netns(|| async {
        sh("for a in 10.42.0.1 10.42.7.7; do ip addr add $a/32 dev lo; done
            for a in fd42::1 fd42::7; do ip addr add $a/128 dev lo nodad; done
            nft add table inet cni; nft 'add chain inet cni out { type nat hook postrouting priority 100; }'
            nft add rule inet cni out oifname out0 masquerade");
        let out = Tun::new("out0");
        sh("ip link set out0 addrgenmode none up; ip addr add 10.99.0.1/32 dev out0
            ip addr add fd99::1/128 dev out0 nodad
            ip route add default dev out0; ip -6 route add default dev out0");
        let mut kernel = linux();
        reach(&mut kernel, &State { nft: Some(typical_nft()), ..State::default() }).await;
        for (own, remote, elsewhere) in
            [("10.42.7.7", "10.44.0.9", "203.0.113.9"), ("fd42::7", "fd44::9", "2001:db8:99::9")]
        {
            let socket = tokio::net::UdpSocket::bind((own.parse::<IpAddr>().unwrap(), 4444)).await.unwrap();
            socket.send_to(b"question", (elsewhere, 5555)).await.unwrap();
            let (source, ..) = out.next().await;
            assert_ne!(source, own.parse::<IpAddr>().unwrap(), "the test's masquerade works");
            socket.send_to(b"question", (remote, 5555)).await.unwrap();
            assert_eq!(out.next().await, (own.parse().unwrap(), remote.parse().unwrap(), UDP));
            // Not an answer but a connection of its own.
            out.send(&udp(remote, own)).await;
            let received = tokio::time::timeout(Duration::from_secs(20), socket.recv_from(&mut [0; 9])).await;
            let (_, sender) = received.expect("a packet").unwrap();
            socket.send_to(b"answer", sender).await.unwrap();
            assert_eq!(out.next().await, (own.parse().unwrap(), remote.parse().unwrap(), UDP));
        }
    });
}

/// What the node has tracked, a line for each connection.
fn tracked() -> usize {
    sh("conntrack -L -f ipv4 2>/dev/null; conntrack -L -f ipv6 2>/dev/null").lines().count()
}

#[test]
fn a_pod_reaches_no_hop_port_and_the_hop_is_not_tracked() {
    in_netns(|| async {
        let (pod, underlay) = (Tun::new("pod0"), Tun::new("eth0"));
        sh("echo 1 > /proc/sys/net/ipv4/ip_forward; echo 1 > /proc/sys/net/ipv6/conf/all/forwarding
            for link in pod0 eth0; do echo 0 > /proc/sys/net/ipv4/conf/$link/rp_filter; done
            ip link set pod0 addrgenmode none up; ip link set eth0 addrgenmode none up
            ip addr add 192.168.7.2/24 dev eth0; ip addr add 2001:db8:7::2/64 dev eth0 nodad
            ip addr add 10.42.0.1/32 dev lo; ip addr add fd42::1/128 dev lo nodad
            ip route add 10.42.0.0/16 dev pod0; ip route add fd42::/48 dev pod0");
        let mut kernel = linux();
        reach(&mut kernel, &State { nft: Some(typical_nft()), ..State::default() }).await;
        for (own, node, on_pods_side, other, pods) in [
            ("0.0.0.0", "192.168.7.2", "10.42.0.1", "192.168.7.3", "10.42.7.7"),
            ("::", "2001:db8:7::2", "fd42::1", "2001:db8:7::3", "fd42::7"),
        ] {
            let any = own.parse::<IpAddr>().unwrap();
            let hop = tokio::net::UdpSocket::bind((any, 27472)).await.unwrap();
            let before = tracked();
            for source in [pods, other] {
                for to in [node, on_pods_side, other] {
                    pod.send(&udp_between((source, 27456), (to, 27472))).await;
                }
            }
            // Every other port of theirs is theirs to use; nothing forged came before it.
            pod.send(&udp_between((pods, 27456), (other, 27471))).await;
            assert_eq!(underlay.next().await, (pods.parse().unwrap(), other.parse().unwrap(), UDP));
            assert_eq!(tracked(), before + 1);
            underlay.send(&udp_between((other, 27471), (node, 27472))).await;
            let received = tokio::time::timeout(Duration::from_secs(20), hop.recv_from(&mut [0; 9])).await;
            assert_eq!(received.expect("the hop's").unwrap().1, (other.parse::<IpAddr>().unwrap(), 27471).into());
            let own_hop = tokio::net::UdpSocket::bind((any, 27460)).await.unwrap();
            own_hop.send_to(b"", (other, 27472)).await.unwrap();
            assert_eq!(underlay.next().await, (node.parse().unwrap(), other.parse().unwrap(), UDP));
            assert_eq!(tracked(), before + 1);
        }
        let dropped = "nft list chain inet carrick hop_guard | grep -o 'packets [0-9]*'";
        assert_eq!(sh(dropped), "packets 2\npackets 2\npackets 8\n");
    });
}

#[test]
fn without_the_hop_nothing_for_a_remote_range_is_forwarded() {
    in_netns(|| async {
        let (pod, out) = (Tun::new("pod0"), Tun::new("out0"));
        sh("echo 1 > /proc/sys/net/ipv4/ip_forward; echo 1 > /proc/sys/net/ipv6/conf/all/forwarding
            for link in pod0 out0; do echo 0 > /proc/sys/net/ipv4/conf/$link/rp_filter; done
            ip link set pod0 addrgenmode none up; ip link set out0 addrgenmode none up
            ip addr add 10.42.0.1/32 dev lo; ip addr add fd42::1/128 dev lo nodad
            ip route add 10.42.0.0/16 dev pod0; ip route add fd42::/48 dev pod0
            ip route add default dev out0; ip -6 route add default dev out0");
        let mut kernel = linux();
        reach(&mut kernel, &typical()).await;
        sh("ip link del carrick-hop");
        let (icmp, icmpv6) = (1, 58);
        for (own, gateway, remote, throw, elsewhere, refusal) in [
            ("10.42.7.7", "10.42.0.1", "10.44.0.9", Some("10.44.9.9"), "203.0.113.9", icmp),
            ("fd42::7", "fd42::1", "fd44::9", None, "2001:db8:99::9", icmpv6),
        ] {
            pod.send(&udp(own, remote)).await;
            assert_eq!(pod.next().await, (gateway.parse().unwrap(), own.parse().unwrap(), refusal));
            // A carved-out address and the rest of the world go on, and are the first that come out.
            for passing in throw.into_iter().chain([elsewhere]) {
                pod.send(&udp(own, passing)).await;
                assert_eq!(out.next().await, (own.parse().unwrap(), passing.parse().unwrap(), UDP));
            }
        }
    });
}
