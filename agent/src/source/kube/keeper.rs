//! Keeps what is in force for the next start, soon after it changes, and off the loop: a disk may be slow.

use std::{future::pending, panic::resume_unwind, path::PathBuf, sync::Arc, time::Duration};

use k8s_openapi::jiff::Timestamp;
use tokio::{
    task::{JoinHandle, spawn_blocking},
    time::{Instant, sleep_until},
};

use crate::{
    causes::with_cause,
    source::{
        Problem, Snapshot,
        kept::{self, KeepError, Kept},
    },
};

/// Changes come in bursts.
const SOON: Duration = Duration::from_secs(1);
/// However often something changes, the disk is written once in so long.
const AGAIN: Duration = Duration::from_secs(10);

pub(super) struct Keeper {
    dir: Option<PathBuf>,
    node: Option<String>,
    /// What is written, or is to be.
    noted: Option<Arc<Snapshot>>,
    /// It is to be, and has been in force since then.
    wanted: Option<Timestamp>,
    writing: Option<JoinHandle<Result<(), KeepError>>>,
    next: Instant,
    trouble: Option<String>,
}

impl Keeper {
    /// `node`: whose view it is.
    pub(super) fn new(dir: Option<PathBuf>, node: Option<String>) -> Keeper {
        Keeper { dir, node, noted: None, wanted: None, writing: None, next: Instant::now(), trouble: None }
    }

    /// What was kept by an agent before. Blocks on the file system.
    pub(super) fn recall(&mut self) -> Option<Kept> {
        kept::read(self.dir.as_deref()?).unwrap_or_else(|error| {
            self.trouble = Some(format!("cannot be read, and is written anew: {}", with_cause(&error)));
            None
        })
    }

    /// This is in force now.
    pub(super) fn note(&mut self, snapshot: &Arc<Snapshot>) {
        if self.dir.is_none() || self.noted.as_ref().is_some_and(|noted| noted.objects == snapshot.objects) {
            return;
        }
        if self.wanted.is_none() {
            self.next = self.next.max(Instant::now() + SOON);
        }
        self.wanted = Some(Timestamp::now());
        self.noted = Some(snapshot.clone());
    }

    /// Writes what is noted. Resolves when there is other trouble than before. Nothing is lost if it is not waited for.
    pub(super) async fn keep(&mut self) {
        loop {
            if let Some(writing) = &mut self.writing {
                let written = writing.await;
                self.writing = None;
                self.next = Instant::now() + AGAIN;
                let written = written.unwrap_or_else(|ended| resume_unwind(ended.into_panic()));
                let trouble = written.err().map(|error| format!("cannot be written: {}", with_cause(&error)));
                if trouble != self.trouble {
                    self.trouble = trouble;
                    return;
                }
            } else if let (Some(dir), Some(noted), true) = (&self.dir, &self.noted, self.wanted.is_some()) {
                sleep_until(self.next).await;
                let (dir, node, noted) = (dir.clone(), self.node.clone(), noted.clone());
                let write =
                    |saved| spawn_blocking(move || kept::write(&dir, &Kept { saved, node, objects: &noted.objects }));
                self.writing = self.wanted.take().map(write);
            } else {
                pending::<()>().await;
            }
        }
    }

    pub(super) fn problem(&self) -> Option<Problem> {
        let (dir, trouble) = (self.dir.as_ref()?, self.trouble.as_ref()?);
        let message = format!("what the API server said last, for a start while it is away, {trouble}");
        Some(Problem { place: dir.display().to_string(), line: None, document: None, message })
    }
}
