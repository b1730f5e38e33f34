//! What holds for every folder.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use proptest::{
    collection::{btree_map, vec},
    option,
    prelude::*,
    sample::select,
};

use super::*;
use crate::{
    api::network::{IpPoolSpec, ServiceCidrSpec},
    intent::{
        folder::{may_be_named, supported},
        prefix::{self, Ranges, covers},
    },
};

const NAMES: [&str; 7] = ["aa", "bb", "cc", "dd", "ee", "ff", "No"];
const RANGES: [&str; 14] = [
    "10.0.0.0/8",
    "10.0.0.0/9",
    "10.1.0.0/16",
    "10.1.2.0/24",
    "10.1.3.0/24",
    "10.2.0.0/16",
    "10.200.0.0/16",
    "10.255.255.255/32",
    "fd00::/32",
    "fd00:0:1::/48",
    "fd00:0:1:2::/64",
    "10.1.0.1/16",
    "0.0.0.0/0",
    "pods",
];
const ENDPOINTS: [&str; 5] = ["a.example:1", "192.0.2.1:65528", "[2001:db8::1]:1", "b.mesh.internal:1", "192.0.2.1:0"];

fn texts(pool: &'static [&'static str], at_most: usize) -> impl Strategy<Value = Vec<String>> {
    vec(select(pool).prop_map(str::to_owned), 0..=at_most)
}

fn any_gateway() -> impl Strategy<Value = GatewaySpec> {
    let key = prop_oneof![9 => (b'A'..b'I').prop_map(key), 1 => Just("no key".to_owned())];
    let ordinal = prop_oneof![9 => 0..4i64, 1 => Just(8)];
    (ordinal, key, texts(&ENDPOINTS, 3)).prop_map(|(ordinal, public_key, endpoints)| GatewaySpec {
        ordinal,
        public_key,
        endpoints,
    })
}

fn any_cluster() -> impl Strategy<Value = MeshClusterSpec> {
    let rarely = |list: &'static [&'static str]| prop_oneof![15 => Just(Vec::new()), 1 => texts(list, 1)];
    let everything = vec!["10.0.0.0/8".to_owned(), "fd00::/32".to_owned()];
    let allowed = prop_oneof![2 => Just(everything), 1 => texts(&RANGES, 4)];
    let keepalive = option::weighted(0.2, select(vec![0, 25, 65536]));
    let parts = (vec(any_gateway(), 0..4), allowed, keepalive, rarely(&["mn.internal"]), rarely(&NAMES));
    (0..8i64, parts).prop_map(|(id, (gateways, allowed_cidrs, persistent_keepalive_seconds, dns_aliases, via))| {
        MeshClusterSpec { id, gateways, allowed_cidrs, persistent_keepalive_seconds, dns_aliases, via }
    })
}

fn any_route() -> impl Strategy<Value = AdvertisedRoute> {
    let kind = prop_oneof![9 => Just("Pod"), 1 => select(vec!["Service", "pod"])];
    let exported_as = option::weighted(0.1, Just("100.64.0.0/16".to_owned()));
    (select(&RANGES[..]), kind, exported_as).prop_map(|(cidr, kind, exported_as)| AdvertisedRoute {
        cidr: cidr.to_owned(),
        kind: kind.to_owned(),
        exported_as,
    })
}

fn any_advertisement() -> impl Strategy<Value = RouteAdvertisementSpec> {
    let to = prop_oneof![1 => Just(Vec::new()), 1 => texts(&NAMES, 4)];
    (select(&NAMES[..]), to, vec(any_route(), 0..6)).prop_map(|(cluster, to, routes)| RouteAdvertisementSpec {
        cluster: cluster.to_owned(),
        to,
        routes,
    })
}

