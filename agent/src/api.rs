//! The objects that users write: `carrick.dev/v1alpha1`, and in [`v1`] those of Kubernetes that are read beside them. The
//! only serde types that face users.
//!
//! Fields are strings, numbers and optional only: [`crate::intent`] parses them, so that one bad value cannot make a
//! whole list fail to deserialize. What the API server can check of one object on its own is in the schema; what needs
//! a second object, or cryptography, only `intent` can check. Doc comments of types and fields are the user's manual:
//! `kubectl explain` prints them.
// KubeSchema copies each type into the body of a function, and clippy takes the parts of two printer columns for one.
#![allow(unreachable_pub, clippy::duplicated_attributes)]

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, LabelSelector};
use kube::{CustomResource, KubeSchema, core::Rule};
use serde::{Deserialize, Serialize};

pub mod network;
mod objects;
pub mod v1;

pub use self::objects::Objects;

/// The limits that the schema and [`crate::intent`] share.
pub mod limits {
    /// Entries in `gateways`: one per slot.
    pub const GATEWAYS: usize = ebpf::SLOTS as usize;
    /// Entries in a gateway's `endpoints`.
    pub const ENDPOINTS: usize = 8;
    /// Entries in `allowedCIDRs`.
    pub const ALLOWED_CIDRS: usize = 64;
    /// RouteAdvertisements of a member. Quotas cannot count them, as they belong to no namespace: their names do.
    pub const ADVERTISEMENTS: usize = 64;
    /// Entries in a RouteAdvertisement's `routes`.
    pub const ROUTES: usize = 64;
    /// Entries in a RouteAdvertisement's `to`.
    pub const TO: usize = 1024;
    /// The longest text of an address range: eight groups of four digits, seven colons and `/128`.
    pub const CIDR_CHARS: usize = 43;
    /// Seven devices more answer above an endpoint's port.
    pub const MAX_ENDPOINT_PORT: u16 = u16::MAX - (ebpf::SLOTS as u16 - 1);
    /// Bits: an IPv4 range is at most this wide.
    pub const WIDEST_V4: u8 = 8;
    /// Bits: an IPv6 range is at most this wide.
    pub const WIDEST_V6: u8 = 32;
}

/// What a DNS label is (RFC 1123), as a pattern.
const LABEL: &str = "^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$";
/// Base64 of 32 bytes: the last character before the padding carries four bits.
const KEY: &str = "^[A-Za-z0-9+/]{42}[AEIMQUYcgkosw048]=$";
const ENDPOINT: &str = r"^(\[[0-9a-fA-F:.]+\]|[a-zA-Z0-9]([-a-zA-Z0-9.]*[a-zA-Z0-9.])?):[0-9]{1,5}$";
const NAME_IS_A_LABEL: &str = "self.metadata.name.matches('^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$')";

/// The rules for address ranges, about a list of them that `list` names in CEL. `isCIDR` itself accepts /0, host bits
/// and any address.
fn ranges_are_canonical(list: &str) -> Rule {
    Rule::new(format!("{list}.all(c, isCIDR(c) && cidr(c) == cidr(c).masked())"))
        .message("must be an address range without host bits, such as 10.42.0.0/16 or fd00:42::/48")
}

fn ranges_are_narrow(list: &str) -> Rule {
    let (v4, v6) = (limits::WIDEST_V4, limits::WIDEST_V6);
    let narrow = format!("cidr(c).prefixLength() >= (cidr(c).ip().family() == 4 ? {v4} : {v6})");
    Rule::new(format!("{list}.all(c, !isCIDR(c) || {narrow})"))
        .message(format!("must not be wider than /{v4} (IPv4) or /{v6} (IPv6)").as_str())
}

fn ranges_are_unicast(list: &str) -> Rule {
    let special = "['0.0.0.0/8', '127.0.0.0/8', '169.254.0.0/16', '224.0.0.0/4', '255.255.255.255/32', \
                   '::/128', '::1/128', 'fe80::/10', 'ff00::/8']";
    let touches = "cidr(s).containsCIDR(c) || cidr(c).containsCIDR(s)";
    Rule::new(format!("{list}.all(c, !isCIDR(c) || !{special}.exists(s, {touches}))"))
        .message("must hold no unspecified, loopback, link-local, multicast or broadcast address")
}

