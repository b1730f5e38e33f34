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
    /// There are peers, and every one is connected.
    pub connected: bool,
    pub peers: Vec<PeerStatus>,
    pub routes: Vec<RouteStatus>,
    /// Claims that were left out, each with its reason.
    pub rejections: Vec<String>,
    /// Files, keys, names and kernel settings that need somebody.
    pub problems: Vec<String>,
    /// Operations and readings that failed in the latest pass.
    pub failures: Vec<String>,
    /// Operations that wait until nothing fails and everything is read.
    pub withheld: usize,
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
        let state = match (self.synced, self.ready) {
            (false, _) => "waiting for its folder",
            (true, false) => "not ready",
            (true, true) if self.connected => "ready, connected",
            (true, true) => "ready, not connected",
        };
        line(&mut text, format_args!("{} on {}: {state} ({} WireGuard)", self.cluster, self.node, self.wireguard));
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
}

/// Writing to a `String` cannot fail.
fn line(text: &mut String, words: std::fmt::Arguments<'_>) {
    text.write_fmt(words).and_then(|()| text.write_char('\n')).expect("a String takes every write");
}
