//! What passed on an interface: a packet socket, and a count by kind.
//!
//! Invariant: a capture that missed packets says so; "nothing seen" then proves nothing.

use std::{
    io,
    net::{IpAddr, UdpSocket},
    ops::RangeInclusive,
    os::fd::{AsFd, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::{Context, Result};
use ipnetwork::IpNetwork;
use nix::{
    net::if_::if_nametoindex,
    sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, setsockopt, socket, sockopt},
};

use crate::{Namespace, sys};

/// Bytes that are kept of each packet: all headers that are looked at.
const KEPT: usize = 256;
/// Bytes of socket buffer: half a second at full speed.
const BUFFER: usize = 64 << 20;
const TICK: Duration = Duration::from_millis(50);
/// Packets that are described, of each kind.
const DESCRIBED: usize = 5;

/// What should be told apart.
#[derive(Clone, Debug)]
pub struct Expected {
    /// UDP ports of the tunnel.
    pub tunnel: RangeInclusive<u16>,
    /// UDP port that the hop between nodes goes to.
    pub hop: u16,
    /// Nothing from or to these may pass in the clear.
    pub private: Vec<IpNetwork>,
}

/// What passed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// WireGuard messages to or from a port of the tunnel.
    pub tunnel: u64,
    /// Packets to the hop's port.
    pub hop: u64,
    /// Address resolution and group membership: ARP, neighbour discovery, MLD, IGMP.
    pub link: u64,
    /// Packets from or to a private range.
    pub clear: u64,
    /// Anything else.
    pub other: u64,
    /// Packets that the capture was too slow for.
    pub missed: u64,
    /// The first few of `clear` and of `other`.
    pub described: Vec<String>,
}

impl Seen {
    /// The sum of two captures.
    pub fn add(&mut self, other: Seen) {
        self.tunnel += other.tunnel;
        self.hop += other.hop;
        self.link += other.link;
        self.clear += other.clear;
        self.other += other.other;
        self.missed += other.missed;
        self.described.extend(other.described);
    }
}

/// A running capture.
#[derive(Debug)]
pub struct Capture {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<Seen>>,
}

impl Capture {
    /// Everything that passes on `interface` of `host` from now on, both directions.
    pub fn start(host: &Namespace, interface: &str, expected: Expected) -> Result<Capture> {
        let socket = host.run(|| open(interface).with_context(|| format!("capture on {interface}")))?;
        let stop = Arc::<AtomicBool>::default();
        let thread = {
            let stop = stop.clone();
            thread::spawn(move || count(socket, &expected, &stop))
        };
        Ok(Capture { stop, thread })
    }

    /// Ends it and returns what passed until now.
    pub fn stop(self) -> Result<Seen> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

fn open(interface: &str) -> Result<OwnedFd> {
    // Protocol 0 (the `None`): it receives nothing before it is bound.
    let socket = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, None::<SockProtocol>)?;
    setsockopt(&socket, sockopt::RcvBufForce, &BUFFER)?;
    sys::bind_packet(socket.as_fd(), if_nametoindex(interface)?, KEPT as u32)?;
    Ok(socket)
}

fn count(socket: OwnedFd, expected: &Expected, stop: &AtomicBool) -> Result<Seen> {
    // Has the same system calls as a UDP socket, where no address is asked for.
    let socket = UdpSocket::from(socket);
    socket.set_read_timeout(Some(TICK))?;
    let mut seen = Seen::default();
    let mut frame = [0; KEPT];
    loop {
        match socket.recv(&mut frame) {
            Ok(length) => note(&mut seen, classify(&frame[..length], expected), &frame[..length]),
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted | io::ErrorKind::NetworkDown
                ) =>
            {
                // The buffer is empty.
                if stop.load(Ordering::Relaxed) {
                    break;
                }
            }
            Err(error) => return Err(error).context("capture"),
        }
    }
    let (_, missed) = sys::packet_statistics(socket.as_fd()).context("capture")?;
    seen.missed = missed.into();
    Ok(seen)
}

