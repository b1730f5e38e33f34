//! A cluster's part of the mesh's folder, from what its API server says of it: its MeshCluster and its RouteAdvertisement.
//! Pure.
//!
//! Invariant: what the folder says already of the member stays, unless the cluster itself knows better: ids, endpoints, and
//! ranges are people's decisions, keys are the gateways' own. Nothing is ever removed; a range gives way only to one that
//! holds it.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::IpAddr,
};

use ipnetwork::IpNetwork;
use kube::{ResourceExt, core::ObjectMeta};

use crate::{
    api::{
        AdvertisedRoute, GatewaySpec, MeshCluster, MeshClusterSpec, Objects, RouteAdvertisement,
        RouteAdvertisementSpec, limits,
    },
    intent::{self, Kind, Rejection},
    names::{MemberName, Ordinal},
    slot::{LABEL, Wish},
};

/// What people say of the cluster.
#[derive(Clone, Debug)]
pub struct Given {
    pub cluster: MemberName,
    /// Where others dial each gateway; those that are not named keep what the folder says.
    pub endpoints: BTreeMap<Ordinal, Vec<String>>,
    /// The pods' ranges. Empty: what covers those of the Nodes.
    pub ranges: Vec<IpNetwork>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Proposal {
    pub cluster: MeshCluster,
    pub advertisement: RouteAdvertisement,
    /// What somebody should look at before it is committed.
    pub notes: Vec<String>,
    /// What the folder would have refused with it.
    pub rejected: Vec<Rejection>,
}

/// Why there is nothing to propose, and what to do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoProposal {
    #[error(
        "no Node is a gateway: label one with `kubectl label node NAME {LABEL}=0`, and see that the chart is installed"
    )]
    NoGateway,
    #[error("--endpoint {0}=...: this cluster has no gateway with that slot")]
    NoSuchSlot(Ordinal),
    #[error("the Nodes say no pod range: give it with --pod-cidr")]
    NoRange,
    #[error("every id from 1 to {} is taken", ebpf::MAX_MEMBER_ID)]
    NoId,
}

/// Who has yet to publish a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Awaited {
    /// The slots that Nodes are labelled for.
    pub slots: BTreeSet<Ordinal>,
    /// How many more Nodes take any slot. Where there are fewer slots, some of them never get one.
    pub any: usize,
}

impl fmt::Display for Awaited {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let slots = self.slots.iter().map(|slot| format!("the gateway of slot {slot}"));
        let any = (self.any > 0).then(|| format!("{} of the Nodes labelled {LABEL}=auto", self.any));
        f.write_str(&slots.chain(any).collect::<Vec<_>>().join(", "))
    }
}

pub fn awaited(here: &Objects) -> Awaited {
    let labels = here.nodes.iter().map(|node| node.metadata.labels.get(LABEL).map(String::as_str));
    let wishes: Vec<Wish> = labels.filter_map(|label| Wish::of(label).ok()).collect();
    let pinned: BTreeSet<Ordinal> =
        wishes.iter().filter_map(|wish| if let Wish::Pinned(slot) = wish { Some(*slot) } else { None }).collect();
    let published: BTreeSet<Ordinal> =
        here.gateways.iter().filter_map(|gateway| Ordinal::new(gateway.spec.ordinal)).collect();
    let claiming = wishes.iter().filter(|wish| **wish == Wish::Any).count();
    Awaited { any: claiming.saturating_sub(published.difference(&pinned).count()), slots: &pinned - &published }
}