/// Folders in which much collides. Advertisements have names of their own, as everywhere; a member may not.
fn any_objects() -> impl Strategy<Value = Objects> {
    let names = (Just(NAMES.to_vec()).prop_shuffle(), option::weighted(0.1, select(&NAMES[..])));
    let wrong = select(vec!["N.routes", "NAME-N", "ff.N", "NAME.0N", "NAME.6N4", "oN"]);
    let called = prop_oneof![9 => Just("NAME.N"), 1 => wrong];
    (names, vec(any_cluster(), 0..8), vec((called, any_advertisement()), 0..12)).prop_map(
        |((names, twice), specs, advertised)| {
            let cluster = |(name, spec)| MeshCluster { metadata: named(name), spec, status: None };
            let advertisement = |(i, (name, spec)): (usize, (&str, RouteAdvertisementSpec))| {
                // Wrong ones stand beside the right ones, and none twice.
                let name = name.replace("NAME", &spec.cluster).replace('N', &(i + 1).to_string());
                RouteAdvertisement { metadata: named(&name), spec, status: None }
            };
            let clusters = twice.into_iter().chain(names).zip(specs).map(cluster).collect();
            let advertisements = advertised.into_iter().enumerate().map(advertisement).collect();
            Objects { clusters, advertisements, ..Objects::default() }
        },
    )
}

fn any_local() -> impl Strategy<Value = Local> {
    let cidrs = vec(select(&RANGES[..11]).prop_map(|range| range.parse().expect("a range")), 0..2);
    let api = option::of(select(vec!["10.1.2.3", "fd00:0:1::1", "192.0.2.1"]));
    (select(&NAMES[..6]), cidrs, api).prop_map(|(name, cidrs, api)| Local {
        cluster: name.parse().expect("a member"),
        cidrs,
        api_server: api.map(|ip| ip.parse().expect("an address")),
    })
}

fn any_pool() -> impl Strategy<Value = IpPool> {
    (select(&RANGES[..]), any::<bool>()).prop_map(|(range, disabled)| {
        let spec = IpPoolSpec { cidr: range.to_owned(), disabled };
        IpPool { metadata: meta("pool"), spec }
    })
}

/// What differs between clusters that hold the same folder.
fn stamped(metadata: &mut ObjectMeta, noise: u32) {
    let time = format!("20{:02}-01-01T00:00:00Z", noise % 100);
    let time: Time = serde_json::from_value(time.into()).expect("a time");
    metadata.creation_timestamp = Some(time);
    metadata.uid = Some(format!("{noise:08x}-0000-0000-0000-000000000000"));
    metadata.resource_version = Some(noise.to_string());
    metadata.generation = Some(i64::from(noise));
}

fn any_two_orders() -> impl Strategy<Value = (Objects, Objects)> {
    let orders = |o: Objects| {
        let shuffled = (Just(o.clusters.clone()).prop_shuffle(), Just(o.advertisements.clone()).prop_shuffle());
        (Just(o), shuffled, any::<u32>())
    };
    any_objects().prop_flat_map(orders).prop_map(|(objects, (mut clusters, mut advertisements), noise)| {
        for (i, cluster) in (0..).zip(&mut clusters) {
            stamped(&mut cluster.metadata, noise.wrapping_mul(i));
        }
        for (i, advertisement) in (0..).zip(&mut advertisements) {
            stamped(&mut advertisement.metadata, noise.wrapping_mul(i));
        }
        (objects, Objects { clusters, advertisements, ..Objects::default() })
    })
}

const ADDRESSES: [&str; 6] = ["192.0.2.1", "192.0.2.2", "2001:db8::1", "10.1.2.3", "127.0.0.1", "address"];

/// What CNIs say of nodes, each object with a name of its own.
fn any_network() -> impl Strategy<Value = Objects> {
    let node = || select(vec!["n1", "n2", "n3", "n4", "gone"]);
    let cilium = btree_map(node(), (texts(&RANGES, 2), texts(&RANGES, 2)), 0..4).prop_map(|nodes| {
        let nodes = nodes.into_iter().map(|(name, (pod_cidrs, pooled))| {
            let mut object = CiliumNode { metadata: meta(name), ..CiliumNode::default() };
            object.spec.ipam.pod_cidrs = pod_cidrs;
            object.spec.ipam.pools.allocated =
                pooled.into_iter().map(|range| CiliumAllocation { cidrs: vec![range] }).collect();
            object
        });
        nodes.collect::<Vec<_>>()
    });
    let state = prop_oneof![4 => Just("confirmed"), 1 => select(vec!["pending", "deleted", "type=virtual"])];
    let calico = btree_map(0..8u8, (select(&RANGES[..]), node(), state), 0..6).prop_map(|blocks| {
        let blocks = blocks.into_iter().map(|(n, (range, node, state))| block(&n.to_string(), range, node, &[state]));
        blocks.collect::<Vec<_>>()
    });
    (cilium, calico).prop_map(|(cilium_nodes, block_affinities)| Objects {
        cilium_nodes,
        block_affinities,
        ..Objects::default()
    })
}

