//! From the API server's objects to what the agent uses of them. All else is dropped as it comes, and a change to it is
//! no news: heartbeats, a Node's conditions, managed fields.

use kube::core::{DeserializeGuard, NotUsed, Object, ObjectMeta};

use crate::api::{
    EgressPolicy, MeshCluster, MeshGateway, MeshGatewayStatus, RouteAdvertisement,
    network::{
        BlockAffinity, BlockAffinitySpec, CiliumNode, CiliumNodeSpec, IpPool, IpPoolSpec, ServiceCidr, ServiceCidrSpec,
    },
    v1,
};

/// The labels that are kept of a Node.
const OUR_LABELS: &str = "carrick.dev/";

/// A Node as the API server has it.
pub(super) type KubeNode = Object<v1::NodeSpec, v1::NodeStatus>;

/// An object of the API server, and what is left of it.
pub(super) trait Prune {
    type Pruned;

    fn prune(self) -> Self::Pruned;
}

/// What names the object, and what a condition or an event of it has to say.
fn named(meta: ObjectMeta) -> ObjectMeta {
    ObjectMeta { name: meta.name, uid: meta.uid, generation: meta.generation, ..ObjectMeta::default() }
}

macro_rules! prune_ours {
    ($($kind:ident),*) => {$(
        impl Prune for $kind {
            type Pruned = $kind;

            fn prune(self) -> $kind {
                $kind { metadata: named(self.metadata), spec: self.spec, status: self.status }
            }
        }
    )*};
}

prune_ours!(MeshCluster, RouteAdvertisement, EgressPolicy);

impl Prune for MeshGateway {
    type Pruned = MeshGateway;

    fn prune(self) -> MeshGateway {
        let status = self.status.map(|status| MeshGatewayStatus { heartbeat: None, ..status });
        MeshGateway { metadata: named(self.metadata), spec: self.spec, status }
    }
}

impl Prune for KubeNode {
    type Pruned = v1::Node;

    fn prune(self) -> v1::Node {
        let labels = self.metadata.labels.unwrap_or_default();
        let metadata = v1::Metadata {
            name: self.metadata.name.unwrap_or_default(),
            namespace: String::new(),
            labels: labels.into_iter().filter(|(key, _)| key.starts_with(OUR_LABELS)).collect(),
        };
        let mut status = self.status.unwrap_or_default();
        status.addresses.retain(|address| address.kind == "InternalIP");
        v1::Node { metadata, spec: self.spec, status }
    }
}

macro_rules! prune_network {
    ($($spec:ident => $kind:ident),*) => {$(
        impl Prune for Object<$spec, NotUsed> {
            type Pruned = $kind;

            fn prune(self) -> $kind {
                let name = self.metadata.name.unwrap_or_default();
                $kind { metadata: v1::Metadata { name, ..v1::Metadata::default() }, spec: self.spec }
            }
        }
    )*};
}

prune_network!(
    ServiceCidrSpec => ServiceCidr,
    CiliumNodeSpec => CiliumNode,
    BlockAffinitySpec => BlockAffinity,
    IpPoolSpec => IpPool
);

/// The pruned object, or why there is none.
pub(super) fn opened<K: Prune>(guarded: DeserializeGuard<K>) -> Result<K::Pruned, String> {
    guarded.0.map(Prune::prune).map_err(|invalid| unquoted(&invalid.error))
}

/// Without the texts that it cites: somebody may have put a key there.
pub(super) fn unquoted(message: &str) -> String {
    let parts = message.split('"').enumerate();
    parts.map(|(i, part)| if i % 2 == 0 { part } else { "\"…\"" }).collect()
}

#[cfg(test)]
mod tests {
    use expect_test::expect;
    use kube::Resource;
    use serde_json::json;

    use super::*;

