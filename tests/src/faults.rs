//! What a test breaks on purpose: nodes, links between hosts, the size that an underlay carries.

use std::{
    net::IpAddr,
    ops::RangeInclusive,
    sync::atomic::{AtomicU32, Ordering},
};

use anyhow::{Context, Result, bail, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{Host, Lab, Node, guard, topology::Cluster};

/// Which packets a fault hits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Traffic {
    All,
    /// UDP from or to one of these ports.
    Udp(RangeInclusive<u16>),
}

/// Something that is broken until it is mended.
#[derive(Debug)]
#[must_use = "it stays broken, and nobody can mend it"]
pub struct Fault<'a> {
    host: &'a Host,
    table: String,
    /// What mends it, beside the table's end: a shell script.
    undo: String,
}

impl Fault<'_> {
    /// Packets that it has dropped so far.
    pub fn dropped(&self) -> Result<u64> {
        let Fault { host, table, .. } = self;
        let listing = host.output("nft", &[&["list", "table"], &table.split(' ').collect::<Vec<_>>()[..]].concat())?;
        let words: Vec<&str> = listing.split_whitespace().collect();
        let count = |pair: &[&str]| if pair[0] == "packets" { pair[1].parse::<u64>().ok() } else { None };
        Ok(words.windows(2).filter_map(count).sum::<u64>())
    }

    pub fn mend(self) -> Result<()> {
        let Fault { host, table, undo } = self;
        host.nft(&format!("delete table {table}"))?;
        host.output("sh", &["-ec", &undo]).map(drop)
    }
}

impl Lab {
    /// Drops so many percent of what `from` sends to `to`, silently; the other way stays as it is. Not between two
    /// members behind NAT: nobody between them sees the addresses of both.
    pub fn drop_packets(&self, from: &Node, to: &Node, traffic: &Traffic, percent: u8) -> Result<Fault<'_>> {
        ensure!((1..=100).contains(&percent), "{percent} percent");
        let (host, family) = self.between(from, to)?;
        fault(host, family, &drops(&from.addresses, &to.addresses, traffic, percent), String::new())
    }

    /// Drops all of that traffic, both ways.
    pub fn cut(&self, a: &Node, b: &Node, traffic: &Traffic) -> Result<[Fault<'_>; 2]> {
        Ok([self.drop_packets(a, b, traffic, 100)?, self.drop_packets(b, a, traffic, 100)?])
    }

    /// From now on the internet carries at most so many bytes of a packet to and from a member, and tells nobody. IPv4 that
    /// may be fragmented is, as by any router; `fragments` says whether they arrive.
    pub fn limit_mtu(&self, member: &str, bytes: u16, fragments: bool) -> Result<Fault<'_>> {
        let cluster = self.cluster(member)?;
        let Cluster { uplink, .. } = cluster;
        let from = 1000 + u32::from(cluster.member.id);
        let to = 2000 + u32::from(cluster.member.id);
        let (mut doing, mut undo) = (String::new(), String::new());
        for family in ["-4", "-6"] {
            let routes = self.internet.output("ip", &[family, "-o", "route", "show", "table", "main"])?;
            for route in routes.lines().filter(|route| !route.starts_with("fe80:")) {
                let table = if route.split(' ').any(|word| word == uplink) { to } else { from };
                let route = route.trim_end().replace(" linkdown", "");
                doing += &format!("ip {family} route add {route} mtu lock {bytes} table {table}\n");
            }
            doing += &format!("ip {family} rule add lookup {to}\nip {family} rule add iif {uplink} lookup {from}\n");
            for (rule, table) in [(format!("iif {uplink} "), from), (String::new(), to)] {
                undo += &format!("ip {family} rule del {rule}lookup {table}\nip {family} route flush table {table}\n");
            }
        }
        self.internet.output("sh", &["-ec", &doing])?;
        let silence = "    chain silence {
        type filter hook output priority filter; policy accept;
        icmp type destination-unreachable icmp code frag-needed counter drop
        icmpv6 type packet-too-big counter drop
    }\n";
        if !fragments {
            let uplinks: Vec<&str> = self.clusters.iter().map(|cluster| cluster.uplink.as_str()).collect();
            // Behind the place where they are made.
            self.internet.nft(&format!(
                "table netdev fragments {{
    chain lose {{
        type filter hook egress devices = {{ {} }} priority filter; policy accept;
        ip frag-off & 0x3fff != 0 counter drop
    }}
}}",
                uplinks.join(", ")
            ))?;
            undo += "nft delete table netdev fragments\n";
        }
        fault(&self.internet, "inet", silence, undo)
    }

    /// Switches a node off: its uplink is dead, and all its programs are gone. What its kernel holds stays.
    pub fn power_off(&self, node: &Node) -> Result<()> {
        self.port(node, "down")?;
        let hosts: Vec<&Host> = [&node.host].into_iter().chain(node.pods.iter().map(|pod| &pod.host)).collect();
        let namespaces = hosts.iter().map(|host| namespace(host.pid())).collect::<Result<Vec<_>>>()?;
        for pid in guard::processes(self.name())? {
            let holds = hosts.iter().any(|host| host.pid() == pid);
            // A process that ended meanwhile has no namespace.
            if !holds && namespace(pid).is_ok_and(|namespace| namespaces.contains(&namespace)) {
                // It may end just now.
                kill(Pid::from_raw(pid.cast_signed()), Signal::SIGKILL).ok();
            }
        }
        Ok(())
    }

    /// Connects a node again. No program starts by itself.
    pub fn power_on(&self, node: &Node) -> Result<()> {
        self.port(node, "up")
    }

    fn port(&self, node: &Node, state: &str) -> Result<()> {
        self.switch(&self.member_of(node)?.name)?.ip(&format!("link set {} {state}", node.port))
    }

    /// The host that all packets between two nodes pass, with the inner addresses of both, and nft's family there.
    fn between(&self, a: &Node, b: &Node) -> Result<(&Host, &'static str)> {
        let (a, b) = (self.member_of(a)?, self.member_of(b)?);
        if a.name == b.name {
            return Ok((self.switch(&a.name)?, "bridge"));
        }
        match (a.behind_nat, b.behind_nat) {
            (true, true) => bail!("{} and {} are both behind NAT", a.name, b.name),
            (true, false) => Ok((self.switch(&a.name)?, "inet")),
            (false, true) => Ok((self.switch(&b.name)?, "inet")),
            (false, false) => Ok((&self.internet, "inet")),
        }
    }
}

