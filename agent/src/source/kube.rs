//! The objects of an API server, as snapshots: [`follow`] and [`read`].
//!
//! One task for each kind ([`mod@watch`]) tells what the API server says; one task hears them all ([`View`], pure) and
//! publishes. A worker watches its own Node only, and what Cilium says of it; a gateway every Node, and what the CNI says of
//! each: for as long as the label on its own says so.
//!
//! Invariant: an API server that is away, refuses, starts anew or loses its CRDs takes nothing from the snapshot.

mod connect;
mod keeper;
mod once;
mod prune;
mod view;
mod watch;

use std::{ffi::OsString, panic::resume_unwind, path::PathBuf, time::Duration};

use kube::{
    Api, Client,
    core::{ApiResource, DeserializeGuard, GroupVersionKind, NotUsed, Object},
    runtime::watcher,
};
use tokio::{
    sync::{
        mpsc,
        watch::{Receiver, Sender, channel},
    },
    task::{AbortHandle, JoinSet},
    time::{Instant, sleep_until, timeout_at},
};

pub use self::{
    connect::ConnectError,
    once::{AskError, Once},
};
use self::{
    keeper::Keeper,
    view::{Told, View},
    watch::{Crd, Kind, Watch},
};
use super::{Followed, NotSynced, ReadError, Snapshot, publish};
use crate::{
    api::{
        EgressPolicy, MeshCluster, MeshGateway, RouteAdvertisement,
        network::{BlockAffinitySpec, CiliumNodeSpec, IpPoolSpec, ServiceCidrSpec},
    },
    names::NodeName,
};

/// What kube's crates say of a failure that the snapshot tells of.
pub const LOG_CAPS: [&str; 2] = ["kube_client=off", "kube_runtime=off"];

/// How long [`read`] waits until every kind has been listed, or has failed,
const PATIENCE: Duration = Duration::from_secs(20);
/// and how long at least: a kind that has just been made is not served at once.
const SECOND_TRY: Duration = Duration::from_secs(3);
/// What tasks have told and nobody has heard yet: beyond it they wait, and with them the API server.
const UNHEARD: usize = 256;
/// How long the API server has to say how things stand, before what it said last is in force.
const RECALL: Duration = Duration::from_secs(2);
/// A wait that never ends.
const NEVER: Duration = Duration::from_secs(1 << 32);

/// An API server, and who asks it.
#[derive(Clone, Debug)]
pub struct Server {
    /// One or several, as KUBECONFIG has them; `None`: the service account of the pod.
    pub kubeconfig: Option<OsString>,
    /// Which of the kubeconfig's contexts; `None`: its current one.
    pub context: Option<String>,
    /// The node whose view it is; `None`: all Nodes, and none of them is needed.
    pub node: Option<NodeName>,
    /// Where what it says is kept for the next start, when it is followed; `None`: nowhere.
    pub keep: Option<PathBuf>,
}

impl Server {
    /// A client of its own. Nothing is asked yet.
    pub(crate) async fn client(&self) -> Result<Client, ConnectError> {
        Ok(self.connect().await?.0)
    }

    /// And its address.
    async fn connect(&self) -> Result<(Client, String), ConnectError> {
        connect::connect(self.kubeconfig.as_deref(), self.context.as_deref()).await
    }
}

pub(super) async fn follow(server: &Server) -> Result<Receiver<Followed>, ConnectError> {
    let (client, mut view) = start(server).await?;
    let mut keeper = Keeper::new(server.keep.clone(), view.me().map(str::to_owned));
    if let Some(kept) = keeper.recall() {
        view.recall(kept);
    }
    let why = "nothing has been listed yet".to_owned();
    let (sender, receiver) = channel(Err(NotSynced { place: view.host().to_owned(), why }));
    tokio::spawn(async move {
        let mut watches = Watches::new(client);
        tokio::select! {
            () = sender.closed() => {}
            () = run(&mut view, &mut watches, &mut keeper, &sender) => {}
        }
    });
    Ok(receiver)
}

pub(super) async fn read(server: &Server) -> Result<Snapshot, ReadError> {
    let (client, mut view) = start(server).await?;
    let mut watches = Watches::new(client);
    let began = Instant::now();
    loop {
        watches.follow(&mut view);
        let patience = match (view.is_settled(), view.snapshot()) {
            (true, Ok(snapshot)) => return Ok(snapshot),
            (true, Err(_)) => SECOND_TRY,
            (false, _) => PATIENCE,
        };
        let Ok(told) = timeout_at(began + patience, watches.next()).await else { break };
        view.hear(began.elapsed(), told);
    }
    Ok(view.snapshot()?)
}

