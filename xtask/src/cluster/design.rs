//! What the two clusters are: their names, addresses and ranges, and what each machine of theirs does. Pure data.
//!
//! | | `mn` | `va` |
//! |---|---|---|
//! | site | public addresses | behind a router that masquerades |
//! | pod network | flannel, VXLAN | routed: each node knows the others' ranges |
//! | kube-proxy | iptables | nftables |

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr},
};

use anyhow::{Context, Result};
use ipnetwork::{IpNetwork, Ipv4Network};
use lab::{
    Families,
    member::{MAX_NODES as MEMBER_NODES, Member, Site, nth},
};

/// Nodes of each cluster unless said otherwise, and at most.
pub const NODES: u8 = 2;
pub const MAX_NODES: u8 = MEMBER_NODES - 1;
/// Of each cluster, where it has so many nodes and one more.
const GATEWAYS: u8 = 2;

/// How pods of one node reach those of another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Network {
    /// flanneld, with ranges that Kubernetes hands out. What leaves the pod range is masqueraded.
    Flannel,
    /// Routes between the nodes; node n has the n-th /24. Nothing is masqueraded.
    Routed,
}

/// How kube-proxy balances.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Proxy {
    Iptables,
    Nftables,
}

/// One cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Design {
    /// The last of its nodes is the machine of the control plane.
    pub member: Member,
    pub site: Site,
    pub services: Ipv4Network,
    pub network: Network,
    pub proxy: Proxy,
}

/// What a machine is there for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Store, API server, controller manager, scheduler. It is no node of its cluster.
    ControlPlane,
    /// Kubelet, containerd, kube-proxy.
    Node(u8),
}

/// A machine and its place in its site.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seat {
    /// Also its host name.
    pub name: String,
    pub role: Role,
    /// IPv4, IPv6.
    pub addresses: [IpNetwork; 2],
}

/// Both clusters. `nodes`: of each, without the machine of the control plane.
pub fn both(nodes: u8) -> Result<[Design; 2]> {
    let [mn, va] = Member::pair().map(|member| Member {
        nodes: nodes + 1,
        // One node at least holds no slot, so that there is a hop.
        gateways: GATEWAYS.min(nodes.saturating_sub(1)).max(1),
        families: Families::V4,
        ..member
    });
    Ok([
        design(mn, 0, Ipv4Addr::new(10, 43, 0, 0), Network::Flannel, Proxy::Iptables)?,
        design(va, 1, Ipv4Addr::new(10, 45, 0, 0), Network::Routed, Proxy::Nftables)?,
    ])
}

fn design(member: Member, index: usize, services: Ipv4Addr, network: Network, proxy: Proxy) -> Result<Design> {
    let site = Site::of(&member, index)?;
    Ok(Design { member, site, services: Ipv4Network::new(services, 16)?, network, proxy })
}

impl Design {
    pub fn name(&self) -> &str {
        &self.member.name
    }

    /// How many there are, without the machine of the control plane.
    fn nodes(&self) -> u8 {
        self.member.nodes - 1
    }

    /// The slots that are held, and by which node.
    pub fn gateways(&self) -> BTreeMap<u8, Seat> {
        let slot = |seat: Seat| match seat.role {
            Role::Node(n) if n < self.member.gateways => Some((n, seat)),
            _ => None,
        };
        self.seats().into_iter().filter_map(slot).collect()
    }

    /// The control plane's machine first, then the nodes.
    pub fn seats(&self) -> Vec<Seat> {
        let name = self.name();
        let seat = |(n, addresses): (u8, &[IpNetwork; 2])| match n {
            n if n == self.nodes() => {
                Seat { name: format!("{name}-api"), role: Role::ControlPlane, addresses: *addresses }
            }
            n => Seat { name: format!("{name}-{n}"), role: Role::Node(n), addresses: *addresses },
        };
        let mut seats: Vec<Seat> = (0..).zip(&self.site.nodes).map(seat).collect();
        seats.rotate_right(1);
        seats
    }

    /// Where the API server listens.
    pub fn server(&self) -> String {
        format!("https://{}:6443", self.seats()[0].address())
    }

    /// The address of the Service `kubernetes`.
    pub fn kubernetes_service(&self) -> Result<Ipv4Addr> {
        self.service(1)
    }

    /// The address of the Service `kube-dns`.
    pub fn dns_service(&self) -> Result<Ipv4Addr> {
        self.service(10)
    }

    fn service(&self, n: u8) -> Result<Ipv4Addr> {
        v4(nth(self.services.into(), n)?.ip())
    }

    /// The pods of node `n`, where the network is [`Network::Routed`].
    pub fn node_pods(&self, n: u8) -> Result<Ipv4Network> {
        let ranges = self.member.node_pods(n)?;
        let range = ranges.iter().find_map(|range| if let IpNetwork::V4(range) = range { Some(*range) } else { None });
        range.context("no IPv4 range")
    }