/// Nodes, slots and pods among which much collides. Slots and pods have names of their own, nodes may not.
fn any_nodes() -> impl Strategy<Value = Objects> {
    let name = || select(vec!["n1", "n2", "n3", "n4", "N"]);
    let node = (name(), texts(&ADDRESSES, 4), texts(&RANGES, 2)).prop_map(|(name, addresses, pod_cidrs)| {
        let address = |address| v1::NodeAddress { kind: "InternalIP".to_owned(), address };
        let mut node = v1::Node::default();
        node.metadata.name = name.to_owned();
        node.spec.pod_cidrs = pod_cidrs;
        node.status.addresses = addresses.into_iter().map(address).collect();
        node
    });
    let slot = (prop_oneof![9 => Just(None), 1 => Just(Some(9))], name(), texts(&ADDRESSES[..4], 2));
    let slots = btree_map(0..6i64, slot, 0..4).prop_map(|slots| {
        let slots = slots.into_iter().map(|(name, (ordinal, node, hop_addresses))| {
            let (ordinal, node) = (ordinal.unwrap_or(name), node.to_owned());
            let spec = MeshGatewaySpec { ordinal, node, hop_addresses, public_key: key(b'A') };
            MeshGateway { metadata: named(&name.to_string()), spec, status: None }
        });
        slots.collect::<Vec<_>>()
    });
    let pods = btree_map(0..8u8, (name(), texts(&ADDRESSES, 2), option::weighted(0.1, Just("Failed"))), 0..6);
    let pods = pods.prop_map(|pods| {
        let pods = pods.into_iter().map(|(name, (node, ips, phase))| {
            let mut pod = v1::Pod::default();
            pod.metadata.name = name.to_string();
            pod.spec.node_name = node.to_owned();
            pod.status.pod_ips = ips.into_iter().map(|ip| v1::PodIp { ip }).collect();
            pod.status.phase = phase.unwrap_or("Running").to_owned();
            pod
        });
        pods.collect::<Vec<_>>()
    });
    (vec(node, 0..6), slots, pods, any_network()).prop_map(|(nodes, gateways, pods, network)| Objects {
        nodes,
        gateways,
        pods,
        ..network
    })
}

/// Takes every refused claim out of the nodes' documents, and nothing else.
fn nodes_without(mut objects: Objects, refused: &[Rejection]) -> Objects {
    let is =
        |kind, name: &str, field: &str| refused.iter().any(|r| r.kind == kind && r.name == name && r.field == field);
    objects
        .nodes
        .retain(|n| !["metadata.name", "status.addresses"].iter().any(|f| is(Kind::Node, &n.metadata.name, f)));
    for node in &mut objects.nodes {
        let name = node.metadata.name.clone();
        keep(&mut node.status.addresses, |i| !is(Kind::Node, &name, &format!("status.addresses[{i}].address")));
        keep(&mut node.spec.pod_cidrs, |i| !is(Kind::Node, &name, &format!("spec.podCIDRs[{i}]")));
    }
    for object in &mut objects.cilium_nodes {
        let name = &object.metadata.name;
        let ipam = &mut object.spec.ipam;
        let good = |field: &str| !is(Kind::CiliumNode, name, field);
        keep(&mut ipam.pod_cidrs, |i| good(&format!("spec.ipam.podCIDRs[{i}]")));
        keep(&mut ipam.pools.allocated, |i| good(&format!("spec.ipam.pools.allocated[{i}].cidrs[0]")));
    }
    objects.block_affinities.retain(|block| !is(Kind::BlockAffinity, &block.metadata.name, "spec.cidr"));
    let slot = |gateway: &MeshGateway| gateway.metadata.name.clone().unwrap_or_default();
    let whole = ["metadata.name", "spec.ordinal", "spec.node"];
    objects.gateways.retain(|gateway| !whole.iter().any(|field| is(Kind::MeshGateway, &slot(gateway), field)));
    for gateway in &mut objects.gateways {
        let name = slot(gateway);
        keep(&mut gateway.spec.hop_addresses, |i| !is(Kind::MeshGateway, &name, &format!("spec.hopAddresses[{i}]")));
    }
    objects.pods.retain(|pod| !is(Kind::Pod, &pod.full_name(), "spec.nodeName"));
    for pod in &mut objects.pods {
        let name = pod.full_name();
        keep(&mut pod.status.pod_ips, |i| !is(Kind::Pod, &name, &format!("status.podIPs[{i}].ip")));
    }
    objects
}

