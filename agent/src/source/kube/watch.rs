//! The watch of one kind: [`Watch::run`] tells what the API server says, for ever.
//!
//! Whatever fails begins anew after a growing, jittered pause: a compacted history (410), a broken stream, an API server
//! that has fallen silent. A kind that may be missing is not asked for again and again: a watch of its CRD, by name, tells
//! when it comes.
//!
//! Invariants: a list is paged and consistent, never older than what was told before. And a list, or a deletion, is told
//! only if the kind's CRD has stood from before the list began until after: when a CRD is deleted, the API server first
//! deletes every object of it, and each of these deletions reaches the watches like any other.

use std::{convert::Infallible, fmt::Debug, pin::pin, time::Duration};

use futures::TryStreamExt;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::{
    Api, Client, Error, Resource, ResourceExt,
    client::AuthError,
    core::{DeserializeGuard, ObjectMeta, PartialObjectMeta, Status},
    runtime::{
        utils::Backoff,
        watcher::{self, DefaultBackoff, watcher},
    },
};
use serde::de::DeserializeOwned;
use tokio::{
    sync::mpsc,
    time::{Instant, sleep, timeout},
};

use super::{
    connect,
    prune::{Prune, opened, unquoted},
    view::Told,
};
use crate::{causes::with_cause, source::store::Event};

/// What has gone on for so long was well until then: longer than it takes to connect in vain.
const WELL: Duration = Duration::from_secs(20);
/// To answer what is no watch, or to send one page of a list.
pub(super) const ANSWER: Duration = Duration::from_secs(30);
/// Until an API server is asked again for a kind that its version does not have: less than what it said stands on without
/// it, for several API servers of which one is newer.
const NEWER: Duration = Duration::from_secs(240);
/// Pauses grow to this, and by jitter to twice that.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

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
    /// The API server does not know the kind, or is about to lose it, or has just lost all of its objects.
    NotServed,
    /// With what to do.
    Other(String),
}

/// Which kind it is.
pub(super) struct Kind {
    pub(super) plural: &'static str,
    /// `None`: Kubernetes' own.
    pub(super) crd: Option<Crd>,
    /// Where the API server does not have it, there is nothing of it.
    pub(super) optional: bool,
}

/// What a kind can be deleted with.
pub(super) struct Crd {
    pub(super) group: &'static str,
    pub(super) client: Client,
}

/// By what a kind stands. One that is made anew stands by another.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Ground {
    Kubernetes,
    /// Its uid.
    Crd(String),
}

impl Kind {
    /// By what it stands now, by a consistent read; `None`: it does not.
    async fn ground(&self) -> Result<Option<Ground>, Error> {
        let Some(crd) = &self.crd else { return Ok(Some(Ground::Kubernetes)) };
        let crds = Api::<CustomResourceDefinition>::all(crd.client.clone());
        let found = crds.get_metadata_opt(&crd.name(self.plural)).await?;
        Ok(found.and_then(|crd| of_crd(crd.metadata)))
    }
}

impl Crd {
    fn name(&self, plural: &str) -> String {
        format!("{plural}.{}", self.group)
    }
}

/// Of a CRD that is being deleted, objects can still be read: while they go, one by one.
fn of_crd(crd: ObjectMeta) -> Option<Ground> {
    crd.uid.filter(|_| crd.deletion_timestamp.is_none()).map(Ground::Crd)
}

pub(super) struct Watch<K> {
    pub(super) api: Api<DeserializeGuard<K>>,
    pub(super) kind: Kind,
    pub(super) config: watcher::Config,
}

/// Why a watch has to begin anew.
#[derive(Debug, PartialEq, Eq)]
enum End {
    /// Nobody listens.
    Unheard,
    Trouble(Trouble),
}

