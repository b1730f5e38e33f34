//! What each program must do with a packet, written naively and from the design alone.
//!
//! Everything here is a pure function of a [`World`] (the maps), a frame and its [`Context`]. Nothing is shared with the
//! programs but the ABI and its choice of a slot, which has laws of its own.

use std::collections::{BTreeMap, BTreeSet};

use ebpf::{Addr, Answer, Config, NO_SLOT, Node, Reach, Reason, Remote, probe, remote, sent};

use super::packet::{ETH, ICMP, ICMPV6, SYN, TCP, UDP, checksum, is_v4};
use super::parse::{Fragment, Ip, Malformed, parse};

/// An address and the length of its prefix, 0 to 128.
pub type Prefix = (Addr, u32);

/// The maps.
#[derive(Clone, Debug)]
pub struct World {
    pub config: Config,
    pub remote: BTreeMap<Prefix, Remote>,
    /// The members that a prefix is offered to.
    pub own: BTreeMap<Prefix, BTreeSet<u16>>,
    pub homes: BTreeMap<Prefix, Addr>,
    pub nodes: BTreeMap<Addr, Node>,
    pub health: BTreeMap<u16, Reach>,
    pub answer: Answer,
    /// Whether the prober stands by what it wrote.
    pub probed: bool,
}

/// What else a program knows of a packet.
#[derive(Clone, Copy, Debug)]
pub struct Context {
    /// The device that it came in on; 0: it was sent by this node.
    pub ingress_ifindex: u32,
    /// Bytes of payload in each segment; 0: one packet.
    pub gso_size: u32,
    pub gso_segs: u32,
    pub mark: u32,
    /// The tunnel key that it came with.
    pub key: Option<Key>,
}

/// A tunnel key, as it comes or goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key {
    pub vni: u32,
    /// The other side: the outer source of what came, the outer destination of what goes.
    pub remote: Addr,
    pub local: Addr,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// On to what comes after the program.
    Next,
    /// Up this node's stack, as a packet for this host.
    Stack,
    /// Out by the hop with that key: redirected to the device, or on where it is there already (0).
    Hop(u32, Key),
    /// Redirected to that device.
    Device(u32),
    /// Redirected into the ingress of that device.
    Ingress(u32),
    Drop,
}

/// The bytes that must come out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// Those of a dropped packet are nobody's business.
    Any,
    Exactly(Vec<u8>),
    TooBig(TooBig),
}

/// An ICMP error. How much of the packet it quotes is left to the program, within what the RFCs allow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TooBig {
    /// Both MACs, where they matter.
    pub eth: [Option<[u8; 6]>; 2],
    pub limit: u16,
    /// The IP packet that it is about; the error goes from its destination to its source.
    pub about: Vec<u8>,
    /// Where that has its transport checksum.
    pub checksum_at: Option<usize>,
}

/// Steered traffic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sent {
    /// Into `SENT`.
    pub index: u32,
    pub packets: u64,
    pub bytes: u64,
}

/// Everything that a program does with one packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    pub verdict: Verdict,
    pub frame: Frame,
    pub mark: u32,
    /// The reason that is counted.
    pub dropped: Option<Reason>,
    /// What is counted as sent.
    pub sent: Option<Sent>,
    /// The member towards which it was steered.
    pub towards: Option<u16>,
}

/// The index of the only device of a test run, `lo`.
pub const HERE: u32 = 1;

/// The source MAC of what comes to the stack from a device without any.
const NOBODY: [u8; 6] = [0; 6];

pub fn lookup<V: Clone>(map: &BTreeMap<Prefix, V>, addr: Addr) -> Option<V> {
    map.iter()
        .filter(|((prefix, len), _)| u128::from_be_bytes(prefix.0).matches(u128::from_be_bytes(addr.0), *len))
        .max_by_key(|((_, len), _)| *len)
        .map(|(_, value)| value.clone())
}

trait Matches {
    fn matches(self, other: Self, len: u32) -> bool;
}

impl Matches for u128 {
    fn matches(self, other: u128, len: u32) -> bool {
        len == 0 || (self ^ other) >> (128 - len) == 0
    }
}

