//! From a manifest's text to objects: [`parse`], pure.
//!
//! Invariant: all or nothing. A file of which one document is bad yields no object, because half a file may mean
//! something else than the whole.

use kube::ResourceExt;
use serde::de::DeserializeOwned;

use super::{
    strict,
    yaml::{self, Flaw, Node, Value, document_at, shown},
};
use crate::api::{
    EgressPolicy, MeshCluster, MeshGateway, RouteAdvertisement,
    network::{BlockAffinity, CiliumNode, IpPool, ServiceCidr},
    v1,
};

/// The kinds that are read, and the apiVersion that each document of them has.
const KINDS: [(&str, &str); 10] = [
    ("MeshCluster", "carrick.dev/v1alpha1"),
    ("RouteAdvertisement", "carrick.dev/v1alpha1"),
    ("EgressPolicy", "carrick.dev/v1alpha1"),
    ("MeshGateway", "carrick.dev/v1alpha1"),
    ("Node", "v1"),
    ("Pod", "v1"),
    ("ServiceCIDR", "networking.k8s.io/v1"),
    ("CiliumNode", "cilium.io/v2"),
    ("BlockAffinity", "crd.projectcalico.org/v1"),
    ("IPPool", "crd.projectcalico.org/v1"),
];

/// Kinds of Kubernetes that a member's own folder will hold.
const FORESEEN: [&str; 2] = ["Service", "EndpointSlice"];

/// Flaws reported of one file; one broken template must not fill a log.
const MAX_FLAWS: usize = 20;

/// One object of a file.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Item {
    /// Where it begins, from 1.
    pub(super) line: usize,
    pub(super) object: Object,
}

#[derive(Clone, Debug, PartialEq)]
pub(super) enum Object {
    Cluster(MeshCluster),
    Advertisement(RouteAdvertisement),
    Policy(EgressPolicy),
    Gateway(MeshGateway),
    Node(v1::Node),
    Pod(v1::Pod),
    ServiceCidr(ServiceCidr),
    CiliumNode(CiliumNode),
    BlockAffinity(BlockAffinity),
    IpPool(IpPool),
}

impl Object {
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Object::Cluster(_) => "MeshCluster",
            Object::Advertisement(_) => "RouteAdvertisement",
            Object::Policy(_) => "EgressPolicy",
            Object::Gateway(_) => "MeshGateway",
            Object::Node(_) => "Node",
            Object::Pod(_) => "Pod",
            Object::ServiceCidr(_) => "ServiceCIDR",
            Object::CiliumNode(_) => "CiliumNode",
            Object::BlockAffinity(_) => "BlockAffinity",
            Object::IpPool(_) => "IPPool",
        }
    }

    /// With the namespace, where the kind has one.
    pub(super) fn name(&self) -> String {
        match self {
            Object::Cluster(object) => object.name_any(),
            Object::Advertisement(object) => object.name_any(),
            Object::Policy(object) => object.name_any(),
            Object::Gateway(object) => object.name_any(),
            Object::Node(object) => object.metadata.name.clone(),
            Object::Pod(object) => object.full_name(),
            Object::ServiceCidr(object) => object.metadata.name.clone(),
            Object::CiliumNode(object) => object.metadata.name.clone(),
            Object::BlockAffinity(object) => object.metadata.name.clone(),
            Object::IpPool(object) => object.metadata.name.clone(),
        }
    }
}

/// What is wrong with a file: line and document, from 1, and the message.
pub(super) type Located = (Option<usize>, Option<usize>, String);

/// Reads a whole file, in its order. The text may hold any number of documents, and `v1` Lists of objects.
pub(super) fn parse(bytes: &[u8]) -> Result<Vec<Item>, Vec<Located>> {
    let text = match str::from_utf8(bytes) {
        Ok(text) => text,
        Err(error) => {
            let line = 1 + bytes[..error.valid_up_to()].iter().filter(|byte| **byte == b'\n').count();
            return Err(vec![(Some(line), None, "is not UTF-8: save it in that encoding".to_owned())]);
        }
    };
    if text.is_empty() {
        let message = "has no bytes, as if it were half written; to say nothing, delete it or leave a comment in it";
        return Err(vec![(None, None, message.to_owned())]);
    }
    let located = |flaw: Flaw| (flaw.line, flaw.line.map(|line| document_at(text, line)), flaw.message);
    let documents = yaml::documents(text).map_err(|flaw| vec![located(flaw)])?;

    let (mut items, mut flaws) = (Vec::new(), Vec::new());
    for node in documents.iter().flat_map(unlisted) {
        match read(node) {
            Ok(object) => items.push(Item { line: node.line, object }),
            Err(more) => flaws.extend(more),
        }
    }
    if flaws.is_empty() {
        return Ok(items);
    }
    flaws.sort_by_key(|flaw| flaw.line);
    let more = flaws.len().saturating_sub(MAX_FLAWS);
    let mut flaws: Vec<_> = flaws.into_iter().take(MAX_FLAWS).map(located).collect();
    if more > 0 {
        flaws.push((None, None, format!("and {more} more errors")));
    }
    Err(flaws)
}

