//! Strategies: maps with few entries, and packets whose addresses mostly hit them.

use std::collections::{BTreeMap, BTreeSet};

use ebpf::{Addr, Answer, Config, NO_SLOT, Node, Reach, Remote, SLOTS, V4_PREFIX, probe, remote};
use proptest::{bool::weighted, collection::vec, option, prelude::*, sample::select};

use super::{
    model::{Context, Key, Prefix, World, lookup},
    packet::{
        ACK, Eth, Extension, ExtensionKind, FIN, Fragment, Harm, Ip, L4, Packet, Probe, RST, SYN, TcpOption, is_v4,
    },
};

pub const HOP_IFINDEX: u32 = 70;
pub const PROBE_PORT: u16 = 27455;
pub const HOP_PORT: u16 = 27472;
pub const WIREGUARD_PORT: u16 = 27473;
pub const VNI: [u32; 2] = [0x12_3456, 0xab_cdef];
pub const MAC: [[u8; 6]; 2] = [[2, 0xaa, 1, 2, 3, 4], [6, 0xbb, 5, 6, 7, 8]];
pub const HOP_MAC: [u8; 6] = [2, 0x40, 0x50, 0x60, 0x70, 0x80];
/// This member, and every id that something is written for.
pub const SELF: u16 = 1;
pub const MEMBERS: [u16; 5] = [0, SELF, 2, 3, 4095];

/// One packet, and what a program knows of it besides.
#[derive(Clone, Debug)]
pub struct Case {
    pub packet: Packet,
    pub context: Context,
}

/// What the addresses of a packet should mostly be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Own pods towards remote ranges.
    Out,
    /// Remote ranges towards own pods.
    In,
    /// Of the hop: pods of other nodes towards remote ranges, and the other way.
    Hop,
}

pub fn text(addr: &str) -> Addr {
    match addr.parse().expect("an address") {
        std::net::IpAddr::V4(addr) => Addr::v4(addr.octets()),
        std::net::IpAddr::V6(addr) => Addr(addr.octets()),
    }
}

pub fn prefix(text_of: &str) -> Prefix {
    let (addr, len) = text_of.split_once('/').expect("a prefix");
    let (addr, len) = (text(addr), len.parse::<u32>().expect("a length"));
    (addr, if is_v4(addr) { V4_PREFIX + len } else { len })
}

const REMOTE: [(&str, u16, u8); 13] = [
    ("10.44.0.0/16", 2, remote::RANGE),
    ("10.44.128.0/17", 3, remote::RANGE),
    ("10.45.0.0/16", 3, remote::RANGE),
    ("10.46.7.0/24", 4095, remote::RANGE),
    ("10.44.9.9/32", 2, remote::CARVED),
    ("2001:db8:44::/48", 2, remote::RANGE),
    ("2001:db8:44:8000::/49", 3, remote::RANGE),
    ("2001:db8:46::/48", 4095, remote::RANGE),
    ("2001:db8:44::99/128", 2, remote::CARVED),
    ("fdaa:bbbb:cccc:1::/64", SELF, remote::OVERLAY),
    ("fdaa:bbbb:cccc:2::/64", 2, remote::OVERLAY),
    ("fdaa:bbbb:cccc:3::/64", 3, remote::OVERLAY),
    ("fdaa:bbbb:cccc:fff::/64", 4095, remote::OVERLAY),
];
const OWN: [(&str, &[u16]); 6] = [
    ("10.42.0.0/16", &[2, 3, 4095]),
    ("10.42.64.0/18", &[2]),
    ("10.43.0.0/16", &[0, 4095]),
    ("2001:db8:42::/48", &[2, 3]),
    ("2001:db8:42:9::/64", &[64]),
    ("192.0.2.10/32", &[2, 3]),
];
/// The node is an index into [`NODES`]; `None` is this one.
const HOMES: [(&str, Option<usize>); 14] = [
    ("10.42.0.0/24", None),
    ("10.42.1.0/24", Some(0)),
    ("10.42.1.77/32", None),
    ("10.42.2.0/24", Some(1)),
    ("10.42.70.0/24", Some(2)),
    ("10.43.0.0/24", Some(3)),
    ("192.0.2.10/32", None),
    ("2001:db8:42::/64", None),
    ("2001:db8:42:1::/64", Some(0)),
    ("2001:db8:42:2::/64", Some(2)),
    ("2001:db8:42:2::7/128", None),
    ("fdaa:bbbb:cccc:1::2/128", Some(0)),
    ("fdaa:bbbb:cccc:1:8000::12/128", Some(1)),
    ("fdaa:bbbb:cccc:1:8000::13/128", Some(2)),
];
/// The other nodes of this cluster: slot, IPv4, IPv6.
const NODES: [(u8, Option<&str>, Option<&str>); 4] = [
    (1, Some("192.0.2.11"), Some("2001:db8:f::11")),
    (NO_SLOT, Some("192.0.2.12"), Some("2001:db8:f::12")),
    (NO_SLOT, None, Some("2001:db8:f::13")),
    (4, None, Some("2001:db8:f::14")),
];
const HOP: [&str; 2] = ["192.0.2.10", "2001:db8:f::10"];

