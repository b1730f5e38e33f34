//! What the watches have told, as one snapshot: no I/O, and every `now` is an argument.
//!
//! Invariants: there is no snapshot until our four kinds have been listed whole, and this node's own Node is known. From
//! then on there always is one. What is told of one kind changes nothing about another, so the order between kinds does
//! not matter. And it is not complete before MeshClusters have been known: to an agent that has just started, an API server
//! on an empty store looks like a mesh without members, and one that is being filled again like a small mesh.

mod kind;
mod network;

use std::{collections::BTreeMap, time::Duration};

use k8s_openapi::jiff::Timestamp;

use self::{kind::Kind, network::Network};
use super::watch::Heard;
use crate::{
    api::{
        EgressPolicy, MeshCluster, MeshGateway, Objects, RouteAdvertisement,
        network::{BlockAffinity, CiliumNode, IpPool, ServiceCidr},
        v1,
    },
    slot::{self, Wish},
    source::{NotSynced, Problem, Snapshot, kept::Kept},
};

const STANDS: &str = "what it said before stays in force";
/// How long nothing must change before what an empty API server has been filled with is taken for the whole.
const FILLED: Duration = Duration::from_secs(30);

/// What one watch tells.
#[derive(Clone, Debug)]
pub(super) enum Told {
    Clusters(Heard<MeshCluster>),
    Advertisements(Heard<RouteAdvertisement>),
    Policies(Heard<EgressPolicy>),
    Gateways(Heard<MeshGateway>),
    OwnNode(Heard<v1::Node>),
    ServiceCidrs(Heard<ServiceCidr>),
    IpPools(Heard<IpPool>),
    /// Of which generation of watches it is; so with those that follow.
    Nodes(u64, Heard<v1::Node>),
    CiliumNodes(u64, Heard<CiliumNode>),
    BlockAffinities(u64, Heard<BlockAffinity>),
}

/// Whether all that there is can be known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mesh {
    /// Since this start there has been no MeshCluster.
    Empty,
    /// At this start there was none; then they came, one by one.
    Filling {
        until: Duration,
    },
    Known,
}

impl Mesh {
    /// Why nothing can be taken away, and what to do.
    fn problem(self) -> Option<String> {
        match self {
            Mesh::Empty => Some(
                "there is none, nor has there been one since this start: nothing is taken away. Apply the mesh's \
                 manifests; a node that is to leave it, `carrick cleanup` clears"
                    .to_owned(),
            ),
            Mesh::Filling { .. } => Some(format!(
                "there was none at this start: nothing is taken away until what is applied now has not changed for {} s",
                FILLED.as_secs()
            )),
            Mesh::Known => None,
        }
    }
}

#[derive(Clone, Debug)]
pub(super) struct View {
    host: String,
    me: Option<String>,
    clusters: Kind<MeshCluster>,
    mesh: Mesh,
    advertisements: Kind<RouteAdvertisement>,
    policies: Kind<EgressPolicy>,
    gateways: Kind<MeshGateway>,
    own: Kind<v1::Node>,
    /// The own Node as it last was, for when it is gone.
    last_own: Option<v1::Node>,
    nodes: Kind<v1::Node>,
    network: Network,
    /// Of which watches of what is of nodes is heard; none yet: 0.
    generation: u64,
    /// From when it is what was known before this start.
    recalled: Option<Timestamp>,
}

impl View {
    /// `me`: the own Node's name; without it all Nodes are wanted, and none is needed.
    pub(super) fn new(host: String, me: Option<String>) -> View {
        View {
            host,
            me,
            clusters: Kind::new("MeshClusters"),
            mesh: Mesh::Empty,
            advertisements: Kind::new("RouteAdvertisements"),
            policies: Kind::new("EgressPolicies"),
            gateways: Kind::new("MeshGateways"),
            own: Kind::new("this node's own Node"),
            last_own: None,
            nodes: Kind::new("Nodes"),
            network: Network::new(),
            generation: 0,
            recalled: None,
        }
    }

