//! What is allowed but rarely meant, for `carrick validate`.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use super::{Member, Mesh, Offer};
use crate::names::MemberName;

/// Something in the folder that works as written, but joins nothing.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Warning {
    /// The member has no accepted gateway.
    NoGateways { member: MemberName },
    /// The member offers to each of `to`, which offer nothing to it.
    OneWayOffer { member: MemberName, to: BTreeSet<MemberName> },
    /// The member and each of `others` offer to each other, and neither has an endpoint to dial.
    NoEndpoint { member: MemberName, others: BTreeSet<MemberName> },
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = |names: &BTreeSet<MemberName>| names.iter().map(MemberName::as_str).collect::<Vec<_>>().join(", ");
        match self {
            Warning::NoGateways { member } => {
                write!(f, "{member} has no gateway: nobody can reach it; add one to its MeshCluster")
            }
            Warning::OneWayOffer { member, to } => {
                write!(f, "{member} offers to {}, without an offer back: no packet passes between them", list(to))
            }
            Warning::NoEndpoint { member, others } => {
                let others = list(others);
                write!(f, "{member} has no endpoint, nor has {others}: they cannot connect until one side has one")
            }
        }
    }
}

/// Every warning, in a stable order: at most three for each member.
pub fn warnings(mesh: &Mesh) -> Vec<Warning> {
    let offers: BTreeMap<&MemberName, Offers<'_>> = mesh.members.iter().map(|(name, m)| (name, offers(m))).collect();
    let offers_to = |from: &MemberName, to: &MemberName| offers.get(from).is_some_and(|offers| offers.include(to));
    let undialled: BTreeSet<&MemberName> =
        mesh.members.iter().filter(|(_, member)| is_undialled(member)).map(|(name, _)| name).collect();
    let mut warnings = BTreeSet::new();
    for (name, member) in &mesh.members {
        if member.gateways.is_empty() {
            warnings.insert(Warning::NoGateways { member: name.clone() });
        }
        let others = || mesh.members.keys().filter(|other| *other != name);
        let to: BTreeSet<_> = others().filter(|o| offers_to(name, o) && !offers_to(o, name)).cloned().collect();
        if !to.is_empty() {
            warnings.insert(Warning::OneWayOffer { member: name.clone(), to });
        }
        // Each pair once, by its first name.
        let apart = |o: &&MemberName| *o > name && undialled.contains(*o) && offers_to(name, o) && offers_to(o, name);
        let others: BTreeSet<_> = others().filter(|_| undialled.contains(name)).filter(apart).cloned().collect();
        if !others.is_empty() {
            warnings.insert(Warning::NoEndpoint { member: name.clone(), others });
        }
    }
    warnings.into_iter().collect()
}

fn is_undialled(member: &Member) -> bool {
    !member.gateways.is_empty() && member.gateways.values().all(|gateway| gateway.endpoints.is_empty())
}

/// To whom a member offers anything.
enum Offers<'a> {
    All,
    To(BTreeSet<&'a MemberName>),
}

impl Offers<'_> {
    fn include(&self, member: &MemberName) -> bool {
        match self {
            Offers::All => true,
            Offers::To(members) => members.contains(member),
        }
    }
}

fn offers(member: &Member) -> Offers<'_> {
    let mut to = BTreeSet::new();
    for route in member.routes.values() {
        match &route.offered {
            Offer::All => return Offers::All,
            Offer::To(members) => to.extend(members),
        }
    }
    Offers::To(to)
}
