//! The folder, as every member reads it: members first, in the order of (id, name), then their routes.

use std::collections::{BTreeMap, BTreeSet};

use ipnetwork::IpNetwork;

use super::{
    Gateway, Kind, Member, Mesh, Offer, Place, Reason, Refusal, Refused, Route, endpoint,
    prefix::{self, Ranges, covers},
    quoted, refusal,
};
use crate::{
    api::{AdvertisedRoute, GatewaySpec, MeshCluster, Objects, RouteAdvertisement, limits},
    keys::{BadKey, PublicKey},
    names::{MemberId, MemberName, Ordinal},
    overlay::Overlay,
};

/// Everything that is accepted; the rest is added to `refused`.
pub(super) fn read(objects: &Objects, mesh_domain: &str, refused: &mut Refused) -> Mesh {
    let mut members = members(&objects.clusters, mesh_domain, refused);
    routes(&mut members, &objects.advertisements, Overlay::new(mesh_domain).whole(), refused);
    unsupported(objects, refused);
    Mesh { members: members.into_iter().map(|read| (read.name, read.member)).collect() }
}

/// A member, and what bounds its claims.
struct Read {
    name: MemberName,
    member: Member,
    allowed: Vec<IpNetwork>,
}

pub(super) fn cluster_at(cluster: &MeshCluster) -> Place<'_> {
    Place { kind: Kind::MeshCluster, name: cluster.metadata.name.as_deref().unwrap_or_default() }
}

pub(super) fn advertisement_at(advertisement: &RouteAdvertisement) -> Place<'_> {
    Place { kind: Kind::RouteAdvertisement, name: advertisement.metadata.name.as_deref().unwrap_or_default() }
}

/// The accepted members in the order of (id, name), which decides every conflict.
fn members(clusters: &[MeshCluster], mesh_domain: &str, refused: &mut Refused) -> Vec<Read> {
    let mut written: BTreeMap<&str, usize> = BTreeMap::new();
    for cluster in clusters {
        *written.entry(cluster_at(cluster).name).or_default() += 1;
    }
    let mut claims: Vec<(MemberId, MemberName, &MeshCluster)> = Vec::new();
    for cluster in clusters {
        let twice = written.get(cluster_at(cluster).name).is_some_and(|times| *times > 1);
        if let Some((id, name)) = identity(cluster, twice, refused) {
            claims.push((id, name, cluster));
        }
    }
    claims.sort_by(|a, b| (a.0, &a.1).cmp(&(b.0, &b.1)));

    let mut ids: BTreeMap<MemberId, MemberName> = BTreeMap::new();
    let mut keys = BTreeMap::new();
    let mut members = Vec::new();
    for (id, name, cluster) in claims {
        if let Some(holder) = ids.get(&id) {
            let message =
                format!("{id} is the id of {holder}, which comes first by name: give {name} an id of its own");
            refused.add(cluster_at(cluster), "spec.id", refusal(Reason::DuplicateId, message));
            continue;
        }
        ids.insert(id, name.clone());
        members.push(member(id, name, cluster, mesh_domain, &mut keys, refused));
    }
    members
}

/// Whether the member can be taken at all: who it is, and that it may be dialled directly.
fn identity(cluster: &MeshCluster, twice: bool, refused: &mut Refused) -> Option<(MemberId, MemberName)> {
    let at = cluster_at(cluster);
    let name = refused.accept(at, "metadata.name", parse_name(at.name));
    if twice {
        let message = format!("two MeshClusters are named {}: neither is used until one is removed", quoted(at.name));
        refused.add(at, "metadata.name", refusal(Reason::DuplicateName, message));
    }
    let id = MemberId::new(cluster.spec.id).ok_or_else(|| {
        let message = format!("{} is no member id: give a number from 1 to {}", cluster.spec.id, ebpf::MAX_MEMBER_ID);
        refusal(Reason::InvalidId, message)
    });
    let id = refused.accept(at, "spec.id", id);
    let direct = cluster.spec.via.is_empty();
    if !direct {
        let message = "a relayed member must not be dialled directly, and relays are not built yet: the whole member \
                       is left out; remove `via` to connect to it directly";
        refused.add(at, "spec.via", refusal(Reason::NotYetSupported, message));
    }
    Some((id?, name?)).filter(|_| direct && !twice)
}

