//! What the folder means: validated values, and every claim that was refused, with its reason.
//!
//! Two steps. [`mesh`] looks at the folder alone, so it says the same on every member: shapes, keys, ids, and who
//! holds which prefix. [`Intent::new`] then takes one member's view: what overlaps its own ranges is refused here and
//! nowhere else. Both are pure and total: a refused claim never stops the others, and changes nothing else.
//!
//! Claims are decided in the order of (id, name), the same everywhere: a claim is accepted if it is well-formed and
//! collides with nothing that an earlier member *holds*. A refused claim holds nothing, so it refuses no other.
//! Neither the order of the objects nor a timestamp, UID or version is ever looked at.

mod cluster;
mod endpoint;
mod folder;
mod network;
mod prefix;
#[cfg(test)]
mod tests;
mod view;
mod warning;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::{IpAddr, SocketAddr},
};

use ipnetwork::IpNetwork;

pub use self::warning::{Warning, warnings};
use crate::{
    api::Objects,
    keys::PublicKey,
    names::{MemberId, MemberName, NodeName, Ordinal},
};

/// The folder, validated. The same on every member.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mesh {
    pub members: BTreeMap<MemberName, Member>,
}

/// One member's view of the [`Mesh`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Intent {
    /// This cluster; it need not be among `members` yet.
    pub me: MemberName,
    /// Accepted here: this member with all its routes, and the others with those routes that they offer to this one
    /// and that collide with nothing here.
    pub members: BTreeMap<MemberName, Member>,
    /// This member's own nodes. `None`: no document tells of any, so the member is one node, this one, with slot 0.
    pub cluster: Option<Cluster>,
}

/// The nodes of this member's own cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cluster {
    pub nodes: BTreeMap<NodeName, Node>,
    /// Who holds which slot: accepted nodes, each at most one slot.
    pub gateways: BTreeMap<Ordinal, NodeName>,
    /// Where pods live whose address lies in no node's `pods`.
    pub pods: BTreeMap<IpAddr, NodeName>,
    /// The CNI gives nodes blocks out of pools. Which, only gateways are told.
    pub pooled: bool,
}

/// One node of this member's own cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Node {
    /// Its first InternalIP of each family, no other node's: by these the hop reaches it. Never empty.
    pub hop: BTreeSet<IpAddr>,
    /// Its pods' ranges. No two nodes have overlapping ones.
    pub pods: BTreeSet<IpNetwork>,
}

impl Cluster {
    /// The slot that the node holds; `None`: it is a worker, or none of ours.
    pub fn slot_of(&self, node: &NodeName) -> Option<Ordinal> {
        self.gateways.iter().find(|(_, holder)| *holder == node).map(|(ordinal, _)| *ordinal)
    }
}

/// A member cluster, as its owner described it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    pub id: MemberId,
    pub gateways: BTreeMap<Ordinal, Gateway>,
    /// Seconds, 0 (off) to 65535; `None` where the folder is silent: 25 where one side has no endpoint.
    pub keepalive: Option<u16>,
    /// Accepted claims. No two members hold overlapping prefixes; those of one member may contain each other.
    pub routes: BTreeMap<IpNetwork, Route>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gateway {
    pub key: PublicKey,
    /// In the order in which they are tried; empty: it only dials out.
    pub endpoints: Vec<Endpoint>,
}

/// `host:port` of a gateway's device 0; device j of the dialling side is answered at port + the dialler's ordinal.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Endpoint {
    pub host: Host,
    /// 1 to 65528: seven more ports follow it.
    pub port: u16,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Host {
    Ip(IpAddr),
    /// A DNS name, lower case, without a trailing dot.
    Name(String),
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.host {
            Host::Ip(ip) => SocketAddr::new(*ip, self.port).fmt(f),
            Host::Name(name) => write!(f, "{name}:{}", self.port),
        }
    }
}

/// A prefix that a member offers, of type Pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    pub offered: Offer,
}

/// To whom a prefix is offered. `To` of nobody is not `All`: it is what remains where every name was refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Offer {
    All,
    To(BTreeSet<MemberName>),
}

impl Member {
    /// The prefixes that it offers to that member, in order.
    pub fn offered_to(&self, member: &MemberName) -> impl Iterator<Item = IpNetwork> {
        self.routes.iter().filter(move |(_, route)| route.offered.includes(member)).map(|(prefix, _)| *prefix)
    }
}

impl Offer {
    pub fn includes(&self, member: &MemberName) -> bool {
        match self {
            Offer::All => true,
            Offer::To(members) => members.contains(member),
        }
    }
}

/// A claim that was left out: which object, which field, what it said, why, and what to do.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rejection {
    pub kind: Kind,
    /// The object's name.
    pub name: String,
    /// As the user typed it: `spec.gateways[1].publicKey`.
    pub field: String,
    pub reason: Reason,
    /// One sentence with the value and the remedy.
    pub message: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    MeshCluster,
    RouteAdvertisement,
    EgressPolicy,
    MeshGateway,
    Node,
    Pod,
    ServiceCIDR,
    CiliumNode,
    BlockAffinity,
    IPPool,
}

