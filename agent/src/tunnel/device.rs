//! One WireGuard device: its peers, their prefixes, and the tasks that move its packets.
//!
//! Invariant: a change is one write under one lock, so that a packet sees the table before it or after it, and no
//! change but a new key ends a session.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard,
        atomic::{AtomicU16, Ordering},
    },
};

use gotatun::{
    noise::{Tunn, index_table::IndexTable},
    x25519,
};
use ipnetwork::IpNetwork;
use tokio::{
    sync::Notify,
    task::{JoinError, JoinSet, block_in_place},
};
use tun_rs::AsyncDevice;

use super::{allowed::AllowedIps, forward, gate::Gate, peer::Peer, proto, tun, udp::Socket};
use crate::{
    kernel::{WgDevice, WgPeer},
    keys::{PrivateKey, PublicKey},
    names,
};

/// A device that runs. Dropping it stops its tasks and closes the TUN, which stays.
#[derive(Debug)]
pub(super) struct Device {
    name: names::Device,
    shared: Arc<Shared>,
    socket: Arc<Socket>,
    tasks: JoinSet<io::Error>,
}

/// What the device's tasks share with its owner.
pub(super) struct Shared {
    pub(super) name: names::Device,
    pub(super) tun: AsyncDevice,
    table: RwLock<Table>,
    /// The peers by the session numbers that they were told to send to.
    sessions: Mutex<BTreeMap<u32, Arc<Peer>>>,
    indices: IndexTable,
    /// The UDP port.
    pub(super) port: AtomicU16,
    /// The link's MTU, as last seen.
    pub(super) mtu: AtomicU16,
    /// Wakes the timers: a peer has something to send.
    pub(super) due: Notify,
}

pub(super) struct Table {
    pub(super) identity: Identity,
    pub(super) peers: BTreeMap<PublicKey, Arc<Peer>>,
    pub(super) owners: AllowedIps<Arc<Peer>>,
}

/// The device's own key, as gotatun wants it. It wipes the secret.
pub(super) struct Identity {
    pub(super) key: PublicKey,
    pub(super) secret: x25519::StaticSecret,
    pub(super) public: x25519::PublicKey,
    pub(super) gate: Gate,
}

impl Identity {
    pub(super) fn new(key: &PrivateKey) -> Identity {
        let secret = x25519::StaticSecret::from(*key.as_bytes());
        let public = x25519::PublicKey::from(&secret);
        Identity { key: key.public(), secret, gate: Gate::new(&public), public }
    }
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Shared {
    pub(super) fn table(&self) -> RwLockReadGuard<'_, Table> {
        self.table.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn table_mut(&self) -> RwLockWriteGuard<'_, Table> {
        self.table.write().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn sessions(&self) -> MutexGuard<'_, BTreeMap<u32, Arc<Peer>>> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets the numbers of sessions that are over.
    pub(super) fn prune_sessions(&self) {
        self.sessions().retain(|index, _| self.indices.in_use(*index));
    }

    /// Every peer, with its prefixes.
    pub(super) fn peers(&self) -> Vec<(Arc<Peer>, BTreeSet<IpNetwork>)> {
        let table = self.table();
        let mut prefixes: BTreeMap<PublicKey, BTreeSet<IpNetwork>> = BTreeMap::new();
        for (prefix, owner) in table.owners.iter() {
            prefixes.entry(owner.key).or_default().insert(prefix);
        }
        let of = |(key, peer): (&PublicKey, &Arc<Peer>)| (peer.clone(), prefixes.remove(key).unwrap_or_default());
        table.peers.iter().map(of).collect()
    }
}

impl Device {
    /// Makes or takes the TUN, binds the port and begins to move packets.
    pub(super) fn start(name: names::Device, port: u16, key: &PrivateKey) -> io::Result<Device> {
        let socket = bind(port)?;
        // Making a link waits for the lock over all of them; others' packets must not.
        let tun = block_in_place(|| tun::open(name)).map_err(|err| with_context(&format!("TUN {name}"), err))?;
        let table = Table { identity: Identity::new(key), peers: BTreeMap::new(), owners: AllowedIps::default() };
        let mtu = tun::mtu(name)?;
        let shared = Arc::new(Shared {
            name,
            tun,
            table: RwLock::new(table),
            sessions: Mutex::default(),
            indices: IndexTable::from_os_rng(),
            port: AtomicU16::new(port),
            mtu: AtomicU16::new(mtu),
            due: Notify::new(),
        });
        let mut device = Device { name, shared, socket: Arc::new(socket), tasks: JoinSet::new() };
        device.spawn();
        Ok(device)
    }

