//! What each network plugin does on a node: the links of pods, the ways between nodes, masquerade and filters.

mod bpf;

use std::{
    fmt::Write as _,
    net::{IpAddr, Ipv6Addr},
    os::fd::AsFd,
};

use anyhow::{Context, Result};
use ipnetwork::IpNetwork;
use nix::net::if_::if_nametoindex;

use crate::{
    Host, Node,
    member::{Cni, Member, nth},
    sys::{self, Instruction},
    topology::{address, bridge, cable, gateway},
};

/// Every pod's IPv6 router where each pod has a link of its own.
const LINK_ROUTER: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);

/// Flannel's VXLAN between nodes: VNI and port as it sets them.
const OVERLAY: &str = "flannel.1";
const OVERLAY_VNI: u8 = 1;
const OVERLAY_PORT: u16 = 8472;
/// The underlay's 1500 without the outer headers, IPv6 at most.
const OVERLAY_MTU: u16 = 1430;

impl Cni {
    /// Whether each pod has a link of its own to the node, instead of a port of a bridge.
    fn routes_each_pod(self) -> bool {
        matches!(self, Cni::HostRouting | Cni::SkipFib)
    }
}

/// Sets up a node that has its uplink `eth0` and no pods yet. `ranges` are the node's own.
pub(crate) fn prepare(host: &Host, member: &Member, ranges: &[IpNetwork]) -> Result<()> {
    let gateways = ranges.iter().map(|range| nth(*range, 1)).collect::<Result<Vec<_>>>()?;
    if member.cni.routes_each_pod() {
        // Answers for the pods' router; no port ever joins it.
        let single = gateways.iter().map(|gateway| single(gateway.ip())).collect::<Result<Vec<_>>>()?;
        bridge(host, "cni0", &single)?;
        attach(host, "eth0", false, &bpf::forward_by_fib())?;
        return attach(host, "eth0", true, &bpf::pass());
    }
    bridge(host, "cni0", &gateways)?;
    host.nft(&flannel(&member.pod_ranges(), ranges))?;
    if member.cni == Cni::Strict {
        host.set_rp_filter(1)?;
        host.nft(&strict(&member.allowed_ranges()))?;
    }
    Ok(())
}

/// Connects a new pod, by `port` on the node and `eth0` in the pod.
pub(crate) fn attach_pod(node: &Node, cni: Cni, port: &str, pod: &Host, addresses: &[IpAddr]) -> Result<()> {
    cable(&node.host, port, pod, "eth0")?;
    let host = &node.host;
    if !cni.routes_each_pod() {
        host.ip(&format!("link set {port} master cni0 up"))?;
        let inside = |ip: &IpAddr| node.ranges.iter().find(|range| range.contains(*ip)).map(IpNetwork::prefix);
        for ip in addresses {
            let whole = single(*ip)?;
            address(pod, "eth0", &[IpNetwork::new(*ip, inside(ip).unwrap_or(whole.prefix()))?])?;
            if inside(ip).is_none() {
                host.ip(&format!("route add {whole} dev cni0"))?;
            }
        }
        let gateways = node.ranges.iter().map(|range| nth(*range, 1)).collect::<Result<Vec<_>>>()?;
        pod.ip(&gateways.iter().map(|gateway| format!("route add {} dev eth0\n", gateway.ip())).collect::<String>())?;
        gateway(pod, &gateways)?;
        return if cni == Cni::Fabric { pod.ip(&format!("link set eth0 mtu {OVERLAY_MTU}")) } else { Ok(()) };
    }
    let whole = addresses.iter().map(|ip| single(*ip)).collect::<Result<Vec<_>>>()?;
    address(pod, "eth0", &whole)?;
    for range in &node.ranges {
        let router = if range.is_ipv4() { nth(*range, 1)?.ip() } else { LINK_ROUTER.into() };
        pod.ip(&format!("route add {router} dev eth0\nroute add default via {router} dev eth0"))?;
    }
    host.ip(&format!("addr add {LINK_ROUTER}/64 dev {port}"))?;
    host.ip(&whole.iter().map(|ip| format!("route add {ip} dev {port}\n")).collect::<String>())?;
    let program =
        if cni == Cni::HostRouting { bpf::forward_by_fib() } else { bpf::forward_out(uplink(host)?, &local(node)?) };
    attach(host, port, false, &program)
}

/// Gives a pod one more address, outside the ranges of its node, which alone knows the way to it.
pub(crate) fn add_address(node: &Node, cni: Cni, port: &str, pod: &Host, ip: IpAddr) -> Result<()> {
    let whole = single(ip)?;
    address(pod, "eth0", &[whole])?;
    let link = if cni.routes_each_pod() { port } else { "cni0" };
    node.host.ip(&format!("route add {whole} dev {link}"))
}

/// The ways between the pods of one member's nodes.
pub(crate) fn connect(cni: Cni, nodes: &[Node]) -> Result<()> {
    if cni == Cni::Fabric {
        return overlay(nodes);
    }
    for node in nodes {
        let mut lines = String::new();
        for other in others(nodes, node) {
            for range in &other.ranges {
                writeln!(lines, "route add {range} {}", via(other, range)?)?;
            }
        }
        node.host.ip(&lines)?;
    }
    Ok(())
}

/// The way from other nodes to a pod that lives on `node` with an address outside its ranges.
pub(crate) fn connect_pod(cni: Cni, nodes: &[Node], node: &Node, pod: IpAddr) -> Result<()> {
    let whole = single(pod)?;
    for other in others(nodes, node) {
        let way = if cni == Cni::Fabric { overlay_via(node, &whole)? } else { via(node, &whole)? };
        other.host.ip(&format!("route add {whole} {way}"))?;
    }
    Ok(())
}

