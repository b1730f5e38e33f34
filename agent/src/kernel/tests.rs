//! The laws of the kernel layer, tried on the real kernel: each test in a network namespace of its own. They need root.

#![allow(clippy::unwrap_used)]

use std::{
    collections::{BTreeMap, BTreeSet},
    future::Future,
    io::{self, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    process::{Command, Stdio},
    time::Duration,
};

use ipnetwork::IpNetwork;
use nix::sched::{CloneFlags, unshare};
use proptest::prelude::*;

use super::{
    Linux, Secrets, WgDevice, WireGuard,
    events::{Event, Watch},
    has_net_admin,
    prefix::around,
    sweep,
};
use crate::{
    keys::{PresharedKey, PrivateKey, PublicKey},
    names::{Device, Ordinal, Table},
    reconcile::Kernel,
    state::{self, Family, Link, Nft, Op, Peer, Route, Rule, State},
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

fn linux() -> Linux<Husks> {
    let private = Device::all().map(private).map(|key| (key.public(), key)).collect();
    Linux::new(Husks::default(), Secrets { private, preshared: BTreeMap::new() }).unwrap()
}

/// A reading without failures.
async fn read(kernel: &mut Linux<Husks>) -> State {
    let reading = kernel.read().await;
    assert!(reading.failed.is_empty(), "{:?}", reading.failed);
    reading.state
}

/// What leads from one state to the other; the real diff in small, and without its order among makes.
fn steps(wanted: &State, actual: &State) -> Vec<Op> {
    let mut ops = Vec::new();
    for (device, wireguard) in &wanted.wireguard {
        if actual.wireguard.get(device) != Some(wireguard) || !actual.links.contains_key(device) {
            ops.push(Op::SetDevice { device: *device, wireguard: wireguard.clone() });
        }
    }
    for (device, link) in &wanted.links {
        if actual.links.get(device) != Some(link) {
            ops.push(Op::SetLink { device: *device, link: link.clone() });
        }
    }
    if let Some(nft) = wanted.nft.as_ref().filter(|nft| actual.nft.as_ref() != Some(nft)) {
        ops.push(Op::GrowNft(nft.clone()));
    }
    ops.extend(wanted.rules.difference(&actual.rules).map(|rule| Op::AddRule(*rule)));
    for ((table, to), route) in &wanted.routes {
        if actual.routes.get(&(*table, *to)) != Some(route) {
            ops.push(Op::SetRoute { table: *table, to: *to, route: route.clone() });
        }
    }
    let stale = actual.routes.keys().filter(|place| !wanted.routes.contains_key(place));
    ops.extend(stale.map(|(table, to)| Op::DelRoute { table: *table, to: *to }));
    ops.extend(actual.rules.difference(&wanted.rules).map(|rule| Op::DelRule(*rule)));
    if wanted.nft.is_none() && actual.nft.is_some() {
        ops.push(Op::ShrinkNft(None));
    }
    let stale = actual.links.keys().filter(|device| !wanted.links.contains_key(device));
    ops.extend(stale.map(|device| Op::DelDevice { device: *device }));
    ops
}

/// For the eye: what differs between two states.
fn lines(state: &State) -> String {
    let State { links, wireguard, routes, rules, nft, .. } = state;
    let routes = routes.iter().map(|((table, to), route)| format!("{to} table {table}: {route:?}\n"));
    format!("{links:?}\n{wireguard:?}\n{}{rules:?}\n{nft:?}", routes.collect::<String>())
}

async fn reach(kernel: &mut Linux<Husks>, wanted: &State) {
    let actual = read(kernel).await;
    for op in steps(wanted, &actual) {
        kernel.apply(&op).await.unwrap_or_else(|error| panic!("{op:?}: {error}"));
    }
    let reached = read(kernel).await;
    assert_eq!(lines(&reached), lines(wanted));
    assert_eq!(&reached, wanted);
    assert_eq!(steps(wanted, &reached), vec![]);
}

const OWN: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(10, 42, 0, 1)), IpAddr::V6(Ipv6Addr::new(0xfd42, 0, 0, 0, 0, 0, 0, 1))];

