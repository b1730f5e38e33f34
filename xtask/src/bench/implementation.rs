//! The implementations that are compared: how each is brought up at both ends.
//!
//! Each gets the same key, port, addresses, MTU and cable. Ours is configured as its users do it, by a folder of
//! manifests; the others by `wg` and `ip`.

use std::{fs, path::Path, time::Duration};

use anyhow::{Context, Result};
use lab::{Process, wait_for};

use super::{
    ends::{End, Ends, MTU, PORT},
    traffic,
};
use crate::{
    process::check_interrupted,
    tools::{self, Tool},
};

const DEVICE: &str = "wg0";
/// How long an implementation may take until packets pass.
const START: Duration = Duration::from_secs(20);

/// One WireGuard implementation.
pub struct Implementation {
    pub name: &'static str,
    kind: Kind,
}

enum Kind {
    /// `carrick tunnel` and `carrick agent`.
    Ours,
    /// A program that makes a TUN device of the last argument's name and is configured by wg(8).
    Stock { tool: &'static Tool, arguments: &'static [&'static str] },
}

/// In the order in which they are measured in a round; ours first.
pub const IMPLEMENTATIONS: &[Implementation] = &[
    Implementation { name: "carrick", kind: Kind::Ours },
    Implementation {
        name: "gotatun",
        kind: Kind::Stock {
            tool: &tools::GOTATUN,
            arguments: &["--foreground", "--disable-drop-privileges", "--verbosity", "error", DEVICE],
        },
    },
    Implementation {
        name: "boringtun",
        kind: Kind::Stock {
            tool: &tools::BORINGTUN,
            arguments: &["--foreground", "--disable-drop-privileges", DEVICE],
        },
    },
    Implementation {
        name: "wireguard-go",
        kind: Kind::Stock { tool: &tools::WIREGUARD_GO, arguments: &["--foreground", DEVICE] },
    },
];

/// An implementation that runs at both ends, and passes packets. Ends with this value.
#[derive(Debug)]
pub struct Running {
    /// The tunnels, one at each end.
    pub tunnels: Vec<Process>,
    /// What else must run meanwhile.
    _agents: Vec<Process>,
}

impl Running {
    pub fn pids(&self) -> Vec<u32> {
        self.tunnels.iter().filter_map(Process::pid).collect()
    }
}

impl Implementation {
    /// Starts it at both ends, and waits until packets pass both ways.
    pub fn start(&self, ends: &Ends, carrick: &Path) -> Result<Running> {
        let mut running = match &self.kind {
            Kind::Ours => start_ours(ends, carrick, 2)?,
            Kind::Stock { tool, arguments } => {
                let start = |(end, other)| start_stock(self.name, &tool.path()?, arguments, end, other);
                let tunnels = ends.both_ways().into_iter().map(start).collect::<Result<Vec<_>>>()?;
                Running { tunnels, _agents: Vec::new() }
            }
        };
        for (from, to) in ends.both_ways() {
            wait_for(&format!("a packet through {}", self.name), START, || {
                check_interrupted().map_err(|error| error.to_string())?;
                traffic::reaches(from, to).map_err(|error| format!("{error:#}"))
            })?;
        }
        running.tunnels.iter_mut().try_for_each(Process::check_running)?;
        Ok(running)
    }
}

fn start_stock(name: &str, program: &Path, arguments: &[&str], end: &End, other: &End) -> Result<Process> {
    let mut tunnel = end.host.spawn(name, program, arguments)?;
    configure(name, &mut tunnel, end, other)
        .with_context(|| format!("{name} said: {}", tunnel.log().unwrap_or_default()))?;
    Ok(tunnel)
}

fn configure(name: &str, tunnel: &mut Process, end: &End, other: &End) -> Result<()> {
    let host = &end.host;
    wait_for(&format!("the control socket of {name}"), START, || {
        tunnel.check_running().map_err(|error| format!("{error:#}"))?;
        host.output("wg", &["show", DEVICE]).map_err(|error| format!("{error:#}"))
    })?;
    let key = end.key_file();
    let key = key.to_str().context("a path is not UTF-8")?;
    let (port, endpoint) = (PORT.to_string(), format!("{}:{PORT}", other.underlay));
    // In one request: gotatun may end by itself when it is reconfigured twice in a moment.
    let device = ["set", DEVICE, "private-key", key, "listen-port", &port];
    let peer = ["peer", &other.public_key, "allowed-ips", other.pods, "endpoint", &endpoint];
    host.output("wg", &[device, peer].concat())?;
    host.ip(&format!("link set {DEVICE} mtu {MTU} up\nroute add {} dev {DEVICE} src {}", other.pods, end.pod))
}

/// Ours in a mesh of so many `members`, of which two exist; all have gateways 0 and 1, so there are two devices.
pub fn start_ours(ends: &Ends, carrick: &Path, members: usize) -> Result<Running> {
    let folder = ends.guard.dir().join("mesh");
    fs::create_dir_all(&folder).with_context(|| format!("mkdir {}", folder.display()))?;
    let path = folder.join("mesh.yaml");
    fs::write(&path, manifests(&ends.ends, members)).with_context(|| format!("write {}", path.display()))?;
    let (mut tunnels, mut agents) = (Vec::new(), Vec::new());
    for end in &ends.ends {
        let keys = end.keys();
        let (folder, keys) = (folder.to_str().context("UTF-8")?, keys.to_str().context("UTF-8")?);
        tunnels.push(end.host.spawn("tunnel", carrick, &["tunnel"])?);
        let arguments = ["agent", "--config-dir", folder, "--cluster-name", end.member, "--keys-dir", keys];
        agents.push(end.host.spawn("agent", carrick, &arguments)?);
    }
    Ok(Running { tunnels, _agents: agents })
}

/// The two ends as members, and others that nobody is, up to the wanted number.
fn manifests(ends: &[End], members: usize) -> String {
    let mut text = String::new();
    for end in ends {
        let endpoint = format!(", endpoints: [\"{}:{PORT}\"]", end.underlay);
        text += &member(end.member, end.id, &end.public_key, &endpoint, end.pods);
    }
    for id in (0..members).skip(ends.len()).filter_map(|index| u16::try_from(index + 1).ok()) {
        let [high, low] = id.to_be_bytes();
        text += &member(&format!("m{id}"), id, &nobodys_key(id, 0), "", &format!("100.{}.{low}.0/24", 64 + high));
    }
    text
}

fn member(name: &str, id: u16, public_key: &str, endpoint: &str, pods: &str) -> String {
    let second = nobodys_key(id, 1);
    format!(
        "---
apiVersion: carrick.dev/v1alpha1
kind: MeshCluster
metadata: {{name: {name}}}
spec:
  id: {id}
  gateways:
  - {{ordinal: 0, publicKey: \"{public_key}\"{endpoint}}}
  - {{ordinal: 1, publicKey: \"{second}\"}}
  allowedCIDRs: [{pods}]
---
apiVersion: carrick.dev/v1alpha1
kind: RouteAdvertisement
metadata: {{name: {name}}}
spec:
  cluster: {name}
  routes:
  - {{cidr: {pods}, type: Pod}}
"
    )
}

/// Base64 of 32 bytes that are no low-order point; another for each member and gateway. Digits are base64 too, and a `0`
/// at the end has the two low bits clear, as padding wants it.
fn nobodys_key(id: u16, ordinal: u8) -> String {
    format!("Carrick{id:0>34}{ordinal}0=")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_as_long_as_32_bytes_in_base64() {
        assert_eq!(nobodys_key(4095, 1).len(), 44);
        assert_ne!(nobodys_key(1, 0), nobodys_key(1, 1));
        assert_ne!(nobodys_key(1, 0), nobodys_key(10, 0));
    }

    #[test]
    fn a_mesh_has_the_wanted_number_of_members_in_ranges_of_their_own() {
        let text = manifests(&[], 1000);
        assert_eq!(text.matches("kind: MeshCluster").count(), 1000);
        let mut ranges: Vec<_> = text.lines().filter(|line| line.contains("allowedCIDRs")).collect();
        ranges.sort_unstable();
        ranges.dedup();
        assert_eq!(ranges.len(), 1000);
    }
}
