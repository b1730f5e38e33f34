//! Builds a lab from its members: the internet in the middle, a NAT router where a member sits behind one, nodes, pods.
//!
//! ```text
//! pod eth0 -- cni0 node eth0 -- siteN internet siteN -- wan0 router lan0 -- eth0 node cni0 -- eth0 pod
//! ```
//! `siteN`, N the member's id, is the internet's end of a member's uplink: what a member sends and gets passes it.

use std::{net::IpAddr, path::PathBuf, sync::Arc};

use anyhow::{Context, Result};
use ipnetwork::IpNetwork;

use crate::{
    cni,
    guard::{Guard, HostRecord},
    host::{Host, tail},
    member::{Cni, Families, Member, Site, nth},
};

/// Lines of each log that are shown when a test fails.
const SHOWN_LINES: usize = 40;

/// An internet with members. Ends with this value, unless kept.
#[derive(Debug)]
pub struct Lab {
    pub internet: Host,
    pub clusters: Vec<Cluster>,
    guard: Arc<Guard>,
}

/// A member's machines.
#[derive(Debug)]
pub struct Cluster {
    pub member: Member,
    /// The internet's interface towards it.
    pub uplink: String,
    pub router: Option<Host>,
    pub nodes: Vec<Node>,
}

/// A node: the host, its addresses on its site's network, and its pods.
#[derive(Debug)]
pub struct Node {
    pub host: Host,
    /// Its place among its member's nodes, from 0.
    pub number: u8,
    /// Of a gateway.
    pub slot: Option<u8>,
    /// IPv4 first, where it has both.
    pub addresses: Vec<IpAddr>,
    /// Each node starts with one.
    pub pods: Vec<Pod>,
    /// What its pods get their addresses from, IPv4 first: its `podCIDRs`.
    pub ranges: Vec<IpNetwork>,
    /// The switch's end of its uplink: on [`Lab::switch`].
    pub port: String,
    cni: Cni,
}

#[derive(Debug)]
pub struct Pod {
    pub host: Host,
    /// IPv4, then IPv6 if the member has it.
    pub addresses: Vec<IpAddr>,
}

impl Pod {
    /// Its first address: IPv4 if it has one.
    pub fn ip(&self) -> IpAddr {
        self.addresses[0]
    }
}

impl Lab {
    /// Makes a lab of a name that no other has, runs `test` in it, and ends it. If the test fails, the logs are shown.
    pub fn with<T>(name: &str, members: &[Member], test: impl FnOnce(&mut Lab) -> Result<T>) -> Result<T> {
        let mut lab = Lab::build(Guard::unique(name)?, members)?;
        let result = test(&mut lab).inspect_err(|_| lab.show_logs());
        lab.guard.end()?;
        result
    }

    /// Builds the lab that `guard` has begun.
    pub fn build(guard: Arc<Guard>, members: &[Member]) -> Result<Lab> {
        let internet = Host::network(&guard, "internet")?;
        internet.forward()?;
        let mut clusters = Vec::new();
        for (index, member) in members.iter().enumerate() {
            let site = Site::of(member, index)?;
            clusters.push(Cluster::build(&guard, &internet, member, &site)?);
        }
        let lab = Lab { internet, clusters, guard };
        lab.guard.record(lab.hosts())?;
        Ok(lab)
    }

    pub fn name(&self) -> &str {
        self.guard.name()
    }

    pub fn guard(&self) -> &Arc<Guard> {
        &self.guard
    }

    /// A directory of the lab's own for that purpose; every node sees it at the same path.
    pub fn dir(&self, purpose: &str) -> PathBuf {
        self.guard.dir().join(purpose)
    }

    /// The first node of a member.
    pub fn node(&self, member: &str) -> Result<&Node> {
        self.cluster(member)?.nodes.first().with_context(|| format!("{member} has no node"))
    }

    pub fn cluster(&self, member: &str) -> Result<&Cluster> {
        self.clusters
            .iter()
            .find(|cluster| cluster.member.name == member)
            .with_context(|| format!("no member {member}"))
    }

    /// The host that a member's nodes are plugged into: its router, or the internet.
    pub fn switch(&self, member: &str) -> Result<&Host> {
        Ok(self.cluster(member)?.router.as_ref().unwrap_or(&self.internet))
    }

    /// The internet's address on a member's network, which its nodes reach; IPv4 if it has one.
    pub fn internet_address(&self, member: &str) -> Result<IpAddr> {
        let place = self.clusters.iter().position(|cluster| cluster.member.name == member);
        let place = place.with_context(|| format!("no member {member}"))?;
        let member = &self.clusters[place].member;
        let site = Site::of(member, place)?;
        let addresses = site.uplink.map_or(site.gateway, |uplink| uplink.internet);
        Ok(member.node_addresses(&addresses).first().context("a member has a family")?.ip())
    }

    /// The member of a node of this lab.
    pub fn member_of(&self, node: &Node) -> Result<&Member> {
        let name = node.host.name();
        let found = self.nodes().find(|(_, other)| other.host.name() == name);
        Ok(found.with_context(|| format!("{name} is no node of this lab"))?.0)
    }

