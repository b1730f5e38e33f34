//! The clusters that are up, as a value: where their API servers are, and how to run something with them and in their
//! nodes. It is kept on disk, so that any later command finds it.

use std::{
    ffi::OsStr,
    fs,
    io::Write,
    net::Ipv4Addr,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use ::lab::{Namespace, guard};
use anyhow::{Context, Result, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde::{Deserialize, Serialize};

use super::{NAME, cgroup::Hierarchy, init};
use crate::tools;

/// Where containerd's shim writes down each container's first process, in a machine.
const TASKS: &str = "run/containerd/io.containerd.runtime.v2.task/k8s.io";

/// Everything that [`up`](super::up) makes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Clusters {
    pub clusters: Vec<Cluster>,
    /// A process in the network namespace of the internet between them.
    pub internet: u32,
    pub cgroups: Vec<Hierarchy>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cluster {
    pub name: String,
    /// Of the administrator. The server it names is reached from inside the cluster's network: [`Cluster::client`].
    pub kubeconfig: PathBuf,
    /// `https://ADDRESS:6443`.
    pub server: String,
    /// The address of the Service `kube-dns`.
    pub dns: Ipv4Addr,
    pub control_plane: Machine,
    pub nodes: Vec<Machine>,
    /// A process in the network namespace that its machines are plugged into: its router's, or the internet's.
    pub switch: u32,
    /// The internet's interface towards it.
    pub uplink: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// Also the name of its Node, if it is one.
    pub name: String,
    pub address: std::net::IpAddr,
    /// Its first process. `None`: it is switched off.
    pub pid: Option<u32>,
    /// Its own files: its disk, certificates and logs.
    pub dir: PathBuf,
    /// The bridge of [`Cluster::switch`] that its uplink, which there has its name, is plugged into.
    pub bridge: String,
}

impl Clusters {
    /// Those that are up, or were left half made. `None`: there are none.
    pub fn load() -> Result<Option<Clusters>> {
        let path = file()?;
        match fs::read(&path) {
            Ok(text) => Ok(Some(serde_json::from_slice(&text).with_context(|| path.display().to_string())?)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with_context(|| path.display().to_string()),
        }
    }

    /// Those that are up; else an error that says what to do.
    pub fn running() -> Result<Clusters> {
        Clusters::load()?.context("the clusters are not up: cargo xtask cluster up")
    }

    pub fn save(&self) -> Result<()> {
        let path = file()?;
        fs::write(&path, serde_json::to_vec_pretty(self)?).with_context(|| format!("write {}", path.display()))
    }

    pub fn cluster(&self, name: &str) -> Result<&Cluster> {
        let names = || self.clusters.iter().map(|cluster| cluster.name.as_str()).collect::<Vec<_>>().join(", ");
        let found = self.clusters.iter().find(|cluster| cluster.name == name);
        found.with_context(|| format!("there is no cluster {name}: {}", names()))
    }

    /// A machine, and what it is plugged into.
    pub fn machine_mut(&mut self, name: &str) -> Result<(&mut Machine, u32)> {
        let names = self.machines().map(|machine| machine.name.clone()).collect::<Vec<_>>().join(", ");
        let mut all = self.clusters.iter_mut().flat_map(|cluster| {
            let switch = cluster.switch;
            let machines = [&mut cluster.control_plane].into_iter().chain(&mut cluster.nodes);
            machines.map(move |machine| (machine, switch))
        });
        all.find(|(machine, _)| machine.name == name).with_context(|| format!("there is no machine {name}: {names}"))
    }

    pub fn machine(&self, name: &str) -> Result<&Machine> {
        let names = || self.machines().map(|machine| machine.name.as_str()).collect::<Vec<_>>().join(", ");
        let found = self.machines().find(|machine| machine.name == name);
        found.with_context(|| format!("there is no machine {name}: {}", names()))
    }

    pub fn machines(&self) -> impl Iterator<Item = &Machine> {
        self.clusters.iter().flat_map(Cluster::machines)
    }

    /// Whether every machine that is not switched off runs.
    pub fn is_whole(&self) -> Result<bool> {
        let running = guard::processes(NAME)?;
        let runs = |pid: u32| running.contains(&pid);
        Ok(runs(self.internet) && self.machines().all(|machine| machine.pid.is_none_or(runs)))
    }
}

impl Cluster {
    /// The control plane's machine, then the nodes.
    pub fn machines(&self) -> impl Iterator<Item = &Machine> {
        [&self.control_plane].into_iter().chain(&self.nodes)
    }

    /// A command that talks to the API server as its administrator. It sees the files of outside, and the cluster's
    /// network as the control plane's machine sees it.
    pub fn client(&self, program: impl AsRef<OsStr>) -> Result<Command> {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/proc/{}/ns/net", self.control_plane.running()?)).arg("--").arg(program);
        command.env("KUBECONFIG", &self.kubeconfig).env(guard::MARK, NAME);
        let path = std::env::var_os("PATH").unwrap_or_default();
        let path = std::iter::once(bin()?).chain(std::env::split_paths(&path));
        command.env("PATH", std::env::join_paths(path).context("PATH")?);
        Ok(command)
    }

    /// What `kubectl` prints. `input` is its standard input.
    pub fn kubectl(&self, arguments: &[&str], input: &str) -> Result<String> {
        self.kubectl_within(Duration::from_secs(20), arguments, input)
    }

    /// [`Cluster::kubectl`], for what lasts: each request may take so long.
    pub fn kubectl_within(&self, limit: Duration, arguments: &[&str], input: &str) -> Result<String> {
        let mut command = self.client(tools::KUBECTL.path()?)?;
        command.arg(format!("--request-timeout={}s", limit.as_secs())).args(arguments);
        output(&mut command, input).with_context(|| format!("{}: kubectl {}", self.name, arguments.join(" ")))
    }
}

impl Machine {
    /// Its first process, and not what has got that number since, as after a restart of this machine.
    fn running(&self) -> Result<u32> {
        let pid = self.pid.with_context(|| format!("{} is switched off", self.name))?;
        ensure!(guard::processes(NAME)?.contains(&pid), "{} has ended by itself: cargo xtask cluster down", self.name);
        Ok(pid)
    }

    /// A command inside the machine: with its files, processes and network.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Result<Command> {
        let mut command = Command::new("nsenter");
        command.arg(format!("--target={}", self.running()?));
        command.args(["--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup", "--"]).arg(program);
        command.env(guard::MARK, NAME);
        Ok(command)
    }

    /// The network namespace of a pod, by the id of one of its containers, as its status has it.
    pub fn network_of(&self, pod: &str, container: &str) -> Result<Namespace> {
        let root = PathBuf::from(format!("/proc/{}/root", self.running()?));
        let id = container.strip_prefix("containerd://").with_context(|| format!("{pod}: {container:?} is no id"))?;
        let file = root.join(TASKS).join(id).join("init.pid");
        let process = fs::read_to_string(&file).with_context(|| format!("{pod}: {}", file.display()))?;
        Namespace::of_process(pod, &root.join("proc").join(process.trim()))
    }

    /// Kills a daemon, and keeps it down.
    pub fn stop(&self, daemon: &str) -> Result<()> {
        ensure!(self.log(daemon).exists(), "{} has no daemon {daemon}", self.name);
        let path = self.stopped(daemon);
        fs::write(&path, "").with_context(|| format!("write {}", path.display()))
    }

    /// Lets a daemon run again that was stopped.
    pub fn start(&self, daemon: &str) -> Result<()> {
        let path = self.stopped(daemon);
        fs::remove_file(&path).with_context(|| format!("remove {}: was it stopped?", path.display()))
    }

    /// Sends a daemon's process a signal.
    pub fn signal(&self, daemon: &str, signal: Signal) -> Result<()> {
        let first = self.running()?;
        let children = format!("/proc/{first}/task/{first}/children");
        let children = fs::read_to_string(&children).context(children)?;
        let is_it = |pid: &&str| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let program = line.split(|byte| *byte == 0).next().map(String::from_utf8_lossy).unwrap_or_default();
            program.rsplit('/').next().is_some_and(|name| name.starts_with(daemon))
        };
        let pid =
            children.split_whitespace().find(is_it).with_context(|| format!("{}: no {daemon} runs", self.name))?;
        kill(Pid::from_raw(pid.parse().context("a process's number")?), signal).with_context(|| format!("kill {pid}"))
    }

    fn stopped(&self, daemon: &str) -> PathBuf {
        self.dir.join(init::STOPPED).join(daemon)
    }

    /// A daemon's log; `init` is that of the first process.
    pub fn log(&self, daemon: &str) -> PathBuf {
        match daemon {
            "init" => self.dir.join("init.log"),
            daemon => self.dir.join("log").join(format!("{daemon}.log")),
        }
    }
}

/// Runs it to its end; what it wrote to its standard output.
pub fn output(command: &mut Command, input: &str) -> Result<String> {
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let mut stdin = child.stdin.take().context("no standard input")?;
    let input = input.to_owned();
    let fed = std::thread::spawn(move || stdin.write_all(input.as_bytes()));
    let output = child.wait_with_output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{}: {}", output.status, said.trim_end());
    fed.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)).context("feed the input")?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Where everything of the clusters lies: a real file system, outside the repository.
