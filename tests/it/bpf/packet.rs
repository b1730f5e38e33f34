//! Packets as plain descriptions, and the bytes that they are.
//!
//! A description is mostly valid: lengths and checksums are computed by [`Packet::bytes`]; [`Harm`] then breaks it.

use ebpf::{Addr, probe};

pub const ETH: usize = 14;
pub const TCP: u8 = 6;
pub const UDP: u8 = 17;
pub const ICMP: u8 = 1;
pub const ICMPV6: u8 = 58;

// TCP flags.
pub const FIN: u8 = 0x01;
pub const SYN: u8 = 0x02;
pub const RST: u8 = 0x04;
pub const ACK: u8 = 0x10;

/// An Ethernet frame with an IP packet in it.
#[derive(Clone, Debug)]
pub struct Packet {
    pub eth: Eth,
    pub ip: Ip,
    pub l4: L4,
    pub harm: Harm,
}

#[derive(Clone, Copy, Debug)]
pub struct Eth {
    pub dst: [u8; 6],
    pub src: [u8; 6],
    /// An 802.1Q tag in the frame.
    pub vlan: Option<u16>,
    /// In place of what the packet is.
    pub ethertype: Option<u16>,
}

/// IPv4 where both addresses are; else IPv6, also with an IPv4-mapped address in it.
#[derive(Clone, Debug)]
pub struct Ip {
    pub src: Addr,
    pub dst: Addr,
    /// Or hop limit.
    pub ttl: u8,
    /// Or traffic class.
    pub tos: u8,
    /// IPv4 only.
    pub dont_fragment: bool,
    /// IPv4 only: options, four bytes each.
    pub options: usize,
    /// IPv6 only: extension headers before a fragment header.
    pub extensions: Vec<Extension>,
    pub fragment: Option<Fragment>,
}

#[derive(Clone, Copy, Debug)]
pub struct Extension {
    pub kind: ExtensionKind,
    /// Eight bytes each, besides the first.
    pub more: u8,
}

#[derive(Clone, Copy, Debug)]
pub enum ExtensionKind {
    HopByHop = 0,
    Routing = 43,
    Destination = 60,
}

/// Where a fragment lies, in eight bytes, and whether it is not the last.
#[derive(Clone, Copy, Debug)]
pub struct Fragment {
    pub offset: u16,
    pub more: bool,
}

#[derive(Clone, Debug)]
pub enum L4 {
    Tcp {
        ports: [u16; 2],
        flags: u8,
        options: Vec<TcpOption>,
        payload: usize,
    },
    Udp {
        ports: [u16; 2],
        checksum: bool,
        payload: usize,
    },
    Probe {
        ports: [u16; 2],
        probe: Probe,
    },
    Icmp {
        kind: u8,
        code: u8,
        payload: usize,
    },
    /// An error about a TCP packet the other way.
    IcmpError {
        kind: u8,
        code: u8,
    },
    Other {
        protocol: u8,
        payload: usize,
    },
}

#[derive(Clone, Copy, Debug)]
pub enum TcpOption {
    Nop,
    End,
    Mss(u16),
    WindowScale(u8),
    SackPermitted,
    Timestamps,
    /// A kind and a length that may be any, without the bytes that it should have.
    Any(u8, u8),
}

#[derive(Clone, Copy, Debug)]
pub struct Probe {
    pub magic: [u8; 4],
    pub kind: u8,
    pub flags: u8,
    pub mtu: u16,
    pub nonce: u64,
    pub len: usize,
}

/// What breaks a packet.
#[derive(Clone, Copy, Debug)]
pub enum Harm {
    None,
    /// The frame ends here, but not before its IP header does.
    Cut(usize),
    /// Bytes after the packet's own end.
    Trailing(usize),
    /// A byte, counted after the Ethernet header and modulo the length, is another.
    Flip {
        at: usize,
        xor: u8,
    },
}

impl Probe {
    fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.len.max(probe::MEMBERS)];
        bytes[..4].copy_from_slice(&self.magic);
        bytes[probe::TYPE] = self.kind;
        bytes[probe::FLAGS] = self.flags;
        bytes[probe::MTU..][..2].copy_from_slice(&self.mtu.to_be_bytes());
        bytes[probe::NONCE..][..8].copy_from_slice(&self.nonce.to_be_bytes());
        for (at, byte) in bytes.iter_mut().enumerate().skip(probe::MEMBERS) {
            *byte = (at * 7) as u8;
        }
        bytes.truncate(self.len);
        bytes
    }
}

