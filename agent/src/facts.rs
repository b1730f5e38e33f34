//! What the node knows besides the folder. Values without a clock.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
};

use crate::{
    keys::{HopId, PskId, PublicKey},
    names::{Device, MemberName, NodeName},
    overlay::Overlay,
};

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    /// This node, as its Node is called where there are any.
    pub node: NodeName,
    /// The public keys of the private keys that this node has for its slot, at most two; `None`: not known yet.
    pub slot_keys: Option<BTreeSet<PublicKey>>,
    /// The cluster's hop secrets, at most two; the first sends.
    pub hop_ids: Vec<HopId>,
    /// Members with a preshared key; `None`: there is one, but it cannot be used.
    pub psks: BTreeMap<MemberName, Option<PskId>>,
    /// The addresses that an endpoint name last resolved to, in the order to try them.
    pub resolved: BTreeMap<String, Vec<IpAddr>>,
    /// Pairs whose endpoint is to be written now, with the address: they have none, or are dead.
    pub dial: BTreeMap<(Device, PublicKey), SocketAddr>,
    /// Addresses that pairs talk to right now and that are carved out already: what the folder or a name server says
    /// may move on, but a live pair stays where it is.
    pub carved: BTreeSet<IpAddr>,
    /// Smallest MTU, in bytes, of the native devices.
    pub underlay_mtu: u32,
    /// The native devices by name, each with its MTU in bytes.
    pub native: BTreeMap<String, u32>,
    /// Bytes of an inner packet that reach the member's pods, or from a worker its gateways, as probes have found.
    pub mtus: BTreeMap<MemberName, u16>,
    /// Whether the kernel has IPv6 at all.
    pub ipv6: bool,
    /// Addresses on this node, for source hints.
    pub addresses: BTreeSet<IpAddr>,
    /// The mesh's overlay addresses.
    pub overlay: Overlay,
    pub ports: Ports,
}

/// UDP ports of the data plane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ports {
    /// That of WireGuard device 0; device j listens on this + j.
    pub wireguard: u16,
    pub hop: u16,
    /// First and last source port of the hop.
    pub hop_sources: (u16, u16),
    pub probe: u16,
}
