//! What becomes of the routes of one table of a host, told by its kernel (rtnetlink(7)) as it happens.
//!
//! Invariant: nothing is missed silently. A listener that was too slow is an error.

use std::{
    net::{Ipv4Addr, Ipv6Addr},
    os::fd::{AsRawFd, OwnedFd},
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use ipnetwork::IpNetwork;
use nix::{
    errno::Errno,
    sys::{
        socket::{
            AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, setsockopt, socket,
            sockopt,
        },
        time::TimeVal,
    },
};

use crate::Namespace;

/// `RTMGRP_IPV4_ROUTE` and `RTMGRP_IPV6_ROUTE`.
const GROUPS: u32 = 0x40 | 0x400;
const NEW_ROUTE: u16 = 24;
const DEL_ROUTE: u16 = 25;
const DESTINATION: u16 = 1;
const TABLE: u16 = 15;
/// Of `struct nlmsghdr`, `struct rtmsg` and `struct rtattr`, in bytes.
const HEADER: usize = 16;
const ROUTE: usize = 12;
const ATTRIBUTE: usize = 4;
/// What waits to be read, in bytes: a start of an agent makes thousands at once.
const BUFFER: usize = 8 << 20;

/// A route that has come or gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Change {
    pub there: bool,
    pub to: IpNetwork,
    /// When it was read here: some tens of microseconds after it happened, on a machine that is not busy.
    pub at: Instant,
}

/// Hears of what happens from its making on.
#[derive(Debug)]
pub struct Watch {
    socket: OwnedFd,
    table: u32,
}

impl Watch {
    pub fn new(host: &Namespace, table: u32) -> Result<Watch> {
        let socket = host.run(|| {
            let socket =
                socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkRoute)?;
            setsockopt(&socket, sockopt::RcvBufForce, &BUFFER)?;
            bind(socket.as_raw_fd(), &NetlinkAddr::new(0, GROUPS))?;
            Ok(socket)
        });
        Ok(Watch { socket: socket.context("listen for routes")?, table })
    }

    /// The next changes, in their order; none within `patience` is an empty list.
    pub fn next(&self, patience: Duration) -> Result<Vec<Change>> {
        let micros = i64::try_from(patience.as_micros()).context("patience")?.max(1);
        let limit = TimeVal::new(micros / 1_000_000, micros % 1_000_000);
        setsockopt(&self.socket, sockopt::ReceiveTimeout, &limit).context("set a time limit")?;
        let mut bytes = vec![0; 1 << 16];
        let read = match recv(self.socket.as_raw_fd(), &mut bytes, MsgFlags::empty()) {
            Ok(read) => read,
            Err(Errno::EAGAIN) => return Ok(Vec::new()),
            // ENOBUFS: some were lost.
            Err(error) => return Err(error).context("hear of routes"),
        };
        let at = Instant::now();
        let changes = parse(&bytes[..read], self.table).into_iter();
        Ok(changes.map(|(there, to)| Change { there, to, at }).collect())
    }
}

/// The routes of that table that messages tell of, and whether each is there now.
fn parse(mut messages: &[u8], table: u32) -> Vec<(bool, IpNetwork)> {
    let mut found = Vec::new();
    while let Some((message, rest)) = cut(messages, u32_at(messages, 0)) {
        messages = rest;
        let there = match u16_at(message, 4) {
            Some(NEW_ROUTE) => true,
            Some(DEL_ROUTE) => false,
            _ => continue,
        };
        let of_table = message.get(HEADER..).and_then(route).filter(|(of, _)| *of == table);
        found.extend(of_table.map(|(_, to)| (there, to)));
    }
    found
}

