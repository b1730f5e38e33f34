//! Objects by which a cluster's network says which ranges it uses: Kubernetes' services, and CNIs.
//!
//! As in [`v1`](super::v1), fields that are not here are somebody else's business.

use serde::{Deserialize, Serialize};

use super::v1::Metadata;

/// `networking.k8s.io/v1`, since Kubernetes 1.33: where services have their addresses.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ServiceCidr {
    pub metadata: Metadata,
    pub spec: ServiceCidrSpec,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ServiceCidrSpec {
    /// At most one of each family.
    pub cidrs: Vec<String>,
}

/// `cilium.io/v2`: what Cilium gave the node of that name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct CiliumNode {
    pub metadata: Metadata,
    pub spec: CiliumNodeSpec,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct CiliumNodeSpec {
    pub ipam: CiliumIpam,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct CiliumIpam {
    /// In the modes `kubernetes` and `cluster-pool`.
    #[serde(rename = "podCIDRs")]
    pub pod_cidrs: Vec<String>,
    /// In the mode `multi-pool`.
    pub pools: CiliumPools,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct CiliumPools {
    pub allocated: Vec<CiliumAllocation>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct CiliumAllocation {
    pub cidrs: Vec<String>,
}

/// `crd.projectcalico.org/v1`: a block of addresses that Calico gave a node. Unlike its IPAMBlock, it does not change with
/// every pod.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct BlockAffinity {
    pub metadata: Metadata,
    pub spec: BlockAffinitySpec,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct BlockAffinitySpec {
    pub cidr: String,
    pub node: String,
    /// `pending`, `confirmed` or `pendingDeletion`: of a block, only one is ever confirmed.
    pub state: String,
    /// `true` once it is about to be deleted.
    pub deleted: String,
    /// `host` or nothing: a node's. `virtual`: a load balancer's.
    #[serde(rename = "type")]
    pub kind: String,
}

/// `crd.projectcalico.org/v1`: what Calico takes its blocks from.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct IpPool {
    pub metadata: Metadata,
    pub spec: IpPoolSpec,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct IpPoolSpec {
    pub cidr: String,
    /// Nothing new gets an address of it. People write such pools for other clusters' ranges, too, so that Calico does
    /// not masquerade towards them.
    pub disabled: bool,
}
