//! The BPF programs: what each does with a packet, and who carries it out.
//!
//! A program reads the tunnel key, decides ([`decide`]) and acts ([`act`]). Invariant: it loads on Linux 6.1: no helper and
//! no verifier feature is newer than that.
#![allow(unsafe_code)]

pub mod act;
pub mod decide;
mod icmp;
pub mod maps;
mod mss;
mod packet;
mod probe;
pub mod skb;

use aya_ebpf::Global;
use ebpf::{Reason, Remote, remote};

use self::{
    act::{Place, Scene, carry_out},
    decide::Key,
    maps::{NONE, Words},
    packet::{ETH_LEN, Packet},
    skb::Skb,
};

/// Bytes of link header on the WireGuard devices. The loader sets it to 14 for test runs, which always have one.
#[unsafe(no_mangle)]
static L2: Global<u32> = Global::new(0);
/// Bytes of link header on the native device that `steer_native` is loaded for: 14 or 0.
#[unsafe(no_mangle)]
static NATIVE_L2: Global<u32> = Global::new(ETH_LEN);

/// What differs between the programs that run and those that are tested.
pub trait Entry {
    /// The tunnel key that the packet carries.
    fn key(skb: Skb) -> Option<Key>;
    /// Told what becomes of the packet: one of [`ebpf::seen`], to where, and the reason that was counted, plus one, or 0.
    fn saw(kind: u32, ifindex: u32, reason: u32);
    /// Told the tunnel key that was set.
    fn keyed(vni: u32, remote: &Words, local: &Words);
}

#[inline(always)]
pub fn steer<E: Entry>(skb: Skb) -> i32 {
    if E::key(skb).is_some() {
        return act::next::<E>();
    }
    let Some(config) = maps::config() else { return act::drop::<E>(Reason::NotConfigured) };
    let scene = Scene { skb, config, l2: ETH_LEN, place: Place::Hop, from: NONE };
    carry_out::<E>(scene, decide::steer(skb, config))
}

#[inline(always)]
pub fn steer_native<E: Entry>(skb: Skb) -> i32 {
    let l2 = link_header(&NATIVE_L2);
    let (Some(config), Ok(packet)) = (maps::config(), Packet::parse(skb, l2)) else { return act::next::<E>() };
    let scene = Scene { skb, config, l2, place: Place::Native, from: NONE };
    carry_out::<E>(scene, decide::steer_native(skb, config, &packet))
}

#[inline(always)]
pub fn from_hop<E: Entry>(skb: Skb) -> i32 {
    // Injected by `from_peer`, or an ICMP message of ours: what comes from the network has a key.
    let Some(key) = E::key(skb) else { return act::next::<E>() };
    let Some(config) = maps::config() else { return act::drop::<E>(Reason::NotConfigured) };
    let scene = Scene { skb, config, l2: ETH_LEN, place: Place::FromHop, from: key.remote };
    carry_out::<E>(scene, decide::from_hop(skb, config, &key))
}

#[inline(always)]
pub fn to_peer<E: Entry>(skb: Skb) -> i32 {
    if let (Some(config), Ok(packet)) = (maps::config(), Packet::parse(skb, link_header(&L2)))
        && let Some(length) = mss::first(skb, &packet)
        && let Some(Remote { member, kind: remote::RANGE, .. }) = maps::remote(&packet.destination)
    {
        let reach = maps::health(*member);
        let limit = if reach.mtu == 0 { config.mtu } else { reach.mtu };
        if mss::clamp(skb, &packet, length, limit).is_err() {
            return act::drop::<E>(Reason::HelperFailed);
        }
    }
    act::next::<E>()
}

#[inline(always)]
pub fn from_peer<E: Entry>(skb: Skb) -> i32 {
    let l2 = link_header(&L2);
    let Some(config) = maps::config() else { return act::drop::<E>(Reason::NotConfigured) };
    let scene = Scene { skb, config, l2, place: Place::FromPeer, from: NONE };
    carry_out::<E>(scene, decide::from_peer(skb, config, l2))
}

/// One of the two that there are, which the verifier then knows too.
#[inline(always)]
fn link_header(len: &Global<u32>) -> u32 {
    if len.load() == 0 { 0 } else { ETH_LEN }
}

/// Bounds that the compiler cannot prove would end here; the verifier refuses a program that could.
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
