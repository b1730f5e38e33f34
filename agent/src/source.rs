//! Where the objects come from.

use std::fmt;

use crate::api::Objects;

/// One view of the folder.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Snapshot {
    pub objects: Objects,
    /// Whether everything that is written could be read. A pass over an incomplete snapshot makes but never breaks.
    pub complete: bool,
    /// What could not be read, in a stable order.
    pub problems: Vec<Problem>,
}

/// A document that could not be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Path below the folder.
    pub file: String,
    /// Document in the file, from 1, where it is known.
    pub document: Option<usize>,
    /// Line in the file, from 1, where it is known.
    pub line: Option<usize>,
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
