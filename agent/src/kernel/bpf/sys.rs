//! The bpf(2) calls that an agent without CAP_SYS_ADMIN can make: objects are found by pin, never by id.
//!
//! Invariant: memory that the kernel is given outlives the call and has the size that the call says. Layouts are those of
//! `union bpf_attr`, include/uapi/linux/bpf.h; the kernel takes what a shorter one lacks as zeros.

#![allow(unsafe_code)]

use std::{
    ffi::CString,
    fs, io,
    mem::{size_of, zeroed},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
    time::Duration,
};

use aya::Pod;

const MAP_LOOKUP_ELEM: libc::c_int = 1;
const MAP_UPDATE_ELEM: libc::c_int = 2;
const MAP_DELETE_ELEM: libc::c_int = 3;
const OBJ_PIN: libc::c_int = 6;
const OBJ_GET: libc::c_int = 7;
const OBJ_GET_INFO_BY_FD: libc::c_int = 15;
const PROG_QUERY: libc::c_int = 16;
const MAP_LOOKUP_BATCH: libc::c_int = 24;
const LINK_CREATE: libc::c_int = 28;
const LINK_UPDATE: libc::c_int = 29;

const TCX_INGRESS: u32 = 46;
const TCX_EGRESS: u32 = 47;
/// BPF_F_BEFORE, without naming whom: before all.
const BEFORE: u32 = 1 << 3;
/// Programs that one hook can hold, `BPF_MPROG_MAX`.
const MOST_PROGRAMS: usize = 64;
/// Entries that one call reads at most.
const BATCH: usize = 4096;

/// What a pin holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Map,
    Program,
    Link,
}

#[repr(C)]
struct Element {
    map: u32,
    zero: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[repr(C)]
struct Batch {
    from: u64,
    next: u64,
    keys: u64,
    values: u64,
    count: u32,
    map: u32,
    element_flags: u64,
    flags: u64,
}

#[repr(C)]
struct Object {
    path: u64,
    fd: u32,
    flags: u32,
}

#[repr(C)]
struct Info {
    fd: u32,
    length: u32,
    info: u64,
}

#[repr(C)]
struct Query {
    ifindex: u32,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    programs: u64,
    count: u32,
    zero: u32,
    program_flags: u64,
    links: u64,
    link_flags: u64,
    revision: u64,
}

#[repr(C)]
struct LinkCreate {
    program: u32,
    ifindex: u32,
    attach_type: u32,
    flags: u32,
    relative: u32,
    zero: u32,
    revision: u64,
}

#[repr(C)]
struct LinkUpdate {
    link: u32,
    program: u32,
    flags: u32,
    old: u32,
}

/// The head of `struct bpf_map_info`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct MapInfo {
    pub(super) map_type: u32,
    pub(super) id: u32,
    pub(super) key_size: u32,
    pub(super) value_size: u32,
    pub(super) max_entries: u32,
    pub(super) flags: u32,
}

/// The head of `struct bpf_prog_info`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct ProgramInfo {
    program_type: u32,
    id: u32,
}

/// The head of `struct bpf_link_info`, of a tcx link.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct LinkInfo {
    link_type: u32,
    pub(super) id: u32,
    pub(super) program: u32,
    zero: u32,
    /// 0: the device is gone.
    pub(super) ifindex: u32,
    attach_type: u32,
}

/// A program at a hook.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Attached {
    pub(super) program: u32,
    /// 0: attached without a link.
    pub(super) link: u32,
}

impl LinkInfo {
    pub(super) fn is_at(&self, ingress: bool) -> bool {
        self.attach_type == attach_type(ingress)
    }
}

fn attach_type(ingress: bool) -> u32 {
    if ingress { TCX_INGRESS } else { TCX_EGRESS }
}

fn bpf<T>(command: libc::c_int, attributes: &mut T) -> io::Result<i32> {
    // SAFETY: `attributes` is one of the structs above, initialised, and lives through the call with the size given; the
    // pointers in it are to memory of sizes that the callers answer for.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attributes), size_of::<T>()) };
    i32::try_from(result).ok().filter(|result| *result >= 0).ok_or_else(io::Error::last_os_error)
}

