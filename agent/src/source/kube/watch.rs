//! The watch of one kind: [`Watch::run`] tells what the API server says, for ever.
//!
//! A list is streamed where the API server can, else paged. Whatever fails begins anew after a growing, jittered pause:
//! a compacted history (410), a broken stream, an API server that has fallen silent.
//!
//! Invariant: a deletion is told only while the kind stands. When a CRD is deleted, the API server first deletes every
//! object of it, and each of these deletions reaches the watches like any other.

use std::{fmt::Debug, pin::pin, time::Duration};

use futures::TryStreamExt;
use kube::{
    Api, Client, Error, Resource, ResourceExt,
    core::{DeserializeGuard, Status},
    runtime::{
        utils::Backoff,
        watcher::{self, DefaultBackoff, watcher},
    },
};
use serde::de::DeserializeOwned;
use tokio::{
    sync::mpsc,
    time::{Instant, sleep},
};

use super::{
    prune::{Prune, opened},
    view::Told,
};
use crate::{agent::with_cause, source::store::Event};

const GROUP_VERSION: &str = "carrick.dev/v1alpha1";
/// What has gone on for so long was well until then: longer than it takes to connect in vain.
const WELL: Duration = Duration::from_secs(20);

/// What a watch tells.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Heard<T> {
    Event(Event<Result<T, String>>),
    /// Nothing can be heard now.
    Failed(Trouble),
}

/// Why nothing can be heard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Trouble {
    /// The API server does not know the kind (any more).
    NotServed,
    /// With what to do.
    Other(String),
}

/// Whose kind it is.
pub(super) enum Kind {
    /// Its CRD can be deleted.
    Ours {
        plural: &'static str,
        client: Client,
    },
    Kubernetes {
        plural: &'static str,
    },
}

impl Kind {
    /// Whether the API server has it and is not about to lose it: of a CRD that is being deleted objects can be read, but
    /// not made.
    async fn stands(&self) -> Result<bool, Error> {
        let Kind::Ours { plural, client } = self else { return Ok(true) };
        match client.list_api_group_resources(GROUP_VERSION).await {
            Ok(served) => Ok(served
                .resources
                .iter()
                .any(|resource| resource.name == *plural && resource.verbs.iter().any(|verb| verb == "create"))),
            Err(Error::Api(status)) if status.code == 404 => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn plural(&self) -> &'static str {
        match self {
            Kind::Ours { plural, .. } | Kind::Kubernetes { plural } => plural,
        }
    }
}

pub(super) struct Watch<K> {
    pub(super) api: Api<DeserializeGuard<K>>,
    pub(super) kind: Kind,
    pub(super) config: watcher::Config,
}

/// Why a watch has to begin anew.
enum End {
    /// Nobody listens.
    Unheard,
    NotServed,
    Failed {
        why: String,
        streaming: bool,
    },
}

impl<K> Watch<K>
where
    K: Resource + Prune + Clone + Debug + DeserializeOwned + Send + 'static,
    K::Pruned: Send,
{
    pub(super) async fn run(self, tell: mpsc::Sender<Told>, told: impl Fn(Heard<K::Pruned>) -> Told + Send) {
        let mut pauses = DefaultBackoff::default();
        let (mut streams, mut stands) = (true, true);
        loop {
            let began = Instant::now();
            let end = self.once(streams, stands, &tell, &told).await;
            if began.elapsed() > WELL {
                pauses.reset();
            }
            stands = !matches!(end, End::NotServed);
            let trouble = match end {
                End::Unheard => return,
                End::NotServed => Trouble::NotServed,
                End::Failed { why, streaming } => {
                    streams &= streaming;
                    Trouble::Other(why)
                }
            };
            if tell.send(told(Heard::Failed(trouble))).await.is_err() {
                return;
            }
            match pauses.next() {
                Some(pause) => sleep(pause).await,
                None => pauses.reset(),
            }
        }
    }

    /// One list and what follows it, until something fails. `stands`: the kind was there when it was last seen.
    async fn once(
        &self,
        streams: bool,
        stands: bool,
        tell: &mpsc::Sender<Told>,
        told: &(impl Fn(Heard<K::Pruned>) -> Told + Send),
    ) -> End {
        if !stands && let Some(end) = self.unserved().await {
            return end;
        }
        let config = if streams { self.config.clone().streaming_lists() } else { self.config.clone() };
        let mut events = pin!(watcher(self.api.clone(), config));
        let mut listing = true;
        loop {
            let event = match events.try_next().await {
                Ok(Some(event)) => event,
                Ok(None) => return End::Failed { why: "the watch has ended".to_owned(), streaming: streams },
                Err(error) => return self.ended(&error, listing),
            };
            let event = match event {
                watcher::Event::Init => Event::ListBegins,
                watcher::Event::InitApply(object) => Event::Listed(object.name_any(), opened(object)),
                watcher::Event::InitDone => Event::ListEnds,
                watcher::Event::Apply(object) => Event::Set(object.name_any(), opened(object)),
                watcher::Event::Delete(object) => match self.unserved().await {
                    None => Event::Deleted(object.name_any()),
                    Some(end) => return end,
                },
            };
            listing = matches!(event, Event::ListBegins | Event::Listed(..));
            if tell.send(told(Heard::Event(event))).await.is_err() {
                return End::Unheard;
            }
        }
    }

    async fn unserved(&self) -> Option<End> {
        match self.kind.stands().await {
            Ok(true) => None,
            Ok(false) => Some(End::NotServed),
            Err(error) => Some(End::Failed { why: failure(&error, self.kind.plural()), streaming: true }),
        }
    }

    fn ended(&self, error: &watcher::Error, listing: bool) -> End {
        let plural = self.kind.plural();
        match error {
            watcher::Error::WatchStartFailed(Error::Api(status))
            | watcher::Error::InitialListFailed(Error::Api(status))
                if status.code == 404 =>
            {
                End::NotServed
            }
            watcher::Error::WatchStartFailed(error) => End::Failed {
                why: failure(error, plural),
                // "Bad request" and "invalid": it cannot stream lists.
                streaming: !matches!(error, Error::Api(status) if matches!(status.code, 400 | 422)),
            },
            watcher::Error::InitialListFailed(error) => End::Failed { why: failure(error, plural), streaming: false },
            // In the middle of a streamed list: an etcd that is too old for it shows itself so.
            watcher::Error::WatchFailed(error) => End::Failed { why: failure(error, plural), streaming: !listing },
            watcher::Error::WatchError(status) => End::Failed { why: refusal(status, plural), streaming: !listing },
            watcher::Error::NoResourceVersion => {
                End::Failed { why: format!("gives {plural} no resourceVersion"), streaming: false }
            }
        }
    }
}

/// What went wrong, and the remedy.
fn failure(error: &Error, plural: &str) -> String {
    match error {
        Error::Api(status) => refusal(status, plural),
        Error::Service(source) => {
            format!("does not answer ({}): is it up, and is the address right?", with_cause(source.as_ref()))
        }
        // Its text says nothing but that the stream has ended before its end.
        Error::ReadEvents(_) => "has fallen silent, or breaks its watches off: asking it anew".to_owned(),
        error => format!("{plural} cannot be watched: {error}"),
    }
}

fn refusal(status: &Status, plural: &str) -> String {
    let message = &status.message;
    match status.code {
        401 => format!("does not accept our token or certificate: renew the credentials (401 {message})"),
        403 => format!("{message} (403): grant it, as the chart's RBAC does"),
        410 => format!("has forgotten where the watch of {plural} was: listing anew (410)"),
        code => format!("{plural} cannot be watched: {code} {message}"),
    }
}
