//! What is known of the kinds by which the cluster's network says which ranges it uses. Each may be missing, and degrades
//! alone: what was said of it stands, and nothing else waits for it but at the start.

use std::time::Duration;

use super::{Problem, kind::Kind};
use crate::api::{
    Objects,
    network::{BlockAffinity, CiliumNode, IpPool, ServiceCidr},
};

#[derive(Clone, Debug)]
pub(super) struct Network {
    pub(super) service_cidrs: Kind<ServiceCidr>,
    pub(super) ip_pools: Kind<IpPool>,
    /// On a worker its own alone.
    pub(super) cilium_nodes: Kind<CiliumNode>,
    /// On gateways alone.
    pub(super) block_affinities: Kind<BlockAffinity>,
}

impl Network {
    pub(super) fn new() -> Network {
        Network {
            service_cidrs: Kind::optional("ServiceCIDRs"),
            ip_pools: Kind::optional("IPPools"),
            cilium_nodes: Kind::optional("CiliumNodes"),
            block_affinities: Kind::optional("BlockAffinities"),
        }
    }

    pub(super) fn recall(&mut self, objects: &mut Objects) {
        let name = |name: &String| Some(name.clone());
        self.service_cidrs.recall(std::mem::take(&mut objects.service_cidrs), |one| name(&one.metadata.name));
        self.ip_pools.recall(std::mem::take(&mut objects.ip_pools), |one| name(&one.metadata.name));
        self.cilium_nodes.recall(std::mem::take(&mut objects.cilium_nodes), |one| name(&one.metadata.name));
        self.block_affinities.recall(std::mem::take(&mut objects.block_affinities), |one| name(&one.metadata.name));
    }

    /// Other watches than before tell of the kinds that say where pods live.
    pub(super) fn begin(&mut self) {
        let Network { cilium_nodes, block_affinities, .. } = Network::new();
        self.cilium_nodes = cilium_nodes;
        self.block_affinities = block_affinities;
    }

    pub(super) fn tick(&mut self, now: Duration) -> bool {
        let mut changed = self.service_cidrs.store.tick(now);
        changed |= self.ip_pools.store.tick(now);
        changed |= self.cilium_nodes.store.tick(now);
        changed |= self.block_affinities.store.tick(now);
        changed
    }

    pub(super) fn next(&self) -> Option<Duration> {
        let whole = [self.service_cidrs.store.next(), self.ip_pools.store.next()];
        let of_nodes = [self.cilium_nodes.store.next(), self.block_affinities.store.next()];
        whole.into_iter().chain(of_nodes).flatten().min()
    }

    /// Whether every watch has said something, be it that it cannot. `blocks`: whether there is one of these.
    pub(super) fn is_settled(&self, blocks: bool) -> bool {
        let whole = self.service_cidrs.is_settled() && self.ip_pools.is_settled();
        whole && self.cilium_nodes.is_settled() && (!blocks || self.block_affinities.is_settled())
    }

    pub(super) fn problems<'a>(&'a self, host: &'a str) -> impl Iterator<Item = Problem> + 'a {
        let whole = self.service_cidrs.problems(host).chain(self.ip_pools.problems(host));
        whole.chain(self.cilium_nodes.problems(host)).chain(self.block_affinities.problems(host))
    }

    /// Adds what stands.
    pub(super) fn fill(&self, objects: &mut Objects) {
        objects.service_cidrs = self.service_cidrs.objects().cloned().collect();
        objects.ip_pools = self.ip_pools.objects().cloned().collect();
        objects.cilium_nodes = self.cilium_nodes.objects().cloned().collect();
        objects.block_affinities = self.block_affinities.objects().cloned().collect();
    }
}
