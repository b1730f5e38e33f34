//! Follows folders: [`follow`] publishes a snapshot whenever what they say has changed.
//!
//! Wakes by inotify on every directory that decides what the folders hold, those above symlinks on the way included,
//! and every few seconds in any case, because not every file system reports what others do to it.
//!
//! Invariant: no change is missed for longer than that. Watches are armed after a look, and if any of them is new, the
//! folders are looked at again before waiting.

use std::{
    collections::BTreeMap,
    io,
    os::fd::{AsFd, AsRawFd, RawFd},
    path::PathBuf,
    time::Duration,
};

use nix::{
    errno::Errno,
    sys::inotify::{AddWatchFlags, InitFlags, Inotify, InotifyEvent, WatchDescriptor},
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::watch::{Receiver, Sender, channel},
    time::{Instant, sleep, timeout_at},
};
use tracing::warn;

use super::{
    Folder, Followed, NotSynced, Problem, Snapshot, publish,
    walk::{Names, Places},
};

/// A change is read when nothing has moved for this long,
const QUIET: Duration = Duration::from_millis(20);
/// but no later than this.
const PATIENCE: Duration = Duration::from_millis(200);
/// Between looks that nothing has called for.
const RESCAN: Duration = Duration::from_secs(5);
/// Between looks without inotify.
const POLL: Duration = Duration::from_secs(1);
/// Looks in a row because watches were new; a folder in such motion wakes us by itself.
const MAX_REARMS: usize = 8;

/// What may change what the folders hold. Not every write: a file counts once it is closed, or renamed into place.
const EVENTS: AddWatchFlags = AddWatchFlags::IN_CREATE
    .union(AddWatchFlags::IN_CLOSE_WRITE)
    .union(AddWatchFlags::IN_MOVE)
    .union(AddWatchFlags::IN_DELETE)
    .union(AddWatchFlags::IN_ATTRIB)
    .union(AddWatchFlags::IN_DELETE_SELF)
    .union(AddWatchFlags::IN_MOVE_SELF)
    .union(AddWatchFlags::IN_ONLYDIR);

/// Follows the folders for as long as somebody listens. Once they have been synced, a folder that goes missing leaves
/// what it said last in force: the last snapshot, incomplete, with why among its problems. Only what differs from the
/// last is published.
///
/// Must be called within a tokio runtime.
pub(super) fn follow(dirs: Vec<PathBuf>) -> Receiver<Followed> {
    let why = "has not been read yet".to_owned();
    let (sender, receiver) =
        channel(Err(NotSynced { place: dirs.first().map(|dir| dir.display().to_string()).unwrap_or_default(), why }));
    tokio::spawn(run(Folder::new(dirs), Waker::new(RESCAN), sender));
    receiver
}

async fn run(mut folder: Folder, mut waker: Waker, sender: Sender<Followed>) {
    let mut last = None;
    let mut rearms = 0;
    loop {
        let looked = tokio::task::spawn_blocking(move || {
            let (snapshot, places) = folder.look();
            (folder, snapshot, places)
        });
        let (snapshot, places);
        (folder, snapshot, places) = match looked.await {
            Ok(looked) => looked,
            Err(error) => match error.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                // The runtime shuts down.
                Err(_) => return,
            },
        };
        publish(standing(snapshot, &mut last), &sender);
        if waker.arm(&places) && rearms < MAX_REARMS {
            rearms += 1;
            continue;
        }
        rearms = 0;
        tokio::select! {
            () = sender.closed() => return,
            () = waker.wait() => {}
        }
    }
}

/// What stands after a look. `last` is what the folders said when they were last synced.
fn standing(looked: Result<Snapshot, NotSynced>, last: &mut Option<Snapshot>) -> Result<Snapshot, NotSynced> {
    match (looked, &*last) {
        (Ok(snapshot), _) => Ok(last.insert(snapshot).clone()),
        (Err(missing), None) => Err(missing),
        (Err(NotSynced { place, why }), Some(last)) => {
            let message = format!("{why} (what it said before stays in force)");
            let mut snapshot = Snapshot { complete: false, ..last.clone() };
            snapshot.problems.push(Problem { place, line: None, document: None, message });
            snapshot.problems.sort();
            Ok(snapshot)
        }
    }
}

