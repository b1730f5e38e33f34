//! Everything of a state as an operator would type it: the vocabulary of plans, logs and tests alike.

use std::fmt;

use ipnetwork::IpNetwork;

use super::{Attachment, Config, Entry, Home, Hop, Key, Lookups, Nft, Node, Op, Remote, Route, Rule, WireGuard};
use crate::names::HOP;

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Route::Hop { mtu, source } => {
                write!(f, "dev {HOP}")?;
                if let Some(mtu) = mtu {
                    write!(f, " mtu {mtu}")?;
                }
                source.map_or(Ok(()), |source| write!(f, " src {source}"))
            }
            Route::Throw => f.write_str("throw"),
            Route::Unreachable => f.write_str("unreachable"),
            Route::Other => f.write_str("(somebody else's)"),
        }
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "priority {} lookup {}", self.priority(), self.table)
    }
}

/// With a space behind it, where it is more than nothing.
impl fmt::Display for Lookups {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Lookups::All => Ok(()),
            Lookups::Forwarded => f.write_str("not iif lo "),
            Lookups::NotBoundTo(device) => write!(f, "not oif {device} "),
        }
    }
}

/// `{:#}`: what grows with the mesh is counted, not listed. For what is told of every change.
impl fmt::Display for Nft {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if f.alternate() {
            write!(f, "keep_source {{ {} pairs }}", self.keep_source.len())?;
        } else {
            let pairs = self.keep_source.iter().map(|(from, to)| format!("{from} . {to}"));
            write!(f, "keep_source {{ {} }}", list(pairs))?;
        }
        if self.hop_port > 0 {
            write!(f, " hop {} nodes {{ {} }}", self.hop_port, list(&self.nodes))?;
            write!(f, " native {{ {} }}", list(&self.native))?;
        }
        Ok(())
    }
}

fn list<T: fmt::Display>(all: impl IntoIterator<Item = T>) -> String {
    all.into_iter().map(|one| one.to_string()).collect::<Vec<_>>().join(", ")
}

impl fmt::Display for Remote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Remote::Range(member) => write!(f, "member {member}"),
            Remote::Overlay(member) => write!(f, "overlay of member {member}"),
            Remote::Carved(member) => write!(f, "carved out of member {member}"),
            Remote::Other => f.write_str("(nonsense)"),
        }
    }
}

impl fmt::Display for Home {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Home::Here => f.write_str("here"),
            Home::Node(address) => write!(f, "on {address}"),
        }
    }
}

impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Entry::Config(config) => write!(f, "config {config}"),
            Entry::Remote(prefix, remote) => write!(f, "remote {prefix} {remote}"),
            Entry::Own(prefix, members) => write!(f, "own {prefix} offered to {{ {} }}", list(members)),
            Entry::Home(prefix, home) => write!(f, "home {prefix} {home}"),
            Entry::Node(address, Node { slot: None, .. }) => write!(f, "node {address} worker"),
            Entry::Node(address, Node { slot: Some(slot), .. }) => write!(f, "node {address} slot {slot}"),
        }
    }
}

impl fmt::Display for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "member {} ", self.member)?;
        match self.slot {
            Some(slot) => write!(f, "slot {slot} ")?,
            None => f.write_str("worker ")?,
        }
        write!(f, "overlay {} hop {{ {} }} gateways {{ ", self.overlay, list(&self.hop))?;
        for (slot, addresses) in &self.gateways {
            write!(f, "{slot}: {} ", list(addresses))?;
        }
        write!(f, "}} devices {{ {} }} secrets {{ {} }} ", list(&self.wireguard), list(&self.secrets))?;
        write!(f, "mtu {} hop-mtu {} ports {} ", self.mtu, self.hop_mtu, self.wireguard_port)?;
        write!(f, "{} {}", self.hop_port, self.probe_port)
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Key::Config => f.write_str("config"),
            Key::Remote(prefix) => write!(f, "remote {prefix}"),
            Key::Own(prefix) => write!(f, "own {prefix}"),
            Key::Home(prefix) => write!(f, "home {prefix}"),
            Key::Node(address) => write!(f, "node {address}"),
        }
    }
}

