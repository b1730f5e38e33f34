//! The UDP side: one socket per device for both families, with segmentation on the way out (`UDP_SEGMENT`) and
//! coalescing on the way in (`UDP_GRO`), so that a system call carries up to 64 KiB.
//!
//! Invariant: what carries more than the 1280 bytes that IPv6 asks of every link is never fragmented, so that a path too
//! narrow for it shows: by default Linux fragments what is segmented and nothing else, and a probe and a stream would meet
//! two different paths. What carries less may be fragmented, as RFC 8200 §5 asks of a link below IPv6.

use std::{
    io::{self, IoSlice, IoSliceMut},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::{AsFd, AsRawFd, RawFd},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use bytes::BytesMut;
use gotatun::packet::Packet;
use nix::{
    errno::Errno,
    sys::socket::{
        self, AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, SockaddrIn,
        SockaddrIn6, SockaddrStorage, recvmsg, sendmsg, sockopt,
    },
};
use tokio::{io::Interest, net::UdpSocket};

use crate::state::{MIN_MTU_V4, MIN_MTU_V6};

/// Kernel memory for datagrams that wait, bytes, each way; it is used only as they do. The windows of a few TCP flows
/// fit, so that a tunnel that has lost its processor for some milliseconds costs no retransmission.
const SOCKET_BUFFER: usize = 16 << 20;
/// Most segments in one datagram (`UDP_MAX_SEGMENTS` before Linux 6.9).
const MAX_SEGMENTS: usize = 64;
/// Most bytes in one datagram, below what IPv4 and IPv6 leave for UDP's payload.
const MAX_DATAGRAM: usize = 65_000;
/// One read may return this much, bytes.
const MAX_READ: usize = 65_535;
/// What one round of reads may fill, bytes.
const ARENA: usize = 8 * MAX_READ;
/// A round that has brought so many bytes ends where its sender paused. Inside a burst it would cut a packet that is
/// joined again from the datagrams before and after it.
const ENOUGH: usize = 3 * MAX_READ;

/// WireGuard's header and authenticator, bytes.
const SEALED: usize = 16 + 16;
/// Sealed packets of at most so many bytes are taken to pass anywhere whole: nothing is set for them alone.
const SMALL: usize = MIN_MTU_V4 as usize + SEALED;
/// A sealed packet of more bytes is never fragmented.
const MOST_IN_PIECES: usize = MIN_MTU_V6 as usize + SEALED;

/// Where a peer is, and which of our addresses it knows: an answer from another one would not pass the peer's NAT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Endpoint {
    pub(super) peer: SocketAddr,
    /// `None`: the kernel chooses.
    local: Option<IpAddr>,
}

impl From<SocketAddr> for Endpoint {
    fn from(peer: SocketAddr) -> Endpoint {
        Endpoint { peer, local: None }
    }
}

/// A bound socket. Both halves of a device's data path share it.
#[derive(Debug)]
pub(super) struct Socket {
    inner: UdpSocket,
    family: AddressFamily,
    /// Cleared for good where the route's device cannot checksum, so that the kernel refuses to segment.
    segmentation: AtomicBool,
    /// Whether the socket now forbids to fragment IPv4 and IPv6 datagrams. Held while one is sent.
    whole: Mutex<[bool; 2]>,
}

impl Socket {
    /// Binds the port for IPv4 and IPv6, or for IPv4 alone where the kernel has no IPv6.
    pub(super) fn bind(port: u16) -> io::Result<Socket> {
        let (socket, family) = match bind_any(port, AddressFamily::Inet6) {
            Err(Errno::EAFNOSUPPORT | Errno::EADDRNOTAVAIL) => {
                (bind_any(port, AddressFamily::Inet)?, AddressFamily::Inet)
            }
            bound => (bound?, AddressFamily::Inet6),
        };
        socket.set_nonblocking(true)?;
        forbid_fragments(socket.as_raw_fd(), false, true)?;
        if family == AddressFamily::Inet6 {
            forbid_fragments(socket.as_raw_fd(), true, true)?;
        }
        let inner = UdpSocket::from_std(socket)?;
        Ok(Socket { inner, family, segmentation: AtomicBool::new(true), whole: Mutex::new([true; 2]) })
    }

