//! What this node owns in the kernel, as plain data.
//!
//! One type plays both roles: [`plan`](crate::plan::plan) returns the state we want, a kernel reading returns the
//! state we have, and [`diff`](crate::diff::diff) turns the pair into [`Op`]s.
//!
//! Invariant: a [`State`] holds only objects that carry our marks (device names, tables, rule priorities, the nft
//! table). A foreign route cannot be expressed here, so no diff can delete one.

mod display;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv6Addr, SocketAddr},
};

use ipnetwork::IpNetwork;

use crate::{
    keys::{HopId, PskId, PublicKey},
    names::{Device, Interface, MemberId, Ordinal, Table},
};

/// Everything of ours on one node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct State {
    pub links: BTreeMap<Interface, Link>,
    /// What `carrick-hop` is, beside a link; `None`: it does not exist, or is something else.
    pub hop: Option<Hop>,
    pub wireguard: BTreeMap<Device, WireGuard>,
    pub peers: BTreeMap<(Device, PublicKey), Peer>,
    /// WireGuard's cryptokey routing table, per device. A map, because a prefix belongs to one peer of a device.
    pub allowed_ips: BTreeMap<(Device, IpNetwork), PublicKey>,
    /// Destinations in our tables.
    pub routes: BTreeMap<(Table, IpNetwork), Route>,
    pub rules: BTreeMap<Rule, Lookups>,
    /// The table `inet carrick`; `None`: it does not exist.
    pub nft: Option<Nft>,
    /// Overlay addresses, /128 on `lo`, marked by their address protocol.
    pub overlay: BTreeSet<Ipv6Addr>,
    /// What the BPF programs look up; `None`: our maps are not pinned.
    pub maps: Option<Maps>,
    /// Where our programs, of this build and with the pinned maps, are attached and come first. Without maps, nowhere.
    pub programs: BTreeSet<Attachment>,
}

/// A VXLAN device in external mode: the BPF programs say where each packet goes. NOARP, learning off.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hop {
    /// UDP port of the other nodes' devices.
    pub port: u16,
    /// UDP source ports, first and last: few, so that one rule can name them.
    pub sources: (u16, u16),
}

/// The contents of the BPF maps that a plan fills. (The health maps are the prober's.)
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Maps {
    pub config: Option<Config>,
    /// Remote prefixes, and the overlay prefix of every member.
    pub remote: BTreeMap<IpNetwork, Remote>,
    /// What this member advertises, and to whom.
    pub own: BTreeMap<IpNetwork, BTreeSet<MemberId>>,
    /// Where this cluster's own addresses live.
    pub homes: BTreeMap<IpNetwork, Home>,
    /// Every hop address of every other node.
    pub nodes: BTreeMap<IpAddr, Node>,
}

/// What the programs must know of this node. Indexes and MACs of links are filled in where it is applied, and a reading
/// in which they are wrong has no `Config`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    pub member: MemberId,
    /// `None` on a worker.
    pub slot: Option<Ordinal>,
    /// This node's overlay address.
    pub overlay: Ipv6Addr,
    /// This node's hop addresses, at most one of each family.
    pub hop: BTreeSet<IpAddr>,
    /// The hop addresses of this cluster's other slots, at most one of each family.
    pub gateways: BTreeMap<Ordinal, BTreeSet<IpAddr>>,
    /// The WireGuard devices that the programs may redirect to.
    pub wireguard: BTreeSet<Device>,
    /// The hop secrets in use, at most two; the first sends. The bytes meet them where it is applied.
    pub secrets: Vec<HopId>,
    /// Bytes of an inner packet towards a member whose path MTU is not known.
    pub mtu: u16,
    /// Bytes of an inner packet on the hop.
    pub hop_mtu: u16,
    pub wireguard_port: u16,
    pub hop_port: u16,
    pub probe_port: u16,
}

/// What a remote prefix is to the programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Remote {
    Range(MemberId),
    /// A member's overlay /64; the own one, too.
    Overlay(MemberId),
    /// An endpoint inside a range: not to be steered.
    Carved(MemberId),
    /// Read, never wanted: what makes no sense to the programs.
    Other,
}

/// Where one of this cluster's own prefixes lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Home {
    Here,
    /// A node, by its first hop address.
    Node(IpAddr),
}

/// Another node of this cluster, as the programs know it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Node {
    /// `None`: a worker.
    pub slot: Option<Ordinal>,
    /// Its first hop address, by which [`Home::Node`] names it.
    pub home: IpAddr,
}