const OWN_V4: &[&str] = &[
    "10.42.0.2",
    "10.42.0.2",
    "10.42.1.2",
    "10.42.1.77",
    "10.42.2.2",
    "10.42.70.3",
    "10.42.200.9",
    "10.43.0.8",
    "192.0.2.10",
];
const OWN_V6: &[&str] =
    &["2001:db8:42::2", "2001:db8:42:1::2", "2001:db8:42:2::2", "2001:db8:42:2::7", "2001:db8:42:9::1"];
const REMOTE_V4: &[&str] = &["10.44.0.5", "10.44.200.1", "10.45.1.1", "10.46.7.3", "10.44.9.9"];
const REMOTE_V6: &[&str] = &["2001:db8:44::5", "2001:db8:44:9000::1", "2001:db8:46::3", "2001:db8:44::99"];
const OVERLAY: &[&str] = &[
    "fdaa:bbbb:cccc:1::1",
    "fdaa:bbbb:cccc:1::2",
    "fdaa:bbbb:cccc:1::3",
    "fdaa:bbbb:cccc:1::5",
    "fdaa:bbbb:cccc:1:8000::10",
    "fdaa:bbbb:cccc:1:8000::12",
    "fdaa:bbbb:cccc:1:8000::13",
    "fdaa:bbbb:cccc:2::1",
    "fdaa:bbbb:cccc:2::8",
    "fdaa:bbbb:cccc:2::9",
    "fdaa:bbbb:cccc:2::",
    "fdaa:bbbb:cccc:fff::3",
    "fdaa:bbbb:cccc:2:8000::1",
    "fdaa:bbbb:cccc:2:0:1:0:1",
    "fdaa:bbbb:cccc:7::1",
];
const OTHER_V4: &[&str] =
    &["192.0.2.11", "192.0.2.12", "8.8.8.8", "169.254.1.1", "224.0.0.5", "255.255.255.255", "127.0.0.1", "0.0.0.0"];
const OTHER_V6: &[&str] =
    &["2001:db8:f::11", "2001:db8:f::13", "2001:4860::8888", "fe80::1", "ff02::1", "::1", "::", "::ffff:10.44.0.5"];

fn pick(pool: &'static [&'static str]) -> impl Strategy<Value = Addr> + Clone {
    select(pool).prop_map(text)
}

/// Source and destination, of one family.
fn addresses(way: Way) -> impl Strategy<Value = (Addr, Addr)> {
    let out = prop_oneof![(pick(OWN_V4), pick(REMOTE_V4)), (pick(OWN_V6), pick(REMOTE_V6))].boxed();
    let back = out.clone().prop_map(|(src, dst)| (dst, src)).boxed();
    let own = prop_oneof![(pick(OWN_V4), pick(OWN_V4)), (pick(OWN_V6), pick(OWN_V6))];
    let v4 = || prop_oneof![2 => pick(OWN_V4), 2 => pick(REMOTE_V4), 3 => pick(OTHER_V4)];
    let v6 = || prop_oneof![2 => pick(OWN_V6), 2 => pick(REMOTE_V6), 3 => pick(OTHER_V6), 2 => pick(OVERLAY)];
    let any = prop_oneof![(v4(), v4()), (v6(), v6())];
    let [out_weight, back_weight] = match way {
        Way::Out => [12, 0],
        Way::In => [0, 12],
        Way::Hop => [6, 6],
    };
    prop_oneof![out_weight + 1 => out, back_weight + 1 => back, 1 => own, 4 => any]
}