    /// Datagrams that the kernel dropped because this socket was full (`SK_MEMINFO_DROPS`).
    pub(super) fn drops(&self) -> u32 {
        const SK_MEMINFO_DROPS: usize = 8;
        let mut info = [0u32; SK_MEMINFO_DROPS + 1];
        let mut len = size_of_val(&info) as libc::socklen_t;
        // SAFETY: the kernel writes at most `len` bytes to `info`, which is that long and lives across the call.
        let rc = unsafe {
            libc::getsockopt(
                self.inner.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_MEMINFO,
                info.as_mut_ptr().cast(),
                &raw mut len,
            )
        };
        if rc == 0 { info[SK_MEMINFO_DROPS] } else { 0 }
    }

    /// Sends all, in order. What the kernel will not send is lost, as on any network. Returns the endpoints of which the
    /// local address is of no use any more.
    pub(super) async fn send(&self, packets: &mut Vec<(Packet, Endpoint)>) -> Vec<Endpoint> {
        let mut stale = Vec::new();
        let mut rest = &packets[..];
        while let Some((first, to)) = rest.first() {
            let run = if self.segmentation.load(Ordering::Relaxed) { run_length(rest) } else { 1 };
            let (now, later) = rest.split_at(run);
            rest = later;
            match self.send_run(now, first.len(), *to, &mut stale).await {
                Ok(()) => {}
                // EIO: no checksum offload on the way. EINVAL, EMSGSIZE: a segment is longer than the path's MTU.
                Err(err)
                    if run > 1 && matches!(err.raw_os_error(), Some(libc::EIO | libc::EINVAL | libc::EMSGSIZE)) =>
                {
                    if err.raw_os_error() == Some(libc::EIO) {
                        tracing::info!(to = %to.peer, "the way out cannot segment UDP: sending packet by packet");
                        self.segmentation.store(false, Ordering::Relaxed);
                    }
                    for packet in now {
                        let packet = std::slice::from_ref(packet);
                        if let Err(err) = self.send_run(packet, packet[0].0.len(), *to, &mut stale).await {
                            tracing::debug!(to = %to.peer, %err, "packet not sent");
                        }
                    }
                }
                Err(err) => tracing::debug!(to = %to.peer, %err, packets = run, "packets not sent"),
            }
        }
        packets.clear();
        stale
    }

    /// Sends packets of `segment` bytes each, the last at most that long, as one.
    async fn send_run(
        &self,
        run: &[(Packet, Endpoint)],
        segment: usize,
        to: Endpoint,
        stale: &mut Vec<Endpoint>,
    ) -> io::Result<()> {
        let sent = self.send_from(run, segment, to).await;
        match sent.as_ref().map_err(io::Error::raw_os_error) {
            // The address was removed, or has no route to there (kernel: `send4`, `send6` in socket.c).
            Err(Some(libc::EINVAL | libc::EADDRNOTAVAIL | libc::ENETUNREACH)) if to.local.is_some() => {
                self.send_from(run, segment, to.peer.into()).await?;
                stale.push(to);
                Ok(())
            }
            _ => sent,
        }
    }

