//! What a view makes of what it is told: its whole state as text, and laws.

use std::fmt::Write;

use expect_test::{Expect, expect};
use proptest::{collection::vec, prelude::*, sample::Index};

use super::*;
use crate::{
    api::{
        MeshClusterSpec, MeshGatewaySpec, RouteAdvertisementSpec,
        network::{BlockAffinitySpec, CiliumIpam, CiliumNodeSpec, IpPoolSpec, ServiceCidrSpec},
    },
    source::{
        kube::watch::Trouble,
        store::{Event, GRACE},
    },
};

/// The whole answer of a view.
fn rendered(view: &View) -> String {
    let mut out = String::new();
    match view.snapshot() {
        Ok(Snapshot { objects, complete, problems }) => {
            writeln!(out, "{}", if complete { "complete" } else { "incomplete" }).unwrap();
            for object in &objects.clusters {
                writeln!(out, "MeshCluster {} {}", object.metadata.name.as_deref().unwrap(), object.spec.id).unwrap();
            }
            for node in &objects.nodes {
                let addresses: Vec<&str> = node.status.addresses.iter().map(|one| one.address.as_str()).collect();
                writeln!(out, "Node {} {}", node.metadata.name, addresses.join(",")).unwrap();
            }
            for object in &objects.service_cidrs {
                writeln!(out, "ServiceCIDR {} {}", object.metadata.name, object.spec.cidrs.join(",")).unwrap();
            }
            for object in &objects.cilium_nodes {
                let ranges = object.spec.ipam.pod_cidrs.join(",");
                writeln!(out, "CiliumNode {} {ranges}", object.metadata.name).unwrap();
            }
            for object in &objects.block_affinities {
                let BlockAffinity { metadata, spec } = object;
                writeln!(out, "BlockAffinity {} {} {}", metadata.name, spec.cidr, spec.node).unwrap();
            }
            for object in &objects.ip_pools {
                writeln!(out, "IPPool {} {}", object.metadata.name, object.spec.cidr).unwrap();
            }
            problems.iter().for_each(|problem| writeln!(out, "{problem}").unwrap());
        }
        Err(missing) => writeln!(out, "not synced: {missing}").unwrap(),
    }
    out
}

fn check(view: &View, expected: Expect) {
    expected.assert_eq(&rendered(view));
}

fn cluster(name: &str, id: i64) -> (String, Result<MeshCluster, String>) {
    let spec = MeshClusterSpec { id, ..MeshClusterSpec::default() };
    (name.to_owned(), Ok(MeshCluster::new(name, spec)))
}

fn gateway(ordinal: i64, node: &str, address: &str) -> (String, Result<MeshGateway, String>) {
    let hop_addresses = vec![address.to_owned()];
    let spec = MeshGatewaySpec { ordinal, node: node.to_owned(), hop_addresses, ..MeshGatewaySpec::default() };
    (ordinal.to_string(), Ok(MeshGateway::new(&ordinal.to_string(), spec)))
}

fn advertisement(name: &str) -> (String, Result<RouteAdvertisement, String>) {
    (name.to_owned(), Ok(RouteAdvertisement::new(name, RouteAdvertisementSpec::default())))
}

fn node(name: &str, address: &str, labels: &[&str]) -> (String, Result<v1::Node, String>) {
    let metadata = v1::Metadata {
        name: name.to_owned(),
        namespace: String::new(),
        labels: labels.iter().map(|label| (label.to_string(), "0".to_owned())).collect(),
    };
    let address = v1::NodeAddress { kind: "InternalIP".to_owned(), address: address.to_owned() };
    let status = v1::NodeStatus { addresses: vec![address] };
    (name.to_owned(), Ok(v1::Node { metadata, status, ..v1::Node::default() }))
}

fn meta(name: &str) -> v1::Metadata {
    v1::Metadata { name: name.to_owned(), ..v1::Metadata::default() }
}

fn services(name: &str, range: &str) -> Named<ServiceCidr> {
    (name.to_owned(), Ok(ServiceCidr { metadata: meta(name), spec: ServiceCidrSpec { cidrs: vec![range.to_owned()] } }))
}