/// The kind and name of each object of a manifest, in its order; `None` if it cannot be read.
pub fn named(bytes: &[u8]) -> Option<Vec<(&'static str, String)>> {
    let items = parse(bytes).ok()?;
    Some(items.iter().map(|Item { object, .. }| (object.kind(), object.name())).collect())
}

/// The items of a `v1` List; anything else is itself.
fn unlisted(node: &Node) -> Vec<&Node> {
    match (text(node, "apiVersion"), text(node, "kind"), node.value.get("items").map(|items| &items.value)) {
        (Some("v1"), Some("List"), Some(Value::List(items))) => items.iter().collect(),
        _ => vec![node],
    }
}

fn read(node: &Node) -> Result<Object, Vec<Flaw>> {
    let kind = kind(node).map_err(|flaw| vec![flaw])?;
    check_metadata(node, kind).map_err(|flaw| vec![flaw])?;
    match kind {
        "MeshCluster" => typed(node).map(Object::Cluster),
        "RouteAdvertisement" => typed(node).map(Object::Advertisement),
        "EgressPolicy" => typed(node).map(Object::Policy),
        "MeshGateway" => typed(node).map(Object::Gateway),
        "Node" => strict::part(node).map(Object::Node),
        "Pod" => strict::part(node).map(Object::Pod),
        "ServiceCIDR" => strict::part(node).map(Object::ServiceCidr),
        "CiliumNode" => strict::part(node).map(Object::CiliumNode),
        "BlockAffinity" => strict::part(node).map(Object::BlockAffinity),
        _ => strict::part(node).map(Object::IpPool),
    }
}

fn typed<T: DeserializeOwned>(node: &Node) -> Result<T, Vec<Flaw>> {
    strict::object(node, &["apiVersion", "kind"])
}

/// The document's kind, one of [`KINDS`], in the right version.
fn kind(node: &Node) -> Result<&'static str, Flaw> {
    if !matches!(node.value, Value::Map(_)) {
        return Err(Flaw::at(node.line, "is not an object: a mapping with apiVersion, kind, metadata and spec"));
    }
    let names = KINDS.map(|(name, _)| name);
    let line_of = |field| node.value.get(field).map_or(node.line, |value| value.line);
    let Some(given) = text(node, "kind") else {
        return Err(Flaw::at(line_of("kind"), format!("kind: is missing: one of {}", names.join(", "))));
    };
    if let Some((kind, wanted)) = KINDS.iter().find(|(kind, _)| *kind == given) {
        return match text(node, "apiVersion") {
            Some(version) if version == *wanted => Ok(kind),
            Some(other) => Err(Flaw::at(
                line_of("apiVersion"),
                format!("apiVersion: {kind} is of {wanted}, not of {}", shown(other)),
            )),
            None => Err(Flaw::at(line_of("apiVersion"), format!("apiVersion: is missing: {wanted}"))),
        };
    }
    let message = match strict::nearest(given, &names) {
        _ if FORESEEN.contains(&given) => format!("kind: {given} is not supported yet: take it out of the folder"),
        Some(near) => format!("kind: {} is unknown, did you mean {near:?}?", shown(given)),
        None => format!("kind: {} is none of {}: take it out of the folder", shown(given), names.join(", ")),
    };
    Err(Flaw::at(line_of("kind"), message))
}

/// Every object has a name, and every kind but Pod is cluster-scoped.
fn check_metadata(node: &Node, kind: &str) -> Result<(), Flaw> {
    let Some(metadata) = node.value.get("metadata") else {
        return Err(Flaw::at(node.line, "metadata.name: is missing"));
    };
    let given = |field| metadata.value.get(field).filter(|node| !matches!(node.value, Value::Null));
    if let Some(namespace) = given("namespace").filter(|_| kind != "Pod") {
        let message = format!("metadata.namespace: a {kind} belongs to no namespace: leave the field out");
        return Err(Flaw::at(namespace.line, message));
    }
    match given("name").map(|name| (&name.value, name.line)) {
        None => Err(Flaw::at(metadata.line, "metadata.name: is missing")),
        Some((Value::Text(name), line)) if name.is_empty() => Err(Flaw::at(line, "metadata.name: is empty")),
        Some(_) => Ok(()),
    }
}