/// Takes every refused claim out of the folder, and nothing else.
fn without(mut objects: Objects, refused: &[Rejection]) -> Objects {
    let is = |kind, name: &Option<String>, field: &str| {
        refused.iter().any(|r| r.kind == kind && Some(&r.name) == name.as_ref() && r.field == field)
    };
    let cluster_is = |c: &MeshCluster, field: &str| is(Kind::MeshCluster, &c.metadata.name, field);
    let fatal = ["metadata.name", "spec.id", "spec.via"];
    objects.clusters.retain(|c| !fatal.iter().any(|field| cluster_is(c, field)));
    for cluster in &mut objects.clusters {
        let at = cluster.clone();
        let spec = &mut cluster.spec;
        keep(&mut spec.allowed_cidrs, |i| !cluster_is(&at, &format!("spec.allowedCIDRs[{i}]")));
        for (i, gateway) in spec.gateways.iter_mut().enumerate() {
            keep(&mut gateway.endpoints, |j| !cluster_is(&at, &format!("spec.gateways[{i}].endpoints[{j}]")));
        }
        let bad = |i, part| cluster_is(&at, &format!("spec.gateways[{i}].{part}"));
        keep(&mut spec.gateways, |i| !bad(i, "ordinal") && !bad(i, "publicKey"));
        spec.persistent_keepalive_seconds.take_if(|_| cluster_is(&at, "spec.persistentKeepaliveSeconds"));
        spec.dns_aliases.retain(|_| !cluster_is(&at, "spec.dnsAliases"));
    }
    let route_is = |a: &RouteAdvertisement, field: &str| is(Kind::RouteAdvertisement, &a.metadata.name, field);
    objects.advertisements.retain(|a| !route_is(a, "metadata.name") && !route_is(a, "spec.cluster"));
    for advertisement in &mut objects.advertisements {
        let at = advertisement.clone();
        let spec = &mut advertisement.spec;
        keep(&mut spec.to, |i| !route_is(&at, &format!("spec.to[{i}]")));
        if spec.to.is_empty() && !at.spec.to.is_empty() {
            // There is no way to write "nobody"; a member's offer to itself is as good.
            spec.to.push(spec.cluster.clone());
        }
        let bad = |i, part| route_is(&at, &format!("spec.routes[{i}].{part}"));
        keep(&mut spec.routes, |i| !["cidr", "type", "exportedAs"].iter().any(|part| bad(i, part)));
    }
    // One that offers nothing is refused itself.
    objects.advertisements.retain(|a| !a.spec.routes.is_empty());
    objects
}

fn keep<T>(list: &mut Vec<T>, good: impl Fn(usize) -> bool) {
    let mut i = 0;
    list.retain(|_| {
        i += 1;
        good(i - 1)
    });
}

/// The mesh with nothing offered by a member to itself.
fn to_others(mut mesh: Mesh) -> Mesh {
    for (name, member) in &mut mesh.members {
        for route in member.routes.values_mut() {
            if let Offer::To(to) = &mut route.offered {
                to.remove(name);
            }
        }
    }
    mesh
}

/// First and last address: the plainest account of a range.
fn span(range: IpNetwork) -> (bool, IpAddr, IpAddr) {
    (range.is_ipv4(), range.network(), range.broadcast())
}

fn overlap(a: IpNetwork, b: IpNetwork) -> bool {
    let ((a4, a_first, a_last), (b4, b_first, b_last)) = (span(a), span(b));
    a4 == b4 && a_first <= b_last && b_first <= a_last
}

/// The names that a member's advertisements may have.
fn names_of(member: &str) -> BTreeSet<String> {
    (1..64).map(|n| format!("{member}.{n}")).chain([member.to_owned()]).collect()
}

