//! Segmentation and coalescing: what a NIC with TSO and LRO does, for a TUN with `IFF_VNET_HDR`.
//!
//! [`Frame`] cuts one large packet from the kernel into packets of the link's MTU; [`coalesce`] joins packets of one
//! flow into one large packet for the kernel. Both are pure. Law: cutting what was joined gives the same packets.
//!
//! The header is `struct virtio_net_hdr` (`include/uapi/linux/virtio_net.h`), 10 bytes, native endian.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    ops::Range,
};

use bytes::BytesMut;

pub(super) const VNET_HEADER: usize = 10;
/// Longest packet that a TUN is given, bytes: IP lengths are 16 bits wide, and some room is kept below their end.
pub(super) const MAX_FRAME: usize = 65_400;
/// Most packets that are joined into one; the kernel's own limit for UDP (`UDP_MAX_SEGMENTS`) is 128.
const MAX_PARTS: usize = 128;

const NEEDS_CSUM: u8 = 1;
const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
const GSO_UDP_L4: u8 = 5;
const GSO_ECN: u8 = 0x80;

const TCP: u8 = 6;
const UDP: u8 = 17;
const FIN: u8 = 0x01;
const PSH: u8 = 0x08;
const ACK: u8 = 0x10;
const CWR: u8 = 0x80;

fn get16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

fn get32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn put16(bytes: &mut [u8], at: usize, n: u16) {
    bytes[at..at + 2].copy_from_slice(&n.to_be_bytes());
}

/// Adds to a one's complement sum (RFC 1071) that [`fold`] finishes. Only the last slice may be of odd length.
fn sum(bytes: &[u8], initial: u64) -> u64 {
    // Added as the machine reads them, and turned once: the sum does not depend on the byte order.
    let (words, rest) = bytes.as_chunks::<4>();
    let total = words.iter().fold(0, |total: u64, word| total + u64::from(u32::from_ne_bytes(*word)));
    let mut last = [0; 4];
    last[..rest.len()].copy_from_slice(rest);
    initial + u64::from(u16::from_be(fold(total + u64::from(u32::from_ne_bytes(last)))))
}

fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    sum as u16
}

/// The packet's addresses: side by side in both IP headers.
fn addresses(v6: bool) -> Range<usize> {
    if v6 { 8..40 } else { 12..20 }
}

fn pseudo_sum(packet: &[u8], v6: bool, protocol: u8, len: usize) -> u64 {
    sum(&packet[addresses(v6)], u64::from(protocol) + len as u64)
}

fn checksum_offset(protocol: u8) -> usize {
    if protocol == TCP { 16 } else { 6 }
}

fn put_ipv4_checksum(packet: &mut [u8], header: usize) {
    put16(packet, 10, 0);
    let checksum = !fold(sum(&packet[..header], 0));
    put16(packet, 10, checksum);
}

/// The length that the IP header states, which is at most the packet's; `None`: no IP packet. What is beyond is padding.
pub(super) fn ip_len(packet: &[u8]) -> Option<usize> {
    let (stated, least) = match packet.first()? >> 4 {
        4 if packet.len() >= 20 => (usize::from(get16(packet, 2)), 20),
        6 if packet.len() >= 40 => (usize::from(get16(packet, 4)) + 40, 40),
        _ => return None,
    };
    (least..=packet.len()).contains(&stated).then_some(stated)
}

pub(super) fn source(packet: &[u8]) -> Option<IpAddr> {
    match packet.first()? >> 4 {
        4 => Some(Ipv4Addr::from(*packet.get(12..)?.first_chunk::<4>()?).into()),
        6 => Some(Ipv6Addr::from(*packet.get(8..)?.first_chunk::<16>()?).into()),
        _ => None,
    }
}

pub(super) fn destination(packet: &[u8]) -> Option<IpAddr> {
    match packet.first()? >> 4 {
        4 => Some(Ipv4Addr::from(*packet.get(16..)?.first_chunk::<4>()?).into()),
        6 => Some(Ipv6Addr::from(*packet.get(24..)?.first_chunk::<16>()?).into()),
        _ => None,
    }
}

/// One read from the TUN: a packet, or several that share their headers.
pub(super) struct Frame<'a> {
    packet: &'a [u8],
    gso: Option<Gso>,
}

#[derive(Clone, Copy)]
struct Gso {
    v6: bool,
    protocol: u8,
    /// Where the transport header starts, bytes.
    transport: usize,
    /// Length of all headers, bytes.
    headers: usize,
    /// Payload of each packet but the last, bytes.
    size: usize,
}