/// All names that a member's advertisements may have begin with its own: nobody takes another's.
fn advertisements_are_few() -> Rule {
    let last = limits::ADVERTISEMENTS - 1;
    let plain = "self.metadata.name == self.spec.cluster";
    // A pattern that holds the member's name would cost more than a rule may.
    let numbered = "self.metadata.name.matches('^[-a-z0-9]+[.][1-9][0-9]?$') \
                    && self.metadata.name.startsWith(self.spec.cluster + '.')";
    let number = "int(self.metadata.name.substring(size(self.spec.cluster) + 1))";
    Rule::new(format!("{plain} || {numbered} && {number} <= {last}")).message(
        format!("metadata.name must be the name in spec.cluster, alone or with a number behind it: .1 to .{last}")
            .as_str(),
    )
}

fn immutable() -> Rule {
    Rule::new("self == oldSelf").message("is immutable: delete the object and create it anew")
}

/// Who the member is, and what it may ever claim. Belongs to the administrators of the mesh.
#[derive(CustomResource, KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[kube(
    group = "carrick.dev",
    version = "v1alpha1",
    kind = "MeshCluster",
    derive = "PartialEq",
    category = "carrick",
    shortname = "mcl",
    status = "ObjectStatus",
    annotation("helm.sh/resource-policy", "keep"),
    doc = "Says who a member cluster is, and what it may ever claim. Its name is the member's name: a DNS label, the \
           same on every member.",
    validation = Rule::new(NAME_IS_A_LABEL)
        .message("metadata.name must be a DNS label: 1 to 63 of a-z, 0-9 and '-', no '-' at either end"),
    printcolumn(name = "ID", type_ = "integer", json_path = ".spec.id"),
    printcolumn(name = "Ready", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].status"),
    printcolumn(name = "Connected", type_ = "string", json_path = ".status.conditions[?(@.type==\"Connected\")].status"),
    printcolumn(name = "Allowed", type_ = "string", json_path = ".spec.allowedCIDRs", priority = "1"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
pub struct MeshClusterSpec {
    /// The member's number, 1 to 4095: unique in the mesh, given in joining order, never changed. Where two members
    /// claim the same range or key, the lower id has it.
    #[schemars(range(min = 1, max = ebpf::MAX_MEMBER_ID))]
    #[x_kube(validation = immutable())]
    pub id: i64,
    /// The member's gateways, one for each slot, at most 8. All of them carry traffic at the same time. Without any,
    /// nobody can reach the member.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = limits::GATEWAYS))]
    #[x_kube(
        merge_strategy = ListMerge::Map(vec!["ordinal".into()]),
        validation = Rule::new("self.all(g, self.exists_one(h, h.publicKey == g.publicKey))")
            .message("each slot has a key of its own: make it with `carrick keys gen`")
    )]
    pub gateways: Vec<GatewaySpec>,
    /// The address ranges that the member may advertise, at most 64. A route that does not lie in one of them is
    /// refused.
    #[serde(default, rename = "allowedCIDRs", skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = limits::ALLOWED_CIDRS), inner(length(max = limits::CIDR_CHARS)))]
    #[x_kube(
        merge_strategy = ListMerge::Set,
        validation = ranges_are_canonical("self"),
        validation = ranges_are_narrow("self"),
        validation = ranges_are_unicast("self")
    )]
    pub allowed_cidrs: Vec<String>,
    /// How often an idle tunnel of this member sends a packet, in seconds, 0 (never) to 65535, so that NAT routers
    /// keep its mapping. Unset: 25 where one side has no endpoint, else never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = u16::MAX))]
    pub persistent_keepalive_seconds: Option<i64>,
    /// Further DNS names of this member's zone, beside `<member>.<mesh domain>`. Not supported yet: refused.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 8), inner(length(min = 1, max = 253)))]
    #[x_kube(merge_strategy = ListMerge::Set)]
    pub dns_aliases: Vec<String>,
    /// Members through which this one is reached, in order of preference. Not supported yet: the whole member is
    /// refused, because it must not be dialled directly.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 8), inner(length(max = 63), regex(pattern = LABEL)))]
    pub via: Vec<String>,
}

