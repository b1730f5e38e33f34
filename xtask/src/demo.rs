//! `cargo xtask demo`: two members talk, on one machine, with nothing mocked.
//!
//! The table, or the JSON, goes to standard output; progress to standard error.

mod gateways;
mod kubernetes;
mod load;
mod rows;
mod table;

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    sync::Arc,
    thread::sleep,
    time::{Duration, Instant},
};

use ::lab::{
    Carrick, Cni, Lab, Member, Mesh, Node,
    capture::{Capture, Expected, Seen},
    carrick::{DEVICES, HOP_PORT, Running, TUNNEL_PORT, difference, snapshot},
    guard::Guard,
    traffic::udp::Flow,
    wait_for,
};
use anyhow::{Result, ensure};
use clap::ValueEnum;

use self::{
    load::End,
    table::{Table, tenths},
};
use crate::{lab::end_on_interrupt, process, setup::For};

/// Whether `carrick` steers between nodes and gateways: with false the members have one node each, and the demo shows
/// what such members can.
const DATA_PLANE: bool = true;

const PORT: u16 = 8080;
/// Between packets of numbered UDP.
const INTERVAL: Duration = Duration::from_millis(1);
const CONNECT_LIMIT: Duration = Duration::from_secs(60);
/// The range that `mn` offers later, and an address in it.
const LATER_RANGE: &str = "10.43.0.0/16";
const LATER_ADDRESS: &str = "10.43.0.2";

#[derive(Debug, clap::Args)]
pub struct Args {
    /// In real Kubernetes clusters, from pods of the one to pods of the other.
    #[arg(long, conflicts_with = "cni")]
    kubernetes: bool,
    /// Leave everything up, and print how to enter each node.
    #[arg(long)]
    keep: bool,
    /// Run this carrick instead of building one.
    #[arg(long, value_name = "PATH")]
    carrick: Option<PathBuf>,
    /// Upgrade the agents to this carrick, instead of a copy of the first.
    #[arg(long, value_name = "PATH")]
    upgrade: Option<PathBuf>,
    /// Network plugin of both members: bridge, host-routing, skip-fib, fabric or strict.
    #[arg(long, default_value = "bridge")]
    cni: Cni,
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    output: Output,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Output {
    Table,
    Json,
}

impl Args {
    /// What it needs of the machine.
    pub fn needs(&self) -> For {
        if self.kubernetes { For::Cluster } else { For::Demo }
    }
}

/// Runs the demo, with the `carrick` that `build` returns the path of. True if every check holds.
pub fn run(args: &Args, build: impl FnOnce() -> Result<PathBuf>) -> Result<bool> {
    let table = if args.kubernetes {
        kubernetes::run(args)?
    } else {
        let carrick = Carrick::new(&args.carrick.clone().map_or_else(build, Ok)?)?;
        let guard = Guard::unique("demo")?;
        end_on_interrupt(&guard);
        let table = members(args, &carrick, guard.clone());
        // It has ended, was kept, or is being ended by an interrupt: then this waits.
        guard.end()?;
        // What failed after an interrupt says nothing.
        process::check_interrupted()?;
        table?
    };
    table.print(args.output);
    Ok(table.is_ok())
}

fn members(args: &Args, carrick: &Carrick, guard: Arc<Guard>) -> Result<Table> {
    let [mn, va] = if DATA_PLANE { Member::pair_of_three(args.cni) } else { Member::pair() };
    let (nodes, gateways) = (mn.nodes, mn.gateways);
    say(&format!(
        "from network namespaces: an internet, a NAT router, two members; of each nodes: {nodes}, gateways: {gateways}"
    ));
    let mn = Member { allowed: vec![LATER_RANGE.parse()?], ..mn };
    let lab = Lab::build(guard, &[mn, va])?;
    let upgrade = args.upgrade.as_deref();
    let mut demo = Demo { carrick, upgrade, lab: &lab, keep: args.keep, table: Table::default() };
    let running = demo.all().unwrap_or_else(|error| {
        demo.table.fail(&error);
        Vec::new()
    });
    let table = demo.table;
    process::check_interrupted()?;
    if !table.is_ok() {
        lab.show_logs();
    }
    if args.keep {
        running.into_iter().for_each(Running::detach);
        let name = lab.name().to_owned();
        for (_, node) in lab.nodes() {
            for host in [&node.host, &node.pods[0].host] {
                say(&format!("cargo xtask lab enter {name} {}", host.name()));
            }
        }
        say(&format!("when done: cargo xtask lab down {name}"));
        lab.keep()?;
    }
    Ok(table)
}

/// The demo as it runs.
struct Demo<'a> {
    carrick: &'a Carrick,
    upgrade: Option<&'a Path>,
    lab: &'a Lab,
    keep: bool,
    table: Table,
}