impl fmt::Display for Attachment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let hook = if self.program.is_ingress() { "ingress" } else { "egress" };
        write!(f, "{} {hook} program {}", self.link, self.program.name())
    }
}

/// `allowed-ips` as `wg` takes it, each prefix with the sign of a delta.
fn delta(sign: char, networks: &[IpNetwork]) -> String {
    networks.iter().map(|network| format!("{sign}{network}")).collect::<Vec<_>>().join(",")
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Op::SetDevice { device, wireguard: WireGuard { key, port } } => {
                write!(f, "wg set {device} listen-port {port} private-key <of {key}>")
            }
            Op::SetHop(Hop { port, sources: (first, last) }) => {
                write!(f, "ip link add {HOP} arp off type vxlan external dstport {port} srcport {first} {last} ")?;
                f.write_str("nolearning udp6zerocsumrx")
            }
            Op::LoadMaps => f.write_str("bpf maps load"),
            Op::SetEntry(entry) => write!(f, "bpf map set {entry}"),
            Op::Attach(attachment) => write!(f, "bpf attach {attachment}"),
            Op::AddOverlay(address) => write!(f, "ip address add {address}/128 dev lo preferred_lft 0"),
            Op::SetLink { interface, link } => {
                let state = if link.up { "up" } else { "down" };
                write!(f, "ip link set {interface} mtu {} addrgenmode none {state}", link.mtu)
            }
            Op::SetPeer { device, key, peer, gained } => {
                write!(f, "wg set {device} peer {key}")?;
                if let Some(endpoint) = peer.endpoint {
                    write!(f, " endpoint {endpoint}")?;
                }
                if peer.keepalive > 0 {
                    write!(f, " persistent-keepalive {}", peer.keepalive)?;
                }
                if let Some(psk) = peer.psk {
                    write!(f, " preshared-key <{psk}>")?;
                }
                if gained.is_empty() { Ok(()) } else { write!(f, " allowed-ips {}", delta('+', gained)) }
            }
            Op::GrowNft(nft) | Op::ShrinkNft(Some(nft)) => {
                f.write_str("nft replace table inet carrick ")?;
                nft.fmt(f)
            }
            Op::ShrinkNft(None) => f.write_str("nft delete table inet carrick"),
            Op::SetRule(rule, lookups) => {
                let (family, priority) = (rule.family.option(), rule.priority());
                write!(f, "ip {family} rule add priority {priority} {lookups}lookup {}", rule.table)
            }
            Op::DelRule(rule) => write!(f, "ip {} rule del {rule}", rule.family.option()),
            Op::SetRoute { table, to, route: route @ Route::Hop { .. } } => {
                write!(f, "ip route replace {to} {route} table {table}")
            }
            Op::SetRoute { table, to, route } => write!(f, "ip route replace {route} {to} table {table}"),
            Op::DelRoute { table, to } => write!(f, "ip route del {to} table {table}"),
            Op::DropAllowedIps { device, key, lost } => {
                write!(f, "wg set {device} peer {key} allowed-ips {}", delta('-', lost))
            }
            Op::RemovePeer { device, key } => write!(f, "wg set {device} peer {key} remove"),
            Op::DelEntry(key) => write!(f, "bpf map del {key}"),
            Op::NarrowOwn(prefix, members) => write!(f, "bpf map set {}", Entry::Own(*prefix, members.clone())),
            Op::DelOverlay(address) => write!(f, "ip address del {address}/128 dev lo"),
            Op::Detach(attachment) => write!(f, "bpf detach {attachment}"),
            Op::DelLink(interface) => write!(f, "ip link del {interface}"),
            Op::UnloadMaps => f.write_str("bpf maps unload"),
        }
    }
}