    /// Attaches one more pod to a member's node, with these addresses, which may lie outside the node's ranges.
    pub fn add_pod_at(&mut self, member: &str, node: usize, addresses: &[IpAddr]) -> Result<()> {
        let cluster = self.clusters.iter_mut().find(|cluster| cluster.member.name == member);
        let cluster = cluster.with_context(|| format!("no member {member}"))?;
        let target = cluster.nodes.get_mut(node).with_context(|| format!("{member} has no node {node}"))?;
        target.add_pod_at(&self.guard, addresses)?;
        let target = &cluster.nodes[node];
        let outside = |ip: &&IpAddr| target.ranges.iter().all(|range| !range.contains(**ip));
        addresses
            .iter()
            .filter(outside)
            .try_for_each(|ip| cni::connect_pod(cluster.member.cni, &cluster.nodes, target, *ip))
    }

    /// Every node of every member, in order.
    pub fn nodes(&self) -> impl Iterator<Item = (&Member, &Node)> {
        self.clusters.iter().flat_map(|cluster| cluster.nodes.iter().map(|node| (&cluster.member, node)))
    }

    /// Lets the lab outlive this process; `cargo xtask lab down` ends it.
    pub fn keep(self) -> Result<()> {
        self.guard.keep()?;
        // Dropped hosts would end.
        std::mem::forget(self);
        Ok(())
    }

    /// Prints the end of every log to stderr.
    pub fn show_logs(&self) {
        for (_, node) in self.nodes() {
            let Ok(entries) = node.host.dir().read_dir() else { continue };
            let mut logs: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
            logs.retain(|path| path.extension().is_some_and(|extension| extension == "log"));
            logs.sort();
            for log in logs {
                eprintln!("--- the end of {}\n{}", log.display(), tail(&log, SHOWN_LINES));
            }
        }
    }

    fn hosts(&self) -> Vec<HostRecord> {
        let record = |host: &Host, addresses: &[IpAddr]| HostRecord {
            name: host.name().to_owned(),
            pid: host.pid(),
            addresses: addresses.iter().map(IpAddr::to_string).collect(),
        };
        let mut hosts = vec![record(&self.internet, &[])];
        for cluster in &self.clusters {
            hosts.extend(cluster.router.iter().map(|router| record(router, &[])));
            for node in &cluster.nodes {
                hosts.push(record(&node.host, &node.addresses));
                hosts.extend(node.pods.iter().map(|pod| record(&pod.host, &pod.addresses)));
            }
        }
        hosts
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.show_logs();
        }
        if let Err(error) = self.guard.end() {
            eprintln!("{error:#}");
        }
    }
}

impl Cluster {
    /// The gateways and their slots.
    pub fn gateways(&self) -> impl Iterator<Item = (&Node, u8)> {
        self.nodes.iter().filter_map(|node| Some((node, node.slot?)))
    }

    fn build(guard: &Arc<Guard>, internet: &Host, member: &Member, site: &Site) -> Result<Cluster> {
        let access = Access::build(guard, internet, member, site)?;
        let (switch, port) = access.switch(internet);
        let mut nodes = Vec::new();
        for (n, addresses) in (0..).zip(&site.nodes) {
            let host = Host::machine(guard, &format!("{}-{n}", member.name))?;
            host.forward()?;
            // As systemd sets it on Debian: of each interface, not of `all`.
            host.sysctl("net/ipv4/conf/default/rp_filter", "2")?;
            let cable_end = format!("{port}-{n}");
            cable(switch, &cable_end, &host, "eth0")?;
            switch.ip(&format!("link set {cable_end} master {port} up"))?;
            let addresses = member.node_addresses(addresses);
            address(&host, "eth0", &addresses)?;
            gateway(&host, &member.node_addresses(&site.gateway))?;
            if member.cni == Cni::SkipFib && member.families == Families::V6Underlay {
                // What leaves natively needs a next hop, be it of the other family.
                let [_, router] = site.gateway;
                host.ip(&format!("route add 0.0.0.0/0 via inet6 {} dev eth0", router.ip()))?;
            }
            nodes.push(Node::build(guard, member, n, host, &addresses, cable_end)?);
        }
        cni::connect(member.cni, &nodes)?;
        if member.cni == Cni::Fabric {
            cni::fabric(switch, &format!("fabric-{}", access.uplink), &nodes)?;
        }
        Ok(Cluster { member: member.clone(), uplink: access.uplink, router: access.router, nodes })
    }
}

/// A member's network, up to where its nodes are plugged in.
#[derive(Debug)]
pub struct Access {
    /// The internet's interface towards it.
    pub uplink: String,
    pub router: Option<Host>,
}