fn note(seen: &mut Seen, kind: Kind, frame: &[u8]) {
    let (count, name) = match kind {
        Kind::Tunnel => (&mut seen.tunnel, None),
        Kind::Hop => (&mut seen.hop, None),
        Kind::Link => (&mut seen.link, None),
        Kind::Clear => (&mut seen.clear, Some("clear text")),
        Kind::Other => (&mut seen.other, Some("other")),
    };
    *count += 1;
    if let Some(name) = name.filter(|_| *count <= DESCRIBED as u64) {
        seen.described.push(format!("{name}: {}", describe(frame)));
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Tunnel,
    Hop,
    Link,
    Clear,
    Other,
}

const ARP: u16 = 0x0806;
const IPV4: u16 = 0x0800;
const IPV6: u16 = 0x86dd;
const IGMP: u8 = 2;
const UDP: u8 = 17;
const ICMPV6: u8 = 58;

/// An IP packet as far as it was kept.
struct Packet<'a> {
    source: IpAddr,
    destination: IpAddr,
    protocol: u8,
    /// Empty in all fragments but the first.
    payload: &'a [u8],
}

fn classify(frame: &[u8], expected: &Expected) -> Kind {
    if ether_type(frame) == Some(ARP) {
        return Kind::Link;
    }
    let Some(packet) = parse(frame) else { return Kind::Other };
    let private = |ip: IpAddr| expected.private.iter().any(|range| range.contains(ip));
    if private(packet.source) || private(packet.destination) {
        return Kind::Clear;
    }
    match (packet.protocol, packet.payload) {
        (IGMP, _) => Kind::Link,
        // MLD, router and neighbour discovery, redirect; MLDv2.
        (ICMPV6, [130..=137 | 143, ..]) => Kind::Link,
        (UDP, datagram) if is_tunnel(datagram, &expected.tunnel) => Kind::Tunnel,
        (UDP, [_, _, high, low, ..]) if u16::from_be_bytes([*high, *low]) == expected.hop => Kind::Hop,
        _ => Kind::Other,
    }
}

/// A WireGuard message: type 1 to 4, then three zero bytes.
fn is_tunnel(datagram: &[u8], ports: &RangeInclusive<u16>) -> bool {
    let Some((header, message)) = datagram.split_first_chunk::<8>() else { return false };
    let port = |at: usize| u16::from_be_bytes([header[at], header[at + 1]]);
    (ports.contains(&port(0)) || ports.contains(&port(2))) && matches!(message, [1..=4, 0, 0, 0, ..])
}

fn ether_type(frame: &[u8]) -> Option<u16> {
    frame.get(12..14).map(|bytes| u16::from_be_bytes([bytes[0], bytes[1]]))
}

/// `None` for what is no whole IP header.
fn parse(frame: &[u8]) -> Option<Packet<'_>> {
    let ip = frame.get(14..)?;
    match ether_type(frame)? {
        IPV4 => {
            let header = ip.first_chunk::<20>()?;
            let payload = ip.get(usize::from(header[0] & 15) * 4..)?;
            let fragment = u16::from_be_bytes([header[6], header[7]]) & 0x1fff;
            Some(Packet {
                source: IpAddr::from(*header[12..].first_chunk::<4>()?),
                destination: IpAddr::from(*header[16..].first_chunk::<4>()?),
                protocol: header[9],
                payload: if fragment == 0 { payload } else { &[] },
            })
        }
        IPV6 => {
            let (header, mut payload) = ip.split_first_chunk::<40>()?;
            let mut protocol = header[6];
            // Hop-by-hop, routing and destination options: next header, length in 8 bytes beyond the first 8.
            while let (0 | 43 | 60, [next, length, ..]) = (protocol, payload) {
                protocol = *next;
                payload = payload.get(usize::from(*length) * 8 + 8..)?;
            }
            Some(Packet {
                source: IpAddr::from(*header[8..].first_chunk::<16>()?),
                destination: IpAddr::from(*header[24..].first_chunk::<16>()?),
                protocol,
                payload,
            })
        }
        _ => None,
    }
}