/// The table and the destination of a `struct rtmsg` and its attributes.
fn route(message: &[u8]) -> Option<(u32, IpNetwork)> {
    let [family, length, _, _, table] = *message.first_chunk()?;
    let mut table = u32::from(table);
    let mut to = None;
    let mut attributes = message.get(ROUTE..)?;
    while let Some((attribute, rest)) = cut(attributes, u16_at(attributes, 0).map(u32::from)) {
        attributes = rest;
        let value = attribute.get(ATTRIBUTE..)?;
        match u16_at(attribute, 2)? {
            TABLE => table = u32_at(value, 0)?,
            DESTINATION => to = Some(value),
            _ => {}
        }
    }
    let ip = match (i32::from(family), to) {
        (libc::AF_INET, Some(to)) => Ipv4Addr::from(*to.first_chunk::<4>()?).into(),
        (libc::AF_INET, None) => Ipv4Addr::UNSPECIFIED.into(),
        (libc::AF_INET6, Some(to)) => Ipv6Addr::from(*to.first_chunk::<16>()?).into(),
        (libc::AF_INET6, None) => Ipv6Addr::UNSPECIFIED.into(),
        _ => return None,
    };
    Some((table, IpNetwork::new(ip, length).ok()?))
}

/// What is that long, its own header included, and what follows it, aligned to four bytes.
fn cut(bytes: &[u8], length: Option<u32>) -> Option<(&[u8], &[u8])> {
    let length = length? as usize;
    if length < ATTRIBUTE {
        return None;
    }
    let next = length.next_multiple_of(4).min(bytes.len());
    Some((bytes.get(..length)?, &bytes[next..]))
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    const OURS: u32 = 7473;

    fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
        let length = u16::try_from(ATTRIBUTE + value.len()).unwrap();
        let mut bytes = [length.to_ne_bytes(), kind.to_ne_bytes()].concat();
        bytes.extend(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn message(kind: u16, family: i32, length: u8, attributes: &[Vec<u8>]) -> Vec<u8> {
        let mut route = vec![0; ROUTE];
        (route[0], route[1], route[4]) = (family as u8, length, 252);
        route.extend(attributes.concat());
        let mut bytes = u32::try_from(HEADER + route.len()).unwrap().to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.resize(HEADER, 0);
        bytes.extend(route);
        bytes
    }

    fn of(table: u32) -> Vec<u8> {
        attribute(TABLE, &table.to_ne_bytes())
    }

    #[test]
    fn routes_of_one_table_are_told_in_order() {
        let v4 = attribute(DESTINATION, &[10, 1, 2, 0]);
        let v6 = attribute(DESTINATION, &Ipv6Addr::new(0xfd00, 1, 0, 0, 0, 0, 0, 0).octets());
        let odd = attribute(9, b"odd");
        let messages = [
            message(NEW_ROUTE, libc::AF_INET, 24, &[odd.clone(), of(OURS), v4.clone()]),
            message(NEW_ROUTE, libc::AF_INET, 24, &[of(254), v4.clone()]),
            message(16, libc::AF_INET, 24, &[of(OURS), v4.clone()]),
            message(DEL_ROUTE, libc::AF_INET6, 48, &[v6, of(OURS), odd]),
            message(NEW_ROUTE, libc::AF_INET, 0, &[of(OURS)]),
        ];
        let wanted = [(true, "10.1.2.0/24"), (false, "fd00:1::/48"), (true, "0.0.0.0/0")];
        let wanted: Vec<(bool, IpNetwork)> = wanted.map(|(there, to)| (there, to.parse().unwrap())).to_vec();
        assert_eq!(parse(&messages.concat(), OURS), wanted);
    }

    #[test]
    fn nothing_that_is_cut_off_is_taken_for_a_route() {
        let whole = message(NEW_ROUTE, libc::AF_INET, 24, &[of(OURS), attribute(DESTINATION, &[10, 1, 2, 0])]);
        for length in 0..whole.len() {
            assert!(parse(&whole[..length], OURS).is_empty(), "{length}");
        }
        assert_eq!(parse(&whole, OURS).len(), 1);
        assert!(parse(&[0; 64], OURS).is_empty());
    }
}
