//! The folders of manifests as one [`Snapshot`]: [`Folder::read`].
//!
//! Invariants: a snapshot is of one moment, or incomplete. A file that cannot be used keeps what it last meant; if it
//! never meant anything to us, the snapshot is incomplete. A missing or empty folder is no snapshot at all.

use std::{
    collections::BTreeMap,
    fs,
    io::Read,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    time::Duration,
};

use kube::ResourceExt;
use sha2::{Digest, Sha256};

use super::{
    NotSynced, Problem, Snapshot,
    manifest::{self, Item, Located, Object},
    walk::{Found, Places, Tree, walk},
    yaml::shown,
};
use crate::api::Objects;

/// Bytes of one manifest.
const MAX_FILE: u64 = 1 << 20;
/// Bytes of all manifests together.
const MAX_TOTAL: usize = 64 << 20;
/// Looks at a folder that changes while it is read, and the pause between them.
const LOOKS: usize = 3;
const PAUSE: Duration = Duration::from_millis(20);

/// Folders of manifests, and what their files last meant.
#[derive(Debug, Default)]
pub struct Folder {
    dirs: Vec<PathBuf>,
    known: BTreeMap<PathBuf, Known>,
}

/// What is known of one file.
#[derive(Debug, Default)]
struct Known {
    /// SHA-256 of what was last parsed: most looks find nothing new.
    digest: Option<[u8; 32]>,
    good: Option<Vec<Item>>,
    /// Why what is there now cannot be used.
    flaws: Vec<Located>,
}

/// The bytes of a file, or why they cannot be had.
type Content = Result<Vec<u8>, String>;

impl Folder {
    pub fn new(dirs: Vec<PathBuf>) -> Folder {
        Folder { dirs, known: BTreeMap::new() }
    }

    /// Reads everything. Blocks on the file system for as long as the folder keeps changing, at most three looks.
    pub fn read(&mut self) -> Result<Snapshot, NotSynced> {
        self.look().0
    }

    /// As [`Folder::read`], with the places where a change would matter.
    pub(super) fn look(&mut self) -> (Result<Snapshot, NotSynced>, Places) {
        let (mut tree, mut synced) = walk(&self.dirs);
        let mut contents = BTreeMap::new();
        let mut steady = false;
        for look in 0..LOOKS {
            if look > 0 {
                std::thread::sleep(PAUSE);
            }
            contents = read_all(&tree);
            let (again, still_synced) = walk(&self.dirs);
            steady = again == tree && still_synced == synced;
            (tree, synced) = (again, still_synced);
            if steady {
                break;
            }
        }
        let snapshot = synced.and_then(|()| self.assemble(contents, &tree, steady));
        (snapshot, tree.places)
    }

    fn assemble(
        &mut self,
        contents: BTreeMap<PathBuf, Content>,
        tree: &Tree,
        steady: bool,
    ) -> Result<Snapshot, NotSynced> {
        self.known.retain(|path, _| {
            contents.contains_key(path) || tree.unknown.keys().any(|directory| path.starts_with(directory))
        });
        for (path, content) in contents {
            self.known.entry(path).or_default().learn(content);
        }

        let (objects, mut problems) = merge(&self.known);
        problems.extend(tree.unknown.iter().map(|(path, why)| problem(path, (None, None, why.clone()))));
        if !steady && let Some(dir) = self.dirs.first() {
            problems.push(problem(dir, (None, None, "kept changing while it was read: reading again".to_owned())));
        }
        problems.sort();
        let complete = steady && tree.unknown.is_empty() && self.known.values().all(|known| known.good.is_some());
        if complete && objects == Objects::default() {
            let dir = self.dirs.first().cloned().unwrap_or_default();
            return Err(NotSynced { dir, why: "holds manifests, but no object in them".to_owned() });
        }
        Ok(Snapshot { objects, complete, problems })
    }
}

impl Known {
    fn learn(&mut self, content: Content) {
        let bytes = match content {
            Ok(bytes) => bytes,
            Err(why) => {
                self.digest = None;
                self.flaws = vec![(None, None, why)];
                return;
            }
        };
        let digest = Some(Sha256::digest(&bytes).into());
        if self.digest == digest {
            return;
        }
        self.digest = digest;
        match manifest::parse(&bytes) {
            Ok(items) => {
                self.good = Some(items);
                self.flaws.clear();
            }
            Err(flaws) => self.flaws = flaws,
        }
    }
}

fn read_all(tree: &Tree) -> BTreeMap<PathBuf, Content> {
    let mut total = 0;
    let read = |(path, found): (&PathBuf, &Found)| {
        let content = match found {
            Found::Refused(why) => Err(why.clone()),
            Found::File(_) if total > MAX_TOTAL => {
                Err(format!("was not read: the folders hold more than {} MiB", MAX_TOTAL >> 20))
            }
            Found::File(_) => read_file(path),
        };
        total += content.as_ref().map_or(0, Vec::len);
        (path.clone(), content)
    };
    tree.files.iter().map(read).collect()
}

fn read_file(path: &Path) -> Content {
    let unreadable = |error| format!("cannot be read: {error}");
    // What is there may no longer be what was looked at: opening must not wait for a fifo's writer.
    let file = fs::File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(unreadable)?;
    let meta = file.metadata().map_err(unreadable)?;
    if !meta.is_file() {
        return Err("is not a file".to_owned());
    }
    let mut bytes = Vec::new();
    if meta.len() <= MAX_FILE {
        file.take(MAX_FILE + 1).read_to_end(&mut bytes).map_err(unreadable)?;
    }
    if meta.len().max(bytes.len() as u64) > MAX_FILE {
        return Err(format!("is larger than {} MiB: split it", MAX_FILE >> 20));
    }
    Ok(bytes)
}

/// The objects of all files, by name, and what is wrong with the files. Of two objects of one kind and name the first
/// by path and place stands.
fn merge(known: &BTreeMap<PathBuf, Known>) -> (Objects, Vec<Problem>) {
    let (mut objects, mut problems) = (Objects::default(), Vec::new());
    let mut places = BTreeMap::new();
    for (path, known) in known {
        let stale = if known.good.is_some() { " (what it said before stays in force)" } else { "" };
        for (line, document, message) in &known.flaws {
            problems.push(problem(path, (*line, *document, format!("{message}{stale}"))));
        }
        for item in known.good.iter().flatten() {
            let (kind, name) = (item.object.kind(), item.object.name());
            if let Some((first, line)) = places.get(&(kind, name.clone())) {
                let first: &PathBuf = first;
                let name = shown(&name);
                let message = format!("{kind} {name} is already in {}:{line}, which stands: keep one", first.display());
                problems.push(problem(path, (Some(item.line), None, message)));
                continue;
            }
            places.insert((kind, name), (path.clone(), item.line));
            match item.object.clone() {
                Object::Cluster(object) => objects.clusters.push(object),
                Object::Advertisement(object) => objects.advertisements.push(object),
                Object::Policy(object) => objects.policies.push(object),
                Object::Gateway(object) => objects.gateways.push(object),
            }
        }
    }
    objects.clusters.sort_by_key(ResourceExt::name_any);
    objects.advertisements.sort_by_key(ResourceExt::name_any);
    objects.policies.sort_by_key(ResourceExt::name_any);
    objects.gateways.sort_by_key(ResourceExt::name_any);
    (objects, problems)
}

fn problem(path: &Path, (line, document, message): Located) -> Problem {
    Problem { file: path.display().to_string(), document, line, message }
}