/// One of our programs at the hook that belongs to it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Attachment {
    pub program: Program,
    /// Name of the link; a foreign one for [`Program::SteerNative`] alone.
    pub link: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Program {
    /// Egress of `carrick-hop`.
    Steer,
    /// Egress of a native device, before every other program.
    SteerNative,
    /// Ingress of `carrick-hop`.
    FromHop,
    /// Egress of a WireGuard device.
    ToPeer,
    /// Ingress of a WireGuard device.
    FromPeer,
}

impl Program {
    pub const ALL: [Program; 5] =
        [Program::Steer, Program::SteerNative, Program::FromHop, Program::ToPeer, Program::FromPeer];

    /// Its name in the object.
    pub fn name(self) -> &'static str {
        match self {
            Program::Steer => "steer",
            Program::SteerNative => "steer_native",
            Program::FromHop => "from_hop",
            Program::ToPeer => "to_peer",
            Program::FromPeer => "from_peer",
        }
    }

    pub fn is_ingress(self) -> bool {
        matches!(self, Program::FromHop | Program::FromPeer)
    }

    /// Whether it must come before every other program at its hook.
    pub fn must_be_first(self) -> bool {
        self != Program::ToPeer
    }
}

/// One entry of a map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Entry {
    Config(Config),
    Remote(IpNetwork, Remote),
    Own(IpNetwork, BTreeSet<MemberId>),
    Home(IpNetwork, Home),
    Node(IpAddr, Node),
}

/// The key of an [`Entry`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Key {
    Config,
    Remote(IpNetwork),
    Own(IpNetwork),
    Home(IpNetwork),
    Node(IpAddr),
}

/// Bytes that every link has to carry whole (RFC 8200 §5); the kernel takes IPv6 from a device with less.
pub const MIN_MTU_V6: u16 = 1280;

/// Bytes that every IPv4 host has to be able to take (RFC 791 §3.1).
pub const MIN_MTU_V4: u16 = 576;

/// What the kernel says of one of our links. None ever carries an address (`addrgenmode none`): CNIs adopt addressed
/// devices.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Bytes, at least 1280.
    pub mtu: u32,
    pub up: bool,
    /// No address and `addrgenmode none`.
    pub bare: bool,
    /// `net.ipv4.conf.DEVICE.forwarding`.
    pub forwarding: bool,
    /// `net.ipv4.conf.DEVICE.rp_filter`: 0, 1 (strict) or 2 (loose).
    pub rp_filter: u8,
    /// What is received is merged before anybody else sees it (`ethtool -K DEVICE gro`): how the kernel makes a link.
    pub gro: bool,
}

impl Link {
    /// A link as we want it.
    pub fn ours(mtu: u32) -> Link {
        Link { mtu, up: true, bare: true, forwarding: true, rp_filter: 2, gro: true }
    }
}

/// A WireGuard device. Its private key is looked up by the public one when it is applied, so no plan can print it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WireGuard {
    pub key: PublicKey,
    /// UDP port, 1 to 65535.
    pub port: u16,
}

/// A remote gateway on one of our devices.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// In a wanted state, the address to dial now; `None` leaves what is there, because the peer may have roamed.
    pub endpoint: Option<SocketAddr>,
    /// Seconds; 0 is off.
    pub keepalive: u16,
    pub psk: Option<PskId>,
}

/// Where a destination in one of our tables goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Route {
    /// Out of `carrick-hop`, whose programs find the gateway; with a source hint for the node's own packets.
    Hop {
        /// Bytes, at least 1280; `None`: the link's.
        mtu: Option<u32>,
        source: Option<IpAddr>,
    },
    /// On to the next rule: not ours to route.
    Throw,
    /// Refused with ICMP: nothing leaves in the clear.
    Unreachable,
    /// Read, never wanted: what somebody else has put there (another metric, a gateway, a second route), to be replaced
    /// or removed.
    Other,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Family {
    V4,
    V6,
}

impl Family {
    pub const ALL: [Family; 2] = [Family::V4, Family::V6];
}

/// One of our `ip rule`s, `proto kernel`: there is at most one for a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rule {
    pub family: Family,
    pub table: Table,
}

impl Rule {
    /// 11 for [`Table::Remote`], 12 for [`Table::Closed`].
    pub fn priority(self) -> u32 {
        match self.table {
            Table::Remote => 11,
            Table::Closed => 12,
        }
    }
}

/// Which lookups a rule is for.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Lookups {
    All,
    /// `not iif lo`: all but those of what this node itself sends.
    Forwarded,
    /// `not oif NAME`: all but those that name this device, such as those of sockets that are bound to it.
    NotBoundTo(String),
}

