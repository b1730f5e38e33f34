//! Makes the clusters: from nothing to nodes that are Ready and names that resolve.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use ::lab::{Host, guard::Guard, guard::HostRecord, host::tail, topology::Access, wait_for};
use anyhow::{Context, Result, anyhow, ensure};
use nix::sys::statfs::{OVERLAYFS_SUPER_MAGIC, statfs};

use super::{
    NAME, Store, cgroup, cilium, daemons,
    daemons::Programs,
    design::{self, Design, Network, Role, Seat},
    down, images, pki, power, record,
    record::{Cluster, Clusters, Machine},
    spec::Spec,
};
use crate::{process, tools};

/// How long each part of the way may take, on a busy machine.
pub const LIMIT: Duration = Duration::from_secs(180);
/// How often the API server is asked: each question is a process.
const POLL: Duration = Duration::from_millis(250);
/// Lines of each log that are shown when something does not come up.
const SHOWN_LINES: usize = 12;

const COREDNS: &str = include_str!("coredns.yaml");
const FLANNEL: &str = include_str!("flannel.yaml");

/// What the clusters are to be.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    pub store: Store,
    /// Of each cluster, without the machine of the control plane.
    pub nodes: u8,
}

/// Clusters that end with [`Temporary::end`], and with this process.
pub struct Temporary {
    guard: Arc<Guard>,
    /// Dropped hosts would end.
    hosts: Mutex<Vec<Host>>,
    /// Ended, or kept.
    over: Mutex<bool>,
}

impl Temporary {
    /// Nothing yet: [`Temporary::make`] makes them.
    pub fn begin() -> Result<Temporary> {
        ensure!(!down::lab_exists()?, "the clusters are up, or were left half made: cargo xtask cluster down");
        // What a maker that was killed may have left.
        down::files()?;
        Ok(Temporary { guard: Guard::named(NAME)?, hosts: Mutex::default(), over: Mutex::default() })
    }

    pub fn make(&self, options: Options) -> Result<Clusters> {
        let mut hosts = self.hosts.lock().unwrap_or_else(PoisonError::into_inner);
        let clusters = build(&self.guard, options, &mut hosts)?;
        clusters.save()?;
        Ok(clusters)
    }

    /// Lets them outlive this process, until [`down::down`].
    pub fn keep(&self) -> Result<()> {
        let mut over = self.over.lock().unwrap_or_else(PoisonError::into_inner);
        self.guard.keep()?;
        *over = true;
        let mut hosts = self.hosts.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut *hosts).into_iter().for_each(std::mem::forget);
        Ok(())
    }

    /// Removes what there is of them, unless they are kept. Harmless when repeated; who comes second waits.
    pub fn end(&self) -> Result<()> {
        let mut over = self.over.lock().unwrap_or_else(PoisonError::into_inner);
        if !*over {
            *over = true;
            self.guard.end()?;
            down::files()?;
        }
        Ok(())
    }
}

/// Makes the clusters, and lets them outlive this process. If that fails, or at Ctrl-C, nothing of them stays. Those that
/// are up already are taken as they are.
pub fn up(options: Options) -> Result<Clusters> {
    if let Some(clusters) = Clusters::load()? {
        ensure!(clusters.is_whole()?, "the clusters are up in part: cargo xtask cluster down");
        let nodes = clusters.clusters.iter().all(|cluster| cluster.nodes.len() == usize::from(options.nodes));
        ensure!(nodes, "the clusters are up with other nodes: cargo xtask cluster down");
        eprintln!("the clusters are up already; to begin anew: cargo xtask cluster down");
        return Ok(clusters);
    }
    let clusters = Temporary::begin()?;
    match clusters.make(options) {
        Ok(made) => clusters.keep().map(|()| made),
        Err(error) => {
            eprintln!("removing what there is of the clusters");
            clusters.end()?;
            Err(error)
        }
    }
}