    async fn send_from(&self, run: &[(Packet, Endpoint)], segment: usize, to: Endpoint) -> io::Result<()> {
        let parts: Vec<IoSlice<'_>> = run.iter().map(|(packet, _)| IoSlice::new(packet)).collect();
        let address = SockaddrStorage::from(to.peer);
        // The last of a run goes as the first.
        let whole = (segment > SMALL).then_some(segment > MOST_IN_PIECES);
        let segment = segment as u16;
        let (mut v4, mut v6) = (None, None);
        match to.local {
            Some(IpAddr::V4(ip)) if self.family == AddressFamily::Inet => {
                let (any, ip) = (libc::in_addr { s_addr: 0 }, libc::in_addr { s_addr: u32::from(ip).to_be() });
                v4 = Some(libc::in_pktinfo { ipi_ifindex: 0, ipi_spec_dst: ip, ipi_addr: any });
            }
            Some(ip) => {
                let ip = match ip {
                    IpAddr::V4(ip) => ip.to_ipv6_mapped(),
                    IpAddr::V6(ip) => ip,
                };
                v6 = Some(libc::in6_pktinfo { ipi6_addr: libc::in6_addr { s6_addr: ip.octets() }, ipi6_ifindex: 0 });
            }
            None => {}
        }
        let segmented = (run.len() > 1).then_some(ControlMessage::UdpGsoSegments(&segment));
        let v4 = v4.as_ref().map(ControlMessage::Ipv4PacketInfo);
        let v6 = v6.as_ref().map(ControlMessage::Ipv6PacketInfo);
        let control: Vec<_> = [segmented, v4, v6].into_iter().flatten().collect();
        let fd = self.inner.as_raw_fd();
        let send = || {
            let mut set = self.whole.lock().unwrap_or_else(PoisonError::into_inner);
            let set = &mut set[usize::from(to.peer.is_ipv6())];
            if let Some(whole) = whole.filter(|whole| whole != set) {
                forbid_fragments(fd, to.peer.is_ipv6(), whole)?;
                *set = whole;
            }
            Ok(sendmsg(fd, &parts, &control, MsgFlags::MSG_DONTWAIT, Some(&address))?)
        };
        self.inner.async_io(Interest::WRITABLE, send).await.map(drop)
    }

    /// Waits for a datagram, then takes what has come, as long as the arena has room.
    pub(super) async fn recv(&self, arena: &mut Arena) -> io::Result<()> {
        arena.reset();
        let mut in_burst = self.inner.async_io(Interest::READABLE, || arena.read(&self.inner)).await?;
        while arena.has_room(in_burst) {
            in_burst = match self.inner.try_io(Interest::READABLE, || arena.read(&self.inner)) {
                Ok(in_burst) => in_burst,
                Err(err) if err.kind() == io::ErrorKind::WouldBlock => break,
                Err(err) => return Err(err),
            }
        }
        Ok(())
    }
}

/// How many packets, from the first, one `sendmsg` can segment: one endpoint, one length, the last may be shorter.
fn run_length(packets: &[(Packet, Endpoint)]) -> usize {
    let Some((first, to)) = packets.first() else { return 0 };
    let (mut total, mut run) = (first.len(), 1);
    for (packet, also_to) in packets.iter().skip(1).take(MAX_SEGMENTS - 1) {
        total += packet.len();
        if also_to != to || packet.len() > first.len() || total > MAX_DATAGRAM {
            break;
        }
        run += 1;
        if packet.len() < first.len() {
            break;
        }
    }
    run
}

fn bind_any(port: u16, family: AddressFamily) -> nix::Result<std::net::UdpSocket> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket::socket(family, SockType::Datagram, flags, None)?;
    // FORCE: with CAP_NET_ADMIN, which we have for the TUN, net.core.rmem_max does not bound us.
    socket::setsockopt(&fd, sockopt::RcvBufForce, &SOCKET_BUFFER)?;
    socket::setsockopt(&fd, sockopt::SndBufForce, &SOCKET_BUFFER)?;
    socket::setsockopt(&fd, sockopt::UdpGroSegment, &true)?;
    if family == AddressFamily::Inet6 {
        socket::setsockopt(&fd, sockopt::Ipv6V6Only, &false)?;
        socket::setsockopt(&fd, sockopt::Ipv6RecvPacketInfo, &true)?;
        let any = std::net::SocketAddrV6::new(Ipv6Addr::UNSPECIFIED, port, 0, 0);
        socket::bind(fd.as_fd().as_raw_fd(), &SockaddrIn6::from(any))?;
    } else {
        socket::setsockopt(&fd, sockopt::Ipv4PacketInfo, &true)?;
        let any = std::net::SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, port);
        socket::bind(fd.as_fd().as_raw_fd(), &SockaddrIn::from(any))?;
    }
    Ok(fd.into())
}

