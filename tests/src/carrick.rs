//! The program under test, run on the lab's nodes as its users run it.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::Write as _,
    net::{IpAddr, SocketAddr},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use crate::{
    Host, Lab, Member, Mesh, Node, Process,
    mesh::{self, Gateway},
    topology::Cluster,
    wait_for,
};

/// What an agent keeps for its next start: on a node of the lab, not on this machine.
pub const STATE_DIR: &str = "/run/carrick-state";

/// The first of the tunnel's UDP ports: one for each device, at most [`DEVICES`].
pub const TUNNEL_PORT: u16 = 27473;
pub const DEVICES: u16 = 8;

/// UDP port of the hop between the nodes of a member.
pub const HOP_PORT: u16 = 27472;

/// A peer counts as connected while its last handshake is younger than this, in seconds: then WireGuard itself refuses it.
const HANDSHAKE_LIMIT: f64 = 180.0;

/// How long everything may take to be whole again. A gateway that failed often is taken back late.
pub const WHOLE_LIMIT: Duration = Duration::from_secs(180);

/// A built `carrick`.
#[derive(Clone, Debug)]
pub struct Carrick {
    binary: PathBuf,
}

/// What runs on one node.
#[derive(Debug)]
pub struct Running {
    /// Of a gateway.
    pub tunnel: Option<Process>,
    pub agent: Process,
}

impl Running {
    /// The tunnel of a gateway.
    pub fn tunnel(&self) -> Result<&Process> {
        self.tunnel.as_ref().context("a worker runs no tunnel")
    }

    /// Lets both run on after this value is gone.
    pub fn detach(self) {
        self.agent.detach();
        self.tunnel.into_iter().for_each(Process::detach);
    }

    /// Waits until both are gone: somebody has ended them. Only then can others take their place.
    pub fn wait_gone(&mut self) -> Result<()> {
        let both = [&mut self.agent].into_iter().chain(&mut self.tunnel);
        both.filter(|process| process.pid().is_some()).try_for_each(|process| process.wait().map(drop))
    }

    /// SIGTERM to both, and waits until they are gone; fails if they do not end by themselves within `limit`.
    pub fn terminate(self) -> Result<()> {
        self.agent.terminate()?;
        self.tunnel.map_or(Ok(()), |tunnel| tunnel.terminate())
    }
}

/// The part of `carrick status -o json` that the lab looks at.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    pub ready: bool,
    pub connected: bool,
    pub peers: Vec<PeerStatus>,
    /// `routes` or `native`; `unknown` while nothing was sent to another member.
    pub network_plugin: String,
    pub members: Vec<MemberStatus>,
    /// Packets by the way that they left by.
    pub sent: Vec<Sent>,
    pub problems: Vec<String>,
    pub drops: Vec<Dropped>,
    /// Probe answers that nobody had asked for.
    pub forged_answers: u64,
}

/// The ways to another member.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct MemberStatus {
    pub member: String,
    /// Slots of the own cluster, on other nodes, and slots of that member.
    pub via: Vec<u8>,
    pub links: Vec<u8>,
}

/// Packets that the programs dropped for one reason.
#[derive(Clone, Debug, Deserialize)]
pub struct Dropped {
    pub reason: String,
    pub packets: u64,
}

#[derive(Clone, Debug, Deserialize)]
pub struct Sent {
    /// `slot N` over the hop, a WireGuard device, that `for other nodes`, or `from peers`.
    pub way: String,
    pub packets: u64,
}

impl Status {
    /// Whether the agent is ready and connected, and every peer of these members is. A worker has no peers.
    pub fn is_connected(&self, members: &[&str]) -> bool {
        let (connected, others): (Vec<_>, Vec<_>) = self.peers.iter().partition(|peer| peer.is_connected());
        let whole = others.iter().all(|peer| !members.contains(&peer.member.as_str()));
        let connected: BTreeSet<&str> = connected.iter().map(|peer| peer.member.as_str()).collect();
        self.ready && self.connected && whole && connected == members.iter().copied().collect()
    }

    /// Packets that left by ways whose names start so.
    pub fn sent_by(&self, way: &str) -> u64 {
        self.sent.iter().filter(|sent| sent.way.starts_with(way)).map(|sent| sent.packets).sum()
    }