/// `here`: what the API server has; `mesh`: what the folder has.
pub fn propose(given: &Given, here: &Objects, mesh: &Objects, mesh_domain: &str) -> Result<Proposal, NoProposal> {
    let name = given.cluster.as_str();
    let mut notes = Vec::new();
    let mut cluster = match written(&mesh.clusters, name) {
        Some(cluster) => MeshCluster { status: None, ..cluster.clone() },
        None => MeshCluster {
            metadata: named(name),
            spec: MeshClusterSpec { id: free_id(mesh)?, ..Default::default() },
            status: None,
        },
    };
    let spec = &mut cluster.spec;
    spec.gateways = gateways(given, here, &spec.gateways, &mut notes)?;
    let mut advertisement = match written(&mesh.advertisements, name) {
        Some(advertisement) => RouteAdvertisement { status: None, ..advertisement.clone() },
        None => RouteAdvertisement {
            metadata: named(name),
            spec: RouteAdvertisementSpec { cluster: name.to_owned(), ..Default::default() },
            status: None,
        },
    };
    let mut found = Vec::new();
    for range in ranges(given, here)? {
        let pods = AdvertisedRoute { cidr: range.to_string(), kind: "Pod".to_owned(), exported_as: None };
        add(&mut spec.allowed_cidrs, range, range.to_string(), |allowed| Some(allowed.as_str()));
        let is_new = add(&mut advertisement.spec.routes, range, pods, |route| {
            (route.kind == "Pod" && route.exported_as.is_none()).then_some(route.cidr.as_str())
        });
        found.extend((is_new && given.ranges.is_empty()).then(|| range.to_string()));
    }
    if !found.is_empty() {
        notes.push(format!(
            "the pods of today's Nodes lie in {}: if the cluster gives its Nodes ranges out of a larger one, name that \
             with --pod-cidr",
            found.join(", ")
        ));
    }
    let rejected = refused(&cluster, &advertisement, mesh, mesh_domain);
    Ok(Proposal { cluster, advertisement, notes, rejected })
}

/// What the folder has of a name.
pub fn written<'a, K: ResourceExt>(objects: &'a [K], name: &str) -> Option<&'a K> {
    objects.iter().find(|object| object.meta().name.as_deref() == Some(name))
}

fn named(name: &str) -> ObjectMeta {
    ObjectMeta { name: Some(name.to_owned()), ..ObjectMeta::default() }
}

/// Adds what stands for a range, in the place of all that it holds; false if something of the list holds it already.
fn add<T>(list: &mut Vec<T>, range: IpNetwork, new: T, cidr: impl Fn(&T) -> Option<&str>) -> bool {
    let parsed = |one: &T| cidr(one).and_then(|text| text.parse::<IpNetwork>().ok());
    if list.iter().filter_map(parsed).any(|outer| holds(outer, range)) {
        return false;
    }
    let is_held = |one: &T| parsed(one).is_some_and(|inner| holds(range, inner));
    let place = list.iter().position(is_held).unwrap_or(list.len());
    list.retain(|one| !is_held(one));
    list.insert(place, new);
    true
}

/// The first above all that are taken: ids are given in joining order.
fn free_id(mesh: &Objects) -> Result<i64, NoProposal> {
    let last = mesh.clusters.iter().map(|cluster| cluster.spec.id).max().unwrap_or(0).max(0);
    Some(last + 1).filter(|id| *id <= i64::from(ebpf::MAX_MEMBER_ID)).ok_or(NoProposal::NoId)
}

fn gateways(
    given: &Given,
    here: &Objects,
    written: &[GatewaySpec],
    notes: &mut Vec<String>,
) -> Result<Vec<GatewaySpec>, NoProposal> {
    let mut all: BTreeMap<i64, GatewaySpec> = written.iter().map(|one| (one.ordinal, one.clone())).collect();
    for gateway in &here.gateways {
        let known = all.entry(gateway.spec.ordinal).or_default();
        known.ordinal = gateway.spec.ordinal;
        if !known.public_key.is_empty() && known.public_key != gateway.spec.public_key {
            notes.push(format!("gateway {} has another key than the folder said", known.ordinal));
        }
        known.public_key.clone_from(&gateway.spec.public_key);
    }
    for (slot, endpoints) in &given.endpoints {
        let gateway = all.get_mut(&i64::from(slot.get())).ok_or(NoProposal::NoSuchSlot(*slot))?;
        gateway.endpoints.clone_from(endpoints);
    }
    if all.is_empty() {
        return Err(NoProposal::NoGateway);
    }
    if all.values().all(|gateway| gateway.endpoints.is_empty()) {
        notes.push(
            "no gateway has an endpoint: they only dial out, and reach no member whose gateways do the same; \
             --endpoint SLOT=HOST:PORT says where others dial one"
                .to_owned(),
        );
    }
    Ok(all.into_values().collect())
}

