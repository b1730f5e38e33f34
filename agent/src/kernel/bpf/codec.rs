//! Between the words of [`state`] and the bytes of the ABI. Pure.
//!
//! Laws: what a plan can hold survives there and back; bytes that no plan can hold come back as something that no plan
//! holds, so that the next diff overwrites or removes them.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv6Addr},
};

use aya::maps::lpm_trie;
use ebpf::{Addr, HOP_SECRETS, MAX_MEMBER_ID, NO_SLOT, SLOTS, V4_PREFIX, remote};
use ipnetwork::{IpNetwork, Ipv4Network, Ipv6Network};

use crate::{
    keys::{HopId, HopMark},
    names::{Device, MemberId, Ordinal},
    state::{self, Config, Home, Node, Remote},
};

/// The key of the longest-prefix maps.
pub(super) type Prefix = lpm_trie::Key<Addr>;

/// What a [`Config`] leaves to be looked up where it is applied.
#[derive(Clone, Debug, Default)]
pub(super) struct Local {
    /// Index and MAC of `carrick-hop`.
    pub(super) hop: Option<(u32, [u8; 6])>,
    pub(super) wireguard: BTreeMap<Device, u32>,
    pub(super) marks: BTreeMap<HopId, HopMark>,
}

pub(super) fn address(ip: IpAddr) -> Addr {
    match ip {
        IpAddr::V4(ip) => Addr::v4(ip.octets()),
        IpAddr::V6(ip) => Addr(ip.octets()),
    }
}

pub(super) fn ip(address: Addr) -> IpAddr {
    let ip = Ipv6Addr::from(address.0);
    ip.to_ipv4_mapped().map_or(IpAddr::V6(ip), IpAddr::V4)
}

pub(super) fn prefix(network: &IpNetwork) -> Prefix {
    let length = u32::from(network.prefix());
    let length = if network.is_ipv4() { V4_PREFIX + length } else { length };
    Prefix::new(length, address(network.network()))
}

/// `None` for a length that there is not.
pub(super) fn network(prefix: &Prefix) -> Option<IpNetwork> {
    let length = prefix.prefix_len();
    let Addr(bytes) = prefix.data();
    let whole = Ipv6Addr::from(bytes);
    match whole.to_ipv4_mapped() {
        Some(ip) if length >= V4_PREFIX => {
            let length = u8::try_from(length - V4_PREFIX).ok()?;
            let ip = Ipv4Network::new(ip, length).ok()?.network();
            Some(IpNetwork::V4(Ipv4Network::new(ip, length).ok()?))
        }
        _ => {
            let length = u8::try_from(length).ok()?;
            let ip = Ipv6Network::new(whole, length).ok()?.network();
            Some(IpNetwork::V6(Ipv6Network::new(ip, length).ok()?))
        }
    }
}

/// [`Remote::Other`] has no bytes of its own: `None`.
pub(super) fn encode_remote(value: Remote) -> Option<ebpf::Remote> {
    let (member, kind) = match value {
        Remote::Range(member) => (member, remote::RANGE),
        Remote::Overlay(member) => (member, remote::OVERLAY),
        Remote::Carved(member) => (member, remote::CARVED),
        Remote::Other => return None,
    };
    Some(ebpf::Remote { member: member.get(), kind, zero: 0 })
}

pub(super) fn decode_remote(value: &ebpf::Remote) -> Remote {
    match (MemberId::new(value.member.into()), value.kind, value.zero) {
        (Some(member), remote::RANGE, 0) => Remote::Range(member),
        (Some(member), remote::OVERLAY, 0) => Remote::Overlay(member),
        (Some(member), remote::CARVED, 0) => Remote::Carved(member),
        _ => Remote::Other,
    }
}

pub(super) fn encode_offered(members: &BTreeSet<MemberId>) -> ebpf::Offered {
    let mut words = [0; 64];
    for member in members {
        words[usize::from(member.get()) / 64] |= 1 << (member.get() % 64);
    }
    ebpf::Offered { members: words }
}

/// Nobody, if it is offered to a member that there cannot be.
pub(super) fn decode_offered(value: &ebpf::Offered) -> BTreeSet<MemberId> {
    let held = |id: &u16| value.members[usize::from(*id) / 64] & (1 << (id % 64)) != 0;
    let members: Option<BTreeSet<MemberId>> =
        (0..=MAX_MEMBER_ID).filter(held).map(|id| MemberId::new(id.into())).collect();
    members.unwrap_or_default()
}

pub(super) fn encode_home(value: Home) -> ebpf::Home {
    ebpf::Home { node: if let Home::Node(node) = value { address(node) } else { Addr::NONE } }
}

pub(super) fn decode_home(value: &ebpf::Home) -> Home {
    if value.node == Addr::NONE { Home::Here } else { Home::Node(ip(value.node)) }
}

pub(super) fn encode_node(value: Node) -> ebpf::Node {
    ebpf::Node { slot: value.slot.map_or(NO_SLOT, Ordinal::get), zero: [0; 3], home: address(value.home) }
}

/// A node that is at home nowhere, if it makes no sense.
pub(super) fn decode_node(value: &ebpf::Node) -> Node {
    match (slot(value.slot), value.zero) {
        (Some(slot), [0, 0, 0]) => Node { slot, home: ip(value.home) },
        _ => Node { slot: None, home: IpAddr::V6(Ipv6Addr::UNSPECIFIED) },
    }
}