/// The two ends, in both directions.
type Ends<'a> = [(&'a Member, &'a Node, &'a Member, &'a Node); 2];

fn between((member, _, remote, _): &(&Member, &Node, &Member, &Node)) -> String {
    format!("pod of {} to pod of {}", member.name, remote.name)
}

fn towards<'a>((_, node, _, remote): &(&'a Member, &'a Node, &'a Member, &'a Node)) -> [End<'a>; 2] {
    [End::of(&node.pods[0]), End::of(&remote.pods[0])]
}

impl Demo<'_> {
    /// Everything, in order. Returns what still runs.
    fn all(&mut self) -> Result<Vec<Running>> {
        let lab = self.lab;
        let (mn, va) = (lab.cluster("mn")?, lab.cluster("va")?);
        let ends = [
            (&va.member, &va.nodes[0], &mn.member, &mn.nodes[0]),
            (&mn.member, &mn.nodes[0], &va.member, &va.nodes[0]),
        ];
        mn.nodes[0].add_address(LATER_ADDRESS.parse()?)?;
        let before = lab.nodes().map(|(_, node)| snapshot(node)).collect::<Result<Vec<_>>>()?;

        self.table.begin("connected");
        let mesh = self.carrick.write_mesh(lab)?;
        if mesh.own("mn").is_some() {
            mesh.write_pod("mn", "later", &mn.nodes[0], &[LATER_ADDRESS.parse()?])?;
        }
        let start = Instant::now();
        let mut running = Vec::new();
        for (member, node) in lab.nodes() {
            running.push(self.carrick.start(member, node, &mesh)?);
        }
        self.connected(start)?;

        let captures = self.capture()?;
        self.pings(&ends)?;
        self.pages(&ends)?;
        self.throughput(&ends)?;
        let mut seen = stop(captures)?;
        self.added_route(&mesh, &ends)?;
        let captures = self.capture()?;
        let mut running = self.killed_agents(&mesh, running, &ends)?;
        seen.add(stop(captures)?);
        rows::underlay(&mut self.table, &seen);
        if DATA_PLANE {
            self.gateways(&mesh, &mut running)?;
        }

        if self.keep {
            return Ok(running);
        }
        self.cleanup(running, &before)?;
        Ok(Vec::new())
    }

    fn connected(&mut self, start: Instant) -> Result<()> {
        let [mn, va] = ["mn", "va"];
        for (member, node) in self.lab.nodes() {
            let remote = if member.name == mn { va } else { mn };
            self.carrick.wait_connected(node, &[remote], CONNECT_LIMIT)?;
            let seconds = tenths(start.elapsed().as_secs_f64());
            let what = if node.slot.is_some() { format!("connected to {remote}") } else { "ready".to_owned() };
            self.table.hold(format!("{} {what}", node.host.name()), true, seconds, "s");
        }
        Ok(())
    }

    fn pings(&mut self, ends: &Ends) -> Result<()> {
        self.table.begin("ping");
        ends.iter().try_for_each(|ends| rows::pings(&mut self.table, &between(ends), towards(ends)))
    }

    fn pages(&mut self, ends: &Ends) -> Result<()> {
        self.table.begin("http");
        ends.iter().try_for_each(|ends| rows::page(&mut self.table, &between(ends), towards(ends)))
    }

    fn throughput(&mut self, ends: &Ends) -> Result<()> {
        self.table.begin("tcp");
        ends.iter().try_for_each(|ends| rows::throughput(&mut self.table, &between(ends), towards(ends)))
    }

    /// From the change of a file to the first answer over the route that it adds.
    fn added_route(&mut self, mesh: &Mesh, ends: &Ends) -> Result<()> {
        self.table.begin("route added to the folder: answered after");
        let [(_, va, mn, mn_node), _] = ends;
        let address: SocketAddr = (LATER_ADDRESS.parse::<IpAddr>()?, PORT).into();
        let flow = Flow::start(&va.pods[0].host, &mn_node.pods[0].host, address, INTERVAL)?;
        sleep(Duration::from_millis(300));
        ensure!(flow.first_answer().is_none(), "{address} answered before there was a route to it");
        let changed = Instant::now();
        mesh.write_routes(mn, &mn.allowed_ranges())?;
        let answered = wait_for("an answer over the new route", CONNECT_LIMIT, || {
            flow.first_answer().ok_or_else(|| "no answer".to_owned())
        })?;
        flow.stop()?;
        let milliseconds = tenths(answered.duration_since(changed).as_secs_f64() * 1e3);
        self.table.hold(self.table.step(), true, milliseconds, "ms");
        Ok(())
    }

    fn killed_agents(&mut self, mesh: &Mesh, running: Vec<Running>, ends: &Ends) -> Result<Vec<Running>> {
        self.table.begin("agents killed and restarted: lost of 1 kHz UDP, there and back");
        let [(_, va, _, mn), _] = ends;
        let (from, to) = (&va.pods[0], &mn.pods[0]);
        let flow = Flow::start(&from.host, &to.host, (to.ip(), PORT).into(), INTERVAL)?;
        sleep(Duration::from_secs(1));
        let mut restarted = Vec::new();
        for (Running { tunnel, agent }, (member, node)) in running.into_iter().zip(self.lab.nodes()) {
            agent.kill()?;
            sleep(Duration::from_secs(1));
            restarted.push(Running { tunnel, agent: self.carrick.start_agent(member, node, mesh)? });
        }
        self.all_connected()?;
        sleep(Duration::from_secs(1));
        let report = flow.stop()?;
        say(&format!("{} packets sent, longest gap {} ms", report.sent, report.back.longest_gap_ms));
        self.table.hold(self.table.step(), report.back.lost == 0, report.back.lost, "packets");
        Ok(restarted)
    }

    /// On the internet's end of both uplinks.
    fn capture(&self) -> Result<Vec<Capture>> {
        let expected = Expected {
            tunnel: TUNNEL_PORT..=TUNNEL_PORT + DEVICES - 1,
            hop: HOP_PORT,
            private: self.lab.clusters.iter().flat_map(|cluster| cluster.member.allowed_ranges()).collect(),
        };
        let start = |uplink: &str| Capture::start(&self.lab.internet, uplink, expected.clone());
        self.lab.clusters.iter().map(|cluster| start(&cluster.uplink)).collect()
    }

    fn cleanup(&mut self, running: Vec<Running>, before: &[BTreeSet<String>]) -> Result<()> {
        self.table.begin("cleanup");
        running.into_iter().try_for_each(Running::terminate)?;
        for ((_, node), before) in self.lab.nodes().zip(before) {
            self.carrick.cleanup(node)?;
            let left = difference(before, &snapshot(node)?);
            describe(&left);
            self.table.hold(
                format!("after cleanup: left on {}", node.host.name()),
                left.is_empty(),
                left.len(),
                "things",
            );
        }
        Ok(())
    }
}

fn stop(captures: Vec<Capture>) -> Result<Seen> {
    let mut sum = Seen::default();
    for capture in captures {
        sum.add(capture.stop()?);
    }
    Ok(sum)
}

fn say(line: &str) {
    eprintln!("demo: {line}");
}

fn describe(lines: &[String]) {
    lines.iter().for_each(|line| say(line));
}
