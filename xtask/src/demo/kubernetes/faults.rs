//! What fails in the clusters while worker pods talk: machines, pods, versions, control planes, and the kinds themselves.

use std::{fs, thread::sleep, time::Duration};

use anyhow::{Context, Result};
use nix::sys::signal::Signal;

use super::{Demo, pods};
use crate::{
    bench::way,
    cluster::{
        carrick::{self, NAMESPACE},
        power,
        record::{Cluster, Machine},
        up,
    },
    demo::load::{Load, Price},
};

/// How long an API server is away.
const AWAY: Duration = Duration::from_secs(120);
/// How long one hangs.
const MUTE: Duration = Duration::from_secs(30);
/// How long other daemons, and the kinds, are.
const SHORT: Duration = Duration::from_secs(10);
const CRDS: [&str; 4] = [
    "meshclusters.carrick.dev",
    "routeadvertisements.carrick.dev",
    "meshgateways.carrick.dev",
    "egresspolicies.carrick.dev",
];
/// What of them administrators write.
const FOLDER: &str = "meshclusters,routeadvertisements,egresspolicies";

impl Demo<'_> {
    pub(super) fn faults(&mut self) -> Result<()> {
        self.node_off()?;
        self.node_deleted()?;
        self.pods_deleted()?;
        self.tunnel_replaced()?;
        self.upgraded()?;
        self.control_plane_fails()?;
        self.crds_deleted()
    }

    /// That gateway of `mn` goes off by which most is sent.
    fn node_off(&mut self) -> Result<()> {
        let node = self.under_load("a gateway node's power cut", Price::Some, |demo| {
            let node = demo.busiest_gateway("mn")?;
            demo.switch(&node, false)?;
            Ok(node)
        })?;
        self.under_load("that node's power back", Price::Any, |demo| {
            demo.switch(&node, true)?;
            up::wait_for_nodes(demo.clusters.cluster("mn")?)?;
            demo.wait_all()
        })
    }

    /// Its object goes while nothing on it runs; it joins again as a new one, which has to be labelled.
    fn node_deleted(&mut self) -> Result<()> {
        self.under_load("a gateway node deleted while it was off, joined again", Price::Any, |demo| {
            demo.switch("mn-1", false)?;
            let cluster = demo.clusters.cluster("mn")?;
            cluster.kubectl(&["delete", "node", "mn-1"], "")?;
            sleep(SHORT);
            demo.switch("mn-1", true)?;
            let cluster = demo.clusters.cluster("mn")?;
            up::wait("mn-1 to register", &up::node_logs(cluster), || carrick::label(cluster, 1, "mn-1"))?;
            up::wait_for_nodes(cluster)?;
            demo.wait_all()
        })
    }

    fn busiest_gateway(&self, cluster: &str) -> Result<String> {
        let sent = |node: &Machine| -> Result<u64> {
            let Some(pid) = node.pid else { return Ok(0) };
            let path = format!("/proc/{pid}/net/dev");
            Ok(way::transmitted(&fs::read_to_string(&path).context(path)?).values().sum())
        };
        let nodes = &self.clusters.cluster(cluster)?.nodes;
        let look = || nodes.iter().map(sent).collect::<Result<Vec<u64>>>();
        let before = look()?;
        sleep(Duration::from_millis(500));
        let more = look()?.into_iter().zip(before).map(|(now, before)| now.saturating_sub(before));
        let busiest = nodes.iter().zip(more).max_by_key(|(_, packets)| *packets);
        Ok(busiest.context("a cluster without nodes")?.0.name.clone())
    }

    /// Of both clusters at once, as a hasty administrator does it.
    fn pods_deleted(&mut self) -> Result<()> {
        self.under_load("all agents' pods deleted by force", Price::Nothing, |demo| {
            for cluster in &demo.clusters.clusters {
                let pods = carrick::agents(cluster)?;
                let names: Vec<&str> = pods.values().map(String::as_str).collect();
                let options = ["-n", NAMESPACE, "delete", "pods", "--force", "--grace-period=0"];
                cluster.kubectl(&[&options, &names[..]].concat(), "")?;
            }
            demo.wait_all()
        })
    }

    /// As `values.yaml` says that it is to be done.
    fn tunnel_replaced(&mut self) -> Result<()> {
        self.under_load("a gateway drained, its tunnel's pod replaced", Price::Nothing, |demo| {
            let cluster = demo.clusters.cluster("mn")?;
            let at = |selector: &str| -> Result<String> {
                let pod = carrick::by_node(cluster, selector)?.remove("mn-0");
                pod.with_context(|| format!("no pod of {selector} runs on mn-0"))
            };
            let agent = at("app.kubernetes.io/component=gateway")?;
            let drain = ["-n", NAMESPACE, "exec", agent.as_str(), "-c", "agent", "--", "carrick", "drain"];
            cluster.kubectl_within(Duration::from_secs(60), &drain, "")?;
            let old = at("app.kubernetes.io/component=tunnel")?;
            cluster.kubectl_within(Duration::from_secs(60), &["-n", NAMESPACE, "delete", "pod", &old], "")?;
            up::wait("a new tunnel", &[], || at("app.kubernetes.io/component=tunnel").map(drop))?;
            cluster.kubectl(&[&drain[..], &["--undo"]].concat(), "")?;
            demo.wait_all()
        })
    }

    /// To another image, and back. The tunnel stays at its own, as `values.yaml` says that it is to be done.
    fn upgraded(&mut self) -> Result<()> {
        let second = self.second;
        for cluster in &self.clusters.clusters {
            carrick::import(cluster, second)?;
        }
        self.under_load("helm upgrade: all agents replaced by a second build", Price::Nothing, |demo| {
            demo.rolled_out(|cluster| carrick::upgrade(cluster, &carrick::values(cluster, second)))
        })?;
        self.under_load("helm rollback: and by the first again", Price::Nothing, |demo| {
            demo.rolled_out(carrick::rollback)
        })
    }

    /// Does something to the release in both clusters; returns when all their agents have every way.
    fn rolled_out(&self, change: impl Fn(&Cluster) -> Result<()>) -> Result<()> {
        self.clusters.clusters.iter().try_for_each(change)?;
        self.clusters.clusters.iter().try_for_each(carrick::wait_rolled_out)?;
        self.wait_all()
    }

    fn control_plane_fails(&mut self) -> Result<()> {
        let down = |machines: &[&Machine], daemon: &str, time| -> Result<()> {
            machines.iter().try_for_each(|machine| machine.stop(daemon))?;
            sleep(time);
            machines.iter().try_for_each(|machine| machine.start(daemon))
        };
        self.under_load("an API server killed, back after 120 s", Price::Nothing, |demo| {
            let cluster = demo.clusters.cluster("mn")?;
            down(&[&cluster.control_plane], "kube-apiserver", AWAY)?;
            up::wait_for_server(cluster)?;
            demo.wait_all()
        })?;
        self.under_load("an API server that accepts and does not answer, for 30 s", Price::Nothing, |demo| {
            let cluster = demo.clusters.cluster("va")?;
            cluster.control_plane.signal("kube-apiserver", Signal::SIGSTOP)?;
            sleep(MUTE);
            cluster.control_plane.signal("kube-apiserver", Signal::SIGCONT)?;
            up::wait_for_server(cluster)?;
            demo.wait_all()
        })?;
        self.under_load("etcd killed, back after 10 s", Price::Nothing, |demo| {
            let cluster = demo.clusters.cluster("va")?;
            down(&[&cluster.control_plane], "etcd", SHORT)?;
            up::wait_for_server(cluster)?;
            demo.wait_all()
        })?;
        self.under_load("all kubelets killed, back after 10 s", Price::Nothing, |demo| {
            let nodes: Vec<&Machine> = demo.clusters.clusters.iter().flat_map(|cluster| &cluster.nodes).collect();
            down(&nodes, "kubelet", SHORT)?;
            demo.clusters.clusters.iter().try_for_each(up::wait_for_nodes)?;
            demo.wait_all()
        })
    }

    /// By mistake, and with them every object. The chart brings the kinds back, the folder the objects.
    fn crds_deleted(&mut self) -> Result<()> {
        self.under_load("all CRDs deleted, back after 10 s", Price::Nothing, |demo| {
            let cluster = demo.clusters.cluster("va")?;
            let objects = cluster.kubectl(&["get", FOLDER, "-o", "yaml"], "")?;
            cluster.kubectl_within(Duration::from_secs(60), &[&["delete", "crd"], &CRDS[..]].concat(), "")?;
            sleep(SHORT);
            carrick::upgrade(cluster, &carrick::values(cluster, demo.image))?;
            let objects = pods::without_identity(&objects);
            up::wait("the folder to be taken again", &[], || {
                cluster.kubectl(&["apply", "-f", "-"], &objects).map(drop)
            })?;
            demo.wait_all()
        })
    }

    /// Does something while worker pods talk, and says what it cost.
    pub(super) fn under_load<T>(
        &mut self,
        name: &'static str,
        price: Price,
        fault: impl FnOnce(&mut Self) -> Result<T>,
    ) -> Result<T> {
        self.table.begin(name);
        let (va, mn) = (self.pod("va", 2)?, self.pod("mn", 2)?);
        let load = Load::start(va.end(), mn.end())?;
        let fine = self.table.is_ok();
        let done = fault(self)?;
        load.end(&mut self.table, name, price)?;
        if fine && !self.table.is_ok() {
            self.show();
        }
        Ok(done)
    }

    fn switch(&mut self, name: &str, on: bool) -> Result<()> {
        let cgroups = self.clusters.cgroups.clone();
        let (machine, switch) = self.clusters.machine_mut(name)?;
        match on {
            true => power::on_again(machine, switch)?,
            false => power::off(machine, switch, &cgroups)?,
        }
        self.clusters.save()
    }
}
