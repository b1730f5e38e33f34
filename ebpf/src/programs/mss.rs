//! Clamps the MSS that TCP's first packets offer, so that segments fit the path without anybody being told by ICMP.
//!
//! Invariant: the MSS is never raised, and the checksum is right if it was.

use super::{
    packet::{Packet, Part, TCP},
    skb::{Refused, Skb, bounded},
};

const SYN: u8 = 2;
/// The longest TCP header has 40 bytes of options.
const MAX_OPTIONS: u32 = 40;
const END: u8 = 0;
const NOP: u8 = 1;
const MSS: u8 = 2;

/// Bytes of the TCP header of a SYN or SYN-ACK; of no other packet.
#[inline(always)]
pub fn first(skb: Skb, packet: &Packet) -> Option<u32> {
    if packet.protocol != TCP || packet.part == Part::Later {
        return None;
    }
    let [offset, flags] = skb.load::<[u8; 2]>(packet.l4 + 12)?;
    let length = u32::from(offset >> 4) * 4;
    let whole = length >= 20 && packet.l4 - packet.l3 + length <= packet.declared;
    (flags & SYN != 0 && whole).then_some(length)
}

/// Lowers what a packet with a TCP header of `length` bytes, as [`first`] tells, offers to what fits `limit` bytes with both
/// headers.
#[inline(always)]
pub fn clamp(skb: Skb, packet: &Packet, length: u32, limit: u16) -> Result<(), Refused> {
    let Some(place) = find(skb, packet.l4 + 20, length - 20) else { return Ok(()) };
    let Some(offered) = skb.load::<u16>(place) else { return Ok(()) };
    let most = limit.saturating_sub(if packet.v6 { 60 } else { 40 });
    if u16::from_be(offered) <= most {
        return Ok(());
    }
    let most = most.to_be();
    // The sum is of words at even offsets: at an odd one, each byte counts in the other half.
    let odd = (place - packet.l4) % 2 == 1;
    let summed = |word: u16| u64::from(if odd { word.swap_bytes() } else { word });
    skb.replace_l4(packet.l4 + 16, summed(offered), summed(most), size_of::<u16>() as u32)?;
    skb.store(place, &most)
}

/// Where the value of the MSS option is among `length` bytes of options.
#[inline(always)]
fn find(skb: Skb, options: u32, length: u32) -> Option<u32> {
    let mut at = 0;
    for _ in 0..MAX_OPTIONS {
        if at + 4 > length {
            return None;
        }
        let [kind, size] = skb.load::<[u8; 2]>(options + at)?;
        let size = if kind == NOP { 1 } else { u32::from(size) };
        if kind == END || size > length - at || (kind != NOP && size < 2) {
            return None;
        }
        if kind == MSS && size == 4 {
            return Some(options + at + 2);
        }
        // At most 40. What came before it does not matter then, and the verifier sees that it does not.
        at = bounded(at + size, 63);
    }
    None
}
