//! The demo in real clusters, which it makes and removes: from pods of the one to pods of the other, while machines, pods
//! and API servers fail and Carrick is upgraded, by what an administrator has: kubectl, helm and the machine's switch.

mod faults;
mod pods;
mod policy;
mod traces;

use std::{
    collections::BTreeSet,
    path::Path,
    slice,
    sync::Arc,
    thread::sleep,
    time::{Duration, Instant},
};

use ::lab::{
    Namespace,
    capture::{Capture, Expected, Seen},
    carrick::{DEVICES, HOP_PORT, TUNNEL_PORT, difference},
    traffic::udp::Flow,
    wait_for,
};
use anyhow::Result;
use serde_json::json;

use self::pods::Pod;
use super::{
    Args, CONNECT_LIMIT, INTERVAL, describe, rows, say,
    table::{Table, tenths},
};
use crate::{
    cluster::{
        Store,
        carrick::{self, Members, NAMESPACE, Prepared},
        record::Clusters,
        up::{Options, Progress, Temporary},
    },
    lab::on_interrupt,
    process,
};

/// Of each cluster: two gateways and a worker.
const NODES: u8 = 3;

/// Makes the clusters, tries everything, and removes them.
pub fn run(args: &Args) -> Result<Table> {
    let image = carrick::prepare(args.carrick.as_deref(), "first")?;
    let second = carrick::prepare(args.upgrade.as_deref().or(args.carrick.as_deref()), "second")?;
    let made = Arc::new(Temporary::begin()?);
    on_interrupt(&made, Temporary::end);
    let table = tried(args, [&image, &second], &made);
    // They have ended, were kept, or are being ended by an interrupt: then this waits.
    made.end()?;
    process::check_interrupted()?;
    table
}

fn tried(args: &Args, [image, second]: [&Prepared; 2], made: &Temporary) -> Result<Table> {
    let began = Instant::now();
    let clusters = made.make(Options { store: Store::Etcd, nodes: NODES })?;
    let mut demo = Demo { table: Table::default(), clusters, image, second };
    let seconds = tenths(began.elapsed().as_secs_f64());
    demo.table.hold("two clusters, each an API server and three nodes: Ready", true, seconds, "s");
    if let Err(error) = demo.all(args.keep) {
        process::check_interrupted()?;
        demo.table.fail(&error);
        demo.show();
    }
    process::check_interrupted()?;
    if args.keep {
        made.keep()?;
        say("the clusters stay: cargo xtask cluster status; when done: cargo xtask cluster down");
    }
    Ok(demo.table)
}

/// The demo as it runs.
struct Demo<'a> {
    table: Table,
    clusters: Clusters,
    image: &'a Prepared,
    /// What it is upgraded to.
    second: &'a Prepared,
}

