//! What an agent says of itself, as `carrick status` shows it.

use std::{fmt::Write, net::SocketAddr, time::Duration};

use serde::{Deserialize, Serialize};

use crate::dial::SESSION;

/// One agent's view after its latest pass.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    pub cluster: String,
    pub node: String,
    pub version: String,
    /// Which WireGuard carries the tunnels.
    pub wireguard: String,
    /// Whether the folder has been read at all.
    pub synced: bool,
    /// Everything that is written was read, and this node has all of it in its kernel.
    pub ready: bool,
    /// This node has its keys, and the latest pass did all that it had to do: whatever was refused, and whatever waits for a
    /// better view.
    pub serving: bool,
    /// There are other members, and this node has a way to each of them.
    pub connected: bool,
    /// The slot that this node holds; `None`: a worker.
    pub slot: Option<u8>,
    pub drain: Drain,
    /// The devices by which this node reaches others.
    pub native: Vec<NativeStatus>,
    /// How the network plugin's packets come to be steered, as they have shown.
    pub network_plugin: NetworkPlugin,
    /// By which gateways each member is reached, as probes have found.
    pub members: Vec<MemberStatus>,
    pub peers: Vec<PeerStatus>,
    pub routes: Vec<RouteStatus>,
    pub sent: Vec<SentStatus>,
    pub drops: Vec<DropStatus>,
    /// Probe answers that nobody here had asked for. They change nothing.
    pub forged_answers: u64,
    /// Claims that were left out, each with its reason.
    pub rejections: Vec<String>,
    /// Files, keys, names and kernel settings that need somebody.
    pub problems: Vec<String>,
    /// Operations and readings that failed in the latest pass.
    pub failures: Vec<String>,
    /// Operations that wait until nothing fails and everything is read.
    pub withheld: usize,
}

/// Whether this gateway is being drained.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Drain {
    /// A worker: nobody sends through it.
    #[default]
    NoGateway,
    /// It takes its share.
    Taking,
    /// Others have been told, and some still send.
    Draining,
    /// Nobody has sent for 2 s.
    Drained,
    /// After 30 s somebody still sends.
    OverTime,
}

/// How the network plugin brings the packets of this node's pods to where they are steered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum NetworkPlugin {
    /// Nothing was sent to another member yet.
    #[default]
    Unknown,
    /// It obeys the node's routes, which lead to `carrick-hop`.
    Routes,
    /// It goes past the node's routes: they are found on a native device.
    Native,
}

/// One device by which this node reaches others.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NativeStatus {
    pub name: String,
    /// Bytes.
    pub mtu: u32,
    /// It cuts what leaves by the hop into packets itself (`tx-udp_tnl-segmentation`); if not, this node's processors do.
    pub tunnel_segmentation: bool,
}

/// The ways from this node to one member.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct MemberStatus {
    pub member: String,
    /// There is a way to it that answers.
    pub reached: bool,
    /// Slots of this cluster, on other nodes, that reach it.
    pub via: Vec<u8>,
    /// Slots of that member that this gateway reaches itself.
    pub links: Vec<u8>,
    /// Bytes of an inner packet that reach its pods; on a worker, the gateways of its own cluster.
    pub mtu: u32,
}

/// Packets that left by one way, since the maps were made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SentStatus {
    /// `slot N` over the hop; a WireGuard device; that `for other nodes`; or `from peers`.
    pub way: String,
    pub packets: u64,
    pub bytes: u64,
}

/// Packets that were dropped for one reason, since the maps were made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DropStatus {
    /// One of [`ebpf::Reason`].
    pub reason: String,
    pub packets: u64,
}

/// One remote gateway on one device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PeerStatus {
    pub member: String,
    pub device: String,
    pub public_key: String,
    pub endpoint: Option<SocketAddr>,
    /// A handshake younger than 180 s, and at least one byte received.
    pub connected: bool,
    /// Seconds.
    pub handshake_age_seconds: Option<u64>,
    pub rx_bytes: u64,
    pub tx_bytes: u64,
}

/// One remote range.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RouteStatus {
    pub cidr: String,
    pub member: String,
}

/// DESIGN's "connected", until probes measure it.
pub fn connected(handshake: Option<Duration>, rx_bytes: u64) -> bool {
    handshake.is_some_and(|age| age < SESSION) && rx_bytes > 0
}

