//! Our links, as netlink shows them: `carrick-hop` and `carrick-wg0` to `carrick-wg7`, found by name.
//!
//! Invariant: no link of ours is ever up with an address generation mode that would give it one. The IPv4 switches of a
//! link are set over netlink (`IFLA_AF_SPEC/AF_INET/IFLA_INET_CONF`, net/ipv4/devinet.c `inet_set_link_af`), which needs
//! no writable /proc/sys.

use std::{collections::BTreeMap, io};

use netlink_packet_core::{DefaultNla, NLA_F_NESTED};
use netlink_packet_route::{
    RouteNetlinkMessage,
    address::AddressMessage,
    link::{
        AfSpecInet, AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InetDevConf, LinkAttribute, LinkExtentMask, LinkFlags,
        LinkMessage,
    },
};

use super::{
    ethtool, hop,
    rtnl::{Rtnl, absent_is_done, is},
};
use crate::{
    names::Interface,
    state::{Hop, Link},
};

// include/uapi/linux/if_link.h, include/uapi/linux/ip.h
const IFLA_INET_CONF: u16 = 1;
const IPV4_DEVCONF_FORWARDING: u16 = 1;
const IPV4_DEVCONF_RP_FILTER: u16 = 8;

/// Our links, in one reading.
#[derive(Debug, Default)]
pub(super) struct Links {
    pub(super) links: BTreeMap<Interface, Link>,
    pub(super) hop: Option<Hop>,
    /// Of what is named `carrick-hop`, whatever it is.
    pub(super) hop_index: Option<u32>,
}

/// What a link message says of a link.
struct Seen {
    index: u32,
    link: Link,
    hop: Option<Hop>,
    /// Whether it takes part in IPv6 at all; if not, it has no address generation mode to set.
    ipv6: bool,
}

/// Our links. `addresses` are those of the node.
pub(super) async fn read(rtnl: &Rtnl, addresses: &[AddressMessage]) -> io::Result<Links> {
    let mut found = Links::default();
    for interface in Interface::all() {
        let Some(mut seen) = find(rtnl, interface).await? else { continue };
        match ethtool::is_on(&interface.to_string(), ethtool::GRO) {
            Ok(on) => seen.link.gro = on,
            Err(error) if is(&error, &[libc::ENODEV]) => continue,
            Err(error) => return Err(error),
        }
        seen.link.bare &= !addresses.iter().any(|address| address.header.index == seen.index);
        if interface == Interface::Hop {
            (found.hop, found.hop_index) = (seen.hop, Some(seen.index));
        }
        found.links.insert(interface, seen.link);
    }
    Ok(found)
}

/// The index of an existing link.
pub(super) async fn index(rtnl: &Rtnl, interface: Interface) -> io::Result<u32> {
    existing(rtnl, interface).await.map(|seen| seen.index)
}

/// Gives the link its MTU and switches, takes every address from it, and only then its up or down. Returns whether there
/// were addresses: with the last IPv4 address the kernel flushes the link's IPv4 routes (`fib_inetaddr_event`).
pub(super) async fn set(rtnl: &Rtnl, interface: Interface, link: &Link) -> io::Result<bool> {
    let seen = existing(rtnl, interface).await?;
    let mut families = vec![AfSpecUnspec::Inet(vec![devconf(&[
        (IPV4_DEVCONF_FORWARDING, link.forwarding.into()),
        (IPV4_DEVCONF_RP_FILTER, link.rp_filter.into()),
    ])])];
    if seen.ipv6 {
        families.push(AfSpecUnspec::Inet6(vec![AfSpecInet6::AddrGenMode(In6AddrGenMode::None)]));
    }
    let mut message = LinkMessage::default();
    message.header.index = seen.index;
    message.attributes = vec![LinkAttribute::Mtu(link.mtu), LinkAttribute::AfSpecUnspec(families)];
    rtnl.change(RouteNetlinkMessage::SetLink(message), 0).await?;
    ethtool::turn(&interface.to_string(), ethtool::GRO, link.gro)?;

    let addresses = addresses(rtnl).await?.into_iter().filter(|address| address.header.index == seen.index);
    let mut had_addresses = false;
    for address in addresses {
        had_addresses = true;
        absent_is_done(rtnl.change(RouteNetlinkMessage::DelAddress(address), 0).await)?;
    }

    let mut message = LinkMessage::default();
    message.header.index = seen.index;
    message.header.change_mask = LinkFlags::Up;
    message.header.flags = if link.up { LinkFlags::Up } else { LinkFlags::empty() };
    rtnl.change(RouteNetlinkMessage::SetLink(message), 0).await?;
    Ok(had_addresses)
}

