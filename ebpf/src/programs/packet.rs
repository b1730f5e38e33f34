//! What the programs need to know of a packet's headers.
//!
//! Invariant: in a [`Packet`] the headers up to the transport header lie within the packet, the version is the link's, and
//! an IPv6 packet has no address that would read as an IPv4 one in the maps.

use ebpf::{MAX_EXTENSIONS, Reason, flow};

use super::{
    maps::{V4_MARK, Words},
    skb::Skb,
};

pub const ETH_LEN: u32 = 14;
pub const ETH_P_IP: u16 = 0x0800;
pub const ETH_P_IPV6: u16 = 0x86dd;

pub const ICMP: u8 = 1;
pub const TCP: u8 = 6;
pub const UDP: u8 = 17;
pub const ICMPV6: u8 = 58;

const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const DESTINATION: u8 = 60;

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Part {
    Whole,
    /// The first of several fragments.
    First,
    /// Another one: it has no ports.
    Later,
}

#[derive(Clone, Copy)]
pub struct Packet {
    pub v6: bool,
    pub part: Part,
    /// IPv4's, or IPv6's last next header that every fragment has.
    pub protocol: u8,
    /// Or hop limit.
    pub ttl: u8,
    pub source: Words,
    pub destination: Words,
    /// Offset of the network header: the length of the link header.
    pub l3: u32,
    /// Offset of what follows the network header and its extensions.
    pub l4: u32,
    /// Bytes from the network header to the packet's end.
    pub len: u32,
    /// Bytes from the network header to the end that the header names.
    pub declared: u32,
}

impl Packet {
    /// Reads the headers behind a link header of `l2` bytes.
    #[inline(always)]
    pub fn parse(skb: Skb, l2: u32) -> Result<Packet, Reason> {
        match skb.protocol() {
            ETH_P_IP => Packet::v4(skb, l2),
            ETH_P_IPV6 => Packet::v6(skb, l2),
            _ => Err(Reason::NotIp),
        }
    }

    #[inline(always)]
    fn v4(skb: Skb, l2: u32) -> Result<Packet, Reason> {
        let header: [u32; 5] = skb.load(l2).ok_or(Reason::Truncated)?;
        let [first, fragment, ttl, source, destination] = header;
        let (first, fragment, ttl) = (u32::from_be(first), u32::from_be(fragment), u32::from_be(ttl));
        if first >> 28 != 4 {
            return Err(Reason::NotIp);
        }
        let (header, len) = ((first >> 24 & 15) * 4, skb.len() - l2);
        let declared = declared(skb, first & 0xffff, 0, len);
        if header < 20 || declared < header || len < declared {
            return Err(Reason::Truncated);
        }
        let part = match fragment & 0x3fff {
            0 => Part::Whole,
            0x2000 => Part::First,
            _ => Part::Later,
        };
        let (source, destination) = ([0, 0, V4_MARK, source], [0, 0, V4_MARK, destination]);
        let (protocol, ttl) = ((ttl >> 16) as u8, (ttl >> 24) as u8);
        Ok(Packet { v6: false, part, protocol, ttl, source, destination, l3: l2, l4: l2 + header, len, declared })
    }

    #[inline(always)]
    fn v6(skb: Skb, l2: u32) -> Result<Packet, Reason> {
        let header: [u32; 10] = skb.load(l2).ok_or(Reason::Truncated)?;
        let [first, second, s0, s1, s2, s3, d0, d1, d2, d3] = header;
        let (first, second) = (u32::from_be(first), u32::from_be(second));
        let (source, destination) = ([s0, s1, s2, s3], [d0, d1, d2, d3]);
        if first >> 28 != 6 || is_mapped(&source) || is_mapped(&destination) {
            return Err(Reason::NotIp);
        }
        let len = skb.len() - l2;
        let declared = declared(skb, second >> 16, 40, len);
        if len < declared {
            return Err(Reason::Truncated);
        }
        let (protocol, ttl) = ((second >> 8) as u8, second as u8);
        let l4 = l2 + 40;
        let mut packet =
            Packet { v6: true, part: Part::Whole, protocol, ttl, source, destination, l3: l2, l4, len, declared };
        packet.skip_extensions(skb)?;
        Ok(packet)
    }

    /// Up to a fragment header: what follows that is not the same for every fragment.
    #[inline(always)]
    fn skip_extensions(&mut self, skb: Skb) -> Result<(), Reason> {
        for _ in 0..MAX_EXTENSIONS {
            if !matches!(self.protocol, HOP_BY_HOP | ROUTING | FRAGMENT | DESTINATION) {
                break;
            }
            let [next, length, high, low]: [u8; 4] = skb.load(self.l4).ok_or(Reason::Truncated)?;
            let fragment = self.protocol == FRAGMENT;
            self.protocol = next;
            self.l4 += if fragment { 8 } else { u32::from(length) * 8 + 8 };
            if self.l4 - self.l3 > self.declared {
                return Err(Reason::Truncated);
            }
            if fragment {
                self.part = match u16::from_be_bytes([high, low]) & 0xfff9 {
                    0 => Part::Whole,
                    1 => Part::First,
                    _ => Part::Later,
                };
                break;
            }
        }
        Ok(())
    }

    /// What a gateway is chosen by, and where it is remembered what the tables say.
    #[inline(always)]
    pub fn flow(&self) -> u32 {
        flow(&self.source, &self.destination, self.protocol)
    }

    /// Source and destination port of UDP, unless this part has none.
    #[inline(always)]
    pub fn udp_ports(&self, skb: Skb) -> Option<(u16, u16)> {
        if self.protocol != UDP || self.part == Part::Later || self.l4 - self.l3 + 8 > self.declared {
            return None;
        }
        let [source, destination]: [u16; 2] = skb.load(self.l4)?;
        Some((u16::from_be(source), u16::from_be(destination)))
    }

    /// As it will be on the wire: packets, and bytes of the largest and of all.
    #[inline(always)]
    pub fn on_wire(&self, skb: Skb) -> Wire {
        let segment = skb.gso_size() & 0xffff;
        if segment == 0 {
            return Wire { packets: 1, largest: self.len, bytes: self.len };
        }
        let transport = match self.protocol {
            TCP => skb.load::<u8>(self.l4 + 12).map_or(0, |offset| u32::from(offset >> 4) * 4),
            UDP => 8,
            _ => 0,
        };
        let headers = self.l4 - self.l3 + transport;
        let payload = self.len.saturating_sub(headers);
        let packets = payload.div_ceil(segment).max(1);
        Wire { packets, largest: headers + payload.min(segment), bytes: payload + packets * headers }
    }
}

#[derive(Clone, Copy)]
pub struct Wire {
    pub packets: u32,
    pub largest: u32,
    pub bytes: u32,
}

/// The packet's length by its header, whose field counts from byte `from`. 0 is what a GSO packet beyond 64 KiB has.
#[inline(always)]
fn declared(skb: Skb, field: u32, from: u32, len: u32) -> u32 {
    if field == 0 && skb.gso_size() != 0 { len } else { field + from }
}

/// `::ffff:0:0/96` is no address on the wire, and IPv4 in our maps.
#[inline(always)]
fn is_mapped(addr: &Words) -> bool {
    addr[0] == 0 && addr[1] == 0 && addr[2] == V4_MARK
}
