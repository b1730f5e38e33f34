//! Traffic between hosts of the lab: sockets of this process, opened in the hosts' network namespaces.

pub mod forged;
pub mod http;
pub mod path;
pub mod ping;
pub mod stream;
pub mod tcp;
pub mod udp;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// Any address and port of that family.
fn any(family: IpAddr) -> SocketAddr {
    match family {
        IpAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        IpAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    }
}