/// One gateway slot of a member.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GatewaySpec {
    /// The slot's number, 0 to 7.
    #[schemars(range(min = 0, max = ebpf::SLOTS - 1))]
    pub ordinal: i64,
    /// The slot's WireGuard public key in base64, as `carrick keys show` prints it. A key belongs to a slot, not to a
    /// node, and to one slot only.
    #[schemars(length(equal = 44), regex(pattern = KEY))]
    #[x_kube(validation = Rule::new("self != 'AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA='")
        .message("must not be all zeros"))]
    pub public_key: String,
    /// Where others dial this gateway: `host:port`, the host an IPv4 address, an IPv6 address in brackets, or a DNS
    /// name outside the mesh's own domain. Tried in order. The seven ports above it must be reachable too, as far as
    /// members have that many gateways. Empty: this gateway only dials out, as one behind NAT does.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = limits::ENDPOINTS), inner(length(max = 261), regex(pattern = ENDPOINT)))]
    #[x_kube(validation = ports_leave_room())]
    pub endpoints: Vec<String>,
}

fn ports_leave_room() -> Rule {
    let port = "int(e.substring(e.lastIndexOf(':') + 1))";
    let max = limits::MAX_ENDPOINT_PORT;
    Rule::new(format!("self.all(e, !e.matches('^.*:[0-9]{{1,5}}$') || ({port} >= 1 && {port} <= {max}))"))
        .message(format!("the port must be 1 to {max}: seven more follow it").as_str())
}

/// What the member offers, and to whom. Belongs to the member's own team; `allowedCIDRs` of its MeshCluster bounds it.
#[derive(CustomResource, KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[kube(
    group = "carrick.dev",
    version = "v1alpha1",
    kind = "RouteAdvertisement",
    derive = "PartialEq",
    category = "carrick",
    shortname = "radv",
    status = "ObjectStatus",
    annotation("helm.sh/resource-policy", "keep"),
    doc = "Says what a member cluster offers to the others. Packets pass between two members only where each offers \
           something to the other. Its name is the member's, and where there are several, NAME.1 to NAME.63.",
    validation = advertisements_are_few(),
    printcolumn(name = "Cluster", type_ = "string", json_path = ".spec.cluster"),
    printcolumn(name = "First Route", type_ = "string", json_path = ".spec.routes[0].cidr"),
    printcolumn(name = "Ready", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].status"),
    printcolumn(name = "To", type_ = "string", json_path = ".spec.to", priority = "1"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
pub struct RouteAdvertisementSpec {
    /// The member whose ranges these are: the name of its MeshCluster. Until that exists, the advertisement waits.
    #[schemars(length(max = 63), regex(pattern = LABEL))]
    #[x_kube(validation = immutable())]
    pub cluster: String,
    /// The members to which the routes are offered, by name. Empty or unset: all of them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = limits::TO), inner(length(max = 63), regex(pattern = LABEL)))]
    #[x_kube(merge_strategy = ListMerge::Set)]
    pub to: Vec<String>,
    /// The ranges offered, 1 to 64. Ranges of one member may contain each other; ranges of different members may not.
    #[schemars(length(min = 1, max = limits::ROUTES))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["cidr".into()]))]
    pub routes: Vec<AdvertisedRoute>,
}

/// One address range that a member offers.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AdvertisedRoute {
    /// The range, such as 10.42.0.0/16: no wider than /8 (IPv4) or /32 (IPv6), without host bits, and inside one of
    /// the member's `allowedCIDRs`.
    #[schemars(length(max = limits::CIDR_CHARS))]
    #[x_kube(
        validation = ranges_are_canonical("[self]"),
        validation = ranges_are_narrow("[self]"),
        validation = ranges_are_unicast("[self]")
    )]
    pub cidr: String,
    /// What lives in the range. `Pod`: pods, reached by their own address, their source preserved. `Service`:
    /// ClusterIPs, translated by the receiving gateway. `External`: addresses outside the cluster, masqueraded by the
    /// receiving gateway. Only `Pod` is supported yet; the others are refused.
    #[serde(rename = "type")]
    #[schemars(extend("enum" = ["Pod", "Service", "External"]))]
    pub kind: String,
    /// The range of the same length under which the others see this one, where ranges overlap. Not supported yet:
    /// the route is refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = limits::CIDR_CHARS))]
    #[x_kube(
        validation = ranges_are_canonical("[self]"),
        validation = ranges_are_narrow("[self]"),
        validation = ranges_are_unicast("[self]")
    )]
    pub exported_as: Option<String>,
}