impl World {
    fn remote(&self, addr: Addr) -> Option<Remote> {
        lookup(&self.remote, addr)
    }

    fn is_range(&self, addr: Addr) -> bool {
        self.remote(addr).is_some_and(|found| found.kind == remote::RANGE)
    }

    fn is_overlay(&self, addr: Addr) -> bool {
        self.remote(addr).is_some_and(|found| found.kind == remote::OVERLAY)
    }

    fn offers(&self, addr: Addr, member: u16) -> bool {
        lookup(&self.own, addr).is_some_and(|members| members.contains(&member))
    }

    fn home(&self, addr: Addr) -> Option<Addr> {
        lookup(&self.homes, addr)
    }

    fn lives_here(&self, addr: Addr) -> bool {
        self.home(addr) == Some(Addr::NONE)
    }

    fn reach(&self, member: u16) -> Reach {
        self.health.get(&member).copied().unwrap_or_default()
    }

    /// Bytes of an inner packet towards a member.
    fn limit(&self, member: u16) -> u16 {
        match self.reach(member).mtu {
            0 => self.config.mtu,
            mtu => mtu,
        }
    }

    fn is_configured(&self) -> bool {
        self.config.hop_ifindex != 0
    }

    fn is_gateway(&self) -> bool {
        self.config.slot != NO_SLOT
    }

    /// The key towards a node of this cluster, if both have an address of the family.
    fn key(&self, node: Addr) -> Option<Key> {
        let local = self.config.hop[usize::from(!is_v4(node))];
        (node != Addr::NONE && local != Addr::NONE).then_some(Key { vni: self.config.vni[0], remote: node, local })
    }

    /// The key towards a slot of this cluster: by IPv4 if both have it.
    fn slot_key(&self, slot: u8) -> Option<Key> {
        self.config.gateways.iter().find_map(|family| self.key(family[usize::from(slot)]))
    }

    fn device(&self, slot: u8) -> Option<u32> {
        Some(self.config.wireguard[usize::from(slot)]).filter(|&ifindex| ifindex != 0)
    }
}

/// A packet in a program: what every step needs.
struct Seen<'a> {
    world: &'a World,
    frame: &'a [u8],
    context: &'a Context,
    ip: Ip,
}

/// Where a packet is steered from.
#[derive(Clone, Copy, PartialEq, Eq)]
enum From {
    Hop,
    Native,
    /// It came by the hop from the node that the key names, to this gateway.
    Worker,
}

fn next(frame: &[u8], context: &Context) -> Outcome {
    Outcome {
        verdict: Verdict::Next,
        frame: Frame::Exactly(frame.to_vec()),
        mark: context.mark,
        dropped: None,
        sent: None,
        towards: None,
    }
}

fn to_stack(frame: &[u8], context: &Context) -> Outcome {
    Outcome { verdict: Verdict::Stack, ..next(frame, context) }
}

fn dropped(reason: Reason, context: &Context) -> Outcome {
    Outcome {
        verdict: Verdict::Drop,
        frame: Frame::Any,
        mark: context.mark,
        dropped: Some(reason),
        sent: None,
        towards: None,
    }
}

/// tcx egress of `carrick-hop`.
pub fn steer(world: &World, frame: &[u8], context: &Context) -> Outcome {
    if context.key.is_some() {
        return next(frame, context);
    }
    if !world.is_configured() {
        return dropped(Reason::NotConfigured, context);
    }
    let ip = match parse(frame, context.gso_size > 0) {
        Ok(ip) => ip,
        Err(malformed) => return dropped(reason_of(malformed), context),
    };
    let seen = Seen { world, frame, context, ip };
    if seen.is_our_tunnel() {
        return dropped(Reason::Loop, context);
    }
    match world.remote(seen.ip.dst) {
        Some(found) if found.kind == remote::RANGE => seen.steered(found.member, From::Hop),
        Some(found) if found.kind == remote::OVERLAY => seen.to_overlay(found.member),
        _ => dropped(Reason::NotRemote, context),
    }
}

