//! `cargo xtask cluster`: two real Kubernetes clusters of two nodes each, on this machine, joined by an internet.
//!
//! - `design`: what they are: names, addresses, ranges. Pure data.
//! - `daemons`, `spec`: what runs on their machines, and how a machine is told.
//! - [`record`]: the clusters that are up, as a value; commands with them and in their nodes.
//! - `up`, `down`, `power`: make them, remove them, switch one machine off and on.
//! - `init`, `root`: a machine from inside: its first process and its root.
//! - [`carrick`]: Carrick in them, as its users bring it there.
//! - [`cilium`]: what enforces network policies in one of them, when it is asked to.
//! - `pki`, `images`, `cgroup`: keys and certificates; what pods run; control groups.
//!
//! A machine is a process in namespaces of its own, under the mark of the lab [`NAME`]: whatever happens to whoever makes
//! the clusters, the lab's guard ends all of it. Invariant: nothing is made in this machine's own namespaces but control
//! groups and files, both below folders of ours. What stays after [`down`]: br_netfilter, if it had to be loaded, and with
//! cgroup v2 the controllers that the root hands down.

use std::{
    io::{Write, stdout},
    os::unix::process::CommandExt,
    path::PathBuf,
};

use anyhow::{Context, Result, bail};
use clap::{Subcommand, ValueEnum};

use crate::tools;

pub mod carrick;
mod cgroup;
pub mod cilium;
mod daemons;
pub mod design;
mod down;
pub mod images;
mod init;
mod pki;
pub mod power;
pub mod record;
mod root;
mod spec;
pub mod up;

use record::Clusters;