/// `None` for what is neither a slot nor [`NO_SLOT`].
fn slot(slot: u8) -> Option<Option<Ordinal>> {
    if slot == NO_SLOT { Some(None) } else { Ordinal::new(slot.into()).map(Some) }
}

/// `Err` names what this node lacks.
pub(super) fn encode_config(config: &Config, local: &Local) -> Result<ebpf::Config, String> {
    let (hop_ifindex, hop_mac) = local.hop.ok_or_else(|| format!("link {}", crate::names::HOP))?;
    let mut wireguard = [0; SLOTS as usize];
    for device in &config.wireguard {
        let index = local.wireguard.get(device).ok_or_else(|| format!("link {device}"))?;
        wireguard[usize::from(device.0.get())] = *index;
    }
    let (mut vni, mut mac) = ([0; HOP_SECRETS], [[0; 6]; HOP_SECRETS]);
    for (i, id) in config.secrets.iter().take(HOP_SECRETS).enumerate() {
        let mark = local.marks.get(id).ok_or_else(|| format!("hop secret {id}"))?;
        (vni[i], mac[i]) = (mark.vni, mark.mac);
    }
    let mut gateways = [[Addr::NONE; SLOTS as usize]; 2];
    for (slot, addresses) in &config.gateways {
        for (family, address) in by_family(addresses).into_iter().enumerate() {
            gateways[family][usize::from(slot.get())] = address;
        }
    }
    Ok(ebpf::Config {
        gateways,
        hop: by_family(&config.hop),
        overlay: Addr(config.overlay.octets()),
        hop_ifindex,
        wireguard,
        vni,
        mac,
        hop_mac,
        member: config.member.get(),
        mtu: config.mtu,
        hop_mtu: config.hop_mtu,
        wireguard_port: config.wireguard_port,
        hop_port: config.hop_port,
        probe_port: config.probe_port,
        slot: config.slot.map_or(NO_SLOT, Ordinal::get),
        secrets: u8::try_from(config.secrets.len()).unwrap_or(u8::MAX),
    })
}

/// The first address of each family: IPv4, IPv6.
fn by_family(addresses: &BTreeSet<IpAddr>) -> [Addr; 2] {
    let first = |v4: bool| addresses.iter().find(|ip| ip.is_ipv4() == v4).map_or(Addr::NONE, |ip| address(*ip));
    [first(true), first(false)]
}

/// `None`: it was written for other links, MACs or secrets than there are now, or is nonsense.
pub(super) fn decode_config(bytes: &ebpf::Config, local: &Local) -> Option<Config> {
    let addresses =
        |pair: [Addr; 2]| pair.into_iter().filter(|at| *at != Addr::NONE).map(ip).collect::<BTreeSet<IpAddr>>();
    let slots = Ordinal::all().map(|slot| {
        let at = usize::from(slot.get());
        (slot, addresses([bytes.gateways[0][at], bytes.gateways[1][at]]))
    });
    let used = usize::from(bytes.secrets);
    let marks = bytes.vni.iter().zip(bytes.mac).take(used);
    let config = Config {
        member: MemberId::new(bytes.member.into())?,
        slot: slot(bytes.slot)?,
        overlay: bytes.overlay.0.into(),
        hop: addresses(bytes.hop),
        gateways: slots.filter(|(_, addresses)| !addresses.is_empty()).collect(),
        wireguard: Device::all().filter(|device| bytes.wireguard[usize::from(device.0.get())] != 0).collect(),
        secrets: marks.map(|(vni, mac)| HopMark { vni: *vni, mac }.id()).collect(),
        mtu: bytes.mtu,
        hop_mtu: bytes.hop_mtu,
        wireguard_port: bytes.wireguard_port,
        hop_port: bytes.hop_port,
        probe_port: bytes.probe_port,
    };
    // Whatever else the bytes hold is not as it would be written now.
    (encode_config(&config, local).as_ref() == Ok(bytes)).then_some(config)
}

/// Whether the entry survives there and back; if not, a pass would write it again and again. Of a configuration, which
/// needs more, it is not asked here.
pub(super) fn is_expressible(entry: &state::Entry) -> bool {
    let kept = |to: &IpNetwork| network(&prefix(to)) == Some(*to);
    match entry {
        state::Entry::Config(_) => true,
        state::Entry::Remote(to, value) => {
            kept(to) && encode_remote(*value).is_some_and(|bytes| decode_remote(&bytes) == *value)
        }
        state::Entry::Own(to, _) => kept(to),
        state::Entry::Home(to, value) => kept(to) && decode_home(&encode_home(*value)) == *value,
        state::Entry::Node(at, value) => ip(address(*at)) == *at && decode_node(&encode_node(*value)) == *value,
    }
}

/// The configuration of nobody.
pub(super) const NO_CONFIG: ebpf::Config = ebpf::Config {
    gateways: [[Addr::NONE; SLOTS as usize]; 2],
    hop: [Addr::NONE; 2],
    overlay: Addr::NONE,
    hop_ifindex: 0,
    wireguard: [0; SLOTS as usize],
    vni: [0; HOP_SECRETS],
    mac: [[0; 6]; HOP_SECRETS],
    hop_mac: [0; 6],
    member: 0,
    mtu: 0,
    hop_mtu: 0,
    wireguard_port: 0,
    hop_port: 0,
    probe_port: 0,
    slot: 0,
    secrets: 0,
};
