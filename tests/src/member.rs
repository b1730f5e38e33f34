//! What a member of the lab is, and which addresses its parts get. Pure data.
//!
//! | what | IPv4 | IPv6 |
//! |---|---|---|
//! | site s with public addresses | 203.0.113.(16 s)/28, gateway first | 2001:db8:(s + 1)::/64 |
//! | site s behind NAT, inside | 192.168.(s + 1).0/24 | 2001:db8:(s + 1)::/64, behind a stateful firewall |
//! | its router's uplink | 198.51.100.(4 s)/30 | 2001:db8:ff:s::/64 |
//! | pods of node n | the n-th /24 of the member's range | the n-th /64 |

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    str::FromStr,
};

use anyhow::{Context, Error, Result, ensure};
use ipnetwork::{IpNetwork, Ipv4Network, Ipv6Network};

/// The documentation ranges (RFC 5737) hold this many sites of the sizes above.
pub const MAX_MEMBERS: usize = 16;
/// A /28 without its network, gateway and broadcast addresses.
pub const MAX_NODES: u8 = 13;
/// Slots of a member.
pub const MAX_GATEWAYS: u8 = 8;

/// A member cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// A DNS label.
    pub name: String,
    /// 1 to 4095.
    pub id: u16,
    /// At least a /24 for each node.
    pub pods: Ipv4Network,
    /// At least a /64 for each node.
    pub pods6: Ipv6Network,
    /// Which of the two it has.
    pub families: Families,
    /// Further ranges that it may claim, beside its pods'.
    pub allowed: Vec<IpNetwork>,
    /// Its nodes sit behind a router that masquerades and lets nothing unsolicited in: it has no endpoint.
    pub behind_nat: bool,
    /// 1 to [`MAX_NODES`].
    pub nodes: u8,
    /// The first so many nodes are gateways, node n with slot n: 1 to [`MAX_GATEWAYS`]. The others are workers.
    pub gateways: u8,
    pub cni: Cni,
}

/// Which addresses a member's pods and nodes have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Families {
    /// Both have both.
    Dual,
    /// Nodes and pods have IPv4 alone.
    V4,
    /// Pods have IPv6 alone, nodes both.
    V6Pods,
    /// Nodes have IPv6 alone, pods both.
    V6Underlay,
}

impl Families {
    pub const ALL: [Families; 4] = [Families::Dual, Families::V4, Families::V6Pods, Families::V6Underlay];

    /// Whether pods have addresses of that one's family.
    fn of_pods(self, address: &IpNetwork) -> bool {
        !matches!((self, address.is_ipv4()), (Families::V4, false) | (Families::V6Pods, true))
    }

    fn of_nodes(self, address: &IpNetwork) -> bool {
        !matches!((self, address.is_ipv4()), (Families::V4, false) | (Families::V6Underlay, true))
    }
}

/// What a cluster's network does: its plugin on the nodes, and for [`Cni::Fabric`] the switch between them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cni {
    /// As flannel: a bridge, and what leaves the pod range is masqueraded.
    Bridge,
    /// As Cilium with eBPF host routing: packets pass the node's stack by, where the FIB says, and `ip rule` counts. No
    /// masquerade. Linux 6.6 and later: it attaches by tcx.
    HostRouting,
    /// As Cilium's native routing over one device: what is not local leaves by eth0 whatever `ip rule` says. No
    /// masquerade. Linux 6.6 and later.
    SkipFib,
    /// As a cloud: the switch drops what does not come from the node's own address. Pods cross between nodes in
    /// flannel's VXLAN, and are masqueraded as by [`Cni::Bridge`].
    Fabric,
    /// As a hardened [`Cni::Bridge`]: rp_filter 1, forwarding only for the member's ranges, INVALID dropped.
    Strict,
}

impl Cni {
    pub const ALL: [Cni; 5] = [Cni::Bridge, Cni::HostRouting, Cni::SkipFib, Cni::Fabric, Cni::Strict];

    /// Whether a pod reaches the internet, by its node's address.
    pub fn masquerades(self) -> bool {
        matches!(self, Cni::Bridge | Cni::Fabric | Cni::Strict)
    }

    /// A word for names of labs and flags.
    pub fn word(self) -> &'static str {
        match self {
            Cni::Bridge => "bridge",
            Cni::HostRouting => "host-routing",
            Cni::SkipFib => "skip-fib",
            Cni::Fabric => "fabric",
            Cni::Strict => "strict",
        }
    }
}

impl FromStr for Cni {
    type Err = Error;

    fn from_str(word: &str) -> Result<Cni> {
        let known = || Cni::ALL.map(Cni::word).join(", ");
        Cni::ALL.into_iter().find(|cni| cni.word() == word).with_context(|| format!("{word:?} is none of {}", known()))
    }
}

impl Member {
    /// A member with one node at a public address; its pods' IPv6 range is fd00:10:ID::/48.
    pub fn new(name: &str, id: u16, pods: Ipv4Network) -> Member {
        Member {
            name: name.to_owned(),
            id,
            pods,
            pods6: Ipv6Network::new_checked(Ipv6Addr::new(0xfd00, 0x10, id, 0, 0, 0, 0, 0), 48)
                .expect("a prefix length"),
            families: Families::Dual,
            allowed: Vec::new(),
            behind_nat: false,
            nodes: 1,
            gateways: 1,
            cni: Cni::Bridge,
        }
    }

