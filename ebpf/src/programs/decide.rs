//! What is to become of a packet: each program's decision, as a value.
//!
//! Invariant: a decision changes neither packet nor skb; besides its [`Verdict`] it only notes that a member has traffic.

use ebpf::{Config, IDLE_NS, NO_SLOT, Reason, Remote, SLOTS, TRAFFIC_NS, choose, known, probe, remote, sent};

use super::{
    maps::{self, NONE, Words, words},
    packet::{ETH_LEN, Packet, Wire},
    probe::L4,
    skb::{Skb, bounded},
};

/// A tunnel key: of a packet that came by the hop.
#[derive(Clone, Copy)]
pub struct Key {
    pub vni: u32,
    /// The outer source.
    pub remote: Words,
}

/// What is to become of a packet. A struct whose fields are all set, not an enum with values in its variants: where the
/// compiler may leave a value undefined it also works on undefined registers, which the verifier refuses.
#[derive(Clone, Copy)]
pub struct Verdict {
    pub kind: Kind,
    /// Of [`Kind::Device`] the index, of [`Kind::TooBig`] the limit.
    pub number: u32,
    /// Of [`Kind::Node`]: its hop address.
    pub node: Words,
    /// Takes one from the TTL: we forward here in the stack's place.
    pub hop: bool,
    /// For traffic that was steered: the index of `SENT`, plus one, and what is added there.
    pub sent: u32,
    pub packets: u32,
    pub bytes: u32,
}

#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Kind {
    /// On as it is: nothing of ours, or done already.
    Next,
    /// Up the stack of this node.
    Stack,
    /// Into the ingress of `carrick-hop`, so that the stack sees one device of ours.
    Inject,
    /// Out by the hop to a node.
    Node,
    /// Out by a device.
    Device,
    /// A probe: answered in place, back where it came from.
    Answer,
    /// Told to the sender with the limit, and dropped.
    TooBig,
}

impl Verdict {
    #[inline(always)]
    pub const fn of(kind: Kind, number: u32) -> Verdict {
        Verdict { kind, number, node: NONE, hop: false, sent: 0, packets: 0, bytes: 0 }
    }

    #[inline(always)]
    fn node(node: Words) -> Verdict {
        Verdict { node, ..Verdict::of(Kind::Node, 0) }
    }

    /// Counted at `index` of `SENT`.
    #[inline(always)]
    fn counted(self, index: u32, wire: Wire) -> Verdict {
        Verdict { sent: index + 1, packets: wire.packets, bytes: wire.bytes, ..self }
    }

    #[inline(always)]
    fn as_hop(self, hop: bool) -> Verdict {
        Verdict { hop, ..self }
    }
}

/// The verdict, or why the packet is dropped.
pub type Decision = Result<Verdict, Reason>;

/// Egress of `carrick-hop`.
#[inline(always)]
pub fn steer(skb: Skb, config: &Config) -> Decision {
    let packet = &Packet::parse(skb, ETH_LEN)?;
    if is_our_tunnel(skb, config, packet) {
        return Err(Reason::Loop);
    }
    let place = maps::place(packet.flow());
    let member = match place.known(&packet.source, &packet.destination) {
        Some(known) if known.kind == known::TO_MEMBER && words(&known.node) == NONE => known.member,
        _ => match maps::remote(&packet.destination) {
            Some(Remote { member, kind: remote::RANGE, .. }) => {
                let member = offered(packet, *member)?;
                place.learn(&packet.source, &packet.destination, known::TO_MEMBER, member, &NONE);
                member
            }
            Some(Remote { member, kind: remote::OVERLAY, .. }) => return to_overlay(skb, config, packet, *member),
            _ => return Err(Reason::NotRemote),
        },
    };
    to_member(skb, config, packet, member, Hops::Any)
}

