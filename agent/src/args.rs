//! The command line: the only reader of flags and environment.

mod plugin;

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    str::FromStr,
};

use clap::{Args as ClapArgs, CommandFactory, Parser, Subcommand, ValueEnum, error::ErrorKind};
use ipnetwork::IpNetwork;

pub use self::plugin::{Agents, OfSlot, Plugin, PluginCommand, SecretKeys};
use crate::{
    names::{MemberName, NodeName, Ordinal},
    source::{Origin, Server},
};

/// How this program was called.
#[derive(Debug)]
pub enum Called {
    Carrick(Args),
    /// As `kubectl carrick`: under the name `kubectl-carrick`.
    Plugin(Plugin),
}

impl Called {
    /// The arguments of this process. Ends it with code 2 and a word of advice where they do not do.
    pub fn read() -> Called {
        let name = std::env::args_os().next().unwrap_or_default();
        if plugin::is_named_by(Path::new(&name)) {
            Called::Plugin(Plugin::read())
        } else {
            Called::Carrick(Args::read())
        }
    }
}

/// Joins Kubernetes clusters: pods of one reach pods of another by their own IP, encrypted.
#[derive(Debug, Parser)]
#[command(name = "carrick", version, max_term_width = 100, disable_help_subcommand = true)]
pub struct Args {
    /// How to write logs to standard error. What is logged follows RUST_LOG, default `info`.
    #[arg(long, global = true, value_enum, default_value_t = LogFormat::Human, env = "CARRICK_LOG_FORMAT")]
    pub log_format: LogFormat,
    #[command(subcommand)]
    pub command: Command,
}

impl Args {
    fn read() -> Args {
        let mut args = Args::parse();
        // The kubelet sets it in every pod.
        let in_pod = std::env::var_os("KUBERNETES_SERVICE_HOST").is_some();
        if let Err(advice) = args.settle(in_pod) {
            Args::command().error(ErrorKind::MissingRequiredArgument, advice).exit();
        }
        args
    }

    /// Says where the objects are, or what was forgotten.
    fn settle(&mut self, in_pod: bool) -> Result<(), &'static str> {
        let (dirs, api, advice) = match &mut self.command {
            Command::Agent(node) | Command::Plan(Plan { node, .. }) => {
                let advice = "give either --kube, to read the objects from the API server, or --config-dir DIR";
                (&node.config_dirs, &mut node.api, advice)
            }
            Command::Validate(Validate { dirs, api, .. }) => {
                (&*dirs, api, "give either --kube, to check what the API server has, or the folder of manifests")
            }
            _ => return Ok(()),
        };
        api.kube |= in_pod && dirs.is_empty();
        if api.kube || !dirs.is_empty() { Ok(()) } else { Err(advice) }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    Human,
    Json,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Runs the agent until it is signalled. The data plane stays when it goes.
    Agent(Node),
    /// Runs the userspace WireGuard that the agent configures, until it is signalled.
    Tunnel(Tunnel),
    /// Shows what this node's agent knows: peers, routes, refusals, problems. Exit code 1 if it is not ready: something is
    /// refused, or failed, or is not read yet.
    Status(Status),
    /// Makes this gateway ready to be stopped: everybody sends elsewhere, and nothing is lost. Exit code 0 once nobody has
    /// sent for 2 s; 1 if somebody still does after 30 s. It lasts until the agent restarts, or `--undo`.
    Drain(Drain),
    /// Prints the operations that the agent would perform now, as `ip` and `wg` would do them, and performs none.
    Plan(Plan),
    /// Makes and shows this node's WireGuard keys.
    #[command(subcommand)]
    Keys(Keys),
    /// Checks a folder of manifests, or what the API server has. Prints every refusal; exit code 1 if there is any.
    Validate(Validate),
    /// Writes this cluster's part of the mesh's folder, from what its API server says: its MeshCluster, with the gateways'
    /// keys and a free id, and its RouteAdvertisement. What the folder says already stays.
    Export(Export),
    /// Removes everything of Carrick's from this node's kernel. Keys and manifests stay.
    Cleanup(Cleanup),
}

