//! What a sender is told of its path: datagrams that may not be fragmented, as large as its kernel believes possible, until
//! one arrives.

use std::{
    io,
    net::{IpAddr, SocketAddr, UdpSocket},
    os::fd::AsFd,
    time::Duration,
};

use anyhow::{Context, Result, bail};

use super::any;
use crate::{Host, sys};

/// How long a datagram, or the word that it is too big, may be on its way.
const LIMIT: Duration = Duration::from_millis(300);
/// Each node on the way may have something to say.
const ATTEMPTS: usize = 10;

/// The MTU in bytes that `from` believes of its path to `address` of `to`, once a datagram as large has arrived. Without what
/// it was told before.
pub fn told_mtu(from: &Host, to: &Host, address: IpAddr) -> Result<u16> {
    let v6 = address.is_ipv6();
    from.output("ip", &[if v6 { "-6" } else { "-4" }, "route", "flush", "cache"])?;
    let bind = |address: SocketAddr| move || UdpSocket::bind(address).with_context(|| format!("bind {address}"));
    let receiver = to.run(bind((address, 0).into()))?;
    receiver.set_read_timeout(Some(LIMIT))?;
    let sender = from.run(bind(any(address)))?;
    sender.connect(receiver.local_addr()?).with_context(|| format!("connect to {address}"))?;
    sys::never_fragment(sender.as_fd(), v6)?;
    let headers = if v6 { 40 + 8 } else { 20 + 8 };
    let mut believed = Vec::new();
    for _ in 0..ATTEMPTS {
        let mtu = sys::path_mtu(sender.as_fd(), v6)?;
        believed.push(mtu);
        let payload = vec![0; usize::from(mtu) - headers];
        match sender.send(&payload) {
            Ok(_) => {}
            // It was told since.
            Err(error) if error.raw_os_error() == Some(nix::libc::EMSGSIZE) => continue,
            Err(error) => return Err(error).with_context(|| format!("send {mtu} bytes to {address}")),
        }
        match receiver.recv(&mut vec![0; payload.len()]) {
            Ok(_) => return Ok(mtu),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error).context("receive"),
        }
    }
    bail!("{} is told {believed:?} of its path to {address}, and nothing arrives", from.name())
}
