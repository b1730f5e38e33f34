//! The one thin layer of effects: reads what is ours from the kernel, and applies one [`Op`] at a time.
//!
//! Invariant: what does not carry our marks (link names, tables, rule priority and table, the nft table, the protocol of
//! an address) is neither reported nor changed.

mod address;
pub mod bpf;
mod conntrack;
mod ethtool;
pub mod events;
pub mod facts;
mod hop;
pub(crate) mod ifreq;
pub(crate) mod lease;
mod link;
pub mod memory;
mod netfilter;
pub mod nft;
pub mod object;
mod prefix;
mod route;
mod rtnl;
mod rule;
#[cfg(test)]
pub(crate) mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
};

use ipnetwork::IpNetwork;

use self::{
    bpf::{Bpf, health::Health},
    rtnl::Rtnl,
};
use crate::{
    keys::{HopId, HopMark, PresharedKey, PrivateKey, PskId, PublicKey},
    names::{Device, Interface, Table},
    reconcile::{Kernel, Layer, Pair, ReadError, Reading},
    state::{self, Entry, Family, Link, Nft, Op, Peer, Route, Rule},
};

/// The private halves, looked up by what a [`State`](crate::state::State) may hold.
#[derive(Clone, Debug, Default)]
pub struct Secrets {
    pub private: BTreeMap<PublicKey, PrivateKey>,
    pub preshared: BTreeMap<PskId, PresharedKey>,
    pub hop: BTreeMap<HopId, HopMark>,
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

/// This node's kernel, in the network namespace in which it was made.
#[derive(Debug)]
pub struct Linux<W> {
    wireguard: W,
    secrets: Secrets,
    rtnl: Rtnl,
    bpf: Bpf,
    /// Prefixes at which the last reading found a route that is none of ours: where to look closer when setting one.
    crowded: BTreeSet<(Table, IpNetwork)>,
    /// The nft table as it was last read or written.
    nft: Option<nft::Seen>,
    /// Pairs of ranges, (own, remote), that the table came to hold: connections between them may be masqueraded from
    /// before.
    late: BTreeSet<(IpNetwork, IpNetwork)>,
}

impl<W: WireGuard> Linux<W> {
    /// Must be called on a tokio runtime, which drives the sockets.
    pub fn new(wireguard: W, secrets: Secrets, bpf: Bpf) -> io::Result<Linux<W>> {
        let rtnl = Rtnl::new()?;
        Ok(Linux { wireguard, secrets, rtnl, bpf, crowded: BTreeSet::new(), nft: None, late: BTreeSet::new() })
    }

    /// Whether every BPF program that was attached at the last pass still is. To be asked often: no event tells of one
    /// that is detached.
    pub async fn still_attached(&self) -> io::Result<bool> {
        self.bpf.still_attached(&self.rtnl).await
    }

    /// The maps of the prober and of status, as the last pass found or made them; `None`: there are none.
    pub fn health(&self) -> io::Result<Option<Health>> {
        self.bpf.health()
    }

    /// Has the programs forget what they know of the maps: an agent before may have changed one and not have come to
    /// say so.
    pub fn forget_known(&self) -> io::Result<()> {
        self.bpf.forget()
    }

    /// [`Health::generation`] of the maps that are pinned now.
    pub fn health_generation(&self) -> io::Result<Option<u32>> {
        self.bpf.generation()
    }

    /// Replaces the keys that later operations look up.
    pub fn set_secrets(&mut self, secrets: Secrets) {
        self.secrets = secrets;
    }

    async fn read_wireguard(&mut self, reading: &mut Reading) {
        let devices = keep(reading, Layer::WireGuard, self.wireguard.read().await);
        for (device, found) in devices {
            reading.state.wireguard.insert(device, state::WireGuard { key: found.key, port: found.port });
            for (key, peer) in found.peers {
                reading.pairs.insert((device, key), peer.pair);
                reading.state.peers.insert((device, key), peer.peer);
                reading.state.allowed_ips.extend(peer.allowed_ips.into_iter().map(|to| ((device, to), key)));
            }
        }
    }

    async fn read_links_and_routes(&mut self, reading: &mut Reading) {
        let addresses = match link::addresses(&self.rtnl).await {
            Ok(found) => found,
            Err(error) => return unreadable(reading, Layer::Address, &[Layer::Link, Layer::Route], error),
        };
        reading.state.overlay = address::overlay(&addresses);
        let links = match link::read(&self.rtnl, &addresses).await {
            Ok(found) => found,
            Err(error) => return unreadable(reading, Layer::Link, &[Layer::Route], error),
        };
        (reading.state.links, reading.state.hop) = (links.links, links.hop);
        // A route names its device by index.
        reading.state.routes = keep(reading, Layer::Route, route::read(&self.rtnl, links.hop_index).await);
        let others = reading.state.routes.iter().filter(|(_, route)| **route == Route::Other);
        self.crowded = others.map(|(place, _)| *place).collect();
    }

