//! The folders of manifests as one [`Snapshot`]: [`Folder::read`].
//!
//! Invariants: a snapshot is of one moment, or incomplete. A file that cannot be used, or that somebody is writing, keeps
//! what it last meant; if it never meant anything to us, the snapshot is incomplete. A missing or empty folder is no snapshot at all.

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
use crate::{
    api::{Objects, v1},
    kernel::lease::is_being_written,
};

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
type Content = Result<Vec<u8>, Unread>;

#[derive(Debug, thiserror::Error)]
enum Unread {
    /// Half a file can look like a whole one: cut between two documents it says that the others were deleted.
    #[error("is open for writing and counts once it is closed: better write another file and rename it over this one")]
    BeingWritten,
    #[error("{0}")]
    Unusable(String),
}

/// Whether anything is in a folder that would have to be read.
pub fn holds_manifests(dir: &Path) -> bool {
    let (tree, _) = walk(&[dir.to_owned()]);
    !(tree.files.is_empty() && tree.unknown.is_empty())
}

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
            let being_written = contents.values().any(|content| matches!(content, Err(Unread::BeingWritten)));
            if steady && !being_written {
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
            let place = self.dirs.first().map(|dir| dir.display().to_string()).unwrap_or_default();
            return Err(NotSynced { place, why: "holds manifests, but no object in them".to_owned() });
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
                self.flaws = vec![(None, None, why.to_string())];
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
            Found::Refused(why) => Err(Unread::Unusable(why.clone())),
            Found::File(_) if total > MAX_TOTAL => {
                Err(Unread::Unusable(format!("was not read: the folders hold more than {} MiB", MAX_TOTAL >> 20)))
            }
            Found::File(_) => read_file(path),
        };
        total += content.as_ref().map_or(0, Vec::len);
        (path.clone(), content)
    };
    tree.files.iter().map(read).collect()
}

fn read_file(path: &Path) -> Content {
    let unreadable = |error| Unread::Unusable(format!("cannot be read: {error}"));
    // What is there may no longer be what was looked at: opening must not wait for a fifo's writer.
    let mut file = fs::File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(unreadable)?;
    let meta = file.metadata().map_err(unreadable)?;
    if !meta.is_file() {
        return Err(Unread::Unusable("is not a file".to_owned()));
    }
    let mut bytes = Vec::new();
    if meta.len() <= MAX_FILE {
        file.by_ref().take(MAX_FILE + 1).read_to_end(&mut bytes).map_err(unreadable)?;
    }
    if meta.len().max(bytes.len() as u64) > MAX_FILE {
        return Err(Unread::Unusable(format!("is larger than {} MiB: split it", MAX_FILE >> 20)));
    }
    // Asked after the reading: what is written and closed from here on shows when the folder is walked again.
    if is_being_written(&file) { Err(Unread::BeingWritten) } else { Ok(bytes) }
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
                Object::Node(object) => objects.nodes.push(object),
                Object::Pod(object) => objects.pods.push(object),
                Object::ServiceCidr(object) => objects.service_cidrs.push(object),
                Object::CiliumNode(object) => objects.cilium_nodes.push(object),
                Object::BlockAffinity(object) => objects.block_affinities.push(object),
                Object::IpPool(object) => objects.ip_pools.push(object),
            }
        }
    }
    objects.clusters.sort_by_key(ResourceExt::name_any);
    objects.advertisements.sort_by_key(ResourceExt::name_any);
    objects.policies.sort_by_key(ResourceExt::name_any);
    objects.gateways.sort_by_key(ResourceExt::name_any);
    objects.nodes.sort_by(|a, b| a.metadata.name.cmp(&b.metadata.name));
    objects.pods.sort_by_key(v1::Pod::full_name);
    objects.service_cidrs.sort_by(|a, b| a.metadata.name.cmp(&b.metadata.name));
    objects.cilium_nodes.sort_by(|a, b| a.metadata.name.cmp(&b.metadata.name));
    objects.block_affinities.sort_by(|a, b| a.metadata.name.cmp(&b.metadata.name));
    objects.ip_pools.sort_by(|a, b| a.metadata.name.cmp(&b.metadata.name));
    (objects, problems)
}