fn descriptor(fd: i32) -> OwnedFd {
    // SAFETY: the call that gave it made it, and nobody else has it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn address<T>(of: &T) -> u64 {
    std::ptr::from_ref(of) as u64
}

fn number(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd().unsigned_abs()
}

fn c_path(path: &Path) -> io::Result<CString> {
    Ok(CString::new(path.as_os_str().as_bytes())?)
}

/// Opens a pin, which must hold a `kind`; `None`: there is none.
pub(super) fn open(path: &Path, kind: Kind) -> io::Result<Option<OwnedFd>> {
    let name = c_path(path)?;
    let fd = match bpf(OBJ_GET, &mut Object { path: name.as_ptr() as u64, fd: 0, flags: 0 }) {
        Ok(fd) => descriptor(fd),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let wanted = match kind {
        Kind::Map => "bpf-map",
        Kind::Program => "bpf-prog",
        Kind::Link => "bpf_link",
    };
    let found = fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))?;
    if found.to_string_lossy().contains(wanted) {
        Ok(Some(fd))
    } else {
        let problem = format!("{} is pinned there, not a {wanted}", found.display());
        Err(io::Error::new(io::ErrorKind::InvalidData, problem))
    }
}

pub(super) fn pin(fd: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let name = c_path(path)?;
    bpf(OBJ_PIN, &mut Object { path: name.as_ptr() as u64, fd: number(fd), flags: 0 }).map(|_| ())
}

fn info<T: Default>(fd: BorrowedFd<'_>) -> io::Result<T> {
    let mut info = T::default();
    let length = u32::try_from(size_of::<T>()).expect("a small struct");
    bpf(OBJ_GET_INFO_BY_FD, &mut Info { fd: number(fd), length, info: std::ptr::from_mut(&mut info) as u64 })?;
    Ok(info)
}

pub(super) fn map_info(map: BorrowedFd<'_>) -> io::Result<MapInfo> {
    info(map)
}

pub(super) fn program_id(program: BorrowedFd<'_>) -> io::Result<u32> {
    info::<ProgramInfo>(program).map(|info| info.id)
}

pub(super) fn link_info(link: BorrowedFd<'_>) -> io::Result<LinkInfo> {
    info(link)
}