/// Who this node is, and where its files are.
#[derive(Clone, Debug, ClapArgs)]
pub struct Node {
    /// A folder of manifests; may be given several times. It is followed while the agent runs.
    #[arg(long = "config-dir", value_name = "DIR", conflicts_with = "kube")]
    pub config_dirs: Vec<PathBuf>,
    #[command(flatten)]
    pub api: Api,
    /// This cluster's name: that of its MeshCluster.
    #[arg(long, value_name = "NAME", env = "CARRICK_CLUSTER_NAME")]
    pub cluster_name: MemberName,
    /// This node's name: that of its Node, where there are any. Default: the host's.
    #[arg(long, value_name = "NAME", env = "NODE_NAME")]
    pub node_name: Option<NodeName>,
    /// The folder of the keys (0700): files `gateway-ORDINAL`, `hop` and `psk-MEMBER` (0600, base64). With `--kube`, a slot's
    /// key is in its Secret instead, `carrick-gateway-ORDINAL`.
    #[arg(long, value_name = "DIR", default_value = "/etc/carrick/keys")]
    pub keys_dir: PathBuf,
    /// A range of this cluster's own beyond those it advertises, which no other member may claim; may be given several times.
    #[arg(long = "local-cidr", value_name = "CIDR")]
    pub local_cidrs: Vec<IpNetwork>,
    /// The mesh's own DNS domain; no endpoint may lie under it.
    #[arg(long, value_name = "DOMAIN", default_value = DEFAULT_MESH_DOMAIN)]
    pub mesh_domain: String,
    /// With `--kube`: how many slots have a Secret for their key, from slot 0 on, 1 to 8. A node whose label says `auto`
    /// claims one of these.
    #[arg(long, value_name = "N", default_value_t = ebpf::SLOTS, value_parser = clap::value_parser!(u8).range(1..=8))]
    pub gateway_slots: u8,
    #[command(flatten)]
    pub state: StateDir,
    #[command(flatten)]
    pub backend: Backend,
}

impl Node {
    /// Where the objects are. `name`: the node whose view it is.
    pub fn origin(&self, name: NodeName) -> Origin {
        self.api.or_folders(&self.config_dirs, Some(name), Some(&self.state.state_dir))
    }
}

#[derive(Clone, Debug, ClapArgs)]
pub struct StateDir {
    /// With `--kube`: the folder (0700) in which what the API server said last outlives the agent and a boot, so that a
    /// start while it is away forwards. No private key is in it.
    #[arg(long, value_name = "DIR", default_value = "/var/lib/carrick")]
    pub state_dir: PathBuf,
}

/// Kubernetes as the source of the objects.
#[derive(Clone, Debug, ClapArgs)]
pub struct Api {
    /// Reads the objects from the API server, and follows them. The default in a pod, unless a folder is given.
    #[arg(long)]
    pub kube: bool,
    #[command(flatten)]
    pub access: Access,
}

impl Api {
    /// `keep`: where what is followed is kept.
    fn or_folders(&self, dirs: &[PathBuf], node: Option<NodeName>, keep: Option<&Path>) -> Origin {
        if !self.kube {
            return Origin::Folders(dirs.to_vec());
        }
        Origin::Kube(Server { node, keep: keep.map(Path::to_owned), ..self.access.server() })
    }
}

/// How to reach the API server.
#[derive(Clone, Debug, ClapArgs)]
pub struct Access {
    /// The kubeconfig by which to reach the API server. Default: as kubectl finds it, `~/.kube/config`; without that, the
    /// pod's service account.
    #[arg(long, value_name = "PATH", env = "KUBECONFIG")]
    pub kubeconfig: Option<OsString>,
    /// Which of the kubeconfig's contexts. Default: its current one.
    #[arg(long, value_name = "NAME")]
    pub context: Option<String>,
}

impl Access {
    /// What was given, one or several.
    pub fn given(&self) -> Option<&OsString> {
        self.kubeconfig.as_ref().filter(|paths| !paths.is_empty())
    }

    pub fn server(&self) -> Server {
        // Only a kubeconfig has contexts: whoever names one is told that there is none.
        let of_home = |path: &PathBuf| path.exists() || self.context.is_some();
        let home = || std::env::home_dir().map(|home| home.join(".kube/config")).filter(of_home);
        let kubeconfig = self.given().cloned().or_else(|| home().map(PathBuf::into_os_string));
        Server { kubeconfig, context: self.context.clone(), node: None, keep: None }
    }
}

