//! This member's own cluster: its nodes, which of them hold slots, and where its pods live.
//!
//! Decided as the mesh is: in the order of names, a claim is accepted if it is well-formed and collides with nothing that
//! an earlier one holds. So every node of the cluster reads the same out of the same documents.
//!
//! Where a node's pods live, its CNI says first. A Node's own ranges may be nothing to that CNI, and nobody says so: they
//! count as well, but not where they lie across what the CNI gave another node.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use ipnetwork::IpNetwork;

use super::{
    Cluster, Kind, Member, Node, Place, Reason, Refusal, Refused,
    folder::{bad_key, slot},
    network,
    prefix::{self, Ranges, special},
    quoted, refusal,
};
use crate::{
    api::{
        MeshGateway, Objects,
        v1::{self, NodeAddress},
    },
    keys::PublicKey,
    names::{NodeName, Ordinal},
};

/// `None` if no document tells of nodes. `me`: this member, if it is one.
pub(super) fn read(objects: &Objects, me: Option<&Member>, refused: &mut Refused) -> Option<Cluster> {
    if objects.nodes.is_empty() && objects.gateways.is_empty() && objects.pods.is_empty() {
        return None;
    }
    let (nodes, held) = nodes(objects, refused);
    let gateways = gateways(&objects.gateways, &nodes, me, refused);
    let pods = pods(&objects.pods, &nodes, &held, refused);
    Some(Cluster { nodes, gateways, pods, pooled: !objects.ip_pools.is_empty() })
}

fn node_at(node: &v1::Node) -> Place<'_> {
    Place { kind: Kind::Node, name: &node.metadata.name }
}

/// Which node has which address, and which pod range.
#[derive(Default)]
struct Held {
    addresses: BTreeMap<IpAddr, NodeName>,
    ranges: Ranges<NodeName>,
}

/// The accepted nodes, and what they hold.
fn nodes(objects: &Objects, refused: &mut Refused) -> (BTreeMap<NodeName, Node>, Held) {
    let mut named: BTreeMap<&str, Vec<&v1::Node>> = BTreeMap::new();
    for object in &objects.nodes {
        named.entry(&object.metadata.name).or_default().push(object);
    }
    let mut nodes = BTreeMap::new();
    let mut accepted: Vec<(NodeName, &v1::Node)> = Vec::new();
    let mut held = Held::default();
    for (text, objects) in named {
        let at = Place { kind: Kind::Node, name: text };
        let Some(name) = refused.accept(at, "metadata.name", node_name(text)) else { continue };
        let [object] = objects[..] else {
            let message = format!("two Nodes are named {name}: neither is used until one is removed");
            refused.add(at, "metadata.name", refusal(Reason::DuplicateName, message));
            continue;
        };
        let hop = hop_addresses(object, &held.addresses, refused);
        if hop.is_empty() {
            let message = "has no usable InternalIP, so no other node can reach it: have the kubelet report one \
                           (--node-ip), or write it";
            refused.add(at, "status.addresses", refusal(Reason::NoInternalIP, message));
            continue;
        }
        held.addresses.extend(hop.iter().map(|address| (*address, name.clone())));
        nodes.insert(name.clone(), Node { hop, pods: BTreeSet::new() });
        accepted.push((name, object));
    }
    held.ranges = pod_ranges(objects, &accepted, &mut nodes, refused);
    (nodes, held)
}

fn node_name(text: &str) -> Result<NodeName, Refusal> {
    text.parse().map_err(|why| refusal(Reason::InvalidName, format!("{} is refused: {why}", quoted(text))))
}

/// The first usable InternalIP of each family.
fn hop_addresses(object: &v1::Node, held: &BTreeMap<IpAddr, NodeName>, refused: &mut Refused) -> BTreeSet<IpAddr> {
    let mut hop: BTreeSet<IpAddr> = BTreeSet::new();
    let internal = |(_, address): &(usize, &NodeAddress)| address.kind == "InternalIP";
    for (i, NodeAddress { address, .. }) in object.status.addresses.iter().enumerate().filter(internal) {
        let parsed = host(address).and_then(|ip| match held.get(&ip) {
            None => Ok(ip),
            Some(other) => {
                let message = format!("{ip} is the address of node {other}: give each node its own");
                Err(refusal(Reason::DuplicateAddress, message))
            }
        });
        let Some(ip) = refused.accept(node_at(object), format!("status.addresses[{i}].address"), parsed) else {
            continue;
        };
        if !hop.iter().any(|first| first.is_ipv4() == ip.is_ipv4()) {
            hop.insert(ip);
        }
    }
    hop
}

/// An address that a host can have.
fn host(text: &str) -> Result<IpAddr, Refusal> {
    let ip: IpAddr = text.parse().map_err(|_| {
        let message = format!("{} is no IP address: write it like 192.0.2.1 or 2001:db8::1", quoted(text));
        refusal(Reason::InvalidAddress, message)
    })?;
    match special(ip) {
        None => Ok(ip),
        Some((reason, what)) => Err(refusal(reason, format!("{ip} lies in {what}: name the one that others reach"))),
    }
}