/// A node with a native device, and with what others have put close to what is ours.
fn foreign() {
    sh("ip link add eth0 type veth peer name carrick-wg; ip link set carrick-wg addrgenmode none up
        ip link add carrick-wg8 type veth peer name carrick-wg00; ip link set eth0 addrgenmode none up
        ip link property add dev eth0 altname carrick-wg7
        ip addr add 192.168.7.2/24 dev eth0; ip addr add 2001:db8:7::2/64 dev eth0 nodad
        ip addr add 10.42.0.1/32 dev lo; ip addr add fd42::1/128 dev lo nodad
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

/// Everything that is not ours, as the tools print it.
fn others() -> String {
    sh("ip -oneline -details route show table all | grep -Ev 'carrick-wg[0-7] |table 747[34]' || true
        ip -oneline -details -6 route show table all | grep -Ev 'carrick-wg[0-7] |table 747[34]' || true
        ip -details rule | grep -Ev '^11:.*lookup 7473|^12:.*lookup 7474' || true
        ip -details -6 rule | grep -Ev '^11:.*lookup 7473|^12:.*lookup 7474' || true
        for link in lo eth0 carrick-wg8 carrick-wg00 carrick-wg; do ip -details addr show dev $link; done
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

pub(crate) fn any_nft() -> impl Strategy<Value = Nft> {
    let pair = || prop_oneof![(any_prefix(true), any_prefix(true)), (any_prefix(false), any_prefix(false))];
    let pairs = move || proptest::collection::btree_set(pair(), 0..12);
    (pairs(), pairs()).prop_map(|(keep_source, admit)| Nft { keep_source, admit })
}

fn any_device(of: u8) -> impl Strategy<Value = Device> {
    (0..of).prop_map(|n| Device(Ordinal::new(n.into()).unwrap()))
}

fn any_link() -> impl Strategy<Value = Link> {
    (1280_u32..9000, any::<bool>(), 0_u8..3).prop_map(|(mtu, forwarding, rp_filter)| Link {
        forwarding,
        rp_filter,
        ..Link::ours(mtu)
    })
}

/// A route of that prefix, through one of that many devices.
fn any_route(to: IpNetwork, devices: u8) -> BoxedStrategy<Route> {
    let source = OWN.into_iter().find(|own| own.is_ipv4() == to.is_ipv4());
    let source = prop_oneof![Just(None), Just(source)];
    let dev = (any_device(devices.max(1)), source).prop_map(|(device, source)| Route::Dev { device, source });
    if devices == 0 {
        return prop_oneof![Just(Route::Throw), Just(Route::Unreachable)].boxed();
    }
    prop_oneof![4 => dev, 1 => Just(Route::Throw), 1 => Just(Route::Unreachable)].boxed()
}

fn any_state() -> impl Strategy<Value = State> {
    let rule = (prop_oneof![Just(Family::V4), Just(Family::V6)], prop_oneof![Just(Table::Remote), Just(Table::Closed)])
        .prop_map(|(family, table)| Rule { family, table });
    let rules = proptest::collection::btree_set(rule, 0..5);
    let links = proptest::collection::vec(any_link(), 0..3);
    (links, rules, proptest::option::of(any_nft())).prop_flat_map(|(links, rules, nft)| {
        let devices = links.len() as u8;
        let table = prop_oneof![Just(Table::Remote), Just(Table::Closed)];
        let place = (table, either_family());
        let route = place.prop_flat_map(move |place| any_route(place.1, devices).prop_map(move |route| (place, route)));
        proptest::collection::vec(route, 0..30).prop_map(move |routes| {
            let links: BTreeMap<Device, Link> = Device::all().zip(links.clone()).collect();
            let key = |device: &Device| {
                let port = 27473 + u16::from(device.0.get());
                (*device, state::WireGuard { key: private(*device).public(), port })
            };
            State {
                wireguard: links.keys().map(key).collect(),
                links,
                routes: routes.into_iter().collect(),
                rules: rules.clone(),
                nft: nft.clone(),
                ..State::default()
            }
        })
    })
}

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

/// One device, and a route of each kind in both families.
fn typical() -> State {
    let device = Device(Ordinal::ZERO);
    let dev = |source| Route::Dev { device, source: Some(source) };
    State {
        wireguard: BTreeMap::from([(device, state::WireGuard { key: private(device).public(), port: 27473 })]),
        links: BTreeMap::from([(device, Link::ours(1420))]),
        routes: BTreeMap::from([
            ((Table::Remote, net("10.44.0.0/16")), dev(OWN[0])),
            ((Table::Remote, net("fd44::/48")), dev(OWN[1])),
            ((Table::Remote, net("10.44.9.9/32")), Route::Throw),
            ((Table::Closed, net("10.44.0.0/16")), Route::Unreachable),
            ((Table::Closed, net("fd44::/48")), Route::Unreachable),
            ((Table::Closed, net("10.44.9.9/32")), Route::Throw),
        ]),
        rules: Family::ALL.into_iter().flat_map(|family| Table::ALL.map(|table| Rule { family, table })).collect(),
        nft: Some(Nft {
            keep_source: BTreeSet::from([
                (net("10.42.0.0/16"), net("10.44.0.0/16")),
                (net("fd42::/48"), net("fd44::/48")),
            ]),
            admit: BTreeSet::from([
                (net("10.44.0.0/16"), net("10.42.0.0/16")),
                (net("10.44.0.0/16"), net("10.42.7.0/24")),
                (net("fd44::/48"), net("fd42::/48")),
            ]),
        }),
        ..State::default()
    }
}

/// Waits for an event that says to look at what is ours.
async fn heard(watch: &mut Watch) {
    let ours = async { while !matches!(watch.next().await, Event::Ours | Event::Overrun) {} };
    tokio::time::timeout(Duration::from_secs(20), ours).await.expect("an event");
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
        "ip route add 10.44.0.0/16 dev carrick-wg0 metric 5 table 7473",
        "ip route add 10.44.0.0/16 via 192.168.7.9 metric 0 tos 0x10 table 7473",
        "ip route append 10.44.0.0/16 via 192.168.7.9 table 7473",
        "ip route prepend 10.44.0.0/16 via 192.168.7.9 table 7473",
        "ip route prepend throw 10.44.0.0/16 table 7474",
        "ip route replace 10.44.0.0/16 via 192.168.7.9 table 7473",
        "ip route replace 10.44.0.0/16 dev carrick-wg0 src 10.42.0.1 mtu 1300 proto kernel table 7473",
        "ip route replace 10.44.0.0/16 dev carrick-wg0 src 10.42.0.1 proto static table 7473",
        "ip route replace 10.44.0.0/16 dev carrick-wg0 proto kernel table 7473",
        "ip route replace 10.44.0.0/16 table 7473 nexthop via 192.168.7.8 nexthop via 192.168.7.9",
        "ip route replace blackhole 10.44.0.0/16 table 7474",
        "ip route replace 10.44.9.9/32 via 192.168.7.9 table 7473",
        "ip route add default via 192.168.7.9 table 7473",
        "ip route add 198.51.100.0/24 via 192.168.7.9 table 7474",
        "ip route add 198.51.100.0/24 dev carrick-wg0 proto kernel table 7473",
        "ip route del fd44::/48 table 7473",
        "ip route add fd44::/48 dev carrick-wg0 metric 5 table 7473",
        "ip route append fd44::/48 dev eth0 metric 1024 table 7473",
        "ip route add fd44::/48 via 2001:db8:7::9 metric 2000 table 7473; ip route add fd44::/48 dev lo metric 7 table 7473",
        "ip route replace fd44::/48 via 2001:db8:7::9 table 7473",
        "ip route replace fd44::/48 table 7473 nexthop via 2001:db8:7::8 nexthop via 2001:db8:7::9",
        "ip route replace fd44::/48 dev carrick-wg0 src fd42::1 mtu 1300 proto kernel table 7473",
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
fn a_damaged_nft_table_is_replaced() {
    check_repair(&[
        "nft delete table inet carrick",
        "nft flush table inet carrick",
        "nft flush chain inet carrick admit",
        "nft flush set inet carrick admit4",
        "nft flush set inet carrick admit4_wanted",
        "nft add element inet carrick admit4 '{ 10.0.0.0/8 . 10.42.0.0/16 }'",
        "nft delete element inet carrick keep4 '{ 10.42.0.0/16 . 10.44.0.0/16 }'",
        "nft add element inet carrick admit6_wanted '{ fd44:: . 64 . fd42:: . 48 }'",
        "nft add rule inet carrick admit accept",
        "nft insert rule inet carrick admit accept comment 'offered'",
        "nft insert rule inet carrick keep_source masquerade",
        "nft delete rule inet carrick admit handle $(nft -a list table inet carrick | sed -n 's/.*drop.*handle //p')",
        "nft add chain inet carrick admit '{ policy drop; }'",
        "nft add chain inet carrick more",
        "nft add set inet carrick more '{ type ipv4_addr; }'",
        "nft add table inet carrick '{ flags dormant; }'",
    ]);
    // Our priority is not our chain's to lose: the same rules at another hook priority are damage too.
    in_netns(|| async {
        let mut kernel = linux();
        let nft = typical().nft.unwrap();
        kernel.apply(&Op::GrowNft(nft.clone())).await.unwrap();
        let text = super::nft::render(&nft).replace("priority 99", "priority 101");
        sh(&format!("nft -f - <<'E'\n{text}\nE"));
        assert_eq!(read(&mut kernel).await.nft, None);
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
        for op in steps(&State::default(), &read(&mut kernel).await).iter().chain(&sweep()).chain(&sweep()) {
            kernel.apply(op).await.unwrap_or_else(|error| panic!("{op:?}: {error}"));
        }
        assert_eq!(others(), before);
        let ours = "ip route show table 7473; ip route show table 7474; ip -6 route show table 7473
            ip -6 route show table 7474; ip rule | grep -E '^11:.*lookup 7473|^12:.*lookup 7474'; ip -o link | grep 'carrick-wg0:'
            nft list tables | grep 'inet carrick$'";
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
        let device = Device(Ordinal::ZERO);
        let error = kernel.apply(&Op::SetLink { device, link: Link::ours(1420) }).await.unwrap_err();
        assert_eq!(error.to_string(), "carrick-wg0 does not exist: is the tunnel running?");
        let route = Route::Dev { device, source: None };
        let error = kernel.apply(&Op::SetRoute { table, to, route }).await.unwrap_err();
        assert_eq!(error.to_string(), "carrick-wg0 does not exist: is the tunnel running?");
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
        let error = kernel.apply(&Op::DelDevice { device: Device(Ordinal::ZERO) }).await.unwrap_err();
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
