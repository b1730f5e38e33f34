//! What the plan wants to know of the node and only its kernel can say. Nothing here writes.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use netlink_packet_route::{
    RouteNetlinkMessage,
    address::{AddressAttribute, AddressHeaderFlags, AddressMessage},
    link::{LinkFlags, LinkLayerType, LinkMessage},
    route::{RouteAttribute, RouteFlags, RouteMessage},
};

use super::{
    address, ethtool, link, nft,
    route::address_family,
    rtnl::{Rtnl, is},
};
use crate::{names::Interface, state::Family};

/// Bytes; what is assumed where no native device is known.
const DEFAULT_MTU: u32 = 1500;

/// The node, as its kernel sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// By name, the devices by which others are reached: those of the default routes, and those that carry an address by
    /// which the cluster knows the node. Neither loopback nor our own, nor the CNI's.
    pub native: BTreeMap<String, Native>,
    /// Smallest MTU, in bytes, of the native devices; where none is known, of those with an address, or else 1500.
    pub underlay_mtu: u32,
    /// Usable addresses of the node, on whatever link; none of loopback or link-local scope, none of our own.
    pub addresses: BTreeSet<IpAddr>,
    pub conditions: BTreeSet<Condition>,
}

/// A device by which this node reaches others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Native {
    /// Bytes.
    pub mtu: u32,
    /// Whether its packets begin with an Ethernet header of 14 bytes; if not, with the IP header.
    pub ethernet: bool,
    /// Whether the device itself cuts what leaves by the hop into packets; if not, this node's processors do.
    pub tunnel_segmentation: bool,
}

/// What somebody else has to change before everything works; for status.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, thiserror::Error)]
pub enum Condition {
    #[error("net.ipv4.ip_forward is 0: this node forwards no IPv4 packets of its pods; the CNI usually sets it to 1")]
    Ipv4NotForwarding,
    #[error("IPv6 is off on this node: IPv6 ranges are not reachable from it")]
    Ipv6Off,
    #[error(
        "net.ipv6.conf.all.forwarding is 0: this node forwards no IPv6 packets of its pods; the CNI usually sets it to 1"
    )]
    Ipv6NotForwarding,
}

/// Reads facts; holds one rtnetlink socket.
#[derive(Clone, Debug)]
pub struct Reader {
    rtnl: Rtnl,
}

impl Reader {
    /// For the network namespace it is called in, on a tokio runtime.
    pub fn new() -> io::Result<Reader> {
        Ok(Reader { rtnl: Rtnl::new()? })
    }

    /// `internal`: the addresses by which the cluster knows this node (its InternalIPs).
    pub async fn read(&self, internal: &BTreeSet<IpAddr>) -> io::Result<Node> {
        let mut addresses = link::addresses(&self.rtnl).await?;
        addresses.retain(|message| !address::is_marked(message));
        let on = |wanted: &dyn Fn(IpAddr) -> bool| -> BTreeSet<u32> {
            let on = addresses.iter().filter(|message| usable(message).is_some_and(wanted));
            on.map(|message| message.header.index).collect()
        };
        let mut indexes = on(&|address| internal.contains(&address));
        for family in Family::ALL {
            indexes.extend(self.ways_out(family).await?);
        }
        let native = self.devices(indexes).await?;
        let known = if native.is_empty() { &self.devices(on(&|_| true)).await? } else { &native };
        Ok(Node {
            underlay_mtu: known.values().map(|native| native.mtu).min().unwrap_or(DEFAULT_MTU),
            native,
            addresses: addresses.iter().filter_map(usable).collect(),
            conditions: conditions(),
        })
    }