/// Who holds what, by the definition: each claim in turn against every prefix that is held so far.
fn holders(objects: &Objects, mesh: &Mesh) -> BTreeMap<MemberName, BTreeSet<IpNetwork>> {
    let mut turn: Vec<(MemberId, &MemberName)> = mesh.members.iter().map(|(name, m)| (m.id, name)).collect();
    turn.sort();
    let mut held: BTreeMap<MemberName, BTreeSet<IpNetwork>> = BTreeMap::new();
    for (_, name) in turn {
        let cluster = objects.clusters.iter().find(|c| c.metadata.name.as_deref() == Some(name.as_str()));
        let allowed: Vec<IpNetwork> =
            cluster.iter().flat_map(|c| &c.spec.allowed_cidrs).flat_map(|t| prefix::parse(t)).collect();
        let names = names_of(name.as_str());
        let mine = |a: &&RouteAdvertisement| {
            a.spec.cluster == name.as_str() && a.metadata.name.as_ref().is_some_and(|own| names.contains(own))
        };
        let mine = objects.advertisements.iter().filter(mine);
        let claims = mine.flat_map(|a| &a.spec.routes).filter_map(|route| supported(route).ok());
        let free = |claim: &IpNetwork| !held.values().flatten().any(|other| overlap(*claim, *other));
        let allowed = |claim: &IpNetwork| allowed.iter().any(|allowed| covers(*allowed, *claim));
        let accepted = claims.filter(allowed).filter(free).collect();
        held.insert(name.clone(), accepted);
    }
    held
}

