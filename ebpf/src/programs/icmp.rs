//! Tells a sender that its packet is too big, by turning the packet into the ICMP message about it.
//!
//! The message's source is the packet's destination: no address of ours is in between that the sender could know, rp_filter
//! and the checks of the next node ask that what comes out of the tunnel is remote, and senders look only at the packet
//! that is quoted. An IPv4 packet that may be fragmented is answered too, as clouds do, instead of being fragmented.
//!
//! Invariant: the checksum is right whether or not the kernel has still to fill one in (CHECKSUM_PARTIAL) at the place of
//! the quoted packet's transport checksum; see [`settle`].

use super::{
    maps::Words,
    packet::{ICMP, ICMPV6, Packet, Part, TCP, UDP},
    skb::{Refused, Skb, sum},
};

/// What is quoted behind the network header: at most 7 pieces, so that an IPv4 message fits the 576 bytes of RFC 1812.
const PIECE: u32 = 64;
const PIECES: u32 = 7;
/// Longest network header, with options or extensions, behind which [`settle`] looks for a checksum.
const MAX_HEADER: u32 = 64;
const TTL: u8 = 64;

const V4_ROOM: u32 = 20 + 8;
const V6_ROOM: u32 = 40 + 8;

/// Turns a packet into the message. [`Refused`] where there must be none (RFC 1122 §3.2.2, RFC 4443 §2.4) as well.
#[inline(always)]
pub fn too_big(skb: Skb, l2: u32, limit: u32) -> Result<(), Refused> {
    let packet = &Packet::parse(skb, l2).map_err(|_| Refused)?;
    let header = packet.l4 - l2;
    // A longer one is quoted as if it were no header. The kernel itself sends nothing like it.
    let header = if header > MAX_HEADER { 0 } else { header };
    let pieces = packet.len.saturating_sub(header) / PIECE;
    let pieces = if pieces > PIECES { PIECES } else { pieces };
    if !may_be_answered(skb, packet) || pieces == 0 {
        return Err(Refused);
    }
    let quoted = header + pieces * PIECE;
    skb.change_tail(l2 + quoted)?;
    let sum = header_sum(skb, l2, header)? + u64::from(settle(skb, packet, header, pieces)?);
    if packet.v6 { v6(skb, packet, quoted, limit, sum) } else { v4(skb, packet, quoted, limit, sum) }
}

#[inline(always)]
fn may_be_answered(skb: Skb, packet: &Packet) -> bool {
    if packet.part == Part::Later {
        return false;
    }
    let [first, .., last] = packet.source;
    if packet.v6 {
        let multicast = u32::from_be(first) >> 24 == 0xff;
        let unspecified = packet.source == [0; 4];
        // Errors are 0 to 127; a redirect may not be answered either.
        let error = packet.protocol == ICMPV6 && skb.load::<u8>(packet.l4).is_none_or(|kind| kind < 128 || kind == 137);
        !multicast && !unspecified && !error
    } else {
        // 0.0.0.0/8, and 224.0.0.0/4 to the end: multicast, reserved, broadcast.
        let network = u32::from_be(last) >> 24;
        let error =
            packet.protocol == ICMP && skb.load::<u8>(packet.l4).is_none_or(|kind| matches!(kind, 3 | 4 | 5 | 11 | 12));
        network != 0 && network < 224 && !error
    }
}

/// The sum of the quoted network header.
#[inline(always)]
fn header_sum(skb: Skb, l2: u32, header: u32) -> Result<u64, Refused> {
    let mut total = 0;
    for word in 0..MAX_HEADER / 4 {
        if word * 4 >= header {
            break;
        }
        total += u64::from(skb.load::<u32>(l2 + word * 4).ok_or(Refused)?);
    }
    Ok(total)
}

