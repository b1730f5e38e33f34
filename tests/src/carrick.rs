//! The program under test, run on the lab's nodes as its users run it.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::IpAddr,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use crate::{Host, Lab, Member, Mesh, Node, Process, mesh::Gateway, wait_for};

/// The first of the tunnel's UDP ports: one for each device, at most [`DEVICES`].
pub const TUNNEL_PORT: u16 = 27473;
pub const DEVICES: u16 = 8;

/// A peer counts as connected while its last handshake is younger than this, in seconds: then WireGuard itself refuses it.
const HANDSHAKE_LIMIT: f64 = 180.0;

/// A built `carrick`.
#[derive(Clone, Debug)]
pub struct Carrick {
    binary: PathBuf,
}

/// What runs on one node.
#[derive(Debug)]
pub struct Running {
    pub tunnel: Process,
    pub agent: Process,
}

/// The part of `carrick status -o json` that the lab looks at.
#[derive(Clone, Debug, Deserialize)]
pub struct Status {
    pub ready: bool,
    pub peers: Vec<PeerStatus>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PeerStatus {
    pub member: String,
    pub device: String,
    pub connected: bool,
    #[serde(default)]
    pub handshake_age_seconds: Option<f64>,
    pub rx_bytes: u64,
    pub tx_bytes: u64,
}

impl Carrick {
    /// The program at that path.
    pub fn new(binary: &Path) -> Result<Carrick> {
        let binary = binary.canonicalize().with_context(|| binary.display().to_string())?;
        Ok(Carrick { binary })
    }

    pub fn path(&self) -> &Path {
        &self.binary
    }

    /// Makes the keys of every node and writes the folder that all members read.
    pub fn write_mesh(&self, lab: &Lab) -> Result<Mesh> {
        let mesh = Mesh::create(lab.dir("mesh"))?;
        for cluster in &lab.clusters {
            let member = &cluster.member;
            let mut gateways = Vec::new();
            for (ordinal, node) in cluster.nodes.iter().enumerate() {
                let public_key = self.generate_key(node, ordinal)?;
                let endpoint = |ip: &IpAddr| format!("{ip}:{TUNNEL_PORT}");
                let address = node.addresses.iter().find(|ip| ip.is_ipv4() && !member.behind_nat);
                gateways.push(Gateway { public_key, endpoints: address.map(endpoint).into_iter().collect() });
            }
            mesh.write_cluster(member, &gateways)?;
            mesh.write_routes(member, &member.pod_ranges())?;
        }
        Ok(mesh)
    }

    /// Makes the key of a slot and returns its public half.
    pub fn generate_key(&self, node: &Node, ordinal: usize) -> Result<String> {
        let keys = keys_dir(&node.host);
        if !keys.exists() {
            fs::DirBuilder::new().mode(0o700).create(&keys).with_context(|| format!("mkdir {}", keys.display()))?;
        }
        let arguments = ["keys", "gen", "--keys-dir", &text(&keys)?, "--ordinal", &ordinal.to_string()];
        Ok(node.host.output(&self.binary, &arguments)?.trim().to_owned())
    }

    /// Starts tunnel and agent on a node.
    pub fn start(&self, member: &Member, node: &Node, mesh: &Mesh) -> Result<Running> {
        let tunnel = self.start_tunnel(node)?;
        let agent = self.start_agent(member, node, mesh)?;
        Ok(Running { tunnel, agent })
    }

    pub fn start_tunnel(&self, node: &Node) -> Result<Process> {
        node.host.spawn("tunnel", &self.binary, &["tunnel"])
    }

    pub fn start_agent(&self, member: &Member, node: &Node, mesh: &Mesh) -> Result<Process> {
        let (folder, keys) = (text(mesh.folder())?, text(&keys_dir(&node.host))?);
        let name = &member.name;
        let arguments = ["agent", "--config-dir", &folder, "--cluster-name", name, "--keys-dir", &keys];
        let node_name = ["--node-name", node.host.name()];
        node.host.spawn("agent", &self.binary, &[&arguments[..], &node_name[..]].concat())
    }

