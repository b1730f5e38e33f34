//! Which manifests there are, and which directories decide that: [`walk`].
//!
//! Invariant: looking never blocks. Types are checked before anything is opened, and everything is bounded.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    ffi::{OsStr, OsString},
    fs, io,
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::{Component, Path, PathBuf},
};

use super::NotSynced;

/// Manifests in all folders together.
const MAX_FILES: usize = 10_000;
/// Names looked at in all folders together: a link may lead into a large foreign tree.
const MAX_NAMES: usize = 100_000;
/// Directories within one another.
const MAX_DEPTH: usize = 32;
/// As the kernel's own limit (`MAXSYMLINKS`).
const MAX_LINKS: usize = 40;

/// What a look at the folders found. Two equal trees hold the same files, by identity, size and times.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Tree {
    /// By path as given and followed; each file and directory once, under the first path that leads to it.
    pub(super) files: BTreeMap<PathBuf, Found>,
    /// Directories of which not everything is known, and why.
    pub(super) unknown: BTreeMap<PathBuf, String>,
    pub(super) places: Places,
    /// Device and inode of every file and directory met.
    met: BTreeSet<(u64, u64)>,
    names: usize,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Found {
    File(Stamp),
    /// Cannot be a manifest; why.
    Refused(String),
}

/// Changes whenever the file does: device, inode, size in bytes, and mtime and ctime in seconds and nanoseconds.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Stamp(u64, u64, u64, i64, i64, i64, i64);

/// Directories whose entries decide what a path leads to: which names in each matter.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Places(pub(super) BTreeMap<PathBuf, Names>);

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Names {
    All,
    These(BTreeSet<OsString>),
}

impl Names {
    pub(super) fn include(&self, name: &OsStr) -> bool {
        match self {
            Names::All => true,
            Names::These(names) => names.contains(name),
        }
    }
}

impl Places {
    fn add_all(&mut self, dir: &Path) {
        self.0.insert(dir.to_owned(), Names::All);
    }

    /// Adds every directory in which the path is looked up, as far as it exists, links followed.
    fn trace(&mut self, path: &Path) {
        let mut left: VecDeque<OsString> = path.components().map(|part| part.as_os_str().to_owned()).collect();
        let (mut at, mut links) = (PathBuf::from("/"), 0);
        while let Some(part) = left.pop_front() {
            match Path::new(&part).components().next() {
                Some(Component::RootDir) => at = PathBuf::from("/"),
                Some(Component::ParentDir) => _ = at.pop(),
                Some(Component::Normal(name)) => {
                    if let Names::These(names) =
                        self.0.entry(at.clone()).or_insert_with(|| Names::These(BTreeSet::new()))
                    {
                        names.insert(name.to_owned());
                    }
                    match fs::read_link(at.join(name)) {
                        Ok(target) if links < MAX_LINKS => {
                            links += 1;
                            for part in target.components().rev() {
                                left.push_front(part.as_os_str().to_owned());
                            }
                        }
                        Ok(_) => return,
                        Err(error) if error.kind() == io::ErrorKind::NotFound => return,
                        Err(_) => at.push(name),
                    }
                }
                _ => {}
            }
        }
    }
}

/// Looks at every folder. The places are filled also where a folder is missing.
pub(super) fn walk(dirs: &[PathBuf]) -> (Tree, Result<(), NotSynced>) {
    let mut tree = Tree::default();
    let mut synced = Ok(());
    for dir in dirs {
        if let Err(missing) = root(dir, &mut tree) {
            synced = synced.and(Err(missing));
        }
    }
    (tree, synced)
}

