//! Where the objects come from: folders of manifests, as snapshots.
//!
//! [`Folder`] reads, [`follow`] reads whenever something changes. Invariants that every pass relies on: what could not
//! be read never looks like something that was deleted ([`Snapshot::complete`], [`NotSynced`]), and the same files give
//! the same snapshot in whatever order they were written.

mod folder;
mod manifest;
mod strict;
mod walk;
mod watch;
mod yaml;

use std::{fmt, path::PathBuf};

pub use folder::Folder;
pub use watch::{Followed, follow};

use crate::api::Objects;

/// One view of the folder.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Snapshot {
    /// Each kind by name; no name twice.
    pub objects: Objects,
    /// Whether everything that is written could be read. A pass over an incomplete snapshot makes but never breaks.
    pub complete: bool,
    /// What could not be read, in a stable order.
    pub problems: Vec<Problem>,
}

/// A document that could not be used.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Problem {
    /// The absolute path, as it was given and followed.
    pub file: String,
    /// Line in the file, from 1, where it is known.
    pub line: Option<usize>,
    /// Document in the file, from 1, where it is known.
    pub document: Option<usize>,
    /// What is wrong and what to do. Never holds file contents that could be a secret.
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.file)?;
        if let Some(line) = self.line {
            write!(f, ":{line}")?;
        }
        if let Some(document) = self.document {
            write!(f, " (document {document})")?;
        }
        write!(f, ": {}", self.message)
    }
}

/// Why there is no snapshot: a folder that is missing or empty says nothing, least of all that everything is to go.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}: {why}", dir.display())]
pub struct NotSynced {
    pub dir: PathBuf,
    pub why: String,
}

/// Reads the folders as they are now, with no memory of what they were. Blocks on the file system.
pub fn read_once(dirs: &[PathBuf]) -> Result<Snapshot, NotSynced> {
    Folder::new(dirs.to_vec()).read()
}