impl Access {
    /// Joins a site to the internet, through a router of its own where it sits behind NAT.
    pub fn build(guard: &Arc<Guard>, internet: &Host, member: &Member, site: &Site) -> Result<Access> {
        let uplink = format!("site{}", member.id);
        let Some(addresses) = &site.uplink else {
            bridge(internet, &uplink, &site.gateway)?;
            return Ok(Access { uplink, router: None });
        };
        let router = Host::network(guard, &format!("{}-nat", member.name))?;
        cable(internet, &uplink, &router, "wan0")?;
        address(internet, &uplink, &addresses.internet)?;
        address(&router, "wan0", &addresses.router)?;
        bridge(&router, "lan0", &site.gateway)?;
        gateway(&router, &addresses.internet)?;
        // The internet knows the way to a site's IPv6 network; its IPv4 network it cannot know.
        let [_, inside] = site.gateway;
        let [_, via] = addresses.router;
        internet.ip(&format!("route add {}/{} via {}", inside.network(), inside.prefix(), via.ip()))?;
        router.nft(NAT_ROUTER)?;
        router.forward()?;
        Ok(Access { uplink, router: Some(router) })
    }

    /// The host that nodes are plugged into, and its bridge.
    pub fn switch<'a>(&'a self, internet: &'a Host) -> (&'a Host, &'a str) {
        self.router.as_ref().map_or((internet, self.uplink.as_str()), |router| (router, "lan0"))
    }
}

impl Node {
    fn build(
        guard: &Arc<Guard>,
        member: &Member,
        number: u8,
        host: Host,
        addresses: &[IpNetwork],
        port: String,
    ) -> Result<Node> {
        let ranges = member.node_pods(number)?;
        cni::prepare(&host, member, &ranges)?;
        let addresses = addresses.iter().map(IpNetwork::ip).collect();
        let slot = (number < member.gateways).then_some(number);
        let mut node = Node { host, number, slot, addresses, pods: Vec::new(), ranges, port, cni: member.cni };
        node.add_pod(guard)?;
        Ok(node)
    }

    /// Attaches one more pod to the node, with the next addresses of its ranges.
    pub fn add_pod(&mut self, guard: &Arc<Guard>) -> Result<&Pod> {
        let n = u8::try_from(self.pods.len()).context("too many pods")?;
        let own = self.ranges.iter().map(|range| Ok(nth(*range, n + 2)?.ip())).collect::<Result<Vec<_>>>()?;
        self.add_pod_at(guard, &own)
    }

    /// Gives its first pod one more address, outside its ranges, which [`Pod::addresses`] does not list; no other node of
    /// the member knows the way to it.
    pub fn add_address(&self, address: IpAddr) -> Result<()> {
        cni::add_address(self, self.cni, &port_of(0), &self.pods[0].host, address)
    }

    fn add_pod_at(&mut self, guard: &Arc<Guard>, addresses: &[IpAddr]) -> Result<&Pod> {
        let n = self.pods.len();
        let host = Host::network(guard, &format!("{}-pod-{n}", self.host.name()))?;
        cni::attach_pod(self, self.cni, &port_of(n), &host, addresses)?;
        self.pods.push(Pod { host, addresses: addresses.to_vec() });
        Ok(&self.pods[n])
    }
}

/// The node's end of the cable to its pod number `n`.
fn port_of(n: usize) -> String {
    format!("pod{n}")
}

/// A cable between two hosts, up at both ends. Made inside them: nothing appears anywhere else.
pub(crate) fn cable(a: &Host, a_end: &str, b: &Host, b_end: &str) -> Result<()> {
    a.ip(&format!("link add {a_end} type veth peer name {b_end} netns {}\nlink set {a_end} up", b.pid()))?;
    b.ip(&format!("link set {b_end} up"))
}

pub(crate) fn bridge(host: &Host, name: &str, addresses: &[IpNetwork]) -> Result<()> {
    host.ip(&format!("link add {name} type bridge mcast_snooping 0\nlink set {name} up"))?;
    address(host, name, addresses)
}

pub(crate) fn address(host: &Host, link: &str, addresses: &[IpNetwork]) -> Result<()> {
    let lines: Vec<String> = addresses.iter().map(|address| format!("addr add {address} dev {link}")).collect();
    host.ip(&lines.join("\n"))
}

/// Default routes through these routers.
pub(crate) fn gateway(host: &Host, routers: &[IpNetwork]) -> Result<()> {
    let lines: Vec<String> = routers.iter().map(|router| format!("route add default via {}", router.ip())).collect();
    host.ip(&lines.join("\n"))
}

/// A home or office router: masquerades, and lets in only answers. IPv6 is routed, behind the same stateful firewall.
const NAT_ROUTER: &str = r#"
table ip nat {
    chain postrouting {
        type nat hook postrouting priority srcnat; policy accept;
        oifname "wan0" masquerade
    }
}
table inet filter {
    chain input {
        type filter hook input priority filter; policy accept;
        iifname "wan0" ct state { established, related } accept
        iifname "wan0" meta l4proto ipv6-icmp accept
        iifname "wan0" drop
    }
    chain forward {
        type filter hook forward priority filter; policy drop;
        ct state { established, related } accept
        iifname "lan0" accept
    }
}
"#;