    fn spawn(&mut self) {
        self.tasks.spawn(forward::outgoing(self.shared.clone(), self.socket.clone()));
        self.tasks.spawn(forward::incoming(self.shared.clone(), self.socket.clone()));
        self.tasks.spawn(forward::timers(self.shared.clone(), self.socket.clone()));
    }

    pub(super) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// Why the device runs no more, if it does not: its link was deleted, or one of its tasks panicked.
    pub(super) fn failure(&mut self) -> Option<Result<io::Error, JoinError>> {
        self.tasks.try_join_next()
    }

    /// Takes over port and key where they differ. Another port keeps the sessions, another key cannot.
    pub(super) async fn set(&mut self, port: u16, key: &PrivateKey) -> io::Result<()> {
        if self.shared.port.load(Ordering::Relaxed) != port {
            let socket = bind(port)?;
            self.tasks.shutdown().await;
            self.socket = Arc::new(socket);
            self.shared.port.store(port, Ordering::Relaxed);
            self.spawn();
        }
        let mut table = self.shared.table_mut();
        if table.identity.key != key.public() {
            table.identity = Identity::new(key);
            for peer in table.peers.values() {
                peer.lock().set_identity(&table.identity);
            }
            drop(table);
            self.shared.due.notify_one();
        }
        Ok(())
    }

    /// Creates or updates the peer and moves the prefixes to it.
    pub(super) fn set_peer(&self, key: PublicKey, config: &proto::PeerConfig, gained: &[IpNetwork]) -> io::Result<()> {
        let mut table = self.shared.table_mut();
        if key == table.identity.key {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("peer {key} has {}'s own key", self.name)));
        }
        let peer = match table.peers.get(&key) {
            Some(peer) => {
                peer.lock().configure(config);
                peer.clone()
            }
            None => {
                let peer = Arc::new(Peer::new(key, self.tunn(&table.identity, key, config), config));
                table.peers.insert(key, peer.clone());
                peer
            }
        };
        for prefix in gained {
            table.owners.insert(*prefix, peer.clone());
        }
        drop(table);
        self.shared.due.notify_one();
        Ok(())
    }

    fn tunn(&self, identity: &Identity, key: PublicKey, config: &proto::PeerConfig) -> Tunn {
        Tunn::new(
            identity.secret.clone(),
            (*key.as_bytes()).into(),
            config.psk.as_ref().map(|psk| *psk.as_bytes()),
            Some(config.keepalive),
            self.shared.indices.clone(),
            identity.gate.limiter(),
        )
    }

    /// Takes from the peer those of the prefixes that are its own.
    pub(super) fn drop_allowed_ips(&self, key: PublicKey, lost: &[IpNetwork]) {
        let lost: BTreeSet<_> =
            lost.iter().filter_map(|net| IpNetwork::new(net.network(), net.prefix()).ok()).collect();
        self.shared.table_mut().owners.retain(|prefix, owner| owner.key != key || !lost.contains(&prefix));
    }

    pub(super) fn remove_peer(&self, key: PublicKey) {
        let mut table = self.shared.table_mut();
        table.owners.retain(|_, owner| owner.key != key);
        table.peers.remove(&key);
        self.shared.sessions().retain(|_, peer| peer.key != key);
    }

    pub(super) fn read(&self) -> proto::Reading {
        let peers = self.shared.peers().into_iter().map(|(peer, allowed_ips)| {
            let (config, pair) = peer.lock().read();
            (peer.key, WgPeer { peer: config, allowed_ips, pair })
        });
        let device = WgDevice {
            key: self.shared.table().identity.key,
            port: self.shared.port.load(Ordering::Relaxed),
            peers: peers.collect(),
        };
        proto::Reading { device, socket_drops: self.socket.drops() }
    }

    /// Stops; the link stays.
    pub(super) async fn stop(mut self) {
        self.tasks.shutdown().await;
    }

    /// Stops, and takes the link along.
    pub(super) async fn delete(self) -> io::Result<()> {
        let shared = self.shared.clone();
        self.stop().await;
        block_in_place(move || tun::unpersist(&shared.tun))
    }
}

fn bind(port: u16) -> io::Result<Socket> {
    Socket::bind(port).map_err(|err| with_context(&format!("UDP port {port}"), err))
}

fn with_context(what: &str, err: io::Error) -> io::Error {
    io::Error::new(err.kind(), format!("{what}: {err}"))
}