fn describe(frame: &[u8]) -> String {
    let Some(packet) = parse(frame) else {
        return format!("ethertype {:#06x}, {} bytes", ether_type(frame).unwrap_or_default(), frame.len());
    };
    let Packet { source, destination, protocol, payload } = packet;
    match (protocol, payload) {
        (6 | UDP, [s0, s1, d0, d1, ..]) => {
            let name = if protocol == UDP { "UDP" } else { "TCP" };
            let port = |high, low| u16::from_be_bytes([high, low]);
            format!("{name} {source} port {} > {destination} port {}", port(*s0, *s1), port(*d0, *d1))
        }
        (1 | ICMPV6, [kind, code, ..]) => format!("ICMP type {kind} code {code} {source} > {destination}"),
        _ => format!("protocol {protocol} {source} > {destination}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ethernet(ether_type: u16, packet: &[u8]) -> Vec<u8> {
        [&[0; 12][..], &ether_type.to_be_bytes(), packet].concat()
    }

    /// From 192.0.2.1 to `to`; `fragment` is the offset field.
    fn v4(to: [u8; 4], protocol: u8, fragment: u16, payload: &[u8]) -> Vec<u8> {
        let mut header = [0; 20];
        header[0] = 0x45;
        header[6..8].copy_from_slice(&fragment.to_be_bytes());
        header[9] = protocol;
        header[12..16].copy_from_slice(&[192, 0, 2, 1]);
        header[16..].copy_from_slice(&to);
        ethernet(IPV4, &[&header[..], payload].concat())
    }

    fn v6(to: u16, protocol: u8, payload: &[u8]) -> Vec<u8> {
        let mut header = [0; 40];
        header[6] = protocol;
        header[24..26].copy_from_slice(&to.to_be_bytes());
        ethernet(IPV6, &[&header[..], payload].concat())
    }

    fn udp(source: u16, destination: u16, message: &[u8]) -> Vec<u8> {
        [&source.to_be_bytes()[..], &destination.to_be_bytes(), &[0; 4], message].concat()
    }

    #[test]
    fn frames_are_told_apart() {
        let expected = Expected {
            tunnel: 27473..=27474,
            hop: 27472,
            private: ["10.42.0.0/16", "fd00::/16"].map(|r| r.parse().unwrap()).into(),
        };
        let (public, private) = ([203, 0, 113, 2], [10, 42, 0, 2]);
        let data = [4, 0, 0, 0, 9];
        let cases = [
            (v4(public, UDP, 0, &udp(5, 27473, &data)), Kind::Tunnel),
            (v4(public, UDP, 0, &udp(27474, 5, &data)), Kind::Tunnel),
            (v6(0x2001, UDP, &udp(5, 27473, &data)), Kind::Tunnel),
            (v4(public, UDP, 0, &udp(27475, 27471, &data)), Kind::Other),
            (v4(public, UDP, 0, &udp(27456, 27472, &[8, 0, 0, 0])), Kind::Hop),
            (v4(public, UDP, 0, &udp(27472, 27456, &[8, 0, 0, 0])), Kind::Other),
            (v4(public, UDP, 0, &udp(5, 27473, &[5, 0, 0, 0])), Kind::Other),
            (v4(public, UDP, 0, &udp(5, 27473, &[4, 0, 1, 0])), Kind::Other),
            (v4(public, UDP, 0, &udp(5, 27473, &[])), Kind::Other),
            (v4(public, UDP, 185, &udp(5, 27473, &data)), Kind::Other),
            (v4(public, 6, 0, &udp(5, 27473, &data)), Kind::Other),
            (v4(public, 1, 0, &[8, 0]), Kind::Other),
            (v4(private, UDP, 0, &udp(5, 27473, &data)), Kind::Clear),
            (v4(private, 1, 185, &[]), Kind::Clear),
            (v6(0xfd00, ICMPV6, &[128, 0]), Kind::Clear),
            (v6(0xff02, ICMPV6, &[135, 0]), Kind::Link),
            (v6(0xff02, 0, &[&[ICMPV6, 0, 0, 0, 0, 0, 0, 0][..], &[143, 0]].concat()), Kind::Link),
            (v6(0x2001, ICMPV6, &[128, 0]), Kind::Other),
            (v4([224, 0, 0, 22], IGMP, 0, &[]), Kind::Link),
            (ethernet(ARP, &[0; 28]), Kind::Link),
            (ethernet(0x88cc, &[0; 28]), Kind::Other),
            (ethernet(IPV4, &[0x45; 19]), Kind::Other),
            (vec![0; 13], Kind::Other),
        ];
        for (frame, kind) in cases {
            assert_eq!(classify(&frame, &expected), kind, "{}", describe(&frame));
        }
    }
}
