//! Whether somebody is writing a file: asked by a read lease (fcntl(2), F_SETLEASE), which the kernel gives only on a
//! file that nobody has open for writing.
//!
//! Invariant: the lease is given back at once, and a writer that comes in between only waits: nothing is signalled that
//! could end us.

#![allow(unsafe_code)]

use std::{
    fs::File,
    io,
    os::fd::{AsRawFd, RawFd},
};

use nix::sys::statfs::{FsType, NFS_SUPER_MAGIC, SMB_SUPER_MAGIC, fstatfs};

/// fcntl.h; libc has it for one target only.
const F_SETSIG: libc::c_int = 10;

/// Clients of file servers say EAGAIN wherever the server has not promised anything (fs/nfs/nfs4proc.c nfs4_add_lease,
/// fs/smb/client/cifsfs.c cifs_setlease; magic numbers of fs/smb/common/smb2pdu.h and include/uapi/linux/magic.h).
const REMOTE: [FsType; 4] = [NFS_SUPER_MAGIC, SMB_SUPER_MAGIC, FsType(0xff53_4d42), FsType(0xfe53_4d42)];

/// Whether `file`, open for reading only, is open for writing by anybody on this node. `false` where that cannot be
/// known: another's file without CAP_LEASE, a file system of another machine, or one without leases.
pub(crate) fn is_being_written(file: &File) -> bool {
    if fstatfs(file).is_ok_and(|system| REMOTE.contains(&system.filesystem_type())) {
        return false;
    }
    let fd = file.as_raw_fd();
    // Who opens the file while we hold the lease has us signalled. The default, SIGIO, would end this process; SIGURG is
    // ignored unless somebody handles it.
    if fcntl(fd, F_SETSIG, libc::SIGURG).is_err() {
        return false;
    }
    match fcntl(fd, libc::F_SETLEASE, libc::F_RDLCK) {
        // Closing the file gives the lease back where this does not.
        Ok(()) => fcntl(fd, libc::F_SETLEASE, libc::F_UNLCK).is_err(),
        Err(error) => error.kind() == io::ErrorKind::WouldBlock,
    }
}

fn fcntl(fd: RawFd, command: libc::c_int, argument: libc::c_int) -> io::Result<()> {
    // SAFETY: these commands take an integer and touch no memory of ours; the descriptor is open, its `File` is borrowed.
    if unsafe { libc::fcntl(fd, command, argument) } == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::OpenOptionsExt};

    use super::*;
    use crate::scratch::Scratch;

    #[test]
    fn only_an_open_writer_counts() {
        let dir = Scratch::new();
        let path = dir.path().join("file");
        let writer = File::create(&path).unwrap();
        let reader = File::open(&path).unwrap();
        let other = File::open(&path).unwrap();
        assert!(is_being_written(&reader));
        assert!(is_being_written(&other));
        drop(writer);
        // A process that is just being forked by another test may hold a copy of the writer for a moment.
        while is_being_written(&reader) {
            std::thread::yield_now();
        }
        // Nothing is held any more: a writer does not wait.
        File::options().write(true).custom_flags(libc::O_NONBLOCK).open(&path).unwrap();
    }

    #[test]
    fn writers_that_come_in_between_end_nobody() {
        let dir = Scratch::new();
        let path = dir.path().join("file");
        fs::write(&path, "").unwrap();
        let reader = File::open(&path).unwrap();
        std::thread::scope(|scope| {
            let writes = scope.spawn(|| (0..2000).try_for_each(|_| fs::write(&path, "x")));
            let mut seen = 0;
            while !writes.is_finished() {
                seen += usize::from(is_being_written(&reader));
            }
            writes.join().unwrap().unwrap();
            assert!(seen > 0, "the two never met");
        });
    }
}