impl<K> Watch<K>
where
    K: Resource + Prune + Clone + Debug + DeserializeOwned + Send + 'static,
    K::Pruned: Send,
{
    pub(super) async fn run(self, tell: mpsc::Sender<Told>, told: impl Fn(Heard<K::Pruned>) -> Told + Send) {
        let mut pauses = DefaultBackoff::default();
        loop {
            let began = Instant::now();
            let Err(End::Trouble(trouble)) = self.once(&tell, &told).await else { return };
            let missing = self.kind.optional && trouble == Trouble::NotServed;
            if tell.send(told(Heard::Failed(trouble))).await.is_err() {
                return;
            }
            if missing && self.appears(&tell, &told).await == Err(End::Unheard) {
                return;
            }
            if began.elapsed() > WELL {
                pauses.reset();
            }
            sleep(pauses.next().unwrap_or(LONGEST_PAUSE)).await;
        }
    }

    /// One list and what follows it, until something fails.
    async fn once(
        &self,
        tell: &mpsc::Sender<Told>,
        told: &(impl Fn(Heard<K::Pruned>) -> Told + Send),
    ) -> Result<Infallible, End> {
        let plural = self.kind.plural;
        let before = self.ground().await?;
        let mut events = pin!(watcher(self.api.clone(), self.config.clone()));
        let mut listed = false;
        loop {
            let next = events.try_next();
            let next = if listed { next.await } else { answered(next).await? };
            let event = next.map_err(|error| End::Trouble(trouble(&error, plural)))?;
            let event = event.ok_or_else(|| End::Trouble(Trouble::Other("the watch has ended".to_owned())))?;
            listed |= matches!(event, watcher::Event::InitDone);
            let takes = matches!(event, watcher::Event::InitDone | watcher::Event::Delete(_));
            if takes && self.ground().await? != before {
                return Err(End::Trouble(Trouble::NotServed));
            }
            let event = match event {
                watcher::Event::Init => Event::ListBegins,
                watcher::Event::InitApply(object) => Event::Listed(object.name_any(), opened(object)),
                watcher::Event::InitDone => Event::ListEnds,
                watcher::Event::Apply(object) => Event::Set(object.name_any(), opened(object)),
                watcher::Event::Delete(object) => Event::Deleted(object.name_any()),
            };
            tell.send(told(Heard::Event(event))).await.map_err(|_| End::Unheard)?;
        }
    }

    /// Waits until the API server may have the kind, or until that can no longer be told. Until then there is nothing of it.
    async fn appears(
        &self,
        tell: &mpsc::Sender<Told>,
        told: &(impl Fn(Heard<K::Pruned>) -> Told + Send),
    ) -> Result<(), End> {
        let Some(crd) = &self.kind.crd else {
            self.nothing(tell, told).await?;
            sleep(NEWER).await;
            return Ok(());
        };
        let named = watcher::Config::default().fields(&format!("metadata.name={}", crd.name(self.kind.plural)));
        let crds = Api::<PartialObjectMeta<CustomResourceDefinition>>::all(crd.client.clone());
        let mut events = pin!(watcher(crds, named));
        while let Ok(Some(event)) = events.try_next().await {
            match event {
                watcher::Event::InitApply(crd) | watcher::Event::Apply(crd) => {
                    if of_crd(crd.metadata).is_some() {
                        break;
                    }
                }
                watcher::Event::InitDone => self.nothing(tell, told).await?,
                watcher::Event::Init | watcher::Event::Delete(_) => {}
            }
        }
        Ok(())
    }

    /// Tells that there is nothing of the kind.
    async fn nothing(
        &self,
        tell: &mpsc::Sender<Told>,
        told: &(impl Fn(Heard<K::Pruned>) -> Told + Send),
    ) -> Result<(), End> {
        for event in [Event::ListBegins, Event::ListEnds] {
            tell.send(told(Heard::Event(event))).await.map_err(|_| End::Unheard)?;
        }
        Ok(())
    }

    /// By what the kind stands now.
    async fn ground(&self) -> Result<Ground, End> {
        match answered(self.kind.ground()).await? {
            Ok(Some(ground)) => Ok(ground),
            Ok(None) => Err(End::Trouble(Trouble::NotServed)),
            Err(error) => Err(End::Trouble(Trouble::Other(failure(&error, self.kind.plural)))),
        }
    }
}

async fn answered<T>(asked: impl Future<Output = T>) -> Result<T, End> {
    timeout(ANSWER, asked).await.map_err(|_| End::Trouble(Trouble::Other(unanswered())))
}

pub(super) fn unanswered() -> String {
    format!("does not answer within {} s: is it up, and is the address right?", ANSWER.as_secs())
}

fn trouble(error: &watcher::Error, plural: &str) -> Trouble {
    use watcher::Error::{InitialListFailed, NoResourceVersion, WatchError, WatchFailed, WatchStartFailed};
    match error {
        WatchStartFailed(Error::Api(status)) | InitialListFailed(Error::Api(status)) if status.code == 404 => {
            Trouble::NotServed
        }
        WatchStartFailed(error) | InitialListFailed(error) | WatchFailed(error) => {
            Trouble::Other(failure(error, plural))
        }
        WatchError(status) => Trouble::Other(refusal(status, plural)),
        NoResourceVersion => Trouble::Other(format!("gives {plural} no resourceVersion")),
    }
}