    /// `NAME:PODS`, and `:nat` for a member behind NAT, as in `va:10.44.0.0/16:nat`.
    pub fn parse(text: &str, id: u16) -> Result<Member> {
        let mut parts = text.split(':');
        let (name, pods, nat) = (parts.next(), parts.next(), parts.next());
        let usage = || format!("member {text:?}: NAME:PODS or NAME:PODS:nat, as in va:10.44.0.0/16:nat");
        let pods = pods.with_context(usage)?.parse().with_context(usage)?;
        ensure!(nat.is_none_or(|word| word == "nat") && parts.next().is_none(), usage());
        Ok(Member { behind_nat: nat.is_some(), ..Member::new(name.with_context(usage)?, id, pods) })
    }

    /// `mn` at a public address and `va` behind NAT, as in the demo.
    pub fn pair() -> [Member; 2] {
        let pods = |second| Ipv4Network::new_checked(Ipv4Addr::new(10, second, 0, 0), 16).expect("a prefix length");
        [Member::new("mn", 1, pods(42)), Member { behind_nat: true, ..Member::new("va", 2, pods(44)) }]
    }

    /// The same two members, each with three nodes, two of them gateways, and that network.
    pub fn pair_of_three(cni: Cni) -> [Member; 2] {
        Member::pair().map(|member| Member { nodes: 3, gateways: 2, cni, ..member })
    }

    /// Its pod ranges, IPv4 first.
    pub fn pod_ranges(&self) -> Vec<IpNetwork> {
        let mut ranges = vec![IpNetwork::V4(self.pods), IpNetwork::V6(self.pods6)];
        ranges.retain(|range| self.families.of_pods(range));
        ranges
    }

    /// Those of a node's addresses that its nodes have.
    pub fn node_addresses(&self, both: &[IpNetwork; 2]) -> Vec<IpNetwork> {
        both.iter().filter(|address| self.families.of_nodes(address)).copied().collect()
    }

    /// What it may claim.
    pub fn allowed_ranges(&self) -> Vec<IpNetwork> {
        [self.pod_ranges(), self.allowed.clone()].concat()
    }

    /// The pod ranges of its node number `n`, from 0; IPv4 first.
    pub fn node_pods(&self, n: u8) -> Result<Vec<IpNetwork>> {
        let Member { name, pods, pods6, .. } = self;
        ensure!(pods.prefix() <= 16 && pods6.prefix() <= 56, "{name}: pods {pods}, {pods6}: /16 and /56, or wider");
        let v4 = Ipv4Addr::from(u32::from(pods.network()) + (u32::from(n) << 8));
        let v6 = Ipv6Addr::from(u128::from(pods6.network()) + (u128::from(n) << 64));
        let mut ranges = vec![IpNetwork::new(v4.into(), 24)?, IpNetwork::new(v6.into(), 64)?];
        ranges.retain(|range| self.families.of_pods(range));
        Ok(ranges)
    }
}

/// Where a member sits: the addresses of the network that its nodes share. Each address comes with its network's length.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Site {
    /// Of the nodes' default router.
    pub gateway: [IpNetwork; 2],
    pub nodes: Vec<[IpNetwork; 2]>,
    /// Behind NAT: between the site's router and the internet.
    pub uplink: Option<Uplink>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Uplink {
    pub internet: [IpNetwork; 2],
    pub router: [IpNetwork; 2],
}

impl Site {
    /// The site of the member at place `index` of the lab, from 0.
    pub fn of(member: &Member, index: usize) -> Result<Site> {
        ensure!(index < MAX_MEMBERS, "a lab has at most {MAX_MEMBERS} members");
        ensure!((1..=MAX_NODES).contains(&member.nodes), "{}: 1 to {MAX_NODES} nodes", member.name);
        let gateways = 1..=MAX_GATEWAYS.min(member.nodes);
        ensure!(gateways.contains(&member.gateways), "{}: 1 to {} gateways", member.name, gateways.end());
        let s = u8::try_from(index).context("index")?;
        let v4 = if member.behind_nat {
            Ipv4Network::new(Ipv4Addr::new(192, 168, s + 1, 0), 24)?
        } else {
            Ipv4Network::new(Ipv4Addr::new(203, 0, 113, 16 * s), 28)?
        };
        let v6 = Ipv6Network::new(Ipv6Addr::new(0x2001, 0xdb8, u16::from(s) + 1, 0, 0, 0, 0, 0), 64)?;
        let uplink4 = Ipv4Network::new(Ipv4Addr::new(198, 51, 100, 4 * s), 30)?;
        let uplink6 = Ipv6Network::new(Ipv6Addr::new(0x2001, 0xdb8, 0xff, s.into(), 0, 0, 0, 0), 64)?;
        Ok(Site {
            gateway: pair(v4, v6, 1)?,
            nodes: (0..member.nodes).map(|n| pair(v4, v6, n + 2)).collect::<Result<_>>()?,
            uplink: match member.behind_nat {
                true => Some(Uplink { internet: pair(uplink4, uplink6, 1)?, router: pair(uplink4, uplink6, 2)? }),
                false => None,
            },
        })
    }
}

/// The `n`-th address of each network.
fn pair(v4: Ipv4Network, v6: Ipv6Network, n: u8) -> Result<[IpNetwork; 2]> {
    Ok([nth(v4.into(), n)?, nth(v6.into(), n)?])
}

/// The `n`-th address of a network, with the network's length.
pub fn nth(network: IpNetwork, n: u8) -> Result<IpNetwork> {
    let ip = match network {
        IpNetwork::V4(v4) => IpAddr::from(Ipv4Addr::from(u32::from(v4.network()) + u32::from(n))),
        IpNetwork::V6(v6) => IpAddr::from(Ipv6Addr::from(u128::from(v6.network()) + u128::from(n))),
    };
    IpNetwork::new(ip, network.prefix()).with_context(|| format!("address {n} of {network}"))
}
