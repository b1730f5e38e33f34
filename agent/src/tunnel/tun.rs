//! The TUN: made once, persistent, and left as it was made. Addresses, MTU and "up" are the agent's.

use std::{
    io,
    os::{fd::AsRawFd, unix::fs::FileTypeExt},
    path::Path,
};

use tun_rs::{AsyncDevice, DeviceBuilder};

use super::TunnelError;
use crate::{kernel::ifreq, names::Device};

nix::ioctl_write_int!(tun_set_persist, b'T', 203);

/// Packets that wait while this process waits for a processor. The kernel's 500 are half a second of 1000 packets a second,
/// and what comes beyond is lost.
const QUEUE: u32 = 4096;

/// Refuses a node without `/dev/net/tun`: tun-rs would make one, on the host's /dev if that is what is mounted.
pub(super) fn check_node(node: &Path) -> Result<(), TunnelError> {
    match std::fs::metadata(node) {
        Ok(found) if found.file_type().is_char_device() => Ok(()),
        Ok(_) => Err(TunnelError::NotTun(node.to_owned())),
        Err(err) if err.kind() == io::ErrorKind::NotFound => Err(TunnelError::NoTun(node.to_owned())),
        Err(source) => Err(TunnelError::Path { path: node.to_owned(), source }),
    }
}

/// Makes the link, down, or takes the one that an earlier process left. It outlives this process.
pub(super) fn open(device: Device) -> io::Result<AsyncDevice> {
    let tun = DeviceBuilder::new().name(device.to_string()).offload(true).inherit_enable_state().build_async()?;
    tun.set_tx_queue_len(QUEUE)?;
    tun.persist()?;
    Ok(tun)
}

/// Bytes. Not tun-rs's own, which asks for the name first and so waits for the lock over all links.
pub(super) fn mtu(device: Device) -> io::Result<u16> {
    ifreq::mtu(&device.to_string())
}

/// Lets the link vanish with its last descriptor.
pub(super) fn unpersist(tun: &AsyncDevice) -> io::Result<()> {
    // SAFETY: TUNSETPERSIST takes an integer and touches no memory of ours; the descriptor is open while `tun` lives.
    unsafe { tun_set_persist(tun.as_raw_fd(), 0) }?;
    Ok(())
}
