//! One process of a kind on a node: a locked file that names its holder.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read, Seek, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

/// Held for as long as it lives; the kernel lets go of it when the process ends, however it ends.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

#[derive(Debug, thiserror::Error)]
pub enum LockError {
    #[error("{} is held by process {holder}: only one runs on a node; stop that one first, or give this one another --run-dir", path.display())]
    Held { path: PathBuf, holder: String },
    #[error("cannot lock {}", path.display())]
    Io { path: PathBuf, source: io::Error },
}

impl Lock {
    /// Takes `dir`/`name`.lock, making the folder (0700) if it is missing.
    pub fn take(dir: &Path, name: &str) -> Result<Lock, LockError> {
        let path = dir.join(format!("{name}.lock"));
        let attempt = || -> io::Result<Result<File, String>> {
            std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
            let mut file =
                OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(&path)?;
            match file.try_lock() {
                Ok(()) => {}
                Err(std::fs::TryLockError::WouldBlock) => {
                    let mut holder = String::new();
                    file.read_to_string(&mut holder)?;
                    return Ok(Err(holder.trim().to_owned()));
                }
                Err(std::fs::TryLockError::Error(error)) => return Err(error),
            }
            file.set_len(0)?;
            file.rewind()?;
            writeln!(file, "{}", std::process::id())?;
            Ok(Ok(file))
        };
        match attempt() {
            Ok(Ok(file)) => Ok(Lock { _file: file }),
            Ok(Err(holder)) => Err(LockError::Held { path, holder }),
            Err(source) => Err(LockError::Io { path, source }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_is_told_who_holds_it_and_the_next_gets_it() {
        let dir = std::env::temp_dir().join(format!("carrick-lock-{}", std::process::id()));
        let first = Lock::take(&dir, "agent").expect("nobody holds it");
        let second = Lock::take(&dir, "agent").expect_err("it is held").to_string();
        assert!(second.contains(&format!("held by process {}", std::process::id())), "{second}");
        Lock::take(&dir, "tunnel").expect("another name is another lock");
        drop(first);
        Lock::take(&dir, "agent").expect("it was let go");
        std::fs::remove_dir_all(&dir).expect("it can be removed");
    }
}