/// Egress of a native device.
#[inline(always)]
pub fn steer_native(skb: Skb, config: &Config, packet: &Packet) -> Decision {
    let forwarded = skb.ingress_ifindex() != 0;
    let to_hop = forwarded && packet.udp_ports(skb).is_some_and(|(_, to)| to == config.hop_port);
    if to_hop && maps::node(&packet.destination).is_some() {
        return Err(Reason::HopForged);
    }
    match maps::remote(&packet.destination) {
        Some(Remote { kind: remote::RANGE, .. }) if is_our_tunnel(skb, config, packet) => Err(Reason::Loop),
        Some(Remote { member, kind: remote::RANGE, .. }) => {
            to_member(skb, config, packet, offered(packet, *member)?, Hops::Any)
        }
        Some(Remote { kind: remote::OVERLAY, .. }) => Err(Reason::NotForOverlay),
        _ => Ok(Verdict::of(Kind::Next, 0)),
    }
}

/// Ingress of `carrick-hop`, of a packet that came with a tunnel key.
#[inline(always)]
pub fn from_hop(skb: Skb, config: &Config, key: &Key) -> Decision {
    if !is_authentic(skb, config, key) {
        return Err(Reason::HopUnauthenticated);
    }
    let packet = &Packet::parse(skb, ETH_LEN)?;
    let place = maps::place(packet.flow());
    let (kind, member) = match place.known(&packet.source, &packet.destination) {
        Some(known) if words(&known.node) == key.remote && known.kind != known::FROM_PEER => (known.kind, known.member),
        _ => {
            let (kind, member) = from_node(config, key, packet)?;
            if kind == PROBE {
                return of_probe(skb, config, packet, Kind::Stack);
            }
            place.learn(&packet.source, &packet.destination, kind, member, &key.remote);
            (kind, member)
        }
    };
    if kind == known::TO_HERE {
        return Ok(Verdict::of(Kind::Stack, 0));
    }
    let verdict = to_member(skb, config, packet, member, Hops::Last)?;
    let expires = packet.ttl <= 1 && verdict.kind == Kind::Device;
    Ok(if expires { Verdict::of(Kind::Stack, 0) } else { verdict })
}

/// Of [`from_node`], besides what may be known: to this node's overlay address.
const PROBE: u8 = 0;

/// What the tables say of a packet that came by the hop: one of [`known`] or [`PROBE`], and the member that it goes to.
#[inline(always)]
fn from_node(config: &Config, key: &Key, packet: &Packet) -> Result<(u8, u16), Reason> {
    let Some(node) = maps::node(&key.remote) else { return Err(Reason::HopUnknownNode) };
    let from_gateway = node.slot != NO_SLOT;
    if config.slot == NO_SLOT && !from_gateway {
        return Err(Reason::HopUnknownNode);
    }
    let lives_there = maps::home(&packet.source).is_some_and(|home| home == words(&node.home));
    if !lives_there {
        let is_remote = matches!(maps::remote(&packet.source), Some(Remote { kind: remote::RANGE, .. }));
        if !from_gateway || !is_remote || !lives_here(packet) {
            return Err(Reason::HopForeignSource);
        }
    }
    match maps::remote(&packet.destination) {
        Some(Remote { kind: remote::OVERLAY, .. }) if lives_there && packet.destination == words(&config.overlay) => {
            Ok((PROBE, 0))
        }
        Some(Remote { kind: remote::OVERLAY, .. }) => Err(Reason::NotForOverlay),
        Some(Remote { member, kind: remote::RANGE, .. }) if lives_there && config.slot != NO_SLOT => {
            Ok((known::TO_MEMBER, offered(packet, *member)?))
        }
        _ if lives_here(packet) => Ok((known::TO_HERE, 0)),
        _ => Err(Reason::HopForeignSource),
    }
}

#[inline(always)]
fn lives_here(packet: &Packet) -> bool {
    maps::home(&packet.destination).is_some_and(|home| home == NONE)
}