pub fn folder() -> Result<PathBuf> {
    Ok(tools::cache_dir()?.join("cluster"))
}

/// Where what [`Cluster::client`] runs finds other programs first.
fn bin() -> Result<PathBuf> {
    Ok(folder()?.join("bin"))
}

/// Has what [`Cluster::client`] runs find those programs by these names.
pub fn give_tools(tools: &[(&str, &Path)]) -> Result<()> {
    let bin = bin()?;
    fs::create_dir_all(&bin).with_context(|| format!("make {}", bin.display()))?;
    for (name, program) in tools {
        let link = bin.join(name);
        let program = program.canonicalize().with_context(|| program.display().to_string())?;
        if link.symlink_metadata().is_ok() {
            fs::remove_file(&link).with_context(|| format!("remove {}", link.display()))?;
        }
        symlink(&program, &link).with_context(|| format!("link {}", link.display()))?;
    }
    Ok(())
}

fn file() -> Result<PathBuf> {
    Ok(folder()?.join("clusters.json"))
}

/// Where the files of a machine lie.
pub fn machine_dir(name: &str) -> Result<PathBuf> {
    Ok(folder()?.join("machines").join(name))
}

/// Where a machine keeps its certificates.
pub fn pki_dir(machine: &Path) -> PathBuf {
    machine.join("pki")
}
