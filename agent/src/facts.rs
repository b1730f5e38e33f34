//! What the node knows besides the folder. Values without a clock.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
};

use crate::{
    keys::{PskId, PublicKey},
    names::{Device, MemberName, Ordinal},
};

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    /// The slot that this node holds.
    pub slot: Ordinal,
    /// The public keys of the private keys that this node has for its slot, at most two.
    pub slot_keys: BTreeSet<PublicKey>,
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
    /// Whether the kernel has IPv6 at all.
    pub ipv6: bool,
    /// Addresses on this node, for source hints.
    pub addresses: BTreeSet<IpAddr>,
    /// UDP port of device 0; device j listens on this + j.
    pub base_port: u16,
}
