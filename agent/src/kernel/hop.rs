//! What `carrick-hop` is beside a link: a VXLAN device in external mode, told by name.
//!
//! Invariant: a device reads as a [`Hop`] only if it is, in everything that a packet meets, what [`set`] makes. It is
//! replaced as a whole, because the kernel changes neither mode nor ports of one that exists ("cannot change
//! COLLECT_METADATA flag", drivers/net/vxlan/vxlan_core.c `vxlan_nl2conf`).
//!
//! Without ARP: in external mode nobody answers, and only requests would leave. Learning off: `steer` says where each
//! packet goes. Zero UDP checksums are taken over IPv6 too: the inner packet has its own. An external device opens a
//! socket of each family that the node has. Offloads stay at their defaults.

use std::io;

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::{
    RouteNetlinkMessage,
    link::{InfoData, InfoKind, InfoVxlan, LinkAttribute, LinkFlags, LinkInfo, LinkMessage},
};

use super::{link, rtnl::Rtnl};
use crate::{
    names::{HOP, Interface},
    state::Hop,
};

/// Makes the device, down, in place of whatever has its name. With what was there go its routes and programs.
pub(super) async fn set(rtnl: &Rtnl, hop: &Hop) -> io::Result<()> {
    link::delete(rtnl, Interface::Hop).await?;
    let options = vec![
        InfoVxlan::CollectMetadata(true),
        InfoVxlan::Port(hop.port),
        InfoVxlan::PortRange(hop.sources),
        InfoVxlan::Learning(false),
        InfoVxlan::UDPZeroCsumRX(true),
    ];
    let mut message = LinkMessage::default();
    message.header.change_mask = LinkFlags::Noarp;
    message.header.flags = LinkFlags::Noarp;
    message.attributes = vec![
        LinkAttribute::IfName(HOP.to_owned()),
        LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Vxlan), LinkInfo::Data(InfoData::Vxlan(options))]),
    ];
    rtnl.change(RouteNetlinkMessage::NewLink(message), NLM_F_CREATE | NLM_F_EXCL).await
}

/// `None`: the link is something else, or not quite this.
pub(super) fn decode(message: &LinkMessage) -> Option<Hop> {
    let info =
        message.attributes.iter().find_map(|a| if let LinkAttribute::LinkInfo(i) = a { Some(i) } else { None })?;
    let options = info
        .iter()
        .find_map(|i| if let LinkInfo::Data(InfoData::Vxlan(options)) = i { Some(options) } else { None })?;
    let (mut port, mut sources, mut external, mut zero_checksums) = (None, None, false, false);
    for option in options {
        match option {
            InfoVxlan::Port(found) => port = Some(*found),
            InfoVxlan::PortRange(found) => sources = Some(*found),
            InfoVxlan::CollectMetadata(found) => external = *found,
            InfoVxlan::UDPZeroCsumRX(found) => zero_checksums = *found,
            InfoVxlan::Learning(true)
            | InfoVxlan::Proxy(true)
            | InfoVxlan::Rsc(true)
            | InfoVxlan::L2Miss(true)
            | InfoVxlan::L3Miss(true)
            | InfoVxlan::RemCsumTX(true)
            | InfoVxlan::RemCsumRX(true)
            | InfoVxlan::Vnifilter(true)
            | InfoVxlan::Gbp
            | InfoVxlan::Gpe
            | InfoVxlan::Group(_)
            | InfoVxlan::Group6(_)
            | InfoVxlan::Local(_)
            | InfoVxlan::Local6(_)
            | InfoVxlan::Link(_) => return None,
            // Of no effect in external mode, or unknown to this version of us.
            _ => {}
        }
    }
    let whole = external && zero_checksums && message.header.flags.contains(LinkFlags::Noarp);
    whole.then_some(Hop { port: port?, sources: sources? })
}