impl Demo<'_> {
    fn all(&mut self, keep: bool) -> Result<()> {
        let before = self.traces()?;
        self.install()?;
        self.table.begin("pods");
        pods::start(&self.clusters)?;
        let captures = self.underlay()?;
        self.reach()?;
        rows::underlay(&mut self.table, &captures.stop()?);
        self.applied()?;
        let sites = self.sites()?;
        self.faults()?;
        self.policies()?;
        let name = "uplinks of both sites: clear text for a remote range, faults included";
        rows::clear_text(&mut self.table, name, &sites.stop()?);
        if keep { Ok(()) } else { self.uninstalled(&before) }
    }

    fn install(&mut self) -> Result<()> {
        self.table.begin("gateways labelled, chart installed, folder applied: every node has every way after");
        let began = Instant::now();
        Members::of(&self.clusters)?.install(self.image, &Progress::start())?;
        let seconds = tenths(began.elapsed().as_secs_f64());
        self.table.hold(self.table.step(), true, seconds, "s");
        Ok(())
    }

    /// Of pods of each kind of node, both ways.
    fn reach(&mut self) -> Result<()> {
        self.table.begin("pods reach pods");
        let kinds = [("worker", 2), ("gateway", 0)];
        for (kind, n) in kinds {
            let (mn, va) = (self.pod("mn", n)?, self.pod("va", n)?);
            for (from, a, to, b) in [("mn", &mn, "va", &va), ("va", &va, "mn", &mn)] {
                let between = format!("{kind} pod of {from} to {kind} pod of {to}");
                rows::pings(&mut self.table, &between, [a.end(), b.end()])?;
                rows::page(&mut self.table, &between, [a.end(), b.end()])?;
                rows::throughput(&mut self.table, &between, [a.end(), b.end()])?;
            }
        }
        Ok(())
    }

    /// From the call of kubectl to the first answer over the route that it adds.
    fn applied(&mut self) -> Result<()> {
        self.table.begin("a RouteAdvertisement applied with kubectl: answered after");
        let (mn, va) = (self.pod("mn", 2)?, self.pod("va", 2)?);
        let cluster = self.clusters.cluster("mn")?;
        let route = cluster.kubectl(&["get", "routeadvertisement", "va", "-o", "yaml"], "")?;
        cluster.kubectl(&["delete", "routeadvertisement", "va"], "")?;
        let flow = Flow::start(&mn.network, &va.network, (va.ip, 0).into(), INTERVAL)?;
        wait_silent(slice::from_ref(&flow))?;
        flow.stop()?;
        let flow = Flow::start(&mn.network, &va.network, (va.ip, 0).into(), INTERVAL)?;
        let called = Instant::now();
        cluster.kubectl(&["apply", "-f", "-"], &pods::without_identity(&route))?;
        let answered = wait_for("an answer", CONNECT_LIMIT, || flow.first_answer().ok_or_else(|| "none".to_owned()))?;
        flow.stop()?;
        let milliseconds = tenths(answered.duration_since(called).as_secs_f64() * 1e3);
        self.table.hold(self.table.step(), true, milliseconds, "ms");
        self.wait_all()
    }

    fn uninstalled(&mut self, before: &[(String, BTreeSet<String>)]) -> Result<()> {
        self.table.begin("uninstall");
        for cluster in &self.clusters.clusters {
            let uninstall = ("uninstall".to_owned(), json!(true));
            let values = carrick::values(cluster, self.image).into_iter().chain([uninstall]).collect();
            carrick::upgrade(cluster, &values)?;
        }
        for cluster in &self.clusters.clusters {
            carrick::wait_rolled_out(cluster)?;
            carrick::uninstall(cluster)?;
        }
        for ((node, before), (_, now)) in before.iter().zip(self.traces()?) {
            let left = difference(before, &now);
            describe(&left);
            self.table.hold(format!("after uninstall: left on {node}"), left.is_empty(), left.len(), "things");
        }
        Ok(())
    }

    fn wait_all(&self) -> Result<()> {
        Members::of(&self.clusters)?.wait_all()
    }

    /// On node `n` of a cluster.
    fn pod(&self, cluster: &str, n: u8) -> Result<Pod> {
        pods::on(self.clusters.cluster(cluster)?, &format!("{cluster}-{n}"))
    }

    /// On the internet's end of the uplink of the site behind NAT: all that passes between the two.
    fn underlay(&self) -> Result<Captures> {
        let va = self.clusters.cluster("va")?;
        let internet = namespace("internet", self.clusters.internet)?;
        let private = self.ranges(|_| true)?;
        Captures::start([(internet, va.uplink.clone(), private)])
    }

    /// Where what leaves a site passes. Between its own nodes its own ranges may.
    fn sites(&self) -> Result<Captures> {
        let mut places = Vec::new();
        for cluster in &self.clusters.clusters {
            let network = namespace(&cluster.name, cluster.switch)?;
            let private = self.ranges(|name| name != cluster.name)?;
            places.push((network, cluster.control_plane.bridge.clone(), private));
        }
        Captures::start(places)
    }

    fn ranges(&self, of: impl Fn(&str) -> bool) -> Result<Vec<ipnetwork::IpNetwork>> {
        let members = Members::of(&self.clusters)?;
        let chosen = members.all.iter().filter(|(design, _)| of(design.name()));
        Ok(chosen.flat_map(|(design, _)| design.member.pod_ranges()).collect())
    }

    /// By node, in order.
    fn traces(&self) -> Result<Vec<(String, BTreeSet<String>)>> {
        let nodes = self.clusters.clusters.iter().flat_map(|cluster| &cluster.nodes);
        nodes.map(|node| Ok((node.name.clone(), traces::of(node)?))).collect()
    }

    /// What may tell why something failed.
    fn show(&self) {
        for cluster in &self.clusters.clusters {
            let pods = cluster.kubectl(&["get", "pods", "-A", "-o", "wide"], "");
            say(&format!("{}\n{}", cluster.name, pods.unwrap_or_else(|error| format!("{error:#}"))));
            for (node, pod) in carrick::agents(cluster).unwrap_or_default() {
                let exec = ["-n", NAMESPACE, "exec", &pod, "--", "carrick", "status"];
                let status = cluster.kubectl(&exec, "").unwrap_or_else(|error| format!("{error:#}"));
                say(&format!("{node}\n{status}"));
            }
        }
    }
}

/// Until none of them is answered any more.
fn wait_silent(flows: &[Flow]) -> Result<()> {
    let answered = || flows.iter().map(Flow::answered).collect::<Vec<_>>();
    wait_for("nothing to arrive any more", CONNECT_LIMIT, || {
        let before = answered();
        sleep(Duration::from_millis(500));
        if answered() == before { Ok(()) } else { Err("something does".to_owned()) }
    })
}

fn namespace(name: &str, pid: u32) -> Result<Namespace> {
    Namespace::of_process(name, Path::new(&format!("/proc/{pid}")))
}

/// Running captures.
struct Captures(Vec<Capture>);

impl Captures {
    fn start(places: impl IntoIterator<Item = (Namespace, String, Vec<ipnetwork::IpNetwork>)>) -> Result<Captures> {
        let start = |(network, interface, private): (Namespace, String, _)| {
            let expected = Expected { tunnel: TUNNEL_PORT..=TUNNEL_PORT + DEVICES - 1, hop: HOP_PORT, private };
            Capture::start(&network, &interface, expected)
        };
        Ok(Captures(places.into_iter().map(start).collect::<Result<_>>()?))
    }

    /// Ends them; the sum of what they saw.
    fn stop(self) -> Result<Seen> {
        let mut sum = Seen::default();
        for capture in self.0 {
            sum.add(capture.stop()?);
        }
        Ok(sum)
    }
}