    /// The routes to the pods of every node but `own`, one `ip` command a line. None where flanneld makes them.
    pub fn routes(&self, own: Option<u8>) -> Result<String> {
        let mut lines = String::new();
        for seat in self.seats() {
            if let (Network::Routed, Role::Node(n)) = (self.network, seat.role)
                && Some(n) != own
            {
                lines += &format!("route add {} via {}\n", self.node_pods(n)?, seat.address());
            }
        }
        Ok(lines)
    }
}

impl Seat {
    /// Its IPv4 address: the one that Kubernetes knows it by.
    pub fn address(&self) -> IpAddr {
        self.addresses[0].ip()
    }

    /// What gives a fresh network namespace, once `eth0` is in it, its addresses and routes: `ip` commands.
    pub fn links(&self, design: &Design) -> Result<String> {
        let mut lines = String::from("link set lo up\nlink set eth0 up\n");
        for address in self.addresses {
            lines += &format!("addr add {address} dev eth0\n");
        }
        for router in design.site.gateway {
            lines += &format!("route add default via {}\n", router.ip());
        }
        let own = if let Role::Node(n) = self.role { Some(n) } else { None };
        Ok(lines + &design.routes(own)?)
    }
}

fn v4(address: IpAddr) -> Result<Ipv4Addr> {
    if let IpAddr::V4(address) = address { Ok(address) } else { anyhow::bail!("{address} is not IPv4") }
}

#[cfg(test)]
mod tests {
    use expect_test::expect;

    use super::*;

    #[test]
    fn some_nodes_are_gateways_and_one_is_none() {
        let slots = |nodes| {
            both(nodes).unwrap().map(|design| design.gateways().into_values().map(|seat| seat.name).collect::<Vec<_>>())
        };
        assert_eq!(slots(1), [vec!["mn-0"], vec!["va-0"]]);
        assert_eq!(slots(NODES), [vec!["mn-0"], vec!["va-0"]]);
        assert_eq!(slots(3), [vec!["mn-0", "mn-1"], vec!["va-0", "va-1"]]);
        assert_eq!(slots(MAX_NODES), [vec!["mn-0", "mn-1"], vec!["va-0", "va-1"]]);
    }

    #[test]
    fn every_machine_has_its_place() {
        let mut text = String::new();
        for design in both(NODES).unwrap() {
            text += &format!("{} {} dns {}\n", design.name(), design.server(), design.dns_service().unwrap());
            for seat in design.seats() {
                text += &format!("--- {} {:?}\n{}", seat.name, seat.role, seat.links(&design).unwrap());
            }
        }
        expect![[r#"
            mn https://203.0.113.4:6443 dns 10.43.0.10
            --- mn-api ControlPlane
            link set lo up
            link set eth0 up
            addr add 203.0.113.4/28 dev eth0
            addr add 2001:db8:1::4/64 dev eth0
            route add default via 203.0.113.1
            route add default via 2001:db8:1::1
            --- mn-0 Node(0)
            link set lo up
            link set eth0 up
            addr add 203.0.113.2/28 dev eth0
            addr add 2001:db8:1::2/64 dev eth0
            route add default via 203.0.113.1
            route add default via 2001:db8:1::1
            --- mn-1 Node(1)
            link set lo up
            link set eth0 up
            addr add 203.0.113.3/28 dev eth0
            addr add 2001:db8:1::3/64 dev eth0
            route add default via 203.0.113.1
            route add default via 2001:db8:1::1
            va https://192.168.2.4:6443 dns 10.45.0.10
            --- va-api ControlPlane
            link set lo up
            link set eth0 up
            addr add 192.168.2.4/24 dev eth0
            addr add 2001:db8:2::4/64 dev eth0
            route add default via 192.168.2.1
            route add default via 2001:db8:2::1
            route add 10.44.0.0/24 via 192.168.2.2
            route add 10.44.1.0/24 via 192.168.2.3
            --- va-0 Node(0)
            link set lo up
            link set eth0 up
            addr add 192.168.2.2/24 dev eth0
            addr add 2001:db8:2::2/64 dev eth0
            route add default via 192.168.2.1
            route add default via 2001:db8:2::1
            route add 10.44.1.0/24 via 192.168.2.3
            --- va-1 Node(1)
            link set lo up
            link set eth0 up
            addr add 192.168.2.3/24 dev eth0
            addr add 2001:db8:2::3/64 dev eth0
            route add default via 192.168.2.1
            route add default via 2001:db8:2::1
            route add 10.44.0.0/24 via 192.168.2.2
        "#]]
        .assert_eq(&text);
    }
}