/// Gives the nodes their pods' ranges; returns who holds which.
fn pod_ranges(
    objects: &Objects,
    accepted: &[(NodeName, &v1::Node)],
    nodes: &mut BTreeMap<NodeName, Node>,
    refused: &mut Refused,
) -> Ranges<NodeName> {
    let mut by_cni: Ranges<NodeName> = Ranges::default();
    for given in network::given(objects) {
        // What a node has left behind that is gone lives nowhere.
        let Ok(name) = known(given.node, nodes) else { continue };
        let parsed = prefix::parse(given.range).and_then(|range| free(range, &name, &by_cni));
        if let Some(range) = refused.accept(given.at, given.field, parsed) {
            nodes.entry(name.clone()).and_modify(|node| _ = node.pods.insert(range));
            by_cni.insert(range, name);
        }
    }
    let mut held = by_cni.clone();
    for (name, object) in accepted {
        let listed = object.spec.pod_cidrs.iter().enumerate().map(|(i, text)| (format!("spec.podCIDRs[{i}]"), text));
        let first = Some(("spec.podCIDR".to_owned(), &object.spec.pod_cidr));
        let first = first.filter(|(_, text)| object.spec.pod_cidrs.is_empty() && !text.is_empty());
        for (field, text) in listed.chain(first) {
            let parsed = prefix::parse(text);
            if parsed.as_ref().is_ok_and(|range| free(*range, name, &by_cni).is_err()) {
                continue;
            }
            let parsed = parsed.and_then(|range| free(range, name, &held));
            if let Some(range) = refused.accept(node_at(object), field, parsed) {
                nodes.entry(name.clone()).and_modify(|node| _ = node.pods.insert(range));
                held.insert(range, name.clone());
            }
        }
    }
    held
}

/// The range, if no other node holds any of it.
fn free(range: IpNetwork, name: &NodeName, held: &Ranges<NodeName>) -> Result<IpNetwork, Refusal> {
    match held.all_overlapping(range).find(|(_, holder)| holder != name) {
        None => Ok(range),
        Some((other, holder)) => {
            let message = format!("{range} overlaps {other} of node {holder}: give each node pod ranges of its own");
            Err(refusal(Reason::HeldByAnother, message))
        }
    }
}

/// The node of that name, if it is accepted.
fn known(text: &str, nodes: &BTreeMap<NodeName, Node>) -> Result<NodeName, Refusal> {
    let name = node_name(text)?;
    if nodes.contains_key(&name) {
        return Ok(name);
    }
    let message = format!("no Node named {name} is accepted: this waits until one is");
    Err(refusal(Reason::UnknownNode, message))
}

/// Who holds which slot: the lower ordinal first, then the node's name.
fn gateways(
    objects: &[MeshGateway],
    nodes: &BTreeMap<NodeName, Node>,
    me: Option<&Member>,
    refused: &mut Refused,
) -> BTreeMap<Ordinal, NodeName> {
    let mut claims: Vec<(Ordinal, NodeName, &MeshGateway)> = Vec::new();
    for object in objects {
        let at = gateway_at(object);
        let ordinal = refused.accept(at, "spec.ordinal", slot(object.spec.ordinal));
        let node = refused.accept(at, "spec.node", known(&object.spec.node, nodes));
        let named = ordinal.is_none_or(|ordinal| at.name == ordinal.to_string());
        if !named {
            let message = format!("{} is not spec.ordinal: name the object after its slot", quoted(at.name));
            refused.add(at, "metadata.name", refusal(Reason::InvalidName, message));
        }
        claims.extend(ordinal.zip(node).filter(|_| named).map(|(ordinal, node)| (ordinal, node, object)));
    }
    claims.sort_by(|a, b| (a.0, &a.1).cmp(&(b.0, &b.1)));

    let mut gateways: BTreeMap<Ordinal, NodeName> = BTreeMap::new();
    let mut holders: BTreeMap<NodeName, Ordinal> = BTreeMap::new();
    for (ordinal, node, object) in claims {
        let at = gateway_at(object);
        if let Some(holder) = gateways.get(&ordinal) {
            let message = format!("node {holder} holds slot {ordinal} already: remove one of the two");
            refused.add(at, "spec.ordinal", refusal(Reason::DuplicateOrdinal, message));
            continue;
        }
        if let Some(slot) = holders.get(&node) {
            let message = format!("node {node} holds slot {slot} already, and a node holds one: name another node");
            refused.add(at, "spec.node", refusal(Reason::DuplicateSlot, message));
            continue;
        }
        // The slot is held all the same: in a rotation the folder and this object change one after the other.
        refused.accept(at, "spec.publicKey", named_key(ordinal, &object.spec.public_key, me));
        for (i, text) in object.spec.hop_addresses.iter().enumerate() {
            let parsed = host(text).and_then(|ip| of_node(ip, &node, nodes));
            refused.accept(at, format!("spec.hopAddresses[{i}]"), parsed);
        }
        holders.insert(node.clone(), ordinal);
        gateways.insert(ordinal, node);
    }
    gateways
}

