//! The lists of status: peers, routes, native devices and ranges at odds with this node, as one pass saw them.

use std::time::SystemTime;

use ipnetwork::IpNetwork;

use crate::{
    kernel::facts,
    names::MemberName,
    plan::member_of,
    reconcile::Reading,
    state::Remote,
    status::{NativeStatus, PeerStatus, RouteStatus, connected},
    survey::{Survey, View},
};

pub(super) fn peers(view: &View, survey: &Survey, reading: &Reading) -> Vec<PeerStatus> {
    let now = SystemTime::now();
    let wanted = survey.desired.peers.keys();
    wanted
        .map(|(device, key)| {
            let stats = reading.pairs.get(&(*device, *key)).cloned().unwrap_or_default();
            let age = stats.last_handshake.map(|at| now.duration_since(at).unwrap_or_default());
            PeerStatus {
                member: member_of(&view.intent, *device, key).map(ToString::to_string).unwrap_or_default(),
                device: device.to_string(),
                public_key: key.to_string(),
                endpoint: reading.state.peers.get(&(*device, *key)).and_then(|peer| peer.endpoint),
                connected: connected(age, stats.rx_bytes),
                handshake_age_seconds: age.map(|age| age.as_secs()),
                rx_bytes: stats.rx_bytes,
                tx_bytes: stats.tx_bytes,
            }
        })
        .collect()
}

pub(super) fn routes(view: &View) -> Vec<RouteStatus> {
    let told = |name: &MemberName, cidr: IpNetwork| RouteStatus { cidr: cidr.to_string(), member: name.to_string() };
    let others = view.intent.others();
    let mut routes: Vec<RouteStatus> = others
        .flat_map(|(name, member)| member.offered_to(&view.intent.me).map(move |cidr| told(name, cidr)))
        .collect();
    routes.sort_by(|a, b| (&a.member, &a.cidr).cmp(&(&b.member, &b.cidr)));
    routes
}

pub(super) fn natives(node: &facts::Node) -> Vec<NativeStatus> {
    let status = |(name, native): (&String, &facts::Native)| NativeStatus {
        name: name.clone(),
        mtu: native.mtu,
        tunnel_segmentation: native.tunnel_segmentation,
    };
    node.native.iter().map(status).collect()
}

/// Remote ranges that hold an address of this node: its neighbours there are now reached through a tunnel, if at all.
pub(super) fn taken_from_us(survey: &Survey, node: &facts::Node) -> Vec<String> {
    let remote = survey.desired.maps.iter().flat_map(|maps| &maps.remote);
    let ranges: Vec<_> = remote.filter(|(_, what)| matches!(what, Remote::Range(_))).map(|(range, _)| *range).collect();
    let held = |range: &&IpNetwork| node.addresses.iter().find(|address| range.contains(**address));
    let told = ranges.iter().filter_map(|range| held(&range).map(|address| (range, address)));
    told.map(|(range, address)| {
        format!(
            "{range} is another member's, but this node has {address} in it: name this cluster's part with --local-cidr"
        )
    })
    .collect()
}
