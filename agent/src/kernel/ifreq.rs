//! Requests about a link by its name, as ioctl(2) takes them (netdevice(7)).
#![allow(unsafe_code)]

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

/// What a request says beside the name, and what its answer says.
pub(crate) type Union = libc::__c_anonymous_ifr_ifru;

/// Asks the kernel of the link with that name in this network namespace, and returns its answer. `InvalidInput` for a
/// name that no link can have.
///
/// # Safety
///
/// `value` holds what `code` takes there: a pointer is valid for what the kernel reads and writes.
pub(crate) unsafe fn ask(link: &str, code: libc::Ioctl, value: Union) -> io::Result<Union> {
    let socket: OwnedFd = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    // SAFETY: integers and a pointer, for which zeros are valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if link.len() >= request.ifr_name.len() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("no link can be called {link}")));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(link.bytes()) {
        *to = from.cast_signed();
    }
    request.ifr_ifru = value;
    // SAFETY: the request is one, its name ends with a zero, and the caller answers for the rest.
    let code = unsafe { libc::ioctl(socket.as_raw_fd(), code, &raw mut request) };
    if code < 0 { Err(io::Error::last_os_error()) } else { Ok(request.ifr_ifru) }
}

/// The MTU of a link, bytes. Does not wait for the lock over all links (`dev_ioctl`), unlike TUNGETIFF.
pub(crate) fn mtu(link: &str) -> io::Result<u16> {
    // SAFETY: SIOCGIFMTU takes nothing and answers with an integer.
    let bytes = unsafe { ask(link, libc::SIOCGIFMTU, Union { ifru_mtu: 0 })?.ifru_mtu };
    Ok(u16::try_from(bytes).unwrap_or(u16::MAX))
}