/// Ingress of a WireGuard device.
#[inline(always)]
pub fn from_peer(skb: Skb, config: &Config, l2: u32) -> Decision {
    let packet = &Packet::parse(skb, l2)?;
    let place = maps::place(packet.flow());
    let home = match place.known(&packet.source, &packet.destination) {
        Some(known) if known.kind == known::FROM_PEER => words(&known.node),
        _ => {
            let Some(&Remote { member, kind, .. }) = maps::remote(&packet.source) else {
                return Err(Reason::ForeignSource);
            };
            if member == config.member || !matches!(kind, remote::RANGE | remote::OVERLAY) {
                return Err(Reason::ForeignSource);
            }
            let to_overlay = matches!(maps::remote(&packet.destination), Some(Remote { kind: remote::OVERLAY, .. }));
            if kind == remote::OVERLAY || to_overlay {
                if kind != remote::OVERLAY || packet.destination != words(&config.overlay) {
                    return Err(Reason::NotForOverlay);
                }
                return of_probe(skb, config, packet, Kind::Inject);
            }
            if !maps::is_offered(&packet.destination, member) {
                return Err(Reason::NotOffered);
            }
            let Some(home) = maps::home(&packet.destination) else { return Err(Reason::NoHome) };
            place.learn(&packet.source, &packet.destination, known::FROM_PEER, 0, &home);
            home
        }
    };
    let wire = packet.on_wire(skb);
    if home == NONE || packet.ttl <= 1 {
        return Ok(Verdict::of(Kind::Inject, 0).counted(sent::FROM_PEERS, wire));
    }
    let limit = u32::from(config.hop_mtu);
    if wire.largest > limit {
        return Ok(Verdict::of(Kind::TooBig, limit));
    }
    Ok(Verdict::node(home).as_hop(true).counted(sent::FROM_PEERS, wire))
}

/// Which gateways may carry a packet on.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Hops {
    /// This one, or another of this cluster.
    Any,
    /// This one alone: the packet came by the hop, and a second time could go round.
    Last,
}

/// The member, if the packet's source is offered to it.
#[inline(always)]
fn offered(packet: &Packet, member: u16) -> Result<u16, Reason> {
    if maps::is_offered(&packet.source, member) { Ok(member) } else { Err(Reason::SourceNotOffered) }
}

/// Steers what is for a member, from a source that is offered to it.
#[inline(always)]
fn to_member(skb: Skb, config: &Config, packet: &Packet, member: u16, hops: Hops) -> Decision {
    let reach = maps::health(member);
    let limit = u32::from(if reach.mtu == 0 { config.mtu } else { reach.mtu });
    let wire = packet.on_wire(skb);
    if wire.largest > limit {
        return Ok(Verdict::of(Kind::TooBig, limit));
    }
    note_traffic(member);
    let flow = packet.flow();
    let hop = hops == Hops::Last;
    let own = if config.slot < SLOTS { 1 << config.slot } else { 0 };
    let others = reach.via & !own;
    let links = if hop && reach.links == 0 { reach.kept } else { reach.links };
    if config.slot != NO_SLOT
        && (hop || others == 0 || maps::is_probed())
        && let Some(slot) = choose(flow, links)
    {
        let first = if hop { sent::FOR_NODES } else { sent::DEVICE };
        return Ok(device(config, slot)?.as_hop(hop).counted(first + u32::from(slot), wire));
    }
    match choose(flow, others) {
        Some(slot) if hops == Hops::Any => Ok(gateway(config, slot)?.counted(sent::HOP + u32::from(slot), wire)),
        _ => Err(Reason::NoGateway),
    }
}

/// Whether this is UDP of this node's own WireGuard. A peer that has roamed into a remote range gets it by the route of
/// that range, which leads into the tunnel: it would carry itself.
#[inline(always)]
fn is_our_tunnel(skb: Skb, config: &Config, packet: &Packet) -> bool {
    let first = config.wireguard_port;
    let ports = first..=first.saturating_add(u16::from(SLOTS - 1));
    skb.ingress_ifindex() == 0 && packet.udp_ports(skb).is_some_and(|(from, _)| ports.contains(&from))
}