macro_rules! reasons {
    ($($(#[$doc:meta])* $reason:ident,)*) => {
        /// Why a claim was refused; the closed list that conditions and metrics use.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        pub enum Reason {
            $($(#[$doc])* $reason,)*
        }

        impl Reason {
            pub const ALL: &[Reason] = &[$(Reason::$reason,)*];

            /// In CamelCase, as a condition's reason.
            pub fn as_str(self) -> &'static str {
                match self {
                    $(Reason::$reason => stringify!($reason),)*
                }
            }
        }
    };
}

reasons! {
    /// What is written is right, but this version cannot do it, and does not pretend to.
    NotYetSupported,
    /// A list is longer than the schema allows; what is beyond is left out.
    TooMany,
    /// The same value twice in a list that is a set.
    DuplicateEntry,

    /// A member's name that is no DNS label, an advertisement's that is not its member's, a node's that is no DNS
    /// subdomain, or a slot's that is not its ordinal.
    InvalidName,
    /// Two MeshClusters or two Nodes with one name: neither is believed.
    DuplicateName,
    /// An id outside 1 to 4095.
    InvalidId,
    /// An id that another member holds.
    DuplicateId,
    /// Seconds outside 0 to 65535.
    InvalidKeepalive,

    /// An ordinal outside 0 to 7.
    InvalidOrdinal,
    /// An ordinal that another gateway of the member holds.
    DuplicateOrdinal,
    /// A slot for a node that holds another already.
    DuplicateSlot,
    /// Not base64 of 32 bytes.
    InvalidKey,
    /// A key of zeros.
    ZeroKey,
    /// A key that is a point of low order (RFC 7748 §6.1).
    LowOrderKey,
    /// A key that another slot holds, of this member or another.
    DuplicateKey,
    /// A key that this cluster names as its own, under another member.
    OwnKey,

    /// Not `host:port`.
    InvalidEndpoint,
    /// A port outside 1 to 65528.
    InvalidPort,
    /// Neither an IP address nor a DNS name.
    InvalidHost,
    /// An endpoint's name that would resolve through the tunnel that it starts.
    InMeshDomain,

    /// Not `address/length`.
    InvalidCidr,
    /// Wider than /8 (IPv4) or /32 (IPv6).
    TooWide,
    /// Bits set after the prefix.
    HostBits,
    /// The unspecified address, or a default route.
    Unspecified,
    Loopback,
    LinkLocal,
    Multicast,
    Broadcast,
    /// An IPv6 form of an IPv4 address.
    V4Mapped,

    /// Neither Pod, Service nor External.
    UnknownType,
    /// The same range twice in one RouteAdvertisement.
    DuplicateRoute,
    /// A RouteAdvertisement without any route.
    NoRoutes,
    /// A member that has no accepted MeshCluster: the claim waits for it.
    UnknownCluster,
    /// Not inside one of the member's `allowedCIDRs`.
    OutsideAllowed,
    /// Overlaps a range that another member, or another node of this one, holds.
    HeldByAnother,
    /// Overlaps the overlay addresses of the mesh.
    OverlayRange,
    /// Overlaps a range of this cluster.
    OwnRange,
    /// Holds the address of this cluster's API server.
    ApiServer,

    /// A node without any address that the others could send to.
    NoInternalIP,
    /// Not an IP address.
    InvalidAddress,
    /// An address that another node or pod holds.
    DuplicateAddress,
    /// An address that is not that of the node it is said to be.
    ForeignAddress,
    /// A node that has no accepted Node: the claim waits for it.
    UnknownNode,

    /// This node, its slot, or its key, is not in the folder.
    NotInMesh,
    /// No node of this cluster holds a slot.
    NoGateway,
    /// A node without IPv6 cannot hold a slot: probes and overlay addresses need it.
    IPv6Disabled,
    /// The cluster has several nodes, and this one lacks the secret by which they trust each other's packets.
    HopSecretMissing,
    /// There is a preshared key for the member, but it cannot be used.
    PresharedKeyUnreadable,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Display for Rejection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.name.escape_debug();
        write!(f, "{:?}/{name} {}: {}: {}", self.kind, self.field, self.reason, self.message)
    }
}

/// Why one value was refused, before it is known where it stands.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Refusal {
    reason: Reason,
    message: String,
}

fn refusal(reason: Reason, message: impl Into<String>) -> Refusal {
    Refusal { reason, message: message.into() }
}

/// A user's text for a message: quoted, escaped, and cut where it is long.
fn quoted(text: &str) -> String {
    const SHOWN: usize = 80;
    match text.char_indices().nth(SHOWN) {
        None => format!("{text:?}"),
        Some((end, _)) => format!("{:?}...", &text[..end]),
    }
}

/// The object that is being read.
#[derive(Clone, Copy, Debug)]
struct Place<'a> {
    kind: Kind,
    name: &'a str,
}

/// Collects what is refused. Of each object [`TOLD`] values are told, and whether there are more: a tenant's lists are long,
/// and whoever has that much to mend begins with those.
#[derive(Debug, Default)]
struct Refused(BTreeMap<(Kind, String), OfObject>);

