//! What the plan wants to know of the node and only its kernel can say. Nothing here writes.

use std::{
    collections::BTreeSet,
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use netlink_packet_route::{
    RouteNetlinkMessage,
    address::{AddressAttribute, AddressHeaderFlags, AddressMessage},
    link::LinkFlags,
    route::{RouteAttribute, RouteFlags, RouteMessage},
};

use super::{
    link,
    route::address_family,
    rtnl::{Rtnl, is},
};
use crate::{names::Device, state::Family};

/// Bytes; what is assumed where no native device is known.
const DEFAULT_MTU: u32 = 1500;

/// The node, as its kernel sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Smallest MTU, in bytes, of the native devices; 1500 if none is known.
    pub underlay_mtu: u32,
    /// Usable addresses of the node, on whatever link; none of loopback or link-local scope.
    pub addresses: BTreeSet<IpAddr>,
    pub conditions: BTreeSet<Condition>,
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

    pub async fn read(&self) -> io::Result<Node> {
        let addresses = link::addresses(&self.rtnl).await?;
        Ok(Node {
            underlay_mtu: self.underlay_mtu(&addresses).await?,
            addresses: addresses.iter().filter_map(usable).collect(),
            conditions: conditions(),
        })
    }

    /// Native devices are those of the default route. A node without one is known by its addresses.
    async fn underlay_mtu(&self, addresses: &[AddressMessage]) -> io::Result<u32> {
        let mut smallest = None;
        for family in Family::ALL {
            smallest = least(smallest, self.smallest_mtu(self.ways_out(family).await?).await?);
        }
        if smallest.is_none() {
            let addressed = addresses.iter().filter(|a| usable(a).is_some()).map(|a| a.header.index).collect();
            smallest = self.smallest_mtu(addressed).await?;
        }
        Ok(smallest.unwrap_or(DEFAULT_MTU))
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

    /// Of these devices; loopback and our own do not count.
    async fn smallest_mtu(&self, devices: BTreeSet<u32>) -> io::Result<Option<u32>> {
        let mut smallest = None;
        for index in devices {
            let Some(found) = link::by_index(&self.rtnl, index).await? else { continue };
            let ours = link::name(&found).and_then(Device::from_link).is_some();
            if !ours && !found.header.flags.contains(LinkFlags::Loopback) {
                smallest = least(smallest, link::mtu(&found));
            }
        }
        Ok(smallest)
    }
}

/// What the kernel says where no route leads, or one that refuses; and where a family is off.
const NO_ROUTE: [i32; 6] =
    [libc::ENETUNREACH, libc::EHOSTUNREACH, libc::EACCES, libc::EINVAL, libc::EOPNOTSUPP, libc::EAFNOSUPPORT];

fn least(a: Option<u32>, b: Option<u32>) -> Option<u32> {
    a.into_iter().chain(b).min()
}

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

    fn check(setup: &str, mtu: u32, addresses: &[&str], conditions: &[Condition]) {
        let node = in_netns(|| async {
            sh("ip link add eth0 mtu 1400 type veth peer name p0; ip link add eth1 mtu 1300 type veth peer name p1
                ip tuntap add carrick-wg0 mode tun; ip link set carrick-wg0 mtu 1280 up
                for link in p0 p1 eth0 eth1; do ip link set $link addrgenmode none up; done");
            sh(setup);
            Reader::new().unwrap().read().await.unwrap()
        });
        let expected = Node {
            underlay_mtu: mtu,
            addresses: addresses.iter().map(|a| a.parse().unwrap()).collect(),
            conditions: conditions.iter().copied().collect(),
        };
        assert_eq!(node, expected, "{setup}");
    }

    #[test]
    fn the_underlay_is_where_the_default_routes_lead_or_where_the_addresses_are() {
        use Condition::{Ipv4NotForwarding, Ipv6NotForwarding, Ipv6Off};
        let silent = [Ipv4NotForwarding, Ipv6NotForwarding];
        let v4 = "ip addr add 192.168.7.2/24 dev eth0; ip route add default via 192.168.7.1;";
        let v6 = "ip addr add 2001:db8:7::2/64 dev eth1 nodad; ip route add default via 2001:db8:7::1;";
        let both = ["192.168.7.2", "2001:db8:7::2"];
        check("", 1500, &[], &silent);
        check(v4, 1400, &["192.168.7.2"], &silent);
        check(&[v4, v6].concat(), 1300, &both, &silent);
        check(&[v4, "ip addr add 10.42.0.1/24 dev eth1"].concat(), 1400, &["10.42.0.1", "192.168.7.2"], &silent);
        check(
            "ip addr add 192.168.7.2/24 dev eth0; ip addr add 192.168.8.2/24 dev eth1",
            1300,
            &["192.168.7.2", "192.168.8.2"],
            &silent,
        );
        check(
            "ip addr add 192.168.7.2/24 dev eth0; ip addr add 192.168.8.2/24 dev eth1
             ip route add default nexthop via 192.168.7.1 nexthop via 192.168.8.1",
            1300,
            &["192.168.7.2", "192.168.8.2"],
            &silent,
        );
        check("ip route add unreachable default", 1500, &[], &silent);
        check("ip addr add 169.254.1.1/16 dev eth0; ip addr add fe80::5/64 dev eth1 nodad", 1500, &[], &silent);
        check(
            "ip addr add fd42::1/128 dev lo nodad; ip addr add 10.42.0.1 peer 10.99.0.1 dev eth0",
            1400,
            &["10.42.0.1", "fd42::1"],
            &silent,
        );
        check(
            "echo 1 > /proc/sys/net/ipv4/ip_forward; echo 1 > /proc/sys/net/ipv6/conf/all/forwarding",
            1500,
            &[],
            &[],
        );
        check(
            "echo 1 > /proc/sys/net/ipv4/ip_forward; echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6",
            1500,
            &[],
            &[Ipv6Off],
        );
    }
}
