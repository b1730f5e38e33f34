//! The few system calls that neither std nor nix has. The only unsafe code of the lab.
#![allow(unsafe_code)]

use std::{
    io,
    mem::{MaybeUninit, size_of},
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
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

/// Sends nothing any more that is larger than the path's MTU, as the kernel believes it, and never in fragments.
pub(crate) fn never_fragment(socket: BorrowedFd<'_>, v6: bool) -> io::Result<()> {
    let (level, option, value) = match v6 {
        false => (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_DO),
        true => (libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, libc::IPV6_PMTUDISC_DO),
    };
    let length = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the value is an int, which lives through the call.
    check(unsafe { libc::setsockopt(socket.as_raw_fd(), level, option, (&raw const value).cast(), length) })
}

/// The MTU of a connected socket's path, in bytes, as the kernel believes it.
pub(crate) fn path_mtu(socket: BorrowedFd<'_>, v6: bool) -> io::Result<u16> {
    let (level, option) = if v6 { (libc::IPPROTO_IPV6, libc::IPV6_MTU) } else { (libc::IPPROTO_IP, libc::IP_MTU) };
    // SAFETY: these options return an int (ip(7), ipv6(7)).
    let mtu: libc::c_int = unsafe { get(socket, level, option)? };
    u16::try_from(mtu).map_err(io::Error::other)
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

/// Sends an IP packet out of an interface without link headers, as if the stack had routed it there.
pub(crate) fn send_packet(socket: BorrowedFd<'_>, interface: u32, ether_type: u16, packet: &[u8]) -> io::Result<()> {
    // SAFETY: all zeroes are a value of `sockaddr_ll`.
    let mut address: libc::sockaddr_ll = unsafe { MaybeUninit::zeroed().assume_init() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = ether_type.to_be();
    address.sll_ifindex = interface.cast_signed();
    // SAFETY: packet and address live through the call, as long as is said.
    let sent = unsafe {
        libc::sendto(
            socket.as_raw_fd(),
            packet.as_ptr().cast(),
            packet.len(),
            0,
            (&raw const address).cast(),
            size_of::<libc::sockaddr_ll>() as libc::socklen_t,
        )
    };
    if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// One BPF instruction (`struct bpf_insn`).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Instruction {
    pub(crate) code: u8,
    pub(crate) registers: u8,
    pub(crate) offset: i16,
    pub(crate) immediate: i32,
}

/// Loads a program for tc or tcx. The error is what the verifier said.
pub(crate) fn load_classifier(program: &[Instruction]) -> io::Result<OwnedFd> {
    let mut log = vec![0_u8; 1 << 16];
    let attributes = LoadProgram {
        kind: BPF_PROG_TYPE_SCHED_CLS,
        instruction_count: u32::try_from(program.len()).map_err(io::Error::other)?,
        instructions: program.as_ptr() as u64,
        license: c"GPL".as_ptr() as u64,
        log_level: 1,
        log_size: u32::try_from(log.len()).map_err(io::Error::other)?,
        log: log.as_mut_ptr() as u64,
    };
    // SAFETY: the three pointers live through the call, with as much behind them as is said.
    let fd = unsafe { bpf(BPF_PROG_LOAD, &attributes) }.map_err(|error| {
        let said = String::from_utf8_lossy(&log);
        io::Error::new(error.kind(), format!("{error}: {}", said.trim_end_matches('\0')))
    })?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Attaches a program by tcx, before or behind those that are there, for as long as the interface lives. In that
/// interface's network namespace.
pub(crate) fn attach_tcx(program: BorrowedFd<'_>, interface: u32, egress: bool, first: bool) -> io::Result<()> {
    let kind = if egress { BPF_TCX_EGRESS } else { BPF_TCX_INGRESS };
    let flags = if first { BPF_F_BEFORE } else { 0 };
    let program = program.as_raw_fd().cast_unsigned();
    let attributes = AttachProgram { interface, program, kind, flags, rest: [0; 4] };
    // SAFETY: no pointer is passed.
    unsafe { bpf(BPF_PROG_ATTACH, &attributes) }.map(drop)
}

const BPF_PROG_LOAD: libc::c_long = 5;
const BPF_PROG_ATTACH: libc::c_long = 8;
const BPF_PROG_TYPE_SCHED_CLS: u32 = 3;
const BPF_TCX_INGRESS: u32 = 46;
const BPF_TCX_EGRESS: u32 = 47;
const BPF_F_BEFORE: u32 = 1 << 3;

/// The beginning of `union bpf_attr` for each of the two commands: the kernel takes the rest as zeroes.
#[repr(C)]
struct LoadProgram {
    kind: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
}

#[repr(C)]
struct AttachProgram {
    interface: u32,
    program: u32,
    kind: u32,
    flags: u32,
    /// The program that this one should be next to.
    rest: [u32; 4],
}

/// # Safety
/// The pointers in `attributes` are what the command wants.
unsafe fn bpf<T>(command: libc::c_long, attributes: &T) -> io::Result<RawFd> {
    // SAFETY: the attributes live through the call, and their size is passed; their pointers are the caller's to vouch for.
    let result = unsafe {
        libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attributes), size_of::<T>() as libc::c_long)
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { RawFd::try_from(result).map_err(io::Error::other) }
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
