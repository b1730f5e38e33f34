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
    sync::Arc,
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
    Folder, NotSynced, Snapshot,
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

/// Follows the folders for as long as somebody listens. `None` until they have been synced once; from then on a folder
/// that goes missing leaves the last snapshot in force. Only snapshots that differ from the last are published.
///
/// Must be called within a tokio runtime.
pub fn follow(dirs: Vec<PathBuf>) -> Receiver<Option<Arc<Snapshot>>> {
    let (sender, receiver) = channel(None);
    tokio::spawn(run(Folder::new(dirs), sender));
    receiver
}

async fn run(mut folder: Folder, sender: Sender<Option<Arc<Snapshot>>>) {
    let mut waker = Waker::new();
    let mut told = None;
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
        publish(snapshot, &sender, &mut told);
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

fn publish(
    snapshot: Result<Snapshot, NotSynced>,
    sender: &Sender<Option<Arc<Snapshot>>>,
    told: &mut Option<NotSynced>,
) {
    match snapshot {
        Ok(snapshot) => {
            *told = None;
            sender.send_if_modified(|last| {
                let changed = last.as_deref() != Some(&snapshot);
                if changed {
                    *last = Some(Arc::new(snapshot));
                }
                changed
            });
        }
        Err(missing) => {
            if told.as_ref() != Some(&missing) {
                let kept = if sender.borrow().is_some() { "; what it said last stays in force" } else { "" };
                warn!("not synced: {missing}{kept}");
            }
            *told = Some(missing);
        }
    }
}

/// What ends a wait.
enum Waker {
    Inotify { inotify: AsyncFd<Watcher>, watched: BTreeMap<WatchDescriptor, Names> },
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
    fn new() -> Waker {
        // `AsyncFd::register` is unsafe because a type may change its descriptor; a `Watcher` cannot.
        #[expect(deprecated)]
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)
            .map_err(io::Error::from)
            .and_then(|inotify| AsyncFd::with_interest(Watcher(inotify), Interest::READABLE));
        match inotify {
            Ok(inotify) => Waker::Inotify { inotify, watched: BTreeMap::new() },
            Err(error) => Waker::poll(&error),
        }
    }

    fn poll(error: &io::Error) -> Waker {
        warn!("cannot watch the folders by inotify, looking every {} s instead: {error}", POLL.as_secs());
        Waker::Poll
    }

    /// Watches these places and no others. Whether a watch is new, so that something may have changed unseen.
    fn arm(&mut self, places: &Places) -> bool {
        let Waker::Inotify { inotify, watched } = self else { return false };
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
        let Waker::Inotify { inotify, watched } = self else { return sleep(POLL).await };
        let rescan = Instant::now() + RESCAN;
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