/// What ends a wait.
enum Waker {
    Inotify { inotify: AsyncFd<Watcher>, watched: BTreeMap<WatchDescriptor, Names>, rescan: Duration },
    Poll,
}

/// [`Inotify`] as tokio wants it.
struct Watcher(Inotify);

impl AsRawFd for Watcher {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

impl Waker {
    fn new(rescan: Duration) -> Waker {
        // `AsyncFd::register` is unsafe because a type may change its descriptor; a `Watcher` cannot.
        #[expect(deprecated)]
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)
            .map_err(io::Error::from)
            .and_then(|inotify| AsyncFd::with_interest(Watcher(inotify), Interest::READABLE));
        match inotify {
            Ok(inotify) => Waker::Inotify { inotify, watched: BTreeMap::new(), rescan },
            Err(error) => Waker::poll(&error),
        }
    }

    fn poll(error: &io::Error) -> Waker {
        warn!("cannot watch the folders by inotify, looking every {} s instead: {error}", POLL.as_secs());
        Waker::Poll
    }

    /// Watches these places and no others. Whether a watch is new, so that something may have changed unseen.
    fn arm(&mut self, places: &Places) -> bool {
        let Waker::Inotify { inotify, watched, .. } = self else { return false };
        let mut wanted = BTreeMap::new();
        for (dir, names) in &places.0 {
            match inotify.get_ref().0.add_watch(dir, EVENTS) {
                // Two ways to one directory share a watch.
                Ok(watch) => _ = wanted.entry(watch).and_modify(|have| join(have, names)).or_insert(names.clone()),
                Err(error @ (Errno::ENOSPC | Errno::ENOMEM)) => {
                    *self = Waker::poll(&error.into());
                    return false;
                }
                // Not there, or not to be read by us: the timer sees to it.
                Err(_) => {}
            }
        }
        for stale in watched.keys().filter(|watch| !wanted.contains_key(watch)) {
            // Fails where the directory is gone, and the watch with it.
            _ = inotify.get_ref().0.rm_watch(*stale);
        }
        let new = wanted.keys().any(|watch| !watched.contains_key(watch));
        *watched = wanted;
        new
    }

    /// Returns when something may have changed and has come to rest, or when it is time to look anyway.
    async fn wait(&mut self) {
        let Waker::Inotify { inotify, watched, rescan } = self else { return sleep(POLL).await };
        let rescan = Instant::now() + *rescan;
        while let Ok(events) = timeout_at(rescan, next(inotify)).await {
            if !events.is_empty() && !events.iter().any(|event| matters(watched, event)) {
                continue;
            }
            let patience = Instant::now() + PATIENCE;
            let mut quiet = Instant::now() + QUIET;
            while Instant::now() < patience
                && let Ok(events) = timeout_at(quiet.min(patience), next(inotify)).await
            {
                if events.iter().any(|event| matters(watched, event)) {
                    quiet = Instant::now() + QUIET;
                }
            }
            return;
        }
    }
}

/// The next events; none if they cannot be read.
async fn next(inotify: &AsyncFd<Watcher>) -> Vec<InotifyEvent> {
    let read = async || {
        loop {
            let mut ready = inotify.readable().await?;
            let read = |fd: &AsyncFd<Watcher>| fd.get_ref().0.read_events().map_err(io::Error::from);
            if let Ok(events) = ready.try_io(read) {
                return events;
            }
        }
    };
    match read().await {
        Ok(events) => events,
        Err(error) => {
            warn!("reading inotify events: {error}");
            sleep(POLL).await;
            Vec::new()
        }
    }
}

/// Whether an event can have changed what the folders hold; an overflow can hide anything.
fn matters(watched: &BTreeMap<WatchDescriptor, Names>, event: &InotifyEvent) -> bool {
    if event.mask.contains(AddWatchFlags::IN_Q_OVERFLOW) {
        return true;
    }
    match (watched.get(&event.wd), &event.name) {
        (Some(names), Some(name)) => names.include(name),
        (Some(_), None) => true,
        (None, _) => false,
    }
}