/// The chart's own, in all that is said of it.
const DEFAULT_NAMESPACE: &str = "carrick";
pub const DEFAULT_MESH_DOMAIN: &str = "mesh.internal";

/// Which WireGuard, and how to reach it.
#[derive(Clone, Debug, ClapArgs)]
pub struct Backend {
    /// The folder of sockets and locks.
    #[arg(long, value_name = "DIR", default_value = DEFAULT_RUN_DIR)]
    pub run_dir: PathBuf,
    /// Which WireGuard carries the tunnels: `userspace` is `carrick tunnel`.
    #[arg(long, value_enum, default_value_t = WireGuard::Auto)]
    pub wireguard: WireGuard,
    /// UDP port of device 0; device j listens on this + j.
    #[arg(long, value_name = "PORT", default_value_t = 27473, value_parser = clap::value_parser!(u16).range(1..=65528))]
    pub wireguard_port: u16,
    /// UDP port of the hop between the nodes of this cluster; the same on all of them.
    #[arg(long, value_name = "PORT", default_value_t = 27472, value_parser = clap::value_parser!(u16).range(1..))]
    pub hop_port: u16,
    /// UDP port of probes between overlay addresses; the same on every node of every member.
    #[arg(long, value_name = "PORT", default_value_t = 27455, value_parser = clap::value_parser!(u16).range(1..))]
    pub probe_port: u16,
    /// The BPF filesystem in which maps and programs outlive the agent.
    #[arg(long, value_name = "DIR", default_value = "/sys/fs/bpf")]
    pub bpffs: PathBuf,
}

const DEFAULT_RUN_DIR: &str = "/run/carrick";

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum WireGuard {
    /// The userspace one: the kernel's is not supported yet.
    Auto,
    Kernel,
    Userspace,
}

#[derive(Clone, Debug, ClapArgs)]
pub struct Tunnel {
    /// The folder of sockets and locks.
    #[arg(long, value_name = "DIR", default_value = DEFAULT_RUN_DIR)]
    pub run_dir: PathBuf,
}

#[derive(Clone, Debug, ClapArgs)]
pub struct Output {
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    pub output: Format,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    Table,
    Json,
    Yaml,
}

#[derive(Clone, Debug, ClapArgs)]
pub struct Status {
    /// The folder of the agent's socket.
    #[arg(long, value_name = "DIR", default_value = DEFAULT_RUN_DIR)]
    pub run_dir: PathBuf,
    /// Exit code 0 if this node serves, ready or not: it has read what there is, has its keys, and did all that follows in
    /// its kernel. What was refused, and what waits for a better view, does not count. For readiness probes.
    #[arg(long)]
    pub serving: bool,
    #[command(flatten)]
    pub output: Output,
}

#[derive(Clone, Debug, ClapArgs)]
pub struct Drain {
    /// The folder of the agent's socket.
    #[arg(long, value_name = "DIR", default_value = DEFAULT_RUN_DIR)]
    pub run_dir: PathBuf,
    /// Ends the draining.
    #[arg(long)]
    pub undo: bool,
}

#[derive(Clone, Debug, ClapArgs)]
pub struct Plan {
    #[command(flatten)]
    pub node: Node,
    #[command(flatten)]
    pub output: Output,
}

#[derive(Clone, Debug, Subcommand)]
pub enum Keys {
    /// Makes the key of a slot and prints the public half. Never overwrites a key; `--add` puts a second one beside it.
    ///
    /// With `--hop`, makes the secret by which the nodes of this cluster know each other's packets, and prints its
    /// fingerprint. Copy the file `hop` to the keys folder of every node. To replace it without losing a packet: add the
    /// new one as second line, with `--hop --add`, and copy the file to every node; then swap the two lines on every
    /// node, so that the new one sends; then delete the old line on every node.
    Gen {
        #[command(flatten)]
        slot: Slot,
        /// Makes the cluster's hop secret instead of a slot's key.
        #[arg(long, conflicts_with = "ordinal")]
        hop: bool,
        /// Adds a second key for a rotation: the node uses the one that the folder names.
        #[arg(long)]
        add: bool,
    },
    /// Prints the public half of a slot's keys.
    Show {
        #[command(flatten)]
        slot: Slot,
        #[command(flatten)]
        output: Output,
    },
}