/// The sum of the quoted rest, which stays the same, modulo 2^16 - 1, if the kernel fills in the transport checksum
/// later.
///
/// It fills in the complement of the sum S of the rest, with what is in the checksum's place, X, included. The rest then
/// sums to -X. That equals S if X is minus half of the remaining sum; half of a one's complement number is the number
/// rotated right by one.
#[inline(always)]
fn settle(skb: Skb, packet: &Packet, header: u32, pieces: u32) -> Result<u16, Refused> {
    let rest = packet.l3 + header;
    let place = match packet.protocol {
        TCP if header != 0 => rest + 16,
        UDP if header != 0 => rest + 6,
        _ => 0,
    };
    if place != 0 {
        skb.store_recomputed(place, &0_u16)?;
    }
    let mut remaining = 0;
    for piece in 0..PIECES {
        if piece == pieces {
            break;
        }
        let bytes: [u32; PIECE as usize / 4] = skb.load(rest + piece * PIECE).ok_or(Refused)?;
        remaining = sum(core::ptr::null(), (&raw const bytes).cast::<[u8; PIECE as usize]>(), remaining)?;
    }
    let remaining = fold(u64::from(remaining));
    if place == 0 {
        return Ok(remaining);
    }
    let x = (!remaining).rotate_right(1);
    skb.store_recomputed(place, &x)?;
    Ok(fold(u64::from(remaining) + u64::from(x)))
}

#[inline(always)]
fn v4(skb: Skb, packet: &Packet, quoted: u32, limit: u32, quote_sum: u64) -> Result<(), Refused> {
    skb.insert_network(V4_ROOM)?;
    let (from, to) = (packet.destination[3], packet.source[3]);
    let length = V4_ROOM + quoted;
    let mut header =
        [(0x4500_0000 | length).to_be(), 0, (u32::from(TTL) << 24 | u32::from(ICMP) << 16).to_be(), from, to];
    header[2] |= checksum_word(!fold(words_sum(&header)));
    let mut message = [0x0304_0000_u32.to_be(), limit.to_be()];
    message[0] |= checksum_word(!fold(words_sum(&message) + quote_sum));
    skb.store_recomputed(packet.l3, &header)?;
    skb.store_recomputed(packet.l3 + 20, &message)
}

#[inline(always)]
fn v6(skb: Skb, packet: &Packet, quoted: u32, limit: u32, quote_sum: u64) -> Result<(), Refused> {
    skb.insert_network(V6_ROOM)?;
    let length = 8 + quoted;
    let addresses: [Words; 2] = [packet.destination, packet.source];
    let header = [0x6000_0000_u32.to_be(), (length << 16 | u32::from(ICMPV6) << 8 | u32::from(TTL)).to_be()];
    let mut message = [0x0200_0000_u32.to_be(), limit.to_be()];
    let pseudo = words_sum(&addresses[0]) + words_sum(&addresses[1]);
    let pseudo = pseudo + u64::from(length.to_be()) + u64::from(u32::from(ICMPV6).to_be());
    message[0] |= checksum_word(!fold(words_sum(&message) + pseudo + quote_sum));
    skb.store_recomputed(packet.l3, &header)?;
    skb.store_recomputed(packet.l3 + 8, &addresses)?;
    skb.store_recomputed(packet.l3 + 40, &message)
}

/// A sum's complement as the second half of a word in memory.
#[inline(always)]
fn checksum_word(sum: u16) -> u32 {
    let [a, b] = sum.to_ne_bytes();
    u32::from_ne_bytes([0, 0, a, b])
}

#[inline(always)]
fn words_sum(words: &[u32]) -> u64 {
    let mut sum = 0;
    for word in words {
        sum += u64::from(*word);
    }
    sum
}

/// One's complement, of words as they lie in memory: byte order does not matter to it.
#[inline(always)]
fn fold(sum: u64) -> u16 {
    let sum = (sum & 0xffff_ffff) + (sum >> 32);
    let sum = (sum & 0xffff_ffff) + (sum >> 32);
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    ((sum & 0xffff) + (sum >> 16)) as u16
}
