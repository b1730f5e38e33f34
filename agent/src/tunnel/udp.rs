//! The UDP side: one socket per device for both families, with segmentation on the way out (`UDP_SEGMENT`) and
//! coalescing on the way in (`UDP_GRO`), so that a system call carries up to 64 KiB.

use std::{
    io::{self, IoSlice, IoSliceMut},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::{AsFd, AsRawFd},
    sync::atomic::{AtomicBool, Ordering},
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

/// Kernel memory for datagrams that wait, bytes, each way; it is used only as they do. The windows of a few TCP flows
/// fit, so that a tunnel that has lost its processor for some milliseconds costs no retransmission.
const SOCKET_BUFFER: usize = 16 << 20;
/// Most segments in one datagram (`UDP_MAX_SEGMENTS` before Linux 6.9).
const MAX_SEGMENTS: usize = 64;
/// Most bytes in one datagram, below what IPv4 and IPv6 leave for UDP's payload.
const MAX_DATAGRAM: usize = 65_000;
/// One read may return this much, bytes.
const MAX_READ: usize = 65_535;
/// What one round of reads may fill, bytes: three full reads, or over a hundred single packets.
const ARENA: usize = 4 * MAX_READ;

/// A bound socket. Both halves of a device's data path share it.
#[derive(Debug)]
pub(super) struct Socket {
    inner: UdpSocket,
    /// Cleared for good where the route's device cannot checksum, so that the kernel refuses to segment.
    segmentation: AtomicBool,
}

impl Socket {
    /// Binds the port for IPv4 and IPv6, or for IPv4 alone where the kernel has no IPv6.
    pub(super) fn bind(port: u16) -> io::Result<Socket> {
        let socket = match bind_any(port, AddressFamily::Inet6) {
            Err(Errno::EAFNOSUPPORT | Errno::EADDRNOTAVAIL) => bind_any(port, AddressFamily::Inet),
            bound => bound,
        }?;
        socket.set_nonblocking(true)?;
        Ok(Socket { inner: UdpSocket::from_std(socket)?, segmentation: AtomicBool::new(true) })
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

    /// Sends all, in order. What the kernel will not send is lost, as on any network.
    pub(super) async fn send(&self, packets: &mut Vec<(Packet, SocketAddr)>) {
        let mut rest = &packets[..];
        while let Some((first, to)) = rest.first() {
            let run = if self.segmentation.load(Ordering::Relaxed) { run_length(rest) } else { 1 };
            let (now, later) = rest.split_at(run);
            rest = later;
            match self.send_run(now, first.len(), *to).await {
                Ok(()) => {}
                // EIO: no checksum offload on the way. EINVAL, EMSGSIZE: a segment is longer than the path's MTU.
                Err(err)
                    if run > 1 && matches!(err.raw_os_error(), Some(libc::EIO | libc::EINVAL | libc::EMSGSIZE)) =>
                {
                    if err.raw_os_error() == Some(libc::EIO) {
                        tracing::info!(%to, "the way out cannot segment UDP: sending packet by packet");
                        self.segmentation.store(false, Ordering::Relaxed);
                    }
                    for packet in now {
                        if let Err(err) = self.send_run(std::slice::from_ref(packet), packet.0.len(), *to).await {
                            tracing::debug!(%to, %err, "packet not sent");
                        }
                    }
                }
                Err(err) => tracing::debug!(%to, %err, packets = run, "packets not sent"),
            }
        }
        packets.clear();
    }

    /// Sends packets of `segment` bytes each, the last at most that long, as one.
    async fn send_run(&self, run: &[(Packet, SocketAddr)], segment: usize, to: SocketAddr) -> io::Result<()> {
        let parts: Vec<IoSlice<'_>> = run.iter().map(|(packet, _)| IoSlice::new(packet)).collect();
        let to = SockaddrStorage::from(to);
        let segment = segment as u16;
        let segmented = [ControlMessage::UdpGsoSegments(&segment)];
        let control = if run.len() > 1 { &segmented[..] } else { &[] };
        let fd = self.inner.as_raw_fd();
        let send = || Ok(sendmsg(fd, &parts, control, MsgFlags::MSG_DONTWAIT, Some(&to))?);
        self.inner.async_io(Interest::WRITABLE, send).await.map(drop)
    }

    /// Waits for a datagram, then takes what has come until the arena is full.
    pub(super) async fn recv(&self, arena: &mut Arena) -> io::Result<()> {
        arena.reset();
        self.inner.async_io(Interest::READABLE, || arena.read(&self.inner)).await?;
        while arena.has_room() {
            match self.inner.try_io(Interest::READABLE, || arena.read(&self.inner)) {
                Ok(()) => {}
                Err(err) if err.kind() == io::ErrorKind::WouldBlock => break,
                Err(err) => return Err(err),
            }
        }
        Ok(())
    }
}

/// How many packets, from the first, one `sendmsg` can segment: one destination, one length, the last may be shorter.
fn run_length(packets: &[(Packet, SocketAddr)]) -> usize {
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
        let any = std::net::SocketAddrV6::new(Ipv6Addr::UNSPECIFIED, port, 0, 0);
        socket::bind(fd.as_fd().as_raw_fd(), &SockaddrIn6::from(any))?;
    } else {
        let any = std::net::SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, port);
        socket::bind(fd.as_fd().as_raw_fd(), &SockaddrIn::from(any))?;
    }
    Ok(fd.into())
}

/// Memory for one round of reads. Packets are cut from it without a copy; once they are dropped it is used again.
#[derive(Debug)]
pub(super) struct Arena {
    /// Holds on to the start of the allocation while packets own the rest.
    start: BytesMut,
    free: BytesMut,
    control: Vec<u8>,
    pub(super) packets: Vec<(BytesMut, SocketAddr)>,
}

impl Arena {
    pub(super) fn new() -> Arena {
        let mut free = BytesMut::zeroed(ARENA);
        Arena { start: free.split_to(0), free, control: nix::cmsg_space!(i32), packets: Vec::new() }
    }

    fn has_room(&self) -> bool {
        self.free.len() >= MAX_READ
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
    fn read(&mut self, socket: &UdpSocket) -> io::Result<()> {
        let mut parts = [IoSliceMut::new(&mut self.free)];
        let flags = MsgFlags::MSG_DONTWAIT;
        let message = recvmsg::<SockaddrStorage>(socket.as_raw_fd(), &mut parts, Some(&mut self.control), flags)?;
        let len = message.bytes;
        let from = message.address.as_ref().and_then(to_std);
        let segment = message.cmsgs()?.find_map(|control| match control {
            ControlMessageOwned::UdpGroSegments(size) => usize::try_from(size).ok().filter(|size| *size > 0),
            _ => None,
        });
        let Some(from) = from else { return Ok(()) };
        let mut joined = self.free.split_to(len);
        let segment = segment.unwrap_or(len);
        while !joined.is_empty() {
            let packet = joined.split_to(segment.min(joined.len()));
            self.packets.push((packet, from));
        }
        Ok(())
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