/// Forbids it to everybody on the way, and believes no ICMP message about the path (ip(7), `IP_PMTUDISC_PROBE`); or allows
/// it.
fn forbid_fragments(fd: RawFd, v6: bool, forbid: bool) -> io::Result<()> {
    let (level, option, value) = match (v6, forbid) {
        (false, true) => (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_PROBE),
        (false, false) => (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_DONT),
        (true, true) => (libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, libc::IPV6_PMTUDISC_PROBE),
        (true, false) => (libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, libc::IPV6_PMTUDISC_DONT),
    };
    let len = size_of_val(&value) as libc::socklen_t;
    // SAFETY: the kernel reads an int at `value`, which lives across the call.
    let rc = unsafe { libc::setsockopt(fd, level, option, (&raw const value).cast(), len) };
    if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Memory for one round of reads. Packets are cut from it without a copy; once they are dropped it is used again.
#[derive(Debug)]
pub(super) struct Arena {
    /// Holds on to the start of the allocation while packets own the rest.
    start: BytesMut,
    free: BytesMut,
    control: Vec<u8>,
    pub(super) packets: Vec<(BytesMut, Endpoint)>,
}

impl Arena {
    pub(super) fn new() -> Arena {
        let mut free = BytesMut::zeroed(ARENA);
        Arena { start: free.split_to(0), free, control: nix::cmsg_space!(i32, libc::in6_pktinfo), packets: Vec::new() }
    }

    /// For one more read, of a burst that goes on or of another one.
    fn has_room(&self, in_burst: bool) -> bool {
        self.free.len() >= MAX_READ && (in_burst || ARENA - self.free.len() < ENOUGH)
    }

    fn reset(&mut self) {
        self.packets.clear();
        self.free = BytesMut::new();
        if self.start.try_reclaim(ARENA) {
            self.free = self.start.split_off(0);
            // SAFETY: `try_reclaim` made the capacity at least ARENA without allocating, so this is the memory that
            // `zeroed` initialized, and nobody else holds a part of it.
            unsafe { self.free.set_len(ARENA) };
        } else {
            self.free = BytesMut::zeroed(ARENA);
            self.start = self.free.split_to(0);
        }
    }

    /// One `recvmsg`: one datagram, or several of one sender and one length that the kernel has joined.
    /// Returns whether it is as long as they get, so that more of the sender's burst may follow.
    fn read(&mut self, socket: &UdpSocket) -> io::Result<bool> {
        let mut parts = [IoSliceMut::new(&mut self.free)];
        let flags = MsgFlags::MSG_DONTWAIT;
        let message = recvmsg::<SockaddrStorage>(socket.as_raw_fd(), &mut parts, Some(&mut self.control), flags)?;
        let len = message.bytes;
        let from = message.address.as_ref().and_then(to_std);
        let (mut segment, mut local) = (None, None);
        for control in message.cmsgs()? {
            match control {
                ControlMessageOwned::UdpGroSegments(size) => {
                    segment = usize::try_from(size).ok().filter(|size| *size > 0)
                }
                ControlMessageOwned::Ipv4PacketInfo(info) => {
                    local = Some(IpAddr::V4(u32::from_be(info.ipi_addr.s_addr).into()));
                }
                ControlMessageOwned::Ipv6PacketInfo(info) => {
                    local = Some(IpAddr::V6(info.ipi6_addr.s6_addr.into()).to_canonical());
                }
                _ => {}
            }
        }
        let Some(peer) = from else { return Ok(false) };
        let from = Endpoint { peer, local: local.filter(is_global) };
        let mut joined = self.free.split_to(len);
        let segment = segment.unwrap_or(len);
        let full = len + segment > MAX_DATAGRAM || len >= MAX_SEGMENTS * segment;
        while !joined.is_empty() {
            let packet = joined.split_to(segment.min(joined.len()));
            self.packets.push((packet, from));
        }
        Ok(full)
    }
}

/// Whether it says without an interface which address it is.
fn is_global(ip: &IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => !ip.is_multicast() && !ip.is_broadcast(),
        IpAddr::V6(ip) => !ip.is_multicast() && !ip.is_unicast_link_local(),
    }
}