    /// The devices by which the world is reached: one lookup of an address nobody has (RFC 5737, RFC 3849), since a dump of
    /// the main table may be half a million routes.
    async fn ways_out(&self, family: Family) -> io::Result<BTreeSet<u32>> {
        let (nowhere, length) = match family {
            Family::V4 => (IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)), 32),
            Family::V6 => (IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1)), 128),
        };
        let mut question = RouteMessage::default();
        question.header.address_family = address_family(family);
        question.header.destination_prefix_length = length;
        question.header.flags = RouteFlags::FibMatch;
        question.attributes = vec![RouteAttribute::Destination(nowhere.into())];
        let answer = match self.rtnl.get(RouteNetlinkMessage::GetRoute(question)).await {
            Ok(Some(RouteNetlinkMessage::NewRoute(route))) => route,
            Ok(_) => return Ok(BTreeSet::new()),
            Err(error) if is(&error, &NO_ROUTE) => return Ok(BTreeSet::new()),
            Err(error) => return Err(error),
        };
        let mut devices = BTreeSet::new();
        for attribute in answer.attributes {
            match attribute {
                RouteAttribute::Oif(index) => devices.extend([index]),
                RouteAttribute::MultiPath(hops) => devices.extend(hops.iter().map(|hop| hop.interface_index)),
                _ => {}
            }
        }
        Ok(devices)
    }

    /// Of these indexes; loopback and our own do not count.
    async fn devices(&self, indexes: BTreeSet<u32>) -> io::Result<BTreeMap<String, Native>> {
        let mut devices = BTreeMap::new();
        for index in indexes {
            let Some((name, mut native)) = link::by_index(&self.rtnl, index).await?.as_ref().and_then(device) else {
                continue;
            };
            native.tunnel_segmentation = match ethtool::is_on(&name, ethtool::TUNNEL_SEGMENTATION) {
                Ok(on) => on,
                Err(error) if is(&error, &[libc::ENODEV, libc::EOPNOTSUPP]) => false,
                Err(error) => return Err(error),
            };
            devices.insert(name, native);
        }
        Ok(devices)
    }
}

/// Offloads are not in the message.
fn device(message: &LinkMessage) -> Option<(String, Native)> {
    let name = link::name(message)?;
    let ours = Interface::from_link(name).is_some();
    if ours || message.header.flags.contains(LinkFlags::Loopback) || !nft::can_say(name) {
        return None;
    }
    let ethernet = message.header.link_layer_type == LinkLayerType::Ether;
    Some((name.to_owned(), Native { mtu: link::mtu(message)?, ethernet, tunnel_segmentation: false }))
}

/// What the kernel says where no route leads, or one that refuses; and where a family is off.
const NO_ROUTE: [i32; 6] =
    [libc::ENETUNREACH, libc::EHOSTUNREACH, libc::EACCES, libc::EINVAL, libc::EOPNOTSUPP, libc::EAFNOSUPPORT];

/// The address, if packets may be sent from it and others can reach it.
fn usable(message: &AddressMessage) -> Option<IpAddr> {
    let unproven = AddressHeaderFlags::Tentative | AddressHeaderFlags::Dadfailed;
    if message.header.flags.intersects(unproven) {
        return None;
    }
    // On a point-to-point link IFA_ADDRESS is the other end.
    let local =
        message.attributes.iter().find_map(|a| if let AddressAttribute::Local(ip) = a { Some(*ip) } else { None });
    let first =
        message.attributes.iter().find_map(|a| if let AddressAttribute::Address(ip) = a { Some(*ip) } else { None });
    local.or(first).filter(|address| match address {
        IpAddr::V4(address) => !address.is_loopback() && !address.is_link_local(),
        IpAddr::V6(address) => !address.is_loopback() && !address.is_unicast_link_local(),
    })
}

