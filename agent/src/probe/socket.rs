//! The descriptors of the prober: the socket that probes leave by and answers come to, and the ring that wakes it.

#![allow(unsafe_code)]

use std::{
    io,
    net::{Ipv6Addr, SocketAddrV6},
    os::fd::{AsRawFd, OwnedFd},
};

use nix::sys::socket::{self, AddressFamily, SockFlag, SockType, SockaddrIn6, sockopt};
use tokio::{
    io::{Interest, unix::AsyncFd},
    net::UdpSocket,
};

/// Bytes of answers that may wait while the prober is busy; the kernel gives at most net.core.rmem_max.
const BUFFER: usize = 1 << 20;

/// Binds that very address and port. Packets larger than the path's MTU, as the kernel believes it, leave all the same and
/// are never fragmented: what passes is for the answers to say.
pub(super) fn bind(address: Ipv6Addr, port: u16) -> io::Result<UdpSocket> {
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let fd = socket::socket(AddressFamily::Inet6, SockType::Datagram, flags, None)?;
    socket::setsockopt(&fd, sockopt::Ipv6V6Only, &true)?;
    socket::setsockopt(&fd, sockopt::RcvBuf, &BUFFER)?;
    socket::setsockopt(&fd, sockopt::SndBuf, &BUFFER)?;
    never_fragment(&fd)?;
    socket::bind(fd.as_raw_fd(), &SockaddrIn6::from(SocketAddrV6::new(address, port, 0, 0)))?;
    UdpSocket::from_std(fd.into())
}

fn never_fragment(fd: &OwnedFd) -> io::Result<()> {
    let probe = libc::IPV6_PMTUDISC_PROBE;
    // SAFETY: the kernel reads an int at `probe`, which lives across the call.
    let rc = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            libc::IPPROTO_IPV6,
            libc::IPV6_MTU_DISCOVER,
            (&raw const probe).cast(),
            size_of_val(&probe) as libc::socklen_t,
        )
    };
    if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Waits for a descriptor to be readable.
pub(super) fn watch(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` is always the same open descriptor, for as long as it lives.
    unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }.map_err(io::Error::from)
}