impl TcpOption {
    fn bytes(self) -> Vec<u8> {
        match self {
            TcpOption::Nop => vec![1],
            TcpOption::End => vec![0],
            TcpOption::Mss(mss) => vec![2, 4, (mss >> 8) as u8, mss as u8],
            TcpOption::WindowScale(by) => vec![3, 3, by],
            TcpOption::SackPermitted => vec![4, 2],
            TcpOption::Timestamps => vec![8, 10, 1, 2, 3, 4, 5, 6, 7, 8],
            TcpOption::Any(kind, len) => vec![kind, len],
        }
    }
}

pub fn is_v4(addr: Addr) -> bool {
    addr.0.starts_with(&[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff])
}

/// The bytes of an address on the wire: 4 or 16.
pub fn wire(addr: &Addr, v4: bool) -> &[u8] {
    if v4 { &addr.0[12..] } else { &addr.0 }
}

/// RFC 1071, not yet inverted, of the bytes after `sum`.
fn add(mut sum: u64, bytes: &[u8]) -> u64 {
    for pair in bytes.chunks(2) {
        sum += u64::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
    }
    sum
}

fn fold(mut sum: u64) -> u16 {
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// RFC 1071.
pub fn checksum(bytes: &[u8]) -> u16 {
    !fold(add(0, bytes))
}

/// The checksum of TCP, UDP or ICMPv6 over a pseudo header. 0 for bytes that hold a right one.
pub fn pseudo_checksum(src: &[u8], dst: &[u8], protocol: u8, l4: &[u8]) -> u16 {
    let sum = add(add(0, src), dst) + u64::from(protocol) + l4.len() as u64;
    !fold(add(sum, l4))
}

impl Packet {
    /// The frame.
    pub fn bytes(&self) -> Vec<u8> {
        let v4 = self.ip.is_v4();
        let l3 = self.l3();
        let mut frame = Vec::with_capacity(ETH + 4 + l3.len());
        frame.extend(self.eth.dst);
        frame.extend(self.eth.src);
        if let Some(tag) = self.eth.vlan {
            frame.extend([0x81, 0x00]);
            frame.extend(tag.to_be_bytes());
        }
        let ethertype = self.eth.ethertype.unwrap_or(if v4 { 0x0800 } else { 0x86dd });
        frame.extend(ethertype.to_be_bytes());
        frame.extend(l3);
        self.harm.apply(&mut frame);
        frame
    }

    /// The IP packet, unharmed.
    pub fn l3(&self) -> Vec<u8> {
        let v4 = self.ip.is_v4();
        let (src, dst) = (wire(&self.ip.src, v4), wire(&self.ip.dst, v4));
        let (protocol, mut l4) = self.l4.bytes(v4, src, dst);
        if self.ip.fragment.is_some_and(|fragment| fragment.offset != 0) {
            // What a later fragment starts with is no header.
            l4.iter_mut().take(24).for_each(|byte| *byte ^= 0x5a);
        }
        if v4 { self.ip.v4(protocol, &l4, src, dst) } else { self.ip.v6(protocol, &l4, src, dst) }
    }
}

impl Ip {
    fn is_v4(&self) -> bool {
        is_v4(self.src) && is_v4(self.dst)
    }

    fn v4(&self, protocol: u8, l4: &[u8], src: &[u8], dst: &[u8]) -> Vec<u8> {
        let header = 20 + 4 * self.options;
        let (offset, more) = self.fragment.map_or((0, false), |fragment| (fragment.offset & 0x1fff, fragment.more));
        let fragment = u16::from(self.dont_fragment) << 14 | u16::from(more) << 13 | offset;
        let mut l3 = vec![0x40 | (header / 4) as u8, self.tos];
        l3.extend(((header + l4.len()) as u16).to_be_bytes());
        l3.extend([0x12, 0x34]);
        l3.extend(fragment.to_be_bytes());
        l3.extend([self.ttl, protocol, 0, 0]);
        l3.extend(src);
        l3.extend(dst);
        // NOPs and a router alert are what is seen; the bytes do not matter here.
        l3.resize(header, 1);
        let sum = checksum(&l3);
        l3[10..12].copy_from_slice(&sum.to_be_bytes());
        l3.extend(l4);
        l3
    }

    fn v6(&self, protocol: u8, l4: &[u8], src: &[u8], dst: &[u8]) -> Vec<u8> {
        let mut kinds: Vec<u8> = self.extensions.iter().map(|extension| extension.kind as u8).collect();
        kinds.extend(self.fragment.map(|_| 44));
        kinds.push(protocol);
        let mut body = Vec::new();
        for (index, extension) in self.extensions.iter().enumerate() {
            body.extend([kinds[index + 1], extension.more, 1, 4, 0, 0, 0, 0]);
            body.resize(body.len() + 8 * usize::from(extension.more), 0);
        }
        if let Some(Fragment { offset, more }) = self.fragment {
            body.extend([protocol, 0]);
            body.extend((offset << 3 | u16::from(more)).to_be_bytes());
            body.extend([9, 8, 7, 6]);
        }
        body.extend(l4);
        let mut l3 = vec![0x60 | self.tos >> 4, self.tos << 4, 0x12, 0x34];
        l3.extend((body.len() as u16).to_be_bytes());
        l3.extend([kinds[0], self.ttl]);
        l3.extend(src);
        l3.extend(dst);
        l3.extend(body);
        l3
    }
}

impl L4 {
    /// The protocol and the bytes, with a right checksum.
    fn bytes(&self, v4: bool, src: &[u8], dst: &[u8]) -> (u8, Vec<u8>) {
        let sealed = |protocol: u8, mut l4: Vec<u8>, at: usize| {
            let sum = match protocol {
                ICMP => checksum(&l4),
                _ => pseudo_checksum(src, dst, protocol, &l4),
            };
            let sum = if protocol == UDP && sum == 0 { 0xffff } else { sum };
            l4[at..at + 2].copy_from_slice(&sum.to_be_bytes());
            (protocol, l4)
        };
        let icmp = if v4 { ICMP } else { ICMPV6 };
        match self {
            L4::Tcp { ports, flags, options, payload } => sealed(TCP, tcp(*ports, *flags, options, *payload), 16),
            L4::Udp { ports, checksum: true, payload } => sealed(UDP, udp(*ports, &content(*payload)), 6),
            L4::Udp { ports, checksum: false, payload } => (UDP, udp(*ports, &content(*payload))),
            L4::Probe { ports, probe } => sealed(UDP, udp(*ports, &probe.bytes()), 6),
            L4::Icmp { kind, code, payload } => {
                let mut l4 = vec![*kind, *code, 0, 0, 0, 1, 0, 2];
                l4.extend(content(*payload));
                sealed(icmp, l4, 2)
            }
            L4::IcmpError { kind, code } => {
                let inner = L4::Tcp { ports: [443, 40_000], flags: ACK, options: vec![], payload: 20 };
                let mut l4 = vec![*kind, *code, 0, 0, 0, 0, 0, 0];
                l4.extend(inner_packet(v4, dst, src, &inner));
                sealed(icmp, l4, 2)
            }
            L4::Other { protocol, payload } => (*protocol, content(*payload)),
        }
    }
}

/// The packet that an error is about.
fn inner_packet(v4: bool, src: &[u8], dst: &[u8], l4: &L4) -> Vec<u8> {
    let ip = Ip {
        src: Addr::NONE,
        dst: Addr::NONE,
        ttl: 60,
        tos: 0,
        dont_fragment: true,
        options: 0,
        extensions: vec![],
        fragment: None,
    };
    let (protocol, bytes) = l4.bytes(v4, src, dst);
    if v4 { ip.v4(protocol, &bytes, src, dst) } else { ip.v6(protocol, &bytes, src, dst) }
}

fn tcp([source, destination]: [u16; 2], flags: u8, options: &[TcpOption], payload: usize) -> Vec<u8> {
    let mut option_bytes: Vec<u8> = options.iter().flat_map(|option| option.bytes()).collect();
    option_bytes.truncate(40);
    option_bytes.resize(option_bytes.len().next_multiple_of(4), 0);
    let mut l4 = Vec::new();
    l4.extend(source.to_be_bytes());
    l4.extend(destination.to_be_bytes());
    l4.extend([1, 2, 3, 4, 5, 6, 7, 8]);
    l4.extend([(((20 + option_bytes.len()) / 4) << 4) as u8, flags, 0xfa, 0xf0, 0, 0, 0, 0]);
    l4.extend(option_bytes);
    l4.extend(content(payload));
    l4
}

fn udp([source, destination]: [u16; 2], payload: &[u8]) -> Vec<u8> {
    let mut l4 = Vec::new();
    l4.extend(source.to_be_bytes());
    l4.extend(destination.to_be_bytes());
    l4.extend(((8 + payload.len()) as u16).to_be_bytes());
    l4.extend([0, 0]);
    l4.extend(payload);
    l4
}

fn content(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at * 31) as u8).collect()
}

impl Harm {
    fn apply(self, frame: &mut Vec<u8>) {
        // A test run refuses a frame that says IP and has no whole IP header.
        let least = ETH
            + match [frame[12], frame[13]] {
                [0x08, 0x00] => 20,
                [0x86, 0xdd] => 40,
                _ => 1,
            };
        match self {
            Harm::None => {}
            Harm::Cut(at) => frame.truncate(at),
            Harm::Trailing(bytes) => frame.resize(frame.len() + bytes, 0xee),
            Harm::Flip { at, xor } => {
                let after = frame.len() - ETH;
                frame[ETH + at % after] ^= xor;
            }
        }
        frame.resize(frame.len().max(least), 0);
    }
}