/// The switch of a [`Cni::Fabric`]: what comes in from a node's port has that node's address.
pub(crate) fn fabric(switch: &Host, name: &str, nodes: &[Node]) -> Result<()> {
    let mut rules = String::new();
    for Node { port, addresses, .. } in nodes {
        let list =
            |v4| addresses.iter().filter(|ip| ip.is_ipv4() == v4).map(|ip| format!(", {ip}")).collect::<String>();
        writeln!(rules, "        iifname {port:?} ip saddr != {{ 0.0.0.0{} }} counter drop", list(true))?;
        writeln!(rules, "        iifname {port:?} ip6 saddr != {{ ::, fe80::/10{} }} counter drop", list(false))?;
    }
    switch.nft(&format!(
        "table bridge {name} {{
    chain prerouting {{
        type filter hook prerouting priority filter; policy accept;
{rules}    }}
}}"
    ))
}

fn others<'a>(nodes: &'a [Node], node: &Node) -> impl Iterator<Item = &'a Node> {
    let name = node.host.name().to_owned();
    nodes.iter().filter(move |other| other.host.name() != name)
}

/// The next hop towards a network that lives on `node`, as `ip route` takes it.
fn via(node: &Node, network: &IpNetwork) -> Result<String> {
    let same_family = node.addresses.iter().find(|ip| ip.is_ipv4() == network.is_ipv4());
    let hop = same_family.or(node.addresses.first()).context("a node has an address")?;
    Ok(format!("via {} {hop}", if hop.is_ipv4() { "inet" } else { "inet6" }))
}

/// As flannel's VXLAN backend: static neighbours and forwarding entries, one route for each range.
fn overlay(nodes: &[Node]) -> Result<()> {
    for node in nodes {
        let local = node.addresses.first().context("a node has an address")?;
        node.host.ip(&format!(
            "link add {OVERLAY} address {} mtu {OVERLAY_MTU} type vxlan id {OVERLAY_VNI} dstport {OVERLAY_PORT} local {local} dev eth0 nolearning
             link set {OVERLAY} up",
            mac(node)?
        ))?;
    }
    for node in nodes {
        let mut lines = String::new();
        let mut entries = String::new();
        for other in others(nodes, node) {
            let remote = other.addresses.first().context("a node has an address")?;
            writeln!(entries, "fdb append {} dev {OVERLAY} dst {remote} self permanent", mac(other)?)?;
            for range in &other.ranges {
                let hop = range.network();
                writeln!(lines, "neigh replace {hop} lladdr {} dev {OVERLAY} nud permanent", mac(other)?)?;
                if range.is_ipv6() {
                    writeln!(lines, "route add {hop} dev {OVERLAY}")?;
                }
                writeln!(lines, "route add {range} {}", overlay_via(other, range)?)?;
            }
        }
        node.host.bridge(&entries)?;
        node.host.ip(&lines)?;
    }
    Ok(())
}

fn overlay_via(node: &Node, network: &IpNetwork) -> Result<String> {
    let range = node.ranges.iter().find(|range| range.is_ipv4() == network.is_ipv4());
    let range = range.with_context(|| format!("{} has no range of the family of {network}", node.host.name()))?;
    Ok(format!("via {} dev {OVERLAY} onlink", range.network()))
}

fn mac(node: &Node) -> Result<String> {
    Ok(format!("02:fa:00:00:00:{:02x}", node.number))
}

/// What a pod's packets must not leave the node for.
fn local(node: &Node) -> Result<Vec<IpNetwork>> {
    let own = node.addresses.iter().map(|ip| single(*ip)).collect::<Result<Vec<_>>>()?;
    Ok([node.ranges.clone(), own].concat())
}

fn single(ip: IpAddr) -> Result<IpNetwork> {
    Ok(IpNetwork::new(ip, if ip.is_ipv4() { 32 } else { 128 })?)
}

fn uplink(host: &Host) -> Result<u32> {
    host.run(|| Ok(if_nametoindex("eth0")?))
}

fn attach(host: &Host, interface: &str, egress: bool, program: &[Instruction]) -> Result<()> {
    host.run(|| {
        let program = sys::load_classifier(program).context("load the network plugin's program")?;
        sys::attach_tcx(program.as_fd(), if_nametoindex(interface)?, egress, false)
            .with_context(|| format!("attach to {interface} by tcx (Linux 6.6 and later)"))
    })
}

impl Host {
    /// Attaches a program of somebody else to a link of this host by tcx, before or behind those that are there. It only
    /// says `verdict`: -1 to go on to the next program, 0 to pass without the others.
    pub fn attach_foreign(&self, link: &str, egress: bool, first: bool, verdict: i32) -> Result<()> {
        self.run(|| {
            let program = sys::load_classifier(&bpf::say(verdict)).context("load a program")?;
            sys::attach_tcx(program.as_fd(), if_nametoindex(link)?, egress, first).context("attach it")
        })
    }
}

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

/// As kube-proxy's forward chain under a firewall that drops: nothing without a known connection but from or to pods.
fn strict(cluster: &[IpNetwork]) -> String {
    let mut rules = String::new();
    for range in cluster {
        let ip = if range.is_ipv4() { "ip" } else { "ip6" };
        rules.push_str(&format!("        {ip} saddr {range} accept\n        {ip} daddr {range} accept\n"));
    }
    format!(
        "table inet strict {{
    chain forward {{
        type filter hook forward priority filter; policy drop;
        ct state invalid counter drop
        ct state {{ established, related }} accept
{rules}    }}
}}"
    )
}