fn ranges(given: &Given, here: &Objects) -> Result<Vec<IpNetwork>, NoProposal> {
    if !given.ranges.is_empty() {
        return Ok(given.ranges.clone());
    }
    let listed = here.nodes.iter().flat_map(|node| match node.spec.pod_cidrs.as_slice() {
        [] => std::slice::from_ref(&node.spec.pod_cidr),
        both => both,
    });
    let of_nodes: Vec<IpNetwork> = listed.filter_map(|text| text.parse().ok()).collect();
    let (v4, v6): (Vec<IpNetwork>, Vec<IpNetwork>) = of_nodes.into_iter().partition(IpNetwork::is_ipv4);
    let found: Vec<IpNetwork> = [v4, v6].into_iter().flat_map(|family| hull(&family)).collect();
    if found.is_empty() { Err(NoProposal::NoRange) } else { Ok(found) }
}

/// The narrowest range that covers all; where that is wider than a claim may be, they themselves.
fn hull(ranges: &[IpNetwork]) -> Vec<IpNetwork> {
    let Some(first) = ranges.first() else { return Vec::new() };
    let widest = if first.is_ipv4() { limits::WIDEST_V4 } else { limits::WIDEST_V6 };
    let candidates = (widest..=first.prefix()).rev().filter_map(|length| masked(first.ip(), length));
    let covering = candidates.into_iter().find(|outer| ranges.iter().all(|range| holds(*outer, *range)));
    covering.map_or_else(|| ranges.to_vec(), |outer| vec![outer])
}

fn masked(ip: IpAddr, length: u8) -> Option<IpNetwork> {
    let range = IpNetwork::new(ip, length).ok()?;
    IpNetwork::new(range.network(), length).ok()
}

/// Whether every address of `inner` is one of `outer`.
fn holds(outer: IpNetwork, inner: IpNetwork) -> bool {
    outer.prefix() <= inner.prefix() && outer.contains(inner.network())
}

/// What is refused of a folder with these in it, in so far as it is about them.
fn refused(
    cluster: &MeshCluster,
    advertisement: &RouteAdvertisement,
    mesh: &Objects,
    mesh_domain: &str,
) -> Vec<Rejection> {
    let name = cluster.metadata.name.clone();
    let mut with = mesh.clone();
    with.clusters.retain(|one| one.metadata.name != name);
    with.clusters.push(cluster.clone());
    with.advertisements.retain(|one| one.metadata.name != name);
    with.advertisements.push(advertisement.clone());
    let about = |rejection: &Rejection| {
        matches!(rejection.kind, Kind::MeshCluster | Kind::RouteAdvertisement) && Some(&rejection.name) == name.as_ref()
    };
    intent::mesh(&with, mesh_domain).1.into_iter().filter(about).collect()
}

#[cfg(test)]
mod tests {
    use expect_test::{Expect, expect};
    use proptest::{collection::vec, prelude::*};
    use serde_json::{Value, json};

    use super::*;
    use crate::keys::PublicKey;

    fn key(letter: u8) -> String {
        PublicKey::new([letter; 32]).unwrap().to_string()
    }

    fn objects(value: Value) -> Objects {
        let mut all =
            json!({"clusters": [], "advertisements": [], "policies": [], "gateways": [], "nodes": [], "pods": []});
        value.as_object().unwrap().iter().for_each(|(kind, list)| all[kind] = list.clone());
        serde_json::from_value(all).unwrap()
    }

