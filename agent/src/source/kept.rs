//! What the API server said last, kept on the node: so that an agent that starts while it is away knows the mesh.
//!
//! Invariants: the file holds what was said before or what was said then, never half of either; only root reads it; no key
//! but public ones is in it. What cannot be read of it is as if there were none.

use std::{
    fs::{self, File},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    time::Duration,
};

use k8s_openapi::jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::api::Objects;

const FILE: &str = "last-known-good.json";
/// What is written first, and then renamed.
const DRAFT: &str = ".last-known-good.json.new";

/// Objects, and since when they stand.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Kept<O = Objects> {
    /// When the API server last said something that changed them.
    pub(super) saved: Timestamp,
    /// Whose view they are; `None`: all Nodes are in it.
    pub(super) node: Option<String>,
    pub(super) objects: O,
}

#[derive(Debug, thiserror::Error)]
#[error("{}", path.display())]
pub(super) struct KeepError {
    path: PathBuf,
    source: io::Error,
}

/// `None`: nothing was kept.
pub(super) fn read(dir: &Path) -> Result<Option<Kept>, KeepError> {
    let path = dir.join(FILE);
    let text = match fs::read(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        text => text.map_err(at(&path))?,
    };
    serde_json::from_slice(&text).map(Some).map_err(|error| at(&path)(error.into()))
}

/// Blocks until it is on the disk. Makes the folder where there is none.
pub(super) fn write(dir: &Path, kept: &Kept<impl Serialize>) -> Result<(), KeepError> {
    let text = serde_json::to_vec(kept).map_err(|error| at(dir)(error.into()))?;
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(at(dir))?;
    let draft = dir.join(DRAFT);
    // One that a crash has left may have another mode.
    match fs::remove_file(&draft) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(at(&draft)(error)),
        _ => {}
    }
    let open = File::options().write(true).create_new(true).mode(0o600).open(&draft);
    let written = open.and_then(|mut file| file.write_all(&text).and_then(|()| file.sync_all()));
    written.map_err(at(&draft))?;
    fs::rename(&draft, dir.join(FILE)).map_err(at(&draft))?;
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(at(dir))
}

/// Removes what is kept, if anything is.
pub fn forget(dir: &Path) -> io::Result<()> {
    for file in [FILE, DRAFT] {
        match fs::remove_file(dir.join(file)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

/// How long ago the API server last said something else; `None`: nothing is kept.
pub fn age(dir: &Path) -> Option<Duration> {
    fs::metadata(dir.join(FILE)).ok()?.modified().ok()?.elapsed().ok()
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> KeepError {
    |source| KeepError { path: path.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use serde_json::json;

    use super::*;
    use crate::{causes::with_cause, scratch::Scratch};

    fn kept(second: i64) -> Kept {
        let objects = json!({
            "clusters": [{"apiVersion": "carrick.dev/v1alpha1", "kind": "MeshCluster",
                "metadata": {"name": "mn", "uid": "u", "generation": 2}, "spec": {"id": 1}}],
            "advertisements": [], "policies": [], "gateways": [],
            "nodes": [{"metadata": {"name": "n1", "labels": {"carrick.dev/gateway": "0"}},
                "spec": {"podCIDRs": ["10.42.0.0/24"]},
                "status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.1"}]}}],
            "pods": [],
        });
        let objects = serde_json::from_value(objects).unwrap();
        Kept { saved: Timestamp::from_second(second).unwrap(), node: Some("n1".to_owned()), objects }
    }

    #[test]
    fn what_was_kept_last_is_read_and_nobody_else_reads_it() {
        let scratch = Scratch::new();
        let dir = scratch.path().join("a/b");
        assert_eq!(read(&dir).unwrap(), None);
        write(&dir, &kept(1)).unwrap();
        fs::write(dir.join(DRAFT), "half").unwrap();
        write(&dir, &kept(2)).unwrap();
        assert_eq!(read(&dir).unwrap(), Some(kept(2)));
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&dir), mode(&dir.join(FILE))), (0o700, 0o600));
        assert!(!dir.join(DRAFT).exists());
        forget(&dir).unwrap();
        forget(&dir).unwrap();
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 0);
    }

    #[test]
    fn what_cannot_be_read_is_told_with_its_place() {
        let scratch = Scratch::new();
        write(scratch.path(), &kept(1)).unwrap();
        fs::write(scratch.path().join(FILE), "{\"saved\"").unwrap();
        let error = with_cause(&read(scratch.path()).unwrap_err()).replace(&*scratch.path().to_string_lossy(), "DIR");
        assert_eq!(error, "DIR/last-known-good.json: EOF while parsing an object at line 1 column 8");
    }
}