fn parse_name(text: &str) -> Result<MemberName, Refusal> {
    text.parse().map_err(|why| refusal(Reason::InvalidName, format!("{} is refused: {why}", quoted(text))))
}

/// Who holds which key.
type Keys = BTreeMap<PublicKey, (MemberName, Ordinal)>;

fn member(
    id: MemberId,
    name: MemberName,
    cluster: &MeshCluster,
    mesh_domain: &str,
    keys: &mut Keys,
    refused: &mut Refused,
) -> Read {
    let at = cluster_at(cluster);
    let gateways = gateways(&name, cluster, mesh_domain, keys, refused);
    let mut allowed = Vec::new();
    let list = refused.first(at, "spec.allowedCIDRs", &cluster.spec.allowed_cidrs, limits::ALLOWED_CIDRS);
    let mut seen = BTreeSet::new();
    for (i, text) in list.iter().enumerate() {
        let parsed = once(&mut seen, text).and_then(|()| prefix::parse(text));
        allowed.extend(refused.accept(at, format!("spec.allowedCIDRs[{i}]"), parsed));
    }
    let keepalive = cluster.spec.persistent_keepalive_seconds.and_then(|seconds| {
        let message = || format!("{seconds} is out of range: 0 turns it off, 1 to 65535 are seconds");
        let parsed = u16::try_from(seconds).map_err(|_| refusal(Reason::InvalidKeepalive, message()));
        refused.accept(at, "spec.persistentKeepaliveSeconds", parsed)
    });
    if !cluster.spec.dns_aliases.is_empty() {
        let message = "further names are not served yet: remove them";
        refused.add(at, "spec.dnsAliases", refusal(Reason::NotYetSupported, message));
    }
    Read { name, member: Member { id, gateways, keepalive, routes: BTreeMap::new() }, allowed }
}

fn gateways(
    name: &MemberName,
    cluster: &MeshCluster,
    mesh_domain: &str,
    keys: &mut Keys,
    refused: &mut Refused,
) -> BTreeMap<Ordinal, Gateway> {
    let at = cluster_at(cluster);
    let mut gateways = BTreeMap::new();
    let list = refused.first(at, "spec.gateways", &cluster.spec.gateways, limits::GATEWAYS);
    for (i, gateway) in list.iter().enumerate() {
        let field = format!("spec.gateways[{i}]");
        let ordinal = refused.accept(at, format!("{field}.ordinal"), ordinal(gateway, &gateways));
        let key = refused.accept(at, format!("{field}.publicKey"), key(gateway, keys));
        let (Some(ordinal), Some(key)) = (ordinal, key) else { continue };
        let mut endpoints = Vec::new();
        let list = refused.first(at, &format!("{field}.endpoints"), &gateway.endpoints, limits::ENDPOINTS);
        for (j, text) in list.iter().enumerate() {
            let parsed = endpoint::parse(text, mesh_domain);
            endpoints.extend(refused.accept(at, format!("{field}.endpoints[{j}]"), parsed));
        }
        keys.insert(key, (name.clone(), ordinal));
        gateways.insert(ordinal, Gateway { key, endpoints });
    }
    gateways
}

pub(super) fn slot(ordinal: i64) -> Result<Ordinal, Refusal> {
    Ordinal::new(ordinal).ok_or_else(|| {
        let message = format!("{ordinal} is no slot: give an ordinal from 0 to {}", ebpf::SLOTS - 1);
        refusal(Reason::InvalidOrdinal, message)
    })
}

fn ordinal(gateway: &GatewaySpec, taken: &BTreeMap<Ordinal, Gateway>) -> Result<Ordinal, Refusal> {
    let ordinal = slot(gateway.ordinal)?;
    if taken.contains_key(&ordinal) {
        let message = format!("{ordinal} is the ordinal of an earlier gateway in the list: give this one its own");
        return Err(refusal(Reason::DuplicateOrdinal, message));
    }
    Ok(ordinal)
}

/// A message never holds the text: somebody may have put the private key there.
fn key(gateway: &GatewaySpec, keys: &Keys) -> Result<PublicKey, Refusal> {
    let key: PublicKey = gateway.public_key.parse().map_err(bad_key)?;
    match keys.get(&key) {
        None => Ok(key),
        Some((member, ordinal)) => {
            let message = format!("the key is that of {member}'s gateway {ordinal}: make one for this slot alone");
            Err(refusal(Reason::DuplicateKey, message))
        }
    }
}

