//! The tunnels of a gateway: a device for each remote ordinal, and on it every member's gateway of that ordinal.

use std::collections::BTreeSet;

use super::Here;
use crate::{
    intent::{Gateway, Kind, Member, Reason, Rejection},
    names::{Device, Interface, MemberName, Ordinal},
    state::{Link, Peer, State, WireGuard},
};

/// Seconds between keepalives where one side has no endpoint and the folder is silent: below every usual NAT time-out.
const NAT_KEEPALIVE: u16 = 25;

/// Adds devices and peers, without the members whose preshared key cannot be used.
pub(super) fn add(state: &mut State, here: Here<'_>, (_, own): (Ordinal, &Gateway), rejected: &mut Vec<Rejection>) {
    for (name, member) in here.intent.others() {
        if here.facts.psks.get(name) == Some(&None) {
            rejected.push(unreadable_psk(name));
        } else {
            add_peers(state, here, own, (name, member));
        }
    }
    for device in state.peers.keys().map(|(device, _)| *device).collect::<BTreeSet<_>>() {
        let port = here.facts.ports.wireguard + u16::from(device.0.get());
        state.wireguard.insert(device, WireGuard { key: own.key, port });
        state.links.insert(Interface::WireGuard(device), Link::ours(here.tunnel_mtu().into()));
    }
}

fn unreadable_psk(member: &MemberName) -> Rejection {
    Rejection {
        kind: Kind::MeshCluster,
        name: member.to_string(),
        field: "metadata.name".into(),
        reason: Reason::PresharedKeyUnreadable,
        message: format!(
            "the file psk-{member} cannot be used, and without it the pair would be less safe than you asked for: mend or remove it"
        ),
    }
}

/// A member's gateway j is a peer of device j, and holds all that the member offers us, and the member's overlay.
fn add_peers(state: &mut State, here: Here<'_>, own: &Gateway, (name, member): (&MemberName, &Member)) {
    for (ordinal, gateway) in &member.gateways {
        let device = Device(*ordinal);
        let pair = (device, gateway.key);
        let nat = gateway.endpoints.is_empty() || own.endpoints.is_empty();
        let peer = Peer {
            endpoint: here.facts.dial.get(&pair).copied(),
            keepalive: here.member.keepalive.unwrap_or(if nat { NAT_KEEPALIVE } else { 0 }),
            psk: here.facts.psks.get(name).copied().flatten(),
        };
        state.peers.insert(pair, peer);
        let overlay = here.facts.overlay.prefix(member.id);
        for prefix in member.offered_to(&here.intent.me).chain([overlay]) {
            state.allowed_ips.insert((device, prefix), gateway.key);
        }
    }
}