/// The value of a key; `None`: there is no such key. The map must have keys and values of these sizes.
pub(super) fn lookup<K: Pod, V: Pod>(map: BorrowedFd<'_>, key: &K) -> io::Result<Option<V>> {
    // SAFETY: a `Pod` may hold any bytes, zeros too.
    let mut value: V = unsafe { zeroed() };
    let value_at = std::ptr::from_mut(&mut value) as u64;
    let mut element = Element { map: number(map), zero: 0, key: address(key), value: value_at, flags: 0 };
    match bpf(MAP_LOOKUP_ELEM, &mut element) {
        Ok(_) => Ok(Some(value)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// The value of each CPU. `V` has a size that is a multiple of 8, `cpus` is how many are possible.
pub(super) fn lookup_per_cpu<V: Pod>(map: BorrowedFd<'_>, key: u32, cpus: usize) -> io::Result<Vec<V>> {
    const { assert!(size_of::<V>().is_multiple_of(8)) };
    // SAFETY: a `Pod` may hold any bytes, zeros too.
    let mut values: Vec<V> = vec![unsafe { zeroed() }; cpus];
    let value = values.as_mut_ptr() as u64;
    bpf(MAP_LOOKUP_ELEM, &mut Element { map: number(map), zero: 0, key: address(&key), value, flags: 0 })?;
    Ok(values)
}

pub(super) fn update<K: Pod, V: Pod>(map: BorrowedFd<'_>, key: &K, value: &V) -> io::Result<()> {
    let mut element = Element { map: number(map), zero: 0, key: address(key), value: address(value), flags: 0 };
    bpf(MAP_UPDATE_ELEM, &mut element).map(|_| ())
}

/// Deletes a key, if it is there.
pub(super) fn delete<K: Pod>(map: BorrowedFd<'_>, key: &K) -> io::Result<()> {
    match bpf(MAP_DELETE_ELEM, &mut Element { map: number(map), zero: 0, key: address(key), value: 0, flags: 0 }) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Every entry of a map that holds at most `most`, while nobody deletes from it.
pub(super) fn entries<K: Pod, V: Pod>(map: BorrowedFd<'_>, most: u32) -> io::Result<Vec<(K, V)>> {
    let mut all = Vec::new();
    // Where the kernel was: a bucket's number or a key.
    let mut place = [0_u8; 64];
    assert!(size_of::<K>() <= place.len());
    // SAFETY: `Pod`s may hold any bytes, zeros too.
    let (mut keys, mut values) = unsafe { (vec![zeroed::<K>(); BATCH], vec![zeroed::<V>(); BATCH]) };
    let mut first = true;
    loop {
        let place_at = place.as_mut_ptr() as u64;
        let mut batch = Batch {
            from: if first { 0 } else { place_at },
            next: place_at,
            keys: keys.as_mut_ptr() as u64,
            values: values.as_mut_ptr() as u64,
            count: u32::try_from(BATCH).expect("a small number"),
            map: number(map),
            element_flags: 0,
            flags: 0,
        };
        let result = bpf(MAP_LOOKUP_BATCH, &mut batch);
        let ended = match result {
            Ok(_) => false,
            Err(error) if error.kind() == io::ErrorKind::NotFound => true,
            Err(error) => return Err(error),
        };
        let count = usize::try_from(batch.count).map_or(BATCH, |count| count.min(BATCH));
        all.extend(keys[..count].iter().copied().zip(values[..count].iter().copied()));
        if ended {
            return Ok(all);
        }
        if all.len() > usize::try_from(most).unwrap_or(usize::MAX) {
            return Err(io::Error::other("the map's entries do not end"));
        }
        first = false;
    }
}

/// The programs at a device's tcx hook, in order. `InvalidInput`: this kernel has no tcx.
pub(super) fn query(ifindex: u32, ingress: bool) -> io::Result<Vec<Attached>> {
    let (mut programs, mut links) = ([0_u32; MOST_PROGRAMS], [0_u32; MOST_PROGRAMS]);
    let mut query = Query {
        ifindex,
        attach_type: attach_type(ingress),
        query_flags: 0,
        attach_flags: 0,
        programs: programs.as_mut_ptr() as u64,
        count: u32::try_from(MOST_PROGRAMS).expect("a small number"),
        zero: 0,
        program_flags: 0,
        links: links.as_mut_ptr() as u64,
        link_flags: 0,
        revision: 0,
    };
    bpf(PROG_QUERY, &mut query)?;
    let count = usize::try_from(query.count).map_or(MOST_PROGRAMS, |count| count.min(MOST_PROGRAMS));
    let found = programs.into_iter().zip(links).take(count);
    Ok(found.map(|(program, link)| Attached { program, link }).collect())
}

/// Attaches a program to a device's tcx hook, before all others or after them, for as long as the link lives.
pub(super) fn link_create(program: BorrowedFd<'_>, ifindex: u32, ingress: bool, first: bool) -> io::Result<OwnedFd> {
    let flags = if first { BEFORE } else { 0 };
    let (program, attach_type) = (number(program), attach_type(ingress));
    let mut link = LinkCreate { program, ifindex, attach_type, flags, relative: 0, zero: 0, revision: 0 };
    bpf(LINK_CREATE, &mut link).map(descriptor)
}

/// Replaces the program of a link: every packet meets the old one or the new one.
pub(super) fn link_update(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let mut update = LinkUpdate { link: number(link), program: number(program), flags: 0, old: 0 };
    bpf(LINK_UPDATE, &mut update).map(|_| ())
}

/// CLOCK_MONOTONIC, the clock of the programs: it stands still while the machine sleeps.
pub(super) fn monotonic() -> io::Result<Duration> {
    // SAFETY: a struct of integers, for which zeros are valid.
    let mut now: libc::timespec = unsafe { zeroed() };
    // SAFETY: `now` lives through the call.
    if unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) } == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok(Duration::new(now.tv_sec.unsigned_abs(), u32::try_from(now.tv_nsec).unwrap_or(0)))
}

/// The index of the link of that very name (an alternative name does not count); `None`: there is none.
pub(super) fn index_of(name: &str) -> io::Result<Option<u32>> {
    let index = match nix::net::if_::if_nametoindex(name) {
        Ok(index) => index,
        Err(nix::errno::Errno::ENODEV | nix::errno::Errno::ENXIO) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    Ok(name_of(index)?.filter(|found| found == name).map(|_| index))
}

/// The name of the link of that index; `None`: there is none.
pub(super) fn name_of(ifindex: u32) -> io::Result<Option<String>> {
    match nix::net::if_::if_indextoname(ifindex) {
        Ok(name) => Ok(Some(name.to_string_lossy().into_owned())),
        Err(nix::errno::Errno::ENODEV | nix::errno::Errno::ENXIO) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// The MAC of a link; `None`: there is no such link.
pub(super) fn mac_of(name: &str) -> io::Result<Option<[u8; 6]>> {
    let socket = nix::sys::socket::socket(
        nix::sys::socket::AddressFamily::Inet,
        nix::sys::socket::SockType::Datagram,
        nix::sys::socket::SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    // SAFETY: a struct of integers and byte arrays, for which zeros are valid.
    let mut request: libc::ifreq = unsafe { zeroed() };
    if name.len() >= request.ifr_name.len() {
        return Ok(None);
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    // SAFETY: SIOCGIFHWADDR reads and writes one ifreq; this one lives through the call, its name ends in a zero.
    let result = unsafe { libc::ioctl(socket.as_fd().as_raw_fd(), libc::SIOCGIFHWADDR, &raw mut request) };
    if result == -1 {
        let error = io::Error::last_os_error();
        return if error.raw_os_error() == Some(libc::ENODEV) { Ok(None) } else { Err(error) };
    }
    // SAFETY: SIOCGIFHWADDR has filled in this member of the union.
    let data = unsafe { request.ifr_ifru.ifru_hwaddr.sa_data };
    let mut mac = [0; 6];
    for (to, from) in mac.iter_mut().zip(data) {
        *to = from.cast_unsigned();
    }
    Ok(Some(mac))
}

/// The ids of the maps that a program uses.
#[cfg(test)]
pub(super) fn program_maps(program: BorrowedFd<'_>) -> io::Result<Vec<u32>> {
    /// `struct bpf_prog_info` up to its maps.
    #[repr(C)]
    #[derive(Default)]
    struct Maps {
        head: [u32; 4],
        code_lengths: [u32; 2],
        code: [u64; 3],
        user: u32,
        count: u32,
        ids: u64,
    }
    let mut ids = [0_u32; 64];
    let mut maps = Maps { count: 64, ids: ids.as_mut_ptr() as u64, ..Maps::default() };
    let length = u32::try_from(size_of::<Maps>()).expect("a small struct");
    let at = std::ptr::from_mut(&mut maps) as u64;
    bpf(OBJ_GET_INFO_BY_FD, &mut Info { fd: number(program), length, info: at })?;
    let count = usize::try_from(maps.count).unwrap_or(0).min(ids.len());
    Ok(ids[..count].to_vec())
}

/// Leaves this thread no other capabilities.
#[cfg(test)]
pub(super) fn set_capabilities(bits: u64) -> io::Result<()> {
    // _LINUX_CAPABILITY_VERSION_3; effective, permitted and inheritable, the low words and then the high ones.
    let mut header = [0x2008_0522_u32, 0];
    let (low, high) = ((bits & 0xffff_ffff) as u32, (bits >> 32) as u32);
    let mut data = [low, low, 0, high, high, 0];
    // SAFETY: the sizes are those of that version, and both live through the call.
    let result = unsafe { libc::syscall(libc::SYS_capset, header.as_mut_ptr(), data.as_mut_ptr()) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