fn cilium(name: &str, range: &str) -> Named<CiliumNode> {
    let ipam = CiliumIpam { pod_cidrs: vec![range.to_owned()], ..CiliumIpam::default() };
    (name.to_owned(), Ok(CiliumNode { metadata: meta(name), spec: CiliumNodeSpec { ipam } }))
}

fn block(name: &str, node: &str, range: &str) -> Named<BlockAffinity> {
    let spec = BlockAffinitySpec { cidr: range.to_owned(), node: node.to_owned(), ..BlockAffinitySpec::default() };
    (name.to_owned(), Ok(BlockAffinity { metadata: meta(name), spec }))
}

fn pool(name: &str, range: &str) -> Named<IpPool> {
    (name.to_owned(), Ok(IpPool { metadata: meta(name), spec: IpPoolSpec { cidr: range.to_owned(), disabled: false } }))
}

type Named<T> = (String, Result<T, String>);

fn list<T: Clone>(objects: &[Named<T>]) -> Vec<Heard<T>> {
    let listed = objects.iter().cloned().map(|(name, read)| Event::Listed(name, read));
    let events = [Event::ListBegins].into_iter().chain(listed).chain([Event::ListEnds]);
    events.map(Heard::Event).collect()
}

fn set<T>((name, read): Named<T>) -> Heard<T> {
    Heard::Event(Event::Set(name, read))
}

fn tell<T>(view: &mut View, told: impl Fn(Heard<T>) -> Told, heard: Vec<Heard<T>>) {
    for heard in heard {
        view.hear(Duration::ZERO, told(heard));
    }
}

fn all_nodes(generation: u64) -> impl Fn(Heard<v1::Node>) -> Told {
    move |heard| Told::Nodes(generation, heard)
}

fn cilium_nodes(generation: u64) -> impl Fn(Heard<CiliumNode>) -> Told {
    move |heard| Told::CiliumNodes(generation, heard)
}

fn blocks(generation: u64) -> impl Fn(Heard<BlockAffinity>) -> Told {
    move |heard| Told::BlockAffinities(generation, heard)
}

/// No kind of the network's is there.
fn tell_no_network(view: &mut View, generation: u64) {
    tell(view, Told::ServiceCidrs, list(&[]));
    tell(view, Told::IpPools, list(&[]));
    tell(view, cilium_nodes(generation), list(&[]));
    tell(view, blocks(generation), list(&[]));
}

/// A worker's view of two members, one gateway elsewhere.
fn synced() -> View {
    let mut view = View::new("https://api".to_owned(), Some("w1".to_owned()));
    tell(&mut view, Told::Clusters, list(&[cluster("mn", 1), cluster("va", 2)]));
    tell(&mut view, Told::Advertisements, list(&[advertisement("mn")]));
    tell(&mut view, Told::Policies, list(&[]));
    tell(&mut view, Told::Gateways, list(&[gateway(0, "g1", "192.0.2.1")]));
    tell(&mut view, Told::OwnNode, list(&[node("w1", "192.0.2.9", &[])]));
    view.begin(1);
    tell_no_network(&mut view, 1);
    view
}