async fn start(server: &Server) -> Result<(Client, View), ConnectError> {
    let (client, host) = server.connect().await?;
    Ok((client, View::new(host, server.node.as_ref().map(ToString::to_string))))
}

async fn run(view: &mut View, watches: &mut Watches, keeper: &mut Keeper, sender: &Sender<Followed>) {
    let began = Instant::now();
    let (mut settled, mut changed) = (false, true);
    loop {
        changed |= watches.follow(view);
        settled |= view.is_settled() || (view.recalls() && began.elapsed() >= RECALL);
        if settled && std::mem::take(&mut changed) {
            let mut snapshot = view.snapshot();
            if let Ok(snapshot) = &mut snapshot {
                snapshot.problems.extend(keeper.problem());
            }
            publish(snapshot, sender);
            if let (Ok(snapshot), false) = (&*sender.borrow(), view.recalls()) {
                keeper.note(snapshot);
            }
        }
        let due = began + view.next().unwrap_or(NEVER);
        tokio::select! {
            () = sleep_until(began + RECALL), if !settled && view.recalls() => {}
            () = keeper.keep() => changed = true,
            told = watches.next() => {
                changed |= view.hear(began.elapsed(), told);
                // A list tells of each object on its own, and of many there is one snapshot.
                while let Some(told) = watches.heard() {
                    changed |= view.hear(began.elapsed(), told);
                }
            }
            () = sleep_until(due) => changed |= view.tick(began.elapsed()),
        }
    }
}

/// The tasks that watch. They end with this, and this with one that panics.
struct Watches {
    client: Client,
    tell: mpsc::Sender<Told>,
    told: mpsc::Receiver<Told>,
    tasks: JoinSet<()>,
    own_node: bool,
    /// Of what is of nodes: whether of all of them.
    of_nodes: Option<(bool, Vec<AbortHandle>)>,
    /// Of these, so that what an ended one told last is not taken for a later one's.
    generation: u64,
}

impl Watches {
    fn new(client: Client) -> Watches {
        let (tell, told) = mpsc::channel(UNHEARD);
        let mut tasks = JoinSet::new();
        tasks.spawn(ours::<MeshCluster>(&client, "meshclusters").run(tell.clone(), Told::Clusters));
        tasks.spawn(ours::<RouteAdvertisement>(&client, "routeadvertisements").run(tell.clone(), Told::Advertisements));
        tasks.spawn(ours::<EgressPolicy>(&client, "egresspolicies").run(tell.clone(), Told::Policies));
        tasks.spawn(ours::<MeshGateway>(&client, "meshgateways").run(tell.clone(), Told::Gateways));
        let services = theirs::<ServiceCidrSpec>(&client, &SERVICE_CIDRS, watcher::Config::default());
        tasks.spawn(services.run(tell.clone(), Told::ServiceCidrs));
        let pools = theirs::<IpPoolSpec>(&client, &IP_POOLS, watcher::Config::default());
        tasks.spawn(pools.run(tell.clone(), Told::IpPools));
        Watches { client, tell, told, tasks, own_node: false, of_nodes: None, generation: 0 }
    }

    /// Begins and ends the watches of what is of nodes, as the view needs them. Returns whether the view is another.
    fn follow(&mut self, view: &mut View) -> bool {
        let own = |name: &str| watcher::Config::default().fields(&format!("metadata.name={name}"));
        if let (false, Some(name)) = (self.own_node, view.me()) {
            self.own_node = true;
            self.tasks.spawn(nodes(&self.client, own(name)).run(self.tell.clone(), Told::OwnNode));
        }
        let all = view.wants_nodes();
        if !view.knows_itself() || self.of_nodes.as_ref().is_some_and(|(before, _)| *before == all) {
            return false;
        }
        for task in self.of_nodes.take().into_iter().flat_map(|(_, tasks)| tasks) {
            task.abort();
        }
        self.generation += 1;
        let (generation, client) = (self.generation, self.client.clone());
        let scope = || view.me().filter(|_| !all).map_or_else(watcher::Config::default, own);
        let cilium = theirs::<CiliumNodeSpec>(&client, &CILIUM_NODES, scope());
        let told = move |heard| Told::CiliumNodes(generation, heard);
        let mut tasks = vec![self.tasks.spawn(cilium.run(self.tell.clone(), told))];
        if all {
            let told = move |heard| Told::Nodes(generation, heard);
            tasks.push(self.tasks.spawn(nodes(&client, scope()).run(self.tell.clone(), told)));
        }
        if view.wants_blocks() {
            let calico = theirs::<BlockAffinitySpec>(&client, &BLOCK_AFFINITIES, scope());
            let told = move |heard| Told::BlockAffinities(generation, heard);
            tasks.push(self.tasks.spawn(calico.run(self.tell.clone(), told)));
        }
        self.of_nodes = Some((all, tasks));
        view.begin(generation);
        true
    }

