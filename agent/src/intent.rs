//! What the folder means: validated values, and every claim that was refused, with its reason.
//!
//! Two steps. [`mesh`] looks at the folder alone, so it says the same on every member: shapes, keys, ids, and who
//! holds which prefix. [`Intent::new`] then takes one member's view: what overlaps its own ranges is refused here and
//! nowhere else. Both are pure and total: a refused claim never stops the others.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::IpAddr,
};

use ipnetwork::IpNetwork;

use crate::{
    api::Objects,
    keys::PublicKey,
    names::{MemberId, MemberName, Ordinal},
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
    /// Accepted here, with the routes that are accepted here.
    pub members: BTreeMap<MemberName, Member>,
}

/// A member cluster, as its owner described it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    pub id: MemberId,
    pub gateways: BTreeMap<Ordinal, Gateway>,
    /// Seconds, 0 (off) to 65535; `None` where the folder is silent: 25 where one side has no endpoint.
    pub keepalive: Option<u16>,
    /// Accepted claims. No two members hold overlapping prefixes.
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

/// A prefix that a member offers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    pub offered: Offer,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Offer {
    All,
    To(BTreeSet<MemberName>),
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
}

/// Why a claim was refused; the closed list that conditions and metrics use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reason {
    NotYetSupported,
    NotInMesh,
    PresharedKeyUnreadable,
}

impl fmt::Display for Rejection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}/{} {}: {:?}: {}", self.kind, self.name, self.field, self.reason, self.message)
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

/// Validates the folder. `mesh_domain`: under it no endpoint may lie, or the tunnel would need itself to start.
pub fn mesh(objects: &Objects, mesh_domain: &str) -> (Mesh, Vec<Rejection>) {
    let _ = (objects, mesh_domain);
    todo!()
}

impl Intent {
    /// Takes `local`'s view. Refuses the prefixes of others that overlap its own ranges: its own advertisements
    /// (also those that lost a conflict), [`Local::cidrs`] and [`Local::api_server`].
    pub fn new(mesh: &Mesh, objects: &Objects, local: &Local) -> (Intent, Vec<Rejection>) {
        let _ = (mesh, objects, local);
        todo!()
    }
}
