//! Answers a probe in place.
//!
//! Invariant: the answer has a right checksum exactly if the ask had one, whether the kernel has checked it, has still to
//! fill it in (CHECKSUM_PARTIAL), or leaves it to the receiver.

use core::ptr::null;

use aya_ebpf::bindings::BPF_F_MARK_MANGLED_0;
use ebpf::probe;

use super::{
    maps::{self, Words},
    skb::{Refused, Skb, sum},
};

/// Of the UDP header, behind an IPv6 header without extensions.
pub const L4: u32 = 40;
const HOP_LIMIT: u8 = 64;
const MEMBERS: usize = probe::LEN - probe::MEMBERS;

/// Turns an ask, found to be a whole one, into the answer to it.
#[inline(always)]
pub fn answer(skb: Skb, l2: u32) -> Result<(), Refused> {
    let (answer, reached) = (maps::answer().ok_or(Refused)?, maps::reached().ok_or(Refused)?);
    let payload = l2 + L4 + 8;
    skb.pull(payload + probe::LEN as u32)?;
    let asked = content(skb, payload, 0, true)?;
    let head = [probe::ANSWER, answer.flags, answer.mtu[0], answer.mtu[1]];
    skb.store(payload + probe::TYPE as u32, &head)?;
    skb.store(payload + probe::MEMBERS as u32, reached)?;
    // From the packet, not from the map: the agent may write the map meanwhile.
    skb.pull(payload + probe::LEN as u32)?;
    let changed = content(skb, payload, asked, false)?;
    skb.replace_l4(l2 + L4 + 6, 0, u64::from(changed), BPF_F_MARK_MANGLED_0)?;
    // Swapping addresses changes no sum.
    let [source, destination]: [Words; 2] = skb.load(l2 + 8).ok_or(Refused)?;
    skb.store(l2 + 8, &[destination, source])?;
    skb.store_recomputed(l2 + 7, &HOP_LIMIT)
}

/// `seed` and the sum of what an answer changes, or less that.
#[inline(always)]
fn content(skb: Skb, payload: u32, seed: u32, subtract: bool) -> Result<u32, Refused> {
    let bytes: *const [u8; probe::LEN] = skb.bytes(payload).ok_or(Refused)?;
    // SAFETY: both lie within the payload, which was found to be there.
    let (head, members) = unsafe {
        let head = bytes.byte_add(probe::TYPE).cast::<[u8; 4]>();
        (head, bytes.byte_add(probe::MEMBERS).cast::<[u8; MEMBERS]>())
    };
    if subtract {
        sum(members, null(), sum(head, null(), seed)?)
    } else {
        sum(null(), members, sum(null(), head, seed)?)
    }
}
