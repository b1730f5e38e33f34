//! Overlay addresses: /128 on `lo`, marked by their protocol (`IFA_PROTO`, Linux 5.18), which nothing else uses.
//!
//! They are deprecated (preferred for 0 s), so that the kernel does not choose one as the source of a connection that
//! is not bound to it, and leave no route outside the local table.
//!
//! Invariant: an address without the mark, or otherwise than [`add`] writes it, is neither read nor removed: it is foreign,
//! or damaged, and [`add`] replaces it where it is wanted.

use std::{
    collections::BTreeSet,
    io,
    net::{IpAddr, Ipv6Addr},
};

use netlink_packet_core::{NLM_F_CREATE, NLM_F_REPLACE};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    address::{AddressAttribute, AddressFlags, AddressMessage, AddressProtocol, AddressScope, CacheInfo},
};

use super::rtnl::{Rtnl, absent_is_done};

/// The loopback link of every network namespace, include/net/flow.h `LOOPBACK_IFINDEX`.
pub(super) const LO: u32 = 1;
/// Our mark; `I` in ASCII.
const PROTOCOL: AddressProtocol = AddressProtocol::Other(73);

/// Those of ours among the node's addresses.
pub(super) fn overlay(addresses: &[AddressMessage]) -> BTreeSet<Ipv6Addr> {
    addresses.iter().filter(|message| as_written(message)).filter_map(address).collect()
}

/// Whether the message bears our mark, whatever else it says.
pub(super) fn is_marked(message: &AddressMessage) -> bool {
    message.attributes.contains(&AddressAttribute::Protocol(PROTOCOL))
}

/// Puts the address in place, also of one that is not as it should be.
pub(super) async fn add(rtnl: &Rtnl, address: Ipv6Addr) -> io::Result<()> {
    let held = super::link::addresses(rtnl).await?;
    let on_lo = held.into_iter().filter(|message| message.header.index == LO);
    for other in on_lo.filter(|message| self::address(message) == Some(address) && message.header.prefix_len != 128) {
        // Replacing changes everything of an address but its length.
        absent_is_done(rtnl.change(RouteNetlinkMessage::DelAddress(other), 0).await)?;
    }
    let mut message = blank(address);
    let mut lifetime = CacheInfo::default();
    (lifetime.ifa_preferred, lifetime.ifa_valid) = (0, u32::MAX);
    message.attributes.extend([
        AddressAttribute::CacheInfo(lifetime),
        AddressAttribute::Flags(AddressFlags::Nodad | AddressFlags::Noprefixroute),
        AddressAttribute::Protocol(PROTOCOL),
    ]);
    rtnl.change(RouteNetlinkMessage::NewAddress(message), NLM_F_CREATE | NLM_F_REPLACE).await
}

/// Removes the address.
pub(super) async fn delete(rtnl: &Rtnl, address: Ipv6Addr) -> io::Result<()> {
    absent_is_done(rtnl.change(RouteNetlinkMessage::DelAddress(blank(address)), 0).await)
}

fn blank(address: Ipv6Addr) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = AddressFamily::Inet6;
    message.header.index = LO;
    message.header.prefix_len = 128;
    message.header.scope = AddressScope::Universe;
    let address = IpAddr::V6(address);
    message.attributes = vec![AddressAttribute::Local(address), AddressAttribute::Address(address)];
    message
}

fn as_written(message: &AddressMessage) -> bool {
    let flags =
        message.attributes.iter().find_map(|a| if let AddressAttribute::Flags(f) = a { Some(*f) } else { None });
    let wanted = AddressFlags::Deprecated | AddressFlags::Noprefixroute | AddressFlags::Permanent;
    is_marked(message)
        && message.header.index == LO
        && message.header.prefix_len == 128
        && flags.is_some_and(|flags| flags.contains(wanted))
}

fn address(message: &AddressMessage) -> Option<Ipv6Addr> {
    message.attributes.iter().find_map(|attribute| match attribute {
        AddressAttribute::Address(IpAddr::V6(address)) => Some(*address),
        _ => None,
    })
}