impl Status {
    /// For people: a few lines, then a table of peers, then what is wrong.
    pub fn table(&self) -> String {
        let mut text = String::new();
        self.show_node(&mut text);
        for member in &self.members {
            let ways = [("link to slot", &member.links), ("via slot", &member.via)].into_iter();
            let ways = ways.flat_map(|(what, slots)| slots.iter().map(move |slot| format!("{what} {slot}")));
            let ways = ways.collect::<Vec<_>>().join(", ");
            let ways = if ways.is_empty() { "no way yet".to_owned() } else { ways };
            let lost = if member.reached || ways == "no way yet" { "" } else { ", none of which answers" };
            line(&mut text, format_args!("member {}: {ways}{lost} (mtu {})", member.member, member.mtu));
        }
        line(
            &mut text,
            format_args!(
                "{:<16} {:<12} {:<24} {:<10} {:>12} {:>12}",
                "MEMBER", "DEVICE", "ENDPOINT", "HANDSHAKE", "RECEIVED", "SENT"
            ),
        );
        for peer in &self.peers {
            let endpoint = peer.endpoint.map_or("-".to_owned(), |endpoint| endpoint.to_string());
            let age = peer.handshake_age_seconds.map_or("never".to_owned(), |age| format!("{age} s ago"));
            line(
                &mut text,
                format_args!(
                    "{:<16} {:<12} {endpoint:<24} {age:<10} {:>12} {:>12}",
                    peer.member, peer.device, peer.rx_bytes, peer.tx_bytes
                ),
            );
        }
        for route in &self.routes {
            line(&mut text, format_args!("route {} to {}", route.cidr, route.member));
        }
        for sent in self.sent.iter().filter(|sent| sent.packets > 0) {
            line(&mut text, format_args!("sent by {}: {} packets, {} bytes", sent.way, sent.packets, sent.bytes));
        }
        for drop in &self.drops {
            line(&mut text, format_args!("dropped {}: {} packets", drop.reason, drop.packets));
        }
        if self.forged_answers > 0 {
            line(&mut text, format_args!("forged probe answers: {}", self.forged_answers));
        }
        for (what, list) in [("refused", &self.rejections), ("problem", &self.problems), ("failed", &self.failures)] {
            for one in list {
                line(&mut text, format_args!("{what}: {one}"));
            }
        }
        if self.withheld > 0 {
            line(
                &mut text,
                format_args!("{} operations wait until nothing fails and everything is read", self.withheld),
            );
        }
        text
    }

    /// What this node is, and what it found.
    fn show_node(&self, text: &mut String) {
        let state = match (self.synced, self.ready) {
            (false, _) => "waiting for its objects",
            (true, false) => "not ready",
            (true, true) if self.connected => "ready, connected",
            (true, true) => "ready, not connected",
        };
        let role = self.slot.map_or("worker".to_owned(), |slot| format!("slot {slot}, {} WireGuard", self.wireguard));
        line(text, format_args!("{} on {}: {state} ({role})", self.cluster, self.node));
        match self.drain {
            Drain::NoGateway | Drain::Taking => {}
            Drain::Draining => text.push_str("draining: others still send through this gateway\n"),
            Drain::Drained => text.push_str("drained: nobody sends through this gateway\n"),
            Drain::OverTime => text.push_str("draining: after 30 s others still send through this gateway\n"),
        }
        for native in &self.native {
            let cuts = if native.tunnel_segmentation { "" } else { ", without tx-udp_tnl-segmentation" };
            line(text, format_args!("native device {}: mtu {}{cuts}", native.name, native.mtu));
        }
        match self.network_plugin {
            NetworkPlugin::Unknown => {}
            NetworkPlugin::Routes => text.push_str("network plugin: obeys the node's routes\n"),
            NetworkPlugin::Native => {
                text.push_str("network plugin: goes past the node's routes; steered on the native device\n");
            }
        }
    }
}

/// Writing to a `String` cannot fail.
fn line(text: &mut String, words: std::fmt::Arguments<'_>) {
    text.write_fmt(words).and_then(|()| text.write_char('\n')).expect("a String takes every write");
}
