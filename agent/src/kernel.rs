//! The one thin layer of effects: reads what is ours from the kernel, and applies one [`Op`] at a time.

use std::{collections::BTreeMap, io};

use crate::{
    keys::{PresharedKey, PrivateKey, PskId, PublicKey},
    names::Device,
    reconcile::Pair,
    state::{Link, Peer},
};

/// The private halves, looked up by what a [`State`](crate::state::State) may hold.
#[derive(Clone, Debug, Default)]
pub struct Secrets {
    pub private: BTreeMap<PublicKey, PrivateKey>,
    pub preshared: BTreeMap<PskId, PresharedKey>,
}

/// What a backend says of one WireGuard device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WgDevice {
    pub key: PublicKey,
    pub port: u16,
    pub peers: BTreeMap<PublicKey, WgPeer>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WgPeer {
    /// With the endpoint as it is now.
    pub peer: Peer,
    pub allowed_ips: std::collections::BTreeSet<ipnetwork::IpNetwork>,
    pub pair: Pair,
}

/// A WireGuard implementation: the userspace one in its own process, later the kernel's.
///
/// Every call leaves live sessions alone: no peer is removed and added again, no list replaced.
#[allow(async_fn_in_trait)]
pub trait WireGuard {
    /// Every device of ours that it holds.
    async fn read(&mut self) -> io::Result<BTreeMap<Device, WgDevice>>;
    /// Creates the link if it is missing (down, with this MTU) and gives it key and port.
    async fn set_device(&mut self, device: Device, port: u16, key: &PrivateKey) -> io::Result<()>;
    /// Creates or updates a peer. An endpoint of `None` leaves what is there. `gained` prefixes move to it from
    /// whichever peer of the device holds them, atomically.
    async fn set_peer(
        &mut self,
        device: Device,
        key: &PublicKey,
        peer: &Peer,
        psk: Option<&PresharedKey>,
        gained: &[ipnetwork::IpNetwork],
    ) -> io::Result<()>;
    /// Takes prefixes from a peer; its session goes on.
    async fn drop_allowed_ips(
        &mut self,
        device: Device,
        key: &PublicKey,
        lost: &[ipnetwork::IpNetwork],
    ) -> io::Result<()>;
    async fn remove_peer(&mut self, device: Device, key: &PublicKey) -> io::Result<()>;
    /// Lets go of the device. The link itself is deleted by its owner over netlink.
    async fn del_device(&mut self, device: Device) -> io::Result<()>;
}

/// What the links look like; the netlink half of a reading.
pub type Links = BTreeMap<Device, Link>;