/// tcx egress of a device that carries a node address or a default route.
pub fn steer_native(world: &World, frame: &[u8], context: &Context) -> Outcome {
    let Ok(ip) = parse(frame, context.gso_size > 0) else { return next(frame, context) };
    if !world.is_configured() {
        return next(frame, context);
    }
    let seen = Seen { world, frame, context, ip };
    let to_hop = seen.udp_ports().is_some_and(|[_, destination]| destination == world.config.hop_port);
    if to_hop && context.ingress_ifindex != 0 && world.nodes.contains_key(&seen.ip.dst) {
        return dropped(Reason::HopForged, context);
    }
    match world.remote(seen.ip.dst) {
        Some(found) if found.kind == remote::RANGE => seen.steered(found.member, From::Native),
        Some(found) if found.kind == remote::OVERLAY => dropped(Reason::NotForOverlay, context),
        _ => next(frame, context),
    }
}

/// tcx ingress of `carrick-hop`.
pub fn from_hop(world: &World, frame: &[u8], context: &Context) -> Outcome {
    let Some(key) = context.key else { return next(frame, context) };
    if !world.is_configured() {
        return dropped(Reason::NotConfigured, context);
    }
    let config = &world.config;
    let secrets = usize::from(config.secrets);
    if !(0..secrets).any(|secret| config.vni[secret] == key.vni && frame.starts_with(&config.mac[secret])) {
        return dropped(Reason::HopUnauthenticated, context);
    }
    let ip = match parse(frame, context.gso_size > 0) {
        Ok(ip) => ip,
        Err(malformed) => return dropped(reason_of(malformed), context),
    };
    let Some(node) = world.nodes.get(&key.remote).filter(|node| world.is_gateway() || node.slot != NO_SLOT) else {
        return dropped(Reason::HopUnknownNode, context);
    };
    let seen = Seen { world, frame, context, ip };
    let (src, dst) = (seen.ip.src, seen.ip.dst);
    let of_the_node = world.home(src) == Some(node.home);
    let from_far = node.slot != NO_SLOT && world.is_range(src);
    if !(of_the_node || from_far && world.lives_here(dst)) {
        return dropped(Reason::HopForeignSource, context);
    }
    if world.is_overlay(dst) {
        return match seen.probe() {
            _ if dst != config.overlay || !of_the_node => dropped(Reason::NotForOverlay, context),
            Ok(probe::ASK) => seen.answer(From::Worker),
            Ok(_) => to_stack(frame, context),
            Err(reason) => dropped(reason, context),
        };
    }
    match world.remote(dst) {
        Some(found) if found.kind == remote::RANGE && world.is_gateway() && of_the_node => {
            seen.steered(found.member, From::Worker)
        }
        _ if world.lives_here(dst) => to_stack(frame, context),
        _ => dropped(Reason::HopForeignSource, context),
    }
}

/// tcx egress of a WireGuard device.
pub fn to_peer(world: &World, frame: &[u8], context: &Context) -> Outcome {
    let mut outcome = next(frame, context);
    if let Ok(ip) = parse(frame, context.gso_size > 0)
        && let Some(found) = world.remote(ip.dst).filter(|found| found.kind == remote::RANGE && world.is_configured())
    {
        let limit = world.limit(found.member);
        outcome.frame = Frame::Exactly(clamped(frame, &ip, limit));
    }
    outcome
}

/// tcx ingress of a WireGuard device.
pub fn from_peer(world: &World, frame: &[u8], context: &Context) -> Outcome {
    if !world.is_configured() {
        return dropped(Reason::NotConfigured, context);
    }
    let ip = match parse(frame, context.gso_size > 0) {
        Ok(ip) => ip,
        Err(malformed) => return dropped(reason_of(malformed), context),
    };
    let seen = Seen { world, frame, context, ip };
    let (src, dst) = (seen.ip.src, seen.ip.dst);
    let from = world.remote(src).filter(|found| found.kind != remote::CARVED && found.member != world.config.member);
    let Some(from) = from else { return dropped(Reason::ForeignSource, context) };
    if from.kind == remote::OVERLAY || world.is_overlay(dst) {
        return match seen.probe() {
            _ if from.kind != remote::OVERLAY || dst != world.config.overlay => dropped(Reason::NotForOverlay, context),
            Ok(probe::ASK) => seen.answer(From::Hop),
            Ok(_) => seen.injected(),
            Err(reason) => dropped(reason, context),
        };
    }
    if !world.offers(dst, from.member) {
        return dropped(Reason::NotOffered, context);
    }
    match world.home(dst) {
        None => dropped(Reason::NoHome, context),
        Some(home) if home == Addr::NONE || seen.ip.ttl <= 1 => {
            Outcome { sent: seen.sent(sent::FROM_PEERS), ..seen.injected() }
        }
        Some(home) => seen.delivered(home),
    }
}