    fn node(name: &str, ranges: &[&str], label: &str) -> Value {
        let labels = if label.is_empty() { json!({}) } else { json!({crate::slot::LABEL: label}) };
        json!({"metadata": {"name": name, "labels": labels}, "spec": {"podCIDRs": ranges}})
    }

    fn gateway(slot: u8) -> Value {
        let spec = json!({"ordinal": slot, "node": format!("n{slot}"), "publicKey": key(b'A' + slot)});
        json!({"metadata": {"name": slot.to_string()}, "spec": spec})
    }

    fn here() -> Objects {
        objects(json!({
            "nodes": [node("n0", &["10.42.0.0/24", "fd00:42::/64"], "0"), node("n1", &["10.42.3.0/24", "fd00:42:0:1::/64"], "1")],
            "gateways": [gateway(0), gateway(1)],
        }))
    }

    fn given(endpoints: &[(u8, &str)], ranges: &[&str]) -> Given {
        let mut given = Given { cluster: "mn".parse().unwrap(), endpoints: BTreeMap::new(), ranges: Vec::new() };
        for (slot, endpoint) in endpoints {
            let slot = Ordinal::new((*slot).into()).unwrap();
            given.endpoints.entry(slot).or_default().push((*endpoint).to_owned());
        }
        given.ranges = ranges.iter().map(|range| range.parse().unwrap()).collect();
        given
    }

    fn check(given: &Given, here: &Objects, mesh: &Objects, expected: Expect) {
        let text = match propose(given, here, mesh, "mesh.internal") {
            Err(why) => format!("{why}\n"),
            Ok(Proposal { cluster, advertisement, notes, rejected }) => {
                let yaml = |object: Value| serde_saphyr::to_string(&object["spec"]).unwrap();
                let notes = notes.iter().map(|note| format!("note: {note}\n"));
                let rejected = rejected.iter().map(|rejection| format!("refused: {rejection}\n"));
                let [cluster, routes] = [json!(cluster), json!(advertisement)].map(yaml);
                notes.chain(rejected).collect::<String>() + &cluster + "---\n" + &routes
            }
        };
        expected.assert_eq(&text);
    }