fn problem(path: &Path, (line, document, message): Located) -> Problem {
    Problem { place: path.display().to_string(), document, line, message }
}

#[cfg(test)]
mod tests {
    use std::{fmt::Write as _, io::Write as _, os::unix::fs::symlink};

    use expect_test::{Expect, expect};
    use proptest::prelude::*;

    use super::*;
    use crate::scratch::Scratch;

    /// A MeshCluster.
    fn cluster(name: &str, id: i64) -> String {
        format!("apiVersion: carrick.dev/v1alpha1\nkind: MeshCluster\nmetadata: {{name: {name}}}\nspec: {{id: {id}}}\n")
    }

    fn put(dir: &Scratch, name: &str, text: impl AsRef<[u8]>) {
        let path = dir.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    /// A directory of (name, text).
    fn folder(files: &[(&str, &str)]) -> Scratch {
        let dir = Scratch::new();
        files.iter().for_each(|(name, text)| put(&dir, name, text));
        dir
    }

    /// The whole outcome, below `dir`: `complete` or not, each object, each problem.
    fn rendered(dir: &Scratch, read: &Result<Snapshot, NotSynced>) -> String {
        let mut out = String::new();
        match read {
            Ok(Snapshot { objects, complete, problems }) => {
                writeln!(out, "{}", if *complete { "complete" } else { "incomplete" }).unwrap();
                for object in &objects.clusters {
                    writeln!(out, "MeshCluster/{} {}", object.name_any(), object.spec.id).unwrap();
                }
                problems.iter().for_each(|problem| writeln!(out, "{problem}").unwrap());
            }
            Err(missing) => writeln!(out, "not synced: {missing}").unwrap(),
        }
        out.replace(&format!("{}/", dir.path().display()), "").replace(&dir.path().display().to_string(), "DIR")
    }

    fn check(dir: &Scratch, expected: Expect) {
        let mut folder = Folder::new(vec![dir.path().to_owned()]);
        let first = folder.read();
        expected.assert_eq(&rendered(dir, &first));
        assert_eq!(folder.read(), first, "reading again changes nothing");
    }

    #[test]
    fn every_manifest_below_and_nothing_else() {
        let dir = folder(&[
            ("b.yaml", &cluster("b", 2)),
            ("sub/deep/a.yml", &cluster("a", 1)),
            (
                "c.json",
                r#"{"apiVersion":"carrick.dev/v1alpha1","kind":"MeshCluster","metadata":{"name":"c"},"spec":{"id":3}}"#,
            ),
            ("README.md", "not a manifest"),
            (".hidden.yaml", "not: seen"),
            (".git/config.yaml", "not: seen"),
            ("..2026/x.yaml", "not: seen"),
        ]);
        check(
            &dir,
            expect![[r#"
            complete
            MeshCluster/a 1
            MeshCluster/b 2
            MeshCluster/c 3
        "#]],
        );
    }

    #[test]
    fn nothing_there_is_not_synced() {
        let dir = Scratch::new();
        check(
            &dir,
            expect![[r#"
            not synced: DIR: holds no manifest (*.yaml, *.yml, *.json) yet
        "#]],
        );
        put(&dir, "README.md", "x");
        put(&dir, ".git/a.yaml", cluster("a", 1));
        check(
            &dir,
            expect![[r#"
            not synced: DIR: holds no manifest (*.yaml, *.yml, *.json) yet
        "#]],
        );
        put(&dir, "a.yaml", "# nothing yet\n");
        check(
            &dir,
            expect![[r#"
            not synced: DIR: holds manifests, but no object in them
        "#]],
        );

        let missing = vec![dir.path().join("missing/far")];
        expect![[r#"
            not synced: missing/far: does not exist (yet)
        "#]]
        .assert_eq(&rendered(&dir, &Folder::new(missing).read()));
        let file = vec![dir.path().join("a.yaml")];
        expect![[r#"
            not synced: a.yaml: is no directory: give the folder that holds the manifests
        "#]]
        .assert_eq(&rendered(&dir, &Folder::new(file).read()));
    }

    #[test]
    fn several_folders_are_one_and_none_may_be_missing() {
        let dir = folder(&[("mesh/a.yaml", &cluster("a", 1)), ("own/b.yaml", &cluster("b", 2))]);
        let read = |names: &[&str]| {
            let dirs = names.iter().map(|name| dir.path().join(name)).collect();
            rendered(&dir, &Folder::new(dirs).read())
        };
        expect![[r#"
            complete
            MeshCluster/a 1
            MeshCluster/b 2
        "#]]
        .assert_eq(&read(&["mesh", "own"]));
        assert_eq!(read(&["own", "mesh", "mesh/../own"]), read(&["mesh", "own"]));
        expect![[r#"
            not synced: other: does not exist (yet)
        "#]]
        .assert_eq(&read(&["mesh", "other"]));
    }

    #[test]
    fn of_two_objects_with_one_name_the_first_by_path_stands() {
        let dir = folder(&[
            ("a.yaml", &cluster("x", 1)),
            ("b.yaml", &format!("{}---\n{}", cluster("x", 2), cluster("w", 3))),
            ("sub/a.yaml", &format!("{}---\n{}", cluster("z", 4), cluster("z", 5))),
        ]);
        check(
            &dir,
            expect![[r#"
                complete
                MeshCluster/w 3
                MeshCluster/x 1
                MeshCluster/z 4
                b.yaml:1: MeshCluster "x" is already in a.yaml:1, which stands: keep one
                sub/a.yaml:6: MeshCluster "z" is already in sub/a.yaml:1, which stands: keep one
            "#]],
        );
    }

    #[test]
    fn what_cannot_be_a_manifest() {
        let dir = folder(&[("a.yaml", &cluster("a", 1)), ("dir.yaml/b.yaml", &cluster("b", 2)), ("empty.yaml", "")]);
        put(&dir, "huge.yaml", vec![b'#'; 10 << 20]);
        put(&dir, "latin1.yaml", b"# ok\nname: \xe4\n");
        nix::unistd::mkfifo(&dir.path().join("fifo.yaml"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        symlink("/dev/zero", dir.path().join("device.yaml")).unwrap();
        symlink("nowhere", dir.path().join("link.yaml")).unwrap();
        symlink("nowhere", dir.path().join("current")).unwrap();
        symlink("nowhere", dir.path().join("notes.txt")).unwrap();
        symlink("self.yaml", dir.path().join("self.yaml")).unwrap();
        check(
            &dir,
            expect![[r#"
            incomplete
            MeshCluster/a 1
            current: is a link that leads nowhere: No such file or directory (os error 2)
            device.yaml: is a device, not a file
            dir.yaml: is a directory and is named like a manifest: rename it, or put the file in its place
            empty.yaml: has no bytes, as if it were half written; to say nothing, delete it or leave a comment in it
            fifo.yaml: is a fifo, not a file
            huge.yaml: is larger than 1 MiB: split it
            latin1.yaml:2: is not UTF-8: save it in that encoding
            link.yaml: is a link that leads nowhere: No such file or directory (os error 2)
            self.yaml: is a link that leads nowhere: Too many levels of symbolic links (os error 40)
        "#]],
        );
    }

    #[test]
    fn links_are_followed_once_and_never_round() {
        let dir = folder(&[("real/tree/a.yaml", &cluster("a", 1)), ("other/b.yaml", &cluster("b", 2))]);
        let config = dir.path().join("config");
        fs::create_dir(&config).unwrap();
        symlink("../real/tree", config.join("current")).unwrap();
        symlink(dir.path().join("other/b.yaml"), config.join("b.yaml")).unwrap();
        symlink("b.yaml", config.join("c.yaml")).unwrap();
        symlink(".", config.join("round")).unwrap();
        symlink("../../config", dir.path().join("real/tree/up")).unwrap();
        symlink("config", dir.path().join("link")).unwrap();
        let read = |name: &str| rendered(&dir, &Folder::new(vec![dir.path().join(name)]).read());
        let expected = "complete\nMeshCluster/a 1\nMeshCluster/b 2\n";
        assert_eq!((read("config").as_str(), read("link").as_str()), (expected, expected));
    }

    #[test]
    fn directories_without_end_are_bounded() {
        let deep = "d/".repeat(40);
        let dir = folder(&[("a.yaml", &cluster("a", 1)), (&format!("{deep}b.yaml"), &cluster("b", 2))]);
        let read = Folder::new(vec![dir.path().to_owned()]).read().unwrap();
        assert!(!read.complete);
        assert!(read.problems[0].message.ends_with("lies more than 32 directories deep"), "{:?}", read.problems);
    }

    /// A sequence of edits, each followed by a look.
    #[test]
    fn a_bad_file_keeps_what_it_last_meant() {
        let dir = folder(&[("a.yaml", &cluster("a", 1)), ("b.yaml", &cluster("b", 2))]);
        let mut folder = Folder::new(vec![dir.path().to_owned()]);
        let mut look = |expected: Expect| expected.assert_eq(&rendered(&dir, &folder.read()));
        look(expect![[r#"
            complete
            MeshCluster/a 1
            MeshCluster/b 2
        "#]]);

        put(&dir, "b.yaml", format!("{}---\nkind: Mesh", cluster("b", 3)));
        put(&dir, "c.yaml", "kind: [");
        look(expect![[r#"
            incomplete
            MeshCluster/a 1
            MeshCluster/b 2
            b.yaml:6 (document 2): kind: "Mesh" is none of MeshCluster, RouteAdvertisement, EgressPolicy, MeshGateway, Node, Pod, ServiceCIDR, CiliumNode, BlockAffinity, IPPool: take it out of the folder (what it said before stays in force)
            c.yaml:1 (document 1): is not YAML: unclosed bracket '['
        "#]]);

        put(&dir, "b.yaml", "");
        put(&dir, "c.yaml", cluster("c", 3));
        look(expect![[r#"
            complete
            MeshCluster/a 1
            MeshCluster/b 2
            MeshCluster/c 3
            b.yaml: has no bytes, as if it were half written; to say nothing, delete it or leave a comment in it (what it said before stays in force)
        "#]]);

        fs::remove_file(dir.path().join("b.yaml")).unwrap();
        fs::create_dir(dir.path().join("b.yaml")).unwrap();
        look(expect![[r#"
            complete
            MeshCluster/a 1
            MeshCluster/b 2
            MeshCluster/c 3
            b.yaml: is a directory and is named like a manifest: rename it, or put the file in its place (what it said before stays in force)
        "#]]);

        fs::remove_dir(dir.path().join("b.yaml")).unwrap();
        look(expect![[r#"
            complete
            MeshCluster/a 1
            MeshCluster/c 3
        "#]]);

        // Emptied and filled again: nothing is forgotten in between.
        fs::rename(dir.path().join("a.yaml"), dir.path().join(".a")).unwrap();
        fs::rename(dir.path().join("c.yaml"), dir.path().join(".c")).unwrap();
        look(expect![[r#"
            not synced: DIR: holds no manifest (*.yaml, *.yml, *.json) yet
        "#]]);
        put(&dir, "a.yaml", "half");
        put(&dir, "c.yaml", cluster("c", 4));
        look(expect![[r#"
            complete
            MeshCluster/a 1
            MeshCluster/c 4
            a.yaml:1 (document 1): is not an object: a mapping with apiVersion, kind, metadata and spec (what it said before stays in force)
        "#]]);
    }

    /// A file cut between two documents is a good file that says less.
    #[test]
    fn a_file_that_is_being_written_keeps_what_it_last_meant() {
        let both = format!("{}---\n{}", cluster("a", 1), cluster("b", 2));
        let dir = folder(&[("a.yaml", &both), ("c.yaml", &cluster("c", 3))]);
        let mut folder = Folder::new(vec![dir.path().to_owned()]);
        folder.read().unwrap();
        let mut writer = fs::File::create(dir.path().join("a.yaml")).unwrap();
        writer.write_all(cluster("a", 4).as_bytes()).unwrap();
        expect![[r#"
            complete
            MeshCluster/a 1
            MeshCluster/b 2
            MeshCluster/c 3
            a.yaml: is open for writing and counts once it is closed: better write another file and rename it over this one (what it said before stays in force)
        "#]].assert_eq(&rendered(&dir, &folder.read()));
        expect![[r#"
            incomplete
            MeshCluster/c 3
            a.yaml: is open for writing and counts once it is closed: better write another file and rename it over this one
        "#]].assert_eq(&rendered(&dir, &Folder::new(vec![dir.path().to_owned()]).read()));

        writer.write_all(format!("---\n{}", cluster("b", 5)).as_bytes()).unwrap();
        drop(writer);
        expect![[r#"
            complete
            MeshCluster/a 4
            MeshCluster/b 5
            MeshCluster/c 3
        "#]]
        .assert_eq(&rendered(&dir, &folder.read()));
    }

    #[test]
    fn a_directory_that_cannot_be_listed_hides_nothing() {
        let dir = folder(&[("a.yaml", &cluster("a", 1)), ("sub/b.yaml", &cluster("b", 2))]);
        let mut known = Folder::new(vec![dir.path().to_owned()]);
        known.read().unwrap();
        let (mut tree, _) = walk(&known.dirs);
        // Root can list everything, so say that it could not.
        tree.files.retain(|path, _| path.ends_with("a.yaml"));
        tree.unknown.insert(dir.path().join("sub"), "cannot be listed: denied".to_owned());
        expect![[r#"
            incomplete
            MeshCluster/a 1
            MeshCluster/b 2
            sub: cannot be listed: denied
        "#]]
        .assert_eq(&rendered(&dir, &known.assemble(read_all(&tree), &tree, true)));
        let mut new = Folder::new(known.dirs.clone());
        expect![[r#"
            incomplete
            MeshCluster/a 1
            sub: cannot be listed: denied
        "#]]
        .assert_eq(&rendered(&dir, &new.assemble(read_all(&tree), &tree, true)));
    }

    #[test]
    fn a_folder_in_motion_is_never_complete() {
        let dir = folder(&[("a.yaml", &cluster("a", 1))]);
        let mut folder = Folder::new(vec![dir.path().to_owned()]);
        let (tree, _) = walk(&folder.dirs);
        expect![[r#"
            incomplete
            MeshCluster/a 1
            DIR: kept changing while it was read: reading again
        "#]]
        .assert_eq(&rendered(&dir, &folder.assemble(read_all(&tree), &tree, false)));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// The order in which files are made shows in their inodes and in what the directory lists first.
        #[test]
        fn the_order_of_creation_does_not_matter(
            order in Just((0..6).collect::<Vec<usize>>()).prop_shuffle(),
            other in Just((0..6).collect::<Vec<usize>>()).prop_shuffle(),
        ) {
            let files = [
                ("a.yaml", cluster("x", 1)), ("b.yaml", cluster("x", 2)), ("s/a.yaml", cluster("y", 3)),
                ("s/b.yaml", "bad: [".to_owned()), ("t/a.yml", cluster("y", 4)), ("c.json", cluster("z", 5)),
            ];
            let read = |order: &[usize]| {
                let dir = Scratch::new();
                order.iter().for_each(|n| put(&dir, files[*n].0, &files[*n].1));
                rendered(&dir, &Folder::new(vec![dir.path().to_owned()]).read())
            };
            prop_assert_eq!(read(&order), read(&other));
        }
    }
}