fn reason_of(malformed: Malformed) -> Reason {
    match malformed {
        Malformed::NotIp => Reason::NotIp,
        Malformed::Truncated => Reason::Truncated,
    }
}

impl Seen<'_> {
    fn config(&self) -> &Config {
        &self.world.config
    }

    fn l3(&self) -> &[u8] {
        &self.frame[ETH..]
    }

    /// What follows the IP headers, if it starts with the protocol's own header.
    fn l4(&self) -> Option<&[u8]> {
        (self.ip.fragment != Fragment::Later).then(|| &self.l3()[self.ip.l4..self.ip.end])
    }

    /// Source and destination.
    fn udp_ports(&self) -> Option<[u16; 2]> {
        let header = self.l4()?.get(..8).filter(|_| self.ip.protocol == UDP)?;
        Some([u16::from_be_bytes([header[0], header[1]]), u16::from_be_bytes([header[2], header[3]])])
    }

    /// Bytes of the largest packet that this one is on the wire: each segment has the headers.
    fn size(&self) -> usize {
        match self.context.gso_size as usize {
            0 => self.l3().len(),
            size => self.headers() + size.min(self.l3().len().saturating_sub(self.headers())),
        }
    }

    /// Bytes before the payload of a segment.
    fn headers(&self) -> usize {
        let l4 = &self.l3()[self.ip.l4..];
        let header = match self.ip.protocol {
            TCP => l4.get(12).map_or(0, |byte| usize::from(byte >> 4) * 4),
            UDP => 8,
            _ => 0,
        };
        self.ip.l4 + header
    }

    /// As counted: every segment is a packet.
    fn sent(&self, index: u32) -> Option<Sent> {
        let (len, headers) = (self.l3().len(), self.headers());
        let payload = len.saturating_sub(headers);
        let (packets, bytes) = match self.context.gso_size as usize {
            0 => (1, len),
            size => (payload.div_ceil(size).max(1), payload + payload.div_ceil(size).max(1) * headers),
        };
        Some(Sent { index, packets: packets as u64, bytes: bytes as u64 })
    }

    /// Nothing stands between the IPv6 header and UDP, so that it can be answered in place.
    fn is_for_probes(&self) -> bool {
        !self.ip.v4 && self.ip.l4 == 40 && self.udp_ports() == Some([self.config().probe_port; 2])
    }

    /// The type of a probe, or why it is dropped.
    fn probe(&self) -> Result<u8, Reason> {
        if !self.is_for_probes() {
            return Err(Reason::NotForOverlay);
        }
        let udp = &self.l3()[self.ip.l4..self.ip.end];
        let payload = &udp[8..];
        let kind = payload.get(probe::TYPE).copied().unwrap_or(0);
        let length = usize::from(u16::from_be_bytes([udp[4], udp[5]]));
        let whole = udp.len() >= 8 + probe::LEN && length == udp.len() && payload.starts_with(&probe::MAGIC);
        if whole && (kind == probe::ASK || kind == probe::ANSWER) { Ok(kind) } else { Err(Reason::MalformedProbe) }
    }

    /// Towards an overlay address: probes of this node alone.
    fn to_overlay(&self, member: u16) -> Outcome {
        let (world, config) = (self.world, self.config());
        let ours = self.ip.src == config.overlay && self.context.ingress_ifindex == 0;
        let host = u64::from_be_bytes(self.ip.dst.0[8..].try_into().expect("eight bytes"));
        if !ours || !self.is_for_probes() || !(1..=8).contains(&host) {
            return dropped(Reason::NotForOverlay, self.context);
        }
        let slot = (host - 1) as u8;
        if member == config.member {
            world
                .slot_key(slot)
                .map_or_else(|| dropped(Reason::NoDevice, self.context), |key| self.by_hop(From::Hop, key))
        } else {
            match world.device(slot).filter(|_| world.is_gateway()) {
                Some(ifindex) => self.by_device(ifindex),
                None => dropped(Reason::NoDevice, self.context),
            }
        }
    }

    /// Towards a range of a member.
    fn steered(&self, member: u16, from: From) -> Outcome {
        let world = self.world;
        if from == From::Native && self.is_our_tunnel() {
            return dropped(Reason::Loop, self.context);
        }
        if !world.offers(self.ip.src, member) {
            return dropped(Reason::SourceNotOffered, self.context);
        }
        let limit = world.limit(member);
        if self.size() > usize::from(limit) {
            return self.too_big(limit, from);
        }
        Outcome { towards: Some(member), ..self.chosen(member, from) }
    }

    /// Of this node's own WireGuard: a peer that roamed into a remote range would have the tunnel carry itself.
    fn is_our_tunnel(&self) -> bool {
        let first = self.config().wireguard_port;
        let ports = first..=first.saturating_add(7);
        self.context.ingress_ifindex == 0 && self.udp_ports().is_some_and(|[source, _]| ports.contains(&source))
    }

    fn chosen(&self, member: u16, from: From) -> Outcome {
        let (world, config) = (self.world, self.config());
        let reach = world.reach(member);
        let nobody = |reason| dropped(reason, self.context);
        let own = 1_u8.checked_shl(u32::from(config.slot)).unwrap_or(0);
        let others = reach.via & !own;
        let links = if from == From::Worker && reach.links == 0 { reach.kept } else { reach.links };
        // Where nobody measures the own links, others know better, if there are any.
        let trusted = world.probed || from == From::Worker || others == 0;
        if world.is_gateway()
            && trusted
            && let Some(slot) = ebpf::choose(self.ip.flow(), links)
        {
            let first = if from == From::Worker { sent::FOR_NODES } else { sent::DEVICE };
            let sent = self.sent(first + u32::from(slot));
            return match world.device(slot) {
                None => nobody(Reason::NoDevice),
                Some(_) if from == From::Worker && self.ip.ttl <= 1 => to_stack(self.frame, self.context),
                Some(ifindex) if from == From::Worker => {
                    Outcome { frame: Frame::Exactly(self.one_hop_on()), sent, ..self.by_device(ifindex) }
                }
                Some(ifindex) => Outcome { sent, ..self.by_device(ifindex) },
            };
        }
        match ebpf::choose(self.ip.flow(), others).filter(|_| from != From::Worker) {
            None => nobody(Reason::NoGateway),
            Some(slot) => match world.slot_key(slot) {
                None => nobody(Reason::NoDevice),
                Some(key) => Outcome { sent: self.sent(sent::HOP + u32::from(slot)), ..self.by_hop(from, key) },
            },
        }
    }

    /// Out by a WireGuard device.
    fn by_device(&self, ifindex: u32) -> Outcome {
        Outcome { verdict: Verdict::Device(ifindex), ..next(self.frame, self.context) }
    }

    /// Out by the hop, to the node that the key names.
    fn by_hop(&self, from: From, key: Key) -> Outcome {
        let ifindex = if from == From::Hop { 0 } else { self.config().hop_ifindex };
        Outcome {
            verdict: Verdict::Hop(ifindex, key),
            frame: Frame::Exactly(self.hop_frame(self.l3())),
            mark: 0,
            ..next(self.frame, self.context)
        }
    }

    /// With the MACs of the hop.
    fn hop_frame(&self, l3: &[u8]) -> Vec<u8> {
        let config = self.config();
        ethernet(config.mac[0], config.hop_mac, self.ip.v4, l3)
    }

    /// The frame with its TTL less by one.
    fn one_hop_on(&self) -> Vec<u8> {
        let mut frame = self.frame.to_vec();
        set_ttl(&mut frame[ETH..], &self.ip, self.ip.ttl - 1);
        frame
    }

    /// From a tunnel to a pod of another node.
    fn delivered(&self, home: Addr) -> Outcome {
        let limit = self.config().hop_mtu;
        if self.size() > usize::from(limit) {
            let error = self.error([None, None], limit);
            return self.told(error, Verdict::Device(HERE));
        }
        let Some(key) = self.world.key(home) else { return dropped(Reason::NoDevice, self.context) };
        let l3 = self.one_hop_on().split_off(ETH);
        let hop = self.by_hop(From::Native, key);
        Outcome { frame: Frame::Exactly(self.hop_frame(&l3)), sent: self.sent(sent::FROM_PEERS), ..hop }
    }

    /// From a tunnel to this node's stack.
    fn injected(&self) -> Outcome {
        let config = self.config();
        let frame = ethernet(config.hop_mac, NOBODY, self.ip.v4, self.l3());
        Outcome {
            verdict: Verdict::Ingress(config.hop_ifindex),
            frame: Frame::Exactly(frame),
            ..next(self.frame, self.context)
        }
    }

    fn too_big(&self, limit: u16, from: From) -> Outcome {
        let config = self.config();
        match (from, self.context.key) {
            // Back to the node that it came from.
            (From::Worker, Some(key)) => match self.world.key(key.remote) {
                None => dropped(Reason::TooBig, self.context),
                Some(key) => {
                    let eth = [Some(config.mac[0]), Some(config.hop_mac)];
                    self.told(self.error(eth, limit), Verdict::Hop(config.hop_ifindex, key))
                }
            },
            // To this node's stack.
            _ => {
                let error = self.error([Some(config.hop_mac), None], limit);
                self.told(error, Verdict::Ingress(config.hop_ifindex))
            }
        }
    }

    fn error(&self, eth: [Option<[u8; 6]>; 2], limit: u16) -> TooBig {
        let checksum_at = match self.ip.protocol {
            TCP => Some(self.ip.l4 + 16),
            UDP => Some(self.ip.l4 + 6),
            _ => None,
        };
        TooBig { eth, limit, about: self.l3().to_vec(), checksum_at }
    }

    /// No error is about an error, nor about a later fragment (RFC 1122 §3.2.2, RFC 4443 §2.4).
    fn told(&self, error: TooBig, verdict: Verdict) -> Outcome {
        let mut outcome = dropped(Reason::TooBig, self.context);
        if self.ip.fragment != Fragment::Later && !self.is_icmp_error() {
            outcome.verdict = verdict;
            outcome.frame = Frame::TooBig(error);
            outcome.mark = if matches!(verdict, Verdict::Hop(..)) { 0 } else { self.context.mark };
        }
        outcome
    }

    fn is_icmp_error(&self) -> bool {
        let kind = self.l3().get(self.ip.l4).copied();
        match self.ip.protocol {
            ICMP if self.ip.v4 => kind.is_none_or(|kind| [3, 4, 5, 11, 12].contains(&kind)),
            // A redirect is none by its number, and yet not answered.
            ICMPV6 if !self.ip.v4 => kind.is_none_or(|kind| kind < 128 || kind == 137),
            _ => false,
        }
    }

    /// The probe's answer, back to where the ask came from. Its checksum is as right as the ask's.
    fn answer(&self, from: From) -> Outcome {
        let mut l3 = self.l3().to_vec();
        set_ttl(&mut l3, &self.ip, 64);
        l3[8..40].copy_from_slice(&[self.ip.dst.0, self.ip.src.0].concat());
        let answer = &self.world.answer;
        let udp = &mut l3[self.ip.l4..self.ip.end];
        let before = udp.to_vec();
        udp[8 + probe::TYPE] = probe::ANSWER;
        udp[8 + probe::FLAGS] = answer.flags;
        udp[8 + probe::MTU..][..2].copy_from_slice(&answer.mtu);
        let reached = if self.world.probed { answer.members } else { [0; 512] };
        udp[8 + probe::MEMBERS..8 + probe::LEN].copy_from_slice(&reached);
        if before[6..8] != [0, 0] {
            for at in (8..8 + probe::LEN).step_by(2) {
                let old = u16::from_be_bytes([before[at], before[at + 1]]);
                let new = u16::from_be_bytes([udp[at], udp[at + 1]]);
                replace(udp, 6, old, new);
            }
            if udp[6..8] == [0, 0] {
                udp[6..8].fill(0xff);
            }
        }
        match (from, self.context.key) {
            (From::Worker, Some(key)) => match self.world.key(key.remote) {
                None => dropped(Reason::NoDevice, self.context),
                Some(key) => Outcome { frame: Frame::Exactly(self.hop_frame(&l3)), ..self.by_hop(From::Worker, key) },
            },
            _ => Outcome {
                verdict: Verdict::Device(HERE),
                frame: Frame::Exactly([&self.frame[..ETH], &l3].concat()),
                ..next(self.frame, self.context)
            },
        }
    }
}