fn port() -> impl Strategy<Value = u16> {
    let known = [PROBE_PORT, HOP_PORT, WIREGUARD_PORT - 1, WIREGUARD_PORT, WIREGUARD_PORT + 7, WIREGUARD_PORT + 8];
    prop_oneof![2 => select(known.to_vec()), 1 => any::<u16>()]
}

fn tcp_option() -> impl Strategy<Value = TcpOption> {
    let mss = prop_oneof![select(vec![0, 536, 1220, 1240, 1360, 1380, 1400, 1460, 65535]), any::<u16>()];
    prop_oneof![
        6 => Just(TcpOption::Nop),
        8 => mss.prop_map(TcpOption::Mss),
        2 => any::<u8>().prop_map(TcpOption::WindowScale),
        2 => Just(TcpOption::SackPermitted),
        2 => Just(TcpOption::Timestamps),
        1 => Just(TcpOption::End),
        1 => (any::<u8>(), 0..12_u8).prop_map(|(kind, len)| TcpOption::Any(kind, len)),
    ]
}

fn probe_packet() -> impl Strategy<Value = L4> {
    let magic = prop_oneof![30 => Just(probe::MAGIC), 1 => any::<[u8; 4]>()];
    let kind = prop_oneof![20 => Just(probe::ASK), 10 => Just(probe::ANSWER), 1 => any::<u8>()];
    let len = prop_oneof![30 => Just(probe::LEN), 3 => 0..600_usize, 3 => 600..1500_usize];
    let ports = prop_oneof![30 => Just([PROBE_PORT; 2]), 1 => (port(), port()).prop_map(|(a, b)| [a, b])];
    (magic, kind, any::<u8>(), any::<u16>(), any::<u64>(), len, ports).prop_map(
        |(magic, kind, flags, mtu, nonce, len, ports)| L4::Probe {
            ports,
            probe: Probe { magic, kind, flags, mtu, nonce, len },
        },
    )
}

fn l4() -> impl Strategy<Value = L4> {
    let flags = select(vec![SYN, SYN, SYN | ACK, ACK, RST, FIN | ACK, SYN | FIN, 0]);
    let ports = || (port(), port()).prop_map(|(a, b)| [a, b]);
    prop_oneof![
        6 => (ports(), flags, vec(tcp_option(), 0..7), 0..60_usize)
            .prop_map(|(ports, flags, options, payload)| L4::Tcp { ports, flags, options, payload }),
        5 => (ports(), weighted(0.9), 0..60_usize)
            .prop_map(|(ports, checksum, payload)| L4::Udp { ports, checksum, payload }),
        1 => (any::<u8>(), any::<u8>(), 0..60_usize)
            .prop_map(|(kind, code, payload)| L4::Icmp { kind, code, payload }),
        1 => (select(vec![1, 2, 3, 4, 11, 12]), 0..5_u8).prop_map(|(kind, code)| L4::IcmpError { kind, code }),
        1 => (any::<u8>(), 0..60_usize).prop_map(|(protocol, payload)| L4::Other { protocol, payload }),
        1 => probe_packet(),
    ]
}

fn fragment() -> impl Strategy<Value = Option<Fragment>> {
    let offset = prop_oneof![Just(0), Just(1), 0..0x1fff_u16];
    option::weighted(0.06, (offset, any::<bool>()).prop_map(|(offset, more)| Fragment { offset, more }))
}

fn extensions() -> impl Strategy<Value = Vec<Extension>> {
    let kind = select(vec![ExtensionKind::HopByHop, ExtensionKind::Routing, ExtensionKind::Destination]);
    let some = vec((kind, 0..4_u8).prop_map(|(kind, more)| Extension { kind, more }), 1..4);
    prop_oneof![9 => Just(vec![]), 1 => some]
}

fn ip(addresses: impl Strategy<Value = (Addr, Addr)>) -> impl Strategy<Value = Ip> {
    let ttl = prop_oneof![4 => Just(64), 1 => 0..3_u8, 1 => any::<u8>()];
    let options = prop_oneof![12 => Just(0), 1 => 1..=10_usize];
    (addresses, ttl, any::<u8>(), weighted(0.8), options, extensions(), fragment()).prop_map(
        |((src, dst), ttl, tos, dont_fragment, options, extensions, fragment)| Ip {
            src,
            dst,
            ttl,
            tos,
            dont_fragment,
            options,
            extensions,
            fragment,
        },
    )
}