    /// Takes over what was known before this start, if it is the same node's view.
    pub(super) fn recall(&mut self, mut kept: Kept) {
        if kept.node != self.me {
            return;
        }
        self.network.recall(&mut kept.objects);
        let Objects { clusters, advertisements, policies, gateways, nodes, .. } = kept.objects;
        let is_own = |node: &&v1::Node| Some(&node.metadata.name) == self.me.as_ref();
        self.last_own = nodes.iter().find(is_own).cloned();
        self.own.recall(self.last_own.iter().cloned().collect(), |node| Some(node.metadata.name.clone()));
        // Of other nodes a worker knows what MeshGateways say.
        if self.wants_nodes() {
            self.nodes.recall(nodes, |node| Some(node.metadata.name.clone()));
        }
        if !clusters.is_empty() {
            self.mesh = Mesh::Known;
        }
        self.clusters.recall(clusters, |one| one.metadata.name.clone());
        self.advertisements.recall(advertisements, |one| one.metadata.name.clone());
        self.policies.recall(policies, |one| one.metadata.name.clone());
        self.gateways.recall(gateways, |one| one.metadata.name.clone());
        self.recalled = Some(kept.saved);
    }

    /// Whether anything is in force that was only known before this start.
    pub(super) fn recalls(&self) -> bool {
        let heard = self.clusters.store.is_synced() && self.advertisements.store.is_synced();
        let heard = heard && self.policies.store.is_synced() && self.gateways.store.is_synced();
        self.recalled.is_some() && !(heard && self.own.store.is_synced())
    }

    pub(super) fn host(&self) -> &str {
        &self.host
    }

    pub(super) fn me(&self) -> Option<&str> {
        self.me.as_deref()
    }

    /// Returns whether anything is different.
    pub(super) fn hear(&mut self, now: Duration, told: Told) -> bool {
        let first = !self.clusters.store.is_synced();
        let news = match told {
            Told::Clusters(heard) => self.clusters.hear(now, heard),
            Told::Advertisements(heard) => self.advertisements.hear(now, heard),
            Told::Policies(heard) => self.policies.hear(now, heard),
            Told::Gateways(heard) => self.gateways.hear(now, heard),
            Told::OwnNode(heard) => {
                let news = self.own.hear(now, heard);
                if let Some(own) = self.own.objects().next() {
                    let mut own = own.clone();
                    // A Node that was made anew has none until its cloud provider has looked.
                    if let (true, Some(last)) = (own.status.addresses.is_empty(), &self.last_own) {
                        own.status.addresses.clone_from(&last.status.addresses);
                    }
                    self.last_own = Some(own);
                }
                return news;
            }
            Told::ServiceCidrs(heard) => return self.network.service_cidrs.hear(now, heard),
            Told::IpPools(heard) => return self.network.ip_pools.hear(now, heard),
            Told::Nodes(generation, heard) => return generation == self.generation && self.nodes.hear(now, heard),
            Told::CiliumNodes(generation, heard) => {
                return generation == self.generation && self.network.cilium_nodes.hear(now, heard);
            }
            Told::BlockAffinities(generation, heard) => {
                return generation == self.generation && self.network.block_affinities.hear(now, heard);
            }
        };
        let any = self.clusters.objects().next().is_some();
        self.mesh = match self.mesh {
            Mesh::Empty if any && first => Mesh::Known,
            Mesh::Empty if any => Mesh::Filling { until: now + FILLED },
            Mesh::Filling { .. } if news => Mesh::Filling { until: now + FILLED },
            mesh => mesh,
        };
        news
    }