pub(super) fn bad_key(why: BadKey) -> Refusal {
    let reason = match why {
        BadKey::NotBase64 | BadKey::Length(_) => Reason::InvalidKey,
        BadKey::Zero => Reason::ZeroKey,
        BadKey::LowOrder => Reason::LowOrderKey,
    };
    refusal(reason, format!("the key {why}: copy what `carrick keys show` prints"))
}

/// Decides the claims of each member in turn. Those of one member may overlap, so they are added all at once.
fn routes(members: &mut [Read], advertisements: &[RouteAdvertisement], overlay: IpNetwork, refused: &mut Refused) {
    let names: BTreeSet<MemberName> = members.iter().map(|read| read.name.clone()).collect();
    let mut by_member: BTreeMap<MemberName, Vec<&RouteAdvertisement>> = BTreeMap::new();
    for advertisement in advertisements {
        let (at, cluster) = (advertisement_at(advertisement), &advertisement.spec.cluster);
        let named = refused.accept(at, "metadata.name", may_be_named(at.name, cluster));
        let member = refused.accept(at, "spec.cluster", known(cluster, &names));
        if let (Some(()), Some(name)) = (named, member) {
            by_member.entry(name).or_default().push(advertisement);
        }
    }
    let mut held: Ranges<(MemberId, MemberName)> = Ranges::default();
    for read in members {
        for advertisement in by_member.remove(&read.name).unwrap_or_default() {
            advertised(read, advertisement, &names, (&held, overlay), refused);
        }
        for range in read.member.routes.keys() {
            held.insert(*range, (read.member.id, read.name.clone()));
        }
    }
}

/// That an advertisement of that member may have this name: the member's own, or that with a number behind it. Where that
/// is no member's name, nothing is said of this one.
pub(super) fn may_be_named(name: &str, cluster: &str) -> Result<(), Refusal> {
    let text = name.strip_prefix(cluster).and_then(|rest| rest.strip_prefix('.')).unwrap_or_default();
    let number = text.parse().unwrap_or(0);
    let numbered = (1..limits::ADVERTISEMENTS).contains(&number) && number.to_string() == text;
    if numbered || name == cluster || cluster.parse::<MemberName>().is_err() {
        return Ok(());
    }
    let (name, cluster, last) = (quoted(name), cluster.escape_debug(), limits::ADVERTISEMENTS - 1);
    let message =
        format!("{name} is none of {cluster} and {cluster}.1 to {cluster}.{last}: create it anew under such a name");
    Err(refusal(Reason::InvalidName, message))
}

/// That no entry that was `seen` is the same: the API server takes such a list for a set.
fn once<'a>(seen: &mut BTreeSet<&'a str>, text: &'a str) -> Result<(), Refusal> {
    match seen.insert(text) {
        true => Ok(()),
        false => Err(refusal(Reason::DuplicateEntry, format!("{} is there twice: remove this one", quoted(text)))),
    }
}

/// The member of that name, if it is accepted.
fn known(text: &str, names: &BTreeSet<MemberName>) -> Result<MemberName, Refusal> {
    let name = parse_name(text)?;
    if names.contains(&name) {
        return Ok(name);
    }
    let message = format!("no MeshCluster named {name} is accepted: this waits until one is");
    Err(refusal(Reason::UnknownCluster, message))
}

/// Adds what one advertisement claims to the member's routes.
fn advertised(
    read: &mut Read,
    advertisement: &RouteAdvertisement,
    names: &BTreeSet<MemberName>,
    (held, overlay): (&Ranges<(MemberId, MemberName)>, IpNetwork),
    refused: &mut Refused,
) {
    let at = advertisement_at(advertisement);
    let offer = offer(advertisement, names, refused);
    let mut seen = BTreeSet::new();
    let list = refused.first(at, "spec.routes", &advertisement.spec.routes, limits::ROUTES);
    if list.is_empty() {
        refused.add(
            at,
            "spec.routes",
            refusal(Reason::NoRoutes, "nothing is offered: add a route, or delete the object"),
        );
    }
    for (i, route) in list.iter().enumerate() {
        let claimed = supported(route).and_then(|range| match claim(range, read, held, overlay) {
            Ok(()) if !seen.insert(range) => {
                let message = format!("{range} is there twice: remove this one");
                Err(("cidr", refusal(Reason::DuplicateRoute, message)))
            }
            decided => decided.map(|()| range).map_err(|refusal| ("cidr", refusal)),
        });
        match claimed {
            Err((field, refusal)) => refused.add(at, format!("spec.routes[{i}].{field}"), refusal),
            Ok(range) => match read.member.routes.get_mut(&range) {
                Some(route) => widen(&mut route.offered, &offer),
                None => {
                    read.member.routes.insert(range, Route { offered: offer.clone() });
                }
            },
        }
    }
}

