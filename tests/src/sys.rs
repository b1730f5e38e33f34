//! The few socket calls that neither std nor nix has. The only unsafe code of the lab.
#![allow(unsafe_code)]

use std::{
    io,
    mem::{MaybeUninit, size_of},
    os::fd::{AsRawFd, BorrowedFd},
};

/// A packet socket's counters since they were last read: (received, lost because the reader was too slow).
pub(crate) fn packet_statistics(socket: BorrowedFd<'_>) -> io::Result<(u32, u32)> {
    // SAFETY: `tpacket_stats` is what this option returns (packet(7)), and all zeroes are a value of it.
    let stats: libc::tpacket_stats = unsafe { get(socket, libc::SOL_PACKET, libc::PACKET_STATISTICS)? };
    // tp_packets counts the lost ones too.
    Ok((stats.tp_packets - stats.tp_drops, stats.tp_drops))
}

/// Segments that this connection has sent again so far.
pub(crate) fn tcp_retransmits(socket: BorrowedFd<'_>) -> io::Result<u32> {
    // SAFETY: `tcp_info` is what this option returns (tcp(7)), and all zeroes are a value of it.
    let info: libc::tcp_info = unsafe { get(socket, libc::IPPROTO_TCP, libc::TCP_INFO)? };
    Ok(info.tcpi_total_retrans)
}

/// From now on, a packet socket receives what passes on that interface, both directions, at most `bytes` of each packet.
pub(crate) fn bind_packet(socket: BorrowedFd<'_>, interface: u32, bytes: u32) -> io::Result<()> {
    // One instruction: keep that much of the packet.
    let keep = libc::sock_filter { code: (libc::BPF_RET | libc::BPF_K) as u16, jt: 0, jf: 0, k: bytes };
    let mut program = [keep];
    let filter = libc::sock_fprog { len: 1, filter: program.as_mut_ptr() };
    // SAFETY: the filter points to `len` instructions, which the kernel copies during the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const filter).cast(),
            size_of::<libc::sock_fprog>() as libc::socklen_t,
        )
    };
    check(result)?;

    // SAFETY: all zeroes are a value of `sockaddr_ll`.
    let mut address: libc::sockaddr_ll = unsafe { MaybeUninit::zeroed().assume_init() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
    address.sll_ifindex = interface.cast_signed();
    // SAFETY: the address is a whole `sockaddr_ll`, as its family says, and lives through the call.
    let result = unsafe {
        libc::bind(socket.as_raw_fd(), (&raw const address).cast(), size_of::<libc::sockaddr_ll>() as libc::socklen_t)
    };
    check(result)
}

/// # Safety
/// `T` is what the option returns, and all zeroes are a value of it.
unsafe fn get<T: Copy>(socket: BorrowedFd<'_>, level: i32, option: i32) -> io::Result<T> {
    let mut value = MaybeUninit::<T>::zeroed();
    let mut length = size_of::<T>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes, the size of `value`.
    let result =
        unsafe { libc::getsockopt(socket.as_raw_fd(), level, option, value.as_mut_ptr().cast(), &raw mut length) };
    check(result)?;
    // SAFETY: zeroed and then written by the kernel; the caller vouches for the type.
    Ok(unsafe { value.assume_init() })
}

fn check(result: i32) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