/// The lab's name: `cargo xtask lab enter cluster internet`.
pub const NAME: &str = "cluster";

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Makes the clusters `mn` and `va`, `va` behind NAT, and joins them by Carrick. They stay until they are taken down.
    /// Again, it brings what has changed of Carrick since.
    Up {
        /// What keeps their objects.
        #[arg(long, value_enum, default_value_t = Store::Etcd)]
        store: Store,
        /// Nodes of each cluster. One is a gateway; of three and more, two.
        #[arg(long, default_value_t = design::NODES, value_parser = clap::value_parser!(u8).range(1..=i64::from(design::MAX_NODES)))]
        nodes: u8,
        /// The clusters alone.
        #[arg(long, conflicts_with = "carrick")]
        without_carrick: bool,
        /// Put this carrick into the image instead of building one.
        #[arg(long, value_name = "PATH")]
        carrick: Option<PathBuf>,
    },
    /// Runs kubectl with a cluster.
    Kubectl {
        cluster: String,
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Runs helm with a cluster.
    Helm {
        cluster: String,
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Runs a shell, or a command, in a node or a control plane's machine.
    Enter {
        machine: String,
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
    /// Pulls a machine's plug: its disk stays, and nothing else.
    Off { machine: String },
    /// Switches a machine on again.
    On { machine: String },
    /// Kills a daemon of a machine, as `kube-apiserver` or `kubelet`, and keeps it down.
    Stop { machine: String, daemon: String },
    /// Lets a daemon run again that was stopped.
    Start { machine: String, daemon: String },
    /// Shows the clusters, their nodes, and how much memory each machine takes.
    Status,
    /// Removes the clusters: processes, namespaces, control groups and files.
    Down,
    /// What a machine's first process is.
    #[command(hide = true)]
    Init { spec: PathBuf },
}

/// What keeps the objects of a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Store {
    Etcd,
    /// SQLite, behind etcd's protocol.
    Kine,
}

impl Args {
    /// Whether tools and packages are needed that may have to be got first.
    pub fn makes_clusters(&self) -> bool {
        matches!(self.command, Action::Up { .. })
    }

    /// Whether this is a machine's first process, and not a user's command.
    pub fn is_machine(&self) -> bool {
        matches!(self.command, Action::Init { .. })
    }
}

/// True if what was asked for was there to be done.
pub fn run(args: &Args) -> Result<bool> {
    match &args.command {
        Action::Up { store, nodes, without_carrick, carrick } => {
            // What does not build is known before anything is made.
            let image = (!without_carrick).then(|| carrick::prepare(carrick.as_deref(), "built")).transpose()?;
            let clusters = up::up(up::Options { store: *store, nodes: *nodes })?;
            if let Some(image) = image {
                carrick::Members::of(&clusters)?.install(&image, &up::Progress::start())?;
            }
            status()?;
        }
        Action::Kubectl { cluster, arguments } => client(cluster, &tools::KUBECTL.path()?, arguments)?,
        Action::Helm { cluster, arguments } => client(cluster, &tools::HELM.path()?, arguments)?,
        Action::Enter { machine, command } => enter(machine, command)?,
        Action::Off { machine } => {
            let mut clusters = Clusters::running()?;
            let cgroups = clusters.cgroups.clone();
            let (machine, switch) = clusters.machine_mut(machine)?;
            power::off(machine, switch, &cgroups)?;
            clusters.save()?;
        }
        Action::On { machine } => {
            let mut clusters = Clusters::running()?;
            let (machine, switch) = clusters.machine_mut(machine)?;
            power::on_again(machine, switch)?;
            clusters.save()?;
        }
        Action::Stop { machine, daemon } => Clusters::running()?.machine(machine)?.stop(daemon)?,
        Action::Start { machine, daemon } => Clusters::running()?.machine(machine)?.start(daemon)?,
        Action::Status => status()?,
        Action::Down => {
            if !down::down()? {
                eprintln!("the clusters are not up");
            }
        }
        Action::Init { spec } => return init::run(spec),
    }
    Ok(true)
}

/// Turns this process into a client of a cluster's API server.
fn client(cluster: &str, program: &std::path::Path, arguments: &[String]) -> Result<()> {
    let clusters = Clusters::running()?;
    let error = clusters.cluster(cluster)?.client(program)?.args(arguments).exec();
    Err(error).context("nsenter")
}

/// Turns this process into a command in a machine.
fn enter(machine: &str, command: &[String]) -> Result<()> {
    let clusters = Clusters::running()?;
    let machine = clusters.machine(machine)?;
    let error = match command {
        [] => machine.command("/bin/bash")?.exec(),
        [program, arguments @ ..] => machine.command(program)?.args(arguments).exec(),
    };
    Err(error).context("nsenter")
}

fn status() -> Result<()> {
    let clusters = Clusters::running()?;
    if !clusters.is_whole()? {
        bail!("the clusters are up in part: cargo xtask cluster down");
    }
    let mut out = stdout().lock();
    for cluster in &clusters.clusters {
        writeln!(out, "{}: {} (kubeconfig {})", cluster.name, cluster.server, cluster.kubeconfig.display())?;
        for machine in cluster.machines() {
            let (state, memory) = match machine.pid {
                Some(pid) => (format!("pid {pid}"), cgroup::memory(&clusters.cgroups, &machine.name)? >> 20),
                None => ("off".to_owned(), 0),
            };
            writeln!(out, "  {:<8} {:<16} {state:<12} {memory} MiB", machine.name, machine.address)?;
        }
        let nodes = cluster.kubectl(&["get", "nodes"], "");
        let nodes = nodes.unwrap_or_else(|error| format!("{error:#}\n"));
        writeln!(out, "{}", nodes.lines().map(|line| format!("  {line}\n")).collect::<String>())?;
    }
    writeln!(out, "ask one:       cargo xtask cluster kubectl {} -- get pods -A", clusters.clusters[0].name)?;
    writeln!(out, "enter a node:  cargo xtask cluster enter {}", clusters.clusters[0].nodes[0].name)?;
    writeln!(out, "remove both:   cargo xtask cluster down")?;
    Ok(())
}