    /// Lets go of what was doubted for long enough, and of the doubt in what has been filled. Returns whether anything is different.
    pub(super) fn tick(&mut self, now: Duration) -> bool {
        let mut changed = self.clusters.store.tick(now);
        changed |= self.advertisements.store.tick(now);
        changed |= self.policies.store.tick(now);
        changed |= self.gateways.store.tick(now);
        changed |= self.own.store.tick(now);
        changed |= self.nodes.store.tick(now);
        changed |= self.network.tick(now);
        let filled = matches!(self.mesh, Mesh::Filling { until } if until <= now);
        if filled {
            self.mesh = Mesh::Known;
        }
        changed || filled
    }

    /// When [`View::tick`] has something to do next.
    pub(super) fn next(&self) -> Option<Duration> {
        let ours = [self.clusters.store.next(), self.advertisements.store.next(), self.policies.store.next()];
        let nodes = [self.gateways.store.next(), self.own.store.next(), self.nodes.store.next()];
        let filled = if let Mesh::Filling { until } = self.mesh { Some(until) } else { None };
        ours.into_iter().chain(nodes).chain([self.network.next(), filled]).flatten().min()
    }

    /// Whether all Nodes are to be watched.
    pub(super) fn wants_nodes(&self) -> bool {
        let label = |own: &v1::Node| own.metadata.labels.get(slot::LABEL).cloned();
        let gateway = |own| Wish::of(label(own).as_deref()).is_ok_and(|wish| wish != Wish::Worker);
        self.me.is_none() || self.last_own.as_ref().is_some_and(gateway)
    }

    /// Whether it matters which node has which block of a pool.
    pub(super) fn wants_blocks(&self) -> bool {
        self.me.is_some() && self.wants_nodes()
    }

    /// Whether it is known if this node is a gateway.
    pub(super) fn knows_itself(&self) -> bool {
        self.me.is_none() || self.last_own.is_some()
    }

    /// New watches tell of what is of nodes from now on, as far as this node has to know. What the ones before said is
    /// forgotten.
    pub(super) fn begin(&mut self, generation: u64) {
        // What was recalled stands until the first watches have listed.
        if self.generation != 0 || !self.nodes.recalled {
            self.nodes = Kind::new(self.nodes.name);
        }
        if self.generation != 0 {
            self.network.begin();
        }
        self.generation = generation;
    }

    /// Whether every watch that is wanted has said something.
    pub(super) fn is_settled(&self) -> bool {
        let ours = self.clusters.is_settled() && self.advertisements.is_settled() && self.policies.is_settled();
        let own = self.me.is_none() || self.own.is_settled();
        let network = !self.knows_itself() || self.network.is_settled(self.wants_blocks());
        ours && self.gateways.is_settled() && own && network && (!self.wants_nodes() || self.nodes.is_settled())
    }