/// Which pods are selected, and what they may reach. Not supported yet: refused, and not enforced.
#[derive(CustomResource, KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "carrick.dev",
    version = "v1alpha1",
    kind = "EgressPolicy",
    derive = "PartialEq",
    category = "carrick",
    shortname = "egp",
    status = "ObjectStatus",
    annotation("helm.sh/resource-policy", "keep"),
    doc = "Says which remote ranges pods may reach, like a NetworkPolicy: a pod that no policy selects reaches \
           everything; a pod that some select reaches only the union of their `to`. Not supported yet: refused.",
    printcolumn(name = "Members", type_ = "string", json_path = ".spec.members"),
    printcolumn(name = "Ready", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].status"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
pub struct EgressPolicySpec {
    /// The members whose pods are selected, by name. Empty or unset: all of them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = limits::TO), inner(length(max = 63), regex(pattern = LABEL)))]
    #[x_kube(merge_strategy = ListMerge::Set)]
    pub members: Vec<String>,
    /// Selects namespaces by their labels. Empty or unset: all of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace_selector: Option<LabelSelector>,
    /// Selects pods, in those namespaces, by their labels. Empty or unset: all of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod_selector: Option<LabelSelector>,
    /// What the selected pods may reach, at most 64 entries. Empty or unset: no other member.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64))]
    pub to: Vec<EgressDestination>,
}

/// A destination that selected pods may reach.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EgressDestination {
    /// The member that is reached.
    #[schemars(length(max = 63), regex(pattern = LABEL))]
    pub cluster: String,
    /// Ranges of that member, at most 64. Empty or unset: everything that it offers.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), inner(length(max = limits::CIDR_CHARS)))]
    #[x_kube(merge_strategy = ListMerge::Set, validation = ranges_are_canonical("self"))]
    pub cidrs: Vec<String>,
}

/// Which node holds the slot, and how it is reached inside the cluster.
#[derive(CustomResource, KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[kube(
    group = "carrick.dev",
    version = "v1alpha1",
    kind = "MeshGateway",
    derive = "PartialEq",
    category = "carrick",
    shortname = "mgw",
    status = "MeshGatewayStatus",
    annotation("helm.sh/resource-policy", "keep"),
    doc = "Written only by a gateway's own agent, never by hand: which node holds a slot of this cluster, and how it \
           fares. Its name is the slot's ordinal.",
    validation = Rule::new("self.metadata.name == string(self.spec.ordinal)")
        .message("metadata.name must be the ordinal"),
    printcolumn(name = "Node", type_ = "string", json_path = ".spec.node"),
    printcolumn(name = "Draining", type_ = "boolean", json_path = ".status.draining"),
    printcolumn(name = "Heartbeat", type_ = "date", json_path = ".status.heartbeat"),
    printcolumn(name = "Hop", type_ = "string", json_path = ".spec.hopAddresses", priority = "1"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
pub struct MeshGatewaySpec {
    /// The slot, 0 to 7.
    #[schemars(range(min = 0, max = ebpf::SLOTS - 1))]
    pub ordinal: i64,
    /// The name of the Node that holds the slot.
    #[schemars(length(min = 1, max = 253))]
    pub node: String,
    /// The node's addresses to which other nodes of the cluster send the intra-cluster hop, at most one per family.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 2), inner(length(max = 39)))]
    #[x_kube(
        merge_strategy = ListMerge::Set,
        validation = Rule::new("self.all(a, isIP(a))").message("must be IP addresses")
    )]
    pub hop_addresses: Vec<String>,
    /// The slot's WireGuard public key in base64. Copy it to the MeshCluster that the mesh's folder has for this
    /// cluster.
    #[schemars(length(equal = 44), regex(pattern = KEY))]
    pub public_key: String,
}