proptest! {
    /// Clusters agree, whatever order, times and identities they see.
    #[test]
    fn order_and_metadata_change_nothing((one, other) in any_two_orders(), local in any_local()) {
        let (mesh_one, refused_one) = mesh(&one, DOMAIN);
        let (mesh_other, refused_other) = mesh(&other, DOMAIN);
        prop_assert_eq!(&mesh_one, &mesh_other);
        prop_assert_eq!(refused_one, refused_other);
        prop_assert_eq!(Intent::new(&mesh_one, &one, &local), Intent::new(&mesh_other, &other, &local));
    }

    /// Nor do a cluster's own nodes disagree about it.
    #[test]
    fn the_order_of_nodes_changes_nothing(
        (one, other) in any_nodes().prop_flat_map(|o| {
            let shuffled = (Just(o.nodes.clone()).prop_shuffle(), Just(o.gateways.clone()).prop_shuffle(), Just(o.pods.clone()).prop_shuffle());
            let network = (Just(o.cilium_nodes.clone()).prop_shuffle(), Just(o.block_affinities.clone()).prop_shuffle());
            let other = (shuffled, network).prop_map(|((nodes, gateways, pods), (cilium_nodes, block_affinities))| {
                Objects { nodes, gateways, pods, cilium_nodes, block_affinities, ..Objects::default() }
            });
            (Just(o), other)
        })
    ) {
        prop_assert_eq!(nodes(&one), nodes(&other));
    }

    #[test]
    fn a_refused_node_slot_or_pod_changes_nothing_else(objects in any_nodes()) {
        let (all, refused) = nodes(&objects);
        let (good, still_refused) = nodes(&nodes_without(objects, &refused));
        prop_assert_eq!(all.unwrap_or_default(), good.unwrap_or_default());
        prop_assert_eq!(still_refused, vec![]);
    }

    #[test]
    fn addresses_ranges_and_slots_have_one_node(objects in any_nodes()) {
        let Some(cluster) = nodes(&objects).0 else { return Ok(()) };
        for (a, one) in &cluster.nodes {
            prop_assert!(!one.hop.is_empty() && one.hop.len() <= 2);
            prop_assert!(one.hop.iter().filter(|address| address.is_ipv4()).count() <= 1);
            for (_, other) in cluster.nodes.iter().filter(|(b, _)| *b > a) {
                prop_assert!(one.hop.is_disjoint(&other.hop));
                prop_assert!(one.pods.iter().all(|p| other.pods.iter().all(|q| !overlap(*p, *q))));
            }
        }
        let holders: BTreeSet<&NodeName> = cluster.gateways.values().collect();
        prop_assert_eq!(holders.len(), cluster.gateways.len());
        prop_assert!(holders.iter().all(|node| cluster.nodes.contains_key(*node)));
        for (address, node) in &cluster.pods {
            prop_assert!(cluster.nodes.contains_key(node));
            let elsewhere = |n: &Node| n.hop.contains(address) || n.pods.iter().any(|range| range.contains(*address));
            prop_assert!(!cluster.nodes.values().any(elsewhere), "{address}");
        }
    }

    /// Where the CNI says that a node's pods are, they are, whatever Nodes say of themselves; nor is a Node blamed for it.
    #[test]
    fn the_cni_s_word_stands_before_the_nodes_own(objects in any_nodes()) {
        let mut silent = objects.clone();
        silent.nodes.iter_mut().for_each(|node| node.spec.pod_cidrs.clear());
        let (said, refused) = nodes(&objects);
        let (by_cni, _) = nodes(&silent);
        let (said, by_cni) = (said.unwrap_or_default(), by_cni.unwrap_or_default());
        for (name, node) in &by_cni.nodes {
            prop_assert!(node.pods.is_subset(&said.nodes[name].pods), "{}", name);
        }
        for rejection in refused.iter().filter(|one| one.kind == Kind::Node && one.reason == Reason::HeldByAnother) {
            let range = rejection.message.split(' ').next().expect("the range").parse().expect("a range");
            let others = by_cni.nodes.iter().filter(|(name, _)| name.as_str() != rejection.name);
            prop_assert!(!others.flat_map(|(_, node)| &node.pods).any(|held| overlap(*held, range)), "{}", rejection);
        }
    }

    /// And without the refused claims nothing is refused.
    #[test]
    fn a_refused_claim_changes_nothing_else(objects in any_objects()) {
        let (all, refused) = mesh(&objects, DOMAIN);
        let (good, still_refused) = mesh(&without(objects, &refused), DOMAIN);
        prop_assert_eq!(to_others(all), to_others(good));
        prop_assert_eq!(still_refused, vec![]);
    }

    #[test]
    fn prefixes_are_held_as_defined(objects in any_objects()) {
        let (mesh, _) = mesh(&objects, DOMAIN);
        let held = mesh.members.iter().map(|(name, member)| (name.clone(), member.routes.keys().copied().collect()));
        prop_assert_eq!(held.collect::<BTreeMap<MemberName, BTreeSet<IpNetwork>>>(), holders(&objects, &mesh));
    }

    /// Also where a wider range comes after a narrower one.
    #[test]
    fn ranges_find_every_overlap(ranges in vec(select(&RANGES[..11]), 0..8), asked in select(&RANGES[..11])) {
        let ranges: Vec<IpNetwork> = ranges.iter().map(|range| range.parse().expect("a range")).collect();
        let asked: IpNetwork = asked.parse().expect("a range");
        let mut held = Ranges::default();
        ranges.iter().for_each(|range| held.insert(*range, *range));
        let found = held.overlapping(asked).map(|(_, range)| *range);
        prop_assert_eq!(found.is_some(), ranges.iter().any(|range| overlap(*range, asked)));
        let widest = ranges.iter().filter(|range| !ranges.iter().any(|outer| outer != *range && covers(*outer, **range)));
        let expected: BTreeSet<IpNetwork> = widest.copied().filter(|range| overlap(*range, asked)).collect();
        let all = held.all_overlapping(asked).map(|(range, _)| *range);
        prop_assert_eq!(all.collect::<Vec<_>>(), expected.into_iter().collect::<Vec<_>>());
        prop_assert!(found.is_none_or(|range| overlap(range, asked)));
    }

    /// What a member has is decided by those before it alone, so the lower id wins every conflict.
    #[test]
    fn later_members_take_nothing_from_earlier_ones(objects in any_objects(), last in 1..8i64) {
        let (all, _) = mesh(&objects, DOMAIN);
        let accepted: BTreeSet<Option<String>> = all.members.keys().map(|name| Some(name.to_string())).collect();
        let mut fewer = objects;
        fewer.clusters.retain(|c| accepted.contains(&c.metadata.name) && c.spec.id <= last);
        let (fewer, _) = mesh(&fewer, DOMAIN);
        let has = |member: &Member| (member.gateways.clone(), member.routes.keys().copied().collect::<Vec<_>>());
        for (name, member) in &all.members {
            if i64::from(member.id.get()) <= last {
                prop_assert_eq!(Some(has(member)), fewer.members.get(name).map(has), "{}", name);
            }
        }
    }

    #[test]
    fn ids_keys_and_prefixes_have_one_holder(objects in any_objects()) {
        let (mesh, _) = mesh(&objects, DOMAIN);
        let ids: BTreeSet<MemberId> = mesh.members.values().map(|member| member.id).collect();
        prop_assert_eq!(ids.len(), mesh.members.len());
        let keys: Vec<PublicKey> = mesh.members.values().flat_map(|m| m.gateways.values()).map(|g| g.key).collect();
        prop_assert_eq!(keys.iter().collect::<BTreeSet<_>>().len(), keys.len());
        for (a, one) in &mesh.members {
            for (b, other) in mesh.members.iter().filter(|(b, _)| *b > a) {
                for (p, q) in one.routes.keys().flat_map(|p| other.routes.keys().map(move |q| (p, q))) {
                    prop_assert!(!overlap(*p, *q), "{} of {} and {} of {}", p, a, q, b);
                }
            }
        }
    }

    /// Nor does a view add anything to the mesh but what it leaves out.
    #[test]
    fn a_view_holds_nothing_that_this_cluster_uses(
        objects in any_objects(), network in any_network(), local in any_local(), services in texts(&RANGES, 1), pool in any_pool(),
    ) {
        let service_cidrs = services.iter().map(|range| {
            let spec = ServiceCidrSpec { cidrs: vec![range.clone()] };
            ServiceCidr { metadata: meta("kubernetes"), spec }
        });
        let Objects { cilium_nodes, block_affinities, .. } = network;
        let (service_cidrs, ip_pools) = (service_cidrs.collect(), vec![pool]);
        let objects = Objects { cilium_nodes, block_affinities, service_cidrs, ip_pools, ..objects };
        let (mesh, _) = mesh(&objects, DOMAIN);
        let (intent, refused) = Intent::new(&mesh, &objects, &local);
        let advertised = objects.advertisements.iter().filter(|a| a.spec.cluster == local.cluster.as_str());
        let mut own: Vec<IpNetwork> =
            advertised.flat_map(|a| &a.spec.routes).filter_map(|r| prefix::parse(&r.cidr).ok()).collect();
        // What it may not have is not its own.
        let is_mine = |c: &&MeshCluster| c.metadata.name.as_deref() == Some(local.cluster.as_str());
        if objects.clusters.iter().any(|c| is_mine(&c)) {
            let texts = objects.clusters.iter().filter(is_mine).flat_map(|c| &c.spec.allowed_cidrs);
            let allowed: Vec<IpNetwork> = texts.filter_map(|text| prefix::parse(text).ok()).collect();
            own.retain(|range| allowed.iter().any(|outer| covers(*outer, *range)));
        }
        own.extend(&local.cidrs);
        let blocks = objects.block_affinities.iter().map(|block| &block.spec);
        let blocks = blocks.filter(|spec| spec.kind.is_empty() && spec.state == "confirmed" && spec.deleted == "false");
        let cilium = objects.cilium_nodes.iter().map(|node| &node.spec.ipam);
        let cilium = cilium.flat_map(|ipam| ipam.pod_cidrs.iter().chain(ipam.pools.allocated.iter().flat_map(|pool| &pool.cidrs)));
        let pools = objects.ip_pools.iter().filter(|pool| !pool.spec.disabled).map(|pool| &pool.spec.cidr);
        let network = services.iter().chain(blocks.map(|spec| &spec.cidr)).chain(cilium).chain(pools);
        own.extend(network.filter_map(|text| prefix::parse(text).ok()));
        own.extend(local.api_server.map(IpNetwork::from));
        let mut missing = 0;
        for (name, member) in &mesh.members {
            let seen = &intent.members[name];
            if name == &local.cluster {
                prop_assert_eq!(seen, member);
                continue;
            }
            for (range, route) in &member.routes {
                let offered = route.offered.includes(&local.cluster);
                let collides = own.iter().any(|own| overlap(*own, *range));
                prop_assert_eq!(seen.routes.contains_key(range), offered && !collides, "{} of {}", range, name);
                missing += usize::from(offered && collides);
            }
        }
        prop_assert!(missing == 0 || !refused.is_empty());
        prop_assert_eq!(intent.members.len(), mesh.members.len());
    }

    /// Whatever is written, there is an answer, and it fits on one line of a terminal.
    #[test]
    fn garbage_is_refused_in_one_line(
        text in any::<String>(), range in "[0-9a-f:./ ]{0,30}", endpoint in "[0-9a-zA-Z:.%\\[\\]-]{0,30}", n in any::<i64>(),
    ) {
        let mut cluster = MeshCluster::new("mn", MeshClusterSpec::default());
        cluster.metadata.name = Some(text.clone());
        let gateway = |endpoint: &String| GatewaySpec { ordinal: n, public_key: text.clone(), endpoints: vec![endpoint.clone()] };
        let mut good = MeshCluster::new("mn", MeshClusterSpec { id: 1, ..MeshClusterSpec::default() });
        good.spec.gateways = vec![gateway(&text), GatewaySpec { public_key: key(b'A'), ordinal: 0, endpoints: vec![endpoint, text.clone()] }];
        good.spec.allowed_cidrs = vec![range.clone(), text.clone()];
        good.spec.persistent_keepalive_seconds = Some(n);
        cluster.spec = MeshClusterSpec { id: n, ..good.spec.clone() };
        let route = |cidr: &String| AdvertisedRoute { cidr: cidr.clone(), kind: "Pod".into(), exported_as: None };
        let routes = vec![route(&range), route(&text), AdvertisedRoute { kind: text.clone(), ..route(&range) }];
        let spec = RouteAdvertisementSpec { cluster: "mn".into(), to: vec![text.clone()], routes };
        let unknown = RouteAdvertisementSpec { cluster: text.clone(), ..spec.clone() };
        let objects = Objects {
            clusters: vec![cluster, good],
            advertisements: vec![RouteAdvertisement::new("mn", spec), RouteAdvertisement::new(&text, unknown)],
            ..Objects::default()
        };
        let (mesh, mut refused) = mesh(&objects, &text);
        let local = Local { cluster: "va".parse().expect("a label"), cidrs: vec![], api_server: None };
        refused.extend(Intent::new(&mesh, &objects, &local).1);
        prop_assert!(!refused.is_empty());
        for rejection in refused {
            prop_assert!(!rejection.to_string().contains(char::is_control), "{:?}", rejection);
        }
    }
}

