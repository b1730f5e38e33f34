//! The objects that users write: `carrick.dev/v1alpha1`. The only serde types that face users.
//!
//! Fields are strings, numbers and optional only: [`crate::intent`] parses them, so that one bad value cannot make a
//! whole list fail to deserialize.

use kube::{CustomResource, KubeSchema};
use serde::{Deserialize, Serialize};

/// The typed objects of one snapshot.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Objects {
    pub clusters: Vec<MeshCluster>,
    pub advertisements: Vec<RouteAdvertisement>,
    pub policies: Vec<EgressPolicy>,
    pub gateways: Vec<MeshGateway>,
}

#[derive(CustomResource, KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[kube(
    group = "carrick.dev",
    version = "v1alpha1",
    kind = "MeshCluster",
    derive = "PartialEq",
    category = "carrick",
    status = "ObjectStatus",
    doc = "Says who a member cluster is, and what it may ever claim."
)]
#[serde(rename_all = "camelCase")]
pub struct MeshClusterSpec {
    pub id: i64,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub gateways: Vec<GatewaySpec>,
    #[serde(default, rename = "allowedCIDRs", skip_serializing_if = "Vec::is_empty")]
    pub allowed_cidrs: Vec<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub persistent_keepalive_seconds: Option<i64>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub dns_aliases: Vec<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub via: Vec<String>,
}

#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GatewaySpec {
    pub ordinal: i64,
    pub public_key: String,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub endpoints: Vec<String>,
}

#[derive(CustomResource, KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[kube(
    group = "carrick.dev",
    version = "v1alpha1",
    kind = "RouteAdvertisement",
    derive = "PartialEq",
    category = "carrick",
    status = "ObjectStatus",
    doc = "Says what a member cluster offers to the others."
)]
#[serde(rename_all = "camelCase")]
pub struct RouteAdvertisementSpec {
    pub cluster: String,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub to: Vec<String>,
    pub routes: Vec<AdvertisedRoute>,
}

#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AdvertisedRoute {
    pub cidr: String,
    #[serde(rename = "type")]
    pub kind: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exported_as: Option<String>,
}

#[derive(CustomResource, KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[kube(
    group = "carrick.dev",
    version = "v1alpha1",
    kind = "EgressPolicy",
    derive = "PartialEq",
    category = "carrick",
    status = "ObjectStatus",
    doc = "Says which remote ranges the pods it selects may reach."
)]
#[serde(rename_all = "camelCase")]
pub struct EgressPolicySpec {
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub members: Vec<String>,
}

#[derive(CustomResource, KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[kube(
    group = "carrick.dev",
    version = "v1alpha1",
    kind = "MeshGateway",
    derive = "PartialEq",
    category = "carrick",
    status = "MeshGatewayStatus",
    doc = "Written only by a gateway's own agent: which node holds a slot, and how it fares."
)]
#[serde(rename_all = "camelCase")]
pub struct MeshGatewaySpec {
    pub ordinal: i64,
    pub node: String,
}

#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ObjectStatus {}

#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct MeshGatewayStatus {}