fn text<'a>(node: &'a Node, field: &str) -> Option<&'a str> {
    match &node.value.get(field)?.value {
        Value::Text(text) => Some(text),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::fmt::Write;

    use expect_test::{Expect, expect};
    use proptest::prelude::*;

    use super::*;

    const ROUTES: &str = "apiVersion: carrick.dev/v1alpha1\nkind: RouteAdvertisement\nmetadata: {name: mn}\nspec:\n";
    const CLUSTER: &str = "apiVersion: carrick.dev/v1alpha1\nkind: MeshCluster\nmetadata: {name: mn}\nspec:\n";
    /// Looks like a key, and must never be seen in an error.
    const SECRET: &str = "wOEI9rqqbDwnN8/Bpp22sVz48T71vJ4fYmFewulwWUU=";

    /// `LINE Kind/name` of each object, or `line LINE (DOCUMENT): MESSAGE` of each flaw.
    fn rendered(bytes: &[u8]) -> String {
        let mut out = String::new();
        match parse(bytes) {
            Ok(items) => {
                for Item { line, object } in items {
                    writeln!(out, "{line} {}/{}", object.kind(), object.name()).unwrap();
                }
            }
            Err(flaws) => {
                for (line, document, message) in flaws {
                    let number = |n: Option<usize>| n.map_or("-".to_owned(), |n| n.to_string());
                    writeln!(out, "line {} ({}): {message}", number(line), number(document)).unwrap();
                }
            }
        }
        out
    }

    fn check(text: &str, expected: Expect) {
        let out = rendered(text.as_bytes());
        assert!(!out.contains(SECRET), "a secret is shown: {out}");
        expected.assert_eq(&out);
    }

    /// Texts that are refused with one flaw each.
    fn check_each(texts: &[String], expected: Expect) {
        let out: Vec<_> = texts.iter().map(|text| rendered(text.as_bytes())).collect();
        assert!(!out.concat().contains(SECRET), "a secret is shown: {out:?}");
        assert!(out.iter().all(|out| out.lines().count() == 1), "not one flaw: {out:?}");
        expected.assert_eq(&out.concat());
    }

    #[test]
    fn every_kind() {
        check(
            &format!(
                "# the mesh\n---\n{CLUSTER}  id: 1\n---\n---\n{ROUTES}  cluster: mn\n  routes: []\n---\n\
                 apiVersion: carrick.dev/v1alpha1\nkind: EgressPolicy\nmetadata: {{name: none}}\nspec: {{members: [mn]}}\n\
                 ---\n# nothing\n"
            ),
            expect![[r#"
                3 MeshCluster/mn
                10 RouteAdvertisement/mn
                17 EgressPolicy/none
            "#]],
        );
    }

    #[test]
    fn nothing_at_all_is_fine_but_no_bytes_are_not() {
        for text in ["\n", "---\n", "# nothing\n", "---\n---\n...\n", "null\n"] {
            assert_eq!(rendered(text.as_bytes()), "", "{text:?}");
        }
        check(
            "",
            expect![[r#"
            line - (-): has no bytes, as if it were half written; to say nothing, delete it or leave a comment in it
        "#]],
        );
    }

    #[test]
    fn json_and_lists() {
        check(
            "{\n\t\"apiVersion\": \"v1\", \"kind\": \"List\", \"items\": [\n\t\t{\"apiVersion\": \"carrick.dev/v1alpha1\",\n\
             \"kind\": \"MeshCluster\", \"metadata\": {\"name\": \"mn\"}, \"spec\": {\"id\": 1}},\n\
             {\"apiVersion\": \"carrick.dev/v1alpha1\", \"kind\": \"MeshCluster\", \"metadata\": {\"name\": \"va\"}, \"spec\": {\"id\": 2}}\n]}",
            expect![[r#"
                3 MeshCluster/mn
                5 MeshCluster/va
            "#]],
        );
    }

    /// `kubectl get nodes,pods -o yaml`, shortened where it only repeats itself.
    const KUBECTL: &str = r#"apiVersion: v1
items:
- apiVersion: v1
  kind: Node
  metadata:
    annotations:
      flannel.alpha.coreos.com/backend-data: '{"VNI":1,"VtepMAC":"fe:2a:84:03:28:b2"}'
      volumes.kubernetes.io/controller-managed-attach-detach: "true"
    creationTimestamp: "2026-01-02T03:04:05Z"
    finalizers:
    - wrangler.cattle.io/node
    labels:
      kubernetes.io/hostname: n1
    name: n1
    resourceVersion: "1311"
    uid: 8a4e0b4b-3d2c-4c59-8f37-6d1c2c2f6f0c
  spec:
    podCIDR: 10.42.0.0/24
    podCIDRs:
    - 10.42.0.0/24
    providerID: k3s://n1
    taints:
    - effect: NoSchedule
      key: node.kubernetes.io/unreachable
      timeAdded: "2026-01-02T03:04:06Z"
  status:
    addresses:
    - address: 192.0.2.1
      type: InternalIP
    - address: n1
      type: Hostname
    allocatable:
      cpu: "2"
      memory: 4025780Ki
    conditions:
    - lastHeartbeatTime: "2026-01-02T03:09:05Z"
      message: kubelet is posting ready status
      status: "True"
      type: Ready
    daemonEndpoints:
      kubeletEndpoint:
        Port: 10250
    images:
    - names:
      - docker.io/rancher/klipper-lb@sha256:0000
      sizeBytes: 4990278
    nodeInfo:
      bootID: 0e0b1b5e-0000-0000-0000-000000000000
      swap: {capacity: 0}
- apiVersion: v1
  kind: Pod
  metadata:
    name: coredns-5688667fd4-abcde
    namespace: kube-system
    ownerReferences:
    - {apiVersion: apps/v1, blockOwnerDeletion: true, controller: true, kind: ReplicaSet, name: coredns, uid: a}
  spec:
    containers:
    - args: [-conf, /etc/coredns/Corefile]
      image: coredns
      livenessProbe: {httpGet: {path: /health, port: 8080}, periodSeconds: 10}
      name: coredns
      env:
      - {name: EMPTY}
      - name: KEY
        value: null
    hostNetwork: null
    nodeName: n1
    tolerations:
    - {key: CriticalAddonsOnly, operator: Exists}
  status:
    phase: Running
    podIP: 10.42.0.3
    podIPs:
    - ip: 10.42.0.3
    qosClass: Burstable
kind: List
metadata:
  resourceVersion: ""
"#;

    /// `kubectl get servicecidrs,ciliumnodes,blockaffinities,ippools -o yaml`, shortened where it only repeats itself.
    const NETWORK: &str = r#"apiVersion: v1
items:
- apiVersion: networking.k8s.io/v1
  kind: ServiceCIDR
  metadata:
    creationTimestamp: "2026-01-02T03:04:05Z"
    finalizers: [networking.k8s.io/service-cidr-finalizer]
    name: kubernetes
  spec:
    cidrs:
    - 10.96.0.0/12
  status:
    conditions:
    - {type: Ready, status: "True", message: Kubernetes Service CIDR is ready, reason: ""}
- apiVersion: cilium.io/v2
  kind: CiliumNode
  metadata:
    labels: {kubernetes.io/hostname: n1}
    name: n1
    ownerReferences: [{apiVersion: v1, kind: Node, name: n1, uid: 00000000-0000-0000-0000-000000000000}]
  spec:
    addresses: [{ip: 192.0.2.1, type: InternalIP}, {ip: 10.0.1.214, type: CiliumInternalIP}]
    alibaba-cloud: {}
    azure: {}
    bootid: 00000000-0000-0000-0000-000000000000
    encryption: {}
    eni: {}
    health: {ipv4: 10.0.1.89}
    ipam:
      podCIDRs: [10.0.1.0/24]
      pools: {allocated: null}
  status:
    ipam: {operator-status: {}}
- apiVersion: crd.projectcalico.org/v1
  kind: BlockAffinity
  metadata:
    annotations: {projectcalico.org/metadata: '{"creationTimestamp":null}'}
    name: n1-10-42-0-64-26
  spec:
    cidr: 10.42.0.64/26
    deleted: "false"
    node: n1
    state: confirmed
- apiVersion: crd.projectcalico.org/v1
  kind: IPPool
  metadata: {name: default-ipv4-ippool}
  spec:
    allowedUses: [Workload, Tunnel]
    blockSize: 26
    cidr: 10.42.0.0/16
    ipipMode: Always
    natOutgoing: true
    nodeSelector: all()
    vxlanMode: Never
kind: List
"#;

    #[test]
    fn a_network_s_objects_as_kubectl_prints_them() {
        check(
            NETWORK,
            expect![[r#"
                3 ServiceCIDR/kubernetes
                15 CiliumNode/n1
                34 BlockAffinity/n1-10-42-0-64-26
                44 IPPool/default-ipv4-ippool
            "#]],
        );
        let objects: Vec<_> = parse(NETWORK.as_bytes()).unwrap().into_iter().map(|item| item.object).collect();
        let [
            Object::ServiceCidr(services),
            Object::CiliumNode(node),
            Object::BlockAffinity(block),
            Object::IpPool(pool),
        ] = &objects[..]
        else {
            panic!("{objects:?}")
        };
        assert_eq!(services.spec.cidrs, ["10.96.0.0/12"]);
        assert_eq!(
            (&*node.spec.ipam.pod_cidrs, node.spec.ipam.pools.allocated.len()),
            (&["10.0.1.0/24".to_owned()][..], 0)
        );
        let spec = &block.spec;
        assert_eq!([&spec.cidr, &spec.node, &spec.state, &spec.deleted], ["10.42.0.64/26", "n1", "confirmed", "false"]);
        assert_eq!((&*pool.spec.cidr, pool.spec.disabled), ("10.42.0.0/16", false));
        check(
            "apiVersion: projectcalico.org/v3\nkind: IPPool\nmetadata: {name: p}\n",
            expect![[r#"
                line 1 (1): apiVersion: IPPool is of crd.projectcalico.org/v1, not of "projectcalico.org/v3"
            "#]],
        );
    }

    #[test]
    fn nodes_and_pods_as_kubectl_prints_them() {
        check(
            KUBECTL,
            expect![[r#"
            3 Node/n1
            50 Pod/kube-system/coredns-5688667fd4-abcde
        "#]],
        );
        let items = parse(KUBECTL.as_bytes()).unwrap();
        expect![[r#"
            [
                Node(
                    Node {
                        metadata: Metadata {
                            name: "n1",
                            namespace: "",
                            labels: {
                                "kubernetes.io/hostname": "n1",
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
                                NodeAddress {
                                    kind: "Hostname",
                                    address: "n1",
                                },
                            ],
                        },
                    },
                ),
                Pod(
                    Pod {
                        metadata: Metadata {
                            name: "coredns-5688667fd4-abcde",
                            namespace: "kube-system",
                            labels: {},
                        },
                        spec: PodSpec {
                            node_name: "n1",
                            host_network: false,
                        },
                        status: PodStatus {
                            phase: "Running",
                            pod_ip: "10.42.0.3",
                            pod_ips: [
                                PodIp {
                                    ip: "10.42.0.3",
                                },
                            ],
                        },
                    },
                ),
            ]"#]]
        .assert_eq(&format!("{:#?}", items.iter().map(|item| &item.object).collect::<Vec<_>>()));
    }

    /// The fields that are read are read as strictly as others.
    #[test]
    fn nodes_and_pods_that_are_none() {
        let pod = |rest: &str| format!("{{apiVersion: v1, kind: Pod, metadata: {{name: a}}, {rest}}}");
        let bad = [
            "{apiVersion: v1, kind: Node, metadata: {name: a, namespace: b}}".to_owned(),
            "{apiVersion: carrick.dev/v1alpha1, kind: Node, metadata: {name: a}}".to_owned(),
            "{apiVersion: v1, kind: MeshGateway, metadata: {name: '0'}}".to_owned(),
            "{kind: Pod, metadata: {name: a}}".to_owned(),
            "{apiVersion: v1, kind: Pod, metadata: {}}".to_owned(),
            "{apiVersion: v1, kind: Node, metadata: {name: a}, spec: {podCIDRs: 10.0.0.0/24}}".to_owned(),
            pod("spec: {nodeName: 7}"),
            pod("spec: {hostNetwork: 'yes'}"),
            pod("status: {podIPs: [10.0.0.1]}"),
        ];
        check_each(
            &bad,
            expect![[r#"
            line 1 (1): metadata.namespace: a Node belongs to no namespace: leave the field out
            line 1 (1): apiVersion: Node is of v1, not of "carrick.dev/v1alpha1"
            line 1 (1): apiVersion: MeshGateway is of carrick.dev/v1alpha1, not of "v1"
            line 1 (1): apiVersion: is missing: v1
            line 1 (1): metadata.name: is missing
            line 1 (1): spec.podCIDRs: is a text, must be a list
            line 1 (1): spec.nodeName: is the number 7, must be a text: put it in quotes
            line 1 (1): spec.hostNetwork: is a text, must be a boolean
            line 1 (1): status.podIPs[0]: is a text, must be a mapping
        "#]],
        );
    }

    #[test]
    fn what_kubectl_leaves_in_a_manifest_is_read() {
        check(
            "apiVersion: carrick.dev/v1alpha1\nkind: MeshCluster\nmetadata:\n  name: mn\n  creationTimestamp: null\n  \
             labels: {app.kubernetes.io/part-of: mesh, anything: goes}\n  annotations: {a/b: 'c'}\n  \
             creationTimestamp2: null\nspec: {id: 1}\nstatus: {}\n",
            expect![[r#"
                line 8 (1): metadata.creationTimestamp2: there is no such field, did you mean "creationTimestamp"?
            "#]],
        );
        check(
            "apiVersion: carrick.dev/v1alpha1\nkind: MeshCluster\nmetadata:\n  name: mn\n  \
             creationTimestamp: '2026-01-02T03:04:05Z'\n  managedFields:\n  - {manager: kubectl, operation: Apply, \
             fieldsV1: {'f:spec': {'f:id': {}}}}\nspec: {id: 1}\n",
            expect![[r#"
                1 MeshCluster/mn
            "#]],
        );
    }

    #[test]
    fn unknown_fields() {
        check(
            &format!("{CLUSTER}  id: 1\n  allowedCidrs: []\n  gatways: []\n  weight: 3\n"),
            expect![[r#"
                line 6 (1): spec.allowedCidrs: there is no such field, did you mean "allowedCIDRs"?
                line 7 (1): spec.gatways: there is no such field, did you mean "gateways"?
                line 8 (1): spec.weight: there is no such field; there are: id, gateways, allowedCIDRs, persistentKeepaliveSeconds, dnsAliases, via
            "#]],
        );
        check(
            &format!(
                "{CLUSTER}  id: 1\n  gateways:\n  - {{ordinal: 0, publicKey: x, endpoint: y}}\n  - ordinal: 1\n    publickey: x\n"
            ),
            expect![[r#"
                line 7 (1): spec.gateways[0].endpoint: there is no such field, did you mean "endpoints"?
                line 8 (1): spec.gateways[1]: the field "publicKey" is missing
                line 9 (1): spec.gateways[1].publickey: there is no such field, did you mean "publicKey"?
            "#]],
        );
        check(
            &format!("metadaat: 1\n{CLUSTER}  id: 1\n"),
            expect![[r#"
            line 1 (1): metadaat: there is no such field, did you mean "metadata"?
        "#]],
        );
        check(
            &format!("{CLUSTER}  id: 1\n  privateKey: {SECRET}\n  {SECRET}: 1\n"),
            expect![[r#"
            line 6 (1): spec.privateKey: secrets do not belong in this folder but in the keys' directory; take this one for known to others and make a new one
            line 7 (1): spec.(not shown): there is no such field; there are: id, gateways, allowedCIDRs, persistentKeepaliveSeconds, dnsAliases, via
        "#]],
        );
    }

    #[test]
    fn values_of_the_wrong_type() {
        let texts = [
            format!("{CLUSTER}  id: one\n"),
            format!("{CLUSTER}  id: {SECRET}\n"),
            format!("{CLUSTER}  id: 1.5\n"),
            format!("{CLUSTER}  id: 010\n"),
            format!("{CLUSTER}  id: 99999999999999999999\n"),
            format!("{CLUSTER}  id: 1\n  via: hub\n"),
            format!("{CLUSTER}  id: 1\n  via:\n"),
            format!("{CLUSTER}  id: 1\n  via: [no]\n"),
            format!("{CLUSTER}  id: 1\n  via: [1]\n"),
            format!("{CLUSTER}  - {SECRET}\n"),
            format!("{ROUTES}  cluster: mn\n"),
            format!("{ROUTES}  cluster: mn\n  routes:\n  - {{type: Pod}}\n"),
            CLUSTER.replace("spec:", ""),
        ];
        check_each(
            &texts,
            expect![[r#"
            line 5 (1): spec.id: is a text, must be a whole number
            line 5 (1): spec.id: is a text, must be a whole number
            line 5 (1): spec.id: is a number that is not whole or too large, must be a whole number
            line 5 (1): spec.id: is a text, must be a whole number
            line 5 (1): spec.id: is a number that is not whole or too large, must be a whole number
            line 6 (1): spec.via: is a text, must be a list
            line 6 (1): spec.via: is without a value, must be a list: give it one or leave the field out
            line 6 (1): spec.via[0]: is the boolean false, must be a text: put it in quotes
            line 6 (1): spec.via[0]: is the number 1, must be a text: put it in quotes
            line 5 (1): spec: is a list, must be a mapping
            line 5 (1): spec: the field "routes" is missing
            line 7 (1): spec.routes[0]: the field "cidr" is missing
            line 1 (1): the field "spec" is missing
        "#]],
        );
    }

    #[test]
    fn what_a_document_is() {
        let texts = [
            SECRET.to_owned(),
            "- a\n".to_owned(),
            "{}\n".to_owned(),
            "kind: MeshCluster\n".to_owned(),
            "kind: MeshCluster\napiVersion: carrick.dev/v1\n".to_owned(),
            "kind: MeshClutser\napiVersion: carrick.dev/v1alpha1\n".to_owned(),
            "kind: Deployment\napiVersion: apps/v1\n".to_owned(),
            format!("kind: {SECRET}\n"),
            "{apiVersion: v1, kind: Service, metadata: {name: a}}".to_owned(),
            "{apiVersion: carrick.dev/v1alpha1, kind: MeshCluster}".to_owned(),
            "{apiVersion: carrick.dev/v1alpha1, kind: MeshCluster, name: a, metadata: {}}".to_owned(),
            "{apiVersion: carrick.dev/v1alpha1, kind: MeshCluster, metadata: {name: ''}}".to_owned(),
            CLUSTER.replace("{name: mn}", "\n  name: mn\n  namespace: kube-system"),
        ];
        check_each(
            &texts,
            expect![[r#"
                line 1 (1): is not an object: a mapping with apiVersion, kind, metadata and spec
                line 1 (1): is not an object: a mapping with apiVersion, kind, metadata and spec
                line 1 (1): kind: is missing: one of MeshCluster, RouteAdvertisement, EgressPolicy, MeshGateway, Node, Pod, ServiceCIDR, CiliumNode, BlockAffinity, IPPool
                line 1 (1): apiVersion: is missing: carrick.dev/v1alpha1
                line 2 (1): apiVersion: MeshCluster is of carrick.dev/v1alpha1, not of "carrick.dev/v1"
                line 1 (1): kind: "MeshClutser" is unknown, did you mean "MeshCluster"?
                line 1 (1): kind: "Deployment" is none of MeshCluster, RouteAdvertisement, EgressPolicy, MeshGateway, Node, Pod, ServiceCIDR, CiliumNode, BlockAffinity, IPPool: take it out of the folder
                line 1 (1): kind: (not shown) is none of MeshCluster, RouteAdvertisement, EgressPolicy, MeshGateway, Node, Pod, ServiceCIDR, CiliumNode, BlockAffinity, IPPool: take it out of the folder
                line 1 (1): kind: Service is not supported yet: take it out of the folder
                line 1 (1): metadata.name: is missing
                line 1 (1): metadata.name: is missing
                line 1 (1): metadata.name: is empty
                line 5 (1): metadata.namespace: a MeshCluster belongs to no namespace: leave the field out
            "#]],
        );
    }

    #[test]
    fn one_bad_document_spoils_the_file_and_every_flaw_is_told() {
        check(
            &format!("{CLUSTER}  id: 1\n---\n{CLUSTER}  id: x\n---\n{CLUSTER}  ib: x\n"),
            expect![[r#"
            line 11 (2): spec.id: is a text, must be a whole number
            line 17 (3): spec.ib: there is no such field; there are: id, gateways, allowedCIDRs, persistentKeepaliveSeconds, dnsAliases, via
            line 17 (3): spec: the field "id" is missing
        "#]],
        );
        check(
            &format!("{CLUSTER}  id: 1\n{}", "  x: 1\n  y: 2\n  z: 3\n"),
            expect![[r#"
            line 6 (1): spec.x: there is no such field; there are: id, gateways, allowedCIDRs, persistentKeepaliveSeconds, dnsAliases, via
            line 7 (1): spec.y: there is no such field; there are: id, gateways, allowedCIDRs, persistentKeepaliveSeconds, dnsAliases, via
            line 8 (1): spec.z: there is no such field; there are: id, gateways, allowedCIDRs, persistentKeepaliveSeconds, dnsAliases, via
        "#]],
        );
        let many: String = (0..50).map(|n| format!("  field{n}: 1\n")).collect();
        assert!(rendered(format!("{CLUSTER}{many}").as_bytes()).ends_with("line - (-): and 31 more errors\n"));
    }

    #[test]
    fn what_is_not_yaml() {
        let texts = [
            format!("{CLUSTER}  id: 1\n---\n{CLUSTER}  id: [1\n"),
            format!("{CLUSTER}  id: 1\n  id: 2\n"),
            format!("{CLUSTER}\tid: 1\n"),
            format!("{CLUSTER}  id: *nowhere\n"),
            format!("{CLUSTER}  id: &a [*a]\n"),
            format!("{CLUSTER}  id: !!js {SECRET}\n"),
            format!("{CLUSTER}  id: .nan\n"),
            format!("{CLUSTER}  {SECRET}: 1\n  {SECRET}: 2\n"),
            format!("{CLUSTER}  id: \"{SECRET}\n"),
            "[".repeat(100_000),
            format!("{CLUSTER}{}", "- ".repeat(1000)),
        ];
        check_each(
            &texts,
            expect![[r#"
            line 11 (2): is not YAML: unclosed bracket '['
            line 6 (1): the field "id" is given twice: keep one
            line 5 (1): is not YAML: tabs disallowed within this context (block indentation)
            line 5 (1): an alias (*name) stands for an anchor (&name) that is not there
            line 5 (1): an alias (*name) contains itself
            line 5 (1): tags (!name) of one's own mean nothing here: leave the tag out
            line 5 (1): a number is not finite
            line 6 (1): the field (not shown) is given twice: keep one
            line 6 (1): is not YAML: invalid indentation in multiline quoted scalar
            line 1 (1): is not YAML: recursion limit exceeded
            line 5 (1): is nested too deeply
        "#]],
        );
    }

    #[test]
    fn anchors_are_read_and_bombs_are_not() {
        check(
            &format!("{CLUSTER}  id: 1\n  via: &hubs [hub]\n  dnsAliases: *hubs\n"),
            expect![[r#"
            1 MeshCluster/mn
        "#]],
        );
        let mut bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n".to_owned();
        for n in 1..10 {
            let aliases = vec![format!("*a{}", n - 1); 9].join(", ");
            writeln!(bomb, "a{n}: &a{n} [{aliases}]").unwrap();
        }
        check(
            &bomb,
            expect![[r#"
            line 5 (1): has too many values, anchors or aliases: split it
        "#]],
        );
        check(
            &"- a\n".repeat(250_000),
            expect![[r#"
            line 200000 (1): has too many values, anchors or aliases: split it
        "#]],
        );
        check(
            &"---\n".repeat(20_000),
            expect![[r#"
            line 10001 (10001): has too many documents: split it
        "#]],
        );
    }

    #[test]
    fn bytes_that_are_no_text() {
        let mut bytes = format!("{CLUSTER}  id: 1\n  # ").into_bytes();
        bytes.push(0xff);
        expect![[r#"
            line 6 (-): is not UTF-8: save it in that encoding
        "#]]
        .assert_eq(&rendered(&bytes));
        let utf16: Vec<u8> = CLUSTER.encode_utf16().flat_map(u16::to_le_bytes).collect();
        expect![[r#"
            line 1 (1): is not YAML: unexpected character: `\u{0}'
        "#]]
        .assert_eq(&rendered(&utf16));
        expect![[r#"
            1 MeshCluster/mn
        "#]]
        .assert_eq(&rendered(format!("\u{feff}{CLUSTER}  id: 1\r\n").as_bytes()));
        expect![[r#"
            line 1 (1): is not YAML: unexpected character: `\u{0}'
        "#]]
        .assert_eq(&rendered(b"a\0b"));
    }

    /// A manifest, cut and mended at random.
    fn mangled() -> impl Strategy<Value = Vec<u8>> {
        let whole = format!(
            "{CLUSTER}  id: &a 1\n  gateways:\n  - {{ordinal: 0, publicKey: {SECRET}, endpoints: ['a:1']}}\n---\n\
             {ROUTES}  cluster: |\n    mn\n  to: [*a, !!str x]\n  routes: [{{cidr: 10.0.0.0/8, type: Pod}}]\n"
        );
        let length = whole.len();
        let piece =
            prop_oneof![any::<Vec<u8>>(), "[-\\[\\]{}:,&*!|>'\"#%@ \n\tab0~?.]{0,12}".prop_map(String::into_bytes)];
        (0..length, 0..length, piece).prop_map(move |(from, to, piece)| {
            let bytes = whole.as_bytes();
            [&bytes[..from.min(to)], &piece, &bytes[from.max(to)..]].concat()
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn any_bytes_give_objects_or_errors(bytes in any::<Vec<u8>>(), text in "\\PC{0,200}", mangled in mangled()) {
            for bytes in [&bytes, text.as_bytes(), &mangled] {
                let lines = 1 + bytes.iter().filter(|byte| **byte == b'\n').count();
                match parse(bytes) {
                    Ok(items) => prop_assert!(items.iter().all(|item| (1..=lines).contains(&item.line))),
                    Err(flaws) => {
                        prop_assert!(!flaws.is_empty());
                        for (line, _, message) in flaws {
                            prop_assert!(!message.contains(SECRET), "{}", message);
                            prop_assert!(line.is_none_or(|line| (1..=lines + 1).contains(&line)), "{:?}", line);
                        }
                    }
                }
            }
        }
    }
}