/// A probe of this node's own, to exactly the slot that it names. Health is not asked: probes are how it is known.
#[inline(always)]
fn to_overlay(skb: Skb, config: &Config, packet: &Packet, member: u16) -> Decision {
    let own = skb.ingress_ifindex() == 0 && packet.source == words(&config.overlay);
    let [.., high, low] = packet.destination;
    let host = u32::from_be(low);
    if !own || !is_probe(skb, config, packet) || high != 0 || host == 0 || host > u32::from(SLOTS) {
        return Err(Reason::NotForOverlay);
    }
    let slot = host as u8 - 1;
    if member == config.member {
        gateway(config, slot)
    } else if config.slot == NO_SLOT {
        Err(Reason::NoDevice)
    } else {
        device(config, slot)
    }
}

/// An ask is answered here, an answer goes up to the prober by `up`.
#[inline(always)]
fn of_probe(skb: Skb, config: &Config, packet: &Packet, up: Kind) -> Decision {
    if !is_probe(skb, config, packet) {
        return Err(Reason::NotForOverlay);
    }
    let Some([sizes, magic, kind]) = skb.load::<[u32; 3]>(packet.l3 + L4 + 4) else {
        return Err(Reason::MalformedProbe);
    };
    let udp_len = u32::from_be(sizes) >> 16;
    if udp_len < 8 + probe::LEN as u32 || packet.declared != L4 + udp_len || magic != u32::from_ne_bytes(probe::MAGIC) {
        return Err(Reason::MalformedProbe);
    }
    match kind.to_ne_bytes()[0] {
        probe::ASK => Ok(Verdict::of(Kind::Answer, 0)),
        probe::ANSWER => Ok(Verdict::of(up, 0)),
        _ => Err(Reason::MalformedProbe),
    }
}

/// UDP between the two probe ports, in one piece and without extension headers.
#[inline(always)]
fn is_probe(skb: Skb, config: &Config, packet: &Packet) -> bool {
    let port = config.probe_port;
    packet.v6 && packet.l4 - packet.l3 == L4 && packet.udp_ports(skb) == Some((port, port))
}

/// Whether VNI and inner destination MAC are those of one secret.
#[inline(always)]
fn is_authentic(skb: Skb, config: &Config, key: &Key) -> bool {
    let Some(mac) = skb.load::<[u8; 6]>(0) else { return false };
    let is = |secret: usize| {
        secret < usize::from(config.secrets) && config.vni[secret] == key.vni && config.mac[secret] == mac
    };
    is(0) || is(1)
}

#[inline(always)]
fn device(config: &Config, slot: u8) -> Decision {
    match config.wireguard[bounded(u32::from(slot), 7) as usize] {
        0 => Err(Reason::NoDevice),
        ifindex => Ok(Verdict::of(Kind::Device, ifindex)),
    }
}

/// The hop address of a gateway of this cluster, of the first family that it shares with this node.
#[inline(always)]
fn gateway(config: &Config, slot: u8) -> Decision {
    let slot = bounded(u32::from(slot), 7) as usize;
    for family in 0..2 {
        let addr = words(&config.gateways[family][slot]);
        if addr != NONE && words(&config.hop[family]) != NONE {
            return Ok(Verdict::node(addr));
        }
    }
    Err(Reason::NoDevice)
}

/// Tells the agent of the first packet after a pause.
#[inline(always)]
fn note_traffic(member: u16) {
    let Some(last) = maps::traffic(member) else { return };
    let now = maps::now();
    // SAFETY: one aligned word. Two processors may both see the pause: the agent is then told twice.
    let before = unsafe { last.read_volatile() };
    // Another processor may have written a later time than the one read here.
    let pause = now.saturating_sub(before);
    if pause > TRAFFIC_NS {
        // SAFETY: as above.
        unsafe { last.write_volatile(now) };
        if before == 0 || pause > IDLE_NS {
            maps::wake(member);
        }
    }
}