#[derive(Debug, Default)]
struct OfObject {
    /// The first in the order of (in a list, field, refusal): what is in no list may be what leaves the whole object out.
    told: BTreeSet<(bool, String, Refusal)>,
    /// Why the rest is refused.
    beyond: BTreeSet<Reason>,
}

const TOLD: usize = 16;

impl Refused {
    fn add(&mut self, at: Place<'_>, field: impl Into<String>, refusal: Refusal) {
        let OfObject { told, beyond } = self.0.entry((at.kind, at.name.to_owned())).or_default();
        let field = field.into();
        told.insert((field.contains('['), field, refusal));
        if told.len() > TOLD {
            beyond.extend(told.pop_last().map(|(.., refusal)| refusal.reason));
        }
    }

    /// The value, or nothing and a rejection.
    fn accept<T>(&mut self, at: Place<'_>, field: impl Into<String>, parsed: Result<T, Refusal>) -> Option<T> {
        parsed.map_err(|refusal| self.add(at, field, refusal)).ok()
    }

    /// The list, as far as the schema allows it.
    fn first<'a, T>(&mut self, at: Place<'_>, field: &str, list: &'a [T], limit: usize) -> &'a [T] {
        let Some((kept, _)) = list.split_at_checked(limit).filter(|(_, more)| !more.is_empty()) else {
            return list;
        };
        let message = format!("has {} entries, at most {limit} are allowed: those after that are left out", list.len());
        self.add(at, field, refusal(Reason::TooMany, message));
        kept
    }

    /// In a stable order, without repetitions.
    fn into_vec(self) -> Vec<Rejection> {
        let objects = self.0.into_iter().flat_map(|((kind, name), OfObject { told, beyond })| {
            let mut told: Vec<_> = told.into_iter().map(|(_, field, refusal)| (field, refusal)).collect();
            told.sort();
            // Where all the rest waits for another object, so does this.
            let reason = beyond.iter().find(|reason| **reason != Reason::UnknownCluster).or(beyond.first());
            told.extend(reason.map(|reason| {
                let message = format!("more than {TOLD} values of this object are refused: mend these first");
                ("spec".to_owned(), refusal(*reason, message))
            }));
            told.into_iter().map(move |(field, Refusal { reason, message })| {
                let name = name.clone();
                Rejection { kind, name, field, reason, message }
            })
        });
        objects.collect()
    }
}

/// What one member knows of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Local {
    pub cluster: MemberName,
    /// Ranges of this cluster beyond those it advertises (`--local-cidr`).
    pub cidrs: Vec<IpNetwork>,
    /// The API server's address, where there is one.
    pub api_server: Option<IpAddr>,
}

/// What the folder says of this member's own nodes, judged without knowing which member that is.
pub fn nodes(objects: &Objects) -> (Option<Cluster>, Vec<Rejection>) {
    let mut refused = Refused::default();
    let cluster = cluster::read(objects, None, &mut refused);
    (cluster, refused.into_vec())
}

/// Validates the folder. `mesh_domain`: in it no endpoint may lie, or the tunnel would need itself to start.
///
/// The rejections are in a stable order, each once.
pub fn mesh(objects: &Objects, mesh_domain: &str) -> (Mesh, Vec<Rejection>) {
    let domain = mesh_domain.to_ascii_lowercase();
    let mut refused = Refused::default();
    let mesh = folder::read(objects, domain.trim_end_matches('.'), &mut refused);
    (mesh, refused.into_vec())
}

impl Intent {
    /// The slot that the node of this cluster holds; `None`: it is a worker, or none of ours.
    pub fn slot_of(&self, node: &NodeName) -> Option<Ordinal> {
        match &self.cluster {
            Some(cluster) => cluster.slot_of(node),
            None => Some(Ordinal::ZERO),
        }
    }

    /// The addresses by which the cluster knows the node; none where no document tells of nodes.
    pub fn addresses_of(&self, node: &NodeName) -> BTreeSet<IpAddr> {
        let nodes = self.cluster.iter().flat_map(|cluster| cluster.nodes.get(node));
        nodes.flat_map(|node| node.hop.iter().copied()).collect()
    }

    /// Every member but this one.
    pub fn others(&self) -> impl Iterator<Item = (&MemberName, &Member)> {
        self.members.iter().filter(|(name, _)| **name != self.me)
    }

    /// Takes `local`'s view of a `mesh` and the `objects` that it was made of.
    ///
    /// Refuses the prefixes of others that overlap this cluster's own ranges: its own advertisements (also those that
    /// lost a conflict), its nodes' addresses and pod ranges, what its services and its CNI use, [`Local::cidrs`] and
    /// [`Local::api_server`]; and their gateways that carry a key which this cluster's own MeshCluster names.
    pub fn new(mesh: &Mesh, objects: &Objects, local: &Local) -> (Intent, Vec<Rejection>) {
        let mut refused = Refused::default();
        let intent = view::take(mesh, objects, local, &mut refused);
        (intent, refused.into_vec())
    }
}
