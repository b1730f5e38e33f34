//! What our processes keep in their run directory: a locked file that names the one process of a kind on a node, and
//! sockets that only root may use.

use std::{
    fs::{DirBuilder, File, OpenOptions, Permissions, TryLockError},
    io::{self, Read, Seek, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
};

use tokio::net::UnixListener;
use tracing::warn;

/// Held for as long as it lives, then the file is removed. However the process ends, the kernel lets go of it.
#[derive(Debug)]
pub struct Lock {
    path: PathBuf,
    _file: File,
}

#[derive(Debug, thiserror::Error)]
pub enum LockError {
    #[error("{} is held by process {holder}: only one runs on a node; stop that one first", path.display())]
    Held { path: PathBuf, holder: String },
    #[error("cannot lock {}", path.display())]
    Io { path: PathBuf, source: io::Error },
}

impl Lock {
    /// Takes `dir`/`name`.lock, making the folder (0700) if it is missing.
    pub fn take(dir: &Path, name: &str) -> Result<Lock, LockError> {
        let path = dir.join(format!("{name}.lock"));
        match attempt(dir, &path) {
            Ok(Attempt::Taken(file)) => Ok(Lock { path, _file: file }),
            Ok(Attempt::HeldBy(holder)) => Err(LockError::Held { path, holder }),
            Err(source) => Err(LockError::Io { path, source }),
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // Still locked, so nobody else believes to hold what goes away here.
        if let Err(error) = std::fs::remove_file(&self.path) {
            warn!(%error, path = %self.path.display(), "cannot remove the lock file");
        }
    }
}

enum Attempt {
    Taken(File),
    HeldBy(String),
}

fn attempt(dir: &Path, path: &Path) -> io::Result<Attempt> {
    DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    loop {
        let mut file = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut holder = String::new();
                file.read_to_string(&mut holder)?;
                return Ok(Attempt::HeldBy(holder.trim().to_owned()));
            }
            Err(TryLockError::Error(error)) => return Err(error),
        }
        // The last holder may have removed the file between our opening and our locking it.
        if !is_at(&file, path)? {
            continue;
        }
        file.set_len(0)?;
        file.rewind()?;
        writeln!(file, "{}", std::process::id())?;
        return Ok(Attempt::Taken(file));
    }
}

fn is_at(file: &File, path: &Path) -> io::Result<bool> {
    match std::fs::metadata(path) {
        Ok(there) => Ok((there.dev(), there.ino()) == (file.metadata()?.dev(), file.metadata()?.ino())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// Listens on a socket that only root may use, in the place of a stale one.
pub fn listen(path: &Path) -> io::Result<UnixListener> {
    // Bound aside and moved: at no moment is it there with other permissions.
    let aside = path.with_extension("new");
    match std::fs::remove_file(&aside) {
        Err(err) if err.kind() != io::ErrorKind::NotFound => return Err(err),
        _ => {}
    }
    let listener = UnixListener::bind(&aside)?;
    std::fs::set_permissions(&aside, Permissions::from_mode(0o600))?;
    std::fs::rename(&aside, path)?;
    Ok(listener)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_is_told_who_holds_it_and_the_next_gets_it() {
        let dir = std::env::temp_dir().join(format!("carrick-lock-{}", std::process::id()));
        let first = Lock::take(&dir, "agent").expect("nobody holds it");
        let second = Lock::take(&dir, "agent").expect_err("it is held").to_string();
        let (path, us) = (dir.join("agent.lock"), std::process::id());
        let told = format!("{} is held by process {us}: only one runs on a node; stop that one first", path.display());
        assert_eq!(second, told);
        Lock::take(&dir, "tunnel").expect("another name is another lock");
        Lock::take(&dir, "agent").expect_err("a refused attempt lets go of nothing");
        drop(first);
        Lock::take(&dir, "agent").expect("it was let go");
        std::fs::remove_dir(&dir).expect("no file is left");
    }
}