#[derive(Clone, Debug, ClapArgs)]
pub struct Slot {
    /// The folder of the keys.
    #[arg(long, value_name = "DIR", default_value = "/etc/carrick/keys")]
    pub keys_dir: PathBuf,
    /// The gateway slot, 0 to 7.
    #[arg(long, value_name = "N", default_value = "0", value_parser = ordinal)]
    pub ordinal: Ordinal,
}

fn ordinal(text: &str) -> Result<Ordinal, String> {
    text.parse().ok().and_then(Ordinal::new).ok_or_else(|| "an ordinal is 0 to 7".to_owned())
}

#[derive(Clone, Debug, ClapArgs)]
pub struct Export {
    /// The mesh's folder: `clusters/NAME.yaml` and `routes/NAME/pods.yaml` are written in it. A file that has to change
    /// loses its comments.
    #[arg(long, value_name = "DIR")]
    pub mesh_dir: PathBuf,
    /// This cluster's name: that of its MeshCluster. Default: what the chart was told, `cluster.name`.
    #[arg(long, value_name = "NAME", env = "CARRICK_CLUSTER_NAME")]
    pub cluster_name: Option<MemberName>,
    /// Where others dial the gateway of a slot; may be given several times, also for one slot. Without any for a slot, the
    /// folder's stay.
    #[arg(long = "endpoint", value_name = "SLOT=HOST:PORT")]
    pub endpoints: Vec<SlotEndpoint>,
    /// A range that the cluster gives to pods; may be given several times. Default: what covers the Nodes' ranges.
    #[arg(long = "pod-cidr", value_name = "CIDR")]
    pub pod_cidrs: Vec<IpNetwork>,
    /// Seconds to wait until each gateway has made its key.
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    pub wait: u64,
    /// The mesh's own DNS domain; no endpoint may lie under it.
    #[arg(long, value_name = "DOMAIN", default_value = DEFAULT_MESH_DOMAIN)]
    pub mesh_domain: String,
    /// Where the chart is installed.
    #[arg(short, long, value_name = "NAMESPACE", default_value = DEFAULT_NAMESPACE)]
    pub namespace: String,
    #[command(flatten)]
    pub access: Access,
}

/// An endpoint of a slot's gateway.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlotEndpoint {
    pub slot: Ordinal,
    pub endpoint: String,
}

impl FromStr for SlotEndpoint {
    type Err = String;

    fn from_str(text: &str) -> Result<SlotEndpoint, String> {
        let (slot, endpoint) = text.split_once('=').ok_or("write SLOT=HOST:PORT, as 0=gw0.example.com:27473")?;
        let slot = ordinal(slot).map_err(|_| "the slot is a number from 0 to 7")?;
        Ok(SlotEndpoint { slot, endpoint: endpoint.to_owned() })
    }
}

#[derive(Clone, Debug, ClapArgs)]
pub struct Validate {
    /// The folders of manifests.
    #[arg(value_name = "DIR", conflicts_with = "kube")]
    pub dirs: Vec<PathBuf>,
    #[command(flatten)]
    pub api: Api,
    /// Checks this member's view too: what overlaps its own ranges.
    #[arg(long, value_name = "NAME")]
    pub cluster_name: Option<MemberName>,
    /// A range of that member's own beyond those it advertises; may be given several times.
    #[arg(long = "local-cidr", value_name = "CIDR", requires = "cluster_name")]
    pub local_cidrs: Vec<IpNetwork>,
    /// The mesh's own DNS domain; no endpoint may lie under it.
    #[arg(long, value_name = "DOMAIN", default_value = DEFAULT_MESH_DOMAIN)]
    pub mesh_domain: String,
    #[command(flatten)]
    pub output: Output,
}

impl Validate {
    /// Where the objects are.
    pub fn origin(&self) -> Origin {
        self.api.or_folders(&self.dirs, None, None)
    }
}

#[derive(Clone, Debug, ClapArgs)]
pub struct Cleanup {
    /// Prints the operations and performs none.
    #[arg(long)]
    pub dry_run: bool,
    /// Once everything is removed, stays until it is signalled: a container that ended would be started again.
    #[arg(long, conflicts_with = "dry_run")]
    pub wait: bool,
    #[command(flatten)]
    pub state: StateDir,
    #[command(flatten)]
    pub backend: Backend,
}

#[cfg(test)]
mod tests {
    use super::*;
    use expect_test::{expect, expect_file};