fn eth() -> impl Strategy<Value = Eth> {
    let dst = prop_oneof![10 => Just(MAC[0]), 4 => Just(MAC[1]), 1 => Just(HOP_MAC), 1 => any::<[u8; 6]>()];
    let ethertype =
        prop_oneof![40 => Just(None), 1 => select(vec![0x0806, 0x0800, 0x86dd, 0x8847, 0x0100]).prop_map(Some)];
    let vlan = option::weighted(0.02, any::<u16>());
    (dst, any::<[u8; 6]>(), vlan, ethertype).prop_map(|(dst, src, vlan, ethertype)| Eth { dst, src, vlan, ethertype })
}

fn harm() -> impl Strategy<Value = Harm> {
    prop_oneof![
        40 => Just(Harm::None),
        2 => (14..120_usize).prop_map(Harm::Cut),
        1 => (1..9_usize).prop_map(Harm::Trailing),
        3 => (0..100_usize, 1..=255_u8).prop_map(|(at, xor)| Harm::Flip { at, xor }),
    ]
}

/// How long the IP packet is: whatever its description says, or just about a limit.
fn length() -> impl Strategy<Value = Option<usize>> {
    let about = (select(LIMITS.to_vec()), 0..4_usize).prop_map(|(limit, more)| usize::from(limit) + more - 2);
    option::weighted(0.15, about)
}

const LIMITS: [u16; 5] = [576, 600, 1280, 1380, 1420];

/// Bytes of payload in a segment such that a packet just about fits a limit, and how many segments.
fn segments() -> impl Strategy<Value = Option<(usize, usize, usize)>> {
    option::weighted(
        0.08,
        (select(LIMITS.to_vec()), 0..4_usize, 2..4_usize)
            .prop_map(|(limit, more, count)| (usize::from(limit), more, count)),
    )
}

fn context() -> impl Strategy<Value = Context> {
    let outer = select(vec![
        "192.0.2.11",
        "192.0.2.11",
        "192.0.2.12",
        "192.0.2.12",
        "2001:db8:f::11",
        "2001:db8:f::12",
        "2001:db8:f::13",
        "2001:db8:f::14",
        "192.0.2.99",
    ]);
    let vni = prop_oneof![12 => Just(VNI[0]), 4 => Just(VNI[1]), 1 => 0..0x100_0000_u32];
    let ingress = prop_oneof![2 => Just(0), 1 => 1..9_u32];
    (option::weighted(0.9, (vni, outer)), ingress, prop_oneof![Just(0), any::<u32>()]).prop_map(
        |(key, ingress_ifindex, mark)| Context {
            ingress_ifindex,
            gso_size: 0,
            gso_segs: 0,
            mark,
            key: key.map(|(vni, outer)| {
                let remote = text(outer);
                Key { vni, remote, local: text(HOP[usize::from(!is_v4(remote))]) }
            }),
        },
    )
}

/// Any packet; probes between overlay addresses among them.
pub fn case(way: Way) -> impl Strategy<Value = Case> {
    let plain = (eth(), ip(addresses(way)), l4(), harm()).boxed();
    let nodes = (pick(&OVERLAY[..7]), pick(&OVERLAY[..5]));
    let members = (pick(&OVERLAY[7..]), pick(&OVERLAY[..5]));
    let outwards = (pick(&OVERLAY[..5]), pick(OVERLAY));
    let overlay = match way {
        Way::Hop => nodes.boxed(),
        Way::In => members.boxed(),
        Way::Out => outwards.boxed(),
    };
    let probes = (eth(), ip(prop_oneof![4 => overlay, 1 => (pick(OVERLAY), pick(OVERLAY))]), probe_packet(), harm());
    let probes = probes.boxed();
    let packet = prop_oneof![4 => plain, 1 => probes].prop_map(|(eth, ip, l4, harm)| Packet { eth, ip, l4, harm });
    // Mostly as packets come: from the hop with the MAC of their secret, by the node of their source; elsewhere without a key.
    let fits = (weighted(0.9), weighted(0.9));
    (packet, context(), length(), segments(), fits).prop_map(move |(packet, context, length, segments, fits)| {
        let mut case = Case { packet, context };
        match way {
            Way::Hop => case.come_by_hop(fits),
            Way::Out | Way::In if fits.0 => case.context.key = None,
            Way::Out | Way::In => {}
        }
        match segments {
            Some(wanted) => case.cut_to_segments(wanted),
            None => case.grow_to(length.unwrap_or(0)),
        }
        case
    })
}

