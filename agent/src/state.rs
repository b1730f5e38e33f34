//! What this node owns in the kernel, as plain data.
//!
//! One type plays both roles: [`plan`](crate::plan::plan) returns the state we want, a kernel reading returns the
//! state we have, and [`diff`](crate::diff::diff) turns the pair into [`Op`]s.
//!
//! Invariant: a [`State`] holds only objects that carry our marks (device names, tables, rule priorities, the nft
//! table). A foreign route cannot be expressed here, so no diff can delete one.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::{IpAddr, SocketAddr},
};

use ipnetwork::IpNetwork;

use crate::{
    keys::{PskId, PublicKey},
    names::{Device, Table},
};

/// Everything of ours on one node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct State {
    pub links: BTreeMap<Device, Link>,
    pub wireguard: BTreeMap<Device, WireGuard>,
    pub peers: BTreeMap<(Device, PublicKey), Peer>,
    /// WireGuard's cryptokey routing table, per device. A map, because a prefix belongs to one peer of a device.
    pub allowed_ips: BTreeMap<(Device, IpNetwork), PublicKey>,
    /// Destinations in our tables.
    pub routes: BTreeMap<(Table, IpNetwork), Route>,
    pub rules: BTreeSet<Rule>,
    /// The table `inet carrick`; `None`: it does not exist.
    pub nft: Option<Nft>,
}

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
}

impl Link {
    /// A link as we want it.
    pub fn ours(mtu: u32) -> Link {
        Link { mtu, up: true, bare: true, forwarding: true, rp_filter: 2 }
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
    /// Out of the device, with a source hint for the node's own packets.
    Dev { device: Device, source: Option<IpAddr> },
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

/// One of our `ip rule`s, `proto kernel`.
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

    /// `not iif lo`: leaves out what this node itself sends.
    pub fn forwarded_only(self) -> bool {
        self.table == Table::Closed
    }
}

/// The contents of the nftables table `inet carrick`; its chains are always the same.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Nft {
    /// (source, destination): such packets keep their source, ahead of the CNI's masquerade. Both directions.
    pub keep_source: BTreeSet<(IpNetwork, IpNetwork)>,
    /// What may come out of a tunnel, (remote source, own destination): what was offered to that member.
    pub admit: BTreeSet<(IpNetwork, IpNetwork)>,
}

/// One step from the state that is to the state that is wanted. `Display` is what an operator would type.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// Creates the device if it is missing and gives it key and port.
    SetDevice {
        device: Device,
        wireguard: WireGuard,
    },
    SetLink {
        device: Device,
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
    AddRule(Rule),
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
    DelDevice {
        device: Device,
    },
}

impl Op {
    /// Whether the step takes something away. Breaks come after every make, and none runs after a failed make.
    pub fn is_break(&self) -> bool {
        match self {
            Op::SetDevice { .. }
            | Op::SetLink { .. }
            | Op::SetPeer { .. }
            | Op::GrowNft(_)
            | Op::AddRule(_)
            | Op::SetRoute { .. } => false,
            Op::DelRoute { .. }
            | Op::DelRule(_)
            | Op::ShrinkNft(_)
            | Op::DropAllowedIps { .. }
            | Op::RemovePeer { .. }
            | Op::DelDevice { .. } => true,
        }
    }
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Route::Dev { device, source: None } => write!(f, "dev {device}"),
            Route::Dev { device, source: Some(source) } => write!(f, "dev {device} src {source}"),
            Route::Throw => f.write_str("throw"),
            Route::Unreachable => f.write_str("unreachable"),
            Route::Other => f.write_str("(somebody else's)"),
        }
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let not_iif_lo = if self.forwarded_only() { "not iif lo " } else { "" };
        write!(f, "priority {} {not_iif_lo}lookup {}", self.priority(), self.table)
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

impl fmt::Display for Nft {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pairs = |pairs: &BTreeSet<(IpNetwork, IpNetwork)>| {
            pairs.iter().map(|(from, to)| format!("{from} . {to}")).collect::<Vec<_>>().join(", ")
        };
        write!(f, "keep_source {{ {} }} admit {{ {} }}", pairs(&self.keep_source), pairs(&self.admit))
    }
}

/// `allowed-ips` as `wg` takes it, each prefix with the sign of a delta.
fn delta(sign: char, networks: &[IpNetwork]) -> String {
    networks.iter().map(|network| format!("{sign}{network}")).collect::<Vec<_>>().join(",")
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Op::SetDevice { device, wireguard: WireGuard { key, port } } => {
                write!(f, "wg set {device} listen-port {port} private-key <of {key}>")
            }
            Op::SetLink { device, link } => {
                let state = if link.up { "up" } else { "down" };
                write!(f, "ip link set {device} mtu {} addrgenmode none {state}", link.mtu)
            }
            Op::SetPeer { device, key, peer, gained } => {
                write!(f, "wg set {device} peer {key}")?;
                if let Some(endpoint) = peer.endpoint {
                    write!(f, " endpoint {endpoint}")?;
                }
                if peer.keepalive > 0 {
                    write!(f, " persistent-keepalive {}", peer.keepalive)?;
                }
                if let Some(psk) = peer.psk {
                    write!(f, " preshared-key <{psk}>")?;
                }
                if gained.is_empty() { Ok(()) } else { write!(f, " allowed-ips {}", delta('+', gained)) }
            }
            Op::GrowNft(nft) | Op::ShrinkNft(Some(nft)) => write!(f, "nft replace table inet carrick {nft}"),
            Op::ShrinkNft(None) => f.write_str("nft delete table inet carrick"),
            Op::AddRule(rule) => write!(f, "ip {} rule add {rule}", rule.family.option()),
            Op::DelRule(rule) => write!(f, "ip {} rule del {rule}", rule.family.option()),
            Op::SetRoute { table, to, route: route @ Route::Dev { .. } } => {
                write!(f, "ip route replace {to} {route} table {table}")
            }
            Op::SetRoute { table, to, route } => write!(f, "ip route replace {route} {to} table {table}"),
            Op::DelRoute { table, to } => write!(f, "ip route del {to} table {table}"),
            Op::DropAllowedIps { device, key, lost } => {
                write!(f, "wg set {device} peer {key} allowed-ips {}", delta('-', lost))
            }
            Op::RemovePeer { device, key } => write!(f, "wg set {device} peer {key} remove"),
            Op::DelDevice { device } => write!(f, "ip link del {device}"),
        }
    }
}