fn build(guard: &Arc<Guard>, options: Options, hosts: &mut Vec<Host>) -> Result<Clusters> {
    let progress = Progress::start();
    prepare_machine()?;
    let designs = design::both(options.nodes)?;
    let images = images::write(&images::dir()?)?;
    progress.say("images written");
    let cgroups = cgroup::here()?;
    down::remember(&cgroups)?;
    let internet = Host::network(guard, "internet")?;
    internet.forward()?;
    let mut clusters = Clusters { clusters: Vec::new(), internet: internet.pid(), cgroups };
    for design in &designs {
        let maker = Maker { design, store: options.store, images: &images, cgroups: &clusters.cgroups };
        let (cluster, router) = maker.make(guard, &internet)?;
        hosts.extend(router);
        clusters.clusters.push(cluster);
    }
    guard.record(host_records(&internet, hosts))?;
    hosts.push(internet);
    progress.say("machines switched on");
    for (design, cluster) in designs.iter().zip(&clusters.clusters) {
        wait_for_server(cluster)?;
        progress.say(&format!("{}: the API server is ready", cluster.name));
        cluster.kubectl(&["apply", "-f", "-"], &manifests(design)?)?;
    }
    for (design, cluster) in designs.iter().zip(&clusters.clusters) {
        give_ranges(design, cluster)?;
        wait_for_nodes(cluster)?;
        progress.say(&format!("{}: the nodes are Ready", cluster.name));
    }
    for cluster in &clusters.clusters {
        wait_for_dns(cluster)?;
        progress.say(&format!("{}: CoreDNS is rolled out", cluster.name));
    }
    Ok(clusters)
}

/// Says what was reached, and when.
pub struct Progress(Instant);

impl Progress {
    pub fn start() -> Progress {
        Progress(Instant::now())
    }

    pub fn say(&self, what: &str) {
        eprintln!("{:5.1} s  {what}", self.0.elapsed().as_secs_f64());
    }
}

/// Makes the clusters' folder, and sees to what namespaces cannot have of their own.
fn prepare_machine() -> Result<()> {
    let folder = record::folder()?;
    fs::create_dir_all(&folder).with_context(|| format!("make {}", folder.display()))?;
    let kind = statfs(&folder).with_context(|| folder.display().to_string())?.filesystem_type();
    ensure!(
        kind != OVERLAYFS_SUPER_MAGIC,
        "{} is on an overlay, on which containerd cannot stack another: set XDG_CACHE_HOME to a folder of a disk",
        folder.display()
    );
    // Arguments of daemons are words.
    ensure!(!folder.display().to_string().contains(char::is_whitespace), "{} has white space in it", folder.display());
    if !Path::new("/proc/sys/net/bridge").exists() {
        record::output(Command::new("modprobe").arg("br_netfilter"), "").context("modprobe br_netfilter")?;
        // The kernel turns it on wherever it is loaded: this machine's own bridges do without.
        for name in ["arptables", "ip6tables", "iptables"] {
            let path = format!("/proc/sys/net/bridge/bridge-nf-call-{name}");
            fs::write(&path, "0").with_context(|| format!("write 0 to {path}"))?;
        }
    }
    Ok(())
}

/// Makes one cluster's machines.
struct Maker<'a> {
    design: &'a Design,
    store: Store,
    images: &'a [PathBuf],
    cgroups: &'a [cgroup::Hierarchy],
}