    async fn set_peer(&mut self, device: Device, key: &PublicKey, peer: &Peer, gained: &[IpNetwork]) -> io::Result<()> {
        let psk = match peer.psk {
            Some(id) => Some(self.secrets.preshared.get(&id).ok_or_else(|| missing(format!("preshared key {id}")))?),
            None => None,
        };
        self.wireguard.set_peer(device, key, peer, psk, gained).await
    }

    async fn set_device(&mut self, device: Device, wireguard: &state::WireGuard) -> io::Result<()> {
        let key = self.secrets.private.get(&wireguard.key);
        let key = key.ok_or_else(|| missing(format!("private key of {}", wireguard.key)))?;
        self.wireguard.set_device(device, wireguard.port, key).await
    }

    /// Repairs a link without losing the routes through it.
    async fn set_link(&mut self, interface: Interface, link: &Link) -> io::Result<()> {
        let index = link::index(&self.rtnl, interface).await?;
        let hop = (interface == Interface::Hop).then_some(index);
        let routes = if hop.is_some() { route::read(&self.rtnl, hop).await? } else { route::Routes::new() };
        if link::set(&self.rtnl, interface, link).await? && link.up {
            for ((table, to), route) in routes {
                if matches!(route, Route::Hop { .. }) {
                    route::set(&self.rtnl, (table, to), &route, index, false).await?;
                }
            }
        }
        Ok(())
    }

    /// The link goes even where nobody holds the device any more: a persistent TUN outlives its tunnel.
    async fn delete_link(&mut self, interface: Interface) -> io::Result<()> {
        let Interface::WireGuard(device) = interface else { return link::delete(&self.rtnl, interface).await };
        let let_go = self.wireguard.del_device(device).await;
        link::delete(&self.rtnl, interface).await?;
        let_go.map_err(|error| io::Error::new(error.kind(), format!("{device} is deleted, but not let go of: {error}")))
    }

    async fn set_route(&mut self, table: Table, to: IpNetwork, route: &Route) -> io::Result<()> {
        let index = match route {
            Route::Hop { .. } => link::index(&self.rtnl, Interface::Hop).await?,
            _ => 0,
        };
        route::set(&self.rtnl, (table, to), route, index, self.crowded.contains(&(table, to))).await?;
        self.crowded.remove(&(table, to));
        Ok(())
    }

    async fn delete_route(&mut self, table: Table, to: IpNetwork) -> io::Result<()> {
        route::delete(&self.rtnl, table, to, self.crowded.contains(&(table, to))).await?;
        self.crowded.remove(&(table, to));
        Ok(())
    }

    async fn set_nft(&mut self, nft: Option<&Nft>) -> io::Result<()> {
        let (wanted, seen) = (nft.cloned(), self.nft.take());
        let stood = seen.as_ref().and_then(nft::Seen::table).map(|table| table.keep_source.clone()).unwrap_or_default();
        self.nft = Some(blocking(move || Ok(nft::write(wanted, seen)?)).await?);
        self.late.extend(nft.iter().flat_map(|nft| nft.keep_source.difference(&stood)));
        Ok(())
    }

    /// Makes connections begin anew that the nft table came too late for. For the end of a pass: it looks through every
    /// connection of this machine. What fails is tried again by the next call.
    pub async fn forget_masqueraded(&mut self) -> io::Result<()> {
        if self.late.is_empty() {
            return Ok(());
        }
        let pairs = self.late.clone();
        let forgotten = blocking(move || conntrack::forget_masqueraded(&pairs)).await;
        let forgotten = forgotten.map_err(|error| context("the connection tracking clean-up", &error))?;
        if forgotten > 0 {
            tracing::info!(forgotten, "deleted connection tracking entries that were masqueraded");
        }
        self.late.clear();
        Ok(())
    }
}

impl<W: WireGuard> Kernel for Linux<W> {
    async fn read(&mut self) -> Reading {
        let mut reading = Reading::default();
        self.read_wireguard(&mut reading).await;
        self.read_links_and_routes(&mut reading).await;
        reading.state.rules = keep(&mut reading, Layer::Rule, rule::read(&self.rtnl).await);
        let seen = self.nft.take();
        let nft = blocking(move || Ok(nft::read(seen)?)).await.map(|seen| self.nft.insert(seen).table().cloned());
        reading.state.nft = keep(&mut reading, Layer::Nft, nft);
        let maps = self.bpf.read_maps(&self.secrets.hop);
        reading.state.maps = keep(&mut reading, Layer::Maps, maps);
        let programs = self.bpf.read_programs(&self.rtnl).await;
        reading.state.programs = keep(&mut reading, Layer::Programs, programs);
        reading
    }

