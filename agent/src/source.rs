//! Where the objects come from, as snapshots: folders of manifests, or the API server.
//!
//! [`read`] reads once, [`follow`] whenever something changes. Invariants that every pass relies on: what could not
//! be read never looks like something that was deleted ([`Snapshot::complete`], [`NotSynced`]), and the same objects give
//! the same snapshot in whatever order they were written.

mod folder;
mod kept;
mod kube;
mod manifest;
mod store;
mod strict;
mod walk;
mod watch;
mod yaml;

use std::{fmt, path::PathBuf, sync::Arc};

use tokio::sync::watch::{Receiver, Sender};

pub use self::{
    folder::{Folder, holds_manifests},
    kept::{age, forget},
    kube::{AskError, ConnectError, LOG_CAPS, Once, Server},
    manifest::named,
};
use crate::api::Objects;

/// One view of the objects.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Snapshot {
    /// Each kind by name; no name twice.
    pub objects: Objects,
    /// Whether everything that is written could be read. A pass over an incomplete snapshot makes but never breaks.
    pub complete: bool,
    /// What could not be read, in a stable order.
    pub problems: Vec<Problem>,
}

impl Snapshot {
    /// Whether both mean the same to a node: they differ in what is said of objects at most.
    pub fn ask_the_same(&self, other: &Snapshot) -> bool {
        self.objects.ask_the_same(&other.objects)
            && (self.complete, &self.problems) == (other.complete, &other.problems)
    }
}

/// Something that could not be used.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Problem {
    /// The absolute path, as it was given and followed; or the API server's address and the kind, or the object.
    pub place: String,
    /// Line in the file, from 1, where it is known.
    pub line: Option<usize>,
    /// Document in the file, from 1, where it is known.
    pub document: Option<usize>,
    /// What is wrong and what to do. Never holds contents that could be a secret.
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.place)?;
        if let Some(line) = self.line {
            write!(f, ":{line}")?;
        }
        if let Some(document) = self.document {
            write!(f, " (document {document})")?;
        }
        write!(f, ": {}", self.message)
    }
}

/// Why there is no snapshot: what is missing or empty says nothing, least of all that everything is to go.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{place}: {why}")]
pub struct NotSynced {
    /// A folder, or the API server's address.
    pub place: String,
    pub why: String,
}

/// Who tells of the objects.
#[derive(Clone, Debug)]
pub enum Origin {
    Folders(Vec<PathBuf>),
    Kube(Server),
}

/// What is said now; before everything needed has been synced once, why it is not.
pub type Followed = Result<Arc<Snapshot>, NotSynced>;

/// Follows the origin for as long as somebody listens. Once it has been synced, what goes missing leaves what was said
/// last in force, with why among its problems. Only what differs from the last is published.
///
/// Must be called within a tokio runtime.
pub async fn follow(origin: &Origin) -> Result<Receiver<Followed>, ConnectError> {
    match origin {
        Origin::Folders(dirs) => Ok(watch::follow(dirs.clone())),
        Origin::Kube(server) => kube::follow(server).await,
    }
}

#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    #[error(transparent)]
    NotSynced(#[from] NotSynced),
    #[error(transparent)]
    Connect(#[from] ConnectError),
}

/// Reads what is there now, with no memory of what was. Blocks on the file system.
pub async fn read(origin: &Origin) -> Result<Snapshot, ReadError> {
    match origin {
        Origin::Folders(dirs) => Ok(Folder::new(dirs.clone()).read()?),
        Origin::Kube(server) => kube::read(server).await,
    }
}

/// Tells only what is new: an equal value does not even take the old one's place.
pub(crate) fn send_news<T: PartialEq>(tell: &Sender<T>, now: T) {
    tell.send_if_modified(|before| {
        let news = *before != now;
        if news {
            *before = now;
        }
        news
    });
}

fn publish(now: Result<Snapshot, NotSynced>, sender: &Sender<Followed>) {
    sender.send_if_modified(|last| {
        let changed = last.as_deref() != now.as_ref();
        if changed {
            *last = now.map(Arc::new);
        }
        changed
    });
}