fn gateway_at(gateway: &MeshGateway) -> Place<'_> {
    Place { kind: Kind::MeshGateway, name: gateway.metadata.name.as_deref().unwrap_or_default() }
}

/// The slot's key is the one by which the other members know it. A message never holds the text: somebody may have put
/// the private key there.
fn named_key(ordinal: Ordinal, text: &str, me: Option<&Member>) -> Result<(), Refusal> {
    let key: PublicKey = text.parse().map_err(bad_key)?;
    let Some(me) = me else { return Ok(()) };
    match me.gateways.get(&ordinal) {
        Some(gateway) if gateway.key == key => Ok(()),
        Some(_) => {
            let message = format!(
                "{key} is not the key that this cluster's MeshCluster names for slot {ordinal}: put it there, or the other one here"
            );
            Err(refusal(Reason::NotInMesh, message))
        }
        None => {
            let message = format!(
                "this cluster's MeshCluster names no gateway with ordinal {ordinal}: add it there with this key"
            );
            Err(refusal(Reason::NotInMesh, message))
        }
    }
}

fn of_node(ip: IpAddr, name: &NodeName, nodes: &BTreeMap<NodeName, Node>) -> Result<(), Refusal> {
    if nodes.get(name).is_some_and(|node| node.hop.contains(&ip)) {
        return Ok(());
    }
    let message =
        format!("{ip} is not the first InternalIP of Node {name}, which is used instead: correct one of them");
    Err(refusal(Reason::ForeignAddress, message))
}

/// Pods whose address lies in no node's range, by that address.
fn pods(
    objects: &[v1::Pod],
    nodes: &BTreeMap<NodeName, Node>,
    held: &Held,
    refused: &mut Refused,
) -> BTreeMap<IpAddr, NodeName> {
    let mut named: Vec<(String, &v1::Pod)> = objects.iter().map(|pod| (pod.full_name(), pod)).collect();
    named.sort_by(|a, b| (&a.0, &a.1.spec.node_name).cmp(&(&b.0, &b.1.spec.node_name)));
    let mut pods: BTreeMap<IpAddr, NodeName> = BTreeMap::new();
    for (name, pod) in &named {
        let at = Place { kind: Kind::Pod, name };
        let ended = matches!(pod.status.phase.as_str(), "Succeeded" | "Failed");
        let addresses = addresses(pod);
        if pod.spec.host_network || ended || pod.spec.node_name.is_empty() || addresses.is_empty() {
            continue;
        }
        let Some(node) = refused.accept(at, "spec.nodeName", known(&pod.spec.node_name, nodes)) else { continue };
        for (field, text) in addresses {
            let parsed = host(text).and_then(|ip| single(ip, &node, held, &pods));
            let address = refused.accept(at, field, parsed).flatten();
            pods.extend(address.map(|address| (address, node.clone())));
        }
    }
    pods
}

fn addresses(pod: &v1::Pod) -> Vec<(String, &str)> {
    let listed = pod.status.pod_ips.iter().enumerate();
    let listed: Vec<_> = listed.map(|(i, ip)| (format!("status.podIPs[{i}].ip"), ip.ip.as_str())).collect();
    if listed.is_empty() && !pod.status.pod_ip.is_empty() {
        return vec![("status.podIP".to_owned(), &pod.status.pod_ip)];
    }
    listed
}

/// The address, if it says where a pod lives that no range covers.
fn single(
    ip: IpAddr,
    node: &NodeName,
    held: &Held,
    pods: &BTreeMap<IpAddr, NodeName>,
) -> Result<Option<IpAddr>, Refusal> {
    if let Some((range, holder)) = held.ranges.overlapping(IpNetwork::from(ip)) {
        if holder == node {
            return Ok(None);
        }
        let message = format!("{ip} lies in {range} of node {holder}, and is taken to live there: correct one of them");
        return Err(refusal(Reason::HeldByAnother, message));
    }
    if let Some(holder) = held.addresses.get(&ip) {
        let message = format!("{ip} is the address of node {holder}: only a pod of the host's network has it");
        return Err(refusal(Reason::DuplicateAddress, message));
    }
    match pods.get(&ip) {
        Some(holder) if holder != node => {
            let message = format!("{ip} is the address of another pod, on node {holder}: remove the one that is gone");
            Err(refusal(Reason::DuplicateAddress, message))
        }
        _ => Ok(Some(ip)),
    }
}
