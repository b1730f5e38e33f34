//! One member's view: what the others claim must not collide with what this cluster uses itself.

use std::collections::{BTreeMap, BTreeSet};

use ipnetwork::IpNetwork;

use super::{
    Cluster, Intent, Local, Member, Mesh, Reason, Refusal, Refused, cluster,
    folder::{advertisement_at, cluster_at, supported},
    network,
    prefix::{self, Ranges},
    refusal,
};
use crate::{
    api::{MeshCluster, Objects, RouteAdvertisement, limits},
    keys::PublicKey,
    names::{MemberName, Ordinal},
};

pub(super) fn take(mesh: &Mesh, objects: &Objects, local: &Local, refused: &mut Refused) -> Intent {
    let me = &local.cluster;
    let mut members = offered(mesh, me);
    let cluster = cluster::read(objects, members.get(me), refused);
    let own = own_ranges(objects, local, cluster.as_ref(), refused);
    for (name, range) in colliding_ranges(&members, objects, local, &own, refused) {
        members.get_mut(&name).and_then(|member| member.routes.remove(&range));
    }
    for (name, ordinal) in stolen_keys(&members, objects, me, refused) {
        members.get_mut(&name).and_then(|member| member.gateways.remove(&ordinal));
    }
    Intent { me: me.clone(), members, cluster }
}

/// The members, the others without the routes that they do not offer to `me`.
fn offered(mesh: &Mesh, me: &MemberName) -> BTreeMap<MemberName, Member> {
    let mut members = mesh.members.clone();
    for (name, member) in &mut members {
        if name != me {
            member.routes.retain(|_, route| route.offered.includes(me));
        }
    }
    members
}

/// What this cluster uses itself, and how it is known. A range that it advertises and cannot offer (another holds it, it
/// is a Service's, the advertisement's name is wrong) counts; one outside its own allowedCIDRs is a mistake, and must cost
/// nobody else a route.
fn own_ranges(objects: &Objects, local: &Local, cluster: Option<&Cluster>, refused: &mut Refused) -> Ranges<String> {
    // All that bear its name: two are refused both, and neither comes first.
    let mine: Vec<_> = objects.clusters.iter().filter(|c| cluster_at(c).name == local.cluster.as_str()).collect();
    let allowed: Vec<IpNetwork> = mine.iter().flat_map(|cluster| allowed(cluster)).collect();
    // Before it is a member nothing bounds it.
    let may_have = |range: &IpNetwork| mine.is_empty() || allowed.iter().any(|outer| prefix::covers(*outer, *range));
    let given = network::given(objects);
    let mut own = network::used(&given, objects, refused);
    for advertisement in of(objects, &local.cluster) {
        let known = format!("RouteAdvertisement {}", advertisement_at(advertisement).name.escape_debug());
        let routes = advertisement.spec.routes.iter().take(limits::ROUTES);
        let ranges = routes.filter_map(|route| prefix::parse(&route.cidr).ok()).filter(may_have);
        own.extend(ranges.map(|range| (range, known.clone())));
    }
    own.extend(local.cidrs.iter().map(|range| (*range, "--local-cidr".to_owned())));
    let given: BTreeSet<&str> = given.iter().map(|given| given.node).collect();
    for (name, node) in cluster.iter().flat_map(|cluster| &cluster.nodes) {
        let known = || format!("Node {name}");
        own.extend(node.hop.iter().map(|address| (IpNetwork::from(*address), known())));
        // Where the CNI says what it uses, a range that Kubernetes gave the node as well may be nobody's.
        if !given.contains(name.as_str()) && !cluster.is_some_and(|cluster| cluster.pooled) {
            own.extend(node.pods.iter().map(|range| (*range, known())));
        }
    }
    let mut ranges = Ranges::default();
    for (range, known) in own {
        ranges.insert(range, known);
    }
    ranges
}