/// The contents of the nftables table `inet carrick`; its chains are always the same.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Nft {
    /// (source, destination): such packets keep their source, ahead of the CNI's masquerade. Both directions.
    pub keep_source: BTreeSet<(IpNetwork, IpNetwork)>,
    /// Hop addresses of this cluster's other nodes. Towards them and from them, the hop's own UDP is not tracked; and
    /// nothing that this node forwards may go to their hop port, or a pod could forge hop packets.
    pub nodes: BTreeSet<IpAddr>,
    /// UDP port of the hop; 0 where there is none.
    pub hop_port: u16,
    /// First and last source port of the hop.
    pub hop_sources: (u16, u16),
    /// Names of the native devices: what comes in by any other is forwarded or a pod's, and none of the hop's.
    pub native: BTreeSet<String>,
}

/// One step from the state that is to the state that is wanted. `Display` is what an operator would type.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// Creates the device if it is missing and gives it key and port.
    SetDevice {
        device: Device,
        wireguard: WireGuard,
    },
    /// Creates `carrick-hop`, down, or replaces what has its name and is something else.
    SetHop(Hop),
    /// Loads the programs' maps and pins them.
    LoadMaps,
    SetEntry(Entry),
    /// Attaches a program, or replaces one of another build in one step.
    Attach(Attachment),
    AddOverlay(Ipv6Addr),
    SetLink {
        interface: Interface,
        link: Link,
    },
    /// Creates or updates a peer and moves `gained` to it from whoever holds them.
    SetPeer {
        device: Device,
        key: PublicKey,
        peer: Peer,
        gained: Vec<IpNetwork>,
    },
    /// Replaces the nft table, in one transaction, with one that permits at least what it permitted before.
    GrowNft(Nft),
    /// Puts the rule in place, or in the place of what it was.
    SetRule(Rule, Lookups),
    SetRoute {
        table: Table,
        to: IpNetwork,
        route: Route,
    },

    DelRoute {
        table: Table,
        to: IpNetwork,
    },
    DelRule(Rule),
    /// Replaces the nft table with one that permits less; `None` deletes it.
    ShrinkNft(Option<Nft>),
    /// Takes stale prefixes from a live peer, one by one: a whole-list replace loses packets.
    DropAllowedIps {
        device: Device,
        key: PublicKey,
        lost: Vec<IpNetwork>,
    },
    RemovePeer {
        device: Device,
        key: PublicKey,
    },
    DelEntry(Key),
    /// Offers an own prefix to fewer members.
    NarrowOwn(IpNetwork, BTreeSet<MemberId>),
    DelOverlay(Ipv6Addr),
    Detach(Attachment),
    /// With every program attached to it.
    DelLink(Interface),
    /// Unpins everything.
    UnloadMaps,
}

impl Entry {
    pub fn key(&self) -> Key {
        match self {
            Entry::Config(_) => Key::Config,
            Entry::Remote(prefix, _) => Key::Remote(*prefix),
            Entry::Own(prefix, _) => Key::Own(*prefix),
            Entry::Home(prefix, _) => Key::Home(*prefix),
            Entry::Node(address, _) => Key::Node(*address),
        }
    }
}

impl Op {
    /// Whether the step takes something away. Breaks come after every make, and none runs after a failed make.
    pub fn is_break(&self) -> bool {
        match self {
            Op::SetDevice { .. }
            | Op::SetHop(_)
            | Op::LoadMaps
            | Op::SetEntry(_)
            | Op::Attach(_)
            | Op::AddOverlay(_)
            | Op::SetLink { .. }
            | Op::SetPeer { .. }
            | Op::GrowNft(_)
            | Op::SetRule(..)
            | Op::SetRoute { .. } => false,
            Op::DelRoute { .. }
            | Op::DelRule(_)
            | Op::ShrinkNft(_)
            | Op::DropAllowedIps { .. }
            | Op::RemovePeer { .. }
            | Op::DelEntry(_)
            | Op::NarrowOwn(..)
            | Op::DelOverlay(_)
            | Op::Detach(_)
            | Op::DelLink(_)
            | Op::UnloadMaps => true,
        }
    }
}

impl Family {
    pub fn of(network: &IpNetwork) -> Family {
        if network.is_ipv4() { Family::V4 } else { Family::V6 }
    }

    /// The option that `ip` takes for it.
    fn option(self) -> &'static str {
        match self {
            Family::V4 => "-4",
            Family::V6 => "-6",
        }
    }
}