    pub fn status(&self, node: &Node) -> Result<Status> {
        let text = node.host.output(&self.binary, &["status", "-o", "json"])?;
        serde_json::from_str(&text).with_context(|| format!("{}: carrick status -o json: {text}", node.host.name()))
    }

    /// Removes what the agent owns on a node.
    pub fn cleanup(&self, node: &Node) -> Result<String> {
        node.host.output(&self.binary, &["cleanup"])
    }

    /// Waits until the node's agent is ready and connected to exactly these members.
    pub fn wait_connected(&self, node: &Node, members: &[&str], limit: Duration) -> Result<Status> {
        let wanted: BTreeSet<&str> = members.iter().copied().collect();
        let what = format!("{} to be connected to {}", node.host.name(), members.join(", "));
        wait_for(&what, limit, || {
            let status = self.status(node).map_err(|error| format!("{error:#}"))?;
            let connected = status.peers.iter().filter(|peer| peer.is_connected());
            let connected: BTreeSet<&str> = connected.map(|peer| peer.member.as_str()).collect();
            if status.ready && connected == wanted { Ok(status.clone()) } else { Err(format!("{status:?}")) }
        })
    }
}

impl PeerStatus {
    /// As the agent says, and by the numbers: a young handshake, and something was received.
    fn is_connected(&self) -> bool {
        let young = self.handshake_age_seconds.is_some_and(|age| age < HANDSHAKE_LIMIT);
        self.connected && young && self.rx_bytes > 0
    }
}

/// Everything that a program could leave on a node: its links, addresses, routes and rules of both families, nft tables,
/// and the files of /run and the bpffs, one a line.
pub fn snapshot(node: &Node) -> Result<BTreeSet<String>> {
    // No counters: they change by themselves.
    let readings: [(&str, &[&str]); 9] = [
        ("ip", &["-o", "link", "show"]),
        ("ip", &["-o", "address", "show"]),
        ("ip", &["-4", "route", "show", "table", "all"]),
        ("ip", &["-6", "route", "show", "table", "all"]),
        ("ip", &["-4", "rule", "show"]),
        ("ip", &["-6", "rule", "show"]),
        ("nft", &["--stateless", "list", "ruleset"]),
        ("find", &["/run", "-path", "/run/carrick-lab", "-prune", "-o", "-print"]),
        ("find", &["/sys/fs/bpf"]),
    ];
    let mut lines = BTreeSet::new();
    for (program, arguments) in readings {
        let name = [&[program], arguments].concat().join(" ");
        // Equal lines are numbered, so that one more of them is seen too.
        let mut times = BTreeMap::new();
        for line in node.host.output(program, arguments)?.lines() {
            let line = without_state(line);
            let times: &mut u32 = times.entry(line.clone()).or_default();
            *times += 1;
            lines.insert(format!("{name}: {line} ({times})"));
        }
    }
    Ok(lines)
}

/// Without a link's operational state, which follows its carrier, later.
fn without_state(line: &str) -> String {
    let mut words: Vec<&str> = line.split_whitespace().collect();
    if let Some(at) =
        words.iter().position(|word| *word == "state").filter(|at| line.contains(" qdisc ") && at + 1 < words.len())
    {
        words.drain(at..at + 2);
    }
    words.join(" ")
}

/// What is there now and was not before, with `+`, and the other way round, with `-`.
pub fn difference(before: &BTreeSet<String>, now: &BTreeSet<String>) -> Vec<String> {
    let gone = before.difference(now).map(|line| format!("- {line}"));
    now.difference(before).map(|line| format!("+ {line}")).chain(gone).collect()
}

fn keys_dir(host: &Host) -> PathBuf {
    host.dir().join("keys")
}

fn text(path: &Path) -> Result<String> {
    let text = path.to_str().with_context(|| format!("{} is not UTF-8", path.display()))?;
    ensure!(!text.is_empty(), "an empty path");
    Ok(text.to_owned())
}