impl Maker<'_> {
    /// The cluster with all its machines switched on, and its router if it has one.
    fn make(&self, guard: &Arc<Guard>, internet: &Host) -> Result<(Cluster, Option<Host>)> {
        let design = self.design;
        let access = Access::build(guard, internet, &design.member, &design.site)?;
        let (switch, bridge) = access.switch(internet);
        switch.ip(&design.routes(None)?)?;
        let dir = record::folder()?.join("pki").join(design.name());
        let machines: Vec<Machine> =
            design.seats().iter().map(|seat| machine(seat, bridge)).collect::<Result<Vec<Machine>>>()?;
        let dirs = |seat: &Seat| record::machine_dir(&seat.name).map(|dir| record::pki_dir(&dir));
        let kubeconfig = pki::make(design, &dir, dirs)?;
        let mut on = Vec::new();
        for (seat, mut machine) in design.seats().iter().zip(machines) {
            process::check_interrupted()?;
            power::describe(&self.spec(seat, &machine)?)?;
            cgroup::make(self.cgroups, &machine.name)?;
            power::on(&mut machine, switch.pid(), |command| guard.spawn(command))?;
            on.push(machine);
        }
        let control_plane = on.remove(0);
        let cluster = Cluster {
            name: design.name().to_owned(),
            kubeconfig,
            uplink: access.uplink.clone(),
            server: design.server(),
            dns: design.dns_service()?,
            control_plane,
            nodes: on,
            switch: switch.pid(),
        };
        Ok((cluster, access.router))
    }

    fn spec(&self, seat: &Seat, machine: &Machine) -> Result<Spec> {
        let design = self.design;
        let pki = record::pki_dir(&machine.dir);
        let mut shared = vec![tools::bin_dir()?, machine.dir.clone()];
        let steps = match seat.role {
            Role::ControlPlane => daemons::control_plane(design, &programs()?, &pki, self.store)?,
            Role::Node(_) => {
                shared.push(images::dir()?);
                daemons::node(design, seat, &programs()?, &pki, self.images)
            }
        };
        Ok(Spec {
            name: seat.name.clone(),
            dir: machine.dir.clone(),
            cgroups: self.cgroups.to_vec(),
            shared,
            sysctls: daemons::sysctls(),
            links: seat.links(design)?,
            files: daemons::files(design, seat, &pki)?,
            steps,
        })
    }
}

fn machine(seat: &Seat, bridge: &str) -> Result<Machine> {
    let dir = record::machine_dir(&seat.name)?;
    Ok(Machine { name: seat.name.clone(), address: seat.address(), pid: None, dir, bridge: bridge.to_owned() })
}

fn programs() -> Result<Programs> {
    Ok(Programs {
        etcd: tools::ETCD.path()?,
        kine: tools::KINE.path()?,
        apiserver: tools::KUBE_APISERVER.path()?,
        controller_manager: tools::KUBE_CONTROLLER_MANAGER.path()?,
        scheduler: tools::KUBE_SCHEDULER.path()?,
        kubelet: tools::KUBELET.path()?,
        proxy: tools::KUBE_PROXY.path()?,
        kubectl: tools::KUBECTL.path()?,
        flanneld: tools::FLANNELD.path()?,
        cilium: cilium::Programs::built()?,
    })
}

/// For `cargo xtask lab`, which lists the internet and the routers, and enters them.
fn host_records(internet: &Host, routers: &[Host]) -> Vec<HostRecord> {
    let record = |host: &Host| HostRecord { name: host.name().to_owned(), pid: host.pid(), addresses: Vec::new() };
    [internet].into_iter().chain(routers).map(record).collect()
}

/// What a cluster needs before anything of its users runs in it.
fn manifests(design: &Design) -> Result<String> {
    let coredns = COREDNS.replace("@IMAGE@", images::COREDNS).replace("@ADDRESS@", &design.dns_service()?.to_string());
    Ok(match design.network {
        Network::Flannel => format!("{coredns}---\n{FLANNEL}"),
        Network::Routed => coredns,
    })
}

/// Until the API server says that it is ready.
pub fn wait_for_server(cluster: &Cluster) -> Result<()> {
    let what = format!("the API server of {}", cluster.name);
    let logs = &["init", "etcd", "kine", "kube-apiserver", "steps"][..];
    wait(&what, &[(&cluster.control_plane, logs)], || cluster.kubectl(&["get", "--raw=/readyz"], "").map(drop))
}