impl Case {
    fn come_by_hop(&mut self, (right_mac, right_node): (bool, bool)) {
        let Some(key) = &mut self.context.key else { return };
        if let Some(secret) = VNI.iter().position(|vni| *vni == key.vni).filter(|_| right_mac) {
            self.packet.eth.dst = MAC[secret];
        }
        let homes: BTreeMap<Prefix, Option<usize>> = HOMES.iter().map(|(text, node)| (prefix(text), *node)).collect();
        match lookup(&homes, self.packet.ip.src) {
            Some(Some(node)) if right_node => key.remote = home_of(node),
            None if right_node => key.remote = home_of(0),
            _ => {}
        }
    }

    fn payload(&mut self) -> Option<&mut usize> {
        match &mut self.packet.l4 {
            L4::Tcp { payload, .. }
            | L4::Udp { payload, .. }
            | L4::Icmp { payload, .. }
            | L4::Other { payload, .. } => Some(payload),
            L4::Probe { .. } | L4::IcmpError { .. } => None,
        }
    }

    fn grow_to(&mut self, length: usize) {
        let more = length.saturating_sub(self.packet.l3().len());
        if let Some(payload) = self.payload() {
            *payload += more;
        }
    }

    /// As segmentation offload has it: TCP and UDP alone, and never a fragment.
    fn cut_to_segments(&mut self, (limit, more, count): (usize, usize, usize)) {
        if self.packet.ip.fragment.is_some() || !matches!(self.packet.l4, L4::Tcp { .. } | L4::Udp { .. }) {
            return;
        }
        let set = |case: &mut Case, to: usize| case.payload().map(|payload| *payload = to);
        set(self, 0);
        let size = (limit + more - 2).saturating_sub(self.packet.l3().len()).clamp(1, 1000);
        set(self, size * (count - 1) + 1);
        self.context.gso_size = size as u32;
        self.context.gso_segs = count as u32;
    }
}

/// What is left out of the tables, one bit each.
type Holes = u64;

fn map<V>(entries: impl IntoIterator<Item = (Prefix, V)>, holes: Holes) -> BTreeMap<Prefix, V> {
    let kept = entries.into_iter().enumerate().filter(|(index, _)| holes & (1 << index) == 0);
    kept.map(|(_, entry)| entry).collect()
}

fn holes() -> impl Strategy<Value = Holes> {
    prop_oneof![6 => Just(0), 4 => (any::<u64>(), any::<u64>(), any::<u64>()).prop_map(|(a, b, c)| a & b & c)]
}

fn home_of(node: usize) -> Addr {
    let (_, v4, v6) = NODES[node];
    text(v4.or(v6).expect("a node has an address"))
}

fn nodes(holes: Holes) -> BTreeMap<Addr, Node> {
    let entry = |(index, &(slot, v4, v6)): (usize, &(u8, Option<&'static str>, Option<&'static str>))| {
        let node = Node { slot, zero: [0; 3], home: home_of(index) };
        [v4, v6].into_iter().flatten().map(move |addr| (text(addr), node)).collect::<Vec<_>>()
    };
    let all = NODES.iter().enumerate().flat_map(entry).enumerate();
    all.filter(|(index, _)| holes & (1 << index) == 0).map(|(_, entry)| entry).collect()
}

fn config() -> impl Strategy<Value = Config> {
    let slot = select(vec![0, 2, NO_SLOT]);
    let secrets = prop_oneof![10 => Just(2), 5 => Just(1), 1 => Just(0)];
    let hop = prop_oneof![6 => Just([true, true]), 2 => Just([true, false]), 2 => Just([false, true])];
    let devices = prop_oneof![4 => Just(0xff), 1 => any::<u8>()];
    let gateways = prop_oneof![3 => Just([0b0001_0010_u8; 2]), 1 => any::<[u8; 2]>()];
    let hop_ifindex = prop_oneof![30 => Just(HOP_IFINDEX), 1 => Just(0)];
    (slot, secrets, hop, devices, gateways, hop_ifindex, select(LIMITS.to_vec()), select(LIMITS.to_vec())).prop_map(
        |(slot, secrets, hop, devices, gateways, hop_ifindex, mtu, hop_mtu)| {
            let mut config = empty(slot);
            for at in 0..usize::from(SLOTS) {
                let ids = [format!("192.0.2.{}", 10 + at), format!("2001:db8:f::{}", 10 + at)];
                for (family, id) in ids.iter().enumerate() {
                    if gateways[family] & (1 << at) != 0 && at != usize::from(slot) {
                        config.gateways[family][at] = text(id);
                    }
                }
                config.wireguard[at] = if devices & (1 << at) != 0 { 80 + at as u32 } else { 0 };
            }
            for family in 0..2 {
                config.hop[family] = if hop[family] { text(HOP[family]) } else { Addr::NONE };
            }
            Config { secrets, hop_ifindex, mtu, hop_mtu, ..config }
        },
    )
}