/// However many are made, a member has no more of them than a node can bear, and none has a name of another's.
#[test]
fn a_member_has_64_names_for_advertisements() {
    let names = |cluster: &str| -> BTreeSet<String> {
        let prefixes = ["mn", "mn.", "mn.x", "mn.0", "mn.+", "mnn.", "va", "va.", "m", ".", ""];
        let all = prefixes.iter().flat_map(|prefix| {
            let numbered = (0..20_000).map(move |number| format!("{prefix}{number}"));
            numbered.chain([(*prefix).to_owned()])
        });
        all.filter(|name| may_be_named(name, cluster).is_ok()).collect()
    };
    for cluster in ["mn", "va"] {
        assert_eq!(names(cluster), names_of(cluster));
    }
}

/// As large as the design goes.
#[test]
fn a_thousand_members_with_64_routes_each() {
    let mut objects = Objects::default();
    for i in 0..1000 {
        let allowed_cidrs = vec![format!("{}.{}.0.0/16", 11 + i / 256, i % 256)];
        let routes = (0..64).map(|j| format!("{}.{}.{j}.0/24", 11 + i / 256, i % 256));
        let routes = routes.map(|cidr| AdvertisedRoute { cidr, kind: "Pod".into(), exported_as: None }).collect();
        let spec = MeshClusterSpec { id: i + 1, allowed_cidrs, ..MeshClusterSpec::default() };
        objects.clusters.push(MeshCluster::new(&format!("m{i}"), spec));
        let spec = RouteAdvertisementSpec { cluster: format!("m{i}"), to: vec![], routes };
        objects.advertisements.push(RouteAdvertisement::new(&format!("m{i}"), spec));
    }
    let (mesh, refused) = mesh(&objects, DOMAIN);
    assert_eq!(refused, vec![]);
    assert_eq!(mesh.members.values().map(|member| member.routes.len()).sum::<usize>(), 64_000);
}