/// Deletes the link if it exists.
pub(super) async fn delete(rtnl: &Rtnl, interface: Interface) -> io::Result<()> {
    let Some(seen) = find(rtnl, interface).await? else { return Ok(()) };
    let mut message = LinkMessage::default();
    message.header.index = seen.index;
    absent_is_done(rtnl.change(RouteNetlinkMessage::DelLink(message), 0).await)
}

/// Every address of the node.
pub(super) async fn addresses(rtnl: &Rtnl) -> io::Result<Vec<AddressMessage>> {
    let answers = rtnl.dump(RouteNetlinkMessage::GetAddress(AddressMessage::default())).await?;
    Ok(answers
        .into_iter()
        .filter_map(|answer| if let RouteNetlinkMessage::NewAddress(address) = answer { Some(address) } else { None })
        .collect())
}

/// The link of that index, if there is one.
pub(super) async fn by_index(rtnl: &Rtnl, index: u32) -> io::Result<Option<LinkMessage>> {
    let mut message = LinkMessage::default();
    message.header.index = index;
    get(rtnl, message).await
}

async fn get(rtnl: &Rtnl, mut message: LinkMessage) -> io::Result<Option<LinkMessage>> {
    message.attributes.push(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
    Ok(match rtnl.get(RouteNetlinkMessage::GetLink(message)).await? {
        Some(RouteNetlinkMessage::NewLink(link)) => Some(link),
        _ => None,
    })
}

async fn existing(rtnl: &Rtnl, interface: Interface) -> io::Result<Seen> {
    let hint = if interface == Interface::Hop { "" } else { ": is the tunnel running?" };
    let missing = || io::Error::new(io::ErrorKind::NotFound, format!("{interface} does not exist{hint}"));
    find(rtnl, interface).await?.ok_or_else(missing)
}

async fn find(rtnl: &Rtnl, interface: Interface) -> io::Result<Option<Seen>> {
    let name = interface.to_string();
    let mut message = LinkMessage::default();
    message.attributes = vec![LinkAttribute::IfName(name.clone())];
    // The kernel also finds a foreign link that bears our name as its alternative name.
    Ok(get(rtnl, message).await?.filter(|link| self::name(link) == Some(&name)).map(|link| seen(&link)))
}

/// The name in a link message.
pub(super) fn name(link: &LinkMessage) -> Option<&str> {
    link.attributes.iter().find_map(|a| if let LinkAttribute::IfName(name) = a { Some(name.as_str()) } else { None })
}

/// The MTU in a link message, bytes.
pub(super) fn mtu(link: &LinkMessage) -> Option<u32> {
    link.attributes.iter().find_map(|a| if let LinkAttribute::Mtu(mtu) = a { Some(*mtu) } else { None })
}

/// Neither addresses nor offloads are in the message: `bare` here is the address generation mode alone.
fn seen(message: &LinkMessage) -> Seen {
    let up = message.header.flags.contains(LinkFlags::Up);
    let mut link = Link { mtu: mtu(message).unwrap_or(0), up, bare: true, forwarding: false, rp_filter: 0, gro: true };
    let mut ipv6 = false;
    let families = message.attributes.iter().filter_map(|a| match a {
        LinkAttribute::AfSpecUnspec(families) => Some(families),
        _ => None,
    });
    for family in families.flatten() {
        match family {
            AfSpecUnspec::Inet(attributes) => {
                let conf = attributes.iter().find_map(|a| if let AfSpecInet::DevConf(c) = a { Some(*c) } else { None });
                let conf: InetDevConf = conf.unwrap_or_default();
                link.forwarding = conf.forwarding != 0;
                link.rp_filter = u8::try_from(conf.rp_filter).unwrap_or(u8::MAX);
            }
            AfSpecUnspec::Inet6(attributes) => {
                ipv6 = true;
                let mode = |a: &AfSpecInet6| matches!(a, AfSpecInet6::AddrGenMode(In6AddrGenMode::None));
                link.bare = attributes.iter().any(mode);
            }
            _ => {}
        }
    }
    Seen { index: message.header.index, link, hop: hop::decode(message), ipv6 }
}

/// `IFLA_INET_CONF` as a request: nested attributes, one per switch. The library's own form leaves out zeros, which would
/// then not be set.
fn devconf(switches: &[(u16, u32)]) -> AfSpecInet {
    let mut value = Vec::new();
    for (switch, setting) in switches {
        value.extend(8_u16.to_ne_bytes());
        value.extend(switch.to_ne_bytes());
        value.extend(setting.to_ne_bytes());
    }
    AfSpecInet::Other(DefaultNla::new(IFLA_INET_CONF | NLA_F_NESTED, value))
}