fn join(have: &mut Names, more: &Names) {
    match (have, more) {
        (Names::These(have), Names::These(more)) => have.extend(more.iter().cloned()),
        (have, Names::All) => *have = Names::All,
        (Names::All, _) => {}
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, io::Write, os::unix::fs::symlink, path::Path};

    use kube::ResourceExt;
    use tokio::time::timeout;

    use super::*;
    use crate::{
        api::{MeshCluster, Objects},
        scratch::Scratch,
    };

    /// Longer than any test takes: what inotify does not report is never seen.
    const NEVER: Duration = Duration::from_secs(3600);
    /// Until a test gives up.
    const HANG: Duration = Duration::from_secs(30);

    /// The folder's state as it was published: `a=1 b=2`, and how many problems.
    fn rendered(followed: &super::Followed) -> String {
        let Ok(snapshot) = followed else { return "none".to_owned() };
        let mut words: Vec<String> = Vec::new();
        words
            .extend(snapshot.objects.clusters.iter().map(|object| format!("{}={}", object.name_any(), object.spec.id)));
        words.extend(snapshot.problems.iter().map(|_| "problem".to_owned()));
        words.extend((!snapshot.complete).then(|| "incomplete".to_owned()));
        words.join(" ")
    }

    fn unread() -> super::Followed {
        Err(NotSynced { place: String::new(), why: "unread".to_owned() })
    }

    /// A folder that is followed, and every state that was seen.
    struct Followed {
        receiver: Receiver<super::Followed>,
        seen: Vec<String>,
    }

    impl Followed {
        fn new(dir: impl Into<PathBuf>, waker: Waker) -> Followed {
            let (sender, receiver) = channel(unread());
            tokio::spawn(run(Folder::new(vec![dir.into()]), waker, sender));
            Followed { receiver, seen: Vec::new() }
        }

        /// Waits until the published state is this one.
        async fn until(&mut self, expected: &str) {
            loop {
                let now = rendered(&self.receiver.borrow_and_update());
                let arrived = now == expected;
                self.seen.push(now);
                if arrived {
                    return;
                }
                let changed = timeout(HANG, self.receiver.changed()).await;
                changed.unwrap_or_else(|_| panic!("never {expected:?}, but {:?}", self.seen)).unwrap();
            }
        }
    }

    fn put(path: &Path, name: &str, id: i64) {
        let header = "apiVersion: carrick.dev/v1alpha1\nkind: MeshCluster\n";
        fs::write(path, format!("{header}metadata: {{name: {name}}}\nspec: {{id: {id}}}\n")).unwrap();
    }

    /// As git-sync and kubelet do it: a new link is renamed over the old one.
    fn swap(link: &Path, target: &str) {
        let new = link.with_file_name("..new");
        symlink(target, &new).unwrap();
        fs::rename(&new, link).unwrap();
    }

    #[tokio::test]
    async fn edits_renames_and_removals() {
        let dir = Scratch::new();
        let path = |name: &str| dir.path().join(name);
        put(&path("a.yaml"), "a", 1);
        let mut folder = Followed::new(dir.path(), Waker::new(NEVER));
        folder.until("a=1").await;

        put(&path("a.yaml"), "a", 2);
        folder.until("a=2").await;
        put(&path("b.yaml"), "b", 3);
        folder.until("a=2 b=3").await;
        put(&path(".draft"), "b", 4);
        fs::rename(path(".draft"), path("b.yaml")).unwrap();
        folder.until("a=2 b=4").await;
        fs::create_dir(path("sub")).unwrap();
        fs::rename(path("b.yaml"), path("sub/c.yaml")).unwrap();
        put(&path("sub/d.yaml"), "d", 5);
        folder.until("a=2 b=4 d=5").await;
        put(&path("sub/d.yaml"), "d", 6);
        folder.until("a=2 b=4 d=6").await;
        fs::rename(path("sub"), path(".sub")).unwrap();
        folder.until("a=2").await;
        fs::rename(path(".sub"), path("sub")).unwrap();
        folder.until("a=2 b=4 d=6").await;
        fs::remove_file(path("a.yaml")).unwrap();
        folder.until("b=4 d=6").await;
    }

    #[tokio::test]
    async fn half_written_and_then_completed() {
        let dir = Scratch::new();
        let file = dir.path().join("a.yaml");
        put(&file, "a", 1);
        let mut folder = Followed::new(dir.path(), Waker::new(NEVER));
        folder.until("a=1").await;
        fs::write(&file, "apiVersion: carrick.dev/v1alpha1\nkind: Mesh").unwrap();
        folder.until("a=1 problem").await;
        put(&file, "a", 2);
        folder.until("a=2").await;
        assert_eq!(folder.seen, ["none", "a=1", "a=1", "a=1 problem", "a=1 problem", "a=2"]);
    }

    /// As a shell's redirection does it, at a command's pace.
    #[tokio::test]
    async fn what_is_being_written_counts_once_it_is_closed() {
        let dir = Scratch::new();
        let path = |name: &str| dir.path().join(name);
        put(&path("a"), "a", 2);
        put(&path("b"), "b", 2);
        let [a, b] = ["a", "b"].map(|name| fs::read_to_string(path(name)).unwrap());
        fs::write(path("mesh.yaml"), format!("{a}---\n{b}")).unwrap();
        let mut folder = Followed::new(dir.path(), Waker::new(NEVER));
        folder.until("a=2 b=2").await;
        let mut writer = fs::File::create(path("mesh.yaml")).unwrap();
        writer.write_all(a.replace('2', "3").as_bytes()).unwrap();
        // Another file's change has the folder looked at in the middle of it.
        put(&path("c.yaml"), "c", 1);
        folder.until("a=2 b=2 c=1 problem").await;
        writer.write_all(format!("---\n{b}").as_bytes()).unwrap();
        drop(writer);
        folder.until("a=3 b=2 c=1").await;
        assert!(folder.seen.iter().skip(1).all(|seen| seen.contains("b=2")), "{:?}", folder.seen);
    }

    #[tokio::test]
    async fn git_sync_swaps_the_folder_itself() {
        let dir = Scratch::new();
        let path = |name: &str| dir.path().join(name);
        for (tree, id) in [("1", 1), ("2", 2)] {
            fs::create_dir_all(path(&format!("git/.worktrees/{tree}/mesh"))).unwrap();
            put(&path(&format!("git/.worktrees/{tree}/mesh/a.yaml")), "a", id);
        }
        symlink(".worktrees/1", path("git/current")).unwrap();
        symlink("git", path("way")).unwrap();
        let mut folder = Followed::new(path("way/current/mesh"), Waker::new(NEVER));
        folder.until("a=1").await;
        swap(&path("git/current"), ".worktrees/2");
        folder.until("a=2").await;
        put(&path("git/.worktrees/2/mesh/a.yaml"), "a", 3);
        folder.until("a=3").await;
        swap(&path("git/current"), ".worktrees/1");
        folder.until("a=1").await;
        // A link further up.
        fs::create_dir_all(path("other/current/mesh")).unwrap();
        put(&path("other/current/mesh/a.yaml"), "a", 4);
        swap(&path("way"), "other");
        folder.until("a=4").await;
    }

    #[tokio::test]
    async fn kubelet_swaps_what_the_files_lead_to() {
        let dir = Scratch::new();
        let path = |name: &str| dir.path().join(name);
        for (version, id) in [("..1", 1), ("..2", 2)] {
            fs::create_dir(path(version)).unwrap();
            put(&path(version).join("a.yaml"), "a", id);
        }
        symlink("..1", path("..data")).unwrap();
        symlink("..data/a.yaml", path("a.yaml")).unwrap();
        let mut folder = Followed::new(dir.path(), Waker::new(NEVER));
        folder.until("a=1").await;
        swap(&path("..data"), "..2");
        fs::remove_dir_all(path("..1")).unwrap();
        folder.until("a=2").await;
        put(&path("..2/b.yaml"), "b", 3);
        symlink("..data/b.yaml", path("b.yaml")).unwrap();
        folder.until("a=2 b=3").await;
        put(&path("..2/b.yaml"), "b", 4);
        folder.until("a=2 b=4").await;
    }

    #[tokio::test]
    async fn a_folder_that_is_missing_says_nothing() {
        let dir = Scratch::new();
        let path = |name: &str| dir.path().join(name);
        let mut folder = Followed::new(path("far/away"), Waker::new(NEVER));
        fs::create_dir_all(path("far/away")).unwrap();
        put(&path("far/away/a.yaml"), "a", 1);
        folder.until("a=1").await;

        fs::rename(path("far"), path("gone")).unwrap();
        folder.until("a=1 problem incomplete").await;
        fs::create_dir(path("far")).unwrap();
        fs::create_dir(path("far/away")).unwrap();
        put(&path("far/away/b.yaml"), "b", 2);
        folder.until("b=2").await;
        fs::remove_dir_all(path("far")).unwrap();
        folder.until("b=2 problem incomplete").await;
        fs::create_dir_all(path("far/away")).unwrap();
        put(&path("far/away/c.yaml"), "c", 3);
        folder.until("c=3").await;
        folder.seen.dedup();
        let expected = ["none", "a=1", "a=1 problem incomplete", "b=2", "b=2 problem incomplete", "c=3"];
        assert_eq!(folder.seen, expected);
    }

    #[test]
    fn why_a_folder_is_missing_is_always_told_and_nothing_else_changes() {
        let missing = |why: &str| NotSynced { place: "/mesh".to_owned(), why: why.to_owned() };
        let told = |file: &str, message: &str| Problem {
            place: file.to_owned(),
            line: None,
            document: None,
            message: message.to_owned(),
        };
        let mut last = None;
        let mut stands = |looked| standing(looked, &mut last);
        assert_eq!(stands(Err(missing("is not there"))), Err(missing("is not there")));
        let objects = Objects { clusters: vec![MeshCluster::new("a", Default::default())], ..Objects::default() };
        let synced = Snapshot { objects, complete: true, problems: vec![told("/other", "is bad")] };
        assert_eq!(stands(Ok(synced.clone())), Ok(synced.clone()));
        for why in ["is not there", "is empty", "is empty"] {
            let problem = told("/mesh", &format!("{why} (what it said before stays in force)"));
            let problems = vec![problem, told("/other", "is bad")];
            assert_eq!(stands(Err(missing(why))), Ok(Snapshot { complete: false, problems, ..synced.clone() }));
        }
        assert_eq!(stands(Ok(synced.clone())), Ok(synced));
    }

    #[tokio::test]
    async fn only_news_are_published() {
        let (sender, mut receiver) = channel(unread());
        let missing = |why: &str| NotSynced { place: "x".to_owned(), why: why.to_owned() };
        let mut publishes = |now| {
            publish(now, &sender);
            let news = receiver.has_changed().unwrap();
            receiver.mark_unchanged();
            news
        };
        let complete = Snapshot { complete: true, ..Snapshot::default() };
        assert!(publishes(Err(missing("gone"))));
        assert!(!publishes(Err(missing("gone"))));
        assert!(publishes(Err(missing("empty"))));
        assert!(publishes(Ok(Snapshot::default())));
        assert!(!publishes(Ok(Snapshot::default())));
        assert!(publishes(Ok(complete.clone())));
        assert!(!publishes(Ok(complete)));
    }

    #[tokio::test]
    async fn without_inotify_it_looks_by_itself() {
        let dir = Scratch::new();
        put(&dir.path().join("a.yaml"), "a", 1);
        let mut polled = Followed::new(dir.path(), Waker::Poll);
        polled.until("a=1").await;
        put(&dir.path().join("a.yaml"), "a", 2);
        polled.until("a=2").await;
    }

    #[tokio::test]
    async fn it_looks_now_and_then_in_any_case() {
        // Watches nothing, as on a file system that does not report what others do to it.
        timeout(HANG, Waker::new(Duration::from_millis(10)).wait()).await.expect("it sleeps on");
    }

    #[tokio::test]
    async fn it_ends_when_nobody_listens() {
        let dir = Scratch::new();
        let (sender, receiver) = channel(unread());
        let task = tokio::spawn(run(Folder::new(vec![dir.path().to_owned()]), Waker::new(NEVER), sender));
        drop(receiver);
        timeout(HANG, task).await.expect("it goes on").unwrap();
    }

    #[tokio::test]
    async fn a_queue_that_overflows_calls_for_a_look() {
        let dir = Scratch::new();
        let mut waker = Waker::new(NEVER);
        let mut places = Places::default();
        places.0.insert(dir.path().to_owned(), Names::These(["never.yaml".into()].into()));
        assert!(waker.arm(&places));
        assert!(!waker.arm(&places), "nothing is new the second time");
        let queue: usize =
            fs::read_to_string("/proc/sys/fs/inotify/max_queued_events").unwrap().trim().parse().unwrap();
        for n in 0..=queue / 2 {
            // Two events each, of names that do not matter.
            fs::create_dir(dir.path().join(n.to_string())).unwrap();
            fs::remove_dir(dir.path().join(n.to_string())).unwrap();
        }
        timeout(HANG, waker.wait()).await.expect("the overflow was not seen");
    }
}