/// Where ranges are not handed out by Kubernetes, tells it which one each node has.
fn give_ranges(design: &Design, cluster: &Cluster) -> Result<()> {
    for seat in design.seats() {
        let (Network::Routed, Role::Node(n)) = (design.network, seat.role) else { continue };
        let range = design.node_pods(n)?;
        let patch = format!(r#"{{"spec": {{"podCIDR": "{range}", "podCIDRs": ["{range}"]}}}}"#);
        let machine = cluster.nodes.iter().find(|node| node.name == seat.name).context("a node without a machine")?;
        wait(&format!("node {} to register", seat.name), &[(machine, NODE_LOGS)], || {
            cluster.kubectl(&["patch", "node", &seat.name, "--patch", &patch], "").map(drop)
        })?;
    }
    Ok(())
}

/// What is worth a look where a node does not become Ready.
const NODE_LOGS: &[&str] = &["init", "containerd", "steps", "kubelet", "flanneld"];

/// Until Kubernetes takes every node of a cluster for Ready.
pub fn wait_for_nodes(cluster: &Cluster) -> Result<()> {
    let jsonpath =
        r#"jsonpath={range .items[*]}{.metadata.name}={.status.conditions[?(@.type=="Ready")].status} {end}"#;
    let expected: String = cluster.nodes.iter().map(|node| format!("{}=True ", node.name)).collect();
    wait(&format!("the nodes of {} to be Ready", cluster.name), &node_logs(cluster), || {
        let seen = cluster.kubectl(&["get", "nodes", "-o", jsonpath], "")?;
        ensure!(seen == expected, "{seen}");
        Ok(())
    })
}

fn wait_for_dns(cluster: &Cluster) -> Result<()> {
    let mut logs = node_logs(cluster);
    logs.push((&cluster.control_plane, &["kube-controller-manager", "kube-scheduler"][..]));
    wait(&format!("CoreDNS of {}", cluster.name), &logs, || {
        let jsonpath = "jsonpath={.status.availableReplicas}";
        let seen = cluster.kubectl(&["-n", "kube-system", "get", "deployment", "coredns", "-o", jsonpath], "")?;
        ensure!(seen == "1", "available: {seen:?}; {}", cluster.kubectl(&["-n", "kube-system", "get", "pods"], "")?);
        Ok(())
    })
}

/// What is worth a look where pods of a cluster do not run.
pub fn node_logs(cluster: &Cluster) -> Vec<(&Machine, &'static [&'static str])> {
    cluster.nodes.iter().map(|node| (node, NODE_LOGS)).collect()
}

/// Waits until `attempt` succeeds. If it does not, or if a machine has ended, the error ends with these machines' logs.
pub fn wait(what: &str, logs: &[(&Machine, &[&str])], mut attempt: impl FnMut() -> Result<()>) -> Result<()> {
    let waited = wait_for(what, LIMIT, || {
        if process::interrupted() {
            return Ok(Err(anyhow!("interrupted")));
        }
        if let Some((machine, _)) = logs.iter().find(|(machine, _)| !runs(machine)) {
            return Ok(Err(anyhow!("{what}: {} has ended", machine.name)));
        }
        let result = attempt().map_err(|error| format!("{error:#}"));
        if result.is_err() {
            std::thread::sleep(POLL);
        }
        result.map(Ok)
    });
    waited.flatten().map_err(|error| match process::interrupted() {
        true => error,
        false => anyhow!("{error:#}{}", tails(logs)),
    })
}

fn runs(machine: &Machine) -> bool {
    let stat = |pid: u32| fs::read_to_string(format!("/proc/{pid}/stat"));
    machine.pid.is_some_and(|pid| stat(pid).is_ok_and(|stat| !stat.contains(") Z ")))
}

fn tails(logs: &[(&Machine, &[&str])]) -> String {
    let mut text = String::new();
    for (machine, names) in logs {
        for log in names.iter().map(|name| machine.log(name)).filter(|log| log.exists()) {
            text += &format!("\n--- the end of {}\n{}", log.display(), tail(&log, SHOWN_LINES));
        }
    }
    text
}