fn conditions() -> BTreeSet<Condition> {
    let switch = |path: &str| fs::read_to_string(path).ok().map(|text| text.trim() != "0");
    let mut conditions = BTreeSet::new();
    if switch("/proc/sys/net/ipv4/ip_forward") == Some(false) {
        conditions.insert(Condition::Ipv4NotForwarding);
    }
    match (switch("/proc/sys/net/ipv6/conf/all/disable_ipv6"), switch("/proc/sys/net/ipv6/conf/all/forwarding")) {
        (Some(true) | None, _) => conditions.extend([Condition::Ipv6Off]),
        (Some(false), Some(false)) => conditions.extend([Condition::Ipv6NotForwarding]),
        (Some(false), _) => {}
    }
    conditions
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::kernel::tests::{in_netns, sh};

    /// Of a node whose cluster knows it by 192.168.8.2 and 2001:db8:8::2.
    fn check(setup: &str, native: &[(&str, u32)], mtu: u32, addresses: &[&str], conditions: &[Condition]) {
        let node = in_netns(|| async {
            sh("ip link add eth0 mtu 1400 type veth peer name p0; ip link add eth1 mtu 1300 type veth peer name p1
                ip tuntap add carrick-wg0 mode tun; ip link set carrick-wg0 mtu 1280 up
                for link in p0 p1 eth0 eth1; do ip link set $link addrgenmode none up; done");
            address::add(&Rtnl::new().unwrap(), "fd63::1".parse().unwrap()).await.unwrap();
            sh(setup);
            let internal = ["192.168.8.2", "2001:db8:8::2"].map(|address| address.parse().unwrap());
            Reader::new().unwrap().read(&internal.into()).await.unwrap()
        });
        let native = native.iter().map(|(name, mtu)| {
            let ethernet = !name.starts_with("tun");
            // A veth can, a TUN cannot.
            ((*name).to_owned(), Native { mtu: *mtu, ethernet, tunnel_segmentation: ethernet })
        });
        let expected = Node {
            native: native.collect(),
            underlay_mtu: mtu,
            addresses: addresses.iter().map(|a| a.parse().unwrap()).collect(),
            conditions: conditions.iter().copied().collect(),
        };
        assert_eq!(node, expected, "{setup}");
    }

    use Condition::{Ipv4NotForwarding, Ipv6NotForwarding, Ipv6Off};
    const SILENT: [Condition; 2] = [Ipv4NotForwarding, Ipv6NotForwarding];

    #[test]
    fn the_underlay_is_where_the_default_routes_lead_or_where_the_addresses_are() {
        let v4 = "ip addr add 192.168.7.2/24 dev eth0; ip route add default via 192.168.7.1;";
        let v6 = "ip addr add 2001:db8:7::2/64 dev eth1 nodad; ip route add default via 2001:db8:7::1;";
        let both = ["192.168.7.2", "2001:db8:7::2"];
        let (eth0, eth1) = (("eth0", 1400), ("eth1", 1300));
        check("", &[], 1500, &[], &SILENT);
        check(v4, &[eth0], 1400, &["192.168.7.2"], &SILENT);
        check(&[v4, v6].concat(), &[eth0, eth1], 1300, &both, &SILENT);
        // As a CNI's bridge: an address that the cluster does not know the node by.
        let bridge = "ip addr add 10.42.0.1/24 dev eth1";
        check(&[v4, bridge].concat(), &[eth0], 1400, &["10.42.0.1", "192.168.7.2"], &SILENT);
        let other = "ip addr add 192.168.7.2/24 dev eth0; ip addr add 192.168.9.2/24 dev eth1";
        check(other, &[], 1300, &["192.168.7.2", "192.168.9.2"], &SILENT);
        check(
            "ip addr add 192.168.7.2/24 dev eth0; ip addr add 192.168.9.2/24 dev eth1
             ip route add default nexthop via 192.168.7.1 nexthop via 192.168.9.1",
            &[eth0, eth1],
            1300,
            &["192.168.7.2", "192.168.9.2"],
            &SILENT,
        );
        check("ip route add unreachable default", &[], 1500, &[], &SILENT);
        check("ip addr add 169.254.1.1/16 dev eth0; ip addr add fe80::5/64 dev eth1 nodad", &[], 1500, &[], &SILENT);
        check(
            "ip addr add fd42::1/128 dev lo nodad; ip addr add 10.42.0.1 peer 10.99.0.1 dev eth0",
            &[],
            1400,
            &["10.42.0.1", "fd42::1"],
            &SILENT,
        );
    }

    #[test]
    fn native_is_also_what_carries_an_address_that_the_cluster_knows() {
        let (eth0, eth1) = (("eth0", 1400), ("eth1", 1300));
        let second = "ip addr add 192.168.8.2/24 dev eth1;";
        check(second, &[eth1], 1300, &["192.168.8.2"], &SILENT);
        check(
            &[second, "ip addr add 192.168.7.2/24 dev eth0; ip route add default via 192.168.7.1"].concat(),
            &[eth0, eth1],
            1300,
            &["192.168.7.2", "192.168.8.2"],
            &SILENT,
        );
        check("ip addr add 2001:db8:8::2/64 dev eth0 nodad", &[eth0], 1400, &["2001:db8:8::2"], &SILENT);
        check(
            "ip tuntap add tun0 mode tun; ip link set tun0 addrgenmode none mtu 1350 up
             ip addr add 192.168.8.2/24 dev tun0",
            &[("tun0", 1350)],
            1350,
            &["192.168.8.2"],
            &SILENT,
        );
        check("ip addr add 192.168.8.2/32 dev lo", &[], 1500, &["192.168.8.2"], &SILENT);
        check(&second.replace("eth1", "carrick-wg0"), &[], 1500, &["192.168.8.2"], &SILENT);
        // A name that the nft table could not say.
        check(
            &["ip link set eth1 name 'e*';", &second.replace("eth1", "'e*'")].concat(),
            &[],
            1500,
            &["192.168.8.2"],
            &SILENT,
        );
    }

    #[test]
    fn what_others_have_to_change_is_told() {
        let ipv4 = "echo 1 > /proc/sys/net/ipv4/ip_forward;";
        check(&[ipv4, "echo 1 > /proc/sys/net/ipv6/conf/all/forwarding"].concat(), &[], 1500, &[], &[]);
        check(&[ipv4, "echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6"].concat(), &[], 1500, &[], &[Ipv6Off]);
    }
}