fn ethernet(dst: [u8; 6], src: [u8; 6], v4: bool, l3: &[u8]) -> Vec<u8> {
    let ethertype: [u8; 2] = if v4 { [0x08, 0x00] } else { [0x86, 0xdd] };
    [&dst[..], &src, &ethertype, l3].concat()
}

/// The header checksum stays as right or as wrong as it was (RFC 1624).
fn set_ttl(l3: &mut [u8], ip: &Ip, ttl: u8) {
    if ip.v4 {
        let before = u16::from_be_bytes([l3[8], l3[9]]);
        l3[8] = ttl;
        let after = u16::from_be_bytes([l3[8], l3[9]]);
        replace(l3, 10, before, after);
    } else {
        l3[7] = ttl;
    }
}

/// HC' = ~(~HC + ~m + m').
fn replace(bytes: &mut [u8], at: usize, before: u16, after: u16) {
    let sum = u16::from_be_bytes([bytes[at], bytes[at + 1]]);
    let parts = [!sum, !before, after].map(u16::to_be_bytes).concat();
    bytes[at..at + 2].copy_from_slice(&checksum(&parts).to_be_bytes());
}

/// The frame with the MSS of a SYN no larger than fits `limit`.
fn clamped(frame: &[u8], ip: &Ip, limit: u16) -> Vec<u8> {
    let mut frame = frame.to_vec();
    let headers = if ip.v4 { 40 } else { 60 };
    let most = limit.saturating_sub(headers);
    let tcp = &mut frame[ETH..][ip.l4..ip.end];
    if ip.protocol != TCP || ip.fragment == Fragment::Later || tcp.len() < 20 || tcp[13] & SYN == 0 {
        return frame;
    }
    let end = usize::from(tcp[12] >> 4) * 4;
    if end > tcp.len() {
        return frame;
    }
    let Some(at) = mss_option(&tcp[..end]) else { return frame };
    if u16::from_be_bytes([tcp[at], tcp[at + 1]]) <= most {
        return frame;
    }
    // Where the option lies at an odd offset its bytes are in two words of the sum.
    let words = at & !1..(at + 3) & !1;
    let read = |tcp: &[u8], word: usize| u16::from_be_bytes([tcp[word], tcp[word + 1]]);
    let before: Vec<u16> = words.clone().step_by(2).map(|word| read(tcp, word)).collect();
    tcp[at..at + 2].copy_from_slice(&most.to_be_bytes());
    for (word, before) in words.step_by(2).zip(before) {
        let after = read(tcp, word);
        replace(tcp, 16, before, after);
    }
    frame
}

/// Where the first MSS of a TCP header stands.
fn mss_option(header: &[u8]) -> Option<usize> {
    let mut at = 20;
    loop {
        match *header.get(at)? {
            0 => return None,
            1 => at += 1,
            kind => {
                let len = usize::from(*header.get(at + 1)?);
                if len < 2 || at + len > header.len() {
                    return None;
                }
                if kind == 2 && len == 4 {
                    return Some(at + 2);
                }
                at += len;
            }
        }
    }
}