/// What this cluster made of the object. `Accepted`: nothing of it is refused. `Ready`: accepted, and in force here.
/// `Stalled`: only a change makes it ready. `Connected` (MeshCluster only, and no part of `Ready`): a gateway of this
/// cluster gets answers from one of that member.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("default" = waiting()))]
pub struct ObjectStatus {
    /// The generation of the spec that the conditions are about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// The conditions, one of each type.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 8))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
}

/// What stands of an object that nobody has looked at yet: without it, tools take a new object for one that is ready.
fn waiting() -> serde_json::Value {
    let condition = |kind| {
        serde_json::json!({
            "type": kind, "status": "Unknown", "reason": "Pending", "message": "no gateway of this cluster has seen it yet",
            "lastTransitionTime": "1970-01-01T00:00:00Z",
        })
    };
    serde_json::json!({"conditions": [condition("Accepted"), condition("Ready")]})
}

/// How the gateway fares.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct MeshGatewayStatus {
    /// When the gateway last wrote this, as RFC 3339 in UTC.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("format" = "date-time"))]
    pub heartbeat: Option<String>,
    /// Whether the gateway is about to stop: nodes and members move their traffic to other slots.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub draining: Option<bool>,
    /// What the gateway can reach, one entry for each other member.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = ebpf::MAX_MEMBER_ID))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub members: Vec<ReachedMember>,
}

/// How one other member looks from a gateway.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ReachedMember {
    /// The member's name.
    #[schemars(length(max = 63), regex(pattern = LABEL))]
    pub name: String,
    /// How many of its gateways answer through a tunnel, 0 to 8.
    #[schemars(range(min = 0, max = ebpf::SLOTS))]
    pub gateways: i64,
}

#[cfg(test)]
mod tests {
    use expect_test::{ExpectFile, expect_file};
    use kube::CustomResourceExt;

    use super::*;

    /// As a Helm template: a chart's own `crds/` folder is never upgraded. `UPDATE_EXPECT=1` writes the file anew.
    fn check<K: CustomResourceExt>(template: ExpectFile) {
        let crd = serde_json::to_value(K::crd()).expect("a CRD is JSON");
        let yaml = serde_saphyr::to_string(&crd).expect("JSON is YAML");
        let yaml = yaml.trim_end();
        assert!(!yaml.contains("{{"), "Helm would take this as a template");
        template.assert_eq(&format!("{{{{- if .Values.crds.install }}}}\n{yaml}\n{{{{- end }}}}\n"));
    }

    #[test]
    fn the_chart_has_the_schemas_of_these_types() {
        check::<MeshCluster>(expect_file!["../../manifests/carrick/templates/crds/meshclusters.yaml"]);
        check::<RouteAdvertisement>(expect_file!["../../manifests/carrick/templates/crds/routeadvertisements.yaml"]);
        check::<EgressPolicy>(expect_file!["../../manifests/carrick/templates/crds/egresspolicies.yaml"]);
        check::<MeshGateway>(expect_file!["../../manifests/carrick/templates/crds/meshgateways.yaml"]);
    }

    #[test]
    fn every_schema_is_structural_and_every_field_is_explained() {
        for crd in [MeshCluster::crd(), RouteAdvertisement::crd(), EgressPolicy::crd(), MeshGateway::crd()] {
            let name = crd.metadata.name.clone().unwrap_or_default();
            let json = serde_json::to_value(&crd).expect("a CRD is JSON");
            let root = json.pointer("/spec/versions/0/schema/openAPIV3Schema").expect("a schema");
            for part in ["spec", "status"] {
                let schema = root.pointer(&format!("/properties/{part}")).expect("both parts");
                explained(&format!("{name} {part}"), schema);
            }
        }
    }

    fn explained(path: &str, schema: &serde_json::Value) {
        assert!(schema.get("$ref").is_none(), "{path} is not structural");
        if let Some(properties) = schema.get("properties").and_then(|p| p.as_object()) {
            for (field, schema) in properties {
                assert!(schema.get("description").is_some(), "{path}.{field} has no description");
                explained(&format!("{path}.{field}"), schema);
            }
        }
        if let Some(items) = schema.get("items") {
            explained(&format!("{path}[]"), items);
        }
    }
}
