//! What this cluster's network says of itself: the ranges of its services and of its CNI's pods.

use std::collections::BTreeSet;

use ipnetwork::IpNetwork;

use super::{Kind, Place, Refused, prefix};
use crate::api::{
    Objects,
    network::{BlockAffinity, CiliumNode, IpPool, ServiceCidr},
};

/// A range that a CNI says to be of a node's pods.
pub(super) struct Given<'a> {
    pub(super) at: Place<'a>,
    pub(super) field: String,
    pub(super) node: &'a str,
    pub(super) range: &'a str,
}

/// In the order in which they count.
pub(super) fn given(objects: &Objects) -> Vec<Given<'_>> {
    let nodes = objects.cilium_nodes.iter().flat_map(of_cilium);
    let mut given: Vec<Given<'_>> = nodes.chain(objects.block_affinities.iter().filter_map(of_calico)).collect();
    given.sort_by_key(|given| (given.at.kind, given.at.name));
    given
}

fn of_cilium(object: &CiliumNode) -> impl Iterator<Item = Given<'_>> {
    let name = object.metadata.name.as_str();
    let one = |(field, range)| Given { at: Place { kind: Kind::CiliumNode, name }, field, node: name, range };
    let ipam = &object.spec.ipam;
    let listed = ipam.pod_cidrs.iter().enumerate();
    let listed = listed.map(|(i, range)| (format!("spec.ipam.podCIDRs[{i}]"), range.as_str()));
    let pooled = ipam.pools.allocated.iter().enumerate().flat_map(|(i, pool)| {
        let field = move |j| format!("spec.ipam.pools.allocated[{i}].cidrs[{j}]");
        pool.cidrs.iter().enumerate().map(move |(j, range)| (field(j), range.as_str()))
    });
    listed.chain(pooled).map(one)
}

fn of_calico(object: &BlockAffinity) -> Option<Given<'_>> {
    let spec = &object.spec;
    let is_node_s = matches!(spec.kind.as_str(), "" | "host");
    let holds = is_node_s && spec.state == "confirmed" && spec.deleted != "true";
    let at = Place { kind: Kind::BlockAffinity, name: &object.metadata.name };
    holds.then(|| Given { at, field: "spec.cidr".to_owned(), node: &spec.node, range: &spec.cidr })
}

/// What services and the CNI's pods use, and which object says so. What cannot be read of those that belong to no node
/// is refused; the others', which `given` is, where the nodes are read.
pub(super) fn used(given: &[Given<'_>], objects: &Objects, refused: &mut Refused) -> BTreeSet<(IpNetwork, String)> {
    let known = |at: Place<'_>| format!("{:?} {}", at.kind, at.name.escape_debug());
    let mut used: BTreeSet<(IpNetwork, String)> = given
        .iter()
        .filter_map(|given| prefix::parse(given.range).ok().map(|range| (range, known(given.at))))
        .collect();
    let whole = objects.service_cidrs.iter().flat_map(of_services).chain(objects.ip_pools.iter().filter_map(of_pool));
    for (at, field, text) in whole {
        let range = refused.accept(at, field, prefix::parse(text));
        used.extend(range.map(|range| (range, known(at))));
    }
    used
}

fn of_services(object: &ServiceCidr) -> impl Iterator<Item = (Place<'_>, String, &str)> {
    let at = Place { kind: Kind::ServiceCIDR, name: &object.metadata.name };
    object.spec.cidrs.iter().enumerate().map(move |(i, range)| (at, format!("spec.cidrs[{i}]"), range.as_str()))
}

/// A disabled pool says nothing of who uses the range. What pods still have of it, its blocks say.
fn of_pool(object: &IpPool) -> Option<(Place<'_>, String, &str)> {
    let at = Place { kind: Kind::IPPool, name: &object.metadata.name };
    (!object.spec.disabled).then(|| (at, "spec.cidr".to_owned(), object.spec.cidr.as_str()))
}
