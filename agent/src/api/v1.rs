//! Objects of Kubernetes' own `v1` API, as far as they say where nodes and pods are.
//!
//! What `kubectl get -o yaml` prints of them is read as it is: fields that are not here are somebody else's business.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Its name, its namespace where the kind has one, and its labels.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Metadata {
    pub name: String,
    pub namespace: String,
    pub labels: BTreeMap<String, String>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Node {
    pub metadata: Metadata,
    pub spec: NodeSpec,
    pub status: NodeStatus,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct NodeSpec {
    /// The first of `pod_cidrs`.
    #[serde(rename = "podCIDR")]
    pub pod_cidr: String,
    /// At most one of each family.
    #[serde(rename = "podCIDRs")]
    pub pod_cidrs: Vec<String>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct NodeStatus {
    pub addresses: Vec<NodeAddress>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct NodeAddress {
    /// `InternalIP`, `ExternalIP`, `Hostname` and others.
    #[serde(rename = "type")]
    pub kind: String,
    pub address: String,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Pod {
    pub metadata: Metadata,
    pub spec: PodSpec,
    pub status: PodStatus,
}

impl Pod {
    /// `namespace/name`.
    pub fn full_name(&self) -> String {
        let namespace = if self.metadata.namespace.is_empty() { "default" } else { &self.metadata.namespace };
        format!("{namespace}/{}", self.metadata.name)
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct PodSpec {
    /// Empty until the pod is scheduled.
    pub node_name: String,
    /// Its addresses are the node's.
    pub host_network: bool,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PodStatus {
    /// `Succeeded` and `Failed` pods keep addresses here that others may have by now.
    pub phase: String,
    /// The first of `pod_ips`.
    #[serde(rename = "podIP")]
    pub pod_ip: String,
    /// At most one of each family.
    #[serde(rename = "podIPs")]
    pub pod_ips: Vec<PodIp>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PodIp {
    pub ip: String,
}