    #[test]
    fn of_a_node_name_our_labels_ranges_and_internal_addresses_are_kept() {
        let node = json!({
            "apiVersion": "v1", "kind": "Node",
            "metadata": {
                "name": "n1", "uid": "u", "resourceVersion": "7", "annotations": {"a": "b"},
                "labels": {"carrick.dev/gateway": "0", "kubernetes.io/hostname": "n1"},
                "managedFields": [{"manager": "kubelet", "fieldsV1": {"f:spec": {}}}],
            },
            "spec": {"podCIDR": "10.42.0.0/24", "podCIDRs": ["10.42.0.0/24"], "providerID": "k3s://n1", "taints": []},
            "status": {
                "addresses": [{"type": "InternalIP", "address": "192.0.2.1"}, {"type": "Hostname", "address": "n1"}],
                "conditions": [{"type": "Ready", "status": "True"}], "images": [{"names": ["x"], "sizeBytes": 1}],
            },
        });
        let node = opened(serde_json::from_value::<DeserializeGuard<KubeNode>>(node).unwrap());
        expect![[r#"
            Ok(
                Node {
                    metadata: Metadata {
                        name: "n1",
                        namespace: "",
                        labels: {
                            "carrick.dev/gateway": "0",
                        },
                    },
                    spec: NodeSpec {
                        pod_cidr: "10.42.0.0/24",
                        pod_cidrs: [
                            "10.42.0.0/24",
                        ],
                    },
                    status: NodeStatus {
                        addresses: [
                            NodeAddress {
                                kind: "InternalIP",
                                address: "192.0.2.1",
                            },
                        ],
                    },
                },
            )"#]]
        .assert_eq(&format!("{node:#?}"));
    }

    #[test]
    fn of_a_network_s_objects_names_and_ranges_are_kept() {
        let metadata = json!({
            "name": "n1", "uid": "u", "resourceVersion": "7", "labels": {"a": "b"},
            "managedFields": [{"manager": "cilium-operator", "fieldsV1": {}}],
        });
        let node = json!({
            "apiVersion": "cilium.io/v2", "kind": "CiliumNode", "metadata": metadata,
            "spec": {
                "addresses": [{"ip": "192.0.2.1", "type": "InternalIP"}], "encryption": {}, "health": {"ipv4": "10.0.0.9"},
                "ipam": {
                    "podCIDRs": ["10.0.1.0/24"],
                    "pools": {"allocated": [{"pool": "default", "cidrs": ["10.9.0.0/27"]}], "requested": [{"pool": "default"}]},
                },
            },
            "status": {"ipam": {"used": {"10.0.1.7": {"owner": "default/a"}}}, "eni": {}},
        });
        let read = serde_json::from_value::<DeserializeGuard<Object<CiliumNodeSpec, NotUsed>>>(node).unwrap();
        let kept = serde_json::to_value(opened(read).unwrap()).unwrap();
        let name = json!({"name": "n1", "namespace": "", "labels": {}});
        let ipam = json!({"podCIDRs": ["10.0.1.0/24"], "pools": {"allocated": [{"cidrs": ["10.9.0.0/27"]}]}});
        assert_eq!(kept, json!({"metadata": name, "spec": {"ipam": ipam}}));

        let services = json!({
            "apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR", "metadata": metadata,
            "spec": {"cidrs": ["10.96.0.0/16"]}, "status": {"conditions": [{"type": "Ready", "status": "True"}]},
        });
        let read = serde_json::from_value::<DeserializeGuard<Object<ServiceCidrSpec, NotUsed>>>(services).unwrap();
        let kept = serde_json::to_value(opened(read).unwrap()).unwrap();
        assert_eq!(kept, json!({"metadata": name, "spec": {"cidrs": ["10.96.0.0/16"]}}));
    }

    #[test]
    fn of_our_kinds_spec_and_status_are_kept_and_what_names_the_object() {
        let cluster = json!({
            "apiVersion": "carrick.dev/v1alpha1", "kind": "MeshCluster",
            "metadata": {
                "name": "mn", "uid": "u", "generation": 3, "resourceVersion": "7", "labels": {"a": "b"},
                "managedFields": [{"manager": "kubectl", "fieldsV1": {}}],
            },
            "spec": {"id": 1, "allowedCIDRs": ["10.42.0.0/16"]},
            "status": {"conditions": [], "observedGeneration": 2},
        });
        let read = serde_json::from_value::<DeserializeGuard<MeshCluster>>(cluster).unwrap();
        let kept = serde_json::to_value(opened(read).unwrap()).unwrap();
        let expected = json!({
            "apiVersion": "carrick.dev/v1alpha1", "kind": "MeshCluster",
            "metadata": {"name": "mn", "uid": "u", "generation": 3},
            "spec": {"id": 1, "allowedCIDRs": ["10.42.0.0/16"]},
            "status": {"observedGeneration": 2},
        });
        assert_eq!(kept, expected);
    }

    #[test]
    fn a_bad_object_has_its_name_and_tells_no_secret() {
        let bad = json!({"metadata": {"name": "mn"}, "spec": {"id": "wOEI9rqqbDwnN8/Bpp22sVz48T71vJ4fYmFewulwWUU="}});
        let read = serde_json::from_value::<DeserializeGuard<MeshCluster>>(bad).unwrap();
        assert_eq!(read.meta().name.as_deref(), Some("mn"));
        let error = opened(read).unwrap_err();
        assert_eq!(error, "Invalid type string \"…\". Expected i64");
    }
}
