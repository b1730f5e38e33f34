//! Carries a [`Verdict`] out.
//!
//! Invariant: what leaves by the hop has a tunnel key, both MACs and no mark; every drop is counted.

use aya_ebpf::{
    bindings::{BPF_F_DONT_FRAGMENT, BPF_F_TUNINFO_IPV6, BPF_F_ZERO_CSUM_TX, bpf_tunnel_key},
    helpers,
};
use ebpf::{Config, Reason, seen, sent};

use super::{
    Entry,
    decide::{Decision, Kind, Verdict},
    icmp,
    maps::{self, NONE, V4_MARK, Words, words},
    packet::{ETH_LEN, ETH_P_IP, ETH_P_IPV6},
    probe,
    skb::{Refused, Skb, redirect, redirect_ingress},
};

/// TCX_NEXT, which clsact calls TC_ACT_UNSPEC: the next program decides.
pub const NEXT: i32 = -1;
/// TC_ACT_SHOT.
const SHOT: i32 = 2;
/// `pkt_type` of a packet for this host.
const PACKET_HOST: u32 = 0;
/// The source MAC of what is injected: that of no device, so that no device takes it for its own.
const NO_MAC: [u8; 6] = [0; 6];

/// Where a program runs, and so how packets leave it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// Egress of `carrick-hop`: on the way out by the hop already.
    Hop,
    /// Egress of a native device.
    Native,
    /// Ingress of `carrick-hop`.
    FromHop,
    /// Ingress of a WireGuard device.
    FromPeer,
}

/// What acting needs to know besides the verdict.
#[derive(Clone, Copy)]
pub struct Scene<'a> {
    pub skb: Skb,
    pub config: &'a Config,
    /// Bytes of link header.
    pub l2: u32,
    pub place: Place,
    /// For [`Place::FromHop`]: the hop address of the node that the packet came from.
    pub from: Words,
}

#[inline(always)]
pub fn carry_out<E: Entry>(scene: Scene<'_>, decision: Decision) -> i32 {
    let verdict = match decision {
        Ok(verdict) => verdict,
        Err(reason) => return drop::<E>(reason),
    };
    let done = match verdict.kind {
        Kind::Next => return next::<E>(),
        Kind::Stack => up::<E>(scene),
        Kind::Inject => inject::<E>(scene, 0),
        Kind::Node | Kind::Device => out::<E>(scene, &verdict),
        Kind::Answer => match probe::answer(scene.skb, scene.l2) {
            Ok(()) => back::<E>(scene, 0),
            Err(refused) => Err(refused.into()),
        },
        Kind::TooBig => return too_big::<E>(scene, verdict.number),
    };
    match done {
        Ok(action) => {
            if verdict.sent != 0 {
                maps::count_sent(verdict.sent - 1, verdict.packets, verdict.bytes);
                if scene.place == Place::Native && scene.skb.ingress_ifindex() != 0 {
                    maps::count_sent(sent::PAST_ROUTES, verdict.packets, verdict.bytes);
                }
            }
            action
        }
        Err(reason) => drop::<E>(reason),
    }
}

impl From<Refused> for Reason {
    fn from(_: Refused) -> Reason {
        Reason::HelperFailed
    }
}

#[inline(always)]
pub fn next<E: Entry>() -> i32 {
    E::saw(seen::NEXT, 0, 0);
    NEXT
}

#[inline(always)]
pub fn drop<E: Entry>(reason: Reason) -> i32 {
    maps::count_drop(reason);
    E::saw(seen::DROP, 0, reason as u32 + 1);
    SHOT
}

/// VXLAN took it for another host's, by its MAC.
#[inline(always)]
fn up<E: Entry>(scene: Scene<'_>) -> Result<i32, Reason> {
    scene.skb.change_type(PACKET_HOST)?;
    E::saw(seen::STACK, 0, 0);
    Ok(NEXT)
}

#[inline(always)]
fn out<E: Entry>(scene: Scene<'_>, verdict: &Verdict) -> Result<i32, Reason> {
    if verdict.hop {
        take_one_from_ttl(scene.skb, scene.l2)?;
    }
    if verdict.kind == Kind::Node {
        by_hop::<E>(scene, &verdict.node, 0)
    } else {
        Ok(by_device::<E>(verdict.number, 0))
    }
}

/// Sends what was made of a packet to where the packet came from. `reason`: as of [`Entry::saw`].
#[inline(always)]
fn back<E: Entry>(scene: Scene<'_>, reason: u32) -> Result<i32, Reason> {
    match scene.place {
        Place::Hop | Place::Native => inject::<E>(scene, reason),
        Place::FromHop => by_hop::<E>(scene, &scene.from, reason),
        Place::FromPeer => Ok(by_device::<E>(scene.skb.ifindex(), reason)),
    }
}

#[inline(always)]
fn too_big<E: Entry>(scene: Scene<'_>, limit: u32) -> i32 {
    let reason = Reason::TooBig;
    if icmp::too_big(scene.skb, scene.l2, limit).is_ok()
        && let Ok(action) = back::<E>(scene, reason as u32 + 1)
    {
        maps::count_drop(reason);
        return action;
    }
    drop::<E>(reason)
}