impl<'a> Frame<'a> {
    /// `frame` is the header and the packet. `None`: the kernel would not send this, so it is dropped.
    pub(super) fn parse(frame: &'a mut [u8]) -> Option<Frame<'a>> {
        let (header, packet) = frame.split_first_chunk_mut::<VNET_HEADER>()?;
        let native = |at: usize| usize::from(u16::from_ne_bytes([header[at], header[at + 1]]));
        let (flags, kind) = (header[0], header[1] & !GSO_ECN);
        let (size, start, offset) = (native(4), native(6), native(8));
        destination(packet)?;
        if kind == GSO_NONE {
            if flags & NEEDS_CSUM != 0 {
                finish_checksum(packet, start, offset)?;
            }
            return Some(Frame { packet, gso: None });
        }
        let v6 = packet[0] >> 4 == 6;
        let protocol = match (kind, v6) {
            (GSO_TCPV4, false) | (GSO_TCPV6, true) => TCP,
            (GSO_UDP_L4, _) => UDP,
            _ => return None,
        };
        if start < if v6 { 40 } else { 20 } || size == 0 {
            return None;
        }
        // The header length is not taken from the kernel: for forwarded packets it covers the whole first segment.
        let transport_len = if protocol == TCP { usize::from(*packet.get(start + 12)? >> 4) * 4 } else { 8 };
        let headers = start + transport_len;
        if transport_len < 8 || (protocol == TCP && transport_len < 20) || packet.len() <= headers {
            return None;
        }
        Some(Frame { packet, gso: Some(Gso { v6, protocol, transport: start, headers, size }) })
    }

    pub(super) fn destination(&self) -> Option<IpAddr> {
        destination(self.packet)
    }

    /// How many packets it holds, at least 1.
    pub(super) fn segments(&self) -> usize {
        self.gso.map_or(1, |gso| (self.packet.len() - gso.headers).div_ceil(gso.size))
    }

    /// Length of the longest packet it holds, bytes.
    pub(super) fn longest(&self) -> usize {
        self.gso.map_or(self.packet.len(), |gso| self.packet.len().min(gso.headers + gso.size))
    }

    /// Writes packet `index` to the start of `out`, which holds [`Frame::longest`] bytes, and returns its length.
    pub(super) fn segment(&self, index: usize, out: &mut [u8]) -> usize {
        let Some(gso) = self.gso else {
            out[..self.packet.len()].copy_from_slice(self.packet);
            return self.packet.len();
        };
        let from = gso.headers + index * gso.size;
        let payload = &self.packet[from..self.packet.len().min(from + gso.size)];
        let len = gso.headers + payload.len();
        let out = &mut out[..len];
        out[..gso.headers].copy_from_slice(&self.packet[..gso.headers]);
        out[gso.headers..].copy_from_slice(payload);

        // Both lengths fit 16 bits: a segment is no longer than the packet, which came from a 64 KiB read.
        if gso.v6 {
            put16(out, 4, (len - 40) as u16);
        } else {
            put16(out, 2, len as u16);
            let id = get16(out, 4).wrapping_add(index as u16);
            put16(out, 4, id);
            put_ipv4_checksum(out, gso.transport);
        }
        let (first, last) = (index == 0, from + gso.size >= self.packet.len());
        gso.finish_transport(out, index, first, last);
        len
    }
}

impl Gso {
    fn finish_transport(self, packet: &mut [u8], index: usize, first: bool, last: bool) {
        let at = self.transport;
        let len = packet.len() - at;
        if self.protocol == TCP {
            let seq = get32(packet, at + 4).wrapping_add((index * self.size) as u32);
            packet[at + 4..at + 8].copy_from_slice(&seq.to_be_bytes());
            // As `tcp_gso_segment` does: the end is announced by the last packet, a reduced window by the first.
            packet[at + 13] &= match (first, last) {
                (true, true) => 0xff,
                (true, false) => !(FIN | PSH),
                (false, true) => !CWR,
                (false, false) => !(FIN | PSH | CWR),
            };
        } else {
            put16(packet, at + 4, len as u16);
        }
        let checksum_at = at + checksum_offset(self.protocol);
        put16(packet, checksum_at, 0);
        let checksum = !fold(sum(&packet[at..], pseudo_sum(packet, self.v6, self.protocol, len)));
        put16(packet, checksum_at, if checksum == 0 && self.protocol == UDP { 0xffff } else { checksum });
    }
}

/// The checksum field holds the sum of the pseudo header; makes it the checksum.
fn finish_checksum(packet: &mut [u8], start: usize, offset: usize) -> Option<()> {
    let field = start + offset;
    packet.get(field..field + 2)?;
    let checksum = !fold(sum(&packet[start..], 0));
    // Offset 6 is UDP's, where zero would mean "no checksum".
    put16(packet, field, if checksum == 0 && offset == 6 { 0xffff } else { checksum });
    Some(())
}

/// Packets for one write to the TUN: `head` with all its headers, and the payloads of those that follow it.
#[derive(Debug)]
pub(super) struct Group {
    pub header: [u8; VNET_HEADER],
    pub head: usize,
    /// Index and payload of each further packet.
    pub tail: Vec<(usize, Range<usize>)>,
}

/// A transport header that may be joined to others.
#[derive(Clone, Copy)]
struct Candidate {
    v6: bool,
    protocol: u8,
    transport: usize,
    headers: usize,
    payload: usize,
}

/// A group that still grows.
struct Open {
    group: usize,
    shape: Candidate,
    /// Payload bytes so far.
    total: usize,
    /// Whether the head's checksum was found right.
    verified: bool,
}

/// How many flows are joined side by side: more than a batch holds in practice, few enough to search by hand.
const MAX_OPEN: usize = 16;

/// Joins packets of one flow, where the kernel could cut them into the same packets again. Packets of one flow stay in
/// order. Heads of groups are changed: lengths, checksums and flags.
pub(super) fn coalesce(packets: &mut [BytesMut], udp: bool) -> Vec<Group> {
    let mut groups: Vec<Group> = Vec::new();
    let mut open: Vec<Open> = Vec::new();
    for index in 0..packets.len() {
        let (before, rest) = packets.split_at_mut(index);
        let packet = &rest[0][..];
        let Some(next) = Candidate::of(packet).filter(|c| udp || c.protocol == TCP) else {
            // It may belong to an open flow, which must not go on ahead of it.
            open.retain(|flow| !same_addresses(&before[groups[flow.group].head], packet));
            groups.push(Group { header: [0; VNET_HEADER], head: index, tail: Vec::new() });
            continue;
        };
        let found = open.iter().position(|flow| next.same_ports(packet, flow.shape, &before[groups[flow.group].head]));
        if let Some(at) = found {
            let flow = &mut open[at];
            let group = &mut groups[flow.group];
            if flow.admits(next, packet, &before[group.head], group.tail.len() + 1) {
                flow.total += next.payload;
                group.tail.push((index, next.headers..packet.len()));
                let done = next.ends_group(packet) || next.payload < flow.shape.payload;
                let last_flags = if next.protocol == TCP { packet[next.transport + 13] } else { 0 };
                if next.protocol == TCP {
                    before[group.head][next.transport + 13] |= last_flags & PSH;
                }
                if done {
                    open.swap_remove(at);
                }
                continue;
            }
            open.swap_remove(at);
        }
        groups.push(Group { header: [0; VNET_HEADER], head: index, tail: Vec::new() });
        if !next.ends_group(packet) {
            if open.len() == MAX_OPEN {
                open.remove(0);
            }
            open.push(Open { group: groups.len() - 1, shape: next, total: next.payload, verified: false });
        }
    }
    for group in groups.iter_mut().filter(|group| !group.tail.is_empty()) {
        group.finish(&mut packets[group.head]);
    }
    groups
}

fn same_addresses(a: &[u8], b: &[u8]) -> bool {
    match (a.first().map(|v| v >> 4), b.first().map(|v| v >> 4)) {
        (Some(4), Some(4)) => a.get(12..20) == b.get(12..20),
        (Some(6), Some(6)) => a.get(8..40) == b.get(8..40),
        _ => false,
    }
}

impl Candidate {
    /// `None`: not TCP data or UDP, or with something that must reach the kernel by itself: options, fragments, flags.
    fn of(packet: &[u8]) -> Option<Candidate> {
        if ip_len(packet)? != packet.len() {
            return None;
        }
        let v6 = packet[0] >> 4 == 6;
        let (transport, protocol) = if v6 { (40, packet[6]) } else { (20, packet[9]) };
        if !v6 && (packet[0] != 0x45 || get16(packet, 6) & 0x3fff != 0) {
            return None;
        }
        let headers = match protocol {
            TCP => {
                let len = usize::from(packet.get(transport + 12)? >> 4) * 4;
                if len < 20 || packet.get(transport + 13)? & !PSH != ACK {
                    return None;
                }
                transport + len
            }
            UDP => {
                packet.get(transport + 7)?;
                let stated = usize::from(get16(packet, transport + 4));
                if stated != packet.len() - transport || get16(packet, transport + 6) == 0 {
                    return None;
                }
                transport + 8
            }
            _ => return None,
        };
        let payload = packet.len().checked_sub(headers).filter(|len| *len > 0)?;
        Some(Candidate { v6, protocol, transport, headers, payload })
    }

