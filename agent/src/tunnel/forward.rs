//! The data path of one device: three tasks, from the TUN to the socket, from the socket to the TUN, and the timers.
//!
//! Work comes in batches: a read brings up to 64 KiB, locks are taken once for it, and what comes out is written by as
//! few system calls. No lock is held across an `await`.

use std::{
    future::Future,
    io::{self, IoSlice},
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use bytes::BytesMut;
use gotatun::{
    noise::{TunnResult, handshake::parse_handshake_anon},
    packet::{Packet, PacketBufPool, WgKind},
};

use super::{
    device::{Shared, Table},
    gate::Load,
    offload::{self, Frame, Group},
    peer::Peer,
    tun,
    udp::{Arena, Endpoint, Socket},
};
use crate::keys::PublicKey;

/// gotatun's timers are made to be looked at this often.
const TICK: Duration = Duration::from_millis(250);
/// Packets that are collected before they are sent, as long as the TUN has more.
const BATCH: usize = 64;
/// Buffer for a packet that is to be encrypted, bytes; a longer one gets memory of its own.
const PACKET: usize = 2048;

type Batch = Vec<(Packet, Endpoint)>;

/// From the TUN to the socket. Ends when the TUN is gone.
pub(super) async fn outgoing(shared: Arc<Shared>, socket: Arc<Socket>) -> io::Error {
    let mut sealer = Sealer { pool: PacketBufPool::new(2), batch: Vec::with_capacity(2 * BATCH) };
    let mut frame = vec![0; offload::VNET_HEADER + usize::from(u16::MAX)];
    loop {
        let mut read = shared.tun.recv(&mut frame).await;
        while let Ok(len) = read {
            sealer.seal(&shared, &mut frame[..len]);
            if sealer.batch.len() >= BATCH {
                break;
            }
            read = shared.tun.try_recv(&mut frame);
        }
        send(&shared, &socket, &mut sealer.batch).await;
        match read {
            Ok(_) => tokio::task::consume_budget().await,
            Err(err) if err.kind() == io::ErrorKind::WouldBlock => {}
            Err(err) if is_gone(&err) => return err,
            Err(err) => pause_after(&shared, "read from the TUN", &err).await,
        }
    }
}

struct Sealer {
    /// Its packet is back before the next one is taken, and still in the cache.
    pool: PacketBufPool<PACKET>,
    batch: Batch,
}

impl Sealer {
    /// Encrypts one read. What no peer owns is dropped, as the kernel does.
    fn seal(&mut self, shared: &Shared, frame: &mut [u8]) {
        let Some(frame) = Frame::parse(frame) else { return };
        let table = shared.table();
        let Some(peer) = frame.destination().and_then(|to| table.owners.find(to)) else { return };
        let mtu = usize::from(shared.mtu.load(Ordering::Relaxed));
        let mut state = peer.lock();
        let Some(to) = state.endpoint() else { return };
        for index in 0..frame.segments() {
            let packet = self.packet(&frame, index, mtu);
            if let Some(sealed) = state.seal(packet) {
                register(shared, &sealed, peer);
                self.batch.push((sealed.into(), to));
            }
        }
    }

    /// A copy, padded to a multiple of 16 bytes within the MTU (whitepaper §5.4.6).
    fn packet(&self, frame: &Frame<'_>, index: usize, mtu: usize) -> Packet {
        let room = frame.longest() + 16;
        let mut packet = if room <= PACKET { self.pool.get() } else { Packet::from_bytes(BytesMut::zeroed(room)) };
        let len = frame.segment(index, &mut packet);
        let padded = len.next_multiple_of(16).min(mtu).max(len);
        packet[len..padded].fill(0);
        packet.truncate(padded);
        packet
    }
}

/// From the socket to the TUN. Ends when the TUN is gone.
pub(super) async fn incoming(shared: Arc<Shared>, socket: Arc<Socket>) -> io::Error {
    let mut arena = Arena::new();
    let mut opened = Opened { packets: Vec::new(), replies: Vec::new(), load: Load::new(Instant::now()) };
    loop {
        let received = socket.recv(&mut arena).await;
        opened.open(&shared, &mut arena);
        send(&shared, &socket, &mut opened.replies).await;
        let groups = offload::coalesce(&mut opened.packets, shared.tun.udp_gso());
        for group in &groups {
            if let Err(err) = write(&shared, group, &opened.packets).await {
                if is_gone(&err) {
                    return err;
                }
                // EIO: the link is down.
                tracing::debug!(device = %shared.name, %err, "packet not delivered");
            }
        }
        opened.packets.clear();
        match received {
            Ok(()) => tokio::task::consume_budget().await,
            Err(err) => pause_after(&shared, "receive", &err).await,
        }
    }
}

/// What came out of one round of reads.
struct Opened {
    packets: Vec<BytesMut>,
    replies: Batch,
    load: Load,
}

impl Opened {
    fn open(&mut self, shared: &Shared, arena: &mut Arena) {
        let table = shared.table();
        // Packets of a joined read are of one session, and mostly of one flow.
        let mut last: Option<(u32, Arc<Peer>)> = None;
        for (packet, from) in arena.packets.drain(..) {
            // Anything else costs gotatun a formatted error.
            if !matches!(packet.first(), Some(1..=4)) {
                continue;
            }
            let packet = match table.identity.gate.admit(&mut self.load, Packet::from_bytes(packet), from.peer) {
                Ok(packet) => packet,
                Err(cookie) => {
                    self.replies.extend(cookie.map(|cookie| (cookie.into(), from)));
                    continue;
                }
            };
            let session = session_of(&packet);
            let peer = match &last {
                Some((index, peer)) if session == Some(*index) => peer.clone(),
                _ => match find_peer(shared, &table, &packet) {
                    Some(peer) => peer,
                    None => continue,
                },
            };
            self.open_one(shared, &table, &peer, packet, from);
            last = session.map(|index| (index, peer));
        }
    }

    fn open_one(&mut self, shared: &Shared, table: &Table, peer: &Arc<Peer>, packet: WgKind, from: Endpoint) {
        let mut state = peer.lock();
        match state.open(packet, from) {
            TunnResult::Done | TunnResult::Err(_) => return,
            TunnResult::WriteToNetwork(reply) => {
                register(shared, &reply, peer);
                self.replies.push((reply.into(), from));
            }
            TunnResult::WriteToTunnel(mut packet) => {
                if let Some(len) = admit(table, peer, &packet) {
                    packet.truncate(len);
                    self.packets.push(std::mem::take(packet.buf_mut()));
                }
            }
        }
        for packet in state.release() {
            register(shared, &packet, peer);
            self.replies.push((packet.into(), from));
        }
    }
}

/// The length of a packet that its sender may send: one that would be routed to the same peer (whitepaper §2). `None`
/// for a keepalive, for what is no IP packet, and for a source that is another's.
fn admit(table: &Table, peer: &Arc<Peer>, packet: &[u8]) -> Option<usize> {
    let len = offload::ip_len(packet)?;
    let owner = table.owners.find(offload::source(packet)?)?;
    Arc::ptr_eq(owner, peer).then_some(len)
}

/// The session that a packet names; a handshake's first message names none.
fn session_of(packet: &WgKind) -> Option<u32> {
    match packet {
        WgKind::HandshakeInit(_) => None,
        WgKind::HandshakeResp(packet) => Some(packet.receiver_idx.get()),
        WgKind::CookieReply(packet) => Some(packet.receiver_idx.get()),
        WgKind::Data(packet) => Some(packet.header.receiver_idx.get()),
    }
}

fn find_peer(shared: &Shared, table: &Table, packet: &WgKind) -> Option<Arc<Peer>> {
    if let WgKind::HandshakeInit(packet) = packet {
        let half = parse_handshake_anon(&table.identity.secret, &table.identity.public, packet).ok()?;
        return table.peers.get(&PublicKey::assume_valid(half.peer_static_public)).cloned();
    }
    shared.sessions().get(&session_of(packet)?).cloned()
}

/// Remembers who the other side will mean by the number in a handshake of ours.
fn register(shared: &Shared, packet: &WgKind, peer: &Arc<Peer>) {
    let index = match packet {
        WgKind::HandshakeInit(packet) => packet.sender_idx.get(),
        WgKind::HandshakeResp(packet) => packet.sender_idx.get(),
        WgKind::CookieReply(_) | WgKind::Data(_) => return,
    };
    shared.sessions().insert(index, peer.clone());
}

async fn write(shared: &Shared, group: &Group, packets: &[BytesMut]) -> io::Result<()> {
    let mut parts = Vec::with_capacity(2 + group.tail.len());
    parts.push(IoSlice::new(&group.header));
    parts.push(IoSlice::new(&packets[group.head]));
    parts.extend(group.tail.iter().map(|(index, payload)| IoSlice::new(&packets[*index][payload.clone()])));
    shared.tun.send_vectored(&parts).await.map(drop)
}

async fn send(shared: &Shared, socket: &Socket, batch: &mut Batch) {
    for stale in socket.send(batch).await {
        shared.table().peers.values().for_each(|peer| peer.lock().forget_local(stale));
    }
}

/// Keepalives, handshakes, and the link's MTU.
pub(super) async fn timers(shared: Arc<Shared>, socket: Arc<Socket>) -> io::Error {
    let mut batch = Vec::new();
    loop {
        tokio::select! {
            () = tokio::time::sleep(TICK) => {}
            () = shared.due.notified() => {}
        }
        match tun::mtu(shared.name) {
            Ok(mtu) => shared.mtu.store(mtu, Ordering::Relaxed),
            Err(err) if is_gone(&err) => return err,
            Err(err) => tracing::debug!(device = %shared.name, %err, "MTU"),
        }
        collect_due(&shared, &mut batch);
        shared.prune_sessions();
        send(&shared, &socket, &mut batch).await;
    }
}

/// Under one lock, so that no session of a peer that is removed meanwhile is registered after it.
fn collect_due(shared: &Shared, batch: &mut Batch) {
    let table = shared.table();
    table.identity.gate.tick();
    for peer in table.peers.values() {
        if let Some((packet, to)) = peer.lock().tick() {
            register(shared, &packet, peer);
            batch.push((packet.into(), to));
        }
    }
}

/// Whether the TUN's link was deleted (`tun_chr_read_iter`, `tun_chr_write_iter`).
fn is_gone(err: &io::Error) -> bool {
    matches!(err.raw_os_error(), Some(libc::EBADF | libc::EBADFD | libc::ENODEV))
}

/// An error that may pass, such as a lack of memory, must not become a busy loop.
fn pause_after<'a>(shared: &'a Shared, what: &'a str, err: &'a io::Error) -> impl Future<Output = ()> + 'a {
    tracing::warn!(device = %shared.name, %err, "cannot {what}");
    tokio::time::sleep(Duration::from_millis(100))
}