/// What went wrong, and the remedy.
pub(super) fn failure(error: &Error, plural: &str) -> String {
    match error {
        Error::Api(status) => refusal(status, plural),
        Error::Service(source) => match source.downcast_ref::<AuthError>() {
            Some(error) => format!("cannot be asked: correct its credentials: {}", connect::auth_told(error)),
            None => format!("does not answer ({}): is it up, and is the address right?", with_cause(source.as_ref())),
        },
        // Its text says nothing but that the stream has ended before its end.
        Error::ReadEvents(_) => "has fallen silent, or breaks its watches off: asking it anew".to_owned(),
        error => format!("{plural} cannot be read: {}", unquoted(&error.to_string())),
    }
}

fn refusal(status: &Status, plural: &str) -> String {
    let message = &status.message;
    match status.code {
        401 => format!("does not accept our token or certificate: renew the credentials (401 {message})"),
        403 => format!("{message} (403): grant it, as the chart's RBAC does"),
        410 => format!("has forgotten where the watch of {plural} was: listing anew (410)"),
        code => format!("{plural} cannot be read: {code} {message}"),
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use expect_test::expect;
    use k8s_openapi::{apimachinery::pkg::apis::meta::v1::Time, jiff::Timestamp};

    use super::*;

    fn status(code: u16, message: &str) -> Box<Status> {
        Status::failure(message, "").with_code(code).boxed()
    }

    #[test]
    fn what_ends_a_watch_is_told_with_its_remedy() {
        use watcher::Error::{InitialListFailed, NoResourceVersion, WatchError, WatchFailed, WatchStartFailed};
        let api = |code, message| Error::Api(status(code, message));
        let refused = || io::Error::new(io::ErrorKind::ConnectionRefused, "connection refused");
        let json = serde_json::from_str::<i64>("\"c2VjcmV0\"").unwrap_err();
        let forbidden = "meshclusters.carrick.dev is forbidden: User \"w\" cannot list resource \"meshclusters\"";
        let credentials = AuthError::AuthExec("No id-token for oidc Authentication provider".to_owned());
        let ends = [
            InitialListFailed(api(404, "404 page not found")),
            WatchStartFailed(api(404, "404 page not found")),
            InitialListFailed(api(401, "Unauthorized")),
            InitialListFailed(api(403, forbidden)),
            InitialListFailed(api(410, "The provided continue parameter is too old")),
            InitialListFailed(api(429, "the server has received too many requests")),
            InitialListFailed(api(500, "etcdserver: request timed out")),
            InitialListFailed(Error::Service(Box::new(refused()))),
            InitialListFailed(Error::Service(Box::new(credentials))),
            InitialListFailed(Error::SerdeError(json)),
            WatchStartFailed(api(504, "Too large resource version: 7, current: 5")),
            WatchFailed(Error::ReadEvents(refused())),
            WatchError(status(410, "too old resource version: 1 (9)")),
            // Only a request can find that a kind is not served.
            WatchError(status(404, "not found")),
            NoResourceVersion,
        ];
        let told: String = ends.iter().map(|end| format!("{:?}\n", trouble(end, "meshclusters"))).collect();
        expect![[r#"
            NotServed
            NotServed
            Other("does not accept our token or certificate: renew the credentials (401 Unauthorized)")
            Other("meshclusters.carrick.dev is forbidden: User \"w\" cannot list resource \"meshclusters\" (403): grant it, as the chart's RBAC does")
            Other("has forgotten where the watch of meshclusters was: listing anew (410)")
            Other("meshclusters cannot be read: 429 the server has received too many requests")
            Other("meshclusters cannot be read: 500 etcdserver: request timed out")
            Other("does not answer (connection refused): is it up, and is the address right?")
            Other("cannot be asked: correct its credentials: failed exec auth: No id-token for oidc Authentication provider")
            Other("meshclusters cannot be read: Error deserializing response: invalid type: string \"…\", expected i64 at line 1 column 10")
            Other("meshclusters cannot be read: 504 Too large resource version: 7, current: 5")
            Other("has fallen silent, or breaks its watches off: asking it anew")
            Other("has forgotten where the watch of meshclusters was: listing anew (410)")
            Other("meshclusters cannot be read: 404 not found")
            Other("gives meshclusters no resourceVersion")
        "#]].assert_eq(&told);
    }

    #[test]
    fn a_kind_stands_by_the_uid_of_its_crd_until_that_is_being_deleted() {
        let crd = |uid: &str| ObjectMeta { uid: Some(uid.to_owned()), ..ObjectMeta::default() };
        let deleted = ObjectMeta { deletion_timestamp: Some(Time(Timestamp::UNIX_EPOCH)), ..crd("a") };
        assert_eq!(of_crd(crd("a")), of_crd(crd("a")));
        assert_ne!(of_crd(crd("a")), of_crd(crd("b")));
        assert_ne!(of_crd(crd("a")), None);
        assert_eq!(of_crd(deleted), None);
        assert_eq!(of_crd(ObjectMeta::default()), None);
    }
}
