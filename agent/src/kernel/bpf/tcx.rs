//! Programs at tcx hooks, each held by a link that is pinned under the name of its device and program.
//!
//! Invariant: a link that stands is never let go of before another stands in its place.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
};

use super::{
    pins::Pins,
    sys::{self, Attached, Kind, LinkInfo},
};
use crate::state::Attachment;

/// A pinned link, and what the kernel says of it.
pub(super) struct Link {
    pub(super) fd: OwnedFd,
    pub(super) info: LinkInfo,
}

/// The pinned link of an attachment; `None`: there is none, or something else is pinned there.
pub(super) fn open(pins: &Pins, attachment: &Attachment) -> io::Result<Option<Link>> {
    let fd = match sys::open(&pins.link(attachment), Kind::Link) {
        Ok(Some(fd)) => fd,
        Ok(None) => return Ok(None),
        Err(error) if error.kind() == io::ErrorKind::InvalidData => return Ok(None),
        Err(error) => return Err(error),
    };
    let info = sys::link_info(fd.as_fd())?;
    Ok(Some(Link { fd, info }))
}

/// The programs at a device's hook, in order; none if the device is gone.
pub(super) fn hook(ifindex: u32, ingress: bool) -> io::Result<Vec<Attached>> {
    match sys::query(ifindex, ingress) {
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(Vec::new()),
        other => other,
    }
}

/// Where the link stands among the programs at its hook; `None`: it holds nothing there.
pub(super) fn place(hook: &[Attached], link: u32) -> Option<usize> {
    hook.iter().position(|attached| attached.link == link)
}

/// Attaches the program to the device of that index, in place of another build of it. `spare` is a second copy, asked for
/// where ours must become the first again: one program cannot be at a hook twice.
pub(super) fn attach(
    pins: &Pins,
    attachment: &Attachment,
    ifindex: u32,
    program: &OwnedFd,
    spare: impl FnOnce() -> io::Result<OwnedFd>,
) -> io::Result<()> {
    let ingress = attachment.program.is_ingress();
    let must_be_first = attachment.program.must_be_first();
    let found = hook(ifindex, ingress)?;
    let old = open(pins, attachment)?.filter(|link| link.info.ifindex == ifindex && link.info.is_at(ingress));
    let place = old.as_ref().and_then(|link| place(&found, link.info.id));
    match (&old, place) {
        (Some(link), Some(place)) if place == 0 || !must_be_first => return update(link, program),
        (Some(link), Some(_)) => sys::link_update(link.fd.as_fd(), spare()?.as_fd())?,
        _ => {}
    }
    let link = sys::link_create(program.as_fd(), ifindex, ingress, must_be_first)?;
    pins.replace_link(attachment, &link)
}

/// Gives the link the program, if it has another.
pub(super) fn update(link: &Link, program: &OwnedFd) -> io::Result<()> {
    if link.info.program == sys::program_id(program.as_fd())? {
        return Ok(());
    }
    sys::link_update(link.fd.as_fd(), program.as_fd())
}