    /// Packets dropped for that reason.
    pub fn dropped(&self, reason: &str) -> u64 {
        self.drops.iter().filter(|drop| drop.reason == reason).map(|drop| drop.packets).sum()
    }
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

    /// Makes the keys of every node and writes the folders: the one that all members read, and each member's own.
    pub fn write_mesh(&self, lab: &Lab) -> Result<Mesh> {
        let mut mesh = Mesh::create(lab.dir("mesh"))?;
        // An endpoint that some member has no address to dial from is one more that is tried in vain.
        let all_have = |v4: bool| lab.nodes().all(|(_, node)| node.addresses.iter().any(|ip| ip.is_ipv4() == v4));
        let dialled = |ip: &IpAddr| ip.is_ipv4() || !all_have(true);
        for cluster in &lab.clusters {
            let member = &cluster.member;
            let mut gateways = Vec::new();
            for (node, slot) in cluster.gateways() {
                let public_key = self.generate_key(node, slot.into())?;
                let endpoint = |ip: &IpAddr| SocketAddr::from((*ip, TUNNEL_PORT)).to_string();
                let addresses = node.addresses.iter().filter(|ip| !member.behind_nat && dialled(ip));
                gateways.push(Gateway { public_key, endpoints: addresses.map(endpoint).collect() });
            }
            mesh.write_cluster(member, &gateways)?;
            mesh.write_routes(member, &member.pod_ranges())?;
            if member.nodes > 1 {
                write_own(&mut mesh, cluster, &gateways)?;
                share_hop_secret(cluster)?;
            }
        }
        Ok(mesh)
    }

    /// Makes the key of a slot and returns its public half.
    pub fn generate_key(&self, node: &Node, ordinal: usize) -> Result<String> {
        let keys = make_keys_dir(&node.host)?;
        let arguments = ["keys", "gen", "--keys-dir", &text(&keys)?, "--ordinal", &ordinal.to_string()];
        Ok(node.host.output(&self.binary, &arguments)?.trim().to_owned())
    }

    /// Starts the agent on a node, and on a gateway the tunnel.
    pub fn start(&self, member: &Member, node: &Node, mesh: &Mesh) -> Result<Running> {
        let tunnel = node.slot.map(|_| self.start_tunnel(node)).transpose()?;
        let agent = self.start_agent(member, node, mesh)?;
        Ok(Running { tunnel, agent })
    }

    pub fn start_tunnel(&self, node: &Node) -> Result<Process> {
        node.host.spawn("tunnel", &self.binary, &["tunnel"])
    }

    pub fn start_agent(&self, member: &Member, node: &Node, mesh: &Mesh) -> Result<Process> {
        let (folder, keys) = (text(mesh.folder())?, text(&keys_dir(&node.host))?);
        let name = &member.name;
        let own = mesh.own(name).map(|own| text(own.path())).transpose()?;
        let own = own.iter().flat_map(|own| ["--config-dir", own]).collect();
        let arguments = vec!["agent", "--config-dir", &folder, "--cluster-name", name, "--keys-dir", &keys];
        let node_name = vec!["--node-name", node.host.name()];
        node.host.spawn("agent", &self.binary, &[arguments, own, node_name].concat())
    }

    pub fn status(&self, node: &Node) -> Result<Status> {
        let text = node.host.output(&self.binary, &["status", "-o", "json"])?;
        serde_json::from_str(&text).with_context(|| format!("{}: carrick status -o json: {text}", node.host.name()))
    }

    /// Removes what the agent owns on a node.
    pub fn cleanup(&self, node: &Node) -> Result<String> {
        node.host.output(&self.binary, &["cleanup", "--state-dir", STATE_DIR])
    }

    /// Has a gateway move its traffic to the others, and waits until it carries none.
    pub fn drain(&self, node: &Node) -> Result<()> {
        let mut drain = node.host.spawn("drain", &self.binary, &["drain"])?;
        let status = drain.wait()?;
        ensure!(status.success(), "{}: carrick drain: {status}\n{}", node.host.name(), drain.log()?);
        Ok(())
    }

