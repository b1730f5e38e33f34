//! ICMP echo, both families, by the kernel's ping sockets (icmp(7)): they fill in identifier and checksum.

use std::{
    io,
    net::{IpAddr, UdpSocket},
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, socket};

use crate::Namespace;

const INTERVAL: Duration = Duration::from_millis(100);
const LIMIT: Duration = Duration::from_secs(1);
/// Bytes of payload after the ICMP header, as ping(8) sends.
const PAYLOAD: usize = 56;

/// What became of some echo requests.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Pings {
    pub sent: u16,
    /// Round trips of those that were answered within a second, in the order of sending.
    pub round_trips: Vec<Duration>,
}

impl Pings {
    pub fn all_answered(&self) -> bool {
        self.sent > 0 && self.round_trips.len() == usize::from(self.sent)
    }

    pub fn none_answered(&self) -> bool {
        self.round_trips.is_empty()
    }

    /// In milliseconds; `None` if nothing was answered.
    pub fn median_ms(&self) -> Option<f64> {
        let mut sorted = self.round_trips.clone();
        sorted.sort();
        sorted.get(sorted.len() / 2).map(|median| median.as_secs_f64() * 1e3)
    }
}

/// Sends `count` echo requests from inside `host`, each after the answer to the last, at most ten a second.
pub fn ping(host: &Namespace, to: IpAddr, count: u16) -> Result<Pings> {
    let (family, protocol, request, answer) = match to {
        IpAddr::V4(_) => (AddressFamily::Inet, SockProtocol::Icmp, 8, 0),
        IpAddr::V6(_) => (AddressFamily::Inet6, SockProtocol::IcmpV6, 128, 129),
    };
    let socket = host
        .run(|| socket(family, SockType::Datagram, SockFlag::SOCK_CLOEXEC, protocol).context("open a ping socket"))?;
    // Has the same system calls as a UDP socket.
    let socket = UdpSocket::from(socket);
    let mut pings = Pings::default();
    for number in 0..count {
        pings.sent += 1;
        let sent = Instant::now();
        if let Some(round_trip) = ask(&socket, to, number, request, answer)? {
            pings.round_trips.push(round_trip);
        }
        if number + 1 < count {
            sleep(INTERVAL.saturating_sub(sent.elapsed()));
        }
    }
    Ok(pings)
}

fn ask(socket: &UdpSocket, to: IpAddr, number: u16, request: u8, answer: u8) -> Result<Option<Duration>> {
    let mut packet = [0; 8 + PAYLOAD];
    packet[0] = request;
    packet[6..8].copy_from_slice(&number.to_be_bytes());
    let sent = Instant::now();
    match socket.send_to(&packet, (to, 0)) {
        Ok(_) => {}
        Err(error) if is_unreachable(&error) => return Ok(None),
        Err(error) => return Err(error).with_context(|| format!("ping {to}")),
    }
    loop {
        let left = LIMIT.saturating_sub(sent.elapsed());
        if left.is_zero() {
            return Ok(None);
        }
        socket.set_read_timeout(Some(left))?;
        match socket.recv(&mut packet) {
            Ok(8..) if packet[0] == answer && packet[6..8] == number.to_be_bytes() => return Ok(Some(sent.elapsed())),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) if is_unreachable(&error) => return Ok(None),
            Err(error) => return Err(error).with_context(|| format!("ping {to}")),
        }
    }
}

/// What no route, a refused route or an ICMP error of a router look like.
fn is_unreachable(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionRefused, HostUnreachable, NetworkUnreachable, PermissionDenied};
    matches!(error.kind(), HostUnreachable | NetworkUnreachable | ConnectionRefused | PermissionDenied)
}