#[inline(always)]
fn inject<E: Entry>(scene: Scene<'_>, reason: u32) -> Result<i32, Reason> {
    ethernet(scene, &scene.config.hop_mac, &NO_MAC)?;
    E::saw(seen::INGRESS, scene.config.hop_ifindex, reason);
    Ok(redirect_ingress(scene.config.hop_ifindex))
}

#[inline(always)]
fn by_device<E: Entry>(ifindex: u32, reason: u32) -> i32 {
    E::saw(seen::DEVICE, ifindex, reason);
    redirect(ifindex)
}

#[inline(always)]
fn by_hop<E: Entry>(scene: Scene<'_>, node: &Words, reason: u32) -> Result<i32, Reason> {
    let Scene { skb, config, .. } = scene;
    let local = words(&config.hop[usize::from(!is_v4(node))]);
    if local == NONE {
        return Err(Reason::NoDevice);
    }
    // The outer packet is routed by the mark, which a CNI may have given a meaning of its own.
    skb.clear_mark();
    ethernet(scene, &config.mac[0], &config.hop_mac)?;
    set_key(skb, config.vni[0], node, &local)?;
    E::keyed(config.vni[0], node, &local);
    if scene.place == Place::Hop {
        E::saw(seen::HOP, 0, reason);
        return Ok(NEXT);
    }
    E::saw(seen::HOP, config.hop_ifindex, reason);
    Ok(redirect(config.hop_ifindex))
}

#[inline(always)]
fn is_v4(addr: &Words) -> bool {
    addr[0] == 0 && addr[1] == 0 && addr[2] == V4_MARK
}

/// Gives the packet a link header, or its link header these addresses.
#[inline(always)]
fn ethernet(Scene { skb, l2, .. }: Scene<'_>, to: &[u8; 6], from: &[u8; 6]) -> Result<(), Refused> {
    let ([a, b, c, d, e, f], [g, h, i, j, k, l]) = (*to, *from);
    if l2 != 0 {
        return skb.store(0, &[a, b, c, d, e, f, g, h, i, j, k, l]);
    }
    skb.change_head(ETH_LEN)?;
    let kind = if skb.protocol() == ETH_P_IP { ETH_P_IP } else { ETH_P_IPV6 };
    let [m, n] = kind.to_be_bytes();
    skb.store(0, &[a, b, c, d, e, f, g, h, i, j, k, l, m, n])
}

#[inline(always)]
fn take_one_from_ttl(skb: Skb, l2: u32) -> Result<(), Refused> {
    if skb.protocol() == ETH_P_IP {
        let [word, sum]: [u16; 2] = skb.load(l2 + 8).ok_or(Refused)?;
        let less = u16::from_be(word).wrapping_sub(0x100).to_be();
        skb.store(l2 + 8, &[less, replaced(sum, word, less)])
    } else {
        let limit: u8 = skb.load(l2 + 7).ok_or(Refused)?;
        skb.store_recomputed(l2 + 7, &limit.wrapping_sub(1))
    }
}

/// The header's checksum after a word of it was replaced (RFC 1624, equation 3). The sum of the whole stays, so what a device
/// has summed up stays right.
#[inline(always)]
fn replaced(sum: u16, from: u16, to: u16) -> u16 {
    let sum = u32::from(!sum) + u32::from(!from) + u32::from(to);
    let sum = (sum & 0xffff) + (sum >> 16);
    !((sum & 0xffff) + (sum >> 16)) as u16
}

/// Bytes of the helpers' key up to and with the local address.
pub const KEY_LEN: u32 = size_of::<bpf_tunnel_key>() as u32;
const TTL: u8 = 64;

#[inline(always)]
fn set_key(skb: Skb, vni: u32, remote: &Words, local: &Words) -> Result<(), Refused> {
    // As Linux does by default with IPv4, no outer checksum: the inner packet has its own.
    let (flags, remote, local) = if is_v4(remote) {
        (BPF_F_DONT_FRAGMENT | BPF_F_ZERO_CSUM_TX, ipv4(remote), ipv4(local))
    } else {
        (BPF_F_DONT_FRAGMENT | BPF_F_TUNINFO_IPV6, *remote, *local)
    };
    let ([a, b, c, d], [e, f, g, h]) = (remote, local);
    // `bpf_tunnel_key`, word by word: to zero it first is a loop over its bytes.
    let mut key = [vni, a, b, c, d, u32::from_ne_bytes([0, TTL, 0, 0]), 0, e, f, g, h];
    const { assert!(size_of::<bpf_tunnel_key>() == 11 * size_of::<u32>()) };
    // SAFETY: the helper reads the key, which is as long and as aligned.
    let code = unsafe { helpers::bpf_skb_set_tunnel_key(skb.0, (&raw mut key).cast(), KEY_LEN, u64::from(flags)) };
    if code == 0 { Ok(()) } else { Err(Refused) }
}

/// An IPv4 address as the helpers' key has it: in host order, in the first of four words.
#[inline(always)]
fn ipv4(addr: &Words) -> Words {
    [u32::from_be(addr[3]), 0, 0, 0]
}