    /// Waits until the node's agent is ready and, on a gateway, every pair of gateways with exactly these members is
    /// connected. A worker has no peers of its own.
    pub fn wait_connected(&self, node: &Node, members: &[&str], limit: Duration) -> Result<Status> {
        let wanted = if node.slot.is_some() { members } else { &[] };
        let what = format!("{} to be connected to {}", node.host.name(), members.join(", "));
        wait_for(&what, limit, || {
            let status = self.status(node).map_err(|error| format!("{error:#}"))?;
            if status.is_connected(wanted) { Ok(status.clone()) } else { Err(format!("{status:?}")) }
        })
    }

    /// Waits until every node is connected to every other member, by every way that there is.
    pub fn wait_whole(&self, clusters: &[Cluster]) -> Result<()> {
        for own in clusters {
            let others = || clusters.iter().filter(|other| other.member.name != own.member.name);
            let names: Vec<&str> = others().map(|other| other.member.name.as_str()).collect();
            for node in &own.nodes {
                self.wait_connected(node, &names, WHOLE_LIMIT)?;
                wait_for(&format!("every way from {}", node.host.name()), WHOLE_LIMIT, || {
                    others().try_for_each(|other| self.has_every_way(own, node, other))
                })?;
            }
        }
        Ok(())
    }

    /// Whether a node's probes have found each way to another member: by every gateway of its own that is another node and,
    /// on a gateway, to every one of that member.
    fn has_every_way(&self, own: &Cluster, node: &Node, other: &Cluster) -> Result<(), String> {
        let slots = |cluster: &Cluster| cluster.gateways().map(|(_, slot)| slot).collect::<Vec<_>>();
        let via = slots(own).into_iter().filter(|slot| Some(*slot) != node.slot).collect();
        let links = node.slot.map_or_else(Vec::new, |_| slots(other));
        let every = MemberStatus { member: other.member.name.clone(), via, links };
        let status = self.status(node).map_err(|error| format!("{error:#}"))?;
        if status.members.contains(&every) { Ok(()) } else { Err(format!("{:?}, not {every:?}", status.members)) }
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
    snapshot_by(|program, arguments| node.host.output(program, arguments))
}

/// [`snapshot`] of whatever node the closure runs programs in. It returns what they write to their standard output.
pub fn snapshot_by(run: impl Fn(&str, &[&str]) -> Result<String>) -> Result<BTreeSet<String>> {
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
        for line in run(program, arguments)?.lines() {
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

fn make_keys_dir(host: &Host) -> Result<PathBuf> {
    let keys = keys_dir(host);
    if !keys.exists() {
        fs::DirBuilder::new().mode(0o700).create(&keys).with_context(|| format!("mkdir {}", keys.display()))?;
    }
    Ok(keys)
}

/// The documents of a member of several nodes: its Nodes, and who holds which slot.
fn write_own(mesh: &mut Mesh, cluster: &Cluster, gateways: &[Gateway]) -> Result<()> {
    let own = mesh.add_own(&cluster.member.name)?;
    for node in &cluster.nodes {
        let name = node.host.name();
        own.write(&format!("node-{name}.yaml"), &mesh::node(name, &node.ranges, &node.addresses))?;
    }
    for ((node, slot), gateway) in cluster.gateways().zip(gateways) {
        let text = mesh::mesh_gateway(slot, node.host.name(), &node.addresses, &gateway.public_key);
        own.write(&format!("gateway-{slot}.yaml"), &text)?;
    }
    Ok(())
}

/// Gives all nodes of a member the same new secret, `hop` among their keys: 32 bytes in base64.
fn share_hop_secret(cluster: &Cluster) -> Result<()> {
    let first = cluster.nodes.first().context("a member has a node")?;
    let secret = first.host.output("sh", &["-c", "head -c 32 /dev/urandom | base64"])?;
    for node in &cluster.nodes {
        let file = make_keys_dir(&node.host)?.join("hop");
        let mut options = fs::OpenOptions::new();
        let mut file = options
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&file)
            .with_context(|| format!("{}", file.display()))?;
        file.write_all(secret.as_bytes()).with_context(|| format!("{}: write the hop secret", node.host.name()))?;
    }
    Ok(())
}

fn text(path: &Path) -> Result<String> {
    let text = path.to_str().with_context(|| format!("{} is not UTF-8", path.display()))?;
    ensure!(!text.is_empty(), "an empty path");
    Ok(text.to_owned())
}