fn offer(advertisement: &RouteAdvertisement, names: &BTreeSet<MemberName>, refused: &mut Refused) -> Offer {
    let at = advertisement_at(advertisement);
    if advertisement.spec.to.is_empty() {
        return Offer::All;
    }
    let mut to = BTreeSet::new();
    let list = refused.first(at, "spec.to", &advertisement.spec.to, limits::TO);
    let mut seen = BTreeSet::new();
    for (i, text) in list.iter().enumerate() {
        let parsed = once(&mut seen, text).and_then(|()| known(text, names));
        to.extend(refused.accept(at, format!("spec.to[{i}]"), parsed));
    }
    Offer::To(to)
}

/// A range that two advertisements of a member offer is offered to all whom either names.
fn widen(offer: &mut Offer, more: &Offer) {
    match (&mut *offer, more) {
        (Offer::To(to), Offer::To(more)) => to.extend(more.iter().cloned()),
        _ => *offer = Offer::All,
    }
}

/// The range of a route that is well-formed and of a kind that works; else the field that is not.
pub(super) fn supported(route: &AdvertisedRoute) -> Result<IpNetwork, (&'static str, Refusal)> {
    let range = prefix::parse(&route.cidr).map_err(|refusal| ("cidr", refusal))?;
    if route.exported_as.is_some() {
        let message = format!("{range} cannot be exported under another range yet: remove `exportedAs`");
        return Err(("exportedAs", refusal(Reason::NotYetSupported, message)));
    }
    match route.kind.as_str() {
        "Pod" => Ok(range),
        kind @ ("Service" | "External") => {
            let message = format!("{range} is of type {kind}, which is not built yet: only Pod routes are carried");
            Err(("type", refusal(Reason::NotYetSupported, message)))
        }
        other => {
            let message = format!("{range} is of type {}: write Pod, Service or External", quoted(other));
            Err(("type", refusal(Reason::UnknownType, message)))
        }
    }
}

/// Whether the member may have the range.
fn claim(
    range: IpNetwork,
    read: &Read,
    held: &Ranges<(MemberId, MemberName)>,
    overlay: IpNetwork,
) -> Result<(), Refusal> {
    let Read { name, member, allowed } = read;
    if covers(overlay, range) || covers(range, overlay) {
        let message = format!("{range} overlaps {overlay}, the mesh's own overlay addresses: use another range");
        return Err(refusal(Reason::OverlayRange, message));
    }
    if !allowed.iter().any(|allowed| covers(*allowed, range)) {
        let message = format!("{range} lies in none of the allowedCIDRs of MeshCluster {name}: have it added there");
        return Err(refusal(Reason::OutsideAllowed, message));
    }
    match held.overlapping(range) {
        None => Ok(()),
        Some((other, (id, holder))) => {
            let message = format!(
                "{range} overlaps {other}, which {holder} holds by the lower id ({id}, {name} has {}): one of them \
                 must use another range",
                member.id
            );
            Err(refusal(Reason::HeldByAnother, message))
        }
    }
}

/// What is written but not built: a policy that is not enforced would be a lie.
fn unsupported(objects: &Objects, refused: &mut Refused) {
    for policy in &objects.policies {
        let at = Place { kind: Kind::EgressPolicy, name: policy.metadata.name.as_deref().unwrap_or_default() };
        let message = "egress policies are not enforced yet, pods reach everything that is offered: remove it, or \
                       limit the offers by `to` of the RouteAdvertisements";
        refused.add(at, "spec", refusal(Reason::NotYetSupported, message));
    }
}