fn root(dir: &Path, tree: &mut Tree) -> Result<(), NotSynced> {
    let dir = &std::path::absolute(dir).unwrap_or_else(|_| dir.to_owned());
    tree.places.trace(dir);
    let not_synced = |why: &str| NotSynced { place: dir.display().to_string(), why: why.to_owned() };
    match fs::metadata(dir) {
        Ok(meta) if !meta.is_dir() => {
            return Err(not_synced("is no directory: give the folder that holds the manifests"));
        }
        Ok(meta) if !tree.met.insert((meta.dev(), meta.ino())) => return Ok(()),
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(not_synced("does not exist (yet)"));
        }
        Err(error) => return Err(not_synced(&format!("cannot be looked at: {error}"))),
    }
    let before = tree.files.len();
    visit(dir, 0, tree);
    if tree.files.len() == before && tree.unknown.is_empty() {
        return Err(not_synced("holds no manifest (*.yaml, *.yml, *.json) yet"));
    }
    Ok(())
}

fn visit(dir: &Path, depth: usize, tree: &mut Tree) {
    tree.places.add_all(dir);
    let listed = fs::read_dir(dir).and_then(|entries| {
        entries
            .map(|entry| Ok((entry.as_ref().map_err(copy)?.file_name(), entry?.file_type()?)))
            .collect::<io::Result<Vec<_>>>()
    });
    let mut names = match listed {
        Ok(names) => names,
        Err(error) => {
            tree.unknown.insert(dir.to_owned(), format!("cannot be listed: {error}"));
            return;
        }
    };
    names.retain(|(name, _)| !name.as_encoded_bytes().starts_with(b"."));
    names.sort_by(|a, b| a.0.cmp(&b.0));
    for (name, kind) in names {
        tree.names += 1;
        if tree.names > MAX_NAMES || tree.files.len() >= MAX_FILES {
            let why = format!("holds too much: more than {MAX_FILES} manifests or {MAX_NAMES} names in all");
            tree.unknown.insert(dir.to_owned(), why);
            return;
        }
        let path = dir.join(name);
        if kind.is_symlink() {
            tree.places.trace(&path);
        }
        entry(path, kind.is_symlink(), depth, tree);
    }
}

fn entry(path: PathBuf, link: bool, depth: usize, tree: &mut Tree) {
    let extension = path.extension();
    let manifest = extension.is_some_and(|extension| ["yaml", "yml", "json"].map(OsStr::new).contains(&extension));
    let meta = match fs::metadata(&path) {
        Ok(meta) => meta,
        // Deleted since it was listed.
        Err(error) if error.kind() == io::ErrorKind::NotFound && !link => return,
        // A link without an extension may be a directory's.
        Err(error) if manifest || extension.is_none() => {
            let what = if link { "is a link that leads nowhere" } else { "cannot be looked at" };
            tree.files.insert(path, Found::Refused(format!("{what}: {error}")));
            return;
        }
        Err(_) => return,
    };
    let id = (meta.dev(), meta.ino());
    if meta.is_dir() && manifest {
        let why = "is a directory and is named like a manifest: rename it, or put the file in its place";
        tree.files.insert(path, Found::Refused(why.to_owned()));
    } else if meta.is_dir() && depth >= MAX_DEPTH {
        tree.unknown.insert(path, format!("lies more than {MAX_DEPTH} directories deep"));
    } else if meta.is_dir() {
        // Met before: a link that leads up, or a second way to the same place.
        if tree.met.insert(id) {
            visit(&path, depth + 1, tree);
        }
    } else if manifest && !meta.is_file() {
        tree.files.insert(path, Found::Refused(format!("is {}, not a file", special(&meta.file_type()))));
    } else if manifest && tree.met.insert(id) {
        let times = (meta.mtime(), meta.mtime_nsec(), meta.ctime(), meta.ctime_nsec());
        let stamp = Stamp(id.0, id.1, meta.len(), times.0, times.1, times.2, times.3);
        tree.files.insert(path, Found::File(stamp));
    }
}

fn special(kind: &fs::FileType) -> &'static str {
    if kind.is_fifo() {
        "a fifo"
    } else if kind.is_socket() {
        "a socket"
    } else {
        "a device"
    }
}

fn copy(error: &io::Error) -> io::Error {
    io::Error::from(error.kind())
}