    pub(super) fn snapshot(&self) -> Result<Snapshot, NotSynced> {
        self.check_synced()?;
        let (nodes, nodes_are_complete) = self.nodes();
        let ours = self.clusters.is_complete() && self.advertisements.is_complete() && self.policies.is_complete();
        let mut problems: Vec<Problem> = self.clusters.problems(&self.host).collect();
        problems.extend(self.mesh.problem().map(|why| problem(format!("{} {}", self.host, self.clusters.name), why)));
        problems.extend(self.advertisements.problems(&self.host));
        problems.extend(self.policies.problems(&self.host));
        problems.extend(self.gateways.problems(&self.host));
        problems.extend(self.own.problems(&self.host));
        problems.extend(self.nodes.problems(&self.host));
        problems.extend(self.network.problems(&self.host));
        if let Some(me) = self.me.as_ref().filter(|_| self.own.objects().next().is_none()) {
            let message = format!("is gone: {STANDS}");
            problems.push(problem(format!("{} Node {me}", self.host), message));
        }
        if let Some(saved) = self.recalled.filter(|_| self.recalls()) {
            let message = format!(
                "has not told everything since this start: what it had said by {} is in force",
                saved.strftime("%FT%TZ")
            );
            problems.push(problem(self.host.clone(), message));
        }
        let nowhere = |own: &v1::Node| own.status.addresses.is_empty();
        if let Some(own) =
            self.own.objects().next().filter(|own| nowhere(own) && !self.last_own.as_ref().is_none_or(nowhere))
        {
            let message = format!("has no InternalIP: {STANDS}");
            problems.push(problem(format!("{} Node {}", self.host, own.metadata.name), message));
        }
        problems.sort();
        problems.dedup();
        let mut objects = Objects {
            clusters: self.clusters.objects().cloned().collect(),
            advertisements: self.advertisements.objects().cloned().collect(),
            policies: self.policies.objects().cloned().collect(),
            gateways: self.gateways.objects().cloned().collect(),
            nodes,
            ..Objects::default()
        };
        self.network.fill(&mut objects);
        // Only gateways write them, and to a worker a change of them is no news.
        if !self.wants_nodes() {
            objects.clusters.iter_mut().for_each(|one| one.status = None);
            objects.advertisements.iter_mut().for_each(|one| one.status = None);
            objects.policies.iter_mut().for_each(|one| one.status = None);
            objects.gateways.iter_mut().for_each(|one| one.status = None);
        }
        let complete = ours && self.mesh == Mesh::Known && self.gateways.is_complete() && nodes_are_complete;
        let complete = complete && self.network.is_settled(self.wants_blocks());
        Ok(Snapshot { objects, complete, problems })
    }

    fn check_synced(&self) -> Result<(), NotSynced> {
        let ours = [self.clusters.missing(), self.advertisements.missing(), self.policies.missing()];
        let nodes = if self.me.is_some() { self.own.missing() } else { self.nodes.missing() };
        let mut missing: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for (why, kind) in ours.into_iter().chain([self.gateways.missing(), nodes]).flatten() {
            missing.entry(why).or_default().push(kind);
        }
        let mut told: Vec<String> = missing.iter().map(|(why, kinds)| format!("{}: {why}", kinds.join(", "))).collect();
        if let Some(me) = self.me.as_ref().filter(|_| self.own.store.is_synced() && self.last_own.is_none()) {
            told.push(format!("there is no usable Node {me}: name this node as its Node is, with --node-name"));
        }
        if told.is_empty() { Ok(()) } else { Err(NotSynced { place: self.host.clone(), why: told.join("; ") }) }
    }

    /// By name, and whether these are all that are needed. Of a gateway's node that is not watched, its MeshGateway
    /// says what others need to know.
    fn nodes(&self) -> (Vec<v1::Node>, bool) {
        let mut nodes: BTreeMap<String, v1::Node> =
            self.nodes.objects().map(|node| (node.metadata.name.clone(), node.clone())).collect();
        nodes.extend(self.last_own.iter().map(|own| (own.metadata.name.clone(), own.clone())));
        if !self.nodes.store.is_synced() {
            for gateway in self.gateways.objects() {
                nodes.entry(gateway.spec.node.clone()).or_insert_with(|| node_of(gateway));
            }
        }
        let own = self.me.is_none() || (self.own.is_complete() && self.own.objects().next().is_some());
        let all = !self.wants_nodes() || self.nodes.is_complete();
        (nodes.into_values().collect(), own && all)
    }
}

/// What a gateway says of the node that it runs on.
fn node_of(gateway: &MeshGateway) -> v1::Node {
    let internal = |address: &String| v1::NodeAddress { kind: "InternalIP".to_owned(), address: address.clone() };
    let addresses = gateway.spec.hop_addresses.iter().map(internal).collect();
    v1::Node {
        metadata: v1::Metadata { name: gateway.spec.node.clone(), ..v1::Metadata::default() },
        spec: v1::NodeSpec::default(),
        status: v1::NodeStatus { addresses },
    }
}

fn problem(place: String, message: String) -> Problem {
    Problem { place, line: None, document: None, message }
}

#[cfg(test)]
mod tests;
