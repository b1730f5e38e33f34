//! The objects: members that nobody answers for, and Nodes of the own cluster as large as a kubelet's.
//!
//! Invariant: the ranges of members are disjoint, and outside what the own cluster has.

use std::net::{Ipv4Addr, Ipv6Addr};

use anyhow::Result;
use serde_json::{Value, json};

use crate::{
    client::{Ask, done},
    kubernetes::{ADMIN, Kubernetes, MESH, object},
};

/// Where gateways of other members are said to be: a range for benchmarks (RFC 2544).
pub(crate) const UNDERLAY: &str = "198.18.0.0/15";
/// Gateways, RouteAdvertisements and routes of each, of every other member.
const GATEWAYS: u16 = 2;
pub(crate) const ADVERTISEMENTS: u16 = 2;
pub(crate) const ROUTES: u16 = 2;
/// /24s that a member may claim: a /20 of 100.64.0.0/10.
const CLAIMS: u16 = 16;

/// How many ranges other members offer.
pub(crate) fn offered(members: u16) -> usize {
    usize::from(members) * usize::from(ADVERTISEMENTS * ROUTES)
}

fn name(member: u16) -> String {
    format!("m{member:04}")
}

fn claim(member: u16, n: u16) -> Ipv4Addr {
    let base = u32::from(Ipv4Addr::new(100, 64, 0, 0));
    Ipv4Addr::from(base + ((u32::from(member) * u32::from(CLAIMS) + u32::from(n)) << 8))
}

/// Any 32 bytes in base64, another for each gateway.
fn key(member: u16, ordinal: u16) -> String {
    format!("{:A<42}E=", format!("M{member:04}G{ordinal}"))
}

fn cluster(member: u16) -> Value {
    let gateway = |ordinal| {
        let at = u32::from(Ipv4Addr::new(198, 18, 0, 0)) + u32::from(member * GATEWAYS + ordinal);
        json!({"ordinal": ordinal, "publicKey": key(member, ordinal), "endpoints": [format!("{}:27473", Ipv4Addr::from(at))]})
    };
    let gateways: Vec<Value> = (0..GATEWAYS).map(gateway).collect();
    let allowed = format!("{}/20", claim(member, 0));
    object("MeshCluster", &name(member), &json!({"id": member + 2, "gateways": gateways, "allowedCIDRs": [allowed]}))
}

/// The ranges of a member's RouteAdvertisement after it was changed so many times: each time the first is another, which none
/// of its neighbours has.
pub(crate) fn ranges(member: u16, advertisement: u16, changed: usize) -> [String; ROUTES as usize] {
    let half = CLAIMS / ADVERTISEMENTS;
    let first = advertisement * half;
    let turn = (changed % usize::from(half - 1)) as u16;
    [turn, half - 1].map(|n| format!("{}/24", claim(member, first + n)))
}

pub(crate) fn advertisement(member: u16, number: u16) -> String {
    format!("{}.{}", name(member), number + 1)
}

pub(crate) fn routes(ranges: &[String]) -> Value {
    ranges.iter().map(|range| json!({"cidr": range, "type": "Pod"})).collect()
}

fn advertised(member: u16, number: u16) -> Value {
    let routes = routes(&ranges(member, number, 0));
    object("RouteAdvertisement", &advertisement(member, number), &json!({"cluster": name(member), "routes": routes}))
}

/// The own member, whose gateway has that key.
pub(crate) fn own(key: &str) -> [Value; 2] {
    let ranges = ["10.42.0.0/16".to_owned(), "fd00:10:1::/48".to_owned()];
    let gateway = json!({"ordinal": 0, "publicKey": key, "endpoints": ["203.0.113.2:27473"]});
    [
        object("MeshCluster", "mn", &json!({"id": 1, "gateways": [gateway], "allowedCIDRs": ranges})),
        object("RouteAdvertisement", "mn", &json!({"cluster": "mn", "routes": routes(&ranges)})),
    ]
}

/// A Node as large as those of kubelets, some 6 kB: most of it is for others.
fn node(n: u16) -> Value {
    let pods = u32::from(Ipv4Addr::new(10, 42, 2, 0)) + (u32::from(n) << 6);
    let pods6 = Ipv6Addr::new(0xfd00, 0x10, 1, n + 2, 0, 0, 0, 0);
    let address = u32::from(Ipv4Addr::new(172, 20, 0, 0)) + u32::from(n) + 2;
    let name = format!("mn-{}", n + 2);
    let images: Vec<Value> = (0..30)
        .map(|image| {
            let names = [
                format!("registry.example.com/team/image-{image}@sha256:{image:064x}"),
                format!("registry.example.com/team/image-{image}:v1.2.{image}"),
            ];
            json!({"names": names, "sizeBytes": 31_415_926})
        })
        .collect();
    let conditions: Vec<Value> = ["MemoryPressure", "DiskPressure", "PIDPressure", "Ready"]
        .map(|kind| {
            json!({"type": kind, "status": if kind == "Ready" { "True" } else { "False" }, "reason": format!("KubeletHas{kind}"),
                   "message": "kubelet has said so", "lastHeartbeatTime": "2026-01-01T00:00:00Z",
                   "lastTransitionTime": "2026-01-01T00:00:00Z"})
        })
        .to_vec();
    let labels = json!({"kubernetes.io/hostname": name, "kubernetes.io/os": "linux", "kubernetes.io/arch": "amd64",
                        "topology.kubernetes.io/zone": format!("zone-{}", n % 3)});
    let resources = json!({"cpu": "8", "memory": "32Gi", "pods": "110", "ephemeral-storage": "100Gi"});
    json!({
        "metadata": {"name": name, "labels": labels},
        "spec": {"podCIDR": format!("{}/26", Ipv4Addr::from(pods)), "podCIDRs": [format!("{}/26", Ipv4Addr::from(pods)), format!("{pods6}/64")]},
        "status": {
            "addresses": [{"type": "InternalIP", "address": Ipv4Addr::from(address)}, {"type": "Hostname", "address": name}],
            "capacity": resources, "allocatable": resources, "conditions": conditions, "images": images,
        },
    })
}

/// Makes everything but the own member. Two of the nodes are there already.
pub(crate) fn put(kubernetes: &Kubernetes, members: u16, nodes: u16) -> Result<()> {
    let all = |asks: &mut (dyn Iterator<Item = Ask> + Send)| kubernetes.ask_all(ADMIN, asks, done);
    all(&mut (0..nodes.saturating_sub(2)).map(|n| Ask::create("/api/v1/nodes", node(n))))?;
    all(&mut (0..members).map(|member| Ask::create(&format!("{MESH}/meshclusters"), cluster(member))))?;
    let numbers = (0..members).flat_map(|member| (0..ADVERTISEMENTS).map(move |number| (member, number)));
    all(&mut numbers
        .map(|(member, number)| Ask::create(&format!("{MESH}/routeadvertisements"), advertised(member, number))))
}