#[test]
fn a_half_synced_view_says_what_it_waits_for() {
    let mut view = View::new("https://api".to_owned(), Some("w1".to_owned()));
    tell(&mut view, Told::Clusters, list(&[cluster("mn", 1)]));
    tell(&mut view, Told::Policies, vec![Heard::Failed(Trouble::NotServed)]);
    tell(&mut view, Told::OwnNode, list(&[]));
    check(
        &view,
        expect![[r#"
            not synced: https://api: RouteAdvertisements, MeshGateways: not listed yet; EgressPolicies: the API server does not have this kind, or is about to lose it: install the chart's CRDs; there is no usable Node w1: name this node as its Node is, with --node-name
        "#]],
    );
}

#[test]
fn a_worker_knows_the_nodes_of_gateways_by_what_these_say() {
    check(
        &synced(),
        expect![[r#"
        complete
        MeshCluster mn 1
        MeshCluster va 2
        Node g1 192.0.2.1
        Node w1 192.0.2.9
    "#]],
    );
}

#[test]
fn an_agent_that_starts_on_an_empty_store_takes_nothing_away() {
    let mut view = View::new("https://api".to_owned(), Some("w1".to_owned()));
    tell(&mut view, Told::Clusters, list(&[]));
    tell(&mut view, Told::Advertisements, list(&[]));
    tell(&mut view, Told::Policies, list(&[]));
    tell(&mut view, Told::Gateways, list(&[]));
    tell(&mut view, Told::OwnNode, list(&[node("w1", "192.0.2.9", &[])]));
    view.begin(1);
    tell_no_network(&mut view, 1);
    let empty = rendered(&view);
    // Somebody applies the folder: one object after the other.
    let at = Duration::from_secs;
    view.hear(at(100), Told::Clusters(set(cluster("mn", 1))));
    view.hear(at(129), Told::Advertisements(set(advertisement("mn"))));
    // A Node is no part of it.
    view.hear(at(158), Told::OwnNode(set(node("w1", "192.0.2.8", &[]))));
    view.tick(at(158));
    let filling = rendered(&view);
    assert_eq!(view.next(), Some(at(159)));
    assert!(view.tick(at(159)));
    let filled = rendered(&view);
    view.hear(at(200), Told::Clusters(Heard::Event(Event::Deleted("mn".to_owned()))));
    let deleted = rendered(&view);
    expect![[r#"
        incomplete
        Node w1 192.0.2.9
        https://api MeshClusters: there is none, nor has there been one since this start: nothing is taken away. Apply the mesh's manifests; a node that is to leave it, `carrick cleanup` clears
        incomplete
        MeshCluster mn 1
        Node w1 192.0.2.8
        https://api MeshClusters: there was none at this start: nothing is taken away until what is applied now has not changed for 30 s
        complete
        MeshCluster mn 1
        Node w1 192.0.2.8
        complete
        Node w1 192.0.2.8
    "#]].assert_eq(&format!("{empty}{filling}{filled}{deleted}"));
}

#[test]
fn a_gateway_watches_all_nodes_for_as_long_as_its_own_says_so() {
    let mut view = synced();
    tell(&mut view, cilium_nodes(1), list(&[cilium("w1", "10.0.1.0/24")]));
    assert!(!view.wants_nodes());
    view.hear(Duration::ZERO, Told::OwnNode(set(node("w1", "192.0.2.9", &[slot::LABEL]))));
    assert!(view.wants_nodes());
    view.begin(2);
    let before = rendered(&view);
    tell(&mut view, all_nodes(2), list(&[node("w1", "192.0.2.9", &[]), node("w2", "192.0.2.8", &[])]));
    tell(&mut view, cilium_nodes(2), list(&[cilium("w1", "10.0.1.0/24"), cilium("w2", "10.0.2.0/24")]));
    tell(&mut view, blocks(2), list(&[block("b", "w2", "10.0.2.64/26")]));
    let after = rendered(&view);
    view.hear(Duration::ZERO, Told::OwnNode(set(node("w1", "192.0.2.9", &[]))));
    assert!(!view.wants_nodes());
    view.begin(3);
    // What the ended watches told last.
    tell(&mut view, all_nodes(2), list(&[node("w3", "192.0.2.7", &[])]));
    tell(&mut view, cilium_nodes(2), list(&[cilium("w3", "10.0.3.0/24")]));
    tell(&mut view, blocks(2), list(&[block("b", "w3", "10.0.3.64/26")]));
    tell(&mut view, cilium_nodes(3), list(&[cilium("w1", "10.0.1.0/24")]));
    let ended = rendered(&view);
    expect![[r#"
        incomplete
        MeshCluster mn 1
        MeshCluster va 2
        Node g1 192.0.2.1
        Node w1 192.0.2.9
        complete
        MeshCluster mn 1
        MeshCluster va 2
        Node w1 192.0.2.9
        Node w2 192.0.2.8
        CiliumNode w1 10.0.1.0/24
        CiliumNode w2 10.0.2.0/24
        BlockAffinity b 10.0.2.64/26 w2
        complete
        MeshCluster mn 1
        MeshCluster va 2
        Node g1 192.0.2.1
        Node w1 192.0.2.9
        CiliumNode w1 10.0.1.0/24
    "#]]
    .assert_eq(&format!("{before}{after}{ended}"));
}

#[test]
fn a_label_that_names_no_slot_makes_no_gateway() {
    let mut view = synced();
    for (label, gateway) in [("0", true), ("7", true), ("auto", true), ("8", false), ("", false), ("gateway", false)] {
        let (name, mut own) = node("w1", "192.0.2.9", &[]);
        own.as_mut().unwrap().metadata.labels.insert(slot::LABEL.to_owned(), label.to_owned());
        view.hear(Duration::ZERO, Told::OwnNode(set((name, own))));
        assert_eq!(view.wants_nodes(), gateway, "{label:?}");
    }
}

#[test]
fn an_own_node_that_is_gone_stays_as_it_was() {
    let mut view = synced();
    view.hear(Duration::ZERO, Told::OwnNode(Heard::Event(Event::Deleted("w1".to_owned()))));
    check(
        &view,
        expect![[r#"
        incomplete
        MeshCluster mn 1
        MeshCluster va 2
        Node g1 192.0.2.1
        Node w1 192.0.2.9
        https://api Node w1: is gone: what it said before stays in force
    "#]],
    );
}

#[test]
fn an_own_node_without_an_address_keeps_its_last() {
    let mut view = synced();
    let (name, nowhere) = node("w1", "", &[]);
    let nowhere = nowhere.map(|node| v1::Node { status: v1::NodeStatus::default(), ..node });
    view.hear(Duration::ZERO, Told::OwnNode(set((name, nowhere))));
    let without = rendered(&view);
    view.hear(Duration::ZERO, Told::OwnNode(set(node("w1", "192.0.2.8", &[]))));
    expect![[r#"
        complete
        MeshCluster mn 1
        MeshCluster va 2
        Node g1 192.0.2.1
        Node w1 192.0.2.9
        https://api Node w1: has no InternalIP: what it said before stays in force
        complete
        MeshCluster mn 1
        MeshCluster va 2
        Node g1 192.0.2.1
        Node w1 192.0.2.8
    "#]]
    .assert_eq(&(without + &rendered(&view)));
}

#[test]
fn a_bad_object_keeps_its_last_good_and_names_itself() {
    let mut view = synced();
    let bad = |name: &str| set((name.to_owned(), Err("invalid type".to_owned())));
    view.hear(Duration::ZERO, Told::Clusters(bad("va")));
    check(
        &view,
        expect![[r#"
        complete
        MeshCluster mn 1
        MeshCluster va 2
        Node g1 192.0.2.1
        Node w1 192.0.2.9
        https://api MeshClusters va: cannot be read by this version: invalid type: correct it (what it said before stays in force)
    "#]],
    );
    view.hear(Duration::ZERO, Told::Clusters(bad("de")));
    check(
        &view,
        expect![[r#"
        incomplete
        MeshCluster mn 1
        MeshCluster va 2
        Node g1 192.0.2.1
        Node w1 192.0.2.9
        https://api MeshClusters de: cannot be read by this version: invalid type: correct it
        https://api MeshClusters va: cannot be read by this version: invalid type: correct it (what it said before stays in force)
    "#]],
    );
}

#[test]
fn a_kind_that_is_lost_stays_and_comes_back() {
    let mut view = synced();
    let before = rendered(&view);
    assert!(view.hear(Duration::ZERO, Told::Clusters(Heard::Failed(Trouble::NotServed))));
    assert!(!view.hear(Duration::ZERO, Told::Clusters(Heard::Failed(Trouble::NotServed))), "no news");
    let lost = rendered(&view);
    tell(&mut view, Told::Clusters, list(&[]));
    let doubted = rendered(&view);
    tell(&mut view, Told::Clusters, list(&[cluster("mn", 1), cluster("va", 2)]));
    assert_eq!(rendered(&view), before);
    expect![[r#"
        incomplete
        MeshCluster mn 1
        MeshCluster va 2
        Node g1 192.0.2.1
        Node w1 192.0.2.9
        https://api MeshClusters: the API server does not have this kind, or is about to lose it: install the chart's CRDs (what it said before stays in force)
        incomplete
        MeshCluster mn 1
        MeshCluster va 2
        Node g1 192.0.2.1
        Node w1 192.0.2.9
        https://api MeshClusters: half or more are gone from one list to the next: mn, va. They stay in force for 300 s after it: put them back, unless they are to go
    "#]].assert_eq(&format!("{lost}{doubted}"));
}

#[test]
fn an_api_server_that_is_away_takes_nothing() {
    let mut view = synced();
    let away = || Trouble::Other("does not answer".to_owned());
    view.hear(Duration::ZERO, Told::Clusters(Heard::Failed(away())));
    view.hear(Duration::ZERO, Told::OwnNode(Heard::Failed(away())));
    check(
        &view,
        expect![[r#"
        complete
        MeshCluster mn 1
        MeshCluster va 2
        Node g1 192.0.2.1
        Node w1 192.0.2.9
        https://api: does not answer (what it said before stays in force)
    "#]],
    );
}

/// What one kind may be told.
/// What an agent before has kept of [`synced`].
fn kept(node: &str) -> Kept {
    let objects = synced().snapshot().unwrap().objects;
    Kept { saved: Timestamp::UNIX_EPOCH, node: Some(node.to_owned()), objects }
}

fn recalling() -> View {
    let mut view = View::new("https://api".to_owned(), Some("w1".to_owned()));
    view.recall(kept("w1"));
    view.begin(1);
    view
}

#[test]
fn what_was_kept_is_in_force_and_incomplete_until_everything_is_heard() {
    let mut view = recalling();
    let before = rendered(&view);
    tell(&mut view, Told::Clusters, vec![Heard::Failed(Trouble::Other("does not answer".to_owned()))]);
    let away = rendered(&view);
    tell(&mut view, Told::Clusters, list(&[cluster("mn", 1), cluster("va", 2), cluster("de", 3)]));
    tell(&mut view, Told::Advertisements, list(&[advertisement("mn")]));
    tell(&mut view, Told::Policies, list(&[]));
    tell(&mut view, Told::Gateways, list(&[gateway(0, "g1", "192.0.2.2")]));
    tell_no_network(&mut view, 1);
    assert!(view.recalls());
    tell(&mut view, Told::OwnNode, list(&[node("w1", "192.0.2.9", &[])]));
    assert!(!view.recalls());
    expect![[r#"
        incomplete
        MeshCluster mn 1
        MeshCluster va 2
        Node g1 192.0.2.1
        Node w1 192.0.2.9
        https://api: has not told everything since this start: what it had said by 1970-01-01T00:00:00Z is in force
        incomplete
        MeshCluster mn 1
        MeshCluster va 2
        Node g1 192.0.2.1
        Node w1 192.0.2.9
        https://api: does not answer (what it said before stays in force)
        https://api: has not told everything since this start: what it had said by 1970-01-01T00:00:00Z is in force
        complete
        MeshCluster de 3
        MeshCluster mn 1
        MeshCluster va 2
        Node g1 192.0.2.2
        Node w1 192.0.2.9
    "#]]
    .assert_eq(&[before, away, rendered(&view)].concat());
}

#[test]
fn what_was_kept_and_is_not_listed_is_doubted() {
    let mut view = recalling();
    tell(&mut view, Told::Clusters, list(&[]));
    tell(&mut view, Told::Advertisements, list(&[]));
    tell(&mut view, Told::Policies, list(&[]));
    tell(&mut view, Told::Gateways, list(&[]));
    tell(&mut view, Told::OwnNode, list(&[node("w1", "192.0.2.9", &[])]));
    tell_no_network(&mut view, 1);
    let doubted = rendered(&view);
    view.tick(GRACE);
    expect![[r#"
        incomplete
        MeshCluster mn 1
        MeshCluster va 2
        Node g1 192.0.2.1
        Node w1 192.0.2.9
        https://api MeshClusters: half or more are gone from one list to the next: mn, va. They stay in force for 300 s after it: put them back, unless they are to go
        https://api MeshGateways: half or more are gone from one list to the next: 0. They stay in force for 300 s after it: put them back, unless they are to go
        https://api RouteAdvertisements: half or more are gone from one list to the next: mn. They stay in force for 300 s after it: put them back, unless they are to go
        complete
        Node w1 192.0.2.9
    "#]].assert_eq(&[doubted, rendered(&view)].concat());
}

/// What the network's kinds say is in force, and whatever becomes of them holds up nothing else.
#[test]
fn a_kind_of_the_network_s_comes_goes_and_fails_alone() {
    let mut view = synced();
    tell(&mut view, Told::ServiceCidrs, list(&[services("kubernetes", "10.96.0.0/16")]));
    tell(&mut view, Told::IpPools, list(&[pool("p", "10.0.0.0/16")]));
    tell(&mut view, cilium_nodes(1), list(&[cilium("w1", "10.0.1.0/24")]));
    let there = rendered(&view);
    let forbidden = Trouble::Other("servicecidrs is forbidden".to_owned());
    view.hear(Duration::ZERO, Told::ServiceCidrs(Heard::Failed(forbidden)));
    view.hear(Duration::ZERO, Told::CiliumNodes(1, set(("w1".to_owned(), Err("invalid type".to_owned())))));
    // Its CRD is deleted.
    view.hear(Duration::ZERO, Told::IpPools(Heard::Failed(Trouble::NotServed)));
    let lost = rendered(&view);
    tell(&mut view, Told::IpPools, list(&[]));
    let doubted = rendered(&view);
    assert!(view.tick(GRACE));
    expect![[r#"
        complete
        MeshCluster mn 1
        MeshCluster va 2
        Node g1 192.0.2.1
        Node w1 192.0.2.9
        ServiceCIDR kubernetes 10.96.0.0/16
        CiliumNode w1 10.0.1.0/24
        IPPool p 10.0.0.0/16
        complete
        MeshCluster mn 1
        MeshCluster va 2
        Node g1 192.0.2.1
        Node w1 192.0.2.9
        ServiceCIDR kubernetes 10.96.0.0/16
        CiliumNode w1 10.0.1.0/24
        IPPool p 10.0.0.0/16
        https://api: servicecidrs is forbidden (what it said before stays in force)
        https://api CiliumNodes w1: cannot be read by this version: invalid type: correct it (what it said before stays in force)
        complete
        MeshCluster mn 1
        MeshCluster va 2
        Node g1 192.0.2.1
        Node w1 192.0.2.9
        ServiceCIDR kubernetes 10.96.0.0/16
        CiliumNode w1 10.0.1.0/24
        IPPool p 10.0.0.0/16
        https://api: servicecidrs is forbidden (what it said before stays in force)
        https://api CiliumNodes w1: cannot be read by this version: invalid type: correct it (what it said before stays in force)
        https://api IPPools: half or more are gone from one list to the next: p. They stay in force for 300 s after it: put them back, unless they are to go
        complete
        MeshCluster mn 1
        MeshCluster va 2
        Node g1 192.0.2.1
        Node w1 192.0.2.9
        ServiceCIDR kubernetes 10.96.0.0/16
        CiliumNode w1 10.0.1.0/24
        https://api: servicecidrs is forbidden (what it said before stays in force)
        https://api CiliumNodes w1: cannot be read by this version: invalid type: correct it (what it said before stays in force)
    "#]]
    .assert_eq(&[there, lost, doubted, rendered(&view)].concat());
}

/// An agent without a right, and one before the CRDs are there, works; one that has not been told yet takes nothing away.
#[test]
fn the_network_s_kinds_may_be_missing_but_are_waited_for() {
    let mut view = View::new("https://api".to_owned(), Some("w1".to_owned()));
    tell(&mut view, Told::Clusters, list(&[cluster("mn", 1)]));
    tell(&mut view, Told::Advertisements, list(&[]));
    tell(&mut view, Told::Policies, list(&[]));
    tell(&mut view, Told::Gateways, list(&[]));
    tell(&mut view, Told::OwnNode, list(&[node("w1", "192.0.2.9", &[])]));
    view.begin(1);
    tell(&mut view, Told::ServiceCidrs, list(&[]));
    tell(&mut view, Told::IpPools, vec![Heard::Failed(Trouble::Other("ippools is forbidden".to_owned()))]);
    assert!(!view.is_settled());
    let waits = rendered(&view);
    tell(&mut view, cilium_nodes(1), vec![Heard::Failed(Trouble::NotServed)]);
    assert!(view.is_settled());
    expect![[r#"
        incomplete
        MeshCluster mn 1
        Node w1 192.0.2.9
        https://api: ippools is forbidden
        complete
        MeshCluster mn 1
        Node w1 192.0.2.9
        https://api: ippools is forbidden
    "#]]
    .assert_eq(&(waits + &rendered(&view)));
}

#[test]
fn what_the_network_said_is_recalled() {
    let mut before = synced();
    tell(&mut before, Told::ServiceCidrs, list(&[services("kubernetes", "10.96.0.0/16")]));
    tell(&mut before, cilium_nodes(1), list(&[cilium("w1", "10.0.1.0/24")]));
    let objects = before.snapshot().unwrap().objects;
    let mut view = View::new("https://api".to_owned(), Some("w1".to_owned()));
    view.recall(Kept { saved: Timestamp::UNIX_EPOCH, node: Some("w1".to_owned()), objects: objects.clone() });
    assert!(view.knows_itself());
    view.begin(1);
    assert_eq!(view.snapshot().unwrap().objects, objects);
}

#[test]
fn another_node_s_view_is_not_recalled() {
    let mut view = View::new("https://api".to_owned(), Some("w1".to_owned()));
    view.recall(kept("w2"));
    assert!(!view.recalls() && view.snapshot().is_err());
}

#[test]
fn a_gateway_s_nodes_are_recalled_until_they_are_listed() {
    let mut view = View::new("https://api".to_owned(), Some("g1".to_owned()));
    let mut kept = kept("g1");
    kept.objects.nodes =
        vec![node("g1", "192.0.2.1", &[slot::LABEL]).1.unwrap(), node("w7", "192.0.2.7", &[]).1.unwrap()];
    view.recall(kept);
    assert!(view.wants_nodes());
    view.begin(1);
    let nodes = |view: &View| -> Vec<String> {
        view.snapshot().unwrap().objects.nodes.into_iter().map(|node| node.metadata.name).collect()
    };
    assert_eq!(nodes(&view), ["g1", "w7"]);
    let listed = [node("g1", "192.0.2.1", &[slot::LABEL]), node("w7", "192.0.2.7", &[]), node("w8", "192.0.2.8", &[])];
    tell(&mut view, all_nodes(1), list(&listed));
    assert_eq!(nodes(&view), ["g1", "w7", "w8"]);
    view.begin(2);
    assert_eq!(nodes(&view), ["g1"]);
}

fn heard<T: Clone + std::fmt::Debug + 'static>(object: fn(u8) -> Named<T>) -> impl Strategy<Value = Vec<Heard<T>>> {
    let name = move |n| object(n).0;
    prop_oneof![
        3 => vec(0..4u8, 0..4).prop_map(move |all| list(&all.into_iter().map(object).collect::<Vec<_>>())),
        2 => (0..4u8).prop_map(move |n| vec![set(object(n))]),
        1 => (0..4u8).prop_map(move |n| vec![set((name(n), Err("bad".to_owned())))]),
        1 => (0..4u8).prop_map(move |n| vec![Heard::Event(Event::Deleted(name(n)))]),
        1 => Just(vec![Heard::Failed(Trouble::NotServed)]),
        1 => Just(vec![Heard::Failed(Trouble::Other("away".to_owned()))]),
    ]
}

fn told() -> impl Strategy<Value = Vec<Told>> {
    let all = |heard: Vec<Heard<_>>, told: fn(Heard<_>) -> Told| heard.into_iter().map(told).collect::<Vec<_>>();
    prop_oneof![
        heard(|n| cluster(&format!("c{n}"), n.into())).prop_map(move |heard| all(heard, Told::Clusters)),
        heard(|n| gateway(n.into(), &format!("g{n}"), &format!("192.0.2.{n}")))
            .prop_map(|heard| heard.into_iter().map(Told::Gateways).collect()),
        heard(|n| advertisement(&format!("a{n}")))
            .prop_map(|heard| heard.into_iter().map(Told::Advertisements).collect()),
        heard(|_| node("w1", "192.0.2.9", &[])).prop_map(|heard| heard.into_iter().map(Told::OwnNode).collect()),
        Just(list(&[]).into_iter().map(Told::Policies).collect()),
        heard(|n| services(&format!("s{n}"), "10.96.0.0/16"))
            .prop_map(|heard| heard.into_iter().map(Told::ServiceCidrs).collect()),
        heard(|n| pool(&format!("p{n}"), "10.0.0.0/16"))
            .prop_map(|heard| heard.into_iter().map(Told::IpPools).collect()),
        heard(|_| cilium("w1", "10.0.1.0/24")).prop_map(|heard| heard.into_iter().map(cilium_nodes(1)).collect()),
    ]
}

fn kind(told: &Told) -> u8 {
    match told {
        Told::Clusters(_) => 0,
        Told::Advertisements(_) => 1,
        Told::Policies(_) => 2,
        Told::Gateways(_) => 3,
        Told::OwnNode(_) => 4,
        Told::Nodes(..) => 5,
        Told::ServiceCidrs(_) => 6,
        Told::IpPools(_) => 7,
        Told::CiliumNodes(..) => 8,
        Told::BlockAffinities(..) => 9,
    }
}

proptest! {
    #[test]
    fn the_order_of_different_kinds_changes_nothing(news in vec(told(), 0..30), picks in vec(any::<Index>(), 200)) {
        let news: Vec<Told> = news.into_iter().flatten().collect();
        let mut queues: BTreeMap<u8, std::collections::VecDeque<Told>> = BTreeMap::new();
        news.iter().for_each(|told| queues.entry(kind(told)).or_default().push_back(told.clone()));
        let mut other = View::new(String::new(), Some("w1".to_owned()));
        other.begin(1);
        for pick in picks.iter().cycle().take(news.len()) {
            let kinds: Vec<u8> = queues.keys().copied().collect();
            let chosen = *pick.get(&kinds);
            let queue = queues.get_mut(&chosen).unwrap();
            other.hear(Duration::ZERO, queue.pop_front().unwrap());
            if queue.is_empty() {
                queues.remove(&chosen);
            }
        }
        let mut view = View::new(String::new(), Some("w1".to_owned()));
        view.begin(1);
        news.into_iter().for_each(|told| _ = view.hear(Duration::ZERO, told));
        prop_assert_eq!(view.snapshot(), other.snapshot());
    }

    #[test]
    fn there_is_a_snapshot_from_the_first_one_on_and_no_news_without_being_told(news in vec(told(), 0..30)) {
        let mut view = View::new(String::new(), Some("w1".to_owned()));
        view.begin(1);
        for told in news.into_iter().flatten() {
            let before = view.snapshot();
            let changed = view.hear(Duration::ZERO, told);
            prop_assert!(before.is_err() || view.snapshot().is_ok());
            prop_assert!(changed || before == view.snapshot());
        }
    }

    #[test]
    fn what_fills_an_empty_mesh_is_the_whole_once_nothing_has_changed_for_a_while(
        news in vec((told(), 0..40u64), 0..30),
    ) {
        let mut view = View::new(String::new(), Some("w1".to_owned()));
        view.begin(1);
        tell(&mut view, Told::Clusters, list(&[]));
        let (mut now, mut since) = (Duration::ZERO, None);
        for (told, wait) in news {
            for told in told {
                let ours = kind(&told) < 4;
                let changed = view.hear(now, told) && ours;
                let known = view.clusters.objects().next().is_some();
                since = if (since.is_some() && changed) || (since.is_none() && known) { Some(now) } else { since };
            }
            now += Duration::from_secs(wait);
            view.tick(now);
            // From then on what is told is believed.
            if since.is_some_and(|since| since + FILLED <= now) {
                prop_assert_eq!(view.mesh, Mesh::Known);
                return Ok(());
            }
            prop_assert!(!view.snapshot().is_ok_and(|snapshot| snapshot.complete));
        }
    }

    #[test]
    fn a_view_that_lacks_anything_is_not_complete(news in vec(told(), 0..30)) {
        let mut view = synced();
        for told in news.into_iter().flatten() {
            view.hear(Duration::ZERO, told);
            let snapshot = view.snapshot().unwrap();
            let listed = [&view.gateways.store.is_complete(), &view.own.store.is_complete()];
            prop_assert!(!snapshot.complete || listed.iter().all(|complete| **complete));
            // What makes it incomplete is told.
            prop_assert!(snapshot.complete || !snapshot.problems.is_empty());
        }
    }
}