    async fn apply(&mut self, op: &Op) -> io::Result<()> {
        match op {
            Op::SetDevice { device, wireguard } => self.set_device(*device, wireguard).await,
            Op::SetLink { interface, link } => self.set_link(*interface, link).await,
            Op::SetPeer { device, key, peer, gained } => self.set_peer(*device, key, peer, gained).await,
            Op::GrowNft(nft) => self.set_nft(Some(nft)).await,
            Op::SetRule(rule, lookups) => rule::set(&self.rtnl, *rule, lookups).await,
            Op::SetRoute { table, to, route } => self.set_route(*table, *to, route).await,
            Op::DelRoute { table, to } => self.delete_route(*table, *to).await,
            Op::DelRule(rule) => rule::delete(&self.rtnl, *rule).await,
            Op::ShrinkNft(nft) => self.set_nft(nft.as_ref()).await,
            Op::DropAllowedIps { device, key, lost } => self.wireguard.drop_allowed_ips(*device, key, lost).await,
            Op::RemovePeer { device, key } => self.wireguard.remove_peer(*device, key).await,
            Op::DelLink(interface) => self.delete_link(*interface).await,
            Op::SetHop(wanted) => hop::set(&self.rtnl, wanted).await,
            Op::AddOverlay(address) => address::add(&self.rtnl, *address).await,
            Op::DelOverlay(address) => address::delete(&self.rtnl, *address).await,
            Op::LoadMaps => self.bpf.load().await,
            Op::SetEntry(entry) => self.bpf.set(entry, &self.secrets.hop),
            Op::NarrowOwn(prefix, members) => self.bpf.set(&Entry::Own(*prefix, members.clone()), &self.secrets.hop),
            Op::DelEntry(key) => self.bpf.delete(key),
            Op::Attach(attachment) => self.bpf.attach(&self.rtnl, attachment).await,
            Op::Detach(attachment) => self.bpf.detach(&self.rtnl, attachment).await,
            Op::UnloadMaps => self.bpf.unload(&self.rtnl).await,
        }
    }
}

/// What removes damage that a reading cannot express: a rule, an nft table or a pin of ours that somebody altered reads
/// as missing. For leaving a node, after the diff; where there is nothing, each does nothing.
pub fn sweep() -> Vec<Op> {
    let rules = Family::ALL.into_iter().flat_map(|family| Table::ALL.map(|table| Op::DelRule(Rule { family, table })));
    rules.chain([Op::ShrinkNft(None), Op::UnloadMaps]).collect()
}

/// Why this process cannot configure the network.
#[derive(Debug, thiserror::Error)]
pub enum Unprivileged {
    #[error("no CAP_NET_ADMIN: run as root, or give the container `capabilities: {{add: [NET_ADMIN]}}` and user 0")]
    NetAdmin,
    #[error("cannot read the own capabilities")]
    Unknown(#[source] io::Error),
}

/// CAP_NET_ADMIN, include/uapi/linux/capability.h.
const CAP_NET_ADMIN: u32 = 12;

/// Whether links, routes, rules and nftables may be changed at all.
pub fn check_privileges() -> Result<(), Unprivileged> {
    let status = own_status().map_err(Unprivileged::Unknown)?;
    if has_net_admin(&status).map_err(Unprivileged::Unknown)? { Ok(()) } else { Err(Unprivileged::NetAdmin) }
}

fn has_net_admin(status: &str) -> io::Result<bool> {
    Ok(parse_capabilities(status)? & (1 << CAP_NET_ADMIN) != 0)
}

/// The effective ones.
fn capabilities() -> io::Result<u64> {
    parse_capabilities(&own_status()?)
}

/// Of the calling thread: a capability belongs to a thread.
fn own_status() -> io::Result<String> {
    fs::read_to_string("/proc/thread-self/status")
}

fn parse_capabilities(status: &str) -> io::Result<u64> {
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let bits = effective.and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok());
    bits.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "no CapEff in /proc/thread-self/status"))
}

/// The value, or the default with the layer marked as not read.
fn keep<T: Default>(reading: &mut Reading, layer: Layer, result: io::Result<T>) -> T {
    result.unwrap_or_else(|source| {
        reading.failed.push(ReadError { layer, source });
        T::default()
    })
}

/// Marks a layer as not read, and those that are understood by it.
fn unreadable(reading: &mut Reading, layer: Layer, others: &[Layer], source: io::Error) {
    for other in others {
        let source =
            io::Error::new(source.kind(), format!("the {layer} could not be read, by which these are understood"));
        reading.failed.push(ReadError { layer: *other, source });
    }
    reading.failed.push(ReadError { layer, source });
}

fn missing(what: String) -> io::Error {
    io::Error::new(io::ErrorKind::NotFound, format!("this node does not have the {what}"))
}

fn context(what: &str, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{what}: {error}"))
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
}