    /// The help of every subcommand, as `docs/cli.txt` has it.
    #[test]
    fn the_reference_says_what_help_says() {
        let mut text = String::new();
        for (n, mut command) in [Args::command(), Plugin::command()].into_iter().enumerate() {
            command.build();
            text.push_str(if n > 0 { "----------------\n" } else { "" });
            help(&mut command, &mut text);
        }
        expect_file!["../../docs/cli.txt"].assert_eq(&text);
    }

    /// Where the objects come from, or what is said to whoever calls it so.
    fn origin(line: &str, in_pod: bool) -> String {
        let mut args = match Args::try_parse_from(line.split(' ')) {
            Ok(args) => args,
            Err(error) => return error.to_string().lines().next().unwrap().to_owned(),
        };
        if let Err(advice) = args.settle(in_pod) {
            return advice.to_owned();
        }
        let origin = match args.command {
            Command::Agent(node) => node.origin("n1".parse().unwrap()),
            Command::Validate(validate) => validate.origin(),
            other => panic!("{other:?} has no source"),
        };
        match origin {
            Origin::Folders(dirs) => format!("folders {dirs:?}"),
            Origin::Kube(server) => {
                // This machine's environment may have another.
                let given = server.kubeconfig.filter(|path| path == "k").map_or("the default", |_| "k");
                let node = server.node.map_or("nobody".to_owned(), |node| node.to_string());
                format!("API server by {given}, for {node}")
            }
        }
    }

    #[test]
    fn an_empty_kubeconfig_is_none() {
        for (given, used) in [(None, None), (Some(""), None), (Some("k"), Some("k"))] {
            let access = Access { kubeconfig: given.map(OsString::from), context: None };
            assert_eq!(access.given(), used.map(OsString::from).as_ref());
        }
    }

    #[test]
    fn the_objects_come_from_one_place() {
        let mut text = String::new();
        for in_pod in [false, true] {
            for line in [
                "agent",
                "agent --config-dir a --config-dir b",
                "agent --kube --kubeconfig k",
                "agent --kube --config-dir a",
                "validate",
                "validate a",
                "validate --kube --kubeconfig k",
                "validate --kube a",
            ] {
                let line = line.replace("agent", "agent --cluster-name mn");
                text += &format!(
                    "{line}{}: {}\n",
                    if in_pod { " (in a pod)" } else { "" },
                    origin(&format!("carrick {line}"), in_pod)
                );
            }
        }
        expect![[r#"
            agent --cluster-name mn: give either --kube, to read the objects from the API server, or --config-dir DIR
            agent --cluster-name mn --config-dir a --config-dir b: folders ["a", "b"]
            agent --cluster-name mn --kube --kubeconfig k: API server by k, for n1
            agent --cluster-name mn --kube --config-dir a: error: the argument '--kube' cannot be used with '--config-dir <DIR>'
            validate: give either --kube, to check what the API server has, or the folder of manifests
            validate a: folders ["a"]
            validate --kube --kubeconfig k: API server by k, for nobody
            validate --kube a: error: the argument '--kube' cannot be used with '[DIR]...'
            agent --cluster-name mn (in a pod): API server by the default, for n1
            agent --cluster-name mn --config-dir a --config-dir b (in a pod): folders ["a", "b"]
            agent --cluster-name mn --kube --kubeconfig k (in a pod): API server by k, for n1
            agent --cluster-name mn --kube --config-dir a (in a pod): error: the argument '--kube' cannot be used with '--config-dir <DIR>'
            validate (in a pod): API server by the default, for nobody
            validate a (in a pod): folders ["a"]
            validate --kube --kubeconfig k (in a pod): API server by k, for nobody
            validate --kube a (in a pod): error: the argument '--kube' cannot be used with '[DIR]...'
        "#]].assert_eq(&text);
    }

    fn help(command: &mut clap::Command, text: &mut String) {
        // Without the values that this machine's environment has for it.
        let page = command.clone().mut_args(|arg| arg.hide_env_values(true)).render_long_help().to_string();
        let lines: Vec<&str> = page.lines().map(str::trim_end).collect();
        *text += &format!("{}\n\n", lines.join("\n").trim_end());
        for subcommand in command.get_subcommands_mut() {
            text.push_str("----------------\n");
            help(subcommand, text);
        }
    }
}