/// A node of the slot, with no other gateway and no device.
pub fn empty(slot: u8) -> Config {
    let overlay = if slot == NO_SLOT {
        text("fdaa:bbbb:cccc:1:8000::10")
    } else {
        text(&format!("fdaa:bbbb:cccc:1::{}", slot + 1))
    };
    Config {
        gateways: [[Addr::NONE; SLOTS as usize]; 2],
        hop: HOP.map(text),
        overlay,
        hop_ifindex: HOP_IFINDEX,
        wireguard: [0; SLOTS as usize],
        vni: VNI,
        mac: MAC,
        hop_mac: HOP_MAC,
        member: SELF,
        mtu: 1420,
        hop_mtu: 1420,
        wireguard_port: WIREGUARD_PORT,
        hop_port: HOP_PORT,
        probe_port: PROBE_PORT,
        slot,
        secrets: 2,
    }
}

fn reach() -> impl Strategy<Value = Reach> {
    let bits = || prop_oneof![1 => Just(0), 3 => any::<u8>()];
    let mtu = prop_oneof![2 => Just(0), 3 => select(LIMITS.to_vec())];
    (bits(), bits(), bits(), mtu).prop_map(|(via, links, kept, mtu)| Reach { via, links, mtu, kept, zero: [0; 3] })
}

fn answer() -> impl Strategy<Value = Answer> {
    (any::<u8>(), any::<[u8; 2]>(), vec(any::<u64>(), 64)).prop_map(|(flags, mtu, members)| {
        let members: Vec<u8> = members.iter().flat_map(|word| word.to_be_bytes()).collect();
        Answer { flags, zero: 0, mtu, members: members.try_into().expect("512 bytes") }
    })
}

/// The tables, but for their holes; nothing is healthy.
fn tables(config: Config, holes: [Holes; 4]) -> World {
    let range = |&(text, member, kind): &(&str, u16, u8)| (prefix(text), Remote { member, kind, zero: 0 });
    let own = |&(text, to): &(&str, &[u16])| (prefix(text), BTreeSet::from_iter(to.iter().copied()));
    let home = |&(text, node): &(&str, Option<usize>)| (prefix(text), node.map_or(Addr::NONE, home_of));
    let here = ((config.overlay, 128), Addr::NONE);
    World {
        remote: map(REMOTE.iter().map(range), holes[0]),
        own: map(OWN.iter().map(own), holes[1]),
        homes: map(HOMES.iter().map(home).chain([here]), holes[2]),
        nodes: nodes(holes[3]),
        health: BTreeMap::new(),
        answer: Answer { flags: 0, zero: 0, mtu: [0; 2], members: [0; 512] },
        probed: true,
        config,
    }
}

/// A node with whole tables, every device, and the gateways that the cluster's other nodes are.
pub fn whole(slot: u8) -> World {
    let mut config = empty(slot);
    config.wireguard = std::array::from_fn(|at| 80 + at as u32);
    config.gateways[0][1] = text("192.0.2.11");
    config.gateways[1][4] = text("2001:db8:f::14");
    tables(config, [0; 4])
}

/// Mostly whole tables.
pub fn world() -> impl Strategy<Value = World> {
    let health = vec(reach(), MEMBERS.len());
    let probed = prop_oneof![3 => Just(true), 1 => Just(false)];
    let parts = (config(), [holes(), holes(), holes(), holes()], health, answer(), probed);
    parts.prop_map(|(config, holes, health, answer, probed)| World {
        health: MEMBERS.into_iter().zip(health).collect(),
        answer,
        probed,
        ..tables(config, holes)
    })
}