fn fault<'a>(host: &'a Host, family: &str, chains: &str, undo: String) -> Result<Fault<'a>> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let table = format!("{family} fault-{}", NEXT.fetch_add(1, Ordering::Relaxed));
    host.nft(&format!("table {table} {{\n{chains}}}"))?;
    Ok(Fault { host, table, undo })
}

/// Chains of nft that drop a share of what goes from any of these addresses to any of those.
fn drops(from: &[IpAddr], to: &[IpAddr], traffic: &Traffic, percent: u8) -> String {
    let share = if percent == 100 { String::new() } else { format!("numgen random mod 100 < {percent} ") };
    let ports = match traffic {
        Traffic::All => vec![String::new()],
        Traffic::Udp(ports) => {
            ["sport", "dport"].map(|end| format!("udp {end} {}-{} ", ports.start(), ports.end())).into()
        }
    };
    let mut rules = String::new();
    for (from, to) in from.iter().flat_map(|from| to.iter().map(move |to| (from, to))) {
        let ip = if from.is_ipv4() { "ip" } else { "ip6" };
        for port in ports.iter().filter(|_| from.is_ipv4() == to.is_ipv4()) {
            rules += &format!("        {ip} saddr {from} {ip} daddr {to} {port}goto lose\n");
        }
    }
    // A chain of its own: lots are drawn once for a packet that several rules mean. The priority is behind what
    // translates to the inner addresses and before what translates from them.
    format!(
        "    chain lose {{
        {share}counter drop
    }}
    chain fault {{
        type filter hook forward priority 1; policy accept;
{rules}    }}\n"
    )
}

fn namespace(pid: u32) -> Result<std::path::PathBuf> {
    std::fs::read_link(format!("/proc/{pid}/ns/net")).context("read a namespace")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_names_both_families_and_both_ports() {
        let ips = |ips: [&str; 2]| ips.map(|ip| ip.parse().unwrap());
        let (from, to) = (ips(["192.0.2.1", "2001:db8::1"]), ips(["192.0.2.2", "2001:db8::2"]));
        assert_eq!(
            drops(&from, &to, &Traffic::Udp(27473..=27480), 50),
            "    chain lose {
        numgen random mod 100 < 50 counter drop
    }
    chain fault {
        type filter hook forward priority 1; policy accept;
        ip saddr 192.0.2.1 ip daddr 192.0.2.2 udp sport 27473-27480 goto lose
        ip saddr 192.0.2.1 ip daddr 192.0.2.2 udp dport 27473-27480 goto lose
        ip6 saddr 2001:db8::1 ip6 daddr 2001:db8::2 udp sport 27473-27480 goto lose
        ip6 saddr 2001:db8::1 ip6 daddr 2001:db8::2 udp dport 27473-27480 goto lose
    }\n"
        );
        let all = drops(&from[..1], &to, &Traffic::All, 100);
        assert!(all.contains("        counter drop\n") && all.contains("ip daddr 192.0.2.2 goto lose\n"), "{all}");
    }
}