    async fn next(&mut self) -> Told {
        loop {
            tokio::select! {
                told = self.told.recv() => return told.expect("we hold a sender"),
                Some(Err(ended)) = self.tasks.join_next() => if let Ok(panic) = ended.try_into_panic() {
                    resume_unwind(panic);
                },
            }
        }
    }

    fn heard(&mut self) -> Option<Told> {
        self.told.try_recv().ok()
    }
}

fn ours<K>(client: &Client, plural: &'static str) -> Watch<K>
where
    K: kube::Resource<DynamicType = ()>,
{
    let crd = Some(Crd { group: "carrick.dev", client: client.clone() });
    let kind = Kind { plural, crd, optional: false };
    Watch { api: Api::<DeserializeGuard<K>>::all(client.clone()), kind, config: watcher::Config::default() }
}

fn nodes(client: &Client, config: watcher::Config) -> Watch<prune::KubeNode> {
    let kind = Kind { plural: "nodes", crd: None, optional: false };
    Watch { api: Api::all_with(client.clone(), &NODES.resource()), kind, config }
}

/// A kind that the API server may not have.
fn theirs<Spec>(client: &Client, foreign: &Foreign, config: watcher::Config) -> Watch<Object<Spec, NotUsed>>
where
    Spec: Clone,
{
    let crd = foreign.is_custom.then(|| Crd { group: foreign.group, client: client.clone() });
    let kind = Kind { plural: foreign.plural, crd, optional: true };
    Watch { api: Api::all_with(client.clone(), &foreign.resource()), kind, config }
}

/// A kind of somebody else's.
struct Foreign {
    group: &'static str,
    version: &'static str,
    kind: &'static str,
    plural: &'static str,
    /// By a CRD.
    is_custom: bool,
}

const NODES: Foreign = Foreign { group: "", version: "v1", kind: "Node", plural: "nodes", is_custom: false };
const SERVICE_CIDRS: Foreign = Foreign {
    group: "networking.k8s.io",
    version: "v1",
    kind: "ServiceCIDR",
    plural: "servicecidrs",
    is_custom: false,
};
const CILIUM_NODES: Foreign =
    Foreign { group: "cilium.io", version: "v2", kind: "CiliumNode", plural: "ciliumnodes", is_custom: true };
const BLOCK_AFFINITIES: Foreign = Foreign {
    group: "crd.projectcalico.org",
    version: "v1",
    kind: "BlockAffinity",
    plural: "blockaffinities",
    is_custom: true,
};
const IP_POOLS: Foreign =
    Foreign { group: "crd.projectcalico.org", version: "v1", kind: "IPPool", plural: "ippools", is_custom: true };

impl Foreign {
    fn resource(&self) -> ApiResource {
        ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(self.group, self.version, self.kind), self.plural)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of an API server that is not there.
    fn watches() -> Watches {
        let config = kube::Config::new("http://127.0.0.1:1".parse().unwrap());
        Watches::new(Client::try_from(config).unwrap())
    }

    /// The agent has one thread.
    #[tokio::test]
    async fn whoever_waits_for_a_mute_server_sleeps() {
        let mut view = View::new("http://127.0.0.1:1".to_owned(), Some("w1".to_owned()));
        let mut watches = watches();
        watches.tasks.abort_all();
        let (sender, _receiver) = channel(Err(NotSynced { place: String::new(), why: String::new() }));
        let mut keeper = Keeper::new(None, None);
        let mut running = std::pin::pin!(run(&mut view, &mut watches, &mut keeper, &sender));
        // Whoever spins uses up its turn again and again.
        let mut turns = 0;
        let counted = std::future::poll_fn(|context| {
            turns += 1;
            running.as_mut().poll(context)
        });
        assert!(tokio::time::timeout(RECALL + Duration::from_millis(500), counted).await.is_err());
        assert!(turns < 50, "{turns} turns");
    }

    #[tokio::test]
    #[should_panic(expected = "a bug")]
    async fn a_watch_that_panics_is_not_just_missing() {
        let mut watches = watches();
        watches.tasks.spawn(async { panic!("a bug") });
        loop {
            watches.next().await;
        }
    }

    #[tokio::test]
    async fn a_watch_that_is_ended_is_no_bug() {
        let mut watches = watches();
        watches.tasks.spawn(std::future::pending()).abort();
        let before = watches.tasks.len();
        while watches.tasks.len() == before {
            watches.next().await;
        }
        watches.next().await;
    }
}