/// An IPv4 sender appears as a mapped address on a socket for both families; endpoints are never written so.
fn to_std(address: &SockaddrStorage) -> Option<SocketAddr> {
    if let Some(v4) = address.as_sockaddr_in() {
        return Some(std::net::SocketAddrV4::from(*v4).into());
    }
    let mut v6 = SocketAddr::V6((*address.as_sockaddr_in6()?).into());
    if let IpAddr::V6(ip) = v6.ip() {
        v6.set_ip(ip.to_canonical());
    }
    Some(v6)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::kernel::tests::{in_netns, sh};

    /// Neither alone nor in a run, whatever was sent before; needs root.
    #[test]
    fn what_is_longer_than_ipv6_needs_never_goes_in_pieces() {
        const LAST: usize = 1;
        let lengths = [100, 1312, 1313, 609, 1400, 608, 1312, 1312, 1300, 1313, 1313, 1400, 1400, 700, LAST];
        let heard: Vec<usize> = lengths.into_iter().filter(|len| *len <= 1312).collect();
        in_netns(|| async {
            sh("ip link set lo mtu 1280");
            for ip in ["127.0.0.1", "::1"] {
                let to = UdpSocket::bind((ip, 0)).await.unwrap();
                let at = Endpoint::from(to.local_addr().unwrap());
                let packet = |len| (Packet::from_bytes(BytesMut::zeroed(len)), at);
                let mut packets: Vec<_> = lengths.map(packet).into();
                Socket::bind(0).unwrap().send(&mut packets).await;
                let mut received = Vec::new();
                while received.last() != Some(&LAST) {
                    received.push(to.recv(&mut [0; 2000]).await.unwrap());
                }
                assert_eq!(received, heard, "{ip}");
            }
        });
    }

    /// Frames of a TCP stream, each sealed to more than one datagram carries and sent before the next; needs root.
    #[test]
    fn a_round_of_reads_ends_between_two_bursts() {
        const BURSTS: u8 = 40;
        const PACKETS: usize = 47;
        in_netns(|| async {
            sh("ip link set lo up");
            let (from, to) = (Socket::bind(0).unwrap(), Socket::bind(0).unwrap());
            let at = Endpoint::from(SocketAddr::from((Ipv4Addr::LOCALHOST, to.inner.local_addr().unwrap().port())));
            for burst in 0..BURSTS {
                let packet = || (Packet::from_bytes(BytesMut::from(&[burst; 1440][..])), at);
                from.send(&mut std::iter::repeat_with(packet).take(PACKETS).collect()).await;
            }
            let (mut arena, mut next) = (Arena::new(), 0);
            while next < BURSTS {
                to.recv(&mut arena).await.unwrap();
                let received: Vec<u8> = arena.packets.iter().map(|(packet, _)| packet[0]).collect();
                let whole = received.len() / PACKETS;
                let expected: Vec<u8> = (next..).take(whole).flat_map(|burst| [burst; PACKETS]).collect();
                assert!(whole > 0);
                assert_eq!(received, expected);
                next += whole as u8;
            }
        });
    }
}