    #[test]
    fn a_first_member_gets_the_first_id_and_what_covers_its_nodes() {
        check(
            &given(&[(0, "gw0.example.com:27473")], &[]),
            &here(),
            &Objects::default(),
            expect![[r#"
                note: the pods of today's Nodes lie in 10.42.0.0/22, fd00:42::/63: if the cluster gives its Nodes ranges out of a larger one, name that with --pod-cidr
                allowedCIDRs:
                - 10.42.0.0/22
                - fd00:42::/63
                gateways:
                - endpoints:
                  - gw0.example.com:27473
                  ordinal: 0
                  publicKey: QUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUE=
                - ordinal: 1
                  publicKey: QkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkI=
                id: 1
                ---
                cluster: mn
                routes:
                - cidr: 10.42.0.0/22
                  type: Pod
                - cidr: fd00:42::/63
                  type: Pod
            "#]],
        );
    }

    #[test]
    fn what_the_folder_says_stays() {
        let mesh = objects(json!({
            "clusters": [
                {"metadata": {"name": "va"}, "spec": {"id": 7}},
                {"metadata": {"name": "mn"}, "spec": {"id": 3, "allowedCIDRs": ["10.0.0.0/8"], "gateways": [
                    {"ordinal": 0, "publicKey": key(b'Z'), "endpoints": ["192.0.2.1:27473"]},
                    {"ordinal": 5, "publicKey": key(b'Y')}]}},
            ],
            "advertisements": [{"metadata": {"name": "mn"}, "spec": {"cluster": "mn", "to": ["va"],
                "routes": [{"cidr": "10.9.0.0/16", "type": "Pod"}]}}],
        }));
        check(
            &given(&[], &["10.42.0.0/16"]),
            &here(),
            &mesh,
            expect![[r#"
            note: gateway 0 has another key than the folder said
            allowedCIDRs:
            - 10.0.0.0/8
            gateways:
            - endpoints:
              - 192.0.2.1:27473
              ordinal: 0
              publicKey: QUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUE=
            - ordinal: 1
              publicKey: QkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkI=
            - ordinal: 5
              publicKey: WVlZWVlZWVlZWVlZWVlZWVlZWVlZWVlZWVlZWVlZWVk=
            id: 3
            ---
            cluster: mn
            routes:
            - cidr: 10.9.0.0/16
              type: Pod
            - cidr: 10.42.0.0/16
              type: Pod
            to:
            - va
        "#]],
        );
    }

    #[test]
    fn what_the_mesh_would_refuse_is_told() {
        let mesh = objects(json!({
            "clusters": [{"metadata": {"name": "va"}, "spec": {"id": 1, "allowedCIDRs": ["10.42.0.0/16"]}}],
            "advertisements": [{"metadata": {"name": "va"}, "spec": {"cluster": "va", "routes": [{"cidr": "10.42.0.0/16", "type": "Pod"}]}}],
        }));
        check(
            &given(&[(0, "10.0.0.1:27473")], &[]),
            &here(),
            &mesh,
            expect![[r#"
                note: the pods of today's Nodes lie in 10.42.0.0/22, fd00:42::/63: if the cluster gives its Nodes ranges out of a larger one, name that with --pod-cidr
                refused: RouteAdvertisement/mn spec.routes[0].cidr: HeldByAnother: 10.42.0.0/22 overlaps 10.42.0.0/16, which va holds by the lower id (1, mn has 2): one of them must use another range
                allowedCIDRs:
                - 10.42.0.0/22
                - fd00:42::/63
                gateways:
                - endpoints:
                  - 10.0.0.1:27473
                  ordinal: 0
                  publicKey: QUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUE=
                - ordinal: 1
                  publicKey: QkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkI=
                id: 2
                ---
                cluster: mn
                routes:
                - cidr: 10.42.0.0/22
                  type: Pod
                - cidr: fd00:42::/63
                  type: Pod
            "#]],
        );
    }

    #[test]
    fn what_is_missing_is_named() {
        let none = Objects::default();
        check(
            &given(&[], &[]),
            &objects(json!({"nodes": [node("n0", &["10.42.0.0/24"], "")]})),
            &none,
            expect![[r#"
            no Node is a gateway: label one with `kubectl label node NAME carrick.dev/gateway=0`, and see that the chart is installed
        "#]],
        );
        check(
            &given(&[], &[]),
            &objects(json!({"nodes": [node("n0", &[], "0")], "gateways": [gateway(0)]})),
            &none,
            expect![[r#"
            the Nodes say no pod range: give it with --pod-cidr
        "#]],
        );
        check(
            &given(&[(4, "gw4:27473")], &[]),
            &here(),
            &none,
            expect![[r#"
            --endpoint 4=...: this cluster has no gateway with that slot
        "#]],
        );
    }

    #[test]
    fn each_labelled_node_is_awaited_until_a_gateway_has_published() {
        let nodes = [("a", "0"), ("b", "1"), ("c", "auto"), ("d", "auto"), ("e", ""), ("f", "9")];
        let nodes = nodes.map(|(name, label)| node(name, &[], label));
        let with = |slots: &[u8]| {
            let gateways: Vec<Value> = slots.iter().map(|slot| gateway(*slot)).collect();
            awaited(&objects(json!({"nodes": nodes, "gateways": gateways}))).to_string()
        };
        expect!["the gateway of slot 0, the gateway of slot 1, 2 of the Nodes labelled carrick.dev/gateway=auto"]
            .assert_eq(&with(&[]));
        expect!["the gateway of slot 0, 1 of the Nodes labelled carrick.dev/gateway=auto"].assert_eq(&with(&[1, 2]));
        expect![""].assert_eq(&with(&[0, 1, 2, 3, 4]));
    }

    /// The folder has what the Nodes said; then somebody names the range that the cluster gives them out of.
    #[test]
    fn a_range_gives_way_to_one_that_holds_it() {
        let of_nodes = propose(&given(&[], &[]), &here(), &Objects::default(), "mesh.internal").unwrap();
        let mut mesh = Objects::default();
        mesh.clusters.push(of_nodes.cluster);
        mesh.advertisements.push(of_nodes.advertisement);
        check(
            &given(&[], &["10.42.0.0/16"]),
            &here(),
            &mesh,
            expect![[r#"
            note: no gateway has an endpoint: they only dial out, and reach no member whose gateways do the same; --endpoint SLOT=HOST:PORT says where others dial one
            allowedCIDRs:
            - 10.42.0.0/16
            - fd00:42::/63
            gateways:
            - ordinal: 0
              publicKey: QUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUE=
            - ordinal: 1
              publicKey: QkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkI=
            id: 1
            ---
            cluster: mn
            routes:
            - cidr: 10.42.0.0/16
              type: Pod
            - cidr: fd00:42::/63
              type: Pod
        "#]],
        );
    }

    proptest! {
        #[test]
        fn the_hull_holds_all_and_nothing_narrower_does(ranges in vec((any::<u32>(), 8..=32u8), 1..6)) {
            let range = |(ip, length): &(u32, u8)| masked(IpAddr::from(ip.to_be_bytes()), *length).unwrap();
            let ranges: Vec<IpNetwork> = ranges.iter().map(range).collect();
            let hull = hull(&ranges);
            let holds_all = |outer: &IpNetwork| ranges.iter().all(|range| holds(*outer, *range));
            if let [outer] = &hull[..] && ranges.len() > 1 {
                prop_assert!(holds_all(outer));
                let halves = [outer.network(), outer.broadcast()].map(|ip| masked(ip, outer.prefix() + 1));
                prop_assert!(outer.prefix() == 32 || !halves.iter().flatten().any(holds_all));
            }
            for range in &ranges {
                prop_assert!(hull.iter().any(|outer| holds(*outer, *range)));
            }
        }

        #[test]
        fn whatever_was_added_is_held_once(ranges in vec((0..64u32, 26..=32u8), 1..8)) {
            let range = |(last, length): &(u32, u8)| masked(IpAddr::from((10 << 24 | last).to_be_bytes()), *length).unwrap();
            let ranges: Vec<IpNetwork> = ranges.iter().map(range).collect();
            let mut list: Vec<String> = Vec::new();
            for range in &ranges {
                add(&mut list, *range, range.to_string(), |one| Some(one.as_str()));
            }
            let list: Vec<IpNetwork> = list.iter().map(|text| text.parse().unwrap()).collect();
            for range in list.iter().chain(&ranges) {
                prop_assert_eq!(list.iter().filter(|outer| holds(**outer, *range)).count(), 1);
            }
        }

        #[test]
        fn once_written_the_same_is_proposed_again(endpoint in 0..2u8, ranges in prop::bool::ANY) {
            let given = given(&[(endpoint, "gw.example.com:27473")], if ranges { &["10.42.0.0/16"] } else { &[] });
            let first = propose(&given, &here(), &Objects::default(), "mesh.internal").unwrap();
            let mut mesh = Objects::default();
            mesh.clusters.push(first.cluster.clone());
            mesh.advertisements.push(first.advertisement.clone());
            let second = propose(&given, &here(), &mesh, "mesh.internal").unwrap();
            prop_assert_eq!(&second.rejected, &vec![]);
            prop_assert_eq!((first.cluster, first.advertisement), (second.cluster, second.advertisement));
        }
    }
}