fn allowed(cluster: &MeshCluster) -> impl Iterator<Item = IpNetwork> {
    cluster.spec.allowed_cidrs.iter().take(limits::ALLOWED_CIDRS).filter_map(|text| prefix::parse(text).ok())
}

fn of<'a>(objects: &'a Objects, member: &MemberName) -> impl Iterator<Item = &'a RouteAdvertisement> {
    objects.advertisements.iter().filter(move |advertisement| advertisement.spec.cluster == member.as_str())
}

/// The routes of others that must not be used here; each place that claims one is told.
fn colliding_ranges(
    members: &BTreeMap<MemberName, Member>,
    objects: &Objects,
    local: &Local,
    own: &Ranges<String>,
    refused: &mut Refused,
) -> BTreeSet<(MemberName, IpNetwork)> {
    let me = local.cluster.as_str();
    let mut colliding = BTreeSet::new();
    for advertisement in &objects.advertisements {
        let spec = &advertisement.spec;
        let offered = spec.to.is_empty() || spec.to.iter().take(limits::TO).any(|name| name == me);
        let Some((name, member)) =
            spec.cluster.parse().ok().and_then(|name| members.get_key_value::<MemberName>(&name))
        else {
            continue;
        };
        if name == &local.cluster || !offered {
            continue;
        }
        for (i, route) in spec.routes.iter().take(limits::ROUTES).enumerate() {
            let Some(range) = supported(route).ok().filter(|range| member.routes.contains_key(range)) else { continue };
            if let Err(refusal) = collision(range, own, local) {
                refused.add(advertisement_at(advertisement), format!("spec.routes[{i}].cidr"), refusal);
                colliding.insert((name.clone(), range));
            }
        }
    }
    colliding
}

fn collision(range: IpNetwork, own: &Ranges<String>, local: &Local) -> Result<(), Refusal> {
    let me = &local.cluster;
    if let Some((other, known)) = own.overlapping(range) {
        let message = format!("{range} overlaps {other}, which {me} uses itself ({known}): one must use another range");
        return Err(refusal(Reason::OwnRange, message));
    }
    match local.api_server.filter(|ip| range.contains(*ip)) {
        None => Ok(()),
        Some(ip) => {
            let message = format!("{range} holds {ip}, the API server of {me}: leave that address out of the range");
            Err(refusal(Reason::ApiServer, message))
        }
    }
}

/// The gateways of others that carry a key of ours: to dial one would be to dial ourselves.
fn stolen_keys(
    members: &BTreeMap<MemberName, Member>,
    objects: &Objects,
    me: &MemberName,
    refused: &mut Refused,
) -> BTreeSet<(MemberName, Ordinal)> {
    let mine = objects.clusters.iter().filter(|cluster| cluster_at(cluster).name == me.as_str());
    let mine: BTreeSet<PublicKey> =
        mine.flat_map(|cluster| &cluster.spec.gateways).filter_map(|gateway| gateway.public_key.parse().ok()).collect();
    let mut stolen = BTreeSet::new();
    for cluster in &objects.clusters {
        let at = cluster_at(cluster);
        let Some((name, member)) = at.name.parse().ok().and_then(|name| members.get_key_value::<MemberName>(&name))
        else {
            continue;
        };
        if name == me {
            continue;
        }
        for (i, spec) in cluster.spec.gateways.iter().take(limits::GATEWAYS).enumerate() {
            let held = Ordinal::new(spec.ordinal).and_then(|o| member.gateways.get_key_value(&o));
            let key: Option<PublicKey> = spec.public_key.parse().ok();
            let Some((ordinal, gateway)) = held else { continue };
            if key == Some(gateway.key) && mine.contains(&gateway.key) {
                let message = format!("the key is one that MeshCluster {me} names as its own: give {name} its own key");
                refused.add(at, format!("spec.gateways[{i}].publicKey"), refusal(Reason::OwnKey, message));
                stolen.insert((name.clone(), *ordinal));
            }
        }
    }
    stolen
}
