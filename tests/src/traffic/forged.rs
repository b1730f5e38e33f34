//! Packets that say what they are not: made by hand and sent as they are.

use std::{
    net::{IpAddr, SocketAddr, SocketAddrV4, SocketAddrV6},
    os::fd::{AsFd, AsRawFd},
};

use anyhow::{Context, Result, bail};
use nix::{
    net::if_::if_nametoindex,
    sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, SockaddrIn6, sendto, socket},
};

use crate::{Host, sys};

const UDP: u8 = 17;
/// A frame's ethertypes.
const IPV4: u16 = 0x0800;
const IPV6: u16 = 0x86dd;
/// VXLAN (RFC 7348): the flag that says that there is a VNI.
const HAS_VNI: u8 = 0x08;

/// An IP packet with a UDP datagram, all lengths and checksums right.
pub fn udp(from: SocketAddr, to: SocketAddr, payload: &[u8]) -> Result<Vec<u8>> {
    let length = u16::try_from(8 + payload.len()).context("too long")?;
    let mut datagram = [from.port().to_be_bytes(), to.port().to_be_bytes(), length.to_be_bytes(), [0; 2]].concat();
    datagram.extend(payload);
    let (addresses, mut packet) = match (from.ip(), to.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let total = (20 + length).to_be_bytes();
            let mut header = vec![0x45, 0, total[0], total[1], 0, 0, 0, 0, 64, UDP, 0, 0];
            header.extend([from.octets(), to.octets()].concat());
            let sum = checksum(&header).to_be_bytes();
            header[10..12].copy_from_slice(&sum);
            ([from.octets(), to.octets()].concat(), header)
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let length = length.to_be_bytes();
            let mut header = vec![0x60, 0, 0, 0, length[0], length[1], UDP, 64];
            header.extend([from.octets(), to.octets()].concat());
            ([from.octets(), to.octets()].concat(), header)
        }
        _ => bail!("{from} and {to} are of two families"),
    };
    let pseudo = [&addresses[..], &[0, UDP], &length.to_be_bytes(), &datagram].concat();
    let sum = match checksum(&pseudo) {
        0 => 0xffff,
        sum => sum,
    };
    datagram[6..8].copy_from_slice(&sum.to_be_bytes());
    packet.extend(datagram);
    Ok(packet)
}

/// What a hop's UDP holds: VXLAN with that network and inner destination, around an IP packet.
pub fn vxlan(vni: u32, destination: [u8; 6], packet: &[u8]) -> Vec<u8> {
    let header = [[HAS_VNI, 0, 0, 0], (vni << 8).to_be_bytes()].concat();
    let source = [2, 0, 0, 0, 0, 1];
    [&header[..], &destination, &source, &ether_type(packet).to_be_bytes(), packet].concat()
}

/// Sends an IP packet as it is, by the host's routes.
pub fn send(host: &Host, packet: &[u8], times: u64) -> Result<()> {
    host.run(|| {
        let family = if is_v4(packet) { AddressFamily::Inet } else { AddressFamily::Inet6 };
        let socket =
            socket(family, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::Raw).context("a raw socket")?;
        for _ in 0..times {
            let (fd, flags) = (socket.as_raw_fd(), MsgFlags::empty());
            match destination(packet)? {
                IpAddr::V4(to) => sendto(fd, packet, &SockaddrIn::from(SocketAddrV4::new(to, 0)), flags),
                IpAddr::V6(to) => sendto(fd, packet, &SockaddrIn6::from(SocketAddrV6::new(to, 0, 0, 0)), flags),
            }
            .context("send")?;
        }
        Ok(())
    })
}

/// Sends an IP packet as it is out of a device that has no link headers, as if the host had routed it there.
pub fn send_out_of(host: &Host, device: &str, packet: &[u8], times: u64) -> Result<()> {
    host.run(|| {
        // Receives nothing: it is of no protocol.
        let socket = socket(AddressFamily::Packet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None::<SockProtocol>)
            .context("a packet socket")?;
        let index = if_nametoindex(device).context(device.to_owned())?;
        let mut packet = packet.to_vec();
        for n in 0..times {
            if !is_v4(&packet) {
                // Packets of one hop limit could be merged on the way.
                packet[7] = 64 - (n % 32) as u8;
            }
            sys::send_packet(socket.as_fd(), index, ether_type(&packet), &packet).context("send")?;
        }
        Ok(())
    })
}

fn is_v4(packet: &[u8]) -> bool {
    packet.first().is_some_and(|byte| byte >> 4 == 4)
}

fn ether_type(packet: &[u8]) -> u16 {
    if is_v4(packet) { IPV4 } else { IPV6 }
}

fn destination(packet: &[u8]) -> Result<IpAddr> {
    let v4 = || packet.get(16..)?.first_chunk::<4>().map(|bytes| IpAddr::from(*bytes));
    let v6 = || packet.get(24..)?.first_chunk::<16>().map(|bytes| IpAddr::from(*bytes));
    if is_v4(packet) { v4() } else { v6() }.context("no whole header")
}

/// The Internet checksum (RFC 1071).
fn checksum(bytes: &[u8]) -> u16 {
    let word = |pair: &[u8]| u32::from(pair[0]) << 8 | pair.get(1).map_or(0, |byte| u32::from(*byte));
    let mut sum: u32 = bytes.chunks(2).map(word).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_packet_has_right_sums() {
        let v4 = udp("10.42.0.2:1".parse().unwrap(), "10.44.0.2:53".parse().unwrap(), b"odd").unwrap();
        assert_eq!((v4.len(), checksum(&v4[..20])), (31, 0));
        let pseudo = [&v4[12..20], &[0, UDP, 0, 11], &v4[20..]].concat();
        assert_eq!(checksum(&pseudo), 0);
        let v6 = udp("[fd00::1]:1".parse().unwrap(), "[fd00::2]:53".parse().unwrap(), b"even").unwrap();
        let pseudo = [&v6[8..40], &[0, UDP, 0, 12], &v6[40..]].concat();
        assert_eq!((v6.len(), checksum(&pseudo)), (52, 0));
        let inner = vxlan(0x0012_3456, [2; 6], &v6);
        assert_eq!(inner[..8], [8, 0, 0, 0, 0x12, 0x34, 0x56, 0]);
        assert_eq!((inner.len(), &inner[20..22]), (8 + 14 + 52, &[0x86, 0xdd][..]));
    }
}
