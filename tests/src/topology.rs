//! Builds a lab from its members: the internet in the middle, a NAT router where a member sits behind one, nodes, pods.
//!
//! ```text
//! pod eth0 -- cni0 node eth0 -- siteN internet siteN -- wan0 router lan0 -- eth0 node cni0 -- eth0 pod
//! ```
//! `siteN`, N the member's id, is the internet's end of a member's uplink: what a member sends and gets passes it.

use std::{fmt::Write as _, net::IpAddr, path::PathBuf, sync::Arc};

use anyhow::{Context, Result};
use ipnetwork::IpNetwork;

use crate::{
    guard::{Guard, HostRecord},
    host::{Host, tail},
    member::{Cni, Member, Site, nth},
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
    pub addresses: Vec<IpAddr>,
    /// Each node starts with one.
    pub pods: Vec<Pod>,
    ranges: Vec<IpNetwork>,
}

#[derive(Debug)]
pub struct Pod {
    pub host: Host,
    /// IPv4, then IPv6 if the member has it.
    pub addresses: Vec<IpAddr>,
}

impl Pod {
    /// Its IPv4 address.
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
    fn build(guard: &Arc<Guard>, internet: &Host, member: &Member, site: &Site) -> Result<Cluster> {
        let uplink = format!("site{}", member.id);
        let router = match &site.uplink {
            None => {
                bridge(internet, &uplink, &site.gateway)?;
                None
            }
            Some(addresses) => {
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
                Some(router)
            }
        };
        let (switch, port) = match &router {
            Some(router) => (router, "lan0"),
            None => (internet, uplink.as_str()),
        };
        let mut nodes = Vec::new();
        for (n, addresses) in (0..).zip(&site.nodes) {
            let node = Node::build(guard, member, n)?;
            let cable_end = format!("{port}-{n}");
            cable(switch, &cable_end, &node.host, "eth0")?;
            switch.ip(&format!("link set {cable_end} master {port} up"))?;
            address(&node.host, "eth0", addresses)?;
            gateway(&node.host, &site.gateway)?;
            let addresses = addresses.iter().map(IpNetwork::ip).collect();
            nodes.push(Node { addresses, ..node });
        }
        connect_pods(&nodes)?;
        Ok(Cluster { member: member.clone(), uplink, router, nodes })
    }
}

impl Node {
    /// Without its uplink.
    fn build(guard: &Arc<Guard>, member: &Member, n: u8) -> Result<Node> {
        let host = Host::machine(guard, &format!("{}-{n}", member.name))?;
        host.forward()?;
        // As systemd sets it on Debian.
        host.sysctl("net/ipv4/conf/default/rp_filter", "2")?;
        let ranges = member.node_pods(n)?;
        let gateways = ranges.iter().map(|range| nth(*range, 1)).collect::<Result<Vec<_>>>()?;
        bridge(&host, "cni0", &gateways)?;
        match member.cni {
            Cni::Bridge => host.nft(&flannel(&member.pod_ranges(), &ranges))?,
        }
        let mut node = Node { host, addresses: Vec::new(), pods: Vec::new(), ranges };
        node.add_pod(guard)?;
        Ok(node)
    }

    /// Attaches one more pod to the node's bridge, with the next addresses.
    pub fn add_pod(&mut self, guard: &Arc<Guard>) -> Result<&Pod> {
        let n = u8::try_from(self.pods.len()).context("too many pods")?;
        let pod = Host::network(guard, &format!("{}-pod-{n}", self.host.name()))?;
        let cable_end = format!("pod{n}");
        cable(&self.host, &cable_end, &pod, "eth0")?;
        self.host.ip(&format!("link set {cable_end} master cni0 up"))?;
        let own = self.ranges.iter().map(|range| nth(*range, n + 2)).collect::<Result<Vec<_>>>()?;
        let gateways = self.ranges.iter().map(|range| nth(*range, 1)).collect::<Result<Vec<_>>>()?;
        address(&pod, "eth0", &own)?;
        gateway(&pod, &gateways)?;
        self.pods.push(Pod { host: pod, addresses: own.iter().map(IpNetwork::ip).collect() });
        Ok(&self.pods[usize::from(n)])
    }
}

/// A cable between two hosts, up at both ends. Made inside them: nothing appears anywhere else.
fn cable(a: &Host, a_end: &str, b: &Host, b_end: &str) -> Result<()> {
    a.ip(&format!("link add {a_end} type veth peer name {b_end} netns {}\nlink set {a_end} up", b.pid()))?;
    b.ip(&format!("link set {b_end} up"))
}

fn bridge(host: &Host, name: &str, addresses: &[IpNetwork]) -> Result<()> {
    host.ip(&format!("link add {name} type bridge mcast_snooping 0\nlink set {name} up"))?;
    address(host, name, addresses)
}

fn address(host: &Host, link: &str, addresses: &[IpNetwork]) -> Result<()> {
    let lines: Vec<String> = addresses.iter().map(|address| format!("addr add {address} dev {link}")).collect();
    host.ip(&lines.join("\n"))
}

/// Default routes through these routers.
fn gateway(host: &Host, routers: &[IpNetwork]) -> Result<()> {
    let lines: Vec<String> = routers.iter().map(|router| format!("route add default via {}", router.ip())).collect();
    host.ip(&lines.join("\n"))
}

/// Routes between the pods of one member's nodes, as flannel's host-gw backend makes them.
fn connect_pods(nodes: &[Node]) -> Result<()> {
    for node in nodes {
        let mut lines = String::new();
        for other in nodes.iter().filter(|other| other.host.name() != node.host.name()) {
            for range in &other.ranges {
                let via = other.addresses.iter().find(|address| address.is_ipv4() == range.is_ipv4());
                let via =
                    via.with_context(|| format!("{} has no address of the family of {range}", other.host.name()))?;
                writeln!(lines, "route add {range} via {via}")?;
            }
        }
        node.host.ip(&lines)?;
    }
    Ok(())
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

/// flannel's rules, for both families: what leaves the pod range is masqueraded, and so is what enters it for another
/// node; forwarding is accepted.
fn flannel(cluster: &[IpNetwork], node: &[IpNetwork]) -> String {
    let mut rules = String::new();
    for (cluster, node) in cluster.iter().zip(node) {
        let (ip, multicast) = if cluster.is_ipv4() { ("ip", "224.0.0.0/4") } else { ("ip6", "ff00::/8") };
        rules.push_str(&format!(
            "        {ip} saddr {cluster} {ip} daddr {cluster} return
        {ip} saddr {cluster} {ip} daddr != {multicast} masquerade
        {ip} saddr != {cluster} {ip} daddr {node} return
        {ip} saddr != {cluster} {ip} daddr {cluster} masquerade\n"
        ));
    }
    format!(
        "table inet flannel {{
    chain postrouting {{
        type nat hook postrouting priority srcnat; policy accept;
{rules}    }}
    chain forward {{
        type filter hook forward priority filter; policy accept;
    }}
}}"
    )
}
