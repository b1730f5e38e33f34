//! All kinds together.

use serde::{Deserialize, Serialize};

use super::{
    EgressPolicy, MeshCluster, MeshGateway, RouteAdvertisement,
    network::{BlockAffinity, CiliumNode, IpPool, ServiceCidr},
    v1::{Node, Pod},
};

/// The typed objects of one snapshot.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Objects {
    pub clusters: Vec<MeshCluster>,
    pub advertisements: Vec<RouteAdvertisement>,
    pub policies: Vec<EgressPolicy>,
    pub gateways: Vec<MeshGateway>,
    pub nodes: Vec<Node>,
    pub pods: Vec<Pod>,
    pub service_cidrs: Vec<ServiceCidr>,
    pub cilium_nodes: Vec<CiliumNode>,
    pub block_affinities: Vec<BlockAffinity>,
    pub ip_pools: Vec<IpPool>,
}

impl Objects {
    /// Whether both ask for the same: they differ in statuses at most.
    pub fn ask_the_same(&self, other: &Objects) -> bool {
        macro_rules! asked {
            ($objects:expr) => {
                $objects.iter().map(|one| (&one.metadata, &one.spec))
            };
        }
        let Objects {
            clusters,
            advertisements,
            policies,
            gateways,
            nodes,
            pods,
            service_cidrs,
            cilium_nodes,
            block_affinities,
            ip_pools,
        } = self;
        asked!(clusters).eq(asked!(other.clusters))
            && asked!(advertisements).eq(asked!(other.advertisements))
            && asked!(policies).eq(asked!(other.policies))
            && asked!(gateways).eq(asked!(other.gateways))
            && (nodes, pods) == (&other.nodes, &other.pods)
            && (service_cidrs, cilium_nodes) == (&other.service_cidrs, &other.cilium_nodes)
            && (block_affinities, ip_pools) == (&other.block_affinities, &other.ip_pools)
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{
            EgressPolicySpec, MeshClusterSpec, MeshGatewaySpec, MeshGatewayStatus, ObjectStatus, RouteAdvertisementSpec,
        },
        *,
    };

    #[test]
    fn a_status_asks_for_nothing() {
        let one = Objects {
            clusters: vec![MeshCluster::new("va", MeshClusterSpec::default())],
            advertisements: vec![RouteAdvertisement::new("va", RouteAdvertisementSpec::default())],
            policies: vec![EgressPolicy::new("va", EgressPolicySpec::default())],
            gateways: vec![MeshGateway::new("0", MeshGatewaySpec::default())],
            nodes: vec![Node::default()],
            ..Objects::default()
        };
        let mut told = one.clone();
        told.clusters[0].status = Some(ObjectStatus::default());
        told.advertisements[0].status = Some(ObjectStatus::default());
        told.policies[0].status = Some(ObjectStatus::default());
        told.gateways[0].status = Some(MeshGatewayStatus::default());
        assert!(told != one && told.ask_the_same(&one));

        let change: [fn(&mut Objects); 10] = [
            |one| one.clusters[0].spec.id = 7,
            |one| one.advertisements[0].metadata.generation = Some(7),
            |one| one.policies[0].metadata.name = Some("vb".to_owned()),
            |one| one.gateways[0].spec.ordinal = 7,
            |one| one.nodes[0].metadata.name = "vb".to_owned(),
            |one| one.pods.push(Pod::default()),
            |one| one.service_cidrs.push(ServiceCidr::default()),
            |one| one.cilium_nodes.push(CiliumNode::default()),
            |one| one.block_affinities.push(BlockAffinity::default()),
            |one| one.ip_pools.push(IpPool::default()),
        ];
        for (i, change) in change.iter().enumerate() {
            let mut changed = one.clone();
            change(&mut changed);
            assert!(!changed.ask_the_same(&one) && !one.ask_the_same(&changed), "change {i}");
        }
    }
}