    fn ends_group(self, packet: &[u8]) -> bool {
        self.protocol == TCP && packet[self.transport + 13] & PSH != 0
    }

    fn same_ports(self, packet: &[u8], other: Candidate, head: &[u8]) -> bool {
        self.v6 == other.v6
            && self.protocol == other.protocol
            && packet[addresses(self.v6)] == head[addresses(self.v6)]
            && packet[self.transport..self.transport + 4] == head[self.transport..self.transport + 4]
    }

    fn checksum_is_right(self, packet: &[u8]) -> bool {
        let len = packet.len() - self.transport;
        fold(sum(&packet[self.transport..], pseudo_sum(packet, self.v6, self.protocol, len))) == 0xffff
    }

    /// Whether every header field that the kernel copies to each packet is the same.
    fn same_headers(self, packet: &[u8], head: &[u8]) -> bool {
        let equal = |range: Range<usize>| packet[range.clone()] == head[range];
        let ip = if self.v6 { equal(0..4) && equal(6..8) } else { equal(0..2) && equal(6..10) };
        // Acknowledgment, data offset, window and options; the flags differ by PSH alone.
        let at = self.transport;
        ip && (self.protocol == UDP
            || (equal(at + 8..at + 13) && equal(at + 14..at + 16) && equal(at + 18..self.headers)))
    }
}

impl Open {
    /// `index`: its number in the group, from 1.
    fn admits(&mut self, next: Candidate, packet: &[u8], head: &[u8], index: usize) -> bool {
        let shape = self.shape;
        let fits = next.headers == shape.headers
            && next.payload <= shape.payload
            && self.shape.headers + self.total + next.payload <= MAX_FRAME
            && index < MAX_PARTS
            && next.same_headers(packet, head);
        // Where fragmentation is forbidden the identification means nothing (RFC 6864) and may stay as it is.
        let id =
            next.v6 || get16(packet, 6) & 0x4000 != 0 || get16(packet, 4) == get16(head, 4).wrapping_add(index as u16);
        let in_sequence = next.protocol == UDP
            || get32(packet, next.transport + 4) == get32(head, shape.transport + 4).wrapping_add(self.total as u32);
        if !(fits && id && in_sequence) {
            return false;
        }
        // The kernel will compute new checksums, which must not make a damaged packet look sound.
        self.verified = self.verified || shape.checksum_is_right(head);
        self.verified && next.checksum_is_right(packet)
    }
}

impl Group {
    /// Makes the head's headers those of the whole.
    fn finish(&mut self, head: &mut [u8]) {
        let Some(shape) = Candidate::of(head) else { return };
        let len = head.len() + self.tail.iter().map(|(_, payload)| payload.len()).sum::<usize>();
        let transport_len = len - shape.transport;
        if shape.v6 {
            put16(head, 4, (len - 40) as u16);
        } else {
            put16(head, 2, len as u16);
            put_ipv4_checksum(head, shape.transport);
        }
        if shape.protocol == UDP {
            put16(head, shape.transport + 4, transport_len as u16);
        }
        // CHECKSUM_PARTIAL: the kernel adds the rest to the sum of the pseudo header.
        let offset = checksum_offset(shape.protocol);
        let partial = fold(pseudo_sum(head, shape.v6, shape.protocol, transport_len));
        put16(head, shape.transport + offset, partial);

        let kind = match (shape.protocol, shape.v6) {
            (UDP, _) => GSO_UDP_L4,
            (_, false) => GSO_TCPV4,
            (_, true) => GSO_TCPV6,
        };
        self.header[0] = NEEDS_CSUM;
        self.header[1] = kind;
        for (at, n) in [(2, shape.headers), (4, shape.payload), (6, shape.transport), (8, offset)] {
            self.header[at..at + 2].copy_from_slice(&(n as u16).to_ne_bytes());
        }
    }
}
